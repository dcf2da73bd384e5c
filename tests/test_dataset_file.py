"""The dataset file: collecting, interrupting, continuing, reading, refusing damaged files, sampling."""

import contextlib
import dataclasses
import json
import math
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags, run_script, start_script, stop_message

import data_collect as dc

# the collection that is killed, interrupted and repeated below: long enough to be caught in the middle
STRAIGHT = {"env": "point-robot", "out": "out/point-robot.npz", "train_tasks": 4, "test_tasks": 2, "width": 32}
STRAIGHT |= {"total_updates": 400, "rows": 16, "updates_per_step": 10, "episodes": 4, "test_episodes": 2}


def read(path):
    """-> arrays of a dataset file, its header apart."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("header")))


def write(path, arrays, header):
    np.savez_compressed(path, **arrays, header=np.array(json.dumps(header)))
    return path


# ---- collect ----------------------------------------------------------------


def test_file_holds_what_the_layout_says(tiny_path):
    arrays, _ = read(tiny_path)
    sizes = {"T": 9, "N": 8, "H": 20, "H+1": 21, "O": 2, "A": 2, "P": 2, "U": 6, "V": 3, "C": 6}
    assert set(arrays) == set(dc.FILE_LAYOUT)
    for key, (dtype, letters) in dc.FILE_LAYOUT.items():
        assert arrays[key].dtype == dtype and arrays[key].shape == tuple(sizes[n] for n in letters), key


def test_chosen_tasks_are_the_first_of_the_family_renumbered(tiny_path):
    arrays, _ = read(tiny_path)
    params, train_ids, test_ids = dc.FAMILIES["point-robot"].draw()
    assert np.array_equal(arrays["task_params"][arrays["train_ids"]], params[train_ids[:6]])
    assert np.array_equal(arrays["task_params"][arrays["test_ids"]], params[test_ids[:3]])
    assert arrays["train_ids"].tolist() == [0, 1, 3, 4, 5, 7] and arrays["test_ids"].tolist() == [2, 6, 8]


def test_training_tasks_get_all_episodes_and_test_tasks_a_few(tiny_path):
    arrays, _ = read(tiny_path)
    recorded = arrays["lengths"] > 0
    assert recorded[arrays["train_ids"]].sum(1).tolist() == [8] * 6
    assert recorded[arrays["test_ids"]].sum(1).tolist() == [3] * 3 and recorded[arrays["test_ids"], :3].all()
    assert np.array_equal(arrays["behavior_step"] == -1, ~recorded)


def test_training_tasks_that_are_also_test_tasks_keep_all_their_episodes(tmp_path):
    # cheetah-dir: --test-episodes must not cut the training data of its two tasks
    settings = {"total_updates": 20, "rows": 2, "updates_per_step": 20, "width": 8, "batch_size": 8}
    settings |= {"episodes": 4, "test_episodes": 2, "ood_contexts": 1}
    path = tmp_path / "cheetah-dir.npz"
    dc.collect(dc.Args(env="cheetah-dir", out=str(path), **settings))
    arrays, _ = read(path)
    assert arrays["ood_behavior_task"].tolist() == [[1, dc.RANDOM], [0, dc.RANDOM]]
    assert (arrays["lengths"] == 200).sum(1).tolist() == [4, 4]


def test_single_training_task_that_is_the_test_task_is_refused_or_collected(tmp_path):
    # there is no other training task for the foreign contexts; it must not end in an IndexError after the training
    settings = {"total_updates": 20, "rows": 2, "updates_per_step": 20, "width": 8, "batch_size": 8}
    settings |= {"episodes": 2, "test_episodes": 1, "ood_contexts": 2, "train_tasks": 1, "test_tasks": 1}
    path = tmp_path / "cheetah-dir.npz"
    try:
        dc.collect(dc.Args(env="cheetah-dir", out=str(path), **settings))
    except SystemExit as stopped:
        assert "--train-tasks" in stopped.code or "--ood-contexts" in stopped.code
    else:
        assert dc.load_dataset("cheetah-dir", path).counts.tolist() == [400]


def test_header_says_how_the_file_was_made(tiny_path):
    arrays, header = read(tiny_path)
    assert header["format_version"] == dc.FORMAT_VERSION and header["env"] == "point-robot"
    settings = dataclasses.asdict(dc.Args(env="point-robot", width=64, **TINY))
    assert header["settings"] == {key: value for key, value in settings.items() if key not in ("out", "device")}
    assert header["versions"]["numpy"] == np.__version__ and header["versions"]["torch"] == torch.__version__
    assert set(header["versions"]) == {"numpy", "torch", "mujoco", "gymnasium", "python"}
    assert header["command"].startswith("python ") and header["diverged_episodes"] == 0
    returns = arrays["rewards"].sum(-1)[arrays["lengths"] > 0]
    assert header["behavior_return"] == pytest.approx(returns.mean(), rel=1e-5)


def test_foreign_contexts_come_from_training_tasks_spread_evenly_at_three_stages(tiny_path):
    arrays, _ = read(tiny_path)
    assert arrays["ood_behavior_task"].tolist() == [[0, 1, 3, 5, 7, dc.RANDOM]] * 3  # of training tasks 0 1 3 4 5 7
    assert arrays["ood_behavior_step"].tolist() == [[40, 120, 200, 40, 120, 0]] * 3  # 20, 60, 100 % of 200 updates


def test_load_gives_what_was_written(tiny_path):
    arrays, header = read(tiny_path)
    data = dc.load_dataset("point-robot", tiny_path)
    assert data.header == header and data.env == "point-robot" and data.ctx_dim == 7
    assert (data.obs_dim, data.act_dim, data.min_episodes) == (2, 2, 8)
    for key in ("task_params", "train_ids", "test_ids", "random_returns", "expert_returns", "ood_behavior_task"):
        assert np.array_equal(getattr(data, key), arrays[key]), key
    for prefix, rows, lengths in (("", data.episodes, data.lengths), ("ood_", data.ood_episodes, data.ood_lengths)):
        obs, act, rew, next_obs, term = [x.numpy() for x in data.unpack(rows)]
        real = np.arange(20) < arrays[prefix + "lengths"][..., None]
        recorded = data.standardize(torch.as_tensor(arrays[prefix + "observations"])).numpy()
        assert np.array_equal(lengths, arrays[prefix + "lengths"])
        assert np.array_equal(obs[real], recorded[..., :-1, :][real]) and not term.any()
        assert np.array_equal(next_obs[real], recorded[..., 1:, :][real])
        assert np.array_equal(act[real], arrays[prefix + "actions"][real])
        assert np.array_equal(rew[real], arrays[prefix + "rewards"][real])
        assert not any(x[~real].any() for x in (obs, act, rew, next_obs))
    np.testing.assert_allclose(data.episode_returns, arrays["rewards"].sum(-1), rtol=1e-5)
    assert data.counts.tolist() == [160, 160, 60, 160, 160, 160, 60, 160, 60]
    returns = arrays["rewards"][arrays["train_ids"]].sum(-1)
    assert data.behavior_return == pytest.approx(returns.mean(), rel=1e-5)


def test_observations_are_standardized_over_the_training_tasks(walker_path):
    arrays, _ = read(walker_path)
    data = dc.load_dataset("walker-rand-params", walker_path)
    seen = [
        arrays["observations"][task, n, : arrays["lengths"][task, n]]
        for task in arrays["train_ids"]
        for n in np.flatnonzero(arrays["lengths"][task])
    ]
    seen = np.concatenate(seen).astype(np.float64)
    np.testing.assert_allclose(data.obs_mean, seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.obs_spread, seen.std(0).clip(1e-3), rtol=1e-4)
    obs = data.unpack(data.episodes[torch.as_tensor(data.train_ids)])[0]
    expected = ((seen - seen.mean(0)) / seen.std(0).clip(1e-3)).clip(-10, 10)
    lengths = data.lengths[torch.as_tensor(data.train_ids)]
    rows = torch.cat([obs[where][: lengths[where]] for where in np.ndindex(tuple(lengths.shape))])
    np.testing.assert_allclose(rows, expected, atol=2e-3)
    assert data.standardize(torch.full((18,), 1e9)).max() == 10 == -data.standardize(torch.full((18,), -1e9)).min()


def test_a_constant_observation_stays_finite(tiny_path, tmp_path):
    arrays, header = read(tiny_path)
    arrays["observations"][..., 1] = 0.25
    data = dc.load_dataset("point-robot", write(tmp_path / "file.npz", arrays, header))
    assert data.unpack(data.episodes)[0][..., 1].abs().max() < 1e-3 and data.episodes.isfinite().all()


def test_behavior_return_ignores_episodes_that_do_not_exist(tiny_path, tmp_path):
    # with --test-episodes above --episodes the training tasks have empty places in the table
    arrays, header = read(tiny_path)
    expected = arrays["rewards"][arrays["train_ids"], :2].sum(-1).mean()
    missing = np.ix_(arrays["train_ids"], range(2, 8))
    for key in ("observations", "actions", "rewards", "lengths"):
        arrays[key][missing] = 0
    data = dc.load_dataset("point-robot", write(tmp_path / "file.npz", arrays, header))
    assert data.behavior_return == pytest.approx(expected, rel=1e-5) and data.min_episodes == 2


def test_random_and_expert_returns_are_those_of_the_policies(tiny_path):
    arrays, _ = read(tiny_path)
    np.testing.assert_allclose(arrays["random_returns"], -20.4, atol=1.5)
    assert arrays["expert_returns"].mean() > arrays["random_returns"].mean() + 3


def test_second_start_on_a_finished_file_does_nothing(tiny_path, capsys):
    files = [tiny_path, tiny_path.with_name("point-robot.policies.pt")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    dc.collect(dc.Args(env="point-robot", out=str(tiny_path), **TINY))
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    assert capsys.readouterr().out == f"{tiny_path} is complete; nothing to do\n"


@pytest.mark.parametrize("changed", ["seed", "episodes", "lr"])
def test_other_settings_on_an_existing_file_give_one_line(tiny_path, changed):
    before = tiny_path.read_bytes()
    args = dc.Args(env="point-robot", out=str(tiny_path), **TINY | {changed: 7})
    message = stop_message(dc.collect, args)
    assert str(tiny_path) in message and f"{changed} " in message and "--out" in message
    assert tiny_path.read_bytes() == before


def test_policies_with_other_settings_are_refused(tiny_path, tmp_path):
    shutil.copy(tiny_path.with_name("point-robot.policies.pt"), tmp_path)
    args = dc.Args(env="point-robot", out=str(tmp_path / "other.npz"), **TINY | {"seed": 1})
    message = stop_message(dc.collect, args)
    assert "point-robot.policies.pt" in message and "--out" in message


@pytest.mark.parametrize("quality", ["mixed", "medium", "expert", "medium-expert", "random"])
def test_quality_decides_which_phases_are_recorded(tiny_path, tmp_path, quality):
    """All qualities share the policies file, so that none but the first trains anything."""
    policies = tmp_path / "point-robot.policies.pt"
    shutil.copy(tiny_path.with_name(policies.name), policies)
    trained, path = policies.stat().st_mtime_ns, tmp_path / "file.npz"
    dc.collect(dc.Args(env="point-robot", out=str(path), quality=quality, **TINY))
    assert policies.stat().st_mtime_ns == trained
    arrays, header = read(path)
    assert header["settings"]["quality"] == quality
    for task, row in enumerate(arrays["behavior_step"]):
        count = 3 if task in arrays["test_ids"] else 8
        assert (row[count:] == -1).all()
        steps = row[:count]
        if quality == "mixed":  # phases 2 to 20 of 20, each 10 updates long
            assert steps.tolist() == [10 * (phase + 1) for phase in np.linspace(1, 19, count).round()]
        elif quality == "medium-expert":
            split = round(0.7 * count)
            assert len(set(steps[:split])) == 1 and (steps[split:] == 200).all() and steps[0] % 10 == 0
        else:
            assert (steps == {"expert": 200, "random": 0}.get(quality, steps[0])).all() and 0 <= steps[0] <= 200
    if quality == "random":
        returns = arrays["rewards"][arrays["lengths"] > 0].sum(-1)
        assert returns.mean() == pytest.approx(arrays["random_returns"].mean(), abs=2)


def test_medium_is_the_first_phase_halfway_to_the_expert():
    returns = np.linspace(-19, 0, 20)  # of phases 0..19; task 2 learns nothing, task 1 starts above halfway

    def play(phase, task_ids, policy_ids):
        table = np.stack([returns, np.full(20, 50.0), np.full(20, -100.0)])
        return {"rewards": table[task_ids, phase, None] * np.full(4, 0.25)}

    for quality, tail in (("medium", []), ("medium-expert", [19] * 3)):
        args = dc.Args(quality=quality, episodes=10, test_episodes=10)
        table = dc.choose_phases(args, 3, np.array([2]), np.array([-20.0, 0, 0]), np.array([0.0, 10, 10]), play)
        for row, medium in zip(table, (9, 0, 19)):  # -19 + 9 = -10 is halfway from -20 to 0
            assert row.tolist() == [medium] * (10 - len(tail)) + tail


def test_per_task_policies_are_trained_one_by_one(tmp_path, capsys):
    settings = {"train_tasks": 2, "test_tasks": 2, "total_updates": 20, "width": 8, "rows": 4, "batch_size": 8}
    path = tmp_path / "point-robot.npz"
    dc.collect(dc.Args(env="point-robot", out=str(path), behavior="per-task", episodes=3, test_episodes=2, **settings))
    printed = capsys.readouterr().out
    assert all(f"[point-robot task {task} " in printed for task in range(4))
    policies = torch.load(tmp_path / "point-robot.policies.pt", weights_only=True)
    assert len(policies["finished"]) == 4 and policies["training"] is None
    first = [snapshots[-1]["net.0.weight"] for snapshots in policies["finished"]]
    assert not any(torch.equal(first[0], other) for other in first[1:])
    data = dc.load_dataset("point-robot", path)
    assert data.header["settings"]["behavior"] == "per-task"
    assert data.counts[data.train_ids].tolist() == [60, 60] and data.counts[data.test_ids].tolist() == [40, 40]


def test_dataset_without_foreign_contexts_is_collected_and_evaluated(tiny_path, tmp_path):
    shutil.copy(tiny_path.with_name("point-robot.policies.pt"), tmp_path)
    path = tmp_path / "point-robot.npz"
    dc.collect(dc.Args(env="point-robot", out=str(path), ood_contexts=0, **TINY))
    data = dc.load_dataset("point-robot", path)
    assert data.ood_behavior_task.tolist() == [[dc.RANDOM]] * 3

    def adapt(context, mask, explore):
        return lambda obs, rew: torch.zeros(len(obs), 2)

    results = dc.evaluate(data, adapt, ("ood", "ood_random"))
    assert {tag.split("/")[1] for tag in results} == {"ood_random"}


# ---- interrupting and continuing --------------------------------------------


@pytest.fixture(scope="module")
def straight_bytes(tmp_path_factory):
    """The file of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    code, stdout, stderr = run_script(folder, "data_collect.py", *flags(STRAIGHT))
    assert code == 0, stderr
    assert "wrote out/point-robot.npz" in stdout and "Traceback" not in stderr
    return (folder / STRAIGHT["out"]).read_bytes()


def interrupt(folder, settings, sent, beginning, count):
    """Start, wait for `count` lines that begin like that, send the signal -> exit code, remaining output."""
    process = start_script(folder, "data_collect.py", *flags(settings))
    with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
        for line in process.stdout:
            count -= line.startswith(beginning)
            if count == 0:
                break
        assert count == 0, "ended too early: " + process.stderr.read()
        process.send_signal(sent)
        rest, errors = process.stdout.read(), process.stderr.read()
    return process.wait(timeout=60), rest, errors


def test_same_command_in_another_folder_writes_the_same_bytes(straight_bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *flags(STRAIGHT)])  # it is stored in the header
    dc.collect(dc.Args(**STRAIGHT))
    assert (tmp_path / STRAIGHT["out"]).read_bytes() == straight_bytes
    _, header = read(STRAIGHT["out"])
    assert header["command"] == "python data_collect.py " + " ".join(flags(STRAIGHT))


def test_killed_run_continues_to_the_same_bytes(straight_bytes, tmp_path):
    code, rest, _ = interrupt(tmp_path, STRAIGHT, signal.SIGKILL, "[point-robot", 5)
    assert code == -signal.SIGKILL and "rolling out" not in rest
    assert not (tmp_path / STRAIGHT["out"]).exists()
    code, stdout, stderr = run_script(tmp_path, "data_collect.py", *flags(STRAIGHT))
    assert code == 0, stderr
    progress = [line for line in stdout.splitlines() if line.startswith("[point-robot")]
    assert "continuing from out/point-robot.policies.pt" in stdout and 0 < len(progress) < 18
    assert (tmp_path / STRAIGHT["out"]).read_bytes() == straight_bytes


def test_interrupted_run_says_how_to_continue_and_continues_to_the_same_bytes(straight_bytes, tmp_path):
    code, rest, stderr = interrupt(tmp_path, STRAIGHT, signal.SIGINT, "[point-robot", 4)
    assert code == 130 and "Traceback" not in stderr
    last = rest.splitlines()[-1]
    assert last.startswith("interrupted") and "same command continues" in last and "policies.pt" in last
    code, stdout, stderr = run_script(tmp_path, "data_collect.py", *flags(STRAIGHT))
    assert code == 0, stderr
    assert "continuing from" in stdout
    assert (tmp_path / STRAIGHT["out"]).read_bytes() == straight_bytes


def test_interrupt_while_rolling_out_gives_no_traceback(tmp_path):
    # Ctrl-C must be answered in one line until the file is written
    settings = STRAIGHT | {"total_updates": 20, "episodes": 4000, "test_episodes": 4000}
    code, rest, stderr = interrupt(tmp_path, settings, signal.SIGINT, "behavior policies ready", 1)
    assert code == 130 and "Traceback" not in stderr and "same command" in rest
    assert not (tmp_path / STRAIGHT["out"]).exists()


# ---- damaged files ----------------------------------------------------------


def replaced(key, change):
    """An edit that replaces one array by change(array)."""
    return lambda arrays, header: arrays.update({key: change(arrays[key].copy())})


def put(key, index, value):
    """An edit that changes one entry."""

    def edit(arrays, header):
        arrays[key][index] = value

    return edit


def header_with(**changes):
    return lambda arrays, header: header.update(changes)


def train_task_without_episode(arrays, header):
    arrays["lengths"][arrays["train_ids"][0]] = 0


DAMAGES = {
    "array missing": lambda arrays, header: arrays.pop("rewards"),
    "ood array missing": lambda arrays, header: arrays.pop("ood_lengths"),
    "header without version": lambda arrays, header: header.pop("format_version"),
    "header without env": lambda arrays, header: header.pop("env"),
    "header without settings": lambda arrays, header: header.pop("settings"),
    "settings of another kind": header_with(settings=[1, 2]),
    "number that JSON lacks in the header": header_with(note=math.nan),
    "other family": header_with(env="ant-dir"),
    "unknown family": header_with(env="moon-lander"),
    "newer format": header_with(format_version=99),
    "older format": header_with(format_version=0),
    "version of another kind": header_with(format_version="one"),
    "version of another type": header_with(format_version=True),
    "wrong observation size": replaced("observations", lambda x: x[..., :1]),
    "horizon too short": replaced("rewards", lambda x: x[..., :10]),
    "too few tasks": replaced("rewards", lambda x: x[:5]),
    "too few foreign contexts": replaced("ood_rewards", lambda x: x[:, :2]),
    "dimension missing": replaced("actions", lambda x: x[0]),
    "dimension too many": replaced("train_ids", lambda x: x[None]),
    # the number of parameters of the family is known too
    "too many task parameters": replaced("task_params", lambda x: np.concatenate([x, x], 1)),
    "single array of no dimension": replaced("lengths", lambda x: np.int32(3)),
    "doubles for floats": replaced("rewards", lambda x: x.astype(np.float64)),
    "integers for bool": replaced("terminated", lambda x: x.astype(np.int32)),
    "text for numbers": replaced("task_params", lambda x: x.astype(str)),
    "pickled objects": replaced("rewards", lambda x: np.array([None, {}], object)),
    "nan in rewards": put("rewards", (0, 0, 0), np.nan),
    "nan in foreign observations": put("ood_observations", (0, 0, 0, 0), np.nan),
    "infinite observation": put("observations", (0, 0, 0, 0), np.inf),
    "infinite expert return": put("expert_returns", 0, -np.inf),
    "task number too large": put("test_ids", 0, 9),
    "task number negative": put("train_ids", 0, -1),
    "task twice": put("train_ids", 0, 1),
    "no training task": replaced("train_ids", lambda x: x[:0]),
    "training task without episode": train_task_without_episode,
    "test task without episode": put("lengths", 2, 0),
    "length above the horizon": put("lengths", (0, 0), 21),
    "negative length": put("lengths", (0, 0), -1),
    "empty foreign episode": put("ood_lengths", (0, 0), 0),
    "action above 1": put("actions", (0, 0, 0, 0), 1.5),
    "foreign action below -1": put("ood_actions", (0, 0, 0, 0), -1.01),
    # evaluate takes the first episodes of each row for the recorded ones
    "empty episode before a recorded one": put("lengths", (2, 0), 0),
    # evaluate averages over the same number of contexts for every test task
    "uneven numbers of foreign contexts": put("ood_behavior_task", (0, 0), dc.RANDOM),
    "context of a task that does not exist": put("ood_behavior_task", (0, 0), 99),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_content_is_refused_in_one_line(tiny_path, tmp_path, damage):
    arrays, header = read(tiny_path)
    DAMAGES[damage](arrays, header)
    path = write(tmp_path / "file.npz", arrays, header)
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert str(path) in message
    remedies = ("python data_collect.py --env point-robot --out", "--env ", "update this repository")
    assert any(remedy in message for remedy in remedies)
    assert len(message) < 300 + 2 * len(str(path))


def raw_file(kind, path, good):
    """Make the damaged file `path` from the bytes of a good one."""
    if kind == "directory":
        path.mkdir()
    elif kind == "single array":  # a .npy under the name of an .npz
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "header missing":
        np.savez(path, rewards=np.zeros(3))
    elif kind == "header no JSON":
        np.savez(path, header=np.array("{not json"))
    elif kind == "header no text":
        np.savez(path, header=np.zeros((2, 2)))
    elif kind == "header a list":
        np.savez(path, header=np.array("[1, 2]"))
    elif kind == "zip of nothing":
        np.savez(path)
    else:
        middle, entry = len(good) // 2, good.index(b"PK\x01\x02")  # first entry of the zip's table of contents
        path.write_bytes(
            {
                "truncated": good[:middle],
                "last bytes missing": good[:-10],
                "first bytes missing": good[100:],
                "empty": b"",
                "text": b"these are not the data you are looking for\n" * 20,
                "zeros": bytes(1000),
                "hole": good[: middle - 200] + bytes(400) + good[middle + 200 :],
                # zipfile answers the next two with NotImplementedError, the last with RuntimeError
                "unknown compression": good[: entry + 10] + b"\x63" + good[entry + 11 :],
                "zip of a later version": good[: entry + 6] + b"\xc8" + good[entry + 7 :],
                "encrypted": good[: entry + 8] + b"\x01" + good[entry + 9 :],
            }[kind]
        )


RAW = ["directory", "single array", "header missing", "header no JSON", "header no text", "header a list"]
RAW += ["zip of nothing", "truncated", "last bytes missing", "first bytes missing", "empty", "text", "zeros", "hole"]
RAW += ["unknown compression", "zip of a later version", "encrypted"]


@pytest.mark.parametrize("kind", RAW)
def test_file_of_another_kind_is_refused_in_one_line(tiny_path, tmp_path, kind):
    path = tmp_path / "file.npz"
    raw_file(kind, path, tiny_path.read_bytes())
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert str(path) in message and f"python data_collect.py --env point-robot --out {path}" in message
    assert "not found" not in message and "emove" in message  # the command alone would stop at the same file


def test_flipped_bits_never_end_in_a_traceback(tiny_path, tmp_path):
    """One changed bit either leaves a readable file or gives one line, wherever it is."""
    good, path, rng = tiny_path.read_bytes(), tmp_path / "file.npz", np.random.default_rng(0)
    directory = good.rindex(b"PK\x05\x06") - 1500  # the zip's table of contents breaks in the most ways
    refused = 0
    for position in [*rng.integers(len(good), size=100), *rng.integers(directory, len(good), size=300)]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << rng.integers(8)]) + good[position + 1 :])
        try:
            dc.load_dataset("point-robot", path)
        except SystemExit as stopped:
            refused += 1
            assert "\n" not in stopped.code and str(path) in stopped.code
    assert refused > 100


def test_missing_file_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = stop_message(dc.load_dataset, "point-robot")
    assert message == "datasets/point-robot.npz not found. Make it: python data_collect.py --env point-robot"
    message = stop_message(dc.load_dataset, "point-robot", "elsewhere/a.npz")
    assert "elsewhere/a.npz not found" in message and "--env point-robot --out elsewhere/a.npz" in message


def test_remedy_for_an_older_format_removes_the_file_first(tiny_path, tmp_path):
    # the command alone would meet the old file and stop with the same line again
    arrays, header = read(tiny_path)
    path = write(tmp_path / "file.npz", arrays, header | {"format_version": 0})
    assert "emove" in stop_message(dc.load_dataset, "point-robot", path)


@pytest.mark.parametrize("kind", ["truncated", "other family"])
def test_bad_file_in_the_way_of_a_collection_gives_one_line_and_stays(tiny_path, tmp_path, kind):
    path = tmp_path / "file.npz"
    path.write_bytes(tiny_path.read_bytes()[: 2000 if kind == "truncated" else None])
    before, env = path.read_bytes(), "point-robot" if kind == "truncated" else "cheetah-dir"
    code, _, stderr = run_script(tmp_path, "data_collect.py", "--env", env, "--out", "file.npz")
    assert code == 1 and "Traceback" not in stderr and path.read_bytes() == before
    assert stderr.count("\n") == 1 and "file.npz" in stderr and "--env point-robot" in stderr


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "directory", "other contents", "list"])
def test_damaged_policies_file_is_refused_in_one_line(tiny_path, tmp_path, kind):
    path = tmp_path / "point-robot.policies.pt"
    good = tiny_path.with_name("point-robot.policies.pt").read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind in ("other contents", "list"):
        torch.save({"settings": {}, "weights": torch.zeros(3)} if kind == "other contents" else [1, 2], path)
    else:
        path.write_bytes({"text": b"hello\n", "empty": b"", "truncated": good[: len(good) // 2]}[kind])
    message = stop_message(dc.collect, dc.Args(env="point-robot", out=str(tmp_path / "file.npz"), **TINY))
    assert str(path) in message and "remove it" in message
    assert not (tmp_path / "file.npz").exists()


POLICIES = {  # one wrong field of a policies file whose training was cut off
    "moments missing": lambda saved: saved["training"]["opts"]["actor_opt"]["state"].pop(0),
    "fewer rows": lambda saved: saved["training"].update(replay_rows=saved["training"]["replay_rows"][:-1]),
    "other rows": lambda saved: saved["training"]["env"]["arrays"].update(steps=torch.zeros(3, dtype=torch.long)),
    "unknown task": lambda saved: saved["training"]["env"]["arrays"]["task_ids"].fill_(99),
    "returns of no row": lambda saved: saved["training"].update(running=torch.zeros(0, dtype=torch.double)),
    "steps beyond the end": lambda saved: saved["training"]["progress"].update(step=1000),
    "snapshot missing": lambda saved: saved["training"]["progress"]["snapshots"].pop(),
    "training of another kind": lambda saved: saved.update(training=True),
    "too many agents": lambda saved: saved.update(finished=[saved["training"]["progress"]["snapshots"]] * 2),
}


@pytest.fixture(scope="module")
def cut_policies(tmp_path_factory):
    """Policies file of a collection with the settings TINY that was cut off at its fifth snapshot."""
    folder = tmp_path_factory.mktemp("cut")
    save = dc.atomic_save

    def counted(path, write):
        save(path, write)
        if path.suffix == ".pt" and len(torch.load(path, weights_only=True)["training"]["progress"]["snapshots"]) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dc, "atomic_save", counted)
        dc.collect(dc.Args(env="point-robot", out=str(folder / "file.npz"), **TINY))
    return folder / "point-robot.policies.pt"


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_with_a_wrong_field_are_refused_in_one_line(cut_policies, tmp_path, kind):
    saved = torch.load(cut_policies, weights_only=True)
    POLICIES[kind](saved)
    torch.save(saved, tmp_path / "point-robot.policies.pt")
    message = stop_message(dc.collect, dc.Args(env="point-robot", out=str(tmp_path / "file.npz"), **TINY))
    assert "damaged: remove it" in message and not (tmp_path / "file.npz").exists()


# ---- the command line -------------------------------------------------------

BAD_COMMANDS = {
    "--foo 1": "--foo",
    "--env moon-lander": "--env",
    "--rows 0": "--rows",
    "--lr -1": "--lr",
    "--out data.txt": "--out",
    "--out a-file/data.npz": "--out",
    "--train-tasks 99": "--train-tasks",
    "--device cuda": "--device",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_command_line_ends_with_a_message_that_names_the_flag(tmp_path, command, monkeypatch, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "a-file").write_text("a file where a folder is expected\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *command.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "data_collect.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert stop.value.code not in (0, None) and shown.out == ""
    assert BAD_COMMANDS[command] in f"{stop.value.code} {shown.err}"
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    "name, value",
    # a comparison with nan is false, and torch takes seeds of 64 bits
    [("lr", math.nan), ("lr", math.inf), ("seed", 10**20), ("seed", -1), ("batch_size", 1), ("ood_contexts", -1)]
    + [(name, 0) for name in ("test_tasks", "episodes", "test_episodes", "total_updates", "updates_per_step", "width")],
)
def test_setting_out_of_range_is_refused_before_anything_is_written(tmp_path, name, value):
    settings = {"total_updates": 20, "rows": 2, "width": 4, "out": str(tmp_path / "new" / "file.npz")} | {name: value}
    message = stop_message(dc.collect, dc.Args(env="point-robot", **settings))
    assert f"--{name.replace('_', '-')} {value}" in message
    assert not (tmp_path / "new").exists()


def test_message_about_a_negative_learning_rate_states_the_true_bound():
    # not "at least 1": the default is 1e-3
    assert "at least 1" not in stop_message(dc.collect, dc.Args(env="point-robot", lr=-1.0))


def test_help_shows_every_field(tmp_path):
    code, stdout, stderr = run_script(tmp_path, "data_collect.py", "--help")
    assert code == 0 and stderr == ""
    for field in dataclasses.fields(dc.Args):
        assert f"--{field.name.replace('_', '-')} " in stdout
    assert "%%" not in stdout  # tyro, unlike argparse, prints both


# ---- sampling ---------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tiny_path):
    """A dataset with episodes of all lengths whose reward is the number of the transition."""
    arrays, header = read(tiny_path)
    rng = np.random.default_rng(0)
    shape = arrays["lengths"].shape
    arrays["lengths"] = rng.integers(0, 21, shape).astype(np.int32)
    arrays["lengths"][:, 3] = 0  # an episode that does not exist, in the middle
    arrays["lengths"][:, 0] = 1
    arrays["terminated"] = rng.random(shape) < 0.5
    arrays["rewards"] = np.arange(arrays["rewards"].size, dtype=np.float32).reshape(arrays["rewards"].shape)
    return dc.Dataset("point-robot", header, arrays, torch.device("cpu"))


def places(data, rows):
    """Numbered transitions -> task, episode, step of each."""
    return np.unravel_index(rows[..., 4].long().numpy(), (*data.lengths.shape, data.family.horizon))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_sample_gives_real_transitions_of_the_task_all_equally_often(numbered):
    tasks = torch.tensor([3, 0, 8])
    size = 200 * int(numbered.counts.max())
    rows = numbered.sample(tasks, size, generator(0))
    assert rows.shape == (3, size, 8)
    task, episode, step = places(numbered, rows)
    assert (task == tasks.numpy()[:, None]).all()
    assert (step < numbered.lengths.numpy()[task, episode]).all()
    for row, asked in enumerate(tasks.tolist()):
        hits = np.bincount(rows[row, :, 4].long().numpy() - asked * 160, minlength=160)
        real = (np.arange(20) < numbered.lengths[asked, :, None].numpy()).ravel()
        expected = size / real.sum()
        assert real.sum() == numbered.counts[asked] and not hits[~real].any()
        assert abs(hits[real] - expected).max() < 6 * np.sqrt(expected)


def test_sampled_rows_are_the_transitions_of_the_file(numbered):
    rows = numbered.sample(torch.arange(9), 50, generator(1))
    task, episode, step = places(numbered, rows)
    assert torch.equal(rows, numbered.episodes[task, episode, step])
    obs, act, _, next_obs, term = numbered.unpack(rows)
    moved = (next_obs - obs) * numbered.obs_spread  # back in the units of the simulation
    torch.testing.assert_close(moved, 0.1 * act, rtol=0, atol=1e-6)
    ended = numbered.episodes[..., 7].sum(-1) > 0
    last = step == numbered.lengths.numpy()[task, episode] - 1
    assert np.array_equal(term.numpy() == 1, last & ended.numpy()[task, episode]) and term.sum() > 0


def test_sample_episode_stays_within_one_real_episode(numbered):
    draws, tasks = 300, torch.tensor([5, 2, 5])
    longest = numbered.lengths[5].argmax().item()
    source, seen, hits = generator(0), {2: [], 5: []}, np.zeros(20)
    for _ in range(draws):
        rows = numbered.sample_episode(tasks, 10, source)
        assert rows.shape == (3, 10, 8)
        task, episode, step = places(numbered, rows)
        assert (task == tasks.numpy()[:, None]).all() and (episode == episode[:, :1]).all()
        assert (step < numbered.lengths.numpy()[task, episode]).all()
        for asked, chosen in zip(tasks.tolist(), episode[:, 0]):
            seen[asked].append(chosen)
        hits += np.bincount(step[(task == 5) & (episode == longest)], minlength=20)
    for asked, chosen in seen.items():  # every episode that exists, equally often
        present = np.flatnonzero(numbered.lengths[asked].numpy())
        counts = np.bincount(chosen, minlength=8)
        expected = len(chosen) / len(present)
        assert np.flatnonzero(counts).tolist() == present.tolist() and 3 not in present
        assert abs(counts[present] - expected).max() < 6 * np.sqrt(expected)
    steps = hits[: numbered.lengths[5].max()]
    assert abs(steps - steps.mean()).max() < 6 * np.sqrt(steps.mean()) and steps.mean() > 20


def test_same_generator_seed_gives_the_same_rows(numbered):
    before = torch.get_rng_state()
    for draw in (numbered.sample, numbered.sample_episode):
        first = draw(torch.tensor([1, 4]), 30, generator(7))
        assert torch.equal(draw(torch.tensor([1, 4]), 30, generator(7)), first)
        assert not torch.equal(draw(torch.tensor([1, 4]), 30, generator(8)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_unpack_takes_rows_apart(walker):
    rows = walker.sample(torch.as_tensor(walker.train_ids), 11, generator(0))
    obs, act, rew, next_obs, term = walker.unpack(rows)
    assert obs.shape == next_obs.shape == (3, 11, 18) and act.shape == (3, 11, 6) and rew.shape == term.shape == (3, 11)
    assert torch.equal(torch.cat([obs, act, rew[..., None], next_obs, term[..., None]], -1), rows)
    assert walker.ctx_dim == rows.shape[-1] - 1 == 43


def test_walker_samples_have_terminal_transitions_where_the_torso_sank(walker):
    rows = walker.sample(torch.as_tensor(walker.train_ids), 2000, generator(0))
    _, _, _, next_obs, term = walker.unpack(rows)
    height = (next_obs * walker.obs_spread + walker.obs_mean)[..., 1]
    assert torch.equal(term == 1, height <= 0.5 + 1e-5) and term.sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_dataset_on_a_gpu_holds_the_same_numbers(tiny_path, tiny):
    data = dc.load_dataset("point-robot", tiny_path, "cuda")
    assert torch.equal(data.episodes.cpu(), tiny.episodes)
    source = torch.Generator("cuda").manual_seed(0)
    rows = data.sample(torch.tensor([0, 3], device="cuda"), 40, source)
    goals = torch.as_tensor(data.task_params[[0, 3]], dtype=torch.float32)[:, None]
    _, _, rew, next_obs, _ = data.unpack(rows.cpu())
    torch.testing.assert_close(rew, -(next_obs - goals).norm(dim=-1))
    assert data.sample_episode(torch.tensor([0, 3], device="cuda"), 9, source).shape == (2, 9, 8)


def test_progress_of_a_kill_is_never_half_a_file(tmp_path):
    path = tmp_path / "x.bin"
    dc.atomic_save(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        dc.atomic_save(path, fail)
    assert path.read_bytes() == b"old"


def test_shipped_datasets_load_and_say_how_they_were_made():
    for env, train_tasks in (("point-robot", 30), ("ant-dir", 20)):
        data = dc.load_dataset(env, ROOT / f"datasets/{env}.npz")
        assert len(data.train_ids) == train_tasks
        assert data.header["command"].startswith(f"python data_collect.py --env {env}")
        assert (data.expert_returns > data.random_returns).all()
