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
from torch import Tensor
from tqdm import tqdm

from nanolost.covariance import GROUP_OF, Statistics, place_of
from nanolost.lowrank import shrunk
from nanolost.shelf import Shelf

# of --form sparse
METHODS = ("fisher", "walk", "magnitude", "wanda", "sparsegpt", "oats", "cap")

# columns that are walked before the errors are spread to all later ones: SparseGPT's
BLOCK = 128
# SparseGPT's damping of C, a share of the mean of its diagonal
DAMPING = 0.01
# how near to the budget a walk must end, as a share of the values
NEAR = 5e-4
# walks for that at the most
TRIES = 12
# one entry of so many tells where a threshold lies; a width that it divides would show the same columns alone
EVERY = 61
# half of a model's entries lie within a factor of e³ of each other: log τ that a share of one is worth
SLOPE = 6
# what rounding may take of a count that is whole, such as 0.6 · 5
ROUNDING = 1e-9

# (n, m): n of every m neighbours in a row stay
Pattern = tuple[int, int]
# by the layer's name
Patterns = dict[str, Pattern]
PATTERNS = ("unstructured", "2:4", "4:8", "mixed:8")

def pattern_of(name: str) -> Pattern | None:
    """(n, m) of "n:m"; None for no pattern, and for one that is chosen matrix by matrix."""
    n, _, m = name.partition(":")
    if not n.isdigit():
        return None
    return int(n), int(m)

def offered_patterns(name: str) -> list[Pattern]:
    """Those that a matrix may have, beside none: of "mixed:8" 1:8 to 7:8."""
    known = pattern_of(name)
    if known:
        return [known]
    _, _, width = name.partition(":")
    m = int(width)
    return [(n, m) for n in range(1, m)]

# --- zeros that are there ---

# those that a trained model has by chance are no sparsity
BY_CHANCE = 0.01

def share_of(weights) -> float:
    """The share of zeros in some matrices, 0 of none."""
    zeros = 0
    values = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        values += weight.numel()
    return zeros / max(values, 1)

# --- which entries stay ---

# the score of an entry that never stays, such as one that is zero already
NEVER = -math.inf

def largest(score: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` entries with the largest scores; of equal ones the first. bfloat16 weights
    have few distinct values, so that a threshold alone would miss the count."""
    flat = score.flatten()
    size = flat.numel()
    able = score > NEVER
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= int(able.sum()):
        return able
    # kthvalue counts from the smallest, from 1 on
    value = flat.kthvalue(size - count + 1).values
    mask = flat > value
    missing = count - int(mask.sum())
    ties = (flat == value).nonzero()[:, 0]
    mask[ties[:missing]] = True
    return mask.view(score.shape)

def fitted(counts: Tensor, room: Tensor) -> Tensor:
    """Counts (n,) of which none is above its room (n,): what does not fit goes to the others, as many to
    each, as long as anything has room."""
    found = torch.minimum(counts, room)
    missing = int(counts.sum() - found.sum())
    while missing:
        able = (found < room).nonzero()[:, 0]
        if not len(able):
            break
        # at the end there are fewer than those that could take one
        each = max(1, missing // len(able))
        able = able[:missing]
        found[able] = (found[able] + each).minimum(room[able])
        missing = int(counts.sum() - found.sum())
    return found

def largest_of_rows(score: Tensor, share: float) -> Tensor:
    """`largest` of each row, whose counts differ by one at most, so that they are right together; and by more
    where a row has too few entries that may stay."""
    rows, width = score.shape
    # entries that stay up to each row's end
    ends = [0]
    for row in range(rows):
        whole = math.floor(share * width * (row + 1) + ROUNDING)
        ends.append(whole)
    able = (score > NEVER).sum(1)
    counts = torch.tensor(ends).diff().to(score.device)
    counts = fitted(counts, able)
    # each entry's place in its row: the inverse of the order, of equal ones the first before
    order = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(width, device=score.device).expand(rows, -1)
    place = torch.empty_like(order).scatter_(1, order, places)
    return place < counts[:, None]

def largest_of_each(groups: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest along the last dimension, or of as many as can stay."""
    keep = groups.topk(count, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, keep, True)
    return mask & (groups > NEVER)

def largest_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours in a row: an N:M pattern. A last group of fewer keeps that share of
    them, rounded down, so that no row keeps more than n/m."""
    rows, width = score.shape
    whole, short = divmod(width, m)
    groups, last = score.split((whole * m, short), dim=1)
    groups = groups.reshape(rows, whole, m)
    mask = largest_of_each(groups, n).flatten(1)
    return torch.cat((mask, largest_of_each(last, n * short // m)), dim=1)

# --- the walk over the columns ---

def inverse_root(C: Tensor) -> Tensor:
    """R (in, in), upper triangular with Rᵀ R = C⁻¹, of a positive definite C, float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    return torch.linalg.cholesky(inverse, upper=True)

# of the saliency W_ij² / R_jj² of some columns (columns, out): which entries stay
Choose = Callable[[Tensor], Tensor]

def walk(W: Tensor, R: Tensor, choose: Choose, group: int = 1, gone: Tensor | None = None) -> Tensor:
    """W (out, in) with zeros, in which later columns make up for what earlier ones lose. group: columns that
    `choose` looks at together; gone (out, in): entries that stay zero, though they too would make up for
    others. To `choose` they look like `NEVER`."""
    # a column of W is a row here: what is read together lies together
    columns = W.T.clone(memory_format=torch.contiguous_format)
    if gone is None:
        gone = torch.zeros_like(W, dtype=torch.bool)
    # as the columns
    gone = gone.T.contiguous()
    for start in range(0, len(columns), BLOCK):
        stop = start + BLOCK
        part = columns[start:stop]
        inner = R[start:stop, start:stop]
        errors = walk_block(part, inner, choose, group, gone[start:stop])
        # all later columns at once: a product of matrices, not of vectors
        columns[stop:] -= R[start:stop, stop:].T @ errors
    return columns.T.contiguous()

def walk_block(part: Tensor, R: Tensor, choose: Choose, group: int, gone: Tensor) -> Tensor:
    """Walk the columns of W that are the rows of `part` (b, out), in place. Returns what each lost, over its
    R_jj, (b, out): SparseGPT's E. gone: (b, out)."""
    diagonal = R.diagonal()
    errors = torch.empty_like(part)
    for j in range(len(part)):
        if j % group == 0:
            # as these columns are now, with what they make up for
            ahead = slice(j, j + group)
            scaled = part[ahead] / diagonal[ahead, None]
            saliency = scaled.square().masked_fill_(gone[ahead], NEVER)
            keep = choose(saliency)
        column = part[j]
        kept = column * keep[j % group]
        errors[j] = (column - kept) / R[j, j]
        part[j] = kept
        later = slice(j + 1, None)
        part[later] -= R[j, later, None] * errors[j]
    return errors

# C (in, in) as it is and as it can be factorised
Shrink = Callable[[Tensor], Tensor]

class Roots:
    """R of every layer's inputs, made once for the layers that share them, on a shelf."""

    def __init__(self, statistics: Statistics, shelf: Shelf, shrink: Shrink):
        self.statistics = statistics
        self.shelf = shelf
        self.shrink = shrink

    def of(self, name: str, device) -> Tensor:
        """R (in, in) of the layer `name`, float32."""
        layer, inner = place_of(name)
        key = f"R.{layer}.{GROUP_OF[inner]}"
        if key not in self.shelf:
            C = self.statistics.inputs(name).to(device)
            R = inverse_root(self.shrink(C))
            self.shelf[key] = R.float()
        return self.shelf[key].to(device)

def damped(C: Tensor) -> Tensor:
    """SparseGPT's: C + 0.01 E[diag(C)]·1, float64."""
    return shrunk(C, 0.0, DAMPING)

def block_counts(W: Tensor, share: float, gone: Tensor | None) -> list[int]:
    """Entries that stay in each block of 128 columns: the share of it, and together that of the matrix; more
    where another block has too few that may stay."""
    ends = [0]
    room = []
    for start in range(0, W.shape[1], BLOCK):
        part = W[:, start:start + BLOCK]
        whole = math.floor(share * len(W) * (start + part.shape[1]) + ROUNDING)
        ends.append(whole)
        taken = 0 if gone is None else int(gone[:, start:start + BLOCK].sum())
        room.append(part.numel() - taken)
    counts = torch.tensor(ends).diff()
    return fitted(counts, torch.tensor(room)).tolist()

def sparsegpt(
    W: Tensor,
    R: Tensor,
    share: float,
    pattern: Pattern | None,
    gone: Tensor | None = None,
) -> Tensor:
    """W (out, in) with zeros, the same share of every block of 128 columns, or in a pattern. gone: as of
    `walk`."""
    if pattern:
        return walk_in_groups(W, R, *pattern, gone)
    counts = iter(block_counts(W, share, gone))
    def choose(saliency: Tensor) -> Tensor:
        return largest(saliency, next(counts))
    return walk(W, R, choose, BLOCK, gone)

def walk_in_groups(W: Tensor, R: Tensor, n: int, m: int, gone: Tensor | None = None) -> Tensor:
    """The walk under an N:M pattern. What a row's gradient weighs is alike in a group, so G plays no part."""
    assert BLOCK % m == 0, m
    def choose(saliency: Tensor) -> Tensor:
        # (m, out): a group is a column here
        mask = largest_of_groups(saliency.T, n, m)
        return mask.T
    return walk(W, R, choose, m, gone)

# --- one threshold for many matrices ---

# take(name, W) gets a matrix with its zeros
Take = Callable[[str, Tensor], None]

class Walker:
    """Walks over matrices under one threshold τ: an entry stays where W_ij² / R_jj² · G_ii > τ."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        statistics: Statistics,
        roots: Roots,
        device: torch.device,
        nested: bool = False,
    ):
        self.weights = weights
        self.roots = roots
        self.device = device
        # whether what is zero stays zero
        self.nested = nested
        self.size = sum(W.numel() for W in weights.values())
        # the diagonal of each G
        self.rows = {}
        for name in weights:
            G = statistics.gradients(name)
            self.rows[name] = G.diagonal().clone()

    def look(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """W (out, in), R (in, in) and the diagonal of G (out,) of one matrix, on the device."""
        W = self.weights[name].to(self.device)
        R = self.roots.of(name, self.device)
        rows = self.rows[name].to(self.device)
        return W, R, rows

    def first(self, share: float) -> float:
        """log τ that would keep the share, if nothing made up for anything: of every 64th entry."""
        sampled = []
        for name in self.weights:
            W, R, rows = self.look(name)
            saliency = (W / R.diagonal()).square()
            saliency *= rows[:, None]
            some = saliency.flatten()[::EVERY]
            sampled.append(some.cpu())
        sampled = torch.cat(sampled)
        # zeros that were there before say nothing of the others
        known = sampled[sampled > 0]
        if not len(known):
            return 0.0
        kept = round(share * len(sampled))
        place = max(1, len(known) - kept)
        return math.log(known.kthvalue(place).values.item())

    def walk(self, log_threshold: float, take: Take) -> float:
        """Walk all matrices under one threshold. Returns the share of their entries that stays."""
        kept = 0
        threshold = math.exp(log_threshold)
        for name in self.weights:
            W, R, rows = self.look(name)
            gone = W == 0 if self.nested else None
            def choose(saliency: Tensor, rows: Tensor = rows) -> Tensor:
                return saliency * rows > threshold
            # a column at a time, as what a column shows depends on those before it
            done = walk(W, R, choose, gone=gone)
            kept += int(done.count_nonzero())
            take(name, done)
        return kept / self.size

    def to_share(self, share: float, take: Take, near: float = NEAR):
        """Walk until at most the share stays, and not less than `near` below it; where no try ends there, as
        of small matrices, the nearest from below. The last walk's results are the ones that count."""
        known = []
        log_threshold = self.first(share)
        with tqdm(total=TRIES, desc="walks", disable=None) as bar:
            for _ in range(TRIES):
                found = self.walk(log_threshold, take)
                bar.update()
                if share - near <= found <= share:
                    return
                look = log_threshold, found
                known.append(look)
                # a little below, since above it is not allowed
                wanted = share - near / 3
                log_threshold = next_guess(known, wanted)
        below = [(found, log_threshold) for log_threshold, found in known if found <= share]
        # above everything nothing stays
        _, log_threshold = max(below, default=(0.0, math.inf))
        self.walk(log_threshold, take)

def ends_of(nearest: list[tuple[float, float]], wanted: float) -> tuple[float, float, float]:
    """The log τ between which the one for the share `wanted` lies, and one that is safe to try."""
    above = [x for x, y in nearest if y > wanted]
    below = [x for x, y in nearest if y <= wanted]
    if above and below:
        return above[0], below[0], (above[0] + below[0]) / 2
    x, y = nearest[0]
    # looks on one side only: further with each
    far = 2 ** (len(nearest) - 1)
    # a line that is almost level would lead too far
    return x, x + 10 * SLOPE * (y - wanted), x + far * SLOPE * (y - wanted)

def next_guess(known: list[tuple[float, float]], wanted: float) -> float:
    """The log τ at which a falling line through the two nearest looks would have the share `wanted`. known:
    log τ and the share that stayed, of every walk. What stays jumps where one entry changes all later ones,
    so that a line may rise: the guess never leaves the nearest looks on both sides."""
    nearest = sorted(known, key=lambda look: abs(look[1] - wanted))
    start, stop, safe = ends_of(nearest, wanted)
    x, y = nearest[0]
    if len(nearest) == 1 or nearest[1][1] == y:
        return safe
    other_x, other_y = nearest[1]
    run = other_x - x
    rise = other_y - y
    guess = x + (wanted - y) * run / rise
    between = min(start, stop) < guess < max(start, stop)
    return guess if between else safe
