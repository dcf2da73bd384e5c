"""The scripts in benchmark/: what they copy, average and play."""

import csv
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, run_script, stop_message
from torch.utils.tensorboard import SummaryWriter

import data_collect as dc

sys.path.append(str(ROOT / "benchmark"))
SCRIPTS = ("report", "claims", "look", "missing", "ood", "references", "speed", "tabular")
report, claims, look, missing, ood, references, speed, tabular = (importlib.import_module(name) for name in SCRIPTS)


def write_run(folder, name, seed, returns, quality="mixed", stamp="1"):
    """A finished run directory with two test tasks, of returns [2] on iid."""
    run_dir = folder / "point-robot" / name / f"seed{seed}-{stamp}"
    run_dir.mkdir(parents=True)
    args = {"env": "point-robot", "exp_name": name, "seed": seed}
    about = {"args": args, "versions": {"commit": "abc", "torch": "2"}, "command": ["flora.py"]}
    about["dataset"] = {"settings": {"quality": quality}}
    result = {"step": 30, "updates_per_sec": 9.0, "cpu_s": 120.0, "z/probe_r2": 0.5, "z/nearest_task_acc": 0.25}
    result |= {"eval/iid/return": sum(returns) / 2, "eval/iid/return_se": 0.7, "eval/iid/normalized": 50.0 + seed}
    result |= {
        "eval/iid/return_task_10": returns[1],
        "eval/iid/return_task_02": returns[0],
        "eval/iid/q_relative": -0.1,
    }
    result |= {"eval/online/return_ep_1": -9.0, "eval/ood/normalized_far": 7.0, "adapt/return_5_steps": -4.0}
    (run_dir / "args.json").write_text(json.dumps(about))
    (run_dir / "result.json").write_text(json.dumps(result))
    rows = [
        (20, "eval/iid/return", -8.0),
        (20, "eval/iid/q_error", 2.0),
        (20, "losses/q", 1.0),
        (20, "eval/train/return", -6),
    ]
    for alpha, p in ((-0.5, 0.2), (0, 0.3), (-1, 0.1)):
        rows += [(10 * k, f"bandit/prob_{alpha:.2f}", k * p) for k in (1, 2)]
    rows += [(30, "eval/iid/return", -5.0), (30, "eval/iid/q_error", 3.0)]
    rows += [(10 * k, "stats/divergence", k / 10) for k in (1, 2, 3)]
    (run_dir / "metrics.csv").write_text("step,tag,value\n" + "".join(f"{s},{t},{v}\n" for s, t, v in rows))
    return run_dir


def change(path, part=None, **values):
    """Set values in a JSON file, or in that part of it."""
    content = json.loads(path.read_text())
    (content if part is None else content[part]).update(values)
    path.write_text(json.dumps(content))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_finished_runs_are_copied_with_all_their_numbers(tmp_path):
    write_run(tmp_path / "runs", "flora", 3, [-6.0, -2.0])
    unfinished = write_run(tmp_path / "runs", "flora", 4, [0.0, 0.0])
    (unfinished / "result.json").unlink()
    report.add(tmp_path / "runs", tmp_path)
    rows = {row["protocol"]: row for row in table(tmp_path / "results.csv")}
    assert set(rows) == {"iid", "ep_1", "far", "steps_5"}
    known = {"env": "point-robot", "quality": "mixed", "name": "flora", "seed": "3", "updates": "30", "commit": "abc"}
    assert all(row.items() >= known.items() for row in rows.values())
    wanted = {"return": "-4", "return_se": "0.7", "normalized": "53", "q_relative": "-0.1", "by_task": "-6 -2"}
    wanted |= {"probe_r2": "0.5", "nearest_task_acc": "0.25", "cpu_s": "120", "updates_per_sec": "9", "torch": "2"}
    wanted |= {"arms": "0.2000 0.4000 0.6000"}
    assert rows["iid"].items() >= wanted.items()
    assert (rows["ep_1"]["return"], rows["steps_5"]["return"], rows["far"]["normalized"]) == ("-9", "-4", "7")
    points = [tuple(row[k] for k in report.CURVES[4:]) for row in table(tmp_path / "curves.csv")]
    assert points == [("20", "", "-8", "-6", "2", "0.2"), ("30", "", "-5", "", "3", "0.3")]


def test_curves_have_the_cpu_time_of_the_evaluation_all_phases_included(tmp_path):
    run_dir = write_run(tmp_path / "runs", "corro", 0, [-6.0, -2.0])
    with SummaryWriter(str(run_dir)) as writer:  # 100 updates of an earlier phase come first
        for step, seconds in ((10, 6.0), (20, 9.0), (30, 12.0)):
            writer.add_scalar("charts/cpu_s", seconds, 100 + step)
            if step > 10:
                writer.add_scalar("eval/iid/return", 0.0, 100 + step)
    report.add(tmp_path / "runs", tmp_path)
    assert [(row["updates"], row["cpu_s"]) for row in table(tmp_path / "curves.csv")] == [("20", "9"), ("30", "12")]


def test_a_run_made_anew_replaces_its_rows_and_no_others(tmp_path):
    for name, quality in (("flora", "mixed"), ("focal", "mixed"), ("flora-x", "random")):
        write_run(tmp_path / "old", name, 0, [-6.0, -2.0], quality)
    report.add(tmp_path / "old", tmp_path)
    write_run(tmp_path / "new", "flora", 0, [-1.0, -1.0])
    write_run(tmp_path / "new", "flora", 1, [-3.0, -3.0])
    earlier = write_run(tmp_path / "new", "flora", 1, [-9.0, -9.0], stamp="2")
    os.utime(earlier / "result.json", (1, 1))  # of two runs in one folder the newest counts
    report.add(tmp_path / "new", tmp_path)
    rows = [row for row in table(tmp_path / "results.csv") if row["protocol"] == "iid"]
    found = [(row["name"], row["quality"], row["seed"], row["return"]) for row in rows]
    assert sorted(found) == [
        ("flora", "mixed", "0", "-1"),
        ("flora", "mixed", "1", "-3"),
        ("flora-x", "random", "0", "-4"),
        ("focal", "mixed", "0", "-4"),
    ]
    assert len(table(tmp_path / "curves.csv")) == 8


def test_tables_have_mean_and_standard_error_over_seeds(tmp_path, capsys):
    for seed, returns in enumerate(([-6.0, -2.0], [-2.0, -2.0], [-3.0, -3.0])):
        write_run(tmp_path / "runs", "flora", seed, returns)
    write_run(tmp_path / "runs", "focal", 0, [-6.0, -2.0])
    report.add(tmp_path / "runs", tmp_path)
    capsys.readouterr()
    report.print_tables(report.chosen(tmp_path / "results.csv", "point-robot", None))
    flora, focal = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:4]
    ]
    assert flora[:3] == ["flora", "3", "-3.00 ± 0.58 (51)"]  # sqrt(((1 + 1 + 0) / 2) / 3)
    assert focal[:3] == ["focal", "1", "-4.00 ± 0.70 (50)"]  # of a single seed: over tasks and episodes
    assert flora[-5:] == ["-0.10 ± 0.00", "0.25 ± 0.00", "0.50 ± 0.00", "30", "2"]
    only = report.chosen(tmp_path / "results.csv", "point-robot", ["focal"])
    assert list(only) == ["focal"] and not report.chosen(tmp_path / "results.csv", "ant-dir", None)


def test_variants_are_shown_only_where_they_are_named(tmp_path):
    for name in ("flora", "flora-no-flows", "macaw-buffer", "figure1-mixed-full", "bandit-offline", "flora-metric"):
        write_run(tmp_path / "runs", name, 0, [-4.0, -6.0])
    report.add(tmp_path / "runs", tmp_path)
    assert list(report.chosen(tmp_path / "results.csv", "point-robot", None)) == ["flora", "flora-metric"]
    only = ["flora", "macaw-buffer"]
    assert list(report.chosen(tmp_path / "results.csv", "point-robot", only)) == only


def test_tables_are_of_one_quality_of_the_data(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "runs", "flora", 0, [-4.0, -6.0])
    write_run(tmp_path / "runs", "flora", 1, [-7.0, -9.0], "medium")
    report.add(tmp_path / "runs", tmp_path)
    capsys.readouterr()
    command = ["report.py", "--env", "point-robot", "--files", str(tmp_path), "--brief"]
    for more, normalized in (([], "50 "), (["--quality", "medium"], "51 ")):
        monkeypatch.setattr("sys.argv", command + more)
        report.main()
        header, _, row = capsys.readouterr().out.splitlines()[:3]
        assert header == "| normalized | seeds | iid | bc | ood | online | train |"
        assert row.startswith(f"| flora | 1 | {normalized}")
    monkeypatch.setattr("sys.argv", [*command, "--quality", "expert"])
    with pytest.raises(SystemExit, match="no row of point-robot, expert data"):
        report.main()


def test_gains_are_paired_by_seed(tmp_path, capsys, monkeypatch):
    rows = [("focal", 0, "iid", 50), ("focal", 1, "iid", 80), ("focal", 0, "online", 10), ("focal", 1, "online", 20)]
    rows += [("idaq", 0, "iid", 50), ("idaq", 1, "iid", 84), ("idaq", 2, "iid", -999)]  # no reference of seed 2
    rows += [("idaq", 0, "online", 9), ("idaq", 0, "idaq", 40), ("idaq", 1, "idaq", 80), ("csro", 1, "iid", 79.8)]
    columns = dict.fromkeys(report.RESULTS, "") | {"env": "point-robot", "quality": "mixed"}
    kept = [columns | dict(zip(("name", "seed", "protocol", "normalized"), map(str, row))) for row in rows]
    report.merge(tmp_path / "results.csv", report.RESULTS, kept)
    capsys.readouterr()
    command = ["report.py", "--files", str(tmp_path), "--env", "point-robot", "--gain"]
    monkeypatch.setattr("sys.argv", [*command, "focal"])
    report.main()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["family", "more than focal", "seeds", "iid", "ood", "ood_random", "online", "online_random_start", "idaq"]
    csro = ["point-robot", "csro", "1", "0", "", "", "", "", ""]  # -0.2 is no minus
    idaq = ["point-robot", "idaq", "2", "2 ± 2", "", "", "-1", "", "45 ± 15"]  # 0, 4; -1; 40 - 10, 80 - 20
    assert sorted(row for row in table[2:] if row) == [csro, idaq]
    monkeypatch.setattr("sys.argv", [*command, "macaw"])
    with pytest.raises(SystemExit, match="macaw: no row of point-robot"):
        report.main()


def test_arms_and_variants_are_averaged_over_their_own_runs(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / "runs", "bandit-offline", seed, [-6.0, -2.0])
        write_run(tmp_path / "runs", "figure1-random-full", seed, [-6.0, -2.0], "random")
        write_run(tmp_path / "runs", "figure1-random-plain", seed, [-6.0 + 3 * seed, -2.0], "random")
    report.add(tmp_path / "runs", tmp_path)
    capsys.readouterr()
    claims.bandit(tmp_path, "point-robot")
    assert "| bandit-offline | 2 | 0.20 ± 0.00 | 0.40 ± 0.00 | 0.60 ± 0.00 |" in capsys.readouterr().out
    claims.figure1(tmp_path, "point-robot", None)
    *_, full, plain, _ = capsys.readouterr().out.splitlines()
    assert full.split(" | ")[:4] == ["| random", "full", "2", "-4.00 ± 0.00"] and full.endswith("|  |  |  |")
    assert plain.split(" | ")[3] == "-3.25 ± 0.75" and plain.endswith("|  | 0.75 ± 0.75 | 0.00 ± 0.00 |")


def test_variants_are_paired_with_cloning_and_with_the_full_method_by_seed(tmp_path, capsys):
    for seed, value in enumerate((-4.0, -6.0, -2.0)):
        write_run(tmp_path / "runs", "flora", seed, [value, value])
    for seed, value, bc in ((2, -1.0, -3.5), (1, -3.0, -4.5)):
        path = write_run(tmp_path / "runs", "flora-plain", seed, [value, value]) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval/bc/return": bc}))
        path = path.with_name("metrics.csv")
        path.write_text(path.read_text().replace("q_error,3.0", f"q_error,{3 + seed}"))  # the last one
    write_run(tmp_path / "other", "flora", 0, [50.0, 50.0], quality="random")  # of that name, but of other data
    for folder in ("runs", "other"):
        report.add(tmp_path / folder, tmp_path)
    capsys.readouterr()
    claims.figure1(tmp_path, "point-robot", None)
    *_, full, plain, _ = capsys.readouterr().out.splitlines()
    assert full.split(" | ")[:4] == ["| shipped", "full", "3", "-4.00 ± 1.15"] and full.endswith("|  |  |  |")
    assert plain.split(" | ")[1:4] == ["plain", "2", "-2.00 ± 1.00"]
    assert plain.endswith("| 2.00 ± 0.50 | 2.00 ± 1.00 | 1.50 ± 0.50 |")


def test_without_a_run_one_line_says_so(tmp_path):
    for arguments in (
        ["report.py", "--add", "none"],
        ["report.py", "--files", "."],
        ["claims.py", "drift", "--runs", "none"],
    ):
        code, out, err = run_script(tmp_path, f"benchmark/{arguments[0]}", *arguments[1:])
        assert code == 1 and not out and len(err.splitlines()) == 1 and "benchmark/README.md" in err


def test_interquartile_mean_and_probability_of_improvement_vectors():
    def mean(table, seeds=None, tasks=None):
        table = np.array(table)
        whole = (np.ones((1, n)) if c is None else np.array([c]) for n, c in zip(table.shape, (seeds, tasks)))
        return report.interquartile_mean(table, *whole)[0]

    assert mean([[100.0, -9.0, 2.0, 3.0], [4.0, -50.0, 5.0, 6.0]]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert mean([[7.0]]) == 7
    # five values: three quarters of the second and of the fourth, the third whole
    five = pytest.approx((0.75 * 1 + 2 + 0.75 * 5) / 2.5)
    assert mean([[9.0, 1.0, 5.0, 2.0, -90.0]]) == five
    # samples: of the first seed none, of the second two; of the tasks 1, 0, 2, 1, 1
    assert mean([[4.0, 4.0, 4.0, 4.0, 4.0], [9.0, 8.0, 1.0, 2.0, -9.0]], [0, 2], [1, 0, 2, 1, 1]) == pytest.approx(
        (0.75 * 1 + 1 + 0.75 * 2) / 2.5
    )
    ours, theirs = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0]])
    one, two = np.ones((1, 1)), np.ones((1, 2))
    assert report.improvement(ours, theirs, two, one, two) == (0 + 1 + 0.5 + 0.5) / 4
    assert report.improvement(theirs, ours, one, two, two) == 1 - (0 + 1 + 0.5 + 0.5) / 4
    second, first = np.array([[0.0, 2.0]]), np.array([[2.0, 0.0]])
    assert report.improvement(ours, theirs, second, one, first) == 1  # our second seed on the first task alone
    assert report.improvement(ours, theirs, first, one, first) == 0
    both = [np.concatenate([second, first]), np.ones((2, 1)), np.concatenate([first, first])]
    assert report.improvement(ours, theirs, *both).tolist() == [1, 0]
    assert report.improvement(theirs, ours, both[1], both[0], both[2]).tolist() == [0, 1]


def test_intervals_draw_seeds_in_each_table_and_tasks_in_each_family():
    counts = report.resampled(3, np.random.default_rng(0), 3_000)
    assert counts.shape == (3_001, 3) and (counts[0] == 1).all() and (counts.sum(1) == 3).all()
    assert counts[1:].mean(0) == pytest.approx([1, 1, 1], abs=0.05)
    assert counts[1:].var(0) == pytest.approx([2 / 3] * 3, abs=0.05)  # 3 draws, each one of three: 3 * 1/3 * 2/3
    # every statistic gets the counts of its own tables: the mean over tables of the mean over seeds and tasks
    first, second = np.arange(6.0).reshape(2, 3), 100 + np.arange(20.0).reshape(4, 5)
    other = 200 + np.arange(30.0).reshape(6, 5)
    seen = []

    def difference(a, b, a_seeds, b_seeds, tasks):
        seen.append((a_seeds, b_seeds, tasks))
        return np.full(len(tasks), (a - b[: len(a)]).mean())

    assert report.interval(difference, [first, second], [first, other], draws=50) == "-50 [-50, -50]"  # of 0, -100
    shapes = [[c.shape for c in of_family] for of_family in seen]
    assert shapes == [[(51, 2), (51, 2), (51, 3)], [(51, 4), (51, 6), (51, 5)]]
    assert any((a != b).any() for a, b in [seen[0][:2]]) and len({tuple(row) for row in seen[1][2]}) > 20
    text = report.interval(report.interquartile_mean, [np.array([[0.0, 100.0]] * 8)], draws=500)
    assert text == "50 [0, 100]"
    # of two families, one without any spread: half of the other's
    text = report.interval(report.interquartile_mean, [np.array([[0.0, 100.0]] * 8), np.array([[10.0]])], draws=500)
    assert text == "30 [5, 55]"
    noise = np.random.default_rng(0).standard_normal((400, 1)) * 100 + 500
    mean, low, high = (float(x.strip("[],")) for x in report.interval(mean_of, [noise]).split())
    assert mean == round(noise.mean())
    assert (low, high) == pytest.approx((noise.mean() - 9.8, noise.mean() + 9.8), abs=1.5)  # 1.96 * 100 / 20


def mean_of(table, seeds, tasks):
    return np.einsum("di,dj,ij->d", seeds, tasks, table) / table.size


def test_scores_are_normalized_task_by_task_and_of_the_familys_own_file(tmp_path, monkeypatch):
    ids, random, expert = np.array([2, 0]), np.array([-10.0, 7.0, 0.0]), np.array([-5.0, 8.0, 4.0])
    (tmp_path / "datasets").mkdir()
    np.savez(tmp_path / "datasets" / "x.npz", test_ids=ids, random_returns=random, expert_returns=expert)
    monkeypatch.setattr(report, "HERE", tmp_path / "benchmark")
    columns = ("env", "quality", "name", "seed", "protocol", "normalized", "by_task")
    rows = [("x", "mixed", "focal", 0, "iid", 35, "2 -9"), ("x", "mixed", "focal", 1, "iid", 50, "4 -10")]
    rows += [("x", "mixed", "focal", 0, "ood", 0, "0 -10"), ("x", "mixed", "other", 0, "iid", 60, "2 -9")]
    (tmp_path / "results.csv").write_text("\n".join(",".join(map(str, cells)) for cells in (columns, *rows)))
    found = report.scores(tmp_path / "results.csv", "x", "iid", ["focal"])
    assert list(found) == ["focal"] and found["focal"].tolist() == [[50, 20], [100, 0]]
    message = stop_message(report.scores, tmp_path / "results.csv", "x", "iid", ["other"])
    assert message.startswith("other, seed 0: not of ")  # 35, not 60: of other data
    assert "y.npz: no such file" in stop_message(report.scores, tmp_path / "results.csv", "y", "iid", ["other"])


def test_comparison_is_task_by_task_of_the_methods_that_all_families_have(monkeypatch, capsys):
    """A method that is better on every task is so in every draw of the tasks, however far these lie apart."""
    flora, focal = np.array([[0.0, 100.0], [0.0, 100.0]]), np.array([[-1.0, 99.0]])
    found = {"x": {"flora": flora, "focal": focal, "corro": focal}, "y": {"flora": flora, "focal": focal[:, ::-1] + 1}}

    def scores(path, env, protocol, only):
        return found[env] if protocol != "online" else {"flora": found[env]["flora"]}

    monkeypatch.setattr(report, "scores", scores)
    report.print_comparison(None, "flora", ["x"], None)
    report.print_comparison(None, "flora", ["x", "y"], None)
    one, both = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
        for part in capsys.readouterr().out.strip().split("\n\n")
    )
    assert one[0] == ["method", "seeds", *sum(([p, f"P(flora is better), {p}"] for p in ("iid", "ood", "online")), [])]
    means, better = ["50 [0, 100]", "49 [-1, 99]"], "1.00 [1.00, 1.00]"
    assert one[2] == ["corro", "1", means[1], better, means[1], better, "", ""]
    assert one[3] == ["flora", "2", means[0], "", means[0], "", means[0], ""]
    names = [[row[0] for row in table[2:]] for table in (one, both)]
    assert names == [["corro", "flora", "focal"], ["flora", "focal"]]
    # the mean of 1 (x) and of a half (y: tasks exchanged, better on one of two)
    assert both[3][1] == "1/1" and both[3][3] == "0.75 [0.50, 1.00]"
    monkeypatch.setattr(report, "scores", lambda *_: {"focal": focal})
    assert "flora: not in results.csv for all of x" in stop_message(report.print_comparison, None, "flora", ["x"], None)


def test_tables_in_a_file_are_made_anew_and_its_text_stays(tmp_path):
    write_run(tmp_path / "runs", "flora", 0, [-6.0, -2.0])
    report.add(tmp_path / "runs", tmp_path)
    command = f"report.py --env point-robot --files {tmp_path}"
    first, second = (
        f"<!-- {command} -->\nold\n\nolder\n<!-- end -->",
        f"<!-- {command} --only flora --brief -->\n<!-- end -->",
    )
    text = f"# Title\n{first}\nbetween\n{second}\nend\n"
    (tmp_path / "doc.md").write_text(text)
    for _ in range(2):
        report.write(tmp_path / "doc.md")
    lines = (tmp_path / "doc.md").read_text().splitlines()
    assert lines[0] == "# Title" and lines[-1] == "end" and lines.count("between") == 1 and "old" not in lines
    assert sum(line.startswith("| flora | 1 | -4.00 ± 0.70 (50)") for line in lines) == 1
    assert lines.count("| flora | 1 | 50 |  |  |  |  |") == 1
    (tmp_path / "doc.md").write_text(text.replace("--only flora", "--only none"))
    assert "none: no such name" in stop_message(report.write, tmp_path / "doc.md")


@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md"])
def test_tables_in_the_documents_are_those_of_the_raw_numbers(name, tmp_path):
    text = re.sub(r"(<!-- .*?) --figure \S+", r"\1", (ROOT / name).read_text())  # without drawing
    (tmp_path / "copy.md").write_text(text)
    report.write(tmp_path / "copy.md")
    assert (tmp_path / "copy.md").read_text() == text


class Recorder:
    """In a script's place: walks in a fixed direction and keeps every context that it is given."""

    def __init__(self):
        self.seen = []

    def adapt(self, agent, context, mask, explore=False):
        self.seen.append((context.clone(), mask.clone()))
        return lambda obs, rew: torch.full((len(obs), 2), 0.05) * torch.tensor([1.0, -1.0])


def test_number_of_features_by_their_variance(tiny):
    """phi on a line in three dimensions, across tasks too; psi with variances in the ratio of 4 : 2 : 1."""
    axes = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2**0.5, 0.0], [0.0, 0.0, 1.0]])
    cube = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)]) @ axes
    seen = []

    def embed(agent, context, mask):
        assert len(context) == len(tiny.train_tasks) and mask.all()
        return context.new_zeros(len(context), 1)

    def network(outputs, inputs):
        def forward(x, z):
            seen.append(x.shape)
            assert x.shape[-1] == inputs and len(z) == len(x)
            return outputs(x)[None]

        return forward

    line = torch.tensor([3.0, -1.0, 2.0])
    phi = network(lambda x: x[..., :1] * line + 5, 2 * tiny.obs_dim + tiny.act_dim)
    psi = network(lambda x: cube.repeat(len(x), 32, 1) + 7, tiny.obs_dim + tiny.act_dim)
    agent, args = SimpleNamespace(phi=phi, psi=psi), SimpleNamespace(context_size=4)
    assert claims.directions(SimpleNamespace(embed=embed), agent, tiny, args) == pytest.approx([1, 1, 4 / 7, 6 / 7])
    assert len(seen) == 2


def test_context_of_the_given_length(tiny):
    script = Recorder()
    returns = claims.by_length([1, 3, 20], script, None, tiny, None)
    assert len(returns) == 3 and len(script.seen) == 3
    for n, (context, mask) in zip((1, 3, 20), script.seen):
        assert mask[:, :n].eq(1).all() and mask[:, n:].eq(0).all()


def test_contexts_with_parts_of_another_tasks(tiny):
    script = Recorder()
    found = claims.by_part(script, None, tiny, None)
    (own, mask), *swapped = script.seen
    rows, reward = np.arange(len(own)), tiny.obs_dim + tiny.act_dim
    tasks = tiny.test_ids.repeat(claims.EPISODES)
    other = rows - claims.EPISODES * (len(tiny.test_ids) // 2)  # negative ones count from the end
    assert len(found) == 3 and len(swapped) == 2 and (tasks != tasks[other]).all()
    rest = [k for k in range(tiny.ctx_dim) if k != reward]
    for (context, its_mask), (theirs, mine) in zip(swapped, (([reward], rest), (rest, [reward]))):
        assert torch.equal(its_mask, mask)
        assert torch.equal(context[..., theirs], own[other][..., theirs])
        assert torch.equal(context[..., mine], own[..., mine])


def test_cheetahs_way_begins_anew_with_each_task(monkeypatch):
    """It observes how far it ran: without that, x leaves what the data have, and every policy fails."""
    for name, value in (("STEPS", 40), ("GAP", 15), ("GAP_SPREAD", 3), ("EPISODES", 1)):
        monkeypatch.setattr(claims, name, value)
    data, way, seen, real = dc.load_dataset("cheetah-vel"), [], [], dc.TaskEnv.step

    def step(env, act):
        way.append(env.state[:, 1].copy())
        return real(env, act)

    def adapt(agent, context, mask):
        def policy(obs, rew):
            seen.append(obs[:, 17] * data.obs_std[17] + data.obs_mean[17])
            return torch.ones(len(obs), 6)

        return policy

    monkeypatch.setattr(dc.TaskEnv, "step", step)
    _, since = claims.drifting(False, SimpleNamespace(adapt=adapt), None, data, SimpleNamespace())
    way, seen, new = np.array(way).T, torch.stack(seen, 1).numpy(), since == 0
    assert new[:, 1:].any(1).all() and (way[:, 1:][new[:, 1:]] == 0).all() and abs(way[:, 1:][~new[:, 1:]]).min() > 0
    assert np.allclose(seen, way, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_drifting_tasks_and_their_contexts(tiny, own, monkeypatch):
    monkeypatch.setattr(claims, "STEPS", 120)
    monkeypatch.setattr(claims, "GAP", 40)
    monkeypatch.setattr(claims, "GAP_SPREAD", 4)
    script, tasks, real = Recorder(), [], dc.TaskEnv.step

    def step(env, act):
        tasks.append(env.task_ids.copy())
        return real(env, act)

    monkeypatch.setattr(dc.TaskEnv, "step", step)
    rewards, since = claims.drifting(own, script, None, tiny, SimpleNamespace())
    tasks = np.array(tasks)  # [120, R]
    assert tasks.shape == (120, 3 * claims.EPISODES) and set(tasks.flat) == set(tiny.test_ids)
    position = 0.1 * 0.05 * np.arange(1, 121)[:, None] * np.array([1.0, -1.0])
    goals = tiny.task_params[tasks]  # [120, R, 2]
    assert np.allclose(rewards.T, -np.linalg.norm(position[:, None] - goals, axis=-1), atol=1e-6)
    starts = [np.flatnonzero(row == 0) for row in since]
    gaps = np.concatenate([np.diff(row[row > 0]) for row in starts])
    assert 30 < gaps.mean() < 50 and len(set(gaps)) > 2
    changed = [t for row in range(len(since)) for t in range(1, 120) if tasks[t, row] != tasks[t - 1, row]]
    assert changed and all(
        since[row, t] == 0 for row in range(len(since)) for t in range(1, 120) if tasks[t, row] != tasks[t - 1, row]
    )
    assert all((since[row, 1:] == since[row, :-1] + 1)[since[row, 1:] > 0].all() for row in range(len(since)))
    reward_column = tiny.obs_dim + tiny.act_dim
    context, mask = script.seen[100]
    assert context.shape[1] == 20 and mask.eq(1).all()
    if own:
        assert np.allclose(context[..., reward_column], rewards[:, 80:100], atol=1e-6)
        assert np.allclose(context[:, :-1, -tiny.obs_dim :], context[:, 1:, : tiny.obs_dim])
    else:
        recorded = tiny.episodes[..., :-1]
        for row in range(len(since)):
            assert (recorded[tasks[100, row]] == context[row]).all((1, 2)).any()


def test_cosines_to_the_task_and_to_who_acted():
    """The first two entries of a context, but for those past its end, are a direction, on training tasks their own a
    quarter turn further; z is their mean, moved by 3. So the probe has to move and to turn it back."""
    angle = 2 * np.pi * torch.arange(8) / 8
    unit = lambda turned: torch.stack([turned.cos(), turned.sin()], -1)  # noqa: E731
    # test tasks 6 and 7: their own contexts show them 60 degrees off, then the random policy's, then two of tasks 1, 3
    behavior = torch.tensor([[-1, 1, 3], [-1, 1, 3]])
    shown = torch.where(behavior < 0, angle[6:, None] + np.pi / 2, angle[behavior])
    steps, lengths = torch.arange(5), torch.tensor([2, 5, 3, 4, 1, 5, 5, 5]).expand(8, 8).clone()
    lengths[6:, 5:] = 0  # fewer episodes of the test tasks

    def contexts(turned, lengths):
        rows = unit(turned + np.pi / 2)[..., None, :].expand(*turned.shape, 5, 2).clone()
        rows[steps >= lengths[..., None]] = 1e3
        return torch.cat([rows, torch.ones(*turned.shape, 5, 2)], -1)

    own = angle[:, None].expand(8, 8).clone()
    own[6:] += np.pi / 3
    foreign = torch.tensor([[5, 2, 4], [3, 1, 5]])
    data = SimpleNamespace(task_params=unit(angle).numpy(), train_ids=np.arange(6), test_ids=np.array([6, 7]))
    data.episodes, data.lengths = contexts(own, lengths), lengths
    data.context_dim = 3
    data.ood_episodes, data.ood_lengths, data.ood_behavior_task = contexts(shown, foreign), foreign, behavior.numpy()

    def embed(context, mask):
        assert context.shape[1:] == (5, 3)
        return 3 + (context[..., :2] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    apart = [np.cos(2 * np.pi * (a - b) / 8) for a in (6, 7) for b in (1, 3)]
    assert np.allclose(ood.cosines(embed, data), [0.5, 0, np.mean(apart), 1], atol=1e-5)


def test_every_program_starts():
    command = [sys.executable, "-B"]
    programs = {
        path.name: subprocess.Popen(
            [*command, path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for path in (ROOT / "benchmark").glob("*.py")
    }
    said = {name: program.communicate()[0] for name, program in programs.items()}
    assert len(said) >= 7 and not [name for name, text in said.items() if not text.strip().startswith("usage: ")], said


def test_paths_are_those_of_the_adapted_policy(tiny):
    tasks = tiny.test_ids[[2, 0]]
    script = Recorder()
    family, played, params, states = look.play(list(tasks), script, None, tiny, None)
    assert family is tiny.family and np.array_equal(played, tasks) and np.array_equal(params, tiny.task_params[tasks])
    ((context, mask),) = script.seen
    assert torch.equal(context, tiny.episodes[tasks, 0, :, :-1]) and mask.eq(1).all()
    walked = 0.005 * np.arange(21)[:, None] * np.array([1.0, -1.0])
    np.testing.assert_allclose(states, np.broadcast_to(walked, (2, 21, 2)), atol=1e-7)
    assert "test tasks are" in stop_message(look.play, list(tiny.train_ids[:1]), script, None, tiny, None)


def test_embeddings_on_a_plane_keep_what_they_can_of_their_distances(tiny):
    """z that lie on a plane in five dimensions are only turned and moved."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 2, generator=generator)).Q

    class Script:
        @staticmethod
        def embed(agent, context, mask):
            assert mask.any(1).all()
            place = torch.stack([mask.sum(1), 1e3 * context[:, 0, tiny.obs_dim]], 1)
            Script.z = 3.0 + place @ basis.T
            return Script.z

    points, params = look.embedded(Script, None, tiny, None)
    _, tasks = dc.label_contexts(tiny, lambda context, mask: mask, tiny.test_ids)
    assert np.array_equal(params, tiny.task_params[tasks]) and set(tasks) == set(tiny.test_ids.tolist())
    apart = lambda rows: torch.cdist(torch.as_tensor(rows), torch.as_tensor(rows))  # noqa: E731
    torch.testing.assert_close(apart(points), apart(Script.z), rtol=1e-3, atol=1e-2)
    assert abs(points.mean(0)).max() < 1e-3 * abs(points).max() and points[:, 0].std() > points[:, 1].std()


@pytest.mark.parametrize("figure", ["--figure", "--z"])
def test_every_run_has_its_panel(tiny_path, tmp_path, figure):
    pytest.importorskip("matplotlib")
    settings = {"env": "point-robot", "dataset": tiny_path, "total_updates": 2, "width": 16, "final_episodes": 1}
    runs = [run_script(tmp_path, name, *flags(settings)) for name in ("focal.py", "flora.py")]
    assert [code for code, *_ in runs] == [0, 0]
    dirs = [str(path) for path in sorted(tmp_path.glob("runs/point-robot/*/seed*"))]
    code, out, error = run_script(tmp_path, "benchmark/look.py", *dirs, figure, "picture.png")
    assert code == 0, error
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "picture.png").shape
    assert width == 2 * height


def test_panels_are_those_of_their_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(look, "revisit", lambda run_dir, what: (run_dir, what))
    runs, seen = [tmp_path / name / "seed0" for name in ("focal", "flora")], []
    look.draw_panels(runs, tmp_path / "picture.png", lambda axis, *found: seen.append((axis.get_title, *found)), "look")
    assert [found for _, *found in seen] == [[run_dir, "look"] for run_dir in runs]
    assert [title() for title, *_ in seen] == ["focal", "flora"]


def test_own_episodes_are_drawn_for_runs_that_played_ten(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}

    def spy(axis, x, values, label, **style):
        drawn[label] = list(x), values

    def rows(count, first, prefix="ep"):
        return [{"protocol": f"{prefix}_{k}", "return": str(first - k)} for k in range(1, count + 1)]

    iid = [{"protocol": "iid", "return": "7"}, {"protocol": "near", "return": ""}]
    groups = {"focal": {0: iid + rows(10, 0), 1: rows(10, 5), 2: rows(5, 100)}, "old": {0: rows(5, 0)}}
    groups["idaq"] = {3: rows(10, 20) + rows(10, 40, "idaq")}
    monkeypatch.setattr(report, "band", spy)
    report.draw_episodes(groups, "point-robot", tmp_path / "new" / "own.png")
    assert drawn.keys() == {"focal", "idaq", "idaq, its adaptation"} and (tmp_path / "new" / "own.png").exists()
    ten = np.arange(1, 11)
    assert all(x == list(ten) for x, _ in drawn.values())
    assert np.array_equal(drawn["focal"][1], [-ten, 5 - ten]) and np.array_equal(drawn["idaq"][1], [20 - ten])
    assert np.array_equal(drawn["idaq, its adaptation"][1], [40 - ten])


def test_learning_curves_are_drawn_over_the_seeds_mean_cpu_time_of_runs_that_have_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}

    def spy(axis, x, values, label, **style):
        drawn[label] = list(x), values.tolist()

    def rows(seconds, returns):
        return [{"updates": str(k), "cpu_s": s, "iid": r} for k, s, r in zip((10, 20), seconds, returns)]

    groups = {"focal": {0: rows("69", "12"), 1: rows(("30", "51"), "34"), 2: rows(("", ""), "56")}}
    groups["old"] = {0: rows(("", ""), "78")}
    data = SimpleNamespace(expert_returns=np.ones(2), test_ids=[1], behavior_return=0.5, env="point-robot")
    monkeypatch.setattr(report, "band", spy)
    report.draw(groups, data, tmp_path / "cpu.png", "cpu_s")
    assert drawn == {"focal (2 seeds)": ([0.3, 0.5], [[1, 2], [3, 4]])} and (tmp_path / "cpu.png").exists()
    drawn.clear()
    report.draw(groups, data, tmp_path / "updates.png")
    assert drawn.keys() == {"focal (3 seeds)", "old (1 seed)"}
    assert drawn["focal (3 seeds)"] == ([10, 20], [[1, 2], [3, 4], [5, 6]])


@pytest.mark.parametrize("expert", [-20.0, 20.0])
def test_the_expert_is_inside_the_picture(expert, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    data = SimpleNamespace(expert_returns=np.full(2, expert), test_ids=[1], behavior_return=-30.0, env="point-robot")
    monkeypatch.setattr(report, "save", lambda figure, path: path.write_text(str(figure.axes[0].get_ylim()[1])))
    report.draw({}, data, tmp_path / "top")
    assert float((tmp_path / "top").read_text()) == pytest.approx(expert + 1)


def test_pictures_without_matplotlib_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -r benchmark/requirements.txt" in stop_message(report.pyplot)


# ---- cost of an update -------------------------------------------------------------------


def test_arithmetic_and_operations_are_counted():
    with speed.Counter() as counter:
        (torch.ones(8, 16) @ torch.ones(16, 4)).relu().add_(1)
    assert counter.flops == 2 * 8 * 16 * 4 and counter.operations == 2 + 3  # two tensors of ones, three operations


def test_speed_prints_the_row_of_a_method(tiny_path, tmp_path):
    code, out, _ = run_script(tmp_path, "benchmark/speed.py", "--help")
    assert code == 0 and "meta_dt" in out
    code, _, error = run_script(tmp_path, "benchmark/speed.py", "sac")
    assert code == 1 and "meta_dt" in error and error.count("\n") == 1
    settings = flags({"env": "point-robot", "dataset": tiny_path, "width": 200})
    code, out, error = run_script(tmp_path, "benchmark/speed.py", "focal", *settings)
    assert code == 0, error
    name, given, gflop, operations, ms, megabytes = (cell.strip() for cell in out.splitlines()[-1].split("|")[1:-1])
    assert (name, given) == ("focal", " ".join(settings)) and 300 < int(operations) < 1000
    assert 0.3 < float(gflop) < 3 and 1 <= int(ms) < 1000 and 100 < int(megabytes) < 5000
    assert not list(tmp_path.iterdir())  # its trainings leave nothing


# ---- references -------------------------------------------------------------------------


def to_the_told_goal(data, rows):
    """In the place of focal.adapt: every row walks to the goal that it is told; their number goes to `rows`."""

    def adapt(agent, context, mask, explore=False, bc=False):
        train = torch.as_tensor(data.task_params[data.train_ids])
        told = references.focal.Encoder(None, 2, None)(context, mask) * train.std(0) + train.mean(0)
        rows.append(len(told))
        return lambda obs, rew: ((told - obs * data.obs_std - data.obs_mean) * 10).clamp(-1, 1)

    return adapt


def test_the_reference_is_told_every_rows_own_task(tiny_path, monkeypatch):
    rows = []
    data = references.known_tasks("point-robot", tiny_path)
    monkeypatch.setattr(references.focal, "Encoder", lambda ctx_dim, z_dim, width: references.Known(z_dim))
    monkeypatch.setattr(references.focal, "adapt", to_the_told_goal(data, rows))
    monkeypatch.setattr(references.focal, "value", lambda agent, args, context, mask, obs: torch.zeros(obs.shape[:2]))
    results = references.evaluate_all(None, data, references.Args(env="point-robot", gamma=0.9), None, 2)
    assert sorted(set(rows)) == [2 * 3, 2 * 6]  # episodes x tasks, for test and training
    for protocol in ("iid", "train", "bc"):  # straight to a goal at distance 1: 1 + 0.9 + ... if along an axis
        assert results[f"eval/{protocol}/return"] > -5.5, protocol
    assert not any(key.startswith(("eval/ood", "eval/online", "eval/zero_shot")) for key in results)
    tasks = np.array([3, 0, 7])
    told = references.Known(2)(data.sample_context(tasks, 64, None), None)
    train = data.task_params[data.train_ids]
    assert np.allclose(told, (data.task_params[tasks] - train.mean(0)) / train.std(0, ddof=1), atol=1e-5)
    data.train_ids = data.train_ids[:1]
    monkeypatch.setattr(references, "load_dataset", lambda *_: data)
    assert "two at least" in stop_message(references.known_tasks, "point-robot")


def test_the_reference_trains_and_counts_as_a_run_of_a_list(tiny_path, tmp_path):
    settings = {"env": "point-robot", "dataset": tiny_path, "total_updates": 20, "width": 16, "final_episodes": 1}
    line = " ".join(["python", "benchmark/references.py", *flags(settings | {"device": "cpu"})])
    code, _, stderr = run_script(tmp_path, *line.split()[1:], "--run-dir", str(tmp_path))
    assert code == 0, stderr
    (run_dir,) = (tmp_path / "point-robot" / "known-task").iterdir()
    assert json.loads((run_dir / "args.json").read_text())["args"]["z_dim"] == 2
    assert missing.state(line, str(tmp_path))[0] == "finished"


def test_no_reference_where_the_parameters_only_number_the_tasks(tmp_path):
    code, _, error = run_script(tmp_path, "benchmark/references.py", "--env", "any-mdp")
    assert code == 1 and "tabular.py" in error and error.count("\n") == 1


def transition(state, act, rew, next_state):
    """A row of a context of any-mdp; the action's vector is as the behavior's, its entry above all others."""
    return np.concatenate([np.eye(16)[state], np.eye(5)[act] - 0.7, [rew], np.eye(16)[next_state]])


def test_the_counted_model_weighs_what_the_context_shows():
    """From state 0, action 1 earns 1 and returns by way of state 1; action 0 earns 3 on average, once, and leads where
    nothing goes on; from state 5 the one known action loses, but less than an unknown one counts."""
    rows = [transition(0, 1, 1.0, 1), transition(1, 2, 1.0, 0), transition(5, 4, -2.0, 6)]
    rows += [transition(0, 0, 1.0, 7), transition(0, 0, 5.0, 7), transition(7, 3, 0.5, 8), transition(0, 0, 3.0, 8)]
    rows += [transition(0, 1, 90.0, 1)]  # behind the mask
    context = torch.tensor(np.stack([rows, rows[::-1]]), dtype=torch.float32)
    mask = torch.tensor([[1.0] * 7 + [0.0], [0.0] + [1.0] * 7])
    q = tabular.plan(*tabular.count(context, mask))
    forever = (1 - 0.99**300) / (1 - 0.99)
    known = {(0, 1): forever, (1, 2): forever, (5, 4): -2.0, (7, 3): 0.5, (0, 0): 3 + 0.99 * 2 / 3 * 0.5}
    for row in range(2):
        for state in range(16):
            for act in range(5):
                # the last of 300 steps may well lead where nothing goes on
                assert q[row, state, act] == pytest.approx(known.get((state, act), -100), rel=2e-3)
    policy, explore = tabular.adapt(context, mask), tabular.adapt(context, mask, True)
    for state, act in ((0, 1), (1, 2), (5, 4), (7, 3)):
        obs = torch.eye(16)[[state, state]]
        assert policy(obs, None).argmax(-1).tolist() == [act, act] and policy(obs, None).shape == (2, 5)
        untried = {2, 3, 4} if state == 0 else set(range(5)) - {act}
        for own in zip(*(explore(obs, None).argmax(-1).tolist() for _ in untried)):  # of each row
            assert set(own) == untried
    chosen = {tuple(policy(torch.eye(16)[[k, k]], None).argmax(-1).tolist()) for k in range(8, 16)}
    assert len(chosen) > 3  # of unknown actions any


def test_the_counted_model_finds_its_way_in_tasks_it_has_never_seen(tmp_path, monkeypatch, capsys):
    path = tmp_path / "any-mdp.npz"
    dc.collect(dc.Args(env="any-mdp", out=str(path), train_tasks=3, test_tasks=20, episodes=20, test_episodes=4))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["tabular.py", "--dataset", str(path), "--episodes", "4"])
    tabular.main()
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line]
    assert [len(line) for line in lines] == [8] * 3 + [11] * 3
    score = {name: [float(x) for x in cell.split(" ± ")] for name, cell in zip(lines[0][1:], lines[2][1:])}
    assert score["iid"][0] > 35 and score["online"][0] > 15 and score["online_random_start"][0] > 15
    assert score["iid"][0] > score["ood_random"][0] > 10 > score["zero_shot"][0] and 2 < score["iid"][1] < 15
    own = [float(x) for x in lines[5][1:]]
    assert own[9] > own[0] + 20
    code, _, error = run_script(tmp_path, "benchmark/tabular.py", "--dataset", str(path), "--episodes", "0")
    assert code == 2 and "--episodes" in error


# ---- lists of runs ------------------------------------------------------------------------


def run_line(folder, tiny_path, seed, updates):
    """A line for a list, of a run that takes seconds, and the names of its run directories."""
    settings = {"env": "point-robot", "dataset": tiny_path, "seed": seed, "total_updates": updates, "width": 16}
    settings |= {"save_every": 20, "log_every": 20, "eval_every": 40, "final_episodes": 1, "device": "cpu"}
    return " ".join(["python", "focal.py", *flags(settings)]), folder / "point-robot" / "focal"


def test_a_run_is_missing_then_running_then_to_be_continued_then_finished(tiny_path, tmp_path):
    line, folder = run_line(tmp_path, tiny_path, 3, 40)
    kind = ("focal.py", "point-robot")
    assert missing.state(line, str(tmp_path)) == ("missing", f"{line} --run-dir {tmp_path}", kind)
    assert missing.state(line, "runs") == ("missing", line, kind)
    code, *_ = run_script(tmp_path, *line.split()[1:], "--run-dir", str(tmp_path))
    (run_dir,) = folder.glob("seed3-*")
    seconds = json.loads((run_dir / "result.json").read_text())["cpu_s"]
    assert code == 0 and missing.state(line, str(tmp_path)) == ("finished", seconds, kind)
    for other in ("--seed 4", "--lr 0.5", "--total-updates 50", "--exp-name other"):
        assert missing.state(f"{line} {other}", str(tmp_path))[0] == "missing", other
    assert missing.state(f"{line} --log-every 7", str(tmp_path))[0] == "finished"  # no other run
    (run_dir / "result.json").rename(tmp_path / "aside.json")
    resume = f"python focal.py --resume {run_dir}"
    assert missing.state(line, str(tmp_path)) == ("begun", resume, kind)
    folder = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert missing.state(line, str(tmp_path))[0] == "running"
    os.close(folder)
    (run_dir / "checkpoint.pt").rename(tmp_path / "checkpoint.pt")
    assert missing.state(line, str(tmp_path))[0] == "missing"
    (tmp_path / "checkpoint.pt").rename(run_dir / "checkpoint.pt")
    (tmp_path / "aside.json").rename(run_dir / "result.json")
    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"].pop("gamma") == 0.9  # as if made before the default was this
    (run_dir / "args.json").write_text(json.dumps(about))
    assert missing.state(line, str(tmp_path))[0] == "missing"
    about["args"]["gamma"] = 0.9
    (run_dir / "args.json").write_text(json.dumps(about))
    assert missing.state(line, str(tmp_path))[0] == "finished"
    about["dataset"]["settings"]["seed"] += 1
    (run_dir / "args.json").write_text(json.dumps(about))
    assert missing.state(line, str(tmp_path))[0] == "missing"  # of other data


def test_what_has_rows_in_a_results_file_is_not_missing(tiny_path, tmp_path, capsys, monkeypatch):
    line, _ = run_line(tmp_path, tiny_path, 3, 40)
    lists = tmp_path / "list.txt"
    others = ("--exp-name other", "--seed 4", "--seed 5", "--total-updates 50")
    lists.write_text("\n".join([line, *(f"{line} {flag}" for flag in others)]))
    results = tmp_path / "results.csv"
    columns = ("env", "quality", "name", "seed", "updates", "cpu_s")
    rows = [("point-robot", "mixed", "focal", 3, 40, 7.5), ("point-robot", "mixed", "focal", 4, 40, "")]  # of old runs
    rows += [("point-robot", "medium", "other", 3, 40, 7.5), ("ant-dir", "mixed", "focal", 5, 40, 7.5)]
    results.write_text("\n".join(",".join(map(str, cells)) for cells in (columns, *rows)))
    command = ["missing.py", str(lists), "--run-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--results", str(results)])
    missing.main()
    printed = capsys.readouterr()
    left = [f"{line} {flag} --run-dir {tmp_path}" for flag in ("--exp-name other", "--seed 5", "--total-updates 50")]
    assert printed.out.splitlines() == left and printed.err.startswith("2 of 5 finished")
    for wrong in ([*command, "--results", "nix.csv"], ["missing.py", "nix.txt"], ["missing.py", str(results)]):
        monkeypatch.setattr("sys.argv", wrong)
        with pytest.raises(
            SystemExit, match="nix.csv: no such file|nix.txt: no such file|not a command of a list: env"
        ):
            missing.main()


def test_time_left_is_that_of_like_runs():
    focal, flora = ("focal.py", "ant-dir"), ("flora.py", "ant-dir")
    finished = [("finished", 10.0, focal), ("finished", 30.0, focal), ("finished", None, focal)]
    states = [*finished, ("begun", "x", focal), ("missing", "x", focal), ("running", None, focal)]
    assert missing.seconds_left(states) == 40
    assert missing.seconds_left([*states, ("missing", "x", flora), ("finished", 50.0, ("focal.py", "x"))]) == 70
    assert not missing.seconds_left([("missing", "x", focal)])


def test_slurm_job_saves_queues_itself_anew_and_goes_on(tiny_path, tmp_path):
    """With a stand-in for scontrol: no Slurm is needed."""
    lines = [run_line(tmp_path / "runs", tiny_path, seed, 200) for seed in (5, 6)]
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line, _ in lines))
    folder = lines[1][1]
    (tmp_path / "bin").mkdir()
    for name, does in (("scontrol", 'echo "$@" > "$REQUEUED"'), ("python", f'exec {sys.executable} "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "77"}
    environment |= {"REQUEUED": str(tmp_path / "requeued"), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmark" / "slurm.sh"), str(tmp_path / "list.txt"), "--run-dir"]
    start = partial(subprocess.Popen, [*command, str(tmp_path / "runs")], cwd=ROOT, env=environment)
    job = start()
    for _ in range(600):
        time.sleep(0.1)
        if list(folder.glob("seed6-*/checkpoint.pt")):
            break
    job.terminate()
    assert job.wait(60) == 0 and (tmp_path / "requeued").read_text() == "requeue 77_2\n"
    (run_dir,) = folder.glob("seed*")
    assert not (run_dir / "result.json").exists()
    assert start().wait(120) == 0 and list(folder.glob("seed*")) == [run_dir]
    assert json.loads((run_dir / "result.json").read_text())["step"] == 200
    assert start().wait(60) == 0  # nothing left to do


def test_trial_of_another_length_replaces_no_run(tmp_path, capsys):
    write_run(tmp_path / "runs", "flora", 0, [-4.0, -6.0])
    report.add(tmp_path / "runs", tmp_path)
    before = (tmp_path / "results.csv").read_bytes()
    trial = write_run(tmp_path / "trial", "flora", 0, [-1.0, -1.0])
    result = json.loads((trial / "result.json").read_text())
    (trial / "result.json").write_text(json.dumps(result | {"step": 20}))
    message = stop_message(report.add, tmp_path / "trial", tmp_path)
    assert str(trial) in message and "20 updates" in message and "--exp-name" in message
    (trial / "result.json").write_text("{")
    assert f"{trial}: damaged" in stop_message(report.add, tmp_path / "trial", tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == before


def test_seeds_of_different_arguments_are_refused(tmp_path):
    write_run(tmp_path / "old", "flora", 0, [-4.0, -6.0])
    report.add(tmp_path / "old", tmp_path)
    results = tmp_path / "results.csv"
    report.merge(results, report.RESULTS, [row | {"args": ""} for row in table(results)])  # as before that column
    for seed in (1, 2):
        about = write_run(tmp_path / "runs", "flora", seed, [-4.0, -6.0]) / "args.json"
        change(about, "args", lr=0.25 * seed, log_every=seed)
    said = "point-robot, flora: seed 2 has lr 0.5, seed 1 has 0.25; give it an --exp-name of its own"
    assert said in stop_message(report.add, tmp_path / "runs", tmp_path) and len(table(results)) == 4
    change(about, "args", lr=0.25)
    report.add(tmp_path / "runs", tmp_path)  # agrees with seed 1, and with seed 0 of unknown arguments
    change(write_run(tmp_path / "new", "flora", 1, [0.0, 0.0]) / "args.json", "args", lr=1.0)
    assert "seed 1 has lr 1.0, seed 1 has 0.25" in stop_message(report.add, tmp_path / "new", tmp_path)
    about = write_run(tmp_path / "data", "flora", 3, [0.0, 0.0]) / "args.json"
    about.write_text(about.read_text().replace('"mixed"', '"mixed", "episodes": 9'))
    report.add(tmp_path / "data", tmp_path)
    change(about, None, dataset={"settings": {"quality": "mixed", "episodes": 8}})
    assert "has dataset's episodes 8, seed 3 has 9" in stop_message(report.add, tmp_path / "data", tmp_path)


def test_tables_mark_diverged_episodes(tmp_path, capsys):
    for seed in (0, 1):
        path = write_run(tmp_path / "runs", "flora", seed, [-4.0, -6.0]) / "result.json"
    write_run(tmp_path / "runs", "focal", 0, [-4.0, -6.0])
    report.add(tmp_path / "runs", tmp_path)
    report.print_tables(report.chosen(tmp_path / "results.csv", "point-robot", None))
    assert report.DIVERGED not in capsys.readouterr().out
    change(path, **{"eval/iid/diverged": 2.0})
    report.add(tmp_path / "runs", tmp_path)
    assert [row["diverged"] for row in table(tmp_path / "results.csv") if row["protocol"] == "iid"] == ["", "2", ""]
    for show in (report.print_tables, report.print_brief):
        capsys.readouterr()
        show(report.chosen(tmp_path / "results.csv", "point-robot", None))
        (flora, legend) = [line for line in capsys.readouterr().out.splitlines() if report.DIVERGED in line]
        assert flora.startswith("| flora | 2 |") and flora.count(report.DIVERGED) == 1 and legend.startswith("†")


@pytest.mark.parametrize(
    "command, said",
    [
        ("report.py --figure curves.pdf", "must end in .png"),
        ("report.py --write no_such_file.md", "no such file"),
        ("report.py --only no-such-name", "no such name"),
        ("ood.py --runs no_such_folder", "no finished run"),
        ("missing.py LIST", "not a command of a list: python no_such.py"),
        ("missing.py benchmark/ant-dir.txt --results README.md", "not a results.csv"),
    ],
)
def test_mistakes_get_one_line(command, said, tmp_path):
    (tmp_path / "list.txt").write_text("python no_such.py --env ant-dir\n")
    program, *words = command.replace("LIST", str(tmp_path / "list.txt")).split()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmark" / program, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
