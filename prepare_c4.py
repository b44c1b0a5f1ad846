"""Turn text into token shards: C4 from the Hugging Face hub, local files, or the text inside Python's
library.

    python prepare_c4.py                                                # enough of C4 for the 60m run
    python prepare_c4.py --input 'my/*.jsonl.gz' --tokenizer train:8192
    python prepare_c4.py --input builtin --tokenizer byte --out_dir data/builtin     # no network, no file

The same command continues an interrupted run. The output depends on the text and the flags alone, not on
--workers: documents are written in the order of their positions (source, number), shards end with a whole
document, and the manifest records the position that each finished shard reached."""
import collections
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import huggingface_hub
import numpy as np
import rustbpe
from tqdm import tqdm

from nanolost.data import ShardWriter, load_manifest, shard_length, token_dtype
from nanolost.files import sha256_file, write_atomic
from nanolost.flags import command, flag, parse
from nanolost.tokenizer import GPT2_PATTERN, Tokenizer

C4 = {"val": [f"hf://allenai/c4/en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)],
      "train": [f"hf://allenai/c4/en/c4-train.{i:05d}-of-01024.json.gz" for i in range(1024)]}
C4_FILE = {"tokens": 150e6, "bytes": 320e6}    # of one train file, roughly
VAL_SHARE = 50                                 # without validation files one document in 50 is validation
BPE_CHARACTERS = 500_000_000                   # that train:N reads at the most: enough for stable merges

@dataclass
class Config:
    out_dir: str = flag("data/c4", "where the shards go")
    train_tokens: int = flag(1_320_000_000, "stop once reached; the default is one epoch of the 60m run")
    val_tokens: int = flag(10_000_000, "stop once reached")
    input: list[str] | None = flag(None, "GLOBs of files instead of C4: .json, .jsonl (lines with a text "
                                   "key) or .txt, each also with .gz; or builtin, text of Python's library")
    val_input: list[str] | None = flag(None, "files for validation; else a hash of each document decides")
    tokenizer: str = flag("gpt2", "gpt2, byte, train:N (a BPE of N ids), a tokenizer.json or .tiktoken file")
    shard_tokens: int = flag(100_000_000, "most tokens of a shard")
    workers: int = flag(os.cpu_count(), "tokenizer processes; the output does not depend on it")
    skip_bad: bool = flag(False, "skip lines that are not documents, and count them, instead of stopping")
    verify: bool = flag(False, "compare the files of --out_dir with their manifest, and exit")

# --- documents ---

def expand(patterns: list[str]) -> list[str]:
    """The files that the patterns name, sorted, each once; "builtin" stands for itself."""
    names = set()
    for p in patterns:
        found = [p] if p == "builtin" or os.path.exists(p) else glob.glob(p, recursive=True)
        if not found:
            raise ValueError(f"no file matches {p}: look at the path, and quote patterns")
        names.update(found)
    return sorted(names)

def fetch(source: str) -> str:
    """Path of a source on this machine; a file of the hub is downloaded into its cache, once."""
    if not source.startswith("hf://"):
        return source
    owner, name, file = source.removeprefix("hf://").split("/", 2)
    try:
        return huggingface_hub.hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except Exception as e:                     # of many kinds: no network, no such host, a full disk
        raise ValueError(f"cannot download {source} ({type(e).__name__}): check the network and run again to "
                         "continue, or give local files by --input") from None

class Documents:
    """All documents of some sources, in order. skip_bad: count lines that are not documents in `skipped`."""

    def __init__(self, sources: list[str], skip_bad: bool = False):
        self.sources, self.skip_bad, self.skipped = sources, skip_bad, 0

    def split(self, stream: str, first: int = 0):
        """(position, split, text) from source number `first` on; split is `stream`, or by hash for "both"."""
        for s in range(first, len(self.sources)):
            number = -1
            for number, text in enumerate(self._texts(fetch(self.sources[s]))):
                yield (s, number), split_of(text) if stream == "both" else stream, text
            if number < 0:
                raise ValueError(f"{self.sources[s]} holds no document: remove it from the input")

    def _texts(self, path: str):
        kind = "txt" if path == "builtin" else path.removesuffix(".gz").rpartition(".")[2]
        if kind not in ("json", "jsonl", "txt"):
            raise ValueError(f"{path}: the kinds of input are .json, .jsonl and .txt, each also with .gz")
        lines = enumerate(self._lines(path), 1)
        for number, raw in pieces(lines) if kind == "txt" else lines:
            try:
                if kind == "txt" or raw.strip():
                    text = raw.decode() if kind == "txt" else json.loads(raw.decode())["text"]
                    text.encode()              # half a surrogate pair may come out of a JSON escape
                    yield text
            except UnicodeError as e:
                self._bad(path, number + raw.count(b"\n", 0, e.start), "is not UTF-8")
            except KeyError:
                self._bad(path, number, 'has no "text" key')
            except (ValueError, TypeError, AttributeError, RecursionError):
                self._bad(path, number, 'is not a JSON object whose "text" is a string')

    def _lines(self, path: str):
        number = 0
        try:
            if path == "builtin":
                from pydoc_data.topics import topics
                yield from ("\n\n".join(topics[name] for name in sorted(topics))).encode().splitlines(True)
                return
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
                for number, line in enumerate(f, 1):                       # noqa: B007
                    yield line
        except (OSError, EOFError, zlib.error) as e:
            self._bad(path, number + 1, f"cannot be read ({e})")

    def _bad(self, path: str, number: int, fault: str):
        if not self.skip_bad:
            raise ValueError(f"{path}:{number}: {fault}; mend or remove it, or say --skip_bad true")
        self.skipped += 1

def pieces(lines):
    """Text without documents, cut at the first blank line after 2,000 bytes or any after 100,000: (its first
    line's number, bytes)."""
    piece, first = b"", 1
    for number, line in lines:
        piece += line
        if len(piece) > 2_000 and not line.strip() or len(piece) > 100_000:
            yield first, piece
            piece, first = b"", number + 1
    if piece:
        yield first, piece

def split_of(text: str) -> str:
    """The split of a document by a hash of its text: the same in every run and for every order of files."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"

# --- tokens ---

def choose_tokenizer(config: Config, streams: dict[str, list[str]]) -> Tokenizer:
    """The tokenizer that --tokenizer names; train:N is trained by rustbpe on the training documents."""
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train" or not size.isdecimal():
        return Tokenizer.named(config.tokenizer)
    if int(size) < 257:
        raise ValueError(f"--tokenizer {config.tokenizer}: at least 257, for 256 bytes and end-of-text")
    print(f"training a tokenizer of {size} ids", flush=True)
    def texts(stream, left=BPE_CHARACTERS):
        for _, split, text in Documents(streams[stream], config.skip_bad).split(stream):
            if (left := left - len(text)) < 0:
                return
            if split == "train":
                yield text
    bpe = rustbpe.Tokenizer()
    stream = "both" if "both" in streams else "train"
    bpe.train_from_iterator(texts(stream), int(size) - 1, pattern=GPT2_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda entry: entry[1])
    if len(ranks) < int(size) - 1:
        raise ValueError(f"--tokenizer {config.tokenizer}: this text yields only {len(ranks) + 1} ids")
    return Tokenizer([bytes(token) for token, _ in ranks], name=config.tokenizer)

def _load(path: str):
    global _tokenizer                          # of this worker process, which ends when the command does
    _tokenizer = Tokenizer.load(path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C reaches the command itself too, which ends
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def _encode(texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(_tokenizer.vocab_size)
    return [np.array([_tokenizer.eot, *_tokenizer.encode(text)], dtype) for text in texts]

def encoded(documents, pool: ProcessPoolExecutor, workers: int):
    """(position, split, text, tokens) of each document, in order. Memory is bounded: never more than 4
    batches of about 1 MB of text a worker are on their way."""
    waiting, batch, size = collections.deque(), [], 0
    for document in itertools.chain(documents, [None]):                    # None: the end
        if document:
            batch.append(document)
            size += len(document[2])
        if size > 1 << 20 or not document:
            waiting.append((batch, pool.submit(_encode, [text for _, _, text in batch])))
            batch, size = [], 0
        while len(waiting) > (4 * workers if document else 0):
            done, future = waiting.popleft()
            for entry, tokens in zip(done, future.result(), strict=True):
                yield *entry, tokens

class SplitWriter:
    """The shards of one split. Each ends with a whole document; closing one enters it in the manifest."""

    def __init__(self, config: Config, split: str, manifest: dict):
        own = [s for s in manifest["shards"] if s["split"] == split]
        self.config, self.split, self.manifest = config, split, manifest
        self.limit = getattr(config, f"{split}_tokens")
        self.number, self.total, self.shard = len(own), sum(s["tokens"] for s in own), None
        self.reached = tuple(manifest["reached"].get(split, (0, -1)))      # last document of a closed shard

    def done(self) -> bool:
        return self.total >= self.limit

    def append(self, position, text: str, tokens: np.ndarray):
        if self.shard and self.shard.tokens + len(tokens) > self.config.shard_tokens:
            self.close()
        if not self.shard:
            path = os.path.join(self.config.out_dir, f"{self.split}_{self.number:05d}.bin")
            self.shard, self.bytes, self.documents = ShardWriter(path, tokens.dtype), 0, 0
        self.shard.append(tokens)
        self.bytes, self.documents = self.bytes + len(text.encode()), self.documents + 1
        self.total, self.last = self.total + len(tokens), position

    def close(self):
        if self.shard:
            self.shard.close()
            self.manifest["shards"].append({
                "name": os.path.basename(self.shard.path), "split": self.split, "tokens": self.shard.tokens,
                "bytes": self.bytes, "documents": self.documents, "sha256": sha256_file(self.shard.path)})
            self.manifest["reached"][self.split] = self.last
            self.number, self.shard = self.number + 1, None
            save_manifest(self.config.out_dir, self.manifest)

def save_manifest(out_dir: str, manifest: dict):
    write_atomic(os.path.join(out_dir, "manifest.json"), json.dumps(manifest, indent=1).encode())

# --- the command ---

def verify(out_dir: str):
    """Compare every file with the manifest; ValueError names the first that differs."""
    manifest = load_manifest(out_dir)
    if manifest is None:
        raise ValueError(f"no manifest.json in {out_dir}: nothing to verify against")
    digests = {s["name"]: s["sha256"] for s in manifest["shards"]}
    for name, digest in tqdm({**digests, "tokenizer.json": manifest["tokenizer"]["sha256"]}.items()):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path) or sha256_file(path) != digest:
            raise ValueError(f"{path} is not what its manifest says: delete {out_dir} and prepare it again")
    print(f"{out_dir}: {len(manifest['shards'])} shards and the tokenizer are as the manifest says")

def plan(config: Config, sources: list[str]):
    """Say what will be read and written, and refuse where the disk has no room for it."""
    tokens, download = config.train_tokens + config.val_tokens, 0
    if config.input is None:
        download = -(-config.train_tokens // C4_FILE["tokens"]) * C4_FILE["bytes"] / 1e9
    else:                                      # gzip shrinks text to about a third, 4 bytes make a token
        text = sum(os.path.getsize(s) * (3 if s.endswith(".gz") else 1) for s in sources if s != "builtin")
        tokens = min(tokens, text // (1 if config.tokenizer == "byte" else 4) + 500_000)
    free, shards = shutil.disk_usage(config.out_dir).free / 1e9, 2 * tokens / 1e9
    print(f"about {download:.1f} GB to download into the hub's cache, up to {tokens / 1e6:,.0f} M tokens = "
          f"{shards:.2f} GB to write into {config.out_dir}, {free:.1f} GB free there", flush=True)
    if shards + download > free:
        raise ValueError(f"{shards + download:.1f} GB are needed, {free:.1f} GB are free: free some, use "
                         "another --out_dir (and HF_HOME, the hub's cache), or ask for fewer --train_tokens")

def begin(config: Config, streams: dict[str, list[str]]) -> dict:
    """The manifest to continue, or a new one. Raises ValueError if out_dir was begun with other flags."""
    request = {"tokenizer": config.tokenizer, "train_tokens": config.train_tokens, "input": streams,
               "val_tokens": config.val_tokens, "shard_tokens": config.shard_tokens}
    manifest = load_manifest(config.out_dir, unfinished=True)
    if manifest is None:
        return {"version": 1, "complete": False, "request": request, "shards": [], "reached": {}}
    for name in request:
        if manifest["request"][name] != request[name]:
            raise ValueError(f"{config.out_dir} was begun with another --{name}: use the same as in its "
                             "manifest.json, another --out_dir, or delete it")
    for shard in manifest["shards"]:
        shard_length(config.out_dir, shard)
    return manifest

def main(config: Config):
    if config.verify:
        return verify(config.out_dir)
    for name in ("train_tokens", "val_tokens", "shard_tokens", "workers"):
        if not 1 <= getattr(config, name) < (2**31 if name == "shard_tokens" else math.inf):
            raise ValueError(f"--{name} {getattr(config, name)}: must be positive, shards below 2**31 tokens")
    streams = C4
    if config.input:
        streams = {"both" if not config.val_input else "train": expand(config.input)}
    if config.val_input:
        streams = {"val": expand(config.val_input), "train": streams["train"]}
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as e:
        raise ValueError(f"cannot make {config.out_dir} ({e.strerror}): use another --out_dir") from None
    manifest = begin(config, streams)
    if manifest["complete"]:
        return print(f"{config.out_dir} is complete: {len(manifest['shards'])} shards")
    plan(config, [source for sources in streams.values() for source in sources])
    for leftover in glob.glob(os.path.join(glob.escape(config.out_dir), "*.tmp")):
        os.remove(leftover)
    tokenizer_path = os.path.join(config.out_dir, "tokenizer.json")
    if "tokenizer" in manifest:                # this run continues one that chose it
        digest = manifest["tokenizer"]["sha256"]
        if not os.path.exists(tokenizer_path) or sha256_file(tokenizer_path) != digest:
            raise ValueError(f"{tokenizer_path} is not what {config.out_dir} began with: delete both")
    else:
        tokenizer = choose_tokenizer(config, streams)
        tokenizer.save(tokenizer_path)
        manifest["tokenizer"] = {"name": config.tokenizer, "sha256": sha256_file(tokenizer_path),
                                 "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
        save_manifest(config.out_dir, manifest)

    writers = {split: SplitWriter(config, split, manifest) for split in ("train", "val")}
    with ProcessPoolExecutor(config.workers, initializer=_load, initargs=(tokenizer_path,)) as pool, \
            tqdm(unit=" tokens", unit_scale=True, initial=sum(w.total for w in writers.values())) as bar:
        for stream, sources in streams.items():
            own = list(writers.values()) if stream == "both" else [writers[stream]]
            if all(w.done() for w in own):
                continue                       # before the interruption: not to be read again
            documents = Documents(sources, config.skip_bad)
            wanted = (document for document in documents.split(stream, min(w.reached[0] for w in own))
                      if not (writer := writers[document[1]]).done() and document[0] > writer.reached)
            for position, split, text, tokens in encoded(wanted, pool, config.workers):
                if not writers[split].done():
                    writers[split].append(position, text, tokens)
                    bar.update(len(tokens))
                if all(w.done() for w in own):
                    break
            for writer in own:
                writer.close()
            if documents.skipped:
                print(f"skipped {documents.skipped} bad lines", file=sys.stderr)
    for split, writer in writers.items():
        if not writer.total:
            raise ValueError(f"no document for {split}: give more --input, or both --input and --val_input")
    manifest["complete"] = True
    save_manifest(config.out_dir, manifest)
    counts = ", ".join(f"{w.total:,} {split} tokens in {w.number} shards" for split, w in writers.items())
    print(f"{config.out_dir}: {counts}")

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
