"""files.py: files are whole or absent, a folder has one writer, nothing that is read can hang or exhaust."""
import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanolost import files
from nanolost.data import write_shard
from nanolost.errors import UserError
from nanolost.files import claim, plain_name, read_bounded, read_json, sha256_file, sync_folder, write_atomic

ROOT = Path(__file__).resolve().parents[1]

def names(folder) -> list[str]:
    return sorted(os.listdir(folder))

def failing(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return fail

def lowest_free_descriptor() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor

# --- writing ---

class Killed(BaseException):
    pass

WRITERS = pytest.mark.parametrize("write, expected", [
    (lambda path: write_shard(path, [9] * 50), 1024 + 100), (lambda path: write_atomic(path, b"whole"), 5)],
    ids=["shard", "small"])

@WRITERS
@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_writer_killed_at_any_point_leaves_the_old_file(tmp_path, monkeypatch, write, expected, point):
    def killed(*args):
        raise Killed
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, point, killed)
    with pytest.raises(Killed):
        write(str(path))
    assert path.read_bytes() == b"old"

@WRITERS
def test_a_file_gets_its_name_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch, write, expected):
    synced, at_rename = [], []
    fsync, replace = os.fsync, os.replace
    def fsync_seen(fd):
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)
    def replace_seen(source, target):
        at_rename.append((os.path.getsize(source), os.stat(source).st_ino in synced))
        replace(source, target)
    monkeypatch.setattr(os, "fsync", fsync_seen)
    monkeypatch.setattr(os, "replace", replace_seen)
    write(str(tmp_path / "a.bin"))
    assert at_rename == [(expected, True)]
    assert synced[-1] == os.stat(tmp_path).st_ino, "the folder is not synced after the rename"

def test_a_small_file_that_finds_the_disk_full_leaves_nothing_on_it(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(str(tmp_path / "a.json"), b"new")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"old"

def fsync_of_folders_fails(monkeypatch, number: int):
    fsync = os.fsync
    def failing_for_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", failing_for_folders)

@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF],
                         ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_a_folder_ends_no_run(tmp_path, monkeypatch, capfd, number):
    fsync_of_folders_fails(monkeypatch, number)
    sync_folder(str(tmp_path))
    write_atomic(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert capfd.readouterr() == ("", "")

@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_disk_that_fails_to_sync_a_folder_is_an_error(tmp_path, monkeypatch, number):
    fsync_of_folders_fails(monkeypatch, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomic(str(tmp_path / "a"), b"new")

def test_syncing_a_folder_leaves_no_descriptor_open(tmp_path, monkeypatch):
    free = lowest_free_descriptor()
    for number in (None, errno.EINVAL, errno.EIO):
        if number:
            monkeypatch.setattr(os, "fsync", failing(number))
        try:
            sync_folder(str(tmp_path))
        except OSError:
            assert number == errno.EIO
    assert lowest_free_descriptor() == free

@pytest.fixture
def umask():
    """umask(mask) for this test."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)

@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize("before", [0o600, 0o644, 0o777], ids=oct)
def test_every_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask, mask, before):
    umask(mask)
    (tmp_path / "library").write_bytes(b"private")
    os.chmod(tmp_path / "library", before)
    files.follow_umask(str(tmp_path / "library"))
    write_atomic(str(tmp_path / "small"), b"")
    write_shard(tmp_path / "shard", [1])
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("library", "small", "shard")}
    assert modes == {0o666 & ~mask}
    assert names(tmp_path) == ["library", "shard", "small"]
    assert os.umask(mask) == mask, "the umask of the process has changed"

def test_a_file_system_with_one_mode_for_all_files_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"")
    monkeypatch.setattr(os, "chmod", failing(errno.EPERM))
    files.follow_umask(str(tmp_path / "a"))

# --- one writer of a folder ---

HOLDER = """
import sys
from nanolost.files import claim
file = claim(sys.argv[1], "trains")
print("held", flush=True)
sys.stdin.read()
"""

def test_a_second_process_is_told_who_has_the_folder_and_gets_it_when_that_one_is_killed(tmp_path):
    folder = tmp_path / "a" / "b"
    command = [sys.executable, "-c", HOLDER, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        message = f"process {holder.pid} on {socket.gethostname()} trains in {folder}: stop it or use another"
        with pytest.raises(UserError) as caught:
            claim(str(folder), "trains")
        assert str(caught.value).startswith(message)
        holder.kill()
        holder.wait()
        claim(str(folder), "trains").close()

def test_a_lock_lasts_as_long_as_its_file_is_open(tmp_path):
    first = claim(str(tmp_path), "trains")
    free, caught = lowest_free_descriptor(), []
    for _ in range(2):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains in .*--out_dir") as error:
            claim(str(tmp_path), "trains")
        caught.append(error)                   # a traceback keeps what was open
    assert lowest_free_descriptor() == free
    first.close()
    second = claim(str(tmp_path), "trains")
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"
    second.close()

@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * 10**6], ids=["empty", "no text", "long"])
def test_a_lock_whose_file_says_nothing_of_use_is_still_a_lock(tmp_path, content):
    with claim(str(tmp_path), "trains"):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(UserError, match="process.* trains in .*--out_dir") as caught:
            claim(str(tmp_path), "trains")
        assert len(str(caught.value)) < 1000

@pytest.mark.parametrize("number", [
    errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EIO, errno.EBADF, errno.EACCES],
    ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_one_warning_and_no_other_run(tmp_path, monkeypatch, capfd, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        claim(str(tmp_path), "trains").close()
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("warning: ") and str(tmp_path) in err and os.strerror(number) in err

def test_a_lock_that_another_has_is_no_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EWOULDBLOCK))
    with pytest.raises(UserError, match="another process trains in"):
        claim(str(tmp_path), "trains")
    assert capfd.readouterr() == ("", "")

def test_a_folder_that_cannot_be_made_or_written_is_named_with_the_cause(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    for folder in ("file", "file/below", "locked"):
        with pytest.raises(UserError, match=rf"{folder} \((File exists|Not a dir|Is a dir).*--out_dir"):
            claim(str(tmp_path / folder), "trains")
    monkeypatch.setattr(os, "makedirs", failing(errno.EROFS))
    with pytest.raises(UserError, match=r"\(Read-only file system\): use another --out_dir"):
        claim(str(tmp_path / "new"), "trains")

def test_a_disk_that_is_full_when_the_lock_is_written_leaves_no_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(socket, "gethostname", failing(errno.ENOSPC))        # within the write
        with pytest.raises(UserError, match="cannot write to .*No space left") as caught:
            claim(str(tmp_path), "trains")
    claim(str(tmp_path), "trains").close()
    assert caught.value.__context__, "its traceback would hold a file that was left open"

def test_a_lock_that_is_a_link_empties_nobody_s_file(tmp_path):
    (tmp_path / "thesis").write_bytes(b"years")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(UserError, match="cannot write to"):
        claim(str(tmp_path / "out"), "trains")
    assert (tmp_path / "thesis").read_bytes() == b"years"

# --- reading ---

def no_files(folder) -> dict[str, str]:
    """Paths that are no regular file → why, in the error."""
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_bytes(b"{}")
    return {str(folder / "pipe"): "not a regular file", str(folder / "zero"): "not a regular file",
            "/dev/zero": "not a regular file", "/dev/null": "not a regular file", str(folder): "is a folder",
            str(folder / "dangling"): "No such file", str(folder / "loop"): "symbolic links",
            str(folder / "file" / "below"): "Not a directory", str(folder / ("x" * 300)): "too long",
            "a\0b": "null byte", "\ud800": "surrogates"}

def test_what_is_no_file_is_one_error_and_no_endless_wait(tmp_path):
    for path, why in no_files(tmp_path).items():
        with pytest.raises(UserError, match=why) as caught:
            read_json(path)
        assert str(caught.value).startswith("cannot read ")
        with pytest.raises((OSError, ValueError)):
            sha256_file(path)

def test_reading_leaves_no_descriptor_open(tmp_path):
    free = lowest_free_descriptor()
    for path in no_files(tmp_path):
        with pytest.raises(UserError):
            read_json(path)
    read_json(str(tmp_path / "file"))
    sha256_file(str(tmp_path / "file"))
    assert lowest_free_descriptor() == free

@pytest.mark.parametrize("limit", [0, 1, 9, 10])
def test_exactly_the_limit_is_read_and_no_byte_more(tmp_path, limit):
    path = tmp_path / "a"
    path.write_bytes(b"x" * limit)
    assert read_bounded(str(path), limit) == b"x" * limit
    path.write_bytes(b"x" * (limit + 1))
    with pytest.raises(UserError, match=f"cannot read .* more than {limit} bytes"):
        read_bounded(str(path), limit)

def test_a_file_far_over_the_limit_takes_no_memory(tmp_path):
    with open(tmp_path / "a.json", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(UserError, match="more than 16,777,216 bytes"):
        read_json(str(tmp_path / "a.json"))

VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.floats(allow_nan=False))

@settings(deadline=None)
@given(content=st.dictionaries(st.text(), VALUES, max_size=5), mark=st.booleans())
def test_an_object_is_read_as_it_was_written(tmp_path_factory, content, mark):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" * mark + json.dumps(content).encode())
    assert read_json(path) == content

NO_OBJECTS = {
    "empty": b"", "list": b"[]", "null": b"null", "text": b'"a"', "number": b"5", "cut": b'{"a": ',
    "two": b"{}{}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "latin-1": '{"é": 1}'.encode("latin-1"), "utf-16": '{"a": 1}'.encode("utf-16"), "nul": b"\0" * 100,
    "a number of too many digits": b'{"a": ' + b"1" * 10_000 + b"}",
}

@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_what_is_no_object_is_one_line_with_the_path(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"cannot read {path}: ") and "\n" not in str(caught.value)

@settings(deadline=None)
@given(content=st.binary(max_size=50))
def test_no_bytes_at_all_make_another_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except UserError as e:
        assert str(e).startswith(f"cannot read {path}: ")

@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_the_digest_is_that_of_all_bytes(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()

@settings(deadline=None)
@given(name=st.text(st.sampled_from("./\\a\n\0~é"), max_size=6) | st.none() | st.integers() | st.just(["a"]))
@example("..")
@example(".")
@example("")
@example("/dev/zero")
@example("../x")
@example("a/b")
@example("train_00000.bin")
def test_a_plain_name_stays_in_its_folder(name):
    try:
        assert plain_name(name, "manifest.json") == name
    except UserError as e:
        assert str(e).isprintable() and str(e).startswith("manifest.json names the file ")
        harmless = isinstance(name, str) and not set(name) & set("/\\\n\0") and name.strip(".")
        assert not harmless, "a plain name was refused"
    else:
        folder = "/a/b"
        assert os.path.dirname(os.path.normpath(os.path.join(folder, name))) == folder

def test_a_tilde_is_expanded_and_nothing_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expanded("~/data/*.jsonl") == "/home/me/data/*.jsonl"
    assert files.expanded("data/~/$HOME") == "data/~/$HOME"
