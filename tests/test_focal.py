"""focal.py: whole updates against a slow recomputation, test vectors of its losses, the data it trains on, learning.

The slow update goes through tasks and transitions one by one in float64; of the script it uses the parameters alone.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, OnDevice, origin, pattern, slow_net, to_meta
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.utils.flop_counter import FlopCounterMode

import data_collect as dc
import focal

DATA = SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9)
TASK_IDS = torch.tensor([4, 7, 4, 2])
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "gp_weight": 2.5, "dual_lr": 2**-5, "brac_alpha": 1.75, "brac_alpha_lr": 0.3}
METHOD |= {"divergence_target": 0.2, "brac_alpha_max": 100.0}


def make_agent(**changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = focal.Args(**METHOD | changes)
    torch.manual_seed(0)
    agent = focal.Agent(DATA, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
    return agent, args


def make_batch(seed, tasks=len(TASK_IDS), size=4):
    """Every third transition terminates; two actions lie at the bounds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(tasks, size, *shape, dtype=torch.float64).normal_(generator=generator)

    act = normal(DATA.act_dim).clamp(-0.9, 0.9)
    act[0, 0], act[1, 2, 1] = torch.tensor([1.0, -0.9995]), -1.0
    term = (torch.arange(tasks * size).reshape(tasks, size) % 3 == 0).double()
    return dc.Batch(normal(DATA.obs_dim), act, normal(), normal(DATA.obs_dim), term)


def make_context(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.empty(len(TASK_IDS), 3, DATA.ctx_dim, dtype=torch.float64).normal_(generator=generator)


# ---- the slow update --------------------------------------------------------------------


def slow_embedding(encoder, context):
    """context [K, ctx_dim] -> z [z_dim]."""
    first, second, last = (layer for layer in encoder.net if hasattr(layer, "weight"))
    total = 0.0
    for row in context:
        for layer in (first, second):
            row = layer.weight @ row + layer.bias
            row = torch.where(row > 0, row, 0.0)
        total = total + torch.tanh(last.weight @ row + last.bias)
    return total / len(context)


def slow_metric(z, tasks):
    """Root distance of each pair of one task, inverse distance of each pair of two, averaged apart."""
    pull, push, near, far = 0.0, 0.0, 0, 0
    for i in range(len(z)):
        for j in range(i + 1, len(z)):
            distance = sum((z[i, d] - z[j, d]) ** 2 for d in range(z.shape[1])) / z.shape[1]
            if tasks[i] == tasks[j]:
                pull, near = pull + torch.sqrt(distance + 0.001), near + 1
            else:
                push, far = push + 1 / (distance + 0.1), far + 1
    return pull / (near + 0.001) + push / (far + 0.001)


def slow_policy(agent, obs, z):
    """Policy and behavior policy at one obs -> two normal distributions before the tanh; the second None without a
    behavior policy."""
    half, shift = DATA.act_dim, slow_net(agent.shift, obs, z)
    if agent.behavior is None:
        return Normal(shift[:half], shift[half:].clamp(-5, 2).exp()), None
    behavior = slow_net(agent.behavior, obs, z)
    log_std_b = behavior[half:].clamp(-3, 1)
    log_std = torch.clamp(log_std_b.detach() + shift[half:], -5, 2)
    return Normal(behavior[:half].detach() + shift[:half], log_std.exp()), Normal(behavior[:half], log_std_b.exp())


def slow_logp(normal, act):
    """Log-density of the squashed action."""
    return TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1)).log_prob(act)


def slow_fenchel(c_data, c_policy):
    return 1 - torch.log(1 + c_data.exp()) + torch.log(torch.log(1 + c_policy.exp()) + 1e-8)


def slow_dual_step(agent, opt, batch, z, args, noise, share):
    """One step of the dual critic -> loss, its values at the data before the step."""
    tasks, size = batch.rew.shape
    c_data, loss = torch.zeros(tasks, size).double(), 0.0
    for m in range(tasks):
        for b in range(size):
            obs, act = batch.obs[m, b], batch.act[m, b]
            policy, _ = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b]).detach()
            c = slow_net(agent.dual, obs, act, z[m])[0]
            c_data[m, b] = c.detach()
            between = (pi_act + share[m, b] * (act - pi_act)).requires_grad_()
            slope = slow_net(agent.dual, obs, between, z[m])[0]
            if args.gp_mode == "gradient":
                (gradient,) = torch.autograd.grad(slope, between, create_graph=True)
                slope = torch.sqrt(1e-8 + sum(g**2 for g in gradient))
            excess = max(abs(slope) - 1, torch.tensor(0.0))
            divergence = slow_fenchel(c, slow_net(agent.dual, obs, pi_act, z[m])[0])
            loss = loss + (args.gp_weight * excess**2 - divergence) / (tasks * size)
    step(opt, loss, agent.dual)
    return loss, c_data


def gradients(loss, module):
    """Leave the gradient of a loss in the parameters of a module."""
    parameters = list(module.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
        parameter.grad = grad


def step(opt, loss, module):
    gradients(loss, module)
    opt.step()


def slow_actor_critic(agent, z, batch, args, entropy_weight, divergence_of=None):
    """Losses of critics, behavior policy and policy at fixed z [M, z_dim] -> dict of sums with graph. divergence_of:
    (m, b, action of the policy) -> estimate in place of the closed form."""
    tasks, size = batch.rew.shape
    noise, sums = pattern(batch.act.shape), dict.fromkeys(("q", "behavior", "divergence", "value", "logp"), 0.0)
    for m in range(tasks):
        for b in range(size):
            obs, act, rew, next_obs, term = (x[m, b] for x in batch)
            policy, _ = slow_policy(agent, next_obs, z[m])
            next_act = torch.tanh(policy.mean + policy.stddev * noise[m, b])
            next_q = min(slow_net(agent.q_target, next_obs, next_act, z[m], member=e)[0] for e in range(2))
            if entropy_weight:
                next_q = next_q - entropy_weight * slow_logp(policy, next_act)
            target = args.reward_scale * rew + (0.0 if term else args.gamma * next_q.detach())
            for e in range(2):
                sums["q"] += (slow_net(agent.q, obs, act, z[m], member=e)[0] - target) ** 2
            policy, behavior = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b])
            sums["value"] += min(slow_net(agent.q, obs, pi_act, z[m], member=e)[0] for e in range(2))
            if entropy_weight:
                sums["logp"] += slow_logp(policy, pi_act)
            if behavior is not None:
                sums["behavior"] -= slow_logp(behavior, act.clamp(-0.999, 0.999))
                fixed = Normal(behavior.mean.detach(), behavior.stddev.detach())
                sums["divergence"] += kl_divergence(policy, fixed).sum()
            elif divergence_of:
                sums["divergence"] += divergence_of(m, b, pi_act)
    return {name: value / (tasks * size) for name, value in sums.items()}


def slow_multiplier_and_targets(agent, divergence, args):
    """brac_alpha towards its target within its bounds, target networks towards the critics."""
    with torch.no_grad():
        moved = agent.brac_alpha + args.brac_alpha_lr * (divergence - args.divergence_target)
        agent.brac_alpha.fill_(min(max(float(moved), 0.0), args.brac_alpha_max))
        for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
            target.copy_((1 - args.tau) * target + args.tau * source)


def slow_update(agent, opts, context, batches, args):
    """One update of a copy of the agent by optimizers of its own -> metrics."""
    batch, noise = batches[0], pattern(batches[0].act.shape)
    z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
    metric = args.metric_weight * slow_metric(z, TASK_IDS.tolist())
    fixed, divergence_of, dual_loss = z.detach(), None, None
    if args.divergence == "dual":
        share = uniform(batch.rew[..., None].shape)
        for other in batches:
            dual_loss, c_data = slow_dual_step(agent, opts[1], other, fixed, args, noise, share)

        def divergence_of(m, b, pi_act):
            return slow_fenchel(c_data[m, b], slow_net(agent.dual, batch.obs[m, b], pi_act, fixed[m])[0])

    sums = slow_actor_critic(agent, fixed, batch, args, args.entropy_weight, divergence_of)
    actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"] + args.entropy_weight * sums["logp"]
    gradients(metric, agent.encoder)
    gradients(sums["q"], agent.q)
    gradients(actor, agent.shift)
    if args.divergence == "primal":
        gradients(sums["behavior"], agent.behavior)
    opts[0].step()
    slow_multiplier_and_targets(agent, sums["divergence"], args)
    return {
        "losses/encoder": metric,
        "losses/q": sums["q"],
        "losses/actor": actor,
        **({"losses/behavior": sums["behavior"]} if dual_loss is None else {"losses/dual": dual_loss}),
        "stats/q_mean": sums["value"],
        "stats/divergence": sums["divergence"],
        "stats/brac_alpha": agent.brac_alpha,
        "z/between_std": np.mean([fixed[:, d].std().item() for d in range(args.z_dim)]),
    }


def uniform(shape):
    """Numbers in [0.1, 0.9] that stand for a uniform draw."""
    return 0.5 + pattern(shape) * 0.8 / 3


def assert_same_update(agent, twin, metrics, expected):
    """Metrics, gradients, parameters and buffers, or that there is no gradient."""
    assert metrics.keys() == expected.keys()
    for tag, value in metrics.items():
        assert value.shape == () and not value.requires_grad, tag
        assert value.item() == pytest.approx(float(expected[tag]), rel=1e-8), tag
    for name, parameter in agent.named_parameters():
        other = twin.get_parameter(name)
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            assert other.grad.abs().max() > 1e-6, name
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-10, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(parameter, other, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    for name, buffer in agent.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-9, atol=0, msg=lambda m: f"{name}: {m}")


CASES = [{}, {"entropy_weight": 0.3}]
CASES += [{"divergence": "dual", "gp_mode": mode} for mode in ("gradient", "output")]
CASES += [{"divergence": "dual", "dual_iters": 1, "entropy_weight": 0.3}]


@pytest.mark.parametrize("case", CASES)
def test_two_updates_are_those_of_a_slow_recomputation(case, known_noise, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: uniform(x.shape))
    agent, args = make_agent(**case)
    twin = copy.deepcopy(agent)
    draws = args.dual_iters if args.divergence == "dual" else 1
    trained = [p for name, p in twin.named_parameters() if p.requires_grad and not name.startswith("dual")]
    opts = [torch.optim.Adam(trained, args.lr)]
    if args.divergence == "dual":
        opts.append(torch.optim.Adam(twin.dual.parameters(), args.dual_lr))
    for k in range(2):
        context, batches = make_context(k), [make_batch(3 * k + i) for i in range(draws)]
        expected = slow_update(twin, opts, context, batches, args)
        metrics = focal.update(agent, TASK_IDS, context, batches[0], batches[1:], args)
        assert_same_update(agent, twin, metrics, expected)
