"""What encodes: tiktoken, whose ids follow from a vocabulary's order, or the library `tokenizers`, which
reads every tokenizer.json and is six to eight times slower (2.3 against 17.6 MB of text a second)."""
import contextlib
import functools
import os
import re

import numpy as np
import tiktoken

from nanolost import hf_tokenizer as hf
from nanolost.errors import UserError
from nanolost.files import parse_json

PIECE = 400_000                                # characters that tiktoken encodes at once
TAIL = 10_000                                  # of these, the last ones are searched for the end of a word
# every split pattern in use ends a piece there, so that cutting there changes no id
WORD_END = re.compile(r"[^\W\d_](?=\s)")

# what a split pattern may forget: each character of ASCII between others and alone, runs of whitespace,
# and beyond ASCII letters, digits, marks, spaces that are not ASCII's, and characters of four bytes
ASCII = "".join(map(chr, range(128)))
SAMPLE = ASCII + " ".join(ASCII) + "a".join(ASCII) + (
    "I'll  say \n\n \t \r\n  x'S 1234567 3.14\u00a0\u0085\u2003\u2028\ufeff\u200b\u0301é ß Ω жар 漢字 かな "
    "عربي ١٢٣ ½ ₂ Ⅷ € — … 🙂👩\u200d💻 \U0010ffff\n \n  ")

# --- Rust's failures ---

@contextlib.contextmanager
def failures_mended(cause: str, kind: type[Exception] = ValueError):
    """An error of this kind, or a panic, of Rust code inside becomes a UserError that names the cause."""
    try:
        yield
    except BaseException as e:
        # a panic's class is derived from BaseException, and no module exports it
        panic = type(e).__name__ == "PanicException"
        if not panic and not isinstance(e, kind):
            raise
        raise UserError(f"{cause} ({e})") from None

@contextlib.contextmanager
def silent_stderr():
    """Rust prints a panic to file descriptor 2 before Python can catch it."""
    try:
        kept = os.dup(2)
    except OSError:
        # closed: nobody to be spared
        yield
        return
    # the descriptor and not sys.stderr: Rust knows no Python object
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)

# --- texts and sizes ---

def well_formed(text: str) -> str:
    """Half surrogate pairs have no UTF-8; each becomes U+FFFD, as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

def cut(text: str):
    """A text in pieces: tiktoken's regular expressions overflow on a run of a million spaces."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        # a text without a word in it is cut anywhere
        ends = [match.end() for match in WORD_END.finditer(text, end - TAIL, end)]
        end = ends[-1] if ends else end
        yield text[start:end]
        start = end
    yield text[start:]

def sizes_array(sizes: dict[int, int]) -> np.ndarray:
    """(largest id + 1,) int64: an id without a token has no bytes."""
    lengths = np.zeros(max(sizes) + 1, np.int64)
    lengths[list(sizes)] = list(sizes.values())
    return lengths

# --- the engines ---

class Tiktoken:
    """Byte-level BPE. Nothing of a text is lost: `decode(encode(text)) == text`, or a UserError. Only bytes
    that have no token are dropped (SmolLM2's vocabulary lacks 21, some control characters among them), and
    such a text is one for the library."""

    def __init__(self, vocabulary: hf.ByteLevel, name: str, data: bytes = b""):
        """data: of the tokenizer.json, for a vocabulary that lacks some bytes."""
        self.vocabulary = vocabulary
        self.name = name
        self.data = data
        # id → bytes of UTF-8 that it stands for in a text
        self.sizes = {number: len(token) for token, number in vocabulary.ranks.items()}
        # special tokens stand for no byte of a text, so bits a byte may be summed over whole documents
        self.sizes |= dict.fromkeys(vocabulary.special.values(), 0)
        self.lengths = sizes_array(self.sizes)
        every = [bytes([byte]) for byte in range(256)]
        # GPT-2's has all; a vocabulary may lack those that its texts never held
        lacking = [re.escape(byte) for byte in every if byte not in vocabulary.ranks]
        self.rare = re.compile(b"|".join(lacking)) if lacking else None
        with failures_mended("its split pattern is no regular expression"):
            self.bpe = tiktoken.Encoding(
                name,
                pat_str=vocabulary.pattern,
                mergeable_ranks=vocabulary.ranks,
                special_tokens=vocabulary.special,
            )

    @functools.cached_property
    def library(self) -> "Library":
        return Library(self.data, parse_json(self.data, self.name), self.name)

    def spells(self, text: str) -> bool:
        """Whether each byte of a text has a token."""
        return self.rare is None or self.rare.search(text.encode()) is None

    def encode(self, text: str) -> np.ndarray:
        if not self.spells(text):
            # what stands beside a dropped byte grows together, which no order of ranks can say
            return self.library.encode(text)
        # a pattern of nested repeats gives up: its backtracking is bounded
        with failures_mended(f"the split pattern of the tokenizer {self.name} fails on this text"):
            arrays = [self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in cut(text)]
        ids = np.concatenate([np.empty(0, np.uint32), *arrays])
        # tiktoken leaves out what the pattern does not match, and says nothing
        size = len(text.encode())
        lost = size - int(self.lengths[ids].sum())
        if lost:
            raise UserError(f"the split pattern of the tokenizer {self.name} drops {lost} of {size} bytes of "
                            "text: use another tokenizer")
        return ids

    def encode_special(self, text: str) -> list[int]:
        if not self.spells(text):
            return self.library.encode_special(text)
        return self.bpe.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, errors="replace")

    def identity(self) -> str:
        return hf.identity_of_ranks(self.vocabulary)

    def try_out(self):
        """UserError now, and not hours later at a rare text."""
        self.encode("".join(filter(self.spells, SAMPLE)))

class Library:
    """Any tokenizer.json, by the library that the format comes from. A text may lose what its normalizer
    takes away, and characters that have no token."""

    def __init__(self, data: bytes, content: dict, name: str):
        try:
            import tokenizers
        except ImportError:
            raise UserError("tiktoken cannot do what it needs (another kind than byte-level BPE, more steps, "
                            "or a byte without a token): pip install tokenizers") from None
        self.content = content
        self.name = name
        with failures_mended("the library tokenizers refuses it", Exception):
            self.tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
            # some files cut every text at 512 tokens, or fill it up
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.tokenizer.encode_special_tokens = True
            dropout = getattr(self.tokenizer.model, "dropout", None)
            vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        # such a file draws the ids of a text anew each time: shards that no second run makes
        if dropout:
            raise UserError(f"its model.dropout {dropout:g} draws merges at random: set it to null there")
        size = hf.text_bytes(content)
        self.sizes = {number: size(token) for token, number in vocabulary.items()}
        special = hf.special_tokens(content)
        self.sizes |= dict.fromkeys(special.values(), 0)
        # a table of that many rows would fill the memory
        if max(self.sizes) >= hf.MOST_IDS:
            raise UserError(f"it names the id {max(self.sizes)}, above {hf.MOST_IDS}")
        self.lengths = sizes_array(self.sizes)

    def _ids(self, text: str) -> list[int]:
        # in one piece: SentencePiece's kind puts a space in front of every text
        with failures_mended(f"the tokenizer {self.name} fails on this text", Exception):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._ids(text), np.uint32)

    def encode_special(self, text: str) -> list[int]:
        # one text of a chat, from the main thread: no worker encodes meanwhile
        self.tokenizer.encode_special_tokens = False
        try:
            return self._ids(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        # like tiktoken, which leaves nothing out
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def identity(self) -> str:
        return hf.identity_of_content(self.content)

    def try_out(self):
        self.encode(SAMPLE)

def compare(engine: Tiktoken, data: bytes):
    """UserError unless the library makes the same ids of a tokenizer.json as tiktoken does: of a sample that
    a split pattern may trip over, and of each token."""
    library = Library(data, parse_json(data, engine.name), engine.name)
    tokens = []
    for token in engine.vocabulary.ranks:
        # one that ends inside a character is no text
        with contextlib.suppress(UnicodeDecodeError):
            tokens.append(token.decode())
    texts = [SAMPLE, *tokens]
    for start in range(0, len(tokens), 1000):
        # also between others, where ^ and $ may see an end; few enough that no text is cut
        some = tokens[start:start + 1000]
        texts += ["\n".join(some), " ".join(some)]
    for text in texts:
        ids = engine.encode(text).tolist()
        if ids != library.encode(text).tolist() or library.decode(ids) != text:
            raise UserError(f"by the split pattern {engine.vocabulary.pattern} tiktoken and tokenizers cut "
                            f"{text!r:.60} into other pieces: spell it without $, ^ and {{1,3}}+")
