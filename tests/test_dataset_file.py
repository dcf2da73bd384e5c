"""The dataset file (collecting, interrupting, continuing, refusing damaged files), Dataset and evaluate."""

import fcntl
import copy
import dataclasses
import json
import math
import re
import runpy
import shutil
import signal
import statistics
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import (
    NUMBERED_TASKS,
    ROOT,
    TINY,
    OnDevice,
    dataset_on_meta,
    flags,
    origin,
    run_script,
    stop_message,
    task_distance,
)

import data_collect as dc


def read(path):
    """-> arrays of a dataset file, its header apart."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("header")))


def write(path, arrays, header):
    np.savez_compressed(path, **arrays, header=np.array(json.dumps(header)))
    return path


# ---- what a collection writes -----------------------------------------------


def test_file_holds_what_the_layout_says_and_how_it_was_made(tiny_path):
    arrays, header = read(tiny_path)
    sizes = {"T": 9, "N": 8, "H": 20, "H+1": 21, "O": 2, "A": 2, "P": 2, "U": 6, "V": 3, "C": 6}
    assert set(arrays) == set(dc.FILE_LAYOUT)
    for key, (dtype, letters) in dc.FILE_LAYOUT.items():
        assert arrays[key].dtype == dtype and arrays[key].shape == tuple(sizes[n] for n in letters), key
    params, train_ids, test_ids = dc.FAMILIES["point-robot"].draw()  # the first of the family, renumbered
    assert np.array_equal(arrays["task_params"][arrays["train_ids"]], params[train_ids[:6]])
    assert np.array_equal(arrays["task_params"][arrays["test_ids"]], params[test_ids[:3]])
    assert arrays["train_ids"].tolist() == [0, 1, 3, 4, 5, 7] and arrays["test_ids"].tolist() == [2, 6, 8]
    assert header["format_version"] == dc.FORMAT_VERSION and header["env"] == "point-robot"
    settings = dataclasses.asdict(dc.Args(env="point-robot", width=64, **TINY))
    assert header["settings"] == {key: value for key, value in settings.items() if key not in ("out", "device")}
    assert header["versions"]["numpy"] == np.__version__ and header["versions"]["torch"] == torch.__version__
    assert set(header["versions"]) == {"numpy", "torch", "mujoco", "gymnasium", "python"}
    assert header["command"].startswith("python ") and header["diverged_episodes"] == 0
    returns = arrays["rewards"].sum(-1)[arrays["lengths"] > 0]
    assert header["behavior_return"] == pytest.approx(returns.mean(), rel=1e-5)
    np.testing.assert_allclose(arrays["random_returns"], -20.4, atol=1.5)
    assert (arrays["expert_returns"] > arrays["random_returns"]).all()  # 200 updates do teach something


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
    """Collecting without training -> tasks of each training; task_ids, episodes and seeds of each rollout."""
    trained, played, rollout = [], [], dc.rollout

    def train_behavior(family, params, task_ids, *_):
        trained.append(task_ids.tolist())
        return [{"number": torch.tensor(float(number(task_ids[0], phase)))} for phase in range(20)]

    def spy(env, policy, seeds, device):
        assert len(set(seeds)) == len(seeds)
        done = rollout(env, policy, seeds, device)
        played.append((env.task_ids.tolist(), {k: v.copy() for k, v in done.items()}, list(map(int, seeds))))
        return done

    faults = dc.faults

    def faults_but_that_they_are_no_experts(*inputs):
        return (fault for fault in faults(*inputs) if "expert is no better" not in fault)

    monkeypatch.setattr(dc, "faults", faults_but_that_they_are_no_experts)
    monkeypatch.setattr(dc, "BehaviorActor", Telltale)
    monkeypatch.setattr(dc, "train_behavior", train_behavior)
    monkeypatch.setattr(dc, "rollout", spy)
    return trained, played


WINDY = {"env": "point-robot-wind", "train_tasks": 5, "test_tasks": 3, "episodes": 12, "test_episodes": 4}
WINDY |= {"ood_contexts": 4, "total_updates": 400}


def straight_return(act, wind):
    """Of one episode against the wind with the same action at every step."""
    return sum(-math.dist([t * (0.1 * a + w) for a, w in zip(act, wind)], (1, 0)) for t in range(1, 26))


def check_who_played(path, quality, shared):
    """Every episode of a file that Telltales collected: the right snapshot, told the right task, on the right task."""
    arrays, _ = read(path)
    params = arrays["task_params"]

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
        step = 0 if phase is None else 20 * (phase + 1)  # of 400 updates in 20 phases
        assert arrays[prefix + "behavior_step"][where] == step

    medium = []
    for task in range(8):
        group = 0 if shared else task
        told = params[task, 0] / 0.05
        by_mode = straight_return((number(group, 19) + 0.2, told), params[task])
        assert arrays["expert_returns"][task] == pytest.approx(by_mode, abs=1e-3)
        halfway = (arrays["random_returns"][task] + arrays["expert_returns"][task]) / 2
        returns = [straight_return((number(group, phase), told), params[task]) for phase in range(20)]
        medium.append(next((phase for phase in range(20) if returns[phase] >= halfway), 19))
        count = 12 if task < 5 else 4
        phases = {
            "mixed": [1, 3, 4, 6, 8, 9, 11, 12, 14, 16, 17, 19] if task < 5 else [1, 7, 13, 19],
            "medium": [medium[-1]] * count,
            "expert": [19] * count,
            "medium-expert": [medium[-1]] * 8 + [19] * 4 if task < 5 else [medium[-1]] * 3 + [19],
            "random": [None] * count,
        }[quality]
        for n, phase in enumerate(phases):
            check("", (task, n), task, task, phase)
        for key in ("observations", "actions", "rewards", "lengths"):
            assert not arrays[key][task, count:].any()
        assert (arrays["behavior_step"][task, count:] == -1).all()
    assert len(set(medium)) > 2
    # foreign contexts: by the three nearest tasks in order, then by that of the two others which acted less; in turn at
    # 20, 60 and 100 % of the training; then by the random policy
    assert arrays["ood_behavior_task"].tolist() == [[2, 1, 4, 0, -2], [4, 2, 1, 3, -2], [0, 1, 3, 2, -2]]
    for v, task in enumerate(arrays["test_ids"]):
        for c, phase in enumerate([(3, 11, 19)[(v + c) % 3] for c in range(4)] + [None]):
            foreign = arrays["ood_behavior_task"][v, c]
            check("ood_", (v, c), task, foreign, phase)
            distance = -1 if phase is None else math.dist(params[task], params[foreign])
            assert arrays["ood_distance"][v, c] == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize("quality", ["mixed", "medium", "expert", "medium-expert", "random"])
@pytest.mark.parametrize("behavior", ["shared", "per-task"])
def test_file_tells_which_policy_played_which_episode(telltale, tmp_path, quality, behavior):
    trained, played = telltale
    path = tmp_path / "file.npz"
    dc.collect(dc.Args(**WINDY, out=str(path), quality=quality, behavior=behavior))
    assert trained == ([list(range(8))] if behavior == "shared" else [[i] for i in range(8)])
    check_who_played(path, quality, behavior == "shared")
    arrays, _ = read(path)
    for (tasks, done, _), repeats, key in zip(played, (20, 10), ("random_returns", "expert_returns")):
        assert tasks == np.arange(8).repeat(repeats).tolist()
        returns = done["rewards"].sum(1, dtype=np.float64).reshape(8, repeats).mean(1)
        np.testing.assert_allclose(arrays[key], returns, rtol=1e-12)
    acts = played[0][1]["actions"]
    assert -1 <= acts.min() < -0.99 and 0.99 < acts.max() <= 1 and abs(acts.mean()) < 0.05
    assert abs(acts.std() - 1 / math.sqrt(3)) < 0.02


def test_seed_decides_starts_and_actions_of_the_episodes(telltale, tmp_path):
    files = []
    for i, seed in enumerate((0, 0, 1)):
        telltale[1].clear()
        dc.collect(dc.Args(**WINDY, seed=seed, out=str(tmp_path / str(i) / "file.npz")))
        (_, done, starts), *_ = telltale[1]
        files.append((starts, done["rewards"].sum()))
    assert files[0] == files[1] and files[0][0] != files[2][0] and files[0][1] != files[2][1]


@pytest.mark.parametrize("behavior", ["shared", "per-task"])
def test_diverged_episode_is_played_again_by_the_same_policy_and_counted(telltale, tmp_path, monkeypatch, behavior):
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        if len(calls) == 60:  # two of the first episodes that are recorded
            diverged[[2, -1]] = True
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    path = tmp_path / "file.npz"
    dc.collect(dc.Args(**WINDY, out=str(path), behavior=behavior))
    check_who_played(path, "mixed", behavior == "shared")
    assert dc.load_dataset("point-robot-wind", path).header["diverged_episodes"] == 2


def test_medium_is_the_first_phase_halfway_to_the_expert():
    returns = np.linspace(-19, 0, 20)  # of phases 0..19; task 2 learns nothing, task 1 starts above halfway

    def play(phase, task_ids, policy_ids):
        assert task_ids.tolist() == policy_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        mean = np.stack([returns, np.full(20, 50.0), np.full(20, -100.0)])[task_ids, phase]
        return {"rewards": (mean + np.tile([-9.0, 9, 0], 3))[:, None] * np.full(4, 0.25)}

    for quality, tail in (("medium", []), ("medium-expert", [19] * 3)):
        args = dc.Args(quality=quality, episodes=10, test_episodes=10)
        table = dc.choose_phases(args, 3, np.array([2]), np.array([-20.0, 0, 0]), np.array([0.0, 10, 10]), play)
        for row, medium in zip(table, (9, 0, 19)):  # -19 + 9 = -10 is halfway from -20 to 0
            assert row.tolist() == [medium] * (10 - len(tail)) + tail


@pytest.mark.parametrize("name", [name for name in dc.FAMILIES if name != "any-mdp"])
def test_foreign_policies_are_near_and_far_for_every_task_and_none_has_a_phase_of_its_own(name):
    params, train_ids, test_ids = dc.FAMILIES[name].draw()
    foreign, phases = dc.choose_foreign(dc.FAMILIES[name], params, train_ids, test_ids, 5)
    assert foreign.shape == phases.shape == (len(test_ids), 6)
    assert (foreign[:, -1] == dc.RANDOM).all() and (phases[:, -1] == dc.RANDOM).all()
    for task, policies in zip(test_ids, foreign[:, :-1].tolist()):
        others = [i for i in train_ids if i != task]
        assert set(policies) <= set(others) and len(set(policies)) == min(5, len(others))
        distances = np.sort([task_distance(name, params[task], params[i]) for i in others])
        parts = np.array_split(distances, 5) if len(others) > 4 else [distances] * 5  # fifths, from near to far
        for part, policy in zip(parts, policies):
            assert part[0] - 1e-9 <= task_distance(name, params[task], params[policy]) <= part[-1] + 1e-9
    for column in phases[:, :-1].T:  # a third of the tasks each
        assert all(abs((column == phase).sum() - len(test_ids) / 3) < 1 for phase in (3, 11, 19))
    acted = np.array([[(foreign[phases == phase] == i).sum() for i in train_ids] for phase in (3, 11, 19)])
    assert acted.sum() == 5 * len(test_ids) and abs(acted.sum(0) - acted.sum(0).mean()).max() <= 1
    assert abs(acted - acted.mean()).max() < 2


def test_equally_distant_tasks_keep_their_order_whatever_the_rounding(monkeypatch):
    family = dc.FAMILIES["point-robot"]  # every test goal lies midway between two training goals
    exact, distance, rng = dc.choose_foreign(family, *family.draw(), 5), dc.Family.distance, np.random.default_rng(0)
    noisy = lambda _, *tasks: distance(family, *tasks) + rng.uniform(-1e-14, 1e-14, len(tasks[1]))  # noqa: E731
    monkeypatch.setattr(dc.Family, "distance", noisy)
    for one, two in zip(exact, dc.choose_foreign(family, *family.draw(), 5)):
        assert np.array_equal(one, two)


CHEETAHS = {"env": "cheetah-dir", "episodes": 4, "test_episodes": 2, "ood_contexts": 2}


def test_training_tasks_that_are_also_test_tasks_keep_all_their_episodes(telltale, tmp_path):
    path = tmp_path / "cheetah-dir.npz"
    dc.collect(dc.Args(**CHEETAHS, out=str(path)))
    arrays, _ = read(path)
    assert arrays["ood_behavior_task"].tolist() == [[1, 1, dc.RANDOM], [0, 0, dc.RANDOM]]  # never their own policy
    assert (arrays["lengths"] == 200).sum(1).tolist() == [4, 4]


def test_single_training_task_that_is_the_test_task_has_no_foreign_policies(telltale, tmp_path):
    settings = CHEETAHS | {"train_tasks": 1, "test_tasks": 1, "out": str(tmp_path / "cheetah-dir.npz")}
    assert "--ood-contexts 0" in stop_message(dc.collect, dc.Args(**settings)) and not telltale[0]
    dc.collect(dc.Args(**settings | {"ood_contexts": 0}))
    data = dc.load_dataset("cheetah-dir", settings["out"])
    assert data.counts.tolist() == [800] and data.ood_behavior_task.tolist() == [[dc.RANDOM]]
    results = dc.evaluate(data, lambda *_: lambda obs, rew: torch.zeros(len(obs), 6), ("ood", "ood_random"))
    assert {tag.split("/")[1] for tag in results} == {"ood_random"}


@pytest.mark.parametrize("quality", ["mixed", "expert"])
def test_default_path_settings_and_amounts(telltale, tmp_path, monkeypatch, quality):
    monkeypatch.chdir(tmp_path)
    dc.collect(dc.Args(env="point-robot", train_tasks=2, test_tasks=1, quality=quality))
    data = dc.load_dataset("point-robot", None if quality == "mixed" else "datasets/point-robot-expert.npz")
    assert (tmp_path / "datasets" / "point-robot.policies.pt").exists()
    assert (data.header["settings"]["total_updates"], data.header["settings"]["width"]) == (1_500, 64)
    assert (data.lengths > 0).sum(1).tolist() == [50, 50, 20] and data.ood_lengths.shape == (1, 6)


def test_existing_file_is_left_alone(tiny_path, tmp_path, capsys):
    files = [tiny_path, tiny_path.with_name("point-robot.policies.pt")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    dc.collect(dc.Args(env="point-robot", out=str(tiny_path), **TINY))
    assert capsys.readouterr().out == f"{tiny_path} is complete; nothing to do\n"
    for changed in ("seed", "episodes", "lr"):
        message = stop_message(dc.collect, dc.Args(env="point-robot", out=str(tiny_path), **TINY | {changed: 7}))
        assert str(tiny_path) in message and f"{changed} " in message and "--out" in message
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before


OTHER = {"seed": 1, "train_tasks": 5, "test_tasks": 2, "behavior": "per-task", "total_updates": 100, "rows": 32}
OTHER |= {"updates_per_step": 4, "batch_size": 128, "width": 32, "lr": 1e-2}


@pytest.mark.parametrize("name", OTHER)
def test_policies_of_other_settings_are_refused(tiny_path, tmp_path, name):
    shutil.copy(tiny_path.with_name("point-robot.policies.pt"), tmp_path)
    settings = TINY | {"out": str(tmp_path / "other.npz"), name: OTHER[name]}
    message = stop_message(dc.collect, dc.Args(env="point-robot", **settings))
    assert "point-robot.policies.pt" in message and "--out" in message


def test_files_of_other_amounts_and_qualities_share_the_policies(telltale, tmp_path):
    for i, changes in enumerate(
        ({}, {"episodes": 9}, {"test_episodes": 2}, {"ood_contexts": 1}, {"quality": "expert"})
    ):
        dc.collect(dc.Args(**WINDY | changes, out=str(tmp_path / f"{i}.npz")))
    assert telltale[0] == [list(range(8))]  # a single training


# ---- interrupting and continuing --------------------------------------------

# long enough to be caught in the middle
STRAIGHT = {"env": "point-robot", "out": "out/point-robot.npz", "train_tasks": 4, "test_tasks": 2, "width": 32}
STRAIGHT |= {"total_updates": 400, "rows": 16, "updates_per_step": 10, "episodes": 4, "test_episodes": 2}


def progress(printed):
    """The lines of progress of what a collection printed, without the times."""
    return [re.sub(r"eta \S+", "", line) for line in printed.splitlines() if line.startswith("[point-robot ")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of the program -> the bytes of its file, its lines of progress."""
    folder = tmp_path_factory.mktemp("straight")
    code, stdout, stderr = run_script(folder, "data_collect.py", *flags(STRAIGHT))
    assert code == 0 and "wrote out/point-robot.npz" in stdout, stderr
    assert read(folder / STRAIGHT["out"])[1]["command"] == "python data_collect.py " + " ".join(flags(STRAIGHT))
    return (folder / STRAIGHT["out"]).read_bytes(), progress(stdout)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["killed", "Ctrl-C", "Ctrl-C while rolling out"])
def test_interrupted_collection_continues_to_the_same_bytes(how, straight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *flags(STRAIGHT)])  # it is stored in the header
    place, name, count = (dc, "rollout", 3) if "rolling" in how else (dc.SAC, "update", 130)
    original, calls = getattr(place, name), iter(range(10**6))

    def cut(*inputs):
        if next(calls) == count:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return original(*inputs)

    # where tests run in the background, Ctrl-C is ignored at first
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch, pytest.raises(Killed if how == "killed" else SystemExit) as stop:
        patch.setattr(place, name, cut)
        dc.collect(dc.Args(**STRAIGHT))
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    last = capsys.readouterr().out.splitlines()[-1]
    if how != "killed":
        assert last == "interrupted; progress is in out/point-robot.policies.pt, the same command continues"
        assert stop.value.code == 130
    assert not (tmp_path / STRAIGHT["out"]).exists()
    dc.collect(dc.Args(**STRAIGHT))
    printed = capsys.readouterr().out
    assert "continuing from out/point-robot.policies.pt" in printed
    left = {"killed": 14, "Ctrl-C": 13}.get(how, 0)  # of 20 phases
    assert ((tmp_path / STRAIGHT["out"]).read_bytes(), progress(printed)) == (straight[0], straight[1][20 - left :])


def test_policies_per_task_continue_with_the_task_that_was_cut(telltale, tmp_path, monkeypatch):
    trained, _ = telltale
    train_behavior, given = dc.train_behavior, []

    def cut(family, params, task_ids, args, device, saved, save, stopping, label):
        given.append((label, saved))
        if len(given) == 3:
            save({"half": torch.ones(1)})
            signal.raise_signal(signal.SIGTERM)
            return None
        return train_behavior(family, params, task_ids)

    monkeypatch.setattr(dc, "train_behavior", cut)
    args = dc.Args(**WINDY, out=str(tmp_path / "file.npz"), behavior="per-task")
    with pytest.raises(SystemExit) as stop:
        dc.collect(args)
    assert stop.value.code == 128 + signal.SIGTERM
    dc.collect(args)
    assert trained == [[i] for i in range(8)]
    assert [label for label, _ in given] == [f"point-robot-wind task {i}" for i in (0, 1, 2, 2, 3, 4, 5, 6, 7)]
    assert [saved is None for _, saved in given] == [True, True, True, False, True, True, True, True, True]
    check_who_played(tmp_path / "file.npz", "mixed", shared=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_noted_and_the_second_ends_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, dc.note_signals() as noted:
        signal.raise_signal(number)
        assert noted == [number]
        signal.raise_signal(number)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before


def test_a_signal_that_was_ignored_when_the_program_began_stays_so():
    """As nohup has it with SIGHUP, and a shell with SIGINT of programs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with dc.note_signals() as noted:
            signal.raise_signal(signal.SIGHUP)
            assert noted == []
            signal.raise_signal(signal.SIGTERM)
            assert noted == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("quality", ["mixed", "expert"])
def test_one_process_collects_a_family_in_a_folder(tiny_path, quality):
    """Two would write the policies over each other."""
    args = dc.Args(env="point-robot", quality=quality, out=str(tiny_path.with_name("other.npz")), **TINY)
    with open(tiny_path.with_name("point-robot.policies.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is collecting point-robot" in stop_message(dc.collect, args)
    assert not tiny_path.with_name("other.npz").exists()


def test_a_file_that_could_not_be_read_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(dc, "train_behavior", None)
    one = 21 * 4 * 2 + 20 * 4 * (2 + 1)  # bytes of an episode at least: observations, actions, rewards
    episodes = 2**32 // (100 * one)  # of 100 tasks
    message = stop_message(
        dc.collect, dc.Args(env="sparse-point-robot", episodes=episodes, out=str(tmp_path / "x.npz"))
    )
    assert message.startswith(f"--episodes {episodes}: the file would be too large") and not list(tmp_path.iterdir())


def test_a_signal_after_the_last_training_counts(telltale, tmp_path, monkeypatch):
    train_behavior = dc.train_behavior

    def cut(family, params, task_ids, *rest):
        signal.raise_signal(signal.SIGTERM)
        return train_behavior(family, params, task_ids)

    monkeypatch.setattr(dc, "train_behavior", cut)
    args = dc.Args(**WINDY, out=str(tmp_path / "file.npz"))
    with pytest.raises(SystemExit) as stop:
        dc.collect(args)
    assert stop.value.code == 128 + signal.SIGTERM and not (tmp_path / "file.npz").exists()
    monkeypatch.setattr(dc, "train_behavior", None)  # the policies are kept
    dc.collect(args)
    assert (tmp_path / "file.npz").exists()


def test_progress_of_a_kill_is_never_half_a_file(tmp_path):
    path = tmp_path / "x.bin"
    dc.atomic_save(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        dc.atomic_save(path, fail)
    assert path.read_bytes() == b"old"


# ---- damaged files ----------------------------------------------------------


def replaced(key, change):
    """An edit that replaces one array by change(array)."""
    return lambda arrays, header: arrays.update({key: change(arrays[key].copy())})


def put(key, index, value):
    """An edit that changes one entry."""
    return lambda arrays, header: arrays[key].__setitem__(index, value)


def header_with(**changes):
    return lambda arrays, header: header.update(changes)


def as_version_1(arrays, header):
    header["format_version"] = 1
    del arrays["ood_distance"]


# edit of a good file -> a word of the complaint
DAMAGES = {
    "array missing": (lambda arrays, header: arrays.pop("rewards"), "rewards is missing"),
    "ood array missing": (lambda arrays, header: arrays.pop("ood_lengths"), "ood_lengths is missing"),
    "header without version": (lambda arrays, header: header.pop("format_version"), "damaged header"),
    "header without env": (lambda arrays, header: header.pop("env"), "damaged header"),
    "header without settings": (lambda arrays, header: header.pop("settings"), "damaged header"),
    "settings of another kind": (header_with(settings=[1, 2]), "damaged header"),
    "number that JSON lacks in the header": (header_with(note=math.nan), "damaged header"),
    "other family": (header_with(env="ant-dir"), "holds ant-dir, not point-robot"),
    "newer format": (header_with(format_version=99), "update this repository"),
    "older format": (header_with(format_version=0), "format version 0"),
    "file of version 1": (as_version_1, "format version 1, this code reads 2; remove it and make it anew"),
    "version of another kind": (header_with(format_version="one"), "format version one"),
    "version of another type": (header_with(format_version=True), "format version True"),
    "wrong observation size": (replaced("observations", lambda x: x[..., :1]), "observations has shape"),
    "horizon too short": (replaced("rewards", lambda x: x[..., :10]), "rewards has shape"),
    "too few tasks": (replaced("rewards", lambda x: x[:5]), "rewards has shape"),
    "too few foreign contexts": (replaced("ood_rewards", lambda x: x[:, :2]), "ood_rewards has shape"),
    "dimension missing": (replaced("actions", lambda x: x[0]), "actions has shape"),
    "dimension too many": (replaced("train_ids", lambda x: x[None]), "train_ids has shape"),
    # the number of parameters of the family is known too
    "too many task parameters": (replaced("task_params", lambda x: np.concatenate([x, x], 1)), "task_params has"),
    "single array of no dimension": (replaced("lengths", lambda x: np.int32(3)), "lengths has shape"),
    "doubles for floats": (replaced("rewards", lambda x: x.astype(np.float64)), "rewards has type"),
    "integers for bool": (replaced("terminated", lambda x: x.astype(np.int32)), "terminated has type"),
    "text for numbers": (replaced("task_params", lambda x: x.astype(str)), "task_params has type"),
    "pickled objects": (replaced("rewards", lambda x: np.array([None, {}], object)), "unreadable"),
    "nan in rewards": (put("rewards", (0, 0, 0), np.nan), "rewards has values"),
    "nan in foreign observations": (put("ood_observations", (0, 0, 0, 0), np.nan), "ood_observations has values"),
    "infinite expert return": (put("expert_returns", 0, -np.inf), "expert_returns has values"),
    "task number too large": (put("test_ids", 0, 9), "test_ids must be distinct"),
    "task number negative": (put("train_ids", 0, -1), "train_ids must be distinct"),
    "task twice": (put("train_ids", 0, 1), "train_ids must be distinct"),
    "no training task": (replaced("train_ids", lambda x: x[:0]), "train_ids must be distinct"),
    "training task without episode": (put("lengths", 0, 0), "train_ids has no episode"),
    "test task without episode": (put("lengths", 2, 0), "test_ids has no episode"),
    "length above the horizon": (put("lengths", (0, 0), 21), "horizon 20"),
    "negative length": (put("lengths", (0, 0), -1), "horizon 20"),
    "foreign length above the horizon": (put("ood_lengths", (0, 0), 21), "ood_lengths must lie"),
    "empty foreign episode": (put("ood_lengths", (0, 0), 0), "ood_lengths is empty"),
    "action above 1": (put("actions", (0, 0, 0, 0), 1.5), "actions must lie"),
    "foreign action below -1": (put("ood_actions", (0, 0, 0, 0), -1.01), "ood_actions must lie"),
    # evaluate takes the first episodes of each row for the recorded ones
    "empty episode before a recorded one": (put("lengths", (2, 0), 0), "empty episode before"),
    # evaluate averages over the same number of contexts for every test task
    "uneven numbers of foreign contexts": (put("ood_behavior_task", (0, 0), dc.RANDOM), "same number of random"),
    "context of a task that does not exist": (put("ood_behavior_task", (0, 0), 99), "ood_behavior_task must be"),
    "distance of no task": (put("ood_distance", (0, 0), 0.5), "ood_distance does not agree"),
    "distance of the random policy": (put("ood_distance", (1, -1), 0.0), "ood_distance does not agree"),
    "distances of other test tasks": (replaced("ood_distance", lambda x: x[::-1]), "ood_distance does not agree"),
    "context of another task": (put("ood_behavior_task", (0, 0), 7), "ood_distance does not agree"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_content_is_refused_in_one_line(tiny_path, tmp_path, damage):
    arrays, header = read(tiny_path)
    edit, complaint = DAMAGES[damage]
    edit(arrays, header)
    path = write(tmp_path / "file.npz", arrays, header)
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert str(path) in message and complaint in message and len(message) < 300 + 2 * len(str(path))
    if "repository" not in complaint and "holds" not in complaint:  # the command alone would stop at the same file
        assert "emove it" in message and f"python data_collect.py --env point-robot --out {path}" in message


RAW = {"empty": lambda good: b"", "text": lambda good: b"hello\n" * 200, "truncated": lambda good: good[:5000]}
ARRAYS = {"header missing": {"rewards": np.zeros(3)}, "header no JSON": {"header": np.array("{not json")}}
ARRAYS |= {"header no text": {"header": np.zeros((2, 2))}, "header a list": {"header": np.array("[1, 2]")}}


@pytest.mark.parametrize("name", ["datasets", "README.md", "no_such_file"])
def test_what_is_named_like_no_dataset_is_not_to_be_removed(name):
    message = stop_message(dc.load_dataset, "point-robot", ROOT / name)
    assert str(ROOT / name) in message and ".npz" in message and "emove" not in message


@pytest.mark.parametrize("kind", ["directory", "single array", "zip of nothing", *ARRAYS, *RAW])
def test_file_of_another_kind_is_refused_in_one_line(tiny_path, tmp_path, kind):
    path = tmp_path / "file.npz"
    if kind == "directory":
        path.mkdir()
    elif kind == "single array":  # a .npy under the name of an .npz
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind in RAW:
        path.write_bytes(RAW[kind](tiny_path.read_bytes()))
    else:
        np.savez(path, **ARRAYS.get(kind, {}))
    message = stop_message(dc.load_dataset, "point-robot", path)
    assert str(path) in message and f"python data_collect.py --env point-robot --out {path}" in message
    assert "not found" not in message and "emove" in message


def test_flipped_bits_never_end_in_a_traceback(tiny_path, tmp_path):
    """One changed bit either leaves a readable file or gives one line, wherever it is."""
    good, path, rng = tiny_path.read_bytes(), tmp_path / "file.npz", np.random.default_rng(0)
    directory = good.rindex(b"PK\x05\x06") - 1500  # the zip's table of contents breaks in the most ways
    refused = 0
    for position in [*rng.integers(len(good), size=50), *rng.integers(directory, len(good), size=150)]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << rng.integers(8)]) + good[position + 1 :])
        try:
            dc.load_dataset("point-robot", path)
        except SystemExit as stopped:
            refused += 1
            assert "\n" not in stopped.code and str(path) in stopped.code
    assert refused > 50


def test_missing_file_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = stop_message(dc.load_dataset, "point-robot")
    assert message == "datasets/point-robot.npz not found. Make it: python data_collect.py --env point-robot"
    message = stop_message(dc.load_dataset, "point-robot", "elsewhere/a.npz")
    assert "elsewhere/a.npz not found" in message and "--env point-robot --out elsewhere/a.npz" in message
    message = stop_message(dc.load_dataset, "point-robot", "datasets/point-robot-medium-expert.npz")
    assert message.endswith("Make it: python data_collect.py --env point-robot --quality medium-expert")
    message = stop_message(dc.load_dataset, "point-robot", "elsewhere/point-robot-random.npz")
    assert message.endswith("--quality random --out elsewhere/point-robot-random.npz")


@pytest.mark.parametrize("kind", ["truncated", "directory", "other contents"])
def test_damaged_policies_file_is_refused_in_one_line(tiny_path, tmp_path, kind):
    path = tmp_path / "point-robot.policies.pt"
    good = tiny_path.with_name("point-robot.policies.pt").read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind == "other contents":
        torch.save({"settings": {}, "weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(good[: len(good) // 2])
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


def program(monkeypatch, *words):
    """Run data_collect.py as a program -> what it ends with."""
    monkeypatch.setattr(sys, "argv", ["data_collect.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "data_collect.py"), run_name="__main__")
    return stop.value.code


BAD_COMMANDS = ["--foo 1", "--env moon-lander", "--rows 0", "--lr -1", "--out data.txt", "--out a-file/data.npz"]
BAD_COMMANDS += ["--train-tasks 99", "--test-tasks 99", "--device cuda", "--out old.npz", "--env cheetah-dir --out old"]


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_command_line_ends_with_a_message_that_names_the_flag(tiny_path, tmp_path, command, monkeypatch, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "a-file").write_text("a file where a folder is expected\n")
    (tmp_path / "old.npz").write_bytes(tiny_path.read_bytes()[:2000])
    monkeypatch.chdir(tmp_path)
    code = program(monkeypatch, *command.split())
    shown = capsys.readouterr()
    assert code not in (0, None) and shown.out == "" and "Traceback" not in shown.err
    assert command.split()[-2] in f"{code} {shown.err}"
    assert (tmp_path / "old.npz").stat().st_size == 2000 and len(list(tmp_path.rglob("*.npz"))) == 1


@pytest.mark.parametrize(
    "name, value",
    # a comparison with nan is false, and torch takes seeds of 64 bits
    [("lr", math.nan), ("lr", math.inf), ("seed", 10**20), ("seed", -1), ("batch_size", 1), ("ood_contexts", -1)]
    + [(name, 0) for name in ("test_tasks", "episodes", "test_episodes", "total_updates", "updates_per_step", "width")],
)
def test_setting_out_of_range_is_refused_before_anything_is_written(tmp_path, name, value):
    settings = {"total_updates": 20, "rows": 2, "width": 4, "out": str(tmp_path / "new" / "file.npz")} | {name: value}
    message = stop_message(dc.collect, dc.Args(env="point-robot", **settings))
    assert f"--{name.replace('_', '-')} {value}" in message and "at least 1" not in message
    assert not (tmp_path / "new").exists()


def test_help_shows_every_field(monkeypatch, capsys):
    assert program(monkeypatch, "--help") in (0, None)
    shown = capsys.readouterr().out
    for field in dataclasses.fields(dc.Args):
        assert f"--{field.name.replace('_', '-')} " in shown
    assert "%%" not in shown  # tyro, unlike argparse, prints both


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
        for key in ("observations", "actions", "rewards", "lengths"):
            arrays[key][task, episodes:] = 0
        arrays["terminated"][task, episodes:] = False
        arrays["behavior_step"][task, episodes:] = dc.NO_EPISODE
    arrays["lengths"][5, 0], arrays["rewards"][5, 0, 1:] = 1, 0
    arrays["random_returns"] -= np.arange(NUMBERED_TASKS)
    arrays["expert_returns"] += np.arange(NUMBERED_TASKS) / 2
    arrays["ood_behavior_task"][0] = [dc.RANDOM, 1, 3, 5]
    goals = arrays["task_params"]
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
    assert (data.obs_dim, data.act_dim, data.ctx_dim, data.env, data.min_episodes) == (2, 2, 7, "point-robot", 2)
    for key in ("task_params", "train_ids", "test_ids", "random_returns", "expert_returns"):
        assert np.array_equal(getattr(data, key), arrays[key]), key
    for key in ("ood_behavior_task", "ood_distance"):
        assert np.array_equal(getattr(data, key), arrays[key]) and data.ood_lengths.shape == arrays[key].shape, key
    assert np.array_equal(data.lengths, arrays["lengths"]) and np.array_equal(data.ood_lengths, arrays["ood_lengths"])
    assert data.train_tasks.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.counts.tolist() == [len(recorded(arrays, [task])) for task in range(NUMBERED_TASKS)]
    rewards = np.array([arrays["rewards"][where] for where in recorded(arrays, range(6))], np.float64)
    assert data.reward_spread == pytest.approx(rewards.std(), rel=1e-6)
    np.testing.assert_allclose(data.episode_returns, arrays["rewards"].astype(np.float64).sum(-1), rtol=1e-12)
    returns = [arrays["rewards"][t, n].sum(dtype=np.float64) for t, n, s in recorded(arrays, range(6)) if s == 0]
    assert data.behavior_return == pytest.approx(np.mean(returns), rel=1e-9)
    assert data.return_spread == pytest.approx(np.std(returns), rel=1e-9)


@pytest.mark.parametrize("prefix", ["", "ood_"])
def test_rows_are_the_transitions_of_the_file(uneven, prefix):
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
    assert data.standardize(torch.tensor([1e9, -1e9])).tolist() == [10, -10] and rows[..., -1].sum() > 3
    if prefix == "":
        assert rows[7, 0, 2, :2].tolist() == rows[7, 0, 1, 5:7].tolist() == [10, 10]


def test_constant_observations_and_returns_leave_finite_numbers(tiny_path, tmp_path):
    arrays, header = read(tiny_path)
    arrays["observations"][..., 1], arrays["rewards"][:] = 0.25, -1
    data = dc.load_dataset("point-robot", write(tmp_path / "file.npz", arrays, header))
    assert data.unpack(data.episodes).obs[..., 1].abs().max() < 1e-3 and data.episodes.isfinite().all()
    assert data.reward_spread == data.return_spread == 1


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_even(hits, expected_places):
    """hits: places drawn; all and only the expected ones, each about equally often."""
    places, counts = np.unique(hits.numpy(), axis=0, return_counts=True)
    assert {tuple(np.ravel(place)) for place in places.tolist()} == {tuple(np.ravel(p)) for p in expected_places}
    expected = len(hits) / len(expected_places)
    assert abs(counts - expected).max() < 6 * math.sqrt(expected) and expected > 50


def test_sample_draws_all_transitions_of_the_tasks_equally_often(uneven):
    data, arrays = uneven
    tasks = torch.tensor([3, 0, 7, 3])
    rows = data.sample(tasks, 100 * int(data.counts.max()), generator(0))
    places = torch.stack(origin(rows[..., 4]), -1)
    for task, row in zip(tasks.tolist(), places):
        assert_even(row, recorded(arrays, [task]))
    assert not torch.equal(places[0], places[3])
    assert torch.equal(rows[:, :50], data.episodes[places[:, :50].unbind(-1)])
    batch = data.sample_batch(tasks, 100 * int(data.counts.max()), generator(0))
    parts = torch.split(rows, [2, 2, 1, 2, 1], -1)
    expected = dc.Batch(parts[0], parts[1], parts[2][..., 0], parts[3], parts[4][..., 0])
    assert all(map(torch.equal, batch, expected)) and 0 < batch.term.mean() < 1


@pytest.mark.parametrize("share", [1.0, 0.5, 1e-6])
def test_share_of_the_transitions_is_that_of_the_best_episodes(uneven, share):
    data, arrays = uneven
    tasks, size = torch.tensor([3, 0, 7]), 100 * int(data.counts.max())
    rows = data.sample(tasks, size, generator(0), share)
    for task, row in zip(tasks.tolist(), rows):
        best_first = sorted(recorded(arrays, [task]), key=lambda place: -arrays["rewards"][place[:2]].sum())
        count = max(share * len(best_first), 1)  # 22, 17.5 and 7 of task 0, 3 and 7 for the half
        places = torch.stack(origin(row[:, 4]), -1)
        hits = np.array([(places == torch.tensor(place)).all(-1).sum() for place in best_first])
        expected = size * (count - np.arange(len(hits))).clip(0, 1) / count  # of the 18th half as often
        assert (hits[expected == 0] == 0).all() and (abs(hits - expected) <= 6 * np.sqrt(expected)).all()
    batch = data.sample_batch(tasks, size, generator(0), share)
    assert torch.equal(batch.rew, rows[..., 4]) and torch.equal(batch.obs, rows[..., :2])


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_segment_is_the_transitions_from_a_start_to_the_end_of_its_episode(uneven, steps):
    data, arrays = uneven
    tasks, gamma = torch.tensor([8, 5, 0, 3, 8]), 0.9
    segment = data.sample_segments(tasks, 1500, steps, gamma, generator(0))
    assert segment.obs.shape == segment.next_obs.shape == (5, 1500, steps, 2) and segment.bootstrap.shape == (5, 1500)
    assert torch.equal(segment.rew[..., 0], data.sample_batch(tasks, 1500, generator(0)).rew)  # starts are as there
    starts = torch.stack(origin(segment.rew[..., 0]), -1)
    assert all(set(map(tuple, s.tolist())) == set(recorded(arrays, [t])) for t, s in zip(tasks.tolist(), starts))
    kinds = set()
    for place in {tuple(place) for place in starts.flatten(0, 1).tolist()}:
        task, n, first = place
        length, terminated = int(arrays["lengths"][task, n]), bool(arrays["terminated"][task, n])
        real = min(steps, length - first)
        obs, act, rew, next_obs, term = data.unpack(data.episodes[task, n, first : first + real])
        assert term[-1] == (terminated and first + real == length)
        drawn = [part[(starts == torch.tensor(place)).all(-1)] for part in segment]
        for part, path in zip(drawn, (obs, act, rew, next_obs)):
            path = torch.cat([path, path[-1:].repeat_interleave(steps - real, 0)])
            assert torch.equal(part, path.expand_as(part))
        weight = torch.tensor([gamma**k for k in range(real)] + [0.0] * (steps - real))
        torch.testing.assert_close(drawn[4], weight.expand_as(drawn[4]))
        bootstrap = torch.tensor(0.0 if term[-1] else gamma**real)
        torch.testing.assert_close(drawn[5], bootstrap.expand_as(drawn[5]))
        kinds.add((real == steps, first + real == length, terminated))
    assert {(False, True, True), (False, True, False)} <= kinds or steps == 1  # an early end, terminated or not
    assert steps == 30 or {(True, False, False), (True, True, True), (True, True, False)} <= kinds


def test_sample_context_draws_one_episode_per_task_and_its_steps_with_replacement(uneven):
    data, arrays = uneven
    tasks = torch.tensor([5, 1, 6]).repeat(2000)
    context = data.sample_context(tasks, 9, generator(0))
    task, episode, step = origin(context[..., 4])
    assert context.shape == (6000, 9, 7) and torch.equal(context, data.episodes[task, episode, step, :-1])
    assert (task == tasks[:, None]).all() and (episode == episode[:, :1]).all()
    for asked, present in ((5, 4), (1, 2), (6, 3)):
        assert_even(episode[tasks == asked, 0], range(present))
        for n in range(present):
            steps = step[(tasks == asked) & (episode[:, 0] == n)].flatten()
            assert_even(steps, range(arrays["lengths"][asked, n]))
    other = torch.arange(NUMBERED_TASKS * 4 * 20 * 3).view(NUMBERED_TASKS, 4, 20, 3)
    cut = data.sample_context(tasks, 9, generator(0), other)
    assert torch.equal(cut, other[task, episode, step])


def test_sample_tasks_draws_training_tasks_with_replacement(tiny):
    drawn = tiny.sample_tasks(3000, generator(0))
    assert_even(drawn, tiny.train_ids.tolist())


def test_only_the_generator_decides_what_is_drawn(uneven):
    data, _ = uneven
    before = torch.get_rng_state()
    segments = lambda tasks, size, g: data.sample_segments(tasks, size, 2, 0.9, g).rew  # noqa: E731
    for draw in (data.sample, segments, data.sample_context, lambda tasks, size, g: data.sample_tasks(size, g)):
        first, again, other = (draw(torch.tensor([1, 4]), 30, generator(seed)) for seed in (7, 7, 8))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_drawing_stays_on_the_device(uneven):
    data = dataset_on_meta(uneven[0])
    with OnDevice():
        tasks = data.sample_tasks(5, None)
        assert data.sample(tasks, 7, None).shape == (5, 7, 8)
        assert data.sample_batch(tasks, 7, None, 0.25).rew.shape == (5, 7)
        segment = data.sample_segments(tasks, 7, 3, 0.9, None)
        assert segment.weight.shape == (5, 7, 3) and segment.bootstrap.shape == (5, 7)
        assert data.sample_context(tasks, 7, None).shape == (5, 7, 7)
        assert data.standardize(torch.zeros(3, 2, device="meta")).shape == (3, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_dataset_on_a_gpu_holds_the_same_numbers(numbered_path, numbered):
    data = dc.load_dataset("point-robot", numbered_path, "cuda")
    assert torch.equal(data.episodes.cpu(), numbered.episodes) and torch.equal(data.valid.cpu(), numbered.valid)
    rows = data.sample(torch.tensor([0, 3], device="cuda"), 40, torch.Generator("cuda").manual_seed(0)).cpu()
    assert torch.equal(rows, numbered.episodes[origin(rows[..., 4])])


def test_half_precision_is_read_as_single(numbered_path, numbered, tmp_path):
    with np.load(numbered_path) as file:
        arrays = dict(file)
    for key in ("observations", "actions", "ood_observations", "ood_actions"):
        arrays[key] = arrays[key].astype(np.float16)
    np.savez(tmp_path / "point-robot.npz", **arrays)
    data = dc.load_dataset("point-robot", tmp_path / "point-robot.npz")
    assert data.episodes.dtype == data.ood_episodes.dtype == torch.float32
    for found, exact in ((data.episodes, numbered.episodes), (data.ood_episodes, numbered.ood_episodes)):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-3)
        assert not torch.equal(found, exact)
    arrays["rewards"] = arrays["rewards"].astype(np.float16)
    np.savez(tmp_path / "point-robot.npz", **arrays)
    assert "rewards has type float16" in stop_message(dc.load_dataset, "point-robot", tmp_path / "point-robot.npz")


def test_a_member_that_is_no_array_is_refused(numbered_path, tmp_path):
    path = tmp_path / "point-robot.npz"
    with zipfile.ZipFile(numbered_path) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"no array" if name == "observations.npy" else old.read(name))
    assert "observations is missing" in stop_message(dc.load_dataset, "point-robot", path)


def test_bodies_are_kept_in_half_precision_and_points_in_single(walker_path, tiny_path):
    for path, dtype in ((walker_path, np.float16), (tiny_path, np.float32)):
        with np.load(path) as file:
            kept = {file[key].dtype for key in ("observations", "actions", "ood_observations", "ood_actions")}
            assert kept == {np.dtype(dtype)} and file["rewards"].dtype == np.float32


# ---- evaluate ---------------------------------------------------------------


class Watched:
    """One evaluation under one protocol, by policies that move row r and round k always by the same action."""

    def __init__(self, monkeypatch, data, protocol, episodes=3):
        self.given, self.played, self.trace, rollout = [], [], [], dc.rollout

        def adapt(context, mask, explore):
            self.given.append((context.clone(), mask.clone(), explore))
            act, seen = self.acts(len(context), len(self.given) - 1), []
            self.policy_inputs = seen
            return lambda obs, rew: seen.append((obs.clone(), rew.clone())) or act

        def spy(env, policy, seeds, device):
            self.played.append((env.task_ids.tolist(), seeds))
            return rollout(env, policy, seeds, device)

        with monkeypatch.context() as patch:
            patch.setattr(dc, "rollout", spy)
            self.results = dc.evaluate(data, adapt, (protocol,), episodes, self.trace)

    def acts(self, rows, k):
        act = 0.05 * k + 0.5 * torch.arange(1.0, rows + 1) / rows
        return torch.stack([act, 0.5 - act], 1)

    def returns(self, data, k=0):
        """What row by row should come out in round k, on the tasks of the rows."""
        tasks = self.played[k][0]
        goals, acts = data.task_params[tasks].tolist(), self.acts(len(tasks), k).tolist()
        return [
            sum(-math.dist((0.1 * t * x, 0.1 * t * y), goal) for t in range(1, 21)) for (x, y), goal in zip(acts, goals)
        ]


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
    if "online" in protocol:
        expected |= {
            f"eval/{protocol}/return_ep_{k + 1}": np.mean(watched.returns(data, k)) for k in range(len(watched.played))
        }
    if protocol == "np_online":  # the first is no policy's
        expected["eval/np_online/return_ep_1"] = watched.first.mean()
    assert watched.results == pytest.approx(expected, abs=1e-3)
    assert all(isinstance(value, float) for value in watched.results.values())


@pytest.mark.parametrize("protocol, tasks", [("iid", [6, 7, 8]), ("train", [0, 1, 2, 3, 4, 5])])
def test_context_is_one_recorded_episode_of_the_rows_task(uneven, monkeypatch, protocol, tasks):
    data, arrays = uneven
    watched = Watched(monkeypatch, data, protocol, 40)
    ((context, mask, explore),) = watched.given
    row_tasks = [task for task in tasks for _ in range(40)]
    seeds = [10_000 + 97 * task + episode for task in tasks for episode in range(40)]
    assert watched.played == [(row_tasks, seeds)] and explore is False
    for row, task in enumerate(row_tasks):  # all recorded episodes in an order of the task's own, over and over
        order = np.random.default_rng(10_000 + task).permutation((arrays["lengths"][task] > 0).sum())
        n = order[row % 40 % len(order)]
        assert torch.equal(context[row], data.episodes[task, n, :, :-1])
        assert mask[row].tolist() == [float(step < arrays["lengths"][task, n]) for step in range(20)]
    check_results(watched, data, protocol, tasks, watched.returns(data))


@pytest.mark.parametrize("episodes", [7, 2])
@pytest.mark.parametrize("protocol, columns", [("ood", [[1, 2, 3], *[[0, 1, 2]] * 2]), ("ood_random", [[0], [3], [3]])])
def test_foreign_contexts_are_those_of_the_test_task_in_turn(uneven, monkeypatch, protocol, columns, episodes):
    data, arrays = uneven
    watched = Watched(monkeypatch, data, protocol, episodes)
    ((context, mask, explore),) = watched.given
    # each task begins with another column
    places = [(v, columns[v][(v + i) % len(columns[v])]) for v in range(3) for i in range(episodes)]
    row_tasks = [6 + v for v, _ in places]
    seeds = [10_000 + 97 * (6 + v) + i for v in range(3) for i in range(episodes)]
    assert watched.played == [(row_tasks, seeds)] and explore is False
    for row, place in enumerate(places):
        assert torch.equal(context[row], data.ood_episodes[place][:, :-1])
        length = arrays["ood_lengths"][place]
        assert mask[row].tolist() == [1.0] * length + [0.0] * (20 - length)
        foreign, _, _ = origin(context[row, :length, 4])
        assert (context[row, 1:length, 4] < 0).all() and (foreign == row_tasks[row]).all()
    goals = arrays["task_params"]
    policies = [arrays["ood_behavior_task"][place] for place in places]
    distances = [math.dist(goals[task], goals[i]) for task, i in zip(row_tasks, policies)] if protocol == "ood" else ()
    check_results(watched, data, protocol, [6, 7, 8], watched.returns(data), distances)


def test_single_row_has_no_standard_error_and_foreign_policies_equally_far_are_all_near(uneven):
    data = copy.copy(uneven[0])
    data.ood_distance = np.where(data.ood_behavior_task == dc.RANDOM, -1, 2.0)

    def tags(episodes):
        results = dc.evaluate(data, lambda *_: lambda obs, rew: torch.ones(len(obs), 2), dc.PROTOCOLS[:-1], episodes)
        assert all(map(math.isfinite, results.values()))
        assert results["eval/ood/normalized"] == results["eval/ood/normalized_near"]
        return {tag.split("/")[2] for tag in results if "_task_" not in tag and "_ep_" not in tag}

    assert tags(1) == {"return", "return_se", "normalized", "normalized_near"}
    for name in ("test_ids", "ood_behavior_task", "ood_distance", "ood_episodes", "ood_lengths"):
        setattr(data, name, getattr(data, name)[1:2])
    assert tags(2) == {"return", "return_se", "normalized", "normalized_near"}
    assert tags(1) == {"return", "normalized", "normalized_near"}


@pytest.mark.parametrize("protocol, more", [("online", 5), ("np_online", 0)])
def test_online_context_grows_by_the_rows_own_episodes(protocol, more, uneven, monkeypatch):
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
            if protocol == "np_online" and past == 0:
                act, watched.first = own[..., 2:4], own[..., 4].sum(1)
                assert act.min() < -0.95 and act.max() > 0.95 and abs(act.mean()) < 0.1  # uniform, anew at every step
                assert abs(act.std() - 1 / math.sqrt(3)) < 0.05 and len(np.unique(act)) == act.size
            position = 0.1 * np.concatenate([0 * act[:, :1], act.cumsum(1)], 1)
            np.testing.assert_allclose(own[..., :2], as_seen(arrays, position[:, :-1]), atol=1e-4)
            np.testing.assert_allclose(own[..., 2:4], act, atol=1e-6)
            distance = np.linalg.norm(position[:, 1:] - goals[:, None], axis=-1)
            np.testing.assert_allclose(own[..., 4], -distance, atol=1e-5)
            np.testing.assert_allclose(own[..., 5:], as_seen(arrays, position[:, 1:]), atol=1e-4)
    check_results(watched, data, protocol, [6, 7, 8], watched.returns(data, 4))
    (done,) = watched.trace
    np.testing.assert_allclose(done["rewards"].sum(1), watched.returns(data, 4), atol=1e-3)
    assert torch.equal(done["context"], watched.given[4][0]) and torch.equal(done["mask"], watched.given[4][1])


def test_online_mask_covers_episodes_of_different_length(walker):
    given = []

    def adapt(context, mask, explore):
        given.append((context, mask))
        return lambda obs, rew: torch.sin(7 * obs[:, :6])

    dc.evaluate(walker, adapt, ("online",))
    context, mask = (x.reshape(4, 9, 200, *x.shape[2:]) for x in given[-1])  # [tasks x episodes, rounds before]
    lengths = mask.sum(-1, keepdim=True)
    assert torch.equal(mask, (torch.arange(200) < lengths).float()) and 1 < lengths.min() < lengths.max()
    assert torch.equal(mask, (context[..., 24] != 0).float())  # rewards of real transitions


def test_zero_shot_has_no_context_and_policies_see_the_data_as_in_training(uneven, monkeypatch):
    data, arrays = uneven
    watched = Watched(monkeypatch, data, "zero_shot")
    ((context, mask, explore),) = watched.given
    assert context.shape == (9, 0, 7) and mask.shape == (9, 0) and explore is False
    seeds = [10_000 + 97 * task + episode for task in (6, 7, 8) for episode in range(3)]
    assert watched.played == [([6, 6, 6, 7, 7, 7, 8, 8, 8], seeds)]
    check_results(watched, data, "zero_shot", [6, 7, 8], watched.returns(data))
    (done,) = watched.trace
    assert done["rewards"].sum(1) == pytest.approx(np.array(watched.returns(data)), abs=1e-3)
    assert torch.equal(done["context"], context) and torch.equal(done["mask"], mask)
    for t, (obs, rew) in enumerate(watched.policy_inputs):
        np.testing.assert_allclose(obs, as_seen(arrays, 0.1 * t * watched.acts(9, 0).numpy()), atol=1e-4)
        np.testing.assert_allclose(done["observations"][:, t], obs, atol=1e-6)
        assert np.array_equal(rew, done["rewards"][:, t - 1] if t else np.zeros(9))


def test_evaluation_is_the_same_at_every_call_whatever_the_global_generators(tiny, walker):
    def adapt(context, mask, explore):
        return lambda obs, rew: torch.sin(3 * obs.repeat(1, 3))[:, : 2 if obs.shape[1] == 2 else 6]

    for data, protocols in ((tiny, dc.PROTOCOLS), (walker, ("iid", "zero_shot"))):
        results = []
        for seed in (1, 2):
            np.random.seed(seed), torch.manual_seed(seed)
            before = np.random.get_state()[1].copy(), torch.get_rng_state()
            results.append(dc.evaluate(data, adapt, protocols))
            assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])
        assert results[0] == results[1] and {tag.split("/")[1] for tag in results[0]} == set(protocols)
    # contexts decide nothing but adapt's answer: the same episodes are played
    assert results[0]["eval/iid/return"] == results[0]["eval/zero_shot/return"]


def test_train_takes_ten_tasks_of_the_shipped_file_and_diverged_episodes_are_counted(monkeypatch):
    for env, tasks in (("ant-dir", 20), ("cheetah-vel", 20), ("sparse-point-robot", 80), ("point-robot-wind", 40)):
        assert len(dc.load_dataset(env, ROOT / f"datasets/{env}.npz").train_ids) == tasks
    data = dc.load_dataset("point-robot", ROOT / "datasets/point-robot.npz")
    assert len(data.train_ids) == 30 and data.header["command"].startswith("python data_collect.py --env point-robot")
    goals = data.task_params[data.train_ids[:10]]

    def adapt(context, mask, explore):  # the best policy moves straight to the goal, axis by axis
        target = torch.as_tensor(goals, dtype=torch.float32)
        return lambda obs, rew: ((target - (obs * data.obs_spread + data.obs_mean)) / 0.1).clamp(-1, 1)

    results = dc.evaluate(data, adapt, ("train",), episodes=1)
    best = []
    for goal in goals.tolist():
        position, total = [0.0, 0.0], 0.0
        for _ in range(20):
            position = [p + max(-0.1, min(0.1, g - p)) for p, g in zip(position, goal)]
            total -= math.dist(position, goal)
        best.append(total)
    tags = [f"eval/train/return_task_{task:02d}" for task in data.train_ids[:10]]
    assert [results[tag] for tag in tags] == pytest.approx(best, abs=1e-4)
    assert set(results) == {"eval/train/return", "eval/train/return_se", "eval/train/normalized", *tags}
    simulate = dc.TaskEnv._simulate
    monkeypatch.setattr(dc.TaskEnv, "_simulate", lambda env, *x: (simulate(env, *x)[0], np.arange(len(x[0])) > 6))
    assert dc.evaluate(data, adapt, ("train",), episodes=1)["eval/train/diverged"] == 3


def test_normalized_is_0_where_the_expert_is_no_better_than_random(uneven):
    data = dataset_on_meta(uneven[0])
    data.random_returns, data.expert_returns = np.array([-20.0, -10, 3]), np.array([-5.0, -30, 3])
    scores = dc.normalize(data, np.array([2, 1, 0, 0, 0]), np.array([9.0, -20, -20, -5, -12.5]))
    assert scores.tolist() == [0, 0, 0, 100, 50]


@pytest.mark.parametrize("with_clone", [True, False])
def test_an_actor_critic_is_evaluated_with_its_clone_and_the_error_of_its_critic(with_clone, numbered):
    def act(speed):
        return lambda context, mask, explore: lambda obs, rew: torch.full((len(obs), 2), speed)

    def value(context, mask, obs):
        return obs.sum(-1) + context.sum((1, 2))[:, None]

    found = dc.evaluate_actor_critic(
        numbered, act(0.3), value, 0.8, ("train", "iid"), 3, act(-0.4) if with_clone else None
    )
    traced = []
    expected = dc.evaluate(numbered, act(0.3), ("train", "iid"), 3, traced)
    errors = dc.q_error(traced[1], value, 0.8)
    assert abs(errors["eval/iid/q_error"] - dc.q_error(traced[0], value, 0.8)["eval/iid/q_error"]) > 0.1
    alone = dc.evaluate(numbered, act(-0.4), ("iid",), 3)
    clone = {"eval/clone/" + tag.split("/")[2]: result for tag, result in alone.items()}
    assert abs(clone["eval/clone/return"] - expected["eval/iid/return"]) > 0.1
    assert found == expected | errors | (clone if with_clone else {})


@pytest.mark.parametrize("continued", [True, False])
def test_q_error_is_that_of_a_plain_loop(continued):
    """Rows: to the time limit, a fall before it, a fall in the last step, a simulation that broke in its third step."""
    rng, lengths, gamma = np.random.default_rng(0), np.array([5, 3, 5, 2], np.int32), 0.8
    terminated = np.array([False, True, True, False]) | (not continued)
    episodes = {"observations": rng.normal(size=(4, 6, 3)).astype(np.float32), "lengths": lengths}
    episodes |= {"rewards": rng.normal(size=(4, 5)).astype(np.float32), "terminated": terminated}
    episodes["rewards"][np.arange(5) >= lengths[:, None]] = 0.0
    context, mask = torch.as_tensor(rng.normal(size=(4, 7, 2))), torch.as_tensor(rng.integers(2, size=(4, 7)))
    episodes |= {"context": context, "mask": mask}
    weights, given = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), []

    def value(*inputs):
        *of_task, obs = inputs
        given.append((*of_task, torch.is_grad_enabled()))
        return obs @ weights + torch.arange(4.0)[:, None]

    def slow_value(row, step):
        return float(episodes["observations"][row, step] @ [1.0, -2.0, 3.0]) + row

    found, errors, returns = dc.q_error(episodes, value, gamma), [], []
    for row, length in enumerate(lengths):
        returns.append(sum(gamma**t * float(episodes["rewards"][row, t]) for t in range(length)))
        if not terminated[row]:
            returns[-1] += gamma**length * slow_value(row, length)
        errors.append(slow_value(row, 0) - returns[-1])
    assert min(returns) < 0 < max(returns)
    relative = np.mean(errors) / abs(np.mean(returns))
    expected = {"eval/iid/q_error": np.mean(errors), "eval/iid/q_relative": relative}
    assert found == pytest.approx(expected, abs=1e-5) and all(type(number) is float for number in found.values())
    assert len(given) == 1 and given[0][0] is context and given[0][1] is mask and not given[0][2]
    negative = dc.q_error(episodes | {"rewards": -episodes["rewards"]}, lambda *inputs: -value(*inputs), gamma)
    assert negative["eval/iid/q_relative"] == pytest.approx(-relative, abs=1e-5)
    nothing = episodes | {"rewards": 0 * episodes["rewards"]}
    assert dc.q_error(nothing, lambda *_: torch.zeros(4, 2), gamma) == {"eval/iid/q_error": 0, "eval/iid/q_relative": 0}


# ---- how well z tells the tasks apart ---------------------------------------


def test_label_contexts_takes_recorded_episodes_evenly_and_names_their_tasks(uneven):
    data, arrays = uneven
    given = []

    def embed(context, mask):
        given.append((context, mask))
        return context[:, 0, 4:5]

    for tasks, limit in ((None, 10), (None, 2), (np.array([4, 1]), 3)):
        z, labels = dc.label_contexts(data, embed, tasks, limit)
        expected = []
        for task in range(NUMBERED_TASKS) if tasks is None else tasks.tolist():
            present = int((arrays["lengths"][task] > 0).sum())
            picks = {10: range(present), 2: sorted({0, present - 1}), 3: (0, 2, 3) if task == 4 else (0, 1)}[limit]
            expected += [(task, n) for n in picks]
        context, mask = given[-1]
        assert labels == [task for task, _ in expected] and z[:, 0].tolist() == [1e3 * t + 1e2 * n for t, n in expected]
        for row, place in enumerate(expected):
            assert torch.equal(context[row], data.episodes[place][:, :-1])
            assert mask[row].sum() == arrays["lengths"][place] and mask[row, : arrays["lengths"][place]].all()


def test_embedding_quality_is_that_of_nearest_centroids_and_of_a_linear_probe(uneven):
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
    quality = dc.embedding_quality(data, embed)
    assert set(quality) == {"z/nearest_task_acc", "z/probe_r2"} and 0.4 <= np.mean(right) < 0.9
    assert quality["z/nearest_task_acc"] == np.mean(right)
    assert quality["z/probe_r2"] == pytest.approx(1 - error / around, abs=1e-4)


def test_probe_reads_nothing_from_a_saturated_dimension(uneven):
    """Of z's three dimensions two are the task's parameters, with noise; the third is 1 but for some noise that goes
    with theirs, and in test tasks 0."""
    data, _ = uneven
    params = torch.as_tensor(data.task_params, dtype=torch.float32)
    noise = torch.randn(len(params), 4, generator=torch.Generator().manual_seed(0))

    def embed(context, mask):
        task, episode, _ = origin(context[:, 0, 4])
        own = noise[task, episode, None]
        saturated = torch.where(torch.as_tensor(task)[:, None] < 6, 1 + 1e-5 * own, 0.0)
        return torch.cat([params[task] + 0.01 * own, saturated], 1)

    assert dc.embedding_quality(data, embed)["z/probe_r2"] > 0.9


def test_constant_embedding_has_a_poor_quality(tiny):
    quality = dc.embedding_quality(tiny, lambda context, mask: torch.zeros(len(context), 2))
    assert quality == {"z/nearest_task_acc": pytest.approx(1 / 6), "z/probe_r2": pytest.approx(0, abs=1e-5)}
