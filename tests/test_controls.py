"""The driver of runs/controls.sh: rows of one budget, sweeps by one rule, ordinary runs that it reads."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import train

sys.path.insert(0, os.path.join(ROOT, "runs"))
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
    """One small pass of the whole driver: the flags of the command, and how often train.py ran."""
    out = str(tmp_path_factory.mktemp("controls"))
    flags = [f"--data_dir={data_dir}", f"--out_dir={out}", "--steps=4", "--seeds=2", "--lrs=3e-3,3e-2",
             "--widen=0", "--rows=dense/LOST/γ 0.5/SLTrain", "--jobs=2",
             "--extra=--dtype=bfloat16 --batch_tokens=256 --seq_len=32 --eval_tokens=1000 --log_every=1"]
    return flags, driver("run", flags), out

def driver(what, flags):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "runs/controls.py"), what, *flags], text=True,
                          capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_the_table_holds_what_the_runs_wrote(finished):
    flags, _, out = finished
    given = controls.Config(**controls.parse(controls.Config, flags))
    table = driver("table", flags)
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in
            (line.split("|") for line in table.split("At the best")[1].split("LOST layers")[0].splitlines())
            if len(cells) > 3}
    for row in ("dense", "LOST", "γ 0.5", "SLTrain"):
        lr = controls.best_lr(given, controls.FAMILY[row])
        losses = []
        for seed in (0, 1):
            with open(os.path.join(out, row, f"{lr:g}-{seed}", "metrics.jsonl"), encoding="utf-8") as f:
                evals = [entry for entry in map(json.loads, f) if entry["kind"] == "eval"]
            losses.append(evals[-1]["val_loss"])
        mean, sd = sum(losses) / 2, abs(losses[0] - losses[1]) / 2 ** 0.5
        assert rows[row][:3] == [f"{lr:g}", "2", f"{mean:.3f} ± {sd:.3f}"]
    assert rows["LOST"][3] == "" and "±" in rows["γ 0.5"][3]

def test_the_same_command_trains_nothing_again_and_a_lost_run_only(finished):
    flags, first, out = finished
    assert len(first.splitlines()) == 3 * 2 + 3 + 2        # three sweeps of two, then second seeds and a row
    assert driver("run", flags) == ""
    os.remove(os.path.join(out, "γ 0.5", os.listdir(os.path.join(out, "γ 0.5"))[0], "status.json"))
    assert len(driver("run", flags).splitlines()) == 1

def test_the_fit_finds_a_power_law_and_its_interval_grows_with_the_noise():
    def points(noise):
        return [[(x, 2 - 0.05 * x + noise * n) for n in (-1, 0.3, 0.7)] for x in (28, 29, 30, 31.5)]
    slope, fixed, low, high = controls.fit(points(0))
    assert (slope, fixed, low, high) == pytest.approx((-0.05, 2, -0.05, -0.05))
    small, large = controls.fit(points(0.001)), controls.fit(points(0.01))
    assert small[2] < -0.05 < small[3] and large[3] - large[2] > 5 * (small[3] - small[2])

def test_the_ladder_has_a_row_and_a_fit_for_each_size_and_kind(finished):
    flags, _, out = finished
    printed = driver("ladder", [*flags, "--rows=dense/LOST", "--widths=64,128", "--seeds=1"])
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    sizes = [["dense", "64"], ["dense", "128"], ["LOST", "64"], ["LOST", "128"]]
    assert [row[:2] for row in cells if len(row) == 6][2:] == sizes
    assert [row[0] for row in cells if len(row) == 4][2:] == ["dense", "LOST"]
    assert os.path.getsize(os.path.join(out, "ladder.png")) > 5000

def test_the_curves_are_drawn(finished):
    flags, _, out = finished
    driver("plot", flags)
    assert os.path.getsize(os.path.join(out, "controls.png")) > 5000
