"""FLORA: flow-based task inference and adaptive correction of feature overgeneralization.

Wang, Li, Wang, Bennis, AAAI-26, arXiv 2601.07164 (equation numbers below are the paper's).
The Q-function is decomposed into successor features and task weights, Q = psi^T W, the target of the
features is corrected downwards where the two psi networks disagree, by an amount that a bandit
adapts, and the task is inferred as a Gaussian posterior that a chain of planar flows bends.

Equations: (3) r = phi^T W; (4) Q = psi^T W; (5) reward loss; (8) feature mean and spread of the
  two psi targets; (9) corrected features; (10) bandit over the corrections; (11) feature loss;
  (12) pessimistic Q; (13) policy loss; (14)-(16) planar flows; (17) ELBO; (18) encoder loss.

Deviations and choices where the paper's main text is silent (no official code is public):
  D1  W = softmax, so that r is a convex mix of the features and a lower feature never raises Q.
  D2  log p(Q) is the sum over the task's B transitions: with their mean, the KL term of (17)
      outweighs it and the posterior collapses to the prior.
  D3  D_KL(pi || pi_beta) against a behavior policy fitted to the data by maximum likelihood; both are
      tanh-Gaussians, so the divergence is the closed form of the Gaussians before the tanh.
  D4  The bandit's return R_g: by default the policy's own value at the data's initial states
      (`offline`, weak and optimistic); `rollout` plays episodes on training tasks, the paper's reading,
      which is environment interaction. Both scaled by the data's return spread, differences clipped to
      +-1, probabilities floored at 0.05.
  D5  Flow parameters are global, with Rezende & Mohamed's correction so that every flow is invertible.
  D6  All losses of a step use the parameters from before the step.

Run:     python flora.py --env ant-dir
Ablate:  --num-flows 0 (no flows), --alpha-min 0 (no correction)
"""

import copy
import csv
import json
import math
import os
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
    exp_name: str = "flora"
    """name of the experiment: the folder between env and seed in the run directory"""
    seed: int = 0
    """seed of initialization and batches (tasks and data are fixed by the dataset file)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    compile: bool = False
    """compile the update with torch.compile (pays on a GPU, is slower on a CPU)"""
    total_updates: int = 15_000
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
    batch_size: int = 64
    """transitions per task and update [transitions]"""
    context_size: int = 64
    """transitions that a task is inferred from in training [transitions]"""
    # method
    gamma: float | None = None
    """discount; None = ENV_ARGS"""
    reward_scale: float | None = None
    """factor on the rewards in all losses; None = ENV_ARGS"""
    lr: float = 6e-4
    """Adam's learning rate of all networks"""
    tau: float = 0.005
    """rate at which the target networks follow (zeta)"""
    width: int = 256
    """hidden units of policy, features and successor features, two layers"""
    encoder_width: int = 200
    """hidden units of the encoder, two layers"""
    z_dim: int | None = None
    """size of the task latent; None = ENV_ARGS"""
    feature_dim: int = 32
    """number of features D"""
    weight_activation: Literal["softmax", "none"] = "softmax"
    """what makes the weights W of the network's output (D1)"""
    num_flows: int = 4
    """planar flows K; 0 = Gaussian posterior, the ablation of flow-based task inference"""
    kl_weight: float = 0.1
    """rho2 of (17)"""
    feature_weight: float = 0.01
    """rho3 of (18)"""
    alpha_min: float = -1.0
    """most pessimistic arm of the correction; 0 = no correction, the ablation"""
    num_arms: int = 5
    """arms between alpha_min and 0"""
    bandit_every: int = 500
    """updates per bandit episode [gradient steps]"""
    bandit_lr: float = 0.1
    """lambda of (10)"""
    bandit_feedback: Literal["offline", "rollout"] = "offline"
    """offline = value at the data's initial states; rollout = episodes on training tasks (D4)"""
    brac_alpha: float | None = None
    """initial weight of the divergence in the policy loss (rho1); None = ENV_ARGS"""
    brac_alpha_lr: float | None = None
    """step of rho1 towards the target divergence; 0 = fixed; None = ENV_ARGS"""
    brac_alpha_max: float = 100.0
    """largest rho1"""
    divergence_target: float | None = None
    """divergence that rho1 aims at [nats]; None = ENV_ARGS"""


# what the environments need differently, for arguments left at None
ENV_ARGS = {
    "point": dict(gamma=0.9, reward_scale=5.0, z_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0, divergence_target=0.05),
    "mujoco": dict(gamma=0.97, reward_scale=0.5, z_dim=20, brac_alpha=6.0, brac_alpha_lr=2e-4, divergence_target=0.5),
}

# ---- networks ---------------------------------------------------------------


def mlp(*sizes):
    """Multilayer perceptron with ReLU between the layers and a linear output."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class TanhGaussian(nn.Module):
    """Policy tanh(N(mean, std)) given (obs, z): the meta-policy, and the fitted behavior policy (D3)."""

    def __init__(self, obs_dim, act_dim, z_dim, width, log_std_min, log_std_max):
        super().__init__()
        self.net = mlp(obs_dim + z_dim, width, width, 2 * act_dim)
        nn.init.uniform_(self.net[-1].weight, -1e-3, 1e-3)
        nn.init.uniform_(self.net[-1].bias, -1e-3, 1e-3)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def forward(self, obs, z):
        """obs [.., obs_dim], z [.., z_dim] -> mean and log_std before the tanh [.., act_dim]."""
        mean, log_std = self.net(torch.cat([obs, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(self.log_std_min, self.log_std_max)

    def mode(self, obs, z):
        """Deterministic action [.., act_dim] in (-1, 1)."""
        return torch.tanh(self(obs, z)[0])


class Encoder(nn.Module):
    """Gaussian posterior q0(z | context): product of one Gaussian factor per transition."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        self.net = mlp(ctx_dim, width, width, 2 * z_dim)

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> mean [M, z_dim], var [M, z_dim] > 0."""
        mean, var = self.net(context).chunk(2, -1)
        precision = mask[..., None] / F.softplus(var).clamp(min=1e-7)  # [M, K, z_dim]
        var = 1 / precision.sum(1)
        return var * (precision * mean).sum(1), var


class PlanarFlows(nn.Module):
    """z_K = f_K(... f_1(z_0)) with f(z) = z + u tanh(w^T z + b)  (Eq. 14, 15)."""

    def __init__(self, num_flows, z_dim):
        super().__init__()
        self.u = nn.Parameter(0.01 * torch.randn(num_flows, z_dim))  # small; the correction alone contracts z along w at first
        self.w = nn.Parameter(torch.randn(num_flows, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(num_flows))

    def corrected_u(self):
        """u moved along w so that w^T u >= -1, which makes every flow invertible -> [num_flows, z_dim]."""
        wu = (self.w * self.u).sum(-1, keepdim=True)
        norm2 = (self.w**2).sum(-1, keepdim=True).clamp(min=1e-12)
        return self.u + (F.softplus(wu) - 1 - wu) * self.w / norm2  # [ours: D5]

    def forward(self, z):
        """z_0 [M, z_dim] -> z_K [M, z_dim], log |det dz_K / dz_0| [M]."""
        log_det = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        for u, w, b in zip(self.corrected_u(), self.w, self.b):
            h = torch.tanh(z @ w + b)  # [M]
            log_det = log_det + torch.log1p((1 - h**2) * (w @ u))  # (Eq. 16), 1 + u^T h' w > 0
            z = z + u * h[:, None]  # (Eq. 14)
        return z, log_det


class Features(nn.Module):
    """psi(obs, act, z), or phi(obs, act, next_obs, z) -> [.., feature_dim]."""

    def __init__(self, in_dim, feature_dim, width):
        super().__init__()
        self.net = mlp(in_dim, width, width, feature_dim)

    def forward(self, *inputs):
        return self.net(torch.cat(inputs, -1))


class Weights(nn.Module):
    """Task weights W(z) [.., feature_dim]."""

    def __init__(self, z_dim, feature_dim, width, activation):
        super().__init__()
        self.net, self.activation = mlp(z_dim, width, feature_dim), activation

    def forward(self, z):
        logits = self.net(z)
        return logits.softmax(-1) if self.activation == "softmax" else logits  # [ours: D1]


# ---- losses -----------------------------------------------------------------


def feature_spread(psi):
    """psi [2, .., D] of two networks -> mean and spread per feature [.., D]; the spread is not divided by 2."""
    mean = psi.mean(0)
    return mean, (psi - mean).pow(2).sum(0).sqrt()  # (Eq. 8)


def reward_loss(phi, weights, rew):
    """phi [M, B, D], weights [M, 1, D], rew [M, B] -> scalar."""
    return 0.5 * (rew - (phi * weights).sum(-1)).pow(2).mean()  # (Eq. 5)


def feature_loss(psi, psi_target):
    """psi [2, M, B, D], psi_target [M, B, D] -> scalar: Huber (1), sum over features and networks."""
    return F.huber_loss(psi, psi_target.expand_as(psi), reduction="none").sum((0, -1)).mean()  # (Eq. 11)


def value_log_likelihood(psi, weights, q_target):
    """psi [2, M, B, D], weights [M, 1, D], q_target [M, B] -> scalar: log p(Q) up to a constant,
    summed over the task's transitions, mean over networks and tasks."""
    error = (psi * weights).sum(-1) - q_target  # [2, M, B]
    return -0.5 * error.pow(2).sum(-1).mean()  # [ours: D2] first term of (Eq. 17)


def posterior_kl(z_0, z_k, mean, var, log_det):
    """D_KL(posterior || N(0, I)) [M], one Monte-Carlo sample; z_0, z_k, mean, var [M, z_dim], log_det [M]."""
    log_q = -0.5 * ((z_0 - mean).pow(2) / var + var.log()).sum(-1) - log_det  # (Eq. 16)
    return log_q + 0.5 * z_k.pow(2).sum(-1)  # the constants of both Gaussians cancel


def gaussian_kl(mean, log_std, mean_b, log_std_b):
    """D_KL(N(mean, std) || N(mean_b, std_b)), all [.., act_dim] -> [..] nats."""
    ratio = (2 * (log_std - log_std_b)).exp()
    distance = ((mean - mean_b) * (-log_std_b).exp()).pow(2)
    return 0.5 * (ratio + distance - 1).sum(-1) - (log_std - log_std_b).sum(-1)  # [ours: D3]


def tanh_gaussian_logp(mean, log_std, act):
    """Log-density of act [.., act_dim] in [-1, 1] under tanh(N(mean, std)) -> [..]."""
    pre = torch.atanh(act.clamp(-0.999, 0.999))  # finite at the bounds
    logp = -0.5 * ((pre - mean) * (-log_std).exp()).pow(2) - log_std - 0.5 * math.log(2 * math.pi)
    return (logp - 2 * (math.log(2) - pre - F.softplus(-2 * pre))).sum(-1)


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, the multiplier rho1 and the bandit; `opt` holds one Adam group per network."""

    def __init__(self, obs_dim, act_dim, ctx_dim, args):
        super().__init__()
        z_dim, d, width = args.z_dim, args.feature_dim, args.width
        self.encoder = Encoder(ctx_dim, z_dim, args.encoder_width)
        self.flows = PlanarFlows(args.num_flows, z_dim)
        self.phi = Features(2 * obs_dim + act_dim + z_dim, d, width)
        self.weights = Weights(z_dim, d, width, args.weight_activation)
        self.psi = nn.ModuleList([Features(obs_dim + act_dim + z_dim, d, width) for _ in range(2)])
        self.psi_target = copy.deepcopy(self.psi).requires_grad_(False)
        self.actor = TanhGaussian(obs_dim, act_dim, z_dim, width, -5, 2)
        self.behavior = TanhGaussian(obs_dim, act_dim, z_dim, width, -3, 1)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))
        self.register_buffer("arms", torch.linspace(args.alpha_min, 0, args.num_arms))
        self.register_buffer("arm_logits", torch.zeros(args.num_arms))
        self.register_buffer("arm", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_return", torch.tensor(float("nan")))
        trained = [self.encoder, self.flows, self.phi, self.weights, self.psi, self.actor, self.behavior]
        self.params = [list(module.parameters()) for module in trained]

    def make_optimizer(self, args):
        groups = [{"params": params} for params in self.params if params]
        self.opt = torch.optim.Adam(groups, args.lr, fused=True)

    def infer(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K], noise [M, z_dim] (0 = posterior mean)
        -> z_K [M, z_dim], mean and var of q0 [M, z_dim], KL to the prior [M]."""
        mean, var = self.encoder(context, mask)
        z_0 = mean + var.sqrt() * noise
        z, log_det = self.flows(z_0)  # (Eq. 15)
        return z, mean, var, posterior_kl(z_0, z, mean, var, log_det)

    def q(self, obs, act, z, weights):
        """obs [.., obs_dim], act [.., act_dim], z [.., z_dim], weights [.., D] -> pessimistic Q [..], psi [2, .., D]."""
        psi = torch.stack([psi(obs, act, z) for psi in self.psi])
        return (psi * weights).sum(-1).amin(0), psi  # (Eq. 12)

    def arm_probs(self):
        floor = 0.05
        return floor + (1 - floor * len(self.arms)) * self.arm_logits.softmax(0)  # [ours: D4]

    def bandit_step(self, episode_return, lr, generator):
        """Credit the drawn arm with the change of the return (both in units of the data's spread), draw the next."""
        if not self.last_return.isnan():
            gain = (episode_return - self.last_return).clamp(-1, 1)
            self.arm_logits[self.arm] += lr * gain / self.arm_probs()[self.arm]  # (Eq. 10)
        self.last_return.copy_(episode_return)
        self.arm.copy_(torch.multinomial(self.arm_probs(), 1, generator=generator)[0])


# ---- update -----------------------------------------------------------------


def update(agent, context, batch, args):
    """One step of every network (Algorithm 1). context [M, K, ctx_dim]; batch: obs [M, B, obs_dim], act,
    rew [M, B], next_obs, term [M, B] (independent draws) -> dict of detached 0-d tensors."""
    obs, act, rew, next_obs, term = batch
    rew = args.reward_scale * rew
    ones = torch.ones_like(context[..., 0])
    alpha = agent.arms.take(agent.arm)  # indexing with a 0-d tensor would read it back to the host
    z, z_mean, z_var, kl = agent.infer(context, ones, torch.randn(len(context), args.z_dim, device=context.device))
    z_b = z[:, None].expand(-1, obs.shape[1], -1)  # [M, B, z_dim]
    z_fixed = z_b.detach()  # policy, targets and behavior policy never train the encoder
    weights = agent.weights(z)[:, None]  # [M, 1, D]

    # targets: features of the next action, corrected by alpha times their spread
    with torch.no_grad():
        mean, log_std = agent.actor(next_obs, z_fixed)
        next_act = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
        next_psi = torch.stack([psi(next_obs, next_act, z_fixed) for psi in agent.psi_target])
        psi_mean, psi_spread = feature_spread(next_psi)
        next_psi = psi_mean + alpha * psi_spread  # (Eq. 9)
        discount = args.gamma * (1 - term)
        q_target = rew + discount * (next_psi * weights).sum(-1)  # [M, B]
    phi = agent.phi(obs, act, next_obs, z_b)
    psi_target = phi.detach() + discount[..., None] * next_psi

    # task inference and critic; each loss reaches exactly the networks named in its backward
    psi = torch.stack([psi(obs, act, z_b) for psi in agent.psi])  # [2, M, B, D]
    loss_r = reward_loss(phi, weights, rew)
    loss_psi = feature_loss(psi, psi_target)
    elbo = value_log_likelihood(psi, weights, q_target) - args.kl_weight * kl.mean()  # (Eq. 17)
    encoder_loss = args.feature_weight * (loss_r + loss_psi) - elbo  # (Eq. 18)
    encoder, flows, phi_params, weight_params, psi_params, actor_params, behavior_params = agent.params
    agent.opt.zero_grad()
    encoder_loss.backward(inputs=encoder + flows, retain_graph=True)
    loss_psi.backward(inputs=psi_params, retain_graph=True)
    loss_r.backward(inputs=phi_params + weight_params)

    # policy, regularized towards the behavior policy
    mean_b, log_std_b = agent.behavior(obs, z_fixed)
    behavior_loss = -tanh_gaussian_logp(mean_b, log_std_b, act).mean()
    behavior_loss.backward(inputs=behavior_params)
    mean, log_std = agent.actor(obs, z_fixed)
    pi_act = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
    q, pi_psi = agent.q(obs, pi_act, z_fixed, weights.detach())
    divergence = gaussian_kl(mean, log_std, mean_b.detach(), log_std_b.detach()).mean()
    actor_loss = agent.brac_alpha * divergence - q.mean()  # (Eq. 13)
    actor_loss.backward(inputs=actor_params)
    agent.opt.step()
    with torch.no_grad():
        # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
        agent.brac_alpha.add_(args.brac_alpha_lr * (divergence - args.divergence_target)).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.psi_target.parameters()), psi_params, args.tau)
        return {
            "losses/reward": loss_r.detach(),
            "losses/feature": loss_psi.detach(),
            "losses/encoder": encoder_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "losses/kl": kl.mean().detach(),
            "stats/q_mean": q.mean().detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "stats/alpha": alpha,
            "stats/spread_data": feature_spread(psi)[1].mean(),
            "stats/spread_policy": feature_spread(pi_psi)[1].mean(),
            "stats/weight_perplexity": (-(weights * weights.clamp(min=1e-12).log()).sum(-1)).exp().mean(),
            "z/between_std": z_mean.std(0).mean(),
            "z/posterior_std": z_var.sqrt().mean(),
            "z/norm": z.norm(dim=-1).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def adapt(agent, context, mask, explore=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; K = 0: the prior N(0, I);
    explore: a sample of the posterior instead of its mean -> policy(obs [R, obs_dim], rew [R]) -> act."""
    z_dim = agent.encoder.net[-1].out_features // 2
    generator = torch.Generator(context.device).manual_seed(0)  # evaluation leaves training's noise alone
    noise = explore * torch.randn(len(context), z_dim, device=context.device, generator=generator)
    with torch.no_grad():
        z = agent.infer(context, mask, noise)[0] if context.shape[1] else noise
    return lambda obs, rew: agent.actor.mode(obs, z)


def q_error(agent, episodes, args):
    """Mean of Q(s_0, a_0, z) minus the discounted return that followed (first curve of the paper's Figure 1).

    episodes: what `evaluate` traced (context, mask and the arrays of rollout). The critic bootstraps across
    the time limit, so the return is continued with Q at the episode's last state unless the task terminated."""
    device = agent.arms.device
    obs = torch.as_tensor(episodes["observations"], device=device)
    rew = args.reward_scale * torch.as_tensor(episodes["rewards"], device=device)
    length = torch.as_tensor(episodes["lengths"], dtype=torch.long, device=device)
    terminated = torch.as_tensor(episodes["terminated"], device=device)
    with torch.no_grad():
        z = agent.infer(episodes["context"], episodes["mask"], 0.0)[0]
        last = obs[torch.arange(len(obs), device=device), length]
        first_q, last_q = (agent.q(o, agent.actor.mode(o, z), z, agent.weights(z))[0] for o in (obs[:, 0], last))
    discounts = args.gamma ** torch.arange(rew.shape[1], device=device)
    monte_carlo = (discounts * rew).sum(1) + args.gamma**length * ~terminated * last_q
    return (first_q - monte_carlo).mean().item() / args.reward_scale


def bandit_return(agent, data, args, generator):
    """Return of the current policy in units of the data's return spread -> 0-d tensor (D4)."""
    if args.bandit_feedback == "rollout":
        value = dc.evaluate(data, partial(adapt, agent), ("train",), 1)["eval/train/return"]
        return torch.tensor(value / data.return_spread, device=data.device)
    tasks = torch.as_tensor(data.train_ids, device=data.device)
    context = data.sample(tasks, args.context_size, generator)[..., :-1]
    obs = data.episodes[tasks][:, : data.min_episodes, 0, : data.obs_dim]  # [U, N, obs_dim] initial states
    with torch.no_grad():
        z = agent.infer(context, torch.ones_like(context[..., 0]), 0.0)[0]
        z_b = z[:, None].expand(-1, obs.shape[1], -1)
        psi = agent.q(obs, agent.actor.mode(obs, z_b), z_b, agent.weights(z)[:, None])[1]
        value = (psi.mean(0) * agent.weights(z)[:, None]).sum(-1).mean()
    return value / (args.reward_scale * data.return_spread)


# ---- training ---------------------------------------------------------------


def resolve(args):
    """Check the arguments, fill in those left at None -> args. One line for whatever is wrong."""
    defaults = ENV_ARGS["point" if args.env.endswith(("robot", "wind")) else "mujoco"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        args.dataset = f"datasets/{args.env}.npz"
    may_be_zero = {"seed", "num_flows", "kl_weight", "feature_weight", "brac_alpha", "brac_alpha_lr", "divergence_target"}
    for name, value in asdict(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "alpha_min":
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in may_be_zero):
                raise SystemExit(f"--{name.replace('_', '-')} {value}: must be {'at least 0' if name in may_be_zero else 'positive'}")
    for name, least, most in (("alpha_min", -1, 0), ("gamma", 0, 1), ("tau", 0, 1)):
        if not least <= getattr(args, name) <= most:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between {least} and {most}")
    if args.num_arms > 20:
        raise SystemExit(f"--num-arms {args.num_arms}: at most 20, every arm keeps a probability of 0.05")
    return args


def load_checkpoint(directory, device):
    """Checkpoint of a run directory; one line if there is none."""
    path = Path(directory) / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"--resume {directory}: no checkpoint.pt there; give the run directory that training printed")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:
        raise SystemExit(f"{path} is damaged; start the run anew without --resume")


def resumed_args(args, saved):
    """Arguments of the stored run; lengths, intervals and device may be given anew, anything else must agree."""
    free = {"total_updates", "log_every", "eval_every", "save_every", "device", "compile", "resume", "eval_only", "eval_episodes"}
    for field in fields(Args):
        given = getattr(args, field.name)
        if field.name in free:
            if given == field.default and field.name not in ("resume", "eval_only"):
                setattr(args, field.name, saved.get(field.name, given))
        elif given != field.default and given != saved[field.name]:
            raise SystemExit(f"--{field.name.replace('_', '-')} {given}: the run to resume has {saved[field.name]}; drop the flag")
        else:
            setattr(args, field.name, saved[field.name])
    return args


def train(args):
    """Train and evaluate; writes the run directory. -> dict: the last evaluation, run_dir, updates_per_sec."""
    device = dc.resolve_device(args.device)
    saved = None
    if args.resume:
        saved = load_checkpoint(args.resume, device)
        if not isinstance(saved, dict) or set(saved.get("args", ())) != {f.name for f in fields(Args)}:
            raise SystemExit(f"--resume {args.resume}: that run is of another script or version")
        args = resumed_args(args, saved["args"])
    elif args.eval_only:
        raise SystemExit("--eval-only needs --resume RUN_DIR")
    args = resolve(args)
    data = dc.load_dataset(args.env, args.dataset, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # batches
    agent = Agent(data.obs_dim, data.act_dim, data.ctx_dim, args).to(device)
    agent.make_optimizer(args)
    agent.arm.fill_(torch.randint(args.num_arms, (), generator=generator, device=device))
    step, run_dir = 0, Path(args.resume or "")
    if saved:
        agent.load_state_dict(saved["agent"])
        agent.opt.load_state_dict(saved["opt"])
        generator.set_state(saved["generator"].cpu())
        dc.restore_rng(saved["rng"])
        step = saved["step"]
    if args.eval_only:
        results = dc.evaluate(data, partial(adapt, agent), dc.PROTOCOLS, args.eval_episodes)
        results |= dc.embedding_quality(data, partial(embed, agent))
        print(f"{args.resume} after {step} updates\n  " + eval_line(results))
        write_json(run_dir / "eval.json", {"step": step} | results)
        return results | {"run_dir": str(run_dir)}
    if saved and step >= args.total_updates and (run_dir / "result.json").is_file():
        print(f"{run_dir} is finished after {step} updates; --total-updates continues it further")
        return json.loads((run_dir / "result.json").read_text())
    if not saved:
        run_dir = Path(args.run_dir) / args.env / args.exp_name / f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            raise SystemExit(f"cannot make {run_dir}: {error.strerror}; choose another --run-dir")
    versions = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)} | {"python": sys.version.split()[0]}
    stored = {k: v for k, v in asdict(args).items() if k not in ("resume", "eval_only")}
    write_json(run_dir / "args.json", {"args": stored, "versions": versions, "command": sys.argv, "dataset": data.header})
    writer = SummaryWriter(str(run_dir), purge_step=step + 1 if saved else None)
    writer.add_text("args", "|argument|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in stored.items()))
    print(f"{run_dir}: {args.env}, {len(data.train_ids)} training and {len(data.test_ids)} test tasks, device {device}")
    print(
        f"  mean return on the test tasks: random {data.random_returns[data.test_ids].mean():.1f}, expert "
        f"{data.expert_returns[data.test_ids].mean():.1f}; of the training data {data.behavior_return:.1f}",
        flush=True,
    )
    metrics_path = run_dir / "metrics.csv"
    rows = [["step", "tag", "value"]]
    if metrics_path.exists():  # resume: drop what was logged after the checkpoint
        with open(metrics_path, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and (row[0] == "step" or int(row[0]) <= step)]
    metrics_file = open(run_dir / "metrics.csv.tmp", "w", newline="")
    metrics_writer = csv.writer(metrics_file)
    metrics_writer.writerows(rows)
    metrics_file.flush()
    os.replace(metrics_file.name, metrics_path)

    def log(values):
        """dict tag -> number, to metrics.csv and TensorBoard."""
        for tag, value in values.items():
            metrics_writer.writerow([step, tag, repr(float(value))])
            if "/return_task_" not in tag:
                writer.add_scalar(tag, value, step)
        metrics_file.flush()

    def save():
        state = {"agent": agent.state_dict(), "opt": agent.opt.state_dict(), "step": step, "args": asdict(args)}
        state |= {"generator": generator.get_state(), "rng": dc.rng_state()}
        if all(torch.isfinite(p).all() for p in agent.parameters()):
            dc.atomic_save(run_dir / "checkpoint.pt", lambda file: torch.save(state, file))

    def evaluate_all(protocols):
        traced = []
        results = dc.evaluate(data, partial(adapt, agent), protocols, args.eval_episodes, traced)
        results |= dc.embedding_quality(data, partial(embed, agent))
        return results | {"eval/iid/q_error": q_error(agent, traced[0], args)}

    stopping = []

    def on_interrupt(*_):
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    previous = signal.signal(signal.SIGINT, on_interrupt)
    step_fn = torch.compile(update) if args.compile else update
    tasks = torch.as_tensor(data.train_ids, device=device)
    start, start_step, timed, results = time.time(), step, 0.0, {}
    if step >= args.total_updates:  # interrupted between the last checkpoint and result.json
        results = evaluate_all(dc.PROTOCOLS)
    while step < args.total_updates and not stopping:
        if step % args.bandit_every == 0:
            agent.bandit_step(bandit_return(agent, data, args, generator), args.bandit_lr, generator)
        tick = time.perf_counter()
        task_ids = tasks[torch.randint(len(tasks), (args.meta_batch,), device=device, generator=generator)]
        context = data.sample(task_ids, args.context_size, generator)[..., :-1]
        batch = data.unpack(data.sample(task_ids, args.batch_size, generator))
        metrics = step_fn(agent, context, batch, args)
        timed += time.perf_counter() - tick
        step += 1
        last = step == args.total_updates
        intervals = (args.log_every, args.eval_every, args.save_every, args.bandit_every)
        if last or any(step % interval == 0 for interval in intervals):  # the only reads from the device
            values = {tag: value.item() for tag, value in metrics.items()}
            values |= {f"bandit/prob_{a:.2f}": p for a, p in zip(agent.arms.tolist(), agent.arm_probs().tolist())}
            values |= {f"parameter {n}": p.sum().item() for n, p in agent.named_parameters() if not p.isfinite().all()}
            broken = [tag for tag, value in values.items() if not math.isfinite(value)]
            if broken:
                good = run_dir / "checkpoint.pt"
                remedy = f"the last good state is {good}" if good.exists() else "there is no checkpoint yet"
                raise SystemExit(f"stopped at update {step}: {broken[0]} is {values[broken[0]]}; {remedy}")
        if step % args.log_every == 0:
            log(values)
            speed = (step - start_step) / timed
            writer.add_scalar("charts/updates_per_sec", speed, step)
            writer.add_scalar("charts/wall_clock_s", time.time() - start, step)
            eta = (time.time() - start) / (step - start_step) * (args.total_updates - step)
            print(
                f"[{step:>7}/{args.total_updates} {100 * step // args.total_updates:>3}%] {speed:.1f} upd/s  eta {dc.duration(eta)}  "
                + "  ".join(f"{tag.split('/')[1]} {values[tag]:.3g}" for tag in CONSOLE_TAGS),
                flush=True,
            )
        if step % args.eval_every == 0 or last:
            results = evaluate_all(dc.PROTOCOLS if last else ("iid", "train"))
            log(results)
            print("  " + eval_line(results), flush=True)
        if step % args.save_every == 0 or last:
            save()
    signal.signal(signal.SIGINT, previous)
    if stopping:
        save()
        print(f"interrupted after {step} updates; continue with: python {Path(sys.argv[0]).name} --resume {run_dir}")
        raise SystemExit(130)
    z, labels = dc.label_contexts(data, partial(embed, agent))
    writer.add_embedding(z, metadata=labels, global_step=step, tag="z")
    writer.close()
    metrics_file.close()
    results |= {"run_dir": str(run_dir), "updates_per_sec": (step - start_step) / max(timed, 1e-9), "step": step}
    write_json(run_dir / "result.json", results)
    return results


CONSOLE_TAGS = ("losses/encoder", "losses/feature", "losses/actor", "losses/kl", "stats/q_mean", "stats/divergence")


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> posterior mean through the flows [R, z_dim]."""
    with torch.no_grad():
        return agent.infer(context, mask, 0.0)[0]


def eval_line(results):
    """One line of the returns per protocol, normalized in brackets."""
    names = [p for p in dc.PROTOCOLS if f"eval/{p}/return" in results]
    cells = [f"{p} {results[f'eval/{p}/return']:.1f} ({results[f'eval/{p}/normalized']:.0f})" for p in names]
    return "  ".join(["eval", *cells, f"z acc {results['z/nearest_task_acc']:.2f} R2 {results['z/probe_r2']:.2f}"])


def write_json(path, content):
    dc.atomic_save(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


# ---- main -------------------------------------------------------------------

if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
