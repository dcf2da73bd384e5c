"""References for the tables: the shared backbone with the TRUE task as z, and cloning, so without any task inference.

Run:  python benchmark/references.py --env ant-dir [flags of focal.py]
Trains focal.py's actor-critic with the task's parameters instead of the encoder, also at test, where no method knows
them. What a method loses against it is lost by inference. Its result.json also has the returns of pi_beta alone
("eval/bc/return"): behavior cloning of the best episodes, or of all data with --bc-top-fraction 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402
import focal  # noqa: E402


load_dataset = dc.load_dataset
ENV_DEFAULTS = focal.ENV_DEFAULTS


@dataclass
class Args(focal.Args):
    exp_name: str = "known-task"

    def __post_init__(self):
        if dc.FAMILIES[self.env].scripted:
            raise SystemExit(f"of {self.env}'s tasks there is nothing but a number to tell; see benchmark/tabular.py")
        self.z_dim = dc.FAMILIES[self.env].draw()[0].shape[1]  # of the true parameters


class Known(nn.Module):
    """Instead of the encoder: reads the task's parameters, which `known_tasks` has written into the context."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, context, mask):
        """context [M, K, ctx_dim], mask [M, K] -> z [M, size]."""
        return context[:, 0, : self.size]


def known_tasks(env, path=None, device="cpu"):
    """The dataset with contexts [M, 1, ctx_dim] that hold the parameters of their task and nothing else, standardized
    over the training tasks: of speeds between 0 and 1 the networks see too little."""
    data = load_dataset(env, path, device)
    if len(data.train_ids) < 2:
        raise SystemExit("the true parameters are standardized over the training tasks: it takes two at least")
    params = torch.as_tensor(data.task_params, dtype=torch.float32, device=data.device)
    params = (params - params[data.train_ids].mean(0)) / params[data.train_ids].std(0)
    data.told = nn.functional.pad(params, (0, data.ctx_dim - params.shape[1]))[:, None]  # [T, 1, ctx_dim]
    data.sample_context = lambda task_ids, size, generator: data.told[task_ids]
    return data


def evaluate_all(agent, data, args, protocols, episodes):
    """Returns with known tasks, which need no context: of iid and train alone."""

    def know(tasks):
        told = data.told[torch.as_tensor(tasks).repeat_interleave(episodes)]
        return told, torch.ones_like(told[..., 0])

    train, test = know(data.train_ids[:10]), know(data.test_ids)
    pi, pi_beta = (lambda *_, bc=bc: focal.adapt(agent, *test, bc=bc) for bc in (False, True))
    q = lambda context, mask, obs: focal.value(agent, args, *test, obs)  # noqa: E731
    results = dc.evaluate_actor_critic(data, pi, q, args.gamma, ("iid",), episodes, pi_beta)
    return results | dc.evaluate(data, lambda *_: focal.adapt(agent, *train), ("train",), episodes)


if __name__ == "__main__":
    focal.Encoder, focal.evaluate_all = (lambda ctx_dim, z_dim, width: Known(z_dim)), evaluate_all
    dc.load_dataset = known_tasks
    dc.command_line(Args, focal.train, __doc__, ENV_DEFAULTS)
