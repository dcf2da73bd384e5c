"""FLORA: flow-based task inference and adaptive correction of feature overgeneralization.

Wang, Li, Wang, Bennis, AAAI-26, https://arxiv.org/abs/2601.07164. There is no official code; (n) is an equation there.
Training data are offline; a new task is known by a context of its transitions. Features phi explain the reward, psi are
their discounted sums. At actions that the data lack psi is too high, so targets are lowered by |alpha| times the
disagreement of two networks; a bandit adapts alpha. Planar flows transform the Gaussian posterior of the task z.
  M tasks, B segments of n transitions, F features                     z [M, z_dim] task latent, a sample of q
  q_0(z | context) Gaussian of the encoder, q = q_0 after the flows    W [M, 1, F] task weights W(z)
  z_mean [M, z_dim] image of q_0's mean, used at test (0: no context)  pi(s, z), pi_beta(s, z) policy, behavior policy
  phi [M, B, F] of (s, a, s', z): reward = phi . W (3)                 psi [2, M, B, F] of (s, a, z): Q = psi . W (4)
One update; all gradients are taken before an optimizer steps:
  1 infer    z and z_mean = flows of a sample and of the mean of q_0 (14-16)
  2 targets  psi' = mean + alpha std of the two target psi at s_n, pi's action, z_mean (8, 9)
             y = sum_i gamma^i r_i + gamma^n psi' . W(z_mean);  y_psi = sum_i gamma^i phi_i + gamma^n psi'
  3 critic   L_r = (r - phi . W)^2 / 2 trains phi and W (5);  L_psi = Huber(psi - y_psi) trains psi (11)
  4 encoder  rho3 (L_r + L_psi) - log p(y) + rho2 KL(q || N(0, I)) trains encoder and flows (17, 18)
  5 policy   maximum likelihood trains pi_beta;  rho1 KL(pi || pi_beta) - min Q trains pi at z_mean (12, 13)
  Per bandit episode (--bandit-episodes): credit alpha with the change of the estimated return, draw the next (10)
Differences from the paper, tagged [ours: ..] in the code; D are FLORA's, B the shared actor-critic's:
  D1  W = softmax, so a lower feature never raises Q: --weight-activation softmax (paper: silent)
  D2  log p(y): mean over transitions with the fitted mean and variance of Q - y, times --likelihood-weight 32 (silent)
  D3  the bandit is credited with the critic's value, which alpha itself raises: --bandit-feedback (paper: rollout);
      a change counts in units of the usual change, at most 1 (paper: as it is)
  D4  policy, pi_beta and bootstrap values use z_mean, all other losses the sample z (paper: the sample)
  D5  point families: --encoder-lr 3e-4 (paper: silent) and a fixed rho1, --kl-coef-lr 0 (paper: rho1 is trained)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper: --n-step 1 --target-noise 1 --bc-top-fraction 1 --bc-weight-decay 0 --no-lr-decay
  --kl-coef-lr 1e-4 --bandit-feedback rollout. No flag reaches D4, B2, B5, layer norm; benchmark/flora_paper.py
  also removes layer norm and makes pi a network of its own.
Beyond the paper: --metric-weight 400; where rewards are linear, as on Ant-Dir, --no-phi-sees-z --inference likelihood.
For other policies' data: benchmark/relabelled.py, this script on contexts with learned rewards.
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
    batch_size: int = 32  # transitions per task and update [transitions]
    context_size: int = 64  # transitions of a training context [transitions]
    # method; None = by family, see ENV_DEFAULTS
    gamma: float | None = None  # discount
    reward_scale: float | None = None  # factor on the rewards in the losses, so on Q; contexts keep raw rewards
    lr: float = 1.2e-3  # learning rate of all networks except encoder and flows
    encoder_lr: float | None = None  # learning rate of encoder and flows
    lr_decay: bool = True  # let learning rates fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target [steps]
    target_noise: float = 0.0  # noise of the target's action: 1 = a sample of the policy, 0 = its mean
    tau: float = 0.02  # rate at which the target psi follows psi (zeta)
    width: int = 256  # hidden units of the networks
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the task latent
    feature_dim: int = 32  # number of features F
    phi_sees_z: bool = True  # phi(s, a, s', z) as in the paper; without z only W(z) tells the task's reward
    weight_activation: Literal["softmax", "none"] = "softmax"  # activation of the task weights W
    num_flows: int = 4  # planar flows; 0 = Gaussian posterior, the ablation of flow-based task inference
    likelihood_weight: float = 32.0  # factor on log p(y), a mean over transitions
    prior_weight: float = 0.1  # weight of the posterior's KL to the prior (rho2)
    feature_weight: float = 0.01  # weight of reward and feature loss in the encoder's loss (rho3)
    metric_weight: float = 0.0  # beyond the paper: weight of FOCAL's metric loss (Li et al. 2021) in the encoder's loss
    inference: Literal["encoder", "likelihood"] = "encoder"
    """at test: z_mean, or beyond the paper a training task's z that explains the context's rewards better"""
    alpha_min: float = -1.0  # most pessimistic arm of the correction; 0 = no correction, the ablation
    num_arms: int = 5  # arms from alpha_min to 0, at most 20, since each keeps a probability of 0.05
    bandit_episodes: int = 40  # draws of alpha, evenly spaced over the training
    bandit_lr: float = 0.1  # step size of the bandit (lambda)
    bandit_feedback: Literal["offline", "rollout"] = "offline"
    """what the bandit credits: offline = the critic's value of initial states, rollout = episodes on training tasks"""
    bc_top_fraction: float | None = None
    """share of each task's transitions, best episodes first, that pi_beta is fitted to"""
    bc_weight_decay: float = 0.3  # weight decay of pi_beta
    kl_coef: float | None = None  # initial weight of KL(pi || pi_beta) in the policy loss (rho1)
    kl_coef_lr: float | None = None  # rho1 grows at this rate while the KL exceeds kl_target, else falls; 0 = fixed
    kl_coef_max: float = 100.0  # largest rho1
    kl_target: float | None = None  # KL that rho1 aims at [nats]


ENV_DEFAULTS = {  # for arguments left at None: all families, then changes for families whose name holds the key
    "": dict(
        gamma=0.97,
        encoder_lr=1.2e-3,
        n_step=5,
        z_dim=20,
        bc_top_fraction=0.25,
        kl_coef=0.1,
        kl_coef_lr=1e-4,
        kl_target=0.2,
    ),
    # encoder_lr and kl_coef_lr: [ours: D5]
    "ant-dir": dict(reward_scale=0.05),
    "cheetah-vel": dict(reward_scale=0.05),
    "point": dict(gamma=0.9, reward_scale=0.5, encoder_lr=3e-4, n_step=1, z_dim=5, kl_coef=0.15, kl_coef_lr=0.0),
}

# ---- networks ---------------------------------------------------------------


# SHARED: identical in all scripts with this actor-critic
class MLP(nn.Module):
    """Network on [x, z]: two hidden layers, each linear, layer norm, ReLU; then a linear output."""

    def __init__(self, in_dim, z_dim, width, out_dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim + z_dim, width),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.ReLU(),
            nn.Linear(width, out_dim),
        )

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [M, B, out_dim]."""
        return self.net(torch.cat([x, z[:, None].expand(-1, x.shape[1], -1)], -1))


# SHARED: identical in all scripts with this actor-critic
class Twin(nn.Module):
    """Two MLPs with the same sizes and different initial weights."""

    def __init__(self, *sizes):
        super().__init__()
        self.nets = nn.ModuleList([MLP(*sizes), MLP(*sizes)])

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [2, M, B, out_dim]."""
        return torch.stack([net(x, z) for net in self.nets])


class Encoder(nn.Module):
    """Gaussian posterior q_0(z | context): the product of one Gaussian factor per transition, as in PEARL
    (Rakelly et al. 2019)."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2 * z_dim))

    def forward(self, context, mask):
        """context [M, K, ctx_dim] of (s, a, r, s'), mask [M, K] 1 = real, at least one each -> mean [M, z_dim], var
        [M, z_dim] > 0."""
        means, raw = self.net(context).chunk(2, -1)  # [M, K, z_dim] each
        precisions = mask[..., None] / F.softplus(raw).clamp(min=1e-7)
        var = 1 / precisions.sum(1)
        return var * (precisions * means).sum(1), var


class PlanarFlows(nn.Module):
    """z = f_n(... f_1(z_0)) with f(z) = z + u tanh(w . z + b) (Eq. 14, 15)."""

    def __init__(self, num_flows, z_dim):
        super().__init__()
        self.u = nn.Parameter(0.01 * torch.randn(num_flows, z_dim))  # the chain starts near the identity
        self.w = nn.Parameter(torch.randn(num_flows, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(num_flows))

    def invertible_u(self):
        """u, moved along w until w . u = softplus(old w . u + c) - 1 > -1, which makes every flow invertible (Rezende &
        Mohamed 2015, with c = 0); c = log(e - 1) leaves u = 0 as it is -> [num_flows, z_dim]."""
        old = (self.w * self.u).sum(-1, keepdim=True)
        new = F.softplus(old + math.log(math.e - 1)) - 1
        return self.u + (new - old) * self.w / (self.w**2).sum(-1, keepdim=True).clamp(min=1e-12)

    def forward(self, z):
        """z_0 [M, z_dim] -> z [M, z_dim], log |det dz / dz_0| [M]."""
        log_det = torch.zeros_like(z[:, 0])
        for u, w, b in zip(self.invertible_u(), self.w, self.b):  # [z_dim], [z_dim], scalar
            h = torch.tanh(z @ w + b)  # [M]
            det = 1 + (1 - h**2) * (w @ u)  # of this flow
            log_det = log_det + det.clamp(min=1e-6).log()  # (Eq. 16); det > 0 except for rounding
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


# SHARED: identical in all scripts with this actor-critic
class Gaussian(NamedTuple):
    """A policy's normal distribution before the tanh that bounds its actions."""

    mean: torch.Tensor  # [M, B, act_dim]
    log_std: torch.Tensor  # [M, B, act_dim]

    def sample(self, noise=1.0):
        """-> mean + noise * std * N(0, I) [M, B, act_dim]; noise = 0 gives the mean."""
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


# SHARED: identical in all scripts with this actor-critic
def n_step(steps, final, segment):
    """Discounted sum: steps [M, B, n, F] along a segment, final [M, B, F] after it -> [M, B, F]."""
    return (segment.discount[..., None] * steps).sum(2) + segment.bootstrap[..., None] * final  # [ours: B3]


def disagreement(psi):
    """psi [2, .., F] of two networks -> their standard deviation per feature [.., F]."""
    return (psi[0] - psi[1]).abs() / math.sqrt(2)  # (Eq. 8)


def reward_loss(phi, weights, rew):
    """phi [M, B, F], weights [M, 1, F], rew [M, B] -> scalar."""
    return 0.5 * (rew - (phi * weights).sum(-1)).pow(2).mean()  # (Eq. 3, 5)


def feature_loss(psi, psi_target):
    """psi [2, M, B, F], psi_target [M, B, F] -> scalar: Huber loss, a sum over features and networks."""
    return F.huber_loss(psi, psi_target.expand_as(psi), reduction="none").sum((0, -1)).mean()  # (Eq. 11)


def value_log_likelihood(psi, weights, q_target):
    """psi [2, M, B, F], weights [M, 1, F], q_target [M, B] -> scalar: mean log p(y) of a transition, up to a constant.

    Q - y is Gaussian, for each network with its own mean and variance over the batch. With a mean of 0, a bias of Q
    that all tasks share would dominate, which tells nothing of the task."""
    error = (psi * weights).sum(-1) - q_target  # [2, M, B]
    variance = error.var((1, 2), correction=0)
    return -0.5 * (variance + 1e-6).log().mean()  # of (Eq. 17); (error - mean)^2 / variance is 1 on average  [ours: D2]


def posterior_kl(z_0, z, mean, var, log_det):
    """KL(q || N(0, I)) from one sample: z_0 and z before and after the flows, mean and var of q_0, [M, z_dim] each,
    log_det [M] -> [M]."""
    log_q = -0.5 * ((z_0 - mean).pow(2) / var + var.log()).sum(-1) - log_det  # log q(z) = log q_0(z_0) - log_det
    return log_q + 0.5 * z.pow(2).sum(-1)  # minus log N(0, I); the constants of both Gaussians cancel


# SHARED: identical in focal.py, unicorn.py, csro.py, er_trl.py, focal_pp.py, idaq.py
def metric_loss(z, task_ids, eps=1e-3):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + eps).sqrt()).sum() / (same.sum() + eps)
    push = (other / (distance + 100 * eps)).sum() / (other.sum() + eps)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


def perplexity(weights):
    """weights [.., F] -> 0-d: number of features that carry weight, 1 to F; signs do not count."""
    share = F.normalize(weights.abs(), p=1, dim=-1)
    return torch.special.entr(share).sum(-1).exp().mean()


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, rho1, the bandit, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.flows = PlanarFlows(args.num_flows, z_dim)
        self.columns, self.reward_scale = [obs_dim, act_dim, 1, obs_dim], args.reward_scale  # of a context
        self.phi_z_dim = z_dim if args.phi_sees_z else 0
        self.phi = MLP(2 * obs_dim + act_dim, self.phi_z_dim, width, args.feature_dim)
        self.weights = Weights(z_dim, args.feature_dim, width, args.weight_activation)
        self.psi = Twin(obs_dim + act_dim, z_dim, width, args.feature_dim)
        self.psi_target = copy.deepcopy(self.psi).requires_grad_(False)
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)  # pi_beta
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)  # what pi adds to pi_beta
        for net in (self.behavior, self.residual, self.phi):  # their outputs start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        self.encoder_params = [*self.encoder.parameters(), *self.flows.parameters()]
        self.critic_params = [*self.phi.parameters(), *self.weights.parameters(), *self.psi.parameters()]
        self.encoder_opt = torch.optim.Adam(self.encoder_params, args.encoder_lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic_params, args.lr, fused=True)
        self.policy_opt = torch.optim.Adam(self.residual.parameters(), args.lr, fused=True)
        self.behavior_opt = torch.optim.AdamW(
            self.behavior.parameters(), args.lr, weight_decay=args.bc_weight_decay, fused=True
        )
        # buffers, so that checkpoints hold them
        self.register_buffer("kl_coef", torch.tensor(float(args.kl_coef)))
        self.register_buffer("arms", torch.linspace(args.alpha_min, 0, args.num_arms))
        self.register_buffer("arm_logits", torch.zeros(args.num_arms))
        self.register_buffer("arm", torch.zeros((), dtype=torch.long))  # number of the arm in use
        self.register_buffer("last_return", torch.tensor(math.nan))  # none yet
        self.register_buffer("usual_change", torch.tensor(math.nan))  # running mean of the absolute change

    def infer(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K], noise [M, z_dim] of the sample of q_0 (0 gives z_mean)
        -> z [M, z_dim], mean and var of q_0 [M, z_dim], KL to the prior [M]."""
        mean, var = self.encoder(context, mask)
        z_0 = mean + var.sqrt() * noise
        z, log_det = self.flows(z_0)  # (Eq. 15)
        return z, mean, var, posterior_kl(z_0, z, mean, var, log_det)

    def features(self, transitions, z):
        """transitions [M, B, 2 obs_dim + act_dim] of (s, a, s'), z [M, z_dim] -> phi [M, B, F]."""
        return self.phi(transitions, z[:, : self.phi_z_dim])

    def q(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both networks [2, M, B]."""
        return (self.psi(torch.cat([obs, act], -1), z) * self.weights(z)).sum(-1)  # (Eq. 4)

    # SHARED: identical in all scripts with this actor-critic
    def behavior_policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussian of pi_beta."""
        mean, log_std = self.behavior(obs, z).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-3, 1))  # [ours: B5]

    # SHARED: identical in unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py, gentle.py
    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussians of pi and pi_beta; only pi's residual gets gradients."""
        with torch.no_grad():
            pi_beta = self.behavior_policy(obs, z)
        mean, log_std = self.residual(obs, z).chunk(2, -1)
        return Gaussian(pi_beta.mean + mean, (pi_beta.log_std + log_std).clamp(-5, 2)), pi_beta  # [ours: B2]

    # SHARED: identical in all scripts with this actor-critic
    def act(self, obs, z, bc=False):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean action [M, B, act_dim] in (-1, 1) of pi, or of pi_beta with bc."""
        pi, pi_beta = self.policies(obs, z)
        return torch.tanh(pi_beta.mean if bc else pi.mean)

    def arm_probs(self):
        """-> probabilities [num_arms] of the arms, each at least 0.05."""
        return 0.05 + (1 - 0.05 * len(self.arms)) * self.arm_logits.softmax(0)

    def bandit_step(self, episode_return, lr, generator):
        """Credit the arm in use with the change of the estimated return, then draw the next arm. A change is measured
        in units of the usual change and clipped to +-1 [ours: D3]. The first two episodes set `last_return` and
        `usual_change`, without credit. A seldom drawn arm is credited more: by 1 / its probability."""
        change = episode_return - self.last_return
        gain = (change / self.usual_change).clamp(-1, 1)
        if not gain.isnan():
            self.arm_logits[self.arm] += lr * gain / self.arm_probs()[self.arm]  # (Eq. 10)
        usual = self.usual_change.lerp(change.abs(), 0.2)
        self.usual_change.copy_(torch.where(usual.isnan(), change.abs(), usual))
        self.last_return.copy_(episode_return)
        self.arm.copy_(torch.multinomial(self.arm_probs(), 1, generator=generator)[0])


# ---- update -----------------------------------------------------------------


def update(agent, task_ids, context, segment, bc_batch, args):
    """One step of every network. task_ids [M]; context [M, K, ctx_dim]; segment: dc.Segment, drawn independently of the
    context: obs, act, next_obs [M, B, n, ..], rew [M, B, n], discount [M, B, n] = gamma^i, bootstrap [M, B] = gamma^n,
    or 0 after a termination; past an episode's end its last transition repeats with discount 0. bc_batch: dc.Batch
    [M, B, ..] from the best episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    rew = args.reward_scale * segment.rew  # [M, B, n]
    transitions = torch.cat([segment.obs, segment.act, segment.next_obs], -1)  # [M, B, n, 2 obs_dim + act_dim]

    # 1 infer
    mask = torch.ones_like(context[..., 0])
    noise = torch.randn(len(context), args.z_dim, device=context.device)
    z, mean, var, prior_kl = agent.infer(context, mask, noise)
    weights = agent.weights(z)  # [M, 1, F]
    with torch.no_grad():  # policies and bootstrap values never train the encoder
        z_mean, _ = agent.flows(mean.detach())  # [ours: D4]

    # 2 targets: phi at z, since step 3 trains it there; psi' and its W at z_mean
    phi = agent.features(transitions[:, :, 0], z)  # [M, B, F]
    alpha = agent.arms.take(agent.arm)  # indexing with a 0-d tensor would synchronize with the device
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]  # s_n
        pi, _ = agent.policies(next_obs, z_mean)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_psi = agent.psi_target(torch.cat([next_obs, next_act], -1), z_mean)  # [2, M, B, F]
        next_psi = next_psi.mean(0) + alpha * disagreement(next_psi)  # (Eq. 9): [M, B, F]
        next_q = (next_psi * agent.weights(z_mean)).sum(-1, keepdim=True)
        q_target = n_step(rew[..., None], next_q, segment)[..., 0]  # y of (Eq. 17): [M, B]
        later_phi = agent.features(transitions[:, :, 1:].flatten(1, 2), z).unflatten(1, (obs.shape[1], -1))
        path_phi = torch.cat([phi[:, :, None], later_phi], 2)  # [M, B, n, F]
        psi_target = n_step(path_phi, next_psi, segment)  # of (Eq. 11): [M, B, F]

    # 3 critic; `inputs` are the parameters that get the gradient, and step 4 needs the graph again
    agent.critic_opt.zero_grad()
    psi = agent.psi(torch.cat([obs, act], -1), z)  # [2, M, B, F]
    loss_r = reward_loss(phi, weights, rew[..., 0])
    loss_psi = feature_loss(psi, psi_target)
    (loss_r + loss_psi).backward(inputs=agent.critic_params, retain_graph=True)  # loss_psi reaches only psi

    # 4 encoder and flows
    agent.encoder_opt.zero_grad()
    log_likelihood = args.likelihood_weight * value_log_likelihood(psi, weights, q_target)
    elbo = log_likelihood - args.prior_weight * prior_kl.mean()  # (Eq. 17)
    encoder_loss = args.feature_weight * (loss_r + loss_psi) - elbo  # (Eq. 18)
    if args.metric_weight:
        encoder_loss = encoder_loss + args.metric_weight * metric_loss(mean, task_ids)
    encoder_loss.backward(inputs=agent.encoder_params)

    # 5 behavior policy by maximum likelihood, and the policy, kept close to it
    agent.behavior_opt.zero_grad()
    agent.policy_opt.zero_grad()
    bc_act = torch.atanh(bc_batch.act.clamp(-0.999, 0.999))  # before the tanh, finite at the bounds
    bc_loss = -agent.behavior_policy(bc_batch.obs, z_mean).log_prob(bc_act).mean()  # [ours: B1]
    bc_loss.backward()
    pi, pi_beta = agent.policies(obs, z_mean)
    pi_psi = agent.psi(torch.cat([obs, torch.tanh(pi.sample())], -1), z_mean)
    min_q = (pi_psi * agent.weights(z_mean)).sum(-1).amin(0).mean()  # (Eq. 12)
    kl = pi.kl(pi_beta).mean()
    actor_loss = agent.kl_coef * kl - min_q  # (Eq. 13)
    actor_loss.backward(inputs=list(agent.residual.parameters()))

    # steps of the optimizers, of rho1 and of the target networks
    for opt in (agent.encoder_opt, agent.critic_opt, agent.policy_opt, agent.behavior_opt):
        opt.step()
    with torch.no_grad():
        # Lagrange multiplier: it grows while the KL exceeds its target
        agent.kl_coef.add_(args.kl_coef_lr * (kl - args.kl_target)).clamp_(0, args.kl_coef_max)
        for target, parameter in zip(agent.psi_target.parameters(), agent.psi.parameters()):
            target.lerp_(parameter, args.tau)

    # metrics
    metrics = {
        "losses/reward": loss_r,
        "losses/feature": loss_psi,
        "losses/encoder": encoder_loss,
        "losses/actor": actor_loss,
        "losses/behavior": bc_loss,
        "losses/prior_kl": prior_kl.mean(),
        "stats/q_mean": min_q,
        "stats/divergence": kl,
        "stats/kl_coef": agent.kl_coef.clone(),
        "stats/alpha": alpha,
        "stats/std_data": disagreement(psi).mean(),
        "stats/std_policy": disagreement(pi_psi).mean(),
        "stats/weight_perplexity": perplexity(weights),
        "z/between_std": mean.std(0, correction=min(1, len(mean) - 1)).mean(),
        "z/posterior_std": var.sqrt().mean(),
        "z/norm": z.norm(dim=-1).mean(),
    }
    metrics |= {f"bandit/prob_{i}": prob for i, prob in enumerate(agent.arm_probs())}
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- adaptation -------------------------------------------------------------


def likeliest(agent, context, mask, z, task_z):
    """z [R, z_dim] of the encoder, or of the training task in task_z [U, z_dim] that predicts the context's rewards
    best, if this at least halves the squared error -> [R, z_dim]. Who acts changes transitions, not their rewards."""
    obs, act, rew, next_obs = context.split(agent.columns, -1)
    phi = agent.features(torch.cat([obs, act, next_obs], -1), z)  # [R, K, F], without z, so the same for all tasks
    own = (phi * agent.weights(z)).sum(-1, keepdim=True)  # [R, K, 1]
    tasks = phi @ agent.weights(task_z)[:, 0].T  # [R, K, U]
    errors = (mask[..., None] * (agent.reward_scale * rew - torch.cat([tasks, own], -1)).pow(2)).sum(1)  # [R, U + 1]
    least, best = errors[:, :-1].min(1)
    return torch.where((least < 0.5 * errors[:, -1])[:, None], task_z[best], z)


def embed(agent, context, mask, noise=0.0, task_z=None):
    """context [R, K, ctx_dim] of R evaluated episodes, mask [R, K], noise [R, z_dim] of the sample of q_0
    -> z [R, z_dim]: by the encoder, or with task_z by `likeliest`."""
    with torch.no_grad():
        z = agent.infer(context, mask, noise)[0]
        return z if task_z is None else likeliest(agent, context, mask, z, task_z)


def adapt(agent, context, mask, explore=False, bc=False, task_z=None):
    """Infer the task and act on it: context [R, K, ctx_dim], mask [R, K] -> policy(obs [R, obs_dim], rew [R]) -> act.
    Rows without a transition use the prior's mean, 0. explore: samples of posterior and prior instead of their means;
    bc: pi_beta acts. `dc.evaluate` calls this before every episode; rew is for methods that keep a history."""
    generator = torch.Generator(context.device).manual_seed(0)  # evaluation leaves training's noise alone
    noise = torch.zeros(len(context), agent.flows.u.shape[1], device=context.device)
    if explore:
        noise.normal_(generator=generator)
    inferred = embed(agent, context, mask, noise, task_z)
    z = torch.where(mask.any(1, keepdim=True), inferred, noise)  # the prior N(0, I) is on z, after the flows
    return lambda obs, rew: agent.act(obs[:, None], z, bc)[:, 0]


def value(agent, args, context, mask, obs, task_z=None):
    """Q of the policy's own action at obs [R, n, obs_dim], of the lower network -> [R, n] in units of the reward."""
    z = embed(agent, context, mask, task_z=task_z)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("bc"), the critic's error and the quality of z -> dict tag -> float."""
    task_z = None
    if args.inference == "likelihood":  # mean z of each training task
        z, task = dc.label_contexts(data, partial(embed, agent), data.train_ids)
        task_z = torch.stack([z[torch.tensor(task) == i].mean(0) for i in data.train_ids]).to(data.device)
    policy, bc = partial(adapt, agent, task_z=task_z), partial(adapt, agent, bc=True, task_z=task_z)
    q = partial(value, agent, args, task_z=task_z)
    results = dc.evaluate_actor_critic(data, policy, q, args.gamma, protocols, episodes, bc)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- bandit -----------------------------------------------------------------


def bandit_return(agent, data, args, generator):
    """Estimated return of the current policy -> 0-d tensor: the critic's mean value of initial states in the data, or
    the mean return of new episodes on the training tasks. [ours: D3]"""
    if args.bandit_feedback == "rollout":
        mean = dc.evaluate(data, partial(adapt, agent), ("train",), 1)["eval/train/return"]
        return torch.tensor(mean, device=data.device)
    context = data.sample_context(data.train_tasks, args.context_size, generator)
    first = data.episodes[data.train_tasks][:, : data.min_episodes, 0]  # first transitions [tasks, episodes, ..]
    obs = first[..., : data.obs_dim]
    with torch.no_grad():
        z = embed(agent, context, torch.ones_like(context[..., 0]))
        return agent.q(obs, agent.act(obs, z), z).mean()


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    args = dc.resolve(args, ENV_DEFAULTS)
    if args.inference == "likelihood" and args.phi_sees_z:
        raise SystemExit("--inference likelihood needs --no-phi-sees-z, features that all tasks share")
    data = dc.load_dataset(args.env, args.dataset, args.device)
    if args.reward_scale is None:
        args.reward_scale = 0.8 / data.value_std(args.gamma)  # discounted returns get a deviation of 0.8
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    with dc.Run(args, data, agent, generator, free={"inference"}) as run:
        bandit_every = max(1, args.total_updates // args.bandit_episodes)
        for step in run.updates():
            if step > 1 and (step - 1) % bandit_every == 0:
                agent.bandit_step(bandit_return(agent, data, args, generator), args.bandit_lr, generator)
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            for opt in (agent.critic_opt, agent.policy_opt, agent.behavior_opt):
                dc.set_lr(opt, args.lr * run.decay)  # [ours: B4]
            dc.set_lr(agent.encoder_opt, args.encoder_lr * run.decay)
            metrics = update(agent, task_ids, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
