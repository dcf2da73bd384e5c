"""macaw.py: vectors of its equations, slow recomputations of update, adaptation and fine-tuning, where the rows come
from, schedules, learning.

The slow recomputations are loops over tasks and transitions in float64. They share only the parameters with the script.
Every task gets its own copies of z, U and u, moved by gradient descent, and torch differentiates through that."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, OnDevice, dataset_on_meta, pattern, stop_message, to_meta

import data_collect as dc
import macaw

SIZES = SimpleNamespace(obs_dim=3, act_dim=2, family=SimpleNamespace(horizon=10))
TASKS = 4
# settings that differ from 0, 1 and each other, so that a missing or misplaced one shows
METHOD = {"width": 8, "latent": 5, "head_width": 4, "inner_lr": 0.02, "adv_weight": 0.3, "policy_std": 0.4}
METHOD |= {"temperature": 1.3, "max_weight": 1.8, "tau": 0.3, "lr": 1e-3, "value_lr": 3e-3, "rate_lr": 7e-3}
SMALL = METHOD | {"env": "point-robot", "device": "cpu", "total_updates": 20, "log_every": 20, "eval_every": 20}
SMALL |= {"save_every": 20, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 12}


def make_args(**changes):
    return dc.resolve(macaw.Args(**METHOD | changes), macaw.ENV_DEFAULTS)


def make_agent(sizes=SIZES, dtype=torch.float64, seed=0, **changes):
    """An agent with a different inner rate for every tensor."""
    args = make_args(**changes)
    torch.manual_seed(seed)
    agent = macaw.Agent(sizes, args).to(dtype)
    with torch.no_grad():
        for net in (agent.value_net, agent.policy_net):
            net.rho.add_(0.5 * torch.randn_like(net.rho))
    return agent, args


def make_rows(count, seed, padded=False, one_end=False, dtype=torch.float64):
    """Random Rows of TASKS tasks; every third continues no return. padded: the second task's last rows are padding;
    one_end: all rows of a task are of one episode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(TASKS, *shape, dtype=dtype).normal_(generator=generator)

    obs, act, ret = normal(count, 3), normal(count, 2).clamp(-0.9, 0.9), normal(count)
    tail = normal(count).sigmoid() * (torch.arange(TASKS * count).reshape(TASKS, count) % 3 > 0)
    mask = torch.ones(TASKS, count, dtype=dtype)
    mask[1, -3:] = 0 if padded else 1
    return macaw.Rows(obs, act, ret, tail, mask, normal(1 if one_end else count, 3))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def weights_of(adv, max_weight=20.0):
    return macaw.awr_weights(adv[None], torch.ones_like(adv)[None], 1.0, max_weight)[0]


# ---- slow recomputation -----------------------------------------------------------------
#
# Rows of one task, without padding: (obs [n, obs_dim], act, return [n], discount [n], last_obs).


def slow_layer(w, x):
    out = len(w) // (x.shape[-1] + 1)
    matrix, bias = w[: x.shape[-1] * out], w[x.shape[-1] * out :]
    return x @ matrix.reshape(-1, out) + bias


def slow_hidden(weights, x):
    for w in weights[:3]:
        x = slow_layer(w, x).clamp(min=0)
    return x


def slow_value(weights, obs):
    return slow_layer(weights[3], slow_hidden(weights, obs))[..., 0]


def slow_mean(weights, obs):
    return torch.tanh(slow_layer(weights[3], slow_hidden(weights, obs)))


def slow_guess(weights, obs, act):
    h = slow_layer(weights[4], torch.cat([slow_hidden(weights, obs), act], -1)).clamp(min=0)
    return slow_layer(weights[5], h)[..., 0]


def slow_awr(adv, args):
    """Advantages [n] of one task -> weights [n]."""
    scaled = (adv - adv.mean()) / args.temperature / (adv.std() + 1e-8)
    return torch.tensor([min(math.exp(x), args.max_weight) for x in scaled.tolist()], dtype=torch.float64)


def slow_generate(params):
    return [U @ z + u for z, U, u in params]


def slow_parameters(net):
    return [(layer.z, layer.map, layer.offset) for layer in net.layers]


def slow_descend(net, loss, steps):
    """Gradient descent of one task on its own z, U and u -> adapted weights, loss before it."""
    params, rates, before = slow_parameters(net), torch.log1p(net.rho.exp()), None
    for _ in range(steps):
        found = loss(slow_generate(params))
        before = found if before is None else before
        flat = [p for layer in params for p in layer]
        grads = torch.autograd.grad(found, flat, create_graph=True, materialize_grads=True, allow_unused=True)
        grads = iter(grads)
        params = [[p - rate * next(grads) for p, rate in zip(layer, abc)] for layer, abc in zip(params, rates)]
    return slow_generate(params), before


def rows_of(rows, task):
    """Rows of the script -> those of one task."""
    obs, act, ret, tail, mask, last_obs = (x[task] for x in rows)
    real = mask > 0
    return obs[real], act[real], ret[real], tail[real], last_obs.expand_as(obs)[real]


def slow_advantages(value, rows):
    obs, _, ret, tail, last = rows
    return (ret + tail * slow_value(value, last) - slow_value(value, obs)).detach()


def slow_value_loss(weights, rows):
    return ((slow_value(weights, rows[0]) - rows[2]) ** 2).mean()


def slow_awr_loss(weights, rows, adv, args):
    logp = torch.distributions.Normal(slow_mean(weights, rows[0]), args.policy_std).log_prob(rows[1]).sum(1)
    return -(slow_awr(adv, args) * logp).mean()


def slow_adapt(agent, rows, steps):
    """The inner loop of one task -> adapted weights of value function and policy, its losses."""
    value, before = slow_descend(agent.value_net, lambda w: slow_value_loss(w, rows), steps)
    adv = slow_advantages(value, rows)

    def policy_loss(weights):
        loss = slow_awr_loss(weights, rows, adv, agent.args)
        if agent.args.adv_head:
            loss = loss + torch.log1p(agent.c.exp()) * ((slow_guess(weights, *rows[:2]) - adv) ** 2).mean()
        return loss

    policy, policy_before = slow_descend(agent.policy_net, policy_loss, steps)
    return value, policy, (before, slow_value_loss(value, rows), policy_before)


def slow_update(agent, inner, outer, args):
    """-> the loss whose gradient all parameters get, and what the update reports of the batch."""
    each, weights, advantages = [], [], []
    for task in range(len(inner.obs)):
        value, policy, losses = slow_adapt(agent, rows_of(inner, task), args.inner_steps)
        obs, _, ret, tail, last = rows = rows_of(outer, task)
        initial = slow_generate(slow_parameters(agent.value_net))
        blend = [(1 - args.tau) * w + args.tau * w_new for w, w_new in zip(initial, value)]
        target = (ret + tail * slow_value(blend, last)).detach()
        value_loss = ((slow_value(value, obs) - target) ** 2).mean()
        adv = slow_advantages(value, rows)
        each.append((*losses, value_loss, slow_awr_loss(policy, rows, adv, args)))
        weights += slow_awr(adv, args).tolist()
        advantages += adv.tolist()
    names = ("inner_value", "inner_value_after", "inner_policy", "value", "policy")
    losses = {f"losses/{name}": sum(of_tasks) / len(each) for name, of_tasks in zip(names, zip(*each))}
    report = {tag: loss.item() for tag, loss in losses.items()}
    report |= {"stats/weight_mean": np.mean(weights), "stats/weight_max": max(weights)}
    report["stats/capped"] = np.mean([w == args.max_weight for w in weights])
    report["stats/adv_std"] = np.std(advantages, ddof=1)
    return losses["losses/value"] + losses["losses/policy"], report


def slow_rates(agent):
    """What the update reports of inner rates and lambda."""
    report = {"stats/lambda": math.log1p(math.exp(agent.c.item()))} if agent.args.adv_head else {}
    for name, net in (("value", agent.value_net), ("policy", agent.policy_net)):
        rates = sorted(math.log1p(math.exp(rho)) for rho in net.rho.flatten().tolist())
        middle = (len(rates) - 1) // 2  # torch's median is the lower of the two in the middle
        report |= {f"stats/{name}_rate_{k}": rates[i] for k, i in (("min", 0), ("median", middle), ("max", -1))}
    return report


VARIANTS = [{}, {"inner_steps": 2}, {"adv_head": False}, {"weight_transform": False}, {"tau": 0.0}]
VARIANTS += [{"weight_transform": False, "inner_steps": 3}]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes) or "default")
def test_update_differentiates_through_descent_on_copied_parameters(changes):
    agent, args = make_agent(**changes)
    inner, outer = make_rows(9, 1, padded=True, one_end=True), make_rows(7, 2)
    loss, report = slow_update(agent, inner, outer, args)
    assert 0 < report["stats/capped"] < 1
    names, params = zip(*agent.named_parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    before = [p.detach().clone() for p in params]
    for parameter in params:  # gradients of an earlier update are not added to
        parameter.grad = torch.ones_like(parameter)
    found = macaw.update(agent, inner, outer, args)

    report |= slow_rates(agent)  # as after the step
    assert {tag: value.item() for tag, value in found.items()} == pytest.approx(report, abs=1e-7)
    assert not any(value.requires_grad or value.dim() for value in found.values())
    assert len(names) == (33 if args.adv_head else 26)
    for name, parameter, grad, old in zip(names, params, grads, before):
        if parameter.numel() == 0:  # z and U of a plain layer
            continue
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11, msg=name)
        rate = name.endswith("rho") or name == "c"
        lr = args.rate_lr if rate else args.lr if "policy" in name else args.value_lr
        stepped = old - lr * grad / (grad.abs() + 1e-8)  # Adam's first step, each group with its own rate
        torch.testing.assert_close(parameter.detach(), stepped, rtol=0, atol=1e-6, msg=name)
        assert grad.abs().max() > 1e-9, name


def test_head_rates_learn_from_the_second_step():
    for steps in (1, 2):
        agent, args = make_agent(inner_steps=steps)
        macaw.update(agent, make_rows(9, 1, one_end=True), make_rows(7, 2), args)
        assert (agent.policy_net.rho.grad[:4] != 0).all() and (agent.value_net.rho.grad != 0).all()
        assert ((agent.policy_net.rho.grad[4:] != 0) == (steps > 1)).all()


@pytest.mark.parametrize("changes", [{}, {"inner_steps": 2}, {"adv_head": False}], ids=str)
def test_update_and_adaptation_never_need_the_host(changes):
    agent, args = make_agent(dtype=torch.float32, **changes)
    inner, outer = (make_rows(n, n, dtype=torch.float32) for n in (9, 7))
    agent, inner, outer = to_meta(agent), *(macaw.Rows(*(x.to("meta") for x in rows)) for rows in (inner, outer))
    with OnDevice():
        metrics = macaw.update(agent, inner, outer, args)
        z = macaw.embed(agent, torch.empty(3, 20, 10, device="meta"), torch.empty(3, 20, device="meta"))
    assert all(value.device.type == "meta" for value in metrics.values()) and z.shape == (3, 16)


@pytest.mark.parametrize("kind, ends", [("episode", 1), ("buffer", 64)])
def test_drawing_never_needs_the_host(kind, ends, numbered, monkeypatch):
    agent, args = make_agent(numbered, torch.float32, env="point-robot", inner_rows=kind)
    table = macaw.Rows(*(x.to("meta") for x in macaw.label_data(agent, numbered)))

    def multinomial(weights, count, *_, **__):  # "meta" has none; with replacement CUDA's reads nothing
        assert weights.device.type == "meta" and weights.shape == (3, 4)
        return torch.zeros(3, count, dtype=torch.long, device="meta")

    monkeypatch.setattr(torch, "multinomial", multinomial)
    task_ids = torch.tensor([0, 2, 5]).to("meta")
    with OnDevice():
        inner, outer = macaw.draw_rows(dataset_on_meta(numbered), table, task_ids, args, None)
    assert inner.obs.shape == (3, args.context_size, 2) and outer.last_obs.shape == (3, args.batch_size, 2)
    assert inner.last_obs.shape == (3, ends, 2)


# ---- returns ----------------------------------------------------------------------------


def test_monte_carlo_vectors():
    ret, tail = macaw.monte_carlo(doubles(1, 2, 3), torch.ones(3).double(), doubles(0)[0], 0.99)
    np.testing.assert_allclose(ret, [5.9203, 4.97, 3.0], atol=1e-12)
    np.testing.assert_allclose(tail, [0.970299, 0.9801, 0.99], atol=1e-12)
    np.testing.assert_allclose(ret + 10 * tail, [15.62329, 14.771, 12.9], atol=1e-12)


def test_terminal_bootstrap_removes_the_time_index():
    rew = -torch.ones(200).double()
    ret, tail = macaw.monte_carlo(rew, torch.ones(200).double(), doubles(0)[0], 0.99)
    adv = ret - ret.mean()
    assert ret.mean().item() == pytest.approx(-57.13, abs=0.01) and ret.std().item() == pytest.approx(24.16, abs=0.01)
    weights = weights_of(adv)
    assert weights[-1].item() == pytest.approx(10.2117, abs=1e-3)
    assert weights[0].item() == pytest.approx(0.29526, abs=1e-4)
    assert (ret + tail * -100 + 100).abs().max() < 1e-9


def slow_labels(episode, length, ended, gamma):
    """Rows [H, ctx_dim] of one episode -> (obs, act, return, discount, last_obs) of its steps, returns unscaled."""
    obs, act, rew, next_obs = (x[:length] for x in episode.double().split([2, 2, 1, 2], -1))
    ret = [sum(gamma ** (s - t) * rew[s, 0] for s in range(t, length)) for t in range(length)]
    tail = [0.0 if ended else gamma ** (length - t) for t in range(length)]
    return obs, act, torch.stack(ret), doubles(*tail), next_obs[-1:].expand_as(obs)


def slow_table(data, gamma=0.9):
    """-> {(task, episode): labels}, returns divided by the training tasks' standard deviation, and that number."""
    table = {}
    for task, episode in (data.lengths > 0).nonzero().tolist():
        length = data.lengths[task, episode].item()
        rows = data.episodes[task, episode]
        table[task, episode] = slow_labels(rows[:, :-1], length, rows[length - 1, -1] == 1, gamma)
    std = torch.cat([ret for (task, _), (_, _, ret, *_) in table.items() if task in data.train_ids]).std()
    assert std > 100  # scaled or not makes a difference
    return {at: (obs, act, ret / std, *rest) for at, (obs, act, ret, *rest) in table.items()}, std


@pytest.mark.parametrize("bootstrap", [True, False])
def test_labels_match_a_loop_over_steps(numbered, bootstrap):
    data = copy.copy(numbered)
    data.train_ids = np.array([1, 2, 4, 5, 7, 8])  # test tasks in between
    data.train_tasks = torch.as_tensor(data.train_ids)
    agent, _ = make_agent(data, torch.float32, env="point-robot", terminal_bootstrap=bootstrap)
    table, (expected, std) = macaw.label_data(agent, data), slow_table(data)
    assert agent.return_std.item() == pytest.approx(std.item(), rel=1e-5)
    for (task, episode), (obs, act, ret, tail, last) in expected.items():
        *found, mask, last_obs = (x[task, episode, : len(obs)].double() for x in table)
        for x, y in zip([*found, last_obs], [obs, act, ret, tail * bootstrap, last]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert (mask == 1).all() and (table.mask[task, episode, len(obs) :] == 0).all()
    seen = torch.cat([labels[0] for (task, _), labels in expected.items() if task in data.train_ids])
    places = [k * (len(seen) - 1) // 7 for k in range(8)]  # evenly, from the first to the last
    torch.testing.assert_close(agent.probes.double(), seen[places])


def test_equal_returns_are_divided_by_one(numbered):
    data = copy.copy(numbered)
    data.episodes = data.episodes.clone()
    data.episodes[data.train_ids, ..., 4] = 0.0  # rewards; the test tasks keep theirs
    agent, _ = make_agent(data, torch.float32, env="point-robot")
    rows = macaw.label_data(agent, data)
    assert agent.return_std == 1 and rows.ret[data.test_ids].abs().max() == macaw.RETURN_LIMIT


# ---- advantage weights ------------------------------------------------------------------


def test_awr_weight_vectors():
    expected = [0.4795789, 0.6126889, 0.7827445, 4.3479038]
    found = weights_of(doubles(1, 2, 3, 10).requires_grad_())
    np.testing.assert_allclose(found, expected, atol=1e-6)  # numpy refuses a tensor with gradient


def test_weights_are_capped_from_above_only():
    adv = torch.zeros(100).double()
    adv[-1] = 1
    weights = weights_of(adv)
    assert weights[0].item() == pytest.approx(0.9048374, abs=1e-6) and weights[-1].item() == pytest.approx(20)
    assert weights_of(adv, max_weight=math.exp(3))[-1].item() == pytest.approx(20.0855369)
    assert weights_of(-adv)[-1] < 1e-4


@pytest.mark.parametrize("adv", [doubles(3, 3, 3), doubles(7)])
def test_equal_advantages_weigh_one(adv):
    assert (weights_of(adv) == 1).all()


def test_weights_ignore_scale_and_shift():
    adv = torch.linspace(-1, 2, 30).double().pow(3)
    torch.testing.assert_close(weights_of(5 * adv + 7), weights_of(adv), rtol=1e-6, atol=0)


def test_gaussian_logp_vector():
    mean, act = doubles(0, 0.5), doubles(0.2, 0.1)
    assert macaw.gaussian_logp(mean, act, 0.2).item() == pytest.approx(-1.1190012, abs=1e-6)
    each = [macaw.gaussian_logp(mean[k : k + 1], act[k : k + 1], 0.2).item() for k in (0, 1)]
    np.testing.assert_allclose(each, [0.1904994, -1.3095006], atol=1e-6)


def test_awr_alone_confuses_action_and_weight():
    def slope(act, weight):
        mean = doubles(0).requires_grad_()
        (grad,) = torch.autograd.grad(-weight * macaw.gaussian_logp(mean, doubles(act), 0.2), mean)
        return grad.item()

    assert slope(0.2, 1.0) == pytest.approx(-5) and slope(0.1, 2.0) == pytest.approx(-5)


# ---- generated layers -------------------------------------------------------------------


def small_net():
    net = macaw.Net([(2, 2)], 2, 1.0).double()
    with torch.no_grad():
        net.layers[0].z.copy_(doubles(1, -1))
        net.layers[0].map.copy_(torch.arange(12).reshape(6, 2) / 10)
        net.layers[0].offset.copy_(torch.arange(6) / 10)
        net.rho.fill_(math.log(math.expm1(0.1)))
    return net


def test_generated_layer_and_inner_step_vectors():
    net, x = small_net(), doubles([[1, 2]])
    weights = net.initial(1)
    np.testing.assert_allclose(weights[0][0].detach(), [-0.1, 0, 0.1, 0.2, 0.3, 0.4], atol=1e-7)
    np.testing.assert_allclose(net.layers[0](weights[0], x).detach(), [[[0.4, 0.8]]], atol=1e-7)
    (slope,) = torch.autograd.grad(net.layers[0](weights[0], x).sum(), net.layers[0].z)
    np.testing.assert_allclose(slope, [4.0, 4.8], atol=1e-6)
    weights, before = net.descend(lambda weights: net.layers[0](weights[0], x).sum((1, 2)), 1, 1)
    expected = [-0.456, -0.532, -0.916, -0.992, -0.76, -0.836]
    np.testing.assert_allclose(weights[0][0].detach(), expected, atol=1e-6)
    np.testing.assert_allclose(net.layers[0](weights[0], x).detach(), [[[-3.048, -3.352]]], atol=1e-6)
    assert before.item() == pytest.approx(1.2, abs=1e-6)


def test_scalar_step_vector_through_the_rates_softplus():
    net = macaw.Net([(1, 1)], 0, 0.1).double()  # plain: weights [w, bias]
    with torch.no_grad():
        net.rho.fill_(math.log(0.1))  # exact in double
        net.layers[0].offset.copy_(doubles(1, 0))

    def loss(weights):
        return (weights[0][:, :1] * doubles([1, 2]) - 2).pow(2).mean(1)

    (weights,), before = net.descend(loss, 1, 1)
    assert before.item() == pytest.approx(0.5) and weights[0, 0].item() == pytest.approx(1.0953102, abs=1e-7)
    outer = (weights[0, 0] - 3).pow(2)
    assert outer.item() == pytest.approx(3.6278433, abs=1e-6)
    in_w, in_rho = torch.autograd.grad(outer, (net.layers[0].offset, net.rho))
    assert in_w[0].item() == pytest.approx(-1.9940163, abs=1e-6)
    assert in_rho[0, 2].item() == pytest.approx(-0.3463072, abs=1e-6)


def test_rates_and_lambda_start_nearly_as_given():
    args = make_args(inner_lr=1e-3, adv_weight=0.01)
    agent = macaw.Agent(SIZES, args)
    for net in (agent.value_net, agent.policy_net):
        assert F.softplus(net.rho).tolist() == pytest.approx(np.full(net.rho.shape, 0.00099950033), rel=1e-5)
    assert F.softplus(agent.c).item() == pytest.approx(0.00995033, rel=1e-5)
    assert F.softplus(macaw.Agent(SIZES, make_args(adv_weight=0.0)).c) < 1e-7


def test_sizes_and_switches_of_the_networks():
    agent = macaw.Agent(SIZES, make_args(width=6, latent=7, head_width=4))
    trunk = [(3, 6), (6, 6), (6, 6)]
    assert [layer.shape for layer in agent.value_net.layers] == [*trunk, (6, 1)]
    assert [layer.shape for layer in agent.policy_net.layers] == [*trunk, (6, 2), (8, 4), (4, 1)]
    assert {len(layer.z) for net in (agent.value_net, agent.policy_net) for layer in net.layers} == {7}
    plain = macaw.Agent(SIZES, make_args(width=6, adv_head=False, weight_transform=False))
    assert [layer.shape for layer in plain.policy_net.layers] == [*trunk, (6, 2)] and plain.c is None
    assert {len(layer.z) for net in (plain.value_net, plain.policy_net) for layer in net.layers} == {0}


@pytest.mark.parametrize(
    "obs_dim, act_dim, policy, value",
    [(20, 6, 2_663_263, 2_262_901), (27, 8, 2_760_829, 2_333_601), (17, 6, 2_632_963, 2_232_601)],
)
def test_parameter_counts_of_the_default_sizes(obs_dim, act_dim, policy, value):
    sizes = SimpleNamespace(obs_dim=obs_dim, act_dim=act_dim, family=SIZES.family)
    agent = macaw.Agent(sizes, dc.resolve(macaw.Args(), macaw.ENV_DEFAULTS))
    groups = [opt.param_groups[0]["params"] for opt in (agent.policy_opt, agent.value_opt, agent.rate_opt)]
    assert [sum(p.numel() for p in group) for group in groups] == [policy, value, 31]
    assert [len(group) for group in groups] == [18, 12, 3]


def test_one_transition_changes_weights_beyond_rank_one():
    torch.manual_seed(0)
    net = macaw.Net([(20, 20)], 5, 1e-2).double()
    x, y = torch.randn(1, 1, 20).double(), torch.randn(1, 1, 20).double()

    def rank_of_change(rates):
        net.rho.data.copy_(torch.tensor(rates).clamp(min=1e-30).log())
        change = net.descend(lambda w: (net.layers[0](w[0], x) - y).pow(2).sum((1, 2)), 1, 1)[0][0] - net.initial(1)[0]
        return torch.linalg.matrix_rank(change[0, :400].view(20, 20).detach(), rtol=1e-9).item()

    assert rank_of_change([0, 0, 1e-2]) == 1 < rank_of_change([1e-2, 0, 0])


@pytest.mark.parametrize("latent", [100, 0])
def test_standard_deviations_of_initial_weights(latent):
    """A generated scalar output starts with ten times larger weights: z has the standard deviation 1 / out."""
    torch.manual_seed(0)
    shapes = [(20, 100), (100, 100), (100, 1)]
    net = macaw.Net(shapes, latent, 1e-3)
    weights = [w[0, : size * out] for w, (size, out) in zip(net.initial(1), shapes)]
    expected = [0.0583, 0.0583, 0.58] if latent else [1 / math.sqrt(3 * size) for size, _ in shapes]
    np.testing.assert_allclose([w.std().item() for w in weights], expected, rtol=0.25 if latent else 0.1)


# ---- where the rows come from -----------------------------------------------------------


@pytest.fixture
def batches(numbered, numbered_path, tmp_path, monkeypatch):
    """batches(**changes) -> list of (inner, outer) that the training hands to the update, and the agent."""
    monkeypatch.setattr(macaw, "evaluate_all", lambda *_: {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0})

    def collect(**changes):
        seen, agents = [], []

        def spy(agent, inner, outer, args):
            agents.append(agent)
            seen.append((inner, outer))
            return {"losses/value": torch.zeros(())}

        monkeypatch.setattr(macaw, "update", spy)
        macaw.train(macaw.Args(**SMALL | {"dataset": str(numbered_path), "run_dir": str(tmp_path)} | changes))
        assert len(seen) == 20
        return seen, agents[0]

    return collect


@pytest.mark.parametrize("kind", ["episode", "buffer"])
def test_training_rows_trace_to_tasks_and_episodes(kind, numbered, batches):
    """Inner rows of one episode and outer rows of the others, or both of all; with the labels of a slow loop."""
    expected, _ = slow_table(numbered)
    origin = {tuple(numbered.episodes[t, e, s, :2].tolist()): (t, e, s) for t, e in expected for s in range(20)}
    seen, tasks, inner_episodes, outer_episodes = batches(inner_rows=kind)[0], set(), set(), set()
    shared = 0  # transitions that are both inner and outer
    # several tasks in an update
    assert any(len({origin[tuple(row[0].tolist())][0] for row in inner.obs}) > 2 for inner, _ in seen)
    for inner, outer in seen:
        assert inner.obs.shape == (4, 12, 2) and outer.obs.shape == (4, 8, 2)
        for k in range(4):
            places = [[origin[tuple(obs)] for obs in rows.obs[k].tolist()] for rows in (inner, outer)]
            ((task,),) = {tuple({task for task, _, _ in found}) for found in places}  # both from one task
            mine, others = ({episode for _, episode, _ in found} for found in places)
            shared += len(set(places[0]) & set(places[1]))
            if kind == "episode":
                (episode,) = mine
                assert episode not in others
                length = len(expected[task, episode][0])
                for i, (_, _, step) in enumerate(places[0]):  # one in every twelfth of the episode
                    assert i * length // 12 <= step <= (i + 1) * length / 12
            for rows, found in zip((inner, outer), places):
                for i, at in enumerate(found):
                    _, act, ret, tail, last = (x[at[2]] for x in expected[at[:2]])
                    row = [x.expand(*rows.mask.shape, -1)[k, i] for x in (rows.act, rows.last_obs)]
                    for x, y in zip([*row, rows.ret[k, i], rows.tail[k, i]], [act, last, ret, tail]):
                        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
            tasks.add(task)
            inner_episodes |= mine
            outer_episodes |= others
        assert (inner.mask == 1).all() and (outer.mask == 1).all()
    assert tasks == set(numbered.train_ids) and inner_episodes == outer_episodes == {0, 1, 2, 3}
    assert (shared > 0) == (kind == "buffer")


def test_seed_decides_initialization_and_batches(batches, tmp_path):
    runs = [batches(seed=seed, run_dir=str(tmp_path / str(k))) for k, seed in enumerate((0, 0, 1))]
    drawn = [(agent.policy_net.layers[0].map, *(rows.obs for rows in seen[5])) for seen, agent in runs]
    for first, again, other in zip(*drawn):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_inner_episodes_and_outer_rows_are_uniform(numbered):
    agent, args = make_agent(numbered, torch.float32, env="point-robot", batch_size=200)
    table, task_ids = macaw.label_data(agent, numbered), torch.full((2000,), 2)
    steps = torch.arange(80.0).reshape(4, 20).expand(9, -1, -1)  # instead of the returns
    generator = torch.Generator().manual_seed(0)
    inner, outer = macaw.draw_rows(numbered, table._replace(ret=steps), task_ids, args, generator)
    first = torch.bincount(inner.ret[:, 0].long() // 20, minlength=4) / 2000
    np.testing.assert_allclose(first, 0.25, atol=0.04)
    lengths = numbered.lengths[2]
    for k, length in enumerate(lengths.tolist()):  # over the steps of the inner episode too
        rows = inner.ret[inner.ret[:, 0] // 20 == k].long() % 20
        share = torch.bincount(rows.flatten(), minlength=length) / rows.numel()
        np.testing.assert_allclose(share, 1 / length, atol=0.01)
    kept = outer.ret[inner.ret[:, 0] < 20].long()  # inner: episode 0
    share = torch.bincount(kept.flatten(), minlength=80).reshape(4, 20) / kept.numel()
    real = torch.arange(20) < lengths[:, None]
    real[0] = False
    np.testing.assert_allclose(share, real / real.sum(), atol=0.005)


def test_buffer_rows_are_uniform_and_independent(numbered):
    agent, args = make_agent(numbered, torch.float32, batch_size=100, context_size=100, env="point-robot")
    args = replace(args, inner_rows="buffer")
    steps = torch.arange(80.0).reshape(4, 20).expand(9, -1, -1)  # instead of the returns
    table, task_ids = macaw.label_data(agent, numbered)._replace(ret=steps), torch.full((4000,), 2)
    inner, outer = macaw.draw_rows(numbered, table, task_ids, args, torch.Generator().manual_seed(0))
    real = torch.arange(20) < numbered.lengths[2][:, None]
    for rows in (inner, outer):
        share = torch.bincount(rows.ret.long().flatten(), minlength=80).reshape(4, 20) / rows.ret.numel()
        np.testing.assert_allclose(share, real / real.sum(), atol=0.003)
    drawn = [rows.ret[:, :99].flatten() for rows in (inner, outer)] + [inner.ret[:, 1:].flatten()]
    for other in drawn[1:]:
        assert abs(torch.corrcoef(torch.stack([drawn[0], other]))[0, 1]) < 0.01


def test_one_episode_is_refused_without_buffer_rows(numbered, numbered_path, tmp_path, monkeypatch):
    monkeypatch.setattr(macaw, "evaluate_all", lambda *_: {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0})
    data = copy.copy(numbered)
    data.lengths, data.min_episodes = data.lengths * (torch.arange(4) < 1), 1
    monkeypatch.setattr(dc, "load_dataset", lambda *_: data)
    args = macaw.Args(**SMALL | {"dataset": str(numbered_path), "run_dir": str(tmp_path)})
    assert "two episodes of every training task" in stop_message(macaw.train, args)
    assert macaw.train(replace(args, inner_rows="buffer"))["step"] == 20


# ---- schedules and switches -------------------------------------------------------------


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rates_fall_in_the_second_half(decay, numbered_path, tmp_path, monkeypatch):
    rates = []

    def spy(agent, inner, outer, args):
        opts = (agent.policy_opt, agent.value_opt, agent.rate_opt)
        rates.append([opt.param_groups[0]["lr"] for opt in opts])
        return {"losses/value": torch.zeros(())}

    monkeypatch.setattr(macaw, "update", spy)
    monkeypatch.setattr(macaw, "evaluate_all", lambda *_: {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0})
    changes = {"dataset": str(numbered_path), "run_dir": str(tmp_path), "lr_decay": decay, "total_updates": 10}
    macaw.train(macaw.Args(**SMALL | changes))
    factors = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2] if decay else [1] * 10
    np.testing.assert_allclose(rates, np.outer(factors, [1e-3, 3e-3, 7e-3]), rtol=1e-6)


def test_evaluation_may_change_the_fine_tuning(numbered_path, tmp_path, monkeypatch):
    tuned = []
    quality = {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0}
    monkeypatch.setattr(macaw, "evaluate_all", lambda agent, data, args, *_: tuned.append(vars(args)) or dict(quality))
    args = macaw.Args(**SMALL | {"dataset": str(numbered_path), "run_dir": str(tmp_path)})
    args = replace(args, resume=macaw.train(args)["run_dir"], eval_only=True)
    changes = {"online_ft": 3, "ft_lr": 0.5, "ft_batch_size": 7, "ft_value_steps": 8, "ft_policy_steps": 9}
    macaw.train(replace(args, **changes))
    assert changes.items() <= tuned[-1].items()
    assert "--inner-steps 2" in stop_message(macaw.train, replace(args, inner_steps=2))


def test_discount_depends_on_the_family():
    assert make_args(env="point-robot").gamma == 0.9 and make_args(env="ant-dir").gamma == 0.99
    assert make_args(env="ant-dir", gamma=0.5).gamma == 0.5


# ---- adaptation -------------------------------------------------------------------------


def make_contexts(agent):
    """Three rows of two episodes each. Two episodes are whole, one ended, one was cut; the third row is empty
    -> context, mask, and per row the labelled steps."""
    context = torch.empty(3, 40, 7, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(3))
    context = F.pad(context, (0, 1))
    context[0, 27, -1] = 1
    mask, labels = torch.zeros(3, 40, dtype=torch.float64), []
    for row, lengths in enumerate([(20, 8), (5, 20), (0, 0)]):
        episodes = []
        for start, length in zip((0, 20), lengths):
            mask[row, start : start + length] = 1
            if length:
                episode = context[row, start : start + 20, :-1]
                episodes.append(slow_labels(episode, length, length == 8, agent.args.gamma))
        labels.append(scaled(episodes, agent.return_std))
    return context, mask, labels


def scaled(episodes, std):
    """Labels of several episodes -> rows of one task, returns divided by std; None without an episode."""
    if not episodes:
        return None
    obs, act, ret, tail, last = (torch.cat(x) for x in zip(*episodes))
    return obs, act, ret / std, tail, last


@pytest.fixture
def point_agent(numbered):
    agent, _ = make_agent(numbered, env="point-robot", inner_steps=2, gamma=0.9)
    agent.return_std.fill_(2.5)
    agent.probes.normal_(generator=torch.Generator().manual_seed(5))
    return agent


def slow_policy(agent, labels, steps):
    """Policy weights after `steps` on one context; initial without a transition."""
    initial = slow_generate(slow_parameters(agent.policy_net))
    return [w.detach() for w in (slow_adapt(agent, labels, steps)[1] if labels and steps else initial)]


@pytest.mark.parametrize("steps", [None, 0, 1, 3])
def test_adaptation_is_gradient_descent_on_the_context(steps, point_agent):
    before = {k: v.clone() for k, v in point_agent.state_dict().items()}
    context, mask, labels = make_contexts(point_agent)
    obs = context[:, 0, :2] + 0.3
    found = macaw.adapt(point_agent, context, mask, steps=steps)(obs, torch.zeros(3))
    weights = [slow_policy(point_agent, each, 2 if steps is None else steps) for each in labels]
    torch.testing.assert_close(found, torch.stack([slow_mean(w, o) for w, o in zip(weights, obs)]), rtol=0, atol=1e-6)
    assert not found.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in point_agent.state_dict().items())


def test_adaptation_continues_returns_as_training_does(numbered, monkeypatch):
    data, seen = copy.copy(numbered), []  # all its episodes are short: half of them ended, half were cut
    data.context_dim = data.ctx_dim + 1
    agent, _ = make_agent(data, torch.float32, env="point-robot")
    tail, inner_loop = macaw.label_data(agent, data).tail[data.test_ids].flatten(0, 1), macaw.inner_loop

    def spy(agent, rows, steps):
        seen.append(rows.tail)
        return inner_loop(agent, rows, steps)

    monkeypatch.setattr(macaw, "inner_loop", spy)
    dc.evaluate(data, partial(macaw.adapt, agent), ("iid",), 4)
    assert sorted(seen[0].tolist()) == sorted(tail.tolist()) and len({row[0] > 0 for row in tail.tolist()}) == 2
    dc.label_contexts(data, partial(macaw.embed, agent), data.test_ids)
    assert torch.equal(seen[1], tail)


def test_no_context_gives_the_initial_policy(point_agent):
    obs = doubles([0.1, 0.2], [1.0, -0.5])
    found = macaw.adapt(point_agent, torch.zeros(2, 0, 8).double(), torch.zeros(2, 0).double())(obs, None)
    weights = slow_policy(point_agent, None, 2)
    torch.testing.assert_close(found, torch.stack([slow_mean(weights, o) for o in obs]))


def test_embedding_holds_the_adapted_policys_actions(point_agent):
    context, mask, labels = make_contexts(point_agent)
    weights = [slow_policy(point_agent, each, 2) for each in labels]
    expected = [torch.cat([slow_mean(w, o) for o in point_agent.probes]) for w in weights]
    torch.testing.assert_close(macaw.embed(point_agent, context, mask), torch.stack(expected), rtol=0, atol=1e-6)


def test_exploration_adds_the_noise_of_the_policy(point_agent, known_noise):
    context, mask, _ = make_contexts(point_agent)
    obs = context[:, 0, :2]
    plain, noisy = (macaw.adapt(point_agent, context, mask, explore)(obs, None) for explore in (False, True))
    expected = plain + 0.4 * pattern(plain.shape)
    assert expected.abs().max() < 1  # another test has the bounds
    torch.testing.assert_close(noisy, expected)


def test_noise_stays_in_bounds_and_repeats(point_agent):
    point_agent.args = replace(point_agent.args, policy_std=50.0)
    context, mask, _ = make_contexts(point_agent)
    policies = [macaw.adapt(point_agent, context, mask, True) for _ in range(2)]
    acts = [[policy(context[:, 0, :2], None) for _ in range(3)] for policy in policies]
    assert all(act.abs().max() == 1 for act in acts[0])
    assert not torch.equal(acts[0][0], acts[0][1]) and all(torch.equal(a, b) for a, b in zip(*acts))


def test_last_evaluation_adds_steps_and_tuning(numbered, monkeypatch):
    agent, args = make_agent(numbered, torch.float32, env="point-robot", inner_steps=5, online_ft=4)

    def evaluate(data, adapt, protocols, episodes):
        assert data is numbered and adapt.func is macaw.adapt and adapt.args == (agent,) and episodes == 3
        steps = adapt.keywords.get("steps", 5)
        assert protocols == ("iid",) or "steps" not in adapt.keywords
        return {f"eval/{protocol}/return": 100.0 * (protocol == "zero_shot") + steps for protocol in protocols}

    monkeypatch.setattr(dc, "evaluate", evaluate)
    monkeypatch.setattr(dc, "embedding_quality", lambda data, embed: {"z": (embed.func, embed.args)})
    monkeypatch.setattr(macaw, "fine_tune", lambda *given: {"tuned": given})
    quality = {"z": (macaw.embed, (agent,))}
    found = macaw.evaluate_all(agent, numbered, args, ("iid", "train"), 3)
    assert found == {"eval/iid/return": 5, "eval/train/return": 5} | quality
    found = macaw.evaluate_all(agent, numbered, args, dc.PROTOCOLS, 3)
    assert [found[f"adapt/return_{k}_steps"] for k in (0, 1, 5, 20)] == [105, 1, 5, 20]
    assert found["tuned"] == (agent, numbered, args) and found["z"] == quality["z"]
    assert "tuned" not in macaw.evaluate_all(agent, numbered, replace(args, online_ft=0), dc.PROTOCOLS, 3)


# ---- online fine-tuning -----------------------------------------------------------------


class Simulation:
    """Replaces TaskEnv and rollout: known episodes, two of them short, and a record of every policy's actions at `obs`,
    one row per task."""

    def __init__(self, tasks):
        self.tasks, self.plays, self.obs = tasks, [], pattern((tasks, 2)) / 2

    def env(self, family, params, tasks):
        assert list(tasks) == [6, 7, 8]
        return SimpleNamespace(close=lambda: None)

    def rollout(self, env, policy, seeds, device, standardize):
        generator = torch.Generator().manual_seed(len(self.plays))
        episode = {
            "observations": torch.empty(self.tasks, 21, 2, dtype=torch.float64).normal_(generator=generator).numpy(),
            "actions": torch.empty(self.tasks, 20, 2, dtype=torch.float64).uniform_(-1, 1, generator=generator).numpy(),
            "rewards": torch.empty(self.tasks, 20, dtype=torch.float64).normal_(generator=generator).numpy(),
            "lengths": np.array([20, 11, 14]),
            "terminated": np.array([False, True, False]),
            "diverged": np.zeros(self.tasks, bool),
        }
        with torch.no_grad():
            self.plays.append((policy(standardize(self.obs), None), list(seeds), episode))
        return episode | {"observations": standardize(torch.as_tensor(episode["observations"])).numpy()}


@pytest.fixture
def simulation(numbered, monkeypatch):
    simulation = Simulation(len(numbered.test_ids))
    monkeypatch.setattr(dc, "TaskEnv", simulation.env)
    monkeypatch.setattr(dc, "rollout", simulation.rollout)
    return simulation


def picks(mask, count):
    """Replaces the random draw of real rows: count columns of each row of mask."""
    real = [row.nonzero()[:, 0] for row in mask]
    return torch.stack([columns[(5 * torch.arange(count) + k) % len(columns)] for k, columns in enumerate(real)])


def slow_fine_tune(agent, data, simulation, args):
    """-> actions [tasks, 2] at simulation.obs before the first own episode and after each one's training."""
    acts = [[] for _ in data.test_ids]
    for k, task in enumerate(data.test_ids):
        length = data.lengths[task, 0].item()
        ended = data.episodes[task, 0, length - 1, -1] == 1
        labels = slow_labels(data.episodes[task, 0, :, :-1], length, ended, args.gamma)
        value, policy, _ = slow_adapt(agent, scaled([labels], agent.return_std), args.inner_steps)
        value, policy = ([w.detach().requires_grad_() for w in weights] for weights in (value, policy))
        value_opt, policy_opt = torch.optim.Adam(value, args.ft_lr), torch.optim.Adam(policy, args.ft_lr)
        obs, episodes = data.standardize(simulation.obs[k]), []
        acts[k].append(slow_mean(policy, obs).detach())
        for _, _, own in simulation.plays:
            length, states = own["lengths"][k], data.standardize(torch.as_tensor(own["observations"][k]))
            act, rew = torch.as_tensor(own["actions"][k]), torch.as_tensor(own["rewards"][k])
            rows = torch.cat([states[:-1], act, rew[:, None], states[1:]], 1)
            episodes.append(slow_labels(rows, length, own["terminated"][k], args.gamma))
            rows = scaled(episodes, agent.return_std)
            chosen = [(5 * i + k) % len(rows[0]) for i in range(args.ft_batch_size)]
            batch = tuple(x[chosen] for x in rows)
            for _ in range(args.ft_value_steps):
                value_opt.zero_grad()
                slow_value_loss(value, batch).backward()
                value_opt.step()
            for _ in range(args.ft_policy_steps):
                policy_opt.zero_grad()
                slow_awr_loss(policy, batch, slow_advantages(value, batch), args).backward()
                policy_opt.step()
            acts[k].append(slow_mean(policy, obs).detach())
    return torch.stack([torch.stack(each) for each in zip(*acts)])


def test_fine_tuning_steps_each_tasks_own_weights(numbered, simulation, known_noise, monkeypatch):
    changes = {"online_ft": 2, "ft_lr": 0.02, "ft_batch_size": 6, "ft_value_steps": 2, "ft_policy_steps": 3}
    agent, args = make_agent(numbered, env="point-robot", inner_steps=2, policy_std=0.8, **changes)
    agent.return_std.fill_(2.5)
    data = copy.copy(numbered)
    data.episodes = data.episodes.double()
    data.episodes[..., 4] /= 1000  # rewards
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    drawn = []

    def multinomial(mask, count, replacement, generator):
        assert replacement
        drawn.append(mask.sum(1).tolist())
        return picks(mask, count)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    results = macaw.fine_tune(agent, data, args)
    assert drawn == [[20, 11, 14]] * 5 + [[40, 22, 28]] * 5  # all own transitions, and only real ones
    (first, *_), (noisy, *_), (noisy_2, *_), (last, *_) = simulation.plays
    plays = simulation.plays
    assert results == {
        "online_ft/return_ep_0": pytest.approx(plays[0][2]["rewards"].sum(1).mean()),
        "online_ft/return_ep_2": pytest.approx(plays[3][2]["rewards"].sum(1).mean()),
    }
    assert len({tuple(seeds) for _, seeds, _ in plays}) == 3 and all(len(set(seeds)) == 3 for _, seeds, _ in plays)
    simulation.plays = plays[1:3]  # episodes with noise
    expected = slow_fine_tune(agent, data, simulation, args)
    noise = args.policy_std * pattern((3, 2))
    assert (expected[0] + noise).abs().max() > 1 > expected.abs().max()
    wanted = (expected[0], expected[0] + noise, expected[1] + noise, expected[2])
    for found, act in zip((first, noisy, noisy_2, last), wanted):
        torch.testing.assert_close(found, act.clamp(-1, 1), rtol=0, atol=1e-5)
    assert (expected[2] - expected[0]).abs().min() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())


def test_every_tenth_episode_is_evaluated(numbered, simulation, monkeypatch):
    changes = {"online_ft": 12, "ft_value_steps": 1, "ft_policy_steps": 1, "ft_batch_size": 4, "inner_lr": 1e-4}
    agent, args = make_agent(numbered, torch.float32, env="point-robot", **changes)
    simulation.obs = simulation.obs.float()
    rollout = simulation.rollout

    def single(*given):
        return {k: np.float32(v) if v.dtype == float else v for k, v in rollout(*given).items()}

    monkeypatch.setattr(dc, "rollout", single)
    assert list(macaw.fine_tune(agent, numbered, args)) == [f"online_ft/return_ep_{k}" for k in (0, 10, 12)]
    assert len(simulation.plays) == 12 + 3


# ---- learning ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_to_reach_goals_on_new_tasks(seed, tmp_path, monkeypatch):
    """point-robot: random -20, expert -4.7; the best policy without knowledge of the task about -15.5."""
    rows = []

    def evaluate(agent, data, args, protocols, episodes):
        tested = dc.evaluate(data, partial(macaw.adapt, agent), ("iid", "zero_shot"), 5)
        return tested | {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0}

    update = macaw.update
    monkeypatch.setattr(macaw, "update", lambda *given: rows.append(update(*given)) or rows[-1])
    monkeypatch.setattr(macaw, "evaluate_all", evaluate)
    changes = {"total_updates": 100, "save_every": 100, "eval_every": 100, "log_every": 100, "width": 32, "latent": 16}
    changes |= {"dataset": str(ROOT / "datasets" / "point-robot.npz"), "run_dir": str(tmp_path), "seed": seed}
    result = macaw.train(macaw.Args(env="point-robot", device="cpu", lr=3e-3, value_lr=3e-3, **changes))
    assert result["eval/iid/return"] > -7.5 and result["eval/zero_shot/return"] < -12
    names = ("inner_value", "inner_value_after", "value")
    inner, after, outer = (np.mean([row[f"losses/{name}"].item() for row in rows[-20:]]) for name in names)
    assert after < inner and outer < 0.3  # returns have standard deviation 1
