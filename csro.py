"""CSRO: context shift reduction for offline meta-reinforcement learning.

Gao, Zhang, Guo, et al., NeurIPS 2023, https://arxiv.org/abs/2311.03695
official code https://github.com/MoreanP/CSRO, a fork of FOCAL's
The context of a new task is collected by another policy than that of the data, and an encoder that has learned to
read who acted is led astray. So FOCAL's metric loss is joined by an upper bound of the mutual information between the
embedding of a transition and its (s, a), which stand for the behavior policy: a variational network guesses the
embedding from (s, a), and the encoder is trained so that a guess fits its own embedding no better than those of the
context's other transitions (CLUB).
At test the first context is collected at random, not by a policy that presumes a task: protocol `np_online`.

Equations: [VD] fit of the variational network; [minMI] the bound; the metric loss is that of focal.py.

Deviations from the paper and from the official code:
  D1  The bound as in the code (no factor 1/2, a mean over the dimensions of z, a transition with itself included), but
      over the pairs of one context, so of one episode (D8; code: of the task); in closed form, without their tensor.
  D2  The divergence D_KL(pi || pi_beta) is BRAC's primal estimate, the closed form against a behavior policy fitted to
      the data (code: FOCAL's dual critic, with the penalty on its output). All settings of the backbone are focal.py's.
  D3  Twin critics with targets (code: twin critics without, and a V network with a target). No entropy term.
  D4  Time limits are no terminations (code: every trajectory terminates).
  D5  All losses of a step use the parameters from before the step, but for the variational network's: its step comes
      first, or else the bound would be none.
  D6  The policy is the fitted behavior policy plus a learned shift of mean and log_std.
  D7  Layer normalization in all networks on (transition, z), two hidden layers in all networks (code: three), size of z
      as in focal.py; the learning rate falls to 0 in the second half. No penalty on the policy's mean and log_std.
  D8  Tasks with replacement (code: without, so that there is no positive pair and no attraction); a training context is
      drawn with replacement from one episode (code: transitions of the task). The encoder sees (s, a, r, s') in all
      families (code: s' only where the dynamics differ).
  D9  Observations are standardized; log_std is clamped to [-5, 2], pi_beta's to [-3, 1] (code: at -20 from below), and
      the data's actions to +-0.999 where pi_beta is fitted to them.
  D10 The critics' targets take the rewards of several steps of the data, then the policy's mean as the next action
      (code: one step, a sample). pi_beta is fitted, with weight decay, to the best quarter of each task's data.
  D11 Without a context, so in zero_shot and in the first own episode, z is the mean over the training tasks' episodes
      (code: 0, for which no network was trained).
  D12 In `np_online` one episode is random, then the mean of the policy acts, and each episode joins the context (code:
      random in the first half of the steps, one to ten episodes, then samples; what is evaluated does not join).

Run:     python csro.py --env ant-dir
Ablate:  --club-weight 0 (FOCAL's encoder)
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
    exp_name: str = "csro"  # name of the experiment: the folder between env and seed in the run directory
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
    encoder_width: int = 200  # hidden units of encoder and variational network, two layers
    z_dim: int | None = None  # size of the task latent; None = ENV_ARGS
    metric_weight: float = 10.0  # factor on the metric loss
    club_weight: float | None = None  # factor on the bound of the mutual information (lambda); None = ENV_ARGS
    guess_weight: float = 10.0  # factor on the loss of the variational network
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
        club_weight=25.0,
        anchor_share=0.25,
        brac_alpha=1.0,
        brac_alpha_lr=1e-3,
        divergence_target=0.2,
    ),
    "point": dict(gamma=0.9, reward_scale=5.0, n_step=1, z_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0),
    "ant": dict(club_weight=50.0),
    "cheetah": dict(club_weight=10.0),
}
MAY_BE_ZERO = {"metric_weight", "club_weight"}

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
    """Deterministic task embedding z(context): mean of the bounded embeddings of the transitions."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim))

    def each(self, context):
        """context [M, K, ctx_dim] -> embeddings of its transitions [M, K, z_dim] in (-1, 1)."""
        return torch.tanh(self.net(context.flatten(0, 1))).unflatten(0, context.shape[:2])

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition."""
        each = self.each(context) * mask[..., None]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Guess(nn.Module):
    """Variational network q(e | s, a): what a transition's (s, a) tell of its embedding, a Gaussian."""

    def __init__(self, obs_dim, act_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(obs_dim + act_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2 * z_dim))

    def forward(self, obs_act):
        """obs_act [M, K, obs_dim + act_dim] -> mean in (-1, 1) and variance in (0.31, 1.31), [M, K, z_dim]."""
        mean, var = torch.tanh(self.net(obs_act)).chunk(2, -1)
        return mean, F.softplus(var)


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


def guess_loss(each, mean, var):
    """Negative log-likelihood but for its constant: embeddings each, mean, var [M, K, z_dim] -> scalar, a mean."""
    return ((each - mean).pow(2) / (2 * var) + 0.5 * var.log()).mean()  # [VD]


def club(each, mean, var):
    """Bound of the information that (s, a) have on the embeddings: how much better the guesses mean, var fit their own
    embeddings than those of all transitions of the context, all [M, K, z_dim] -> scalar."""
    own = (each - mean).pow(2)
    center, spread = each.mean(1, keepdim=True), each.var(1, correction=0, keepdim=True)
    of_all = (center - mean).pow(2) + spread  # the mean over l of (each_l - mean_k)^2
    return ((of_all - own) / var).mean()  # [minMI] [code: D1]


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
    """Networks, targets, the weight of the divergence, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        self.encoder = Encoder(data.ctx_dim, z_dim, args.encoder_width)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.behavior = MLP(1, obs_dim, z_dim, width, 2 * act_dim)
        self.shift = MLP(1, obs_dim, z_dim, width, 2 * act_dim)  # of pi from pi_beta
        for net in (self.behavior, self.shift):
            for parameter in (net.w_3, net.b_3):
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        # learning rates as tensors, so that a compiled update reads the current ones
        fitted = list(self.behavior.parameters())
        rest = [p for name, p in self.named_parameters() if not name.startswith("behavior.")]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": fitted, "weight_decay": args.behavior_decay}]
        self.opt = torch.optim.AdamW(groups, torch.tensor(args.lr), fused=True)
        self.guess = Guess(obs_dim, act_dim, z_dim, args.encoder_width)
        self.guess_opt = torch.optim.Adam(self.guess.parameters(), torch.tensor(args.lr), fused=True)
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


def update(agent, task_ids, context, segment, best, args):
    """One step of every network. task_ids [M]; context [M, K, ctx_dim]; segment: Segment of [M, B, n, ..], drawn apart
    from the context; best: Batch of [M, B, ..] that pi_beta is fitted to; all of the same tasks -> dict of detached
    0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()
    agent.guess_opt.zero_grad()

    # variational network: what (s, a) tell of the embeddings, before the encoder's step
    each = agent.encoder.each(context)  # [M, K, z_dim]
    obs_act = context[..., : obs.shape[-1] + act.shape[-1]]
    fit = args.guess_weight * guess_loss(each.detach(), *agent.guess(obs_act))
    fit.backward(inputs=list(agent.guess.parameters()))
    agent.guess_opt.step()

    # task inference: metric loss and bound train the encoder
    with torch.no_grad():
        guess = agent.guess(obs_act)
    bound = club(each, *guess)
    z = each.mean(1)  # [M, z_dim]
    encoder_loss = args.metric_weight * metric_loss(z, task_ids) + args.club_weight * bound
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
        return {
            "losses/encoder": encoder_loss.detach(),
            "losses/guess": fit.detach(),
            "losses/q": q_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "stats/club": bound.detach(),
            "stats/q_mean": q_mean.detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "z/between_std": z_fixed.std(0, correction=min(1, len(z_fixed) - 1)).mean(),
            "z/within_std": each.detach().std(1, correction=0).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        z = agent.encoder(context, mask)
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
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed) as run:
        while run.going():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            context = data.sample_context(task_ids, args.context_size, generator)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            best = data.sample_batch(task_ids, args.batch_size, generator, args.anchor_share)
            dc.set_lr(agent.opt, args.lr * run.decay)
            dc.set_lr(agent.guess_opt, args.lr * run.decay)
            run.advance(step_fn(agent, task_ids, context, segment, best, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
