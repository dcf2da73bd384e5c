"""Figures of docs/OMNIRL.md, from the runs of benchmark/omnirl.txt.

Run:  python benchmark/omnirl_figures.py [--run-dir runs]    # a CPU minute: it plays the baselines
docs/omnirl-episodes.png  return of own episodes, one curve per agent
docs/omnirl-tasks.png     left: seen and unseen tasks against the number of training tasks; right: cross-entropy by the
                          length of the context, mean of the last quarter of the training
"""

import argparse
import csv
import json
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import tabular

import data_collect as dc

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLUE, ORANGE, GREEN, GRAY, RED = "#0072b2", "#d55e00", "#009e73", "#777777", "#aa3377"


def runs(run_dir, name):
    """Finished runs -> their directories."""
    found = sorted(path.parent for path in Path(run_dir, "any-mdp", name).glob("*/result.json"))
    if not found:
        raise SystemExit(f"no finished run of --exp-name {name} in {run_dir}; start benchmark/omnirl.txt")
    return found


def own(path, group="own"):
    """-> normalized returns of episodes 1, 2, .. of a run."""
    result, returns = json.loads((path / "result.json").read_text()), []
    while (value := result.get(f"eval/{group}/normalized_ep_{len(returns) + 1}")) is not None:
        returns.append(value)
    return np.array(returns)


def by_length(path):
    """-> lengths of the context, cross-entropy, mean of the last quarter of the logged updates."""
    values = {}
    for row in csv.DictReader(open(path / "metrics.csv")):
        if row["tag"].startswith("context/cross_entropy"):
            values.setdefault(int(row["tag"][-4:]), []).append(float(row["value"]))
    return list(values), [np.mean(v[-len(v) // 4 :]) for v in values.values()]


def baseline(make, episodes):
    tasks, _, ids = tabular.world("any-mdp", None)
    return tabular.own_episodes(make, tasks, ids, episodes).mean(0)


def save(fig, name):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", lw=0.7)
        ax.set_axisbelow(True)
    fig.tight_layout()
    fig.savefig(DOCS / name, dpi=130)


def draw_episodes(run_dir):
    counts = np.mean([own(path) for path in runs(run_dir, "omnirl")], 0)
    curves = {
        "omnirl.py, counts": (counts, BLUE),
        "count and plan": (baseline(partial(tabular.Planner, 1.0), 50), GREEN),
        "omnirl.py, transformer": (np.mean([own(path) for path in runs(run_dir, "omnirl-transformer")], 0), ORANGE),
        "Q-learning": (baseline(partial(tabular.QLearner, 0.3, 0.3), 50), RED),
    }
    fig, ax = plt.subplots(figsize=(5.6, 3.6))
    for name, (returns, color) in curves.items():
        k = np.arange(1, len(returns) + 1)
        near = [returns[(k >= i / 1.25) & (k <= i * 1.25)].mean() for i in k]  # single episodes scatter
        ax.plot(k, near, color=color, lw=2)
        place = (23, 53) if "transformer" in name else (k[-1] * 1.06, near[-1])  # beside the end, where no curve runs
        ax.text(*place, name, color=color, va="center", fontsize=9)
    for name, height in (("optimal policy", 100), ("uniform policy", 0)):
        ax.axhline(height, color=GRAY, lw=1, ls="--")
        ax.text(1, height + 2, name, color=GRAY, fontsize=9)
    ax.set(xscale="log", xlim=(0.95, 140), ylim=(-5, 110), xlabel="own episode", ylabel="normalized return")
    ax.set_xticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
    ax.minorticks_off()
    save(fig, "omnirl-episodes.png")


def draw_tasks(run_dir):
    fig, (ax, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    places = {"32": 0, "256": 1, "stream": 2}
    for model, color in (("plain", ORANGE), ("counts", BLUE)):
        for group, style in (("seen", "o-"), ("own", "o--")):
            names = [name for name in places if (group, name) != ("seen", "stream")]
            values = [own(runs(run_dir, f"omnirl-{model}-{name}")[0], group)[:10].mean() for name in names]
            ax.plot([places[name] for name in names], values, style, color=color)
    note = partial(ax.text, va="center", fontsize=8)
    note(0.12, 90, "transformer, fixed numbers: seen tasks", color=ORANGE)
    note(0.12, -31, "transformer, fixed numbers: unseen tasks", color=ORANGE)
    note(0.7, 57, "counts: unseen (dashed) and seen tasks", color=BLUE)
    ax.set_xticks(list(places.values()), ["32", "256", "stream"])
    ax.set(xlim=(-0.1, 2.3), xlabel="training tasks", ylabel="normalized return, episodes 1 to 10")
    for name, color, place in (("omnirl", BLUE, (500, 0.63)), ("omnirl-transformer", ORANGE, (20, 0.55))):
        right.plot(*by_length(runs(run_dir, name)[0]), color=color)
        right.text(*place, name, color=color, fontsize=8)
    right.set(xlim=(0, 1024), ylim=(0, 1.7), xlabel="rows of the context", ylabel="cross-entropy")
    save(fig, "omnirl-tasks.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs")
    with dc.one_line_errors():
        run_dir = parser.parse_args().run_dir
        draw_episodes(run_dir)
        draw_tasks(run_dir)
