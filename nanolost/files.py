"""Files that are written whole or not at all, folders with one writer, and reading that nothing can hang or
exhaust: what the commands do to a disk. No torch here."""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import sys

from nanolost.errors import UserError

# what file systems answer that cannot sync a folder (SMB, some FUSE and NFS): the rename itself has succeeded
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
CHUNK = 1 << 20                                # bytes that are hashed at once
JSON_LIMIT = 16 << 20                          # bytes: a manifest of 16,000 shards has 4 MB

def expanded(path: str) -> str:
    """`path` with ~ and ~user replaced: a shell leaves them alone in quotes and behind --flag=."""
    return os.path.expanduser(path)

# --- writing ---

def sync_folder(path: str):
    """fsync a folder: without it a power cut may undo a rename inside."""
    folder = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as e:
        if e.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)

def publish(file, path: str):
    """Give an open temporary file its final name, so that `path` holds all of it or what it held before."""
    # in this order: a name must not reach the disk before the bytes that it stands for
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(os.path.dirname(path))

def write_atomic(path: str, data: bytes):
    """Write a file of which nobody ever sees a part. An OSError leaves what `path` held before."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            publish(file, path)
    except OSError:
        # a full disk: the part that was written would keep it full
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise

def follow_umask(path: str):
    """Give a file the mode that `open` would have given it: safetensors' writer makes private ones (0600),
    which a colleague or a server cannot read."""
    probe = f"{path}.tmp"
    # os.umask can only be read by setting it, which files that other threads make meanwhile would feel;
    # a new file shows it, and a folder's default access list as well
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        os.remove(probe)
    # FAT and some network file systems have one mode for all files and refuse another
    with contextlib.suppress(PermissionError):
        os.chmod(path, mode)

@contextlib.contextmanager
def ended_by_signals():
    """SIGTERM and the like end as Ctrl-C does, so that what is half-made is removed."""
    def end(number, frame):
        raise KeyboardInterrupt
    before = {}
    with contextlib.suppress(ValueError):
        # a notebook's own thread has no signals
        for number in signal.SIGTERM, signal.SIGHUP:
            # nohup has it ignored, and wants it to stay so
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, end) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# --- one writer of a folder ---

def claim(folder: str, doing: str, flag: str = "--out_dir"):
    """Make `folder` and lock it: the lock lasts as long as the returned file is open, or until this process
    ends in whatever way. doing: what the holder of such a lock does, for the error: "trains".
    flag: the one that names the folder.

    UserError where another process has the lock, or the folder cannot be made or written."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a+", errors="replace", opener=_open_own)
    except OSError as e:
        raise _unwritable(folder, e, flag) from None
    try:
        _lock(file, folder, doing, flag)
        # for a person who wonders who holds it; the lock itself needs no content
        file.truncate(0)
        print(f"{os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    except OSError as e:
        file.close()
        raise _unwritable(folder, e, flag) from None
    except UserError:
        file.close()
        raise
    return file

def _open_own(path: str, flags: int) -> int:
    # the file is emptied: a link would empty somebody else's
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)

def _lock(file, folder: str, doing: str, flag: str):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # EWOULDBLOCK: the only answer that means another holder
        file.seek(0)
        owner = file.read(200).strip()
        process = f"process {owner}" if owner else "another process"
        raise UserError(f"{process} {doing} in {folder}: stop it or use another {flag}") from None
    except OSError as e:
        # Lustre without -o flock, some FUSE and NFS servers: ENOTSUP, ENOLCK, ENOSYS, EINVAL, EIO
        warning = f"warning: the file system of {folder} has no locks ({e.strerror}): nothing stops a second"
        with contextlib.suppress(OSError):
            print(warning, "command from writing there", file=sys.stderr, flush=True)

def _unwritable(folder: str, error: OSError, flag: str) -> UserError:
    return UserError(f"cannot write to {folder} ({error.strerror}): use another {flag}")

# --- reading ---

def open_regular(path: str):
    """Open a regular file to read bytes. OSError for anything else: a pipe has no end that comes by itself,
    /dev/zero has none at all."""
    # without O_NONBLOCK opening a pipe waits for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    raise OSError(errno.EINVAL, "it is not a regular file", path)

def sha256_of(file) -> str:
    """Digest of an open file from its start, in pieces."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()

def sha256_file(path: str) -> str:
    # a link to /dev/zero under a shard's name would be hashed for ever
    with open_regular(path) as file:
        return sha256_of(file)

def read_bounded(path: str, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. UserError for any other."""
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        # a NUL or half a surrogate pair in the name
        raise UserError(f"cannot read {path!r}: {e}") from None
    if len(data) > limit:
        raise UserError(f"cannot read {path}: it has more than {limit:,} bytes")
    return data

def read_present(folder: str, names, limit: int) -> dict[str, bytes]:
    """Those of the files `names` that the folder has, each of at most `limit` bytes."""
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            found[name] = read_bounded(path, limit)
    return found

def parse_json(data: bytes, path: str) -> dict:
    """The object in `data`, which came from `path`. UserError for anything that is no JSON object."""
    try:
        # utf-8-sig: editors of Windows put a byte-order mark in front
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path}: byte {e.start} is not UTF-8") from None
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deep") from None
    except ValueError as e:
        raise UserError(f"cannot read {path}: it is not JSON ({e})") from None
    # [], null and "text" are JSON too, and none has keys
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return content

def read_json(path: str, limit: int = JSON_LIMIT) -> dict:
    """The object in a JSON file of at most `limit` bytes. UserError for anything else."""
    return parse_json(read_bounded(path, limit), path)

def plain_name(name, where: str) -> str:
    """`name` if it is the bare name of a file, which no path leads out of a folder with. where: the file
    that names it. UserError for anything else."""
    # a line break in it would tear the error line, a backslash is a path elsewhere
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not plain or "/" in name or "\\" in name:
        raise UserError(f"{where} names the file {name!r:.80}: it may only name files of its own folder")
    return name
