"""OmniRL: in-context reinforcement learning in random tabular worlds (AnyMDP), small enough for a laptop.

Wang et al., NeurIPS 2025, https://arxiv.org/abs/2502.02869; official code: airs-cuhk/airsoul, FutureAGI/Xenoverse.
A model reads a context, all earlier steps in one task, and names the best action. It is trained on a stream of random
tasks whose optimal actions are known. In a new task it improves by reading on; no weight changes. Shapes: B streams,
one task each; T rows of a stream; S states, A actions; K contexts of a stream, its first 0, every, 2 every, .. rows.
  rows    state, act, rew, over, tag [B, T]; the last state of an episode is a row of its own, with act = A
  tag     1 where the noisy optimal policy acted        over  1 the task ended here, 2 the time limit did
  counts  a context as sums over each pair (s, a): next states, rewards, their squares, tags
  target  [.., A] one-hot optimal action, zeros where nothing is asked
One update; the numbers are in `train` and `update`:
  1 tasks     draw B tasks; number their states and actions anew
  2 contexts  play T rows in each: noisy optimal policy, learners, uniform policy, the model itself
  3 targets   the optimal action, in every row or, for counts, in every state (step-wise supervision)
  4 model     one pass of minibatches over  - sum target . log p(act | context, state)
Two models: --memory counts, the default, is ours; --memory transformer is the paper's kind.
Differences from the paper, tagged [ours: ..] in the code:
  O1  counts: a graph network on the counts of a context (paper: RWKV-7 with 43.6 M parameters)
  O2  transformer: attention, one token per row, and heads that match states and actions, --no-matching (paper: neither)
  O3  each stream has new numbers of states and actions: --no-renumber (paper: each task has)
  O4  two tags: the noisy optimal policy, or anyone else (paper: eight); --no-tags
  O5  learners count and plan (paper: Q-learners too); the model plays in half of the streams: --own-share 0 (paper)
  O6  the loss has the policy alone, all positions weigh the same (paper: a ramp; code: a world model too)
Closest to the paper: --memory transformer --no-matching --own-share 0. No flag reaches O4, O6, the paper's sizes.
Ablations: algorithm distillation, --supervision behavior --oracle-share 0 --own-share 0; one query per context as in
  DPT, --supervision query; tasks learned by heart, --train-tasks 32 --no-renumber --memory transformer --no-matching.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data_collect as dc

FAMILY = dc.FAMILIES["any-mdp"]
LIMIT = FAMILY.horizon  # steps of an episode

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "omnirl"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization, training tasks and contexts
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model; auto takes the GPU if there is one
    total_updates: int | None = None  # updates, each with new tasks and a pass over their contexts
    log_every: int = 5  # updates between two log lines
    eval_every: int = 20  # updates between two evaluations
    save_every: int = 5  # updates between two checkpoints
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint and stop
    # tasks and evaluation
    env: Literal["any-mdp"] = "any-mdp"  # task family
    train_tasks: int | None = None  # number of training tasks; by default new ones in every update
    renumber: bool = True  # number the states and actions of every stream anew
    eval_episodes: int = 10  # own episodes per test task in an evaluation during training
    final_episodes: int | None = None  # own episodes per test task in the last evaluation, and with --eval-only
    final_plays: int = 2  # times that each test task is played in the last evaluation
    temperature: float = 0.5  # of the action distribution in own episodes
    think_every: int = 8  # own steps between two readings of the context (counts)
    # contexts
    streams: int | None = None  # streams per update (B)
    context_rows: int = 1024  # rows of a stream (T), a multiple of --every
    grow: bool = True  # in the first half of the training, four times as many streams, a quarter as long (transformer)
    every: int = 64  # rows between two contexts of a stream (counts); learners plan twice as often
    oracle_share: float = 0.5  # share of the streams that begin with episodes of the noisy optimal policy
    own_share: float = 0.5  # share of the streams in which the model acts (counts)
    own_after: int = 3  # first updates in which it does not act
    tags: bool = True  # tell the model which rows are of the noisy optimal policy
    # model
    memory: Literal["counts", "transformer"] = "counts"  # what reads the context
    supervision: Literal["optimal", "behavior", "query"] = "optimal"
    """targets: the optimal action of every step, the action taken, or the optimal action of one step per stream"""
    width: int | None = None  # hidden units of the model
    depth: int | None = None  # rounds of messages (counts) or layers (transformer)
    heads: int = 8  # attention heads (transformer)
    matching: bool = True  # heads that find equal states and actions (transformer)
    batch_size: int | None = None  # contexts (counts) or streams (transformer) per gradient step
    lr: float = 2e-3  # learning rate
    warmup: int = 3  # first updates, in which the learning rate rises
    lr_decay: bool = True  # let the learning rate fall linearly to 0 in the second half of the training
    weight_decay: float = 0.01  # weight decay
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm


DEFAULTS = {  # for arguments left at None
    "counts": dict(total_updates=40, streams=128, width=32, depth=8, batch_size=64, final_episodes=50),
    "transformer": dict(total_updates=200, streams=32, width=64, depth=3, batch_size=4, final_episodes=20),
}


def stage(args, step):
    """-> arguments of an update: short streams teach a transformer faster, long ones what it meets at test."""
    if args.memory == "counts" or not args.grow or 2 * step > args.total_updates:
        return args
    return replace(args, streams=4 * args.streams, batch_size=4 * args.batch_size, context_rows=args.context_rows // 4)



# ---- tasks and streams ------------------------------------------------------


class Tasks:
    """Training and test tasks; stands where other scripts have a dataset."""

    def __init__(self, args):
        self.header, self.path, self.device = {"env": args.env}, None, dc.resolve_device(args.device)
        self.test, self.test_ids = FAMILY.tables, FAMILY.draw()[2]
        self.fixed, self.args = None, args
        if args.train_tasks:
            self.fixed = FAMILY.draw_tasks(args.train_tasks, np.random.default_rng([args.seed, 0]))

    def about(self):
        """-> list of lines for the head of a run's output."""
        steps = range(1, self.args.total_updates + 1)
        count = self.args.train_tasks or sum(stage(self.args, step).streams for step in steps)
        return [f"{count} training and {len(self.test_ids)} test tasks", "normalized: uniform policy 0, optimal 100"]

    def draw(self, streams, rng):
        """-> tasks of an update, numbers of its streams' tasks [B]."""
        if self.fixed is None:
            return FAMILY.draw_tasks(streams, rng), np.arange(streams)
        return self.fixed, rng.integers(self.args.train_tasks, size=streams)


class Worlds:
    """The tasks of B streams as one sees them: states and actions have random numbers, or the task's own. [ours: O3]"""

    def __init__(self, tasks, ids, rng, renumber=True):
        (states, actions), rows = tasks.transitions.shape[1:3], np.arange(len(ids))[:, None]
        order = rng.permuted(np.tile(np.arange(states), (len(ids), 1)), axis=1)  # state behind each number [B, S]
        acts = rng.permuted(np.tile(np.arange(actions), (len(ids), 1)), axis=1)  # action behind each number [B, A]
        if not renumber:
            order, acts = tasks.names[ids].argsort(1), np.tile(np.arange(actions), (len(ids), 1))
        ids = np.asarray(ids)[:, None]
        table = ids[..., None, None], order[:, :, None, None], acts[:, None, :, None], order[:, None, None, :]
        self.chances = tasks.transitions[table].cumsum(-1)  # [B, S, A, S]
        self.rewards, self.noise = tasks.rewards[table], tasks.noise[table]
        self.start, self.ends = tasks.start[ids, order].cumsum(-1), tasks.ends[ids, order]  # [B, S]
        self.optimal = acts.argsort(1)[rows, tasks.policy[ids, order]]  # [B, S]


class Rows(NamedTuple):
    """Steps of B streams. state and over have one more row, for the next step."""

    state: np.ndarray  # [B, T + 1]
    over: np.ndarray  # [B, T + 1] 0 = the episode goes on, 1 = the task ended it here, 2 = the time limit did
    act: np.ndarray  # [B, T]; A in the last row of an episode, where nobody acts
    rew: np.ndarray  # [B, T]
    tag: np.ndarray  # [B, T] 1 = the noisy optimal policy acted [ours: O4]


def draw(cumulative, rng):
    """cumulative probabilities [B, N] -> one draw of each row [B]."""
    return (rng.random((len(cumulative), 1)) >= cumulative).sum(1).clip(max=cumulative.shape[1] - 1)


def roll_out(worlds, policy, steps, rng, episodes=math.inf):
    """Play on and on -> Rows; stop early when every stream has `episodes` episodes. policy(rows, t) -> actions [B] and
    tags [B]; it reads the rows before t, and state and over of row t."""
    size, actions, b = len(worlds.ends), worlds.chances.shape[2], np.arange(len(worlds.ends))
    state, over, tag = (np.zeros((size, steps + extra), int) for extra in (1, 1, 0))
    rows = Rows(state, over, np.full((size, steps), actions), np.zeros((size, steps), np.float32), tag)
    state[:, 0], clock = draw(worlds.start, rng), np.zeros(size, int)
    for t in range(steps):
        s, acted = state[:, t], over[:, t] == 0
        act, rows.tag[:, t] = policy(rows, t)
        after = draw(worlds.chances[b, s, act], rng)
        rew = worlds.rewards[b, s, act, after] + worlds.noise[b, s, act, after] * rng.standard_normal(size)
        rows.act[:, t], rows.rew[:, t] = np.where(acted, act, actions), acted * rew
        clock = np.where(acted, clock + 1, 0)
        over[:, t + 1] = acted * np.where(worlds.ends[b, after], 1, 2 * (clock >= LIMIT))
        state[:, t + 1] = np.where(acted, after, draw(worlds.start, rng))  # after the last row a new episode begins
        if t % LIMIT == 0 and ((rows.act[:, : t + 1] == actions).sum(1) >= episodes).all():
            break
    return rows


# ---- counts of a context ----------------------------------------------------


class Counts(NamedTuple):
    """What contexts say of each pair of state and action; sums of contexts are sums of counts."""

    moves: torch.Tensor  # [B, S, A, S] how often it led to each state
    rew: torch.Tensor  # [B, S, A] sum of rewards
    rew2: torch.Tensor  # [B, S, A] sum of squared rewards
    tag: torch.Tensor  # [B, S, A] how often the noisy optimal policy took it
    ends: torch.Tensor  # [B, S] how often the task ended in a state

    def plus(self, other):
        return Counts(*(x + y for x, y in zip(self, other)))


def count(rows, first, last, states, actions):
    """Counts of rows first <= t < last, including where row last - 1 led to."""
    b, t = np.nonzero(rows.act[:, first:last] < actions)
    t, size = t + first, len(rows.act)
    pair, after = (b * states + rows.state[b, t]) * actions + rows.act[b, t], rows.state[b, t + 1]

    def total(index, values, *shape):
        sums = np.bincount(index, values, size * math.prod(shape)).astype(np.float32)
        return torch.from_numpy(sums.reshape(size, *shape))

    rew = rows.rew[b, t]
    moves = total(pair * states + after, None, states, actions, states)
    by_pair = [total(pair, values, states, actions) for values in (rew, rew**2, rows.tag[b, t])]
    return Counts(moves, *by_pair, total(b * states + after, rows.over[b, t + 1] == 1, states))


def nothing(size, states, actions):
    """Counts of empty contexts."""
    pairs = size, states, actions
    return Counts(torch.zeros(*pairs, states), *(torch.zeros(pairs) for _ in range(3)), torch.zeros(size, states))


def plan(counts, value, gamma, bonus, sweeps=30):
    """Value iteration in the counted model, with a bonus for pairs that were seldom tried: value [B, S] to begin with,
    gamma and bonus [B] -> q [B, S, A], value. An untried pair is thought to stay where it is."""
    tried = counts.moves.sum(-1)
    total = tried.sum((1, 2)).clamp(min=1)
    std = (counts.rew2.sum((1, 2)) / total - (counts.rew.sum((1, 2)) / total) ** 2).clamp(min=0).sqrt()
    rew = counts.rew / tried.clamp(min=1) + (bonus * std)[:, None, None] / tried.clamp(min=0.25).sqrt()
    moves = counts.moves / tried.clamp(min=1)[..., None]
    known = (tried.sum(-1) > 0).float()  # nothing comes after a state that was never left
    for _ in range(sweeps):
        after = torch.einsum("bsat,bt->bsa", moves, value)
        q = rew + gamma[:, None, None] * torch.where(tried > 0, after, value[..., None])
        value = q.amax(-1) * known
    return q, value


# ---- contexts: who acts -----------------------------------------------------


class Behavior:
    """The policies of the training streams. The noisy optimal policy plays no, the first one to four, or all episodes;
    then the model, a uniform policy, or a learner acts, whose random actions become fewer. [ours: O5]"""

    def __init__(self, worlds, agent, args, rng, own):
        size, (states, actions) = len(worlds.ends), worlds.chances.shape[1:3]
        self.worlds, self.agent, self.args, self.rng, self.b = worlds, agent, args, rng, np.arange(size)
        kind, few = rng.random(size), rng.integers(1, 5, size)
        self.oracle_episodes = np.where(kind < 0.7 * args.oracle_share, few, 10**6) * (kind < args.oracle_share)
        self.skill = rng.random(size)  # of the noisy optimal policy, new in every episode
        self.own, uniform = rng.random(size) < own, rng.random(size) < 0.15
        self.noise = np.where(uniform, 1.0, rng.random(size))
        self.decay = np.where(uniform, np.inf, rng.uniform(0.2, 1.5, size) * args.context_rows)  # [rows]
        self.temperature = torch.as_tensor(rng.choice([0.5, 1.0], size)).float()[:, None, None]  # of the model
        self.gamma = torch.as_tensor(rng.choice([0.8, 0.9, 0.95, 0.99], size)).float()
        self.bonus = torch.as_tensor(rng.exponential(0.5, size) * (rng.random(size) < 0.8)).float()
        self.episode, self.value = np.zeros(size, int), torch.zeros(size, states)
        self.q, self.probs = rng.random((size, states, actions)), np.full((size, states, actions), 1 / actions)
        self.counts = nothing(size, states, actions)

    def __call__(self, rows, t):
        every, (states, actions) = self.args.every // 2, self.q.shape[1:]
        if t and t % every == 0:  # think again
            self.counts = self.counts.plus(count(rows, t - every, t, states, actions))
            noise = torch.as_tensor(1e-4 * self.rng.random(self.q.shape))
            q, self.value = plan(self.counts, self.value, self.gamma, self.bonus)
            self.q = (q + noise).numpy()
            if self.own.any():
                self.probs[self.own] = self.agent.probs(self.counts, self.own, self.temperature)
        if t:
            new = rows.act[:, t - 1] == actions
            self.episode += new
            self.skill = np.where(new, self.rng.random(len(new)), self.skill)
        s, oracle = rows.state[:, t], self.episode < self.oracle_episodes
        own = draw(self.probs[self.b, s].cumsum(-1), self.rng)
        act = np.where(self.own, own, self.q[self.b, s].argmax(-1))
        noise = np.where(self.own, 0.0, self.noise * (1 - t / self.decay).clip(0))
        act = np.where(oracle, self.worlds.optimal[self.b, s], act)
        random = self.rng.random(len(s)) < np.where(oracle, 1 - self.skill, noise)
        return np.where(random, self.rng.integers(actions, size=len(s)), act), oracle


class Tokens(NamedTuple):
    """What one knows when one acts in row t: the state, and what the row before brought."""

    state: torch.Tensor  # [B, T]
    over: torch.Tensor  # [B, T] whether this state ends the episode
    before: torch.Tensor  # [B, T] the state before; act, rew, tag are of its row
    act: torch.Tensor  # [B, T] A after the last row of an episode, A + 1 in the first row of all
    rew: torch.Tensor  # [B, T]
    tag: torch.Tensor  # [B, T]


def tokens_of(rows, first, last):
    """Rows first <= t < last, only what is known before acting -> Tokens."""
    t = np.arange(first, last)
    earlier = lambda x, none: np.where(t > 0, x[:, t - 1], np.asarray(none, x.dtype))  # noqa: E731
    before, act = earlier(rows.state, 0), earlier(rows.act, FAMILY.actions + 1)
    parts = rows.state[:, t], rows.over[:, t], before, act, earlier(rows.rew, 0), earlier(rows.tag, 0)
    return Tokens(*map(torch.as_tensor, parts))


def contexts_of_tokens(rows, worlds, args, rng):
    """-> Tokens [B, T], targets [B, T, A], 0 where nobody acts."""
    b, actions = np.arange(len(rows.act))[:, None], worlds.chances.shape[2]
    acted = rows.act < actions
    wanted = rows.act if args.supervision == "behavior" else worlds.optimal[b, rows.state[:, :-1]]
    if args.supervision == "query":
        asked = (rng.random(rows.act.shape) * acted).argmax(1)
        acted = np.arange(args.context_rows) == asked[:, None]
    target = np.eye(actions, dtype=np.float32)[np.where(acted, wanted, 0)] * acted[..., None]
    return tokens_of(rows, 0, args.context_rows), torch.as_tensor(target)


def contexts_of_counts(rows, worlds, args, rng):
    """The first 0, every, 2 every, .. rows of each stream -> Counts [K B, ..], targets [K B, S, A]."""
    size, states, actions = worlds.chances.shape[:3]
    counts, contexts, taken = nothing(size, states, actions), [], []
    for first in range(0, args.context_rows, args.every):
        new = count(rows, first, first + args.every, states, actions)
        contexts.append(counts)
        taken.append(new.moves.sum(-1))
        counts = counts.plus(new)
    target = torch.as_tensor(np.eye(actions, dtype=np.float32)[worlds.optimal] * ~worlds.ends[..., None])
    target = target.repeat(len(contexts), 1, 1)
    if args.supervision == "behavior":  # what was done next, in the states that came next
        target = torch.cat(taken)
    elif args.supervision == "query":  # one context and one state of each stream
        row, state = rng.integers(len(contexts), size=size), (rng.random((size, states)) - worlds.ends).argmax(1)
        asked = torch.zeros(len(contexts), size, states, 1)
        asked[row, np.arange(size), state] = 1
        target = target * asked.flatten(0, 1)
    return Counts(*(torch.cat(x) for x in zip(*contexts))), target


# ---- models -----------------------------------------------------------------


def mlp(*sizes):
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.GELU(), nn.Linear(sizes[1], sizes[2]))


def scales(x):
    """Rewards differ in scale from task to task: x [..] -> four readings of it [.., 4]."""
    return torch.stack([torch.asinh(x), torch.tanh(x), torch.asinh(10 * x) / 3, torch.asinh(x / 10)], -1)


class CountNet(nn.Module):
    """A graph network on counts. States and pairs have features. [ours: O1] In every round a pair hears from the states
    that it led to, then a state from its pairs, as in value iteration. All states and actions share the weights."""

    def __init__(self, width, rounds):
        super().__init__()
        self.pair, self.place = mlp(12, 2 * width, width), nn.Linear(3, width)
        layers = lambda: nn.Sequential(nn.LayerNorm(3 * width), mlp(3 * width, 2 * width, width))  # noqa: E731
        self.to_pairs = nn.ModuleList([layers() for _ in range(rounds)])
        self.to_states = nn.ModuleList([layers() for _ in range(rounds - 1)])  # the last round ends at the pairs
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, counts):
        """-> logits of the actions in all states [B, S, A]."""
        tried, ends = counts.moves.sum(-1), counts.ends
        n, total = tried.clamp(min=1), tried.sum((1, 2), keepdim=True).clamp(min=1)
        mean = counts.rew / n
        all_mean = counts.rew.sum((1, 2), keepdim=True) / total
        all_std = (counts.rew2.sum((1, 2), keepdim=True) / total - all_mean**2).clamp(min=1e-6).sqrt()
        relative = (mean - all_mean) / all_std * (tried > 0)
        std = (counts.rew2 / n - mean**2).clamp(min=0).sqrt()
        # how often a pair was tried, by whom; its reward, against all rewards and as it is; how sure all that is
        features = [torch.log1p(tried), (tried + 1).rsqrt(), (tried > 0).float()]
        features += [torch.log1p(counts.tag), counts.tag / n]
        features += [torch.asinh(relative), torch.tanh(relative), torch.asinh(mean), torch.asinh(10 * mean) / 3]
        features += [torch.asinh(std), all_std.log().expand_as(n) / 3, torch.log1p(total).expand_as(n) / 5]
        pairs = self.pair(torch.stack(features, -1))  # [B, S, A, W]
        visits = [ends.clamp(max=1), torch.log1p(tried.sum(-1)), torch.log1p(counts.moves.sum((1, 2)))]
        states = self.place(torch.stack(visits, -1))  # [B, S, W]
        moves = (counts.moves / n[..., None]).flatten(1, 2)  # [B, S A, S]
        for i, to_pairs in enumerate(self.to_pairs):
            if i > 0:
                heard = torch.cat([states, pairs.amax(2), pairs.mean(2)], -1)
                states = states + self.to_states[i - 1](heard)
            after = (moves @ states).view_as(pairs)
            pairs = pairs + to_pairs(torch.cat([pairs, after, states[:, :, None].expand_as(pairs)], -1))
        return self.head(pairs)[..., 0]


class Block(nn.Module):
    """Causal attention and a feed-forward layer. With matching, queries and keys also hold one-hot states and actions,
    times learned numbers: from the first update on head i < A looks up what action i once led to in my state.
    [ours: O2]"""

    def __init__(self, width, heads, matching):
        super().__init__()
        size, states, actions = width // heads, FAMILY.states, FAMILY.actions
        self.heads, self.matching, self.size = heads, matching, size + matching * (states + actions + 2)
        self.norm, self.query_key = nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False)
        self.values = nn.Linear(width, heads * self.size, bias=False)
        self.out = nn.Linear(heads * self.size, width)
        self.feed = nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width, width))
        if matching:
            query, key, act = torch.zeros(heads, 2), torch.zeros(heads, 2), torch.zeros(heads, actions + 2)
            for i in range(min(heads, actions + 2)):  # head A: what came after my state; head A + 1: when I was there
                query[i, 0] = key[i, int(i == actions + 1)] = 8**0.5
                act[i, actions + 1] = 7.0  # the first row, for those that find nothing
                if i < actions:
                    act[i, i], act[i, actions + 1] = 8.0, 15.0
            self.query_state, self.key_state, self.query_act = map(nn.Parameter, (query, key, act))
            with torch.no_grad():
                self.query_key.weight *= 0.3

    def forward(self, x, seen, did, cache=None, t=0):
        """x [B, T, W]; seen [B, T, 2, S] one-hot of a row's state and of the state before it; did [B, T, A + 2] one-hot
        of the action between them. With a cache (keys, values) of earlier rows, row t alone is computed."""
        y = self.norm(x)
        query, key = self.query_key(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, size]
        value = self.values(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = query / math.sqrt(query.shape[-1])
        if self.matching:
            states = torch.einsum("btis,hi->bhts", seen, self.query_state)
            query = torch.cat([query, states, self.query_act[None, :, None].expand(*states.shape[:3], -1)], -1)
            states = torch.einsum("btis,hi->bhts", seen.flip(2), self.key_state)
            key = torch.cat([key, states, did[:, None].expand(*states.shape[:3], -1)], -1)
        if cache is not None:
            cache[0][:, :, t], cache[1][:, :, t] = key[:, :, 0], value[:, :, 0]
            key, value = (x[:, :, : t + 1] for x in cache)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None, scale=1.0)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Transformer(nn.Module):
    """The paper's kind of model, one token per row. Without matching, states are embedded by their numbers."""

    def __init__(self, width, layers, heads, matching):
        super().__init__()
        self.matching = matching
        self.names = nn.Embedding(2 * FAMILY.states, width) if not matching else None  # of a state, of the one before
        self.act, self.over = nn.Embedding(FAMILY.actions + 2, width), nn.Embedding(3, width)
        self.tag = nn.Embedding(2, width)
        self.rew, self.mix = nn.Linear(4, width), nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width, width))
        self.blocks = nn.ModuleList([Block(width, heads, matching) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FAMILY.actions))
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.5)

    def forward(self, tokens, caches=None, t=0):
        """tokens: Tokens [B, T], or [B, 1] of row t with the caches of earlier rows -> logits [B, T, A]."""
        x = self.act(tokens.act) + self.rew(scales(tokens.rew)) + self.over(tokens.over) + self.tag(tokens.tag)
        if not self.matching:
            x = x + self.names(tokens.state) + self.names(tokens.before + FAMILY.states)
        x = x + self.mix(x)
        first = (tokens.act == FAMILY.actions + 1)[..., None]  # nothing came before it
        states = torch.stack([tokens.state, tokens.before], -1)
        seen = F.one_hot(states, FAMILY.states).float()
        seen = seen * torch.cat([torch.ones_like(first), ~first], -1)[..., None]
        did = F.one_hot(tokens.act, FAMILY.actions + 2).float()
        for i, block in enumerate(self.blocks):
            x = block(x, seen, did, caches and caches[i], t)
        return self.head(x)

    def empty_caches(self, size, rows, device):
        return [torch.zeros(2, size, b.heads, rows, b.size, device=device) for b in self.blocks]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """The model and its optimizer."""

    def __init__(self, args):
        super().__init__()
        if args.memory == "counts":
            self.model = CountNet(args.width, args.depth)
        else:
            self.model = Transformer(args.width, args.depth, args.heads, args.matching)
        self.opt = torch.optim.AdamW(self.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)

    @torch.no_grad()
    def probs(self, counts, streams, temperature):
        """Of the actions in all states of the chosen streams -> [.., S, A]."""
        device = next(self.parameters()).device
        logits = self.model(Counts(*(x[streams].to(device) for x in counts))).cpu()
        return (logits / temperature[streams]).softmax(-1).numpy()


def cross_entropy(logits, target):
    """logits, target [.., A]; a target of zeros does not count -> 0-d mean, sums over the actions [..]. [ours: O6]"""
    rows = -(target * logits.log_softmax(-1)).sum(-1)
    return rows.sum() / target.sum().clamp(min=1), rows


# ---- update -----------------------------------------------------------------


def update(agent, context, target, args, generator):
    """A pass over all contexts. context: Counts or Tokens [N, ..], target [N, .., A], both on the CPU -> dict of
    detached 0-d tensors."""
    device = next(agent.parameters()).device
    losses, hits, asked = sums = torch.zeros(3, *target.shape[:2])
    for batch in torch.randperm(len(target), generator=generator).split(args.batch_size):
        # 4 model
        logits = agent.model(type(context)(*(x[batch].to(device) for x in context)))
        wanted = target[batch].to(device)
        loss, rows = cross_entropy(logits, wanted)
        agent.opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        agent.opt.step()

        # metrics
        losses[batch], asked[batch] = rows.detach().cpu(), wanted.sum(-1).cpu()
        hits[batch] = wanted.gather(-1, logits.argmax(-1, keepdim=True))[..., 0].cpu()
    metrics = {"losses/cross_entropy": losses.sum() / asked.sum(), "stats/accuracy": hits.sum() / asked.sum()}
    if args.memory == "transformer":
        sums = sums.transpose(1, 2)  # rows first
    sums = sums.reshape(3, args.context_rows // args.every, -1).sum(-1)  # by length of the context
    by_length = enumerate(sums[0] / sums[2].clamp(min=1))
    return metrics | {f"context/cross_entropy_{k * args.every:04d}": value for k, value in by_length}


# ---- own episodes -----------------------------------------------------------


class CountReader:
    """The graph network acts on the counts of all rows so far."""

    def __init__(self, agent, size, states, actions, args, rng):
        self.agent, self.every, self.rng, self.b = agent, args.think_every, rng, np.arange(size)
        self.counts, self.temperature = nothing(size, states, actions), torch.full((size, 1, 1), args.temperature)

    def __call__(self, rows, t):
        states, actions = self.counts.rew.shape[1:]
        if t % self.every == 0:
            self.counts = self.counts.plus(count(rows, max(0, t - self.every), t, states, actions))
            self.probs = self.agent.probs(self.counts, self.b, self.temperature)
        return draw(self.probs[self.b, rows.state[:, t]].cumsum(-1), self.rng), 0


class SequenceReader:
    """The transformer acts on all rows so far; it keeps their keys and values."""

    def __init__(self, agent, size, steps, args, rng):
        self.model, self.temperature, self.rng = agent.model, args.temperature, rng
        self.device = next(agent.parameters()).device
        self.caches = self.model.empty_caches(size, steps, self.device)

    @torch.no_grad()
    def __call__(self, rows, t):
        tokens = Tokens(*(x.to(self.device) for x in tokens_of(rows, t, t + 1)))
        probs = (self.model(tokens, self.caches, t)[:, 0] / self.temperature).softmax(-1)
        return draw(probs.cpu().numpy().cumsum(-1), self.rng), 0


def normalized_returns(rows, tasks, ids, episodes):
    """-> [B, episodes]: 0 = the uniform policy's mean return, 100 = the optimal policy's."""
    number = (rows.act == FAMILY.actions).cumsum(1).clip(max=episodes)  # of a row's episode; the last row earns nothing
    number += (episodes + 1) * np.arange(len(ids))[:, None]
    returns = np.bincount(number.ravel(), rows.rew.ravel(), (episodes + 1) * len(ids)).reshape(len(ids), -1)
    return returns[:, :episodes] - tasks.uniform[ids][:, None]


def own_episodes(agent, tasks, ids, episodes, plays, args, name):
    """Episodes of the model from an empty context, `plays` times in each task -> dict: mean and standard error over
    tasks of single episodes and, "normalized", of the last ten together."""
    rng = np.random.default_rng(11)  # evaluation leaves training's draws alone
    row_ids = np.repeat(ids, plays)
    worlds = Worlds(tasks, row_ids, rng, args.renumber)
    steps = episodes * (LIMIT + 1)
    if args.memory == "counts":
        policy = CountReader(agent, *worlds.chances.shape[:3], args, rng)
    else:
        policy = SequenceReader(agent, len(row_ids), steps, args, rng)
    rows = roll_out(worlds, policy, steps, rng, episodes)
    returns = normalized_returns(rows, tasks, row_ids, episodes).reshape(len(ids), plays, episodes).mean(1)
    returns = np.concatenate([returns, returns[:, -10:].mean(1, keepdims=True)], 1)
    mean, error = returns.mean(0), returns.std(0, ddof=1) / len(ids) ** 0.5
    shown = [k for k in (1, 2, 3, 5, 10, 20, 50, 100) if k <= episodes]
    cells = [f"{k}: {mean[k - 1]:.0f} ± {error[k - 1]:.0f}" for k in shown]
    cells += [f"last ten: {mean[-1]:.0f} ± {error[-1]:.0f}"]
    print(f"  {name}, own episode {'  '.join(cells)}", flush=True)
    results = {f"eval/{name}/normalized_ep_{k + 1}": float(mean[k]) for k in range(episodes)}
    results |= {f"eval/{name}/normalized_se_ep_{k}": float(error[k - 1]) for k in shown}
    results |= {f"eval/{name}/normalized": float(mean[-1]), f"eval/{name}/normalized_se": float(error[-1])}
    return results | {f"eval/{name}/return": float(mean[-1] + tasks.uniform[ids].mean())}


def evaluate_all(agent, data, args, episodes, plays):
    """Own episodes in the unseen test tasks and, of fixed training tasks, in those -> dict tag -> float."""
    results = own_episodes(agent, data.test, data.test_ids, episodes, plays, args, "own")
    if data.fixed is not None:
        seen = np.resize(np.arange(args.train_tasks), len(data.test_ids))
        results |= own_episodes(agent, data.fixed, seen, episodes, plays, args, "seen")
    return results


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    for name, value in DEFAULTS[args.memory].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args = dc.resolve(args, {})
    if stage(args, 1).context_rows % args.every:
        raise SystemExit(f"--context-rows {args.context_rows}: must be a multiple of --every {args.every}")
    data = Tasks(args)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    agent = Agent(args).to(data.device)
    free = {"final_plays", "temperature", "think_every"}
    with dc.Run(args, data, agent, generator, free=free) as run:
        for step in run.updates():
            now = stage(args, step)
            rng = np.random.default_rng([args.seed, step])  # so a resumed run draws the same
            # 1 tasks
            tasks, ids = data.draw(now.streams, rng)
            worlds = Worlds(tasks, ids, rng, args.renumber)
            # 2 contexts
            own = args.own_share if step > args.own_after and args.memory == "counts" else 0.0
            behavior = Behavior(worlds, agent, now, rng, own)
            rows = roll_out(worlds, behavior, now.context_rows, rng)
            if not args.tags:
                rows.tag[:] = 0
            # 3 targets
            make = contexts_of_counts if args.memory == "counts" else contexts_of_tokens
            context, target = make(rows, worlds, now, rng)
            dc.set_lr(agent.opt, args.lr * run.decay * min(1, step / args.warmup))
            metrics = update(agent, context, target, now, generator)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, args.eval_episodes, 1))
        return run.finish(evaluate_all(agent, data, args, args.final_episodes, args.final_plays))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
