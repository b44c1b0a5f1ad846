"""Tokens on disk and the order in which they are read: shards, their manifest, samples.

A shard is llm.c's file (dev/data/data_common.py): 256 little-endian int32 (magic, version, number of tokens,
zeros), then the tokens: uint16 under magic 20240520 version 1, uint32 under 20240801 version 7. A sample is a
window of seq_len + 1 tokens of one shard; neighbours share a token, so that each token but a shard's first is
a target once an epoch. Which window is read when is a pure function, `SampleOrder`.

Where the manifest says "row": N, a shard is rows of N tokens, each a sample by itself: a document that was
cut or padded. Beside it stands NAME.targets, one byte a token: 1 for a target, 0 for a row's first token, a
prompt and padding."""
import hashlib
import json
import mmap
import os
import re

import numpy as np
import torch

from nanolost.errors import UserError
from nanolost.files import open_regular, plain_name, publish, read_json, sha256_of

HEADER_BYTES = 256 * 4
UINT16 = np.dtype("<u2")
UINT32 = np.dtype("<u4")
FORMATS = {(20240520, 1): UINT16, (20240801, 7): UINT32}       # (magic, version) → token type
PIECE = 1 << 24                                # tokens that check_ids looks at at once
MOST_TOKENS = 2**31 - 1                        # of a shard: the header counts them in an int32
SPLITS = ("train", "val")
SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val"}    # word in a file's name → split
AGAIN = "if prepare_c4.py made it, delete its folder and run prepare_c4.py again"
TARGETS = ".targets"                           # behind a shard's name: the file of its targets
NANOGPT_SHARD = 100_000_000                    # tokens of a shard that is made of nanoGPT's file

# --- shards ---

def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two types that holds the ids 0 … vocab_size - 1."""
    if vocab_size <= 2**16:
        return UINT16
    return UINT32

def shard_header(dtype: np.dtype, tokens: int) -> bytes:
    """The first HEADER_BYTES of a shard."""
    assert tokens <= MOST_TOKENS, f"{tokens} tokens are too many for an int32"
    # llm.c's readers take 256 words, of which three say something
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    for (magic, version), kind in FORMATS.items():
        if kind == dtype:
            header[:3] = magic, version, tokens
    assert header.any(), f"no shard holds tokens of type {dtype}"
    return header.tobytes()

class ShardWriter:
    """Appends tokens to a temporary file, which gets the name `path` in `close()`. After it `sha256` is the
    digest of the file."""

    def __init__(self, path: str, dtype: np.dtype):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self.sha256 = None
        self.file = open(f"{path}.tmp", "wb+")
        # room for the header, which is known last
        self.file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray):
        # the caller has seen to it that they fit
        tokens = tokens.astype(self.dtype, copy=False)
        self.file.write(tokens.tobytes())
        self.tokens += len(tokens)

    def close(self):
        self.file.seek(0)
        self.file.write(shard_header(self.dtype, self.tokens))
        self.file.flush()
        # the count at the front is known only now, so the digest cannot grow with the file; it is taken of
        # the open file, from memory as a rule, before anybody else can reach it by its name
        self.sha256 = sha256_of(self.file)
        publish(self.file, self.path)

class TargetsWriter:
    """Appends to the file of targets beside the shard `path`; `close()` as of a ShardWriter."""

    def __init__(self, path: str):
        self.path = path + TARGETS
        # tokens that are targets
        self.count = 0
        self.sha256 = None
        self.file = open(f"{self.path}.tmp", "wb+")

    def append(self, targets: np.ndarray):
        """targets: (n,) bool, of the tokens that the shard gets."""
        # a byte, not a bit: one line of numpy reads it
        self.file.write(targets.astype(np.uint8).tobytes())
        self.count += int(targets.sum())

    def close(self):
        self.file.flush()
        self.sha256 = sha256_of(self.file)
        publish(self.file, self.path)

def write_shard(path: str, tokens, vocab_size: int | None = None):
    """Write one shard atomically. tokens: (n,) integers, stored as uint16 where `vocab_size` (by default one
    more than the largest token) fits, else as uint32. UserError for tokens outside the vocabulary."""
    tokens = np.asarray(tokens)
    # a float that is rounded, or a row of rows that is flattened, would be another text
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: give one row of integers")
    if len(tokens) > MOST_TOKENS:
        raise UserError(f"{len(tokens)} tokens: a shard holds at most {MOST_TOKENS}, write several")
    low = int(tokens.min(initial=0))
    high = int(tokens.max(initial=0))
    if vocab_size is None:
        vocab_size = high + 1
    if low < 0 or high >= min(vocab_size, 2**32):
        raise UserError(f"tokens {low} to {high} do not fit a vocabulary of {vocab_size}")
    # nothing was made so far: an error leaves no file behind
    writer = ShardWriter(os.fspath(path), token_dtype(vocab_size))
    writer.append(tokens)
    writer.close()

def read_shard(path: str) -> np.ndarray:
    """The tokens of a shard as a memory map, (n,) uint16 or uint32. UserError if it is not a whole one."""
    try:
        with open_regular(path) as file:
            return _mapped(file, path)
    except OSError as e:
        raise UserError(f"cannot read the shard {path}: {e.strerror}; {AGAIN}") from None

def _mapped(file, path: str) -> np.ndarray:
    header = np.fromfile(file, "<i4", HEADER_BYTES // 4)
    magic, version, count = [*header.tolist(), 0, 0, 0][:3]
    dtype = FORMATS.get((magic, version))
    size = os.fstat(file.fileno()).st_size
    # each version has one layout: a later one would be read wrongly
    if dtype is None or header.nbytes < HEADER_BYTES:
        raise UserError(f"{path} is not a token shard (wrong magic or version): {repair(path, size, magic)}")
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise UserError(f"{path} has {size} bytes but promises {count} tokens of {dtype.itemsize}: it is "
                        f"cut or damaged; {AGAIN}")
    # a memory map outlives its file's descriptor: thousands of shards need no open file each
    content = mmap.mmap(file.fileno(), length=0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype, count, HEADER_BYTES)

def repair(path: str, size: int, magic: int) -> str:
    """What to do with a file of `size` bytes that begins with `magic` and is no shard."""
    headers = [known for known, _ in FORMATS]
    # nanoGPT writes uint16 and nothing before them: a number of bytes that is even tells nothing else
    if magic in headers or size == 0 or size % 2:
        return "make it with prepare_c4.py"
    return f"if it is nanoGPT's, which has no header, make shards of it by {nanogpt_command(path)}"

def nanogpt_command(path: str) -> str:
    """The command that makes shards of nanoGPT's file, and how to train on them."""
    call = f"from nanolost.data import convert_nanogpt; convert_nanogpt({os.fspath(path)!r}, 'data/nanogpt')"
    return f'python -c "{call}" and train with --data_dir data/nanogpt --tokenizer gpt2'

def convert_nanogpt(path: str, out_dir: str):
    """Write the shards of one of nanoGPT's files, train.bin or val.bin: uint16 ids of GPT-2's vocabulary
    without a header (nanoGPT, data/openwebtext/prepare.py). UserError where its name says no split."""
    split = split_of_name(os.path.basename(path))
    if split is None:
        raise UserError(f"the name {path} says neither train nor val: rename it")
    try:
        tokens = np.memmap(path, UINT16, "r")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path} as uint16: {e}") from None
    os.makedirs(out_dir, exist_ok=True)
    # OpenWebText has 9 billion tokens, more than a header can count
    for number, start in enumerate(range(0, len(tokens), NANOGPT_SHARD)):
        name = f"{split}_{number:05d}.bin"
        # without a manifest, which would have to say whose ids they are
        write_shard(os.path.join(out_dir, name), tokens[start:start + NANOGPT_SHARD], 2**16)

def read_targets(path: str, tokens: int) -> np.ndarray:
    """Which tokens of the shard `path`, of so many tokens, are targets: a memory map (tokens,) uint8.
    UserError for a file that is missing, or is not as long."""
    path = os.fspath(path) + TARGETS
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != tokens:
                raise UserError(f"{path} has {size} bytes, its shard {tokens} tokens; {AGAIN}")
            content = mmap.mmap(file.fileno(), length=0, access=mmap.ACCESS_READ)
            return np.frombuffer(content, np.uint8)
    except OSError as e:
        raise UserError(f"cannot read the targets {path}: {e.strerror}; {AGAIN}") from None

def release(tokens: np.ndarray):
    """Unmap the pages of a `read_shard` that were touched: they would count as resident for ever."""
    # the memory map under the memoryview under the array
    tokens.base.obj.madvise(mmap.MADV_DONTNEED)

# --- the manifest ---

def is_flag(value) -> bool:
    return isinstance(value, bool)

def is_count(value) -> bool:
    # True is an int to Python; what is larger than 63 bits fits no array
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return 0 <= value < 2**63

def is_digest(value) -> bool:
    if not isinstance(value, str):
        return False
    # in hashlib's spelling: digests are compared as texts
    return re.fullmatch("[0-9a-f]{64}", value) is not None

def is_object(value) -> bool:
    return isinstance(value, dict)

def is_list_of_objects(value) -> bool:
    if not isinstance(value, list):
        return False
    return all(map(is_object, value))

MANIFEST_LIMIT = 256 << 20                     # bytes: a million input files are listed in it, too
# entry → its kind in words, and as a test; only what is read here, as prepare_c4.py keeps more in it
MANIFEST = {
    "complete": ("true or false", is_flag),
    "shards": ("a list of objects", is_list_of_objects),
    "version": ("1", lambda value: is_count(value) and value == 1),
    "tokenizer": ("an object", is_object),
    # a token and its target are the smallest row
    "row": ("a number of tokens from 2", lambda value: is_count(value) and value >= 2),
}
SHARD = {
    "name": ("a name", lambda value: isinstance(value, str)),
    "split": ("train or val", lambda value: isinstance(value, str) and value in SPLITS),
    "tokens": ("a number of tokens", is_count),
    "bytes": ("a number of bytes", is_count),
    "documents": ("a number of documents", is_count),
    "sha256": ("a SHA-256", is_digest),
    "text_tokens": ("a number of tokens", is_count),
    "targets": ("an object", is_object),
}
# of a shard of rows: its file of targets
TARGETS_ENTRY = {
    "name": ("a name", lambda value: isinstance(value, str)),
    "tokens": ("a number of tokens", is_count),
    "sha256": ("a SHA-256", is_digest),
}
TOKENIZER = {
    "sha256": ("a SHA-256", is_digest),
    "identity": ("a SHA-256", is_digest),
    "vocab_size": ("a number of ids", is_count),
    "eot": ("an id", is_count),
}

def check_entries(entries: dict, kinds: dict, required: tuple[str, ...] = ()):
    """UserError unless all that is required is there, and all that is there has its kind."""
    for name in required:
        if name not in entries:
            raise UserError(f"it has no {name}")
    # in the table's order: all ranks and all runs name the same entry
    for name, (kind, holds) in kinds.items():
        if name in entries and not holds(entries[name]):
            raise UserError(f"its {name} {entries[name]!r:.80} is not {kind}")

def check_manifest(manifest: dict):
    """UserError that names the first entry of a wrong type."""
    check_entries(manifest, MANIFEST, required=("complete", "shards"))
    # a run that was interrupted early has chosen none yet
    if "tokenizer" in manifest:
        check_entries(manifest["tokenizer"], TOKENIZER, required=("sha256",))
    names = set()
    for shard in manifest["shards"]:
        check_entries(shard, SHARD, required=("name", "split", "tokens"))
        # a path would lead out of the folder, to /dev/zero or a neighbour's text
        name = plain_name(shard["name"], "it")
        if name in names:
            raise UserError(f"it names the shard {name} twice")
        names.add(name)
        check_row(shard, manifest.get("row"))

def check_row(shard: dict, row: int | None):
    """UserError where a shard of rows has no targets, or another has some."""
    name = shard["name"]
    # read without its targets, padding would be learned
    if ("targets" in shard) != (row is not None):
        raise UserError(f"of row and the targets of {name} it has one without the other")
    if row is None:
        return
    check_entries(shard["targets"], TARGETS_ENTRY, required=tuple(TARGETS_ENTRY))
    if shard["targets"]["name"] != name + TARGETS:
        raise UserError(f"the targets of {name} are not named {name}{TARGETS}")
    if shard["tokens"] % row:
        raise UserError(f"{name} has {shard['tokens']} tokens, which are no rows of {row}")

def load_manifest(data_dir: str, unfinished: bool = False) -> dict | None:
    """The manifest.json of prepare_c4.py, or None where there is none. unfinished: also that of a run which
    was interrupted. UserError for one that is damaged, by the name of the entry."""
    path = os.path.join(data_dir, "manifest.json")
    # a link to nowhere is a damaged manifest, not a folder without one
    if not os.path.lexists(path):
        return None
    try:
        manifest = read_json(path, MANIFEST_LIMIT)
        check_manifest(manifest)
    except UserError as e:
        raise UserError(f"{path} is damaged ({e}): {AGAIN}") from None
    if not manifest["complete"] and not unfinished:
        raise UserError(f"{data_dir} is not finished: run the same prepare_c4.py command again to continue")
    return manifest

def shard_length(data_dir: str, shard: dict) -> int:
    """Tokens of a shard by its file. UserError where its entry in the manifest says something else, or its
    targets are not beside it."""
    name = shard["name"]
    path = os.path.join(data_dir, name)
    tokens = len(read_shard(path))
    # ready-made shards have no manifest, and so no entry
    promised = shard.get("tokens", tokens)
    if tokens != promised:
        raise UserError(f"{name} of {data_dir} has {tokens} tokens, its manifest says {promised}: {AGAIN}")
    if "targets" in shard:
        read_targets(path, tokens)
    return tokens

# --- splits of a folder ---

def split_of_name(name: str) -> str | None:
    """The split that a file's name says in a word of its own, None where it says none. UserError where it
    says both."""
    # words end where letters do, of any script: the "val" of medieval_train.bin is no word, nor is that of
    # festivälval.bin, and shard-7-val_002.bin has one
    words = re.findall(r"[^\W\d_]+", name.lower())
    said = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    if len(said) > 1:
        raise UserError(f"the name {name} says both train and val: give the file a name of one split")
    return said.pop() if said else None

def named_shards(data_dir: str) -> list[dict]:
    """Entries like a manifest's, name and split, for the *.bin files of a folder that has none."""
    try:
        names = sorted(os.listdir(data_dir))
    # a folder that is not there has no shards, which is reported where they are missed
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"cannot read the folder {data_dir}: {e.strerror}") from None
    shards = []
    for name in names:
        # macOS puts ._train_0.bin beside train_0.bin on file systems of others
        if name.startswith(".") or not name.endswith(".bin"):
            continue
        split = split_of_name(name)
        if split:
            shards.append({"name": name, "split": split})
    return shards

def check_disjoint(data_dir: str, shards: list[dict]):
    """UserError where one file is in both splits under two names: it would be trained on and judged by."""
    seen = {}
    for shard in shards:
        path = os.path.join(data_dir, shard["name"])
        # stat follows links; a file that is missing is reported where it is read
        try:
            status = os.stat(path)
        except OSError:
            continue
        identity = status.st_dev, status.st_ino
        other = seen.setdefault(identity, shard)
        if other["split"] != shard["split"]:
            both = f"{other['name']} and {shard['name']} of {data_dir}"
            raise UserError(f"{both} are one file, which cannot be in both splits: remove one of the names")

# --- samples ---

def mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection on uint64 in which each output bit depends on
    all input bits."""
    # the constants are David Stafford's variant 13, as in Java's SplittableRandom
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

class SampleOrder:
    """`SampleOrder(n, seed)[i]`: the i-th sample of an endless sequence of epochs over n samples, i an
    integer or an array of them.

    Each epoch is another permutation of 0 … n - 1: a keyed 6-round Feistel network on the next power of four,
    walked again while the result is not below n. Nothing is stored or replayed: any i can come next."""

    def __init__(self, n: int, seed: int):
        # no UserError: who builds one has counted the samples
        if n < 1:
            raise ValueError(f"an order needs at least one sample, not {n}")
        self.n = n
        self.seed = seed
        bits = (n - 1).bit_length()
        # of the network, whose domain is the next power of four; a half of no bits would mix nothing
        self.half = np.uint64(max(1, (bits + 1) // 2))

    def __getitem__(self, i):
        number = np.atleast_1d(np.asarray(i, dtype=np.int64))
        if (number < 0).any():
            raise IndexError(f"sample numbers start at 0, not {number.min()}")
        epoch, place = np.divmod(number, self.n)
        epoch = epoch.astype(np.uint64)
        place = place.astype(np.uint64)
        # arrays, as overflow of single numbers warns
        seed = np.array([self.seed % 2**64], np.uint64)
        key = mix(epoch + mix(seed))
        sample = self._feistel(place, key)
        outside = sample >= self.n
        # cycle walking (Black & Rogaway 2002): a permutation of the larger domain, walked until it is back
        # below n, is one of 0 … n - 1; the domain is < 4 n, so four rounds on average at most
        while outside.any():
            sample[outside] = self._feistel(sample[outside], key[outside])
            outside = sample >= self.n
        if np.ndim(i) == 0:
            return int(sample[0])
        sample = sample.astype(np.int64)
        return sample.reshape(np.shape(i))

    def _feistel(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        one = np.uint64(1)
        mask = (one << self.half) - one
        left = x >> self.half
        right = x & mask
        # 4 rounds of a good function make a random permutation (Luby & Rackoff 1988); 6 leave a margin
        for r in range(6):
            round_key = key + np.uint64(r << 56)
            scrambled = mix(right + round_key)
            left, right = right, left ^ (scrambled & mask)
        return left << self.half | right

def fingerprint(shards: list[dict], lengths: list[int]) -> str:
    """Identity of a split, which a resumed run must find again; it does not depend on the folder's place."""
    known = []
    # in the manifest's order, as this decides the numbers of the samples
    for shard, tokens in zip(shards, lengths, strict=True):
        entry = [shard["name"], tokens, shard.get("sha256")]
        if "targets" in shard:
            entry.append(shard["targets"]["sha256"])
        known.append(entry)
    text = json.dumps(known)
    return hashlib.sha256(text.encode()).hexdigest()

def of_rows(tokens: np.ndarray, marks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of rows (B, seq_len) int64, of which those marked, (B, seq_len) bool, are targets;
    -1 where there is none."""
    # nothing follows a row's last token
    targets = np.full_like(tokens, -1)
    targets[:, :-1] = np.where(marks[:, 1:], tokens[:, 1:], -1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)

class TokenDataset:
    """The windows, or rows, of one split ("train" or "val") of a folder of shards, checked against its
    manifest.json. Without one the words train, val and validation in the names of *.bin files count.
    UserError for what is missing or damaged, for shards shorter than a window and rows of another length.

    row: whether the samples are rows."""

    def __init__(self, data_dir: str, split: str, seq_len: int):
        assert split in SPLITS and seq_len >= 1, (split, seq_len)
        self.path = data_dir
        self.seq_len = seq_len
        manifest = load_manifest(data_dir)
        shards = self._choose(data_dir, split, manifest)
        lengths = [shard_length(data_dir, shard) for shard in shards]
        self.paths = [os.path.join(data_dir, shard["name"]) for shard in shards]
        row = manifest and manifest.get("row")
        self.row = row is not None
        if self.row:
            self._check_rows(data_dir, split, shards, row)
            samples = [tokens // row for tokens in lengths]
        else:
            if max(lengths) <= seq_len:
                raise self._too_short(data_dir, split, max(lengths))
            # up to each shard's end; a shard's first token is no target
            samples = [max(0, tokens - 1) // seq_len for tokens in lengths]
        self.ends = np.cumsum(samples)
        self.fingerprint = fingerprint(shards, lengths)
        self.tokenizer_sha256 = None
        if manifest:
            tokenizer = manifest.get("tokenizer", {})
            # of the vocabulary, or in older manifests of its file
            self.tokenizer_sha256 = tokenizer.get("identity", tokenizer.get("sha256"))
        self.maps = {}
        self.marks = {}

    @staticmethod
    def _choose(data_dir: str, split: str, manifest: dict | None) -> list[dict]:
        shards = manifest["shards"] if manifest else named_shards(data_dir)
        # of both splits, whichever is asked for: a run opens one before the other
        check_disjoint(data_dir, shards)
        own = [shard for shard in shards if shard["split"] == split]
        if not own:
            raise UserError(f"no {split} shards in {data_dir}: run prepare_c4.py --out_dir {data_dir} first, "
                            f"or give ready-made ones names like {split}_0.bin")
        return own

    def _check_rows(self, data_dir: str, split: str, shards: list[dict], row: int):
        if row != self.seq_len:
            raise UserError(f"{data_dir} has rows of {row} tokens, which are not cut: use --seq_len {row}")
        if not sum(shard["targets"]["tokens"] for shard in shards):
            raise UserError(f"no row of the {split} split of {data_dir} has a target, its prompts fill them: "
                            "prepare it again with a larger --rows")

    def _too_short(self, data_dir: str, split: str, longest: int) -> UserError:
        needed = self.seq_len + 1
        found = f"the longest {split} shard of {data_dir} has {longest} tokens, a window needs {needed}"
        # a token and its target are the smallest window
        if longest < 2:
            return UserError(f"{found} (--seq_len and one): prepare more text")
        return UserError(f"{found}: use --seq_len {longest - 1} or less, or prepare more text")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def check_tokenizer(self, tokenizer, data_dir: str, ckpt: str):
        """UserError for shards of another vocabulary than the model in `ckpt` has."""
        # ready-made shards have no manifest that says so: then only their ids can tell
        made_with = self.tokenizer_sha256
        if made_with is not None and not tokenizer.matches(made_with):
            raise UserError(f"{data_dir} was made with another tokenizer than {ckpt} has: prepare the text "
                            f"again with prepare_c4.py --tokenizer {ckpt}")

    def check_ids(self, vocab_size: int):
        """Read every token once: an id outside the vocabulary is a UserError."""
        for path in self.paths:
            tokens = read_shard(path)
            if self.row:
                self._check_marks(path, len(tokens))
            # in pieces, so that a shard larger than the memory can be read
            for start in range(0, len(tokens), PIECE):
                piece = tokens[start:start + PIECE]
                largest = int(piece.max())
                release(tokens)
                if largest >= vocab_size:
                    raise UserError(f"{path} holds token {largest}, the last is {vocab_size - 1}: it was "
                                    "made with another tokenizer; prepare it again")

    def _check_marks(self, path: str, tokens: int):
        marks = read_targets(path, tokens)
        largest = int(marks.max(initial=0))
        # nothing stands before it that could predict it
        first = int(marks[::self.seq_len].max(initial=0))
        release(marks)
        if largest > 1 or first > 0:
            raise UserError(f"{path}{TARGETS} is damaged (a mark is 0 or 1, at first 0): {AGAIN}")

    def targets(self, samples) -> np.ndarray:
        """How many targets each sample has: an array of the shape of `samples`."""
        samples = np.asarray(samples)
        if not self.row:
            return np.full(samples.shape, self.seq_len)
        # read anew in each update, 256 bytes a row: to count all at the start would read a third of the text
        marks = self._gather(samples.ravel(), self._marks, self.seq_len, np.uint8)
        return marks.sum(1, dtype=np.int64).reshape(samples.shape)

    def samples_for(self, targets: int) -> int:
        """How many of the first samples have no more than so many targets together."""
        if not self.row:
            return targets // self.seq_len
        samples = 0
        for shard in range(len(self.paths)):
            marks = self._marks(shard)
            counts = marks.reshape(-1, self.seq_len).sum(1, dtype=np.int64)
            release(marks)
            fitting = int(np.searchsorted(counts.cumsum(), targets, side="right"))
            samples += fitting
            if fitting < len(counts):
                break
            targets -= int(counts.sum())
        return samples

    def batch(self, samples, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Samples as inputs and targets, two int64 tensors of shape (len(samples), seq_len), -1 where there
        is no target. To a GPU they go from pinned memory, for which neither side waits."""
        samples = np.asarray(samples)
        halves = self._rows(samples) if self.row else self._windows(samples)
        # a copy from pageable memory would wait for all that the GPU has still to do
        if torch.device(device).type == "cuda":
            return tuple(half.contiguous().pin_memory().to(device, non_blocking=True) for half in halves)
        return tuple(half.to(device) for half in halves)

    def _windows(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        window = torch.from_numpy(self._gather(samples, self._tokens, self.seq_len + 1, np.int64))
        # the targets are the inputs moved by one
        return window[:, :-1], window[:, 1:]

    def _rows(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._gather(samples, self._tokens, self.seq_len, np.int64)
        marks = self._gather(samples, self._marks, self.seq_len, np.uint8)
        return of_rows(tokens, marks > 0)

    def _gather(self, samples: np.ndarray, load, reach: int, dtype) -> np.ndarray:
        """What load(shard) holds from the start of each sample on, (len(samples), reach)."""
        pieces = np.empty((len(samples), reach), dtype)
        shards = np.searchsorted(self.ends, samples, side="right")
        # the number of each shard's first sample
        first = np.concatenate([[0], self.ends])
        starts = (samples - first[shards]) * self.seq_len
        # Python's numbers index an array twice as fast as numpy's
        places = zip(shards.tolist(), starts.tolist(), strict=True)
        for piece, (shard, start) in enumerate(places):
            pieces[piece] = load(shard)[start:start + reach]
        # resident memory would grow with the tokens read: a page stays until somebody asks for its room
        for shard in set(shards.tolist()):
            release(load(shard))
        return pieces

    def _tokens(self, shard: int) -> np.ndarray:
        # kept: opening and checking a shard costs more than reading a window of it
        if shard not in self.maps:
            self.maps[shard] = read_shard(self.paths[shard])
        return self.maps[shard]

    def _marks(self, shard: int) -> np.ndarray:
        if shard not in self.marks:
            self.marks[shard] = read_targets(self.paths[shard], len(self._tokens(shard)))
        return self.marks[shard]
