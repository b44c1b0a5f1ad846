"""cap.py: robust PCA and OATS against their equations written out, the policy against the exact gradient of
its expectation, projection and choice against slow forms."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lost import LOSTError
from nanolost import cap
from nanolost.cap import Candidates, choose, initial, oats, policy, project, robust_pca, score, split
from nanolost.errors import UserError

# (out, in)
shapes = pytest.mark.parametrize("shape", [(24, 24), (20, 36), (36, 20)], ids=["square", "wide", "tall"])

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)

def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()

def planted(shape, rank, nonzeros, size, seed=0):
    """L of a rank and S of so many elements of ± size."""
    L = normal(shape[0], rank, seed=seed) @ normal(rank, shape[1], seed=seed + 1)
    S = torch.zeros(shape, dtype=torch.float64)
    index = torch.randperm(S.numel(), generator=seeded(seed + 2))[:nonzeros]
    S.view(-1)[index] = size * normal(nonzeros, seed=seed + 3).sign()
    return L, S

# --- robust PCA ---

def literal_soft(z, t):
    return torch.tensor([[math.copysign(max(abs(x) - t, 0), x) for x in row] for row in z.tolist()],
                        dtype=torch.float64)

def literal_pca(W, iterations):
    """Equations 2–4 with μ and Y as the paper has them and the full SVD."""
    m, n = W.shape
    lam = 1 / math.sqrt(max(m, n))
    mu = m * n / (4 * sum(abs(x) for row in W.tolist() for x in row))
    S = Y = torch.zeros(m, n, dtype=torch.float64)
    for _ in range(iterations):
        U, sigma, Vt = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
        L = U @ torch.diag((sigma - 1 / mu).clamp(min=0)) @ Vt
        S = literal_soft(W - L + Y / mu, lam / mu)
        Y = Y + mu * (W - L - S)
    return L, S

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("iterations", [1, 2, 7])
@shapes
def test_robust_pca_is_its_equations(shape, iterations, dtype, tolerance):
    L, S = planted(shape, 3, 40, 5)
    W = (L + S + 0.1 * normal(*shape, seed=9)).to(dtype)
    U, sigma, Vt, S = robust_pca(W, iterations)
    expected_L, expected_S = literal_pca(W.double(), iterations)
    assert {part.dtype for part in (U, sigma, Vt, S)} == {dtype}
    assert relative_error((U * sigma) @ Vt, expected_L) < tolerance
    assert relative_error(S, expected_S) < tolerance
    assert (sigma > 0).all() and (sigma.diff() <= 0).all()

def test_robust_pca_recovers_what_was_planted():
    # rank 5 % and 5 % of the elements
    L, S = planted((60, 80), 3, 240, 10)
    U, sigma, Vt, found = robust_pca(L + S, iterations=200, tolerance=1e-9)
    assert len(sigma) == 3
    assert relative_error((U * sigma) @ Vt, L) < 1e-6
    assert relative_error(found, S) < 1e-6

def test_robust_pca_ends_where_the_parts_add_up():
    L, S = planted((60, 80), 3, 240, 10)
    W = L + S
    counts = []
    svd = cap.soft_svd
    def counted(*given):
        counts.append(1)
        return svd(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cap, "soft_svd", counted)
        U, sigma, Vt, found = robust_pca(W, iterations=1000, tolerance=1e-4)
    error = relative_error((U * sigma) @ Vt + found, W)
    assert len(counts) < 100
    assert 1e-8 < error <= 1e-4

@shapes
def test_a_matrix_of_zeros_has_parts_of_zeros(shape):
    U, sigma, Vt, S = robust_pca(torch.zeros(shape))
    assert len(sigma) == 0 and U.shape == (shape[0], 0) and Vt.shape == (0, shape[1])
    assert S.count_nonzero() == 0 and S.shape == shape
    A, B, S = oats(torch.zeros(shape), torch.zeros(shape[1]), 2, 3, iterations=3)
    assert (B @ A).count_nonzero() == 0 and S.count_nonzero() == 0
    assert A.isfinite().all() and B.isfinite().all()

def test_what_is_no_finite_matrix_is_refused():
    for W in (torch.zeros(3), torch.full((3, 4), math.nan)):
        with pytest.raises(LOSTError):
            robust_pca(W)
        with pytest.raises(LOSTError):
            oats(W, torch.ones(4), 1, 1)

# --- OATS ---

def literal_oats(W, scale, rank, nonzeros, iterations):
    """In the scaled space, and back by a division."""
    D = torch.diag(scale)
    S = torch.zeros_like(W)
    for _ in range(iterations):
        U, sigma, Vt = torch.linalg.svd((W - S) @ D, full_matrices=False)
        L = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vt[:rank] @ torch.diag(1 / scale)
        size = ((W - L) @ D).abs().flatten()
        S = torch.zeros_like(W)
        for i in sorted(range(len(size)), key=lambda i: -size[i])[:nonzeros]:
            S.view(-1)[i] = (W - L).flatten()[i]
    return L, S

@shapes
def test_oats_is_its_rule(shape):
    W = normal(*shape)
    scale = normal(shape[1], seed=1).exp()
    L, S = literal_oats(W, scale, 4, 50, iterations=6)
    A, B, found = oats(W, scale, 4, 50, iterations=6)
    assert A.shape == (4, shape[1]) and B.shape == (shape[0], 4)
    assert relative_error(B @ A, L) < 1e-9
    assert relative_error(found, S) < 1e-9

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_oats_is_better_than_either_part_alone_at_its_budget(seed):
    shape = m, n = 30, 40
    rank, nonzeros = 3, 90
    L, S = planted(shape, rank, nonzeros, 6, seed)
    W = L + S + 0.05 * normal(*shape, seed=seed + 4)
    scale = 0.5 + torch.rand(n, generator=seeded(seed + 5), dtype=torch.float64)
    def error(approximation):
        return ((W - approximation) * scale).norm()
    A, B, found = oats(W, scale, rank, nonzeros, iterations=20)
    budget = rank * (m + n) + nonzeros
    U, sigma, Vt = torch.linalg.svd(W * scale)
    more = -(-budget // (m + n))
    low_rank = (U[:, :more] * sigma[:more]) @ Vt[:more] / scale
    sparse = cap.largest(W, scale, budget)
    assert error(B @ A + found) <= error(low_rank)
    assert error(B @ A + found) <= error(sparse)

@pytest.mark.parametrize("nonzeros", [0, 1, 7, 30])
def test_oats_keeps_exactly_as_many_elements_as_asked_for(nonzeros):
    # all residuals are of one size: the first singular vectors of this are constant
    W = torch.ones(6, 5)
    W[::2, ::2] = -1
    A, B, S = oats(W, torch.ones(5), 1, nonzeros, iterations=1)
    assert S.count_nonzero() == nonzeros
    assert S.dtype == W.dtype

@shapes
def test_oats_divides_by_no_channel_without_an_input(shape):
    W = normal(*shape)
    scale = normal(shape[1], seed=1).exp()
    scale[::3] = 0
    A, B, S = oats(W, scale, 4, 50, iterations=6)
    dead = scale == 0
    # the others are as without it
    expected_L, expected_S = literal_oats(W[:, ~dead], scale[~dead], 4, 50, iterations=6)
    assert A.isfinite().all() and B.isfinite().all()
    assert relative_error((B @ A)[:, ~dead], expected_L) < 1e-9
    assert relative_error(S[:, ~dead], expected_S) < 1e-9
    # elements of a channel that is not used are the last to be kept, in their own units
    S = oats(W, scale, 4, W.numel(), iterations=2)[2]
    assert S.count_nonzero() == W.numel() and S.isfinite().all()

def test_oats_refuses_a_rank_that_there_is_not():
    for rank in (0, 5):
        with pytest.raises(LOSTError, match="rank"):
            oats(normal(4, 6), torch.ones(6), rank, 3)

# --- candidates ---

def candidates(shape, seed=0):
    L, S = planted(shape, 3, 25, 4, seed)
    return Candidates(*robust_pca(L + S, iterations=3))

def test_candidates_are_what_is_not_zero_each_at_its_cost():
    part = candidates((12, 9))
    q, nonzeros = part.counts()
    cost, values = part.cost(), part.values()
    assert cost.tolist() == [12 + 9] * q + [1] * nonzeros
    expected = part.sigma.tolist() + [abs(x) for row in part.S.tolist() for x in row if x]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)
    assert cost.dtype == values.dtype == torch.float32

def test_what_the_masks_keep_is_built():
    parts = [candidates((12, 9)), candidates((7, 10), seed=5)]
    total = sum(len(part.values()) for part in parts)
    mask = torch.rand(total, generator=seeded()) < 0.5
    start = 0
    for part, (mask_sigma, mask_S) in zip(parts, split(mask, parts), strict=True):
        q, nonzeros = part.counts()
        kept = mask[start:start + q].tolist()
        entries = iter(mask[start + q:start + q + nonzeros].tolist())
        start += q + nonzeros
        A, B, S = part.build(mask_sigma, mask_S)
        L = part.U @ torch.diag(part.sigma * torch.tensor(kept)) @ part.Vt
        torch.testing.assert_close(B @ A, L)
        assert A.shape[0] == B.shape[1] == sum(kept)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
        assert S.tolist() == [[x if x and next(entries) else 0 for x in row] for row in part.S.tolist()]
    # no copies
    views = [view for pair in split(mask, parts) for view in pair]
    assert all(view.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr() for view in views)

def test_a_mask_of_another_length_is_refused():
    part = candidates((12, 9))
    with pytest.raises(RuntimeError, match="split"):
        split(torch.ones(1000, dtype=torch.bool), [part])

# --- projection ---

def brute_force(s, cost, budget):
    """The nearest of all feasible points that have some coordinates at 0, some at 1 and the others free, with
    the budget binding or not."""
    best, distance = None, math.inf
    for state in itertools.product((0, 1, None), repeat=len(s)):
        free = [i for i, x in enumerate(state) if x is None]
        fixed = sum(c for c, x in zip(cost, state, strict=True) if x == 1)
        taus = [0.0]
        if free:
            # c·(s − τ c) over the free ones is what the fixed ones leave of the budget
            over = sum(cost[i] * s[i] for i in free) + fixed - budget
            taus.append(over / sum(cost[i] ** 2 for i in free))
        for tau in taus:
            x = [s[i] - tau * cost[i] if x is None else x for i, x in enumerate(state)]
            total = sum(a * b for a, b in zip(x, cost, strict=True))
            inside = all(-1e-12 <= a <= 1 + 1e-12 for a in x) and total <= budget + 1e-9
            far = math.dist(x, s)
            if inside and far < distance:
                best, distance = x, far
    return best

levels = st.floats(-1.5, 2.5, width=32)
costs = st.floats(0.5, 40, width=32)
problems = st.lists(st.tuples(levels, costs), min_size=1, max_size=4)

@settings(max_examples=150, deadline=None)
@given(problems, st.floats(0, 1.2))
def test_the_projection_is_the_nearest_point(problem, share):
    s, cost = (torch.tensor(side, dtype=torch.float64) for side in zip(*problem, strict=True))
    budget = share * cost.sum().item()
    x = project(s, cost, budget)
    assert x.tolist() == pytest.approx(brute_force(s.tolist(), cost.tolist(), budget), abs=1e-6)

dtypes = st.sampled_from([torch.float32, torch.float64])

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.floats(0, 1.1), dtypes)
def test_the_projection_is_optimal_and_repeats_itself(seed, count, share, dtype):
    s = normal(count, seed=seed, dtype=dtype) + 0.5
    kind = torch.randint(3, (count,), generator=seeded(seed))
    cost = torch.tensor([1.0, 21.0, 40.0], dtype=dtype)[kind]
    budget = share * cost.sum().item()
    x = project(s, cost, budget)
    assert torch.equal(project(x, cost, budget), x)
    assert x.dtype == dtype and (x >= 0).all() and (x <= 1).all()
    clipped = s.clamp(0, 1)
    if clipped.double() @ cost.double() <= budget:
        assert torch.equal(x, clipped)
        return
    # equality where it binds, but for the rounding of each s below and of the sum above
    used = (x.double() @ cost.double()).item()
    slack = 8 * torch.finfo(dtype).eps
    assert budget - slack * cost.sum() <= used <= budget * (1 + slack)
    # one price τ for all: it is (s − x) / c inside, at least that at 0 and at most that at 1
    price = (s - x) / cost
    tau = price[x < 1].max()
    assert tau > -slack
    assert (price[x > 0] >= tau - slack).all()

def test_the_projection_needs_no_more_than_its_blocks(monkeypatch):
    s, cost = normal(1000).abs(), torch.ones(1000, dtype=torch.float64)
    whole = project(s, cost, 100)
    monkeypatch.setattr(cap, "BLOCK", 7)
    torch.testing.assert_close(project(s, cost, 100), whole)
    assert project(s, cost, 0).count_nonzero() == 0

def test_a_projection_from_far_away_meets_the_budget():
    # as far as eq. 7 goes where s is next to 0
    s = torch.tensor([5e7, 0.3, 0.6, -5e7], dtype=torch.float64)
    x = project(s, torch.ones(4, dtype=torch.float64), 1.5)
    assert x.tolist() == pytest.approx([1, 0.1, 0.4, 0], abs=1e-6)

def test_the_first_s_is_the_share_of_the_largest_value():
    value = torch.tensor([8.0, 4.0, 0.01])
    cost = torch.ones(3)
    assert initial(value, cost, 3).tolist() == pytest.approx([0.95, 0.5, 0.05])
    assert initial(value, cost, 1.2).tolist() == pytest.approx([0.85 - 1e-9, 0.4, 0], abs=0.06)
    assert initial(value, cost, 1.2).sum() == pytest.approx(1.2)
    # a model of zeros has no candidates
    assert len(initial(value[:0], cost[:0], 1)) == 0

# --- the policy ---

S3 = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
LOSSES = torch.tensor([3.0, 2.5, 2.8, 1.0, 2.9, 1.7, 2.2, 0.5], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)

def loss_of_three(mask):
    a, b, c = mask.tolist()
    return LOSSES[4 * a + 2 * b + c].item()

def exact_gradient():
    """Of Σ over the 8 masks of p(m) Loss(m), by the derivatives of the products."""
    gradient = [0.0] * 3
    for mask in itertools.product((0, 1), repeat=3):
        for k in range(3):
            others = math.prod(S3[i].item() if mask[i] else 1 - S3[i].item() for i in range(3) if i != k)
            gradient[k] += (1 if mask[k] else -1) * others * loss_of_three(torch.tensor(mask))
    return torch.tensor(gradient, dtype=torch.float64)

def test_the_score_is_the_derivative_of_the_log_probability():
    s = S3.clone().requires_grad_()
    for mask in itertools.product((False, True), repeat=3):
        mask = torch.tensor(mask)
        p = torch.where(mask, s, 1 - s).log().sum()
        expected, = torch.autograd.grad(p, s)
        torch.testing.assert_close(score(mask, S3), expected, rtol=1e-6, atol=0)
    # what is certain has nothing to learn from
    certain = torch.tensor([0.0, 1.0])
    assert score(certain.bool(), certain).tolist() == [0, 0]

@pytest.mark.parametrize("samples", [1, 3])
def test_a_step_of_the_policy_is_the_exact_gradient_on_average(samples):
    lr, draws = 1e-3, 4000
    generator = seeded(samples)
    found = torch.stack([
        # the budget does not bind, so a step of lr is lr times the estimate
        (S3 - policy(loss_of_three, S3, ONES, 3, steps=1, lr=lr, samples=samples, generator=generator)) / lr
        for _ in range(draws)])
    error = found.std(0) / draws**0.5
    exact = exact_gradient()
    assert (exact.abs() > 8 * error).all()
    assert ((found.mean(0) - exact).abs() < 4 * error).all()

@pytest.mark.parametrize("samples", [1, 2])
def test_the_policy_is_its_equations(samples):
    cost = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    s = initial(torch.tensor([9.0, 5.0, 2.0], dtype=torch.float64), cost, 3)
    masks, losses = [], [2.0, 3.5, 1.0, 0.5, 4.0, 2.5, 3.0]
    def loss_of(mask):
        assert mask.dtype == torch.bool
        masks.append(mask.clone())
        return losses[len(masks) - 1]
    found = policy(loss_of, s, cost, 3, samples=samples, generator=seeded())
    assert len(masks) == 1 + 3 * samples
    pairs = list(zip(masks, losses, strict=False))
    # δ from a draw of its own, then the moving average of the means
    delta = pairs.pop(0)[1]
    for step in range(3):
        now = pairs[samples * step:samples * (step + 1)]
        gradient = sum((loss - delta) * (m.double() - s) / (s * (1 - s) + 1e-8) for m, loss in now) / samples
        s = project(s - 0.05 * gradient, cost, 3)
        delta = 0.8 * delta + 0.2 * sum(loss for _, loss in now) / samples
    torch.testing.assert_close(found, s)

def test_the_policy_finds_the_useful_candidates():
    useful = torch.arange(20) % 2 == 0
    s = torch.full((20,), 0.5)
    cost = torch.ones(20)
    def loss_of(mask):
        return 3 - 0.1 * float((mask & useful).sum())
    found = policy(loss_of, s, cost, 10, steps=300, generator=seeded())
    assert found[useful].mean() > 0.9 and found[~useful].mean() < 0.1
    assert (s == 0.5).all()
    assert found.sum() <= 10
    assert torch.equal(choose(found, cost, 10), useful)

def test_a_seed_gives_the_policy_its_draws():
    first, again, other = (policy(loss_of_three, S3, ONES, 2, generator=seeded(n)) for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_a_loss_that_is_no_number_is_refused():
    for loss in (math.nan, math.inf):
        with pytest.raises(UserError, match="float32"):
            policy(lambda mask, loss=loss: loss, S3, ONES, 2)

# --- the choice ---

def literal_choice(s, cost, budget):
    kept = [False] * len(s)
    for i in sorted(range(len(s)), key=lambda i: -s[i]):
        if cost[i] <= budget:
            kept[i] = True
            budget -= cost[i]
    return kept

ranks = st.sampled_from([0.0, -0.0, 0.05, 0.3, 0.95, 1.0]) | st.floats(0, 1, width=32)

@pytest.mark.parametrize("block", [3, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_choice_is_the_literal_one(block, dtype, monkeypatch):
    monkeypatch.setattr(cap, "BLOCK", block)
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(ranks, st.sampled_from([1, 1, 1, 7, 12])), max_size=30), st.integers(0, 120))
    def check(pairs, budget):
        s = torch.tensor([a for a, _ in pairs], dtype=dtype)
        cost = [c for _, c in pairs]
        mask = choose(s, torch.tensor(cost, dtype=torch.float32), budget)
        assert mask.dtype == torch.bool
        assert mask.tolist() == literal_choice(s.tolist(), cost, budget)
        assert sum(c for c, kept in zip(cost, mask.tolist(), strict=True) if kept) <= budget
    check()

def test_what_does_not_fit_is_skipped():
    s = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    cost = torch.tensor([5.0, 9.0, 1.0, 5.0, 1.0, 1.0])
    assert choose(s, cost, 8).tolist() == [True, False, True, False, True, True]

def test_a_whole_model_is_cut_to_its_budget():
    weights = [sum(planted(shape, 3, 40, 3, seed)) for seed, shape in enumerate([(24, 24), (36, 20)])]
    parts = [Candidates(*robust_pca(W)) for W in weights]
    cost = torch.cat([part.cost() for part in parts])
    value = torch.cat([part.values() for part in parts])
    budget = sum(W.numel() for W in weights) // 4
    def cut(mask):
        return [part.build(*masks) for part, masks in zip(parts, split(mask, parts), strict=True)]
    def loss_of(mask):
        return sum((W - B @ A - S).norm().item() for W, (A, B, S) in zip(weights, cut(mask), strict=True))
    s = policy(loss_of, initial(value, cost, budget), cost, budget, generator=seeded())
    kept = sum(part.numel() if part is not S else int(S.count_nonzero())
               for A, B, S in cut(choose(s, cost, budget)) for part in (A, B, S))
    assert 0.9 * budget < kept <= budget
