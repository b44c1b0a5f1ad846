"""The plain LLaMA against Hugging Face's, its counts by hand."""
import gc
import os

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from small_models import (
    SIZES,
    all_logits,
    kinds,
    largest_difference,
    loss_and_gradients,
    small,
    small_lost,
    spread,
    tokens,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import lost
from lost import LOSTLinear, apply_lost
from model import MODELS, ConfigError, Llama, LlamaConfig
from nanolost.checkpoint import load_model, save_checkpoint
from nanolost.counts import count_flops, count_multiplies, count_parameters
from nanolost.decode import generate
from nanolost.huggingface import config_to_hf
from nanolost.tokenizer import Tokenizer

def saved(model, out_dir):
    """A checkpoint folder of the model after one AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    idx = tokens(2, 8)
    model(idx, idx)[1].backward()
    optimizer.step()
    return save_checkpoint(str(out_dir), 1, model, [optimizer], {"step": 1}, Tokenizer.named("byte"), keep=1)

# --- the reference implementation ---

def theirs_of(model):
    config = TheirConfig(**config_to_hf(model.config), attn_implementation="eager")
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
    model = small(max_seq_len=24)
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

def test_compiled_training_makes_the_rotary_table_once():
    model, operations = small(), []
    def look(graph, example):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
    model.compile(backend=aot_autograd(fw_compiler=look))
    model(tokens(2, 8), tokens(2, 8))[1].backward()
    assert operations.count("nanolost.rope_table.default") == 1
    assert not {"aten.cos.default", "aten.sin.default", "aten.pow.Scalar"} & {*operations}

# --- recomputing ---

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

HAND = dict(vocab_size=11, max_seq_len=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_ffn=12)

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

def test_flops_are_those_of_the_window_that_is_trained():
    model = Llama(LlamaConfig(**HAND))
    assert count_flops(model, 16) == count_flops(model)
    assert count_flops(model, 4) == count_flops(model) - 12 * 2 * 8 * 12

# --- initialisation ---

class WithUnknownParameter(Llama):
    def init_weights(self, seed=None):
        self.extra = nn.Parameter(torch.zeros(3))
        super().init_weights(seed)

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
    (dict(n_kv_head=0), "n_kv_head = 0 must be a whole number"),
    (dict(n_layer=0), "n_layer = 0 must be a whole number"),
    (dict(n_ffn=-4), "n_ffn = -4 must be a whole number"),
    (dict(init_std=-0.1), "init_std = -0.1 must be a number"),
    (dict(tie_embeddings=1), "tie_embeddings = 1 must be true or false"),
    (dict(head_dim=7), "head_dim = 7 must be even"),
    (dict(head_dim=0), "head_dim = 0 must be a whole number"),
    (dict(qk_norm=None), "qk_norm = None must be true or false"),
    (dict(rope_scaling=(2.0, 1.0)), "rope_scaling = .* must be empty, 1 or 4 numbers"),
    (dict(rope_scaling=(0.0,)), "rope_scaling = 0.0 must be a number"),
    (dict(rope_scaling=(2.0, 4.0, 4.0, 8)), "rope_scaling 4.0 must be below rope_scaling 4.0"),
])
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**{**SIZES, **sizes})

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

# --- first weights ---

def test_a_weight_depends_on_the_seed_and_its_own_name_alone():
    one, deeper, other = (Llama(LlamaConfig(**{**SIZES, "n_layer": layers}), seed)
                          for layers, seed in ((1, 3), (2, 3), (1, 4)))
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [model.state_dict()[name] for model in (one, deeper, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = [p for n, p in deeper.state_dict().items() if n.endswith("up_proj.weight")]
    assert not torch.equal(*drawn)

def test_torchs_own_seed_decides_where_none_is_given():
    def weight(seed):
        torch.manual_seed(seed)
        return Llama(LlamaConfig(**SIZES)).lm_head.weight
    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))
