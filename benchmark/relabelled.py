"""FLORA with relabelled contexts: half of them are episodes of any task with the predicted rewards of the task at hand.

Run:  python benchmark/relabelled.py --env ant-dir [flags of flora.py]

FLORA's own contexts of a task are all recorded by that task's policy, so z may tell who acted instead of the task. In
relabelled contexts only the rewards tell the task. The idea is GENTLE's (gentle.py); there the models see (s, a).
  1 models    three networks r(s, a, s') for each training task, fitted to the task's own data
  2 labels    the models of every task predict the rewards of all training episodes; a label is the mean of three
  3 trust     a task trusts an episode if its models' standard deviation there is below --max-ratio times the labels'
              standard deviation between tasks: not far from its own data, nor where all tasks have the same rewards
  4 contexts  half are a random trusted episode with its labels, half the task's own; FLORA's update stays as it is
Nothing is relabelled if less than a third of the episodes are trusted, or unless the family says that only rewards
differ: where dynamics vary s' tells the task too. Then this is FLORA with --metric-weight 400.
--labels true: true rewards, which no method knows, all trusted; a reference. Point families without wind.
cpu_s leaves out steps 1 and 2, about a minute.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402
import flora  # noqa: E402
from gentle import TaskModels  # noqa: E402

load_dataset = dc.load_dataset
ENV_DEFAULTS = flora.ENV_DEFAULTS


@dataclass
class Args(flora.Args):
    exp_name: str = "flora-relabelled"
    metric_weight: float = 400.0
    labels: Literal["models", "true"] = "models"
    model_updates: int = 1_000  # updates of the reward models [gradient steps]
    max_ratio: float = 0.1  # largest disagreement of a task's models / spread of the labels between tasks


def rewards_by_models(data, args):
    """-> labels [U, U, N, H], whose [i, j] are task i's predictions on task j's episodes; trusted [U, U, N]."""
    torch.manual_seed(args.seed)
    generator = torch.Generator(data.device).manual_seed(args.seed)
    tasks, ensemble = len(data.train_ids), 3
    recorded = data.recorded(data.lengths[data.train_tasks])  # [U, N, H]

    def split(rows):
        """rows [.., ctx_dim + 1] -> (s, a, s') [.., 2 obs_dim + act_dim], r [.., 1] in units of its deviation."""
        batch = data.unpack(rows)
        return torch.cat([batch.obs, batch.act, batch.next_obs], -1), batch.rew[..., None] / data.reward_std

    # 1 models
    x, _ = split(data.episodes[data.train_tasks])
    models = TaskModels(tasks, ensemble, x.shape[-1], 128, 1).to(data.device)
    opt = torch.optim.Adam(models.parameters(), fused=True)
    print(f"{args.model_updates} updates of the reward models, about a minute")
    for step in range(args.model_updates):
        dc.set_lr(opt, 3e-3 * min(1, 2 - 2 * step / args.model_updates))
        batch, target = split(data.sample(data.train_tasks, 64 * ensemble, generator).unflatten(1, (ensemble, -1)))
        loss = (models(batch) - target).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    # 2 labels
    with torch.no_grad():
        # one episode of each source task at a time -> [N, U, E, U H, 1]
        predictions = torch.stack([models(rows.flatten(0, 1)[None, None]) for rows in x.unbind(1)])
    predictions = predictions[..., 0].unflatten(-1, (tasks, -1)).permute(1, 3, 0, 4, 2)  # [U, U, N, H, E]
    labels = predictions.mean(-1)

    # 3 trust: variances, summed over an episode
    disagreement = torch.where(recorded, predictions.var(-1), 0.0).sum(-1)  # [U, U, N]
    spread = torch.where(recorded, labels.var(0), 0.0).sum(-1)  # [U, N], between the tasks that label
    trusted = disagreement < args.max_ratio**2 * spread  # absent episodes: 0 < 0
    share = trusted.sum() / (tasks * recorded.any(-1).sum())
    print(f"reward models: loss {loss:.2g}; {share:.0%} of the relabelled episodes are trusted")
    if share < 1 / 3:
        print("this is less than a third: nothing is relabelled")
        trusted = torch.zeros_like(trusted)
    return labels * data.reward_std, trusted


def true_rewards(data):
    """-> labels [U, U, N, H] by the family's reward, which must be a function of the next observation; all trusted."""
    if not isinstance(data.family, dc.PointRobot):
        raise SystemExit(f"--labels true: the rewards of {data.env} are no function of the next observation")
    params = torch.as_tensor(data.task_params, dtype=torch.float32, device=data.device)[data.train_tasks]
    rows, column = data.episodes[data.train_tasks], data.obs_dim + data.act_dim  # column: of the reward
    next_obs = rows[..., column + 1 : -1] * data.obs_std + data.obs_mean
    labels = torch.stack([data.family.reward(next_obs, None, task.expand(*next_obs.shape[:-1], -1)) for task in params])
    return labels, (data.lengths[data.train_tasks] > 0).expand(len(params), -1, -1)


def relabelled(env, path=None, device="cpu", args=Args()):
    """The dataset, with half of the training contexts relabelled."""
    data = load_dataset(env, path, device)
    if args.eval_only:
        return data
    if data.family.dynamics_vary is not False:
        print("the tasks may differ in more than rewards: nothing is relabelled")
        return data
    labels, trusted = true_rewards(data) if args.labels == "true" else rewards_by_models(data, args)
    sample_own, episodes = data.sample_context, data.episodes[data.train_tasks].flatten(0, 1)[..., :-1]  # [U N, H, ..]
    lengths, column = data.lengths[data.train_tasks].flatten(), data.obs_dim + data.act_dim
    labels, trusted = labels.flatten(1, 2), trusted.flatten(1)  # [U, U N, H], [U, U N]

    def sample_context(task_ids, size, generator):
        """4 contexts: task_ids [M] -> [M, size, ctx_dim]."""
        own = sample_own(task_ids, size, generator)
        place = (data.train_tasks == task_ids[:, None]).float().argmax(1)  # of each task among the training tasks
        episode = dc.draw_one(trusted[place], generator)
        step = (torch.rand(len(place), size, device=data.device, generator=generator) * lengths[episode]).long()
        rows = episodes[episode, step]  # [M, size, ctx_dim]
        rows[..., column] = labels[place[:, None], episode, step]
        half = torch.rand(len(place), device=data.device, generator=generator) < 0.5
        return torch.where((half & trusted[place].any(1))[:, None, None], rows, own)

    data.sample_context = sample_context
    return data


def train(args):
    """`flora.train` on relabelled contexts."""
    dc.load_dataset = partial(relabelled, args=args)
    return flora.train(args)


if __name__ == "__main__":
    dc.command_line(Args, train, __doc__, ENV_DEFAULTS)
