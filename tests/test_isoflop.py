"""experiments/isoflop.py: arms of equal FLOPs, walks of equal length, a queue that many processes share, and
the rule by which a difference counts."""
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import PATIENCE, ROOT

import train
from experiments import answers, arms, gaps, isoflop, layers, stages
from experiments.arms import Config, Trial
from nanolost.errors import UserError
from nanolost.flags import parse
from nanolost.settings import Config as TrainConfig
from nanolost.settings import resolve

TRIAL = Trial("dense", 800, 0.012, 0.048, 0.01, 0.95, 8192, 0)

# --- arms ---

@pytest.mark.parametrize("row", arms.ROWS)
def test_every_arm_has_the_flops_of_its_dense_row_or_its_tokens(row):
    config = Config()
    own = TRIAL._replace(row=row, length=3200)
    dense = own._replace(row=arms.against(row))
    ratio = arms.total_flops(config, own) / arms.total_flops(config, dense)
    if row in arms.EQUAL_TOKENS:
        assert arms.updates(config, own) == 3200 and ratio <= 1
    else:
        assert ratio == pytest.approx(1, abs=2e-4)

@pytest.mark.parametrize("row, flops, count", [
    ("dense", 9.46e6, 1_840_256), ("LOST 128 r 32", 6.63e6, 1_368_384), ("dense 96", 6.64e6, 1_303_392),
    ("LOST 144 r 60", 9.29e6, 1_844_688), ("LOST 160 r 44", 9.18e6, 1_858_592),
    ("LOST 128 r 80", 9.44e6, 1_836_864), ("full rank", 9.29e6, 1_844_688)])
def test_flops_are_counted_from_the_modules(row, flops, count):
    assert arms.flops(Config(), row) == pytest.approx(flops, rel=1e-3)
    assert arms.parameters(Config(), row) == count

@pytest.mark.parametrize("row", ["LOST 144 r 60", "LOST 160 r 44", "LOST 128 r 80", *arms.VARIANTS,
                                 "LOST 88 r 36", "LOST 288 r 132"])
def test_arms_of_equal_width_in_flops_have_the_parameters_of_dense(row):
    dense = arms.parameters(Config(), arms.against(row))
    assert arms.parameters(Config(), row) == pytest.approx(dense, rel=0.015)

def test_a_dense_start_counts_the_flops_of_its_dense_updates():
    wide, started = (arms.flops(Config(), row) for row in ("LOST 144 r 60", "dense start"))
    model = arms.shapes(Config(), {"model": "tiny", "linear": "dense", "n_embd": 144, "n_head": 4,
                                   "n_ffn": 384, "vocab_size": 4096})
    assert started == pytest.approx(0.15 * arms.count_flops(model) + 0.85 * wide)

def test_a_batch_changes_updates_and_not_tokens():
    config = Config()
    twice = TRIAL._replace(batch=16384)
    assert (arms.updates(config, TRIAL), arms.updates(config, twice)) == (800, 400)
    assert arms.total_flops(config, TRIAL) == arms.total_flops(config, twice)

@pytest.mark.parametrize("row", arms.ROWS)
def test_the_command_of_a_run_says_what_its_trial_says(row):
    trial = Trial(row, 200, 0.006, 0.096, 0.05, 0.9, 4096, 3)
    run = arms.run_of(Config(), trial)
    got = resolve(parse(TrainConfig, run.command()[2:]))
    assert (got.lr, got.aux_lr, got.weight_decay, got.seed) == (0.006, 0.096, 0.05, 3)
    assert got.batch_tokens == 4096 and got.steps == arms.updates(Config(), trial)
    assert got.momentum == (0.95 if row in arms.ADAMW else 0.9)
    assert got.optimizer == ("adamw" if row in arms.ADAMW else arms.ROWS[row].get("optimizer", "muon"))
    script = "layers.py" if row == "full rank" or row.startswith("product") else "train.py"
    assert run.command()[1].endswith(script)

@pytest.mark.parametrize("given, match", [
    ({"trials": 0}, "--trials 0"), ({"seeds": 0}, "--seeds 0"), ({"lengths": (200, 100)}, "ascending"),
    ({"lengths": (0.5,)}, "whole"), ({"extra": "--aux_lr=1"}, "must not set aux_lr"),
    ({"extra": "--steps=1 --optimizer=muon"}, "must not set optimizer, steps"),
    ({"rows": "LOTS"}, "choose from dense"), ({"until": "night"}, "--until night: choose one of rates")])
def test_flags_with_which_nothing_would_run_are_refused(given, match):
    with pytest.raises(UserError, match=match):
        stages.check(Config(**given))
    with pytest.raises(UserError, match="--only LOTS"):
        isoflop.Queue(Config(only="LOTS"))

# --- walks ---

def bowl(at):
    return lambda point: float((point[0] - at[0]) ** 2 + 0.5 * (point[1] - at[1]) ** 2)

@pytest.mark.parametrize("at", [(0, 0), (-1, 1), (2, 0), (-1, 2)])
def test_a_walk_ends_bracketed_at_the_best_with_its_number_of_trials(at):
    tried, missing = stages.walk(bowl(at), 12)
    assert len(tried) == 12 and not missing
    assert min(tried, key=tried.get) == at and stages.bracketed(tried)
    # too few steps to get there: it says so
    far, _ = stages.walk(bowl((9, 9)), 12)
    assert len(far) == 12 and not stages.bracketed(far)

def test_what_a_walk_tries_does_not_depend_on_who_is_quicker():
    loss_of = bowl((-2, 1))
    expected, _ = stages.walk(loss_of, 12)
    for seed in range(5):
        order = random.Random(seed)
        known = {}
        while missing := stages.walk(known.get, 12)[1]:
            point = order.choice(missing)
            known[point] = loss_of(point)
        assert known == expected

def made_up(config, loss_of=lambda trial: 4.0):
    """(stage → trials in the order of a queue without company, losses) of the whole queue."""
    found = {}
    done = {}
    while True:
        pending = stages.Stages(config, found).pending()
        stage = next((stage for stage, trials in pending.items() if trials), None)
        if stage is None:
            return done, found
        # all that a stage can do at once
        done.setdefault(stage, []).extend(pending[stage])
        found |= {trial: loss_of(trial) for trial in pending[stage]}

SHORT = dict(lengths=(200, 800, 3200), trials=5, seeds=2)

@pytest.fixture(scope="module")
def whole():
    # wide is the best arm, and 144 before 160; a lower rate is better
    def loss_of(trial):
        arm = 0.1 * ("128" in trial.row) + 0.05 * ("160" in trial.row)
        return 4 + arm + abs(math.log(trial.lr / 0.006))
    return made_up(Config(**SHORT), loss_of)

def test_the_queue_has_its_stages_in_order_and_each_run_once(whole):
    done, found = whole
    assert list(done) == [
        "rates", "seeds", "batch", "full rank", "dense start", "half the size", "product Muon",
        "rates over ranks", "three times the size", "AdamW"]
    trials = [trial for stage in done.values() for trial in stage]
    assert len(set(trials)) == len(trials) == len(found)

def test_every_row_has_as_many_trials_and_dense_and_the_two_best_arms_three_at_the_end(whole):
    trials = whole[0]["rates"]
    def count(row, length):
        return len([one for one in trials if (one.row, one.length) == (row, length)])
    assert {count(row, length) for row in arms.MAIN for length in (200, 800)} == {5 + 4}
    last = {row: count(row, 3200) for row in arms.MAIN}
    assert last == {**dict.fromkeys(arms.MAIN, 1), "dense": 3, "LOST 144 r 60": 3, "LOST 160 r 44": 3}
    lengths = [one.length for one in trials]
    assert lengths == sorted(lengths)

def test_seed_0_chooses_and_other_seeds_compare_at_the_chosen_rates(whole):
    done, found = whole
    assert {trial.seed for trial in done["rates"]} == {0}
    for row in arms.MAIN:
        for length in (200, 800, 3200):
            own = [one for one in done["seeds"] if (one.row, one.length) == (row, length)]
            assert [one.seed for one in own] == [1, 2]
            tried = [one for one in done["rates"] if (one.row, one.length) == (row, length)]
            assert own[0]._replace(seed=0) == min(tried, key=found.get)
    # a seed of all rows before the next
    seeds = [one.seed for one in done["seeds"]]
    assert seeds == sorted(seeds)

def test_other_batches_are_of_dense_and_the_best_arm_on_equal_tokens(whole):
    trials = whole[0]["batch"]
    assert {one.row for one in trials} == {"dense", "LOST 144 r 60"}
    assert {one.batch for one in trials} == {4096, 16384} and {one.length for one in trials} == {800}

def test_the_plan_foresees_as_many_runs_as_come(whole):
    config = Config(**SHORT)
    foreseen = isoflop.foreseen(config, {})
    assert {stage: len(trials) for stage, trials in foreseen.items()} == {
        stage: len(trials) for stage, trials in whole[0].items()}

def test_the_queue_ends_with_the_stage_that_is_named():
    assert list(made_up(Config(**SHORT, until="seeds"))[0]) == ["rates", "seeds"]

def test_core_minutes_are_those_of_the_operations_at_the_speed_that_was_seen():
    config = Config()
    train_flops = 800 * 8192 * 9_461_760
    evaluations = 4 * 600_000 / 3 * 9_461_760
    assert isoflop.minutes(config, TRIAL, 1e12) == pytest.approx((train_flops + evaluations) / 60e12)
    assert isoflop.speed({}) == isoflop.SPEED
    assert isoflop.speed({TRIAL: {"flops": 6e12, "seconds": 3.0}}) == 2e12

# --- the rule ---

def test_a_difference_counts_beyond_two_standard_errors_of_three_pairs_at_least():
    assert gaps.Gap([-0.02, -0.03, -0.025]).counts() and gaps.Gap([0.02, 0.03, 0.025]).counts()
    assert not gaps.Gap([-0.02, 0.03, -0.025]).counts()
    assert not gaps.Gap([-0.02, -0.021]).counts()
    one = gaps.Gap([0.1, 0.2, 0.6])
    assert one.error() == pytest.approx(2 * statistics.stdev(one.pairs) / 3 ** 0.5)

def test_pairs_are_of_one_seed_without_the_one_that_chose_and_flops_that_lack_count():
    own, dense = TRIAL._replace(row="LOST 128 r 80"), TRIAL
    def line(loss, flops=1.0):
        return {"val_loss": loss, "flops": flops}
    found = {dense._replace(seed=seed): line(4.0 + seed) for seed in (0, 1, 2)}
    found |= {own._replace(seed=seed): line(3.9 + seed, math.exp(-0.1)) for seed in (0, 1, 3)}
    found[own._replace(seed=2)] = {"diverged": True, "flops": 1.0}
    # a fall of 0.2 nats for each factor of e: a tenth of that is its own
    assert gaps.gap(found, own, dense, slope=-0.2).pairs == pytest.approx([-0.1 - 0.02])
    assert gaps.gap({}, own, dense, -0.2) is None

def test_slopes_are_those_of_the_curve():
    lengths = [200, 800, 3200]
    x = np.log(lengths)
    assert gaps.slopes(lengths, list(6 - 0.5 * x + 0.02 * x ** 2)) == pytest.approx(list(-0.5 + 0.04 * x))
    assert gaps.slopes([200, 800], [5.0, 5.0 - math.log(4)]) == pytest.approx([-1, -1])
    assert gaps.slopes([200], [5.0]) == [0.0]

def test_a_crossing_lies_on_the_line_between_two_lengths():
    assert gaps.crossing([200, 800, 3200], [-0.1, 0.1, 0.2]) == pytest.approx(400)
    assert gaps.crossing([200, 800], [0.1, 0.2]) is None
    spread = [gaps.Gap([mean - 0.03, mean, mean + 0.03]) for mean in (-0.1, 0.1)]
    middle, earlier, later = gaps.crossing_with_interval([200, 800], spread)
    assert earlier < middle < later and middle == pytest.approx(400)
    assert gaps.crossing_with_interval([200, 800], [gaps.Gap([-1.0]), gaps.Gap([1.0])])[1:] == (None, None)

def test_a_frontier_leaves_out_what_another_reaches_with_fewer_flops_and_its_exponent_is_found():
    found = [gaps.Point("dense", n, 2.0**n, 5 * 2.0 ** (-0.05 * n)) for n in (20, 22, 24, 26)]
    worse = gaps.Point("dense", 0, 2.0**25, 4.0)
    assert gaps.frontier([*found, worse]) == found
    b, half, a = gaps.exponent(found)
    assert (b, half, a) == (pytest.approx(0.05), pytest.approx(0, abs=1e-6), pytest.approx(5))

# --- the term of full rank ---

@pytest.mark.parametrize("row", ["LOST 144 r 60", "LOST 160 r 44", "LOST 128 r 80", "LOST 288 r 132"])
def test_blocks_have_the_parameters_of_the_channels_within_two_percent(row):
    flags = arms.settings(Config(), row)
    lost = arms.shapes(Config(), flags)
    full = arms.shapes(Config(), {**flags, "linear": "fullrank"})
    for name, layer in full.named_modules():
        if isinstance(layer, layers.FullRankLinear):
            own = sum(p.numel() for key, p in layer.named_parameters() if key.startswith("D"))
            channels = lost.get_submodule(name).W_s
            assert own == pytest.approx(channels.numel(), rel=0.02), name

@pytest.mark.parametrize("shape, sparsity", [
    ((20, 12), 0.1), ((12, 20), 0.1), ((20, 12), 0.3), ((7, 30), 0.2)])
def test_the_sum_starts_as_the_blocks_of_the_residual_beside_the_low_rank_part(shape, sparsity, small):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    W = model[0].weight.detach().clone()
    layers.convert_to_full_rank(model, small(linear="fullrank", rank=3, sparsity=sparsity, activation="none"),
                                (0, 1))
    layer = model[0]
    residual = W - layer.low.B @ layer.low.A
    blocks = round(shape[1] / max(1, int(sparsity * shape[1])))
    D = torch.zeros(shape)
    sides = [np.array_split(np.arange(size), blocks) for size in shape]
    for rows, columns in zip(*sides, strict=True):
        for row in rows:
            D[row, columns] = residual[row, columns]
    x = torch.randn(2, 5, shape[1])
    torch.testing.assert_close(layer(x), x @ (0.7 * layer.low.B @ layer.low.A + 0.3 * D).T)
    assert torch.linalg.matrix_rank(0.7 * layer.low.B @ layer.low.A + 0.3 * D) == min(shape)

# --- a whole pass ---

EXTRA = ("--dtype=float32 --compile=false --seq_len=32 --micro_batch=8 --eval_tokens=500 --log_every=1 "
         "--n_layer=1 --vocab_size=257 --threads=1")

def tiny_ladder(data_dir, folder, **given):
    usual = dict(lengths=(2, 4), trials=1, seeds=3, rows="dense/LOST 144 r 60", until="seeds", jobs=1,
                 batch_tokens=256, extra=EXTRA, wait=0.1)
    results = str(folder / "kept" / "results.jsonl")
    return Config(data_dir=data_dir, out_dir=str(folder / "out"), results=results, **{**usual, **given})

def flags_of(config):
    names = ("data_dir", "out_dir", "results", "lengths", "trials", "seeds", "rows", "until", "jobs",
             "batch_tokens", "extra", "wait")
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{name}={text(getattr(config, name))}" for name in names]

@pytest.fixture(scope="module")
def ladder(data_dir, tmp_path_factory):
    """A reduced ladder, its runs in this process: (its flags, the command lines that were made)."""
    config = tiny_ladder(data_dir, tmp_path_factory.mktemp("isoflop"))
    queue = isoflop.Queue(config)
    made = []
    def start(run):
        made.append(run.command()[2:])
        train.main(resolve(parse(TrainConfig, made[-1])))
    queue.start = start
    queue.work()
    return config, made

def test_the_ladder_trains_each_run_once_and_keeps_what_it_wrote(ladder):
    config, made = ladder
    found = gaps.results(config)
    # a walk of one and four beside it, then three rates; three seeds of each length
    assert len(made) == len(found) == 2 * (5 + 3 + 2 * 3)
    for trial, line in found.items():
        with open(arms.run_of(config, trial).path("metrics.jsonl"), encoding="utf-8") as f:
            last = [entry for entry in map(json.loads, f) if entry["kind"] == "eval"][-1]
        assert line["val_loss"] == last["val_loss"]
        assert line["curve"][-1] == [line["updates"], last["val_loss"]]
        assert line["flops"] == line["updates"] * 256 * arms.flops(config, trial.row)
        assert 0 < line["epochs"] < 1 and line["seconds"] > 0

def test_a_finished_queue_trains_nothing_and_a_lost_line_is_made_from_its_run(ladder, capfd):
    config, made = ladder
    isoflop.run(config)
    assert capfd.readouterr().out == "" and len(made) == 28
    kept = list(gaps.results(config).items())
    with open(config.results, encoding="utf-8") as f:
        lines = f.readlines()
    with open(config.results, "w", encoding="utf-8") as f:
        f.writelines(lines[:-1])
    isoflop.run(config)
    again = gaps.results(config)
    assert again.keys() == dict(kept).keys()
    assert again[kept[-1][0]]["val_loss"] == kept[-1][1]["val_loss"]

def cells_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

def test_the_table_holds_gaps_of_paired_seeds_and_the_whole_grid(ladder, tmp_path):
    config, _ = ladder
    text = answers.tables(answers.Answer(config))
    answer = answers.Answer(config)
    row = [cells for cells in cells_of(text) if cells[0] == "LOST 144 r 60" and len(cells) == 7][1]
    own, dense = answer.best("LOST 144 r 60", 4), answer.best("dense", 4)
    slope = answer.slope("dense", 4)
    pairs = []
    for seed in (1, 2, 3):
        a, b = answer.results[own._replace(seed=seed)], answer.results[dense._replace(seed=seed)]
        pairs.append(a["val_loss"] - b["val_loss"] + slope * math.log(b["flops"] / a["flops"]))
    mean, sd = statistics.mean(pairs), statistics.stdev(pairs)
    assert row[5] == f"{mean:+.3f} ± {sd:.3f}" and row[3] == "3"
    assert row[6] == ("yes" if abs(mean) > 2 * sd / 3 ** 0.5 else "no")
    grids = [cells for cells in cells_of(text) if len(cells) == 5 and "→" in cells[4]]
    assert [cells[2] for cells in grids[1:]] == ["5", "5", "3", "3"]
    assert all(cells[4].count("**") == 2 for cells in grids[1:])

def test_table_and_fit_fill_a_page_and_the_figure_is_drawn(ladder, tmp_path, capfd):
    config, _ = ladder
    page = tmp_path / "page.md"
    marks = [f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("isoflop", "isoflop-fit")]
    page.write_text("".join(marks))
    # so few updates do not always help
    better = tmp_path / "results.jsonl"
    lines = list(gaps.results(config).values())
    for line in lines:
        # those of seed 0 have chosen the rates
        if line["seed"]:
            line["val_loss"] = 5 - 0.1 * line["length"] - 0.01 * line["seed"]
    better.write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = Config(**{**vars(config), "results": str(better), "fill": str(page)})
    answers.table(filled)
    answers.fit(filled)
    text = page.read_text()
    assert "| dense |" in text and "| LOST | 2 |" in text and capfd.readouterr().out == ""
    # no table is wider than a page
    assert max(line.count(" | ") for line in text.splitlines()) < 8
    figure = answers.figure(config)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["LOST 144 r 60"] and os.path.getsize(os.path.join(config.out_dir, "isoflop.png")) > 5000

def test_without_a_result_there_is_no_table_and_a_foreign_line_is_named(tmp_path):
    config = Config(results=str(tmp_path / "none.jsonl"))
    for verb in (answers.table, answers.figure, answers.fit):
        with pytest.raises(UserError, match="run first"):
            verb(config)
    (tmp_path / "none.jsonl").write_text('{"row": "dense", "lr": 1}\n')
    with pytest.raises(UserError, match="no result of isoflop.py"):
        gaps.results(config)

def test_several_queues_share_the_runs_and_none_is_made_twice(data_dir, tmp_path, monkeypatch):
    config = tiny_ladder(data_dir, tmp_path, jobs=1, wait=0.01)
    made = []
    def line_of(config, trial, commit):
        return {**trial._asdict(), "val_loss": 4.0, "flops": 1.0}
    def start(self, run):
        made.append(run.folder)
        # long enough for others to want it too
        time.sleep(0.005)
    monkeypatch.setattr(isoflop, "line_of", line_of)
    monkeypatch.setattr(isoflop.Queue, "start", start)
    monkeypatch.setattr(isoflop, "revision", lambda: None)
    # a lock is an open file's, so threads are as good as processes
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: isoflop.Queue(config).work(), range(4)))
    assert len(made) == len(set(made)) == len(gaps.results(config)) == 28

@pytest.mark.slow
def test_two_processes_share_a_queue(data_dir, tmp_path):
    config = tiny_ladder(data_dir, tmp_path, rows="dense", lengths=(2,), until="rates")
    script = os.path.join(ROOT, "experiments/isoflop.py")
    both = [subprocess.Popen([sys.executable, script, "run", *flags_of(config)], text=True, cwd="/",
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines()]
    assert len(lines) == len(set(lines)) == len(gaps.results(config)) == 5
