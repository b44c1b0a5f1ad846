"""The trainer: exactness of resuming, of splitting a batch and of evaluation, its files, its refusals."""
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags_of, launch, status

import train
from model import Llama, LlamaConfig
from nanolost import checkpoint, data
from nanolost.checkpoint import load_model
from nanolost.tokenizer import Tokenizer

def lines(config, kind="train"):
    with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
        return [entry for entry in map(json.loads, f) if entry["kind"] == kind]

def losses(config):
    return [(entry["step"], entry["loss"]) for entry in lines(config)]

def files_of(config, step):
    folder = os.path.join(config.out_dir, "checkpoints", f"step_{step:08d}")
    return {name: open(os.path.join(folder, name), "rb").read()
            for name in ("model.safetensors", "optimizer.safetensors")}

# --- the same run, however it is interrupted or split ---

@pytest.mark.parametrize("switches", [
    {}, dict(linear="dense"), dict(learn_gamma=True, n_kv_head=1, tie_embeddings=True),
    dict(optimizer="muon"), dict(dtype="bfloat16"),
], ids=["lost", "dense", "learned-gamma", "muon", "bfloat16"])
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(small, switches, tmp_path):
    straight = small(**switches)
    train.main(straight)
    resumed = small(**switches, out_dir=str(tmp_path / "resumed"))
    shutil.copytree(straight.out_dir, resumed.out_dir)
    shutil.rmtree(os.path.join(resumed.out_dir, "checkpoints", "step_00000008"))
    train.main(resumed)
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 8
    assert lines(resumed, "eval") == lines(straight, "eval")
    assert files_of(resumed, 8) == files_of(straight, 8)

def test_two_processes_and_any_split_of_a_batch_give_the_losses_of_one(small, tmp_path):
    def run(name, processes=1, **given):
        config = small(out_dir=str(tmp_path / name), **given)
        if processes > 1:
            process = launch(config, processes)
            output = process.communicate()[0]
            assert process.returncode == 0, output
        else:
            train.main(config)
        return [loss for _, loss in losses(config)] + [entry["val_loss"] for entry in lines(config, "eval")]
    whole = run("1 × 8", micro_batch=8)
    assert run("4 × 2", micro_batch=2) == pytest.approx(whole, rel=1e-5)
    assert run("8 × 1", micro_batch=1) == pytest.approx(whole, rel=1e-5)
    assert run("world 2", processes=2, micro_batch=2) == pytest.approx(whole, rel=1e-5)

def test_accumulated_gradients_equal_those_of_the_whole_batch(small):
    model = train.build_model(small(vocab_size=257), "cpu")
    x, y = torch.randint(257, (2, 4, 32))
    gradients = []
    for micro in (4, 2, 1):
        flat = train.flat_gradients(model)
        for a, b in zip(x.split(micro), y.split(micro), strict=True):
            (model(a, b)[1] * micro / 4).backward()
        gradients.append(flat.clone())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
    assert (gradients[0] - gradients[2]).norm() <= 1e-5 * gradients[0].norm()

def test_a_process_reads_only_its_share_and_all_together_read_the_order_once(small, monkeypatch):
    read = []
    batch = data.TokenDataset.batch
    def spy(self, samples, *device):
        if isinstance(samples, np.ndarray) and "train" in self.paths[0]:
            read.extend(samples.tolist())
        return batch(self, samples, *device)
    monkeypatch.setattr(data.TokenDataset, "batch", spy)
    config = small(micro_batch=2)
    train.main(config)
    dataset = data.TokenDataset(config.data_dir, "train", 32)
    assert read == data.SampleOrder(len(dataset), config.seed)[np.arange(8 * 8)].tolist()

def test_evaluation_does_not_move_training(small, tmp_path):
    often, seldom = small(eval_every=1), small(eval_every=8, out_dir=str(tmp_path / "seldom"))
    train.main(often)
    train.main(seldom)
    assert losses(often) == losses(seldom) and files_of(often, 8) == files_of(seldom, 8)
    assert len(lines(often, "eval")) == 8 and len(lines(seldom, "eval")) == 1

def test_compiled_training_keeps_names_and_losses(small, tmp_path):
    eager, compiled = small(steps=3), small(steps=3, compile="true", out_dir=str(tmp_path / "compiled"))
    train.main(eager)
    train.main(compiled)
    assert [x for _, x in losses(compiled)] == pytest.approx([x for _, x in losses(eager)], rel=1e-5)
    ours, theirs = (load_model(c.out_dir)[0].state_dict() for c in (eager, compiled))
    assert ours.keys() == theirs.keys()

def test_training_and_evaluation_compile_one_whole_graph_each_and_never_again(small):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train.main(small(compile="true", dtype="bfloat16", steps=6, eval_every=2, micro_batch=2, eval_tokens=300))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2

def test_recomputing_changes_no_bit_of_a_run(small, tmp_path):
    straight, again = small(), small(recompute=True, out_dir=str(tmp_path / "again"))
    train.main(straight)
    train.main(again)
    assert losses(again) == losses(straight) and files_of(again, 8) == files_of(straight, 8)

# --- evaluation and schedule ---

@pytest.mark.parametrize("micro", [1, 3, 7])
def test_evaluation_is_the_mean_over_all_tokens_for_any_micro_batch(data_dir, micro):
    dataset = data.TokenDataset(data_dir, "val", 32)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24))
    token_bytes = torch.tensor([1] * 256 + [0])
    result = train.evaluate(model, dataset, 10, micro, token_bytes, torch.autocast("cpu", enabled=False),
                            torch.device("cpu"))
    x, y = dataset.batch(range(10))
    with torch.no_grad():
        nats = F.cross_entropy(model(x, y)[0].double().flatten(0, 1), y.flatten(), reduction="sum").item()
    assert result["val_tokens"] == 320 and result["val_loss"] == pytest.approx(nats / 320, rel=1e-6)
    assert result["val_ppl"] == pytest.approx(math.exp(nats / 320), rel=1e-5)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / (y != 256).sum().item(), rel=1e-6)

def test_the_learning_rate_warms_up_and_falls_as_a_cosine_to_its_floor(small):
    config = small(steps=100, warmup=10, lr=1.0, min_lr_ratio=0.1)
    rates = [train.lr_at(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))

# --- flags and sizes ---

def test_a_size_brings_its_recipe_and_each_value_can_be_overridden():
    config = train.resolve({"model": "350m", "lr": 1e-4, "linear": "cola"})
    assert (config.n_embd, config.rank, config.steps, config.lr) == (1024, 256, 60_000, 1e-4)
    assert (config.sparsity, config.gamma, config.init, config.activation) == (0.0, 1.0, "random", "silu")
    assert train.resolve({"linear": "lowrank", "init": "svd"}).init == "svd"
    assert train.resolve({"model": "tiny"}).optimizer == "muon" != train.resolve({}).optimizer
    assert (train.resolve({}).warmup, train.resolve({"steps": 500}).warmup) == (1000, 50)

@pytest.mark.parametrize("given, message", [
    (dict(linear="dense", rank=8), "--rank means nothing"), (dict(steps=0), "--steps 0: must be positive"),
    (dict(warmup=9), "--warmup 9: must lie between 0 and --steps 8"), (dict(init_std=0.0), "--init_std 0.0"),
    (dict(lr=-1.0), "--lr -1.0: must be positive"), (dict(betas=(0.9, 1.0)), r"--betas \(0.9, 1.0\): must"),
    (dict(grad_clip=-1.0), "--grad_clip -1.0: must not be"), (dict(n_head=0), "--n_head 0: must be"),
    (dict(n_kv_head=0), "--n_kv_head 0: must be"), (dict(timeout=0), "--timeout 0: must be positive"),
    (dict(min_lr_ratio=2.0), "--min_lr_ratio 2.0: must lie"), (dict(weight_decay=-0.1), "--weight_decay -0"),
    (dict(gamma=1.0), "--gamma 1.0: one of the two paths would never"), (dict(gamma=0.0), "--gamma 0.0"),
    (dict(linear="cola", sparsity=0.1), "or 1 with --sparsity 0"),
    (dict(spike=0.5), "--spike 0.5: must be above 1"), (dict(spike=-2.0), "--spike -2.0: must be above 1"),
    (dict(batch_tokens=250), r"use \[224, 256\]"), (dict(micro_batch=3), r"use one of \[1, 2, 4, 8\]"),
    (dict(rank=100), "q_proj: rank 100 of a 32×32 weight"), (dict(data_dir="nowhere"), "run prepare_c4.py"),
    (dict(vocab_size=100), "below the tokenizer's 257"),
    (dict(seq_len=10**6, batch_tokens=10**6), "fewer than 1000001"), (dict(device="mps"), "--device mps"),
])
def test_what_cannot_be_is_refused_with_the_repair(small, given, message):
    with pytest.raises(ValueError, match=message):
        train.main(small(**given))

PUBLISHED = {                                  # millions for 32 000 tokens: dense, low-rank, ρ = 0.01
    "60m": (58.07, 42.77, 0.25), "130m": (134.11, 94.00, 0.78), "350m": (367.97, 185.22, 2.96),
    "1b": (1339.08, 609.31, 11.83), "7b": (6738.42, 2820.94, None),
}

@pytest.mark.parametrize("size", PUBLISHED)
def test_dry_run_prints_the_published_parameter_counts(size, capsys):
    def parameters(**given):
        train.main(train.resolve(dict(model=size, vocab_size=32_000, dry_run=True, device="cpu", **given)))
        words = capsys.readouterr().out.split("\n")[0].replace(",", "").split()
        return [int(word) / 1e6 for word in words if word.isdigit()]       # total, low-rank, sparse, dense
    dense, low_rank, sparse = PUBLISHED[size]
    assert round(parameters(linear="dense")[0], 2) == dense
    assert round(parameters(linear="lowrank")[0], 2) == low_rank
    total, _, extra, _ = parameters(sparsity=0.01)
    assert sparse is None or extra == pytest.approx(sparse, abs=0.0065)    # a difference of rounded numbers
    assert total == pytest.approx(low_rank + extra, abs=0.006)

def test_dry_run_counts_the_bytes_that_a_checkpoint_has(small, capsys):
    config = small(learn_gamma=True, optimizer="muon", n_embd=128, n_ffn=344)
    train.main(config)
    stored = sum(len(content) for content in files_of(config, 8).values())
    config.dry_run = True
    capsys.readouterr()
    train.main(config)
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("checkpoint"))
    assert int(row.split()[1].replace(",", "")) == pytest.approx(stored, rel=0.02)

# --- optimizer ---

def test_each_parameter_is_in_one_group_and_only_matrices_decay(small):
    for optimizer in ("adamw", "muon"):
        model = train.build_model(small(vocab_size=257, learn_gamma=True), "cpu")
        optimizers = train.build_optimizers(model, small(optimizer=optimizer))
        groups = [group for o in optimizers for group in o.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
        assert all((g["weight_decay"] > 0) == (p.dim() == 2) for g in groups for p in g["params"])
    assert {name for name, p in model.named_parameters() if any(p is q for q in groups[-1]["params"])} == {
        name for name, p in model.named_parameters() if name.startswith("model.layers.") and p.dim() == 2}

@pytest.mark.parametrize("switches", [
    dict(linear="lost"), dict(linear="dense"), dict(linear="lowrank"), dict(linear="cola"),
    dict(optimizer="muon"), dict(rank={"q_proj": 4, "default": 8}, sparsity={"down_proj": 0.1, "default": 0}),
], ids=str)
def test_every_kind_of_layer_learns(small, switches):
    config = small(steps=30, lr=1e-2, **switches)
    train.main(config)
    first, last = losses(config)[0][1], losses(config)[-1][1]
    assert abs(first - math.log(257)) < 0.1 and last < first - 1.5

def test_clipping_comes_after_the_sum_over_micro_batches(small, tmp_path):
    whole = small(micro_batch=8, grad_clip=0.01)
    split = small(micro_batch=1, grad_clip=0.01, out_dir=str(tmp_path / "split"))
    train.main(whole)
    train.main(split)
    norms = [entry["grad_norm"] for entry in lines(whole)]
    assert [entry["grad_norm"] for entry in lines(split)] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.01                   # the norm before clipping

def test_the_optimizer_sees_the_clipped_gradient(small, monkeypatch):
    seen, real = [], torch.optim.AdamW.step
    def step(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat(gradients).norm().item())
        return real(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train.main(small(grad_clip=0.01))
    assert seen == pytest.approx([0.01] * 8, rel=1e-4)

# --- files ---

def test_the_files_of_a_run_hold_what_they_promise(small):
    config = small(log_every=3)
    train.main(config)
    assert [e["step"] for e in lines(config)] == [3, 6, 8]
    assert [e["step"] for e in lines(config, "eval")] == [4, 8]
    assert set(lines(config)[0]) == {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second",
                                     "step_ms", "mfu", "peak_memory_bytes"}
    assert set(lines(config, "eval")[0]) == {"kind", "step", "val_loss", "val_ppl", "val_bpb", "val_tokens",
                                             "layers"}
    assert lines(config)[-1]["tokens"] == 8 * 256 and lines(config)[0]["mfu"] is None
    assert status(config) == {"state": "finished", "step": 8, "reason": ""}
    with open(os.path.join(config.out_dir, "config.json"), encoding="utf-8") as f:
        found = {"tokenizer": os.path.join(config.data_dir, "tokenizer.json"), "vocab_size": 257,
                 "micro_batch": 8, "dtype": "float32", "compile": "false"}
        assert json.load(f) == json.loads(json.dumps({**vars(config), **found}))
    folder = os.path.join(config.out_dir, "checkpoints", "step_00000008")
    assert set(os.listdir(folder)) == {"model.safetensors", "optimizer.safetensors", "state.json",
                                       "config.json", "tokenizer.json", "manifest.json"}
    state = load_model(config.out_dir)[1]
    assert (state["step"], state["samples"], state["tokens"]) == (8, 64, 2048)
    assert state["best_val_loss"] == min(e["val_loss"] for e in lines(config, "eval"))

def test_an_evaluation_says_what_each_layer_does(small, tmp_path):
    config = small(learn_gamma=True)
    train.main(config)
    first, last = (entry["layers"] for entry in lines(config, "eval"))
    assert len(first) == 14 and "model.layers.1.mlp.down_proj" in first
    assert all(layer["gamma"] != 0.7 for layer in last.values()) and first != last
    compiled = small(learn_gamma=True, compile="true", out_dir=str(tmp_path / "compiled"))
    train.main(compiled)
    for name, layer in lines(compiled, "eval")[-1]["layers"].items():
        assert layer == pytest.approx(last[name], rel=0.01, abs=0.01)
    dense = small(linear="dense", out_dir=str(tmp_path / "dense"))
    train.main(dense)
    assert "layers" not in lines(dense, "eval")[-1]

def test_a_solver_that_fails_in_a_look_inside_does_not_end_the_run(small, monkeypatch, capsys):
    def fail(*args):
        raise torch.linalg.LinAlgError("it did not converge")
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    train.main(small(steps=4))
    assert "layers" not in lines(small(), "eval")[-1]
    assert "WARNING: no look inside the layers: it did not converge" in capsys.readouterr().err

def test_the_speed_leaves_out_the_first_step_which_compiles(small, monkeypatch):
    lr_at = train.lr_at
    def slow(step, config):
        time.sleep(1.5 if step == 1 else 0)
        return lr_at(step, config)
    monkeypatch.setattr(train, "lr_at", slow)
    config = small(log_every=4)
    train.main(config)
    assert all(entry["step_ms"] < 350 for entry in lines(config, "train"))

@pytest.mark.parametrize("chip, peak", [
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA RTX A1000", None), ("NVIDIA GH200 480GB", 989e12)])
def test_a_gpu_has_the_peak_of_its_whole_name(monkeypatch, chip, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: chip)
    assert train.peak_flops(torch.device("cuda")) == peak

def test_a_gradient_far_above_the_median_of_the_last_is_logged(small, capsys, tmp_path):
    config = small(steps=32, spike=1.05, save_every=24)
    train.main(config)
    norms = [entry["grad_norm"] for entry in lines(config)]
    expected = [(n + 1, norms[n], statistics.median(norms[:n])) for n in range(20, 32)
                if norms[n] > 1.05 * statistics.median(norms[:n])]
    spikes = lines(config, "spike")
    assert [(s["step"], s["grad_norm"], s["median"]) for s in spikes] == expected and 0 < len(spikes) < 12
    assert spikes[-1]["step"] > 24
    assert not any(s["skipped"] for s in spikes) and "spike" in capsys.readouterr().out
    resumed = small(steps=32, spike=1.05, save_every=24, out_dir=str(tmp_path / "resumed"))
    shutil.copytree(config.out_dir, resumed.out_dir)
    shutil.rmtree(os.path.join(resumed.out_dir, "checkpoints", "step_00000032"))
    train.main(resumed)                        # the norms of before are part of the state
    assert lines(resumed, "spike") == spikes

def test_the_update_of_a_spike_is_left_out_where_asked_for(small, monkeypatch):
    median = train.median_norm                 # from the 21st step on every gradient is a spike
    monkeypatch.setattr(train, "median_norm", lambda norms: median(norms) / 1e6)
    config = small(steps=24, skip_spikes=True, save_every=2, keep=20)
    train.main(config)
    assert [s["step"] for s in lines(config, "spike") if s["skipped"]] == [21, 22, 23, 24]
    assert files_of(config, 24) == files_of(config, 20) != files_of(config, 18)

def test_two_processes_leave_out_the_updates_that_one_does(small, tmp_path):
    one, two = (small(steps=32, spike=1.05, skip_spikes=True, out_dir=str(tmp_path / n)) for n in ("1", "2"))
    train.main(one)
    process = launch(two, processes=2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    skipped = [[s["step"] for s in lines(config, "spike") if s["skipped"]] for config in (one, two)]
    assert skipped[0] == skipped[1] != []
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)

def test_a_checkpoint_without_gradient_norms_continues(small, monkeypatch):
    config, load_folder = small(steps=24), checkpoint.load_folder
    train.main(config)
    expected = losses(config)
    shutil.rmtree(os.path.join(config.out_dir, "checkpoints", "step_00000024"))
    def load_old(folder):                      # of a time before there was a guard against spikes
        model, state = load_folder(folder)
        return model, {name: value for name, value in state.items() if name != "norms"}
    monkeypatch.setattr(checkpoint, "load_folder", load_old)
    train.main(config)
    with open(os.path.join(config.out_dir, "checkpoints/step_00000024/state.json"), encoding="utf-8") as f:
        assert len(json.load(f)["norms"]) == 4
    assert losses(config) == expected

def test_lines_after_the_checkpoint_and_half_lines_are_dropped_on_resume(small):
    config = small()
    train.main(config)
    expected = losses(config)
    shutil.rmtree(os.path.join(config.out_dir, "checkpoints", "step_00000008"))
    with open(os.path.join(config.out_dir, "metrics.jsonl"), "a", encoding="utf-8") as f:
        f.write('{"kind": "train", "step": 99, "loss": 0}\n{"kind": "tra')
    train.main(config)
    assert losses(config) == expected

def test_the_same_command_after_the_end_does_nothing(small, capsys):
    config = small()
    train.main(config)
    before = files_of(config, 8), lines(config)
    train.main(config)
    assert (files_of(config, 8), lines(config)) == before and status(config)["state"] == "finished"

def test_a_changed_architecture_or_data_set_is_refused_and_another_change_printed(small, capsys, tmp_path):
    train.main(small(steps=4, save_every=4))
    for changed, name in [(dict(rank=4), "rank"), (dict(gamma=0.5), "gamma"), (dict(n_ffn=64), "n_ffn"),
                          (dict(linear="dense"), "linear"), (dict(optimizer="muon"), "optimizer")]:
        with pytest.raises(ValueError, match=f"{name} was .* when this run began"):
            train.main(small(**changed))
    other = str(tmp_path / "other")
    shutil.copytree(small().data_dir, other)
    tokens = np.array(data.read_shard(os.path.join(other, "train_00000.bin")))[:-1]
    data.write_shard(os.path.join(other, "train_00000.bin"), tokens, 257)
    os.remove(os.path.join(other, "manifest.json"))
    with pytest.raises(ValueError, match="data was"):
        train.main(small(data_dir=other))
    train.main(small(lr=1e-4))
    assert "changed: lr 0.01 → 0.0001" in capsys.readouterr().out

def test_never_refuses_a_used_folder_unless_it_may_overwrite(small):
    train.main(small())
    with pytest.raises(ValueError, match="not empty: continue with --resume auto"):
        train.main(small(resume="never"))
    stranger = os.path.join(small().out_dir, "notes.txt")
    open(stranger, "w").close()
    train.main(small(resume="never", overwrite=True, steps=2))
    assert losses(small())[-1][0] == 2 and os.path.exists(stranger)

@pytest.mark.parametrize("path", ["checkpoints/step_00000004", ""])
def test_resuming_from_a_path_takes_that_checkpoint(small, tmp_path, path):
    train.main(small())
    source = str(tmp_path / "source")
    shutil.copytree(small().out_dir, source)
    shutil.rmtree(os.path.join(source, "checkpoints", "step_00000008"))
    other = small(resume=os.path.join(source, path), out_dir=str(tmp_path / "other"))
    train.main(other)
    assert losses(other) == losses(small())[4:] and files_of(other, 8) == files_of(small(), 8)
    before = checkpoint.checkpoints(small().out_dir)       # of a run of its own: not to be lost for another
    with pytest.raises(ValueError, match="not empty: continue with --resume auto"):
        train.main(small(resume=other.resume))
    assert checkpoint.checkpoints(small().out_dir) == before and len(losses(small())) == 8
    train.main(small(resume=other.resume, overwrite=True, steps=6))
    assert [step for step, _ in losses(small())] == [5, 6]

def test_another_tokenizer_is_refused_for_a_new_run_and_for_an_old_one(small, tmp_path):
    train.main(small(steps=4))
    other = str(tmp_path / "other")
    shutil.copytree(small().data_dir, other)
    mine = Tokenizer.load(os.path.join(other, "tokenizer.json"))
    Tokenizer(mine.tokens[::-1], mine.pattern, mine.name).save(os.path.join(other, "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer that .*other was made with"):
        train.main(small(data_dir=other, out_dir=str(tmp_path / "new")))
    os.remove(os.path.join(other, "manifest.json"))        # that could tell
    train.main(small(data_dir=other, out_dir=str(tmp_path / "new"), steps=4))
    mine.save(os.path.join(other, "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer_sha256 was .* when this run began"):
        train.main(small(data_dir=other, out_dir=str(tmp_path / "new")))

def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(small):
    config = small(steps=8, save_every=1, lr=1e30, grad_clip=0, warmup=0)
    with pytest.raises(FloatingPointError, match=r"step 2: loss .*samples 8 to 15 .*Nothing was updated"):
        train.main(config)
    assert status(config)["state"] == "failed" and status(config)["step"] == 1
    assert load_model(config.out_dir)[1]["step"] == 1

def test_shards_without_a_manifest_train_when_a_tokenizer_is_named(small, tmp_path):
    folder = tmp_path / "ready"
    folder.mkdir()
    for split in ("train", "val"):
        shutil.copy(f"{small().data_dir}/{split}_00000.bin", folder / f"fineweb_{split}_000001.bin")
    with pytest.raises(ValueError, match="say --tokenizer gpt2"):
        train.main(small(data_dir=str(folder)))
    train.main(small(data_dir=str(folder), tokenizer="byte", steps=2))

def test_bad_configuration_ends_a_command_with_code_2_and_one_line(small):
    command = [sys.executable, os.path.join(ROOT, "train.py"), *flags_of(small(micro_batch=3))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --micro_batch 3")
