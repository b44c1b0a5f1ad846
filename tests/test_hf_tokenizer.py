"""hf_tokenizer.py and the engines: files that we write are read alike by Hugging Face's libraries, files of
others give the ids that those libraries give."""
import copy
import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import tokenizers
from conftest import losses, step_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import BYTES, KINDS, TEXTS, old_json, tiktoken_lines, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import prepare_c4
import train
from nanolost import chat, tokenizer_engines
from nanolost import hf_tokenizer as hf
from nanolost.data import read_shard
from nanolost.errors import UserError
from nanolost.files import sha256_file
from nanolost.tokenizer import Tokenizer
from nanolost.tokenizer_engines import Library, Tiktoken
from nanolost.tokenizer_formats import END_OF_TEXT, known_pattern, old_digest

SPECIAL = f"a{END_OF_TEXT}</s> <s><|im_end|>b"

def theirs(data: bytes) -> tokenizers.Tokenizer:
    """The oracle: special strings are ordinary text, as in ours."""
    oracle = tokenizers.Tokenizer.from_str(data.decode())
    oracle.no_truncation()
    oracle.encode_special_tokens = True
    return oracle

def plain(oracle, text: str) -> list[int]:
    return oracle.encode(text, add_special_tokens=False).ids

def put(folder, content: dict, **files) -> str:
    """A folder with a tokenizer.json, and files by their names without the ending .json."""
    os.makedirs(folder, exist_ok=True)
    for name, value in {"tokenizer": content, **files}.items():
        with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as f:
            json.dump(value, f)
    return str(folder)

def written(t: Tokenizer, folder, longest=None) -> str:
    os.makedirs(folder, exist_ok=True)
    for name, data in t.files(longest).items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)
    return str(folder)

def ours(kind: str) -> dict:
    return json.loads(tokenizer(kind).to_json())

def smol() -> dict:
    """As SmolLM2's file: special tokens first, one pair a merge, GPT-2's pattern inside ByteLevel, no token
    for some bytes; and ids that nobody has."""
    content = ours("trained")
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    lacking = {hf.as_text(b"\x04"), hf.as_text(b"\xf5")}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {text: i for i, text in enumerate(special)}
    ids |= {token: 10 + i for i, token in enumerate(t for t in tokens if t not in lacking)}
    ranks = {hf.as_bytes(token): i for token, i in ids.items() if token not in special}
    merges = [hf.last_pair(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["model"] |= {"vocab": ids, "ignore_merges": False,
                         "merges": [" ".join(map(hf.as_text, pair)) for pair in merges]}
    added = [hf.special_entry(text, ids[text]) for text in special]
    steps = {"pre_tokenizer": level, "decoder": level, "post_processor": None}
    return {**content, **steps, "added_tokens": added}

def llama() -> dict:
    """As LLaMA-2's: SentencePiece's BPE with bytes for what has no piece, <s> in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehit",
              "th", "the", "▁the", "▁a", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁")]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>",
                                  byte_fallback=True, fuse_unk=True)
    t = tokenizers.Tokenizer(model)
    n, d = tokenizers.normalizers, tokenizers.decoders
    t.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    t.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(t.to_str())

# --- what we write ---

@KINDS
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
@example(text=SPECIAL)
@example(text="x" * 200 + "\r\n" * 70 + "\0")
def test_tokenizers_reads_our_file_as_we_do(kind, text):
    t = tokenizer(kind)
    oracle = theirs(t.to_json())
    assert plain(oracle, text) == t.encode(text)
    whole = [t.eot, *t.encode(text)]
    assert oracle.encode(text).ids == t.row(text).tolist() == t.document(text).tolist() == whole
    assert oracle.decode(t.encode(text), skip_special_tokens=False) == text

@KINDS
def test_auto_tokenizer_reads_our_folder_as_we_do(tmp_path, kind):
    t = tokenizer(kind)
    auto = AutoTokenizer.from_pretrained(written(t, tmp_path, longest=77))
    for text in ["", "The cats' 11  hats ,\n\n  été 🙂 .", SPECIAL]:
        assert auto(text)["input_ids"] == t.row(text).tolist()
        assert auto.decode(t.encode(text)) == text
    assert (auto.eos_token_id, auto.bos_token_id, auto.model_max_length) == (t.eot, t.eot, 77)
    # transformers 4 hands on token_type_ids without this
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"]
    assert set(auto("a")) == set(named) == {"input_ids", "attention_mask"}

def test_a_token_that_no_merge_reaches_is_the_same_in_both():
    t = Tokenizer.of([*BYTES, b"abc", b"xyzxyz"], name="x")
    oracle = theirs(t.to_json())
    for text in ["abc", "abcabc", " abc", "xyzxyz", "xyzxyzx"]:
        assert plain(oracle, text) == t.encode(text)
    assert t.encode("abc") == [256]

def test_a_folder_that_transformers_saved_again_is_the_same_vocabulary(tmp_path):
    t = tokenizer("trained")
    folder = written(t, tmp_path / "a")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.identity() == t.identity() and again.to_json() != t.to_json()
    assert (again.eot, again.start, again.encode(SPECIAL)) == (t.eot, t.start, t.encode(SPECIAL))

def test_a_vocabulary_read_back_is_the_one_that_was_written():
    for kind in ("byte", "trained", "tiktoken file"):
        assert hf.read_byte_level(ours(kind)) == tokenizer(kind).engine.vocabulary

# --- what tiktoken may do ---

MERGES = st.permutations([a + b for a, b in itertools.product(["a", "b", "aa", "ab", "ba", "bb"], repeat=2)])

@settings(deadline=None, max_examples=400)
@given(tokens=MERGES, count=st.integers(0, 12), whole=st.booleans(), data=st.data())
def test_whatever_tiktoken_takes_it_encodes_as_tokenizers_does(tokens, count, whole, data):
    # in an order, with tokens missing, pairs missing and pairs too many, as no training would make them
    tokens = list(dict.fromkeys(tokens[:count]))
    ranks = {token: i for i, token in enumerate([*BYTES, *(token.encode() for token in tokens)])}
    vocabulary = hf.ByteLevel(ranks, hf.BYTE_PATTERN, {END_OF_TEXT: len(ranks)})
    content = hf.write_byte_level(vocabulary, END_OF_TEXT)
    merges = content["model"]["merges"]
    kept = data.draw(st.lists(st.sampled_from(merges), unique_by=tuple) if merges else st.just([]))
    kept = data.draw(st.sampled_from([merges, [merge for merge in merges if merge in kept], kept]))
    content["model"] |= {"merges": kept, "ignore_merges": whole}
    vocabulary = hf.read_byte_level(content)
    if vocabulary is None:
        return
    engine = Tiktoken(vocabulary, "x")
    oracle = theirs(json.dumps(content).encode())
    for length in range(1, 7):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            assert engine.encode(text).tolist() == plain(oracle, text)

def test_a_large_vocabulary_is_read_in_a_time_that_grows_with_its_size():
    class Ranks(dict):
        looks = 0

        def values(self):
            self.looks += 1
            return super().values()

    ranks = Ranks({token: i for i, token in enumerate(BYTES)})
    merges = [(left, right) for left in BYTES[:20] for right in BYTES[:20]]
    ranks |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    assert hf.follow_ranks(ranks, merges, whole=False)
    # one a token made 25 seconds of SmolLM2's file
    assert ranks.looks <= 1

def test_a_token_of_absurd_length_is_one_for_the_library():
    content = ours("trained")
    # proving what merges make of it would take the square of its length
    content["model"]["vocab"]["a" * 17_000] = 5000
    assert hf.read_byte_level(content) is None

def test_merges_of_a_trained_vocabulary_are_taken_and_others_are_not():
    content = smol()
    assert hf.read_byte_level(content)
    merges = content["model"]["merges"]
    content["model"]["merges"] = [*merges[1:], merges[0]]
    assert hf.read_byte_level(content) is None, "merges in another order than the ids"
    content["model"]["merges"] = merges[:-1]
    assert hf.read_byte_level(content) is None, "a token that only a whole piece can be"
    content["model"]["ignore_merges"] = True
    assert hf.read_byte_level(content) is None, "special tokens could be looked up"

ALIKE = [
    hf.GPT2_PATTERN, hf.BYTE_PATTERN, hf.CL100K_PATTERN, hf.O200K_PATTERN, r"[A-Za-z0-9]+|\s|[\s\S]",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s+"]

@pytest.mark.parametrize("pattern", ALIKE)
@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text("aZ'lLsS 1\n\r\té.,/ \u00a0ſ\u0301Ⅷ漢🙂"))
def test_patterns_that_are_read_alike_cut_alike(pattern, text):
    assert hf.read_alike(pattern)
    # tokens of two characters, so that the ids tell where a text was cut
    two = [a.encode() + b.encode() for a, b in itertools.product("aZ'lLsS 1\n\r\t.,/", repeat=2)]
    t = Tokenizer.of([*BYTES, *two], pattern)
    content = hf.write_byte_level(t.engine.vocabulary, END_OF_TEXT)
    assert plain(theirs(json.dumps(content).encode()), text) == t.encode(text)

@pytest.mark.parametrize("pattern", [
    r"\s++$|[\s\S]", r"^a|[\s\S]", r"(?s:.)", r"a.|[\s\S]", r"\p{N}{1,3}+|[\s\S]", r"a{2}?|[\s\S]",
    r"[a&&b]|[\s\S]", r"[[:alpha:]]|[\s\S]", r"\p{Han}+|[\s\S]", r"\w+|\W", r"\h|[\s\S]", r"(?m:a)|[\s\S]",
    r"a**|[\s\S]",
    r"(?<=a)b|[\s\S]", ""])
def test_a_pattern_that_could_be_read_in_two_ways_is_left_to_the_library(tmp_path, pattern):
    content = ours("trained")
    assert isinstance(Tokenizer.load(put(tmp_path / "a", content)).engine, Tiktoken)
    assert not hf.read_alike(pattern)
    content["pre_tokenizer"]["pretokenizers"][0] = hf.split_entry(pattern)
    assert hf.read_byte_level(content) is None

def changed(entry: str, value) -> dict:
    content = smol()
    place = content
    *folders, last = entry.split(".")
    for name in folders:
        place = place[int(name) if name.isdecimal() else name]
    place[last] = value
    return content

OTHER_KINDS = {
    "normalizer": ("normalizer", {"type": "NFC"}),
    "a space in front": ("pre_tokenizer.add_prefix_space", True),
    "digits alone": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, smol()["pre_tokenizer"]]}),
    "a token that is not special": ("added_tokens.1.special", False),
    "a token that eats blanks": ("added_tokens.1.lstrip", True),
    "another decoder": ("decoder", {"type": "Fuse"}),
    "merges out of order": ("model.merges", smol()["model"]["merges"][::-1]),
}

@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_tiktoken_cannot_do_goes_through_the_library_with_its_ids(tmp_path, kind):
    content = changed(*OTHER_KINDS[kind])
    t = Tokenizer.load(put(tmp_path, content))
    assert isinstance(t.engine, Library)
    assert isinstance(Tokenizer.load(put(tmp_path / "smol", smol())).engine, Tiktoken)
    oracle = theirs(json.dumps(content).encode())
    for text in ["in 2023, the cat's  hat", "cafe\u0301 <|im_start|> x", " \n a", SPECIAL]:
        assert t.encode(text) == plain(oracle, text)

@settings(deadline=None, max_examples=100)
@given(text=TEXTS | st.text("cats' \x04the\U00100000"))
@example(text="ca\x04ts the ca\x04t")
def test_bytes_without_a_token_are_dropped_as_the_library_drops_them(smol_tokenizer, text):
    assert isinstance(smol_tokenizer.engine, Tiktoken)
    assert smol_tokenizer.encode(text) == plain(theirs(json.dumps(smol()).encode()), text)

@pytest.fixture(scope="module")
def smol_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    return Tokenizer.load(put(folder, smol(), tokenizer_config={"eos_token": "<|im_end|>"}))

def test_special_tokens_may_come_first_and_ids_may_have_holes(smol_tokenizer):
    t = smol_tokenizer
    ids = smol()["model"]["vocab"].values()
    assert t.eot == 2 and t.vocab_size == max(ids) + 1 == len(t.token_bytes())
    assert min(t.encode("the cat")) >= 10
    assert np.flatnonzero(t.known()).tolist() == sorted(ids)
    assert t.token_bytes()[:10].tolist() == [0] * 10 and t.token_bytes()[t.encode("the cat")].sum() == 7
    assert t.decode([1, *t.encode("user"), 2]) == "<|im_start|>user<|im_end|>"
    assert t.encode_special("<|im_start|>user<|im_end|>") == [1, *t.encode("user"), 2]

# --- what stands around a text ---

def around(single: str, special) -> dict:
    processor = tokenizers.processors.TemplateProcessing(single, special_tokens=special)
    return json.loads(processor.__getstate__())

TEMPLATES = {
    "none": (None, [], []),
    "begin": (around("<|im_start|> $A", [("<|im_start|>", 1)]), [1], []),
    "end, as T5": (around("$A <|im_end|>", [("<|im_end|>", 2)]), [], [2]),
    "both": (around("<|im_start|> $A <|im_end|>", [("<|im_start|>", 1), ("<|im_end|>", 2)]), [1], [2]),
    "RoBERTa": ({"type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1],
                 "trim_offsets": True, "add_prefix_space": False}, [1], [2]),
    "ByteLevel": ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
                  [], []),
}
TEMPLATES["a sequence, as Llama-3"] = ({"type": "Sequence", "processors": [
    TEMPLATES["ByteLevel"][0], TEMPLATES["begin"][0]]}, [1], [])

@pytest.mark.parametrize("kind", TEMPLATES)
def test_rows_follow_the_post_processor_and_documents_its_start(tmp_path, kind):
    processor, before, after = TEMPLATES[kind]
    content = {**smol(), "post_processor": processor}
    t = Tokenizer.load(put(tmp_path, content, tokenizer_config={"eos_token": "<|im_end|>"}))
    ids = t.encode("the cat's hat")
    assert theirs(json.dumps(content).encode()).encode("the cat's hat").ids == t.row("the cat's hat").tolist()
    assert t.row("the cat's hat").tolist() == [*before, *ids, *after]
    # end-of-text where nothing else begins a document
    assert t.document("the cat's hat").tolist() == [*(before or [2]), *ids]
    inside = 5 - len(before) - len(after)
    assert t.row("the cat's hat", length=5).tolist() == [*before, *ids[:inside], *after]

def test_the_end_of_a_text_is_the_token_that_a_file_names(tmp_path):
    def eot(**files):
        folder = put(tmp_path / str(len(os.listdir(tmp_path))), smol(), **files)
        return Tokenizer.load(folder).eot
    assert eot() == 0, "the usual name"
    assert eot(tokenizer_config={"eos_token": "<|im_end|>"}) == 2
    assert eot(tokenizer_config={"eos_token": {"content": "<|im_end|>", "lstrip": False}}) == 2
    assert eot(tokenizer_config={"eos_token": None}, special_tokens_map={"eos_token": "<|im_start|>"}) == 1
    nameless = json.loads(json.dumps(smol()).replace("<|endoftext|>", "<a>").replace("<|im_end|>", "<b>"))
    with pytest.raises(UserError, match="which token ends a text"):
        Tokenizer.load(put(tmp_path / "none", nameless))

def test_a_sample_ends_at_each_id_that_generation_config_names(tmp_path):
    folder = put(tmp_path, smol(), tokenizer_config={"eos_token": "<|im_end|>"},
                 generation_config={"eos_token_id": [2, 0]})
    assert Tokenizer.load(folder).ends == {0, 2}

# --- what travels ---

CONFIG = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True, "add_bos_token": True,
          "auto_map": {"AutoTokenizer": ["code.Evil", None]}, "eos_token": "<|im_end|>",
          "pad_token": "<|endoftext|>", "model_max_length": 8192}

def test_what_stands_beside_a_tokenizer_travels_and_its_class_does_not(tmp_path):
    generation = {"eos_token_id": [2], "top_k": 5}
    folder = put(tmp_path, smol(), tokenizer_config=CONFIG, generation_config=generation)
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    t = Tokenizer.load(folder)
    files = t.files(longest=100)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == (tmp_path / name).read_bytes()
    config = json.loads(files["tokenizer_config.json"])
    kept = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 8192}
    assert config.items() >= {**kept, "clean_up_tokenization_spaces": False}.items()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"add_bos_token", "auto_map"} & config.keys()
    again = written(t, tmp_path / "again")
    auto = AutoTokenizer.from_pretrained(again)
    assert auto("in 2023 the cat .")["input_ids"] == t.row("in 2023 the cat .").tolist()
    assert auto.decode(t.encode("a , b .")) == "a , b ."
    # special tokens that the template writes stay what they are
    chat = auto.apply_chat_template([{"role": "user", "content": "the cat"}])
    ids = chat["input_ids"] if not isinstance(chat, list) else chat
    assert ids == [1, *t.encode("the cat"), 2] == t.encode_special("<|im_start|>the cat<|im_end|>")
    assert Tokenizer.load(again).files() == t.files()

MESSAGES = [{"role": "user", "content": "the <|im_end|> cat"}]
CHAT = """{% for m in messages %}
    <|im_start|>{{ m.role }}
{{ m.content | tojson }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}{{ eos_token }}<|im_start|>assistant
{% endif %}"""

def test_a_conversation_has_the_ids_that_transformers_gives_it(tmp_path):
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT}
    t = Tokenizer.load(put(tmp_path, smol(), tokenizer_config=config))
    auto = AutoTokenizer.from_pretrained(written(t, tmp_path / "again"))
    given = auto.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert t.chat(MESSAGES) == t.encode_special(given) == auto(given, add_special_tokens=False)["input_ids"]
    # a file has the last word, and one of several is the default
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}<|im_start|>")
    assert Tokenizer.load(tmp_path).chat(MESSAGES) == [1]
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT}]
    folder = put(tmp_path / "several", smol(), tokenizer_config={**config, "chat_template": several})
    assert Tokenizer.load(folder).chat(MESSAGES) == t.chat(MESSAGES)

@pytest.mark.parametrize("template, cause", [
    ("{{ ''|attr('__class__') }}", "makes an empty text"),
    (None, "no chat template"), ("{{ raise_exception('system first') }}", "system first"),
    ("{% if %}", "fails"), ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError")])
def test_a_template_that_fails_or_reaches_out_is_one_error(tmp_path, template, cause):
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    with pytest.raises(UserError, match=cause):
        Tokenizer.load(put(tmp_path, smol(), tokenizer_config=config)).chat(MESSAGES)

def test_a_template_that_loops_for_ever_is_one_error_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    t = Tokenizer.load(put(tmp_path, smol(), tokenizer_config={"chat_template": loops}))
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match="longer than 0.5 seconds"):
        t.chat(MESSAGES)
    # what was there before is back, and nothing rings later
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

@pytest.mark.parametrize("make", [smol, llama])
def test_a_foreign_folder_without_a_chat_template_keeps_special_strings_ordinary(tmp_path, make):
    t = Tokenizer.load(put(tmp_path / "a", make()))
    auto = AutoTokenizer.from_pretrained(written(t, tmp_path / "b"))
    for text in ["the  cat .", SPECIAL, " <s>the</s> "]:
        assert auto(text)["input_ids"] == t.row(text).tolist()
        assert auto.decode(t.encode(text)) == t.decode(t.encode(text))

def test_a_prepared_folder_says_how_its_documents_begin_and_keeps_what_came_along(tmp_path):
    source = tmp_path / "a.jsonl"
    texts = [{"text": f"the {i} <s>"} for i in range(200)]
    source.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
    folder = put(tmp_path / "in", llama(), generation_config={"eos_token_id": 2})
    out = tmp_path / "out"
    prepare_c4.main(prepare_c4.Config(input=[str(source)], tokenizer=folder, out_dir=str(out), workers=1))
    t = Tokenizer.load(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"].items() >= {"start": [1], "eot": 2, "identity": t.identity()}.items()
    tokens = read_shard(out / "train_00000.bin").tolist()
    assert tokens[0] == 1 and tokens.count(1) == manifest["shards"][0]["documents"]
    assert t.files() == Tokenizer.load(folder).files()

# --- the library ---

def test_a_continuation_keeps_its_first_space(tmp_path):
    t = Tokenizer.load(put(tmp_path, llama()))
    before, after = t.document("the cat").tolist(), t.encode("the")
    assert t.decode(after) == "the" and t.continuation(before, after) == " the"
    assert t.decode([*before, *after]).endswith("cat the")

def test_bytes_of_pieces_are_those_of_the_text(tmp_path):
    t = Tokenizer.load(put(tmp_path, llama()))
    text = "the cat é\n漢  a"
    # SentencePiece's space in front
    assert t.token_bytes()[t.encode(text)].sum() == len(text.encode()) + 1
    assert t.token_bytes()[[0, 1, 2]].tolist() == [0, 0, 0]

def test_truncation_and_padding_of_a_file_are_not_followed(tmp_path):
    content = llama()
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None,
                          "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    t = Tokenizer.load(put(tmp_path, content))
    assert t.encode("the the the a") == Tokenizer.load(put(tmp_path, llama())).encode("the the the a")

def test_without_the_library_only_what_needs_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Tokenizer.load(put(tmp_path / "a", smol())).encode("the")
    written(tokenizer("trained"), tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").encode("the")
    with pytest.raises(UserError, match="pip install tokenizers"):
        Tokenizer.load(put(tmp_path / "c", llama()))

def nested(inner):
    return st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)

PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("ByteLevel")
JSON = st.recursive(PLAIN, nested, max_leaves=4)

@settings(deadline=None, max_examples=150)
@given(data=st.data(), value=JSON)
def test_a_file_with_any_entry_changed_is_read_or_refused(tmp_path_factory, data, value):
    content = copy.deepcopy(data.draw(st.sampled_from(SMALL)))
    place, depth = content, data.draw(st.integers(0, 5))
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if depth == 0 or not isinstance(place[key], (dict, list)) or not place[key]:
            break
        place, depth = place[key], depth - 1
    place[key] = value
    folder = put(tmp_path_factory.mktemp("f"), content)
    try:
        t = Tokenizer.load(folder)
        assert t.identity() and t.files()
        oracle = theirs(json.dumps(content).encode())
    except UserError:
        return
    # what the library refuses and we read
    except Exception as e:
        assert type(e) is Exception, e
        return
    assert t.encode("the cat 1") == plain(oracle, "the cat 1")

SMALL = [smol(), llama()]

def test_a_file_that_merges_at_random_is_refused(tmp_path):
    for dropout in 0.0, 0.5:
        content = ours("trained")
        content["model"]["dropout"] = dropout
        folder = put(tmp_path / str(dropout), content)
        if dropout:
            with pytest.raises(UserError, match="model.dropout 0.5 .* set it to null"):
                Tokenizer.load(folder)
        else:
            assert Tokenizer.load(folder).encode("the cat") == tokenizer("trained").encode("the cat")

# --- identity ---

def test_identity_follows_what_decides_the_ids():
    base = Tokenizer.of([*BYTES, b"ab", b"cd"])
    assert Tokenizer.of([*BYTES, b"ab", b"cd"], name="other").identity() == base.identity()
    others = [Tokenizer.of([*BYTES, b"cd", b"ab"]), Tokenizer.of([*BYTES, b"ab", b"ce"]),
              Tokenizer.of([*BYTES, b"ab", b"cd"], hf.BYTE_PATTERN)]
    assert len({t.identity() for t in [base, *others]}) == 4

def test_one_vocabulary_has_one_identity_by_tiktoken_and_by_the_library(tmp_path):
    # one pair a token, and the pattern inside ByteLevel: GPT-2's own file against what we write of it
    t = tokenizer("trained")
    content = ours("trained")
    ranks = t.engine.vocabulary.ranks
    merges = [hf.last_pair(token, ranks) for token in t.engine.vocabulary.tokens() if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["model"]["ignore_merges"] = False
    content["model"]["merges"] = [" ".join(map(hf.as_text, pair)) for pair in merges]
    content["model"]["vocab"][END_OF_TEXT] = t.eot
    content |= {"pre_tokenizer": level, "decoder": level, "post_processor": None}
    other = Tokenizer.load(put(tmp_path, content))
    assert other.identity() == t.identity() and other.before == []
    # the same pattern as tokenizers itself spells it
    content = ours("trained")
    content["pre_tokenizer"]["pretokenizers"][0] = hf.split_entry(list(hf.SPELLINGS)[1])
    assert Tokenizer.load(put(tmp_path / "spelled", content)).identity() == t.identity()

@pytest.mark.parametrize("entry, value", [
    ("normalizer", {"type": "NFC"}), ("model.merges", None), ("model.byte_fallback", False),
    ("added_tokens.1.special", False), ("model.vocab", None)])
def test_identity_of_a_library_s_vocabulary_follows_its_content(tmp_path, entry, value):
    base = llama()
    content = copy.deepcopy(base)
    place = content
    *folders, last = entry.split(".")
    for name in folders:
        place = place[int(name) if name.isdecimal() else name]
    if entry == "model.merges":
        value = place[last][::-1]
    if entry == "model.vocab":
        value = {**place[last], "a": place[last]["b"], "b": place[last]["a"]}
    place[last] = value
    assert hf.identity_of_content(content) != hf.identity_of_content(base)

def test_old_spellings_have_the_identity_of_new_ones():
    new = llama()
    old = copy.deepcopy(new)
    old["model"]["merges"] = [" ".join(pair) for pair in hf.pairs(new["model"]["merges"])]
    del old["model"]["type"], old["model"]["dropout"], old["model"]["ignore_merges"]
    saved = json.loads(tokenizers.Tokenizer.from_str(json.dumps(old)).to_str())
    assert hf.identity_of_content(old) == hf.identity_of_content(saved) == hf.identity_of_content(new)

def test_hashes_of_earlier_versions_name_the_same_vocabulary(tmp_path):
    old = old_json(BYTES, r"(?s:.{1,64})", name="byte")
    digest = hashlib.sha256(old).hexdigest()
    byte = Tokenizer.named("byte")
    assert digest == old_digest(BYTES, hf.BYTE_PATTERN, "byte")
    assert byte.matches(digest) and byte.matches(byte.identity())
    # a file of ours under any name, as its folder's manifest has it
    mine = old_json(BYTES[::-1], name="y") + b"\n"
    (tmp_path / "t.json").write_bytes(mine)
    t = Tokenizer.load(tmp_path / "t.json")
    assert t.matches(hashlib.sha256(mine).hexdigest())
    assert not t.matches(digest) and not byte.matches(t.identity())

# --- .tiktoken files ---

def test_the_pattern_of_an_unknown_tiktoken_file_is_asked_for(tmp_path):
    path = tmp_path / "other.tiktoken"
    path.write_bytes(tiktoken_lines([*BYTES, b"ab"]))
    with pytest.raises(UserError, match="--split_pattern"):
        Tokenizer.load(path)
    t = Tokenizer.load(path, hf.CL100K_PATTERN)
    assert t.engine.vocabulary.pattern == hf.CL100K_PATTERN
    t.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").identity() == t.identity()

@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}+|\P{N}+", r"ab$|[\s\S]", r"(?m:a.b)|[\s\S]", "(?s:.)"])
def test_a_pattern_that_the_engines_read_in_two_ways_is_not_written(tmp_path, pattern):
    path = tmp_path / "other.tiktoken"
    path.write_bytes(tiktoken_lines([*BYTES, b"12", b"34", b"a\n", b"ab", b"1a", b"bc", b"123456", b"a\nb"]))
    with pytest.raises(UserError, match="other pieces|refuses"):
        Tokenizer.load(path, pattern).to_json()

def test_a_split_pattern_for_anything_else_is_refused(tmp_path):
    config = prepare_c4.Config(input=["builtin"], tokenizer="byte", split_pattern="a", out_dir=str(tmp_path))
    with pytest.raises(UserError, match="--split_pattern is for a .tiktoken file"):
        prepare_c4.main(config)
    with pytest.raises(UserError, match="split pattern belongs to a .tiktoken file"):
        Tokenizer.load(put(tmp_path, smol()), "a")

def test_a_known_tiktoken_file_is_known_whatever_its_line_ends(real_data, tmp_path):
    with open(os.path.join(real_data, "gpt2.tiktoken"), "rb") as f:
        data = f.read()
    (tmp_path / "x.tiktoken").write_bytes(data.replace(b"\n", b"\r\n"))
    t = Tokenizer.load(tmp_path / "x.tiktoken")
    assert t.engine.vocabulary.pattern == hf.GPT2_PATTERN
    assert known_pattern(t.engine.vocabulary.tokens()[:-1]) is None

# --- long texts ---

WORD = st.text("abé漢", min_size=1, max_size=8) | st.text("ab'1.,", max_size=5)
WORDS = st.lists(WORD, min_size=5, max_size=30)

@settings(deadline=None, max_examples=100)
@given(words=WORDS, blank=st.sampled_from([" ", "\n", "\n\n", "  "]))
def test_cutting_a_long_text_at_a_word_changes_no_id(words, blank):
    # a word in every second place, so that each piece of 25 characters has one to end with
    text = blank.join(word for pair in zip(words, itertools.cycle(["cat"])) for word in pair)
    whole = tokenizer("trained").encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_engines, "PIECE", 25)
        patch.setattr(tokenizer_engines, "TAIL", 25)
        pieces = list(tokenizer_engines.cut(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 25
        assert tokenizer("trained").encode(text) == whole

# --- real vocabularies on a real corpus ---

@pytest.fixture(scope="module")
def texts(real_data):
    name = os.path.join(real_data, "corpus-validation.00000-of-00001.json.gz")
    with gzip.open(name, "rt", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]

def check_corpus(t: Tokenizer, data: bytes, texts: list[str]):
    oracle = theirs(data)
    different = sum(t.encode(text) != plain(oracle, text) for text in texts)
    assert different == 0, f"{different} of {len(texts)} texts"
    for text in texts[:50]:
        ids = t.encode(text)
        assert t.decode(ids) == oracle.decode(ids, skip_special_tokens=False)

def test_gpt2_is_the_same_in_both_on_the_whole_corpus(real_data, texts, tmp_path):
    t = Tokenizer.load(os.path.join(real_data, "gpt2.tiktoken"))
    check_corpus(t, t.to_json(), texts)
    auto = AutoTokenizer.from_pretrained(written(t, tmp_path))
    assert all(auto(text)["input_ids"] == t.row(text).tolist() for text in texts[:50])

def test_a_real_model_s_tokenizer_is_the_same_on_the_whole_corpus(real_model, texts):
    t = Tokenizer.load(real_model)
    with open(os.path.join(real_model, "tokenizer.json"), "rb") as f:
        check_corpus(t, f.read(), texts)

def test_t5_is_the_same_on_the_whole_corpus(real_data, texts, tmp_path):
    folder = os.path.join(real_data, "t5")
    t = Tokenizer.load(folder)
    assert (t.eot, t.start, t.before, t.after) == (1, [1], [], [1])
    assert (t.vocab_size, t.rows_needed()) == (32100, 32000)
    with open(os.path.join(folder, "tokenizer.json"), "rb") as f:
        check_corpus(t, f.read(), texts)
    transformers = PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"))
    assert all(transformers(text)["input_ids"] == t.row(text).tolist() for text in texts)
    auto = AutoTokenizer.from_pretrained(written(t, tmp_path / "ours"))
    assert all(auto(text)["input_ids"] == t.row(text).tolist() for text in [*texts[:30], SPECIAL])
    auto.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").identity() == t.identity()
    counted = sum(t.token_bytes()[t.encode(text)].sum() for text in texts[:50])
    assert counted == pytest.approx(sum(len(text.encode()) for text in texts[:50]), rel=1e-3)

# --- what earlier versions have left ---

def rewrite(path, change):
    with open(path, encoding="utf-8") as f:
        content = json.load(f)
    change(content)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f)

def test_shards_and_runs_of_earlier_versions_go_on(small, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    config = small(data_dir=str(tmp_path / "data"), steps=4, save_every=2)
    old = old_json(BYTES, name="byte")
    digest = hashlib.sha256(old).hexdigest()

    def as_before(manifest):
        manifest["tokenizer"] = {"name": "byte", "sha256": digest, "vocab_size": 257, "eot": 256}
    (tmp_path / "data" / "tokenizer.json").write_bytes(old)
    rewrite(tmp_path / "data" / "manifest.json", as_before)
    train.main(config)

    folder = step_folder(config, 4)
    rewrite(os.path.join(folder, "state.json"), lambda state: state["config"].update(tokenizer_sha256=digest))
    hashes = {"state.json": sha256_file(os.path.join(folder, "state.json"))}
    rewrite(os.path.join(folder, "manifest.json"), lambda manifest: manifest.update(hashes))
    train.main(small(data_dir=config.data_dir, steps=6, save_every=2))
    assert [step for step, _ in losses(config)] == [1, 2, 3, 4, 5, 6]
    # what is written now is Hugging Face's, of the same vocabulary
    assert Tokenizer.load(step_folder(config, 6)).identity() == Tokenizer.named("byte").identity()
    assert "model" in json.loads(Tokenizer.load(step_folder(config, 6)).to_json())
