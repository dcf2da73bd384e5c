"""unicorn.py: its encoder with noise, its heads and their losses, SAC; the rest as its siblings (siblings.py)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pattern, slow_net
from actor_critic_suite import ActorCriticSuite as Sibling
from actor_critic_suite import DATA, METHOD, TASK_IDS, check_clamps, gradients, slow_actor_critic, slow_metric
from actor_critic_suite import slow_multiplier_and_targets, vectors

import data_collect as dc
import unicorn


def slow_layers(layers, row):
    """A row through linear layers with ReLU between them."""
    layers = [layer for layer in layers if hasattr(layer, "weight")]
    for layer in layers[:-1]:
        row = layer.weight @ row + layer.bias
        row = torch.where(row > 0, row, 0.0)
    return layers[-1].weight @ row + layers[-1].bias


def slow_embedding(encoder, context, noise):
    """context [K, ctx_dim], noise [K, z_dim] -> z [z_dim]."""
    std = torch.sqrt(torch.clamp(torch.exp(encoder.log_var), 0.1, 10.0))
    return sum(torch.tanh(slow_layers(encoder.net, row) + std * e) for row, e in zip(context, noise)) / len(context)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def slow_reconstruction(head, context, z, target_of):
    """Mean over transitions and dimensions, with the pull on the limits. target_of: row -> [dim]."""
    total, count = 0.0, 0
    for m in range(len(context)):
        for row in context[m]:
            out, target = slow_net(head, row[:5], z[m]), target_of(row)
            for d in range(len(target)):
                log_var = head.high[d] - softplus(head.high[d] - out[len(target) + d])
                log_var = head.low[d] + softplus(log_var - head.low[d])
                total, count = total + (out[d] - target[d]) ** 2 / torch.exp(log_var) + log_var, count + 1
    return total / count + 0.01 * (sum(head.high) - sum(head.low))


def slow_task_losses(agent, z, context, args):
    if args.variant == "sup":
        logits = [slow_layers(agent.heads[0], row) for row in z]
        chosen = [torch.log(torch.exp(row).sum()) - row[label] for row, label in zip(logits, TASK_IDS)]
        return {"classifier": sum(chosen) / len(chosen)}
    loss = slow_reconstruction(agent.heads[0], context, z, lambda row: row[5:6])
    if args.recon_state:
        loss = loss + slow_reconstruction(agent.heads[1], context, z, lambda row: row[6:] - row[:3])
    if args.variant == "ss-0":
        return {"reconstruction": loss}
    return {"reconstruction": loss, "metric": args.metric_weight * slow_metric(z, TASK_IDS.tolist())}


CASES = [{}, {"variant": "ss-0", "recon_state": False, "target_noise": 0.5}]
CASES += [{"variant": "sup", "target_noise": 1.0, "n_step": 1}, {"enc_noise": False}]
CASES += [{"backbone": "sac"}, {"backbone": "sac", "variant": "ss-0"}]


class TestUNICORN(Sibling):
    script = unicorn
    data = SimpleNamespace(**vars(DATA), train_ids=np.array([5, 0, 3, 2, 7, 1, 6, 9]))
    method = {"decoder_width": 8, "metric_weight": 0.7, "entropy_weight": 0.3}
    embedding = staticmethod(lambda encoder, rows: slow_embedding(encoder, rows, torch.zeros(len(rows), 3)))

    def make_agent(self, data=None, **changes):
        agent, args = super().make_agent(data, **changes)
        with torch.no_grad():
            agent.encoder.log_var[0] = -4.0  # below its limit
            if args.variant != "sup":
                for head in agent.heads:
                    head.low.sub_(2)
                    head.high.add_(1)
        return agent, args

    def tasks(self, labels):
        return 5 - labels  # places among the training tasks, which come in reversed order

    def slow_update(self, agent, opts, contexts, segment, best, args):
        """One update of a copy of the agent by an optimizer of its own -> metrics."""
        (context,) = contexts
        noise = pattern((*context.shape[:2], args.z_dim)) * (1.0 if args.enc_noise else 0.0)
        z = torch.stack([slow_embedding(agent.encoder, *rows) for rows in zip(context, noise)])
        parts, fixed = slow_task_losses(agent, z, context, args), z.detach()
        total = sum(parts.values())
        entropy_weight = args.entropy_weight if args.backbone == "sac" else 0.0
        sums = slow_actor_critic(agent, fixed, segment, best, args, entropy_weight)
        if args.backbone == "brac":
            actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"]
            gradients(sums["behavior"], agent.behavior)
        else:
            actor = args.entropy_weight * sums["logp"] - sums["value"]
        gradients(total, agent.heads)
        gradients(total, agent.encoder)
        gradients(sums["q"], agent.q)
        gradients(actor, agent.shift)
        opts["opt"].step()
        alpha = agent.brac_alpha.clone()
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        if args.backbone == "sac":
            agent.brac_alpha.copy_(alpha)  # nothing moves it
        return {
            **{f"losses/{name}": loss for name, loss in parts.items()},
            "losses/encoder": total,
            "losses/q": sums["q"],
            "losses/actor": actor,
            "losses/behavior": torch.as_tensor(sums["behavior"]),
            "stats/q_mean": sums["value"],
            "stats/divergence": torch.as_tensor(sums["divergence"]),
            "stats/brac_alpha": agent.brac_alpha,
            "z/between_std": sum(fixed[:, d].std() for d in range(args.z_dim)) / args.z_dim,
        }

    @pytest.mark.parametrize("case", CASES)
    def test_two_updates_are_those_of_a_slow_recomputation(self, case, known_noise):
        self.check_updates(**case)

    @pytest.mark.parametrize("backbone, expected", [("brac", [(-3, -5), (1, 2)]), ("sac", [(None, -5), (None, 2)])])
    def test_log_std_is_clamped(self, backbone, expected):
        check_clamps(self.make_agent(backbone=backbone)[0], expected)

    def test_heads_have_the_asked_sizes_and_start_as_they_should(self):
        """Limits at -10 and 0.5."""
        args = METHOD | self.method | {"decoder_width": 24, "z_dim": 5}
        agent, sup = (unicorn.Agent(self.data, unicorn.Args(**args, variant=name)) for name in ("ss", "sup"))
        assert (agent.encoder.log_var == 0).all() and agent.encoder.log_var.shape == (5,)
        assert [tuple(layer.weight.shape) for layer in sup.heads[0][::2]] == [(24, 5), (24, 24), (8, 24)]
        for head, dim in zip(agent.heads, (1, 3), strict=True):
            assert head.w_2.shape == (1, 24, 24) and head.w_3.shape == (1, 24, 2 * dim)
            assert head.low.tolist() == [-10] * dim and head.high.tolist() == [0.5] * dim

    @pytest.mark.parametrize("variant", ["ss", "sup"])
    def test_training_sees_training_tasks_and_every_row_its_own_task(
        self, variant, numbered, numbered_path, tmp_path, monkeypatch
    ):
        given = (numbered, numbered_path, tmp_path, monkeypatch)
        super().test_training_sees_training_tasks_and_every_row_its_own_task(*given, variant=variant)

    @pytest.mark.parametrize("backbone", ["brac", "sac"])
    def test_evaluation_is_that_of_slow_policies_and_critics(self, backbone, numbered):
        super().test_evaluation_is_that_of_slow_policies_and_critics(numbered, backbone=backbone)

    @pytest.mark.parametrize("case", CASES)
    def test_update_stays_on_the_device(self, case):
        super().test_update_stays_on_the_device(**case)


def test_noise_is_bounded_from_both_sides():
    """Variance within 0.1 and 10."""
    encoder = unicorn.Encoder(2, 2, 4)
    encoder.net = torch.nn.Identity()
    with torch.no_grad():
        encoder.log_var.copy_(torch.tensor([-9.0, 9.0]))
    z = encoder(torch.zeros(1, 1, 2), torch.ones(1, 1), torch.full((1, 1, 2), 0.5))
    np.testing.assert_allclose(torch.atanh(z).detach()[0], [0.5 * 0.1**0.5, 0.5 * 10**0.5], rtol=1e-5)


def test_negative_log_likelihood_and_total_loss_vectors():
    mean, log_var, target = vectors(0, 1), vectors(0, -1), vectors(0.5, 0)
    assert unicorn.gaussian_nll(mean[:1], log_var[:1], target[:1]).item() == pytest.approx(0.25)
    assert unicorn.gaussian_nll(mean[1:], log_var[1:], target[1:]).item() == pytest.approx(1.7182818285)
    head = lambda *_: (mean, log_var)
    head.low, head.high = vectors(-10, -10), vectors(0.5, 0.5)
    reconstruction = unicorn.reconstruction_loss(head, None, None, None, target).item()
    assert reconstruction == pytest.approx(1.1941409142)
    z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))
    metric = unicorn.metric_loss(z, torch.tensor([0, 0, 1, 1])).item()
    assert reconstruction + 0.15 * metric == pytest.approx(1.3821138784, abs=1e-9)


def test_soft_limits_of_the_log_variance_vector():
    raw = vectors(-20, -10, 0, 0.5, 5)
    expected = [-9.9999546011, -9.3068665874, -0.4740040505, -0.1930921092, 0.4889800971]
    np.testing.assert_allclose(unicorn.soft_clamp(raw, vectors(-10), vectors(0.5)), expected, atol=1e-9)


def test_classifier_loss_vector_and_chance_level():
    agent, args = TestUNICORN().make_agent(variant="sup")
    agent.heads[0] = torch.nn.Identity()
    logits = vectors((2, 0, -1), (0, 1, 0))
    loss = unicorn.task_losses(agent, logits, torch.tensor([0, 2]), None, args)["classifier"]
    assert loss.item() == pytest.approx(0.8606453667, abs=1e-9)
    chance = unicorn.task_losses(agent, torch.zeros(1, 20), torch.tensor([3]), None, args)["classifier"]
    assert chance.item() == pytest.approx(math.log(20), abs=1e-6)


def test_default_weight_is_that_of_the_paper_for_the_family():
    for env, weight in (("ant-dir", 0.15), ("point-robot", 0.15), ("hopper-rand-params", 1.5)):
        assert dc.resolve(unicorn.Args(env=env), unicorn.ENV_ARGS, unicorn.MAY_BE_ZERO).metric_weight == weight
