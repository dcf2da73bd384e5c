"""flora.py: its equations against slow recomputations, gradient routing, whole runs, bad values, learning.

The numbers of the test vectors are worked out by hand; the slow recomputations are plain loops in float64
that share no loss code with the script.
"""

import copy
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, read_rows, stop_message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.utils._python_dispatch import TorchDispatchMode

import data_collect as dc
import flora

METHOD = {"gamma": 0.9, "reward_scale": 5.0, "lr": 1e-3, "tau": 0.005, "width": 16, "encoder_width": 16, "z_dim": 3}
METHOD |= {"likelihood_weight": 32.0}
METHOD |= {"feature_dim": 4, "weight_activation": "softmax", "num_flows": 2, "kl_weight": 0.1, "feature_weight": 0.01}
METHOD |= {"alpha_min": -1.0, "num_arms": 5, "bandit_every": 10, "bandit_lr": 0.1, "bandit_feedback": "offline"}
METHOD |= {"brac_alpha": 1.5, "brac_alpha_lr": 0.01, "brac_alpha_max": 100.0, "divergence_target": 0.05}
SMALL = METHOD | {"env": "point-robot", "device": "cpu", "seed": 0, "total_updates": 60, "log_every": 10}
SMALL |= {"eval_every": 10, "save_every": 10, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 8}
OBS_DIM, ACT_DIM, TASKS, BATCH = 3, 2, 3, 4  # of the random agents and batches


def run(tiny_path, folder, **changes):
    """Train on the tiny dataset; the runs lie in `folder`."""
    return flora.train(flora.Args(**SMALL | {"dataset": str(tiny_path), "run_dir": str(folder)} | changes))


# ---- random agents and the slow recomputation ---------------------------------


def random_agent(dtype=torch.float64, seed=0, obs_dim=OBS_DIM, act_dim=ACT_DIM, ctx_dim=None, **changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = flora.Args(**METHOD | changes)
    torch.manual_seed(seed)
    agent = flora.Agent(obs_dim, act_dim, ctx_dim or 2 * obs_dim + act_dim + 1, args).to(dtype)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
    agent.make_optimizer(args)
    return agent, args


def random_batch(dtype=torch.float64, seed=1):
    """-> context [M, K, ctx_dim], (obs, act, rew, next_obs, term); every third transition terminates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(*shape, dtype=dtype).normal_(generator=generator)

    context = normal(TASKS, 5, 2 * OBS_DIM + ACT_DIM + 1)
    act = normal(TASKS, BATCH, ACT_DIM).clamp(-0.9, 0.9)
    term = (torch.arange(TASKS * BATCH).reshape(TASKS, BATCH) % 3 == 0).to(dtype)
    obs, next_obs = normal(TASKS, BATCH, OBS_DIM), normal(TASKS, BATCH, OBS_DIM)
    return context, (obs, act, normal(TASKS, BATCH), next_obs, term)


def pattern(shape):
    return torch.linspace(-1.5, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)


@pytest.fixture
def known_noise(monkeypatch):
    """Every standard normal draw is `pattern` of its shape."""
    monkeypatch.setattr(torch, "randn_like", lambda x, **_: pattern(x.shape).to(x.dtype))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: pattern(tuple(np.ravel(shape))))


def slow_flow(flows, z):
    """One latent z [Z] through the chain, equations (14) to (16) -> z_K [Z], log-det."""
    log_det = 0.0
    for u, w, b in zip(flows.u, flows.w, flows.b):
        wu = torch.dot(w, u)
        corrected = u + (-1 + torch.log1p((math.e - 1) * torch.exp(wu)) - wu) * w / torch.dot(w, w)
        h = torch.tanh(torch.dot(w, z) + b)
        log_det = log_det + torch.log(torch.abs(1 + torch.dot(corrected, (1 - h * h) * w)))
        z = z + corrected * h
    return z, log_det


def slow_posterior(agent, context):
    """Product of one Gaussian per transition of context [K, ctx_dim] -> mean [Z], var [Z]."""
    z_dim = agent.encoder.net[-1].out_features // 2
    means, variances = [], []
    for d in range(z_dim):
        precision, weighted = 0.0, 0.0
        for transition in context:
            out = agent.encoder.net(transition)
            var = torch.clamp(F.softplus(out[z_dim + d]), min=1e-7)
            precision, weighted = precision + 1 / var, weighted + out[d] / var
        means.append(weighted / precision)
        variances.append(1 / precision)
    return torch.stack(means), torch.stack(variances)


def slow_net(net, *inputs, member=0):
    """One member of an MLP at one row: plain layers on the concatenated inputs, the last of which is z."""
    h, first = torch.cat(inputs), torch.cat([net.w_x[member], net.w_z[member]])
    h = h @ first + net.b_1[member, 0]
    for weight, bias in ((net.w_2, net.b_2), (net.w_3, net.b_3)):
        h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
        h = torch.where(h > 0, h, 0.0) @ weight[member] + bias[member, 0]
    return h


def slow_psi(net, *inputs):
    return [slow_net(net, *inputs, member=member) for member in range(2)]


def slow_policy(agent, obs, z):
    """Policy and behavior policy at one obs -> mean, log_std, behavior mean, behavior log_std."""
    behavior, shift = (slow_net(agent.gaussians, obs, z, member=member) for member in range(2))
    half = behavior.shape[-1] // 2
    b_mean, b_log_std = behavior[..., :half], behavior[..., half:].clamp(-3, 1)
    log_std = torch.clamp(b_log_std.detach() + shift[..., half:], -5, 2)
    return b_mean.detach() + shift[..., :half], log_std, b_mean, b_log_std


def huber(error):
    size = abs(error)
    return 0.5 * size**2 if size <= 1 else size - 0.5


def slow_losses(agent, context, batch, args):
    """All losses of one update, transition by transition and feature by feature -> dict of scalars with graph."""
    noise_z, noise_act = pattern((TASKS, args.z_dim)), pattern((TASKS, BATCH, ACT_DIM))
    alpha = agent.arms[agent.arm].item()
    sums = dict.fromkeys(("reward", "feature", "likelihood", "kl", "behavior", "q", "divergence"), 0.0)
    for m in range(TASKS):
        mean, var = slow_posterior(agent, context[m])
        z_0 = mean + var.sqrt() * noise_z[m]
        z, log_det = slow_flow(agent.flows, z_0)
        log_q = Normal(mean, var.sqrt()).log_prob(z_0).sum() - log_det
        sums["kl"] += (log_q - Normal(0.0, 1.0).log_prob(z).sum()) / TASKS
        logits = agent.weights.net(z)
        w = logits.exp() / logits.exp().sum() if args.weight_activation == "softmax" else logits
        fixed_z, fixed_w = z.detach(), w.detach()
        for b in range(BATCH):
            obs, act, rew, next_obs, term = (x[m, b] for x in batch)
            reward, discount = args.reward_scale * rew, args.gamma * (1 - term)
            next_mean, next_log_std, _, _ = slow_policy(agent, next_obs, fixed_z)
            next_act = torch.tanh(next_mean + torch.exp(next_log_std) * noise_act[m, b])
            next_psi = [psi.detach() for psi in slow_psi(agent.psi_target, next_obs, next_act, fixed_z)]
            phi = slow_net(agent.phi, obs, act, next_obs, z)
            psi = slow_psi(agent.psi, obs, act, z)
            error, q_target = reward, reward.detach()
            for d in range(args.feature_dim):
                middle = (next_psi[0][d] + next_psi[1][d]) / 2
                spread = abs(next_psi[0][d] - next_psi[1][d]) / math.sqrt(2)
                corrected = middle + alpha * spread
                error = error - phi[d] * w[d]
                q_target = q_target + discount * corrected * fixed_w[d]
                for e in range(2):
                    sums["feature"] += huber(psi[e][d] - phi[d].detach() - discount * corrected) / (TASKS * BATCH)
            sums["reward"] += 0.5 * error**2 / (TASKS * BATCH)
            for e in range(2):
                value = sum(psi[e][d] * w[d] for d in range(args.feature_dim))
                sums["likelihood"] -= 0.5 * (value - q_target.detach()) ** 2 / (2 * TASKS * BATCH)
            pi_mean, pi_log_std, b_mean, b_log_std = slow_policy(agent, obs, fixed_z)
            behavior = TransformedDistribution(Normal(b_mean, b_log_std.exp()), TanhTransform())
            sums["behavior"] -= behavior.log_prob(act).sum() / (TASKS * BATCH)
            fixed_b = Normal(b_mean.detach(), b_log_std.exp().detach())
            sums["divergence"] += kl_divergence(Normal(pi_mean, pi_log_std.exp()), fixed_b).sum() / (TASKS * BATCH)
            pi_act = torch.tanh(pi_mean + torch.exp(pi_log_std) * noise_act[m, b])
            values = [torch.dot(psi_e, fixed_w) for psi_e in slow_psi(agent.psi, obs, pi_act, fixed_z)]
            sums["q"] += min(values) / (TASKS * BATCH)
    elbo = args.likelihood_weight * sums["likelihood"] - args.kl_weight * sums["kl"]
    return sums | {
        "encoder": args.feature_weight * (sums["reward"] + sums["feature"]) - elbo,
        "actor": agent.brac_alpha * sums["divergence"] - sums["q"],
    }


def spy_targets(monkeypatch):
    """-> dict that receives q_target [M, B] and psi_target [M, B, D] of the next update."""
    seen = {}
    value_log_likelihood, feature_loss = flora.value_log_likelihood, flora.feature_loss

    def likelihood_spy(psi, weights, q_target):
        seen["q"] = q_target
        return value_log_likelihood(psi, weights, q_target)

    def feature_spy(psi, psi_target):
        seen["psi"] = psi_target
        return feature_loss(psi, psi_target)

    monkeypatch.setattr(flora, "value_log_likelihood", likelihood_spy)
    monkeypatch.setattr(flora, "feature_loss", feature_spy)
    return seen


# ---- planar flows -------------------------------------------------------------


def random_flows(num_flows, z_dim, scale=1.0):
    torch.manual_seed(z_dim + num_flows)
    flows = flora.PlanarFlows(num_flows, z_dim).double()
    with torch.no_grad():
        for parameter in flows.parameters():
            parameter.normal_(0, scale)
    return flows


@pytest.mark.parametrize("z_dim", [5, 20])
@pytest.mark.parametrize("num_flows", [1, 4])
@pytest.mark.parametrize("violating", [False, True])
def test_flow_log_det_is_that_of_the_jacobian(num_flows, z_dim, violating):
    flows = random_flows(num_flows, z_dim)
    if violating:
        with torch.no_grad():
            flows.u.copy_(-flows.w)
        assert ((flows.w * flows.u).sum(-1) < -1).all()
    z = torch.randn(6, z_dim, dtype=torch.float64)
    z_k, log_det = flows(z)
    for row in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(lambda x: flows(x[None])[0][0], z[row])
        sign, slogdet = torch.linalg.slogdet(jacobian)
        assert sign > 0
        assert log_det[row].item() == pytest.approx(slogdet.item(), abs=1e-9)
        expected, expected_log_det = slow_flow(flows, z[row])
        torch.testing.assert_close(z_k[row], expected, rtol=0, atol=1e-12)
        assert log_det[row].item() == pytest.approx(expected_log_det.item(), abs=1e-9)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_corrected_flows_are_invertible(scale):
    flows = random_flows(50, 5, scale)
    corrected = flows.corrected_u()
    assert ((flows.w * corrected).sum(-1) >= -1 - 1e-12).all()
    across = flows.w / flows.w.norm(dim=-1, keepdim=True)
    moved = corrected - flows.u
    torch.testing.assert_close(moved, (moved * across).sum(-1, keepdim=True) * across)  # only along w


def test_flow_of_u_zero_is_the_identity():
    flows = random_flows(3, 5)
    with torch.no_grad():
        flows.u.zero_()
    z = torch.randn(4, 5, dtype=torch.float64)
    z_k, log_det = flows(z)
    torch.testing.assert_close(z_k, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_det, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_flow_at_the_bound_of_invertibility_stays_finite():
    flows = flora.PlanarFlows(1, 3)  # float32: w^T u_hat rounds to -1, the determinant to 0 where w^T z + b = 0
    with torch.no_grad():
        flows.w.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        flows.u.copy_(-100 * flows.w)
    assert (flows.w * flows.corrected_u()).sum() == -1
    assert flows(torch.zeros(1, 3))[1].isfinite().all()


def test_no_flows_is_the_identity():
    flows = flora.PlanarFlows(0, 5)
    z = torch.randn(4, 5)
    z_k, log_det = flows(z)
    assert torch.equal(z_k, z) and torch.equal(log_det, torch.zeros(4))


# ---- losses against vectors and distributions -----------------------------------


def test_feature_mean_spread_and_correction_vector():
    mean, spread = flora.feature_spread(torch.tensor([[1.0, 4.0], [3.0, 0.0]], dtype=torch.float64))
    np.testing.assert_allclose(mean, [2, 2], rtol=1e-12)
    np.testing.assert_allclose(spread, [math.sqrt(2), 2 * math.sqrt(2)], rtol=1e-12)
    np.testing.assert_allclose(mean - spread, [0.58579, -0.82843], atol=5e-6)


@pytest.mark.parametrize("error, value", [(0.5, 0.125), (3.0, 2.5), (-3.0, 2.5), (1.0, 0.5), (0.0, 0.0)])
def test_feature_loss_is_huber(error, value):
    psi = torch.zeros(2, 1, 1, 1)
    psi[0] = error  # the second network is exact
    assert flora.feature_loss(psi, torch.zeros(1, 1, 1)).item() == pytest.approx(value, abs=1e-7)


def test_feature_loss_sums_over_features_and_networks_and_averages_over_transitions():
    psi = torch.full((2, 3, 4, 5), 0.5, dtype=torch.float64)
    assert flora.feature_loss(psi, torch.zeros(3, 4, 5, dtype=torch.float64)).item() == pytest.approx(2 * 5 * 0.125)


def test_value_log_likelihood_is_a_mean_over_networks_tasks_and_transitions():
    generator = torch.Generator().manual_seed(0)
    psi = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(3, 1, 5, dtype=torch.float64, generator=generator)
    q_target = torch.rand(3, 4, dtype=torch.float64, generator=generator)
    total = 0.0
    for e in range(2):
        for m in range(3):
            for b in range(4):
                q = sum(psi[e, m, b, d].item() * weights[m, 0, d].item() for d in range(5))
                total -= 0.5 * (q - q_target[m, b].item()) ** 2
    value = flora.value_log_likelihood(psi, weights, q_target)
    assert value.item() == pytest.approx(total / (2 * 3 * 4), rel=1e-12)


def test_reward_loss_is_half_the_mean_squared_error():
    phi = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [1 task, 2 transitions, 2 features]
    weights = torch.tensor([[[0.25, 0.75]]])
    rew = torch.tensor([[1.0, 4.0]])  # predictions 1.75 and 3.75
    assert flora.reward_loss(phi, weights, rew).item() == pytest.approx(0.5 * (0.75**2 + 0.25**2) / 2)


def test_posterior_kl_without_flows_averages_to_the_closed_form():
    torch.manual_seed(0)
    mean, var = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.3, 2.0, 1.0]).double()
    count = 100_000
    z_0 = mean + var.sqrt() * torch.randn(count, 3, dtype=torch.float64)
    kl = flora.posterior_kl(z_0, z_0, mean, var, torch.zeros(count, dtype=torch.float64))
    expected = kl_divergence(Normal(mean, var.sqrt()), Normal(0.0, 1.0)).sum()
    assert abs(kl.mean() - expected) < 4 * kl.std() / math.sqrt(count)


def test_posterior_kl_through_flows_averages_to_the_integral_over_z_k():
    """One latent dimension: the density of z_K by finite differences, the divergence by the trapezoid rule."""
    flows = random_flows(4, 1)
    mean, var = torch.tensor([0.4]).double(), torch.tensor([0.5]).double()
    grid = torch.linspace(-7, 8, 60_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        z_k, _ = flows(grid)
        z_k = z_k[:, 0]
        log_density = Normal(mean, var.sqrt()).log_prob(grid)[:, 0] - torch.gradient(z_k, spacing=15 / 60_000)[0].log()
        integrand = log_density.exp() * (log_density - Normal(0.0, 1.0).log_prob(z_k))
        expected = torch.trapezoid(integrand, z_k)
        count = 200_000
        z_0 = mean + var.sqrt() * torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        z, log_det = flows(z_0)
        kl = flora.posterior_kl(z_0, z, mean, var, log_det)
    assert expected > 0.1
    assert abs(kl.mean() - expected) < 4 * kl.std() / math.sqrt(count)


def test_gaussian_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, log_std, mean_b, log_std_b = torch.randn(4, 7, 3, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(mean_b, log_std_b.exp())).sum(-1)
    torch.testing.assert_close(flora.gaussian_kl(mean, log_std, mean_b, log_std_b), expected, rtol=1e-10, atol=1e-10)
    same = flora.gaussian_kl(mean, log_std, mean, log_std)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


def test_tanh_gaussian_logp_vector():
    mean, std, pre = torch.tensor([[0.3], [0.5], [0.8]], dtype=torch.float64)
    act = torch.tanh(pre)
    assert act.item() == pytest.approx(0.6640367703, abs=1e-10)
    logp = flora.tanh_gaussian_logp(mean, std.log(), flora.pre_tanh(act))
    assert logp.item() == pytest.approx(-0.1442842320, abs=1e-10)


def test_tanh_gaussian_logp_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, log_std = torch.randn(2, 20, 3, dtype=torch.float64)
    act = torch.tanh(torch.randn(20, 3, dtype=torch.float64))
    expected = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform()).log_prob(act)
    logp = flora.tanh_gaussian_logp(mean, log_std, flora.pre_tanh(act))
    torch.testing.assert_close(logp, expected, rtol=1e-9, atol=1e-9)


def test_tanh_gaussian_logp_is_finite_at_the_bounds():
    mean = torch.zeros(2, 1, requires_grad=True)
    logp = flora.tanh_gaussian_logp(mean, torch.zeros(2, 1), flora.pre_tanh(torch.tensor([[1.0], [-1.0]])))
    logp.sum().backward()
    assert logp.isfinite().all() and mean.grad.isfinite().all()


# ---- encoder --------------------------------------------------------------------


def test_encoder_is_the_product_of_the_gaussians_of_the_transitions():
    agent, _ = random_agent()
    context, _ = random_batch()
    mean, var = agent.encoder(context, torch.ones(context.shape[:2], dtype=torch.float64))
    for m in range(TASKS):
        expected_mean, expected_var = slow_posterior(agent, context[m])
        torch.testing.assert_close(mean[m], expected_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(var[m], expected_var, rtol=1e-10, atol=1e-12)


def test_encoder_does_not_see_the_order_of_the_context():
    agent, _ = random_agent()
    context, _ = random_batch()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64).expand(TASKS, -1)
    order = torch.tensor([3, 1, 4, 0, 2])
    for one, other in zip(agent.encoder(context, mask), agent.encoder(context[:, order], mask[:, order])):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_encoder_does_not_see_masked_transitions():
    agent, _ = random_agent()
    context, _ = random_batch()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64).expand(TASKS, -1)
    kept = agent.encoder(context[:, mask[0] == 1], torch.ones(TASKS, 3, dtype=torch.float64))
    context[:, 1], context[:, 4] = 1e3, -7.0
    for one, other in zip(agent.encoder(context, mask), kept):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ---- bandit -----------------------------------------------------------------------


def bandit(num_arms, arm):
    agent, _ = random_agent(num_arms=num_arms)
    agent.arm.fill_(arm)
    return agent, torch.Generator().manual_seed(0)


def test_bandit_vector():
    agent, generator = bandit(2, 0)
    agent.bandit_step(torch.tensor(3.0), 0.2, generator)  # the first return has nothing to be compared with
    assert agent.arm_logits.tolist() == [0.0, 0.0] and agent.last_return.item() == 3.0
    agent.arm.fill_(0)
    agent.bandit_step(torch.tensor(4.0), 0.2, generator)  # 0.2 * 1 / 0.5
    np.testing.assert_allclose(agent.arm_logits, [0.4, 0.0], atol=1e-7)
    np.testing.assert_allclose(agent.arm_logits.softmax(0), [0.59869, 0.40131], atol=5e-6)
    np.testing.assert_allclose(agent.arm_probs(), [0.05 + 0.9 * 0.59869, 0.05 + 0.9 * 0.40131], atol=5e-6)


@pytest.mark.parametrize("gain, step", [(2.0, 1.0), (-5.0, -1.0), (0.5, 0.5)])
def test_bandit_clips_the_change_of_the_return(gain, step):
    agent, generator = bandit(5, 3)
    agent.bandit_step(torch.tensor(1.0), 0.1, generator)
    agent.arm.fill_(3)
    agent.bandit_step(torch.tensor(1.0 + gain), 0.1, generator)
    np.testing.assert_allclose(agent.arm_logits, [0, 0, 0, 0.1 * step / 0.2, 0], atol=1e-6)
    assert agent.last_return.item() == pytest.approx(1.0 + gain)


def test_bandit_divides_by_the_floored_probability():
    agent, generator = bandit(5, 0)
    agent.arm_logits.copy_(torch.tensor([-100.0, 0.0, 0.0, 0.0, 0.0]))
    agent.last_return.fill_(0.0)
    agent.bandit_step(torch.tensor(1.0), 0.1, generator)
    assert agent.arm_logits[0].item() == pytest.approx(-100 + 0.1 / 0.05, rel=1e-6)


def test_bandit_floors_every_probability():
    agent, _ = bandit(5, 0)
    agent.arm_logits.copy_(torch.tensor([50.0, -50.0, 0.0, -10.0, 10.0]))
    probs = agent.arm_probs()
    np.testing.assert_allclose(probs, [0.8, 0.05, 0.05, 0.05, 0.05], atol=1e-6)
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_bandit_draws_arms_by_their_probabilities():
    agent, generator = bandit(5, 0)
    agent.arm_logits.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0, 2.0]))
    probs, counts = agent.arm_probs(), torch.zeros(5)
    for _ in range(2000):
        agent.bandit_step(torch.tensor(0.0), 0.1, generator)
        counts[agent.arm] += 1
    deviation = (counts / 2000 - probs) / (probs * (1 - probs) / 2000).sqrt()
    assert deviation.abs().max() < 4.5


def test_arms_lie_evenly_between_alpha_min_and_zero():
    np.testing.assert_allclose(random_agent(num_arms=5)[0].arms, [-1, -0.75, -0.5, -0.25, 0])
    np.testing.assert_allclose(random_agent(num_arms=3, alpha_min=-0.5)[0].arms, [-0.5, -0.25, 0])


def test_offline_bandit_return_is_the_value_at_the_datas_initial_states(tiny):
    agent, args = random_agent(torch.float32, obs_dim=2, ctx_dim=7, z_dim=3, context_size=6)
    value = flora.bandit_return(agent, tiny, args, torch.Generator().manual_seed(3))
    tasks = torch.as_tensor(tiny.train_ids)
    context = tiny.sample_episode(tasks, 6, torch.Generator().manual_seed(3))[..., :-1]
    total, count = 0.0, 0
    with torch.no_grad():
        for row, task in enumerate(tiny.train_ids):
            z, _ = slow_flow(agent.flows, slow_posterior(agent, context[row])[0])
            w = agent.weights.net(z).softmax(-1)
            for episode in tiny.episodes[task]:
                obs = episode[0, :2]
                act = torch.tanh(slow_policy(agent, obs, z)[0])
                total += sum((psi * w).sum().item() / 2 for psi in slow_psi(agent.psi, obs, act, z))
                count += 1
    spread = tiny.episode_returns[tiny.train_ids].std()
    assert float(value) == pytest.approx(total / count / (args.reward_scale * spread), rel=1e-4)


def test_rollout_bandit_return_plays_training_tasks_only(tiny, monkeypatch):
    agent, args = random_agent(torch.float32, obs_dim=2, ctx_dim=7, bandit_feedback="rollout")
    real, played = dc.TaskEnv, []

    def spy(family, params, task_ids):
        played.extend(task_ids)
        return real(family, params, task_ids)

    monkeypatch.setattr(dc, "TaskEnv", spy)
    value = flora.bandit_return(agent, tiny, args, torch.Generator().manual_seed(0))
    assert set(played) <= set(tiny.train_ids) and not set(played) & set(tiny.test_ids)
    expected = dc.evaluate(tiny, partial(flora.adapt, agent), ("train",), 1)["eval/train/return"]
    assert float(value) == pytest.approx(expected / tiny.episode_returns[tiny.train_ids].std(), rel=1e-5)


def rewritten(tiny_path, path, change):
    """The tiny dataset after change(arrays), by way of a file -> Dataset, arrays."""
    with np.load(tiny_path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez_compressed(path, **arrays)
    return dc.load_dataset("point-robot", path), arrays


def test_bandit_return_is_finite_where_all_episodes_have_the_same_return(tiny_path, tmp_path):
    """As of a random policy on a sparse reward."""
    flat, _ = rewritten(tiny_path, tmp_path / "flat.npz", lambda arrays: arrays["rewards"].fill(0))
    agent, args = random_agent(torch.float32, obs_dim=2, ctx_dim=7)
    assert math.isfinite(float(flora.bandit_return(agent, flat, args, torch.Generator().manual_seed(0))))


def test_bandit_return_is_scaled_by_recorded_episodes_only(tiny_path, tmp_path):
    """--test-episodes above --episodes leaves empty places in the rows of the training tasks."""

    def drop_two_episodes(arrays):
        for key in ("observations", "actions", "rewards", "lengths", "terminated"):
            arrays[key][arrays["train_ids"], -2:] = 0
        arrays["behavior_step"][arrays["train_ids"], -2:] = -1

    gaps, arrays = rewritten(tiny_path, tmp_path / "gaps.npz", drop_two_episodes)
    recorded = arrays["rewards"][arrays["train_ids"], :-2].sum(-1, dtype=np.float64)
    agent, args = random_agent(torch.float32, obs_dim=2, ctx_dim=7, bandit_feedback="rollout")
    value = flora.bandit_return(agent, gaps, args, torch.Generator().manual_seed(0))
    expected = dc.evaluate(gaps, partial(flora.adapt, agent), ("train",), 1)["eval/train/return"]
    assert gaps.behavior_return == pytest.approx(recorded.mean(), rel=1e-6)
    assert float(value) == pytest.approx(expected / recorded.std(), rel=1e-5)


# ---- update -----------------------------------------------------------------------

VARIANTS = [("softmax", 2, 0), ("softmax", 0, 1), ("none", 4, 2)]


@pytest.mark.parametrize("activation, num_flows, arm", VARIANTS)
def test_update_reports_the_losses_of_a_slow_recomputation(activation, num_flows, arm, known_noise):
    agent, args = random_agent(weight_activation=activation, num_flows=num_flows)
    agent.arm.fill_(arm)
    context, batch = random_batch()
    expected = slow_losses(agent, context, batch, args)
    metrics = flora.update(agent, context, batch, args)
    reported = [tag for tag in metrics if tag.startswith("losses/")]
    assert {"losses/" + name for name in ("reward", "feature", "encoder", "actor", "behavior", "kl")} <= set(reported)
    for tag in reported:
        assert metrics[tag].item() == pytest.approx(expected[tag.split("/")[1]].item(), rel=1e-6), tag
    assert metrics["stats/q_mean"].item() == pytest.approx(expected["q"].item(), rel=1e-6)
    assert metrics["stats/divergence"].item() == pytest.approx(expected["divergence"].item(), rel=1e-6)
    assert metrics["stats/alpha"].item() == pytest.approx([-1, -0.75, -0.5][arm])
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("activation, num_flows, arm", VARIANTS)
def test_every_network_gets_the_gradient_of_its_own_loss_only(activation, num_flows, arm, known_noise, monkeypatch):
    agent, args = random_agent(weight_activation=activation, num_flows=num_flows)
    agent.arm.fill_(arm)
    context, batch = random_batch()
    losses = slow_losses(agent, context, batch, args)
    routes = {"encoder": [agent.encoder, agent.flows], "feature": [agent.psi], "reward": [agent.phi, agent.weights]}
    expected = {}
    policies = list(agent.gaussians.parameters())
    for member, loss in enumerate(("behavior", "actor")):
        grads = torch.autograd.grad(losses[loss], policies, retain_graph=True)
        assert all((grad[1 - member] == 0).all() for grad in grads), loss
        for param, grad in zip(policies, grads):
            expected[param] = expected.get(param, 0) + grad
    for loss, modules in routes.items():
        params = [p for module in modules for p in module.parameters() if p.numel()]
        expected |= dict(zip(params, torch.autograd.grad(losses[loss], params, retain_graph=True)))
    monkeypatch.setattr(agent.opts[0], "step", lambda: None)
    flora.update(agent, context, batch, args)
    for name, param in agent.named_parameters():
        if name.startswith("psi_target"):
            assert param.grad is None, name
        elif param.numel():
            assert expected[param].abs().max() > 1e-9, name
            torch.testing.assert_close(param.grad, expected[param], rtol=1e-6, atol=1e-9)


def test_gradients_do_not_pile_up_over_updates(known_noise, monkeypatch):
    agent, args = random_agent()
    context, batch = random_batch()
    monkeypatch.setattr(agent.opts[0], "step", lambda: None)
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *_: None)
    agent.arm.fill_(0)
    seen = []
    for _ in range(2):
        agent.brac_alpha.fill_(1.5)
        flora.update(agent, context, batch, args)
        seen.append([p.grad.clone() for p in agent.parameters() if p.grad is not None])
    assert seen[0]
    for first, second in zip(*seen):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_every_network_moves_in_one_update(known_noise):
    agent, args = random_agent()
    context, batch = random_batch()
    before = copy.deepcopy(agent.state_dict())
    flora.update(agent, context, batch, args)
    still = [name for name, _ in agent.named_parameters() if torch.equal(agent.state_dict()[name], before[name])]
    assert not still


def constant_critic(agent, value, phi):
    """Targets and psi of `value` and features of `phi` everywhere."""
    with torch.no_grad():
        for module, constant in ((agent.phi, phi), (agent.psi, value), (agent.psi_target, value)):
            for parameter in module.parameters():
                parameter.zero_()
            module.b_3.fill_(constant)


def test_target_bootstraps_except_where_the_task_terminated(known_noise, monkeypatch):
    agent, args = random_agent(gamma=0.99, reward_scale=5.0)
    constant_critic(agent, 10.0, 2.0)
    seen = spy_targets(monkeypatch)
    context, (obs, act, rew, next_obs, term) = random_batch()
    flora.update(agent, context, (obs, act, torch.ones_like(rew), next_obs, term), args)
    torch.testing.assert_close(seen["q"], 14.9 - 9.9 * term)  # 5 * 1 + 0.99 * 10, 5 at the end
    torch.testing.assert_close(seen["psi"], (11.9 - 9.9 * term)[..., None].expand_as(seen["psi"]))


def test_time_limit_is_no_termination_and_a_fall_is_one(tiny, walker):
    ids = torch.as_tensor(tiny.train_ids)
    assert (tiny.lengths[ids] == tiny.family.horizon).all()
    assert tiny.unpack(tiny.episodes[ids])[4].sum() == 0
    term = walker.unpack(walker.episodes)[4]  # [T, N, H]
    falls = (walker.lengths > 0) & (walker.lengths < walker.family.horizon)
    assert falls.any()
    task, episode = falls.nonzero()[0].tolist()
    length = walker.lengths[task, episode]
    assert term[task, episode, length - 1] == 1 and term[task, episode].sum() == 1


@pytest.mark.parametrize("done, share", [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)])
def test_learning_rate_is_constant_and_then_falls_linearly(done, share):
    agent, _ = random_agent()
    flora.anneal(agent.opts, 0.01, done)
    rates = [group["lr"].item() for opt in agent.opts for group in opt.param_groups]
    assert rates == pytest.approx([0.01 * share])


def test_targets_follow_by_polyak_averaging(known_noise, monkeypatch):
    agent, args = random_agent(tau=0.005)
    context, batch = random_batch()
    before = copy.deepcopy(agent.psi_target.state_dict())
    flora.update(agent, context, batch, args)
    for name, target in agent.psi_target.state_dict().items():
        expected = 0.995 * before[name] + 0.005 * agent.psi.state_dict()[name]
        torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(agent.opts[0], "step", lambda: None)
    with torch.no_grad():
        for module, value in ((agent.psi_target, 1.0), (agent.psi, 3.0)):
            for parameter in module.parameters():
                parameter.fill_(value)
    flora.update(agent, context, batch, args)
    for target in agent.psi_target.parameters():
        torch.testing.assert_close(target, torch.full_like(target, 1.01), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_lower_alpha_never_raises_q_with_softmax_weights(seed, known_noise, monkeypatch):
    agent, args = random_agent(seed=seed, weight_activation="softmax", num_arms=5)
    start, seen, targets = copy.deepcopy(agent.state_dict()), spy_targets(monkeypatch), []
    for arm in range(5):  # from -1 to 0
        agent.load_state_dict(start)
        agent.arm.fill_(arm)
        flora.update(agent, *random_batch(seed=seed), args)
        targets.append(seen["q"])
    change = torch.stack(targets).diff(dim=0)
    assert (change >= 0).all() and change.max() > 1e-3


def test_multiplier_moves_towards_the_target_divergence_within_its_bounds(known_noise):
    context, batch = random_batch()
    agent, args = random_agent(brac_alpha=1.5, brac_alpha_lr=0.01, divergence_target=0.05, brac_alpha_max=100.0)
    metrics = flora.update(agent, context, batch, args)
    divergence = metrics["stats/divergence"].item()
    assert agent.brac_alpha.item() == pytest.approx(1.5 + 0.01 * (divergence - 0.05), rel=1e-6)
    assert metrics["stats/brac_alpha"].item() == agent.brac_alpha.item()
    for changes, expected in (({"brac_alpha_max": 1.6, "brac_alpha_lr": 1e3}, 1.6), ({"divergence_target": 1e9}, 0.0)):
        agent, args = random_agent(brac_alpha=1.5, **{"brac_alpha_lr": 0.01} | changes)
        flora.update(agent, context, batch, args)
        assert agent.brac_alpha.item() == pytest.approx(expected)
    agent, args = random_agent(brac_alpha=1.5, brac_alpha_lr=0.0)
    flora.update(agent, context, batch, args)
    assert agent.brac_alpha.item() == 1.5


def test_pessimistic_q_is_the_smaller_of_the_two():
    agent, _ = random_agent()
    obs, act = (3 * torch.randn(TASKS, 50, size).double() for size in (OBS_DIM, ACT_DIM))
    z = 3 * torch.randn(TASKS, 3).double()
    weights = torch.randn(TASKS, 1, 4).double()
    q, psi = agent.q(obs, act, z, weights)
    both = torch.zeros(2, TASKS, 50).double()
    for m in range(TASKS):
        for b in range(50):
            both[:, m, b] = torch.stack(slow_psi(agent.psi, obs[m, b], act[m, b], z[m])) @ weights[m, 0]
    assert (both[0] < both[1]).any() and (both[0] > both[1]).any()
    torch.testing.assert_close(q, torch.where(both[0] < both[1], both[0], both[1]))
    assert psi.shape == (2, TASKS, 50, 4)


def test_softmax_weights_are_a_convex_mix_and_the_others_are_linear():
    z = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = random_agent(weight_activation="softmax")[0].weights(z)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(50).double())
    agent, _ = random_agent(weight_activation="none")
    torch.testing.assert_close(agent.weights(z), agent.weights.net(z))
    assert (agent.weights(z) < 0).any()


def test_policy_deviations_stay_within_their_bounds():
    agent, _ = random_agent()
    obs, z = torch.zeros(1, 1, OBS_DIM).double(), torch.zeros(1, 3).double()
    for bias, low_b, low in ((-50.0, -3, -5), (50.0, 1, 2)):
        with torch.no_grad():
            agent.gaussians.b_3.fill_(bias)
        _, log_std, _, log_std_b = agent.policies(obs, z)
        assert (log_std_b == low_b).all() and (log_std == low).all()


def test_policy_starts_at_the_behavior_policy():
    args = flora.Args(**METHOD)
    torch.manual_seed(0)
    agent = flora.Agent(OBS_DIM, ACT_DIM, 2 * OBS_DIM + ACT_DIM + 1, args)
    with torch.no_grad():
        for parameter in agent.gaussians.parameters():
            parameter[0].normal_(0, 0.4)
    obs, z = torch.randn(50, 2, OBS_DIM), torch.randn(50, 3)
    mean, log_std, mean_b, log_std_b = agent.policies(obs, z)
    assert mean_b.abs().max() > 0.3
    assert flora.gaussian_kl(mean, log_std, mean_b, log_std_b).abs().max() < 1e-3


class HostReads(TorchDispatchMode):
    """Counts the values that are copied from a tensor to Python, each a stall on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_update_reads_no_value_back_to_the_host():
    agent, args = random_agent(torch.float32)
    context, batch = random_batch(torch.float32)
    with HostReads() as reads:
        flora.update(agent, context, batch, args)
        count = reads.count
        agent.brac_alpha.item()
    assert reads.count == count + 1  # the counter counts
    assert count == 0


def test_latent_may_be_wider_than_a_transition(tiny_path, tmp_path):
    result = run(tiny_path, tmp_path, z_dim=12, total_updates=2)
    assert math.isfinite(result["eval/iid/return"])


# ---- adaptation ---------------------------------------------------------------------


def test_actions_lie_strictly_within_the_bounds_and_move_the_point_by_a_tenth():
    agent, _ = random_agent()
    act = agent.act(torch.randn(200, 1, OBS_DIM).double(), torch.randn(200, 3).double())[:, 0]
    assert act.shape == (200, ACT_DIM) and (act.abs() < 1).all() and act.abs().max() > 0.3
    family = dc.FAMILIES["point-robot"]
    env = dc.TaskEnv(family, family.draw()[0], [0, 1])
    start, _ = env.reset(seed=0)
    np.testing.assert_allclose(env.step(np.full((2, 2), 0.5))[0] - start, 0.05, rtol=1e-6)
    np.testing.assert_allclose(env.step(np.full((2, 2), -3.0))[0] - start, -0.05, rtol=1e-6)  # clipped to -0.1


def test_adapt_acts_on_the_posterior_mean_through_the_flows():
    agent, _ = random_agent(torch.float32)
    context, (obs, _, rew, _, _) = random_batch(torch.float32)
    act = flora.adapt(agent, context, torch.ones(TASKS, 5))(obs[:, 0], rew[:, 0])
    for m in range(TASKS):
        z, _ = slow_flow(agent.flows, slow_posterior(agent, context[m])[0])
        torch.testing.assert_close(act[m], torch.tanh(slow_policy(agent, obs[m, 0], z)[0]), rtol=1e-4, atol=1e-5)


def test_adapt_without_context_acts_on_the_prior_and_explores_by_sampling():
    agent, _ = random_agent(torch.float32)
    used = []
    agent.act = lambda obs, z: used.append(z) or obs
    rows = 4000
    context, mask, obs, rew = torch.zeros(rows, 0, 9), torch.zeros(rows, 0), torch.zeros(rows, 3), torch.zeros(rows)
    flora.adapt(agent, context, mask)(obs, rew)
    assert (used[-1] == 0).all() and used[-1].shape == (rows, 3)
    flora.adapt(agent, context, mask, explore=True)(obs, rew)
    assert used[-1].mean(0).abs().max() < 0.1 and (used[-1].std(0) - 1).abs().max() < 0.1
    context, _ = random_batch(torch.float32)
    mask = torch.ones(TASKS, 5)
    flora.adapt(agent, context, mask, explore=True)(obs[:TASKS], rew[:TASKS])
    assert (used[-1] - flora.embed(agent, context, mask)).abs().min(1).values.max() > 1e-3


def test_adaptation_leaves_the_random_generator_of_training_alone(tiny):
    agent, _ = random_agent(torch.float32, obs_dim=2, ctx_dim=7)
    before = torch.get_rng_state()
    dc.evaluate(tiny, partial(flora.adapt, agent), dc.PROTOCOLS, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_q_error_is_that_of_a_plain_loop():
    agent, _ = random_agent(torch.float32)
    args = SimpleNamespace(gamma=0.9, reward_scale=5.0)
    generator = np.random.default_rng(0)
    lengths, terminated = np.array([5, 3, 2], np.int32), np.array([False, True, False])
    episodes = {"observations": generator.normal(size=(3, 6, OBS_DIM)).astype(np.float32), "lengths": lengths}
    episodes |= {"rewards": generator.normal(size=(3, 5)).astype(np.float32), "terminated": terminated}
    episodes["rewards"][np.arange(5) >= lengths[:, None]] = 0.0
    episodes |= {"context": random_batch(torch.float32)[0], "mask": torch.ones(3, 5)}

    def value(obs, z):
        obs = torch.as_tensor(obs)
        act, w = torch.tanh(slow_policy(agent, obs, z)[0]), agent.weights.net(z).softmax(-1)
        return min((psi * w).sum().item() for psi in slow_psi(agent.psi, obs, act, z))

    errors = []
    with torch.no_grad():
        for row in range(3):
            z, _ = slow_flow(agent.flows, slow_posterior(agent, episodes["context"][row])[0])
            total = 0.0
            for step in range(lengths[row]):
                total += 0.9**step * 5 * float(episodes["rewards"][row, step])
            if not terminated[row]:
                total += 0.9 ** lengths[row] * value(episodes["observations"][row, lengths[row]], z)
            errors.append((value(episodes["observations"][row, 0], z) - total) / 5)
    assert flora.q_error(agent, episodes, args) == pytest.approx(np.mean(errors), abs=1e-4)
    everything_ends = episodes | {"terminated": np.ones(3, bool)}
    assert abs(flora.q_error(agent, everything_ends, args) - np.mean(errors)) > 1e-3


# ---- whole runs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tiny_path, tmp_path_factory):
    """A run of 60 updates -> its run directory."""
    return Path(run(tiny_path, tmp_path_factory.mktemp("smoke"))["run_dir"])


def test_run_writes_finite_metrics_at_every_interval(smoke):
    rows = read_rows(smoke)
    assert all(math.isfinite(float(value)) for _, _, value in rows)
    steps_of = {}
    for step, tag, _ in rows:
        steps_of.setdefault(tag, []).append(step)
    assert steps_of["losses/reward"] == steps_of["eval/iid/return"] == [10, 20, 30, 40, 50, 60]
    assert steps_of["eval/ood/return"] == [60]
    expected = {"reward", "feature", "encoder", "actor", "behavior", "kl"}
    assert {"losses/" + name for name in expected} | {"eval/iid/q_error", "z/probe_r2"} <= set(steps_of)


def test_run_logs_the_bandit(smoke):
    rows = read_rows(smoke)
    probs = [float(value) for step, tag, value in rows if step == 60 and tag.startswith("bandit/prob_")]
    assert len(probs) == 5 and sum(probs) == pytest.approx(1, abs=1e-5) and min(probs) >= 0.05 - 1e-6
    alphas = {float(value) for _, tag, value in rows if tag == "stats/alpha"}
    assert alphas <= {-1.0, -0.75, -0.5, -0.25, 0.0} and len(alphas) > 1


def test_run_stores_its_arguments_and_versions(smoke, tiny_path):
    stored = json.loads((smoke / "args.json").read_text())
    for name, value in (SMALL | {"dataset": str(tiny_path)}).items():
        assert stored["args"][name] == value
    assert set(stored["versions"]) >= {"torch", "numpy", "gymnasium", "mujoco", "python"}
    assert stored["dataset"]["env"] == "point-robot"


def test_tensorboard_has_every_scalar_but_those_of_single_tasks(smoke):
    events = EventAccumulator(str(smoke), size_guidance={"scalars": 0})
    events.Reload()
    logged = {tag for _, tag, _ in read_rows(smoke) if "/return_task_" not in tag}
    assert not logged - set(events.Tags()["scalars"])
    assert {"charts/updates_per_sec", "charts/wall_clock_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("losses/encoder")] == [10, 20, 30, 40, 50, 60]
    assert not [tag for tag in events.Tags()["scalars"] if "/return_task_" in tag]
    assert any(tag.startswith("args") for tag in events.Tags()["tensors"])


def test_tensorboard_has_the_embedding_with_its_tasks(smoke, tiny):
    assert 'tensor_name: "z' in (smoke / "projector_config.pbtxt").read_text()
    (metadata,) = smoke.glob("**/metadata.tsv")
    (tensors,) = smoke.glob("**/tensors.tsv")
    labels = [int(line) for line in metadata.read_text().split()]
    assert set(labels) == {*tiny.train_ids, *tiny.test_ids}
    assert np.loadtxt(tensors).shape == (len(labels), SMALL["z_dim"])


VARIANT_RUNS = [{"num_flows": 0}, {"alpha_min": 0.0}, {"weight_activation": "none"}, {"bandit_feedback": "rollout"}]


@pytest.mark.parametrize("changes", VARIANT_RUNS, ids=lambda changes: "-".join(changes))
def test_variants_train(changes, tiny_path, tmp_path):
    intervals = {"total_updates": 24, "log_every": 8, "eval_every": 24, "save_every": 24, "bandit_every": 6}
    result = run(tiny_path, tmp_path, **intervals | changes)
    rows = read_rows(result["run_dir"])
    assert all(math.isfinite(float(value)) for _, _, value in rows)
    alphas = [float(value) for _, tag, value in rows if tag == "stats/alpha"]
    assert len(alphas) == 3 and all(alpha == 0 for alpha in alphas) == ("alpha_min" in changes)
    assert all(value.isfinite().all() for value in load(result["run_dir"])["agent"].values())


def test_family_with_termination_trains(walker_path, tmp_path):
    changes = {"env": "walker-rand-params", "dataset": str(walker_path), "gamma": 0.99, "reward_scale": 0.1}
    result = run(walker_path, tmp_path, total_updates=6, log_every=2, **changes)
    assert math.isfinite(result["eval/iid/q_error"])
    assert all(math.isfinite(float(value)) for _, _, value in read_rows(result["run_dir"]))


# ---- losses that are not finite ----------------------------------------------------------


@pytest.fixture
def broken_at(monkeypatch):
    """-> function that makes the policy and the encoder NaN after a given number of updates."""
    update, count = flora.update, [0]

    def break_after(limit):
        def wrapped(agent, *inputs):
            metrics = update(agent, *inputs)
            count[0] += 1
            if count[0] == limit:
                with torch.no_grad():
                    agent.gaussians.w_2.fill_(math.nan)
                    agent.encoder.net[0].weight.fill_(math.nan)
            return metrics

        monkeypatch.setattr(flora, "update", wrapped)

    return break_after


NAN_MEETS = {  # what meets the NaN of update 25: its flags, the update at which the run stops
    "log line": ({}, 30),
    "bandit": ({"bandit_every": 13}, 30),
    "evaluation": ({"eval_every": 26}, 26),
    "evaluation at once": ({"eval_every": 25}, 25),
    "checkpoint": ({"save_every": 5}, 25),
    "end": ({"total_updates": 28}, 28),
}


@pytest.mark.parametrize("first", NAN_MEETS)
def test_run_stops_cleanly_whatever_meets_the_nan_first(first, broken_at, tiny_path, tmp_path):
    broken_at(25)
    changes, update = NAN_MEETS[first]
    message = stop_message(lambda: run(tiny_path, tmp_path, **{"eval_every": 60, "bandit_every": 60} | changes))
    (run_dir,) = tmp_path.glob("*/*/*")
    what = r"parameter [\w.]+" if update == 25 else r"(losses|stats|z)/\w+ \(nan\)"  # of 25 the losses are still good
    assert re.search(rf"update {update}: {what} is not finite", message)
    assert str(run_dir / "checkpoint.pt") in message
    saved = load(run_dir)
    assert saved["steps"]["policy"] == 20 and all(p.isfinite().all() for p in saved["agent"].values())
    assert all(math.isfinite(float(value)) for _, _, value in read_rows(run_dir))
    assert not (run_dir / "result.json").exists()


def test_stopped_run_names_no_checkpoint_that_does_not_exist(broken_at, tiny_path, tmp_path):
    broken_at(5)
    message = stop_message(lambda: run(tiny_path, tmp_path, eval_every=60, bandit_every=60, save_every=60))
    assert "update 10" in message
    assert all(Path(name).exists() for name in re.findall(r"\S+checkpoint\.pt", message))


# ---- bad input --------------------------------------------------------------------------


BAD_VALUES = [("lr", math.inf), ("alpha_min", 1.0), ("alpha_min", -1.5), ("alpha_min", math.nan), ("gamma", 2.0)]
BAD_VALUES += [("gamma", math.nan), ("tau", 1.5), ("context_size", 0), ("num_flows", -1), ("z_dim", 0)]
BAD_VALUES += [("num_arms", 0), ("num_arms", 21), ("eval_episodes", 0), ("kl_weight", -0.1), ("reward_scale", 0.0)]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_impossible_value_is_refused(name, value, tiny_path, tmp_path):
    message = stop_message(lambda: run(tiny_path, tmp_path / "runs", **{name: value}))
    assert f"--{name.replace('_', '-')}" in message and str(value) in message
    assert not (tmp_path / "runs").exists()


# ---- compilation and learning --------------------------------------------------------------


def test_compiled_run_has_the_losses_of_the_plain_one(smoke, tiny_path, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, with the operators of torch instead of generated C++:
    the code generator takes a minute and draws other random numbers."""
    compiled = []

    def trace_only(function):
        compiled.append(function)
        return real(function, backend="aot_eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", trace_only)
    result = run(tiny_path, tmp_path, total_updates=20, eval_every=20, compile=True)
    assert compiled == [flora.update]
    expected = {tag: float(value) for step, tag, value in read_rows(smoke) if step == 10}  # before the rate falls
    for step, tag, value in read_rows(result["run_dir"]):
        if step == 10 and tag.startswith(("losses/", "stats/", "z/")):
            assert float(value) == pytest.approx(expected[tag], rel=1e-3, abs=1e-4), tag


def test_learns_point_robot_on_the_shipped_data(tmp_path):
    path = ROOT / "datasets" / "point-robot.npz"
    if not path.is_file():
        pytest.skip("datasets/point-robot.npz is not there: python data_collect.py --env point-robot makes it")
    settings = {"width": 128, "encoder_width": 128, "z_dim": 5, "feature_dim": 32, "num_flows": 4, "meta_batch": 16}
    settings |= {"batch_size": 32, "context_size": 20, "bandit_every": 250, "brac_alpha_lr": 0.0, "eval_episodes": 2}
    settings |= {"total_updates": 1000, "log_every": 500, "eval_every": 1000, "save_every": 1000}
    result = run(path, tmp_path, **settings)
    chance = 1 / len(dc.load_dataset("point-robot", path).train_ids)
    assert result["eval/iid/return"] > -9.0  # random -20.3, data -6.8, expert -4.7
    assert result["z/nearest_task_acc"] > 3 * chance
    assert result["z/probe_r2"] > 0.5
