"""Cost of an update: CPU time of one thread, arithmetic, dispatched operations, peak memory.

Run:  python benchmark/speed.py focal --env ant-dir --batch-size 256 --context-size 200
Prints one row of a markdown table; everything after the method goes to its script. The time is the median from one
update to the next, drawing the batch included; CPU time, so that other programs on the machine count little. Peak
memory is that of the whole process, dataset included.
"""

import importlib
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

METHODS = ("flora", "focal", "focal_pp", "unicorn", "corro", "csro", "er_trl", "idaq", "gentle", "macaw", "meta_dt")
HEADER = "| method | flags | GFLOP | operations | CPU time [ms] | peak memory [MB] |\n|---|---|---|---|---|---|"
UPDATES = 100


class Counter(TorchDispatchMode):
    """Counts the operations that reach the device, and their floating-point operations."""

    operations = flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def run(script, flags, updates):
    """A training of so many updates without evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        every = [f"--{what}-every={updates}" for what in ("log", "eval", "save")]
        settings = [*flags, "--device=cpu", f"--total-updates={updates}", *every, f"--run-dir={folder}"]
        dc.command_line(script.Args, script.train, script.__doc__, arguments=settings)


def main():
    usage = f"usage: python benchmark/speed.py {{{','.join(METHODS)}}} [flags of its script]"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(usage)
    if len(sys.argv) < 2 or sys.argv[1] not in METHODS:
        raise SystemExit(usage)
    torch.set_num_threads(1)
    name, *flags = sys.argv[1:]
    script, stamps = importlib.import_module(name), []
    script.evaluate_all, update = (lambda *_: {}), script.update
    counter = Counter()

    def timed(*inputs):
        stamps.append(time.process_time())
        return update(*inputs)

    def counted(*inputs):
        stamps.append(time.process_time())
        if len(stamps) % 2:  # the first call also makes the optimizers' state
            return update(*inputs)
        with counter:
            return update(*inputs)

    script.update = timed
    run(script, flags, UPDATES)
    seconds = np.median(np.diff(stamps))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stamps.clear()
    script.update = counted
    run(script, flags, 2)
    cells = [name, " ".join(flags), f"{counter.flops / 1e9:.1f}", str(counter.operations)]
    print(HEADER)
    print("| " + " | ".join([*cells, f"{1000 * seconds:.0f}", f"{memory:.0f}"]) + " |")


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
