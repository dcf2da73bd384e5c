"""benchmark/slurm.sh as Slurm runs it: its variables, its signals, and a scontrol that notes what it is asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, flags, load


def test_slurm_job_saves_requeues_and_finishes(tiny_path, tmp_path):
    """USR1, a minute before its time is over, stops run 1, which goes on when it runs again. scancel ends run 2."""
    settings = {"env": "point-robot", "dataset": tiny_path, "total_updates": 2000, "width": 16, "save_every": 10_000}
    settings |= {"log_every": 20, "eval_every": 10_000, "final_episodes": 1, "device": "cpu"}
    lines = [" ".join(["python focal.py", *flags(settings | {"seed": seed})]) for seed in (1, 2)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def job(number, stop=None):
        """Run a job of the array, with stop(process id) at its first log line -> run directory."""
        command = ["bash", "benchmark/slurm.sh", str(tmp_path / "list.txt"), "--run-dir", str(tmp_path / "runs")]
        variables = environment | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        options = {"cwd": ROOT, "env": variables, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, **options) as process:
            for line in process.stdout:
                if stop and line.startswith("[policy"):
                    stop(process.pid)
                    stop = None
        (run_dir,) = tmp_path.glob(f"runs/point-robot/focal/seed{number}-*")
        return run_dir

    run_dir = job(1, stop=lambda pid: os.kill(pid, signal.SIGUSR1))
    assert 20 <= load(run_dir)["steps"]["policy"] < 2000 and asked.read_text() == "requeue 7_1\n"
    assert job(1) == run_dir and json.loads((run_dir / "result.json").read_text())["step"] == 2000
    run_dir = job(2, stop=lambda pid: os.killpg(pid, signal.SIGTERM))
    assert 20 <= load(run_dir)["steps"]["policy"] < 2000 and asked.read_text() == "requeue 7_1\n"
    head = (ROOT / "benchmark/slurm.sh").read_text()
    assert "--requeue" in head and "--signal=B:USR1@60" in head  # what makes Slurm behave so
