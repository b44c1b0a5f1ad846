"""losa.py: the paper's schedule, similarities that no rotation changes, rates against every corner of the
box, and totals that are exact."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import noise

from nanolost.losa import (
    cka,
    half_width,
    importances,
    kept_counts,
    level,
    patterns_mixed,
    ranks,
    rates,
    stage_ranks,
    stage_steps,
    stage_zeros,
)

quick = settings(deadline=None, max_examples=60)
shares = st.floats(0, 1)
blocks = st.integers(1, 12)

# --- the schedule ---

def test_zeros_come_by_the_papers_cubic_rate():
    assert stage_zeros(0.7, 5) == pytest.approx([0.3416, 0.5488, 0.6552, 0.6944, 0.7])
    assert stage_zeros(0.6, 1) == [0.6]

@quick
@given(shares, st.integers(1, 20))
def test_zeros_never_fall_and_end_at_the_target_to_the_bit(final, stages):
    found = stage_zeros(final, stages)
    assert len(found) == stages and found == sorted(found)
    assert found[-1] == final

def test_ranks_rise_by_one_around_the_mean():
    assert stage_ranks(8, 5) == [6, 7, 8, 9, 10]
    assert stage_ranks(8, 4) == [6.5, 7.5, 8.5, 9.5]
    assert stage_ranks(8, 1) == [8]
    assert stage_ranks(2, 5) == [1, 1, 2, 3, 4]

def test_a_tenth_of_the_steps_for_each_stage_and_the_rest_for_the_last():
    assert stage_steps(10000, 5) == [0, 1000, 2000, 3000, 4000]
    assert stage_steps(30, 5) == [0, 3, 6, 9, 12]
    assert stage_steps(100, 1) == [0]
    assert stage_steps(100, 20) == list(range(0, 100, 5))

@quick
@given(st.integers(1, 30), st.integers(0, 400))
def test_every_stage_has_a_step(stages, more):
    steps = stages + more
    starts = stage_steps(steps, stages)
    ends = [*starts[1:], steps]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    assert len(starts) == stages and starts[0] == 0
    assert min(lengths) >= 1

def test_fewer_steps_than_stages_are_the_callers_fault():
    with pytest.raises(AssertionError):
        stage_steps(4, 5)

# --- similarities ---

def grams_of(*inputs) -> torch.Tensor:
    return torch.stack([X @ X.T for X in inputs])

def test_cka_is_the_papers_formula():
    inputs = [noise(6, 9, seed=seed) + seed for seed in range(3)]
    found = cka(grams_of(*inputs))
    H = torch.eye(6, dtype=torch.float64) - 1 / 6
    for i, j in itertools.product(range(3), repeat=2):
        K, L = (H @ inputs[n] @ inputs[n].T @ H for n in (i, j))
        expected = (K * L).sum() / (K.norm() * L.norm())
        assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-9)

def test_cka_is_one_for_what_is_turned_scaled_moved_or_widened():
    X = noise(12, 7)
    turn, _ = torch.linalg.qr(noise(7, 7, seed=1))
    wider, _ = torch.linalg.qr(noise(20, 7, seed=2))
    found = cka(grams_of(X, X @ turn, 3.5 * X, X + noise(7, seed=3), X @ wider.T))
    torch.testing.assert_close(found, torch.ones(5, 5, dtype=torch.float64))

def test_cka_falls_with_noise_and_is_never_beyond_its_bounds():
    X, other = noise(40, 7), noise(40, 7, seed=1)
    found = cka(grams_of(X, X + 0.3 * other, X + other, other))[0]
    assert found.tolist() == sorted(found.tolist(), reverse=True)
    assert 0 <= found[3] < 0.3 < 0.9 < found[1] < 1

def test_a_constant_input_is_like_no_other():
    found = cka(grams_of(noise(5, 3), torch.ones(5, 3, dtype=torch.float64)))
    assert torch.equal(found.round(decimals=9), torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64))

def test_what_no_other_block_says_is_important():
    similarity = torch.tensor([[1, 0.9, 0.2], [0.9, 1, 0.4], [0.2, 0.4, 1]])
    found = importances(similarity)
    assert found == pytest.approx([math.exp(-0.55), math.exp(-0.65), math.exp(-0.3)])
    assert importances(torch.ones(1, 1)) == [1]

# --- rates ---

def best_by_corners(importances, target, lower, upper, sizes):
    """The least Σ I n s of a linear programme in a box with one equation: at a corner all but one coordinate
    are at a bound."""
    n = len(importances)
    best = math.inf
    for free in range(n):
        others = [i for i in range(n) if i != free]
        for corner in itertools.product(*[(lower[i], upper[i]) for i in others]):
            fixed = sum(s * sizes[i] for s, i in zip(corner, others, strict=True))
            s = (target * sum(sizes) - fixed) / sizes[free]
            if lower[free] - 1e-12 <= s <= upper[free] + 1e-12:
                cost = sum(importances[i] * sizes[i] * c for c, i in zip(corner, others, strict=True))
                best = min(best, cost + importances[free] * sizes[free] * s)
    return best

@quick
@given(st.data())
def test_rates_cost_as_little_as_the_best_corner_of_the_box(data):
    n = data.draw(st.integers(3, 4))
    def draw(what):
        return data.draw(st.lists(what, min_size=n, max_size=n))
    important, sizes = draw(st.floats(0.1, 1)), draw(st.integers(1, 50))
    target = data.draw(st.floats(0.2, 0.9))
    # some inside the box, some below it
    floors = [target - gap for gap in draw(st.floats(-0.005, 0.2))]
    width = half_width(target)
    if sum(max(f, target - width) * s for f, s in zip(floors, sizes, strict=True)) > target * sum(sizes):
        return
    found = rates(important, target, floors, sizes)
    lower = [max(floor, target - width) for floor in floors]
    expected = best_by_corners(important, target, lower, [target + width] * n, sizes)
    cost = sum(i * s * size for i, s, size in zip(important, found, sizes, strict=True))
    assert cost == pytest.approx(expected, rel=1e-9)

@quick
@given(st.data())
def test_rates_meet_the_mean_and_keep_every_zero(data):
    n = data.draw(blocks)
    def draw(what):
        return data.draw(st.lists(what, min_size=n, max_size=n))
    floors, sizes, target = draw(shares), draw(st.integers(1, 10**7)), data.draw(shares)
    found = rates(draw(shares), target, floors, sizes)
    there = np.average(floors, weights=sizes)
    assert np.average(found, weights=sizes) == pytest.approx(max(target, there), abs=1e-12)
    for rate, floor in zip(found, floors, strict=True):
        assert floor - 1e-12 <= rate <= 1 + 1e-12

def test_less_important_blocks_get_more_zeros_and_one_between_them_the_mean():
    important = [0.5, 0.9, 0.1, 0.7, 0.3]
    for target, d in ((0.4, 0.01), (0.5, 0.01), (0.55, 0.02), (0.6, 0.02), (0.7, 0.03), (0.9, 0.03)):
        expected = [target, target - d, target + d, target - d, target + d]
        assert rates(important, target, [0] * 5, [10] * 5) == pytest.approx(expected, abs=1e-12)

def test_only_the_order_of_the_importances_counts():
    important = [0.5, 0.9, 0.1, 0.7]
    sharper = [value ** 100 for value in important]
    given = 0.6, [0.1, 0.59, 0.3, 0.595], [7, 3, 9, 4]
    assert rates(important, *given) == rates(sharper, *given)

def test_a_floor_above_the_box_stays_and_the_others_make_room():
    # three blocks share what 0.6 · 4 − 0.7 leaves them: inside the box
    found = rates([4, 3, 2, 1], 0.6, [0.62, 0, 0, 0], [10] * 4)
    assert found == pytest.approx([0.62, 0.58, 0.58, 0.62])
    # and here not: they are as near to it as they can be
    found = rates([4, 3, 2, 1], 0.6, [0.8, 0, 0, 0], [10] * 4)
    assert found == pytest.approx([0.8] + [1.6 / 3] * 3)
    found = rates([4, 3, 2, 1], 0.6, [0.8, 0.59, 0, 0], [10] * 4)
    assert found == pytest.approx([0.8, 0.59, 0.505, 0.505])

def test_blocks_that_have_more_zeros_than_the_target_keep_them():
    floors = [0.7, 0.65, 0.6]
    assert rates([1, 2, 3], 0.3, floors, [1, 1, 1]) == pytest.approx(floors)

@quick
@given(st.data())
def test_the_level_is_that_of_water(data):
    n = data.draw(blocks)
    floors = data.draw(st.lists(shares, min_size=n, max_size=n))
    sizes = data.draw(st.lists(st.integers(1, 100), min_size=n, max_size=n))
    target = data.draw(st.floats(np.average(floors, weights=sizes), 1.5))
    height = level(target, floors, sizes)
    filled = [max(floor, height) for floor in floors]
    assert np.average(filled, weights=sizes) == pytest.approx(target, abs=1e-9)

@quick
@given(st.lists(st.tuples(shares, st.integers(1, 10**6)), min_size=1, max_size=40))
def test_counts_are_the_models_together_and_none_is_further_than_one_from_its_rate(given):
    found, sizes = zip(*given, strict=True)
    counts = kept_counts(found, sizes)
    exact = [(1 - rate) * size for rate, size in given]
    assert sum(counts) == math.floor(math.fsum(exact) + 1e-6)
    for count, wanted in zip(counts, exact, strict=True):
        assert abs(count - wanted) < 1 + 1e-5

# --- patterns ---

def test_patterns_keep_one_more_of_important_blocks():
    assert patterns_mixed([1, 5, 3, 2, 4], 8, 0.75) == [1, 3, 2, 1, 3]
    assert patterns_mixed([1, 4, 3, 2], 8, 0.5) == [3, 5, 5, 3]
    assert patterns_mixed([1, 4, 3, 2, 5], 8, 0.6) == [3, 3, 3, 3, 4]

def test_patterns_never_rise_where_zeros_are_there():
    assert patterns_mixed([1, 2, 3, 4], 8, 0.75, [3, 3, 2, 1]) == [2, 3, 2, 1]
    assert patterns_mixed([1, 2, 3], 8, 0.5, [2, 3, 1]) == [2, 3, 1]

@quick
@given(st.data())
def test_patterns_meet_the_mean_as_near_as_whole_numbers_come(data):
    n, m = data.draw(blocks), data.draw(st.sampled_from([4, 8, 16]))
    target = data.draw(st.floats(0, 1 - 1 / m))
    important = data.draw(st.lists(shares, min_size=n, max_size=n))
    found = patterns_mixed(important, m, target)
    assert sum(found) == round((1 - target) * m * n)
    assert all(1 <= kept <= m for kept in found) and max(found) - min(found) <= 2
    for i, j in itertools.combinations(range(n), 2):
        if important[i] < important[j]:
            assert found[i] <= found[j]

# --- ranks ---

def test_ranks_follow_the_errors_and_what_is_left_goes_to_the_largest():
    # 3.2, 6.4, 9.6, 12.8: rounded they are right together
    assert ranks([1, 2, 3, 4], 8) == [3, 6, 10, 13]
    # 8.4, 8.4, 8.4, 6.7: one is missing
    assert ranks([1, 1, 1, 0.8], 8) == [9, 8, 8, 7]
    # 7.6, 7.6, 7.6, 9.1: one is too much
    assert ranks([1, 1, 1, 1.2], 8) == [7, 8, 8, 9]
    assert ranks([0, 0, 0], 7) == [7, 7, 7]

def test_the_bounds_are_kept_and_the_total_too():
    assert ranks([0, 0, 0, 1], 8) == [6, 5, 5, 16]
    assert ranks([1, 100, 1, 1], 3, most=4) == [3, 4, 3, 2]

@quick
@given(st.data())
def test_ranks_are_exact_together_and_in_their_bounds(data):
    errors = data.draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
    most = data.draw(st.integers(1, 32))
    mean = data.draw(st.floats(1, most))
    found = ranks(errors, mean, most)
    assert sum(found) == round(mean * len(errors))
    assert min(found) >= 1 and max(found) <= most
