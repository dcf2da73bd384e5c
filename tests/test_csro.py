"""csro.py: CLUB and the variational network; the rest is in actor_critic_suite.py."""

import math

import numpy as np
import pytest
import torch
from actor_critic_suite import TASK_IDS, ActorCriticSuite, gradients, slow_embedding, slow_metric, vectors
from conftest import slow_layers

import csro


def slow_guess(agent, row):
    """A row of a context -> mean and variance of the guess at its embedding; it sees only obs and act."""
    out = torch.tanh(slow_layers(agent.guess.net, row[:5]))
    return out[:3], torch.log(1 + torch.exp(out[3:]))


def slow_guess_loss(agent, context):
    """The mean over tasks, transitions and dimensions; only the guess gets gradients."""
    total = 0.0
    for row in context.flatten(0, 1):
        each, (mean, var) = torch.tanh(slow_layers(agent.encoder.net, row)).detach(), slow_guess(agent, row)
        density = torch.distributions.Normal(mean, var.sqrt()).log_prob(each) + 0.5 * math.log(2 * math.pi)
        total = total - density.mean() / (context.shape[0] * context.shape[1])
    return total


def slow_club(agent, context):
    """The mean over all pairs of transitions of a context; only the encoder gets gradients."""
    total, (tasks, size) = 0.0, context.shape[:2]
    for rows in context:
        each = [torch.tanh(slow_layers(agent.encoder.net, row)) for row in rows]
        for k in range(size):
            mean, var = (x.detach() for x in slow_guess(agent, rows[k]))
            negative = sum(-((each[j] - mean) ** 2 / var).mean() for j in range(size)) / size
            total = total + (-((each[k] - mean) ** 2 / var).mean() - negative) / (tasks * size)
    return total


class TestCSRO(ActorCriticSuite):
    script, own = csro, {"guess_opt": ("guess", "lr")}
    method = {"club_weight": 2.5, "guess_weight": 4.0}
    cases = [*ActorCriticSuite.cases, {"club_weight": 0.0}]

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        fit = args.guess_weight * slow_guess_loss(agent, context)
        gradients(fit, agent.guess)
        opts["guess_opt"].step()  # before CLUB is taken
        club = slow_club(agent, context)
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
        encoder = args.metric_weight * slow_metric(z, TASK_IDS.tolist()) + args.club_weight * club
        with torch.no_grad():
            each = torch.stack([torch.tanh(slow_layers(agent.encoder.net, row)) for row in context.flatten(0, 1)])
        within = np.std(each.reshape(*context.shape[:2], 3).numpy(), axis=1).mean()
        return encoder, {"losses/guess": fit, "stats/club": club, "z/within_std": within}

def test_club_and_guess_loss_equal_hand_made_values():
    each, mean, var = (vectors(*rows)[None].requires_grad_() for rows in ([[0.2], [0.8]], [[0.1], [0.5]], [[0.5], [1]]))
    club = csro.club(each, mean, var)
    assert club.item() == pytest.approx(0.24)
    (gradient,) = torch.autograd.grad(club, each)
    np.testing.assert_allclose(gradient.flatten(), [-0.25, 0.55], rtol=1e-12)
    assert csro.guess_loss(each, mean, var).item() == pytest.approx(-0.1457867951, abs=1e-10)
