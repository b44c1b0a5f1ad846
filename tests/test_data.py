"""data.py: shards to the byte, splits that share no text, an order that is a pure function."""
import contextlib
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanolost.data import SampleOrder, ShardWriter, TokenDataset, load_manifest, read_shard, write_shard
from nanolost.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

def llm_c_bytes(tokens, magic=20240520, version=1, code="H") -> bytes:
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{code}", *tokens)

def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def names(folder) -> list[str]:
    return sorted(os.listdir(folder))

# --- shards ---

@pytest.mark.parametrize("vocab_size, magic, version, code", [
    (257, 20240520, 1, "H"), (50257, 20240520, 1, "H"), (65536, 20240520, 1, "H"),
    (65537, 20240801, 7, "I"), (128256, 20240801, 7, "I")])
def test_a_shard_is_llm_c_s_file_to_the_byte(tmp_path, vocab_size, magic, version, code):
    tokens = [0, vocab_size - 1, 5, 256]
    write_shard(tmp_path / "a.bin", np.array(tokens), vocab_size)
    assert (tmp_path / "a.bin").read_bytes() == llm_c_bytes(tokens, magic, version, code)
    assert names(tmp_path) == ["a.bin"]

@pytest.mark.parametrize("magic, version, code, dtype", [
    (20240520, 1, "H", "uint16"), (20240801, 7, "I", "uint32")])
@pytest.mark.parametrize("tokens", [[], [7], [3, 1, 65535]])
def test_llm_c_s_bytes_are_read_as_its_tokens(tmp_path, magic, version, code, dtype, tokens):
    (tmp_path / "a.bin").write_bytes(llm_c_bytes(tokens, magic, version, code))
    read = read_shard(str(tmp_path / "a.bin"))
    assert read.dtype == dtype and read.tolist() == tokens

@pytest.mark.parametrize("largest, dtype", [
    (0, "uint16"), (65535, "uint16"), (65536, "uint32"), (2**32 - 1, "uint32")])
def test_the_largest_token_chooses_the_type(tmp_path, largest, dtype):
    write_shard(tmp_path / "a.bin", [0, largest])
    assert read_shard(tmp_path / "a.bin").dtype == dtype
    assert read_shard(tmp_path / "a.bin").tolist() == [0, largest]

@pytest.mark.parametrize("tokens, vocab_size", [
    ([0, 10], 10), ([0, 65536], 65536), ([-1, 0], 10), ([-1], None), ([0.5], None), ([1.0, 2.0], 10),
    ([True], None), ([[1, 2], [3, 4]], 10), (3, 10), (["a"], None), ([float("inf")], None),
    ([2**32], None)], ids=repr)
def test_tokens_that_fit_no_vocabulary_are_refused(tmp_path, tokens, vocab_size):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.bin", tokens, vocab_size)
    assert names(tmp_path) == []

def test_what_has_no_end_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    for name in ("pipe.bin", "zero.bin"):
        with pytest.raises(UserError, match=f"{name}.*not a regular file"):
            read_shard(tmp_path / name)

DAMAGES = {
    "wrong magic": lambda good: struct.pack("<i", 20240521) + good[4:],
    "version of the other magic": lambda good: good[:4] + struct.pack("<i", 7) + good[8:],
    "magic of the other version": lambda good: struct.pack("<i", 20240801) + good[4:],
    "cut by a byte": lambda good: good[:-1],
    "cut by a token": lambda good: good[:-2],
    "a token too long": lambda good: good + b"\0\0",
    "a byte too long": lambda good: good + b"\0",
    "count below zero": lambda good: good[:8] + struct.pack("<i", -4) + good[12:],
    "header only": lambda good: good[:1024],
    "short header": lambda good: good[:1023],
    "twelve bytes": lambda good: good[:12],
    "empty": lambda good: b"",
    "a text": lambda good: b"no shard " * 1000,
}

@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_whole_shard_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "train_00003.bin"
    path.write_bytes(damage(llm_c_bytes([1, 2, 3, 4])))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_shard(path)

def test_a_missing_shard_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_shard(path)

def test_a_shard_that_was_not_closed_has_no_final_name(tmp_path):
    writer = ShardWriter(str(tmp_path / "a.bin"), np.uint16)
    writer.append(np.arange(10**6))
    assert names(tmp_path) == ["a.bin.tmp"]
    writer.file.close()

@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("pieces", [[], [[]], [[1, 2, 3]], [[7], [], range(60_000)]])
def test_a_closed_shard_knows_its_own_digest(tmp_path, dtype, pieces):
    writer = ShardWriter(str(tmp_path / "a.bin"), dtype)
    assert writer.sha256 is None
    for piece in pieces:
        writer.append(np.array(piece, np.int64))
    writer.close()
    assert writer.sha256 == sha256(tmp_path / "a.bin")
    assert read_shard(tmp_path / "a.bin").tolist() == [token for piece in pieces for token in piece]

def test_a_shard_s_digest_is_taken_before_anybody_can_reach_it_by_its_name(tmp_path, monkeypatch):
    replace, changed = os.replace, b"another command's shard"
    def replaced_and_overwritten(source, target):
        replace(source, target)
        Path(target).write_bytes(changed)
    monkeypatch.setattr(os, "replace", replaced_and_overwritten)
    writer = ShardWriter(str(tmp_path / "a.bin"), "uint16")
    writer.append(np.array([1, 2, 3]))
    writer.close()
    assert writer.sha256 == hashlib.sha256(llm_c_bytes([1, 2, 3])).hexdigest()

def test_more_tokens_than_a_header_counts_are_refused_before_they_are_read(tmp_path):
    endless = np.broadcast_to(np.uint8(0), 2**31)
    with pytest.raises(UserError, match="2147483648.*2147483647"):
        write_shard(tmp_path / "a.bin", endless, 10)
    assert names(tmp_path) == []

# --- the order of samples ---

SEEDS = st.integers(-2**63, 2**64)

@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
@example(n=1, seed=0, epoch=3)
@example(n=4096, seed=0, epoch=0)
@example(n=4097, seed=0, epoch=0)
def test_each_epoch_is_a_permutation(n, seed, epoch):
    order = SampleOrder(n, seed)[np.arange(epoch * n, (epoch + 1) * n)]
    assert np.array_equal(np.sort(order), np.arange(n))

@settings(deadline=None)
@given(n=st.integers(20, 500), seed=st.integers(0, 10**9))
def test_epochs_and_seeds_have_different_orders(n, seed):
    orders = [SampleOrder(n, s)[np.arange(3 * n)].reshape(3, n) for s in range(seed, seed + 3)]
    assert len({tuple(epoch) for seed_s in orders for epoch in seed_s.tolist()}) == 9

@settings(deadline=None)
@given(n=st.integers(1, 10**12), seed=SEEDS, numbers=st.lists(st.integers(0, 10**13), min_size=1),
       draw=st.data())
def test_a_sample_depends_on_its_number_alone(n, seed, numbers, draw):
    expected = [SampleOrder(n, seed)[i] for i in numbers]
    assert all(type(i) is int and 0 <= i < n for i in expected)
    order = SampleOrder(n, seed)
    assert order[np.array(numbers)].tolist() == expected
    assert [order[i] for i in reversed(numbers)] == expected[::-1]
    shuffled = draw.draw(st.permutations(range(len(numbers))))
    assert order[[numbers[i] for i in shuffled]].tolist() == [expected[i] for i in shuffled]

@settings(deadline=None)
@given(n=st.integers(1, 300), seed=SEEDS, first=st.integers(0, 2000), cuts=st.lists(st.integers(0, 200)))
def test_the_order_does_not_depend_on_the_split_into_batches(n, seed, first, cuts):
    order, edges = SampleOrder(n, seed), sorted({0, 200, *cuts})
    pieces = [order[np.arange(first + a, first + b)] for a, b in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(np.concatenate(pieces), order[np.arange(first, first + 200)])
    assert np.array_equal(order[np.arange(first, first + 200).reshape(8, 25)].ravel(), np.concatenate(pieces))

def test_a_trillion_samples_need_no_memory():
    tracemalloc.start()
    order = SampleOrder(10**12, 1)
    samples = order[np.arange(10**12 - 5000, 10**12 + 5000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert samples.min() >= 0 and samples.max() < 10**12
    assert len(np.unique(samples[:5000])) == len(np.unique(samples[5000:])) == 5000

@pytest.mark.parametrize("n", [0, -1])
def test_an_order_of_no_sample_is_refused(n):
    with pytest.raises(ValueError, match=str(n)):
        SampleOrder(n, 0)

@pytest.mark.parametrize("index", [-1, [3, -7], np.array([[0], [-1]])], ids=repr)
def test_a_number_below_zero_is_refused(index):
    with pytest.raises(IndexError):
        SampleOrder(10, 0)[index]

def mean_distance(a, b) -> float:
    return float(np.abs(a - b).mean())

@pytest.mark.parametrize("n", [5000, 8192, 16384, 16385])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neighbours_epochs_and_seeds_are_as_far_apart_as_chance_puts_them(n, seed):
    number = np.arange(n)
    here, next_epoch = SampleOrder(n, seed)[number], SampleOrder(n, seed)[number + n]
    other_seed = SampleOrder(n, seed + 1)[number]
    pairs = [(here[1:], here[:-1]), (here[2:], here[:-2]),
             (here, number), (here, next_epoch), (here, other_seed)]
    for a, b in pairs:                         # chance: n / 3, of which 0.7 / sqrt(n), 1 %, is the deviation
        assert mean_distance(a, b) == pytest.approx(n / 3, rel=0.05)

@pytest.mark.parametrize("n, place", [(10, 0), (10, 9), (16, 3), (17, 16)])
def test_each_sample_is_as_likely_at_each_place_of_an_epoch(n, place):
    counts = np.bincount(SampleOrder(n, 5)[np.arange(4000) * n + place], minlength=n)
    chi_square = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
    assert chi_square < 45                     # of at most 17 values: 39 is one chance in a thousand

# --- windows of tokens ---

def put_shards(folder, lengths, split="train", code="H", first=0) -> list[np.ndarray]:
    """Shards in which every token has another value, so that a window tells where it came from."""
    shards = []
    for i, length in enumerate(lengths):
        shards.append(np.arange(first, first + length))
        magic, version = {"H": (20240520, 1), "I": (20240801, 7)}[code]
        Path(folder, f"{split}_{i:05d}.bin").write_bytes(llm_c_bytes(shards[-1], magic, version, code))
        first += length
    return shards

def put_manifest(folder, complete=True, **changed):
    paths = sorted(Path(folder).glob("*.bin"))
    shards = [{"name": p.name, "split": p.name[:-10], "tokens": changed.get(p.stem, len(read_shard(p))),
               "sha256": sha256(p)} for p in paths]
    Path(folder, "manifest.json").write_text(json.dumps({"complete": complete, "shards": shards}))

DIGEST = "0" * 64
ENTRY = {"name": "train_00000.bin", "split": "train", "tokens": 9, "bytes": 30, "documents": 2,
         "sha256": DIGEST}
WHOLE = {"version": 1, "complete": True, "request": {}, "shards": [ENTRY], "reached": {},
         "tokenizer": {"name": "byte", "sha256": DIGEST, "vocab_size": 257, "eot": 256}}

def manifest_of(folder, content=None, **shard):
    """A folder with one shard of 9 tokens and a manifest, whole but for what is given."""
    put_shards(folder, [9])
    content = {**WHOLE, "shards": [{**ENTRY, **shard}], **(content or {})}
    Path(folder, "manifest.json").write_text(json.dumps(content), encoding="utf-8")

@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), seq_len=st.integers(1, 9),
       with_manifest=st.booleans(), code=st.sampled_from("HI"))
@example(lengths=[9, 1, 13], seq_len=4, with_manifest=True, code="H")
def test_every_token_but_a_shard_s_first_is_a_target_once(lengths, seq_len, with_manifest, code):
    if max(lengths) <= seq_len:
        lengths = [*lengths, seq_len + 1]
    with tempfile.TemporaryDirectory() as folder:
        shards = put_shards(folder, lengths, code=code)
        if with_manifest:
            put_manifest(folder)
        windows = TokenDataset(folder, "train", seq_len)
        x, y = windows.batch(np.arange(len(windows)))
    full = [s[:(len(s) - 1) // seq_len * seq_len + 1] for s in shards if len(s)]   # the rest: no window
    assert y.flatten().tolist() == np.concatenate([s[1:] for s in full]).tolist()
    assert x.flatten().tolist() == np.concatenate([s[:-1] for s in full]).tolist()
    assert x.shape == y.shape == (len(windows), seq_len) and x.dtype == y.dtype == torch.int64

@settings(deadline=None)
@given(draw=st.data())
def test_a_batch_holds_the_samples_asked_for_in_their_order(draw):
    with tempfile.TemporaryDirectory() as folder:
        put_shards(folder, [33, 4, 50, 21])
        windows = TokenDataset(folder, "train", 4)
        samples = draw.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=30))
        x, y = windows.batch(np.array(samples))
        alone = [windows.batch([i]) for i in samples]
    assert x.tolist() == [a[0][0].tolist() for a in alone]
    assert y.tolist() == [a[1][0].tolist() for a in alone]
    assert (y == x + 1).all(), "a window crosses the end of a shard or skips a token"

def test_a_gpu_gets_its_batch_from_pinned_memory_without_waiting(tmp_path, monkeypatch):
    put_shards(tmp_path, [33])
    windows, seen = TokenDataset(tmp_path, "train", 8), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: seen.append(t.is_contiguous()) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *where, **how: seen.append((*where, how)) or t)
    windows.batch([0, 1], "cuda:1")
    assert seen == [True, ("cuda:1", {"non_blocking": True})] * 2

@pytest.mark.parametrize("with_manifest", [False, True])
def test_the_splits_do_not_mix(tmp_path, with_manifest):
    put_shards(tmp_path, [11, 11], "train")
    put_shards(tmp_path, [11], "val", first=1000)
    if with_manifest:
        put_manifest(tmp_path)
    train, val = (TokenDataset(tmp_path, split, 5) for split in ("train", "val"))
    assert train.batch(np.arange(len(train)))[0].max() < 1000 <= val.batch(np.arange(len(val)))[0].min()
    assert (len(train), len(val)) == (4, 2)

def test_ready_made_shards_train_without_a_manifest(tmp_path):
    for name, tokens in {"fineweb_val_000000.bin": [7] * 9, "fineweb_train_000001.bin": range(9),
                         "fineweb_train_000002.bin": range(100, 109)}.items():
        (tmp_path / name).write_bytes(llm_c_bytes(list(tokens)))
    train, val = (TokenDataset(str(tmp_path), split, 8) for split in ("train", "val"))
    assert train.batch([0, 1])[1].tolist() == [list(range(1, 9)), list(range(101, 109))]
    assert val.batch([0])[1].tolist() == [[7] * 8]

NAMES = {
    "train": ["train_00000.bin", "fineweb_train_000001.bin", "train.bin", "train0.bin", "7train.bin",
              "TRAIN_1.bin", "medieval_train_0.bin", "x (train).bin"],
    "val": ["val_00000.bin", "val.bin", "validation-3.bin", "x.val.bin", "Val 2.bin", "pretrain_val.bin"],
    None: ["medieval.bin", "estival_0.bin", "retrained.bin", "valid.bin", "trainval.bin", "dev.bin",
           "éval.bin", "valé.bin", "train_0.bin.tmp", "train.txt", "._train_0.bin", "train_0.binary"],
}

@pytest.mark.parametrize("name, split", [(name, split) for split, some in NAMES.items() for name in some])
def test_a_word_of_its_own_in_a_shard_s_name_is_its_split(tmp_path, name, split):
    (tmp_path / name).write_bytes(llm_c_bytes(range(9)))
    for asked in ("train", "val"):
        if asked == split:
            assert TokenDataset(tmp_path, asked, 8).paths == [str(tmp_path / name)]
        else:
            with pytest.raises(UserError, match=f"no {asked} shards"):
                TokenDataset(tmp_path, asked, 8)

@pytest.mark.parametrize("name", [
    "pretrain_val_train.bin", "train-val.bin", "validation.train.bin", "val_train_val.bin"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_name_that_says_both_splits_is_an_error(tmp_path, name, split):
    put_shards(tmp_path, [9])
    put_shards(tmp_path, [9], "val")
    (tmp_path / name).write_bytes(llm_c_bytes(range(9)))
    with pytest.raises(UserError, match=f"{re.escape(name)} says both"):
        TokenDataset(tmp_path, split, 8)

@settings(deadline=None, max_examples=200)
@given(names=st.lists(st.lists(st.sampled_from([*"_-.0aé", "train", "val", "validation"]), max_size=5)))
def test_no_name_is_in_both_splits(names):
    with tempfile.TemporaryDirectory() as folder:
        for pieces in names:
            Path(folder, f"{''.join(pieces)}.bin").write_bytes(llm_c_bytes(range(9)))
        chosen = []
        for split in ("train", "val"):
            with contextlib.suppress(UserError):
                chosen.append(set(TokenDataset(folder, split, 8).paths))
        assert len(chosen) < 2 or chosen[0].isdisjoint(chosen[1])

@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("with_manifest", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_one_file_under_two_names_is_not_in_both_splits(tmp_path, link, with_manifest, split):
    put_shards(tmp_path, [9, 9])
    link(tmp_path / "train_00001.bin", tmp_path / "val_00000.bin")
    if with_manifest:
        put_manifest(tmp_path)
    with pytest.raises(UserError, match=r"train_00001\.bin and val_00000\.bin .* one file"):
        TokenDataset(tmp_path, split, 4)

def test_links_to_shards_elsewhere_are_read(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    put_shards(tmp_path / "store", [9, 9])
    (tmp_path / "data" / "train_0.bin").symlink_to("../store/train_00000.bin")
    (tmp_path / "data" / "val_0.bin").symlink_to("../store/train_00001.bin")
    for split in ("train", "val"):
        assert len(TokenDataset(tmp_path / "data", split, 8)) == 1

def test_a_folder_with_brackets_in_its_name_is_read(tmp_path):
    folder = tmp_path / "c4[1]"
    folder.mkdir()
    put_shards(folder, [9])
    assert len(TokenDataset(str(folder), "train", 8)) == 1

def test_a_manifest_names_the_shards_that_count(tmp_path):
    put_shards(tmp_path, [9])
    put_manifest(tmp_path)
    put_shards(tmp_path, [9, 9, 9])
    assert len(TokenDataset(tmp_path, "train", 8)) == 1

@pytest.mark.parametrize("seq_len, valid", [(7, True), (8, False)])
def test_shards_shorter_than_a_window_are_refused(tmp_path, seq_len, valid):
    put_shards(tmp_path, [8, 8])
    with pytest.raises(ValueError, match="--seq_len") if not valid else contextlib.nullcontext():
        assert len(TokenDataset(tmp_path, "train", seq_len)) == 2

@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seq_len=st.integers(1, 50))
def test_the_window_that_an_error_names_fits_and_the_next_does_not(lengths, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        put_shards(folder, lengths)
        try:
            assert len(TokenDataset(folder, "train", seq_len)) >= 1
        except UserError as e:
            assert f"longest train shard of {folder} has {max(lengths)} tokens" in str(e)
            fits = re.search(r"--seq_len (\d+) or less", str(e))
            assert bool(fits) == (max(lengths) > 1) and "more text" in str(e)
            if fits:
                assert len(TokenDataset(folder, "train", int(fits[1]))) >= 1
                with pytest.raises(UserError):
                    TokenDataset(folder, "train", int(fits[1]) + 1)

def test_a_folder_without_shards_of_the_split_is_refused(tmp_path):
    for split in ("train", "val"):             # in the second round there is a train shard
        with pytest.raises(ValueError, match=f"no {split} shard.*{re.escape(str(tmp_path))}.*prepare_c4.py"):
            TokenDataset(tmp_path, split, 4)
        put_shards(tmp_path, [9])

def test_a_shard_that_disagrees_with_the_manifest_is_refused(tmp_path):
    put_shards(tmp_path, [9, 9])
    put_manifest(tmp_path, train_00001=8)
    with pytest.raises(ValueError, match=r"train_00001.bin.*\b9\b.*\b8\b"):
        TokenDataset(tmp_path, "train", 4)

@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])], ids=["gone", "cut"])
def test_a_shard_that_is_gone_or_cut_is_refused_by_name(tmp_path, damage):
    put_shards(tmp_path, [9, 9])
    put_manifest(tmp_path)
    damage(tmp_path / "train_00001.bin")
    with pytest.raises(ValueError, match="train_00001.bin"):
        TokenDataset(tmp_path, "train", 4)

def test_an_unfinished_folder_is_refused(tmp_path):
    put_shards(tmp_path, [9])
    put_manifest(tmp_path, complete=False)
    with pytest.raises(ValueError, match="not finished"):
        TokenDataset(tmp_path, "train", 4)

@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"complete": true}', b'{"shards": []}',
    b'{"complete": true, "shards": 5}', b'{"complete": true, "shards": [{}]}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    put_shards(tmp_path, [9])
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json"):
        TokenDataset(tmp_path, "train", 4)

NO_COUNTS = [-1, 1.5, 9.0, "9", None, True, [9], 2**63, 10**30]

NO_DIGESTS = ["", "0" * 63, "0" * 65, "Z" * 64, 5, None, [DIGEST]]

@pytest.mark.parametrize("entry, values", [
    ("name", [None, 5, "", ["a"], {}]), ("split", ["test", "", None, 5, ["train"], {}]),
    ("tokens", NO_COUNTS), ("bytes", NO_COUNTS), ("documents", NO_COUNTS), ("sha256", NO_DIGESTS)])
def test_an_entry_of_a_shard_that_has_another_type_is_refused_by_its_name(tmp_path, entry, values):
    for value in values:
        manifest_of(tmp_path, **{entry: value})
        with pytest.raises(UserError, match=f"manifest.json.*{entry}|manifest.json.*names the file"):
            load_manifest(str(tmp_path))

@pytest.mark.parametrize("entry, values", [
    ("version", [2, 0, "1", None, True, 1.0]), ("complete", [None, 1, "true", []]),
    ("shards", [None, 5, {}, "train", [5], [None], [[]], [ENTRY, 5]]),
    ("tokenizer", [None, 5, [], "byte", {}]),
    ("tokenizer", [{"sha256": 5}, {"sha256": "a"}, {"sha256": DIGEST, "vocab_size": -1}]),
    ("tokenizer", [{"sha256": DIGEST, "eot": "256"}, {"sha256": DIGEST, "vocab_size": 1e3}])])
def test_an_entry_of_a_manifest_that_has_another_type_is_refused(tmp_path, entry, values):
    for value in values:
        manifest_of(tmp_path, {entry: value})
        with pytest.raises(UserError, match="manifest.json is damaged"):
            load_manifest(str(tmp_path), unfinished=True)

@pytest.mark.parametrize("name", [
    "../train_00000.bin", "/dev/zero", "sub/train_00000.bin", "./train_00000.bin", "..", ".", "a\\b.bin",
    "a\nb.bin", "a\0b.bin", "\ud800.bin"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    put_shards(tmp_path, [9])
    put_shards(folder / "sub", [9])
    manifest_of(folder, name=name)
    with pytest.raises(UserError, match="manifest.json.*names the file") as caught:
        TokenDataset(folder, "train", 4)
    assert str(caught.value).isprintable(), "one line"

def test_a_whole_manifest_is_read_and_so_is_one_of_fewer_entries(tmp_path):
    manifest_of(tmp_path)
    assert load_manifest(tmp_path) == WHOLE
    assert TokenDataset(tmp_path, "train", 4).tokenizer_sha256 == DIGEST
    put_manifest(tmp_path)
    assert TokenDataset(tmp_path, "train", 4).tokenizer_sha256 is None

def test_a_manifest_is_read_with_entries_that_nobody_knows(tmp_path):
    manifest_of(tmp_path, {"sources": {"a": [1, 2]}, "new": None}, colour=DIGEST)
    assert load_manifest(tmp_path)["sources"] == {"a": [1, 2]}

def test_the_manifest_of_a_run_that_goes_on_is_read_where_that_is_asked_for(tmp_path):
    manifest_of(tmp_path, {"complete": False})
    assert load_manifest(tmp_path, unfinished=True)["shards"] == [ENTRY]
    with pytest.raises(UserError, match="not finished"):
        load_manifest(tmp_path)

@pytest.mark.parametrize("second", [{}, {"split": "val"}])
def test_a_manifest_that_names_a_shard_twice_is_refused(tmp_path, second):
    manifest_of(tmp_path, {"shards": [ENTRY, {**ENTRY, **second}]})
    with pytest.raises(UserError, match="manifest.json.*train_00000.bin twice"):
        TokenDataset(tmp_path, "train", 4)

@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe{}", b'{"complete": tru'])
def test_a_manifest_that_is_no_json_is_one_line(tmp_path, content):
    put_shards(tmp_path, [9])
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json.*prepare_c4.py"):
        TokenDataset(tmp_path, "train", 4)

@pytest.mark.parametrize("target", ["/dev/zero", "nowhere", "."])
def test_a_manifest_that_is_no_file_is_refused_and_not_ignored(tmp_path, target):
    put_shards(tmp_path, [9])
    (tmp_path / "manifest.json").symlink_to(target)
    with pytest.raises(UserError, match="manifest.json"):
        TokenDataset(tmp_path, "train", 4)

def test_a_byte_order_mark_in_front_of_a_manifest_is_no_part_of_it(tmp_path):
    manifest_of(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_manifest(tmp_path) == WHOLE

def test_a_manifest_cut_anywhere_is_refused(tmp_path):
    put_shards(tmp_path, [9])
    put_manifest(tmp_path)
    whole = (tmp_path / "manifest.json").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="manifest.json"):
            TokenDataset(tmp_path, "train", 4)

def test_one_token_outside_the_vocabulary_is_found(tmp_path):
    put_shards(tmp_path, [20, 20])                                     # the last token is 39
    windows = TokenDataset(tmp_path, "train", 4)
    windows.check_ids(40)
    with pytest.raises(ValueError, match=r"train_00001.bin.*\b39\b"):
        windows.check_ids(39)

def sparse_shard(path, tokens: int, last: int = 0):
    """A shard of zeros that takes no room on the disk, but for its last token."""
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
        f.truncate(1024 + 2 * tokens)
        f.seek(-2, os.SEEK_END)
        f.write(struct.pack("<H", last))

def test_a_bad_token_far_into_a_shard_is_found(tmp_path):
    sparse_shard(tmp_path / "train_00000.bin", (1 << 24) + 5, last=300)
    windows = TokenDataset(tmp_path, "train", 1024)
    windows.check_ids(301)
    with pytest.raises(ValueError, match=r"\b300\b"):
        windows.check_ids(257)

@pytest.mark.parametrize("change", [
    lambda folder: put_shards(folder, [9, 8]), lambda folder: put_shards(folder, [9, 9], first=1),
    lambda folder: (folder / "train_00001.bin").rename(folder / "train_00002.bin")],
    ids=["length", "content", "name"])
def test_the_fingerprint_follows_the_data_and_not_the_folder(tmp_path, change):
    prints = []
    for name, alter in {"a": lambda folder: None, "b": lambda folder: None, "c": change}.items():
        (tmp_path / name).mkdir()
        put_shards(tmp_path / name, [9, 9])
        alter(tmp_path / name)
        put_manifest(tmp_path / name)
        prints.append(TokenDataset(tmp_path / name, "train", 4).fingerprint)
    assert prints[0] == prints[1] != prints[2]

READER = """
import os, sys
import numpy as np
from nanolost.data import TokenDataset

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

data = TokenDataset(sys.argv[1], "train", 1024)
def read(first, last):
    for i in range(first, last, 256):
        data.batch(np.arange(i, i + 256))

read(0, 10_240)                                # 20 MB
before, largest = resident(), 0
for first in range(10_240, 112_640, 2048):     # 200 MB more
    read(first, first + 2048)
    largest = max(largest, resident())
print(largest - before)
"""

@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_resident_memory_does_not_grow_with_the_tokens_read(tmp_path):
    sparse_shard(tmp_path / "train_00000.bin", 116_000 * 1024)
    assert int(subprocess.check_output([sys.executable, "-c", READER, tmp_path], cwd=ROOT)) < 40e6
