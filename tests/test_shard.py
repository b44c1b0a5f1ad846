"""shard.py: what several processes that hold one copy together compute, save and read."""
import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import test_reliability
import torch
from conftest import (
    PATIENCE,
    ROOT,
    SMALL,
    blocks,
    ended,
    files_of,
    flags_of,
    free_port,
    in_forks,
    launch,
    lines,
    losses,
    metrics,
    started,
    status,
    step_folder,
    train_in_forks,
    updates,
    wait_for,
)
from safetensors.torch import load_file, save_file

import train
from lost import apply_lost
from nanolost import checkpoint, methods, optim, out_dir, shard
from nanolost.errors import UserError
from nanolost.job import Job
from nanolost.settings import resolve, settle_device
from nanolost.tensors import TensorFiles, write_tensors
from nanolost.tokenizer import Tokenizer

def passes(processes, *works, log):
    codes = in_forks(processes, *works, log=log)
    assert codes == [0] * processes, open(log).read()

# --- the same losses ---

# the losses of the whole model in one process, relative to which those of a split one lie within
VARIANTS = {
    "adamw": (dict(), 1e-6),
    "dense, tied": (dict(linear="dense", tie_embeddings=True), 1e-6),
    "γ, accumulation": (dict(learn_gamma=True, micro_batch=1), 1e-6),
    "muon, empty parts": (dict(optimizer="muon", rank=2), 1e-5),
    "bfloat16, recompute": (dict(dtype="bfloat16", recompute=True, lr=1e-3), 1e-4),
}

@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    """The config of each variant, trained as a whole model."""
    found = {}
    for number, (name, (flags, _)) in enumerate(VARIANTS.items()):
        method = {} if flags.get("linear") == "dense" else {"rank": 8}
        folders = {"data_dir": data_dir, "out_dir": str(tmp_path_factory.mktemp(f"one{number}"))}
        found[name] = resolve({**SMALL, **method, **folders, **flags})
        train.main(found[name])
    return found

SIZES = [(2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)]

@pytest.mark.parametrize("processes, shards", SIZES)
def test_a_split_model_trains_as_a_whole_one_and_continues_bit_for_bit(
        small, straight, tmp_path, processes, shards):
    split = {name: small(**flags, shard=shards, out_dir=str(tmp_path / str(number)))
             for number, (name, (flags, _)) in enumerate(VARIANTS.items())}
    train_in_forks(processes, *split.values(), log=tmp_path / "log")
    before = {}
    for name, config in split.items():
        expected = [loss for _, loss in losses(straight[name])]
        assert [loss for _, loss in losses(config)] == pytest.approx(expected, rel=VARIANTS[name][1]), name
        before[name] = files_of(config, 8), lines(config)
        shutil.rmtree(step_folder(config, 8))
    train_in_forks(processes, *split.values(), log=tmp_path / "log")
    for name, config in split.items():
        assert (files_of(config, 8), lines(config)) == before[name], name

def test_shards_and_processes_may_change_at_every_start(small, straight, tmp_path):
    # 2 processes, 1, 4, of which two hold a copy
    plan = [(2, 2, 3), (1, 1, 5), (4, 2, 8)]
    for processes, shards, steps in plan:
        config = small(shard=shards, steps=steps, warmup=2, save_every=1, keep=1)
        train_in_forks(processes, config, log=tmp_path / "log")
    assert "changed: shard 1 → 2" in (tmp_path / "log").read_text()
    assert status(config)["state"] == "finished" and len(losses(config)) == 8
    assert checkpoint.load_model(config.out_dir)[1]["samples"] == 64

def test_a_metric_of_the_page_on_extending_has_one_value_however_weights_are_split(small, tmp_path):
    code, = [block for block in blocks("extending.md", "python") if "head_norm" in block]
    found = []
    for processes in (1, 2):
        config = small(shard=processes, steps=4, out_dir=str(tmp_path / str(processes)))
        def run(config=config):
            exec(code, {})
            train.main(config)
        passes(processes, run, log=tmp_path / "log")
        found.append(lines(config, "eval")[-1]["head_norm"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)

def test_what_is_whole_on_every_process_stays_the_same_on_all(small, tmp_path):
    def check():
        config = small(shard=2, learn_gamma=True, steps=20)
        with started(config) as (config, state, texts, job):
            updates(config, state, texts, job, 20)
            plain = [p.detach() for p in state.model.parameters() if not shard.is_split(p)]
            assert len(plain) > 4 and all(p.dim() < 2 for p in plain)
            digest = hashlib.sha256(torch.cat([p.flatten() for p in plain]).numpy().tobytes()).hexdigest()
            assert len(set(job.gather(digest))) == 1
    passes(2, check, log=tmp_path / "log")

def test_shards_that_do_not_divide_are_refused_with_those_that_do(small):
    output = ended(launch(small(shard=3), 2), None)
    assert "error: --shard 3 does not divide 2 processes: use one of 1, 2" in output

def test_a_run_that_does_not_split_loads_nothing_of_torchs_sharding():
    # what torch's own optimizers load in their first step comes later
    code = "import sys, train; print([m for m in sys.modules if m.startswith(('torch.distributed.fsdp', " \
           "'torch.distributed.tensor'))])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"

# --- Muon ---

SHAPES = [(257, 16), (8, 40), (2, 32), (16, 16), (5, 3), (1, 7)]
HOW = dict(lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")

def muon_steps(kind, first, gradients, cut) -> list:
    """Weights and moments after three steps."""
    parameters = [torch.nn.Parameter(cut(w)) for w in first]
    optimizer = kind(parameters, **HOW)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = cut(g)
        optimizer.step()
    return [t.detach() for p in parameters for t in (p, optimizer.state[p]["momentum_buffer"])]

def cut_for(job, shards):
    """cut(tensor): the same split over so many processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    mesh = shard.mesh_of(job, shards)
    place = [Replicate(), Shard(0)][2 - mesh.ndim:]
    return functools.partial(distribute_tensor, device_mesh=mesh, placements=place)

@pytest.mark.parametrize("owner", [False, True], ids=["all compute", "owner computes"])
def test_muon_of_split_matrices_has_the_bits_of_torchs_on_whole_ones(small, tmp_path, owner):
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    whole = muon_steps(torch.optim.Muon, first, gradients, torch.clone)
    def check():
        shard.Muon.owner = owner
        with Job.start(settle_device(small())) as job:
            for shards in (2, 4):
                split = muon_steps(shard.Muon, first, gradients, cut_for(job, shards))
                for one, other in zip(whole, split, strict=True):
                    assert torch.equal(one, shard.whole(other))
    passes(4, check, log=tmp_path / "log")

# --- the start ---

def digests_of(config) -> str:
    with started(config) as (_, state, _, job):
        text = hashlib.sha256()
        for name, t in state.model.state_dict().items():
            text.update(name.encode() + shard.whole(t).contiguous().numpy().tobytes())
        return text.hexdigest()

@pytest.mark.parametrize("flags", [dict(), dict(linear="dense", tie_embeddings=True), dict(init="random")],
                         ids=["svd", "dense, tied", "random"])
def test_the_first_weights_are_the_same_for_any_number_of_processes_and_parts(small, tmp_path, flags):
    def write():
        found = digests_of(small(**flags, shard=int(os.environ["WORLD_SIZE"]), batch_tokens=32 * 12))
        (tmp_path / f"{os.environ['WORLD_SIZE']}_{os.environ['RANK']}").write_text(found)
    for processes in (1, 2, 3):
        passes(processes, write, log=tmp_path / "log")
    found = {path.read_text() for path in tmp_path.glob("?_?")}
    # and as a whole model makes them
    model = train.build_model(small(**flags, vocab_size=257), "cpu")
    text = hashlib.sha256()
    for name, t in model.state_dict().items():
        text.update(name.encode() + t.numpy().tobytes())
    assert found == {text.hexdigest()}

class Nested(torch.nn.Module):
    """y = x (U D)^T with D and U in modules of their own."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.down = torch.nn.Linear(in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, out_features, bias=False)

    def settings(self) -> dict:
        return {"in_features": self.down.in_features, "out_features": self.up.out_features}

    def forward(self, x):
        return self.up(self.down(x))

@torch.no_grad()
def nested_of(name, linear, config) -> Nested:
    layer = Nested(linear.in_features, linear.out_features).to(linear.weight.device)
    if linear.weight.device.type != "meta":
        layer.down.weight.copy_(linear.weight[:4])
        layer.up.weight.copy_(linear.weight[:, :4])
    return layer

def convert_to_nested(model, config, part):
    names = [name for name, m in model.model["layers"].named_modules() if isinstance(m, torch.nn.Linear)]
    for number, name in enumerate(names):
        layer = nested_of(name, model.model["layers"].get_submodule(name), config)
        if number % part[1] != part[0]:
            # another process fills it
            for p in layer.parameters():
                torch.nn.init.constant_(p, math.nan)
        model.model["layers"].set_submodule(name, layer)

@pytest.mark.parametrize("one", [None, nested_of], ids=["all at once", "one at a time"])
def test_layers_with_modules_inside_come_to_all_processes(small, data_dir, tmp_path, monkeypatch, one):
    for known in (methods.KINDS, methods.METHODS):
        monkeypatch.setitem(known, "nested", None)
    methods.register("nested", Nested, convert_to_nested, one=one)
    flags = {**SMALL, "linear": "nested", "data_dir": data_dir, "out_dir": str(tmp_path / "out")}
    def write():
        config = resolve({**flags, "shard": int(os.environ["WORLD_SIZE"])})
        (tmp_path / f"{os.environ['WORLD_SIZE']}_{os.environ['RANK']}").write_text(digests_of(config))
    for processes in (1, 2):
        passes(processes, write, log=tmp_path / "log")
    assert len({path.read_text() for path in tmp_path.glob("?_?")}) == 1

def test_a_kind_whose_two_functions_make_unlike_layers_is_refused(small, data_dir, tmp_path, monkeypatch):
    for known in (methods.KINDS, methods.METHODS):
        monkeypatch.setitem(known, "nested", None)
    def other(name, linear, config):
        layer = nested_of(name, linear, config)
        layer.up = torch.nn.Linear(4, 1, bias=False)
        return layer
    methods.register("nested", Nested, convert_to_nested, one=other)
    flags = {**SMALL, "linear": "nested", "data_dir": data_dir, "out_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"up.weight is \(\[1, 4\], .* makes it, and \(\[32, 4\]"):
        train.main(resolve(flags))

def test_a_buffer_that_no_checkpoint_keeps_is_refused_by_name(small, monkeypatch):
    build = train.build_model
    def with_buffer(*args):
        model = build(*args)
        model.lm_head.register_buffer("mask", torch.ones(3, device="meta"), persistent=False)
        return model
    monkeypatch.setattr(train, "build_model", with_buffer)
    with pytest.raises(UserError, match="lm_head.mask is a buffer that no checkpoint keeps"):
        train.main(small())

# --- what processes tell each other before they begin ---

def refused(message, config, of_rank=None):
    """Work for children of which each must be refused so. of_rank(rank): what is changed for one."""
    def check():
        rank = int(os.environ["RANK"])
        changes = of_rank(rank) if of_rank else {}
        with pytest.raises(UserError, match=message):
            train.main(dataclasses.replace(config, **changes))
    return check

@pytest.mark.parametrize("flag, value", [("lr", 0.5), ("n_layer", 1), ("shard", 2), ("rank", 3)])
def test_processes_with_different_flags_are_refused(small, tmp_path, flag, value):
    config = small()
    message = f"process 1 has --{flag} {value}, and process 0 {getattr(config, flag)}: start all of them"
    check = refused(message, config, lambda rank: {flag: value} if rank else {})
    passes(2, check, log=tmp_path / "log")

def test_a_relative_out_dir_of_another_folder_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(out_dir, "SEEN", 0.2)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    # of a job that was killed as it looked
    (tmp_path / "0" / "out").mkdir()
    (tmp_path / "0" / "out" / ".seen_1_2").write_text("")
    config = small(out_dir="out")
    def check():
        os.chdir(tmp_path / os.environ["RANK"])
        refused("process 1 does not see .*/0/out of process 0|process 1 does not see .*/1/out", config)()
    passes(2, check, log=tmp_path / "log")
    assert not list((tmp_path / "0" / "out").glob(".seen*"))

def test_a_store_that_nobody_answers_is_a_lost_process(small, tmp_path):
    def check():
        with Job.start(settle_device(small())) as job:
            with pytest.raises(ConnectionError, match="lost another process"), job.exchanges():
                raise torch.distributed.DistStoreError("wait timeout after 4000ms, keys: /3/1")
    passes(2, check, log=tmp_path / "log")

# --- files ---

def test_a_stream_writes_the_bytes_of_the_formats_own_library(tmp_path):
    tensors = {"b.x": torch.randn(3, 4), "a": torch.tensor(3.0), "c": torch.arange(5, dtype=torch.int32),
               "d": torch.randn(4).bfloat16(), "é": torch.zeros(0, 4), "f": torch.randn(2).double()}
    notes = {"format": 'p"t é'}
    save_file(tensors, tmp_path / "theirs", notes)
    write_tensors(str(tmp_path), "ours", tensors, notes)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    files = TensorFiles.of(str(tmp_path / "ours"))
    assert torch.equal(files.read("b.x", slice(1, 3)), tensors["b.x"][1:3])
    assert files.read("b.x", slice(3, 3)).shape == (0, 4) and files.read("a") == 3

def loaded(folder, config, job):
    """Model and optimizers of a checkpoint, of which this process holds its part."""
    model, saved = checkpoint.load_folder(folder, lambda model: train.settle_memory(model, config, job))
    optimizers = optim.build_optimizers(model, config)
    checkpoint.load_optimizer(folder, model, optimizers)
    return model, optimizers, saved

@pytest.mark.parametrize("name", ["muon, empty parts", "dense, tied"])
def test_a_checkpoint_that_is_read_by_rows_and_written_again_has_the_same_bytes(
        small, straight, tmp_path, monkeypatch, name):
    config = straight[name]
    folder = step_folder(config, 8)
    byte = Tokenizer.named("byte")
    def again(shards, longest, where):
        monkeypatch.setattr(checkpoint, "LONGEST", longest)
        split = small(**VARIANTS[name][0], shard=shards)
        with Job.start(settle_device(split)) as job:
            model, optimizers, saved = loaded(folder, settle_device(split), job)
            checkpoint.save_checkpoint(str(tmp_path / where), 8, model, optimizers, saved, byte, 1, None, job)
    plan = [(2, 10**9, "one file"), (2, 30_000, "several"), (1, 30_000, "several, whole")]
    passes(2, *[functools.partial(again, *entry) for entry in plan], log=tmp_path / "log")
    for _, _, where in plan:
        made = str(tmp_path / where / "checkpoints" / "step_00000008")
        assert checkpoint.verify(made) is None
        if where == "one file":
            assert files_of(small(out_dir=str(tmp_path / where)), 8) == files_of(config, 8)
            continue
        for kind in ("model", "optimizer"):
            with open(os.path.join(made, f"{kind}.safetensors.index.json")) as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
            assert len(names) > 2
            tensors = {}
            for file in names:
                tensors |= load_file(os.path.join(made, file))
            expected = load_file(os.path.join(folder, f"{kind}.safetensors"))
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        model, _ = checkpoint.load_model(str(tmp_path / where))
        expected = checkpoint.load_model(folder)[0].state_dict()
        assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())
        if name == "dense, tied":
            transformers = pytest.importorskip("transformers")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(made).state_dict()
            assert theirs.keys() == expected.keys()
            assert all(torch.equal(t, expected[key]) for key, t in theirs.items())

# --- an evaluation ---

def test_processes_of_a_split_model_evaluate_equally_often_and_stop_together(small, straight, tmp_path):
    expected = metrics(straight["adamw"], "eval")[0]["val_loss"]
    def check():
        # 62 windows, in turns of 2 × 5: the last turn of one process is empty
        config = small(shard=2, micro_batch=1)
        with started(config) as (config, state, texts, job):
            texts.validation.micro = 31 if job.world == 2 else 1
            updates(config, state, texts, job, 4)
            found = [train.run.evaluate(state.model, texts.validation, state.autocast, job)["val_loss"]]
            texts.validation.micro = 61
            found.append(train.run.evaluate(state.model, texts.validation, state.autocast, job)["val_loss"])
            assert found == pytest.approx([expected] * 2, rel=1e-5), (found, expected)
            if job.rank == 1:
                job.asked.append("SIGTERM")
            assert train.run.evaluate(state.model, texts.validation, state.autocast, job) is None
    passes(2, check, log=tmp_path / "log")

# --- compiled ---

# without the compiler's second half, which takes minutes
@pytest.mark.parametrize("layers, limit, backend", [
    (3, 2, "eager"),
    pytest.param(10, 8, "eager", marks=pytest.mark.slow),
])
def test_blocks_of_more_ranks_than_the_compiler_allows_are_all_compiled(
        small, tmp_path, monkeypatch, layers, limit, backend):
    ranks = {f"{layer}.self_attn.q_proj": 3 + layer for layer in range(layers)}
    flags = dict(n_layer=layers, rank={**ranks, "default": 8}, recompute=True, steps=2, warmup=1)
    whole = small(**flags, out_dir=str(tmp_path / "whole"))
    train.main(whole)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    def check():
        torch._dynamo.config.recompile_limit = limit
        config = small(**flags, shard=2, compile="true")
        train.main(config)
        # of each block one in training and one in evaluation
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2 * layers
        assert [loss for _, loss in losses(config)] == pytest.approx([x for _, x in losses(whole)], rel=1e-6)
        assert lines(config, "eval")[-1]["layers"]
    passes(2, check, log=tmp_path / "log")

# --- what breaks: the tests of tests/test_reliability.py, of a split model ---

slow = pytest.mark.slow

@pytest.fixture
def split(small):
    return lambda **given: small(**{"shard": 2, **given})

def test_a_disk_that_takes_half_of_a_save_ends_all_processes_with_the_reason(split, tmp_path):
    config = split(steps=4, optimizer="muon")
    def train_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (95_000, 95_000))
        with pytest.raises(OSError, match="cannot save .*File too large.*make room"):
            train.main(config)
    passes(2, train_with_little_room, log=tmp_path / "log")
    assert "cannot save" in status(config)["reason"] and not checkpoint.checkpoints(config.out_dir)
    assert not [name for name in os.listdir(os.path.join(config.out_dir, "checkpoints")) if "tmp" in name]

@slow
def test_a_slow_disk_is_waited_for_longer_than_an_exchange(split, tmp_path, monkeypatch):
    config = split(steps=4, save_every=4, timeout=4)
    put = checkpoint.Writing.put
    def slowly(self, turn, tensor):
        if turn.tensor.numel() == 257 * 32:
            time.sleep(6)
        put(self, turn, tensor)
    monkeypatch.setattr(checkpoint.Writing, "put", slowly)
    train_in_forks(2, config, log=tmp_path / "log")
    assert status(config)["state"] == "finished"

@slow
def test_random_kills_change_nothing(split, tmp_path, request):
    test_reliability.test_random_kills_change_nothing(split, tmp_path, 2, request)

@slow
def test_a_signal_stops_at_a_step_and_the_same_command_continues(split, tmp_path, capsys):
    test_reliability.test_a_signal_stops_at_a_step_and_the_same_command_continues(
        split, tmp_path, capsys, "training", 2, "SIGUSR1")

@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_alone_stops_all(split, rank):
    test_reliability.test_a_signal_to_one_process_alone_stops_all(split, rank)

@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_job_within_the_time_out(split, rank):
    test_reliability.test_a_stopped_process_ends_the_job_within_the_time_out(split, rank)

@slow
@pytest.mark.parametrize("fault, timeout, reason", [
    ("raise:1:5", 60, "process 1: RuntimeError: injected"),
    ("raise:0:5", 60, "process 0: RuntimeError: injected"),
    ("memory:1:5", 60, "process 1: MemoryError: CUDA out of memory. Tried 1 GiB. With a smaller"),
    ("sleep:1:5", 10, "process 0: lost another process"),
    ("nan:1:5", 60, "FloatingPointError: step 5: loss nan"),
])
def test_a_process_that_fails_or_hangs_ends_the_job_and_is_named(split, fault, timeout, reason):
    test_reliability.test_a_process_that_fails_or_hangs_ends_the_job_and_is_named(
        split, fault, timeout, reason)

@slow
def test_a_save_may_take_longer_than_the_timeout(split):
    test_reliability.test_a_save_may_take_longer_than_the_timeout(split)

@slow
def test_a_save_that_fails_ends_all_processes_with_the_reason(split, tmp_path):
    test_reliability.test_a_save_that_fails_ends_all_processes_with_the_reason(split, 2, tmp_path)

@slow
def test_a_run_that_is_done_ends_with_0(small, tmp_path):
    for number in range(10):
        config = small(shard=(2, 4)[number % 2], steps=2, eval_every=2, save_every=2,
                       out_dir=str(tmp_path / str(number)))
        ended(launch(config, 4, stdout=subprocess.PIPE))
        assert status(config)["state"] == "finished"

# --- several machines, on the loopback of one ---

def machines(config, count: int, processes: int) -> list[subprocess.Popen]:
    """A torchrun for each of `count` machines."""
    port = free_port()
    def meet(number):
        place = [f"--nnodes={count}", f"--node_rank={number}"]
        return [*place, "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [launch(config, processes, meet=meet(number)) for number in range(count)]

@slow
@pytest.mark.parametrize("count, processes", [(2, 2), (4, 1)])
def test_a_machine_that_is_lost_ends_the_job_and_the_same_command_continues(
        small, tmp_path, count, processes):
    # a machine, or two of them, hold a copy
    config = small(shard=2, steps=60, save_every=10, eval_every=60, timeout=60)
    straight = small(shard=2, steps=60, save_every=10, eval_every=60, out_dir=str(tmp_path / "straight"))
    for process in machines(straight, count, processes):
        ended(process)
    running = machines(config, count, processes)
    wait_for(running[0], "step     20/")
    running[-1].kill()
    running[-1].communicate()
    for process in running[:-1]:
        output = ended(process, None)
        assert process.returncode not in (0, 2), output
    assert status(config)["state"] == "failed"
    assert checkpoint.newest_checkpoint(config.out_dir)
    for process in machines(config, count, processes):
        ended(process)
    assert status(config)["state"] == "finished"
    assert lines(config) == lines(straight) and files_of(config, 60) == files_of(straight, 60)

@slow
def test_the_slurm_script_starts_a_torchrun_on_each_machine(small, tmp_path):
    config = small(shard=2, steps=40, save_every=40, eval_every=40)
    # stands for SLURM: the command on two machines, with the signals that srun passes on
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "srun").write_text("""#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
echo srun $$
while wait -n || [ $? -gt 128 ]; do :; done
wait
""")
    (bin / "scontrol").write_text(f"""#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path}/queue; fi
""")
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for program in bin.iterdir():
        program.chmod(0o755)
    number = str(free_port() % 10_000)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": number, "PROCESSES": "1",
           "OMP_NUM_THREADS": "1", "SLURM_JOB_NUM_NODES": "2",
           "SLURM_JOB_NODELIST": "two"}
    def job():
        return subprocess.Popen(["bash", "runs/slurm.sh", *flags_of(config)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = job()
    pid = int(wait_for(process, "srun ").split()[-1])
    wait_for(process, "step     10/")
    os.kill(pid, signal.SIGUSR1)
    output = process.communicate(timeout=PATIENCE)[0]
    assert status(config)["state"] == "stopped", output
    assert (tmp_path / "queue").read_text() == f"requeue {number}\n"
    output = job().communicate(timeout=PATIENCE)[0]
    assert "continuing from" in output and status(config)["state"] == "finished", output

# --- in another's model ---

def test_the_code_of_the_page_splits_lost_layers_in_a_model_of_transformers(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=2, use_cache=False)
    config = transformers.LlamaConfig(**sizes)
    code, = blocks("sharding.md", "python")
    # of a model as small as this one
    code = code.replace("rank=1024", "rank=8").replace("sparsity=0.01", "sparsity=0.05")
    def split(values, rank):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        exec(code, {"model": model})
        model.to_empty(device="cpu")
        # a table that no file has
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        for name, own in model.state_dict().items():
            part = shard.part_of(len(own), 2, rank) if shard.is_split(own) else ...
            shard.local(own).copy_(values[name][part])
        return model
    def step(model):
        idx = torch.arange(64).view(2, 32)
        loss = model(input_ids=idx, labels=idx).loss
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        return loss.item()
    def check():
        # here, since a process that has computed with several threads cannot be forked
        torch.manual_seed(0)
        whole = apply_lost(transformers.LlamaForCausalLM(config), rank=8, sparsity=0.05)
        with Job.start(settle_device(small())) as job:
            model = split(whole.state_dict(), job.rank)
            assert all(shard.is_split(p) for p in model.parameters())
            for number in range(2):
                assert step(model) == pytest.approx(step(whole), rel=1e-6), number
    passes(2, check, log=tmp_path / "log")
