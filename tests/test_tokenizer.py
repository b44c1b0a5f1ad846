"""tokenizer.py: tokenizers that give every text back, or refuse to be one."""
import base64
import functools
import hashlib
import json
import os
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import regex
import rustbpe
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanolost.errors import UserError
from nanolost.hf_tokenizer import BYTE_PATTERN, GPT2_PATTERN, SPELLINGS
from nanolost.tokenizer import Tokenizer
from nanolost.tokenizer_formats import END_OF_TEXT, OLD_FORMAT

BYTES = [bytes([b]) for b in range(256)]
TEXTS = st.text() | st.text("ab'\n\r\t <|endof>é🙂", max_size=60)

def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def names(folder) -> list[str]:
    return sorted(os.listdir(folder))

def tiktoken_lines(tokens) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))

def trained_tokenizer() -> Tokenizer:
    text = "the cat's hat, the 11 cats' hats\n\n" * 9 + "été 🙂🙂 été, a dog, another dog"
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator([text], 279, pattern=GPT2_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda entry: entry[1])
    return Tokenizer.of([bytes(token) for token, _ in ranks], name="train:280")

@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte":
        return Tokenizer.named("byte")
    if kind == "trained":
        return trained_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.tiktoken"
        path.write_bytes(tiktoken_lines([bytes([b]) for b in reversed(range(256))] + [b"en", b"end"]))
        return Tokenizer.load(path, GPT2_PATTERN)

KINDS = pytest.mark.parametrize("kind", ["byte", "trained", "tiktoken file"])

@KINDS
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
@example(text="")
@example(text=END_OF_TEXT)
@example(text=f"a{END_OF_TEXT}b")
@example(text="x" * 200 + "\r\n" * 70 + "\0")
def test_decoding_gives_every_text_back(kind, text):
    ids = tokenizer(kind).encode(text)
    assert tokenizer(kind).decode(ids) == text
    assert tokenizer(kind).decode(np.array(ids, np.uint16)) == text

@KINDS
@settings(deadline=None, max_examples=100)
@given(before=TEXTS, after=TEXTS)
def test_end_of_text_inside_a_text_is_ordinary_text(kind, before, after):
    t = tokenizer(kind)
    assert max(t.encode(before + END_OF_TEXT + after)) < t.eot
    assert t.decode([t.eot]) == END_OF_TEXT

@KINDS
@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_token_bytes_sum_to_the_bytes_of_the_text(kind, text):
    counts = tokenizer(kind).token_bytes()
    assert counts[tokenizer(kind).encode(text)].sum() == len(text.encode())

@KINDS
def test_end_of_text_is_the_last_id_and_stands_for_no_byte(kind):
    t = tokenizer(kind)
    assert t.vocab_size == t.eot + 1 == len(t.engine.vocabulary.ranks) + 1 == len(t.token_bytes())
    assert t.token_bytes()[t.eot] == 0 and t.token_bytes()[:t.eot].min() >= 1

def test_a_character_cut_in_two_decodes_to_the_replacement_character():
    t = Tokenizer.named("byte")
    assert t.decode(t.encode("aé")[:-1]) == "a\ufffd"

@KINDS
def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, kind):
    first, path = tokenizer(kind), tmp_path / "tokenizer.json"
    first.save(path)
    second = Tokenizer.load(path)
    text = f"The cats' 11 hats,\n\n  été 🙂 {END_OF_TEXT}"
    assert second.encode(text) == first.encode(text)
    assert second.decode(first.encode(text)) == text
    assert second.engine.vocabulary == first.engine.vocabulary
    assert (second.eot, second.start, second.identity()) == (first.eot, [first.eot], first.identity())
    second.save(tmp_path / "again.json")
    assert sha256(tmp_path / "again.json") == sha256(path)

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)

HUGGING_FACE = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
BYTE_JSON = Tokenizer.named("byte").to_json()

def old_json(vocabulary=BYTES, pattern=r"(?s:.{1,64})", **changed) -> bytes:
    """A tokenizer.json as versions wrote it before it was Hugging Face's."""
    content = {"format": OLD_FORMAT, "name": "x", "pattern": pattern, "end_of_text": END_OF_TEXT,
               "tokens": [base64.b64encode(token).decode() for token in vocabulary]}
    return json.dumps({**content, **changed}, indent=0).encode()

NO_TOKENIZERS = {
    "tokenizer.pkl": pickle.dumps(Bomb()),
    "tokenizer.json": pickle.dumps(Bomb(), 0),
    "hugging_face.json": json.dumps(HUGGING_FACE).encode(),
    "other_format.json": old_json().replace(b"nanolost-tokenizer-1", b"nanolost-tokenizer-9"),
    "no_base64.json": old_json().replace(b"AA==", b"A!=="),
    "no_pattern.json": old_json().replace(b'"pattern"', b'"patter"'),
    "broken_pattern.json": old_json().replace(b"(?s:", b"(?s"),
    "list.json": b"[1, 2]",
    "deep.json": b"[" * 200_000,
    "empty.json": b"",
    "latin1.json": '{"format": "é"}'.encode("latin-1"),
    "empty.tiktoken": b"",
    "rank_missing.tiktoken": b"YQ== 0\nYg== 2\n",
    "not_base64.tiktoken": b"YQ== 0\n!!!! 1\n",
    "three_words.tiktoken": b"YQ== 0 0\n",
    "pickle.tiktoken": pickle.dumps(Bomb()),
}

@pytest.mark.parametrize("name", NO_TOKENIZERS)
def test_what_is_no_tokenizer_is_refused_by_name_and_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(NO_TOKENIZERS[name])
    with pytest.raises(ValueError, match=re.escape(name)):
        Tokenizer.load(tmp_path / name)
    assert names(tmp_path) == [name]

def test_a_tokenizer_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for length in [*range(0, len(BYTE_JSON), 97), len(BYTE_JSON) - 1]:
        path.write_bytes(BYTE_JSON[:length])
        with pytest.raises(ValueError, match="no tokenizer"):
            Tokenizer.load(path)

def test_a_missing_tokenizer_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path / "nothing.tiktoken", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Tokenizer.load(path)

def test_a_tokenizer_is_named_by_kind_or_by_path(tmp_path):
    Tokenizer.named("byte").save(tmp_path / "mine.json")
    assert Tokenizer.named(str(tmp_path / "mine.json")).to_json() == BYTE_JSON
    with pytest.raises(ValueError, match="nonsense"):
        Tokenizer.named("nonsense")

@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
@example(text="I'll  say: 'it''s 12.5 o'clock'\n\n \t x  ")
def test_other_spellings_of_a_split_pattern_give_the_same_pieces(spelling, text):
    assert regex.findall(spelling, text) == regex.findall(SPELLINGS[spelling], text)

@KINDS
def test_a_very_long_run_of_one_character_is_encoded(kind):
    for text in (" " * 1_200_000 + "a", "a" * 1_200_000):
        assert tokenizer(kind).decode(tokenizer(kind).encode(text)) == text

def test_gpt2_s_file_gives_gpt2_s_ids(real_data):
    gpt2 = Tokenizer.load(Path(real_data, "gpt2.tiktoken"))
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello world!\n\nIt's  2024.") == [15496, 995, 0, 198, 198, 1026, 338, 220, 48609, 13]

@KINDS
@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
@example(text="")
def test_an_array_of_ids_holds_tiktoken_s_own(kind, text):
    ids = tokenizer(kind).encode_array(text)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert ids.tolist() == tokenizer(kind).encode(text) == tokenizer(kind).engine.bpe.encode_ordinary(text)

def test_half_a_surrogate_pair_becomes_the_replacement_character():
    t = Tokenizer.named("byte")
    assert t.decode(t.encode("a\ud800b")) == "a\ufffdb"

# --- what would lose text ---

def our_file(path, *vocabulary_and_pattern, **changed):
    Path(path).write_bytes(old_json(*vocabulary_and_pattern, **changed))
    return path

@pytest.mark.parametrize("pattern", [
    r"\p{L}+", r"[^\n]+", r"[^\t]+", r"[^ ]+", r"[^~]+", r"[^\x00]+", r"[\x00-\x7f]+", r"[^\r]+", r"[^7]+",
    r"\S+|\s(?=\S)", r"(?s:.)(?!$)", r"[^\x{10000}-\x{10ffff}]+", r"[^\x{a0}]+", r"\w+|[^\w\s]+| +|\n",
    r"[^\x{feff}]+", r" ?\p{L}+|\p{P}+|\s"])
def test_a_split_pattern_that_drops_text_is_refused_when_it_is_loaded(tmp_path, pattern):
    with pytest.raises(UserError, match=r"t\.json.*drops \d+ of \d+ bytes"):
        Tokenizer.load(our_file(tmp_path / "t.json", pattern=pattern))

@settings(deadline=None, max_examples=50)
@given(before=st.text(max_size=20), after=st.text(max_size=20))
def test_no_text_is_dropped_in_silence(before, after):
    t = Tokenizer.of(BYTES, r"(?s:(?!qz).)", "x")       # only what follows a q and precedes a z is unmatched
    with pytest.raises(UserError, match="drops [0-9]+ of"):
        t.encode(f"{before}qz{after}")

PANICS = ["", "a*", "(?=a)", r"(?s:.*?)", r"(?s:.)*(?=q)|"]

@pytest.mark.parametrize("pattern", PANICS)
def test_a_pattern_on_which_tiktoken_panics_is_one_error_and_nothing_printed(tmp_path, capfd, pattern):
    with pytest.raises(UserError, match=r"t\.json"):
        Tokenizer.load(our_file(tmp_path / "t.json", pattern=pattern))
    assert capfd.readouterr().err == ""
    os.write(2, b"back")
    assert capfd.readouterr().err == "back", "standard error was not given back"

def test_a_text_that_takes_the_pattern_too_long_is_the_user_s_error():
    t = Tokenizer.of(BYTES, r"(?:(a|aa)+(?=b)|(?s:.))", "slow")
    assert t.decode(t.encode("aab")) == "aab"
    with pytest.raises(UserError, match="slow fails on this text.*backtracking"):
        t.encode("a" * 4000)

@pytest.mark.parametrize("pattern", [
    "(?s", "[", "*", r"\p{Nonsense}", "(" * 10**5 + ")" * 10**5, r"(a{9999}){9999}"], ids=lambda p: p[:12])
def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match=r"t\.json.*regular expression"):
        Tokenizer.load(our_file(tmp_path / "t.json", pattern=pattern))

@pytest.mark.parametrize("tokens, cause", [
    ([*BYTES, b"ab", b"cd", b"ab"], "'ab' 2 times"), ([*BYTES, b"a"], "'a' 2 times"),
    (BYTES[:255], "no token for 1 .* 0xff"), (BYTES[1:], "no token for 1 .* 0x00"),
    ([b"hello"], "no token for 256"), ([], "no token for 256"),
    ([b for b in BYTES if b != b"e"], "no token for 1 .* 0x65")], ids=lambda value: str(value)[-20:])
def test_a_vocabulary_that_cannot_spell_every_text_once_is_refused(tmp_path, tokens, cause):
    (tmp_path / "t.tiktoken").write_bytes(tiktoken_lines(tokens))
    for path in (our_file(tmp_path / "t.json", tokens), tmp_path / "t.tiktoken"):
        with pytest.raises(UserError, match=f"{re.escape(path.name)}.*{cause}"):
            Tokenizer.load(path)

def test_a_token_without_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"t\.json.*token 256 is empty"):
        Tokenizer.load(our_file(tmp_path / "t.json", [*BYTES, b"", b"ab"]))

@pytest.mark.parametrize("changed", [
    {"tokens": 5}, {"tokens": {"a": 1}}, {"tokens": None}, {"tokens": "YQ=="}, {"tokens": [["YQ=="]]},
    {"tokens": [1]}, {"tokens": [None]}, {"tokens": ["é"]}, {"pattern": 5}, {"pattern": None},
    {"pattern": ["a"]}, {"name": 5}, {"name": None}, {"format": None},
    {"format": ["nanolost-tokenizer-1"]}], ids=str)
def test_entries_of_other_types_are_refused(tmp_path, changed):
    with pytest.raises(UserError, match=r"t\.json is no tokenizer"):
        Tokenizer.load(our_file(tmp_path / "t.json", **changed))

def test_a_file_that_is_too_large_or_has_no_end_is_refused(tmp_path, monkeypatch):
    our_file(tmp_path / "t.json")
    size = os.path.getsize(tmp_path / "t.json")
    monkeypatch.setattr("nanolost.tokenizer.FILE_LIMIT", size)
    Tokenizer.load(tmp_path / "t.json")
    monkeypatch.setattr("nanolost.tokenizer.FILE_LIMIT", size - 1)
    with pytest.raises(UserError, match=r"t\.json.*more than"):
        Tokenizer.load(tmp_path / "t.json")
    for name in ("zero.json", "zero.tiktoken"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"{name}.*not a regular file"):
            Tokenizer.load(tmp_path / name)

@pytest.mark.parametrize("kind", ["json", "tiktoken"])
def test_a_byte_order_mark_in_front_is_no_part_of_a_tokenizer(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    content = tokenizer("byte").to_json() if kind == "json" else tiktoken_lines(BYTES)
    path.write_bytes(b"\xef\xbb\xbf" + content)
    pattern = None if kind == "json" else BYTE_PATTERN
    assert Tokenizer.load(path, pattern).engine.vocabulary.tokens() == BYTES

def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    our_file(tmp_path / "t.json")
    assert Tokenizer.named("~/t.json").engine.vocabulary.tokens() == BYTES
