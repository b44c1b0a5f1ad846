"""Hugging Face's tokenizer.json: byte-level BPE written as one, and what can be read from anybody's.

    {"model": vocabulary and merges, "added_tokens": special tokens, "normalizer", "pre_tokenizer": how a text
     is cut first, "post_processor": what is put around it, "decoder"}

tiktoken merges by the order of the vocabulary and knows no list of merges. `read_byte_level` says when that
gives the same ids; every other file needs the `tokenizers` library. Only JSON is read here."""
import hashlib
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from nanolost.errors import UserError

# --- split patterns ---

# GPT-2's as OpenAI published it (gpt-2/src/encoder.py); it is built into Hugging Face's ByteLevel
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_PATTERN = r"[\s\S]{1,64}"
# other spellings that cut every text into the same pieces
SPELLINGS = {
    # tiktoken's (tiktoken_ext/openai_public.py); in Oniguruma, its $ would be the end of a line
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_PATTERN,
    # the one that tokenizers has inside
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2_PATTERN,
    # ours, until the file became Hugging Face's; Oniguruma has no such flag
    r"(?s:.{1,64})": BYTE_PATTERN,
}
# of OpenAI's later vocabularies, in spellings that both engines read alike
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K_PATTERN = "|".join([
    CONTRACTIONS,
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])
UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K_PATTERN = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])

# What Rust's regular expressions (tiktoken) and Oniguruma's (tokenizers) read alike. Not in it: $ and ^,
# {1,3}+ (possessive in Rust only), the dot and its flags, sets of sets, names of scripts.
CLASS = r"\\[pP]\{[LMNPSZ][a-z]?\}|\\[sSrnt]"
ALIKE = re.compile(rf"""(?:
    {CLASS}
    | [^\\\[\](){{}}|*+?^$.&~-]
    | [|)]
    | \[\^? (?: {CLASS} | [A-Za-z0-9]-[A-Za-z0-9] | [^\\\[\]^&~-] )+ \]
    | \( (?: \?(?:i:|:|=|!) | (?!\?) )
    | (?: [*+?][+?]? | \{{\d+(?:,\d*)?\}} ) (?![*+?{{])
)+""", re.VERBOSE)

def read_alike(pattern: str) -> bool:
    """Whether both engines cut a text into the same pieces by this regular expression."""
    return ALIKE.fullmatch(pattern) is not None

# --- bytes as characters ---

def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte (bytes_to_unicode of gpt-2/src/encoder.py)."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    characters = []
    others = 0
    for byte in range(256):
        # the others, control characters and blanks, are written as U+0100 and what follows
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + others))
            others += 1
    return characters

CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}

def as_text(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)

def as_bytes(text: str) -> bytes:
    """KeyError for a text that byte-level BPE does not write."""
    return bytes([BYTES[character] for character in text])

# --- writing byte-level BPE ---

@dataclass(frozen=True)
class ByteLevel:
    """A vocabulary that tiktoken can do: the id of each token, which is also the order of merging, the
    regular expression that cuts a text first, and the ids of special tokens."""
    ranks: dict[bytes, int]
    pattern: str
    special: dict[str, int]

    def tokens(self) -> list[bytes]:
        """The tokens in the order of their ids."""
        return sorted(self.ranks, key=self.ranks.get)

def halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make a token."""
    cuts = range(1, len(token))
    made = [(token[:i], token[i:]) for i in cuts]
    return [(left, right) for left, right in made if left in ranks and right in ranks]

def write_byte_level(vocabulary: ByteLevel, first: str) -> dict:
    """The content of a tokenizer.json. Every text begins with the special token `first`."""
    ranks = vocabulary.ranks
    # All pairs, not one a token: then nothing has to be proved of how a vocabulary was trained, and tokens
    # that no pair makes are allowed. GPT-2's list has 108,299 instead of 50,000.
    merges = []
    for token in vocabulary.tokens():
        for left, right in halves(token, ranks):
            merges.append([as_text(left), as_text(right)])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # tiktoken looks a whole piece up before it merges: tokenizers does so with this flag only
        "ignore_merges": True,
        "vocab": {as_text(token): ranks[token] for token in vocabulary.tokens()},
        "merges": merges,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_entry(text, number) for text, number in vocabulary.special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split_entry(vocabulary.pattern), level]},
        "post_processor": template(first, vocabulary.special[first]),
        "decoder": level,
        "model": model,
    }

def special_entry(text: str, number: int) -> dict:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }

def split_entry(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

def template(first: str, number: int) -> dict:
    """A post-processor that puts one special token in front of a text, or of a pair of texts."""
    special = {"SpecialToken": {"id": first, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, second],
        "special_tokens": {first: {"id": first, "ids": [number], "tokens": [first]}},
    }

# --- reading byte-level BPE ---

# a file that names a larger id would only fill the memory: Gemma's 262,144 are the most in use
MOST_IDS = 1 << 24
# sum of the squares of the tokens' lengths, which the time of the proof below grows with: GPT-2's and
# SmolLM2's have a hundredth of it, and one token of a megabyte would take a day
MOST_SQUARES = 1 << 28
LISTS = ("pretokenizers", "normalizers", "processors", "decoders")
# what a BPE of another kind sets
OTHER_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
# which look at the text beside a special token
TRIMS = ("lstrip", "rstrip", "single_word")

def steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, one after the other."""
    if part is None:
        return []
    # the library takes some lists as well
    if not isinstance(part, dict):
        raise UserError(f"{part!r:.40} stands where a step of its pipeline should")
    if part.get("type") != "Sequence":
        return [part]
    found = []
    for name in LISTS:
        for inner in part.get(name, []):
            found += steps(inner)
    return found

def is_id(number) -> bool:
    # True is an int to Python
    return type(number) is int and 0 <= number < MOST_IDS

def pairs(merges: list) -> list[tuple]:
    """Merges as pairs: older files write "left right"."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]

def split_pattern(content: dict) -> str | None:
    """The regular expression that cuts a text into the pieces of byte-level BPE. None for any other way."""
    *cuts, last = steps(content["pre_tokenizer"])
    # the library's default puts a space in front of each text
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        return None if cuts else GPT2_PATTERN
    if len(cuts) != 1 or cuts[0]["type"] != "Split":
        return None
    split = cuts[0]
    # two ways to say that the matches are the pieces
    way = split["behavior"], split.get("invert", False)
    if way not in (("Isolated", False), ("Removed", True)):
        return None
    pattern = split["pattern"]["Regex"]
    # before its spelling: what is meant here is what Oniguruma makes of it
    if not read_alike(pattern):
        return None
    return SPELLINGS.get(pattern, pattern)

def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that byte-pair encoding by ranks makes a token of; None where it never makes it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        # no look at all ranks here: this is called for each token, and SmolLM2's 49,152 took 25 seconds
        made = [ranks.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
        lowest = min(made)
        if lowest == math.inf:
            return None
        # of equals the leftmost, in both engines
        place = made.index(lowest)
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)

def follow_ranks(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole: bool) -> bool:
    """Whether this list of merges makes of every piece what tiktoken makes of it, which merges the pair whose
    token has the lowest id. whole: a piece that is a token is looked up first, as tiktoken does."""
    listed = {token: set() for token in ranks}
    last = -1
    for left, right in merges:
        rank = ranks[left + right]
        if rank < last:
            return False
        last = rank
        listed[left + right].add((left, right))
    # Where two parts are about to become a token, its ends have been ends from the beginning, so no neighbour
    # has had a say in what stands between them: it is what merging the token alone leads to. So one pair a
    # token can come up, and the two engines go the same steps if that one is listed.
    for token in ranks:
        # what we write lists every pair: nothing to look for
        if len(token) == 1 or whole and listed[token].issuperset(halves(token, ranks)):
            continue
        pair = last_pair(token, ranks)
        if pair is not None and pair not in listed[token]:
            return False
        # no merge reaches it (588 tokens of Llama-3's): only a whole piece can be it
        if pair is None and not whole:
            return False
    return True

def read_byte_level(content: dict) -> ByteLevel | None:
    """What tiktoken needs for exactly the ids of this tokenizer.json, or None where they could differ."""
    try:
        model = content["model"]
        pattern = split_pattern(content)
        decoders = [step["type"] for step in steps(content["decoder"])]
        if pattern is None or decoders != ["ByteLevel"] or steps(content.get("normalizer")):
            return None
        if model.get("type", "BPE") != "BPE" or any(model.get(name) for name in OTHER_BPE):
            return None
        special = plain_special_tokens(content)
        return None if special is None else read_ranks(model, pattern, special)
    # a file of another form is one for the library, which knows all forms
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None

def plain_special_tokens(content: dict) -> dict[str, int] | None:
    """Id of each special token; None where one would be found in ordinary text."""
    for token in content["added_tokens"]:
        if not token["special"] or any(token.get(name) for name in TRIMS):
            return None
    return special_tokens(content)

def read_ranks(model: dict, pattern: str, special: dict[str, int]) -> ByteLevel | None:
    whole = model.get("ignore_merges", False)
    # a piece of ordinary text could be looked up as the special token
    if whole and not special.keys().isdisjoint(model["vocab"]):
        return None
    spelled = {text: as_bytes(text) for text in model["vocab"] if text not in special}
    ranks = {token: model["vocab"][text] for text, token in spelled.items()}
    numbers = [*ranks.values(), *special.values()]
    if b"" in ranks or len(set(numbers)) < len(numbers) or not all(map(is_id, numbers)):
        return None
    if sum(len(token) ** 2 for token in ranks) > MOST_SQUARES:
        return None
    merges = [(spelled[left], spelled[right]) for left, right in pairs(model["merges"])]
    return ByteLevel(ranks, pattern, special) if follow_ranks(ranks, merges, whole) else None

# --- what any tokenizer.json says ---

def special_tokens(content: dict) -> dict[str, int]:
    """Id of each special token."""
    special = {}
    try:
        for token in content["added_tokens"]:
            if token["special"]:
                special[token["content"]] = token["id"]
    except (KeyError, TypeError):
        raise UserError("its added_tokens is no list of tokens") from None
    if not all(isinstance(text, str) and is_id(number) for text, number in special.items()):
        raise UserError("its special tokens must have a text and an id each")
    return special

def edges(content: dict) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before a text and after it."""
    before = []
    after = []
    try:
        for step in steps(content.get("post_processor")):
            # each works around what the one before it has made
            left, right = edges_of(step)
            before = left + before
            after = after + right
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError):
        raise UserError("its post-processor is of no form that is known here") from None
    if not all(map(is_id, before + after)):
        raise UserError("its post-processor adds what is no id")
    return before, after

def edges_of(step: dict) -> tuple[list[int], list[int]]:
    if step["type"] == "ByteLevel":
        # it moves offsets, which nobody reads here
        return [], []
    # RoBERTa's and BERT's name one token on each side
    if step["type"] != "TemplateProcessing":
        return [step["cls"][1]], [step["sep"][1]]
    items = step["single"]
    text = next(i for i, item in enumerate(items) if "Sequence" in item)

    def ids_of(items: list[dict]) -> list[int]:
        ids = []
        for item in items:
            name = item["SpecialToken"]["id"]
            ids += step["special_tokens"][name]["ids"]
        return ids
    return ids_of(items[:text]), ids_of(items[text + 1:])

def text_bytes(content: dict):
    """A function from a token as the file writes it to the number of bytes of UTF-8 that it stands for."""
    kinds = set()
    for name in "pre_tokenizer", "decoder":
        kinds |= {str(step.get("type")) for step in steps(content.get(name))}
    fallback = content["model"].get("byte_fallback", False)

    def size(token: str) -> int:
        if "ByteLevel" in kinds and all(character in BYTES for character in token):
            return len(token)
        # SentencePiece's spelling of a byte that no piece has
        if fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return 1
        # and of a space
        return len(token.replace("▁", " ").encode())
    return size

# --- the identity of a vocabulary ---

def digest(content) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

def identity_of_ranks(vocabulary: ByteLevel) -> str:
    """Of what decides the ids. Merges do not: they follow from the ids."""
    return digest({
        "tokens": {as_text(token): number for token, number in vocabulary.ranks.items()},
        "pattern": vocabulary.pattern,
        "normalizer": [],
        "special": vocabulary.special,
    })

def identity_of_content(content: dict) -> str:
    """Of what decides the ids of a tokenizer.json, the same for old and new spellings of one tokenizer."""
    model = dict(content["model"])
    # T5's and RoBERTa's older files do not say it
    model.setdefault("type", "Unigram" if isinstance(model["vocab"], list) else "BPE")
    if model["type"] == "Unigram":
        # scores are float32; the library's JSON is off by the last digit of a float64
        model["vocab"] = [[piece, float(np.float32(score))] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = pairs(model["merges"])
    return digest({
        # newer versions of the library write out defaults
        "model": said(model),
        "normalizer": [today(step) for step in steps(content.get("normalizer"))],
        "pattern": [today(step) for step in steps(content.get("pre_tokenizer"))],
        "added": sorted(map(said, content["added_tokens"]), key=lambda token: token.get("id", 0)),
    })

def said(entries: dict) -> dict:
    """Without entries that say nothing."""
    return {name: value for name, value in entries.items() if value not in (None, False, "")}

def today(step: dict) -> dict:
    """A step in today's spelling, with its defaults and without what decides no id."""
    step = {name: value for name, value in step.items() if name not in ("trim_offsets", "str_rep")}
    if step.get("type") == "Metaspace":
        scheme = "always" if step.pop("add_prefix_space", True) else "never"
        return {"prepend_scheme": scheme, "split": True, **step}
    if step.get("type") == "ByteLevel":
        return {"add_prefix_space": True, "use_regex": True, **step}
    if step.get("type") == "Split":
        return {"invert": False, **step}
    return step
