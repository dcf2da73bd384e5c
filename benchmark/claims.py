"""The FLORA paper's claims about its critic and its inference, as tables and figures of finished runs.

Run:  python benchmark/claims.py figure1 --figure docs/figure1.png   # critic's error and divergence over the training
      python benchmark/claims.py features --env ant-dir              # how many features the critic really has
      python benchmark/claims.py bandit --env point-robot            # fixed alphas and the bandit's
      python benchmark/claims.py length --env point-robot            # return by the length of the context
      python benchmark/claims.py parts --env ant-dir                 # is the task read from rewards or from who acted?
      python benchmark/claims.py drift                               # tasks that change inside an episode
figure1 and bandit read the runs of figure1.txt, ablations.txt and bandit.txt from curves.csv and results.csv, the
others load the finished runs below --runs (--only: some of them); length, parts and drift play their policies on the
test tasks.
"""

import argparse
import copy
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import COLORS, HERE, band, canvas, curve, finished_runs, picture, print_table, pyplot, read, revisit, save

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

# weak: --kl-coef 0.01, hardly an anchor; paper: flora_paper.py, long: 10,000 updates
QUALITIES = ("random", "random.weak", "random.paper", "random.paper.long", "medium", "mixed", "expert")
VARIANTS = ("no-flows", "no-correction", "neither", "plain", "all-episodes")  # plain: one feature, so no decomposition
GROUPS = {  # data -> variant -> experiment; of figure1.txt, then of ablations.txt beside the ordinary runs
    **{data: {v: f"figure1-{data}-{v}" for v in ("full", *VARIANTS)} for data in QUALITIES},
    "shipped": {"full": "flora"} | {v: f"flora-{v}" for v in VARIANTS},
}
ARMS = {  # experiment -> its alpha; of bandit.txt beside the ordinary runs
    "flora-alpha-1": "-1",
    "flora-alpha-0.5": "-0.5",
    "flora-no-correction": "0",
    "flora": "bandit, critic's value",
    "flora-rollout": "bandit, rollouts",
}
STEPS, GAP, GAP_SPREAD = 1_000, 250, 10  # of a non-stationary episode; steps between two tasks, normal
EPISODES = 4  # per test task


def of_data(row):
    """Is it of the data that its name says? The ordinary runs and the ablations are of the shipped ones."""
    return row["quality"] == "mixed" or row["name"].startswith("figure1-")


def spread(values, digits=2):
    """Mean ± standard error over the first axis, as text."""
    values = np.asarray(values, float)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


# ---- a, b: what decomposition and correction do to the critic -----------------


def figure1(files, env, figure):
    """Error of the critic and distance of the policy from the data, per quality of the data and variant of FLORA.
    Paired by seed: what the policy's return has more than behavior cloning's, and a variant's return and critic's error
    more than the full method's."""
    curves, final = defaultdict(lambda: defaultdict(list)), defaultdict(dict)  # experiment -> seed ->
    for row in read(files / "curves.csv"):
        if row["env"] == env and of_data(row):
            curves[row["name"]][row["seed"]].append(row)
    for row in read(files / "results.csv"):
        if row["env"] == env and of_data(row) and row["protocol"] in ("iid", "bc"):
            final[row["name"], row["protocol"]][row["seed"]] = float(row["return"])
    groups = {data: {v: name for v, name in names.items() if name in curves} for data, names in GROUPS.items()}
    groups = {data: names for data, names in groups.items() if len(names) > 1}  # the full method alone shows nothing
    if not groups:
        lists, file = "figure1.txt or ablations.txt", files / "curves.csv"
        raise SystemExit(f"no run of {lists} on {env} in {file}; see benchmark/README.md")
    quantities = {"Q error (Q - return)": "q_error", "D_KL(pi || pi_beta)": "divergence"}
    size, table = {"figsize": (max(2.2 * len(groups) + 0.4, 4), 4.4), "layout": "constrained"}, []
    fig, grid = pyplot().subplots(len(quantities), len(groups), squeeze=False, **size) if figure else (None, None)
    for column, (data, names) in enumerate(groups.items()):
        for variant, name in names.items():
            rows = curves[name].values()
            found = {c: np.array([[float(r[c]) for r in seed] for seed in rows]) for c in quantities.values()}
            own, full = final[name, "iid"], names.get("full") if variant != "full" else None
            cells = [[*own.values()], found["q_error"][:, -1], abs(found["q_error"]).max(1), found["divergence"][:, -1]]
            for other in (final[name, "bc"], final[full, "iid"]):
                cells.append([own[seed] - other[seed] for seed in own if seed in other])
            errors = [{s: float(each[-1]["q_error"]) for s, each in curves[n].items()} for n in (name, full)]
            cells.append([errors[0][seed] - errors[1][seed] for seed in errors[0] if seed in errors[1]])
            table.append([data, variant, str(len(own)), *(spread(cell) if len(cell) else "" for cell in cells)])
            steps = [int(row["updates"]) for row in next(iter(rows))]
            for line, (label, c) in enumerate(quantities.items() if figure else ()):
                color = COLORS["flora" if variant == "full" else f"flora-{variant}"]
                band(grid[line, column], steps, found[c], label=variant, color=color)
                grid[line, column].set(title=f"{data} data" if line == 0 else "", ylabel="" if column else label)
    header = ["data", "variant", "seeds", "iid", "Q error", "largest error", "divergence"]
    print_table([*header, "iid - bc's", "iid - full's", "Q error - full's"], table)
    if figure:
        fig.suptitle(f"{env}: FLORA and its variants", weight="bold")
        style = {"frameon": False, "loc": "outside lower center", "ncols": 3 + len(groups) // 2}
        fig.legend(*grid[0, 0].get_legend_handles_labels(), **style)
        for axis in grid[-1]:
            axis.set_xlabel("updates")
        fig.savefig(figure, dpi=140)


# ---- a: how many features the critic really has --------------------------------


def shares(features):
    """features [.., D] -> part of their variance that lies in the first, and in the first two principal directions."""
    rows = features.flatten(0, -2).double()
    squares = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    return (squares.cumsum(0) / squares.sum())[:2].numpy()


def directions(script, agent, data, args):
    """-> `shares` of phi, then of psi, over transitions of all training tasks, z from their contexts [4]."""
    generator = torch.Generator().manual_seed(0)
    context = data.sample_context(data.train_tasks, args.context_size, generator)
    batch = data.sample_batch(data.train_tasks, 256, generator)
    z, move = script.embed(agent, context, torch.ones_like(context[..., 0])), torch.cat([batch.obs, batch.act], -1)
    with torch.no_grad():
        phi, psi = agent.features(torch.cat([move, batch.next_obs], -1), z), agent.psi(move, z)[0]
    return np.concatenate([shares(phi), shares(psi)])


def features(runs):
    rows = []
    for name, seeds in runs.items():
        found = np.array([revisit(run_dir, directions) for run_dir in seeds.values()])
        rows.append([name, str(len(found)), *(spread(column) for column in found.T)])
    header = [f"{what}, {first}" for what in ("phi", "psi") for first in ("first", "first two")]
    print_table(["variance in principal directions", "seeds", *header], rows)


# ---- what moves the bandit's arms ---------------------------------------------


def bandit(files, env):
    """Returns with a fixed alpha and with the bandit's, and its probabilities at the end, from results.csv."""
    rows = [row for row in read(files / "results.csv") if row["env"] == env and of_data(row) and row["name"] in ARMS]
    if not any(row["name"] == "flora-alpha-1" for row in rows):
        raise SystemExit(f"no run of bandit.txt on {env} in {files / 'results.csv'}; see benchmark/README.md")
    table = []
    for name, alpha in ARMS.items():
        found = defaultdict(dict)  # protocol -> seed -> row
        for row in rows:
            if row["name"] == name:
                found[row["protocol"]][row["seed"]] = row
        values = [[float(row["normalized"]) for row in found[p].values()] for p in ("iid", "ood", "online")]
        errors = [100 * float(row["q_relative"]) for row in found["iid"].values()]
        arms = [row["arms"].split() for row in found["iid"].values() if "bandit" in alpha]
        probs = [spread(np.array(column, float)) for column in zip(*arms)] or [""] * 5
        if errors:
            table.append([alpha, str(len(errors)), *(spread(v, 1) for v in values), spread(errors, 1), *probs])
    last = [f"p({alpha:.2f})" for alpha in np.linspace(-1, 0, 5)]
    print_table(["alpha", "seeds", "iid", "ood", "online", "Q error %", *last], table)


def probabilities(runs, figure):
    """Draw the probability of each arm over the training."""
    size = {"figsize": (4 * len(runs), 3), "layout": "constrained"}
    fig, axes = pyplot().subplots(1, len(runs), sharey=True, squeeze=False, **size)
    for axis, (name, seeds) in zip(axes[0], runs.items()):
        for arm, alpha in enumerate(np.linspace(-1, 0, 5)):
            found = [curve(run_dir, f"bandit/prob_{arm}") for run_dir in seeds.values()]
            band(axis, found[0][0], np.array([values for _, values in found]), label=f"{alpha:.2f}")
        axis.set(title=f"{name} ({len(seeds)} seeds)", xlabel="updates", ylim=(0, 0.6))
    axes[0, 0].set_ylabel("probability of the arm")
    axes[0, -1].legend(title="alpha", frameon=False, ncols=2)
    fig.savefig(figure, dpi=140)


# ---- d: how much context a task needs ----------------------------------------


def by_length(lengths, script, agent, data, args):
    """-> normalized return [len(lengths)] with the first n transitions of an offline episode as context."""

    def adapt(context, mask, explore, n):
        return script.adapt(agent, context, mask * (mask.cumsum(1) <= n), explore)

    results = [dc.evaluate(data, partial(adapt, n=n), ("iid",), EPISODES) for n in lengths]
    return [r["eval/iid/normalized"] for r in results]


def length(runs, figure, env):
    lengths = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n <= dc.FAMILIES[env].horizon]
    fig, axis = canvas() if figure else (None, None)
    rows = []
    for name, seeds in runs.items():
        found = np.array([revisit(run_dir, partial(by_length, lengths)) for run_dir in seeds.values()])
        rows.append([name, str(len(found)), *(spread(found[:, k], 0) for k in range(len(lengths)))])
        if figure:
            band(axis, lengths, found, label=name, color=COLORS.get(name))
    print_table(["normalized, by transitions in the context", "seeds", *map(str, lengths)], rows)
    if figure:
        axis.set(xscale="log", xlabel="transitions in the context", ylabel="normalized return (random 0, expert 100)")
        axis.set_title(f"{env}: unseen tasks, context of their own data")
        axis.set_xticks(lengths, lengths)
        axis.minorticks_off()
        save(fig, figure)


# ---- which part of the context tells the task --------------------------------


def by_part(script, agent, data, args):
    """-> normalized returns [3], contexts of the test tasks' own episodes: whole, with the rewards of another test task
    (half of their list away), and with all but the rewards from there."""
    reward = torch.arange(data.context_dim) == data.obs_dim + data.act_dim
    away = EPISODES * (len(data.test_ids) // 2)  # rows, which lie task by task

    def adapt(context, mask, explore, other):
        return script.adapt(agent, torch.where(other, context.roll(away, 0), context), mask, explore)

    others = (torch.zeros_like(reward), reward, ~reward)
    results = [dc.evaluate(data, partial(adapt, other=other), ("iid",), EPISODES) for other in others]
    return [r["eval/iid/normalized"] for r in results]


def parts(runs):
    rows = []
    for name, seeds in runs.items():
        found = np.array([revisit(run_dir, by_part) for run_dir in seeds.values()])
        rows.append([name, str(len(found)), *(spread(column, 0) for column in found.T)])
    header = ["own", "rewards of another task", "all but the rewards of another task"]
    print_table(["normalized, by what is in the context", "seeds", *header], rows)


# ---- c: tasks that change inside an episode ----------------------------------


def drifting(own, script, agent, data, args):
    """Play STEPS steps in which the task is drawn anew from the test tasks about every GAP steps.

    own: the context is the last steps, as many as an episode has, at first an offline episode of the first task; else
    it is an offline episode of the current task at any time: what is lost against it is lost by the delay. A cheetah's
    way begins at 0 with each task.
    -> rewards [R, STEPS], steps since the task was drawn [R, STEPS]."""
    family = copy.copy(data.family)
    window, family.horizon = family.horizon, STEPS
    rng = np.random.default_rng(0)
    rows = len(data.test_ids) * EPISODES
    tasks = np.tile(data.test_ids, EPISODES)
    switch = np.cumsum(rng.normal(GAP, GAP_SPREAD, (rows, STEPS // GAP + 1)).round(), 1)
    picks = rng.integers(int((data.lengths[data.test_ids] > 0).sum(1).min()), size=(rows, STEPS))
    env = dc.TaskEnv(family, data.task_params, tasks.copy())

    def offline(row_tasks, t):
        """An offline episode of each row's task -> context [R, H, ctx_dim], mask [R, H]."""
        context, lengths = data.episodes[row_tasks, picks[:, t]], data.lengths[row_tasks, picks[:, t]]
        return context[..., : data.context_dim], (torch.arange(window) < lengths[:, None]).float()

    obs, _ = env.reset(seed=(20_000 + np.arange(rows)).tolist())
    obs, rew = data.standardize(torch.as_tensor(obs)), torch.zeros(rows)
    context, mask = offline(tasks, 0)
    rewards, since, age = np.zeros((rows, STEPS)), np.zeros((rows, STEPS), int), np.zeros(rows, int)
    for t in range(STEPS):
        new = (switch == t).any(1)
        env.task_ids[new] = rng.choice(data.test_ids, rows)[new]
        age = np.where(new, 0, age + 1)
        if isinstance(family, dc.Cheetah) and new.any():
            env.state[new, 1] = 0  # it observes how far it ran; the data know no farther than an episode
            obs = data.standardize(torch.as_tensor(family.observe(env.state).astype(np.float32)))
        if not own and new.any():
            told, whole = offline(env.task_ids, t)
            changed = torch.as_tensor(new)
            context = torch.where(changed[:, None, None], told, context)
            mask = torch.where(changed[:, None], whole, mask)
        with torch.no_grad():
            act = script.adapt(agent, context, mask)(obs, rew)
        next_obs, reward, ended, _, _ = env.step(act.numpy())
        next_obs, rew = data.standardize(torch.as_tensor(next_obs)), torch.as_tensor(reward, dtype=torch.float32)
        if own:
            step = torch.cat([obs, act, rew[:, None], next_obs, torch.as_tensor(ended)[:, None]], -1)
            step = step[:, : data.context_dim]
            context = torch.cat([context[:, 1:], step[:, None]], 1)
            mask = torch.cat([mask[:, 1:], torch.ones(rows, 1)], 1)
        obs, rewards[:, t], since[:, t] = next_obs, reward, age
    env.close()
    return rewards, since


def drift(runs, figure, env):
    parts = {"all": (0, STEPS), "1-25 after a change": (0, 25), "26-100": (25, 100), "later": (100, STEPS)}
    fig, axis = canvas() if figure else (None, None)
    rows = []
    for name, seeds in runs.items():
        for own in (True, False):
            found = [revisit(run_dir, partial(drifting, own)) for run_dir in seeds.values()]
            after = [(r[:, GAP:], s[:, GAP:]) for r, s in found]  # the first task did not come by a change
            cells = [[r[(lo <= s) & (s < hi)].mean() for r, s in after] for lo, hi in parts.values()]
            context = "own last steps" if own else "offline, of the current task"
            rows.append([name, str(len(seeds)), context, *(spread(cell, 3) for cell in cells)])
            if figure:
                curves = np.array([[r[s == k].mean() for k in range(200)] for r, s in after])
                label = f"{name},\n{context}"
                band(axis, range(200), curves, label=label, color=COLORS.get(name), linestyle="-" if own else ":")
    print_table(["reward per step", "seeds", "context", *parts], rows)
    if figure:
        axis.set(xlabel="steps since the task changed", ylabel="mean reward of the step")
        axis.set_title(f"{env}: tasks that change about every {GAP} steps")
        save(fig, figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("claim", choices=("figure1", "features", "bandit", "length", "parts", "drift"))
    parser.add_argument("--env", default="point-robot-wind")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the --run-dir of the runs")
    parser.add_argument("--figure", type=picture, help="where to write the figure (png)")
    parser.add_argument("--only", nargs="+", help="experiment names; by default all, of features flora alone")
    args = parser.parse_args()
    if args.claim == "figure1":
        return figure1(HERE, args.env, args.figure)
    if args.claim == "bandit":
        bandit(HERE, args.env)
        if not args.figure:
            return
    runs = finished_runs(args.runs / args.env)
    args.only = args.only or {"features": ["flora"], "bandit": ["flora", "flora-rollout"]}.get(args.claim)
    passed = ("figure1-", "known-task", "meta_dt")  # no context, or hardly one beside the own history
    runs = {n: seeds for n, seeds in runs.items() if (n in args.only if args.only else not n.startswith(passed))}
    if not runs:
        script = next((name for name in args.only or () if (HERE.parent / f"{name}.py").is_file()), "flora")
        command = f"python {script}.py --env {args.env} --run-dir {args.runs}"
        raise SystemExit(f"no finished run for this in {args.runs / args.env}; make one: {command}")
    if args.claim == "features":
        features(runs)
    elif args.claim == "bandit":
        probabilities(runs, args.figure)
    elif args.claim == "length":
        length(runs, args.figure, args.env)
    elif args.claim == "parts":
        parts(runs)
    else:
        drift(runs, args.figure, args.env)


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
