"""Meta-DT: offline meta-reinforcement learning as conditional sequence modeling with world model disentanglement.

Wang, Zhang, Wu, Zhu, Zhao, Chen, NeurIPS 2024, arXiv 2410.11448.
A world model infers z_t from the last h transitions and predicts from it what differs between tasks, the reward or the
next state; so z is to depend on the task, and little on who acted. It is frozen, and a causal transformer with z_t in
every state token regresses the actions of the data, given the return that is still to come. Few-shot, a prompt stands
in front: the k steps of an earlier episode of the task that the world model predicts worst, hence what z is missing.

Phases: (1) the world model, in every update on --context-size steps of --meta-batch episodes;
        (2) the transformer on windows with z and prompts from the frozen world model, --meta-batch times as many as
            hold --batch-size transitions.

Deviations from the paper and from the official code:
  D1  Before the first step of an episode a context holds zeros, in training as at test (official: in training the
      end of the previous episode, at test zeros until h steps are done). Observations are standardized throughout.
  D2  The world model is trained for a fixed number of updates (official: selected on the test tasks' data), on several
      steps of one episode per task.
  D3  Prompts are dropped with a probability, so that one network serves zero- and few-shot (official: none in the first
      updates, then always), and drawn anew in every update (official: once), never from the window's own episode, but
      from the best three others of its task.
  D4  The prompt starts where the error of its k steps is largest, as in the paper; in training it is drawn in
      proportion to that error (official: drawn also at test, where the sum runs to the end of the episode).
  D5  The return to aim at is known from the training tasks; `--target-return task_max` is the official one, the best in
      the test task's own data, which no agent on a new task knows.
  D6  The learning rate is larger and falls to 0 in the second half, for trainings far shorter than the official ones.
  D7  Windows are those of a rollout: the K steps up to a uniform one, early on the first K (official: from a uniform
      step on, so that few show how an episode starts, and those at its end are short).
As in the official code, z is part of the state token (paper: a token of its own), the encoder does not see s_t, and
only the decoder of what differs between the tasks is trained (paper: both, here `--world-model-loss both`).

Run:     python meta_dt.py --env ant-dir
Closest to the paper: --target-return task_max --batch-size 160 --lr 5e-5 --warmup-updates 10000 --total-updates 500000
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "meta_dt"
    """name of the experiment: the folder between env and seed in the run directory"""
    seed: int = 0
    """seed of initialization and batches (tasks and data are fixed by the dataset file)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    compile: bool = False
    """compile the update with torch.compile (pays on a GPU, is slower on a CPU)"""
    total_updates: int = 8_000
    """updates of the policy [gradient steps]"""
    log_every: int = 250
    """updates between two log lines [gradient steps]"""
    eval_every: int = 1_000
    """updates between two evaluations [gradient steps]"""
    save_every: int = 1_000
    """updates between two checkpoints [gradient steps]"""
    run_dir: str = "runs"
    """parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}"""
    resume: str | None = None
    """run directory to continue, with the arguments stored there"""
    eval_only: bool = False
    """with --resume: evaluate its checkpoint with all protocols and stop"""
    # data and evaluation
    env: dc.EnvName = "ant-dir"
    """task family"""
    dataset: str | None = None
    """dataset file; by default datasets/{env}.npz"""
    eval_episodes: int = 2
    """episodes per task and evaluation"""
    meta_batch: int = 16
    """tasks per update, drawn with replacement [tasks]"""
    batch_size: int = 32
    """transitions per task and update [transitions]"""
    context_size: int = 64
    """transitions of one episode that a task is inferred from in training [transitions]"""
    # method
    lr: float = 5e-4
    """AdamW's learning rate of the transformer after the warm-up; it falls linearly to 0 in the second half"""
    warmup_updates: int | None = None
    """updates in which that rate rises linearly [gradient steps]; None = a tenth of --total-updates"""
    weight_decay: float = 1e-4
    """AdamW's weight decay"""
    width: int = 128
    """size of the transformer's tokens; its MLPs are four times as wide"""
    layers: int = 3
    """blocks of the transformer"""
    heads: int = 1
    """attention heads per block"""
    dropout: float = 0.1
    """share of attention weights, residual updates and embedded tokens dropped in training"""
    window: int | None = None
    """steps of an episode that the transformer sees (K) [steps]; None = ENV_ARGS"""
    return_scale: float | None = None
    """divisor of the returns-to-go; None = ENV_ARGS"""
    target_return: Literal["train_mean_max", "train_max", "task_max"] = "train_mean_max"
    """return to aim at: the best one in a task's data, mean or maximum over the training tasks; task_max takes the
    test task's own and thus uses knowledge about it"""
    prompt_length: int | None = None
    """steps of the prompt (k) [steps]; None = ENV_ARGS"""
    prompt_select: Literal["argmax", "sample", "random", "last"] = "argmax"
    """where the prompt starts in its episode: largest error of the world model (in training as sample: the same start
    every time would be learned by heart), drawn in proportion to the error, anywhere, or as late as possible"""
    prompt_dropout: float = 0.25
    """share of training windows without a prompt; 1 = purely zero-shot, no prompt at test either"""
    world_model_updates: int | None = None
    """updates of the world model [gradient steps]; None = half of --total-updates, which at the default sizes means 512
    transitions per update of the transformer (official: 270 to 2,700)"""
    world_model_loss: Literal["reward", "state", "both"] | None = None
    """what the world model predicts; None = state where the dynamics differ between tasks, else reward"""
    world_model_lr: float = 1e-3
    """Adam's learning rate of the world model"""
    context_horizon: int = 4
    """transitions before a step that its z is inferred from (h) [steps]"""
    encoder_width: int = 128
    """hidden units of the world model: GRU and decoders"""
    z_dim: int = 16
    """size of the task latent"""


# what the environments need differently, for arguments left at None
ENV_ARGS = {  # the first entry whose key is part of the family's name
    "point": dict(window=20, prompt_length=5, return_scale=10.0),
    "rand-params": dict(window=8, prompt_length=3, return_scale=500.0),
    "": dict(window=20, prompt_length=5, return_scale=500.0),
}

MAY_BE_ZERO = {"seed", "world_model_updates", "warmup_updates", "weight_decay", "dropout", "prompt_dropout"}
RANGES = {"dropout": (0, 1), "prompt_dropout": (0, 1)}
EVAL_ONLY = {"target_return"}  # not of the training: may differ when a run is resumed
CLIP, WORLD_MODEL_CLIP = 0.25, 1.0  # largest norms of the gradient
BEST = 3  # episodes of a task, best first, among which the prompt's is drawn
EMBED = 16  # size of an embedded observation, action or reward

# ---- networks ---------------------------------------------------------------


class Encoder(nn.Module):
    """Task latent z(context): GRU over the last h steps, no spread."""

    def __init__(self, obs_dim, act_dim, z_dim, width):
        super().__init__()
        self.sizes = [obs_dim, act_dim, 1]
        self.embed = nn.ModuleList([nn.Linear(size, EMBED) for size in self.sizes])
        self.gru = nn.GRU(len(self.sizes) * EMBED, width, batch_first=True)
        self.head = nn.Linear(width, z_dim)

    def forward(self, context):
        """context [B, h, obs_dim + act_dim + 1], rows (obs, act, rew), zeros before the episode -> z [B, z_dim]."""
        parts = [layer(part).relu() for layer, part in zip(self.embed, context.split(self.sizes, -1))]
        return self.head(self.gru(torch.cat(parts, -1))[1][0])


class Decoder(nn.Module):
    """What the world model predicts of a transition: its reward, or its next observation."""

    def __init__(self, obs_dim, act_dim, z_dim, width, out_dim, sees_next):
        super().__init__()
        self.obs, self.act = nn.Linear(obs_dim, EMBED), nn.Linear(act_dim, EMBED)
        layers = [nn.Linear((2 + sees_next) * EMBED + z_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, out_dim))

    def forward(self, z, act, *obs):
        """z [.., z_dim], act [.., act_dim], one or two observations [.., obs_dim] -> [.., out_dim]."""
        return self.net(torch.cat([*(self.obs(o).relu() for o in obs), self.act(act).relu(), z], -1))


class WorldModel(nn.Module):
    """Context encoder, with a decoder of the reward (loss "reward"), of the next observation ("state") or both."""

    def __init__(self, obs_dim, act_dim, z_dim, width, loss):
        super().__init__()
        self.sizes = [obs_dim, act_dim, 1, obs_dim]
        self.encoder = Encoder(obs_dim, act_dim, z_dim, width)
        sizes = (obs_dim, act_dim, z_dim, width)
        self.reward = Decoder(*sizes, 1, True) if loss != "state" else None
        self.state = Decoder(*sizes, obs_dim, False) if loss != "reward" else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.encoder.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def infer(self, rows, lengths, episode, step, horizon):
        """z before step [B] of episode [B], from its last `horizon` transitions alone; rows [E, H, >= obs_dim +
        act_dim + 1], lengths [E] -> z [B, z_dim]. Training, prompts and rollouts all go through here."""
        context, _, _ = cut(rows[..., : sum(self.sizes[:3])], lengths, episode, step - horizon, horizon)
        return self.encoder(context)

    def residuals(self, rows, z):
        """rows [.., ctx_dim], z [.., z_dim] -> list of prediction errors: reward [.., 1], next_obs [.., obs_dim]."""
        obs, act, rew, next_obs = rows.split(self.sizes, -1)
        errors = []
        if self.reward is not None:
            errors.append(self.reward(z, act, obs, next_obs) - rew)  # [paper: reward decoder]
        if self.state is not None:
            errors.append(self.state(z, act, obs) - next_obs)  # [paper: transition decoder]
        return errors


class Block(nn.Module):
    """Attention and MLP, each on the normalized tokens and added to them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.qkv, self.project = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.project, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask, dropout, read=slice(None)):
        """x [B, L, width], mask [B, 1, L, L] True = may attend -> [B, R, width]: the R tokens of the slice `read`, by
        default all. All are attended to; what nobody reads of the last block is not computed."""
        weights, biases = (p.split([x.shape[-1], 2 * x.shape[-1]]) for p in (self.qkv.weight, self.qkv.bias))
        normed = self.norm_1(x)
        q, kv = (F.linear(part, w, b) for part, w, b in zip((normed[:, read], normed), weights, biases))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, R, d]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, d]
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, :, read], dropout).transpose(1, 2).flatten(2)
        x = x[:, read] + F.dropout(self.project(attended), dropout, dropout > 0)
        return x + F.dropout(self.down(self.up(self.norm_2(x)).relu()), dropout, dropout > 0)


class Transformer(nn.Module):
    """Decision transformer: three tokens per step, return-to-go, state with z, action; positions are an embedding of
    the step's number in its episode. The prompt has embeddings of its own and no z."""

    def __init__(self, obs_dim, act_dim, horizon, args):
        super().__init__()
        width = args.width
        self.sizes = [1, obs_dim, args.z_dim, act_dim]
        self.time, self.prompt_time = nn.Embedding(horizon, width), nn.Embedding(horizon, width)
        self.rtg, self.prompt_rtg = nn.Linear(1, width), nn.Linear(1, width)
        self.obs, self.prompt_obs = nn.Linear(obs_dim, EMBED), nn.Linear(obs_dim, width)
        self.state = nn.Linear(EMBED + args.z_dim, width)
        self.act, self.prompt_act = nn.Linear(act_dim, width), nn.Linear(act_dim, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, args.heads) for _ in range(args.layers)])
        self.final_norm, self.head = nn.LayerNorm(width), nn.Linear(width, act_dim)

    def embed(self, rows, steps):
        """rows [B, K, 1 + obs_dim + z_dim + act_dim], steps [B, K] -> tokens [B, 3K, width]."""
        rtg, obs, z, act = rows.split(self.sizes, -1)
        state = self.state(torch.cat([self.obs(obs), z], -1))
        tokens = torch.stack([self.rtg(rtg), state, self.act(act)], 2) + self.time(steps)[:, :, None]
        return self.norm(tokens.flatten(1, 2))

    def embed_prompt(self, rows, steps):
        """As `embed`, for the prompt."""
        rtg, obs, _, act = rows.split(self.sizes, -1)
        tokens = torch.stack([self.prompt_rtg(rtg), self.prompt_obs(obs), self.prompt_act(act)], 2)
        return (tokens + self.prompt_time(steps)[:, :, None]).flatten(1, 2)

    def forward(self, window, prompt=None, dropout=0.0):
        """window and prompt as of `cut`: rows [B, K, ..], steps [B, K], valid [B, K] -> actions [B, K, act_dim] in
        (-1, 1), each read from its state token, hence before its own action."""
        tokens, valid = self.embed(*window[:2]), window[2]
        if prompt is not None:
            tokens = torch.cat([self.embed_prompt(*prompt[:2]), tokens], 1)
            valid = torch.cat([prompt[2], valid], 1)
        valid = valid.repeat_interleave(3, 1)  # [B, L]
        causal = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device).tril()
        itself = torch.eye(len(causal), dtype=torch.bool, device=valid.device)
        mask = (causal & valid[:, None] | itself)[:, None]  # padding attends to itself: no row is left without a key
        x = F.dropout(tokens, dropout, dropout > 0)
        for block in self.blocks[:-1]:
            x = block(x, mask, dropout)
        states = slice(1 - 3 * window[1].shape[1], None, 3)  # the window's state tokens
        return torch.tanh(self.head(self.final_norm(self.blocks[-1](x, mask, dropout, states))))


# ---- sequences --------------------------------------------------------------


def cut(rows, lengths, episode, start, count):
    """`count` steps of each of B episodes, the only padding there is: rows [E, H, D], lengths [E], episode [B], start
    [B], also negative -> rows [B, count, D], zeros outside the episode; steps [B, count] within 0..H-1; valid
    [B, count], True inside the episode."""
    steps = start[:, None] + torch.arange(count, device=start.device)
    valid = (steps >= 0) & (steps < lengths[episode][:, None])
    steps = steps.clamp(0, rows.shape[1] - 1)
    return rows[episode[:, None], steps] * valid[..., None], steps, valid


def returns_to_go(rew):
    """rew [.., H] -> sum of the rewards from each step to the end [.., H]."""
    return rew.flip(-1).cumsum(-1).flip(-1)


def window_scores(errors, lengths, context_horizon, count):
    """Errors of the world model [E, H], lengths [E] -> their sums over `count` steps from every start
    [E, H - count + 1]; 0 where the steps leave the episode, and in the first `context_horizon` steps, where z still
    lacks transitions."""
    scores = errors.unfold(1, count, 1).sum(-1)  # [paper: complementary prompt]
    start = torch.arange(scores.shape[1], device=errors.device)
    return scores * ((start >= context_horizon) & (start <= lengths[:, None] - count))


def select(scores, how, generator):
    """Start of the prompt in each of B episodes: scores [B, J], 0 = impossible -> [B]; step 0 if all are, that is in an
    episode shorter than a context and a prompt."""
    if how == "argmax":
        return scores.argmax(1)
    if how == "last":
        return ((scores > 0) * torch.arange(scores.shape[1], device=scores.device)).argmax(1)
    noise = torch.empty_like(scores).exponential_(generator=generator)
    weights = scores if how == "sample" else (scores > 0).to(scores)
    return (weights / noise).argmax(1)  # the first of exponential clocks: a draw in proportion to the weights


@dataclass
class Sequences:
    """Episodes as the transformer reads them."""

    rows: torch.Tensor  # [E, H, 1 + obs_dim + z_dim + act_dim]: scaled return-to-go, obs, z, act
    lengths: torch.Tensor  # [E]
    scores: torch.Tensor  # [E, J] of `window_scores`

    def cut(self, episode, start, count):
        return cut(self.rows, self.lengths, episode, start, count)


def read_episodes(agent, episodes, lengths):
    """episodes [E, H, ctx_dim], lengths [E] -> Sequences with z and prediction errors of the frozen world model."""
    args, (count, horizon) = agent.args, episodes.shape[:2]
    episode = torch.arange(count, device=episodes.device).repeat_interleave(horizon)
    step = torch.arange(horizon, device=episodes.device).repeat(count)
    with torch.no_grad():
        z = agent.world_model.infer(episodes, lengths, episode, step, args.context_horizon).unflatten(0, (count, -1))
        errors = sum(error.abs().sum(-1) for error in agent.world_model.residuals(episodes, z))  # [E, H]
    obs, act, rew, _ = episodes.split(agent.world_model.sizes, -1)
    rtg = returns_to_go(rew[..., 0])[..., None] / args.return_scale
    scores = window_scores(errors, lengths, args.context_horizon, args.prompt_length)
    return Sequences(torch.cat([rtg, obs, z, act], -1), lengths, scores)


def read_dataset(agent, data):
    """All episodes of the training tasks as Sequences, U * N of them, task by task."""
    parts = [read_episodes(agent, data.episodes[i, :, :, :-1], data.lengths[i]) for i in data.train_ids]
    return Sequences(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sequences)))


def best_returns(data):
    """-> [T] the best return in each task's data."""
    return np.where(data.lengths.cpu().numpy() > 0, data.episode_returns, -np.inf).max(1)


def target_returns(data, tasks, which):
    """Returns to aim at on `tasks` -> [1], the same for all, or [len(tasks)] with "task_max"; unscaled."""
    best = best_returns(data)
    seen = best[data.train_ids]
    targets = {"train_mean_max": seen.mean(keepdims=True), "train_max": seen.max(keepdims=True)}
    return torch.as_tensor(targets.get(which, best[tasks]), dtype=torch.float32, device=data.device)


# ---- losses -----------------------------------------------------------------


def world_model_loss(residuals):
    """List of prediction errors [.., dim] -> scalar: squares, a mean over dimensions and rows, of each."""
    return sum(error.pow(2).mean() for error in residuals)  # [paper: world model]


def action_loss(prediction, act, valid):
    """prediction, act [B, K, act_dim], valid [B, K] -> scalar: mean square over the valid steps."""
    error = (prediction - act).pow(2).mean(-1)
    return torch.where(valid, error, 0).sum() / valid.sum()  # [paper: action regression]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """World model and transformer; `opts`: AdamW of the transformer, Adam of the world model."""

    def __init__(self, obs_dim, act_dim, horizon, args):
        super().__init__()
        self.horizon, self.args = horizon, args
        self.world_model = WorldModel(obs_dim, act_dim, args.z_dim, args.encoder_width, args.world_model_loss)
        self.transformer = Transformer(obs_dim, act_dim, horizon, args)

    def make_optimizer(self, args):
        params, lr = self.transformer.parameters(), torch.tensor(args.lr)  # a tensor: `anneal` changes it
        self.opts = [torch.optim.AdamW(params, lr, weight_decay=args.weight_decay, fused=True)]
        self.opts.append(torch.optim.Adam(self.world_model.parameters(), args.world_model_lr, fused=True))


def anneal(opts, lr, done):
    """Learning rate of all optimizers: `lr` for the first half of the training, then linear to 0; done in [0, 1]."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(lr * min(1.0, 2 - 2 * done))  # [ours: D6]


def warm_up(step, updates):
    """Factor on the learning rate in update `step` (from 0): linear to 1 over `updates`."""
    return min((step + 1) / max(updates, 1), 1.0)


# ---- update -----------------------------------------------------------------


def set_grads(loss, params, retain_graph=False):
    """Put the gradient of a scalar loss into .grad of exactly these parameters."""
    grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
    for parameter, grad in zip(params, grads):
        parameter.grad = grad


def draw_steps(data, args, generator):
    """--context-size steps of one episode of each of --meta-batch training tasks -> episode, step, both [B]; an episode
    is a row of data.episodes.flatten(0, 1)."""
    tasks = torch.as_tensor(data.train_ids, device=data.device)
    task, episode = draw_episodes(data.lengths[tasks], args.meta_batch, generator)
    episode = (tasks[task] * data.lengths.shape[1] + episode).repeat_interleave(args.context_size)
    draw = torch.rand(len(episode), device=data.device, generator=generator)
    return episode, (draw * data.lengths.flatten()[episode]).long()


def draw_episodes(lengths, count, generator):
    """lengths [U, N], 0 = no episode, these come last -> task, episode, both [count], uniform."""
    draw = torch.rand(2, count, device=lengths.device, generator=generator)
    task = (draw[0] * len(lengths)).long()
    return task, (draw[1] * (lengths[task] > 0).sum(1)).long()


def draw_windows(sequences, best, lengths, args, generator):
    """Windows of random episodes, each with a prompt from another one of its task: best [U, n] the best episodes of
    each training task, lengths [U, N] -> window, prompt as of `cut`; dropped prompts have no valid step."""
    count = args.meta_batch * math.ceil(args.batch_size / args.window)
    task, own = draw_episodes(lengths, count, generator)
    episode = task * lengths.shape[1] + own
    draw = torch.rand(3, count, device=lengths.device, generator=generator)
    last = (draw[0] * sequences.lengths[episode]).long()
    window = sequences.cut(episode, (last - args.window + 1).clamp(min=0), args.window)  # [ours: D7]
    rank = (draw[1] * (best.shape[1] - 1)).long()  # one of n - 1; the window's own episode is skipped
    is_own = best[task] == own[:, None]  # [B, n]
    rank += is_own.cumsum(1).gather(1, rank[:, None])[:, 0]
    other = task * lengths.shape[1] + best[task, rank]
    how = "sample" if args.prompt_select == "argmax" else args.prompt_select
    rows, steps, valid = sequences.cut(other, select(sequences.scores[other], how, generator), args.prompt_length)
    return window, (rows, steps, valid & (draw[2] >= args.prompt_dropout)[:, None])


def update_world_model(agent, episodes, lengths, episode, step, args):
    """One step of the world model. episodes [E, H, ctx_dim], lengths [E], episode, step [B] -> dict of detached 0-d
    tensors."""
    model, params = agent.world_model, list(agent.world_model.parameters())
    z = model.infer(episodes, lengths, episode, step, args.context_horizon)
    loss = world_model_loss(model.residuals(episodes[episode, step], z))
    set_grads(loss, params)
    norm = nn.utils.clip_grad_norm_(params, WORLD_MODEL_CLIP)
    agent.opts[1].step()
    return {
        "losses/world_model": loss.detach(),
        "stats/world_model_grad": norm,
        "z/between_std": z.detach().std(0).mean(),
    }


def update(agent, window, prompt, args):
    """One step of the transformer. window: rows [B, K, ..], steps, valid [B, K] as of `cut`, prompt the same with k
    steps -> dict of detached 0-d tensors."""
    rows, _, valid = window
    act, params = rows[..., -agent.transformer.sizes[-1] :], list(agent.transformer.parameters())
    loss = action_loss(agent.transformer(window, prompt, args.dropout), act, valid)
    set_grads(loss, params)
    norm = nn.utils.clip_grad_norm_(params, CLIP)
    agent.opts[0].step()
    return {"losses/actor": loss.detach(), "stats/actor_grad": norm}


# ---- adaptation -------------------------------------------------------------


def find_prompt(agent, context, mask):
    """context [R, n * H, ctx_dim], n whole episodes, mask [R, n * H] -> prompt as of `cut`: from one of the best
    episodes of the row, the part that the world model predicts worst. A row without a transition gets no valid step."""
    args = agent.args
    # the same prompts at every evaluation, another draw in every round
    generator = torch.Generator(context.device).manual_seed(args.seed + context.shape[1])
    episodes = context.unflatten(1, (-1, agent.horizon))  # [R, n, H, ctx_dim]
    lengths = mask.unflatten(1, (-1, agent.horizon)).sum(-1).long()  # [R, n]
    rows, count = lengths.shape
    sequences = read_episodes(agent, episodes.flatten(0, 1), lengths.flatten())
    returns = sequences.rows[:, 0, 0].unflatten(0, (rows, count)).masked_fill(lengths == 0, -math.inf)
    best = returns.topk(min(BEST, count), 1).indices
    pick = torch.randint(best.shape[1], (rows, 1), device=context.device, generator=generator)
    episode = torch.arange(rows, device=context.device) * count + best.gather(1, pick)[:, 0]
    return sequences.cut(episode, select(sequences.scores[episode], args.prompt_select, generator), args.prompt_length)


def adapt(agent, context, mask, explore=False, *, targets):
    """Act on what was seen. context [R, K, ctx_dim], mask [R, K], whole episodes, of which one becomes the prompt; none
    without a transition; explore changes nothing; targets [1] or [tasks]: the return to aim at, where the rows lie
    task by task -> policy(obs [R, obs_dim], rew [R]) -> act [R, act_dim]; it keeps the history of one episode."""
    args, model = agent.args, agent.world_model
    with_prompt = context.shape[1] > 0 and args.prompt_dropout < 1
    prompt = find_prompt(agent, context, mask) if with_prompt else None
    device, count = context.device, len(context)
    every = torch.arange(count, device=device)
    _, obs_dim, z_dim, act_dim = agent.transformer.sizes
    seen = torch.zeros(count, agent.horizon, obs_dim + act_dim + 1, device=device)  # (obs, act, rew)
    rows = torch.zeros(count, agent.horizon, 1 + obs_dim + z_dim + act_dim, device=device)  # as in Sequences
    rtg = targets.repeat_interleave(count // len(targets)) / args.return_scale
    t = 0

    def policy(obs, rew):
        nonlocal t, rtg
        if t > 0:
            seen[:, t - 1, -1] = rew
            rtg = rtg - rew / args.return_scale
        now = torch.full_like(every, t)
        z = model.infer(seen, now, every, now, args.context_horizon)
        rows[:, t] = torch.cat([rtg[:, None], obs, z, torch.zeros_like(seen[:, t, :act_dim])], -1)
        length = min(t + 1, args.window)
        act = agent.transformer(cut(rows, now + 1, every, now + 1 - length, length), prompt)[:, -1]
        rows[:, t, -act_dim:] = act
        seen[:, t, :-1] = torch.cat([obs, act], -1)
        t += 1
        return act

    return policy


def embed(agent, context, mask):
    """context [R, K, ctx_dim] of one episode, mask [R, K] -> z [R, z_dim] after its last transition."""
    lengths = mask.sum(1).long()
    every = torch.arange(len(context), device=context.device)
    with torch.no_grad():
        return agent.world_model.infer(context, lengths, every, lengths, agent.args.context_horizon)


def evaluate_all(agent, data, args, protocols):
    """Returns and quality of z -> dict tag -> float. The rounds of the online protocol are the shots: no prompt in the
    first, then prompts from this agent's own episodes."""
    results = {}
    for protocol in protocols:
        tasks = data.train_ids[:10] if protocol == "train" else data.test_ids
        act = partial(adapt, agent, targets=target_returns(data, tasks, args.target_return))
        results |= dc.evaluate(data, act, (protocol,), args.eval_episodes)
    return results | dc.embedding_quality(data, partial(embed, agent))


CONSOLE_TAGS = ("losses/world_model", "z/between_std", "losses/actor", "stats/actor_grad")

# ---- the run ----------------------------------------------------------------


def resolve(args):
    """Check the arguments, fill in those left at None -> args. One line for whatever is wrong."""
    defaults = next(values for key, values in ENV_ARGS.items() if key in args.env)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        args.dataset = f"datasets/{args.env}.npz"
    for name, value in asdict(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least, most = RANGES.get(name, (0, math.inf))
        if not least <= value <= most or value == math.inf or (value == 0 and name not in MAY_BE_ZERO):
            limits = "be at least 0" if name in MAY_BE_ZERO else "be positive"
            limits = f"lie between {least} and {most}" if name in RANGES else limits
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must {limits}")
    return args


def write_json(path, content):
    dc.atomic_save(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def load_checkpoint(directory, device):
    """Checkpoint of a run directory as a dict; one line if there is none of this script."""
    path = Path(directory) / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"--resume {directory}: no checkpoint.pt there; give the run directory that training printed")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception:
        raise SystemExit(f"{path} is damaged; start the run anew without --resume")
    if not isinstance(saved, dict) or set(saved.get("args", ())) != {f.name for f in fields(Args)}:
        raise SystemExit(f"--resume {directory}: that run is of another script or version")
    return saved


def stored_args(directory):
    """Arguments of the run in a directory, set to continue it."""
    return Args(**load_checkpoint(directory, "cpu")["args"] | {"resume": str(directory)})


def check_resumed(args, saved, data):
    """A resumed run may get other lengths, intervals and device; whatever shapes the training must agree."""
    free = {"total_updates", "log_every", "eval_every", "save_every", "eval_episodes", "device", "compile"} | EVAL_ONLY
    for name in sorted(set(saved["args"]) - free - {"resume", "eval_only", "run_dir", "dataset"}):
        if getattr(args, name) != saved["args"][name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise SystemExit(f"{flag}: the run to resume has {saved['args'][name]}; drop the flag")
    if data.header != saved["data"]:
        raise SystemExit(f"{args.dataset} is not the file that the run to resume was trained on; use that: --dataset")


def eval_line(results):
    """One line of the returns per protocol, normalized in brackets."""
    names = [p for p in dc.PROTOCOLS if f"eval/{p}/return" in results]
    cells = [f"{p} {results[f'eval/{p}/return']:.1f} ({results[f'eval/{p}/normalized']:.0f})" for p in names]
    return "  ".join(["eval", *cells, f"z acc {results['z/nearest_task_acc']:.2f} R2 {results['z/probe_r2']:.2f}"])


class Run:
    """The run directory of one training: restores a run to resume, then counts, logs, evaluates and saves.

    A training has one or more phases, the last of which is "policy". The loop of a phase calls going(phase) before
    and advance(metrics) after every update; finish() comes at the end. `agent` has `opts`, the list of its
    optimizers; `generator` draws the batches; --{phase}-updates is a phase's length."""

    def __init__(self, args, data, agent, generator, phases=("policy",)):
        self.args, self.data, self.agent, self.generator = args, data, agent, generator
        self.steps, self.phase = dict.fromkeys(phases, 0), phases[-1]  # updates done per phase
        self.results, self.stopping, self.timed, self.born = {}, False, 0.0, time.time()
        self.dir = Path(args.resume or "")
        rows = 1
        if args.resume:
            saved = load_checkpoint(self.dir, data.device)
            check_resumed(args, saved, data)
            agent.load_state_dict(saved["agent"])
            for opt, state in zip(agent.opts, saved["opts"]):
                opt.load_state_dict(state)
            generator.set_state(saved["generator"].cpu())
            dc.restore_rng(saved["rng"])
            self.steps, rows = saved["steps"], saved["rows"]
            self.born -= saved["seconds"]
        else:
            name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
            self.dir = Path(args.run_dir) / args.env / args.exp_name / name
            try:
                self.dir.mkdir(parents=True)
            except OSError as error:
                raise SystemExit(f"cannot make {self.dir}: {error.strerror}; choose another --run-dir")
        self.finished = self.step >= args.total_updates and (self.dir / "result.json").is_file()
        if not self.finished and not args.eval_only:
            self.open_files(rows)

    @property
    def step(self):
        """Updates done in the current phase."""
        return self.steps[self.phase]

    @property
    def total(self):
        """Updates that the current phase has in all."""
        return self.args.total_updates if self.phase == "policy" else getattr(self.args, f"{self.phase}_updates")

    def open_files(self, rows):
        """args.json, TensorBoard events and metrics.csv, of which the first `rows` lines stay."""
        args, data = self.args, self.data
        versions = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)}
        stored = {k: v for k, v in asdict(args).items() if k not in ("resume", "eval_only")}
        about = {"args": stored, "versions": versions | {"python": sys.version.split()[0]}}
        write_json(self.dir / "args.json", about | {"command": sys.argv, "dataset": data.header})
        self.writer = SummaryWriter(str(self.dir), purge_step=sum(self.steps.values()) + 1 if args.resume else None)
        self.writer.add_text("args", "|argument|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in stored.items()))
        path = self.dir / "metrics.csv"
        kept = path.read_text().splitlines(keepends=True)[:rows] if path.exists() else ["step,tag,value\n"]
        dc.atomic_save(path, lambda file: file.write("".join(kept).encode()))
        self.csv, self.rows = open(path, "a"), len(kept)
        tasks = f"{len(data.train_ids)} training and {len(data.test_ids)} test tasks"
        print(f"{self.dir}: {args.env}, {tasks}, device {data.device}")
        worst, best = data.random_returns[data.test_ids].mean(), data.expert_returns[data.test_ids].mean()
        returns = f"random {worst:.1f}, expert {best:.1f}; of the training data {data.behavior_return:.1f}"
        print(f"  mean return on the test tasks: {returns}", flush=True)

    def __enter__(self):
        def on_interrupt(*_):
            self.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

        self.previous_handler = signal.signal(signal.SIGINT, on_interrupt)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous_handler)
        if hasattr(self, "csv"):
            self.csv.close()
            self.writer.close()

    def log(self, values):
        """dict tag -> number, to metrics.csv and TensorBoard."""
        for tag, value in values.items():
            self.csv.write(f"{self.step},{tag},{float(value)!r}\n")
            if "/return_task_" not in tag:
                self.writer.add_scalar(tag, value, sum(self.steps.values()))
        self.csv.flush()
        self.rows += len(values)

    def save(self):
        """checkpoint.pt, unless a parameter is not finite: then the last good one stays."""
        self.writer.flush()  # what a resumed run builds on is on the disk, should this one be killed
        state = {"agent": self.agent.state_dict(), "opts": [opt.state_dict() for opt in self.agent.opts]}
        state |= {"generator": self.generator.get_state(), "rng": dc.rng_state(), "data": self.data.header}
        state |= {"steps": self.steps, "rows": self.rows, "seconds": time.time() - self.born, "args": asdict(self.args)}
        if all(p.isfinite().all() for p in self.agent.parameters()):
            dc.atomic_save(self.dir / "checkpoint.pt", lambda file: torch.save(state, file))

    def going(self, phase="policy"):
        """Whether an update of this phase is to be done."""
        if self.stopping or self.args.eval_only:
            return False
        if self.phase != phase or not self.timed:
            self.phase = phase
            self.start_step, self.start, self.tick, self.timed = self.step, time.time(), time.perf_counter(), 1e-9
        return self.step < self.total

    def advance(self, metrics):
        """Count an update; log, evaluate and save when it is time. metrics: dict tag -> 0-d tensor."""
        args = self.args
        self.steps[self.phase] += 1
        last, policy = self.step == self.total, self.phase == "policy"
        if last or any(self.step % n == 0 for n in (args.log_every, args.eval_every, args.save_every)):
            values = self.read(metrics)
        self.timed += time.perf_counter() - self.tick
        if self.step % args.log_every == 0:
            self.log(values)
            self.print_progress(values)
        if policy and (self.step % args.eval_every == 0 or last):
            self.results = evaluate_all(self.agent, self.data, args, dc.PROTOCOLS if last else ("iid", "train"))
            self.log(self.results)
            print("  " + eval_line(self.results), flush=True)
        if self.step % args.save_every == 0 or last:
            self.save()
        self.tick = time.perf_counter()

    def read(self, metrics):
        """The only place where training reads from the device -> dict tag -> float; all must be finite."""
        values = {tag: value.item() for tag, value in metrics.items()}
        broken = [f"{tag} ({value})" for tag, value in values.items() if not math.isfinite(value)]
        broken += [f"parameter {name}" for name, p in self.agent.named_parameters() if not p.isfinite().all()]
        if broken:
            good = self.dir / "checkpoint.pt"
            remedy = f"the last good state is {good}" if good.exists() else "there is no checkpoint yet"
            raise SystemExit(f"stopped at update {self.step}: {broken[0]} is not finite; {remedy}")
        return values

    def print_progress(self, values):
        done, elapsed = self.step - self.start_step, time.time() - self.start
        speed = done / self.timed
        if self.phase == "policy":
            self.writer.add_scalar("charts/updates_per_sec", speed, sum(self.steps.values()))
            self.writer.add_scalar("charts/wall_clock_s", time.time() - self.born, sum(self.steps.values()))
        eta = dc.duration(elapsed / done * (self.total - self.step))
        share = f"{self.phase} {self.step:>7}/{self.total} {100 * self.step // self.total:>3}%"
        cells = "  ".join(f"{tag.split('/')[1]} {values[tag]:.3g}" for tag in CONSOLE_TAGS if tag in values)
        print(f"[{share}] {speed:.1f} upd/s  eta {eta}  {cells}", flush=True)

    def finish(self):
        """-> dict: the last evaluation, run_dir, step, updates_per_sec, wall_clock_s; also in result.json."""
        args, agent, data = self.args, self.agent, self.data
        if args.eval_only:
            results = evaluate_all(agent, data, args, dc.PROTOCOLS)
            print(f"{self.dir} after {self.step} updates, in full in eval.json\n  " + eval_line(results))
            write_json(self.dir / "eval.json", {"step": self.step} | results)
            return results | {"run_dir": str(self.dir)}
        if self.finished:
            print(f"{self.dir} is finished after {self.step} updates; --total-updates continues it further")
            return json.loads((self.dir / "result.json").read_text())
        if self.stopping:
            self.save()
            script = Path(sys.argv[0]).name
            where = f"{self.step} updates ({self.phase})"
            print(f"interrupted after {where}; continue with: python {script} --resume {self.dir}")
            raise SystemExit(130)
        if not self.results:  # the run was cut off between the last checkpoint and result.json
            self.results = evaluate_all(agent, data, args, dc.PROTOCOLS)
        z, labels = dc.label_contexts(data, partial(embed, agent))
        self.writer.add_embedding(z, metadata=labels, global_step=sum(self.steps.values()), tag="z")
        speed = (self.step - self.start_step) / self.timed if self.timed else 0.0
        self.results |= {"run_dir": str(self.dir), "step": self.step}
        self.results |= {"updates_per_sec": speed, "wall_clock_s": time.time() - self.born}
        write_json(self.dir / "result.json", self.results)
        return self.results


# ---- training ---------------------------------------------------------------


def check_lengths(args, data):
    """One line if the prompts do not fit the episodes."""
    shortest = args.context_horizon + args.prompt_length
    if shortest > data.family.horizon:
        what = f"--prompt-length {args.prompt_length} and --context-horizon {args.context_horizon}"
        raise SystemExit(f"{what}: together more than the {data.family.horizon} steps of an episode of {args.env}")
    if data.min_episodes < 2:
        raise SystemExit(f"{args.dataset}: prompts need two episodes per training task; collect more with --episodes")


def train(args):
    """Train and evaluate -> what Run.finish returns."""
    if args.eval_only and not args.resume:
        raise SystemExit("--eval-only needs --resume RUN_DIR")
    if args.world_model_loss is None:
        args.world_model_loss = "state" if dc.FAMILIES[args.env].dynamics_vary else "reward"
    half, tenth = args.total_updates // 2, args.total_updates // 10
    args.world_model_updates = half if args.world_model_updates is None else args.world_model_updates
    args.warmup_updates = tenth if args.warmup_updates is None else args.warmup_updates
    args, device = resolve(args), dc.resolve_device(args.device)
    if args.width % args.heads:
        raise SystemExit(f"--heads {args.heads}: must divide --width {args.width}")
    data = dc.load_dataset(args.env, args.dataset, device)
    check_lengths(args, data)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(data.obs_dim, data.act_dim, data.family.horizon, args).to(device)
    agent.make_optimizer(args)
    step_fn = torch.compile(update) if args.compile else update
    episodes, all_lengths = data.episodes[..., :-1].flatten(0, 1), data.lengths.flatten()
    lengths = data.lengths[data.train_ids]  # [U, N]
    returns = torch.as_tensor(data.episode_returns[data.train_ids], device=device)
    best = returns.masked_fill(lengths == 0, -math.inf).topk(min(BEST + 1, data.min_episodes), 1).indices
    with Run(args, data, agent, generator, ("world_model", "policy")) as run:
        goal = target_returns(data, data.test_ids, args.target_return).mean().item()
        print(f"  target return ({args.target_return}): {goal:.1f}", flush=True)
        while run.going("world_model"):
            episode, step = draw_steps(data, args, generator)
            run.advance(update_world_model(agent, episodes, all_lengths, episode, step, args))
        agent.world_model.requires_grad_(False).zero_grad()  # frozen from here on, and for --eval-only
        if not run.stopping and not args.eval_only:
            sequences = read_dataset(agent, data)
        while run.going():
            window, prompt = draw_windows(sequences, best, lengths, args, generator)
            lr = args.lr * warm_up(run.step, args.warmup_updates)
            anneal(agent.opts[:1], lr, run.step / args.total_updates)
            run.advance(step_fn(agent, window, prompt, args))
        return run.finish()


# ---- main -------------------------------------------------------------------


def main(arguments=None):
    """Command line (list of str, by default the process's own); with --resume the stored arguments are the defaults."""
    cli = partial(tyro.cli, Args, description=__doc__.split("\n\n")[0], args=arguments)
    args = cli()
    train(cli(default=stored_args(args.resume)) if args.resume else args)


if __name__ == "__main__":
    main()
