"""unicorn.py: reconstruction, its limits, the mixture of losses, the classifier, gradient routing."""

import math

import numpy as np
import pytest
import torch

import unicorn

OBS_DIM, ACT_DIM, TASKS, CONTEXT, BATCH = 3, 2, 4, 6, 5


def make_agent(**changes):
    sizes = {"width": 16, "encoder_width": 16, "decoder_width": 16, "z_dim": 3, "batch_size": BATCH}
    args = unicorn.resolve(unicorn.Args(**sizes | changes))
    torch.manual_seed(0)
    agent = unicorn.Agent(OBS_DIM, ACT_DIM, 2 * OBS_DIM + ACT_DIM + 1, TASKS, args).double()
    agent.make_optimizer(args)
    return agent, args


def rows(size, seed):
    """obs [M, size, obs_dim], act, rew [M, size], next_obs, term."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(TASKS, size, *shape, dtype=torch.float64).normal_(generator=generator)

    term = torch.zeros(TASKS, size).double()
    return normal(OBS_DIM), normal(ACT_DIM).clamp(-0.9, 0.9), normal(), normal(OBS_DIM), term


LABELS = torch.tensor([0, 0, 1, 3])


def vectors(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_negative_log_likelihood_vector():
    mean, log_var, target = vectors(0, 1), vectors(0, -1), vectors(0.5, 0)
    assert unicorn.gaussian_nll(mean[:1], log_var[:1], target[:1]).item() == pytest.approx(0.25)
    assert unicorn.gaussian_nll(mean[1:], log_var[1:], target[1:]).item() == pytest.approx(1.7182818285)
    assert unicorn.gaussian_nll(mean, log_var, target).item() == pytest.approx(0.9841409142)


def test_reconstruction_loss_adds_the_pull_on_the_limits():
    decoder = unicorn.Decoder(OBS_DIM, ACT_DIM, 3, 8, 2).double()
    obs, act, *_ = rows(CONTEXT, 0)
    z, target = torch.randn(TASKS, 3).double(), torch.randn(TASKS, CONTEXT, 2).double()
    expected = unicorn.gaussian_nll(*decoder(obs, act, z), target).item() + 0.21  # 0.01 (2 * 0.5 + 2 * 10)
    assert unicorn.reconstruction_loss(decoder, obs, act, z, target).item() == pytest.approx(expected)


def test_soft_limits_of_the_log_variance_vector():
    raw = vectors(-20, -10, 0, 0.5, 5)
    expected = [-9.9999546011, -9.3068665874, -0.4740040505, -0.1930921092, 0.4889800971]
    np.testing.assert_allclose(unicorn.soft_clamp(raw, vectors(-10), vectors(0.5)), expected, atol=1e-9)


def task_loss(*inputs):
    return sum(unicorn.task_losses(*inputs).values())


def test_total_loss_is_reconstruction_and_the_weighted_metric_loss():
    agent, args = make_agent(variant="ss", metric_weight=0.15)
    obs, act, rew, next_obs, _ = rows(CONTEXT, 0)
    z = torch.randn(TASKS, 3).double()
    parts = [
        unicorn.reconstruction_loss(agent.heads[0], obs, act, z, rew[..., None]),
        unicorn.reconstruction_loss(agent.heads[1], obs, act, z, next_obs - obs),
    ]
    expected = sum(parts) + 0.15 * unicorn.metric_loss(z, LABELS)
    context = (obs, act, rew, next_obs)
    torch.testing.assert_close(task_loss(agent, z, LABELS, context, args), expected)
    args.variant = "ss-0"
    torch.testing.assert_close(task_loss(agent, z, LABELS, context, args), sum(parts))
    agent, args = make_agent(recon_state=False, variant="ss-0")
    alone = unicorn.reconstruction_loss(agent.heads[0], obs, act, z, rew[..., None])
    torch.testing.assert_close(task_loss(agent, z, LABELS, context, args), alone)


def test_metric_loss_vector():
    z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))
    value = unicorn.metric_loss(z, torch.tensor([0, 0, 1, 1])).item()
    assert 1.1941409142 + 0.15 * value == pytest.approx(1.3821138784, abs=1e-9)


def test_default_weight_is_that_of_the_paper_for_the_family():
    for env, weight in (("ant-dir", 0.15), ("point-robot", 0.15), ("hopper-rand-params", 1.5)):
        assert unicorn.resolve(unicorn.Args(env=env)).metric_weight == weight


def test_state_target_is_the_difference(monkeypatch):
    """Shifting states and next states together leaves it alone: with constant differences the targets are constant."""
    agent, args = make_agent(variant="ss-0")
    obs, act, rew, _, _ = rows(CONTEXT, 0)
    seen = []
    monkeypatch.setattr(unicorn, "reconstruction_loss", lambda head, obs, act, z, target: seen.append(target) or 0)
    task_loss(agent, torch.zeros(TASKS, 3).double(), LABELS, (obs, act, rew, obs + 0.25), args)
    assert torch.equal(seen[0], rew[..., None])
    torch.testing.assert_close(seen[1], torch.full_like(obs, 0.25))


def test_decoder_sees_the_z_of_its_own_task():
    decoder = unicorn.Decoder(OBS_DIM, ACT_DIM, 3, 8, 1).double()
    obs, act, *_ = rows(CONTEXT, 0)
    z = torch.arange(TASKS).double()[:, None].expand(-1, 3)
    together = decoder(obs, act, z)[0]
    for i in range(TASKS):
        torch.testing.assert_close(decoder(obs[i : i + 1], act[i : i + 1], z[i : i + 1])[0][0], together[i])
    assert (together[0] - decoder(obs[:1], act[:1], z[1:2])[0][0]).abs().max() > 1e-3


def test_only_ss_and_sup_depend_on_the_labels():
    obs, act, rew, next_obs, _ = rows(CONTEXT, 0)
    z = torch.randn(TASKS, 3).double()
    for variant, depends in (("ss", True), ("ss-0", False), ("sup", True)):
        agent, args = make_agent(variant=variant)
        losses = [task_loss(agent, z, y, (obs, act, rew, next_obs), args) for y in (LABELS, LABELS.flip(0))]
        assert (losses[0] != losses[1]) == depends, variant


def test_classifier_loss_vector_and_chance_level():
    agent, args = make_agent(variant="sup")
    agent.heads[0] = torch.nn.Identity()
    logits = vectors((2, 0, -1), (0, 1, 0))
    loss = task_loss(agent, logits, torch.tensor([0, 2]), None, args)
    assert loss.item() == pytest.approx(0.8606453667, abs=1e-9)
    chance = task_loss(agent, torch.zeros(1, 20), torch.tensor([3]), None, args)
    assert chance.item() == pytest.approx(math.log(20), abs=1e-6)


def test_noise_is_averaged_over_the_context_and_off_in_evaluation():
    agent, _ = make_agent()
    context, mask = torch.randn(TASKS, 200, 9).double(), torch.ones(TASKS, 200).double()
    noise = torch.randn(TASKS, 200, 3).double()
    quiet = agent.encoder(context, mask, 0.0)
    assert (agent.encoder(context, mask, noise) - quiet).abs().max() > 1e-3
    torch.testing.assert_close(unicorn.embed(agent, context, mask), quiet)
    with torch.no_grad():
        agent.encoder.log_var.fill_(-50.0)
    least = agent.encoder(context, mask, noise)
    expected = torch.tanh(agent.encoder.net(context) + math.sqrt(0.1) * noise).mean(1)
    torch.testing.assert_close(least, expected)


@pytest.mark.parametrize("variant", ["ss", "ss-0", "sup"])
@pytest.mark.parametrize("backbone", ["brac", "sac"])
def test_every_loss_reaches_its_own_networks_only(variant, backbone, monkeypatch):
    def grads(reward_scale, batch_seed, context_labels=LABELS):
        agent, args = make_agent(variant=variant, backbone=backbone, reward_scale=reward_scale, enc_noise=False)
        monkeypatch.setattr(agent.opts[0], "step", lambda: None)
        torch.manual_seed(0)
        unicorn.update(agent, context_labels, rows(CONTEXT, 0), rows(BATCH, batch_seed), args)
        return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}

    base, other = grads(1.0, 1), grads(3.0, 2)
    assert {name.split(".")[0] for name in base} == {"encoder", "heads", "q", "gaussians"}
    for name, grad in base.items():
        task_inference = name.startswith(("encoder", "heads"))
        assert torch.equal(grad, other[name]) == task_inference, name
        if name != "encoder.log_var":
            assert grad.abs().max() > 0, name
    if variant != "ss-0":
        relabelled = grads(1.0, 1, LABELS.flip(0))
        for name, grad in base.items():
            if name.startswith(("q", "gaussians")):
                assert torch.equal(grad, relabelled[name]), name
