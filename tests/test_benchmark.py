"""The scripts in benchmark/: what they copy, average, play and list. slurm.sh: see test_slurm.py."""

import contextlib
import csv
import fcntl
import importlib
import json
import os
import re
import shutil

import claims
import flora_paper
import look
import missing
import numpy as np
import pytest
import references
import relabelled
import report
import speed
import tabular
import torch
from conftest import ROOT, flags, start_script, stop_message
from torch.utils.tensorboard import SummaryWriter

import data_collect as dc
import flora
import focal
import omnirl



def write_run(folder, name, seed, returns, quality="mixed", **more):
    """A finished run directory; returns: of two test tasks on iid; more: arguments."""
    run_dir = folder / "point-robot" / name / f"seed{seed}-1"
    run_dir.mkdir(parents=True)
    about = {"args": {"env": "point-robot", "exp_name": name, "seed": seed, **more}, "command": ["flora.py"]}
    about |= {"versions": {"commit": "abc", "torch": "2"}, "dataset": {"settings": {"quality": quality}}}
    result = {"step": 30, "updates_per_sec": 9.0, "cpu_s": 120.0, "z/probe_r2": 0.5, "z/nearest_task_acc": 0.25}
    result |= {f"eval/iid/return_task_{k}": value for k, value in zip(("10", "02"), returns[::-1])}
    result |= {"eval/iid/return": sum(returns) / 2, "eval/iid/return_se": 0.7, "eval/iid/normalized": 50.0 + seed}
    result |= {"eval/iid/q_relative": -0.1, "eval/online/return_ep_1": -9.0, "eval/ood/normalized_far": 7.0}
    result |= {"adapt/return_5_steps": -4.0}
    result |= {"eval/own/return": 70.0, "eval/own/normalized": 80.0, "eval/own/normalized_ep_10": 60.0}  # as omnirl.py
    (run_dir / "args.json").write_text(json.dumps(about))
    (run_dir / "result.json").write_text(json.dumps(result))
    rows = ["20,eval/iid/return,-8", "20,eval/iid/q_error,2", "20,losses/q,1", "20,eval/train/return,-6"]
    rows += [f"{k},bandit/prob_{a:.2f},{k * p}" for k in (1, 2) for a, p in ((-0.5, 0.2), (0, 0.3), (-1, 0.1))]
    rows += [f"30,eval/iid/return,-5\n30,eval/iid/q_error,{3 + seed}", "20,stats/divergence,0.2"]
    (run_dir / "metrics.csv").write_text("\n".join(["step,tag,value", *rows, "30,stats/divergence,0.3\n"]))
    return run_dir


def change(path, part=None, **values):
    """Set values in a JSON file, or in that part of it."""
    content = json.loads(path.read_text())
    (content if part is None else content[part]).update(values)
    path.write_text(json.dumps(content))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells(text):
    """Rows of the markdown tables in a text, headers included."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# ---- from run directories to results.csv and curves.csv -----------------------------------


def test_finished_runs_are_copied_with_all_numbers(tmp_path):
    write_run(tmp_path / "runs", "flora", 0, [-6.0, -2.0], lr=0.5)
    (write_run(tmp_path / "runs", "flora", 4, [0.0, 0.0]) / "result.json").unlink()
    with SummaryWriter(str(tmp_path / "runs/point-robot/flora/seed0-1")) as writer:
        for step, seconds in ((10, 6.0), (20, 9.0), (30, 12.0)):  # after 100 updates of an earlier phase
            writer.add_scalar("charts/cpu_s", seconds, 100 + step)
            writer.add_scalar("eval/iid/return", 0.0, 100 + step)
    report.add(tmp_path / "runs", tmp_path)
    rows = {row["protocol"]: row for row in table(tmp_path / "results.csv")}
    assert set(rows) == {"iid", "own", "ep_1", "ep_10", "far", "steps_5"}
    assert (rows["own"]["normalized"], rows["ep_10"]["normalized"], rows["own"]["args"]) == ("80", "60", rows["iid"]["args"])
    known = {"env": "point-robot", "quality": "mixed", "name": "flora", "seed": "0", "updates": "30", "commit": "abc"}
    assert all(row.items() >= known.items() for row in rows.values())
    wanted = {"return": "-4", "return_se": "0.7", "normalized": "50", "q_relative": "-0.1", "by_task": "-6 -2"}
    wanted |= {"probe_r2": "0.5", "nearest_task_acc": "0.25", "cpu_s": "120", "updates_per_sec": "9", "torch": "2"}
    wanted |= {"arms": "0.2000 0.4000 0.6000", "args": '{"lr":0.5,"dataset\'s quality":"mixed"}', "diverged": ""}
    assert rows["iid"].items() >= wanted.items()
    assert (rows["ep_1"]["return"], rows["steps_5"]["return"], rows["far"]["normalized"]) == ("-9", "-4", "7")
    points = [tuple(row[k] for k in report.CURVES[4:]) for row in table(tmp_path / "curves.csv")]
    assert points == [("20", "9", "-8", "-6", "2", "0.2"), ("30", "12", "-5", "", "3", "0.3")]


def test_new_run_replaces_only_its_own_rows(tmp_path):
    for name, quality in (("flora", "mixed"), ("flora-x", "random"), ("focal", "mixed")):
        write_run(tmp_path / "old", name, 0, [-6.0, -2.0], quality)
    earlier = write_run(tmp_path / "new", "flora", 0, [-9.0, -9.0]).rename(tmp_path / "new/point-robot/flora/seed0-2")
    os.utime(earlier / "result.json", (1, 1))  # of two runs the newest counts
    write_run(tmp_path / "new", "flora", 0, [-1.0, -1.0])
    for folder in ("old", "new"):
        report.add(tmp_path / folder, tmp_path)
    rows = [row for row in table(tmp_path / "results.csv") if row["protocol"] == "iid"]
    assert [f"{r['name']} {r['return']}" for r in rows] == ["flora -1", "focal -4", "flora-x -4"]
    assert len(table(tmp_path / "curves.csv")) == 6


def test_mixed_arguments_and_lengths_are_refused(tmp_path):
    write_run(tmp_path / "old", "flora", 1, [-4.0, -6.0], lr=0.25, log_every=1)
    report.add(tmp_path / "old", tmp_path)
    about = write_run(tmp_path / "runs", "flora", 2, [-4.0, -6.0], lr=0.5, log_every=2) / "args.json"
    said = "point-robot, flora: seed 2 has lr 0.5, seed 1 has 0.25; give it an --exp-name of its own"
    before = (tmp_path / "results.csv").read_bytes()
    assert said in stop_message(report.add, tmp_path / "runs", tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == before
    change(about, "args", lr=0.25)
    report.add(tmp_path / "runs", tmp_path)
    change(about.parent / "result.json", step=20)
    assert f"{about.parent}: has 20 updates" in stop_message(report.add, tmp_path / "runs", tmp_path)


# ---- statistics and tables ----------------------------------------------------------------


def test_tables_show_means_errors_and_diverged_episodes(tmp_path, capsys):
    for seed, returns in enumerate(([-6.0, -2.0], [-2.0, -2.0], [-3.0, -3.0])):
        path = write_run(tmp_path / "runs", "flora", seed, returns)
    for name in ("focal", "flora-no-flows", "macaw-buffer"):  # the last two belong to side lists
        write_run(tmp_path / "runs", name, 0, [-6.0, -2.0])
    write_run(tmp_path / "runs", "csro", 0, [-6.0, -2.0], "medium")
    change(path / "result.json", **{"eval/iid/diverged": 2.0})
    report.add(tmp_path / "runs", tmp_path)
    capsys.readouterr()
    report.print_tables(report.chosen(tmp_path / "results.csv", "point-robot", None))
    out = capsys.readouterr().out
    _, flora, focal_, steps, *_ = cells(out)
    assert flora[:3] == ["flora", "3", "-3.00 ± 0.58 (51)†"]  # sqrt(((1 + 1 + 0) / 2) / 3)
    assert focal_[:3] == ["focal", "1", "-4.00 ± 0.70 (50)"]  # of a single seed: over tasks and episodes
    assert steps[0] == "method, own episodes"  # the first table has no more rows
    assert flora[-5:] == ["-0.10 ± 0.00", "0.25 ± 0.00", "0.50 ± 0.00", "30", "2"]
    assert out.count("†") == 2 and "\n† The physics diverged" in out


def test_gains_are_paired_by_seed(tmp_path, capsys):
    rows = [("focal", 0, "iid", 50), ("focal", 1, "iid", 80), ("focal", 0, "online", 10), ("focal", 1, "online", 20)]
    rows += [("idaq", 0, "iid", 50), ("idaq", 1, "iid", 84), ("idaq", 2, "iid", -999)]  # no reference of seed 2
    rows += [("idaq", 0, "online", 9), ("csro", 1, "iid", 79.8)]
    columns = dict.fromkeys(report.RESULTS, "") | {"env": "point-robot", "quality": "mixed"}
    kept = [columns | dict(zip(("name", "seed", "protocol", "normalized"), map(str, row))) for row in rows]
    report.merge(tmp_path / "results.csv", report.RESULTS, kept)
    report.print_gains(tmp_path / "results.csv", "focal", ["point-robot"], None)
    header, csro, idaq = cells(capsys.readouterr().out)
    assert header[3:] == ["iid", "ood", "ood_random", "online", "online_random_start"]
    assert csro == ["point-robot", "csro", "1", "0", "", "", "", ""]  # -0.2 is no minus
    assert idaq == ["point-robot", "idaq", "2", "2 ± 2", "", "", "-1", ""]  # of 0 and 4; -1


def test_tenth_column_prefers_idaqs_adaptation():
    rows = [{"protocol": protocol} for protocol in ("ep_9", "ep_10", "idaq")]
    assert report.of({0: rows[:2]}, "tenth") == rows[1:2] and report.of({0: rows}, "tenth") == rows[2:]


def test_interquartile_mean_equals_hand_made_vectors():
    def mean(table, seeds=None, tasks=None):
        whole = (np.ones((1, n)) if c is None else np.array([c]) for n, c in zip(np.shape(table), (seeds, tasks)))
        return report.interquartile_mean(np.array(table), *whole)[0]

    assert mean([[7.0]]) == 7
    assert mean([[100.0, -9.0, 2.0, 3.0], [4.0, -50.0, 5.0, 6.0]]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    # five values: three quarters of the second and of the fourth, the third whole
    assert mean([[9.0, 1.0, 5.0, 2.0, -90.0]]) == pytest.approx((0.75 * 1 + 2 + 0.75 * 5) / 2.5)
    # a sample: the second seed twice, of the tasks 1, 0, 2, 1, 1
    sample = mean([[4.0] * 5, [9.0, 8.0, 1.0, 2.0, -9.0]], [0, 2], [1, 0, 2, 1, 1])
    assert sample == pytest.approx((0.75 * 1 + 1 + 0.75 * 2) / 2.5)


def test_improvement_equals_hand_made_vectors():
    ours, theirs = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0]])
    one, two = np.ones((1, 1)), np.ones((1, 2))
    assert report.improvement(ours, theirs, two, one, two) == (0 + 1 + 0.5 + 0.5) / 4
    assert report.improvement(theirs, ours, one, two, two) == 1 - (0 + 1 + 0.5 + 0.5) / 4
    seeds, tasks = np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[2.0, 0.0]] * 2)  # the first task alone
    assert report.improvement(ours, theirs, seeds, np.ones((2, 1)), tasks).tolist() == [1, 0]
    assert report.improvement(theirs, ours, np.ones((2, 1)), seeds, tasks).tolist() == [0, 1]


def test_intervals_equal_hand_made_tables():
    counts = report.resampled(3, np.random.default_rng(0), 3_000)
    assert counts.shape == (3_001, 3) and (counts[0] == 1).all() and (counts.sum(1) == 3).all()
    assert counts[1:].var(0) == pytest.approx([2 / 3] * 3, abs=0.05)  # 3 draws, each one of three: 3 * 1/3 * 2/3
    # of two families, one without any spread: half of the other's
    tables = [np.array([[0.0, 100.0]] * 8), np.array([[10.0]])]
    assert report.interval(report.interquartile_mean, tables[:1], draws=500) == "50 [0, 100]"
    assert report.interval(report.interquartile_mean, tables, draws=500) == "30 [5, 55]"


def test_scores_are_normalized_task_by_task(tmp_path, monkeypatch):
    ids, random, expert = np.array([2, 0]), np.array([-10.0, 7.0, 0.0]), np.array([-5.0, 8.0, 4.0])
    (tmp_path / "datasets").mkdir()
    np.savez(tmp_path / "datasets" / "x.npz", test_ids=ids, random_returns=random, expert_returns=expert)
    monkeypatch.setattr(report, "HERE", tmp_path / "benchmark")
    rows = ["x,mixed,focal,0,iid,35,2 -9", "x,mixed,focal,1,iid,50,4 -10", "x,mixed,focal,0,ood,0,0 -10"]
    header = "env,quality,name,seed,protocol,normalized,by_task"
    (tmp_path / "results.csv").write_text("\n".join([header, *rows, "x,mixed,other,0,iid,60,2 -9"]))
    found = report.scores(tmp_path / "results.csv", "x", "iid", ["focal"])
    assert list(found) == ["focal"] and found["focal"].tolist() == [[50, 20], [100, 0]]
    message = stop_message(report.scores, tmp_path / "results.csv", "x", "iid", ["other"])
    assert message.startswith("other, seed 0: not of ")  # 35, not 60: of other data


def test_comparison_needs_all_families(monkeypatch, capsys):
    """A method that is worse on every task is so in every draw of the tasks, however far these lie apart."""
    flora, other = np.array([[0.0, 100.0], [0.0, 100.0]]), np.array([[-1.0, 99.0]])
    found = {"x": {"flora": flora, "focal": other, "corro": other}, "y": {"flora": flora, "focal": other[:, ::-1] + 1}}
    monkeypatch.setattr(report, "scores", lambda path, env, *_: found[env])
    report.print_comparison(None, "flora", ["x"], None)
    _, corro, own, _ = cells(capsys.readouterr().out)
    assert corro == ["corro", "1", *["49 [-1, 99]", "0.00 [0.00, 0.00]"] * 3]
    assert own == ["flora", "2", *["50 [0, 100]", ""] * 3]
    report.print_comparison(None, "flora", ["x", "y"], None)
    _, own, both = cells(capsys.readouterr().out)
    # the mean of 0 (x) and of a half (y: tasks exchanged, better on one of two)
    assert own[0] == "flora" and both[:2] == ["focal", "1/1"] and both[3] == "0.25 [0.00, 0.50]"


def test_variants_are_paired_by_seed(tmp_path, capsys):
    for seed, value in enumerate((-4.0, -6.0, -2.0)):
        write_run(tmp_path / "runs", "flora", seed, [value, value])
    for seed, value, bc in ((2, -1.0, -3.5), (1, -3.0, -4.5)):
        run_dir = write_run(tmp_path / "runs", "flora-plain", seed, [value, value])
        change(run_dir / "result.json", **{"eval/bc/return": bc})
        metrics = run_dir / "metrics.csv"
        metrics.write_text(metrics.read_text().replace(f"q_error,{3 + seed}", f"q_error,{3 + 2 * seed}"))
    write_run(tmp_path / "other", "flora", 0, [50.0, 50.0], quality="random")  # of that name, but of other data
    for folder in ("runs", "other"):
        report.add(tmp_path / folder, tmp_path)
    capsys.readouterr()
    claims.figure1(tmp_path, "point-robot", None)
    _, full, plain = cells(capsys.readouterr().out)
    assert full[:4] == ["shipped", "full", "3", "-4.00 ± 1.15"] and full[-3:] == ["", "", ""]
    assert plain[:4] == ["shipped", "plain", "2", "-2.00 ± 1.00"]
    assert plain[-3:] == ["2.00 ± 0.50", "2.00 ± 1.00", "1.50 ± 0.50"]


@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md", "docs/CLAIMS.md"])
def test_documents_regenerate_identically(name, tmp_path):
    text = re.sub(r"(<!-- .*?) --figure \S+", r"\1", (ROOT / name).read_text())  # without drawing
    emptied = re.sub(r"(<!-- \w+\.py .*? -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text
    (tmp_path / "copy.md").write_text(emptied)
    report.write(tmp_path / "copy.md")
    assert (tmp_path / "copy.md").read_text() == text


# ---- what claims.py and look.py play ------------------------------------------------------


class Recorder:
    """Instead of a script: walks in a fixed direction and keeps every context that it is given."""

    def __init__(self):
        self.seen = []

    def adapt(self, agent, context, mask, explore=False):
        self.seen.append((context.clone(), mask.clone()))
        return lambda obs, rew: torch.full((len(obs), 2), 0.05) * torch.tensor([1.0, -1.0])


def test_contexts_have_the_given_length(tiny):
    script = Recorder()
    assert len(claims.by_length([1, 3, 20], script, None, tiny, None)) == len(script.seen) == 3
    for n, (context, mask) in zip((1, 3, 20), script.seen):
        assert mask[:, :n].eq(1).all() and mask[:, n:].eq(0).all()


def test_parts_of_contexts_come_from_another_task(tiny):
    script = Recorder()
    found = claims.by_part(script, None, tiny, None)
    (own, mask), *swapped = script.seen
    rows, reward = np.arange(len(own)), tiny.obs_dim + tiny.act_dim
    tasks = tiny.test_ids.repeat(claims.EPISODES)
    other = rows - claims.EPISODES * (len(tiny.test_ids) // 2)  # negative ones count from the end
    assert len(found) == 3 and len(swapped) == 2 and (tasks != tasks[other]).all()
    rest = [k for k in range(own.shape[-1]) if k != reward]
    for (context, its_mask), (theirs, mine) in zip(swapped, (([reward], rest), (rest, [reward]))):
        assert torch.equal(its_mask, mask)
        assert torch.equal(context[..., theirs], own[other][..., theirs])
        assert torch.equal(context[..., mine], own[..., mine])


def test_missing_runs_and_functions_have_remedies(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path, "mine", 0, [0.0, 0.0])
    change(run_dir / "args.json", None, script="json")  # a module without evaluate_all
    assert "evaluate in a function evaluate_all" in stop_message(report.revisit, run_dir, None)
    monkeypatch.setattr("sys.argv", ["claims.py", "drift", "--env", "ant-dir", "--only", "focal", "--runs", "none"])
    assert "make one: python focal.py --env ant-dir --run-dir none" in stop_message(claims.main)


@pytest.mark.parametrize("own", [True, False])
def test_drifting_tasks_change_rewards_and_contexts(tiny, own, monkeypatch):
    for name, value in (("STEPS", 120), ("GAP", 40), ("GAP_SPREAD", 4)):
        monkeypatch.setattr(claims, name, value)
    script, tasks, real = Recorder(), [], dc.TaskEnv.step

    def step(env, act):
        tasks.append(env.task_ids.copy())
        return real(env, act)

    monkeypatch.setattr(dc.TaskEnv, "step", step)
    rewards, since = claims.drifting(own, script, None, tiny, None)
    tasks = np.array(tasks).T  # [R, 120]
    assert tasks.shape == (3 * claims.EPISODES, 120) and set(tasks.flat) == set(tiny.test_ids)
    position = 0.1 * 0.05 * np.arange(1, 121)[:, None] * np.array([1.0, -1.0])
    assert np.allclose(rewards, -np.linalg.norm(position - tiny.task_params[tasks], axis=-1), atol=1e-6)
    changed = tasks[:, 1:] != tasks[:, :-1]
    assert changed.any() and (since[:, 1:][changed] == 0).all() and 30 < since.max() < 60
    reward = tiny.obs_dim + tiny.act_dim
    context, mask = script.seen[100]
    assert context.shape[1] == 20 and mask.eq(1).all()
    if own:
        assert np.allclose(context[..., reward], rewards[:, 80:100], atol=1e-6)
        assert np.allclose(context[:, :-1, -tiny.obs_dim :], context[:, 1:, : tiny.obs_dim])
    else:
        recorded = tiny.episodes[tasks[:, 100], ..., : context.shape[-1]]  # [R, N, H, ctx_dim]
        assert (recorded == context[:, None]).all((2, 3)).any(1).all()


@pytest.fixture(scope="module")
def finished(tiny_path, tmp_path_factory):
    """A line of a list, and the --run-dir in which its run is finished."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"env": "point-robot", "dataset": tiny_path, "seed": 3, "total_updates": 40, "width": 16}
    settings |= {"save_every": 20, "log_every": 20, "eval_every": 20, "final_episodes": 1, "device": "cpu"}
    words = [*flags(settings), "--run-dir", str(folder)]
    dc.command_line(focal.Args, focal.train, focal.__doc__, focal.ENV_DEFAULTS, words)
    return " ".join(["python", "focal.py", *flags(settings)]), folder


def test_figures_are_drawn(finished, tmp_path, monkeypatch):
    imread = pytest.importorskip("matplotlib.image").imread
    run_dir = next(finished[1].glob("point-robot/focal/*"))
    pictures = [str(tmp_path / f"{k}.png") for k in range(6)]
    for module, words in (
        (report, ["--env", "point-robot", "--figure", pictures[0], "--over", "cpu_s", "--adaptation", pictures[1]]),
        (claims, ["figure1", "--figure", pictures[2]]),
        (report, ["--story", pictures[5]]),
        (look, [str(run_dir), "--figure", pictures[3], "--z", pictures[4]]),
    ):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *words])
        module.main()
    assert all(imread(path).std() > 0.01 for path in pictures)


# ---- speed.py, references.py, tabular.py --------------------------------------------------


def test_speed_counts_arithmetic_and_operations():
    with speed.Counter() as counter:
        (torch.ones(8, 16) @ torch.ones(16, 4)).relu().add_(1)
    assert counter.flops == 2 * 8 * 16 * 4 and counter.operations == 2 + 3  # two tensors of ones, three operations


def test_reference_knows_each_rows_task(tiny_path, monkeypatch):
    """Instead of focal.adapt: every row walks to the goal that it is told."""
    data, rows = references.known_tasks("point-robot", tiny_path), []
    train = torch.as_tensor(data.task_params[data.train_ids])

    def adapt(agent, context, mask, explore=False, bc=False):
        told = references.Known(2)(context, mask) * train.std(0) + train.mean(0)
        rows.append(len(told))
        return lambda obs, rew: ((told - obs * data.obs_std - data.obs_mean) * 10).clamp(-1, 1)

    monkeypatch.setattr(focal, "adapt", adapt)
    monkeypatch.setattr(focal, "value", lambda agent, args, context, mask, obs: torch.zeros(obs.shape[:2]))
    results = references.evaluate_all(None, data, references.Args(env="point-robot", gamma=0.9), None, 2)
    assert sorted(set(rows)) == [2 * 3, 2 * 6]  # episodes x tasks, for test and training
    for protocol in ("iid", "train", "bc"):  # straight to a goal at distance 1: 1 + 0.9 + ... if along an axis
        assert results[f"eval/{protocol}/return"] > -5.5, protocol
    assert not any(key.startswith(("eval/ood", "eval/online", "eval/zero_shot")) for key in results)
    told = references.Known(2)(data.sample_context(np.array([3, 0, 7]), 64, None), None)
    assert np.allclose(told, (data.task_params[[3, 0, 7]] - train.mean(0).numpy()) / train.std(0).numpy(), atol=1e-5)


def test_reference_run_counts_as_finished(tiny_path, tmp_path):
    settings = {"env": "point-robot", "dataset": tiny_path, "total_updates": 20, "width": 16, "final_episodes": 1}
    line = " ".join(["python", "benchmark/references.py", *flags(settings | {"device": "cpu"})])
    process = start_script(tmp_path, *line.split()[1:], "--run-dir", str(tmp_path))
    assert process.wait() == 0, process.stderr.read()
    (run_dir,) = (tmp_path / "point-robot" / "known-task").iterdir()
    assert json.loads((run_dir / "args.json").read_text())["args"]["z_dim"] == 2
    assert missing.state(line, str(tmp_path))[0] == "finished"


def test_missing_knows_every_listed_script(tmp_path):
    lines = [line for path in (ROOT / "benchmark").glob("*.txt") for line in path.read_text().splitlines()]
    by_script = {line.split()[1]: line for line in lines if line.startswith("python ")}
    assert len(by_script) > 12
    for line in by_script.values():
        assert missing.state(line, str(tmp_path))[0] == "missing"


def test_relabelled_contexts_have_their_tasks_rewards(tiny_path):
    """Half of them are recorded on any task."""
    data = relabelled.relabelled("point-robot", tiny_path, args=relabelled.Args(labels="true"))
    task_ids = data.train_tasks.repeat(50)
    context = data.sample_context(task_ids, 8, torch.Generator().manual_seed(0))
    goals = torch.as_tensor(data.task_params[task_ids]).float()
    reached = context[..., 5:7] * data.obs_std + data.obs_mean
    torch.testing.assert_close(context[..., 4], -(reached - goals[:, None]).norm(dim=-1), atol=1e-5, rtol=0)
    own = {tuple(row) for row in data.episodes[..., 2:4].flatten(1, 2)[task_ids[0]].tolist()}
    shares = [tuple(act) in own for row in context[task_ids == task_ids[0], :, 2:4].tolist() for act in row]
    assert 0.4 < np.mean(shares) < 0.75  # a sixth of the other half is its own, too


def test_models_are_trusted_on_their_own_data(tiny_path):
    """Task 2 is moved to a place where no other task has been."""
    data = dc.load_dataset("point-robot", tiny_path)
    moved = data.train_tasks[2]
    data.episodes[moved][..., :2] += 20
    data.episodes[moved][..., 5:7] += 20
    labels, trusted = relabelled.rewards_by_models(data, relabelled.Args(model_updates=300, max_ratio=0.2))
    own = torch.eye(len(labels), dtype=torch.bool)
    rew = data.episodes[data.train_tasks][..., 4]
    assert (labels[own] - rew)[:2].pow(2).mean() < 0.05 * rew.var()
    assert trusted[own].float().mean() > 0.8
    assert trusted[:2, :2].float().mean() > 0.6 and not trusted[:2, 2].any()
    plain, few = dc.load_dataset("point-robot", tiny_path), relabelled.Args(model_updates=300, max_ratio=0.1)
    assert not relabelled.rewards_by_models(plain, few)[1].any()  # a quarter is less than a third: none is trusted


def test_only_trusted_episodes_become_contexts(tiny_path, monkeypatch):
    data = dc.load_dataset("point-robot", tiny_path)
    tasks, episodes, steps = len(data.train_tasks), *data.episodes.shape[1:3]
    trusted = torch.zeros(tasks, tasks, episodes, dtype=torch.bool)
    trusted[0, 2, 1] = True  # task 0: the second episode of the third task; the others: none
    labels = torch.full((tasks, tasks, episodes, steps), 7.0)
    monkeypatch.setattr(relabelled, "rewards_by_models", lambda data, args: (labels, trusted))
    made = relabelled.relabelled("point-robot", tiny_path)
    context = made.sample_context(data.train_tasks.repeat(200), 4, torch.Generator().manual_seed(0))
    context = context.unflatten(0, (200, tasks))
    foreign = (context[..., 4] == 7).all(-1)  # [200, tasks]
    assert 0.4 < foreign[:, 0].float().mean() < 0.6 and not foreign[:, 1:].any()
    assert (context[~foreign][..., 4] != 7).all()
    acts = data.episodes[data.train_tasks[2], 1, :, 2:4]
    assert torch.isin(context[:, 0][foreign[:, 0]][..., 2:4], acts).all()


def test_papers_policy_has_its_own_network(tiny_path, monkeypatch):
    """And no network has layer norm."""
    monkeypatch.setattr(flora, "MLP", flora_paper.PlainMLP)
    args = dc.resolve(flora_paper.Args(env="point-robot", width=8), flora.ENV_DEFAULTS)
    agent = flora_paper.Agent(dc.load_dataset("point-robot", tiny_path), args)
    obs, z = torch.randn(3, 4, 2), torch.randn(3, 5)
    pi, pi_beta = agent.policies(obs, z)
    agent.behavior.net[-1].bias.data += 5
    after, moved = agent.policies(obs, z)
    assert torch.equal(pi.mean, after.mean) and not torch.equal(pi_beta.mean, moved.mean)
    assert not any(isinstance(layer, torch.nn.LayerNorm) for layer in agent.modules())


def transition(state, act, rew, next_state):
    """A row of a context of any-mdp; the action's vector is as the behavior's, its entry above all others."""
    return np.concatenate([np.eye(16)[state], np.eye(5)[act] - 0.7, [rew], np.eye(16)[next_state]])


def test_counted_model_plans_from_its_context():
    """From state 0, action 1 earns 1 and returns by way of state 1; action 0 earns 3 on average, once, and leads where
    nothing goes on; from state 5 the one known action loses, but less than an unknown one counts."""
    rows = [transition(0, 1, 1.0, 1), transition(1, 2, 1.0, 0), transition(5, 4, -2.0, 6)]
    rows += [transition(0, 0, 1.0, 7), transition(0, 0, 5.0, 7), transition(7, 3, 0.5, 8), transition(0, 0, 3.0, 8)]
    rows += [transition(0, 1, 90.0, 1)]  # behind the mask
    context = torch.tensor(np.stack([rows, rows[::-1]]), dtype=torch.float32)
    mask = torch.tensor([[1.0] * 7 + [0.0], [0.0] + [1.0] * 7])
    q = tabular.plan(*tabular.count(context, mask))
    forever = (1 - 0.99**300) / (1 - 0.99)
    wanted = torch.full((2, 16, 5), -100.0)
    for place, value in {(0, 1): forever, (1, 2): forever, (5, 4): -2.0, (7, 3): 0.5}.items():
        wanted[:, *place] = value
    wanted[:, 0, 0] = 3 + 0.99 * 2 / 3 * 0.5
    # the last of 300 steps may well lead where nothing goes on
    torch.testing.assert_close(q, wanted, rtol=2e-3, atol=0)
    policy, explore = tabular.adapt(context, mask), tabular.adapt(context, mask, True)
    for state, act in ((0, 1), (1, 2), (5, 4), (7, 3)):
        obs = torch.eye(16)[[state, state]]
        assert policy(obs, None).argmax(-1).tolist() == [act, act] and policy(obs, None).shape == (2, 5)
        untried = {2, 3, 4} if state == 0 else set(range(5)) - {act}
        for own in zip(*(explore(obs, None).argmax(-1).tolist() for _ in untried)):  # of each row
            assert set(own) == untried


@pytest.mark.parametrize("name", ["dark-room", "bandit", "any-mdp-32"])
def test_worlds_pay_100_above_chance(name):
    tasks, choose, test = tabular.world(name, np.random.default_rng(0))
    assert not set(choose) & set(test) and len(tasks.start) == len(choose) + len(test)
    assert np.allclose(tasks.transitions.sum(-1)[~tasks.ends], 1) and np.allclose(tasks.start.sum(-1), 1)
    if name == "any-mdp-32":
        assert tasks.ends.shape[1] == 32
        return
    for make, wanted in ((tabular.optimal, 100), (tabular.uniform, 0)):
        assert abs(tabular.own_episodes(make, tasks, test, 2).mean() - wanted) < 4


def test_model_reads_context_and_own_steps():
    rows = [transition(0, 1, 1.0, 1), transition(1, 2, -3.0, 0), transition(0, 1, 4.0, 1), transition(9, 0, 8.0, 9)]
    context, mask = torch.tensor(np.stack([rows] * 2), dtype=torch.float32), torch.tensor([[1.0, 1, 1, 0]] * 2)
    seen = []

    class Agent:
        def probs(self, counts, streams, temperature):
            seen.append(omnirl.Counts(*(x.clone() for x in counts)))
            return np.eye(5)[np.full((2, 16), 3)]

    policy = tabular.read(Agent(), omnirl.Args(temperature=0.5), 1, context, mask)
    for state, rew in ((5, 0.0), (6, 2.0), (5, -7.0)):
        assert policy(torch.eye(16)[[state, state]], torch.tensor([rew, rew])).argmax(-1).tolist() == [3, 3]
    steps = [(0, 1, 1, 1, 1), (1, 2, 0, -3, 1), (0, 1, 1, 4, 1), (5, 3, 6, 2, 0), (6, 3, 5, -7, 0)]
    for counts, number in zip(seen, (3, 4, 5)):
        moves, sums = np.zeros((16, 5, 16)), np.zeros((3, 16, 5))
        for s, a, after, rew, tag in steps[:number]:
            moves[s, a, after] += 1
            sums[:, s, a] += rew, rew**2, tag
        assert np.array_equal(counts.moves[1], moves) and not counts.ends.any()
        assert all(np.allclose(x[1], y) for x, y in zip(counts[1:4], sums))


# ---- lists of runs, and programs ----------------------------------------------------------


def test_runs_are_missing_running_begun_or_finished(finished, tmp_path):
    line, run_dir = finished[0], str(tmp_path / "runs")
    kind, state = ("focal.py", "point-robot"), lambda flag="": missing.state(f"{line}{flag}", run_dir)
    assert state() == ("missing", f"{line} --run-dir {run_dir}", kind)
    shutil.copytree(finished[1], run_dir)
    (path,) = (tmp_path / "runs/point-robot/focal").iterdir()
    assert state() == ("finished", json.loads((path / "result.json").read_text())["cpu_s"], kind)
    for other in ("--seed 4", "--lr 0.5", "--total-updates 50", "--exp-name other"):
        assert state(f" {other}")[0] == "missing", other
    assert state(" --log-every 7")[0] == "finished"  # no other run
    for value, found in ((0.8, "missing"), (0.9, "finished")):  # the default of this family
        change(path / "args.json", "args", gamma=value)
        assert state()[0] == found
    (path / "result.json").unlink()
    assert state() == ("begun", f"python focal.py --resume {path}", kind)
    with open(path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state()[0] == "running"
    (path / "checkpoint.pt").unlink()
    assert state()[0] == "missing"


def test_runs_of_drawn_tasks_need_no_dataset(tmp_path):
    settings = {"device": "cpu", "total_updates": 1, "streams": 2, "context_rows": 64, "width": 8, "depth": 2}
    settings |= {"final_episodes": 1, "final_plays": 1}
    line = " ".join(["python", "omnirl.py", *flags(settings)])
    assert missing.state(line, str(tmp_path))[0] == "missing"
    result = omnirl.train(omnirl.Args(**settings, run_dir=str(tmp_path)))
    assert missing.state(line, str(tmp_path)) == ("finished", result["cpu_s"], ("omnirl.py", "any-mdp"))
    assert missing.state(f"{line} --seed 1", str(tmp_path))[0] == "missing"
    row = {"env": "any-mdp", "quality": "drawn", "name": "omnirl", "seed": "2", "updates": "40", "cpu_s": "9"}
    assert missing.state("python omnirl.py --seed 2", str(tmp_path), [row])[:2] == ("finished", 9.0)


@pytest.mark.parametrize("name", ["report", "claims", "look", "missing", "ood", "speed", "tabular", "weights"])
def test_every_program_starts(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with contextlib.suppress(SystemExit):
        importlib.import_module(name).main()
    assert capsys.readouterr().out.strip().startswith("usage: ")
