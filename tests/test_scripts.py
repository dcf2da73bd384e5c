"""What all method scripts share: the same blocks letter for letter, whole runs, interruption, resume, bad input."""

import csv
import importlib
import inspect
import json
import math
import re
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script, start_script

import data_collect as dc

SCRIPTS = ["flora", "focal", "unicorn", "corro", "macaw", "meta_dt"]
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 40, "log_every": 10, "eval_every": 20}
SMALL |= {"save_every": 10, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 8}
SMALL |= {"width": 16}
VARIANTS = {
    "flora": [("flora", {"bandit_every": 15})],
    "focal": [("focal", {}), ("focal", {"divergence": "dual", "entropy_weight": 0.1, "brac_alpha_lr": 0.1})],
    "unicorn": [("unicorn", {}), ("unicorn", {"variant": "sup", "backbone": "sac"}), ("unicorn", {"variant": "ss-0"})],
    "corro": [("corro", {"encoder_updates": 20}), ("corro", {"negatives": "generative", "encoder_updates": 20})]
    + [("corro", {"negatives": "none", "backbone": "sac", "encoder_updates": 20})],
    "macaw": [("macaw", {})],
    "meta_dt": [("meta_dt", {"world_model_updates": 20})],
}
ALL = [case for cases in VARIANTS.values() for case in cases]
FIRST = [cases[-1] if name == "corro" else cases[0] for name, cases in VARIANTS.items()]
GENERATIVE = ("corro", {"negatives": "generative", "encoder_updates": 20})
cases = pytest.mark.parametrize("name, extra", ALL, ids=[f"{n}-{'-'.join(map(str, e.values()))}" for n, e in ALL])
scripts = pytest.mark.parametrize("name", SCRIPTS)


def run(name, tiny_path, folder, **changes):
    script = importlib.import_module(name)
    return script.train(script.Args(**SMALL | {"dataset": str(tiny_path), "run_dir": str(folder)} | changes))


def resume(name, run_dir, **changes):
    script = importlib.import_module(name)
    return script.train(replace(script.stored_args(run_dir), **changes))


def rows_of(run_dir):
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "tag", "value"]
    return rows


def load(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def stop_message(call):
    with pytest.raises(SystemExit) as stop:
        call()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# ---- the house --------------------------------------------------------------------------

SHARED = ["MLP", "gaussian_kl", "pre_tanh", "tanh_gaussian_logp", "anneal", "resolve", "write_json", "load_checkpoint"]
SHARED += ["set_grads", "stored_args", "check_resumed", "eval_line", "Run", "main"]


def without_tags(source):
    """Numbers of a script's own deviations, as in "(D3)" or "[ours: D3]", differ."""
    return re.sub(r"\bD\d\b", "D", source)


@pytest.mark.parametrize("block", SHARED)
def test_shared_blocks_are_letter_for_letter_the_same(block):
    scripts = [importlib.import_module(name) for name in SCRIPTS]
    sources = [without_tags(inspect.getsource(getattr(script, block))) for script in scripts if hasattr(script, block)]
    assert len(set(sources)) == 1 and len(sources) >= 4


def test_arguments_of_run_and_data_are_the_same_in_every_script():
    blocks = set()
    for name in SCRIPTS:
        source = inspect.getsource(importlib.import_module(name).Args)
        blocks.add(source[: source.index("    # method\n")].replace(f'"{name}"', '"name"'))
    assert len(blocks) == 1


@scripts
def test_help_explains_every_argument(name, tmp_path):
    code, out, err = run_script(tmp_path, f"{name}.py", "--help")
    assert code == 0 and not err
    for field in fields(importlib.import_module(name).Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out), field.name


# ---- whole runs -------------------------------------------------------------------------


@cases
def test_run_moves_every_parameter_and_reports_every_protocol(name, extra, tiny_path, tmp_path, monkeypatch):
    script, seen = importlib.import_module(name), {}
    run_class = script.Run

    class Spy(run_class):
        def __enter__(self):
            seen["agent"], seen["before"] = self.agent, {k: v.clone() for k, v in self.agent.state_dict().items()}
            return super().__enter__()

    monkeypatch.setattr(script, "Run", Spy)
    result = run(name, tiny_path, tmp_path, **extra)
    still = [k for k, p in seen["agent"].named_parameters() if torch.equal(p, seen["before"][k])]
    assert set(still) <= {"aggregator.score.bias"}  # a softmax is blind to a common shift
    for protocol in dc.PROTOCOLS:
        assert math.isfinite(result[f"eval/{protocol}/return"]) and math.isfinite(result[f"eval/{protocol}/normalized"])
    assert result["step"] == 40 and result["wall_clock_s"] > 0
    assert json.loads((Path(result["run_dir"]) / "result.json").read_text()) == result
    assert all(math.isfinite(float(value)) for _, _, value in rows_of(result["run_dir"]))


@pytest.mark.parametrize("name, extra", FIRST)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name, extra, tiny_path, tmp_path):
    once, again, other = (run(name, tiny_path, tmp_path / str(k), **extra, seed=k // 2) for k in range(3))
    files = [(Path(r["run_dir"]) / "metrics.csv").read_bytes() for r in (once, again, other)]
    assert files[0] == files[1] != files[2]


class Killed(Exception):
    pass


def cut_run(name, extra, tiny_path, folder, monkeypatch, after):
    """The run as a kill after `after` updates, of whatever phase, leaves it -> run directory."""
    script, count = importlib.import_module(name), [0]
    with monkeypatch.context() as patch:
        for step in ("update", "update_encoder", "update_cvae", "update_world_model"):
            if hasattr(script, step):

                def counted(*inputs, function=getattr(script, step)):
                    count[0] += 1
                    if count[0] > after:
                        raise Killed
                    return function(*inputs)

                patch.setattr(script, step, counted)
        with pytest.raises(Killed):
            run(name, tiny_path, folder, **extra)
    (run_dir,) = folder.glob("*/*/*")
    return run_dir


PHASES = [(*case, 25) for case in FIRST] + [(*GENERATIVE, after) for after in (12, 33, 75)]


@pytest.mark.parametrize("name, extra, after", PHASES)
def test_killed_run_resumes_to_the_straight_one(name, extra, after, tiny_path, tmp_path, monkeypatch):
    straight = Path(run(name, tiny_path, tmp_path / "straight", **extra)["run_dir"])
    run_dir = cut_run(name, extra, tiny_path, tmp_path / "cut", monkeypatch, after)
    resume(name, run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    one, two = load(run_dir), load(straight)
    assert one["steps"] == two["steps"]
    assert all(torch.equal(value, two["agent"][key]) for key, value in one["agent"].items())


@scripts
def test_ctrl_c_saves_and_says_how_to_resume(name, tiny_path, tmp_path):
    extra = dict(VARIANTS[name][0][1]) | {"total_updates": 3000}
    settings = flags(SMALL | extra | {"dataset": str(tiny_path), "run_dir": "runs"})
    process = start_script(tmp_path, f"{name}.py", *settings)
    out = ""
    for line in process.stdout:
        out += line
        if re.match(r"\[\w+ +20/", line):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and "Traceback" not in process.stderr.read()
    (run_dir,) = (tmp_path / "runs").glob("*/*/*")
    assert f"python {name}.py --resume {run_dir.relative_to(tmp_path)}" in out
    assert sum(load(run_dir)["steps"].values()) >= 20


@pytest.mark.parametrize("name, extra", FIRST)
def test_eval_only_gives_the_numbers_of_the_last_evaluation(name, extra, tiny_path, tmp_path):
    result = run(name, tiny_path, tmp_path, **extra)
    again = resume(name, result["run_dir"], eval_only=True)
    for protocol in dc.PROTOCOLS:
        assert again[f"eval/{protocol}/return"] == result[f"eval/{protocol}/return"]
    assert again["z/probe_r2"] == result["z/probe_r2"]


@pytest.mark.parametrize("name, extra", FIRST)
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(name, extra, tiny_path, tmp_path, monkeypatch):
    script, update = importlib.import_module(name), importlib.import_module(name).update
    count = [0]

    def broken(agent, *inputs):
        metrics = update(agent, *inputs)
        count[0] += 1
        if count[0] == 25:
            with torch.no_grad():
                next(agent.parameters()).fill_(math.nan)
        return metrics

    monkeypatch.setattr(script, "update", broken)
    message = stop_message(lambda: run(name, tiny_path, tmp_path, **extra))
    (run_dir,) = tmp_path.glob("*/*/*")
    assert "update 30" in message and "not finite" in message and str(run_dir / "checkpoint.pt") in message
    assert load(run_dir)["steps"]["policy"] == 20


# ---- bad input --------------------------------------------------------------------------


BAD = [("lr", 0.0), ("lr", math.nan), ("total_updates", 0), ("batch_size", -1), ("seed", -1)]


@scripts
@pytest.mark.parametrize("flag, value", BAD)
def test_impossible_value_is_refused(name, flag, value, tiny_path, tmp_path):
    message = stop_message(lambda: run(name, tiny_path, tmp_path / "runs", **{flag: value}))
    assert f"--{flag.replace('_', '-')} {value}" in message and not (tmp_path / "runs").exists()


@scripts
def test_user_mistakes_on_the_command_line_get_one_clear_error(name, tmp_path):
    code, _, err = run_script(tmp_path, f"{name}.py", "--total-update", "5")
    assert code == 2 and "--total-updates" in err and "Traceback" not in err
    code, _, err = run_script(tmp_path, f"{name}.py", "--env", "cheetah-vel")
    assert code == 1 and err.count("\n") == 1 and "python data_collect.py --env cheetah-vel" in err
    code, _, err = run_script(tmp_path, f"{name}.py", "--eval-only")
    assert code == 1 and err.count("\n") == 1 and "--resume" in err
    code, _, err = run_script(tmp_path, f"{name}.py", "--resume", "nowhere")
    assert code == 1 and err.count("\n") == 1 and "nowhere" in err


@scripts
def test_resume_refuses_what_does_not_fit(name, tiny_path, tmp_path):
    result = run(name, tiny_path, tmp_path, total_updates=10, **VARIANTS[name][0][1])
    run_dir = Path(result["run_dir"])
    assert "--batch-size 9" in stop_message(lambda: resume(name, run_dir, batch_size=9))
    other = SCRIPTS[SCRIPTS.index(name) - 1]
    assert "another script" in stop_message(lambda: resume(other, run_dir))
    damaged = shutil.copytree(run_dir, tmp_path / "damaged")
    (damaged / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert "damaged" in stop_message(lambda: resume(name, damaged))
