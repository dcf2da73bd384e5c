"""Reference for any-mdp: what the context tells of the task, used as well as counting can. Nothing is trained.

Run:  python benchmark/tabular.py [--dataset datasets/any-mdp-16.npz] [--episodes 10] [--model runs/any-mdp/omnirl/*]
      python benchmark/tabular.py --own-episodes 50 [--world dark-room] [--model runs/any-mdp/omnirl/*]
The context's transitions are counted to a model of the task, and the best actions in it are computed. An action that
was never taken in a state counts as bad; an exploring episode takes, state by state, the one least taken. No other task
is needed for that, so a method that reads its contexts should have as much. Prints normalized returns, mean and
standard error over tasks, and the return of one own episode after the other. --model: trained count networks beside it.

--own-episodes: one agent after the other from an empty context, as in omnirl.py: the optimal and the uniform policy;
counting with optimistic planning, `omnirl.plan` every 4 steps; Q-learning. Every setting is played on tasks for
choosing. The one with the best mean return there is played on the test tasks; on any-mdp, so is every bonus.
--world: other tables, also with 5 actions, 100 steps and a return of 100 between uniform and optimal policy.
"""

import argparse
import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from claims import spread
from report import print_table

import data_collect as dc
import omnirl

STATES, ACTIONS = dc.FAMILIES["any-mdp"].states, dc.FAMILIES["any-mdp"].actions
UNTRIED = -100.0  # value of an action that the context does not show; 100 is what the optimal policy gains on chance
GAMMA, SWEEPS = 0.99, 300


def count(context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> transitions seen [R, S, A, S], sums of their rewards [R, S, A]."""
    obs, act, rew, next_obs = context.split([STATES, ACTIONS, 1, STATES], -1)
    pair = obs.argmax(-1) * ACTIONS + act.argmax(-1)  # [R, K]
    seen = torch.zeros(len(context), STATES * ACTIONS * STATES)
    seen.scatter_add_(1, pair * STATES + next_obs.argmax(-1), mask)
    earned = torch.zeros(len(context), STATES * ACTIONS)
    earned.scatter_add_(1, pair, mask * rew[..., 0])
    return seen.unflatten(1, (STATES, ACTIONS, STATES)), earned.unflatten(1, (STATES, ACTIONS))


def plan(seen, earned):
    """As of `count` -> the values of all actions in the counted model, by value iteration [R, S, A]."""
    taken = seen.sum(-1)
    moves, rewards = seen / taken.clamp(min=1)[..., None], earned / taken.clamp(min=1)
    left = taken.sum(-1) > 0  # [R, S]; in a state that was never left episodes end, for all that is known
    value = torch.zeros_like(taken[..., 0])
    for _ in range(SWEEPS):
        q = rewards + GAMMA * (moves @ (left * value)[:, None, :, None])[..., 0]
        q = torch.where(taken > 0, q, UNTRIED)
        value = q.amax(-1)
    return q


def adapt(context, mask, explore=False):
    """For `data_collect.evaluate`."""
    seen, earned = count(context, mask)
    taken, rows = seen.sum(-1), torch.arange(len(context))
    ties = 1e-3 * torch.rand(taken.shape, generator=torch.Generator().manual_seed(0))  # broken by chance
    q = plan(seen, earned) + ties

    def policy(obs, rew):
        state = obs.argmax(-1)
        act = (ties - taken if explore else q)[rows, state].argmax(-1)
        taken[rows, state, act] += 1
        return torch.nn.functional.one_hot(act, ACTIONS).float()

    return policy


def read(agent, args, tag, context, mask, explore=False):
    """For `data_collect.evaluate`: omnirl.py's count network reads the context, then its own steps. tag: mark the
    context as the noisy optimal policy's."""
    seen, earned = count(context, mask)
    _, squares = count(torch.cat([context[..., : -STATES - 1], context[..., -STATES - 1 :] ** 2], -1), mask)
    rows, rng, earlier = np.arange(len(context)), np.random.default_rng(0), []
    counts = omnirl.Counts(seen, earned, squares, tag * seen.sum(-1), torch.zeros(len(context), STATES))
    temperature = torch.full((len(context), 1, 1), args.temperature)

    def policy(obs, rew):
        state = obs.argmax(-1)
        for s, a in earlier[-1:]:
            counts.moves[rows, s, a, state] += 1
            counts.rew[rows, s, a] += rew
            counts.rew2[rows, s, a] += rew**2
        probs = agent.probs(counts, rows, temperature)[rows, state]
        earlier.append((state, torch.as_tensor(omnirl.draw(probs.cumsum(-1), rng))))
        return torch.nn.functional.one_hot(earlier[-1][1], ACTIONS).float()

    return policy


def load_model(run_dir):
    """-> agent, arguments of a run of omnirl.py --memory counts."""
    saved = dc.load_checkpoint(run_dir, omnirl.Args)
    args = omnirl.Args(**saved["args"])
    if args.memory != "counts":
        raise SystemExit(f"--model {run_dir}: a run of --memory {args.memory}; give one of --memory counts")
    agent = omnirl.Agent(args)
    dc.restore_training(agent, saved, weights_only=True)
    return agent, args


# ---- own episodes: policies for `omnirl.roll_out`, make(worlds, rng) -> policy --------------


class Planner:
    """Plays the best action in an optimistic counted model."""

    def __init__(self, bonus, worlds, rng, gamma=0.99):
        size, *self.shape = worlds.chances.shape[:3]
        self.value, self.rng = torch.zeros(size, self.shape[0]), rng
        self.bonus, self.gamma = torch.full((size,), bonus), torch.full((size,), gamma)

    def __call__(self, rows, t):
        if t % 4 == 0:
            counts = omnirl.count(rows, t, *self.shape)
            q, self.value = omnirl.plan(counts, self.value, self.gamma, self.bonus, sweeps=15)
            self.q = q.numpy() + 1e-4 * self.rng.random(q.shape)  # ties are broken by chance
        return self.q[np.arange(len(self.q)), rows.state[:, t]].argmax(-1), 0


class QLearner:
    """Q-learning with a bonus for seldom taken actions, in standard deviations of the rewards."""

    def __init__(self, rate, bonus, worlds, rng, gamma=0.99):
        shape = size, *_ = worlds.chances.shape[:3]
        self.q, self.taken, self.b = rng.random(shape) * 1e-4, np.zeros(shape), np.arange(size)
        self.rate, self.bonus, self.gamma, self.sums = rate, bonus, gamma, np.zeros((3, size))

    def __call__(self, rows, t):
        if t:
            after, over, s, act, rew, _ = (x[:, t] for x in rows)
            acted, act = act < ACTIONS, act.clip(max=ACTIONS - 1)
            next_q = np.where(over == 1, 0.0, self.q[self.b, after].max(-1))
            self.q[self.b, s, act] += acted * self.rate * (rew + self.gamma * next_q - self.q[self.b, s, act])
            self.taken[self.b, s, act] += acted
            self.sums += acted * np.stack([np.ones_like(rew), rew, rew**2])
        count, total, squares = self.sums
        std = (squares / count.clip(1) - (total / count.clip(1)) ** 2).clip(0) ** 0.5
        s = rows.state[:, t]
        bonus = (self.bonus * std)[:, None] / self.taken[self.b, s].clip(0.25) ** 0.5
        return (self.q[self.b, s] + bonus).argmax(-1), 0


def optimal(worlds, rng):
    rows = np.arange(len(worlds.ends))
    return lambda history, t: (worlds.optimal[rows, history.state[:, t]], 0)


def uniform(worlds, rng):
    return lambda history, t: (rng.integers(ACTIONS, size=len(worlds.ends)), 0)


def reader(agent, args, worlds, rng):
    return omnirl.CountReader(agent, worlds, None, args, rng)


def world(name, rng):
    """-> tasks as of `AnyMDP.draw_tasks`, numbers of tasks for choosing settings, of test tasks."""
    family = copy.copy(omnirl.FAMILY)
    if name == "any-mdp":
        return family.tables, *(ids[:64] for ids in family.draw()[1:])
    family.states = {"any-mdp-32": 32, "dark-room": 81, "bandit": 1}[name]
    if name == "any-mdp-32":
        return family.draw_tasks(128, rng), np.arange(64), np.arange(64, 128)
    if name == "bandit":  # five arms; one is pulled in every step
        tables = np.ones((128, 1, ACTIONS, 1)), rng.random((128, 1, ACTIONS, 1)), np.ones((128, 1))
        return from_tables(family, *tables, noise=0.3), np.arange(64), np.arange(64, 128)
    # dark-room: 9 x 9 places; one stays or goes a step in four directions, and earns 1 at a hidden goal
    x, y = np.indices((9, 9)).reshape(2, 81, 1)
    after = 9 * (x + [0, 1, -1, 0, 0]).clip(0, 8) + (y + [0, 0, 0, 1, -1]).clip(0, 8)  # [81, A]
    goals, shape = rng.permutation(np.delete(np.arange(81), 40)), (80, 81, ACTIONS, 81)  # the start is in the middle
    moves, rewards = np.broadcast_to(np.eye(81)[after], shape), np.broadcast_to(np.eye(81)[goals, None, None], shape)
    return from_tables(family, moves, rewards, np.eye(81)[[40] * 80]), np.arange(16), np.arange(16, 80)


def from_tables(family, transitions, rewards, start, noise=0.0):
    """Tasks without ends: transitions, rewards [T, S, A, S], start [T, S], the rewards' standard deviation -> as of
    `AnyMDP.draw_tasks`."""
    expected = (transitions * rewards).sum(-1)
    policy = family.optimal_values(transitions, expected, 0.994, guess=expected).argmax(-1)
    uniform = family.mean_return(start, transitions.mean(2), expected.mean(2))
    best = family.mean_return(start, family.chosen(transitions, policy), family.chosen(expected, policy))
    scale = 100 / (best - uniform)
    by_task = scale[:, None, None, None]
    tables = dict(transitions=transitions, rewards=by_task * rewards, noise=by_task * np.full(rewards.shape, noise))
    tables |= dict(start=start, ends=np.zeros(start.shape, bool), policy=policy, uniform=scale * uniform)
    return SimpleNamespace(**tables, names=np.tile(np.arange(family.states), (len(start), 1)))


def own_episodes(make, tasks, ids, episodes):
    """-> normalized returns [tasks, episodes], means of two plays."""
    rng, row_ids = np.random.default_rng(11), np.repeat(ids, 2)
    worlds = omnirl.Worlds(tasks, row_ids, rng)
    rows = omnirl.roll_out(worlds, make(worlds, rng), episodes * (omnirl.LIMIT + 1), rng)
    return omnirl.normalized_returns(rows, tasks, row_ids, episodes).reshape(len(ids), 2, episodes).mean(1)


def compare_own_episodes(episodes, name="any-mdp", models=()):
    """Print the own episodes of the baselines and of trained models on the test tasks."""
    tasks, ids, test_ids = world(name, np.random.default_rng(0))
    planners = {f"count and plan, bonus {x:g}": partial(Planner, x) for x in (0.0, 0.1, 0.3, 1.0, 2.0, 4.0)}
    settings = [(rate, bonus) for rate in (0.1, 0.3, 0.6) for bonus in (0.1, 0.3, 1.0)]
    learners = {f"Q-learning, rate {x:g}, bonus {y:g}": partial(QLearner, x, y) for x, y in settings}
    trained = {f"omnirl.py, seed {args.seed}": partial(reader, agent, args) for agent, args in models}
    rows, shown = [], [k for k in (1, 2, 3, 5, 10, 20, 50) if k <= episodes]
    for group in ({"optimal": optimal, "uniform": uniform}, planners, learners, trained):
        best = None
        if group in (planners, learners):
            means = {key: own_episodes(make, tasks, ids, episodes).mean() for key, make in group.items()}
            best = max(means, key=means.get)
        for key, make in group.items():
            if best in (None, key) or group is planners and name == "any-mdp":
                returns = own_episodes(make, tasks, test_ids, episodes)
                cells = [spread(returns[:, k - 1], 0) for k in shown]
                cells += [spread(returns[:, -10:].mean(1), 0)]
                rows.append([key + " (chosen)" * (key == best), *cells])
    print_table(["own episode", *map(str, shown), "last ten"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="by default datasets/any-mdp.npz")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument("--own-episodes", type=int, metavar="K", help="compare K own episodes instead")
    parser.add_argument("--world", choices=["any-mdp", "any-mdp-32", "dark-room", "bandit"], default="any-mdp")
    parser.add_argument("--model", nargs="+", default=[], metavar="RUN", help="run directories of omnirl.py")
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be at least 1")
    models = [load_model(run_dir) for run_dir in args.model]
    if args.own_episodes:
        return compare_own_episodes(args.own_episodes, args.world, models)
    data = dc.load_dataset("any-mdp", args.dataset)
    agents = {"counted model": (adapt, dc.PROTOCOLS)}
    for agent, settings in models:
        name = f"omnirl.py, seed {settings.seed}"
        agents[name] = partial(read, agent, settings, 0), dc.PROTOCOLS
        agents[name + ", tagged"] = partial(read, agent, settings, 1), ("iid", "ood", "ood_random", "train")
    tables, shown = ([], []), []
    for name, (method, protocols) in agents.items():
        results, cells = dc.evaluate(data, method, protocols, args.episodes), []
        shown = shown or [protocol for protocol in protocols if f"eval/{protocol}/return" in results]
        for protocol in shown:
            tasks = data.train_ids[:10] if protocol == "train" else data.test_ids
            returns = np.array([results.get(f"eval/{protocol}/return_task_{i:02d}", np.nan) for i in tasks])
            cells.append(spread(dc.normalize(data, tasks, returns), 0) if protocol in protocols else "")
        tables[0].append([name, *cells])
        if "online" in protocols:
            tables[1].append([name, *(f"{results[f'eval/online/return_ep_{k}']:.0f}" for k in range(1, 11))])
    print_table(["normalized", *shown], tables[0])
    print_table(["return, own episodes", *map(str, range(1, 11))], tables[1])


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
