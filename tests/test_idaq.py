"""idaq.py: its adaptation episode by episode; the rest is in actor_critic_suite.py."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from actor_critic_suite import TASK_IDS, ActorCriticSuite, slow_embedding, slow_metric, slow_policy, vectors
from conftest import origin, stop_message

import data_collect as dc
import idaq


class TestIDAQ(ActorCriticSuite):
    script = idaq

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
        return args.metric_weight * slow_metric(z, TASK_IDS.tolist()), {}


def test_farthest_takes_the_first_of_equals():
    tried = [vectors((0.0, 0.0)), vectors((1.0, 1.0))]
    candidates = vectors((0.5, 0.5), (-1.0, 0.0), (1.0, 0.0))[None]
    assert idaq.farthest(candidates, tried).tolist() == [[-1.0, 0.0]]  # the first of two equals
    assert idaq.farthest(candidates, []).tolist() == [[0.5, 0.5]]
    rows, both = torch.cat([candidates, candidates.flip(1)]), [z.expand(2, -1) for z in tried]
    assert idaq.farthest(rows, both).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def small(data, **changes):
    """-> agent and args of an adaptation."""
    agent, args = TestIDAQ().make_agent(data, context_size=6, **changes)
    return agent.float(), args


def z_of(policy):
    """The z that a policy of the adaptation acts on."""
    return inspect.getclosurevars(policy).nonlocals["z"]


BROKEN = -20  # what an episode counts whose physics diverged: the random policy's return
RETURNS = [[BROKEN, -60, -38, -39, -35, -37, BROKEN], [-1, -4, -3, -9, -0.5, -0.25, -4], [-3, -2, -1, -0.5, -4, -2, -5]]
ACCEPTED = [[{2}, {2}, {2, 4}], [{0}, {0}, {0, 4}], [{2}, {2, 3}, {2, 3}]]  # before episodes 3, 4 and 5 of each task
BEST = [4, 5, 3]


def test_adaptation_believes_what_earns_most(numbered, monkeypatch):
    """Three reference episodes, three iterative ones and the last, with given returns: who plays and what is kept. A
    broken episode is never believed."""
    agent, args = small(numbered, adapt_episodes=7, reference_episodes=3, candidates=4)
    plays, played, seen, rollout = 2, [], [], dc.rollout
    state = copy.deepcopy(agent.state_dict())
    returns = np.repeat(RETURNS, plays, 0)  # [R, 7], of test tasks 6, 7 and 8

    def spied(candidates, tried, farthest=idaq.farthest):
        seen.append((candidates, list(tried)))
        return farthest(candidates, tried)

    def spied_embed(agent, context, mask, embed=idaq.embed):
        seen.append((context, mask))
        return embed(agent, context, mask)

    def paid(env, policy, seeds, device, standardize):
        """A real episode with the returns above, whose length tells its number."""
        assert standardize == numbered.standardize
        episode = rollout(env, policy, seeds, device, standardize)
        episode["diverged"] = returns[:, len(played)] == BROKEN
        earned = np.where(episode["diverged"], 0.0, returns[:, len(played)])
        episode["rewards"] = np.repeat(earned[:, None] / 20, 20, 1).astype(np.float32)
        z, length = z_of(policy), 20 - len(played)
        episode["lengths"][:] = length
        obs, act, rew = (torch.as_tensor(episode[key]) for key in ("observations", "actions", "rewards"))
        rows = torch.cat([obs[:, :-1], act, rew[..., None], obs[:, 1:]], -1)
        with torch.no_grad():
            own = [[torch.tanh(slow_policy(agent, o, z[r])[0].mean) for o in obs[r, :3]] for r in range(len(z))]
        torch.testing.assert_close(act[:, :3], torch.stack([torch.stack(acts) for acts in own]), rtol=1e-4, atol=1e-5)
        played.append((env.task_ids.tolist(), list(seeds), z, rows[:, :length]))
        return episode

    monkeypatch.setattr(idaq, "farthest", spied)
    monkeypatch.setattr(idaq, "embed", spied_embed)
    monkeypatch.setattr(dc, "rollout", paid)
    results = idaq.explore_and_adapt(agent, numbered, args, plays)
    assert all(torch.equal(value, state[name]) for name, value in agent.state_dict().items())

    # hypotheses: one per training task, from one of its episodes
    (logged, _), seen = seen[0], seen[1:]
    task, episode, _ = origin(logged[..., 4])
    assert (task == np.arange(6)[:, None]).all() and (episode == episode[:, :1]).all() and logged.shape[1] == 6
    hypotheses = [slow_embedding(agent.encoder, rows).detach() for rows in logged]
    tasks = [6, 6, 7, 7, 8, 8]
    assert [p[0] for p in played] == [tasks] * 7
    assert [p[1] for p in played] == [[10_000 + 97 * t + i % 2 + 31 * k for i, t in enumerate(tasks)] for k in range(7)]
    # reference stage: the farthest hypothesis plays
    zs = [p[2] for p in played]
    for k in range(3):
        candidates, tried = seen[k]
        assert candidates.shape == (6, 4, 3) and len(tried) == k and all(map(torch.equal, tried, zs))
        near = [[min((c - z).norm().item() for z in hypotheses) for c in row] for row in candidates]
        assert np.max(near) < 1e-5 and len({tuple(c.tolist()) for c in candidates.flatten(0, 1)}) == 6
        for row in range(6):
            distance = [min([(c - z[row]).pow(2).mean().item() for z in tried], default=0) for c in candidates[row]]
            assert torch.equal(zs[k][row], candidates[row][int(np.argmax(distance))])
    # iterative stage: the z of what was accepted plays
    for k in (3, 4, 5):
        for row in range(6):
            rows = torch.cat([played[e][3][row] for e in sorted(ACCEPTED[row // 2][k - 3])])
            torch.testing.assert_close(zs[k][row], slow_embedding(agent.encoder, rows).detach(), rtol=1e-4, atol=1e-5)
    # last episode
    for row in range(6):
        assert torch.equal(zs[6][row], zs[BEST[row // 2]][row])
    expected = {f"eval/idaq/return_ep_{k + 1}": np.mean(returns[:, k]) for k in range(7)}
    last, random, expert = returns[:, 6], -20, -5  # returns of the numbered file
    expected |= {"eval/idaq/return": last.mean(), "eval/idaq/return_se": last.std(ddof=1) / 6**0.5}
    expected |= {"eval/idaq/normalized": 100 * (last.mean() - random) / (expert - random), "eval/idaq/diverged": 2}
    assert results == pytest.approx(expected, rel=1e-5) and json.dumps(results)  # it goes to result.json


def test_final_evaluation_alone_has_the_adaptation(numbered):
    agent, args = small(numbered, adapt_episodes=3, reference_episodes=2)
    assert "eval/idaq/return" not in idaq.evaluate_all(agent, numbered, args, ("iid", "train"), 1)
    found = idaq.evaluate_all(agent, numbered, args, dc.PROTOCOLS, 1)
    assert {f"eval/idaq/return_ep_{k}" for k in (1, 2, 3)} <= found.keys() and "eval/idaq/return_ep_4" not in found
    assert found["eval/idaq/return"] == found["eval/idaq/return_ep_3"]


def test_reference_stage_must_leave_an_episode():
    message = stop_message(lambda: idaq.train(idaq.Args(reference_episodes=10, env="point-robot")))
    assert "--reference-episodes 10" in message and "--adapt-episodes" in message
