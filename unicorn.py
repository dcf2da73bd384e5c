"""UNICORN: a unified view of context-based offline meta-reinforcement learning through mutual information.

Li, Ding, Zheng, Zhang, NeurIPS 2024, https://arxiv.org/abs/2402.02429. Official code: betray12138/UNICORN on GitHub.
The task latent should hold the mutual information I(z; task). A reconstruction of (r, s') from (z, s, a) is a lower
bound, FOCAL's metric loss an upper bound. SS mixes both, SS-0 only reconstructs, SUP classifies the training task.
Symbols: M tasks, K transitions of a context, B of a batch.
  z [M, z_dim] task latent in (-1, 1), the mean over the context of a noisy embedding of each (s, a, r, s')
  p(r), p(s' - s) decoders, Gaussians given (s, a, z), [M, K, 1] and [M, K, obs_dim]     p(task | z) classifier
  Q [2, M, B] twin critics of (s, a, z)     pi policy, pi_beta behavior policy, tanh-Gaussians of (s, z)
One update:
  1 encoder  z = encoder(context, noise);  L_rec = -2 log p(r) - 2 log p(s' - s), means over transitions and dimensions
             --variant ss: L_rec + w L_metric;  ss-0: L_rec;  sup: cross-entropy of p(task | z)
  2 critic   y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q
  3 policy   maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
Differences from paper and official code, tagged in the code. D are UNICORN's, B the shared actor-critic's:
  D1  the encoder's noise is off in evaluation (code: on); inputs have no terminal flag (code: they have)
  D2  the policy is regularized (code: its penalty has no gradient; plain SAC in 4 of 5 families: --backbone sac)
  D3  without a context z is the mean over the training tasks (code: 0, for which no network was trained)
  D4  sizes: 32 transitions per task, context 64, 8,000 updates, encoder 200 (code: 256; 200; 200,000; 64 or 128)
  D5  every update draws new tasks (code: every 200th)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, ant-dir: --gamma 0.99 --reward-scale 1 --n-step 1 --target-noise 1 --tau 0.005 --bc-top-fraction 1
  --bc-weight-decay 0 --batch-size 256 --context-size 200 --lr 3e-4 --no-lr-decay --z-dim 5 --encoder-width 64
  --kl-coef 0.2 --kl-coef-lr 0 --total-updates 200000 (hopper, walker: encoder and decoder width 128, z 40 and 32).
  No flag reaches D1, D3, D5, B2, B5, layer norm.
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
    exp_name: str = "unicorn"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 8_000  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation  [ours: D4]
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
    target_noise: float = 0.0
    """noise of the target's action: 1 = a sample of the policy, 0 = its mean; with --backbone sac always 1"""
    tau: float = 0.02  # rate at which target networks follow
    width: int = 256  # hidden units of policies and critics
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the task latent
    variant: Literal["ss", "ss-0", "sup"] = "ss"
    """what trains the encoder: ss = reconstruction and metric loss, ss-0 = reconstruction, sup = classification"""
    metric_weight: float | None = None  # weight w = alpha / (1 - alpha) of the metric loss, with --variant ss
    decoder_width: int = 64  # hidden units of the decoders and of the classifier
    backbone: Literal["brac", "sac"] = "brac"
    """brac = kept close to pi_beta; sac = soft actor-critic without pi_beta, as in most official configurations"""
    entropy_weight: float = 0.2  # weight of the policy's entropy with --backbone sac
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
        metric_weight=0.15,
        bc_top_fraction=0.25,
        kl_coef=1.0,
        kl_coef_lr=1e-3,
        kl_target=0.2,
    ),
    "ant-dir": dict(reward_scale=0.5),
    "cheetah-vel": dict(reward_scale=0.5),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, kl_coef=1.5, kl_coef_lr=0.0),
    "params": dict(metric_weight=1.5),
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
    """Task latent z(context): the mean of a bounded, noisy embedding of each transition."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim))
        self.log_var = nn.Parameter(torch.zeros(z_dim))

    def forward(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K] 1 = real, noise [M, K, z_dim] or 0 -> z [M, z_dim] in (-1, 1); 0
        without any transition."""
        std = self.log_var.exp().clamp(0.1, 10).sqrt()
        each = torch.tanh(self.net(context) + std * noise) * mask[..., None]  # [M, K, z_dim]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Decoder(MLP):
    """Gaussian of `dim` numbers given (obs, act, z). Learned limits bound its log-variance softly."""

    def __init__(self, obs_dim, act_dim, z_dim, width, dim):
        super().__init__(obs_dim + act_dim, z_dim, width, 2 * dim)
        self.low = nn.Parameter(torch.full((dim,), -10.0))
        self.high = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, obs, act, z):
        """obs [M, K, obs_dim], act [M, K, act_dim], z [M, z_dim] -> mean, log_var [M, K, dim]."""
        mean, log_var = super().forward(torch.cat([obs, act], -1), z).chunk(2, -1)
        return mean, soft_clamp(log_var, self.low, self.high)


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


# SHARED: identical in flora.py, focal.py, csro.py, er_trl.py, focal_pp.py, idaq.py
def metric_loss(z, task_ids, eps=1e-3):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + eps).sqrt()).sum() / (same.sum() + eps)
    push = (other / (distance + 100 * eps)).sum() / (other.sum() + eps)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


def soft_clamp(x, low, high):
    """x, low, high [.., dim] -> x softly limited, first from above, then from below."""
    x = high - F.softplus(high - x)
    return low + F.softplus(x - low)


def gaussian_nll(mean, log_var, target):
    """All [.., dim] -> scalar: twice the mean negative log-likelihood, without its constant."""
    return ((mean - target).pow(2) * (-log_var).exp() + log_var).mean()


def reconstruction_loss(decoder, obs, act, z, target):
    """obs [M, K, obs_dim], act [M, K, act_dim], z [M, z_dim], target [M, K, dim] -> scalar. A small term pulls the
    limits of the log-variance together."""
    limits = 0.01 * (decoder.high.sum() - decoder.low.sum())
    return gaussian_nll(*decoder(obs, act, z), target) + limits


def task_losses(agent, z, labels, context, args):
    """Losses of encoder and heads, to be summed: z [M, z_dim], labels [M] places among the training tasks, context
    [M, K, ctx_dim] -> dict name -> scalar."""
    if args.variant == "sup":
        return {"classifier": F.cross_entropy(agent.classifier(z), labels)}
    obs, act, rew, next_obs = context.split(agent.columns, -1)
    loss = reconstruction_loss(agent.reward_decoder, obs, act, z, rew)
    loss = loss + reconstruction_loss(agent.state_decoder, obs, act, z, next_obs - obs)
    if args.variant == "ss-0":
        return {"reconstruction": loss}
    return {"reconstruction": loss, "metric": args.metric_weight * metric_loss(z, labels)}


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, the weight of the KL, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.columns = [obs_dim, act_dim, 1, obs_dim]  # of a context: obs, act, rew, next_obs
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        h = args.decoder_width
        if args.variant == "sup":
            layers = [nn.Linear(z_dim, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU()]
            self.classifier = nn.Sequential(*layers, nn.Linear(h, len(data.train_ids)))
            heads = [self.classifier]
        else:
            self.reward_decoder = Decoder(obs_dim, act_dim, z_dim, h, 1)
            self.state_decoder = Decoder(obs_dim, act_dim, z_dim, h, obs_dim)
            heads = [self.reward_decoder, self.state_decoder]
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)
        near = {"brac": 1e-3, "sac": 0.0}[args.backbone]  # with sac pi_beta stays N(0, 1)
        for net, bound in ((self.behavior, near), (self.residual, 1e-3)):  # they start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -bound, bound)
        nets = (self.encoder, *heads, self.critic, self.residual)
        self.opt = torch.optim.Adam([p for net in nets for p in net.parameters()], args.lr, fused=True)
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

    # SHARED: identical in flora.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py, gentle.py
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


def update(agent, labels, context, segment, bc_batch, args):
    """One step of every network, from the parameters before the step. labels [M] places among the training tasks;
    context [M, K, ctx_dim]; segment: Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch
    [M, B, ..] from the best episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 1 encoder: reconstruction, metric loss or classification alone train it
    noise = torch.randn(*context.shape[:2], args.z_dim, device=context.device)
    z = agent.encoder(context, torch.ones_like(context[..., 0]), noise)  # [M, z_dim]
    parts = task_losses(agent, z, labels, context, args)
    encoder_loss = sum(parts.values())
    encoder_loss.backward()
    z = z.detach()

    # 2 critic
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z)
        next_pre = pi.sample(1.0 if args.backbone == "sac" else args.target_noise)
        next_q = agent.critic_target(torch.cat([next_obs, torch.tanh(next_pre)], -1), z).amin(0)  # [M, B, 1]
        if args.backbone == "sac":
            next_q = next_q - args.entropy_weight * pi.log_prob(next_pre)[..., None]
        q_target = n_step(args.reward_scale * segment.rew[..., None], next_q, segment)[..., 0]  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    q_loss.backward()

    # 3 behavior policy by maximum likelihood, and the policy, kept close to it  [code: D2]
    agent.behavior_opt.zero_grad()
    pi, pi_beta = agent.policies(obs, z)
    pi_pre = pi.sample()
    q = agent.q(obs, torch.tanh(pi_pre), z).amin(0).mean()
    if args.backbone == "brac":
        bc_act = torch.atanh(bc_batch.act.clamp(-0.999, 0.999))  # before the tanh, finite at the bounds
        bc_loss = -agent.behavior_policy(bc_batch.obs, z).log_prob(bc_act).mean()  # [ours: B1]
        bc_loss.backward()
        kl = pi.kl(pi_beta).mean()
        actor_loss = agent.kl_coef * kl - q
    else:
        actor_loss = args.entropy_weight * pi.log_prob(pi_pre).mean() - q
    actor_loss.backward(inputs=list(agent.residual.parameters()))

    # steps of the optimizers, of the KL's weight and of the target networks
    agent.opt.step()
    agent.behavior_opt.step()
    with torch.no_grad():
        if args.backbone == "brac":
            # Lagrange multiplier: it grows while the KL exceeds its target
            agent.kl_coef.add_(args.kl_coef_lr * (kl - args.kl_target)).clamp_(0, args.kl_coef_max)
        for target, parameter in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            target.lerp_(parameter, args.tau)

    # metrics
    metrics = {f"losses/{name}": loss for name, loss in parts.items()}
    metrics |= {
        "losses/encoder": encoder_loss,
        "losses/q": q_loss,
        "losses/actor": actor_loss,
        "stats/q_mean": q,
        "z/between_std": z.std(0, correction=min(1, len(z) - 1)).mean(),
    }
    if args.backbone == "brac":
        metrics |= {"losses/behavior": bc_loss, "stats/divergence": kl, "stats/kl_coef": agent.kl_coef.clone()}
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        z = agent.encoder(context, mask, 0.0)  # [ours: D1]
        return torch.where(mask.any(1, keepdim=True), z, agent.z_mean)  # [ours: D3]


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
    q = partial(value, agent, args)
    bc = partial(adapt, agent, bc=True) if args.backbone == "brac" else None
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
            # [ours: D5] new tasks, as places among the training tasks
            labels = torch.randint(len(data.train_tasks), (args.meta_batch,), device=data.device, generator=generator)
            task_ids = data.train_tasks[labels]
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            dc.set_lr(agent.opt, args.lr * run.decay)  # [ours: B4]
            dc.set_lr(agent.behavior_opt, args.lr * run.decay)
            metrics = update(agent, labels, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
