"""csro.py: its encoder's bound and variational network; the rest as its siblings (siblings.py)."""

import math

import numpy as np
import pytest
import torch
from actor_critic_suite import ActorCriticSuite as Sibling
from actor_critic_suite import TASK_IDS, gradients, slow_embedding, slow_metric, vectors
from test_unicorn import slow_layers

import csro
import data_collect as dc


def slow_guess(agent, row):
    """A row of a context -> mean and variance of the guess at its embedding, from obs and act alone."""
    out = torch.tanh(slow_layers(agent.guess.net, row[:5]))
    return out[:3], torch.log(1 + torch.exp(out[3:]))


def slow_guess_loss(agent, context):
    """The mean over tasks, transitions and dimensions; gradients to the guess alone."""
    total = 0.0
    for row in context.flatten(0, 1):
        each, (mean, var) = torch.tanh(slow_layers(agent.encoder.net, row)).detach(), slow_guess(agent, row)
        density = torch.distributions.Normal(mean, var.sqrt()).log_prob(each) + 0.5 * math.log(2 * math.pi)
        total = total - density.mean() / (context.shape[0] * context.shape[1])
    return total


def slow_club(agent, context):
    """Over all pairs of a task's transitions; gradients to the encoder alone."""
    total, (tasks, size) = 0.0, context.shape[:2]
    for rows in context:
        each = [torch.tanh(slow_layers(agent.encoder.net, row)) for row in rows]
        for k in range(size):
            mean, var = (x.detach() for x in slow_guess(agent, rows[k]))
            negative = sum(-((each[j] - mean) ** 2 / var).mean() for j in range(size)) / size
            total = total + (-((each[k] - mean) ** 2 / var).mean() - negative) / (tasks * size)
    return total


class TestCSRO(Sibling):
    script, own = csro, {"guess_opt": ("guess", "lr")}
    method = {"club_weight": 2.5, "guess_weight": 4.0}

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        fit = args.guess_weight * slow_guess_loss(agent, context)
        gradients(fit, agent.guess)
        opts["guess_opt"].step()  # before the bound is taken
        bound = slow_club(agent, context)
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
        encoder = args.metric_weight * slow_metric(z, TASK_IDS.tolist()) + args.club_weight * bound
        with torch.no_grad():
            each = torch.stack([torch.tanh(slow_layers(agent.encoder.net, row)) for row in context.flatten(0, 1)])
        within = np.std(each.reshape(*context.shape[:2], 3).numpy(), axis=1).mean()
        return encoder, {"losses/guess": fit, "stats/club": bound, "z/within_std": within}

    def test_update_without_the_bound_is_that_of_a_slow_recomputation(self, known_noise):
        self.check_updates(club_weight=0.0)

    def test_guess_has_the_width_of_the_encoder(self):
        layers = self.sized_agent().guess.net[::2]
        assert [tuple(layer.weight.shape) for layer in layers] == [(48, 5), (48, 48), (10, 48)]


def test_bound_and_guess_loss_vectors():
    each, mean, var = (vectors(*rows)[None].requires_grad_() for rows in ([[0.2], [0.8]], [[0.1], [0.5]], [[0.5], [1]]))
    bound = csro.club(each, mean, var)
    assert bound.item() == pytest.approx(0.24)
    (gradient,) = torch.autograd.grad(bound, each)
    np.testing.assert_allclose(gradient.flatten(), [-0.25, 0.55], rtol=1e-12)
    assert csro.guess_loss(each, mean, var).item() == pytest.approx(-0.1457867951, abs=1e-10)


def test_bound_of_constant_embeddings_is_zero_and_takes_no_pairs_across_tasks():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 6, 3, generator=generator).double()
    var, shift = torch.rand(2, 6, 3, generator=generator).double() + 0.3, vectors([[0.0]], [[5.0]])
    assert csro.club(torch.full((2, 6, 3), 0.7).double(), mean, var).item() == pytest.approx(0, abs=1e-12)
    each = torch.randn(2, 6, 3, generator=generator).double()
    assert csro.club(each + shift, mean + shift, var).item() == pytest.approx(csro.club(each, mean, var).item())


def test_variance_of_the_guess_is_bounded():
    guess = csro.Guess(1, 1, 1, 4)
    guess.net = torch.nn.Identity()
    mean, var = guess(torch.tensor([[[0.5, -50.0], [-0.5, 0.0], [9.0, 50.0]]]))
    np.testing.assert_allclose(mean[0, :, 0], np.tanh([0.5, -0.5, 9.0]), rtol=1e-6)
    np.testing.assert_allclose(var[0, :, 0], [0.3132616875, 0.6931471806, 1.3132616875], rtol=1e-6)


def test_default_weight_is_that_of_the_official_code_for_the_family():
    for env, weight in (("ant-goal", 50), ("cheetah-vel", 10), ("point-robot", 25), ("walker-rand-params", 25)):
        assert dc.resolve(csro.Args(env=env), csro.ENV_ARGS, csro.MAY_BE_ZERO).club_weight == weight
