"""MACAW: meta-actor-critic with advantage weighting, offline meta-reinforcement learning by gradient steps.

Mitchell, Rafailov, Peng, Levine, Finn, ICML 2021, https://arxiv.org/abs/2008.06043
official code https://github.com/eric-mitchell/macaw
[min] https://github.com/eric-mitchell/macaw-min, a shorter one by the authors
There is no task encoder: adapting to a task means one gradient step of a value function, by regression on
Monte-Carlo returns, and then one of a policy, by advantage-weighted regression (AWR). The outer loop moves the
initial parameters so that the adapted ones do well on other transitions of the task. Two additions make one step
tell the tasks apart: layers whose weights are a learned linear function of a latent, and a head of the policy
that predicts the advantage, in the inner loss only.

Deviations from the paper and from the official code:
  D1  As in the official code, advantages and the outer target of the value continue the return by the value of the
      episode's last observation (paper, [min]: `--no-terminal-bootstrap`); here not after a termination, which the
      official code overlooks. As there, the AWR weights are of standardized advantages and capped (paper: exp(A / T)).
  D2  The inner rows are of one episode, as the contexts of the evaluation, and spread over it; the outer rows are of
      the task's other episodes. Official code: both of the whole buffer, possibly overlapping (`--inner-rows buffer`),
      the inner ones in succession, every seventh transition. Each inner step sees all inner rows (official code: its
      part of them). `--inner-rows` and `--inner-segment` are about the training only; evaluation contexts are one
      episode, those of all methods (official code: 256 rows of the whole buffer).
  D3  The advantage head takes relu(h) and the action; the official code clips negative actions too.
  D4  Observations are standardized and clipped; returns are divided by their spread in the training data, a constant
      of the dataset.
  D5  The value that continues the outer target blends the generated weights before and after adaptation, once; the
      official code blends the parameters after each step. For one step they differ in the second order of the inner
      rate only.
  D6  `--no-weight-transform` makes plain layers; the official code's ablation has layers with a learned bias input.
  D7  Larger outer learning rates for far fewer updates; all three fall to 0 in the second half. More tasks per update,
      drawn with replacement (official code: without), and fewer transitions of each.
  D8  Online fine-tuning moves the weights that adaptation has generated, not the parameters they come from. It starts
      from a recorded episode of the task (official code: a batch of random-policy data). Its steps begin after the
      first own episode (official code: the 25th), it keeps all own episodes (official code: 50,000 transitions) and
      evaluates one episode every tenth time (official code: three, each time).

Run:     python macaw.py --env ant-dir
Ablate:  --no-weight-transform | --no-adv-head | --first-order | --no-terminal-bootstrap | --inner-segment start
Closest to the paper: --gamma 0.99 --meta-batch 5 --batch-size 256 --context-size 256 --inner-rows buffer --lr 1e-4
         --value-lr 1e-5 --no-lr-decay --total-updates 1000000 --online-ft 100 --ft-lr 1e-5, which is what the official
         code sets but for 100 (its loop runs 500; the paper reports the first 100)
No flag reaches: D1 after a termination, inner rows in succession and its part for each inner step, evaluation contexts
         of the whole buffer (D2), D3 to D6, tasks without replacement (D7), D8.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data_collect as dc

# ---- arguments --------------------------------------------------------------


@dataclass
class Args:
    # run
    exp_name: str = "macaw"  # name of the experiment: the folder between env and seed in the run directory
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
    lr: float = 1e-3  # Adam's learning rate of the policy's initialization
    value_lr: float = 1e-3  # the same of the value function's initialization
    rate_lr: float = 1e-3
    """the same of the inner learning rates and of the weight of the advantage loss, all before their softplus"""
    lr_decay: bool = True  # let all three fall linearly to 0 in the second half of the training
    inner_lr: float = 1e-3  # inner learning rates at the start of the training
    inner_steps: int = 1
    """gradient steps of the value function, then as many of the policy, that make an adaptation"""
    width: int = 100  # hidden units of policy and value function, three layers
    head_width: int = 32  # hidden units of the advantage head
    latent: int = 100  # size of the latent that generates a layer's weights
    policy_std: float = 0.2  # standard deviation of the policy
    temperature: float = 1.0  # temperature of the advantage weights
    max_weight: float = 20.0  # largest advantage weight
    adv_weight: float = 0.01  # weight lambda of the advantage loss in the inner loss at the start of the training
    tau: float = 0.1  # share of the adapted value function in the one that continues the outer target (D5)
    terminal_bootstrap: bool = True  # continue returns by the value of the episode's last observation (D1)
    weight_transform: bool = True  # generate the weights of all layers from latents
    adv_head: bool = True  # predict the advantage in the inner loss of the policy
    first_order: bool = False  # hold the inner gradient constant in the outer one
    inner_rows: Literal["episode", "buffer"] = "episode"
    """what the inner rows of the training are drawn from: one episode, and the outer rows from the others; or all
    episodes of the task, as the outer rows (D2)"""
    inner_segment: Literal["all", "start", "middle", "end"] = "all"
    """quarter of a task's episodes, in the order of recording, that the inner rows of the training come from (D2)"""
    online_ft: int = 0  # episodes of online fine-tuning per test task after the last evaluation [episodes]
    ft_lr: float = 1e-4  # Adam's learning rate of the fine-tuning
    ft_batch_size: int = 256  # own transitions per step of the fine-tuning [transitions]
    ft_value_steps: int = 100  # steps of the value function after each of those episodes
    ft_policy_steps: int = 200  # steps of the policy after each of those episodes


ENV_ARGS = {  # for arguments left at None: all families, then what those change whose name holds the key
    "": dict(gamma=0.99),
    "point": dict(gamma=0.9),
}
MAY_BE_ZERO = {"adv_weight", "online_ft", "tau"}
# not of the training: may differ when a run is resumed
EVAL_ONLY = {"online_ft", "ft_lr", "ft_batch_size", "ft_value_steps", "ft_policy_steps"}

# ---- networks ---------------------------------------------------------------


class Layer(nn.Module):
    """y = x W + b with generated weights: w = U z + u holds the matrix W [in, out] and the bias b [out] in one vector
    of P = in * out + out numbers; the latent z [latent], the map U [P, latent] and the offset u [P] are learned. With
    latent = 0, w = u: a plain layer. Every task has a w of its own: [M, P]."""

    def __init__(self, in_dim, out_dim, latent):
        super().__init__()
        self.shape = (in_dim, out_dim)
        count, bound = in_dim * out_dim + out_dim, 1 / math.sqrt(latent or in_dim)
        self.z = nn.Parameter(torch.randn(latent) / out_dim)
        self.map = nn.Parameter(torch.empty(count, latent).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.empty(count).uniform_(-bound, bound))

    def forward(self, w, x):
        """w [M, P], x [M, B, in] -> [M, B, out]."""
        matrix, bias = w.split([math.prod(self.shape), self.shape[1]], 1)
        return torch.baddbmm(bias[:, None], x, matrix.unflatten(1, self.shape))

    def step(self, z, past, grad, rates, first_order):
        """One step of gradient descent on z, U and u, for every task apart:

            z' = z - a U^T G,   U' = U - b G z^T,   u' = u - c G

        z [M, latent]: the tasks' latents; grad [M, P]: G, the gradient of the loss with respect to w; rates: a, b, c;
        past: list of the pairs (G, z) of the steps before, to which this one's is added -> z' and w' = U' z' + u'.
        U changes by one outer product per step and is only ever multiplied by a vector, so a task needs no copy of U:
        its pairs stand for the changes, exactly, for any number of steps."""
        hold = torch.Tensor.detach if first_order else lambda x: x  # of first order: all gradients are constants
        a, b, c = rates
        grad = hold(grad)
        slope = grad @ self.map  # [M, latent], U^T G
        for old_grad, old_z in past:
            slope = slope - b * (old_grad * grad).sum(1, keepdim=True) * old_z
        past.append((grad, hold(z)))
        z = z - a * hold(slope)
        w = F.linear(z, self.map, self.offset)  # [M, P]
        for old_grad, old_z in past:
            w = w - (b * (old_z * z).sum(1, keepdim=True) + c) * old_grad
        return z, w


class Net(nn.Module):
    """Layers that adapt: three hidden ones, the output, and further ones where a head is needed. Their weights per task
    are a list over the layers of [M, P]. `rho` [layers, 3]: inner learning rates of z, U, u before their softplus."""

    def __init__(self, shapes, latent, rate):
        super().__init__()
        self.layers = nn.ModuleList(Layer(in_dim, out_dim, latent) for in_dim, out_dim in shapes)
        self.rho = nn.Parameter(torch.full((len(shapes), 3), math.log(rate)))

    def hidden(self, weights, x):
        """x [M, B, in] -> the third hidden layer [M, B, width]."""
        for layer, w in zip(self.layers[:3], weights):
            x = layer(w, x).relu()
        return x

    def forward(self, weights, x):
        """x [M, B, in] -> [M, B, out]."""
        return self.layers[3](weights[3], self.hidden(weights, x))

    def generate(self, tasks):
        """-> the weights before any adaptation, w = U z + u, the same for all tasks."""
        return [torch.addmv(layer.offset, layer.map, layer.z).expand(tasks, -1) for layer in self.layers]

    def descend(self, loss, tasks, steps, first_order=False):
        """`steps` of gradient descent on z, U and u of all layers, for every task apart; loss(weights) -> [M]
        -> adapted weights, and the loss before the first step [M]."""
        weights, rates, before = self.generate(tasks), F.softplus(self.rho), None
        latents, pasts = [layer.z.expand(tasks, -1) for layer in self.layers], [[] for _ in self.layers]

        def total(weights):  # the tasks are independent: the gradient of their sum is each one's own
            each = loss(weights)
            return each.sum(), each

        for _ in range(steps):
            grads, (_, each) = torch.func.grad_and_value(total, has_aux=True)(weights)
            before = each.detach() if before is None else before
            inputs = zip(self.layers, latents, pasts, grads, rates)
            moved = [layer.step(z, past, grad, abc, first_order) for layer, z, past, grad, abc in inputs]
            latents, weights = zip(*moved)  # [inner step] w' = U' z' + u' of the adapted z', U' and u'
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
    return ret, tail  # [code: D1] tail is 0 throughout an episode that the task ended


def masked_mean(x, mask):
    """x [M, B], mask [M, B] -> mean over the real rows [M]."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def awr_weights(adv, mask, temperature=1.0, max_weight=20.0):
    """adv [M, B], mask [M, B] -> weights [M, B] of the regression on the actions, with no gradient: exponential of
    the advantage, standardized over the task's rows, and capped from above."""
    mean = masked_mean(adv, mask)[:, None]
    variance = ((adv - mean).pow(2) * mask).sum(1, keepdim=True) / (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    standard = (adv - mean) / (temperature * (variance.sqrt() + 1e-8))  # 1e-8: equal advantages weigh 1
    return standard.clamp(max=math.log(max_weight)).exp().detach()  # [AWR] w = exp(A / T)


def gaussian_logp(mean, act, std):
    """Log-density of act under N(mean, std), both [.., act_dim] -> [..]."""
    return (-0.5 * ((act - mean) / std).pow(2) - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


# ---- agent ------------------------------------------------------------------


class Rows(NamedTuple):
    """Labelled transitions of M tasks, B of each; in whole episodes [.., H] instead of [M, B]."""

    obs: torch.Tensor  # [M, B, obs_dim], standardized
    act: torch.Tensor  # [M, B, act_dim] in [-1, 1]
    ret: torch.Tensor  # [M, B] discounted return to the end of the episode, in units of the data's spread (D4)
    tail: torch.Tensor  # [M, B] discount with which the value of last_obs continues it (D1)
    mask: torch.Tensor  # [M, B] 1 = real, 0 = padding
    last_obs: torch.Tensor  # [M, B, obs_dim], or [M, 1, obs_dim]: the last observation of the episode


class Agent(nn.Module):
    """Initial parameters of value function and policy, their inner rates, the weight lambda of the advantage loss, and
    the optimizers."""

    def __init__(self, data, args):
        super().__init__()
        self.args, self.horizon, self.obs_dim, self.act_dim = args, data.family.horizon, data.obs_dim, data.act_dim
        latent, width = args.latent if args.weight_transform else 0, args.width
        trunk = [(data.obs_dim, width), (width, width), (width, width)]
        head = [(width + data.act_dim, args.head_width), (args.head_width, 1)] if args.adv_head else []
        self.value_net = Net(trunk + [(width, 1)], latent, args.inner_lr)
        self.policy_net = Net(trunk + [(width, data.act_dim)] + head, latent, args.inner_lr)
        self.c = nn.Parameter(torch.tensor(math.log(max(args.adv_weight, 1e-8)))) if args.adv_head else None
        self.register_buffer("return_spread", torch.ones(()))
        self.register_buffer("probes", torch.zeros(8, data.obs_dim))  # observations, for `embed`
        # learning rates as tensors, so that a compiled update reads the current ones
        rates = [self.policy_net.rho, self.value_net.rho] + ([self.c] if args.adv_head else [])
        self.policy_opt = torch.optim.Adam(self.policy_net.layers.parameters(), torch.tensor(args.lr), fused=True)
        self.value_opt = torch.optim.Adam(self.value_net.layers.parameters(), torch.tensor(args.value_lr), fused=True)
        self.rate_opt = torch.optim.Adam(rates, torch.tensor(args.rate_lr), fused=True)

    def label(self, rows, mask, ended):
        """Episodes: rows [.., H, ctx_dim], mask [.., H], ended [..] 1 = the task itself ended -> Rows [.., H, ..]."""
        obs, act, rew, next_obs = rows.split([self.obs_dim, self.act_dim, 1, self.obs_dim], -1)
        ret, tail = monte_carlo(rew[..., 0], mask, ended, self.args.gamma)
        last = (mask.sum(-1).long() - 1).clamp(min=0)[..., None, None]
        last_obs = next_obs.take_along_dim(last, -2).expand_as(next_obs)
        return Rows(obs, act, ret / self.return_spread, tail * self.args.terminal_bootstrap, mask, last_obs)

    def value(self, weights, obs):
        """obs [M, B, obs_dim] -> V [M, B]."""
        return self.value_net(weights, obs)[..., 0]

    def act(self, weights, obs):
        """obs [M, B, obs_dim] -> mean of the policy [M, B, act_dim] in (-1, 1)."""
        return self.policy_net(weights, obs).tanh()

    def advantage(self, weights, rows, value):
        """weights of the value function, value [M, B]: what it says of the rows -> advantage [M, B], no gradient."""
        with torch.no_grad():
            return rows.ret + rows.tail * self.value(weights, rows.last_obs) - value  # [code: D1] A = R + tail V - V

    def weigh(self, adv, mask):
        """adv, mask [M, B] -> weights [M, B], no gradient."""
        return awr_weights(adv, mask, self.args.temperature, self.args.max_weight)

    def policy_loss(self, weights, rows, adv):
        """AWR: adv [M, B] -> [M]."""
        logp = gaussian_logp(self.act(weights, rows.obs), rows.act, self.args.policy_std)
        return -masked_mean(self.weigh(adv, rows.mask) * logp, rows.mask)  # [L_AWR] advantage-weighted log-likelihood

    def inner_policy_loss(self, weights, rows, adv):
        """AWR and the regression of the advantage head: adv [M, B] -> [M]."""
        if not self.args.adv_head:
            return self.policy_loss(weights, rows, adv)
        layers, h = self.policy_net.layers, self.policy_net.hidden(weights, rows.obs)
        mean = layers[3](weights[3], h).tanh()
        guess = layers[4](weights[4], torch.cat([h, rows.act], -1)).relu()  # [ours: D3]
        guess = layers[5](weights[5], guess)[..., 0]
        logp = gaussian_logp(mean, rows.act, self.args.policy_std)
        error = F.softplus(self.c) * (guess - adv).pow(2)  # [L_ADV] with lambda
        return masked_mean(error - self.weigh(adv, rows.mask) * logp, rows.mask)  # [L_pi] = L_AWR + lambda L_ADV

    def inner_loop(self, rows, steps, first_order=False):
        """The inner loop for every task -> adapted weights of value function and policy, metrics."""

        def value_loss(weights):
            return masked_mean((self.value(weights, rows.obs) - rows.ret).pow(2), rows.mask)

        tasks = len(rows.obs)
        value, value_before = self.value_net.descend(value_loss, tasks, steps, first_order)  # [inner L_V] phi'
        with torch.no_grad():
            found = self.value(value, rows.obs)
            value_after = masked_mean((found - rows.ret).pow(2), rows.mask)
        adv = self.advantage(value, rows, found)
        policy_loss = partial(self.inner_policy_loss, rows=rows, adv=adv)
        policy, policy_before = self.policy_net.descend(policy_loss, tasks, steps, first_order)  # [inner L_pi] theta'
        metrics = {
            "losses/inner_value": value_before.mean(),
            "losses/inner_value_after": value_after.mean(),
            "losses/inner_policy": policy_before.mean(),
        }
        return value, policy, metrics


# ---- update -----------------------------------------------------------------


def update(agent, inner, outer, args):
    """One step of the initial parameters, inner rates and lambda. inner, outer: Rows of the same tasks, without padding
    -> dict of detached 0-d tensors."""
    opts = (agent.policy_opt, agent.value_opt, agent.rate_opt)
    for opt in opts:
        opt.zero_grad()
    value, policy, metrics = agent.inner_loop(inner, args.inner_steps, args.first_order)

    # the adapted value function on other transitions
    with torch.no_grad():
        initial = agent.value_net.generate(len(outer.obs))
        blend = [torch.lerp(before, after, args.tau) for before, after in zip(initial, value)]
        target = outer.ret + outer.tail * agent.value(blend, outer.last_obs)  # [code: D1, D5]
    found = agent.value(value, outer.obs)
    value_loss = (found - target).pow(2).mean()  # [outer L_V] at phi'

    # the adapted policy on the same; the advantages are constants, so the two losses never meet
    adv = agent.advantage(value, outer, found)
    policy_loss = agent.policy_loss(policy, outer, adv).mean()  # [outer L_AWR] at theta'
    (value_loss + policy_loss).backward()
    for opt in opts:
        opt.step()
    with torch.no_grad():
        weights, rates = agent.weigh(adv, outer.mask), {}
        for name, net in (("value", agent.value_net), ("policy", agent.policy_net)):
            rate = F.softplus(net.rho)
            rates |= {f"stats/{name}_rate_{k}": getattr(rate, k)() for k in ("min", "median", "max")}
        return {
            **metrics,
            "losses/value": value_loss.detach(),
            "losses/policy": policy_loss.detach(),
            "stats/weight_mean": weights.mean(),
            "stats/weight_max": weights.max(),
            "stats/capped": (weights >= args.max_weight * (1 - 1e-6)).float().mean(),
            "stats/adv_std": adv.std(correction=min(1, adv.numel() - 1)),
            **rates,
            **({"stats/lambda": F.softplus(agent.c)} if args.adv_head else {}),
        }


# ---- adaptation -------------------------------------------------------------


def adapted(agent, context, mask, steps):
    """context [R, E * H, ctx_dim] of E episodes, mask [R, E * H] -> adapted weights of value function and policy,
    lists of [R, P]; without a context or a step the initial ones."""
    with torch.no_grad():
        if not context.shape[1] or not steps:
            return agent.value_net.generate(len(context)), agent.policy_net.generate(len(context))
        context, mask = (x.unflatten(1, (-1, agent.horizon)) for x in (context, mask))  # [R, E, H, ..]
        ended = (mask.sum(-1) < agent.horizon).float()  # a termination in the very last step passes for the time limit
        rows = Rows(*(x.flatten(1, 2) for x in agent.label(context, mask, ended)))
        return agent.inner_loop(rows, steps)[:2]


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


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns and quality of z; with all protocols also the returns after 0, 1, 5 and 20 inner steps on the contexts
    of the protocol iid, and the online fine-tuning -> dict tag -> float."""
    results = dc.evaluate(data, partial(adapt, agent), protocols, episodes)
    results |= dc.embedding_quality(data, partial(embed, agent))
    if "zero_shot" in protocols:
        known = {0: results["eval/zero_shot/return"], args.inner_steps: results["eval/iid/return"]}
        for steps in (0, 1, 5, 20):
            if steps not in known:
                found = dc.evaluate(data, partial(adapt, agent, steps=steps), ("iid",), episodes)
                known[steps] = found["eval/iid/return"]
            results[f"adapt/return_{steps}_steps"] = known[steps]
        if args.online_ft:
            results |= fine_tune(agent, data, args)
    return results


def fine_tune(agent, data, args):
    """Adapt to the first recorded episode of every test task, then alternate an own episode with noise and Adam's
    steps on all own transitions; all tasks at once, each with its own weights (D8)
    -> {"online_ft/return_ep_10": mean return without noise after ten episodes, ..}."""
    tasks, device = data.test_ids, data.device
    generator = torch.Generator(device).manual_seed(0)
    mask = step_mask(data.lengths[tasks, 0], agent.horizon)
    start = adapted(agent, data.episodes[tasks, 0][..., :-1], mask, args.inner_steps)
    value, policy = ([w.clone().requires_grad_() for w in weights] for weights in start)
    value_opt, policy_opt = (torch.optim.Adam(weights, args.ft_lr, fused=True) for weights in (value, policy))
    env, every = dc.TaskEnv(data.family, data.task_params, tasks), torch.arange(len(tasks), device=device)[:, None]

    def play(episode, std):
        def act(obs, rew):
            mean = agent.act(policy, data.standardize(obs)[:, None])[:, 0]
            return (mean + std * torch.randn(mean.shape, device=device, generator=generator)).clamp(-1, 1)

        with torch.no_grad():
            return dc.rollout(env, act, (20_000 + 97 * tasks + episode).tolist(), device)

    def label(done):  # what `play` gives -> Rows of [R, H, ..]
        done["observations"] = data.standardize(torch.as_tensor(done["observations"], device=device)).cpu().numpy()
        rows = dc.transitions(done, device=device)
        mask = step_mask(torch.as_tensor(done["lengths"], device=device), agent.horizon)
        return agent.label(rows[..., :-1], mask, rows[..., -1].amax(-1))

    def draw(rows):  # [R, episodes * H, ..] -> [R, ft_batch_size, ..]
        pick = torch.multinomial(rows.mask, args.ft_batch_size, True, generator=generator)
        return Rows(*(x[every, pick] for x in rows))

    own, results = [], {}
    for episode in range(args.online_ft + 1):
        last = episode == args.online_ft
        if episode % 10 == 0 or last:
            returns = dc.episode_returns(data, tasks, play(episode, 0.0))
            results[f"online_ft/return_ep_{episode}"] = float(returns.mean())
        if last:
            break
        own.append(label(play(episode, args.policy_std)))
        rows = Rows(*(torch.cat(x, 1) for x in zip(*own)))
        for _ in range(args.ft_value_steps):
            batch = draw(rows)
            value_opt.zero_grad()
            (agent.value(value, batch.obs) - batch.ret).pow(2).mean(1).sum().backward()
            value_opt.step()
        for _ in range(args.ft_policy_steps):
            batch = draw(rows)
            adv = agent.advantage(value, batch, agent.value(value, batch.obs))
            policy_opt.zero_grad()
            agent.policy_loss(policy, batch, adv).sum().backward()
            policy_opt.step()
    env.close()
    return results


# ---- training ---------------------------------------------------------------


def step_mask(lengths, horizon):
    """lengths [..] of episodes -> [.., horizon], 1 at their steps."""
    return (torch.arange(horizon, device=lengths.device) < lengths[..., None]).float()


def label_data(agent, data):
    """Take the spread of the returns and eight observations, for `embed`, of the training tasks over to the agent
    -> all episodes, labelled once: Rows of [T, N, H, ..]."""
    rows, mask = data.unpack(data.episodes), step_mask(data.lengths, agent.horizon)
    ended = rows.term.amax(-1)
    ret, _ = monte_carlo(rows.rew, mask, ended, agent.args.gamma)
    train, seen = data.train_tasks, mask[data.train_tasks] > 0
    agent.return_spread.copy_(ret[train][seen].std().clamp(min=1e-6))
    places = torch.linspace(0, int(seen.sum()) - 1, len(agent.probes), device=data.device).long()
    agent.probes.copy_(rows.obs[train][seen][places])
    return agent.label(data.episodes[..., :-1], mask, ended)


def segment(lengths, part):
    """lengths [M, N] of the episodes, in the order of recording -> [M, N] 1 = of that part: all, or the quarter at the
    start, in the middle or at the end."""
    count = (lengths > 0).sum(1, keepdim=True)
    size = count if part == "all" else (count // 4).clamp(min=1)
    first = {"all": 0, "start": 0, "middle": (count - size) // 2, "end": count - size}[part]
    order = torch.arange(lengths.shape[1], device=lengths.device)
    return ((order >= first) & (order < first + size)).float()


def draw_rows(data, table, task_ids, args, generator):
    """table: all episodes as of `label_data`, task_ids [M] -> inner Rows, context_size of one episode per task, and
    outer Rows, batch_size of the task's other episodes; with --inner-rows buffer both of all its episodes."""
    lengths, task, device = data.lengths[task_ids], task_ids[:, None], data.device  # lengths [M, N]
    allowed, counts = segment(lengths, args.inner_segment), lengths.float()  # an episode counts by its transitions
    if args.inner_rows == "episode":  # [ours: D2] inner [M, 1]
        # the first of exponential clocks is a uniform draw; torch.multinomial of one would read from the device
        inner = (allowed / torch.empty_like(allowed).exponential_(generator=generator)).argmax(1, keepdim=True)
        counts = counts.scatter(1, inner, 0.0)
    else:  # [code: D2] inner [M, context_size]
        inner = torch.multinomial(allowed * counts, args.context_size, True, generator=generator)
    outer = torch.multinomial(counts, args.batch_size, True, generator=generator)  # [M, batch_size]

    def rows(episode, share):  # at these shares of their episodes
        length = lengths.gather(1, episode)
        step = (share * length).long().minimum(length - 1)
        *columns, last_obs = table
        return Rows(*(x[task, episode, step] for x in columns), last_obs[task, episode, 0])

    share = torch.rand(len(task), args.context_size, device=device, generator=generator)
    if args.inner_rows == "episode":  # evenly spread over it, each with an offset, so that none counts much more
        share = (torch.arange(args.context_size, device=device) + share) / args.context_size
    return rows(inner, share), rows(outer, torch.rand(outer.shape, device=device, generator=generator))


def train(args):
    """Train and evaluate -> what dc.Run.finish returns."""
    args = dc.resolve(args, ENV_ARGS, MAY_BE_ZERO)
    data = dc.load_dataset(args.env, args.dataset, args.device)
    if args.inner_rows == "episode" and data.min_episodes < 2:
        what = "disjoint inner and outer rows need two episodes of every training task"
        raise SystemExit(f"{data.path}: {what}; collect more with --episodes, or use --inner-rows buffer")
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    agent = Agent(data, args).to(data.device)
    table = label_data(agent, data)
    step_fn = torch.compile(update) if args.compile else update
    with dc.Run(args, data, agent, generator, evaluate_all, embed, free=EVAL_ONLY) as run:
        while run.going():
            task_ids = data.sample_tasks(args.meta_batch, generator)
            inner, outer = draw_rows(data, table, task_ids, args, generator)
            dc.set_lr(agent.policy_opt, args.lr * run.decay)  # [ours: D7]
            dc.set_lr(agent.value_opt, args.value_lr * run.decay)
            dc.set_lr(agent.rate_opt, args.rate_lr * run.decay)
            run.advance(step_fn(agent, inner, outer, args))
        return run.finish()


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__)
