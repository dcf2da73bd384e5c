"""MACAW: meta-actor-critic with advantage weighting, offline meta-reinforcement learning by gradient steps.

Mitchell, Rafailov, Peng, Levine, Finn, ICML 2021, arXiv 2008.06043.
There is no task encoder: adapting to a task means one gradient step of a value function, by regression on
Monte-Carlo returns, and then one of a policy, by advantage-weighted regression (AWR). The outer loop moves the
initial parameters so that the adapted ones do well on other transitions of the task. Two additions make one step
tell the tasks apart: layers whose weights are a learned linear function of a latent, and a head of the policy
that predicts the advantage, in the inner loss only.

Deviations from the paper and from the official code:
  D1  As in the official code, advantages and the outer target of the value continue the return by the value of the
      episode's last observation; here not after a termination, which the official code overlooks.
  D2  The inner rows are of one episode, as the contexts of the evaluation; the outer rows are of the task's other
      episodes. Official code: both of the whole buffer, possibly overlapping. Each inner step sees all inner rows.
      --inner-segment restricts the inner rows of the training only; evaluation contexts are those of all methods.
  D3  The advantage head takes relu(h) and the action; the official code clips negative actions too.
  D4  Returns are divided by their spread in the training data, a constant of the dataset.
  D5  The value that continues the outer target blends the generated weights before and after adaptation, once; the
      official code blends the parameters after each step. For one step they differ in the second order of the inner
      rate only.
  D6  --no-weight-transform makes plain layers; the official code's ablation has layers with a learned bias input.
  D7  Larger outer learning rates for a sixtieth of the updates; they fall to 0 in the second half.
  D8  Online fine-tuning moves the weights that adaptation has generated, not the parameters they come from. It starts
      after the first own episode (official: the 25th) and evaluates one episode each time (official: three).

Run:     python macaw.py --env ant-dir
Ablate:  --no-weight-transform | --no-adv-head | --first-order | --no-terminal-bootstrap | --inner-segment start
Paper:   --meta-batch 5 --batch-size 256 --context-size 256 --lr 1e-4 --value-lr 1e-5 --total-updates 500000
"""

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
    exp_name: str = "macaw"
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
    lr: float = 1e-3
    """Adam's learning rate of the policy's initialization, first half of the training; then it falls linearly to 0"""
    value_lr: float = 1e-3
    """the same of the value function's initialization"""
    rate_lr: float = 1e-3
    """the same of the inner learning rates and of the weight of the advantage loss, all before their softplus"""
    inner_lr: float = 1e-3
    """inner learning rates at the start of the training"""
    inner_steps: int = 1
    """gradient steps of the value function, then as many of the policy, that make an adaptation"""
    width: int = 100
    """hidden units of policy and value function, three layers"""
    head_width: int = 32
    """hidden units of the advantage head"""
    latent: int = 100
    """size of the latent that generates a layer's weights"""
    policy_std: float = 0.2
    """standard deviation of the policy"""
    temperature: float = 1.0
    """temperature of the advantage weights"""
    max_weight: float = 20.0
    """largest advantage weight"""
    adv_weight: float = 0.01
    """weight lambda of the advantage loss in the inner loss at the start of the training"""
    tau: float = 0.1
    """share of the adapted value function in the one that continues the outer target (D5)"""
    terminal_bootstrap: bool = True
    """continue returns by the value of the episode's last observation (D1)"""
    weight_transform: bool = True
    """generate the weights of all layers from latents"""
    adv_head: bool = True
    """predict the advantage in the inner loss of the policy"""
    first_order: bool = False
    """hold the inner gradient constant in the outer one"""
    inner_segment: Literal["all", "start", "middle", "end"] = "all"
    """quarter of a task's episodes, in the order of recording, that the inner rows of the training come from (D2)"""
    online_ft: int = 0
    """episodes of online fine-tuning per test task after the last evaluation [episodes]"""
    ft_lr: float = 1e-4
    """Adam's learning rate of the fine-tuning"""
    ft_batch_size: int = 256
    """own transitions per step of the fine-tuning [transitions]"""
    ft_value_steps: int = 100
    """steps of the value function after each of those episodes"""
    ft_policy_steps: int = 200
    """steps of the policy after each of those episodes"""


# what the environments need differently, for arguments left at None
ENV_ARGS = {  # the first entry whose key is part of the family's name
    "point": dict(gamma=0.9),
    "": dict(gamma=0.99),
}

MAY_BE_ZERO = {"seed", "adv_weight", "online_ft", "tau"}
RANGES = {"gamma": (0, 1), "tau": (0, 1)}
# not of the training: may differ when a run is resumed
EVAL_ONLY = {"online_ft", "ft_lr", "ft_batch_size", "ft_value_steps", "ft_policy_steps"}

# ---- networks ---------------------------------------------------------------


class Net(nn.Module):
    """Layers whose weights are generated: layer l has w = U z + u, both the matrix [in, out] and the bias [out] in one
    vector of P_l = in * out + out numbers, with a latent z [latent], a map U [P_l, latent] and an offset u [P_l], all
    three learned. With latent = 0, w = u: plain layers. The functions take w per task: list over l of [M, P_l].
    `rho` [layers, 3]: the inner learning rates of z, U and u of each layer before their softplus."""

    def __init__(self, shapes, latent, rate):
        super().__init__()
        self.shapes = shapes  # [(in, out), ..]
        self.z, self.map, self.offset = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for size, out in shapes:
            count, bound = size * out + out, 1 / math.sqrt(latent or size)
            self.z.append(torch.randn(latent) / out)
            self.map.append(torch.empty(count, latent).uniform_(-bound, bound))
            self.offset.append(torch.empty(count).uniform_(-bound, bound))
        self.rho = nn.Parameter(torch.full((len(shapes), 3), math.log(rate)))

    def layer(self, weights, index, x):
        """weights list of [M, P_l], x [M, B, in] -> [M, B, out] of layer `index`."""
        size, out = self.shapes[index]
        matrix, bias = weights[index].split([size * out, out], 1)
        return torch.baddbmm(bias[:, None], x, matrix.unflatten(1, (size, out)))

    def forward(self, weights, x):
        """x [M, B, in] -> output of the first four layers, three of them hidden, [M, B, out], and what the fourth takes
        [M, B, width]; further layers are the head's."""
        for index in range(3):
            x = self.layer(weights, index, x).relu()
        return self.layer(weights, 3, x), x

    def generate(self, tasks):
        """-> the weights before any adaptation, once per task: list of [M, P_l]."""
        layers = zip(self.z, self.map, self.offset)
        return [torch.addmv(offset, matrix, z).expand(tasks, -1) for z, matrix, offset in layers]  # w = U z + u

    def descend(self, loss, tasks, steps, first_order=False):
        """`steps` of gradient descent on z, U and u of all layers, for every task apart; loss(weights) -> [M].
        -> adapted weights, list of [M, P_l], and the loss before [M].

        With G_j [P_l] the gradient with respect to w at step j, and a, b, c the rates, the steps are
            z_j+1 = z_j - a U_j^T G_j,   U_j+1 = U_j - b G_j z_j^T,   u_j+1 = u_j - c G_j.
        U changes by one outer product per step and is only ever multiplied by a vector, so keeping the pairs
        (G_j, z_j) of a task stands for its copy of U: the result is exact, for any number of steps."""
        hold = torch.Tensor.detach if first_order else lambda x: x  # of first order: G is a constant outside
        weights, rates, before = self.generate(tasks), F.softplus(self.rho), None
        latents, past = [z.expand(tasks, -1) for z in self.z], [[] for _ in self.shapes]

        def total(weights):  # the tasks are independent: the gradient of their sum is each one's own
            each = loss(weights)
            return each.sum(), each

        for _ in range(steps):
            grads, (_, each) = torch.func.grad_and_value(total, has_aux=True)(weights)
            before = each.detach() if before is None else before
            weights = []
            for index, (grad, (a, b, c), matrix, offset) in enumerate(zip(grads, rates, self.map, self.offset)):
                grad, z = hold(grad), latents[index]
                slope = grad @ matrix  # [M, latent], U_0^T G_j
                for old_grad, old_z in past[index]:
                    slope = slope - b * (old_grad * grad).sum(1, keepdim=True) * old_z
                past[index].append((grad, hold(z)))
                latents[index] = z = z - a * hold(slope)
                weight = F.linear(z, matrix, offset)  # [M, P_l], U_0 z + u_0
                for old_grad, old_z in past[index]:
                    weight = weight - (b * (old_z * z).sum(1, keepdim=True) + c) * old_grad
                weights.append(weight)  # [inner step] w' = U' z' + u' of the adapted z', U' and u'
        return weights, before


# ---- losses -----------------------------------------------------------------


def monte_carlo(rew, mask, ended, gamma):
    """rew [.., H], mask [.., H] 1 = real, ended [..] 1 = the task itself ended -> discounted return to the end of the
    episode [.., H], and the discount [.., H] with which the value of its last observation continues that return."""
    ret, tail = torch.zeros_like(rew), torch.zeros_like(rew)
    ahead, discount = torch.zeros_like(ended), 1 - ended
    for t in reversed(range(rew.shape[-1])):
        ahead = rew[..., t] * mask[..., t] + gamma * ahead
        discount = discount * (1 - (1 - gamma) * mask[..., t])
        ret[..., t], tail[..., t] = ahead, discount
    return ret, tail  # [code: D1] the discount is 0 in a whole episode that the task ended


def masked_mean(x, mask):
    """x [M, B], mask [M, B] -> mean over the real rows [M]."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def awr_weights(adv, mask, temperature=1.0, max_weight=20.0):
    """adv [M, B], mask [M, B] -> weights [M, B] of the regression on the actions, with no gradient: exponential of
    the advantage, standardized over the task's rows, and capped from above."""
    mean = masked_mean(adv, mask)[:, None]
    variance = ((adv - mean).pow(2) * mask).sum(1, keepdim=True) / (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    standard = (adv - mean) / (temperature * (variance.sqrt() + 1e-8))
    return standard.clamp(max=math.log(max_weight)).exp().detach()  # [AWR] w = exp(A / T)


def gaussian_logp(mean, act, std):
    """Log-density of act under N(mean, std), both [.., act_dim] -> [..]."""
    return (-0.5 * ((act - mean) / std).pow(2) - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


# ---- agent ------------------------------------------------------------------


class Agent(nn.Module):
    """Initial parameters of value function and policy, their inner rates, and the weight lambda of the advantage loss;
    `opts`: Adam for the policy, for the value function, and for rates and lambda."""

    def __init__(self, data, args):
        super().__init__()
        self.args, self.horizon, self.obs_dim, self.act_dim = args, data.family.horizon, data.obs_dim, data.act_dim
        latent, width = args.latent if args.weight_transform else 0, args.width
        trunk, head = [(data.obs_dim, width), (width, width), (width, width)], []
        if args.adv_head:
            head = [(width + data.act_dim, args.head_width), (args.head_width, 1)]
            self.c = nn.Parameter(torch.tensor(math.log(max(args.adv_weight, 1e-8))))
        self.value_net = Net(trunk + [(width, 1)], latent, args.inner_lr)
        self.policy_net = Net(trunk + [(width, data.act_dim)] + head, latent, args.inner_lr)
        self.register_buffer("return_spread", torch.ones(()))
        self.register_buffer("probes", torch.zeros(8, data.obs_dim))  # observations, for `embed`

    def make_optimizer(self, args):
        rates = [self.policy_net.rho, self.value_net.rho] + ([self.c] if args.adv_head else [])
        policy, value = ([*net.z, *net.map, *net.offset] for net in (self.policy_net, self.value_net))
        self.params = [policy, value, rates]
        lrs = (args.lr, args.value_lr, args.rate_lr)  # tensors: `anneal` changes them
        self.opts = [torch.optim.Adam(p, torch.tensor(lr), fused=True) for p, lr in zip(self.params, lrs)]

    def label(self, rows, mask, ended):
        """Episodes rows [.., H, ctx_dim], mask [.., H], ended [..] -> obs [.., H, obs_dim], act [.., H, act_dim],
        returns and their continuing discounts [.., H] (see `monte_carlo`), last observation [.., 1, obs_dim]."""
        obs, act, rew, next_obs = rows.split([self.obs_dim, self.act_dim, 1, self.obs_dim], -1)
        ret, tail = monte_carlo(rew[..., 0], mask, ended, self.args.gamma)
        last = (mask.sum(-1).long() - 1).clamp(min=0)[..., None, None]
        tail = tail * self.args.terminal_bootstrap
        return obs, act, ret / self.return_spread, tail, next_obs.take_along_dim(last, -2)  # [ours: D4]

    def value(self, weights, obs):
        """obs [M, B, obs_dim] -> V [M, B]."""
        return self.value_net(weights, obs)[0][..., 0]

    def advantage(self, weights, batch, value):
        """-> [M, B] with no gradient; the weights, and value [M, B], are those of the adapted value function."""
        _, _, ret, tail, last_obs, _ = batch
        with torch.no_grad():
            return ret + tail * self.value(weights, last_obs) - value  # [code: D1] A = R - V, and V at the end

    def act(self, weights, obs):
        """obs [M, B, obs_dim] -> mean of the policy [M, B, act_dim] in (-1, 1)."""
        return self.policy_net(weights, obs)[0].tanh()

    def policy_loss(self, weights, batch, adv):
        """AWR: adv [M, B] -> [M]."""
        obs, act, mask = batch[0], batch[1], batch[-1]
        logp = gaussian_logp(self.act(weights, obs), act, self.args.policy_std)
        return -masked_mean(self.weigh(adv, mask) * logp, mask)  # [L_AWR] advantage-weighted log-likelihood

    def inner_policy_loss(self, weights, batch, adv):
        """AWR and the regression of the advantage head: adv [M, B] -> [M]."""
        if not self.args.adv_head:
            return self.policy_loss(weights, batch, adv)
        obs, act, mask, net = batch[0], batch[1], batch[-1], self.policy_net
        out, h = net(weights, obs)
        logp = gaussian_logp(out.tanh(), act, self.args.policy_std)
        guess = net.layer(weights, 5, net.layer(weights, 4, torch.cat([h, act], -1)).relu())[..., 0]
        error = F.softplus(self.c) * (guess - adv).pow(2)  # [L_ADV] with lambda
        return masked_mean(error - self.weigh(adv, mask) * logp, mask)  # [L_pi] = L_AWR + lambda L_ADV

    def weigh(self, adv, mask):
        """adv, mask [M, B] -> weights [M, B], no gradient."""
        return awr_weights(adv, mask, self.args.temperature, self.args.max_weight)

    def inner_loop(self, batch, steps, first_order=False):
        """The inner loop for every task. batch: obs [M, B, obs_dim], act, returns [M, B], their continuing discounts,
        last_obs [M, 1 or B, obs_dim], mask [M, B] -> adapted weights of value function and policy, metrics."""
        obs, _, ret, _, _, mask = batch

        def value_loss(weights):
            return masked_mean((self.value(weights, obs) - ret).pow(2), mask)

        value, before = self.value_net.descend(value_loss, len(obs), steps, first_order)  # [inner L_V] phi'
        with torch.no_grad():
            found = self.value(value, obs)
            after = masked_mean((found - ret).pow(2), mask)
            adv = self.advantage(value, batch, found)
        inner_loss = partial(self.inner_policy_loss, batch=batch, adv=adv)
        policy, policy_before = self.policy_net.descend(inner_loss, len(obs), steps, first_order)  # [inner L_pi] theta'
        metrics = {
            "losses/inner_value": before,
            "losses/inner_value_after": after,
            "losses/inner_policy": policy_before,
        }
        return value, policy, {tag: loss.mean() for tag, loss in metrics.items()}


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


def segment(count, size, part):
    """First of `size` among `count` in the order of recording: the start, the middle or the end of them."""
    return {"start": 0, "middle": (count - size) // 2, "end": count - size}[part]


def sample(data, table, task_ids, args, generator):
    """Rows of the labelled episodes of `label_data`: task_ids [M] -> inner batch, context_size rows of one episode per
    task, and outer batch, batch_size rows of the task's other episodes. A batch: see `Agent.inner_loop`."""
    lengths, device = data.lengths[task_ids], data.device  # [M, N]
    allowed = (lengths > 0).float()
    if args.inner_segment != "all":
        count = allowed.sum(1, keepdim=True).long()
        size = (count // 4).clamp(min=1)
        first = segment(count, size, args.inner_segment)
        order = torch.arange(lengths.shape[1], device=device)
        allowed = allowed * (order >= first) * (order < first + size)
    inner = torch.multinomial(allowed, 1, generator=generator)  # [M, 1]
    others = lengths.float().scatter(1, inner, 0.0)  # an episode counts by its transitions
    outer = torch.multinomial(others, args.batch_size, True, generator=generator)  # [M, batch_size]

    def uniform(size):
        return torch.rand(len(task_ids), size, device=device, generator=generator)

    # evenly spread over the inner episode with a random offset each, so that none counts much more than another
    spread = (torch.arange(args.context_size, device=device) + uniform(args.context_size)) / args.context_size
    task, batches, (*rows, last_obs) = task_ids[:, None], [], table
    for episode, share in ((inner, spread), (outer, uniform(args.batch_size))):
        length = lengths.gather(1, episode)
        step = (share * length).long().minimum(length - 1)
        batch = [x[task, episode, step] for x in rows]
        batches.append((*batch, last_obs[task, episode, 0], torch.ones_like(batch[2])))
    return batches


def update(agent, inner, outer, args):
    """One step of the meta-parameters. inner, outer: batches of disjoint transitions of the same tasks, see
    `Agent.inner_loop` -> dict of detached 0-d tensors."""
    obs, _, ret, tail, last_obs, mask = outer
    value, policy, metrics = agent.inner_loop(inner, args.inner_steps, args.first_order)

    # the adapted value function on other transitions
    with torch.no_grad():
        initial = agent.value_net.generate(len(obs))
        blend = [torch.lerp(before, after, args.tau) for before, after in zip(initial, value)]
        target = ret + tail * agent.value(blend, last_obs)  # [code: D1, D5]
    found = agent.value(value, obs)
    value_loss = (found - target).pow(2).mean()  # [outer L_V] at phi'

    # the adapted policy on the same; the advantages are constants, so the two losses never meet
    adv = agent.advantage(value, outer, found)
    policy_loss = agent.policy_loss(policy, outer, adv).mean()  # [outer L_AWR] at theta'
    set_grads(value_loss + policy_loss, [parameter for group in agent.params for parameter in group])
    for opt in agent.opts:
        opt.step()
    with torch.no_grad():
        weights, rates = agent.weigh(adv, mask), [F.softplus(net.rho) for net in (agent.value_net, agent.policy_net)]
        metrics |= {
            "losses/value": value_loss.detach(),
            "losses/policy": policy_loss.detach(),
            "stats/weight_mean": weights.mean(),
            "stats/weight_max": weights.max(),
            "stats/capped": (weights >= args.max_weight * (1 - 1e-6)).float().mean(),
            "stats/adv_std": adv.std(),
        }
        for name, rate in zip(("value", "policy"), rates):
            metrics |= {f"stats/{name}_rate_{k}": getattr(rate, k)() for k in ("min", "median", "max")}
        if args.adv_head:
            metrics["stats/lambda"] = F.softplus(agent.c)
        return metrics


# ---- adaptation -------------------------------------------------------------


def adapted(agent, context, mask, steps):
    """context [R, E * H, ctx_dim] of E episodes, mask [R, E * H] -> adapted weights of value function and policy,
    lists of [R, P_l]; without a context or a step the initial ones."""
    rows, horizon = len(context), agent.horizon
    with torch.no_grad():
        if not context.shape[1] or not steps:
            return agent.value_net.generate(rows), agent.policy_net.generate(rows)
        context, mask = (x.unflatten(1, (-1, horizon)) for x in (context, mask))  # [R, E, H, ..]
        ended = (mask.sum(-1) < horizon).float()  # a termination in the very last step passes for the time limit
        *batch, last_obs = agent.label(context, mask, ended)
        batch = [x.flatten(1, 2) for x in (*batch, last_obs.expand(-1, -1, horizon, -1), mask)]
        return agent.inner_loop(batch, steps)[:2]


def adapt(agent, context, mask, explore=False, steps=None):
    """Gradient steps on the context, by default --inner-steps; explore: act with the policy's noise.
    context [R, E * H, ctx_dim] of whole episodes, mask [R, E * H] -> policy(obs [R, obs_dim], rew [R]) -> act."""
    _, weights = adapted(agent, context, mask, agent.args.inner_steps if steps is None else steps)
    generator = torch.Generator(context.device).manual_seed(context.shape[1])  # the same at every evaluation

    def policy(obs, rew):
        act = agent.act(weights, obs[:, None])[:, 0]
        if explore:
            act = act + agent.args.policy_std * torch.randn(act.shape, device=act.device, generator=generator)
        return act.clamp(-1, 1)

    return policy


def embed(agent, context, mask):
    """What adaptation to the context [R, K, ctx_dim], mask [R, K] has made of the policy: its actions at eight
    observations of the training data -> z [R, 8 * act_dim]."""
    with torch.no_grad():
        _, weights = adapted(agent, context, mask, agent.args.inner_steps)
        return agent.act(weights, agent.probes.expand(len(context), -1, -1)).flatten(1)


def evaluate_all(agent, data, args, protocols):
    """Returns and quality of z; with all protocols also the returns after 0, 1, 5 and 20 inner steps on the contexts
    of the protocol iid, and the online fine-tuning -> dict tag -> float."""
    results = dc.evaluate(data, partial(adapt, agent), protocols, args.eval_episodes)
    results |= dc.embedding_quality(data, partial(embed, agent))
    if "zero_shot" in protocols:
        known = {0: results["eval/zero_shot/return"], args.inner_steps: results["eval/iid/return"]}
        for steps in (0, 1, 5, 20):
            if steps not in known:
                found = dc.evaluate(data, partial(adapt, agent, steps=steps), ("iid",), args.eval_episodes)
                known[steps] = found["eval/iid/return"]
            results[f"adapt/return_{steps}_steps"] = known[steps]
        if args.online_ft:
            results |= fine_tune(agent, data, args)
    return results


def fine_tune(agent, data, args):
    """Adapt to the first recorded episode of every test task, then alternate an own episode with noise and Adam's
    steps on all own transitions; all tasks at once, each with its own weights (D8)
    -> {"online_ft/return_ep_10": mean return without noise after ten episodes, ..}."""
    tasks, device, horizon = data.test_ids, data.device, data.family.horizon
    generator = torch.Generator(device).manual_seed(0)
    mask = (torch.arange(horizon, device=device) < data.lengths[tasks, 0][:, None]).float()
    start = adapted(agent, data.episodes[tasks, 0][..., :-1], mask, args.inner_steps)
    value, policy = ([w.clone().requires_grad_() for w in weights] for weights in start)
    opts = [torch.optim.Adam(weights, args.ft_lr, fused=True) for weights in (value, policy)]
    env, own, results = dc.TaskEnv(data.family, data.task_params, tasks), [], {}

    def play(episode, std):
        def act(obs, rew):
            act = agent.act(policy, data.standardize(obs)[:, None])[:, 0]
            return (act + std * torch.randn(act.shape, device=device, generator=generator)).clamp(-1, 1)

        return dc.rollout(env, act, (20_000 + 97 * tasks + episode).tolist(), device)

    def step(opt, loss, weights):
        set_grads(loss.sum(), weights)
        opt.step()

    for episode in range(args.online_ft + 1):
        if episode % 10 == 0 or episode == args.online_ft:
            returns = play(episode, 0.0)["rewards"].sum(1, dtype=np.float64)
            results[f"online_ft/return_ep_{episode}"] = float(returns.mean())
        if episode == args.online_ft:
            break
        done = play(episode, args.policy_std)
        done["observations"] = data.standardize(torch.as_tensor(done["observations"], device=device)).cpu().numpy()
        length = torch.as_tensor(done["lengths"], device=device)
        mask = (torch.arange(horizon, device=device) < length[:, None]).float()
        rows = dc.transitions(done, device=device)
        *labelled, last_obs = agent.label(rows[..., :-1], mask, rows[..., -1].amax(-1))
        own.append((*labelled, last_obs.expand(-1, horizon, -1), mask))
        table = [torch.cat(x, 1) for x in zip(*own)]  # each [R, episodes * H, ..]
        for opt, count in zip(opts, (args.ft_value_steps, args.ft_policy_steps)):
            for _ in range(count):
                pick = torch.multinomial(table[-1], args.ft_batch_size, True, generator=generator)
                batch = [x[torch.arange(len(tasks), device=device)[:, None], pick] for x in table]
                if opt is opts[0]:
                    step(opt, (agent.value(value, batch[0]) - batch[2]).pow(2).mean(1), value)
                else:
                    with torch.no_grad():
                        adv = agent.advantage(value, batch, agent.value(value, batch[0]))
                    step(opt, agent.policy_loss(policy, batch, adv), policy)
    env.close()
    return results


CONSOLE_TAGS = ("losses/value", "losses/policy", "losses/inner_value", "losses/inner_value_after", "stats/lambda")

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
    if data.min_episodes < 2:
        raise SystemExit(f"{args.dataset}: disjoint inner and outer rows need two episodes of every training task")
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(data, args).to(device)
    agent.make_optimizer(args)
    table = label_data(agent, data)
    step_fn = torch.compile(update) if args.compile else update
    tasks = torch.as_tensor(data.train_ids, device=device)
    with Run(args, data, agent, generator) as run:
        while run.going():
            task_ids = tasks[torch.randint(len(tasks), (args.meta_batch,), device=device, generator=generator)]
            batches = sample(data, table, task_ids, args, generator)
            for opt, lr in zip(agent.opts, (args.lr, args.value_lr, args.rate_lr)):
                anneal([opt], lr, run.step / args.total_updates)
            run.advance(step_fn(agent, *batches, args))
        return run.finish()


def label_data(agent, data):
    """Label all episodes once (see `Agent.label`) in units of the returns' spread over the training tasks, which the
    agent keeps with eight observations for `embed` -> list of tensors [T, N, H, ..], the last [T, N, 1, obs_dim]."""
    rows = data.episodes
    mask = (torch.arange(rows.shape[2], device=data.device) < data.lengths[..., None]).float()
    agent.return_spread.fill_(1)  # to label unscaled returns
    table = list(agent.label(rows[..., :-1], mask, rows[..., -1].amax(-1)))
    obs, ret, seen = table[0][data.train_ids], table[2][data.train_ids], mask[data.train_ids] > 0
    agent.return_spread.copy_(ret[seen].std().clamp(min=1e-6))
    table[2] = table[2] / agent.return_spread
    places = torch.linspace(0, int(seen.sum()) - 1, len(agent.probes), device=data.device).long()
    agent.probes.copy_(obs[seen][places])
    return table


# ---- main -------------------------------------------------------------------


def main(arguments=None):
    """Command line (list of str, by default the process's own); with --resume the stored arguments are the defaults."""
    cli = partial(tyro.cli, Args, description=__doc__.split("\n\n")[0], args=arguments)
    args = cli()
    train(cli(default=stored_args(args.resume)) if args.resume else args)


if __name__ == "__main__":
    main()
