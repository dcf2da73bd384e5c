"""FOCAL++: FOCAL with attention over the transitions of a context and a contrastive loss across tasks.

Li, Huang, Chen, Luo, Luo, Huang, 2021, https://arxiv.org/abs/2102.10774
The paper's tables and its code were not at hand: this follows a summary with the equations and the traces that it left
in FOCAL's code. Where both are silent the choice is ours.
Two weaknesses of FOCAL's mean over embeddings: where few transitions tell the task, as with sparse rewards, the others
dilute it; and pairs of tasks are compared one by one. Here a gate weighs the transitions, self-attention lets them see
one another, and a query embedding must pick, among the embeddings of all tasks of the batch by a slowly following key
encoder, that of its own task (InfoNCE with a momentum encoder).

Equations: [gate], [attention], [InfoNCE], [momentum].

Deviations, where the summary says otherwise, and choices where it is silent:
  D1  InfoNCE in place of FOCAL's metric loss (`--metric-weight`), a mean over the tasks (summary: a sum), of normalized
      embeddings, at temperature 0.1; the key encoder's rate is that of a short training. Other contexts of a query's
      own task, which the batch holds where a task was drawn twice, are no negatives. D2 to D10, batches and settings:
      focal.py's, with the primal divergence.
  D11 Without a context, so in zero_shot and in the first own episode, z is the mean over the training tasks' episodes
      (FOCAL: 0, for which no network was trained).
  D12 The gate weighs the embeddings after the attention (summary: two paths, added) by a softmax of values in (0, 1),
      so that weights differ by a factor e at most. One attention over the transitions (traces: blocks with feed-forward
      layers, over sequences of length 1, so no attention); no dropout.

Run:     python focal_pp.py --env ant-dir
Ablate:  --no-gate, --no-attention; --nce-weight 0 --metric-weight 10 (FOCAL's loss; all three: FOCAL)
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
    exp_name: str = "focal_pp"  # name of the experiment: the folder between env and seed in the run directory
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
    lr: float = 1.2e-3  # Adam's learning rate of all networks
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    n_step: int | None = None  # steps of the data's rewards in a target; 1 = the paper's (D10); None = ENV_ARGS
    target_noise: float = 0.0
    """noise of the targets' next action in the policy's standard deviations; 1 = the paper's sample, 0 = the policy's
    mean (D10)"""
    tau: float = 0.02  # rate at which the target networks follow
    width: int = 256  # hidden units of policy and critics, two layers
    encoder_width: int = 200  # hidden units of the encoder, two layers, a multiple of the heads
    z_dim: int | None = None  # size of the task latent; None = ENV_ARGS
    metric_weight: float = 0.0  # factor on FOCAL's metric loss (D1)
    nce_weight: float = 1.0  # factor on the contrastive loss
    temperature: float = 0.1  # of the similarities
    momentum: float = 0.99  # share of itself that the key encoder keeps at an update
    gate: bool = True  # weigh the transitions; without: their mean
    attention: bool = True  # let the transitions of a context see one another
    heads: int = 4  # of the attention
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
        anchor_share=0.25,
        brac_alpha=1.0,
        brac_alpha_lr=1e-3,
        divergence_target=0.2,
    ),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0),
}
MAY_BE_ZERO = {"metric_weight", "nce_weight", "momentum"}
RANGES = {"momentum": (0, 1)}

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


class Encoder(nn.Module):
    """Task embedding z(context): weighted mean of the bounded embeddings of transitions that have seen one another."""

    def __init__(self, ctx_dim, z_dim, width, gate=True, attention=True, heads=4):
        super().__init__()
        self.heads = heads
        self.net = nn.Sequential(nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.narrow = nn.Linear(width, max(1, width // 16)) if gate else None
        self.widen = nn.Linear(max(1, width // 16), width) if gate else None
        self.qkv, self.mix = (nn.Linear(width, 3 * width), nn.Linear(width, width)) if attention else (None, None)
        self.last = nn.Linear(width, z_dim)

    def weights(self, h, mask):
        """h [M, K, width], mask [M, K] -> weight of each transition [M, K], in sum 1, or 0 without any."""
        if self.narrow is None:
            return mask / mask.sum(1, keepdim=True).clamp(min=1)
        gate = torch.sigmoid(self.widen(torch.tanh(self.narrow(h)))).mean(-1)
        weight = gate.exp() * mask
        return weight / weight.sum(1, keepdim=True).clamp(min=1e-8)  # [gate] [ours: D12]

    def attend(self, h, mask):
        """h [M, K, width], mask [M, K] -> what each transition sees in the real ones [M, K, width]."""
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        real = (mask > 0) | (mask.sum(1, keepdim=True) == 0)  # of an empty context nothing is used afterwards
        seen = F.scaled_dot_product_attention(query, key, value, real[:, None, None].expand(-1, -1, mask.shape[1], -1))
        return self.mix(seen.transpose(1, 2).flatten(2))  # [attention] [ours: D12]

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition."""
        h = self.net(context)
        weight = self.weights(h, mask)
        if self.qkv is not None and mask.shape[1]:
            h = h + self.attend(h, mask)
        return (weight[..., None] * torch.tanh(self.last(h))).sum(1)


class Critics(MLP):
    """`members` scalar functions of (obs, act, z), evaluated together."""

    def __init__(self, members, obs_dim, act_dim, z_dim, width):
        super().__init__(members, obs_dim + act_dim, z_dim, width, 1)

    def forward(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> [members, M, B]."""
        return super().forward(torch.cat([obs, act], -1), z)[..., 0]


# ---- losses -----------------------------------------------------------------

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


def contrastive_loss(query, key, task_ids, temperature):
    """Cross-entropy of picking one's own task's key among those of all tasks: query, key [M, z_dim], task_ids [M] ->
    scalar."""
    similarity = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature  # [M, M]
    own = torch.arange(len(task_ids), device=task_ids.device)
    twins = (task_ids[:, None] == task_ids) & (own[:, None] != own)
    return F.cross_entropy(similarity.masked_fill(twins, -math.inf), own)  # [InfoNCE] [ours: D1]


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
    """Networks, targets, the weight of the divergence, and the optimizer."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width, args.gate, args.attention, args.heads)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.behavior = MLP(1, obs_dim, z_dim, width, 2 * act_dim)
        self.shift = MLP(1, obs_dim, z_dim, width, 2 * act_dim)  # of pi from pi_beta
        for net in (self.behavior, self.shift):
            for parameter in (net.w_3, net.b_3):
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        # learning rate as a tensor, so that a compiled update reads the current one
        fitted = list(self.behavior.parameters())
        rest = [p for name, p in self.named_parameters() if not name.startswith("behavior.")]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": fitted, "weight_decay": args.behavior_decay}]
        self.opt = torch.optim.AdamW(groups, torch.tensor(args.lr), fused=True)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))
        # what is assumed without a context, set at every evaluation
        self.register_buffer("z_mean", torch.zeros(args.z_dim), persistent=False)

    def fitted(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of pi_beta."""
        mean, log_std = self.behavior(obs, z)[0].chunk(2, -1)
        return mean, log_std.clamp(-3, 1)

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of the policy pi, and
        the same of the behavior policy pi_beta, fitted to the data; pi is pi_beta, detached, plus a shift (D6)."""
        mean, log_std = self.shift(obs, z)[0].chunk(2, -1)
        with torch.no_grad():
            mean_b, log_std_b = self.fitted(obs, z)
        return mean_b + mean, (log_std_b + log_std).clamp(-5, 2), mean_b, log_std_b

    def act(self, obs, z, clone=False):
        """obs [M, B, obs_dim], z [M, z_dim] -> the deterministic action [M, B, act_dim] in (-1, 1) of pi, or of its
        clone of the data, pi_beta."""
        mean, _, mean_b, _ = self.policies(obs, z)
        return torch.tanh(mean_b if clone else mean)


# ---- update -----------------------------------------------------------------


def update(agent, task_ids, context, other, segment, best, args):
    """One step of every network. task_ids [M]; context and other [M, K, ctx_dim], drawn apart; segment: Segment of
    [M, B, n, ..], drawn apart from both; best: Batch of [M, B, ..] that pi_beta is fitted to; all of the same tasks ->
    dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # task inference: each context finds its task's key among those of all tasks
    real = torch.ones_like(context[..., 0])
    z = agent.encoder(context, real)  # [M, z_dim]
    with torch.no_grad():
        key = agent.key_encoder(other, real)
    nce = contrastive_loss(z, key, task_ids, args.temperature)
    encoder_loss = args.nce_weight * nce + args.metric_weight * metric_loss(z, task_ids)
    z_fixed = z.detach()  # nothing else trains the encoder

    # critics
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_act = torch.tanh(mean + args.target_noise * log_std.exp() * torch.randn_like(mean))
        next_q = agent.q_target(next_obs, next_act, z_fixed).amin(0)
        q_target = args.reward_scale * (segment.weight * segment.rew).sum(-1) + segment.bootstrap * next_q  # [M, B]
    q_loss = (agent.q(obs, act, z_fixed) - q_target).pow(2).mean((1, 2)).sum()
    (encoder_loss + q_loss).backward(inputs=[*agent.encoder.parameters(), *agent.q.parameters()])

    # behavior policy by maximum likelihood, and the policy, regularized towards it
    behavior_loss = -tanh_gaussian_logp(*agent.fitted(best.obs, z_fixed), pre_tanh(best.act)).mean()
    behavior_loss.backward(inputs=list(agent.behavior.parameters()))
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z_fixed)
    pi_act = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
    q_mean = agent.q(obs, pi_act, z_fixed).amin(0).mean()
    divergence = gaussian_kl(mean, log_std, mean_b, log_std_b).mean()
    actor_loss = agent.brac_alpha * divergence - q_mean
    actor_loss.backward(inputs=list(agent.shift.parameters()))
    agent.opt.step()  # [ours: D5]
    with torch.no_grad():
        # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
        agent.brac_alpha.add_(args.brac_alpha_lr * (divergence - args.divergence_target)).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)
        following, leading = (list(net.parameters()) for net in (agent.key_encoder, agent.encoder))
        torch._foreach_lerp_(following, leading, 1 - args.momentum)  # [momentum]
        return {
            "losses/encoder": encoder_loss.detach(),
            "losses/q": q_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "stats/nce": nce.detach(),
            "stats/q_mean": q_mean.detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "z/between_std": z_fixed.std(0, correction=min(1, len(z_fixed) - 1)).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():  # a few rows at a time: attention over many long contexts would take gigabytes
        z = torch.cat([agent.encoder(*rows) for rows in zip(context.split(16), mask.split(16))])
        return torch.where(mask.any(1, keepdim=True), z, agent.z_mean)  # [ours: D11]


def adapt(agent, context, mask, explore=False, clone=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; rows without a transition get
    agent.z_mean; explore changes nothing, z has no spread; clone: pi_beta acts -> policy(obs [R, obs_dim], rew [R])
    -> act."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z, clone)[:, 0]


def value(agent, args, context, mask, obs):
    """Q of the policy's own action at obs [R, n, obs_dim], for `dc.q_error` -> [R, n] in units of the reward."""
    z = embed(agent, context, mask)
    return agent.q(obs, agent.act(obs, z), z).amin(0) / args.reward_scale


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns, also of pi_beta alone ("clone"), the critic's error and the quality of z -> dict tag -> float."""
    agent.z_mean.copy_(dc.label_contexts(data, partial(embed, agent), data.train_ids)[0].mean(0))
    q, clone = partial(value, agent, args), partial(adapt, agent, clone=True)
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, clone)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO, RANGES)
    if args.attention and args.encoder_width % args.heads:
        raise SystemExit(f"--heads {args.heads}: must divide --encoder-width {args.encoder_width}")
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed) as run:
        while run.going():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context, other = (data.sample_context(task_ids, args.context_size, generator) for _ in range(2))
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            best = data.sample_batch(task_ids, args.batch_size, generator, args.anchor_share)
            dc.set_lr(agent.opt, args.lr * run.decay)
            run.advance(step_fn(agent, task_ids, context, other, segment, best, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
