"""Checkpoints are whole or absent, verified before use, and hold everything."""
import errno
import json
import math
import os
import pickle
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from lost import apply_lost
from model import Llama, LlamaConfig
from nanolost import checkpoint, files
from nanolost.checkpoint import load_folder, load_model, load_optimizer, save_checkpoint
from nanolost.errors import UserError
from nanolost.tensors import TensorFiles
from nanolost.tokenizer import Tokenizer

FILES = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "tokenizer.json",
         "manifest.json"]
# of a LOST model, for other programs alone
BESIDE = ["tokenizer_config.json", "modeling_lost.py", "lost.py"]
BYTE = Tokenizer.named("byte")
SIZES = dict(vocab_size=257, max_seq_len=16, n_layer=1, n_head=2, n_embd=16, n_ffn=24)
DEEP = b"[" * 100_000

def new_model(kind="lost", seed=0, **sizes):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**SIZES, **sizes}))
    return apply_lost(model, 4, 0.2) if kind == "lost" else model

def adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]

def one_step(model, optimizers, seed=0):
    idx = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

def saved(out_dir, *steps, kind="lost", keep=9, **sizes):
    """The folder of the last of some checkpoints, whose weights tell their step."""
    for step in steps:
        model = new_model(kind, seed=step, **sizes)
        optimizers = adamw(model)
        one_step(model, optimizers)
        state = {"step": step, "config": {}}
        folder = save_checkpoint(str(out_dir), step, model, optimizers, state, BYTE, keep)
    return folder

def folder_of(out_dir, step):
    return os.path.join(str(out_dir), "checkpoints", f"step_{step:08d}")

def names_in(out_dir):
    return sorted(os.listdir(os.path.join(str(out_dir), "checkpoints")))

def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)

def flip(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))

def replace(folder, name, content):
    """Another content under a manifest that agrees with it, as somebody makes it who means harm."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    with open(os.path.join(folder, name), "wb") as f:
        f.write(content)
    manifest = files.read_json(os.path.join(folder, "manifest.json"))
    manifest[name] = files.sha256_file(os.path.join(folder, name))
    with open(os.path.join(folder, "manifest.json"), "w") as f:
        json.dump(manifest, f)

def same_tensors(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)

def step_of(model):
    """The step that `saved` made the weights for."""
    for step in range(1, 20):
        again = new_model(seed=step)
        one_step(again, adamw(again))
        if same_tensors(again.state_dict(), model.state_dict()):
            return step

def one_line(error):
    """The error line that the command would print."""
    line = f"error: {' '.join(str(error.value).split())}"
    assert error.type is UserError and len(line) < 1000, line
    return line

# --- damaged ones ---

@pytest.mark.parametrize("damage", [cut, flip, os.remove])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, file, damage, capsys):
    newest = saved(tmp_path, 4, 8)
    damage(os.path.join(newest, file))
    assert checkpoint.newest_checkpoint(str(tmp_path)) == folder_of(tmp_path, 4)
    assert f"WARNING: {newest} is damaged" in capsys.readouterr().err
    assert load_model(str(tmp_path))[1]["step"] == 4
    with pytest.raises(UserError, match="damaged"):
        load_model(newest)

def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    newest = saved(tmp_path, 4, 8)
    def failing(path):                         # as read() fails on a bad sector, without the name of the file
        if path == os.path.join(newest, "model.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return files.sha256_file(path)
    monkeypatch.setattr(checkpoint, "sha256_file", failing)
    assert checkpoint.verify(newest) == "model.safetensors cannot be read: Input/output error"
    assert checkpoint.newest_checkpoint(str(tmp_path)) == folder_of(tmp_path, 4)

@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks its maps up in /proc")
def test_what_was_loaded_keeps_no_place_on_the_disk(tmp_path):
    folder = saved(tmp_path, 8)
    model, _ = load_model(str(tmp_path))
    load_optimizer(folder, model, adamw(model))
    with open("/proc/self/maps", encoding="utf-8") as f:
        assert str(tmp_path) not in f.read()

def test_training_never_starts_again_silently_when_all_checkpoints_are_damaged(small):
    config = small()
    saved(config.out_dir, 4, 8)
    for step in (4, 8):
        cut(os.path.join(folder_of(config.out_dir, step), "model.safetensors"))
    with pytest.raises(UserError, match="all 2 checkpoints of .* are damaged"):
        train.main(config)
    assert len(checkpoint.checkpoints(config.out_dir)) == 2

def test_a_run_that_went_back_replaces_the_damaged_checkpoint(tmp_path):
    flip(os.path.join(saved(tmp_path, 4, 8), "optimizer.safetensors"))
    assert checkpoint.verify(saved(tmp_path, 8)) is None
    assert names_in(tmp_path) == ["step_00000004", "step_00000008"]

def test_after_going_back_the_new_checkpoint_stays_and_the_abandoned_damaged_ones_go(tmp_path):
    flip(os.path.join(saved(tmp_path, 6, 7, 8, keep=2), "state.json"))
    shutil.copytree(folder_of(tmp_path, 8), folder_of(tmp_path, 12))
    saved(tmp_path, 8, keep=2)
    assert names_in(tmp_path) == ["step_00000007", "step_00000008"]
    assert checkpoint.verify(folder_of(tmp_path, 8)) is None

# --- what is deleted, and what is not ---

def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, *range(1, 9), keep=2)
    assert names_in(tmp_path) == ["step_00000007", "step_00000008"]

def test_steps_are_ordered_as_numbers(tmp_path):
    saved(tmp_path, 99_999_999, 100_000_000, keep=2)
    assert [os.path.basename(f) for f in checkpoint.checkpoints(str(tmp_path))] == [
        "step_99999999", "step_100000000"]

@pytest.mark.parametrize("name", [
    "step_best", "step_5", "step_000000005", "step_00000005.bak", "step_0000000५", "old_step_00000005",
    "step_00000005_copy"])
def test_a_copy_under_a_name_of_the_users_is_neither_the_newest_nor_deleted(tmp_path, name):
    copy = shutil.copytree(saved(tmp_path, 5), tmp_path / "checkpoints" / name)
    saved(tmp_path, 6, 7, keep=1)
    assert checkpoint.checkpoints(str(tmp_path)) == [folder_of(tmp_path, 7)]
    assert load_model(str(tmp_path))[1]["step"] == 7
    assert names_in(tmp_path) == sorted(["step_00000007", name]) and checkpoint.verify(str(copy)) is None

@pytest.mark.parametrize("name", [
    "step_00000099", "step_00000099_before", "step_00000002", "step_00000004_before"])
def test_a_copy_under_the_name_of_another_step_is_neither_the_newest_nor_deleted(tmp_path, name, capsys):
    copy = shutil.copytree(saved(tmp_path, 5), tmp_path / "checkpoints" / name)
    assert checkpoint.newest_checkpoint(str(tmp_path)) == folder_of(tmp_path, 5)
    saved(tmp_path, 6, 7, keep=1)
    assert checkpoint.checkpoints(str(tmp_path)) == [folder_of(tmp_path, 7)]
    assert load_model(str(tmp_path))[1]["step"] == 7
    assert names_in(tmp_path) == sorted(["step_00000007", name])
    assert "it is a copy of step 5" in checkpoint.verify(str(copy))
    assert capsys.readouterr().err.count(f"WARNING: {copy} is a copy of step 5") == 1
    # under the name that it came with it is a checkpoint again
    assert checkpoint.verify(str(shutil.copytree(copy, folder_of(tmp_path, 5)))) is None

def test_a_save_of_the_step_whose_name_a_copy_has_leaves_the_copy_whole(tmp_path):
    shutil.move(saved(tmp_path, 5), folder_of(tmp_path, 6))
    assert checkpoint.verify(saved(tmp_path, 6, keep=1)) is None
    assert names_in(tmp_path) == ["step_00000006", "step_00000006_before"]
    assert load_folder(folder_of(tmp_path, 6) + "_before")[1]["step"] == 5

def test_training_never_starts_again_silently_where_there_are_copies_alone(small):
    config = small()
    train.main(config)
    shutil.rmtree(folder_of(config.out_dir, 4))
    shutil.move(folder_of(config.out_dir, 8), folder_of(config.out_dir, 99))
    with pytest.raises(UserError, match="no checkpoint but copies under the names of other steps"):
        train.main(config)
    assert names_in(config.out_dir) == ["step_00000099"]

def test_retention_leaves_a_good_checkpoint_of_a_later_step(tmp_path):
    saved(tmp_path, 2, 8)
    saved(tmp_path, 4, keep=1)
    assert names_in(tmp_path) == ["step_00000004", "step_00000008"]

@pytest.mark.parametrize("content", [
    {}, {"weights.bin": b"x"}, {"model.safetensors": b"x", "config.json": b"{}"}])
def test_a_folder_of_another_program_under_a_checkpoints_name_is_not_deleted(tmp_path, content, capsys):
    theirs = tmp_path / "checkpoints" / "step_00000001"
    theirs.mkdir(parents=True)
    for name, data in content.items():
        (theirs / name).write_bytes(data)
    saved(tmp_path, 2, 3, keep=1)
    assert names_in(tmp_path) == ["step_00000001", "step_00000003"]
    assert sorted(os.listdir(theirs)) == sorted(content)

def test_nothing_is_deleted_before_the_new_checkpoint_verifies(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "verify", lambda folder, *mine: "a bad disk")
    with pytest.raises(OSError, match="does not read back"):
        saved(tmp_path, 5, keep=1)
    monkeypatch.undo()
    assert checkpoint.verify(folder_of(tmp_path, 4)) is None

class Killed(BaseException):
    """What no handler catches."""

@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(n, work): work() ends at its n-th operation on files; True if it came to its end before."""
    def run(number, work):
        count = 0
        def announced(real):
            def operation(*args, **kwargs):
                nonlocal count
                count += 1
                if count > number:
                    raise Killed
                return real(*args, **kwargs)
            return operation
        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "remove", "chmod"):
                patch.setattr(os, name, announced(getattr(os, name)))
            for place, name in ((checkpoint.Writer, "put"), (checkpoint, "write_json")):
                patch.setattr(place, name, announced(getattr(place, name)))
            try:
                work()
            except Killed:
                return False
        return True
    return run

@pytest.mark.parametrize("step", [8, 9], ids=["its own step", "another step"])
def test_a_kill_at_any_operation_of_a_save_leaves_a_good_checkpoint(tmp_path, killed_at, step):
    before = saved(tmp_path / "before", 8)
    number, done = 0, False
    while not done:
        out = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        done = killed_at(number, lambda out=out: saved(out, step, keep=1))
        model, state = load_model(str(out))
        assert state["step"] in (8, step)
        checkpoint.sweep(str(out))
        saved(out, step, keep=1)
        assert names_in(out) == [f"step_{step:08d}"]
        number += 1
    assert number > 25 and os.path.exists(before)

def test_an_interrupted_replacement_counts_until_the_new_one_is_there(tmp_path):
    final = saved(tmp_path, 4)
    os.rename(final, f"{final}_before")
    assert checkpoint.newest_checkpoint(str(tmp_path)) == f"{final}_before"
    shutil.copytree(f"{final}_before", final)
    assert checkpoint.newest_checkpoint(str(tmp_path)) == final

def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_aside(tmp_path, monkeypatch):
    final = saved(tmp_path, 4)
    shutil.copytree(final, f"{final}_before")
    cut(os.path.join(final, "model.safetensors"))
    rename = os.rename
    def refuse_the_new_one(source, target):
        if ".tmp_step" in source:
            raise OSError("No space left on device")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="cannot save"):
        saved(tmp_path, 4, keep=1)
    assert checkpoint.verify(checkpoint.newest_checkpoint(str(tmp_path))) is None
    monkeypatch.undo()
    saved(tmp_path, 4, keep=1)
    assert names_in(tmp_path) == ["step_00000004"]

# --- file systems that refuse ---

@pytest.fixture
def immutable(monkeypatch):
    """Names of files that no one may delete, as after chattr +i."""
    names, unlink = set(), os.unlink
    def refuse(path, *args, **kwargs):
        if os.path.basename(path) in names:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        return unlink(path, *args, **kwargs)
    monkeypatch.setattr(os, "unlink", refuse)
    return names

def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning_once(tmp_path, immutable, capsys):
    saved(tmp_path, 1)
    fixed = {"config.json", "model.safetensors", "state.json"}
    immutable |= fixed
    saved(tmp_path, 2, keep=1)
    immutable.clear()
    saved(tmp_path, 3, keep=1)                 # that of step 2 goes
    immutable |= fixed
    assert checkpoint.checkpoints(str(tmp_path)) == [folder_of(tmp_path, 3)]
    for _ in range(2):                         # each start sweeps
        checkpoint.sweep(str(tmp_path))
    assert saved(tmp_path, 4, keep=1) == checkpoint.newest_checkpoint(str(tmp_path))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "step_00000001" in line]
    assert len(warnings) == 1 and "cannot delete" in warnings[0] and "Operation not permitted" in warnings[0]
    left = tmp_path / "checkpoints" / ".tmp_old_step_00000001"
    assert set(os.listdir(left)) == fixed      # the room of the others is free

def test_a_checkpoint_that_cannot_be_renamed_stays_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    saved(tmp_path, 1)
    rename = os.rename
    def busy(source, target):                  # a mount point, or a Windows share in use
        if source == folder_of(tmp_path, 1):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)
    monkeypatch.setattr(os, "rename", busy)
    saved(tmp_path, 2, 3, keep=1)
    assert names_in(tmp_path) == ["step_00000001", "step_00000003"]
    assert capsys.readouterr().err.count("step_00000001 stays, it cannot be deleted") == 1

def test_a_link_under_a_checkpoints_name_is_read_but_not_followed_to_delete(tmp_path, capsys):
    archive = shutil.move(saved(tmp_path, 1), tmp_path / "archive")
    os.symlink(archive, folder_of(tmp_path, 1))
    assert load_model(str(tmp_path))[1]["step"] == 1
    saved(tmp_path, 2, 3, keep=1)
    assert checkpoint.verify(str(archive)) is None and os.path.islink(folder_of(tmp_path, 1))
    assert capsys.readouterr().err.count("WARNING") == 1

def test_what_an_earlier_start_could_not_sweep_is_in_nobodys_way(tmp_path, immutable, capsys):
    saved(tmp_path, 1)
    part = tmp_path / "checkpoints" / ".tmp_step_00000002"
    part.mkdir()
    (part / ".nfs0001").write_bytes(b"")
    immutable.add(".nfs0001")
    checkpoint.sweep(str(tmp_path))
    assert checkpoint.verify(saved(tmp_path, 2)) is None and part.exists()

def test_a_sweep_takes_what_this_program_left_and_nothing_else(tmp_path):
    saved(tmp_path, 1)
    home = tmp_path / "checkpoints"
    ours = [".tmp_step_00000004", ".tmp_step_00000004_2", ".tmp_old_step_00000004",
            ".tmp_old_step_00000004_before", ".tmp_old_step_00000004_before_2_3"]
    theirs = [".tmp_notes", ".tmp_step_best", ".tmp_step_00000005_mine"]
    for name in (*ours, *theirs):
        (home / name).mkdir()
        (home / name / "file").write_bytes(b"")
    os.symlink(home / ".tmp_notes", home / ".tmp_step_00000006")
    checkpoint.sweep(str(tmp_path))
    assert names_in(tmp_path) == sorted([*theirs, ".tmp_step_00000006", "step_00000001"])
    assert (home / ".tmp_notes" / "file").exists()

def test_a_folder_that_cannot_be_synced_ends_no_save(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []
    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", only_files)
    assert checkpoint.verify(saved(tmp_path, 1)) is None and len(refused) >= 3

def test_every_file_and_folder_of_a_save_is_synced(tmp_path, monkeypatch):
    fsync, synced = os.fsync, set()
    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", note)
    folder = saved(tmp_path, 1)
    paths = [os.path.join(folder, name) for name in [*FILES, *BESIDE]]
    paths += [folder, tmp_path / "checkpoints", tmp_path]
    assert {os.stat(path).st_ino for path in paths} <= synced

@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_all_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = saved(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}
    assert modes == dict.fromkeys([*FILES, *BESIDE], 0o666 & ~mask)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o777 & ~mask

# --- the optimizers' state ---

class CountsInPython(torch.optim.Optimizer):
    """State of all kinds of values that are no tensors, and one counter that all parameters share."""

    def __init__(self, params):
        super().__init__(params, {})
        self.shared = torch.tensor(0.0)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["rate"] = state.get("rate", 0.1) * 0.7
                state["warm"] = state["step"] > 1
                state["nothing"] = None
                state["shared"] = self.shared
                p.sub_(p.grad * state["rate"] / state["step"])

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
    "python": CountsInPython,
}

@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_from_its_saved_state_bit_for_bit(tmp_path, name):
    model = new_model()
    straight = [OPTIMIZERS[name](list(model.parameters()))]
    one_step(model, straight)
    folder = save_checkpoint(str(tmp_path), 1, model, straight, {}, BYTE, 1)
    again, _ = load_folder(folder)
    resumed = [OPTIMIZERS[name](list(again.parameters()))]
    load_optimizer(folder, again, resumed)
    second = save_checkpoint(str(tmp_path), 2, again, resumed, {}, BYTE, 2)
    moments = [open(os.path.join(f, "optimizer.safetensors"), "rb").read() for f in (folder, second)]
    assert moments[0] == moments[1]
    for number in range(2, 4):
        one_step(model, straight, number)
        one_step(again, resumed, number)
    assert same_tensors(model.state_dict(), again.state_dict())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        one, other = straight[0].state.get(p, {}), resumed[0].state.get(q, {})
        assert {key: type(value) for key, value in one.items()} == {k: type(v) for k, v in other.items()}
        assert all(value is None or value == other[key] if not torch.is_tensor(value)
                   else torch.equal(value, other[key]) for key, value in one.items())

def test_a_parameter_that_is_not_trained_needs_no_state(tmp_path):
    model = new_model()
    model.lm_head.weight.requires_grad_(False)
    optimizers = adamw(model)
    one_step(model, optimizers)
    folder = save_checkpoint(str(tmp_path), 1, model, optimizers, {}, BYTE, 1)
    load_optimizer(folder, model, adamw(model))

@pytest.mark.parametrize("make, word", [
    (lambda p: torch.optim.LBFGS(p, history_size=2), "LBFGS"),
])
def test_an_optimizer_whose_state_a_checkpoint_cannot_hold_is_named(tmp_path, make, word):
    model = new_model()
    optimizer = make(list(model.parameters()))
    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(8)[None], torch.arange(1, 9)[None])[1]
        loss.backward()
        return loss
    optimizer.step(closure)
    with pytest.raises(UserError, match=f"{word}.* use another optimizer"):
        save_checkpoint(str(tmp_path), 1, model, [optimizer], {}, BYTE, 1)
    assert not os.path.exists(tmp_path / "checkpoints")

def test_the_optimizer_comes_back_whole(tmp_path):
    folder = saved(tmp_path, 8)
    model, _ = load_model(folder)
    optimizers = adamw(model)
    load_optimizer(folder, model, optimizers)
    again = checkpoint.optimizer_tensors(model, optimizers)
    stored = load_file(os.path.join(folder, "optimizer.safetensors"))
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    names = {name.rpartition(".")[2] for name in stored}
    assert names == {"step", "exp_avg", "exp_avg_sq"} and len(stored) == 3 * len(list(model.parameters()))

def test_a_file_from_before_there_were_notes_loads(tmp_path):
    folder = saved(tmp_path, 8)
    path = os.path.join(folder, "optimizer.safetensors")
    before = load_file(path)
    save_file(before, path)
    model, _ = load_folder(folder)
    optimizers = adamw(model)
    load_optimizer(folder, model, optimizers)
    after = checkpoint.optimizer_tensors(model, optimizers)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)

@pytest.mark.parametrize("tensors", [{"lm_head.weight.exp_avg": torch.zeros(1)}, {}])
def test_state_that_is_missing_is_another_optimizers(tmp_path, tensors):
    folder = saved(tmp_path, 8)
    save_file(tensors, os.path.join(folder, "optimizer.safetensors"))
    model, _ = load_folder(folder)
    with pytest.raises(UserError, match="no optimizer state for"):
        load_optimizer(folder, model, adamw(model))

@pytest.mark.parametrize("old, new", [("sgd", "adamw"), ("adamw", "sgd"), ("momentum", "adagrad")])
def test_the_state_of_another_optimizer_is_refused_also_where_one_has_none(tmp_path, old, new):
    model = new_model()
    optimizers = [OPTIMIZERS[old](list(model.parameters()))]
    one_step(model, optimizers)
    folder = save_checkpoint(str(tmp_path), 1, model, optimizers, {}, BYTE, 1)
    with pytest.raises(UserError, match="train with the --optimizer"):
        load_optimizer(folder, model, [OPTIMIZERS[new](list(model.parameters()))])

@pytest.mark.parametrize("notes", [
    "{", "[]", DEEP.decode(), '{"values": []}', '{"values": {"lm_head.weight": 1}}',
    '{"optimizers": {"a": 1}, "values": {}}'], ids=lambda notes: notes[:30])
def test_notes_that_are_none_are_refused(tmp_path, notes):
    folder = saved(tmp_path, 8)
    path = os.path.join(folder, "optimizer.safetensors")
    save_file(load_file(path), path, {"nanolost": notes})
    model, _ = load_folder(folder)
    with pytest.raises(UserError, match=path if "optimizers" not in notes else "train with the --optimizer"):
        load_optimizer(folder, model, adamw(model))

def change_state(folder, change):
    """Other tensors and notes in optimizer.safetensors, under a manifest that agrees with them."""
    path = os.path.join(folder, "optimizer.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        notes = json.loads(f.metadata()["nanolost"])
    change(tensors, notes)
    save_file(tensors, path, {"nanolost": json.dumps(notes)})
    with open(path, "rb") as f:
        replace(folder, "optimizer.safetensors", f.read())

W = "model.layers.0.mlp.up_proj.A"
STRANGE_STATES = {
    "too small": lambda t, n: t.update({f"{W}.exp_avg": torch.zeros(1)}),
    "a number": lambda t, n: t.update({f"{W}.exp_avg": torch.zeros(())}),
    "transposed": lambda t, n: t.update({f"{W}.exp_avg": t[f"{W}.exp_avg"].T.contiguous()}),
    "flat": lambda t, n: t.update({f"{W}.exp_avg_sq": t[f"{W}.exp_avg_sq"].flatten()}),
    "empty": lambda t, n: t.update({f"{W}.exp_avg_sq": torch.zeros(0)}),
    "a step a weight": lambda t, n: t.update({f"{W}.step": torch.ones(t[f"{W}.exp_avg"].shape)}),
    "half": lambda t, n: t.update({f"{W}.exp_avg": t[f"{W}.exp_avg"].half()}),
    "double": lambda t, n: t.update({f"{W}.exp_avg": t[f"{W}.exp_avg"].double()}),
    "whole": lambda t, n: t.update({f"{W}.exp_avg": t[f"{W}.exp_avg"].int()}),
    "a whole step": lambda t, n: t.update({f"{W}.step": torch.tensor(1)}),
    "complex": lambda t, n: t.update({f"{W}.exp_avg": t[f"{W}.exp_avg"].to(torch.complex64)}),
    "missing": lambda t, n: t.pop(f"{W}.exp_avg"),
    "no step": lambda t, n: t.pop(f"{W}.step"),
    "none at all": lambda t, n: [t.pop(f"{W}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")]
                                and n["values"].update({W: {}}),
    "a note for a tensor": lambda t, n: t.pop(f"{W}.step") is None or n["values"].update({W: {"step": 1}}),
    "one more": lambda t, n: t.update({f"{W}.momentum_buffer": t[f"{W}.exp_avg"].clone()}),
    "one more note": lambda t, n: n["values"].update({W: {"rate": 0.1}}),
    "not a number": lambda t, n: t[f"{W}.exp_avg"].flatten()[3:4].fill_(math.nan),
    "a step that is none": lambda t, n: t[f"{W}.step"].fill_(math.nan),
    "an infinite step": lambda t, n: t[f"{W}.step"].fill_(math.inf),
    "a negative step": lambda t, n: t[f"{W}.step"].fill_(-1),
    "a negative square": lambda t, n: t[f"{W}.exp_avg_sq"].flatten()[3:4].fill_(-1),
    "an unknown one": lambda t, n: t.update({"nowhere.weight.exp_avg": torch.zeros(1)}),
    "no name": lambda t, n: t.update({"exp_avg": torch.zeros(1)}),
    "an unknown note": lambda t, n: n["values"].update({"nowhere": {}}),
}

@pytest.mark.parametrize("change", STRANGE_STATES.values(), ids=STRANGE_STATES)
def test_state_that_the_optimizer_cannot_have_written_is_refused_by_name(tmp_path, change):
    folder = saved(tmp_path, 8)
    change_state(folder, change)
    model, _ = load_model(folder)
    with pytest.raises(ValueError) as error:
        load_optimizer(folder, model, adamw(model))
    line = one_line(error)
    assert folder in line and any(name in line for name in (W, "nowhere", "''")), line

@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sgd", "python")])
@pytest.mark.parametrize("change", [lambda t: t.reshape(-1)[:1].clone(), lambda t: t[None].clone(),
                                    lambda t: t.double()], ids=["first", "deeper", "double"])
def test_no_optimizer_takes_a_tensor_of_another_shape_or_dtype(tmp_path, name, change):
    model = new_model()
    optimizers = [OPTIMIZERS[name](list(model.parameters()))]
    one_step(model, optimizers)
    folder = save_checkpoint(str(tmp_path), 1, model, optimizers, {}, BYTE, 1)
    stored = load_file(os.path.join(folder, "optimizer.safetensors"))
    for key in {key.rpartition(".")[2]: key for key in stored if key.startswith(W)}.values():
        tensor = change(stored[key])
        if tensor.shape == stored[key].shape and tensor.dtype == stored[key].dtype:
            continue
        change_state(folder, lambda t, n, key=key, tensor=tensor: t.update({**stored, key: tensor}))
        with pytest.raises(UserError, match=f"the state of {W}: '{key.rpartition('.')[2]}' is"):
            load_optimizer(folder, model, [OPTIMIZERS[name](list(model.parameters()))])

def test_a_look_at_what_an_optimizer_makes_changes_nothing(tmp_path):
    model = new_model()
    optimizer = adamw(model)[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = checkpoint.state_made(optimizer, optimizer.param_groups[0], model.lm_head.weight)
    assert made["exp_avg"].shape == model.lm_head.weight.shape and made["step"].dim() == 0
    assert same_tensors(before, dict(model.named_parameters())) and not optimizer.state
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])
    assert len(optimizer.param_groups[0]["params"]) == len(before)

class KeepsMoreLater(torch.optim.SGD):
    """From its second step on a sum of squares and a number for each parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            if state["step"] > 1:
                state["squares"] = state.get("squares", torch.zeros_like(p)) + p.grad ** 2
                state["norm"] = p.norm()
        super().step()

def test_state_that_comes_after_the_first_step_is_restored_where_it_fits(tmp_path):
    model = new_model()
    optimizer = KeepsMoreLater(list(model.parameters()), lr=0.1)
    one_step(model, [optimizer])
    one_step(model, [optimizer])
    folder = save_checkpoint(str(tmp_path), 1, model, [optimizer], {}, BYTE, 1)
    again = KeepsMoreLater(list(model.parameters()), lr=0.1)
    load_optimizer(folder, model, [again])
    for p, state in optimizer.state.items():
        assert torch.equal(again.state[p]["squares"], state["squares"])
    change_state(folder, lambda t, n: t.update({f"{W}.squares": torch.zeros(1)}))
    with pytest.raises(UserError, match=f"the state of {W}: 'squares' is"):
        load_optimizer(folder, model, [again])

# --- which files count ---

def test_ours_loads_exactly_the_files_of_its_manifest(tmp_path):
    folder = saved(tmp_path, 3, 4)
    real = load_file(os.path.join(folder, "model.safetensors"))
    zeros = {name: torch.zeros_like(t) for name, t in real.items()}
    for name in ("model_ema.safetensors", "model-00001-of-00002.safetensors", "modelx.safetensors"):
        save_file(zeros, os.path.join(folder, name))
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"weight_map": dict.fromkeys(zeros, "model_ema.safetensors")}, f)
    assert step_of(load_model(folder)[0]) == step_of(load_model(str(tmp_path))[0]) == 4

def dense_folder(tmp_path):
    """A model folder of another program, and its tensors."""
    folder = tmp_path / "hf"
    folder.mkdir()
    model = new_model("dense")
    (folder / "config.json").write_text(json.dumps(checkpoint.config_json(model, 256)))
    return folder, checkpoint.model_tensors(model)

def sharded(folder, tensors, **files_of):
    """The tensors in two files, as their index says."""
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part} | files_of
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(parts)

def test_of_a_foreign_folder_one_file_counts_or_those_of_the_index(tmp_path):
    folder, tensors = dense_folder(tmp_path)
    zeros = {name: torch.zeros_like(t) for name, t in tensors.items()}
    sharded(folder, tensors)
    save_file(zeros, folder / "model_old.safetensors")
    save_file(zeros, folder / "model-00003-of-00002.safetensors")
    assert same_tensors(dict(load_model(str(folder))[0].named_parameters()), tensors)
    save_file(zeros, folder / "model.safetensors")         # what transformers would take
    assert not any(p.any() for p in load_model(str(folder))[0].parameters())

def test_a_missing_shard_is_named(tmp_path):
    folder, tensors = dense_folder(tmp_path)
    second = sharded(folder, tensors)[1]
    os.remove(folder / second)
    with pytest.raises(UserError, match=f"lacks {second}, which .* names"):
        load_model(str(folder))

def test_a_tensor_in_two_files_comes_from_the_one_that_the_index_says(tmp_path):
    folder, tensors = dense_folder(tmp_path)
    first, second = sharded(folder, tensors)
    name = list(tensors)[0]                    # is the first file's
    save_file({**load_file(folder / second), name: torch.zeros_like(tensors[name]), "extra": torch.ones(1)},
              folder / second)
    assert same_tensors(dict(load_model(str(folder))[0].named_parameters()), tensors)

def test_a_tensor_that_the_index_promises_in_vain_is_named(tmp_path):
    folder, tensors = dense_folder(tmp_path)
    sharded(folder, tensors, **{list(tensors)[0]: "model-00002-of-00002.safetensors"})
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors lacks model.embed_tokens.weight"):
        load_model(str(folder))

@pytest.mark.parametrize("index", [
    b"", b"[]", b"{}", DEEP, b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {}}',
    b'{"weight_map": {"a": "../x.safetensors"}}', b'{"weight_map": {"a": "/dev/zero"}}',
    b'{"weight_map": {"a": ["b"]}}', b'{"weight_map": {"a": null}}'], ids=lambda data: repr(data[:40]))
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path, index):
    folder, _ = dense_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match=str(folder)):
        load_model(str(folder))

@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("thing", ["/dev/zero", "a pipe", "a folder"])
def test_weights_that_are_no_file_are_refused_at_once(tmp_path, name, thing):
    folder = saved(tmp_path, 8)
    path = os.path.join(folder, name)
    os.remove(path)
    if thing == "a pipe":
        os.mkfifo(path)
    elif thing == "a folder":
        os.mkdir(path)
    else:
        os.symlink(thing, path)
    assert checkpoint.verify(folder).startswith(f"{name} cannot be read")
    with pytest.raises(UserError, match=f"cannot read {path}"):
        TensorFiles.of(path)

# --- what somebody else has written ---

NAMES = dict.fromkeys(FILES[:-1], "0" * 64)

@pytest.mark.parametrize("manifest", [
    b"", b"{}", b"[]", b"null", b'"x"', DEEP, b'{"a": ' * 100_000, b"\xff", json.dumps(NAMES).encode()[:-1],
    *(json.dumps({**NAMES, name: "0"}).encode() for name in ("../x", "/dev/zero", "a/b", "..", "", "a\nb")),
    *(json.dumps({k: v for k, v in NAMES.items() if k != name}).encode() for name in FILES[:-1]),
    *(json.dumps({**NAMES, "config.json": value}).encode() for value in (None, 1, [], {})),
], ids=lambda data: repr(data[:40]))
def test_a_manifest_that_does_not_name_what_is_there_verifies_nothing(tmp_path, manifest, monkeypatch):
    folder = saved(tmp_path, 8)
    with open(os.path.join(folder, "manifest.json"), "wb") as f:
        f.write(manifest)
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: hashed.append(path) or "0" * 64)
    fault = checkpoint.verify(folder)
    assert fault is not None and all(os.path.dirname(path) == folder for path in hashed)
    with pytest.raises(UserError, match="is damaged"):
        load_model(folder)

CONFIGS = [
    b"", b"[]", b"null", b"{}", DEEP, b'{"a": ' * 100_000, b"\xff\xfe",
    dict(num_attention_heads=0), dict(num_attention_heads=-1), dict(num_attention_heads="two"),
    dict(hidden_size=None), dict(hidden_size=[16]), dict(hidden_size=10**30), dict(num_hidden_layers=10**9),
    dict(num_hidden_layers=1.5), dict(num_hidden_layers=3), dict(vocab_size={}), dict(vocab_size=10**12),
    dict(rms_norm_eps="x"), dict(rope_parameters=[1]), dict(rope_scaling="x"), dict(tie_word_embeddings=3),
    dict(model_type="granite"), dict(model_type=[]), dict(hidden_act={}),
    dict(lost=[]), dict(lost="x"), dict(lost=None), dict(lost={"nowhere.to": {}}), dict(lost={"": {}}),
]
LAYERS = [
    [], 1, {}, {"unknown": 1}, {"kind": "nothing"}, {"kind": []}, {"rank": 0}, {"rank": "x"},
    {"rank": 10**30}, {"rank": None}, {"k": -1}, {"k": 10**9}, {"k": 1.5}, {"gamma": 2}, {"gamma": "x"},
    {"gamma": None}, {"activation": "gelu"}, {"activation": []}, {"in_features": -5}, {"in_features": 10**30},
    {"out_features": 0}, {"bias": True}, {"in_features": 32}, {"learn_gamma": True},
]

@pytest.mark.parametrize("content", CONFIGS, ids=lambda content: repr(content)[:40])
def test_a_config_json_of_anybody_is_refused_in_one_line(tmp_path, content):
    folder = saved(tmp_path, 8)
    if isinstance(content, dict):
        content = files.read_json(os.path.join(folder, "config.json")) | content
    replace(folder, "config.json", content)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert folder in one_line(error)

@pytest.mark.parametrize("settings", LAYERS, ids=lambda content: repr(content)[:40])
def test_settings_of_a_layer_of_anybody_are_refused_in_one_line(tmp_path, settings):
    folder = saved(tmp_path, 8)
    config = files.read_json(os.path.join(folder, "config.json"))
    name = "model.layers.0.mlp.up_proj"
    if isinstance(settings, dict) and settings:
        settings = config["lost"][name] | settings
    config["lost"][name] = settings
    replace(folder, "config.json", config)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert folder in one_line(error)

@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", DEEP, b"\xff"], ids=lambda x: repr(x[:9]))
def test_a_state_json_that_is_none_is_refused_in_one_line(tmp_path, content):
    folder = saved(tmp_path, 8)
    replace(folder, "state.json", content)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert f"cannot read {folder}/state.json" in one_line(error)

@pytest.mark.parametrize("change", [
    lambda t: t.pop("model.norm.weight"), lambda t: t.update(extra=torch.zeros(1)),
    lambda t: t.update({"model.norm.weight": torch.ones(17)}),
    lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}),
    lambda t: t.update({"model.layers.0.mlp.up_proj.index": torch.zeros(3)}),
    lambda t: t.update({"model.layers.0.mlp.up_proj.index": torch.arange(3)}),
    lambda t: t.update({"model.layers.0.mlp.up_proj.index": torch.tensor([0, 1, 16], dtype=torch.int32)}),
    lambda t: t.update({"model.layers.0.mlp.up_proj.index": torch.tensor([0, 0, 1], dtype=torch.int32)}),
], ids=["missing", "unknown", "shape", "whole numbers", "floats", "64 bits", "outside", "index twice"])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change):
    folder = saved(tmp_path, 8)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    assert tensors["model.layers.0.mlp.up_proj.index"].shape == (3,)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_folder(folder)
    assert folder in one_line(error)

def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    folder = saved(tmp_path, 8)
    config = files.read_json(os.path.join(folder, "config.json"))
    replace(folder, "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match="do not fit its config.json: .* is missing"):
        load_model(folder)

def test_pickles_are_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    for name in ("pytorch_model.bin", "model.pt"):
        with open(tmp_path / name, "wb") as f:
            pickle.dump({"w": Trap()}, f)
        with pytest.raises(UserError, match="is a file.*convert it to safetensors"):
            load_model(str(tmp_path / name))
    with pytest.raises(UserError, match="no checkpoint in .*pickled checkpoints are refused"):
        load_model(str(tmp_path))
    shutil.copy(tmp_path / "model.pt", tmp_path / "model.safetensors")         # a pickle under a trusted name
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_json(new_model(), 256)))
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        load_model(str(tmp_path))
    assert not os.path.exists(tmp_path / "ran")

def test_a_folder_names_the_end_of_text_and_may_hold_the_rotary_buffers_of_old_ones(tmp_path):
    folder = saved(tmp_path, 4, kind="dense")
    hf = files.read_json(os.path.join(folder, "config.json"))
    assert hf["bos_token_id"] == hf["eos_token_id"] == 256
    model, _ = load_folder(folder)
    old = {**checkpoint.model_tensors(model), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(old, os.path.join(folder, "model.safetensors"))
    assert same_tensors(load_folder(folder)[0].state_dict(), model.state_dict())

@pytest.mark.parametrize("tied, skip", [(False, ("lm_head",)), (True, ("lm_head",)), (False, ())],
                         ids=["of its own", "tied", "of low rank"])
def test_a_head_of_any_kind_is_saved_and_loaded(tmp_path, tied, skip):
    torch.manual_seed(0)
    model = apply_lost(Llama(LlamaConfig(**SIZES, tie_embeddings=tied)), 4, 0.2, skip=skip)
    folder = save_checkpoint(str(tmp_path), 1, model, [], {}, BYTE, 1)
    again, _ = load_model(folder)
    assert same_tensors(again.state_dict(), model.state_dict())
    assert len(list(again.parameters())) == len(list(model.parameters()))

@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    with pytest.raises(UserError, match=f"no checkpoint in {path}"):
        load_model(path)
