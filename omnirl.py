"""OmniRL: in-context reinforcement learning in random tabular worlds (AnyMDP), small enough for a laptop.

Wang et al., NeurIPS 2025, https://arxiv.org/abs/2502.02869; official code: airs-cuhk/airsoul, FutureAGI/Xenoverse.
A model reads a context, all earlier steps in one task, and names the best action. It is trained on a stream of random
tasks whose optimal actions are known. In a new task it improves by reading on; no weight changes. Shapes: B streams,
one task each; T steps of a stream; S states, A actions; K contexts of a stream, its first 0, 64, 128, .. steps.
  rows    what one knows before each step: the state, and how one came there [B, T + 1]
  counts  a context as sums over each pair (s, a): next states, rewards, their squares, tags
  target  [.., A] one-hot optimal action, zeros where nothing is asked
One update; the numbers are in `train` and `update`:
  1 tasks     draw B tasks; number their states and actions anew
  2 contexts  play T steps in each: noisy optimal policy, learners, uniform policy, the model itself
  3 targets   the optimal action, in every step or, for counts, in every state (step-wise supervision)
  4 model     one pass of minibatches over  - sum target . log p(act | context, state)
Differences from the paper, tagged [ours: ..] in the code:
  O1  --memory counts, the default: a graph network on the counts of a context (paper: RWKV-7 with 43.6 M parameters)
  O2  --memory transformer: attention, a token per step, heads that match states and actions: --no-matching (paper)
  O3  each stream has new numbers of states and actions: --no-renumber (paper: each task has)
  O4  two tags: the noisy optimal policy, or anyone else (paper: eight); --no-tags
  O5  learners count and plan (paper: Q-learners too); the model plays in half of the streams: --own-share 0 (paper)
  O6  the loss has the policy alone, all positions weigh the same (paper: a ramp; code: a world model too)
  O7  a transformer's streams are short first, then long: --no-grow (paper: one length)
Closest to the paper: --memory transformer --no-matching --no-grow. No flag reaches O4, O6, the paper's sizes.
Algorithm distillation: --supervision behavior --oracle-share 0 --own-share 0. DPT: --supervision query.
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
HEADER = {"env": "any-mdp", "settings": {"quality": "drawn"}}  # stands where others have that of a dataset
EVERY = 64  # steps between two contexts of a stream (counts); learners plan twice as often

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
    final_episodes: int | None = None  # own episodes per test task in the last evaluation, and with --eval-only
    final_plays: int = 2  # times that each test task is played in the last evaluation
    temperature: float | None = None  # of the action distribution in own episodes
    think_every: int = 8  # own steps between two readings of the context (counts)
    # contexts
    streams: int | None = None  # streams per update (B)
    context_rows: int = 1024  # steps of a stream (T), a multiple of 64
    grow: bool = True  # in the first half of the training, four times as many streams, a quarter as long (transformer)
    oracle_share: float = 0.5  # share of the streams that begin with episodes of the noisy optimal policy
    own_share: float = 0.5  # share of the streams in which the model acts (counts)
    tags: bool = True  # tell the model which rows are of the noisy optimal policy
    # model
    memory: Literal["counts", "transformer"] = "counts"  # what reads the context
    supervision: Literal["optimal", "behavior", "query"] = "optimal"
    """targets: the optimal action of every step, the action taken, or the optimal action of one step per stream"""
    width: int | None = None  # hidden units of the model
    depth: int | None = None  # rounds of messages (counts) or layers (transformer)
    matching: bool = True  # heads that find equal states and actions (transformer)
    batch_size: int | None = None  # contexts (counts) or streams (transformer) per gradient step
    lr: float = 2e-3  # learning rate
    warmup: int = 3  # first updates, in which the learning rate rises and the model does not act
    lr_decay: bool = True  # let the learning rate fall linearly to 0 in the second half of the training


DEFAULTS = {  # for arguments left at None
    "counts": dict(total_updates=40, streams=128, width=32, depth=8, batch_size=64),
    "transformer": dict(total_updates=200, streams=32, width=64, depth=3, batch_size=4),
}
DEFAULTS["counts"] |= dict(final_episodes=50, temperature=0.3)
DEFAULTS["transformer"] |= dict(final_episodes=20, temperature=0.5)


def stage(args, step):
    """-> arguments of an update: short streams teach faster, long ones what a transformer meets at test. [ours: O7]"""
    if args.memory == "counts" or not args.grow or 2 * step > args.total_updates:
        return args
    return replace(args, streams=4 * args.streams, batch_size=4 * args.batch_size, context_rows=args.context_rows // 4)


# ---- tasks and streams ------------------------------------------------------


class Tasks:
    """Training and test tasks; stands where other scripts have a dataset."""

    def __init__(self, args):
        self.header, self.path, self.device = HEADER, None, dc.resolve_device(args.device)
        self.test, self.test_ids = FAMILY.tables, FAMILY.draw()[2]
        self.fixed, self.args = None, args
        if args.train_tasks:
            self.fixed = FAMILY.draw_tasks(args.train_tasks, np.random.default_rng([args.seed, 0]))

    def about(self):
        """-> list of lines for the head of a run's output."""
        count = self.args.train_tasks or "a stream of"
        return [f"{count} training tasks, {len(self.test_ids)} test tasks", "normalized: uniform policy 0, optimal 100"]

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
    """What one knows before each step of B streams: the state, and the step that led to it. All are [B, T + 1]."""

    state: np.ndarray
    over: np.ndarray  # 0 = the episode goes on, 1 = the task ended it here, 2 = the time limit did
    before: np.ndarray  # state of the last step; S in the first row
    act: np.ndarray  # its action; A where a new episode begins, A + 1 in the first row
    rew: np.ndarray  # its reward
    tag: np.ndarray  # 1 = the noisy optimal policy acted [ours: O4]

    def tensors(self, first, last):
        """Rows first <= t < last as tensors."""
        return Rows(*(torch.as_tensor(x[:, first:last]) for x in self))


def draw(cumulative, rng):
    """cumulative probabilities [B, N] -> one draw of each row [B]."""
    return (rng.random((len(cumulative), 1)) >= cumulative).sum(1).clip(max=cumulative.shape[1] - 1)


def roll_out(worlds, policy, steps, rng):
    """Play one episode after the other -> Rows. policy(rows, t) -> actions [B], tags [B]; it reads rows 0 to t."""
    size, states, actions = worlds.chances.shape[:3]
    b, clock = np.arange(size), np.zeros(size, int)
    rows = Rows(*(np.zeros((size, steps + 1), kind) for kind in (int, int, int, int, np.float32, int)))
    rows.state[:, 0], rows.before[:, 0], rows.act[:, 0] = draw(worlds.start, rng), states, actions + 1
    for t in range(steps):
        s, acted = rows.state[:, t], rows.over[:, t] == 0
        act, tag = policy(rows, t)
        after = draw(worlds.chances[b, s, act], rng)
        rew = worlds.rewards[b, s, act, after] + worlds.noise[b, s, act, after] * rng.standard_normal(size)
        clock = np.where(acted, clock + 1, 0)
        over = acted * np.where(worlds.ends[b, after], 1, 2 * (clock >= LIMIT))
        after = np.where(acted, after, draw(worlds.start, rng))  # nobody acts in the last state of an episode
        for x, value in zip(rows, (after, over, s, np.where(acted, act, actions), acted * rew, tag)):
            x[:, t + 1] = value
    return rows


# ---- counts of a context ----------------------------------------------------


class Counts(NamedTuple):
    """What contexts say of each pair of state and action."""

    moves: torch.Tensor  # [B, S, A, S] how often it led to each state
    rew: torch.Tensor  # [B, S, A] sum of rewards
    rew2: torch.Tensor  # [B, S, A] sum of squared rewards
    tag: torch.Tensor  # [B, S, A] how often the noisy optimal policy took it
    ends: torch.Tensor  # [B, S] how often the task ended in a state


def count(rows, steps, states, actions):
    """-> Counts of the first steps of all streams."""
    b, t = np.nonzero(rows.act[:, 1 : steps + 1] < actions)  # the first row tells of no step
    after, over, before, act, rew, tag = (x[b, t + 1] for x in rows)
    size, pair = len(rows.act), (b * states + before) * actions + act

    def total(index, values, *shape):
        sums = np.bincount(index, values, size * math.prod(shape)).astype(np.float32)
        return torch.from_numpy(sums.reshape(size, *shape))

    moves = total(pair * states + after, None, states, actions, states)
    by_pair = [total(pair, values, states, actions) for values in (rew, rew**2, tag)]
    return Counts(moves, *by_pair, total(b * states + after, over == 1, states))


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
    """Who acts in the training streams. The noisy optimal policy plays no, the first one to four, or all episodes. Then
    the model, a uniform policy, or a learner acts; a learner's random actions become fewer. [ours: O5]"""

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

    def __call__(self, rows, t):
        states, actions = self.q.shape[1:]
        if t and t % (EVERY // 2) == 0:  # think again
            counts = count(rows, t, states, actions)
            q, self.value = plan(counts, self.value, self.gamma, self.bonus)
            self.q = q.numpy() + 1e-4 * self.rng.random(self.q.shape)  # ties are broken by chance
            if self.own.any():
                self.probs[self.own] = self.agent.probs(counts, self.own, self.temperature)
        new = rows.act[:, t] == actions  # an episode begins
        self.episode += new
        self.skill = np.where(new, self.rng.random(len(new)), self.skill)
        s, oracle = rows.state[:, t], self.episode < self.oracle_episodes
        own = draw(self.probs[self.b, s].cumsum(-1), self.rng)
        act = np.where(self.own, own, self.q[self.b, s].argmax(-1))
        noise = np.where(self.own, 0.0, self.noise * (1 - t / self.decay).clip(0))
        act = np.where(oracle, self.worlds.optimal[self.b, s], act)
        random = self.rng.random(len(s)) < np.where(oracle, 1 - self.skill, noise)
        return np.where(random, self.rng.integers(actions, size=len(s)), act), oracle


def contexts_of_rows(rows, worlds, args, rng):
    """-> Rows [B, T] as tensors, targets [B, T, A], 0 where nobody acts."""
    state, asked = rows.state[:, :-1], rows.over[:, :-1] == 0
    wanted = rows.act[:, 1:] if args.supervision == "behavior" else np.take_along_axis(worlds.optimal, state, 1)
    if args.supervision == "query":  # one step of each stream
        asked = np.arange(args.context_rows) == (rng.random(asked.shape) * asked).argmax(1)[:, None]
    target = np.eye(FAMILY.actions, dtype=np.float32)[np.where(asked, wanted, 0)] * asked[..., None]
    return rows.tensors(0, args.context_rows), torch.as_tensor(target)


def contexts_of_counts(rows, worlds, args, rng):
    """The first 0, 64, 128, .. steps of each stream -> Counts [K B, ..], targets [K B, S, A]."""
    size, states, actions = worlds.chances.shape[:3]
    counts = [count(rows, steps, states, actions) for steps in range(0, args.context_rows + 1, EVERY)]
    target = torch.as_tensor(np.eye(actions, dtype=np.float32)[worlds.optimal] * ~worlds.ends[..., None])
    target = target.repeat(len(counts) - 1, 1, 1, 1)  # [K, B, S, A]
    if args.supervision == "behavior":  # what was done next, in the states that came next
        target = torch.stack([after.moves.sum(-1) - before.moves.sum(-1) for before, after in zip(counts, counts[1:])])
    elif args.supervision == "query":  # one context and one state of each stream
        k, state = rng.integers(len(target), size=size), (rng.random((size, states)) - worlds.ends).argmax(1)
        asked = torch.zeros(len(target), size, states, 1)
        asked[k, np.arange(size), state] = 1
        target = target * asked
    return Counts(*(torch.cat(x) for x in zip(*counts[:-1]))), target.flatten(0, 1)


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

    def __init__(self, width, matching, heads=8):
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
        """x [B, T, W]; seen [B, T, 2, S] one-hot of a row's state and of the state before; did [B, T, A + 2] one-hot of
        the action between them. With a cache (keys, values) of earlier rows, row t alone is computed."""
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

    def __init__(self, width, layers, matching):
        super().__init__()
        self.names = None if matching else nn.Embedding(2 * FAMILY.states + 1, width)  # of a state, of the one before
        self.act, self.over = nn.Embedding(FAMILY.actions + 2, width), nn.Embedding(3, width)
        self.tag = nn.Embedding(2, width)
        self.rew, self.mix = nn.Linear(4, width), nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width, width))
        self.blocks = nn.ModuleList([Block(width, matching) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FAMILY.actions))
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.5)

    def forward(self, rows, caches=None, t=0):
        """rows [B, T], or row t alone [B, 1] with the caches of earlier rows -> logits [B, T, A]."""
        x = self.act(rows.act) + self.rew(scales(rows.rew)) + self.over(rows.over) + self.tag(rows.tag)
        if self.names:
            x = x + self.names(rows.state) + self.names(rows.before + FAMILY.states)
        x = x + self.mix(x)
        seen = F.one_hot(torch.stack([rows.state, rows.before], -1), FAMILY.states + 1)[..., :-1].float()
        did = F.one_hot(rows.act, FAMILY.actions + 2).float()
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
            self.model = Transformer(args.width, args.depth, args.matching)
        self.opt = torch.optim.AdamW(self.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01)

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
    """A pass over all contexts. context: Counts or Rows [N, ..], target [N, .., A], both on the CPU -> dict of
    detached 0-d tensors."""
    device = next(agent.parameters()).device
    losses, asked = sums = torch.zeros(2, *target.shape[:2])
    for batch in torch.randperm(len(target), generator=generator).split(args.batch_size):
        # 4 model
        logits = agent.model(type(context)(*(x[batch].to(device) for x in context)))
        wanted = target[batch].to(device)
        loss, rows = cross_entropy(logits, wanted)
        agent.opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        agent.opt.step()

        losses[batch], asked[batch] = rows.detach().cpu(), wanted.sum(-1).cpu()

    # metrics
    if args.memory == "transformer":
        sums = sums.transpose(1, 2)  # rows first
    losses, asked = sums.reshape(2, args.context_rows // EVERY, -1).sum(-1)  # by length of the context
    by_length = {f"context/cross_entropy_{k * EVERY:04d}": x for k, x in enumerate(losses / asked.clamp(min=1))}
    return {"losses/cross_entropy": losses.sum() / asked.sum()} | by_length


# ---- own episodes -----------------------------------------------------------


class CountReader:
    """The graph network acts on the counts of all rows so far."""

    def __init__(self, agent, worlds, steps, args, rng):
        self.agent, self.every, self.rng, (size, *self.shape) = agent, args.think_every, rng, worlds.chances.shape[:3]
        self.b, self.temperature = np.arange(size), torch.full((size, 1, 1), args.temperature)

    def __call__(self, rows, t):
        if t % self.every == 0:
            self.probs = self.agent.probs(count(rows, t, *self.shape), self.b, self.temperature)
        return draw(self.probs[self.b, rows.state[:, t]].cumsum(-1), self.rng), 0


class SequenceReader:
    """The transformer acts on all rows so far; it keeps their keys and values."""

    def __init__(self, agent, worlds, steps, args, rng):
        self.model, self.temperature, self.rng = agent.model, args.temperature, rng
        self.device = next(agent.parameters()).device
        self.caches = self.model.empty_caches(len(worlds.ends), steps, self.device)

    @torch.no_grad()
    def __call__(self, rows, t):
        now = Rows(*(x.to(self.device) for x in rows.tensors(t, t + 1)))
        probs = (self.model(now, self.caches, t)[:, 0] / self.temperature).softmax(-1)
        return draw(probs.cpu().numpy().cumsum(-1), self.rng), 0


def normalized_returns(rows, tasks, ids, episodes):
    """-> [B, episodes]: 0 = the uniform policy's mean return, 100 = the optimal policy's."""
    number = (rows.act == FAMILY.actions).cumsum(1).clip(max=episodes)  # of a row's episode, from 0
    number += (episodes + 1) * np.arange(len(ids))[:, None]
    returns = np.bincount(number.ravel(), rows.rew.ravel(), (episodes + 1) * len(ids)).reshape(len(ids), -1)
    return returns[:, :episodes] - tasks.uniform[ids][:, None]


def own_episodes(agent, tasks, ids, episodes, plays, args, name):
    """Episodes of the model from an empty context, `plays` times in each task -> dict: mean and standard error over
    tasks of single episodes and, "normalized", of the last ten together."""
    rng = np.random.default_rng(11)  # evaluation leaves training's draws alone
    row_ids, steps = np.repeat(ids, plays), episodes * (LIMIT + 1)
    worlds = Worlds(tasks, row_ids, rng, args.renumber)
    reader = CountReader if args.memory == "counts" else SequenceReader
    rows = roll_out(worlds, reader(agent, worlds, steps, args, rng), steps, rng)
    returns = normalized_returns(rows, tasks, row_ids, episodes).reshape(len(ids), plays, episodes).mean(1)
    columns = {f"normalized_ep_{k + 1}": returns[:, k] for k in range(episodes)}
    columns |= {"normalized": returns[:, -10:].mean(1)}
    results = {f"eval/{name}/return": float(columns["normalized"].mean() + tasks.uniform[ids].mean())}
    for column, values in columns.items():
        results[f"eval/{name}/{column}"] = mean = float(values.mean())
        results[f"eval/{name}/{column}_se"] = error = float(values.std(ddof=1) / len(ids) ** 0.5)
        if column.split("_")[-1] in ("1", "2", "5", "10", "20", "50", "normalized"):
            print(f"  {name}, {column:16} {mean:4.0f} ± {error:.0f}", flush=True)
    return results


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
    args = dc.resolve(args, {"": DEFAULTS[args.memory]})
    if stage(args, 1).context_rows % EVERY:
        raise SystemExit(f"--context-rows {args.context_rows}: a stream must have a multiple of {EVERY} steps")
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
            own = args.own_share if step > args.warmup and args.memory == "counts" else 0.0
            behavior = Behavior(worlds, agent, now, rng, own)
            rows = roll_out(worlds, behavior, now.context_rows, rng)
            if not args.tags:
                rows.tag[:] = 0
            # 3 targets
            make = contexts_of_counts if args.memory == "counts" else contexts_of_rows
            context, target = make(rows, worlds, now, rng)
            dc.set_lr(agent.opt, args.lr * run.decay * min(1, step / args.warmup))
            metrics = update(agent, context, target, now, generator)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, episodes=10, plays=1))
        return run.finish(evaluate_all(agent, data, args, args.final_episodes, args.final_plays))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
