"""memory.py: what a GPU of a split run holds and sends, before there is one."""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from nanolost import memory
from nanolost.errors import UserError
from nanolost.methods import build_model
from nanolost.settings import resolve

def config_of(**given):
    return resolve(dict(vocab_size=50257, dtype="bfloat16", micro_batch=64, **given))

def said(capsys, **given) -> dict[str, str]:
    """The lines of a dry run by their first words."""
    train.main(resolve(dict(dry_run=True, **given)))
    lines = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[12:] for line in lines}

def test_a_dry_run_says_without_a_launcher_what_a_gpu_of_a_cluster_holds(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = said(capsys, model="13b", world_size=16, shard=8, gpu_memory=80.0)
    assert found["a GPU"].startswith("35.1 GB at the peak, estimated: weights 2.82 GB, gradients 2.82 GB")
    assert "16 processes" in found["tokens"] and found["device"].startswith("cuda, bfloat16, compile true")
    # an all-reduce between two copies: 2 × 4 × 5.65 G / 8 / 2
    assert found["traffic"].endswith("2.82 GB between 2 copies, an update")
    assert found["fits"].startswith("on 16 GPUs of 80 GB: --shard 2 --micro_batch 32, 68.9 GB")
    # the same, for less: first a smaller micro-batch, then more processes of a copy
    found = said(capsys, model="13b", world_size=16, shard=8, gpu_memory=24.0)
    assert "--shard 16" in found["fits"] and "--micro_batch 32" not in found["fits"]
    found = said(capsys, model="13b", linear="dense", world_size=16, shard=8, gpu_memory=8.0)
    assert found["fits"].startswith("not on 16 GPUs of 8 GB")
    assert not os.listdir(tmp_path)

def test_a_dry_run_advises_what_a_run_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = said(capsys, model="7b", world_size=16, shard=8, gpu_memory=24.0)
    # the run's own micro-batch, and the fewest processes
    assert re.fullmatch(r"on 16 GPUs of 24 GB: --shard 16 --micro_batch 32, [\d.]+ GB at the peak; "
                        r"or --shard 4 --micro_batch \d+, [\d.]+ GB at the peak", found["fits"])
    assert "a process, one of the 8 that hold a copy, =" in found["memory"]
    # an eighth of the 42.7 GB
    whole = said(capsys, model="7b")["memory"]
    assert float(whole.split()[0]) == pytest.approx(8 * float(found["memory"].split()[0]), rel=0.01)
    found = said(capsys, model="60m", dense_start=0.2, world_size=8, gpu_memory=10.0)
    assert "--shard 1 " in found["fits"] and "or" not in found["fits"].split("GPUs")[1].split(":")[1]
    found = said(capsys, model="13b", world_size=16, gpu_memory=8.0)
    assert "not on" in found["fits"] and found["fits"].endswith("use more GPUs")
    found = said(capsys, model="13b", world_size=16, gpu_memory=8.0, recompute=False)
    assert found["fits"].endswith("use more GPUs, or --recompute true")

def test_traffic_counts_the_updates_of_muon_and_no_gradients_of_what_is_frozen():
    def inside(**given):
        config = config_of(model="60m", shard=8, **given)
        model = train.first_shapes(config, None)
        return memory.traffic(model, config, 8, 1)[0]
    model = build_model(config_of(model="60m"), "meta")
    blocks = sum(p.numel() for p in model.model["layers"].parameters() if p.dim() >= 2)
    assert inside(optimizer="muon") - inside() == pytest.approx(2 * blocks * 7 / 8)
    words = model.lm_head.weight.numel() + model.model["embed_tokens"].weight.numel()
    frozen = inside(freeze=["model.embed_tokens.weight", "lm_head.weight"])
    assert inside() - frozen == pytest.approx(4 * words * 7 / 8)

def test_a_run_that_asks_for_none_of_this_says_nothing_of_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not {"a GPU", "traffic", "fits"} & set(said(capsys))

@pytest.mark.parametrize("given, message", [
    (dict(dry_run=True, shard=8), "--shard 8 needs 8 processes, or a multiple, and there is 1: start"),
    (dict(gpu_memory=80.0), "--gpu_memory means nothing without --dry_run: leave it out"),
    (dict(dry_run=True, world_size=10**9), "--world_size 1000000000: must lie between 1 and 1000000"),
    (dict(dry_run=True, world_size=8, shard=3), "--shard 3 does not divide 8 processes: use one of 1, 2, 4"),
    (dict(shard=2, dense_start=0.1), "--dense_start needs whole matrices, and --shard splits them: drop one"),
    (dict(world_size=16), "--world_size means nothing without --dry_run"),
    (dict(shard=0), "--shard 0: must lie between 1 and 1000000"),
])
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        train.main(resolve(given))

@pytest.mark.parametrize("linear", ["lost", "dense"])
def test_more_processes_of_a_copy_need_less_each_and_a_smaller_batch_less_yet(linear):
    model = build_model(config_of(model="1b", linear=linear), "meta")
    def total(shard, micro):
        return memory.estimate(model, config_of(model="1b", linear=linear, shard=shard), micro).total
    assert total(2, 8) > total(8, 8) > total(64, 8)
    assert total(8, 8) > total(8, 4)
    # 16 bytes a parameter are parted, and indices of channels; what is gathered and what a block keeps is not
    count = sum(p.numel() for p in model.parameters())
    assert total(2, 8) - total(8, 8) == pytest.approx(16 * count * (1 / 2 - 1 / 8), rel=1e-5)

# forward and backward pass of torch's tracker, GB, by `experiments/sharding.py` with 4 and 8 blocks
TRACKED = {
    ("7b", "lost", 8): 29.40,   ("7b", "lost", 64): 28.08,
    ("7b", "dense", 8): 24.58,  ("7b", "dense", 64): 21.48,
    ("13b", "lost", 8): 44.22,  ("13b", "lost", 64): 41.76,
    ("13b", "dense", 8): 37.66, ("13b", "dense", 64): 31.75,
}

@pytest.mark.parametrize("size, linear, shard", TRACKED)
def test_the_estimate_lies_within_a_tenth_of_torchs_memory_tracker(size, linear, shard):
    config = config_of(model=size, linear=linear, shard=shard)
    need = memory.estimate(build_model(config, "meta"), config, 64)
    tracked = 1e9 * TRACKED[size, linear, shard] + need.gradients + need.moments
    assert 1 <= need.total / tracked < 1.1

@pytest.mark.slow
def test_torchs_memory_tracker_still_says_so():
    command = [sys.executable, "experiments/sharding.py", "--model", "7b"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(found)["forward_backward"] / 1e9 == pytest.approx(TRACKED["7b", "lost", 8], rel=0.02)

@pytest.mark.slow
def test_a_start_and_a_save_hold_less_than_twice_the_largest_tensor_above_a_part(tmp_path):
    # at a real width: the packages that a split start loads take 80 MB
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "experiments/host_memory.py", "--model", "1b", "--out_dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in found.splitlines():
        process = json.loads(line)
        assert process["start_above_part"] < 2 * process["largest"], process
        assert process["save_above"] < 1.1 * process["largest"], process
    assert len(found.splitlines()) == 2
