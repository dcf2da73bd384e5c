"""idaq.py: whole updates against a slow recomputation, its adaptation episode by episode, its data, learning.

What it shares with focal.py, critics and policies, is recomputed as there (test_focal.py).
"""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OnDevice, origin, stop_message, to_meta
from test_focal import DATA, FAST, TASK_IDS, assert_same_update, check_best, check_clamps, check_evaluation
from test_focal import check_learning, check_segments, decaying, gradients, make_batch, make_context, make_segment
from test_focal import slow_actor_critic, slow_embedding, slow_metric, slow_multiplier_and_targets, slow_policy, start
from test_focal import vectors

import data_collect as dc
import idaq

# float32, in which the optimizers keep it, holds this learning rate exactly
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "brac_alpha": 1.75, "brac_alpha_lr": 0.3}
METHOD |= {"divergence_target": 0.2, "brac_alpha_max": 100.0, "n_step": 3}


def make_agent(data=DATA, **changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = idaq.Args(**METHOD | changes)
    torch.manual_seed(0)
    agent = idaq.Agent(data, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
        for net in (agent.q, agent.q_target):  # now the one twin is the smaller, now the other
            net.w_3.sub_(net.w_3.mean(1, keepdim=True))
            net.b_3.zero_()
    return agent, args


# ---- the slow update --------------------------------------------------------------------


def slow_update(agent, opt, context, segment, best, args):
    """One update of a copy of the agent by an optimizer of its own -> metrics."""
    z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
    encoder = args.metric_weight * slow_metric(z, TASK_IDS.tolist())
    sums = slow_actor_critic(agent, z.detach(), segment, best, args, 0.0)
    actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"]
    gradients(encoder, agent.encoder)
    gradients(sums["q"], agent.q)
    gradients(actor, agent.shift)
    gradients(sums["behavior"], agent.behavior)
    opt.step()
    slow_multiplier_and_targets(agent, sums["divergence"], args)
    return {
        "losses/encoder": encoder,
        "losses/q": sums["q"],
        "losses/actor": actor,
        "losses/behavior": sums["behavior"],
        "stats/q_mean": sums["value"],
        "stats/divergence": sums["divergence"],
        "stats/brac_alpha": agent.brac_alpha,
        "z/between_std": sum(z[:, d].std() for d in range(args.z_dim)) / args.z_dim,
    }


@pytest.mark.parametrize("case", [{}, {"target_noise": 1.0, "n_step": 1}])
def test_two_updates_are_those_of_a_slow_recomputation(case, known_noise):
    agent, args = make_agent(**case)
    twin = copy.deepcopy(agent)
    opt = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], args.lr)
    for k in range(2):
        inputs = make_context(k), make_segment(100 + k, args), make_batch(200 + k)
        with decaying(twin.behavior, args):
            expected = slow_update(twin, opt, *inputs, args)
        metrics = idaq.update(agent, TASK_IDS, *inputs, args)
        assert_same_update(agent, twin, metrics, expected)


def test_inputs_of_the_slow_recomputation_tell_alternatives_apart():
    """Twins differ in both directions."""
    agent, args = make_agent()
    batch, z = start(make_segment(100, args)), torch.tanh(make_context(0)[:, 0, :3])
    with torch.no_grad():
        for q in (agent.q, agent.q_target):
            assert 0 < (q(batch.obs, batch.act, z)[0] < q(batch.obs, batch.act, z)[1]).double().mean() < 1


@pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
def test_multiplier_keeps_to_its_bounds(target, expected):
    agent, args = make_agent(brac_alpha_lr=1e4, brac_alpha_max=3.0, divergence_target=target)
    idaq.update(agent, TASK_IDS, make_context(0), make_segment(0, args), make_batch(0), args)
    assert agent.brac_alpha == expected


def test_log_std_is_clamped():
    check_clamps(make_agent()[0], [(-3, -5), (1, 2)])


# ---- networks ---------------------------------------------------------------------------


def test_networks_have_the_asked_sizes_and_start_as_they_should():
    """The last layer of both policies all but at 0; the targets at the critics, which differ."""
    agent = idaq.Agent(DATA, idaq.Args(**METHOD | {"width": 64, "encoder_width": 48, "z_dim": 5}))
    assert [tuple(layer.weight.shape) for layer in agent.encoder.net[::2]] == [(48, 9), (48, 48), (5, 48)]
    assert agent.q.w_2.shape == (2, 64, 64) and agent.shift.w_2.shape == agent.behavior.w_2.shape == (1, 64, 64)
    for net in (agent.shift, agent.behavior):
        assert 8e-4 < net.w_3.abs().max() <= 1e-3 and 0 < net.b_3.abs().max() <= 1e-3
    for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
        assert torch.equal(target, source) and not target.requires_grad and not torch.equal(source[0], source[1])


@pytest.mark.parametrize("explore", [False, True])
def test_adapted_policy_is_the_mean_action_at_the_embedding_of_the_real_transitions(explore):
    agent, _ = make_agent()
    context, obs = make_context(0), torch.randn(4, DATA.obs_dim).double()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
    act = idaq.adapt(agent, context, mask, explore)(obs, torch.zeros(4))
    z = idaq.embed(agent, context, mask)
    assert not z.requires_grad
    for row in range(4):
        rows = context[row][mask[row] == 1]
        expected = slow_embedding(agent.encoder, rows) if len(rows) else torch.zeros(3).double()
        torch.testing.assert_close(z[row], expected)
        torch.testing.assert_close(act[row], torch.tanh(slow_policy(agent, obs[row], expected)[0].mean))
    assert (idaq.embed(agent, context[:, :0], mask[:, :0]) == 0).all()


# ---- vectors of the losses --------------------------------------------------------------


def test_metric_loss_and_tanh_gaussian_vectors():
    z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))
    assert idaq.metric_loss(z, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(1.2531530948, abs=1e-9)
    mean, std, pre = vectors([0.3], [0.5], [0.8])
    assert idaq.tanh_gaussian_logp(mean, std.log(), pre).item() == pytest.approx(-0.1442842320, abs=1e-10)


# ---- the adaptation ----------------------------------------------------------------------


def test_farthest_candidate_vectors():
    tried = [vectors((0.0, 0.0)), vectors((1.0, 1.0))]
    candidates = vectors((0.5, 0.5), (-1.0, 0.0), (1.0, 0.0))[None]
    assert idaq.farthest(candidates, tried).tolist() == [[-1.0, 0.0]]  # the first of two equals
    assert idaq.farthest(candidates, tried[:1]).tolist() == [[-1.0, 0.0]]
    assert idaq.farthest(candidates, []).tolist() == [[0.5, 0.5]]
    rows = torch.cat([candidates, candidates.flip(1)])
    both = [z.expand(2, -1) for z in tried]
    assert idaq.farthest(rows, both).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert idaq.farthest(vectors((0.9, 0.9), (3.0, 3.0))[None], tried).tolist() == [[3.0, 3.0]]


RETURNS = [[-10, -30, -8, -9, -5, -7, -6], [-1, -4, -3, -9, -0.5, -0.25, -4], [-3, -2, -1, -0.5, -4, -2, -5]]
ACCEPTED = [[{2}, {2}, {2, 4}], [{0}, {0}, {0, 4}], [{2}, {2, 3}, {2, 3}]]  # before episodes 3, 4 and 5 of each task
BEST = [4, 5, 3]


def test_adaptation_accepts_what_earns_more_and_plays_the_best_z_at_last(numbered, monkeypatch):
    agent, args = make_agent(numbered, adapt_episodes=7, reference_episodes=3, candidates=4, context_size=6)
    agent, plays, played, seen, rollout = agent.float(), 2, [], [], dc.rollout
    agent.encoder.net[0].weight.data[:, 4] /= 1000  # the rewards of `numbered` are large
    state = copy.deepcopy(agent.state_dict())
    returns = np.repeat(RETURNS, plays, 0)  # [R, 7], of test tasks 6, 7 and 8

    def spied(candidates, tried, farthest=idaq.farthest):
        seen.append((candidates, list(tried)))
        return farthest(candidates, tried)

    def spied_embed(agent, context, mask, embed=idaq.embed):
        seen.append((context, mask))
        return embed(agent, context, mask)

    def paid(env, policy, seeds, device):
        """A real episode, with the returns above in place of the real ones."""
        done = rollout(env, policy, seeds, device)
        done["rewards"] = np.repeat(returns[:, len(played), None] / 20, 20, 1).astype(np.float32)
        z = policy.__defaults__[0]
        raw = torch.as_tensor(done["observations"])
        seen_obs = (raw - numbered.obs_mean) / numbered.obs_spread
        parts = (seen_obs[:, :-1], torch.as_tensor(done["actions"]), torch.as_tensor(done["rewards"])[..., None])
        rows = torch.cat([*parts, seen_obs[:, 1:]], -1)
        played.append((env.task_ids.tolist(), list(seeds), z, rows))
        return done

    monkeypatch.setattr(idaq, "farthest", spied)
    monkeypatch.setattr(idaq, "embed", spied_embed)
    monkeypatch.setattr(dc, "rollout", paid)
    results = idaq.explore_and_adapt(agent, numbered, args, plays)
    assert all(torch.equal(value, state[name]) for name, value in agent.state_dict().items())

    (log, _), seen = seen[0], seen[1:]
    task, episode, _ = origin(log[..., 4])
    assert (task == np.arange(6)[:, None]).all() and (episode == episode[:, :1]).all() and log.shape[1] == 6
    pool = [slow_embedding(agent.encoder, rows).detach() for rows in log]
    tasks = [6, 6, 7, 7, 8, 8]
    assert [p[0] for p in played] == [tasks] * 7
    assert [p[1] for p in played] == [[10_000 + 97 * t + i % 2 + 31 * k for i, t in enumerate(tasks)] for k in range(7)]
    zs = [p[2] for p in played]
    for k in range(3):
        candidates, tried = seen[k]
        assert candidates.shape == (6, 4, 3) and len(tried) == k and all(map(torch.equal, tried, zs))
        near = [[min((c - z).norm().item() for z in pool) for c in row] for row in candidates]
        assert np.max(near) < 1e-5 and len({tuple(c.tolist()) for c in candidates.flatten(0, 1)}) == 6
        for row in range(6):
            spread = [min([(c - z[row]).pow(2).mean().item() for z in tried], default=0) for c in candidates[row]]
            assert torch.equal(zs[k][row], candidates[row][int(np.argmax(spread))])
    for k in (3, 4, 5):
        for row in range(6):
            rows = torch.cat([played[e][3][row] for e in sorted(ACCEPTED[row // 2][k - 3])])
            torch.testing.assert_close(zs[k][row], slow_embedding(agent.encoder, rows).detach(), rtol=1e-4, atol=1e-5)
    for row in range(6):
        assert torch.equal(zs[6][row], zs[BEST[row // 2]][row])
    expected = {f"eval/idaq/return_ep_{k + 1}": np.mean(returns[:, k]) for k in range(7)}
    last, scores = returns[:, 6], dc.normalize(numbered, np.array(tasks), returns[:, 6])
    expected |= {"eval/idaq/return": last.mean(), "eval/idaq/return_se": last.std(ddof=1) / 6**0.5}
    assert results == pytest.approx(expected | {"eval/idaq/normalized": scores.mean()}, rel=1e-5)


def test_final_evaluation_alone_has_the_adaptation(numbered):
    agent, args = make_agent(numbered, adapt_episodes=3, reference_episodes=2, context_size=6)
    agent = agent.float()
    assert "eval/idaq/return" not in idaq.evaluate_all(agent, numbered, args, ("iid", "train"), 1)
    found = idaq.evaluate_all(agent, numbered, args, dc.PROTOCOLS, 1)
    assert {f"eval/idaq/return_ep_{k}" for k in (1, 2, 3)} <= found.keys() and "eval/idaq/return_ep_4" not in found
    assert found["eval/idaq/return"] == found["eval/idaq/return_ep_3"]


def test_reference_stage_must_leave_an_episode():
    message = stop_message(lambda: idaq.train(idaq.Args(reference_episodes=10, env="point-robot")))
    assert "--reference-episodes 10" in message and "--adapt-episodes 10" in message


# ---- training ---------------------------------------------------------------------------


def watched(monkeypatch, folder, path, **changes):
    """Train -> what each update was given, with the learning rates at that time, and the contexts of the evaluation."""
    monkeypatch.chdir(folder)
    updates, contexts, update, adapt = [], [], idaq.update, idaq.adapt

    def watch(agent, task_ids, context, segment, best, args):
        rates = [float(agent.opt.param_groups[0]["lr"])]
        given = {"task_ids": task_ids, "context": context, "segment": segment, "best": best}
        updates.append(SimpleNamespace(**given, rates=rates))
        return update(agent, task_ids, context, segment, best, args)

    def watch_adapt(agent, context, mask, explore, clone=False):
        contexts.append(context[..., 4][mask == 1])  # rewards
        return adapt(agent, context, mask, explore, clone)

    monkeypatch.setattr(idaq, "update", watch)
    monkeypatch.setattr(idaq, "adapt", watch_adapt)
    settings = {name: value for name, value in FAST.items() if name != "dual_lr"}
    idaq.train(idaq.Args(**settings | {"dataset": str(path)} | changes))
    return updates, contexts


def test_training_sees_training_tasks_and_every_row_its_own_task(numbered, numbered_path, tmp_path, monkeypatch):
    updates, contexts = watched(monkeypatch, tmp_path, numbered_path)
    assert len(updates) == 20 and set(torch.cat([u.task_ids for u in updates]).tolist()) == set(range(6))
    assert any(len(set(u.task_ids.tolist())) < 5 for u in updates)  # with replacement
    for u in updates:
        assert u.context.shape == (5, 6, 7) and (u.context[..., 4] >= 0).all()
        task, episode, _ = origin(u.context[..., 4])
        assert (task == u.task_ids[:, None]).all() and (episode == episode[:, :1]).all()
        check_segments(u.segment, u.task_ids, FAST)
    check_best([u.best.rew for u in updates], [u.task_ids for u in updates], numbered, FAST["anchor_share"])
    of_test, foreign, *_, of_training = contexts[
        :15
    ]  # one of each protocol, but five of either online; then of pi_beta
    assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
    assert set(origin(of_training)[0].tolist()) == set(range(6))


def test_evaluation_is_that_of_slow_policies_and_critics(numbered):
    agent, args = make_agent(numbered)
    check_evaluation(idaq, agent, args, numbered, partial(slow_embedding, agent.encoder))


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate_falls_in_the_second_half(decay, numbered_path, tmp_path, monkeypatch):
    updates, _ = watched(monkeypatch, tmp_path, numbered_path, total_updates=8, lr_decay=decay)
    shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
    np.testing.assert_allclose([u.rates for u in updates], [[1e-3 * share] for share in shares], rtol=1e-6)


@pytest.mark.parametrize("wanted", [True, False])
def test_update_is_compiled_if_asked(wanted, numbered_path, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    watched(monkeypatch, tmp_path, numbered_path, compile=wanted, total_updates=1)
    assert compiled == [idaq.update] * wanted


def test_update_stays_on_the_device():
    agent = to_meta(idaq.Agent(DATA, idaq.Args(**METHOD)))
    rows = lambda *shape: torch.zeros(4, *shape, device="meta")
    best = dc.Batch(rows(5, 3), rows(5, 2), rows(5), rows(5, 3), rows(5))
    segment = dc.Segment(rows(5, 3, 3), rows(5, 3, 2), rows(5, 3), rows(5, 3, 3), rows(5, 3), rows(5))
    with OnDevice():
        metrics = idaq.update(agent, rows().long(), rows(6, 9), segment, best, idaq.Args(**METHOD))
    assert all(value.device.type == "meta" for value in metrics.values())


def test_learns_point_robot_on_the_shipped_data(tmp_path):
    check_learning(idaq, tmp_path)
