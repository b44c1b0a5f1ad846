"""experiments/finetuning.py: rows whose commands are taken, runs that are made once, tables of what they
found."""
import json
import os
import sys
import types

import pytest
import torch
from small_models import small

import compress
import eval as evaluation
import finetune
from experiments import benchmarks, clock, finetuning, recipes, runs, sst2
from experiments.clock import plan
from experiments.finetuning import peers, run, tables
from experiments.recipes import ROWS, SHARES, Config, flags_of
from experiments.runs import Key, words_of
from experiments.tuned import Tuned, Tuning, seconds_of
from nanolost import tuning
from nanolost.adapters import share_of_zeros
from nanolost.checkpoint import checkpoint_folder, load_folder, write_model
from nanolost.errors import UserError
from nanolost.estimate import Rates
from nanolost.flags import parse
from nanolost.tokenizer import Tokenizer

MASKED = "masked LoRA on fisher 60%"
SIZES = dict(n_embd=32, n_ffn=48, n_kv_head=2, max_seq_len=128)

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("source") / "model")
    write_model(folder, small(**SIZES), Tokenizer.named("byte"), {})
    return folder

@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    for split, count in (("train", 60), ("dev", 20), ("test", 20)):
        words = ["bad", "good"]
        lines = [f"{words[i % 2]} {i}\t{i % 2}\n" for i in range(count)]
        # nothing has to be cut from what is trained on
        lines.insert(0, "long " * 40 + "\t1\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return str(folder)

def config_of(tmp_path, **given):
    flags = dict(ckpt="dense", data_dir="mine", out_dir=str(tmp_path / "out"), rows=MASKED, jobs=1, widen=0)
    return Config(**{**flags, **given})

# --- commands ---

@pytest.mark.parametrize("row", ROWS)
def test_the_command_of_a_row_is_one_that_finetune_takes(row, tmp_path):
    config = config_of(tmp_path)
    words = Tuned("folder", flags_of(config, Key(row, 1e-4, 1))).command()
    assert words[1].endswith("finetune.py")
    given = tuning.resolve(parse(tuning.Config, words[2:]))
    assert (given.lr, given.seed, given.method) == (1e-4, 1, ROWS[row].recipe.method)
    assert given.steps == (100 if ROWS[row].longer else 30)
    # what a folder has is kept; who chooses zeros says how many
    share = ROWS[row].share
    zeros = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "2:4": None}.get(share)
    assert given.zeros == (zeros if given.method == "losa" else None)
    assert (given.pattern == "2:4") == (given.method == "losa" and share == "2:4")

def test_every_method_tries_three_rates_a_factor_of_three_apart():
    for rates in [*recipes.RATES.values(), *sst2.RATES.values()]:
        assert len(rates) == 3
        assert all(2.9 < high / low < 3.5 for low, high in zip(rates, rates[1:], strict=False))

def test_dense_is_tuned_as_long_as_what_it_stands_beside():
    for share in SHARES:
        row = finetuning.row_of("dense", share)
        assert ROWS[row].longer == ROWS[f"LoSA {share}"].longer

# --- runs that are not made ---

class Commands:
    """In the place of compress.py, eval.py and finetune.py: what was typed, and folders as these leave
    them."""

    def __init__(self):
        self.typed = []
        # of a run, by its row and learning rate; 1 above dense where none is given
        self.ends = {}

    def output_of(self, program, **flags):
        self.typed.append((program, flags))
        if program == "eval.py":
            loss = 3.0 if flags["ckpt"] == "dense" else 3.5
            return f"loss …\n{json.dumps({'loss': loss + (flags['data_dir'] == 'other')})}\n"
        os.makedirs(flags["out_dir"])
        report = {"stages": {"compression": 7}, "after": {"loss": 3.75}}
        with open(os.path.join(flags["out_dir"], "report.json"), "w") as file:
            json.dump(report, file)
        return ""

    def start(self, run):
        self.typed.append(("finetune.py", run.flags))
        row = os.path.basename(os.path.dirname(run.folder))
        end = self.ends.get((row, run.flags["lr"]), 4.0)
        os.makedirs(os.path.join(run.folder, "checkpoints", "step_00000030"))
        lines = [
            {"kind": "stage", "step": 0, "time": 1e10, "zeros": 0.6},
            {"kind": "eval", "step": 0, "time": 1e10 + 2, "val_loss": 3.75},
            {"kind": "train", "step": 30, "time": 1e10 + 12, "tokens": 15360, "peak_memory_bytes": 2e9},
            {"kind": "eval", "step": 30, "time": 1e10 + 14, "val_loss": end},
        ]
        files = {"status.json": {"state": "finished", "reason": ""}, "config.json": run.flags}
        for name, content in files.items():
            with open(run.path(name), "w") as file:
                json.dump(content, file)
        with open(run.path("metrics.jsonl"), "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        os.utime(run.path("config.json"), (1e10 - 1, 1e10 - 1))

    def count(self, program):
        return sum(name == program for name, _ in self.typed)

@pytest.fixture
def commands(monkeypatch):
    found = Commands()
    monkeypatch.setattr(runs, "output_of", found.output_of)
    monkeypatch.setattr(Tuning, "start", lambda self, run: found.start(run))
    monkeypatch.setattr(Tuned, "has_model", lambda run: os.path.exists(run.path("checkpoints")))
    return found

def kept(config):
    """Rows and rates whose models are there."""
    found = set()
    for row in os.listdir(config.out_dir):
        for name in os.listdir(os.path.join(config.out_dir, row)) if row in ROWS else ():
            if os.path.exists(os.path.join(config.out_dir, row, name, "checkpoints")):
                found.add((row, name))
    return found

def test_a_row_is_run_once_and_its_best_rate_alone_is_measured_further(commands, tmp_path):
    commands.ends = {(MASKED, 1e-3): 3.25, (MASKED, 3e-3): 3.5}
    config = config_of(tmp_path, other_dir="other", seeds=2)
    run(config)
    typed = len(commands.typed)
    run(config)
    assert len(commands.typed) == typed
    # three rates, and a second seed of the best
    assert (commands.count("compress.py"), commands.count("finetune.py")) == (1, 4)
    # dense on two texts, and two seeds on the other one
    assert commands.count("eval.py") == 4
    lines = runs.read_lines(os.path.join(config.out_dir, "results.jsonl"))
    best = [line for line in lines if line["lr"] == 1e-3]
    assert [line["seed"] for line in best] == [0, 1]
    assert all((line["dense"], line["other"], line["other_dense"]) == (3.0, 4.5, 4.0) for line in best)
    assert all("dense" not in line for line in lines if line["lr"] != 1e-3)

def test_rows_of_one_start_share_its_zeros(commands, tmp_path):
    refit = "refit on fisher 60%"
    config = config_of(tmp_path, rows=f"{MASKED}/{refit}", statistics="known")
    run(config)
    (making,) = [flags for program, flags in commands.typed if program == "compress.py"]
    assert (making["method"], making["budget"], making["form"]) == ("fisher", 0.4, "sparse")
    assert making["statistics"] == os.path.abspath("known")
    starts = {flags["ckpt"] for program, flags in commands.typed if program == "finetune.py"}
    assert starts == {making["out_dir"]}

def test_losa_by_fisher_finds_statistics_of_its_own_for_every_seed(commands, tmp_path):
    config = config_of(tmp_path, rows="LoSA by fisher 60%", statistics="known", seeds=2)
    run(config)
    collected = [flags["statistics"] for program, flags in commands.typed if program == "compress.py"]
    used = {flags["statistics"] for program, flags in commands.typed if program == "finetune.py"}
    assert len(collected) == 2 and set(collected) == used and os.path.abspath("known") not in used

def test_of_a_share_the_best_model_stays(commands, tmp_path):
    refit, other = "refit on fisher 60%", "masked LoRA on fisher 70%"
    assert refit in peers(MASKED) and other not in peers(MASKED)
    commands.ends = {(MASKED, 1e-3): 3.25, (refit, 5e-5): 3.125, (other, 3e-4): 3.75}
    config = config_of(tmp_path, rows=f"{MASKED}/{other}")
    run(config)
    assert kept(config) == {(MASKED, "0.001-0"), (other, "0.0003-0")}
    run(config_of(tmp_path, rows=refit))
    assert kept(config) == {(refit, "5e-05-0"), (other, "0.0003-0")}
    run(config_of(tmp_path, rows=MASKED))
    # a model that is gone is no reason to make it again
    assert commands.count("finetune.py") == 9

def test_tables_have_nats_above_dense_before_and_after(commands, tmp_path):
    commands.ends = {(MASKED, 1e-3): 3.25, ("dense", 1.5e-5): 2.875}
    config = config_of(tmp_path, other_dir="other", rows=f"{MASKED}/dense")
    run(config)
    found = tables(config_of(tmp_path, rows=None))
    assert set(found) == {"finetuning", "finetuning-other", "finetuning-rates", "finetuning-costs"}
    lines = found["finetuning"].splitlines()
    assert lines[2:5] == [
        "| fisher, untuned |  | +0.750 |  |  |",
        # as long as at 60 %, at 70 % and at 2:4
        "| dense |  | -0.125 | -0.125 | -0.125 |",
        "| masked LoRA on fisher |  | +0.250 |  |  |",
    ]
    assert "| masked LoRA on fisher |  | +0.500 |  |  |" in found["finetuning-other"]
    # which end the best is at is said
    assert "| masked LoRA on fisher |  | 0.001 |  |  |" in found["finetuning-rates"]
    assert "| dense |  | 1.5e-05, the smallest |" in found["finetuning-rates"]
    assert "| masked LoRA on fisher | 60.00 % | 7 | 11 | 2.0 |" in found["finetuning-costs"]

def test_the_figure_has_a_point_for_each_share(commands, tmp_path):
    pytest.importorskip("matplotlib")
    config = config_of(tmp_path, rows=f"{MASKED}/masked LoRA on fisher 70%/masked LoRA on fisher 2:4")
    run(config)
    finetuning.figure(config)
    found = recipes.experiment(finetuning.of_file(config))
    assert finetuning.curve(found, "masked LoRA on fisher", "first") == [(60, 0.75), (70, 0.75)]
    assert os.path.exists(os.path.join(config.out_dir, "finetuning.png"))

def test_tables_without_a_result_are_refused(tmp_path):
    with pytest.raises(UserError, match="run first"):
        finetuning.table(config_of(tmp_path))

def test_the_time_of_a_run_leaves_its_evaluations_out():
    lines = [
        # an evaluation before the zeros, 2 s, then 3 s for the zeros
        {"kind": "stage", "time": 15.0, "dense_loss": 3.0},
        {"kind": "eval", "time": 17.0},
        {"kind": "train", "time": 20.0},
        {"kind": "stage", "time": 24.0},
        {"kind": "train", "time": 30.0},
        {"kind": "eval", "time": 40.0},
    ]
    assert seconds_of(lines, 10.0) == 16.0
    # loaded again in the middle
    assert seconds_of(lines, 21.0) is None

def test_a_plan_counts_what_is_left(commands, source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(clock, "rates_of_a_core", lambda: Rates(1e5, 1e5))
    config = config_of(tmp_path, ckpt=source, rows=f"{MASKED}/LoSA by fisher 60%", seeds=3)
    def left():
        plan(config)
        return [line.split(" | ")[2] for line in capfd.readouterr().out.splitlines() if "60%" in line]
    assert left() == ["5", "5"]
    # zeros are made once
    making = clock.zeros_left(config, [MASKED, "refit on fisher 60%", "LoSA by fisher 60%"])
    assert making == {MASKED: ("fisher", False)}
    run(config_of(tmp_path, ckpt=source))
    capfd.readouterr()
    assert left() == ["2", "5"]

# --- SST-2 ---

def of_reviews(tmp_path, source, reviews, **given):
    flags = dict(ckpt=source, sst2_dir=reviews, sst2_lines=32, sst2_dev=8, sst2_test=11, sst2_tokens=80)
    return config_of(tmp_path, **{**flags, **given})

def test_lines_of_sst2_are_those_that_fit_and_the_majority_is_counted(tmp_path, source, reviews):
    text = sst2.texts(of_reviews(tmp_path, source, reviews))
    lines, questions = (runs.read_lines(path) for path in (text.train, text.test))
    assert len(lines) == 32 and len(questions) == 11
    assert lines[0] == {"prompt": sst2.PROMPT.format("bad 0"), "completion": " negative"}
    assert questions[0]["answer"] == 1 and questions[1]["prompt"] == sst2.PROMPT.format("bad 0")
    # one more of the longest sentence
    assert text.majority == 6 / 11
    with pytest.raises(UserError, match="0 of 32 lines have at most 60 tokens"):
        sst2.texts(of_reviews(tmp_path, source, reviews, sst2_tokens=60))

def test_a_file_that_is_not_sst2_is_refused(tmp_path):
    (tmp_path / "dev.tsv").write_text("a sentence\tgood\n")
    with pytest.raises(UserError, match="dev.tsv: .* is no sentence, tab and 0 or 1"):
        sst2.read(str(tmp_path), "dev")

def test_lora_and_lost_train_as_many_parameters(tmp_path, source, monkeypatch):
    # SmolLM2's layers
    model = small(n_embd=576, n_head=9, n_kv_head=3, n_ffn=1536)
    monkeypatch.setattr(sst2, "shapes", lambda ckpt: model)
    config = config_of(tmp_path, ckpt="SmolLM2")
    low, lost = (sst2.trained(config, f"SST-2, {name}") for name in ("LoRA", "LOST"))
    assert abs(low / lost - 1) <= 0.02

def answers(row, accuracy, lr, seed):
    test = {"accuracy": accuracy, "stderr": 0.1, "questions": 17}
    return {"row": row, "lr": lr, "seed": seed, "dev_error": lr, "trained": 12345, "test": test}

def test_the_table_of_sst2_has_the_standard_error_of_the_questions(tmp_path, source, reviews):
    config = of_reviews(tmp_path, source, reviews, results=str(tmp_path / "results.jsonl"), seeds=2)
    lines = [answers("SST-2, LoRA", accuracy, lr, seed)
             for lr, seed, accuracy in ((3e-4, 0, 0.75), (3e-4, 1, 0.85), (1e-3, 0, 0.5), (3e-3, 0, 0.5))]
    with open(config.results, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    found = sst2.table(config, sst2.experiment(config))
    # √(0.8 · 0.2 / 16)
    assert "| LoRA | 12,345 | 0.0003 | 2 | 80.0 ± 10.0 | 80.0 ± 7.1 |" in found

# --- lm-eval ---

def test_lm_eval_is_asked_once_a_model(tmp_path, monkeypatch):
    asked = []
    def simple_evaluate(**given):
        asked.append(given["model_args"]["pretrained"])
        # on its own it takes CUDA, whether there is any or not
        assert given["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
        known = {"acc,none": 0.5, "acc_stderr,none": 0.05}
        return {"results": {name: known for name in given["tasks"]}}
    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda include_path: include_path
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "local_piqa.yaml").write_text("")
    config = config_of(tmp_path, tasks_dir=str(tmp_path), limit=100)
    for _ in range(2):
        benchmarks.run(config, {"dense": "a", "best": "b"})
    assert asked == ["a", "b"]
    assert "| piqa | 50.0 ± 5.0 | 50.0 ± 5.0 |" in benchmarks.table(config)
    # other questions are others
    assert benchmarks.table(config_of(tmp_path, limit=5)) == ""

# --- real runs ---

MODULES = {"compress.py": compress, "eval.py": evaluation}

@pytest.fixture
def in_process(monkeypatch):
    """Commands run here, without the seconds that a process takes to begin."""
    def output_of(program, **flags):
        module = MODULES[program]
        return json.dumps(module.main(module.Config(**parse(module.Config, words_of(flags)))))
    def start(self, run):
        finetune.main(tuning.resolve(parse(tuning.Config, run.command()[2:])))
    monkeypatch.setattr(runs, "output_of", output_of)
    monkeypatch.setattr(Tuning, "start", start)

def small_runs(tmp_path, source, data_dir, **given):
    flags = dict(ckpt=source, data_dir=data_dir, other_dir=data_dir, eval_tokens=500, tokens=1024, steps=6,
                 lrs=(1e-3,), extra="--seq_len=128 --batch_tokens=128", threads=1)
    return config_of(tmp_path, **{**flags, **given})

def test_a_row_is_made_and_tuned_and_keeps_its_zeros(in_process, tmp_path, source, data_dir):
    config = small_runs(tmp_path, source, data_dir)
    run(config)
    (line,) = runs.read_lines(os.path.join(config.out_dir, "results.jsonl"))
    report = recipes.report_of(config, MASKED)
    # measured by two commands on the same windows
    assert line["dense"] == pytest.approx(report["before"]["loss"], abs=1e-6)
    assert line["first"] == pytest.approx(report["after"]["loss"], abs=1e-6)
    assert line["val_loss"] < line["first"] and line["other"] == pytest.approx(line["val_loss"], abs=1e-6)
    model, _ = load_folder(checkpoint_folder(os.path.join(config.out_dir, MASKED, "0.001-0")))
    assert share_of_zeros(model) == pytest.approx(0.6, abs=1e-3) == line["zeros"]

def test_answers_of_a_row_are_measured_before_and_after(in_process, tmp_path, source, reviews, monkeypatch):
    # of a small model no sizes are alike
    monkeypatch.setattr(sst2, "ALIKE", 0.1)
    config = of_reviews(tmp_path, source, reviews, rows="SST-2, LOST with SiLU", lrs=(3e-2,))
    run(config)
    (line,) = runs.read_lines(os.path.join(config.out_dir, "results.jsonl"))
    assert line["test"]["questions"] == 11 and 0 <= line["dev_error"] <= 1
    made = sst2.experiment(config).run_of(Key("SST-2, LOST with SiLU", 3e-2, 0))
    assert [entry["questions"] for entry in made.records("accuracy")] == [8, 8]
    found = tables(config)["sst2"].splitlines()
    names = [row.split(" | ")[0] for row in found[2:5]]
    assert names == ["| the commonest label", "| untrained", "| LOST with SiLU"]
