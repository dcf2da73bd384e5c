"""Table and learning curves of finished runs: mean and spread over seeds.

Run:  python benchmark/report.py --env ant-dir --runs runs --figure docs/ant-dir.png
Prints a markdown table; the newest run of each experiment name and seed counts.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import data_collect as dc  # noqa: E402

PROTOCOLS = ("iid", "ood", "ood_random", "online", "zero_shot", "train")


def finished_runs(folder):
    """-> {experiment name: {seed: run directory}} of the runs that wrote result.json."""
    runs = defaultdict(dict)
    for path in sorted(folder.glob("*/seed*/result.json"), key=lambda p: p.stat().st_mtime):
        args = json.loads((path.parent / "args.json").read_text())["args"]
        runs[args["exp_name"]][args["seed"]] = path.parent
    return dict(sorted(runs.items()))


def curve(run_dir, tag):
    """-> steps, values of one tag of metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        points = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["tag"] == tag]
    return tuple(np.array(column) for column in zip(*points))


def cell(results, tag):
    """mean ± standard deviation over seeds, normalized in brackets."""
    values = np.array([[r[f"{tag}/return"], r[f"{tag}/normalized"]] for r in results])
    spread = f" ± {values[:, 0].std(ddof=1):.0f}" if len(values) > 1 else ""
    return f"{values[:, 0].mean():.0f}{spread} ({values[:, 1].mean():.0f})"


def print_table(runs):
    print("| method | seeds | updates | " + " | ".join(PROTOCOLS) + " | updates/s | minutes |")
    print("|---" * (len(PROTOCOLS) + 5) + "|")
    for name, seeds in runs.items():
        results = [json.loads((run_dir / "result.json").read_text()) for run_dir in seeds.values()]
        cells = [cell(results, f"eval/{p}") if f"eval/{p}/return" in results[0] else "" for p in PROTOCOLS]
        steps = "/".join(f"{s:,}" for s in sorted({r["step"] for r in results}))
        speed = np.mean([r["updates_per_sec"] for r in results])
        minutes = np.mean([r["wall_clock_s"] for r in results]) / 60
        print(f"| {name} | {len(results)} | {steps} | " + " | ".join(cells) + f" | {speed:.1f} | {minutes:.0f} |")


def draw(runs, data, path):
    """Return on the test tasks, context from their own data, against updates; band: one standard deviation."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, seeds in runs.items():
        curves = [curve(run_dir, "eval/iid/return") for run_dir in seeds.values()]
        length = min(len(values) for _, values in curves)
        steps, values = curves[0][0][:length], np.array([values[:length] for _, values in curves])
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(length)
        (line,) = axes.plot(steps, mean, label=f"{name} ({len(values)} seed{'s' * (len(values) > 1)})")
        axes.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    for label, level, style in (
        ("expert", data.expert_returns[data.test_ids].mean(), "--"),
        ("mean return of the training data", data.behavior_return, ":"),
    ):
        axes.axhline(level, color="gray", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="updates", ylabel="return on the test tasks (iid context)", title=data.env)
    axes.set_ylim(top=1.05 * data.expert_returns[data.test_ids].mean())
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--env", default="ant-dir")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the --run-dir of the runs")
    parser.add_argument("--dataset", type=Path, help="their dataset file; by default datasets/{env}.npz")
    parser.add_argument("--figure", type=Path, help="where to write the learning curves (png)")
    args = parser.parse_args()
    runs = finished_runs(args.runs / args.env)
    if not runs:
        raise SystemExit(f"no finished run in {args.runs / args.env}; make them: see benchmark/README.md")
    print_table(runs)
    if args.figure:
        draw(runs, dc.load_dataset(args.env, args.dataset), args.figure)


if __name__ == "__main__":
    main()
