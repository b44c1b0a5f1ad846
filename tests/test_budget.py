"""budget.py: what a run costs, as a dry run and the first lines say it."""
import dataclasses
import os

import pytest
import torch
import torch.nn as nn
from conftest import files_of, step_folder

import train
from nanolost import budget
from nanolost.counts import count_multiplies
from nanolost.errors import UserError
from nanolost.methods import build_model
from nanolost.settings import resolve

# millions for 32 000 tokens: dense, low-rank, ρ = 0.01
PUBLISHED = {
    "60m": (58.07, 42.77, 0.25), "130m": (134.11, 94.00, 0.78), "350m": (367.97, 185.22, 2.96),
    "1b": (1339.08, 609.31, 11.83), "7b": (6738.42, 2820.94, None),
}

@pytest.mark.parametrize("size", PUBLISHED)
def test_dry_run_prints_the_published_parameter_counts(size, capsys):
    def parameters(**given):
        train.main(resolve(dict(model=size, vocab_size=32_000, dry_run=True, device="cpu", **given)))
        words = capsys.readouterr().out.split("\n")[0].replace(",", "").split()
        # total, low-rank, sparse, dense
        return [int(word) / 1e6 for word in words if word.isdigit()]
    dense, low_rank, sparse = PUBLISHED[size]
    assert round(parameters(linear="dense")[0], 2) == dense
    assert round(parameters(linear="lowrank")[0], 2) == low_rank
    total, _, extra, _ = parameters(sparsity=0.01)
    # a difference of rounded numbers
    assert sparse is None or extra == pytest.approx(sparse, abs=0.0065)
    assert total == pytest.approx(low_rank + extra, abs=0.006)

@pytest.mark.parametrize("switches", [dict(learn_gamma=True, optimizer="muon"), dict(linear="dense"),
                                      dict(linear="cola", tie_embeddings=True)], ids=str)
def test_dry_run_counts_the_bytes_that_a_checkpoint_has(small, capsys, switches):
    config = small(steps=2, n_embd=128, n_ffn=344, **switches)
    train.main(config)
    stored = sum(map(len, files_of(config, 2).values()))
    capsys.readouterr()
    train.main(dataclasses.replace(config, dry_run=True))
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("checkpoint"))
    _, number, unit, *_ = row.replace(",", " ").split()
    assert float(number) * {"GB": 1e9, "MB": 1e6}[unit] == pytest.approx(stored, rel=0.02)
    config.vocab_size = 257
    shapes = build_model(config, "meta")
    assert budget.checkpoint_bytes(shapes, config.optimizer) == pytest.approx(stored, rel=0.02)

def test_a_dry_run_writes_nothing_needs_no_text_and_no_memory(small, tmp_path, capsys):
    before = budget.peak_memory(torch.device("cpu"))
    train.main(resolve(dict(model="13b", data_dir="nowhere", out_dir=str(tmp_path / "out"), dry_run=True)))
    assert os.listdir(tmp_path) == []
    # its weights alone would take 52 GB
    assert budget.peak_memory(torch.device("cpu")) - before < 1e9
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["parameters", "compute", "memory", "checkpoint", "device",
                                                   "tokens", "dense"]

def test_the_first_lines_of_a_run_are_those_of_its_dry_run(small, capsys):
    train.main(small(steps=2))
    first = capsys.readouterr().out.splitlines()[:7]
    train.main(small(steps=2, dry_run=True))
    assert capsys.readouterr().out.splitlines()[:7] == first and first[-1].startswith("text ")
    assert os.path.isdir(step_folder(small(), 2))

@pytest.mark.parametrize("world, accumulation", [(1, 2), (2, 1)])
def test_the_tokens_of_a_run_are_the_product_that_is_printed(small, world, accumulation):
    config = small(steps=10, micro_batch=4, dtype="float32", compile="false")
    row = budget.describe_batch(config, world, accumulation)[-1].replace(",", "").split()
    total, steps, processes, micro_batches, samples, length = (int(word) for word in row if word.isdigit())
    assert total == steps * processes * micro_batches * samples * length == 10 * 256
    assert (processes, micro_batches) == (world, accumulation)

@pytest.mark.parametrize("chip, peak", [
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA RTX A1000", None), ("NVIDIA GH200 480GB", 989e12)])
def test_a_gpu_has_the_peak_of_its_whole_name(monkeypatch, chip, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: chip)
    assert budget.peak_flops(torch.device("cuda")) == peak

@pytest.mark.parametrize("count, text", [(0, "0 MB"), (301_000, "0.301 MB"), (99_900_000, "99.9 MB"),
                                         (100_000_000, "0.1 GB"), (27_000_000_000, "27 GB")])
def test_bytes_are_said_in_a_unit_that_fits(count, text):
    assert budget.size(count) == text

def test_the_dense_model_beside_a_run_has_the_multiplications_of_a_dense_run(capsys):
    def lines(**given):
        train.main(resolve(dict(model="350m", vocab_size=32_000, dry_run=True, device="cpu", **given)))
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    number = lines(linear="dense")["compute"].split()[1]
    assert f" {number} multiplications" in lines()["dense"]

def test_a_stack_of_matrices_multiplies_as_its_matrices_do():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(4, 8, 6))
    apart = nn.ModuleList(nn.Linear(6, 8) for _ in range(4))
    assert count_multiplies(layer) == count_multiplies(apart) == 4 * 8 * 6

def test_a_run_says_how_often_it_reads_its_text(small):
    line = budget.describe_text(small(steps=10, seq_len=32), 20)
    assert line.split(maxsplit=1) == ["text", "640 tokens for training, read 4 times"]

def test_a_dry_run_refuses_a_text_that_the_run_refuses(small):
    for dry_run in (False, True):
        with pytest.raises(UserError, match="--seq_len|window"):
            train.main(small(steps=2, seq_len=2**20, batch_tokens=2**20, dry_run=dry_run))
