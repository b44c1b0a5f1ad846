"""experiments/compression.py: rows that are made once, and tables of what they lost."""
import json
import os

import pytest

from experiments import runs
from experiments.compression import Config, folder_of, healed, results, run, unhealed
from nanolost.errors import UserError

class Commands:
    """In the place of compress.py, eval.py and train.py: what was typed, and folders as these leave them."""

    def __init__(self):
        self.typed = []
        self.losses = {}

    def __call__(self, program, **flags):
        self.typed.append((program, flags))
        if program == "eval.py":
            return f"loss …\n{json.dumps({'loss': self.losses[flags['ckpt'], flags['data_dir']]})}\n"
        os.makedirs(flags["out_dir"])
        if program == "compress.py":
            report = {"kept": 0.5, "method": "fisher", "form": "lost", "stages": {"compression": 7},
                      "seconds": 9, "peak_memory_bytes": 2e9, "before": {"loss": 3.0},
                      "after": {"loss": 4.5 + flags["seed"]}}
            layers = {"model.layers.0.mlp.up_proj": {"values": 5, "damage": 0.1}}
            for name, content in (("report", report), ("allocation", {"layers": layers})):
                with open(os.path.join(flags["out_dir"], f"{name}.json"), "w") as file:
                    json.dump(content, file)
        return ""

    def count(self, program):
        return sum(name == program for name, _ in self.typed)

@pytest.fixture
def commands(monkeypatch):
    found = Commands()
    monkeypatch.setattr(runs, "output_of", found)
    return found

ROW = "closed loop 50%"

def config_of(tmp_path, **given):
    flags = dict(ckpt="dense", data_dir="mine", out_dir=str(tmp_path / "out"), rows=ROW)
    return Config(**{**flags, **given})

def test_a_row_is_made_once_and_leaves_a_line(commands, tmp_path):
    config = config_of(tmp_path)
    run(config)
    # who writes spaces around the slash means the same
    run(config_of(tmp_path, rows=f"{ROW} / {ROW} "))
    assert commands.count("compress.py") == 1
    (line,) = results(config)
    assert (line["row"], line["loss"], line["dense"]) == (ROW, 4.5, 3.0)
    assert line["layers"] == {"model.layers.0.mlp.up_proj": [5, 0.1]}
    # another seed or another amount of text is another row
    run(config_of(tmp_path, seed=1))
    run(config_of(tmp_path, tokens=100))
    assert commands.count("compress.py") == 3
    assert not os.path.exists(folder_of(config, ROW))

def test_a_kept_model_is_healed_and_measured_by_eval(commands, tmp_path):
    run(config_of(tmp_path, keep=True))
    config = config_of(tmp_path, keep=True, healed=True)
    folder = folder_of(config, ROW)
    commands.losses = {(f"{folder}-healed", "mine"): 3.75}
    run(config)
    # the model was there
    assert commands.count("compress.py") == 1
    (training,) = [flags for program, flags in commands.typed if program == "train.py"]
    assert training["init_from"] == folder and training["steps"] == 100 and training["lr"] == 3e-4
    assert results(config)[1]["loss"] == 3.75
    assert f"| {ROW.replace('%', ' %')} | +1.500 | 100 | +0.750 |" in healed(results(config))

def test_the_dense_model_is_measured_on_the_other_text_once(commands, tmp_path):
    config = config_of(tmp_path, other_dir="other", rows=f"{ROW}/pinned 50%", keep=True)
    for row in (ROW, "pinned 50%"):
        commands.losses[folder_of(config, row), "other"] = 6.0
    commands.losses["dense", "other"] = 5.0
    run(config)
    assert commands.count("eval.py") == 3
    assert [line["other"] - line["other_dense"] for line in results(config)] == [1.0, 1.0]

def test_a_table_has_the_mean_and_the_spread_of_the_seeds(commands, tmp_path):
    for seed in (0, 1, 2):
        run(config_of(tmp_path, seed=seed))
    # 1.5, 2.5, 3.5 above dense
    (line,) = [line for line in unhealed(results(config_of(tmp_path))).splitlines() if "closed loop" in line]
    assert "+2.500 ± 1.000" in line.split("|")[5]

def test_a_command_that_fails_is_told_by_its_last_line():
    with pytest.raises(UserError, match="compress.py --no_such_flag=1 ended with 2: .*no_such_flag"):
        runs.output_of("compress.py", no_such_flag=1)
