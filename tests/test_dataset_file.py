"""collect and load_dataset: round trip, idempotence, resume after a kill, and what broken input says."""

import io
import json
import signal

import numpy as np
import pytest
import torch

import data_collect as dc
from conftest import TINY, flags, run_script, start_script

TINY_FLAGS = ["--env", "point-robot", *flags(TINY)]


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def refusal(env, path):
    """The message with which load_dataset ends the program."""
    with pytest.raises(SystemExit) as caught:
        dc.load_dataset(env, path)
    return str(caught.value)


def assert_one_clear_line(stderr, *words):
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


# ---- round trip -------------------------------------------------------------


def test_loaded_dataset_equals_the_file(tiny_path, tiny):
    arrays = arrays_of(tiny_path)
    assert arrays["observations"].shape == (9, 8, 21, 2)
    assert (arrays["lengths"][tiny.test_ids] > 0).sum(1).tolist() == [3] * 3
    obs, act, rew, next_obs, term = tiny.unpack(tiny.episodes)
    np.testing.assert_array_equal(obs[0, 0], arrays["observations"][0, 0, :-1])
    np.testing.assert_array_equal(next_obs[0, 0], arrays["observations"][0, 0, 1:])
    np.testing.assert_array_equal(act[0, 0], arrays["actions"][0, 0])
    np.testing.assert_array_equal(rew[0, 0], arrays["rewards"][0, 0])
    assert not term.any()
    assert tiny.behavior_return == pytest.approx(arrays["rewards"][tiny.train_ids].sum(-1).mean(), rel=1e-5)
    assert tiny.header["settings"]["episodes"] == 8
    assert {"numpy", "torch", "mujoco", "gymnasium", "python"} <= set(tiny.header["versions"])


def test_mixed_data_comes_from_all_phases_after_the_first(tiny_path):
    steps = arrays_of(tiny_path)["behavior_step"]
    assert steps[0].tolist() == sorted(steps[0].tolist())
    assert steps[0, 0] == 20 and steps[0, -1] == 200  # 10 % and 100 % of 200 updates


@pytest.mark.parametrize("quality", ["medium", "expert", "medium-expert", "random"])
def test_every_quality_reuses_the_policies(tiny_path, quality):
    out = tiny_path.with_name(f"{quality}.npz")
    before = tiny_path.with_name("point-robot.policies.pt").stat().st_mtime_ns
    dc.collect(dc.Args(env="point-robot", quality=quality, out=str(out), **TINY))
    assert tiny_path.with_name("point-robot.policies.pt").stat().st_mtime_ns == before
    steps = arrays_of(out)["behavior_step"]
    train = dc.load_dataset("point-robot", out).train_ids
    if quality == "random":
        assert (steps[train] == 0).all()
    if quality == "expert":
        assert (steps[train] == 200).all()
    if quality == "medium":
        assert all(len(set(row)) == 1 for row in steps[train].tolist())
    if quality == "medium-expert":
        assert (steps[train, -2:] == 200).all() and (steps[train, :6] == steps[train, :1]).all()


def test_one_policy_per_task(tmp_path):
    settings = TINY | {"train_tasks": 2, "test_tasks": 1, "total_updates": 40, "behavior": "per-task"}
    dc.collect(dc.Args(env="point-robot", out=str(tmp_path / "p.npz"), **settings))
    policies = dc.load_policies(tmp_path / "point-robot.policies.pt")
    assert len(policies["finished"]) == 3
    weights = [snapshots[-1]["net.0.weight"] for snapshots in policies["finished"]]
    assert not torch.equal(weights[0], weights[1])


def test_second_start_does_nothing_and_other_settings_are_refused(tiny_path, capsys):
    before = tiny_path.read_bytes(), tiny_path.stat().st_mtime_ns
    dc.collect(dc.Args(env="point-robot", out=str(tiny_path), **TINY))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made with seed 0, not 1: choose another --out"):
        dc.collect(dc.Args(env="point-robot", out=str(tiny_path), seed=1, **TINY))
    assert (tiny_path.read_bytes(), tiny_path.stat().st_mtime_ns) == before


# ---- interruption -----------------------------------------------------------

LONG = ["--env", "point-robot", *flags(TINY | {"total_updates": 1200})]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_script(folder, "data_collect.py", *LONG)[0] == 0
    return (folder / "datasets/point-robot.npz").read_bytes()


@pytest.mark.parametrize("kind, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_collection_resumes_to_the_same_bytes(undisturbed, tmp_path, kind, code):
    process = start_script(tmp_path, "data_collect.py", *LONG)
    for _ in range(4):
        assert process.stdout.readline().startswith("[point-robot")
    process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "datasets/point-robot.npz").exists()
    if kind == signal.SIGINT:
        assert "the same command continues" in stdout and stderr == ""
    code, stdout, _ = run_script(tmp_path, "data_collect.py", *LONG)
    assert code == 0 and "continuing from" in stdout
    assert (tmp_path / "datasets/point-robot.npz").read_bytes() == undisturbed


# ---- broken files -----------------------------------------------------------


def header_with(arrays, **changes):
    header = json.loads(str(arrays["header"])) | changes
    return arrays | {"header": np.array(json.dumps({k: v for k, v in header.items() if v is not None}))}


def without(arrays, key):
    return {k: v for k, v in arrays.items() if k != key}


def changed(arrays, key, index, value):
    array = arrays[key].copy()
    array[index] = value
    return arrays | {key: array}


BROKEN = {
    "missing key": (lambda a: without(a, "rewards"), "rewards is missing"),
    "missing ood key": (lambda a: without(a, "ood_lengths"), "ood_lengths is missing"),
    "missing header": (lambda a: without(a, "header"), "no header"),
    "header no json": (lambda a: a | {"header": np.array("{")}, "damaged header"),
    "header without version": (lambda a: header_with(a, format_version=None), "damaged header"),
    "newer format": (lambda a: header_with(a, format_version=dc.FORMAT_VERSION + 1), "update this repository"),
    "older format": (lambda a: header_with(a, format_version=0), "format version 0"),
    "wrong family": (lambda a: header_with(a, env="ant-dir"), "--env ant-dir"),
    "wrong shape": (lambda a: a | {"actions": a["actions"][:, :, :-1]}, "actions has shape"),
    "other task count": (lambda a: a | {"task_params": a["task_params"][:-1]}, "task_params has shape"),
    "wrong dimensions": (lambda a: a | {"rewards": a["rewards"][0]}, "rewards has shape"),
    "wrong dtype": (lambda a: a | {"rewards": a["rewards"].astype("float64")}, "type float64"),
    "nan": (lambda a: changed(a, "observations", (0, 0, 0, 0), np.nan), "not finite"),
    "inf": (lambda a: changed(a, "ood_rewards", (0, 0, 0), np.inf), "not finite"),
    "id out of range": (lambda a: changed(a, "test_ids", 0, 99), "test_ids must be distinct"),
    "negative id": (lambda a: changed(a, "train_ids", 0, -1), "train_ids must be distinct"),
    "duplicate ids": (lambda a: changed(a, "train_ids", 1, a["train_ids"][0]), "train_ids must be distinct"),
    "no training tasks": (lambda a: a | {"train_ids": a["train_ids"][:0]}, "train_ids must be distinct"),
    "task without episode": (lambda a: changed(a, "lengths", a["train_ids"][0], 0), "has no episode"),
    "too long": (lambda a: changed(a, "lengths", (0, 0), 21), "between 0 and the horizon"),
    "action out of bounds": (lambda a: changed(a, "actions", (0, 0, 0, 0), 1.5), "must lie in [-1, 1]"),
    "object array": (lambda a: a | {"rewards": np.array([{}, 1], dtype=object)}, "unreadable"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_content_is_refused_in_one_line_with_a_remedy(tiny_path, tmp_path, kind):
    breaking, words = BROKEN[kind]
    path = tmp_path / "broken.npz"
    np.savez_compressed(path, **breaking(arrays_of(tiny_path)), allow_pickle=True)
    with np.load(path, allow_pickle=True) as file:  # savez stores the flag as an array: leave it out
        contents = {k: file[k] for k in file.files if k != "allow_pickle"}
    np.savez_compressed(path, **contents)
    message = refusal("point-robot", path)
    assert words in message and "\n" not in message and str(path) in message
    assert "data_collect.py --env point-robot" in message or "--env ant-dir" in message or "update" in message


def test_broken_bytes_are_refused_in_one_line_with_a_remedy(tiny_path, tmp_path):
    whole = tiny_path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    bad = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n", "flipped": bytes(flipped)}
    for name, content in (bad | {"a bare array": buffer.getvalue()}).items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        message = refusal("point-robot", path)
        assert "data_collect.py --env point-robot" in message and "\n" not in message, name
    assert "data_collect.py --env point-robot" in refusal("point-robot", tmp_path)  # a directory
    assert "not found. Make it: python data_collect.py --env point-robot" in refusal("point-robot", tmp_path / "none.npz")


def test_damaged_policies_are_refused(tmp_path):
    (tmp_path / "point-robot.policies.pt").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="damaged or not a policy file: remove it"):
        dc.collect(dc.Args(env="point-robot", out=str(tmp_path / "p.npz"), **TINY))


def test_policies_with_other_settings_are_refused(tiny_path):
    with pytest.raises(SystemExit, match="policies with other settings"):
        dc.collect(dc.Args(env="point-robot", out=str(tiny_path.with_name("x.npz")), **TINY | {"lr": 1e-4}))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--env", "point-robot", "--row", "3"], "--row"),
        (["--env", "cheetah"], "cheetah"),
        (["--env", "point-robot", "--rows", "0"], "--rows 0"),
        (["--env", "point-robot", "--lr", "-1"], "--lr"),
        (["--env", "point-robot", "--train-tasks", "99"], "--train-tasks 99"),
        (["--env", "point-robot", "--out", "x.txt"], "must end in .npz"),
        (["--env", "point-robot", "--out", "file/x.npz"], "choose another --out"),
        (["--env", "point-robot", "--device", "cuda"], "--device cuda"),
    ],
)
def test_bad_command_line_is_refused_without_traceback(tmp_path, arguments, words):
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").write_text("")
    code, stdout, stderr = run_script(tmp_path, "data_collect.py", *arguments)
    assert code not in (0, None)
    assert_one_clear_line(stdout + stderr, words)


def test_help_shows_every_field(tmp_path):
    code, stdout, _ = run_script(tmp_path, "data_collect.py", "--help")
    assert code == 0
    for name in dc.Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in stdout


# ---- batches ----------------------------------------------------------------


def test_sampled_rows_are_real_transitions_of_their_task(walker):
    generator = torch.Generator().manual_seed(0)
    tasks = torch.as_tensor(walker.train_ids)
    for draw in (walker.sample, walker.sample_episode):
        rows = draw(tasks, 300, generator)
        for task, sampled in zip(tasks, rows):
            valid = torch.arange(200) < walker.lengths[task][:, None]
            real = {tuple(row) for row in walker.episodes[task][valid].tolist()}
            assert {tuple(row) for row in sampled.tolist()} <= real
            if draw == walker.sample:
                assert len({tuple(row) for row in sampled.tolist()}) > 0.3 * min(len(real), 300)
    again = walker.sample(tasks, 300, torch.Generator().manual_seed(0))
    assert torch.equal(again, walker.sample(tasks, 300, torch.Generator().manual_seed(0)))


def test_sampled_episode_is_one_episode(walker):
    task = torch.as_tensor(walker.train_ids[:1])
    rows = walker.sample_episode(task, 50, torch.Generator().manual_seed(1))[0]
    owners = [{tuple(row) for row in episode.tolist()} for episode in walker.episodes[task[0]]]
    assert any({tuple(row) for row in rows.tolist()} <= owner for owner in owners)


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
        data = dc.load_dataset(env, f"{dc.__file__.removesuffix('data_collect.py')}datasets/{env}.npz")
        assert len(data.train_ids) == train_tasks
        assert data.header["command"].startswith(f"python data_collect.py --env {env}")
        assert (data.expert_returns > data.random_returns).all()
