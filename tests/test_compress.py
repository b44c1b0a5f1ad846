"""compress.py: a smaller model under one budget, whole or absent, that everything else opens."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small_models import all_logits, largest_difference, small, tokens

import prepare_c4
from compress import Config, main
from lost import LOSTLinear, apply_lost
from nanolost import calibration, checkpoint
from nanolost.checkpoint import load_folder, write_model
from nanolost.covariance import linears
from nanolost.data import TokenDataset
from nanolost.errors import UserError
from nanolost.files import claim
from nanolost.methods import special_layers
from nanolost.tokenizer import Tokenizer

BYTE = Tokenizer.named("byte")

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model whose matrices are far from low rank."""
    folder = str(tmp_path_factory.mktemp("source") / "model")
    write_model(folder, small(n_embd=48, n_ffn=64, n_kv_head=2, max_seq_len=64), BYTE, {})
    return folder

@pytest.fixture
def compressed(source, data_dir, tmp_path):
    """compressed(budget=0.5, …) → the report; the folder is tmp_path / "small"."""
    def make(**given):
        flags = dict(ckpt=source, data_dir=data_dir, out_dir=str(tmp_path / "small"), budget=0.5, seq_len=32,
                     calibration_tokens=2048, loop_tokens=1024, eval_tokens=512, device="cpu", threads=1)
        return main(Config(**{**flags, **given}))
    return make

def read(folder, name):
    with open(os.path.join(folder, name)) as file:
        return json.load(file)

LOW_RANK = [{"method": name} for name in ("fisher", "svdllm", "asvd", "plain", "lost")]
LOW_RANK += [{"pinned": True}, {"closed_loop": False}, {"uniform": True}, {"channels": (0.05,)},
             {"pinned": True, "channels": (0.05,)}, {"one_sided": "q_proj,k_proj"}]
ZEROS = [{"method": name} for name in ("fisher", "walk", "magnitude", "wanda", "sparsegpt", "oats", "cap")]
ZEROS += [{"closed_loop": True}, {"uniform": True}, {"pattern": "2:4"}, {"pattern": "4:8", "method": "walk"},
          {"pattern": "2:4", "method": "wanda"}, {"pattern": "2:4", "method": "sparsegpt"},
          {"pattern": "2:4", "budget": 0.6}, {"pattern": "mixed:8"}, {"factors": True},
          {"factors": True, "pattern": "2:4", "budget": 0.6}]
WAYS = [{"form": "lost", **flags} for flags in LOW_RANK] + [{"form": "sparse", **flags} for flags in ZEROS]
ways = pytest.mark.parametrize("flags", WAYS, ids=lambda flags: " ".join(map(str, flags.values())))

@ways
def test_every_way_meets_the_budget_and_its_folder_holds_what_is_said(flags, compressed, tmp_path):
    report = compressed(**flags)
    folder = report["out_dir"]
    budget = flags.get("budget", 0.5)
    model, _ = load_folder(folder)
    entries = read(folder, "allocation.json")["layers"]
    # never more; not less than a step, of which these small matrices have few
    assert report["kept"] <= budget + 1e-9
    assert report["kept"] > budget - 0.06
    assert set(entries) == set(linears(small(n_embd=48, n_ffn=64, n_kv_head=2)))
    counted = 0
    for name, entry in entries.items():
        layer = model.get_submodule(name)
        parameters = dict(layer.named_parameters())
        zeros = entry["kind"] == "sparse"
        weight = parameters.pop("weight", torch.empty(0))
        values = sum(p.numel() for p in parameters.values())
        values += int(weight.count_nonzero()) if zeros else weight.numel()
        assert values == entry["values"], name
        counted += values
        assert isinstance(layer, LOSTLinear) == (entry["kind"] == "lost")
    assert counted == report["kept_values"]
    assert report["kept"] == pytest.approx(counted / report["matrix_values"])
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    channels = [tensor for tensor in tensors.values() if not tensor.is_floating_point()]
    assert report["index_bytes"] == sum(tensor.nbytes for tensor in channels)

def test_a_budget_of_one_changes_nothing(compressed, source):
    for form in ("lost", "sparse"):
        report = compressed(form=form, budget=1.0, out_dir=f"{source}-{form}")
        before, after = (load_folder(folder)[0] for folder in (source, report["out_dir"]))
        idx = tokens(2, 20)
        assert largest_difference(all_logits(before, idx), all_logits(after, idx)) < 1e-4
        assert report["kept"] == 1

def test_the_loss_that_is_reported_is_that_of_the_folder(compressed, data_dir):
    import eval as evaluation
    report = compressed(budget=0.6)
    found = evaluation.main(evaluation.Config(
        ckpt=report["out_dir"], data_dir=data_dir, seq_len=32, tokens=512, device="cpu"))
    assert found["loss"] == pytest.approx(report["after"]["loss"], abs=1e-6)
    assert found["tokens"] == report["after"]["tokens"]
    assert report["after"]["loss"] > report["before"]["loss"]

@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A folder with a model that has learned something: one of random weights has no direction to spare."""
    model = small(n_embd=48, n_ffn=128, n_head=2, max_seq_len=64)
    model.init_weights(0)
    data = TokenDataset(data_dir, "train", 32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    steps = 1800
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, step / 50) * (1 - step / steps)
        x, y = data.batch((np.arange(16) * 997 + 112 * step) % len(data))
        optimizer.zero_grad()
        model(x, y, loss_only=True)[1].backward()
        optimizer.step()
    folder = str(tmp_path_factory.mktemp("trained") / "model")
    write_model(folder, model, BYTE, {})
    return folder

def test_two_sided_and_global_beats_plain_and_uniform_by_more_than_0_3_nats(trained, compressed, tmp_path):
    losses = {}
    for method in ("fisher", "plain"):
        report = compressed(ckpt=trained, method=method, out_dir=str(tmp_path / method), closed_loop=False,
                            budget=0.4, calibration_tokens=8192, eval_tokens=4096)
        losses[method] = report["after"]["loss"] - report["before"]["loss"]
    assert losses["fisher"] < losses["plain"] - 0.3, losses

def test_zeros_chosen_together_lose_less_than_those_of_each_matrix(trained, compressed, tmp_path):
    losses = {}
    for method in ("fisher", "walk", "wanda", "magnitude"):
        report = compressed(ckpt=trained, method=method, form="sparse", out_dir=str(tmp_path / method),
                            budget=0.3, calibration_tokens=8192, eval_tokens=4096)
        losses[method] = report["after"]["loss"]
    together = max(losses["fisher"], losses["walk"])
    alone = min(losses["wanda"], losses["magnitude"])
    assert together < alone - 0.1, losses

def test_the_same_command_makes_the_same_bytes_and_another_seed_another_text(compressed, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = compressed(out_dir=str(tmp_path / name), seed=seed)
        with open(os.path.join(report["out_dir"], "model.safetensors"), "rb") as file:
            weights.append(file.read())
    assert weights[0] == weights[1] != weights[2]

def test_statistics_are_kept_and_found_again_and_refused_for_another_text(compressed, tmp_path, monkeypatch):
    place = str(tmp_path / "statistics")
    first = compressed(statistics=place, out_dir=str(tmp_path / "a"))
    monkeypatch.setattr(calibration, "collect", None)
    again = compressed(statistics=place, out_dir=str(tmp_path / "b"))
    assert again["after"] == first["after"]
    with pytest.raises(UserError, match="another model, text, seed"):
        compressed(statistics=place, out_dir=str(tmp_path / "c"), seed=3)

def test_statistics_that_cannot_be_used_end_in_one_line(compressed, tmp_path):
    place = str(tmp_path / "statistics")
    compressed(statistics=place, out_dir=str(tmp_path / "a"))
    block = os.path.join(place, "block_000.safetensors")
    os.truncate(block, 500)
    with pytest.raises(UserError, match="block_000.*: remove"):
        compressed(statistics=place)
    os.remove(block)
    with pytest.raises(UserError, match="block_000.*: remove"):
        compressed(statistics=place)
    with pytest.raises(UserError, match="has to be empty"):
        compressed(statistics=str(tmp_path / "small" / "statistics"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="use another --statistics"):
        compressed(statistics=str(tmp_path / "file"))
    with pytest.raises(UserError, match="no folder that you may write"):
        compressed(out_dir=str(tmp_path / "file" / "small"))
    # another process collects there
    with claim(str(tmp_path / "taken"), "collects statistics"):
        with pytest.raises(UserError, match="collects statistics in .* another --statistics"):
            compressed(statistics=str(tmp_path / "taken"))
    assert not os.path.exists(tmp_path / "small")

@pytest.mark.parametrize("form", ("lost", "sparse"))
@pytest.mark.parametrize("size, method", ((1e8, "fisher"), (1e18, "fisher"), (1e30, "magnitude")))
def test_weights_beyond_all_numbers_end_in_one_line(size, method, form, compressed, tmp_path):
    model = small(n_embd=48, n_ffn=64, max_seq_len=64)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight.mul_(size)
    write_model(str(tmp_path / "huge"), model, BYTE, {})
    if form == "lost" and method == "magnitude":
        method = "plain"
    with pytest.raises(UserError, match="beyond float|: the loss is nan: its weights"):
        compressed(ckpt=str(tmp_path / "huge"), form=form, method=method)
    assert os.listdir(tmp_path) == ["huge"]

def test_layers_that_are_cut_one_sided_keep_their_ranks_and_those_alone_change(compressed, tmp_path):
    folders = []
    for name, kinds in (("both", None), ("one", "q_proj,k_proj")):
        report = compressed(closed_loop=False, one_sided=kinds, out_dir=str(tmp_path / name))
        folders.append(report["out_dir"])
    entries = [read(folder, "allocation.json")["layers"] for folder in folders]
    assert entries[0] == entries[1]
    weights = [load_file(os.path.join(folder, "model.safetensors")) for folder in folders]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed
    assert all(".q_proj." in name or ".k_proj." in name for name in changed)

def test_factors_are_balanced(compressed):
    report = compressed(closed_loop=False)
    model, _ = load_folder(report["out_dir"])
    layers = special_layers(model)
    assert layers
    for name, layer in layers.items():
        assert (layer.A.norm() / layer.B.norm()).log().abs() < 0.01, name

@pytest.mark.parametrize("flags", [{"method": "wanda"}, {"method": "sparsegpt"}, {}], ids=str)
def test_a_pattern_keeps_no_more_than_its_share_of_rows_that_it_does_not_divide(flags, compressed, tmp_path):
    write_model(str(tmp_path / "odd"), small(n_embd=40, n_ffn=46, max_seq_len=64), BYTE, {})
    report = compressed(ckpt=str(tmp_path / "odd"), form="sparse", pattern="2:4", **flags)
    assert 0.49 < report["kept"] <= 0.5

# --- sources ---

def test_layers_without_silu_are_merged_and_those_with_it_refused(compressed, tmp_path):
    for activation in ("none", "silu"):
        model = apply_lost(small(n_embd=48, n_ffn=64, max_seq_len=64), 12, 0.1, activation=activation)
        write_model(str(tmp_path / activation), model, BYTE, {})
    report = compressed(ckpt=str(tmp_path / "none"), budget=0.9)
    assert report["kept"] <= 0.9
    with pytest.raises(UserError, match="q_proj cannot be merged"):
        compressed(ckpt=str(tmp_path / "silu"), out_dir=str(tmp_path / "x"))

def test_weights_keep_their_dtype_and_what_travels_travels(compressed, tmp_path):
    travelling = {"generation_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    write_model(str(tmp_path / "half"), small(max_seq_len=64), BYTE, travelling, torch.bfloat16)
    report = compressed(ckpt=str(tmp_path / "half"), form="sparse", method="wanda")
    folder = report["out_dir"]
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, content in travelling.items():
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == content
    # zeros are zeros in every dtype
    zeros = sum(int((t == 0).sum()) for name, t in tensors.items() if "_proj" in name)
    assert zeros >= 0.499 * report["matrix_values"]

def test_windows_are_no_longer_than_the_model_takes(compressed):
    report = compressed(method="plain", seq_len=None)
    assert report["config"]["seq_len"] == 64

# --- what is refused ---

REFUSED = [
    ({"budget": None}, "give --budget"),
    ({"budget": 0.0}, "must be above 0"),
    ({"budget": float("nan")}, "must be above 0"),
    ({"budget": 1.5}, "at most 1"),
    ({"budget": 0.001}, "smallest ranks keep"),
    ({"form": "sparse", "method": "oats", "budget": 0.03}, "one direction of a matrix keeps up to 0.0625"),
    ({"method": "wanda"}, "not of --form lost"),
    ({"form": "sparse", "method": "svdllm"}, "not of --form sparse"),
    ({"form": "sparse", "pinned": True}, "--pinned is of --form lost"),
    ({"pattern": "2:4"}, "--pattern is of --form sparse"),
    ({"method": "plain", "closed_loop": True}, "no metric that a loop"),
    ({"form": "sparse", "method": "wanda", "uniform": False}, "no unit that matrices share"),
    ({"form": "sparse", "method": "wanda", "pattern": "2:4", "budget": 0.7}, "leave matrices dense"),
    ({"form": "sparse", "pattern": "2:4", "budget": 0.4}, "the patterns keep more"),
    ({"form": "sparse", "method": "wanda", "pattern": "mixed:8", "budget": None}, "which know what each"),
    ({"form": "sparse", "factors": True, "uniform": True}, "leave one of the two out"),
    ({"form": "sparse", "factors": True, "method": "wanda"}, "has no low-rank part"),
    ({"form": "sparse", "factors": True, "pattern": "mixed:8"}, "the same for all"),
    ({"one_sided": "head"}, "--one_sided head: choose from"),
    ({"one_sided": "q_proj", "method": "plain"}, "looks at no outputs"),
    ({"gradient_tokens": 4096}, "as many or less"),
    ({"seq_len": 100}, "above the 64 tokens"),
    ({"channels": (2.0,)}, "between 0 and 1"),
    ({"loop_tokens": 0}, "must be positive"),
    ({"seed": 2**70}, "at most 63 bits"),
    ({"out_dir": ""}, "name a folder"),
    ({"threads": 10**6}, "at most 1024"),
]

@pytest.mark.parametrize("flags, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_is_refused_and_leaves_nothing(flags, words, compressed, tmp_path):
    with pytest.raises(UserError, match=words):
        compressed(**flags)
    assert not os.listdir(tmp_path)

def test_an_out_dir_that_is_taken_is_left_alone(compressed, tmp_path):
    os.makedirs(tmp_path / "small")
    (tmp_path / "small" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        compressed()
    assert os.listdir(tmp_path / "small") == ["mine.txt"]

def test_statistics_are_not_put_into_the_model_s_folder(compressed, source):
    before = sorted(os.listdir(source))
    with pytest.raises(UserError, match="the model's own folder"):
        compressed(statistics=os.path.join(source, "."))
    assert sorted(os.listdir(source)) == before

def test_shards_of_another_tokenizer_are_refused(compressed, tmp_path):
    prepare_c4.main(prepare_c4.Config(input=["builtin"], tokenizer="train:300", out_dir=str(tmp_path / "d"),
                                      train_tokens=20_000, val_tokens=2_000, workers=1))
    with pytest.raises(UserError, match="another tokenizer"):
        compressed(data_dir=str(tmp_path / "d"))

def test_weights_that_are_no_numbers_are_refused_by_name(compressed, source, tmp_path):
    import shutil
    broken = str(tmp_path / "broken")
    shutil.copytree(source, broken)
    path = os.path.join(broken, "model.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight has NaN"):
        compressed(ckpt=broken)

def test_too_little_room_for_what_is_kept_meanwhile_is_said_first(compressed, monkeypatch, tmp_path):
    from collections import namedtuple
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(calibration.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(UserError, match="TMPDIR"):
        compressed()
    assert not os.listdir(tmp_path)

def test_a_dry_run_writes_nothing(compressed, tmp_path, capsys):
    compressed(dry_run=True)
    said = capsys.readouterr().out
    assert "memory" in said and "disk" in said
    assert "time        about statistics" in said and "closed loop" in said
    assert not os.listdir(tmp_path)

# --- hard inputs ---

def odd(model):
    """A dead channel, one of 10⁴ times the others, a projection of zeros, weights with many ties."""
    with torch.no_grad():
        block = model.model["layers"][0]
        block.input_layernorm.weight[3] = 0
        block.input_layernorm.weight[5] = 1e4
        block.mlp.down_proj.weight.zero_()
        block.mlp.up_proj.weight.copy_((block.mlp.up_proj.weight * 3).round() / 3)
    return model

ZERO = {"form": "sparse"}
HARD = [{}, {"pinned": True}, {"method": "asvd"}, ZERO, {**ZERO, "method": "walk"},
        {**ZERO, "method": "sparsegpt"}, {**ZERO, "method": "oats"}]

@pytest.mark.parametrize("flags", HARD, ids=lambda flags: " ".join(map(str, flags.values())) or "default")
def test_dead_and_huge_channels_ties_and_few_tokens_leave_finite_weights(flags, compressed, tmp_path):
    write_model(str(tmp_path / "odd"), odd(small(n_embd=48, n_ffn=64, max_seq_len=64)), BYTE, {})
    report = compressed(ckpt=str(tmp_path / "odd"), calibration_tokens=32, loop_tokens=32, **flags)
    assert report["kept"] <= 0.5
    tensors = load_file(os.path.join(report["out_dir"], "model.safetensors"))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # 32 tokens are fewer than 48 inputs
    assert "model.layers.0.self_attn.q_proj" in report["regularised"]

# --- interruptions ---

def test_a_signal_leaves_nothing_behind(source, data_dir, tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    os.makedirs(tmp_path / "tmp")
    argv = [sys.executable, os.path.join(ROOT, "compress.py"), "--ckpt", source, "--data_dir", data_dir,
            "--out_dir", str(tmp_path / "out"), "--budget", "0.5", "--seq_len", "32", "--threads", "1",
            "--calibration_tokens", "400000", "--eval_tokens", "512", "--device", "cpu"]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not any(files for _, _, files in os.walk(tmp_path / "tmp")):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.decode().strip().splitlines()[-1] == "error: interrupted"
    assert not os.listdir(tmp_path / "tmp")
    assert not os.path.exists(tmp_path / "out")
    assert checkpoint.newest_checkpoint(str(tmp_path)) is None
