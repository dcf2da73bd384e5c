"""FLORA: flow-based task inference and adaptive correction of feature overgeneralization.

Wang, Li, Wang, Bennis, AAAI-26, https://arxiv.org/abs/2601.07164 (equation numbers below are the paper's); no official
code is public.
The Q-function is decomposed into successor features and task weights, Q = psi^T W, the target of the
features is corrected downwards where the two psi networks disagree, by an amount that a bandit
adapts, and the task is inferred as a Gaussian posterior that a chain of planar flows bends.

Equations: (3) r = phi^T W; (4) Q = psi^T W; (5) reward loss; (8) feature mean and spread of the
  two psi targets; (9) corrected features; (10) bandit over the corrections; (11) feature loss;
  (12) pessimistic Q; (13) policy loss; (14)-(16) planar flows; (17) ELBO; (18) encoder loss.

Deviations and choices where the paper's main text is silent:
  D1  W = softmax, so that r is a convex mix of the features and a lower feature never raises Q.
  D2  log p(Q) is a sum over transitions of the task, as many as --likelihood-weight says: with their mean, the KL
      term of (17) outweighs it and the posterior collapses to the prior. Mean and spread of the Gaussian errors are
      those that fit best: with a fixed spread the term grows with the square of the reward scale, and with a fixed mean
      z follows what all tasks have in common, the lag of a young critic, far away from the prior.
  D3  D_KL(pi || pi_beta) against a behavior policy fitted by maximum likelihood to the best of the data (D10); both
      are tanh-Gaussians, so the divergence is the closed form of the Gaussians before the tanh.
  D4  The bandit's return R_g: by default the policy's own value at the data's initial states
      (`offline`, weak and optimistic); `rollout` plays episodes on ten training tasks, the paper's reading,
      which is environment interaction. Both scaled by the data's return spread, differences clipped to
      +-1, probabilities floored at 0.05.
  D5  Flow parameters are global, with Rezende & Mohamed's correction so that every flow is invertible, shifted so that
      u = 0 stays the identity. What they bend is PEARL's product of one Gaussian per transition of the context.
  D6  All losses of a step use the parameters from before the step.
  D7  The policy is the fitted behavior policy plus a learned shift of mean and log_std. As two networks
      of their own, they differed by 0.6 nats at any rho1, and the policy lagged behind plain imitation.
  D8  Layer normalization in all networks on transitions but the encoder; the learning rate falls to 0
      in the second half.
  D9  Observations are standardized; log_std is clamped to [-5, 2], pi_beta's to [-3, 1], and the data's actions to
      +-0.999 where pi_beta is fitted to them. A training context is drawn with replacement from one episode.
  D10 The targets of (11) and (17) take rewards and features of n steps as the data have them, then the policy's mean
      as the next action: with one step, samples and tau 0.005, the critic of ant-dir ended at half of its value.
      pi_beta is fitted, with weight decay, to the quarter of each task's transitions that its best episodes hold.
      The paper's: --n-step 1 --target-noise 1 --anchor-share 1 --behavior-decay 0.
  D11 Policy, pi_beta and what targets bootstrap from see the posterior's mean through the flows, as at test; all else,
      phi in (11) too, a sample. With samples the policy blurs where the posterior is wider than the tasks lie apart.
  D12 In the point families, with their few updates, encoder and flows learn at a quarter of the rate of the others
      (--encoder-lr): z moves less, and the networks that read it keep up.
  D13 Beyond the paper, off by default: --metric-weight adds FOCAL's metric loss on the posterior's mean to (18). The
      value alone is content to read from the context who acted, which tells the task of its own data and misleads
      where another task's policy acted.
  D14 The rewards' scale is a tenth of the other scripts', and phi starts near 0. Beyond errors of 1 Huber's loss (11)
      is no square, and on ant-dir two thirds of them were beyond; in (18) these losses grow with the scale against the
      ELBO; and the part of a random phi that cancels in phi^T W is untouched by (5), but psi sums it up.

Run:     python flora.py --env ant-dir
Ablate:  --num-flows 0 (no flows), --alpha-min 0 (no correction), --feature-dim 1 (one feature: no decomposition)
Beyond:  --metric-weight 400 (D13)
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch._functorch.config
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
    gamma: float | None = None  # discount; None = ENV_ARGS
    reward_scale: float | None = None  # factor on the rewards in the value losses (D14); None = ENV_ARGS
    lr: float = 1.2e-3  # Adam's learning rate of all networks but those of the next line
    encoder_lr: float | None = None  # Adam's learning rate of encoder and flows (D12); None = ENV_ARGS
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target; 1 = the paper's (D10); None = ENV_ARGS
    target_noise: float = 0.0
    """noise of the targets' next action in the policy's standard deviations; 1 = the paper's sample, 0 = the policy's
    mean (D10)"""
    tau: float = 0.02  # rate at which the target networks follow (zeta)
    width: int = 256  # hidden units of policies and features, two layers, and of the weights' network, one
    encoder_width: int = 200  # hidden units of the encoder, two layers
    z_dim: int | None = None  # size of the task latent; None = ENV_ARGS
    feature_dim: int = 32  # number of features D
    weight_activation: Literal["softmax", "none"] = "softmax"  # what makes the weights W of the network's output (D1)
    num_flows: int = 4  # planar flows K; 0 = Gaussian posterior, the ablation of flow-based task inference
    likelihood_weight: float = 32.0  # transitions that log p(Q) counts for in (17), those of a batch (D2)
    kl_weight: float = 0.1  # rho2 of (17)
    feature_weight: float = 0.01  # rho3 of (18)
    metric_weight: float = 0.0  # FOCAL's metric loss on the posterior's mean, beside (18); 0 = the paper's (D13)
    alpha_min: float = -1.0  # most pessimistic arm of the correction; 0 = no correction, the ablation
    num_arms: int = 5  # arms between alpha_min and 0
    bandit_every: int = 500  # updates per bandit episode [gradient steps]
    bandit_lr: float = 0.1  # lambda of (10)
    bandit_feedback: Literal["offline", "rollout"] = "offline"
    """offline = value at the data's initial states; rollout = episodes on training tasks (D4)"""
    anchor_share: float | None = None
    """share of each task's transitions, those of its best episodes, that pi_beta is fitted to (D10); 1 = the paper's
    behavior policy; None = ENV_ARGS"""
    behavior_decay: float = 0.3  # AdamW's weight decay of pi_beta, which would learn few episodes by heart; 0 = none
    brac_alpha: float | None = None  # initial weight of the divergence in the policy loss (rho1); None = ENV_ARGS
    brac_alpha_lr: float | None = None  # its step towards the target divergence; 0 = fixed; None = ENV_ARGS
    brac_alpha_max: float = 100.0  # largest weight of the divergence
    divergence_target: float | None = None  # divergence that the weight aims at [nats]; None = ENV_ARGS


ENV_ARGS = {  # for arguments left at None: all families, then what those change whose name holds the key
    "": dict(
        gamma=0.97,
        reward_scale=0.05,
        encoder_lr=1.2e-3,
        n_step=5,
        z_dim=20,
        anchor_share=0.25,
        brac_alpha=0.1,
        brac_alpha_lr=1e-4,
        divergence_target=0.2,
    ),
    "point": dict(gamma=0.9, reward_scale=0.5, encoder_lr=3e-4, n_step=1, z_dim=5, brac_alpha=0.15, brac_alpha_lr=0.0),
}
MAY_BE_ZERO = {"num_flows", "likelihood_weight", "kl_weight", "feature_weight", "metric_weight", "alpha_min"}
RANGES = {"alpha_min": (-1, 0), "num_arms": (1, 20)}  # 20 arms: probability >= 0.05

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
        members = len(self.w_x)
        of_task = torch.baddbmm(self.b_1, z.expand(members, *z.shape), self.w_z)  # [members, M, width]
        h = torch.bmm(x.flatten(0, 1).expand(members, -1, -1), self.w_x).unflatten(1, x.shape[:2])
        h = (h + of_task[:, :, None]).flatten(1, 2)  # [members, M * B, width]
        for weight, bias in ((self.w_2, self.b_2), (self.w_3, self.b_3)):
            h = torch.baddbmm(bias, F.layer_norm(h, h.shape[-1:]).relu(), weight)  # [ours: D8]
        return h.unflatten(1, x.shape[:2])


class Encoder(nn.Module):
    """Gaussian posterior q0(z | context): product of one Gaussian factor per transition."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2 * z_dim))

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> mean [M, z_dim], var [M, z_dim] > 0."""
        mean, var = self.net(context.flatten(0, 1)).unflatten(0, mask.shape).chunk(2, -1)
        precision = mask[..., None] / F.softplus(var).clamp(min=1e-7)  # [M, K, z_dim]
        var = 1 / precision.sum(1)
        return var * (precision * mean).sum(1), var


class PlanarFlows(nn.Module):
    """z_K = f_K(... f_1(z_0)) with f(z) = z + u tanh(w^T z + b)  (Eq. 14, 15)."""

    def __init__(self, num_flows, z_dim):
        super().__init__()
        self.u = nn.Parameter(0.01 * torch.randn(num_flows, z_dim))  # the chain starts near the identity
        self.w = nn.Parameter(torch.randn(num_flows, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(num_flows))

    def corrected_u(self):
        """u moved along w so that w^T u >= -1, which makes every flow invertible -> [num_flows, z_dim].
        Rezende & Mohamed's m(x) = -1 + softplus(x), shifted in x so that u = 0 stays 0."""
        wu = (self.w * self.u).sum(-1, keepdim=True)
        norm2 = (self.w**2).sum(-1, keepdim=True).clamp(min=1e-12)
        return self.u + (F.softplus(wu + math.log(math.e - 1)) - 1 - wu) * self.w / norm2  # [ours: D5]

    def forward(self, z):
        """z_0 [M, z_dim] -> z_K [M, z_dim], log |det dz_K / dz_0| [M]."""
        log_det = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        for u, w, b in zip(self.corrected_u(), self.w, self.b):
            h = torch.tanh(z @ w + b)  # [M]
            log_det = log_det + torch.log1p(((1 - h**2) * (w @ u)).clamp(min=1e-6 - 1))  # (Eq. 16)
            z = z + u * h[:, None]  # (Eq. 14)
        return z, log_det


class Weights(nn.Module):
    """Task weights W(z) of (Eq. 3, 4)."""

    def __init__(self, z_dim, feature_dim, width, activation):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(z_dim, width), nn.ReLU(), nn.Linear(width, feature_dim))
        self.activation = activation

    def forward(self, z):
        """z [M, z_dim] -> W [M, feature_dim], with softmax positive and of sum 1."""
        logits = self.net(z)
        return logits.softmax(-1) if self.activation == "softmax" else logits  # [ours: D1]


# ---- losses -----------------------------------------------------------------


def feature_spread(psi):
    """psi [2, .., D] of two networks -> mean and spread per feature [.., D]; the spread is not divided by 2."""
    mean = psi.mean(0)
    return mean, (psi - mean).pow(2).sum(0).sqrt()  # (Eq. 8)


def reward_loss(phi, weights, rew):
    """phi [M, B, D], weights [M, 1, D], rew [M, B] -> scalar."""
    return 0.5 * (rew - (phi * weights).sum(-1)).pow(2).mean()  # (Eq. 3, 5)


def feature_loss(psi, psi_target):
    """psi [2, M, B, D], psi_target [M, B, D] -> scalar: Huber (1), sum over features and networks."""
    return F.huber_loss(psi, psi_target.expand_as(psi), reduction="none").sum((0, -1)).mean()  # (Eq. 11)


def value_log_likelihood(psi, weights, q_target):
    """psi [2, M, B, D], weights [M, 1, D], q_target [M, B] -> scalar: log p(Q) of one transition up to a constant,
    under the Gaussian error whose mean and spread fit each network's errors best."""
    error = (psi * weights).sum(-1) - q_target  # [2, M, B]
    variance = error.var((1, 2), correction=0)
    return -0.5 * (variance + 1e-6).log().mean()  # first term of (Eq. 17)  [ours: D2]


EPS = 1e-3  # of the metric loss, as in FOCAL's official code


def metric_loss(z, task_ids):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + EPS).sqrt()).sum() / (same.sum() + EPS)
    push = (other / (distance + 100 * EPS)).sum() / (other.sum() + EPS)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


def perplexity(weights):
    """weights [.., D] -> 0-d: number of features that carry weight, 1 to D; their sizes count, not the signs."""
    share = F.normalize(weights.abs(), p=1, dim=-1)
    return torch.special.entr(share).sum(-1).exp().mean()


def posterior_kl(z_0, z_k, mean, var, log_det):
    """D_KL(posterior || N(0, I)) [M], one Monte-Carlo sample; z_0, z_k, mean, var [M, z_dim], log_det [M]."""
    log_q = -0.5 * ((z_0 - mean).pow(2) / var + var.log()).sum(-1) - log_det  # (Eq. 16)
    return log_q + 0.5 * z_k.pow(2).sum(-1)  # the constants of both Gaussians cancel


def gaussian_kl(mean, log_std, mean_b, log_std_b):
    """D_KL(N(mean, std) || N(mean_b, std_b)), all [.., act_dim] -> [..] nats."""
    log_ratio = log_std - log_std_b
    distance = ((mean - mean_b) * (-log_std_b).exp()).pow(2)
    return (0.5 * ((2 * log_ratio).exp() + distance - 1) - log_ratio).sum(-1)  # [ours: D3]


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
    """Networks, targets, the multiplier rho1, the bandit, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, d, width = data.obs_dim, data.act_dim, args.z_dim, args.feature_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.flows = PlanarFlows(args.num_flows, z_dim)
        self.phi = MLP(1, 2 * obs_dim + act_dim, z_dim, width, d)
        self.weights = Weights(z_dim, d, width, args.weight_activation)
        self.psi = MLP(2, obs_dim + act_dim, z_dim, width, d)
        self.psi_target = copy.deepcopy(self.psi).requires_grad_(False)
        self.behavior = MLP(1, obs_dim, z_dim, width, 2 * act_dim)
        self.shift = MLP(1, obs_dim, z_dim, width, 2 * act_dim)  # of pi from pi_beta
        for net in (self.behavior, self.shift, self.phi):
            for parameter in (net.w_3, net.b_3):
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        # learning rates as tensors, so that a compiled update reads the current ones
        inference = [*self.encoder.parameters(), *self.flows.parameters()]
        self.encoder_opt = torch.optim.Adam(inference, torch.tensor(args.encoder_lr), fused=True)
        fitted = list(self.behavior.parameters())
        apart = ("behavior.", "encoder.", "flows.")
        rest = [p for name, p in self.named_parameters() if not name.startswith(apart)]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": fitted, "weight_decay": args.behavior_decay}]
        self.opt = torch.optim.AdamW(groups, torch.tensor(args.lr), fused=True)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))
        self.register_buffer("arms", torch.linspace(args.alpha_min, 0, args.num_arms))
        self.arm_tags = [f"bandit/prob_{arm:.2f}" for arm in self.arms.tolist()]
        self.register_buffer("arm_logits", torch.zeros(args.num_arms))
        self.register_buffer("arm", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_return", torch.tensor(float("nan")))

    def infer(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K], noise [M, z_dim] (0 = posterior mean)
        -> z_K [M, z_dim], mean and var of q0 [M, z_dim], KL to the prior [M]."""
        mean, var = self.encoder(context, mask)
        z_0 = mean + var.sqrt() * noise
        z, log_det = self.flows(z_0)  # (Eq. 15)
        return z, mean, var, posterior_kl(z_0, z, mean, var, log_det)

    def q(self, obs, act, z, weights):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim], weights [M, 1, D]
        -> pessimistic Q [M, B], psi [2, M, B, D]."""
        psi = self.psi(torch.cat([obs, act], -1), z)
        return (psi * weights).sum(-1).amin(0), psi  # (Eq. 4, 12)

    def fitted(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of pi_beta."""
        mean, log_std = self.behavior(obs, z)[0].chunk(2, -1)
        return mean, log_std.clamp(-3, 1)

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of the policy pi, and
        the same of the behavior policy pi_beta, fitted to the data (D3); pi is pi_beta, detached, plus a shift (D7)."""
        mean, log_std = self.shift(obs, z)[0].chunk(2, -1)
        with torch.no_grad():
            mean_b, log_std_b = self.fitted(obs, z)
        return mean_b + mean, (log_std_b + log_std).clamp(-5, 2), mean_b, log_std_b

    def act(self, obs, z, clone=False):
        """obs [M, B, obs_dim], z [M, z_dim] -> the deterministic action [M, B, act_dim] in (-1, 1) of pi, or of its
        clone of the data, pi_beta."""
        mean, _, mean_b, _ = self.policies(obs, z)
        return torch.tanh(mean_b if clone else mean)

    def arm_probs(self):
        """-> [num_arms] probabilities of the arms, each at least 0.05."""
        floor = 0.05
        return floor + (1 - floor * len(self.arms)) * self.arm_logits.softmax(0)  # [ours: D4]

    def bandit_step(self, episode_return, lr, generator):
        """Credit the drawn arm with the change of the return (both in units of the data's spread), draw the next."""
        if not self.last_return.isnan():
            gain = (episode_return - self.last_return).clamp(-1, 1).nan_to_num()  # a diverged run stops at its log line
            self.arm_logits[self.arm] += lr * gain / self.arm_probs()[self.arm]  # (Eq. 10)
        self.last_return.copy_(episode_return)
        self.arm.copy_(torch.multinomial(self.arm_probs(), 1, generator=generator)[0])


# ---- update -----------------------------------------------------------------


def update(agent, task_ids, context, segment, best, args):
    """One step of every network (Algorithm 1). task_ids [M]; context [M, K, ctx_dim]; segment: Segment of [M, B, n,
    ..], drawn apart from the context; best: Batch of [M, B, ..] that pi_beta is fitted to; all of the same tasks
    -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    rew = args.reward_scale * segment.rew  # [M, B, n]
    moves = torch.cat([segment.obs, segment.act, segment.next_obs], -1)  # (s, a, s') of all its transitions
    agent.opt.zero_grad()
    agent.encoder_opt.zero_grad()

    # task inference: a sample of the posterior
    noise = torch.randn(len(context), args.z_dim, device=context.device)
    z, z_mean, z_var, kl = agent.infer(context, torch.ones_like(context[..., 0]), noise)
    weights = agent.weights(z)[:, None]  # [M, 1, D]
    with torch.no_grad():  # policy, targets and behavior policy never train the encoder
        z_fixed = agent.flows(z_mean)[0]  # [ours: D11]
        weights_fixed = agent.weights(z_fixed)[:, None]

    # targets: rewards and features along the segment, then the features of the next action, corrected by alpha times
    # their spread
    phi = agent.phi(moves[:, :, 0], z)[0]  # [M, B, D]
    alpha = agent.arms.take(agent.arm)  # indexing with a 0-d tensor would read it back to the host
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_act = torch.tanh(mean + args.target_noise * log_std.exp() * torch.randn_like(mean))
        psi_mean, psi_spread = feature_spread(agent.psi_target(torch.cat([next_obs, next_act], -1), z_fixed))
        next_psi = psi_mean + alpha * psi_spread  # (Eq. 9)
        next_q = (next_psi * weights_fixed).sum(-1)
        q_target = (segment.weight * rew).sum(-1) + segment.bootstrap * next_q  # [M, B], of (Eq. 17)
        later_phi = agent.phi(moves[:, :, 1:].flatten(1, 2), z)[0].unflatten(1, (obs.shape[1], -1))
        path_phi = torch.cat([phi[:, :, None], later_phi], 2)  # [M, B, n, D]
        path_psi = (segment.weight[..., None] * path_phi).sum(2)
        psi_target = path_psi + segment.bootstrap[..., None] * next_psi  # [M, B, D], of (Eq. 11)

    # task inference and critic; each loss reaches exactly the networks named beside it
    psi = agent.psi(torch.cat([obs, act], -1), z)  # [2, M, B, D]
    loss_r = reward_loss(phi, weights, rew[..., 0])
    loss_psi = feature_loss(psi, psi_target)
    likelihood = args.likelihood_weight * value_log_likelihood(psi, weights, q_target)
    elbo = likelihood - args.kl_weight * kl.mean()  # (Eq. 17)
    encoder_loss = args.feature_weight * (loss_r + loss_psi) - elbo  # (Eq. 18)
    if args.metric_weight:
        encoder_loss = encoder_loss + args.metric_weight * metric_loss(z_mean, task_ids)  # [ours: D13]
    encoder_loss.backward(inputs=[*agent.encoder.parameters(), *agent.flows.parameters()], retain_graph=True)
    loss_psi.backward(inputs=list(agent.psi.parameters()), retain_graph=True)
    loss_r.backward(inputs=[*agent.phi.parameters(), *agent.weights.parameters()])

    # behavior policy by maximum likelihood, and the policy, regularized towards it
    behavior_loss = -tanh_gaussian_logp(*agent.fitted(best.obs, z_fixed), pre_tanh(best.act)).mean()
    behavior_loss.backward(inputs=list(agent.behavior.parameters()))
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z_fixed)
    pi_act = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
    q, pi_psi = agent.q(obs, pi_act, z_fixed, weights_fixed)
    divergence = gaussian_kl(mean, log_std, mean_b, log_std_b).mean()
    actor_loss = agent.brac_alpha * divergence - q.mean()  # (Eq. 13)
    actor_loss.backward(inputs=list(agent.shift.parameters()))
    agent.opt.step()  # [ours: D6]
    agent.encoder_opt.step()
    with torch.no_grad():
        # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
        agent.brac_alpha.add_(args.brac_alpha_lr * (divergence - args.divergence_target)).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.psi_target.parameters()), list(agent.psi.parameters()), args.tau)
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
            "stats/weight_perplexity": perplexity(weights.detach()),
            **dict(zip(agent.arm_tags, agent.arm_probs())),
            "z/between_std": z_mean.std(0, correction=min(1, len(z_mean) - 1)).mean(),
            "z/posterior_std": z_var.sqrt().mean(),
            "z/norm": z.norm(dim=-1).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> posterior mean through the flows [R, z_dim]."""
    with torch.no_grad():
        return agent.infer(context, mask, 0.0)[0]


def adapt(agent, context, mask, explore=False, clone=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; rows without a transition get the
    prior N(0, I); explore: a sample instead of the mean; clone: pi_beta acts -> policy(obs [R, obs_dim], rew [R])
    -> act."""
    z_dim = agent.encoder.net[-1].out_features // 2
    generator = torch.Generator(context.device).manual_seed(0)  # evaluation leaves training's noise alone
    noise = explore * torch.randn(len(context), z_dim, device=context.device, generator=generator)
    with torch.no_grad():
        z = torch.where(mask.any(1, keepdim=True), agent.infer(context, mask, noise)[0], noise)
    return lambda obs, rew: agent.act(obs[:, None], z, clone)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z, agent.weights(z)[:, None])[0] / args.reward_scale


def bandit_return(agent, data, args, generator):
    """Return of the current policy in units of the data's return spread -> 0-d tensor (D4)."""
    if args.bandit_feedback == "rollout":
        value = dc.evaluate(data, partial(adapt, agent), ("train",), 1)["eval/train/return"]
        return torch.tensor(value / data.return_spread, device=data.device)
    context = data.sample_context(data.train_tasks, args.context_size, generator)
    obs = data.episodes[data.train_tasks][:, : data.min_episodes, 0, : data.obs_dim]  # [U, N, obs_dim] initial states
    with torch.no_grad():
        z = embed(agent, context, torch.ones_like(context[..., 0]))
        psi = agent.q(obs, agent.act(obs, z), z, agent.weights(z)[:, None])[1]
        value = (psi.mean(0) * agent.weights(z)[:, None]).sum(-1).mean()
    return value / (args.reward_scale * data.return_spread)


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("clone"), the critic's error and the quality of z -> dict tag -> float."""
    q, clone = partial(value, agent, args), partial(adapt, agent, clone=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, clone)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO, RANGES)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    if args.compile:
        torch._functorch.config.donated_buffer = False  # several losses go back through the same part of the graph
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed) as run:
        while run.going():
            if run.step % args.bandit_every == 0:
                agent.bandit_step(bandit_return(agent, data, args, generator), args.bandit_lr, generator)
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            best = data.sample_batch(task_ids, args.batch_size, generator, args.anchor_share)
            dc.set_lr(agent.opt, args.lr * run.decay)
            dc.set_lr(agent.encoder_opt, args.encoder_lr * run.decay)
            run.advance(step_fn(agent, task_ids, context, segment, best, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
