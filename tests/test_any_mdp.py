"""The family any-mdp of data_collect.py: its generator against the published procedure, its simulation against its
tables, its scripted behavior."""

from types import SimpleNamespace

import numpy as np
import pytest

import data_collect as dc

S, A, H = 16, 5, 100
FAMILY = dc.FAMILIES["any-mdp"]
PARAMS, TRAIN, TEST = FAMILY.draw()


def value_iteration(transitions, expected, gamma, over=np.max, sweeps=4000):
    """Q by plain sweeps; over the actions: np.max = optimal, np.mean = uniform policy."""
    q = np.zeros((S, A))
    for _ in range(sweeps):
        q = expected + gamma * transitions @ over(q, 1)
    return q


def task(number):
    """Tables of one task."""
    return SimpleNamespace(**{key: table[number] for key, table in vars(FAMILY.tables).items()})


def test_tasks_depend_on_the_generator_alone():
    assert PARAMS[:, 0].tolist() == list(range(320)) and PARAMS.dtype == np.float64
    assert TRAIN.tolist() == list(range(256)) and TEST.tolist() == list(range(256, 320))
    one, same, other = (vars(FAMILY.draw_tasks(3, np.random.default_rng(seed))) for seed in (0, 0, 1))
    assert all(np.array_equal(same[key], table) for key, table in one.items())
    assert not np.array_equal(one["names"], other["names"])
    many = vars(FAMILY.draw_tasks(61, np.random.default_rng(0)))  # more than one batch
    assert all(table.shape == (61, *one[key].shape[1:]) for key, table in many.items())
    assert len(np.unique(many["rewards"].sum((1, 2, 3)))) == 61


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
    even, s, live = FAMILY.tables.transitions.mean(2), np.arange(2, 15), ~FAMILY.tables.ends[:, 2:15]
    assert even[:, s, s][live].mean() < 0.7 * even[:, s, s - 1][live].mean()  # it seldom stays


def test_drawn_ends_have_the_published_frequencies():
    """As measured on xenoverse 0.1.14. They never lie where an episode starts."""
    start, ends = FAMILY.draw_ends(40000, np.random.default_rng(0))
    pits = ends[:, :-1]
    assert not (ends & (start > 0)).any() and abs(ends[:, -1].mean() - 0.3) < 0.01
    assert abs(pits.sum(1).mean() - 1.415) < 0.03 and abs((~pits.any(1)).mean() - 0.466) < 0.015
    assert abs((start[:, :3] > 0).sum(1).mean() - 3 * 0.5 / (1 - 0.5**3)) < 0.02


def draw_candidates(count, seed):
    """-> SimpleNamespace of arrays over candidates before their checks."""
    rng = np.random.default_rng(seed)
    start, ends = FAMILY.draw_ends(count, rng)
    c = SimpleNamespace(start=start, ends=ends, transitions=FAMILY.draw_transitions(ends, rng))
    c.rewards, c.noise = FAMILY.draw_rewards(ends, rng)
    extra, c.guess, c.possible = FAMILY.draw_end_rewards(c.transitions, c.rewards, start, ends, rng)
    c.rewards = c.rewards + extra[:, None, None]
    return c


def test_rewarded_pairs_and_states_have_noise():
    """Pairs (s, a) without a reward of their own have the rewards of the other such actions; entering an end adds no
    noise."""
    c = draw_candidates(1000, 0)
    own = c.noise.min(-1)  # [C, S, A]: whatever the next state
    assert abs((own > 0).mean() - 0.15) < 0.005
    first = c.rewards[..., 0]
    alike = (abs(first[..., None] - first[:, :, None]) < 1e-12).sum(-1) > 1  # as another action
    assert 0.6 < alike.mean() < 0.75 and not ((own > 0) & alike).any()
    into_ends = c.noise.transpose(0, 3, 1, 2)[c.ends]  # [ends, S, A]
    np.testing.assert_array_equal(into_ends, own[np.nonzero(c.ends)[0]])
    into_others = c.noise.transpose(0, 3, 1, 2)[~c.ends] - own[np.nonzero(~c.ends)[0]]
    assert abs((into_others[:, 0, 0] > 0).mean() - 0.5) < 0.02
    assert abs(into_ends.mean() - 0.00155) < 1e-4  # as measured on xenoverse 0.1.14


def test_candidates_pass_as_often_as_published():
    """Of 21,325 candidates of xenoverse 0.1.14, 70.5 % can have their ends rewarded, 22.6 % are worth learning."""
    c = draw_candidates(2500, 1)
    expected = (c.transitions * c.rewards).sum(-1)
    passed = c.possible & FAMILY.worth_learning(c.transitions, expected, c.start, c.ends, c.guess)
    assert abs(c.possible.mean() - 0.705) < 0.025 and abs(passed.mean() - 0.226) < 0.025
    branching = (c.transitions[~c.ends] > 1e-3).sum(-1).mean()
    assert abs(branching - 3.41) < 0.05
    size = np.percentile(abs(c.rewards[passed]).mean((1, 2, 3)), [25, 50, 75])
    np.testing.assert_allclose(size, [0.354, 0.784, 1.512], rtol=0.2)


def test_action_values_equal_value_iteration():
    c = draw_candidates(4, 2)
    expected = (c.transitions * c.rewards).sum(-1)
    slow = [value_iteration(c.transitions[row], expected[row], 0.99, np.max, sweeps=2000) for row in range(4)]
    for guess in (expected, -expected):
        q = FAMILY.optimal_values(c.transitions, expected, 0.99, guess)
        np.testing.assert_allclose(q, slow, rtol=1e-6, atol=1e-6)
    for number in (0, 300):  # the policy looks far ahead
        t = task(number)
        q = value_iteration(t.transitions, (t.transitions * t.rewards).sum(-1), 0.994, np.max)
        np.testing.assert_allclose(q[np.arange(S), t.policy], q.max(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("goal_ends, pit_before_goal", [(True, False), (True, True), (False, False)])
def test_ends_are_rewarded_until_pits_are_worst(goal_ends, pit_before_goal, monkeypatch):
    """Of three candidates the first is fine at once, the second after one round, the third never."""
    start, ends = np.tile(np.eye(S)[0], (3, 1)), np.zeros((3, S), bool)
    ends[:, [4, 7]], ends[:, 14], ends[:, 15] = True, pit_before_goal, goal_ends
    good, bad = np.full((S, A), 2.0), np.zeros((S, A))
    good[14:] = 20  # far above the start
    bad[0], bad[9], bad[13], bad[14 if goal_ends else 15] = 10, -3, 5, 1
    transitions, seen = np.zeros((3, S, A, S)), []
    transitions[:, 0, 0, 0] = range(3)  # tells the candidates apart

    def values(transitions, *_, **__):
        seen.append(transitions[:, 0, 0, 0].astype(int).tolist())
        return np.stack([good if who == 0 or who == 1 and len(seen) > 1 else bad for who in seen[-1]])

    monkeypatch.setattr(FAMILY, "optimal_values", values)
    extra, q, possible = FAMILY.draw_end_rewards(transitions, transitions, start, ends, np.random.default_rng(4))
    assert seen == [[0, 1, 2], [1, 2], [2], [2], [2]] and possible.tolist() == [True, True, False]
    assert np.array_equal(extra[0], np.eye(S)[15]) and np.array_equal(q, [good, good, bad])
    change, pits = extra[1] - extra[0], np.flatnonzero(ends[0, :-1])
    assert (change[pits] == change[4]).all() and -14 <= change[4] <= -5  # by 0 + 3 + 1 and 1 to 10
    scale = 1 if goal_ends else 0.01
    assert 22 * scale - 1e-9 <= change[15] <= 28 * scale + 1e-9  # twice 10 - 1 and 2 to 5; never by state 13
    assert not change[np.setdiff1d(np.arange(15), pits)].any()


def test_candidates_worth_learning_gain_and_visit_many_states():
    c = draw_candidates(60, 3)
    expected, gamma, reasons = (c.transitions * c.rewards).sum(-1), 2 ** (-1 / S), []
    for row in range(60):
        transitions, starts = c.transitions[row], np.flatnonzero(c.start[row])
        best = value_iteration(transitions, expected[row], gamma, np.max, sweeps=800)
        even = value_iteration(transitions, expected[row], gamma, np.mean, sweeps=800)
        here = np.eye(S)[starts]  # [starts, S]: forward by 128 steps, from ends to a new start
        for _ in range(128):
            move = transitions[np.arange(S), best.argmax(1)]
            here = here @ move + here[:, c.ends[row]].sum(1, keepdims=True) * c.start[row]
        entropy = [-sum(p * np.log(p) for p in chances if p > 0) / np.log(S) for chances in here]
        gain = (best.max(1) - even.max(1))[starts] * (1 - gamma) * H
        if row >= 30:  # the same policies with a gain of just below or above 2
            factor = 2 * (0.99 if row % 2 else 1.01) / gain.min()
            expected[row], gain = factor * expected[row], factor * gain
        reasons.append([gain.min() >= 2, min(1 - (here**2).sum(1)) > 0.7, min(entropy) > 0.35])
    good = FAMILY.worth_learning(c.transitions, expected, c.start, c.ends, c.guess)
    assert good.tolist() == [all(reason) for reason in reasons]
    assert [True, False, True] in reasons and [False, True, True] in reasons and good.any()
    again = FAMILY.worth_learning(c.transitions, expected, c.start, c.ends, -c.guess)
    assert np.array_equal(good, again)  # whatever the guess


def test_rewards_and_their_noise_have_one_scale(monkeypatch):
    """With a noise of 1 more than the reward, and no further rewards, the difference is the scale."""
    draw_rewards, draw_end_rewards = FAMILY.draw_rewards, FAMILY.draw_end_rewards

    def no_more(*tables):
        extra, q, possible = draw_end_rewards(*tables)
        return 0 * extra, q, possible

    monkeypatch.setattr(FAMILY, "draw_rewards", lambda *x: (rewards := draw_rewards(*x)[0], rewards + 1))
    monkeypatch.setattr(FAMILY, "draw_end_rewards", no_more)
    made = FAMILY.draw_tasks(50, np.random.default_rng(11))
    scale = made.noise - made.rewards
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:, :1, :1, :1], scale.shape))
    assert 0 < scale.min() and 10 < scale.max() <= 20  # 100 by a gap of at least 5


def expected_return(t, choice):
    """Of one episode: choice [S, A] probabilities; forward through the distribution of states."""
    here, total = t.start.copy(), 0.0
    for _ in range(H):
        flow = here[:, None, None] * choice[..., None] * t.transitions
        total, here = total + (flow * t.rewards).sum(), flow.sum((0, 1))
    return total


def test_optimal_and_uniform_policy_are_100_apart():
    for number in range(0, 320, 20):
        t = task(number)
        best, even = np.eye(A)[t.policy], np.full((S, A), 1 / A)
        assert expected_return(t, best) - expected_return(t, even) == pytest.approx(100, rel=1e-6)
        assert t.uniform == pytest.approx(expected_return(t, even), abs=1e-6)
        value = value_iteration(t.transitions, (t.transitions * t.rewards).sum(-1), 0.99, np.max, sweeps=2000).max(1)
        assert value[14 if t.ends[15] else 15] > value[t.start > 0].max()
        pits = np.flatnonzero(t.ends[:-1])
        for s, a, j in zip(*np.nonzero(t.transitions[:, :, pits])):  # no way into a pit is better than to go on
            assert t.rewards[s, a, pits[j]] < value[s]


def make_env(numbers):
    return dc.TaskEnv(FAMILY, PARAMS, np.asarray(numbers))


def as_action(choice, rng):
    """Vectors whose largest entry is the choice."""
    act = rng.uniform(-1, 0.5, (len(choice), A))
    act[np.arange(len(choice)), choice] = act.max(1) + 0.1
    return act


@pytest.mark.parametrize("pits", [True, False])
def test_simulation_follows_the_tables(pits):
    """Frequencies of starts and next states, mean and spread of the rewards, of a task with and one without pits."""
    tables, rng = FAMILY.tables, np.random.default_rng(0)
    number = np.flatnonzero((tables.noise.max((1, 2, 3)) > 0.1) & (tables.ends[:, :-1].any(1) == pits))[0]
    t, env = task(number), make_env([number] * 1500)
    inner = lambda obs: np.argsort(t.names)[obs.argmax(1)]  # noqa: E731
    obs, _ = env.reset(seed=0)
    assert (obs.sum(1) == 1).all() and ((obs == 0) | (obs == 1)).all()
    state, (count, total, squares) = inner(obs), np.zeros((3, S, A, S))
    np.testing.assert_allclose(np.bincount(state, minlength=S) / 1500, t.start, atol=0.04)
    for step in range(H):
        live, choice = env.live.copy(), rng.integers(A, size=1500)
        obs, rew, terminated, truncated, _ = env.step(as_action(choice, rng))
        after = inner(obs)
        assert (terminated == live & t.ends[after]).all() and (rew[~live] == 0).all()
        assert (truncated == (live & ~terminated & (step == H - 1))).all()
        for sums, value in ((count, 1), (total, rew[live]), (squares, rew[live] ** 2)):
            np.add.at(sums, (state[live], choice[live], after[live]), value)
        state = after
    visits = count.sum(-1, keepdims=True)
    error = abs(count - visits * t.transitions) - 5 * np.sqrt(visits * t.transitions * (1 - t.transitions)) - 2
    assert not count[t.transitions == 0].any() and error.max() <= 0 and (visits > 500).sum() > 3
    often = count > 300
    mean, noise = total[often] / count[often], t.noise[often]
    assert (abs(mean - t.rewards[often]) < 5 * noise / count[often] ** 0.5 + 1e-6).all()
    spread = np.sqrt((squares[often] / count[often] - mean**2).clip(0))
    np.testing.assert_allclose(spread, noise, rtol=0.2, atol=1e-3)
    assert noise.max() > 0


def test_episodes_follow_their_seed_and_can_continue():
    one, other = make_env([3, 3, 9]), make_env([3, 3, 9])
    acts = np.random.default_rng(0).uniform(-1, 1, (H, 3, A))
    assert np.array_equal(one.reset(seed=[5, 6, 5])[0], other.reset(seed=[5, 6, 5])[0])
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


@pytest.mark.parametrize("skill, share", [(1.0, 1.0), (0.5, 0.6)])
def test_behavior_takes_the_optimal_action_with_its_skill(skill, share):
    rng, numbers = np.random.default_rng(0), np.arange(4).repeat(S * 100)
    inner = np.tile(np.arange(S), 400)
    obs = np.eye(S)[FAMILY.tables.names[numbers, inner]]
    act = FAMILY.behave(obs, PARAMS[numbers], skill, rng)
    assert act.shape == (len(obs), A) and ((act > 0).sum(1) == 1).all() and abs(act).max() <= 1
    assert abs((act.argmax(1) == FAMILY.tables.policy[numbers, inner]).mean() - share) < 0.02
    assert 0.45 < act.max(1).mean() < 0.55 and act.min() < -0.9  # uniform noise that leaves the choice


def test_dataset_needs_no_trained_policies(tmp_path, capsys):
    path = tmp_path / "any-mdp.npz"
    args = dc.Args(env="any-mdp", out=str(path), train_tasks=20, test_tasks=5, episodes=20, test_episodes=5)
    dc.collect(args)
    assert not list(tmp_path.glob("*.pt")) and "policies" not in capsys.readouterr().out.split("wrote")[1]
    data = dc.load_dataset("any-mdp", path)
    assert data.episodes.shape == (25, 20, H, 2 * S + A + 2) and "z/probe_r2" in dc.unmeasurable(data)
    for row, number in enumerate(data.task_params[:, 0].astype(int)):  # the returns are known, not sampled
        t = task(number)
        known = [expected_return(t, choice) for choice in (np.full((S, A), 1 / A), np.eye(A)[t.policy])]
        assert [data.random_returns[row], data.expert_returns[row]] == pytest.approx(known, abs=1e-6)
    by_phase = np.corrcoef(np.arange(20), data.episode_returns[:20].mean(0))[0, 1]
    assert by_phase > 0.7  # from mostly random to optimal
    with np.load(path) as file:
        steps = file["behavior_step"][:20]
    assert (steps[:, 0] == 2).all() and (steps[:, -1] == 20).all()
