"""The LOST layer against the paper's equations written out, and every switch and error of lost.py."""
import random
import re
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_fw_bw_and_get_code

import lost
from lost import LOSTLinear, apply_lost, by_module, decompose

SHAPES = {"square": (24, 24), "wide": (20, 36), "tall": (36, 20)}             # (out, in)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def random_weight(shape, seed=0, dtype=torch.float64):
    return (0.3 * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)).to(dtype)

def dense_layer(shape, seed=0, dtype=torch.float64, bias=False):
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random_weight(shape, seed))
        if bias:
            linear.bias.copy_(random_weight((shape[0],), seed + 1))
    return linear

def inputs(in_features, seed=0, dtype=torch.float64):
    return torch.randn(2, 5, in_features, generator=seeded(100 + seed), dtype=torch.float64).to(dtype)

def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()

# --- the slow form ---

def literal_decomposition(W, rank, k, order=2):
    """Equations 1–6 with nothing saved: the full SVD, W_comp as a matrix, its columns ranked by a sort."""
    W = W.double()
    U, sigma, Vt = torch.linalg.svd(W)
    root = torch.diag(sigma[:rank] ** 0.5)
    A, B = root @ Vt[:rank], U[:, :rank] @ root
    W_r = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vt[:rank]
    W_comp = W - W_r
    CI = [torch.linalg.vector_norm(W_comp[:, j], ord=order).item() for j in range(W.shape[1])]
    index = sorted(sorted(range(W.shape[1]), key=lambda j: CI[j], reverse=True)[:k])
    return A, B, index, W_r, W_comp

def with_the_signs_of(A, B, given_A):
    """A singular pair is defined up to a common sign, and SiLU is not odd: take the other's signs."""
    sign = (A * given_A.double()).sum(1).sign()
    return sign[:, None] * A, B * sign

class LiteralLayer(nn.Module):
    """Equation 7 as it is printed."""

    def __init__(self, A, B, index, W_s, gamma, dtype):
        super().__init__()
        self.A, self.B, self.W_s = (nn.Parameter(t.to(dtype)) for t in (A, B, W_s))
        self.index, self.gamma = index, gamma

    def forward(self, x):
        z = x @ self.A.T
        low_rank = (z * torch.sigmoid(z)) @ self.B.T
        return self.gamma * low_rank + (1 - self.gamma) * (x[..., self.index] @ self.W_s.T)

def fast_and_literal(shape, dtype, learn_gamma=False, rank=6, sparsity=0.2, gamma=0.6):
    linear = dense_layer(shape, dtype=dtype)
    layer = LOSTLinear.from_linear(linear, rank, sparsity, gamma, learn_gamma=learn_gamma)
    A, B, index, _, _ = literal_decomposition(linear.weight.detach(), rank, int(sparsity * shape[1]))
    A, B = with_the_signs_of(A, B, layer.A.detach())
    gamma = nn.Parameter(torch.tensor(gamma, dtype=dtype)) if learn_gamma else gamma
    return layer, LiteralLayer(A, B, index, linear.weight.detach()[:, index], gamma, dtype)

def train(layer, steps, dtype):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        x = inputs(layer.A.shape[1], step, dtype)
        target = inputs(layer.B.shape[0], step + 1000, dtype)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

@shapes
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("learn_gamma", [False, True])
@pytest.mark.parametrize("steps", [0, 10])
def test_layer_equals_the_literal_equations(shape, dtype, tolerance, learn_gamma, steps):
    layer, literal = fast_and_literal(shape, dtype, learn_gamma)
    x = inputs(shape[1], 7, dtype)
    at_init = layer(x).detach()
    train(layer, steps, dtype)
    train(literal, steps, dtype)
    assert relative_error(layer(x), literal(x)) <= tolerance
    assert steps == 0 or relative_error(layer(x), at_init) > 0.01             # the training moved something

@shapes
def test_factors_are_the_best_approximation_split_evenly(shape):
    W = random_weight(shape)
    A, B, index, W_r, _ = literal_decomposition(W, 7, 5)
    parts = decompose(W, 7, 5)
    A, B = with_the_signs_of(A, B, parts.A)
    assert relative_error(parts.B @ parts.A, W_r) < 1e-10
    assert relative_error(parts.A, A) < 1e-10 and relative_error(parts.B, B) < 1e-10
    assert parts.index.tolist() == index and torch.equal(parts.W_s, W[:, index])

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_no_matrix_of_the_rank_is_nearer_than_the_factors(out_features, in_features, data):
    W = random_weight((out_features, in_features), data.draw(st.integers(0, 10_000)))
    rank = data.draw(st.integers(1, min(W.shape)))
    parts = decompose(W, rank, 0)
    least = torch.linalg.svdvals(W)[rank:].norm()                             # Eckart and Young 1936
    assert parts.A.shape == (rank, in_features) and parts.B.shape == (out_features, rank)
    assert (W - parts.B @ parts.A).norm() <= least + 1e-6 * W.norm()

@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("select, order", [("residual", 2), ("residual_l1", 1)])
def test_channels_are_those_of_a_full_svd(select, order, seed):
    draw = random.Random(seed)
    shape = draw.randint(6, 60), draw.randint(6, 60)
    rank, k = draw.randint(1, min(shape) - 1), draw.randint(1, shape[1] - 1)
    W = random_weight(shape, seed)
    assert decompose(W, rank, k, select=select).index.tolist() == literal_decomposition(W, rank, k, order)[2]

# --- gradients ---

@pytest.mark.parametrize("learn_gamma", [False, True])
def test_gradient_reaches_all_that_is_trained(learn_gamma):
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, learn_gamma=learn_gamma)
    layer(inputs(16)).square().sum().backward()
    trained = dict(layer.named_parameters())
    assert set(trained) == {"A", "B", "W_s"} | ({"gamma"} if learn_gamma else set())
    assert all(p.grad is not None and (p.grad != 0).all() for p in trained.values())

def test_sparse_path_passes_gradient_to_its_channels_alone():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, gamma=0.0)
    x = inputs(16).requires_grad_()
    layer(x).square().sum().backward()
    touched = (x.grad != 0).flatten(0, 1)
    assert touched.all(0).nonzero().flatten().tolist() == layer.index.tolist()
    assert touched.any(0).sum() == layer.k == 4

@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_under_autocast_are_those_of_both_paths_by_themselves(dtype):
    layer, literal = fast_and_literal((24, 36), torch.float32)
    x = inputs(36, dtype=torch.float32).requires_grad_()
    found = []
    for module in (layer, literal):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = module(x)
        assert y.dtype == (dtype or torch.float32)
        y.float().square().sum().backward()
        found.append([y.float(), x.grad, *(p.grad for p in module.parameters())])
        x.grad = None
    errors = [relative_error(one, other) for one, other in zip(*found, strict=True)]
    assert len(errors) == 5 and max(errors) < (1e-2 if dtype else 1e-6)

def test_training_and_inference_forms_of_the_layer_agree():
    layer = LOSTLinear.from_linear(dense_layer((24, 36), bias=True), 6, 0.2, learn_gamma=True)
    for x in (inputs(36), inputs(36)[0, 0]):                               # also a vector, as nn.Linear takes
        with torch.no_grad():
            inference = layer(x)
        assert relative_error(layer(x), inference) < 1e-12

def test_compiled_training_of_a_layer_is_six_products_without_a_scatter():
    layer = LOSTLinear.from_linear(dense_layer((96, 128), dtype=torch.float32), 32, 0.1)
    x = torch.randn(256, 128, requires_grad=True)
    step = torch.compile(layer, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_fw_bw_and_get_code(lambda: step(x))
    code = "".join(codes)
    assert len(codes) == 2 and len(re.findall(r"extern_kernels\.mm\(|_mkl_linear\(", code)) == 6
    assert "atomic_add" not in code

def test_gamma_one_leaves_the_sparse_path_out():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, gamma=1.0)
    x = inputs(16)
    y = layer(x)
    y.square().sum().backward()
    assert not layer.W_s.grad.any() and layer.A.grad.any()
    assert relative_error(y, nn.functional.silu(x @ layer.A.T) @ layer.B.T) < 1e-12

# --- switches ---

@pytest.mark.parametrize("shape, rank", [((300, 400), 32), ((400, 300), 200)])
def test_random_factors_multiply_to_the_standard_deviation_of_cola(shape, rank):
    parts = decompose(random_weight(shape), rank, 3, init="random", generator=seeded())
    product = parts.B @ parts.A
    assert product.std().item() == pytest.approx(sum(shape) ** -0.5, rel=0.03)
    assert abs(product.mean().item()) < 0.1 * product.std().item()
    assert parts.A.std().item() == pytest.approx(parts.B.std().item(), rel=0.05)

def test_random_factors_choose_the_channels_of_the_svd():
    W = random_weight((20, 30))
    assert torch.equal(decompose(W, 5, 6, init="random").index, decompose(W, 5, 6).index)

def test_selection_by_weight_takes_the_largest_columns():
    W = random_weight((20, 30))
    W[:, [3, 17, 29]] *= 10
    parts = decompose(W, 5, 3, select="weight")
    assert parts.index.tolist() == [3, 17, 29] and torch.equal(parts.W_s, W[:, [3, 17, 29]])

def test_selection_by_residual_overlooks_what_the_factors_hold():
    W = 0.01 * random_weight((20, 30))
    W[:, 4] += 10.0                                                           # the largest column, rank one
    W[:8, 11] += 0.1                                                          # the largest of the rest
    assert decompose(W, 1, 1, select="weight").index.tolist() == [4]
    assert decompose(W, 1, 1, select="residual").index.tolist() == [11]
    assert decompose(W, 1, 1, select="residual_l1").index.tolist() == [11]

def test_l1_and_l2_residuals_rank_a_spike_differently():
    W = torch.zeros(20, 6, dtype=torch.float64)
    W[0, 0] = 100.0                                                           # the rank-one part
    W[1, 1] = 2.0                                                             # L2 norm 2, L1 norm 2
    W[2:18, 2] = 0.4                                                          # L2 norm 1.6, L1 norm 6.4
    assert decompose(W, 1, 1, select="residual").index.tolist() == [1]
    assert decompose(W, 1, 1, select="residual_l1").index.tolist() == [2]

def test_random_selection_ignores_the_weight_and_reaches_every_channel():
    W = random_weight((8, 10))
    W[:, 0] *= 100
    draws = [decompose(W, 2, 3, select="random", generator=seeded(s)).index.tolist() for s in range(60)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in draws)
    counts = [sum(j in d for d in draws) for j in range(10)]
    assert min(counts) >= 6 and max(counts) <= 32                             # 18 expected

@shapes
def test_sparse_part_may_start_from_the_residual(shape):
    W = random_weight(shape)
    _, _, index, _, W_comp = literal_decomposition(W, 6, 5)
    assert relative_error(decompose(W, 6, 5, sparse_init="residual").W_s, W_comp[:, index]) < 1e-10

def test_without_activation_the_layer_is_linear():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, activation="none")
    x, other = inputs(16), inputs(16, 1)
    assert relative_error(layer(2 * x - 3 * other), 2 * layer(x) - 3 * layer(other)) < 1e-12
    silu = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25)
    assert relative_error(silu(2 * x), 2 * silu(x)) > 0.01

def test_learned_gamma_is_a_parameter_of_the_state():
    fixed = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, gamma=0.4)
    learned = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, gamma=0.4, learn_gamma=True)
    assert set(fixed.state_dict()) == {"A", "B", "W_s", "index"}
    assert set(learned.state_dict()) == {"A", "B", "W_s", "index", "gamma"}
    assert learned.gamma.shape == () and learned.gamma.item() == 0.4 and learned.gamma.requires_grad
    assert torch.equal(fixed(inputs(16)), learned(inputs(16)))

def test_sparsity_zero_has_no_sparse_path():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0, gamma=0.4)
    x = inputs(16)
    assert set(layer.state_dict()) == {"A", "B"} and layer.k == 0
    assert relative_error(layer(x), 0.4 * (nn.functional.silu(x @ layer.A.T) @ layer.B.T)) < 1e-12

@pytest.mark.parametrize("sparsity, in_features, k", [
    (0, 50, 0), (1e-9, 50, 1), (0.01, 50, 1), (0.01, 199, 1), (0.01, 200, 2), (0.1, 59, 5), (1, 16, 16),
])
def test_sparsity_counts_channels_downwards_but_at_least_one(sparsity, in_features, k):
    layer = LOSTLinear.from_linear(dense_layer((6, in_features)), 2, sparsity)
    assert layer.k == k
    assert k == 0 or layer.W_s.shape == (6, k) and layer.index.shape == (k,)

@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_bias_is_carried_unscaled(sparsity):
    with_bias = LOSTLinear.from_linear(dense_layer((12, 16), bias=True), 4, sparsity)
    without = LOSTLinear.from_linear(dense_layer((12, 16)), 4, sparsity)
    added = with_bias(inputs(16)) - without(inputs(16))
    assert torch.allclose(added, random_weight((12,), 1).expand_as(added), rtol=0, atol=1e-12)
    assert without.bias is None

@pytest.mark.parametrize("switch", [
    {"init": "random"}, {"select": "random"}, {"init": "random", "select": "random"}])
def test_generator_makes_random_draws_reproducible(switch):
    def draw(seed):
        return decompose(random_weight((20, 60)), 5, 20, **switch, generator=seeded(seed))
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for part, kind in (("A", "init"), ("B", "init"), ("index", "select")):
        assert torch.equal(getattr(first, part), getattr(other, part)) == (kind not in switch)
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize("switch", [{"init": "random"}, {"select": "random"}])
def test_without_generator_the_global_one_draws(switch):
    def draw(seed):
        torch.manual_seed(seed)
        parts = decompose(random_weight((20, 60)), 5, 20, **switch)
        return torch.cat([parts.A.flatten(), parts.index])
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))

# --- whole models ---

class Network(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.embed = nn.Embedding(20, 16, device=device)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "q_proj": nn.Linear(16, 16, device=device),
            "o_proj": nn.Linear(16, 16, bias=False, device=device),
            "mlp": nn.ModuleDict({"up": nn.Linear(16, 40, device=device)})}) for _ in range(2))
        self.lm_head = nn.Linear(16, 20, bias=False, device=device)

def kinds(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, LOSTLinear))}

ALL = [f"blocks.{i}.{name}" for i in range(2) for name in ("q_proj", "o_proj", "mlp.up")]

def test_apply_replaces_every_linear_in_place_but_the_head():
    model = Network()
    embed, head, up = model.embed, model.lm_head, model.blocks[1]["mlp"]["up"]
    expected = decompose(up.weight, 4, 4)
    assert apply_lost(model, 4, 0.25, gamma=0.4, activation="none", learn_gamma=True) is model
    assert kinds(model) == {**dict.fromkeys(ALL, LOSTLinear), "lm_head": nn.Linear}
    assert model.embed is embed and model.lm_head is head
    layer = model.blocks[1]["mlp"]["up"]
    assert all(torch.equal(getattr(layer, name), part) for name, part in expected._asdict().items())
    assert layer.gamma.item() == pytest.approx(0.4) and layer.activation == "none"
    assert torch.equal(layer.bias, up.bias)

def test_apply_hands_its_switches_on(monkeypatch):
    seen, real = [], lost.decompose
    monkeypatch.setattr(lost, "decompose", lambda *given: seen.append(given[1:]) or real(*given))
    generator = seeded()
    switches = dict(init="random", select="weight", sparse_init="residual", generator=generator)
    apply_lost(Network(), 4, 0.25, **switches)
    assert seen == [(4, 4, *switches.values())] * len(ALL)

def test_parts_of_a_model_decomposed_apart_make_the_whole():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)))
    whole = apply_lost(model(), 4, 0.2)
    parts = [apply_lost(model(), 4, 0.2, part=(i, 2)) for i in range(2)]
    for i, layer in enumerate(whole):
        for name, value in layer.state_dict().items():
            assert torch.equal(parts[i % 2][i].state_dict()[name], value)
            assert parts[1 - i % 2][i].state_dict()[name].shape == value.shape

def test_a_layer_that_a_model_uses_twice_is_replaced_in_both_places():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)})
    model["c"] = model["a"]
    apply_lost(model, 2, 0.25)
    assert isinstance(model["a"], LOSTLinear) and model["c"] is model["a"] is not model["b"]

def test_apply_holds_one_decomposition_at_a_time(monkeypatch):
    model, counts, real = Network(), [], lost.decompose
    def count_first(*given):
        counts.append(sum(kind is LOSTLinear for kind in kinds(model).values()))
        return real(*given)
    monkeypatch.setattr(lost, "decompose", count_first)
    apply_lost(model, 4, 0.25)
    assert counts == list(range(len(ALL)))

@pytest.mark.parametrize("skip, dense", [
    ((), []),
    (("q_proj",), ["blocks.0.q_proj", "blocks.1.q_proj", "lm_head"]),
    (("proj",), ["lm_head"]),                                                 # whole parts of a name only
    (("0.o_proj", "mlp.up"), ["blocks.0.o_proj", "blocks.0.mlp.up", "blocks.1.mlp.up", "lm_head"]),
])
def test_skip_keeps_the_modules_whose_names_end_so(skip, dense):
    model = apply_lost(Network(), 4, 0.25, skip=(*skip, "lm_head") if dense else skip)
    assert sorted(name for name, kind in kinds(model).items() if kind is nn.Linear) == sorted(dense)

def test_by_module_takes_the_longest_match_then_the_default():
    value = {"default": 1, "up": 2, "mlp.up": 3, "0.mlp.up": 4, "p": 5}
    names = ["blocks.0.q_proj", "up", "blocks.1.up", "blocks.1.mlp.up", "blocks.0.mlp.up", "blocks.10.mlp.up"]
    assert [by_module(value, name) for name in names] == [1, 2, 2, 3, 4, 3]
    assert by_module(7, "anything") == 7
    with pytest.raises(ValueError, match="nothing is said for q_proj, only for up: add a default"):
        by_module({"up": 2}, "q_proj")

def test_rank_and_sparsity_may_differ_by_module():
    rank, sparsity = {"default": 4, "q_proj": 2, "0.q_proj": 3}, {"default": 0.25, "mlp.up": 0, "o_proj": 0.5}
    model = apply_lost(Network(), rank, sparsity)
    layers = {name: (m.rank, m.k) for name, m in model.named_modules() if isinstance(m, LOSTLinear)}
    assert layers == {"blocks.0.q_proj": (3, 4), "blocks.1.q_proj": (2, 4), "blocks.0.o_proj": (4, 8),
                      "blocks.1.o_proj": (4, 8), "blocks.0.mlp.up": (4, 0), "blocks.1.mlp.up": (4, 0)}
    assert all(p.isfinite().all() for p in model.parameters())

# --- errors ---

SIZE = r"rank {} of a 12×8 weight must lie in \[1, 8\]"
NO_RESIDUAL = "rank 8 of a 12×8 weight leaves no residual .* set the sparsity to 0, or select by weight"

@pytest.mark.parametrize("wrong, message", [
    ({"rank": 0}, SIZE.format(0)), ({"rank": -3}, SIZE.format(-3)), ({"rank": 9}, SIZE.format(9)),
    ({"rank": 8}, NO_RESIDUAL), ({"rank": 8, "select": "residual_l1"}, NO_RESIDUAL),
    ({"sparsity": -0.1}, r"sparsity = -0.1: must lie in \[0, 1\]"),
    ({"sparsity": 1.01}, r"sparsity = 1.01: must lie in \[0, 1\]"),
    ({"sparsity": float("nan")}, r"sparsity = nan: must lie in \[0, 1\]"),
    ({"gamma": -0.1}, r"gamma = -0.1: must lie in \[0, 1\]"),
    ({"gamma": 1.5}, r"gamma = 1.5: must lie in \[0, 1\]"),
    ({"gamma": float("nan")}, r"gamma = nan: must lie in \[0, 1\]"),
    ({"activation": "relu"}, "activation = 'relu': choose one of silu, none"),
    ({"init": "qr"}, "init = 'qr': choose one of svd, random"),
    ({"select": "norm"}, "select = 'norm': choose one of residual, residual_l1, weight, random"),
    ({"sparse_init": "zero"}, "sparse_init = 'zero': choose one of weight, residual"),
])
def test_layer_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        LOSTLinear.from_linear(dense_layer((12, 8)), **{"rank": 3, "sparsity": 0.25, **wrong})

@pytest.mark.parametrize("allowed", [{"select": "weight"}, {"select": "random"}, {"sparsity": 0}])
def test_full_rank_is_allowed_where_no_residual_is_asked_for(allowed):
    linear = dense_layer((12, 8))
    layer = LOSTLinear.from_linear(linear, **{"rank": 8, "sparsity": 0.25, **allowed})
    assert relative_error(layer.B @ layer.A, linear.weight) < 1e-10

@pytest.mark.parametrize("k", [-1, 9])
def test_decompose_refuses_a_number_of_channels_outside_the_weight(k):
    with pytest.raises(ValueError, match=rf"k = {k} channels of 8 must lie in \[0, 8\]"):
        decompose(random_weight((12, 8)), 3, k)

def test_decompose_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"a weight is a matrix \(out, in\), not of shape \(2, 3, 4\)"):
        decompose(torch.ones(2, 3, 4), 1, 1)

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weight_is_refused(value, dtype):
    linear = dense_layer((12, 8), dtype=dtype)
    linear.weight.data[3, 5] = value
    with pytest.raises(ValueError, match="the weight has NaN or infinite elements"):
        LOSTLinear.from_linear(linear, 3, 0.25)

def test_overflow_of_a_narrow_dtype_is_refused():
    W = (65_000 * random_weight((16, 16)).sign()).half()
    assert literal_decomposition(W, 2, 16)[4].abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(ValueError, match="the decomposition overflows torch.float16: use a wider dtype"):
        decompose(W, 2, 16, sparse_init="residual")

@pytest.mark.parametrize("rank, sparsity", [
    ({"default": 4, "qproj": 2}, 0.25), (4, {"default": 0.25, "qproj": 0.5})])
def test_apply_refuses_a_dict_with_an_unknown_module(rank, sparsity):
    model = Network()
    with pytest.raises(ValueError, match="no module is called 'qproj': the first ones are blocks.0.q_proj, "):
        apply_lost(model, rank, sparsity)
    assert set(kinds(model).values()) == {nn.Linear}

def test_apply_refuses_a_dict_that_leaves_modules_open():
    with pytest.raises(ValueError, match="nothing is said for blocks.0.o_proj, only for q_proj"):
        apply_lost(Network(), {"q_proj": 2}, 0.25)

@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})])
def test_apply_refuses_a_model_without_linear_layers(model):
    with pytest.raises(ValueError, match="the model has no nn.Linear to replace"):
        apply_lost(model, 2, 0.25)

def test_apply_names_the_module_that_does_not_fit():
    with pytest.raises(ValueError, match=r"blocks\.0\.q_proj: rank 17 of a 16×16 weight must lie"):
        apply_lost(Network(), {"default": 4, "q_proj": 17}, 0.25)

# --- merging ---

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learn_gamma", [False, True])
@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_merged_weight_equals_the_linear_layer(bias, learn_gamma, sparsity):
    given = dense_layer((12, 16), bias=bias)
    layer = LOSTLinear.from_linear(given, 4, sparsity, 0.4, activation="none", learn_gamma=learn_gamma)
    train(layer, 3, torch.float64)
    dense = layer.merge()
    assert type(dense) is nn.Linear and dense.weight.dtype == torch.float64
    assert (dense.bias is not None) == bias
    assert relative_error(dense(inputs(16)), layer(inputs(16))) < 1e-12
    assert all(p.requires_grad for p in dense.parameters())

def test_merge_refuses_a_layer_with_silu():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25)
    with pytest.raises(ValueError, match="activation 'silu' .*makes the layer non-linear"):
        layer.merge()

# --- hard weights ---

@shapes
@pytest.mark.parametrize("true_rank", [0, 3])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_rank_deficient_weight_gives_finite_factors(shape, true_rank, dtype, tolerance):
    W = (random_weight((shape[0], true_rank)) @ random_weight((true_rank, shape[1]), 1)).to(dtype)
    parts = decompose(W, 8, 5)
    assert all(part.isfinite().all() for part in parts)
    error = (parts.B.double() @ parts.A.double() - W.double()).norm()
    assert error <= tolerance * W.double().norm()

@shapes
def test_rank_deficient_weight_trains(shape):
    linear = dense_layer(shape)
    linear.weight.data.copy_(random_weight((shape[0], 3)) @ random_weight((3, shape[1]), 1))
    layer = LOSTLinear.from_linear(linear, 8, 0.25)
    train(layer, 3, torch.float64)
    assert layer(inputs(shape[1])).isfinite().all()
    assert torch.linalg.matrix_rank(layer.B @ layer.A) == 8                   # the empty directions learn too

@shapes
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("init", ["svd", "random"])
def test_parts_have_the_dtype_of_the_weight(shape, dtype, tolerance, init):
    W = random_weight(shape, dtype=dtype)
    parts = decompose(W, 6, 5, init=init, generator=seeded())
    assert {parts.A.dtype, parts.B.dtype, parts.W_s.dtype} == {dtype}
    assert all(part.is_contiguous() and part.isfinite().all() for part in parts)
    W_r = literal_decomposition(W, 6, 5)[3]
    assert init == "random" or relative_error(parts.B.double() @ parts.A.double(), W_r) < tolerance

@pytest.mark.parametrize("select", lost.SWITCHES["select"])
def test_index_is_int32_and_ascending(select):
    index = decompose(random_weight((20, 40)), 5, 17, select=select).index
    assert index.dtype == torch.int32 and index.is_contiguous() and (index.diff() > 0).all()
    assert 0 <= index.min() and index.max() < 40

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_computes_in_the_dtype_of_the_weight(dtype):
    layer = LOSTLinear.from_linear(dense_layer((12, 16), dtype=dtype, bias=True), 4, 0.25, learn_gamma=True)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(inputs(16, dtype=dtype)).dtype == dtype

# --- shapes only ---

def test_meta_device_makes_shapes_without_a_decomposition(monkeypatch):
    monkeypatch.setattr(lost, "decompose", None)
    model = apply_lost(Network(device="meta"), 4, 0.25, learn_gamma=True)
    layer = model.blocks[0]["mlp"]["up"]
    shape = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shape == {"A": (4, 16), "B": (40, 4), "W_s": (40, 4), "index": (4,), "gamma": (), "bias": (40,)}
    assert all(t.is_meta for t in model.state_dict().values()) and layer.index.dtype == torch.int32

def test_meta_device_still_checks_the_sizes():
    with pytest.raises(ValueError, match=r"rank 9 of a 12×8 weight must lie in \[1, 8\]"):
        LOSTLinear.from_linear(nn.Linear(8, 12, device="meta"), 9, 0.25)

@pytest.mark.parametrize("activation", ["silu", "none"])
def test_diagnosis_equals_its_definition(activation):
    layer = LOSTLinear.from_linear(dense_layer((24, 40)), 6, 0.2, 0.6, activation)
    x = inputs(40)
    z = x @ layer.A.T
    low = 0.6 * (F.silu(z) if activation == "silu" else z) @ layer.B.T
    sparse = 0.4 * x[..., layer.index] @ layer.W_s.T
    sigma = torch.linalg.svdvals(layer.B @ layer.A)[:6]
    p = sigma / sigma.sum()
    expected = {"low_rank_share": low.norm() ** 2 / (low.norm() ** 2 + sparse.norm() ** 2),
                "cosine": F.cosine_similarity(low.flatten(), sparse.flatten(), 0),
                "effective_rank": (p ** -p).prod(), "gamma": torch.tensor(0.6),
                "norm_A": torch.linalg.norm(layer.A, 2), "norm_B": torch.linalg.norm(layer.B, 2)}
    assert layer.diagnose(x) == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)

def test_diagnosis_of_the_factors_does_not_depend_on_autocast():
    layer = LOSTLinear.from_linear(dense_layer((24, 40), dtype=torch.float32), 6, 0.2)
    x = inputs(40, dtype=torch.float32)
    plain = layer.diagnose(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer.diagnose(x)
    for name in ("effective_rank", "norm_A", "norm_B"):
        assert rough[name] == plain[name]
    assert rough["low_rank_share"] == pytest.approx(plain["low_rank_share"], rel=0.01)

def test_diagnosis_sees_paths_that_cancel_and_a_path_that_is_not_there():
    layer = LOSTLinear.from_linear(dense_layer((24, 40)), 6, 1.0, 0.6, "none")
    with torch.no_grad():                      # all channels, so that the sparse path can be minus the other
        layer.W_s.copy_(-0.6 / 0.4 * layer.B @ layer.A)
    found = layer.diagnose(inputs(40))
    assert found["cosine"] == pytest.approx(-1) and found["low_rank_share"] == pytest.approx(0.5)
    alone = LOSTLinear.from_linear(dense_layer((24, 40)), 6, 0.0, 1.0).diagnose(inputs(40))
    assert alone["low_rank_share"] == 1 and alone["cosine"] == 0

def test_diagnosis_looks_at_every_layer_once_and_leaves_no_hook():
    model = apply_lost(nn.Sequential(nn.Linear(8, 12), nn.Sequential(nn.Linear(12, 8))), 3, 0.3)
    x = torch.randn(5, 8)
    seen = lost.diagnose(model, lambda: model(x))
    assert seen == {"0": model[0].diagnose(x), "1.0": model[1][0].diagnose(model[0](x))}
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        lost.diagnose(model, lambda: model(torch.randn(5, 7)))
    assert not any(m._forward_pre_hooks for m in model.modules())

@pytest.fixture
def every_warning_is_an_error():
    torch.set_warn_always(True)                # else torch says each only once a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)

@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_settings_rebuild_the_layer(sparsity, every_warning_is_an_error):
    given = dense_layer((12, 16), bias=True)
    layer = LOSTLinear.from_linear(given, 4, sparsity, 0.4, "none", learn_gamma=True)
    rebuilt = LOSTLinear(**layer.settings(), dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.settings() == layer.settings() and torch.equal(rebuilt(inputs(16)), layer(inputs(16)))
