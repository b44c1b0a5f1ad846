"""Text to ids and back."""
import base64
import json
import os

import numpy as np
import tiktoken

from nanolost.files import write_atomic

# tiktoken's faster spelling of GPT-2's split pattern (tiktoken_ext/openai_public.py): the same pieces
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"
PIECE = 400_000                                # characters encoded at once

class Tokenizer:
    """Byte-pair encoding by tiktoken over a vocabulary that is one JSON file.

    tokens: the byte string of each id from 0; end-of-text is the id after the last. pattern: the regular
    expression that cuts a text before merging. Special tokens in a text are ordinary text, so that
    `decode(encode(text)) == text` for any text."""

    def __init__(self, tokens: list[bytes], pattern: str = GPT2_PATTERN, name: str = ""):
        self.tokens, self.pattern, self.name, self.eot = tokens, pattern, name, len(tokens)
        self.vocab_size = len(tokens) + 1
        ranks = {token: i for i, token in enumerate(tokens)}
        self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={END_OF_TEXT: self.eot})

    def encode(self, text: str) -> list[int]:
        # in pieces, as tiktoken's regular expressions overflow on a run of a million spaces
        return [i for a in range(0, len(text), PIECE) for i in self.bpe.encode_ordinary(text[a:a + PIECE])]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` as uint32 (n,), without a list on the way. Threads may run it side by side: tiktoken lets
        go of the interpreter's lock."""
        parts = [np.empty(0, np.uint32)]
        for start in range(0, len(text), PIECE):
            parts.append(self.bpe.encode_to_numpy(text[start:start + PIECE], disallowed_special=()))
        return np.concatenate(parts)

    def decode(self, ids) -> str:
        """Text of some ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.bpe.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text behind each id; none behind end-of-text."""
        return np.array([len(t) for t in self.tokens] + [0])

    def to_json(self) -> bytes:
        tokens = [base64.b64encode(t).decode() for t in self.tokens]
        return json.dumps({"format": "nanolost-tokenizer-1", "name": self.name, "pattern": self.pattern,
                           "end_of_text": END_OF_TEXT, "tokens": tokens}, indent=0).encode()

    def save(self, path: str):
        write_atomic(os.fspath(path), self.to_json())

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """From a tokenizer.json of ours, or a .tiktoken file (it has no split pattern: GPT-2's is taken)."""
        path = os.fspath(path)
        try:
            with open(path, "rb") as f:
                raw = f.read()
            if path.endswith(".tiktoken"):
                tokens, ranks = zip(*(line.split() for line in raw.splitlines() if line), strict=True)
                assert [int(r) for r in ranks] == list(range(len(ranks)))
                content = {"pattern": GPT2_PATTERN, "name": os.path.basename(path)}
            else:
                content = json.loads(raw)
                assert content["format"] == "nanolost-tokenizer-1"
                tokens = content["tokens"]
            tokens = [base64.b64decode(token, validate=True) for token in tokens]
            return cls(tokens, content["pattern"], content["name"])
        except OSError as e:
            raise ValueError(f"cannot read the tokenizer {path}: {e.strerror}") from None
        except (AssertionError, KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path} is no tokenizer: give a tokenizer.json of prepare_c4.py or a .tiktoken "
                             "file with ranks 0, 1, 2, …") from None

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """"byte" (256 bytes), "gpt2" (tiktoken fetches its vocabulary once from the network), or a file."""
        if name == "byte":
            return cls([bytes([b]) for b in range(256)], r"(?s:.{1,64})", name)
        if name != "gpt2":
            return cls.load(name)
        try:
            gpt2 = tiktoken.get_encoding(name)
        except Exception as e:                 # of many kinds: no network, no such host, a damaged cache
            raise ValueError(
                f"tiktoken could not fetch GPT-2's vocabulary ({type(e).__name__}). Without a network give "
                "--tokenizer a .tiktoken file with its ranks, set TIKTOKEN_CACHE_DIR to a folder with it, or "
                "use --tokenizer train:N (trained on your text) or byte") from None
        return cls([gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)], name=name)

