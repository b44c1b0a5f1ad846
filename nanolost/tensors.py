"""Safetensors files, one tensor at a time: read whole or by rows, written in a stream."""
import hashlib
import json
import math
import os

import torch
from safetensors import SafetensorError, safe_open

from nanolost.errors import UserError
from nanolost.files import open_regular

# the format's names, from the last to the first in a file: its library sorts so, and then by name
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint16: "U16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}

# --- writing ---

def file_order(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names in the order in which a file has them."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
    return sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name))

def header_of(tensors: dict[str, torch.Tensor], notes: dict[str, str]) -> bytes:
    """What a file of `tensors`, of which only shapes and dtypes are looked at, begins with."""
    # the library writes several notes in an order that varies: equal states would differ in their bytes
    assert len(notes) == 1, notes
    content = {"__metadata__": notes}
    end = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        start = end
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
        shape = list(tensor.shape)
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    # numbers begin at a multiple of 8
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

class Writer:
    """A safetensors file that takes `tensors` one after the other, in `file_order`, and counts its sha256 on
    the way. The bytes are those that the format's own library writes."""

    def __init__(self, path: str, tensors: dict[str, torch.Tensor], notes: dict[str, str]):
        self.path = path
        self.digest = hashlib.sha256()
        self.file = open(path, "wb", buffering=0)
        self.write(header_of(tensors, notes))

    def write(self, data):
        # unbuffered, so that a full disk is felt here; the system may take a part at a time
        view = memoryview(data).cast("B")
        self.digest.update(view)
        while view:
            view = view[self.file.write(view):]

    def put(self, tensor: torch.Tensor):
        # as bytes, since numpy knows no bfloat16
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self.write(flat.view(torch.uint8).numpy())

    def close(self) -> str:
        """The file's sha256, once it is on the disk for certain."""
        os.fsync(self.file.fileno())
        self.file.close()
        return self.digest.hexdigest()

def write_tensors(folder: str, name: str, tensors: dict[str, torch.Tensor], notes: dict[str, str]):
    """One safetensors file; notes: its metadata."""
    writer = Writer(os.path.join(folder, name), tensors, notes)
    for key in file_order(tensors):
        writer.put(tensors[key])
    writer.close()

# --- reading ---

class TensorFiles:
    """Tensors by name in some files, each read when it is asked for, on the CPU. where: path by name."""

    def __init__(self, where: dict[str, str]):
        self.where = where
        self.files = {}

    @classmethod
    def of(cls, path: str) -> "TensorFiles":
        """All tensors of one file. UserError for a file that is none of tensors."""
        found = cls({})
        found.where = dict.fromkeys(found.open(path).keys(), path)
        return found

    def open(self, path: str):
        # a header is read once: 7b has 100 KB of it, and a resume asks for 2,000 tensors
        if path not in self.files:
            try:
                # the library would wait at a pipe
                open_regular(path).close()
                self.files[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as e:
                raise UserError(f"cannot read {path}: {e}") from None
        return self.files[path]

    def __iter__(self):
        return iter(self.where)

    def __contains__(self, name) -> bool:
        return name in self.where

    def notes(self, name: str) -> dict[str, str]:
        return self.open(name).metadata() or {}

    def shape(self, name: str) -> torch.Tensor:
        """A tensor of the meta device, with shape and dtype."""
        part = self.open(self.where[name]).get_slice(name)
        shape = part.get_shape()
        # of no dimension there is no slice
        dtype = (part[:0] if shape else self.read(name)).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or these rows of it: a copy, since a mapped file keeps its room on the disk if it is
        deleted."""
        file = self.open(self.where[name])
        if rows is None or rows == slice(None):
            return file.get_tensor(name).clone()
        return file.get_slice(name)[rows].clone()
