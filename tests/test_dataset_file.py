"""The dataset file (collecting, resuming, refusing) and Dataset of data_collect.py."""

import dataclasses
import fcntl
import json
import math
import runpy
import signal
import statistics
import sys

import numpy as np
import pytest
import torch
from conftest import NUMBERED_TASKS, ROOT, TINY, OnDevice, dataset_on_meta, origin, stop_message, task_distance
from test_data_collect import diverging

import data_collect as dc


def read(path):
    """-> arrays of a dataset file, its header."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("header")))


def write(path, arrays, header):
    np.savez_compressed(path, **arrays, header=np.array(json.dumps(header)))
    return path


# ---- what a collection writes -----------------------------------------------


def test_file_follows_its_layout(tiny_path, walker_path, walker):
    arrays, header = read(tiny_path)
    sizes = {"T": 9, "N": 8, "H": 20, "H+1": 21, "O": 2, "A": 2, "P": 2, "U": 6, "V": 3, "C": 6}
    assert set(arrays) == set(dc.FILE_LAYOUT)
    for key, (dtype, letters) in dc.FILE_LAYOUT.items():
        assert arrays[key].dtype == dtype and arrays[key].shape == tuple(sizes[n] for n in letters), key
    params, train_ids, test_ids = dc.FAMILIES["point-robot"].draw()  # the first of the family, renumbered
    assert np.array_equal(arrays["task_params"][arrays["train_ids"]], params[train_ids[:6]])
    assert np.array_equal(arrays["task_params"][arrays["test_ids"]], params[test_ids[:3]])
    settings = dataclasses.asdict(dc.Args(env="point-robot", width=64, **TINY))
    assert header["settings"] == {key: value for key, value in settings.items() if key not in ("out", "device")}
    returns = arrays["rewards"].sum(-1)[arrays["lengths"] > 0]
    assert header["behavior_return"] == pytest.approx(returns.mean(), rel=1e-5) and header["diverged_episodes"] == 0
    np.testing.assert_allclose(arrays["random_returns"], -20.4, atol=1.5)
    bodies, _ = read(walker_path)  # are stored in half precision
    assert all(bodies[key].dtype == "float16" for key in dc.MAY_BE_HALF) and len(dc.MAY_BE_HALF) == 4
    assert walker.episodes.dtype == walker.ood_episodes.dtype == torch.float32


class Telltale(torch.nn.Module):
    """Stands for BehaviorActor. Its action tells the number of the snapshot, 0.2 more where it acts by its mode, and
    the task that it is told."""

    def __init__(self, obs_dim, act_dim, task_dim, width):
        super().__init__()
        self.act_dim = act_dim
        self.register_buffer("number", torch.zeros(()))

    def forward(self, obs, task):
        act = torch.zeros(len(obs), self.act_dim)
        act[:, 0], act[:, 1] = self.number, task[:, 0]
        return act, None

    def mode(self, obs, task):
        return self(obs, task)[0] + torch.tensor([0.2] + [0.0] * (self.act_dim - 1))


def number(group, phase):
    return (phase + group / 10) / 25


@pytest.fixture
def telltale(monkeypatch):
    """Collecting without training -> tasks of each training."""
    trained = []

    def train_behavior(family, params, task_ids, *_):
        trained.append(task_ids.tolist())
        return [{"number": torch.tensor(float(number(task_ids[0], phase)))} for phase in range(20)]

    monkeypatch.setattr(dc, "BehaviorActor", Telltale)
    monkeypatch.setattr(dc, "train_behavior", train_behavior)
    return trained


WINDY = {"env": "point-robot-wind", "train_tasks": 5, "test_tasks": 3, "episodes": 12, "test_episodes": 4}
WINDY |= {"ood_contexts": 4, "total_updates": 400}


@pytest.mark.parametrize("behavior", ["shared", "per-task"])
def test_each_episode_names_its_policy(telltale, tmp_path, behavior, monkeypatch):
    """The right snapshot, told the right task, on the right task; also where two of the first recorded episodes diverge
    and are played again."""
    diverging(monkeypatch, [2, -1], 60)
    dc.collect(dc.Args(**WINDY, out=str(tmp_path / "file.npz"), behavior=behavior))
    arrays, header = read(tmp_path / "file.npz")
    params, shared = arrays["task_params"], behavior == "shared"
    assert header["diverged_episodes"] == 2
    assert telltale == ([list(range(8))] if shared else [[i] for i in range(8)])

    def check(prefix, where, task, policy_task, phase):
        obs, act = arrays[prefix + "observations"][where], arrays[prefix + "actions"][where]
        np.testing.assert_allclose(np.diff(obs, axis=0), 0.1 * act + params[task], atol=1e-6)
        if phase is None:
            assert len(np.unique(act)) == 50 and abs(act).max() <= 1 and abs(act.mean()) < 0.4 and act.std() > 0.4
        else:
            expected = number(0 if shared else policy_task, phase), params[policy_task, 0] / 0.05
            np.testing.assert_allclose(act, np.tile(expected, (25, 1)), atol=1e-6)
        assert arrays[prefix + "behavior_step"][where] == (0 if phase is None else 20 * (phase + 1))

    for task, wind in enumerate(params):
        by_mode = np.array([number(0 if shared else task, 19) + 0.2, wind[0] / 0.05])
        expert = sum(-math.dist(t * (0.1 * by_mode + wind), (1, 0)) for t in range(1, 26))
        assert arrays["expert_returns"][task] == pytest.approx(expert, abs=1e-3)
        phases = [1, 3, 4, 6, 8, 9, 11, 12, 14, 16, 17, 19] if task < 5 else [1, 7, 13, 19]
        for n, phase in enumerate(phases):
            check("", (task, n), task, task, phase)
        assert not any(arrays[key][task, len(phases) :].any() for key in ("observations", "actions", "lengths"))
    # foreign contexts: by the three nearest tasks in order, then by the one of the two others which acted less; in turn
    # at 20, 60 and 100 % of the training; then by the random policy
    assert arrays["ood_behavior_task"].tolist() == [[2, 1, 4, 0, -2], [4, 2, 1, 3, -2], [0, 1, 3, 2, -2]]
    for v, task in enumerate(arrays["test_ids"]):
        for c, phase in enumerate([(3, 11, 19)[(v + c) % 3] for c in range(4)] + [None]):
            foreign = arrays["ood_behavior_task"][v, c]
            check("ood_", (v, c), task, foreign, phase)
            distance = -1 if phase is None else math.dist(params[task], params[foreign])
            assert arrays["ood_distance"][v, c] == pytest.approx(distance, abs=1e-12)
    other = WINDY | {"episodes": 9, "test_episodes": 2, "quality": "expert", "behavior": behavior}
    dc.collect(dc.Args(**other, out=str(tmp_path / "other.npz")))
    assert len(telltale) == (1 if shared else 8)  # files of other qualities share the policies


def test_quality_decides_the_phases():
    returns = np.linspace(-19, 0, 20)  # of phases 0..19; task 2 learns nothing, task 1 starts above halfway
    medium = ([9] * 10, [0] * 10, [19] * 10)  # -19 + 9 = -10 is halfway from -20 to 0

    def play(phase, task_ids, policy_ids):
        mean = np.stack([returns, np.full(20, 50.0), np.full(20, -100.0)])[task_ids, phase]
        return {"rewards": (mean + np.tile([-9.0, 9, 0], 3))[:, None] * np.full(4, 0.25)}

    expected = {"mixed": [[1, 3, 5, 7, 9, 11, 13, 15, 17, 19]] * 3, "medium": list(medium), "expert": [[19] * 10] * 3}
    expected |= {"medium-expert": [[*row[:7], 19, 19, 19] for row in medium], "random": [[dc.RANDOM] * 10] * 3}
    for quality in dc.QUALITIES:
        args = dc.Args(quality=quality, episodes=10, test_episodes=4)
        table = dc.choose_phases(args, 3, np.array([]), np.array([-20.0, 0, 0]), np.array([0.0, 10, 10]), play)
        assert table.tolist() == expected[quality]
    table = dc.choose_phases(dc.Args(episodes=10, test_episodes=4), 3, np.array([2]), None, None, play)
    assert table[2].tolist() == [1, 7, 13, 19] + [dc.NO_EPISODE] * 6


@pytest.mark.parametrize("name", ["point-robot", "cheetah-dir", "ant-dir"])
def test_foreign_policies_are_near_and_far(name):
    params, train_ids, test_ids = dc.FAMILIES[name].draw()
    foreign, phases = dc.choose_foreign(dc.FAMILIES[name], params, train_ids, test_ids, 5)
    assert foreign.shape == (len(test_ids), 6) and (foreign[:, -1] == dc.RANDOM).all()
    assert (phases[:, -1] == dc.RANDOM).all()
    for task, policies in zip(test_ids, foreign[:, :-1].tolist()):
        others = [i for i in train_ids if i != task]
        assert set(policies) <= set(others) and len(set(policies)) == min(5, len(others))
        distances = np.sort([task_distance(name, params[task], params[i]) for i in others])
        parts = np.array_split(distances, 5) if len(others) > 4 else [distances] * 5  # fifths, from near to far
        for part, policy in zip(parts, policies):
            assert part[0] - 1e-9 <= task_distance(name, params[task], params[policy]) <= part[-1] + 1e-9
    for column in phases[:, :-1].T:  # no column tells the phase: a third of the tasks each
        assert all(abs((column == phase).sum() - len(test_ids) / 3) < 1 for phase in (3, 11, 19))
    acted = np.array([[(foreign[phases == phase] == i).sum() for i in train_ids] for phase in (3, 11, 19)])
    assert abs(acted.sum(0) - acted.sum(0).mean()).max() <= 1 and abs(acted - acted.mean()).max() < 2  # nor a policy


def test_training_tasks_may_be_test_tasks(telltale, tmp_path, monkeypatch):
    monkeypatch.setattr(dc, "DATASETS", tmp_path)
    monkeypatch.setattr(dc.PointRobot, "draw", dc.CheetahDir.draw)
    one = {"env": "point-robot", "episodes": 4, "test_episodes": 2, "train_tasks": 1, "test_tasks": 1}
    assert "--ood-contexts 0" in stop_message(dc.collect, dc.Args(**one))
    dc.collect(dc.Args(**one, ood_contexts=0, quality="expert"))
    data = dc.load_dataset("point-robot", tmp_path / "point-robot-expert.npz")
    assert (data.lengths == 20).sum(1).tolist() == [4]
    results = dc.evaluate(data, lambda *_: lambda obs, rew: torch.zeros(len(obs), 2), ("ood", "ood_random"))
    assert {tag.split("/")[1] for tag in results} == {"ood_random"}  # there are no others


def test_existing_file_is_left_alone(tiny_path, capsys):
    before = tiny_path.stat().st_mtime_ns
    dc.collect(dc.Args(env="point-robot", out=str(tiny_path), **TINY))
    assert capsys.readouterr().out == f"{tiny_path} is complete; nothing to do\n"
    message = stop_message(dc.collect, dc.Args(env="point-robot", out=str(tiny_path), **TINY | {"lr": 7}))
    assert message.startswith(f"{tiny_path} was made with lr 0.001, not 7: choose another --out")
    assert tiny_path.stat().st_mtime_ns == before


# ---- interrupting and resuming ----------------------------------------------

STRAIGHT = {"env": "point-robot", "train_tasks": 2, "test_tasks": 1, "width": 16, "total_updates": 30, "rows": 8}
STRAIGHT |= {"updates_per_step": 1, "batch_size": 32, "episodes": 4, "test_episodes": 2}


CUTS = [("shared", "SIGTERM", 25), ("per-task", "kill", 55), ("shared", "kill while rolling out", 3)]


@pytest.mark.parametrize("behavior, how, count", CUTS)
def test_interrupted_collection_resumes_bit_for_bit(behavior, how, count, tmp_path, monkeypatch, capsys):
    """In an update, of three tasks in the second one's, or in the fourth rollout."""
    path, policies = tmp_path / "point-robot.npz", tmp_path / "point-robot.policies.pt"
    args = dc.Args(**STRAIGHT, behavior=behavior, out=str(path))
    dc.collect(dc.Args(**STRAIGHT, behavior=behavior, out=str(tmp_path / "whole/point-robot.npz")))
    expected, _ = read(tmp_path / "whole/point-robot.npz")
    place, name = (dc.SAC, "update") if "rolling" not in how else (dc, "rollout")
    original, calls, updates = getattr(place, name), iter(range(10**6)), []

    def cut(*inputs):
        if next(calls) == count:
            if how != "SIGTERM":
                raise ConnectionError  # stands for a kill: nothing saves
            signal.raise_signal(signal.SIGTERM)
        return original(*inputs)

    with monkeypatch.context() as patch, pytest.raises((ConnectionError, SystemExit)) as stop:
        patch.setattr(place, name, cut)
        dc.collect(args)
    if how == "SIGTERM":
        last = f"interrupted; progress is in {policies}, the same command continues\n"
        assert capsys.readouterr().out.endswith(last) and stop.value.code == 128 + signal.SIGTERM
    assert policies.exists() and not path.exists()
    monkeypatch.setattr(dc.SAC, "update", lambda *inputs, update=dc.SAC.update: updates.append(0) or update(*inputs))
    dc.collect(args)
    assert len(updates) == {25: 4, 55: 90 - 54, 3: 0}[count]  # not all anew
    assert all(np.array_equal(read(path)[0][key], expected[key]) for key in expected)


def test_second_signal_ends_at_once():
    with pytest.raises(SystemExit) as stop, dc.Signals("how") as signals:
        signals.may_save = True
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) != signals.handle


@pytest.mark.parametrize("kind", ["other seed", "cut off"])
def test_wrong_policies_are_refused(tiny_path, tmp_path, kind):
    path = tmp_path / "point-robot.policies.pt"
    good = tiny_path.with_name("point-robot.policies.pt").read_bytes()
    path.write_bytes(good[:9000] if kind == "cut off" else good)
    settings = TINY | {"out": str(tmp_path / "file.npz"), "seed": int(kind == "other seed")}
    message = stop_message(dc.collect, dc.Args(env="point-robot", **settings))
    assert str(path) in message and "move it away" in message and not (tmp_path / "file.npz").exists()


def test_second_collection_in_a_folder_is_refused(tiny_path):
    args = dc.Args(env="point-robot", quality="expert", out=str(tiny_path.with_name("other.npz")), **TINY)
    with open(tiny_path.with_name("point-robot.policies.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is collecting point-robot" in stop_message(dc.collect, args)


# ---- wrong files and commands -----------------------------------------------


def put(key, index, value):
    return lambda arrays, header: arrays[key].__setitem__(index, value)


DAMAGES = {  # edit of a good file -> a word of the complaint
    "array missing": (lambda arrays, header: arrays.pop("rewards"), "rewards is missing"),
    "other family": (lambda arrays, header: header.update(env="ant-dir"), "holds ant-dir, not point-robot"),
    "other format": (lambda arrays, header: header.update(format_version=1), "format 1, this code reads 2"),
    "no episode": (put("lengths", 2, 0), "test_ids has no episode"),
    "action above 1": (put("actions", (0, 0, 0, 0), 1.5), "actions must lie"),
    # evaluate takes the first episodes of each row for the recorded ones
    "empty episode first": (put("lengths", (2, 0), 0), "empty episode before"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_content_is_refused_in_one_line(tiny_path, tmp_path, damage):
    arrays, header = read(tiny_path)
    edit, complaint = DAMAGES[damage]
    edit(arrays, header)
    path = write(tmp_path / "file.npz", arrays, header)
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert message.startswith(str(path)) and complaint in message
    command = f"Move it away and run: python data_collect.py --env point-robot --out {path}"
    assert message.endswith("Use --env ant-dir or another file" if "holds" in message else command)


@pytest.mark.parametrize("kind", ["cut off", "bit", "objects"])
def test_damaged_file_is_refused_in_one_line(tiny_path, tmp_path, kind, monkeypatch):
    path, content = tmp_path / "point-robot.npz", bytearray(tiny_path.read_bytes())
    content[content.index(b"observations.npy") + 5000] ^= 1  # in the middle of the largest member
    path.write_bytes(content if kind == "bit" else content[:5000])
    if kind == "objects":
        np.savez(path, rewards=np.array([None, {}], object))
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert message.startswith(f"{path}: damaged") and "Choose another --dataset" in message and "away" not in message
    monkeypatch.setattr(dc, "DATASETS", tmp_path)  # where only this repository writes
    assert "Move it away and run: python" in stop_message(dc.load_dataset, "point-robot")


def test_missing_file_names_its_command(tmp_path, monkeypatch):
    assert dc.DATASETS == ROOT / "datasets"
    monkeypatch.setattr(dc, "DATASETS", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    make = "not found. Make it: python data_collect.py --env ant-dir"
    assert stop_message(dc.load_dataset, "ant-dir") == f"datasets/ant-dir.npz {make}"
    assert stop_message(dc.load_dataset, "ant-dir", "a.npz") == f"a.npz {make} --out a.npz"


@pytest.mark.parametrize("command", ["--env moon-lander", "--rows 0", "--out data.txt", "--train-tasks 99"])
def test_wrong_flag_is_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *command.split()])
    monkeypatch.setitem(sys.modules, "data_collect", dc)  # the program puts itself there
    message = stop_message(lambda: runpy.run_path(str(ROOT / "data_collect.py"), run_name="__main__"))
    assert message.startswith(f"{command}: ") and not list(tmp_path.iterdir())


# ---- Dataset ----------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(numbered_path, tmp_path_factory):
    """The numbered data with less order: observations of another scale (one far out), tasks with fewer episodes, one
    episode of a single step, a scale of returns for each task, and the random context of task 6 in front.
    -> Dataset, arrays."""
    arrays, header = read(numbered_path)
    for key in ("observations", "ood_observations"):
        arrays[key] = 3 * arrays[key] + np.array([1, -2], np.float32)
    arrays["observations"][arrays["test_ids"]] += 5  # standardization knows the training tasks alone
    arrays["observations"][7, 0, 2] = 1e3
    for task, episodes in ((1, 2), (3, 3), (6, 3), (7, 1)):
        for key in ("observations", "actions", "rewards", "lengths", "terminated"):
            arrays[key][task, episodes:] = 0
    arrays["lengths"][5, 0], arrays["rewards"][5, 0, 1:] = 1, 0
    arrays["random_returns"] -= np.arange(NUMBERED_TASKS)
    arrays["expert_returns"] += np.arange(NUMBERED_TASKS) / 2
    arrays["ood_behavior_task"][0], goals = [dc.RANDOM, 1, 3, 5], arrays["task_params"]
    arrays["ood_distance"][0] = [-1, *(math.dist(goals[6], goals[task]) for task in (1, 3, 5))]
    path = write(tmp_path_factory.mktemp("uneven") / "point-robot.npz", arrays, header)
    return dc.load_dataset("point-robot", path), arrays


def recorded(arrays, tasks=range(NUMBERED_TASKS)):
    """-> (task, episode, step) of all transitions."""
    lengths = arrays["lengths"]
    return [(t, n, s) for t in tasks for n in range(lengths.shape[1]) for s in range(lengths[t, n])]


def as_seen(arrays, obs):
    """Observations as the networks should see them, in float64."""
    seen = np.array([arrays["observations"][where] for where in recorded(arrays, range(6))], np.float64)
    return ((obs - seen.mean(0)) / seen.std(0)).clip(-10, 10)


def test_dataset_counts_its_files_transitions(uneven):
    data, arrays = uneven
    for key in ("task_params", "train_ids", "test_ids", "random_returns", "expert_returns", "lengths", "ood_lengths"):
        assert np.array_equal(getattr(data, key), arrays[key]), key
    assert data.counts.tolist() == [len(recorded(arrays, [task])) for task in range(NUMBERED_TASKS)]
    assert data.min_episodes == 2 and data.present.tolist() == [4, 2, 4, 3, 4, 4, 3, 1, 4]
    rewards = [float(arrays["rewards"][where]) for where in recorded(arrays, range(6))]
    assert data.reward_std == pytest.approx(statistics.pstdev(rewards), rel=1e-6)
    returns = [arrays["rewards"][t, n].sum(dtype=np.float64) for t, n, s in recorded(arrays, range(6)) if s == 0]
    assert data.behavior_return == pytest.approx(np.mean(returns), rel=1e-9)


@pytest.mark.parametrize("prefix", ["", "ood_"])
def test_rows_are_the_files_transitions(uneven, prefix):
    data, arrays = uneven
    rows = data.episodes if prefix == "" else data.ood_episodes
    lengths, terminated = arrays[prefix + "lengths"], arrays[prefix + "terminated"]
    for where in np.ndindex(rows.shape[:3]):
        obs, act, rew, next_obs, term = data.unpack(rows[where])
        *episode, step = where
        if step >= lengths[*episode]:
            assert not rows[where].any()
            continue
        expected = as_seen(arrays, arrays[prefix + "observations"][*episode, step : step + 2])
        np.testing.assert_allclose(torch.stack([obs, next_obs]), expected, atol=1e-4)
        assert np.array_equal(act, arrays[prefix + "actions"][where]) and rew == arrays[prefix + "rewards"][where]
        assert term == (terminated[*episode] and step == lengths[*episode] - 1)


def test_constant_data_leave_finite_numbers(tiny_path, tmp_path):
    arrays, header = read(tiny_path)
    arrays["observations"][..., 1], arrays["rewards"][:] = 0.25, -1
    data = dc.load_dataset("point-robot", write(tmp_path / "file.npz", arrays, header))
    assert data.unpack(data.episodes).obs[..., 1].abs().max() < 1e-3 and data.episodes.isfinite().all()
    assert data.reward_std == 1


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_even(hits, expected_places):
    """hits: places drawn; all and only the expected ones, each about equally often."""
    places, counts = np.unique(hits.numpy(), axis=0, return_counts=True)
    assert {tuple(np.ravel(place)) for place in places.tolist()} == {tuple(np.ravel(p)) for p in expected_places}
    expected = len(hits) / len(expected_places)
    assert abs(counts - expected).max() < 6 * math.sqrt(expected) and expected > 50


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sample_draws_each_tasks_best_transitions_evenly(uneven, share):
    data, arrays = uneven
    tasks, size = torch.tensor([3, 0, 7, 3]), 100 * int(data.counts.max())
    rows = data.sample(tasks, size, generator(0), share)
    places = torch.stack(origin(rows[..., 4]), -1)
    assert torch.equal(rows[:, :50], data.episodes[places[:, :50].unbind(-1)])
    for task, row in zip(tasks.tolist(), places):
        best_first = sorted(recorded(arrays, [task]), key=lambda place: -arrays["rewards"][place[:2]].sum())
        count = share * len(best_first)  # 22, 17.5 and 7 of task 0, 3 and 7 for the half
        hits = np.array([(row == torch.tensor(place)).all(-1).sum() for place in best_first])
        expected = size * (count - np.arange(len(hits))).clip(0, 1) / count  # of the 18th half as often
        assert hits.sum() == size and (hits[expected == 0] == 0).all()
        assert (abs(hits - expected) <= 6 * np.sqrt(expected)).all()
    assert not torch.equal(places[0], places[3])
    parts = torch.split(rows, [2, 2, 1, 2, 1], -1)
    batch = data.sample_batch(tasks, size, generator(0), share)
    assert all(map(torch.equal, batch, (parts[0], parts[1], parts[2][..., 0], parts[3], parts[4][..., 0])))


@pytest.mark.parametrize("steps", [1, 4])
def test_segment_follows_its_episode(uneven, steps):
    data, arrays = uneven
    tasks, kinds = torch.tensor([8, 5, 0, 3, 8]), set()
    segment = data.sample_segments(tasks, 700, steps, 0.9, generator(0))
    starts = torch.stack(origin(segment.rew[..., 0]), -1)
    assert all(set(map(tuple, s.tolist())) == set(recorded(arrays, [t])) for t, s in zip(tasks.tolist(), starts))
    for where in np.ndindex(5, 150):
        *episode, first = starts[where].tolist()
        length, terminated = int(arrays["lengths"][*episode]), bool(arrays["terminated"][*episode])
        real = min(steps, length - first)
        ended = terminated and first + real == length
        rows = data.episodes[*episode, [first + min(k, real - 1) for k in range(steps)]]
        expected = [rows[:, :2], rows[:, 2:4], rows[:, 4], rows[:, 5:7]]
        expected += [torch.tensor([0.9**k * (k < real) for k in range(steps)]), torch.tensor(0.9**real * (not ended))]
        for part, value in zip(segment, expected, strict=True):
            torch.testing.assert_close(part[where], value, rtol=1e-6, atol=0)
        kinds.add((real == steps, first + real == length, terminated))
    assert {(True, False, False), (True, True, True), (True, True, False)} <= kinds
    assert {(False, True, True), (False, True, False)} <= kinds or steps == 1  # an early end, terminated or not


def test_sample_context_draws_from_one_episode(uneven):
    data, arrays = uneven
    tasks = torch.tensor([5, 1, 6]).repeat(2000)
    context = data.sample_context(tasks, 9, generator(0))
    task, episode, step = origin(context[..., 4])
    assert torch.equal(context, data.episodes[task, episode, step, :-1])
    assert (task == tasks[:, None]).all() and (episode == episode[:, :1]).all()
    for asked, present in ((5, 4), (1, 2), (6, 3)):
        assert_even(episode[tasks == asked, 0], range(present))
        for n in range(present):
            assert_even(step[(tasks == asked) & (episode[:, 0] == n)].flatten(), range(arrays["lengths"][asked, n]))
    other = torch.arange(NUMBERED_TASKS * 4 * 20 * 3).view(NUMBERED_TASKS, 4, 20, 3)
    assert torch.equal(data.sample_context(tasks, 9, generator(0), other), other[task, episode, step])


def test_sample_tasks_draws_training_tasks_evenly(uneven):
    before = torch.get_rng_state()
    assert_even(uneven[0].sample_tasks(3000, generator(0)), uneven[0].train_ids.tolist())
    assert torch.equal(torch.get_rng_state(), before)


def test_drawing_stays_on_the_device(uneven):
    data = dataset_on_meta(uneven[0])
    with OnDevice():
        tasks = data.sample_tasks(5, None)
        assert data.sample_batch(tasks, 7, None, 0.25).rew.shape == (5, 7)
        assert data.sample_segments(tasks, 7, 3, 0.9, None).discount.shape == (5, 7, 3)
        assert data.sample_context(tasks, 7, None).shape == (5, 7, 7)
        assert data.standardize(torch.zeros(3, 2, device="meta")).shape == (3, 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_value_std_measures_discounted_returns(gamma, numbered):
    """Over the recorded transitions of the training tasks."""
    returns = []
    for task in range(6):
        for rows, length in zip(numbered.episodes[task], numbered.lengths[task]):
            rewards = rows[:length, 4].tolist()
            returns += [sum(gamma**k * rew for k, rew in enumerate(rewards[t:])) for t in range(length)]
    assert numbered.value_std(gamma) == pytest.approx(np.std(returns), rel=1e-5)
