"""Cost of an update: time of the training loop without evaluations, arithmetic, dispatched operations, peak memory.

Run:  OMP_NUM_THREADS=1 python benchmark/speed.py focal --env ant-dir --batch-size 256 --context-size 200
Prints one row of a markdown table; everything after the method goes to its script. Peak memory is that of the whole
process, dataset included.
"""

import importlib
import resource
import sys
import tempfile
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent))

METHODS = ("flora", "focal", "unicorn", "corro", "macaw", "meta_dt")
HEADER = "| method | flags | GFLOP | operations | ms | updates/s | peak memory [MB] |\n|---|---|---|---|---|---|---|"
UPDATES = 100


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def run(script, flags, updates):
    """A training of so many updates without evaluations -> its results."""
    results, train = {}, script.train
    script.train = lambda args: results.update(train(args))
    with tempfile.TemporaryDirectory() as folder:
        every = [f"--{what}-every={updates}" for what in ("log", "eval", "save")]
        script.main([*flags, f"--total-updates={updates}", *every, f"--run-dir={folder}"])
    script.train = train
    return results


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in METHODS:
        raise SystemExit(f"usage: python benchmark/speed.py {{{','.join(METHODS)}}} [flags of its script]")
    name, *flags = sys.argv[1:]
    script = importlib.import_module(name)
    script.evaluate_all = lambda *_: {}
    script.eval_line = lambda _: ""
    timed = run(script, flags, UPDATES)
    memory, speed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, timed["updates_per_sec"]

    flops, operations, update = FlopCounterMode(display=False), Operations(), script.update
    calls = iter((False, True))  # the first call also makes the optimizers' state

    def counted(*inputs):
        if not next(calls):
            return update(*inputs)
        with flops, operations:
            return update(*inputs)

    script.update = counted
    run(script, flags, 2)
    cells = [name, " ".join(flags), f"{flops.get_total_flops() / 1e9:.2f}", str(operations.count)]
    print(HEADER)
    print("| " + " | ".join([*cells, f"{1000 / speed:.0f}", f"{speed:.1f}", f"{memory:.0f}"]) + " |")


if __name__ == "__main__":
    main()
