"""Meta-DT: offline meta-reinforcement learning as conditional sequence modeling with world model disentanglement.

Wang, Zhang, Wu, Zhu, Zhao, Chen, NeurIPS 2024, https://arxiv.org/abs/2410.11448
official code https://github.com/NJU-RL/Meta-DT
A world model infers z_t from the last h transitions and predicts from it what differs between tasks, the reward or the
next state; so z is to depend on the task, and little on who acted. It is frozen, and a causal transformer with z_t in
every state token regresses the actions of the data, given the return that is still to come. Few-shot, a prompt stands
in front: the k steps of an earlier episode of the task that the world model predicts worst, hence what z is missing.

Phases: (1) the world model, in every update on --context-size steps of --meta-batch episodes;
        (2) the transformer on windows with z and prompts from the frozen world model, --meta-batch times as many as
            hold --batch-size transitions.

As in the official code z is part of the state token (paper: a token of its own), the encoder does not see s_t, the
reward's decoder sees s_(t+1) (paper: the reverse of both), and only the decoder of what differs between the tasks is
trained (paper: both, `--world-model-loss both`).

Deviations from the paper and from the official code:
  D1  Before the first step of an episode a context holds zeros, in training as at test (official: in training the end
      of the previous episode; at test z_0 = 0, then contexts of zeros until h steps are done).
  D2  The world model of the last update is kept (official: the best on the test tasks' data). Several steps of each
      episode train it (official: independent transitions).
  D3  Prompts are dropped with a probability, so that one network serves zero- and few-shot (official: none in the first
      updates, then always), and drawn anew in every update (official: once), from any episode of the task but the
      window's own, as the protocols give any (official: from three that are stored for the task; `--prompt-episodes
      best` draws from the best three others).
  D4  The prompt starts where the error of its k steps is largest, as in the paper; in training it is drawn in
      proportion to that error (official: drawn also at test, where the sum runs to the end of the episode, and errors
      of next observations mix raw and standardized ones).
  D5  The return to aim at is one number, known from the training tasks: the mean of their best quarters, easy on some
      tasks and out of reach on others; `--target-return task_max` is the official one, the best in the test task's own
      data, which no agent on a new task knows.
  D6  The learning rate is larger and falls to 0 in the second half, for trainings far shorter than the official ones;
      the weight decay is larger on Cheetah-vel's few episodes.
  D7  Windows are those of a rollout: the K steps up to a uniform one, early on the first K (official: from a uniform
      step on, so that few show how an episode starts, and those at its end are short).
  D8  At test the prompt is of an episode that the protocol gives, in `online` of one of the agent's own (official: of
      one of the best three of the last episodes of earlier evaluations, hence by other weights).
  D9  Observations are standardized and clipped for both networks (official: standardized, for the transformer alone).
      A fall ends an episode (official: nothing does).
  D10 Windows are of each task's best quarter of episodes, as pi_beta in the other scripts: on data of all phases the
      return to aim at hardly picks the good ones (official: of all episodes; `--episode-share 1`).

Run:     python meta_dt.py --env ant-dir
Closest to the paper, ant-dir: --meta-batch 128 --batch-size 20 --context-size 1 --lr 5e-5 --no-lr-decay
         --warmup-updates 10000 --total-updates 500000 --world-model-updates 4200000 --world-model-loss both
         --prompt-dropout 0.14 --target-return task_max --episode-share 1 --prompt-episodes best
No flag reaches: D1, the world model that is kept (D2), when prompts are dropped and drawn (D3), D4 in training, D7 to
         D9, z as a token, s_t in the encoder, a reward decoder without s_(t+1).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "meta_dt"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: bool = False  # compile the update with torch.compile (pays on a GPU, is slower on a CPU)
    total_updates: int = 8_000  # updates of the policy [gradient steps]
    log_every: int = 250  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation
    env: dc.EnvName = "ant-dir"  # task family
    dataset: str | None = None  # dataset file; by default datasets/{env}.npz beside this script
    eval_episodes: int = 2  # episodes per task of an evaluation during the training
    final_episodes: int = 10  # episodes per task of the last one, and with --eval-only
    meta_batch: int = 16  # tasks per update, drawn with replacement [tasks]
    batch_size: int = 32  # transitions per task and update [transitions]
    context_size: int = 64  # transitions of one episode that a task is inferred from in training [transitions]
    # method
    lr: float = 5e-4  # AdamW's learning rate of the transformer after the warm-up
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    warmup_updates: int | None = None
    """updates in which it rises linearly [gradient steps]; None = a tenth of --total-updates"""
    weight_decay: float | None = None  # AdamW's weight decay (D6); None = ENV_ARGS
    width: int = 128  # size of the transformer's tokens; its MLPs are four times as wide
    layers: int = 3  # blocks of the transformer
    heads: int = 1  # attention heads per block
    dropout: float = 0.1  # share of attention weights, residual updates and embedded tokens dropped in training
    window: int | None = None  # steps of an episode that the transformer sees (K) [steps]; None = ENV_ARGS
    return_scale: float | None = None  # divisor of the returns-to-go; None = ENV_ARGS
    target_return: float | Literal["train_top", "train_mean_max", "train_max", "task_max"] = "train_top"
    """return to aim at, unscaled: a number; train_top = mean return of a task's best quarter of episodes, mean over the
    training tasks; train_mean_max, train_max = a task's best return, mean or maximum over them; task_max = the best in
    the test task's own data, which is knowledge about it (D5)"""
    episode_share: float = 0.25
    """share of each task's episodes, of the best, that windows are cut from (D10); 1 = the paper's"""
    prompt_length: int | None = None  # steps of the prompt (k) [steps]; None = ENV_ARGS
    prompt_episodes: Literal["any", "best"] = "any"
    """which episodes give prompts, of the task's in training and of those that a protocol gives at test: any, or the
    best three (D3)"""
    prompt_select: Literal["argmax", "sample", "random", "last"] = "argmax"
    """where the prompt starts in its episode: largest error of the world model (in training as sample: the same start
    every time would be learned by heart), drawn in proportion to the error, anywhere, or as late as possible (D4)"""
    prompt_dropout: float = 0.25
    """share of training windows without a prompt; 1 = purely zero-shot, no prompt at test either (D3)"""
    world_model_updates: int | None = None
    """updates of the world model [gradient steps]; None = --total-updates, which at the default sizes means 1,024
    transitions per update of the transformer (official: 240 to 2,700)"""
    world_model_loss: Literal["reward", "state", "both"] | None = None
    """what the world model predicts; None = state where the dynamics differ between tasks, else reward"""
    world_model_lr: float = 1e-3  # Adam's learning rate of the world model
    context_horizon: int = 4  # transitions before a step that its z is inferred from (h) [steps]
    encoder_width: int = 128  # hidden units of the world model: GRU and decoders
    z_dim: int = 16  # size of the task latent


ENV_ARGS = {  # for arguments left at None: all families, then what those change whose name holds the key
    "": dict(window=20, prompt_length=5, return_scale=500.0, weight_decay=1e-4),
    "cheetah-vel": dict(weight_decay=2.0),  # with 1e-4 seven good episodes per task are learned by heart
    "point": dict(return_scale=10.0),
    "rand-params": dict(window=8, prompt_length=3),
}
MAY_BE_ZERO = {"world_model_updates", "warmup_updates", "weight_decay", "dropout", "prompt_dropout", "target_return"}
SHARES = ("dropout", "episode_share", "prompt_dropout")
RANGES = dict.fromkeys(SHARES, (0, 1)) | {"target_return": (-1_000_000, 1_000_000)}
EVAL_ONLY = {"target_return"}  # not of the training: may differ when a run is resumed

EMBED = 16  # size of an embedded observation, action or reward
CLIP, WORLD_MODEL_CLIP = 0.25, 1.0  # largest norms of the gradient
BEST = 3  # episodes that give prompts with --prompt-episodes best
CPU_ROWS = 50  # rows that act at once on a CPU: tensors of many more need memory anew at every step, which is slow

# ---- sequences --------------------------------------------------------------
#
# Episodes lie in tensors [E, H, ..]: the number `episode` of one in 0..E-1, `step` of a transition in 0..H-1. An
# episode of length n has steps 0..n-1; a length of 0 means that there is none.


class Window(NamedTuple):
    """K consecutive steps of each of B episodes."""

    rows: torch.Tensor  # [B, K, D], zeros outside the episode
    steps: torch.Tensor  # [B, K] within 0..H-1
    valid: torch.Tensor  # [B, K] True inside the episode

    def split(self, count):
        """-> list of Windows of `count` rows each, the last of what is left."""
        return [Window(*parts) for parts in zip(*(tensor.split(count) for tensor in self))]


def cut(rows, lengths, episode, start, count):
    """`count` steps from each `start`, the only padding there is: rows [E, H, D], lengths [E], episode [B], start [B],
    also negative -> Window of [B, count, ..]."""
    steps = start[:, None] + torch.arange(count, device=start.device)
    valid = (steps >= 0) & (steps < lengths[episode][:, None])
    steps = steps.clamp(0, rows.shape[1] - 1)
    return Window(rows[episode[:, None], steps] * valid[..., None], steps, valid)


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
        _, hidden = self.gru(torch.cat(parts, -1))  # [1, B, width] after the last step
        return self.head(hidden[0])


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
        self.reward = Decoder(*sizes, out_dim=1, sees_next=True) if loss != "state" else None
        self.state = Decoder(*sizes, out_dim=obs_dim, sees_next=False) if loss != "reward" else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.encoder.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def infer(self, rows, lengths, episode, step, horizon):
        """z before step [B] of episode [B], from its last `horizon` transitions alone; rows [E, H, >= obs_dim +
        act_dim + 1], lengths [E] -> z [B, z_dim]. Training, prompts and rollouts all go through here."""
        known = rows[..., : sum(self.encoder.sizes)]  # (obs, act, rew)
        return self.encoder(cut(known, lengths, episode, step - horizon, horizon).rows)  # [ours: D1]

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

    def forward(self, x, mask, dropout, wanted=slice(None)):
        """x [B, L, width], mask [B, 1, L, L] True = may attend -> [B, Q, width]: the Q tokens of the slice `wanted`, by
        default all. All are attended to; what nobody reads of the last block is not computed."""
        parts = [x.shape[-1], 2 * x.shape[-1]]
        (w_q, w_kv), (b_q, b_kv) = self.qkv.weight.split(parts), self.qkv.bias.split(parts)
        normed = self.norm_1(x)
        q = F.linear(normed[:, wanted], w_q, b_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        kv = F.linear(normed, w_kv, b_kv).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, heads, L, d]
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, :, wanted], dropout).transpose(1, 2).flatten(2)
        x = x[:, wanted] + F.dropout(self.project(attended), dropout, dropout > 0)
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

    def tokens(self, window):
        """Window of rows [B, K, 1 + obs_dim + z_dim + act_dim] -> tokens [B, 3K, width]."""
        rtg, obs, z, act = window.rows.split(self.sizes, -1)
        state = self.state(torch.cat([self.obs(obs), z], -1))
        tokens = torch.stack([self.rtg(rtg), state, self.act(act)], 2) + self.time(window.steps)[:, :, None]
        return self.norm(tokens.flatten(1, 2))

    def prompt_tokens(self, prompt):
        """The same for a prompt."""
        rtg, obs, _, act = prompt.rows.split(self.sizes, -1)
        tokens = torch.stack([self.prompt_rtg(rtg), self.prompt_obs(obs), self.prompt_act(act)], 2)
        return (tokens + self.prompt_time(prompt.steps)[:, :, None]).flatten(1, 2)

    def forward(self, window, prompt=None, dropout=0.0, last=False):
        """Windows of K and of k steps, rows as in Sequences -> actions [B, K, act_dim] in (-1, 1), each read from its
        state token, hence before its own action; last: of the last step alone, [B, 1, act_dim]."""
        tokens, valid = self.tokens(window), window.valid
        if prompt is not None:
            tokens = torch.cat([self.prompt_tokens(prompt), tokens], 1)
            valid = torch.cat([prompt.valid, valid], 1)
        valid = valid.repeat_interleave(3, 1)  # [B, L]
        place = torch.arange(valid.shape[1], device=valid.device)
        causal, itself = place[:, None] >= place, place[:, None] == place  # [L, L]
        mask = (causal & valid[:, None] | itself)[:, None]  # padding attends to itself: no row is left without a key
        x = F.dropout(tokens, dropout, dropout > 0)
        for block in self.blocks[:-1]:
            x = block(x, mask, dropout)
        wanted = slice(-2 if last else 1 - 3 * window.steps.shape[1], None, 3)  # of the window: places 1, 4, .. of 3K
        return torch.tanh(self.head(self.final_norm(self.blocks[-1](x, mask, dropout, wanted))))


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
    """World model, transformer, and the optimizers of the phases; `horizon` and `args` are for the adaptation."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, self.horizon, self.args = data.obs_dim, data.act_dim, data.family.horizon, args
        self.world_model = WorldModel(obs_dim, act_dim, args.z_dim, args.encoder_width, args.world_model_loss)
        self.world_model_opt = torch.optim.Adam(self.world_model.parameters(), args.world_model_lr, fused=True)
        self.transformer = Transformer(obs_dim, act_dim, self.horizon, args)
        params, lr = self.transformer.parameters(), torch.tensor(args.lr)  # a tensor: a compiled update reads it
        self.opt = torch.optim.AdamW(params, lr, weight_decay=args.weight_decay, fused=True)


# ---- update of the world model ----------------------------------------------


def draw_episodes(lengths, count, generator, share=1.0):
    """Uniform tasks, of each one of its first episodes, a `share` of them, rounded up: lengths [U, N], 0 = no episode,
    these come last -> task [count], number of the episode in its task [count]."""
    draw = torch.rand(2, count, device=lengths.device, generator=generator)
    task = (draw[0] * len(lengths)).long()
    return task, (draw[1] * (share * (lengths[task] > 0).sum(1)).ceil()).long()


def draw_steps(lengths, args, generator):
    """--context-size steps of one episode of each of --meta-batch tasks: lengths [U, N] -> episode, step, both [B]."""
    task, number = draw_episodes(lengths, args.meta_batch, generator)
    episode = (task * lengths.shape[1] + number).repeat_interleave(args.context_size)
    draw = torch.rand(len(episode), device=lengths.device, generator=generator)
    return episode, (draw * lengths.flatten()[episode]).long()


def update_world_model(agent, episodes, lengths, episode, step, args):
    """One step of the world model. episodes [E, H, ctx_dim], lengths [E], episode, step [B] -> dict of detached 0-d
    tensors."""
    model = agent.world_model
    z = model.infer(episodes, lengths, episode, step, args.context_horizon)
    loss = world_model_loss(model.residuals(episodes[episode, step], z))
    agent.world_model_opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), WORLD_MODEL_CLIP)
    agent.world_model_opt.step()
    return {
        "losses/world_model": loss.detach(),
        "stats/world_model_grad": norm,
        # of single steps, most of it within tasks
        "z/between_std": z.detach().std(0, correction=min(1, len(z) - 1)).mean(),
    }


# ---- update of the transformer ----------------------------------------------


class Sequences(NamedTuple):
    """Episodes as the transformer reads them."""

    rows: torch.Tensor  # [E, H, 1 + obs_dim + z_dim + act_dim]: scaled return-to-go, obs, z, act
    lengths: torch.Tensor  # [E]
    scores: torch.Tensor  # [E, J] of `window_scores`

    def cut(self, episode, start, count):
        return cut(self.rows, self.lengths, episode, start, count)


def read_episodes(agent, episodes, lengths):
    """episodes [E, H, ctx_dim], lengths [E] -> Sequences with z and prediction errors of the frozen world model."""
    args, model, (count, horizon) = agent.args, agent.world_model, episodes.shape[:2]
    number = torch.arange(count * horizon, device=episodes.device)
    with torch.no_grad():
        z = model.infer(episodes, lengths, number // horizon, number % horizon, args.context_horizon)
        z = z.unflatten(0, (count, horizon))
        errors = sum(error.abs().sum(-1) for error in model.residuals(episodes, z))  # [E, H]
    obs, act, rew, _ = episodes.split(model.sizes, -1)
    rtg = returns_to_go(rew[..., 0])[..., None] / args.return_scale
    scores = window_scores(errors, lengths, args.context_horizon, args.prompt_length)
    return Sequences(torch.cat([rtg, obs, z, act], -1), lengths, scores)


def read_tasks(agent, episodes, lengths):
    """As `read_episodes`, for episodes [U, N, H, ctx_dim], lengths [U, N], one task after the other to save memory."""
    parts = [read_episodes(agent, *task) for task in zip(episodes, lengths)]
    return Sequences(*(torch.cat(part) for part in zip(*parts)))


def rank_episodes(sequences, lengths):
    """Sequences of U * N episodes, lengths [U, N] -> [U, N], best first, numbered through all tasks."""
    returns = sequences.rows[:, 0, 0].view_as(lengths).masked_fill(lengths == 0, -math.inf)
    first = torch.arange(len(lengths), device=lengths.device) * lengths.shape[1]
    return first[:, None] + returns.argsort(1, descending=True)


def draw_rank(draw, count, args):
    """draw [B] uniform in [0, 1), count [B] episodes at hand -> rank [B] of the one that gives the prompt, 0 = best."""
    return (draw * (count.clamp(max=BEST) if args.prompt_episodes == "best" else count)).long()


def draw_windows(sequences, ranked, lengths, args, generator):
    """Windows of random ones of the best episodes, each with a prompt from another episode of its task: ranked [U, N]
    of `rank_episodes`, lengths [U, N] -> Windows of K and of k steps; a dropped prompt has no valid step."""
    count = args.meta_batch * math.ceil(args.batch_size / args.window)
    task, number = draw_episodes(lengths, count, generator, args.episode_share)
    episode = ranked[task, number]  # [ours: D10]
    draw = torch.rand(3, count, device=lengths.device, generator=generator)

    last = (draw[0] * sequences.lengths[episode]).long()
    window = sequences.cut(episode, (last - args.window + 1).clamp(min=0), args.window)  # [ours: D7]

    rank = draw_rank(draw[1], (lengths[task] > 0).sum(1) - 1, args)  # [ours: D3]
    rank += rank >= number  # the window's own episode, whose rank is number, is skipped
    other = ranked[task, rank]
    how = "sample" if args.prompt_select == "argmax" else args.prompt_select  # [ours: D4]
    prompt = sequences.cut(other, select(sequences.scores[other], how, generator), args.prompt_length)
    kept = draw[2] >= args.prompt_dropout  # [ours: D3]
    return window, prompt._replace(valid=prompt.valid & kept[:, None])


def warm_up(step, updates):
    """Factor on the learning rate in update `step` (from 0): linear to 1 over `updates`."""
    return min((step + 1) / max(updates, 1), 1.0)


def update(agent, window, prompt, args):
    """One step of the transformer. window, prompt: Windows of K and of k steps as of `draw_windows` -> dict of detached
    0-d tensors."""
    act = window.rows.split(agent.transformer.sizes, -1)[-1]
    loss = action_loss(agent.transformer(window, prompt, args.dropout), act, window.valid)
    agent.opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.transformer.parameters(), CLIP)
    agent.opt.step()
    return {"losses/actor": loss.detach(), "stats/actor_grad": norm}


# ---- adaptation -------------------------------------------------------------


def find_prompt(agent, context, mask):
    """context [R, n * H, ctx_dim], n whole episodes, mask [R, n * H] -> Window of k steps: of one of the row's episodes
    the part that the world model predicts worst. A row without a transition gets no valid step."""
    args = agent.args
    # the same prompts at every evaluation, another draw in every round
    generator = torch.Generator(context.device).manual_seed(args.seed + context.shape[1])
    episodes = context.unflatten(1, (-1, agent.horizon))  # [R, n, H, ctx_dim]
    lengths = mask.unflatten(1, (-1, agent.horizon)).sum(-1).long()  # [R, n]
    sequences = read_episodes(agent, episodes.flatten(0, 1), lengths.flatten())
    draw = torch.rand(len(context), device=context.device, generator=generator)
    rank = draw_rank(draw, (lengths > 0).sum(1), args)
    episode = rank_episodes(sequences, lengths).gather(1, rank[:, None])[:, 0]
    return sequences.cut(episode, select(sequences.scores[episode], args.prompt_select, generator), args.prompt_length)


def adapt(agent, context, mask, explore=False, *, targets):
    """Act on what was seen. context [R, K, ctx_dim], mask [R, K], whole episodes, of which one becomes the prompt; none
    without a transition; explore changes nothing; targets [1] or [tasks]: the return to aim at, where the rows lie
    task by task -> policy(obs [R, obs_dim], rew [R]) -> act [R, act_dim]; it keeps the history of one episode."""
    args, model, transformer = agent.args, agent.world_model, agent.transformer
    with_prompt = context.shape[1] > 0 and args.prompt_dropout < 1
    device, count, act_dim = context.device, len(context), transformer.sizes[-1]
    size = min(count, CPU_ROWS) if device.type == "cpu" else count
    prompts = find_prompt(agent, context, mask).split(size) if with_prompt else [None] * math.ceil(count / size)
    every = torch.arange(count, device=device)
    seen = torch.zeros(count, agent.horizon, sum(model.encoder.sizes), device=device)  # (obs, act, rew)
    rows = torch.zeros(count, agent.horizon, sum(transformer.sizes), device=device)  # as in Sequences
    rtg = targets.repeat_interleave(count // len(targets)) / args.return_scale
    t = 0

    def policy(obs, rew):
        nonlocal t, rtg
        if t > 0:
            seen[:, t - 1, -1] = rew
            rtg = rtg - rew / args.return_scale
        now = torch.full_like(every, t)
        z = model.infer(seen, now, every, now, args.context_horizon)
        rows[:, t, :-act_dim] = torch.cat([rtg[:, None], obs, z], -1)
        length = min(t + 1, args.window)
        windows = cut(rows, now + 1, every, now + 1 - length, length).split(size)
        act = torch.cat([transformer(*parts, last=True)[:, 0] for parts in zip(windows, prompts)])
        rows[:, t, -act_dim:] = act
        seen[:, t, :-1] = torch.cat([obs, act], -1)
        t += 1
        return act

    return policy


def target_returns(data, tasks, which):
    """Returns to aim at on `tasks` -> [1], the same for all, or [len(tasks)] with "task_max"; unscaled."""
    if not isinstance(which, str):
        return torch.tensor([which], dtype=torch.float, device=data.device)
    present = data.lengths.cpu() > 0  # [T, N]
    returns = torch.as_tensor(data.episode_returns).masked_fill(~present, -math.inf).sort(1, descending=True).values
    quarter = present.sum(1, keepdim=True) / 4  # [T, 1]; of five episodes the best two
    top = torch.where(torch.arange(present.shape[1]) < quarter, returns, 0).sum(1) / quarter[:, 0].ceil()
    best, train = returns[:, 0], data.train_ids
    targets = {"train_top": top[train].mean(), "train_mean_max": best[train].mean(), "train_max": best[train].max()}
    return targets.get(which, best[tasks]).reshape(-1).float().to(data.device)  # [ours: D5]


def embed(agent, context, mask):
    """context [R, K, ctx_dim] of one episode, mask [R, K] -> z [R, z_dim]: the mean of z after each transition from the
    h-th on, when a context is complete; of a shorter episode z after its last one."""
    horizon, means = agent.args.context_horizon, []
    step = torch.arange(context.shape[1] + 1, device=context.device)  # z before the last of them is after the episode
    for episode, length in zip(context, mask.sum(1).long()):  # one after the other to save memory
        with torch.no_grad():
            z = agent.world_model.infer(episode[None], length[None], torch.zeros_like(step), step, horizon)
        counts = (step >= length.clamp(max=horizon)) & (step <= length)
        means.append(torch.where(counts[:, None], z, 0).sum(0) / counts.sum())
    return torch.stack(means)


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns and quality of z -> dict tag -> float. The rounds of the online protocol are the shots: no prompt in the
    first, then prompts from this agent's own episodes."""
    results = {}
    for protocol in protocols:
        tasks = data.train_ids[:10] if protocol == "train" else data.test_ids
        act = partial(adapt, agent, targets=target_returns(data, tasks, args.target_return))
        results |= dc.evaluate(data, act, (protocol,), episodes)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def check_sizes(args, data):
    """One line if the sizes do not fit each other or the data."""
    if args.width % args.heads:
        raise SystemExit(f"--heads {args.heads}: must divide --width {args.width}")
    if args.context_horizon + args.prompt_length > data.family.horizon:
        what = f"--prompt-length {args.prompt_length} and --context-horizon {args.context_horizon}"
        raise SystemExit(f"{what}: together more than the {data.family.horizon} steps of an episode of {args.env}")
    if data.min_episodes < 2:
        raise SystemExit(f"{data.path}: prompts need two episodes per training task; collect more with --episodes")


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    if args.world_model_loss is None:
        args.world_model_loss = "state" if dc.FAMILIES[args.env].dynamics_vary else "reward"
    if args.world_model_updates is None:
        args.world_model_updates = args.total_updates
    if args.warmup_updates is None:
        args.warmup_updates = args.total_updates // 10
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO, RANGES)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    check_sizes(args, data)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    step_fn = torch.compile(update) if args.compile else update
    episodes = data.episodes[data.train_tasks][..., :-1]  # [U, N, H, ctx_dim]
    lengths = data.lengths[data.train_tasks]  # [U, N]
    phases = ("world_model", "policy")
    with dc.Run(args, data, agent, generator, evaluate_all, embed, phases, free=EVAL_ONLY) as run:
        goal = target_returns(data, data.test_ids, args.target_return).mean().item()
        print(f"  target return ({args.target_return}): {goal:.1f}", flush=True)
        while run.going("world_model"):
            episode, step = draw_steps(lengths, args, generator)
            run.advance(update_world_model(agent, episodes.flatten(0, 1), lengths.flatten(), episode, step, args))
        agent.world_model.requires_grad_(False).zero_grad()  # frozen from here on
        if not run.stopping and not args.eval_only:
            sequences = read_tasks(agent, episodes, lengths)
            ranked = rank_episodes(sequences, lengths)
        while run.going():
            window, prompt = draw_windows(sequences, ranked, lengths, args, generator)
            dc.set_lr(agent.opt, args.lr * warm_up(run.step, args.warmup_updates) * run.decay)  # [ours: D6]
            run.advance(step_fn(agent, window, prompt, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
