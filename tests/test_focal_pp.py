"""focal_pp.py: its encoder with gate and attention, its contrastive loss; the rest is in actor_critic_suite.py."""

import math

import numpy as np
import pytest
import torch
from actor_critic_suite import TASK_IDS, ActorCriticSuite, make_context, slow_metric, vectors
from conftest import slow_layers

import focal_pp


def linear(layer, row):
    return layer.weight @ row + layer.bias


def slow_attention(encoder, rows):
    """rows: list of [width] -> what each one sees in all of them, head by head."""
    heads, width = encoder.heads, len(rows[0])
    size = width // heads
    projected = [linear(encoder.qkv, row) for row in rows]
    seen = []
    for own in projected:
        parts = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            query = own[:width][cut]
            scores = [sum(query * other[width : 2 * width][cut]) / math.sqrt(size) for other in projected]
            shares = torch.stack(scores).softmax(0)
            parts.append(sum(share * other[2 * width :][cut] for share, other in zip(shares, projected)))
        seen.append(linear(encoder.mix, torch.cat(parts)))
    return seen


def slow_focal_pp(encoder, context):
    """context [K, ctx_dim] -> z [z_dim]."""
    h = [slow_layers(encoder.net, row) for row in context]
    h = [torch.where(row > 0, row, 0.0) for row in h]
    weights = [torch.tensor(1.0)] * len(h)
    if encoder.gate is not None:
        narrow, _, widen, _ = encoder.gate
        weights = [1 / (1 + torch.exp(-linear(widen, torch.tanh(linear(narrow, row))))) for row in h]
        weights = [torch.exp(sum(weight) / len(weight)) for weight in weights]
    if encoder.qkv is not None:
        h = [row + seen for row, seen in zip(h, slow_attention(encoder, h))]
    each = [torch.tanh(linear(encoder.last[0], row)) for row in h]
    return sum(weight * row for weight, row in zip(weights, each)) / sum(weights)


def slow_nce(z, key, tasks, temperature):
    """Each z against its own key and the keys of other tasks."""
    total = 0.0
    unit = lambda row: row / torch.sqrt((row**2).sum())  # noqa: E731
    for i in range(len(z)):
        rivals = [j for j in range(len(z)) if j == i or tasks[j] != tasks[i]]
        score = {j: (unit(z[i]) * unit(key[j])).sum() / temperature for j in rivals}
        total = total + torch.log(sum(torch.exp(s) for s in score.values())) - score[i]
    return total / len(z)


class TestFocalPP(ActorCriticSuite):
    script, contexts, embedding = focal_pp, 2, staticmethod(slow_focal_pp)
    method = {"metric_weight": 0.5, "nce_weight": 1.75, "temperature": 0.25, "momentum": 0.75, "heads": 2}
    cases = [*ActorCriticSuite.cases, {"gate": False}, {"attention": False}, {"nce_weight": 0.0}]
    encoder_shapes = [(48, 9), (48, 48), (3, 48), (48, 3), (144, 48), (48, 48), (5, 48)]

    def slow_encoder(self, agent, opts, contexts, segment, args):
        z = torch.stack([slow_focal_pp(agent.encoder, rows) for rows in contexts[0]])
        key = torch.stack([slow_focal_pp(agent.key_encoder, rows) for rows in contexts[1]]).detach()
        nce = slow_nce(z, key, TASK_IDS.tolist(), args.temperature)
        return args.nce_weight * nce + args.metric_weight * slow_metric(z, TASK_IDS.tolist()), {"stats/nce": nce}

    def slow_after(self, agent, args):
        with torch.no_grad():
            for follower, leader in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
                follower.copy_(args.momentum * follower + (1 - args.momentum) * leader)

    def test_key_encoder_equals_the_encoder_at_first(self):
        agent = self.sized_agent()
        for key, query in zip(agent.key_encoder.parameters(), agent.encoder.parameters(), strict=True):
            assert torch.equal(key, query) and not key.requires_grad

    def test_many_rows_are_embedded_each_alone(self):
        """More rows than embed takes at a time, each with a context of its own length."""
        agent, _ = self.make_agent()
        context = torch.cat([make_context(k) for k in range(9)])  # 36 rows
        length = 1 + torch.arange(36) % 3
        mask = (torch.arange(3) < length[:, None]).double()
        expected = torch.stack([slow_focal_pp(agent.encoder, rows[:n]) for rows, n in zip(context, length)])
        torch.testing.assert_close(focal_pp.embed(agent, context, mask), expected)


def test_contrastive_loss_equals_hand_made_values():
    z, key = vectors((1, 0), (0, 1), (-1, 0)), vectors((0.8, 0.6), (0.6, 0.8), (-0.6, 0.8))
    tasks = torch.arange(3)
    assert focal_pp.contrastive_loss(z, key, tasks, 0.1).item() == pytest.approx(0.2952, abs=1e-4)
    assert focal_pp.contrastive_loss(z, key, tasks, 1.0).item() == pytest.approx(0.7328, abs=1e-4)
    assert focal_pp.contrastive_loss(3 * z, 0.1 * key, tasks, 1.0).item() == pytest.approx(0.7328, abs=1e-4)
    same = torch.ones(16, 4).double()
    assert focal_pp.contrastive_loss(same, same, torch.arange(16), 0.1).item() == pytest.approx(math.log(16))
    pairs = torch.arange(16) // 2  # another context of the same task is no rival
    assert focal_pp.contrastive_loss(same, same, pairs, 0.1).item() == pytest.approx(math.log(15))


def test_gate_weights_equal_hand_made_values():
    """Means over the features, then a softmax over the real transitions."""
    encoder = focal_pp.Encoder(2, 2, 2, heads=1)
    encoder.gate = torch.nn.Identity()
    features = torch.tensor([[[0.2, 0.4], [0.6, 0.8], [0.1, 0.1], [9.0, 9.0]]])
    weights = encoder.weights(features, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(weights, [[0.3021, 0.4506, 0.2473, 0]], atol=1e-4)
