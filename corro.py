"""CORRO: robust task representations for offline meta-reinforcement learning via contrastive learning.

Yuan, Lu, ICML 2022, https://arxiv.org/abs/2206.10442. Official code: PKU-AI-Edge/CORRO on GitHub.
A contrastive loss trains an embedding of single transitions. Negatives keep the query's (s, a) and change (r, s'), so
(s, a) alone cannot tell them apart. Then the embedding is frozen, and an attention over the context gives z.
Symbols: M tasks, K transitions of a context, B of a batch; N queries with n negatives each.
  e [.., z_dim] embedding of (s, a, r, s') on the unit sphere     p(r, s' | s, a) a conditional VAE
  z [M, z_dim] task vector, a weighted mean of K embeddings     Q [2, M, B] twin critics of (s, a, z)
  pi policy, pi_beta behavior policy, tanh-Gaussians of (s, z)
One update, 1 and 2 in phases of their own before 3 to 5:
  1 VAE      errors of r and s' + 0.2 KL(q(latent | s, a, r, s') || N(0, I));  only with --negatives generative
  2 encoder  InfoNCE -log softmax([e . e_key, e . e_1, .., e . e_n] / temperature)[0] of a query and a key of its task
             --negatives reward: noise on the query's r;  generative: (r, s') from the VAE;  none: any transitions
  3 infer    z = attention(e of the context)
  4 critic   y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q and the attention
  5 policy   maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
Differences from paper and official code, tagged in the code. D are CORRO's, B the shared actor-critic's:
  D1  the VAE sees training tasks only (code: also test tasks); every update draws new tasks (code: every 200th)
  D2  the policy is regularized and has no entropy term (code: plain SAC, as with unicorn.py --backbone sac)
  D3  z has mean 0 and standard deviation 1 over the training episodes (code: averages of points on the sphere)
  D4  sizes: 32 transitions per task, context 64, 8,000 updates, encoder 200 (code: 256; 200; 200,000; 64 or 128)
  D5  --reward-noise 2 standard deviations (code: 0.5 in units of r); point families: 4 encoder updates per update
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, ant-dir: --gamma 0.99 --reward-scale 1 --n-step 1 --target-noise 1 --tau 0.005 --bc-top-fraction 1
  --bc-weight-decay 0 --batch-size 256 --context-size 200 --lr 3e-4 --encoder-lr 3e-4 --no-lr-decay --z-dim 5
  --encoder-width 64 --reward-noise 0.34 --total-updates 200000. No flag reaches D1 to D3, B2, B5, layer norm.
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
    exp_name: str = "corro"  # name of the experiment: the folder between env and seed in the run directory
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
    lr: float = 1.2e-3  # learning rate of attention, critics and policies
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the last phase
    n_step: int | None = None  # steps of the data's rewards in a target [steps]
    target_noise: float = 0.0  # noise of the target's action: 1 = a sample of the policy, 0 = its mean
    tau: float = 0.02  # rate at which target networks follow
    width: int = 256  # hidden units of policies and critics
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the embeddings and of the task vector
    negatives: Literal["reward", "generative", "none"] | None = None
    """what changes in a negative, by default what differs between tasks: reward = noise on the reward,
    generative = reward and next state from the VAE, none = transitions of random training tasks"""
    num_negatives: int = 16  # negatives per query
    num_queries: int = 64  # queries per update of the encoder [transitions]
    temperature: float = 0.1  # temperature of the similarities in InfoNCE
    reward_noise: float = 2.0  # noise of --negatives reward [standard deviations of the training data's rewards]
    encoder_updates: int | None = None
    """updates of the encoder, by default --total-updates, in point families four times as many [gradient steps]"""
    cvae_updates: int | None = None  # updates of the VAE, by default half of --total-updates [gradient steps]
    encoder_lr: float = 1.2e-3  # learning rate of encoder and VAE
    cvae_width: int = 128  # hidden units of the VAE
    cvae_dim: int | None = None  # size of the VAE's latent
    cvae_kl_weight: float = 0.2  # weight of the VAE's KL term
    cvae_batch_size: int = 256  # transitions per update of the VAE [transitions]
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
        cvae_dim=64,
        bc_top_fraction=0.25,
        kl_coef=1.0,
        kl_coef_lr=1e-3,
        kl_target=0.2,
    ),
    "ant-dir": dict(reward_scale=0.5),
    "cheetah-vel": dict(reward_scale=0.5),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, cvae_dim=5, kl_coef=1.5, kl_coef_lr=0.0),
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
    """Attention over the embeddings of a context: the softmax of one linear score."""

    def __init__(self, z_dim):
        super().__init__()
        self.score = nn.Linear(z_dim, 1)

    def forward(self, points, mask):
        """points [M, K, z_dim], mask [M, K] 1 = real -> z [M, z_dim]; 0 without any transition."""
        score = self.score(points)[..., 0].masked_fill(mask == 0, -1e9)
        return ((score.softmax(1) * mask)[..., None] * points).sum(1)


class CVAE(nn.Module):
    """p(rew, next_obs | obs, act) of all training tasks, through a Gaussian latent."""

    def __init__(self, obs_dim, act_dim, latent_dim, width):
        super().__init__()
        self.known, self.latent_dim = obs_dim + act_dim, latent_dim  # sizes of (obs, act) and of the latent
        out_dim = 1 + obs_dim
        self.encoder = nn.Sequential(
            nn.Linear(self.known + out_dim, width), nn.ReLU(), nn.Linear(width, 2 * latent_dim)
        )
        self.decoder = nn.Sequential(nn.Linear(self.known + latent_dim, width), nn.ReLU(), nn.Linear(width, out_dim))

    def forward(self, rows):
        """rows [B, ctx_dim] -> reconstruction of (rew, next_obs) [B, 1 + obs_dim], mean and log_var of the latent
        [B, latent_dim]."""
        mean, log_var = self.encoder(rows).chunk(2, -1)
        latent = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(torch.cat([rows[..., : self.known], latent], -1)), mean, log_var

    def counterfactual(self, rows):
        """rows [.., ctx_dim] -> rows with the same (obs, act), and with (rew, next_obs) from a latent of the prior."""
        obs_act = rows[..., : self.known]
        latent = torch.randn(*rows.shape[:-1], self.latent_dim, device=rows.device)
        return torch.cat([obs_act, self.decoder(torch.cat([obs_act, latent], -1))], -1)


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


def info_nce(similarity, temperature):
    """similarity [N, 1 + n] of a query with its key, then with its negatives -> scalar."""
    key = torch.zeros(len(similarity), dtype=torch.long, device=similarity.device)
    return F.cross_entropy(similarity / temperature, key)


def latent_kl(mean, log_var):
    """KL(N(mean, var) || N(0, I)): both [B, latent_dim] -> [B] nats."""
    return 0.5 * (mean.pow(2) + log_var.exp() - 1 - log_var).sum(-1)


def cvae_loss(prediction, target, kl, kl_weight):
    """prediction, target [B, 1 + obs_dim] of (rew, next_obs), kl [B] -> scalar. The state's error is a mean over its
    dimensions and weighs as much as the reward's."""
    error = (prediction - target).pow(2)
    return kl_weight * kl.mean() + error[:, 1:].mean() + error[:, 0].mean()


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, the weight of the KL, and the optimizers of all phases."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = TransitionEncoder(data.ctx_dim, z_dim, args.encoder_width)
        self.encoder_opt = torch.optim.Adam(self.encoder.parameters(), args.encoder_lr, fused=True)
        # mean and standard deviation of the training episodes' mean embeddings
        self.register_buffer("center", torch.zeros(z_dim))
        self.register_buffer("std", torch.tensor(1.0))
        self.aggregator = Aggregator(z_dim)
        if args.negatives == "generative":
            self.cvae = CVAE(obs_dim, act_dim, args.cvae_dim, args.cvae_width)
            self.cvae_opt = torch.optim.Adam(self.cvae.parameters(), args.encoder_lr, fused=True)
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)
        for net in (self.behavior, self.residual):  # they start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        nets = (self.aggregator, self.critic, self.residual)
        self.opt = torch.optim.Adam([p for net in nets for p in net.parameters()], args.lr, fused=True)
        self.behavior_opt = torch.optim.AdamW(
            self.behavior.parameters(), args.lr, weight_decay=args.bc_weight_decay, fused=True
        )
        self.register_buffer("kl_coef", torch.tensor(float(args.kl_coef)))

    def standardize(self, points):
        """points [.., z_dim] of the encoder -> as the aggregator sees them."""
        return (points - self.center) / self.std  # [ours: D3]

    def q(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both critics [2, M, B]."""
        return self.critic(torch.cat([obs, act], -1), z)[..., 0]

    # SHARED: identical in all scripts with this actor-critic
    def behavior_policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussian of pi_beta."""
        mean, log_std = self.behavior(obs, z).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-3, 1))  # [ours: B5]

    # SHARED: identical in flora.py, unicorn.py, csro.py, er_trl.py, focal_pp.py, idaq.py, gentle.py
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


# ---- updates ----------------------------------------------------------------


def update_cvae(agent, rows, args):
    """One step of the VAE: rows [B, ctx_dim] of all training tasks -> dict of detached 0-d tensors."""
    # 1 VAE
    prediction, mean, log_var = agent.cvae(rows)
    kl = latent_kl(mean, log_var)
    loss = cvae_loss(prediction, rows[:, agent.cvae.known :], kl, args.cvae_kl_weight)
    agent.cvae_opt.zero_grad()
    loss.backward()
    agent.cvae_opt.step()
    return {"losses/cvae": loss.detach(), "stats/cvae_kl": kl.mean().detach()}


def draw_negatives(agent, data, query, args, generator):
    """query [N, ctx_dim] -> [N, n, ctx_dim]: the same (obs, act) with another (rew, next_obs). With --negatives none:
    transitions of random training tasks, the query's own task among them."""
    count = args.num_negatives
    if args.negatives == "none":
        task_ids = data.sample_tasks(len(query) * count, generator)
        return data.sample(task_ids, 1, generator)[..., :-1].view(len(query), count, -1)
    negatives = query[:, None].repeat(1, count, 1)
    if args.negatives == "generative":
        with torch.no_grad():
            return agent.cvae.counterfactual(negatives)
    rew = negatives[..., data.obs_dim + data.act_dim]  # a row is (obs, act, rew, next_obs)
    rew += args.reward_noise * data.reward_std * torch.randn_like(rew)  # [ours: D5]
    return negatives


def update_encoder(agent, query, key, negatives, args):
    """One step of the encoder: query, key [N, ctx_dim], two transitions of one task; negatives [N, n, ctx_dim]
    -> dict of detached 0-d tensors."""
    # 2 encoder
    rows = torch.cat([query[:, None], key[:, None], negatives], 1)  # [N, 2 + n, ctx_dim]
    points = agent.encoder(rows)  # [N, 2 + n, z_dim]
    similarity = (points[:, :1] * points[:, 1:]).sum(-1)  # [N, 1 + n] cosines
    loss = info_nce(similarity, args.temperature)
    agent.encoder_opt.zero_grad()
    loss.backward()
    agent.encoder_opt.step()

    # metrics
    metrics = {
        "losses/contrastive": loss,
        "stats/contrastive_acc": (similarity.argmax(1) == 0).float().mean(),
        "stats/similarity_key": similarity[:, 0].mean(),
        "stats/similarity_negatives": similarity[:, 1:].mean(),
    }
    return {tag: value.detach() for tag, value in metrics.items()}


def embed_transitions(agent, data):
    """Embed all transitions once, since the encoder is frozen from here on, and set center and std of the training
    episodes' mean embeddings -> standardized embeddings [T, N, H, z_dim]."""
    with torch.no_grad():
        points = torch.stack([agent.encoder(episodes[..., :-1]) for episodes in data.episodes])
        real = data.recorded(data.lengths)[..., None]  # [T, N, H, 1]
        means = (points * real).sum(2) / real.sum(2).clamp(min=1)  # [T, N, z_dim]
        means = means[data.train_tasks][data.lengths[data.train_tasks] > 0]  # [training episodes, z_dim]
        agent.center.copy_(means.mean(0))
        # the clamp keeps embeddings finite if the encoder has collapsed
        agent.std.copy_((means - agent.center).pow(2).mean().sqrt().clamp(min=1e-6))
        return agent.standardize(points)


def update(agent, points, segment, bc_batch, args):
    """One step of attention, critics and policies, from the parameters before the step. points [M, K, z_dim]: embedded
    contexts; segment: Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch [M, B, ..] from the
    best episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 3 infer
    z = agent.aggregator(points, torch.ones_like(points[..., 0]))  # [M, z_dim]
    z_fixed = z.detach()  # policies and bootstrap values never train the attention

    # 4 critic: its loss alone trains the attention
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z_fixed)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_q = agent.critic_target(torch.cat([next_obs, next_act], -1), z_fixed).amin(0)  # [M, B, 1]
        q_target = n_step(args.reward_scale * segment.rew[..., None], next_q, segment)[..., 0]  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    q_loss.backward()

    # 5 behavior policy by maximum likelihood, and the policy, kept close to it
    agent.behavior_opt.zero_grad()
    bc_act = torch.atanh(bc_batch.act.clamp(-0.999, 0.999))  # before the tanh, finite at the bounds
    bc_loss = -agent.behavior_policy(bc_batch.obs, z_fixed).log_prob(bc_act).mean()  # [ours: B1]
    bc_loss.backward()
    pi, pi_beta = agent.policies(obs, z_fixed)
    q = agent.q(obs, torch.tanh(pi.sample()), z_fixed).amin(0).mean()
    kl = pi.kl(pi_beta).mean()
    actor_loss = agent.kl_coef * kl - q  # [ours: D2]
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
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]; 0, the mean of the training episodes, without a
    transition."""
    with torch.no_grad():
        return agent.aggregator(agent.standardize(agent.encoder(context)), mask)


def adapt(agent, context, mask, explore=False, bc=False):
    """Infer the task and act on it: context [R, K, ctx_dim], mask [R, K] -> policy(obs [R, obs_dim], rew [R]) -> act.
    explore changes nothing, since z has no variance; bc: pi_beta acts."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z, bc)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("bc"), the critic's error and the quality of z -> dict tag -> float."""
    q, bc = partial(value, agent, args), partial(adapt, agent, bc=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, bc)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    if args.negatives is None:
        args.negatives = "reward" if dc.family_of(args.env).dynamics_vary is False else "generative"
    if args.encoder_updates is None:
        args.encoder_updates = args.total_updates * (4 if "point" in args.env else 1)
    if args.cvae_updates is None:
        args.cvae_updates = max(1, args.total_updates // 2)
    args = dc.resolve(args, ENV_DEFAULTS)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    if args.reward_scale is None:
        args.reward_scale = 8.0 / data.value_std(args.gamma)  # discounted returns get a deviation of 8
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    phases = ("cvae", "encoder", "policy") if args.negatives == "generative" else ("encoder", "policy")
    with dc.Run(args, data, agent, generator, phases) as run:
        for step in run.updates("cvae") if "cvae" in phases else ():
            task_ids = data.sample_tasks(args.cvae_batch_size, generator)  # [ours: D1]
            rows = data.sample(task_ids, 1, generator)[:, 0, :-1]
            metrics = update_cvae(agent, rows, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
        for step in run.updates("encoder"):
            task_ids = data.sample_tasks(args.num_queries, generator)
            query, key = data.sample(task_ids, 2, generator)[..., :-1].unbind(1)
            negatives = draw_negatives(agent, data, query, args, generator)
            metrics = update_encoder(agent, query, key, negatives, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
        embedded = embed_transitions(agent, data)
        for step in run.updates("policy"):
            task_ids = data.sample_tasks(args.meta_batch, generator)
            points = data.sample_context(task_ids, args.context_size, generator, embedded)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            dc.set_lr(agent.opt, args.lr * run.decay)  # [ours: B4]
            dc.set_lr(agent.behavior_opt, args.lr * run.decay)
            metrics = update(agent, points, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
