"""CSRO: context shift reduction for offline meta-reinforcement learning.

Gao, Zhang, Guo, et al., NeurIPS 2023, https://arxiv.org/abs/2311.03695. Official code: https://github.com/MoreanP/CSRO.
FOCAL's metric loss trains an encoder that maps a context to a task vector z. A second loss, CLUB, removes from z what
(s, a) tell about it: they show which policy acted, and at test another policy collects the context.
Symbols: M tasks, B transitions of each, K transitions of a context.
  e [M, K, z_dim] embedding of each (s, a, r, s')     z [M, z_dim] task vector in (-1, 1), the mean of e
  q(e | s, a) variational network, a Gaussian         Q [2, M, B] twin critics of (s, a, z)
  pi policy, pi_beta behavior policy, tanh-Gaussians of (s, z)
One update:
  1 guess    maximum likelihood trains q on the embeddings of the context
  2 encoder  metric loss(z) + club_weight CLUB(e, q) trains the encoder
  3 critic   y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q
  4 policy   maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
Differences from the paper and its code, tagged in the code. D are CSRO's, B the shared actor-critic's:
  D1  CLUB has no factor 1/2, as in the code, and compares transitions of one episode (code: of one task, paper: all);
      with such pairs it is no bound on the information between z and (s, a)
  D2  critics with targets; no entropy term, no penalty on pi (code: a value network with a target; weights 1 and 1e-3)
  D3  tasks are drawn with replacement (code: without, so none attract); s' always in contexts (code: new dynamics only)
  D4  without a context z is the mean over the training tasks (code: 0, for which no network was trained)
  D5  online_random_start: 1 random episode, all join the context (code: 1.5, 2 or 10; evaluation episodes do not join)
  D6  sizes: batch 32, context 64, 8,000 updates, 2 layers (code: 256; 100 to 1,024; 65,000 to 210,000; 3 layers)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, cheetah-vel: --gamma 0.99 --reward-scale 5 --n-step 1 --target-noise 1 --bc-top-fraction 1
  --bc-weight-decay 0 --tau 0.005 --kl-coef 50 --kl-coef-lr 1 --kl-coef-max 2000 --kl-target 0.05 --batch-size 256
  --context-size 100 --lr 3e-4 --no-lr-decay --total-updates 105000. No flag reaches D1 to D5, B2, B5, layers and norm.
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
    exp_name: str = "csro"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 8_000  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation  [ours: D6]
    env: dc.EnvName = "ant-dir"  # task family
    dataset: str | None = None  # dataset file; by default datasets/{env}.npz beside this script
    eval_episodes: int = 2  # episodes per task in an evaluation during training
    final_episodes: int = 10  # episodes per task in the last evaluation, and with --eval-only
    meta_batch: int = 16  # tasks per update, drawn with replacement [tasks]
    batch_size: int = 32  # transitions per task and update [transitions]
    context_size: int = 64  # transitions of a training context [transitions]
    # method
    gamma: float | None = None  # discount
    reward_scale: float | None = None  # factor on the rewards in the critics' loss
    lr: float = 1.2e-3  # learning rate of all networks
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target [steps]
    target_noise: float = 0.0  # noise of the target's action: 1 = a sample of the policy, 0 = its mean
    tau: float = 0.02  # rate at which target networks follow
    width: int = 256  # hidden units of the networks
    encoder_width: int = 200  # hidden units of the encoder and of the variational network
    z_dim: int | None = None  # size of the task vector
    metric_weight: float = 10.0  # weight of the metric loss
    club_weight: float | None = None  # weight of CLUB in the encoder's loss (lambda); 0 = FOCAL's encoder, the ablation
    guess_weight: float = 10.0  # weight of the variational network's loss
    bc_top_fraction: float | None = None
    """share of each task's transitions, best episodes first, that pi_beta is fitted to"""
    bc_weight_decay: float = 0.3  # weight decay of pi_beta
    kl_coef: float | None = None  # initial weight of KL(pi || pi_beta) in the policy loss
    kl_coef_lr: float | None = None  # kl_coef grows at this rate while the KL exceeds kl_target, else falls; 0 = fixed
    kl_coef_max: float = 100.0  # largest kl_coef
    kl_target: float | None = None  # KL that kl_coef aims at [nats]


ENV_DEFAULTS = {  # for arguments left at None: all families, then changes for families whose name holds the key
    "": dict(
        gamma=0.97,
        n_step=5,
        z_dim=20,
        club_weight=25.0,
        bc_top_fraction=0.25,
        kl_coef=1.0,
        kl_coef_lr=1e-3,
        kl_target=0.2,
    ),
    "ant-dir": dict(reward_scale=0.5),
    "cheetah-vel": dict(reward_scale=0.5),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, kl_coef=1.5, kl_coef_lr=0.0),
    "ant": dict(club_weight=50.0),
    "cheetah": dict(club_weight=10.0),
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
    """Deterministic task vector z(context): the mean of a bounded embedding of each transition."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim), nn.Tanh())

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition."""
        each = self.net(context) * mask[..., None]  # [M, K, z_dim]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Guess(nn.Module):
    """Variational network q(e | s, a): a Gaussian guess at a transition's embedding from its (s, a)."""

    def __init__(self, obs_dim, act_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(obs_dim + act_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2 * z_dim), nn.Tanh())

    def forward(self, obs_act):
        """obs_act [M, K, obs_dim + act_dim] -> mean in (-1, 1), variance in (0.31, 1.31): [M, K, z_dim] each."""
        mean, var = self.net(obs_act).chunk(2, -1)
        return mean, F.softplus(var)


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


# SHARED: identical in flora.py, focal.py, unicorn.py, er_trl.py, focal_pp.py, idaq.py
def metric_loss(z, task_ids, eps=1e-3):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + eps).sqrt()).sum() / (same.sum() + eps)
    push = (other / (distance + 100 * eps)).sum() / (other.sum() + eps)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


def guess_loss(each, mean, var):
    """Negative log-likelihood of the embeddings, up to a constant: each, mean, var [M, K, z_dim] -> scalar."""
    return ((each - mean).pow(2) / (2 * var) + 0.5 * var.log()).mean()


def club(each, mean, var):
    """How much better a guess fits its own embedding than the embeddings of its context do on average: each, mean, var
    [M, K, z_dim] -> scalar. The average over all K^2 pairs is in closed form."""
    own = (each - mean).pow(2)
    center, variance = each.mean(1, keepdim=True), each.var(1, correction=0, keepdim=True)
    of_all = (center - mean).pow(2) + variance  # mean over l of (each_l - mean_k)^2
    return ((of_all - own) / var).mean()  # [code: D1]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, the weight of the KL, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.guess = Guess(obs_dim, act_dim, z_dim, args.encoder_width)
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)  # [ours: D2]
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)
        for net in (self.behavior, self.residual):  # they start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        nets = (self.encoder, self.critic, self.residual)
        self.opt = torch.optim.Adam([p for net in nets for p in net.parameters()], args.lr, fused=True)
        self.guess_opt = torch.optim.Adam(self.guess.parameters(), args.lr, fused=True)
        self.behavior_opt = torch.optim.AdamW(
            self.behavior.parameters(), args.lr, weight_decay=args.bc_weight_decay, fused=True
        )
        self.register_buffer("kl_coef", torch.tensor(float(args.kl_coef)))
        # z without a context, set at every evaluation
        self.register_buffer("z_mean", torch.zeros(z_dim), persistent=False)

    def q(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both critics [2, M, B]."""
        return self.critic(torch.cat([obs, act], -1), z)[..., 0]

    # SHARED: identical in all scripts with this actor-critic
    def behavior_policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussian of pi_beta."""
        mean, log_std = self.behavior(obs, z).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-3, 1))  # [ours: B5]

    # SHARED: identical in flora.py, unicorn.py, corro.py, er_trl.py, focal_pp.py, idaq.py, gentle.py
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


# ---- update -----------------------------------------------------------------


def update(agent, task_ids, context, segment, bc_batch, args):
    """One step of every network, from the parameters before the step, except step 1. task_ids [M]; context
    [M, K, ctx_dim]; segment: Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch [M, B, ..] from
    the best episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 1 guess: the variational network steps first; otherwise the bound does not hold
    each = agent.encoder.net(context)  # [M, K, z_dim]
    obs_act = context[..., : obs.shape[-1] + act.shape[-1]]
    fit_loss = args.guess_weight * guess_loss(each.detach(), *agent.guess(obs_act))
    agent.guess_opt.zero_grad()
    fit_loss.backward()
    agent.guess_opt.step()

    # 2 encoder: metric loss and CLUB alone train it
    with torch.no_grad():
        guess_mean, guess_var = agent.guess(obs_act)
    club_loss = club(each, guess_mean, guess_var)
    z = each.mean(1)  # [M, z_dim]
    encoder_loss = args.metric_weight * metric_loss(z, task_ids) + args.club_weight * club_loss
    encoder_loss.backward()
    z = z.detach()

    # 3 critic
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_q = agent.critic_target(torch.cat([next_obs, next_act], -1), z).amin(0)  # [M, B, 1]
        q_target = n_step(args.reward_scale * segment.rew[..., None], next_q, segment)[..., 0]  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    q_loss.backward()

    # 4 behavior policy by maximum likelihood, and the policy, kept close to it
    agent.behavior_opt.zero_grad()
    bc_act = torch.atanh(bc_batch.act.clamp(-0.999, 0.999))  # before the tanh, finite at the bounds
    bc_loss = -agent.behavior_policy(bc_batch.obs, z).log_prob(bc_act).mean()  # [ours: B1]
    bc_loss.backward()
    pi, pi_beta = agent.policies(obs, z)
    q = agent.q(obs, torch.tanh(pi.sample()), z).amin(0).mean()
    kl = pi.kl(pi_beta).mean()
    actor_loss = agent.kl_coef * kl - q
    actor_loss.backward(inputs=list(agent.residual.parameters()))

    # steps of the optimizers, of the KL's weight and of the target networks
    agent.opt.step()
    agent.behavior_opt.step()
    with torch.no_grad():
        # Lagrange multiplier: it grows while the KL exceeds its target
        agent.kl_coef.add_(args.kl_coef_lr * (kl - args.kl_target)).clamp_(0, args.kl_coef_max)
        for target, parameter in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            target.lerp_(parameter, args.tau)

    # metrics
    metrics = {
        "losses/encoder": encoder_loss,
        "losses/guess": fit_loss,
        "losses/q": q_loss,
        "losses/actor": actor_loss,
        "losses/behavior": bc_loss,
        "stats/club": club_loss,
        "stats/q_mean": q,
        "stats/divergence": kl,
        "stats/kl_coef": agent.kl_coef.clone(),
        "z/between_std": z.std(0, correction=min(1, len(z) - 1)).mean(),
        "z/within_std": each.std(1, correction=0).mean(),
    }
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        z = agent.encoder(context, mask)
        return torch.where(mask.any(1, keepdim=True), z, agent.z_mean)  # [ours: D4]


def adapt(agent, context, mask, explore=False, bc=False):
    """Infer the task and act on it: context [R, K, ctx_dim], mask [R, K] -> policy(obs [R, obs_dim], rew [R]) -> act.
    Rows without a transition use agent.z_mean. explore changes nothing, since z has no variance; bc: pi_beta acts."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z, bc)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("bc"), the critic's error and the quality of z -> dict tag -> float."""
    agent.z_mean.copy_(dc.label_contexts(data, partial(embed, agent), data.train_ids)[0].mean(0))
    q, bc = partial(value, agent, args), partial(adapt, agent, bc=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, bc)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    args = dc.resolve(args, ENV_DEFAULTS)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    if args.reward_scale is None:
        args.reward_scale = 8.0 / data.value_std(args.gamma)  # discounted returns get a deviation of 8
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    with dc.Run(args, data, agent, generator) as run:
        for step in run.updates():
            task_ids = data.sample_tasks(args.meta_batch, generator)  # [ours: D3]
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            for opt in (agent.opt, agent.guess_opt, agent.behavior_opt):
                dc.set_lr(opt, args.lr * run.decay)  # [ours: B4]
            metrics = update(agent, task_ids, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))  # [ours: D5]


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
