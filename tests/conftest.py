"""Shared by all tests: datasets so small that they are collected in seconds, a runner of the scripts, and readers of
what they leave behind."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_collect  # noqa: E402

TINY = {"train_tasks": 6, "test_tasks": 3, "total_updates": 200, "episodes": 8, "test_episodes": 3}
TINY_WALKER = {"train_tasks": 3, "test_tasks": 2, "total_updates": 40, "episodes": 5, "test_episodes": 3, "rows": 4}
TINY_WALKER |= {"updates_per_step": 20, "width": 16, "ood_contexts": 2, "batch_size": 32}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """point-robot, 9 tasks; lies next to its policies file."""
    path = tmp_path_factory.mktemp("tiny") / "point-robot.npz"
    data_collect.collect(data_collect.Args(env="point-robot", out=str(path), **TINY))
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path):
    return data_collect.load_dataset("point-robot", tiny_path)


@pytest.fixture(scope="session")
def walker_path(tmp_path_factory):
    """walker-rand-params, 5 tasks: the family with episodes of different lengths."""
    path = tmp_path_factory.mktemp("walker") / "walker-rand-params.npz"
    data_collect.collect(data_collect.Args(env="walker-rand-params", out=str(path), **TINY_WALKER))
    return path


@pytest.fixture(scope="session")
def walker(walker_path):
    return data_collect.load_dataset("walker-rand-params", walker_path)


def flags(settings):
    """{"test_tasks": 3} -> ["--test-tasks", "3"]."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start_script(folder, script, *arguments):
    """A running script of this repository with the working directory `folder`; Ctrl-C reaches it
    even where the tests themselves run in the background."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_script(folder, script, *arguments):
    """-> exit code, stdout, stderr."""
    process = start_script(folder, script, *arguments)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def load(run_dir):
    """The checkpoint of a run."""
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def read_rows(run_dir):
    """metrics.csv of a run -> list of (step, tag, value as written)."""
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "tag", "value"] and all(len(row) == 3 for row in rows)
    return [(int(step), tag, value) for step, tag, value in rows]


def stop_message(call, *arguments):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = stop.value.code
    assert isinstance(message, str) and message.strip() and "\n" not in message
    return message
