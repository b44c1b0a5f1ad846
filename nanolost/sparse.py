"""Matrices with many zeros, packed for decoding on a CPU.

A decode step reads every weight once and computes little with it, so that its time is that of reading.
Packed, a weight is a bit, and two or four bytes more where it is kept: at 50 % zeros 0.56 of the bytes of
bfloat16, at 70 % 0.36. The product of a few columns puts the kept values in their places in registers
(`sparse.cpp`); for more of them, as in a prefill, some rows at a time become dense again.

    pack(model)                                # after loading, before compile_step

On disk such a model is a plain one with exact zeros. Nothing here learns."""
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanolost.checkpoint import warn_once

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sparse.cpp")
TORCH = os.path.dirname(os.path.abspath(torch.__file__))

# instructions that the kernel is made of, as Linux names them in /proc/cpuinfo: expansion of 32-bit values is
# in the first AVX-512 (2017), of 16-bit values in VBMI2, products of bfloat16 in BF16 (both: Sapphire Rapids,
# Zen 4)
NEEDED = {
    torch.float32: {"avx512f", "popcnt"},
    torch.bfloat16: {"avx512f", "popcnt", "avx512bw", "avx512_vbmi2", "avx512_bf16"},
}
# behind the values, because the kernel loads 64 bytes at a time: enough in either format
PAD = 64
# weights that are unpacked at once: 8 MB in bfloat16, which a cache holds and no allocator gives back
UNPACKED = 1 << 22

# --- the kernel: compiled once, by the system's compiler ---

class NoKernel(Exception):
    """Why there is none, for one line."""

def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """What this CPU can do, in Linux's words; empty elsewhere."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split()[2:])
    except OSError:
        pass
    return set()

def cache_folder() -> str:
    """Where the compiled kernel stays, for all commands of a user."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "nanolost")

def compiler() -> list[str]:
    """The C++ compiler: CXX, which may hold flags too, or what a system calls it."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in (given, ["c++"], ["g++"], ["clang++"]):
        if words and shutil.which(words[0]):
            return words
    raise NoKernel("there is no C++ compiler (c++, g++ or clang++; CXX names another)")

def run(command: list[str]) -> str:
    """What a command prints; NoKernel with its last line where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NoKernel(f"{command[0]} failed: {e}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise NoKernel(f"{command[0]} failed: {lines[0]:.200}")
    return done.stdout

def build_command(flags: set[str]) -> list[str]:
    """The command that compiles the kernel for a CPU with these flags, without the name of its output."""
    machine = ["-m" + flag.replace("_", "") for flag in sorted(flags)]
    return [
        *compiler(), "-std=c++17", "-O3", "-fPIC", "-shared", *machine,
        # in gcc's own header of AVX-512
        "-Wno-maybe-uninitialized",
        f"-I{TORCH}/include", SOURCE,
        f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10",
    ]

def key_of(command: list[str]) -> str:
    """Another one for whatever would make another library."""
    digest = hashlib.sha256()
    with open(SOURCE, "rb") as file:
        digest.update(file.read())
    words = [*command, run([command[0], "--version"]), torch.__version__]
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:16]

def built(flags: set[str]) -> str:
    """The path of the compiled kernel, which is compiled where it is not yet there: 2 s."""
    command = build_command(flags)
    folder = cache_folder()
    path = os.path.join(folder, f"sparse_{key_of(command)}.so")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # who may write there may have their code run here
        if os.stat(folder).st_uid not in (0, os.geteuid()):
            raise NoKernel(f"{folder} belongs to another user: set XDG_CACHE_HOME")
        if not os.path.exists(path):
            # several processes may: the last rename wins, and all have made the same
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp_") as temporary:
                output = os.path.join(temporary, "sparse.so")
                run([*command, "-o", output])
                os.replace(output, path)
    except OSError as e:
        raise NoKernel(f"{folder}: {e.strerror or e} (XDG_CACHE_HOME names another place)") from None
    return path

# what loads it defines what it computes: shapes alone are enough to trace a model
torch.library.define(
    "nanolost::packed_linear", "(Tensor x, Tensor[] bits, Tensor[] values, Tensor[] start) -> Tensor[]"
)
torch.library.define("nanolost::unpack", "(Tensor bits, Tensor values, Tensor start, int width) -> Tensor")

@torch.library.register_fake("nanolost::packed_linear")
def _(x, bits, values, start):
    return [x.new_empty(*x.shape[:-1], one.shape[0]) for one in bits]

@torch.library.register_fake("nanolost::unpack")
def _(bits, values, start, width):
    return values.new_empty(bits.shape[0], width)

@functools.cache
def load_kernel() -> frozenset[torch.dtype]:
    """The dtypes that the kernel computes with on this machine. None: one line on stderr says why."""
    flags = cpu_flags()
    dtypes = [dtype for dtype, needed in NEEDED.items() if needed <= flags]
    try:
        if not dtypes:
            raise NoKernel("this CPU has no AVX-512")
        needed = set.union(*(NEEDED[dtype] for dtype in dtypes))
        torch.ops.load_library(built(needed))
    # a file that is no library (any more) is an OSError
    except (NoKernel, OSError) as e:
        warn_once(f"no kernel for weights with zeros: {e}")
        return frozenset()
    return frozenset(dtypes)

# --- packing ---

class Packed(NamedTuple):
    bits: Tensor                         # (out, ⌈in / 32⌉) int32, 1 = kept, lowest bit first
    values: Tensor                       # (kept + PAD,) row by row
    start: Tensor                        # (out,) int64, where a row's values begin

def pack_matrix(weight: Tensor) -> Packed:
    """A matrix (out, in) without its zeros. -0 is one of them."""
    kept = weight != 0
    count = kept.sum(1)
    start = count.cumsum(0) - count
    total = int(count.sum())
    values = weight.new_zeros(total + PAD)
    torch.masked_select(weight, kept, out=values[:total])
    # whole words, the rest of which are zeros
    padded = F.pad(kept, (0, -weight.shape[1] % 32))
    bits = np.packbits(padded.numpy(), axis=1, bitorder="little")
    return Packed(torch.from_numpy(bits).view(torch.int32), values, start)

class PackedLinear(nn.Module):
    """An nn.Linear, packed; not to be trained. Up to `columns` rows of x take the kernel."""

    def __init__(self, linear: nn.Linear, columns: int):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.columns = columns
        self.bias = linear.bias
        for name, part in pack_matrix(linear.weight.detach())._asdict().items():
            self.register_buffer(name, part)

    def blocks(self):
        """The matrix dense again, some rows at a time."""
        rows = max(1, UNPACKED // self.in_features)
        for bits, start in zip(self.bits.split(rows), self.start.split(rows), strict=True):
            yield torch.ops.nanolost.unpack.default(bits, self.values, start, self.in_features)

    @property
    def weight(self) -> Tensor:
        """Made anew each time."""
        return torch.cat(list(self.blocks()))

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self.columns * self.in_features:
            y, = torch.ops.nanolost.packed_linear.default(x, [self.bits], [self.values], [self.start])
        else:
            y = torch.cat([F.linear(x, block) for block in self.blocks()], dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
