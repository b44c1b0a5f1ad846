"""Zeros in a weight W (out, in), chosen so that what the model loses is little.

    magnitude   |W_ij|                                        the largest of each matrix
    wanda       |W_ij| √C_jj                                  of each row (Sun et al. 2023, arXiv 2306.11695)
    sparsegpt   W_ij² / R_jj², others compensate              of 128 columns (Frantar and Alistarh 2023,
                                                              arXiv 2301.00774, alg. 1)
    walk        W_ij² / R_jj² · G_ii, others compensate       of the whole model
    fisher      `splitting.py`, which begins with the walk    of the whole model
    oats, cap   low rank beside the zeros: `cap.py`

C and G are those of `covariance.py`, R is the upper Cholesky factor of C⁻¹. ½ W_ij² / [C⁻¹]_jj · G_ii is the
loss in nats a token of a weight that goes while its row makes up for it (Hassibi and Stork 1993): one unit
for rows, matrices and blocks, so that one threshold serves the whole model."""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanolost.covariance import GROUP_OF, Statistics, place_of
from nanolost.lowrank import shrunk
from nanolost.shelf import Shelf

METHODS = ("fisher", "walk", "magnitude", "wanda", "sparsegpt", "oats", "cap")

# columns that are walked before the errors are spread to all later ones: SparseGPT's
BLOCK = 128
# SparseGPT's damping of C, a share of the mean of its diagonal
DAMPING = 0.01
# how near to the budget a walk must end, as a share of the values
NEAR = 5e-4

# (n, m): n of every m neighbours in a row stay
Pattern = tuple[int, int]
# by the layer's name
Patterns = dict[str, Pattern]
PATTERNS = ("unstructured", "2:4", "4:8", "mixed:8")

def pattern_of(name: str) -> tuple[int, int] | None:
    """(n, m) of "n:m"; None for no pattern, and for one that is chosen matrix by matrix."""
    n, _, m = name.partition(":")
    return (int(n), int(m)) if n.isdigit() else None

def offered_patterns(name: str) -> list[tuple[int, int]]:
    """Those that a matrix may have."""
    m = int(name.partition(":")[2])
    known = pattern_of(name)
    return [known] if known else [(n, m) for n in range(1, m)]

# --- which entries stay ---

def largest(score: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` entries with the largest scores; of equal ones the first. bfloat16 weights
    have few distinct values, so that a threshold alone would miss the count."""
    flat = score.flatten()
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(score, dtype=torch.bool)
    value = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > value
    ties = (flat == value).nonzero()[:count - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view(score.shape)

def largest_of_rows(score: Tensor, share: float) -> Tensor:
    """`largest` of each row, whose counts differ by one at most, so that they are right together."""
    rows, width = score.shape
    # up to each row's end
    ends = [math.floor(share * width * (row + 1) + 1e-9) for row in range(rows)]
    counts = torch.tensor(ends).diff(prepend=torch.tensor([0])).to(score.device)
    order = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(width, device=score.device).expand(rows, -1)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < counts[:, None]

def largest_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours in a row: an N:M pattern. A last group of fewer has n as well."""
    rows, width = score.shape
    padded = F.pad(score, (0, -width % m), value=-math.inf).view(rows, -1, m)
    keep = padded.topk(n, dim=-1).indices
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, keep, True)
    return mask.view(rows, -1)[:, :width]

# --- the walk over the columns ---

def inverse_root(C: Tensor) -> Tensor:
    """R (in, in), upper triangular with Rᵀ R = C⁻¹, of a positive definite C, float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    return torch.linalg.cholesky(inverse, upper=True)

def walk(W: Tensor, R: Tensor, choose: Callable[[Tensor], Tensor], group: int = 1) -> Tensor:
    """W with zeros, in which later columns make up for what earlier ones lose. choose(saliency (g, out)) says
    which entries of the next g = `group` columns stay, by their W_ij² / R_jj²."""
    # a column of W is a row here: what is read together lies together
    columns = W.T.clone(memory_format=torch.contiguous_format)
    diagonal = R.diagonal()
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        part = columns[start:stop]
        inner = R[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if j % group == 0:
                ahead = slice(j, j + group)
                saliency = (part[ahead] / diagonal[start:stop][ahead, None]).square()
                keep = choose(saliency)
            column = part[j]
            kept = column * keep[j % group]
            errors[j] = (column - kept) / inner[j, j]
            part[j] = kept
            part[j + 1:] -= inner[j, j + 1:, None] * errors[j]
        columns[stop:] -= R[start:stop, stop:].T @ errors
    return columns.T.contiguous()

class Roots:
    """R of every layer's inputs, made once for the layers that share them, on a shelf."""

    def __init__(self, statistics: Statistics, shelf: Shelf, shrink: Callable[[Tensor], Tensor]):
        self.statistics = statistics
        self.shelf = shelf
        self.shrink = shrink

    def of(self, name: str, device) -> Tensor:
        layer, inner = place_of(name)
        key = f"R.{layer}.{GROUP_OF[inner]}"
        if key not in self.shelf:
            C = self.shrink(self.statistics.inputs(name).to(device))
            self.shelf[key] = inverse_root(C).float()
        return self.shelf[key].to(device)

def damped(C: Tensor) -> Tensor:
    """SparseGPT's: C + 0.01 E[diag(C)]·1, float64."""
    return shrunk(C, 0.0, DAMPING)

def sparsegpt(W: Tensor, R: Tensor, share: float, pattern: tuple[int, int] | None) -> Tensor:
    if pattern:
        return walk_in_groups(W, R, *pattern)
    # entries that all blocks so far should have kept, and have
    seen = [0, 0]
    def choose(saliency):
        seen[0] += saliency.numel()
        count = math.floor(share * seen[0] + 1e-9) - seen[1]
        seen[1] += count
        return largest(saliency, count)
    return walk(W, R, choose, BLOCK)

def walk_in_groups(W: Tensor, R: Tensor, n: int, m: int) -> Tensor:
    """The walk under an N:M pattern. What a row's gradient weighs is alike in a group, so G plays no part."""
    assert BLOCK % m == 0, m
    return walk(W, R, lambda saliency: largest_of_groups(saliency.T, n, m).T, m)

# --- one threshold for many matrices ---

class Walker:
    """Walks over matrices under one threshold τ: an entry stays where W_ij² / R_jj² · G_ii > τ."""

    def __init__(self, weights: dict[str, Tensor], statistics: Statistics, roots: Roots, device):
        self.weights = weights
        self.roots = roots
        self.device = device
        self.size = sum(W.numel() for W in weights.values())
        self.rows = {name: statistics.gradients(name).diagonal().clone() for name in weights}

    def first(self, share: float) -> float:
        """log τ that would keep the share, if nothing made up for anything: of every 64th entry."""
        sampled = []
        for name, W in self.weights.items():
            saliency = (W.to(self.device) / self.roots.of(name, self.device).diagonal()).square()
            saliency *= self.rows[name].to(self.device)[:, None]
            sampled.append(saliency.flatten()[::64].cpu())
        sampled = torch.cat(sampled)
        # zeros that were there before say nothing of the others
        known = sampled[sampled > 0]
        if not len(known):
            return 0.0
        place = max(1, len(known) - round(share * len(sampled)))
        return math.log(known.kthvalue(place).values.item())

    def walk(self, log_threshold: float, take: Callable[[str, Tensor], None]) -> float:
        """Walk all matrices; take(name, W) gets each result. Returns the share that stays."""
        kept = 0
        threshold = math.exp(log_threshold)
        for name, W in self.weights.items():
            R = self.roots.of(name, self.device)
            rows = self.rows[name].to(self.device)
            # a column at a time, as what a column shows depends on those before it
            done = walk(W.to(self.device), R, lambda saliency, rows=rows: saliency * rows > threshold)
            kept += int(done.count_nonzero())
            take(name, done)
        return kept / self.size

    def to_share(self, share: float, take: Callable[[str, Tensor], None], near: float = NEAR, tries=12):
        """Walk until at most the share stays, and not less than `near` below it; where no try ends there, as
        of small matrices, the nearest from below. The last walk's results are the ones that count."""
        known = []
        log_threshold = self.first(share)
        with tqdm(total=tries, desc="walks", disable=None) as bar:
            for _ in range(tries):
                found = self.walk(log_threshold, take)
                bar.update()
                if share - near <= found <= share:
                    return
                known.append((log_threshold, found))
                # a little below, since above it is not allowed
                log_threshold = next_guess(known, share - near / 3)
        below = [look for look in known if look[1] <= share]
        # above everything nothing stays
        self.walk(max(below, key=lambda look: look[1], default=(math.inf, 0.0))[0], take)

def next_guess(known: list[tuple[float, float]], wanted: float) -> float:
    """The log τ at which a falling line through the two nearest looks would have the share `wanted`. What
    stays jumps where one entry changes all later ones, so that a line may rise: the guess lies between the
    nearest looks on both sides, or, of looks on one side, on the other."""
    nearest = sorted(known, key=lambda look: abs(look[1] - wanted))
    x, y = nearest[0]
    more = [x for x, y in nearest if y > wanted]
    less = [x for x, y in nearest if y <= wanted]
    if more and less:
        ends = more[0], less[0]
        other = sum(ends) / 2
    else:
        # half of a model's entries lie within a factor of e³ of each other: a first slope; then further
        other = x + (y - wanted) * 6 * 2 ** (len(nearest) - 1)
        # a line that is almost level leads too far
        ends = x, x + (y - wanted) * 60
    if len(nearest) == 1 or nearest[1][1] == y:
        return other
    other_x, other_y = nearest[1]
    guess = x + (wanted - y) * (other_x - x) / (other_y - y)
    return guess if min(ends) < guess < max(ends) else other
