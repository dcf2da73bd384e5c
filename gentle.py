"""GENTLE: generalizable task representation learning for offline meta-reinforcement learning with data limitations.

Zhou, Gao, Zhang, Yu, AAAI 2024, https://arxiv.org/abs/2312.15909; only the abstract was at hand. The script follows
the official code, LAMDA-RL/GENTLE on GitHub. A task auto-encoder reconstructs r (and s') from z, s, a. Its contexts are
mostly pseudo-transitions: models of all tasks label the same (s, a), so that (s, a) alone cannot tell the task.
Symbols: U training tasks, M of a batch, K transitions of a context, E models of each task, y = r or (r, s' - s).
  z [M, z_dim] task vector in (-1, 1), the mean over the context of an embedding of each (s, a, y)
  models [U, E, B, y_dim] of (s, a)            pseudo [U, (1 + N) P, ..] stored pseudo-transitions of each task
  Q [2, M, B] twin critics of (s, a, z)        pi, pi_beta policy, behavior policy, tanh-Gaussians of (s, z)
One update, 1 in a phase of its own:
  1 models   squared error of y trains each task's E models on its own data
  2 pseudo   every --rebuild-every updates: P states of each task, the policy's actions with the z of these rows;
             the mean of the E models of this task, and of N others, labels the same (s, a)
  3 encoder  context = 95 % pseudo, 5 % real; z = encoder(context); (decoder(s, a, z) - y)^2 trains both
  4 critic   y = n_step(rewards, min of the target Q at the next action);  (Q - y)^2 trains Q
  5 policy   maximum likelihood trains pi_beta;  kl_coef KL(pi || pi_beta) - min Q trains pi;  kl_coef is adapted
Differences from the official code, tagged in the code. D are GENTLE's, B the shared actor-critic's:
  D1  --ensemble 3 models with ReLU, a fixed number of updates (code: 7 models with Swish, early stopping)
  D2  every task labels states of exactly N others; actions of pi (code: N random others; actions of a target policy)
  D3  without a context z is the mean over the training tasks (code: 0, for which no network was trained)
  D4  y is in units of its standard deviation, r weighs as much as all of s' (code: raw, as one dimension of s')
  D5  sizes: 32 transitions per task, context 64, 8,000 updates, encoder 2 x 200 (code: 256; 256; 200,000; 3 x 256)
  D6  the shared actor-critic (code: TD3 + BC, whose policy samples its actions)
  B1  pi_beta is fitted to the best episodes: --bc-top-fraction 0.25 --bc-weight-decay 0.3 (paper: 1 and 0)
  B2  the KL is in closed form, before the tanh (paper: a dual critic); pi = pi_beta + a residual (paper: a full policy)
  B3  targets: --n-step 5 rewards (point families: 1), then the mean action's value, --target-noise 0 (paper: 1 and 1)
  B4  layer norm in class MLP; --lr-decay: learning rates fall to 0 in the second half (paper: neither)
  B5  standardized observations, clamped log_std; a training context is of one episode; time limits never terminate
Closest to the paper, ant-dir: --gamma 0.99 --reward-scale 5 --n-step 1 --target-noise 1 --tau 0.005 --bc-top-fraction 1
  --bc-weight-decay 0 --batch-size 256 --context-size 256 --lr 3e-4 --no-lr-decay --z-dim 5 --encoder-width 256
  --ensemble 7 --total-updates 200000. No flag reaches D2 to D4, D6, B2, B5, layer norm.
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
    exp_name: str = "gentle"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 8_000  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 1_000  # updates between two evaluations [gradient steps]
    save_every: int = 1_000  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation  [ours: D5]
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
    lr: float = 1.2e-3  # learning rate of all networks except the task models
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of each phase
    n_step: int | None = None  # steps of the data's rewards in a target [steps]
    target_noise: float = 0.0  # noise of the target's action: 1 = a sample of the policy, 0 = its mean
    tau: float = 0.02  # rate at which target networks follow
    width: int = 256  # hidden units of policies and critics
    encoder_width: int = 200  # hidden units of the encoder
    z_dim: int | None = None  # size of the task vector
    decoder_width: int = 64  # hidden units of the decoder
    pseudo_share: float = 0.95  # share of a context that pseudo-transitions have; 0 = real transitions alone
    label_tasks: int = 4  # tasks whose models label a state: its own and N = 3 others; 1 = its own alone
    pseudo_states: int = 640  # states of each task that a rebuild labels (P) [transitions]
    rebuild_every: int | None = None  # updates between two rebuilds of the pseudo-transitions
    ensemble: int = 3  # models of each task (E)
    model_width: int = 128  # hidden units of the task models
    model_updates: int | None = None  # updates of the task models [gradient steps]
    model_batch_size: int = 64  # transitions per model and update [transitions]
    model_lr: float = 3e-3  # learning rate of the task models
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
        rebuild_every=400,
        model_updates=1_000,
        bc_top_fraction=0.25,
        kl_coef=1.0,
        kl_coef_lr=1e-3,
        kl_target=0.2,
    ),
    "ant-dir": dict(reward_scale=0.5),
    "cheetah-vel": dict(reward_scale=0.5),
    "point": dict(
        gamma=0.9,
        reward_scale=5.0,
        n_step=1,
        z_dim=5,
        rebuild_every=50,
        model_updates=500,
        kl_coef=1.5,
        kl_coef_lr=0.0,
    ),
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
    """Task vector z(context): the mean of a bounded embedding of each transition."""

    def __init__(self, row_dim, z_dim, width):
        super().__init__()
        self.row_dim = row_dim
        layers = [nn.Linear(row_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, z_dim), nn.Tanh())

    def forward(self, context, mask):
        """context [M, K, row_dim or more], mask [M, K] 1 = real -> z [M, z_dim] in (-1, 1); 0 without any transition.
        It sees s' only where the dynamics vary."""
        each = self.net(context[..., : self.row_dim]) * mask[..., None]  # [M, K, z_dim]
        return each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class TaskModels(nn.Module):
    """E networks for each of U tasks, two hidden layers each, all in one batch of matrix products."""

    def __init__(self, tasks, ensemble, in_dim, width, out_dim):
        super().__init__()
        sizes = [(in_dim, width), (width, width), (width, out_dim)]
        weights = [torch.empty(tasks, ensemble, *size).uniform_(-1, 1) / size[0] ** 0.5 for size in sizes]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList([torch.zeros(tasks, ensemble, 1, size[1]) for size in sizes])

    def forward(self, x):
        """x [U, E or 1, B, in_dim] -> [U, E, B, out_dim]."""
        *hidden, (weight, bias) = zip(self.weights, self.biases)
        for w, b in hidden:
            x = (x @ w + b).relu()  # [ours: D1] Swish extrapolates worse to the states of other tasks
        return x @ weight + bias


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


def squared_error(predicted, y):
    """Both [.., y_dim] -> scalar: mean squared error of the reward, plus the mean over the other dimensions, if any."""
    of_reward, of_state = (predicted - y).pow(2).tensor_split([1], -1)
    return of_reward.mean() + (of_state.mean() if of_state.numel() else 0.0)  # [ours: D4]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, targets, pseudo-transitions, the weight of the KL, and the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, z_dim, width = data.obs_dim, data.act_dim, args.z_dim, args.width
        tasks, y_dim = len(data.train_ids), 1 if data.family.dynamics_vary is False else 1 + obs_dim
        self.columns = [obs_dim, act_dim, y_dim]  # of a row that the encoder sees: obs, act, rew, and next_obs if any
        self.encoder = Encoder(sum(self.columns), z_dim, args.encoder_width)
        self.decoder = MLP(obs_dim + act_dim, z_dim, args.decoder_width, y_dim)
        self.models = TaskModels(tasks, args.ensemble, obs_dim + act_dim, args.model_width, y_dim)
        self.critic = Twin(obs_dim + act_dim, z_dim, width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = MLP(obs_dim, z_dim, width, 2 * act_dim)
        self.residual = MLP(obs_dim, z_dim, width, 2 * act_dim)
        for net in (self.behavior, self.residual):  # they start near 0
            for parameter in net.net[-1].parameters():
                nn.init.uniform_(parameter, -1e-3, 1e-3)
        nets = (self.encoder, self.decoder, self.critic, self.residual)
        self.opt = torch.optim.Adam([p for net in nets for p in net.parameters()], args.lr, fused=True)
        self.behavior_opt = torch.optim.AdamW(
            self.behavior.parameters(), args.lr, weight_decay=args.bc_weight_decay, fused=True
        )
        self.model_opt = torch.optim.Adam(self.models.parameters(), args.model_lr, fused=True)
        self.register_buffer("kl_coef", torch.tensor(float(args.kl_coef)))
        self.register_buffer("y_std", torch.ones(y_dim))  # set before the training
        stored = min(args.label_tasks, tasks) * args.pseudo_states
        self.register_buffer("pseudo", torch.zeros(tasks, stored, sum(self.columns)))
        # z without a context, set at every evaluation
        self.register_buffer("z_mean", torch.zeros(z_dim), persistent=False)

    def split(self, rows):
        """rows [.., row_dim or more] -> obs [.., obs_dim], (obs, act) [.., obs_dim + act_dim], y [.., y_dim]."""
        obs, act, y = rows[..., : sum(self.columns)].split(self.columns, -1)
        return obs, torch.cat([obs, act], -1), (y - self.before(obs)) / self.y_std  # [ours: D4]

    def before(self, obs):
        """obs [.., obs_dim] -> what y counts from [.., y_dim]: 0 for the reward, obs for next_obs, if any."""
        return F.pad(obs[..., : len(self.y_std) - 1], (1, 0))

    def q(self, obs, act, z):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both critics [2, M, B]."""
        return self.critic(torch.cat([obs, act], -1), z)[..., 0]

    # SHARED: identical in all scripts with this actor-critic
    def behavior_policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussian of pi_beta."""
        mean, log_std = self.behavior(obs, z).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-3, 1))  # [ours: B5]

    # SHARED: identical in flora.py, unicorn.py, corro.py, csro.py, er_trl.py, focal_pp.py, idaq.py
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


# ---- task models and pseudo-transitions --------------------------------------


def update_models(agent, rows):
    """One step of all task models: rows [U, E, B, ctx_dim], other ones of a task for each of its models -> metrics."""
    _, x, y = agent.split(rows)
    loss = squared_error(agent.models(x), y)  # 1 - loss is the share of explained variance
    agent.model_opt.zero_grad()
    loss.backward()
    agent.model_opt.step()
    return {"losses/models": loss.detach()}


@torch.no_grad()
def rebuild(agent, rows, generator):
    """Replace all pseudo-transitions: rows [U, P, ctx_dim] of all training tasks."""
    obs, _, _ = agent.split(rows)
    act = agent.act(obs, agent.encoder(rows, torch.ones_like(rows[..., 0])))
    # [ours: D2] on a circle in random order, a task labels its own states and the states of the next N tasks
    tasks, labels = len(rows), agent.pseudo.shape[1] // rows.shape[1]
    circle = torch.randperm(tasks, generator=generator, device=rows.device)
    source = circle[(circle.argsort()[:, None] + torch.arange(labels, device=rows.device)) % tasks]  # [U, 1 + N]
    obs, act = obs[source].flatten(1, 2), act[source].flatten(1, 2)  # the action keeps the z of its state's task
    y = agent.models(torch.cat([obs, act], -1)[:, None]).mean(1)  # of the ensemble
    agent.pseudo.copy_(torch.cat([obs, act, y * agent.y_std + agent.before(obs)], -1))


# ---- update -----------------------------------------------------------------


def update(agent, context, segment, bc_batch, args):
    """One step of every network except the task models, from the parameters before the step. context [M, K, row_dim];
    segment: Segment [M, B, n, ..], drawn independently of the context; bc_batch: Batch [M, B, ..] from the best
    episodes -> dict of detached 0-d tensors."""
    obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]
    agent.opt.zero_grad()

    # 3 encoder: the reconstruction alone trains it; the decoder sees the mean z, never the embedding of its row
    z = agent.encoder(context, torch.ones_like(context[..., 0]))  # [M, z_dim]
    _, x, y = agent.split(context)
    encoder_loss = squared_error(agent.decoder(x, z), y)
    encoder_loss.backward()
    z = z.detach()

    # 4 critic
    with torch.no_grad():
        next_obs = segment.next_obs[:, :, -1]
        pi, _ = agent.policies(next_obs, z)
        next_act = torch.tanh(pi.sample(args.target_noise))
        next_q = agent.critic_target(torch.cat([next_obs, next_act], -1), z).amin(0)  # [M, B, 1]
        q_target = n_step(args.reward_scale * segment.rew[..., None], next_q, segment)[..., 0]  # [M, B]
    q_loss = (agent.q(obs, act, z) - q_target).pow(2).mean((1, 2)).sum()
    q_loss.backward()

    # 5 behavior policy by maximum likelihood, and the policy, kept close to it  [ours: D6]
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
    _, _, y = agent.split(data.episodes[data.train_tasks][data.recorded(data.lengths[data.train_tasks])])
    agent.y_std.copy_(dc.nonzero_std(y.std(0), abs(y).amax(0)))
    pseudo_size = int(args.pseudo_share * args.context_size)
    with dc.Run(args, data, agent, generator, ("model", "policy")) as run:
        # 1 models
        for step in run.updates("model"):
            rows = data.sample(data.train_tasks, args.ensemble * args.model_batch_size, generator)
            dc.set_lr(agent.model_opt, args.model_lr * run.decay)
            metrics = update_models(agent, rows.unflatten(1, (args.ensemble, -1)))
            if step % args.log_every == 0:
                run.log(step, metrics)
        for step in run.updates("policy"):
            # 2 pseudo
            if (step - 1) % args.rebuild_every == 0:
                rebuild(agent, data.sample(data.train_tasks, args.pseudo_states, generator), generator)
            # places among the training tasks
            labels = torch.randint(len(data.train_tasks), (args.meta_batch,), device=data.device, generator=generator)
            task_ids = data.train_tasks[labels]
            real = data.sample_context(task_ids, args.context_size - pseudo_size, generator)
            shape = args.meta_batch, pseudo_size
            pick = torch.randint(agent.pseudo.shape[1], shape, device=data.device, generator=generator)
            context = torch.cat([agent.pseudo[labels[:, None], pick], real[..., : sum(agent.columns)]], 1)
            segment = data.sample_segments(task_ids, args.batch_size, args.n_step, args.gamma, generator)
            bc_batch = data.sample_batch(task_ids, args.batch_size, generator, args.bc_top_fraction)
            dc.set_lr(agent.opt, args.lr * run.decay)  # [ours: B4]
            dc.set_lr(agent.behavior_opt, args.lr * run.decay)
            metrics = update(agent, context, segment, bc_batch, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, data, args, ("iid", "train"), args.eval_episodes))
        return run.finish(evaluate_all(agent, data, args, dc.PROTOCOLS, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
