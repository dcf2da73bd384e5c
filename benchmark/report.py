"""Tables and learning curves of finished runs: mean and its standard error over seeds.

Run:  python benchmark/report.py --env ant-dir --runs runs
Prints markdown tables; the newest run of each experiment name and seed counts.
"""

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

PROTOCOLS = ("iid", "clone", "ood", "ood_random", "online", "zero_shot", "train")
STEPS = [f"adapt/return_{k}_steps" for k in (0, 1, 5, 20)]  # MACAW
DISTANCES = [f"eval/ood/normalized_{third}" for third in ("near", "middle", "far")]
EPISODES = [f"eval/online/return_ep_{k}" for k in range(1, 6)]


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


def cell(results, tag, normalized=None, digits=0):
    """mean ± standard error over seeds, of a single seed's return over tasks and episodes; in brackets, if the tag
    `normalized` is given, its mean."""
    if any(t not in r for r in results for t in (tag, normalized or tag)):
        return ""
    values = np.array([r[tag] for r in results])
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else results[0].get(f"{tag}_se")
    spread = "" if error is None else f" ± {error:.{digits}f}"
    brackets = f" ({np.mean([r[normalized] for r in results]):.0f})" if normalized else ""
    return f"{values.mean():.{digits}f}{spread}{brackets}"


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_tables(runs):
    """Returns per protocol with the critic's error, quality of z and cost; then what happens over inner steps, own
    episodes, and with the distance of the policy that acted in the context."""
    results = {
        name: [json.loads((d / "result.json").read_text()) for d in seeds.values()] for name, seeds in runs.items()
    }
    digits = 2 if max(abs(r["eval/iid/return"]) for group in results.values() for r in group) < 50 else 0

    def cost(group):
        steps = "/".join(f"{s:,}" for s in sorted({r["step"] for r in group}))
        speed, minutes = (np.mean([r[tag] for r in group]) for tag in ("updates_per_sec", "cpu_s"))
        quality = [cell(group, tag, digits=2) for tag in ("eval/iid/q_relative", "z/nearest_task_acc", "z/probe_r2")]
        return [*quality, steps, f"{speed:.1f}", f"{minutes / 60:.0f}"]

    def returns(group):
        return [cell(group, f"eval/{p}/return", f"eval/{p}/normalized", digits) for p in PROTOCOLS]

    header = ["method", "seeds", *PROTOCOLS, "Q error", "z acc", "z R2", "updates", "updates/s", "minutes"]
    print_table(header, [[n, str(len(g)), *returns(g), *cost(g)] for n, g in results.items()])
    names = {"inner steps": STEPS, "own episodes": EPISODES, "ood, normalized, by distance": DISTANCES}
    for what, tags in names.items():
        groups = {name: group for name, group in results.items() if tags[0] in group[0]}
        if groups:
            header = [f"method, {what}", *(re.search(r"\d+|[a-z]+$", tag)[0] for tag in tags)]
            print_table(header, [[n, *(cell(g, tag, digits=digits) for tag in tags)] for n, g in groups.items()])


def draw(runs, data, path):
    """Return on the test tasks, context from their own data, against updates; band: one standard error."""
    import matplotlib  # only pictures need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, seeds in runs.items():
        curves = [curve(run_dir, "eval/iid/return") for run_dir in seeds.values()]
        length = min(len(values) for _, values in curves)
        steps, values = curves[0][0][:length], np.array([values[:length] for _, values in curves])
        mean, spread = (
            values.mean(0),
            values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(length),
        )
        (line,) = axes.plot(steps, mean, label=f"{name} ({len(values)} seed{'s' * (len(values) > 1)})")
        axes.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    for label, level, style in (
        ("expert", data.expert_returns[data.test_ids].mean(), "--"),
        ("mean return of the training data", data.behavior_return, ":"),
    ):
        axes.axhline(level, color="gray", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="updates", ylabel="return on the test tasks (iid context)", title=data.env)
    axes.set_ylim(top=1.05 * data.expert_returns[data.test_ids].mean())
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.94), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--env", default="ant-dir")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the --run-dir of the runs")
    parser.add_argument("--dataset", type=Path, help="their dataset file; by default datasets/{env}.npz")
    parser.add_argument("--figure", type=Path, help="where to write the learning curves (png)")
    parser.add_argument("--only", nargs="+", help="experiment names; by default all that are there")
    args = parser.parse_args()
    runs = finished_runs(args.runs / args.env)
    runs = {name: seeds for name, seeds in runs.items() if not args.only or name in args.only}
    if not runs:
        raise SystemExit(f"no finished run in {args.runs / args.env}; make them: see benchmark/README.md")
    print_tables(runs)
    if args.figure:
        draw(runs, dc.load_dataset(args.env, args.dataset), args.figure)


if __name__ == "__main__":
    main()
