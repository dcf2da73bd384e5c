"""What all method scripts share: blocks that stand letter for letter in several, and data_collect's runs around them:
whole runs, interruption, resume, bad input. What does not depend on the script is checked with flora.py alone."""

import copy
import errno
import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, load, read_rows, run_script, start_script, stop_message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_collect as dc
import flora
import focal

SCRIPTS = ["flora", "focal", "focal_pp", "unicorn", "corro", "csro", "er_trl", "idaq", "macaw", "meta_dt"]
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 40, "log_every": 10, "eval_every": 20}
SMALL |= {"save_every": 10, "eval_episodes": 1, "final_episodes": 2, "meta_batch": 4, "batch_size": 8}
SMALL |= {"context_size": 8, "width": 16}
CASES = {  # case: script, its arguments
    "flora": ("flora", {"bandit_every": 15}),
    "focal": ("focal", {}),
    "focal_pp": ("focal_pp", {}),
    "focal-dual": ("focal", {"divergence": "dual", "entropy_weight": 0.1, "brac_alpha_lr": 0.1}),
    "unicorn": ("unicorn", {}),
    "unicorn-sup": ("unicorn", {"variant": "sup", "backbone": "sac"}),
    "unicorn-ss-0": ("unicorn", {"variant": "ss-0"}),
    "corro": ("corro", {"encoder_updates": 20}),
    "corro-generative": ("corro", {"negatives": "generative", "encoder_updates": 20}),
    "corro-none": ("corro", {"negatives": "none", "backbone": "sac", "encoder_updates": 20}),
    "csro": ("csro", {}),
    "er_trl": ("er_trl", {}),
    "idaq": ("idaq", {}),
    "macaw": ("macaw", {"latent": 6, "head_width": 8}),
    "meta_dt": ("meta_dt", {"world_model_updates": 20}),
    "meta_dt-sample": ("meta_dt", {"world_model_updates": 20, "prompt_select": "sample"}),
}
FIRST = ["corro-none" if name == "corro" else name for name in SCRIPTS]  # one case of every script
TIMING = {"run_dir", "updates_per_sec", "cpu_s"}  # what differs between two equal runs
scripts = pytest.mark.parametrize("name", SCRIPTS)
every_script = pytest.mark.parametrize("case", FIRST)


def script_of(case):
    return importlib.import_module(CASES[case][0])  # the cases named as a script are its default


def run(case, tiny_path, folder, **changes):
    """Train on the tiny dataset; the runs lie in `folder`."""
    settings = SMALL | CASES[case][1] | {"dataset": str(tiny_path), "run_dir": str(folder)} | changes
    return script_of(case).train(script_of(case).Args(**settings))


def resume(case, run_dir, **changes):
    return script_of(case).train(replace(dc.stored_args(script_of(case).Args, run_dir), **changes))


def command(name, *arguments):
    """The script as from the command line."""
    return dc.command_line(script_of(name).Args, script_of(name).train, script_of(name).__doc__, list(arguments))


@pytest.fixture(scope="module")
def straight(tiny_path, tmp_path_factory):
    """-> function of a case: its run without interruption, made once: the result, the run directory, the agent after
    training and its state before."""

    @functools.cache
    def run_once(case):
        seen = {}

        class Spy(dc.Run):
            def __enter__(self):
                seen["agent"], seen["before"] = self.agent, copy.deepcopy(self.agent.state_dict())
                return super().__enter__()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dc, "Run", Spy)
            result = run(case, tiny_path, tmp_path_factory.mktemp(case))
        return SimpleNamespace(result=result, run_dir=Path(result["run_dir"]), **seen)

    return run_once


# ---- the house --------------------------------------------------------------------------

SHARED = ["MLP", "Critics", "metric_loss", "gaussian_kl", "pre_tanh", "tanh_gaussian_logp"]


def without_tags(source):
    """Numbers of a script's own deviations, as in "(D3)" or "[ours: D3]", differ."""
    return re.sub(r"\bD\d\b", "D", source)


@pytest.mark.parametrize("block", SHARED)
def test_shared_blocks_are_letter_for_letter_the_same(block):
    scripts = [importlib.import_module(name) for name in SCRIPTS]
    sources = [without_tags(inspect.getsource(getattr(script, block))) for script in scripts if hasattr(script, block)]
    assert len(set(sources)) == 1 and len(sources) >= 2


def test_arguments_of_run_and_data_are_the_same_in_every_script():
    blocks = set()
    for name in SCRIPTS:
        source = inspect.getsource(importlib.import_module(name).Args)
        blocks.add(source[: source.index("    # method\n")].replace(f'"{name}"', '"name"'))
    assert len(blocks) == 1


@pytest.mark.parametrize("env, gamma, z_dim", [("point-robot", 0.5, 3), ("ant-dir", 0.7, 3)])
def test_defaults_of_a_family_win_over_those_of_all_and_given_values_over_both(env, gamma, z_dim):
    env_args = {"": {"gamma": 0.7, "z_dim": 3, "reward_scale": 2.0}, "point": {"gamma": 0.5, "reward_scale": 3.0}}
    args = dc.resolve(flora.Args(env=env, reward_scale=4.0, device="cpu"), env_args, flora.MAY_BE_ZERO, flora.RANGES)
    assert (args.gamma, args.z_dim, args.reward_scale) == (gamma, z_dim, 4.0)


@pytest.mark.parametrize("name", ["focal_pp", "csro", "er_trl", "idaq"])
@pytest.mark.parametrize("env", dc.FAMILIES)
def test_settings_of_focals_kin_are_focals(name, env):
    script, found = importlib.import_module(name), []
    for module in (focal, script):
        args = module.Args(env=env)
        dc.fill_in(args, module.ENV_ARGS)
        found.append(asdict(args))
    of_the_method = {"exp_name"} | ({"metric_weight"} if name == "focal_pp" else set())
    shared = found[0].keys() & found[1].keys() - of_the_method
    assert len(shared) > 30
    assert {key: found[1][key] for key in shared} == {key: found[0][key] for key in shared}


def test_idaq_trains_as_focal_does(straight):
    """Bit for bit, its own protocol apart."""
    texts = [(straight(name).run_dir / "metrics.csv").read_text().splitlines() for name in ("focal", "idaq")]
    assert texts[0] == [line for line in texts[1] if "eval/idaq/" not in line]


DEFAULTS = {  # of the methods' official codes, and our choices
    "focal_pp": {"temperature": 0.1, "momentum": 0.99, "heads": 4, "nce_weight": 1, "metric_weight": 0},
    "csro": {"guess_weight": 10, "metric_weight": 10},
    "er_trl": {"gan_steps": 5, "gan_lr": 2e-4, "gan_momentum": 0.5, "noise_dim": 20, "metric_weight": 10},
    "idaq": {"adapt_episodes": 10, "reference_episodes": 5, "candidates": 5, "metric_weight": 10},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_the_method(name):
    assert asdict(importlib.import_module(name).Args()).items() >= DEFAULTS[name].items()


ABLATIONS = {  # those of the docstrings, and other zeros
    "flora": "--num-flows 0 --alpha-min 0 --feature-dim 1 --metric-weight 0",
    "focal_pp": "--no-gate --no-attention --nce-weight 0 --metric-weight 10 --momentum 0",
    "csro": "--club-weight 0",
    "er_trl": "--behavior-entropy-weight 0 --gan-steps 0 --gan-momentum 0",
    "macaw": "--no-weight-transform --no-adv-head --first-order --no-terminal-bootstrap --inner-segment start",
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_no_mistakes(name, monkeypatch):
    class Accepted(Exception):
        pass

    def accept(*_):
        raise Accepted

    monkeypatch.setattr(dc, "load_dataset", accept)
    with pytest.raises(Accepted):
        command(name, *ABLATIONS[name].split())


@scripts
def test_help_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err
    for field in fields(script_of(name).Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out), field.name


# ---- whole runs -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_run_moves_every_parameter_and_reports_every_protocol(case, straight):
    done = straight(case)
    still = [name for name, p in done.agent.named_parameters() if torch.equal(p, done.before[name])]
    assert set(still) <= {"aggregator.score.bias"}  # a softmax is blind to a common shift
    result, rows = done.result, read_rows(done.run_dir)
    for protocol in dc.PROTOCOLS:
        assert {f"eval/{protocol}/{figure}" for figure in ("return", "return_se", "normalized")} <= result.keys()
    assert ("eval/iid/q_error" in result) == (CASES[case][0] not in ("macaw", "meta_dt"))
    without = ("focal-dual", "unicorn-sup", "corro-none", "macaw", "meta_dt", "meta_dt-sample")  # pi_beta
    fitted = case not in without
    assert ("eval/clone/return_se" in result) == fitted
    assert all(math.isfinite(value) for tag, value in result.items() if tag != "run_dir")
    assert result["step"] == 40 and result["cpu_s"] > 0
    assert json.loads((done.run_dir / "result.json").read_text()) == result
    assert all(math.isfinite(float(value)) for _, _, value in rows)
    last = {tag: float(value) for step, tag, value in rows if step == 40}
    assert all(last[tag] == value for tag, value in result.items() if tag.startswith(("eval/", "z/")))


def test_last_evaluation_has_all_protocols_and_more_episodes(tiny_path, tmp_path, monkeypatch):
    evaluate_all, asked = flora.evaluate_all, []

    def spy(agent, data, args, protocols, episodes):
        asked.append((protocols, episodes))
        return evaluate_all(agent, data, args, protocols, episodes)

    monkeypatch.setattr(flora, "evaluate_all", spy)
    run_dir = Path(run("flora", tiny_path, tmp_path, eval_episodes=3)["run_dir"])
    assert asked == [(("iid", "train"), 3), (dc.PROTOCOLS, 2)]
    (run_dir / "result.json").unlink()
    resume("flora", run_dir)  # as after an evaluation that was cut off
    resume("flora", run_dir, eval_only=True, final_episodes=1)
    assert asked[2:] == [(dc.PROTOCOLS, 2), (dc.PROTOCOLS, 1)]


def test_evaluation_in_one_line():
    results = {"eval/iid/return": 349.04, "eval/iid/return_se": 12.36, "eval/iid/normalized": 72.6}
    results |= {"eval/ood/return": 3, "eval/ood/normalized": -0.6}  # of a single episode
    results |= {"eval/clone/return": -1.26, "eval/clone/return_se": 0.04, "eval/clone/normalized": 12.4}
    results |= {"eval/iid/return_task_02": 5.0, "z/nearest_task_acc": 0.456, "z/probe_r2": -0.5, "eval/iid/q_error": 3}
    expected = "eval  iid 349.0 ± 12.4 (73)  ood 3.0 (-1)  clone -1.3 ± 0.0 (12)  z acc 0.46  z R2 -0.50"
    assert dc.eval_line(results) == expected


@every_script
def test_smallest_batches_train(case, tiny_path, tmp_path):
    smallest = {"meta_batch": 1, "batch_size": 1, "context_size": 1, "total_updates": 2, "log_every": 1}
    assert run(case, tiny_path, tmp_path, **smallest)["step"] == 2


@every_script
def test_the_same_seed_gives_the_same_run_and_another_seed_another(case, straight, tiny_path, tmp_path, monkeypatch):
    first, starts = straight(case).run_dir, []

    class Spy(dc.Run):
        def __enter__(self):
            starts.append((self.generator.initial_seed(), copy.deepcopy(self.agent.state_dict())))
            return super().__enter__()

    monkeypatch.setattr(dc, "Run", Spy)
    again, other = (run(case, tiny_path, tmp_path / str(seed), seed=seed)["run_dir"] for seed in (0, 1))
    files = [(Path(run_dir) / "metrics.csv").read_bytes() for run_dir in (first, again, other)]
    assert files[0] == files[1] != files[2]
    (seed, initial), (other_seed, other_initial) = starts
    assert (seed, other_seed) == (0, 1)  # of the batches
    assert not all(torch.equal(value, other_initial[name]) for name, value in initial.items())


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate_stays_for_half_of_the_training_and_then_falls_to_zero(decay, tiny_path, tmp_path, monkeypatch):
    update, rates = flora.update, []

    def spy(agent, *inputs):
        rates.append(agent.opt.param_groups[0]["lr"].item())
        return update(agent, *inputs)

    monkeypatch.setattr(flora, "update", spy)
    run("flora", tiny_path, tmp_path, total_updates=8, lr=0.01, lr_decay=decay)
    falling = [0.01] * 5 + [0.0075, 0.005, 0.0025]  # 1 - (step - 4) / 4 before steps 5, 6, 7
    assert rates == pytest.approx(falling if decay else [0.01] * 8)


# ---- interruption and resume ------------------------------------------------------------


class Killed(Exception):
    pass


def cut_run(case, tiny_path, folder, after, end=Killed):
    """The run as a kill (end=Killed) or Ctrl-C (end=SystemExit) in the update after `after` updates, those of all
    phases, leaves it -> run directory."""
    script, count = script_of(case), [0]

    def counted(update, *inputs):
        count[0] += 1
        if count[0] == after + 1:
            if end is Killed:
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return update(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("update", "update_encoder", "update_cvae", "update_world_model"):
            if hasattr(script, name):
                patch.setattr(script, name, functools.partial(counted, getattr(script, name)))
        with pytest.raises(end):
            run(case, tiny_path, folder)
    (run_dir,) = folder.glob("*/*/*")
    return run_dir


def assert_same_state(one, two):
    """The same tensors and numbers, bit for bit, in two nested checkpoints."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_state(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_same_state(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == two


def assert_same_run(resumed, straight):
    """The same bytes of metrics, the same final state and the same results in two run directories."""
    assert (resumed / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    one, two = load(resumed), load(straight)
    for key in ("agent", "opts", "generator", "rng", "steps", "rows"):
        assert_same_state(one[key], two[key])
    one, two = (json.loads((run_dir / "result.json").read_text()) for run_dir in (resumed, straight))
    assert one.keys() == two.keys()
    assert all(one[tag] == two[tag] for tag in one.keys() - TIMING)


PHASES = [(case, 25) for case in FIRST] + [("corro-generative", after) for after in (12, 33, 75)]
PHASES += [("meta_dt", 12), ("meta_dt", 47)]


@pytest.mark.parametrize("case, after", PHASES)
def test_killed_run_resumes_to_the_straight_one(case, after, straight, tiny_path, tmp_path):
    run_dir = cut_run(case, tiny_path, tmp_path, after)
    steps = load(run_dir)["steps"]
    assert sum(steps.values()) == after // 10 * 10
    resume(case, run_dir)
    assert_same_run(run_dir, straight(case).run_dir)


@pytest.mark.parametrize("case, after", [("flora", 25), ("corro-generative", 12), ("meta_dt", 12)])
def test_ctrl_c_between_two_checkpoints_loses_no_update(case, after, straight, tiny_path, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    run_dir = cut_run(case, tiny_path, tmp_path, after, end=SystemExit)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sum(load(run_dir)["steps"].values()) == after + 1
    resume(case, run_dir)
    assert_same_run(run_dir, straight(case).run_dir)


def stop_program(case, tiny_path, folder, update, signal_number, **changes):
    """Start the script as a program and signal it when it reports `update`, of whatever phase
    -> exit code, stdout, stderr, run directory."""
    settings = flags(SMALL | CASES[case][1] | {"dataset": str(tiny_path), "run_dir": "my runs"} | changes)
    process = start_script(folder, f"{CASES[case][0]}.py", *settings)
    stdout = ""
    for line in process.stdout:
        stdout += line
        if re.match(rf"\[\w+ +{update}/", line):
            process.send_signal(signal_number)
    stderr = process.stderr.read()
    (run_dir,) = (folder / "my runs").glob("*/*/*")
    return process.wait(timeout=60), stdout, stderr, run_dir


STOPS = [("flora", signal.SIGINT), ("flora", signal.SIGTERM), ("flora", signal.SIGHUP), ("meta_dt", signal.SIGINT)]


@pytest.mark.parametrize("name, number", STOPS)
def test_signal_saves_and_says_how_to_resume(name, number, tiny_path, tmp_path):
    code, stdout, stderr, run_dir = stop_program(name, tiny_path, tmp_path, 20, number, total_updates=3000)
    assert code == 128 + number and "Traceback" not in stderr
    (command,) = [line for line in stdout.splitlines() if "--resume" in line]
    again = ["python", str(ROOT / f"{name}.py"), "--resume", str(run_dir.relative_to(tmp_path))]
    assert shlex.split(command.split("continue with: ")[1]) == again
    assert sum(load(run_dir)["steps"].values()) >= 20 and not (run_dir / "result.json").exists()


def test_signal_in_the_last_evaluation_ends_it_at_once_and_no_update_is_lost(straight, tiny_path, tmp_path, capsys):
    evaluate_all = flora.evaluate_all

    def interrupted(agent, data, args, protocols, episodes):
        if protocols == dc.PROTOCOLS:
            signal.raise_signal(signal.SIGTERM)
        return evaluate_all(agent, data, args, protocols, episodes)

    def ends(start, *hints):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(flora, "evaluate_all", interrupted)
            start()
        last = capsys.readouterr().out.splitlines()[-1]
        assert stop.value.code == 128 + signal.SIGTERM and all(hint in last for hint in ("interrupted", *hints))

    ends(lambda: run("flora", tiny_path, tmp_path, save_every=7), "all updates are done", "--resume")
    (run_dir,) = tmp_path.glob("*/*/*")
    assert load(run_dir)["steps"]["policy"] == 40 and not (run_dir / "result.json").exists()
    ends(lambda: resume("flora", run_dir, eval_only=True), f"--resume {run_dir} --eval-only")
    assert not (run_dir / "eval.json").exists()
    resume("flora", run_dir)
    assert_same_run(run_dir, straight("flora").run_dir)
    rows = [(step, tag) for step, tag, _ in read_rows(run_dir)]
    assert len(set(rows)) == len(rows) and (40, "eval/ood/return") in rows


def test_program_killed_by_a_signal_resumes_to_the_straight_run(tiny_path, tmp_path):
    settings = {"total_updates": 250, "eval_every": 100, "save_every": 50}
    (tmp_path / "killed").mkdir()
    code, _, _, run_dir = stop_program("flora", tiny_path, tmp_path / "killed", 60, signal.SIGKILL, **settings)
    assert code == -signal.SIGKILL
    assert 50 <= load(run_dir)["steps"]["policy"] < 250
    time.sleep(1)  # TensorBoard reads the files of a run in the order of the seconds in their names
    resume("flora", run_dir)
    assert_same_run(run_dir, Path(run("flora", tiny_path, tmp_path / "straight", **settings)["run_dir"]))
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("losses/encoder")] == list(range(10, 260, 10))


@pytest.mark.parametrize("case", [*FIRST, "meta_dt-sample"])
def test_eval_only_gives_the_numbers_of_the_last_evaluation_and_changes_nothing(case, straight, tmp_path):
    done = straight(case)
    run_dir = shutil.copytree(done.run_dir, tmp_path / "run")
    result = resume(case, run_dir, eval_only=True)
    written = json.loads((run_dir / "eval.json").read_text())
    assert written["step"] == 40
    for tag in done.result.keys() - TIMING - {"step"}:
        assert result[tag] == written[tag] == done.result[tag], tag
    for name in ("metrics.csv", "checkpoint.pt", "args.json", "result.json"):
        assert (run_dir / name).read_bytes() == (done.run_dir / name).read_bytes()


def test_resumed_run_drops_rows_after_the_checkpoint_and_a_torn_one(straight, tiny_path, tmp_path):
    run_dir = cut_run("flora", tiny_path, tmp_path, 25)
    with open(run_dir / "metrics.csv", "a", newline="") as file:
        file.write("30,losses/reward,123.0\n3")
    resume("flora", run_dir)
    assert_same_run(run_dir, straight("flora").run_dir)


def test_run_killed_before_its_first_checkpoint_cannot_be_resumed(tiny_path, tmp_path):
    run_dir = cut_run("flora", tiny_path, tmp_path, 5)
    assert "no checkpoint.pt" in stop_message(lambda: resume("flora", run_dir))


@pytest.fixture
def copied(straight, tmp_path):
    """A copy of flora's finished run -> its run directory."""
    return shutil.copytree(straight("flora").run_dir, tmp_path / "run")


def test_finished_run_can_be_continued_further(copied):
    result = resume("flora", copied, total_updates=60)
    assert result["step"] == load(copied)["steps"]["policy"] == 60
    assert [step for step, tag, _ in read_rows(copied) if tag == "losses/reward"] == [10, 20, 30, 40, 50, 60]
    assert [step for step, tag, _ in read_rows(copied) if tag == "eval/ood/return"] == [40, 60]


def test_finished_run_can_be_evaluated_with_other_settings(straight, tmp_path):
    def evaluate(name, **changes):
        run_dir = shutil.copytree(straight(name).run_dir, tmp_path / name)
        return resume(name, run_dir, eval_only=True, **changes)

    result = evaluate("macaw", online_ft=1, ft_value_steps=1, ft_policy_steps=1)
    assert math.isfinite(result["online_ft/return_ep_1"])
    result = evaluate("meta_dt", target_return="train_max")
    assert result["eval/zero_shot/return"] != straight("meta_dt").result["eval/zero_shot/return"]


def test_resuming_a_finished_run_keeps_its_results(copied, straight):
    assert resume("flora", copied) == straight("flora").result
    assert_same_run(copied, straight("flora").run_dir)


def test_fewer_updates_than_done_are_refused(copied):
    before = (copied / "checkpoint.pt").read_bytes()
    assert "has done 40" in stop_message(lambda: resume("flora", copied, total_updates=30))
    assert (copied / "checkpoint.pt").read_bytes() == before


def test_longer_training_says_that_its_learning_rates_are_not_those_of_a_straight_one(copied, capsys):
    resume("flora", copied, total_updates=50)
    assert "fell towards update 40 are now those of 50" in capsys.readouterr().out


def test_unreadable_result_is_made_again(copied, straight):
    (copied / "result.json").write_bytes(b"{\xff")
    resume("flora", copied)
    assert_same_run(copied, straight("flora").run_dir)


def test_damaged_metrics_are_refused(tiny_path, tmp_path):
    run_dir = cut_run("flora", tiny_path, tmp_path, 25)
    (run_dir / "metrics.csv").write_bytes(b"\x00\xff\n" * 3)
    assert "metrics.csv is damaged" in stop_message(lambda: resume("flora", run_dir))


def test_second_process_in_a_run_directory_is_refused(tiny_path, tmp_path):
    run_dir = cut_run("flora", tiny_path, tmp_path, 25)
    folder = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another process" in stop_message(lambda: resume("flora", run_dir))
    os.close(folder)
    resume("flora", run_dir)


def test_runs_of_the_same_second_get_directories_of_their_own(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    dirs = [run("flora", tiny_path, tmp_path, total_updates=1)["run_dir"] for _ in range(2)]
    assert [Path(run_dir).name for run_dir in dirs] == ["seed0-now", "seed0-now-2"]


def test_resuming_after_an_interrupted_last_evaluation_delivers_the_results(copied, straight):
    """Ctrl-C there, or a kill before the end, leaves the checkpoint of the last update and no result.json."""
    (copied / "result.json").unlink()
    resume("flora", copied)
    assert_same_run(copied, straight("flora").run_dir)


def test_default_given_on_the_command_line_wins_over_the_stored_value(copied, monkeypatch):
    settings = json.loads((copied / "args.json").read_text())["args"]
    assert settings["total_updates"] != flora.Args.total_updates and settings["width"] != flora.Args.width
    shown = []
    monkeypatch.setattr(flora, "train", shown.append)
    command("flora", "--resume", str(copied), "--total-updates", str(flora.Args.total_updates))
    assert shown[0].total_updates == flora.Args.total_updates and shown[0].width == settings["width"]
    assert shown[0].resume == str(copied)


# ---- losses that are not finite ---------------------------------------------------------


TWO_PHASES = ["corro-none", "meta_dt"]  # their first parameter is trained by the first phase, and fixed in the second


@pytest.mark.parametrize("case, parameter", [(case, 0) for case in FIRST] + [(case, -1) for case in TWO_PHASES])
def test_run_that_is_not_finite_stops_and_keeps_the_checkpoint(case, parameter, tiny_path, tmp_path, monkeypatch):
    script, count = script_of(case), [0]
    update = script.update

    def broken(agent, *inputs):
        metrics = update(agent, *inputs)
        count[0] += 1
        if count[0] == 25:
            with torch.no_grad():
                list(agent.parameters())[parameter].fill_(math.nan)
        return metrics

    monkeypatch.setattr(script, "update", broken)
    message = stop_message(lambda: run(case, tiny_path, tmp_path))
    (run_dir,) = tmp_path.glob("*/*/*")
    fixed = parameter == 0 and case in TWO_PHASES
    what = r"parameter [\w.]+" if fixed else r"(losses|stats|z)/\w+ \(nan\)"
    assert re.search(rf"update 30: {what} is not finite", message) and str(run_dir / "checkpoint.pt") in message
    saved = load(run_dir)
    assert saved["steps"]["policy"] == 20 and all(value.isfinite().all() for value in saved["agent"].values())
    assert all(math.isfinite(float(value)) for _, _, value in read_rows(run_dir))
    assert not (run_dir / "result.json").exists()


@pytest.mark.parametrize("tag", ["eval/ood/return", "z/probe_r2"])
def test_evaluation_that_is_not_finite_stops_the_run(tag, tiny_path, tmp_path, monkeypatch):
    evaluate_all = flora.evaluate_all
    monkeypatch.setattr(flora, "evaluate_all", lambda *inputs: evaluate_all(*inputs) | {tag: math.nan})
    message = stop_message(lambda: run("flora", tiny_path, tmp_path))
    assert f"update 20: {tag} (nan) is not finite" in message
    assert not list(tmp_path.glob("*/*/*/result.json"))


def test_infinite_loss_stops_the_run(tiny_path, tmp_path, monkeypatch):
    update = flora.update
    monkeypatch.setattr(flora, "update", lambda *inputs: update(*inputs) | {"losses/reward": torch.tensor(math.inf)})
    assert "losses/reward (inf) is not finite" in stop_message(lambda: run("flora", tiny_path, tmp_path))


def test_interrupted_run_keeps_the_last_checkpoint_where_a_parameter_is_not_finite(tiny_path, tmp_path, monkeypatch):
    update, count = flora.update, [0]

    def broken(agent, *inputs):
        metrics = update(agent, *inputs)
        count[0] += 1
        if count[0] == 25:
            with torch.no_grad():
                next(agent.parameters()).fill_(math.nan)
            signal.raise_signal(signal.SIGINT)
        return metrics

    monkeypatch.setattr(flora, "update", broken)
    with pytest.raises(SystemExit):
        run("flora", tiny_path, tmp_path)
    (run_dir,) = tmp_path.glob("*/*/*")
    assert load(run_dir)["steps"]["policy"] == 20
    assert all(value.isfinite().all() for value in load(run_dir)["agent"].values() if value.dim())


# ---- faults of the machine --------------------------------------------------------------


def test_full_disk_keeps_the_last_checkpoint(tiny_path, tmp_path, monkeypatch):
    run_dir, fsync = cut_run("flora", tiny_path, tmp_path, 25), os.fsync
    before = (run_dir / "checkpoint.pt").read_bytes()

    def full(file):
        fsync(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = stop_message(command, "flora", "--resume", str(run_dir))
    assert "No space left on device" in message and str(run_dir) in message
    assert (run_dir / "checkpoint.pt").read_bytes() == before and not list(run_dir.glob("*.tmp"))


def test_run_directory_that_vanished_ends_with_one_line(tiny_path, tmp_path, monkeypatch):
    update, count = flora.update, [0]

    def vanishing(*inputs):
        count[0] += 1
        if count[0] == 5:
            shutil.rmtree(tmp_path / "point-robot")
        return update(*inputs)

    monkeypatch.setattr(flora, "update", vanishing)
    settings = flags(SMALL | {"dataset": str(tiny_path), "run_dir": str(tmp_path)})
    assert "No such file" in stop_message(command, "flora", *settings)


def test_closed_pipe_ends_with_one_line(straight, tmp_path):
    run_dir = shutil.copytree(straight("flora").run_dir, tmp_path / "run")
    process = start_script(tmp_path, "flora.py", "--resume", str(run_dir), "--total-updates", "400")
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=60) == 1 and stderr.count("\n") == 1 and "nobody reads" in stderr
    assert load(run_dir)["steps"]["policy"] >= 40


def test_output_on_a_full_disk_ends_with_one_line(straight, tmp_path):
    run_dir = shutil.copytree(straight("flora").run_dir, tmp_path / "run")
    with open("/dev/full", "w") as full:
        program = [sys.executable, ROOT / "flora.py", "--resume", run_dir, "--total-updates", "50"]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("name", ["two\nlines", "x" * 2000])
def test_name_of_a_run_that_is_no_path_is_refused_in_one_line(name):
    assert len(stop_message(command, "flora", "--resume", name)) < 300


def test_evaluation_of_a_run_that_cannot_be_written_to_shows_its_results(copied, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(copied))

    monkeypatch.setattr(dc, "write_json", refuse)
    message = stop_message(command, "flora", "--resume", str(copied), "--eval-only")
    assert "Read-only" in message and "iid" in capsys.readouterr().out


# ---- bad input --------------------------------------------------------------------------


BAD = [("lr", 0.0), ("lr", math.nan), ("total_updates", 0), ("batch_size", -1), ("seed", -1)]
BAD += [("lr", 1e308), ("batch_size", 2**21), ("total_updates", 2**31)]


@scripts
@pytest.mark.parametrize("flag, value", BAD)
def test_impossible_value_is_refused(name, flag, value, tiny_path, tmp_path):
    message = stop_message(lambda: run(name, tiny_path, tmp_path / "runs", **{flag: value}))
    assert f"--{flag.replace('_', '-')} {value}" in message and not (tmp_path / "runs").exists()


@scripts
def test_user_mistakes_on_the_command_line_get_one_clear_error(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "python data_collect.py --env cheetah-vel" in stop_message(command, name, "--env", "cheetah-vel")
    assert "--resume" in stop_message(command, name, "--eval-only")
    assert "nowhere" in stop_message(command, name, "--resume", "nowhere")
    assert "--lr 0.0" in stop_message(command, name, "--lr", "0")
    with pytest.raises(SystemExit) as stop:
        command(name, "--total-update", "5")
    assert stop.value.code == 2 and "--total-updates" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # no run directory


def test_mistake_in_a_program_gives_one_line_and_exit_code_1(tmp_path):
    code, out, err = run_script(tmp_path, "flora.py", "--env", "cheetah-vel")
    assert code == 1 and not out and err.count("\n") == 1 and "python data_collect.py --env cheetah-vel" in err


@every_script
def test_resume_refuses_what_does_not_fit(case, straight, tmp_path):
    run_dir = straight(case).run_dir
    message = stop_message(lambda: resume(case, run_dir, batch_size=9))
    assert "--batch-size 9" in message and "has 8" in message
    other = FIRST[FIRST.index(case) - 1]
    assert "another script" in stop_message(lambda: resume(other, run_dir))
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert "damaged" in stop_message(lambda: resume(case, tmp_path))


class ArgsOfAFork(flora.Args):
    """The same arguments in another file."""


def test_run_of_another_script_with_the_same_arguments_is_refused(straight):
    run_dir = straight("flora").run_dir
    message = stop_message(lambda: dc.stored_args(ArgsOfAFork, run_dir))
    assert str(run_dir) in message and "flora.py" in message
    assert dc.stored_args(flora.Args, run_dir).resume == str(run_dir)


@pytest.mark.parametrize("flag, value", [("seed", 7), ("lr", 0.5), ("num_flows", 3), ("env", "cheetah-vel")])
def test_resume_with_another_value_is_refused(flag, value, straight):
    run_dir = straight("flora").run_dir
    message = stop_message(lambda: resume("flora", run_dir, **{flag: value}))
    assert f"--{flag.replace('_', '-')}" in message and str(load(run_dir)["args"][flag]) in message


def test_resume_notices_another_dataset_file(straight, tiny_path, tmp_path):
    with np.load(tiny_path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    header["behavior_return"] += 1.0
    np.savez_compressed(tmp_path / "other.npz", **arrays | {"header": np.array(json.dumps(header))})
    changes = {"dataset": str(tmp_path / "other.npz")}
    message = stop_message(lambda: resume("flora", straight("flora").run_dir, **changes))
    assert "other.npz" in message and "--dataset" in message


def test_resume_of_a_truncated_checkpoint_is_refused(copied):
    whole = (copied / "checkpoint.pt").read_bytes()
    (copied / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "checkpoint.pt" in stop_message(lambda: resume("flora", copied))


ARGS = asdict(flora.Args())
WHOLE = dict.fromkeys(("data", "agent", "opts", "rng", "generator", "steps", "rows", "seconds"))
WHOLE |= {"version": dc.RUN_VERSION, "args": ARGS}
FOREIGN = {  # checkpoints that torch can read and that are no run of flora.py, and what is said of them
    "state dict": ({"weight": torch.zeros(2)}, "not one of this repository"),
    "list": ([1, 2], "not one of this repository"),
    "old version": ({"args": ARGS, "step": 3}, "of version 1 of this repository, this is 2"),
    "other script": (WHOLE | {"args": {"exp_name": "sac", "lr": 0.1}}, "of another script"),
    "argument missing": (WHOLE | {"args": {k: v for k, v in ARGS.items() if k != "num_flows"}}, "of another script"),
    "argument of a wrong type": (WHOLE | {"args": ARGS | {"width": "wide"}}, "arguments of a wrong type"),
    "true for a number": (WHOLE | {"args": ARGS | {"width": True}}, "arguments of a wrong type"),
    "version of another kind": (WHOLE | {"version": torch.zeros(3)}, "of version tensor([0., 0., 0.])"),
    "choice that there is not": (WHOLE | {"args": ARGS | {"device": "abacus"}}, "arguments of a wrong type"),
    "key missing": ({k: v for k, v in WHOLE.items() if k != "rng"}, "incomplete: no rng"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_resume_of_a_foreign_checkpoint_is_refused(kind, tmp_path):
    content, reason = FOREIGN[kind]
    torch.save(content, tmp_path / "checkpoint.pt")
    message = stop_message(lambda: resume("flora", tmp_path))
    assert str(tmp_path) in message and reason in message


def first_state(saved):
    """A tensor of Adam's state."""
    return saved["opts"]["opt"]["state"][0]


DAMAGE = {  # whole checkpoints with one wrong field
    "weights of another width": lambda saved: saved["agent"].update({"behavior.w_2": torch.zeros(1, 3, 3)}),
    "optimizer of other networks": lambda saved: first_state(saved).update(exp_avg=torch.zeros(3)),
    "weights of another type": lambda saved: saved["agent"].update({"brac_alpha": torch.tensor(1)}),
    "moment missing": lambda saved: first_state(saved).pop("exp_avg"),
    "moments of a parameter missing": lambda saved: saved["opts"]["opt"]["state"].pop(0),
    "setting of the optimizer missing": lambda saved: saved["opts"]["opt"]["param_groups"][0].pop("betas"),
    "negative steps": lambda saved: saved.update(steps={"policy": -1}),
    "no rows": lambda saved: saved.update(rows=0),
    "infinite time": lambda saved: saved.update(seconds=math.inf),
    "optimizer missing": lambda saved: saved["opts"].clear(),
    "generator": lambda saved: saved.update(generator=torch.zeros(3, dtype=torch.uint8)),
    "random state": lambda saved: saved.update(rng=[]),
    "steps": lambda saved: saved.update(steps={}),
    "rows": lambda saved: saved.update(rows="many"),
    "last evaluation": lambda saved: saved.update(recorded="late"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_checkpoint_with_a_wrong_field_is_refused(kind, copied):
    saved = load(copied)
    DAMAGE[kind](saved)
    torch.save(saved, copied / "checkpoint.pt")
    message = stop_message(lambda: resume("flora", copied, total_updates=60))
    assert "checkpoint.pt does not fit" in message and str(copied) in message


def test_any_damaged_byte_of_a_checkpoint_is_refused_or_harmless(copied):
    """torch.load alone does not look at the checksums of the file."""
    whole, rng, refused = (copied / "checkpoint.pt").read_bytes(), np.random.default_rng(0), 0
    reference = dc.load_checkpoint(copied, flora.Args)
    for place in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        (copied / "checkpoint.pt").write_bytes(damaged)
        try:
            saved = dc.load_checkpoint(copied, flora.Args)
        except SystemExit as stop:
            assert "checkpoint.pt" in stop.code and "\n" not in stop.code
            refused += 1
        else:  # a byte between the members of the archive
            assert_same_state(saved, reference)
    assert refused > 50


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "..", "nul\0", "line\nbreak", "\udcff", "", "x" * 2000])
def test_name_of_an_experiment_that_is_no_folder_is_refused(name, tiny_path, tmp_path):
    assert "--exp-name" in stop_message(lambda: run("flora", tiny_path, tmp_path / "runs", exp_name=name))
    assert not (tmp_path / "runs").exists()


def test_impossible_discount_is_refused_with_its_true_limits(tiny_path, tmp_path):
    message = stop_message(lambda: run("flora", tiny_path, tmp_path, gamma=0.0))
    assert message == "--gamma 0.0: must be above 0 and at most 1"


@pytest.mark.parametrize(
    "name, value, limits",
    [("n_step", 0, "at least 1 and at most 100"), ("n_step", 101, "at least 1 and at most 100")]
    + [("anchor_share", value, "above 0 and at most 1") for value in (0.0, 1.01)]
    + [(name, -0.1, "at least 0 and at most 1000000") for name in ("target_noise", "behavior_decay")]
    + [("final_episodes", 0, "above 0 and at most 1048576")],
)
def test_value_beyond_its_limits_is_refused_and_the_limits_are_named(name, value, limits, tiny_path, tmp_path):
    message = stop_message(lambda: run("flora", tiny_path, tmp_path, **{name: value}))
    assert message == f"--{name.replace('_', '-')} {value}: must be {limits}"


@pytest.mark.parametrize(
    "name, flag, value, most", [("focal_pp", "momentum", 1.5, 1), ("er_trl", "gan_momentum", 1.0, 0.999)]
)
def test_momentum_beyond_its_limit_is_refused(name, flag, value, most, tiny_path, tmp_path):
    message = stop_message(lambda: run(name, tiny_path, tmp_path, **{flag: value}))
    assert message == f"--{flag.replace('_', '-')} {value}: must be at least 0 and at most {most}"


@pytest.mark.parametrize("changes", [{"n_step": 1, "anchor_share": 1.0}, {"n_step": 100, "behavior_decay": 0.0}])
def test_values_at_their_limits_pass(changes):
    args = dc.resolve(flora.Args(target_noise=0.0, **changes), flora.ENV_ARGS, flora.MAY_BE_ZERO, flora.RANGES)
    assert asdict(args).items() >= changes.items()


def test_dataset_of_another_family_is_refused(tiny_path, tmp_path):
    message = stop_message(lambda: run("flora", tiny_path, tmp_path, env="cheetah-vel"))
    assert "holds point-robot, not cheetah-vel" in message and "--env point-robot" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_path, tmp_path):
    assert "--device cuda" in stop_message(lambda: run("flora", tiny_path, tmp_path, device="cuda"))


def test_run_directory_that_cannot_be_made_is_refused(tiny_path, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--run-dir" in stop_message(lambda: run("flora", tiny_path, tmp_path / "file" / "runs"))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_run_is_that_of_its_checkout(tmp_path):
    shutil.copy(dc.__file__, tmp_path)

    def git(*words):
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *person, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    def found():
        code = "import json, data_collect; print(json.dumps(data_collect.commit()))"
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
        return json.loads(run.stdout)

    assert found() is None
    git("init")
    git("add", "data_collect.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert found() == head
    with open(tmp_path / "data_collect.py", "a") as file:
        file.write("# changed\n")
    assert found() == f"{head}-dirty"
