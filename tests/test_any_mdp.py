"""The family any-mdp of data_collect.py: its generator against the published procedure, its simulation against its
tables, its scripted behavior."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_collect as dc

S, A, H = 16, 5, 100
FAMILY = dc.FAMILIES["any-mdp"]
PARAMS, TRAIN, TEST = FAMILY.draw()


def value_iteration(transitions, expected, gamma, pick, sweeps=4000):
    """Q by plain sweeps: pick = max or mean over actions."""
    q = np.zeros((S, A))
    for _ in range(sweeps):
        q = expected + gamma * transitions @ pick(q)
    return q


def greedy(q):
    return q.max(1)


def uniform(q):
    return q.mean(1)


def task(number):
    """Tables of one task."""
    return SimpleNamespace(**{key: table[number] for key, table in vars(FAMILY.tables).items()})


def test_sizes_and_split():
    assert (FAMILY.obs_dim, FAMILY.act_dim, FAMILY.horizon, FAMILY.counts) == (S, A, H, (256, 64))
    assert PARAMS[:, 0].tolist() == list(range(320)) and PARAMS.dtype == np.float64
    assert TRAIN.tolist() == list(range(256)) and TEST.tolist() == list(range(256, 320))


def test_each_task_is_made_from_its_number_alone():
    one = FAMILY.draw_task(np.random.default_rng([2502, 7]))
    assert all(np.array_equal(one[key], table[7]) for key, table in vars(FAMILY.tables).items())
    assert not np.array_equal(FAMILY.tables.names[7], FAMILY.tables.names[8])


def test_transitions_are_probabilities_within_the_band():
    for number in range(320):
        t = task(number)
        assert (t.transitions >= 0).all() and not t.transitions[t.ends].any()
        np.testing.assert_allclose(t.transitions[~t.ends].sum(-1), 1, atol=1e-9)
        for s in np.flatnonzero(~t.ends):
            reached = np.flatnonzero(t.transitions[s].sum(0))
            assert reached.min() >= s - 9
            beyond = [j for j in range(s + 1, reached.max()) if not t.ends[j]]
            assert reached.max() < s + 5 or len(beyond) <= 2  # as wide as it must be for two states that go on
        if not t.ends[-1]:
            assert not t.transitions[-1, :, -1].any()  # no rest in the last state


def test_starts_and_ends():
    tables = FAMILY.tables
    np.testing.assert_allclose(tables.start.sum(1), 1)
    assert not tables.start[:, 3:].any() and not (tables.ends & (tables.start > 0)).any()
    assert 0.5 < (tables.start[:, 0] > 0).mean() < 1  # a third of all weights is cut to 0 at each of three states
    goal, pits = tables.ends[:, -1], tables.ends[:, :-1]
    assert 0.2 < goal.mean() < 0.7 and 0.2 < (~pits.any(1)).mean() < 0.55
    assert pits.sum(1).max() < S * 0.4 + 1 and pits.sum(1).max() >= 4
    assert all(sorted(names) == list(range(S)) for names in tables.names.tolist())


def test_drawn_ends_have_the_published_frequencies():
    rng = np.random.default_rng(0)
    drawn = [FAMILY.draw_ends(rng) for _ in range(4000)]
    start, ends, pits = (np.array(x) for x in zip(*drawn))
    assert abs(ends[:, -1].mean() - 0.3) < 0.025 and not pits[:, -1].any() and not (pits & (start > 0)).any()
    assert (ends[:, :-1] == pits[:, :-1]).all()
    none = (~pits.any(1)).mean()  # a third by the draw of the share, and small shares that meet no state
    assert 1 / 3 < none < 0.5
    assert abs((start[:, :3] > 0).sum(1).mean() - 3 * 0.5 / (1 - 0.5**3)) < 0.05


def test_bands_differ_as_published():
    """An action has about 3 to 5 next states, about a fifth of the candidates pass: measured on the published one."""
    branching = [(t.transitions[~t.ends] > 1e-3).sum(-1).mean() for t in map(task, range(320))]
    assert 2.5 < np.mean(branching) < 4.5
    rng, passed = np.random.default_rng(1), 0
    for _ in range(600):
        start, ends, pits = FAMILY.draw_ends(rng)
        transitions = FAMILY.draw_transitions(rng, ends)
        rewards, _ = FAMILY.draw_rewards(rng, transitions, start, ends, pits)
        passed += rewards is not None and FAMILY.worth_learning(transitions, rewards, start, ends)
    assert 0.15 < passed / 600 < 0.35


@pytest.mark.parametrize("number", [0, 5, 100, 300])
def test_action_values_are_those_of_value_iteration(number):
    t = task(number)
    expected = (t.transitions * t.rewards).sum(-1)
    for gamma in (0.99, 2 ** (-1 / S)):
        np.testing.assert_allclose(
            FAMILY.action_values(t.transitions, expected, gamma),
            value_iteration(t.transitions, expected, gamma, greedy),
            rtol=1e-6,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            FAMILY.action_values(t.transitions, expected, gamma, optimal=False),
            value_iteration(t.transitions, expected, gamma, uniform),
            rtol=1e-6,
            atol=1e-6,
        )
    q = value_iteration(t.transitions, expected, 0.994, greedy)
    rows = np.arange(S)
    np.testing.assert_allclose(q[rows, t.policy], q.max(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("goal_ends", [True, False])
def test_pits_are_made_worse_and_the_last_state_better_until_they_are(goal_ends, monkeypatch):
    start, pits = np.eye(S)[0], np.isin(np.arange(S), [4, 7])
    ends = pits | (np.arange(S) == S - 1) & goal_ends
    good, bad = np.full((S, A), 2.0), np.zeros((S, A))
    good[~ends & (np.arange(S) > 12)] = 20  # far above the start
    bad[0], bad[9], bad[np.flatnonzero(~ends)[-1]] = 10, -3, 1
    found = {}
    for calls in ((good,), (bad, good), (bad,) * 5):
        answers = iter(calls)
        monkeypatch.setattr(FAMILY, "action_values", lambda *_, answers=answers: next(answers))
        found[len(calls)], _ = FAMILY.draw_rewards(np.random.default_rng(4), np.zeros((S, A, S)), start, ends, pits)
        assert next(answers, None) is None
    assert found[5] is None  # given up
    change = found[2] - found[1]
    worse, better = change[..., pits], change[..., -1]
    assert -14 <= worse.min() and worse.max() <= -5  # by 0 + 3 + 1 and 1 to 10
    scale = 1 if goal_ends else 0.01
    assert 22 * scale - 1e-9 <= better.min() and better.max() <= 28 * scale + 1e-9  # twice 10 - 1 and 2 to 5
    assert np.ptp(worse) < 1e-9 and np.ptp(better) < 1e-9 and abs(change[..., ~pits][..., :-1]).max() < 1e-9


def test_tasks_in_which_nothing_is_gained_or_little_is_visited_are_refused():
    for t in map(task, range(5)):
        assert FAMILY.worth_learning(t.transitions, t.rewards, t.start, t.ends)
        assert not FAMILY.worth_learning(t.transitions, 1e-4 * t.rewards, t.start, t.ends)  # the same policy
        resting = 0 * t.transitions
        resting[~t.ends] = np.eye(S)[~t.ends, None]
        assert not FAMILY.worth_learning(resting, t.rewards, t.start, t.ends)
        assert not FAMILY.worth_learning(0.9 * t.transitions, t.rewards, t.start, t.ends)  # an action leads nowhere


def test_rewards_and_their_noise_are_scaled_alike(monkeypatch):
    drawn = []

    def spy(*inputs, draw=FAMILY.draw_rewards):
        drawn.append(draw(*inputs))
        return drawn[-1]

    monkeypatch.setattr(FAMILY, "draw_rewards", spy)
    made = FAMILY.draw_task(np.random.default_rng([2502, 11]))
    rewards, noise = drawn[-1]
    factor = (made["rewards"] / np.where(rewards == 0, 1, rewards))[rewards != 0]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-9)
    np.testing.assert_allclose(made["noise"], factor[0] * noise, rtol=1e-9)
    assert abs(factor[0] - 1) > 0.1 and noise.max() > 0


def expected_return(t, choice):
    """Of one episode: choice [S, A] probabilities; forward through the distribution of states."""
    here, total = t.start.copy(), 0.0
    for _ in range(H):
        flow = here[:, None, None] * choice[..., None] * t.transitions
        total, here = total + (flow * t.rewards).sum(), flow.sum((0, 1))
    return total


def test_optimal_and_uniform_policy_are_100_apart_and_the_last_state_is_the_best():
    for number in range(0, 320, 5):
        t = task(number)
        best, even = np.eye(A)[t.policy], np.full((S, A), 1 / A)
        assert expected_return(t, best) - expected_return(t, even) == pytest.approx(100, rel=1e-6)
        value = value_iteration(t.transitions, (t.transitions * t.rewards).sum(-1), 0.99, greedy).max(1)
        assert value[~t.ends][-1] > value[t.start > 0].max()
        pits = np.flatnonzero(t.ends[:-1])
        for s, a, j in zip(*np.nonzero(t.transitions[:, :, pits])):  # no way into a pit is better than to go on
            assert t.rewards[s, a, pits[j]] < value[s]
        gain = value_iteration(t.transitions, (t.transitions * t.rewards).sum(-1), 2 ** (-1 / S), greedy).max(1)
        gain = gain - value_iteration(t.transitions, (t.transitions * t.rewards).sum(-1), 2 ** (-1 / S), uniform).max(1)
        assert gain[t.start > 0].min() > 0


def make_env(numbers):
    return dc.TaskEnv(FAMILY, PARAMS, np.asarray(numbers))


def as_action(choice, rng):
    """Vectors whose largest entry is the choice."""
    act = rng.uniform(-1, 0.5, (len(choice), A))
    act[np.arange(len(choice)), choice] = act.max(1) + 0.1
    return act


def test_simulation_follows_the_tables():
    """Frequencies of starts, next states and ends, and mean and spread of the rewards, of two tasks."""
    noisy, with_pits = FAMILY.tables.noise.max((1, 2, 3)) > 0.1, FAMILY.tables.ends[:, :-1].any(1)
    pick = [np.flatnonzero(noisy & with_pits)[0], np.flatnonzero(noisy & ~with_pits)[0]]
    rng, counts, starts = np.random.default_rng(0), np.zeros((2, S, A, S)), np.zeros((2, S))
    rewards = np.zeros((2, S, A, S, 2))
    env = make_env(np.repeat(pick, 3000))
    which, names = np.repeat([0, 1], 3000), [FAMILY.tables.names[n].tolist() for n in pick]
    inner = lambda obs: np.array([names[w].index(k) for w, k in zip(which, obs.argmax(1))])  # noqa: E731
    obs, _ = env.reset(seed=0)
    assert (obs.sum(1) == 1).all() and ((obs == 0) | (obs == 1)).all()
    np.add.at(starts, (which, inner(obs)), 1)
    for step in range(H):
        live, choice, before = env.live.copy(), rng.integers(A, size=6000), inner(obs)
        obs, rew, terminated, truncated, _ = env.step(as_action(choice, rng))
        after = inner(obs)
        assert (terminated[live] == FAMILY.tables.ends[np.array(pick)[which[live]], after[live]]).all()
        assert not terminated[~live].any() and (rew[~live] == 0).all()
        assert (truncated == (live & ~terminated & (step == H - 1))).all()
        index = which[live], before[live], choice[live], after[live]
        np.add.at(counts, index, 1)
        np.add.at(rewards, index, np.stack([rew[live], rew[live] ** 2], 1))
    for w, number in enumerate(pick):
        t = task(number)
        np.testing.assert_allclose(starts[w] / 3000, t.start, atol=0.03)
        assert not counts[w][t.transitions == 0].any()
        visits = counts[w].sum(-1, keepdims=True)
        error = abs(counts[w] - visits * t.transitions) - 5 * np.sqrt(visits * t.transitions * (1 - t.transitions)) - 2
        assert error.max() <= 0 and (visits > 500).sum() > 3
        seen = counts[w] > 300
        mean = rewards[w][seen][:, 0] / counts[w][seen]
        spread = np.sqrt((rewards[w][seen][:, 1] / counts[w][seen] - mean**2).clip(0))
        noise = t.noise[seen]
        assert (abs(mean - t.rewards[seen]) < 5 * noise / counts[w][seen] ** 0.5 + 1e-6).all()
        np.testing.assert_allclose(spread, noise, rtol=0.2, atol=1e-3)
        assert noise.max() > 0


def test_an_episode_is_that_of_its_seed_and_can_be_continued():
    one, other = make_env([3, 3, 9]), make_env([3, 3, 9])
    acts = np.random.default_rng(0).uniform(-1, 1, (H, 3, A))
    first = np.array_equal(one.reset(seed=[5, 6, 5])[0], other.reset(seed=[5, 6, 5])[0])
    assert first
    for act in acts[:4]:
        one.step(act)
    other.set_state(one.get_state())
    for act in acts[4:]:
        assert all(np.array_equal(a, b) for a, b in zip(one.step(act)[:4], other.step(act)[:4]))


def test_distance_is_the_share_of_other_optimal_actions():
    def known(number):
        t = task(number)
        return {int(name): int(action) for name, action in zip(t.names, t.policy)}

    for one, other in ((0, 0), (0, 1), (5, 300)):
        differ = sum(known(one)[k] != known(other)[k] for k in range(S)) / S
        assert FAMILY.distance(PARAMS[[one]], PARAMS[[other]]) == [differ]
    assert FAMILY.distance(PARAMS[0], PARAMS[1:4]).shape == (3,)


@pytest.mark.parametrize("skill, share", [(1.0, 1.0), (0.5, 0.6), (0.0, 0.2)])
def test_behavior_knows_the_optimal_action_as_often_as_it_should(skill, share):
    rng, numbers = np.random.default_rng(0), np.arange(4).repeat(S * 100)
    inner = np.tile(np.arange(S), 400)
    obs = np.eye(S)[FAMILY.tables.names[numbers, inner]]
    act = FAMILY.behave(obs, PARAMS[numbers], skill, rng)
    assert act.shape == (len(obs), A) and ((act > 0).sum(1) == 1).all() and abs(act).max() <= 1
    assert abs((act.argmax(1) == FAMILY.tables.policy[numbers, inner]).mean() - share) < 0.02
    assert 0.45 < act.max(1).mean() < 0.55 and act.min() < -0.9  # uniform noise that leaves the choice


def test_dataset_without_trained_policies(tmp_path, capsys):
    path = tmp_path / "any-mdp.npz"
    args = dc.Args(env="any-mdp", out=str(path), train_tasks=40, test_tasks=10, episodes=20, test_episodes=10)
    dc.collect(args)
    assert not list(tmp_path.glob("*.pt")) and "policies" not in capsys.readouterr().out.split("wrote")[1]
    data = dc.load_dataset("any-mdp", path)
    assert data.episodes.shape == (50, 20, H, 2 * S + A + 2) and "z/probe_r2" in dc.unmeasurable(data)
    for row, number in enumerate(data.task_params[:, 0].astype(int)):  # the returns are known, not sampled
        t = task(number)
        known = [expected_return(t, choice) for choice in (np.full((S, A), 1 / A), np.eye(A)[t.policy])]
        assert [data.random_returns[row], data.expert_returns[row]] == pytest.approx(known, abs=1e-6)
    by_phase = np.corrcoef(np.arange(20), data.episode_returns[:40].mean(0))[0, 1]
    assert by_phase > 0.7  # from mostly random to optimal
    with np.load(path) as file:
        steps = file["behavior_step"][:40]
    assert (steps[:, 0] == 2).all() and (steps[:, -1] == 20).all()


def test_rewards_of_recorded_transitions_can_be_read_from_the_tables():
    """The reward of an action vector is that of its largest entry; torch's generators are not touched."""
    before = torch.get_rng_state()
    rng, numbers = np.random.default_rng(3), np.arange(20)
    state = FAMILY.reset(rng, PARAMS[numbers])
    act = rng.uniform(-1, 1, (20, A))
    after = FAMILY.step(state, act, PARAMS[numbers])
    outcome = FAMILY.outcome(state, after)
    for row in range(20):
        s, j = int(state[row, 0]), int(after[row, 0])
        t, a = task(row), int(np.argmax(act[row]))
        expected = t.rewards[s, a, j] + t.noise[s, a, j] * outcome[row, 2]
        assert FAMILY.reward(outcome, act, PARAMS[numbers])[row] == pytest.approx(expected)
        assert after[row, 2] == 1 and np.array_equal(after[row, 4:], state[row, 4:])
    later = FAMILY.outcome(after, FAMILY.step(after, act, PARAMS[numbers]))
    assert not (later[:, 2] == outcome[:, 2]).any()  # a noise of its own at every step
    assert len(set(outcome[:, 2])) == 20 and math.isfinite(outcome.sum()) and torch.equal(before, torch.get_rng_state())
