"""composite.py: directions and entries that pay from one budget in one currency."""
import pytest
import torch
from matrices import noise

from nanolost import composite, splitting
from nanolost.composite import Composite, entry_worths, price_of, rank_at, ranks_in_budget
from nanolost.lowrank import Metric, curve, root
from nanolost.shelf import Shelf

NAME = "model.layers.0.mlp.gate_proj"

def covariance(n, seed):
    X = noise(4 * n, n, seed=seed)
    return X.T @ X / len(X) + torch.eye(n, dtype=torch.float64) / 10

def a_metric(m, n):
    return Metric(root(covariance(m, 1)), root(covariance(n, 2)))

def test_an_entry_is_worth_what_its_row_loses_when_the_others_make_up_for_it(monkeypatch):
    m, n = 3, 8
    monkeypatch.setattr(composite, "SAMPLED", m)
    metric = a_metric(m, n)
    C = metric.L @ metric.L.T
    G = metric.K @ metric.K.T
    D = noise(m, n, seed=3) * (noise(m, n, seed=4) > 0)
    expected = []
    for row in range(m):
        support = D[row].nonzero()[:, 0].tolist()
        for gone in support:
            others = [j for j in support if j != gone]
            # the rest of the row takes the values that lose least
            change = torch.zeros(n, dtype=torch.float64)
            change[gone] = -D[row, gone]
            change[others] = torch.linalg.solve(C[others][:, others], C[others, gone] * D[row, gone])
            expected.append(G[row, row] * (change @ C @ change) / 2)
    assert torch.allclose(entry_worths(D, metric), torch.stack(expected))

def test_the_price_is_the_mean_of_the_least_valuable_entries_of_all_matrices():
    parts = [torch.arange(1.0, 201.0), torch.tensor([0.5]), torch.empty(0)]
    assert price_of(parts) == pytest.approx((0.5 + 1) / 2)
    # a model without entries buys none
    assert price_of([torch.empty(0)]) == torch.inf

def test_directions_are_taken_as_long_as_each_pays_for_its_values():
    # worth 6, 3, 1
    losses = torch.tensor([10.0, 4.0, 1.0, 0.0])
    assert [rank_at(losses, 10, price) for price in (0.05, 0.2, 0.4, 0.7)] == [3, 2, 1, 0]

def test_beside_a_pattern_directions_and_dense_matrices_fit_the_budget():
    curves = {"a": torch.tensor([8.0, 1.0, 0.5]), "b": torch.tensor([9.0, 8.0, 7.0])}
    zeros = {"a": (100, 50), "b": (100, 50)}
    found = ranks_in_budget(curves, {"a": 20, "b": 20}, zeros, 170)
    # one direction repairs a; b has to be dense to gain anything
    assert found == {"a": 1, "b": None}
    assert ranks_in_budget(curves, {"a": 20, "b": 20}, zeros, 100) == {"a": 0, "b": 0}

def composite_of(tmp_path, W, budget, patterns=None):
    """A composite of one matrix with a budget of so many values, its entries split first; its damage then."""
    m, n = W.shape
    metric = a_metric(m, n)
    layer = splitting.Scaled(NAME, metric.L @ metric.L.T, metric.K @ metric.K.T, Shelf(str(tmp_path)))
    keep = W.abs().flatten().kthvalue(W.numel() - budget).values
    layer.begin(W, W * (W.abs() > keep), W.device)
    splitting.split([layer], budget, patterns, W.device)
    made = Composite([layer], {NAME: W}, lambda name: metric, patterns, W.device)
    before = made.damage()
    return made, before

def lost(made, W):
    A, B, D = made.parts()[NAME]
    return a_metric(*W.shape).damage(W.double() - D.double() - B @ A)

@pytest.fixture
def planted():
    """Single large entries and two strong directions."""
    m, n = 24, 40
    entries = noise(m, n, seed=5) * 3 * (torch.rand(m, n, generator=torch.Generator().manual_seed(6)) < 0.1)
    return (entries + 2 * noise(m, 2, seed=7) @ noise(2, n, seed=8) + 0.05 * noise(m, n, seed=9)).float()

def test_planted_directions_are_found_and_lose_less_at_equal_values(planted, tmp_path, monkeypatch):
    budget = 300
    # two directions of a matrix this small are much of it
    monkeypatch.setattr(composite, "SHARES", (0.1, 0.45))
    made, before = composite_of(tmp_path, planted, budget)
    made.compose(budget)
    A, B, D = made.parts()[NAME]
    assert len(A) >= 2
    assert int(D.count_nonzero()) + len(A) * sum(D.shape) <= budget
    assert lost(made, planted) < before / 5

def test_a_matrix_without_structure_gets_no_direction(tmp_path):
    W = noise(24, 40, seed=10).float()
    made, before = composite_of(tmp_path, W, 480)
    alone = splitting.result(made.layers[0]).clone()
    made.compose(480)
    A, _, D = made.parts()[NAME]
    assert len(A) == 0
    assert torch.equal(D, alone)

def test_beside_a_pattern_the_rest_of_the_budget_buys_directions(planted, tmp_path):
    patterns = {NAME: (2, 4)}
    budget = planted.numel() // 2 + 3 * sum(planted.shape)
    made, before = composite_of(tmp_path, planted, planted.numel() // 2, patterns)
    made.compose(budget)
    A, B, D = made.parts()[NAME]
    assert 2 <= len(A) <= 3
    assert (D.view(24, 10, 4).count_nonzero(dim=2) <= 2).all()
    assert lost(made, planted) < before / 2

def test_curves_are_of_what_the_entries_leave(planted, tmp_path):
    made, before = composite_of(tmp_path, planted, 300)
    curves, _, zeros = made.look()
    E = made.residual(made.layers[0])
    assert torch.allclose(curves[NAME], curve(E, a_metric(*planted.shape)))
    assert curves[NAME][0].item() == pytest.approx(before)
    assert zeros[NAME] == (960, 300)
