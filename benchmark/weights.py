"""Small copies of finished runs to ship: the weights that act, in half precision, with arguments and results.

Run:  python benchmark/weights.py RUN_DIR .. --out checkpoints
A copy can be evaluated and drawn: python flora.py --resume checkpoints/flora-small-ant-dir --eval-only
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

KEPT = ("version", "script", "args", "data", "device", "steps", "rows", "seconds")


def copy(run_dir, folder):
    """-> the new folder {exp_name}-{env} with checkpoint.pt, args.json and result.json."""
    if not (run_dir / "result.json").exists():
        raise SystemExit(f"{run_dir} is no finished run")
    about, result = (json.loads((run_dir / name).read_text()) for name in ("args.json", "result.json"))
    target = folder / f"{about['args']['exp_name']}-{about['args']['env']}"
    target.mkdir(parents=True, exist_ok=True)
    saved = dc.read_saved(run_dir / "checkpoint.pt", "finish the run anew")
    saved["args"]["run_dir"] = "runs"
    used = {name: value for name, value in saved["agent"].items() if not re.search(r"_target\.|^key_", name)}
    half = {name: value.half() if value.is_floating_point() else value for name, value in used.items()}
    dc.atomic_save(
        target / "checkpoint.pt", lambda file: torch.save({key: saved[key] for key in KEPT} | {"agent": half}, file)
    )
    place = {"run_dir": "runs"}  # not where it was trained
    dc.write_json(target / "args.json", about | {"args": about["args"] | place, "command": None})
    dc.write_json(target / "result.json", result | place)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="finished runs")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="parent of the copies")
    args = parser.parse_args()
    for run_dir in args.runs:
        print(copy(run_dir, args.out))


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
