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
from nanolost.pruning import Patterns
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

# by the layer's name: what each rank loses (ranks,), values of a direction, and ranks, None for dense
Curves = dict[str, Tensor]
Sizes = dict[str, int]
Ranks = dict[str, int | None]

# --- what a value buys ---

def entry_worths(D: Tensor, metric: Metric) -> Tensor:
    """What single entries that stay are worth, of some rows of D (out, in): nats a value, float64."""
    C = metric.L @ metric.L.T
    # G's diagonal: what a row weighs by itself
    weights = metric.K.square().sum(1)
    rows = torch.linspace(0, len(D) - 1, SAMPLED).long()
    found = []
    for row in rows.tolist():
        support = D[row].nonzero()[:, 0]
        # a row of zeros has no entry to sell
        if not len(support):
            continue
        root = torch.linalg.cholesky(C[support][:, support])
        inverse = torch.cholesky_inverse(root)
        values = in_float64(D[row, support])
        # the formula on top
        worth = weights[row] * values.square() / inverse.diagonal() / 2
        found.append(worth)
    if not found:
        return D.new_empty(0, dtype=torch.float64)
    return torch.cat(found)

def price_of(worths: list[Tensor]) -> float:
    """Nats that the last value of a model buys; the rows were sampled alike in all matrices."""
    every = torch.cat([part.cpu() for part in worths])
    # nothing can be sold: nothing is bought
    if not len(every):
        return torch.inf
    count = max(1, int(MARGIN * len(every)))
    least = every.sort().values[:count]
    return least.mean().item()

def rank_at(curve: Tensor, size: int, price: float) -> int:
    """The rank up to which each direction is worth more than its `size` values. curve: of `lowrank`."""
    # σ² / 2 of each direction, falling
    gains = curve[:-1] - curve[1:]
    paying = gains > price * size
    return int(paying.sum())

# --- which directions ---

def ranks_at_price(curves: Curves, sizes: Sizes, price: float) -> Ranks:
    """Under one threshold the entries make room: ranks for what a value buys at the margin."""
    ranks = {}
    for name, curve in curves.items():
        ranks[name] = rank_at(curve, sizes[name], price)
    return ranks

def rank_options(curve: Tensor, size: int, kept: int = 0) -> list[Option]:
    """Every rank of a matrix, beside so many entries that stay."""
    found = []
    for rank, damage in enumerate(curve.tolist()):
        cost = kept + rank * size
        found.append(Option(cost, damage, "sparse", rank))
    return found

def ranks_in_budget(
    curves: Curves,
    sizes: Sizes,
    zeros: dict[str, tuple[int, int]],
    budget: float,
) -> Ranks:
    """Under a pattern the entries are as many as they are: ranks for what the budget has beyond them, and
    None for a matrix that stays dense. zeros: entries of each matrix, and those that stay."""
    options = {}
    for name, curve in curves.items():
        values, kept = zeros[name]
        # from the values of the dense matrix on, dense loses nothing
        dense = Option(values, 0.0)
        ranks = rank_options(curve, sizes[name], kept)
        options[name] = [dense, *(option for option in ranks if option.cost < values)]
    found = {}
    for name, option in allocate(options, budget).items():
        found[name] = None if option.kind == "dense" else option.rank
    return found

def ranks_of_share(curves: Curves, sizes: Sizes, budget: float) -> Ranks:
    """The directions of all matrices that are worth most a value, for so many values."""
    options = {}
    for name, curve in curves.items():
        # the entries play no part, and the full rank is offered too
        options[name] = rank_options(curve, sizes[name])
    chosen = allocate(options, budget)
    return {name: option.rank for name, option in chosen.items()}

def directions(E: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The directions of a residual that are worth most: A (rank, in), B (out, rank), balanced, float64."""
    if not rank:
        return E.new_empty(0, E.shape[1]), E.new_empty(len(E), 0)
    A, B = lowrank.factors(E, metric, rank)
    return lowrank.balanced(A, B)

# --- the whole ---

class Composite:
    """The matrices of a model as D + B A, each D begun by `splitting`. weights: W (out, in) by the layer's
    name; metric(name): of what is chosen; patterns: (n, m) by name where entries stand in groups."""

    def __init__(
        self,
        layers: list[Scaled],
        weights: dict[str, Tensor],
        metric: Callable[[str], Metric],
        patterns: Patterns | None,
        device: torch.device,
    ):
        # those that do not stay dense
        self.layers = layers
        self.weights = weights
        self.metric = metric
        self.patterns = patterns
        self.device = device
        # A, B of the layers that have directions
        self.low = {}
        # layers and directions of the least damage so far
        self.best = None
        # a direction of B A: a row of A and a column of B
        self.sizes = {name: sum(W.shape) for name, W in weights.items()}

    def weight(self, layer: Scaled) -> Tensor:
        """W (out, in), float64."""
        return in_float64(self.weights[layer.name])

    def entries(self, layer: Scaled) -> Tensor:
        """D (out, in), in the weight's units."""
        D = splitting.result(layer)
        return D.to(self.device)

    def residual(self, layer: Scaled) -> Tensor:
        """W − D (out, in), float64."""
        return self.weight(layer) - in_float64(self.entries(layer))

    def damage(self) -> float:
        """Nats that the model is predicted to lose."""
        lost = 0.0
        for layer in self.layers:
            E = self.residual(layer)
            if layer.name in self.low:
                A, B = self.low[layer.name]
                E = E - B @ A
            metric = self.metric(layer.name)
            lost += metric.damage(E)
        return lost

    def look(self) -> tuple[Curves, float, dict[str, tuple[int, int]]]:
        """Curves of the residuals W − D, the price of a value, and of each D the entries and those that
        stay."""
        curves = {}
        worths = []
        zeros = {}
        for layer in tqdm(self.layers, "directions", disable=None):
            metric = self.metric(layer.name)
            D = self.entries(layer)
            curves[layer.name] = lowrank.curve(self.residual(layer), metric)
            worths.append(entry_worths(D, metric))
            zeros[layer.name] = D.numel(), int(D.count_nonzero())
        return curves, price_of(worths), zeros

    def choose(self, budget: float, share: float | None) -> Ranks:
        """Ranks. share: of the budget, for directions of the W themselves, as if there were no entries; None:
        those of the residuals that pay."""
        if share is not None:
            curves = {}
            for name, W in self.weights.items():
                metric = self.metric(name)
                curves[name] = lowrank.curve(W, metric)
            return ranks_of_share(curves, self.sizes, share * budget)
        curves, price, zeros = self.look()
        if self.patterns:
            return ranks_in_budget(curves, self.sizes, zeros, budget)
        return ranks_at_price(curves, self.sizes, price)

    def take_out(self, layer: Scaled, E: Tensor, rank: int):
        """Take the best directions of E out of W, for the entries of what is left."""
        left = self.weight(layer)
        self.low.pop(layer.name, None)
        if rank:
            A, B = directions(E, self.metric(layer.name), rank)
            self.low[layer.name] = A, B
            left = left - B @ A
        # splitting goes on from the entries as they stand
        layer.begin(left, self.entries(layer), self.device)

    def alternate(self, ranks: Ranks, budget: float, whole: bool):
        """Directions and entries in turn. whole: the first directions are of W, not of W − D."""
        self.layers = [layer for layer in self.layers if ranks[layer.name] is not None]
        cost = 0
        for name, rank in ranks.items():
            # None for what stays dense, under a pattern alone, where `keep` plays no part
            cost += self.sizes[name] * (rank or 0)
        # what the directions leave; under patterns the entries are as many as they are
        keep = int(budget) - cost
        for number in range(ROUNDS):
            first = whole and number == 0
            for layer in self.layers:
                E = self.weight(layer) if first else self.residual(layer)
                self.take_out(layer, E, ranks[layer.name])
            splitting.split(self.layers, keep, self.patterns, self.device)

    def keep(self) -> tuple[list[Scaled], dict[str, tuple[Tensor, Tensor]]]:
        """Put D of every layer aside, with the directions beside it."""
        for layer in self.layers:
            layer.keep("best", splitting.result(layer))
        return self.layers, dict(self.low)

    def compose(self, budget: float):
        """Try what the residuals ask for, then shares for directions first; the least damage stays. Where no
        direction pays, that is D as it was."""
        self.best = self.keep()
        if self.patterns:
            # the pattern leaves a rest of the budget, and what that buys takes the place of D as it was
            least = torch.inf
            tried = (None,)
        else:
            least = self.damage()
            tried = (None, *SHARES)
        for share in tried:
            ranks = self.choose(budget, share)
            # every matrix as it is: neither directions nor dense
            if all(rank == 0 for rank in ranks.values()):
                continue
            self.alternate(ranks, budget, whole=share is not None)
            lost = self.damage()
            if lost < least:
                self.best = self.keep()
                least = lost

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """A, B and D of every layer that does not stay dense."""
        layers, low = self.best
        found = {}
        for layer in layers:
            D = layer.kept("best")
            none = D.new_empty(0, D.shape[1]), D.new_empty(len(D), 0)
            A, B = low.get(layer.name, none)
            found[layer.name] = A, B, D
        return found
