"""Task families, offline datasets, evaluation and runs: what all scripts of this repository share.

    python data_collect.py --env ant-dir    # train behavior policies, roll them out, write datasets/ant-dir.npz

It reads in the order in which data flow: task families (what a task is, its reward), batched simulation, behavior
policies (SAC), writing the dataset file, reading it, evaluation (the adaptation protocols), runs (directory,
checkpoint, resume). No method is known here.

Shape letters: T tasks, N episodes per task, H horizon, B rows or transitions, M tasks of a batch, R evaluation rows.
Units: actions are in [-1, 1]; rewards are raw environment units; a return is the undiscounted sum of an episode's
rewards; angles in radians, positions in meters, velocities in meters per second.
"""

import contextlib
import copy
import difflib
import functools
import importlib
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

try:
    import fcntl
except ImportError:
    raise SystemExit("this code needs Linux or macOS; on Windows run it in WSL") from None

import gymnasium as gym
import mujoco
import mujoco.rollout
import numpy as np
import torch
import tyro
from gymnasium.vector.utils import batch_space
from torch import nn
from torch.utils.tensorboard import SummaryWriter

FORMAT_VERSION = 2  # of the dataset files
DATASETS = Path(__file__).resolve().parent / "datasets"  # beside the scripts, wherever they are started

# ---- task families ----------------------------------------------------------
#
# To add a family, write a class: in your own file (`family_of`), or here with its name in FAMILIES.


class Family:
    """What a family of tasks defines, and the defaults. `params` [T, P] float64 are the hidden task parameters, `state`
    [B, S] is the full simulator state of B rows.

    Each family defines obs_dim, act_dim and
      draw() -> params [T, P], ids of training tasks, ids of test tasks; the same on every call
      reset(rng, params [B, P]) -> state
      step(state, act [B, act_dim], params) -> next state (MuJoCo families inherit it)
      observe(state) -> obs [B, obs_dim]
      outcome(state, next_state) -> [B, k]: what the reward depends on besides the action
      reward(outcome, act, params) -> [B]; numpy arrays or torch tensors, any transition for any task"""

    gamma = 0.99  # discount of the behavior policies
    horizon = 200  # environment steps per episode (a time limit, never a termination)
    counts = (20, 20)  # training tasks, test tasks
    param_scale = 1.0  # params / param_scale is what the task-conditioned SAC sees, about [-1, 1]
    dynamics_vary = False  # True where the transition depends on the task, None = unknown; then no relabelling
    outcome_dim = 1
    sac_total_updates, sac_width = 120_000, 256  # defaults of the behavior policies
    storage_dtype = np.float32  # of observations and actions in a file
    scripted = False  # True where `behave` acts instead of trained policies
    measured = True  # False where the parameters are names, not quantities
    simulated = True  # False where there are only recorded data

    def one_draw_per_seed(self):
        """-> [T] uniform in [0, 1): the first draws of the generators with seeds 1, 2, .. (CORRO's tasks)."""
        return np.array([np.random.RandomState(seed).rand() for seed in range(1, sum(self.counts) + 1)])

    def split_first(self, params):
        return params, np.arange(self.counts[0]), np.arange(self.counts[0], sum(self.counts))

    def split_interleaved(self, params):
        """Test tasks lie between training tasks, as in CSRO: about every fourth task is one."""
        step = self.counts[0] // self.counts[1] + 1
        test = step // 2 + step * np.arange(self.counts[1])
        return params, np.setdiff1d(np.arange(sum(self.counts)), test), test

    def distance(self, params, others):
        """How far apart tasks are: params, others [.., P] -> [..], in the unit of the parameters."""
        return ((params - others) ** 2).sum(-1) ** 0.5

    def terminated(self, state):
        """-> [B] bool: the task itself ended, for example by a fall; a time limit is no termination."""
        return np.zeros(len(state), bool)

    def truncated(self, state):
        """-> [B] bool: the episode stops early for another reason."""
        return np.zeros(len(state), bool)

    def release(self, state):
        """These states are not continued."""

    def training_reward(self, outcome, act, params):
        """What the behavior policies are trained on: the recorded reward, unless it is too sparse."""
        return self.reward(outcome, act, params)

    def stuck(self, state):
        """-> [B] bool: states from which a behavior policy in training learns nothing more."""
        return np.zeros(len(state), bool)


def on_circle(angle):
    """angle [T] -> points [T, 2] on the unit circle."""
    return np.stack([np.cos(angle), np.sin(angle)], 1)


class Point(Family):
    """A point in the plane, state = position; act 1 moves it by 0.1 m along that axis."""

    obs_dim = act_dim = outcome_dim = 2
    gamma, horizon = 0.9, 20
    sac_total_updates, sac_width = 1_500, 64

    def reset(self, rng, params):
        return np.zeros((len(params), 2))

    def step(self, state, act, params):
        return state + 0.1 * act

    def observe(self, state):
        return state

    def outcome(self, state, next_state):
        return next_state


class PointRobot(Point):
    """Reach a hidden goal on the upper unit half circle; dense reward."""

    counts = (30, 10)

    def draw(self):
        return self.split_interleaved(on_circle(np.linspace(0, np.pi, sum(self.counts))))

    def reward(self, outcome, act, params):
        return -(((outcome - params) ** 2).sum(-1) ** 0.5)


class PointRobotSquare(PointRobot):
    """Reach a hidden goal in the square [-1, 1]^2, as in Meta-DT and T2DA."""

    counts = (45, 5)

    def draw(self):
        return self.split_first(np.random.RandomState(1337).uniform(-1, 1, (sum(self.counts), 2)))


class SparsePointRobot(PointRobot):
    """Goals on the half circle, rewarded only within 0.2 m: from 0 at the rim to 1 at the goal.

    As in the papers, behavior policies are trained on the dense reward. The methods' critics learn from the sparse
    reward (FOCAL's code: from the dense one)."""

    counts = (80, 20)

    def draw(self):
        params, _, _ = super().draw()
        order = np.random.RandomState(1337).permutation(len(params))
        return params, np.sort(order[: self.counts[0]]), np.sort(order[self.counts[0] :])

    def reward(self, outcome, act, params):
        return (1 - ((outcome - params) ** 2).sum(-1) ** 0.5 / 0.2).clip(0)

    def training_reward(self, outcome, act, params):
        return super().reward(outcome, act, params)


class PointRobotWind(Point):
    """Reach (1, 0) against a hidden constant wind that displaces the point at every step."""

    counts = (40, 10)
    horizon = 25
    param_scale = 0.05
    dynamics_vary = True

    def draw(self):
        wind = np.random.RandomState(1337).uniform(-0.05, 0.05, (2, sum(self.counts)))  # all x, then all y
        return self.split_first(wind.T)

    def step(self, state, act, params):
        return state + 0.1 * act + params

    def reward(self, outcome, act, params):
        return -(((outcome[..., 0] - 1) ** 2 + outcome[..., 1] ** 2) ** 0.5)


class Mujoco(Family):
    """A MuJoCo body; state = [time, qpos, qvel] (mjSTATE_FULLPHYSICS)."""

    storage_dtype = np.float16  # a file of the same size holds twice as many episodes
    timestep = 0.01  # [s]; set after loading, gymnasium's hopper and walker files say 0.002
    frame_skip = 5
    noise = (0.1, "normal")  # reset noise: qpos uniform +-noise, qvel normal or uniform

    @functools.cached_property
    def model(self):
        mujoco.set_mju_user_warning(lambda _: None)  # TaskEnv reports broken physics; MuJoCo would write a log file
        assets = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"
        model = mujoco.MjModel.from_xml_path(str(assets / self.xml))
        model.opt.timestep = self.timestep
        return model

    def models(self, params):
        """params [T, P] -> T models (the same object where the tasks differ in reward only)."""
        return [self.model] * len(params)

    @property
    def dt(self):
        return self.timestep * self.frame_skip

    def reset(self, rng, params):
        scale, kind = self.noise
        count, nq, nv = len(params), self.model.nq, self.model.nv
        qpos = self.model.qpos0 + rng.uniform(-scale, scale, (count, nq))
        qvel = scale * rng.standard_normal((count, nv)) if kind == "normal" else rng.uniform(-scale, scale, (count, nv))
        return np.concatenate([np.zeros((count, 1)), qpos, qvel], 1)

    def observe(self, state):
        return state[:, 1:]  # qpos and qvel, position included

    def outcome(self, state, next_state):
        """Mean velocity of the torso [m/s]: forward, or in the plane where outcome_dim is 2."""
        axes = slice(1, 1 + self.outcome_dim)
        return (next_state[:, axes] - state[:, axes]) / self.dt


class Cheetah(Mujoco):
    xml, obs_dim, act_dim = "half_cheetah.xml", 20, 6

    def observe(self, state):
        """qpos without x, qvel, torso position (x, 0, z): x is part of the observation."""
        torso = np.stack([state[:, 1], np.zeros(len(state)), 0.7 + state[:, 2]], 1)
        return np.concatenate([state[:, 2:], torso], 1)


class CheetahVel(Cheetah):
    """Run at a hidden target speed v* in [0, 3] m/s."""

    param_scale = 3.0

    def draw(self):
        return self.split_first(3 * self.one_draw_per_seed()[:, None])

    def reward(self, outcome, act, params):
        return -abs(outcome[..., 0] - params[..., 0]) - 0.05 * (act**2).sum(-1)


class CheetahDir(Cheetah):
    """Run forward (+1) or backward (-1); the two training tasks are also the test tasks."""

    counts = (2, 2)

    def draw(self):
        return np.array([[1.0], [-1.0]]), np.arange(2), np.arange(2)

    def reward(self, outcome, act, params):
        return params[..., 0] * outcome[..., 0] - 0.05 * (act**2).sum(-1)


class Ant(Mujoco):
    xml, act_dim, outcome_dim = "ant.xml", 8, 2

    def stuck(self, state):
        """On its back: the torso's z axis, from the quaternion state[:, 4:8], points down."""
        return 1 - 2 * (state[:, 5] ** 2 + state[:, 6] ** 2) < 0


class AntDir(Ant):
    """Walk in a hidden direction (cos, sin); reward = velocity along it."""

    obs_dim = 27

    def draw(self):
        return self.split_first(on_circle(2 * np.pi * self.one_draw_per_seed()))

    def distance(self, params, others):
        """The angle between the directions, in [0, pi]."""
        cross = params[..., 0] * others[..., 1] - params[..., 1] * others[..., 0]
        return abs(np.arctan2(cross, (params * others).sum(-1)))

    def observe(self, state):
        return state[:, 3:]  # qpos without x and y, qvel

    def reward(self, outcome, act, params):
        return (outcome * params).sum(-1)


class AntDirFull(AntDir):
    """ant-dir with control cost and survival bonus (Meta-DT's form; it never terminates)."""

    def reward(self, outcome, act, params):
        return super().reward(outcome, act, params) - 0.5 * (act**2).sum(-1) + 1.0


class AntGoal(Ant):
    """Reach a hidden goal on the circle of radius 2 m; the position is observed."""

    obs_dim = 29
    counts = (30, 10)
    param_scale = 2.0

    def draw(self):
        return self.split_interleaved(2 * on_circle(np.linspace(0, 2 * np.pi, sum(self.counts), endpoint=False)))

    def outcome(self, state, next_state):
        return next_state[:, 1:3]

    def reward(self, outcome, act, params):
        return -abs(outcome - params).sum(-1) - 0.1 * (act**2).sum(-1)


class RandomParams(Mujoco):
    """Each physical parameter is multiplied by base ** params, params uniform in [-3, 3].

    As in CORRO's files, random.Random(seed) draws them in the order of `randomized`, and mj_setConst is not called
    afterwards. More than half of the entries have no effect on a planar body."""

    frame_skip, timestep = 4, 0.004
    noise = (0.005, "uniform")
    param_scale = 3.0
    dynamics_vary = True
    measured = False

    def draw(self):
        size = sum(getattr(self.model, name).size for name, _ in self.randomized)
        generators = [random.Random(seed) for seed in range(1, sum(self.counts) + 1)]
        return self.split_first(np.array([[rng.uniform(-3, 3) for _ in range(size)] for rng in generators]))

    def models(self, params):
        models = []
        for row in params:
            model, start = copy.copy(self.model), 0
            for name, base in self.randomized:
                original = getattr(self.model, name)
                exponent = row[start : start + original.size].reshape(original.shape)
                getattr(model, name)[:] = original * base**exponent
                start += original.size
            models.append(model)
        return models


class HopperRandParams(RandomParams):
    xml, obs_dim, act_dim = "hopper.xml", 12, 3
    randomized = (("body_mass", 1.5), ("body_inertia", 1.5), ("dof_damping", 1.3), ("geom_friction", 1.5))

    def reward(self, outcome, act, params):
        return outcome[..., 0] - 1e-3 * (act**2).sum(-1)


class WalkerRandParams(RandomParams):
    """Masses and frictions vary; an episode terminates when the torso sinks to 0.5 m."""

    xml, obs_dim, act_dim = "walker2d.xml", 18, 6  # walker2d_v5.xml has another foot friction
    randomized = (("body_mass", 1.5), ("geom_friction", 1.5))

    def reward(self, outcome, act, params):
        return outcome[..., 0] + 1.0 - 1e-3 * (act**2).sum(-1)

    def terminated(self, state):
        return state[:, 2] <= 0.5


class AnyMDP(Family):
    """Random tabular tasks (Wang et al., NeurIPS 2025, https://arxiv.org/abs/2502.02869): 16 states in a hidden order
    from bad to good, and 5 actions. Transitions, rewards, pits and the goal are drawn anew for each task.

    Observation = the state's number, one-hot, permuted by the task. Action = the largest entry of the action vector.
    params = the task's number. The optimal policy earns 100 more than the uniform one. No policy is trained: `behave`
    knows the optimal one. state = [inner state, its observed number, step, ended, then a uniform and a normal number
    for every step of the episode], so that a step is a function of state and action.

    The generator draws C candidates at once and keeps the good ones. It follows the authors' code (PyPI: xenoverse
    0.1.14, anymdp/task_sampler_utils.py); what differs is marked [ours]."""

    states = obs_dim = 16
    actions = act_dim = 5
    counts, horizon, outcome_dim = (256, 64), 100, 3  # [ours] the authors draw each task's horizon from 100 to 128
    dynamics_vary = scripted = True
    measured = False
    sac_total_updates, sac_width = 20, 1

    def draw(self):
        return self.split_first(np.arange(float(sum(self.counts)))[:, None])

    @functools.cached_property
    def tables(self):
        """All tasks of the family, as of `draw_tasks`; the same on every call."""
        return self.draw_tasks(sum(self.counts), np.random.default_rng(2502))

    def draw_tasks(self, count, rng):
        """-> SimpleNamespace of arrays over `count` new tasks: transitions, rewards, noise (the rewards' standard
        deviation) [T, S, A, S], start [T, S] probabilities, ends [T, S] bool, names [T, S] (observed numbers), policy
        [T, S] (the optimal action), uniform [T] (mean return of the uniform policy)."""
        batches, size = [], min(5 * count, 256)  # of nine candidates two pass all checks
        while sum(len(batch["ends"]) for batch in batches) < count:
            start, ends = self.draw_ends(size, rng)
            transitions = self.draw_transitions(ends, rng)
            rewards, noise = self.draw_rewards(ends, rng)
            extra, q, possible = self.draw_end_rewards(transitions, rewards, start, ends, rng)
            rewards += extra[:, None, None]
            expected = np.einsum("csaj,csaj->csa", transitions, rewards)
            names = rng.permuted(np.tile(np.arange(self.states), (size, 1)), axis=1)
            kept = np.flatnonzero(possible)
            kept = kept[self.worth_learning(*(table[kept] for table in (transitions, expected, start, ends, q)))]
            start, transitions, expected = start[kept], transitions[kept], expected[kept]
            policy = self.optimal_values(transitions, expected, 0.994, guess=q[kept]).argmax(-1)
            uniform = self.mean_return(start, transitions.mean(2), expected.mean(2))
            gap = self.mean_return(start, self.chosen(transitions, policy), self.chosen(expected, policy)) - uniform
            scale = 100 / gap[:, None, None, None]
            batch = dict(transitions=transitions, rewards=scale * rewards[kept], noise=scale * noise[kept], start=start)
            batch |= dict(ends=ends[kept], names=names[kept], policy=policy, uniform=100 / gap * uniform)
            batches.append({key: table[gap >= 5] for key, table in batch.items()})  # [ours] else noise hides rewards
        return types.SimpleNamespace(**{k: np.concatenate([b[k] for b in batches])[:count] for k in batches[0]})

    def draw_ends(self, size, rng):
        """Where an episode begins and ends -> start [C, S] probabilities, ends [C, S] bool."""
        weights = np.zeros((size, 3))  # one to three of the lowest states are starts
        while (none := ~weights.any(1)).any():
            weights[none] = rng.standard_normal((none.sum(), 3)).clip(0)
        start = np.pad(weights / weights.sum(1, keepdims=True), ((0, 0), (0, self.states - 3)))
        share, ends = rng.uniform(-0.2, 0.4, (size, 1)).clip(0), np.ones((size, self.states), bool)
        while (many := ends.sum(1) >= self.states * share[:, 0] + 1).any():  # pits: none in a third of the tasks
            ends[many] = rng.random((many.sum(), self.states)) < share[many]
        ends &= start == 0  # after the count, which includes pits at the starts
        ends[:, -1] = rng.random(size) < 0.3  # the goal may end an episode too
        return start, ends

    def draw_transitions(self, ends, rng):
        """ends [C, S] -> [C, S, A, S]: each state leads to a band of states, which its actions divide among them."""
        table, state = ends.shape, np.arange(self.states)
        # The band of s is first <= j < stop: far back and a little ahead, so that chance leads to bad states.
        low, most = (state - self.states // 2 - 1).clip(0), (state + self.states // 4 + 1).clip(max=self.states)
        first = rng.integers(low, np.maximum(state - 1, low + 1), table)
        stop = rng.integers(np.minimum(state + 1, most - 1), most, table)
        # It becomes longer until two states between s and stop go on.
        live = np.pad((~ends).cumsum(1), ((0, 0), (1, 0)))  # [C, S + 1]: how many states below j go on
        stop = np.maximum(stop, (live[:, None, :-1] - live[:, 1:, None] < 2).sum(-1))
        # Chances of the uniform policy [C, S, S]: it seldom stays, in the last state never.
        band = rng.standard_normal((*table, self.states)).clip(0.1, 1.0)
        band *= (first[..., None] <= state) & (state < stop[..., None])
        band[:, state, state] *= np.where(state < self.states - 1, 0.5, 0.0)
        # Every action has a center in the band; a next state belongs to the actions with near centers.
        center = rng.uniform((first - 1)[..., None], stop[..., None], (*table, self.actions))
        far = (center[..., None] - state) / rng.exponential(1.0, (*table, 1, 1)).clip(0.2, 1.6)  # [C, S, A, S]
        weights = np.exp(-(far**2))
        c, s, j = np.nonzero((weights.sum(2) < 1e-10) & (band > 0))  # far from all centers: to the nearest
        weights[c, s, abs(far[c, s, :, j]).argmin(1), j] = 1.0
        weights *= (band / weights.sum(2).clip(1e-300))[:, :, None]
        return np.where(ends[:, :, None, None], 0.0, weights / weights.sum(-1, keepdims=True))

    def draw_rewards(self, ends, rng):
        """-> rewards without `draw_end_rewards` [C, S, A, S], standard deviation of their noise [C, S, A, S]."""
        state, table, pairs, one = np.arange(self.states), ends.shape, (*ends.shape, self.actions), (len(ends), 1)
        # Entering a state: the higher the better. Entering an end: no such reward, no such noise.
        base = rng.exponential(0.2, one) * ~ends
        gains = rng.standard_normal(table).clip(0) + 0.2 * (state == self.states - 1)
        of_state = base * (gains.cumsum(1) - rng.uniform(0.1, 0.9, one) * gains.sum(1, keepdims=True))
        state_noise = base * rng.uniform(-0.3, 0.3, table).clip(0)
        # 30 % of the pairs (s, a) have a reward and noise of their own.
        base = rng.exponential(0.05, (*one, 1)).clip(0, 0.1) * (rng.random(pairs) < 0.3)
        of_pair, pair_noise = base * rng.standard_normal(pairs), 0.3 * base * rng.standard_normal(pairs).clip(0)
        # Shaping in a quarter of the tasks: a potential of one to three random waves.
        base = rng.exponential(1.0, one).clip(0.2, 5) * rng.uniform(-1, 1, one).clip(0) * (rng.random(one) < 0.5)
        count, waves = rng.integers(1, 4, one), (len(ends), 3)
        angle = (rng.integers(1, 6, waves) + rng.standard_normal(waves))[..., None] * state / (2 * self.states)
        height = rng.standard_normal((2, *waves)) * rng.exponential(1.0, (2, *waves))
        height *= base / count**0.5 * (np.arange(3) < count)
        potential = np.einsum("kcw,kcws->cs", height, np.stack([np.sin(angle), np.cos(angle)]))
        # A step costs a little where the goal ends the episode, else earns a little where there are pits.
        step = 0.01 * rng.standard_normal(one)
        step = np.where(ends[:, -1:], step.clip(max=0), step.clip(0) * ends.any(1, keepdims=True))
        rewards = (of_pair + potential[..., None])[..., None] + (of_state + step - potential)[:, None, None]
        return rewards, pair_noise[..., None] + state_noise[:, None, None]

    def draw_end_rewards(self, transitions, rewards, start, ends, rng):
        """-> extra reward of entering each state [C, S], which makes pits the worst and the last state the best;
        action values with it [C, S, A]; whether at most five rounds were enough [C] bool."""
        extra, todo = np.zeros(ends.shape), np.ones(len(ends), bool)
        extra[:, -1] = 1.0
        last = np.where(ends[:, -1], self.states - 2, self.states - 1)  # below a goal that ends, even if it is a pit
        strength = np.where(ends[:, -1], 1.0, 0.01)  # a goal that does not end is entered again and again
        margin, lower, higher = (rng.uniform(low, high, (5, len(ends))) for low, high in ((2, 5), (1, 10), (1, 10)))
        fixed = np.einsum("csaj,csaj->csa", transitions, rewards)
        q = fixed.copy()
        for k in range(5):
            expected = fixed[todo] + np.einsum("csaj,cj->csa", transitions[todo], extra[todo])
            q[todo] = self.optimal_values(transitions[todo], expected, 0.99, guess=q[todo])
            value = q.max(-1)
            pits_gain = extra.min(1) - np.where(ends, np.inf, value).min(1) + 1
            goal_lacks = np.where(start > 0, value, -np.inf).max(1) - value[np.arange(len(ends)), last] + margin[k]
            todo &= (pits_gain > 0) | (goal_lacks > 0)
            extra[:, :-1] -= ends[:, :-1] * (todo * (pits_gain > 0) * (pits_gain + lower[k]))[:, None]
            extra[:, -1] += todo * (goal_lacks > 0) * strength * np.maximum(2 * goal_lacks, higher[k])
        return extra, q, ~todo

    def worth_learning(self, transitions, expected, start, ends, guess):
        """expected rewards and guess [C, S, A] -> [C] bool: from every start the optimal policy earns enough more than
        the uniform one and visits many states."""
        gamma = 2 ** (-1 / self.states)
        optimal = self.optimal_values(transitions, expected, gamma, guess)
        single, earned = transitions.mean(2, keepdims=True), expected.mean(2, keepdims=True)  # a single, mixed action
        value = self.optimal_values(single, earned, gamma, guess=earned)[..., 0]
        uniform = expected + gamma * np.einsum("csaj,cj->csa", transitions, value)
        gain = (optimal.max(-1) - uniform.max(-1)) * (1 - gamma) * self.horizon
        moves = np.where(ends[..., None], start[:, None], self.chosen(transitions, optimal.argmax(-1)))
        visits = np.linalg.matrix_power(moves, 2 ** (int(math.log2(self.horizon)) + 1))  # [C, S, S]
        # The authors also demand a relative entropy above 0.35, which follows: -log(0.3) / log(16) = 0.43.
        return ((start == 0) | (gain >= 2) & ((visits**2).sum(-1) < 0.3)).all(1)

    def optimal_values(self, transitions, expected, gamma, guess):
        """Q of the optimal policy, by policy iteration from the greedy policy of `guess`: transitions [C, S, A, S],
        expected rewards [C, S, A], guess alike -> [C, S, A]."""
        q, todo, policy = np.zeros(expected.shape), np.arange(len(expected)), guess.argmax(-1)
        while len(todo):
            moves, earned = self.chosen(transitions, policy), self.chosen(expected, policy)
            value = np.linalg.solve(np.eye(self.states) - gamma * moves, earned[..., None])  # [C, S, 1]
            now = transitions.reshape(len(todo), -1, self.states) @ value
            q[todo] = now = expected + gamma * now.reshape(expected.shape)
            on = (now.max(-1) > value[..., 0] + 1e-7).any(1)  # where another action is better
            todo, transitions, expected, policy = todo[on], transitions[on], expected[on], now.argmax(-1)[on]
        return q

    def chosen(self, table, policy):
        """table [C, S, A, ..], policy [C, S] -> the entries of its actions [C, S, ..]."""
        return table[np.arange(len(table))[:, None], np.arange(self.states), policy]

    def mean_return(self, start, moves, earned):
        """-> [C], of one episode by the policy with transitions `moves` and expected rewards `earned`."""
        value = np.zeros(earned.shape)
        for _ in range(self.horizon):
            value = earned + np.einsum("csj,cj->cs", moves, value)
        return (start * value).sum(1)

    def exact_returns(self, params):
        """Mean returns of the uniform and of the optimal policy, [T] each, 100 apart."""
        uniform = self.tables.uniform[params[:, 0].astype(int)]
        return uniform, uniform + 100

    def reset(self, rng, params):
        task, dice = params[:, 0].astype(int), rng.random((len(params), self.horizon + 1))
        inner = (dice[:, :1] >= self.tables.start[task].cumsum(1)).sum(1).clip(max=self.states - 1)
        fixed = np.stack([inner, self.tables.names[task, inner], 0 * inner, 0 * inner], 1)
        return np.concatenate([fixed, dice[:, 1:], rng.standard_normal((len(params), self.horizon))], 1)

    def step(self, state, act, params):
        task, rows = params[:, 0].astype(int), np.arange(len(state))
        inner, step = state[:, 0].astype(int), state[:, 2].astype(int)
        chances = self.tables.transitions[task, inner, act.argmax(1)].cumsum(1)
        inner = (state[rows, 4 + step, None] >= chances).sum(1).clip(max=self.states - 1)
        fixed = np.stack([inner, self.tables.names[task, inner], step + 1, self.tables.ends[task, inner]], 1)
        return np.concatenate([fixed, state[:, 4:]], 1)

    def observe(self, state):
        return np.eye(self.states)[state[:, 1].astype(int)]

    def outcome(self, state, next_state):
        """Inner state before and after the step, noise of the reward in standard deviations."""
        noise = state[np.arange(len(state)), 4 + self.horizon + state[:, 2].astype(int).clip(max=self.horizon - 1)]
        return np.stack([state[:, 0], next_state[:, 0], noise], 1)

    def reward(self, outcome, act, params):
        index = params[..., 0].astype(int), outcome[..., 0].astype(int), act.argmax(-1), outcome[..., 1].astype(int)
        return self.tables.rewards[index] + self.tables.noise[index] * outcome[..., 2]

    def terminated(self, state):
        return state[:, 3] > 0

    def distance(self, params, others):
        """Share of the states in which the optimal actions of two tasks differ."""
        one, other = (self.known[numbers[..., 0].astype(int)] for numbers in (params, others))
        return (one != other).mean(-1)

    @functools.cached_property
    def known(self):
        """-> [T, S] optimal action in each observed state."""
        return np.take_along_axis(self.tables.policy, self.tables.names.argsort(1), 1)

    def behave(self, obs, params, skill, rng):
        """The optimal action with probability `skill`, else a uniform one: obs [B, S], params [B, 1] -> act [B, A], in
        which that action's entry is in [0, 1], the others in [-1, 0]."""
        optimal = self.known[params[:, 0].astype(int), obs.argmax(1)]
        choice = np.where(rng.random(len(obs)) < skill, optimal, rng.integers(self.actions, size=len(obs)))
        return rng.random((len(obs), self.actions)) - (np.arange(self.actions) != choice[:, None])


@contextlib.contextmanager
def user_code(call):
    """A fault of a user's code ends the program with one line: the call, the fault, and where it is."""
    try:
        yield
    except Exception as error:
        others = __file__, "<", sys.prefix, sys.base_prefix  # this file, Python and the packages
        steps = [step for step in traceback.extract_tb(error.__traceback__) if not step.filename.startswith(others)]
        place = "".join(f" ({step.filename}, line {step.lineno})" for step in steps[-1:])
        raise SystemExit(f"{call}: {type(error).__name__}: {' '.join(str(error).split())}{place}") from error


class GymFamily(Family):
    """Any gymnasium environment with Box spaces: make(params [P]) -> gym.Env. params [T, P]; test_ids: which are test
    tasks; settings: attributes of Family, such as horizon (by default the environment's time limit).

    state = [number of the row's environment, reward, terminated, truncated, observation]; the environment keeps the
    rest. Rows are stepped one by one. An interrupted collection begins its episodes anew."""

    dynamics_vary = None  # the reward is known only for the task that was played

    def __init__(self, make, params, test_ids, **settings):
        self.make, self.params, self.test_ids = make, np.array(params, np.float64), np.array(test_ids)
        if unknown := [name for name in settings if not hasattr(Family, name)]:
            raise SystemExit(f"GymFamily: no setting {unknown[0]}")
        mujoco.set_mju_user_warning(lambda _: None)  # or every environment repeats the model's warnings
        self.worlds, self.keys, self.free = [], [], {}  # environments; their tasks; numbers of unused ones, by task
        world = self.worlds[self.take(self.params[0])]
        self.space, self.obs_dim = world.action_space, math.prod(world.observation_space.shape)
        self.act_dim, self.param_scale = math.prod(self.space.shape), abs(self.params).max(0).clip(1e-8)
        self.horizon = settings.get("horizon") or getattr(world.spec, "max_episode_steps", None)
        if not self.horizon:
            raise SystemExit("GymFamily: the environment has no time limit; give horizon=")
        vars(self).update(settings | {"horizon": int(self.horizon)})
        self.release(np.zeros((1, 1)))

    def draw(self):
        return self.params, np.setdiff1d(np.arange(len(self.params)), self.test_ids), self.test_ids

    def distance(self, params, others):
        return super().distance(params / self.param_scale, others / self.param_scale)  # units may differ

    def take(self, params):
        """-> number of an environment of the task that no row uses."""
        key = params.tobytes()
        if not self.free.setdefault(key, []):
            with user_code(f"GymFamily: make({params.tolist()})"):
                world = self.make(params)
                for name, space in (("observations", world.observation_space), ("actions", world.action_space)):
                    if not isinstance(space, gym.spaces.Box):
                        remedy = "use a wrapper (for observations: FlattenObservation)"
                        raise SystemExit(f"GymFamily: {name} are {str(space)[:60]}, not a Box; {remedy}")
            if not world.action_space.is_bounded():
                raise SystemExit("GymFamily: the bounds of the actions must be finite")
            self.free[key].append(len(self.worlds))
            self.worlds.append(world), self.keys.append(key)
        return self.free[key].pop()

    def release(self, state):
        for number in state[:, 0].astype(int):
            self.free[self.keys[number]].append(number)

    def reset(self, rng, params):
        state = np.zeros((len(params), 4 + self.obs_dim))
        with user_code("GymFamily: obs, info = env.reset(seed=0)"):
            for row, own in zip(state, params):
                row[0] = self.take(own)
                obs, _ = self.worlds[int(row[0])].reset(seed=int(rng.integers(2**31)))
                row[4:] = np.reshape(obs, self.obs_dim)
            return np.asarray_chkfinite(state)

    def step(self, state, act, params):
        next_state, space = state.copy(), self.space
        act = space.low + (act.reshape(-1, *space.shape) + 1) / 2 * (space.high - space.low)
        with user_code("GymFamily: obs, reward, terminated, truncated, info = env.step(action)"):
            for row, number, a in zip(next_state, state[:, 0].astype(int), act.astype(space.dtype)):
                obs, row[1], row[2], row[3], _ = self.worlds[number].step(a)
                row[4:] = np.reshape(obs, self.obs_dim)
            return np.asarray_chkfinite(next_state)

    def observe(self, state):
        return state[:, 4:]

    def outcome(self, state, next_state):
        return next_state[:, 1:2]

    def reward(self, outcome, act, params):
        return outcome[..., 0]

    def terminated(self, state):
        return state[:, 2] > 0

    def truncated(self, state):
        return state[:, 3] > 0


class Offline(Family):
    """Recorded data without a simulator. `load_dataset` sets the sizes."""

    dynamics_vary, simulated = None, False
    obs_dim = act_dim = horizon = 0


FAMILIES = {
    "point-robot": PointRobot(),
    "point-robot-square": PointRobotSquare(),
    "sparse-point-robot": SparsePointRobot(),
    "point-robot-wind": PointRobotWind(),
    "cheetah-vel": CheetahVel(),
    "cheetah-dir": CheetahDir(),
    "ant-dir": AntDir(),
    "ant-dir-full": AntDirFull(),
    "ant-goal": AntGoal(),
    "hopper-rand-params": HopperRandParams(),
    "walker-rand-params": WalkerRandParams(),
    "any-mdp": AnyMDP(),
}
HELP = f"task family: {', '.join(FAMILIES)}; my_file:MyFamily of a file of yours; offline = data without a simulator"
EnvName = Annotated[str, tyro.conf.arg(help=HELP, metavar="FAMILY")]


def family_of(env):
    """Name in FAMILIES, or "offline", or MODULE:NAME of a Family, or its class, in the working directory -> Family."""
    module, _, name = env.partition(":")
    if env == "offline":
        return Offline()
    if env not in FAMILIES and not name:
        near = difflib.get_close_matches(env, FAMILIES, 1) or [*FAMILIES, "offline", "my_file:MyFamily"]
        raise SystemExit(f"--env {env}: no such family; did you mean {', '.join(near)}?")
    if env not in FAMILIES:
        sys.path.append(os.getcwd())
        with user_code(f"--env {env}, FILE:FAMILY of FILE.py in {os.getcwd()}"):
            found = getattr(importlib.import_module(module), name, None)
            FAMILIES[env] = found() if isinstance(found, type) and issubclass(found, Family) else found
    if not isinstance(FAMILIES[env], Family):
        raise SystemExit(f"--env {env}: {name} of {module}.py must be a Family or GymFamily of data_collect.py")
    return FAMILIES[env]


# ---- batched simulation -----------------------------------------------------


class TaskEnv(gym.vector.VectorEnv):
    """B rows of one family, each bound to a task; a MuJoCo step of all rows is one rollout call.

    Nothing resets by itself: a row that terminated, reached the time limit or diverged stands still with reward 0 until
    `reset` names it in options["reset_mask"] [B] bool. options["task_ids"] [B] rebinds the rows that are reset. `step`
    adds info["outcome"] [B, k] and info["diverged"] [B]: rows whose physics broke, so that their transition is void."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED, "render_modes": []}

    def __init__(self, family, params, task_ids):
        """params [T, P]; task_ids [B] rows of params."""
        self.family, self.params = family, np.asarray(params, np.float64)
        self.task_ids = np.array(task_ids)
        self.num_envs = len(self.task_ids)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (family.obs_dim,), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (family.act_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        if isinstance(family, Mujoco):
            threads = torch.get_num_threads()
            self.models = family.models(self.params)
            self.pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
            self.scratch = [mujoco.MjData(family.model) for _ in range(threads)]
            self.chunk = max(1, self.num_envs // (2 * threads))
        self.state = family.reset(np.random.default_rng(0), self.params[self.task_ids])  # [B, S] until the first reset
        self.steps = np.zeros(self.num_envs, int)
        self.live = np.zeros(self.num_envs, bool)

    def reset(self, *, seed=None, options=None):
        """seed: None continues the generator, an int seeds row i with seed + i, or one int per row. -> obs [B, obs_dim]
        float32, {}. Rows outside the mask keep their state."""
        options = options or {}
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        if "task_ids" in options:
            self.task_ids[mask] = np.asarray(options["task_ids"])[mask]
        self.family.release(self.state[mask])
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))  # the generator that later resets continue
            seed = seed + np.arange(self.num_envs)
        if seed is None:
            self.state[mask] = self.family.reset(self.np_random, self.params[self.task_ids[mask]])
        else:
            for row in np.flatnonzero(mask):
                rng = np.random.default_rng(seed[row])
                self.state[row] = self.family.reset(rng, self.params[self.task_ids[[row]]])[0]
        self.steps[mask], self.live[mask] = 0, True
        return self.family.observe(self.state).astype(np.float32), {}

    def step(self, actions):
        """actions [B, act_dim] -> obs [B, obs_dim], rew [B], terminated [B], truncated [B], info."""
        if not np.isfinite(actions).all():
            task = self.task_ids[~np.isfinite(actions).all(1)][0]
            raise SystemExit(f"stopped: the policy's action on task {task} is not finite")
        act = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        live, params = self.live.copy(), self.params[self.task_ids]
        next_state, diverged = self.state.copy(), np.zeros(self.num_envs, bool)
        if live.any():
            next_state[live], diverged[live] = self._simulate(self.state[live], act[live], live)
        outcome = self.family.outcome(self.state, next_state)
        moved = live & ~diverged
        rew = np.where(moved, self.family.reward(outcome, act, params), 0.0)
        self.state, self.steps = next_state, self.steps + moved
        terminated = moved & self.family.terminated(next_state)
        stopped = (self.steps >= self.family.horizon) | self.family.truncated(next_state)
        truncated = moved & ~terminated & stopped
        self.live = moved & ~terminated & ~truncated
        info = {"outcome": outcome.copy(), "diverged": diverged}  # for points a view of the state
        return self.family.observe(next_state).astype(np.float32), rew, terminated, truncated, info

    def _simulate(self, state, act, live):
        """One environment step of the live rows -> next state, diverged. A row that diverges keeps its state."""
        if isinstance(self.family, Mujoco):
            skip = self.family.frame_skip
            control = np.repeat(act[:, None], skip, 1)
            models = [self.models[i] for i in self.task_ids[live]]
            states, _ = self.pool.rollout(models, self.scratch, state, control, chunk_size=self.chunk)
            next_state = states[:, -1].copy()
            # MuJoCo silently resets a broken row instead of returning NaN; only its clock shows it
            diverged = abs(next_state[:, 0] - state[:, 0] - skip * self.family.timestep) > 1e-9
        else:
            next_state, diverged = self.family.step(state, act, self.params[self.task_ids[live]]), False
        diverged = diverged | ~np.isfinite(next_state).all(1)
        next_state[diverged] = state[diverged]
        return next_state, diverged

    def get_state(self):
        """What continues bit for bit, for a checkpoint."""
        arrays = {name: torch.tensor(getattr(self, name)) for name in ("state", "steps", "live", "task_ids")}
        return {"arrays": arrays, "rng": self.np_random.bit_generator.state}

    def set_state(self, saved):
        arrays = {name: array.numpy().copy() for name, array in saved["arrays"].items()}
        self.np_random.bit_generator.state = saved["rng"]
        if isinstance(self.family, GymFamily):  # its environments cannot be saved
            self.reset(options={"task_ids": arrays["task_ids"]})
        else:
            vars(self).update(arrays)

    def close_extras(self, **kwargs):
        self.family.release(self.state)
        if isinstance(self.family, Mujoco):
            self.pool.close()


def empty_episodes(family, shape):
    """Arrays for one episode per entry of `shape` -> dict: observations [*shape, H+1, obs_dim], actions [*shape, H,
    act_dim], rewards [*shape, H] (float32), lengths [*shape] int32, terminated [*shape] bool; all zero."""
    return {
        "observations": np.zeros((*shape, family.horizon + 1, family.obs_dim), np.float32),
        "actions": np.zeros((*shape, family.horizon, family.act_dim), np.float32),
        "rewards": np.zeros((*shape, family.horizon), np.float32),
        "lengths": np.zeros(shape, np.int32),
        "terminated": np.zeros(shape, bool),
    }


def rollout(env, policy, seeds, device="cpu", standardize=lambda obs: obs):
    """One episode per row of `env`. policy(obs [B, obs_dim], rew [B]) -> act [B, act_dim], tensors on `device`; rew is
    the previous reward, 0 at first. standardize changes every observation, also in the result.
    -> `empty_episodes`, filled up to each episode's end, and diverged [B] bool."""
    obs, _ = env.reset(seed=seeds)
    rew = np.zeros(env.num_envs)
    out = empty_episodes(env.family, (env.num_envs,)) | {"diverged": np.zeros(env.num_envs, bool)}
    seen = standardize(torch.as_tensor(obs, device=device))
    out["observations"][:, 0] = seen.cpu().numpy()
    for t in range(env.family.horizon):
        live = env.live.copy()
        with torch.no_grad():
            act = policy(seen, torch.as_tensor(rew, dtype=torch.float32, device=device)).cpu().numpy()
        obs, rew, terminated, _, info = env.step(act)
        seen = standardize(torch.as_tensor(obs, device=device))
        out["diverged"] |= info["diverged"]
        live &= ~info["diverged"]
        out["actions"][live, t], out["rewards"][live, t] = act[live].clip(-1, 1), rew[live]
        out["observations"][live, t + 1] = seen.cpu().numpy()[live]
        out["lengths"][live] += 1
        out["terminated"] |= terminated
        if not env.live.any():
            break
    return out


# ---- behavior policies ------------------------------------------------------


def mlp(sizes):
    """ReLU multilayer perceptron; layer norm after each hidden layer doubles SAC's sample efficiency here."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.LayerNorm(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class BehaviorActor(nn.Module):
    """Tanh-Gaussian policy pi(a | s, task); task [B, P] are the scaled true task parameters."""

    def __init__(self, obs_dim, act_dim, task_dim, width):
        super().__init__()
        self.net = mlp([obs_dim + task_dim, width, width, 2 * act_dim])

    def forward(self, obs, task):
        """obs [B, obs_dim], task [B, P] -> sampled act [B, act_dim] in (-1, 1), log-probability [B]."""
        mean, log_std = self.net(torch.cat([obs, task], -1)).chunk(2, -1)
        log_std = -1.5 + 3.5 * torch.tanh(log_std)  # in (-5, 2)
        noise = torch.randn_like(mean)
        pre = mean + log_std.exp() * noise
        logp = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        logp = logp - 2 * (math.log(2) - pre - nn.functional.softplus(-2 * pre))  # tanh's Jacobian
        return torch.tanh(pre), logp.sum(-1)

    def mode(self, obs, task):
        return torch.tanh(self.net(torch.cat([obs, task], -1)).chunk(2, -1)[0])


class SAC(nn.Module):
    """Soft actor-critic with twin critics and a learned temperature (Haarnoja et al. 2018, v2)."""

    def __init__(self, family, task_dim, args):
        super().__init__()
        self.gamma, self.target_entropy = family.gamma, -float(family.act_dim)
        critic_sizes = [family.obs_dim + task_dim + family.act_dim, args.width, args.width, 1]
        self.actor = BehaviorActor(family.obs_dim, family.act_dim, task_dim, args.width)
        self.critic = nn.ModuleList([mlp(critic_sizes), mlp(critic_sizes)])
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.1)))
        # fused: one kernel per optimizer instead of several per tensor
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), args.lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), args.lr, fused=True)
        self.temperature_opt = torch.optim.Adam([self.log_temperature], args.lr, fused=True)

    def update(self, obs, act, rew, next_obs, term, task):
        """One gradient step on a batch (obs [B, obs_dim], rew and term [B], task [B, P])."""
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            next_act, next_logp = self.actor(next_obs, task)
            next_in = torch.cat([next_obs, task, next_act], -1)
            # the mean of the twins, not the minimum: with layer norm nothing overestimates, and it learns faster
            next_q = sum(q(next_in)[:, 0] for q in self.critic_target) / 2 - temperature * next_logp
            q_target = rew + self.gamma * (1 - term) * next_q
        critic_in = torch.cat([obs, task, act], -1)
        critic_loss = sum(nn.functional.mse_loss(q(critic_in)[:, 0], q_target) for q in self.critic)
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        pi_act, pi_logp = self.actor(obs, task)
        pi_in = torch.cat([obs, task, pi_act], -1)
        q = torch.min(*[q(pi_in)[:, 0] for q in self.critic])
        self.actor_opt.zero_grad()
        # only the actor's gradients: the critics' weight gradients would be thrown away
        (temperature * pi_logp - q).mean().backward(inputs=list(self.actor.parameters()))
        self.actor_opt.step()
        self.temperature_opt.zero_grad()
        (-self.log_temperature * (pi_logp.detach() + self.target_entropy).mean()).backward()
        self.temperature_opt.step()
        with torch.no_grad():  # or the targets' history grows with every update
            torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), 0.005)
        return critic_loss.detach(), q.detach().mean()


class Replay:
    """Transitions of one SAC run as one preallocated tensor; a batch is one gather."""

    def __init__(self, family, capacity, device):
        self.sizes = [family.obs_dim, family.act_dim, family.outcome_dim, family.obs_dim, 1]
        self.rows = torch.zeros(capacity, sum(self.sizes), device=device)
        self.task_ids = torch.zeros(capacity, dtype=torch.long, device=device)
        self.count = 0

    def add(self, obs, act, outcome, next_obs, term, task_ids):
        new = slice(self.count, self.count + len(obs))
        columns = np.concatenate([obs, act, outcome, next_obs, term[:, None]], 1, dtype=np.float32)
        self.rows[new], self.task_ids[new] = torch.as_tensor(columns), torch.as_tensor(task_ids)
        self.count += len(obs)

    def sample(self, size):
        index = torch.randint(self.count, (size,), device=self.rows.device)
        obs, act, outcome, next_obs, term = self.rows[index].split(self.sizes, 1)
        return obs, act, outcome, next_obs, term[:, 0], self.task_ids[index]


PHASES = 20  # snapshots of a behavior policy, evenly over its training


def train_behavior(family, params, task_ids, args, device, saved, save, signals, label):
    """Train one SAC agent on the tasks `task_ids` (all: shared; one: per-task) -> list of PHASES actor state dicts.

    saved: what an interrupted run gave to `save`, or None; save(state) is called at every phase. A received signal
    saves and ends the program. Updates start after one episode of random actions in every row."""
    torch.manual_seed(args.seed + 1000 * int(task_ids[0]))
    agent = SAC(family, params.shape[1], args).to(device)
    warmup = family.horizon  # vector steps
    replay = Replay(family, args.rows * (warmup + math.ceil(args.total_updates / args.updates_per_step)), device)
    env = TaskEnv(family, params, np.random.default_rng(args.seed).choice(task_ids, args.rows))
    obs, _ = env.reset(seed=args.seed)
    progress = {"vector_steps": 0, "step": 0, "snapshots": [], "returns": []}
    running = np.zeros(args.rows)  # return so far of each row's episode
    if saved is not None:
        restore_training(agent, saved)
        progress, running = saved["progress"], saved["running"].numpy()
        replay.count = len(saved["replay_rows"])
        replay.rows[: replay.count], replay.task_ids[: replay.count] = saved["replay_rows"], saved["replay_task_ids"]
        env.set_state(saved["env"])
        obs = family.observe(env.state).astype(np.float32)

    def checkpoint():
        stored = {"replay_rows": replay.rows[: replay.count].clone(), "running": torch.as_tensor(running)}
        stored |= {"replay_task_ids": replay.task_ids[: replay.count].clone()}
        save(training_state(agent) | stored | {"env": env.get_state(), "progress": progress})

    scaled = torch.as_tensor(params / family.param_scale, dtype=torch.float32, device=device)  # [T, P]
    raw = torch.as_tensor(params, dtype=torch.float32, device=device)
    choices = torch.as_tensor(task_ids, device=device)
    start, start_step = time.time(), progress["step"]
    while progress["step"] < args.total_updates:
        if progress["vector_steps"] < warmup:
            act = torch.rand(args.rows, family.act_dim) * 2 - 1
        else:
            with torch.no_grad():
                row_tasks = torch.as_tensor(env.task_ids, device=device)
                act = agent.actor(torch.as_tensor(obs, device=device), scaled[row_tasks])[0].cpu()
        next_obs, rew, terminated, truncated, info = env.step(act.numpy())
        kept = ~info["diverged"]
        replay.add(*(x[kept] for x in (obs, act.numpy(), info["outcome"], next_obs, terminated, env.task_ids)))
        obs, running = next_obs, running + rew
        progress["vector_steps"] += 1
        progress["returns"] = (progress["returns"] + running[terminated | truncated].tolist())[-args.rows :]
        # a stuck episode may end early, without being marked as terminated: fresh starts teach more
        stuck = family.stuck(env.state) & (env.np_random.random(args.rows) < 0.05)
        ended = terminated | truncated | stuck | ~kept
        if ended.any():
            running[ended] = 0.0
            new_tasks = task_ids[env.np_random.integers(len(task_ids), size=args.rows)]
            obs, _ = env.reset(options={"reset_mask": ended, "task_ids": new_tasks})
        if progress["vector_steps"] < warmup:
            continue
        for _ in range(min(args.updates_per_step, args.total_updates - progress["step"])):
            b_obs, b_act, b_outcome, b_next_obs, b_term, b_tasks = replay.sample(args.batch_size)
            if family.dynamics_vary is False:
                # The reward is a known function, so any transition can teach any task. Half of the batch keeps its
                # own task, for which it is closer to on-policy.
                half = args.batch_size // 2
                b_tasks[half:] = choices[torch.randint(len(choices), b_tasks[half:].shape, device=device)]
            b_rew = family.training_reward(b_outcome, b_act, raw[b_tasks])
            critic_loss, q_mean = agent.update(b_obs, b_act, b_rew, b_next_obs, b_term, scaled[b_tasks])
            progress["step"] += 1
        step, snapshots = progress["step"], progress["snapshots"]
        due = step * PHASES // args.total_updates - len(snapshots)
        if due:
            actor = {k: v.to("cpu", copy=True) for k, v in agent.actor.state_dict().items()}
            snapshots += [actor] * due
            if not math.isfinite(critic_loss.item()):
                raise SystemExit(f"the behavior policy of {label} diverged at update {step}: try a smaller --lr")
            checkpoint()
            eta = duration((time.time() - start) / (step - start_step) * (args.total_updates - step))
            share = f"{label} {step:>7}/{args.total_updates} {100 * step // args.total_updates:>3}%"
            mean_return = np.mean(progress["returns"] or [math.nan])
            losses = f"return {mean_return:.1f}  critic {critic_loss.item():.3f}  q {q_mean.item():.2f}"
            print(f"[{share}] eta {eta}  env steps {replay.count}  {losses}", flush=True)
        if signals.received:
            checkpoint()
            signals.stop(signals.received)
    env.close()
    return progress["snapshots"]


# ---- the dataset file: writing ------------------------------------------------

NO_EPISODE, RANDOM = -1, -2  # in tables of policies: no episode, or one of the random policy
# key -> dtype, shape; letters: T tasks, N episodes, H horizon, O obs_dim, A act_dim, P parameters, U training tasks,
# V test tasks, C foreign contexts per test task. Other floats and integers are converted; what is not needed to train
# may be absent, see `check_arrays`.
FILE_LAYOUT = {
    "observations": ("float32", ("T", "N", "H+1", "O")),
    "actions": ("float32", ("T", "N", "H", "A")),
    "rewards": ("float32", ("T", "N", "H")),
    "lengths": ("int32", ("T", "N")),
    "terminated": ("bool", ("T", "N")),
    "behavior_step": ("int32", ("T", "N")),
    "task_params": ("float64", ("T", "P")),
    "train_ids": ("int64", ("U",)),
    "test_ids": ("int64", ("V",)),
    "random_returns": ("float64", ("T",)),
    "expert_returns": ("float64", ("T",)),
    "ood_observations": ("float32", ("V", "C", "H+1", "O")),
    "ood_actions": ("float32", ("V", "C", "H", "A")),
    "ood_rewards": ("float32", ("V", "C", "H")),
    "ood_lengths": ("int32", ("V", "C")),
    "ood_terminated": ("bool", ("V", "C")),
    "ood_behavior_step": ("int32", ("V", "C")),
    "ood_behavior_task": ("int32", ("V", "C")),
    "ood_distance": ("float64", ("V", "C")),
}
REQUIRED = ("observations", "actions", "rewards", "lengths", "terminated", "train_ids", "test_ids")
QUALITIES = ("mixed", "medium", "expert", "medium-expert", "random")
MAY_BE_HALF = ("observations", "actions", "ood_observations", "ood_actions")  # float16 in some files


def default_path(env, quality="mixed"):
    name = env.replace(":", "-")  # of a family in a user's file
    return DATASETS / (f"{name}.npz" if quality == "mixed" else f"{name}-{quality}.npz")


def shown(path):
    """A path as a person would type it: relative below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@dataclass
class Args:
    env: EnvName = "ant-dir"  # task family
    quality: Literal[QUALITIES] = "mixed"
    """which policies are rolled out: mixed = all phases of training from 10 % on; medium = the first phase
    halfway between random and expert, per task; expert = the last; medium-expert = 70 % and 30 %"""
    out: str | None = None
    """file to write; by default datasets/{env}.npz, for other qualities datasets/{env}-{quality}.npz"""
    seed: int = 0  # seed of training and rollouts (the tasks themselves are fixed by the family)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the SAC updates; the simulation runs on the CPU
    # data
    episodes: int = 50  # episodes per training task
    test_episodes: int = 20  # episodes per test task: they only serve as contexts
    ood_contexts: int = 5
    """contexts per test task by policies of other training tasks, from near to far, at 20, 60 and 100 % of their
    training (one more comes from the random policy)"""
    train_tasks: int | None = None  # use only the first n training tasks of the family
    test_tasks: int | None = None  # use only the first n test tasks of the family
    tasks: str | None = None
    """.npz file with other tasks: task_params [T, P], train_ids and test_ids, for example a dataset of the family"""
    # behavior policies
    behavior: Literal["shared", "per-task"] = "shared"
    """shared: one task-conditioned SAC for all tasks; per-task: an independent SAC for each (the papers' way)"""
    total_updates: int | None = None  # gradient updates of each SAC agent; by default the family's
    rows: int = 64  # environment rows simulated together
    updates_per_step: int = 8  # gradient updates per step of all rows
    batch_size: int = 256  # transitions per update
    width: int | None = None  # hidden units of SAC's networks, two layers; by default the family's
    lr: float = 1e-3  # Adam's learning rate of actor, critics and temperature


# settings that decide the behavior policies: two files that agree on them share the policies
POLICY_SETTINGS = ("env", "seed", "train_tasks", "test_tasks", "tasks", "behavior", "total_updates")
POLICY_SETTINGS += ("rows", "updates_per_step", "batch_size", "width", "lr")


def own_episode(episode, family):
    """An episode as `write_dataset` takes it -> observations, actions, rewards, terminated; a ValueError says what is
    wrong. The sizes of `Offline` become those of the data."""
    *parts, ended = episode if len(episode) == 4 else (*episode, False)
    if len(parts) != 3 or not isinstance(ended, (bool, np.bool_)):
        raise ValueError("an episode is (observations, actions, rewards) or (.., terminated: bool)")
    obs, act, rew = (np.asarray(part, np.float32) for part in parts)
    if obs.ndim != 2 or act.ndim != 2 or not len(obs) - 1 == len(act) == rew.size > 0:
        shapes = ", ".join(str(part.shape) for part in (obs, act, rew))
        raise ValueError(f"shapes {shapes}, expected [n + 1, obs_dim], [n, act_dim], [n], n >= 1")
    if not all(np.isfinite(part).all() for part in (obs, act, rew)):
        raise ValueError("a number is not finite")
    if abs(act).max() > 1 + 1e-5:
        raise ValueError(f"actions reach {abs(act).max():.6g}; rescale them to [-1, 1]")
    found = obs.shape[1], act.shape[1]
    if not family.simulated:
        family.obs_dim, family.act_dim = family.obs_dim or found[0], family.act_dim or found[1]
        family.horizon = max(len(act), family.horizon)
    if found != (family.obs_dim, family.act_dim) or len(act) > family.horizon:
        most = f"expected {(family.obs_dim, family.act_dim)} and at most {family.horizon} steps"
        raise ValueError(f"observations and actions have sizes {found}, {len(act)} steps; {most}")
    return obs, act.clip(-1, 1), np.ravel(rew), ended


def write_dataset(path, env, episodes, train_ids, test_ids, foreign=(), **optional):
    """Check own data and write them to a dataset file -> Dataset.

    env: "offline" for data without a simulator, else as of `family_of`. episodes: for each task a list of episodes
    (observations [n + 1, obs_dim], actions [n, act_dim] in [-1, 1], rewards [n]) or (.., terminated: bool), of any
    lengths n. foreign: for each test task equally many episodes by policies of other tasks. optional: further arrays of
    FILE_LAYOUT, such as task_params. What is left out leaves out the figures that need it."""
    if not all(isinstance(own, (list, tuple)) for own in (*episodes, *foreign)):
        raise SystemExit(f"{path} is not written: episodes must be a list with a list of episodes for each task")
    problems = [f"there is no array {key} in FILE_LAYOUT" for key in optional if key not in FILE_LAYOUT]
    problems += ["foreign needs equally many episodes for each test task"] * (len(set(map(len, foreign))) > 1)
    arrays, family, tables, read = {}, family_of(env), {"": episodes, "ood_": foreign}, {}
    for prefix, task, number in [(p, t, n) for p in tables for t, own in enumerate(tables[p]) for n in range(len(own))]:
        try:
            read[prefix, task, number] = own_episode(tables[prefix][task][number], family)
        except Exception as error:
            problems.append(f"{'context of ' * bool(prefix)}task {task}, episode {number}: {error}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SystemExit(f"{path} is not written: {'; '.join(problems[:3])}{more}")
    for prefix, table in tables.items():
        shape = len(table), max(map(len, table), default=0)
        arrays |= {prefix + key: array for key, array in empty_episodes(family, shape).items() if len(table)}
    for (prefix, *place), (obs, act, rew, ended) in read.items():
        for key, part in (("observations", obs), ("actions", act), ("rewards", rew)):
            arrays[prefix + key][*place, : len(part)] = part
        arrays[prefix + "lengths"][*place], arrays[prefix + "terminated"][*place] = len(act), ended
    arrays |= optional | {"train_ids": np.array(train_ids), "test_ids": np.array(test_ids)}
    return save_dataset(Path(path), env, arrays, {})


def save_dataset(path, env, arrays, about):
    """Check the arrays of a file, write it and read it -> Dataset. about: further entries of the header."""
    if problems := check_arrays(family_of(env), dict(arrays)):
        raise SystemExit(f"{path} is not written: {'; '.join(problems)}")
    header = {"format_version": FORMAT_VERSION, "env": env, "versions": versions()} | about
    content = arrays | {"header": np.array(json.dumps(header))}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_save(path, lambda file: np.savez_compressed(file, **content))
    return load_dataset(env, path)


def collect(args):
    """Train the behavior policies, roll them out and write the dataset file. An interrupted collection goes on; a file
    with the same settings is left alone."""
    family = family_of(args.env)
    if not family.simulated:
        raise SystemExit("--env offline: nothing to collect; data_collect.write_dataset writes your own data")
    fill_in(args, {"": {"total_updates": family.sac_total_updates, "width": family.sac_width}})
    path = shown(Path(args.out or default_path(args.env, args.quality)).expanduser())
    if path.suffix != ".npz":
        raise SystemExit(f"--out {path}: the name must end in .npz")
    params, train_ids, test_ids = given_tasks(args.tasks, family) if args.tasks else family.draw()
    for name, ids in (("train_tasks", train_ids), ("test_tasks", test_ids)):
        if not len(ids) or not np.isin(ids, range(len(params))).all():
            raise SystemExit(f"{args.tasks or args.env}: {name} must be some of the tasks 0 to {len(params) - 1}")
        if (getattr(args, name) or 0) > len(ids):
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.env} has {len(ids)}")
    train_ids, test_ids = train_ids[: args.train_tasks], test_ids[: args.test_tasks]
    used = np.union1d(train_ids, test_ids)  # keep only the chosen tasks and renumber them
    params, train_ids, test_ids = params[used], np.searchsorted(used, train_ids), np.searchsorted(used, test_ids)
    if args.ood_contexts and len(train_ids) == 1 and train_ids[0] in test_ids:
        raise SystemExit("--train-tasks 1: no other training task for foreign contexts; add --ood-contexts 0")
    settings = {k: v for k, v in asdict(args).items() if k not in ("out", "device")}
    if path.exists():
        written = load_dataset(args.env, path).header.get("settings", {})
        for key in settings:
            if settings[key] != written.get(key):
                made = f"{path} was made with {key} {written.get(key)}, not {settings[key]}"
                raise SystemExit(f"{made}: choose another --out or move the file away")
        print(f"{path} is complete; nothing to do")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    start, device = time.time(), resolve_device(args.device)
    policies_path = path.with_name(args.env.replace(":", "-") + ".policies.pt")
    again = f"progress is in {policies_path}, the same command continues"
    with open(policies_path.with_suffix(".lock"), "w") as file, Signals(again) as signals:
        if not lock(file):  # other qualities share the policies
            raise SystemExit(f"another process is collecting {args.env} in {path.parent}: wait for it")
        policies = train_policies(family, params, args, policies_path, device, signals)
        print(f"behavior policies ready after {duration(time.time() - start)}; rolling out", flush=True)
        arrays, note = roll_out_dataset(family, params, train_ids, test_ids, policies, args, device)
        command = "python " + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        save_dataset(path, args.env, arrays, {"settings": settings, "command": command} | note)
    worst, data, best = arrays["random_returns"], note["behavior_return"], arrays["expert_returns"]
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) after {duration(time.time() - start)}")
    print(f"  mean return random {worst.mean():.1f}, data {data:.1f}, expert {best.mean():.1f}")
    if (best <= worst).mean() > 0.5:
        print("warning: for most tasks the expert is no better than the random policy; use more --total-updates")
    if not family.scripted:
        print(f"{policies_path} holds the policies for other --quality files; remove it when you need none")


def given_tasks(path, family):
    """The tasks of --tasks -> as of `Family.draw`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params, train_ids, test_ids = (file[key] for key in ("task_params", "train_ids", "test_ids"))
    except Exception:  # numpy and zipfile raise a dozen kinds
        raise SystemExit(f"--tasks {path}: no .npz file with task_params, train_ids and test_ids") from None
    expected = family.draw()[0].shape[1]
    if params.ndim != 2 or params.shape[1] != expected or not np.isfinite(params).all():
        raise SystemExit(f"--tasks {path}: task_params must be [tasks, {expected}] numbers")
    return params.astype(np.float64), train_ids, test_ids


def train_policies(family, params, args, path, device, signals):
    """Train, or continue from the file `path` -> for each SAC agent (one, or one per task) a list of PHASES actor state
    dicts."""
    groups = [np.arange(len(params))] if args.behavior == "shared" else [np.array([i]) for i in range(len(params))]
    wanted = {k: getattr(args, k) for k in POLICY_SETTINGS}
    wanted["tasks"] = params.tolist()
    policies = {"version": RUN_VERSION, "settings": wanted, "finished": [], "training": None}
    if path.exists():
        remedy = "move it away, or write to another folder with --out"
        policies = read_saved(path, remedy)
        if policies["settings"] != wanted:
            raise SystemExit(f"{path} holds policies with other settings: {remedy}")
        print(f"continuing from {path}")

    def save(training):
        policies["training"] = training
        atomic_save(path, lambda file: torch.save(policies, file))

    signals.may_save = True
    for task_ids in () if family.scripted else groups[len(policies["finished"]) :]:
        label = args.env if args.behavior == "shared" else f"{args.env} task {task_ids[0]}"
        snapshots = train_behavior(family, params, task_ids, args, device, policies["training"], save, signals, label)
        policies["finished"].append(snapshots)
        save(None)
    signals.may_save = False
    if signals.received:  # after the last save
        signals.stop(signals.received)
    return policies["finished"]


def roll_out_dataset(family, params, train_ids, test_ids, groups, args, device):
    """Roll out the policies of `train_policies` -> arrays of the file, entries of its header."""
    actor = BehaviorActor(family.obs_dim, family.act_dim, params.shape[1], args.width).to(device)
    scaled = torch.as_tensor(params / family.param_scale, dtype=torch.float32, device=device)
    rng = np.random.default_rng([args.seed, 1])
    torch.manual_seed(args.seed + 1)
    tasks, diverged = np.arange(len(params)), 0

    def play(phase, task_ids, policy_ids, deterministic=False):
        """One episode per entry of task_ids by the snapshot `phase` (None: random actions) of the policies of the tasks
        policy_ids. Episodes whose physics broke are played again."""
        nonlocal diverged
        env = TaskEnv(family, params, task_ids)
        row_tasks = None if phase is None else scaled[torch.as_tensor(policy_ids, device=device)]

        def policy(obs, rew):
            if phase is None:
                return torch.rand(len(obs), family.act_dim, device=device) * 2 - 1
            if family.scripted:
                skill = 1.0 if deterministic else (phase + 1) / PHASES
                act = family.behave(obs.cpu().numpy(), params[policy_ids], skill, rng)
                return torch.as_tensor(act, dtype=torch.float32, device=device)
            act = torch.zeros(len(obs), family.act_dim, device=device)
            for group, rows in by_group:
                actor.load_state_dict(groups[group][phase])
                inputs = obs[rows], row_tasks[rows]
                act[rows] = actor.mode(*inputs) if deterministic else actor(*inputs)[0]
            return act

        group_of = np.zeros(len(task_ids), int) if len(groups) == 1 else np.asarray(policy_ids)
        by_group = [(g, torch.as_tensor(np.flatnonzero(group_of == g), device=device)) for g in np.unique(group_of)]
        episodes = rollout(env, policy, rng.integers(2**31, size=len(task_ids)), device)
        while episodes["diverged"].any():
            again = np.flatnonzero(episodes["diverged"])
            diverged += len(again)
            for key, value in play(phase, task_ids[again], policy_ids[again], deterministic).items():
                episodes[key][again] = value
        env.close()
        return episodes

    def returns(episodes):
        return episodes["rewards"].sum(1, dtype=np.float64).reshape(len(tasks), -1).mean(1)

    random_returns = returns(play(None, *[tasks.repeat(20)] * 2))
    expert_returns = returns(play(PHASES - 1, *[tasks.repeat(10)] * 2, deterministic=True))
    if family.scripted:  # they are known exactly
        random_returns, expert_returns = family.exact_returns(params)
    test_only = np.setdiff1d(test_ids, train_ids)
    phase_of = choose_phases(args, len(tasks), test_only, random_returns, expert_returns, play)  # [T, N]

    def record(phases, task_ids, policy_ids):
        """One episode per entry of phases, task_ids and policy_ids, [X, Y] each -> arrays of the file."""
        out, steps = empty_episodes(family, phases.shape), np.full(phases.shape, NO_EPISODE, np.int32)
        for phase in np.unique(phases[phases != NO_EPISODE]):
            where = np.nonzero(phases == phase)
            episodes = play(None if phase == RANDOM else phase, task_ids[where], policy_ids[where])
            for key, array in out.items():
                array[where] = episodes[key]
            steps[where] = 0 if phase == RANDOM else (phase + 1) * args.total_updates // PHASES
        return out | {"behavior_step": steps}

    own = np.repeat(tasks[:, None], phase_of.shape[1], 1)
    arrays = record(phase_of, own, own)
    foreign, phases = choose_foreign(family, params, train_ids, test_ids, args.ood_contexts)
    ood = record(phases, np.repeat(test_ids[:, None], foreign.shape[1], 1), foreign)
    arrays |= {"ood_" + key: value for key, value in ood.items()}
    arrays["ood_behavior_task"] = foreign.astype(np.int32)
    arrays |= {"task_params": params, "train_ids": train_ids.astype(np.int64), "test_ids": test_ids.astype(np.int64)}
    arrays |= {"random_returns": random_returns, "expert_returns": expert_returns}
    arrays |= {key: arrays[key].astype(family.storage_dtype) for key in MAY_BE_HALF}
    distance = family.distance(params[test_ids, None], params[foreign.clip(0)])
    arrays["ood_distance"] = np.where(foreign == RANDOM, -1.0, distance)
    recorded = arrays["rewards"][phase_of != NO_EPISODE].sum(-1)
    return arrays, {"behavior_return": float(recorded.mean()), "diverged_episodes": diverged}


def choose_phases(args, num_tasks, test_ids, random_returns, expert_returns, play):
    """-> [T, N] int: the snapshot that plays each episode of each task, or NO_EPISODE, or RANDOM."""
    episodes = max(args.episodes, args.test_episodes)
    table = np.full((num_tasks, episodes), NO_EPISODE)
    medium = np.zeros(num_tasks, int)
    if args.quality.startswith("medium"):
        halfway = random_returns + 0.5 * (expert_returns - random_returns)
        tasks = np.arange(num_tasks).repeat(3)
        means = [play(p, tasks, tasks)["rewards"].sum(1).reshape(-1, 3).mean(1) for p in range(PHASES)]
        reached = np.array(means) >= halfway  # [PHASES, T]
        medium = np.where(reached.any(0), reached.argmax(0), PHASES - 1)
    for task in range(num_tasks):
        count = args.test_episodes if task in test_ids else args.episodes
        table[task, :count] = {
            "mixed": np.linspace(PHASES // 10 - 1, PHASES - 1, count).round(),
            "medium": np.full(count, medium[task]),
            "expert": np.full(count, PHASES - 1),
            "medium-expert": np.where(np.arange(count) < round(0.7 * count), medium[task], PHASES - 1),
            "random": np.full(count, RANDOM),
        }[args.quality]
    return table


def choose_foreign(family, params, train_ids, test_ids, count):
    """Who plays the contexts of the protocol ood -> training tasks, snapshots of their policies, both [V, count + 1]
    int; RANDOM in the last column.

    The other training tasks are sorted by their distance from the test task and cut into `count` bins, one per column.
    Each bin gives the policy least used in this phase of training, then least used overall. The phase rotates over rows
    and columns, so that neither column nor policy tells it."""
    stages = PHASES // 5 - 1, 3 * PHASES // 5 - 1, PHASES - 1  # 20, 60 and 100 % of the training
    foreign, phases = np.full((2, len(test_ids), count + 1), RANDOM)
    acted = np.zeros((PHASES, len(params)), int)  # contexts so far
    for row, task in enumerate(test_ids):
        others = train_ids[train_ids != task]
        distance = family.distance(params[task], params[others]).round(9)  # equal ones stay in order, on any machine
        others = np.resize(others[distance.argsort(kind="stable")], max(count, len(others)))  # too few take turns
        for column in range(count):
            phase = stages[(row + column) % len(stages)]
            near = others[column * len(others) // count : (column + 1) * len(others) // count]  # this column's bin
            policy = near[np.lexsort((acted[:, near].sum(0), acted[phase, near]))[0]]
            foreign[row, column], phases[row, column] = policy, phase
            acted[phase, policy] += 1
    return foreign, phases


# ---- the dataset file: reading ------------------------------------------------

OBS_LIMIT = 10.0  # largest standardized observation


class Batch(NamedTuple):
    """Transitions of M tasks, B of each."""

    obs: torch.Tensor  # [M, B, obs_dim], standardized
    act: torch.Tensor  # [M, B, act_dim] in [-1, 1]
    rew: torch.Tensor  # [M, B]
    next_obs: torch.Tensor  # [M, B, obs_dim]
    term: torch.Tensor  # [M, B] 1 = the task itself ended, never a time limit


class Segment(NamedTuple):
    """Up to n consecutive transitions of an episode from each of B starting points of M tasks."""

    obs: torch.Tensor  # [M, B, n, obs_dim], standardized
    act: torch.Tensor  # [M, B, n, act_dim] in [-1, 1]
    rew: torch.Tensor  # [M, B, n]
    next_obs: torch.Tensor  # [M, B, n, obs_dim]; where the episode ends earlier, all repeat its last transition
    discount: torch.Tensor  # [M, B, n] gamma^k at step k, 0 past the episode's end
    bootstrap: torch.Tensor  # [M, B] discount of the value at the last next_obs; 0 if the task itself ended there


class Dataset:
    """A checked dataset file as tensors on one device; a batch is one gather.

    Observations are standardized: mean 0 and standard deviation 1 over the training tasks' transitions, clipped to
    +-OBS_LIMIT. A transition is one row [obs, act, rew, next_obs, term] of width ctx_dim + 1. A context has the first
    context_dim columns: all except term, unless a method sets context_dim to ctx_dim + 1."""

    def __init__(self, env, family, header, arrays, device, path=None):
        self.env, self.family, self.header, self.device, self.path = env, family, header, device, path
        self.obs_dim, self.act_dim = self.family.obs_dim, self.family.act_dim
        self.ctx_dim = self.context_dim = 2 * self.obs_dim + self.act_dim + 1
        self.task_params = arrays["task_params"]  # [T, P] float64
        self.train_ids, self.test_ids = arrays["train_ids"], arrays["test_ids"]
        # [T], NaN where they are unknown
        self.random_returns, self.expert_returns = arrays["random_returns"], arrays["expert_returns"]
        self.has_scale = bool(np.isfinite(self.random_returns + self.expert_returns).all())  # for normalized returns
        self.ood_behavior_task = arrays["ood_behavior_task"]  # [V, C], RANDOM where the random policy acted
        self.ood_distance = arrays["ood_distance"]  # [V, C] from the test task to that task, -1 for the random policy
        self.train_tasks = torch.as_tensor(self.train_ids, device=device)  # [U]
        self.lengths = torch.as_tensor(arrays["lengths"], dtype=torch.long, device=device)  # [T, N], 0 = no episode
        valid = self.recorded(self.lengths)  # [T, N, H]
        recorded = valid[self.train_ids].cpu().numpy()
        rewards = arrays["rewards"][self.train_ids][recorded]
        self.reward_std = float(nonzero_std(rewards.std(dtype=np.float64), abs(rewards).max()))
        seen = arrays["observations"][self.train_ids, :, :-1][recorded]  # [.., obs_dim]
        mean, std = seen.mean(0, dtype=np.float64), nonzero_std(seen.std(0, dtype=np.float64), abs(seen).max(0))
        self.obs_mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
        self.obs_std = torch.as_tensor(std, dtype=torch.float32, device=device)
        keys = ("observations", "ood_observations")
        arrays = arrays | {k: self.standardize(torch.as_tensor(arrays[k], device=device)).cpu().numpy() for k in keys}
        self.episodes = transitions(arrays, device=device)  # [T, N, H, ctx_dim + 1]
        self.ood_episodes = transitions(arrays, "ood_", device)  # [V, C, H, ctx_dim + 1]
        self.ood_lengths = torch.as_tensor(arrays["ood_lengths"], dtype=torch.long, device=device)
        self.episode_returns = arrays["rewards"].sum(-1, dtype=np.float64)  # [T, N]
        self.counts = valid.sum((1, 2))  # [T] transitions per task
        returns = torch.as_tensor(self.episode_returns, device=device)[..., None].expand_as(valid)
        # row i: numbers of task i's transitions, best episodes first; the first counts[i] are real
        self.valid = returns.where(valid, -math.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
        self.present = (arrays["lengths"] > 0).sum(1)  # [T] episodes per task; they lie first in their row
        self.min_episodes = int(self.present[self.train_ids].min())  # of any training task
        returns = self.episode_returns[self.train_ids][arrays["lengths"][self.train_ids] > 0]
        self.behavior_return = float(returns.mean())  # mean over the training data

    def value_std(self, gamma):
        """Standard deviation of the discounted returns that follow the training tasks' transitions -> float > 0."""
        rew = self.episodes[..., self.obs_dim + self.act_dim][self.train_tasks]  # [U, N, H], 0 after an episode's end
        returns, later = torch.zeros_like(rew), 0.0
        for t in reversed(range(rew.shape[-1])):
            later = rew[..., t] + gamma * later
            returns[..., t] = later
        returns = returns[self.recorded(self.lengths[self.train_tasks])]
        return float(nonzero_std(returns.std(correction=0).cpu().numpy(), abs(returns).max().cpu().numpy()))

    def about(self):
        """-> lines that a run prints when it begins."""
        returns = f"mean return of the training data {self.behavior_return:.1f}"
        if self.has_scale:
            worst, best = self.random_returns[self.test_ids].mean(), self.expert_returns[self.test_ids].mean()
            returns += f", on the test tasks random {worst:.1f}, expert {best:.1f}"
        lines = [f"{len(self.train_ids)} training and {len(self.test_ids)} test tasks", returns]
        return lines + [f"{tag} left out: {reason}" for tag, reason in unmeasurable(self).items()]

    def standardize(self, obs):
        """Observations of the simulation [.., obs_dim] -> as the networks see them, within +-OBS_LIMIT."""
        return ((obs - self.obs_mean) / self.obs_std).clamp(-OBS_LIMIT, OBS_LIMIT)

    def recorded(self, lengths):
        """lengths [..] of episodes -> [.., H] bool: the steps that they have."""
        return torch.arange(self.family.horizon, device=self.device) < lengths[..., None]

    def sample_tasks(self, count, generator):
        """Training tasks, uniform with replacement -> [count]."""
        draw = torch.randint(len(self.train_tasks), (count,), device=self.device, generator=generator)
        return self.train_tasks[draw]

    def draw(self, task_ids, size, generator, share=1.0):
        """Uniform transitions with replacement: task_ids [M] -> [M, size], numbered through all tasks, episodes and
        steps. share in (0, 1]: draw only from this share of each task's transitions, best episodes first."""
        count = share * self.counts[task_ids, None]
        pick = torch.rand(len(task_ids), size, device=self.device, generator=generator) * count
        return self.valid[task_ids[:, None], pick.long()] + task_ids[:, None] * self.valid.shape[1]

    def sample(self, task_ids, size, generator, share=1.0):
        """The transitions of `draw` -> rows [M, size, ctx_dim + 1]."""
        return self.episodes.view(-1, self.ctx_dim + 1)[self.draw(task_ids, size, generator, share)]

    def sample_batch(self, task_ids, size, generator, share=1.0):
        """The transitions of `draw` -> Batch."""
        return self.unpack(self.sample(task_ids, size, generator, share))

    def sample_segments(self, task_ids, size, steps, gamma, generator):
        """The transitions of `draw`, each with the steps - 1 that follow it -> Segment."""
        start = self.draw(task_ids, size, generator)[..., None]  # [M, size, 1]
        horizon = self.family.horizon
        left = self.lengths.flatten()[start // horizon] - start % horizon  # [M, size, 1] transitions from start on
        k = torch.arange(steps, device=self.device)
        rows = self.episodes.view(-1, self.ctx_dim + 1)[start + torch.minimum(k, left - 1)]
        obs, act, rew, next_obs, term = self.unpack(rows)
        bootstrap = gamma ** left.clamp(max=steps)[..., 0] * (1 - term[..., -1])
        return Segment(obs, act, rew, next_obs, gamma**k * (k < left), bootstrap)

    def unpack(self, rows):
        """[.., ctx_dim + 1] -> Batch."""
        obs, act, rew, next_obs, term = rows.split([self.obs_dim, self.act_dim, 1, self.obs_dim, 1], -1)
        return Batch(obs, act, rew[..., 0], next_obs, term[..., 0])

    def sample_context(self, task_ids, size, generator, episodes=None):
        """Uniform transitions from one random episode per task: task_ids [M] -> [M, size, ctx_dim]. episodes
        [T, N, H, ..]: what to draw from, by default the data without term."""
        episode = draw_one(self.lengths[task_ids] > 0, generator)
        length = self.lengths[task_ids[:, None], episode]
        step = (torch.rand(len(task_ids), size, device=self.device, generator=generator) * length).long()
        episodes = self.episodes[..., :-1] if episodes is None else episodes
        return episodes[task_ids[:, None], episode, step]


def draw_one(allowed, generator):
    """A uniform draw among the allowed places of each row: allowed [M, N] bool -> [M, 1], 0 in a row without any.
    It is an exponential race, since torch.multinomial would synchronize with the device."""
    weight = allowed.float()
    return (weight / torch.empty_like(weight).exponential_(generator=generator)).argmax(1, keepdim=True)


def nonzero_std(std, largest):
    """A standard deviation that one can divide by: 1 where it is mere rounding, because all numbers are the same.
    largest: size of the largest number. Arrays and tensors alike."""
    return std + (1 - std) * (std <= 1e-6 * largest)


def transitions(arrays, prefix="", device="cpu"):
    """Episode arrays, as in a file or from `rollout` -> rows [.., H, ctx_dim + 1] float32; zeros after the end."""
    obs, act, rew, lengths = (arrays[prefix + k] for k in ("observations", "actions", "rewards", "lengths"))
    steps = np.arange(rew.shape[-1])
    term = (arrays[prefix + "terminated"][..., None] & (steps == lengths[..., None] - 1)).astype(np.float32)
    rows = np.concatenate([obs[..., :-1, :], act, rew[..., None], obs[..., 1:, :], term[..., None]], -1)
    rows[steps >= lengths[..., None]] = 0.0  # e.g. the last observation of a terminated episode
    return torch.as_tensor(rows, device=device)


def load_dataset(env, path=None, device="cpu"):
    """Read and check {env}.npz in DATASETS (or path) -> Dataset on the device, also "auto". One line says what is wrong
    with a file, and what to do."""
    family, device, path = family_of(env), resolve_device(device), shown(Path(path or default_path(env)).expanduser())
    ours = path.resolve() == default_path(env)
    make = f"python {shown(DATASETS.parent / 'data_collect.py')} --env {env}" + ("" if ours else f" --out {path}")
    own = "docs/OWN_DATA.md tells how to write your data"
    if not path.is_file():
        what = f"Make it: {make}" if family.simulated else f"Give the right path with --dataset; {own}"
        raise SystemExit(f"{path} not found. {what}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        header = {"env": env, "format_version": FORMAT_VERSION} | json.loads(str(arrays.pop("header", "{}")))
    except Exception:  # zipfile, numpy and json raise a dozen kinds on damaged bytes
        remedy = f"Move it away and run: {make}" if ours else f"Choose another --dataset; {own}"
        raise SystemExit(f"{path}: damaged, or not a dataset. {remedy}")
    header["settings"] = made = {"quality": "own"} | header.get("settings", {})
    if family.simulated and header["env"] != env:
        raise SystemExit(f"{path} holds {header['env']}, not {env}. Use --env {header['env']} or another file")
    problems = check_arrays(family, arrays)
    if header["format_version"] != FORMAT_VERSION:
        problems = [f"format {header['format_version']}, this code reads {FORMAT_VERSION}"]
    elif not problems and family.simulated and "train_tasks" in made and not made.get("tasks"):
        params, *ids = family.draw()  # the file was collected on these
        for name, own_ids in zip(("train", "test"), ids):
            drawn, found = params[own_ids[: made[f"{name}_tasks"]]], arrays["task_params"][arrays[f"{name}_ids"]]
            if drawn.shape != found.shape or not np.allclose(drawn, found):
                problems.append(f"made for other {name} tasks than {env} has now")
    if problems:
        remedy = f"Move it away and run: {make}" if ours or "command" in header else own
        raise SystemExit(f"{path}: {'; '.join(problems)}. {remedy}")
    return Dataset(env, family, header, arrays, device, path)


def check_arrays(family, arrays):
    """Convert the arrays of a file to their types and add the optional ones, in place -> what is wrong, as phrases.
    Unknown returns are NaN, other unknown numbers 0; there may be no foreign contexts (C = 0). The sizes of `Offline`
    become those of the arrays."""
    problems = [f"array {key} is missing" for key in REQUIRED if key not in arrays]
    sizes = {"H": family.horizon, "H+1": family.horizon + 1, "O": family.obs_dim, "A": family.act_dim}
    sizes = sizes if family.simulated else {}
    for key, (dtype, letters) in FILE_LAYOUT.items():
        if key not in arrays:
            continue
        array = np.asarray(arrays[key])
        if array.size and not np.can_cast(array.dtype, dtype, "same_kind"):
            problems.append(f"{key} has type {array.dtype}, expected {dtype}")
            continue
        arrays[key] = array = array.astype(dtype, copy=False)
        if array.ndim != len(letters) or any(sizes.setdefault(n, s) != s for n, s in zip(letters, array.shape)):
            problems.append(f"{key} has shape {array.shape}, expected {tuple(sizes.get(n, n) for n in letters)}")
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"{key} has values that are not finite")
    if not problems and sizes["H+1"] != sizes["H"] + 1:
        problems.append("observations must have one more step than actions")
    if problems:
        return problems
    if not family.simulated:
        family.obs_dim, family.act_dim, family.horizon = sizes["O"], sizes["A"], sizes["H"]
    elif "task_params" not in arrays:
        return ["array task_params is missing; the simulator needs it"]
    sizes = {"P": 1, "C": 0} | sizes
    for key, (dtype, letters) in FILE_LAYOUT.items():
        unknown = np.nan if key.endswith("_returns") else 0
        arrays.setdefault(key, np.full([sizes[n] for n in letters], unknown, dtype))
    lengths = arrays["lengths"]
    for key in ("train_ids", "test_ids"):
        ids = arrays[key]
        if not len(ids) or len(set(ids)) < len(ids) or not np.isin(ids, range(sizes["T"])).all():
            problems.append(f"{key} must be distinct task numbers from 0 to {sizes['T'] - 1}, at least one")
        elif not (lengths[ids] > 0).any(1).all():
            problems.append(f"a task of {key} has no episode")
    for prefix in ("", "ood_"):
        if not np.isin(arrays[prefix + "lengths"], range(bool(prefix), family.horizon + 1)).all():
            problems.append(f"{prefix}lengths must lie between {int(bool(prefix))} and the horizon {family.horizon}")
        if abs(arrays[prefix + "actions"]).max(initial=0) > 1:
            problems.append(f"{prefix}actions must lie in [-1, 1]")
    if (np.diff(lengths > 0, axis=1) & (lengths[:, 1:] > 0)).any():
        problems.append("lengths has an empty episode before a recorded one")
    if family.scripted and not np.allclose(arrays["random_returns"], family.exact_returns(arrays["task_params"])[0]):
        problems.append("its tasks are of another version of the generator")
    return problems


# ---- evaluation -------------------------------------------------------------

EXPLORATION_EPISODES, EXPLOITATION_EPISODES, MORE_EPISODES = 2, 3, 5  # of the online protocols
PROTOCOLS = ("iid", "ood", "ood_random", "online", "online_random_start", "zero_shot", "train")


def reset_seeds(tasks, number, k):
    """Seeds [R] of rows that play their own k-th episode in succession for the `number`-th time on their task."""
    return (10_000 + 97 * tasks + number + 31 * k).tolist()


def evaluate(data, adapt, protocols=("iid",), episodes=2, trace=None):
    """Returns of an adaptable policy on the test tasks; all tasks x `episodes` are rolled out as one batch.

    adapt(context [R, K, context_dim], mask [R, K], explore) -> policy(obs [R, obs_dim], rew [R]) -> act [R, act_dim],
    tensors on data.device, observations standardized as in the data. mask is 1 for real transitions; K = 0 means no
    context. explore asks for a sample of the belief over the task instead of its mean. rew is the previous reward, for
    policies that keep a history. Reset seeds and contexts are the same for every method and call.

    iid        context = one episode of the test task's own offline data, another one for each episode while they last
    ood        context = an episode on the test task by another training task's policy, each of these policies in turn
    ood_random context = an episode on the test task by the uniform random policy
    online     contexts = all own episodes so far: EXPLORATION_EPISODES with explore, then EXPLOITATION_EPISODES, whose
               last is reported, then MORE_EPISODES
    online_random_start  as online, without MORE_EPISODES; the first episode has uniform random actions
    zero_shot  no context at all
    train      as iid, on the first ten training tasks

    trace: a list to which each protocol's reported episodes are appended, as of `rollout`, with "context" and "mask".
    -> {"eval/iid/return": ..} as of `summary`, with returns by task, by own episode and, for ood, by thirds of the
    distance. Without a simulator: `evaluate_recorded`."""
    if not data.family.simulated:
        return evaluate_recorded(data, adapt, protocols, episodes, trace)
    results = {}
    for protocol in protocols:
        tasks = data.train_ids[:10] if protocol == "train" else data.test_ids
        row_tasks, number = tasks.repeat(episodes), np.tile(np.arange(episodes), len(tasks))  # of each row
        context, mask, distance = initial_context(data, protocol, tasks, episodes)
        if context is None:
            continue
        own = protocol in ("online", "online_random_start")  # contexts are the agent's own episodes
        env = TaskEnv(data.family, data.task_params, row_tasks)
        reported, diverged = EXPLORATION_EPISODES + EXPLOITATION_EPISODES if own else 1, 0
        for k in range(reported + MORE_EPISODES * (protocol == "online")):
            seen = context[..., : data.context_dim]
            policy = adapt(seen, mask, own and k < EXPLORATION_EPISODES)
            if protocol == "online_random_start" and k == 0:
                rng = np.random.default_rng(10_000)
                policy = lambda obs, rew: torch.as_tensor(rng.uniform(-1, 1, (len(obs), data.act_dim)))  # noqa: E731
            played = rollout(env, policy, reset_seeds(row_tasks, number, k), data.device, data.standardize)
            diverged += played["diverged"].sum()
            if k < reported:
                last = played | {"context": seen, "mask": mask}
            if own:
                results[f"eval/{protocol}/return_ep_{k + 1}"] = returns_of(data, row_tasks, played).mean()
                context = torch.cat([context, transitions(played, device=data.device)], 1)
                new = data.recorded(torch.as_tensor(played["lengths"], device=data.device))
                mask = torch.cat([mask, new.float()], 1)
        env.close()
        if trace is not None:
            trace.append(last)
        returns = returns_of(data, row_tasks, last)
        results |= summary(data, protocol, row_tasks, returns)
        if distance is not None and data.has_scale and distance.any():
            normalized = normalize(data, row_tasks, returns)
            third = np.searchsorted(np.quantile(distance, (1 / 3, 2 / 3)), distance)
            for k in np.unique(third):
                results[f"eval/ood/normalized_{('near', 'middle', 'far')[k]}"] = normalized[third == k].mean()
        of_task = returns.reshape(len(tasks), episodes).mean(1)
        results |= {f"eval/{protocol}/return_task_{i:02d}": value for i, value in zip(tasks, of_task)}
        if diverged:
            results[f"eval/{protocol}/diverged"] = diverged
    return {tag: float(value) for tag, value in results.items()}


def evaluate_recorded(data, adapt, protocols, episodes, trace):
    """`evaluate` without a simulator, by `retrace` -> {"eval/iid/action_error": ..}; no online protocols."""
    results = {}
    for protocol in protocols:
        tasks = data.train_ids[:10] if protocol == "train" else data.test_ids
        context, mask, _ = initial_context(data, protocol, tasks, episodes)
        if context is None or protocol.startswith("online"):
            continue
        seen = context[..., : data.context_dim]
        played, error = retrace(data, adapt(seen, mask, False), tasks.repeat(episodes), context)
        results[f"eval/{protocol}/action_error"] = float(error)
        if trace is not None:
            trace.append(played | {"context": seen, "mask": mask})
    return results


def retrace(data, policy, tasks, context):
    """Let a policy choose actions along each task's best recorded episode (the second best where the best is the row's
    context): tasks [R], context [R, K, ..] -> these episodes as of `rollout`, root mean square difference between
    chosen and recorded actions, per dimension. A policy with a history sees its own actions there."""
    returns = np.where(data.lengths.cpu() > 0, data.episode_returns, -np.inf)
    best = (-returns).argsort(1)[tasks]  # [R, N]
    pick = best[:, 0]
    if context.shape[1]:
        known = (data.episodes[tasks, pick] == context).flatten(1).all(1).cpu().numpy() & (data.present[tasks] > 1)
        pick = best[np.arange(len(best)), known.astype(int)]
    lengths, (obs, act, rew, next_obs, term) = data.lengths[tasks, pick], data.unpack(data.episodes[tasks, pick])
    before = torch.cat([torch.zeros_like(rew[:, :1]), rew[:, :-1]], 1)
    with torch.no_grad():
        chosen = torch.stack([policy(obs[:, t], before[:, t]) for t in range(obs.shape[1])], 1).clamp(-1, 1)
    error = (chosen - act)[data.recorded(lengths)].pow(2).mean().sqrt()
    played = {"observations": torch.cat([obs[:, :1], next_obs], 1), "actions": act, "rewards": rew}
    return played | {"lengths": lengths, "terminated": term.any(1)}, error


def initial_context(data, protocol, tasks, episodes):
    """What a protocol of `evaluate` gives before the first episode of R = len(tasks) * episodes rows -> context
    [R, K, ctx_dim + 1] (None if the data have none), mask [R, K]; for ood the distance [R] of the acting policy's task,
    else None."""
    rows, number = np.arange(len(tasks)).repeat(episodes), np.tile(np.arange(episodes), len(tasks))
    if protocol in ("ood", "ood_random"):
        wanted = (data.ood_behavior_task == RANDOM) == (protocol == "ood_random")  # [V, C]
        if not wanted.any():
            return None, None, None
        columns = np.nonzero(wanted)[1].reshape(len(tasks), -1)
        pick = columns[rows, (rows + number) % columns.shape[1]]  # a few episodes already meet near and far policies
        distance = data.ood_distance[rows, pick] if protocol == "ood" else None
        return data.ood_episodes[rows, pick], data.recorded(data.ood_lengths[rows, pick]).float(), distance
    if protocol in ("iid", "train"):
        orders = [np.random.default_rng(10_000 + task).permutation(data.present[task]) for task in tasks]
        pick, row_tasks = np.concatenate([np.resize(order, episodes) for order in orders]), tasks[rows]
        return data.episodes[row_tasks, pick], data.recorded(data.lengths[row_tasks, pick]).float(), None
    return data.episodes.new_zeros(len(rows), 0, data.ctx_dim + 1), data.episodes.new_zeros(len(rows), 0), None


def returns_of(data, tasks, played):
    """Returns [R] of `rollout`'s episodes on tasks [R]. An episode whose physics broke counts as the random policy's, if
    unknown as the worst recorded: breaking off must not pay where rewards are negative."""
    returns, worst = played["rewards"].sum(1, dtype=np.float64), data.random_returns[tasks]
    worst = np.where(np.isnan(worst), data.episode_returns.min(1)[tasks], worst)
    return np.where(played["diverged"], worst, returns)


def summary(data, name, tasks, returns):
    """Returns [R] of rows on tasks [R] -> {"eval/{name}/return": mean, "return_se": its standard error, if any,
    "normalized": mean on the tasks' own scales, if they are known}."""
    results = {f"eval/{name}/return": float(returns.mean())}
    if len(returns) > 1:
        results[f"eval/{name}/return_se"] = float(returns.std(ddof=1) / len(returns) ** 0.5)
    if data.has_scale:
        results[f"eval/{name}/normalized"] = float(normalize(data, tasks, returns).mean())
    return results


def normalize(data, tasks, returns):
    """Returns [len(tasks)] -> on each task's own scale: 0 = random policy, 100 = expert; 0 where the expert is no
    better."""
    worst, best = data.random_returns[tasks], data.expert_returns[tasks]
    return 100 * (returns - worst) / np.where(best > worst, best - worst, np.inf)


def q_error(played, value, gamma):
    """The critic's error on episodes that `evaluate` traced: Q(s_0, pi(s_0)) minus the discounted return that followed.

    value(context [R, K, context_dim], mask [R, K], obs [R, 2, obs_dim]) -> Q(s, pi(s)) [R, 2] in units of the reward.
    At a time limit the critic's value of the last state continues the return. -> {"eval/iid/value": mean
    Q(s_0, pi(s_0)), "eval/iid/q_error": mean error, "eval/iid/q_relative": divided by the size of the mean return}"""
    context, mask = played["context"], played["mask"]
    obs, rew, length, terminated = (
        torch.as_tensor(played[key], device=mask.device) for key in ("observations", "rewards", "lengths", "terminated")
    )
    last = obs[torch.arange(len(obs), device=mask.device), length.long()]
    with torch.no_grad():
        first_q, last_q = value(context, mask, torch.stack([obs[:, 0], last], 1)).unbind(1)
    discounts = gamma ** torch.arange(rew.shape[1], device=mask.device)
    monte_carlo = (discounts * rew).sum(1) + gamma**length * ~terminated * last_q
    error, size = (first_q - monte_carlo).mean().item(), abs(monte_carlo.mean().item())
    results = {"eval/iid/value": first_q.mean().item(), "eval/iid/q_error": error}
    return results | {"eval/iid/q_relative": error / max(size, 1e-8)}


def evaluate_actor_critic(data, adapt, value, gamma, protocols, episodes, bc=None):
    """`evaluate`, the critic's error on iid by `q_error` (value, gamma), and returns of behavior cloning, with iid
    contexts (bc: an adapt like the other; "eval/bc/return" ..) -> dict tag -> float. Without a simulator the critic is
    compared with the recorded episodes of `retrace`."""
    traced = []
    results = evaluate(data, adapt, protocols, episodes, traced)
    critic = q_error(traced[protocols.index("iid")], value, gamma)
    if not data.family.simulated:
        critic = {"eval/iid/value": critic["eval/iid/value"], "eval/iid/value_above_best": critic["eval/iid/q_error"]}
    results |= critic
    if bc is not None:
        alone = evaluate(data, bc, ("iid",), episodes)
        results |= {tag.replace("iid", "bc"): found for tag, found in alone.items()}
    return results


def label_contexts(data, embed, tasks=None, limit=10):
    """Embed up to `limit` episodes per task, evenly over the recorded ones: embed(context [R, K, ctx_dim],
    mask [R, K]) -> z [R, z_dim]. -> z [R, z_dim] on the CPU, task of each row (list of int)."""
    tasks = np.concatenate([data.train_ids, data.test_ids]) if tasks is None else tasks
    pairs = [(t, n) for t in tasks for n in np.unique(np.linspace(0, data.present[t] - 1, limit).round().astype(int))]
    task, episode = (torch.as_tensor([int(p[i]) for p in pairs], device=data.device) for i in (0, 1))
    mask = data.recorded(data.lengths[task, episode])
    return embed(data.episodes[task, episode][..., : data.context_dim], mask.float()).cpu(), task.tolist()


def embedding_quality(data, embed):
    """How well z tells the tasks apart, from contexts of one episode each (embed: see label_contexts).

    z/nearest_task_acc  each training task has a centroid of its even-numbered contexts: the share of odd-numbered
                        contexts nearest to their own task's
    z/probe_r2          linear regression from z to the task parameters, fitted on the training tasks: coefficient of
                        determination on the test tasks (1 = perfect, 0 = the mean)
    What `unmeasurable` names is left out."""
    z, task = label_contexts(data, embed, data.train_ids)
    z, task, odd = z.double(), torch.tensor(task), torch.arange(len(task)) % 2 == 1
    centroids = torch.stack([z[~odd & (task == t)].mean(0) for t in data.train_ids])
    nearest = torch.as_tensor(data.train_ids)[torch.cdist(z[odd], centroids).argmin(1)]
    test_z, test_task = label_contexts(data, embed, data.test_ids)
    params = torch.as_tensor(data.task_params)
    target, center, mean = params[test_task], z.mean(0), params[task].mean(0)
    # rcond: nothing is read from where z hardly varies over the training tasks, as in a dimension that is saturated
    probe = torch.linalg.lstsq(z - center, params[task] - mean, rcond=1e-3, driver="gelsd").solution
    error = ((test_z.double() - center) @ probe + mean - target).pow(2).sum()
    quality = {
        "z/nearest_task_acc": (nearest == task[odd]).double().mean().item(),
        "z/probe_r2": (1 - error / (target - params[data.train_ids].mean(0)).pow(2).sum()).item(),
    }
    return {tag: value for tag, value in quality.items() if tag not in unmeasurable(data)}


def unmeasurable(data):
    """Figures that these data do not give -> dict tag -> reason."""
    reasons, center = {}, data.task_params[data.train_ids].mean(0)
    if not data.family.simulated:
        reasons["returns"] = "there is no simulator; action_error compares with each test task's best recorded episode"
    elif not data.has_scale:
        reasons["normalized"] = "the file has no random_returns or expert_returns"
    if not data.ood_lengths.numel():
        reasons["ood"] = "the file has no foreign contexts"
    if data.min_episodes < 2:
        reasons["z/nearest_task_acc"] = "a training task has a single episode"
    if not data.family.measured or not data.task_params.any():
        reasons["z/probe_r2"] = "the tasks' parameters are unknown, names, or without effect"
    elif (data.task_params[data.test_ids] == center).all():
        reasons["z/probe_r2"] = "the test tasks do not differ from the training tasks' mean"
    return reasons


# ---- runs -------------------------------------------------------------------
#
# A script's train() reads: `resolve` the arguments, load the data, make the agent. Then, in `with Run(..) as run`:
# update for each step of `run.updates()`, `run.log` what should be seen, `run.finish` the last evaluation.

RUN_VERSION = 3  # of run directories and policies files; another version is refused
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a user or a cluster wants the program to stop
# arguments that do not shape the training: a resumed run may change them
FREE = {"total_updates", "log_every", "eval_every", "save_every", "eval_episodes", "final_episodes", "device"}
FREE |= {"resume", "eval_only", "run_dir", "dataset"}
MAY_BE_ZERO = {"seed", "num_flows", "online_ft", "ood_contexts", "world_model_updates"}  # others are positive
MAY_BE_NEGATIVE = {"alpha_min", "target_return"}


def command_line(args_class, train, doc, env_defaults=None, arguments=None):
    """Parse the command line (list of str, by default the process's own) and train -> what `train` returns. With
    --resume the arguments stored there are the defaults. env_defaults: see `resolve`."""
    words = sys.argv[1:] if arguments is None else arguments
    description = doc.split("\n\n")[0] + describe(env_defaults or {})
    parse = functools.partial(tyro.cli, args_class, description=description, args=words)
    with one_line_errors():
        if seeds := re.search(r"--seed[ =](\d+( \d+)+)", " ".join(words)):
            several = f"for s in {seeds[1]}; do python {Path(sys.argv[0]).name} .. --seed $s; done"
            raise SystemExit(f"--seed takes one number; for several: {several}")
        args = parse()
        if args.resume:
            stored = load_checkpoint(args.resume, args_class)["args"]
            args = parse(default=args_class(**stored | {"resume": args.resume}))
        return train(args)


def describe(env_defaults):
    """What --help says of the arguments whose default depends on the family."""
    base = env_defaults.get("", {})
    texts = []
    for name in sorted({name for values in env_defaults.values() for name in values}):
        others = [f"{values[name]} for {part}" for part, values in env_defaults.items() if part and name in values]
        texts.append(f"--{name.replace('_', '-')} " + ", ".join([str(base.get(name, "from the data")), *others]))
    return "\n\nDefaults that depend on the family, by a part of its name: " + "; ".join(texts) + "." if texts else ""


def resolve(args, env_defaults):
    """Fill in the arguments left at None and check the numbers -> args.

    env_defaults: {part of the family's name: {argument: value}}, later entries change earlier ones."""
    if args.eval_only and not args.resume:
        raise SystemExit("--eval-only needs --resume RUN_DIR")
    if Path(args.exp_name).name != args.exp_name:
        raise SystemExit(f"--exp-name {args.exp_name}: must be the name of one folder")
    if getattr(args, "dataset", None):
        args.dataset = str(Path(args.dataset).expanduser().absolute())  # a resumed run may start in another directory
    fill_in(args, env_defaults)
    return args


def fill_in(args, env_defaults):
    """Give the arguments left at None, in place, what `resolve` says, and check the numbers."""
    for part, values in reversed(env_defaults.items()):
        for name, value in values.items() if part in args.env.split(":")[-1] else ():
            if getattr(args, name) is None:
                setattr(args, name, value)
    for name, value in asdict(args).items():
        flag, least = f"--{name.replace('_', '-')} {value}", int(name not in MAY_BE_ZERO)
        if value == "rollout" and args.env == "offline":
            raise SystemExit(f"{flag}: --env offline has no simulator")
        if type(value) is int and not least <= value < 2**63:
            raise SystemExit(f"{flag}: must be at least {least}")
        if type(value) is float and not (0 <= value < math.inf or (name in MAY_BE_NEGATIVE and math.isfinite(value))):
            raise SystemExit(f"{flag}: must be finite and at least 0")


@contextlib.contextmanager
def one_line_errors():
    """An interruption, and faults of disk, pipe and memory, end the program with one line."""
    threading.excepthook = lambda _: None  # TensorBoard's thread meets the disk's faults too; they are reported here
    saved = "what was saved stays and can be continued"
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; {saved}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again
        raise SystemExit(f"stopped: nobody reads the output any more; {saved}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise SystemExit(f"{place}{error.strerror or error}; {saved}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise SystemExit("out of memory: choose smaller networks or batches (--width, --batch-size, see --help)")


class Signals:
    """While `may_save` is set the first signal asks for a save; any other one ends the program at once. how: text that
    tells how to go on."""

    def __init__(self, how):
        self.how, self.received, self.may_save = how, None, False

    def __enter__(self):
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.previous = {number: signal.signal(number, self.handle) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        if self.may_save and self.received is None:
            self.received = number
        else:
            self.stop(number)

    def stop(self, number):
        print(f"interrupted; {self.how}", flush=True)
        raise SystemExit(128 + number)


def atomic_save(path, write):
    """write(file) to memory, then to a temporary name, then rename: a reader never meets half a file. If the disk is
    full, the old content stays."""
    temporary, content = path.with_name(path.name + ".tmp"), io.BytesIO()
    write(content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path, content):
    atomic_save(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_saved(path, remedy):
    """The dict in a file of torch.save, on the CPU; one line with the remedy if it is damaged or of another version."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load reads damaged numbers without a word
                raise ValueError
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # zipfile and torch raise a dozen kinds on damaged bytes
        raise SystemExit(f"{path} is damaged; {remedy}") from None
    if not isinstance(saved, dict) or saved.get("version") != RUN_VERSION:
        raise SystemExit(f"{path} is not of this version of the repository; {remedy}")
    return saved


def script_name(args_class):
    """Name of the script that defines the class of its arguments, without .py."""
    return Path(getattr(sys.modules[args_class.__module__], "__file__", "notebook")).stem


def load_checkpoint(directory, args_class):
    """Checkpoint of a run directory as a dict; one line if there is none of this script."""
    path = Path(directory).expanduser() / "checkpoint.pt"
    if not path.is_file():
        what = f"no checkpoint.pt in {path.parent.resolve()}; give the run directory that training printed"
        raise SystemExit(f"--resume {directory}: {what}")
    saved = read_saved(path, "start anew without --resume")
    if saved["script"] != script_name(args_class):
        raise SystemExit(f"--resume {directory}: a run of {saved['script']}.py; give it to that script")
    if saved["args"].keys() != {field.name for field in fields(args_class)}:
        raise SystemExit(f"--resume {directory}: the script's arguments have changed; start anew without --resume")
    return saved


def lock(file):
    """Lock an open file until it is closed -> whether no other process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


def resolve_device(name):
    """auto, cpu or cuda -> torch.device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def versions():
    """{name: version} of what the results depend on: Python, packages, commit, number of threads."""
    git = ["git", "-C", str(DATASETS.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # outside a git checkout
    packages = {m.__name__: m.__version__ for m in (torch, np, gym, mujoco)}
    return packages | {"python": sys.version.split()[0], "threads": torch.get_num_threads(), "commit": commit}


def duration(seconds):
    """75 -> '1m15s'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def set_lr(opt, lr):
    """Give an optimizer the learning rate lr."""
    for group in opt.param_groups:
        group["lr"] = lr


def optimizers(agent):
    """-> {name: optimizer} of the optimizers that are attributes of the agent."""
    return {name: value for name, value in vars(agent).items() if isinstance(value, torch.optim.Optimizer)}


def training_state(agent):
    """Networks, optimizers and torch's global generators (CPU and CUDA), for a checkpoint -> dict."""
    opts = {name: opt.state_dict() for name, opt in optimizers(agent).items()}
    return {"agent": agent.state_dict(), "opts": opts, "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}


def restore_training(agent, saved, weights_only=False):
    """Take over what `training_state` gave; ValueError if it is of other networks. Weights alone may lack parts that
    only training uses, such as target networks."""
    try:
        agent.load_state_dict(agent.state_dict() | saved["agent"] if weights_only else saved["agent"])
        for name, opt in optimizers(agent).items() if not weights_only else ():
            opt.load_state_dict(saved["opts"][name])
    except (KeyError, RuntimeError, ValueError):  # what torch raises
        raise ValueError("other networks") from None
    if weights_only:
        return
    cpu, *cuda = saved["rng"]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])


def eval_line(results):
    """Returns per protocol with standard errors, normalized in brackets, and the quality of z, as one line."""
    cells = []
    for tag, value in results.items():
        name = tag.split("/")[1]
        if tag == f"eval/{name}/return":
            error = f" ± {results[f'{tag}_se']:.1f}" if f"{tag}_se" in results else ""
            scaled = f" ({results[f'eval/{name}/normalized']:.0f})" if f"eval/{name}/normalized" in results else ""
            cells.append(f"{name} {value:.1f}{error}{scaled}")
        elif tag == f"eval/{name}/action_error":
            cells.append(f"{name} action error {value:.3f}")
    if "eval/iid/value_above_best" in results:
        above = results["eval/iid/value_above_best"]
        cells.append(f"value {results['eval/iid/value']:.2f}, {above:+.2f} above the best episodes")
    diverged = sum(value for tag, value in results.items() if tag.endswith("/diverged"))
    cells += [f"{diverged:.0f} episodes diverged, counted as the random policy's"] if diverged else []
    quality = {"acc": "z/nearest_task_acc", "R2": "z/probe_r2"}
    cells += [f"z {name} {results[tag]:.2f}" for name, tag in quality.items() if tag in results]
    return "  ".join(["eval", *cells])


def advice(results):
    """Lines for a run whose policy ends more than two standard errors below behavior cloning."""
    if "eval/bc/return_se" not in results:
        return []
    policy, bc = (results[f"eval/{name}/return"] for name in ("iid", "bc"))
    error = math.hypot(results["eval/iid/return_se"], results["eval/bc/return_se"])
    if policy >= bc - 2 * error:
        return []
    note = f"note: the policy ({policy:.1f}) returns less than behavior cloning ({bc:.1f}) with iid contexts;"
    return [note, "  a smaller --reward-scale or a larger --kl-coef keeps it closer to the data"]


class Run:
    """The run directory of one training: args.json, metrics.csv, TensorBoard events, checkpoint.pt, result.json.

    phases: parts of the training, the last is "policy"; --{phase}-updates is a phase's length. agent: the module with
    all networks and, as attributes, all optimizers. generator draws the batches. free: arguments that a resumed run may
    change besides FREE."""

    def __init__(self, args, data, agent, generator, phases=("policy",), free=frozenset()):
        self.args, self.data, self.agent, self.generator = args, data, agent, generator
        self.steps, self.phase = dict.fromkeys(phases, 0), "policy"  # updates done per phase
        self.rows, self.born, self.timed = 1, time.process_time(), [0, 0.0]  # lines of metrics.csv; updates, seconds
        if args.resume:
            self.dir = Path(args.resume).expanduser()
            self.restore(load_checkpoint(self.dir, type(args)), FREE | free)
        else:
            name = f"seed{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
            self.dir = Path(args.run_dir).expanduser() / args.env.replace(":", "-") / args.exp_name / name
            self.dir.mkdir(parents=True)
        path, name = Path(sys.argv[0]), script_name(type(args))  # a program that trains many has another path
        again = ["python", str(path if path.stem == name else f"{name}.py"), "--resume", str(self.dir)]
        self.signals, self.closing = Signals(f"continue with: {shlex.join(again)}"), contextlib.ExitStack()

    def __enter__(self):
        self.closing.enter_context(self.signals)
        if not self.args.eval_only:
            self.open_files()
        return self

    def __exit__(self, *_):
        self.closing.close()

    def restore(self, saved, free):
        """Take over a checkpoint; whatever shapes the training must agree with it."""
        for name in sorted(set(saved["args"]) - free):
            if getattr(self.args, name) != saved["args"][name]:
                flag = f"--{name.replace('_', '-')} {getattr(self.args, name)}"
                raise SystemExit(f"{flag}: the run to resume has {saved['args'][name]}; drop the flag")
        if self.data.header != saved["data"]:
            raise SystemExit(f"{self.data.path} is not the file that {self.dir} was trained on; use that: --dataset")
        self.steps, self.rows, self.born = saved["steps"], saved["rows"], self.born - saved["seconds"]
        if not self.args.eval_only and "opts" not in saved:
            raise SystemExit(f"--resume {self.dir}: it holds weights only; add --eval-only")
        try:
            restore_training(self.agent, saved, weights_only=self.args.eval_only)
        except ValueError as fault:
            raise SystemExit(f"--resume {self.dir}: the checkpoint is of {fault}; start anew without --resume")
        if self.args.eval_only:
            return
        if saved["device"] == self.data.device.type:
            self.generator.set_state(saved["generator"])
        else:  # a generator's state fits its own kind of device alone
            torch.manual_seed(self.args.seed + sum(self.steps.values()))
            self.generator.manual_seed(self.args.seed + sum(self.steps.values()))
            print(f"note: the run comes from another device; on {self.data.device} it does not go on bit for bit")
        if self.steps["policy"] > self.args.total_updates:
            done = f"the run has done {self.steps['policy']}; nothing to do"
            raise SystemExit(f"--total-updates {self.args.total_updates}: {done}")

    def open_files(self):
        """args.json, TensorBoard events and metrics.csv, whose rows up to the checkpoint stay."""
        args, data = self.args, self.data
        if not lock(self.closing.enter_context(open(self.dir / "lock", "w"))):
            raise SystemExit(f"--resume {self.dir}: another process is training this run")
        stored = {k: v for k, v in asdict(args).items() if k not in ("resume", "eval_only")}
        about = {"args": stored, "script": script_name(type(args)), "versions": versions(), "command": sys.argv}
        write_json(self.dir / "args.json", about | {"dataset": data.header})
        self.writer = SummaryWriter(str(self.dir), purge_step=sum(self.steps.values()) + 1 if args.resume else None)
        self.closing.callback(self.writer.close)
        path, kept = self.dir / "metrics.csv", [b"step,tag,value\n"]
        if path.exists():
            kept = path.read_bytes().splitlines(keepends=True)[: self.rows]
        atomic_save(path, lambda file: file.writelines(kept))
        self.csv, self.rows = self.closing.enter_context(open(path, "a")), len(kept)
        tasks, *more = data.about()
        print("\n  ".join([f"{self.dir}: {args.env}, {tasks}, device {data.device}", *more]), flush=True)

    @property
    def total(self):
        """Updates that the current phase has in all."""
        return getattr(self.args, "total_updates" if self.phase == "policy" else f"{self.phase}_updates")

    @property
    def decay(self):
        """Factor on the learning rate: 1 in the first half of the phase, then falling linearly to 0."""
        return min(1.0, 2 - 2 * self.steps[self.phase] / self.total) if self.args.lr_decay else 1.0

    def updates(self, phase="policy"):
        """Yield the numbers, from 1, of the updates of a phase that are still to be done, and save in between. The
        first signal saves after the current update and ends the program."""
        self.phase, self.timed = phase, [0, 1e-9]
        if self.args.eval_only:
            return
        self.signals.may_save = True
        for step in range(self.steps[phase] + 1, self.total + 1):
            start = time.perf_counter()
            yield step
            self.steps[phase] = step
            if step % self.args.eval_every or phase != "policy":
                self.timed = [self.timed[0] + 1, self.timed[1] + time.perf_counter() - start]
            if step % self.args.save_every == 0 or step == self.total or self.signals.received:
                self.save()
            if self.signals.received:
                self.signals.stop(self.signals.received)
        self.signals.may_save = False  # all is saved: from now on a signal ends the program at once

    def log(self, step, values):
        """dict tag -> number or 0-d tensor, to metrics.csv, TensorBoard and the console; all must be finite."""
        values = {tag: float(value) for tag, value in values.items()}  # the only place where training reads the device
        self.must_be_finite(step, values)
        for tag, value in values.items():
            self.csv.write(f"{step},{tag},{value!r}\n")
        self.csv.flush()
        self.rows += len(values)
        if any(tag.startswith("eval/iid/") for tag in values):
            print("  " + eval_line(values), flush=True)
        elif any(tag.startswith("losses/") for tag in values):
            values |= {"charts/updates_per_sec": self.timed[0] / self.timed[1]}
            values |= {"charts/cpu_s": time.process_time() - self.born}
            losses = "  ".join(f"{tag[7:]} {value:.3g}" for tag, value in values.items() if tag.startswith("losses/"))
            share = f"{self.phase} {step:>7}/{self.total} {100 * step // self.total:>3}%"
            print(f"[{share}] {self.speed()}  losses: {losses}", flush=True)
        at = step + sum(done for phase, done in self.steps.items() if phase != self.phase)  # updates in all phases
        for tag, value in values.items():
            if "/return_task_" not in tag:
                self.writer.add_scalar(tag, value, at)

    def speed(self):
        """Updates per second and the time that is left, evaluations not counted, as text."""
        count, seconds = self.timed
        left = (self.total - self.steps[self.phase]) * seconds / max(count, 1)
        return f"{count / seconds:.1f} upd/s  eta {duration(left)}"

    def must_be_finite(self, step, values):
        """Stop with one line if one of the values (dict tag -> float) or a parameter is not finite."""
        broken = [f"{tag} ({value})" for tag, value in values.items() if not math.isfinite(value)]
        broken += [f"parameter {name}" for name, p in self.agent.named_parameters() if not p.isfinite().all()]
        if broken:
            good = self.dir / "checkpoint.pt"
            remedy = f"the last good state is {good}" if good.exists() else "there is no checkpoint yet"
            raise SystemExit(f"stopped at update {step}: {broken[0]} is not finite; {remedy}")

    def save(self):
        """checkpoint.pt, unless a parameter is not finite: then the last good one stays."""
        self.writer.flush()  # what a resumed run builds on is on the disk, should this one be killed
        state = training_state(self.agent) | {"generator": self.generator.get_state(), "steps": self.steps}
        state |= {"version": RUN_VERSION, "script": script_name(type(self.args)), "args": asdict(self.args)}
        state |= {"data": self.data.header, "device": self.data.device.type}
        state |= {"rows": self.rows, "seconds": time.process_time() - self.born}
        if all(p.isfinite().all() for p in self.agent.parameters()):
            atomic_save(self.dir / "checkpoint.pt", lambda file: torch.save(state, file))

    def finish(self, results):
        """Keep the last evaluation in result.json, or in eval.json with --eval-only -> the same, with run_dir, step,
        updates_per_sec and cpu_s (of all threads, resumed runs together)."""
        step = self.steps["policy"]
        if self.args.eval_only:
            self.must_be_finite(step, results)
            print(f"{self.dir} after {step} updates, in full in eval.json\n  " + eval_line(results))
            write_json(self.dir / "eval.json", {"step": step} | results)
            return results | {"run_dir": str(self.dir), "step": step}
        self.log(step, results)
        results |= {"run_dir": str(self.dir), "step": step}
        results |= {"updates_per_sec": self.timed[0] / self.timed[1], "cpu_s": time.process_time() - self.born}
        write_json(self.dir / "result.json", results)
        print(f"results: {self.dir / 'result.json'}; curves: tensorboard --logdir {self.dir}")
        for line in advice(results):
            print(line)
        return results


if __name__ == "__main__":
    sys.modules["data_collect"] = sys.modules["__main__"]  # for families in other files
    with one_line_errors():
        collect(tyro.cli(Args, description="Train behavior policies, roll them out and write a dataset file."))
