"""One budget for a whole model: which form each matrix takes, so that together they cost at most so many
values and lose as little as possible.

    min Σ_l damage_l(o_l)   over the options o_l of each matrix,   Σ_l cost_l(o_l) ≤ K

A multiplier λ prices a value: each matrix takes the option with the least damage + λ·cost, and bisection
finds the λ at which they fit (Everett 1963; Shoham and Gersho 1988). What is left over buys the best
improvement that still fits, again and again. Damages are raw, in one unit: relative ones, ‖E‖ / ‖W‖, are no
better than a uniform share."""
from typing import NamedTuple

import numpy as np

class Option(NamedTuple):
    """A form that a matrix may take: its values, what it loses, and what it is."""

    cost: int
    damage: float
    kind: str = "dense"
    rank: int = 0
    channels: int = 0

def total(chosen: dict[str, Option]) -> int:
    return sum(option.cost for option in chosen.values())

def smallest(options: dict[str, list[Option]]) -> int:
    """Values that the model has at the least."""
    return sum(min(option.cost for option in choices) for choices in options.values())

class Table:
    """The options of all matrices as arrays (matrices, options), padded, for a look at a price."""

    def __init__(self, options: dict[str, list[Option]]):
        self.options = options
        most = max(map(len, options.values()))
        self.cost = np.full((len(options), most), np.inf)
        self.damage = np.full((len(options), most), np.inf)
        for row, choices in enumerate(options.values()):
            self.cost[row, :len(choices)] = [option.cost for option in choices]
            self.damage[row, :len(choices)] = [option.damage for option in choices]

    def at(self, price: float) -> np.ndarray:
        """The number of the option that each matrix takes."""
        # nothing is added to a damage of infinity: padding is never taken
        return (self.damage + price * np.where(np.isinf(self.cost), 0, self.cost)).argmin(1)

    def costs(self, chosen: np.ndarray) -> float:
        return self.cost[np.arange(len(chosen)), chosen].sum()

    def named(self, chosen: np.ndarray) -> dict[str, Option]:
        pairs = zip(self.options.items(), chosen, strict=True)
        return {name: choices[number] for (name, choices), number in pairs}

def priced(table: Table, budget: float) -> np.ndarray:
    """The options at the lowest price at which they fit."""
    chosen = table.at(0.0)
    if table.costs(chosen) <= budget:
        return chosen
    low, high = 1e-30, 1.0
    while table.costs(table.at(high)) > budget:
        high *= 1e3
        # the smallest options may cost more than a price can say
        if high > 1e60:
            break
    # 200 halvings of the exponent: to the last bit
    for _ in range(200):
        middle = (low * high) ** 0.5
        if table.costs(table.at(middle)) > budget:
            low = middle
        else:
            high = middle
    return table.at(high)

def spend(table: Table, chosen: np.ndarray, budget: float) -> np.ndarray:
    """Buy what improves most a value, as long as something fits."""
    chosen = chosen.copy()
    rows = np.arange(len(chosen))
    while True:
        more = table.cost - table.cost[rows, chosen][:, None]
        gain = table.damage[rows, chosen][:, None] - table.damage
        left = budget - table.costs(chosen)
        fits = (more > 0) & (more <= left) & (gain > 0)
        if not fits.any():
            return chosen
        worth = np.where(fits, gain / np.where(fits, more, 1), -1)
        row, number = np.unravel_index(worth.argmax(), worth.shape)
        chosen[row] = number

def allocate(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """The option of each matrix, by its name, for at most `budget` values, which are not fewer than the
    `smallest` options cost."""
    least = smallest(options)
    assert budget >= least, (budget, least)
    table = Table(options)
    return table.named(spend(table, priced(table, budget), budget))

def uniform(options: dict[str, list[Option]], sizes: dict[str, int], share: float) -> dict[str, Option]:
    """The same share of every matrix: the largest option that it pays for; what rounding leaves over goes to
    the matrices in their order, as long as their next larger option fits. Where the smallest option of a
    matrix is above its share, the others pay for it. The `smallest` options cost at most the whole share."""
    # of equal costs what loses least
    ordered = {name: sorted({option.cost: option for option in sorted(choices, reverse=True)}.values())
               for name, choices in options.items()}
    chosen = {}
    for name, choices in ordered.items():
        fitting = [option for option in choices if option.cost <= share * sizes[name]]
        chosen[name] = fitting[-1] if fitting else choices[0]
    # a share of 0.8 that is 0.7999… in floating point is meant as 0.8
    left = share * sum(sizes.values()) + 1e-6 - total(chosen)
    while left < 0:
        # the one with the largest share gives way
        able = [name for name, choices in ordered.items() if chosen[name] != choices[0]]
        name = max(able, key=lambda name: chosen[name].cost / sizes[name])
        smaller = ordered[name][ordered[name].index(chosen[name]) - 1]
        left += chosen[name].cost - smaller.cost
        chosen[name] = smaller
    for name, choices in ordered.items():
        larger = [option for option in choices if option.cost > chosen[name].cost]
        if larger and larger[0].cost - chosen[name].cost <= left:
            left -= larger[0].cost - chosen[name].cost
            chosen[name] = larger[0]
    return chosen
