"""experiments/: queues of ordinary runs that anything can interrupt, sweeps by one rule, rows of one budget,
and tables that hold what the runs wrote."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import train
from experiments import controls, ladder, layers, runs, tables, tiny
from nanolost import checkpoint
from nanolost.counts import count_parameters
from nanolost.errors import UserError
from nanolost.flags import parse
from nanolost.methods import count_by_path
from nanolost.settings import Config as TrainConfig
from nanolost.settings import resolve

def config(data_dir, **given):
    return controls.Config(data_dir=data_dir, **given)

# --- layers that are controls only ---

def test_sltrain_computes_a_dense_product_with_a_sparse_and_a_low_rank_part():
    layer = layers.SLTrainLinear.from_linear(nn.Linear(12, 20, bias=False), 3, 0.1)
    nn.init.normal_(layer.B)
    S = torch.zeros(20, 12)
    assert len(set(layer.support.tolist())) == len(layer.values) == 24
    for place, value in zip(layer.support.tolist(), layer.values.tolist(), strict=True):
        S[place // 12, place % 12] = value
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), 0.25 * x @ layer.A.T @ layer.B.T + x @ S.T)

def test_sltrain_starts_as_published_with_no_low_rank_part():
    layer = layers.SLTrainLinear.from_linear(nn.Linear(400, 20, bias=False), 3, 0.5)
    assert layer.B.count_nonzero() == 0
    for drawn in (layer.A, layer.values):
        assert 0.045 < drawn.abs().max() <= 400 ** -0.5

def test_random_factors_get_the_norm_of_the_best_low_rank_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=False))
    sigma = torch.linalg.svdvals(model[0].weight)
    given = {"linear": "scaled", "rank": 5, "sparsity": 0.0, "gamma": 1.0}
    layers.convert_to_scaled(model, resolve(given), (0, 1))
    product = model[0].B @ model[0].A
    torch.testing.assert_close(product.norm(), sigma[:5].norm())
    assert not torch.allclose(torch.linalg.svdvals(product)[:5], sigma[:5], rtol=0.01)

@pytest.mark.parametrize("linear", layers.NAMES)
def test_a_kind_of_an_experiment_trains_saves_resumes_and_loads(small, linear):
    straight = small(linear=linear, out_dir=small().out_dir + "-straight")
    train.main(straight)
    half = small(linear=linear, steps=4)
    train.main(half)
    train.main(small(linear=linear, steps=8))
    expected, _ = checkpoint.load_model(straight.out_dir)
    model, _ = checkpoint.load_model(half.out_dir)
    idx = torch.randint(257, (1, 8))
    assert torch.isfinite(model(idx)[0]).all()
    assert count_by_path(model)[0] > 0
    assert model.state_dict().keys() == expected.state_dict().keys()

def test_a_resumed_sltrain_run_equals_the_straight_one_bit_by_bit(small):
    given = dict(linear="sltrain", min_lr_ratio=1.0, warmup=0)
    straight = small(**given, steps=6, out_dir=small().out_dir + "-straight")
    train.main(straight)
    train.main(small(**given, steps=3))
    train.main(small(**given, steps=6))
    expected, _ = checkpoint.load_model(straight.out_dir)
    found, _ = checkpoint.load_model(small().out_dir)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name

# --- a row and its budget ---

@pytest.mark.parametrize("row", [row for row in controls.ROWS if controls.ROWS[row].get("linear") != "dense"])
def test_a_row_has_the_parameters_of_lost_to_a_tenth_of_a_percent(data_dir, row):
    given = config(data_dir)
    budget = count_parameters(controls.build(given, {}))
    count = count_parameters(controls.build(given, controls.matched(given, row)))
    assert 0 <= budget - count <= 0.001 * budget

def test_a_rank_spec_survives_the_command_line(data_dir):
    flags = controls.matched(config(data_dir), "ρ 0.05")
    assert isinstance(flags["rank"], dict)
    again = parse(TrainConfig, [f"--rank={runs.text(flags['rank'])}"])
    assert again["rank"] == flags["rank"]

def test_sltrain_counts_the_products_of_a_whole_weight(data_dir):
    flops = {row: controls.flops(config(data_dir), row) for row in ("dense", "SLTrain", "LOST")}
    assert flops["SLTrain"] == flops["dense"] > flops["LOST"]

def test_a_learned_gamma_at_its_own_rate_differs_from_its_reference_in_nothing_else(data_dir):
    given = config(data_dir)
    flags = controls.flags_of(given, runs.Key("γ learned, aux_lr 0.003", 1.2e-2, 0))
    against = controls.AGAINST["γ learned, aux_lr 0.003"]
    reference = controls.flags_of(given, runs.Key(against, 1.2e-2, 0))
    assert flags["aux_lr"] == 3e-3 and flags["learn_gamma"]
    differs = {name for name in flags.keys() | reference.keys() if flags.get(name) != reference.get(name)}
    assert differs <= {"learn_gamma", "rank"}

@pytest.mark.parametrize("extra, match", [("--seed=3 --steps 8", "must not set seed, steps"),
                                          ("--batch_token=9", "did you mean --batch_tokens")])
def test_more_flags_than_train_has_or_the_driver_leaves_are_refused(data_dir, tmp_path, extra, match):
    for driver in (controls, tiny):
        with pytest.raises(UserError, match=match):
            driver.train(driver.Config(data_dir=data_dir, out_dir=str(tmp_path), extra=extra))

def test_more_flags_reach_the_runs_and_change_no_size_of_a_ladder(data_dir):
    given = config(data_dir, extra="--betas=0.8,0.9 --n_layer=5", width=64)
    flags = controls.flags_of(given, runs.Key("LOST", 1e-3, 0))
    assert runs.text(flags["betas"]) == "0.8,0.9" and flags["n_layer"] == 2

def test_more_flags_count_in_the_budget(data_dir):
    deep, usual = (controls.build(config(data_dir, extra=extra), {}) for extra in ("--n_layer=5", ""))
    assert len(deep.model["layers"]) == len(usual.model["layers"]) + 1

# --- sweeps ---

def made_up(lrs, widen, loss_of, swept=None):
    """An experiment of which every run has the loss loss_of(lr)."""
    given = runs.Settings(lrs=lrs, widen=widen)
    found = runs.Experiment(given, None, swept or {"row": "row"}, lambda row: given.lrs)
    found.loss = lambda key: loss_of(key.lr)
    return found

def test_a_sweep_goes_on_where_its_best_learning_rate_is_at_an_end():
    def sweep(best):
        return list(made_up((1e-3, 2e-3, 4e-3), 4, lambda lr: abs(math.log(lr / best))).sweep("row"))
    assert sweep(2e-3) == [1e-3, 2e-3, 4e-3]
    assert sweep(4e-3) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert sweep(0.5e-3) == [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3]
    assert len(sweep(1e-9)) == 7
    waiting = made_up((1e-3, 2e-3), 4, lambda lr: None)
    assert waiting.sweep("row") == {1e-3: None, 2e-3: None}
    assert waiting.best_lr("row") is None

def test_a_row_without_a_sweep_takes_the_learning_rate_of_the_one_that_it_goes_by():
    found = made_up((1e-3, 2e-3, 4e-3), 0, lambda lr: abs(lr - 2e-3), {"a": "a", "b": "a"})
    assert list(found.sweeps(["b"])) == ["a"]
    assert found.best_lr("b") == 2e-3

# --- a whole pass ---

FAST = "--extra=--dtype=bfloat16 --batch_tokens=256 --seq_len=32 --eval_tokens=1000 --log_every=1"

@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """One small pass of the whole driver: (its flags, what it printed, its folder). At the second learning
    rate everything diverges."""
    out = str(tmp_path_factory.mktemp("controls"))
    flags = [f"--data_dir={data_dir}", f"--out_dir={out}", "--steps=4", "--seeds=2", "--lrs=3e-3,1e30",
             "--widen=0", "--rows=dense/LOST/γ 0.5/SLTrain", "--jobs=2", FAST]
    return flags, driver("controls", "run", flags), out

def driver(name, verb, flags):
    script = os.path.join(ROOT, f"experiments/{name}.py")
    done = subprocess.run([sys.executable, script, verb, *flags], text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout

def given(flags, module=controls, **changed):
    return module.Config(**{**parse(module.Config, flags), **changed})

def cells_of(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]

def test_the_table_holds_what_the_runs_wrote(finished):
    flags, _, out = finished
    table = controls.tables(given(flags))
    rows = {cells[0]: cells[1:] for cells in cells_of(table.split("Mean ±")[1].split("The same runs")[0])}
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
    inside = [cells[0] for cells in cells_of(table.split("Inside")[1])]
    assert inside[2:] == ["LOST", "γ 0.5"]

def test_the_table_of_the_results_is_that_of_the_runs(finished, tmp_path):
    flags, _, out = finished
    kept = str(tmp_path / "results.jsonl")
    shutil.copy(os.path.join(out, "results.jsonl"), kept)
    gone = str(tmp_path / "nothing")
    assert controls.tables(given(flags, out_dir=gone, results=kept)) == controls.tables(given(flags))
    with open(kept, encoding="utf-8") as f:
        first = json.loads(f.readline())
    assert {"row", "lr", "seed", "steps", "commit", "val_loss"} <= first.keys() or first["diverged"]

def test_the_same_command_trains_nothing_again_but_a_run_that_is_gone(finished, capfd):
    flags, first, out = finished
    assert len(first.splitlines()) == 3 * 2 + 3 + 2        # three sweeps of two, then second seeds and a row
    controls.train(given(flags))
    assert capfd.readouterr().out == ""
    lines = len(runs.read_lines(os.path.join(out, "results.jsonl")))
    shutil.rmtree(os.path.join(out, "γ 0.5", "0.003-1"))
    controls.train(given(flags))
    assert capfd.readouterr().out.startswith("γ 0.5, lr 0.003, seed 1: ")
    assert len(runs.read_lines(os.path.join(out, "results.jsonl"))) == lines == 11

def test_other_flags_in_the_same_folder_are_refused(finished):
    flags, _, _ = finished
    with pytest.raises(UserError, match="was trained with --steps 4, not 8: name another --out_dir"):
        controls.train(given(flags, steps=8))
    extra = given(flags).extra.replace("bfloat16", "float32")
    with pytest.raises(UserError, match="was trained with --dtype bfloat16, not float32"):
        controls.tables(given(flags, extra=extra))

def test_a_second_queue_on_the_same_folder_is_refused(finished):
    flags, _, out = finished
    with runs.claim(out, "queues runs"), pytest.raises(UserError, match="queues runs in"):
        controls.train(given(flags))

def test_a_run_that_fails_says_why_in_one_line(data_dir, tmp_path):
    wrong = config(data_dir, out_dir=str(tmp_path), rows="dense", lrs=(3e-3,), widen=0, jobs=1,
                   extra="--micro_batch=7")
    with pytest.raises(UserError, match="--micro_batch 7 does not divide"):
        controls.train(wrong)

def wait_for(path, process):
    while not (path.exists() and path.read_text()) and process.poll() is None:
        time.sleep(0.1)

@pytest.mark.parametrize("number", [signal.SIGTERM,
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_driver_told_to_end_stops_its_runs_and_continues_them_later(data_dir, tmp_path, number):
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--steps=5", "--lrs=3e-3", "--widen=0",
             "--seeds=1", "--rows=dense", "--jobs=1",
             "--extra=--batch_tokens=16384 --seq_len=32 --eval_tokens=1000 --log_every=1"]
    script = os.path.join(ROOT, "experiments/controls.py")
    # a shell's background job ignores Ctrl-C, and hands that on
    run = subprocess.Popen([sys.executable, script, "run", *flags], stderr=subprocess.DEVNULL,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    folder = tmp_path / "dense" / "0.003-0"
    wait_for(folder / "metrics.jsonl", run)
    run.send_signal(number)
    assert run.wait(timeout=300) == (143 if number == signal.SIGTERM else 1)
    one = runs.Run(str(folder), {})
    assert one.status()["state"] == "stopped" and 0 < one.status()["step"] < 5
    assert not one.finished()
    assert len(driver("controls", "run", flags).splitlines()) == 1
    assert [line["step"] for line in one.records("train")] == [*range(1, 6)]

def test_the_curves_of_swept_rows_are_drawn(finished):
    flags, _, out = finished
    figure = controls.plot(given(flags))
    by_tokens, by_flops = ({line.get_label(): line.get_xydata() for line in ax.lines} for ax in figure.axes)
    assert list(by_tokens) == list(by_flops) == ["dense", "LOST", "SLTrain"]
    assert [x for x, _ in by_tokens["LOST"]] == pytest.approx([256e-6, 512e-6, 768e-6, 1024e-6])
    assert by_flops["LOST"][-1][0] < by_flops["dense"][-1][0] == by_flops["SLTrain"][-1][0]
    assert os.path.exists(os.path.join(out, "controls.png"))

# --- the ladder ---

def test_the_fit_finds_a_power_law_with_the_interval_of_linear_regression():
    x = [28, 29, 30, 31.5]
    assert ladder.fit_line(x, [2 - 0.05 * v for v in x]) == pytest.approx((-0.05, 2, 0), abs=1e-9)
    noise = np.random.default_rng(0).normal(size=(4000, 4)) * 0.01
    hits = [abs(slope + 0.05) <= half for slope, _, half in
            (ladder.fit_line(x, [2 - 0.05 * v + e for v, e in zip(x, row, strict=True)]) for row in noise)]
    assert 0.93 < sum(hits) / len(hits) < 0.97             # of 95 % intervals
    assert ladder.fit_line([1, 2], [3, 4])[2] == math.inf

def test_the_ladder_has_a_row_and_a_fit_for_each_size_and_kind(finished, capfd):
    flags, _, out = finished
    climbed = given([*flags, "--rows=dense/LOST", "--widths=64,128", "--lrs=3e-3", "--seeds=1"], ladder)
    ladder.train(climbed)
    assert len(capfd.readouterr().out.splitlines()) == 2   # of width 64: that of 128 is the size's own
    ladder.table(climbed)
    cells = cells_of(capfd.readouterr().out)
    sizes = [["dense", "64"], ["dense", "128"], ["LOST", "64"], ["LOST", "128"]]
    assert [row[:2] for row in cells if len(row) == 6][2:] == sizes
    assert [row[0] for row in cells if len(row) == 3][2:] == ["dense", "LOST"]
    flops = {tuple(row[:2]): float(row[4]) for row in cells if row[:2] in sizes}
    assert flops["LOST", "64"] < flops["dense", "64"] < flops["LOST", "128"] < flops["dense", "128"]
    assert os.path.getsize(os.path.join(out, "ladder.png")) > 5000

@pytest.mark.parametrize("changed, match", [({"width": 64}, "--width means nothing"),
                                            ({"widths": (64, 100)}, "--widths 100: must be a multiple of 32"),
                                            ({"widths": (96,)}, "has no result at width 96")])
def test_a_ladder_refuses_what_it_cannot_climb(finished, changed, match):
    flags, _, _ = finished
    with pytest.raises(UserError, match=match):
        ladder.table(given(flags, ladder, **changed))

# --- tiny ---

def test_tiny_fills_the_table_of_a_document(data_dir, tmp_path, capfd):
    document = tmp_path / "README.md"
    begin, end = tables.markers("tiny")
    document.write_text(f"before\n{begin}old\n{end}after\n")
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", "--steps=2", "--seeds=1",
             "--lrs=3e-3", "--widen=0", "--rows=dense, AdamW/LOST, Muon", "--jobs=2",
             "--extra=--dtype=float32 --compile=false --batch_tokens=256 --micro_batch=8 --seq_len=32 "
             "--eval_tokens=1000 --log_every=1 --n_layer=1"]
    tiny.train(given(flags, tiny))
    assert len(capfd.readouterr().out.splitlines()) == 2
    tiny.table(given(flags, tiny, fill=str(document)))
    assert capfd.readouterr().out == ""
    text = document.read_text()
    assert text.startswith(f"before\n{begin}\n|") and text.endswith(f"|\n\n{end}after\n")
    cells = cells_of(text)
    rows = ["dense, AdamW", "LOST, Muon"]
    assert [row[0] for row in cells if len(row) == 2] == ["", "---", rows[0], "", "---", rows[1]]
    assert [row[0].rpartition(", ")[0] for row in cells if len(row) == 7][2:] == rows

def test_a_row_of_tiny_is_the_recipe_with_another_optimizer(data_dir, tmp_path):
    for row in tiny.ROWS:
        given = tiny.Config(data_dir=data_dir, out_dir=str(tmp_path))
        run = tiny.run_of(given, runs.Key(row, 6e-3, 1))
        resolved = resolve(parse(TrainConfig, run.command()[2:]))
        recipe = tiny.RECIPES["tiny"]
        assert resolved.rank == recipe["rank"] and resolved.steps == recipe["steps"]
        assert (resolved.lr, resolved.seed) == (6e-3, 1)
        assert (resolved.linear, resolved.optimizer) == tuple(tiny.ROWS[row].values())

@pytest.mark.parametrize("show", [tiny.table, tiny.short, controls.table, ladder.table],
                         ids=lambda show: show.__module__ + "." + show.__name__)
def test_a_table_without_any_run_is_refused_and_the_document_stays(data_dir, tmp_path, show):
    page = tmp_path / "page.md"
    pairs = [tables.markers(name) for name in ("tiny", "tiny-short", "controls", "ladder")]
    page.write_text("".join(f"{begin}\n| 4.418 |\n\n{end}" for begin, end in pairs))
    before = page.read_text()
    module = sys.modules[show.__module__]
    for fill in (str(page), None):
        with pytest.raises(UserError, match="run first, with the same flags"):
            show(module.Config(data_dir=data_dir, out_dir=str(tmp_path / "none"), fill=fill))
    assert page.read_text() == before

def test_a_document_does_not_lose_a_row_that_has_no_result(finished, tmp_path):
    flags, _, _ = finished
    page = tmp_path / "page.md"
    page.write_text("".join(tables.markers("controls")))
    before = page.read_text()
    more = given([*flags, "--rows=dense/LOST/CoLA"], fill=str(page))
    with pytest.raises(UserError, match="has no result of CoLA, and --fill would lose"):
        controls.table(more)
    assert page.read_text() == before
    # printed, it is what there is so far
    assert "CoLA" not in controls.tables(given([*flags, "--rows=dense/LOST/CoLA"])).split("Mean")[1]

# --- tables ---

def test_a_mean_has_the_deviation_of_a_sample():
    assert tables.spread([1.0, 3.0], "+.2f") == "+2.00 ± 1.41"
    assert tables.spread([1.0], ".1f") == "1.0"

def test_filling_twice_leaves_one_table_and_the_rest_of_the_document(tmp_path):
    path = tmp_path / "page.md"
    begin, end = tables.markers("x")
    path.write_text(f"a\n{begin}{end}b\n")
    for text in ("| 1 |\n", "| 2 |\n"):
        tables.fill(str(path), "x", text)
        assert path.read_text() == f"a\n{begin}\n{text}\n{end}b\n"

@pytest.mark.parametrize("content", ["", "{begin}", "{end}{begin}", "{begin}{end}{begin}{end}"])
def test_a_document_without_one_pair_of_markers_is_refused_and_stays(tmp_path, content):
    begin, end = tables.markers("x")
    path = tmp_path / "page.md"
    path.write_text(content.format(begin=begin, end=end))
    before = path.read_text()
    with pytest.raises(UserError, match="<!-- begin x -->"):
        tables.fill(str(path), "x", "| 1 |")
    assert path.read_text() == before

# --- what a run left ---

def test_a_last_line_that_a_kill_cut_is_left_out_and_any_other_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert runs.read_lines(str(path)) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match="not JSON"):
        runs.read_lines(str(path))

@pytest.mark.parametrize("flag, value", [("steps", 0), ("seeds", 0), ("jobs", 0), ("widen", -1),
                                         ("lrs", (1e-3, 0.0))])
def test_numbers_with_which_nothing_would_run_are_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag}"):
        runs.check(runs.Settings(**{flag: value}))

def test_an_unknown_verb_or_row_is_refused_by_name(data_dir):
    script = os.path.join(ROOT, "experiments/tiny.py")
    done = subprocess.run([sys.executable, script, "walk"], text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr == "error: unknown walk: use run, table, short or --help\n"
    with pytest.raises(UserError, match="--rows LOTS: choose from dense/"):
        controls.train(config(data_dir, rows="LOST/LOTS"))
