"""Turn text into token shards: C4 from the Hugging Face hub, local files, or the text inside Python's own
library.

    python prepare_c4.py                                                # enough of C4 for the 60m run
    python prepare_c4.py --input 'my/*.jsonl.gz' --tokenizer train:8192
    python prepare_c4.py --input builtin --tokenizer byte --out_dir data/builtin     # no network, no file

The same command continues an interrupted run. The output depends on the text and the flags alone, not on
--workers: a document has a position (source, number), documents are written in that order, and a finished
shard records the position it reached in manifest.json."""
import collections
import glob
import gzip
import hashlib
import itertools
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import GPT2_PATTERN, ShardWriter, Tokenizer, load_manifest, sha256_file, token_dtype, write_atomic
from flags import command, flag, parse

C4 = "allenai/c4"                              # of the Hugging Face hub; (name, number) of its files by split:
C4_FILES = {"val": ("en/c4-validation.{:05d}-of-00008.json.gz", 8),
            "train": ("en/c4-train.{:05d}-of-01024.json.gz", 1024)}
C4_FILE = {"tokens": 150e6, "bytes": 320e6}    # of one train file, roughly
VAL_SHARE = 50                                 # without validation files one document in 50 is validation
BPE_CHARACTERS = 500_000_000                   # that train:N looks at: the merges hardly change after that

@dataclass
class Config:
    out_dir: str = flag("data/c4", "where the shards go")
    train_tokens: int = flag(1_320_000_000, "stop once reached; the default is one epoch of the 60m run")
    val_tokens: int = flag(10_000_000, "stop once reached")
    input: list[str] | None = flag(None, "local files instead of C4, as GLOBs: .json or .jsonl (lines with a text "
                                         "key) or .txt, also with .gz; or builtin, text of Python's library")
    val_input: list[str] | None = flag(None, "files for validation; else a hash of each document decides")
    tokenizer: str = flag("gpt2", "gpt2, byte, train:N (a BPE of N ids), or a tokenizer.json or .tiktoken file")
    shard_tokens: int = flag(100_000_000, "most tokens of a shard")
    workers: int = flag(os.cpu_count(), "tokenizer processes; the output does not depend on it")
    skip_bad: bool = flag(False, "count and skip lines that are no document, instead of stopping")
    verify: bool = flag(False, "compare the shards of --out_dir with their manifest, and exit")

# --- documents ---

def expand(patterns: list[str]) -> list[str]:
    """The files that the patterns name, sorted and once each; "builtin" stands for itself."""
    names = {name for p in patterns for name in ([p] if p == "builtin" else glob.glob(p, recursive=True))}
    if not names:
        raise ValueError(f"no file matches {' '.join(patterns)}: look at the path, and quote patterns")
    return sorted(names)

def fetch(source: str) -> str:
    """Path of a source on this machine; a file of C4 is downloaded to the hub's cache, once."""
    if not source.startswith("hf://"):
        return source
    from huggingface_hub import hf_hub_download
    _, _, owner, name, file = source.split("/", 4)
    try:
        return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except Exception as e:                     # many kinds: no network, no such host, a proxy, a full disk
        raise ValueError(f"cannot download {source} ({type(e).__name__}): check the network and run again to "
                         "continue, or give local files by --input") from None

class Documents:
    """All documents of some sources, in order. With skip_bad, lines that are none are counted in `skipped`."""

    def __init__(self, sources: list[str], skip_bad: bool = False):
        self.sources, self.skip_bad, self.skipped = sources, skip_bad, 0

    def split(self, stream: str, first: int = 0):
        """(position, split, text) from source number `first` on; position is (source, number of the document). The
        split is `stream`, or by hash where that is "both"."""
        for s in range(first, len(self.sources)):
            number = -1
            for number, text in enumerate(self._texts(fetch(self.sources[s]))):
                yield (s, number), split_of(text) if stream == "both" else stream, text
            if number < 0:
                raise ValueError(f"{self.sources[s]} holds no document: remove it from the input")

    def _texts(self, path: str):
        if path == "builtin":
            from pydoc_data.topics import topics
            lines = (f"{line}\n".encode() for topic in sorted(topics) for line in [*topics[topic].split("\n"), ""])
            yield from self._pieces(lines, path)
        elif path.removesuffix(".gz").endswith(".txt"):
            yield from self._pieces(self._lines(path), path)
        elif path.removesuffix(".gz").endswith((".json", ".jsonl")):
            for number, line in enumerate(self._lines(path), 1):
                if line.strip():
                    yield from self._checked(path, number, line, lambda line: json.loads(line)["text"])
        else:
            raise ValueError(f"{path}: the kinds of input are .json, .jsonl and .txt, each also with .gz")

    def _lines(self, path: str):
        number = 0
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
                for number, line in enumerate(f, 1):                       # noqa: B007
                    yield line
        except (OSError, EOFError, zlib.error) as e:
            self._bad(path, number + 1, f"cannot be read ({e})")

    def _pieces(self, lines, path: str):
        """A text without documents is cut at the first blank line after 2,000 bytes, or any line after
        100,000."""
        piece, size = [], 0
        for number, line in enumerate(itertools.chain(lines, [None]), 1):
            if line is not None:
                piece.append(line)
                size += len(line)
            if piece and (line is None or size > 100_000 or size > 2_000 and not line.strip()):
                yield from self._checked(path, number, b"".join(piece), lambda b: b)
                piece, size = [], 0

    def _checked(self, path: str, number: int, raw: bytes, read):
        """One text, or an error with file and line, or where asked for a skip."""
        try:
            text = read(raw.decode("utf-8"))
            text.encode("utf-8")               # half a surrogate pair may come out of a JSON escape
            yield text
        except UnicodeError:
            self._bad(path, number, "is not UTF-8")
        except KeyError:
            self._bad(path, number, 'has no "text" key')
        except (ValueError, TypeError, AttributeError):
            self._bad(path, number, 'is not a JSON object whose "text" is a string')

    def _bad(self, path: str, number: int, fault: str):
        if not self.skip_bad:
            raise ValueError(f"{path}:{number}: {fault}; mend or remove it, or say --skip_bad true")
        self.skipped += 1

def split_of(text: str) -> str:
    """The split of a document by a hash of its text: the same in every run and for every order of files."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"

# --- tokens ---

def train_bpe(texts, size: int, name: str) -> Tokenizer:
    """A byte-pair encoding of `size` ids, end-of-text among them, trained by rustbpe."""
    import rustbpe
    if size < 257:
        raise ValueError(f"--tokenizer {name}: at least 257, for 256 bytes and end-of-text")
    left = [BPE_CHARACTERS]
    def enough(text):
        left[0] -= len(text)
        return left[0] > 0
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(itertools.takewhile(enough, texts), size - 1, pattern=GPT2_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda entry: entry[1])
    return Tokenizer([bytes(token) for token, _ in ranks], name=name)

def choose_tokenizer(config: Config, streams: dict[str, list[str]]) -> Tokenizer:
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train" or not size.isdecimal():
        return Tokenizer.named(config.tokenizer)
    print(f"training a tokenizer of {size} ids", flush=True)
    stream = "both" if "both" in streams else "train"
    documents = Documents(streams[stream], config.skip_bad).split(stream)
    return train_bpe((text for _, split, text in documents if split == "train"), int(size), config.tokenizer)

def _load(path: str):
    global _tokenizer                          # of this worker process
    _tokenizer = Tokenizer.load(path)

def _encode(texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(_tokenizer.vocab_size)
    return [np.array([_tokenizer.eot, *_tokenizer.encode(text)], dtype) for text in texts]

def encoded(documents, pool: ProcessPoolExecutor, workers: int):
    """(position, split, text, tokens) of each (position, split, text) in the same order. Never more than 4
    batches of about 1 MB of text a worker are on their way: memory is bounded."""
    waiting = collections.deque()
    def finished():
        batch, future = waiting.popleft()
        for document, tokens in zip(batch, future.result(), strict=True):
            yield *document, tokens
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size > 1 << 20:
            waiting.append((batch, pool.submit(_encode, [text for _, _, text in batch])))
            batch, size = [], 0
            if len(waiting) > 4 * workers:
                yield from finished()
    waiting.append((batch, pool.submit(_encode, [text for _, _, text in batch])))
    while waiting:
        yield from finished()

class SplitWriter:
    """The shards of one split. Each ends with a whole document; closing one enters it in the manifest."""

    def __init__(self, config: Config, split: str, limit: int, manifest: dict):
        own = [s for s in manifest["shards"] if s["split"] == split]
        self.config, self.split, self.limit, self.manifest = config, split, limit, manifest
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
        self.bytes, self.documents, self.last = self.bytes + len(text.encode()), self.documents + 1, position
        self.total += len(tokens)

    def close(self):
        if self.shard:
            self.shard.close()
            path = self.shard.path
            self.manifest["shards"].append({
                "name": os.path.basename(path), "split": self.split, "tokens": self.shard.tokens,
                "bytes": self.bytes, "documents": self.documents, "sha256": sha256_file(path)})
            self.manifest["reached"][self.split] = list(self.last)
            self.number, self.shard = self.number + 1, None
            save_manifest(self.config.out_dir, self.manifest)

def save_manifest(out_dir: str, manifest: dict):
    write_atomic(os.path.join(out_dir, "manifest.json"), json.dumps(manifest, indent=1).encode())

# --- the command ---

def verify(out_dir: str):
    """Compare every shard and the tokenizer with the manifest. ValueError names the first difference."""
    manifest = load_manifest(out_dir)
    if manifest is None:
        raise ValueError(f"no manifest.json in {out_dir}: nothing to verify against")
    named = [*manifest["shards"], {"name": "tokenizer.json", "sha256": manifest["tokenizer"]["sha256"]}]
    for entry in tqdm(named, unit="file"):
        path = os.path.join(out_dir, entry["name"])
        if not os.path.exists(path) or sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path} is missing or not what the manifest says: delete {out_dir} and prepare it again")
    print(f"{out_dir}: {len(manifest['shards'])} shards and the tokenizer are as the manifest says")

def plan(config: Config, sources: list[str]):
    """Say what will be read and written, and refuse where the disk has no room for it."""
    tokens, download = config.train_tokens + config.val_tokens, 0
    if config.input is None:
        download = -(-config.train_tokens // C4_FILE["tokens"]) * C4_FILE["bytes"]
        print(f"input   C4, about {download / 1e9:.1f} GB to download into the hub's cache")
    else:                                      # gzip shrinks text to about a third
        text = sum(os.path.getsize(s) * (3 if s.endswith(".gz") else 1) for s in sources if s != "builtin")
        tokens = min(tokens, text // (1 if config.tokenizer == "byte" else 4) + 500_000)
        print(f"input   {len(sources)} sources, about {text / 1e6:,.0f} MB of text")
    free, needed = shutil.disk_usage(config.out_dir).free, 2 * tokens + download
    print(f"output  about {tokens / 1e6:,.0f} M tokens at the most, {2 * tokens / 1e9:.2f} GB, in "
          f"{config.out_dir} ({free / 1e9:.1f} GB free)", flush=True)
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free: free some, use another "
                         "--out_dir (and HF_HOME, the hub's cache), or ask for fewer --train_tokens")

def begin(config: Config, sources: dict[str, list[str]]) -> dict:
    """The manifest to continue, or a new one. Raises ValueError if out_dir was begun with other flags."""
    request = {name: getattr(config, name) for name in ("tokenizer", "train_tokens", "val_tokens", "shard_tokens")}
    request["input"] = sources
    manifest = load_manifest(config.out_dir, unfinished=True)
    if manifest is None:
        return {"version": 1, "complete": False, "request": request, "shards": [], "reached": {}}
    for name, value in request.items():
        if manifest["request"][name] != value:
            raise ValueError(f"{config.out_dir} was begun with another --{name} ({manifest['request'][name]}): use "
                             "that, another --out_dir, or delete it")
    return manifest

def main(config: Config):
    if config.verify:
        return verify(config.out_dir)
    for name in ("train_tokens", "val_tokens", "shard_tokens", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be positive")
    if config.input is None:
        streams = {split: [f"hf://{C4}/{name.format(i)}" for i in range(n)] for split, (name, n) in C4_FILES.items()}
    elif config.val_input:
        streams = {"val": expand(config.val_input), "train": expand(config.input)}
    else:
        streams = {"both": expand(config.input)}
    os.makedirs(config.out_dir, exist_ok=True)
    manifest = begin(config, streams)
    if manifest["complete"]:
        return print(f"{config.out_dir} is complete: {len(manifest['shards'])} shards; --verify compares them")
    plan(config, [source for sources in streams.values() for source in sources])
    for leftover in glob.glob(os.path.join(config.out_dir, "*.tmp")):
        os.remove(leftover)

    tokenizer_path = os.path.join(config.out_dir, "tokenizer.json")
    if "tokenizer" not in manifest:            # else this run continues one that had it
        tokenizer = choose_tokenizer(config, streams)
        tokenizer.save(tokenizer_path)
        manifest["tokenizer"] = {"name": tokenizer.name, "sha256": tokenizer.sha256(),
                                 "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
        save_manifest(config.out_dir, manifest)

    writers = {"train": SplitWriter(config, "train", config.train_tokens, manifest),
               "val": SplitWriter(config, "val", config.val_tokens, manifest)}
    with ProcessPoolExecutor(config.workers, initializer=_load, initargs=(tokenizer_path,)) as pool, \
            tqdm(unit=" tokens", unit_scale=True, initial=sum(w.total for w in writers.values())) as bar:
        for stream, sources in streams.items():
            own = list(writers.values()) if stream == "both" else [writers[stream]]
            documents = Documents(sources, config.skip_bad)
            first = min(w.reached[0] for w in own)
            wanted = ((position, split, text) for position, split, text in documents.split(stream, first)
                      if not writers[split].done() and position > writers[split].reached)
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
            raise ValueError(f"no document for {split}: give more input" + " or --val_input" * (split == "val"))
    manifest["complete"] = True
    save_manifest(config.out_dir, manifest)
    counts = ", ".join(f"{w.total:,} {split} tokens in {w.number} shards" for split, w in writers.items())
    print(f"{config.out_dir}: {counts}")

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
