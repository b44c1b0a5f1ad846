"""pruning.py: the walk against the optimal brain surgeon with an inverse of its own for every column, masks
with exact counts under ties, and one threshold that meets the share from below."""
import itertools
import math
import types

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from matrices import covariance, noise

from nanolost import pruning
from nanolost.lowrank import shrunk
from nanolost.pruning import (
    NEAR,
    NEVER,
    Roots,
    Walker,
    fitted,
    inverse_root,
    largest,
    largest_of_groups,
    largest_of_rows,
    next_guess,
    offered_patterns,
    pattern_of,
    sparsegpt,
    walk,
    walk_in_groups,
)
from nanolost.shelf import Shelf

def cost(E, C) -> float:
    return torch.einsum("oi,ij,oj->", E.double(), C, E.double()).item() / 2

# --- masks ---

def literal_largest(values: list, count: int) -> list:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [i in order[:count] for i in range(len(values))]

def few_values(*shape, seed=0):
    """Scores of bfloat16 weights, rounded further: many are equal."""
    return (noise(*shape, seed=seed) * 4).round().abs().bfloat16().float()

SCORES = {"equal": torch.full((6, 11), 0.5), "few": few_values(6, 11), "zero": torch.zeros(6, 11),
          "distinct": noise(6, 11).abs()}
scores = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)

@scores
def test_the_largest_are_exactly_so_many_and_of_equal_ones_the_first(score):
    for count in (-1, 0, 1, 17, 33, 65, 66, 70):
        mask = largest(score, count)
        assert mask.shape == score.shape
        assert mask.flatten().tolist() == literal_largest(score.flatten().tolist(), max(0, count))

@scores
def test_rows_keep_their_largest_and_together_the_share(score):
    for share in (0.0, 0.1, 0.29, 0.5, 0.8, 1.0):
        mask = largest_of_rows(score, share)
        counts = mask.sum(1).tolist()
        assert sum(counts) == math.floor(share * 66 + 1e-9)
        assert max(counts) - min(counts) <= 1
        for row, count, values in zip(mask.tolist(), counts, score.tolist(), strict=True):
            assert row == literal_largest(values, count)

def with_never(score, seed=3):
    """The score without two of three entries, and none at all in one row."""
    never = noise(*score.shape, seed=seed).abs() < 1
    never[2] = True
    return score.masked_fill(never, NEVER), ~never

@scores
def test_what_can_never_stay_does_not_and_the_others_make_up_for_it(score):
    score, able = with_never(score)
    size = int(able.sum())
    for count in (0, 1, size // 2, size, 60):
        masks = largest(score, count), largest_of_rows(score, (count + 0.5) / 66)
        for mask in masks:
            assert int(mask.sum()) == min(count, size)
            assert not (mask & ~able).any()
    for n, m in ((2, 4), (1, 8)):
        mask = largest_of_groups(score, n, m)
        for kept, there in zip(mask, able, strict=True):
            for chosen, known in zip(kept.split(m), there.split(m), strict=True):
                # a short last group keeps its share
                most = n * len(known) // m
                assert int(chosen.sum()) == min(most, int(known.sum()))
        assert not (mask & ~able).any()

def literal_fitted(counts: list, room: list) -> list:
    found = [min(pair) for pair in zip(counts, room, strict=True)]
    missing = sum(counts) - sum(found)
    while missing and any(a < b for a, b in zip(found, room, strict=True)):
        for i, most in enumerate(room):
            if missing and found[i] < most:
                found[i] += 1
                missing -= 1
    return found

@settings(max_examples=100, deadline=None)
@drawn(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=9))
def test_what_does_not_fit_goes_to_the_others_as_many_to_each(pairs):
    counts, room = (list(column) for column in zip(*pairs, strict=True))
    found = fitted(torch.tensor(counts), torch.tensor(room)).tolist()
    expected = literal_fitted(counts, room)
    assert sum(found) == sum(expected) and all(a <= b for a, b in zip(found, room, strict=True))
    # who gets the odd ones is open
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1

@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4), (7, 8), (3, 3)])
@scores
def test_groups_keep_exactly_their_n_largest(score, n, m):
    mask = largest_of_groups(score, n, m)
    assert mask.shape == score.shape
    for row, kept in zip(score, mask, strict=True):
        for values, chosen in zip(row.split(m), kept.split(m), strict=True):
            # the last group may be short: of it the share, rounded down
            assert int(chosen.sum()) == n * len(values) // m
            if chosen.any() and not chosen.all():
                assert values[chosen].min() >= values[~chosen].max()

# --- patterns ---

def test_a_pattern_is_its_two_numbers_or_none():
    assert pattern_of("2:4") == (2, 4) and pattern_of("4:8") == (4, 8)
    assert pattern_of("unstructured") is None and pattern_of("mixed:8") is None

def test_a_matrix_is_offered_its_pattern_or_all_of_a_width():
    assert offered_patterns("2:4") == [(2, 4)]
    assert offered_patterns("mixed:8") == [(1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (6, 8), (7, 8)]

@pytest.mark.parametrize("name", ["2", "2:", "2:x", "2:4:8"])
def test_half_a_pattern_is_no_pattern(name):
    for read in (pattern_of, offered_patterns):
        with pytest.raises(ValueError):
            read(name)

# --- the walk ---

def surgeon(W, C, keep_of, group=1):
    """The walk with the inverse of what is left of C computed anew for every column, one entry at a time."""
    W = W.clone()
    out, width = W.shape
    inverses = [torch.linalg.inv(C[j:, j:]) for j in range(width)]
    for j in range(width):
        if j % group == 0:
            ahead = range(j, min(j + group, width))
            keep = keep_of(torch.stack([W[:, c] ** 2 / inverses[c][0, 0] for c in ahead]))
        for i in range(out):
            if not keep[j % group, i]:
                change = W[i, j] / inverses[j][0, 0] * inverses[j][:, 0]
                W[i, j:] -= change
                W[i, j] = 0
    return W

@pytest.mark.parametrize("block", [4, 8, 128])
def test_the_walk_is_the_surgeon_column_by_column(block, monkeypatch):
    monkeypatch.setattr(pruning, "BLOCK", block)
    W, C = noise(7, 22), covariance(22, 1)
    rows = noise(7, seed=2).square()
    def keep(saliency):
        return saliency * rows > 0.4
    found = walk(W, inverse_root(C), keep)
    expected = surgeon(W, C, keep)
    assert 30 < int(expected.count_nonzero()) < 124
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(found == 0, expected == 0)
    # what the weight was is left
    assert torch.equal(W, noise(7, 22))

def test_zeros_that_stay_make_up_for_nothing(monkeypatch):
    monkeypatch.setattr(pruning, "BLOCK", 8)
    W, C = noise(7, 22), covariance(22, 1)
    gone = noise(7, 22, seed=4) > 0.3
    W[gone] = 0
    left = iter(~gone.T)
    def keep(saliency):
        return saliency > 0.4
    expected = surgeon(W, C, lambda saliency: keep(saliency) & next(left))
    found = walk(W, inverse_root(C), keep, gone=gone)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert not found[gone].any() and 20 < int(found.count_nonzero()) < int((~gone).sum())
    # which is more than leaving them as they were
    assert walk(W, inverse_root(C), keep)[gone].any()

@pytest.mark.parametrize("n, m", [(2, 4), (3, 8)])
def test_the_walk_in_groups_is_the_surgeon_with_a_choice_a_group(n, m, monkeypatch):
    monkeypatch.setattr(pruning, "BLOCK", 8)
    W, C = noise(5, 22), covariance(22, 1)
    found = walk_in_groups(W, inverse_root(C), n, m)
    def keep(saliency):
        # of a short last group the share, rounded down
        count = n * len(saliency) // m
        return torch.tensor([literal_largest(row, count) for row in saliency.T.tolist()]).T
    torch.testing.assert_close(found, surgeon(W, C, keep, m), rtol=1e-9, atol=1e-10)
    with pytest.raises(AssertionError):
        walk_in_groups(W, inverse_root(C), 2, 3)

def test_each_column_that_goes_raises_the_loss_by_half_its_saliency():
    W, C = noise(1, 9), covariance(9, 1)
    R = inverse_root(C)
    torch.testing.assert_close(R.T @ R, torch.linalg.inv(C))
    assert torch.equal(R, R.triu())
    seen = []
    def drop(saliency):
        seen.append(saliency.item())
        return torch.zeros_like(saliency, dtype=torch.bool)
    found = walk(W, R, drop)
    assert torch.equal(found, torch.zeros(1, 9, dtype=torch.float64))
    # all of them together: the loss of the weight itself
    assert sum(seen) / 2 == pytest.approx(cost(W, C))

def test_what_stays_is_the_best_for_the_columns_that_are_left():
    W, C = noise(4, 12), covariance(12, 1)
    gone = torch.arange(12) < 5
    left = iter(~gone)
    found = walk(W, inverse_root(C), lambda saliency: next(left).expand(1, 4))
    best = W[:, ~gone] + W[:, gone] @ C[gone][:, ~gone] @ torch.linalg.inv(C[~gone][:, ~gone])
    torch.testing.assert_close(found[:, ~gone], best)

# --- sparsegpt ---

@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_sparsegpt_keeps_exactly_the_share_block_by_block(share, monkeypatch):
    monkeypatch.setattr(pruning, "BLOCK", 8)
    W = noise(7, 22)
    found = sparsegpt(W, inverse_root(covariance(22, 1)), share, None)
    ends = [math.floor(share * 7 * end + 1e-9) for end in (8, 16, 22)]
    assert [int(found[:, :end].count_nonzero()) for end in (8, 16, 22)] == ends

def test_sparsegpt_meets_its_count_where_whole_blocks_are_gone(monkeypatch):
    monkeypatch.setattr(pruning, "BLOCK", 8)
    W = noise(7, 22)
    W[:, :8] = 0
    W[0, 10:] = 0
    found = sparsegpt(W, inverse_root(covariance(22, 1)), 0.5, None, W == 0)
    assert int(found.count_nonzero()) == 77
    assert not found[W == 0].any()

@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["half", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_loses_less_than_wanda_where_inputs_are_correlated(seed, pattern):
    W, C = noise(24, 64, seed=seed), covariance(64, seed + 1)
    score = W.abs() * C.diagonal().sqrt()
    mask = largest_of_groups(score, *pattern) if pattern else largest_of_rows(score, 0.5)
    found = sparsegpt(W, inverse_root(pruning.damped(C)), 0.5, pattern)
    assert found.count_nonzero() == mask.sum() == W.numel() // 2
    assert cost(W - found, C) < 0.8 * cost(W - W * mask, C)

def test_the_damping_is_a_share_of_the_mean_diagonal():
    C = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    assert torch.allclose(pruning.damped(C), torch.tensor([[4.03, 1], [1, 2.03]], dtype=torch.float64))

# --- one threshold ---

INNER = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS = {f"model.layers.{layer}.{inner}": (65, 47) if inner != "mlp.down_proj" else (47, 65)
           for layer in range(2) for inner in INNER}

def known(loud=None, size=100.0):
    """Statistics of `WEIGHTS`; the gradients of the layer `loud` are larger."""
    def inputs(name):
        return covariance(WEIGHTS[name][1], int(name[13]) * 2 + ("down" in name)).float()
    def gradients(name):
        G = covariance(WEIGHTS[name][0], 10 + list(WEIGHTS).index(name)).float()
        return G * size if name == loud else G
    return types.SimpleNamespace(inputs=inputs, gradients=gradients)

def weights(round_to=None):
    found = {name: noise(*shape, seed=20 + i).float() for i, (name, shape) in enumerate(WEIGHTS.items())}
    return {name: (W / round_to).round() * round_to for name, W in found.items()} if round_to else found

def walker(tmp_path, statistics, given):
    return Walker(given, statistics, Roots(statistics, Shelf(str(tmp_path)), shrunk), "cpu")

@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_is_met_from_below(share, tmp_path):
    given, taken = weights(), {}
    walker(tmp_path, known(), given).to_share(share, taken.__setitem__)
    kept = sum(int(W.count_nonzero()) for W in taken.values()) / sum(W.numel() for W in given.values())
    assert share - NEAR <= kept <= share
    assert list(taken) == list(given)

def test_one_threshold_serves_all_matrices_weighed_by_their_gradients(tmp_path):
    given, taken = weights(), {}
    loud = "model.layers.1.mlp.up_proj"
    statistics = known(loud)
    # few enough matrices for a slow walk
    given = {name: given[name][:9] for name in given if "layers.1" in name}
    grads = {name: statistics.gradients(name)[:9, :9] for name in given}
    part = types.SimpleNamespace(inputs=statistics.inputs, gradients=grads.__getitem__)
    found = walker(tmp_path, part, given).walk(1.5, taken.__setitem__)
    counts = {}
    for name, W in given.items():
        rows = grads[name].diagonal().double()
        C = shrunk(statistics.inputs(name))
        expected = surgeon(W.double(), C, lambda saliency, rows=rows: saliency * rows > math.exp(1.5))
        torch.testing.assert_close(taken[name].double(), expected, rtol=1e-3, atol=1e-4)
        counts[name] = int(expected.count_nonzero())
    assert found == sum(counts.values()) / sum(W.numel() for W in given.values())
    assert counts[loud] > 1.4 * counts["model.layers.1.mlp.gate_proj"]

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("round_to", [None, 0.5])
def test_small_matrices_whose_share_jumps_end_below_it_too(seed, round_to, tmp_path):
    name = "model.layers.0.mlp.gate_proj"
    W = noise(16, 24, seed=seed).float()
    W = (W / round_to).round() * round_to if round_to else W
    C, G = covariance(24, seed).float(), covariance(16, seed + 3).float()
    statistics = types.SimpleNamespace(inputs=lambda name: C, gradients=lambda name: G)
    for number, share in enumerate((0.3, 0.5, 0.7)):
        (tmp_path / str(number)).mkdir()
        taken = {}
        walker(tmp_path / str(number), statistics, {name: W}).to_share(share, taken.__setitem__)
        kept = int(taken[name].count_nonzero()) / W.numel()
        assert share - 0.06 <= kept <= share

def test_matrices_that_can_only_stay_or_go_go(tmp_path):
    name = "model.layers.0.mlp.gate_proj"
    statistics = types.SimpleNamespace(inputs=lambda _: torch.eye(24), gradients=lambda _: torch.eye(16))
    taken = {}
    walker(tmp_path, statistics, {name: torch.ones(16, 24)}).to_share(0.5, taken.__setitem__)
    assert torch.equal(taken[name], torch.zeros(16, 24))

def test_the_first_threshold_is_right_where_nothing_makes_up_for_anything(tmp_path):
    given = weights()
    def diagonal(read):
        return lambda name: torch.diag(read(name).diagonal())
    statistics = types.SimpleNamespace(inputs=diagonal(known().inputs), gradients=diagonal(known().gradients))
    found = walker(tmp_path, statistics, given)
    for share in (0.2, 0.5, 0.8):
        # of 288 entries: 4 standard errors
        assert found.walk(found.first(share), lambda name, W: None) == pytest.approx(share, abs=0.12)

def test_zeros_that_were_there_before_are_among_those_that_go(tmp_path):
    given = weights(1.5)
    zeros = sum(int((W == 0).sum()) for W in given.values()) / sum(W.numel() for W in given.values())
    assert zeros > 0.5
    found = walker(tmp_path, known(), given)
    # a threshold that zeros would set is none: 1e-300 at the least
    assert found.first(0.45) > -20
    nothing = {name: torch.zeros_like(W) for name, W in given.items()}
    assert math.isfinite(walker(tmp_path, known(), nothing).first(0.5))

def test_guesses_of_a_falling_line_are_exact_after_two_looks():
    def line(x):
        return 0.7 - 0.05 * x
    looks = [(0.0, line(0.0)), (1.5, line(1.5))]
    assert line(next_guess(looks, 0.4)) == pytest.approx(0.4)
    # the two nearest: an odd look far away plays no part
    assert line(next_guess([(-9.0, 1.0), *looks], 0.4)) == pytest.approx(0.4)

def test_a_guess_lies_on_the_side_where_the_share_must_be():
    for looks in itertools.permutations([(1.0, 0.6), (2.0, 0.62)]):
        assert next_guess(list(looks), 0.5) > 1
    assert next_guess([(1.0, 0.6)], 0.5) > 1 and next_guess([(1.0, 0.4)], 0.5) < 1
    for looks in ([(0.0, 0.9), (1.0, 0.6), (3.0, 0.2)], [(0.0, 0.6), (1.0, 0.58), (3.0, 0.2)]):
        low = max(x for x, y in looks if y > 0.5)
        assert low < next_guess(looks, 0.5) < 3

def test_roots_are_made_once_for_the_layers_that_share_their_inputs(tmp_path):
    asked = []
    def shrink(C):
        asked.append(C.shape[0])
        return shrunk(C)
    roots = Roots(known(), Shelf(str(tmp_path)), shrink)
    for _ in range(2):
        for name in WEIGHTS:
            R = roots.of(name, "cpu").double()
            C = shrunk(known().inputs(name))
            torch.testing.assert_close(R.T @ R, torch.linalg.inv(C), rtol=1e-4, atol=1e-5)
    assert asked == [47, 65, 47, 65]
