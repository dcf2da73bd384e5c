"""IDAQ: in-distribution online adaptation with uncertainty quantification, for offline meta-reinforcement learning.

Wang, Zhang, Jiang, Zhang, Wang, Zhang, ICML 2023, https://arxiv.org/abs/2305.19529; code: NagisaZj/IDAQ_Public on
GitHub, a fork of FOCAL's. Training is FOCAL's. The adaptation needs no data of the new task. It plays episodes with
different z and keeps the best ones as context: with a wrong z an episode is out of distribution and earns little.
Symbols: M tasks, B transitions of each; z [M, z_dim] task vector in (-1, 1); hypotheses [U, z_dim], z of training
  tasks; Q [2, M, B] twin critics of (s, a, z); pi policy, pi_beta behavior policy, tanh-Gaussians of (s, z)
One update (1-3), the same as in focal.py, and the adaptation (4-6), protocol "idaq" of the last evaluation:
  1 encoder    z = encoder(context);  metric loss: root distance within a task, inverse square distance across tasks
  2 critic     y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q
  3 policy     maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
  4 reference  of --candidates hypotheses, play the one farthest from all z played; the best episode is the context
  5 iterative  play z = encoder(context); an episode that earns more than all before joins the context
  6 last       play the z that earned most; the return of this episode is reported
Differences from the paper and its code, tagged in the code. D are IDAQ's, B the shared actor-critic's:
  D1  the return measures uncertainty (paper: also models); a rejected episode changes nothing (code: loses the best)
  D2  --adapt-episodes 10 --reference-episodes 5 --candidates 5, as for Meta-World (code, point robot: 20, 10, 20)
  D3  a hypothesis comes from one episode of its training task (code: from random transitions)
  D4  twin critics with targets; no entropy term, no penalty on pi (code: a value network; weights 1 and 1e-3)
  D5  without a context z is the training tasks' mean (code: 0); s' always in contexts (code: new dynamics only)
  D6  sizes: batch 32, context 64, 8,000 updates, 2 layers (code: 256; 100 to 1,024; 50,000 to 300,000; 3 layers)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, point-robot: --adapt-episodes 20 --reference-episodes 10 --candidates 20 --reward-scale 100
  --target-noise 1 --tau 0.005 --z-dim 20 --kl-coef 0 --bc-top-fraction 1 --bc-weight-decay 0 --batch-size 256
  --context-size 1024 --lr 3e-4 --no-lr-decay --total-updates 50000. No flag reaches D1, D3 to D5, B2, B5, layers, norm.
"""

import copy
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
    exp_name: str = "idaq"  # name of the experiment: the folder between env and seed in the run directory
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
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the task vector
    metric_weight: float = 10.0  # weight of the metric loss
    adapt_episodes: int = 10  # episodes of the adaptation, with the last one, which is reported [episodes]
    reference_episodes: int = 5  # episodes of its reference stage [episodes]
    candidates: int = 5  # hypotheses that are drawn for each episode of the reference stage
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
        bc_top_fraction=0.25,
        kl_coef=1.0,
        kl_coef_lr=1e-3,
        kl_target=0.2,
    ),
    "ant-dir": dict(reward_scale=0.5),
    "cheetah-vel": dict(reward_scale=0.5),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, kl_coef=1.5, kl_coef_lr=0.0),
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


# SHARED: identical in flora.py, focal.py, unicorn.py, csro.py, er_trl.py, focal_pp.py
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
    """Networks, targets, the weight of the KL, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)  # [ours: D4]
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)  # pi_beta
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)  # what pi adds to pi_beta
        for net in (self.behavior, self.residual):  # their outputs start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        nets = (self.encoder, self.critic, self.residual)
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

    # SHARED: identical in flora.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, gentle.py
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
    """One step of every network, from the parameters before the step. task_ids [M]; context [M, K, ctx_dim]; segment:
    Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch [M, B, ..] from the best episodes
    -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 1 encoder: the metric loss alone trains it
    z = agent.encoder(context, torch.ones_like(context[..., 0]))  # [M, z_dim]
    encoder_loss = args.metric_weight * metric_loss(z, task_ids)
    z = z.detach()

    # 2 critic
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_q = agent.critic_target(torch.cat([next_obs, next_act], -1), z).amin(0)  # [M, B, 1]
        q_target = n_step(args.reward_scale * segment.rew[..., None], next_q, segment)[..., 0]  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    (encoder_loss + q_loss).backward()  # they share no parameters

    # 3 behavior policy by maximum likelihood, and the policy, kept close to it
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
        "losses/q": q_loss,
        "losses/actor": actor_loss,
        "losses/behavior": bc_loss,
        "stats/q_mean": q,
        "stats/divergence": kl,
        "stats/kl_coef": agent.kl_coef.clone(),
        "z/between_std": z.std(0, correction=min(1, len(z) - 1)).mean(),
    }
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        z = agent.encoder(context, mask)
        return torch.where(mask.any(1, keepdim=True), z, agent.z_mean)  # [ours: D5]


def adapt(agent, context, mask, explore=False, bc=False):
    """Infer the task and act on it: context [R, K, ctx_dim], mask [R, K] -> policy(obs [R, obs_dim], rew [R]) -> act.
    Rows without a transition use agent.z_mean. explore changes nothing, since z has no variance; bc: pi_beta acts."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z, bc)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def farthest(candidates, tried):
    """candidates [R, K, z_dim], tried: list of z [R, z_dim] -> z [R, z_dim]: in each row the candidate whose nearest
    tried z is farthest away, the first one if several are or if none was tried."""
    if not tried:
        return candidates[:, 0]
    distance = (candidates[:, :, None] - torch.stack(tried, 1)[:, None]).pow(2).mean(-1).amin(-1)  # [R, K]
    first = (distance == distance.amax(1, keepdim=True)).int().argmax(1)
    return candidates[torch.arange(len(first), device=first.device), first]


def explore_and_adapt(agent, data, args, episodes):
    """The adaptation, `episodes` times on every test task, all R rows as one batch -> dict tag -> float, as of
    `dc.evaluate`: "eval/idaq/return_ep_1", .. mean return of each episode, "eval/idaq/return" of the last one,
    and what else `dc.summary` gives."""
    tasks, number = data.test_ids.repeat(episodes), np.tile(np.arange(episodes), len(data.test_ids))  # of each row
    device = data.device
    generator = torch.Generator(device).manual_seed(0)
    logged = data.sample_context(data.train_tasks, args.context_size, generator)  # [ours: D3]
    hypotheses = embed(agent, logged, torch.ones_like(logged[..., 0]))  # [U, z_dim]
    context = torch.zeros(len(tasks), 0, data.ctx_dim, device=device)  # all episodes, one after the other
    accepted = torch.zeros(len(tasks), 0, device=device)  # mask of the context: 1 = of an accepted episode
    best, best_z = torch.full((len(tasks),), -math.inf, device=device), None
    env, results, tried = dc.TaskEnv(data.family, data.task_params, tasks), {}, []
    for k in range(args.adapt_episodes):
        reference, last = k < args.reference_episodes, k == args.adapt_episodes - 1
        if last:  # 6 last
            z = best_z
        elif reference:  # 4 reference  [ours: D2]
            draw = torch.randint(len(hypotheses), (len(tasks), args.candidates), device=device, generator=generator)
            z = farthest(hypotheses[draw], tried)
        else:  # 5 iterative
            z = embed(agent, context, accepted)
        tried.append(z)
        seeds = dc.reset_seeds(tasks, number, k)
        played = dc.rollout(env, lambda obs, rew: agent.act(obs[:, None], z)[:, 0], seeds, device, data.standardize)
        returns = dc.returns_of(data, tasks, played)  # [R]
        results[f"eval/idaq/return_ep_{k + 1}"] = float(returns.mean())
        if last:
            break

        # accept what earns more than all before, unless its physics broke
        earned = np.where(played["diverged"], -math.inf, returns)
        earned = torch.as_tensor(earned, dtype=torch.float32, device=device)
        better = (earned > best)[:, None]  # [R, 1]  [ours: D1]
        if reference:  # its best episode alone is the context
            accepted = accepted.where(~better, 0.0)
        own = data.recorded(torch.as_tensor(played["lengths"], device=device)) * better
        context = torch.cat([context, dc.transitions(played, device=device)[..., :-1]], 1)
        accepted = torch.cat([accepted, own.float()], 1)
        best, best_z = torch.maximum(best, earned), z if best_z is None else torch.where(better, z, best_z)
    env.close()
    if played["diverged"].any():
        results["eval/idaq/diverged"] = float(played["diverged"].sum())
    return results | dc.summary(data, "idaq", tasks, returns)


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("bc") and, together with protocol "online", of IDAQ's adaptation, the critic's
    error and the quality of z -> dict tag -> float."""
    agent.z_mean.copy_(dc.label_contexts(data, partial(embed, agent), data.train_ids)[0].mean(0))
    q, bc = partial(value, agent, args), partial(adapt, agent, bc=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, bc)
    if "eval/online/return" in results:
        results |= explore_and_adapt(agent, data, args, episodes)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    args = dc.resolve(args, ENV_DEFAULTS)
    if args.reference_episodes >= args.adapt_episodes:  # the last episode is not one of them
        raise SystemExit(f"--reference-episodes {args.reference_episodes}: must be less than --adapt-episodes")
    data = dc.load_dataset(args.env, args.dataset, args.device)
    if args.reward_scale is None:
        args.reward_scale = 8.0 / data.value_std(args.gamma)  # discounted returns get a deviation of 8
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    with dc.Run(args, data, agent, generator) as run:
        for step in run.updates():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            for opt in (agent.opt, agent.behavior_opt):
                dc.set_lr(opt, args.lr * run.decay)  # [ours: B4]
            metrics = update(agent, task_ids, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
