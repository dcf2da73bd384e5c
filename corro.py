"""CORRO: robust task representations for offline meta-reinforcement learning via contrastive learning.

Yuan, Lu, ICML 2022, arXiv 2206.10442.
Single transitions are embedded so that those of one task lie together, while the negatives keep the query's own
(s, a) and change only (r, s'): what the behavior policy did cannot tell them apart. The embedding is then frozen; an
attention over the context's transitions, trained by the critic's loss, aggregates it to z.

Phases: (1) a conditional VAE p(r, s' | s, a) on all training tasks, only for --negatives generative;
        (2) the transition encoder by InfoNCE; (3) aggregator, critics and policy.
Negatives: reward      the query with noise on its reward (tasks that differ in the reward)
           generative  the query with (r, s') drawn from the VAE (tasks that differ in the dynamics)
           none        real transitions of random training tasks

Deviations from the paper and from the official code:
  D1  The VAE sees training tasks only (the official one also the test tasks); phases have fixed numbers of updates.
  D2  By default the policy is regularized towards a behavior policy fitted to the data, as in the other scripts;
      the official code is plain SAC, here `--backbone sac`.
  D3  Tasks are drawn anew in every update, a training context with replacement from one episode (official: the whole
      one). Observations are standardized.
  D4  Time limits are no terminations, falls are (official: neither).
  D5  All losses of a step use the parameters from before the step.
  D6  The policy is the fitted behavior policy plus a learned shift of mean and log_std. As two networks
      of their own, they differed by 0.6 nats at any weight.
  D7  Layer normalization in critics and policies; the learning rate falls to 0 in the second half. Sizes of the
      transition encoder and of z are those of focal.py (official: 64 to 128 wide, z of 5 to 40).
  D8  The noise of --negatives reward is relative to the spread of the rewards (official: 0.5 whatever they are, 1.8
      times the spread in point-robot, but a third of it in Ant-Dir, where the encoder collapses to a constant).

Run:     python corro.py --env ant-dir
Closest to the paper: --backbone sac --gamma 0.99 --reward-scale 1 --batch-size 256 --context-size 200
         --encoder-width 64 --z-dim 5 --lr 3e-4 --encoder-lr 3e-4 --total-updates 200000
"""

import copy
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
    exp_name: str = "corro"
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
    gamma: float | None = None
    """discount; None = ENV_ARGS"""
    reward_scale: float | None = None
    """factor on the rewards in all losses; None = ENV_ARGS"""
    lr: float = 1.2e-3
    """Adam's learning rate of all networks in the first half of the training; then it falls linearly to 0"""
    tau: float = 0.005
    """rate at which the target networks follow"""
    width: int = 256
    """hidden units of policy and critics, two layers"""
    encoder_width: int = 200
    """hidden units of the encoder, two layers"""
    z_dim: int | None = None
    """size of the task latent; None = ENV_ARGS"""
    negatives: Literal["reward", "generative", "none"] | None = None
    """what a query is told apart from; None = generative where the dynamics differ between tasks, else reward"""
    num_negatives: int = 16
    """negatives per query"""
    num_queries: int = 64
    """queries per update of the encoder [transitions]"""
    temperature: float = 0.1
    """of the similarities in InfoNCE"""
    reward_noise: float = 2.0
    """noise of --negatives reward [standard deviations of the reward in the training data] (D8)"""
    encoder_updates: int | None = None
    """updates of the transition encoder [gradient steps]; None = as many as --total-updates"""
    cvae_updates: int | None = None
    """updates of the VAE [gradient steps]; None = half of --total-updates"""
    encoder_lr: float = 1.2e-3
    """Adam's learning rate of the transition encoder and of the VAE"""
    cvae_width: int = 128
    """hidden units of the VAE, one layer"""
    cvae_dim: int | None = None
    """size of the VAE's latent; None = ENV_ARGS"""
    cvae_kl_weight: float = 0.2
    """weight of the VAE's KL term"""
    cvae_batch_size: int = 256
    """transitions per update of the VAE [transitions]"""
    backbone: Literal["brac", "sac"] = "brac"
    """regularized towards the behavior policy, or plain SAC as in the official code (D2)"""
    entropy_weight: float = 0.2
    """weight of the policy's entropy with --backbone sac"""
    brac_alpha: float | None = None
    """initial weight of the divergence in the policy loss; None = ENV_ARGS"""
    brac_alpha_lr: float | None = None
    """step of that weight towards the target divergence; 0 = fixed; None = ENV_ARGS"""
    brac_alpha_max: float = 100.0
    """largest weight of the divergence"""
    divergence_target: float | None = None
    """divergence that it aims at [nats]; None = ENV_ARGS"""


# what the environments need differently, for arguments left at None
ENV_ARGS = {  # the first entry whose key is part of the family's name
    "point": dict(
        cvae_dim=5,
        gamma=0.9,
        reward_scale=5.0,
        z_dim=5,
        brac_alpha=1.5,
        brac_alpha_lr=0.0,
        divergence_target=0.05,
    ),
    "": dict(
        cvae_dim=64,
        gamma=0.97,
        reward_scale=0.5,
        z_dim=20,
        brac_alpha=1.0,
        brac_alpha_lr=1e-3,
        divergence_target=0.05,
    ),
}

MAY_BE_ZERO = {"seed", "reward_noise", "cvae_kl_weight", "encoder_updates", "cvae_updates"}
MAY_BE_ZERO |= {"entropy_weight", "brac_alpha", "brac_alpha_lr", "divergence_target"}
RANGES = {"gamma": (0, 1), "tau": (0, 1)}
EVAL_ONLY = set()  # not of the training: may differ when a run is resumed

# ---- networks ---------------------------------------------------------------


class MLP(nn.Module):
    """`members` networks of one shape on (x, z), evaluated together; two hidden layers, each linear, layer
    normalization (without scale and shift of its own), ReLU; linear output. z enters as a bias per task, which
    equals a first layer on the concatenation (x, z) and saves its repetition over the task's rows."""

    def __init__(self, members, in_dim, z_dim, width, out_dim):
        super().__init__()

        def parameter(fan_in, *shape):  # initialized as in nn.Linear
            return nn.Parameter(torch.empty(members, *shape).uniform_(-1, 1) / math.sqrt(fan_in))

        self.w_x, self.w_z = (parameter(in_dim + z_dim, size, width) for size in (in_dim, z_dim))
        self.b_1 = parameter(in_dim + z_dim, 1, width)
        self.w_2, self.b_2 = parameter(width, width, width), parameter(width, 1, width)
        self.w_3, self.b_3 = parameter(width, width, out_dim), parameter(width, 1, out_dim)

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [members, M, B, out_dim]."""
        return self.rest(self.first(x, z))

    def first(self, x, z):
        """The first linear layer: x [M, B, in_dim], z [M, z_dim] -> [members, M, B, width]."""
        members = len(self.w_x)
        of_task = torch.baddbmm(self.b_1, z.expand(members, *z.shape), self.w_z)  # [members, M, width]
        h = torch.bmm(x.flatten(0, 1).expand(members, -1, -1), self.w_x).unflatten(1, x.shape[:2])
        return h + of_task[:, :, None]

    def rest(self, first):
        """What follows it: [members, M, B, width] -> [members, M, B, out_dim]."""
        h = first.flatten(1, 2)
        for weight, bias in ((self.w_2, self.b_2), (self.w_3, self.b_3)):
            h = torch.baddbmm(bias, F.layer_norm(h, h.shape[-1:]).relu(), weight)  # [ours: D7]
        return h.unflatten(1, first.shape[1:3])


class TransitionEncoder(nn.Module):
    """Embedding of a single transition on the unit sphere."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim))

    def forward(self, rows):
        """rows [.., ctx_dim] -> [.., z_dim] of norm 1."""
        return F.normalize(self.net(rows), dim=-1)


class Aggregator(nn.Module):
    """Attention over the embedded transitions of a context: softmax of one linear score."""

    def __init__(self, z_dim):
        super().__init__()
        self.score = nn.Linear(z_dim, 1)

    def forward(self, points, mask):
        """points [M, K, z_dim], mask [M, K] 1 = real -> z [M, z_dim], norm <= 1; 0 without any transition."""
        score = self.score(points)[..., 0].masked_fill(mask == 0, -1e9)
        return ((score.softmax(1) * mask)[..., None] * points).sum(1)


class CVAE(nn.Module):
    """p(rew, next_obs | obs, act) over all training tasks, through a Gaussian latent."""

    def __init__(self, obs_dim, act_dim, latent_dim, width):
        super().__init__()
        self.sizes = [obs_dim + act_dim, 1 + obs_dim]
        self.encoder = nn.Sequential(nn.Linear(sum(self.sizes), width), nn.ReLU(), nn.Linear(width, 2 * latent_dim))
        inputs = self.sizes[0] + latent_dim
        self.decoder = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, self.sizes[1]))

    def forward(self, rows):
        """rows [B, ctx_dim] -> reconstruction of (rew, next_obs) [B, 1 + obs_dim], latent mean and log_var."""
        mean, log_var = self.encoder(rows).chunk(2, -1)
        latent = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(torch.cat([rows[..., : self.sizes[0]], latent], -1)), mean, log_var

    def counterfactual(self, rows):
        """rows [.., ctx_dim] -> the same (obs, act) with (rew, next_obs) drawn from the prior."""
        known = rows[..., : self.sizes[0]]
        latent = torch.randn(*rows.shape[:-1], self.decoder[0].in_features - self.sizes[0], device=rows.device)
        return torch.cat([known, self.decoder(torch.cat([known, latent], -1))], -1)


class Critics(MLP):
    """`members` scalar functions of (obs, act, z), evaluated together."""

    def __init__(self, members, obs_dim, act_dim, z_dim, width):
        super().__init__(members, obs_dim + act_dim, z_dim, width, 1)

    def forward(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> [members, M, B]."""
        return super().forward(torch.cat([obs, act], -1), z)[..., 0]


# ---- losses -----------------------------------------------------------------


def info_nce(similarity, temperature):
    """similarity [B, 1 + n] of a query with its key, then with its negatives -> scalar."""
    first = torch.zeros(len(similarity), dtype=torch.long, device=similarity.device)
    return F.cross_entropy(similarity / temperature, first)  # [InfoNCE]


def latent_kl(mean, log_var):
    """D_KL(N(mean, var) || N(0, I)), both [B, latent_dim] -> [B] nats."""
    return 0.5 * (mean.pow(2) + log_var.exp() - 1 - log_var).sum(-1)


def cvae_loss(prediction, target, kl, kl_weight):
    """prediction, target [B, 1 + obs_dim] as (rew, next_obs), kl [B] -> scalar; the state's error is a mean over
    its dimensions and weighs as much as the reward's."""
    error = (prediction - target).pow(2)
    return kl_weight * kl.mean() + error[:, 1:].mean() + error[:, 0].mean()


def gaussian_kl(mean, log_std, mean_b, log_std_b):
    """D_KL(N(mean, std) || N(mean_b, std_b)), all [.., act_dim] -> [..] nats."""
    log_ratio = log_std - log_std_b
    distance = ((mean - mean_b) * (-log_std_b).exp()).pow(2)
    return (0.5 * ((2 * log_ratio).exp() + distance - 1) - log_ratio).sum(-1)  # [ours: D2]


def pre_tanh(act):
    """act [.., act_dim] in [-1, 1] -> its value before the tanh, finite at the bounds."""
    return torch.atanh(act.clamp(-0.999, 0.999))


def tanh_gaussian_logp(mean, log_std, pre):
    """Log-density of the action tanh(pre) under tanh(N(mean, std)), all [.., act_dim] -> [..]."""
    gaussian = -0.5 * ((pre - mean) * (-log_std).exp()).pow(2) - log_std
    log_slope = -2 * (pre + F.softplus(-2 * pre))  # of the tanh, but for its constant 2 log 2
    constant = 0.5 * math.log(2 * math.pi) + 2 * math.log(2)
    return (gaussian - log_slope).sum(-1) - constant * pre.shape[-1]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets and the weight of the divergence; `opts`: Adam of phase 3, of the encoder, of the VAE."""

    def __init__(self, obs_dim, act_dim, ctx_dim, args):
        super().__init__()
        z_dim, width = args.z_dim, args.width
        self.encoder = TransitionEncoder(ctx_dim, z_dim, args.encoder_width)
        self.aggregator = Aggregator(z_dim)
        if args.negatives == "generative":
            self.cvae = CVAE(obs_dim, act_dim, args.cvae_dim, args.cvae_width)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.fits_behavior = args.backbone == "brac"
        self.gaussians = MLP(1 + self.fits_behavior, obs_dim, z_dim, width, 2 * act_dim)  # of pi_beta, and pi's shift
        for parameter in (self.gaussians.w_3, self.gaussians.b_3):
            nn.init.uniform_(parameter, -1e-3, 1e-3)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))
        trained = [self.aggregator, self.q, self.gaussians]
        self.params = [list(module.parameters()) for module in trained]

    def make_optimizer(self, args):
        params = [parameter for group in self.params for parameter in group]
        self.opts = [torch.optim.Adam(params, torch.tensor(args.lr), fused=True)]  # a tensor: `anneal` changes it
        for module in [self.encoder] + ([self.cvae] if args.negatives == "generative" else []):
            self.opts.append(torch.optim.Adam(module.parameters(), args.encoder_lr, fused=True))

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of the policy pi and
        the same of the behavior policy pi_beta, fitted to the data (D2), or None; pi is then pi_beta, detached, plus a
        shift (D6)."""
        if not self.fits_behavior:
            mean, log_std = self.gaussians(obs, z)[0].chunk(2, -1)
            return mean, log_std.clamp(-5, 2), None, None
        (mean_b, log_std_b), (mean, log_std) = (out.chunk(2, -1) for out in self.gaussians(obs, z))
        log_std_b = log_std_b.clamp(-3, 1)
        return mean_b.detach() + mean, (log_std_b.detach() + log_std).clamp(-5, 2), mean_b, log_std_b

    def act(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> the policy's deterministic action [M, B, act_dim] in (-1, 1)."""
        return torch.tanh(self.policies(obs, z)[0])


def anneal(opts, lr, done):
    """Learning rate of all optimizers: `lr` for the first half of the training, then linear to 0; done in [0, 1]."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(lr * min(1.0, 2 - 2 * done))  # [ours: D7]


# ---- update -----------------------------------------------------------------


def set_grads(loss, params, retain_graph=False):
    """Put the gradient of a scalar loss into .grad of exactly these parameters."""
    grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
    for parameter, grad in zip(params, grads):
        parameter.grad = grad


def update_cvae(agent, rows, args):
    """One step of the VAE. rows [B, ctx_dim] of all training tasks -> dict of detached 0-d tensors."""
    prediction, mean, log_var = agent.cvae(rows)
    kl = latent_kl(mean, log_var)
    loss = cvae_loss(prediction, rows[:, agent.cvae.sizes[0] :], kl, args.cvae_kl_weight)
    set_grads(loss, list(agent.cvae.parameters()))
    agent.opts[2].step()
    return {"losses/cvae": loss.detach(), "stats/cvae_kl": kl.mean().detach()}


def make_negatives(agent, query, data, args):
    """query [B, ctx_dim] -> [B, n, ctx_dim], the same (obs, act) with another (rew, next_obs)."""
    negatives = query[:, None].expand(-1, args.num_negatives, -1)
    if args.negatives == "generative":
        with torch.no_grad():
            return agent.cvae.counterfactual(negatives)
    negatives = negatives.clone()
    reward = negatives[..., -1 - data.obs_dim]  # a row is (obs, act, rew, next_obs)
    reward += args.reward_noise * data.reward_spread * torch.randn_like(reward)  # [ours: D8]
    return negatives


def update_encoder(agent, query, key, negatives, args):
    """One step of the transition encoder. query, key [B, ctx_dim] of one task each, negatives [B, n, ctx_dim]
    -> dict of detached 0-d tensors."""
    rows = torch.cat([query[:, None], key[:, None], negatives], 1)  # [B, 2 + n, ctx_dim]
    z = agent.encoder(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    similarity = (z[:, :1] * z[:, 1:]).sum(-1)  # [B, 1 + n], cosine
    loss = info_nce(similarity, args.temperature)
    set_grads(loss, list(agent.encoder.parameters()))
    agent.opts[1].step()
    with torch.no_grad():
        return {
            "losses/contrastive": loss.detach(),
            "stats/contrastive_acc": (similarity.argmax(1) == 0).float().mean(),
            "stats/similarity_key": similarity[:, 0].mean(),
            "stats/similarity_negatives": similarity[:, 1:].mean(),
        }


def update(agent, points, batch, args):
    """One step of aggregator, critics and policies. points [M, K, z_dim]: the context's transitions, embedded by the
    frozen encoder; batch: obs [M, B, obs_dim], act, rew [M, B], next_obs, term (independent draws)
    -> dict of detached 0-d tensors."""
    obs, act, rew, next_obs, term = batch
    rew = args.reward_scale * rew
    aggregator, q_params, gaussian_params = agent.params

    # task inference
    z = agent.aggregator(points, torch.ones_like(points[..., 0]))  # [M, z_dim]
    z_fixed = z.detach()

    # critics and aggregator
    with torch.no_grad():
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_pre = mean + log_std.exp() * torch.randn_like(mean)
        next_act = torch.tanh(next_pre)
        q_next = agent.q_target(next_obs, next_act, z_fixed).amin(0)
        if not agent.fits_behavior:
            q_next = q_next - args.entropy_weight * tanh_gaussian_logp(mean, log_std, next_pre)
        q_target = rew + args.gamma * (1 - term) * q_next  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    set_grads(q_loss, aggregator + q_params)  # the critic's loss alone trains the aggregator

    # behavior policy by maximum likelihood, and the policy, regularized towards it
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z_fixed)
    pi_pre = mean + log_std.exp() * torch.randn_like(mean)
    pi_act = torch.tanh(pi_pre)
    q_mean = agent.q(obs, pi_act, z_fixed).amin(0).mean()
    if agent.fits_behavior:
        behavior_loss = -tanh_gaussian_logp(mean_b, log_std_b, pre_tanh(act)).mean()
        divergence = gaussian_kl(mean, log_std, mean_b.detach(), log_std_b.detach()).mean()
        actor_loss = agent.brac_alpha * divergence - q_mean
    else:
        behavior_loss = divergence = torch.zeros_like(q_loss)
        actor_loss = args.entropy_weight * tanh_gaussian_logp(mean, log_std, pi_pre).mean() - q_mean
    set_grads(behavior_loss + actor_loss, gaussian_params)  # each reaches its own member alone
    agent.opts[0].step()  # [ours: D5]
    with torch.no_grad():
        if agent.fits_behavior:
            # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
            excess = divergence - args.divergence_target
            agent.brac_alpha.add_(args.brac_alpha_lr * excess).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.q_target.parameters()), q_params, args.tau)
        return {
            "losses/q": q_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "stats/q_mean": q_mean.detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "z/between_std": z.std(0).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def adapt(agent, context, mask, explore=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; rows without a transition get z = 0;
    explore changes nothing, z has no spread -> policy(obs [R, obs_dim], rew [R]) -> act."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z)[:, 0]


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        return agent.aggregator(agent.encoder(context), mask)


def embed_dataset(agent, data):
    """The dataset with every transition embedded by the frozen encoder, [T, N, H, z_dim] in place of the rows."""
    embedded = copy.copy(data)
    with torch.no_grad():
        embedded.episodes = torch.stack([agent.encoder(episodes[..., :-1]) for episodes in data.episodes])
    return embedded


def evaluate_all(agent, data, args, protocols):
    """Returns and quality of z -> dict tag -> float."""
    results = dc.evaluate(data, partial(adapt, agent), protocols, args.eval_episodes)
    return results | dc.embedding_quality(data, partial(embed, agent))


CONSOLE_TAGS = ("losses/cvae", "stats/cvae_kl", "losses/contrastive", "stats/contrastive_acc")
CONSOLE_TAGS += ("losses/q", "losses/actor", "stats/q_mean", "stats/divergence")

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


def train(args):
    """Train and evaluate -> what Run.finish returns."""
    if args.eval_only and not args.resume:
        raise SystemExit("--eval-only needs --resume RUN_DIR")
    if args.negatives is None:
        args.negatives = "generative" if dc.FAMILIES[args.env].dynamics_vary else "reward"
    args.encoder_updates = args.total_updates if args.encoder_updates is None else args.encoder_updates
    args.cvae_updates = args.total_updates // 2 if args.cvae_updates is None else args.cvae_updates
    args, device = resolve(args), dc.resolve_device(args.device)
    data = dc.load_dataset(args.env, args.dataset, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(data.obs_dim, data.act_dim, data.ctx_dim, args).to(device)
    agent.make_optimizer(args)
    step_fn = torch.compile(update) if args.compile else update
    tasks = torch.as_tensor(data.train_ids, device=device)
    phases = ("cvae", "encoder", "policy") if args.negatives == "generative" else ("encoder", "policy")

    def draw(count, size):
        """size transitions of each of `count` random training tasks -> [count, size, ctx_dim]."""
        return data.sample(draw_tasks(count), size, generator)[..., :-1]

    def draw_tasks(count):
        return tasks[torch.randint(len(tasks), (count,), device=device, generator=generator)]

    with Run(args, data, agent, generator, phases) as run:
        while "cvae" in phases and run.going("cvae"):
            run.advance(update_cvae(agent, draw(args.cvae_batch_size, 1)[:, 0], args))
        while run.going("encoder"):
            query, key = draw(args.num_queries, 2).unbind(1)
            if args.negatives == "none":
                negatives = draw(args.num_queries * args.num_negatives, 1).view(len(query), -1, data.ctx_dim)
            else:
                negatives = make_negatives(agent, query, data, args)
            run.advance(update_encoder(agent, query, key, negatives, args))
        if not run.stopping and not args.eval_only:
            embedded = embed_dataset(agent, data)
        while run.going():
            task_ids = draw_tasks(args.meta_batch)
            points = embedded.sample_episode(task_ids, args.context_size, generator)
            batch = data.unpack(data.sample(task_ids, args.batch_size, generator))
            anneal(agent.opts[:1], args.lr, run.step / args.total_updates)
            run.advance(step_fn(agent, points, batch, args))
        return run.finish()


# ---- main -------------------------------------------------------------------


def main(arguments=None):
    """Command line (list of str, by default the process's own); with --resume the stored arguments are the defaults."""
    cli = partial(tyro.cli, Args, description=__doc__.split("\n\n")[0], args=arguments)
    args = cli()
    train(cli(default=stored_args(args.resume)) if args.resume else args)


if __name__ == "__main__":
    main()
