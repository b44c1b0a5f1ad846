"""Turn text into token shards: C4 from the Hugging Face hub, local files, or the text inside Python's
library.

    python prepare_c4.py                                                # enough of C4 for the 60m run
    python prepare_c4.py --input 'my/*.jsonl.gz' --tokenizer train:8192
    python prepare_c4.py --input book.txt --tokenizer byte --out_dir data/book
    python prepare_c4.py --input builtin --tokenizer byte --out_dir data/builtin     # no network, no file

The same command continues an interrupted run. The output depends on the text and the flags alone, not on
--workers: documents are written in the order of their positions (source, number), shards end with a whole
document, and the manifest records the position that each finished shard reached.

Without --val_input a hash of each document decides its split. Where that leaves a split empty, as in a single
document, the end of the text is validation: between a tenth and a fifth of it, cut at the end of a document,
a line or a word. A file that both --input and --val_input match is validation only."""
import bisect
import codecs
import collections
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import huggingface_hub
import numpy as np
import rustbpe
from tqdm import tqdm

from nanolost.cores import usable_cores
from nanolost.data import ShardWriter, load_manifest, shard_length, token_dtype
from nanolost.errors import UserError
from nanolost.files import claim, expanded, open_regular, sha256_file, write_atomic
from nanolost.flags import command, flag, parse
from nanolost.tokenizer import GPT2_PATTERN, Tokenizer

C4 = {
    "val": [f"hf://allenai/c4/en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)],
    "train": [f"hf://allenai/c4/en/c4-train.{i:05d}-of-01024.json.gz" for i in range(1024)],
}
# of one train file, roughly
C4_FILE = {"tokens": 150e6, "bytes": 320e6}
SPLITS = ("train", "val")
# without validation files one document in 50 is validation
VAL_SHARE = 50
# what train:N reads at the most: the merges of 32,000 ids hardly change beyond
BPE_CHARACTERS = 500_000_000
# characters that a worker tokenizes at once: some 50 ms, so that handing them over costs nothing
BATCH = 1 << 20
# batches a worker on their way: enough that none waits, and memory stays bounded
AHEAD = 4

@dataclass
class Config:
    out_dir: str = flag("data/c4", "where the shards go")
    train_tokens: int = flag(1_320_000_000, "stop once reached; the default is one epoch of the 60m run")
    val_tokens: int = flag(10_000_000, "stop once reached")
    input: list[str] | None = flag(None, "GLOBs of files instead of C4: .json, .jsonl (lines with a text "
                                   "key) or .txt, each also with .gz; or builtin, text of Python's library")
    val_input: list[str] | None = flag(None, "files for validation, left out of --input; else a hash of each "
                                       "document decides, or its position in a text of a few documents")
    tokenizer: str = flag("gpt2", "gpt2, byte, train:N (a BPE of N ids), a folder of Hugging Face, a "
                          "tokenizer.json or a .tiktoken file")
    split_pattern: str | None = flag(None, "regular expression that cuts a text before merging, for a "
                                     ".tiktoken file that is not OpenAI's")
    shard_tokens: int = flag(100_000_000, "most tokens of a shard")
    workers: int = flag(usable_cores(), "tokenizer threads; the output does not depend on it")
    skip_bad: bool = flag(False, "skip lines that are not documents, and count them, instead of stopping")
    verify: bool = flag(False, "compare the files of --out_dir with their manifest, and exit")

# --- which sources ---

def kind_of(source: str) -> str:
    """"json" (a document a line) or "txt" (one text, to be cut into documents)."""
    # .json is C4's own name for JSON lines
    ending = source.removesuffix(".gz").rpartition(".")[2]
    if source == "builtin" or ending == "txt":
        return "txt"
    if ending in ("json", "jsonl"):
        return "json"
    raise UserError(f"{source}: the kinds of input are .json, .jsonl and .txt, each also with .gz")

def check_source(source: str):
    """UserError for a local source that cannot hold a document, before the first token is made."""
    kind_of(source)
    # the one source that is no file
    if source == "builtin":
        return
    try:
        with open_regular(source) as file:
            empty = not file.read(1)
    except OSError as e:
        raise UserError(f"cannot read {source}: {e.strerror}") from None
    if empty:
        raise UserError(f"{source} holds no document: remove it from the input")

def expand(patterns: list[str]) -> list[str]:
    """The local sources that the patterns name, sorted, each file once; "builtin" stands for itself."""
    names = set()
    for pattern in map(expanded, patterns):
        # a name with brackets is a file and not a pattern
        if pattern == "builtin" or os.path.exists(pattern):
            names.add(pattern)
            continue
        found = glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"no file matches {pattern}: look at the path, and quote patterns")
        names.update(found)
    once = {}
    for name in sorted(names):
        check_source(name)
        # a.jsonl, ./a.jsonl and a link to it are one file
        once.setdefault(os.path.realpath(name), name)
    return list(once.values())

def choose_sources(config: Config) -> dict[str, list[str]]:
    """Sources by stream: "val" and "train", or "both" where the text itself decides the split."""
    if not config.input and not config.val_input:
        return C4
    train = expand(config.input) if config.input else C4["train"]
    if not config.val_input:
        return {"both": train}
    val = expand(config.val_input)
    held_out = {os.path.realpath(name) for name in val}
    shared = [name for name in train if os.path.realpath(name) in held_out]
    # no text may be in both: losses of validation would be those of text learned by heart
    train = [name for name in train if name not in shared]
    if not train:
        raise UserError("--val_input names every file of --input: nothing is left to train on; give other "
                        "files, or leave --val_input away")
    if shared:
        print(f"validation only, as --val_input names it: {', '.join(shared)}", flush=True)
    return {"val": val, "train": train}

def identity(source: str):
    """What changes when a local source does: a digest, or size and modification time in nanoseconds. None for
    a file of the hub, which a revision fixes."""
    if source.startswith("hf://"):
        return None
    if source == "builtin":
        # each version of Python brings another text
        return hashlib.sha256(builtin_text()).hexdigest()
    # what make and rsync go by; a digest of each file would read 300 GB before the first token
    status = os.stat(source)
    return [status.st_size, status.st_mtime_ns]

def builtin_text() -> bytes:
    # a megabyte of module: only who asks for it pays
    from pydoc_data.topics import topics
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()

def fetch(source: str, revisions: dict[str, str]) -> str:
    """Path of a source on this machine; a file of the hub is downloaded into its cache, once. revisions:
    repository → commit, entered with a repository's first file, so that all others are of the same."""
    if not source.startswith("hf://"):
        return source
    # hf://OWNER/NAME/FILE
    owner, name, file = source.removeprefix("hf://").split("/", 2)
    repository = f"{owner}/{name}"
    revision = revisions.get(repository)
    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except Exception as e:
        # of many kinds: no network, no such host, no such file, a full disk; the innermost is the cause
        cause = e
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"cannot download {source} ({type(cause).__name__}: {cause}): check the network and "
                        "run again to continue, or give local files by --input") from None
    # the hub's cache is …/snapshots/COMMIT/FILE
    commit = os.path.basename(os.path.dirname(path.removesuffix(file)))
    revisions.setdefault(repository, commit)
    return path

# --- documents ---

class Documents:
    """All documents of some sources, in order. skip_bad: count lines that are not documents in `skipped`.
    manifest: what its "sources" records must still hold once a source is read; "revisions" are entered."""

    def __init__(self, sources: list[str], skip_bad: bool, manifest: dict):
        self.sources = sources
        self.skip_bad = skip_bad
        self.manifest = manifest
        self.skipped = 0

    def read(self, first: int = 0):
        """((source, number), text) from source number `first` on."""
        for s in range(first, len(self.sources)):
            source = self.sources[s]
            number = -1
            path = fetch(source, self.manifest["revisions"])
            for number, text in enumerate(self._texts(path)):
                yield (s, number), text
            # a .gz of nothing, or blank lines only: `check_source` does not look that far
            if number < 0:
                raise UserError(f"{source} holds no document: remove it from the input")
            # a log that still grows, say: what was written of it is a part that no run could make again
            if identity(source) != self.manifest["sources"].get(source):
                raise UserError(f"{source} changed while it was read: begin again once it is complete")

    def _texts(self, path: str):
        # lines are numbered from 1, as editors do
        lines = enumerate(self._lines(path), 1)
        if kind_of(path) == "txt":
            texts = (self._piece(raw, path, number) for number, raw in pieces(lines))
        else:
            texts = (self._document(raw, path, number) for number, raw in lines if raw.strip())
        return (text for text in texts if text is not None)

    def _piece(self, raw: bytes, path: str, first: int) -> str | None:
        try:
            return raw.decode()
        # the line inside the piece
        except UnicodeDecodeError as e:
            return self._bad(path, first + raw.count(b"\n", 0, e.start), "is not UTF-8")

    def _document(self, raw: bytes, path: str, number: int) -> str | None:
        try:
            entry = json.loads(raw.decode())
        except UnicodeDecodeError:
            return self._bad(path, number, "is not UTF-8")
        # RecursionError: 100,000 brackets and no end
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and "text" not in entry:
            return self._bad(path, number, 'has no "text" key')
        if not isinstance(entry, dict) or not isinstance(entry["text"], str):
            return self._bad(path, number, 'is not a JSON object whose "text" is a string')
        try:
            # half a surrogate pair may come out of a JSON escape
            entry["text"].encode()
        except UnicodeEncodeError:
            return self._bad(path, number, "is not UTF-8")
        return entry["text"]

    def _lines(self, path: str):
        if path == "builtin":
            yield from builtin_text().splitlines(True)
            return
        number = 0
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    # editors of Windows put a byte-order mark in front, which is no text
                    yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        # a download that was cut, a .gz that is none, a disk that fails: the lines before are good
        except (OSError, EOFError, zlib.error) as e:
            self._bad(path, number + 1, f"cannot be read ({e})")

    def _bad(self, path: str, number: int, fault: str):
        if not self.skip_bad:
            raise UserError(f"{path}:{number}: {fault}; mend or remove it, or say --skip_bad true")
        self.skipped += 1

def pieces(lines):
    """Text without documents, cut at the first blank line after 2,000 bytes or any after 100,000: (its first
    line's number, bytes)."""
    # one document a book would make shards of one document, and no validation by hash; these sizes are of
    # the pages of C4, a few hundred tokens and more
    piece = []
    size = 0
    first = 1
    for number, line in lines:
        piece.append(line)
        size += len(line)
        if size > 2_000 and not line.strip() or size > 100_000:
            yield first, b"".join(piece)
            piece = []
            size = 0
            first = number + 1
    if size:
        yield first, b"".join(piece)

# --- splits ---

def split_of(text: str) -> str:
    """The split of a document by a hash of its text: the same in every run and for every order of files."""
    # Python's own hash() differs between processes
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"

def divided(documents, stream: str, held_out: list[int] | None = None):
    """(position, split, text) of each document: the stream's split, or for "both" by position from `held_out`
    (see `choose_held_out`) on, else by hash."""
    for position, text in documents:
        if stream != "both":
            yield position, stream, text
        elif held_out is None:
            yield position, split_of(text), text
        elif position != tuple(held_out[:2]):
            yield position, "train" if position < tuple(held_out[:2]) else "val", text
        else:
            # the document that the cut goes through; nothing of it is train where it is cut at its start
            characters = held_out[2]
            if characters:
                yield position, "train", text[:characters]
            yield position, "val", text[characters:]

def choose_held_out(config: Config, sources: list[str], manifest: dict) -> list[int] | None:
    """None where the hash gives documents to both splits. Else (source, number, characters): validation is
    what follows the first `characters` of that document."""
    seen = set()
    # lengths add up in characters: tokens are not known before train:N has its vocabulary
    positions = []
    starts = [0]
    for position, text in Documents(sources, config.skip_bad, manifest).read():
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
    if starts[last] < earliest:
        reading = Documents(sources, config.skip_bad, manifest).read(positions[last][0])
        text = next(text for position, text in reading if position == positions[last])
        characters = cut_between(text, earliest - starts[last], latest - starts[last])
    share = (total - starts[last] - characters) / total
    print(f"a hash puts all documents ({len(positions):,}) into one split: the last {share:.0%} of the text "
          "are validation instead", flush=True)
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
        return Tokenizer.named(expanded(config.tokenizer), config.split_pattern)
    print(f"training a tokenizer of {size} ids", flush=True)
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(training_texts(config, streams, manifest), size - 1, pattern=GPT2_PATTERN)
    # rustbpe counts the 256 bytes among its ids, but not end-of-text
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda entry: entry[1])
    if len(ranks) < size - 1:
        raise UserError(f"--tokenizer {config.tokenizer}: this text yields only {len(ranks) + 1} ids")
    return Tokenizer.of([bytes(token) for token, _ in ranks], name=config.tokenizer)

def training_texts(config: Config, streams: dict[str, list[str]], manifest: dict):
    """The training documents from the first on, until BPE_CHARACTERS were read."""
    # never validation text: its bits per byte would be too good
    stream = "both" if "both" in streams else "train"
    documents = Documents(streams[stream], config.skip_bad, manifest).read()
    left = BPE_CHARACTERS
    for _, split, text in divided(documents, stream, manifest["held_out"]):
        left -= len(text)
        if left < 0:
            return
        if split == "train":
            yield text

def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text, behind what begins a document."""
    # two bytes a token instead of tiktoken's four, before they wait for their turn
    dtype = token_dtype(tokenizer.vocab_size)
    return [tokenizer.document(text).astype(dtype) for text in texts]

def batches(documents):
    """Lists of documents, each of about BATCH characters of text."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size > BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch

def encoded(documents, tokenizer: Tokenizer, pool: ThreadPoolExecutor, workers: int):
    """(position, split, text, tokens) of each document, in order. Threads: tiktoken lets go of the
    interpreter's lock, and processes would spend more on handing texts over than on tokenizing them."""
    waiting = collections.deque()
    # None: no batch follows, empty the queue
    for batch in itertools.chain(batches(documents), [None]):
        if batch:
            texts = [text for _, _, text in batch]
            waiting.append((batch, pool.submit(encode_all, tokenizer, texts)))
        # the oldest first, whoever was ready before: the order of documents is that of the sources
        while len(waiting) > (AHEAD * workers if batch else 0):
            done, future = waiting.popleft()
            for document, tokens in zip(done, future.result(), strict=True):
                yield *document, tokens

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
        self.total = sum(shard["tokens"] for shard in own)
        self.shard = None
        # position of the last document of a closed shard: a run continues behind it
        self.reached = tuple(manifest["reached"].get(split, (0, -1)))

    def done(self) -> bool:
        return self.total >= self.limit

    def wants(self, position) -> bool:
        return not self.done() and position > self.reached

    def append(self, position, text: str, tokens: np.ndarray):
        # a document longer than a shard gets one of its own
        if self.shard and self.shard.tokens + len(tokens) > self.config.shard_tokens:
            self.close()
        if not self.shard:
            path = os.path.join(self.config.out_dir, f"{self.split}_{self.number:05d}.bin")
            self.shard = ShardWriter(path, tokens.dtype)
            self.bytes = 0
            self.documents = 0
        self.shard.append(tokens)
        self.bytes += len(text.encode())
        self.documents += 1
        self.total += len(tokens)
        self.last = position

    def close(self):
        if not self.shard:
            return
        self.shard.close()
        self.manifest["shards"].append({
            "name": os.path.basename(self.shard.path),
            "split": self.split,
            "tokens": self.shard.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self.shard.sha256,
        })
        # shard and position go into one file at once: there is no moment at which they disagree
        self.manifest["reached"][self.split] = self.last
        self.number += 1
        self.shard = None
        save_manifest(self.config.out_dir, self.manifest)

def write_stream(config: Config, stream: str, documents: Documents, writers: dict, tokenizer: Tokenizer, bar):
    """Tokenize and write the documents of one stream, until its splits have their tokens or it ends."""
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
        for position, split, text, tokens in encoded(wanted, tokenizer, pool, config.workers):
            # its split may have filled up since it was read
            if not writers[split].done():
                writers[split].append(position, text, tokens)
                bar.update(len(tokens))
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

def begin(config: Config, streams: dict[str, list[str]]) -> dict:
    """The manifest to continue, or a new one. UserError if out_dir holds shards made by other flags or from
    other text, or files that are not ours."""
    # what the output depends on: neither --workers nor --skip_bad, which a person adds after an error
    request = {"tokenizer": config.tokenizer, "split_pattern": config.split_pattern,
               "train_tokens": config.train_tokens, "input": streams,
               "val_tokens": config.val_tokens, "shard_tokens": config.shard_tokens}
    local = [s for s in itertools.chain(*streams.values()) if not s.startswith("hf://")]
    sources = {source: identity(source) for source in local}
    new = {"version": 1, "complete": False, "request": request, "sources": sources, "revisions": {},
           "held_out": None, "shards": [], "reached": {}}
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
    for name in "tokenizer.json", *(f"{split}_[0-9]*.bin" for split in SPLITS):
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
    for name, value in new["request"].items():
        if old["request"].get(name) != value:
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
        files = -(-config.train_tokens // C4_FILE["tokens"])
        download = files * C4_FILE["bytes"]
        print(f"about {readable(download)} to download into the hub's cache", flush=True)
    else:
        tokens = min(tokens, tokens_in(sources, config.tokenizer))
    # a megabyte more for the tokenizer and the manifest
    shards = 2 * tokens + 1e6
    # of the file system that holds the folder; the hub's cache is mostly on the same
    free = shutil.disk_usage(config.out_dir).free
    print(f"up to {tokens:,.0f} tokens, {readable(shards)} to write into {config.out_dir}, "
          f"{readable(free)} free there", flush=True)
    if shards + download > free:
        raise UserError(f"{readable(shards + download)} are needed, {readable(free)} are free: free some, or "
                        "use another --out_dir (and HF_HOME, the hub's cache) or fewer --train_tokens")

def tokens_in(sources: list[str], tokenizer: str) -> int:
    """Tokens that local sources hold at the most, roughly."""
    text = 0
    for source in sources:
        size = len(builtin_text()) if source == "builtin" else os.path.getsize(source)
        # gzip shrinks text to about a third
        text += size * (3 if source.endswith(".gz") else 1)
    # with a trained vocabulary some 4 bytes make a token
    return text // (1 if tokenizer == "byte" else 4)

def check_flags(config: Config):
    for name in "train_tokens", "val_tokens", "shard_tokens", "workers":
        value = getattr(config, name)
        # llm.c's header counts a shard's tokens in an int32
        if value < 1 or name == "shard_tokens" and value >= 2**31:
            raise UserError(f"--{name} {value}: must be positive, shards below 2**31 tokens")
    if config.split_pattern and not config.tokenizer.endswith(".tiktoken"):
        raise UserError("--split_pattern is for a .tiktoken file: every other --tokenizer has its own")

def remove_leftovers(out_dir: str):
    """Delete the temporary files of an interrupted run, and no others."""
    folder = glob.escape(out_dir)
    for name in "manifest.json", "tokenizer.json", *(f"{split}_[0-9]*.bin" for split in SPLITS):
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
    writers = {split: SplitWriter(config, split, manifest) for split in SPLITS}
    begun = sum(writer.total for writer in writers.values())
    with tqdm(unit=" tokens", unit_scale=True, initial=begun) as bar:
        for stream, sources in streams.items():
            documents = Documents(sources, config.skip_bad, manifest)
            write_stream(config, stream, documents, writers, tokenizer, bar)
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
    config = dataclasses.replace(config, out_dir=expanded(config.out_dir))
    if config.verify:
        return verify(config.out_dir)
    check_flags(config)
    trained_size(config)
    # nothing is written before every file that was named is known to be there
    streams = choose_sources(config)
    manifest = begin(config, streams)
    if not manifest["complete"]:
        with claim(config.out_dir, "prepares text"):
            # again: whoever held the lock until now has written
            manifest = begin(config, streams)
            if not manifest["complete"]:
                return prepare(config, streams, manifest)
    print(f"{config.out_dir} is complete: {len(manifest['shards'])} shards")

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
