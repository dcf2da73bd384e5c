"""benchmark/import_data.py on files in the published layouts, made here."""

import pickle
import sys

import numpy as np
import pytest
from conftest import ROOT, stop_message

import data_collect as dc

sys.path.insert(0, str(ROOT / "benchmark"))

import import_data  # noqa: E402


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
    def __init__(self, call, *inputs):
        self.what = call, inputs

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("kind", ["pkl", "npy"])
def test_pickle_with_code_is_refused(tmp_path, monkeypatch, kind):
    witness = tmp_path / "witness"
    evil = {"observations": Evil(open, str(witness), "w")}
    if kind == "pkl":
        path = tmp_path / "dataset_task_0.pkl"
        path.write_bytes(pickle.dumps(evil))
    else:
        (tmp_path / "goal_idx0").mkdir()
        path = tmp_path / "goal_idx0/trj_evalsample0_step1.npy"
        np.save(path, np.array([evil], object), allow_pickle=True)
    words = "focal" if kind == "npy" else "t2da", tmp_path, "--out", tmp_path / "file.npz"
    message = stop_message(run, monkeypatch, *words)
    assert message.startswith(f"{path} is refused: it asks for ") and message.endswith(".open")
    assert not witness.exists() and not (tmp_path / "file.npz").exists()
    with open(path, "rb") as file:  # a plain reader would have run it
        pickle.load(file) if kind == "pkl" else np.load(path, allow_pickle=True)
    assert witness.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04abc", pickle.dumps({"actions": 3})])
def test_damaged_pickle_gets_one_line(tmp_path, monkeypatch, content):
    (tmp_path / "dataset_task_0.pkl").write_bytes(content)
    message = stop_message(run, monkeypatch, "t2da", tmp_path, "--out", tmp_path / "file.npz")
    assert "is refused" in message or message.endswith("not in the layout of t2da: 'observations'")


def test_empty_folder_is_named(tmp_path, monkeypatch):
    message = stop_message(run, monkeypatch, "t2da", tmp_path, "--out", tmp_path / "file.npz")
    assert message.startswith(f"{tmp_path}: nothing there is named like dataset_task_")


def test_minari_data_become_a_dataset(tmp_path, monkeypatch):
    """With the library, where it is installed."""
    minari, gym = pytest.importorskip("minari"), pytest.importorskip("gymnasium")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, tables = np.random.default_rng(0), {}
    for task in range(3):
        for n in range(2):
            length = 4 + task + n
            obs, act = rng.normal(size=(length + 1, 3)).astype(np.float32), rng.uniform(1, 5, (length, 2))
            tables[task, n] = obs, act, rng.normal(size=length)
        buffers = [EpisodeBuffer(id=n, observations=tables[task, n][0], actions=tables[task, n][1].astype(np.float32),
                                 rewards=tables[task, n][2], terminations=[False] * (3 + task + n) + [n == 1],
                                 truncations=[False] * (3 + task + n) + [n == 0]) for n in range(2)]  # fmt: skip
        spaces = {"observation_space": gym.spaces.Box(-9, 9, (3,)), "action_space": gym.spaces.Box(1, 5, (2,))}
        minari.create_dataset_from_buffers(f"own/task{task}-v0", buffers, **spaces)
    names = [f"own/task{task}-v0" for task in range(3)]
    run(monkeypatch, "minari", *names, "--out", tmp_path / "file.npz")
    data = dc.load_dataset("offline", tmp_path / "file.npz")
    assert data.lengths.tolist() == [[4 + task, 5 + task] for task in range(3)] and data.test_ids.tolist() == [2]
    for (task, n), (obs, act, rew) in tables.items():
        rows = data.unpack(data.episodes[task, n, : len(act)])
        np.testing.assert_allclose(rows.act, act / 2 - 1.5, atol=1e-6)
        np.testing.assert_allclose(rows.rew, rew, rtol=1e-6)
        np.testing.assert_allclose(rows.next_obs * data.obs_std + data.obs_mean, obs[1:], atol=1e-5)
        assert rows.term.tolist() == [0.0] * (len(act) - 1) + [float(n)]
    assert stop_message(run, monkeypatch, "minari", "own/none-v0", "--out", tmp_path / "b.npz").startswith("own/none")


def test_missing_minari_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    message = stop_message(run, monkeypatch, "minari", "own/task-v0", "--out", tmp_path / "file.npz")
    assert message.startswith("minari is missing: pip install 'minari[hdf5]==") and not list(tmp_path.iterdir())
