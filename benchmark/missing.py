"""Which runs of a list are still to be made? Prints their commands; those of runs that were cut off continue them.

Run:  python benchmark/missing.py benchmark/ant-dir.txt | xargs -P 2 -I{} sh -c '{}'      # two at a time
      python benchmark/missing.py benchmark/ant-dir.txt --line 7     # that line's run alone, for an array of jobs
      python benchmark/missing.py benchmark/ant-dir.txt --results benchmark/results.csv   # what nobody has added so far
After a kill the same command goes on. A run is finished if its directory has a result.json, and arguments (today's
defaults included) and data are those that the line asks for; of several the newest counts. With --results what has rows
there is finished too, whatever code and data made them. What another process is training is left to it. How many are
done and how long the rest takes, by the CPU seconds of finished runs, goes to the standard error.
"""

import argparse
import csv
import importlib
import json
import shlex
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import tyro

sys.path += [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import data_collect as dc  # noqa: E402

SETTINGS_ASIDE = dc.FREE - {"total_updates"}  # what a line may ask for without it being another run
OPEN = ("begun", "missing")


@cache
def header(path):
    """The dataset's own description, None without one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["header"]))
    except (OSError, ValueError, KeyError):
        return None


def being_trained(run_dir):
    with open(run_dir / "lock", "a") as file:
        return not dc.lock(file)


def recorded(rows, args, data):
    """Rows of a results.csv of the run that args ask for; where the dataset's file is not here, of any data."""
    asked = {"env": args.env, "name": args.exp_name, "seed": str(args.seed), "updates": str(args.total_updates)}
    if data:
        asked["quality"] = data["settings"]["quality"]
    return [row for row in rows if asked.items() <= row.items()]


def state(line, run_dir, rows=()):
    """A line of a list -> "finished", "running", "begun" or "missing"; the command that makes or continues the run, or
    the CPU seconds of a finished one; (script, family). rows: of a results.csv, whose runs are finished too."""
    try:
        _, script, *flags = shlex.split(line)
        module = importlib.import_module(Path(script).stem)
        args = tyro.cli(module.Args, args=flags, prog=line)  # a wrong flag is reported with the line
    except (ValueError, ImportError) as fault:
        raise SystemExit(f"not a command of a list: {line} ({fault})")
    drawn = getattr(module, "HEADER", None)  # of omnirl.py, which draws its tasks
    defaults = {"": module.DEFAULTS[args.memory]} if drawn else module.ENV_DEFAULTS
    dc.fill_in(args, defaults)  # a run made when another value was the default is another run
    data, kind = drawn or header(args.dataset or dc.default_path(args.env)), (script, args.env)
    if kept := recorded(rows, args, data):
        return "finished", kept[0]["cpu_s"] and float(kept[0]["cpu_s"]), kind
    asked = {k: v for k, v in asdict(args).items() if v is not None and k not in SETTINGS_ASIDE}
    folder = Path(run_dir, args.env, args.exp_name)
    for found in sorted(folder.glob(f"seed{args.seed}-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        if not (found / "args.json").exists():
            continue
        about = json.loads((found / "args.json").read_text())
        if about["dataset"] != data or any(about["args"].get(k) != v for k, v in asked.items()):
            continue
        if (found / "result.json").exists():
            return "finished", json.loads((found / "result.json").read_text()).get("cpu_s"), kind
        if being_trained(found):
            return "running", None, kind
        if (found / "checkpoint.pt").exists():
            return "begun", f"python {script} --resume {shlex.quote(str(found))}", kind
    return "missing", line + (f" --run-dir {shlex.quote(run_dir)}" if run_dir != "runs" else ""), kind


def seconds_left(states):
    """CPU seconds of what is neither finished nor running, by those of finished runs of the same script and family, or
    of all finished runs; nothing without any."""
    spent, everything = defaultdict(list), []
    for name, seconds, kind in states:
        if name == "finished" and seconds:
            spent[kind].append(seconds)
            everything.append(seconds)
    return everything and sum(np.mean(spent[kind] or everything) for name, _, kind in states if name in OPEN)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("lists", type=Path, nargs="+", help="files with a command a line")
    parser.add_argument("--line", type=int, help="look at this line alone, counted from 1 through all lists")
    parser.add_argument("--run-dir", default="runs", help="parent of all run directories")
    parser.add_argument("--results", type=Path, help="a results.csv: what has rows there is finished")
    args = parser.parse_args()
    for path in [*args.lists, *filter(None, [args.results])]:
        if not path.is_file():
            raise SystemExit(f"{path}: no such file")
    lines = [line for path in args.lists for line in path.read_text().splitlines() if line.strip()]
    if other := [line for line in lines if not line.startswith("python ")]:
        raise SystemExit(f"not a command of a list: {other[0]}")
    if args.line is not None:
        if not 1 <= args.line <= len(lines):
            raise SystemExit(f"--line {args.line}: there are {len(lines)} lines")
        lines = lines[args.line - 1 : args.line]
    rows = list(csv.DictReader(args.results.open(newline=""))) if args.results else []
    if args.results and not (rows and {"env", "quality", "name", "seed", "updates", "cpu_s"} <= rows[0].keys()):
        raise SystemExit(f"{args.results}: not a results.csv of report.py --add")
    states = [state(line, args.run_dir, rows) for line in lines]
    for kind, command, _ in states:
        if kind in OPEN:
            print(command)
    count = {kind: sum(k == kind for k, *_ in states) for kind in ("finished", "running", "begun", "missing")}
    left = seconds_left(states)
    text = f"{count['finished']} of {len(lines)} finished, {count['running']} running, {count['begun']} to be continued"
    print(text + (f"; about {dc.duration(left)} of CPU time left" if left else ""), file=sys.stderr)


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
