"""FLORA with the paper's settings instead of ours, also where no flag of flora.py reaches.

Run:  python benchmark/flora_paper.py --env point-robot-wind [flags of flora.py]
Networks have no layer norm, the policy is a network of its own.
Left of the differences in flora.py: W = softmax (D1), log p(y) (D2), z_mean (D4), the KL in closed form (B2), and B5.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402
import flora  # noqa: E402


@dataclass
class Args(flora.Args):
    exp_name: str = "flora-paper"
    n_step: int = 1
    target_noise: float = 1.0
    bc_top_fraction: float = 1.0
    bc_weight_decay: float = 0.0
    lr_decay: bool = False
    kl_coef_lr: float = 1e-4
    bandit_feedback: str = "rollout"


class PlainMLP(flora.MLP):
    """Without layer norm."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.net = nn.Sequential(*(layer for layer in self.net if not isinstance(layer, nn.LayerNorm)))


class Agent(flora.Agent):
    """pi is a network of its own, not pi_beta plus a residual."""

    def policies(self, obs, z):
        """obs [M, B, obs_dim], z [M, z_dim] -> Gaussians of pi and pi_beta."""
        _, pi_beta = super().policies(obs, z)
        mean, log_std = self.residual(obs, z).chunk(2, -1)
        return flora.Gaussian(mean, log_std.clamp(-5, 2)), pi_beta


ENV_DEFAULTS = flora.ENV_DEFAULTS

if __name__ == "__main__":
    flora.MLP, flora.Agent = PlainMLP, Agent
    dc.command_line(Args, flora.train, __doc__, ENV_DEFAULTS)
