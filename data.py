"""Tokens on disk and the order in which they are read: shards, tokenizers, samples. Torch, numpy and tiktoken
only.

A shard is llm.c's file (dev/data/data_common.py): 256 little-endian int32 (magic, version, number of tokens,
zeros), then the tokens: uint16 under magic 20240520 version 1, uint32 under 20240801 version 7. A sample is a
window of seq_len + 1 tokens inside one shard; neighbours share one token, so that each token but a shard's
first is a target once an epoch. Which window is read when is a pure function (`SampleOrder`)."""
import base64
import binascii
import glob
import hashlib
import json
import os

import numpy as np
import tiktoken
import torch

HEADER_BYTES = 256 * 4
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}   # (magic, version) -> token type
# tiktoken's faster spelling of GPT-2's split pattern (tiktoken_ext/openai_public.py): same pieces
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"

# --- files ---

def write_atomic(path: str, data: bytes):
    """Write a small file so that `path` holds either its old or its new content whole, also after a power
    cut."""
    with open(path + ".tmp", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    sync_folder(os.path.dirname(path) or ".")

def sync_folder(path: str):
    """fsync a folder: without it a rename inside may be lost by a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def sha256_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

# --- shards ---

class ShardWriter:
    """Appends tokens to `path`.tmp and gives the file its name only in `close()`: no half-written shard has
    one."""

    def __init__(self, path: str, dtype: np.dtype):
        self.path, self.dtype, self.tokens = path, np.dtype(dtype), 0
        self.file = open(path + ".tmp", "wb")
        self.file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray):
        self.file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.tokens += len(tokens)

    def close(self):
        assert self.tokens < 2**31, f"{self.tokens} tokens: the header counts them in an int32"
        header = np.zeros(256, "<i4")
        header[:2] = next(key for key, dtype in FORMATS.items() if dtype == self.dtype)
        header[2] = self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path + ".tmp", self.path)
        sync_folder(os.path.dirname(self.path) or ".")

def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")

def write_shard(path: str, tokens, vocab_size: int | None = None):
    """Write one shard atomically. tokens: (n,) integers; they are stored as uint16 where `vocab_size` (by
    default one more than the largest token) fits, else as uint32. Raises ValueError for tokens outside the
    vocabulary."""
    tokens = np.asarray(tokens)
    vocab_size = vocab_size or int(tokens.max(initial=0)) + 1
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: give one row of integers")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"tokens {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocab_size}")
    writer = ShardWriter(os.fspath(path), token_dtype(vocab_size))
    writer.append(tokens)
    writer.close()

def read_shard(path: str) -> np.ndarray:
    """Memory-map the tokens of a shard: (n,) uint16 or uint32. Raises ValueError if the file is not a whole
    shard."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise ValueError(f"cannot read the shard {path}: {e.strerror}; run prepare_c4.py again") from None
    dtype = FORMATS.get((int(header[0]), int(header[1]))) if len(header) == 256 else None
    if dtype is None:
        raise ValueError(f"{path} is not a token shard (wrong magic or version): make it with prepare_c4.py")
    count = int(header[2])
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes but promises {count} tokens of {dtype.itemsize}: it is "
                         "cut or damaged; delete it and run prepare_c4.py again")
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", HEADER_BYTES, (count,)))

# --- tokenizers ---

class Tokenizer:
    """Byte-pair encoding by tiktoken over a vocabulary that is one JSON file.

    tokens: the byte string of each id from 0; the end-of-text id comes after the last. pattern: the regular
    expression that splits text before merging. Special tokens inside a text are encoded as ordinary text, so
    `decode(encode(text)) == text` for any text."""

    def __init__(self, tokens: list[bytes], pattern: str = GPT2_PATTERN, name: str = ""):
        self.tokens, self.pattern, self.name, self.eot = tokens, pattern, name, len(tokens)
        self.vocab_size = len(tokens) + 1
        ranks = {token: i for i, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={END_OF_TEXT: self.eot})

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self._bpe.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text behind each id; end-of-text stands for none."""
        return np.array([len(t) for t in self.tokens] + [0])

    def to_json(self) -> bytes:
        tokens = [base64.b64encode(t).decode() for t in self.tokens]
        return json.dumps({"format": "nanolost-tokenizer-1", "name": self.name, "pattern": self.pattern,
                           "end_of_text": END_OF_TEXT, "tokens": tokens}, indent=0).encode()

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, path: str):
        write_atomic(os.fspath(path), self.to_json())

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """From a tokenizer.json of ours or a .tiktoken file (which holds no split pattern: GPT-2's is
        taken)."""
        path = os.fspath(path)
        try:
            with open(path, "rb") as f:
                raw = f.read()
            if path.endswith(".tiktoken"):
                tokens, ranks = zip(*(line.split() for line in raw.splitlines() if line), strict=True)
                assert [int(r) for r in ranks] == list(range(len(ranks)))
                return cls([base64.b64decode(t, validate=True) for t in tokens], name=os.path.basename(path))
            content = json.loads(raw)
            assert content["format"] == "nanolost-tokenizer-1"
            tokens = [base64.b64decode(t, validate=True) for t in content["tokens"]]
            return cls(tokens, content["pattern"], content["name"])
        except OSError as e:
            raise ValueError(f"cannot read the tokenizer {path}: {e.strerror}") from None
        except (AssertionError, KeyError, TypeError, ValueError, binascii.Error):
            raise ValueError(f"{path} is no tokenizer: give a tokenizer.json of prepare_c4.py or a .tiktoken "
                             "file with ranks 0, 1, 2, …") from None

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's vocabulary through tiktoken, which fetches it once from the network."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:                 # requests' errors, or a damaged cache
            raise ValueError(
                f"tiktoken could not fetch GPT-2's vocabulary ({type(e).__name__}). Without a network give "
                "--tokenizer a .tiktoken file with its ranks, set TIKTOKEN_CACHE_DIR to a folder that has it, "
                "or use --tokenizer train:N (trained on your text) or byte") from None
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)], name="gpt2")

    @classmethod
    def byte(cls) -> "Tokenizer":
        return cls([bytes([b]) for b in range(256)], pattern=r"(?s:.{1,64})", name="byte")

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """"gpt2", "byte" or the path of a file."""
        return {"gpt2": cls.gpt2, "byte": cls.byte}.get(name, lambda: cls.load(name))()

# --- samples ---

def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection on uint64 whose output bits each depend on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

class SampleOrder:
    """`SampleOrder(n, seed)[i]`: the i-th sample of an endless sequence of epochs over n samples.

    Each epoch is another permutation of 0 … n - 1, computed by a keyed 6-round Feistel network on the next
    power of four, walked again while the result is outside [0, n). Nothing is stored and nothing replayed: a
    resumed run continues at any i at no cost. i may be an integer or an array of them."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"an order needs at least one sample, not {n}")
        self.n, self.seed = n, seed
        self.half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))     # bits in each half of the network

    def __getitem__(self, i):
        number = np.atleast_1d(np.asarray(i, dtype=np.int64))
        if (number < 0).any():
            raise IndexError(f"sample numbers start at 0, not {number.min()}")
        epoch, x = (a.astype(np.uint64) for a in np.divmod(number, self.n))
        key = _mix(epoch + _mix(np.array([self.seed % 2**64], np.uint64)))
        x = self._feistel(x, key)
        while (out := x >= self.n).any():      # at most 4 rounds of it on average, as the domain is < 4 n
            x[out] = self._feistel(x[out], key[out])
        return int(x[0]) if np.ndim(i) == 0 else x.astype(np.int64).reshape(np.shape(i))

    def _feistel(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self.half) - np.uint64(1)
        left, right = x >> self.half, x & mask
        for r in range(6):
            left, right = right, left ^ (_mix(right + key + np.uint64(r << 56)) & mask)
        return left << self.half | right

def load_manifest(data_dir: str, unfinished: bool = False) -> dict | None:
    """The manifest.json of prepare_c4.py, or None where there is none. ValueError if it is damaged or
    unfinished."""
    path = os.path.join(data_dir, "manifest.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        complete, _ = manifest["complete"], manifest["shards"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete {data_dir} and run prepare_c4.py again") from None
    if not complete and not unfinished:
        raise ValueError(f"{data_dir} is not finished: run the same prepare_c4.py command again to continue")
    return manifest

class TokenDataset:
    """The windows of one split ("train" or "val") of a folder of shards.

    Shards and their sizes are checked against manifest.json where there is one; a folder without it
    (ready-made shards) is read by the names *train*.bin and *val*.bin. Raises ValueError for anything missing
    or damaged."""

    RELEASE_EVERY = 4096                       # samples; mapped pages would else stay resident for ever

    def __init__(self, data_dir: str, split: str, seq_len: int):
        self.manifest, self.seq_len = load_manifest(data_dir), seq_len
        if self.manifest:
            listed = {s["name"]: s["tokens"] for s in self.manifest["shards"] if s["split"] == split}
        else:
            found = sorted(glob.glob(os.path.join(data_dir, f"*{split}*.bin")))
            listed = {os.path.basename(path): None for path in found}
        if not listed:
            raise ValueError(f"no {split} shards in {data_dir}: run prepare_c4.py --out_dir {data_dir} first")
        self.paths = [os.path.join(data_dir, name) for name in listed]
        self.lengths = [len(read_shard(path)) for path in self.paths]
        for path, length, tokens in zip(self.paths, self.lengths, listed.values(), strict=True):
            if tokens not in (None, length):
                raise ValueError(f"{path} has {length} tokens, its manifest says {tokens}: delete the folder "
                                 "and run prepare_c4.py again")
        self.ends = np.cumsum([max(0, (n - 1) // seq_len) for n in self.lengths])  # windows so far, by shard
        if not len(self):
            raise ValueError(f"the {split} shards of {data_dir} hold fewer than {seq_len + 1} tokens each: "
                             "prepare more text or lower --seq_len")
        self._maps, self._reads = {}, 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprint(self) -> str:
        """Identity of the split: what a resumed run must find again."""
        shards = [(os.path.basename(p), n) for p, n in zip(self.paths, self.lengths, strict=True)]
        known = {s["name"]: s["sha256"] for s in self.manifest["shards"]} if self.manifest else {}
        return hashlib.sha256(json.dumps([[*s, known.get(s[0])] for s in shards]).encode()).hexdigest()

    def check_ids(self, vocab_size: int):
        """Read every token once, in pieces of 16 M: an id outside the vocabulary is a ValueError."""
        for path in self.paths:
            tokens = read_shard(path)
            for i in range(0, len(tokens), 1 << 24):
                if (largest := int(tokens[i:i + (1 << 24)].max())) >= vocab_size:
                    raise ValueError(f"{path} holds token {largest}, the last one is {vocab_size - 1}: "
                                     "it was made with another tokenizer; prepare it again")

    def batch(self, samples) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows `samples` as inputs and targets, two int64 tensors of shape (len(samples), seq_len)."""
        self._reads += len(samples)
        if self._reads >= self.RELEASE_EVERY:
            self._maps, self._reads = {}, 0
        window = np.empty((len(samples), self.seq_len + 1), np.int64)
        shards = np.searchsorted(self.ends, samples, side="right")
        for row, sample, shard in zip(window, samples, shards, strict=True):
            if shard not in self._maps:
                self._maps[shard] = read_shard(self.paths[shard])
            start = (sample - (self.ends[shard - 1] if shard else 0)) * self.seq_len
            row[:] = self._maps[shard][start:start + self.seq_len + 1]
        window = torch.from_numpy(window)
        return window[:, :-1], window[:, 1:]
