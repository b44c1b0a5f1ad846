"""Text to ids and back: byte-pair encoding by tiktoken over a vocabulary that is one file."""
import base64
import collections
import contextlib
import json
import os

import numpy as np
import tiktoken

from nanolost.errors import UserError
from nanolost.files import expanded, parse_json, read_bounded, write_atomic

# tiktoken's faster spelling of GPT-2's split pattern (tiktoken_ext/openai_public.py): the same pieces
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"
FORMAT = "nanolost-tokenizer-1"
PIECE = 400_000                                # characters encoded at once
FILE_LIMIT = 64 << 20                          # bytes; o200k, the largest of OpenAI's, has 3.6 MB

# what a split pattern may forget: each character of ASCII between others and alone, runs of whitespace,
# and beyond ASCII letters, digits, marks, spaces that are not ASCII's, and characters of four bytes
ASCII = "".join(map(chr, range(128)))
SAMPLE = ASCII + " ".join(ASCII) + "a".join(ASCII) + (
    "I'll  say \n\n \t\r\n  x'S 1234567 3.14\u00a0\u0085\u2003\u2028\ufeff\u200b\u0301é ß Ω жар 漢字 かな "
    "عربي ١٢٣ ½ ₂ Ⅷ € — … 🙂👩\u200d💻 \U0010ffff\n \n  ")

@contextlib.contextmanager
def failures_mended(cause: str):
    """An error or a panic of tiktoken's Rust code inside becomes a UserError that names the cause."""
    try:
        yield
    except BaseException as e:
        # a panic's class is derived from BaseException, and no module exports it
        panic = type(e).__name__ == "PanicException"
        if not panic and not isinstance(e, ValueError):
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
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)

def check_vocabulary(tokens: list[bytes]):
    """UserError unless each token has a text of its own and each byte has a token."""
    # tiktoken takes all of these and panics, or loses text, at the first text that meets them
    counts = collections.Counter(tokens)
    if b"" in counts:
        raise UserError(f"its token {tokens.index(b'')} is empty")
    if len(counts) < len(tokens):
        (token, times), = counts.most_common(1)
        raise UserError(f"it holds the token {token!r} {times} times")
    missing = [byte for byte in range(256) if bytes([byte]) not in counts]
    # byte-pair encoding starts from single bytes: a text with this one could not be encoded
    if missing:
        raise UserError(f"it has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}")

def decoded(token, number: int) -> bytes:
    try:
        return base64.b64decode(token, validate=True)
    except (TypeError, ValueError):
        raise UserError(f"its token {number} is not in base64") from None

def read_ours(data: bytes, name: str) -> tuple[list[bytes], str, str]:
    """Tokens, split pattern and name of a tokenizer.json, whatever the file's name is."""
    content = parse_json(data, name)
    # Hugging Face's files have the same name, and JSON inside as well
    if content.get("format") != FORMAT:
        raise UserError(f"its format is not {FORMAT}")
    pattern, name = content.get("pattern"), content.get("name")
    if not isinstance(pattern, str) or not isinstance(name, str):
        raise UserError("its pattern and name must be texts")
    tokens = content.get("tokens")
    if not isinstance(tokens, list):
        raise UserError("its tokens must be a list")
    return [decoded(token, i) for i, token in enumerate(tokens)], pattern, name

def read_tiktoken(data: bytes, name: str) -> tuple[list[bytes], str, str]:
    """The same of OpenAI's format, a token a line: base64, a space and the rank."""
    # an editor may have put a byte-order mark in front
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    tokens = []
    for line in filter(None, lines):
        # ids are places in a list here: a gap in the ranks would shift all that follow
        words = line.split()
        if len(words) != 2 or words[1] != b"%d" % len(tokens):
            raise UserError(f"where rank {len(tokens)} should follow stands {line[:40]!r}")
        tokens.append(decoded(words[0], len(tokens)))
    return tokens, GPT2_PATTERN, name

class Tokenizer:
    """tokens: the byte string of each id from 0; end-of-text is the id after the last. pattern: the regular
    expression that cuts a text before merging. Special tokens in a text are ordinary text, so that
    `decode(encode(text)) == text` for any text. UserError for tokens or a pattern that cannot do that."""

    def __init__(self, tokens: list[bytes], pattern: str = GPT2_PATTERN, name: str = ""):
        check_vocabulary(tokens)
        self.tokens = tokens
        self.pattern = pattern
        self.name = name
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        # end-of-text stands for no byte of a text, so bits a byte may be summed over whole documents
        self.lengths = np.array([*map(len, tokens), 0])
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {END_OF_TEXT: self.eot}
        with failures_mended("its split pattern is no regular expression"):
            self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32. Other threads run meanwhile. UserError where the split pattern
        cannot cope with the text."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            # half surrogate pairs have no UTF-8; each becomes U+FFFD, as in tiktoken
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            size = len(text.encode())
        # in pieces, as tiktoken's regular expressions overflow on a run of a million spaces
        starts = range(0, len(text), PIECE)
        with failures_mended(f"the split pattern of the tokenizer {self.name} fails on this text"):
            pieces = [self.bpe.encode_to_numpy(text[i:i + PIECE], disallowed_special=()) for i in starts]
        ids = np.concatenate([np.empty(0, np.uint32), *pieces])
        # tiktoken leaves out what the pattern does not match, and says nothing
        lost = size - int(self.lengths[ids].sum())
        if lost:
            raise UserError(f"the split pattern of the tokenizer {self.name} drops {lost} of {size} bytes of "
                            "text: use another tokenizer")
        return ids

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids) -> str:
        """Text of some ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        # tiktoken wants ints, and gets tensors and arrays
        return self.bpe.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text behind each id; none behind end-of-text."""
        return self.lengths

    def to_json(self) -> bytes:
        content = {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "end_of_text": END_OF_TEXT,
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],
        }
        # a token a line; these bytes are what manifests hash
        return json.dumps(content, indent=0).encode()

    def save(self, path: str):
        write_atomic(os.fspath(path), self.to_json())

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """From a tokenizer.json of ours, or a .tiktoken file (it has no split pattern: GPT-2's is taken).
        UserError for any other file, and for one whose tokens or pattern lose text."""
        path = expanded(os.fspath(path))
        data = read_bounded(path, FILE_LIMIT)
        # nothing of the content decides how it is read: no pickle, no class by name
        read = read_tiktoken if path.endswith(".tiktoken") else read_ours
        try:
            with silent_stderr():
                tokenizer = cls(*read(data, os.path.basename(path)))
                # now, and not hours later at a rare text
                tokenizer.encode_array(SAMPLE)
        except UserError as e:
            raise UserError(f"{path} is no tokenizer: {e}; give a tokenizer.json of prepare_c4.py or a "
                            ".tiktoken file with ranks 0, 1, 2, …") from None
        return tokenizer

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """"byte" (256 bytes), "gpt2" (tiktoken fetches its vocabulary once from the network), or a file."""
        if name == "byte":
            return cls([bytes([byte]) for byte in range(256)], r"(?s:.{1,64})", name)
        if name != "gpt2":
            return cls.load(name)
        try:
            gpt2 = tiktoken.get_encoding(name)
        # of many kinds: no network, no such host, a damaged cache
        except Exception as e:
            raise UserError(
                f"tiktoken could not fetch GPT-2's vocabulary ({type(e).__name__}). Without a network give "
                "--tokenizer a .tiktoken file with its ranks, set TIKTOKEN_CACHE_DIR to a folder with it, or "
                "use --tokenizer train:N (trained on your text) or byte") from None
        # built anew, so that it can be saved like any other
        tokens = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]
        return cls(tokens, name=name)
