"""A first look that fails fast: every script trains, goes on, and is evaluated."""

import importlib
import json
import math
from pathlib import Path

import pytest

import data_collect as dc

SHORT = {"corro": {"encoder_updates": 2}, "meta_dt": {"world_model_updates": 2}}
SHORT |= {"gentle": {"model_updates": 2, "pseudo_states": 16}}
SHORT |= {"omnirl": {"env": "any-mdp", "streams": 4, "context_rows": 64, "final_plays": 1}}
NAMES = ["flora", "focal", "focal_pp", "unicorn", "corro", "csro", "er_trl", "idaq", "gentle", "macaw", "meta_dt"]
NAMES += ["omnirl", "data_sharing"]
PROTOCOLS = {"omnirl": ["own"], "data_sharing": ["train", "iid"]}  # of others: all


@pytest.mark.parametrize("name", NAMES)
def test_script_trains_resumes_and_evaluates(name, tmp_path):
    script = importlib.import_module(name)
    settings = {"env": "point-robot", "device": "cpu", "total_updates": 2, "log_every": 1, "final_episodes": 1}
    settings |= {"save_every": 1, "run_dir": str(tmp_path)}
    settings |= SHORT.get(name, {})
    first = script.train(script.Args(**settings))
    resume = {"resume": first["run_dir"], "total_updates": 3}
    result = script.train(script.Args(**settings | resume))
    tags = [f"eval/{protocol}/return" for protocol in PROTOCOLS.get(name, dc.PROTOCOLS)]
    assert result["step"] == 3 and all(math.isfinite(result[tag]) for tag in tags)
    again = script.train(script.Args(**settings | resume | {"eval_only": True}))
    assert all(again[tag] == value for tag, value in result.items() if tag.startswith(("eval/", "z/")))
    kept = [json.loads(Path(first["run_dir"], file).read_text()) for file in ("result.json", "eval.json")]
    assert kept[0][tags[0]] == kept[1][tags[0]] == result[tags[0]] and kept[1]["step"] == 3
