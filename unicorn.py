"""UNICORN: a unified view of context-based offline meta-reinforcement learning through mutual information.

Li, Ding, Zheng, Zhang, NeurIPS 2024, https://arxiv.org/abs/2402.02429
Official code, of SS only: https://github.com/betray12138/UNICORN
The context splits into behavior (s, a) and task (r, s'); what z should hold is the mutual information with the
task, I(Z; M), which lies between I(Z; X_t | X_b), a reconstruction of (r, s') from (z, s, a), and I(Z; X), the
metric loss of FOCAL. UNICORN-SS mixes the two, SS-0 reconstructs only and needs no task labels, SUP
classifies the training task from z.

Losses: SS    reconstruction + w * metric loss, w = alpha / (1 - alpha)
        SS-0  reconstruction (w = 0)
        SUP   cross-entropy of a classifier over the training tasks
with reconstruction = sum of two Gaussian negative log-likelihoods (no 1/2, no log 2 pi), of the state
difference and of the reward, whose log-variances are softly bounded by learned limits.

Deviations from the paper and from the official code:
  D1  The encoder's noise is on in training and off in evaluation (code: on in both).
  D2  The divergence D_KL(pi || pi_beta) of the paper's BRAC against a behavior policy fitted to the data, in closed
      form; no entropy term. The code has BRAC for ant-dir alone, with log pi in the policy's loss and the dual critic's
      estimate, which without its gradient acts on the critics' target and not on the policy; its other four
      configurations are plain SAC, `--backbone sac`.
  D3  Tasks are drawn anew in every update (code: for 200 updates). A training context is drawn with replacement from
      one episode (code: the whole one); the terminal flag is not an input. Observations are standardized, and the
      differences of states are those of standardized ones.
  D4  Time limits are no terminations, falls are (code: neither).
  D5  All losses of a step use the parameters from before the step.
  D6  The policy is the fitted behavior policy plus a learned shift of mean and log_std.
  D7  Layer normalization in all networks on (transition, z); the learning rate falls to 0 in the second half. Width of
      the encoder and size of z are those of focal.py.
  D8  log_std is clamped to [-5, 2], pi_beta's to [-3, 1] (code: [-20, 2]), and the data's actions to +-0.999 where
      pi_beta is fitted to them.
  D9  The critics' targets take the rewards of several steps of the data, then the policy's mean as the next action
      (paper: one step, a sample), so that the critics come nearer to their value in as few updates. With an entropy
      term the action is a sample, too; the steps before it have no entropy. pi_beta is fitted, with weight decay, to
      the best quarter of each task's data, by the returns of the episodes.
  D10 Without a context, so in zero_shot and in the first own episode, z is the mean over the training tasks' episodes
      (code: 0, for which no network was trained).

Run:     python unicorn.py --env ant-dir; others: --variant ss-0, --variant sup
Closest to the paper, ant-dir and cheetah: --gamma 0.99 --reward-scale 1 --n-step 1 --target-noise 1 --tau 0.005
         --anchor-share 1 --behavior-decay 0 --batch-size 256 --context-size 200 --lr 3e-4 --no-lr-decay --z-dim 5
         --encoder-width 64 --total-updates 200000; hopper and walker instead --encoder-width 128 --decoder-width 128,
         --z-dim 40 and 32; as released: ant-dir --brac-alpha 0.2 --brac-alpha-lr 0, the others --backbone sac
         (cheetah-vel: --entropy-weight 0; cheetah-dir and walker: --metric-weight 0.01 and 0.7)
No flag reaches: D1 to D6, D8, D10, layer normalization.
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
    exp_name: str = "unicorn"  # name of the experiment: the folder between env and seed in the run directory
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
    n_step: int | None = None  # steps of the data's rewards in a target; 1 = the paper's (D9); None = ENV_ARGS
    target_noise: float = 0.0
    """noise of the targets' next action in the policy's standard deviations; 1 = the paper's sample, 0 = the policy's
    mean (D9); with --backbone sac always 1"""
    tau: float = 0.02  # rate at which the target networks follow
    width: int = 256  # hidden units of policy and critics, two layers
    encoder_width: int = 200  # hidden units of the encoder, two layers
    z_dim: int | None = None  # size of the task latent; None = ENV_ARGS
    variant: Literal["ss", "ss-0", "sup"] = "ss"
    """what trains the encoder: reconstruction and metric loss, reconstruction, or classification of the task"""
    metric_weight: float | None = None  # factor w on the metric loss of `ss`; None = ENV_ARGS
    decoder_width: int = 64  # hidden units of the two decoders, and of the classifier of `sup`
    recon_state: bool = True  # reconstruct the state difference besides the reward
    enc_noise: bool = True  # learned noise on the embeddings in training (D1)
    backbone: Literal["brac", "sac"] = "brac"
    """regularized towards the behavior policy, or plain SAC as in four of the five official configurations (D2)"""
    entropy_weight: float = 0.2  # weight of the policy's entropy with --backbone sac
    anchor_share: float | None = None
    """share of each task's transitions, those of its best episodes, that pi_beta is fitted to (D9); 1 = the paper's
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
        metric_weight=0.15,
        anchor_share=0.25,
        brac_alpha=1.0,
        brac_alpha_lr=1e-3,
        divergence_target=0.2,
    ),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0),
    "params": dict(metric_weight=1.5),
}
MAY_BE_ZERO = {"metric_weight"}

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
    """Task embedding z(context): mean of the bounded, noisy embeddings of the transitions."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim))
        self.log_var = nn.Parameter(torch.zeros(z_dim))

    def forward(self, context, mask, noise):
        """context [M, K, ctx_dim], mask [M, K] 1 = real, noise [M, K, z_dim] or 0 -> z [M, z_dim] in (-1, 1)."""
        std = self.log_var.exp().clamp(0.1, 10).sqrt()
        mean = self.net(context.flatten(0, 1)).unflatten(0, mask.shape)
        each = torch.tanh(mean + std * noise) * mask[..., None]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Decoder(MLP):
    """Gaussian over dim numbers given (obs, act, z), with learned soft limits of its log-variance."""

    def __init__(self, obs_dim, act_dim, z_dim, width, dim):
        super().__init__(1, obs_dim + act_dim, z_dim, width, 2 * dim)
        self.low, self.high = nn.Parameter(torch.full((dim,), -10.0)), nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, obs, act, z):
        """obs [M, K, obs_dim], act [M, K, act_dim], z [M, z_dim] -> mean, log_var [M, K, dim]."""
        mean, log_var = super().forward(torch.cat([obs, act], -1), z)[0].chunk(2, -1)
        return mean, soft_clamp(log_var, self.low, self.high)


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


def soft_clamp(x, low, high):
    """x, low, high [.., dim] -> x softly limited, first from above and then from below."""
    x = high - F.softplus(high - x)
    return low + F.softplus(x - low)


def gaussian_nll(mean, log_var, target):
    """All [.., dim] -> scalar: negative log-likelihood without its factor 1/2 and its constant."""
    return ((mean - target).pow(2) * (-log_var).exp() + log_var).mean()


def reconstruction_loss(decoder, obs, act, z, target):
    """Negative log-likelihood of target [M, K, dim] given (obs, act, z), and the pull on the limits -> scalar."""
    limits = 0.01 * (decoder.high.sum() - decoder.low.sum())
    return gaussian_nll(*decoder(obs, act, z), target) + limits


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
        self.sizes = [obs_dim, act_dim, 1, obs_dim]  # of the parts of a context's row
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.heads = nn.ModuleList()  # what the encoder is trained through: decoders, or the classifier
        if args.variant == "sup":
            h = args.decoder_width
            layers = [nn.Linear(z_dim, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, len(data.train_ids))]
            self.heads.append(nn.Sequential(*layers))
        else:
            dims = [1, obs_dim] if args.recon_state else [1]
            self.heads.extend(Decoder(obs_dim, act_dim, z_dim, args.decoder_width, dim) for dim in dims)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.behavior = MLP(1, obs_dim, z_dim, width, 2 * act_dim) if args.backbone == "brac" else None
        self.shift = MLP(1, obs_dim, z_dim, width, 2 * act_dim)  # of pi from pi_beta, or from N(0, 1) without one
        for net in (self.behavior, self.shift):
            for parameter in (net.w_3, net.b_3) if net else ():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        # learning rate as a tensor, so that a compiled update reads the current one
        fitted = list(self.behavior.parameters()) if self.behavior else []
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


def task_losses(agent, z, labels, context, args):
    """What trains the encoder, as parts of a sum. z [M, z_dim], labels [M] number of each context's training task,
    context [M, K, ctx_dim] -> dict name -> scalar."""
    if args.variant == "sup":
        return {"classifier": F.cross_entropy(agent.heads[0](z), labels)}
    obs, act, rew, next_obs = context.split(agent.sizes, -1)
    targets = (rew, next_obs - obs)  # the difference, not the next state
    each = [reconstruction_loss(head, obs, act, z, target) for head, target in zip(agent.heads, targets)]
    if args.variant == "ss-0":
        return {"reconstruction": sum(each)}
    return {"reconstruction": sum(each), "metric": args.metric_weight * metric_loss(z, labels)}


def update(agent, labels, context, segment, best, args):
    """One step of every network. labels [M]; context [M, K, ctx_dim]; segment: Segment of [M, B, n, ..], drawn apart
    from the context; best: Batch of [M, B, ..] that pi_beta is fitted to -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # task inference
    noise = torch.randn(*context.shape[:2], args.z_dim, device=context.device) if args.enc_noise else 0.0
    z = agent.encoder(context, torch.ones_like(context[..., 0]), noise)  # [M, z_dim]
    parts = task_losses(agent, z, labels, context, args)
    encoder_loss = sum(parts.values())
    z_fixed = z.detach()  # nothing else trains the encoder

    # critics
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_noise = 1.0 if args.backbone == "sac" else args.target_noise  # an entropy is estimated by a sample
        next_pre = mean + next_noise * log_std.exp() * torch.randn_like(mean)
        next_q = agent.q_target(next_obs, torch.tanh(next_pre), z_fixed).amin(0)
        if args.backbone == "sac":
            next_q = next_q - args.entropy_weight * tanh_gaussian_logp(mean, log_std, next_pre)
        q_target = args.reward_scale * (segment.weight * segment.rew).sum(-1) + segment.bootstrap * next_q  # [M, B]
    q_loss = (agent.q(obs, act, z_fixed) - q_target).pow(2).mean((1, 2)).sum()
    trained = [*agent.encoder.parameters(), *agent.heads.parameters(), *agent.q.parameters()]
    (encoder_loss + q_loss).backward(inputs=trained)

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
            **{f"losses/{name}": loss.detach() for name, loss in parts.items()},
            "losses/encoder": encoder_loss.detach(),
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
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim], without noise (D1)."""
    with torch.no_grad():
        z = agent.encoder(context, mask, 0.0)
        return torch.where(mask.any(1, keepdim=True), z, agent.z_mean)  # [ours: D10]


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
    q = partial(value, agent, args)
    clone = partial(adapt, agent, clone=True) if agent.behavior else None
    results = dc.evaluate_actor_critic(data, partial(adapt, agent), q, args.gamma, protocols, episodes, clone)
    return results | dc.embedding_quality(data, partial(embed, agent))


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed) as run:
        while run.going():
            labels = torch.randint(len(data.train_tasks), (args.meta_batch,), device=data.device, generator=generator)
            task_ids = data.train_tasks[labels]
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            best = data.sample_batch(task_ids, args.batch_size, generator, args.anchor_share)
            dc.set_lr(agent.opt, args.lr * run.decay)
            run.advance(step_fn(agent, labels, context, segment, best, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
