"""A run uses a folder that is empty or its own, and deletes what it made, when it is asked to."""
import errno
import json
import os
import shutil

import pytest
import torch

from model import Llama, LlamaConfig
from nanolost import checkpoint, out_dir
from nanolost.checkpoint import save_checkpoint
from nanolost.errors import UserError
from nanolost.out_dir import (
    check_space,
    choose_checkpoint,
    end_overwrite,
    make_way,
    overwriting,
    write_config,
)
from nanolost.settings import Config
from nanolost.tokenizer import Tokenizer

BYTE = Tokenizer.named("byte")
MODEL = Llama(LlamaConfig(vocab_size=257, max_seq_len=8, n_layer=1, n_head=1, n_embd=4, n_ffn=4))
CONFIG = dict(vars(Config()), lr=0.1)

def save(folder, *steps, state=None):
    for step in steps:
        content = {"step": step, "config": {}} if state is None else state
        save_checkpoint(str(folder), step, MODEL, [torch.optim.SGD(MODEL.parameters())], content, BYTE, 99)

def a_run(folder, *steps):
    """The folder of a run with checkpoints of some steps."""
    os.makedirs(folder, exist_ok=True)
    (folder / ".lock").write_text("1 on here")
    save(folder, *steps)
    write_config(str(folder), CONFIG)
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 8, "reason": ""}))
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    return folder

def step_folder(folder, step):
    return str(folder / "checkpoints" / f"step_{step:08d}")

def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(str(folder))]

def tree(folder):
    """All that is in a folder: the bytes of each file, the target of each link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found

@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder

# --- whose folder ---

FOREIGN = {
    "a model's config.json": ("config.json", '{"model_type": "llama", "hidden_size": 64}'),
    "a config.json with some of our keys": ("config.json", '{"out_dir": "out", "lr": 1, "steps": 3}'),
    "a config.json that is none": ("config.json", "[" * 100_000),
    "metrics": ("metrics.jsonl", '{"loss": 1}\n'),
    "a status": ("status.json", '{"state": "green"}'),
    "notes": ("notes.txt", "mine"),
    "an empty file": ("notes.txt", ""),
    "a checkpoint of another name": ("checkpoints/last.ckpt", "x"),
    "a config of before": ("config_before_step_00000001.json", "{}"),
}

@pytest.mark.parametrize("resume", ["auto", "never", "PATH"])
@pytest.mark.parametrize("name, content", FOREIGN.values(), ids=list(FOREIGN))
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(here, tmp_path, name, content, resume):
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text(content)
    before = tree(here)
    path = str(a_run(tmp_path / "other", 4)) if resume == "PATH" else resume
    with pytest.raises(UserError, match="is not empty and not a run of this program: use another --out_dir"):
        choose_checkpoint(str(here), path, False)
    assert tree(here) == before

@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "status.json"])
def test_overwrite_does_not_mean_the_files_of_another_program(here, name):
    (here / name).write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not a run of this program"):
        choose_checkpoint(str(here), "never", True)

def test_overwrite_leaves_what_is_no_runs(here):
    (here / "notes.txt").write_text("mine")
    assert choose_checkpoint(str(here), "never", True) is None
    before = tree(here)
    make_way(str(here), None, "never", True)
    assert tree(here) == before

@pytest.mark.parametrize("names", [
    [], [".lock"], [".lock", "config.json.tmp"], [".lock", "status.json.tmp", "metrics.jsonl"],
    ["checkpoints/"]])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_folder_and_one_of_a_run_that_died_as_it_began_are_used(here, names, resume):
    for name in names:
        (here / name).mkdir() if name.endswith("/") else (here / name).touch()
    assert choose_checkpoint(str(here), resume, False) is None

@pytest.mark.parametrize("traces", [
    ["config.json"], ["status.json"], ["status.json", "metrics.jsonl"], ["config.json", "notes.txt"]])
def test_a_run_without_a_checkpoint_begins_again(here, tmp_path, traces):
    a_run(tmp_path / "run")
    for name in set(traces) - {"notes.txt"}:
        shutil.copy(tmp_path / "run" / name, here)
    if "notes.txt" in traces:
        (here / "notes.txt").touch()
    assert choose_checkpoint(str(here), "auto", False) is None

def test_checkpoints_alone_are_a_run(here):
    save(here, 2, 4)
    assert choose_checkpoint(str(here), "auto", False) == step_folder(here, 4)
    with pytest.raises(UserError, match="not empty: continue with --resume auto"):
        choose_checkpoint(str(here), "never", False)
    (here / "metrics.jsonl").touch()
    assert choose_checkpoint(str(here), "never", True) is None

def test_a_damaged_config_json_does_not_take_the_checkpoints_away(here):
    a_run(here, 4)
    (here / "config.json").write_text("{")
    assert choose_checkpoint(str(here), "auto", False) == step_folder(here, 4)
    write_config(str(here), CONFIG)
    assert (here / "config_before_step_00000004.json").read_text() == "{"

@pytest.mark.parametrize("overwrite", [False, True])
def test_something_else_called_checkpoints_is_said_before_the_first_save(here, overwrite):
    (here / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is not a folder"):
        choose_checkpoint(str(here), "never", overwrite)
    os.remove(here / "checkpoints")
    os.symlink("nowhere", here / "checkpoints")
    with pytest.raises(UserError, match="checkpoints is not a folder"):
        choose_checkpoint(str(here), "auto", overwrite)

# --- where a run begins ---

def model_alone(tmp_path):
    folder = tmp_path / "alone"
    save(folder, 4)
    for name in ("state.json", "optimizer.safetensors", "manifest.json"):
        os.remove(step_folder(folder, 4) + "/" + name)
    return step_folder(folder, 4)

def without_config(tmp_path):
    save(tmp_path / "bare", 4, state={"step": 4})
    return str(tmp_path / "bare")

def damaged(tmp_path):
    save(tmp_path / "damaged", 4)
    os.truncate(step_folder(tmp_path / "damaged", 4) + "/model.safetensors", 10)
    return step_folder(tmp_path / "damaged", 4)

def pickled(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80")
    return str(tmp_path / "model.pt")

UNUSABLE = {
    "nowhere": lambda tmp_path: str(tmp_path / "nowhere"),
    "a model alone": model_alone,
    "no config": without_config,
    "damaged": damaged,
    "all damaged": lambda tmp_path: os.path.dirname(os.path.dirname(damaged(tmp_path))),
    "a pickle": pickled,
}

@pytest.mark.parametrize("make", UNUSABLE.values(), ids=list(UNUSABLE))
def test_an_unusable_path_deletes_nothing_also_with_overwrite(here, tmp_path, make):
    a_run(here, 2, 4)
    path, before = make(tmp_path), tree(here)
    with pytest.raises(UserError):
        choose_checkpoint(str(here), path, True)
    assert tree(here) == before

@pytest.mark.parametrize("resume", ["auto", "never", "elsewhere", "inside", "the newest", "copy"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_choosing_deletes_nothing(here, tmp_path, resume, overwrite):
    a_run(here, 2, 4)
    shutil.copytree(step_folder(here, 2), here / "checkpoints" / "step_best")
    paths = {"elsewhere": str(a_run(tmp_path / "other", 3)), "inside": step_folder(here, 2),
             "the newest": step_folder(here, 4), "copy": str(here / "checkpoints" / "step_best")}
    before = tree(here)
    try:
        choose_checkpoint(str(here), paths.get(resume, resume), overwrite)
    except UserError:
        assert not overwrite and resume not in ("auto", "the newest")
    else:
        assert overwrite or resume in ("auto", "the newest")
    assert tree(here) == before

def test_never_refuses_a_used_folder_unless_it_may_overwrite(here):
    a_run(here, 4)
    with pytest.raises(UserError, match="not empty: continue with --resume auto, delete its run"):
        choose_checkpoint(str(here), "never", False)
    assert choose_checkpoint(str(here), "never", True) is None

def test_a_run_from_elsewhere_does_not_take_the_place_of_one_that_is_here(here, tmp_path):
    other = a_run(tmp_path / "other", 3)
    assert choose_checkpoint(str(here), str(other), False) == step_folder(other, 3)
    write_config(str(here), CONFIG)            # killed before its first save: the same command again
    assert choose_checkpoint(str(here), str(other), False) == step_folder(other, 3)
    save(here, 4)
    with pytest.raises(UserError, match="not empty: continue with --resume auto"):
        choose_checkpoint(str(here), str(other), False)
    folder = choose_checkpoint(str(here), str(other), True)
    make_way(str(here), folder, str(other), True)
    assert folder == step_folder(other, 3) and steps(here) == [] and steps(other) == [3]

@pytest.mark.parametrize("linked", [False, True], ids=["here", "checkpoints on another disk"])
@pytest.mark.parametrize("name", ["step_00000002", "step_best"])
def test_a_runs_future_goes_only_when_that_is_asked_for(here, tmp_path, linked, name):
    if linked:
        (tmp_path / "big").mkdir()
        os.symlink(tmp_path / "big", here / "checkpoints")
    a_run(here, 2, 6, 8)
    if name == "step_best":
        shutil.copytree(step_folder(here, 2), here / "checkpoints" / name)
    path = str(here / "checkpoints" / name)
    with pytest.raises(UserError, match="not the newest .* to delete step_00000006, step_00000008 and c"):
        choose_checkpoint(str(here), path, False)
    make_way(str(here), path, path, False)
    assert steps(here) == [2, 6, 8]
    assert choose_checkpoint(str(here), path, True) == path
    make_way(str(here), path, path, True)
    assert steps(here) == [2] and os.path.exists(path) and (here / "metrics.jsonl").exists()
    save(here, 3)
    end_overwrite(str(here))
    assert steps(here) == [2, 3] and no_trace(here)

def test_the_newest_good_one_may_be_named_although_later_ones_are_damaged(here):
    a_run(here, 4, 8)
    os.truncate(step_folder(here, 8) + "/model.safetensors", 10)
    for overwrite in (False, True):
        assert choose_checkpoint(str(here), step_folder(here, 4), overwrite) == step_folder(here, 4)
    assert choose_checkpoint(str(here), str(here), False) == step_folder(here, 4)

@pytest.mark.parametrize("where", ["other", "checkpoints/other", "other/checkpoints/step_00000003"])
def test_a_run_in_a_folder_inside_is_another_run(here, where):
    a_run(here, 2, 4)
    inside = here / where.partition("/checkpoints/step")[0]
    a_run(inside, 3)
    path, before = str(here / where), tree(here)
    with pytest.raises(UserError, match="not empty: continue with --resume auto"):
        choose_checkpoint(str(here), path, False)
    assert tree(here) == before
    folder = choose_checkpoint(str(here), path, True)
    make_way(str(here), folder, path, True)
    assert folder == step_folder(inside, 3) and steps(here) == [] and steps(inside) == [3]

@pytest.mark.parametrize("name", [
    "config.json", "status.json", "metrics.jsonl", "config.json.tmp", "metrics.jsonl.tmp", "status.json.tmp",
    "config_before_step_00000001.json"])
@pytest.mark.parametrize("resume", ["auto", "never", "PATH"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_a_run_cannot_replace_is_said_before_anything_goes(here, tmp_path, name, resume, kind):
    a_run(here, 2, 4)
    path = str(a_run(tmp_path / "other", 3)) if resume == "PATH" else resume
    (here / name).unlink(missing_ok=True)
    make = {"folder": os.mkdir, "pipe": os.mkfifo, "dangling link": lambda path: os.symlink("nowhere", path)}
    make[kind](here / name)
    with pytest.raises(UserError, match=f"{name} is not a file, and a run writes one of this name: move it"):
        choose_checkpoint(str(here), path, True)
    assert steps(here) == [2, 4]

@pytest.mark.parametrize("name", ["config.json", "config_before_step_00000001.json"])
def test_a_config_too_large_to_keep_is_said_before_anything_goes(here, name):
    a_run(here, 2, 4)
    (here / name).write_bytes(b" " * 2_000_000)
    with pytest.raises(UserError, match=name):
        choose_checkpoint(str(here), "never", True)
    assert steps(here) == [2, 4]

# --- deleting a run ---

def no_trace(folder):
    """Whether nothing is aside, nor half deleted."""
    return not [path for path in folder.rglob("*") if path.name.startswith((".overwritten", ".tmp_"))]

def start_anew(folder):
    """Overwrite the run in `folder` by one that saves and is deleted: only what is no run's is left."""
    end_overwrite(str(folder))
    checkpoint.sweep(str(folder))
    assert choose_checkpoint(str(folder), "never", True) is None
    make_way(str(folder), None, "never", True)
    save(folder, 77)
    end_overwrite(str(folder))
    checkpoint.retire(step_folder(folder, 77))
    if not os.listdir(folder / "checkpoints") and not os.path.islink(folder / "checkpoints"):
        os.rmdir(folder / "checkpoints")

def new_run(folder):
    """What a run writes before its first save."""
    write_config(str(folder), {**CONFIG, "lr": 9})
    (folder / "status.json").write_text("new")
    (folder / "metrics.jsonl").write_text("new")

@pytest.mark.parametrize("linked", [False, True], ids=["here", "checkpoints on another disk"])
@pytest.mark.parametrize("resume", ["never", "elsewhere", "inside"])
@pytest.mark.parametrize("fault", [None, "damaged"])
def test_a_run_that_fails_before_its_first_save_leaves_the_one_before(here, tmp_path, linked, resume, fault):
    if linked:
        os.symlink(tmp_path / "log", here / "metrics.jsonl")
        (tmp_path / "big").mkdir()
        os.symlink(tmp_path / "big", here / "checkpoints")
    a_run(here, 2, 4, 6)
    paths = {"elsewhere": str(a_run(tmp_path / "other", 3)), "inside": step_folder(here, 2)}
    resume = paths.get(resume, resume)
    before, saved = tree(here), steps(here)
    folder = choose_checkpoint(str(here), resume, True)
    with pytest.raises(ZeroDivisionError), overwriting(str(here)):
        make_way(str(here), folder, resume, True)
        assert steps(here) != saved
        new_run(here)
        if fault:
            save(here, 4)
            os.truncate(step_folder(here, 4) + "/model.safetensors", 10)
        raise ZeroDivisionError
    after = tree(here)
    for path in here.glob("config_before_*"):
        # a copy of what is back
        after.pop(str(path))
    assert after == before and steps(here) == saved and no_trace(here)
    assert (here / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1}\n'
    end_overwrite(str(here))
    assert steps(here) == saved

def test_extra_files_of_the_users_stay_when_a_run_is_deleted(here):
    a_run(here, 2, 4)
    write_config(str(here), {**CONFIG, "lr": 7})
    (here / "notes.txt").write_text("mine")
    (here / "config_mine.json").write_text("{}")
    shutil.copytree(step_folder(here, 4), here / "checkpoints" / "step_best")
    kept = {path: data for path, data in tree(here).items()
            if "best" in path or path.endswith((".lock", "notes.txt", "config_mine.json", "checkpoints"))}
    inside = len(os.listdir(step_folder(here, 4)))
    start_anew(here)
    assert tree(here) == kept and len(kept) == 5 + inside

def test_overwrite_leaves_a_foreign_config_among_our_checkpoints(here):
    save(here, 2)
    (here / "config.json").write_text('{"model_type": "llama"}')
    start_anew(here)
    write_config(str(here), CONFIG)
    assert (here / "config_before_step_00000000.json").read_text() == '{"model_type": "llama"}'

def test_a_deleted_run_never_comes_back_though_its_checkpoints_are_a_link(here, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    (big / "notes.txt").write_text("mine")
    os.symlink(big, here / "checkpoints")
    a_run(here, 2, 4)
    start_anew(here)
    write_config(str(here), CONFIG)
    assert choose_checkpoint(str(here), "auto", False) is None
    assert os.listdir(big) == ["notes.txt"] and os.path.islink(here / "checkpoints")
    save(here, 1)
    assert os.path.exists(big / "step_00000001")

def test_a_deleted_run_never_comes_back_though_a_checkpoint_is_a_link(here, tmp_path):
    a_run(here, 2, 4)
    shutil.move(step_folder(here, 4), tmp_path / "archive")
    os.symlink(tmp_path / "archive", step_folder(here, 4))
    start_anew(here)
    assert choose_checkpoint(str(here), "auto", False) is None
    assert checkpoint.verify(str(tmp_path / "archive")) is None

def test_a_checkpoints_name_with_foreign_content_is_said_before_anything_goes(here):
    a_run(here, 2)
    os.mkdir(step_folder(here, 3))
    with open(step_folder(here, 3) + "/weights.bin", "w"):
        pass
    before = tree(here)
    with pytest.raises(UserError, match="step_00000003 was not written by this program"):
        choose_checkpoint(str(here), "never", True)
    assert tree(here) == before

class Killed(BaseException):
    """What no handler catches."""

def killed_everywhere(monkeypatch, copies, work):
    """Run work(folder) on copies of a folder, killed before its first, second … change of the disk; yields
    each copy, the last one where it came to its end."""
    number, done = 0, False
    while not done:
        folder = copies(number)
        left = iter(range(number))
        def announced(real, left=left):
            def operation(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return real(*args, **kwargs)
            return operation
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "rmdir", "remove", "mkdir"):
                patch.setattr(os, name, announced(getattr(os, name)))
            try:
                work(str(folder))
                done = True
            except Killed:
                pass
        yield folder
        number += 1
    assert number > 5

def test_a_deletion_that_was_killed_anywhere_can_be_made_up(here, tmp_path, monkeypatch):
    write_config(str(a_run(here, 2, 4)), {**CONFIG, "lr": 7})
    make_way(str(here), None, "never", True)
    save(here, 3)
    def copies(number):
        return shutil.copytree(here, tmp_path / str(number))
    for folder in killed_everywhere(monkeypatch, copies, end_overwrite):
        end_overwrite(str(folder))
        checkpoint.sweep(str(folder))
        assert steps(folder) == [3] and no_trace(folder)
        assert sorted(os.listdir(folder)) == [".lock", "checkpoints"]

@pytest.mark.parametrize("resume", ["never", "inside"])
def test_a_run_that_was_killed_as_it_gave_way_is_back_at_the_next_start(here, tmp_path, monkeypatch, resume):
    write_config(str(a_run(here, 2, 4, 6)), {**CONFIG, "lr": 7})
    def copies(number):
        return shutil.copytree(here, tmp_path / str(number))
    def work(folder):
        path = os.path.join(folder, "checkpoints", "step_00000002")
        make_way(folder, *((path, path) if resume == "inside" else (None, "never")), True)
    def relative(folder):
        return {os.path.relpath(path, folder): content for path, content in tree(folder).items()}
    for folder in killed_everywhere(monkeypatch, copies, work):
        end_overwrite(str(folder))
        assert relative(folder) == relative(here)

def test_a_run_is_back_though_its_return_was_killed(here, tmp_path, monkeypatch):
    a_run(here, 2, 4)
    before = {os.path.relpath(path, here): content for path, content in tree(here).items()}
    make_way(str(here), None, "never", True)
    new_run(here)
    def copies(number):
        return shutil.copytree(here, tmp_path / str(number))
    for folder in killed_everywhere(monkeypatch, copies, end_overwrite):
        end_overwrite(str(folder))
        assert {os.path.relpath(path, folder): content for path, content in tree(folder).items()} == before

# --- what is written ---

def configs(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("config*.json")}

def test_an_earlier_config_is_kept_when_a_resume_changes_a_value(here):
    write_config(str(here), CONFIG)
    save(here, 500)
    write_config(str(here), {**CONFIG, "lr": 0.2})
    write_config(str(here), {**CONFIG, "lr": 0.3})
    save(here, 600)
    write_config(str(here), {**CONFIG, "lr": 0.4})
    rates = {name: content["lr"] for name, content in configs(here).items()}
    assert rates == {"config_before_step_00000500.json": 0.1, "config_before_step_00000500_2.json": 0.2,
                     "config_before_step_00000600.json": 0.3, "config.json": 0.4}
    assert configs(here)["config.json"] == json.loads(json.dumps({**CONFIG, "lr": 0.4}))

def test_configs_do_not_grow_while_nothing_changes_or_two_take_turns(here):
    for step in range(1, 4):
        write_config(str(here), CONFIG)
        save(here, step)
    assert list(configs(here)) == ["config.json"]
    for step in range(4, 12):
        write_config(str(here), {**CONFIG, "lr": step % 2})
        save(here, step)
    assert sorted(content["lr"] for content in configs(here).values()) == [0, 0.1, 1, 1]

def test_a_config_that_cannot_be_written_leaves_the_old_one(here, monkeypatch):
    write_config(str(here), CONFIG)
    replace = os.replace
    def full(source, target):
        if target.endswith("config.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(str(here), {**CONFIG, "lr": 0.2})
    assert configs(here)["config.json"]["lr"] == 0.1

def test_room_is_looked_for_where_the_checkpoints_are(here, tmp_path, monkeypatch):
    free = {str(here): 10**9, str(here / "checkpoints"): 10**6}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[path]))
    check_space(str(here), 3, 10**8)
    (tmp_path / "small").mkdir()
    os.symlink(tmp_path / "small", here / "checkpoints")
    with pytest.raises(UserError, match="1,000,000 bytes free for 4 more checkpoints of 300,728: make room"):
        check_space(str(here), 3, 300_728)
    save(here, 1, 2, 3)
    check_space(str(here), 3, 300_728)         # room for the one that is written before one goes

def test_the_keys_that_tell_ours_are_flags_of_training():
    assert out_dir.CONFIG_KEYS <= vars(Config()).keys()
