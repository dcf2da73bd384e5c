"""The ceiling of augmented contexts: FLORA that trains on contexts of other tasks' transitions with its own rewards.

Run:  python benchmark/relabelled.py --env point-robot --total-updates 1000 [flags of flora.py]
Half of the training contexts are recorded on another training task and get the TRUE rewards of the task at hand, which
no method knows. Only where the reward is a function of the next observation: point-robot, sparse-point-robot.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402
import flora  # noqa: E402

load_dataset = dc.load_dataset


@dataclass
class Args(flora.Args):
    exp_name: str = "flora-relabelled"

    def __post_init__(self):
        if self.env not in ("point-robot", "sparse-point-robot"):
            raise SystemExit(f"the rewards of {self.env} are no function of the next observation")


def relabelled(env, path=None, device="cpu"):
    """The dataset, with half of the contexts from other tasks."""
    data = load_dataset(env, path, device)
    sample_context = data.sample_context
    params = torch.as_tensor(data.task_params, dtype=torch.float32, device=data.device)
    column = data.obs_dim + data.act_dim

    def sample(task_ids, size, generator):
        recorded_on = data.sample_tasks(len(task_ids), generator)
        own, other = sample_context(task_ids, size, generator), sample_context(recorded_on, size, generator)
        next_obs = other[..., column + 1 :] * data.obs_std + data.obs_mean
        other[..., column] = data.family.reward(next_obs, other[..., data.obs_dim : column], params[task_ids, None])
        half = torch.rand(len(task_ids), device=data.device, generator=generator) < 0.5
        return torch.where(half[:, None, None], other, own)

    data.sample_context = sample
    return data


if __name__ == "__main__":
    dc.load_dataset = relabelled
    dc.command_line(Args, flora.train, __doc__, flora.ENV_DEFAULTS)
