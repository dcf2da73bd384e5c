"""corro.py: every update against a slow recomputation, the negatives, where each batch comes from, learning.

The test vectors are worked out by hand. The slow recomputations are plain loops in float64 that use only the networks'
parameters."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from actor_critic_suite import METHOD, ActorCriticSuite, assert_same_update, check_best, check_evaluation
from actor_critic_suite import check_learning, check_segments, gradients, slow_actor_critic, slow_metrics
from actor_critic_suite import slow_multiplier_and_targets, slow_policy, take_steps, vectors
from conftest import ROOT, OnDevice, dataset_on_meta, origin, pattern, read_rows, slow_layers, to_meta

import corro
import data_collect as dc

OBS_DIM, ACT_DIM, CTX_DIM, ROWS = 3, 2, 9, 6  # ROWS: of a context, of the VAE's batch
DATA = SimpleNamespace(obs_dim=OBS_DIM, act_dim=ACT_DIM, ctx_dim=CTX_DIM, reward_std=0.25)
TRAIN_TASKS, REWARD = set(range(6)), 4  # of the numbered file; the column of its rewards
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 1, "log_every": 1, "eval_every": 99, "save_every": 99}
SMALL |= {"final_episodes": 1, "width": 8, "encoder_width": 8, "cvae_width": 8, "encoder_updates": 1, "cvae_updates": 1}


def make_agent(data=DATA, dtype=torch.float64, **changes):
    agent, args = TestCORRO().make_agent(data, **changes)
    return agent.to(dtype), args


def normal(*shape, seed=1):
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def train(path, folder, **changes):
    return corro.train(corro.Args(**SMALL | {"dataset": str(path), "run_dir": str(folder)} | changes))


# ---- slow recomputations ----------------------------------------------------------------


def slow_embedding(agent, row):
    out = slow_layers(agent.encoder.net, row)
    return out / (out * out).sum().sqrt()


def slow_z(agent, points):
    """Attention over real points [K, z_dim]."""
    scores = [torch.exp(agent.aggregator.score.weight[0] @ point + agent.aggregator.score.bias[0]) for point in points]
    return sum(score / sum(scores) * point for score, point in zip(scores, points))


def slow_cvae(agent, opt, rows, args):
    noise, loss, kls = pattern((ROWS, args.cvae_dim)), 0.0, 0.0
    for row, epsilon in zip(rows, noise):
        mean, log_var = slow_layers(agent.cvae.encoder, row).chunk(2)
        latent = mean + torch.sqrt(torch.exp(log_var)) * epsilon
        prediction = slow_layers(agent.cvae.decoder, torch.cat([row[: OBS_DIM + ACT_DIM], latent]))
        error = (prediction - row[OBS_DIM + ACT_DIM :]) ** 2  # of the reward, then of the next observation
        kl = sum(-0.5 * (1 + v - m**2 - torch.exp(v)) for m, v in zip(mean, log_var))
        loss = loss + (args.cvae_kl_weight * kl + error[1:].sum() / OBS_DIM + error[0]) / ROWS
        kls = kls + kl / ROWS
    gradients(loss, agent.cvae)
    opt.step()
    return {"losses/cvae": loss, "stats/cvae_kl": kls}


def slow_encoder(agent, opt, query, key, negatives, args):
    loss, hits, of_keys, of_negatives = 0.0, 0, 0.0, 0.0
    for b in range(len(query)):
        z = slow_embedding(agent, query[b])
        positive = torch.dot(z, slow_embedding(agent, key[b]))
        others = [torch.dot(z, slow_embedding(agent, row)) for row in negatives[b]]
        odds = [torch.exp(s / args.temperature) for s in (positive, *others)]
        loss = loss - torch.log(odds[0] / sum(odds)) / len(query)
        hits += positive > max(others)
        of_keys, of_negatives = of_keys + positive, of_negatives + sum(others) / len(others)
    assert 0 < hits < len(query)
    gradients(loss, agent.encoder)
    opt.step()
    stats = {"contrastive_acc": hits, "similarity_key": of_keys, "similarity_negatives": of_negatives}
    return {f"stats/{name}": total / len(query) for name, total in stats.items()} | {"losses/contrastive": loss}


def check_phase(phase, slow, *inputs):
    """Two updates of one network; the second one also tells whether gradients were reset."""
    agent, args = make_agent()
    twin = copy.deepcopy(agent)
    opt = torch.optim.Adam(getattr(twin, phase).parameters(), args.encoder_lr)
    for _ in range(2):
        expected = slow(twin, opt, *inputs, args)
        assert_same_update(agent, twin, getattr(corro, f"update_{phase}")(agent, *inputs, args), expected)


def test_cvae_update_equals_a_slow_recomputation(known_noise):
    check_phase("cvae", slow_cvae, normal(ROWS, CTX_DIM))


def test_encoder_update_equals_a_slow_recomputation():
    query, negatives = normal(ROWS, CTX_DIM), normal(ROWS, 4, CTX_DIM, seed=3)
    check_phase("encoder", slow_encoder, query, query + 0.7 * normal(ROWS, CTX_DIM, seed=2), negatives)


class TestCORRO(ActorCriticSuite):
    """The last phase; the policies see embedded contexts."""

    script, data = corro, DATA
    method = {"cvae_width": 10, "cvae_dim": 4, "cvae_kl_weight": 0.3, "negatives": "generative", "num_negatives": 4}
    method |= {"temperature": 0.3, "reward_noise": 1.6, "encoder_lr": 3e-3, "encoder_updates": 1, "cvae_updates": 1}
    own = {"encoder_opt": ("encoder", "encoder_lr"), "cvae_opt": ("cvae", "encoder_lr")}

    def make_args(self, **changes):
        given = METHOD | self.method | changes
        del given["metric_weight"]
        return dc.resolve(corro.Args(**given), corro.ENV_DEFAULTS)

    def make_contexts(self, seed):
        return [torch.nn.functional.normalize(normal(4, ROWS, 3, seed=seed), dim=-1)]

    def update(self, agent, contexts, rest, args, task_ids=None):
        return corro.update(agent, *contexts, *rest, args)

    def slow_update(self, agent, opts, contexts, segment, bc_batch, args):
        z = torch.stack([slow_z(agent, rows) for rows in contexts[0]])
        sums = slow_actor_critic(agent, z, segment, bc_batch, args, 0.0)
        actor = agent.kl_coef.item() * sums["divergence"] - sums["value"]
        losses = {"aggregator": sums["q"], "critic": sums["q"], "residual": actor, "behavior": sums["behavior"]}
        for name, loss in losses.items():  # only the critic's loss reaches the attention
            gradients(loss, getattr(agent, name))
        take_steps(opts)
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        metrics = slow_metrics(agent, z.detach(), None, actor, sums)
        return {tag: value for tag, value in metrics.items() if tag != "losses/encoder"}

    def test_adapted_policy_acts_on_the_real_transitions(self):
        """With its mean action; without a transition z is 0."""
        agent, _ = make_agent()
        context, obs = normal(3, ROWS, CTX_DIM), normal(3, OBS_DIM, seed=2)
        mask = vectors([1] * 6, [1, 0, 1, 0, 0, 0], [0] * 6)  # the last one has no transition
        agent.center.copy_(vectors(0.5, -0.2, 0.1))
        agent.std.fill_(0.3)
        z, act = corro.embed(agent, context, mask), corro.adapt(agent, context, mask, explore=True)(obs, None)
        for r in range(3):
            points = [slow_embedding(agent, row) for row, real in zip(context[r], mask[r]) if real]
            points = [(point - agent.center) / 0.3 for point in points]
            expected = slow_z(agent, points) if points else torch.zeros(3).double()
            torch.testing.assert_close(z[r], expected)
            torch.testing.assert_close(act[r], torch.tanh(slow_policy(agent, obs[r], expected)[0].mean))
        nothing = corro.embed(agent, context[:, :0], mask[:, :0])
        assert nothing.shape == (3, 3) and (nothing == 0).all() and not z.requires_grad

    def test_every_row_sees_its_own_training_task(self, numbered, numbered_path, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(  # an embedding that tells where it comes from
            corro.TransitionEncoder, "forward", lambda self, rows: rows[..., REWARD, None].expand(*rows.shape[:-1], 5)
        )

        def note(agent, points, *rest):  # without the standardization
            calls.append((points * agent.std + agent.center, *rest[:2]))

        spy(monkeypatch, "update_encoder", lambda *_: None, {})
        spy(monkeypatch, "update", note)
        own = {"gamma": 0.5, "n_step": 3, "bc_top_fraction": 0.4}
        train(numbered_path, tmp_path, total_updates=8, meta_batch=7, batch_size=9, context_size=11, **own)
        chosen = []
        for points, segment, _ in calls:
            assert points.shape == (7, 11, 5) and segment.act.shape == (7, 9, 3, 2)
            task, episode, step = origin(points[..., 0])
            assert (task == task[:, :1]).all() and (episode == episode[:, :1]).all()
            assert (step < numbered.lengths[task, episode]).all() and len(set(step.flatten().tolist())) > 8
            check_segments(segment, task[:, 0], own)
            assert (origin(segment.rew[..., 0])[1] != episode[:, :1]).any()  # drawn apart from the context
            chosen.append(tuple(task[:, 0].tolist()))
        assert len(set(chosen)) > 4 and any(len(set(tasks)) < 7 for tasks in chosen)  # drawn anew, with replacement
        assert set(sum(chosen, ())) == TRAIN_TASKS
        check_best([bc_batch.rew for _, _, bc_batch in calls], torch.tensor(chosen), numbered, 0.4)

    def test_reward_scale_follows_the_data(self, numbered, numbered_path, tmp_path, monkeypatch):
        """Where neither a flag nor the family's entry gives one."""
        monkeypatch.setattr(corro, "ENV_DEFAULTS", {"": corro.ENV_DEFAULTS[""]})
        scales = []
        spy(monkeypatch, "update_encoder", lambda *_: None, {})
        spy(monkeypatch, "update", lambda *call: scales.append(call[-1].reward_scale))
        train(numbered_path, tmp_path, gamma=0.5)
        assert scales == [pytest.approx(self.value_std / numbered.value_std(0.5))]

    def test_evaluation_equals_a_slow_recomputation(self, numbered):
        agent, args = make_agent(numbered)
        infer = lambda rows: slow_z(agent, [slow_embedding(agent, row) for row in rows])  # noqa: E731
        check_evaluation(corro, agent, args, numbered, infer, torch.zeros(3))

    def test_learning_rates_fall_in_the_second_half(self, numbered_path, tmp_path, monkeypatch):
        rates = {"cvae_opt": [], "encoder_opt": [], "opt": [], "behavior_opt": []}

        def note(*opts):
            return lambda agent, *_: [rates[opt].append(getattr(agent, opt).param_groups[0]["lr"]) for opt in opts]

        spy(monkeypatch, "update_cvae", note("cvae_opt"), {})
        spy(monkeypatch, "update_encoder", note("encoder_opt"))
        spy(monkeypatch, "update", note("opt", "behavior_opt"))
        lengths = {"cvae_updates": 4, "encoder_updates": 4, "total_updates": 8}
        train(numbered_path, tmp_path, negatives="generative", lr=0.01, encoder_lr=0.02, **lengths)
        for opt in ("opt", "behavior_opt"):
            assert rates[opt] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])
        assert rates["cvae_opt"] == rates["encoder_opt"] == [0.02] * 4

    @pytest.mark.parametrize("kind", ["generative", "reward", "none"])
    def test_update_stays_on_the_device(self, kind, numbered):
        agent, args = make_agent(numbered, torch.float32, negatives=kind)
        agent, data = to_meta(agent), dataset_on_meta(numbered)
        with OnDevice():
            query, key = data.sample(data.sample_tasks(5, None), 2, None)[..., :-1].unbind(1)
            if kind == "generative":
                corro.update_cvae(agent, query, args)
            corro.update_encoder(agent, query, key, corro.draw_negatives(agent, data, query, args, None), args)
            tasks = data.sample_tasks(4, None)
            points = agent.standardize(agent.encoder(data.sample_context(tasks, 6, None)))
            segment = data.sample_segments(tasks, 5, args.n_step, args.gamma, None)
            metrics = corro.update(agent, points, segment, data.sample_batch(tasks, 5, None, 0.5), args)
            corro.adapt(agent, query[:, None], torch.ones_like(query[:, :1]))(query[:, : data.obs_dim], None)
        assert all(value.device.type == "meta" for value in metrics.values())

    def test_learns_point_robot(self, tmp_path):
        """On the shipped data."""
        check_learning(corro, tmp_path, encoder_width=32, encoder_updates=300, negatives="none")


# ---- test vectors -----------------------------------------------------------------------


def test_losses_match_hand_made_vectors():
    for positive, negatives, temperature, expected in (
        (1.0, [0.0] * 16, 0.1, 0.0007262),
        (0.3, [0.3] * 16, 0.1, 2.8332133),
        (0.8, [0.5, 0.2, -0.4], 1.0, 0.951976),
    ):
        loss = corro.info_nce(vectors([positive, *negatives]), temperature)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    for mean, log_var, expected in (((0, 0), (math.log(4), 0), 0.806853), ((1, -2), (-math.log(4),) * 2, 3.136294)):
        assert corro.latent_kl(vectors(*mean), vectors(*log_var)).item() == pytest.approx(expected, abs=1e-6)
    target, prediction = vectors((1, 1, 2), (0, 0, 0)), vectors((0, 1, 0), (0.5, 1, 0))  # reward first
    assert corro.cvae_loss(prediction, target, vectors(0.5), 0.2).item() == pytest.approx(1.975)


def test_aggregator_matches_a_hand_made_vector():
    aggregator = corro.Aggregator(2).double()
    with torch.no_grad():
        aggregator.score.weight.copy_(vectors((2, -1)))
    z = aggregator(vectors([(1, 0), (0, 1), (0.6, 0.8)]), torch.ones(1, 3)).detach()
    np.testing.assert_allclose(z, [(0.8957, 0.1688)], atol=5e-5)


def test_networks_have_the_papers_sizes():
    """ant-dir and walker-rand-params: sizes, then numbers of parameters."""
    for obs_dim, act_dim, width, z_dim, *expected in (
        (27, 8, 64, 5, 8_581, 24_704, 16_412, 6),
        (18, 6, 128, 32, 26_272, 22_144, 13_843, 33),
    ):
        data = SimpleNamespace(obs_dim=obs_dim, act_dim=act_dim, ctx_dim=2 * obs_dim + act_dim + 1)
        agent, _ = make_agent(data, encoder_width=width, z_dim=z_dim, cvae_width=128, cvae_dim=64)
        nets = (agent.encoder, agent.cvae.encoder, agent.cvae.decoder, agent.aggregator)
        assert [sum(p.numel() for p in net.parameters()) for net in nets] == expected


# ---- negatives --------------------------------------------------------------------------


def test_reward_negatives_add_relative_noise(known_noise):
    agent, args = make_agent(negatives="reward")
    query = normal(ROWS, CTX_DIM)
    kept = query.clone()
    negatives = corro.draw_negatives(agent, DATA, query, args, None)
    expected = kept[:, None].repeat(1, 4, 1)
    expected[..., OBS_DIM + ACT_DIM] += 1.6 * 0.25 * pattern((ROWS, 4))
    assert torch.equal(negatives, expected) and torch.equal(query, kept)


def test_generative_negatives_are_decoded_from_the_prior(known_noise):
    agent, args = make_agent()
    query = normal(ROWS, CTX_DIM)
    negatives, noise = corro.draw_negatives(agent, DATA, query, args, None), pattern((ROWS, 4, 4))
    assert not negatives.requires_grad
    for b in range(ROWS):
        for n in range(4):
            known = query[b, : OBS_DIM + ACT_DIM]
            assert torch.equal(negatives[b, n, : OBS_DIM + ACT_DIM], known)
            decoded = slow_layers(agent.cvae.decoder, torch.cat([known, noise[b, n]]))
            torch.testing.assert_close(negatives[b, n, OBS_DIM + ACT_DIM :], decoded)


# ---- where the data comes from ----------------------------------------------------------


def spy(monkeypatch, name, record, result=None):
    """A call of corro's function `name` is first given to `record`; a `result` then takes the place of its own."""
    original = getattr(corro, name)

    def wrapper(*arguments):
        record(*arguments)
        return original(*arguments) if result is None else result

    monkeypatch.setattr(corro, name, wrapper)


@pytest.mark.parametrize("kind", ["reward", "generative", "none"])
def test_first_phases_see_the_right_tasks(kind, numbered, numbered_path, tmp_path, monkeypatch):
    seen, calls = {"cvae": [], "encoder": []}, []
    keep = lambda agent, rows, args: (calls.append("cvae"), seen["cvae"].append(rows))  # noqa: E731
    spy(monkeypatch, "update_cvae", keep, {"losses/cvae": torch.zeros(())})  # such rewards overflow a VAE
    spy(monkeypatch, "update_encoder", lambda *call: (calls.append("encoder"), seen["encoder"].append(call[1:4])))
    spy(monkeypatch, "embed_transitions", lambda *_: calls.append("embed"))
    spy(monkeypatch, "update", lambda *_: calls.append("policy"))
    sizes = {"cvae_batch_size": 24, "num_queries": 20, "num_negatives": 3}
    sizes |= {"cvae_updates": 5, "encoder_updates": 4, "total_updates": 2}
    result = train(numbered_path, tmp_path, negatives=kind, **sizes)
    assert calls == ["cvae"] * 5 * (kind == "generative") + ["encoder"] * 4 + ["embed"] + ["policy"] * 2
    tags = {tag for _, tag, _ in read_rows(result["run_dir"])}
    assert {"losses/contrastive", "losses/q"} <= tags and ("losses/cvae" in tags) == (kind == "generative")
    for rows in seen["cvae"]:
        assert rows.shape == (24, numbered.ctx_dim)
        task, episode, step = origin(rows[:, REWARD])
        assert torch.equal(rows, numbered.episodes[task, episode, step, :-1])
        assert set(task.tolist()) <= TRAIN_TASKS and len(set(task.tolist())) > 3
    for query, key, negatives in seen["encoder"]:
        assert query.shape == key.shape == (20, numbered.ctx_dim) and negatives.shape == (20, 3, numbered.ctx_dim)
        (task, episode, step), (key_task, key_episode, key_step) = origin(query[:, REWARD]), origin(key[:, REWARD])
        assert torch.equal(query, numbered.episodes[task, episode, step, :-1])
        assert torch.equal(key, numbered.episodes[key_task, key_episode, key_step, :-1])
        assert torch.equal(task, key_task) and set(task.tolist()) <= TRAIN_TASKS and len(set(task.tolist())) > 3
        assert (episode != key_episode).any() and (step != key_step).any()  # any two transitions of the task
        if kind == "none":  # drawn one by one
            task = origin(negatives[..., REWARD])[0]
            assert set(task.flatten().tolist()) == TRAIN_TASKS and (task != task[:, :1]).any()
        else:  # of the query
            known = numbered.obs_dim + numbered.act_dim
            assert torch.equal(negatives[..., :known], query[:, None, :known].expand(-1, 3, -1))


def test_dataset_is_embedded_and_standardized_over_episodes(numbered):
    agent, _ = make_agent(numbered, torch.float32)
    numbered = copy.copy(numbered)
    numbered.lengths = numbered.lengths.clone()
    numbered.lengths[0, -1] = 0  # no episode
    embedded = corro.embed_transitions(agent, numbered)
    assert embedded.shape == (*numbered.episodes.shape[:-1], 3) and not embedded.requires_grad
    means = []
    for task in TRAIN_TASKS:
        for episode, length in zip(numbered.episodes[task], numbered.lengths[task].tolist()):
            rows = [slow_embedding(agent, row[:-1]).detach().double() for row in episode[:length]]
            means += [sum(rows) / length] if length else []
    center = sum(means) / len(means)
    std = (sum(((z - center) ** 2).sum() for z in means) / (3 * len(means))) ** 0.5
    torch.testing.assert_close(agent.center.double(), center)
    assert agent.std.item() == pytest.approx(std.item(), rel=1e-4)
    for task, episode, step in [(0, 0, 0), (0, 3, 6), (5, 1, 2), (8, 2, 4)]:
        expected = (slow_embedding(agent, numbered.episodes[task, episode, step, :-1]) - center) / std
        torch.testing.assert_close(embedded[task, episode, step].double(), expected, rtol=0, atol=1e-4)


def test_a_collapsed_encoder_leaves_finite_embeddings(numbered):
    agent, _ = make_agent(numbered, torch.float32)
    with torch.no_grad():
        agent.encoder.net[-1].weight.zero_()
        agent.encoder.net[-1].bias.copy_(vectors(1, 0, 0))
    assert corro.embed_transitions(agent, numbered).abs().max() < 1  # rounding errors are not blown up


# ---- schedules and switches -------------------------------------------------------------


DEFAULTS = [("ant-dir", 11, ("reward", 11, 5)), ("point-robot-wind", 11, ("generative", 44, 5))]
DEFAULTS += [("point-robot-wind", 1, ("generative", 4, 1))]


@pytest.mark.parametrize("env, updates, defaults", DEFAULTS)
def test_defaults_follow_family_and_length(env, updates, defaults, monkeypatch):
    monkeypatch.setattr(dc, "load_dataset", lambda *_: 1 / 0)  # the arguments are complete by then
    args = corro.Args(env=env, total_updates=updates)
    with pytest.raises(ZeroDivisionError):
        corro.train(args)
    assert (args.negatives, args.encoder_updates, args.cvae_updates) == defaults


# ---- learning ---------------------------------------------------------------------------


def test_encoder_learns_to_recognize_negatives(tmp_path):
    """Chance: ln 17 = 2.83, 1 / 17."""
    sizes = {"encoder_updates": 300, "encoder_width": 64, "log_every": 100}
    result = train(ROOT / "datasets" / "point-robot.npz", tmp_path, negatives="reward", **sizes)
    values = {tag: float(value) for step, tag, value in read_rows(result["run_dir"]) if step == 300}
    assert values["losses/contrastive"] < 2 and values["stats/contrastive_acc"] > 0.3
