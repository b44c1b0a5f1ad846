"""One budget for a whole model: which form each matrix takes, so that together they cost at most so many
values and lose as little as possible.

    min Σ_l damage_l(o_l)   over the options o_l of each matrix,   Σ_l cost_l(o_l) ≤ K

A multiplier λ prices a value: each matrix takes the option with the least damage + λ·cost, and bisection
finds the λ at which they fit (Everett 1963; Shoham and Gersho 1988). What is left over buys the best
improvement that still fits, again and again. Damages are raw, in one unit: relative ones, ‖E‖ / ‖W‖, are no
better than a uniform share."""
from typing import NamedTuple

import numpy as np

# the lowest price that is tried, nats a value: nothing that a matrix loses is so little
LOWEST = 1e-30
# and the highest: a budget that it does not reach is below what the smallest options cost
HIGHEST = 1e60
# a search for the price widens its bracket by this factor
WIDER = 1e3
# of the exponent between the two, which end at the last bit of a float64
HALVINGS = 200

class Option(NamedTuple):
    """A form that a matrix may take: its values, what it loses, and what it is."""

    cost: int
    damage: float
    kind: str = "dense"
    rank: int = 0
    channels: int = 0

# by the matrix's name: what it may become, and what it becomes
Options = dict[str, list[Option]]
Chosen = dict[str, Option]

def total(chosen: Chosen) -> int:
    return sum(option.cost for option in chosen.values())

def smallest(options: Options) -> int:
    """Values that the model has at the least."""
    least = 0
    for choices in options.values():
        least += min(option.cost for option in choices)
    return least

# --- least damage for a budget ---

class Table:
    """The options of all matrices as two arrays (matrices, options), so that a look at a price is one line.
    Rows with fewer options than the longest end in padding, of infinite cost and damage."""

    def __init__(self, options: Options):
        self.options = options
        self.rows = np.arange(len(options))
        most = max(map(len, options.values()))
        shape = len(options), most
        self.cost = np.full(shape, np.inf)
        self.damage = np.full(shape, np.inf)
        for row, choices in enumerate(options.values()):
            known = slice(len(choices))
            self.cost[row, known] = [option.cost for option in choices]
            self.damage[row, known] = [option.damage for option in choices]
        # 0 · ∞ is no number: padding costs nothing here, and its damage alone keeps it from being taken
        self.payable = np.where(np.isinf(self.cost), 0, self.cost)

    def at(self, price: float) -> np.ndarray:
        """The number of the option that each matrix takes at λ = price, (matrices,)."""
        paid = self.damage + price * self.payable
        # the first of equal ones
        return paid.argmin(1)

    def costs(self, chosen: np.ndarray) -> float:
        """Values of the model whose matrices take the options `chosen` (matrices,)."""
        costs = self.cost[self.rows, chosen]
        return costs.sum()

    def named(self, chosen: np.ndarray) -> Chosen:
        """The options themselves, by the matrices' names."""
        found = {}
        for (name, choices), number in zip(self.options.items(), chosen, strict=True):
            found[name] = choices[number]
        return found

def priced(table: Table, budget: float) -> np.ndarray:
    """The options at the lowest price at which they fit, (matrices,)."""
    free = table.at(0.0)
    if table.costs(free) <= budget:
        return free
    low = LOWEST
    high = 1.0
    while table.costs(table.at(high)) > budget:
        high *= WIDER
        # near the smallest options a price can be beyond what a float64 tells from their damages
        if high > HIGHEST:
            break
    for _ in range(HALVINGS):
        # prices run over many powers of ten: the middle of their exponents
        middle = (low * high) ** 0.5
        if table.costs(table.at(middle)) > budget:
            low = middle
        else:
            high = middle
    # the end of the bracket that was seen to fit
    return table.at(high)

def spend(table: Table, chosen: np.ndarray, budget: float) -> np.ndarray:
    """Buy what improves most a value, as long as something fits: a price alone leaves a rest, since options
    come in steps."""
    chosen = chosen.copy()
    while True:
        # of every option against the one that its matrix has
        now = table.rows, chosen
        more = table.cost - table.cost[now][:, None]
        gain = table.damage[now][:, None] - table.damage
        left = budget - table.costs(chosen)
        fits = (more > 0) & (more <= left) & (gain > 0)
        if not fits.any():
            return chosen
        # only where it fits is `more` a divisor
        cost = np.where(fits, more, 1)
        worth = np.where(fits, gain / cost, -1)
        best = worth.argmax()
        row, number = np.unravel_index(best, worth.shape)
        chosen[row] = number

def allocate(options: Options, budget: float) -> Chosen:
    """The option of each matrix, by its name, for at most `budget` values, which are not fewer than the
    `smallest` options cost."""
    least = smallest(options)
    assert budget >= least, (budget, least)
    table = Table(options)
    chosen = priced(table, budget)
    return table.named(spend(table, chosen, budget))

# --- the same share for all ---

def by_cost(choices: list[Option]) -> list[Option]:
    """The options in order of their cost; of equal costs the one that loses least."""
    best = {}
    for option in sorted(choices, reverse=True):
        # the last one of a cost has the least damage
        best[option.cost] = option
    return sorted(best.values())

def give_way(ordered: Options, chosen: Chosen, sizes: dict[str, int]) -> int:
    """Take the next smaller option of the matrix with the largest share; the values that this frees."""
    able = [name for name, choices in ordered.items() if chosen[name] != choices[0]]
    name = max(able, key=lambda name: chosen[name].cost / sizes[name])
    choices = ordered[name]
    before = chosen[name]
    chosen[name] = choices[choices.index(before) - 1]
    return before.cost - chosen[name].cost

def uniform(options: Options, sizes: dict[str, int], share: float) -> Chosen:
    """The same share of every matrix: the largest option that it pays for; what rounding leaves over goes to
    the matrices in their order, as long as their next larger option fits. Where the smallest option of a
    matrix is above its share, the others pay for it. The `smallest` options cost at most the whole share.
    sizes: of the dense matrices."""
    ordered = {name: by_cost(choices) for name, choices in options.items()}
    chosen = {}
    for name, choices in ordered.items():
        most = share * sizes[name]
        fitting = [option for option in choices if option.cost <= most]
        chosen[name] = fitting[-1] if fitting else choices[0]
    # a share of 0.8 that is 0.7999… in floating point is meant as 0.8
    left = share * sum(sizes.values()) + 1e-6 - total(chosen)
    while left < 0:
        left += give_way(ordered, chosen, sizes)
    for name, choices in ordered.items():
        now = chosen[name].cost
        larger = [option for option in choices if option.cost > now]
        if not larger:
            continue
        more = larger[0].cost - now
        if more <= left:
            left -= more
            chosen[name] = larger[0]
    return chosen
