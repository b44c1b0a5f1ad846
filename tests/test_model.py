"""The plain LLaMA against Hugging Face's, its cache and sampler against slow forms, its counts by hand."""
import functools
import gc
import os
import re

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.utils import run_and_get_code
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import lost
from lost import LOSTLinear, apply_lost
from model import MODELS, Llama, LlamaConfig
from nanolost.checkpoint import load_model, save_checkpoint
from nanolost.counts import count_flops, count_multiplies, count_parameters
from nanolost.decode import KVCache, compile_for_cpu, compile_step, generate, pick_token
from nanolost.tokenizer import Tokenizer

SIZES = dict(vocab_size=257, seq_len=12, n_layer=2, n_head=4, n_embd=32, n_ffn=44,
             rope_theta=300.0, norm_eps=1e-3)
KINDS = {"plain": {}, "grouped": {"n_kv_head": 2}, "tied": {"tie_embeddings": True},
         "grouped-tied": {"n_kv_head": 1, "tie_embeddings": True}}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

@torch.no_grad()
def spread(model, seed=0):
    """Weights far from the flat start, so that positions, norms and attention all matter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            p.uniform_(0.5, 1.5, generator=generator)
        else:
            p.normal_(0, 0.3, generator=generator)
    return model.eval()

def small(seed=0, **changed):
    return spread(Llama(LlamaConfig(**{**SIZES, **changed})), seed)

def small_lost(**switches):
    return apply_lost(small(n_kv_head=2), 6, 0.1, **switches)

def tokens(batch, length, seed=0):
    return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(seed))

def all_logits(model, idx, cache=None):
    return model(idx, idx, cache)[0]

def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()

def saved(model, out_dir):
    """A checkpoint folder of the model after one AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    idx = tokens(2, 8)
    model(idx, idx)[1].backward()
    optimizer.step()
    return save_checkpoint(str(out_dir), 1, model, [optimizer], {"step": 1}, Tokenizer.named("byte"), keep=1)

# --- the reference implementation ---

def theirs_of(model):
    config = TheirConfig(**model.config.to_hf(), attn_implementation="eager")
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs

@kinds
def test_logits_equal_those_of_hugging_face(kind):
    model, idx = small(**kind), tokens(3, 20)
    with torch.no_grad():
        assert largest_difference(all_logits(model, idx), theirs_of(model)(idx).logits) <= 1e-4

@kinds
def test_loss_equals_that_of_hugging_face(kind):
    model, idx = small(**kind), tokens(3, 20)
    targets = torch.cat((idx[:, 1:], torch.full((3, 1), -1)), dim=1)
    targets[0, :7] = -1
    labels = idx.clone()
    labels[0, :8] = -100                                                      # theirs are shifted inside
    theirs = theirs_of(model)(idx, labels=labels).loss.item()
    assert model(idx, targets)[1].item() == pytest.approx(theirs, rel=1e-5)

@kinds
def test_our_checkpoint_folder_loads_in_hugging_face(kind, tmp_path):
    model = small(**kind)
    folder = saved(model, tmp_path)
    names = load_file(os.path.join(folder, "model.safetensors"))
    assert ("lm_head.weight" in names) != model.config.tie_embeddings      # as theirs
    theirs, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    idx = tokens(3, 20)
    with torch.no_grad():
        assert largest_difference(all_logits(model, idx), theirs.eval()(idx).logits) <= 1e-4

@kinds
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_their_folder_loads_here(kind, shard_size, tmp_path):
    theirs = spread(theirs_of(small(**kind)), seed=5)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    model, state = load_model(str(tmp_path))
    idx = tokens(3, 20)
    with torch.no_grad():
        assert largest_difference(all_logits(model, idx), theirs(idx).logits) <= 1e-4
    assert state == {} and model.config == LlamaConfig(**{**SIZES, **kind})

def test_their_half_precision_folder_loads_as_float32(tmp_path):
    theirs = theirs_of(small()).bfloat16()
    theirs.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight.float())

def test_greedy_text_equals_that_of_hugging_face():
    model = small(seq_len=24)
    ours = generate(model, tokens(2, 5), 19, temperature=0)
    theirs = theirs_of(model).generate(tokens(2, 5), max_new_tokens=19, do_sample=False, eos_token_id=None,
                                       pad_token_id=0)
    assert torch.equal(ours, theirs)

# --- the forward pass ---

@pytest.mark.parametrize("make", [small, small_lost], ids=["dense", "lost"])
def test_gradient_proves_causality(make):
    model, seen = make(), []
    model.model["embed_tokens"].register_forward_hook(lambda module, given, embedded: seen.append(embedded))
    logits = all_logits(model, tokens(2, 9))
    for t in range(9):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), seen, retain_graph=True)
        reached = gradient.abs().amax(-1)                                     # (B, T)
        assert (reached[:, t + 1:] == 0).all() and (reached[:, :t + 1] > 0).all()

def test_targets_of_minus_one_are_left_out():
    model, idx, targets = small(), tokens(2, 9), tokens(2, 9, 1)
    kept = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    logits, loss = model(idx, targets.masked_fill(~kept, -1))
    literal = [-logits[b, t].log_softmax(-1)[targets[b, t]].item() for b, t in kept.nonzero().tolist()]
    assert loss.item() == pytest.approx(sum(literal) / len(literal), rel=1e-5)
    assert logits.shape == (2, 9, 257)

def test_without_targets_only_the_last_position_has_logits():
    model, idx = small(), tokens(2, 9)
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 257) and loss is None
    assert largest_difference(logits, all_logits(model, idx)[:, -1:]) < 1e-5

def test_rows_of_a_batch_do_not_mix():
    model, idx = small(n_kv_head=2), tokens(3, 9)
    rows = torch.cat([all_logits(model, row[None]) for row in idx])
    assert largest_difference(all_logits(model, idx), rows) < 1e-4

# --- the loss without the logits, and recomputing ---

def loss_and_gradients(model, idx, targets, **how):
    model.zero_grad()
    loss = model(idx, targets, **how)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

@kinds
@pytest.mark.parametrize("batch", [1, 110], ids=["one slice", "three slices"])
def test_loss_without_logits_is_the_cross_entropy_with_its_gradients(kind, batch):
    model, idx = small(**kind), tokens(batch, 12)
    targets = idx.roll(-1, 1).clone()
    targets[0, 3:7] = -1                       # left out
    loss, gradients = loss_and_gradients(model, idx, targets)
    sliced_loss, sliced_gradients = loss_and_gradients(model, idx, targets, loss_only=True)
    assert sliced_loss == pytest.approx(loss, rel=1e-6)
    assert (sliced_gradients - gradients).norm() <= 1e-5 * gradients.norm()

def test_loss_without_logits_keeps_nothing_of_their_size():
    model, idx, sizes = small(), tokens(200, 12), []
    def pack(t):
        sizes.append(t.numel())
        return t
    for loss_only in (False, True):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert (model(idx, idx, loss_only=loss_only)[0] is None) == loss_only
        assert (max(sizes) >= 200 * 12 * 257) != loss_only

def test_an_evaluated_loss_makes_no_gradients():
    model, idx, made = small(), tokens(2, 12), []
    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            made.append(getattr(result, "shape", ()))
            return result
    for enabled in (True, False):
        made.clear()
        with torch.set_grad_enabled(enabled), Shapes():
            model(idx, idx, loss_only=True)
        assert (made.count((257, 32)) > 0) == enabled                      # the gradient of the head's weight

def test_scaled_loss_without_logits_scales_its_gradients():
    model, idx = small(), tokens(2, 12)
    whole = loss_and_gradients(model, idx, idx, loss_only=True)[1]
    model.zero_grad()
    (model(idx, idx, loss_only=True)[1] * 0.25).backward()
    assert torch.allclose(torch.cat([p.grad.flatten() for p in model.parameters()]), whole / 4, atol=1e-7)

@pytest.mark.parametrize("make", [small, small_lost])
def test_recomputing_changes_no_bit_of_the_gradients(make):
    model, idx = make(), tokens(3, 12)
    straight = loss_and_gradients(model, idx, idx)
    model.recompute = True
    again = loss_and_gradients(model, idx, idx)
    assert again[0] == straight[0] and torch.equal(again[1], straight[1])

@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads resident memory from /proc")
def test_recomputing_keeps_a_fraction_of_the_activations():
    config = LlamaConfig(257, 256, n_layer=4, n_head=4, n_embd=256, n_ffn=688)
    model, idx = apply_lost(Llama(config), 32, 0.01, init="random", select="weight"), tokens(32, 256)
    def resident():
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = {}
    for recompute in (False, True):
        model.recompute, before = recompute, resident()
        loss = model(idx, idx, loss_only=True)[1]
        held[recompute] = resident() - before
        del loss
    assert held[True] < 0.3 * held[False], held

# --- the cache ---

PIECES = {"at-once": [30], "token-by-token": [1] * 30, "in-pieces": [3, 1, 12, 2, 12],
          "prefill-then-tokens": [9] + [1] * 21}

@pytest.mark.parametrize("make", [small, small_lost], ids=["dense", "grouped-lost"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(make, pieces):
    model, idx = make(), tokens(2, 30)                                        # 30 > seq_len
    cache = KVCache(model.config, 2, 30)
    logits = torch.cat([all_logits(model, piece, cache) for piece in idx.split(pieces, dim=1)], dim=1)
    assert largest_difference(logits, all_logits(model, idx)) <= 1e-4
    assert cache.length == 30

@torch.no_grad()
def test_cache_holds_the_keys_of_kv_heads_only():
    cache = KVCache(LlamaConfig(**SIZES, n_kv_head=2), 3, 7)
    assert [t.shape for kv in cache.kv for t in kv] == [(3, 2, 7, 8)] * 4 and cache.length == 0

# --- generation ---

def greedy_literally(model, row, count):
    """The likeliest token each time; a context that outgrows seq_len loses its older half."""
    context, text = row[-model.config.seq_len:], list(row)
    for _ in range(count):
        if len(context) > model.config.seq_len:
            context = context[-max(1, model.config.seq_len // 2):]
        token = max(range(257), key=model(torch.tensor([context]))[0][0, -1].tolist().__getitem__)
        context, text = context + [token], text + [token]
    return text

@pytest.mark.parametrize("seq_len", [1, 7, 12])
@pytest.mark.parametrize("length", [1, 12, 31])
@torch.no_grad()
def test_greedy_text_equals_the_literal_loop(seq_len, length):
    model, idx = small(n_kv_head=2, seq_len=seq_len), tokens(2, length)
    cached = generate(model, idx, 40, temperature=0)                           # several windows
    assert cached.tolist() == [greedy_literally(model, row, 40) for row in idx.tolist()]
    assert len(set(cached[0, length:].tolist())) > 3 or seq_len == 1

@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("make", [small, small_lost])
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
    model, token = small_lost(), tokens(1, 1)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(compile_step(model), token, cache=KVCache(model.config, 1, 12))
    calls = re.findall(r"(?:extern_kernels\.\w+|\w+\.default)\(", code)
    assert "cpp_fused" in code and calls == ["rope_table.default("]

def test_compiled_training_makes_the_rotary_table_once():
    model, operations = small(), []
    def look(graph, example):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
    model.compile(backend=aot_autograd(fw_compiler=look))
    model(tokens(2, 8), tokens(2, 8))[1].backward()
    assert operations.count("nanolost.rope_table.default") == 1
    assert not {"aten.cos.default", "aten.sin.default", "aten.pow.Scalar"} & {*operations}

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
    with torch._inductor.config.patch(force_disable_caches=True):
        step(tokens(1, 1), cache=KVCache(model.config, 1, 12).stay())
    assert len(changed) == 1 + 2 * model.config.n_layer and changed <= fixed

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

def test_pick_token_gives_one_token_a_row():
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])
    assert pick_token(logits, 1.0).tolist() == pick_token(logits, 0).tolist() == [[1], [0]]
    assert torch.equal(logits, torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]))

# --- counts ---

COUNTS = {                                     # millions: dense, low-rank, added at a sparsity of 0.01; rank
    "60m": ("58.07", "42.77", "0.25", 128), "130m": ("134.11", "94.00", "0.78", 256),
    "350m": ("367.97", "185.22", "2.96", 256), "1b": ("1339.08", "609.31", "11.83", 512),
    "7b": ("6738.42", "2820.94", None, 1024)}

def millions(size, rank=None, sparsity=0.0):
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=32_000, **MODELS[size]))
    return count_parameters(apply_lost(model, rank, sparsity) if rank else model) / 1e6

@pytest.mark.parametrize("size", COUNTS)
def test_parameters_are_the_published_counts(size):
    dense, low_rank, added, rank = COUNTS[size]
    assert f"{millions(size):.2f}" == dense
    assert f"{millions(size, rank):.2f}" == low_rank
    if added:                                  # the printed digits are those of the sum
        assert f"{millions(size, rank, 0.01):.2f}" == f"{float(low_rank) + float(added):.2f}"

HAND = dict(vocab_size=11, seq_len=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_ffn=12)

def counts(model):
    return count_parameters(model), count_multiplies(model), count_flops(model)

@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_a_dense_model_by_hand(tied):
    matrices = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12) + 11 * 8      # q k v o, MLP; head
    norms, embedding = 2 * 2 * 8 + 8, 0 if tied else 11 * 8
    attention = 12 * 2 * 8 * 16
    model = Llama(LlamaConfig(**HAND, tie_embeddings=tied))
    assert counts(model) == (matrices + norms + embedding, matrices, 6 * matrices + attention)

@pytest.mark.parametrize("learn_gamma", [False, True])
def test_counts_of_a_lost_model_by_hand(learn_gamma):
    def layer(out_features, in_features, k):
        return 3 * (out_features + in_features) + k * out_features
    block = 2 * layer(8, 8, 2) + 2 * layer(4, 8, 2) + 2 * layer(12, 8, 2) + layer(8, 12, 3)
    matrices, norms, embedding, gammas = 2 * block + 11 * 8, 2 * 2 * 8 + 8, 11 * 8, 14 * learn_gamma
    attention = 12 * 2 * 8 * 16
    model = apply_lost(Llama(LlamaConfig(**HAND)), 3, 0.25, learn_gamma=learn_gamma)
    assert counts(model) == (matrices + norms + embedding + gammas, matrices, 6 * matrices + attention)

# --- initialisation ---

class WithUnknownParameter(Llama):
    def init_weights(self):
        self.extra = nn.Parameter(torch.zeros(3))
        super().init_weights()

def test_parameter_that_no_rule_names_is_refused():
    with pytest.raises(ValueError, match="no rule says how to initialise extra: add one"):
        WithUnknownParameter(LlamaConfig(**SIZES))

def seeded_model(seed):
    torch.manual_seed(seed)
    return Llama(LlamaConfig(**SIZES)).state_dict()

def test_seed_decides_every_matrix():
    first, again, other = seeded_model(1), seeded_model(1), seeded_model(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == name.endswith("norm.weight") for name in first)

def test_matrices_start_normal_and_norms_at_one():
    for name, p in Llama(LlamaConfig(**{**SIZES, "n_embd": 64, "init_std": 0.04})).named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        else:
            std = 0.04 if name.startswith("model.layers.") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.08) and abs(p.mean().item()) < 4e-3

def test_tied_head_is_the_embedding():
    model = Llama(LlamaConfig(**SIZES, tie_embeddings=True))
    assert model.lm_head.weight is model.model["embed_tokens"].weight

# --- configuration ---

@pytest.mark.parametrize("sizes, message", [
    (dict(n_embd=33), "n_embd 33 must be an even multiple of n_head 4"),
    (dict(n_embd=36), "n_embd 36 must be an even multiple of n_head 4"),
    (dict(n_kv_head=3), "n_head 4 must be a multiple of n_kv_head 3"),
    (dict(n_kv_head=8), "n_head 4 must be a multiple of n_kv_head 8"),
])
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**SIZES, **sizes})

@kinds
def test_configuration_round_trips_through_hugging_face(kind):
    config = LlamaConfig(**{**SIZES, **kind})
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_hf(TheirConfig(**config.to_hf()).to_dict()) == config

def test_flat_rope_theta_of_older_files_is_read():
    old = {**LlamaConfig(**SIZES).to_hf(), "rope_theta": 77.0, "rope_scaling": None}
    del old["rope_parameters"]
    assert LlamaConfig.from_hf(old).rope_theta == 77.0

@pytest.mark.parametrize("changed, name", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_scaling = 'yarn'"),
    ({"attention_bias": True}, "attention_bias = True"), ({"mlp_bias": True}, "mlp_bias = True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"), ({"head_dim": 16}, "head_dim = 16"),
])
def test_what_the_model_does_not_compute_is_refused(changed, name):
    theirs = LlamaConfig(**SIZES).to_hf()
    with pytest.raises(ValueError, match=f"config.json: {name} is not supported"):
        LlamaConfig.from_hf({**theirs, **changed})

@pytest.mark.parametrize("key", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_size_is_refused(key):
    theirs = LlamaConfig(**SIZES).to_hf()
    del theirs[key]
    with pytest.raises(ValueError, match=f"config.json lacks {key}: is it a LLaMA"):
        LlamaConfig.from_hf(theirs)

# --- LOST checkpoints ---

def forbidden(*given):
    raise AssertionError("a decomposition was called")

@pytest.mark.parametrize("switches", [
    {}, {"learn_gamma": True}, {"activation": "none", "gamma": 0.3}, {"skip": ("lm_head", "o_proj")}])
@pytest.mark.parametrize("tied", [False, True])
def test_lost_checkpoint_round_trips_without_a_decomposition(switches, tied, tmp_path, monkeypatch):
    rank, sparsity = {"default": 6, "q_proj": 3}, {"default": 0.1, "up_proj": 0, "down_proj": 0.5}
    model = apply_lost(small(n_kv_head=2, tie_embeddings=tied), rank, sparsity, **switches)
    folder = saved(model, tmp_path)
    monkeypatch.setattr(lost, "decompose", forbidden)
    with pytest.raises(AssertionError, match="a decomposition was called"):
        small_lost()
    for path in (folder, str(tmp_path)):
        loaded, state = load_model(path)
        assert state == {"step": 1} and loaded.config == model.config
        assert_same_model(loaded, model)

def assert_same_model(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == t.dtype and torch.equal(ours[name], t) for name, t in theirs.items())
    assert count_parameters(loaded) == count_parameters(model)
    layers = {name: m.settings() for name, m in model.named_modules() if isinstance(m, LOSTLinear)}
    assert {n: m.settings() for n, m in loaded.named_modules() if isinstance(m, LOSTLinear)} == layers
    idx = tokens(2, 9)
    assert torch.equal(all_logits(loaded, idx), all_logits(model, idx))
