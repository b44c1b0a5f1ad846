"""Packed weights against dense ones: the kernel, what is done without one, whole models."""
import ctypes
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from nanolost import sparse
from nanolost.checkpoint import warn_once

pack_op, unpack_op = torch.ops.nanolost.packed_linear.default, torch.ops.nanolost.unpack.default
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

@pytest.fixture
def kernel():
    """The dtypes of the kernel; skips where this machine cannot have one."""
    missing = sparse.NEEDED[torch.bfloat16] - sparse.cpu_flags()
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    assert sparse.load_kernel() == set(sparse.NEEDED)

def with_zeros(*shape, zeros=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return (weight * (torch.rand(*shape, generator=generator) >= zeros)).to(dtype)

def product(weight, x):
    return pack_op(x, *([part] for part in sparse.pack_matrix(weight)))[0]

def check_product(weight, x):
    """Within a rounding of the result, and those of a sum in float32."""
    y, W, X = product(weight, x), weight.double(), x.double()
    assert y.shape == (*x.shape[:-1], len(weight)) and y.dtype == x.dtype
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8}[x.dtype]
    allowed = rounding * (X @ W.T).abs() + 1e-6 * (X.abs() @ W.abs().T) + 1e-30
    assert ((y - X @ W.T).abs() <= allowed).all()

# --- the kernel ---

@dtypes
def test_every_pattern_of_zeros_comes_back_and_multiplies(kernel, dtype):
    low = torch.arange(1 << 16)
    high = low * 40503 % (1 << 16)                               # odd: each of 65,536 too, in another order
    pattern = torch.cat([low[:, None] >> torch.arange(16), high[:, None] >> torch.arange(16)], 1) & 1
    weight = (pattern * torch.randn(32)).to(dtype)
    bits, values, start = sparse.pack_matrix(weight)
    assert torch.equal(unpack_op(bits, values, start, 32), weight)
    check_product(weight, torch.randn(1, 32).to(dtype))

@dtypes
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
def test_widths_that_no_word_divides(kernel, dtype, columns):
    for width in [*range(1, 101), 575, 1000]:
        weight = with_zeros(3, width, dtype=dtype, seed=width)
        bits, values, start = sparse.pack_matrix(weight)
        assert torch.equal(unpack_op(bits, values, start, width), weight)
        check_product(weight, torch.randn(columns, width).to(dtype))

@dtypes
def test_rows_without_a_value_and_rows_without_a_zero(kernel, dtype):
    for rows in ([0, 1], [1, 0], [0, 0], [1, 1], [0, 0, 1, 0, 1, 1, 0]):
        weight = torch.tensor(rows)[:, None] * (torch.rand(len(rows), 70) + 0.5)
        bits, values, start = sparse.pack_matrix(weight.to(dtype))
        assert len(values) == 70 * sum(rows) + sparse.PAD
        assert torch.equal(unpack_op(bits, values, start, 70), weight.to(dtype))
        check_product(weight.to(dtype), torch.randn(2, 70).to(dtype))

@dtypes
def test_denormals_are_kept_and_a_negative_zero_is_a_zero(kernel, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[-0.0, tiny / 4, -tiny / 8, 0.0, 1.0, -0.0]], dtype=dtype)
    bits, values, start = sparse.pack_matrix(weight)
    assert bits.tolist() == [[0b010110]] and values[:3].tolist() == [tiny / 4, -tiny / 8, 1.0]
    assert torch.equal(unpack_op(bits, values, start, 6), weight)
    check_product(weight, torch.randn(1, 6).to(dtype))
    alone = product(weight[:, :3].contiguous(), torch.ones(1, 3, dtype=dtype))
    assert alone.item() in (0, tiny / 8)                         # an instruction of bfloat16 takes them for 0

@dtypes
def test_what_is_not_finite_comes_through_as_in_a_dense_product(kernel, dtype):
    weight, x = with_zeros(9, 40, dtype=dtype), torch.randn(4, 40).to(dtype)
    weight[1, 3], weight[2, 5], x[2, 7], x[3, 8] = torch.inf, torch.nan, torch.inf, torch.nan
    dense = nn.functional.linear(x, weight)
    assert torch.equal(product(weight, x).isnan(), dense.isnan()) and dense.isnan().sum() > 12

@dtypes
def test_threads_and_neighbours_change_no_bit(kernel, dtype):
    weights = [with_zeros(rows, 1000, dtype=dtype, seed=rows) for rows in (500, 1, 700)]
    x, before = torch.randn(2, 3, 1000).to(dtype), torch.get_num_threads()
    together = pack_op(x, *map(list, zip(*map(sparse.pack_matrix, weights), strict=True)))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for weight, y in zip(weights, together, strict=True):
                assert torch.equal(product(weight, x), y)
    finally:
        torch.set_num_threads(before)

def test_an_x_with_gaps_and_one_without_rows(kernel):
    weight, x = with_zeros(5, 40), torch.randn(40, 3)
    assert torch.equal(product(weight, x.T), product(weight, x.T.contiguous()))
    assert product(weight, torch.randn(0, 40)).shape == (0, 5)

@dtypes
def test_the_operations_are_what_torch_compile_takes(kernel, dtype):
    parts, x = sparse.pack_matrix(with_zeros(6, 70, dtype=dtype)), torch.randn(1, 2, 70).to(dtype)
    torch.library.opcheck(pack_op, (x, *([part] for part in parts)))
    torch.library.opcheck(unpack_op, (*parts, 70))

def test_what_does_not_fit_is_refused(kernel):
    bits, values, start = sparse.pack_matrix(with_zeros(6, 70))
    for x, parts in [
        (torch.randn(1, 64), (bits, values, start)),
        (torch.randn(1, 70).bfloat16(), (bits, values, start)),
        (torch.randn(1, 70), (bits, values, start[:5])),
        (torch.randn(1, 70), (bits.repeat(1, 2)[:, ::2], values, start)),
        (torch.randn(1, 70).double(), (bits, values.double(), start)),
    ]:
        with pytest.raises(RuntimeError):
            pack_op(x, *([part] for part in parts))

# --- memory ---

def at_the_end(tensor):
    """A copy of a tensor that ends where a page begins which nobody may read."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + room), mmap.PAGESIZE, 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor)

def read_at_the_end(pad):
    """In a process of its own: every kind of width, with `pad` values behind the last one."""
    assert sparse.load_kernel()
    for dtype in sparse.NEEDED:
        for width in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 1000):
            bits, values, start = sparse.pack_matrix(with_zeros(3, width, zeros=0.1, dtype=dtype))
            parts = [at_the_end(part) for part in (bits, values[:len(values) - sparse.PAD + pad], start)]
            for columns in (1, 9):
                pack_op(at_the_end(torch.randn(columns, width).to(dtype)), *([part] for part in parts))
            unpack_op(*parts, width)

def test_nothing_is_read_behind_the_end_of_a_buffer(kernel):
    for pad, code in ((sparse.PAD, 0), (0, -signal.SIGSEGV)):
        program = f"import test_sparse\ntest_sparse.read_at_the_end({pad})"
        path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
        done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path},
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr

# --- compiling it ---

@pytest.fixture
def cache(kernel, tmp_path, monkeypatch):
    """An empty cache of its own; `load_kernel` anew for each call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sparse, "load_kernel", sparse.load_kernel.__wrapped__)
    warn_once.cache_clear()
    return tmp_path / "nanolost"

def no_kernel(capsys):
    """The one line that says why there is none."""
    assert sparse.load_kernel() == frozenset()
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: no kernel for weights with zeros: ")
    return line

def fake_compiler(tmp_path, monkeypatch, body):
    script = tmp_path / "fake-c++"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))

def test_the_kernel_is_compiled_once_and_leaves_one_file(cache, monkeypatch):
    before = sorted(os.listdir(os.path.dirname(sparse.SOURCE)))
    path = sparse.built(sparse.NEEDED[torch.bfloat16])
    made = os.stat(path)
    assert os.listdir(cache) == [os.path.basename(path)] and made.st_mode & 0o022 == 0
    monkeypatch.setattr(sparse, "run", lambda command: "" if command[1] == "--version" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparse.built(sparse.NEEDED[torch.float32])                            # another key
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert sparse.built(sparse.NEEDED[torch.bfloat16]) == path and os.stat(path) == made
    assert sorted(os.listdir(os.path.dirname(sparse.SOURCE))) == before

def test_source_compiler_and_cpu_each_have_their_own_library(cache, tmp_path, monkeypatch):
    def key(flags=sparse.NEEDED[torch.bfloat16]):
        return sparse.key_of(sparse.build_command(flags))
    keys = [key(), key(sparse.NEEDED[torch.float32])]
    for version in ("1", "2"):
        fake_compiler(tmp_path, monkeypatch, f"echo {version}")
        keys.append(key())
    changed = tmp_path / "changed.cpp"
    changed.write_text("int one;")
    monkeypatch.setattr(sparse, "SOURCE", str(changed))
    keys.append(key())
    changed.write_text("int two;")
    assert len({*keys, key()}) == 6 and key() == key()

def test_without_avx512_nothing_is_compiled(cache, capsys, monkeypatch):
    monkeypatch.setattr(sparse, "cpu_flags", lambda: {"sse2", "avx2", "popcnt"})
    assert "no AVX-512" in no_kernel(capsys) and not cache.exists()

def test_without_a_compiler_one_line_says_so(cache, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in no_kernel(capsys)

def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(cache, tmp_path, capsys, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, '[ "$1" = --version ] || { echo "x.cpp:1: error: no" >&2; exit 1; }')
    assert "x.cpp:1: error: no" in no_kernel(capsys) and not os.listdir(cache)

def test_a_compiler_that_writes_no_library_is_one_line(cache, tmp_path, capsys, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'for last; do :; done; [ "$1" = --version ] || echo text > "$last"')
    assert "Could not load this library" in no_kernel(capsys)

@pytest.mark.parametrize("there", ["file", "/proc"])
def test_a_cache_that_cannot_be_written_is_one_line(cache, capsys, there):
    # nobody can write into /proc, not even root
    cache.symlink_to(there) if there == "/proc" else cache.write_text("")
    assert "XDG_CACHE_HOME names another place" in no_kernel(capsys)

def test_the_cache_of_another_user_is_not_run(cache, capsys, monkeypatch):
    cache.mkdir()
    if not os.geteuid():
        os.chown(cache, 1234, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert "belongs to another user" in no_kernel(capsys)
