"""Singular directions beside zeros: both buy from one budget, in one currency.

A matrix becomes D + B A. An entry of D costs one value, a direction of B A costs m + n, and what each is
worth is told in nats a token by the metric of `fisher` (see `lowrank`):

    a direction    σ² / 2                        of the residual W − D, seen in the metric
    an entry       G̃_ii D_ij² / (2 [C̃_SS⁻¹]_jj)  S: the entries that stay in its row, which make up for it

A direction enters where it is worth more than the m + n entries that would have to go for it. CAP (arXiv
2505.03801) lets the two compete as well, by values that no input weighs. The answer may be: none."""
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from lost import in_float64
from nanolost import lowrank, splitting
from nanolost.allocate import Option, allocate
from nanolost.lowrank import Metric
from nanolost.splitting import Scaled

# the price is what the least valuable of so many entries are worth on average
MARGIN = 0.01
# rows of each matrix in which entries are valued: an inverse of the size of a row's support for each
SAMPLED = 4
# directions and entries in turn
ROUNDS = 2
# of the budget, that directions get first. Entries that stand in for a direction hide it in the residual, and
# a direction that came first hides what entries would do: so both orders are tried
SHARES = (0.02,)

# --- what a value buys ---

def entry_worths(D: Tensor, metric: Metric) -> Tensor:
    """What single entries that stay are worth, of some rows of D (out, in): nats a value."""
    C = metric.L @ metric.L.T
    # G's diagonal: what a row weighs by itself
    rows = metric.K.square().sum(1)
    found = []
    for row in torch.linspace(0, len(D) - 1, SAMPLED).long().tolist():
        support = D[row].nonzero()[:, 0]
        if len(support):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(C[support][:, support]))
            values = in_float64(D[row, support])
            found.append(rows[row] * values.square() / inverse.diagonal() / 2)
    return torch.cat(found) if found else D.new_empty(0, dtype=torch.float64)

def price_of(worths: list[Tensor]) -> float:
    """Nats that the last value of a model buys; the rows were sampled alike in all matrices."""
    every = torch.cat([part.cpu() for part in worths])
    if not len(every):
        return torch.inf
    count = max(1, int(MARGIN * len(every)))
    return every.sort().values[:count].mean().item()

def rank_at(curve: Tensor, size: int, price: float) -> int:
    """The rank up to which each direction is worth more than its `size` values. curve: of `lowrank`."""
    gains = curve[:-1] - curve[1:]
    return int((gains > price * size).sum())

# --- which directions ---

def ranks_at_price(curves: dict[str, Tensor], sizes: dict[str, int], price: float) -> dict[str, int]:
    """Under one threshold the entries make room: ranks for what a value buys at the margin."""
    return {name: rank_at(curve, sizes[name], price) for name, curve in curves.items()}

def ranks_in_budget(
    curves: dict[str, Tensor],
    sizes: dict[str, int],
    zeros: dict[str, tuple[int, int]],
    budget: float,
) -> dict[str, int | None]:
    """Under a pattern the entries are as many as they are: ranks for what the budget has beyond them, and
    None for a matrix that stays dense. zeros: entries of each matrix, and those that stay."""
    options = {}
    for name, curve in curves.items():
        values, kept = zeros[name]
        options[name] = [Option(values, 0.0)]
        for rank, damage in enumerate(curve.tolist()):
            cost = kept + rank * sizes[name]
            if cost < values:
                options[name].append(Option(cost, damage, "sparse", rank))
    chosen = allocate(options, budget)
    return {name: option.rank if option.kind == "sparse" else None for name, option in chosen.items()}

def ranks_of_share(curves: dict[str, Tensor], sizes: dict[str, int], budget: float) -> dict[str, int]:
    """The directions of all matrices that are worth most a value, for so many values."""
    options = {}
    for name, curve in curves.items():
        options[name] = [Option(rank * sizes[name], damage, "sparse", rank)
                         for rank, damage in enumerate(curve.tolist())]
    return {name: option.rank for name, option in allocate(options, budget).items()}

def directions(E: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The directions of a residual that are worth most: A (rank, in), B (out, rank), balanced, float64."""
    if not rank:
        return E.new_empty(0, E.shape[1]), E.new_empty(len(E), 0)
    return lowrank.balanced(*lowrank.factors(E, metric, rank))

# --- the whole ---

class Composite:
    """The matrices of a model as D + B A, each D begun by `splitting`. weights: W (out, in) by the layer's
    name; metric(name): of what is chosen; patterns: (n, m) by name where entries stand in groups."""

    def __init__(
        self,
        layers: list[Scaled],
        weights: dict[str, Tensor],
        metric: Callable[[str], Metric],
        patterns: dict[str, tuple[int, int]] | None,
        device,
    ):
        self.layers = layers
        self.weights = weights
        self.metric = metric
        self.patterns = patterns
        self.device = device
        # A, B of the layers that have directions
        self.low = {}
        self.best = None
        self.sizes = {name: sum(W.shape) for name, W in weights.items()}

    def residual(self, layer: Scaled) -> Tensor:
        """W − D (out, in), float64."""
        return in_float64(self.weights[layer.name]) - in_float64(splitting.result(layer).to(self.device))

    def damage(self) -> float:
        """Nats that the model is predicted to lose."""
        lost = 0.0
        for layer in self.layers:
            E = self.residual(layer)
            if layer.name in self.low:
                A, B = self.low[layer.name]
                E = E - B @ A
            lost += self.metric(layer.name).damage(E)
        return lost

    def look(self) -> tuple[dict[str, Tensor], float, dict[str, tuple[int, int]]]:
        """Curves of the residuals W − D, the price of a value, and the entries of each D."""
        curves, worths, zeros = {}, [], {}
        for layer in tqdm(self.layers, "directions", disable=None):
            metric = self.metric(layer.name)
            E = self.residual(layer)
            D = splitting.result(layer).to(self.device)
            curves[layer.name] = lowrank.curve(E, metric)
            worths.append(entry_worths(D, metric))
            zeros[layer.name] = D.numel(), int(D.count_nonzero())
        return curves, price_of(worths), zeros

    def choose(self, budget: float, share: float | None) -> dict[str, int | None]:
        """Ranks. share: of the budget, for directions of the W themselves, as if there were no entries; None:
        those of the residuals that pay."""
        if share is not None:
            curves = {}
            for name, W in self.weights.items():
                curves[name] = lowrank.curve(in_float64(W), self.metric(name))
            return ranks_of_share(curves, self.sizes, share * budget)
        curves, price, zeros = self.look()
        if self.patterns:
            return ranks_in_budget(curves, self.sizes, zeros, budget)
        return ranks_at_price(curves, self.sizes, price)

    def take_out(self, layer: Scaled, E: Tensor, rank: int):
        """Take the best directions of E out of W, for the entries of what is left."""
        left = in_float64(self.weights[layer.name])
        D = splitting.result(layer).to(self.device)
        self.low.pop(layer.name, None)
        if rank:
            A, B = directions(E, self.metric(layer.name), rank)
            self.low[layer.name] = A, B
            left = left - B @ A
        layer.begin(left, D, self.device)

    def alternate(self, ranks: dict[str, int | None], budget: float, whole: bool):
        """Directions and entries in turn. whole: the first directions are of W, not of W − D."""
        self.layers = [layer for layer in self.layers if ranks[layer.name] is not None]
        cost = sum(self.sizes[name] * (rank or 0) for name, rank in ranks.items())
        for number in range(ROUNDS):
            for layer in self.layers:
                first = whole and number == 0
                E = in_float64(self.weights[layer.name]) if first else self.residual(layer)
                self.take_out(layer, E, ranks[layer.name])
            splitting.split(self.layers, int(budget) - cost, self.patterns, self.device)

    def keep(self):
        """Put D of every layer aside, with the directions beside it."""
        for layer in self.layers:
            layer.shelf[f"best.{layer.name}"] = splitting.result(layer)
        return self.layers, dict(self.low)

    def compose(self, budget: float):
        """Try what the residuals ask for, then shares for directions first; the least damage stays. Where no
        direction pays, that is D as it was."""
        self.best = self.keep()
        least = self.damage() if not self.patterns else torch.inf
        for share in (None, *(() if self.patterns else SHARES)):
            ranks = self.choose(budget, share)
            if not any(ranks.values()) and None not in ranks.values():
                continue
            self.alternate(ranks, budget, share is not None)
            lost = self.damage()
            if lost < least:
                self.best, least = self.keep(), lost

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """A, B and D of every layer that does not stay dense."""
        layers, low = self.best
        found = {}
        for layer in layers:
            D = layer.shelf[f"best.{layer.name}"]
            none = D.new_empty(0, D.shape[1]), D.new_empty(len(D), 0)
            found[layer.name] = *low.get(layer.name, none), D
        return found
