"""The scripts as programs: blocks that several share, whole runs, interruption and resume, mistakes of a user.

What does not depend on the script is tested with flora.py alone."""

import ast
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
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, load, read_rows, start_script, stop_message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_collect as dc
import flora
import focal

SCRIPTS = ["flora", "focal", "focal_pp", "unicorn", "corro", "csro", "er_trl", "idaq", "gentle", "macaw", "meta_dt"]
ACTOR_CRITICS = SCRIPTS[:9]
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 40, "log_every": 10, "eval_every": 20}
SMALL |= {"save_every": 10, "eval_episodes": 1, "final_episodes": 2, "meta_batch": 4, "batch_size": 8}
SMALL |= {"context_size": 8, "width": 16}
CASES = {  # case: script, its arguments
    "flora": ("flora", {"bandit_episodes": 2}),
    "focal": ("focal", {}),
    "focal_pp": ("focal_pp", {}),
    "focal-dual": ("focal", {"divergence": "dual", "entropy_weight": 0.1, "kl_coef_lr": 0.1}),
    "unicorn": ("unicorn", {}),
    "unicorn-sup": ("unicorn", {"variant": "sup", "backbone": "sac"}),
    "unicorn-ss-0": ("unicorn", {"variant": "ss-0"}),
    "corro": ("corro", {"encoder_updates": 20}),
    "corro-generative": ("corro", {"negatives": "generative", "encoder_updates": 20}),
    "corro-none": ("corro", {"negatives": "none", "encoder_updates": 20}),
    "csro": ("csro", {}),
    "er_trl": ("er_trl", {}),
    "idaq": ("idaq", {}),
    "gentle": ("gentle", {"model_updates": 20, "model_width": 8, "pseudo_states": 16, "rebuild_every": 15}),
    "macaw": ("macaw", {"latent": 6, "head_width": 8}),
    "meta_dt": ("meta_dt", {"world_model_updates": 20}),
}
FIRST = ["corro-none" if name == "corro" else name for name in SCRIPTS]  # one case of every script
TIMING = {"run_dir", "updates_per_sec", "cpu_s"}  # what differs between two equal runs
every_script = pytest.mark.parametrize("case", FIRST)


def script_of(case):
    return importlib.import_module(CASES[case][0])


def run(case, path, folder, **changes):
    """Train on the dataset `path`; the runs lie in `folder`."""
    settings = SMALL | CASES[case][1] | {"dataset": str(path), "run_dir": str(folder)} | changes
    return script_of(case).train(script_of(case).Args(**settings))


def resume(case, run_dir, **changes):
    args = script_of(case).Args
    stored = dc.load_checkpoint(run_dir, args)["args"]
    return script_of(case).train(args(**stored | {"resume": str(run_dir)} | changes))


def command(name, *arguments):
    """The script as from the command line."""
    script = script_of(name)
    return dc.command_line(script.Args, script.train, script.__doc__, script.ENV_DEFAULTS, list(arguments))


@pytest.fixture(scope="module")
def straight(tiny_path, tmp_path_factory):
    """-> function of a case: its run without interruption, made once: the result, the run directory, the agent."""

    @functools.cache
    def run_once(case):
        seen = {}

        class Spy(dc.Run):
            def __enter__(self):
                seen.update(agent=self.agent, before={k: v.clone() for k, v in self.agent.state_dict().items()})
                return super().__enter__()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dc, "Run", Spy)
            result = run(case, tiny_path, tmp_path_factory.mktemp(case))
        return SimpleNamespace(result=result, run_dir=Path(result["run_dir"]), **seen)

    return run_once


@pytest.fixture
def copied(straight, tmp_path):
    """A copy of flora's finished run -> its run directory."""
    return shutil.copytree(straight("flora").run_dir, tmp_path / "run")


# ---- what several scripts share ---------------------------------------------------------


def marked_blocks(name):
    """-> {block: (source, scripts that it says it shares it with)}."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    blocks = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            above = re.match(r" *# SHARED: identical in (.*)", lines[node.lineno - 2])
            if above:
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                others = set(re.findall(r"(\w+)\.py", above[1])) or set(ACTOR_CRITICS) - {name}
                blocks[node.name] = source, others
    return blocks


def test_shared_blocks_are_identical():
    found = {name: marked_blocks(name) for name in SCRIPTS}
    pairs = [(name, block) for name in SCRIPTS for block in found[name]]
    assert len(pairs) > 40
    for name, block in pairs:
        source, others = found[name][block]
        having = {other for other in SCRIPTS if block in found[other]}
        assert others == having - {name}, f"{name}.{block}"
        assert all(found[other][block][0] == source for other in others), f"{name}.{block}"


def test_arguments_of_run_are_identical():
    blocks = set()
    for name in SCRIPTS:
        source = inspect.getsource(importlib.import_module(name).Args)
        source = source[: source.index("    # data and evaluation")].replace(f'"{name}"', '"name"')
        blocks.add(source)
    assert len(blocks) == 1


@pytest.mark.parametrize("name", ["focal_pp", "csro", "er_trl", "idaq", "gentle"])
def test_focals_variants_share_its_defaults(name):
    script = importlib.import_module(name)
    for env in dc.FAMILIES:
        found = [module.Args(env=env) for module in (focal, script)]
        for args, module in zip(found, (focal, script)):
            dc.fill_in(args, module.ENV_DEFAULTS)
        one, two = map(asdict, found)
        shared = one.keys() & two.keys() - {"exp_name"} - ({"metric_weight"} if name == "focal_pp" else set())
        assert len(shared) > 30 and {k: one[k] for k in shared} == {k: two[k] for k in shared}


def test_idaq_trains_exactly_like_focal(straight):
    texts = [(straight(name).run_dir / "metrics.csv").read_text().splitlines() for name in ("focal", "idaq")]
    assert texts[0] == [line for line in texts[1] if "eval/idaq/" not in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name.replace('_', '-')}" in out for field in fields(script_of(name).Args))
    assert "--gamma 0.97, 0.9 for point" in " ".join(out.split()) or name in ("macaw", "meta_dt")


# ---- whole runs -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_run_trains_everything_and_reports_everything(case, straight):
    done = straight(case)
    still = [name for name, p in done.agent.named_parameters() if torch.equal(p, done.before[name])]
    still = [name for name in still if not (case == "unicorn-sup" and name.startswith("behavior."))]  # SAC has none
    assert set(still) <= {"aggregator.score.bias"}  # a softmax is blind to a common shift
    result = done.result
    for protocol in dc.PROTOCOLS:
        assert {f"eval/{protocol}/{figure}" for figure in ("return", "return_se", "normalized")} <= result.keys()
    assert ("eval/iid/q_error" in result) == (CASES[case][0] not in ("macaw", "meta_dt"))
    assert ("eval/bc/return" in result) == (case not in ("focal-dual", "unicorn-sup", "macaw", "meta_dt"))
    assert all(math.isfinite(value) for tag, value in result.items() if tag != "run_dir")
    assert result["step"] == 40 and result["cpu_s"] > 0
    assert json.loads((done.run_dir / "result.json").read_text()) == result
    rows = [(step, tag) for step, tag, _ in read_rows(done.run_dir)]
    assert {step for step, tag in rows if tag.startswith("losses/")} == {10, 20, 30, 40}  # log_every, in each phase
    assert {step for step, tag in rows if tag == "eval/iid/return"} == {20, 40}  # eval_every, and the last
    last = {tag: float(value) for step, tag, value in read_rows(done.run_dir) if step == 40}
    assert all(last[tag] == value for tag, value in result.items() if tag.startswith(("eval/", "z/")))


def test_evaluation_prints_one_line():
    results = {"eval/iid/return": 349.04, "eval/iid/return_se": 12.36, "eval/iid/normalized": 72.6}
    results |= {"eval/ood/return": 3, "eval/ood/normalized": -0.6, "eval/ood/diverged": 2.0}
    results |= {"eval/iid/return_task_02": 5.0, "z/nearest_task_acc": 0.456, "z/probe_r2": -0.5}
    expected = "eval  iid 349.0 ± 12.4 (73)  ood 3.0 (-1)  2 episodes diverged, counted as the random policy's"
    assert dc.eval_line(results) == expected + "  z acc 0.46  z R2 -0.50"


def test_policy_below_behavior_cloning_gets_advice():
    """At more than two standard errors of the difference: sqrt(0.3^2 + 0.4^2) = 0.5."""
    results = {"eval/iid/return_se": 0.3, "eval/bc/return": 2.0, "eval/bc/return_se": 0.4}
    assert dc.advice(results | {"eval/iid/return": 1.01}) == dc.advice({"eval/iid/return": 0.0}) == []
    text = " ".join(dc.advice(results | {"eval/iid/return": 0.99}))
    assert "(1.0)" in text and "(2.0)" in text and "--reward-scale" in text and "--kl-coef" in text


@pytest.mark.parametrize("case", ["macaw", "meta_dt"])  # the others: actor_critic_suite.py
def test_smallest_batches_train(case, tiny_path, tmp_path):
    smallest = {"meta_batch": 1, "batch_size": 1, "context_size": 1, "total_updates": 2, "log_every": 1}
    assert run(case, tiny_path, tmp_path, **smallest)["step"] == 2


@every_script
def test_seed_decides_the_run(case, straight, tiny_path, tmp_path):
    """Before learning rates fall. That equal seeds give equal runs is seen where runs are resumed."""
    other = run(case, tiny_path, tmp_path, seed=1, total_updates=20, final_episodes=1)["run_dir"]
    one, two = (dict(((step, tag), v) for step, tag, v in read_rows(d)) for d in (straight(case).run_dir, other))
    losses = {key for key in one.keys() & two.keys() if key[0] == 10 and key[1].startswith("losses/")}
    assert losses and all(one[key] != two[key] for key in losses)


def test_args_json_records_script_and_versions(straight):
    about = json.loads((straight("flora").run_dir / "args.json").read_text())
    assert about["script"] == "flora" and about["args"]["bandit_episodes"] == 2
    assert about["versions"]["threads"] == torch.get_num_threads() and "commit" in about["versions"]


# ---- interruption and resume ------------------------------------------------------------


class Killed(Exception):
    pass


def cut_run(case, tiny_path, folder, after, end=Killed):
    """The run as a kill (end=Killed) or Ctrl-C (end=SystemExit) in the update after `after` updates of all phases
    leaves it -> run directory."""
    script, count = script_of(case), [0]

    def counted(update, *inputs):
        count[0] += 1
        if count[0] == after + 1:
            if end is Killed:
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return update(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        counted_names = {"update", "update_encoder", "update_cvae", "update_models", "update_world_model"}
        for name in counted_names & vars(script).keys():
            patch.setattr(script, name, functools.partial(counted, getattr(script, name)))
        with pytest.raises(end):
            run(case, tiny_path, folder)
    (run_dir,) = folder.glob("*/*/*")
    return run_dir


def assert_same_run(resumed, straight):
    """The same bytes of metrics, the same final state and the same results in two run directories."""
    assert (resumed / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    one, two = load(resumed), load(straight)
    for key in ("agent", "opts", "generator", "rng", "steps", "rows"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0, equal_nan=True)
    one, two = (json.loads((run_dir / "result.json").read_text()) for run_dir in (resumed, straight))
    assert one.keys() == two.keys()
    assert all(one[tag] == two[tag] for tag in one.keys() - TIMING)


CUTS = [(case, 25) for case in FIRST] + [("corro-generative", 33), ("corro-generative", 75)]
CUTS += [("gentle", 32), ("meta_dt", 47)]


@pytest.mark.parametrize("case, after", CUTS)
def test_killed_run_resumes_bit_for_bit(case, after, straight, tiny_path, tmp_path):
    run_dir = cut_run(case, tiny_path, tmp_path, after)
    assert sum(load(run_dir)["steps"].values()) == after // 10 * 10
    with open(run_dir / "metrics.csv", "a", newline="") as file:
        file.write("30,losses/reward,123.0\n3")  # since the checkpoint, and cut off
    resume(case, run_dir)
    assert_same_run(run_dir, straight(case).run_dir)


@pytest.mark.parametrize("case, after", [("flora", 25), ("corro-generative", 12), ("meta_dt", 12)])
def test_ctrl_c_loses_no_update(case, after, straight, tiny_path, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    run_dir = cut_run(case, tiny_path, tmp_path, after, end=SystemExit)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sum(load(run_dir)["steps"].values()) == after + 1
    resume(case, run_dir)
    assert_same_run(run_dir, straight(case).run_dir)


def test_terminated_program_resumes_bit_for_bit(tiny_path, tmp_path):
    settings = {"total_updates": 250, "eval_every": 1000, "save_every": 50, "final_episodes": 1}
    words = flags(SMALL | CASES["flora"][1] | settings | {"dataset": str(tiny_path), "run_dir": "my runs"})
    process, stdout = start_script(tmp_path, "flora.py", *words), ""
    for line in process.stdout:
        stdout += line
        if re.match(r"\[policy +60/", line):
            process.send_signal(signal.SIGTERM)
    stderr = process.stderr.read()
    (run_dir,) = (tmp_path / "my runs").glob("*/*/*")
    assert process.wait() == 128 + signal.SIGTERM and "Traceback" not in stderr
    again = ["python", str(ROOT / "flora.py"), "--resume", str(run_dir.relative_to(tmp_path))]
    assert shlex.split(stdout.splitlines()[-1].split("continue with: ")[1]) == again
    assert 60 <= load(run_dir)["steps"]["policy"] < 250
    resume("flora", run_dir)
    assert_same_run(run_dir, Path(run("flora", tiny_path, tmp_path / "straight", **settings)["run_dir"]))
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    assert {event.step for event in events.Scalars("losses/encoder")} == set(range(10, 260, 10))


def test_signal_in_last_evaluation_ends_at_once(straight, tiny_path, tmp_path, capsys):
    evaluate_all = flora.evaluate_all

    def interrupted(agent, data, args, protocols, episodes):
        if protocols == dc.PROTOCOLS:
            signal.raise_signal(signal.SIGTERM)
        return evaluate_all(agent, data, args, protocols, episodes)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(flora, "evaluate_all", interrupted)
        run("flora", tiny_path, tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().out
    (run_dir,) = tmp_path.glob("*/*/*")
    resume("flora", run_dir)
    assert_same_run(run_dir, straight("flora").run_dir)


def test_finished_run_can_be_continued(copied):
    result = resume("flora", copied, total_updates=60)
    assert result["step"] == load(copied)["steps"]["policy"] == 60
    assert [step for step, tag, _ in read_rows(copied) if tag == "losses/reward"] == [10, 20, 30, 40, 50, 60]
    assert "has done 60" in stop_message(lambda: resume("flora", copied, total_updates=30))


def test_evaluation_settings_may_change(straight, tmp_path):
    def evaluate(name, **changes):
        return resume(name, shutil.copytree(straight(name).run_dir, tmp_path / name), eval_only=True, **changes)

    result = evaluate("macaw", online_ft=1, ft_value_steps=1, ft_policy_steps=1)
    assert math.isfinite(result["online_ft/return_ep_1"])
    result = evaluate("meta_dt", target_return="task_max")
    assert result["eval/zero_shot/return"] != straight("meta_dt").result["eval/zero_shot/return"]


def test_second_process_is_refused(copied):
    with open(copied / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in stop_message(lambda: resume("flora", copied))


def test_command_line_wins_over_stored_values(copied, monkeypatch):
    shown = []
    monkeypatch.setattr(flora, "train", shown.append)
    command("flora", "--resume", str(copied), "--total-updates", str(flora.Args.total_updates))
    assert shown[0].total_updates == flora.Args.total_updates and shown[0].width == 16


def test_run_resumes_on_another_device(copied, capsys):
    """A GPU's generator has 16 bytes."""
    saved = load(copied) | {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    torch.save(saved, copied / "checkpoint.pt")
    assert resume("flora", copied, total_updates=60)["step"] == 60
    assert "another device; on cpu it does not go on bit for bit" in capsys.readouterr().out


# ---- faults and mistakes ----------------------------------------------------------------


def test_loss_not_finite_stops_the_run(tiny_path, tmp_path, monkeypatch):
    update, count = flora.update, [0]

    def broken(agent, *inputs):
        count[0] += 1
        if count[0] == 25:
            list(agent.parameters())[-1].data.fill_(math.nan)
        return update(agent, *inputs)

    monkeypatch.setattr(flora, "update", broken)
    message = stop_message(lambda: run("flora", tiny_path, tmp_path))
    (run_dir,) = tmp_path.glob("*/*/*")
    assert re.search(r"update 30: .* is not finite", message) and str(run_dir / "checkpoint.pt") in message
    saved = load(run_dir)
    unset = ("last_return", "usual_change")  # NaN until the bandit's second episode ends
    assert saved["steps"]["policy"] == 20
    assert all(value.isfinite().all() for name, value in saved["agent"].items() if name not in unset)
    assert not (run_dir / "result.json").exists()


def test_full_disk_keeps_the_last_checkpoint(tiny_path, tmp_path, monkeypatch):
    run_dir = cut_run("flora", tiny_path, tmp_path, 25)
    before = (run_dir / "checkpoint.pt").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = stop_message(command, "flora", "--resume", str(run_dir))
    assert "No space left on device" in message and str(run_dir) in message
    assert (run_dir / "checkpoint.pt").read_bytes() == before and not list(run_dir.glob("*.tmp"))


def test_damaged_checkpoint_is_refused(copied):
    whole = (copied / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:1000], whole[:half] + bytes([whole[half] ^ 16]) + whole[half + 1 :]):
        (copied / "checkpoint.pt").write_bytes(damaged)
        assert "checkpoint.pt is damaged" in stop_message(lambda: resume("flora", copied))
    torch.save({"weight": torch.zeros(2)}, copied / "checkpoint.pt")
    assert "not of this version" in stop_message(lambda: resume("flora", copied))


def test_shipped_checkpoints_fit_their_scripts():
    """A new argument of a script has to be added to them."""
    shipped = sorted((ROOT / "checkpoints").iterdir())
    assert len(shipped) == 10
    for folder in shipped:
        script = importlib.import_module(json.loads((folder / "args.json").read_text())["script"])
        assert dc.load_checkpoint(folder, script.Args)["args"]["env"] == folder.name.split("-small-")[1]


def test_resume_refuses_what_does_not_fit(tmp_path, copied):
    message = stop_message(lambda: resume("flora", copied, num_flows=3))
    assert "--num-flows 3" in message and "has 4" in message
    assert "a run of flora.py" in stop_message(lambda: resume("focal", copied))
    assert "no checkpoint.pt" in stop_message(lambda: resume("flora", tmp_path))
    saved = load(copied)
    saved["agent"].pop("flows.u")
    torch.save(saved, copied / "checkpoint.pt")
    assert "other networks" in stop_message(lambda: resume("flora", copied))


MISTAKES = {
    "--env ant-dri": "did you mean ant-dir?",
    "--env ant-dir --seed 0 3 --width 9": "for s in 0 3; do python",
    "--env hopper-rand-params": "data_collect.py --env hopper-rand-params",
    "--eval-only": "--resume",
    "--resume nowhere": "nowhere",
    "--batch-size 0": "--batch-size 0: must be at least 1",
    "--lr nan": "--lr nan: must be finite",
    "--exp-name a/b": "name of one folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake_gets_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[words] in stop_message(command, "flora", *words.split())
    assert not list(tmp_path.iterdir())  # no run directory


def test_program_finds_its_data_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = command("flora", *flags({"env": "point-robot", "total_updates": 1, "final_episodes": 1, "run_dir": "~/x"}))
    assert Path(result["run_dir"]).parent.resolve() == tmp_path / "x/point-robot/flora"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_path, tmp_path):
    assert "--device cuda" in stop_message(lambda: run("flora", tiny_path, tmp_path, device="cuda"))
