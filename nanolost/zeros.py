"""Zeros in a set of matrices, those of a model or of a block, by each of the methods of `pruning.py`: what
`compress.py` does once and LoSA at every stage."""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nanolost import pruning, splitting
from nanolost.compression import ROUNDING
from nanolost.covariance import Statistics
from nanolost.losa import kept_counts
from nanolost.lowrank import shrunk
from nanolost.pruning import NEVER, Pattern, Patterns, Roots, Walker
from nanolost.shelf import Shelf
from nanolost.splitting import Scaled

# what is added to C and G of their own diagonals before they are split: more tokens need less. At half of the
# values it is a matter of 0.02 nats, whichever
OWN_FEW = (0.05, 0.30)
OWN_MANY = (0.03, 0.10)
MANY = 32_768

# weights (out, in) with zeros, by the layer's name
Weights = dict[str, Tensor]

@dataclass
class Matrices:
    """What zeros are chosen in, and what is known of it."""

    weights: Weights
    # None for the methods that look at no text
    statistics: Statistics | None
    # for what is too much for the memory
    folder: str
    device: torch.device
    # whether what is zero stays zero, whatever would make up for others
    nested: bool = False

    def gone(self, name: str) -> Tensor | None:
        """Entries (out, in) of a matrix that stay zero; None: not one has to."""
        return self.weights[name] == 0 if self.nested else None

    def roots(self, method: str) -> Roots:
        """R of every layer, damped as the method was published."""
        shrink = shrunk
        if method == "sparsegpt":
            shrink = pruning.damped
        return Roots(self.statistics, Shelf(self.folder), shrink)

def own_shares(statistics: Statistics) -> tuple[float, float]:
    """What is added to C and to G of their own diagonals, after as many tokens as there were."""
    # the fewer of the two: those with inputs, and those with gradients
    fewest = min(statistics.tokens)
    return OWN_MANY if fewest >= MANY else OWN_FEW

def competing(names: Iterable, uniform: bool | None) -> list[list]:
    """Those whose entries are under one threshold: all of them, or each for itself."""
    if uniform:
        return [[name] for name in names]
    return [list(names)]

# --- matrices one by one ---

def alone(
    matrices: Matrices,
    method: str,
    name: str,
    share: float,
    pattern: Pattern | None,
    roots: Roots,
) -> Tensor:
    """One matrix (out, in) with zeros by a method that looks at it alone: `magnitude`, `wanda` or
    `sparsegpt`. share: of the entries that stay, where there is no pattern."""
    W = matrices.weights[name]
    gone = matrices.gone(name)
    if method == "sparsegpt":
        R = roots.of(name, W.device)
        return pruning.sparsegpt(W, R, share, pattern, gone)
    score = W.abs()
    # the formulas on top of pruning.py
    if method == "wanda":
        C = matrices.statistics.inputs(name).to(W.device)
        score = score * C.diagonal().sqrt()
    if gone is not None:
        # others may have a score of zero too
        score.masked_fill_(gone, NEVER)
    if pattern:
        mask = pruning.largest_of_groups(score, *pattern)
    elif method == "wanda":
        # Wanda compares within a row; magnitudes are compared within a matrix
        mask = pruning.largest_of_rows(score, share)
    else:
        mask = pruning.largest(score, int(share * W.numel() + ROUNDING))
    return W * mask

def fitted_one_by_one(matrices: Matrices, method: str, kept: int, pattern: Pattern | None) -> Weights:
    """Each matrix by itself, with as many entries of each as its part of `kept`; where one has fewer left,
    the others keep more."""
    weights = matrices.weights
    sizes = [W.numel() for W in weights.values()]
    nonzeros = [int(W.count_nonzero()) for W in weights.values()]
    rate = 1 - kept / sum(sizes)
    even = kept_counts([rate] * len(sizes), sizes)
    counts = pruning.fitted(torch.tensor(even), torch.tensor(nonzeros))
    roots = matrices.roots(method)
    found = {}
    for name, size, count in zip(weights, sizes, counts.tolist(), strict=True):
        # half an entry more, since a share rounds
        share = (count + 0.5) / size
        found[name] = alone(matrices, method, name, share, pattern, roots)
    return found

# --- matrices together ---

def walked_in_patterns(matrices: Matrices, roots: Roots, patterns: Patterns) -> Weights:
    """The walk over every matrix that has a pattern."""
    found = {}
    for name, (n, m) in tqdm(patterns.items(), "walk", disable=None):
        W = matrices.weights[name]
        R = roots.of(name, W.device)
        found[name] = pruning.walk_in_groups(W, R, n, m, matrices.gone(name))
    return found

def walked(matrices: Matrices, share: float, near: float, uniform: bool | None = False) -> Weights:
    """The walk under one threshold for all matrices, or for each. near: how far below the share of the
    entries it may end."""
    roots = matrices.roots("walk")
    found = {}
    for names in competing(matrices.weights, uniform):
        part = {name: matrices.weights[name] for name in names}
        walker = Walker(part, matrices.statistics, roots, matrices.device, matrices.nested)
        # of several walks the last is the one that stays
        walker.to_share(share, found.__setitem__, near)
    return found

def begun(matrices: Matrices, start: Weights) -> list[Scaled]:
    """The layers of `start` in scaled units, each with its zeros as they stand there. Empties `start`: what a
    layer was is on the shelf then."""
    own = own_shares(matrices.statistics)
    # 9 bytes a weight and the eigenvectors: too much for the memory beside a large model
    shelf = Shelf(matrices.folder)
    scaled = splitting.scaled_layers(start, matrices.statistics, own, shelf, matrices.device)
    for layer in scaled:
        W = matrices.weights[layer.name]
        D = start.pop(layer.name)
        layer.begin(W, D, matrices.device, matrices.gone(layer.name))
    return scaled

def split_zeros(
    matrices: Matrices,
    start: Weights,
    share: float,
    patterns: Patterns | None,
    uniform: bool | None = False,
) -> list[Scaled]:
    """The matrices of `start`, which it empties, with the zeros that splitting finds from there."""
    scaled = begun(matrices, start)
    for part in competing(scaled, uniform):
        # under patterns the count is theirs, and `keep` plays no part
        size = sum(matrices.weights[layer.name].numel() for layer in part)
        keep = int(share * size + ROUNDING)
        splitting.split(part, keep, patterns, matrices.device)
    return scaled
