"""eval.py and windows.py: the numbers of training, the field's protocols, and standard errors."""
import json
import math
import os
import shutil
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import prepare_c4
import train
from nanolost.checkpoint import load_model, write_model
from nanolost.data import TokenDataset, read_shard
from nanolost.errors import UserError
from nanolost.tokenizer import Tokenizer
from nanolost.windows import Windows, standard_error

def run(**given) -> dict:
    return evaluation.main(evaluation.Config(device="cpu", **given))

@pytest.fixture
def trained(small):
    """A run of a few steps, and the path of a text that it has not seen."""
    config = small(steps=4)
    train.main(config)
    path = os.path.join(os.path.dirname(config.out_dir), "text.txt")
    with open(path, "w", encoding="utf-8") as f:
        f.write("A wheel turns; é and 漢 are more than a byte. " * 20)
    return config, path

def ids_of(config, path) -> torch.Tensor:
    tokenizer = Tokenizer.load(os.path.join(config.data_dir, "tokenizer.json"))
    with open(path, encoding="utf-8") as f:
        ids = [tokenizer.eot, *tokenizer.encode(f.read())]
    return torch.tensor(ids)

# --- the numbers of training ---

@pytest.mark.parametrize("switches", [
    {}, dict(micro_batch=2), dict(dtype="bfloat16"), dict(tie_embeddings=True),
], ids=["plain", "micro", "bfloat16", "tied"])
def test_the_last_evaluation_of_a_training_run_is_what_eval_says_to_the_last_bit(small, switches):
    config = small(steps=4, **switches)
    train.main(config)
    last = metrics(config, "eval")[-1]
    found = run(ckpt=config.out_dir, data_dir=config.data_dir, tokens=config.eval_tokens)
    assert found["loss"] == last["val_loss"] and found["perplexity"] == last["val_ppl"]
    assert found["bits_per_byte"] == last["val_bpb"] and found["tokens"] == last["val_tokens"]
    assert found["window"] == found["stride"] == config.seq_len
    assert found["dtype"] == {"bfloat16": "bfloat16"}.get(switches.get("dtype"), "float32")

def test_a_model_that_computes_no_numbers_is_refused(trained, tmp_path):
    config, path = trained
    model, _ = load_model(config.out_dir)
    with torch.no_grad():
        model.model["norm"].weight[0] = math.nan
    tokenizer = Tokenizer.load(os.path.join(config.data_dir, "tokenizer.json"))
    write_model(str(tmp_path / "nan"), model, tokenizer, {})
    with pytest.raises(UserError, match="the loss is nan"):
        run(ckpt=str(tmp_path / "nan"), text=[path])

def test_the_standard_error_is_that_of_the_means_of_windows(trained):
    config, _ = trained
    found = run(ckpt=config.out_dir, data_dir=config.data_dir, tokens=320)
    model, _ = load_model(config.out_dir)
    x, y = TokenDataset(config.data_dir, "val", 32).batch(range(10))
    with torch.no_grad():
        means = F.cross_entropy(model(x, y)[0].transpose(1, 2), y, reduction="none").mean(1).tolist()
    assert found["windows"] == 10 and found["tokens"] == 320
    assert found["loss"] == pytest.approx(statistics.mean(means), rel=1e-6)
    assert found["loss_stderr"] == pytest.approx(statistics.stdev(means) / math.sqrt(10), rel=1e-4)
    assert found["perplexity_stderr"] == pytest.approx(found["perplexity"] * found["loss_stderr"])
    assert found["bits_per_byte_stderr"] == pytest.approx(found["loss_stderr"] / math.log(2), rel=0.05)

# --- the field's protocols, written out ---

def test_a_text_without_overlap_is_the_papers_wikitext_protocol(trained):
    config, path = trained
    found = run(ckpt=config.out_dir, text=[path], seq_len=20)
    model, _ = load_model(config.out_dir)
    ids = ids_of(config, path)
    count = len(ids) // 20
    nats = 0.0
    with torch.no_grad():
        for i in range(count):
            window = ids[None, i * 20:(i + 1) * 20]
            logits = model(window, window)[0]
            nats += F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
    assert found["windows"] == count and found["tokens"] == 19 * count
    assert found["loss"] == pytest.approx(nats / (19 * count), rel=1e-5)
    assert "first token of a window" in found["first_token"] and "<|endoftext|>" in found["first_token"]

@pytest.mark.parametrize("stride", [1, 7, 19])
def test_a_smaller_stride_is_hugging_faces_sliding_window(trained, stride):
    config, path = trained
    found = run(ckpt=config.out_dir, text=[path], seq_len=20, stride=stride)
    model, _ = load_model(config.out_dir)
    ids = ids_of(config, path)
    nats, targets, before = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 19, stride):
            window = ids[None, start:start + 20].clone()
            labels = window.clone()
            labels[:, :before - start] = -100
            nats += F.cross_entropy(model(window, window)[0][0, :-1], labels[0, 1:], reduction="sum").item()
            targets += (labels[0, 1:] >= 0).sum().item()
            before = start + 20
    assert found["tokens"] == targets and found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["stride"] == stride

def test_shards_with_a_stride_predict_each_token_once(trained):
    config, _ = trained
    whole = run(ckpt=config.out_dir, data_dir=config.data_dir, tokens=640)
    half = run(ckpt=config.out_dir, data_dir=config.data_dir, tokens=640, stride=16)
    assert half["tokens"] == whole["tokens"] == 640
    assert half["loss"] != whole["loss"] and half["loss"] == pytest.approx(whole["loss"], rel=0.05)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=3), st.integers(2, 12), st.data(),
       st.sampled_from(["shared", "alone"]))
def test_windows_predict_every_token_once_but_the_rules_and_the_tail(lengths, seq_len, draw, rule):
    stride = draw.draw(st.integers(1, seq_len))
    texts = [np.arange(length) + 100 * i for i, length in enumerate(lengths)]
    windows = Windows(texts, seq_len, stride, rule)
    x, y = windows.batch(range(len(windows)))
    seen = y[y >= 0].tolist()
    assert len(seen) == len(set(seen))
    counts = (y >= 0).sum(1).cumsum(0).tolist()
    for wanted in (0, 1, counts[0], counts[-1] - 1, counts[-1], counts[-1] + 1):
        assert windows.samples_for(wanted) == sum(count <= wanted for count in counts)
    # the target is the token after the input
    assert (y[y >= 0] == x[y >= 0] + 1).all()
    for i, length in enumerate(lengths):
        own = sorted(n - 100 * i for n in seen if n // 100 == i)
        reach = seq_len + (rule == "shared")
        end = length if length < reach else reach + (length - reach) // stride * stride
        lost = set(range(0, end, stride)) if rule == "alone" and stride == seq_len else {0}
        assert own == sorted(set(range(end)) - lost)

def test_windows_of_a_training_are_the_shared_rule(data_dir):
    data = TokenDataset(data_dir, "val", 32)
    windows = Windows([read_shard(path) for path in data.paths], 32, 32, "shared")
    assert len(windows) == len(data)
    for ours, theirs in zip(windows.batch(range(20)), data.batch(range(20)), strict=True):
        assert torch.equal(ours, theirs)

def test_the_standard_error_of_unequal_windows_is_that_of_a_ratio():
    assert standard_error([1.0, 2.0, 6.0], [1, 1, 1]) == pytest.approx(statistics.stdev([1, 2, 6]) / 3**0.5)
    # all have the same mean: nothing varies, whatever their sizes
    assert standard_error([2.0, 4.0, 20.0], [1, 2, 10]) == 0
    assert standard_error([3.0], [1]) is None and standard_error([0.0, 0.0], [0, 0]) is None

# --- what is said, what is refused ---

def test_one_line_and_one_object_are_printed_with_the_hash_of_each_text(trained, capsys, tmp_path):
    config, path = trained
    other = tmp_path / "other.txt"
    other.write_bytes(b"short")
    capsys.readouterr()
    found = run(ckpt=config.out_dir, text=[path, str(other)])
    line, text = capsys.readouterr().out.splitlines()
    assert json.loads(text) == found
    assert f"perplexity {found['perplexity']:.2f} ± " in line and "stride 32" in line and "text.txt" in line
    assert [entry["name"] for entry in found["text"]] == ["text.txt", "other.txt"]
    assert found["text"][1]["sha256"] == "f9b0078b5df596d2ea19010c001bbd009e651de2c57e8fb7e355f31eb9d3f739"

def test_bytes_are_those_of_the_text_that_is_predicted(trained, tmp_path):
    config, _ = trained
    path = tmp_path / "one.txt"
    path.write_text("é漢", encoding="utf-8")
    found = run(ckpt=config.out_dir, text=[str(path)])
    # two and three bytes, each a token, behind an end-of-text
    assert (found["tokens"], found["bytes"], found["windows"]) == (5, 5, 1)
    assert found["loss_stderr"] is None
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))

@pytest.mark.parametrize("given, message", [
    ({}, "either --data_dir DIR or --text"), (dict(data_dir="x", text=["y"]), "either --data_dir"),
    (dict(text=["y"], stride=0), "--stride 0"), (dict(text=["y"], tokens=0), "--tokens 0"),
    (dict(text=["y"], seq_len=1), "--seq_len 1"), (dict(text=["nowhere.txt"]), "cannot read nowhere.txt"),
    (dict(text=["y"], seq_len=8, stride=9), "--stride 9 is above --seq_len 8"),
    (dict(data_dir="none"), "no val"),
])
def test_what_cannot_be_evaluated_is_refused(trained, given, message):
    config, _ = trained
    with pytest.raises(UserError, match=message):
        run(ckpt=config.out_dir, **given)

def test_texts_that_are_none_and_shards_of_another_tokenizer_are_refused(trained, tmp_path):
    config, _ = trained
    for content, message in [(b"\xff\xfe", "byte 0 is not UTF-8"), (b"", "less than two tokens")]:
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            run(ckpt=config.out_dir, text=[str(tmp_path / "bad.txt")])
    other = str(tmp_path / "other")
    prepare_c4.main(prepare_c4.Config(input=["builtin"], tokenizer="train:300", out_dir=other, workers=1))
    with pytest.raises(UserError, match="was made with another tokenizer than"):
        run(ckpt=config.out_dir, data_dir=other)

def test_a_foreign_folder_has_a_window_of_its_limit_and_a_longer_one_is_a_warning(trained, tmp_path, capsys):
    config, path = trained
    foreign = str(tmp_path / "foreign")
    shutil.copytree(os.path.join(config.out_dir, "checkpoints", "step_00000004"), foreign)
    for name in ("state.json", "optimizer.safetensors", "manifest.json"):
        os.remove(os.path.join(foreign, name))
    found = run(ckpt=foreign, text=[path])
    assert found["window"] == 32 and capsys.readouterr().err == ""
    run(ckpt=foreign, text=[path], seq_len=64)
    assert "--seq_len 64 is above the 32 tokens" in capsys.readouterr().err
