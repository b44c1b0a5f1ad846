"""Checkpoints are whole or absent, verified before use, and hold everything."""
import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

import train
from nanolost import checkpoint, files
from nanolost.tokenizer import Tokenizer

FILES = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "tokenizer.json",
         "manifest.json"]
BYTE = Tokenizer.named("byte")

@pytest.fixture
def run(small):
    config = small()
    train.main(config)
    return config

def folder_of(config, step):
    return os.path.join(config.out_dir, "checkpoints", f"step_{step:08d}")

def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)

def flip(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))

@pytest.mark.parametrize("damage", [cut, flip, os.remove])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(run, file, damage, capsys):
    damage(os.path.join(folder_of(run, 8), file))
    assert checkpoint.newest_checkpoint(run.out_dir) == folder_of(run, 4)
    assert f"WARNING: {folder_of(run, 8)} is damaged" in capsys.readouterr().err
    assert checkpoint.load_model(run.out_dir)[1]["step"] == 4
    if file != "state.json" or damage is not os.remove:                        # then it is just a model
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load_model(folder_of(run, 8))

def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, monkeypatch):
    def failing(path):                         # as read() fails on a bad sector, without the name of the file
        if path == os.path.join(folder_of(run, 8), "model.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return files.sha256_file(path)
    monkeypatch.setattr(checkpoint, "sha256_file", failing)
    assert checkpoint.verify(folder_of(run, 8)) == "model.safetensors cannot be read: Input/output error"
    assert checkpoint.newest_checkpoint(run.out_dir) == folder_of(run, 4)

@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks its maps up in /proc")
def test_what_was_loaded_keeps_no_place_on_the_disk(run):
    model, _ = checkpoint.load_model(run.out_dir)
    optimizers = train.build_optimizers(model, run)
    checkpoint.load_optimizer(folder_of(run, 8), model, optimizers)
    with open("/proc/self/maps", encoding="utf-8") as f:
        assert run.out_dir not in f.read()

def test_training_never_starts_again_silently_when_all_checkpoints_are_damaged(run):
    for step in (4, 8):
        cut(os.path.join(folder_of(run, step), "model.safetensors"))
    with pytest.raises(ValueError, match="all 2 checkpoints of .* are damaged"):
        train.main(run)
    assert len(checkpoint.checkpoints(run.out_dir)) == 2

def test_a_run_that_went_back_replaces_the_damaged_checkpoint(run):
    flip(os.path.join(folder_of(run, 8), "optimizer.safetensors"))
    train.main(run)
    assert checkpoint.verify(folder_of(run, 8)) is None

def test_after_going_back_the_new_checkpoint_stays_and_the_abandoned_later_ones_go(small):
    config = small(save_every=1, keep=2)
    train.main(config)
    flip(os.path.join(folder_of(config, 8), "state.json"))                     # continues from step 7
    later = folder_of(config, 12)
    shutil.copytree(folder_of(config, 8), later)
    train.main(config)
    assert checkpoint.checkpoints(config.out_dir) == [folder_of(config, 7), folder_of(config, 8)]
    assert checkpoint.verify(folder_of(config, 8)) is None

def test_only_the_newest_are_kept(small):
    config = small(save_every=1, keep=2)
    train.main(config)
    assert checkpoint.checkpoints(config.out_dir) == [folder_of(config, 7), folder_of(config, 8)]

def test_nothing_is_deleted_before_the_new_checkpoint_verifies(small, monkeypatch):
    config = small(steps=4, keep=1)
    train.main(config)
    model, state = checkpoint.load_model(config.out_dir)
    monkeypatch.setattr(checkpoint, "verify", lambda folder: "a bad disk")
    with pytest.raises(OSError, match="does not read back"):
        checkpoint.save_checkpoint(config.out_dir, 5, model, [], state, BYTE, 1)
    assert os.path.exists(folder_of(config, 4))

def test_the_optimizer_comes_back_whole(run):
    model, _ = checkpoint.load_model(folder_of(run, 8))
    optimizers = train.build_optimizers(model, run)
    checkpoint.load_optimizer(folder_of(run, 8), model, optimizers)
    again = checkpoint.optimizer_tensors(model, optimizers)
    stored = checkpoint.load_tensors(os.path.join(folder_of(run, 8), "optimizer.safetensors"))
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    names = {name.rpartition(".")[2] for name in stored}
    assert names == {"step", "exp_avg", "exp_avg_sq"} and len(stored) == 3 * len(list(model.parameters()))

def test_another_optimizers_state_is_refused(run):
    model, _ = checkpoint.load_model(folder_of(run, 8))
    path = os.path.join(folder_of(run, 8), "optimizer.safetensors")
    save_file({"lm_head.weight.exp_avg": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no optimizer state for"):
        checkpoint.load_optimizer(folder_of(run, 8), model, train.build_optimizers(model, run))

def test_pickles_are_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    for name in ("pytorch_model.bin", "model.pt"):
        with open(tmp_path / name, "wb") as f:
            pickle.dump({"w": Trap()}, f)
        with pytest.raises(ValueError, match="is a file.*convert it to safetensors"):
            checkpoint.load_model(str(tmp_path / name))
    with pytest.raises(ValueError, match="no checkpoint in .*pickled checkpoints are refused"):
        checkpoint.load_model(str(tmp_path))
    shutil.copy(tmp_path / "model.pt", tmp_path / "model.safetensors")         # a pickle under a trusted name
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_json(train.build_model(
        train.resolve(dict(model="tiny", vocab_size=257)), "meta"), 256)))
    with pytest.raises(ValueError, match="cannot read .*model.safetensors"):
        checkpoint.load_model(str(tmp_path))
    assert not os.path.exists(tmp_path / "ran")

def test_a_folder_names_the_end_of_text_and_may_hold_the_rotary_buffers_of_old_ones(small):
    config = small(linear="dense", steps=4)
    train.main(config)
    folder = checkpoint.checkpoints(config.out_dir)[-1]
    hf = checkpoint.read_json(folder, "config.json")
    assert hf["bos_token_id"] == hf["eos_token_id"] == 256
    model, _ = checkpoint.load_folder(folder)
    old = {**checkpoint.model_tensors(model), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(old, os.path.join(folder, "model.safetensors"))
    again, _ = checkpoint.load_folder(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    with pytest.raises(ValueError, match=f"no checkpoint in {path}"):
        checkpoint.load_model(path)

def test_weights_that_do_not_fit_their_config_are_refused(run):
    path = os.path.join(folder_of(run, 8), "config.json")
    with open(path, encoding="utf-8") as f:
        content = json.load(f) | {"num_hidden_layers": 3}
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f)
    os.remove(os.path.join(folder_of(run, 8), "state.json"))           # else the manifest objects first
    with pytest.raises(ValueError, match="do not fit its config.json"):
        checkpoint.load_model(folder_of(run, 8))
