"""Turn text into token shards: C4 from the Hugging Face hub, local files, or the text inside Python's
library.

    python prepare_c4.py                                                # enough of C4 for the 60m run
    python prepare_c4.py --input 'my/*.jsonl.gz' --tokenizer train:8192
    python prepare_c4.py --input book.txt --tokenizer byte --out_dir data/book
    python prepare_c4.py --input builtin --tokenizer byte --out_dir data/builtin     # no network, no file
    python prepare_c4.py --input chats.jsonl --rows 256    # a prompt and its completion a line and a row

The same command continues an interrupted run. The output depends on the text and the flags alone, not on
--workers: documents are written in the order of their positions (source, number), shards end with a whole
document, and the manifest records the position that each finished shard reached.

A document is a JSON line, a row of Parquet, or about a page of a .txt: cut at the first blank line after
2,000 bytes.

Without --val_input a hash of each document decides its split. Where that leaves a split empty, as in a single
document, the end of the text is validation: between a tenth and a fifth of it, cut at the end of a document,
a line or a word. A file that both --input and --val_input match is validation only."""
import bisect
import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import rustbpe
from tqdm import tqdm

from nanolost.cores import usable_cores
from nanolost.data import SPLITS, TARGETS, ShardWriter, TargetsWriter, load_manifest, shard_length
from nanolost.documents import (
    HUB,
    HUB_PATTERN,
    PACKED,
    Documents,
    Pair,
    builtin_text,
    expand,
    identity,
    place,
    text_of,
)
from nanolost.errors import UserError
from nanolost.files import claim, sha256_file, write_atomic
from nanolost.flags import command, flag, parse
from nanolost.rows import Encoded, Rows, Stream
from nanolost.tokenizer import GPT2_PATTERN, Tokenizer

C4 = {
    "val": [f"hf://allenai/c4/en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)],
    "train": [f"hf://allenai/c4/en/c4-train.{i:05d}-of-01024.json.gz" for i in range(1024)],
}
# of one train file, roughly
C4_FILE = {"tokens": 150e6, "documents": 356_317, "bytes": 320e6}
SHARD_FILES = [f"{split}_[0-9]*.bin{ending}" for split in SPLITS for ending in ("", TARGETS)]
# without validation files one document in 50 is validation
VAL_SHARE = 50
# what train:N reads at the most: the merges of 32,000 ids hardly change beyond
BPE_CHARACTERS = 500_000_000
# characters that a worker tokenizes at once: some 50 ms, so that handing them over costs nothing
BATCH = 1 << 20
# batches a worker on their way: enough that none waits, and memory stays bounded
AHEAD = 4
# flags that manifests of earlier versions do not know
LATER_FLAGS = ("rows", "text_key")

@dataclass
class Config:
    out_dir: str = flag("data/c4", "where the shards go", path=True)
    train_tokens: int = flag(1_320_000_000, "stop once reached; the default is one epoch of the 60m run")
    val_tokens: int = flag(10_000_000, "stop once reached; in rows targets are counted, not padding")
    input: list[str] | None = flag(None, "GLOBs of files instead of C4: .json, .jsonl (lines with a text "
                                   "key) or .txt, each also with .gz or .zst; .parquet; files of the hub, "
                                   f"{HUB_PATTERN}; or builtin, text of Python's library",
                                   path=True)
    val_input: list[str] | None = flag(None, "files for validation, left out of --input; else a hash of each "
                                       "document decides, or its place in a text of few documents",
                                       path=True)
    tokenizer: str = flag("gpt2", "gpt2, byte, train:N (a BPE of N ids), a Hugging Face folder, a "
                          "tokenizer.json or a .tiktoken file", path=True)
    split_pattern: str | None = flag(None, "regular expression that cuts a text before merging, for a "
                                     ".tiktoken file that is not OpenAI's")
    rows: int | None = flag(None, "one document a row of so many tokens, cut or padded; prompts of JSON "
                                  "lines with prompt and completion are read and not learned")
    text_key: str = flag("text", "field of JSON lines and Parquet that holds the text")
    shard_tokens: int = flag(100_000_000, "most tokens of a shard")
    workers: int = flag(usable_cores(), "tokenizer threads; the output does not depend on it")
    skip_bad: bool = flag(False, "skip lines that are not documents, and count them, instead of stopping")
    verify: bool = flag(False, "compare the files of --out_dir with their manifest, and exit")

# --- which sources ---

def choose_sources(config: Config, hub: dict) -> dict[str, list[str]]:
    """Sources by stream: "val" and "train", or "both" where the text itself decides the split. hub: what is
    known of patterns of the hub, and gets to be."""
    if not config.input and not config.val_input:
        return C4
    train = expand(config.input, hub) if config.input else C4["train"]
    if not config.val_input:
        return {"both": train}
    val = expand(config.val_input, hub)
    held_out = {place(name) for name in val}
    shared = [name for name in train if place(name) in held_out]
    # no text may be in both: losses of validation would be those of text learned by heart
    train = [name for name in train if name not in shared]
    if not train:
        raise UserError("--val_input names every file of --input: nothing is left to train on; give other "
                        "files, or leave --val_input away")
    if shared:
        print(f"validation only, as --val_input names it: {', '.join(shared)}", flush=True)
    return {"val": val, "train": train}

def known_of_hub(out_dir: str) -> dict:
    """The files of the hub that a run began with, by pattern: the same command needs no network for them."""
    manifest = load_manifest(out_dir, unfinished=True) or {}
    known = manifest.get("hub", {})
    listings = known.values() if isinstance(known, dict) else [None]
    for listing in listings:
        good = isinstance(listing, dict) and isinstance(listing.get("repository"), str)
        if not good or not isinstance(listing.get("files"), list):
            raise UserError(f"the entry hub of {out_dir}/manifest.json is damaged: use another --out_dir")
    return dict(known)

def documents_of(config: Config, sources: list[str], manifest: dict) -> Documents:
    return Documents(sources, manifest, config.text_key, config.rows is not None, config.skip_bad)

# --- splits ---

def split_of(text: str) -> str:
    """The split of a document by a hash of its text: the same in every run and for every order of files."""
    # Python's own hash() differs between processes
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"

def divided(documents, stream: str, held_out: list[int] | None = None):
    """(position, split, document) of each: the stream's split, or for "both" by position from `held_out` (see
    `choose_held_out`) on, else by hash."""
    for position, document in documents:
        if stream != "both":
            yield position, stream, document
        elif held_out is None:
            yield position, split_of(text_of(document)), document
        elif position != tuple(held_out[:2]):
            yield position, "train" if position < tuple(held_out[:2]) else "val", document
        else:
            # the document that the cut goes through; nothing of it is train where it is cut at its start
            characters = held_out[2]
            if characters:
                yield position, "train", document[:characters]
                document = document[characters:]
            yield position, "val", document

def choose_held_out(config: Config, sources: list[str], manifest: dict) -> list[int] | None:
    """None where the hash gives documents to both splits. Else (source, number, characters): validation is
    what follows the first `characters` of that document."""
    seen = set()
    # lengths add up in characters: tokens are not known before train:N has its vocabulary
    positions = []
    starts = [0]
    pairs = False
    for position, document in documents_of(config, sources, manifest).read():
        text = text_of(document)
        pairs = pairs or isinstance(document, Pair)
        seen.add(split_of(text))
        # after some 50 documents: a large text is not read twice
        if len(seen) == 2:
            return None
        positions.append(position)
        starts.append(starts[-1] + len(text))
    total = starts.pop()
    if total < 2:
        raise UserError(f"the input holds {total} characters: train and val need at least one each, and a "
                        "training run --seq_len + 1 tokens of each; give more --input")
    # nanoGPT holds out a tenth of tiny Shakespeare; up to a fifth where that spares a document or a line
    latest = total * 9 // 10
    earliest = total * 8 // 10
    # the last document that starts before `latest`: either in the range, or it covers all of it
    last = bisect.bisect_right(starts, latest) - 1
    characters = 0
    # half a pair would be a completion without its prompt
    if pairs and starts[last] < earliest:
        last = min(last + 1, len(starts) - 1)
        if last == 0:
            raise UserError("the input is one prompt with its completion, and train and val need at least "
                            "one each: give more --input")
    elif starts[last] < earliest:
        reading = documents_of(config, sources, manifest).read(positions[last][0])
        text = next(document for position, document in reading if position == positions[last])
        characters = cut_between(text, earliest - starts[last], latest - starts[last])
    share = (total - starts[last] - characters) / total
    print(f"few documents ({len(positions):,}), which a hash puts all into one split: the last {share:.0%} "
          "of the text are validation instead", flush=True)
    return [*positions[last], characters]

def cut_between(text: str, earliest: int, latest: int) -> int:
    """The last end of a line in text[earliest:latest], of a word where no line ends, else `latest`."""
    for mark in "\n", " ":
        found = text.rfind(mark, earliest, latest)
        if found >= 0:
            return found + 1
    return latest

# --- tokens ---

def trained_size(config: Config) -> int | None:
    """N of --tokenizer train:N. None for a tokenizer that need not be trained."""
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train" or not size.isdecimal():
        return None
    # 256 bytes and end-of-text at least; the largest vocabularies of today have 2**18 ids
    if not 257 <= int(size) <= 2**20:
        raise UserError(f"--tokenizer {config.tokenizer}: from 257 (256 bytes and end-of-text) to {2**20:,}")
    return int(size)

def choose_tokenizer(config: Config, streams: dict[str, list[str]], manifest: dict) -> Tokenizer:
    """The tokenizer that --tokenizer names; train:N is trained by rustbpe on the training documents."""
    size = trained_size(config)
    if size is None:
        return Tokenizer.named(config.tokenizer, config.split_pattern)
    print(f"training a tokenizer of {size} ids", flush=True)
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(training_texts(config, streams, manifest), size - 1, pattern=GPT2_PATTERN)
    # rustbpe counts the 256 bytes among its ids, but not end-of-text
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda entry: entry[1])
    if len(ranks) < size - 1:
        raise UserError(f"--tokenizer {config.tokenizer}: this text yields only {len(ranks) + 1} ids: "
                        f"use train:{len(ranks) + 1}, or byte, or give more text")
    return Tokenizer.of([bytes(token) for token, _ in ranks], name=config.tokenizer)

def training_texts(config: Config, streams: dict[str, list[str]], manifest: dict):
    """The training documents from the first on, until BPE_CHARACTERS were read."""
    # never validation text: its bits per byte would be too good
    stream = "both" if "both" in streams else "train"
    documents = documents_of(config, streams[stream], manifest).read()
    left = BPE_CHARACTERS
    for _, split, document in divided(documents, stream, manifest["held_out"]):
        text = text_of(document)
        left -= len(text)
        if left < 0:
            return
        if split == "train":
            yield text

def encode_all(encode: Stream | Rows, documents: list) -> list[Encoded]:
    return [encode(document) for document in documents]

def batches(documents):
    """Lists of documents, each of about BATCH characters of text."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(text_of(document[2]))
        if size > BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch

def encoded(documents, encode: Stream | Rows, pool: ThreadPoolExecutor, workers: int):
    """(position, split, Encoded) of each document, in order. Threads: tiktoken lets go of the interpreter's
    lock, and processes would spend more on handing texts over than on tokenizing them."""
    waiting = collections.deque()
    # None: no batch follows, empty the queue
    for batch in itertools.chain(batches(documents), [None]):
        if batch:
            bare = [document for _, _, document in batch]
            waiting.append((batch, pool.submit(encode_all, encode, bare)))
        # the oldest first, whoever was ready before: the order of documents is that of the sources
        while len(waiting) > (AHEAD * workers if batch else 0):
            done, future = waiting.popleft()
            for (position, split, _), result in zip(done, future.result(), strict=True):
                yield position, split, result

# --- shards ---

class SplitWriter:
    """The shards of one split. Each ends with a whole document; closing one enters it in the manifest."""

    def __init__(self, config: Config, split: str, manifest: dict):
        own = [shard for shard in manifest["shards"] if shard["split"] == split]
        self.config = config
        self.split = split
        self.manifest = manifest
        self.limit = getattr(config, f"{split}_tokens")
        self.number = len(own)
        # of rows that are judged by, what counts is targets
        self.counts_targets = config.rows is not None and split == "val"
        self.total = sum(self.counted(shard) for shard in own)
        self.shard = None
        self.targets = None
        # position of the last document of a closed shard: a run continues behind it
        self.reached = tuple(manifest["reached"].get(split, (0, -1)))

    def counted(self, shard: dict) -> int:
        return shard["targets"]["tokens"] if self.counts_targets else shard["tokens"]

    def done(self) -> bool:
        return self.total >= self.limit

    def wants(self, position) -> bool:
        return not self.done() and position > self.reached

    def append(self, position, document: Encoded):
        size = len(document.tokens)
        # a document longer than a shard gets one of its own
        if self.shard and self.shard.tokens + size > self.config.shard_tokens:
            self.close()
        if not self.shard:
            self.open(document)
        self.shard.append(document.tokens)
        # beside each shard of rows, in step with it
        if self.targets:
            self.targets.append(document.targets)
        self.bytes += document.text_bytes
        self.text_tokens += document.text_tokens
        self.documents += 1
        self.total += int(document.targets.sum()) if self.counts_targets else size
        self.last = position

    def open(self, document: Encoded):
        path = os.path.join(self.config.out_dir, f"{self.split}_{self.number:05d}.bin")
        self.shard = ShardWriter(path, document.tokens.dtype)
        self.targets = None if document.targets is None else TargetsWriter(path)
        self.bytes = 0
        self.text_tokens = 0
        self.documents = 0

    def close(self):
        if not self.shard:
            return
        self.shard.close()
        entry = {
            "name": os.path.basename(self.shard.path),
            "split": self.split,
            "tokens": self.shard.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self.shard.sha256,
        }
        # a shard without its targets would train on prompts and padding: both are there before the entry is
        if self.targets:
            self.targets.close()
            entry["text_tokens"] = self.text_tokens
            entry["targets"] = {
                "name": os.path.basename(self.targets.path),
                "tokens": self.targets.count,
                "sha256": self.targets.sha256,
            }
        self.manifest["shards"].append(entry)
        # shard and position go into one file at once: there is no moment at which they disagree
        self.manifest["reached"][self.split] = self.last
        self.number += 1
        self.shard = None
        save_manifest(self.config.out_dir, self.manifest)

def write_stream(config: Config, stream: str, documents: Documents, writers: dict, encode, bar):
    """Encode and write the documents of one stream, until its splits have their tokens or it ends."""
    own = list(writers.values()) if stream == "both" else [writers[stream]]
    # finished before an interruption: not to be read again
    if all(writer.done() for writer in own):
        return
    # with "both" the slower split decides where reading starts; the other passes over what it has
    reading = documents.read(min(writer.reached[0] for writer in own))
    divisions = divided(reading, stream, documents.manifest["held_out"])
    wanted = (entry for entry in divisions if writers[entry[1]].wants(entry[0]))
    pool = ThreadPoolExecutor(config.workers)
    try:
        for position, split, document in encoded(wanted, encode, pool, config.workers):
            # its split may have filled up since it was read
            if not writers[split].done():
                writers[split].append(position, document)
                bar.update(len(document.tokens))
            if all(writer.done() for writer in own):
                break
    finally:
        # nobody wants the batches that were read ahead
        pool.shutdown(cancel_futures=True)
    for writer in own:
        writer.close()

# --- the manifest ---

def save_manifest(out_dir: str, manifest: dict):
    write_atomic(os.path.join(out_dir, "manifest.json"), json.dumps(manifest, indent=1).encode())

def begin(config: Config, streams: dict[str, list[str]], hub: dict) -> dict:
    """The manifest to continue, or a new one. UserError if out_dir holds shards made by other flags or from
    other text, or files that are not ours."""
    # what the output depends on: neither --workers nor --skip_bad, which a person adds after an error
    request = {"tokenizer": config.tokenizer, "split_pattern": config.split_pattern,
               "train_tokens": config.train_tokens, "input": streams,
               "val_tokens": config.val_tokens, "shard_tokens": config.shard_tokens}
    # absent where it is the default, as in manifests of earlier versions
    for name in LATER_FLAGS:
        if getattr(config, name) != getattr(Config, name):
            request[name] = getattr(config, name)
    local = [s for s in itertools.chain(*streams.values()) if not s.startswith(HUB)]
    sources = {source: identity(source) for source in local}
    # before the first download: the list of files is of this commit
    revisions = {listing["repository"]: listing["commit"] for listing in hub.values()}
    new = {"version": 1, "complete": False, "request": request, "sources": sources, "revisions": revisions,
           "held_out": None, "shards": [], "reached": {}}
    if config.rows:
        new["row"] = config.rows
    if hub:
        new["hub"] = hub
    old = load_manifest(config.out_dir, unfinished=True)
    if old is None:
        refuse_foreign(config.out_dir)
        return new
    check_fields(old, config.out_dir)
    change = difference(old, new, config.out_dir)
    # a try that wrote no shard binds nobody; one that goes on as it began keeps its tokenizer
    if not old["shards"] and (change or "sources" not in old):
        return new
    # half of one text and half of another would be called complete
    if change:
        raise UserError(f"{change}; or delete {config.out_dir} and begin again")
    # a shard that was cut or deleted meanwhile is found now, and not by the training run
    for shard in old["shards"]:
        shard_length(config.out_dir, shard)
    # some are absent from manifests of earlier versions; the order of entries stays that of `new`
    return {**new, **old, "sources": sources}

def refuse_foreign(out_dir: str):
    """UserError where a new run would overwrite files that it has not made: the tokenizer.json of a model,
    shards from elsewhere."""
    folder = glob.escape(out_dir)
    for name in "tokenizer.json", *SHARD_FILES:
        for path in glob.glob(os.path.join(folder, name)):
            raise UserError(f"{path} is in the way and no manifest.json says that it was made here: use "
                            "another --out_dir")

def check_fields(manifest: dict, out_dir: str):
    """UserError for a manifest that has other fields or types than `begin` gives it."""
    where = os.path.join(out_dir, "manifest.json")
    request = manifest.get("request")
    reached = manifest.get("reached")
    good = isinstance(request, dict) and isinstance(request.get("input"), dict) and isinstance(reached, dict)
    good = good and all(is_integers(position, 2) for position in reached.values())
    held_out = manifest.get("held_out")
    good = good and (held_out is None or is_integers(held_out, 3))
    # a finished run has made at least two
    good = good and (manifest["shards"] or not manifest["complete"])
    for name in "sources", "revisions":
        good = good and isinstance(manifest.get(name, {}), dict)
    # no "delete the folder": the manifest.json of a checkpoint looks like this too
    if not good:
        raise UserError(f"{where} is damaged, or not one of prepare_c4.py: use another --out_dir")

def is_integers(value, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int) for v in value)

def difference(old: dict, new: dict, out_dir: str) -> str:
    """What a run asks for that the one before did not, with the repair; empty where they agree."""
    for name in (*new["request"], *LATER_FLAGS):
        if old["request"].get(name) != new["request"].get(name):
            return (f"{out_dir} was begun with another --{name}: use the same as in its manifest.json, or "
                    "another --out_dir")
    for source in used_sources(old):
        # manifests of earlier versions have no sources
        before = old.get("sources", {}).get(source)
        if before is not None and before != new["sources"][source]:
            return (f"{source} has changed since {out_dir} was begun from it (size or modification time): "
                    "put the old one back, or use another --out_dir")
    return ""

def used_sources(manifest: dict) -> list[str]:
    """The sources that shards were made from. Those behind may still be mended."""
    used = []
    reached = manifest["reached"]
    for stream, sources in manifest["request"]["input"].items():
        splits = SPLITS if stream == "both" else [stream]
        # -1: none of this stream
        last = max(reached[split][0] if split in reached else -1 for split in splits)
        # where the cut lies follows from the length of the whole text
        everything = manifest.get("held_out") is not None
        used += sources if everything else sources[:last + 1]
    return used

# --- the command ---

def verify(out_dir: str):
    """Compare every file with the manifest; UserError names the first that differs."""
    manifest = load_manifest(out_dir)
    if manifest is None:
        raise UserError(f"no manifest.json in {out_dir}: nothing to verify against")
    digests = {shard["name"]: shard.get("sha256") for shard in manifest["shards"]}
    # a flipped mark is a prompt that is learned
    targets = [shard["targets"] for shard in manifest["shards"] if "targets" in shard]
    digests |= {entry["name"]: entry["sha256"] for entry in targets}
    digests["tokenizer.json"] = manifest.get("tokenizer", {}).get("sha256")
    if not manifest["shards"] or None in digests.values():
        raise UserError(f"the manifest.json of {out_dir} names no shards, or one without sha256: it is not "
                        "one of prepare_c4.py")
    for name, digest in tqdm(digests.items()):
        path = os.path.join(out_dir, name)
        found = None
        # missing, or no regular file
        with contextlib.suppress(OSError):
            found = sha256_file(path)
        if found != digest:
            raise UserError(f"{path} is not what its manifest says: delete {out_dir} and prepare it again")
    print(f"{out_dir}: {len(manifest['shards'])} shards and the tokenizer are as the manifest says")

def readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

def plan(config: Config, sources: list[str]):
    """Say what will be read and written, and refuse where the disk has no room for it."""
    # the most that can come out; less text gives less
    tokens = config.train_tokens + config.val_tokens
    download = 0
    if config.input is None:
        held = C4_FILE["documents"] * config.rows if config.rows else C4_FILE["tokens"]
        files = -(-config.train_tokens // held)
        download = files * C4_FILE["bytes"]
        print(f"about {readable(download)} to download into the hub's cache", flush=True)
    elif any(source.startswith(HUB) for source in sources):
        print("files of the hub are downloaded into its cache as they are read", flush=True)
    else:
        tokens = min(tokens, tokens_in(sources, config))
    # a byte more beside each token of a row; a megabyte more for the tokenizer and the manifest
    shards = (3 if config.rows else 2) * tokens + 1e6
    # of the file system that holds the folder; the hub's cache is mostly on the same
    free = shutil.disk_usage(config.out_dir).free
    print(f"about {tokens:,.0f} tokens at the most, {readable(shards)} to write into {config.out_dir}, "
          f"{readable(free)} free there", flush=True)
    if shards + download > free:
        raise UserError(f"{readable(shards + download)} are needed, {readable(free)} are free: make room, or "
                        "use another --out_dir (and HF_HOME, the hub's cache) or fewer --train_tokens")

def tokens_in(sources: list[str], config: Config) -> int:
    """Tokens that local sources hold at the most, roughly."""
    text = 0
    for source in sources:
        size = len(builtin_text()) if source == "builtin" else os.path.getsize(source)
        # gzip and its like shrink text to about a third
        text += size * (3 if source.endswith((*PACKED, ".parquet")) else 1)
    # a row is mostly padding where documents are a line, say of 50 bytes
    if config.rows:
        return text // 50 * config.rows
    # with a trained vocabulary some 4 bytes make a token
    return text // (1 if config.tokenizer == "byte" else 4)

def check_flags(config: Config):
    for name in "train_tokens", "val_tokens", "shard_tokens", "workers":
        value = getattr(config, name)
        # llm.c's header counts a shard's tokens in an int32
        if value < 1 or name == "shard_tokens" and value >= 2**31:
            raise UserError(f"--{name} {value}: must be positive, shards below 2**31 tokens")
    # None is no number: documents one after another
    if config.rows is not None and not 2 <= config.rows <= config.shard_tokens:
        raise UserError(f"--rows {config.rows}: a row has a token and its target, and fits into a shard of "
                        f"--shard_tokens {config.shard_tokens}")
    if config.split_pattern and not config.tokenizer.endswith(".tiktoken"):
        raise UserError("--split_pattern is for a .tiktoken file: every other --tokenizer has its own")

def remove_leftovers(out_dir: str):
    """Delete the temporary files of an interrupted run, and no others."""
    folder = glob.escape(out_dir)
    for name in "manifest.json", "tokenizer.json", *SHARD_FILES:
        for path in glob.glob(os.path.join(folder, f"{name}.tmp")):
            os.remove(path)

def the_tokenizer(config: Config, streams: dict[str, list[str]], manifest: dict) -> Tokenizer:
    """The tokenizer that the run began with, or a new one, saved and entered in the manifest."""
    path = os.path.join(config.out_dir, "tokenizer.json")
    if "tokenizer" in manifest:
        digest = manifest["tokenizer"]["sha256"]
        if not os.path.exists(path) or sha256_file(path) != digest:
            raise UserError(f"{path} is not what {config.out_dir} began with: delete both")
        return Tokenizer.load(path)
    tokenizer = choose_tokenizer(config, streams, manifest)
    tokenizer.save(path)
    # of a foreign one: chat template and roles of special tokens, which a model that is trained here inherits
    for name, data in tokenizer.files_beside.items():
        write_atomic(os.path.join(config.out_dir, name), data)
    manifest["tokenizer"] = {
        "name": config.tokenizer,
        "sha256": sha256_file(path),
        "identity": tokenizer.identity(),
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        # ids that each document begins with
        "start": tokenizer.start,
    }
    save_manifest(config.out_dir, manifest)
    return tokenizer

def prepare(config: Config, streams: dict[str, list[str]], manifest: dict):
    """Write the shards that the manifest still lacks."""
    plan(config, [source for sources in streams.values() for source in sources])
    remove_leftovers(config.out_dir)
    # once shards are made, what is held out stays as it was
    if "both" in streams and not manifest["shards"]:
        manifest["held_out"] = choose_held_out(config, streams["both"], manifest)
    # with its manifest the folder is ours, before anything else stands in it
    if manifest != load_manifest(config.out_dir, unfinished=True):
        save_manifest(config.out_dir, manifest)
    tokenizer = the_tokenizer(config, streams, manifest)
    encode = Rows(tokenizer, config.rows) if config.rows else Stream(tokenizer)
    writers = {split: SplitWriter(config, split, manifest) for split in SPLITS}
    begun = sum(writer.total for writer in writers.values())
    with tqdm(unit=" tokens", unit_scale=True, initial=begun) as bar:
        for stream, sources in streams.items():
            documents = documents_of(config, sources, manifest)
            write_stream(config, stream, documents, writers, encode, bar)
            if documents.skipped:
                print(f"skipped {documents.skipped} bad lines", file=sys.stderr)
    # a source without documents is an error, and both splits are known to get some
    for split, writer in writers.items():
        assert writer.total, f"no document for {split}"
    manifest["complete"] = True
    save_manifest(config.out_dir, manifest)
    counts = [f"{w.total:,} {split} tokens in {w.number} shards" for split, w in writers.items()]
    print(f"{config.out_dir}: {', '.join(counts)}")

def main(config: Config):
    if config.verify:
        return verify(config.out_dir)
    check_flags(config)
    trained_size(config)
    # nothing is written before every file that was named is known to be there
    hub = known_of_hub(config.out_dir)
    streams = choose_sources(config, hub)
    manifest = begin(config, streams, hub)
    if not manifest["complete"]:
        with claim(config.out_dir, "prepares text"):
            # again: whoever held the lock until now has written
            manifest = begin(config, streams, hub)
            if not manifest["complete"]:
                return prepare(config, streams, manifest)
    print(f"{config.out_dir} is complete: {len(manifest['shards'])} shards")

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
