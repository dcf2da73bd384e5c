"""Data sharing in multi-task offline RL: which recorded data of other tasks help a task, and with which reward.

UDS (Yu et al., ICML 2022, https://arxiv.org/abs/2202.01741) gives data without a reward the least reward. CDS (Yu et
al., NeurIPS 2021, https://arxiv.org/abs/2109.08128) knows the reward function of every task, and shares what a
conservative critic values. No official code was found. Tasks are known here: policy and critic see the true parameters.
Symbols: M tasks, B transitions of each: first own ones with their recorded reward, then shared ones.
  z [M, z_dim] standardized task parameters      w [M, B] weight of a transition, 1 for own ones
  Q [2, M, B] twin critics of (s, a, z)          pi policy, a tanh-Gaussian of (s, z)
  labelled: the best (or --labelled worst) --labelled-episodes of each task; shared: any other of all training tasks
One update; --sharing chooses reward and weight of the shared transitions:
  1 reward   all, cds: the target task's, recomputed;  uds, cds-uds: the least one of the labelled data;  none: no row
  2 weight   none, all, uds: 1;  cds, cds-uds: delta = min Q(s, a, z) - percentile of min Q over own transitions,
             w = sigmoid(delta / mean |delta|), or 1 where delta >= 0 (--gate hard)
  3 critic   mean w (Q - y)^2 + cql_weight mean w gap,  y = r + gamma min of the target Q at the next action,
             gap = log sum over actions a' of exp(Q(s, a') - log q(a')) - Q(s, a)       CQL(H); q drew a'
  4 policy   mean w (entropy_weight log pi(a | s) - min Q(s, a)),  a from pi
Differences from the papers, tagged in the code:
  D1  the least reward is the labelled data's 1 % quantile, not 0: --unlabelled-reward zero (UDS; the same if r >= 0)
  D2  delta is taken with the target critics, and divided by the batch's mean |delta| (CDS: running mean of delta)
  D3  half of the rows are shared ones, of uniformly drawn tasks: --shared-fraction 0.5
  D4  CQL(H) has the form of its code; the entropy's weight is fixed; --proposals 2 (CQL: adapted; 10)
  D5  sizes: width 64, 400 updates (CQL: 256; 1,000,000); layer norm in class MLP; the learning rate falls to 0
Closest to the papers: --width 256 --proposals 10 --lr 3e-4 --tau 0.005 --no-lr-decay. No flag reaches D2, layer norm.
Families: those whose reward follows from the observations, so that relabelling is exact: point- and sparse-point-robot.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "data_sharing"  # name of the experiment: the folder between env and seed in the run directory
    seed: int = 0  # seed of initialization and batches (tasks and data are fixed by the dataset file)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    total_updates: int = 400  # length of the training [updates of the policy]
    log_every: int = 100  # updates between two log lines [gradient steps]
    eval_every: int = 200  # updates between two evaluations [gradient steps]
    save_every: int = 200  # updates between two checkpoints [gradient steps]
    run_dir: str = "runs"  # parent of all run directories: {run_dir}/{env}/{exp_name}/seed{seed}-{time}
    resume: str | None = None  # run directory to continue, with the arguments stored there
    eval_only: bool = False  # with --resume: evaluate its checkpoint with all protocols and stop
    # data and evaluation
    env: dc.EnvName = "point-robot"  # task family
    dataset: str | None = None  # dataset file; by default datasets/{env}.npz beside this script
    eval_episodes: int = 1  # episodes per task in an evaluation during training
    final_episodes: int = 1  # episodes per task in the last evaluation, and with --eval-only
    meta_batch: int = 8  # tasks per update, drawn with replacement [tasks]
    batch_size: int = 32  # transitions per task and update, own and shared ones together [transitions]
    # sharing
    sharing: Literal["none", "all", "uds", "cds", "cds-uds"] = "cds-uds"  # see the head of this file
    labelled_episodes: int = 5  # episodes per task that have a reward [episodes]
    labelled: Literal["best", "worst"] = "best"  # which episodes of a task these are
    shared_fraction: float = 0.5  # share of the batch that is shared data; 0 with --sharing none
    unlabelled_reward: Literal["least", "zero"] = "least"  # reward of unlabelled data in uds and cds-uds
    gate: Literal["soft", "hard"] = "soft"  # weight of shared data in cds and cds-uds: sigmoid, or 0 and 1
    percentile: float = 90.0  # of the own values that shared data are compared with
    percentile_size: int = 64  # own transitions per task that it is computed on [transitions]
    # method
    gamma: float | None = None  # discount
    reward_scale: float | None = None  # factor on the rewards; by default labelled rewards get a deviation of 1
    lr: float = 3e-3  # learning rate of all networks
    lr_decay: bool = True  # let it fall linearly to 0 in the second half of the training
    tau: float = 0.02  # rate at which target networks follow
    width: int = 64  # hidden units of the networks  [ours: D5]
    cql_weight: float = 1.0  # weight of the conservative penalty
    proposals: int = 2  # actions from each of three distributions in the penalty [actions]
    entropy_weight: float = 0.1  # weight of the policy's entropy in its loss


ENV_DEFAULTS = {"": dict(gamma=0.97), "point": dict(gamma=0.9)}

# ---- data -------------------------------------------------------------------


class Pool:
    """The labelled transitions of each training task, and what can be shared with it."""

    def __init__(self, data, args):
        family, device = data.family, data.device
        if not family.simulated or family.dynamics_vary in (True, None):
            raise SystemExit(f"--env {args.env}: data can only be shared where the tasks differ in their reward alone")
        most = data.min_episodes - 1
        if args.labelled_episodes > most:
            raise SystemExit(f"--labelled-episodes {args.labelled_episodes}: at most {most}; the rest is unlabelled")
        if args.shared_fraction >= 1 or args.percentile > 100:
            raise SystemExit("--shared-fraction must be below 1, --percentile at most 100")
        self.data, self.sharing = data, args.sharing
        self.size = 0 if args.sharing == "none" else round(args.shared_fraction * args.batch_size)  # of a shared batch
        self.rows = data.episodes.view(-1, data.ctx_dim + 1)
        self.params = torch.as_tensor(data.task_params, dtype=torch.float32, device=device)  # [T, P]
        train = self.params[data.train_tasks]
        self.z = (self.params - train.mean(0)) / dc.nonzero_std(train.std(0, correction=0), train.abs().amax(0))

        # what the reward depends on, of every transition
        obs, self.act, rew, next_obs, _ = data.unpack(self.rows)
        raw = [x * data.obs_std + data.obs_mean for x in (obs, next_obs)]
        self.outcome = family.outcome(*raw)  # [T * N * H, k]
        task = torch.arange(len(self.rows), device=device) // data.valid.shape[1]
        recorded = data.recorded(data.lengths)  # [T, N, H]
        again = self.reward(torch.arange(len(self.rows), device=device), task)
        error = (again - rew)[recorded.flatten()].abs().max().item()
        if error > 1e-3:
            what = f"the rewards do not follow from its observations (error {error:.2g}), so data cannot be relabelled"
            raise SystemExit(f"--env {args.env}: {what}; take point-robot or sparse-point-robot")

        # row i: numbers of task i's transitions, the labelled ones first; the first counts[i] are real
        returns = torch.as_tensor(data.episode_returns, device=device)  # [T, N]
        rank = (returns if args.labelled == "best" else -returns).where(data.lengths > 0, -math.inf)
        chosen = rank.argsort(dim=1, descending=True, stable=True)[:, : args.labelled_episodes]
        self.counts = data.lengths.gather(1, chosen).sum(1)  # [T] labelled transitions
        rank = rank[..., None].where(recorded, -math.inf).flatten(1)
        self.order = rank.argsort(dim=1, descending=True, stable=True)
        self.order += torch.arange(len(rank), device=device)[:, None] * rank.shape[1]  # through all tasks
        own = torch.cat([rew[self.order[i, : self.counts[i]]] for i in data.train_tasks])
        self.least = 0.0 if args.unlabelled_reward == "zero" else own.quantile(0.01).item()  # [ours: D1]
        self.std = float(dc.nonzero_std(own.std(), own.abs().max()))

    def reward(self, index, task_ids):
        """Reward of transitions `index` for tasks of the same shape -> the same shape."""
        return self.data.family.reward(self.outcome[index], self.act[index], self.params[task_ids])

    def own(self, task_ids, size, generator):
        """Labelled transitions of tasks [M], uniform with replacement -> Batch [M, size, ..]."""
        pick = torch.rand(len(task_ids), size, device=self.data.device, generator=generator)
        pick = (pick * self.counts[task_ids, None]).long()
        return self.data.unpack(self.rows[self.order[task_ids[:, None], pick]])

    def shared(self, task_ids, generator):
        """Transitions of uniformly drawn tasks, except tasks' [M] own labelled ones, with the reward that --sharing
        gives them -> Batch [M, self.size, ..]."""
        data, shape = self.data, (len(task_ids), self.size)
        of = data.sample_tasks(self.size * len(task_ids), generator).view(shape)  # [ours: D3]
        skip = self.counts[of] * (of == task_ids[:, None])
        pick = torch.rand(shape, device=data.device, generator=generator)
        index = self.order[of, skip + (pick * (data.counts[of] - skip)).long()]
        batch = data.unpack(self.rows[index])
        if self.sharing in ("uds", "cds-uds"):
            return batch._replace(rew=torch.full_like(batch.rew, self.least))
        return batch._replace(rew=self.reward(index, task_ids[:, None].expand(shape)))


# ---- networks ---------------------------------------------------------------


# SHARED: identical in focal.py and the scripts with its actor-critic
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


# SHARED: identical in focal.py and the scripts with its actor-critic
class Twin(nn.Module):
    """Two MLPs with the same sizes and different initial weights."""

    def __init__(self, *sizes):
        super().__init__()
        self.nets = nn.ModuleList([MLP(*sizes), MLP(*sizes)])

    def forward(self, x, z):
        """x [M, B, in_dim], z [M, z_dim] -> [2, M, B, out_dim]."""
        return torch.stack([net(x, z) for net in self.nets])


# ---- losses -----------------------------------------------------------------


class Policy(NamedTuple):
    """A policy's normal distribution before the tanh that bounds its actions."""

    mean: torch.Tensor  # [.., act_dim]
    log_std: torch.Tensor  # [.., act_dim]

    def sample(self, count):
        """-> count actions each [.., count, act_dim] in (-1, 1), log of their density [.., count]."""
        mean, log_std = self.mean[..., None, :], self.log_std[..., None, :]
        noise = torch.randn_like(mean.expand(*mean.shape[:-2], count, -1))
        pre = mean + log_std.exp() * noise
        normal = -0.5 * noise.pow(2) - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - pre - nn.functional.softplus(-2 * pre))  # log of 1 - tanh(pre)^2
        return torch.tanh(pre), (normal - log_slope).sum(-1)


def share_weight(delta, gate):
    """How much more a shared transition is worth than the percentile of the own ones [M, B] -> its weight [M, B]."""
    if gate == "hard":
        return (delta >= 0).to(delta)
    return torch.sigmoid(delta / delta.abs().mean().clamp(min=1e-3))  # [ours: D2]


def conservative_gap(q, log_density, q_data):
    """Q of proposed actions [2, M, B, K] with the log of the density that drew them [M, B, K], Q of the data [2, M, B]
    -> how far a soft maximum over all actions lies above the data [2, M, B]."""
    return (q - log_density).logsumexp(-1) - q_data  # [ours: D4]


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Networks, target networks and optimizers."""

    def __init__(self, data, z_dim, args):
        super().__init__()
        self.critic = Twin(data.obs_dim + data.act_dim, z_dim, args.width, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = MLP(data.obs_dim, z_dim, args.width, 2 * data.act_dim)
        self.opt = torch.optim.Adam([*self.critic.parameters(), *self.actor.parameters()], args.lr, fused=True)

    def q(self, obs, act, z, target=False):
        """obs [M, B, obs_dim], act [M, B, act_dim], z [M, z_dim] -> Q of both critics, or of the targets [2, M, B]."""
        critic = self.critic_target if target else self.critic
        return critic(torch.cat([obs, act], -1), z)[..., 0]

    def policy(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Policy [M, B, ..]."""
        mean, log_std = self.actor(obs, z).chunk(2, -1)
        return Policy(mean, log_std.clamp(-5, 2))


# ---- update -----------------------------------------------------------------


def update(agent, z, own, shared, reference, args):
    """One step of every network, from the parameters before the step. z [M, z_dim]; own, shared: Batches [M, B', ..],
    [M, B'', ..]; reference: own transitions for the percentile [M, K, ..] -> dict of detached 0-d tensors."""
    agent.opt.zero_grad()

    # 2 weight (1, the reward, came with the batch)
    weight = torch.ones_like(shared.rew)
    if args.sharing in ("cds", "cds-uds"):
        with torch.no_grad():
            values = agent.q(reference.obs, reference.act, z, target=True).amin(0)  # [M, K]
            threshold = values.quantile(args.percentile / 100, 1, keepdim=True)  # [M, 1]
            delta = agent.q(shared.obs, shared.act, z, target=True).amin(0) - threshold
        weight = share_weight(delta, args.gate)
    split = own.rew.shape[1]
    weight = torch.cat([torch.ones_like(own.rew), weight], 1)  # [M, B]
    obs, act, rew, next_obs, term = (torch.cat(pair, 1) for pair in zip(own, shared))

    # 3 critic: means over all rows, so that a small weight counts for less
    size, count = rew.shape[1], args.proposals
    with torch.no_grad():
        here, log_here = agent.policy(obs, z).sample(count)  # [M, B, N, act_dim], [M, B, N]
        there, log_there = agent.policy(next_obs, z).sample(count)
        anywhere = 2 * torch.rand_like(here) - 1
        log_anywhere = torch.full_like(log_here, -math.log(2) * act.shape[-1])
        next_q = agent.q(next_obs, there[:, :, 0], z, target=True).amin(0)
        q_target = args.reward_scale * rew + args.gamma * (1 - term) * next_q  # [M, B]
    proposed = torch.cat([anywhere, here, there], 2)  # [M, B, 3 N, act_dim]
    acts = torch.cat([act[:, :, None], proposed], 2).flatten(1, 2)
    q = agent.q(obs.repeat_interleave(1 + 3 * count, 1), acts, z).unflatten(2, (size, 1 + 3 * count))
    q_data, q_proposed = q[..., 0], q[..., 1:]
    gap = conservative_gap(q_proposed, torch.cat([log_anywhere, log_here, log_there], 2), q_data)
    q_loss = (weight * (q_data - q_target).pow(2)).mean((1, 2)).sum()
    gap_loss = args.cql_weight * (weight * gap).mean((1, 2)).sum()
    (q_loss + gap_loss).backward()

    # 4 policy
    pi_act, log_pi = (x[:, :, 0] for x in agent.policy(obs, z).sample(1))
    pi_q = agent.q(obs, pi_act, z).amin(0)
    actor_loss = (weight * (args.entropy_weight * log_pi - pi_q)).mean()
    actor_loss.backward(inputs=list(agent.actor.parameters()))

    # steps of the optimizer and of the target networks
    agent.opt.step()
    with torch.no_grad():
        for target, parameter in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            target.lerp_(parameter, args.tau)

    # metrics
    metrics = {
        "losses/q": q_loss,
        "losses/gap": gap_loss,
        "losses/actor": actor_loss,
        "stats/q_mean": pi_q.mean(),
        "stats/entropy": -log_pi.mean(),
        "stats/gap_own": gap[..., :split].mean(),
    }
    if size > split:
        metrics |= {"stats/gap_shared": gap[..., split:].mean(), "stats/weight": weight[:, split:].mean()}
    return {tag: value.detach() for tag, value in metrics.items()}


# ---- evaluation -------------------------------------------------------------


def evaluate_all(agent, pool, episodes):
    """Returns of the policy's mean action with known tasks, "train": all training tasks, "iid": the unseen test tasks
    -> dict tag -> float."""
    data, results = pool.data, {}
    for name, ids in (("train", data.train_ids), ("iid", data.test_ids)):
        tasks = ids.repeat(episodes)
        z = pool.z[torch.as_tensor(tasks, device=data.device)]
        env = dc.TaskEnv(data.family, data.task_params, tasks)

        def policy(obs, rew):
            return torch.tanh(agent.policy(obs[:, None], z).mean[:, 0])

        seeds = dc.reset_seeds(tasks, np.tile(np.arange(episodes), len(ids)), 0)
        played = dc.rollout(env, policy, seeds, data.device, data.standardize)
        env.close()
        results |= dc.summary(data, name, tasks, dc.returns_of(data, tasks, played))
    return results


# ---- training ---------------------------------------------------------------


def train(args):
    """Train and evaluate -> dict of the last evaluation, see `dc.Run.finish`."""
    args = dc.resolve(args, ENV_DEFAULTS)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    pool = Pool(data, args)
    if args.reward_scale is None:
        args.reward_scale = 1 / pool.std
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, pool.z.shape[1], args).to(data.device)
    with dc.Run(args, data, agent, generator) as run:
        for step in run.updates():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            own = pool.own(task_ids, args.batch_size - pool.size, generator)
            shared = pool.shared(task_ids, generator)
            reference = pool.own(task_ids, args.percentile_size, generator)
            dc.set_lr(agent.opt, args.lr * run.decay)
            metrics = update(agent, pool.z[task_ids], own, shared, reference, args)
            if step % args.log_every == 0:
                run.log(step, metrics)
            if step % args.eval_every == 0 and step < args.total_updates:
                run.log(step, evaluate_all(agent, pool, args.eval_episodes))
        return run.finish(evaluate_all(agent, pool, args.final_episodes))


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
