"""The LOST layer against the paper's equations written out, and every switch and error of lost.py."""
import copy
import random
import re
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_fw_bw_and_get_code

import lost
from lost import LOSTError, LOSTLinear, SparseLowRankLinear, apply_lost, by_module, decompose

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

def check_contexts(layer, x):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            inference = layer(x)
        assert torch.equal(layer(x), inference)

def test_training_and_inference_are_one_formula_to_the_last_bit():
    layer = LOSTLinear.from_linear(dense_layer((24, 36), bias=True), 6, 0.2, learn_gamma=True)
    for x in (inputs(36), inputs(36)[0, 0]):                               # also a vector, as nn.Linear takes
        check_contexts(layer, x)

def check_few_rows(layer, x):
    layer.few_rows = False
    usual = layer(x)
    layer.few_rows = True
    assert relative_error(layer(x), usual) < 1e-12
    layer.few_rows = False

@pytest.mark.parametrize("sparsity", [0, 0.2])
def test_the_form_for_few_rows_is_asked_for_and_agrees(sparsity):
    layer = LOSTLinear.from_linear(dense_layer((24, 36), bias=True), 6, sparsity, learn_gamma=True)
    assert not layer.few_rows
    for x in (inputs(36), inputs(36)[0, 0]):
        check_few_rows(layer, x)

def check_derivatives(layer):
    """First and second order of a layer of 8 inputs, forward and backward, against differences."""
    names, values = zip(*layer.named_parameters(), strict=True)
    def output(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
    arguments = (inputs(8)[0, :2].requires_grad_(), *values)
    assert torch.autograd.gradcheck(output, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(output, arguments)

@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_derivatives_of_first_and_second_order_are_those_of_differences(sparsity):
    check_derivatives(LOSTLinear.from_linear(dense_layer((5, 8)), 3, sparsity, learn_gamma=True))

# --- torch.func ---

def functional(sparsity=0.25, learn_gamma=True):
    """loss(parameters, x, target) of a small layer, and its parameters."""
    layer = LOSTLinear.from_linear(dense_layer((5, 8), bias=True), 3, sparsity, learn_gamma=learn_gamma)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    def loss(parameters, x, target):
        return (torch.func.functional_call(layer, parameters, (x,)) - target).square().sum()
    return layer, loss, parameters

@pytest.mark.parametrize("sparsity", [0, 0.25])
@pytest.mark.parametrize("learn_gamma", [False, True])
def test_gradients_of_single_samples_equal_a_loop(sparsity, learn_gamma):
    layer, loss, parameters = functional(sparsity, learn_gamma)
    x, target = inputs(8).flatten(0, 1), inputs(5, 1).flatten(0, 1)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        layer.zero_grad()
        (layer(x[i]) - target[i]).square().sum().backward()
        for name, p in layer.named_parameters():
            assert torch.allclose(found[name][i], p.grad, rtol=1e-12, atol=1e-12), name

def test_several_sets_of_parameters_run_at_once():
    layer, loss, parameters = functional()
    others = {name: 1.1 * p for name, p in parameters.items()}
    both = {name: torch.stack((p, others[name])) for name, p in parameters.items()}
    x, target = inputs(8), inputs(5, 1)
    gradients = torch.func.vmap(torch.func.grad(loss), (0, None, None))(both, x, target)
    for i, one in enumerate((parameters, others)):
        for name, gradient in torch.func.grad(loss)(one, x, target).items():
            assert torch.allclose(gradients[name][i], gradient, rtol=1e-12, atol=1e-12), name

def test_forward_and_reverse_derivatives_agree_and_combine():
    _, loss, parameters = functional()
    x, target = inputs(8)[0, 0], inputs(5, 1)[0, 0]
    def of_x(x):
        return loss(parameters, x, target)
    gradient = torch.func.grad(of_x)(x)
    assert torch.allclose(torch.func.jacfwd(of_x)(x), gradient, rtol=1e-12)
    direction = inputs(8, 3)[0, 0]
    _, along = torch.func.jvp(of_x, (x,), (direction,))
    assert torch.allclose(along, gradient @ direction, rtol=1e-12)
    twice = torch.func.jacrev(torch.func.jacrev(of_x))(x)
    assert torch.allclose(torch.func.hessian(of_x)(x), twice, rtol=1e-10, atol=1e-12)

# --- learned γ ---

@pytest.mark.parametrize("left, edge", [(1.096, 1.0), (-0.3, 0.0), (1e9, 1.0), (-1e9, 0.0)])
@pytest.mark.parametrize("sparsity", [0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_that_left_its_range_acts_as_the_edge(left, edge, sparsity, dtype):
    given, x = dense_layer((12, 16), dtype=dtype), inputs(16, dtype=dtype)
    learned = LOSTLinear.from_linear(given, 4, sparsity, activation="none", learn_gamma=True)
    at_edge = LOSTLinear.from_linear(given, 4, sparsity, edge, activation="none")
    learned.gamma.data.fill_(left)
    for few_rows in (False, True):
        learned.few_rows = at_edge.few_rows = few_rows
        assert torch.equal(learned(x), at_edge(x))
    assert learned.diagnose(x) == at_edge.diagnose(x)
    assert torch.equal(learned.merge().weight, at_edge.merge().weight)
    assert learned.settings()["gamma"] == edge

def test_gamma_inside_its_range_is_used_to_the_last_bit():
    layer = LOSTLinear.from_linear(dense_layer((12, 16), dtype=torch.float32), 4, 0.25, learn_gamma=True)
    for value in torch.rand(200, generator=seeded()):
        layer.gamma.data.copy_(value)
        assert layer.bounded_gamma().item() == value.item()

@pytest.mark.parametrize("left, edge", [(1.096, 1.0), (-0.3, 0.0)])
def test_gamma_that_left_gets_the_gradient_of_the_edge_and_returns(left, edge):
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, learn_gamma=True)
    x, gradients = inputs(16), []
    for value in (left, edge):
        layer.gamma.data.fill_(value)
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(layer.gamma.grad.item())
    assert gradients[0] == gradients[1] != 0
    target = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, 0.5)(x).detach()
    optimizer = torch.optim.Adam([layer.gamma], lr=0.01)
    layer.gamma.data.fill_(left)
    for _ in range(150):
        optimizer.zero_grad()
        (layer(x) - target).square().sum().backward()
        optimizer.step()
    assert layer.gamma.item() == pytest.approx(0.5, abs=0.05)

def test_state_of_a_layer_whose_gamma_left_is_rebuilt_to_the_last_bit():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25, 0.9, learn_gamma=True)
    layer.gamma.data.fill_(1.096)
    rebuilt = LOSTLinear(**layer.settings(), dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.gamma.item() == layer.gamma.item() and torch.equal(rebuilt(inputs(16)), layer(inputs(16)))

@pytest.mark.parametrize("gamma, taken", [(1.096, 1.0), (-0.2, 0.0), (float("inf"), 1.0)])
def test_old_settings_of_a_learned_gamma_outside_its_range_are_read(gamma, taken):
    old = {"in_features": 16, "out_features": 12, "rank": 4, "k": 4, "gamma": gamma, "activation": "silu",
           "learn_gamma": True, "bias": False}
    assert LOSTLinear(**old).gamma.item() == taken
    with pytest.raises(LOSTError, match="gamma = "):                          # a fixed one was always checked
        LOSTLinear(**{**old, "learn_gamma": False})
    with pytest.raises(LOSTError, match="gamma = nan"):
        LOSTLinear(**{**old, "gamma": float("nan")})

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
    (("mlp",), ["blocks.0.mlp.up", "blocks.1.mlp.up", "lm_head"]),            # with all that it contains
    (("blocks.1", "embed"), [f"blocks.1.{name}" for name in ("mlp.up", "o_proj", "q_proj")] + ["lm_head"]),
    (("0.o_proj", "mlp.up"), ["blocks.0.o_proj", "blocks.0.mlp.up", "blocks.1.mlp.up", "lm_head"]),
])
def test_skip_keeps_the_modules_whose_names_end_so(skip, dense):
    model = apply_lost(Network(), 4, 0.25, skip=(*skip, "lm_head") if dense else skip)
    assert sorted(name for name, kind in kinds(model).items() if kind is nn.Linear) == sorted(dense)

@pytest.mark.parametrize("skip, message", [
    ("lm_head", r"skip = 'lm_head' must be a tuple of names: skip=\('lm_head',\)"),
    (("lm_heat",), "skip: no module is called 'lm_heat'"),
    (("lm_head", "proj"), "skip: no module is called 'proj'"),                # whole parts of a name only
    (["q_proj", "blocks.2"], "skip: no module is called 'blocks.2'"),
])
def test_apply_refuses_a_skip_that_names_no_module(skip, message):
    model = Network()
    with pytest.raises(LOSTError, match=message):
        apply_lost(model, 4, 0.25, skip=skip)
    assert set(kinds(model).values()) == {nn.Linear}

def test_a_model_needs_no_head():
    model = apply_lost(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), 2, 0.25)
    assert set(kinds(model).values()) == {LOSTLinear}

def test_frozen_layers_stay_frozen_and_the_mode_is_kept():
    model = Network().eval()
    model.blocks[0].requires_grad_(False)
    model.blocks[1]["q_proj"].bias.requires_grad_(False)
    model.blocks[1]["mlp"]["up"].train()
    apply_lost(model, 4, 0.25, activation="none", learn_gamma=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    learning = {"A", "B", "W_s", "gamma"}
    assert trained == {"embed.weight", "lm_head.weight", "blocks.1.mlp.up.bias"} | {
        f"blocks.1.{layer}.{name}" for layer in ("q_proj", "o_proj", "mlp.up") for name in learning}
    assert {name for name, m in model.named_modules() if m.training} == {"blocks.1.mlp.up"}
    frozen, half, trained = (model.get_submodule(name).merge() for name in (
        "blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.mlp.up"))
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad and not frozen.training
    assert half.weight.requires_grad and not half.bias.requires_grad
    assert trained.weight.requires_grad and trained.bias.requires_grad and trained.training

def test_inputs_may_be_passed_by_the_name_that_nn_linear_gives_them():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25)
    assert torch.equal(layer(input=inputs(16)), layer(inputs(16)))

def test_dense_weights_are_freed_one_by_one(monkeypatch):
    model, alive, real = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))), [], lost.decompose
    dense = [weakref.ref(linear.weight) for linear in model]
    def count(*given):
        alive.append(sum(weight() is not None for weight in dense))
        return real(*given)
    monkeypatch.setattr(lost, "decompose", count)
    apply_lost(model, 4, 0.25)
    assert alive == [4, 3, 2, 1]

def test_by_module_takes_the_longest_match_then_the_default():
    value = {"default": 1, "up": 2, "mlp.up": 3, "0.mlp.up": 4, "p": 5}
    names = ["blocks.0.q_proj", "up", "blocks.1.up", "blocks.1.mlp.up", "blocks.0.mlp.up", "blocks.10.mlp.up"]
    assert [by_module(value, name) for name in names] == [1, 2, 2, 3, 4, 3]
    assert by_module(7, "anything") == 7
    with pytest.raises(LOSTError, match="nothing is said for q_proj, only for up: add a default"):
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
    with pytest.raises(LOSTError, match=message):
        LOSTLinear.from_linear(dense_layer((12, 8)), **{"rank": 3, "sparsity": 0.25, **wrong})

@pytest.mark.parametrize("wrong, message", [
    ({"rank": 2.5}, "rank = 2.5: must be a whole"), ({"rank": "3"}, "rank = '3': must be a whole number"),
    ({"rank": None}, "rank = None: must be a whole number"), ({"sparsity": "some"}, "sparsity = 'some'"),
    ({"sparsity": None}, "sparsity = None: must lie"), ({"gamma": [0.5]}, r"gamma = \[0.5\]: must lie"),
    ({"gamma": 1.5, "learn_gamma": True}, r"gamma = 1.5: must lie in \[0, 1\]"),
])
def test_layer_refuses_what_is_no_number(wrong, message):
    with pytest.raises(LOSTError, match=message):
        LOSTLinear.from_linear(dense_layer((12, 8)), **{"rank": 3, "sparsity": 0.25, **wrong})

@pytest.mark.parametrize("wrong, message", [
    ({"in_features": "16"}, "in_features = '16': must be a whole"), ({"out_features": 0}, "rank 4 of a 0×16"),
    ({"k": 17}, "k = 17 channels of 16"), ({"k": 1.5}, "k = 1.5: must be a whole number"),
    ({"rank": [4]}, r"rank = \[4\]"), ({"gamma": "much"}, "gamma = 'much'"),
    ({"activation": ["silu"]}, "activation = "),
])
def test_settings_that_no_layer_can_have_are_refused(wrong, message):
    right = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25).settings()
    with pytest.raises(LOSTError, match=message):
        LOSTLinear(**{**right, **wrong})

@pytest.mark.parametrize("allowed", [{"select": "weight"}, {"select": "random"}, {"sparsity": 0}])
def test_full_rank_is_allowed_where_no_residual_is_asked_for(allowed):
    linear = dense_layer((12, 8))
    layer = LOSTLinear.from_linear(linear, **{"rank": 8, "sparsity": 0.25, **allowed})
    assert relative_error(layer.B @ layer.A, linear.weight) < 1e-10

@pytest.mark.parametrize("k", [-1, 9])
def test_decompose_refuses_a_number_of_channels_outside_the_weight(k):
    with pytest.raises(LOSTError, match=rf"k = {k} channels of 8 must lie in \[0, 8\]"):
        decompose(random_weight((12, 8)), 3, k)

def test_decompose_refuses_what_is_no_matrix():
    with pytest.raises(LOSTError, match=r"a weight is a matrix \(out, in\), not of shape \(2, 3, 4\)"):
        decompose(torch.ones(2, 3, 4), 1, 1)

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weight_is_refused(value, dtype):
    linear = dense_layer((12, 8), dtype=dtype)
    linear.weight.data[3, 5] = value
    with pytest.raises(LOSTError, match="the weight has NaN or infinite elements"):
        LOSTLinear.from_linear(linear, 3, 0.25)

def test_overflow_of_a_narrow_dtype_is_refused():
    W = (65_000 * random_weight((16, 16)).sign()).half()
    assert literal_decomposition(W, 2, 16)[4].abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(LOSTError, match="the decomposition overflows torch.float16: use a wider dtype"):
        decompose(W, 2, 16, sparse_init="residual")

@pytest.mark.parametrize("rank, sparsity", [
    ({"default": 4, "qproj": 2}, 0.25), (4, {"default": 0.25, "qproj": 0.5})])
def test_apply_refuses_a_dict_with_an_unknown_module(rank, sparsity):
    model = Network()
    with pytest.raises(LOSTError, match="no module is called 'qproj': the first ones are blocks.0.q_proj, "):
        apply_lost(model, rank, sparsity)
    assert set(kinds(model).values()) == {nn.Linear}

def test_apply_refuses_a_dict_that_leaves_modules_open():
    with pytest.raises(LOSTError, match="nothing is said for blocks.0.o_proj, only for q_proj"):
        apply_lost(Network(), {"q_proj": 2}, 0.25)

@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})])
def test_apply_refuses_a_model_without_linear_layers(model):
    with pytest.raises(LOSTError, match="the model has no nn.Linear to replace"):
        apply_lost(model, 2, 0.25)

def test_apply_names_the_module_that_does_not_fit():
    with pytest.raises(LOSTError, match=r"blocks\.0\.q_proj: rank 17 of a 16×16 weight must lie"):
        apply_lost(Network(), {"default": 4, "q_proj": 17}, 0.25)

class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

def with_forward_of_its_own():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear

def with_hook(register):
    linear = nn.Linear(8, 8)
    getattr(linear, register)(lambda *given: None)
    return linear

@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("make, message", [
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "computed by a parametrization"),
    (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "computed by a parametrization"),
    (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "computed by a parametrization"),
    (lambda: nn.LazyLinear(8), "it has no weight yet: run the model once"),
    (lambda: Doubled(8, 8), "a Doubled computes more than an nn.Linear"),
    (with_forward_of_its_own, "a Linear computes more than an nn.Linear"),
    (lambda: with_hook("register_forward_hook"), "it has hooks"),
    (lambda: with_hook("register_forward_pre_hook"), "it has hooks"),
    (lambda: with_hook("register_full_backward_hook"), "it has hooks"),
])
def test_layers_that_are_more_than_a_matrix_are_refused(make, message):
    model = nn.Sequential(nn.Linear(8, 8), make())
    before = list(model)
    with pytest.raises(LOSTError, match=f"1: .*{message}"):
        apply_lost(model, 2, 0.25)
    assert list(model) == before

def test_a_quantised_weight_is_refused():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LOSTError, match="a weight of torch.int8 cannot be decomposed"):
        apply_lost(nn.Sequential(linear), 2, 0.25)

def tied_head():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "up": nn.Linear(16, 16)})
    model["output"] = nn.Linear(16, 20)
    model["output"].weight = model["embed"].weight
    return model

def tied_decoder():
    """As BERT has it: the bias of the decoder is also a parameter of its parent."""
    head = nn.Module()
    head.decoder = nn.Linear(16, 20)
    head.bias = head.decoder.bias
    return nn.ModuleDict({"up": nn.Linear(16, 16), "predictions": head})

def shared_layers():
    model = nn.ModuleDict({"up": nn.Linear(16, 16), "again": nn.Linear(16, 16)})
    model["again"].weight = model["up"].weight
    return model

@pytest.mark.parametrize("make, name, other", [
    (tied_head, "output", "embed"), (tied_decoder, "predictions.decoder", "predictions"),
    (shared_layers, "up", "again"),
])
def test_a_shared_parameter_is_not_parted(make, name, other):
    model = make()
    before = dict(model.named_modules())
    message = f"^{name}: it shares a parameter with {other}, .*add '{name}' to skip"
    with pytest.raises(LOSTError, match=message):
        apply_lost(model, 4, 0.25)
    assert dict(model.named_modules()) == before

def test_a_tied_head_may_stay_dense_and_stays_tied():
    model = apply_lost(tied_head(), 4, 0.25, skip=("output",))
    assert kinds(model) == {"up": LOSTLinear, "output": nn.Linear}
    assert model["output"].weight is model["embed"].weight

@pytest.mark.parametrize("make, name", [
    (lambda: nn.MultiheadAttention(16, 2), "out_proj"),
    (lambda: nn.ModuleDict({"up": nn.Linear(16, 16), "attn": nn.MultiheadAttention(16, 2)}), "attn.out_proj"),
    (lambda: nn.TransformerEncoderLayer(16, 2, 32), "self_attn.out_proj"),
    (lambda: nn.TransformerDecoderLayer(16, 2, 32), "self_attn.out_proj"),
])
def test_layers_whose_weight_is_read_from_outside_are_refused(make, name):
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(LOSTError, match=rf"^{name}: MultiheadAttention reads its \.weight"):
        apply_lost(model, 2, 0.25)
    assert dict(model.named_modules()) == before

def test_the_feed_forward_part_of_an_encoder_layer_is_refused_too():
    with pytest.raises(LOSTError, match="^linear1: TransformerEncoderLayer reads its .weight"):
        apply_lost(nn.TransformerEncoderLayer(16, 2, 32), 2, 0.25, skip=("self_attn",))

def test_what_remains_of_a_transformer_is_converted():
    model = apply_lost(nn.TransformerDecoderLayer(16, 2, 32), 2, 0.25, skip=("self_attn", "multihead_attn"))
    model.eval()
    assert isinstance(model.linear1, LOSTLinear) and isinstance(model.linear2, LOSTLinear)
    assert model(torch.randn(3, 2, 16), torch.randn(3, 2, 16)).isfinite().all()

def test_a_model_that_is_itself_a_layer_is_refused():
    with pytest.raises(LOSTError, match="the model is itself an nn.Linear, .* use LOSTLinear.from_linear"):
        apply_lost(nn.Linear(8, 8), 2, 0.25)

def spoiled(spoil):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4))
    spoil(model)
    return model

@pytest.mark.parametrize("spoil, rank, switches, message", [
    (lambda model: model[2].weight.data[3].fill_(float("nan")), 3, {}, "2: the weight has NaN"),
    (lambda model: model[2].weight.data.mul_(1e5).round_(), 9, {}, "3: rank 9 of a 4×16 weight"),
    (lambda model: model[2].half().weight.data.fill_(65_000), 3, {"sparse_init": "residual"},
     "2: the decomposition overflows torch.float16"),
    (lambda model: model[2].double().weight.data.fill_(1e200), 3, {}, "2: the decomposition overflows"),
    (lambda model: None, {"2": 3}, {}, "0: nothing is said for 0, only for 2"),
    (lambda model: None, 3, {"select": "best"}, "0: select = 'best'"),
])
@pytest.mark.parametrize("part", [(0, 1), (0, 2), (1, 2)])
def test_a_model_with_a_layer_that_fails_is_left_as_it_was(spoil, rank, switches, message, part):
    model = spoiled(spoil)
    before, values = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(LOSTError, match=f"^{message}"):
        apply_lost(model, rank, 0.25, part=part, **switches)
    assert dict(model.named_modules()) == before
    for name, value in model.state_dict().items():
        assert not value.is_meta and torch.equal(value.nan_to_num(), values[name].nan_to_num())

def test_an_unknown_switch_is_an_error_of_the_program_that_leaves_the_model_as_it_was():
    model = Network()
    with pytest.raises(TypeError, match="colour"):
        apply_lost(model, 4, 0.25, colour="blue")
    assert set(kinds(model).values()) == {nn.Linear}

# --- loading ---

@pytest.mark.parametrize("index", [
    [3, 3, 7, 9], [7, 3, 9, 11], [-1, 3, 7, 9], [3, 7, 9, 16], [0.0, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_channels_that_repeat_or_are_not_there_are_refused_when_loaded(index, assign, device):
    model = apply_lost(nn.Sequential(nn.ReLU(), nn.Linear(16, 12, device=device)), 4, 0.25)
    state = apply_lost(nn.Sequential(nn.ReLU(), nn.Linear(16, 12)), 4, 0.25).state_dict()
    with pytest.raises(LOSTError, match=r"^1\.index must hold different channels of 0 … 15 in ascending"):
        model.load_state_dict({**state, "1.index": torch.tensor(index)}, assign=assign)

@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_right_channels_are_loaded_onto_the_meta_device_too(kind):
    layer = LOSTLinear.from_linear(dense_layer((12, 16), dtype=torch.float32), 4, 0.25)
    state = layer.state_dict()
    state["index"] = state["index"].to(kind)
    with torch.device("meta"):
        rebuilt = LOSTLinear(**layer.settings())
    rebuilt.load_state_dict(rebuilt.state_dict(), assign=True)                # nothing to look at yet
    rebuilt.load_state_dict(state, assign=True)
    x = inputs(16, dtype=torch.float32)
    assert torch.equal(rebuilt(x), layer(x))

def test_an_index_of_another_length_or_none_is_reported_by_torch():
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for index"):
        layer.load_state_dict({**state, "index": torch.arange(5)})
    del state["index"]
    with pytest.raises(RuntimeError, match="Missing key.*index"):
        layer.load_state_dict(state)

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
    with pytest.raises(LOSTError, match="activation 'silu' .*makes the layer non-linear"):
        layer.merge()

# --- pinned: eq. 8 ---

by_channels = pytest.mark.parametrize("sparsity", [0, 0.2])

def pinned_pair(shape=(24, 36), rank=6, sparsity=0.2, dtype=torch.float64, bias=True, **switches):
    """A layer without SiLU, and the pinned one that is made of it."""
    linear = dense_layer(shape, dtype=dtype, bias=bias)
    layer = LOSTLinear.from_linear(linear, rank, sparsity, 0.6, "none", select="weight", **switches)
    return layer, layer.as_pinned()

class LiteralPinned(nn.Module):
    """Equations 7 and 8 as they are printed, with the parameters of a pinned layer."""

    def __init__(self, layer, silu):
        super().__init__()
        self.layer, self.silu = layer, silu
        for name, p in layer.named_parameters():
            setattr(self, name, nn.Parameter(p.detach().clone()))

    def forward(self, x):
        pivot, gamma = self.layer.pivot.tolist(), self.layer.bounded_gamma()
        rest = [j for j in range(x.shape[-1]) if j not in pivot]
        z = x[..., pivot] + x[..., rest] @ self.A.T
        y = gamma * (z * torch.sigmoid(z) if self.silu else z) @ self.B.T + self.bias
        return y + (1 - gamma) * x[..., self.layer.index.tolist()] @ self.W_s.T if self.layer.k else y

@shapes
@by_channels
@pytest.mark.parametrize("learn_gamma", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_pinned_layer_computes_what_the_layer_did(shape, sparsity, learn_gamma, dtype, tolerance):
    layer, pinned = pinned_pair(shape, 8, sparsity, dtype, learn_gamma=learn_gamma)
    x = inputs(shape[1], dtype=dtype)
    assert relative_error(pinned(x), layer(x)) < tolerance
    assert relative_error(pinned.merge()(x), pinned(x)) < tolerance
    assert pinned.as_pinned() is pinned and "pinned=True" in repr(pinned) and "pinned=False" in repr(layer)

@shapes
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_pinned_layer_has_as_many_values_as_it_says(shape, k, rank):
    layer = LOSTLinear(shape[1], shape[0], rank, k, pinned=True)
    assert sum(p.numel() for p in layer.parameters()) == rank * (sum(shape) - rank) + k * shape[0]
    assert (layer.pivot.shape, layer.pivot.dtype) == ((rank,), torch.int32)
    assert "rest" not in layer.state_dict()

@pytest.mark.parametrize("shape, rank", [((24, 36), 6), ((36, 24), 1), ((24, 24), 24), ((36, 20), 20),
                                         ((20, 36), 20)])
@pytest.mark.parametrize("true_rank", [None, 3, 0])
def test_pinned_factors_have_the_same_product_whatever_the_rank(shape, rank, true_rank):
    A, B = random_weight((rank, shape[1])), random_weight((shape[0], rank), 1)
    if true_rank is not None:
        A = random_weight((rank, true_rank), 2) @ random_weight((true_rank, shape[1]), 3)
    pivot, rest_of_A, new_B = lost.pin(A, B)
    Z = torch.zeros_like(A)
    Z[:, pivot] = torch.eye(rank, dtype=A.dtype)
    others = [j for j in range(shape[1]) if j not in pivot.tolist()]
    Z[:, others] = rest_of_A
    assert pivot.dtype == torch.int32 and pivot.tolist() == sorted(set(pivot.tolist()))
    assert lost.other_channels(pivot, shape[1]).tolist() == others
    assert (new_B @ Z - B @ A).norm() <= 1e-12 * max(1, (B @ A).norm())
    # pivoting keeps them small: they say how much of x is rounded
    assert rest_of_A.abs().amax() < 10 if rest_of_A.numel() else rank == shape[1]

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.data())
def test_other_channels_are_those_that_are_no_pivots(in_features, data):
    pivot = sorted(data.draw(st.sets(st.integers(0, in_features - 1), min_size=1)))
    found = lost.other_channels(torch.tensor(pivot, dtype=torch.int32), in_features)
    assert found.dtype == torch.int32 and found.tolist() == [j for j in range(in_features) if j not in pivot]

@by_channels
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_of_a_pinned_layer_are_those_of_its_equation(sparsity, silu, dtype):
    layer = pinned_pair(sparsity=sparsity, dtype=torch.float32, learn_gamma=False)[1]
    layer.activation = "silu" if silu else "none"
    x, found = inputs(36, dtype=torch.float32).requires_grad_(), []
    for module in (layer, LiteralPinned(layer, silu)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = module(x)
        # the literal equation adds a float32 bias to what autocast made
        assert y.dtype == (dtype or torch.float32) or module is not layer
        y.float().square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters(recurse=False)}
        found.append([y.float(), x.grad, *(gradients[name] for name in sorted(gradients))])
        x.grad = None
    errors = [relative_error(one, other) for one, other in zip(*found, strict=True)]
    assert len(errors) == (6 if sparsity else 5) and max(errors) < (2e-2 if dtype else 1e-6)

@by_channels
def test_derivatives_of_a_pinned_layer_of_first_and_second_order_are_those_of_differences(sparsity):
    layer = pinned_pair((5, 8), 3, sparsity, learn_gamma=True)[1]
    layer.activation = "silu"
    check_derivatives(layer)

@by_channels
def test_a_pinned_layer_runs_in_every_context_alike(sparsity):
    layer = pinned_pair(sparsity=sparsity, learn_gamma=True)[1]
    for x in (inputs(36), inputs(36)[0, 0]):
        check_contexts(layer, x)
        check_few_rows(layer, x)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

@by_channels
@pytest.mark.parametrize("few_rows", [False, True])
@pytest.mark.parametrize("rank", [6, 20])
def test_a_compiled_pinned_layer_has_the_same_output_and_gradients(sparsity, few_rows, rank):
    layer = pinned_pair((40, 20), rank, sparsity, torch.float32)[1]
    layer.few_rows = few_rows
    x, found = inputs(20, dtype=torch.float32).requires_grad_(), []
    for module in (layer, torch.compile(layer, fullgraph=True, dynamic=False)):
        y = module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    # at full rank A has no columns
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)

def test_an_ensemble_of_pinned_layers_has_the_gradients_of_its_members():
    layers = [LOSTLinear.from_linear(dense_layer((6, 8), seed=seed), 3, 0.25, activation="none").as_pinned()
              for seed in range(3)]
    x, out = inputs(8).expand(3, 2, 5, 8), inputs(6, 1)
    parameters, buffers = torch.func.stack_module_state(layers)
    assert len({tuple(pivot.tolist()) for pivot in buffers["pivot"]}) > 1
    def loss(parameters, buffers, x):
        return (torch.func.functional_call(layers[0], (parameters, buffers), x) * out).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.vmap(torch.func.grad(loss, (0, 2)))(parameters, buffers, x)
    for i, layer in enumerate(layers):
        one = x[i].clone().requires_grad_()
        (layer(one) * out).sum().backward()
        assert torch.allclose(one.grad, found[1][i]) and torch.allclose(layer.A.grad, found[0]["A"][i])

@by_channels
def test_a_pinned_layer_is_diagnosed_as_the_layer_was(sparsity):
    layer, pinned = pinned_pair(sparsity=sparsity)
    # the factors differ, their product does not
    same = {name: value for name, value in layer.diagnose(inputs(36)).items() if not name.startswith("norm")}
    found = pinned.diagnose(inputs(36))
    assert {name: found[name] for name in same} == pytest.approx(same, rel=1e-4)
    assert found["norm_A"] == pytest.approx(torch.linalg.norm(pinned.full_A(), 2).item(), rel=1e-4)

@by_channels
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_pinned_layer_is_rebuilt_from_its_settings_and_its_file(sparsity, assign, place):
    layer = pinned_pair(sparsity=sparsity, learn_gamma=True)[1]
    rebuilt = LOSTLinear(**layer.settings(), dtype=torch.float64, device=place)
    if place == "meta" and assign:
        rebuilt.load_state_dict(rebuilt.state_dict(), assign=True)            # nothing to look at yet
    elif place == "meta":
        rebuilt = rebuilt.to_empty(device="cpu")
    rebuilt.load_state_dict(layer.state_dict(), assign=assign)
    assert rebuilt.settings() == layer.settings() and torch.equal(rebuilt(inputs(36)), layer(inputs(36)))

@pytest.mark.parametrize("pivot", [[3, 3, 7, 9], [7, 3, 9, 11], [-1, 3, 7, 9], [3, 7, 9, 16],
                                   [0.0, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pivots_that_repeat_or_are_not_there_are_refused_when_loaded(pivot, assign, device):
    state = nn.Sequential(LOSTLinear(16, 12, 4, 0, pinned=True)).state_dict()
    model = nn.Sequential(LOSTLinear(16, 12, 4, 0, pinned=True, device=device))
    with pytest.raises(LOSTError, match=r"^0\.pivot must hold different channels of 0 … 15 in ascending"):
        model.load_state_dict({**state, "0.pivot": torch.tensor(pivot)}, assign=assign)
    del state["0.pivot"]
    with pytest.raises(RuntimeError, match="Missing key.*pivot"):
        model.load_state_dict(state)

def test_what_cannot_be_pinned_is_refused():
    with pytest.raises(LOSTError, match="'silu' stands between the factors, .*activation none can be pinned"):
        LOSTLinear.from_linear(dense_layer((12, 16)), 4, 0.25).as_pinned()
    A, B = random_weight((3, 8)), random_weight((6, 3))
    A[1, 2] = float("nan")
    with pytest.raises(LOSTError, match="NaN or infinite"):
        lost.pin(A, B)
    with pytest.raises(LOSTError, match="the pinned form overflows torch.float16"):
        lost.pin(torch.full((1, 8), 6e4).half(), torch.full((6, 1), 6e4).half())

def test_a_pinned_layer_keeps_what_is_frozen_its_mode_and_its_device():
    layer = LOSTLinear.from_linear(dense_layer((12, 16), bias=True), 4, 0.25, activation="none").eval()
    layer.A.requires_grad_(False)
    layer.bias.requires_grad_(False)
    pinned = layer.as_pinned()
    assert {name for name, p in pinned.named_parameters() if p.requires_grad} == {"B", "W_s"}
    assert not pinned.training and pinned.merge().weight.requires_grad
    empty = LOSTLinear(16, 12, 4, 2, activation="none", device="meta").as_pinned()
    assert empty.A.is_meta and empty.pivot.is_meta and empty(torch.empty(3, 16, device="meta")).is_meta
    assert empty.merge().weight.is_meta and empty.k == 2

# --- low rank and zeros anywhere ---

def sparse_layer(rank=3, bias=True, dtype=torch.float64, device="cpu"):
    layer = SparseLowRankLinear(16, 12, rank, bias, dtype=dtype, device=device)
    for i, p in enumerate(layer.parameters()):
        p.data.copy_(random_weight(p.shape, i))
    layer.weight.data[random_weight((12, 16), 9).abs() < 0.2] = 0
    return layer

@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sparse_layer_adds_its_two_parts(rank, bias):
    layer = sparse_layer(rank, bias)
    parameters, x = dict(layer.named_parameters()), inputs(16)
    assert set(parameters) == {"weight", *(["A", "B"] if rank else []), *(["bias"] if bias else [])}
    W = layer.weight + layer.B @ layer.A if rank else layer.weight
    expected = x @ W.T + (layer.bias if bias else 0)
    assert relative_error(layer(x), expected) < 1e-12 and torch.equal(layer(input=x), layer(x))
    merged = layer.merge()
    assert type(merged) is nn.Linear and relative_error(merged(x), expected) < 1e-12
    assert (merged.weight == 0).any() == (rank == 0)
    layer(x).square().sum().backward()
    assert all((p.grad != 0).any() for p in parameters.values())

@pytest.mark.parametrize("rank", [0, 3])
def test_a_sparse_layer_is_rebuilt_from_its_settings_with_its_zeros(rank):
    layer = sparse_layer(rank)
    with torch.device("meta"):
        rebuilt = SparseLowRankLinear(**layer.settings())
    assert rebuilt(torch.empty(2, 16, device="meta")).shape == (2, 12) and rebuilt.merge().weight.is_meta
    rebuilt.load_state_dict(layer.state_dict(), assign=True)
    assert rebuilt.settings() == layer.settings() and torch.equal(rebuilt(inputs(16)), layer(inputs(16)))
    assert torch.equal(rebuilt.weight == 0, layer.weight == 0) and f"rank={rank}" in repr(layer)

@pytest.mark.parametrize("wrong, message", [
    ({"rank": -1}, "rank -1 of a 12×16"), ({"rank": 13}, "rank 13 of a 12×16"), ({"rank": ""}, "rank = ''"),
    ({"rank": 2.5}, "rank = 2.5"), ({"in_features": 0}, "of a 12×0 weight"), ({"out_features": "12"}, "out_"),
])
def test_settings_that_no_sparse_layer_can_have_are_refused(wrong, message):
    with pytest.raises(LOSTError, match=message):
        SparseLowRankLinear(**{**sparse_layer().settings(), **wrong})

@pytest.mark.parametrize("rank", [0, 3])
def test_a_merged_sparse_layer_is_trained_where_a_part_of_it_was(rank):
    layer = sparse_layer(rank).eval().requires_grad_(False)
    assert not layer.merge().weight.requires_grad and not layer.merge().training
    layer.weight.requires_grad_(True)
    assert layer.merge().weight.requires_grad and not layer.merge().bias.requires_grad

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
@pytest.mark.parametrize("true_rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_every_row_of_the_factors_learns_whatever_the_weight(shape, true_rank, dtype, activation):
    linear = dense_layer(shape, dtype=dtype)
    W = random_weight((shape[0], true_rank)) @ random_weight((true_rank, shape[1]), 1)
    linear.weight.data.copy_(W.to(dtype))
    layer = LOSTLinear.from_linear(linear, 8, 0.25, activation=activation)
    before = layer.A.detach().clone(), layer.B.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)                   # follows sizes, Adam hides them
    for step in range(3):
        optimizer.zero_grad()
        x, target = inputs(shape[1], step, dtype), inputs(shape[0], step + 1000, dtype)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    moved_A, moved_B = layer.A - before[0], layer.B - before[1]
    assert (moved_A.norm(dim=1) > 1e-7).all() and (moved_B.norm(dim=0) > 1e-7).all()
    assert torch.linalg.matrix_rank(layer.B.double() @ layer.A.double()) == 8

@shapes
def test_rows_without_a_singular_value_leave_the_product_as_it_is(shape):
    nothing = decompose(torch.zeros(shape, dtype=torch.float64), 8, 3)
    assert not (nothing.B @ nothing.A).any() and (nothing.A.any() or nothing.B.any())
    W = random_weight((shape[0], 3)) @ random_weight((3, shape[1]), 1)
    parts = decompose(W, 8, 3)
    assert torch.equal(parts.B @ parts.A, parts.B[:, :3] @ parts.A[:3])

@shapes
def test_factors_of_a_weight_of_full_rank_are_the_roots_of_its_svd_to_the_last_bit(shape):
    W = random_weight(shape)
    U, sigma, Vt = lost.top_svd(W, 7)
    parts = decompose(W, 7, 0)
    assert torch.equal(parts.A, sigma.sqrt()[:, None] * Vt) and torch.equal(parts.B, U * sigma.sqrt())

@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_diagnosis_of_a_layer_of_zeros_has_numbers(sparsity):
    layer = LOSTLinear.from_linear(dense_layer((12, 16)), 4, sparsity)
    for p in layer.parameters():
        p.data.zero_()
    found = layer.diagnose(inputs(16))
    assert found == pytest.approx({"low_rank_share": 0, "cosine": 0, "effective_rank": 1, "norm_A": 0,
                                   "norm_B": 0, "gamma": 0.7})

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
    with pytest.raises(LOSTError, match=r"rank 9 of a 12×8 weight must lie in \[1, 8\]"):
        LOSTLinear.from_linear(nn.Linear(8, 12, device="meta"), 9, 0.25)

@pytest.mark.parametrize("sparsity", [0, 0.25])
@pytest.mark.parametrize("enabled", [False, True])
def test_meta_device_runs_the_layer_and_its_description(sparsity, enabled):
    linear = nn.Linear(8, 12, device="meta")
    layer = LOSTLinear.from_linear(linear, 4, sparsity, learn_gamma=True)
    x = torch.empty(2, 5, 8, device="meta", requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = layer(x)
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 5, 12) and y.dtype == linear(x).dtype and x.grad.shape == x.shape
    assert "learn_gamma=True" in repr(layer) and LOSTLinear(**layer.settings()).k == layer.k

def test_a_weight_on_the_meta_device_has_nothing_to_decompose():
    with pytest.raises(LOSTError, match="a weight on the meta device has no values"):
        decompose(torch.empty(12, 8, device="meta"), 3, 2)

@pytest.mark.parametrize("sparsity", [0, 0.25])
@pytest.mark.parametrize("few_rows", [False, True])
def test_autocast_leaves_float64_alone_as_in_nn_linear(sparsity, few_rows):
    linear, x = dense_layer((12, 16), bias=True), inputs(16)
    layer = LOSTLinear.from_linear(linear, 4, sparsity)
    layer.few_rows = few_rows
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float64
        assert torch.equal(layer(x), plain)

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

# --- whole ensembles, indices that wrap around, shares that floating point rounds down ---

@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_ensemble_has_the_gradients_of_its_members(rows):
    layers = [LOSTLinear.from_linear(dense_layer((6, 8), seed=seed), 3, 0.25) for seed in range(3)]
    x = torch.randn(3, rows, 8, generator=seeded(), dtype=layers[0].A.dtype)
    out = torch.randn(rows, 6, generator=seeded(1), dtype=x.dtype)
    parameters, buffers = torch.func.stack_module_state(layers)
    assert len({tuple(index.tolist()) for index in buffers["index"]}) > 1
    def loss(parameters, buffers, x):
        return (torch.func.functional_call(layers[0], (parameters, buffers), x) * out).sum()
    with warnings.catch_warnings():
        # torch has no batching rule for index_copy and runs it member by member
        warnings.simplefilter("ignore")
        found = torch.func.vmap(torch.func.grad(loss, 2))(parameters, buffers, x)
    for layer, one, gradient in zip(layers, x, found, strict=True):
        one = one.clone().requires_grad_()
        (layer(one) * out).sum().backward()
        assert torch.allclose(one.grad, gradient, atol=1e-6)

@pytest.mark.parametrize("index", [torch.tensor([1, 2**31 - 1, -2**31 + 2, 3], dtype=torch.int32),
                                   torch.tensor([False, True])], ids=["wraps around", "bool"])
def test_an_index_that_rises_only_by_overflow_is_refused(index):
    layer = LOSTLinear.from_linear(dense_layer((6, 8)), 3, len(index) / 8)
    with pytest.raises(LOSTError, match="must hold different channels"):
        layer.load_state_dict({**layer.state_dict(), "index": index})

def test_the_share_of_channels_is_that_of_the_equation_where_floating_point_falls_below():
    assert LOSTLinear.from_linear(nn.Linear(100, 8), 3, 0.29).k == 29

@pytest.mark.parametrize("skip", [("",), None, (3,)])
def test_a_skip_that_names_nothing_is_refused(skip):
    with pytest.raises(LOSTError, match="skip"):
        apply_lost(nn.Sequential(nn.Linear(8, 8)), 2, 0.5, skip=skip)
