"""train.py: a run is the same however it is interrupted or split; its folder, its refusals, how it ends."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import (
    PATIENCE,
    ROOT,
    SMALL,
    continue_from,
    ended,
    files_of,
    flags_of,
    launch,
    lines,
    losses,
    metrics,
    status,
    step_folder,
    val_losses,
    wait_for,
)

import train
from nanolost import checkpoint, data, run
from nanolost.checkpoint import load_model
from nanolost.errors import UserError
from nanolost.failures import failures_with_their_repair
from nanolost.optim import lr_at
from nanolost.settings import resolve
from nanolost.tokenizer import Tokenizer

def tree(folder) -> dict:
    """Every file under a folder, but for the lock, as bytes."""
    found = {}
    for home, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(home, name)
            if name != ".lock":
                with open(path, "rb") as f:
                    found[os.path.relpath(path, folder)] = f.read()
    return found

# --- the same run, however it is interrupted or split ---

@pytest.mark.parametrize("switches", [
    {}, dict(linear="dense"), dict(learn_gamma=True, n_kv_head=1, tie_embeddings=True),
    dict(optimizer="muon"), dict(dtype="bfloat16"),
], ids=["lost", "dense", "learned-gamma", "muon", "bfloat16"])
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(small, switches, tmp_path):
    straight = small(**switches)
    train.main(straight)
    resumed = small(**switches, out_dir=str(tmp_path / "resumed"))
    continue_from(straight, resumed, 4)
    assert lines(resumed) == lines(straight) and len(losses(straight)) == 8
    assert files_of(resumed, 8) == files_of(straight, 8)

def test_two_processes_and_any_split_of_a_batch_give_the_losses_of_one(small, tmp_path):
    def run(name, processes=1, **given):
        config = small(out_dir=str(tmp_path / name), **given)
        if processes > 1:
            ended(launch(config, processes))
        else:
            train.main(config)
        return [loss for _, loss in losses(config)] + val_losses(config)
    whole = run("1 × 8", micro_batch=8)
    assert run("4 × 2", micro_batch=2) == pytest.approx(whole, rel=1e-5)
    assert run("8 × 1", micro_batch=1) == pytest.approx(whole, rel=1e-5)
    assert run("world 2", processes=2, micro_batch=2) == pytest.approx(whole, rel=1e-5)

@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_compiled_training_is_one_whole_graph_and_keeps_names_losses_and_what_is_seen_inside(
        small, tmp_path, dtype):
    # one layer: most of the time is the C++ compiler's
    sizes = dict(n_layer=1, steps=4, eval_every=2, micro_batch=2, eval_tokens=300, learn_gamma=True,
                 dtype=dtype)
    eager, compiled = small(**sizes), small(**sizes, compile="true", out_dir=str(tmp_path / "compiled"))
    train.main(eager)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train.main(compiled)
    # of training and of evaluation, and never again
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert [x for _, x in losses(compiled)] == pytest.approx([x for _, x in losses(eager)], rel=tolerance)
    ours, theirs = (load_model(c.out_dir)[0].state_dict() for c in (eager, compiled))
    assert ours.keys() == theirs.keys()
    if dtype == "float32":
        one, other = (metrics(c, "eval")[-1]["layers"] for c in (eager, compiled))
        for name, layer in other.items():
            assert layer == pytest.approx(one[name], rel=0.01, abs=0.01)

def test_recomputing_changes_no_bit_of_a_run(small, tmp_path):
    straight, again = small(), small(recompute=True, out_dir=str(tmp_path / "again"))
    train.main(straight)
    train.main(again)
    assert losses(again) == losses(straight) and files_of(again, 8) == files_of(straight, 8)

def test_deterministic_runs_are_the_same_run_and_leave_the_setting_as_it_was(small, tmp_path, monkeypatch):
    one, two = small(deterministic=True), small(deterministic=True, out_dir=str(tmp_path / "two"))
    update, seen = run.update, set()
    def watched(*args):
        seen.add(torch.are_deterministic_algorithms_enabled())
        return update(*args)
    monkeypatch.setattr(run, "update", watched)
    train.main(one)
    train.main(two)
    assert lines(one) == lines(two) and files_of(one, 8) == files_of(two, 8)
    assert seen == {True}
    assert not torch.are_deterministic_algorithms_enabled()

def test_a_run_in_a_thread_of_a_notebook_is_that_of_a_command(small, tmp_path):
    alone, inside = small(), small(out_dir=str(tmp_path / "inside"))
    train.main(alone)
    errors = []
    def work():
        try:
            train.main(inside)
        except BaseException as e:
            errors.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and status(inside)["state"] == "finished"
    assert lines(inside) == lines(alone) and files_of(inside, 8) == files_of(alone, 8)

# --- what a run keeps when it goes on ---

def test_more_steps_do_not_put_the_rate_back_onto_the_ramp(small):
    train.main(small(steps=20, warmup=None, save_every=20))
    longer = small(steps=40, warmup=None, save_every=20)
    train.main(longer)
    rates = [record["lr"] for record in metrics(longer, "train")]
    # a tenth of 20, the steps that the run began with
    expected = small(steps=40, warmup=2)
    assert rates[20:] == [lr_at(step, expected) for step in range(21, 41)]
    # of twice the length the cosine is higher, but still falls
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert load_model(longer.out_dir)[1]["config"]["warmup"] == 2

@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

def test_a_resume_takes_the_threads_that_the_run_began_with(small, tmp_path, threads_as_before, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    straight = small(threads=2)
    train.main(straight)
    torch.set_num_threads(1)
    resumed = small(threads=None, out_dir=str(tmp_path / "resumed"))
    continue_from(straight, resumed, 4)
    assert torch.get_num_threads() == 2
    assert load_model(resumed.out_dir)[1]["config"]["threads"] == 2
    assert lines(resumed) == lines(straight) and files_of(resumed, 8) == files_of(straight, 8)

def test_another_number_of_threads_may_be_asked_for_and_is_said(small, capsys, threads_as_before):
    train.main(small(steps=4))
    train.main(small(threads=2))
    assert torch.get_num_threads() == 2 and "changed: threads 1 → 2" in capsys.readouterr().out

# --- files ---

def test_the_files_of_a_run_hold_what_they_promise(small):
    config = small(log_every=3)
    train.main(config)
    training, evaluations = metrics(config, "train"), metrics(config, "eval")
    assert [e["step"] for e in training] == [3, 6, 8]
    assert [e["step"] for e in evaluations] == [4, 8]
    assert set(training[0]) == {"kind", "step", "time", "loss", "lr", "grad_norm", "tokens",
                                "tokens_per_second", "step_ms", "mfu", "peak_memory_bytes"}
    assert set(evaluations[0]) == {"kind", "step", "time", "val_loss", "val_ppl", "val_bpb", "val_tokens",
                                   "layers"}
    assert training[-1]["tokens"] == 8 * 256 and training[0]["mfu"] is None
    assert status(config) == {"state": "finished", "step": 8, "reason": ""}
    with open(os.path.join(config.out_dir, "config.json"), encoding="utf-8") as f:
        found = {"tokenizer": os.path.join(config.data_dir, "tokenizer.json"), "vocab_size": 257,
                 "micro_batch": 8, "dtype": "float32", "compile": "false"}
        assert json.load(f) == json.loads(json.dumps({**vars(config), **found}))
    assert set(os.listdir(config.out_dir)) == {"checkpoints", "config.json", "metrics.jsonl", "status.json",
                                               ".lock"}
    assert set(os.listdir(step_folder(config, 8))) == {
        "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json",
        # what transformers needs to load it
        "tokenizer_config.json", "lost.py", "modeling_lost.py", "manifest.json"}
    state = load_model(config.out_dir)[1]
    # and nothing that no one reads
    assert set(state) == {"step", "samples", "tokens", "evaluated", "began", "norms", "config"}
    assert (state["step"], state["samples"], state["tokens"], state["evaluated"]) == (8, 64, 2048, 8)
    assert len(state["norms"]) == 8 and state["norms"][2] == training[0]["grad_norm"]

def test_the_same_command_after_the_end_does_nothing(small):
    config = small()
    train.main(config)
    before = files_of(config, 8), metrics(config)
    train.main(config)
    assert (files_of(config, 8), metrics(config)) == before and status(config)["state"] == "finished"

def test_the_settings_of_an_earlier_start_are_kept(small):
    train.main(small(steps=4))
    train.main(small(lr=5e-3))
    found = {}
    for name in os.listdir(small().out_dir):
        if name.startswith("config") and name.endswith(".json"):
            with open(os.path.join(small().out_dir, name), encoding="utf-8") as f:
                found[name] = json.load(f)["lr"]
    assert found == {"config.json": 5e-3, "config_before_step_00000004.json": 1e-2}

def test_a_changed_architecture_or_data_set_is_refused_and_another_change_printed(small, capsys, tmp_path):
    train.main(small(steps=4, save_every=4))
    for changed, name in [(dict(rank=4), "rank"), (dict(gamma=0.5), "gamma"), (dict(n_ffn=64), "n_ffn"),
                          (dict(linear="dense"), "linear"), (dict(optimizer="muon"), "optimizer")]:
        with pytest.raises(UserError, match=f"{name} was .* when this run began"):
            train.main(small(**changed))
    other = str(tmp_path / "other")
    shutil.copytree(small().data_dir, other)
    tokens = np.array(data.read_shard(os.path.join(other, "train_00000.bin")))[:-1]
    data.write_shard(os.path.join(other, "train_00000.bin"), tokens, 257)
    os.remove(os.path.join(other, "manifest.json"))
    with pytest.raises(UserError, match="data was"):
        train.main(small(data_dir=other))
    train.main(small(lr=1e-4))
    assert "changed: lr 0.01 → 0.0001" in capsys.readouterr().out

def test_never_refuses_a_used_folder_unless_it_may_overwrite(small):
    train.main(small())
    with pytest.raises(UserError, match="not empty: continue with --resume auto"):
        train.main(small(resume="never"))
    stranger = os.path.join(small().out_dir, "notes.txt")
    open(stranger, "w").close()
    train.main(small(resume="never", overwrite=True, steps=2))
    assert losses(small())[-1][0] == 2 and os.path.exists(stranger)

@pytest.mark.parametrize("name, content", [
    ("config.json", '{"model_type": "llama"}'), ("metrics.jsonl", '{"loss": 1}\n'), ("notes.txt", "mine")])
def test_a_folder_with_the_files_of_another_program_is_left_as_it_is(small, name, content):
    config = small()
    os.makedirs(config.out_dir)
    path = os.path.join(config.out_dir, name)
    with open(path, "w", encoding="utf-8") as f:
        f.write(content)
    with pytest.raises(UserError, match="not a run of this program: use another --out_dir"):
        train.main(config)
    assert set(os.listdir(config.out_dir)) == {name, ".lock"}
    assert tree(config.out_dir) == {name: content.encode()}

@pytest.mark.parametrize("path", ["checkpoints/step_00000004", ""])
def test_resuming_from_a_path_takes_that_checkpoint(small, tmp_path, path):
    train.main(small())
    source = str(tmp_path / "source")
    shutil.copytree(small().out_dir, source)
    shutil.rmtree(os.path.join(source, "checkpoints", "step_00000008"))
    other = small(resume=os.path.join(source, path), out_dir=str(tmp_path / "other"))
    train.main(other)
    assert losses(other) == losses(small())[4:] and files_of(other, 8) == files_of(small(), 8)
    # a run of its own is not to be lost for another
    before = checkpoint.checkpoints(small().out_dir)
    with pytest.raises(UserError, match="not empty: continue with --resume auto"):
        train.main(small(resume=other.resume))
    assert checkpoint.checkpoints(small().out_dir) == before and len(losses(small())) == 8
    train.main(small(resume=other.resume, overwrite=True, steps=6))
    assert [step for step, _ in losses(small())] == [5, 6]

def damaged(source):
    os.truncate(os.path.join(source, "checkpoints/step_00000008/optimizer.safetensors"), 100)

def without_state(source):
    os.remove(os.path.join(source, "checkpoints/step_00000008/state.json"))
    os.remove(os.path.join(source, "checkpoints/step_00000008/optimizer.safetensors"))

@pytest.mark.parametrize("damage, changed, message", [
    (damaged, {}, "is damaged"), (without_state, {}, "no training state"),
    (shutil.rmtree, {}, "give an out_dir"), (None, dict(n_ffn=64), "n_ffn was 48"),
    (None, dict(optimizer="muon"), "optimizer was adamw"), (None, dict(warmup=9), "--warmup 9"),
    (None, dict(vocab_size=300), "vocab_size was 257"), (None, dict(data_dir="nowhere"), "run prepare_c4.py"),
], ids=["damaged", "a model alone", "not there", "other sizes", "other optimizer", "a wrong flag",
        "other vocabulary", "no data"])
def test_whatever_refuses_a_start_refuses_before_overwrite_deletes_anything(
        small, tmp_path, damage, changed, message):
    source = small(steps=8, out_dir=str(tmp_path / "source"))
    train.main(source)
    train.main(small(seed=1))
    if damage is not None:
        damage(source.out_dir)
    before = tree(small().out_dir)
    path = os.path.join(source.out_dir, "checkpoints", "step_00000008")
    with pytest.raises(UserError, match=message):
        train.main(small(resume=path, overwrite=True, **changed))
    assert tree(small().out_dir) == before

FAULTS = {
    "no compiler": ("nanolost.run.update", UserError("torch.compile failed")),
    "out of memory": ("nanolost.run.update", MemoryError("out of memory")),
    "diverged": ("nanolost.run.update", FloatingPointError("loss nan")),
    "Ctrl-C": ("nanolost.run.update", KeyboardInterrupt()),
    "a fault of the program": ("nanolost.run.evaluate", TypeError("x")),
    "no room": ("train.out_dir.write_config", OSError("No space left")),
    "a full disk": ("nanolost.checkpoint.Writer.put", OSError("No space left")),
    "an optimizer that is refused": ("nanolost.checkpoint.optimizer_values", UserError("use another")),
    "a failing disk": ("nanolost.checkpoint.put_in_place", OSError("is the disk failing?")),
}

@pytest.mark.parametrize("resume", ["never", "elsewhere", "step_00000004"])
@pytest.mark.parametrize("place, error", FAULTS.values(), ids=list(FAULTS))
def test_a_run_that_ends_before_its_first_save_overwrites_nothing(
        overwritable, small, tmp_path, monkeypatch, place, error, resume):
    old, other = (shutil.copytree(folder, tmp_path / name)
                  for folder, name in zip(overwritable, ("out", "other"), strict=True))
    before = tree(old)
    if resume != "never":
        resume = str((other if resume == "elsewhere" else old) / "checkpoints" / "step_00000004")
    def fail(*args, **kwargs):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(type(error)):
            train.main(small(resume=resume, overwrite=True, steps=6, lr=1e-3))
    after = tree(old)
    for name in set(after) - set(before):
        # a copy of the config.json that is back
        assert name.startswith("config_before_step_") and after.pop(name) == before["config.json"]
    assert after == before
    train.main(small(resume=resume, overwrite=True, steps=6, lr=1e-3))
    assert losses(small())[-1][0] == 6 and step_folder(small(), 8) not in checkpoint.checkpoints(str(old))
    assert not [path for path in old.rglob("*") if path.name.startswith((".overwritten", ".tmp_"))]

@pytest.fixture(scope="module")
def overwritable(data_dir, tmp_path_factory):
    """Folders of two runs of 8 steps with checkpoints of 4 and 8."""
    folders = [tmp_path_factory.mktemp(name) for name in ("old", "other")]
    for folder in folders:
        train.main(resolve({**SMALL, "rank": 8, "data_dir": data_dir, "out_dir": str(folder)}))
    return folders

def test_a_run_that_is_killed_before_its_first_save_has_overwritten_nothing(small):
    train.main(small())
    before = tree(small().out_dir)
    process = launch(small(resume="never", overwrite=True, steps=10**6, save_every=10**6, eval_every=10**6))
    wait_for(process, "step ")
    assert checkpoint.checkpoints(small().out_dir) == []
    process.kill()
    process.wait()
    # finished, it has nothing to do but to be back
    train.main(small())
    assert tree(small().out_dir) == before

def test_going_back_asks_before_it_gives_up_the_steps_after(small):
    train.main(small(steps=12))
    before = tree(small().out_dir)
    path = step_folder(small(), 4)
    with pytest.raises(UserError, match="add --overwrite to delete step_00000008, step_00000012"):
        train.main(small(steps=12, resume=path))
    assert tree(small().out_dir) == before
    train.main(small(steps=6, resume=path, overwrite=True))
    assert [os.path.basename(folder) for folder in checkpoint.checkpoints(small().out_dir)] == [
        "step_00000004", "step_00000006"]
    assert [step for step, _ in losses(small())] == [1, 2, 3, 4, 5, 6]

def test_another_tokenizer_is_refused_for_a_new_run_and_for_an_old_one(small, tmp_path):
    train.main(small(steps=4))
    other = str(tmp_path / "other")
    shutil.copytree(small().data_dir, other)
    mine = Tokenizer.load(os.path.join(other, "tokenizer.json"))
    tokens = mine.engine.vocabulary.tokens()
    Tokenizer.of(tokens[::-1], mine.engine.vocabulary.pattern).save(os.path.join(other, "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json is not the tokenizer that .*other was made with"):
        train.main(small(data_dir=other, out_dir=str(tmp_path / "new")))
    # that could tell
    os.remove(os.path.join(other, "manifest.json"))
    train.main(small(data_dir=other, out_dir=str(tmp_path / "new"), steps=4))
    mine.save(os.path.join(other, "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer_sha256 was .* when this run began"):
        train.main(small(data_dir=other, out_dir=str(tmp_path / "new")))

def test_shards_without_a_manifest_train_when_a_tokenizer_is_named(small, tmp_path):
    folder = tmp_path / "ready"
    folder.mkdir()
    for split in ("train", "val"):
        shutil.copy(f"{small().data_dir}/{split}_00000.bin", folder / f"fineweb_{split}_000001.bin")
    with pytest.raises(UserError, match="say --tokenizer gpt2"):
        train.main(small(data_dir=str(folder)))
    train.main(small(data_dir=str(folder), tokenizer="byte", steps=2))

def test_room_for_the_checkpoints_is_checked_before_the_start(small, monkeypatch):
    config = small()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match="1,000,000 bytes free for 4 more checkpoints of 300,728"):
        train.main(config)
    # three of them fit
    train.main(small(keep=2))

# --- how a command ends ---

def command(config, **kwargs):
    """train.py to its end, with what it wrote on both streams."""
    words = [sys.executable, os.path.join(ROOT, "train.py"), *flags_of(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=environment, **kwargs)

def test_bad_configuration_ends_a_command_with_code_2_and_one_line(small):
    result = command(small(micro_batch=3))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --micro_batch 3")

@pytest.mark.parametrize("variable, value, repair", [
    ("CXX", "/nonexistent", "--compile false.* CXX "), ("TORCHINDUCTOR_CACHE_DIR", "{file}/cache", ""),
    ("TORCHINDUCTOR_CACHE_DIR", "/proc", "--compile false"),
])
def test_no_compiler_or_cache_folder_is_one_line_with_its_repair(small, tmp_path, variable, value, repair):
    (tmp_path / "file").write_text("")
    config = small(compile="true", steps=2)
    result = command(config, env={
        # what other tests have compiled would be found
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        variable: value.format(file=tmp_path / "file")})
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: torch") and "TORCHINDUCTOR_CACHE_DIR" in result.stderr
    assert len(result.stderr) < 500 and re.search(repair, result.stderr)
    if repair:
        # the state of the run says the same
        assert status(config)["state"] == "failed" and "--compile false" in status(config)["reason"]
        assert command(small(steps=2), env={variable: value}).returncode == 0

def test_other_errors_of_the_operating_system_are_not_taken_for_the_compilers():
    for error in (OSError("full"), RuntimeError("a defect")):
        with pytest.raises(type(error)) as caught, failures_with_their_repair():
            raise error
        assert caught.value is error

def test_too_little_memory_of_a_gpu_names_the_flags_that_save_it():
    with pytest.raises(MemoryError, match="Tried 1 GiB. With a smaller --micro_batch") as caught:
        with failures_with_their_repair():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB. Of the allocated …")
    assert "allocated" not in str(caught.value)

@pytest.mark.parametrize("shell", ['"$@" >&-', '"$@" >/dev/full'],
                         ids=["closed", "full"])
def test_a_reader_that_has_seen_enough_or_is_not_there_ends_no_command(small, shell):
    config = small(steps=60)
    words = [sys.executable, os.path.join(ROOT, "train.py"), *flags_of(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", shell, "train", *words], capture_output=True, text=True,
                            env=environment, timeout=PATIENCE)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr
    assert result.returncode == 0 and status(config)["state"] == "finished", result.stderr
    assert len(losses(config)) == 60

# true has gone before anything is written, head may not have
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_dry_run_into_a_reader_that_reads_one_line_or_none_ends_well(small, reader):
    words = [sys.executable, os.path.join(ROOT, "train.py"), *flags_of(small()), "--dry_run"]
    shell = f'"$@" | {reader}; exit "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", shell, "train", *words], capture_output=True, text=True,
                            timeout=PATIENCE)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    if reader == "true":
        assert result.stdout == ""
    else:
        assert result.stdout.startswith("parameters ") and result.stdout.count("\n") == 1

def test_shards_of_nanogpt_are_explained_before_a_tokenizer_is_asked_for(small, tmp_path):
    for split in ("train", "val"):
        np.arange(3000, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="nanoGPT"):
        train.main(small(data_dir=str(tmp_path)))
