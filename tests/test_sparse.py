"""Packed weights against dense ones: the kernel, what is done without one, whole models."""
import copy
import ctypes
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, blocks
from small_models import all_logits, largest_difference, small, tokens
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.sparse import _semi_structured_conversions as conversions

import sample
from lost import SparseLowRankLinear
from nanolost import sparse
from nanolost.checkpoint import save_checkpoint, warn_once
from nanolost.decode import KVCache, compile_step, generate
from nanolost.sparse import CSRLinear, PackedLinear, pack
from nanolost.tokenizer import Tokenizer

pack_op, unpack_op = torch.ops.nanolost.packed_linear.default, torch.ops.nanolost.unpack.default
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

def with_zeros(*shape, zeros=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return (weight * (torch.rand(*shape, generator=generator) >= zeros)).to(dtype)

def arguments(x, *weights):
    """What the operation takes: of each weight its parts, and its number of rows."""
    parts = zip(*map(sparse.pack_matrix, weights), strict=True)
    return x, *map(list, parts), [len(weight) for weight in weights]

def product(weight, x):
    return pack_op(*arguments(x, weight))[0]

def unpacked(weight):
    return unpack_op(*sparse.pack_matrix(weight), weight.shape[1])[:len(weight)]

def check_product(weight, x, y=None):
    """Within a rounding of the result, and those of a sum in float32."""
    y = product(weight, x) if y is None else y
    W, X = weight.double(), x.double()
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
    assert torch.equal(unpacked(weight), weight)
    check_product(weight, torch.randn(1, 32).to(dtype))

@dtypes
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
def test_widths_that_no_word_divides(kernel, dtype, columns):
    for width in [*range(1, 101), 575, 1000]:
        weight = with_zeros(3, width, dtype=dtype, seed=width)
        assert torch.equal(unpacked(weight), weight)
        check_product(weight, torch.randn(columns, width).to(dtype))

@dtypes
def test_rows_without_a_value_and_rows_without_a_zero(kernel, dtype):
    for rows in ([0, 1], [1, 0], [0, 0], [1, 1], [0, 0, 1, 0, 1, 1, 0]):
        weight = torch.tensor(rows)[:, None] * (torch.rand(len(rows), 70) + 0.5)
        weight = weight.to(dtype)
        assert len(sparse.pack_matrix(weight).values) == 70 * sum(rows) + sparse.PAD
        assert torch.equal(unpacked(weight), weight)
        check_product(weight, torch.randn(2, 70).to(dtype))

@dtypes
def test_denormals_are_kept_and_a_negative_zero_is_a_zero(kernel, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[-0.0, tiny / 4, -tiny / 8, 0.0, 1.0, -0.0]], dtype=dtype)
    bits, values, start = sparse.pack_matrix(weight)
    assert bits.tolist() == [[[0b010110, 0, 0, 0]]] and start.tolist() == [0]
    assert values[:3].tolist() == [tiny / 4, -tiny / 8, 1.0]
    assert torch.equal(unpacked(weight), weight)
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
    alone = [product(weight, x) for weight in weights]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            together = pack_op(*arguments(x, *weights))
            for weight, y, expected in zip(weights, together, alone, strict=True):
                assert torch.equal(y, expected) and torch.equal(product(weight, x), expected)
    finally:
        torch.set_num_threads(before)

def test_an_x_with_gaps_and_one_without_rows(kernel):
    weight, x = with_zeros(5, 40), torch.randn(40, 3)
    assert torch.equal(product(weight, x.T), product(weight, x.T.contiguous()))
    assert product(weight, torch.randn(0, 40)).shape == (0, 5)

@dtypes
def test_the_operations_are_what_torch_compile_takes(kernel, dtype):
    weight, x = with_zeros(6, 70, dtype=dtype), torch.randn(1, 2, 70).to(dtype)
    torch.library.opcheck(pack_op, arguments(x, weight, weight))
    torch.library.opcheck(unpack_op, (*sparse.pack_matrix(weight), 70))

def test_what_does_not_fit_is_refused(kernel):
    bits, values, start = sparse.pack_matrix(with_zeros(6, 70))
    x = torch.randn(1, 70)
    pack_op(x, [bits], [values], [start], [6])
    for wrong in [
        (torch.randn(1, 64), bits, values, start, 6),
        (x.bfloat16(), bits, values, start, 6),
        (x, bits, values, start[:1], 6),
        (x, bits.transpose(0, 1).contiguous().transpose(0, 1), values, start, 6),
        (x.double(), bits, values.double(), start, 6),
        (x, bits, values, start, 9),
        (x, bits, values, start, 4),
    ]:
        with pytest.raises(RuntimeError):
            pack_op(wrong[0], *([one] for one in wrong[1:]))

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

def read_at_the_end(pad, vendor):
    """In a process of its own, for the CPUs of one vendor: every kind of width, right to the last bit with
    `pad` values behind the last one."""
    flags = sparse.cpu_flags() - {"AuthenticAMD", "GenuineIntel"}
    sparse.cpu_flags = lambda: flags | {vendor}
    assert sparse.load_kernel()
    for dtype in sparse.NEEDED:
        for width in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 1000):
            weight = with_zeros(5, width, zeros=0.1, dtype=dtype)
            bits, values, start = sparse.pack_matrix(weight)
            parts = [at_the_end(part) for part in (bits, values[:len(values) - sparse.PAD + pad], start)]
            for columns in (1, 7):
                x = at_the_end(torch.randn(columns, width).to(dtype))
                y, = pack_op(x, *([part] for part in parts), [5])
                check_product(weight, x, y)
            assert torch.equal(unpack_op(*parts, width)[:5], weight)

@pytest.mark.parametrize("pad, vendor, code", [
    (sparse.PAD, "AuthenticAMD", 0),
    (sparse.PAD, "GenuineIntel", 0),
    (0, "AuthenticAMD", -signal.SIGSEGV),
])
def test_nothing_is_read_behind_the_end_of_a_buffer(kernel, pad, vendor, code):
    program = f"import test_sparse\ntest_sparse.read_at_the_end({pad}, {vendor!r})"
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
    assert line.startswith("WARNING: weights with zeros are not packed")
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
    assert set(os.listdir(cache)) == {".lock", os.path.basename(path)} and made.st_mode & 0o022 == 0
    monkeypatch.setattr(sparse, "run", lambda command: "" if command[1] == "--version" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparse.built(sparse.NEEDED[torch.float32])                            # another key
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert sparse.built(sparse.NEEDED[torch.bfloat16]) == path and os.stat(path) == made
    assert sorted(os.listdir(os.path.dirname(sparse.SOURCE))) == before

def test_two_processes_compile_once(cache, tmp_path, monkeypatch):
    compiles = f'for last; do :; done; echo x >> {tmp_path}/log; sleep 0.3; echo > "$last"'
    fake_compiler(tmp_path, monkeypatch, f'[ "$1" = --version ] || {{ {compiles}; }}')
    context = multiprocessing.get_context("fork")
    pair = [context.Process(target=sparse.built, args=({"avx512f"},)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert (tmp_path / "log").read_text() == "x\n" and len(os.listdir(cache)) == 2

def test_a_file_system_without_locks_compiles_all_the_same(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse.fcntl, "flock", lambda *args: os.stat("/nowhere"))
    fake_compiler(tmp_path, monkeypatch, 'for last; do :; done; [ "$1" = --version ] || echo > "$last"')
    assert os.path.exists(sparse.built({"avx512f"}))

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
    assert "x.cpp:1: error: no" in no_kernel(capsys) and os.listdir(cache) == [".lock"]

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

# --- which form ---

def packed_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, sparse.SparseLinear)]

def linear_with(zeros, shape=(64, 96), dtype=torch.float32):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = with_zeros(*shape, zeros=zeros, dtype=dtype)
    return linear

def test_the_table_has_more_columns_for_more_zeros_and_never_less_than_one():
    for form, by_dtype in sparse.COLUMNS.items():
        for dtype, table in by_dtype.items():
            assert list(table) == sorted(table) and all(columns >= 1 for _, columns in table)
            found = [sparse.most_columns(form, dtype, zeros / 100) for zeros in range(101)]
            assert found == sorted(found) and found[0] == 0
    assert sparse.most_columns(PackedLinear, torch.float64, 0.9) == 0

@dtypes
def test_zeros_and_columns_decide_the_form(kernel, dtype):
    for least, columns in sparse.COLUMNS[PackedLinear][dtype]:
        enough, few = linear_with(least + 0.04, dtype=dtype), linear_with(least - 0.04, dtype=dtype)
        layer = sparse.pack_linear(enough, columns)
        assert type(layer) is PackedLinear and layer.columns == columns
        assert type(sparse.pack_linear(few, columns)) is not PackedLinear
    assert sparse.pack_linear(enough, columns + 1) is None
    assert sparse.pack_linear(nn.Linear(0, 5), 1) is None

def test_where_the_kernel_ends_the_matrix_is_dense_again(kernel, monkeypatch):
    monkeypatch.setattr(sparse, "UNPACKED", 1000)                             # eight rows at a time
    linear = linear_with(0.6, (63, 96))
    layer, calls = PackedLinear(linear, 4), []
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: calls.append(x.shape) or linear(x))
    for shape in ((4, 96), (2, 2, 96), (1, 5, 96), (96,), (7, 3, 96)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), linear(x))
    assert calls == [(4, 96), (2, 2, 96), (96,)] and torch.equal(layer.weight, linear.weight)

def test_without_a_kernel_compressed_rows_where_they_are_faster(monkeypatch, recwarn):
    monkeypatch.setattr(sparse, "load_kernel", frozenset)
    assert sparse.pack_linear(linear_with(0.7), 1) is None
    assert sparse.pack_linear(linear_with(0.9, dtype=torch.bfloat16), 1) is None
    linear = linear_with(0.9)
    layer = sparse.pack_linear(linear, 1)
    assert type(layer) is CSRLinear and {layer.crow.dtype, layer.col.dtype} == {torch.int32}
    for shape in ((1, 1, 96), (3, 96), (4, 30, 96)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), linear(x))
        assert layer(x).is_contiguous()
    assert torch.equal(layer.weight, linear.weight)
    parts = layer.crow, layer.col, layer.values
    torch.library.opcheck(sparse.csr_linear, (torch.randn(1, 2, 96), *parts))
    torch.library.opcheck(sparse.csr_dense, (*parts, 96))
    assert not [str(one.message) for one in recwarn if "Sparse" in str(one.message)]

def test_packed_weights_alone_stay_in_memory(kernel):
    layer = sparse.pack_linear(linear_with(0.7, (512, 1024), torch.bfloat16), 1)
    held = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    # a bit and 0.3 × 2 bytes a weight; 8 bytes for four rows
    assert held == pytest.approx(512 * 1024 * (1 / 8 + 0.3 * 2) + 128 * 8, rel=0.01)

# bytes of the pieces, and how many the 14 matrices of a small model take
@pytest.mark.parametrize("piece, count", [(1 << 30, 1), (1, 14)])
def test_packed_matrices_share_pieces_of_memory(kernel, monkeypatch, piece, count):
    monkeypatch.setattr(sparse, "PIECE", piece)
    model, packed = sparse_model()
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLinear)]
    parts = [part for layer in layers for part in layer.buffers()]
    assert len(layers) == 14
    # of the same piece, and apart in it
    assert len({part.untyped_storage().data_ptr() for part in parts}) == count
    spans = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(layer.weight, model.get_submodule(name).weight)

# --- whole models ---

def sparse_model(zeros=0.6, **sizes):
    """A model whose blocks have zeros, and a copy that is packed."""
    model = small(n_kv_head=2, **sizes)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data *= torch.rand_like(module.weight) >= zeros
    return model, pack(copy.deepcopy(model))

BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True)
models = pytest.mark.parametrize("sizes", [{}, BIASES], ids=["plain", "biases"])

@models
def test_a_packed_model_computes_and_writes_what_the_dense_one_does(kernel, sizes):
    model, packed = sparse_model(**sizes)
    assert len(packed_layers(packed)) == 14 and "lm_head" not in packed_layers(packed)
    for rows in (1, 4, 9):
        idx = tokens(rows, 12)
        assert largest_difference(all_logits(packed, idx), all_logits(model, idx)) <= 1e-4
        new = generate(packed, idx[:, :5], 40, temperature=0)
        assert torch.equal(new, generate(model, idx[:, :5], 40, temperature=0))

@pytest.mark.parametrize("sizes, rows", [({}, 1), (BIASES, 3), ({}, 20)], ids=["one", "three", "many"])
def test_the_compiled_step_of_a_packed_model_writes_the_same(kernel, sizes, rows):
    model, packed = sparse_model(**sizes)
    idx = tokens(rows, 5)
    new = generate(packed, idx, 30, temperature=0, step=compile_step(packed))
    assert torch.equal(new, generate(model, idx, 30, temperature=0))

def test_compressed_rows_are_compiled_too(monkeypatch):
    monkeypatch.setattr(sparse, "load_kernel", frozenset)
    model, packed = sparse_model(zeros=0.9)
    assert len(packed_layers(packed)) >= 10
    idx = tokens(1, 5)
    new = generate(packed, idx, 30, temperature=0, step=compile_step(packed))
    assert torch.equal(new, generate(model, idx, 30, temperature=0))

@torch.inference_mode()
def test_the_compiled_step_makes_one_call_for_what_reads_the_same_x(kernel):
    _, packed = sparse_model()
    token, cache = tokens(1, 1), KVCache(12)
    packed(token, cache=cache)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(compile_step(packed), token, cache=cache)
    calls = re.findall(r"packed_linear\.default\(\w+[^\[]*\[([^]]*)\]", code)
    # q, k, v; o; gate, up; down: of two blocks
    assert [len(call.split(",")) for call in calls] == [3, 1, 2, 1] * 2

@torch.inference_mode()
def test_torch_compile_takes_a_packed_model_whole(kernel):
    _, packed = sparse_model()
    idx = tokens(2, 12)
    compiled = torch.compile(packed, fullgraph=True)
    assert largest_difference(compiled(idx)[0], packed(idx)[0]) <= 1e-4

def test_bfloat16_differs_by_its_rounding(kernel):
    model, _ = sparse_model()
    model, idx = model.bfloat16(), tokens(2, 12)
    packed = pack(copy.deepcopy(model))
    exact = all_logits(copy.deepcopy(model).float(), idx)
    error = largest_difference(all_logits(packed, idx).float(), exact)
    assert packed_layers(packed) and error <= 2 * largest_difference(all_logits(model, idx).float(), exact)

def test_a_dense_model_is_left_alone_and_needs_no_kernel(monkeypatch):
    monkeypatch.setattr(sparse, "load_kernel", lambda: 1 / 0)
    model = small()
    before = list(model.modules())
    assert pack(model) is model and list(model.modules()) == before

def test_a_weight_that_something_else_holds_stays_dense(kernel):
    model = small(tie_embeddings=True)
    model.lm_head.weight.data *= torch.rand_like(model.lm_head.weight) > 0.7
    assert not packed_layers(pack(model)) and model.lm_head.weight is model.model["embed_tokens"].weight

def test_several_texts_stay_dense_where_that_is_faster(kernel):
    model, _ = sparse_model()
    assert not packed_layers(pack(model, columns=1000))

def with_low_rank(linear, rank, activation="none"):
    biased = linear.bias is not None
    layer = SparseLowRankLinear(linear.in_features, linear.out_features, rank, biased, activation)
    for p in layer.parameters():
        p.data = torch.randn(p.shape) / 8
    layer.weight.data = linear.weight.data.clone()
    return layer

@pytest.mark.parametrize("rank, activation", [(0, "none"), (3, "none"), (3, "silu")])
def test_a_matrix_with_zeros_beside_one_of_low_rank_is_packed_too(kernel, rank, activation):
    layer = with_low_rank(linear_with(0.7), rank, activation)
    model, x = nn.Sequential(nn.Sequential(layer)), torch.randn(1, 96)
    expected = layer(x)
    assert packed_layers(pack(model)) == ["0.0.weight" if rank else "0.0"]
    torch.testing.assert_close(model(x), expected)

def test_the_docs_pack_a_model_in_transformers(kernel, tmp_path):
    pytest.importorskip("transformers")
    model, _ = sparse_model(vocab_size=257, max_seq_len=32)
    for name, rank in (("self_attn.o_proj", 2), ("mlp.up_proj", 0)):
        block = model.model["layers"][0]
        block.set_submodule(name, with_low_rank(block.get_submodule(name), rank))
    folder = save_checkpoint(str(tmp_path), 1, model, [], {"step": 1}, Tokenizer.named("byte"), keep=1)
    shown = {}
    exec(blocks("finetuning.md", "python")[0], shown)
    theirs = shown["packed"](folder, torch.float32)
    assert len(packed_layers(theirs)) == 14
    idx = tokens(1, 5)
    new = theirs.generate(idx, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(new, generate(model, idx, 12, temperature=0))

def test_a_kind_of_layer_adds_its_own_form(kernel, monkeypatch):
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(96, 64))
    model[0].weight.data = with_zeros(64, 96)
    assert not packed_layers(pack(model))
    monkeypatch.setitem(sparse.FORMS, ("test_sparse", "Mine"), sparse.pack_linear)
    assert packed_layers(pack(model)) == ["0"]

# --- two of four, on a GPU ---

def through_torchs_packing(weight):
    """What is left of a weight in the form of sparse tensor cores: half of its values, and their places."""
    values, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (len(weight), weight.shape[1] // 2)
    return conversions.sparse_semi_structured_to_dense_cutlass(values, places)

def test_two_zeros_in_every_four_are_packed_for_sparse_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", through_torchs_packing)
    def layer(rows, width, kept, dtype=torch.bfloat16):
        linear = nn.Linear(width, rows, bias=False)
        places = torch.rand(rows, width // 4, 4).argsort(-1)
        linear.weight.data = (torch.randn(rows, width) * (places < kept).view(rows, width)).to(dtype)
        return linear
    for kept in (0, 1, 2):
        linear = layer(64, 128, kept)
        before = linear.weight.detach().clone()
        assert sparse.semi_structured(linear) is linear and torch.equal(linear.weight, before)
        assert not linear.weight.requires_grad
    for other in (layer(64, 128, 3), layer(40, 128, 2), layer(64, 96, 2), layer(64, 128, 2, torch.float32)):
        assert sparse.semi_structured(other) is None

# --- the command ---

@pytest.mark.parametrize("flags", [{}, {"num_samples": 3}, {"compile": True}], ids=["one", "three", "fast"])
def test_sample_packs_and_writes_the_same_text(kernel, tmp_path, capsys, monkeypatch, flags):
    tokenizer = Tokenizer.named("byte")
    model, _ = sparse_model(vocab_size=tokenizer.vocab_size, max_seq_len=32)
    folder = save_checkpoint(str(tmp_path), 1, model, [], {"step": 1}, tokenizer, keep=1)
    def text():
        sample.main(sample.Config(ckpt=folder, prompt="On", device="cpu", max_new_tokens=25, **flags))
        return capsys.readouterr().out
    packed = []
    def look(model, columns):
        packed.append(packed_layers(pack(model, columns)))
    monkeypatch.setattr(sample, "pack", look)
    faster = text()
    monkeypatch.setattr(sample, "pack", lambda model, columns: model)
    assert text() == faster and len(packed[0]) == 14 and len(faster) > 15
