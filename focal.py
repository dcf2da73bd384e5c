"""FOCAL: fully-offline meta-reinforcement learning with distance metric learning and behavior regularization.

Li, Yang, Luo, ICLR 2021, arXiv 2010.01112.
A task is a point z: the mean over the context of a deterministic, bounded embedding of each transition. The
encoder is trained by a metric loss alone, which pulls contexts of one task together and pushes those of
different tasks apart by an inverse power of their distance; z never gets a gradient of the reinforcement
learning, which is a behavior-regularized actor-critic (BRAC).

Deviations from the paper and from the official code:
  D1  Metric loss in the form of the official code: mean over the dimensions of z, square root in the
      attraction, positive and negative pairs averaged apart. Tasks are drawn with replacement: without, as
      in the code, there is no positive pair and no attraction.
  D2  The divergence D_KL(pi || pi_beta) is by default taken against a behavior policy fitted to the data
      (`--divergence primal`, BRAC's other estimator, in closed form); `dual` is the paper's critic, with a
      penalty on the real gradient (`--gp-mode output`: on the critic's output, as in the official code).
  D3  Twin critics with targets instead of a V network; no entropy term unless --entropy-weight is given.
  D4  Time limits are no terminations.
  D5  All losses of a step use the parameters from before the step, but for the dual critic, trained first; its value
      at the data is that of its last step's batch. Its learning rate stays.
  D6  With the primal divergence the policy is the fitted behavior policy plus a learned shift of mean and
      log_std. As two networks of their own, they differed by 0.6 nats at any weight.
  D7  Layer normalization in all networks on transitions but the encoder, all with two hidden layers (paper: three);
      the learning rate falls to 0 in the second half. No penalty on the policy's mean and log_std.
  D8  A training context is drawn with replacement from one episode (paper: transitions of the task).

Run:     python focal.py --env ant-dir
Closest to the paper: --divergence dual --gamma 0.99 --reward-scale 5 --entropy-weight 1 --brac-alpha 50
         --brac-alpha-lr 1 --brac-alpha-max 2000 --batch-size 256 --context-size 200 --lr 3e-4 --total-updates 200000
"""

import copy
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "focal"
    """name of the experiment: the folder between env and seed in the run directory"""
    seed: int = 0
    """seed of initialization and batches (tasks and data are fixed by the dataset file)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    compile: bool = False
    """compile the update with torch.compile (pays on a GPU, is slower on a CPU)"""
    total_updates: int = 8_000
    """updates of the policy [gradient steps]"""
    log_every: int = 250
    """updates between two log lines [gradient steps]"""
    eval_every: int = 1_000
    """updates between two evaluations [gradient steps]"""
    save_every: int = 1_000
    """updates between two checkpoints [gradient steps]"""
    run_dir: str = "runs"
    """parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}"""
    resume: str | None = None
    """run directory to continue, with the arguments stored there"""
    eval_only: bool = False
    """with --resume: evaluate its checkpoint with all protocols and stop"""
    # data and evaluation
    env: dc.EnvName = "ant-dir"
    """task family"""
    dataset: str | None = None
    """dataset file; by default datasets/{env}.npz"""
    eval_episodes: int = 2
    """episodes per task and evaluation"""
    meta_batch: int = 16
    """tasks per update, drawn with replacement [tasks]"""
    batch_size: int = 32
    """transitions per task and update [transitions]"""
    context_size: int = 64
    """transitions of one episode that a task is inferred from in training [transitions]"""
    # method
    gamma: float | None = None
    """discount; None = ENV_ARGS"""
    reward_scale: float | None = None
    """factor on the rewards in all losses; None = ENV_ARGS"""
    lr: float = 1.2e-3
    """Adam's learning rate of all networks in the first half of the training; then it falls linearly to 0"""
    tau: float = 0.005
    """rate at which the target networks follow"""
    width: int = 256
    """hidden units of policy and critics, two layers"""
    encoder_width: int = 200
    """hidden units of the encoder, two layers"""
    z_dim: int | None = None
    """size of the task latent; None = ENV_ARGS"""
    metric_weight: float = 10.0
    """factor on the metric loss"""
    entropy_weight: float = 0.0
    """weight of the policy's entropy in target and policy loss"""
    divergence: Literal["primal", "dual"] = "primal"
    """estimator of D_KL(pi || pi_beta): fitted behavior policy, or the paper's dual critic (D2)"""
    gp_mode: Literal["gradient", "output"] = "gradient"
    """what the dual critic's penalty acts on"""
    gp_weight: float = 5.0
    """weight of that penalty"""
    dual_lr: float = 1e-4
    """learning rate of the dual critic"""
    dual_iters: int = 3
    """steps of the dual critic per update"""
    brac_alpha: float | None = None
    """initial weight of the divergence in the policy loss; None = ENV_ARGS"""
    brac_alpha_lr: float | None = None
    """step of that weight towards the target divergence; 0 = fixed; None = ENV_ARGS"""
    brac_alpha_max: float = 100.0
    """largest weight of the divergence"""
    divergence_target: float | None = None
    """divergence that it aims at [nats]; None = ENV_ARGS"""


# what the environments need differently, for arguments left at None
ENV_ARGS = {  # the first entry whose key is part of the family's name
    "point": dict(gamma=0.9, reward_scale=5.0, z_dim=5, brac_alpha=1.5, brac_alpha_lr=0.0, divergence_target=0.05),
    "": dict(gamma=0.97, reward_scale=0.5, z_dim=20, brac_alpha=1.0, brac_alpha_lr=1e-3, divergence_target=0.05),
}

MAY_BE_ZERO = {"seed", "metric_weight", "entropy_weight", "gp_weight"}
MAY_BE_ZERO |= {"brac_alpha", "brac_alpha_lr", "divergence_target"}
RANGES = {"gamma": (0, 1), "tau": (0, 1)}
EVAL_ONLY = set()  # not of the training: may differ when a run is resumed

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
        return self.rest(self.first(x, z))

    def first(self, x, z):
        """The first linear layer: x [M, B, in_dim], z [M, z_dim] -> [members, M, B, width]."""
        members = len(self.w_x)
        of_task = torch.baddbmm(self.b_1, z.expand(members, *z.shape), self.w_z)  # [members, M, width]
        h = torch.bmm(x.flatten(0, 1).expand(members, -1, -1), self.w_x).unflatten(1, x.shape[:2])
        return h + of_task[:, :, None]

    def rest(self, first):
        """What follows it: [members, M, B, width] -> [members, M, B, out_dim]."""
        h = first.flatten(1, 2)
        for weight, bias in ((self.w_2, self.b_2), (self.w_3, self.b_3)):
            h = torch.baddbmm(bias, F.layer_norm(h, h.shape[-1:]).relu(), weight)  # [ours: D7]
        return h.unflatten(1, first.shape[1:3])


class Encoder(nn.Module):
    """Deterministic task embedding z(context): mean of the bounded embeddings of the transitions."""

    def __init__(self, ctx_dim, z_dim, width):
        super().__init__()
        layers = [nn.Linear(ctx_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim))

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition."""
        each = torch.tanh(self.net(context.flatten(0, 1))).unflatten(0, mask.shape) * mask[..., None]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Critics(MLP):
    """`members` scalar functions of (obs, act, z), evaluated together."""

    def __init__(self, members, obs_dim, act_dim, z_dim, width):
        super().__init__(members, obs_dim + act_dim, z_dim, width, 1)

    def forward(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> [members, M, B]."""
        return super().forward(torch.cat([obs, act], -1), z)[..., 0]


# ---- losses -----------------------------------------------------------------

EPS = 1e-3  # of the metric loss, as in the official code


def metric_loss(z, task_ids):
    """z [M, z_dim], task_ids [M] -> scalar, over all pairs: root distance within a task, inverse distance across."""
    distance = (z[:, None] - z).pow(2).mean(-1)  # [M, M]
    pairs = torch.ones_like(distance).triu(1)
    same = pairs * (task_ids[:, None] == task_ids)
    other = pairs - same
    pull = (same * (distance + EPS).sqrt()).sum() / (same.sum() + EPS)
    push = (other / (distance + 100 * EPS)).sum() / (other.sum() + EPS)
    return pull + push  # [code] metric loss with inverse-square repulsion


def dual_divergence(c_data, c_policy):
    """Dual critic at the data's and at the policy's actions [..] -> lower bound of D_KL(pi || pi_beta) [..]."""
    return 1 - F.softplus(c_data) + torch.log(F.softplus(c_policy) + 1e-8)  # [BRAC, dual form of the KL]


def slope_penalty(value, first=None, w_act=None):
    """Dual critic's value [M, B] between the data's and the policy's actions -> scalar: mean square of how far its
    slope in the action exceeds 1. first [1, M, B, width]: its first layer, linear in the action with weight w_act
    [act_dim, width]; without it the value stands in place of the slope, as in the official code (D2)."""
    slope = value
    if first is not None:
        (slope,) = torch.autograd.grad(value.sum(), first, create_graph=True)
        slope = torch.sqrt(1e-8 + (slope @ w_act.T).pow(2).sum(-1))
    return F.mse_loss(slope, slope.detach().clamp(-1, 1))


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
    """Networks, targets and the weight of the divergence; `opts`: Adam for all, and the dual critic's."""

    def __init__(self, obs_dim, act_dim, ctx_dim, args):
        super().__init__()
        z_dim, width = args.z_dim, args.width
        self.encoder = Encoder(ctx_dim, z_dim, args.encoder_width)
        self.q = Critics(2, obs_dim, act_dim, z_dim, width)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.fits_behavior = args.divergence == "primal"
        self.gaussians = MLP(1 + self.fits_behavior, obs_dim, z_dim, width, 2 * act_dim)  # of pi_beta, and pi's shift
        for parameter in (self.gaussians.w_3, self.gaussians.b_3):
            nn.init.uniform_(parameter, -1e-3, 1e-3)
        if not self.fits_behavior:
            self.dual = Critics(1, obs_dim, act_dim, z_dim, width)
        self.register_buffer("brac_alpha", torch.tensor(float(args.brac_alpha)))
        trained = [self.encoder, self.q, self.gaussians]
        self.params = [list(module.parameters()) for module in trained]

    def make_optimizer(self, args):
        params = [parameter for group in self.params for parameter in group]
        self.opts = [torch.optim.Adam(params, torch.tensor(args.lr), fused=True)]  # a tensor: `anneal` changes it
        if not self.fits_behavior:
            self.opts += [torch.optim.Adam(self.dual.parameters(), torch.tensor(args.dual_lr), fused=True)]

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> mean and log_std before the tanh [M, B, act_dim] of the policy pi and
        the same of the behavior policy pi_beta, fitted to the data (D2), or None; pi is then pi_beta, detached, plus a
        shift (D6)."""
        if not self.fits_behavior:
            mean, log_std = self.gaussians(obs, z)[0].chunk(2, -1)
            return mean, log_std.clamp(-5, 2), None, None
        (mean_b, log_std_b), (mean, log_std) = (out.chunk(2, -1) for out in self.gaussians(obs, z))
        log_std_b = log_std_b.clamp(-3, 1)
        return mean_b.detach() + mean, (log_std_b.detach() + log_std).clamp(-5, 2), mean_b, log_std_b

    def act(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> the policy's deterministic action [M, B, act_dim] in (-1, 1)."""
        return torch.tanh(self.policies(obs, z)[0])


def anneal(opts, lr, done):
    """Learning rate of all optimizers: `lr` for the first half of the training, then linear to 0; done in [0, 1]."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(lr * min(1.0, 2 - 2 * done))  # [ours: D7]


# ---- update -----------------------------------------------------------------


def set_grads(loss, params, retain_graph=False):
    """Put the gradient of a scalar loss into .grad of exactly these parameters."""
    grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
    for parameter, grad in zip(params, grads):
        parameter.grad = grad


@torch.compiler.disable  # it cannot differentiate twice
def dual_steps(agent, batches, z, act_policy, args):
    """One step of the dual critic per batch: obs [M, B, obs_dim] and act of each; act_policy [M, B, act_dim], the
    policy's actions at the first -> loss of the last step, and the critic at its batch's data before it [M, B]."""
    if len(batches) > 1:
        with torch.no_grad():  # the policy does not change meanwhile
            mean, log_std, _, _ = agent.policies(torch.cat([batch[0] for batch in batches[1:]], 1), z)
            others = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
        act_policy = torch.cat([act_policy, others], 1)
    for (obs, act, *_), pi_act in zip(batches, act_policy.split(args.batch_size, 1)):
        rows = torch.cat([obs.repeat(1, 2, 1), torch.cat([act, pi_act], 1)], -1)
        data, policy = agent.dual.first(rows, z).chunk(2, 2)  # [1, M, B, width]
        between = torch.lerp(policy, data, torch.rand_like(act[..., :1]))  # of actions between, by linearity
        c_data, c_policy, c_between = agent.dual.rest(torch.cat([data, policy, between], 2))[0, ..., 0].chunk(3, 1)
        gradient = (between, agent.dual.w_x[0, -act.shape[-1] :]) if args.gp_mode == "gradient" else ()
        loss = args.gp_weight * slope_penalty(c_between, *gradient) - dual_divergence(c_data, c_policy).mean()
        set_grads(loss, list(agent.dual.parameters()))
        agent.opts[1].step()
    return loss.detach(), c_data.detach()


def update(agent, task_ids, context, batches, args):
    """One step of every network. task_ids [M]; context [M, K, ctx_dim]; batches: list of independent draws, each
    obs [M, B, obs_dim], act, rew [M, B], next_obs, term [M, B]; the first is the batch of all losses, the
    others serve the dual critic alone -> dict of detached 0-d tensors."""
    obs, act, rew, next_obs, term = batches[0]
    rew = args.reward_scale * rew
    encoder, q_params, gaussian_params = agent.params

    # task inference: the metric loss alone trains the encoder
    z = agent.encoder(context, torch.ones_like(context[..., 0]))  # [M, z_dim]
    encoder_loss = args.metric_weight * metric_loss(z, task_ids)
    z_fixed = z.detach()  # nothing else trains the encoder

    # critics
    with torch.no_grad():
        mean, log_std, _, _ = agent.policies(next_obs, z_fixed)
        next_pre = mean + log_std.exp() * torch.randn_like(mean)
        next_act = torch.tanh(next_pre)
        q_next = agent.q_target(next_obs, next_act, z_fixed).amin(0)
        if args.entropy_weight:
            q_next = q_next - args.entropy_weight * tanh_gaussian_logp(mean, log_std, next_pre)
        q_target = rew + args.gamma * (1 - term) * q_next  # [M, B]
    q_loss = (agent.q(obs, act, z_fixed) - q_target).pow(2).mean((1, 2)).sum()
    set_grads(encoder_loss + q_loss, encoder + q_params)

    # behavior policy by maximum likelihood, and the policy, regularized towards it
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z_fixed)
    pi_pre = mean + log_std.exp() * torch.randn_like(mean)
    pi_act = torch.tanh(pi_pre)
    q_mean = agent.q(obs, pi_act, z_fixed).amin(0).mean()
    if agent.fits_behavior:
        behavior_loss = -tanh_gaussian_logp(mean_b, log_std_b, pre_tanh(act)).mean()
        divergence = gaussian_kl(mean, log_std, mean_b.detach(), log_std_b.detach()).mean()
    else:
        behavior_loss, c_data = dual_steps(agent, batches, z_fixed, pi_act.detach(), args)
        divergence = dual_divergence(c_data, agent.dual(obs, pi_act, z_fixed)[0]).mean()
    actor_loss = agent.brac_alpha * divergence - q_mean
    if args.entropy_weight:
        actor_loss = actor_loss + args.entropy_weight * tanh_gaussian_logp(mean, log_std, pi_pre).mean()
    set_grads(behavior_loss + actor_loss, gaussian_params)  # each reaches its own member alone
    agent.opts[0].step()  # [ours: D5]
    with torch.no_grad():
        # Lagrange multiplier: grows while the divergence exceeds its target, clipped in place
        agent.brac_alpha.add_(args.brac_alpha_lr * (divergence - args.divergence_target)).clamp_(0, args.brac_alpha_max)
        torch._foreach_lerp_(list(agent.q_target.parameters()), q_params, args.tau)
        return {
            "losses/encoder": encoder_loss.detach(),
            "losses/q": q_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/behavior": behavior_loss.detach(),
            "stats/q_mean": q_mean.detach(),
            "stats/divergence": divergence.detach(),
            "stats/brac_alpha": agent.brac_alpha.clone(),
            "z/between_std": z.std(0).mean(),
        }


# ---- adaptation -------------------------------------------------------------


def adapt(agent, context, mask, explore=False):
    """Infer the task and act on it. context [R, K, ctx_dim], mask [R, K]; rows without a transition get z = 0;
    explore changes nothing, z has no spread -> policy(obs [R, obs_dim], rew [R]) -> act."""
    z = embed(agent, context, mask)
    return lambda obs, rew: agent.act(obs[:, None], z)[:, 0]


def embed(agent, context, mask):
    """context [R, K, ctx_dim], mask [R, K] -> z [R, z_dim]."""
    with torch.no_grad():
        return agent.encoder(context, mask)


def evaluate_all(agent, data, args, protocols):
    """Returns and quality of z -> dict tag -> float."""
    results = dc.evaluate(data, partial(adapt, agent), protocols, args.eval_episodes)
    return results | dc.embedding_quality(data, partial(embed, agent))


CONSOLE_TAGS = ("losses/encoder", "losses/q", "losses/actor", "stats/q_mean", "stats/divergence")

# ---- the run ----------------------------------------------------------------


def resolve(args):
    """Check the arguments, fill in those left at None -> args. One line for whatever is wrong."""
    defaults = next(values for key, values in ENV_ARGS.items() if key in args.env)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        args.dataset = f"datasets/{args.env}.npz"
    for name, value in asdict(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least, most = RANGES.get(name, (0, math.inf))
        if not least <= value <= most or value == math.inf or (value == 0 and name not in MAY_BE_ZERO):
            limits = "be at least 0" if name in MAY_BE_ZERO else "be positive"
            limits = f"lie between {least} and {most}" if name in RANGES else limits
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must {limits}")
    return args


def write_json(path, content):
    dc.atomic_save(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def load_checkpoint(directory, device):
    """Checkpoint of a run directory as a dict; one line if there is none of this script."""
    path = Path(directory) / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"--resume {directory}: no checkpoint.pt there; give the run directory that training printed")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception:
        raise SystemExit(f"{path} is damaged; start the run anew without --resume")
    if not isinstance(saved, dict) or set(saved.get("args", ())) != {f.name for f in fields(Args)}:
        raise SystemExit(f"--resume {directory}: that run is of another script or version")
    return saved


def stored_args(directory):
    """Arguments of the run in a directory, set to continue it."""
    return Args(**load_checkpoint(directory, "cpu")["args"] | {"resume": str(directory)})


def check_resumed(args, saved, data):
    """A resumed run may get other lengths, intervals and device; whatever shapes the training must agree."""
    free = {"total_updates", "log_every", "eval_every", "save_every", "eval_episodes", "device", "compile"} | EVAL_ONLY
    for name in sorted(set(saved["args"]) - free - {"resume", "eval_only", "run_dir", "dataset"}):
        if getattr(args, name) != saved["args"][name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise SystemExit(f"{flag}: the run to resume has {saved['args'][name]}; drop the flag")
    if data.header != saved["data"]:
        raise SystemExit(f"{args.dataset} is not the file that the run to resume was trained on; use that: --dataset")


def eval_line(results):
    """One line of the returns per protocol, normalized in brackets."""
    names = [p for p in dc.PROTOCOLS if f"eval/{p}/return" in results]
    cells = [f"{p} {results[f'eval/{p}/return']:.1f} ({results[f'eval/{p}/normalized']:.0f})" for p in names]
    return "  ".join(["eval", *cells, f"z acc {results['z/nearest_task_acc']:.2f} R2 {results['z/probe_r2']:.2f}"])


class Run:
    """The run directory of one training: restores a run to resume, then counts, logs, evaluates and saves.

    A training has one or more phases, the last of which is "policy". The loop of a phase calls going(phase) before
    and advance(metrics) after every update; finish() comes at the end. `agent` has `opts`, the list of its
    optimizers; `generator` draws the batches; --{phase}-updates is a phase's length."""

    def __init__(self, args, data, agent, generator, phases=("policy",)):
        self.args, self.data, self.agent, self.generator = args, data, agent, generator
        self.steps, self.phase = dict.fromkeys(phases, 0), phases[-1]  # updates done per phase
        self.results, self.stopping, self.timed, self.born = {}, False, 0.0, time.time()
        self.dir = Path(args.resume or "")
        rows = 1
        if args.resume:
            saved = load_checkpoint(self.dir, data.device)
            check_resumed(args, saved, data)
            agent.load_state_dict(saved["agent"])
            for opt, state in zip(agent.opts, saved["opts"]):
                opt.load_state_dict(state)
            generator.set_state(saved["generator"].cpu())
            dc.restore_rng(saved["rng"])
            self.steps, rows = saved["steps"], saved["rows"]
            self.born -= saved["seconds"]
        else:
            name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
            self.dir = Path(args.run_dir) / args.env / args.exp_name / name
            try:
                self.dir.mkdir(parents=True)
            except OSError as error:
                raise SystemExit(f"cannot make {self.dir}: {error.strerror}; choose another --run-dir")
        self.finished = self.step >= args.total_updates and (self.dir / "result.json").is_file()
        if not self.finished and not args.eval_only:
            self.open_files(rows)

    @property
    def step(self):
        """Updates done in the current phase."""
        return self.steps[self.phase]

    @property
    def total(self):
        """Updates that the current phase has in all."""
        return self.args.total_updates if self.phase == "policy" else getattr(self.args, f"{self.phase}_updates")

    def open_files(self, rows):
        """args.json, TensorBoard events and metrics.csv, of which the first `rows` lines stay."""
        args, data = self.args, self.data
        versions = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)}
        stored = {k: v for k, v in asdict(args).items() if k not in ("resume", "eval_only")}
        about = {"args": stored, "versions": versions | {"python": sys.version.split()[0]}}
        write_json(self.dir / "args.json", about | {"command": sys.argv, "dataset": data.header})
        self.writer = SummaryWriter(str(self.dir), purge_step=sum(self.steps.values()) + 1 if args.resume else None)
        self.writer.add_text("args", "|argument|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in stored.items()))
        path = self.dir / "metrics.csv"
        kept = path.read_text().splitlines(keepends=True)[:rows] if path.exists() else ["step,tag,value\n"]
        dc.atomic_save(path, lambda file: file.write("".join(kept).encode()))
        self.csv, self.rows = open(path, "a"), len(kept)
        tasks = f"{len(data.train_ids)} training and {len(data.test_ids)} test tasks"
        print(f"{self.dir}: {args.env}, {tasks}, device {data.device}")
        worst, best = data.random_returns[data.test_ids].mean(), data.expert_returns[data.test_ids].mean()
        returns = f"random {worst:.1f}, expert {best:.1f}; of the training data {data.behavior_return:.1f}"
        print(f"  mean return on the test tasks: {returns}", flush=True)

    def __enter__(self):
        def on_interrupt(*_):
            self.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

        self.previous_handler = signal.signal(signal.SIGINT, on_interrupt)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous_handler)
        if hasattr(self, "csv"):
            self.csv.close()
            self.writer.close()

    def log(self, values):
        """dict tag -> number, to metrics.csv and TensorBoard."""
        for tag, value in values.items():
            self.csv.write(f"{self.step},{tag},{float(value)!r}\n")
            if "/return_task_" not in tag:
                self.writer.add_scalar(tag, value, sum(self.steps.values()))
        self.csv.flush()
        self.rows += len(values)

    def save(self):
        """checkpoint.pt, unless a parameter is not finite: then the last good one stays."""
        self.writer.flush()  # what a resumed run builds on is on the disk, should this one be killed
        state = {"agent": self.agent.state_dict(), "opts": [opt.state_dict() for opt in self.agent.opts]}
        state |= {"generator": self.generator.get_state(), "rng": dc.rng_state(), "data": self.data.header}
        state |= {"steps": self.steps, "rows": self.rows, "seconds": time.time() - self.born, "args": asdict(self.args)}
        if all(p.isfinite().all() for p in self.agent.parameters()):
            dc.atomic_save(self.dir / "checkpoint.pt", lambda file: torch.save(state, file))

    def going(self, phase="policy"):
        """Whether an update of this phase is to be done."""
        if self.stopping or self.args.eval_only:
            return False
        if self.phase != phase or not self.timed:
            self.phase = phase
            self.start_step, self.start, self.tick, self.timed = self.step, time.time(), time.perf_counter(), 1e-9
        return self.step < self.total

    def advance(self, metrics):
        """Count an update; log, evaluate and save when it is time. metrics: dict tag -> 0-d tensor."""
        args = self.args
        self.steps[self.phase] += 1
        last, policy = self.step == self.total, self.phase == "policy"
        if last or any(self.step % n == 0 for n in (args.log_every, args.eval_every, args.save_every)):
            values = self.read(metrics)
        self.timed += time.perf_counter() - self.tick
        if self.step % args.log_every == 0:
            self.log(values)
            self.print_progress(values)
        if policy and (self.step % args.eval_every == 0 or last):
            self.results = evaluate_all(self.agent, self.data, args, dc.PROTOCOLS if last else ("iid", "train"))
            self.log(self.results)
            print("  " + eval_line(self.results), flush=True)
        if self.step % args.save_every == 0 or last:
            self.save()
        self.tick = time.perf_counter()

    def read(self, metrics):
        """The only place where training reads from the device -> dict tag -> float; all must be finite."""
        values = {tag: value.item() for tag, value in metrics.items()}
        broken = [f"{tag} ({value})" for tag, value in values.items() if not math.isfinite(value)]
        broken += [f"parameter {name}" for name, p in self.agent.named_parameters() if not p.isfinite().all()]
        if broken:
            good = self.dir / "checkpoint.pt"
            remedy = f"the last good state is {good}" if good.exists() else "there is no checkpoint yet"
            raise SystemExit(f"stopped at update {self.step}: {broken[0]} is not finite; {remedy}")
        return values

    def print_progress(self, values):
        done, elapsed = self.step - self.start_step, time.time() - self.start
        speed = done / self.timed
        if self.phase == "policy":
            self.writer.add_scalar("charts/updates_per_sec", speed, sum(self.steps.values()))
            self.writer.add_scalar("charts/wall_clock_s", time.time() - self.born, sum(self.steps.values()))
        eta = dc.duration(elapsed / done * (self.total - self.step))
        share = f"{self.phase} {self.step:>7}/{self.total} {100 * self.step // self.total:>3}%"
        cells = "  ".join(f"{tag.split('/')[1]} {values[tag]:.3g}" for tag in CONSOLE_TAGS if tag in values)
        print(f"[{share}] {speed:.1f} upd/s  eta {eta}  {cells}", flush=True)

    def finish(self):
        """-> dict: the last evaluation, run_dir, step, updates_per_sec, wall_clock_s; also in result.json."""
        args, agent, data = self.args, self.agent, self.data
        if args.eval_only:
            results = evaluate_all(agent, data, args, dc.PROTOCOLS)
            print(f"{self.dir} after {self.step} updates, in full in eval.json\n  " + eval_line(results))
            write_json(self.dir / "eval.json", {"step": self.step} | results)
            return results | {"run_dir": str(self.dir)}
        if self.finished:
            print(f"{self.dir} is finished after {self.step} updates; --total-updates continues it further")
            return json.loads((self.dir / "result.json").read_text())
        if self.stopping:
            self.save()
            script = Path(sys.argv[0]).name
            where = f"{self.step} updates ({self.phase})"
            print(f"interrupted after {where}; continue with: python {script} --resume {self.dir}")
            raise SystemExit(130)
        if not self.results:  # the run was cut off between the last checkpoint and result.json
            self.results = evaluate_all(agent, data, args, dc.PROTOCOLS)
        z, labels = dc.label_contexts(data, partial(embed, agent))
        self.writer.add_embedding(z, metadata=labels, global_step=sum(self.steps.values()), tag="z")
        speed = (self.step - self.start_step) / self.timed if self.timed else 0.0
        self.results |= {"run_dir": str(self.dir), "step": self.step}
        self.results |= {"updates_per_sec": speed, "wall_clock_s": time.time() - self.born}
        write_json(self.dir / "result.json", self.results)
        return self.results


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> what Run.finish returns."""
    if args.eval_only and not args.resume:
        raise SystemExit("--eval-only needs --resume RUN_DIR")
    args, device = resolve(args), dc.resolve_device(args.device)
    data = dc.load_dataset(args.env, args.dataset, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(data.obs_dim, data.act_dim, data.ctx_dim, args).to(device)
    agent.make_optimizer(args)
    step_fn = torch.compile(update) if args.compile else update
    tasks = torch.as_tensor(data.train_ids, device=device)
    draws = 1 if agent.fits_behavior else args.dual_iters
    with Run(args, data, agent, generator) as run:
        while run.going():
            task_ids = tasks[torch.randint(len(tasks), (args.meta_batch,), device=device, generator=generator)]
            context = data.sample_episode(task_ids, args.context_size, generator)[..., :-1]
            batches = [data.unpack(data.sample(task_ids, args.batch_size, generator)) for _ in range(draws)]
            anneal(agent.opts[:1], args.lr, run.step / args.total_updates)
            run.advance(step_fn(agent, task_ids, context, batches, args))
        return run.finish()


# ---- main -------------------------------------------------------------------


def main(arguments=None):
    """Command line (list of str, by default the process's own); with --resume the stored arguments are the defaults."""
    cli = partial(tyro.cli, Args, description=__doc__.split("\n\n")[0], args=arguments)
    args = cli()
    train(cli(default=stored_args(args.resume)) if args.resume else args)


if __name__ == "__main__":
    main()
