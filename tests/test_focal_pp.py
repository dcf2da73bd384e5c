"""focal_pp.py: its encoder with gate and attention, its contrastive loss; the rest as its siblings (siblings.py)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stop_message
from actor_critic_suite import ActorCriticSuite as Sibling
from actor_critic_suite import DATA, METHOD, TASK_IDS, make_batch, make_context, make_segment, slow_embedding
from actor_critic_suite import slow_metric, vectors
from test_unicorn import slow_layers

import data_collect as dc
import focal_pp


def linear(layer, row):
    return layer.weight @ row + layer.bias


def slow_attention(encoder, rows):
    """rows: list of [width] -> what each sees in all of them, head by head."""
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


def slow_plus(encoder, context):
    """context [K, ctx_dim] -> z [z_dim]."""
    h = [slow_layers(encoder.net, row) for row in context]
    h = [torch.where(row > 0, row, 0.0) for row in h]
    weights = [torch.tensor(1.0)] * len(h)
    if encoder.narrow is not None:
        weights = [1 / (1 + torch.exp(-linear(encoder.widen, torch.tanh(linear(encoder.narrow, row))))) for row in h]
        weights = [torch.exp(sum(weight) / len(weight)) for weight in weights]
    if encoder.qkv is not None:
        h = [row + seen for row, seen in zip(h, slow_attention(encoder, h))]
    each = [torch.tanh(linear(encoder.last, row)) for row in h]
    return sum(weight * row for weight, row in zip(weights, each)) / sum(weights)


def slow_nce(query, key, tasks, temperature):
    """Each query against its own key and those of other tasks."""
    total = 0.0
    unit = lambda row: row / torch.sqrt((row**2).sum())  # noqa: E731
    for i in range(len(query)):
        rivals = [j for j in range(len(query)) if j == i or tasks[j] != tasks[i]]
        score = {j: (unit(query[i]) * unit(key[j])).sum() / temperature for j in rivals}
        total = total + torch.log(sum(torch.exp(s) for s in score.values())) - score[i]
    return total / len(query)


class TestFOCALPlus(Sibling):
    script, contexts, embedding = focal_pp, 2, staticmethod(slow_plus)
    method = {"metric_weight": 0.5, "nce_weight": 1.75, "temperature": 0.25, "momentum": 0.75, "heads": 2}
    encoder_shapes = [(48, 9), (48, 48), (3, 48), (48, 3), (144, 48), (48, 48), (5, 48)]

    def slow_encoder(self, agent, opts, contexts, segment, args):
        z = torch.stack([slow_plus(agent.encoder, rows) for rows in contexts[0]])
        key = torch.stack([slow_plus(agent.key_encoder, rows) for rows in contexts[1]]).detach()
        nce = slow_nce(z, key, TASK_IDS.tolist(), args.temperature)
        return args.nce_weight * nce + args.metric_weight * slow_metric(z, TASK_IDS.tolist()), {"stats/nce": nce}

    def slow_after(self, agent, args):
        with torch.no_grad():
            for follower, leader in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
                follower.copy_(args.momentum * follower + (1 - args.momentum) * leader)

    @pytest.mark.parametrize("case", [{"gate": False}, {"attention": False}, {"nce_weight": 0.0}])
    def test_ablated_updates_are_those_of_a_slow_recomputation(self, case, known_noise):
        self.check_updates(**case)

    def test_without_gate_and_attention_the_encoder_is_focals(self):
        agent, _ = self.make_agent(gate=False, attention=False)
        plain = SimpleNamespace(net=[*agent.encoder.net, agent.encoder.last])
        context = make_context(0)
        z = agent.encoder(context, torch.ones(4, 3))
        torch.testing.assert_close(z, torch.stack([slow_embedding(plain, rows) for rows in context]))

    def test_key_encoder_starts_at_the_encoder_and_has_no_gradient(self):
        agent = self.sized_agent()
        for key, query in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
            assert torch.equal(key, query) and not key.requires_grad

    def test_order_and_padding_of_a_context_do_not_matter(self):
        agent, _ = self.make_agent()
        context, mask = make_context(0), torch.tensor([1, 1, 0]).double().expand(4, -1)
        z = agent.encoder(context, mask)
        torch.testing.assert_close(agent.encoder(context[:, [1, 2, 0]], mask[:, [1, 2, 0]]), z)
        torch.testing.assert_close(agent.encoder(context[:, :2], mask[:, :2]), z)

    def test_many_rows_are_embedded_as_one_by_one(self):
        agent, _ = self.make_agent()
        context = torch.cat([make_context(k) for k in range(9)])  # 36 rows
        mask = (torch.arange(3) < 1 + torch.arange(36)[:, None] % 3).double()
        one_by_one = torch.cat([focal_pp.embed(agent, context[[i]], mask[[i]]) for i in range(36)])
        torch.testing.assert_close(focal_pp.embed(agent, context, mask), one_by_one)


def test_contrastive_loss_vectors():
    query = vectors((1, 0), (0, 1), (-1, 0))
    key = vectors((0.8, 0.6), (0.6, 0.8), (-0.6, 0.8))
    tasks = torch.arange(3)
    assert focal_pp.contrastive_loss(query, key, tasks, 0.1).item() == pytest.approx(0.2952, abs=1e-4)
    assert focal_pp.contrastive_loss(query, key, tasks, 1.0).item() == pytest.approx(0.7328, abs=1e-4)
    assert focal_pp.contrastive_loss(3 * query, 0.1 * key, tasks, 1.0).item() == pytest.approx(0.7328, abs=1e-4)
    same = torch.ones(16, 4).double()
    assert focal_pp.contrastive_loss(same, same, torch.arange(16), 0.1).item() == pytest.approx(2.772589, abs=1e-6)
    twins = torch.arange(16) // 2
    assert focal_pp.contrastive_loss(same, same, twins, 0.1).item() == pytest.approx(math.log(15), abs=1e-6)


def test_gate_vector(monkeypatch):
    """Means over the features, then a softmax over the transitions."""
    encoder = focal_pp.Encoder(2, 2, 2)
    features = torch.tensor([[[0.2, 0.4], [0.6, 0.8], [0.1, 0.1]]])  # after the sigmoid
    encoder.narrow, encoder.widen = torch.nn.Identity(), torch.nn.Identity()
    monkeypatch.setattr(torch, "tanh", lambda rows: rows)  # between the two, and bounded
    monkeypatch.setattr(torch.Tensor, "tanh", lambda rows: rows)
    with torch.no_grad():
        weight = encoder.weights(torch.logit(features), torch.ones(1, 3))
    np.testing.assert_allclose(weight, [[0.3021, 0.4506, 0.2473]], atol=1e-4)


def test_key_encoder_follows_with_its_momentum():
    args = focal_pp.Args(**METHOD | {"momentum": 0.999, "lr": 1e-30})
    agent = focal_pp.Agent(DATA, args)
    with torch.no_grad():
        for follower, leader in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
            follower.fill_(1.0)
            leader.fill_(0.0)
    for expected in (0.999, 0.998001):
        batch = dc.Batch(*(x.float() for x in make_batch(0)))
        segment = dc.Segment(*(x.float() for x in make_segment(0, args)))
        focal_pp.update(agent, TASK_IDS, make_context(0).float(), make_context(1).float(), segment, batch, args)
        assert all(torch.allclose(p, torch.tensor(expected)) for p in agent.key_encoder.parameters())


def test_heads_must_divide_the_width():
    message = stop_message(lambda: focal_pp.train(focal_pp.Args(heads=3, env="point-robot")))
    assert "--heads 3" in message and "--encoder-width 200" in message
