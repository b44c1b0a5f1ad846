"""Tensors in mapped files of a folder: what is too much for the memory at once. The system keeps in memory
what has room there, and the rest on the disk."""
import os

import torch
from torch import Tensor

class Shelf:
    """shelf["name"] = tensor puts a copy on the disk, shelf["name"] is that copy: to be changed in place."""

    def __init__(self, folder: str):
        self.folder = folder
        # shape and dtype by name: the files are plain bytes
        self.kinds = {}

    def __setitem__(self, name: str, tensor: Tensor):
        tensor = tensor.detach()
        # an empty file cannot be mapped
        size = max(1, tensor.nbytes)
        # mapped writes of a full disk would end the process by a signal: room first
        with open(self._path(name), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        self.kinds[name] = tensor.shape, tensor.dtype
        copy = self[name]
        copy.copy_(tensor)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.kinds[name]
        path = self._path(name)
        # shared: what is written into the tensor is written into the file
        flat = torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype)
        return flat.view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.kinds

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.bin")
