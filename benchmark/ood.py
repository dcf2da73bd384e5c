"""Does z follow the task, or who acted? Ant-Dir's out-of-distribution contexts, read by a linear probe.

Run:  python benchmark/ood.py --runs runs
A probe from z to the direction is fitted on contexts of the training tasks; the table has the cosine of what it reads
to the direction of the task, for contexts of the test task's own data (iid), of the random policy, and of policies made
for another direction (ood); for the last also the cosine to that other direction. Mean ± standard deviation over seeds.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from report import finished_runs, print_table, revisit

import data_collect as dc

COLUMNS = ("iid, to task", "random, to task", "ood, to task", "ood, to behavior")


def cosines(embed, data):
    """embed(context [R, H, ctx_dim], mask [R, H]) -> z [R, z_dim]; returns the columns of the table."""
    directions = torch.as_tensor(data.task_params, dtype=torch.float32)  # [T, 2], cosine and sine of the angle

    def read(episodes, lengths):
        """episodes [.., H, ctx_dim + 1], lengths [..] -> (z, 1) [.., z_dim + 1]."""
        mask = (torch.arange(episodes.shape[-2]) < lengths[..., None]).float()
        z = embed(episodes[..., : data.context_dim].flatten(0, 1), mask.flatten(0, 1)).unflatten(0, lengths.shape)
        return F.pad(z, (0, 1), value=1.0)

    train, test = data.train_ids, data.test_ids
    z = read(data.episodes[train, ::4], data.lengths[train, ::4])  # [U, N, z_dim + 1]
    target = directions[train, None].expand(-1, z.shape[1], -1)
    probe = torch.linalg.lstsq(z.flatten(0, 1), target.flatten(0, 1), driver="gelsd").solution
    recorded = int((data.lengths[test] > 0).sum(1).min())  # episodes of a test task, from all phases
    own = read(data.episodes[test, :recorded], data.lengths[test, :recorded]) @ probe  # [V, N, 2]
    other = read(data.ood_episodes, data.ood_lengths) @ probe  # [V, C, 2]
    behavior = torch.as_tensor(data.ood_behavior_task)  # [V, C]
    foreign, task = behavior >= 0, directions[test, None].expand_as(other)
    values = (
        F.cosine_similarity(own, directions[test, None].expand_as(own), dim=-1),
        F.cosine_similarity(other, task, dim=-1)[~foreign],
        F.cosine_similarity(other, task, dim=-1)[foreign],
        F.cosine_similarity(other, directions[behavior.clamp(min=0)], dim=-1)[foreign],
    )
    return [value.mean().item() for value in values]


def probed(run_dir):
    """-> `cosines` of a finished run."""

    def look(script, agent, data, args):
        if not hasattr(script, "embed"):
            remedy = "write embed(agent, context, mask), as focal.py does, or leave this run out"
            raise SystemExit(f"{run_dir}: {script.__name__}.py has no z to read; {remedy}")
        return cosines(partial(script.embed, agent), data)

    return revisit(run_dir, look)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the --run-dir of the runs")
    folder, rows = parser.parse_args().runs / "ant-dir", []
    for name, seeds in finished_runs(folder).items():
        if name.startswith("known-task"):  # references.py: no z of a context
            continue
        found = [probed(run_dir) for run_dir in seeds.values()]
        cells = [f"{mean:.2f}" for mean in np.mean(found, 0)]
        if len(found) > 1:
            cells = [f"{cell} ± {spread:.2f}" for cell, spread in zip(cells, np.std(found, 0, ddof=1))]
        rows.append([name, str(len(found)), *cells])
    if not rows:
        raise SystemExit(f"no finished run for this in {folder}; make them: see benchmark/README.md")
    print_table(["cosine", "seeds", *COLUMNS], rows)


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
