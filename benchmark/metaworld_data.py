"""Two benchmarks of Meta-World ML1, as families: data by the package's scripted policies, and success rates of runs.

Meta-World pins an older MuJoCo, so it has an environment of its own (1.5 GB of memory):

    python -m venv metaworld-venv && metaworld-venv/bin/pip install -r benchmark/requirements-metaworld.txt
    . metaworld-venv/bin/activate
    python benchmark/metaworld_data.py collect Reach       # or Push
    python focal.py --env benchmark.metaworld_data:Reach --final-episodes 2
    python benchmark/metaworld_data.py success RUN_DIR ..  # of the policy and of behavior cloning (bc)
"""

import argparse
import pickle
import sys
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

try:
    import metaworld
    from metaworld.policies import ENV_POLICY_MAP
except ImportError:
    raise SystemExit("no metaworld here: pip install -r benchmark/requirements-metaworld.txt") from None

NOISE = 0.1, 0.5, 2.0, 8.0  # of the recorded episodes: standard deviation of what is added to the scripted action


class ML1(dc.GymFamily):
    """The 50 tasks of the package's list: 40 for training, 10 for test. params = position of the object, of the goal.
    The goal is hidden: its place in the observation is 0. Rewards are divided by 10: the task is solved at 1."""

    def __init__(self):
        benchmark = metaworld.ML1(self.name, seed=1337)
        make, self.tasks = benchmark.train_classes[self.name], benchmark.train_tasks
        params = np.array([pickle.loads(task.data)["rand_vec"] for task in self.tasks])

        def build(own):
            env = make()
            env.set_task(self.tasks[abs(params - own).sum(1).argmin()])
            return gym.wrappers.TransformReward(env, lambda rew: rew / 10)

        super().__init__(build, params, range(40, 50), horizon=200)


class Reach(ML1):
    name = "reach-v3"


class Push(ML1):
    name = "push-v3"


def collect(name, episodes):
    """Record, for each noise level, `episodes` on each training task, two and a foreign context on each test task."""
    env = f"benchmark.metaworld_data:{name}"
    family, rng = dc.family_of(env), np.random.default_rng(0)
    params, train_ids, test_ids = family.draw()
    scripted = ENV_POLICY_MAP[family.name]()

    def play(tasks, noise, goals=None):
        """One episode on each task, heading for the goals of the tasks `goals`; noise None: random actions."""
        goals = params[tasks if goals is None else goals, -3:]

        def policy(obs, rew):
            if noise is None:
                return torch.as_tensor(rng.uniform(-1, 1, (len(obs), 4)))
            seen = np.concatenate([obs[:, :-3], goals], 1)
            act = np.stack([scripted.get_action(row) for row in seen]).clip(-1, 1)
            return torch.as_tensor(act + noise * rng.standard_normal(act.shape)).clamp(-1, 1)

        rows = dc.TaskEnv(family, params, tasks)
        played = dc.rollout(rows, policy, rng.integers(2**31, size=len(tasks)))
        rows.close()
        return list(zip(played["observations"], played["actions"], played["rewards"]))

    tasks, own, foreign = np.arange(50), [[] for _ in range(50)], [[] for _ in test_ids]
    for noise in NOISE:
        for k in range(episodes):
            for task, episode in zip(tasks, play(tasks if k < 2 else train_ids, noise)):
                own[task].append(episode)
        for contexts, episode in zip(foreign, play(test_ids, noise, rng.choice(train_ids, len(test_ids)))):
            contexts.append(episode)
        print(f"noise {noise}: return {np.mean([own[task][-1][2].sum() for task in train_ids]):.1f}", flush=True)
    worst, best = ([rew.sum() for _, _, rew in play(tasks, noise)] for noise in (None, 0.0))
    scale = {"task_params": params, "random_returns": worst, "expert_returns": best}
    data = dc.write_dataset(dc.default_path(env), env, own, train_ids, test_ids, foreign, **scale)
    print("\n".join([f"wrote {data.path}; train: --env {env}", *data.about()]))


def success(run_dir):
    """Print how often the run's policy, and behavior cloning, solve the test tasks (two episodes on each)."""
    from report import revisit

    def look(script, agent, data, args):
        traced = []
        dc.evaluate(data, partial(script.adapt, agent), ("iid",), trace=traced)
        dc.evaluate(data, partial(script.adapt, agent, bc=True), ("iid",), trace=traced)
        return [100 * (played["rewards"] >= 1).any(1).mean() for played in traced]

    policy, bc = revisit(run_dir, look)
    print(f"{run_dir}: {policy:.0f} % of the episodes on test tasks solved, behavior cloning {bc:.0f} %")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*too high")  # of the scripted policies: actions are clipped
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("collect", "success"))
    parser.add_argument("what", nargs="+", help="Reach or Push; of success, run directories")
    parser.add_argument("--episodes", type=int, default=5, help="per noise level and training task")
    given = parser.parse_args()
    for what in given.what:
        collect(what, given.episodes) if given.command == "collect" else success(Path(what))
