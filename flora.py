"""FLORA: flow-based task inference and adaptive correction of feature overgeneralization.

Wang, Li, Wang, Bennis, AAAI-26, https://arxiv.org/abs/2601.07164. There is no official code; (n) are its equations.
The critic is split into successor features and task weights. Its targets are lowered where two feature networks
disagree, by an amount that a bandit chooses. The task is a Gaussian posterior that a chain of planar flows bends.
Symbols: M tasks, B transitions of each, D features.
  z [M, z_dim] task latent         phi [M, B, D] features of (s, a, s', z): reward = phi . W (3)
  W [M, D] task weights W(z)       psi [2, M, B, D] successor features of (s, a, z): Q = psi . W (4)
  pi, pi_beta policy, behavior policy of (s, z)       alpha <= 0 correction, one of the bandit's arms
One update:
  1 infer    z = flows(z_0), z_0 sampled from q_0(z | context) (14-16)
  2 targets  psi' = mean + alpha std of the two target psi at the next action (8, 9);  y = n_step(rewards, psi' . W)
             and y_psi = n_step(phi, psi')
  3 critic   L_r = (r - phi . W)^2 / 2 trains phi and W (5);  L_psi = Huber(psi - y_psi) trains psi (11)
  4 encoder  rho3 (L_r + L_psi) - log p(y) + rho2 KL(q || N(0, I)) trains encoder and flows (17, 18)
  5 policy   maximum likelihood trains pi_beta;  rho1 KL(pi || pi_beta) - min Q trains pi (12, 13);  rho1 is adapted
  Every --bandit-every updates a bandit credits alpha with the change of the return and draws the next one (10).
Differences from the paper, tagged in the code. D are FLORA's, B the shared actor-critic's:
  D1  W = softmax, so a lower feature never raises Q: --weight-activation softmax (paper: silent)
  D2  log p(y) is of the best-fitting Gaussian, for --likelihood-weight 32 transitions (paper: silent)
  D3  the bandit sees the critic's value of initial states: --bandit-feedback offline (paper: rollout)
  D4  policy, pi_beta and bootstrap values use the posterior mean, all other losses a sample (paper: a sample)
  D5  point families: a slower encoder, --encoder-lr 3e-4, and a fixed rho1, --kl-coef-lr 0 (paper: rho1 is trained)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: all, 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (1 in point families), then --target-noise 0, the mean action (paper: 1 and 1)
  B4  layer norm except in the encoder; --lr-decay: learning rates fall in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper: --n-step 1 --target-noise 1 --bc-top-fraction 1 --bc-weight-decay 0 --no-lr-decay
  --bandit-feedback rollout --kl-coef-lr 1e-4. No flag reaches D2, D4, B2, B5, layer norm.
"""

import copy
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
    exp_name: str = "flora"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 8_000  # updates of the policy [gradient steps]
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
    batch_size: int = 32  # transitions per task and update [transitions]
    context_size: int = 64  # transitions of a training context [transitions]
    # method
    gamma: float | None = None  # discount
    reward_scale: float | None = None  # factor on the rewards in the losses
    lr: float = 1.2e-3  # learning rate of all networks except encoder and flows
    encoder_lr: float | None = None  # learning rate of encoder and flows
    lr_decay: bool = True  # let learning rates fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target [steps]
    target_noise: float = 0.0  # noise of the target's action: 1 = a sample of the policy, 0 = its mean
    tau: float = 0.02  # rate at which target networks follow (zeta)
    width: int = 256  # hidden units of the networks
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the task latent
    feature_dim: int = 32  # number of features D
    weight_activation: Literal["softmax", "none"] = "softmax"  # activation of the task weights W
    num_flows: int = 4  # planar flows; 0 = Gaussian posterior, the ablation of flow-based task inference
    likelihood_weight: float = 32.0  # transitions that log p(y) counts for
    prior_weight: float = 0.1  # weight of the posterior's KL to the prior (rho2)
    feature_weight: float = 0.01  # weight of reward and feature loss in the encoder's loss (rho3)
    metric_weight: float = 0.0  # beyond the paper: weight of FOCAL's metric loss in the encoder's loss
    alpha_min: float = -1.0  # most pessimistic arm of the correction; 0 = no correction, the ablation
    num_arms: int = 5  # arms between alpha_min and 0, at most 20
    bandit_every: int = 500  # updates per bandit episode [gradient steps]
    bandit_lr: float = 0.1  # step size of the bandit (lambda)
    bandit_feedback: Literal["offline", "rollout"] = "offline"
    """what the bandit credits: offline = the critic's value of initial states, rollout = episodes on training tasks"""
    bc_top_fraction: float | None = None
    """share of each task's transitions, best episodes first, that pi_beta is fitted to"""
    bc_weight_decay: float = 0.3  # weight decay of pi_beta
    kl_coef: float | None = None  # initial weight of KL(pi || pi_beta) in the policy loss (rho1)
    kl_coef_lr: float | None = None  # step size with which it follows --kl-target; 0 = fixed
    kl_coef_max: float = 100.0  # its largest value
    kl_target: float | None = None  # divergence that it aims at [nats]


ENV_DEFAULTS = {  # for arguments left at None: all families, then changes for families whose name holds the key
    "": dict(
        gamma=0.97,
        reward_scale=0.05,
        encoder_lr=1.2e-3,
        n_step=5,
        z_dim=20,
        bc_top_fraction=0.25,
        kl_coef=0.1,
        kl_coef_lr=1e-4,
        kl_target=0.2,
    ),
    # [ours: D5]
    "point": dict(gamma=0.9, reward_scale=0.5, encoder_lr=3e-4, n_step=1, z_dim=5, kl_coef=0.15, kl_coef_lr=0.0),
}

# ---- networks ---------------------------------------------------------------


# SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
class MLP(nn.Module):
    """Network on [x, z]: two hidden layers, each linear, layer norm, ReLU; then a linear output."""

    def __init__(self, in_dim, z_dim, width, out_dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim + z_dim, width),
            nn.LayerNorm(width, elementwise_affine=False),  # [ours: B4]
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.ReLU(),
            nn.Linear(width, out_dim),
        )

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [M, B, out_dim]."""
        return self.net(torch.cat([x, z[:, None].expand(-1, x.shape[1], -1)], -1))


# SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
class Twin(nn.Module):
    """Two MLPs with the same sizes and different initial weights."""

    def __init__(self, *sizes):
        super().__init__()
        self.nets = nn.ModuleList([MLP(*sizes), MLP(*sizes)])

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [2, M, B, out_dim]."""
        return torch.stack([net(x, z) for net in self.nets])


class Encoder(nn.Module):
    """Gaussian posterior q_0(z | context): the product of one Gaussian factor per transition, as in PEARL."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2 * z_dim))

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> mean [M, z_dim], var [M, z_dim] > 0."""
        mean, var = self.net(context).chunk(2, -1)  # [M, K, z_dim] each
        precision = mask[..., None] / F.softplus(var).clamp(min=1e-7)
        var = 1 / precision.sum(1)
        return var * (precision * mean).sum(1), var


class PlanarFlows(nn.Module):
    """z_K = f_K(... f_1(z_0)) with f(z) = z + u tanh(w . z + b) (Eq. 14, 15)."""

    def __init__(self, num_flows, z_dim):
        super().__init__()
        self.u = nn.Parameter(0.01 * torch.randn(num_flows, z_dim))  # the chain starts near the identity
        self.w = nn.Parameter(torch.randn(num_flows, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(num_flows))

    def invertible_u(self):
        """u moved along w until w . u >= -1, which makes every flow invertible -> [num_flows, z_dim].
        Rezende & Mohamed 2015 use softplus(x) - 1; the shift by log(e - 1) keeps u = 0 where it is."""
        wu = (self.w * self.u).sum(-1, keepdim=True)
        norm2 = (self.w**2).sum(-1, keepdim=True).clamp(min=1e-12)
        return self.u + (F.softplus(wu + math.log(math.e - 1)) - 1 - wu) * self.w / norm2

    def forward(self, z):
        """z_0 [M, z_dim] -> z_K [M, z_dim], log |det dz_K / dz_0| [M]."""
        log_det = torch.zeros_like(z[:, 0])
        for u, w, b in zip(self.invertible_u(), self.w, self.b):
            h = torch.tanh(z @ w + b)  # [M]
            log_det = log_det + torch.log1p(((1 - h**2) * (w @ u)).clamp(min=1e-6 - 1))  # (Eq. 16)
            z = z + u * h[:, None]  # (Eq. 14)
        return z, log_det


class Weights(nn.Module):
    """Task weights W(z) (Eq. 3, 4)."""

    def __init__(self, z_dim, feature_dim, width, activation):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(z_dim, width), nn.ReLU(), nn.Linear(width, feature_dim))
        self.activation = activation

    def forward(self, z):
        """z [M, z_dim] -> W [M, 1, feature_dim], the same for all transitions of a task."""
        logits = self.net(z)[:, None]
        return logits.softmax(-1) if self.activation == "softmax" else logits  # [ours: D1]


# ---- losses -----------------------------------------------------------------


# SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
class Gaussian(NamedTuple):
    """A policy's normal distribution before the tanh that bounds its actions."""

    mean: torch.Tensor  # [M, B, act_dim]
    log_std: torch.Tensor  # [M, B, act_dim]

    def sample(self, noise=1.0):
        """-> [M, B, act_dim], `noise` standard deviations from the mean; 0 = the mean."""
        return self.mean + noise * self.log_std.exp() * torch.randn_like(self.mean)

    def log_prob(self, pre):
        """Log-density of the action tanh(pre): pre [M, B, act_dim] -> [M, B]."""
        normal = -0.5 * ((pre - self.mean) * (-self.log_std).exp()).pow(2) - self.log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - pre - F.softplus(-2 * pre))  # log of 1 - tanh(pre)^2
        return (normal - log_slope).sum(-1)

    def kl(self, other):
        """KL(self || other) -> [M, B] nats; the tanh of both does not change it."""
        log_ratio = self.log_std - other.log_std
        distance = ((self.mean - other.mean) * (-other.log_std).exp()).pow(2)
        return (0.5 * ((2 * log_ratio).exp() + distance - 1) - log_ratio).sum(-1)  # [ours: B2]


# SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
def n_step(steps, final, segment):
    """Discounted sum: steps [M, B, n, D] along a segment, final [M, B, D] after it -> [M, B, D]."""
    return (segment.discount[..., None] * steps).sum(2) + segment.bootstrap[..., None] * final  # [ours: B3]


def reward_loss(phi, weights, rew):
    """phi [M, B, D], weights [M, 1, D], rew [M, B] -> scalar."""
    return 0.5 * (rew - (phi * weights).sum(-1)).pow(2).mean()  # (Eq. 3, 5)


def feature_loss(psi, psi_target):
    """psi [2, M, B, D], psi_target [M, B, D] -> scalar: Huber loss, summed over features and networks."""
    return F.huber_loss(psi, psi_target.expand_as(psi), reduction="none").sum((0, -1)).mean()  # (Eq. 11)


def value_log_likelihood(psi, weights, q_target):
    """psi [2, M, B, D], weights [M, 1, D], q_target [M, B] -> scalar: log p(y) of one transition, up to a constant.
    Each network's error is Gaussian with the mean and variance that fit best. With a fixed mean, z drifts away from the
    prior to encode a bias that all tasks share."""
    error = (psi * weights).sum(-1) - q_target  # [2, M, B]
    variance = error.var((1, 2), correction=0)
    return -0.5 * (variance + 1e-6).log().mean()  # first term of (Eq. 17)  [ours: D2]


def posterior_kl(z_0, z_k, mean, var, log_det):
    """KL(q(z | context) || N(0, I)) from one sample: z_0, z_k, mean, var [M, z_dim], log_det [M] -> [M]."""
    log_q = -0.5 * ((z_0 - mean).pow(2) / var + var.log()).sum(-1) - log_det  # (Eq. 16)
    return log_q + 0.5 * z_k.pow(2).sum(-1)  # the constants of both Gaussians cancel


# SHARED: identical in focal.py, csro.py, er_trl.py, focal_pp.py, idaq.py
def metric_loss(z, task_ids, eps=1e-3):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + eps).sqrt()).sum() / (same.sum() + eps)
    push = (other / (distance + 100 * eps)).sum() / (other.sum() + eps)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, rho1, the bandit, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.flows = PlanarFlows(args.num_flows, z_dim)
        self.phi = MLP(2 * obs_dim + act_dim, z_dim, width, args.feature_dim)
        self.weights = Weights(z_dim, args.feature_dim, width, args.weight_activation)
        self.psi = Twin(obs_dim + act_dim, z_dim, width, args.feature_dim)
        self.psi_target = copy.deepcopy(self.psi).requires_grad_(False)
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)
        for net in (self.behavior, self.residual, self.phi):  # they start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        self.inference = [*self.encoder.parameters(), *self.flows.parameters()]
        self.encoder_opt = torch.optim.Adam(self.inference, args.encoder_lr, fused=True)
        self.behavior_opt = torch.optim.AdamW(
            self.behavior.parameters(), args.lr, weight_decay=args.bc_weight_decay, fused=True
        )
        nets = (self.phi, self.weights, self.psi, self.residual)
        self.opt = torch.optim.Adam([p for net in nets for p in net.parameters()], args.lr, fused=True)
        self.register_buffer("kl_coef", torch.tensor(float(args.kl_coef)))
        self.register_buffer("arms", torch.linspace(args.alpha_min, 0, args.num_arms))
        self.register_buffer("arm_logits", torch.zeros(args.num_arms))
        self.register_buffer("arm", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_return", torch.tensor(float("nan")))

    def infer(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K], noise [M, z_dim] (0 = posterior mean)
        -> z [M, z_dim], mean and var of q_0 [M, z_dim], KL to the prior [M]."""
        mean, var = self.encoder(context, mask)
        z_0 = mean + var.sqrt() * noise
        z, log_det = self.flows(z_0)  # (Eq. 15)
        return z, mean, var, posterior_kl(z_0, z, mean, var, log_det)

    def q(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both networks [2, M, B]."""
        return (self.psi(torch.cat([obs, act], -1), z) * self.weights(z)).sum(-1)  # (Eq. 4)

    # SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
    def behavior_policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussian of pi_beta."""
        mean, log_std = self.behavior(obs, z).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-3, 1))

    # SHARED: identical in unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussians of pi and pi_beta; only pi's residual gets gradients."""
        with torch.no_grad():
            pi_beta = self.behavior_policy(obs, z)
        mean, log_std = self.residual(obs, z).chunk(2, -1)
        return Gaussian(pi_beta.mean + mean, (pi_beta.log_std + log_std).clamp(-5, 2)), pi_beta  # [ours: B5]

    # SHARED: identical in focal.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
    def act(self, obs, z, bc=False):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean action [M, B, act_dim] in (-1, 1) of pi, or of pi_beta with bc."""
        pi, pi_beta = self.policies(obs, z)
        return torch.tanh(pi_beta.mean if bc else pi.mean)

    def arm_probs(self):
        """-> probabilities [num_arms] of the arms, each at least 0.05."""
        return 0.05 + (1 - 0.05 * len(self.arms)) * self.arm_logits.softmax(0)

    def bandit_step(self, episode_return, lr, generator):
        """Credit the drawn arm with the change of the return, in units of the data's standard deviation, then draw."""
        if not self.last_return.isnan():
            gain = (episode_return - self.last_return).clamp(-1, 1)
            self.arm_logits[self.arm] += lr * gain / self.arm_probs()[self.arm]  # (Eq. 10)
        self.last_return.copy_(episode_return)
        self.arm.copy_(torch.multinomial(self.arm_probs(), 1, generator=generator)[0])


# ---- update -----------------------------------------------------------------


def update(agent, task_ids, context, segment, bc_batch, args):
    """One step of every network, from the parameters before the step. task_ids [M]; context [M, K, ctx_dim]; segment:
    Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch [M, B, ..] from the best episodes
    -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    rew = args.reward_scale * segment.rew  # [M, B, n]

    # 1 infer: a sample of the posterior for most losses, its mean for the policies
    noise = torch.randn(len(context), args.z_dim, device=context.device)
    z, z_mean, z_var, prior_kl = agent.infer(context, torch.ones_like(context[..., 0]), noise)
    weights = agent.weights(z)  # [M, 1, D]
    with torch.no_grad():  # policies and bootstrap values never train the encoder
        z_fixed, _ = agent.flows(z_mean)  # [ours: D4]

    # 2 targets: n-step sums of rewards and of features, then the corrected features of the next action
    transitions = torch.cat([segment.obs, segment.act, segment.next_obs], -1)  # [M, B, n, ..]
    phi = agent.phi(transitions[:, :, 0], z)  # [M, B, D]
    alpha = agent.arms.take(agent.arm)  # indexing with a 0-d tensor would synchronize with the device
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z_fixed)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_psi = agent.psi_target(torch.cat([next_obs, next_act], -1), z_fixed)  # [2, M, B, D]
        next_psi = next_psi.mean(0) + alpha * next_psi.std(0)  # (Eq. 8, 9): [M, B, D]
        next_q = (next_psi * agent.weights(z_fixed)).sum(-1, keepdim=True)
        q_target = n_step(rew[..., None], next_q, segment)[..., 0]  # y of (Eq. 17): [M, B]
        later_phi = agent.phi(transitions[:, :, 1:].flatten(1, 2), z).unflatten(1, (obs.shape[1], -1))
        psi_target = n_step(torch.cat([phi[:, :, None], later_phi], 2), next_psi, segment)  # of (Eq. 11): [M, B, D]

    # 3 critic
    agent.opt.zero_grad()
    psi = agent.psi(torch.cat([obs, act], -1), z)  # [2, M, B, D]
    loss_r = reward_loss(phi, weights, rew[..., 0])
    loss_psi = feature_loss(psi, psi_target)
    loss_psi.backward(inputs=list(agent.psi.parameters()), retain_graph=True)
    loss_r.backward(inputs=[*agent.phi.parameters(), *agent.weights.parameters()], retain_graph=True)

    # 4 encoder and flows
    agent.encoder_opt.zero_grad()
    log_likelihood = args.likelihood_weight * value_log_likelihood(psi, weights, q_target)
    elbo = log_likelihood - args.prior_weight * prior_kl.mean()  # (Eq. 17)
    encoder_loss = args.feature_weight * (loss_r + loss_psi) - elbo  # (Eq. 18)
    if args.metric_weight:
        encoder_loss = encoder_loss + args.metric_weight * metric_loss(z_mean, task_ids)
    encoder_loss.backward(inputs=agent.inference)

    # 5 behavior policy by maximum likelihood, and the policy, kept close to it
    agent.behavior_opt.zero_grad()
    bc_act = torch.atanh(bc_batch.act.clamp(-0.999, 0.999))  # before the tanh, finite at the bounds
    bc_loss = -agent.behavior_policy(bc_batch.obs, z_fixed).log_prob(bc_act).mean()  # [ours: B1]
    bc_loss.backward(inputs=list(agent.behavior.parameters()))
    pi, pi_beta = agent.policies(obs, z_fixed)
    pi_psi = agent.psi(torch.cat([obs, torch.tanh(pi.sample())], -1), z_fixed)
    q = (pi_psi * agent.weights(z_fixed)).sum(-1).amin(0).mean()  # (Eq. 12)
    kl = pi.kl(pi_beta).mean()
    actor_loss = agent.kl_coef * kl - q  # (Eq. 13)
    actor_loss.backward(inputs=list(agent.residual.parameters()))

    # steps of all optimizers, of rho1 and of the target networks
    agent.opt.step()
    agent.encoder_opt.step()
    agent.behavior_opt.step()
    with torch.no_grad():
        # Lagrange multiplier: it grows while the KL exceeds its target
        agent.kl_coef.add_(args.kl_coef_lr * (kl - args.kl_target)).clamp_(0, args.kl_coef_max)
        torch._foreach_lerp_(list(agent.psi_target.parameters()), list(agent.psi.parameters()), args.tau)

    # metrics
    metrics = {
        "losses/reward": loss_r,
        "losses/feature": loss_psi,
        "losses/encoder": encoder_loss,
        "losses/actor": actor_loss,
        "losses/behavior": bc_loss,
        "losses/kl": prior_kl.mean(),
        "stats/q_mean": q,
        "stats/divergence": kl,
        "stats/kl_coef": agent.kl_coef.clone(),
        "stats/alpha": alpha,
        "stats/std_data": psi.std(0).mean(),
        "stats/std_policy": pi_psi.std(0).mean(),
        "stats/weight_perplexity": perplexity(weights),
        "z/between_std": z_mean.std(0, correction=min(1, len(z_mean) - 1)).mean(),
        "z/posterior_std": z_var.sqrt().mean(),
        "z/norm": z.norm(dim=-1).mean(),
    }
    metrics |= {f"bandit/prob_{i}": prob for i, prob in enumerate(agent.arm_probs())}
    return {tag: value.detach() for tag, value in metrics.items()}


def perplexity(weights):
    """weights [.., D] -> 0-d: number of features that carry weight, 1 to D; signs do not count."""
    share = F.normalize(weights.abs(), p=1, dim=-1)
    return torch.special.entr(share).sum(-1).exp().mean()


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> posterior mean through the flows [R, z_dim]; rows without a transition
    get the flows' image of 0."""
    with torch.no_grad():
        return agent.infer(context, mask, 0.0)[0]


def adapt(agent, context, mask, explore=False, bc=False):
    """Infer the task and act on it: context [R, K, ctx_dim], mask [R, K] -> policy(obs [R, obs_dim], rew [R]) -> act.
    Rows without a transition use the prior N(0, I). explore: a sample instead of the mean; bc: pi_beta acts."""
    z_dim = agent.flows.u.shape[1]
    generator = torch.Generator(context.device).manual_seed(0)  # evaluation leaves training's noise alone
    noise = explore * torch.randn(len(context), z_dim, device=context.device, generator=generator)
    with torch.no_grad():
        z = torch.where(mask.any(1, keepdim=True), agent.infer(context, mask, noise)[0], noise)
    return lambda obs, rew: agent.act(obs[:, None], z, bc)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def bandit_return(agent, data, args, generator):
    """Return of the current policy in standard deviations of the data's returns -> 0-d tensor. [ours: D3]"""
    if args.bandit_feedback == "rollout":
        mean = dc.evaluate(data, partial(adapt, agent), ("train",), 1)["eval/train/return"]
        return torch.tensor(mean / data.return_std, device=data.device)
    context = data.sample_context(data.train_tasks, args.context_size, generator)
    obs = data.episodes[data.train_tasks][:, : data.min_episodes, 0, : data.obs_dim]  # initial states [U, N, obs_dim]
    with torch.no_grad():
        z = embed(agent, context, torch.ones_like(context[..., 0]))
        return agent.q(obs, agent.act(obs, z), z).mean() / (args.reward_scale * data.return_std)


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("bc"), the critic's error and the quality of z -> dict tag -> float."""
    q, bc = partial(value, agent, args), partial(adapt, agent, bc=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, bc)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    args = dc.resolve(args, ENV_DEFAULTS)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    with dc.Run(args, data, agent, generator) as run:
        for step in run.updates():
            if (step - 1) % args.bandit_every == 0:
                agent.bandit_step(bandit_return(agent, data, args, generator), args.bandit_lr, generator)
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            dc.set_lr(agent.opt, args.lr * run.decay)
            dc.set_lr(agent.behavior_opt, args.lr * run.decay)
            dc.set_lr(agent.encoder_opt, args.encoder_lr * run.decay)
            metrics = update(agent, task_ids, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
