"""loop.py: one update, one evaluation, and what is said of them."""
import contextlib
import json
import math
import os
import statistics
import time
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    continue_from,
    ended,
    files_of,
    launch,
    lines,
    losses,
    metrics,
    started,
    status,
    updates,
)

import train
from model import Llama, LlamaConfig
from nanolost import checkpoint, data, loop, run
from nanolost.checkpoint import load_model
from nanolost.errors import UserError
from nanolost.loop import Figures, Report, State, Validation, evaluate
from nanolost.tokenizer import Tokenizer

# --- an update ---

def test_a_model_whose_projections_start_at_zero_trains(small):
    with started(small(steps=20, linear="dense")) as (config, state, texts, job):
        projections = [p for name, p in state.model.named_parameters()
                       if name.endswith(("o_proj.weight", "down_proj.weight"))]
        with torch.no_grad():
            for p in projections:
                p.zero_()
        # then nothing comes back through them: the gradients of all before them are zero in the first step
        found = updates(config, state, texts, job, 20)
        assert found[-1].loss < found[0].loss - 1
        assert all(p.abs().max() > 0 for p in projections)

def test_a_low_rank_path_that_starts_at_zero_trains(small):
    with started(small(steps=20)) as (config, state, texts, job):
        with torch.no_grad():
            for name, p in state.model.named_parameters():
                if name.endswith((".B", ".W_s")):
                    p.zero_()
        found = updates(config, state, texts, job, 20)
        assert found[-1].loss < found[0].loss - 1

def test_a_parameter_that_no_gradient_reaches_is_named_in_the_first_step(small):
    with started(small()) as (config, state, texts, job):
        state.model.forgotten = nn.Linear(2, 2)
        state.model.frozen = nn.Linear(2, 2).requires_grad_(False)
        state = State.of(state.model, config)
        with pytest.raises(AssertionError, match="no gradient reaches forgotten.weight, forgotten.bias$"):
            updates(config, state, texts, job, 1)
        # nothing is left behind that would count again
        assert not any(p._post_accumulate_grad_hooks for p in state.model.parameters())

def test_an_update_draws_nothing_at_random(small):
    with started(small()) as run:
        before = torch.get_rng_state()
        updates(*run, count=2)
        assert torch.equal(torch.get_rng_state(), before)

def test_a_process_reads_only_its_share_and_all_together_read_the_order_once(small, monkeypatch):
    read = []
    batch = data.TokenDataset.batch
    def spy(self, samples, *device):
        read.extend(np.asarray(samples).tolist())
        return batch(self, samples, *device)
    with started(small(micro_batch=2)) as (config, state, texts, job):
        monkeypatch.setattr(data.TokenDataset, "batch", spy)
        updates(config, state, texts, job, 8)
        expected = data.SampleOrder(len(texts.train), config.seed)[np.arange(8 * 8)].tolist()
        assert read == expected
        # as one of two processes, which reads its own half of each update
        shape = (2, 2, 2)
        state.samples = 0
        numbers = texts.samples(state, shape)
        halves = [numbers[:, rank].flatten().tolist() for rank in (0, 1)]
        assert sorted(halves[0] + halves[1]) == sorted(expected[:8])
        read.clear()
        loop.accumulate(state, texts.train, numbers[:, 1], np.full(2, 4.0), job.device)
        assert read == halves[1]

def test_a_gradient_far_above_the_median_of_the_last_is_logged(small, capsys, tmp_path):
    config = small(steps=32, spike=1.05, save_every=20)
    train.main(config)
    norms = [entry["grad_norm"] for entry in metrics(config, "train")]
    expected = [(n + 1, norms[n], statistics.median(norms[:n])) for n in range(20, 32)
                if norms[n] > 1.05 * statistics.median(norms[:n])]
    spikes = lines(config, "spike")
    assert [(s["step"], s["grad_norm"], s["median"]) for s in spikes] == expected and 0 < len(spikes) < 12
    assert not any(s["skipped"] for s in spikes) and "spike" in capsys.readouterr().out
    # the norms of before are part of the state
    resumed = small(steps=32, spike=1.05, save_every=20, out_dir=str(tmp_path / "resumed"))
    continue_from(config, resumed, 20)
    assert lines(resumed, "spike") == spikes

def test_the_update_of_a_spike_is_left_out_where_asked_for(small, monkeypatch):
    # from the 21st step on every gradient is a spike
    median = loop.median_norm
    monkeypatch.setattr(loop, "median_norm", lambda norms: median(norms) / 1e6)
    config = small(steps=24, skip_spikes=True, save_every=2, keep=20)
    train.main(config)
    assert [s["step"] for s in lines(config, "spike") if s["skipped"]] == [21, 22, 23, 24]
    assert files_of(config, 24) == files_of(config, 20) != files_of(config, 18)

def test_two_processes_leave_out_the_updates_that_one_does(small, tmp_path):
    one, two = (small(steps=32, spike=1.05, skip_spikes=True, out_dir=str(tmp_path / n)) for n in ("1", "2"))
    train.main(one)
    ended(launch(two, processes=2))
    skipped = [[s["step"] for s in lines(config, "spike") if s["skipped"]] for config in (one, two)]
    assert skipped[0] == skipped[1] != []
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)

def test_a_checkpoint_without_gradient_norms_continues(small, monkeypatch):
    config, load_folder = small(steps=24), checkpoint.load_folder
    train.main(config)
    expected = losses(config)
    def load_old(folder, *split):
        # of a time before there was a guard against spikes
        model, state = load_folder(folder, *split)
        return model, {name: value for name, value in state.items() if name != "norms"}
    monkeypatch.setattr(checkpoint, "load_folder", load_old)
    continue_from(config, config, 20)
    assert len(load_folder(checkpoint.newest_checkpoint(config.out_dir))[1]["norms"]) == 4
    assert losses(config) == expected

def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(small):
    config = small(steps=8, save_every=1, lr=1e30, grad_clip=0, warmup=0)
    with pytest.raises(FloatingPointError, match=r"step 2: loss .*samples 8 to 15 .*Nothing was updated"):
        train.main(config)
    assert status(config)["state"] == "failed" and status(config)["step"] == 1
    assert load_model(config.out_dir)[1]["step"] == 1

# --- the counters of a checkpoint ---

GOOD = {"step": 8, "samples": 64, "tokens": 2048, "evaluated": 8, "began": 8, "norms": [1.5, 2, 0.0]}

def empty_state() -> State:
    return State(None, [], None, None)

def test_counters_that_a_run_has_written_come_back():
    state = empty_state()
    state.restore(json.loads(json.dumps(GOOD)))
    assert state.counters() == GOOD and GOOD.keys() == loop.COUNTERS.keys()

@pytest.mark.parametrize("value", [
    "x", "8", None, True, 1.5, 8.0, -1, -5, 2**63, 2**70, math.nan, math.inf, [], [8], {}], ids=str)
@pytest.mark.parametrize("name", [name for name in GOOD if name != "norms"])
def test_a_counter_that_no_run_has_written_is_refused_by_its_name(name, value):
    with pytest.raises(UserError, match=f'^"{name}" of its state.json is .*: use an earlier checkpoint$'):
        empty_state().restore({**GOOD, name: value})

@pytest.mark.parametrize("value", [
    5, "x", None, {}, True, ["x"], [None], [True], [[1.0]], [1.0, -1.0], [math.nan], [math.inf], [10**400]],
    ids=lambda value: str(value)[:20])
def test_gradient_norms_that_no_run_has_written_are_refused(value):
    with pytest.raises(UserError, match='^"norms" of its state.json is'):
        empty_state().restore({**GOOD, "norms": value})

def test_an_evaluation_after_the_last_step_is_refused():
    with pytest.raises(UserError, match='"evaluated" of its state.json is 99, after its "step" 8'):
        empty_state().restore({**GOOD, "evaluated": 99})

# --- an evaluation ---

ALONE = types.SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), asked=[],
                              sum=lambda tensor: tensor, gather=lambda value: [value])
FULL = torch.autocast("cpu", enabled=False)

@pytest.mark.parametrize("micro", [1, 3, 7])
def test_evaluation_is_the_mean_over_all_tokens_for_any_micro_batch(data_dir, micro):
    dataset = data.TokenDataset(data_dir, "val", 32)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24))
    token_bytes = torch.tensor([1] * 256 + [0])
    result = evaluate(model, Validation(dataset, 10, micro, token_bytes), FULL, ALONE)
    x, y = dataset.batch(range(10))
    with torch.no_grad():
        nats = F.cross_entropy(model(x, y)[0].double().flatten(0, 1), y.flatten(), reduction="sum").item()
    assert result["val_tokens"] == 320 and result["val_loss"] == pytest.approx(nats / 320, rel=1e-6)
    assert result["val_ppl"] == pytest.approx(math.exp(nats / 320), rel=1e-5)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / (y != 256).sum().item(), rel=1e-6)

@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_all_processes_are_the_whole_text(data_dir, world):
    dataset = data.TokenDataset(data_dir, "val", 32)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24))
    text = Validation(dataset, 10, 3, torch.ones(257))
    shares = []
    def keep(tensor):
        shares.append(tensor.clone())
        return tensor
    for rank in range(world):
        job = types.SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"), asked=[], sum=keep)
        # a process without a share of this short text adds nothing
        with contextlib.suppress(ZeroDivisionError):
            evaluate(model, text, FULL, job)
    whole = evaluate(model, text, FULL, ALONE)
    nats, tokens, text_bytes, _ = sum(shares).tolist()
    assert len(shares) == world and tokens == text_bytes == 320
    assert nats / tokens == pytest.approx(whole["val_loss"], rel=1e-12)

def test_an_evaluation_ends_at_once_when_asked_to():
    # to read from data that is None would be an error
    asked = types.SimpleNamespace(**{**vars(ALONE), "asked": ["SIGTERM"]})
    assert evaluate(None, Validation(None, 1000, 8, None), contextlib.nullcontext(), asked) is None

def test_evaluation_does_not_move_training(small, tmp_path):
    often, seldom = small(eval_every=1), small(eval_every=8, out_dir=str(tmp_path / "seldom"))
    train.main(often)
    train.main(seldom)
    assert losses(often) == losses(seldom) and files_of(often, 8) == files_of(seldom, 8)
    assert len(lines(often, "eval")) == 8 and len(lines(seldom, "eval")) == 1

def test_an_evaluation_says_what_each_layer_does(small, tmp_path):
    config = small(learn_gamma=True)
    train.main(config)
    first, last = (entry["layers"] for entry in metrics(config, "eval"))
    assert len(first) == 14 and "model.layers.1.mlp.down_proj" in first
    assert all(layer["gamma"] != 0.7 for layer in last.values()) and first != last
    dense = small(linear="dense", out_dir=str(tmp_path / "dense"))
    train.main(dense)
    assert "layers" not in metrics(dense, "eval")[-1]

def test_a_solver_that_fails_in_a_look_inside_does_not_end_the_run(small, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("it did not converge")
    for name in ("eigvalsh", "svdvals", "eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, fail)
    with started(small(init="random", select="random")) as (config, state, texts, job):
        assert loop.look_inside(state.model, texts.validation, state.autocast, job) == {}
    assert "WARNING: no look inside the layers: it did not converge" in capsys.readouterr().err

def weight_norm(model, text, autocast, job) -> dict:
    """{"weight_norm": of all parameters together}."""
    squares = sum(p.detach().double().square().sum() for p in model.parameters())
    return {"weight_norm": squares.sqrt().item()}

def test_a_metric_is_added_by_one_function_and_one_line(small, monkeypatch):
    monkeypatch.setattr(loop, "METRICS", [*loop.METRICS, weight_norm])
    config = small()
    train.main(config)
    first, last = metrics(config, "eval")
    model, _ = load_model(config.out_dir)
    assert last["weight_norm"] == pytest.approx(weight_norm(model, None, None, None)["weight_norm"], rel=1e-9)
    assert last["weight_norm"] != first["weight_norm"] and "layers" in last

def test_every_entry_that_an_evaluation_has_of_itself_is_reserved(small):
    config = small(steps=2, paper_batch=4)
    train.main(config)
    entry = metrics(config, "eval")[-1]
    assert entry.keys() - {"layers"} == set(loop.RESERVED)

@pytest.mark.parametrize("name", ["kind", "step", "time", "val_loss", "paper_ppl", "layers", "weight_norm"])
def test_a_metric_with_a_name_that_is_taken_is_told_so(small, monkeypatch, name):
    def colliding(*args) -> dict:
        return {"fine": 1.0, name: 2.0}
    monkeypatch.setattr(loop, "METRICS", [*loop.METRICS, weight_norm, colliding])
    with started(small()) as (config, state, texts, job):
        with pytest.raises(AssertionError, match=f"metric colliding: the line has {name} already"):
            loop.measure(state, texts.validation, job)

def test_a_metric_may_be_a_number_of_torch_or_numpy(small, monkeypatch):
    found = {
        "tensor": torch.tensor(1.5), "whole": torch.tensor(3), "half": torch.tensor(0.5).bfloat16(),
        "parameter": nn.Parameter(torch.tensor(2.0)), "truth": torch.tensor(True),
        "single": np.float32(0.25), "numpy_whole": np.int64(7), "array": np.array(2.5), "yes": np.bool_(True),
        "inside": {"a": [torch.tensor(1.0)]}, "vector": torch.tensor([1, 2]),
    }
    monkeypatch.setattr(loop, "METRICS", [lambda *args: found])
    config = small(steps=2)
    train.main(config)
    entry = metrics(config, "eval")[-1]
    assert {name: entry[name] for name in found} == {
        "tensor": 1.5, "whole": 3, "half": 0.5, "parameter": 2.0, "truth": True, "single": 0.25,
        "numpy_whole": 7, "array": 2.5, "yes": True, "inside": {"a": [1.0]}, "vector": [1, 2]}

def test_a_metric_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"\{3\} is a set: metrics.jsonl takes numbers"):
        json.dumps({"a": {3}}, default=loop.as_json)

# --- texts with few targets ---

class Rows:
    """Samples of 8 tokens, of which those of `with_targets` have targets."""

    seq_len = 8

    def __init__(self, samples: int, with_targets: set[int]):
        self.samples = samples
        self.with_targets = with_targets

    def __len__(self) -> int:
        return self.samples

    def batch(self, samples, device="cpu"):
        x = torch.arange(8).repeat(len(samples), 1)
        y = x + 1
        for row, sample in enumerate(samples):
            if sample not in self.with_targets:
                y[row] = -1
        return x.to(device), y.to(device)

    def targets(self, samples) -> np.ndarray:
        return 8 * np.isin(samples, list(self.with_targets))

BYTE = Tokenizer.named("byte")

def test_a_validation_text_without_a_target_is_refused_before_anything_is_trained():
    for samples in (1, 3, 4):
        with pytest.raises(UserError, match=f"the first {samples} samples of the validation text.*no target"):
            Validation.of(Rows(6, {4}), samples, 2, BYTE, 257)
    with pytest.raises(UserError, match="the first 6 samples"):
        Validation.of(Rows(6, set()), None, 4, BYTE, 257)

@pytest.mark.parametrize("micro", [1, 2, 5])
def test_one_target_is_a_text(micro):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24))
    text = Validation.of(Rows(6, {4}), 5, micro, BYTE, 257)
    found = evaluate(model, text, FULL, ALONE)
    assert found["val_tokens"] == 8 and math.isfinite(found["val_loss"])

def test_an_update_without_a_target_has_a_gradient_of_zeros(small):
    with started(small(spike=0)) as (config, state, texts, job):
        samples = np.arange(8).reshape(2, 1, 4)
        figures = loop.update(state, Rows(8, set()), samples, config, job)
        assert figures.loss == figures.norm == 0 and not state.gradients.any() and state.step == 1
        figures = loop.update(state, Rows(8, {5}), samples, config, job)
        assert figures.loss > 0 and math.isfinite(figures.norm) and figures.norm > 0
        assert all(p.isfinite().all() for p in state.model.parameters())

# --- what is said ---

def kept(path, step=4, evaluated=0) -> bytes:
    state = types.SimpleNamespace(step=step, evaluated=evaluated, began=0)
    return b"".join(loop.kept_lines(str(path), state))

def test_lines_that_will_come_again_are_dropped_and_those_of_the_user_stay(tmp_path):
    entries = [{"kind": kind, "step": step} for step in (4, 5) for kind in ("train", "eval", "spike")]
    ours = [json.dumps(entry).encode() + b"\n" for entry in entries]
    own = [
        '{"kind": "note", "step": 5, "text": "ρ"}\n'.encode(), b'{"kind": "note"}\n', b'{"loss": 1}\n',
        b'{"kind": "train"}\n', b'{"kind": "train", "step": "five"}\n', b'{"kind": [], "step": 5}\n',
        b"3\n", b"[]\n", b"null\n", b"\n", b"# moved to another machine here\n", b"ends as on Windows\r\n",
        b"\xff\xfe is no UTF-8\n", b'{"kind": "note", "text": "\xff"}\n', b"[" * 100_000 + b"\n",
        b'{"kind": "eval", "st\n',
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(ours + own) + b'{"kind": "tr')
    assert kept(path) == b"".join([ours[0], ours[2], *own])
    assert kept(tmp_path / "none") == b""

def test_a_last_line_without_its_end_is_whole_or_gone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}')
    assert kept(path) == b'{"kind": "train", "step": 1}\n'
    path.write_text('{"kind": "train", "step": 5}')
    assert kept(path) == b""
    for half in (b'{"kind": "train", "st', b"\xff", b"[" * 100_000):
        path.write_bytes(b'{"kind": "note", "text": "\xff"}\n' + half)
        assert kept(path) == b'{"kind": "note", "text": "\xff"}\n'

def test_a_link_under_the_name_of_the_log_stays_one(small, tmp_path):
    config = small(steps=2)
    target = tmp_path / "elsewhere" / "log.jsonl"
    target.parent.mkdir()
    target.write_bytes(b"{}\n")
    state = State(Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24)), [], torch.zeros(1), FULL)
    os.makedirs(config.out_dir)
    link = os.path.join(config.out_dir, "metrics.jsonl")
    # also before there is anything where it leads
    for before in (b"{}\n", b""):
        with contextlib.suppress(FileNotFoundError):
            os.remove(link)
        os.symlink(target, link)
        with Report(config, types.SimpleNamespace(**vars(ALONE), say=print)) as report:
            report.begin(state)
            report.record("train", loss=1.0)
        assert os.path.islink(link) and os.readlink(link) == str(target)
        kept_before, new = target.read_bytes()[:len(before)], target.read_bytes()[len(before):]
        assert kept_before == before and json.loads(new)["loss"] == 1.0
        os.remove(target)

def test_records_of_the_users_own_kinds_survive_a_resume_and_ours_have_a_time(small):
    started_at = time.time()
    config = small()
    train.main(config)
    expected = lines(config)
    own = {"kind": "benchmark", "step": 8, "hellaswag": 0.27}
    with open(os.path.join(config.out_dir, "metrics.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(own) + '\n{"kind": "train", "step": 99, "loss": 0}\n{"kind": "tra')
    continue_from(config, config, 4)
    assert [line for line in lines(config) if line["kind"] != "benchmark"] == expected
    assert metrics(config, "benchmark") == [own]
    times = [record["time"] for record in metrics(config) if record != own]
    assert times == sorted(times) and started_at - 1 <= times[0] <= times[-1] <= time.time() + 1

def test_the_speed_leaves_out_the_first_update_which_compiles(small):
    config = small(log_every=2)
    state = State(Llama(LlamaConfig(257, 32, 1, 2, n_embd=16, n_ffn=24)), [], torch.zeros(1), FULL)
    job = types.SimpleNamespace(**vars(ALONE), say=lambda text: None)
    records = []
    os.makedirs(config.out_dir)
    with Report(config, job) as report:
        report.begin(state)
        for seconds in (100.0, 0.5, 0.5, 0.7):
            state.step += 1
            report.update(Figures(1.0, 1.0, 1e-2, math.inf, False, False, False, seconds))
        records = metrics(config, "train")
    assert [record["step_ms"] for record in records] == pytest.approx([500, 600])
    assert [record["tokens_per_second"] for record in records] == pytest.approx([256 / 0.5, 256 / 0.6])

def test_a_speed_is_said_where_the_log_begins_with_the_first_update(small):
    config = small(steps=2)
    train.main(config)
    speeds = [record["tokens_per_second"] for record in metrics(config, "train")]
    assert len(speeds) == 2 and min(speeds) > 0

def test_a_refused_command_leaves_the_status_as_it_was(small):
    config = small()
    train.main(config)
    before = status(config)
    with pytest.raises(ValueError, match="n_ffn"):
        train.main(small(n_ffn=64))
    assert status(config) == before == {"state": "finished", "step": 8, "reason": ""}

def test_a_run_that_fails_says_so_in_its_status(small, monkeypatch):
    def fail(*args):
        raise KeyError("a defect")
    monkeypatch.setattr(run, "update", fail)
    with pytest.raises(KeyError):
        train.main(small())
    assert status(small()) == {"state": "failed", "step": 0, "reason": "process 0: KeyError: 'a defect'"}
