"""splitting.py: each turn against the whole Kronecker system, exact counts and patterns, one threshold for
all layers."""
import types
from functools import partial

import matrices
import pytest
import torch
from matrices import noise

from nanolost import splitting
from nanolost.pruning import NEVER, largest
from nanolost.shelf import Shelf
from nanolost.splitting import (
    GROWTH,
    PENALTY,
    Scaled,
    change,
    exact_threshold,
    result,
    split,
    threshold_masks,
)

NAMES = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
NAME = NAMES[0]
CPU = torch.device("cpu")

# another mixture than where zeros begin
covariance = partial(matrices.covariance, mixed=0.3)

def layer_of(tmp_path, W, D, C=None, G=None, name=NAME) -> Scaled:
    m, n = W.shape
    C = covariance(n, 1) if C is None else C
    G = covariance(m, 2) if G is None else G
    layer = Scaled(name, C, G, Shelf(str(tmp_path)))
    layer.begin(W, D, CPU)
    return layer

def cost(E, C, G) -> float:
    E = E.double()
    return torch.einsum("oi,op,pj,ij->", E, G, E, C).item() / 2

def found(layer: Scaled, what: str) -> torch.Tensor:
    return layer.shelf[f"{what}.{layer.name}"].clone()

# --- a turn ---

def test_every_turn_solves_the_whole_kronecker_system(tmp_path):
    m, n, keep = 5, 7, 15
    C, G, W = covariance(n, 1), covariance(m, 2), noise(m, n)
    layer = layer_of(tmp_path, W, W * largest(W.abs(), keep), C, G)
    d, e = C.diagonal().sqrt(), G.diagonal().sqrt()
    system = torch.kron(G / torch.outer(e, e), C / torch.outer(d, d))
    scaled = e[:, None] * W * d
    D = scaled * largest(W.abs(), keep)
    V = torch.zeros(m, n, dtype=torch.float64)
    before = rho = PENALTY
    for _ in range(5):
        layer.turn(before, rho, CPU)
        right = system @ scaled.flatten() - V.flatten() + rho * D.flatten()
        X = torch.linalg.solve(system + rho * torch.eye(m * n, dtype=torch.float64), right).view(m, n)
        U = X + V / rho
        torch.testing.assert_close(found(layer, "U").double(), U, rtol=1e-4, atol=1e-5)
        mask = largest(U.abs(), keep)
        change(layer, mask)
        D = U * mask
        V = V + rho * (X - D)
        before, rho = rho, rho * GROWTH
    torch.testing.assert_close(result(layer).double(), D / e[:, None] / d, rtol=1e-4, atol=1e-5)

def test_units_in_which_an_entry_that_goes_alone_costs_half_its_square(tmp_path):
    C, G, W = covariance(7, 1), covariance(5, 2), noise(5, 7)
    layer = layer_of(tmp_path, W, W, C, G)
    scaled = layer.scaled(W)
    for i, j in ((0, 0), (3, 6), (4, 2)):
        E = torch.zeros(5, 7)
        E[i, j] = W[i, j]
        assert scaled[i, j].item() ** 2 / 2 == pytest.approx(cost(E, C, G), rel=1e-5)
    torch.testing.assert_close(layer.unscaled(scaled).double(), W, rtol=1e-5, atol=1e-6)

# --- what is chosen ---

def test_zeros_chosen_together_lose_less_than_those_chosen_alone(tmp_path):
    C, G, W = covariance(32, 1), covariance(24, 2), noise(24, 32)
    start = W * largest(W.abs() * C.diagonal().sqrt() * G.diagonal().sqrt()[:, None], 384)
    layer = layer_of(tmp_path, W, start, C, G)
    split([layer], 384, None, CPU)
    assert cost(W - result(layer), C, G) < 0.6 * cost(W - start, C, G)

KINDS = {"distinct": noise(24, 32), "few": (2 * noise(24, 32)).round().abs() + 1,
         "equal": noise(24, 32).sign() * 0.5}

@pytest.mark.parametrize("keep", [1, 100, 383, 767, 768])
@pytest.mark.parametrize("kind", KINDS)
def test_so_many_entries_stay_exactly_under_ties_too(kind, keep, tmp_path):
    W = KINDS[kind]
    eye = {} if kind == "distinct" else {"C": torch.eye(32).double(), "G": torch.eye(24).double()}
    layer = layer_of(tmp_path, W, W * largest(W.abs(), keep), **eye)
    split([layer], keep, None, CPU)
    assert int(result(layer).count_nonzero()) == keep
    assert int(found(layer, "mask").sum()) == keep

@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4)])
def test_a_pattern_is_kept_exactly_and_loses_less_than_the_start(n, m, tmp_path):
    C, G, W = covariance(32, 1), covariance(24, 2), noise(24, 32)
    start = W * splitting.largest_of_groups(W.abs(), n, m)
    layer = layer_of(tmp_path, W, start, C, G)
    # the count plays no part
    split([layer], 0, {NAME: (n, m)}, CPU)
    D = result(layer)
    assert (D.view(24, -1, m).count_nonzero(2) == n).all()
    assert cost(W - D, C, G) < 0.7 * cost(W - start, C, G)

@pytest.mark.parametrize("patterns", [None, {NAME: (2, 4)}], ids=["half", "2:4"])
def test_zeros_that_stay_are_never_chosen_again(patterns, tmp_path):
    C, G, W = covariance(32, 1), covariance(24, 2), noise(24, 32)
    gone = noise(24, 32, seed=5) > 0.5
    # the weight that is approximated may have entries there: they are for the others to make up for
    start = W * largest(W.abs().masked_fill(gone, NEVER), 300)
    layer = Scaled(NAME, C, G, Shelf(str(tmp_path)))
    layer.begin(W, start, CPU, gone)
    split([layer], 300, patterns, CPU)
    D = result(layer)
    assert not D[gone].any()
    if patterns:
        room = (~gone).view(24, -1, 4).sum(2).clamp(max=2)
        assert torch.equal(D.view(24, -1, 4).count_nonzero(2), room)
    else:
        assert int(D.count_nonzero()) == 300
    assert cost(W - D, C, G) < 0.8 * cost(W - start, C, G)

@pytest.mark.parametrize("start", ["best", "other"])
def test_diagonal_covariances_leave_the_largest_scaled_weights_of_all_layers(start, tmp_path, monkeypatch):
    # the threshold between the turns is of every entry
    monkeypatch.setattr(splitting, "EVERY", 1)
    d = torch.linspace(0.2, 3, 32, dtype=torch.float64)
    e = torch.linspace(2, 0.5, 24, dtype=torch.float64)
    # the second layer matters nine times as much
    weights = {name: noise(24, 32, seed=seed) for seed, name in enumerate(NAMES[1:])}
    sides = dict(zip(weights, (e, 3 * e), strict=True))
    sizes = torch.stack([(sides[name][:, None] * W * d).abs() for name, W in weights.items()])
    masks = dict(zip(weights, largest(sizes, 600), strict=True))
    begin = masks if start == "best" else {name: W.abs() > 0.8 for name, W in weights.items()}
    layers = []
    for name, W in weights.items():
        (tmp_path / name).mkdir()
        C, G = torch.diag(d ** 2), torch.diag(sides[name] ** 2)
        layers.append(layer_of(tmp_path / name, W, W * begin[name], C, G, name))
    split(layers, 600, None, CPU)
    wrong = 0
    for layer in layers:
        W, mask = weights[layer.name], masks[layer.name]
        both = (result(layer) != 0) & mask
        wrong += int((mask & ~both).sum())
        # as they are, to what the last turns still move
        assert ((result(layer) - W) * both).norm() < 0.01 * W.norm()
    # from other zeros it ends where few are others
    assert wrong <= (0 if start == "best" else 6)
    assert masks[NAMES[2]].sum() > 1.5 * masks[NAMES[1]].sum()

def test_the_entries_of_a_layer_that_costs_nothing_all_go(tmp_path):
    layers = []
    for name, size in zip(NAMES[1:], (1.0, 1e-12), strict=True):
        (tmp_path / name).mkdir()
        W = noise(24, 32)
        G = covariance(24, 2) * size
        layers.append(layer_of(tmp_path / name, W, W * (W.abs() > 0.7), G=G, name=name))
    split(layers, 400, None, CPU)
    assert [int(result(layer).count_nonzero()) for layer in layers] == [400, 0]

@pytest.mark.parametrize("keep", [0, 3])
def test_a_weight_of_zeros_keeps_nothing_but_zeros(keep, tmp_path):
    W = torch.zeros(24, 32)
    layer = layer_of(tmp_path, W, W)
    split([layer], keep, None, CPU)
    assert torch.equal(result(layer), W)

def test_a_count_of_nothing_keeps_nothing(tmp_path):
    W = noise(24, 32)
    layer = layer_of(tmp_path, W, W * 0)
    split([layer], 0, None, CPU)
    assert torch.equal(result(layer), torch.zeros(24, 32))

def test_dead_inputs_and_outputs_leave_finite_weights(tmp_path):
    C, G, W = covariance(32, 1), covariance(24, 2), noise(24, 32).float()
    for matrix, dead in ((C, [3, 8]), (G, [0, 5, 23])):
        matrix[dead] = 0
        matrix[:, dead] = 0
    W[7] = 0
    W[:, 9] = 0
    statistics = types.SimpleNamespace(inputs=lambda name: C.float(), gradients=lambda name: G.float())
    (layer,) = splitting.scaled_layers([NAME], statistics, (0.03, 0.1), Shelf(str(tmp_path)), CPU)
    layer.begin(W, W * (W.abs() > 0.7), CPU)
    split([layer], 300, None, CPU)
    D = result(layer)
    assert D.isfinite().all() and D.abs().max() < 10 * W.abs().max()
    assert int(D.count_nonzero()) <= 300

# --- thresholds ---

def standing(tmp_path, *values) -> list[Scaled]:
    """Layers whose U are these."""
    layers = []
    for name, U in zip(NAMES, values, strict=False):
        shelf = Shelf(str(tmp_path / name))
        (tmp_path / name).mkdir()
        shelf[f"U.{name}"] = U.float()
        shelf[f"mask.{name}"] = torch.zeros(U.shape, dtype=torch.bool)
        # without the covariances that a constructor wants
        layer = Scaled.__new__(Scaled)
        layer.name = name
        layer.shelf = shelf
        layers.append(layer)
    return layers

VALUES = {"distinct": [noise(9, 11), noise(8, 13, seed=1) * 1e-3, noise(5, 4, seed=2) * 1e6],
          "few": [(2 * noise(9, 11)).round(), (3 * noise(8, 13, seed=1)).round()],
          "zero": [torch.zeros(4, 5), torch.zeros(3, 3)],
          "near": [1 + noise(9, 11) * 1e-6, torch.tensor([[1e-45, 0.0, 3e38]])]}

@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_exact_threshold_is_that_of_a_sort(values, tmp_path):
    layers = standing(tmp_path, *values)
    every = torch.cat([U.float().abs().flatten() for U in values]).sort(descending=True).values
    for keep in (1, 2, len(every) // 3, len(every) // 2, len(every) - 1, len(every)):
        threshold, ties = exact_threshold(layers, keep)
        assert threshold == every[keep - 1].item()
        assert ties == keep - int((every > threshold).sum()) > 0
        threshold_masks(layers, threshold, ties)
        masks = torch.cat([found(layer, "mask").flatten() for layer in layers])
        sizes = torch.cat([U.float().abs().flatten() for U in values])
        # of equal ones the first
        order = sizes.argsort(descending=True, stable=True)
        assert torch.equal(masks, torch.zeros_like(masks).index_fill(0, order[:keep], True))

def test_the_entries_that_change_sides_are_counted(tmp_path):
    (layer,) = standing(tmp_path, torch.tensor([[1.0, -2.0, 3.0, -4.0]]))
    assert threshold_masks([layer], 2.0) == 3
    assert found(layer, "mask").tolist() == [[False, True, True, True]]
    assert threshold_masks([layer], 2.0, 0) == 1
    assert found(layer, "mask").tolist() == [[False, False, True, True]]
    assert threshold_masks([layer], 0.5, 1) == 2

def test_the_sampled_threshold_is_near_the_exact_one(tmp_path):
    layers = standing(tmp_path, noise(300, 200), 3 * noise(200, 300, seed=1))
    for share in (0.1, 0.5, 0.9):
        keep = int(share * 120_000)
        above = splitting.sampled_threshold(layers, keep, 120_000)
        kept = sum(int((found(layer, "U").abs() > above).sum()) for layer in layers)
        # of 1967 entries: 5 standard errors
        assert kept / 120_000 == pytest.approx(share, abs=0.06)
