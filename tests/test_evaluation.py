"""evaluate and the quality of z, of data_collect.py."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import NUMBERED_TASKS, origin
from test_dataset_file import as_seen, recorded, uneven  # noqa: F401, the fixture

import data_collect as dc


class Watched:
    """One evaluation under one protocol, by policies that move row r and round k always by the same action."""

    def __init__(self, monkeypatch, data, protocol, episodes=3):
        self.given, self.played, rollout = [], [], dc.rollout

        def adapt(context, mask, explore):
            self.given.append((context.clone(), mask.clone(), explore))
            act = self.acts(len(context), len(self.given) - 1)
            return lambda obs, rew: act

        def spy(env, policy, seeds, *rest):
            self.played.append((env.task_ids.tolist(), seeds))
            return rollout(env, policy, seeds, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(dc, "rollout", spy)
            self.results = dc.evaluate(data, adapt, (protocol,), episodes)

    def acts(self, rows, k):
        act = 0.05 * k + 0.5 * torch.arange(1.0, rows + 1) / rows
        return torch.stack([act, 0.5 - act], 1)

    def returns(self, data, k=0):
        """What row by row should come out in round k, on the tasks of the rows."""
        tasks = self.played[k][0]
        return [straight_to(data, task, act) for task, act in zip(tasks, self.acts(len(tasks), k).tolist())]


def straight_to(data, task, act):
    """Return of one episode of point-robot with the same action at every step."""
    return sum(-math.dist((0.1 * t * act[0], 0.1 * t * act[1]), data.task_params[task]) for t in range(1, 21))


def check_results(watched, data, protocol, tasks, returns, distances=()):
    """returns and, of the protocol ood, distances: of each row of the episodes that count."""
    row_tasks = watched.played[-1][0]
    per_task = {t: np.mean([r for r, own in zip(returns, row_tasks) if own == t]) for t in tasks}
    expected = {f"eval/{protocol}/return_task_{t:02d}": value for t, value in per_task.items()}
    scores = [100 * (value - (-20 - t)) / ((-5 + t / 2) - (-20 - t)) for t, value in zip(row_tasks, returns)]
    expected[f"eval/{protocol}/normalized"] = statistics.mean(scores)
    expected[f"eval/{protocol}/return"] = statistics.mean(returns)
    expected[f"eval/{protocol}/return_se"] = statistics.stdev(returns) / math.sqrt(len(returns))
    if distances:
        one, two = statistics.quantiles(distances, n=3, method="inclusive")
        thirds = {"near": [], "middle": [], "far": []}
        for score, distance in zip(scores, distances):
            thirds["near" if distance <= one else "middle" if distance <= two else "far"].append(score)
        expected |= {f"eval/ood/normalized_{third}": np.mean(found) for third, found in thirds.items()}
    for k in range(len(watched.played)) if "online" in protocol else ():
        expected[f"eval/{protocol}/return_ep_{k + 1}"] = np.mean(watched.returns(data, k))
    if protocol == "online_random_start":  # the first is no policy's
        expected[f"eval/{protocol}/return_ep_1"] = watched.first.mean()
    assert watched.results == pytest.approx(expected, abs=1e-3)


def contexts(arrays, protocol, episodes):
    """Task of every row, place of its context in the arrays of the file."""
    if protocol.startswith("ood"):  # each task begins with another column
        columns = [[1, 2, 3], [0, 1, 2], [0, 1, 2]] if protocol == "ood" else [[0], [3], [3]]
        return [(6 + v, (v, columns[v][(v + i) % len(columns[v])])) for v in range(3) for i in range(episodes)]
    tasks = range(6) if protocol == "train" else range(6, 9)
    present = (arrays["lengths"] > 0).sum(1)  # all recorded episodes in an order of the task's own, over and over
    orders = {task: np.random.default_rng(10_000 + task).permutation(present[task]) for task in tasks}
    return [(task, (task, orders[task][i % present[task]])) for task in tasks for i in range(episodes)]


@pytest.mark.parametrize("protocol", ["iid", "train", "ood", "ood_random"])
def test_context_belongs_to_the_rows_task(uneven, monkeypatch, protocol, episodes=7):
    data, arrays = uneven
    watched = Watched(monkeypatch, data, protocol, episodes)
    ((context, mask, explore),) = watched.given
    row_tasks, places = map(list, zip(*contexts(arrays, protocol, episodes)))
    seeds = [10_000 + 97 * task + row % episodes for row, task in enumerate(row_tasks)]
    assert watched.played == [(row_tasks, seeds)] and explore is False
    prefix, source = ("ood_", data.ood_episodes) if protocol.startswith("ood") else ("", data.episodes)
    for row, place in enumerate(places):
        assert torch.equal(context[row], source[place][:, :-1])
        length = arrays[prefix + "lengths"][place]
        assert mask[row].tolist() == [1.0] * length + [0.0] * (20 - length)
        assert (origin(context[row, :length, 4])[0] == row_tasks[row]).all()
    goals, distances = arrays["task_params"], ()
    if protocol == "ood":
        policies = [arrays["ood_behavior_task"][place] for place in places]
        distances = [math.dist(goals[task], goals[i]) for task, i in zip(row_tasks, policies)]
    check_results(watched, data, protocol, sorted(set(row_tasks)), watched.returns(data), distances)


@pytest.mark.parametrize("protocol, more", [("online", 5), ("online_random_start", 0)])
def test_online_context_grows_by_own_episodes(protocol, more, uneven, monkeypatch):
    """The fifth episode is reported."""
    data, arrays = uneven
    watched = Watched(monkeypatch, data, protocol, 7)
    assert [explore for _, _, explore in watched.given] == [True, True, False, False, False] + [False] * more
    row_tasks = [6] * 7 + [7] * 7 + [8] * 7
    goals = data.task_params[row_tasks]
    for k, (context, mask, _) in enumerate(watched.given):
        seeds = [10_000 + 97 * task + i + 31 * k for task in (6, 7, 8) for i in range(7)]
        assert watched.played[k] == (row_tasks, seeds)
        assert context.shape == (21, 20 * k, 7) and mask.shape == (21, 20 * k) and (mask == 1).all()
        for past in range(k):
            own, act = context[:, 20 * past : 20 * past + 20].numpy(), watched.acts(21, past).numpy()
            act = np.repeat(act[:, None], 20, 1)  # [21, 20, 2]
            if protocol == "online_random_start" and past == 0:
                act, watched.first = own[..., 2:4], own[..., 4].sum(1)
                assert abs(act.mean()) < 0.1 and abs(act.std() - 1 / math.sqrt(3)) < 0.05  # uniform,
                assert len(np.unique(act)) == act.size  # anew at every step
            position = 0.1 * np.concatenate([0 * act[:, :1], act.cumsum(1)], 1)
            np.testing.assert_allclose(own[..., :2], as_seen(arrays, position[:, :-1]), atol=1e-4)
            np.testing.assert_allclose(own[..., 2:4], act, atol=1e-6)
            distance = np.linalg.norm(position[:, 1:] - goals[:, None], axis=-1)
            np.testing.assert_allclose(own[..., 4], -distance, atol=1e-5)
            np.testing.assert_allclose(own[..., 5:], as_seen(arrays, position[:, 1:]), atol=1e-4)
    check_results(watched, data, protocol, [6, 7, 8], watched.returns(data, 4))


def test_online_mask_covers_uneven_episodes(walker):
    given = []

    def adapt(context, mask, explore):
        given.append((context, mask))
        return lambda obs, rew: torch.sin(7 * obs[:, :6])

    dc.evaluate(walker, adapt, ("online",))
    context, mask = (x.reshape(4, 9, 200, *x.shape[2:]) for x in given[-1])  # [tasks x episodes, rounds before]
    lengths = mask.sum(-1, keepdim=True)
    assert torch.equal(mask, (torch.arange(200) < lengths).float()) and 1 < lengths.min() < lengths.max()
    assert torch.equal(mask, (context[..., 24] != 0).float())  # rewards of real transitions


def test_zero_shot_has_no_context(uneven, monkeypatch):
    watched = Watched(monkeypatch, uneven[0], "zero_shot")
    ((context, mask, explore),) = watched.given
    assert context.shape == (9, 0, 7) and mask.shape == (9, 0) and explore is False
    check_results(watched, uneven[0], "zero_shot", [6, 7, 8], watched.returns(uneven[0]))


@pytest.mark.parametrize("protocol, rounds", [("iid", 0), ("online", 10)])
def test_diverged_episode_counts_as_random(protocol, rounds, uneven, monkeypatch):
    """All episodes on task 7 break in their sixth step."""
    data, simulate = uneven[0], dc.TaskEnv._simulate

    def breaking(env, state, act, live):
        return simulate(env, state, act, live)[0], (env.task_ids[live] == 7) & (env.steps[live] == 5)

    monkeypatch.setattr(dc.TaskEnv, "_simulate", breaking)
    act = lambda *_: lambda obs, rew: torch.tensor([[0.3, 0.1]]).repeat(len(obs), 1)  # noqa: E731
    found = dc.evaluate(data, act, (protocol,), 3)
    returns = {task: -27.0 if task == 7 else straight_to(data, task, (0.3, 0.1)) for task in (6, 7, 8)}
    mean = statistics.mean(returns.values())
    expected = {f"return_task_{task:02d}": value for task, value in returns.items()} | {"return": mean}
    expected |= {f"return_ep_{k + 1}": mean for k in range(rounds)} | {"diverged": 3 * max(rounds, 1)}
    assert {tag: found[f"eval/{protocol}/{tag}"] for tag in expected} == pytest.approx(expected, abs=1e-3)


def test_train_protocol_takes_ten_tasks(uneven, monkeypatch):
    data = copy.copy(uneven[0])
    data.train_ids = np.arange(6).repeat(2)
    assert Watched(monkeypatch, data, "train", 1).played[0][0] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_normalized_runs_from_random_to_expert(uneven):
    data = copy.copy(uneven[0])
    data.random_returns, data.expert_returns = np.array([-20.0, -10, 3]), np.array([-5.0, -30, 3])
    scores = dc.normalize(data, np.array([2, 1, 0, 0, 0]), np.array([9.0, -20, -20, -5, -12.5]))
    assert scores.tolist() == [0, 0, 0, 100, 50]


def test_q_error_equals_a_plain_loop():
    """Rows: to the time limit, a fall before it, a fall in the last step, a simulation that broke in its third step."""
    rng, lengths, gamma = np.random.default_rng(0), np.array([5, 3, 5, 2], np.int32), 0.8
    episodes = {"observations": rng.normal(size=(4, 6, 3)).astype(np.float32), "lengths": lengths}
    episodes |= {"rewards": rng.normal(size=(4, 5)).astype(np.float32)}
    episodes |= {"terminated": np.array([False, True, True, False]), "context": "context", "mask": torch.ones(4, 7)}
    episodes["rewards"][np.arange(5) >= lengths[:, None]] = 0.0

    def value(context, mask, obs):
        assert context == "context" and mask is episodes["mask"]
        return obs @ torch.tensor([1.0, -2.0, 3.0]) + torch.arange(4.0)[:, None]

    def slow_value(row, step):
        return float(episodes["observations"][row, step] @ [1.0, -2.0, 3.0]) + row

    errors, returns = [], []
    for row, length in enumerate(lengths):
        returns.append(sum(gamma**t * float(episodes["rewards"][row, t]) for t in range(length)))
        if not episodes["terminated"][row]:
            returns[-1] += gamma**length * slow_value(row, length)
        errors.append(slow_value(row, 0) - returns[-1])
    relative = np.mean(errors) / abs(np.mean(returns))
    expected = {"eval/iid/q_error": np.mean(errors), "eval/iid/q_relative": relative}
    expected["eval/iid/value"] = np.mean([slow_value(row, 0) for row in range(4)])
    assert dc.q_error(episodes, value, gamma) == pytest.approx(expected, abs=1e-5)


# ---- how well z tells the tasks apart ---------------------------------------


def test_labeled_contexts_spread_over_the_episodes(uneven):
    embed = lambda context, mask: context[:, 0, 4:5]  # noqa: E731
    z, labels = dc.label_contexts(uneven[0], embed, np.array([4, 1]), 3)  # four episodes, and two
    assert labels == [4, 4, 4, 1, 1] and z[:, 0].tolist() == [4000, 4200, 4300, 1000, 1100]


def test_embedding_quality_equals_plain_centroids_and_probe(uneven):
    data, arrays = uneven
    table = np.random.default_rng(1).normal(0, 0.07, (NUMBERED_TASKS, 4, 2)) + data.task_params[:, None]

    def embed(context, mask):
        task, episode, _ = origin(context[:, 0, 4])
        return torch.as_tensor(table[task, episode], dtype=torch.float32)

    places = [(t, n) for t, n, s in recorded(arrays) if s == 0]
    train = [place for place in places if place[0] < 6]
    centroids = [np.mean([table[p] for p in train[::2] if p[0] == task], 0) for task in range(6)]
    right = [np.argmin([np.linalg.norm(table[p] - c) for c in centroids]) == p[0] for p in train[1::2]]
    x = np.array([[*table[place], 1] for place in places])
    y = np.array([data.task_params[t] for t, _ in places])
    fit = np.linalg.lstsq(x[: len(train)], y[: len(train)], rcond=None)[0]
    error = ((x[len(train) :] @ fit - y[len(train) :]) ** 2).sum()
    around = ((y[len(train) :] - data.task_params[:6].mean(0)) ** 2).sum()
    expected = {"z/nearest_task_acc": np.mean(right), "z/probe_r2": 1 - error / around}
    assert 0.4 <= np.mean(right) < 0.9 and dc.embedding_quality(data, embed) == pytest.approx(expected, abs=1e-4)
