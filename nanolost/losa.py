"""What LoSA decides between its stages (Huang et al. 2025, arXiv 2502.14816): how many zeros, in which
blocks, and how large an update each block gets. The masks themselves are chosen in `staging.py`.

A stage t of T has a share of zeros and a mean rank for the whole model,

    Θᵗ = Θᶠ − Θᶠ (1 − t/T)³          stage_zeros         Θᶠ: --zeros, of the last stage
    Ωᵗ = Ω − (T + 1)/2 + t           stage_ranks         Ω: the mean over the stages, 8 in the paper

From the inputs X_i of block i, a sequence a row, for N sequences of a text,

    K_i = H X_i X_iᵀ H               centred             H: the mean over the sequences is taken away
    ⟨K_i, K_j⟩ / (‖K_i‖ ‖K_j‖)       cka                 nHSIC: 1 where the two say the same
    t_i = the mean over j ≠ i,  I_i = exp(−t_i)          importances: what no other block says is important
    min Σ I_i s_i,  mean(s) = Θ,  |s_i − Θ| ≤ d          rates               s_i: zeros of block i

Its published code solves the last line by a general solver, which stops early on few blocks. It is a linear
programme in a box: in the order of I, each block takes as many zeros as it may until they are all given away.
So only the order of I counts, and the paper's β in exp(−β t_i) nothing.

From the error L_i of each block's output after its zeros were chosen,

    r_i = round(Ω L_i / mean(L))                         ranks"""
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# of the steps, for each stage but the last
SHARE = 10
# half of the box in which a block's zeros lie around the model's, by the model's share: up to 50 %, 60 %, and
# above. The paper stops at 70 %
HALF_WIDTHS = ((0.5, 0.01), (0.6, 0.02), (1.0, 0.03))
# what rounding may take of a whole number of entries
ROUNDING = 1e-6

# one number a block
Numbers = Sequence[float]

# --- the schedule ---

def stage_zeros(final: float, stages: int) -> list[float]:
    """Share of zeros at the end of each stage; the last is `final` to the bit."""
    found = []
    for t in range(1, stages + 1):
        left = 1 - t / stages
        # nothing is left of the last one
        found.append(final - final * left ** 3)
    return found

def stage_ranks(rank: float, stages: int) -> list[float]:
    """Mean rank of each stage, one more each and `rank` in the middle: with an even number of stages they end
    in a half. At least 1."""
    first = rank - (stages - 1) / 2
    # the mean is above `rank` where the first ones would be below 1
    return [max(1.0, first + t) for t in range(stages)]

def stage_steps(steps: int, stages: int) -> list[int]:
    """The first step of each stage: a tenth of all steps for each, and what is left for the last. Of more
    than ten stages all have as many."""
    assert steps >= stages, (steps, stages)
    parts = max(SHARE, stages)
    # with few steps one each
    return [max(t, t * steps // parts) for t in range(stages)]

# --- how alike blocks are ---

def centred(K: Tensor) -> Tensor:
    """H K H (..., N, N), float64, of Gram matrices K."""
    K = K.double()
    K = K - K.mean(-1, keepdim=True)
    return K - K.mean(-2, keepdim=True)

def cka(grams: Tensor) -> Tensor:
    """Linear centred kernel alignment (blocks, blocks), float64, of Gram matrices (blocks, N, N) of the same
    N sequences: Kornblith et al. 2019, arXiv 1905.00414, eq. 4."""
    flat = centred(grams).flatten(1)                            # (blocks, N²)
    sizes = flat.norm(dim=1, keepdim=True)
    # a block whose input is the same for all sequences is like no other
    unit = flat / sizes.clamp(min=torch.finfo(flat.dtype).tiny)
    return unit @ unit.T

def importances(similarity: Tensor) -> list[float]:
    """I_i of each block, from `cka` (blocks, blocks)."""
    blocks = len(similarity)
    # each block is like itself
    others = similarity.sum(1) - similarity.diagonal()
    mean = others / max(1, blocks - 1)
    return torch.exp(-mean).tolist()

# --- zeros of each block ---

def half_width(target: float) -> float:
    """d of a model's share of zeros."""
    for most, width in HALF_WIDTHS:
        if target <= most:
            return width
    raise AssertionError(target)

def filled(order: Sequence[int], lower: list, upper: list, total) -> list:
    """The lower bounds, raised one after the other, each as far as its upper bound, until they are `total`
    together."""
    found = list(lower)
    left = total - sum(lower)
    for i in order:
        room = upper[i] - lower[i]
        more = max(0, min(left, room))
        found[i] += more
        left -= more
    return found

def level(target: float, floors: Numbers, sizes: Numbers) -> float:
    """The share up to which all blocks below it can be raised, where the others stay at their floors and the
    mean is `target`."""
    width = sum(sizes)
    left = target * width
    blocks = zip(floors, sizes, strict=True)
    # the highest floors first: what they have is not there for the others
    for floor, size in sorted(blocks, reverse=True):
        if floor * width <= left:
            return left / width
        left -= floor * size
        width -= size
    # no block can rise: the floors' mean is the target, or above it
    return min(floors)

def bounds(target: float, floors: Numbers, sizes: Numbers) -> tuple[list, list]:
    """The box as numbers of zeros. What one block gives up another one can take, whatever their sizes."""
    width = half_width(target)
    most = min(1.0, target + width)
    least = min(target - width, level(target, floors, sizes))
    lower = []
    upper = []
    for floor, size in zip(floors, sizes, strict=True):
        # zeros stay zeros, on both sides of the box
        lower.append(size * max(0.0, floor, least))
        upper.append(size * max(floor, most))
    return lower, upper

def rates(importances: Numbers, target: float, floors: Numbers, sizes: Numbers) -> list[float]:
    """The share of zeros s_i of each block: min Σ I_i n_i s_i with Σ n_i s_i = target · Σ n_i, which for
    blocks of one size is the paper's. floors: zeros that block i has already and keeps; sizes: n_i.

    A block whose floor is above target + d stays at its floor. Where the floors together leave the others
    less than target − d, the lower side of the box is widened by as little as the mean asks for: all those
    others then have the same share. Floors whose mean is above the target are what there is."""
    lower, upper = bounds(target, floors, sizes)
    # where a zero costs least, first; of equal blocks the first
    order = np.argsort(importances, kind="stable")
    zeros = filled(order, lower, upper, target * sum(sizes))
    return [zero / size for zero, size in zip(zeros, sizes, strict=True)]

def kept_counts(rates: Numbers, sizes: Numbers) -> list[int]:
    """Whole entries that each block keeps: none is further than one from its rate, and together they are the
    model's, rounded down."""
    counts = []
    kept = 0.0
    before = 0
    for rate, size in zip(rates, sizes, strict=True):
        # what one block rounds away the next one has
        kept += (1 - rate) * size
        end = math.floor(kept + ROUNDING)
        counts.append(end - before)
        before = end
    return counts

def patterns_mixed(importances: Numbers, m: int, target: float, most: Sequence[int] = ()) -> list[int]:
    """N of the N:M pattern of each block: one more for the important half than for the other, or two with one
    block between them, so that the mean of N / M is 1 − target, as near as whole numbers come. most: N of the
    patterns that the blocks have already, which can only fall."""
    blocks = len(importances)
    most = most or [m] * blocks
    mean = (1 - target) * m
    total = min(round(mean * blocks), sum(most))
    assert total >= blocks, (m, target)
    least = math.ceil(mean - 1 - ROUNDING)
    high = math.floor(mean + 1 + ROUNDING)
    # where blocks that may not rise leave too little, the others keep more
    while sum(min(high, n) for n in most) < total:
        high += 1
    # none is without any entry
    lower = [min(max(1, least), n) for n in most]
    upper = [min(high, n) for n in most]
    # the most important first
    order = np.argsort(np.negative(importances), kind="stable")
    return filled(order, lower, upper, total)

# --- ranks ---

def ranks(errors: Numbers, mean: float, most: int = 16) -> list[int]:
    """The rank r_i of each block's update, 1 to `most`, by the error of its output; together n · `mean`,
    rounded. What rounding and the bounds leave over goes to the largest errors, one each, and what is too
    much is taken from the smallest."""
    assert 1 <= mean <= most, (mean, most)
    errors = np.asarray(errors, dtype=np.float64)
    average = errors.mean()
    # without any error all blocks are alike
    share = errors / average if average else np.ones_like(errors)
    wanted = np.rint(mean * share).clip(1, most)
    found = [int(r) for r in wanted]
    left = round(mean * len(errors)) - sum(found)
    step = 1 if left > 0 else -1
    order = np.argsort(-step * errors, kind="stable")
    while left:
        for i in order:
            # a round gives each block one at the most
            if left and 1 <= found[i] + step <= most:
                found[i] += step
                left -= step
    return found
