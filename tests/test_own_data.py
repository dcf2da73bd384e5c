"""A user's own data, data without a simulator, and families in a user's file."""

import importlib
import json
import math
import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, stop_message
from test_smoke import NAMES
from test_smoke import SHORT as FEW

import data_collect as dc
import flora
import focal

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/OWN_DATA.md").read_text(), flags=re.DOTALL)
SHORT = {"device": "cpu", "total_updates": 2, "eval_every": 1, "log_every": 1, "final_episodes": 2, "width": 8}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with families and datasets of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dc, "FAMILIES", dict(dc.FAMILIES))
    monkeypatch.setattr(dc, "DATASETS", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def episode(length):
    rng = np.random.default_rng(length)
    return rng.normal(size=(length + 1, 3)), rng.uniform(-1, 1, (length, 2)), rng.normal(size=length)


def write(path, episodes, env="offline", train=(0, 1), test=(2,), **optional):
    return dc.write_dataset(path, env, episodes, train, test, **optional)


# ---- the document's examples --------------------------------------------------


def test_documented_arrays_train_a_method(folder, capsys):
    exec(BLOCKS[0], {})
    result = focal.train(focal.Args(env="offline", dataset="own.npz", **SHORT))
    tags = {tag for tag in result if tag.startswith("eval/")}
    expected = {f"eval/{p}/action_error" for p in ("iid", "train", "zero_shot", "bc")}
    assert tags == expected | {"eval/iid/value", "eval/iid/value_above_best"}  # no return, no fake one
    assert all(0.4 < result[tag] < 0.8 for tag in expected)  # the actions are uniform, so 1 / sqrt(3)
    out = capsys.readouterr().out
    assert "returns left out: there is no simulator" in out and "eval  iid action error 0." in out
    again = focal.train(focal.Args(env="offline", resume=result["run_dir"], dataset="own.npz", **SHORT, eval_only=True))
    assert again["eval/iid/action_error"] == result["eval/iid/action_error"]
    exec(BLOCKS[1], names := {"run_dir": result["run_dir"]})
    assert names["act"].numpy().shape == (1, 2) and names["act"].abs().max() <= 1


def test_documented_environment_trains_a_method(folder):
    (folder / "pendulum.py").write_text(BLOCKS[2])
    family = dc.family_of("pendulum:Pendulum")
    assert family.horizon == 200  # the time limit of Pendulum-v1
    family.horizon = 20
    tiny = {"train_tasks": 3, "test_tasks": 2, "total_updates": 20, "rows": 4, "episodes": 3, "test_episodes": 2}
    dc.collect(dc.Args(env="pendulum:Pendulum", ood_contexts=1, width=8, **tiny))
    result = focal.train(focal.Args(env="pendulum:Pendulum", **SHORT))
    assert all(math.isfinite(result[f"eval/{p}/{x}"]) for p in dc.PROTOCOLS for x in ("return", "normalized"))
    assert result["run_dir"].startswith("runs/pendulum-Pendulum/focal/")


def test_readmes_family_collects_data(folder):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(import numpy as np\nfrom data_collect.*?)```", readme, flags=re.DOTALL)[1]
    (folder / "cart.py").write_text(code)
    tiny = {"train_tasks": 3, "test_tasks": 2, "total_updates": 20, "rows": 4, "episodes": 3, "test_episodes": 2}
    dc.collect(dc.Args(env="cart:Cart", ood_contexts=1, width=8, **tiny))
    data = dc.load_dataset("cart:Cart")
    assert data.train_ids.size == 3 and data.behavior_return < 0


# ---- write_dataset ------------------------------------------------------------


def test_written_file_holds_the_episodes(folder):
    plain = [[episode(n) for n in lengths] for lengths in ((4, 7), (5,), (2, 3, 6))]
    plain[1][0][1][0] = 1 + 1e-6, -1 - 1e-6  # as rounding leaves them
    obs, act, rew = plain[0][1]
    given = [list(of_task) for of_task in plain]
    given[0][1], given[2][0] = (obs, act, rew[:, None], np.True_), (*plain[2][0], True)
    data = write("own.npz", given, foreign=[[episode(3), episode(1)]], expert_returns=[1.0, 2, 3])
    assert (data.obs_dim, data.act_dim, data.family.horizon) == (3, 2, 7) and data.ood_lengths.tolist() == [[3, 1]]
    for task, number in ((t, n) for t in range(3) for n in range(len(plain[t]))):
        obs, act, rew = (torch.as_tensor(x, dtype=torch.float32) for x in plain[task][number])
        rows = data.unpack(data.episodes[task, number, : len(act)])
        assert torch.equal(rows.act, act.clip(-1, 1)) and torch.equal(rows.rew, rew)
        torch.testing.assert_close(torch.stack([rows.obs, rows.next_obs]) * data.obs_std + data.obs_mean,
                                   torch.stack([obs[:-1], obs[1:]]), atol=1e-5, rtol=0)  # fmt: skip
        assert rows.term.tolist() == [0.0] * (len(act) - 1) + [float((task, number) in ((0, 1), (2, 0)))]
    assert data.present.tolist() == [2, 1, 3] and data.header["settings"] == {"quality": "own"}
    assert not data.has_scale  # no random returns


BROKEN = {  # what becomes of (observations, actions, rewards) -> the complaint
    "rewards too short": (lambda o, a, r: (o, a, r[1:]), "expected [n + 1, obs_dim], [n, act_dim], [n]"),
    "not finite": (lambda o, a, r: (o * np.nan, a, r), "not finite"),
    "empty": (lambda o, a, r: (o[:1], a[:0], r[:0]), "n >= 1"),
    "action above 1": (lambda o, a, r: (o, 9 * a, r), "rescale them to [-1, 1]"),
    "other size": (lambda o, a, r: (o[:, :2], a, r), "expected (3, 2)"),
    "no rewards": (lambda o, a, r: (o, a), "an episode is (observations, actions, rewards)"),
    "end of each step": (lambda o, a, r: (o, a, r, [False] * 5), "(.., terminated: bool)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_episode_is_named(folder, what):
    change, complaint = BROKEN[what]
    write("own.npz", [[episode(5)]] * 3)
    before = (folder / "own.npz").read_bytes()
    message = stop_message(write, "own.npz", [[episode(5)], [episode(5), change(*episode(5))], [episode(5)]])
    assert message.startswith("own.npz is not written: task 1, episode 1: ") and complaint in message
    assert (folder / "own.npz").read_bytes() == before  # nothing is lost


def test_all_problems_come_in_one_line(folder):
    bad = [(o * np.nan, a, r) for o, a, r in [episode(5)] * 4]
    message = stop_message(write, "own.npz", [bad, [episode(5)], [episode(5)]])
    assert message.count("not finite") == 3 and message.endswith("; and 1 more")
    message = stop_message(lambda: write("own.npz", [[episode(5)]] * 3, test=(7,), expert_returns=[1.0]))
    assert "expert_returns has shape (1,)" in message
    assert "test_ids must be distinct" in stop_message(lambda: write("own.npz", [[episode(5)]] * 3, test=(7,)))
    assert not (folder / "own.npz").exists()


@pytest.mark.parametrize("given, complaint", [
    ({"train": [0.5, 1]}, "train_ids has type float64, expected int64"),
    ({"train": []}, "train_ids must be distinct task numbers from 0 to 2, at least one"),
    ({"foreign": [[episode(5)], [episode(5)] * 2]}, "foreign needs equally many episodes"),
    ({"episodes": {0: [episode(5)]}}, "a list with a list of episodes for each task"),
])  # fmt: skip
def test_wrong_tables_are_named(folder, given, complaint):
    assert complaint in stop_message(lambda: write("own.npz", **{"episodes": [[episode(5)]] * 3, **given}))


def test_plain_arrays_are_enough(folder):
    """A file of np.savez, without a header, in types of its own."""
    arrays = {"observations": np.ones((3, 2, 6, 3)), "actions": np.zeros((3, 2, 5, 1)), "rewards": np.ones((3, 2, 5))}
    arrays |= {"lengths": np.full((3, 2), 5), "terminated": np.zeros((3, 2), bool)}
    arrays |= {"train_ids": [0, 1], "test_ids": [2]}
    np.savez("own.npz", **arrays)
    assert dc.load_dataset("offline", "own.npz").behavior_return == 5
    np.savez("own.npz", **arrays | {"rewards": np.ones((3, 2, 4)), "actions": np.full((3, 2, 5, 1), np.inf)})
    message = stop_message(dc.load_dataset, "offline", "own.npz")
    assert "actions has values that are not finite; rewards has shape" in message
    assert message.endswith("docs/OWN_DATA.md tells how to write your data") and "away" not in message


def test_simulator_needs_task_parameters(folder):
    square = [[(np.zeros((6, 2)), np.zeros((5, 2)), np.zeros(5))]] * 3
    assert "task_params is missing" in stop_message(lambda: write("own.npz", square, "point-robot"))
    data = write("own.npz", square, "point-robot", task_params=np.ones((3, 2)))
    results = dc.evaluate(data, lambda *_: lambda obs, rew: torch.zeros(len(obs), 2), dc.PROTOCOLS, 2)
    assert results["eval/iid/return"] == pytest.approx(-20 * math.sqrt(2), abs=1e-4)
    assert not any("normalized" in tag or "/ood" in tag for tag in results)
    assert "normalized left out" in "".join(data.about())


# ---- evaluation without a simulator ---------------------------------------------


@pytest.mark.parametrize("protocol", ["iid", "zero_shot"])
def test_action_error_equals_a_plain_loop(folder, protocol):
    """Each row on the best episode of its task, or the second best where that is the context and not the only one."""
    given = [[episode(n) for n in (4, 6, 5)] for _ in range(3)] + [[episode(5)]]
    given[3][0][2][:] = -1  # returns less than a missing episode
    data, contexts, seen = write("own.npz", given, test=(2, 3)), [], []

    def adapt(context, mask, explore):
        contexts.extend(context)
        return lambda obs, rew: seen.append((obs, rew)) or 0.1 * obs[:, :2] + 0.01 * rew[:, None]

    found = dc.evaluate(data, adapt, (protocol,), 3)
    squares = []
    for row, task in enumerate((2, 2, 2, 3, 3, 3)):
        order = sorted(range(len(given[task])), key=lambda n: -given[task][n][2].sum())
        best = data.episodes[task, order[0]]
        known = protocol == "iid" and task == 2 and torch.equal(contexts[row], best[:, :-1])
        obs, act, rew = given[task][order[int(known)]]
        for t in range(len(act)):
            at = (torch.as_tensor(obs[t], dtype=torch.float32) - data.obs_mean) / data.obs_std
            chosen = 0.1 * at.numpy()[:2] + 0.01 * (rew[t - 1] if t else 0)
            squares += ((chosen - act[t]) ** 2).tolist()
    assert found == {f"eval/{protocol}/action_error": pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)}
    assert len(seen) == 6


@pytest.mark.parametrize("name", sorted({*NAMES} - {"omnirl", "data_sharing"}))  # these two know the simulator
def test_every_script_trains_without_a_simulator(folder, name):
    write("own.npz", [[episode(n) for n in (24, 27, 25)] for _ in range(4)], test=(2, 3))
    script = importlib.import_module(name)
    few = {key: value for key, value in (SHORT | FEW.get(name, {})).items() if hasattr(script.Args, key)}
    few.pop("width")
    result = script.train(script.Args(env="offline", dataset="own.npz", **few))
    assert 0.3 < result["eval/iid/action_error"] < 1.2 and 0.3 < result["eval/zero_shot/action_error"] < 1.2
    assert not any("return" in tag for tag in result) and result["step"] == 2


def test_rollout_needs_a_simulator(folder):
    args = flora.Args(env="offline", bandit_feedback="rollout")
    assert stop_message(flora.train, args) == "--bandit-feedback rollout: --env offline has no simulator"


def test_relative_dataset_is_found_from_elsewhere(folder, monkeypatch):
    write("own.npz", [[episode(n) for n in (24, 27, 25)] for _ in range(4)], test=(2, 3))
    args = focal.Args(env="offline", dataset="own.npz", run_dir=str(folder / "runs"), **SHORT)
    run_dir = focal.train(args)["run_dir"]
    (folder / "deeper").mkdir()
    monkeypatch.chdir(folder / "deeper")
    stored = dc.load_checkpoint(run_dir, focal.Args)["args"]
    assert focal.train(focal.Args(**stored | {"resume": run_dir, "eval_only": True}))["step"] == 2


# ---- families of a user ---------------------------------------------------------


class Slope(gym.Env):
    """A number that the action moves by `slope` times its value, from a uniform start; ends above 8, stops below -8."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1, 2), np.float64)
    action_space = gym.spaces.Box(np.array([2.0, -1.0]), np.array([6.0, 0.0]), dtype=np.float64)
    made = 0

    def __init__(self, slope):
        self.slope = slope
        Slope.made += 1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform()
        return np.array([[self.x, self.slope]]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x += self.slope * action[0] + action[1]
        return np.array([[self.x, self.slope]]), float(action[1]), self.x > 8, self.x < -8, {}


def slopes():
    return dc.GymFamily(lambda params: Slope(*params), [[1.0], [-1.0], [0.1]], [2], horizon=5)


def test_gym_row_follows_its_environment():
    family = slopes()
    env = dc.TaskEnv(family, family.params, [0, 1, 2, 0])
    obs, _ = env.reset(seed=5)
    seed = int(np.random.default_rng(7).integers(2**31))
    start = Slope(0.1).reset(seed=seed)[0].ravel()
    assert np.array_equal(obs[2], start.astype(np.float32)) and (family.obs_dim, family.act_dim) == (2, 2)
    x, act = obs[:, 0].astype(float), np.array([[0.5, -1.0]] * 4)
    for step in range(1, 6):
        obs, rew, terminated, truncated, _ = env.step(act)
        live = np.array([step <= 2, step <= 2, True, step <= 2])  # 5 - 1, -5 - 1 and 0.5 - 1 per step
        x += live * np.array([4, -6, -0.5, 4])
        np.testing.assert_allclose(obs[:, 0], x, atol=1e-5)
        assert rew.tolist() == (-1.0 * live).tolist()
        assert terminated.tolist() == [step == 2, False, False, step == 2] == [*(x > 8) & (step == 2)]
        assert truncated.tolist() == [False, step == 2, step == 5, False]
    env.close()


def test_gym_environments_are_used_again():
    before, family = Slope.made + 1, slopes()
    for _ in range(3):
        env = dc.TaskEnv(family, family.params, [0, 0, 1])
        env.reset(seed=0)
        env.reset(options={"reset_mask": np.array([True, False, False]), "task_ids": [2, 0, 1]})
        env.close()
    assert Slope.made == before + 3  # the first is of task 0; one more of it, one of each other task
    scaled = dc.GymFamily(lambda params: Slope(1), [[100.0, 1], [0, 0.5]], [0], horizon=5)
    assert scaled.param_scale.tolist() == [100, 1] and scaled.distance(*scaled.params) == math.hypot(1, 0.5)


def test_interrupted_gym_rows_begin_anew():
    family = slopes()
    one, other = (dc.TaskEnv(family, family.params, ids) for ids in ([0, 1], [2, 2]))
    one.reset(seed=0)
    one.step(np.ones((2, 2)))
    other.set_state(one.get_state())
    assert other.task_ids.tolist() == [0, 1] and other.live.all() and not other.steps.any()
    assert other.step(np.zeros((2, 2)))[0][:, 1].tolist() == [1.0, -1.0]  # the slopes of these tasks
    assert set(one.state[:, 0]).isdisjoint(other.state[:, 0])  # no environment serves two rows


FAULTS = [  # attributes of an environment -> the complaint
    ({"observation_space": gym.spaces.Dict(x=Slope.observation_space)}, "observations are Dict('x'"),
    ({"action_space": gym.spaces.Discrete(3)}, "actions are Discrete(3), not a Box"),
    ({"action_space": gym.spaces.Box(-np.inf, 1, (2,))}, "bounds of the actions must be finite"),
    ({"reset": lambda self, seed: np.zeros(2)}, "reset(seed=0): ValueError: cannot reshape"),  # the old interface
    ({"step": lambda self, a: (np.zeros(2), 0, False, {})}, "step(action): ValueError: not enough"),  # that, too
    ({"reset": lambda self, seed: ([0, np.nan], {})}, "reset(seed=0): ValueError: array must not"),
    ({"step": lambda self, a: (np.zeros(2), np.nan, False, False, {})}, "step(action): ValueError: array must not"),
    ({"step": lambda self, a: json.loads("[")}, f"column 2 (char 1) ({__file__}, line "),
]


@pytest.mark.parametrize("changes, complaint", FAULTS)
def test_environment_fault_gives_one_line(changes, complaint):
    def play():
        other = type("Other", (Slope,), changes)
        family = dc.GymFamily(lambda params: other(1), [[1.0]], [0], horizon=5)
        env = dc.TaskEnv(family, family.params, [0])
        env.reset(seed=0)
        env.step(np.zeros((1, 2)))

    message = stop_message(play)
    assert message.startswith("GymFamily: ") and complaint in message


def test_environment_needs_a_time_limit():
    assert "time limit" in stop_message(lambda: dc.GymFamily(lambda params: Slope(1), [[1.0]], [0]))


def test_file_of_other_tasks_is_refused(tiny_path, monkeypatch):
    """By a training and by a collection; policies of other tasks do not act either."""
    family, paths = dc.FAMILIES["point-robot"], (tiny_path, tiny_path.with_name("other.npz"))
    params, train, test = family.draw()
    same, anew = (dc.Args(env="point-robot", out=str(path), **TINY) for path in paths)
    changes = {"test": (params, train, test[::-1]), "train": (params, train[:5], test)}
    for which, drawn in [*changes.items(), ("train", (params + 0.01, train, test))]:
        monkeypatch.setattr(family, "draw", lambda drawn=drawn: drawn)
        message = stop_message(dc.load_dataset, "point-robot", tiny_path)
        assert f"made for other {which} tasks than point-robot has now" in message and "Move it away" in message
    assert "made for other train tasks" in stop_message(dc.collect, same)
    assert "holds policies with other settings" in stop_message(dc.collect, anew)
    assert not dc.load_dataset("offline", tiny_path).family.simulated  # there the file alone counts


def test_family_in_a_file_is_found(folder):
    (folder / "needs.py").write_text("import deeper\n")
    (folder / "deeper.py").write_text("x = 1\nimport not_a_package\n")
    message = stop_message(dc.family_of, "needs:X")
    assert "No module named 'not_a_package'" in message and message.endswith(f"({folder}/deeper.py, line 2)")
    assert f"FILE:FAMILY of FILE.py in {folder}: TypeError" in stop_message(dc.family_of, "./needs:X")
    (folder / "mine.py").write_text("import gymnasium\nimport data_collect as dc\nx = 3\n"
                                    "class Far(dc.PointRobot): horizon = 7\n"
                                    "class Env(gymnasium.Env):\n def __init__(self, mass): pass\n")  # fmt: skip
    assert dc.family_of("mine:Far").horizon == 7 and dc.family_of("mine:Far") is dc.family_of("mine:Far")
    assert "x of mine.py must be a Family" in stop_message(dc.family_of, "mine:x")
    assert "Env of mine.py must be a Family or GymFamily" in stop_message(dc.family_of, "mine:Env")
    assert "ModuleNotFoundError: No module named 'yours'" in stop_message(dc.family_of, "yours:Far")
    assert "did you mean point-robot?" in stop_message(dc.family_of, "point-robo")
    assert "nothing to collect" in stop_message(dc.collect, dc.Args(env="offline"))


def test_tasks_come_from_a_file(folder):
    tasks = {"task_params": np.eye(3, 2), "train_ids": np.array([2, 0]), "test_ids": np.array([1])}
    np.savez("tasks.npz", **tasks)
    tiny = {"total_updates": 20, "rows": 4, "episodes": 3, "test_episodes": 2, "ood_contexts": 1}
    dc.collect(dc.Args(env="point-robot-square", tasks="tasks.npz", width=8, **tiny))
    data = dc.load_dataset("point-robot-square")
    assert np.array_equal(data.task_params, np.eye(3, 2)) and data.test_ids.tolist() == [1]
    assert sorted(data.train_ids.tolist()) == [0, 2] and data.header["settings"]["tasks"] == "tasks.npz"
    (folder / "bad.npz").write_text(json.dumps({}))
    message = stop_message(dc.collect, dc.Args(env="point-robot", tasks="bad.npz"))
    assert message == "--tasks bad.npz: no .npz file with task_params, train_ids and test_ids"
