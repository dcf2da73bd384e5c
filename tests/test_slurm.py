"""benchmark/slurm.sh on a real Slurm: a cluster of one node, made for the test and stopped after it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, flags, load

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=3
PartitionName=all Nodes=ALL Default=YES
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
OverTimeLimit=UNLIMITED
MpiDefault=none
ReturnToService=2
"""
# focal.py, except that after update 60 it waits for a signal, however long Slurm takes to send it.
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import data_collect as dc, focal

updates = dc.Run.updates

def until_signal(run, *phase):
    for step in updates(run, *phase):
        yield step
        if step == 60:
            print("update 60 is done", flush=True)
            while not run.signals.received:
                time.sleep(0.02)

dc.Run.updates = until_signal
dc.command_line(focal.Args, focal.train, focal.__doc__, focal.ENV_DEFAULTS)
"""


def wait_for(condition, daemons, what):
    """Until it holds, or until a daemon dies; the limit only keeps a broken cluster from hanging the tests."""
    give_up = time.monotonic() + 900
    while not condition():
        dead = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        assert not dead and time.monotonic() < give_up, f"{what}: {dead or 'in vain'}"
        time.sleep(0.5)


@pytest.fixture
def cluster():
    """-> a function that runs a command of Slurm and returns what it prints, the cluster's folder, its daemons."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not installed")
    if os.geteuid():
        pytest.skip("the daemons must be started as root")
    folder, daemons = Path(tempfile.mkdtemp(prefix="slurm-")), []  # a socket's path must be short
    with socket.socket() as one, socket.socket() as two:
        for end in (one, two):
            end.bind(("127.0.0.1", 0))
        ports = {"port": one.getsockname()[1], "node_port": two.getsockname()[1]}
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, **ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(program, *arguments):
        with open(folder / f"{program}.log", "w") as log:
            command = [program, *map(str, arguments)]
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def slurm(*command):
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout

    try:
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_for((folder / "munge.socket").exists, daemons, "munged")
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D")
        wait_for(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"), daemons, "the node")
        yield slurm, folder, daemons
    finally:
        try:
            slurm("scancel", "--user=root")
            wait_for(lambda: not slurm("squeue", "--noheader").strip(), [], "the end of all jobs")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()
            shutil.rmtree(folder)


def test_slurm_job_saves_requeues_and_finishes(cluster, tiny_path, tmp_path):
    """Of three runs the third is cancelled."""
    slurm, folder, daemons = cluster
    (folder / "focal.py").write_text(SCRIPT.format(root=str(ROOT)))
    settings = {"env": "point-robot", "dataset": tiny_path, "total_updates": 200, "width": 16, "save_every": 10_000}
    settings |= {"log_every": 20, "eval_every": 10_000, "final_episodes": 1, "device": "cpu"}
    lines = [" ".join(["python", str(folder / "focal.py"), *flags(settings | {"seed": seed})]) for seed in (1, 2, 3)]
    (folder / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    batch = ["sbatch", "--parsable", "--array=1-3", f"--output={folder}/%a.out", "benchmark/slurm.sh"]
    job = slurm(*batch, folder / "list.txt", "--run-dir", tmp_path).strip()

    def printed(text):
        logs = [folder / f"{k}.out" for k in (1, 2, 3)]
        return all(log.exists() and text in log.read_text() for log in logs)

    def state(k):
        """-> state and number of restarts of job k."""
        words = slurm("scontrol", "--oneliner", "show", "job", f"{job}_{k}").split()
        shown = dict(word.split("=", 1) for word in words if "=" in word)
        return f"{shown['JobState']} {shown['Restarts']}"

    def settled():
        """Whether no job runs or is about to end."""
        return not any(state(k).startswith(("RUNNING", "COMPLETING", "CONFIGURING")) for k in (1, 2, 3))

    wait_for(lambda: printed("update 60 is done"), daemons, "the first updates")
    assert not list(tmp_path.rglob("checkpoint.pt"))
    slurm("scancel", f"{job}_3")
    for k in (1, 2):
        slurm("scontrol", "update", f"JobId={job}_{k}", "TimeLimit=1")  # the script's own --signal=B:USR1@60 is due
    wait_for(settled, daemons, "all runs to be saved")
    assert [state(k) for k in (1, 2, 3)] == ["PENDING 1", "PENDING 1", "CANCELLED 0"]
    run_dirs = [next(tmp_path.glob(f"point-robot/focal/seed{seed}-*")) for seed in (1, 2, 3)]
    assert [load(run_dir)["steps"]["policy"] for run_dir in run_dirs] == [60, 60, 60]
    for k in (1, 2):  # Slurm would wait for two minutes; at once would be too early, its node still refuses the jobs
        slurm("scontrol", "update", f"JobId={job}_{k}", "TimeLimit=60", "StartTime=now+5seconds")
    ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: all(state(k).startswith(ended) for k in (1, 2, 3)), daemons, "the rest of the runs")
    assert [state(k) for k in (1, 2, 3)] == ["COMPLETED 1", "COMPLETED 1", "CANCELLED 0"]
    assert sorted(tmp_path.glob("point-robot/focal/seed*")) == run_dirs
    assert [json.loads((run_dir / "result.json").read_text())["step"] for run_dir in run_dirs[:2]] == [200, 200]
