"""idaq.py: its adaptation episode by episode; the rest as its siblings (siblings.py)."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import origin, stop_message
from actor_critic_suite import ActorCriticSuite as Sibling
from actor_critic_suite import TASK_IDS, slow_embedding, slow_metric, slow_policy, vectors

import data_collect as dc
import idaq


class TestIDAQ(Sibling):
    script = idaq

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
        return args.metric_weight * slow_metric(z, TASK_IDS.tolist()), {}


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
    agent, args = TestIDAQ().make_agent(numbered, adapt_episodes=7, reference_episodes=3, candidates=4, context_size=6)
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
        z, length = policy.__defaults__[0], 20 - len(played)
        done["lengths"][:] = length  # episodes that end at different steps
        raw = torch.as_tensor(done["observations"])
        seen_obs = (raw - numbered.obs_mean) / numbered.obs_spread
        parts = (seen_obs[:, :-1], torch.as_tensor(done["actions"]), torch.as_tensor(done["rewards"])[..., None])
        rows = torch.cat([*parts, seen_obs[:, 1:]], -1)
        with torch.no_grad():
            own = [[torch.tanh(slow_policy(agent, o, z[r])[0].mean) for o in seen_obs[r, :3]] for r in range(len(z))]
        own = torch.stack([torch.stack(acts) for acts in own])
        torch.testing.assert_close(parts[1][:, :3], own, rtol=1e-4, atol=1e-5)
        played.append((env.task_ids.tolist(), list(seeds), z, rows[:, :length]))
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
    agent, args = TestIDAQ().make_agent(numbered, adapt_episodes=3, reference_episodes=2, context_size=6)
    agent = agent.float()
    assert "eval/idaq/return" not in idaq.evaluate_all(agent, numbered, args, ("iid", "train"), 1)
    found = idaq.evaluate_all(agent, numbered, args, dc.PROTOCOLS, 1)
    assert {f"eval/idaq/return_ep_{k}" for k in (1, 2, 3)} <= found.keys() and "eval/idaq/return_ep_4" not in found
    assert found["eval/idaq/return"] == found["eval/idaq/return_ep_3"]
    assert found.items() >= idaq.explore_and_adapt(agent, numbered, args, 1).items()


def test_episodes_that_diverged_are_not_believed(numbered, monkeypatch):
    """In the first episode rows 0 and 1 break off at once, with the best return."""
    agent, args = TestIDAQ().make_agent(numbered, adapt_episodes=4, reference_episodes=2, candidates=2, context_size=6)
    agent, zs, rollout = agent.float(), [], dc.rollout
    agent.encoder.net[0].weight.data[:, 4] /= 1000  # the rewards of `numbered` are large

    def broken(env, policy, seeds, device):
        done = rollout(env, policy, seeds, device)
        done["rewards"][:] = -1.0 - len(zs)
        if len(zs) in (0, 3):
            done["rewards"][:2], done["lengths"][:2], done["diverged"][:2] = 0.0, 1, True
        zs.append(policy.__defaults__[0])
        return done

    monkeypatch.setattr(dc, "rollout", broken)
    results = idaq.explore_and_adapt(agent, numbered, args, 1)
    assert (zs[0] != zs[1]).any(1).all()
    assert torch.equal(zs[3][:2], zs[1][:2]) and torch.equal(zs[3][2], zs[0][2])
    assert results["eval/idaq/diverged"] == 2 and json.dumps(results)  # it goes to result.json


def test_reference_stage_must_leave_an_episode():
    message = stop_message(lambda: idaq.train(idaq.Args(reference_episodes=10, env="point-robot")))
    assert "--reference-episodes 10" in message and "--adapt-episodes 10" in message
