"""Rows and masked targets, from a document to a loss: what counts, counts once, and padding nowhere."""
import glob
import gzip
import json
import math
import os
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ended, launch, losses, metrics, started, updates
from hypothesis import given
from hypothesis import strategies as st
from small_models import small as small_model
from test_prepare import files_of as files_in
from test_prepare import manifest_of, prepare, put, some_texts

import eval as eval_command
import prepare_c4
import train
from nanolost.data import TokenDataset, read_shard, read_targets
from nanolost.documents import Pair
from nanolost.errors import UserError
from nanolost.loop import (
    Validation,
    accumulate,
    evaluate,
    in_order,
    paper_perplexity,
    shares,
    without_padding,
)
from nanolost.rows import Rows, Stream
from nanolost.tokenizer import Tokenizer

ROW = 32
BYTES = Tokenizer.named("byte")
EOT = BYTES.eot
texts = st.text(max_size=60)
ALONE = types.SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), asked=[],
                              sum=lambda tensor: tensor, gather=lambda value: [value])
FULL = torch.autocast("cpu", enabled=False)

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)

def put_pairs(path, pairs) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return str(path)

def some_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Rows with one target to many, and every fourth with none: its prompt fills it."""
    lengths = np.random.default_rng(seed).integers(1, 20, (count, 2)).tolist()
    return [Pair("p" * (99 if i % 4 == 3 else a), f"{i:03}" + "c" * b) for i, (a, b) in enumerate(lengths)]

@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    """Rows of prompts and completions, in shards of 7 rows."""
    folder = tmp_path_factory.mktemp("pairs")
    values = {"input": [put_pairs(folder / "a.jsonl", some_pairs(40))],
              "val_input": [put_pairs(folder / "v.jsonl", some_pairs(21, 1))]}
    prepare(folder / "data", rows=ROW, shard_tokens=7 * ROW, **values)
    return folder / "data"

@pytest.fixture(scope="module")
def rows_dir(tmp_path_factory):
    """One text a row, shorter or longer than the row."""
    folder = tmp_path_factory.mktemp("rows")
    values = {"input": [put(folder / "a.jsonl", some_texts(90))],
              "val_input": [put(folder / "v.jsonl", some_texts(30, 1))]}
    prepare(folder / "data", rows=ROW, **values)
    return folder / "data"

# --- one row ---

@given(text=texts, length=st.integers(2, 40))
def test_a_row_is_the_start_of_its_text_and_then_padding(text, length):
    row = Rows(BYTES, length)(text)
    ids = [EOT, *text.encode("utf8", "replace")][:length]
    assert row.tokens.tolist() == ids + [EOT] * (length - len(ids))
    # all but the first, which nothing predicts
    assert row.targets.tolist() == [False] + [True] * (len(ids) - 1) + [False] * (length - len(ids))
    assert row.text_tokens == len(ids) and row.text_bytes == len(ids) - 1

@given(prompt=texts, completion=texts, length=st.integers(2, 90))
def test_of_a_pair_the_completion_alone_is_a_target(prompt, completion, length):
    row = Rows(BYTES, length)(Pair(prompt, completion))
    plain = Rows(BYTES, length)(prompt + completion)
    assert row.tokens.tolist() == plain.tokens.tolist() and row.text_bytes == plain.text_bytes
    known = 1 + len(prompt.encode("utf8", "replace"))
    assert row.targets.tolist() == [place >= known and target for place, target in enumerate(plain.targets)]

def test_a_prompt_is_what_a_sample_begins_with():
    # the model sees the tokens of the prompt alone, and has never seen one that reaches into the completion
    tokenizer = Tokenizer.of([*(bytes([byte]) for byte in range(256)), b"ab"], name="test")
    eot = tokenizer.eot
    assert tokenizer.encode("ab") == [256]
    row = Rows(tokenizer, 5)(Pair("a", "b"))
    assert row.tokens.tolist() == [eot, 97, 98, eot, eot] and row.targets.tolist() == [0, 0, 1, 0, 0]
    row = Rows(tokenizer, 5)(Pair("ab", "b"))
    assert row.tokens.tolist() == [eot, 256, 98, eot, eot] and row.targets.tolist() == [0, 0, 1, 0, 0]

@pytest.mark.parametrize("length", [2, 3])
def test_what_the_post_processor_puts_last_survives_the_cut(length):
    tokenizer = Tokenizer.named("byte")
    tokenizer.before, tokenizer.after = [], [EOT]
    row = Rows(tokenizer, length)("abc")
    assert row.tokens.tolist() == [*b"abc"][:length - 1] + [EOT]
    assert row.targets.tolist() == [0] + [1] * (length - 1)
    tokenizer.before = [EOT]
    if length == 2:
        with pytest.raises(UserError, match="--rows 2.*use 3 or more"):
            Rows(tokenizer, length)

@given(text=texts)
def test_a_stream_has_no_masks(text):
    found = Stream(BYTES)(text.encode("utf8", "replace").decode())
    assert found.targets is None and found.text_tokens == len(found.tokens) == found.text_bytes + 1

def test_t5_s_rows_are_those_of_the_papers_scripts(real_data):
    transformers = pytest.importorskip("transformers")
    file = f"{real_data}/t5/tokenizer.json"
    if not os.path.exists(file):
        pytest.skip("no T5 in NANOLOST_DATA")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", eos_token="</s>")
    ours = Tokenizer.load(file)
    rows = Rows(ours, 256)
    corpus = [json.loads(line)["text"] for path in glob.glob(f"{real_data}/*validation*.json.gz")
              for line in gzip.open(path)]
    assert len(corpus) > 400
    for text in corpus:
        assert ours.row(text).tolist() == theirs(text)["input_ids"]
        row = rows(text)
        wanted = theirs(text, max_length=256, truncation=True, padding="max_length")
        size = sum(wanted["attention_mask"])
        assert row.tokens[:size].tolist() == wanted["input_ids"][:size] and row.text_tokens == size
        assert row.targets.tolist() == [False] + [True] * (size - 1) + [False] * (256 - size)
        # the papers' models have 32 000 words, the file 32 100
        assert row.tokens.max() < 32_000 == ours.rows_needed()

# --- shards of rows ---

def test_the_figures_of_a_manifest_of_rows_match_a_recount(pairs_dir):
    manifest = manifest_of(pairs_dir)
    assert manifest["row"] == ROW and len(manifest["shards"]) == 6 + 3
    for shard in manifest["shards"]:
        tokens = read_shard(pairs_dir / shard["name"])
        marks = read_targets(pairs_dir / shard["name"], len(tokens))
        assert shard["targets"]["name"] == shard["name"] + ".targets" and marks.max() == 1
        assert shard["targets"]["tokens"] == marks.sum() and shard["tokens"] == len(tokens)
        assert shard["documents"] * ROW == len(tokens)
        # in bytes each token of text is a byte, but the first of each row
        assert shard["bytes"] == (tokens != EOT).sum() == shard["text_tokens"] - shard["documents"]
    # what is no row is written as ever
    assert set(files_in(pairs_dir)) == {"manifest.json", "tokenizer.json", *(
        name for shard in manifest["shards"] for name in (shard["name"], shard["targets"]["name"]))}

def test_validation_stops_at_its_targets_and_training_at_its_positions(tmp_path):
    values = {"input": [put(tmp_path / "a.jsonl", ["x"] * 50)],
              "val_input": [put(tmp_path / "v.jsonl", ["y"] * 50)]}
    manifest = prepare(tmp_path / "out", rows=8, train_tokens=24, val_tokens=5, **values)
    counts = {shard["split"]: shard["documents"] for shard in manifest["shards"]}
    assert counts == {"train": 3, "val": 5}

@pytest.mark.parametrize("workers", [1, 3])
def test_rows_that_were_interrupted_are_the_same(tmp_path, monkeypatch, workers):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(200))], "rows": 16, "shard_tokens": 320,
              "workers": workers}
    prepare(tmp_path / "straight", **values)
    encode_all = prepare_c4.encode_all
    monkeypatch.setattr(prepare_c4, "BATCH", 500)
    batches = []
    def failing(encode, batch):
        batches.append(batch)
        if len(batches) == 8:
            raise OSError("the disk is gone")
        return encode_all(encode, batch)
    monkeypatch.setattr(prepare_c4, "encode_all", failing)
    with pytest.raises(OSError):
        prepare(tmp_path / "out", **values)
    assert 0 < len(manifest_of(tmp_path / "out")["shards"]) < 9
    with pytest.raises(UserError, match="--rows"):
        prepare(tmp_path / "out", **{**values, "rows": None})
    prepare(tmp_path / "out", **values)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "straight")

@pytest.mark.parametrize("sizes", [(10, 10), (1, 99), (99, 1), (5, 5, 5, 5), (1, 1, 98)])
def test_pairs_that_a_hash_puts_into_one_split_are_never_cut(tmp_path, sizes):
    numbered = (Pair(f"{i} ", "c" * 5) for i in range(10**6))
    one_split = (pair for pair in numbered if prepare_c4.split_of("".join(pair)) == "train")
    pairs = []
    for size in sizes:
        pair = next(pair for pair in one_split
                    if prepare_c4.split_of(pair.prompt + "c" * size) == "train")
        pairs.append(Pair(pair.prompt, "c" * size))
    prepare(tmp_path / "out", input=[put_pairs(tmp_path / "a.jsonl", pairs)], rows=128)
    found = []
    for split in ("train", "val"):
        tokens = read_shard(tmp_path / "out" / f"{split}_00000.bin").reshape(-1, 128)
        found += [BYTES.decode(row[row != EOT]) for row in tokens]
    assert found == ["".join(pair) for pair in pairs]

def test_one_pair_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="one prompt with its completion"):
        prepare(tmp_path / "out", input=[put_pairs(tmp_path / "a.jsonl", [("p", "c")])], rows=8)

@pytest.mark.parametrize("rows", [0, 1, -3, 101])
def test_a_row_that_cannot_be_is_refused_before_any_work(tmp_path, rows):
    with pytest.raises(UserError, match=f"--rows {rows}"):
        prepare(tmp_path / "out", input=["builtin"], rows=rows, shard_tokens=100)
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_targets_are_found(pairs_dir, tmp_path, damage):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files_in(pairs_dir).items():
        (folder / name).write_bytes(content)
    path = folder / "val_00001.bin.targets"
    content = path.read_bytes()
    os.remove(path)
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else b"\2" + content[1:])
    with pytest.raises(UserError, match="val_00001.bin.targets is not what its manifest says"):
        prepare(folder, verify=True)
    with pytest.raises(UserError, match="val_00001.bin.targets"):
        TokenDataset(folder, "val", ROW).check_ids(257)

def test_a_first_token_marked_as_a_target_is_found(pairs_dir, tmp_path):
    for name, content in files_in(pairs_dir).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "val_00000.bin.targets"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(UserError, match="val_00000.bin.targets is damaged"):
        TokenDataset(tmp_path, "val", ROW).check_ids(257)

ODD = {
    "no row": (lambda manifest: manifest.pop("row"), "one without the other"),
    "a row without targets": (lambda manifest: manifest["shards"][0].pop("targets"), "one without the other"),
    "a row of one": (lambda manifest: manifest.update(row=1), "its row 1"),
    "a row that does not fit": (lambda manifest: manifest.update(row=ROW + 1), "no rows of 33"),
    "another name": (lambda manifest: manifest["shards"][0]["targets"].update(name="../x"), "not named"),
    "no digest": (lambda manifest: manifest["shards"][0]["targets"].pop("sha256"), "no sha256"),
}

@pytest.mark.parametrize("odd", ODD)
def test_a_manifest_whose_rows_are_not_whole_is_refused(pairs_dir, tmp_path, odd):
    for name, content in files_in(pairs_dir).items():
        (tmp_path / name).write_bytes(content)
    change, cause = ODD[odd]
    manifest = manifest_of(tmp_path)
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"manifest.json is damaged.*{cause}"):
        TokenDataset(tmp_path, "train", ROW)

# --- samples ---

def test_a_row_is_a_sample_by_itself_whose_last_token_predicts_nothing(pairs_dir):
    data = TokenDataset(pairs_dir, "train", ROW)
    expected = [Rows(BYTES, ROW)(pair) for pair in some_pairs(40)]
    x, y = data.batch(range(len(data)))
    assert len(data) == 40 and x.tolist() == [row.tokens.tolist() for row in expected]
    for row, targets in zip(expected, y.tolist(), strict=True):
        following = zip(row.tokens[1:].tolist(), row.targets[1:].tolist(), strict=True)
        assert targets == [token if known else -1 for token, known in following] + [-1]

@given(draw=st.data())
def test_targets_and_batches_agree_for_any_samples(pairs_dir, draw):
    data = TokenDataset(pairs_dir, "train", ROW)
    samples = np.array(draw.draw(st.lists(st.integers(0, 39), min_size=1, max_size=9)))
    _, y = data.batch(samples)
    assert data.targets(samples).tolist() == (y >= 0).sum(1).tolist()
    shaped = np.stack([samples, samples])[None]
    assert data.targets(shaped).tolist() == [[(y >= 0).sum(1).tolist()] * 2]

def test_windows_have_a_target_at_every_position(data_dir):
    data = TokenDataset(data_dir, "train", 16)
    assert data.targets(np.arange(6).reshape(2, 3)).tolist() == [[16] * 3] * 2 and data.samples_for(100) == 6

@pytest.mark.parametrize("targets", [0, 1, 9, 50, 51, 99, 150, 10**6])
def test_an_evaluation_reads_as_many_rows_as_have_its_targets(pairs_dir, targets):
    data = TokenDataset(pairs_dir, "val", ROW)
    running = np.cumsum(data.targets(np.arange(len(data))))
    assert data.samples_for(targets) == (running <= targets).sum()

def test_rows_are_not_cut_at_another_length(pairs_dir):
    for seq_len in (ROW - 1, ROW + 1, 2 * ROW):
        with pytest.raises(UserError, match=f"rows of {ROW} tokens.*--seq_len {ROW}$"):
            TokenDataset(pairs_dir, "train", seq_len)

def test_rows_without_any_target_are_refused(tmp_path):
    source = put_pairs(tmp_path / "a.jsonl", [("p" * 40, f"c{i}") for i in range(9)])
    val = put_pairs(tmp_path / "v.jsonl", [("p", "c")])
    prepare(tmp_path / "out", input=[source], val_input=[val], rows=16)
    with pytest.raises(UserError, match="no row of the train split.*larger --rows"):
        TokenDataset(tmp_path / "out", "train", 16)

def test_other_targets_are_other_data(pairs_dir, tmp_path):
    # the same tokens, of which the prompts are learned
    texts = ["".join(pair) for pair in some_pairs(40)]
    source, val = put(tmp_path / "a.jsonl", texts), put(tmp_path / "v.jsonl", ["v"])
    prepare(tmp_path / "out", input=[source], val_input=[val], rows=ROW, shard_tokens=7 * ROW)
    one, other = (TokenDataset(folder, "train", ROW) for folder in (pairs_dir, tmp_path / "out"))
    assert torch.equal(one.batch(range(40))[0], other.batch(range(40))[0])
    assert one.fingerprint != other.fingerprint

# --- an update ---

def gradient_of(config, micro: int, world: int):
    """Loss and gradient of the first update as all processes together make them, the targets of each
    micro-batch, and what they were made of."""
    with started(config) as (config, state, texts, job):
        count = config.batch_tokens // config.seq_len
        samples = texts.samples(state, (count // micro // world, world, micro))
        divisors = shares(texts.train.targets(samples))
        loss = sum(accumulate(state, texts.train, samples[:, rank], divisors[:, rank], job.device).double()
                   for rank in range(world))
        counts = texts.train.targets(samples).sum(2)
        return loss.item(), state.gradients.clone(), counts, (state.model, texts.train, samples.ravel())

@pytest.mark.parametrize("linear", ["lost", "dense"])
@pytest.mark.parametrize("micro, world", [(8, 1), (4, 1), (1, 1), (2, 2), (1, 2), (1, 8)])
def test_any_cut_of_an_update_is_the_mean_over_its_targets(small, pairs_dir, linear, micro, world):
    config = small(data_dir=str(pairs_dir), linear=linear, micro_batch=1)
    loss, gradient, counts, (model, data, samples) = gradient_of(config, micro, world)
    # literally: one batch, the sum of nats over the number of targets
    x, y = data.batch(samples)
    model.zero_grad(set_to_none=False)
    logits = model(x, y)[0]
    nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
    mean = nats / (y >= 0).sum()
    mean.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    # the case is the one that is hard: cuts weigh differently, and some have no target at all
    assert micro == 8 or counts.min() < counts.max()
    assert micro > 1 or counts.min() == 0

def test_without_masks_the_divisor_is_the_number_of_micro_batches_exactly():
    for shape in ((1, 1, 8), (3, 7, 5), (49, 2, 3)):
        found = shares(np.full(shape, 255))
        assert found.tolist() == [[shape[0] * shape[1]] * shape[1]] * shape[0]

def test_an_update_without_any_target_changes_nothing_by_its_gradient():
    assert np.isinf(shares(np.zeros((2, 2, 3), int))).all()

def test_two_processes_train_as_one_with_uneven_masks(small, pairs_dir, tmp_path):
    one, two = (small(data_dir=str(pairs_dir), micro_batch=micro, steps=6, eval_every=3, paper_batch=4,
                      out_dir=str(tmp_path / name)) for name, micro in (("1", 8), ("2", 1)))
    train.main(one)
    ended(launch(two, processes=2))
    for (step, loss), (same, other) in zip(losses(one), losses(two), strict=True):
        assert step == same and loss == pytest.approx(other, rel=1e-5)
    for name in ("val_loss", "val_bpb", "paper_ppl", "val_tokens"):
        assert [entry[name] for entry in metrics(one, "eval")] == pytest.approx(
            [entry[name] for entry in metrics(two, "eval")], rel=1e-5)

def test_the_loss_of_an_update_is_that_of_its_targets_and_tokens_are_positions(small, pairs_dir):
    # a micro-batch that is a row without a target would pull a mean of means down
    config = small(data_dir=str(pairs_dir), micro_batch=1)
    with started(config) as (config, state, texts, job):
        x, y = texts.train.batch(texts.samples(state, (1, 1, 8)).ravel())
        with torch.no_grad():
            logits = state.model(x, y)[0]
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1).item()
        figures = updates(config, state, texts, job, 1)[0]
    assert figures.loss == pytest.approx(expected, rel=1e-5)
    assert state.tokens == config.batch_tokens == 8 * ROW

def test_padding_and_prompts_teach_nothing(small, rows_dir, tmp_path):
    # what stands in padding may be anything
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files_in(rows_dir).items():
        (folder / name).write_bytes(content)
    path = folder / "train_00000.bin"
    raw = bytearray(path.read_bytes())
    tokens = np.frombuffer(raw, "<u2", offset=1024).reshape(-1, ROW)
    marks = read_targets(rows_dir / "train_00000.bin", tokens.size).reshape(-1, ROW)
    behind = np.maximum.accumulate(marks[:, ::-1], 1)[:, ::-1] == 0
    behind[:, 0] = False
    tokens[behind] = 7
    path.write_bytes(raw)
    assert behind.sum() > 100
    found = []
    for number, data_dir in enumerate((rows_dir, folder)):
        config = small(data_dir=str(data_dir), out_dir=str(tmp_path / str(number)))
        with started(config) as run:
            found.append([figures.loss for figures in updates(*run, count=5)])
    assert found[0] == found[1]

# --- an evaluation ---

def model_of(rows: int = 257) -> nn.Module:
    return small_model(vocab_size=rows).float()

@pytest.mark.parametrize("micro", [1, 4, 30])
def test_an_evaluation_counts_targets_and_the_bytes_behind_them(pairs_dir, micro):
    data = TokenDataset(pairs_dir, "val", ROW)
    model = model_of()
    found = evaluate(model, Validation.of(data, None, micro, BYTES, 257), FULL, ALONE)
    x, y = data.batch(range(len(data)))
    with torch.no_grad():
        logits = model(x, y)[0].double()
    nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum").item()
    targets = sum(s["targets"]["tokens"] for s in manifest_of(pairs_dir)["shards"] if s["split"] == "val")
    assert found["val_tokens"] == targets == (y >= 0).sum()
    assert found["val_loss"] == pytest.approx(nats / targets, rel=1e-6)
    # each target is a byte here: end-of-text stands only at the front and in padding
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / targets, rel=1e-6)

def test_a_look_inside_sees_no_padding(rows_dir, data_dir):
    x = without_padding(TokenDataset(rows_dir, "val", ROW))
    assert len(x) == 4 and (x[:, 1:] != EOT).all() and x.shape[1] > 8
    windows = TokenDataset(data_dir, "val", ROW)
    assert torch.equal(without_padding(windows), windows.batch(range(4))[0])

# --- the papers' evaluator ---

def as_the_papers_print_it(model, data, batch: int, target: int) -> float:
    """The loop of GaLore's torchrun_main.py, evaluate_model, on one process."""
    seen, total, batches = 0, torch.tensor(0.0), 1
    for first in range(0, len(data), batch):
        if seen > target:
            break
        batches += 1
        x, y = data.batch(range(first, min(first + batch, len(data))))
        with torch.no_grad():
            total += F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
        # end-of-text is their pad token here, which stands at a row's start as well
        seen += (x != EOT).sum().item() + len(x)
    return math.exp(total.item() / batches)

@pytest.mark.parametrize("micro", [1, 7, 30])
@pytest.mark.parametrize("batch, target", [(4, 10**6), (4, 100), (1, 50), (7, 0), (256, 10**6), (30, 10**6)])
def test_the_papers_perplexity_is_what_their_loop_prints(rows_dir, micro, batch, target):
    data = TokenDataset(rows_dir, "val", ROW)
    model = model_of()
    text = Validation.of(data, None, micro, BYTES, 257)
    assert "paper_ppl" not in evaluate(model, text, FULL, ALONE)
    text.paper = (batch, target)
    found = evaluate(model, text, FULL, ALONE)
    assert found["paper_ppl"] == pytest.approx(as_the_papers_print_it(model, data, batch, target), rel=1e-5)

def test_n_batches_are_counted_as_one_more():
    windows = [(8.0, 4), (3.0, 1), (6.0, 3), (4.0, 4)]
    assert paper_perplexity(windows, 2, 99) == pytest.approx(math.exp((11 / 5 + 10 / 7) / 3))
    # the first batch has 5 targets and two first tokens
    assert paper_perplexity(windows, 2, 6) == pytest.approx(math.exp(11 / 5 / 2))
    assert paper_perplexity(windows, 2, 7) == paper_perplexity(windows, 2, 99)

@given(world=st.integers(1, 5), micro=st.integers(1, 5), count=st.integers(1, 40))
def test_the_windows_of_all_processes_come_in_order(world, micro, count):
    parts = [[w for first in range(rank * micro, count, world * micro)
              for w in range(first, min(first + micro, count))] for rank in range(world)]
    assert in_order(parts, micro) == list(range(count))

def test_a_run_prints_both_perplexities_and_records_them(small, rows_dir, capsys):
    config = small(data_dir=str(rows_dir), paper_batch=8)
    train.main(config)
    records = metrics(config, "eval")
    assert len(records) == 2 and all(record["paper_ppl"] < record["val_ppl"] for record in records)
    printed = capsys.readouterr().out
    for record in records:
        both = f"{record['val_ppl']:.2f} (the papers' evaluator: {record['paper_ppl']:.2f})"
        assert f"perplexity {both}" in printed

def test_eval_prints_what_the_run_has_recorded(small, rows_dir, capsys):
    config = small(data_dir=str(rows_dir), paper_batch=8)
    train.main(config)
    last = metrics(config, "eval")[-1]
    capsys.readouterr()
    evaluation = eval_command.Config(ckpt=config.out_dir, data_dir=str(rows_dir), device="cpu", paper_batch=8)
    result = eval_command.main(evaluation)
    assert (result["paper_ppl"], result["tokens"]) == (last["paper_ppl"], last["val_tokens"])
    assert f"the papers' evaluator: {last['paper_ppl']:.2f}" in capsys.readouterr().out
    evaluation.paper_batch = None
    assert "paper_ppl" not in eval_command.main(evaluation)

@pytest.mark.parametrize("value", [0, -1])
def test_a_batch_of_no_rows_is_refused(small, value):
    with pytest.raises(UserError, match="--paper_batch"):
        small(paper_batch=value)
