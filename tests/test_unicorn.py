"""unicorn.py: its noisy encoder, its heads and their losses, SAC; the rest is in actor_critic_suite.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from actor_critic_suite import DATA, METHOD, TASK_IDS, ActorCriticSuite, gradients
from actor_critic_suite import slow_actor_critic, slow_metric, slow_metrics, slow_multiplier_and_targets, take_steps
from actor_critic_suite import vectors
from conftest import pattern, slow_layers, slow_net

import unicorn

HEADS = {"ss": ("reward_decoder", "state_decoder"), "sup": ("classifier",)}
HEADS["ss-0"] = HEADS["ss"]


def slow_embedding(encoder, context, noise):
    """context [K, ctx_dim], noise [K, z_dim] -> z [z_dim]."""
    std = torch.sqrt(torch.clamp(torch.exp(encoder.log_var), 0.1, 10.0))
    return sum(torch.tanh(slow_layers(encoder.net, row) + std * e) for row, e in zip(context, noise)) / len(context)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def slow_reconstruction(decoder, context, z, target_of):
    """Mean over transitions and dimensions, and the pull on the limits. target_of: row -> [dim]."""
    total, count = 0.0, 0
    for m in range(len(context)):
        for row in context[m]:
            out, target = slow_net(decoder, row[:5], z[m]), target_of(row)
            for d in range(len(target)):
                log_var = decoder.high[d] - softplus(decoder.high[d] - out[len(target) + d])
                log_var = decoder.low[d] + softplus(log_var - decoder.low[d])
                total, count = total + (out[d] - target[d]) ** 2 / torch.exp(log_var) + log_var, count + 1
    return total / count + 0.01 * (sum(decoder.high) - sum(decoder.low))


def slow_task_losses(agent, z, context, args):
    if args.variant == "sup":
        logits = [slow_layers(agent.classifier, row) for row in z]
        chosen = [torch.log(torch.exp(row).sum()) - row[label] for row, label in zip(logits, TASK_IDS)]
        return {"classifier": sum(chosen) / len(chosen)}
    loss = slow_reconstruction(agent.reward_decoder, context, z, lambda row: row[5:6])
    loss = loss + slow_reconstruction(agent.state_decoder, context, z, lambda row: row[6:] - row[:3])
    if args.variant == "ss-0":
        return {"reconstruction": loss}
    return {"reconstruction": loss, "metric": args.metric_weight * slow_metric(z, TASK_IDS.tolist())}


class TestUNICORN(ActorCriticSuite):
    script = unicorn
    data = SimpleNamespace(**vars(DATA), train_ids=np.array([5, 0, 3, 2, 7, 1, 6, 9]))
    method = {"decoder_width": 8, "metric_weight": 0.7, "entropy_weight": 0.3}
    embedding = staticmethod(lambda encoder, rows: slow_embedding(encoder, rows, torch.zeros(len(rows), 3)))

    def make_agent(self, data=None, **changes):
        agent, args = super().make_agent(data, **changes)
        with torch.no_grad():
            agent.encoder.log_var[:2] = torch.tensor([-4.0, 4.0])  # beyond its limits
            if args.variant != "sup":
                for decoder in (agent.reward_decoder, agent.state_decoder):
                    decoder.low.sub_(2)
                    decoder.high.add_(1)
            if args.backbone == "sac":
                for parameter in agent.behavior.net[-1].parameters():
                    parameter.zero_()
        return agent, args

    def tasks(self, labels):
        return 5 - labels  # places among the training tasks, which come in reversed order

    def slow_update(self, agent, opts, contexts, segment, bc_batch, args):
        (context,) = contexts
        noise = pattern((*context.shape[:2], args.z_dim))
        z = torch.stack([slow_embedding(agent.encoder, *rows) for rows in zip(context, noise)])
        parts, fixed = slow_task_losses(agent, z, context, args), z.detach()
        total, sac = sum(parts.values()), args.backbone == "sac"
        sums = slow_actor_critic(agent, fixed, segment, bc_batch, args, args.entropy_weight if sac else 0.0)
        penalty = args.entropy_weight * sums["logp"] if sac else agent.kl_coef.item() * sums["divergence"]
        actor, kl_coef = penalty - sums["value"], agent.kl_coef.clone()
        for net in ("encoder", *HEADS[args.variant]):
            gradients(total, getattr(agent, net))
        gradients(sums["q"], agent.critic)
        gradients(actor, agent.residual)
        if not sac:
            gradients(sums["behavior"], agent.behavior)
        take_steps(opts)
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        metrics = slow_metrics(agent, fixed, total, actor, sums) | {f"losses/{name}": x for name, x in parts.items()}
        if sac:  # nothing moves the weight of a KL that is not there
            agent.kl_coef.copy_(kl_coef)
            for tag in ("losses/behavior", "stats/divergence", "stats/kl_coef"):
                del metrics[tag]
        return metrics

    cases = [{}, {"variant": "ss-0", "target_noise": 0.5}, {"variant": "sup", "target_noise": 1.0, "n_step": 1}]
    cases += [{"backbone": "sac"}]

    @pytest.mark.parametrize("case", cases)
    def test_update_stays_on_the_device(self, case):
        super().test_update_stays_on_the_device(**case)

    def test_heads_start_as_they_should(self):
        """The limits of the log-variances are -10 and 0.5."""
        args = METHOD | self.method | {"decoder_width": 24, "z_dim": 5}
        agent, sup = (unicorn.Agent(self.data, unicorn.Args(**args, variant=name)) for name in ("ss", "sup"))
        assert (agent.encoder.log_var == 0).all() and agent.encoder.log_var.shape == (5,)
        assert [tuple(layer.weight.shape) for layer in sup.classifier[::2]] == [(24, 5), (24, 24), (8, 24)]
        for decoder, dim in ((agent.reward_decoder, 1), (agent.state_decoder, 3)):
            assert [tuple(decoder.net[i].weight.shape) for i in (0, 3, 6)] == [(24, 10), (24, 24), (2 * dim, 24)]
            assert decoder.low.tolist() == [-10] * dim and decoder.high.tolist() == [0.5] * dim

    def test_sac_starts_and_stays_without_pi_beta(self, numbered):
        """pi is the residual from N(0, 1)."""
        args = METHOD | self.method | {"backbone": "sac"}
        agent = unicorn.Agent(numbered, unicorn.Args(**args))
        pi, pi_beta = agent.policies(torch.randn(4, 5, 2), torch.randn(4, 3))
        assert (pi_beta.mean == 0).all() and (pi_beta.log_std == 0).all() and 0 < pi.mean.abs().max() < 0.05
        found = unicorn.evaluate_all(agent, numbered, unicorn.Args(**args), ("iid",), 1)
        assert "eval/iid/q_error" in found and not any(tag.startswith("eval/bc") for tag in found)


def test_likelihood_equals_hand_made_values():
    mean, log_var, target = vectors(0, 1), vectors(0, -1), vectors(0.5, 0)
    assert unicorn.gaussian_nll(mean[:1], log_var[:1], target[:1]).item() == pytest.approx(0.25)
    assert unicorn.gaussian_nll(mean[1:], log_var[1:], target[1:]).item() == pytest.approx(1.7182818285)
    decoder = lambda *_: (mean, log_var)  # noqa: E731
    decoder.low, decoder.high = vectors(-10, -10), vectors(0.5, 0.5)
    reconstruction = unicorn.reconstruction_loss(decoder, None, None, None, target).item()
    assert reconstruction == pytest.approx(1.1941409142)


def test_soft_limits_match_hand_made_vectors():
    raw = vectors(-20, -10, 0, 0.5, 5)
    expected = [-9.9999546011, -9.3068665874, -0.4740040505, -0.1930921092, 0.4889800971]
    np.testing.assert_allclose(unicorn.soft_clamp(raw, vectors(-10), vectors(0.5)), expected, atol=1e-9)


def test_classifier_loss_matches_vectors_and_chance_level():
    agent, args = TestUNICORN().make_agent(variant="sup")
    agent.classifier = torch.nn.Identity()
    logits = vectors((2, 0, -1), (0, 1, 0))
    loss = unicorn.task_losses(agent, logits, torch.tensor([0, 2]), None, args)["classifier"]
    assert loss.item() == pytest.approx(0.8606453667, abs=1e-9)
    chance = unicorn.task_losses(agent, torch.zeros(1, 20), torch.tensor([3]), None, args)["classifier"]
    assert chance.item() == pytest.approx(math.log(20), abs=1e-6)
