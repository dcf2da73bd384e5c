"""Figure and table of docs/SHARING.md, from the runs of benchmark/sharing.txt.

Run:  python benchmark/sharing_figure.py [--run-dir runs]    # writes docs/sharing.png, prints the table
Normalized returns on the training tasks, 0 = random, 100 = expert: mean and its standard error over seeds."""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
ENVS = ("point-robot", "sparse-point-robot")
RULES = {"none": "#777777", "all": "#0072b2", "uds": "#d55e00", "cds": "#009e73", "cds-uds": "#aa3377"}
LABELLED = {"worst-5": "5 worst", "1": "1 best", "5": "5 best", "20": "20 best"}


def returns(run_dir, env, name):
    """-> {seed: normalized return on the training tasks}."""
    paths = sorted(Path(run_dir, env, f"sharing-{name}").glob("seed*/result.json"))
    seed = lambda path: int(path.parent.name.split("-")[0].removeprefix("seed"))  # noqa: E731
    return {seed(path): json.loads(path.read_text())["eval/train/normalized"] for path in paths}


def summary(values):
    """-> mean, standard error; NaN of a single seed."""
    values = np.array(list(values))
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def cell(values):
    mean, error = summary(values)
    return f"{mean:.0f}" if np.isnan(error) else f"{mean:.0f} ± {error:.1f}"


def print_table(run_dir):
    print(f"| family | labelled | seeds | {' | '.join(RULES)} |\n" + "|---" * (3 + len(RULES)) + "|")
    for env in ENVS:
        for key, label in LABELLED.items():
            found = [returns(run_dir, env, f"{rule}-{key}") for rule in RULES]
            if all(found):
                cells = [cell(values.values()) for values in found]
                seeds = sorted({len(values) for values in found})
                print(f"| {env} | {label} | {'–'.join(map(str, seeds))} | {' | '.join(cells)} |")
    zero = returns(run_dir, "point-robot", "uds-zero-5")
    print(f"\npoint-robot, 5 best, uds with zero: {cell(zero.values())}, seeds: {len(zero)}")


def draw(run_dir):
    figure, axes = plt.subplots(1, len(ENVS), figsize=(9, 3.2), sharey=True)
    for axis, env in zip(axes, ENVS):
        for k, (rule, color) in enumerate(RULES.items()):
            found = [summary(returns(run_dir, env, f"{rule}-{key}").values()) for key in LABELLED]
            mean, error = zip(*found)
            place = np.arange(len(LABELLED)) + 0.15 * (k - 2)
            axis.bar(place, mean, 0.14, yerr=error, color=color, label=rule, error_kw={"lw": 1})
        axis.set_xticks(range(len(LABELLED)), LABELLED.values())
        axis.set(title=env, xlabel="labelled episodes per task")
        axis.axhline(0, color="black", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("normalized return")
    axes[-1].legend(frameon=False, bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(DOCS / "sharing.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs")
    run_dir = parser.parse_args().run_dir
    if not all(returns(run_dir, env, f"{rule}-{key}") for env in ENVS for rule in RULES for key in LABELLED):
        raise SystemExit(f"runs are missing below {run_dir}; start benchmark/sharing.txt")
    print_table(run_dir)
    draw(run_dir)
