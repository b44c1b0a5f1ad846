"""experiments/controls.py: rows of one budget, sweeps by one rule, ordinary runs that it reads."""
import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import train

sys.path.insert(0, os.path.join(ROOT, "experiments"))
import controls  # noqa: E402

def config(data_dir, **given):
    return controls.Config(data_dir=data_dir, **given)

@pytest.mark.parametrize("row", [row for row in controls.ROWS if controls.ROWS[row].get("linear") != "dense"])
def test_a_row_has_the_parameters_of_lost_to_a_tenth_of_a_percent(data_dir, row):
    given = config(data_dir)
    budget = controls.count_parameters(controls.build(given, {}))
    count = controls.count_parameters(controls.build(given, controls.matched(given, row)))
    assert 0 <= budget - count <= 0.001 * budget

def test_a_rank_spec_survives_the_command_line(data_dir):
    flags = controls.matched(config(data_dir), "ρ 0.05")
    assert isinstance(flags["rank"], dict)
    again = train.parse(train.Config, [f"--rank={controls.text(flags['rank'])}"])
    assert again["rank"] == flags["rank"]

def test_sltrain_computes_a_dense_product_with_a_sparse_and_a_low_rank_part():
    linear = nn.Linear(12, 20, bias=False)
    layer = controls.SLTrainLinear(linear, 3, 0.1)
    S = torch.zeros(20, 12)
    assert len(set(layer.support.tolist())) == len(layer.values) == 24
    for place, value in zip(layer.support.tolist(), layer.values.tolist(), strict=True):
        S[place // 12, place % 12] = value
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), 0.25 * x @ layer.A.T @ layer.B.T + x @ S.T)

def test_random_factors_get_the_norm_of_the_best_low_rank_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=False))
    sigma = torch.linalg.svdvals(model[0].weight)
    controls.apply_scaled(model, rank=5, sparsity=0.0, gamma=1.0)
    product = model[0].B @ model[0].A
    torch.testing.assert_close(product.norm(), sigma[:5].norm())
    assert not torch.allclose(torch.linalg.svdvals(product)[:5], sigma[:5], rtol=0.01)

def test_sltrain_counts_the_products_of_a_whole_weight(data_dir):
    flops = {row: controls.count_flops(controls.multiplied(config(data_dir), row)) for row in
             ("dense", "SLTrain", "LOST")}
    assert flops["SLTrain"] == flops["dense"] > flops["LOST"]

def test_a_sweep_goes_on_where_its_best_learning_rate_is_at_an_end(monkeypatch, data_dir):
    given = config(data_dir, lrs=(1e-3, 2e-3, 4e-3), widen=4)
    def sweep(best):
        monkeypatch.setattr(controls, "final", lambda config, row, lr: abs(math.log(lr / best)))
        return list(controls.sweep(given, "LOST"))
    assert sweep(2e-3) == [1e-3, 2e-3, 4e-3]
    assert sweep(4e-3) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert sweep(0.5e-3) == [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3]
    assert len(sweep(1e-9)) == 7
    monkeypatch.setattr(controls, "final", lambda config, row, lr: None)
    assert controls.sweep(given, "LOST") == {1e-3: None, 2e-3: None, 4e-3: None}

@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """One small pass of the whole driver: (its flags, what it printed, its folder). At the second learning
    rate everything diverges."""
    out = str(tmp_path_factory.mktemp("controls"))
    flags = [f"--data_dir={data_dir}", f"--out_dir={out}", "--steps=4", "--seeds=2", "--lrs=3e-3,1e30",
             "--widen=0", "--rows=dense/LOST/γ 0.5/SLTrain", "--jobs=2",
             "--extra=--dtype=bfloat16 --batch_tokens=256 --seq_len=32 --eval_tokens=1000 --log_every=1"]
    return flags, driver("run", flags), out

def driver(what, flags):
    script = os.path.join(ROOT, "experiments/controls.py")
    done = subprocess.run([sys.executable, script, what, *flags], text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_the_table_holds_what_the_runs_wrote(finished):
    flags, _, out = finished
    table = driver("table", flags)
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in
            (line.split("|") for line in table.split("Mean ±")[1].split("Inside")[0].splitlines())
            if len(cells) > 3}
    assert table.count("diverged") == 3 and table.count("**") == 6         # of three sweeps of two each
    found = {}
    for row in ("dense", "LOST", "γ 0.5", "SLTrain"):
        losses = []
        for seed in (0, 1):
            with open(os.path.join(out, row, f"0.003-{seed}", "metrics.jsonl"), encoding="utf-8") as f:
                evals = [entry for entry in map(json.loads, f) if entry["kind"] == "eval"]
            losses.append(evals[-1]["val_loss"])
        mean, sd = sum(losses) / 2, abs(losses[0] - losses[1]) / 2 ** 0.5
        assert rows[row][:3] == ["0.003", "2", f"{mean:.3f} ± {sd:.3f}"]
        found[row] = losses
    pairs = [a - b for a, b in zip(found["dense"], found["LOST"], strict=True)]
    assert rows["dense"][3] == f"{sum(pairs) / 2:+.3f} ± {abs(pairs[0] - pairs[1]) / 2 ** 0.5:.3f}"
    assert rows["LOST"][3] == ""

def test_the_same_command_trains_nothing_again_but_a_run_that_is_gone(finished):
    flags, first, out = finished
    assert len(first.splitlines()) == 3 * 2 + 3 + 2        # three sweeps of two, then second seeds and a row
    assert driver("run", flags) == ""
    shutil.rmtree(os.path.join(out, "γ 0.5", "0.003-1"))
    assert driver("run", flags).startswith("γ 0.5, lr 0.003, seed 1: ")

def test_other_flags_in_the_same_folder_are_refused(finished):
    flags, _, _ = finished
    given = {**controls.parse(controls.Config, flags), "steps": 8}
    with pytest.raises(ValueError, match="was trained with --steps 4, not 8: name another --out_dir"):
        controls.run(controls.Config(**given))
    given = {**given, "steps": 4, "extra": given["extra"].replace("bfloat16", "float32")}
    with pytest.raises(ValueError, match="was trained with --dtype bfloat16, not float32"):
        controls.table(controls.Config(**given))

@pytest.mark.parametrize("extra, match", [("--seed=3 --steps 8", "must not set seed, steps"),
                                          ("--batch_token=9", "did you mean --batch_tokens")])
def test_more_flags_than_train_has_or_the_driver_leaves_are_refused(data_dir, extra, match):
    with pytest.raises(ValueError, match=match):
        controls.run(config(data_dir, extra=extra))

def test_more_flags_reach_the_runs_and_change_no_size_of_a_ladder(data_dir):
    given = config(data_dir, extra="--betas=0.8,0.9 --n_layer=5", width=64)
    flags = controls.flags_of(given, "LOST", 1e-3, 0)
    assert controls.text(flags["betas"]) == "0.8,0.9" and flags["n_layer"] == 2

def test_more_flags_count_in_the_budget(data_dir):
    deep, usual = (controls.build(config(data_dir, extra=extra), {}) for extra in ("--n_layer=5", ""))
    assert len(deep.model["layers"]) == len(usual.model["layers"]) + 1

def test_a_driver_told_to_end_stops_its_runs_and_continues_them_later(data_dir, tmp_path):
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--steps=8", "--lrs=3e-3", "--widen=0",
             "--seeds=2", "--rows=dense", "--jobs=1",
             "--extra=--batch_tokens=16384 --seq_len=32 --eval_tokens=1000 --log_every=1"]
    run = subprocess.Popen([sys.executable, controls.SCRIPT, "run", *flags])
    metrics = tmp_path / "dense" / "0.003-0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and run.poll() is None:
        time.sleep(0.1)
    run.terminate()
    assert run.wait(timeout=60) == 143
    found = controls.status(str(metrics.parent))
    assert found["state"] == "stopped" and 0 < found["step"] < 8
    assert len(driver("run", flags).splitlines()) == 2
    steps = [entry["step"] for entry in controls.trained(controls.lines(str(metrics.parent)))]
    assert steps == [*range(1, 9)]

def test_the_fit_finds_a_power_law_with_the_interval_of_linear_regression():
    x = [28, 29, 30, 31.5]
    assert controls.fit(x, [2 - 0.05 * v for v in x]) == pytest.approx((-0.05, 2, 0), abs=1e-9)
    noise = np.random.default_rng(0).normal(size=(4000, 4)) * 0.01
    hits = [abs(slope + 0.05) <= half for slope, _, half in
            (controls.fit(x, [2 - 0.05 * v + e for v, e in zip(x, row, strict=True)]) for row in noise)]
    assert 0.93 < sum(hits) / len(hits) < 0.97             # of 95 % intervals
    assert controls.fit([1, 2], [3, 4])[2] == math.inf

def test_the_ladder_has_a_row_and_a_fit_for_each_size_and_kind(finished):
    flags, _, out = finished
    printed = driver("ladder", [*flags, "--rows=dense/LOST", "--widths=64,128", "--seeds=1"])
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    sizes = [["dense", "64"], ["dense", "128"], ["LOST", "64"], ["LOST", "128"]]
    assert [row[:2] for row in cells if len(row) == 6][2:] == sizes
    assert [row[0] for row in cells if len(row) == 3][2:] == ["dense", "LOST"]
    flops = {tuple(row[:2]): float(row[4]) for row in cells if row[:2] in sizes}
    assert flops["LOST", "64"] < flops["dense", "64"] < flops["LOST", "128"] < flops["dense", "128"]
    assert os.path.getsize(os.path.join(out, "ladder.png")) > 5000

def test_the_curves_of_swept_rows_are_drawn(finished):
    flags, _, out = finished
    figure = controls.plot(controls.Config(**controls.parse(controls.Config, flags)))
    by_tokens, by_flops = ({line.get_label(): line.get_xydata() for line in ax.lines} for ax in figure.axes)
    assert list(by_tokens) == list(by_flops) == ["dense", "LOST", "SLTrain"]
    assert [x for x, _ in by_tokens["LOST"]] == pytest.approx([256e-6, 512e-6, 768e-6, 1024e-6])
    assert by_flops["LOST"][-1][0] < by_flops["dense"][-1][0] == by_flops["SLTrain"][-1][0]
    assert os.path.exists(os.path.join(out, "controls.png"))
