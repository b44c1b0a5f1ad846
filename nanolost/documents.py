"""Where text comes from, and how it becomes documents: files of this machine and of the hub, of the kinds
that people have; each document with its position (source, number), the same in every run.

A document is a str, or a `Pair`, whose prompt is read and not learned."""
import codecs
import contextlib
import fnmatch
import glob
import gzip
import hashlib
import importlib
import json
import os
import zlib
from typing import NamedTuple

import huggingface_hub

from nanolost.data import nanogpt_command
from nanolost.errors import UserError
from nanolost.files import open_regular

HUB = "hf://"
# what a user types, as Hugging Face's own libraries spell it
HUB_PATTERN = "hf://datasets/OWNER/NAME/PATTERN"
# .json is C4's own name for JSON lines
KINDS = {"json": "json", "jsonl": "json", "txt": "txt", "parquet": "parquet"}
PACKED = (".gz", ".zst")
# bytes of a .zst that are unpacked at once
CHUNK = 1 << 20
# rows of a Parquet file that are read at once
PARQUET_ROWS = 1024

class Pair(NamedTuple):
    """A document of which the completion alone is learned."""

    prompt: str
    completion: str

def text_of(document: str | Pair) -> str:
    return document if isinstance(document, str) else document.prompt + document.completion

# --- what a source is ---

def kind_of(source: str) -> str:
    """"json" (a document a line), "parquet" (a document a row) or "txt" (one text, to be cut into documents).
    UserError for any other."""
    if source == "builtin":
        return "txt"
    name = source
    # a.txt.gz is a text
    for ending in PACKED:
        name = name.removesuffix(ending)
    ending = name.rpartition(".")[2]
    # Parquet is packed inside
    if ending in KINDS and (ending != "parquet" or name == source):
        return KINDS[ending]
    if ending == "bin":
        raise UserError(f"{source} holds tokens and no text: train.py --data_dir reads a folder of shards; "
                        f"if it is nanoGPT's, make shards of it by {nanogpt_command(source)}")
    raise UserError(f"{source}: the kinds of input are .json, .jsonl and .txt, each also with .gz or .zst, "
                    "and .parquet")

def package(name: str, ending: str):
    """A module of a package that only some kinds of input need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        name = name.partition(".")[0]
        raise UserError(f"{ending} needs the package {name}: pip install {name}") from None

def check_kind(source: str):
    """UserError for a source of no known kind, or whose package is missing."""
    if kind_of(source) == "parquet":
        package("pyarrow.parquet", ".parquet")
    if source.endswith(".zst"):
        package("zstandard", ".zst")

def check_source(source: str):
    """UserError for a local source that cannot hold a document, before the first token is made."""
    check_kind(source)
    # the one source that is no file
    if source == "builtin":
        return
    try:
        with open_regular(source) as file:
            empty = not file.read(1)
    except OSError as e:
        raise UserError(f"cannot read {source}: {e.strerror}") from None
    if empty:
        raise UserError(f"{source} holds no document: leave it out, or give another file")

def place(source: str) -> str | tuple[int, int]:
    """Equal for two names of one file: a.jsonl, ./a.jsonl, and a link to it of either kind."""
    if source == "builtin" or source.startswith(HUB):
        return source
    # realpath would tell two hard links apart
    status = os.stat(source)
    return status.st_dev, status.st_ino

def expand(patterns: list[str], hub: dict) -> list[str]:
    """The sources that the patterns name, sorted, each file once; "builtin" stands for itself. hub: what was
    found before by the patterns of the hub (see `files_of_hub`), to which what is found now is added."""
    names = set()
    for pattern in patterns:
        # a name with brackets is a file and not a pattern
        if pattern == "builtin" or os.path.exists(pattern):
            names.add(pattern)
            continue
        found = files_of_hub(pattern, hub) if pattern.startswith(HUB) else glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"no file matches {pattern}: look at the path, and quote patterns")
        names.update(found)
    once = {}
    for name in sorted(names):
        # the first bytes of a file of the hub would have to be downloaded
        if name.startswith(HUB):
            check_kind(name)
        else:
            check_source(name)
        once.setdefault(place(name), name)
    return list(once.values())

def identity(source: str):
    """What changes when a local source does: a digest, or size and modification time in nanoseconds. None for
    a file of the hub, which a revision fixes."""
    if source.startswith(HUB):
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

# --- the hub ---

def innermost(error: Exception) -> str:
    """The cause of an error of the hub, which come in many kinds: no network, no such host, a full disk."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}"

def matches(file: str, pattern: str) -> bool:
    """As a shell matches: * stays inside a folder, ** does not."""
    if "**" in pattern:
        # "**/" stands for no folder, too
        shorter = pattern.replace("**/", "")
        return fnmatch.fnmatchcase(file, pattern) or fnmatch.fnmatchcase(file, shorter)
    names = file.split("/")
    parts = pattern.split("/")
    return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))

def files_of_hub(pattern: str, hub: dict) -> list[str]:
    """The files of the hub that HUB_PATTERN names, as hf://OWNER/NAME/FILE. hub: pattern → repository, commit
    and files; a pattern that is in there needs no network, and keeps its commit."""
    parts = pattern.removeprefix(f"{HUB}datasets/").split("/", 2)
    # without datasets/ the second one is empty
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{pattern} names no files of a data set: {HUB_PATTERN}")
    owner, name, wanted = parts
    if pattern not in hub:
        repository = f"{owner}/{name}"
        try:
            info = huggingface_hub.dataset_info(repository)
        except Exception as e:
            raise UserError(f"cannot list {pattern} ({innermost(e)}): check the name, and the "
                            "network") from None
        # one listing, of one commit: a file that is added meanwhile belongs to another
        found = [entry.rfilename for entry in info.siblings if matches(entry.rfilename, wanted)]
        hub[pattern] = {"repository": repository, "commit": info.sha, "files": sorted(found)}
    repository = hub[pattern]["repository"]
    return [f"{HUB}{repository}/{file}" for file in hub[pattern]["files"]]

def fetch(source: str, revisions: dict[str, str]) -> str:
    """Path of a source on this machine; a file of the hub is downloaded into its cache, once. revisions:
    repository → commit, entered with a repository's first file, so that all others are of the same."""
    if not source.startswith(HUB):
        return source
    # hf://OWNER/NAME/FILE
    owner, name, file = source.removeprefix(HUB).split("/", 2)
    repository = f"{owner}/{name}"
    revision = revisions.get(repository)
    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except Exception as e:
        raise UserError(f"cannot download {source} ({innermost(e)}): check the network and run again to "
                        "continue, or give local files by --input") from None
    # the hub's cache is …/snapshots/COMMIT/FILE
    commit = os.path.basename(os.path.dirname(path.removesuffix(file)))
    revisions.setdefault(repository, commit)
    return path

# --- the content of a file ---

def unpacked(file):
    """The bytes of a .zst, a chunk at a time. EOFError where it is cut, OSError where it is damaged."""
    zstandard = package("zstandard", ".zst")
    whole = True
    while chunk := file.read(CHUNK):
        # a file may be several frames, as of pzstd or of cat
        while chunk:
            if whole:
                # 2 GB is the largest window of zstd --ultra --long
                frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as e:
                raise OSError(e) from None
            whole = frame.eof
            chunk = frame.unused_data
    # the library itself takes the end of a file for the end of a frame
    if not whole:
        raise EOFError("the last frame is cut")

def lines_of(chunks):
    """Lines with their ends, out of pieces of any size."""
    # pieces of a line are joined once: a line may be many chunks long
    rest = []
    for chunk in chunks:
        *ended, last = chunk.split(b"\n")
        for line in ended:
            rest += [line, b"\n"]
            yield b"".join(rest)
            rest = []
        rest.append(last)
    if any(rest):
        yield b"".join(rest)

@contextlib.contextmanager
def opened(path: str):
    """The lines of a text file, unpacked."""
    if path.endswith(".gz"):
        with gzip.open(path) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield lines_of(unpacked(file)) if path.endswith(".zst") else file

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

def entries(path: str, names: tuple[str, ...]):
    """The rows of a Parquet file as dicts of those of the named columns that it has. OSError for a damaged
    one."""
    parquet = package("pyarrow.parquet", ".parquet")
    arrow = package("pyarrow", ".parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in names if name in file.schema_arrow.names]
            # without a column pyarrow gives no rows, but there are some
            if not columns:
                columns = None
            # a file may be larger than the memory
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                yield from batch.to_pylist()
    except arrow.ArrowException as e:
        # of several lines for some damages
        raise OSError(str(e).partition("\n")[0]) from None

def fault_of(value, name: str) -> str | None:
    """What is wrong with the field `name` as a text, None where nothing is."""
    if not isinstance(value, str):
        return f'has a "{name}" that is no string'
    try:
        # half a surrogate pair may come out of a JSON escape
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None

# --- documents ---

class Documents:
    """All documents of some sources, in order. manifest: what its "sources" records must still hold once a
    source is read; "revisions" are entered. text_key: the field of JSON lines and Parquet that holds the
    text. pairs: whether prompts with completions are welcome. skip_bad: count what is no document in
    `skipped`."""

    # what a user can do about a line that is no document
    repair = "mend or remove it, or say --skip_bad true"

    def __init__(self, sources: list[str], manifest: dict, text_key: str, pairs: bool, skip_bad: bool):
        self.sources = sources
        self.manifest = manifest
        self.text_key = text_key
        self.pairs = pairs
        self.skip_bad = skip_bad
        self.skipped = 0
        # what a line must be
        self.wanted = f'a JSON object whose "{text_key}" is a string'

    def read(self, first: int = 0):
        """((source, number), document) from source number `first` on."""
        for s in range(first, len(self.sources)):
            source = self.sources[s]
            number = -1
            path = fetch(source, self.manifest["revisions"])
            for number, document in enumerate(self._documents(path)):
                yield (s, number), document
            # a .gz of nothing, or blank lines only: `check_source` does not look that far
            if number < 0:
                raise UserError(f"{source} holds no document: leave it out, or give another file")
            # a log that still grows, say: what was written of it is a part that no run could make again
            if identity(source) != self.manifest["sources"].get(source):
                raise UserError(f"{source} changed while it was read: begin again once it is complete")

    def _documents(self, path: str):
        kind = kind_of(path)
        if kind == "parquet":
            rows = self._numbered(path, lambda: contextlib.nullcontext(self._rows(path)))
            found = (self._entry(entry, path, number) for number, entry in rows)
        elif kind == "txt":
            found = (self._piece(raw, path, number) for number, raw in pieces(self._lines(path)))
        else:
            found = (self._document(raw, path, number) for number, raw in self._lines(path) if raw.strip())
        return (document for document in found if document is not None)

    def _rows(self, path: str):
        return entries(path, (self.text_key, *Pair._fields))

    def _piece(self, raw: bytes, path: str, first: int) -> str | None:
        try:
            return raw.decode()
        # the line inside the piece
        except UnicodeDecodeError as e:
            return self._bad(path, first + raw.count(b"\n", 0, e.start), "is not UTF-8")

    def _document(self, raw: bytes, path: str, number: int) -> str | Pair | None:
        try:
            entry = json.loads(raw.decode())
        except UnicodeDecodeError:
            return self._bad(path, number, "is not UTF-8")
        # RecursionError: 100,000 brackets and no end
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            return self._bad(path, number, f"is not {self.wanted}")
        return self._entry(entry, path, number)

    def _entry(self, entry: dict, path: str, number: int) -> str | Pair | None:
        key = self.text_key
        # a text wins over a prompt beside it
        names = (key,)
        if key not in entry and all(name in entry for name in Pair._fields):
            if not self.pairs:
                return self._bad(path, number, "has a prompt and a completion, for which --rows N is needed")
            names = Pair._fields
        texts = []
        for name in names:
            if name not in entry:
                return self._bad(path, number, f'has no "{name}" key (--text_key names another)')
            fault = fault_of(entry[name], name)
            if fault:
                return self._bad(path, number, fault)
            texts.append(entry[name])
        return Pair(*texts) if len(texts) == 2 else texts[0]

    def _lines(self, path: str):
        """(number, line); from 1, as editors number them."""
        if path == "builtin":
            yield from enumerate(builtin_text().splitlines(True), 1)
            return
        for number, line in self._numbered(path, lambda: opened(path)):
            # editors of Windows put a byte-order mark in front, which is no text
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line

    def _numbered(self, path: str, open_file):
        number = 0
        try:
            with open_file() as content:
                for number, part in enumerate(content, 1):
                    yield number, part
        # a download that was cut, a .gz that is none, a disk that fails: what came before is good
        except (OSError, EOFError, zlib.error) as e:
            self._bad(path, number + 1, f"cannot be read ({e})")

    def _bad(self, path: str, number: int, fault: str):
        if not self.skip_bad:
            raise UserError(f"{path}:{number}: {fault}; {self.repair}")
        self.skipped += 1

class JsonLines(Documents):
    """Those of one file of JSON lines, which is read whole. UserError for a file that is none."""

    # nothing that is learned, or asked, is left out unseen
    repair = "mend or remove it"

    def __init__(self, path: str):
        if kind_of(path) != "json":
            raise UserError(f"{path} holds no JSON lines: give a .jsonl, also with .gz or .zst")
        check_source(path)
        manifest = {"sources": {path: identity(path)}, "revisions": {}}
        super().__init__([path], manifest, "text", pairs=True, skip_bad=False)
