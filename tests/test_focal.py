"""focal.py: the metric loss, the dual divergence and its penalties, gradient routing, cost of an update."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import focal

OBS_DIM, ACT_DIM, TASKS, BATCH = 3, 2, 4, 5


def make_agent(dtype=torch.float64, obs_dim=OBS_DIM, act_dim=ACT_DIM, **changes):
    args = focal.resolve(focal.Args(**{"width": 16, "encoder_width": 16, "z_dim": 3, "batch_size": BATCH} | changes))
    torch.manual_seed(0)
    agent = focal.Agent(obs_dim, act_dim, 2 * obs_dim + act_dim + 1, args).to(dtype)
    agent.make_optimizer(args)
    return agent, args


def make_batches(args, dtype=torch.float64, obs_dim=OBS_DIM, act_dim=ACT_DIM, tasks=TASKS, draws=1):
    """-> task_ids [M], context, list of batches."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.empty(*shape, dtype=dtype).normal_(generator=generator)

    size, context = (tasks, args.batch_size), normal(tasks, args.context_size, 2 * obs_dim + act_dim + 1)
    batches = []
    for _ in range(draws):
        obs, next_obs, act = normal(*size, obs_dim), normal(*size, obs_dim), normal(*size, act_dim).clamp(-0.9, 0.9)
        batches.append((obs, act, normal(*size), next_obs, torch.zeros(size, dtype=dtype)))
    return torch.arange(tasks) // 2, context, batches


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- metric loss ------------------------------------------------------------------------

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


def test_metric_loss_has_no_gradient_where_two_tasks_coincide():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    focal.metric_loss(z, torch.tensor([0, 1])).backward()
    assert (z.grad == 0).all()


def test_metric_loss_is_blind_to_the_names_and_the_order_of_the_tasks():
    z, tasks = torch.randn(8, 3).double(), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    loss = focal.metric_loss(z, tasks)
    order = torch.randperm(8)
    torch.testing.assert_close(focal.metric_loss(z, 9 - tasks), loss)
    torch.testing.assert_close(focal.metric_loss(z[order], tasks[order]), loss)


# ---- encoder ----------------------------------------------------------------------------


def test_encoder_is_the_mean_of_the_tanh_not_the_tanh_of_the_mean():
    encoder = focal.Encoder(2, 2, 4)
    encoder.net = torch.nn.Identity()
    z = encoder(torch.tensor([[[0.0, 1.0], [1.0, -1.0], [2.0, 0.0]]]), torch.ones(1, 3))
    np.testing.assert_allclose(z.detach(), [[0.57520725, 0.0]], atol=1e-7)


def test_encoder_ignores_order_and_masked_transitions_and_is_zero_without_any():
    agent, _ = make_agent()
    context = torch.randn(3, 7, 9).double()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 3).double()
    z = agent.encoder(context, mask)
    assert z.shape == (3, 3) and (z.abs() < 1).all()
    torch.testing.assert_close(agent.encoder(context[:, :4].flip(1), mask[:, :4]), z)
    assert (agent.encoder(context, torch.zeros(3, 7)) == 0).all()
    assert (agent.encoder(context[:, :0], mask[:, :0]) == 0).all()


# ---- dual divergence --------------------------------------------------------------------


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


def test_dual_divergence_reaches_the_divergence_at_its_optimum():
    policy, behavior = vectors(0.5, 0.5), vectors(0.25, 0.75)
    c = torch.log(torch.expm1(policy / behavior))  # softplus(c) = policy / behavior
    np.testing.assert_allclose(c, [1.8545865, -0.0536814], atol=1e-7)
    value = (policy * torch.log(torch.nn.functional.softplus(c))).sum()
    value = value - (behavior * torch.nn.functional.softplus(c)).sum() + 1
    assert value.item() == pytest.approx((policy * (policy / behavior).log()).sum().item())
    assert value.item() == pytest.approx(0.1438410362, abs=1e-9)


def test_slope_penalty_vectors():
    act = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    slope_5 = 3 * act[..., 0] + 4 * act[..., 1]
    assert 5 * focal.slope_penalty(slope_5, act, torch.eye(2).double()).item() == pytest.approx(80, abs=1e-6)
    assert 5 * focal.slope_penalty(torch.full((2, 3), -2.0)).item() == pytest.approx(5)
    assert focal.slope_penalty(torch.full((2, 3), 0.5)).item() == 0


def test_slope_of_the_dual_critic_is_its_gradient_in_the_action(monkeypatch):
    agent, args = make_agent(divergence="dual", gp_mode="gradient", gp_weight=1.0)
    agent.dual.w_3.data *= 20  # slopes above 1
    _, _, ((obs, act, *_),) = make_batches(args)
    z, pi_act, share = torch.randn(TASKS, 3).double(), torch.rand_like(act), torch.rand_like(act[..., :1])
    between = (pi_act + share * (act - pi_act)).requires_grad_()
    (slope,) = torch.autograd.grad(agent.dual(obs, between, z).sum(), between)
    expected = (slope.pow(2).sum(-1).sqrt() - 1).clamp(min=0).pow(2).mean()
    monkeypatch.setattr(torch, "rand_like", lambda like: share)
    monkeypatch.setattr(focal, "dual_divergence", lambda c_data, c_policy: torch.zeros(1))
    loss, _ = focal.dual_steps(agent, [(obs, act)], z, pi_act, args)
    assert expected > 0.1
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("mode", ["gradient", "output"])
def test_dual_critic_learns_a_divergence_from_samples(mode):
    """Data at 0, policy's actions at 1: the estimate grows from about 0 within a few hundred steps."""
    agent, args = make_agent(torch.float32, divergence="dual", gp_mode=mode, gp_weight=0.1, dual_lr=1e-2, batch_size=32)
    obs, z = torch.zeros(2, 32, OBS_DIM), torch.zeros(2, 3)
    batch = (obs, 0.1 * torch.randn(2, 32, ACT_DIM))
    pi_act = 0.8 + 0.1 * torch.randn(2, 32, ACT_DIM)
    first, _ = focal.dual_steps(agent, [batch], z, pi_act, args)
    for _ in range(200):
        last, _ = focal.dual_steps(agent, [batch], z, pi_act, args)
    assert last < first - 0.3


# ---- update -----------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"divergence": "dual", "entropy_weight": 0.2}])
def test_every_loss_reaches_its_own_networks_only(extra, monkeypatch):
    """The encoder's gradient does not change with the rewards, nor that of the others with the metric's weight."""

    def grads(reward_scale, metric_weight):
        agent, args = make_agent(reward_scale=reward_scale, metric_weight=metric_weight, **extra)
        draws = 1 if agent.fits_behavior else 2
        torch.manual_seed(0)
        monkeypatch.setattr(agent.opts[0], "step", lambda: None)
        focal.update(agent, *make_batches(args, draws=draws), args)
        return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None and "dual" not in name}

    base, rewards, metric = grads(1.0, 10.0), grads(3.0, 10.0), grads(1.0, 20.0)
    assert {name.split(".")[0] for name in base} == {"encoder", "q", "gaussians"}
    for name, grad in base.items():
        if name.startswith("encoder"):
            assert grad.abs().max() > 0 and torch.equal(grad, rewards[name])
            torch.testing.assert_close(2 * grad, metric[name])
        else:
            assert torch.equal(grad, metric[name])
    assert not torch.equal(base["q.w_2"], rewards["q.w_2"])


def test_target_of_the_critics():
    agent, args = make_agent(gamma=0.99, reward_scale=5.0)
    with torch.no_grad():
        for net, value in ((agent.q, 0.0), (agent.q_target, 10.0)):
            for parameter in net.parameters():
                parameter.zero_()
            net.b_3.fill_(value)
    ids, context, [(obs, act, rew, next_obs, term)] = make_batches(args)
    term[0] = 1.0
    metrics = focal.update(agent, ids, context, [(obs, act, torch.ones_like(rew), next_obs, term)], args)
    expected = 2 * (14.9**2 * 3 + 5**2) / 4  # 5 * 1 + 0.99 * 10, and 5 where the task ended; two critics
    assert metrics["losses/q"].item() == pytest.approx(expected, rel=1e-6)


def test_multiplier_is_clipped_in_place():
    agent, args = make_agent(brac_alpha=1.0, brac_alpha_lr=1e6, brac_alpha_max=7.0, divergence_target=0.0)
    with torch.no_grad():
        agent.gaussians.b_3[1] += 0.5  # a policy that differs from the behavior policy
    focal.update(agent, *make_batches(args), args)
    assert agent.brac_alpha == 7


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_compiled_dual_update_has_the_losses_of_the_plain_one():
    """Traced by torch.compile but for the dual critic, whose penalty differentiates twice."""
    found = []
    for update in (focal.update, torch.compile(focal.update, backend="aot_eager")):
        agent, args = make_agent(torch.float32, divergence="dual")
        inputs = make_batches(args, torch.float32, draws=2)
        torch.manual_seed(1)
        found.append([update(agent, *inputs, args) for _ in range(2)][1])
    plain, compiled = found
    for tag, value in plain.items():
        assert float(compiled[tag]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), tag


OFFICIAL = {"meta_batch": 16, "batch_size": 256, "context_size": 200, "width": 256}
COSTS = [({}, 13.2, 450), ({"divergence": "dual", "gp_mode": "output", "encoder_width": 64, "z_dim": 5}, 27.8, 730)]


@pytest.mark.parametrize("extra, most_gflop, most_operations", COSTS)
def test_cost_of_an_update_at_the_official_sizes(extra, most_gflop, most_operations):
    sizes = {"obs_dim": 27, "act_dim": 8}
    agent, args = make_agent(torch.float32, **sizes, **{"encoder_width": 200, "z_dim": 20} | OFFICIAL | extra)
    inputs = make_batches(args, torch.float32, **sizes, tasks=16, draws=1 if agent.fits_behavior else args.dual_iters)
    focal.update(agent, *inputs, args)
    with FlopCounterMode(display=False) as flops:
        focal.update(agent, *inputs, args)
    with Operations() as operations:
        focal.update(agent, *inputs, args)
    assert 0.8 * most_gflop < flops.get_total_flops() / 1e9 <= most_gflop
    assert operations.count <= most_operations
