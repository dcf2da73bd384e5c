"""Raw numbers, tables and learning curves of the benchmark.

Run:  python benchmark/report.py --add runs         # copy what is finished below runs/ into results.csv and curves.csv
      python benchmark/report.py --env ant-dir      # tables of results.csv: mean and its standard error over seeds
      python benchmark/report.py --env ant-dir --columns iid ood tenth   # some columns alone
      python benchmark/report.py --compare focal --env ant-dir point-robot   # over families, with 95 % intervals
      python benchmark/report.py --story docs/story.png              # the README's picture
      python benchmark/report.py --write docs/RESULTS.md README.md   # the tables in these files anew
results.csv has a row per run and protocol, curves.csv a row per run and evaluation during the training. A run that is
there already, by family, data, experiment name and seed, is replaced, so that the files grow over many sittings.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import json
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data_collect as dc  # noqa: E402

HERE = Path(__file__).resolve().parent
KEY = ("env", "quality", "name", "seed")  # of a run
RESULTS = (*KEY, "protocol", "updates", "return", "return_se", "normalized", "q_relative", "nearest_task_acc")
RESULTS += ("probe_r2", "updates_per_sec", "cpu_s", "commit", "torch")
RESULTS += ("by_task", "arms")  # returns of the tasks; last probabilities of FLORA's bandit, alpha from -1 to 0
RESULTS += ("diverged", "args")  # episodes whose physics diverged; arguments as JSON, in the row "iid" or "own"
CURVES = (*KEY, "updates", "cpu_s", "iid", "train", "q_error", "divergence")
PROTOCOLS = ("iid", "bc", "ood", "ood_random", "online", "online_random_start", "idaq", "zero_shot", "train")
BRIEF = ("iid", "bc", "ood", "online", "train")
GAINS = ("iid", "ood", "ood_random", "online", "online_random_start")
OWN = "own"  # omnirl.py's last ten own episodes
TENTH = "tenth"  # column of the tenth own episode: of IDAQ's adaptation if a run has it, else of the protocol online
UNCOMPARED = dc.FREE - {"total_updates", "final_episodes"} | {"env", "exp_name", "seed"}  # may differ among seeds
DIVERGED = "†"  # marks a cell with diverged episodes
SIDE_LISTS = ("ablations", "variants", "figure1", "bandit", "small")  # shown where --only names a run
PARTS = {  # further tables: title -> protocols
    "inner steps": [f"steps_{k}" for k in (0, 1, 5, 20)],  # MACAW
    "own episodes": [f"ep_{k}" for k in range(1, 11)],
    "own episodes, IDAQ": [f"idaq_{k}" for k in range(1, 11)],
    "ood, normalized, by distance": ["near", "middle", "far"],
}
COLORS = {  # of an experiment in all figures; other names take matplotlib's colors
    "flora": "#d62728",
    "flora-metric": "#f2b880",
    "flora-relabelled": "#ff8c1a",
    "focal": "#4a9fe0",
    "focal_pp": "#16398f",
    "meta_dt": "#2ca02c",
    "macaw": "#8e44ad",
    "idaq": "#00a39a",
    "unicorn": "#e377c2",
    "corro": "#8c564b",
    "csro": "#a89a00",
    "er_trl": "#7f7f7f",
    "gentle": "#d4569b",
    "known-task": "#000000",
    "known-task-all-episodes": "#b5b5b5",
    "flora-no-flows": "#e0b400",
    "flora-no-correction": "#00bcd4",
    "flora-neither": "#1b5e4a",
    "flora-plain": "#c2187a",
    "flora-all-episodes": "#5c4033",
}
STORY = {  # methods in the README's picture -> their names there
    "flora": "FLORA",
    "flora-relabelled": "FLORA, relabelled",
    "focal": "FOCAL",
    "focal_pp": "FOCAL++",
    "meta_dt": "Meta-DT",
    "macaw": "MACAW",
}


# ---- from run directories to the files ----------------------------------------


def finished_runs(folder):
    """-> {experiment name: {seed: run directory}} of the runs that wrote result.json; the newest of each counts."""
    runs = defaultdict(dict)
    for path in sorted(folder.glob("*/seed*/result.json"), key=lambda p: p.stat().st_mtime):
        args = json.loads((path.parent / "args.json").read_text())["args"]
        runs[args["exp_name"]][args["seed"]] = path.parent
    return dict(sorted(runs.items()))


def curve(run_dir, tag):
    """-> steps, values of one tag of metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        points = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["tag"] == tag]
    return tuple(np.array(column) for column in zip(*points)) or (np.array([]), np.array([]))


def cpu_seconds(run_dir):
    """-> {updates of the policy: CPU seconds since the start, earlier phases included}, of TensorBoard's events, whose
    steps count the updates of all phases; {} where there are none."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    if not {"charts/cpu_s", "eval/iid/return"} <= set(events.Tags()["scalars"]):
        return {}
    before = events.Scalars("eval/iid/return")[-1].step - curve(run_dir, "eval/iid/return")[0][-1]
    return {event.step - before: event.value for event in events.Scalars("charts/cpu_s")}


def last_probabilities(run_dir):
    """-> the bandit's probabilities at the last log line, by arm; [] for other methods than FLORA."""
    with open(run_dir / "metrics.csv", newline="") as file:
        last = {row["tag"]: float(row["value"]) for row in csv.DictReader(file) if "bandit/prob_" in row["tag"]}
    return [last[tag] for tag in sorted(last, key=lambda tag: float(tag.split("_")[1]))]


def rows_of(run_dir):
    """-> rows of results.csv, rows of curves.csv."""
    about, result = (json.loads((run_dir / name).read_text()) for name in ("args.json", "result.json"))
    args, versions = about["args"], about["versions"]
    quality = about["dataset"]["settings"]["quality"]
    run = dict(zip(KEY, (args["env"], quality, args["exp_name"], args["seed"])))
    made = {"updates": result["step"], "commit": versions.get("commit"), "torch": versions["torch"]}
    made |= {tag: result.get(tag) for tag in ("updates_per_sec", "cpu_s")}
    compared = {k: v for k, v in args.items() if k not in UNCOMPARED}
    compared |= {f"dataset's {k}": v for k, v in about["dataset"].get("settings", {}).items()}
    compared |= {"script": about["script"]} if "script" in about else {}
    rows = []
    for protocol in (*PROTOCOLS, OWN):
        tag = f"eval/{protocol}/"
        if f"{tag}return" not in result:
            continue
        tasks = sorted(t for t in result if t.startswith(f"{tag}return_task_"))
        row = run | made | {"protocol": protocol, "by_task": " ".join(f"{result[t]:.5g}" for t in tasks)}
        numbers = ("return", "return_se", "normalized", "q_relative", "diverged")
        row |= {name: result.get(tag + name) for name in numbers}
        if protocol in ("iid", OWN):
            row |= {name: result.get(f"z/{name}") for name in ("nearest_task_acc", "probe_r2")}
            row["arms"] = " ".join(f"{p:.4f}" for p in last_probabilities(run_dir))
            row["args"] = json.dumps(compared, separators=(",", ":"))
        rows.append(row)
    parts = (("adapt/return_{}_steps", "inner steps"), ("eval/online/return_ep_{}", "own episodes"))
    for part, of_part in (*parts, ("eval/idaq/return_ep_{}", "own episodes, IDAQ")):
        for protocol in PARTS[of_part]:
            tag = part.format(protocol.split("_")[1])
            if tag in result:
                rows.append(run | made | {"protocol": protocol, "return": result[tag]})
    for k in (1, 2, 5, 10, 20, 50):
        if (tag := f"eval/{OWN}/normalized_ep_{k}") in result:
            rows.append(run | made | {"protocol": f"ep_{k}", "normalized": result[tag]})
    for third in PARTS["ood, normalized, by distance"]:
        if f"eval/ood/normalized_{third}" in result:
            rows.append(run | made | {"protocol": third, "normalized": result[f"eval/ood/normalized_{third}"]})
    tags = dict(zip(CURVES[-4:], ("eval/iid/return", "eval/train/return", "eval/iid/q_error", "stats/divergence")))
    found = {name: dict(zip(*curve(run_dir, tag))) for name, tag in tags.items()}
    found["cpu_s"] = cpu_seconds(run_dir)
    points = [run | {"updates": k} | {name: found[name].get(k) for name in found} for k in found["iid"]]
    return rows, points


def read(path):
    """-> list of dicts of a file; [] if there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def merge(path, columns, rows):
    """Put rows into the file; rows of the same run that were there go."""

    def run(row):
        return tuple(str(row[k]) for k in KEY)

    def short(value):
        return f"{value:.6g}" if isinstance(value, float) else value

    new = {run(row) for row in rows}
    kept = [row for row in read(path) if run(row) not in new]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in sorted(kept + rows, key=run):
        writer.writerow({k: short(v) for k, v in row.items()})
    dc.atomic_save(path, lambda file: file.write(text.getvalue().encode()))


def refuse_mixture(rows):
    """All seeds of one experiment name, on the same family and data, must have the same arguments. Rows of results.csv
    without `args` agree with all others."""
    first = {}  # (env, quality, name, argument) -> seed and value that come first
    for row in rows:
        for argument, value in json.loads(row.get("args") or "{}").items():
            env, quality, name, seed = (row[k] for k in KEY)
            other, expected = first.setdefault((env, quality, name, argument), (seed, value))
            if value != expected:
                what = f"{env}, {name}: seed {seed} has {argument} {value}, seed {other} has {expected}"
                raise SystemExit(f"{what}; give it an --exp-name of its own, or remove those rows first")


def add(folder, directory):
    """Copy all finished runs below folder into the files of directory."""
    families = sorted(folder.glob("*/"))
    for family in [family for family in families if family.name == "offline"]:
        print(f"{family} is left out: without a simulator there are no returns")
        families.remove(family)
    runs = [d for family in families for seeds in finished_runs(family).values() for d in seeds.values()]
    if not runs:
        raise SystemExit(f"no finished run below {folder}; make them: see benchmark/README.md")
    both = []
    for run_dir in runs:
        try:
            both.append(rows_of(run_dir))
        except (ValueError, KeyError) as fault:
            raise SystemExit(f"{run_dir}: damaged ({fault}); move it away or finish it anew with --resume")
    kept = read(directory / "results.csv")
    before = {tuple(row[k] for k in KEY): row["updates"] for row in kept}
    for run_dir, (rows, _) in zip(runs, both):
        done = str(rows[0]["updates"])
        if (old := before.get(tuple(str(rows[0][k]) for k in KEY), done)) != done:
            what = f"has {done} updates, the run of that name and seed in results.csv {old}"
            raise SystemExit(f"{run_dir}: {what}; give it an --exp-name of its own, or remove those rows first")
    refuse_mixture([*kept, *(row for rows, _ in both for row in rows)])
    for name, columns, part in (("results.csv", RESULTS, 0), ("curves.csv", CURVES, 1)):
        merge(directory / name, columns, [row for rows in both for row in rows[part]])
    print(f"{len(runs)} runs in {directory / 'results.csv'} and curves.csv")


def revisit(run_dir, look):
    """Load a finished run -> what look(script, agent, data, args) returns; nothing is written."""
    about = json.loads((run_dir / "args.json").read_text())
    script, found = importlib.import_module(about.get("script") or Path(about["command"][0]).stem), []
    if not hasattr(script, "evaluate_all"):
        remedy = "evaluate in a function evaluate_all(agent, data, args, protocols, episodes), as focal.py does"
        raise SystemExit(f"{run_dir}: {script.__name__}.py cannot be looked into; {remedy}, or leave this run out")

    def evaluate_all(agent, data, args, *_):
        found.append(look(script, agent, data, args))
        return {}

    arguments = ["--resume", str(run_dir), "--eval-only"]
    with mock.patch.object(script, "evaluate_all", evaluate_all), mock.patch.object(dc, "write_json"):
        with contextlib.redirect_stdout(io.StringIO()):
            dc.command_line(script.Args, script.train, script.__doc__, arguments=arguments)
    return found[0]


# ---- from the files to tables and figures -------------------------------------


@functools.cache
def side_names():
    """Experiment names of the runs in SIDE_LISTS."""
    lists = [(HERE / f"{name}.txt").read_text() for name in SIDE_LISTS]
    return set(re.findall(r"--exp-name (\S+)", "".join(lists)))


def chosen(path, env, only, quality="mixed"):
    """Rows of one family, on data of that quality -> {experiment name: {seed: [rows]}}; without `only` those of
    SIDE_LISTS are left out."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        wanted = row["name"] in only if only else row["name"] not in side_names()
        if wanted and (row["env"], row["quality"]) == (env, quality):
            groups[row["name"]][int(row["seed"])].append(row)
    return {name: dict(sorted(seeds.items())) for name, seeds in groups.items()}


def cell(rows, column, normalized=False, digits=0):
    """mean ± standard error over the rows, one per seed, of a single row that of its tasks and episodes; in brackets,
    if wanted, the mean of the normalized returns. DIVERGED marks returns with diverged episodes."""
    values = np.array([float(row[column]) for row in rows if row[column]])
    if not len(values):
        return ""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else rows[0].get(f"{column}_se")
    spread = f" ± {float(error):.{digits}f}" if error not in (None, "") else ""
    brackets = f" ({np.mean([float(row['normalized']) for row in rows]):z.0f})" if normalized else ""
    of_return = column in ("return", "normalized", "gain")
    mark = DIVERGED if of_return and any(row.get("diverged") for row in rows) else ""
    return f"{values.mean():z.{digits}f}{spread}{brackets}{mark}"


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if any(DIVERGED in text for row in rows for text in row):
        print(f"\n{DIVERGED} The physics diverged in some episodes; they count as the task's random return.")
    print()


def of(seeds, protocol):
    """Rows of one protocol, one per seed."""
    if protocol == TENTH:
        return of(seeds, "idaq") or of(seeds, "ep_10")
    return [row for rows in seeds.values() for row in rows if row["protocol"] == protocol]


def print_brief(groups, columns):
    """Normalized returns: 0 = random, 100 = expert."""
    rows = [[n, str(len(seeds)), *(cell(of(seeds, p), "normalized") for p in columns)] for n, seeds in groups.items()]
    print_table(["normalized", "seeds", *columns], rows)


def print_tables(groups, columns=None):
    """Returns per protocol, of `columns` alone. Without `columns` of all protocols, with the critic's error, quality of
    z and cost; then what happens over inner steps, own episodes, and with the distance of the policy that acted."""
    sizes = [abs(float(row["return"])) for seeds in groups.values() for row in of(seeds, "iid")]
    digits, table = 2 if max(sizes) < 50 else 0, []
    for name, seeds in groups.items():
        iid = of(seeds, "iid")
        cells = [name, str(len(iid)), *(cell(of(seeds, p), "return", p != TENTH, digits) for p in columns or PROTOCOLS)]
        if not columns:
            cells += [cell(iid, column, digits=2) for column in ("q_relative", "nearest_task_acc", "probe_r2")]
            minutes = [float(row["cpu_s"]) / 60 for row in iid if row["cpu_s"]]
            cells.append("/".join(sorted({row["updates"] for row in iid}, key=int)))
            cells.append(f"{np.mean(minutes):.0f}" if minutes else "")
        table.append(cells)
    if columns:
        return print_table(["method", "seeds", *columns], table)
    print_table(["method", "seeds", *PROTOCOLS, "Q error", "z acc", "z R2", "updates", "CPU minutes"], table)
    for what, protocols in PARTS.items():
        column = "normalized" if "normalized" in what else "return"
        places = digits if column == "return" else 0
        table = [
            [name, *(cell(of(seeds, protocol), column, digits=places) for protocol in protocols)]
            for name, seeds in groups.items()
            if of(seeds, protocols[0])
        ]
        if table:
            print_table([f"method, {what}", *(re.search(r"\d+|[a-z]+$", p)[0] for p in protocols)], table)


def scores(path, env, protocol, only):
    """Normalized returns of one family and protocol -> {experiment name: [seeds, test tasks]}."""
    dataset = HERE.parent / "datasets" / f"{env}.npz"
    if not dataset.is_file():
        raise SystemExit(f"{dataset}: no such file; see benchmark/README.md")
    with np.load(dataset, allow_pickle=False) as file:
        random, expert = (file[key][file["test_ids"]] for key in ("random_returns", "expert_returns"))
    found = defaultdict(list)
    for name, seeds in chosen(path, env, only).items():
        for row in of(seeds, protocol):
            values = 100 * (np.array(row["by_task"].split(), float) - random) / (expert - random)
            if abs(values.mean() - float(row["normalized"])) > 0.1:
                raise SystemExit(f"{name}, seed {row['seed']}: not of {dataset}, so not to be compared with others")
            found[name].append(values)
    return {name: np.array(rows) for name, rows in found.items()}


def interquartile_mean(table, seeds, tasks):
    """Mean of the middle half of the values of table [seeds, tasks], in D samples that hold each seed and each task as
    often as seeds [D, seeds] and tasks [D, tasks] say -> [D]."""
    order = table.argsort(axis=None)
    counts = (seeds[:, :, None] * tasks[:, None]).reshape(len(seeds), -1)[:, order]
    upper = counts.cumsum(1) / counts.sum(1, keepdims=True)
    inside = np.diff(upper.clip(0.25, 0.75), prepend=0.25)  # of each value the part in the middle half
    return inside @ table.flat[order] / 0.5


def improvement(ours, theirs, our_seeds, their_seeds, tasks):
    """Probability that a run of ours is better than one of theirs on the same task; a tie counts half (Agarwal et al.
    2021). ours, theirs [seeds, tasks]; counts in D samples as above -> [D]."""
    difference = ours[:, None] - theirs
    better = (difference > 0) + 0.5 * (difference == 0)  # [our seeds, their seeds, tasks]
    pairs = our_seeds[:, :, None] * their_seeds[:, None]  # [D, our seeds, their seeds]
    return np.einsum("dij,dk,ijk->d", pairs, tasks, better, optimize=True) / better.size


def resampled(number, rng, draws):
    """How often a sample holds each of `number` things, first the given one, then `draws` of as many with replacement
    -> [1 + draws, number]."""
    return np.concatenate([np.ones((1, number)), rng.multinomial(number, np.full(number, 1 / number), size=draws)])


def interval(statistic, *methods, draws=2_000):
    """Mean over families of a statistic of one table [seeds, tasks] per method, and its 95 % interval by a bootstrap
    over seeds and tasks. methods: lists of tables, one per family -> text."""
    rng, found = np.random.default_rng(0), []
    for tables in zip(*methods):
        tasks = resampled(tables[0].shape[1], rng, draws)  # the same of all methods: compared with themselves
        found.append(statistic(*tables, *(resampled(len(table), rng, draws) for table in tables), tasks))
    means = np.mean(found, 0)
    low, high = np.quantile(means[1:], (0.025, 0.975))
    digits = 0 if abs(high) > 1.5 else 2
    return f"{means[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_comparison(path, reference, envs, only, brief=False):
    """Means over families of the interquartile mean of normalized returns over tasks and seeds, and, unless brief, of
    the probability of being better than the reference; of the methods that all families have."""
    seeds, cells, protocols = {}, defaultdict(dict), ("iid", "ood", "online")
    for protocol in protocols:
        tables = [scores(path, env, protocol, only and [*only, reference]) for env in envs]
        everywhere = set.intersection(*(set(t) for t in tables))
        if reference not in everywhere:
            raise SystemExit(f"{reference}: not in results.csv for all of {', '.join(envs)}")
        ours = [t[reference] for t in tables]
        for name in sorted(everywhere):
            theirs = [t[name] for t in tables]
            seeds[name] = "/".join(str(len(t)) for t in theirs)
            cells[name][protocol] = [interval(interquartile_mean, theirs)]
            if not brief:
                cells[name][protocol].append("" if name == reference else interval(improvement, theirs, ours))
    columns = [[p] if brief else [p, f"P(better than {reference}), {p}"] for p in protocols]
    found = {n: sum((cells[n].get(p, [""] * len(c)) for p, c in zip(protocols, columns)), []) for n in sorted(cells)}
    print_table(["method", "seeds", *sum(columns, [])], [[n, seeds[n], *row] for n, row in found.items()])


def print_gains(path, reference, envs, only, protocols=GAINS):
    """What a method's normalized return has more than the reference's of the same seed, per family and protocol."""
    table = []
    for env in envs:
        groups = chosen(path, env, only and [*only, reference])
        base = {}
        for protocol in protocols:
            rows = of(groups.get(reference, {}), protocol)
            base |= {(protocol, row["seed"]): float(row["normalized"]) for row in rows}
        if not base:
            raise SystemExit(f"{reference}: no row of {env} in {path}; make runs: see benchmark/README.md")
        for name, seeds in groups.items():
            paired = [[row for row in of(seeds, p) if (p, row["seed"]) in base] for p in protocols]
            gains = [
                [row | {"gain": str(float(row["normalized"]) - base[p, row["seed"]])} for row in rows]
                for p, rows in zip(protocols, paired)
            ]
            if name != reference and gains[0]:
                table.append([env, name, str(len(gains[0])), *(cell(rows, "gain") for rows in gains)])
    print_table(["family", f"more than {reference}", "seeds", *protocols], table)


def pyplot():
    try:
        import matplotlib  # only pictures need it
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install -r benchmark/requirements.txt")

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def canvas():
    figure, axes = pyplot().subplots(figsize=(8, 4.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save(figure, path):
    """Legend on the right, ordered by the last value of each curve."""
    lines, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda k: -np.ravel(lines[k].get_ydata())[-1])
    if lines:
        style = {"fontsize": 9, "frameon": False, "title": "ordered by last value", "alignment": "left"}
        legend = ([lines[k] for k in order], [labels[k] for k in order])
        figure.legend(*legend, loc="outside right center", **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def band(axis, x, values, **style):
    """Mean over the first axis of values [seeds, points] with one standard error."""
    mean, error = values.mean(0), values.std(0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5
    (line,) = axis.plot(x, mean, **style)
    axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)


def draw(groups, data, path, over="updates"):
    """Return on the test tasks, context from their own data, against updates, or against the mean CPU time (cpu_s) at
    which the seeds have done them; band: one standard error."""
    figure, axes = canvas()
    for name, seeds in groups.items():
        if over == "cpu_s":  # of runs that have it
            seeds = {seed: rows for seed, rows in seeds.items() if all(row["cpu_s"] for row in rows)}
        if not seeds:
            continue
        common = set.intersection(*({row["updates"] for row in rows} for rows in seeds.values()))
        seeds = {seed: [row for row in rows if row["updates"] in common] for seed, rows in seeds.items()}
        x = np.mean([[float(row[over]) for row in rows] for rows in seeds.values()], 0)
        values = np.array([[float(row["iid"]) for row in rows] for rows in seeds.values()])
        label = f"{name} ({len(values)} seed{'s' * (len(values) > 1)})"
        band(axes, x / (60 if over == "cpu_s" else 1), values, label=label, color=COLORS.get(name))
    expert = data.expert_returns[data.test_ids].mean()
    for label, level, style in (("expert", expert, "--"), ("training data, mean", data.behavior_return, ":")):
        axes.axhline(level, color="gray", linestyle=style, linewidth=1, label=label)
    label = "updates of the policy" if over == "updates" else "CPU time with all phases and evaluations [minutes]"
    title = f"{data.env}: unseen tasks, context of their own data"
    axes.set(xlabel=label, ylabel="mean return per episode", title=title)
    axes.set_ylim(top=expert + 0.05 * abs(expert))  # in some families all returns are negative
    save(figure, path)


def draw_episodes(groups, env, path):
    """Return over the own episodes of the protocol `online`, and of IDAQ's adaptation; band: one standard error."""
    figure, axes = canvas()
    for name, seeds in groups.items():
        for part, label in (("own episodes", name), ("own episodes, IDAQ", f"{name}, its adaptation")):
            values = of_episodes(seeds, PARTS[part])
            if len(values):
                style = {"color": COLORS.get(name), "linestyle": "-" if label == name else "--"}
                band(axes, range(1, values.shape[1] + 1), values, label=label, marker=".", **style)
    title = f"{env}: unseen tasks, context of own episodes"
    axes.set(xlabel="own episode", ylabel="mean return of the episode", title=title, xticks=range(1, 11))
    save(figure, path)


def of_episodes(seeds, protocols):
    """Returns [seeds, episodes] of the runs that have all these protocols; older runs have five episodes."""
    of_run = [{r["protocol"]: float(r["return"] or "nan") for r in rows} for rows in seeds.values()]
    return np.array([[run[p] for p in protocols] for run in of_run if set(protocols) <= run.keys()])


def apart(heights, gap):
    """Move heights of labels until `gap` lies between any two; their order stays."""
    order, heights = np.argsort(heights), np.sort(np.array(heights, float))
    for _ in range(500):
        overlap = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= overlap
        heights[1:] += overlap
    return heights[order.argsort()]


def draw_story(files, path):
    """The README's picture, of Ant-Dir. Left: return over own episodes. Right: normalized return with a context of the
    task's own data, and with one recorded by another task's policy. Bands, bars: one standard error over seeds."""
    kept, names = files / "results.csv", {*STORY, "known-task"}
    groups = chosen(kept, "ant-dir", names)
    if absent := ", ".join(sorted(names - groups.keys())):
        raise SystemExit(f"no row of ant-dir, {absent}, in {kept}; make runs: see benchmark/README.md")
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, source in ((left, "own episodes"), (right, "recorded data")):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"Ant-Dir, adapting to {source}", loc="left", weight="bold")

    ends, label = {}, {"va": "center", "weight": "bold"}
    for name in STORY:
        values = of_episodes(groups[name], PARTS["own episodes"])
        band(left, range(1, values.shape[1] + 1), values, color=COLORS[name], marker=".", linewidth=2)
        ends[name] = values[:, -1].mean()
    for name, height in zip(ends, apart(list(ends.values()), gap=30)):
        left.text(10.3, height, STORY[name], color=COLORS[name], **label)
    told = np.mean([float(row["return"]) for row in of(groups["known-task"], "iid")])
    left.axhline(told, color="gray", linestyle="--", linewidth=1)
    left.text(10, told + 8, "policy that knows the direction", color="dimgray", ha="right", va="bottom", fontsize=9)
    left.set(xlabel="own episode in an unseen direction", ylabel="return of the episode")
    left.set(xticks=range(1, 11), xlim=(0.8, 10.2), ylim=(-40, told + 45))

    both = {n: [[float(r["normalized"]) for r in of(groups[n], p)] for p in ("iid", "ood")] for n in STORY}
    ranking = sorted(STORY, key=lambda name: np.mean(both[name][1]))
    for row, name in enumerate(ranking):
        right.plot([np.mean(v) for v in both[name]], [row, row], color=COLORS[name], linewidth=3, alpha=0.35)
        for values, face in zip(both[name], (COLORS[name], "white")):
            style = {"color": COLORS[name], "markerfacecolor": face, "markersize": 9, "capsize": 4}
            right.errorbar(np.mean(values), row, xerr=np.std(values, ddof=1) / len(values) ** 0.5, fmt="o", **style)
    for face, text in (("dimgray", "this task's policy"), ("white", "another task's policy")):
        right.plot([], [], "o", color="dimgray", markerfacecolor=face, markersize=8, label=text)
    right.legend(loc="upper left", frameon=False, title="data recorded by", alignment="left")
    right.set_yticks(range(len(ranking)), [STORY[name] for name in ranking])
    for text, name in zip(right.get_yticklabels(), ranking):
        text.set(color=COLORS[name], **label)
    right.set(xlabel="normalized return (random 0, expert 100)", xlim=(-12, 100))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def write(path):
    """Put anew what stands between <!-- SCRIPT.py FLAGS --> and <!-- end -->: what that script of benchmark/ prints."""

    def printed(match):
        script, *flags = match[1].split()
        try:
            with mock.patch("sys.argv", [script, *flags]), contextlib.redirect_stdout(io.StringIO()) as out:
                with contextlib.chdir(HERE.parent):
                    runpy.run_path(str(HERE / script), run_name="__main__")
        except SystemExit as stopped:
            raise SystemExit(f"{path}: {match[1]}: {stopped}")
        return f"<!-- {match[1]} -->\n{out.getvalue().strip()}\n<!-- end -->"

    if not path.is_file():
        raise SystemExit(f"--write {path}: no such file")
    text = re.sub(r"<!-- (\w+\.py .*?) -->\n.*?<!-- end -->", printed, path.read_text(), flags=re.DOTALL)
    dc.atomic_save(path, lambda file: file.write(text.encode()))


def picture(name):
    """The type of an argument that names a picture."""
    if not name.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{name}: the name must end in .png")
    return Path(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--add", type=Path, metavar="RUNS", help="copy the finished runs of this --run-dir into the files"
    )
    parser.add_argument("--env", nargs="+", default=["ant-dir"], help="task families")
    parser.add_argument("--files", type=Path, default=HERE, help="folder of results.csv and curves.csv")
    parser.add_argument("--figure", type=picture, help="where to write the learning curves (png)")
    parser.add_argument(
        "--over", choices=("updates", "cpu_s"), default="updates", help="what --figure has on its x-axis"
    )
    parser.add_argument("--adaptation", type=picture, help="where to write the returns over own episodes (png)")
    parser.add_argument("--story", type=picture, help="where to write the README's picture (png)")
    parser.add_argument("--only", nargs="+", help="experiment names; by default all but ablations and variants")
    parser.add_argument("--quality", default="mixed", help="of the data, for the tables of families")
    parser.add_argument("--compare", metavar="NAME", help="this experiment with all others, over the families --env")
    parser.add_argument("--gain", metavar="NAME", help="what all others have more than this experiment, seed by seed")
    parser.add_argument("--brief", action="store_true", help="five protocols; with --compare no probabilities")
    parser.add_argument("--columns", nargs="+", choices=(*PROTOCOLS, OWN, TENTH), help="these protocols only")
    parser.add_argument("--write", type=Path, nargs="+", metavar="FILE", help="make the tables in these files anew")
    args = parser.parse_args()
    if args.only and (unknown := set(args.only) - {row["name"] for row in read(args.files / "results.csv")}):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such name in {args.files / 'results.csv'}")
    if args.add:
        return add(args.add, args.files)
    if args.story:
        return draw_story(args.files, args.story)
    if args.compare:
        return print_comparison(args.files / "results.csv", args.compare, args.env, args.only, args.brief)
    if args.gain:
        return print_gains(args.files / "results.csv", args.gain, args.env, args.only, args.columns or GAINS)
    if args.write:
        for path in args.write:
            write(path)
        return None
    for env in args.env:
        groups = chosen(args.files / "results.csv", env, args.only, args.quality)
        if not groups:
            kept = args.files / "results.csv"
            raise SystemExit(f"no row of {env}, {args.quality} data, in {kept}; make runs: see benchmark/README.md")
        print_brief(groups, args.columns or BRIEF) if args.brief else print_tables(groups, args.columns)
        if args.adaptation:
            draw_episodes(groups, env, args.adaptation)
        if args.figure:
            curves = chosen(args.files / "curves.csv", env, args.only, args.quality)
            draw(curves, dc.load_dataset(env), args.figure, args.over)


if __name__ == "__main__":
    with dc.one_line_errors():
        main()
