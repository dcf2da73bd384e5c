"""Random damage, random commands, random interruption: nothing may end in a traceback, be lost or be wrong silently.

    python tests/fuzz.py [datasets|policies|arguments|checkpoints|kills|disk ..] [--seed N] [--count N] [--case I]

datasets     damaged copies of a small dataset file: load_dataset refuses them in one line or gives data to work with;
             content that its checks claim to see is refused
policies     damaged policies.pt files: a collection refuses them in one line or writes the file of the undamaged one
arguments    random command lines of all programs: one line, or a run of a few updates
checkpoints  one flipped bit: refused in one line, or read as the same content; one wrong field: refused, or the run
             continues as the undamaged one
kills        programs killed by a signal at any moment, and continued: the same bytes as without the signal
disk         full and read-only disks (mounted: needs root), closed pipes: one line, and a run that can be continued
             to the same bytes

Case I of a part is made from (seed, I) alone: `--case I` repeats it. pytest does not collect this file. Exit code 1
when something was found; every finding is one line.
"""

import argparse
import collections
import functools
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import typing
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data_collect as dc  # noqa: E402

SCRIPTS = ["flora", "focal", "focal_pp", "unicorn", "corro", "csro", "er_trl", "idaq", "macaw", "meta_dt"]
PROGRAMS = ["data_collect", *SCRIPTS]
TINY = {"env": "point-robot", "train_tasks": 4, "test_tasks": 2, "total_updates": 200, "rows": 16, "width": 32}
TINY |= {"updates_per_step": 10, "batch_size": 64, "episodes": 4, "test_episodes": 2, "ood_contexts": 2}
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 2, "log_every": 1, "eval_every": 1, "save_every": 1}
SMALL |= {"eval_episodes": 1, "final_episodes": 1, "meta_batch": 3, "batch_size": 4, "context_size": 4, "width": 8}
MORE = {"corro": {"negatives": "generative"}, "macaw": {"latent": 6, "head_width": 8}, "focal": {"divergence": "dual"}}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MEMORY = 4 * 2**30  # bytes that a case may ask for
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


class Finding(Exception):
    """kind, what was seen."""


# ---- running something and judging how it ended -----------------------------------------


class Child:
    """call() in a forked process, as a program would run it whose imports are done; has what is used of Popen."""

    def __init__(self, call, folder=".", seconds=60):
        self.errors, (read, write) = tempfile.TemporaryFile(), os.pipe()
        sys.stdout.flush()
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            os.close(write)
            self.stdout = open(read, errors="replace")
            return
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(seconds)
            os.chdir(folder)
            os.dup2(write, 1)
            os.dup2(self.errors.fileno(), 2)
            os.closerange(3, 100)
            code = self.end_of(call)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def end_of(self, call):
        """-> exit code."""
        try:
            call()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            return 99
        return 0

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self):
        out = self.stdout.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.stdout.close()
        with self.errors as file:
            file.seek(0)
            return out, file.read().decode(errors="replace")


def isolated(call, seconds=30):
    """-> exit code, stdout, stderr of call() as a program."""
    child = Child(call, seconds=seconds)
    out, err = child.communicate()
    return child.returncode, out, err


def judge(code, err, allowed=()):
    """-> "done", "refused" (one line) or "slow"; anything else is a Finding."""
    last = (err.strip().splitlines() or ["nothing"])[-1][:200]
    if "Traceback" in err or code == 99:
        raise Finding("traceback", last)
    if code == -signal.SIGALRM:
        return "slow"
    if code == 2 and "--help" in err:  # tyro's own answer
        return "refused"
    if code not in (0, 1, *allowed):
        raise Finding(f"exit code {code}", last)
    if err.count("\n") != (code != 0) or len(err) > 1500 or (code and not err.strip()):
        raise Finding("not one line", f"code {code}, {err.count(chr(10))} lines, {len(err)} characters: {last}")
    return "done" if code == 0 else "refused"


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(name, words):
    """A program as from the command line, in this process."""
    sys.argv = [f"{name}.py", *words]
    if name == "data_collect":
        with dc.one_line_faults():
            return dc.collect(dc.tyro.cli(dc.Args, args=words))
    script = importlib.import_module(name)
    return dc.command_line(script.Args, script.train, script.__doc__, words)


def same(one, two):
    """The same types, tensors and numbers in two nested structures, bit for bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()
    return one == two or one != one and two != two


def outcome_of(run_dir):
    """What a run left that must not depend on interruptions."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    result = json.loads((run_dir / "result.json").read_text())
    result = {k: v for k, v in result.items() if k not in ("run_dir", "updates_per_sec", "cpu_s")}
    state = {k: saved[k] for k in ("agent", "opts", "generator", "rng", "steps", "rows")}
    return {"metrics": (run_dir / "metrics.csv").read_bytes(), "result": result} | state


def compare(one, two):
    parts = [key for key in two if not same(one[key], two[key])]
    if parts:
        raise Finding("other bits", ", ".join(parts))


@functools.cache
def tiny():
    """The small dataset file."""
    path = FOLDER / "tiny" / "point-robot.npz"
    ended = isolated(lambda: command("data_collect", flags(TINY | {"out": path})), 100)
    assert ended[0] == 0, ended
    return path


@functools.cache
def trained(name, **changes):
    """Run directory of a short run of a script."""
    folder = FOLDER / f"{name}{len(changes)}"
    settings = SMALL | MORE.get(name, {}) | {"dataset": tiny(), "run_dir": folder} | changes
    ended = isolated(lambda: command(name, flags(settings)), 100)
    assert ended[0] == 0, ended
    return next(folder.glob("*/*/*"))


def fresh(name):
    """An empty folder for a case."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    (FOLDER / name).mkdir()
    return FOLDER / name


# ---- damage -----------------------------------------------------------------------------


def damage_bytes(content, rng):
    """-> damaged bytes, what was done."""
    content, place, kind = bytearray(content), int(rng.integers(len(content))), rng.integers(8)
    if kind == 0:
        return content[:place], f"cut at {place}"
    if kind == 1:
        size = int(rng.integers(1, 2000))
        content[place : place + size] = bytes(len(content[place : place + size]))
        return content, f"{size} zeros at {place}"
    if kind == 2:
        return content[:place] + rng.bytes(int(rng.integers(1, 50))) + content[place:], f"bytes inserted at {place}"
    if rng.random() < 0.5:  # the zip's table of contents breaks in the most ways
        place = int(rng.integers(max(0, len(content) - 2000), len(content)))
    content[place] ^= 1 << int(rng.integers(8))
    return content, f"bit flipped at {place}"


LONG, LINES = "x" * 100_000, "two\nlines\r" * 3
WRONG = [None, "text", LONG, LINES, float("nan"), float("inf"), -1, 0, 7, 10**30, 1e300, True, [], {}, [1, {}]]


def damage_field(saved, rng):
    """One field of a nested structure (of dicts, lists, numbers and tensors) becomes a wrong one -> what was done,
    whether the field is still of the same kind, so that nobody can tell that it is wrong."""
    at, path = saved, []
    while True:
        key = list(at)[rng.integers(len(at))] if isinstance(at, dict) else int(rng.integers(len(at)))
        path.append(key)
        if not (isinstance(at[key], (dict, list)) and at[key]) or rng.random() < 0.25:
            break
        at = at[key]
    old, kind = at[key], rng.integers(8)
    if kind == 0:
        del at[key]
        return f"{path} deleted", False
    if kind == 1 and isinstance(at, dict):
        at["another"] = old
        return f"{path[:-1]} gets another key", False
    if isinstance(old, torch.Tensor) and kind < 6:
        nan = torch.full(old.shape, float("nan") if old.is_floating_point() else 255, dtype=torch.double)
        changes = [old[..., None], torch.zeros(3), old.to(torch.int8), nan, nan.to(old.dtype), old.new_zeros(0)]
        choice = rng.integers(len(changes))
        at[key] = changes[choice]
        return f"{path} a tensor, change {choice}", at[key].dtype == old.dtype and at[key].shape == old.shape
    at[key] = WRONG[rng.integers(len(WRONG))]
    return f"{path} = {str(at[key])[:12]!r}", type(at[key]) is type(old) and not isinstance(old, (dict, list))


def damage_array(arrays, rng):
    """One array becomes a wrong one -> what was done, whether load_dataset must see it (None: it may be fine)."""
    key = list(dc.FILE_LAYOUT)[rng.integers(len(dc.FILE_LAYOUT))]
    array, kind = arrays[key], rng.integers(9)
    if kind == 0:
        dtypes = ["f2", "f4", "f8", "i1", "i4", "u8", "bool", "c8", "U8", "S3", ">f4", "O"]
        dtype = np.dtype(dtypes[rng.integers(len(dtypes))])
        arrays[key] = array.astype(dtype)
        return f"{key} as {dtype}", dtype != array.dtype
    if kind == 1:
        axis = int(rng.integers(array.ndim))
        changes = [array[None], array.ravel(), array.take(range(array.shape[axis] - 1), axis), array[:0]]
        changes += [np.repeat(array, 2, axis), array.reshape(-1)[:1].reshape(()), array.T, array[..., None]]
        new = changes[rng.integers(len(changes))]
        arrays[key] = new
        return f"{key} of shape {new.shape}", True if new.shape != array.shape and key != "train_ids" else None
    if kind == 2:
        del arrays[key]
        return f"{key} deleted", True
    if kind == 3:
        arrays[f"{key}_more"] = array
        return f"{key} twice", None
    if array.dtype.kind == "b":
        array[rng.random(array.shape) < 0.1] ^= True
        return f"{key} flipped", None
    place = tuple(rng.integers(array.shape))
    if array.dtype.kind == "f":
        values = [np.nan, np.inf, -np.inf, 1e38, 2e6, -1e6, 1.001, -1e5, 0.1]
        choice = rng.integers(len(values))
        array[place] = values[choice]
        must = choice < 6 or (choice < 8 and ("actions" in key or key == "task_params"))
        must |= key in ("random_returns", "expert_returns") and choice != 7 or key == "ood_distance"
        return f"{key}{place} = {values[choice]}", must or None
    values = [-3, -2, -1, 0, 1, 5, 6, 21, 2**31 - 1, -(2**31)]
    old, new = int(array[place]), values[rng.integers(len(values))]
    array[place] = new
    if "lengths" in key:
        must = not 0 <= new <= 20 or (old > 0) != (new > 0)
    elif "behavior_step" in key:
        must = (old == -1) != (new == -1)
    elif "behavior_task" in key:
        must = not (new == -2 or 0 <= new < 6) or (old == -2) != (new == -2)
    else:
        must = new != old  # every id is in one of the two lists
    return f"{key}{place} = {new}", must or None


def contradict(arrays, rng):
    """Content that is well-formed and cannot be true -> what was done, True."""
    kind = rng.integers(6)
    if kind == 0:
        arrays["expert_returns"], arrays["random_returns"] = arrays["random_returns"], arrays["expert_returns"]
    elif kind == 1:
        arrays["test_ids"][0] = arrays["train_ids"][0]
    elif kind == 2:
        arrays["task_params"] = rng.uniform(-1, 1, arrays["task_params"].shape)
    elif kind == 3:
        arrays["lengths"][arrays["train_ids"][rng.integers(4)]] = 0
    elif kind == 4:
        arrays["behavior_step"][:] = dc.NO_EPISODE
    else:
        arrays["random_returns"] = arrays["expert_returns"].copy()
    return f"contradiction {kind}", True


def damage_header(text, rng):
    """-> another header as text or array, what was done, whether load_dataset must see it."""
    kind, header, wrong = rng.integers(8), json.loads(text), WRONG[rng.integers(len(WRONG))]
    deep = "[" * 400 + "]" * 400, "[" * 100_000 + "]" * 100_000
    if kind == 0:
        bad = ["", "{", "null", "[]", "3", '"text"', "NaN", LONG, *deep, text[:-1], text.replace(":", ";"), "\ud800"]
        choice = rng.integers(len(bad))
        return bad[choice], f"header text {choice}", True
    if kind == 1:
        bad = [np.array(b"{}"), np.array([text, text]), np.zeros((2, 0)), np.array(3.5), np.array([text])]
        choice = rng.integers(len(bad))
        return bad[choice], f"header array {choice}", None if choice == 4 else True
    if kind == 2:
        return text.replace('"settings": {', f'"settings": {deep[0]}, "old": {{'), "settings nested", True
    if kind == 3:
        odd = ['"\\ud800\\u0000\\n"', "NaN", "-Infinity", "9" * 4000, "9" * 5000, deep[0], '{"a": 1, "a": 2}']
        choice = rng.integers(len(odd))
        must = choice in (1, 2, 4) or None
        return text.replace('"settings": {', f'"note": {odd[choice]}, "settings": {{'), f"note {choice}", must
    key = ["format_version", "env", "settings", "versions"][kind - 4]
    if rng.random() < 0.2:
        del header[key]
    else:
        header[key] = wrong
    text = json.dumps(header)
    return text, f"header {key} {str(wrong)[:12]!r} or deleted", None if key == "versions" else True


def damage_member(path, rng):
    """A member of the zip that is no array -> what was done, True."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    name, kind = list(members)[rng.integers(len(members))], rng.integers(7)
    good = members[name]
    shape = ["(4000000000, 1000)", "(-5,)", "(10**9,)", "(3", "(" * 200 + ")" * 200, "(True,)", "(9999999,)"]
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': " + shape[kind] + ", }"
    npy = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(100)
    changes = [npy, b"no array", b"", b"\x93NUMPY\x09\x00" + good[8:], good[:-1], good[:40], b"\x93NUMPY" + bytes(60)]
    choice = rng.integers(len(changes))
    members[name] = changes[choice]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)
    if rng.random() < 0.2:  # a bomb: its size as the table of contents declares it
        content = bytearray(path.read_bytes())
        entry = content.rindex(b"PK\x01\x02")
        content[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
        path.write_bytes(content)
    return f"member {name} change {choice} {kind}", True


# ---- the parts: case number, generator -> outcome, or a Finding -------------------------


def use(path):
    """Load a file, work with the data, print a digest of them."""
    data = dc.load_dataset("point-robot", path)
    digest = [data.episodes, data.lengths, data.ood_episodes, data.ood_lengths, data.obs_mean, data.obs_spread]
    digest += [data.task_params, data.train_ids, data.test_ids, data.random_returns, data.expert_returns]
    digest = [np.asarray(x).tobytes() for x in (*digest, data.ood_behavior_task, data.ood_distance)]
    print(hash(tuple(digest)), json.dumps(data.header, indent=1, allow_nan=False))

    def adapt(context, mask, explore):
        return lambda obs, rew: torch.zeros(len(obs), 2)

    results = dc.evaluate(data, adapt, dc.PROTOCOLS, 1) | dc.embedding_quality(data, lambda c, m: c.mean(1)[:, :3])
    source = torch.Generator().manual_seed(0)
    batch = data.sample_batch(data.sample_tasks(4, source), 4, source, 0.25)
    segment = data.sample_segments(data.sample_tasks(4, source), 4, 3, 0.9, source)
    context = data.sample_context(data.sample_tasks(4, source), 4, source)
    assert all(np.isfinite(v) for v in results.values())
    assert all(x.isfinite().all() for x in (*batch, *segment, context))


@functools.cache
def used():
    return isolated(lambda: use(tiny()))


def datasets(case, rng):
    path, must, kind = FOLDER / "case.npz", None, rng.integers(10)
    shutil.copy(tiny(), path)
    with np.load(path) as file:
        arrays = dict(file)
    if kind < 3:
        content, what = damage_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
    elif kind == 3:
        what, must = damage_member(path, rng)
    else:
        if kind < 7:
            what, must = damage_array(arrays, rng)
        elif kind == 7:
            what, must = contradict(arrays, rng)
        else:
            arrays["header"], what, must = damage_header(str(arrays["header"]), rng)
        np.savez_compressed(path, **arrays)
    code, out, err = isolated(lambda: use(path))
    try:
        ended = judge(code, err)
        if code == 1 and str(path) not in err:
            raise Finding("file not named", err.strip()[:100])
        if code == 0 and (must or (kind < 3 and out != used()[1])):
            raise Finding("silent", "accepted")
    except Finding as found:
        raise Finding(found.args[0], f"{what}: {found.args[1]}")
    return ended


@functools.cache
def collections_to_damage():
    """Content of policies.pt, after and in the middle of the training, and the bytes of the dataset file."""
    half = fresh("half")

    def cut():
        save, count = dc.atomic_save, [0]

        def counted(path, write):
            save(path, write)
            count[0] += path.suffix == ".pt"
            if count[0] == 8:
                os._exit(0)

        dc.atomic_save = counted
        command("data_collect", flags(TINY | {"out": "half/point-robot.npz"}))

    isolated(cut)
    shutil.copytree(half, FOLDER / "whole")
    ended = isolated(lambda: command("data_collect", flags(TINY | {"out": "whole/point-robot.npz"})))
    assert ended[0] == 0, ended
    with np.load(FOLDER / "whole" / "point-robot.npz") as file:
        arrays = dict(file)
    return [(FOLDER / name / "point-robot.policies.pt").read_bytes() for name in ("whole", "half")], arrays


def policies(case, rng):
    contents, wanted = collections_to_damage()
    folder = fresh("policies")
    content = contents[rng.integers(2)]
    if rng.random() < 0.4:
        content, what = damage_bytes(content, rng)
        plain = False
    else:
        saved = torch.load(io.BytesIO(content), weights_only=True)
        (what, plain), buffer = damage_field(saved, rng), io.BytesIO()
        torch.save(saved, buffer)
        content = buffer.getvalue()
    (folder / "point-robot.policies.pt").write_bytes(content)
    code, _, err = isolated(lambda: command("data_collect", flags(TINY | {"out": "policies/point-robot.npz"})))
    try:
        ended = judge(code, err)
        if code == 0:
            with np.load(folder / "point-robot.npz") as file:
                keys = [k for k in wanted if k != "header" and not np.array_equal(wanted[k], file[k])]
            if keys and plain:
                return "another number"
            if keys:
                raise Finding("silent", f"accepted, other {keys[0]}")
    except Finding as found:
        raise Finding(found.args[0], f"{what}: {found.args[1]}")
    return ended


INTS = ["0", "1", "2", "3", "5", "17", "-1", "-7", str(2**20), str(2**20 + 1), str(2**31), str(2**63), "9" * 30]
INTS += ["1.5", "nan", "", "1_0", " 3", "0x10", "\u0663", "9" * 5000, "None"]
FLOATS = ["0", "-0.0", "1", "0.5", "0.999", "1e-300", "1e300", "1e6", "1000001", "nan", "inf", "-inf", "1e400", "-3"]
FLOATS += ["", "True", "one", "1e-8", "None", "0,5"]
TEXTS = ["", "\0", "a\0b", "\udcff", "a\nb", "x" * 300, LONG, "../up", "/", "/proc/nowhere", "-", "--", "--lr", "~"]
TEXTS += ["\u00e9", ".", "..", "None", "tiny/point-robot.npz", "new/x.npz", "\x1b[31m", "tiny/point-robot.npz/x"]


def random_words(name, rng):
    """A command line of a program, most of it right."""
    program = dc if name == "data_collect" else importlib.import_module(name)
    kinds = {field.name: typing.get_type_hints(program.Args)[field.name] for field in fields(program.Args)}
    settings = dict(TINY, out="new/point-robot.npz") if program is dc else SMALL | MORE.get(name, {})
    settings |= {} if program is dc else {"dataset": "tiny/point-robot.npz", "total_updates": 1}
    settings, alone = {flags({k: ""})[0]: str(v) for k, v in settings.items()}, []
    for _ in range(rng.integers(1, 5)):
        key = list(kinds)[rng.integers(len(kinds))]
        flag, options = flags({key: ""})[0], typing.get_args(kinds[key]) or (kinds[key],)
        runs = [str(trained(other)) for other in SCRIPTS]
        if key == "compile":  # would take a minute
            continue
        if key == "resume":
            values = [*runs, *[r + "/checkpoint.pt" for r in runs[:2]], *TEXTS]
            settings[flag] = values[rng.integers(len(values))]
        elif bool in options:
            alone.append(flag if rng.random() < 0.5 else "--no" + flag[1:])
        elif float in options or int in options:
            values = FLOATS if float in options else INTS
            values = values + [str(v) for option in options for v in typing.get_args(option)]  # names beside numbers
            settings[flag] = values[rng.integers(len(values))]
        elif str in options:
            settings[flag] = TEXTS[rng.integers(len(TEXTS))]
        else:
            values = [str(v) for option in options for v in typing.get_args(option) or (option,)] + ["wrong", "", "\n"]
            settings[flag] = values[rng.integers(len(values))]
    words = [word for pair in settings.items() for word in pair] + alone
    if rng.random() < 0.12:
        place = int(rng.integers(len(words)))
        words[place : place + 1] = [[], [words[place][:-1]], [words[place], TEXTS[rng.integers(len(TEXTS))]]][place % 3]
    return words


def arguments(case, rng):
    name = PROGRAMS[case % len(PROGRAMS)]
    words = random_words(name, rng)
    shutil.rmtree(FOLDER / "new", ignore_errors=True)
    code, _, err = isolated(lambda: command(name, words), 10)
    try:
        return judge(code, err)
    except Finding as found:
        shown = [w if len(w) < 50 else w[:5] + f"..{len(w)}" for w in words]
        raise Finding(found.args[0], f"{name} {shown}: {found.args[1]}")


@functools.cache
def continued(name):
    """What an undamaged run leaves when it is continued by one update."""
    run_dir = shutil.copytree(trained(name), fresh("continued") / "run")
    ended = isolated(lambda: command(name, ["--resume", str(run_dir), "--total-updates", "3"]))
    assert ended[0] == 0, ended
    return outcome_of(run_dir)


def checkpoints(case, rng):
    name = SCRIPTS[case % len(SCRIPTS)]
    run_dir = shutil.copytree(trained(name), fresh("checkpoints") / "run")
    path, args_class = run_dir / "checkpoint.pt", importlib.import_module(name).Args
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    try:
        if case % 7 < 5:
            place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            what = f"{name}: bit {bit} of byte {place}"

            def load():
                print(int(same(dc.load_checkpoint(run_dir, args_class), saved)))

            code, out, err = isolated(load)
            ended = "bit " + judge(code, err)
            if code == 0 and out != "1\n":
                raise Finding("silent", "accepted")
        else:
            what, plain = damage_field(saved, rng)
            what = f"{name}: {what}"
            torch.save(saved, path)
            code, _, err = isolated(lambda: command(name, ["--resume", str(run_dir), "--total-updates", "3"]))
            ended = "field " + judge(code, err)
            if code == 0 and plain:
                return "field another number"
            if code == 0:
                compare(outcome_of(run_dir), continued(name))
    except Finding as found:
        raise Finding(found.args[0], f"{what}: {found.args[1]}")
    return ended


# ---- programs as processes --------------------------------------------------------------


def start(name, words, folder, cold=False, stdout=subprocess.PIPE):
    """A running program; cold: with its imports and Python's own end, which takes five times as long."""
    if not cold:
        return Child(lambda: command(name, words), folder)
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{name}.py"), *words],
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # or Ctrl-C is ignored in the background
    )


def program(name):
    """Words of a run of about a second besides the imports."""
    if name == "data_collect":
        return flags(TINY | {"total_updates": 600, "out": "out/point-robot.npz"})
    longer = {"total_updates": 40, "log_every": 5, "eval_every": 20, "save_every": 10, "run_dir": "runs"}
    return flags(SMALL | MORE.get(name, {}) | longer | {"dataset": tiny()})


def continue_words(name, folder):
    """The command that continues what lies in `folder`."""
    run_dirs = sorted(folder.glob("runs/*/*/*/checkpoint.pt"))
    return ["--resume", str(run_dirs[-1].parent)] if run_dirs else program(name)


def left_behind(name, folder):
    if name == "data_collect":
        return {"file": (folder / "out" / "point-robot.npz").read_bytes()}
    return outcome_of(sorted(folder.glob("runs/*/*/*/result.json"))[-1].parent)


@functools.cache
def straight(name):
    """-> what the uninterrupted run leaves, its seconds."""
    folder, began = fresh(f"straight-{name}"), time.time()
    process = start(name, program(name), folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return left_behind(name, folder), time.time() - began


def finish(name, folder):
    """Continue without disturbance, and compare with the straight run."""
    process = start(name, continue_words(name, folder), folder)
    _, err = process.communicate()
    if judge(process.returncode, err) != "done":
        raise Finding("cannot be continued", err.strip()[:200])
    compare(left_behind(name, folder), straight(name)[0])


def kills(case, rng):
    name, number, cold = PROGRAMS[case % len(PROGRAMS)], SIGNALS[rng.integers(4)], case % 10 == 9
    _, seconds = straight(name)
    folder, when = fresh("kills"), ""
    try:
        for _ in range(1 + rng.integers(2)):
            process = start(name, continue_words(name, folder), folder, cold)
            early, wait = rng.random() < 0.2, float(rng.random()) * seconds
            if not early:
                process.stdout.readline()
            when = f"{'cold ' * cold}{name}, {number.name} {wait:.2f} s after its {'start' if early else 'first line'}"
            time.sleep(wait)
            process.send_signal(number)
            out, err = process.communicate()
            code, finished = process.returncode, "eval " in out or "wrote " in out
            if cold and early and not out and "KeyboardInterrupt" in err:
                continue  # Python's own answer in the imports
            if code == -signal.SIGALRM:
                raise Finding("hangs", "")
            # before its first and after its last line a program has no answer of its own
            own = number != signal.SIGKILL and not (early or finished)
            if code not in ((0, 128 + number) if own else (0, 128 + number, -number)):
                raise Finding(f"exit code {code}", (err.strip().splitlines() or [""])[-1][:200])
            if "Traceback" in err or "Exception ignored" in err or err.count("\n") > 1:
                raise Finding("traceback", err.strip()[-200:].replace("\n", " | "))
        finish(name, folder)
    except Finding as found:
        raise Finding(found.args[0], f"{when}: {found.args[1]}")
    return number.name


def disk(case, rng):
    name, kind = PROGRAMS[case % len(PROGRAMS)], ["full", "read-only", "pipe", "full output"][case // len(PROGRAMS) % 4]
    folder = fresh("disk")
    mounted = kind in ("full", "read-only")
    size = int(2 ** rng.uniform(4, 10.5))  # KiB
    if mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder]).returncode:
        return "skipped: no mount"
    try:
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        output = open("/dev/full", "w") if kind == "full output" else subprocess.PIPE
        process = start(name, program(name), folder, not mounted, output)
        if kind == "pipe":
            for _ in range(rng.integers(8)):
                process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
            process.wait()
        else:
            _, err = process.communicate()
        ended = f"{kind} {judge(process.returncode, err)}"
        if mounted:
            subprocess.run(["mount", "-o", "remount,rw,size=64m", folder], check=True)
        finish(name, folder)
    except Finding as found:
        raise Finding(found.args[0], f"{name}, {kind}, {size} KiB: {found.args[1]}")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder])
    return ended


PARTS = {datasets: 1000, policies: 200, arguments: 1000, checkpoints: 840, kills: 176, disk: 88}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], choices=[[], *(part.__name__ for part in PARTS)])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part")
    parser.add_argument("--case", type=int, help="this case alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    os.chdir(FOLDER)
    for name in SCRIPTS:
        importlib.import_module(name)
    found = 0
    for part, count in PARTS.items():
        if args.parts and part.__name__ not in args.parts:
            continue
        cases = range(args.count or count) if args.case is None else [args.case]
        seen, began, shown = collections.Counter(), time.time(), time.time()
        for done, case in enumerate(cases):
            try:
                seen[part(case, np.random.default_rng([args.seed, case]))] += 1
            except Finding as finding:
                seen[finding.args[0].upper()] += 1
                found += 1
                text = ": ".join(finding.args).encode("ascii", "backslashreplace").decode().replace("\n", "\\n")
                print(f"FOUND {part.__name__} --seed {args.seed} --case {case}: {text}", flush=True)
            if time.time() - shown > 15:
                shown = time.time()
                left = (shown - began) / (done + 1) * (len(cases) - done - 1)
                print(f"[{part.__name__} {done + 1}/{len(cases)}] {dc.duration(left)} left", flush=True)
        print(f"{part.__name__}: {len(cases)} cases: {dict(seen)}", flush=True)
    os.chdir("/")
    shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(int(found > 0))


if __name__ == "__main__":
    main()
