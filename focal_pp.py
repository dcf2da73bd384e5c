"""FOCAL++: FOCAL with attention over the transitions of a context and a contrastive loss across tasks.

Li, Huang, Chen, Luo, Luo, Huang, 2021, https://arxiv.org/abs/2102.10774. Its tables and code were not found. This
script follows a public summary with the equations, and traces in FOCAL's code (GitHub, FOCAL-ICLR/FOCAL-ICLR). A gate
and self-attention let a few telling transitions count more in z. InfoNCE trains the encoder: each z must find its own
key among the keys of all tasks. A key is the z of another context, from a key encoder that follows slowly.
Symbols: M tasks, B transitions of each, K transitions of a context.
  z, key [M, z_dim] task vectors in (-1, 1)     h [M, K, width] hidden layer     w [M, K] gate's weights, sum 1
  Q [2, M, B] twin critics of (s, a, z)     pi policy, pi_beta behavior policy, tanh-Gaussians of (s, z)
One update:
  1 encoder  z = sum of w tanh(linear(h + attention(h)));  InfoNCE of z and keys;  the key encoder follows at the end
  2 critic   y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q
  3 policy   maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
Differences from the summary, tagged in the code. D are FOCAL++'s, B the shared actor-critic's:
  D1  InfoNCE of normalized z, mean over tasks: --temperature 0.1 --momentum 0.99 (summary: dot product, sum, no values)
  D2  tasks are drawn with replacement; other contexts of the same task are no negatives (summary: silent)
  D3  the gate is a softmax of values in (0, 1) over what attention gives (summary: two paths, added)
  D4  one attention over the context, no dropout (traces: 3 or 6 blocks with dropout 0.1 over sequences of length 1)
  D5  without a context z is the training tasks' mean (FOCAL: 0); s' always in contexts (traces: new dynamics only)
  D6  twin critics with targets; no entropy term, no penalty on pi (traces: a value network; weights 1 and 1e-3)
  D7  sizes: batch 32, context 64, 8,000 updates, 2 layers (traces: 256; 100 to 1,024; 100,000 to 2,000,000; 3 layers)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, point-robot-wind: --reward-scale 100 --target-noise 1 --tau 0.005 --z-dim 20 --kl-coef 0
  --bc-top-fraction 1 --bc-weight-decay 0 --batch-size 256 --context-size 256 --lr 3e-4 --no-lr-decay
  --total-updates 100000. No flag reaches D2 to D6, the dot product, B2, B5, layers and norm.
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
    exp_name: str = "focal_pp"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 8_000  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation  [ours: D7]
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
    encoder_width: int = 200  # hidden units of the encoder, a multiple of --heads
    z_dim: int | None = None  # size of the task vector
    metric_weight: float = 0.0  # weight of FOCAL's metric loss
    nce_weight: float = 1.0  # weight of InfoNCE; 0 with --metric-weight 10 = FOCAL's loss
    temperature: float = 0.1  # of the similarities in InfoNCE
    momentum: float = 0.99  # share of its own parameters that the key encoder keeps per update
    gate: bool = True  # weigh the transitions of a context; without: their mean, as in FOCAL
    attention: bool = True  # let the transitions of a context see one another; without: apart, as in FOCAL
    heads: int = 4  # heads of the attention
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
    """Task vector z(context): weighted mean of bounded embeddings of transitions, which see one another."""

    def __init__(self, ctx_dim, z_dim, width, gate=True, attention=True, heads=4):
        super().__init__()
        self.heads, narrow = heads, max(1, width // 16)
        self.net = nn.Sequential(nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        layers = [nn.Linear(width, narrow), nn.Tanh(), nn.Linear(narrow, width), nn.Sigmoid()] if gate else []
        self.gate = nn.Sequential(*layers) if gate else None
        self.qkv, self.mix = (nn.Linear(width, 3 * width), nn.Linear(width, width)) if attention else (None, None)
        self.last = nn.Sequential(nn.Linear(width, z_dim), nn.Tanh())

    def weights(self, h, mask):
        """h [M, K, width], mask [M, K] -> weight of each transition [M, K], with sum 1; 0 without any transition."""
        if self.gate is None:
            return mask / mask.sum(1, keepdim=True).clamp(min=1)
        score = self.gate(h).mean(-1).exp() * mask
        return score / score.sum(1, keepdim=True).clamp(min=1e-8)  # [ours: D3]

    def attend(self, h, mask):
        """h [M, K, width], mask [M, K] -> multi-head self-attention over the real transitions [M, K, width]."""
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, mask[:, None, None].bool())  # [M, heads, K, ..]
        return self.mix(seen.transpose(1, 2).flatten(2))  # [ours: D4]

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition."""
        h = self.net(context)
        weights = self.weights(h, mask)
        if self.qkv is not None:
            h = h + self.attend(h, mask)
        return (weights[..., None] * self.last(h)).sum(1)


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


# SHARED: identical in flora.py, focal.py, unicorn.py, csro.py, er_trl.py, idaq.py
def metric_loss(z, task_ids, eps=1e-3):
    """z [M, z_dim], task_ids [M] -> scalar over pairs: root mean square within a task, inverse mean square across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + eps).sqrt()).sum() / (same.sum() + eps)
    push = (other / (distance + 100 * eps)).sum() / (other.sum() + eps)
    return pull + push  # [FOCAL's code] metric loss with inverse-square repulsion


def contrastive_loss(z, key, task_ids, temperature):
    """z, key [M, z_dim], task_ids [M] -> scalar: cross-entropy of finding each task's own key among all keys."""
    similarity = F.normalize(z, dim=-1) @ F.normalize(key, dim=-1).T / temperature  # [M, M]  [ours: D1]
    own = torch.arange(len(task_ids), device=task_ids.device)
    same_task = (task_ids[:, None] == task_ids) & (own[:, None] != own)  # other contexts of the same task
    return F.cross_entropy(similarity.masked_fill(same_task, -math.inf), own)  # [ours: D2]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, the weight of the KL, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width, args.gate, args.attention, args.heads)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)  # [ours: D6]
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

    # SHARED: identical in flora.py, unicorn.py, corro.py, csro.py, er_trl.py, idaq.py, gentle.py
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


def update(agent, task_ids, context, other_context, segment, bc_batch, args):
    """One step of every network, from the parameters before the step. task_ids [M]; context, other_context
    [M, K, ctx_dim], drawn independently; segment: Segment [M, B, n, ..], drawn independently of both; bc_batch: Batch
    [M, B, ..] from the best episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 1 encoder: no other loss trains it
    mask = torch.ones_like(context[..., 0])
    z = agent.encoder(context, mask)  # [M, z_dim]
    with torch.no_grad():
        key = agent.key_encoder(other_context, mask)
    nce = contrastive_loss(z, key, task_ids, args.temperature)
    encoder_loss = args.nce_weight * nce + args.metric_weight * metric_loss(z, task_ids)
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

    # steps of the optimizers, of the KL's weight, of the target networks and of the key encoder
    agent.opt.step()
    agent.behavior_opt.step()
    with torch.no_grad():
        # Lagrange multiplier: it grows while the KL exceeds its target
        agent.kl_coef.add_(args.kl_coef_lr * (kl - args.kl_target)).clamp_(0, args.kl_coef_max)
        for target, parameter in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            target.lerp_(parameter, args.tau)
        keys, queries = list(agent.key_encoder.parameters()), list(agent.encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - args.momentum)

    # metrics
    metrics = {
        "losses/encoder": encoder_loss,
        "losses/q": q_loss,
        "losses/actor": actor_loss,
        "losses/behavior": bc_loss,
        "stats/nce": nce,
        "stats/q_mean": q,
        "stats/divergence": kl,
        "stats/kl_coef": agent.kl_coef.clone(),
        "z/between_std": z.std(0, correction=min(1, len(z) - 1)).mean(),
    }
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():  # 16 rows at a time: attention over all long contexts at once would take gigabytes
        z = torch.cat([agent.encoder(*rows) for rows in zip(context.split(16), mask.split(16))])
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
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            other_context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            for opt in (agent.opt, agent.behavior_opt):
                dc.set_lr(opt, args.lr * run.decay)  # [ours: B4]
            metrics = update(agent, task_ids, context, other_context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
