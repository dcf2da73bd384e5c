"""Reference for any-mdp: what the context tells of the task, used as well as counting can. Nothing is trained.

Run:  python benchmark/tabular.py [--dataset datasets/any-mdp-16.npz] [--episodes 10]
The context's transitions are counted to a model of the task, and the best actions in it are computed. An action that
was never taken in a state counts as bad; an exploring episode takes, state by state, the one least taken. No other task
is needed for that, so a method that reads its contexts should have as much. Prints normalized returns, mean and
standard error over tasks, and the return of one own episode after the other.
"""

import argparse

import numpy as np
import torch
from claims import spread
from report import print_table

import data_collect as dc

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="by default datasets/any-mdp.npz")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be at least 1")
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
