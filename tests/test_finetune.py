"""finetune.py: every method over one loop; zeros that stay, merged folders, resumes bit for bit."""
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from small_models import all_logits, mixed, small, sparse_of

import finetune
import prepare_c4
import train
from lost import LOSTLinear, apply_lost
from nanolost import adapters, checkpoint, masks, staging
from nanolost.checkpoint import load_folder, write_model
from nanolost.covariance import linears
from nanolost.data import TokenDataset
from nanolost.errors import UserError
from nanolost.tokenizer import Tokenizer
from nanolost.tuning import METHODS, resolve

BYTE = Tokenizer.named("byte")
SIZES = dict(n_embd=32, n_ffn=48, n_kv_head=2, max_seq_len=64)

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("source") / "model")
    write_model(folder, small(**SIZES), BYTE, {})
    return folder

@pytest.fixture
def tuned(source, data_dir, tmp_path):
    """tuned(method="lora", …) → the settings; the run is done."""
    def make(call=finetune.main, **given):
        flags = dict(ckpt=source, data=data_dir, out_dir=str(tmp_path / "out"), seq_len=32, batch_tokens=128,
                     steps=6, eval_every=3, save_every=3, eval_tokens=500, log_every=1, rank=4,
                     calibration_tokens=1024, device="cpu", threads=1)
        method = METHODS[given.get("method") or "lora"]
        if method.update is None:
            del flags["rank"]
        if not method.masks:
            del flags["calibration_tokens"]
        # layers that are their own update get no other
        if given.get("method") == "lost" and "ckpt" in given:
            flags.pop("rank", None)
        config = resolve({**flags, **given})
        call(config)
        return config
    return make

def metrics(config, kind):
    with open(os.path.join(config.out_dir, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if line["kind"] == kind]

def folder_of(config, step=None):
    folders = checkpoint.checkpoints(config.out_dir)
    if step is None:
        return folders[-1]
    return next(folder for folder in folders if checkpoint.step_of(folder) == step)

def zeros_of(folder):
    return adapters.share_of_zeros(load_folder(folder)[0])

# zeros asked for where the method has any
ALL = [pytest.param({"method": name, **({"zeros": 0.5} if method.masks else {})}, id=name)
       for name, method in METHODS.items()]


@pytest.mark.parametrize("flags", ALL)
def test_every_method_trains_and_leaves_a_plain_folder_with_the_zeros_asked_for(tuned, flags):
    config = tuned(**flags)
    losses = [line["val_loss"] for line in metrics(config, "eval")]
    # the dense model is a random one, which refit comes nearer to, not the text
    assert flags["method"] == "refit" or losses[-1] < losses[0]
    model, _ = load_folder(folder_of(config))
    assert all(type(layer) is torch.nn.Linear for layer in linears(model).values())
    if "zeros" in flags:
        assert zeros_of(folder_of(config)) == pytest.approx(0.5, abs=1e-3)

# --- resumes ---

def weights_of(folder):
    found = {}
    for name in ("model", "optimizer", "update"):
        path = os.path.join(folder, f"{name}.safetensors")
        if os.path.exists(path):
            with open(path, "rb") as file:
                found[name] = file.read()
    return found

def told(config):
    """metrics.jsonl without times."""
    with open(os.path.join(config.out_dir, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    timed = ("time", "tokens_per_second", "step_ms", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]

@pytest.mark.parametrize("flags", ALL)
def test_a_run_that_was_cut_ends_with_the_bits_of_one_that_was_not(tuned, tmp_path, flags):
    more = {"steps": 10, "stages": 3} if flags["method"] == "losa" else {}
    straight = tuned(**flags, **more, keep=100)
    folders = checkpoint.checkpoints(straight.out_dir)
    # what a kill leaves: an earlier checkpoint, and lines that come again
    cut = str(tmp_path / "cut")
    shutil.copytree(straight.out_dir, cut)
    for folder in folders[len(folders) // 2:]:
        shutil.rmtree(os.path.join(cut, "checkpoints", os.path.basename(folder)))
    again = tuned(**flags, **more, keep=100, out_dir=cut)
    last = os.path.basename(folders[-1])
    assert weights_of(folder_of(again)) == weights_of(os.path.join(straight.out_dir, "checkpoints", last))
    assert told(again) == told(straight)

@pytest.mark.parametrize("method", ["lora", "masked-lora"])
def test_an_update_in_several_files_goes_on_as_one_in_a_single_file(tuned, tmp_path, monkeypatch, method):
    flags = dict(method=method, **({"zeros": 0.5, "masks": "wanda"} if method == "masked-lora" else {}))
    straight = tuned(**flags)
    monkeypatch.setattr(checkpoint, "LONGEST", 20_000)
    parted = tuned(**flags, out_dir=str(tmp_path / "parted"), keep=100)
    folders = checkpoint.checkpoints(parted.out_dir)
    assert os.path.exists(os.path.join(folders[0], "update.safetensors.index.json"))
    for folder in folders[1:]:
        shutil.rmtree(folder)
    parted = tuned(**flags, out_dir=parted.out_dir, keep=100)
    one, other = (load_folder(folder_of(config))[0].state_dict() for config in (straight, parted))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

def test_a_finished_run_goes_on_when_it_is_given_more_steps(tuned):
    tuned(method="losa", zeros=0.5, steps=10, stages=2)
    config = tuned(method="losa", zeros=0.5, steps=14, stages=2)
    # of a longer run the last stage is longer
    assert [line["step"] for line in metrics(config, "stage")] == [0, 1]
    assert checkpoint.step_of(folder_of(config)) == 14

@pytest.mark.parametrize("flags, steps, message", [
    ({"method": "losa", "steps": 20}, 8, "--steps 8: the last of this run's 5 stages begins after step 8"),
    ({"method": "refit", "steps": 2}, 1, "--steps was 2 for each half"),
    ({"method": "refit", "steps": 2}, 4, "--steps was 2 for each half"),
])
def test_a_length_that_the_stages_forbid_is_refused(tuned, flags, steps, message):
    flags = {**flags, "zeros": 0.5, "masks": "wanda", "save_every": 1, "keep": 100}
    config = tuned(**flags)
    # of a run that has not come to its last stage
    for folder in checkpoint.checkpoints(config.out_dir)[2:]:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=message):
        tuned(**{**flags, "steps": steps})

@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "state.json"])
@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 100)], ids=["gone", "cut"])
def test_a_damaged_checkpoint_is_passed_over(tuned, capsys, name, damage):
    first = tuned(method="lora")
    good, newest = checkpoint.checkpoints(first.out_dir)[-2:]
    damage(os.path.join(newest, name))
    tuned(method="lora")
    output = capsys.readouterr()
    assert f"{newest} is damaged" in output.err
    assert f"continuing from {good}" in output.out

@pytest.mark.parametrize("changed", [{"method": "lora"}, {"zeros": 0.6}, {"masks": "wanda"}, {"rank": 3},
                                     {"alpha": 8.0}, {"seed": 1}, {"seq_len": 16}])
def test_a_resume_with_another_recipe_is_refused(tuned, changed):
    flags = dict(method="masked-lora", zeros=0.5, masks="walk")
    tuned(**flags)
    if changed.get("method"):
        flags = {}
    with pytest.raises(UserError, match="when this run began"):
        tuned(**{**flags, **changed})

# --- zeros ---

def masks_of(folder):
    model, _ = load_folder(folder)
    return {name: layer.weight != 0 for name, layer in linears(model).items()}

@pytest.mark.parametrize("masks", ["wanda", "sparsegpt", "walk", "fisher"])
def test_zeros_only_grow_over_the_stages_of_losa(tuned, masks):
    config = tuned(method="losa", zeros=0.6, masks=masks, steps=8, stages=4, save_every=1, keep=100)
    shares = [line["zeros"] for line in metrics(config, "stage")]
    assert shares == pytest.approx([0.6 * (1 - (1 - t / 4) ** 3) for t in range(1, 5)], abs=2e-3)
    before = None
    for folder in checkpoint.checkpoints(config.out_dir):
        now = masks_of(folder)
        if before is not None:
            for name, mask in now.items():
                assert not (mask & ~before[name]).any()
        before = now
    assert zeros_of(folder) == pytest.approx(0.6, abs=1e-3)

@pytest.mark.parametrize("method", ["masked-lora", "masked-full", "losa"])
def test_a_pattern_holds_in_every_group(tuned, method):
    config = tuned(method=method, pattern="2:4", masks="wanda")
    model, _ = load_folder(folder_of(config))
    for layer in linears(model).values():
        groups = (layer.weight != 0).reshape(layer.out_features, -1, 4).sum(-1)
        assert (groups <= 2).all() and groups.float().mean() == 2

def test_losa_gives_each_block_a_pattern_of_its_own(tuned):
    config = tuned(method="losa", pattern="mixed:8", zeros=0.5, masks="wanda", steps=8, stages=3)
    model, _ = load_folder(folder_of(config))
    found = set()
    for name, layer in linears(model).items():
        groups = (layer.weight != 0).reshape(layer.out_features, -1, 8).sum(-1)
        # one N in the whole block
        assert (groups == groups[0, 0]).all()
        found.add((name.split(".")[2], int(groups[0, 0])))
    assert len(found) == 2 and sum(n for _, n in found) == 8

@pytest.mark.parametrize("flags", [{"rates": "uniform"}, {"ranks": "uniform"}, {"stages": 1}])
def test_each_part_of_losa_can_be_switched_off(tuned, flags):
    config = tuned(**{"method": "losa", "zeros": 0.6, "masks": "wanda", "steps": 8, "stages": 2, **flags})
    stages = metrics(config, "stage")
    assert stages[-1]["zeros"] == pytest.approx(0.6, abs=1e-3)
    assert len(stages) == flags.get("stages", 2)
    if "ranks" in flags:
        assert all(max(line["ranks"]) - min(line["ranks"]) <= 1 for line in stages)
    by_block = [adapters.share_of_zeros(load_folder(folder_of(config))[0])]
    if "rates" in flags:
        model, _ = load_folder(folder_of(config))
        shares = [float((layer.weight == 0).float().mean()) for layer in linears(model).values()]
        assert max(shares) - min(shares) < 0.03 and by_block[0] == pytest.approx(0.6, abs=1e-3)

def test_ranks_may_rise_above_twice_a_small_rank(tuned):
    config = tuned(method="losa", zeros=0.5, masks="wanda", rank=1, steps=10)
    ranks = [line["ranks"] for line in metrics(config, "stage")]
    assert [sum(of_blocks) for of_blocks in ranks] == [2, 2, 2, 4, 6]

def test_wanda_has_as_many_zeros_in_every_row(tuned):
    config = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    for mask in masks_of(folder_of(config)).values():
        assert (mask.sum(1) - mask.shape[1] / 2).abs().max() <= 1

def test_moments_of_zeros_stay_zero(tuned):
    config = tuned(method="masked-full", zeros=0.5)
    weights = load_file(os.path.join(folder_of(config), "model.safetensors"))
    moments = load_file(os.path.join(folder_of(config), "optimizer.safetensors"))
    name = "model.layers.1.mlp.down_proj.weight"
    zero = weights[name] == 0
    for key in ("exp_avg", "exp_avg_sq"):
        moment = moments[f"{name}.{key}"]
        assert (moment[zero] == 0).all() and (moment[~zero] != 0).any()

@pytest.mark.parametrize("method", ["masked-lora", "masked-full"])
def test_a_folder_with_zeros_keeps_them_without_a_word(tuned, method):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    folder = folder_of(first)
    config = tuned(ckpt=folder, method=method, out_dir=first.out_dir + "2")
    for name, mask in masks_of(folder_of(config)).items():
        assert torch.equal(mask, masks_of(folder)[name])

def test_without_a_method_zeros_of_a_folder_choose_one_that_keeps_them(source, data_dir, tmp_path, tuned):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    config = resolve(dict(ckpt=folder_of(first), data=data_dir, out_dir=str(tmp_path / "more"), seq_len=32,
                          batch_tokens=128, steps=2, device="cpu", threads=1, eval_tokens=100))
    finetune.main(config)
    with open(os.path.join(config.out_dir, "config.json")) as file:
        assert json.load(file)["method"] == "masked-lora"
    assert zeros_of(folder_of(config)) == pytest.approx(0.5, abs=1e-3)

@pytest.mark.parametrize("method", ["full", "lora", "lost"])
def test_methods_that_fill_zeros_say_so_first(tuned, capsys, method):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    capsys.readouterr()
    config = tuned(ckpt=folder_of(first), method=method, out_dir=first.out_dir + "2")
    output = capsys.readouterr().out
    assert f"which --method {method} fills" in output.partition("step ")[0]
    assert zeros_of(folder_of(config)) < 0.01

# --- refit ---

def test_refit_brings_the_outputs_nearer_to_those_of_the_dense_model(tuned, source, data_dir):
    flags = dict(method="refit", zeros=0.5, masks="wanda")
    little = tuned(**flags, steps=1, lr=1e-12)
    much = tuned(**flags, steps=30, lr=3e-3, out_dir=little.out_dir + "2", eval_every=1000, save_every=1000)
    idx, _ = TokenDataset(data_dir, "val", 32).batch(range(64))
    dense = all_logits(load_folder(source)[0], idx)
    off = [(all_logits(load_folder(folder_of(config))[0], idx) - dense).norm() for config in (little, much)]
    assert off[1] < 0.95 * off[0], off

def test_refit_of_a_compressed_folder_aims_at_what_it_was_made_of(tuned, source):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    folder = folder_of(first)
    sparse = first.out_dir + "_sparse"
    shutil.copytree(folder, sparse)
    for name in ("state.json", "optimizer.safetensors", "update.safetensors", "manifest.json"):
        os.remove(os.path.join(sparse, name))
    with open(os.path.join(sparse, "report.json"), "w") as file:
        json.dump({"ckpt": source}, file)
    named = tuned(ckpt=sparse, method="refit", steps=2, out_dir=first.out_dir + "2", dense=source)
    found = tuned(ckpt=sparse, method="refit", steps=2, out_dir=first.out_dir + "3")
    assert weights_of(folder_of(named)) == weights_of(folder_of(found))

def test_rows_weigh_the_same_in_a_refit_for_any_micro_batch(tuned, lines):
    found = []
    for micro in (1, 4):
        config = tuned(method="refit", zeros=0.5, masks="wanda", data=str(lines / "train.jsonl"), steps=2,
                       seq_len=None, batch_tokens=4 * 24, micro_batch=micro, out_dir=f"{lines}/by_{micro}")
        found.append([line["loss"] for line in metrics(config, "train")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)

# --- LOST layers ---

@pytest.fixture(scope="module")
def lost_source(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("lost") / "model")
    model = apply_lost(small(**SIZES), 6, 0.1)
    write_model(folder, model, BYTE, {})
    return folder

@pytest.mark.parametrize("method", ["full", "lost"])
def test_a_lost_model_is_tuned_as_it_is(tuned, lost_source, method):
    config = tuned(ckpt=lost_source, method=method, steps=12)
    losses = [line["val_loss"] for line in metrics(config, "eval")]
    assert losses[-1] < losses[0]
    model, _ = load_folder(folder_of(config))
    before, _ = load_folder(lost_source)
    assert all(type(layer) is LOSTLinear for layer in linears(model).values())
    norm = "model.norm.weight"
    same = torch.equal(model.state_dict()[norm], before.state_dict()[norm])
    assert same == (method == "lost")

def test_a_lost_model_is_tuned_by_its_own_factors_unless_told_otherwise(lost_source, data_dir, tmp_path):
    config = resolve(dict(ckpt=lost_source, data=data_dir, out_dir=str(tmp_path / "out"), seq_len=32,
                          batch_tokens=128, steps=1, device="cpu", threads=1, eval_tokens=100))
    finetune.main(config)
    with open(os.path.join(config.out_dir, "config.json")) as file:
        assert json.load(file)["method"] == "lost"

@pytest.mark.parametrize("given", [{"rank": 4}, {"alpha": 4.0}, {"sparsity": 0.0}, {"activation": "silu"}])
def test_a_lost_model_gets_no_new_update(tuned, lost_source, given):
    with pytest.raises(UserError, match=f"--{next(iter(given))} means nothing here"):
        tuned(ckpt=lost_source, method="lost", **given)

@pytest.mark.parametrize("method", ["lora", "masked-lora", "losa"])
def test_silu_between_the_factors_is_refused_where_matrices_are_needed(tuned, lost_source, method):
    with pytest.raises(UserError, match="use --method lost, which trains their factors"):
        tuned(ckpt=lost_source, method=method, **({"zeros": 0.5} if METHODS[method].masks else {}))

@pytest.fixture(scope="module")
def factored_source(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("factored") / "model")
    model = mixed(small(**SIZES), [sparse_of])
    write_model(folder, model, BYTE, {})
    return folder

def test_lost_trains_factors_and_leaves_the_matrix_beside_them_its_zeros(tuned, factored_source):
    config = tuned(ckpt=factored_source, method="lost")
    before = linears(load_folder(factored_source)[0])
    for name, layer in linears(load_folder(folder_of(config))[0]).items():
        assert torch.equal(layer.weight, before[name].weight)
        assert not torch.equal(layer.B, before[name].B)

@pytest.mark.parametrize("method, said", [("full", True), ("lora", True), ("lost", False)])
def test_zeros_beside_factors_are_filled_with_a_word(tuned, factored_source, capsys, method, said):
    tuned(ckpt=factored_source, method=method, steps=1)
    output = capsys.readouterr().out
    assert (f"which --method {method} fills" in output.partition("step ")[0]) == said

@pytest.mark.parametrize("method, where", [("masked-lora", "to_sparse"), ("refit", "to_sparse"),
                                           ("losa", "choose_zeros")])
def test_a_signal_ends_the_choice_of_zeros_and_the_same_command_begins_again(
    tuned, tmp_path, monkeypatch, capsys, method, where
):
    flags = dict(method=method, zeros=0.5, steps=5, out_dir=str(tmp_path / "out"))
    room = {"to_sparse": masks, "choose_zeros": staging}[where]
    choose = getattr(room, where)
    def slow(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        # a choice that takes minutes
        time.sleep(60)
        return choose(*given)
    monkeypatch.setattr(room, where, slow)
    started = time.monotonic()
    config = tuned(**flags)
    assert time.monotonic() - started < 50
    assert "stopped at step 0 by SIGTERM: the same command continues" in capsys.readouterr().out
    assert not checkpoint.checkpoints(config.out_dir)
    monkeypatch.setattr(room, where, choose)
    tuned(**flags)
    whole = tuned(**{**flags, "out_dir": str(tmp_path / "whole")})
    one, other = (load_folder(folder_of(run))[0].state_dict() for run in (config, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)

# --- data ---

@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Prompts with completions to train on, and questions that they answer."""
    home = tmp_path_factory.mktemp("lines")
    pairs = [{"prompt": f"{word} is", "completion": f" {kind}"} for word, kind in KNOWN.items()]
    asked = [{"prompt": f"{word} is", "choices": [" cold", " warm"], "answer": int(kind == "warm")}
             for word, kind in KNOWN.items()]
    for name, entries in (("train.jsonl", pairs * 4), ("asked.jsonl", asked)):
        (home / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return home

KNOWN = {"ice": "cold", "fire": "warm", "snow": "cold", "the sun": "warm", "tea": "warm", "hail": "cold"}

def test_lines_are_learnt_and_questions_about_them_answered(tuned, lines, capsys):
    config = tuned(method="full", data=str(lines / "train.jsonl"), eval=str(lines / "asked.jsonl"), lr=3e-3,
                   seq_len=None, batch_tokens=None, steps=40, eval_every=20, save_every=100)
    found = [line["accuracy"] for line in metrics(config, "accuracy")]
    assert found[0] < 1 and found[-1] == 1.0
    # without shards there is no perplexity
    assert not metrics(config, "eval")
    output = capsys.readouterr().out
    assert "accuracy 1.000 ± 0.000" in output
    assert "rows of 24 tokens; 0 prompts lost their beginning, 0 completions their end" in output

def test_few_lines_are_read_three_times_in_updates_of_sixteen(tuned, lines):
    untyped = dict.fromkeys(("seq_len", "batch_tokens", "steps"))
    config = tuned(method="lora", data=str(lines / "train.jsonl"), **untyped)
    # 24 lines
    with open(os.path.join(config.out_dir, "config.json")) as file:
        chosen = json.load(file)
    assert chosen["steps"] == 5 and chosen["batch_tokens"] == 16 * chosen["seq_len"]

def test_the_last_lines_say_what_loads_where(tuned, capsys):
    config = tuned(method="lora")
    assert f"transformers loads {folder_of(config)}" in capsys.readouterr().out.splitlines()[-1]

def test_the_folder_of_the_model_is_no_place_for_the_run(tuned, source):
    with pytest.raises(UserError, match="is the folder of --ckpt"):
        tuned(method="lora", out_dir=source)

def test_lines_may_be_tuned_on_beside_shards_for_the_loss(tuned, lines, data_dir):
    config = tuned(method="lora", data=str(lines / "train.jsonl"), eval_dir=data_dir, seq_len=None,
                   batch_tokens=None, eval=str(lines / "asked.jsonl"))
    assert [line["step"] for line in metrics(config, "eval")] == [0, 3, 6]
    assert [line["step"] for line in metrics(config, "accuracy")] == [0, 3, 6]

def test_a_resume_evaluates_the_same_windows_beside_lines(tuned, lines, data_dir):
    flags = dict(method="lora", data=str(lines / "train.jsonl"), eval_dir=data_dir, seq_len=None,
                 batch_tokens=None)
    tuned(**flags)
    config = tuned(**flags, steps=9)
    counts = {line["val_tokens"] for line in metrics(config, "eval")}
    assert counts == {SIZES["max_seq_len"] * (500 // SIZES["max_seq_len"])}

@pytest.fixture(scope="module")
def foreign_dir(tmp_path_factory):
    """The built-in text in another vocabulary."""
    folder = str(tmp_path_factory.mktemp("foreign"))
    prepare_c4.main(prepare_c4.Config(input=["builtin"], tokenizer="train:300", out_dir=folder, workers=1))
    return folder

@pytest.mark.parametrize("flag", ["calibration_dir", "eval_dir"])
def test_shards_of_another_tokenizer_are_refused_by_their_name(tuned, foreign_dir, flag):
    with pytest.raises(UserError, match=f"is not the tokenizer that {foreign_dir} was made with"):
        tuned(method="masked-lora", zeros=0.5, masks="wanda", **{flag: foreign_dir})

@pytest.mark.parametrize("flags", [{"method": "masked-lora", "gradient_tokens": 1},
                                   {"method": "losa", "stages": 2, "calibration_tokens": 1}])
def test_less_text_than_a_window_is_a_window(tuned, flags):
    config = tuned(zeros=0.5, masks="fisher", **flags)
    assert zeros_of(folder_of(config)) == pytest.approx(0.5, abs=1e-3)

def test_more_text_than_there_is_asks_for_no_room(tuned, lines):
    config = tuned(method="masked-lora", zeros=0.5, masks="walk", calibration_tokens=10**12, seq_len=None,
                   data=str(lines / "train.jsonl"), batch_tokens=None)
    assert zeros_of(folder_of(config)) == pytest.approx(0.5, abs=1e-3)

# --- what is said ---

def test_a_dry_run_says_what_is_trained_and_writes_nothing(tuned, tmp_path, capsys):
    tuned(method="losa", zeros=0.5, steps=10, dry_run=True)
    output = capsys.readouterr().out
    assert "by --method losa" in output and "50.00% of the blocks' matrices, in 5 stages" in output
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_rounding_to_the_sources_dtype_costs_is_said(tuned, tmp_path, capsys, dtype):
    folder = str(tmp_path / "rounded")
    write_model(folder, small(**SIZES, tie_embeddings=True), BYTE, {}, dtype)
    config = tuned(method="masked-lora", zeros=0.5, masks="wanda", ckpt=folder)
    assert ("rounded to bfloat16" in capsys.readouterr().out) == (dtype == torch.bfloat16)
    # a head that is tied stays tied
    assert load_folder(folder_of(config))[0].config.tie_embeddings

# --- refusals ---

@pytest.mark.parametrize("given, message", [
    ({"method": "masked-lora"}, "needs zeros, and .* has none: give --zeros"),
    ({"method": "lora", "zeros": 0.5}, "--zeros means nothing with --method lora"),
    ({"method": "full", "rank": 4}, "--rank means nothing with --method full"),
    ({"method": "masked-lora", "zeros": 0.5, "stages": 2}, "--stages means nothing"),
    ({"method": "masked-lora", "zeros": 1.5}, "--zeros 1.5: must be a share between 0 and 1"),
    ({"method": "masked-lora", "pattern": "2:4", "zeros": 0.3}, "--pattern 2:4 has 0.5"),
    ({"method": "masked-lora", "zeros": 0.5, "masks": "wanda", "pattern": "mixed:8"}, "use --masks fisher"),
    ({"method": "masked-full", "zeros": 0.5, "optimizer": "muon"}, "would fill the zeros"),
    ({"method": "losa", "zeros": 0.5, "steps": 3}, "--steps 3: --stages 5 need a step each"),
    ({"method": "lora", "seq_len": 128}, "above the 64 tokens"),
    ({"method": "lora", "eval": "nowhere.jsonl"}, "there is no such file"),
    ({"method": "lora", "data": "nowhere"}, "there is no such file"),
    ({"method": "lora", "ckpt": "nowhere"}, "no checkpoint in"),
    ({"method": "lora", "gradient_tokens": 10}, "--gradient_tokens means nothing"),
    ({"method": "masked-lora", "zeros": 0.5, "gradient_tokens": 10_000}, "use as many or less"),
    ({"method": "losa", "zeros": 0.95, "pattern": "mixed:8"}, "use 0.875 or less"),
    ({"method": "lost", "rank": 33}, "--method lost: rank 33 of a 32×32 weight"),
    ({"method": "lost", "rank": 33, "sparsity": 0.0, "activation": "silu"}, "rank 33 of a 32×32 weight"),
    # without a method one is chosen, with which they must mean something
    ({"method": None, "rank": 4, "stages": 2}, "--stages means nothing with --method lora"),
    ({"method": None, "rank": 4, "masks": "wanda"}, "--masks means nothing with --method lora"),
    ({"method": None, "rank": 4, "zeros": 0.5, "sparsity": 0.1}, "--sparsity means nothing"),
    ({"method": None, "rank": 4, "pattern": "mixed:8"}, "give --zeros"),
])
def test_what_cannot_be_is_refused_before_anything_is_written(tuned, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        tuned(**given)
    assert not checkpoint.checkpoints(str(tmp_path / "out"))

@pytest.mark.parametrize("masks", ["wanda", "sparsegpt", "walk", "fisher"])
def test_zeros_of_a_folder_stay_zeros_and_more_are_as_many_as_asked_for(tuned, tmp_path, masks):
    # those of one threshold lie unevenly in rows and matrices
    first = tuned(method="masked-lora", zeros=0.5, masks="fisher")
    more = tuned(ckpt=folder_of(first), method="masked-lora", zeros=0.6, masks=masks,
                 out_dir=str(tmp_path / "more"))
    assert zeros_of(folder_of(more)) == pytest.approx(0.6, abs=1e-3)
    before = masks_of(folder_of(first))
    assert not any((mask & ~before[name]).any() for name, mask in masks_of(folder_of(more)).items())

def test_zeros_are_chosen_by_rows_of_shards_of_any_length_that_the_model_reads(tuned, tmp_path):
    text = tmp_path / "text.jsonl"
    texts = [json.dumps({"text": "a few words for a row " * (2 + i % 3)}) for i in range(200)]
    text.write_text("\n".join(texts))
    for length in (48, 128):
        prepare_c4.main(prepare_c4.Config(input=[str(text)], tokenizer="byte", rows=length, workers=1,
                                          out_dir=str(tmp_path / str(length))))
    flags = dict(method="masked-lora", zeros=0.5, masks="wanda")
    config = tuned(**flags, calibration_dir=str(tmp_path / "48"))
    assert zeros_of(folder_of(config)) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UserError, match="rows of 128 tokens, and the model was made for 64"):
        tuned(**flags, calibration_dir=str(tmp_path / "128"), out_dir=str(tmp_path / "more"))

def test_the_run_of_another_command_is_not_continued(tuned, source, data_dir, tmp_path):
    run = train.resolve(dict(init_from=source, data_dir=data_dir, out_dir=str(tmp_path / "out"), seq_len=32,
                             batch_tokens=128, steps=1, device="cpu", threads=1, eval_tokens=100))
    train.main(run)
    with pytest.raises(UserError, match="belongs to a run of train.py"):
        tuned(method="full")

def test_fewer_zeros_than_a_folder_has_are_refused(tuned):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    with pytest.raises(UserError, match="has 0.5000 already"):
        tuned(ckpt=folder_of(first), method="masked-lora", zeros=0.3, out_dir=first.out_dir + "2")

def test_refit_of_zeros_that_are_there_needs_a_dense_model(tuned):
    first = tuned(method="masked-lora", zeros=0.5, masks="wanda")
    with pytest.raises(UserError, match="name it by --dense"):
        tuned(ckpt=folder_of(first), method="refit", out_dir=first.out_dir + "2")
    assert not os.path.exists(os.path.join(first.out_dir + "2", "status.json"))

def test_a_dense_model_of_other_sizes_is_no_aim(tuned, tmp_path):
    folder = str(tmp_path / "other")
    write_model(folder, small(**{**SIZES, "n_ffn": 64}), BYTE, {})
    with pytest.raises(UserError, match="has other sizes"):
        tuned(method="refit", zeros=0.5, masks="wanda", dense=folder)
