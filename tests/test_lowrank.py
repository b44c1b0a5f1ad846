"""Low-rank products: the best of their rank in each method's metric, whatever the covariance."""
import types

import pytest
import torch
from matrices import noise

from nanolost import lowrank
from nanolost.lowrank import Metric, balanced, curve, curve_beside, factors, metric_of, root, shrunk, split

SHAPES = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
METHODS = pytest.mark.parametrize("method", ["fisher", "svdllm", "asvd", "plain"])

def covariance(n: int, tokens: int, seed: int) -> torch.Tensor:
    """Of correlated inputs whose sizes differ by a factor of e⁴."""
    sizes = torch.linspace(-2, 2, n, dtype=torch.float64).exp()
    x = noise(tokens, n, seed=seed) @ (torch.eye(n) + 0.5 * noise(n, n, seed=seed + 1)) * sizes
    return x.T @ x / tokens

def statistics(shape, tokens=500, C=None):
    m, n = shape
    C = covariance(n, tokens, 1) if C is None else C
    G = covariance(m, tokens, 5)
    return types.SimpleNamespace(inputs=lambda name: C.float(), gradients=lambda name: G.float(),
                                 sizes=lambda name: C.diagonal().sqrt().float())

def metric(method: str, shape, **how) -> Metric:
    return metric_of(method, "layer", statistics(shape, **how), "cpu")

def dense_metric(method: str, known) -> tuple[torch.Tensor, torch.Tensor]:
    """G and C as the method takes them, (out, out) and (in, in)."""
    m, n = len(known.gradients("")), len(known.inputs(""))
    own = {name: matrix + torch.diag(0.03 * matrix.diagonal() + 1e-6 * matrix.diagonal().mean())
           for name, matrix in (("G", known.gradients("").double()), ("C", known.inputs("").double()))}
    G = own["G"] if method == "fisher" else torch.eye(m, dtype=torch.float64)
    C = {"plain": torch.eye(n, dtype=torch.float64), "asvd": torch.diag(known.sizes("").double())}
    return G, C.get(method, own["C"])

def cost(E, G, C) -> float:
    return torch.einsum("oi,op,pj,ij->", E, G, E, C).item() / 2

# --- the best of a rank ---

@METHODS
@SHAPES
def test_damage_is_that_of_the_method_s_own_covariances(method, shape):
    E = noise(*shape, seed=9)
    G, C = dense_metric(method, statistics(shape))
    assert metric(method, shape).damage(E) == pytest.approx(cost(E, G, C), rel=1e-9)

@METHODS
@SHAPES
def test_no_product_of_that_rank_loses_less(method, shape):
    W = noise(*shape)
    G, C = dense_metric(method, statistics(shape))
    # the symmetric roots, not the triangular ones
    def symmetric(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.T
    sigma = torch.linalg.svdvals(symmetric(G) @ W @ symmetric(C))
    for rank in (1, 5, 11):
        A, B = factors(W, metric(method, shape), rank)
        assert A.shape == (rank, shape[1]) and B.shape == (shape[0], rank)
        assert cost(W - B @ A, G, C) == pytest.approx(sigma[rank:].square().sum().item() / 2, rel=1e-8)

@METHODS
def test_the_objective_has_no_slope_at_the_factors_and_grows_around_them(method):
    shape = (12, 20)
    W = noise(*shape)
    G, C = dense_metric(method, statistics(shape))
    A, B = (part.requires_grad_() for part in factors(W, metric(method, shape), 4))
    E = W - B @ A
    (torch.einsum("oi,op,pj,ij->", E, G, E, C) / 2).backward()
    # of the terms that cancel there
    assert A.grad.abs().max() < 1e-9 * (B.T @ G @ W @ C).abs().max()
    assert B.grad.abs().max() < 1e-9 * (G @ W @ C @ A.T).abs().max()
    least = cost(E.detach(), G, C)
    with torch.no_grad():
        for seed in range(20):
            size = 10.0 ** -(seed % 4)
            near_A, near_B = (part + size * part.std() * noise(*part.shape, seed=seed) for part in (A, B))
            assert cost(W - near_B @ near_A, G, C) > least

@METHODS
@SHAPES
def test_the_curve_is_what_the_factors_of_each_rank_lose(method, shape):
    W = noise(*shape)
    known = metric(method, shape)
    found = curve(W, known)
    assert found.shape == (min(shape) + 1,) and found[-1] == 0
    assert found[0].item() == pytest.approx(known.damage(W), rel=1e-9)
    for rank in range(1, min(shape)):
        A, B = factors(W, known, rank)
        assert found[rank].item() == pytest.approx(known.damage(W - B @ A), rel=1e-6)
    assert (found.diff() <= 0).all()

def test_smaller_ranks_are_the_first_rows_of_larger_ones():
    W, known = noise(12, 20), metric("fisher", (12, 20))
    A, B = factors(W, known, 7)
    a, b = factors(W, known, 3)
    torch.testing.assert_close(B[:, :3] @ A[:3], b @ a, rtol=1e-9, atol=1e-12)

def test_full_rank_is_the_weight_itself():
    W = noise(12, 20)
    A, B = factors(W, metric("fisher", (12, 20)), 12)
    torch.testing.assert_close(B @ A, W, rtol=1e-8, atol=1e-8)

# --- balance ---

@pytest.mark.parametrize("directions", [6, 3, 0], ids=["full", "deficient", "zero"])
def test_balanced_factors_have_the_same_product_and_equal_diagonal_squares(directions):
    A = noise(6, 20, seed=1) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    B = noise(12, 6, seed=2)
    A[directions:] = 0
    product = B @ A
    a, b = balanced(A, B)
    size = product.abs().max().item()
    assert (b @ a - product).abs().max() <= 1e-12 * size
    left, right = a @ a.T, b.T @ b
    sizes = torch.linalg.svdvals(product)[:6]
    assert (left - right).abs().max() <= 1e-12 * size * 30
    assert (left - torch.diag(left.diagonal())).abs().max() <= 1e-12 * size * 30
    torch.testing.assert_close(left.diagonal(), sizes, rtol=1e-9, atol=1e-12 * size)

# --- hard cases ---

def hard_cases():
    dead = covariance(20, 500, 1)
    dead[[3, 8]] = 0
    dead[:, [3, 8]] = 0
    loud = covariance(20, 500, 1)
    loud[7] *= 1e4
    loud[:, 7] *= 1e4
    return {"dead": dead, "loud": loud, "few": covariance(20, 5, 1), "one": covariance(20, 1, 1),
            "zero": torch.zeros(20, 20, dtype=torch.float64), "tiny": covariance(20, 500, 1) * 1e-20}

@METHODS
@pytest.mark.parametrize("case", hard_cases().values(), ids=hard_cases())
def test_hard_covariances_give_finite_factors_that_are_the_best_of_their_rank(method, case):
    shape = (12, 20)
    known = metric(method, shape, C=case)
    W = noise(*shape)
    found = curve(W, known)
    assert found.isfinite().all()
    for rank in (1, 6):
        A, B = balanced(*factors(W, known, rank))
        assert A.isfinite().all() and B.isfinite().all()
        assert known.damage(W - B @ A) == pytest.approx(found[rank].item(), rel=1e-6)

@METHODS
@pytest.mark.parametrize("k", [0, 2])
def test_a_weight_of_zeros_stays_zero(method, k):
    shape = (12, 20)
    parts = split(torch.zeros(shape), metric(method, shape), 3, k)
    assert torch.equal(parts.product(), torch.zeros(shape, dtype=torch.float64))
    A, B = balanced(parts.A, parts.B)
    assert A.isfinite().all() and B.isfinite().all()
    assert torch.equal(curve(torch.zeros(shape), metric(method, shape)), torch.zeros(13, dtype=torch.float64))

def test_a_covariance_of_zeros_prefers_no_direction():
    assert torch.equal(shrunk(torch.zeros(4, 4)), torch.eye(4, dtype=torch.float64))

def test_a_covariance_grows_by_shares_of_its_diagonal_and_of_the_mean():
    C = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    expected = torch.tensor([[4 + 4 * 0.5 + 3 * 0.1, 1], [1, 2 + 2 * 0.5 + 3 * 0.1]], dtype=torch.float64)
    torch.testing.assert_close(shrunk(C, 0.5, 0.1), expected)

# --- channels beside the product ---

def test_regressing_on_channels_leaves_the_schur_complement():
    C = covariance(9, 300, 1)
    channels = torch.tensor([1, 4, 7])
    rest = torch.tensor([0, 2, 3, 5, 6, 8])
    W = noise(5, 9)
    left, inner, T = lowrank.beside_channels(W, Metric(None, root(C)), channels)
    assert torch.equal(left, W[:, rest])
    # brute force: samples with exactly this covariance, and the least squares of the others on the channels
    x = torch.linalg.qr(noise(50, 9, seed=3))[0] @ root(C).T
    solved = torch.linalg.lstsq(x[:, channels], x[:, rest]).solution
    torch.testing.assert_close(T, solved, rtol=1e-8, atol=1e-10)
    residual = x[:, rest] - x[:, channels] @ solved
    torch.testing.assert_close(inner.L @ inner.L.T, residual.T @ residual, rtol=1e-8, atol=1e-10)

@METHODS
@SHAPES
def test_channels_and_product_together_have_no_slope_left(method, shape):
    W = noise(*shape)
    G, C = dense_metric(method, statistics(shape))
    parts = split(W, metric(method, shape), 4, 3)
    A, B, W_s = (part.clone().requires_grad_() for part in (parts.A, parts.B, parts.W_s))
    E = W - (B @ A).index_add(1, parts.channels, W_s)
    (torch.einsum("oi,op,pj,ij->", E, G, E, C) / 2).backward()
    rest = lowrank.without(shape[1], parts.channels)
    size = (G @ W @ C).abs().max()
    assert W_s.grad.abs().max() < 1e-9 * size
    assert A.grad[:, rest].abs().max() < 1e-9 * size * B.abs().max()
    assert B.grad.abs().max() < 1e-9 * size * A.abs().max()
    # the product has nothing in the columns that have values of their own
    assert (parts.A[:, parts.channels] == 0).all()
    assert parts.channels.diff().min() > 0 and parts.W_s.shape == (shape[0], 3)

@METHODS
@SHAPES
def test_the_curve_beside_channels_is_what_the_parts_lose(method, shape):
    W = noise(*shape)
    known = metric(method, shape)
    for k in (1, 4):
        rank = 5
        found = curve_beside(W, known, rank, k)
        parts = split(W, known, rank, k)
        lost = known.damage(W - parts.product())
        assert found[rank].item() == pytest.approx(lost, rel=1e-6)
        A, B = factors(W, known, rank)
        assert lost < known.damage(W - B @ A)

def test_the_curve_beside_channels_holds_when_one_input_is_10_000_times_the_others():
    known = metric("fisher", (12, 20), C=hard_cases()["loud"])
    W = noise(12, 20)
    # so that the loud channel is none of those chosen
    W[:, 7] = 0
    parts = split(W, known, 5, 2)
    assert 7 not in parts.channels
    found = curve_beside(W, known, 5, 2)
    assert found[5].item() == pytest.approx(known.damage(W - parts.product()), rel=1e-6)

def test_without_channels_the_parts_are_the_factors():
    W, known = noise(12, 20), metric("fisher", (12, 20))
    parts = split(W, known, 4)
    A, B = factors(W, known, 4)
    assert torch.equal(parts.product(), B @ A)
    assert len(parts.channels) == 0 and parts.W_s.shape == (12, 0)

@METHODS
def test_the_worst_channels_are_those_for_which_the_others_can_make_up_least(method):
    E, known = noise(12, 20), metric(method, (12, 20))
    G, C = dense_metric(method, statistics((12, 20)))
    costs = []
    for channel in range(20):
        others = torch.arange(20) != channel
        changed = E.clone()
        # the least squares of the others, with this column as it is
        regression = torch.linalg.solve(C[others][:, others], C[others, channel])
        changed[:, others] = -regression * E[:, channel, None]
        costs.append(cost(changed, G, C))
    expected = torch.tensor(costs).topk(5).indices.sort().values
    assert torch.equal(lowrank.worst_channels(E, known, 5), expected)

@pytest.mark.parametrize("method", ["fisher", "svdllm", "plain"])
@pytest.mark.parametrize("loud", [1.0, 1e4])
def test_a_planted_rank_and_planted_channels_are_found(method, loud):
    shape, rank, channels = (30, 40), 4, torch.tensor([2, 9, 17, 18, 25, 33])
    W = 3 * noise(30, rank, seed=1) @ noise(rank, 40, seed=2)
    # more columns than the rank, each in a direction of its own: a product of rank 4 cannot carry them
    W[:, channels] += 3 * noise(30, 6, seed=3)
    C = covariance(40, 400, 1)
    C[5] *= loud
    C[:, 5] *= loud
    known = metric(method, shape, C=C)
    parts = split(W, known, rank, 6)
    assert parts.channels.tolist() == channels.tolist()
    assert known.damage(W - parts.product()) < 1e-12 * known.damage(W)
    assert (parts.product() - W).abs().max() < 1e-5 * W.abs().max()

@pytest.mark.parametrize("seed", range(5))
def test_choosing_channels_again_never_loses_more_than_the_first_choice(seed):
    W, known = noise(30, 40, seed=seed), metric("fisher", (30, 40))
    A, B = factors(W, known, 6)
    first = lowrank.worst_channels(W - B @ A, known, 5)
    W_rest, inner, _ = lowrank.beside_channels(W, known, first)
    parts = split(W, known, 6, 5)
    assert known.damage(W - parts.product()) <= curve(W_rest, inner)[6] * (1 + 1e-9)
