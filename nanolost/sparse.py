"""Matrices with many zeros, packed for decoding on a CPU.

A decode step reads every weight once and computes little with it, so that its time is that of reading.
Packed, a weight is a bit, and two or four bytes more where it is kept: at 50 % zeros 0.56 of the bytes of
bfloat16, at 70 % 0.36. The product of a few columns puts the kept values in their places in registers
(`sparse.cpp`); for more of them, as in a prefill, some rows at a time become dense again.

    pack(model)                                # after loading, before compile_step

On disk such a model is a plain one with exact zeros. Nothing here learns."""
import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lost import ACTIVATIONS
from nanolost.checkpoint import warn_once

SOURCE = os.path.join(os.path.dirname(__file__), "sparse.cpp")
TORCH = os.path.dirname(torch.__file__)

# instructions that the kernel is made of, as Linux names them in /proc/cpuinfo: expansion of 32-bit values is
# in the first AVX-512 (2017), of 16-bit values in VBMI2, products of bfloat16 in BF16 (both: Sapphire Rapids,
# Zen 4)
NEEDED = {
    torch.float32: {"avx512f", "popcnt"},
    torch.bfloat16: {"avx512f", "popcnt", "avx512bw", "avx512_vbmi2", "avx512_bf16"},
}
# where counting bits beats the instruction for it, by vendor: see `expand` in sparse.cpp
RANKS = {"avx512_vpopcntdq", "avx512_bitalg"}
# behind the values, because the kernel loads 64 bytes at a time: enough in either format
PAD = 64
# rows of a group and weights of a word of bits, as in sparse.cpp
ROWS = 4
WORD = 32
# bytes of a piece of memory that packed matrices share, and what each of their parts begins at a multiple of
PIECE = 32 << 20
LINE = 64
# weights that are unpacked at once: 8 MB in bfloat16, which a cache holds and no allocator gives back
UNPACKED = 1 << 22

# seconds that the compiler may take for what takes 2
PATIENCE = 300

# --- the kernel: compiled once, by the system's compiler ---

class NoKernel(Exception):
    """Why there is none, for one line."""

def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """Its vendor and what this CPU can do, in Linux's words; empty elsewhere."""
    found = set()
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                name, _, words = line.partition(":")
                if name.strip() in ("vendor_id", "flags"):
                    found.update(words.split())
                # one core is like the other
                if name.strip() == "flags":
                    break
    except OSError:
        pass
    return found

def cache_folder() -> str:
    """Where the compiled kernel stays, for all commands of a user."""
    home = os.environ.get("XDG_CACHE_HOME")
    # set and empty counts as not set (the XDG base directory specification)
    if not home:
        home = os.path.expanduser("~/.cache")
    return os.path.join(home, "nanolost")

def compiler() -> list[str]:
    """The C++ compiler: CXX, which may hold flags too, or what a system calls it."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in (given, ["c++"], ["g++"], ["clang++"]):
        if words and shutil.which(words[0]):
            return words
    raise NoKernel("there is no C++ compiler (c++, g++ or clang++; CXX names another)")

def run(command: list[str]) -> str:
    """What a command prints; NoKernel with its first error where it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NoKernel(f"{command[0]} failed: {e}") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        error = next((line for line in lines if "error" in line), "no message")
        raise NoKernel(f"{command[0]} failed: {error:.200}")
    return done.stdout

def build_command(flags: set[str]) -> list[str]:
    """The command that compiles the kernel for a CPU with these flags, without the name of its output."""
    # gcc leaves out the underscores that Linux has
    machine = [f"-m{flag}".replace("_", "") for flag in sorted(flags)]
    if RANKS <= flags:
        machine.append("-DRANKS")
    return [
        *compiler(),
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-shared",
        *machine,
        f"-I{TORCH}/include",
        SOURCE,
        f"-L{TORCH}/lib",
        "-ltorch_cpu",
        "-lc10",
    ]

def key_of(command: list[str]) -> str:
    """Another one for whatever would make another library."""
    digest = hashlib.sha256()
    with open(SOURCE, "rb") as file:
        digest.update(file.read())
    version = run([command[0], "--version"])
    text = "\0".join([*command, version, torch.__version__])
    digest.update(text.encode())
    return digest.hexdigest()[:16]

@contextlib.contextmanager
def one_at_a_time(folder: str):
    """Others of this user wait until the first has compiled."""
    with open(os.path.join(folder, ".lock"), "a") as file:
        # a file system without locks: each compiles, and the last rename wins with the same file
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

def compile_to(path: str, command: list[str]):
    """A file that is there as a whole or not at all."""
    folder, name = os.path.split(path)
    with one_at_a_time(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".tmp_") as temporary:
        if os.path.exists(path):
            return
        output = os.path.join(temporary, name)
        run([*command, "-o", output])
        os.replace(output, path)

def built(flags: set[str]) -> str:
    """The path of the compiled kernel, which is compiled where it is not yet there: 2 s."""
    command = build_command(flags)
    folder = cache_folder()
    name = f"sparse_{key_of(command)}.so"
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # whoever may write there may have their code run here
        owner = os.stat(folder).st_uid
        if owner not in (0, os.geteuid()):
            raise NoKernel(f"{folder} belongs to another user: set XDG_CACHE_HOME")
        if not os.path.exists(path):
            compile_to(path, command)
    except OSError as e:
        raise NoKernel(f"{folder}: {e.strerror or e} (XDG_CACHE_HOME names another place)") from None
    return path

# What the library computes, a matrix in three parts each (see `Packed`): products of one x with several
# matrices, and a dense matrix
SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor[] bits, Tensor[] values, Tensor[] start, int[] rows) -> Tensor[]",
    "unpack": "(Tensor bits, Tensor values, Tensor start, int width) -> Tensor",
}
for name, schema in SCHEMAS.items():
    torch.library.define(f"nanolost::{name}", schema)

packed_linear = torch.ops.nanolost.packed_linear.default
unpack = torch.ops.nanolost.unpack.default

@torch.library.register_fake("nanolost::packed_linear")
def _(x, bits, values, start, rows):
    *shape, _ = x.shape
    return [x.new_empty(*shape, number) for number in rows]

@torch.library.register_fake("nanolost::unpack")
def _(bits, values, start, width):
    return values.new_empty(ROWS * len(bits), width)

@functools.cache
def load_kernel() -> frozenset[torch.dtype]:
    """The dtypes that the kernel computes with on this machine. None: one line on stderr says why."""
    flags = cpu_flags()
    dtypes = [dtype for dtype, needed in NEEDED.items() if needed <= flags]
    try:
        if not dtypes:
            raise NoKernel("this CPU has no AVX-512")
        needed = set.union(*(NEEDED[dtype] for dtype in dtypes))
        if "AuthenticAMD" in flags and RANKS <= flags:
            needed |= RANKS
        torch.ops.load_library(built(needed))
    # a file that is no library (any more) is an OSError
    except (NoKernel, OSError) as e:
        (least, _), = COLUMNS[CSRLinear][torch.float32]
        warn_once(f"weights with zeros are not packed ({e}): float32 from {least:.0%} zeros on takes torch's "
                  "CSR, all others stay dense")
        return frozenset()
    return frozenset(dtypes)

# --- packing ---

class Packed(NamedTuple):
    """Rows in groups of four, and of a group 32 weights of each row in turn: see sparse.cpp."""

    bits: Tensor                         # (groups, ⌈in / 32⌉, 4) int32, 1 = kept, lowest bit first
    values: Tensor                       # (kept + PAD,)
    start: Tensor                        # (groups,) int64, where a group's values begin

def pack_matrix(weight: Tensor) -> Packed:
    """A matrix (out, in) without its zeros. -0 is one of them."""
    out, width = weight.shape
    # whole words and whole groups, the rest of which are zeros
    weight = F.pad(weight, (0, -width % WORD, 0, -out % ROWS))
    words = weight.shape[1] // WORD
    cells = weight.view(-1, ROWS, words, WORD).transpose(1, 2)
    kept = cells != 0                                                          # (groups, words, 4, 32)
    count = kept.sum((1, 2, 3))
    start = count.cumsum(0) - count
    total = int(count.sum())
    values = weight.new_zeros(total + PAD)
    torch.masked_select(cells, kept, out=values[:total])
    octets = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    bits = torch.from_numpy(octets).view(torch.int32)
    return Packed(bits.squeeze(-1), values, start)

class SparseLinear(nn.Module):
    """Stands for an nn.Linear, not to be trained. Up to `columns` rows of x take `product`; for more, as in a
    prefill, the matrix becomes dense again, a block of rows at a time."""

    def __init__(self, linear: nn.Linear, columns: int):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.columns = columns
        self.bias = linear.bias
        weight = linear.weight.detach()
        for name, part in self.parts(weight).items():
            self.register_buffer(name, part)

    @property
    def weight(self) -> Tensor:
        """Dense, made anew each time."""
        blocks = list(self.blocks())
        return torch.cat(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self.columns * self.in_features:
            y = self.product(x)
        else:
            pieces = [F.linear(x, block) for block in self.blocks()]
            y = torch.cat(pieces, dim=-1)
        if self.bias is None:
            return y
        return y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

class PackedLinear(SparseLinear):
    """By our kernel."""

    @staticmethod
    def parts(weight: Tensor) -> dict[str, Tensor]:
        return pack_matrix(weight)._asdict()

    def blocks(self):
        groups = max(1, UNPACKED // (ROWS * self.in_features))
        left = self.out_features
        starts = self.start.split(groups)
        for bits, start in zip(self.bits.split(groups), starts, strict=True):
            block = unpack(bits, self.values, start, self.in_features)
            # the last group may be short
            yield block[:left]
            left -= len(block)

    def product(self, x: Tensor) -> Tensor:
        y, = packed_linear(x, [self.bits], [self.values], [self.start], [self.out_features])
        return y

# --- without a kernel: torch's products of compressed rows, which are MKL's ---

@contextlib.contextmanager
def quiet():
    """Without torch's warning that these matrices are "in beta state"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

@quiet()
def csr(crow: Tensor, col: Tensor, values: Tensor, width: int) -> Tensor:
    size = (len(crow) - 1, width)
    return torch.sparse_csr_tensor(crow, col, values, size, check_invariants=False)

# operations of their own: a traced model holds no sparse tensor

@torch.library.custom_op("nanolost::csr_linear", mutates_args=())
def csr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """x (..., in) → (..., out)."""
    *rows, width = x.shape
    columns = x.reshape(-1, width).T
    matrix = csr(crow, col, values, width)
    y = matrix @ columns                                                                   # (out, n)
    return y.T.contiguous().view(*rows, -1)

@csr_linear.register_fake
def _(x, crow, col, values):
    *rows, _ = x.shape
    return x.new_empty(*rows, len(crow) - 1)

@torch.library.custom_op("nanolost::csr_dense", mutates_args=())
def csr_dense(crow: Tensor, col: Tensor, values: Tensor, width: int) -> Tensor:
    return csr(crow, col, values, width).to_dense()

@csr_dense.register_fake
def _(crow, col, values, width):
    return values.new_empty(len(crow) - 1, width)

class CSRLinear(SparseLinear):
    """By MKL, in float32: 8 bytes a kept weight. From 80 % zeros on it is faster than the eager product, from
    88 % on than the compiled one too."""

    @staticmethod
    @quiet()
    def parts(weight: Tensor) -> dict[str, Tensor]:
        matrix = weight.to_sparse_csr()
        # MKL takes indices of 32 bits only
        return {
            "crow": matrix.crow_indices().int(),
            "col": matrix.col_indices().int(),
            # a view of the matrix would be traced as one
            "values": matrix.values().clone(),
        }

    def blocks(self):
        yield csr_dense(self.crow, self.col, self.values, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        return csr_linear(x, self.crow, self.col, self.values)

# --- which form a matrix takes ---

# Of each form and dtype (share of zeros, columns): from so many zeros on, up to so many columns, it is faster
# than dense, compiled or not, in every shape that was measured (docs/finetuning.md). A table and never a race
# at the start, so that the same command always computes the same numbers
COLUMNS = {
    PackedLinear: {
        torch.float32: ((0.39, 16),),
        torch.bfloat16: ((0.39, 4), (0.49, 8)),
    },
    CSRLinear: {torch.float32: ((0.88, 16),)},
}

def most_columns(form: type[SparseLinear], dtype: torch.dtype, zeros: float) -> int:
    """How many columns such a matrix multiplies faster than a dense one; 0 for none."""
    most = 0
    for least, columns in COLUMNS[form].get(dtype, ()):
        if zeros >= least:
            most = columns
    return most

def semi_structured(linear: nn.Linear) -> nn.Linear | None:
    """The same layer with its weight in torch's form for sparse tensor cores (Ampere and later, in half
    precision), where every four weights of a row have two zeros."""
    weight = linear.weight.detach()
    rows, width = weight.shape
    # what torch's kernels ask for (torch.sparse.SparseSemiStructuredTensor)
    if weight.dtype not in (torch.bfloat16, torch.float16) or rows % 32 or width % 64:
        return None
    kept = (weight.view(-1, 4) != 0).sum(1)
    if kept.amax() > 2:
        return None
    packed = torch.sparse.to_sparse_semi_structured(weight)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    return linear

def pack_linear(linear: nn.Module, columns: int) -> nn.Module | None:
    """The faster form of its weight and bias for a decode step of `columns` texts; None: dense is the
    fastest."""
    weight = linear.weight
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) >= (8, 0):
        return semi_structured(linear)
    if weight.device.type != "cpu":
        return None
    zero = (weight == 0).sum().item()
    zeros = zero / max(1, weight.numel())
    most = most_columns(PackedLinear, weight.dtype, zeros)
    if columns <= most and weight.dtype in load_kernel():
        return PackedLinear(linear, most)
    most = most_columns(CSRLinear, weight.dtype, zeros)
    if columns <= most and torch.backends.mkl.is_available():
        return CSRLinear(linear, most)
    return None

class WithLowRank(nn.Module):
    """Stands for a SparseLowRankLinear: x weightᵀ by one of the forms above, and σ(x Aᵀ) Bᵀ."""

    def __init__(self, layer: nn.Module, weight: nn.Module):
        super().__init__()
        self.weight = weight
        self.A = layer.A
        self.B = layer.B
        # a folder's own lost.py may be from before there was one
        self.activation = ACTIVATIONS[getattr(layer, "activation", "none")]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(F.linear(x, self.A))
        return self.weight(x) + F.linear(inner, self.B)

def pack_low_rank(layer: nn.Module, columns: int) -> nn.Module | None:
    weight = pack_linear(layer, columns)
    if weight is None or not layer.rank:
        return weight
    return WithLowRank(layer, weight)

# from a layer and a number of columns; None: it stays as it is
Form = Callable[[nn.Module, int], nn.Module | None]
# by file and class of the layer, since a folder brings its own copy of lost.py to transformers; a kind that
# holds such a matrix adds a function of its own
FORMS: dict[tuple[str, str], Form] = {
    ("linear", "Linear"): pack_linear,
    ("lost", "SparseLowRankLinear"): pack_low_rank,
}

def form_of(module: nn.Module) -> Form | None:
    kind = type(module)
    file = kind.__module__.rpartition(".")[2]
    return FORMS.get((file, kind.__name__))

def pack_inside(parent: nn.Module, columns: int, holders: Counter):
    for name, module in list(parent.named_children()):
        form = form_of(module)
        own = module.parameters(recurse=False)
        # a tied head stays in memory as the embedding: packed, it would only be there twice
        tied = any(holders[p] > 1 for p in own)
        layer = None
        if form is not None and not tied:
            layer = form(module, columns)
        if layer is not None:
            parent.set_submodule(name, layer)
        else:
            pack_inside(module, columns, holders)

def move_together(layers: list[PackedLinear]):
    """Give the parts of these layers one piece of memory. Linux backs it by pages of 2 MB, so that reading
    them waits for fewer page tables: numpy asks for those, torch only under THP_MEM_ALLOC_ENABLE."""
    places = [(layer, name) for layer in layers for name in Packed._fields]
    parts = [getattr(layer, name) for layer, name in places]
    sizes = [-(-part.nbytes // LINE) * LINE for part in parts]
    piece = torch.from_numpy(np.empty(sum(sizes), dtype=np.uint8))
    for (layer, name), part, room in zip(places, parts, piece.split(sizes), strict=True):
        own = room[:part.nbytes].view(part.dtype).view(part.shape)
        setattr(layer, name, own.copy_(part))

def move_all(model: nn.Module):
    """Never more than a piece, or a matrix, twice in memory."""
    layers = []
    size = 0
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layers.append(layer)
            size += sum(part.nbytes for part in layer.buffers())
        if size >= PIECE:
            move_together(layers)
            layers = []
            size = 0
    move_together(layers)

@torch.no_grad()
def pack(model: nn.Module, columns: int = 1) -> nn.Module:
    """Give every layer the form in which it decodes `columns` texts at once the fastest, in place and one by
    one: a model without zeros stays as it is. Call it once the model has its device and dtype, and before its
    decode step is compiled; it cannot be trained afterwards."""
    holders = Counter()
    for module in model.modules():
        holders.update(module.parameters(recurse=False))
    pack_inside(model, columns, holders)
    move_all(model)
    return model

# --- in a compiled decode step ---

def join(first: torch.fx.Node, other: torch.fx.Node):
    """Let a call of `packed_linear` compute what another one does with the same x, which is erased."""
    x, *parts = first.args
    before = len(parts[0])
    joined = []
    for own, more in zip(parts, other.args[1:], strict=True):
        for constant in more:
            # the matrices are, and can stand earlier; numbers of rows stand nowhere
            if isinstance(constant, torch.fx.Node):
                first.prepend(constant)
        joined.append([*own, *more])
    first.args = (x, *joined)
    # each takes its matrix out of the list by number
    for item in list(other.users):
        item.args = (first, before + item.args[1])
    other.graph.erase_node(other)

def share_calls(module: torch.fx.GraphModule):
    """One call for all packed products with the same x, as of q, k and v, or of gate and up: each call has
    its own barrier, and Python before it."""
    calls = {}
    for node in module.graph.find_nodes(op="call_function", target=packed_linear):
        x = node.args[0]
        if x in calls:
            join(calls[x], node)
        else:
            calls[x] = node
    module.recompile()
