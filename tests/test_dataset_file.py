"""The dataset file (collecting, resuming, refusing), Dataset and evaluate of data_collect.py."""

import copy
import dataclasses
import fcntl
import functools
import json
import math
import runpy
import signal
import statistics
import sys
import tempfile

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
        distance = np.linalg.norm(obs[1:] - [1, 0], axis=1)
        np.testing.assert_allclose(arrays[prefix + "rewards"][where], -distance, atol=1e-6)
        assert arrays[prefix + "lengths"][where] == 25 and not arrays[prefix + "terminated"][where]
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


def test_tasks_may_train_and_test(telltale, tmp_path, monkeypatch):
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


@functools.cache
def uninterrupted(behavior):
    """-> arrays of the file."""
    with tempfile.TemporaryDirectory() as folder:
        dc.collect(dc.Args(**STRAIGHT, behavior=behavior, out=f"{folder}/point-robot.npz"))
        return read(f"{folder}/point-robot.npz")[0]


CUTS = [("shared", "SIGTERM", 25), ("per-task", "kill", 55), ("shared", "kill while rolling out", 3)]


@pytest.mark.parametrize("behavior, how, count", CUTS)
def test_interrupted_collection_resumes_bit_for_bit(behavior, how, count, tmp_path, monkeypatch, capsys):
    """In an update, of three tasks in the second one's, or in the fourth rollout."""
    expected = uninterrupted(behavior)
    path, policies = tmp_path / "point-robot.npz", tmp_path / "point-robot.policies.pt"
    args = dc.Args(**STRAIGHT, behavior=behavior, out=str(path))
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


@pytest.mark.parametrize("kind", ["other seed", "cut off", "other contents"])
def test_wrong_policies_are_refused(tiny_path, tmp_path, kind):
    path = tmp_path / "point-robot.policies.pt"
    good = tiny_path.with_name("point-robot.policies.pt").read_bytes()
    torch.save({"weights": torch.zeros(3)}, path) if kind == "other contents" else path.write_bytes(good)
    if kind == "cut off":
        path.write_bytes(good[:9000])
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


def replaced(key, change):
    return lambda arrays, header: arrays.update({key: change(arrays[key])})


DAMAGES = {  # edit of a good file -> a word of the complaint
    "array missing": (lambda arrays, header: arrays.pop("rewards"), "rewards is missing"),
    "other family": (lambda arrays, header: header.update(env="ant-dir"), "holds ant-dir, not point-robot"),
    "other format": (lambda arrays, header: header.update(format_version=1), "has format 1, this code reads 2"),
    "too few tasks": (replaced("ood_rewards", lambda x: x[:2]), "ood_rewards has shape"),
    "wrong type": (replaced("rewards", lambda x: x.astype(np.float64)), "rewards has type"),
    "pickled objects": (replaced("rewards", lambda x: np.array([None, {}], object)), "not a dataset"),
    "not finite": (put("ood_observations", (0, 0, 0, 0), np.nan), "ood_observations has values"),
    "unknown task": (put("test_ids", 0, 9), "test_ids must be distinct"),
    "task twice": (put("train_ids", 0, 1), "train_ids must be distinct"),
    "no episode": (put("lengths", 2, 0), "test_ids has no episode"),
    "length above the horizon": (put("ood_lengths", (0, 0), 21), "ood_lengths must lie"),
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
    assert message.endswith("Choose another --env or --dataset" if "holds" in message else command)


@pytest.mark.parametrize("kind", ["cut off", "bit"])
def test_damaged_file_is_refused_in_one_line(tiny_path, tmp_path, kind):
    path, content = tmp_path / "file.npz", bytearray(tiny_path.read_bytes())
    content[content.index(b"observations.npy") + 5000] ^= 1  # in the middle of the largest member
    path.write_bytes(content if kind == "bit" else content[:5000])
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert message.startswith(f"{path}: damaged") and message.endswith(f"--env point-robot --out {path}")


def test_missing_file_names_its_command(tmp_path, monkeypatch):
    assert dc.DATASETS == ROOT / "datasets"
    monkeypatch.setattr(dc, "DATASETS", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    make, medium = "not found. Make it: python data_collect.py --env ant-dir", "datasets/ant-dir-medium.npz"
    assert stop_message(dc.load_dataset, "ant-dir") == f"datasets/ant-dir.npz {make}"
    assert stop_message(dc.load_dataset, "ant-dir", "a.npz") == f"a.npz {make} --out a.npz"
    assert stop_message(dc.load_dataset, "ant-dir", medium) == f"{medium} {make} --quality medium"


@pytest.mark.parametrize("command", ["--env moon-lander", "--rows 0", "--out data.txt", "--train-tasks 99"])
def test_wrong_flag_is_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *command.split()])
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


def test_dataset_counts_and_scales(uneven):
    data, arrays = uneven
    for key in ("task_params", "train_ids", "test_ids", "random_returns", "expert_returns", "lengths", "ood_lengths"):
        assert np.array_equal(getattr(data, key), arrays[key]), key
    assert data.counts.tolist() == [len(recorded(arrays, [task])) for task in range(NUMBERED_TASKS)]
    assert data.min_episodes == 2 and data.present.tolist() == [4, 2, 4, 3, 4, 4, 3, 1, 4]
    rewards = [float(arrays["rewards"][where]) for where in recorded(arrays, range(6))]
    assert data.reward_std == pytest.approx(statistics.pstdev(rewards), rel=1e-6)
    returns = [arrays["rewards"][t, n].sum(dtype=np.float64) for t, n, s in recorded(arrays, range(6)) if s == 0]
    assert data.behavior_return == pytest.approx(np.mean(returns), rel=1e-9)
    assert data.return_std == pytest.approx(np.std(returns), rel=1e-9)


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
    assert data.reward_std == data.return_std == 1


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


# ---- evaluate ---------------------------------------------------------------


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


def test_action_not_finite_ends_the_evaluation(uneven):
    act = lambda *_: lambda obs, rew: torch.full((len(obs), 2), math.nan)  # noqa: E731
    message = stop_message(dc.evaluate, uneven[0], act, ("online",))
    assert message == "evaluation online: the policy's action on task 6 is not finite"


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
    assert dc.q_error(episodes, value, gamma) == pytest.approx(expected, abs=1e-5)


# ---- how well z tells the tasks apart ---------------------------------------


def test_labeled_contexts_name_their_tasks(uneven):
    data, arrays = uneven
    given, places = [], [(4, 0), (4, 2), (4, 3), (1, 0), (1, 1)]  # of four episodes, and of two
    embed = lambda *inputs: given.extend(inputs) or inputs[0][:, 0, 4:5]  # noqa: E731
    z, labels = dc.label_contexts(data, embed, np.array([4, 1]), 3)
    assert labels == [task for task, _ in places] and z[:, 0].tolist() == [1000 * t + 100 * n for t, n in places]
    for context, mask, place in zip(*given, places):
        assert torch.equal(context, data.episodes[place][:, :-1])
        assert mask.tolist() == [float(step < arrays["lengths"][place]) for step in range(20)]


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
