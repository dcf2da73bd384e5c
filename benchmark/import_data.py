"""Turn published data into a dataset file of this repository.

    python benchmark/import_data.py t2da FOLDER --out point-robot-square.npz   # T2DA, Meta-DT
    python benchmark/import_data.py focal FOLDER --out ant.npz                 # FOCAL, CSRO, UNICORN, CORRO
    python benchmark/import_data.py minari ID ID .. --out robots.npz           # Minari data sets, one for each task

The first two are pickles, which can run any program. Here they may only make numpy arrays, everything else is refused.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

class ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays, containers and numbers; nothing else is looked up, so nothing is executed."""

    NAMES = {"_reconstruct", "scalar", "ndarray", "dtype"}

    def find_class(self, module, name):
        if name not in self.NAMES or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return getattr(np if name in ("ndarray", "dtype") else np._core.multiarray, name)


def read(path):
    """The object in a .pkl file, or in a .npy file of numpy objects."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".npy":
                version, _ = np.lib.format.read_magic(file)
                _, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
                if dtype != object:
                    raise ValueError(f"an array of {dtype}, not of objects")
            return ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises a dozen kinds
        raise SystemExit(f"{path} is refused: {error}") from None


def numbered(folder, pattern):
    """-> [(number, path)] of the folder's entries of this name, by number."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]
    if not found:
        raise SystemExit(f"{folder}: nothing there is named like {pattern}")
    return sorted(found)


def split(columns, horizon):
    """Arrays over all steps of a task -> its episodes: an episode ends after `horizon` steps, where it terminates, or
    where the next observation is not the one that follows."""
    obs, act, rew, after, terminals = columns
    ends, start = np.ravel(terminals).astype(bool), 0
    breaks = np.append(abs(after[:-1] - obs[1:]).max(1) > 1e-4, True)
    episodes = []
    for step in range(len(obs)):
        if step + 1 - start == horizon or ends[step] or breaks[step]:
            own = slice(start, step + 1)
            episodes.append((np.concatenate([obs[own], after[step, None]]), act[own], rew[own], ends[step]))
            start = step + 1
    return episodes


def t2da(folder, horizon):
    """dataset_task_{i}.pkl: a dict of arrays over all steps. task_goals.pkl: the parameters -> episodes, parameters."""
    tables = [read(path) for _, path in numbered(folder, r"dataset_task_(\d+)\.pkl")]
    keys = "observations", "actions", "rewards", "next_observations", "terminals"
    episodes = [split([np.asarray(table[key]) for key in keys], horizon) for table in tables]
    goals = folder / "task_goals.pkl"
    return episodes, np.asarray(read(goals), np.float64) if goals.exists() else None


def focal(folder, horizon):
    """goal_idx{i}/trj_evalsample{n}_step{k}.npy: a list of (s, a, r, s'), one of each step -> episodes, None."""
    episodes = []
    for _, task in numbered(folder, r"goal_idx(\d+)"):
        paths = sorted(path for path in task.glob("trj_evalsample*_step*.npy"))
        steps = [list(zip(*(row[:4] for row in np.asarray(read(path), object)))) for path in paths]
        tables = [[np.array([np.ravel(x) for x in column], np.float64) for column in columns] for columns in steps]
        episodes.append([e for table in tables for e in split([*table, np.zeros(len(table[0]))], horizon)])
    return episodes, None


def minari(names):
    """Data sets on this machine, one for each task, read with the library -> episodes, None."""
    try:
        import minari as library
    except ImportError:
        raise SystemExit("minari is missing: pip install 'minari[hdf5]==0.5.4'") from None
    tasks = []
    for name in names:
        try:
            recorded = library.load_dataset(name)
        except Exception as error:  # the library's own message, which names the remedy
            raise SystemExit(f"{name}: {' '.join(str(error).split())}") from None
        low, high = recorded.action_space.low, recorded.action_space.high
        low, high = (low, high) if recorded.action_space.is_bounded() else (-1, 1)
        episodes = [(e.observations, 2 * (e.actions - low) / (high - low) - 1, e.rewards, e.terminations[-1])
                    for e in recorded.iterate_episodes()]  # fmt: skip
        tasks.append([(obs.reshape(len(obs), -1), act, rew, end) for obs, act, rew, end in episodes])
    return tasks, None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=("t2da", "focal", "minari"))
    parser.add_argument("source", nargs="+", help="folder, or names of Minari data sets")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--env", help="family; by default point-robot-square for t2da, else offline: no simulator")
    parser.add_argument("--test-tasks", type=int, help="the last n tasks are the test tasks; by default 5, of Minari 1")
    args = parser.parse_args()
    env = args.env or ("point-robot-square" if args.format == "t2da" else "offline")
    horizon, folder = dc.family_of(env).horizon, Path(args.source[0])
    if args.format != "minari" and not (len(args.source) == 1 and folder.is_dir()):
        raise SystemExit(f"{' '.join(args.source)}: no such folder")
    try:
        read_all = {"t2da": t2da, "focal": focal}.get(args.format)
        episodes, params = read_all(folder, horizon) if read_all else minari(args.source)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise SystemExit(f"{' '.join(args.source)}: not in the layout of {args.format}: {error}") from None
    test = args.test_tasks or (1 if args.format == "minari" else 5)
    count = len(episodes) - test
    if not 0 < count < len(episodes):
        raise SystemExit(f"--test-tasks {test}: there are {len(episodes)} tasks")
    optional = {} if params is None else {"task_params": params}
    data = dc.write_dataset(args.out, env, episodes, range(count), range(count, len(episodes)), **optional)
    print(f"{args.out}: {count} training and {test} test tasks, {int(data.present.sum())} episodes,")
    print(f"  mean return of the training data {data.behavior_return:.1f}; train: --env {env} --dataset {args.out}")


if __name__ == "__main__":
    main()
