"""Shared by all tests: datasets so small that they are collected in seconds, programs as a user starts them, and
readers of what they leave behind."""

import cmath
import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import data_collect  # noqa: E402

pytest.register_assert_rewrite("actor_critic_suite")

TINY = {"train_tasks": 6, "test_tasks": 3, "total_updates": 200, "episodes": 8, "test_episodes": 3}
TINY_WALKER = {"train_tasks": 3, "test_tasks": 2, "total_updates": 40, "episodes": 5, "test_episodes": 3, "rows": 4}
TINY_WALKER |= {"updates_per_step": 20, "width": 16, "ood_contexts": 2, "batch_size": 32}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """By the programs that tests start, too, where the tests themselves run under nohup or in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


# ---- data that tells where it comes from ------------------------------------------------

NUMBERED_TASKS, NUMBERED_EPISODES = 9, 4  # of which tasks 6 to 8 are test tasks


@pytest.fixture(scope="session")
def numbered_path(tmp_path_factory):
    """A point-robot file whose rewards are numbers: 1000 task + 100 episode + step, negative in the foreign contexts,
    where the hundreds count the context. Episodes have 7 to 20 steps; every other one terminated."""
    tasks, episodes, horizon = NUMBERED_TASKS, NUMBERED_EPISODES, 20
    rng = np.random.default_rng(0)

    def record(prefix, task, sign):
        shape = (len(task), episodes)
        lengths = 7 + (3 * task[:, None] + 5 * np.arange(episodes)) % 14
        number = 1000 * task[:, None, None] + 100 * np.arange(episodes)[:, None] + np.arange(horizon)
        real = np.arange(horizon) < lengths[..., None]
        return {
            prefix + "observations": rng.normal(size=(*shape, horizon + 1, 2)).astype(np.float32),
            prefix + "actions": rng.uniform(-0.9, 0.9, (*shape, horizon, 2)).astype(np.float32),
            prefix + "rewards": (sign * number * real).astype(np.float32),
            prefix + "lengths": lengths.astype(np.int32),
            prefix + "terminated": lengths % 2 == 0,
            prefix + "behavior_step": np.full(shape, 100, np.int32),
        }

    params, _, _ = data_collect.FAMILIES["point-robot"].draw()
    test_ids = np.arange(6, tasks)
    arrays = record("", np.arange(tasks), 1) | record("ood_", test_ids, -1)
    arrays |= {"task_params": params[:tasks], "train_ids": np.arange(6), "test_ids": test_ids}
    arrays |= {"random_returns": np.full(tasks, -20.0), "expert_returns": np.full(tasks, -5.0)}
    arrays["ood_behavior_task"] = np.tile([0, 2, 4, data_collect.RANDOM], (len(test_ids), 1)).astype(np.int32)
    arrays["ood_distance"] = np.array([[*(math.dist(params[v], params[i]) for i in (0, 2, 4)), -1] for v in test_ids])
    header = {"format_version": data_collect.FORMAT_VERSION, "env": "point-robot", "settings": {"seed": 0}}
    path = tmp_path_factory.mktemp("numbered") / "point-robot.npz"
    np.savez(path, **arrays, header=np.array(json.dumps(header)))
    return path


@pytest.fixture(scope="session")
def numbered(numbered_path):
    return data_collect.load_dataset("point-robot", numbered_path)


def origin(rew):
    """Rewards of the numbered file, any shape, without padding -> task, episode or context, step, all of that shape;
    those of foreign contexts negative in `rew`."""
    number = rew.abs().round().long()
    return number // 1000, number // 100 % 10, number % 100


# ---- recomputations ---------------------------------------------------------------------


def task_distance(env, one, two):
    """How far apart the parameters of two tasks are: an angle in the families of directions, else a straight line."""
    if env in ("ant-dir", "ant-dir-full"):
        return abs(cmath.phase(complex(*one) / complex(*two)))
    return math.dist(one, two)


def pattern(shape):
    """Numbers in [-1.5, 1.5] that stand for a draw from the standard normal."""
    return torch.linspace(-1.5, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)


@pytest.fixture
def known_noise(monkeypatch):
    """Every standard normal draw is `pattern` of its shape, every uniform one `uniform` of it."""
    monkeypatch.setattr(torch, "rand_like", lambda x: uniform(x.shape).to(x.dtype))
    monkeypatch.setattr(torch, "randn_like", lambda x, **_: pattern(x.shape).to(x.dtype))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: pattern(tuple(np.ravel(shape))))


def slow_layers(net, x):
    """Linear layers with ReLU between them, at one input."""
    *hidden, last = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    for layer in hidden:
        x = layer.weight @ x + layer.bias
        x = torch.where(x > 0, x, 0.0)
    return last.weight @ x + last.bias


def slow_net(net, *inputs):
    """An MLP of the scripts at one row: layer norm and ReLU between linear layers, on [inputs]; the last input is z."""
    first, second, last = [layer for layer in net.net if isinstance(layer, torch.nn.Linear)]
    h = torch.cat(inputs)
    for layer in (first, second):
        h = layer.weight @ h + layer.bias
        h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
        h = torch.where(h > 0, h, 0.0)
    return last.weight @ h + last.bias


def slow_twin(twin, *inputs):
    """A Twin at one row -> the outputs of its two networks."""
    one, other = twin.nets
    return [slow_net(one, *inputs), slow_net(other, *inputs)]


# ---- a GPU without a GPU ----------------------------------------------------------------
#
# Fake CUDA tensors (torch's FakeTensorMode) would do, but a CPU build of torch can neither index nor differentiate
# them: both ask for CUDA's device guard. Tensors on the device "meta", which have no values at all, show the same.


class OnDevice(TorchDispatchMode):
    """Every operation inside must be given tensors of the device "meta" alone (numbers as 0-d CPU tensors are welcome,
    as on a GPU), and none may need a value on the host: .item(), a boolean index, torch.multinomial's checks."""

    READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "multinomial"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if x.device.type != "meta" and x.dim() > 0]
        if any(x.device.type == "meta" for x in tensors):
            assert not strangers, f"{name}: a tensor was left on the CPU"
            assert name not in self.READS, f"{name} reads from the device"
            assert torch.device(kwargs.get("device") or "meta").type == "meta", f"{name} copies from the device"
        return func(*args, **kwargs)


def uniform(shape):
    """Numbers in [0.1, 0.9] that stand for a uniform draw."""
    return 0.5 + pattern(shape) * 0.8 / 3


def to_meta(module):
    """Move an agent to "meta"; its optimizers, torch's own fused kernels, do nothing there."""
    for value in vars(module).values():
        if isinstance(value, torch.optim.Optimizer):
            value.step = value.zero_grad = lambda *_, **__: None
    return module.to("meta")


def dataset_on_meta(data):
    """A copy of a Dataset with all its tensors on "meta"."""
    copy = object.__new__(type(data))
    move = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    vars(copy).update({name: move(value) for name, value in vars(data).items()} | {"device": torch.device("meta")})
    return copy
