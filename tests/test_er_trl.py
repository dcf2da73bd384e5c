"""er_trl.py: its GAN and the entropy that its encoder maximizes; the rest is in actor_critic_suite.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from actor_critic_suite import TASK_IDS, ActorCriticSuite, check_learning, gradients, slow_embedding, slow_metric
from actor_critic_suite import start, vectors
from conftest import pattern, slow_net

import data_collect as dc
import er_trl


def slow_fake(agent, batch, z):
    """-> an imitated action [act_dim] for every obs, a list per task."""
    tasks, size = batch.rew.shape
    noise = pattern((tasks, size, agent.generator.noise_dim))
    row = lambda m, b: torch.tanh(slow_net(agent.generator, batch.obs[m, b], noise[m, b], z[m]))  # noqa: E731
    return [[row(m, b) for b in range(size)] for m in range(tasks)]


def slow_probability(agent, batch, act, z):
    """act: list of lists -> the discriminator's probability that each action is of the data, a flat list."""
    rows = [(batch.obs[m, b], act[m][b], z[m]) for m in range(len(act)) for b in range(len(act[m]))]
    return [torch.sigmoid(slow_net(agent.discriminator, *row)[0]) for row in rows]


def slow_gan(agent, opts, batch, z):
    """One step of the discriminator, then one of the generator -> metrics."""
    fake = slow_fake(agent, batch, z)
    real_p = slow_probability(agent, batch, batch.act, z)
    fake_p = slow_probability(agent, batch, [[act.detach() for act in acts] for acts in fake], z)
    of_d = -sum(torch.log(p) for p in real_p) / len(real_p) - sum(torch.log(1 - p) for p in fake_p) / len(fake_p)
    gradients(of_d, agent.discriminator)
    opts["discriminator_opt"].step()
    of_g = -sum(torch.log(p) for p in slow_probability(agent, batch, fake, z)) / len(fake_p)
    gradients(of_g, agent.generator)
    opts["generator_opt"].step()
    right = [p > 0.5 for p in real_p] + [p < 0.5 for p in fake_p]
    return {
        "losses/discriminator": of_d,
        "losses/generator": of_g,
        "stats/gan_accuracy": torch.tensor(right).double().mean(),
    }


def slow_entropy(acts):
    """acts: list of [act_dim] -> entropy of torch's Gaussian with their covariance."""
    count, mean = len(acts), sum(acts) / len(acts)
    cov = sum(torch.outer(a - mean, a - mean) for a in acts) / (count - 1) + 1e-5 * torch.eye(len(mean)).double()
    return torch.distributions.MultivariateNormal(mean, cov).entropy()


class TestERTRL(ActorCriticSuite):
    script = er_trl
    own = {"discriminator_opt": ("discriminator", "gan_lr"), "generator_opt": ("generator", "gan_lr")}
    cases = [*ActorCriticSuite.cases, {"gan_steps": 1, "behavior_entropy_weight": 0.5}]
    method = {"behavior_entropy_weight": 1.5, "gan_lr": 2**-6, "noise_dim": 2, "gan_steps": 2, "gan_momentum": 0.25}

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        batch, metrics = start(segment), {}
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
        for _ in range(args.gan_steps):
            metrics = slow_gan(agent, opts, batch, z.detach())
        entropy = sum(slow_entropy(acts) for acts in slow_fake(agent, batch, z)) / len(z)
        loss = args.metric_weight * slow_metric(z, TASK_IDS.tolist()) - args.behavior_entropy_weight * entropy
        return loss, metrics | {"stats/behavior_entropy": entropy}

    def test_learns_point_robot(self, tmp_path):
        check_learning(er_trl, tmp_path, gan_steps=1)

    def test_gan_has_the_width_of_the_policy(self):
        agent = self.sized_agent()
        for net, out_dim in ((agent.generator.net, 2), (agent.discriminator.net, 1)):
            layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
            assert [tuple(layer.weight.shape) for layer in layers][1:] == [(64, 64), (out_dim, 64)]


def test_gan_learns_the_actions_of_each_task():
    """Mean and standard deviation, in the median of three seeds. With a momentum of 0.9 the standard deviation is an
    eighth of the data's in one dimension, with the default no less than a half."""
    args = er_trl.Args(z_dim=3, gan_lr=1e-3, width=32, encoder_width=16, noise_dim=4, kl_coef=1.0)
    z, mean, std = torch.eye(3)[:2], vectors((0.4, -0.4), (-0.4, 0)), vectors((0.1, 0.3), (0.3, 0.1))
    draw = lambda size: (mean[:, None] + std[:, None] * torch.randn(2, size, 2)).float()  # noqa: E731
    mean_errors, std_errors = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        agent = er_trl.Agent(SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9), args)
        for k in range(800):
            for opt in (agent.generator_opt, agent.discriminator_opt):
                dc.set_lr(opt, args.gan_lr * min(1, 2 - k / 400))
            er_trl.update_gan(agent, torch.randn(2, 64, 3), draw(64), z)
        with torch.no_grad():
            fake = agent.generator(torch.randn(2, 500, 3), z).double()
        mean_errors.append((fake.mean(1) - mean).abs().max())
        std_errors.append((fake.std(1) / std - 1).abs().max())
    assert sorted(mean_errors)[1] < 0.25 and sorted(std_errors)[1] < 0.5


# ---- vectors of the losses --------------------------------------------------------------


def test_entropy_equals_hand_made_values():
    acts = vectors((0, 0), (1, 0), (0, 1), (1, 1))[None]
    wide = math.sqrt(0.75) * vectors((1, 2), (1, -2), (-1, 2), (-1, -2))[None]  # covariance diag(1, 4)
    both = torch.cat([acts, wide + 7])  # the mean does not matter, tasks are apart
    np.testing.assert_allclose(er_trl.action_entropy(both), [1.7393, 3.5310], atol=1e-4)


@pytest.mark.parametrize("size", [6, 1])
def test_entropy_of_equal_actions_is_finite(size):
    """In float32, with fewer actions than dimensions."""
    entropy = er_trl.action_entropy(torch.full((1, size, 8), 0.3))
    assert entropy.item() == pytest.approx(4 * math.log(2 * math.pi * math.e * 1e-5), abs=1e-3)


def logit(*probabilities):
    return torch.logit(vectors(*probabilities))


def test_gan_losses_equal_hand_made_values():
    nothing = logit(1 - 1e-12), logit(1e-12)
    assert er_trl.discriminator_loss(logit(0.9, 0.8), nothing[1]).item() == pytest.approx(0.16425, abs=1e-5)
    assert er_trl.discriminator_loss(nothing[0], logit(0.1, 0.3)).item() == pytest.approx(0.23102, abs=1e-5)
    assert er_trl.generator_loss(logit(0.1, 0.3)).item() == pytest.approx(1.75328, abs=1e-5)
