"""Files that are written whole or not at all."""
import hashlib
import os

def sync_folder(path: str):
    """fsync a folder: without it a power cut may undo a rename inside."""
    fd = os.open(path or ".", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

def publish(file, path: str):
    """Give an open temporary file its final name, so that `path` holds all of it or what it held before."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(os.path.dirname(path))

def write_atomic(path: str, data: bytes):
    file = open(f"{path}.tmp", "wb")
    file.write(data)
    publish(file, path)

def sha256_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

