"""focal.py: whole updates against a slow recomputation, test vectors of its losses, the data it trains on, learning.

The slow update goes through tasks and transitions one by one in float64; of the script it uses the parameters alone.
"""

import contextlib
import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, OnDevice, origin, pattern, slow_net, to_meta
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.utils.flop_counter import flop_registry

import data_collect as dc
import focal

DATA = SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9)
TASK_IDS = torch.tensor([4, 7, 4, 2])
# float32, in which the optimizers keep them, holds these learning rates exactly
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "gp_weight": 2.5, "dual_lr": 2**-5, "brac_alpha": 1.75, "brac_alpha_lr": 0.3}
METHOD |= {"divergence_target": 0.2, "brac_alpha_max": 100.0, "n_step": 3}


def make_agent(data=DATA, **changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = focal.Args(**METHOD | changes)
    torch.manual_seed(0)
    agent = focal.Agent(data, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
        for net in (agent.q, agent.q_target, agent.dual if args.divergence == "dual" else agent.q):
            net.w_3.sub_(net.w_3.mean(1, keepdim=True))  # values of both signs, now the one twin smaller, now the other
            net.b_3.zero_()
        if args.divergence == "dual":
            agent.dual.w_3.mul_(3)  # slopes on both sides of 1
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


def make_segment(seed, args, tasks=len(TASK_IDS), size=4):
    """Segments of 1 to n_step transitions, every other one of which the task itself ended; the last one is repeated."""
    number, step = torch.arange(tasks * size).reshape(tasks, size), torch.arange(args.n_step)
    length = 1 + number % args.n_step
    pick = number[..., None] * args.n_step + torch.minimum(step, length[..., None] - 1)
    batch = make_batch(seed, tasks, size * args.n_step)
    parts = (x.flatten(0, 1)[pick] for x in batch[:4])
    weight = args.gamma ** step.double() * (step < length[..., None])
    return dc.Segment(*parts, weight, args.gamma ** length.double() * (number % 2))


def start(segment):
    """The first transitions -> Batch without `term`."""
    return dc.Batch(*(x[:, :, 0] for x in segment[:4]), None)


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


def slow_target(agent, z, obs, rewards, terminated, args, entropy_weight, noise):
    """The rewards of a segment [n], then the value at the obs after them -> scalar. With an entropy, the next action is
    a sample whatever target_noise says."""
    policy, _ = slow_policy(agent, obs, z)
    act = torch.tanh(policy.mean + policy.stddev * noise * (1.0 if entropy_weight else args.target_noise))
    value = min(slow_net(agent.q_target, obs, act, z, member=e)[0] for e in range(2))
    if entropy_weight:
        value = value - entropy_weight * slow_logp(policy, act)
    target = 0.0 if terminated else value.detach()
    for rew in reversed(rewards):
        target = args.reward_scale * rew + args.gamma * target
    return target


def slow_actor_critic(agent, z, segment, best, args, entropy_weight, divergence_of=None):
    """Losses of critics, behavior policy and policy at fixed z [M, z_dim] -> dict of sums with graph. divergence_of:
    (m, b, action of the policy) -> estimate in place of the closed form."""
    tasks, size, _ = segment.rew.shape
    noise, sums = pattern(best.act.shape), dict.fromkeys(("q", "behavior", "divergence", "value", "logp"), 0.0)
    for m in range(tasks):
        for b in range(size):
            obs, act, _, _, _ = (x if x is None else x[m, b] for x in start(segment))
            end = int((segment.weight[m, b] > 0).sum())
            way = segment.next_obs[m, b, end - 1], list(segment.rew[m, b, :end]), segment.bootstrap[m, b] == 0
            target = slow_target(agent, z[m], *way, args, entropy_weight, noise[m, b])
            for e in range(2):
                sums["q"] += (slow_net(agent.q, obs, act, z[m], member=e)[0] - target) ** 2
            policy, behavior = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b])
            sums["value"] += min(slow_net(agent.q, obs, pi_act, z[m], member=e)[0] for e in range(2))
            if entropy_weight:
                sums["logp"] += slow_logp(policy, pi_act)
            if behavior is not None:
                _, fitted = slow_policy(agent, best.obs[m, b], z[m])
                sums["behavior"] -= slow_logp(fitted, best.act[m, b].clamp(-0.999, 0.999))
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


def slow_update(agent, opts, context, segment, best, more, args):
    """One update of a copy of the agent by optimizers of its own -> metrics."""
    batch, noise = start(segment), pattern(best.act.shape)
    z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
    metric = args.metric_weight * slow_metric(z, TASK_IDS.tolist())
    fixed, divergence_of, dual_loss = z.detach(), None, None
    if args.divergence == "dual":
        share = uniform(batch.rew[..., None].shape)
        for other in (batch, *more):
            dual_loss, c_data = slow_dual_step(agent, opts[1], other, fixed, args, noise, share)

        def divergence_of(m, b, pi_act):
            return slow_fenchel(c_data[m, b], slow_net(agent.dual, batch.obs[m, b], pi_act, fixed[m])[0])

    sums = slow_actor_critic(agent, fixed, segment, best, args, args.entropy_weight, divergence_of)
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
        "z/between_std": sum(fixed[:, d].std() for d in range(args.z_dim)) / args.z_dim,
    }


def uniform(shape):
    """Numbers in [0.1, 0.9] that stand for a uniform draw."""
    return 0.5 + pattern(shape) * 0.8 / 3


def assert_same_update(agent, twin, metrics, expected):
    """Metrics, gradients, parameters and buffers, or that there is no gradient."""
    assert metrics.keys() == expected.keys()
    for tag, value in metrics.items():
        assert value.shape == () and not value.requires_grad, tag
        assert value.item() == pytest.approx(expected[tag].item(), rel=1e-7, abs=1e-7), tag
    for name, parameter in agent.named_parameters():
        other = twin.get_parameter(name)
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            assert (other.grad != 0).any() or name == "encoder.log_var", name  # without noise nothing moves unicorn's
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(parameter, other, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    for name, buffer in agent.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-9, atol=0, msg=lambda m: f"{name}: {m}")


@contextlib.contextmanager
def decaying(behavior, args):
    """In its block pi_beta (or None) takes a step of Adam; after it, the weight decay of the weights from before."""
    params = [] if behavior is None else list(behavior.parameters())
    decay = [args.lr * args.behavior_decay * p.detach() for p in params]
    yield
    for parameter, amount in zip(params, decay):
        parameter.data -= amount


CASES = [{}, {"target_noise": 0.5}, {"target_noise": 1.0, "n_step": 1}, {"entropy_weight": 0.3}]
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
        more = [make_batch(10 * k + i) for i in range(draws - 1)]
        inputs = make_context(k), make_segment(100 + k, args), make_batch(200 + k), more
        with decaying(twin.behavior, args):
            expected = slow_update(twin, opts, *inputs, args)
        metrics = focal.update(agent, TASK_IDS, *inputs, args)
        assert_same_update(agent, twin, metrics, expected)


def test_inputs_of_the_slow_recomputation_tell_alternatives_apart():
    """Twins differ in both directions, slopes lie on both sides of 1."""
    agent, args = make_agent()
    dual, _ = make_agent(divergence="dual")
    batch, other = start(make_segment(100, args)), make_batch(0)
    z = torch.stack([slow_embedding(agent.encoder, rows) for rows in make_context(0)])
    with torch.no_grad():
        for q in (agent.q, agent.q_target):
            assert 0 < (q(batch.obs, batch.act, z)[0] < q(batch.obs, batch.act, z)[1]).double().mean() < 1
    act = other.act.requires_grad_()
    c = dual.dual(other.obs, act, z)[0]
    (gradient,) = torch.autograd.grad(c.sum(), act)
    for slope in (c, -c, gradient.norm(dim=-1)):
        assert 0 < (slope > 1).double().mean() < 1


@pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
def test_multiplier_keeps_to_its_bounds(target, expected):
    agent, args = make_agent(brac_alpha_lr=1e4, brac_alpha_max=3.0, divergence_target=target)
    focal.update(agent, TASK_IDS, make_context(0), make_segment(0, args), make_batch(0), [], args)
    assert agent.brac_alpha == expected


def check_clamps(agent, expected):
    """expected: (log_std of the behavior policy or None, of the policy) where both networks ask for -9, and for 9."""
    for sign, (of_behavior, of_policy) in zip((-1, 1), expected):
        with torch.no_grad():
            for net in (agent.shift, agent.behavior):
                if net is not None:
                    net.w_3.zero_()
                    net.b_3.fill_(9.0 * sign)
        mean, log_std, _, log_std_b = agent.policies(torch.randn(4, 5, 3).double(), torch.randn(4, 3).double())
        assert (log_std == of_policy).all() and (mean == (9 if log_std_b is None else 18) * sign).all()
        assert log_std_b is None or (log_std_b == of_behavior).all()


@pytest.mark.parametrize("divergence, expected", [("primal", [(-3, -5), (1, 2)]), ("dual", [(None, -5), (None, 2)])])
def test_log_std_is_clamped(divergence, expected):
    check_clamps(make_agent(divergence=divergence)[0], expected)


# ---- networks ---------------------------------------------------------------------------


def test_networks_have_the_asked_sizes_and_start_as_linear_layers_do():
    """The last layer of both policies all but at 0; the targets at the critics, which differ."""
    args = focal.Args(**METHOD | {"width": 64, "encoder_width": 48, "z_dim": 5, "divergence": "dual"})
    agent = focal.Agent(DATA, args)
    assert [tuple(layer.weight.shape) for layer in agent.encoder.net[::2]] == [(48, 9), (48, 48), (5, 48)]
    for net, in_dim, out_dim in ((agent.q, 10, 1), (agent.dual, 10, 1), (agent.shift, 8, 4)):
        members = 2 if net is agent.q else 1
        layers = [(torch.cat([net.w_x, net.w_z], 1), in_dim), (net.b_1, in_dim), (net.w_2, 64), (net.b_2, 64)]
        layers += [] if net is agent.shift else [(net.w_3, 64)]
        for parameter, fan_in in layers:
            assert 0.8 < parameter.abs().max() * math.sqrt(fan_in) <= 1 and len(parameter) == members
        assert net.w_2.shape[1:] == (64, 64) and net.w_3.shape[1:] == (64, out_dim)
    primal = focal.Agent(DATA, focal.Args(**METHOD))
    for net in (agent.shift, primal.shift, primal.behavior):
        assert 8e-4 < net.w_3.abs().max() <= 1e-3 and 0 < net.b_3.abs().max() <= 1e-3
    for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
        assert torch.equal(target, source) and not target.requires_grad and not torch.equal(source[0], source[1])


def test_encoder_is_the_mean_of_the_tanh_not_the_tanh_of_the_mean():
    encoder = focal.Encoder(2, 2, 4)
    encoder.net = torch.nn.Identity()
    z = encoder(torch.tensor([[[0.0, 1.0], [1.0, -1.0], [2.0, 0.0]]]), torch.ones(1, 3))
    np.testing.assert_allclose(z.detach(), [[0.57520725, 0.0]], atol=1e-7)


@pytest.mark.parametrize("explore", [False, True])
def test_adapted_policy_is_the_mean_action_at_the_embedding_of_the_real_transitions(explore):
    agent, _ = make_agent()
    context, obs = make_context(0), torch.randn(4, DATA.obs_dim).double()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
    agent.z_mean.copy_(vectors(0.3, -0.2, 0.7))
    act = focal.adapt(agent, context, mask, explore)(obs, torch.zeros(4))
    z = focal.embed(agent, context, mask)
    assert not z.requires_grad
    for row in range(4):
        rows = context[row][mask[row] == 1]
        expected = slow_embedding(agent.encoder, rows) if len(rows) else agent.z_mean
        torch.testing.assert_close(z[row], expected)
        torch.testing.assert_close(act[row], torch.tanh(slow_policy(agent, obs[row], expected)[0].mean))
    assert (focal.embed(agent, context[:, :0], mask[:, :0]) == agent.z_mean).all()


# ---- vectors of the losses --------------------------------------------------------------


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


Z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))


@pytest.mark.parametrize(
    "z, tasks, expected",
    [
        (Z, [0, 0, 1, 1], 1.2531530948),
        (Z, [7, 7, 7, 7], 0.6504137931),
        (Z, [0, 1, 2, 3], 3.5162509533),
        (torch.zeros(2, 2).double(), [0, 0], 0.0315911854),
        (torch.zeros(2, 2).double(), [0, 1], 9.99000999),
        (vectors((1, 1, 1), (-1, -1, -1)), [0, 1], 0.2436587802),
        (Z[:1], [0], 0.0),
        (torch.tanh(torch.arange(18).double().reshape(6, 3) / 6 - 1.5), [0, 0, 1, 1, 2, 2], 1.8120708194),
    ],
)
def test_metric_loss_vectors(z, tasks, expected):
    assert focal.metric_loss(z, torch.tensor(tasks)).item() == pytest.approx(expected, abs=1e-9)


def test_metric_loss_gradient_vector():
    z = Z.clone().requires_grad_()
    focal.metric_loss(z, torch.tensor([0, 0, 1, 1])).backward()
    expected = [(-0.44279577, -0.15699438), (-0.66043361, -0.946235), (0.15699438, 0.44279577), (0.946235, 0.66043361)]
    np.testing.assert_allclose(z.grad, expected, atol=1e-8)


@pytest.mark.parametrize(
    "c_data, c_policy, expected",
    [(0, 0, -0.0596600867), (1, -1, -1.473978031), (-1, 1, 0.9592522006), (math.log(math.e - 1),) * 2 + (1e-8,)],
)
def test_dual_divergence_vectors(c_data, c_policy, expected):
    value = focal.dual_divergence(*vectors(c_data, c_policy))
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_dual_divergence_gradient_and_batch_vectors():
    c_data, c_policy = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    focal.dual_divergence(c_data, c_policy).backward()
    assert c_policy.grad.item() == pytest.approx(0.72134751, abs=1e-7) and c_data.grad.item() == -0.5
    mean = focal.dual_divergence(vectors(0, 1, -1), vectors(0.5, -0.5, 2)).mean()
    assert mean.item() == pytest.approx(0.2207858917, abs=1e-9)


@pytest.mark.parametrize("mode, value, expected", [("gradient", None, 80), ("output", -2.0, 5), ("output", 0.5, 0)])
def test_slope_penalty_vectors(mode, value, expected):
    def critic(obs, act, z):  # its slope is 5 everywhere, or its value is given
        return (3 * act[..., 0] + 4 * act[..., 1] if value is None else torch.full(act.shape[:2], value))[None]

    penalty = focal.slope_penalty(critic, None, torch.randn(2, 3, 2).double(), None, mode)
    assert 5 * penalty.item() == pytest.approx(expected, abs=1e-6)


def test_tanh_gaussian_logp_vector_and_bounds():
    mean, std, pre = vectors([0.3], [0.5], [0.8])
    assert focal.tanh_gaussian_logp(mean, std.log(), pre).item() == pytest.approx(-0.1442842320, abs=1e-10)
    np.testing.assert_allclose(torch.tanh(focal.pre_tanh(vectors(-1, -0.5, 0.9985, 1))), [-0.999, -0.5, 0.9985, 0.999])


# ---- training ---------------------------------------------------------------------------

FAST = {"env": "point-robot", "device": "cpu", "width": 16, "encoder_width": 16, "z_dim": 3, "total_updates": 20}
FAST |= {"log_every": 20, "eval_every": 20, "save_every": 20, "final_episodes": 3, "meta_batch": 5, "batch_size": 8}
FAST |= {"context_size": 6, "lr": 1e-3, "dual_lr": 2e-3, "run_dir": "runs", "gamma": 0.5, "n_step": 3}
FAST |= {"anchor_share": 0.4}


def check_segments(segment, task_ids, args):
    """Of the rows' own tasks, those of a row of several episodes; as long and as discounted as asked."""
    assert segment.rew.shape == (*segment.bootstrap.shape, args["n_step"])
    task, episode, _ = origin(segment.rew)
    assert (task == task_ids[:, None, None]).all() and (episode != episode[:, :1]).any()
    powers = [args["gamma"] ** k for k in range(args["n_step"] + 1)]
    assert set(segment.weight.flatten().tolist()) <= {0, *powers[:-1]} and (segment.weight[..., 0] == 1).all()
    assert set(segment.bootstrap.flatten().tolist()) <= {0, *powers[1:]} and (segment.bootstrap == powers[-1]).any()


def check_best(batches, tasks, data, share):
    """batches of the tasks [M] of each update: all of their share of each task's transitions, those of its episodes of
    highest return."""
    seen, wanted = set(), set()
    for rew, task_ids in zip(batches, tasks):
        task, episode, step = origin(rew)
        assert (task == task_ids[:, None]).all()
        seen |= set(zip(*(x.flatten().tolist() for x in (task, episode, step))))
    for task in range(6):
        order = sorted(range(4), key=lambda episode: -data.episode_returns[task, episode])
        ranked = [(task, episode, step) for episode in order for step in range(data.lengths[task, episode])]
        wanted |= set(ranked[: math.ceil(share * len(ranked))])
    assert seen <= wanted and len(seen) > 0.9 * len(wanted)


def watched(monkeypatch, folder, path, **changes):
    """Train -> what each update was given, with the learning rates at that time, and the contexts of the evaluation."""
    monkeypatch.chdir(folder)
    updates, contexts, update, adapt = [], [], focal.update, focal.adapt

    def watch(agent, task_ids, context, segment, best, more, args):
        assert context.shape == (5, 6, 7) and len(more) == (args.dual_iters - 1 if args.divergence == "dual" else 0)
        rates = [float(opt.param_groups[0]["lr"]) for opt in (agent.opt, getattr(agent, "dual_opt", None)) if opt]
        given = {"task_ids": task_ids, "context": context, "segment": segment, "best": best, "more": more}
        updates.append(SimpleNamespace(**given, rates=rates))
        return update(agent, task_ids, context, segment, best, more, args)

    def watch_adapt(agent, context, mask, explore, clone=False):
        contexts.append(context[..., 4][mask == 1])  # rewards
        return adapt(agent, context, mask, explore, clone)

    monkeypatch.setattr(focal, "update", watch)
    monkeypatch.setattr(focal, "adapt", watch_adapt)
    result = focal.train(focal.Args(**FAST | {"dataset": str(path)} | changes))
    return updates, contexts, result


@pytest.mark.parametrize("changes", [{}, {"divergence": "dual", "dual_iters": 3, "total_updates": 10}])
def test_training_sees_training_tasks_and_every_row_its_own_task(
    changes, numbered, numbered_path, tmp_path, monkeypatch
):
    updates, contexts, _ = watched(monkeypatch, tmp_path, numbered_path, **changes)
    assert len(updates) == changes.get("total_updates", 20)
    drawn, episodes = torch.cat([u.task_ids for u in updates]), set()
    assert set(drawn.tolist()) == set(range(6))  # 6 to 8 are test tasks
    assert any(len(set(u.task_ids.tolist())) < 5 for u in updates)  # with replacement
    for u in updates:
        assert (u.context[..., 4] >= 0).all()
        task, episode, _ = origin(u.context[..., 4])
        assert (task == u.task_ids[:, None]).all() and (episode == episode[:, :1]).all()
        episodes |= set(episode[:, 0].tolist())
        check_segments(u.segment, u.task_ids, FAST)
        for rew in (batch.rew for batch in u.more):
            task, episode, _ = origin(rew)
            assert rew.shape == (5, 8) and (task == u.task_ids[:, None]).all() and (episode != episode[:, :1]).any()
        for one, other in zip([start(u.segment), *u.more], u.more):
            assert not torch.equal(one.rew, other.rew)
    assert episodes == {0, 1, 2, 3}
    if not changes:
        check_best([u.best.rew for u in updates], [u.task_ids for u in updates], numbered, FAST["anchor_share"])
    of_protocols = contexts[:20]  # one of each, but ten of online, five of np_online; then come those of pi_beta
    of_test, foreign, *_, of_training = of_protocols
    assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
    assert set(origin(of_training)[0].tolist()) == set(range(6))


def check_evaluation(script, agent, args, data, infer, nothing=None):
    """Returns of policy and behavior policy, and the critic's error, against those of slow policies and critics at
    z = infer(transitions of a context), without any `nothing`, by default the mean over the training episodes."""
    agent = agent.float()  # as the data
    if nothing is None:
        places = [(t, n) for t in data.train_ids for n in range(data.lengths.shape[1]) if data.lengths[t, n] > 0]
        nothing = sum(infer(data.episodes[t, n, : data.lengths[t, n], :-1]) for t, n in places) / len(places)

    def latents(context, mask):
        return [infer(rows[real == 1]) if real.any() else nothing for rows, real in zip(context, mask)]

    def slow_adapt(which, context, mask, explore):
        z = latents(context, mask)
        means = lambda obs: [slow_policy(agent, *row)[which].mean for row in zip(obs, z)]  # noqa: E731
        return lambda obs, rew: torch.tanh(torch.stack(means(obs))).detach()

    def slow_value(context, mask, obs):
        def of(obs, z):
            act = torch.tanh(slow_policy(agent, obs, z)[0].mean)
            return min(slow_net(agent.q, obs, act, z, member=e)[0] for e in range(2)) / args.reward_scale

        return torch.stack([torch.stack([of(o, z) for o in pair]) for pair, z in zip(obs, latents(context, mask))])

    traced = []
    expected = dc.evaluate(data, partial(slow_adapt, 0), ("train", "iid", "zero_shot"), 3, traced)
    expected |= dc.q_error(traced[1], slow_value, args.gamma)
    if agent.behavior is not None:
        clone = dc.evaluate(data, partial(slow_adapt, 1), ("iid",), 3)
        assert abs(clone["eval/iid/return"] - expected["eval/iid/return"]) > 0.1
        expected |= {tag.replace("iid", "clone"): value for tag, value in clone.items()}
    found = script.evaluate_all(agent, data, args, ("train", "iid", "zero_shot"), 3)
    assert {"z/nearest_task_acc", "z/probe_r2"} <= {tag for tag in found if tag.startswith("z/")}
    assert {tag: value for tag, value in found.items() if tag[:2] != "z/"} == pytest.approx(
        expected, rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("divergence", ["primal", "dual"])
def test_evaluation_is_that_of_slow_policies_and_critics(divergence, numbered):
    agent, args = make_agent(numbered, divergence=divergence)
    check_evaluation(focal, agent, args, numbered, partial(slow_embedding, agent.encoder))


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate_falls_in_the_second_half_and_that_of_the_dual_critic_stays(
    decay, numbered_path, tmp_path, monkeypatch
):
    changes = {"divergence": "dual", "dual_iters": 1, "total_updates": 8, "lr_decay": decay}
    updates, *_ = watched(monkeypatch, tmp_path, numbered_path, **changes)
    shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
    np.testing.assert_allclose([u.rates for u in updates], [(1e-3 * share, 2e-3) for share in shares], rtol=1e-6)


@pytest.mark.parametrize("wanted", [True, False])
def test_update_is_compiled_if_asked(wanted, numbered_path, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    watched(monkeypatch, tmp_path, numbered_path, compile=wanted, total_updates=1)
    assert compiled == [focal.update] * wanted


def test_compiled_dual_update_has_the_losses_of_the_plain_one():
    """Traced by torch.compile but for the dual critic, whose penalty differentiates twice."""
    found = []
    for update in (focal.update, torch.compile(focal.update, backend="aot_eager")):
        agent, args = make_agent(divergence="dual")
        torch.manual_seed(1)
        inputs = TASK_IDS, make_context(0), make_segment(0, args), make_batch(0), [make_batch(1)]
        found.append([update(agent, *inputs, args) for _ in range(2)][1])
    plain, compiled = found
    for tag, value in plain.items():
        assert compiled[tag].item() == pytest.approx(value.item(), rel=1e-6), tag


# GFLOP at the official sizes; the agent lies on "meta", where arithmetic costs nothing
COSTS = [({"encoder_width": 200, "z_dim": 20}, 13.8)]
COSTS += [({"divergence": "dual", "gp_mode": "output", "encoder_width": 64, "z_dim": 5}, 28.2)]
COSTS += [({"divergence": "dual", "gp_mode": "gradient", "encoder_width": 64, "z_dim": 5}, 33.8)]


@pytest.mark.parametrize("case, most_gflop", COSTS)
def test_update_stays_on_the_device_at_a_bounded_cost(case, most_gflop):
    class Counted(OnDevice):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func.overloadpacket in flop_registry:
                self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            return out

    args = focal.Args(**METHOD | {"width": 256} | case)
    agent = to_meta(focal.Agent(SimpleNamespace(obs_dim=27, act_dim=8, ctx_dim=63), args))
    rows = lambda *shape: torch.zeros(16, *shape, device="meta")
    batch = dc.Batch(rows(256, 27), rows(256, 8), rows(256), rows(256, 27), rows(256))
    segment = dc.Segment(*(x.unsqueeze(2) for x in batch[:4]), rows(256, 1), rows(256))
    more = [batch] * (args.dual_iters - 1) if args.divergence == "dual" else []
    with Counted() as cost:
        focal.update(agent, rows().long(), rows(200, 63), segment, batch, more, args)
    assert 0.8 * most_gflop < cost.flops / 1e9 <= most_gflop


def train_on_point_robot(script, folder, **changes):
    """On the shipped data: random -20.3, data -6.8, expert -4.7."""
    path = ROOT / "datasets" / "point-robot.npz"
    if not path.is_file():
        pytest.skip("datasets/point-robot.npz is not there: python data_collect.py --env point-robot makes it")
    settings = {"env": "point-robot", "dataset": str(path), "device": "cpu", "run_dir": str(folder)}
    settings |= {"width": 64, "encoder_width": 64, "batch_size": 16, "context_size": 20, "total_updates": 400}
    settings |= {"log_every": 200, "eval_every": 400, "save_every": 400, "lr": 3e-3, "reward_scale": 1.0, "n_step": 5}
    return script.train(script.Args(**settings | changes))


def check_learning(script, folder, **changes):
    """brac_alpha is so small that the critics could lead the policy away from the data. Four seeds of three scripts:
    policy -5.6 to -5.9, behavior policy -5.3 to -5.6, error of the critic -0.1 to -0.2."""
    result = train_on_point_robot(script, folder, brac_alpha=0.1, **changes)
    assert result["eval/iid/return"] > -6.2  # batches of other tasks -6.4, a flipped sign in the policy loss -19
    assert result["eval/clone/return"] > -5.8  # fitted to all of the data -6.1
    assert abs(result["eval/iid/q_error"]) < 0.5  # rewards of the segment alone 0.8, value at its first next_obs -1.7
    assert result["z/nearest_task_acc"] > 0.2 and result["z/probe_r2"] > 0.8  # chance 0.03, 0


def test_learns_point_robot_on_the_shipped_data(tmp_path):
    check_learning(focal, tmp_path)
