"""Tokens on disk and the order in which they are read: shards, tokenizers, samples.

A shard is llm.c's file (dev/data/data_common.py): 256 little-endian int32 (magic, version, number of tokens,
zeros), then the tokens: uint16 under magic 20240520 version 1, uint32 under 20240801 version 7. A sample is a
window of seq_len + 1 tokens of one shard; neighbours share a token, so that each token but a shard's first is
a target once an epoch. Which window is read when is a pure function, `SampleOrder`."""
import glob
import hashlib
import json
import mmap
import os

import numpy as np
import torch

from nanolost.files import publish

HEADER_BYTES = 256 * 4
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}     # (magic, version) → token type
AGAIN = "delete its folder and run prepare_c4.py again"

# --- shards ---

def token_dtype(vocab_size: int) -> np.dtype:
    return FORMATS[20240520, 1] if vocab_size <= 2**16 else FORMATS[20240801, 7]

class ShardWriter:
    """Appends tokens to a temporary file, which gets the name `path` in `close()`."""

    def __init__(self, path: str, dtype: np.dtype):
        self.path, self.dtype, self.tokens = path, np.dtype(dtype), 0
        self.file = open(f"{path}.tmp", "wb")
        self.file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray):
        self.file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.tokens += len(tokens)

    def close(self):
        assert self.tokens < 2**31, f"{self.tokens} tokens: the header counts them in an int32"
        magic, version = next(key for key, dtype in FORMATS.items() if dtype == self.dtype)
        self.file.seek(0)
        self.file.write(np.array([magic, version, self.tokens], "<i4").tobytes())
        publish(self.file, self.path)

def write_shard(path: str, tokens, vocab_size: int | None = None):
    """Write one shard atomically. tokens: (n,) integers, stored as uint16 where `vocab_size` (by default one
    more than the largest token) fits, else as uint32. Raises ValueError for tokens outside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: give one row of integers")
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    vocab_size = vocab_size or high + 1
    if low < 0 or high >= min(vocab_size, 2**32):
        raise ValueError(f"tokens {low} to {high} do not fit a vocabulary of {vocab_size}")
    writer = ShardWriter(os.fspath(path), token_dtype(vocab_size))
    writer.append(tokens)
    writer.close()

def read_shard(path: str) -> np.ndarray:
    """The tokens of a shard as a memory map, (n,) uint16 or uint32. ValueError if it is not a whole one."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise ValueError(f"cannot read the shard {path}: {e.strerror}; {AGAIN}") from None
    dtype = FORMATS.get(tuple(header[:2].tolist()))
    if dtype is None or len(header) < 256:
        raise ValueError(f"{path} is not a token shard (wrong magic or version): make it with prepare_c4.py")
    count = int(header[2])
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes but promises {count} tokens of {dtype.itemsize}: it is "
                         f"cut or damaged; {AGAIN}")
    if not count:
        return np.empty(0, dtype)
    with open(path, "rb") as f:
        return np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), dtype, count, HEADER_BYTES)

def shard_length(data_dir: str, shard: dict) -> int:
    """Tokens of a shard by its file. ValueError where its entry in the manifest says something else."""
    tokens = len(read_shard(os.path.join(data_dir, shard["name"])))
    if shard.get("tokens", tokens) != tokens:
        raise ValueError(f"{shard['name']} of {data_dir} has {tokens} tokens, its manifest says "
                         f"{shard['tokens']}: {AGAIN}")
    return tokens

def release(tokens: np.ndarray):
    """Unmap the pages of a `read_shard` that were touched: they would count as resident for ever."""
    tokens.base.obj.madvise(mmap.MADV_DONTNEED)

# --- samples ---

def mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection on uint64 in which each output bit depends on all input bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

class SampleOrder:
    """`SampleOrder(n, seed)[i]`: the i-th sample of an endless sequence of epochs over n samples, i an
    integer or an array of them.

    Each epoch is another permutation of 0 … n - 1: a keyed 6-round Feistel network on the next power of four,
    walked again while the result is not below n. Nothing is stored or replayed: any i can come next."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"an order needs at least one sample, not {n}")
        self.n, self.seed = n, seed
        self.half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))         # bits in a half of the network

    def __getitem__(self, i):
        number = np.atleast_1d(np.asarray(i, dtype=np.int64))
        if (number < 0).any():
            raise IndexError(f"sample numbers start at 0, not {number.min()}")
        epoch, x = (a.astype(np.uint64) for a in np.divmod(number, self.n))
        key = mix(epoch + mix(np.array([self.seed % 2**64], np.uint64)))
        x = self._feistel(x, key)
        while (out := x >= self.n).any():      # the domain is < 4 n: seldom many rounds
            x[out] = self._feistel(x[out], key[out])
        return int(x[0]) if np.ndim(i) == 0 else x.astype(np.int64).reshape(np.shape(i))

    def _feistel(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self.half) - np.uint64(1)
        left, right = x >> self.half, x & mask
        for r in range(6):
            left, right = right, left ^ (mix(right + key + np.uint64(r << 56)) & mask)
        return left << self.half | right

def load_manifest(data_dir: str, unfinished: bool = False) -> dict | None:
    """The manifest.json of prepare_c4.py, or None. ValueError if it is damaged or unfinished."""
    path = os.path.join(data_dir, "manifest.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        complete, _ = manifest["complete"], [(s["split"], s["name"], s["tokens"]) for s in manifest["shards"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete {data_dir} and run prepare_c4.py again") from None
    if not complete and not unfinished:
        raise ValueError(f"{data_dir} is not finished: run the same prepare_c4.py command again to continue")
    return manifest

class TokenDataset:
    """The windows of one split ("train" or "val") of a folder of shards, checked against its manifest.json.
    Without one the names *train*.bin and *val*.bin count. ValueError for what is missing or damaged."""

    def __init__(self, data_dir: str, split: str, seq_len: int):
        manifest, self.seq_len = load_manifest(data_dir), seq_len
        found = sorted(glob.glob(os.path.join(glob.escape(data_dir), f"*{split}*.bin")))
        shards = [s for s in manifest["shards"] if s["split"] == split] if manifest else [
            {"name": os.path.basename(path)} for path in found]
        if not shards:
            raise ValueError(f"no {split} shards in {data_dir}: run prepare_c4.py --out_dir {data_dir} first")
        self.paths = [os.path.join(data_dir, s["name"]) for s in shards]
        lengths = [shard_length(data_dir, shard) for shard in shards]
        self.ends = np.cumsum([max(0, (n - 1) // seq_len) for n in lengths])   # windows up to a shard's end
        if not len(self):
            raise ValueError(f"the {split} shards of {data_dir} hold fewer than {seq_len + 1} tokens each: "
                             "prepare more text or lower --seq_len")
        # identity of the split: what a resumed run must find again
        known = json.dumps([[s["name"], n, s.get("sha256")] for s, n in zip(shards, lengths, strict=True)])
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()
        self.maps = {}
        self.tokenizer_sha256 = manifest.get("tokenizer", {}).get("sha256") if manifest else None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def check_ids(self, vocab_size: int):
        """Read every token once, in pieces of 16 M: an id outside the vocabulary is a ValueError."""
        for path in self.paths:
            tokens = read_shard(path)
            for i in range(0, len(tokens), 1 << 24):
                if (largest := int(tokens[i:i + (1 << 24)].max())) >= vocab_size:
                    raise ValueError(f"{path} holds token {largest}, the last is {vocab_size - 1}: it was "
                                     "made with another tokenizer; prepare it again")
                release(tokens)

    def batch(self, samples, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Windows `samples` as inputs and targets, two int64 tensors of shape (len(samples), seq_len). To a
        GPU they go from pinned memory, for which neither side waits."""
        window = np.empty((len(samples), self.seq_len + 1), np.int64)
        shards = np.searchsorted(self.ends, samples, side="right")
        for row, sample, shard in zip(window, samples, shards, strict=True):
            if shard not in self.maps:
                self.maps[shard] = read_shard(self.paths[shard])
            start = (sample - (self.ends[shard - 1] if shard else 0)) * self.seq_len
            row[:] = self.maps[shard][start:start + self.seq_len + 1]
        for shard in set(shards.tolist()):
            release(self.maps[shard])
        window = torch.from_numpy(window)
        pair = window[:, :-1], window[:, 1:]
        if torch.device(device).type == "cuda":
            return tuple(t.contiguous().pin_memory().to(device, non_blocking=True) for t in pair)
        return tuple(t.to(device) for t in pair)
