"""documents.py: every kind of input that people have gives its texts, or one line that says why not."""
import gzip
import json
import os
import re
import sys
import types

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_prepare import documents, files_of, manifest_of, prepare, put, some_texts

from nanolost import documents as room
from nanolost.data import TokenDataset, convert_nanogpt, read_shard
from nanolost.documents import Pair, lines_of, matches
from nanolost.errors import UserError

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)

@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"

@pytest.fixture
def val(tmp_path):
    return put(tmp_path / "v.jsonl", ["v"])

def pack(raw: bytes, frame: int = 10**9) -> bytes:
    """As pzstd does: a frame for every so many bytes."""
    return b"".join(zstandard.compress(raw[i:i + frame]) for i in range(0, len(raw), frame))

def put_parquet(path, columns: dict, rows_of_a_group: int = 7) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_of_a_group)
    return str(path)

# --- .zst ---

@pytest.mark.parametrize("frame", [10**9, 1000, 7])
@pytest.mark.parametrize("chunk", [1 << 20, 5])
def test_a_zst_of_any_frames_gives_the_lines_of_the_file_in_it(tmp_path, monkeypatch, out, val, frame, chunk):
    monkeypatch.setattr(room, "CHUNK", chunk)
    texts = some_texts(60)
    (tmp_path / "a.jsonl.zst").write_bytes(pack(open(put(tmp_path / "a.jsonl", texts), "rb").read(), frame))
    prepare(out, input=[str(tmp_path / "a.jsonl.zst")], val_input=[val])
    assert documents(out, "train") == texts

def test_a_text_in_a_zst_gives_the_same_pieces(tmp_path, val):
    raw = b"\xef\xbb\xbf" + "été\n\n".encode() * 3000 + b"no end"
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.zst").write_bytes(pack(raw, 1000))
    for name in ("a.txt", "a.txt.zst"):
        prepare(tmp_path / f"out-{name}", input=[str(tmp_path / name)], val_input=[val])
    assert read_shard(tmp_path / "out-a.txt.zst" / "train_00000.bin").tolist() == read_shard(
        tmp_path / "out-a.txt" / "train_00000.bin").tolist()

@pytest.mark.parametrize("damage", ["cut", "cut at a block", "a hole", "no zst"])
def test_a_damaged_zst_is_refused_by_file_and_line(tmp_path, out, val, damage):
    raw = open(put(tmp_path / "a.jsonl", some_texts(2000, words=99)), "rb").read()
    packed = pack(raw)
    damaged = {"cut": packed[:-9], "cut at a block": pack(raw, 5000)[:-1],
               "a hole": packed[:5000] + bytes(9) + packed[5009:], "no zst": raw}[damage]
    (tmp_path / "b.jsonl.zst").write_bytes(damaged)
    # a line that is cut is no reason: what is missing might begin with a new one
    with pytest.raises(UserError, match=r"b\.jsonl\.zst:\d+: cannot be read"):
        prepare(out, input=[str(tmp_path / "b.jsonl.zst")], val_input=[val])
    assert not list(out.glob("train*.bin"))

@pytest.mark.parametrize("chunks", [
    [b"a\nb\r\nc"], [b"a", b"\nb\r", b"\n", b"c"], [b"", b"a\n", b"", b"b\r\nc", b""]])
def test_lines_do_not_depend_on_the_pieces_they_come_in(chunks):
    assert list(lines_of(chunks)) == [b"a\n", b"b\r\n", b"c"]

# --- .parquet ---

def test_the_rows_of_a_parquet_file_are_documents(tmp_path, monkeypatch, out, val):
    monkeypatch.setattr(room, "PARQUET_ROWS", 4)
    texts = ["été 🙂", "", "<|endoftext|>", *some_texts(60)]
    columns = {"id": list(range(len(texts))), "text": texts, "other": [None] * len(texts)}
    prepare(out, input=[put_parquet(tmp_path / "a.parquet", columns)], val_input=[val])
    assert documents(out, "train") == texts

def test_a_parquet_file_that_is_continued_gives_the_same_shards(tmp_path, monkeypatch, out):
    texts = some_texts(300)
    values = {"input": [put_parquet(tmp_path / "a.parquet", {"text": texts})], "shard_tokens": 2000}
    prepare(tmp_path / "straight", **values)
    encode_all = prepare.__globals__["prepare_c4"].encode_all
    monkeypatch.setattr("prepare_c4.BATCH", 500)
    calls = []
    def failing(encode, batch):
        calls.append(batch)
        if len(calls) == 9:
            raise OSError("the disk is gone")
        return encode_all(encode, batch)
    monkeypatch.setattr("prepare_c4.encode_all", failing)
    with pytest.raises(OSError):
        prepare(out, **values)
    assert not manifest_of(out)["complete"] and manifest_of(out)["shards"]
    prepare(out, **values)
    assert files_of(out) == files_of(tmp_path / "straight")

@pytest.mark.parametrize("rows, row", [
    ({"text": ["a", None, "c"]}, 2), ({"text": [1, 2, 3]}, 1), ({"txt": ["a", "b"]}, 1)])
def test_a_row_without_a_text_is_refused_by_its_number_and_skipped_where_asked(tmp_path, out, val, rows, row):
    source = put_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=rf"a\.parquet:{row}: has .*text"):
        prepare(out, input=[source], val_input=[val])
    if row == 2:
        prepare(out, input=[source], val_input=[val], skip_bad=True)
        assert documents(out, "train") == ["a", "c"]

NO_PARQUET = {
    "cut": lambda raw: raw[:-50],
    "a text": lambda raw: b"no parquet" * 9,
    "a hole": lambda raw: raw[:200] + bytes(400) + raw[600:],
}

@pytest.mark.parametrize("damage", NO_PARQUET.values(), ids=NO_PARQUET)
def test_a_damaged_parquet_file_is_one_line(tmp_path, out, val, damage):
    path = tmp_path / "a.parquet"
    put_parquet(path, {"text": some_texts(400)}, 1000)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet:\d+: (cannot be read|is not|has)") as error:
        prepare(out, input=[str(path)], val_input=[val])
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name, module, package", [
    ("a.parquet", "pyarrow.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard", "zstandard")])
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, out, val, name, module, package):
    (tmp_path / name).write_bytes(b"x")
    # what an import finds then is nothing
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        prepare(out, input=[str(tmp_path / name)], val_input=[val])
    assert not out.exists()

# --- other names of the text ---

@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_text_stands_in_the_field_that_is_named(tmp_path, out, val, kind):
    texts, key = some_texts(20), "content"
    if kind == "parquet":
        source = put_parquet(tmp_path / "a.parquet", {"text": ["no"] * 20, key: texts})
        other = put_parquet(tmp_path / "v.parquet", {key: ["v"]})
    else:
        source, other = str(tmp_path / "a.jsonl"), str(tmp_path / "w.jsonl")
        for path, some in ((source, texts), (other, ["v"])):
            with open(path, "w") as file:
                file.writelines(json.dumps({"text": "no", key: text}) + "\n" for text in some)
    prepare(out, input=[source], val_input=[other], text_key=key)
    assert documents(out, "train") == texts
    # half by one field and half by another would be called complete
    with pytest.raises(UserError, match="--text_key"):
        prepare(out, input=[source], val_input=[other])

def test_a_field_that_is_missing_says_the_flag(tmp_path, out, val):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*--text_key"):
        prepare(out, input=[str(tmp_path / "a.jsonl")], val_input=[val])

def test_prompts_and_completions_ask_for_rows(tmp_path, out, val):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*--rows N"):
        prepare(out, input=[str(tmp_path / "a.jsonl")], val_input=[val])

def test_a_parquet_file_has_prompts_too(tmp_path):
    columns = {"prompt": ["p", "q"], "completion": ["c", "d"], "id": [1, 2]}
    source = put_parquet(tmp_path / "a.parquet", columns)
    manifest = {"revisions": {}, "sources": {source: room.identity(source)}}
    found = room.Documents([source], manifest, "text", pairs=True, skip_bad=False).read()
    assert list(found) == [((0, 0), Pair("p", "c")), ((0, 1), Pair("q", "d"))]

# --- the hub ---

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set of two commits, and what it was asked for."""
    state = types.SimpleNamespace(commit="first", asked=[], files={})
    for commit in ("first", "second"):
        names = (f"{split}-{i}" for split in ("train", "val") for i in (0, 1))
        state.files[commit] = {f"en/{name}.jsonl.gz": [f"{commit} {name}"] for name in names}
    state.files["second"]["en/train-2.jsonl.gz"] = ["second train-2"]
    for commit, files in state.files.items():
        for name, texts in files.items():
            put(tmp_path / "hub" / commit / name, texts)
    def info(repository):
        state.asked.append(repository)
        if repository != "some/set":
            raise huggingface_hub.errors.HfHubHTTPError("404", response=types.SimpleNamespace(
                headers={}, request=None, status_code=404))
        names = ["README.md", *state.files[state.commit], "en/deep/train-9.jsonl.gz"]
        siblings = [types.SimpleNamespace(rfilename=name) for name in names]
        return types.SimpleNamespace(sha=state.commit, siblings=siblings)
    def download(repo_id, filename, *, repo_type, revision):
        assert (repo_id, repo_type) == ("some/set", "dataset") and revision
        state.asked.append(filename)
        return str(tmp_path / "hub" / revision / filename)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state

FROM_HUB = {"input": ["hf://datasets/some/set/en/train-*.gz"], "val_input": ["hf://datasets/some/set/en/val-*"]}

def test_a_pattern_of_the_hub_is_its_files_of_one_commit(hub, out):
    manifest = prepare(out, **FROM_HUB)
    assert documents(out, "train") == ["first train-0", "first train-1"]
    assert documents(out, "val") == ["first val-0", "first val-1"]
    assert manifest["revisions"] == {"some/set": "first"}
    assert manifest["request"]["input"]["train"] == [f"hf://some/set/en/train-{i}.jsonl.gz" for i in (0, 1)]

def test_the_same_command_again_needs_no_network_and_no_other_commit(hub, out, monkeypatch):
    prepare(out, **FROM_HUB)
    before = files_of(out)
    hub.commit = "second"
    hub.asked.clear()
    prepare(out, **FROM_HUB)
    assert files_of(out) == before and not hub.asked

def test_an_interrupted_run_goes_on_with_the_files_it_began_with(hub, out, monkeypatch):
    encode_all, fail = prepare.__globals__["prepare_c4"].encode_all, [True]
    def failing(encode, batch):
        # once validation is written
        if any("train" in text for text in batch) and fail:
            raise OSError("the power is gone")
        return encode_all(encode, batch)
    monkeypatch.setattr("prepare_c4.encode_all", failing)
    with pytest.raises(OSError):
        prepare(out, **FROM_HUB)
    hub.commit = "second"
    fail.clear()
    prepare(out, **FROM_HUB)
    assert documents(out, "train") == ["first train-0", "first train-1"]

@pytest.mark.parametrize("pattern, cause", [
    ("hf://datasets/some/set/en/nothing-*", "no file matches"),
    ("hf://some/set/en/train-*", "hf://datasets/OWNER"),
    ("hf://datasets/some/set", "hf://datasets/OWNER"),
    ("hf://datasets/no/set/a.jsonl", "cannot list.*no/set"),
    ("hf://datasets/some/set/README.*", "README.md: the kinds of input")])
def test_a_pattern_of_the_hub_without_files_is_refused_by_name(hub, out, pattern, cause):
    with pytest.raises(UserError, match=cause) as error:
        prepare(out, input=[pattern])
    assert "\n" not in str(error.value) and not out.exists()

@pytest.mark.parametrize("damage", [[], {"p": 1}, {"p": {"repository": "a/b"}}, {"p": {"files": []}}])
def test_a_damaged_list_of_the_hub_s_files_is_one_line(hub, out, damage):
    prepare(out, **FROM_HUB)
    (out / "manifest.json").write_text(json.dumps({**manifest_of(out), "hub": damage}))
    with pytest.raises(UserError, match="hub of .*manifest.json is damaged"):
        prepare(out, **FROM_HUB)

@pytest.mark.parametrize("file, pattern, same", [
    ("en/a.gz", "en/*.gz", True), ("en/b/a.gz", "en/*.gz", False), ("en/b/a.gz", "en/*", False),
    ("en/b/a.gz", "en/**.gz", True),
    ("en/a.gz", "**/a.gz", True), ("a.gz", "**/a.gz", True), ("a.gz", "a.gz", True), ("a.gz", "*.GZ", False),
    ("en/a1.gz", "en/a?.gz", True)])
def test_a_star_stays_inside_a_folder(file, pattern, same):
    assert matches(file, pattern) == same

# --- nanoGPT's files ---

def command_in(message: str) -> str:
    return re.search(r'python -c "(.*?)"', message).group(1)

def test_nanogpt_s_file_is_refused_with_a_command_that_makes_shards_of_it(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanolost.data.NANOGPT_SHARD", 1000)
    draw = np.random.default_rng(0)
    ids = {name: draw.integers(0, 50257, size) for name, size in (("train", 2500), ("val", 90))}
    for name, values in ids.items():
        (tmp_path / "old").mkdir(exist_ok=True)
        values.astype("<u2").tofile(tmp_path / "old" / f"{name}.bin")
        with pytest.raises(UserError, match="nanoGPT") as training:
            TokenDataset("old", name, 8)
        with pytest.raises(UserError, match="nanoGPT") as preparing:
            prepare(out, input=[f"old/{name}.bin"])
        assert command_in(str(training.value)) == command_in(str(preparing.value))
        exec(command_in(str(training.value)))
    for name, values in ids.items():
        shards = sorted((tmp_path / "data" / "nanogpt").glob(f"{name}_*.bin"))
        assert np.concatenate([read_shard(path) for path in shards]).tolist() == values.tolist()
    assert len(TokenDataset("data/nanogpt", "train", 8)) == 124 + 124 + 62

@pytest.mark.parametrize("name, cause", [
    ("tokens.bin", "neither train nor val"), ("train_x.bin", "cannot read")])
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, name, cause):
    with pytest.raises(UserError, match=f"{name}.*{cause}|{cause}.*{name}"):
        convert_nanogpt(str(tmp_path / name), str(tmp_path / "out"))

def test_a_damaged_shard_of_ours_is_not_taken_for_nanogpt_s(tmp_path):
    # a later version of llm.c's header, a file of an odd length, nothing
    later = np.array([20240520, 9, 4] + [0] * 253, "<i4").tobytes()
    for content in (later, b"abc", b""):
        (tmp_path / "train_0.bin").write_bytes(content)
        with pytest.raises(UserError) as error:
            read_shard(tmp_path / "train_0.bin")
        assert "nanoGPT" not in str(error.value)

def test_gz_and_zst_are_peers(tmp_path, out, val):
    texts = some_texts(20)
    raw = open(put(tmp_path / "a.jsonl", texts), "rb").read()
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.json.zst").write_bytes(pack(raw))
    prepare(out, input=[str(tmp_path / "[abc].*")], val_input=[val])
    assert documents(out, "train") == texts * 3
