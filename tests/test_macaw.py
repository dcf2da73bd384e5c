"""macaw.py: returns, advantage weights, generated layers, the inner loop against its generic form, gradient routing,
batches, adaptation, whole runs of the variants, bad input."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stop_message

import data_collect as dc
import macaw

SIZES = SimpleNamespace(obs_dim=3, act_dim=2, family=SimpleNamespace(horizon=10))
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 20, "log_every": 10, "eval_every": 10}
SMALL |= {"save_every": 10, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 8}
SMALL |= {"width": 16, "latent": 6, "head_width": 8}


def make_agent(sizes=SIZES, dtype=torch.float64, **changes):
    settings = {"width": 8, "latent": 5, "head_width": 4, "inner_lr": 0.02, "adv_weight": 0.3}
    args = macaw.resolve(macaw.Args(**settings | changes))
    torch.manual_seed(0)
    agent = macaw.Agent(sizes, args).to(dtype)
    agent.make_optimizer(args)
    return agent, args


def make_batches(tasks=4, sizes=((9, 1), (7, 7)), padded=True):
    """Inner and outer batch of random rows; in the inner one the last rows of the second task are padding."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.empty(*shape, dtype=torch.float64).normal_(generator=generator)

    batches = []
    for rows, episodes in sizes:
        obs, act, ret = normal(tasks, rows, 3), normal(tasks, rows, 2).clamp(-0.9, 0.9), normal(tasks, rows)
        tail, mask = normal(tasks, rows).sigmoid(), torch.ones(tasks, rows, dtype=torch.float64)
        batches.append((obs, act, ret, tail, normal(tasks, episodes, 3), mask))
    if padded:
        batches[0][-1][1, -3:] = 0
    return batches


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def weights_of(adv, **limits):
    return macaw.awr_weights(adv[None], torch.ones_like(adv)[None], **limits)[0]


# ---- returns ----------------------------------------------------------------------------


def test_monte_carlo_vectors():
    ret, tail = macaw.monte_carlo(doubles(1, 2, 3), torch.ones(3).double(), doubles(0)[0], 0.99)
    np.testing.assert_allclose(ret, [5.9203, 4.97, 3.0], atol=1e-12)
    np.testing.assert_allclose(tail, [0.970299, 0.9801, 0.99], atol=1e-12)
    np.testing.assert_allclose(ret + 10 * tail, [15.62329, 14.771, 12.9], atol=1e-12)


def test_monte_carlo_of_padded_and_terminated_episodes():
    rew = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]] * 2).double()
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]] * 2).double()
    ret, tail = macaw.monte_carlo(rew, mask, doubles(0, 1), 0.99)
    np.testing.assert_allclose(ret[:, :3], [[5.9203, 4.97, 3.0]] * 2, atol=1e-12)
    np.testing.assert_allclose(tail[:, :3], [[0.970299, 0.9801, 0.99], [0, 0, 0]], atol=1e-12)


def test_labels_of_a_dataset_are_those_of_its_contexts(walker):
    """Training knows where a task ended itself; adaptation infers it from the length of the episode."""
    agent, _ = make_agent(walker, torch.float32, env="walker-rand-params")
    mask = (torch.arange(200) < walker.lengths[..., None]).float()
    ended = walker.episodes[..., -1].amax(-1)
    assert 0 < ended.mean() < 1
    torch.testing.assert_close((mask.sum(-1) < 200).float()[walker.lengths > 0], ended[walker.lengths > 0])
    *_, tail, last_obs = agent.label(walker.episodes[..., :-1], mask, ended)
    assert ((tail == 0).all(-1) == (ended == 1)).all()
    task, episode = (walker.lengths > 0).nonzero()[0]
    length = walker.lengths[task, episode]
    next_obs = walker.unpack(walker.episodes)[3]
    assert torch.equal(last_obs[task, episode, 0], next_obs[task, episode, length - 1])


def test_without_the_terminal_bootstrap_the_returns_end_with_the_episode(tiny):
    agent, _ = make_agent(tiny, torch.float32, env="point-robot", terminal_bootstrap=False)
    table = macaw.label_data(agent, tiny)
    assert (table[3] == 0).all() and table[2].abs().max() > 0


def test_returns_have_unit_spread_over_the_training_tasks(tiny):
    agent, _ = make_agent(tiny, torch.float32, env="point-robot")
    table = macaw.label_data(agent, tiny)
    valid = torch.arange(20) < tiny.lengths[tiny.train_ids][..., None]
    assert table[2][tiny.train_ids][valid].std() == pytest.approx(1, abs=1e-5)
    assert len({tuple(row) for row in agent.probes.tolist()}) == 8


# ---- advantage weights ------------------------------------------------------------------


def test_awr_weight_vectors():
    expected = [0.4795789, 0.6126889, 0.7827445, 4.3479038]
    np.testing.assert_allclose(weights_of(doubles(1, 2, 3, 10)), expected, atol=1e-6)


def test_awr_weights_are_capped_from_above_only():
    adv = torch.zeros(100).double()
    adv[-1] = 1
    weights = weights_of(adv)
    assert weights[0].item() == pytest.approx(0.9048374, abs=1e-6) and weights[-1].item() == pytest.approx(20)
    assert weights_of(adv, max_weight=math.exp(3))[-1].item() == pytest.approx(20.0855369)
    assert weights_of(-adv)[-1] < 1e-4


@pytest.mark.parametrize("adv", [doubles(3, 3, 3), doubles(7)])
def test_awr_weights_of_equal_advantages_are_one(adv):
    assert (weights_of(adv) == 1).all()


def test_awr_weights_are_blind_to_scale_and_shift_and_padding():
    adv = torch.randn(30).double()
    torch.testing.assert_close(weights_of(5 * adv + 7), weights_of(adv), rtol=1e-6, atol=0)
    padded, mask = torch.cat([adv, 100 * torch.ones(5)]), torch.cat([torch.ones(30), torch.zeros(5)])
    torch.testing.assert_close(macaw.awr_weights(padded[None].double(), mask[None].double())[0, :30], weights_of(adv))


def test_the_terminal_bootstrap_removes_the_weight_of_the_time_index():
    rew = -torch.ones(200).double()
    ret, tail = macaw.monte_carlo(rew, torch.ones(200).double(), doubles(0)[0], 0.99)
    adv = ret - ret.mean()
    assert ret.mean().item() == pytest.approx(-57.13, abs=0.01) and ret.std().item() == pytest.approx(24.16, abs=0.01)
    weights = weights_of(adv)
    assert weights[-1].item() == pytest.approx(10.2117, abs=1e-3)
    assert weights[0].item() == pytest.approx(0.29526, abs=1e-4)
    assert (ret + tail * -100 + 100).abs().max() < 1e-9


def test_gaussian_logp_vector():
    mean, act = doubles(0, 0.5), doubles(0.2, 0.1)
    assert macaw.gaussian_logp(mean, act, 0.2).item() == pytest.approx(-1.1190012, abs=1e-6)
    each = [macaw.gaussian_logp(mean[k : k + 1], act[k : k + 1], 0.2).item() for k in (0, 1)]
    np.testing.assert_allclose(each, [0.1904994, -1.3095006], atol=1e-6)


def test_awr_alone_confuses_action_and_weight_and_the_advantage_loss_does_not():
    def gradient(act, weight, head):
        mean, guess = doubles(0).requires_grad_(), doubles(0).requires_grad_()
        loss = -weight * macaw.gaussian_logp(mean, doubles(act), 0.2) + head * (guess - math.log(weight)).pow(2)[0]
        return torch.autograd.grad(loss, (mean, guess), materialize_grads=True)

    one, two = gradient(0.2, 1.0, 0.0), gradient(0.1, 2.0, 0.0)
    assert one[0].item() == pytest.approx(-5) and two[0].item() == pytest.approx(-5) and one[1] == two[1]
    assert gradient(0.2, 1.0, 1.0)[1] != gradient(0.1, 2.0, 1.0)[1]


# ---- generated layers -------------------------------------------------------------------


def small_net(rate):
    net = macaw.Net([(2, 2)], 2, 1.0).double()
    with torch.no_grad():
        net.z[0].copy_(doubles(1, -1))
        net.map[0].copy_(torch.arange(12).reshape(6, 2) / 10)
        net.offset[0].copy_(torch.arange(6) / 10)
        net.rho.fill_(math.log(math.expm1(rate)))
    return net


def test_generated_layer_vector():
    net = small_net(0.1)
    weights = net.generate(1)
    np.testing.assert_allclose(weights[0][0].detach(), [-0.1, 0, 0.1, 0.2, 0.3, 0.4], atol=1e-7)
    np.testing.assert_allclose(net.layer(weights, 0, doubles([[1, 2]])).detach(), [[[0.4, 0.8]]], atol=1e-7)


def test_inner_step_vector():
    net, x = small_net(0.1), doubles([[1, 2]])
    weights, before = net.descend(lambda weights: net.layer(weights, 0, x).sum((1, 2)), 1, 1)
    expected = [-0.456, -0.532, -0.916, -0.992, -0.76, -0.836]
    np.testing.assert_allclose(weights[0][0].detach(), expected, atol=1e-6)
    np.testing.assert_allclose(net.layer(weights, 0, x).detach(), [[[-3.048, -3.352]]], atol=1e-6)
    assert before.item() == pytest.approx(1.2, abs=1e-6)
    (slope,) = torch.autograd.grad(net.layer(net.generate(1), 0, x).sum(), net.z[0])
    np.testing.assert_allclose(slope, [4.0, 4.8], atol=1e-6)


@pytest.mark.parametrize("first_order, dw, dr", [(False, -1.9940163, -0.3463072), (True, -3.8093796, -0.3463072)])
def test_scalar_step_vector_through_the_softplus_of_the_rate(first_order, dw, dr):
    net = macaw.Net([(1, 1)], 0, 0.1).double()  # plain: weights [w, bias]
    with torch.no_grad():
        net.rho.fill_(math.log(0.1))  # exact in double
        net.offset[0].copy_(doubles(1, 0))

    def loss(weights):
        return (weights[0][:, :1] * doubles([1, 2]) - 2).pow(2).mean(1)

    (weights,), before = net.descend(loss, 1, 1, first_order)
    assert before.item() == pytest.approx(0.5) and weights[0, 0].item() == pytest.approx(1.0953102, abs=1e-7)
    outer = (weights[0, 0] - 3).pow(2)
    assert outer.item() == pytest.approx(3.6278433, abs=1e-6)
    in_w, in_rho = torch.autograd.grad(outer, (net.offset[0], net.rho))
    assert in_w[0].item() == pytest.approx(dw, abs=1e-6) and in_rho[0, 2].item() == pytest.approx(dr, abs=1e-6)


def test_softplus_of_the_logarithm_is_the_rate_but_for_its_second_order():
    agent, _ = make_agent(inner_lr=1e-3, adv_weight=0.01)
    assert F.softplus(agent.value_net.rho)[0, 0].item() == pytest.approx(0.00099950033, rel=1e-5)
    assert F.softplus(agent.c).item() == pytest.approx(0.00995033, rel=1e-5)


@pytest.mark.parametrize(
    "obs_dim, act_dim, policy, value",
    [(20, 6, 2_663_263, 2_262_901), (27, 8, 2_760_829, 2_333_601), (17, 6, 2_632_963, 2_232_601)],
)
def test_parameter_counts(obs_dim, act_dim, policy, value):
    sizes = SimpleNamespace(obs_dim=obs_dim, act_dim=act_dim, family=SIZES.family)
    agent = macaw.Agent(sizes, macaw.resolve(macaw.Args()))
    agent.make_optimizer(agent.args)
    assert [sum(p.numel() for p in group) for group in agent.params[:2]] == [policy, value]
    assert [len(group) for group in agent.params] == [18, 12, 3]
    assert sum(rho.numel() for rho in agent.params[2]) == 31


def test_one_transition_moves_a_generated_layer_by_more_than_rank_one():
    torch.manual_seed(0)
    net = macaw.Net([(20, 20)], 5, 1e-2).double()
    x, y = torch.randn(1, 1, 20).double(), torch.randn(1, 1, 20).double()

    def rank_of_change(rates):
        net.rho.data.copy_(torch.tensor(rates).clamp(min=1e-30).log())
        change = net.descend(lambda w: (net.layer(w, 0, x) - y).pow(2).sum((1, 2)), 1, 1)[0][0] - net.generate(1)[0]
        return torch.linalg.matrix_rank(change[0, :400].view(20, 20).detach(), rtol=1e-9).item()

    assert rank_of_change([0, 0, 1e-2]) == 1 < rank_of_change([1e-2, 0, 0])


def test_initial_weights_have_the_spread_of_a_generated_layer():
    torch.manual_seed(0)
    net = macaw.Net([(20, 100), (100, 100), (100, 1)], 100, 1e-3)
    weights = [w[0, : size * out] for w, (size, out) in zip(net.generate(1), net.shapes)]
    np.testing.assert_allclose([w.std().item() for w in weights[:2]], 0.058, rtol=0.05)
    assert 0.4 < weights[2].std().item() < 0.8  # ten times that of a plain layer


def test_inner_loop_learns_to_tell_two_tasks_apart():
    """Returns 3 s and -3 s: no function fits both, one inner step on the right one does."""
    torch.manual_seed(0)
    net, sign = macaw.Net([(2, 16), (16, 16), (16, 16), (16, 1)], 10, 1e-2), torch.tensor([[3.0], [-3.0]])
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(400):
        inner, outer = torch.randn(2, 2, 32, 2)

        def loss(weights, rows):
            return (net(weights, rows)[0][..., 0] - sign * rows[..., 0]).pow(2).mean(1)

        weights, before = net.descend(lambda weights: loss(weights, inner), 2, 1)
        after = loss(weights, outer).mean()
        opt.zero_grad()
        after.backward()
        opt.step()
    assert after < 0.5 and after < before.mean() / 10


# ---- the inner loop against its generic form --------------------------------------------


def oracle_losses(agent, inner, outer, args):
    """Outer losses of value function and policy, task by task, by plain gradient descent on a full copy of z, U and u
    per task: the definition, vectorized by vmap."""
    nets = agent.value_net, agent.policy_net
    value_params, policy_params = ([list(net.z), list(net.map), list(net.offset)] for net in nets)

    def generate(params):
        return [(matrix @ z + offset)[None] for z, matrix, offset in zip(*params)]

    def descend(net, params, loss):
        rates = F.softplus(net.rho)
        for _ in range(args.inner_steps):
            grads = torch.func.grad(lambda params: loss(generate(params)))(params)
            if args.first_order:
                grads = [[grad.detach() for grad in kind] for kind in grads]
            moves = [[rate * grad for rate, grad in zip(*kind)] for kind in zip(rates.T, grads)]
            params = [[p - move for p, move in zip(*kind)] for kind in zip(params, moves)]
        return generate(params)

    def task_losses(inner, outer):
        inner, outer = ([x[None] for x in batch] for batch in (inner, outer))
        (obs, _, ret, _, _, mask), (out_obs, _, out_ret, out_tail, out_last, _) = inner, outer

        def value_loss(weights):
            return macaw.masked_mean((agent.value(weights, obs) - ret).pow(2), mask)[0]

        value = descend(agent.value_net, value_params, value_loss)
        blend = [(1 - args.tau) * w + args.tau * w_fast for w, w_fast in zip(generate(value_params), value)]
        target = (out_ret + out_tail * agent.value(blend, out_last)).detach()
        adv, out_adv = (agent.advantage(value, b, agent.value(value, b[0])).detach() for b in (inner, outer))
        loss = descend(agent.policy_net, policy_params, lambda w: agent.inner_policy_loss(w, inner, adv)[0])
        value_loss = (agent.value(value, out_obs) - target).pow(2).mean()
        return value_loss, agent.policy_loss(loss, outer, out_adv)[0]

    return torch.vmap(task_losses)(tuple(inner), tuple(outer))


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_steps": 3}, {"first_order": True}, {"first_order": True, "inner_steps": 2}]
    + [{"adv_head": False}, {"weight_transform": False, "inner_steps": 2}],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_update_equals_plain_gradient_descent_on_copies_of_all_parameters(changes, tau):
    agent, args = make_agent(tau=tau, **changes)
    inner, outer = make_batches()
    losses = [loss.mean() for loss in oracle_losses(agent, inner, outer, args)]
    names, params = zip(*agent.named_parameters())
    expected = torch.autograd.grad(sum(losses), params, materialize_grads=True, allow_unused=True)
    metrics = macaw.update(agent, inner, outer, args)
    assert metrics["losses/value"].item() == pytest.approx(losses[0].item(), abs=1e-10)
    assert metrics["losses/policy"].item() == pytest.approx(losses[1].item(), abs=1e-10)
    assert len(names) == (24 if not args.adv_head else 30) + 2 + args.adv_head
    for name, parameter, grad in zip(names, params, expected):
        found = torch.zeros_like(grad) if parameter.grad is None else parameter.grad
        assert (found - grad).abs().max().item() < 1e-10 if grad.numel() else True, name


# ---- gradient routing -------------------------------------------------------------------


def largest_gradients(agent, args, **batches):
    macaw.update(agent, *make_batches(**batches), args)
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in agent.named_parameters()}


def test_head_and_lambda_learn_through_the_second_order_alone():
    agent, args = make_agent()
    grads = largest_gradients(agent, args)
    head = [f"policy_net.{kind}.{layer}" for kind in ("z", "map", "offset") for layer in (4, 5)] + ["c"]
    assert min(grads.values()) > 0
    assert (agent.policy_net.rho.grad[4:] == 0).all() and (agent.policy_net.rho.grad[:4] != 0).all()
    agent, args = make_agent(first_order=True)
    grads = largest_gradients(agent, args)
    assert all(grads[name] == 0 for name in head)
    assert all(grad > 0 for name, grad in grads.items() if name not in head)


def test_rates_of_the_head_learn_from_the_second_inner_step_on():
    agent, args = make_agent(inner_steps=2)
    largest_gradients(agent, args)
    assert (agent.policy_net.rho.grad != 0).all()


def test_without_the_weight_lambda_the_head_changes_nothing():
    (one, args), (two, other_args) = make_agent(adv_weight=0.0), make_agent(adv_head=False)
    own = two.state_dict()
    two.load_state_dict(own | {k: v for k, v in one.state_dict().items() if k in own and v.shape == own[k].shape})
    batches = make_batches()
    loss, other = (macaw.update(agent, *batches, given) for agent, given in ((one, args), (two, other_args)))
    torch.testing.assert_close(loss["losses/policy"], other["losses/policy"], atol=1e-6, rtol=0)


def test_policy_loss_does_not_reach_the_value_function():
    agent, _ = make_agent()
    inner, outer = make_batches()
    value, policy, *_ = agent.inner_loop(inner, 1)
    loss = agent.policy_loss(policy, outer, agent.advantage(value, outer, agent.value(value, outer[0]))).sum()
    params = list(agent.value_net.parameters())
    assert all(grad is None for grad in torch.autograd.grad(loss, params, allow_unused=True))


def test_padded_rows_change_nothing():
    agent, _ = make_agent()
    inner, _ = make_batches()
    changed = [x.clone() for x in inner]
    for x in (changed[0], changed[1], changed[2], changed[3]):
        x[1, -3:] = 5.0
    for one, two in zip(agent.inner_loop(inner, 2)[:2], agent.inner_loop(changed, 2)[:2]):
        for a, b in zip(one, two):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- batches ----------------------------------------------------------------------------


def test_middle_segment_is_in_the_middle():
    assert [macaw.segment(1000, 100, part) for part in ("start", "middle", "end")] == [0, 450, 900]


PARTS = [("all", {0, 1, 2, 3, 4, 5, 6, 7}), ("start", {0, 1}), ("middle", {3, 4}), ("end", {6, 7})]


@pytest.mark.parametrize("part, allowed", PARTS)
def test_inner_and_outer_rows_are_disjoint_and_of_the_right_episodes(part, allowed, tiny):
    agent, args = make_agent(tiny, torch.float32, env="point-robot", inner_segment=part, context_size=20, batch_size=30)
    *_, last_obs = macaw.label_data(agent, tiny)
    count, horizon = tiny.lengths.shape[1], 20
    index = torch.arange(len(tiny.lengths) * count * horizon).view(len(tiny.lengths), count, horizon)
    table = [index[..., None], index, index, index, last_obs]
    generator, ids, seen = torch.Generator().manual_seed(0), torch.as_tensor(tiny.train_ids).repeat(40), set()
    inner, outer = macaw.sample(tiny, table, ids, args, generator)
    for k in range(len(ids)):
        episodes = [set((batch[2][k] // horizon).tolist()) for batch in (inner, outer)]
        assert len(episodes[0]) == 1 and not episodes[0] & episodes[1]
        assert {e // count for both in episodes for e in both} == {ids[k].item()}
        seen |= {e % count for e in episodes[0]}
        assert inner[2][k].unique().numel() == 20  # a context as long as the episode takes every row once
    assert seen == allowed
    assert inner[4].shape == (len(ids), 1, 2) and outer[4].shape == (len(ids), 30, 2)


# ---- adaptation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def point_agent(tiny):
    agent, _ = make_agent(tiny, torch.float32, env="point-robot", inner_lr=1e-3)
    macaw.label_data(agent, tiny)
    return agent


def context_of(data, tasks=(0, 1, 2), episodes=(0,)):
    context = torch.cat([data.episodes[list(tasks), e][..., :-1] for e in episodes], 1)
    return context, torch.ones(context.shape[:2])


def test_adaptation_leaves_the_initial_parameters_alone_and_no_context_gives_them(tiny, point_agent):
    before = {k: v.clone() for k, v in point_agent.state_dict().items()}
    context, mask = context_of(tiny)
    obs = torch.randn(3, 2)
    acts = {k: macaw.adapt(point_agent, context, mask, steps=k)(obs, torch.zeros(3)) for k in (0, 1, 5)}
    assert all(torch.equal(v, before[k]) for k, v in point_agent.state_dict().items())
    assert not torch.equal(acts[0], acts[1]) and not torch.equal(acts[1], acts[5])
    none = macaw.adapt(point_agent, context[:, :0], mask[:, :0])(obs, torch.zeros(3))
    assert torch.equal(none, acts[0])
    assert not any(w.requires_grad for weights in macaw.adapted(point_agent, context, mask, 2) for w in weights)


def test_rows_of_a_batch_are_adapted_apart(tiny, point_agent):
    context, mask = context_of(tiny)
    together, alone = macaw.embed(point_agent, context, mask), macaw.embed(point_agent, context[1:2], mask[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (3, 16)


def test_two_equal_episodes_adapt_like_one_but_for_the_spread_of_the_advantages(tiny, point_agent):
    one, two = (macaw.adapted(point_agent, *context_of(tiny, episodes=e), 1)[0] for e in ((0,), (0, 0)))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_adaptation_fits_the_returns_of_the_context(tiny, point_agent):
    context, mask = context_of(tiny)
    *batch, _ = point_agent.label(context, mask, torch.zeros(3))
    errors = []
    for steps in (0, 1, 5):
        value, _ = macaw.adapted(point_agent, context, mask, steps)
        with torch.no_grad():
            errors.append((point_agent.value(value, batch[0]) - batch[2]).pow(2).mean())
    assert errors[0] > errors[1] > errors[2]


def test_exploration_adds_the_noise_of_the_policy(tiny, point_agent):
    context, mask = context_of(tiny)
    obs, rew = torch.zeros(3, 2), torch.zeros(3)
    plain, noisy = (macaw.adapt(point_agent, context, mask, explore)(obs, rew) for explore in (False, True))
    again = macaw.adapt(point_agent, context, mask, True)(obs, rew)
    assert torch.equal(noisy, again) and 0 < (noisy - plain).abs().max() < 1 and noisy.abs().max() <= 1


def test_returns_without_a_step_and_after_the_usual_steps_are_those_of_the_protocols(tiny, point_agent):
    results = macaw.evaluate_all(point_agent, tiny, replace(point_agent.args, eval_episodes=1), dc.PROTOCOLS)
    for steps in (0, 1):
        found = dc.evaluate(tiny, partial(macaw.adapt, point_agent, steps=steps), ("iid",), 1)["eval/iid/return"]
        assert results[f"adapt/return_{steps}_steps"] == found


# ---- whole runs -------------------------------------------------------------------------


def run(tiny_path, folder, **changes):
    return macaw.train(macaw.Args(**SMALL | {"dataset": str(tiny_path), "run_dir": str(folder)} | changes))


VARIANTS = [{"inner_steps": 2}, {"weight_transform": False}, {"adv_head": False}, {"first_order": True}]
VARIANTS += [{"inner_segment": "start"}, {"terminal_bootstrap": False}, {"online_ft": 1, "ft_value_steps": 2}]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes))
def test_run_of_every_variant(changes, tiny_path, tmp_path, monkeypatch):
    agents, run_class = [], macaw.Run

    class Spy(run_class):
        def __enter__(self):
            agents.append((self.agent, {k: v.clone() for k, v in self.agent.named_parameters()}))
            return super().__enter__()

    monkeypatch.setattr(macaw, "Run", Spy)
    result = run(tiny_path, tmp_path, **changes)
    ((agent, before),) = agents
    still = {k for k, p in agent.named_parameters() if p.numel() and torch.equal(p, before[k])}
    head = {f"policy_net.{kind}.{layer}" for kind in ("z", "map", "offset") for layer in (4, 5)} | {"c"}
    assert still == (head if changes.get("first_order") else set())
    for protocol in dc.PROTOCOLS:
        assert math.isfinite(result[f"eval/{protocol}/return"])
    assert all(math.isfinite(result[f"adapt/return_{k}_steps"]) for k in (0, 1, 5, 20))
    assert ("online_ft/return_ep_1" in result) == ("online_ft" in changes)


# ---- bad input --------------------------------------------------------------------------


BAD = [("inner_lr", 0.0), ("latent", 0), ("inner_steps", 0), ("tau", 1.5), ("adv_weight", -1.0), ("online_ft", -1)]
BAD += [("policy_std", 0.0), ("max_weight", math.inf), ("gamma", math.nan), ("ft_value_steps", -3)]


@pytest.mark.parametrize("flag, value", BAD)
def test_impossible_value_is_refused_in_one_line(flag, value, tiny_path, tmp_path):
    message = stop_message(lambda: run(tiny_path, tmp_path / "runs", **{flag: value}))
    assert f"--{flag.replace('_', '-')} {value}" in message and not (tmp_path / "runs").exists()


def test_a_task_with_one_episode_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "min_episodes", 1)
    monkeypatch.setattr(dc, "load_dataset", lambda *_: tiny)
    assert "two episodes of every training task" in stop_message(lambda: run("some.npz", tmp_path))
