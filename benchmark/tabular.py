"""Reference for any-mdp: what the context tells of the task, used as well as counting can. Nothing is trained.

Run:  python benchmark/tabular.py [--dataset datasets/any-mdp-16.npz] [--episodes 10]
      python benchmark/tabular.py --own-episodes 50    # one agent after the other from an empty context, as omnirl.py
The context's transitions are counted to a model of the task, and the best actions in it are computed. An action that
was never taken in a state counts as bad; an exploring episode takes, state by state, the one least taken. No other task
is needed for that, so a method that reads its contexts should have as much. Prints normalized returns, mean and
standard error over tasks, and the return of one own episode after the other.

--own-episodes: the baselines of omnirl.py, on its terms: the optimal and the uniform policy; counting with optimistic
planning, `omnirl.plan` every 4 steps; Q-learning. Every setting is played on training tasks; the one with the best mean
return there, and each setting of the bonus, is then played on the test tasks.
"""

import argparse
from functools import partial

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


class Planner:
    """Plays the best action in an optimistic counted model; a policy for `omnirl.roll_out`."""

    def __init__(self, size, rng, bonus, gamma=0.99):
        self.counts, self.value = omnirl.nothing(size, STATES, ACTIONS), torch.zeros(size, STATES)
        self.bonus, self.gamma, self.rng = torch.full((size,), bonus), torch.full((size,), gamma), rng

    def __call__(self, rows, t):
        if t % 4 == 0:
            self.counts = self.counts.plus(omnirl.count(rows, max(0, t - 4), t, STATES, ACTIONS))
            q, self.value = omnirl.plan(self.counts, self.value, self.gamma, self.bonus, sweeps=15)
            self.q = q.numpy() + 1e-4 * self.rng.random(q.shape)  # ties are broken by chance
        return self.q[np.arange(len(self.q)), rows.state[:, t]].argmax(-1), 0


class QLearner:
    """Q-learning with a bonus for seldom taken actions, in standard deviations of the rewards."""

    def __init__(self, size, rng, rate, bonus, gamma=0.99):
        self.q, self.taken = rng.random((size, STATES, ACTIONS)) * 1e-4, np.zeros((size, STATES, ACTIONS))
        self.b = np.arange(size)
        self.rate, self.bonus, self.gamma, self.sums = rate, bonus, gamma, np.zeros((3, size))

    def __call__(self, rows, t):
        if t:
            s, act, rew, after = rows.state[:, t - 1], rows.act[:, t - 1], rows.rew[:, t - 1], rows.state[:, t]
            acted, act = act < ACTIONS, act.clip(max=ACTIONS - 1)
            next_q = np.where(rows.over[:, t] == 1, 0.0, self.q[self.b, after].max(-1))
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


def planner(bonus, worlds, rng):
    return Planner(len(worlds.ends), rng, bonus)


def q_learner(rate, bonus, worlds, rng):
    return QLearner(len(worlds.ends), rng, rate, bonus)


def own_episodes(make, tasks, ids, episodes):
    """make(worlds, rng) -> policy for `omnirl.roll_out` -> normalized returns [tasks, episodes], of two plays."""
    rng, row_ids = np.random.default_rng(11), np.repeat(ids, 2)
    worlds = omnirl.Worlds(tasks, row_ids, rng)
    rows = omnirl.roll_out(worlds, make(worlds, rng), episodes * (omnirl.LIMIT + 1), rng, episodes)
    return omnirl.normalized_returns(rows, tasks, row_ids, episodes).reshape(len(ids), 2, episodes).mean(1)


def compare_own_episodes(episodes):
    """Print the baselines' own episodes on the test tasks."""
    tasks, (_, train_ids, test_ids) = omnirl.FAMILY.tables, omnirl.FAMILY.draw()
    planners = {f"count and plan, bonus {x:g}": partial(planner, x) for x in (0.0, 0.1, 0.3, 1.0, 2.0, 4.0)}
    settings = [(rate, bonus) for rate in (0.1, 0.3, 0.6) for bonus in (0.1, 0.3, 1.0)]
    learners = {f"Q-learning, rate {x:g}, bonus {y:g}": partial(q_learner, x, y) for x, y in settings}
    rows, shown = [], [k for k in (1, 2, 3, 5, 10, 20, 50) if k <= episodes]
    for group in ({"optimal": optimal, "uniform": uniform}, planners, learners):
        ids = train_ids[: len(test_ids)]
        means = {name: own_episodes(make, tasks, ids, episodes).mean() for name, make in group.items()}
        best = max(means, key=means.get)
        for name, make in group.items():
            if name == best or group is not learners:
                returns = own_episodes(make, tasks, test_ids, episodes)
                cells = [spread(returns[:, k - 1], 0) for k in shown]
                cells += [spread(returns[:, -10:].mean(1), 0)]
                mark = " (chosen)" if name == best and len(group) > 2 else ""
                rows.append([name + mark, f"{means[name]:.0f}", *cells])
    print_table(["own episode", "mean on training tasks", *map(str, shown), "last ten"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="by default datasets/any-mdp.npz")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument("--own-episodes", type=int, metavar="K", help="compare K own episodes of the baselines instead")
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be at least 1")
    if args.own_episodes:
        return compare_own_episodes(args.own_episodes)
    data = dc.load_dataset("any-mdp", args.dataset)
    results = dc.evaluate(data, adapt, dc.PROTOCOLS, args.episodes)
    shown = [name for name in dc.PROTOCOLS if f"eval/{name}/return" in results]
    cells = []
    for name in shown:
        tasks = data.train_ids[:10] if name == "train" else data.test_ids
        returns = np.array([results[f"eval/{name}/return_task_{i:02d}"] for i in tasks])
        cells.append(spread(dc.normalize(data, tasks, returns), 0))
    print_table(["normalized", *shown], [["counted model", *cells]])
    own = [f"{results[f'eval/online/return_ep_{k}']:.0f}" for k in range(1, 11)]
    print_table(["return, own episodes", *map(str, range(1, 11))], [["counted model", *own]])


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
