"""corro.py: InfoNCE, the VAE, the negatives, the attention, what each phase trains, cost of an update."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_focal import Operations

import corro
import data_collect as dc

OBS_DIM, ACT_DIM, TASKS, BATCH = 3, 2, 4, 5
CTX_DIM = 2 * OBS_DIM + ACT_DIM + 1
DATA = SimpleNamespace(obs_dim=OBS_DIM, reward_spread=0.25)


def make_agent(**changes):
    sizes = {"width": 16, "encoder_width": 16, "z_dim": 3, "cvae_width": 16, "cvae_dim": 4, "negatives": "reward"}
    args = corro.resolve(corro.Args(**sizes | {"encoder_updates": 1, "cvae_updates": 1} | changes))
    torch.manual_seed(0)
    agent = corro.Agent(OBS_DIM, ACT_DIM, CTX_DIM, args).double()
    agent.make_optimizer(args)
    return agent, args


def vectors(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "positive, negatives, temperature, expected, tolerance",
    [
        (1.0, [0.0] * 16, 0.1, 0.0007262, 1e-7),
        (0.3, [0.3] * 16, 0.1, 2.8332133, 1e-6),
        (0.9, [0.8] * 16, 0.1, 1.9295, 1e-4),
        (-1.0, [1.0] * 16, 0.1, 22.77259, 1e-4),
        (0.8, [0.5, 0.2, -0.4], 0.1, 0.0509516, 1e-6),
        (0.8, [0.5, 0.2, -0.4], 1.0, 0.951976, 1e-6),
    ],
)
def test_info_nce_vectors(positive, negatives, temperature, expected, tolerance):
    loss = corro.info_nce(vectors([positive, *negatives]), temperature)
    assert loss.item() == pytest.approx(expected, abs=tolerance)


def test_encoder_update_compares_normalized_embeddings():
    agent, args = make_agent()
    agent.encoder.net = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        agent.encoder.net.weight.copy_(torch.eye(2))
        agent.encoder.net.bias.zero_()
    agent.opts[1] = torch.optim.Adam(agent.encoder.parameters(), 1e-3)
    query, key = vectors((3, 4), (1, 0)), vectors((4, 3), (1, 1))
    negatives = vectors([(0, 1), (-1, 0)], [(0, 2), (1, -1)])
    metrics = corro.update_encoder(agent, query, key, negatives, args)
    assert metrics["losses/contrastive"].item() == pytest.approx(0.4387, abs=5e-5)
    assert metrics["stats/similarity_key"].item() == pytest.approx((0.96 + 0.70711) / 2, abs=1e-5)


def test_embeddings_have_norm_1():
    agent, _ = make_agent()
    z = agent.encoder(torch.randn(5, 7, CTX_DIM).double())
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5, 7).double())


@pytest.mark.parametrize(
    "mean, log_var, expected",
    [((0, 0), (0, 0), 0), ((1, 0), (0, 0), 0.5), ((0, 0), (math.log(4), 0), 0.806853)]
    + [((1, -2), (-math.log(4), -math.log(4)), 3.136294)],
)
def test_latent_kl_vectors(mean, log_var, expected):
    assert corro.latent_kl(vectors(*mean), vectors(*log_var)).item() == pytest.approx(expected, abs=1e-6)


def test_cvae_loss_vector():
    target, prediction = vectors((1, 1, 2), (0, 0, 0)), vectors((0, 1, 0), (0.5, 1, 0))  # reward first
    assert corro.cvae_loss(prediction, target, vectors(0.5), 0.2).item() == pytest.approx(1.975)


def test_aggregator_vector_and_symmetry():
    aggregator = corro.Aggregator(2).double()
    with torch.no_grad():
        aggregator.score.weight.copy_(vectors((2, -1)))
        aggregator.score.bias.fill_(7)
    each, mask = vectors([(1, 0), (0, 1), (0.6, 0.8)]), torch.ones(1, 3)
    z = aggregator(each, mask).detach()
    np.testing.assert_allclose(z, [(0.8957, 0.1688)], atol=5e-5)
    torch.testing.assert_close(aggregator(each.flip(1), mask), z)
    with torch.no_grad():
        aggregator.score.bias.zero_()
    torch.testing.assert_close(aggregator(each, mask), z)
    torch.testing.assert_close(aggregator(each[:, :1].expand(-1, 4, -1), torch.ones(1, 4)), each[:, 0])


def test_aggregator_ignores_masked_transitions_and_is_zero_without_any():
    agent, _ = make_agent()
    each, mask = torch.randn(2, 6, 3).double(), torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6]).double()
    z = agent.aggregator(each, mask)
    torch.testing.assert_close(z[:1], agent.aggregator(each[:1, :2], torch.ones(1, 2)))
    assert (z[1] == 0).all() and (agent.aggregator(each[:, :0], mask[:, :0]) == 0).all()


@pytest.mark.parametrize("kind", ["reward", "generative"])
def test_negatives_keep_what_they_must(kind):
    agent, args = make_agent(negatives=kind)
    query = torch.randn(6, CTX_DIM).double()
    negatives = corro.make_negatives(agent, query, DATA, args)
    assert negatives.shape == (6, 16, CTX_DIM) and not negatives.requires_grad
    repeated = query[:, None].expand(-1, 16, -1)
    reward = OBS_DIM + ACT_DIM
    assert torch.equal(negatives[..., :reward], repeated[..., :reward])  # the query's own (obs, act), bit for bit
    assert (negatives[..., reward] != repeated[..., reward]).all()
    assert torch.equal(negatives[..., reward + 1 :], repeated[..., reward + 1 :]) == (kind == "reward")
    if kind == "reward":
        noise = negatives[..., reward] - repeated[..., reward]
        assert 0.3 < noise.std() < 0.7  # 2 times the spread of the rewards


def test_default_negatives_follow_the_family(monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(dc, "load_dataset", stop)
    defaults = {"ant-dir": "reward", "point-robot-wind": "generative", "walker-rand-params": "generative"}
    for env, expected in defaults.items():
        args = corro.Args(env=env, total_updates=10)
        with pytest.raises(Stop):
            corro.train(args)
        assert (args.negatives, args.encoder_updates, args.cvae_updates) == (expected, 10, 5)


def test_each_update_trains_its_own_networks():
    agent, args = make_agent(negatives="generative")
    rows = torch.randn(8, CTX_DIM).double()
    size = (TASKS, BATCH)
    obs, next_obs, act = torch.randn(*size, OBS_DIM), torch.randn(*size, OBS_DIM), torch.rand(*size, ACT_DIM) - 0.5
    batch = [x.double() for x in (obs, act, torch.randn(size), next_obs, torch.zeros(size))]
    each = torch.nn.functional.normalize(torch.randn(TASKS, 6, 3).double(), dim=-1)
    negatives = corro.make_negatives(agent, rows, DATA, args)
    for call, moved in (
        (lambda: corro.update_cvae(agent, rows, args), {"cvae"}),
        (lambda: corro.update_encoder(agent, rows, rows.flip(0), negatives, args), {"encoder"}),
        (lambda: corro.update(agent, each, batch, args), {"aggregator", "q", "q_target", "gaussians", "brac_alpha"}),
    ):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        call()
        after = agent.state_dict()
        assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == moved


def test_aggregator_learns_from_the_critics_alone(monkeypatch):
    def gradient(brac_alpha):
        agent, args = make_agent(brac_alpha=brac_alpha)
        monkeypatch.setattr(agent.opts[0], "step", lambda: None)
        with torch.no_grad():
            agent.gaussians.b_3[1] += 0.5
        generator = torch.Generator().manual_seed(1)
        shapes = [(OBS_DIM,), (ACT_DIM,), (), (OBS_DIM,)]
        batch = [torch.rand(TASKS, BATCH, *shape, generator=generator, dtype=torch.float64) - 0.5 for shape in shapes]
        each = torch.randn(TASKS, 6, 3, generator=generator, dtype=torch.float64)
        torch.manual_seed(0)
        corro.update(agent, each, [*batch, torch.zeros(TASKS, BATCH).double()], args)
        return agent.aggregator.score.weight.grad, agent.gaussians.w_3.grad

    (one, policy), (other, other_policy) = gradient(0.1), gradient(10.0)
    assert one.abs().max() > 0 and torch.equal(one, other) and not torch.equal(policy, other_policy)


def test_precomputed_embeddings_are_those_of_the_encoder(tiny):
    """What the third phase gathers from the embedded dataset is the embedding of what it would gather from the data."""
    args = corro.resolve(corro.Args(env="point-robot", negatives="reward", encoder_updates=1, cvae_updates=1))
    agent = corro.Agent(tiny.obs_dim, tiny.act_dim, tiny.ctx_dim, args)
    embedded = corro.embed_dataset(agent, tiny)
    tasks = torch.as_tensor(tiny.train_ids)
    rows = tiny.sample_episode(tasks, 7, torch.Generator().manual_seed(0))[..., :-1]
    each = embedded.sample_episode(tasks, 7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(each, agent.encoder(rows))
    assert tiny.episodes.shape[-1] == tiny.ctx_dim + 1  # the data itself is as before


def test_operations_of_an_encoder_update():
    agent, args = make_agent()
    rows = torch.randn(64, CTX_DIM).double()
    corro.update_encoder(agent, rows, rows, corro.make_negatives(agent, rows, DATA, args), args)
    with Operations() as operations:
        corro.update_encoder(agent, rows, rows, corro.make_negatives(agent, rows, DATA, args), args)
    assert operations.count <= 120
