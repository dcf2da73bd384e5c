"""Meta-DT: offline meta-reinforcement learning as conditional sequence modeling with world model disentanglement.

Wang, Zhang, Wu, Zhu, Zhao, Chen, NeurIPS 2024, https://arxiv.org/abs/2410.11448. Official code: github NJU-RL/Meta-DT.
A world model compresses the last transitions into z, which predicts what differs between tasks; then it is frozen.
A causal transformer clones the data's actions, given z and the return still to come. A prompt precedes its window: the
part of another episode of the task that the world model predicts worst, because z misses it.
Symbols: B windows of K steps, prompts of k steps, contexts of h transitions.
  z [B, K, z_dim] task vector, one per step     g [B, K, 1] return-to-go: the sum of all rewards from a step on
  tokens [B, 3K, width]: g, (s, z), a of each step     prompt tokens [B, 3k, width]: g, s, a
One update of the world model (1, 2: the first phase) or of the transformer (3, 4: the second phase):
  1 infer    z = GRU over the h transitions (s, a, r) before a step
  2 predict  (decoder(z, a, s, s') - r)^2 or |decoder(z, a, s) - s'|^2 trains GRU and decoder
  3 draw     a window from one of the best episodes; a prompt, where the errors of 2 are large, from another episode
  4 regress  |transformer(prompt, window) - a|^2 trains the transformer
Differences from the paper and the official code, tagged in the code:
  D1  a context has zeros before its episode (code: the previous episode; at test only zeros until h steps are done)
  D2  the last world model, of 8,000 updates with 16 x 64 steps (code: the best on test tasks, of 4,200,000 with 128)
  D3  --prompt-dropout 0.25 --prompt-episodes any, drawn anew (code: first none, then always; three stored, drawn once)
  D4  the prompt's start is drawn by its error in training, the argmax at test (paper: the argmax; code: drawn)
  D5  --target-return train_top, known from the training tasks (code: task_max, from the test task's own data)
  D6  --lr 5e-4 --lr-decay, 8,000 updates of 32 windows (code: 6e-6 to 1e-4, no decay, 100,000 to 500,000 of 128)
  D7  A window holds the K steps up to a uniformly drawn step (code: the K steps from such a step on)
  D8  at test the prompt is of an episode that the protocol gives (code: of the best own episodes, by older weights)
  D9  both networks see standardized observations (code: the transformer); a fall ends an episode (code: never)
  D10 windows are of each task's best episodes: --episode-share 0.25 (code: 1)
  D11 as the code: z within the state token, no s in the GRU, s' in the reward's decoder, one decoder (paper: reverse)
  D12 --weight-decay 2 in cheetah-vel (code: 1e-4)
Closest to the paper, ant-dir: --meta-batch 128 --batch-size 20 --context-size 1 --lr 5e-5 --no-lr-decay
  --warmup-updates 10000 --total-updates 500000 --world-model-updates 4200000 --world-model-loss both --episode-share 1
  --prompt-dropout 0.14 --prompt-episodes best --target-return task_max. No flag reaches D1, D4, D7 to D9, the rest of
  D2, D3 and D11.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
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
    total_updates: int = 8_000  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation
    env: dc.EnvName = "ant-dir"  # task family
    dataset: str | None = None  # dataset file; by default datasets/{env}.npz beside this script
    eval_episodes: int = 2  # episodes per task in an evaluation during training
    final_episodes: int = 10  # episodes per task in the last evaluation, and with --eval-only
    meta_batch: int = 16  # tasks per update, drawn with replacement [tasks]
    batch_size: int = 32
    """transitions per task and update [transitions]: --meta-batch x (--batch-size / K) windows per update"""
    context_size: int = 64  # transitions per episode and update of the world model [transitions]
    # method
    lr: float = 5e-4  # learning rate of the transformer after the warm-up
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    warmup_updates: int | None = None
    """updates in which it rises linearly [gradient steps]; None = a tenth of --total-updates"""
    weight_decay: float | None = None  # weight decay of the transformer
    width: int = 128  # size of the transformer's tokens; its MLPs are four times as wide
    layers: int = 3  # blocks of the transformer
    heads: int = 1  # attention heads per block
    dropout: float = 0.1  # share of attention weights, residual updates and tokens that training drops
    window: int | None = None  # steps of an episode that the transformer sees (K) [steps]
    return_scale: float | None = None  # divisor of the returns-to-go
    target_return: float | Literal["train_top", "task_max"] = "train_top"
    """first return-to-go at test, in units of the reward: a number; train_top = the mean return of the training tasks'
    best quarters; task_max = the best return in the test task's own data"""
    episode_share: float = 0.25  # share of each task's episodes, best first, that windows come from
    prompt_length: int | None = None  # steps of the prompt (k) [steps]
    prompt_episodes: Literal["any", "best"] = "any"  # episodes that give prompts: any, or the task's best three
    prompt_dropout: float = 0.25  # share of training windows without a prompt; 1 = zero-shot, no prompt at test either
    world_model_updates: int | None = None  # updates of the world model [gradient steps]; None = --total-updates
    world_model_loss: Literal["reward", "state", "both"] | None = None
    """what the world model predicts; None = state where the dynamics differ between tasks, else reward"""
    world_model_lr: float = 1e-3  # learning rate of the world model
    context_horizon: int = 4  # transitions that z is inferred from (h) [steps]
    encoder_width: int = 128  # hidden units of the world model
    z_dim: int = 16  # size of the task vector


ENV_DEFAULTS = {  # for arguments left at None: all families, then changes for families whose name holds the key
    "": dict(window=20, prompt_length=5, return_scale=500.0, weight_decay=1e-4),
    "cheetah-vel": dict(weight_decay=2.0),  # [ours: D12]
    "point": dict(return_scale=10.0),
    "rand-params": dict(window=8, prompt_length=3),
}
EVAL_ONLY = {"target_return"}  # does not shape the training: a resumed run may change it

EMBED = 16  # size of an embedded observation, action or reward
CLIP, WORLD_MODEL_CLIP = 0.25, 1.0  # largest norms of the gradients
BEST = 3  # episodes that give prompts with --prompt-episodes best

# ---- sequences --------------------------------------------------------------
#
# E episodes lie in tensors [E, H, ..]. An episode of length n has the steps 0 to n - 1; length 0 means no episode.
# `episode` is an index 0 to E - 1. U tasks with N episodes each are E = U * N episodes, one task after the other.


class Window(NamedTuple):
    """K consecutive steps of each of B episodes."""

    rows: torch.Tensor  # [B, K, D], zeros outside the episode
    steps: torch.Tensor  # [B, K] number of the step in its episode, 0 to H - 1
    valid: torch.Tensor  # [B, K] True inside the episode


def cut(rows, lengths, episode, start, count):
    """Cut `count` steps from `start` on: rows [E, H, D], lengths [E], episode [B], start [B], also negative
    -> Window [B, count, ..]. Contexts are padded before the episode, windows after it."""
    steps = start[:, None] + torch.arange(count, device=start.device)
    valid = (steps >= 0) & (steps < lengths[episode][:, None])
    steps = steps.clamp(0, rows.shape[1] - 1)
    return Window(rows[episode[:, None], steps] * valid[..., None], steps, valid)


def returns_to_go(rew):
    """rew [.., H] -> sum of the rewards from each step to the end [.., H]."""
    return rew.flip(-1).cumsum(-1).flip(-1)


def prompt_scores(errors, lengths, history, count):
    """Sum the world model's errors [E, H] over `count` steps from every start: lengths [E] -> [E, H - count + 1].
    0 = no prompt can start here: it would leave the episode, or z still lacks some of its `history` transitions."""
    scores = errors.unfold(1, count, 1).sum(-1)  # [paper] complementary prompt
    start = torch.arange(scores.shape[1], device=errors.device)
    return scores * ((start >= history) & (start <= lengths[:, None] - count))


# ---- networks ---------------------------------------------------------------


class Encoder(nn.Module):
    """Task vector z(context): a GRU over the last h transitions."""

    def __init__(self, obs_dim, act_dim, z_dim, width):
        super().__init__()
        self.sizes = [obs_dim, act_dim, 1]
        self.embed = nn.ModuleList([nn.Linear(size, EMBED) for size in self.sizes])
        self.gru = nn.GRU(len(self.sizes) * EMBED, width, batch_first=True)
        self.head = nn.Linear(width, z_dim)

    def forward(self, context):
        """context [B, h, obs_dim + act_dim + 1], zeros before the episode -> z [B, z_dim]."""
        parts = [layer(part).relu() for layer, part in zip(self.embed, context.split(self.sizes, -1))]
        _, hidden = self.gru(torch.cat(parts, -1))  # [1, B, width] after the last step
        return self.head(hidden[0])


class Decoder(nn.Module):
    """Prediction of a transition's reward or next observation."""

    def __init__(self, obs_dim, act_dim, z_dim, width, out_dim, sees_next):
        super().__init__()
        self.obs, self.act = nn.Linear(obs_dim, EMBED), nn.Linear(act_dim, EMBED)
        layers = [nn.Linear((2 + sees_next) * EMBED + z_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, out_dim))

    def forward(self, z, act, *obs):
        """z [.., z_dim], act [.., act_dim], one or two observations [.., obs_dim] -> [.., out_dim]."""
        return self.net(torch.cat([*(self.obs(o).relu() for o in obs), self.act(act).relu(), z], -1))


class WorldModel(nn.Module):
    """The encoder, and decoders of the reward (loss "reward"), of the next observation ("state"), or both."""

    def __init__(self, obs_dim, act_dim, z_dim, width, loss):
        super().__init__()
        sizes = (obs_dim, act_dim, z_dim, width)
        self.sizes = [obs_dim, act_dim, 1, obs_dim]
        self.encoder = Encoder(*sizes)
        self.reward = Decoder(*sizes, out_dim=1, sees_next=True) if loss != "state" else None
        self.state = Decoder(*sizes, out_dim=obs_dim, sees_next=False) if loss != "reward" else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.encoder.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def infer(self, rows, lengths, episode, step, history):
        """z before step [B] of episode [B], from its last `history` transitions: rows [E, H, obs_dim + act_dim + 1 or
        more], lengths [E] -> z [B, z_dim]."""
        known = rows[..., : sum(self.encoder.sizes)]  # (s, a, r)
        return self.encoder(cut(known, lengths, episode, step - history, history).rows)  # [ours: D1]

    def errors(self, rows, z):
        """rows [.., ctx_dim], z [.., z_dim] -> list of prediction errors: reward [.., 1], next_obs [.., obs_dim]."""
        obs, act, rew, next_obs = rows.split(self.sizes, -1)
        errors = []
        if self.reward is not None:
            errors.append(self.reward(z, act, obs, next_obs) - rew)
        if self.state is not None:
            errors.append(self.state(z, act, obs) - next_obs)
        return errors


class Block(nn.Module):
    """Attention, then an MLP; each acts on normalized tokens and is added to them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.query, self.key_value, self.project, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask, dropout, wanted=slice(None)):
        """x [B, L, width], mask [B, 1, L, L] True = may attend -> [B, Q, width], the Q tokens in the slice `wanted`.
        They attend to all L tokens. The last block computes only the tokens that are read."""
        normed = self.norm_1(x)
        q = self.query(normed[:, wanted]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        kv = self.key_value(normed).unflatten(-1, (2, self.heads, -1))  # [B, L, 2, heads, d]
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, heads, L, d]
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, :, wanted], dropout).transpose(1, 2).flatten(2)
        x = x[:, wanted] + F.dropout(self.project(attended), dropout)
        return x + F.dropout(self.down(self.up(self.norm_2(x)).relu()), dropout)


class Transformer(nn.Module):
    """Decision transformer with three tokens per step: return-to-go, state with z, action. The position of a token is
    the number of its step in the episode. The prompt has its own embeddings and no z."""

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
        state = self.state(torch.cat([self.obs(obs), z], -1))  # [code: D11]
        tokens = torch.stack([self.rtg(rtg), state, self.act(act)], 2) + self.time(window.steps)[:, :, None]
        return self.norm(tokens.flatten(1, 2))

    def prompt_tokens(self, prompt):
        """The same for a prompt -> [B, 3k, width]."""
        rtg, obs, _, act = prompt.rows.split(self.sizes, -1)
        tokens = torch.stack([self.prompt_rtg(rtg), self.prompt_obs(obs), self.prompt_act(act)], 2)
        return (tokens + self.prompt_time(prompt.steps)[:, :, None]).flatten(1, 2)

    def forward(self, window, prompt=None, dropout=0.0, last=False):
        """Windows of K and of k steps, rows as in Sequences -> actions [B, K, act_dim] in (-1, 1), each read from its
        state token, so before its own action token. last: only the last step's, [B, 1, act_dim]."""
        tokens, valid = self.tokens(window), window.valid
        if prompt is not None:
            tokens = torch.cat([self.prompt_tokens(prompt), tokens], 1)
            valid = torch.cat([prompt.valid, valid], 1)
        valid = valid.repeat_interleave(3, 1)  # [B, L]
        place = torch.arange(valid.shape[1], device=valid.device)
        causal, itself = place[:, None] >= place, place[:, None] == place  # [L, L]
        mask = (causal & valid[:, None] | itself)[:, None]  # padding attends to itself, so that no softmax is empty
        x = F.dropout(tokens, dropout)
        for block in self.blocks[:-1]:
            x = block(x, mask, dropout)
        states = slice(-2 if last else 1 - 3 * window.steps.shape[1], None, 3)  # state tokens of the window
        return torch.tanh(self.head(self.final_norm(self.blocks[-1](x, mask, dropout, states))))


# ---- losses -----------------------------------------------------------------


def world_model_loss(errors):
    """List of prediction errors [.., dim] -> scalar: the sum of their mean squares."""
    return sum(error.pow(2).mean() for error in errors)


def action_loss(prediction, act, valid):
    """prediction, act [B, K, act_dim], valid [B, K] -> scalar: mean square over the valid steps."""
    error = (prediction - act).pow(2).mean(-1)
    return torch.where(valid, error, 0).sum() / valid.sum()


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """World model, transformer, and the optimizers of the two phases."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, self.horizon, self.args = data.obs_dim, data.act_dim, data.family.horizon, args
        self.world_model = WorldModel(obs_dim, act_dim, args.z_dim, args.encoder_width, args.world_model_loss)
        self.transformer = Transformer(obs_dim, act_dim, self.horizon, args)
        self.world_model_opt = torch.optim.Adam(self.world_model.parameters(), args.world_model_lr, fused=True)
        weights = self.transformer.parameters()
        self.opt = torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay, fused=True)


# ---- update of the world model ----------------------------------------------


def best_first(agent, episodes, lengths):
    """Sort each task's episodes by their return: episodes [U, N, H, ctx_dim], lengths [U, N] -> the same, the best
    episodes first, missing ones last."""
    _, _, rew, _ = episodes.split(agent.world_model.sizes, -1)
    order = rew.sum((2, 3)).masked_fill(lengths == 0, -math.inf).argsort(1, descending=True)  # [U, N]
    return episodes.take_along_dim(order[..., None, None], 1), lengths.gather(1, order)


def draw_episodes(lengths, count, generator, share=1.0):
    """Draw uniform tasks, and for each one of the first `share` of its episodes, rounded up: lengths [U, N]
    -> task [count], number of the episode in its task [count]."""
    draw = torch.rand(2, count, device=lengths.device, generator=generator)
    task = (draw[0] * len(lengths)).long()
    present = (lengths[task] > 0).sum(1)
    return task, (draw[1] * (share * present).ceil()).long()


def draw_steps(lengths, args, generator):
    """Draw --context-size steps from one episode of each of --meta-batch tasks: lengths [U, N] -> episode, step, both
    [B]."""
    task, number = draw_episodes(lengths, args.meta_batch, generator)
    episode = (task * lengths.shape[1] + number).repeat_interleave(args.context_size)
    draw = torch.rand(len(episode), device=lengths.device, generator=generator)
    return episode, (draw * lengths.flatten()[episode]).long()


def update_world_model(agent, episodes, lengths, episode, step, args):
    """One step of the world model. episodes [E, H, ctx_dim], lengths [E], episode, step [B] -> dict of detached 0-d
    tensors."""
    model = agent.world_model

    # 1 infer
    z = model.infer(episodes, lengths, episode, step, args.context_horizon)

    # 2 predict
    agent.world_model_opt.zero_grad()
    loss = world_model_loss(model.errors(episodes[episode, step], z))
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), WORLD_MODEL_CLIP)
    agent.world_model_opt.step()

    # metrics
    return {
        "losses/world_model": loss.detach(),
        "stats/world_model_grad": grad_norm,
        "z/between_std": z.detach().std(0, correction=min(1, len(z) - 1)).mean(),  # over steps, also of one task
    }


# ---- update of the transformer ----------------------------------------------


class Sequences(NamedTuple):
    """Episodes as the transformer reads them."""

    rows: torch.Tensor  # [E, H, 1 + obs_dim + z_dim + act_dim]: scaled return-to-go, obs, z, act
    lengths: torch.Tensor  # [E]
    scores: torch.Tensor  # [E, J] of `prompt_scores`

    def cut(self, episode, start, count):
        return cut(self.rows, self.lengths, episode, start, count)


def read_episodes(agent, episodes, lengths):
    """Add z, returns-to-go and prediction errors, by the frozen world model: episodes [U, N, H, ctx_dim],
    lengths [U, N] -> Sequences of U * N episodes."""
    args, model, parts = agent.args, agent.world_model, []
    count, horizon = episodes.shape[1:3]
    number = torch.arange(count, device=episodes.device).repeat_interleave(horizon)  # each step of each episode
    step = torch.arange(horizon, device=episodes.device).repeat(count)
    for rows, length in zip(episodes, lengths):  # one task at a time, to save memory
        with torch.no_grad():
            z = model.infer(rows, length, number, step, args.context_horizon).unflatten(0, (count, horizon))
            errors = sum(error.abs().sum(-1) for error in model.errors(rows, z))  # [N, H]
        obs, act, rew, _ = rows.split(model.sizes, -1)
        rtg = returns_to_go(rew[..., 0])[..., None] / args.return_scale
        scores = prompt_scores(errors, length, args.context_horizon, args.prompt_length)
        parts.append(Sequences(torch.cat([rtg, obs, z, act], -1), length, scores))
    return Sequences(*(torch.cat(part) for part in zip(*parts)))


def draw_number(draw, count, args):
    """draw [B] uniform in [0, 1), count [B] episodes of the task -> number [B] of the one that gives the prompt."""
    return (draw * (count.clamp(max=BEST) if args.prompt_episodes == "best" else count)).long()


def draw_windows(sequences, lengths, args, generator):
    """Draw windows, each with a prompt from another episode of its task: sequences and lengths [U, N], best episodes
    first -> Windows of K and of k steps; a dropped prompt has no valid step."""
    # 3 draw
    count, per_task = args.meta_batch * math.ceil(args.batch_size / args.window), lengths.shape[1]
    task, number = draw_episodes(lengths, count, generator, args.episode_share)  # [ours: D10]
    draw = torch.rand(3, count, device=lengths.device, generator=generator)

    episode = task * per_task + number
    last = (draw[0] * sequences.lengths[episode]).long()
    window = sequences.cut(episode, (last - args.window + 1).clamp(min=0), args.window)  # [ours: D7]

    other = draw_number(draw[1], (lengths[task] > 0).sum(1) - 1, args)
    other = task * per_task + other + (other >= number).long()  # skips the window's own episode
    scores = sequences.scores[other]
    race = scores / torch.empty_like(scores).exponential_(generator=generator)
    start = race.argmax(1)  # a draw in proportion to the scores, by an exponential race  [ours: D4]
    prompt = sequences.cut(other, start, args.prompt_length)
    kept = draw[2] >= args.prompt_dropout  # [ours: D3]
    return window, prompt._replace(valid=prompt.valid & kept[:, None])


def update(agent, window, prompt, args):
    """One step of the transformer. window, prompt: Windows of K and of k steps as of `draw_windows` -> dict of detached
    0-d tensors."""
    # 4 regress
    agent.opt.zero_grad()
    act = window.rows.split(agent.transformer.sizes, -1)[-1]
    loss = action_loss(agent.transformer(window, prompt, args.dropout), act, window.valid)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.transformer.parameters(), CLIP)
    agent.opt.step()

    # metrics
    return {"losses/actor": loss.detach(), "stats/actor_grad": grad_norm}


# ---- adaptation -------------------------------------------------------------


def find_prompt(agent, context, mask):
    """context [R, n * H, ctx_dim] of n whole episodes, mask [R, n * H] -> Window of k steps: from one of the row's
    episodes, the part that the world model predicts worst. A row without a transition gets no valid step."""
    args = agent.args
    # every evaluation draws the same prompts, every round of an evaluation others
    generator = torch.Generator(context.device).manual_seed(args.seed + context.shape[1])
    episodes = context.unflatten(1, (-1, agent.horizon))  # [R, n, H, ctx_dim]
    lengths = mask.unflatten(1, (-1, agent.horizon)).sum(-1).long()  # [R, n]
    episodes, lengths = best_first(agent, episodes, lengths)
    sequences = read_episodes(agent, episodes, lengths)
    draw = torch.rand(len(context), device=context.device, generator=generator)
    number = draw_number(draw, (lengths > 0).sum(1), args)
    episode = torch.arange(len(context), device=context.device) * lengths.shape[1] + number
    return sequences.cut(episode, sequences.scores[episode].argmax(1), args.prompt_length)  # [paper] where errors peak


def adapt(agent, context, mask, explore=False, *, targets):
    """Choose a prompt from the context [R, K, ctx_dim], mask [R, K], of whole episodes, and act; explore changes
    nothing. targets [1] or [tasks]: first return-to-go; the rows lie task by task
    -> policy(obs [R, obs_dim], rew [R]) -> act [R, act_dim], for one episode, whose history it keeps."""
    args, model, transformer = agent.args, agent.world_model, agent.transformer
    device, count, act_dim = context.device, len(context), transformer.sizes[-1]
    with_prompt = context.shape[1] > 0 and args.prompt_dropout < 1
    prompt = find_prompt(agent, context, mask) if with_prompt else None  # [ours: D8]
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
        first = max(0, t + 1 - args.window)
        steps = torch.arange(first, t + 1, device=device).expand(count, -1)
        window = Window(rows[:, first : t + 1], steps, torch.ones_like(steps, dtype=torch.bool))
        act = transformer(window, prompt, last=True)[:, 0]
        rows[:, t, -act_dim:] = act
        seen[:, t, :-1] = torch.cat([obs, act], -1)
        t += 1
        return act

    return policy


def target_returns(data, tasks, which):
    """First return-to-go on `tasks`, in units of the reward -> [1], the same for all, or [len(tasks)] with task_max."""
    returns = [np.sort(row[:count])[::-1] for row, count in zip(data.episode_returns, data.present)]  # best first
    if which == "train_top":  # [ours: D5]
        goals = [np.mean([returns[i][: math.ceil(len(returns[i]) / 4)].mean() for i in data.train_ids])]
    else:
        goals = [returns[i][0] for i in tasks] if which == "task_max" else [which]
    return torch.tensor(goals, dtype=torch.float, device=data.device)


def embed(agent, context, mask):
    """context [R, K, ctx_dim] of one episode, mask [R, K] -> z [R, z_dim]: the mean of z from the h-th transition on,
    when a context is complete; z after the last transition of a shorter episode."""
    history, means = agent.args.context_horizon, []
    step = torch.arange(context.shape[1] + 1, device=context.device)  # z before step n is z after n transitions
    for episode, length in zip(context, mask.sum(1).long()):  # one at a time, to save memory
        with torch.no_grad():
            z = agent.world_model.infer(episode[None], length[None], torch.zeros_like(step), step, history)
        complete = (step >= length.clamp(max=history)) & (step <= length)
        means.append(torch.where(complete[:, None], z, 0).sum(0) / complete.sum())
    return torch.stack(means)


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns and quality of z -> dict tag -> float. In `online` the first round has no prompt; later rounds have
    prompts from this agent's own episodes."""
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
    if not 0 < args.episode_share <= 1:
        raise SystemExit(f"--episode-share {args.episode_share}: must be above 0 and at most 1")
    if args.context_horizon + args.prompt_length > data.family.horizon:
        what = f"--prompt-length {args.prompt_length} and --context-horizon {args.context_horizon}"
        raise SystemExit(f"{what}: together more than the {data.family.horizon} steps of an episode of {args.env}")
    if data.min_episodes < 2:
        raise SystemExit(f"{data.path}: prompts need two episodes per training task; collect more with --episodes")


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    if args.world_model_updates is None:
        args.world_model_updates = args.total_updates
    if args.warmup_updates is None:
        args.warmup_updates = max(1, args.total_updates // 10)
    if args.world_model_loss is None:
        args.world_model_loss = {True: "state", False: "reward", None: "both"}[dc.family_of(args.env).dynamics_vary]
    args = dc.resolve(args, ENV_DEFAULTS)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    check_sizes(args, data)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    episodes = data.episodes[data.train_tasks][..., : data.ctx_dim]  # [U, N, H, ctx_dim]  [ours: D9]
    episodes, lengths = best_first(agent, episodes, data.lengths[data.train_tasks])
    with dc.Run(args, data, agent, generator, ("world_model", "policy"), EVAL_ONLY) as run:
        goal = target_returns(data, data.test_ids, args.target_return).mean().item()
        print(f"  target return ({args.target_return}): {goal:.1f}", flush=True)
        for step in run.updates("world_model"):
            episode, place = draw_steps(lengths, args, generator)
            metrics = update_world_model(agent, episodes.flatten(0, 1), lengths.flatten(), episode, place, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
        agent.world_model.requires_grad_(False)  # [ours: D2]
        sequences = read_episodes(agent, episodes, lengths)
        for step in run.updates():
            window, prompt = draw_windows(sequences, lengths, args, generator)
            dc.set_lr(agent.opt, args.lr * min(1, step / args.warmup_updates) * run.decay)  # [ours: D6]
            metrics = update(agent, window, prompt, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
