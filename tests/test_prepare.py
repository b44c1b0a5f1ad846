"""prepare_c4.py: every text comes out as it went in, whatever happens on the way."""
import collections
import concurrent.futures
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiktoken

import prepare_c4
from nanolost import files
from nanolost.data import read_shard
from nanolost.errors import UserError
from nanolost.flags import parse
from nanolost.tokenizer import GPT2_PATTERN, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
ODD_TEXTS = ["", "a\nb\r\nc", "été 🙂 \u2028\u0085", "<|endoftext|>", '"a" \\ b\0', "  \n\n ", "last"]

def prepare(out_dir, **values) -> dict:
    values = {"tokenizer": "byte", "workers": 1, **values}
    prepare_c4.main(prepare_c4.Config(out_dir=str(out_dir), **values))
    return manifest_of(out_dir)

def manifest_of(out_dir) -> dict:
    return json.loads((out_dir / "manifest.json").read_text())

def files_of(out_dir) -> dict[str, bytes]:
    """Without the lock, which says who held it last."""
    return {path.name: path.read_bytes() for path in sorted(out_dir.iterdir()) if path.name != ".lock"}

def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

def json_lines(texts) -> bytes:
    return "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in texts).encode()

def put(path, texts) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = json_lines(texts)
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return str(path)

def some_texts(count: int, seed: int = 0, words: int = 20) -> list[str]:
    """Texts of different lengths, no two alike."""
    draw, vocabulary = random.Random(seed), ["low", "rank", "sparse", "été", "\n\n"]
    lengths = [draw.randrange(words) for _ in range(count)]
    return [f"{seed}.{i}: " + " ".join(draw.choices(vocabulary, k=k)) for i, k in enumerate(lengths)]

def split_documents(tokens, tokenizer) -> list[str]:
    assert tokens[0] == tokenizer.eot, "a shard begins inside a document"
    edges = [*np.flatnonzero(tokens == tokenizer.eot), len(tokens)]
    return [tokenizer.decode(tokens[a + 1:b]) for a, b in itertools.pairwise(edges)]

def documents_by_shard(out_dir, split: str) -> list[list[str]]:
    tokenizer = Tokenizer.load(out_dir / "tokenizer.json")
    names = [shard["name"] for shard in manifest_of(out_dir)["shards"] if shard["split"] == split]
    assert names == [f"{split}_{i:05d}.bin" for i in range(len(names))]
    return [split_documents(read_shard(out_dir / name), tokenizer) for name in names]

def documents(out_dir, split: str) -> list[str]:
    return sum(documents_by_shard(out_dir, split), [])

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)

@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"

@pytest.fixture
def val(tmp_path):
    """A validation file, where a test is about the other one."""
    return put(tmp_path / "v.jsonl", ["v"])

# --- what goes in comes out ---

@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_documents_are_the_texts_in_order(tmp_path, suffix, tokenizer, out):
    first, second, val = ODD_TEXTS + some_texts(60), some_texts(60, 1), some_texts(9, 2)
    put(tmp_path / f"b{suffix}", second), put(tmp_path / f"a{suffix}", first)
    prepare(out, input=[str(tmp_path / f"[ab]{suffix}")], tokenizer=tokenizer, shard_tokens=700,
            val_input=[put(tmp_path / f"v{suffix}", val)])
    assert documents(out, "train") == first + second
    assert documents(out, "val") == val

def test_several_patterns_are_one_sorted_list_without_repeats(tmp_path, out):
    for name in "cab":
        put(tmp_path / f"{name}.jsonl", [f"text of {name}"])
    patterns = [str(tmp_path / "c.jsonl"), str(tmp_path / "*.jsonl")]
    prepare(out, input=patterns, val_input=[put(tmp_path / "val" / "d.jsonl", ["text of d"])])
    assert documents(out, "train") == ["text of a", "text of b", "text of c"]

@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_pieces_of_a_text_give_it_back_byte_for_byte(tmp_path, name, ending, val, out):
    draw = random.Random(3)
    lines = ["été " * draw.choice([0, 0, 1, 20, 300]) + str(i) * draw.choice([0, 1]) for i in range(500)]
    raw = ending.join([*lines, "x" * 250_000, "", "no end of line"]).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    prepare(out, input=[str(tmp_path / name)], val_input=[val])
    pieces = documents(out, "train")
    assert "".join(pieces).encode() == raw
    assert len(pieces) > 20 and all(len(piece.encode()) > 2000 for piece in pieces[:-1])

def test_the_builtin_text_is_python_s_own(tmp_path, val, out):
    from pydoc_data.topics import topics
    prepare(tmp_path / "whole", input=["builtin"], val_input=[val])
    pieces = documents(tmp_path / "whole", "train")
    assert "".join(pieces).rstrip("\n") == "\n\n".join(topics[name] for name in sorted(topics)).rstrip("\n")
    prepare(out, input=["builtin"])
    for split in ("train", "val"):
        assert documents(out, split) == [p for p in pieces if prepare_c4.split_of(p) == split]

@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_the_figures_of_the_manifest_match_a_recount(tmp_path, out, tokenizer):
    source = put(tmp_path / "a.jsonl", ODD_TEXTS + some_texts(300))
    manifest = prepare(out, input=[source], tokenizer=tokenizer, shard_tokens=3000)
    saved = Tokenizer.load(out / "tokenizer.json")
    for shard in manifest["shards"]:
        tokens = read_shard(out / shard["name"])
        texts = split_documents(tokens, saved)
        assert shard["split"] == shard["name"].split("_")[0]
        assert shard["sha256"] == sha256(out / shard["name"])
        assert (shard["tokens"], shard["documents"]) == (len(tokens), len(texts))
        assert shard["bytes"] == len("".join(texts).encode()) == saved.token_bytes()[tokens].sum()
    size = {"byte": 257, "train:300": 300}[tokenizer]
    assert (saved.vocab_size, saved.eot) == (size, size - 1)
    digests = {"identity": saved.identity(), "sha256": sha256(out / "tokenizer.json")}
    assert manifest["tokenizer"] == {"name": tokenizer, "vocab_size": size, "eot": size - 1,
                                     "start": [size - 1], **digests}
    assert manifest["complete"] is True and source in json.dumps(manifest)
    assert len(manifest["shards"]) > 2
    assert set(files_of(out)) == {"manifest.json", "tokenizer.json", *(s["name"] for s in manifest["shards"])}

def test_the_output_does_not_depend_on_the_workers(tmp_path, val):
    draw = random.Random(0)
    texts = [f"{i} " + draw.choice("abcd") * draw.randrange(100_000, 400_000) for i in range(24)]
    source = put(tmp_path / "a.jsonl.gz", texts)                       # 6 MB, six batches
    for workers in (1, 2):
        prepare(tmp_path / str(workers), input=[source], val_input=[val], workers=workers,
                shard_tokens=10**6)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert documents(tmp_path / "2", "train") == texts

def test_few_documents_are_read_ahead_of_the_encoded_ones():
    read = itertools.count()
    class Pool:
        def submit(self, encode, tokenizer, texts):
            future = concurrent.futures.Future()
            future.set_result([np.zeros(1) for _ in texts])
            return future
    many = ((next(read), "train", "x" * 300_000) for _ in range(1000))
    encoded = prepare_c4.encoded(many, None, Pool(), 2)
    assert [position for position, *_ in itertools.islice(encoded, 200)] == list(range(200))
    assert next(read) - 200 <= (4 * 2 + 1) * 4                         # 4 batches a worker and the open one

def test_a_vocabulary_above_65536_gives_uint32_shards(tmp_path, out):
    from base64 import b64encode
    tokens = [bytes([b]) for b in range(256)] + [b"%06d" % i for i in range(70_000)]
    path = tmp_path / "big.tiktoken"
    path.write_bytes(b"".join(b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    source, val = put(tmp_path / "a.jsonl", ODD_TEXTS), put(tmp_path / "v.jsonl", ["069999"])
    prepare(out, input=[source], val_input=[val], tokenizer=str(path), split_pattern=GPT2_PATTERN)
    assert read_shard(out / "train_00000.bin").dtype == np.uint32
    assert read_shard(out / "val_00000.bin").tolist() == [70_256, 70_255]
    assert documents(out, "train") == ODD_TEXTS

def test_every_document_of_a_real_corpus_comes_back(real_data, out):
    source = os.path.join(real_data, "corpus-validation.00000-of-00001.json.gz")
    prepare(out, input=[source], tokenizer="train:2048", workers=2)
    with gzip.open(source) as f:
        texts = [json.loads(line)["text"] for line in f]
    train, val = documents(out, "train"), documents(out, "val")
    assert len(texts) > 400 and collections.Counter(train + val) == collections.Counter(texts)
    assert sum(s["tokens"] for s in manifest_of(out)["shards"]) < len("".join(texts)) / 3

# --- splits and limits ---

def test_a_document_s_split_does_not_depend_on_its_place(tmp_path):
    one, two = some_texts(400), some_texts(400, 1)
    for name, first, second in [("x", one, two), ("y", two[::-1], one[::-1])]:
        put(tmp_path / name / "a.jsonl", first), put(tmp_path / name / "b.jsonl", second + first[:50])
        prepare(tmp_path / f"out_{name}", input=[str(tmp_path / name / "*.jsonl")])
    folders = "out_x", "out_y"
    x, y = ([set(documents(tmp_path / name, split)) for split in ("train", "val")] for name in folders)
    assert x == y
    assert x[0] | x[1] == set(one + two) and not x[0] & x[1]

def test_about_one_document_in_fifty_is_validation():
    splits = collections.Counter(map(prepare_c4.split_of, some_texts(20_000)))
    assert set(splits) == {"train", "val"} and 320 <= splits["val"] <= 480      # 400, deviation 20

@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("last", [0, 30])
def test_each_split_stops_at_the_document_that_reaches_its_limit(tmp_path, out, last, beyond):
    texts = {"train": some_texts(100), "val": some_texts(100, 1)}
    ends = {split: np.cumsum([1 + len(text.encode()) for text in own]) for split, own in texts.items()}
    files = {split: [put(tmp_path / f"{split}.jsonl", own)] for split, own in texts.items()}
    prepare(out, input=files["train"], train_tokens=int(ends["train"][last]) + beyond, shard_tokens=900,
            val_input=files["val"], val_tokens=int(ends["val"][last + 5]) + beyond)
    assert documents(out, "train") == texts["train"][:last + 1 + (beyond > 0)]
    assert documents(out, "val") == texts["val"][:last + 6 + (beyond > 0)]

def test_hash_splits_stop_each_at_its_own_limit(tmp_path, out):
    texts = some_texts(1500)
    prepare(out, input=[put(tmp_path / "a.jsonl", texts)], train_tokens=3000, val_tokens=500)
    for split, limit in [("train", 3000), ("val", 500)]:
        own = [text for text in texts if prepare_c4.split_of(text) == split]
        ends = np.cumsum([1 + len(text.encode()) for text in own])
        assert documents(out, split) == own[:int(np.searchsorted(ends, limit)) + 1]

def test_shards_are_full_and_end_with_a_whole_document(tmp_path, val, out):
    texts = [*some_texts(200), "long " * 300, *some_texts(50, 1)]
    prepare(out, input=[put(tmp_path / "a.jsonl", texts)], shard_tokens=800,
            val_input=[val])
    shards = documents_by_shard(out, "train")
    assert sum(shards, []) == texts
    sizes = [sum(1 + len(text.encode()) for text in shard) for shard in shards]
    assert all(size <= 800 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    following = [1 + len(shard[0].encode()) for shard in shards[1:]]
    assert all(size + more > 800 for size, more in zip(sizes, following, strict=False))

def test_a_finished_split_is_not_read_again(tmp_path, out):
    train, val = (put(tmp_path / name, some_texts(50, seed)) for seed, name in
                  enumerate(("train.jsonl", "val_0.jsonl")))
    more = put(tmp_path / "val_1.jsonl", some_texts(5, 2))
    def attempt():
        return prepare(out, input=[train], val_input=[val, more], val_tokens=100)
    with open(train, "a", encoding="utf-8") as f:
        f.write("no json\n")
    with pytest.raises(UserError, match="train.jsonl:51"):
        attempt()
    put(tmp_path / "train.jsonl", some_texts(50))
    (tmp_path / "val_1.jsonl").write_text("no json\n")
    assert attempt()["complete"]

@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_no_text_is_in_both_splits(tmp_path, monkeypatch, capsys, out, link):
    monkeypatch.chdir(tmp_path)
    for name in ("x-0", "x-1", "x-val"):
        put(tmp_path / f"{name}.jsonl", [f"text of {name}"])
    link("x-1.jsonl", "x-link.jsonl")
    prepare(out, input=["./x-*.jsonl"], val_input=["x-val.jsonl", str(tmp_path / "x-link.jsonl")])
    assert documents(out, "train") == ["text of x-0"]
    assert sorted(documents(out, "val")) == ["text of x-1", "text of x-val"]
    assert "validation only, as --val_input names it: ./x-1.jsonl" in capsys.readouterr().out

def test_input_that_is_all_validation_is_refused(tmp_path, out):
    source = put(tmp_path / "a.jsonl", some_texts(200))
    with pytest.raises(UserError, match="--val_input names every file of --input"):
        prepare(out, input=[source], val_input=[str(tmp_path / "*.jsonl")])
    assert not out.exists()

@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_file_under_two_names_is_read_once(tmp_path, monkeypatch, val, out, link):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", ["a"])
    link(tmp_path / "a.jsonl", tmp_path / "link.jsonl")
    prepare(out, input=["a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), "link.jsonl"], val_input=[val])
    assert documents(out, "train") == ["a"]

# --- a text of few documents ---

def of_one_split(count: int, split: str = "train") -> list[str]:
    return [text for text in some_texts(60 * count, words=40) if prepare_c4.split_of(text) == split][:count]

FEW = {
    "eighty.jsonl": json_lines(of_one_split(80)),
    "all_validation.jsonl": json_lines(of_one_split(40, "val")),
    "two.jsonl": json_lines(["a" * 5000, "b" * 5000]),
    "book.txt": "".join(f"line {i} of a book\n" for i in range(500)).encode(),
    "one_line.txt": ("word été 🙂 " * 300).encode(),
    "no_space.txt": ("é" * 1000).encode(),
    "two_letters.txt": b"ab",
}

@pytest.mark.parametrize("name", FEW)
def test_the_end_of_a_text_is_validation_where_the_hash_leaves_a_split_empty(tmp_path, capsys, name, out):
    content = FEW[name]
    (tmp_path / name).write_bytes(content)
    for workers, folder in ((1, out), (2, tmp_path / "again")):
        prepare(folder, input=[str(tmp_path / name)], workers=workers)
    assert files_of(out) == files_of(tmp_path / "again")
    assert "the last" in capsys.readouterr().out
    train, val = ("".join(documents(out, split)) for split in ("train", "val"))
    texts = [content.decode()]
    if name.endswith("jsonl"):
        texts = [json.loads(line)["text"] for line in content.splitlines()]
    text = "".join(texts)
    assert train + val == text and train and val
    assert len(text) < 10 or 0.1 <= len(val) / len(text) <= 0.2
    if len(texts) > 2:                         # documents stay whole where they are short
        assert documents(out, "train") + documents(out, "val") == texts

def test_a_long_document_is_cut_between_lines_or_else_between_words(tmp_path, out):
    for name, last in (("book.txt", "\n"), ("one_line.txt", " ")):
        (tmp_path / name).write_bytes(FEW[name])
        prepare(tmp_path / "out" / name, input=[str(tmp_path / name)])
        assert documents(tmp_path / "out" / name, "train")[-1].endswith(last)

def test_a_trained_tokenizer_does_not_see_text_held_out_by_position(tmp_path):
    *texts, last = of_one_split(80)
    other = "zq" * 1000
    assert prepare_c4.split_of(other[:len(last)]) == "train"
    for name, end in (("a", last), ("b", other[:len(last)])):
        source = put(tmp_path / name / "x.jsonl", [*texts, end])
        prepare(tmp_path / name / "out", input=[source], tokenizer="train:280")
        assert documents(tmp_path / name / "out", "val")[-1] == end
    a, b = (files_of(tmp_path / name / "out")["tokenizer.json"] for name in "ab")
    assert a == b

@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_too_short_for_two_splits_is_refused_with_what_is_needed(tmp_path, text, out):
    with pytest.raises(UserError, match="at least one each.*--seq_len.*--input"):
        prepare(out, input=[put(tmp_path / "a.jsonl", [text])])

def test_a_large_text_is_not_read_twice(tmp_path, monkeypatch, out):
    texts = some_texts(2000)
    source = put(tmp_path / "a.jsonl", texts)
    read = []
    document = prepare_c4.Documents._document
    def counted(self, raw, path, number):
        read.append(number)
        return document(self, raw, path, number)
    monkeypatch.setattr(prepare_c4.Documents, "_document", counted)
    prepare(out, input=[source])
    needed = 1 + next(i for i, text in enumerate(texts) if prepare_c4.split_of(text) == "val")
    assert len(read) == len(texts) + needed and needed < 300

# --- again, interrupted, changed ---

def test_the_same_command_again_does_nothing(tmp_path, monkeypatch, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(200))]}
    prepare(out, **values)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out).iterdir()}
    monkeypatch.setattr(prepare_c4, "ThreadPoolExecutor", None)
    prepare(out, **values)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out).iterdir()} == before

def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)

def another_tokenizer(out_dir):
    t = Tokenizer.named("byte")
    vocabulary = t.engine.vocabulary
    Tokenizer.of(vocabulary.tokens()[::-1], vocabulary.pattern).save(out_dir / "tokenizer.json")

DAMAGES = {
    "train_00001.bin flipped": lambda out: flip_a_byte(out / "train_00001.bin"),
    "val_00000.bin cut": lambda out: os.truncate(out / "val_00000.bin", 1030),
    "train_00000.bin missing": lambda out: (out / "train_00000.bin").unlink(),
    "tokenizer.json changed": another_tokenizer,
    "tokenizer.json missing": lambda out: (out / "tokenizer.json").unlink(),
    "manifest.json cut": lambda out: os.truncate(out / "manifest.json", 100),
    "manifest.json missing": lambda out: (out / "manifest.json").unlink(),
}

@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_passes_a_good_folder_and_names_what_was_damaged(tmp_path, damage, out):
    prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(300))], shard_tokens=4000)
    prepare(out, verify=True)
    DAMAGES[damage](out)
    before = files_of(out)
    with pytest.raises(UserError, match=damage.split()[0]):
        prepare(out, verify=True)
    assert files_of(out) == before

@pytest.mark.parametrize("complete", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("damage", ["val_00000.bin cut", "train_00000.bin missing"])
def test_a_folder_that_has_lost_a_shard_is_never_called_complete(tmp_path, damage, complete, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(300))], "shard_tokens": 4000}
    manifest = prepare(out, **values)
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": complete}))
    DAMAGES[damage](out)
    with pytest.raises(UserError, match=f"{damage.split()[0]}.*delete its folder and run prep"):
        prepare(out, **values)
    shutil.rmtree(out)                         # what was said helps
    assert prepare(out, **values) == manifest

class Killed(BaseException):
    pass

def killed_at(monkeypatch, rename: int, after: bool, out_dir, values) -> bool:
    """Run the command until just before or after its n-th rename. False if it has fewer."""
    left, replace = [rename], os.replace
    def counted(source, target):
        left[0] -= 1
        if left[0] == 0 and not after:
            raise Killed
        replace(source, target)
        if left[0] == 0:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        try:
            prepare(out_dir, **values)
            return False
        except Killed:
            return True

@pytest.fixture(params=["hash split", "validation files", "held out by position"])
def corpus(request, tmp_path, monkeypatch):
    """Flags of a run that writes several shards of each split and stops train at its limit."""
    monkeypatch.setattr(prepare_c4, "VAL_SHARE", 4)
    put(tmp_path / "in" / "a.jsonl", some_texts(70, words=40))
    put(tmp_path / "in" / "b.jsonl.gz", some_texts(70, 1, words=40))
    values = {"input": [str(tmp_path / "in" / "*")], "tokenizer": "train:270",
              "train_tokens": 4000, "shard_tokens": 800}
    if request.param == "validation files":
        values |= {"val_input": [put(tmp_path / "v.jsonl", some_texts(40, 2))], "val_tokens": 1000}
    if request.param == "held out by position":
        texts = of_one_split(60)
        long = " ".join(texts[:30])            # the cut goes through it
        while prepare_c4.split_of(long) == "val":
            long += "."
        put(tmp_path / "in" / "a.jsonl", [*texts, long])
        os.remove(tmp_path / "in" / "b.jsonl.gz")
    return values

def test_a_run_killed_at_any_rename_continues_to_the_same_files(tmp_path, monkeypatch, corpus):
    prepare(tmp_path / "straight", **corpus)
    straight = files_of(tmp_path / "straight")
    shards = len(straight) - 2
    renames = 3 + 2 * shards + 1               # manifest, tokenizer, its entry, each shard and its, manifest
    for rename, after in itertools.product(range(1, renames + 1), [False, True]):
        folder = tmp_path / f"killed_{rename}_{after}"
        assert killed_at(monkeypatch, rename, after, folder, corpus)
        named = {name: raw for name, raw in files_of(folder).items() if not name.endswith(".tmp")}
        assert all(raw == straight[name] for name, raw in named.items() if name != "manifest.json")
        if (rename, after) != (renames, True):                         # then the manifest says complete
            (folder / "train_00099.bin.tmp").write_bytes(b"left over")
        prepare(folder, **corpus)
        assert files_of(folder) == straight, f"killed {'after' if after else 'before'} rename {rename}"
    assert shards >= 4 and not killed_at(monkeypatch, renames + 1, False, tmp_path / "whole", corpus)

def test_a_run_killed_again_and_again_reaches_the_same_files(tmp_path, monkeypatch, corpus, out):
    prepare(tmp_path / "straight", **corpus)
    runs = 1
    while killed_at(monkeypatch, 2, runs % 2 == 0, out, corpus):
        runs += 1
        assert runs < 50
    assert runs > 5 and files_of(out) == files_of(tmp_path / "straight")

@pytest.fixture
def running(tmp_path):
    """The command as a process that has written some of its 200 shards, and its flags."""
    source = put(tmp_path / "a.jsonl", some_texts(3000))
    argv = ["--out_dir=out", "--input", source, "--tokenizer=byte", "--workers=2", "--shard_tokens=800"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare_c4.py", *argv], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               # a shell starts a background process with SIGINT ignored, which is inherited
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "out" / "train_00002.bin").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    yield process, {"input": [source], "shard_tokens": 800}
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()

def test_a_killed_process_leaves_what_the_same_command_continues(tmp_path, running, out):
    process, values = running
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not manifest_of(out)["complete"]
    begun = [name for name in os.listdir(out) if name.endswith(".bin")]
    kept = {name: (out / name).read_bytes() for name in begun}
    prepare(tmp_path / "straight", **values)
    straight = files_of(tmp_path / "straight")
    assert kept and kept.items() <= straight.items() and len(kept) < len(straight) - 2
    prepare(out, **values)
    assert files_of(out) == straight

def test_ctrl_c_ends_with_one_line_and_the_same_command_continues(tmp_path, running, out):
    process, values = running
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=20)[0].decode()
    assert process.returncode == 1 and "error: interrupted" in output and "Traceback" not in output
    prepare(tmp_path / "straight", **values)
    prepare(out, **values)
    assert files_of(out) == files_of(tmp_path / "straight")

@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_tokenizing_starts_no_process_that_could_be_killed_alone(running):
    process, _ = running
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""

def test_a_second_command_on_a_folder_is_refused_and_changes_nothing(tmp_path, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(200))]}
    with files.claim(str(out), "trains"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* in .*out: stop it"):
            prepare(out, **values)
        assert files_of(out) == {}
    assert prepare(out, **values)["complete"]

def interrupted(tmp_path, monkeypatch, out, **more) -> dict:
    """Flags of a run that was killed with shards of a.jsonl and none of b.jsonl."""
    for seed, name in enumerate("ab"):
        put(tmp_path / f"{name}.jsonl", some_texts(200, seed))
    values = {"input": [str(tmp_path / "[ab].jsonl")], "shard_tokens": 2000, **more}
    assert killed_at(monkeypatch, 5, True, out, values)
    assert len(manifest_of(out)["shards"]) == 1
    return values

@pytest.mark.parametrize("change", ["other text", "same size", "other time"])
def test_a_text_that_changed_after_an_interruption_is_refused(tmp_path, monkeypatch, change, out):
    values = interrupted(tmp_path, monkeypatch, out)
    source = tmp_path / "a.jsonl"
    raw, times = source.read_bytes(), source.stat()
    source.write_bytes({"other text": raw + GOOD, "same size": raw[::-1], "other time": raw}[change])
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + (change != "other text")))
    before = files_of(out)
    with pytest.raises(UserError, match="a.jsonl has changed since .*put the old one back.*delete"):
        prepare(out, **values)
    assert files_of(out) == before
    source.write_bytes(raw)                    # what was said helps
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(out, **values)
    prepare(tmp_path / "straight", **values)
    assert files_of(out) == files_of(tmp_path / "straight")

def test_a_text_that_no_shard_was_made_from_may_still_be_mended(tmp_path, monkeypatch, out):
    values = interrupted(tmp_path, monkeypatch, out)
    put(tmp_path / "b.jsonl", some_texts(100, 7))
    prepare(out, **values)
    prepare(tmp_path / "straight", **values)
    assert files_of(out) == files_of(tmp_path / "straight")

def test_a_change_of_the_text_moves_what_is_held_out_by_position(tmp_path, monkeypatch, out):
    put(tmp_path / "a.jsonl", of_one_split(60)), put(tmp_path / "b.jsonl", of_one_split(9))
    values = {"input": [str(tmp_path / "[ab].jsonl")], "shard_tokens": 2000}
    assert killed_at(monkeypatch, 5, True, out, values)
    put(tmp_path / "b.jsonl", of_one_split(30))
    with pytest.raises(UserError, match="b.jsonl has changed"):
        prepare(out, **values)

def test_a_finished_folder_is_not_called_complete_for_a_changed_text(tmp_path, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(200))]}
    prepare(out, **values)
    put(tmp_path / "a.jsonl", some_texts(201))
    with pytest.raises(UserError, match="a.jsonl has changed"):
        prepare(out, **values)

def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, val, out):
    source = put(tmp_path / "a.jsonl", ["text " * 300_000 for _ in range(3)])
    encode_all = prepare_c4.encode_all
    def changing(tokenizer, texts):
        os.utime(source, ns=(1, 1))
        return encode_all(tokenizer, texts)
    monkeypatch.setattr(prepare_c4, "encode_all", changing)
    with pytest.raises(UserError, match="a.jsonl changed while it was read"):
        prepare(out, input=[source], val_input=[val])
    assert not manifest_of(out)["complete"]

@pytest.mark.parametrize("changed", ["input", "tokenizer", "train_tokens"])
def test_a_first_try_that_wrote_no_shard_binds_nobody(tmp_path, changed, out):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(json_lines(some_texts(300, 1)) + b"not JSON\n")
    with pytest.raises(UserError, match="bad.jsonl:301"):
        prepare(out, input=[str(bad)])
    assert "tokenizer" in manifest_of(out) and not manifest_of(out)["shards"]
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(300))]}
    values |= {"tokenizer": {"tokenizer": "train:300"}, "train_tokens": {"train_tokens": 99}}.get(changed, {})
    prepare(out, **values)
    prepare(tmp_path / "straight", **values)
    assert files_of(out) == files_of(tmp_path / "straight")

@pytest.mark.parametrize("name", ["tokenizer.json", "train_00000.bin", "val_00001.bin"])
def test_files_that_are_not_ours_are_not_overwritten(tmp_path, name, out):
    out.mkdir()
    (out / name).write_bytes(b"somebody's")
    with pytest.raises(UserError, match=f"{name} is in the way.*another --out_dir"):
        prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(200))])
    assert files_of(out) == {name: b"somebody's"}

def test_temporary_files_of_others_stay(tmp_path, out):
    out.mkdir()
    (out / "notes.tmp").write_bytes(b"somebody's")
    prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(200))])
    assert (out / "notes.tmp").read_bytes() == b"somebody's"

@pytest.mark.parametrize("complete", [True, False], ids=["finished", "unfinished"])
def test_a_folder_of_an_earlier_version_is_continued(tmp_path, monkeypatch, complete, out):
    values = interrupted(tmp_path, monkeypatch, out)
    if complete:
        prepare(out, **values)
    manifest = manifest_of(out)
    for name in ("sources", "revisions", "held_out"):
        del manifest[name]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(out, **values)["complete"]
    texts = some_texts(200) + some_texts(200, 1)
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(texts)

ODD_MANIFESTS = {
    "empty": {},
    "a list": [],
    "no shards": {"complete": True, "shards": []},
    "shards are a number": {"complete": True, "shards": 5},
    "a shard is a list": {"complete": True, "shards": [[]]},
    "no digest": {"complete": True, "shards": [{"name": "train_00000.bin", "split": "train", "tokens": 1}]},
    "a path": {"complete": True, "shards": [
        {"name": "../out/train_00000.bin", "split": "train", "tokens": 1, "sha256": "0" * 64}]},
    "a device": {"complete": True, "shards": [
        {"name": "/dev/zero", "split": "train", "tokens": 1, "sha256": "0" * 64}]},
    "tokenizer is a text": {"tokenizer": "x"},
    "request is missing": {"request": None},
    "input is a list": {"request": {"input": []}},
    "reached is a list": {"reached": []},
    "reached is a text": {"reached": {"train": "x"}},
    "sources is a list": {"sources": []},
    "held_out is a text": {"held_out": "abc"},
}

@pytest.mark.parametrize("odd", ODD_MANIFESTS)
def test_a_manifest_that_is_none_of_ours_is_refused(tmp_path, monkeypatch, odd, out):
    values = interrupted(tmp_path, monkeypatch, out)
    base = {} if "complete" in ODD_MANIFESTS[odd] or not ODD_MANIFESTS[odd] else manifest_of(out)
    content = ODD_MANIFESTS[odd]
    (out / "manifest.json").write_text(json.dumps(content if isinstance(content, list) else base | content))
    for more in ({}, {"verify": True}):
        with pytest.raises(UserError) as error:
            prepare(out, **values, **more)
        assert "\n" not in str(error.value) and str(out) in str(error.value)

@pytest.mark.parametrize("lacks", ["shards", "a digest"])
def test_a_finished_folder_without_shards_or_digests_is_not_verified(tmp_path, lacks, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(300))]}
    manifest = prepare(out, **values)
    if lacks == "shards":
        manifest["shards"] = []
    else:
        shard = manifest["shards"][0]
        del shard["sha256"]
        (out / shard["name"]).unlink()
    (out / "manifest.json").write_text(json.dumps(manifest))
    for more in ({}, {"verify": True}):
        with pytest.raises(UserError):
            prepare(out, **values, **more)

@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_verify_does_not_follow_a_shard_to_a_device(tmp_path, out):
    prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(300))])
    (out / "train_00000.bin").unlink()
    os.symlink("/dev/zero", out / "train_00000.bin")
    with pytest.raises(UserError, match="train_00000.bin is not what its manifest says"):
        prepare(out, verify=True)

@pytest.mark.parametrize("complete", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("flag, value, named", [
    ("train_tokens", 999, "train_tokens"), ("val_tokens", 999, "val_tokens"), ("input", ["builtin"], "input"),
    ("shard_tokens", 999, "shard_tokens"), ("tokenizer", "train:300", "tokenizer"),
    ("val_input", ["builtin"], "(val_)?input")])
def test_a_changed_flag_is_refused_by_name(tmp_path, out, flag, value, named, complete):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(200))]}
    manifest = prepare(out, **values)
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": complete}))
    before = files_of(out)
    with pytest.raises(UserError, match=rf"--{named}\b"):
        prepare(out, **values | {flag: value})
    assert files_of(out) == before

@pytest.mark.parametrize("damage", ["tokenizer.json changed", "tokenizer.json missing"])
def test_a_run_does_not_continue_with_another_tokenizer(tmp_path, monkeypatch, damage, out):
    values = {"input": [put(tmp_path / "a.jsonl", some_texts(300))], "shard_tokens": 4000}
    assert killed_at(monkeypatch, 4, True, out, values)
    DAMAGES[damage](out)
    with pytest.raises(UserError, match="tokenizer.json"):
        prepare(out, **values)

@pytest.mark.parametrize("name, value", [
    ("train_tokens", 0), ("val_tokens", -1), ("shard_tokens", 0), ("shard_tokens", 2**31), ("workers", 0)])
def test_a_number_out_of_range_is_refused_before_any_work(name, value, out):
    with pytest.raises(UserError, match=f"--{name}"):
        prepare(out, **{"input": ["builtin"], name: value})
    assert not (out).exists()

# --- input that is not as it should be ---

GOOD = json_lines(["good"])
LONG = gzip.compress(json_lines(some_texts(2000, words=99)))
BAD_LINES = {
    "not JSON": b'{"text": "cut',
    "a list": b'["text"]',
    "a text": b'"text"',
    "a number": b"5",
    "brackets without end": b"[" * 200_000,
    "no text key": b'{"txt": "x"}',
    "text is null": b'{"text": null}',
    "text is a number": b'{"text": 5}',
    "text is a list": b'{"text": ["x"]}',
    "no UTF-8": b'{"text": "\xe9t\xe9"}',
    "half a surrogate pair": b'{"text": "\\ud83d"}',
}
MALFORMED = {                                  # file, content, line
    **{fault: ("a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD, 3) for fault, line in BAD_LINES.items()},
    "no UTF-8 in a gzip": ("a.json.gz", gzip.compress(GOOD + b"\xff\n"), 2),
    "no UTF-8 in a short text": ("a.txt", b"one\ntwo\nthr\xffee\nfour\nfive\n", 3),
    "no UTF-8 far into a text": ("a.txt", b"x" * 2001 + b"\n\n" + b"y\n" * 5 + b"\xff\nz\n", 8),
    "a gzip cut in its data": ("a.json.gz", LONG[:len(LONG) // 2], r"\d+"),
    "a gzip cut in its trailer": ("a.json.gz", LONG[:-3], r"\d+"),
    "a gzip with a hole": ("a.json.gz", LONG[:5000] + bytes(9) + LONG[5009:], r"\d+"),
    "no gzip": ("a.jsonl.gz", GOOD, 1),
}

@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_input_is_an_error_with_file_and_line_and_loses_nothing(tmp_path, fault, out):
    name, content, line = MALFORMED[fault]
    (tmp_path / name).write_bytes(content)
    val = put(tmp_path / "v.jsonl", ["finished", "before"])
    with pytest.raises(UserError, match=rf"{re.escape(name)}:{line}: "):
        prepare(out, input=[str(tmp_path / name)], val_input=[val])
    assert documents(out, "val") == ["finished", "before"]
    assert not list((out).glob("train*.bin"))

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.txt", b""), ("a.json.gz", b""), ("a.csv", GOOD), ("a", GOOD),
    ("a.json.gz", gzip.compress(b"", mtime=0)), ("a.gz", gzip.compress(GOOD, mtime=0))])
def test_a_file_without_documents_or_of_unknown_kind_is_refused_by_name(tmp_path, name, content, val, out):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        prepare(out, input=[str(tmp_path / name)], val_input=[val])

@pytest.mark.parametrize("flag", ["input", "val_input"])
@pytest.mark.parametrize("name", ["z.csv", "z", "folder.jsonl", "pipe.txt", "empty.txt"])
def test_all_kinds_are_checked_before_the_first_token(tmp_path, flag, name, out):
    (tmp_path / "z.csv").write_bytes(GOOD), (tmp_path / "z").write_bytes(GOOD)
    (tmp_path / "folder.jsonl").mkdir(), (tmp_path / "empty.txt").touch(), os.mkfifo(tmp_path / "pipe.txt")
    good, other = (put(tmp_path / f"{letter}.jsonl", some_texts(50)) for letter in "ab")
    values = {"input": [good], "val_input": [other]}
    values[flag] = [*values[flag], str(tmp_path / name)]
    with pytest.raises(UserError, match=re.escape(name)):
        prepare(out, **values)
    assert not out.exists()

@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name, val, out):
    raw = b"\xef\xbb\xbf" + ("\ufefftext".encode() if name.endswith("txt") else GOOD)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    prepare(out, input=[str(tmp_path / name)], val_input=[val])
    # only the first is a mark: a second one is a character of the text
    assert documents(out, "train") == ["\ufefftext" if name.endswith("txt") else "good"]

def test_the_home_folder_is_found_in_every_flag_that_names_files(tmp_path, monkeypatch, val):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in" / "a.jsonl", ["a"])
    Tokenizer.named("byte").save(tmp_path / "t.json")
    def command(*argv):
        prepare_c4.main(prepare_c4.Config(**parse(prepare_c4.Config, ["--out_dir=~/out", *argv])))
    command("--input", "~/in/*.jsonl", "--val_input=~/v.jsonl", "--tokenizer=~/t.json")
    command("--verify")
    assert documents(tmp_path / "out", "train") == ["a"] and not (tmp_path / "~").exists()

def test_local_input_speaks_of_no_download(tmp_path, capsys, out):
    prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(200))])
    assert "download" not in capsys.readouterr().out

@pytest.mark.parametrize("patterns", [["no/*.jsonl"], ["a.jsonl", "no/*.jsonl"]], ids=["alone", "one of two"])
@pytest.mark.parametrize("flag", ["input", "val_input"])
def test_a_pattern_without_a_match_is_refused(tmp_path, monkeypatch, flag, patterns, out):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", some_texts(200))
    with pytest.raises(UserError, match=r"no/\*\.jsonl"):
        prepare(out, **{"input": ["a.jsonl"], flag: patterns})
    assert not (out).exists()

def test_a_name_with_brackets_is_a_file_and_not_a_pattern(tmp_path, val, out):
    prepare(out, input=[put(tmp_path / "a[1].jsonl", ["a"])], val_input=[val])
    assert documents(out, "train") == ["a"]

def test_a_run_continues_after_the_fault_was_mended(tmp_path, out, val):
    values = {"input": [str(tmp_path / "[ab].jsonl")], "val_input": [val]}
    put(tmp_path / "a.jsonl", some_texts(50, 1))
    (tmp_path / "b.jsonl").write_bytes(json_lines(some_texts(50, 2)) + b"not JSON\n")
    with pytest.raises(UserError, match="b.jsonl:51: "):
        prepare(out, **values)
    put(tmp_path / "b.jsonl", some_texts(50, 2))
    prepare(out, **values)
    prepare(tmp_path / "straight", **values)
    assert files_of(out) == files_of(tmp_path / "straight")

@pytest.mark.parametrize("fault", BAD_LINES)
def test_skip_bad_skips_and_counts_exactly_the_bad_lines(tmp_path, capsys, val, fault, out):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + BAD_LINES[fault] + b"\n" + GOOD)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(BAD_LINES[fault] + b"\n" + json_lines(["other"])))
    prepare(out, input=[str(tmp_path / "[ab].*")], val_input=[val], skip_bad=True)
    assert documents(out, "train") == ["good", "good", "other"]
    assert "skipped 2 bad lines" in capsys.readouterr().err

def test_skip_bad_skips_the_piece_of_a_text_that_is_no_utf8(tmp_path, capsys, val, out):
    pieces = [letter * 2001 + b"\n\n" for letter in (b"a", b"\xff", b"c")]
    (tmp_path / "a.txt").write_bytes(b"".join(pieces))
    prepare(out, input=[str(tmp_path / "a.txt")], val_input=[val], skip_bad=True)
    assert documents(out, "train") == [pieces[0].decode(), pieces[2].decode()]
    assert "skipped 1 bad line" in capsys.readouterr().err

def test_skip_bad_keeps_what_came_before_the_cut_of_a_gzip(tmp_path, capsys, val, out):
    texts = some_texts(2000, words=99)
    (tmp_path / "a.json.gz").write_bytes(LONG[:len(LONG) // 2])
    put(tmp_path / "b.json.gz", ["after"])
    prepare(out, input=[str(tmp_path / "[ab].json.gz")], val_input=[val],
            skip_bad=True)
    train = documents(out, "train")
    assert train == texts[:len(train) - 1] + ["after"] and 100 < len(train) < 2000
    assert "skipped 1 bad line" in capsys.readouterr().err

@pytest.mark.parametrize("argv, cause", [
    (["--input", "a.jsonl", "--workers", "1"], "a.jsonl:2: "), (["--input", "nothing.txt"], "nothing.txt")])
def test_bad_input_ends_the_command_with_one_line_and_exit_code_2(tmp_path, argv, cause):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"not JSON\n")
    command = [sys.executable, ROOT / "prepare_c4.py", "--tokenizer=byte", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and cause in errors[0]
    assert "Traceback" not in done.stderr

def test_a_file_in_the_place_of_the_folder_is_refused(out):
    (out).write_text("a file")
    with pytest.raises(UserError, match=re.escape(str(out))):
        prepare(out, input=["builtin"])

def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch, out):
    usage = collections.namedtuple("usage", "total used free")(10**12, 10**12 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free.*--out_dir"):
        prepare(out, input=[put(tmp_path / "a.jsonl", some_texts(200))])
    assert files_of(out) == {}

# --- C4 and GPT-2's vocabulary, without a network ---

def c4_name(split: str, number: int) -> str:
    return f"en/c4-{split}.{number:05d}-of-{ {'train': '01024', 'validation': '00008'}[split] }.json.gz"

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that serves the C4 files put into it, and the list of the names it was asked for."""
    asked = []
    def download(repo_id, filename, *, repo_type, revision):
        assert (repo_id, repo_type) == ("allenai/c4", "dataset")
        # the first file shows which commit "main" is, the others are asked for by it
        assert revision == ("hub" if asked else None)
        asked.append(filename)
        path = tmp_path / "hub" / filename
        if not path.exists():
            try:
                raise ConnectionError("Name or service not known")
            except ConnectionError as e:
                raise FileNotFoundError("please check your connection") from e
        return str(path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked

def put_validation(tmp_path, texts):
    for i, text in enumerate(texts):
        put(tmp_path / "hub" / c4_name("validation", i), [text])

def test_without_input_c4_s_files_are_read_in_order_until_enough(tmp_path, hub, out):
    texts = [f"{i} " + "text " * 210_000 for i in range(10)]   # each fills a batch of the tokenizer
    for i, text in enumerate(texts):
        put(tmp_path / "hub" / c4_name("train", i), [text])
    put_validation(tmp_path, [f"validation text {i}" for i in range(8)])
    prepare(out, train_tokens=2_200_000, val_tokens=50)
    assert documents(out, "train") == texts[:3]
    assert documents(out, "val") == [f"validation text {i}" for i in range(3)]
    train, other = ([name for name in hub if ("train" in name) == wanted] for wanted in (True, False))
    assert train == [c4_name("train", i) for i in range(len(train))] and 3 <= len(train) <= 3 + 5
    assert other == [c4_name("validation", i) for i in range(len(other))]

def test_a_download_that_fails_is_a_one_line_error_and_continues(tmp_path, hub, out):
    put_validation(tmp_path, ["v"] * 8)
    put(tmp_path / "hub" / c4_name("train", 0), some_texts(10))
    with pytest.raises(UserError, match=r"cannot download .*c4-train.00001.*--input") as error:
        prepare(out, train_tokens=1000, val_tokens=1)
    assert "\n" not in str(error.value)
    put(tmp_path / "hub" / c4_name("train", 1), some_texts(50, 1, words=40))
    for i in range(2, 1024):
        os.link(tmp_path / "hub" / c4_name("train", 1), tmp_path / "hub" / c4_name("train", i))
    prepare(out, train_tokens=1000, val_tokens=1)
    train = documents(out, "train")
    assert train == (some_texts(10) + some_texts(50, 1, words=40))[:len(train)] and len(train) > 10

def test_no_network_at_all_is_a_one_line_error(hub, out):
    with pytest.raises(UserError, match=r"ConnectionError: Name or service.*again.*--input") as error:
        prepare(out)
    assert "\n" not in str(error.value) and len(hub) == 1

def test_gpt2_without_a_network_names_every_way_out(monkeypatch, out):
    def no_network(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError) as error:
        prepare(out, input=["builtin"], tokenizer="gpt2")
    assert all(way in str(error.value) for way in [".tiktoken", "TIKTOKEN_CACHE_DIR", "train:N", "byte"])
    assert "\n" not in str(error.value) and set(files_of(out)) == {"manifest.json"}

def test_a_continued_run_reads_the_revision_that_it_began_with(tmp_path, monkeypatch, out):
    names = {split: [f"hf://allenai/c4/en/{split}-{i}.jsonl" for i in range(2)] for split in ("val", "train")}
    monkeypatch.setattr(prepare_c4, "C4", names)
    for commit in ("old", "new"):
        for split, number in itertools.product(("val", "train"), range(2)):
            path = tmp_path / "snapshots" / commit / f"en/{split}-{number}.jsonl"
            put(path, [f"{commit} {split} {number}"])
    main = ["old"]
    def download(repo_id, filename, *, repo_type, revision):
        if filename == "en/train-1.jsonl" and main == ["old"]:
            main[0] = "new"                    # the hub moved on, and the network went away
            raise ConnectionError
        return str(tmp_path / "snapshots" / (revision or main[0]) / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="train-1"):
        prepare(out)
    prepare(out)
    assert documents(out, "train") == ["old train 0", "old train 1"]
    assert documents(out, "val") == ["old val 0", "old val 1"]
    assert manifest_of(out)["revisions"] == {"allenai/c4": "old"}

# --- trained tokenizers ---

def test_training_gives_the_size_asked_for_and_the_same_tokenizer_again(tmp_path):
    source = put(tmp_path / "a.jsonl", some_texts(500, words=60))
    tokenizers = []
    for i in range(3):
        prepare(tmp_path / str(i), input=[source], tokenizer="train:330")
        tokenizers.append((tmp_path / str(i) / "tokenizer.json").read_bytes())
        assert Tokenizer.load(tmp_path / str(i) / "tokenizer.json").vocab_size == 330
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]

def test_training_does_not_look_at_validation_text(tmp_path):
    texts = some_texts(400)
    replaced = [t if prepare_c4.split_of(t) == "train" else None for t in texts]
    assert None in replaced
    for name, kept in [("all", texts), ("train", [t for t in replaced if t])]:
        values = {"input": [put(tmp_path / f"{name}.jsonl", kept)], "tokenizer": "train:300"}
        with_val = {} if name == "all" else {"val_input": [put(tmp_path / "v.jsonl", ["zq" * 5000])]}
        prepare(tmp_path / name, **values, **with_val)
    assert files_of(tmp_path / "all")["tokenizer.json"] == files_of(tmp_path / "train")["tokenizer.json"]

@pytest.mark.parametrize("size", [0, 10, 256, 2**20 + 1, 10**11, 10**30])
def test_a_vocabulary_smaller_than_the_bytes_or_beyond_all_is_refused(size, out):
    with pytest.raises(UserError, match=f"train:{size}.*257.*1,048,576"):
        prepare(out, input=["builtin"], tokenizer=f"train:{size}")
    assert not out.exists()

def test_a_text_too_short_for_the_vocabulary_is_refused(tmp_path, val, out):
    source = put(tmp_path / "a.jsonl", ["two words, two words"])
    with pytest.raises(UserError, match="train:5000"):
        prepare(out, input=[source], val_input=[val], tokenizer="train:5000")

@pytest.mark.parametrize("tokenizer", ["train:", "train:x", "no_such_file", "GPT2"])
def test_an_unknown_tokenizer_is_refused_by_name(tokenizer, out):
    with pytest.raises(UserError, match=tokenizer):
        prepare(out, input=["builtin"], tokenizer=tokenizer)
