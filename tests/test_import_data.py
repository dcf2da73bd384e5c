"""benchmark/import_data.py on files in the published layouts, made here."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import import_data
import numpy as np
import pytest
from conftest import stop_message

import data_collect as dc


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["import_data.py", *map(str, words)])
    import_data.main()


def walk(goal, lengths, rng):
    """Episodes of point-robot towards a goal, one after the other -> columns by T2DA's names."""
    rows = []
    for length in lengths:
        obs = np.zeros(2)
        for step in range(length):
            act = rng.uniform(-1, 1, 2).astype(np.float32)
            after = obs + 0.1 * act
            rows.append((obs, act, -np.linalg.norm(after - goal), after, False))
            obs = after
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    return dict(zip(names, map(np.array, zip(*rows))))


def test_t2da_pickles_become_a_dataset(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    goals = rng.uniform(-1, 1, (12, 2))
    tables = [walk(goal, [20, 20, 13], rng) for goal in goals]  # an episode cut short is the last
    for task, table in enumerate(tables):
        (tmp_path / f"dataset_task_{task}.pkl").write_bytes(pickle.dumps(table, protocol=4))
    (tmp_path / "task_goals.pkl").write_bytes(pickle.dumps(goals))
    run(monkeypatch, "t2da", tmp_path, "--out", tmp_path / "file.npz", "--test-tasks", "2")
    data = dc.load_dataset("point-robot-square", tmp_path / "file.npz")
    assert data.train_ids.tolist() == list(range(10)) and data.test_ids.tolist() == [10, 11]
    assert np.array_equal(data.task_params, goals) and data.lengths.tolist() == [[20, 20, 13]] * 12
    for task in (0, 10):  # in the order of the numbers, not of the names
        rows = data.unpack(data.episodes[task][data.recorded(data.lengths[task])])
        assert np.array_equal(rows.act, tables[task]["actions"])
        np.testing.assert_allclose(rows.rew, tables[task]["rewards"], rtol=1e-6)
        after = rows.next_obs * data.obs_std + data.obs_mean
        np.testing.assert_allclose(after, tables[task]["next_observations"], atol=1e-5)
    assert "10 training and 2 test tasks, 36 episodes" in capsys.readouterr().out


def test_focal_layout_becomes_a_dataset(tmp_path, monkeypatch):
    rng, tables = np.random.default_rng(0), {}
    for task in range(3):
        folder = tmp_path / f"goal_idx{task}"
        folder.mkdir()
        for n, step in ((0, 100), (1, 100), (0, 200)):
            table = walk(np.ones(2), [4 + task], rng)
            steps = np.empty((4 + task, 4), object)
            for t, row in enumerate(zip(*list(table.values())[:4])):
                steps[t] = np.empty(4, object)
                steps[t][:] = row[0], row[1], row[2], row[3]
            np.save(folder / f"trj_evalsample{n}_step{step}.npy", steps, allow_pickle=True)
            tables[task, n, step] = table
    run(monkeypatch, "focal", tmp_path, "--out", tmp_path / "file.npz", "--test-tasks", "1")
    data = dc.load_dataset("offline", tmp_path / "file.npz")
    assert data.lengths.tolist() == [[4 + task] * 3 for task in range(3)] and data.test_ids.tolist() == [2]
    for task in range(3):
        for episode, place in enumerate(((0, 100), (0, 200), (1, 100))):
            rows = data.unpack(data.episodes[task, episode, : 4 + task])
            assert np.array_equal(rows.act, tables[task, *place]["actions"])
            np.testing.assert_allclose(rows.rew, tables[task, *place]["rewards"], rtol=1e-6)


class Evil:
    def __reduce__(self):
        return open, ("witness", "w")


@pytest.mark.parametrize("layout", ["t2da", "focal"])
def test_pickle_with_code_is_refused(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    path = Path("dataset_task_0.pkl" if layout == "t2da" else "goal_idx0/trj_evalsample0_step1.npy")
    path.parent.mkdir(exist_ok=True)
    if layout == "t2da":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        np.save(path, np.array([Evil()], object))
    message = stop_message(run, monkeypatch, layout, ".", "--out", "file.npz")
    assert message.startswith(f"{path} is refused: it asks for ") and message.endswith(".open")
    assert not Path("witness").exists() and not Path("file.npz").exists()
    np.load(path, allow_pickle=True)  # a plain reader runs it
    assert Path("witness").exists()


@pytest.mark.parametrize("name, content, complaint", [
    ("other.pkl", b"", "nothing there is named like dataset_task_"),
    ("dataset_task_0.pkl", b"\x80\x04abc", "is refused"),
    ("dataset_task_0.pkl", pickle.dumps({"actions": 3}), "not in the layout of t2da: 'observations'"),
])  # fmt: skip
def test_wrong_folder_gets_one_line(tmp_path, monkeypatch, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    assert complaint in stop_message(run, monkeypatch, "t2da", tmp_path, "--out", tmp_path / "file.npz")


def test_minari_data_become_a_dataset(tmp_path, monkeypatch):
    """By a stand-in for the library, which is not among the requirements."""
    rng, space = np.random.default_rng(0), gym.spaces.Box(1, 5, (2,))

    def episode(length, end):
        obs, act, rew = rng.normal(size=(length + 1, 3)), rng.uniform(1, 5, (length, 2)), rng.normal(size=length)
        ends = [False] * (length - 1) + [end]
        return SimpleNamespace(observations=obs, actions=act, rewards=rew, terminations=ends)

    kept = {f"own/task{task}-v0": [episode(4 + task, False), episode(5 + task, True)] for task in range(3)}

    def load_dataset(name):
        episodes = kept[name]
        return SimpleNamespace(action_space=space, iterate_episodes=lambda: episodes)

    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=load_dataset))
    run(monkeypatch, "minari", *kept, "--out", tmp_path / "file.npz")
    data = dc.load_dataset("offline", tmp_path / "file.npz")
    assert data.lengths.tolist() == [[4, 5], [5, 6], [6, 7]] and data.test_ids.tolist() == [2]
    for task, episodes in enumerate(kept.values()):
        for n, (e, length) in enumerate(zip(episodes, data.lengths[task].tolist())):
            rows = data.unpack(data.episodes[task, n, :length])
            np.testing.assert_allclose(rows.act, e.actions / 2 - 1.5, atol=1e-6)
            np.testing.assert_allclose(rows.rew, e.rewards, rtol=1e-6)
            np.testing.assert_allclose(rows.next_obs * data.obs_std + data.obs_mean, e.observations[1:], atol=1e-5)
            assert rows.term.tolist() == [0.0] * (length - 1) + [float(n)]
    assert stop_message(run, monkeypatch, "minari", "own/none-v0", "--out", tmp_path / "b.npz").startswith("own/none")


def test_missing_minari_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    message = stop_message(run, monkeypatch, "minari", "own/task-v0", "--out", tmp_path / "file.npz")
    assert message.startswith("minari is missing: pip install 'minari[hdf5]==") and not list(tmp_path.iterdir())
