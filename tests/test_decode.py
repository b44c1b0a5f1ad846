"""The cache and the sampler against slow forms; the compiled decode step."""
import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    all_logits,
    largest_difference,
    lost_of,
    small,
    small_lost,
    small_mixed,
    spread,
    tokens,
)
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.utils import run_and_get_code

from lost import LOSTLinear, apply_lost
from nanolost.decode import KVCache, compile_for_cpu, compile_step, generate, pick_token

# --- the cache ---

PIECES = {"at-once": [30], "token-by-token": [1] * 30, "in-pieces": [3, 1, 12, 2, 12],
          "prefill-then-tokens": [9] + [1] * 21}

@pytest.mark.parametrize("make", [small, small_lost, small_mixed], ids=["dense", "grouped-lost", "mixed"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(make, pieces):
    model, idx = make(), tokens(2, 30)                                        # 30 > max_seq_len
    cache = KVCache(30)
    logits = torch.cat([all_logits(model, piece, cache) for piece in idx.split(pieces, dim=1)], dim=1)
    assert largest_difference(logits, all_logits(model, idx)) <= 1e-4
    assert cache.length == 30

@torch.no_grad()
def test_cache_holds_the_keys_of_kv_heads_only():
    cache = KVCache(7)
    small(n_kv_head=2)(tokens(3, 1), cache=cache)
    assert [t.shape for kv in cache.kv for t in kv] == [(3, 2, 7, 8)] * 4

# --- generation ---

def greedy_literally(model, row, count):
    """The likeliest token each time; a context that outgrows max_seq_len loses its older half."""
    context, text = row[-model.config.max_seq_len:], list(row)
    for _ in range(count):
        if len(context) > model.config.max_seq_len:
            context = context[-max(1, model.config.max_seq_len // 2):]
        token = max(range(257), key=model(torch.tensor([context]))[0][0, -1].tolist().__getitem__)
        context, text = context + [token], text + [token]
    return text

@pytest.mark.parametrize("max_seq_len", [1, 7, 12])
@pytest.mark.parametrize("length", [1, 12, 31])
@torch.no_grad()
def test_greedy_text_equals_the_literal_loop(max_seq_len, length):
    model, idx = small(n_kv_head=2, max_seq_len=max_seq_len), tokens(2, length)
    cached = generate(model, idx, 40, temperature=0)                           # several windows
    assert cached.tolist() == [greedy_literally(model, row, 40) for row in idx.tolist()]
    assert len(set(cached[0, length:].tolist())) > 3 or max_seq_len == 1

@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("make", [small, small_lost, small_mixed])
def test_compiled_step_writes_the_same_text_and_is_compiled_once(make, rows, monkeypatch):
    made = []
    def compile_and_count(*args):
        made.append(compile_for_cpu(*args))
        return made[-1]
    monkeypatch.setattr("nanolost.decode.compile_for_cpu", compile_and_count)
    models, idx = [make(), spread(make(), 1)], tokens(rows, 5)
    steps = [compile_step(model) for model in models]
    for model, step in [*zip(models, steps, strict=True)] * 2:                # several windows of each
        text = generate(model, idx, 30, temperature=0, step=step)
        assert torch.equal(text, generate(model, idx, 30, temperature=0))
    assert len(made) == 2

@torch.inference_mode()
def test_compiled_step_of_one_text_is_made_of_sums_not_of_library_calls():
    model, token, cache = small_lost(), tokens(1, 1), KVCache(12)
    model(token, cache=cache)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(compile_step(model), token, cache=cache)
    calls = re.findall(r"(?:extern_kernels\.\w+|\w+\.default)\(", code)
    assert "cpp_fused" in code and calls == ["rope_table.default("]

class Alone(torch.nn.Module):
    """A layer in the place of a model."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, token, cache):
        return self.layer(token), None

@torch.inference_mode()
def test_a_step_picks_the_channels_of_a_pinned_layer_before_the_sums_over_its_weight():
    layer = lost_of(torch.nn.Linear(64, 48, bias=False), 16).as_pinned()
    x = torch.randn(1, 64)
    with torch._inductor.config.patch(force_disable_caches=True):
        (y, _), (code,) = run_and_get_code(compile_step(Alone(layer)), x, cache=KVCache(1))
    assert largest_difference(y, layer(x)) <= 1e-5
    picked = "index out of bounds"
    # pivots, and the others
    assert code.count(picked) == 2
    sums = [part.partition("\n    }\n")[0] for part in code.split("tmp_acc0 = 0;")[1:]]
    assert len(sums) == 2 and not any(picked in part for part in sums)

@torch.inference_mode()
def test_step_changes_only_tensors_that_a_cuda_graph_may_change():
    torch.compiler.reset()
    model, changed, fixed = small_lost(), set(), set()
    def look(module, example, **kwargs):
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        changed.update(i for i, node in enumerate(inputs) for user in node.users
                       if user.args[0] is node and user.target is torch.ops.aten.copy_.default)
        fixed.update(kwargs["static_input_idxs"])
        return compile_fx_inner(module, example, **kwargs)
    step = torch.compile(model, backend=functools.partial(compile_fx, inner_compile=look))
    cache = KVCache(12)
    model(tokens(1, 1), cache=cache)
    with torch._inductor.config.patch(force_disable_caches=True):
        step(tokens(1, 1), cache=cache.stay())
    assert len(changed) == 1 + 2 * model.config.n_layer and changed <= fixed

@torch.inference_mode()
def test_a_step_through_layers_that_are_all_unlike_is_compiled_once_for_each_size():
    torch.compiler.reset()
    model, graphs = small_mixed(max_seq_len=24), []
    def count(graph, example):
        graphs.append(graph)
        return graph
    # as on a GPU, but for what makes code of the graph
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=count)
    def run(token, cache):
        return step(token, cache=cache.stay())
    text = generate(model, tokens(1, 5), 15, temperature=0, step=run)
    assert len(graphs) == 1 and torch.equal(text, generate(model, tokens(1, 5), 15, temperature=0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        generate(model, tokens(1, 7), 15, temperature=0, step=run)

def test_cached_generation_reads_each_token_once_a_window():
    model, read = small(), []
    model.model["embed_tokens"].register_forward_hook(lambda module, given, x: read.append(x.shape[1]))
    generate(model, tokens(1, 5), 22, temperature=0)
    assert read == [5] + [1] * 7 + [6] + [1] * 6 + [6] + [1] * 6

def test_generation_stops_at_end_of_text():
    model, idx = small(), tokens(3, 5)
    free = generate(model, idx, 20, temperature=0).tolist()
    eot = free[0][9]
    rows = [row[:row.index(eot, 5) + 1] if eot in row[5:] else row for row in free]
    assert min(len(row) for row in rows) < max(len(row) for row in rows)
    longest = max(len(row) for row in rows)
    expected = [row + [eot] * (longest - len(row)) for row in rows]
    assert generate(model, idx, 20, temperature=0, eot=eot).tolist() == expected
    alone = generate(model, idx[:1], 20, temperature=0, eot=eot).tolist()
    assert alone == [rows[0]] and len(rows[0]) < 25

def test_generation_stops_at_the_first_of_several_ends():
    model, idx = small(), tokens(1, 5)
    free = generate(model, idx, 20, temperature=0)[0].tolist()
    unseen = next(i for i in range(model.config.vocab_size) if i not in free)
    *_, first, second = list(dict.fromkeys(free[5:]))[:3]
    for ends in ([unseen, first], [second, first], [first]):
        stopped = generate(model, idx, 20, temperature=0, eot=ends)[0].tolist()
        assert stopped == free[:free.index(first, 5) + 1]
    assert generate(model, idx, 20, temperature=0, eot=[unseen])[0].tolist() == free

def test_an_id_that_is_not_known_is_never_drawn():
    model, idx = small(), tokens(2, 5)
    free = generate(model, idx, 20, temperature=0)
    known = torch.ones(model.config.vocab_size, dtype=torch.bool)
    known[free[:, 5]] = False
    for temperature in (0, 5.0):
        new = generate(model, idx, 20, temperature, known=known)[:, 5:]
        assert known[new].all() and not known[free[:, 5:]].all()

def test_end_of_text_in_the_prompt_does_not_stop():
    model, idx = small(), tokens(2, 5)
    free = generate(model, idx, 6, temperature=0)
    eot = next(token for token in idx[0].tolist() if token not in free[:, 5:])
    assert torch.equal(generate(model, idx, 6, temperature=0, eot=eot), free)

def test_top_k_of_one_is_greedy():
    model, idx = small(), tokens(2, 5)
    greedy = generate(model, idx, 20, temperature=0)
    assert torch.equal(generate(model, idx, 20, temperature=1.7, top_k=1), greedy)

def test_generator_decides_the_text():
    model, idx = small(), tokens(2, 5)
    def text(seed):
        return generate(model, idx, 20, generator=torch.Generator().manual_seed(seed)).tolist()
    assert text(3) == text(3) != text(4)

class Watched(KVCache):
    """Remembers the sizes that its buffers had, and their dtypes."""

    made = []

    def begin(self, T):
        self.made.append((int(self.length) + T, self.size, {one.dtype for pair in self.kv for one in pair}))
        return super().begin(T)

@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr("nanolost.decode.KVCache", Watched)
    monkeypatch.setattr(Watched, "made", [])
    return Watched.made

def test_cache_holds_what_the_text_is_long_not_what_the_model_was_made_for(watched):
    model = small(max_seq_len=2**31)
    text = generate(model, tokens(1, 5), 600, temperature=0)
    assert text.shape == (1, 605) and watched[-1][1] <= 1024
    assert all(length <= size <= max(256, 2 * length) for length, size, _ in watched)

@pytest.mark.parametrize("block, piece", [(1, 1), (3, 4), (256, 2048)])
def test_growing_cache_and_pieces_of_a_prompt_change_no_token(block, piece, watched, monkeypatch):
    monkeypatch.setattr("nanolost.decode.BLOCK", block)
    monkeypatch.setattr("nanolost.decode.PREFILL", piece)
    model, idx = small(n_kv_head=2, max_seq_len=21), tokens(2, 9)
    text = generate(model, idx, 40, temperature=0)
    assert text.tolist() == [greedy_literally(model, row, 40) for row in idx.tolist()]
    assert max(size for _, size, _ in watched) == 21

def test_decode_step_is_compiled_once_for_each_doubling_of_the_cache(monkeypatch):
    sizes = []
    def uncompiled(model, cache, tensors):
        sizes.append(tensors[-1].shape[2])
        return lambda token, *rest: [model(token, cache=cache)[0]]
    monkeypatch.setattr("nanolost.decode.compile_for_cpu", uncompiled)
    monkeypatch.setattr("nanolost.decode.BLOCK", 4)
    model, idx = small(max_seq_len=50), tokens(1, 3)
    text = generate(model, idx, 90, temperature=0, step=compile_step(model))
    assert sizes == [4, 8, 16, 32, 50]
    assert torch.equal(text, generate(model, idx, 90, temperature=0))

@pytest.mark.parametrize("make", [small, small_lost])
def test_generation_works_under_autocast(make, watched):
    model, idx = make(), tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        text = generate(model, idx, 20, temperature=0)
        expected = [greedy_literally(model, row, 20) for row in idx.tolist()]
    assert text.tolist() == expected
    assert watched[-1][2] == {torch.bfloat16}

def test_model_with_a_lost_head_generates():
    model, idx = apply_lost(small(), 6, 0.1, skip=()), tokens(2, 5)
    text = generate(model, idx, 20, temperature=0)
    assert text.tolist() == [greedy_literally(model, row, 20) for row in idx.tolist()]

def test_form_for_few_rows_is_used_inside_alone_whatever_ends_it():
    model, used = small_lost(), []
    layers = [layer for layer in model.modules() if isinstance(layer, LOSTLinear)]
    layers[0].few_rows = True
    def look(module, given, x):
        used.append({layer.few_rows for layer in layers})
        if len(used) == 3:
            raise KeyboardInterrupt
    model.model["embed_tokens"].register_forward_hook(look)
    generate(model, tokens(1, 5), 2)
    before = [layer.few_rows for layer in layers]
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens(1, 5), 2)
    after = [layer.few_rows for layer in layers]
    assert used == [{True}] * 3 and before == after == [True] + [False] * (len(layers) - 1)

def test_ids_beyond_the_vocabulary_are_never_drawn():
    model, idx = small(), tokens(2, 5) % 7
    text = generate(model, idx, 200, temperature=100.0, vocab_size=7)
    assert {*text.flatten().tolist()} == {*range(7)}

# --- picking a token ---

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])

def draws(count=20_000, logits=LOGITS, seed=0, **how):
    generator = torch.Generator().manual_seed(seed)
    return pick_token(logits.expand(count, -1), generator=generator, **how).flatten()

def frequencies(**how):
    return draws(**how).bincount(minlength=len(LOGITS)) / 20_000

@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert largest_difference(frequencies(temperature=temperature), expected) < 0.012

@pytest.mark.parametrize("how, kept", [
    (dict(top_k=1), [0]), (dict(top_k=3), [0, 2, 3]), (dict(top_k=6), range(6)), (dict(top_k=99), range(6)),
    (dict(top_p=0.01), [0]), (dict(top_p=0.6), [0, 3]), (dict(top_p=0.9), [0, 2, 3]),
    (dict(top_p=1.0), range(6)), (dict(top_k=2, top_p=0.6), [0]),
    (dict(top_k=3, top_p=0.8), [0, 3]),        # p of the three: of all six it would keep [0, 2, 3]
])
def test_filtered_frequencies_are_the_softmax_of_what_is_kept(how, kept):
    expected = torch.zeros(6)
    expected[list(kept)] = LOGITS[list(kept)].softmax(-1)
    found = frequencies(temperature=1.0, **how)
    assert largest_difference(found, expected) < 0.012
    assert not found[expected == 0].any()

def smallest_set_reaching(probabilities, top_p):
    kept, total = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= top_p:
            break
        kept.append(token)
        total += probabilities[token]
    return set(kept)

scores = st.lists(st.integers(-400, 400), min_size=1, max_size=12, unique=True)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores, st.sampled_from([0.3, 1.0, 3.0]), st.integers(1, 14), st.integers(1, 100))
def test_a_draw_stays_inside_what_top_k_and_top_p_leave(scores, temperature, top_k, percent):
    logits = torch.tensor(scores) / 100
    probabilities = (logits.double() / temperature).softmax(-1)
    best = set(probabilities.topk(min(top_k, len(logits))).indices.tolist())
    assert set(draws(300, logits, temperature=temperature, top_k=top_k).tolist()) <= best
    nucleus = smallest_set_reaching(probabilities.tolist(), percent / 100 + 1e-6)
    assert set(draws(300, logits, temperature=temperature, top_p=percent / 100).tolist()) <= nucleus
    assert set(draws(5, logits, temperature=0, top_k=top_k).tolist()) == {logits.argmax().item()}

@pytest.mark.parametrize("temperature", [1e-20, 1e-44, 1e-50, 5e-324])
def test_temperature_near_zero_takes_the_likeliest(temperature):
    assert {*draws(50, temperature=temperature).tolist()} == {0}

def test_pick_token_gives_one_token_a_row():
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])
    assert pick_token(logits, 1.0).tolist() == pick_token(logits, 0).tolist() == [[1], [0]]
    assert torch.equal(logits, torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]))

