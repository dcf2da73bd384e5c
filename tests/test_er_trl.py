"""er_trl.py: its GAN and the entropy that its encoder maximizes; the rest as its siblings (siblings.py)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pattern, slow_net
from actor_critic_suite import ActorCriticSuite as Sibling
from actor_critic_suite import TASK_IDS, gradients, make_batch, make_context, make_segment, slow_embedding
from actor_critic_suite import slow_metric, start, vectors

import data_collect as dc
import er_trl


def slow_fake(agent, batch, z):
    """-> an imitated action [act_dim] for every obs, a list per task."""
    tasks, size = batch.rew.shape
    noise = pattern((tasks, size, agent.generator.noise_dim))
    row = lambda m, b: torch.tanh(slow_net(agent.generator, batch.obs[m, b], noise[m, b], z[m]))  # noqa: E731
    return [[row(m, b) for b in range(size)] for m in range(tasks)]


def slow_probability(agent, batch, act, z):
    """Of the discriminator that act, a list of lists, is the data's -> flat list."""
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
        "stats/told_apart": torch.tensor(right).double().mean(),
    }


def slow_entropy(acts):
    """acts: list of [act_dim] -> entropy of torch's own Gaussian with their covariance."""
    count, mean = len(acts), sum(acts) / len(acts)
    cov = sum(torch.outer(a - mean, a - mean) for a in acts) / (count - 1) + 1e-5 * torch.eye(len(mean)).double()
    return torch.distributions.MultivariateNormal(mean, cov).entropy()


class TestERTRL(Sibling):
    script = er_trl
    own = {"discriminator_opt": ("discriminator", "gan_lr"), "generator_opt": ("generator", "gan_lr")}
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

    def test_fewer_steps_of_the_gan_are_those_of_a_slow_recomputation(self, known_noise):
        self.check_updates(gan_steps=1, behavior_entropy_weight=0.5)

    def test_gan_has_the_width_of_the_policy(self):
        agent = self.sized_agent()
        assert agent.generator.w_x.shape == (1, 5, 64) and agent.generator.w_3.shape == (1, 64, 2)
        assert agent.discriminator.w_x.shape == (1, 5, 64) and agent.discriminator.w_3.shape == (1, 64, 1)

    def test_without_steps_of_the_gan_its_networks_stay(self):
        agent, args = self.make_agent(gan_steps=0)
        before = [p.clone() for net in (agent.generator, agent.discriminator) for p in net.parameters()]
        inputs = TASK_IDS, make_context(0), make_segment(0, args), make_batch(0)
        metrics = er_trl.update(agent, *inputs, args)
        after = [p for net in (agent.generator, agent.discriminator) for p in net.parameters()]
        assert all(map(torch.equal, before, after)) and "losses/generator" not in metrics


def test_gan_learns_to_imitate_the_actions_of_each_task():
    """Where they lie and how widely, in the middle one of three seeds. With a momentum of 0.9 their spread is an
    eighth of the data's in one dimension, with the default no less than a half."""
    args = er_trl.Args(z_dim=3, gan_lr=1e-3, width=32, encoder_width=16, noise_dim=4, brac_alpha=1.0)
    z, mean, spread = torch.eye(3)[:2], vectors((0.4, -0.4), (-0.4, 0)), vectors((0.1, 0.3), (0.3, 0.1))
    draw = lambda size: (mean[:, None] + spread[:, None] * torch.randn(2, size, 2)).float()  # noqa: E731
    off, spread_off = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        agent = er_trl.Agent(SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9), args)
        for k in range(800):
            for opt in (agent.generator_opt, agent.discriminator_opt):
                dc.set_lr(opt, args.gan_lr * min(1, 2 - k / 400))
            er_trl.update_gan(agent, torch.randn(2, 64, 3), draw(64), z)
        with torch.no_grad():
            fake = agent.generator(torch.randn(2, 500, 3), z).double()
        off.append((fake.mean(1) - mean).abs().max())
        spread_off.append((fake.std(1) / spread - 1).abs().max())
    assert sorted(off)[1] < 0.25 and sorted(spread_off)[1] < 0.5


def test_every_imitated_action_has_noise_of_its_own():
    generator = er_trl.Generator(3, 2, 3, 4, 16)
    obs, z = torch.zeros(2, 5, 3), torch.zeros(2, 3)
    one, other = generator(obs, z), generator(obs, z)
    assert one.shape == (2, 5, 2) and (one.abs() < 1).all()
    rows = torch.cat([one, other]).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 20


# ---- vectors of the losses --------------------------------------------------------------


def test_entropy_vectors():
    acts = vectors((0, 0), (1, 0), (0, 1), (1, 1))[None]
    assert er_trl.action_entropy(acts).item() == pytest.approx(1.7393, abs=1e-4)
    spread = math.sqrt(1.5) * vectors((1, 2), (1, -2), (-1, 2), (-1, -2))[None] / math.sqrt(2)  # covariance diag(1, 4)
    assert er_trl.action_entropy(spread).item() == pytest.approx(3.5310, abs=1e-4)
    both = torch.cat([acts, spread + 7])  # its mean does not matter, tasks are apart
    np.testing.assert_allclose(er_trl.action_entropy(both), [1.7393, 3.5310], atol=1e-4)
    for size in (6, 1):  # float32, fewer actions than dimensions: the 1e-5 alone
        entropy = er_trl.action_entropy(torch.full((1, size, 8), 0.3))
        assert entropy.item() == pytest.approx(4 * math.log(2 * math.pi * math.e * 1e-5), abs=1e-3)


def logit(*probabilities):
    return torch.logit(vectors(*probabilities))


def test_gan_loss_vectors():
    nothing = logit(1 - 1e-12), logit(1e-12)
    assert er_trl.discriminator_loss(logit(0.9, 0.8), nothing[1]).item() == pytest.approx(0.16425, abs=1e-5)
    assert er_trl.discriminator_loss(nothing[0], logit(0.1, 0.3)).item() == pytest.approx(0.23102, abs=1e-5)
    assert er_trl.generator_loss(logit(0.1, 0.3)).item() == pytest.approx(1.75328, abs=1e-5)


def test_focal_term_vector():
    z = vectors((0.5, 0.5), (-0.5, 0.5), (0.5, 0.1))
    assert er_trl.metric_loss(z, torch.arange(3)).item() == pytest.approx(2.8966, abs=1e-3)


def test_default_weight_is_that_of_the_official_code_for_the_family():
    for env, weight in (("ant-goal", 5), ("cheetah-vel", 2.5), ("point-robot", 5), ("walker-rand-params", 5)):
        args = dc.resolve(er_trl.Args(env=env), er_trl.ENV_ARGS, er_trl.MAY_BE_ZERO)
        assert args.behavior_entropy_weight == weight
