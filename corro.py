"""CORRO: robust task representations for offline meta-reinforcement learning via contrastive learning.

Yuan, Lu, ICML 2022, https://arxiv.org/abs/2206.10442, official code https://github.com/PKU-AI-Edge/CORRO
Single transitions are embedded so that those of one task lie together, while the negatives keep the query's own
(s, a) and change only (r, s'): what the behavior policy did cannot tell them apart. The embedding is then frozen; an
attention over the context's transitions, trained by the critic's loss, aggregates it to z.

Phases: (1) a conditional VAE p(r, s' | s, a) on all training tasks, only for --negatives generative;
        (2) the transition encoder by InfoNCE; (3) aggregator, critics and policy.
Negatives: reward      the query with noise on its reward (tasks that differ in the reward)
           generative  the query with (r, s') drawn from the VAE (tasks that differ in the dynamics)
           none        real transitions of random training tasks

Deviations from the paper and from the official code:
  D1  The VAE sees training tasks only (code: also the test tasks); phases have fixed numbers of updates.
  D2  By default the policy is regularized towards a behavior policy fitted to the data, as in the other scripts;
      the code is plain SAC, here `--backbone sac`.
  D3  Tasks are drawn anew in every update (code: for 200 updates), a training context with replacement from one
      episode (code: the whole one). Observations are standardized.
  D4  Time limits are no terminations, falls are (code: neither).
  D5  All losses of a step use the parameters from before the step.
  D6  The policy is the fitted behavior policy plus a learned shift of mean and log_std.
  D7  Layer normalization in critics and policies; the learning rate of phase 3 falls to 0 in its second half. Sizes of
      the transition encoder and of z are those of focal.py.
  D8  The noise of --negatives reward is relative to the spread of the rewards. The code's is 0.5 whatever they are: 1.8
      times the spread in point-robot, but 0.34 of it in ant-dir, where our encoder collapses to a constant.
      By default negatives follow what differs between tasks (paper: generative on cheetah-vel too, none on hopper).
  D9  log_std is clamped to [-5, 2], pi_beta's to [-3, 1] (code: [-20, 2]), and the data's actions to +-0.999 where
      pi_beta is fitted to them.
  D10 The critics' targets take the rewards of several steps of the data, then the policy's mean as the next action
      (paper: one step, a sample), so that the critics come nearer to their value in as few updates. With an entropy
      term the action is a sample, too; the steps before it have no entropy. pi_beta is fitted, with weight decay, to
      the best quarter of each task's data, by the returns of the episodes.
  D11 The frozen embeddings are standardized, so that z has mean 0 and spread 1 over the training episodes. Averages of
      points on a sphere differ little between tasks (spread 0.07 in point-robot, 0.04 in ant-dir), and networks that
      are trained this briefly, pi_beta with weight decay, hardly see it: return -11.7 in place of -7.7 on the training
      tasks of point-robot (three seeds).
  D12 In the point families, with their few updates, the encoder takes four for each of the policy's (code: one).

Run:     python corro.py --env ant-dir
Closest to the paper, ant-dir: --backbone sac --gamma 0.99 --reward-scale 1 --n-step 1 --tau 0.005 --batch-size 256
         --context-size 200 --lr 3e-4 --no-lr-decay --encoder-lr 3e-4 --encoder-width 64 --z-dim 5 --reward-noise 0.34
         --total-updates 200000; hopper and walker: --encoder-width 128, --z-dim 40 and 32, hopper --negatives none
No flag reaches: D1, D3 to D5, D9, D11, layer normalization.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "corro"  # name of the experiment: the folder between env and seed in the run directory
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
    reward_scale: float | None = None  # factor on the rewards in the value losses; None = ENV_ARGS
    lr: float = 1.2e-3  # Adam's learning rate of aggregator, critics and policies
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target; 1 = the paper's (D10); None = ENV_ARGS
    target_noise: float = 0.0
    """noise of the targets' next action in the policy's standard deviations; 1 = the paper's sample, 0 = the policy's
    mean (D10); with --backbone sac always 1"""
    tau: float = 0.02  # rate at which the target networks follow
    width: int = 256  # hidden units of policy and critics, two layers
    encoder_width: int = 200  # hidden units of the encoder, two layers
    z_dim: int | None = None  # size of the task latent; None = ENV_ARGS
    negatives: Literal["reward", "generative", "none"] | None = None
    """what a query is told apart from; None = generative where the dynamics differ between tasks, else reward"""
    num_negatives: int = 16  # negatives per query
    num_queries: int = 64  # queries per update of the encoder [transitions]
    temperature: float = 0.1  # of the similarities in InfoNCE
    reward_noise: float = 2.0  # noise of --negatives reward [standard deviations of the training data's rewards] (D8)
    encoder_updates: int | None = None
    """updates of the transition encoder [gradient steps]; None = --total-updates, in the point families four times as
    many (D12)"""
    cvae_updates: int | None = None  # of the VAE, if there is one [gradient steps]; None = half of --total-updates
    encoder_lr: float = 1.2e-3  # Adam's learning rate of the transition encoder and of the VAE
    cvae_width: int = 128  # hidden units of the VAE, one layer
    cvae_dim: int | None = None  # size of the VAE's latent; None = ENV_ARGS
    cvae_kl_weight: float = 0.2  # weight of the VAE's KL term
    cvae_batch_size: int = 256  # transitions per update of the VAE [transitions]
    backbone: Literal["brac", "sac"] = "brac"
    """regularized towards the behavior policy, or plain SAC as in the official code (D2)"""
    entropy_weight: float = 0.2  # weight of the policy's entropy with --backbone sac
    anchor_share: float | None = None
    """share of each task's transitions, those of its best episodes, that pi_beta is fitted to (D10); 1 = the paper's
    behavior policy; None = ENV_ARGS"""
    behavior_decay: float = 0.3  # AdamW's weight decay of pi_beta, which would learn few episodes by heart; 0 = none
    brac_alpha: float | None = None  # initial weight of the divergence in the policy loss; None = ENV_ARGS
    brac_alpha_lr: float | None = None  # its step towards the target divergence; 0 = fixed; None = ENV_ARGS
    brac_alpha_max: float = 100.0  # largest weight of the divergence
    divergence_target: float | None = None  # divergence that the weight aims at [nats]; None = ENV_ARGS


ENV_ARGS = {  # for arguments left at None: all families, then what those change whose name holds the key
    "": dict(
        gamma=0.97,
        reward_scale=0.5,
        n_step=5,
        z_dim=20,
        cvae_dim=64,
        anchor_share=0.25,
        brac_alpha=1.0,
        brac_alpha_lr=1e-3,
        divergence_target=0.2,
    ),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, cvae_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0),
}
MAY_BE_ZERO = {"reward_noise", "cvae_kl_weight", "encoder_updates", "cvae_updates"}

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
            h = torch.baddbmm(bias, F.layer_norm(h, h.shape[-1:]).relu(), weight)  # [ours: D7]
        return h.unflatten(1, x.shape[:2])


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
        """points [M, K, z_dim], mask [M, K] 1 = real -> z [M, z_dim]; 0 without any transition."""
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
    """Networks, targets, the weight of the divergence, and the optimizers of the phases."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = TransitionEncoder(data.ctx_dim, z_dim, args.encoder_width)
        self.encoder_opt = torch.optim.Adam(self.encoder.parameters(), args.encoder_lr, fused=True)
        self.register_buffer("center", torch.zeros(z_dim))  # of the episodes' mean embeddings, and their spread (D11)
        self.register_buffer("spread", torch.tensor(1.0))
        self.aggregator = Aggregator(z_dim)
        if args.negatives == "generative":
            self.cvae = CVAE(obs_dim, act_dim, args.cvae_dim, args.cvae_width)
            self.cvae_opt = torch.optim.Adam(self.cvae.parameters(), args.encoder_lr, fused=True)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.behavior = MLP(1, obs_dim, z_dim, width, 2 * act_dim) if args.backbone == "brac" else None
        self.shift = MLP(1, obs_dim, z_dim, width, 2 * act_dim)  # of pi from pi_beta, or from N(0, 1) without one
        for net in (self.behavior, self.shift):
            for parameter in (net.w_3, net.b_3) if net else ():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        # learning rate as a tensor, so that a compiled update reads the current one
        fitted = list(self.behavior.parameters()) if self.behavior else []
        rest = [p for net in (self.aggregator, self.q, self.shift) for p in net.parameters()]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": fitted, "weight_decay": args.behavior_decay}]
        self.opt = torch.optim.AdamW(groups, torch.tensor(args.lr), fused=True)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))

    def embedded(self, rows):
        """rows [.., ctx_dim] -> their embeddings, standardized [.., z_dim]."""
        return (self.encoder(rows) - self.center) / self.spread  # [ours: D11]

    def fitted(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of pi_beta."""
        mean, log_std = self.behavior(obs, z)[0].chunk(2, -1)
        return mean, log_std.clamp(-3, 1)

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of the policy pi, and
        the same of the behavior policy pi_beta, fitted to the data, or None without one. Where there is a pi_beta, pi
        is pi_beta, detached, plus a shift (D6)."""
        mean, log_std = self.shift(obs, z)[0].chunk(2, -1)
        if self.behavior is None:
            return mean, log_std.clamp(-5, 2), None, None
        with torch.no_grad():
            mean_b, log_std_b = self.fitted(obs, z)
        return mean_b + mean, (log_std_b + log_std).clamp(-5, 2), mean_b, log_std_b

    def act(self, obs, z, clone=False):
        """obs [M, B, obs_dim], z [M, z_dim] -> the deterministic action [M, B, act_dim] in (-1, 1) of pi, or of its
        clone of the data, pi_beta."""
        mean, _, mean_b, _ = self.policies(obs, z)
        return torch.tanh(mean_b if clone else mean)


# ---- update -----------------------------------------------------------------


def update_cvae(agent, rows, args):
    """One step of the VAE. rows [B, ctx_dim] of all training tasks -> dict of detached 0-d tensors."""
    prediction, mean, log_var = agent.cvae(rows)
    kl = latent_kl(mean, log_var)
    loss = cvae_loss(prediction, rows[:, agent.cvae.sizes[0] :], kl, args.cvae_kl_weight)
    agent.cvae_opt.zero_grad()
    loss.backward()
    agent.cvae_opt.step()
    return {"losses/cvae": loss.detach(), "stats/cvae_kl": kl.mean().detach()}


def draw_negatives(agent, data, query, args, generator):
    """query [B, ctx_dim] -> [B, n, ctx_dim]: the same (obs, act) with another (rew, next_obs), or, with --negatives
    none, transitions of random training tasks, the query's own among them."""
    count = args.num_negatives
    if args.negatives == "none":
        task_ids = data.sample_tasks(len(query) * count, generator)
        return data.sample(task_ids, 1, generator)[..., :-1].view(len(query), count, -1)
    negatives = query[:, None].repeat(1, count, 1)
    if args.negatives == "generative":
        with torch.no_grad():
            return agent.cvae.counterfactual(negatives)
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
    agent.encoder_opt.zero_grad()
    loss.backward()
    agent.encoder_opt.step()
    with torch.no_grad():
        return {
            "losses/contrastive": loss.detach(),
            "stats/contrastive_acc": (similarity.argmax(1) == 0).float().mean(),
            "stats/similarity_key": similarity[:, 0].mean(),
            "stats/similarity_negatives": similarity[:, 1:].mean(),
        }


def embed_transitions(agent, data):
    """All transitions, embedded by the frozen encoder, whose standardization over the means of the training tasks'
    episodes is set here -> [T, N, H, z_dim]."""
    train = data.train_ids
    with torch.no_grad():
        points = torch.stack([agent.encoder(episodes[..., :-1]) for episodes in data.episodes])
        real = torch.arange(points.shape[2], device=points.device) < data.lengths[..., None]  # [T, N, H]
        means = ((points * real[..., None]).sum(2) / real.sum(2, keepdim=True).clamp(min=1))[train]
        weight = (data.lengths[train, :, None] > 0) / (data.lengths[train] > 0).sum()  # of an episode, 0 without one
        agent.center.copy_((weight * means).sum((0, 1)))
        agent.spread.copy_((weight * (means - agent.center).pow(2)).sum((0, 1)).mean().sqrt().clamp(min=1e-6))
        return points.sub_(agent.center).div_(agent.spread)  # [ours: D11]


def update(agent, points, segment, best, args):
    """One step of aggregator, critics and policies. points [M, K, z_dim]: the context's embedded transitions; segment:
    Segment of [M, B, n, ..], drawn apart from the context; best: Batch of [M, B, ..] that pi_beta is fitted to -> dict
    of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # task inference
    z = agent.aggregator(points, torch.ones_like(points[..., 0]))  # [M, z_dim]
    z_fixed = z.detach()

    # critics and aggregator
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_noise = 1.0 if args.backbone == "sac" else args.target_noise  # an entropy is estimated by a sample
        next_pre = mean + next_noise * log_std.exp() * torch.randn_like(mean)
        next_q = agent.q_target(next_obs, torch.tanh(next_pre), z_fixed).amin(0)
        if args.backbone == "sac":
            next_q = next_q - args.entropy_weight * tanh_gaussian_logp(mean, log_std, next_pre)
        q_target = args.reward_scale * (segment.weight * segment.rew).sum(-1) + segment.bootstrap * next_q  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    # the critic's loss alone trains the aggregator
    q_loss.backward(inputs=[*agent.aggregator.parameters(), *agent.q.parameters()])

    # behavior policy by maximum likelihood, and the policy, regularized towards it
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z_fixed)
    pi_pre = mean + log_std.exp() * torch.randn_like(mean)
    pi_act = torch.tanh(pi_pre)
    q_mean = agent.q(obs, pi_act, z_fixed).amin(0).mean()
    if args.backbone == "brac":
        behavior_loss = -tanh_gaussian_logp(*agent.fitted(best.obs, z_fixed), pre_tanh(best.act)).mean()
        behavior_loss.backward(inputs=list(agent.behavior.parameters()))
        divergence = gaussian_kl(mean, log_std, mean_b, log_std_b).mean()
        actor_loss = agent.brac_alpha * divergence - q_mean
    else:
        behavior_loss = divergence = torch.zeros_like(q_loss)
        actor_loss = args.entropy_weight * tanh_gaussian_logp(mean, log_std, pi_pre).mean() - q_mean
    actor_loss.backward(inputs=list(agent.shift.parameters()))
    agent.opt.step()  # [ours: D5]
    with torch.no_grad():
        if args.backbone == "brac":
            # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
            excess = divergence - args.divergence_target
            agent.brac_alpha.add_(args.brac_alpha_lr * excess).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)
        return {
            "losses/q": q_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "stats/q_mean": q_mean.detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "z/between_std": z_fixed.std(0, correction=min(1, len(z_fixed) - 1)).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        return agent.aggregator(agent.embedded(context), mask)


def adapt(agent, context, mask, explore=False, clone=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; rows without a transition get z = 0, close
    to the mean of the training tasks; explore changes nothing, z has no spread; clone: pi_beta acts -> policy(obs [R,
    obs_dim], rew [R]) -> act."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z, clone)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("clone"), the critic's error and the quality of z -> dict tag -> float."""
    q = partial(value, agent, args)
    clone = partial(adapt, agent, clone=True) if agent.behavior else None
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, clone)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    if args.negatives is None:
        args.negatives = "generative" if dc.FAMILIES[args.env].dynamics_vary else "reward"
    if args.encoder_updates is None:
        args.encoder_updates = args.total_updates * (4 if "point" in args.env else 1)
    args.cvae_updates = args.total_updates // 2 if args.cvae_updates is None else args.cvae_updates
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed, ("cvae", "encoder", "policy")) as run:
        while args.negatives == "generative" and run.going("cvae"):
            task_ids = data.sample_tasks(args.cvae_batch_size, generator)
            rows = data.sample(task_ids, 1, generator)[:, 0, :-1]
            run.advance(update_cvae(agent, rows, args))
        while run.going("encoder"):
            task_ids = data.sample_tasks(args.num_queries, generator)
            query, key = data.sample(task_ids, 2, generator)[..., :-1].unbind(1)
            negatives = draw_negatives(agent, data, query, args, generator)
            run.advance(update_encoder(agent, query, key, negatives, args))
        embedded = embed_transitions(agent, data)
        while run.going():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            points = data.sample_context(task_ids, args.context_size, generator, embedded)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            best = data.sample_batch(task_ids, args.batch_size, generator, args.anchor_share)
            dc.set_lr(agent.opt, args.lr * run.decay)
            run.advance(step_fn(agent, points, segment, best, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
