"""Turn text into token shards: C4 from the Hugging Face hub, local files, or the text inside Python's own library.

    python prepare_c4.py                                                # enough of C4 for the 60m run
    python prepare_c4.py --input 'my/*.jsonl.gz' --tokenizer train:8192
    python prepare_c4.py --input builtin --tokenizer byte --out_dir data/builtin     # no network, no file

The same command continues an interrupted run. The output depends on the text and the flags alone, not on --workers:
a document has a position (source, number), documents are written in that order, and a finished shard records the position
it reached in manifest.json."""
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

from data import (GPT2_PATTERN, ShardWriter, Tokenizer, load_manifest, read_shard, sha256_file, token_dtype,
                  write_atomic)
from flags import command, flag, parse

C4 = {"train": ("en/c4-train.{:05d}-of-01024.json.gz", 1024), "val": ("en/c4-validation.{:05d}-of-00008.json.gz", 8)}
C4_FILE = {"tokens": 150e6, "bytes": 320e6}    # of one train file, roughly
VAL_SHARE = 50                                 # without validation files one document in 50 is validation
BPE_CHARACTERS = 500_000_000                   # that train:N looks at: the merges hardly change after that

@dataclass
class Config:
    out_dir: str = flag("data/c4", "where the shards go")
    train_tokens: int = flag(1_320_000_000, "stop once reached; the default is one epoch of the 60m run")
    val_tokens: int = flag(10_000_000, "stop once reached")
    input: list[str] | None = flag(None, "local files instead of C4: .json .jsonl (lines with a text key) or .txt, also "
                                         "with .gz, as GLOBs; or builtin, text from Python's library")
    val_input: list[str] | None = flag(None, "files for validation; without them a hash of each document decides")
    tokenizer: str = flag("gpt2", "gpt2, byte, train:N (a BPE of N tokens), or a tokenizer.json or .tiktoken file")
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
        raise ValueError(f"cannot download {source} ({type(e).__name__}): check the network and run again to continue, "
                         "or give local files by --input") from None

class Documents:
    """All documents of some sources in order: iterating yields (position, text), position = (source, number)."""

    def __init__(self, sources: list[str], skip_bad: bool = False):
        self.sources, self.skip_bad, self.skipped = sources, skip_bad, 0

    def start_from(self, first: int):
        """Iterate from source number `first` on."""
        for s, source in enumerate(self.sources):
            if s < first:
                continue
            number = -1
            for number, text in enumerate(self._texts(fetch(source))):
                yield (s, number), text
            if number < 0:
                raise ValueError(f"{source} holds no document: remove it from the input")

    def _texts(self, path: str):
        if path == "builtin":
            from pydoc_data.topics import topics
            lines = (line.encode() for topic in sorted(topics) for line in (topics[topic] + "\n\n").splitlines(True))
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
        """A text without documents is cut at the first blank line after 2,000 bytes, or any line after 100,000."""
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

def _load(path: str):
    global _tokenizer                          # of this worker process
    _tokenizer = Tokenizer.load(path)

def _encode(texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(_tokenizer.vocab_size)
    return [np.array([_tokenizer.eot, *_tokenizer.encode(text)], dtype) for text in texts]

def encoded(documents, pool: ProcessPoolExecutor, workers: int):
    """(position, split, text, tokens) of each (position, split, text) in the same order. Never more than 4 batches of
    about 1 MB of text a worker are on their way: memory is bounded."""
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
    """The shards of one split. Each ends with a whole document; closing one puts it into the manifest."""

    def __init__(self, out_dir: str, split: str, limit: int, shard_tokens: int, manifest: dict):
        self.out_dir, self.split, self.limit, self.shard_tokens, self.manifest = out_dir, split, limit, shard_tokens, manifest
        own = [s for s in manifest["shards"] if s["split"] == split]
        self.number, self.total, self.shard = len(own), sum(s["tokens"] for s in own), None
        self.reached = tuple(manifest["reached"].get(split, (0, -1)))      # position of the last document in a closed shard

    def done(self) -> bool:
        return self.total >= self.limit

    def append(self, position, text: str, tokens: np.ndarray):
        if self.shard and self.shard.tokens + len(tokens) > self.shard_tokens:
            self.close()
        if not self.shard:
            path = os.path.join(self.out_dir, f"{self.split}_{self.number:05d}.bin")
            self.shard, self.bytes, self.documents = ShardWriter(path, tokens.dtype), 0, 0
        self.shard.append(tokens)
        self.bytes, self.documents, self.last = self.bytes + len(text.encode()), self.documents + 1, position
        self.total += len(tokens)

    def close(self):
        if not self.shard:
            return
        self.shard.close()
        self.manifest["shards"].append({"name": os.path.basename(self.shard.path), "split": self.split,
                                        "tokens": self.shard.tokens, "bytes": self.bytes, "documents": self.documents,
                                        "sha256": sha256_file(self.shard.path)})
        self.manifest["reached"][self.split], self.number, self.shard = list(self.last), self.number + 1, None
        save_manifest(self.out_dir, self.manifest)

def save_manifest(out_dir: str, manifest: dict):
    write_atomic(os.path.join(out_dir, "manifest.json"), json.dumps(manifest, indent=1).encode())

# --- the command ---

def verify(out_dir: str):
    """Compare every shard and the tokenizer with the manifest. Raises ValueError that names the first difference."""
    manifest = load_manifest(out_dir)
    if manifest is None:
        raise ValueError(f"no manifest.json in {out_dir}: nothing to verify against")
    for shard in tqdm(manifest["shards"], unit="shard"):
        path = os.path.join(out_dir, shard["name"])
        if len(read_shard(path)) != shard["tokens"] or sha256_file(path) != shard["sha256"]:
            raise ValueError(f"{path} is not what its manifest says: delete {out_dir} and prepare it again")
    tokenizer = os.path.join(out_dir, "tokenizer.json")
    if not os.path.exists(tokenizer) or sha256_file(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{tokenizer} is not what the manifest says: delete {out_dir} and prepare it again")
    print(f"{out_dir}: {len(manifest['shards'])} shards and the tokenizer are as the manifest says")

def plan(config: Config, sources: dict[str, list[str]]):
    """Say what will be read and written, and refuse where the disk has no room for it."""
    tokens, download = config.train_tokens + config.val_tokens, 0
    if config.input:
        text = sum(os.path.getsize(s) * (3 if s.endswith(".gz") else 1) for s in sum(sources.values(), []) if s != "builtin")
        tokens = min(tokens, text // (1 if config.tokenizer == "byte" else 4) + 500_000)
        print(f"input: {sum(map(len, sources.values()))} sources, about {text / 1e6:,.0f} MB of text")
    else:
        download = -(-config.train_tokens // C4_FILE["tokens"]) * C4_FILE["bytes"]
        print(f"input: C4, about {download / 1e9:.1f} GB to download to the hub's cache")
    free = shutil.disk_usage(config.out_dir).free
    print(f"output: at most about {tokens / 1e6:,.0f} M tokens, {2 * tokens / 1e9:.2f} GB in {config.out_dir}, where "
          f"{free / 1e9:.1f} GB are free", flush=True)
    if 2 * tokens + download > free:
        raise ValueError(f"{config.out_dir} has {free / 1e9:.1f} GB free and {(2 * tokens + download) / 1e9:.1f} GB are needed: "
                         "free some, use another --out_dir (and HF_HOME), or ask for fewer --train_tokens")

def main(config: Config):
    if config.verify:
        return verify(config.out_dir)
    for name in ("train_tokens", "val_tokens", "shard_tokens", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be positive")
    os.makedirs(config.out_dir, exist_ok=True)
    if config.input is None:
        sources = {split: [f"hf://allenai/c4/{name.format(i)}" for i in range(n)] for split, (name, n) in C4.items()}
    elif config.val_input:
        sources = {"val": expand(config.val_input), "train": expand(config.input)}
    else:
        sources = {"both": expand(config.input)}
    request = {"tokenizer": config.tokenizer, "train_tokens": config.train_tokens, "val_tokens": config.val_tokens,
               "shard_tokens": config.shard_tokens, "sources": sources}
    manifest = {"version": 1, "complete": False, "request": request, "shards": [], "reached": {}}
    manifest_path = os.path.join(config.out_dir, "manifest.json")
    if os.path.exists(manifest_path):
        manifest = load_manifest(config.out_dir, unfinished=True)
        changed = [name for name in request if manifest["request"][name] != request[name]]
        if changed:
            raise ValueError(f"{config.out_dir} was begun with another --{changed[0]} ({manifest['request'][changed[0]]}): "
                             "use the same, another --out_dir, or delete it")
        if manifest["complete"]:
            return print(f"{config.out_dir} is complete: {len(manifest['shards'])} shards. --verify compares them")
    plan(config, sources)
    for leftover in glob.glob(os.path.join(config.out_dir, "*.tmp")):
        os.remove(leftover)

    def labelled(stream: str, documents: Documents, first: int = 0):
        for position, text in documents.start_from(first):
            yield position, split_of(text) if stream == "both" else stream, text

    tokenizer_path = os.path.join(config.out_dir, "tokenizer.json")
    if "tokenizer" not in manifest:
        kind, _, size = config.tokenizer.partition(":")
        if kind == "train" and size.isdecimal():
            stream = "both" if "both" in sources else "train"
            print(f"training a tokenizer of {size} ids", flush=True)
            texts = (text for _, split, text in labelled(stream, Documents(sources[stream], config.skip_bad)) if split == "train")
            tokenizer = train_bpe(texts, int(size), config.tokenizer)
        else:
            tokenizer = Tokenizer.named(config.tokenizer)
        tokenizer.save(tokenizer_path)
        manifest["tokenizer"] = {"name": tokenizer.name, "sha256": tokenizer.sha256(), "vocab_size": tokenizer.vocab_size,
                                 "eot": tokenizer.eot}
        save_manifest(config.out_dir, manifest)

    limits = {"train": config.train_tokens, "val": config.val_tokens}
    writers = {split: SplitWriter(config.out_dir, split, limit, config.shard_tokens, manifest) for split, limit in limits.items()}
    with ProcessPoolExecutor(config.workers, initializer=_load, initargs=(tokenizer_path,)) as pool, \
            tqdm(unit=" tokens", unit_scale=True, initial=sum(w.total for w in writers.values())) as bar:
        for stream, names in sources.items():
            own = [writers[s] for s in (limits if stream == "both" else [stream])]
            documents = Documents(names, config.skip_bad)
            wanted = ((position, split, text)
                      for position, split, text in labelled(stream, documents, min(w.reached[0] for w in own))
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
            raise ValueError(f"no document for {split}: give more input" + (", or --val_input" if split == "val" else ""))
    manifest["complete"] = True
    save_manifest(config.out_dir, manifest)
    print(f"{config.out_dir}: " + ", ".join(f"{w.total:,} {split} tokens in {w.number} shards" for split, w in writers.items()))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
