"""settings.py: recipes, limits, and what is chosen once for a run."""
import dataclasses

import pytest

import train
from nanolost import run
from nanolost.errors import UserError
from nanolost.flags import parse
from nanolost.methods import METHODS
from nanolost.optim import OPTIMIZERS
from nanolost.settings import (
    FIXED,
    LIMITS,
    Config,
    resolve,
    saved_value,
    settle_device,
    split_batch,
)

def test_a_size_brings_its_recipe_and_each_value_can_be_overridden():
    config = resolve({"model": "350m", "lr": 1e-4, "linear": "cola"})
    assert (config.n_embd, config.rank, config.steps, config.lr) == (1024, 256, 60_000, 1e-4)
    assert (config.sparsity, config.gamma, config.init, config.activation) == (0.0, 1.0, "random", "silu")
    assert resolve({"linear": "lowrank", "init": "svd"}).init == "svd"
    assert resolve({"model": "tiny"}).optimizer == "muon" != resolve({}).optimizer

@pytest.mark.parametrize("given, message", [
    (dict(linear="dense", rank=8), "--rank means nothing"), (dict(steps=0), "--steps 0: must be positive"),
    (dict(warmup=9), "--warmup 9: must lie between 0 and --steps 8"), (dict(init_std=0.0), "--init_std 0.0"),
    (dict(lr=-1.0), "--lr -1.0: must be positive"), (dict(betas=(0.9, 1.0)), r"--betas \(0.9, 1.0\): must"),
    (dict(lr=float("nan")), "--lr nan: must be positive"), (dict(aux_lr=0.0), "--aux_lr 0.0: must"),
    (dict(grad_clip=-1.0), "--grad_clip -1.0: must not be"), (dict(n_head=0), "--n_head 0: must be"),
    (dict(n_kv_head=0), "--n_kv_head 0: must be"), (dict(timeout=0), "--timeout 0: must be positive"),
    (dict(threads=0), "--threads 0: must lie"), (dict(threads=100_000), "--threads 100000: must lie between"),
    (dict(threads=3 * 10**9), "--threads 3000000000"), (dict(timeout=10**18), "--timeout 10{18}: must be"),
    (dict(weight_decay=float("inf")), "--weight_decay inf: must be finite"),
    (dict(momentum=1.0), "--momentum 1.0: must lie"),
    (dict(min_lr_ratio=2.0), "--min_lr_ratio 2.0: must lie"), (dict(weight_decay=-0.1), "--weight_decay -0"),
    (dict(gamma=1.0), "--gamma 1.0: one of the two paths would never"), (dict(gamma=0.0), "--gamma 0.0"),
    (dict(linear="cola", sparsity=0.1), "or 1 with --sparsity 0"),
    (dict(spike=0.5), "--spike 0.5: must be above 1"), (dict(spike=-2.0), "--spike -2.0: must be above 1"),
    (dict(batch_tokens=250), r"use \[224, 256\]"), (dict(micro_batch=3), r"use one of \[1, 2, 4, 8\]"),
    (dict(rank=100), "q_proj: rank 100 of a 32×32 weight"), (dict(data_dir="nowhere"), "run prepare_c4.py"),
    (dict(n_head=5), "n_head"), (dict(vocab_size=100), "below the tokenizer's 257"),
    (dict(seq_len=10**6, batch_tokens=10**6), "1000001"), (dict(device="mps"), "--device mps"),
])
def test_what_cannot_be_is_refused_with_the_repair_and_nothing_is_written(small, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        train.main(small(**given))
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert [path.name for path in left] in ([], [".lock"])

def test_every_limit_is_one_of_a_setting():
    assert LIMITS.keys() <= {field.name for field in dataclasses.fields(Config)}

def test_the_names_of_kinds_and_optimizers_are_those_that_are_registered():
    for name, known in (("linear", METHODS), ("optimizer", OPTIMIZERS)):
        for value in known:
            assert parse(Config, [f"--{name}", value]) == {name: value}
        with pytest.raises(UserError, match=f"--{name}"):
            parse(Config, [f"--{name}", "other"])

def test_a_resume_must_agree_in_the_architecture_and_may_differ_in_how_it_trains():
    fixed = {"n_embd", "allocation", "rank", "linear", "gamma", "vocab_size", "seq_len", "optimizer", "seed"}
    assert fixed <= FIXED
    assert not FIXED & {"model", "steps", "lr", "batch_tokens", "micro_batch", "device", "threads", "out_dir"}

# --- what is chosen once ---

def test_warm_up_is_a_tenth_of_the_steps_and_stays_what_it_was_when_steps_grow():
    config = resolve({"steps": 500})
    config.settle_schedule({})
    assert config.warmup == 50
    longer = resolve({"steps": 5000})
    longer.settle_schedule({"warmup": 50})
    assert longer.warmup == 50
    typed = resolve({"steps": 5000, "warmup": 7})
    typed.settle_schedule({"warmup": 50})
    assert typed.warmup == 7

@pytest.mark.parametrize("value", ["x", -3, None, 2.5, True, [3]])
def test_a_warm_up_that_nobody_could_have_typed_is_refused_in_a_checkpoint(value):
    with pytest.raises(UserError, match="warmup is .* in the checkpoint's state.json, and must not be neg"):
        resolve({"steps": 500}).settle_schedule({"warmup": value})

@pytest.mark.parametrize("value", ["x", -3, 0, 100_000, 3 * 10**9, 1.5, True])
def test_a_number_of_threads_that_nobody_could_have_typed_is_refused_in_a_checkpoint(value):
    with pytest.raises(UserError, match="threads is .* in the checkpoint's state.json, and must lie between"):
        run.settle(resolve({}), {"threads": value, "warmup": 1})

@pytest.mark.parametrize("name, value", [
    ("optimizer", "other"), ("optimizer", 3), ("linear", "other"), ("seq_len", "512"), ("seq_len", 0),
    ("freeze", "model.*"), ("seed", 1.5), ("tie_embeddings", 1), ("gamma", "0.7"), ("gamma", True),
    ("allocation", 8)])
def test_a_saved_setting_is_one_that_could_be_typed(name, value):
    with pytest.raises(UserError, match=f"{name} is .* in the checkpoint's state.json"):
        saved_value({name: value}, name)

@pytest.mark.parametrize("name, value", [
    ("optimizer", "muon"), ("linear", "dense"), ("seq_len", 512), ("freeze", ["model.*"]), ("gamma", 1),
    ("rank", 8), ("rank", {"q_proj": 8}), ("tie_embeddings", True), ("threads", 1024), ("init_from", "a"),
    ("allocation", {"q_proj": {"kind": "dense"}})])
def test_a_setting_that_could_be_typed_is_taken_as_it_was_saved(name, value):
    assert saved_value({name: value}, name) == value and saved_value({}, name, 7) == 7

def test_auto_becomes_what_suits_the_device_and_what_was_typed_stays():
    config = resolve({"device": "cpu"})
    settled = settle_device(config)
    assert (settled.device, settled.dtype, settled.compile) == ("cpu", "float32", "false")
    assert config.dtype == "auto"
    typed = settle_device(resolve({"device": "cpu", "dtype": "bfloat16", "compile": "true"}))
    assert (typed.dtype, typed.compile) == ("bfloat16", "true")

@pytest.mark.parametrize("samples, world, micro", [
    (8, 1, None), (8, 2, None), (512, 1, None), (12, 3, 2), (24, 8, 1)])
def test_an_update_is_processes_times_micro_batches_times_samples(samples, world, micro):
    config = resolve({"seq_len": 64, "batch_tokens": 64 * samples, "micro_batch": micro, "device": "cpu"})
    found, accumulation = split_batch(config, world)
    assert world * accumulation * found == samples
    # on a CPU a micro-batch has at most 4096 tokens
    assert found == micro or found * 64 <= 4096

@pytest.mark.parametrize("world", [3, 5])
def test_a_number_of_processes_that_does_not_divide_is_refused_with_those_that_do(small, world):
    with pytest.raises(UserError, match=r"do not divide among . processes: start one of \[1, 2, 4, 8\]"):
        split_batch(small(), world)
