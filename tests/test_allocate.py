"""allocate.py: brute force over every choice of small layers, the lowest price, what is left over, and the
uniform share."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolost.allocate import Option, Table, allocate, priced, smallest, spend, total, uniform

NAMES = "abc"

def lost_by(chosen) -> float:
    return sum(option.damage for option in chosen.values())

def best_of(options, budget: float) -> float:
    """The least damage of all choices that fit."""
    every = itertools.product(*options.values())
    return min(sum(option.damage for option in choice) for choice in every
               if sum(option.cost for option in choice) <= budget)

def hull(choices: list[Option]) -> list[Option]:
    """The options that some price takes, by their cost: corners of the lower convex hull, by every pair."""
    least = [option for option in choices if not any(
        other.cost <= option.cost and other.damage <= option.damage and other[:2] != option[:2]
        for other in choices)]
    points = sorted({option[:2] for option in least})
    def below(point):
        return any(a[0] < point[0] < b[0] and
                   (a[1] - point[1]) * (b[0] - point[0]) <= (point[1] - b[1]) * (point[0] - a[0])
                   for a in points for b in points)
    return [Option(*point) for point in points if not below(point)]

def largest_step(options) -> float:
    """What one matrix gains at the most by going to the next option that some price takes."""
    return max((one.damage - other.damage for choices in options.values()
                for one, other in itertools.pairwise(hull(choices))), default=0.0)

# whole numbers, so that sums are exact and ties frequent
option = st.builds(Option, st.integers(1, 30), st.integers(0, 50).map(float))
any_choices = st.lists(option, min_size=1, max_size=6)

@st.composite
def convex_choices(draw):
    """Each further step gains less a value than the one before it."""
    steps = sorted(draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)))
    width = draw(st.integers(1, 6))
    damages = itertools.accumulate(steps, initial=0)
    count = len(steps)
    return [Option(width * (1 + count - i), float(width * d)) for i, d in enumerate(damages)]

def layers(choices):
    return st.tuples(choices, choices, choices).map(lambda drawn: dict(zip(NAMES, drawn, strict=True)))

budgets = st.integers(0, 60)

# --- against brute force ---

@pytest.mark.parametrize("choices", [convex_choices(), any_choices], ids=["convex", "any"])
def test_the_damage_is_within_one_step_of_the_best_and_the_budget_is_kept(choices):
    @settings(max_examples=100, deadline=None)
    @given(layers(choices), budgets)
    def check(options, above):
        budget = smallest(options) + above
        chosen = allocate(options, budget)
        assert list(chosen) == list(options)
        assert all(chosen[name] in options[name] for name in options)
        assert total(chosen) <= budget
        best = best_of(options, budget)
        assert best <= lost_by(chosen) <= best + largest_step(options)
    check()

@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=3, max_size=3), budgets)
def test_steps_of_one_cost_and_falling_gain_are_chosen_best(gains, above):
    options = {}
    for name, steps in zip(NAMES, gains, strict=True):
        damages = list(itertools.accumulate(sorted(steps), initial=0))
        options[name] = [Option(4 * (len(damages) - i), float(d)) for i, d in enumerate(damages)]
    budget = smallest(options) + above
    assert lost_by(allocate(options, budget)) == best_of(options, budget)

def test_a_budget_of_the_smallest_options_takes_them_and_of_everything_the_best():
    options = {"a": [Option(9, 0.0), Option(2, 3.0), Option(5, 1.0)], "b": [Option(7, 0.0), Option(3, 1e-9)]}
    assert smallest(options) == 5
    assert allocate(options, 5) == {"a": options["a"][1], "b": options["b"][1]}
    assert allocate(options, 16) == {"a": options["a"][0], "b": options["b"][0]}
    with pytest.raises(AssertionError):
        allocate(options, 4)

def test_a_matrix_without_a_choice_keeps_what_it_has():
    options = {"a": [Option(9, 2.0)], "b": [Option(8, 0.0), Option(4, 1.0), Option(1, 5.0)]}
    assert allocate(options, 14) == {"a": options["a"][0], "b": options["b"][1]}

@pytest.mark.parametrize("unit", [1e-20, 1e-6, 1.0, 1e20])
def test_the_unit_of_the_damages_does_not_matter(unit):
    rng = np.random.default_rng(0)
    options, scaled = {}, {}
    for name in "abcdefgh":
        damages = np.sort(rng.exponential(size=8))
        costs = range(80, 0, -10)
        options[name] = [Option(cost, damage) for cost, damage in zip(costs, damages, strict=True)]
        scaled[name] = [Option(cost, damage * unit) for cost, damage in zip(costs, damages, strict=True)]
    for budget in (90, 200, 437, 600):
        found = priced(Table(options), budget)
        assert np.array_equal(priced(Table(scaled), budget), found)

# --- the price ---

@settings(max_examples=100, deadline=None)
@given(layers(any_choices), budgets)
def test_the_price_is_the_lowest_at_which_the_options_fit(options, above):
    budget = smallest(options) + above
    table = Table(options)
    found = table.costs(priced(table, budget))
    assert found <= budget
    # prices at which a matrix is indifferent; nothing changes between two of them
    every = [(one, other) for choices in options.values() for one in choices for other in choices]
    slopes = {(one.damage - other.damage) / (other.cost - one.cost) for one, other in every
              if other.cost > one.cost and one.damage > other.damage}
    prices = sorted(slopes | {0.0})
    between = [(a + b) / 2 for a, b in itertools.pairwise(prices)] + [prices[-1] + 1]
    dearest = [table.costs(table.at(price)) for price in between]
    assert all(one >= other for one, other in itertools.pairwise(dearest))
    fitting = [cost for cost in dearest if cost <= budget]
    # at a price of indifference itself, or at none, more may fit
    assert found >= max(fitting)

def test_at_a_price_each_matrix_takes_the_least_damage_and_cost_together():
    options = {"a": [Option(10, 0.0), Option(6, 3.0), Option(1, 9.0)], "b": [Option(8, 1.0), Option(2, 2.0)]}
    table = Table(options)
    # 4 values for 3, then 5 for 6; 6 for 1
    assert [table.at(price).tolist() for price in (0.0, 0.2, 0.8, 1.3)] == [[0, 0], [0, 1], [1, 1], [2, 1]]
    # padding is never taken, whatever the price
    assert table.at(1e30).tolist() == [2, 1]
    assert table.costs(np.array([1, 1])) == 8
    assert table.named(np.array([1, 0])) == {"a": options["a"][1], "b": options["b"][0]}

# --- what is left over ---

@settings(max_examples=100, deadline=None)
@given(layers(any_choices), budgets)
def test_spending_ends_where_nothing_that_improves_fits(options, above):
    table = Table(options)
    start = table.cost.argmin(1)
    budget = smallest(options) + above
    ended = spend(table, start, budget)
    chosen = table.named(ended)
    assert total(chosen) <= budget
    left = budget - total(chosen)
    for name, choices in options.items():
        now = chosen[name]
        assert not any(now.cost < other.cost <= now.cost + left and other.damage < now.damage
                       for other in choices)
        before = table.named(start)[name]
        assert now == before or now.cost > before.cost and now.damage < before.damage

def test_what_improves_most_a_value_is_bought_first():
    options = {"a": [Option(1, 10.0), Option(4, 1.0)], "b": [Option(1, 10.0), Option(2, 6.0), Option(5, 0.0)]}
    table = Table(options)
    start = np.zeros(2, dtype=int)
    # 4 a value for b, then 3 for a, then 2 for b again
    assert [spend(table, start, budget).tolist() for budget in (2, 3, 5, 6, 9)] == [
        [0, 0], [0, 1], [0, 1], [1, 1], [1, 2]]
    # the start is left as it was
    assert start.tolist() == [0, 0]

# --- the same share of every matrix ---

def next_larger(choices, option: Option) -> int | None:
    return min((other.cost for other in choices if other.cost > option.cost), default=None)

@settings(max_examples=150, deadline=None)
@given(layers(any_choices), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_a_uniform_share_is_exceeded_by_the_remainder_only(options, share):
    sizes = {name: max(option.cost for option in choices) for name, choices in options.items()}
    whole = share * sum(sizes.values())
    if smallest(options) > whole:
        return
    chosen = uniform(options, sizes, share)
    assert total(chosen) <= whole
    for name, choices in options.items():
        own = max((option.cost for option in choices if option.cost <= share * sizes[name]),
                  default=min(option.cost for option in choices))
        # its share, or one step more
        assert chosen[name].cost <= (next_larger(choices, Option(own, 0.0)) or own)
        # of equal costs the least damage
        assert chosen[name].damage == min(o.damage for o in choices if o.cost == chosen[name].cost)

def test_the_remainder_goes_to_the_matrices_in_their_order_by_one_step_each():
    choices = [Option(cost, 10.0 - cost) for cost in (2, 4, 6, 8, 10)]
    options = dict.fromkeys(NAMES, choices)
    sizes = dict.fromkeys(NAMES, 10)
    def costs(share):
        return [option.cost for option in uniform(options, sizes, share).values()]
    # 5 each: 4, and 3 left
    assert costs(0.5) == [6, 4, 4]
    # 5.4 each: 4.2 left
    assert costs(0.54) == [6, 6, 4]
    assert costs(0.4) == [4, 4, 4]
    assert costs(1.0) == [10, 10, 10]

def test_a_share_that_floating_point_makes_a_little_smaller_pays_for_what_was_meant():
    choices = [Option(29, 1.0), Option(28, 2.0), Option(3, 3.0)]
    # 0.29 · 100 is 28.999…
    assert uniform({"a": choices}, {"a": 100}, 0.29) == {"a": choices[0]}

def test_what_a_matrix_needs_above_its_share_the_largest_shares_of_the_others_pay():
    every, even = ([Option(cost, 10.0 - cost) for cost in range(step, 11, step)] for step in (1, 2))
    options = {"a": [Option(10, 0.0), Option(8, 1.0)], "b": every, "c": even}
    chosen = uniform(options, dict.fromkeys(NAMES, 10), 0.5)
    # 8, 5 and 4 are two too many
    assert {name: option.cost for name, option in chosen.items()} == {"a": 8, "b": 3, "c": 4}
