"""About how long a compression takes, before it begins: operations counted from the layers, over the rate at
which this machine multiplies. Right within a factor of two on the models that we have timed."""
import time
from typing import NamedTuple

import torch

from model import Llama
from nanolost.covariance import GROUPS, linears, place_of

# the side of the product that is timed
SIDE = 1024
# operations of a float64 eigendecomposition of side n, in n³, with what it runs below the rate of a product
EIGEN = 15
# turns of the splitting, and walks to the share, as they are on real models
TURNS = 22
WALKS = 3

class Rates(NamedTuple):
    """Floating-point operations a second of a product in float32 and in float64."""

    single: float
    double: float

def rate(dtype, device) -> float:
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    # the first one starts threads; .item() waits for a GPU
    (x @ x)[0, 0].item()
    started = time.perf_counter()
    for _ in range(4):
        y = x @ x
    y[0, 0].item()
    return 4 * 2 * SIDE ** 3 / (time.perf_counter() - started)

def rates(device) -> Rates:
    return Rates(rate(torch.float32, device), rate(torch.float64, device))

class Counts(NamedTuple):
    """Sums over the linear layers W (m, n) of the blocks, and over the inputs that they share."""

    values: int
    # of m n (m + n): a product of W with a square matrix on either side
    sides: int
    # of m³ and of n³: a factorisation
    outputs_cubed: int
    inputs_cubed: int
    # of the shorter side
    short_cubed: int
    inputs_squared: int
    outputs_squared: int

def counts_of(model: Llama) -> Counts:
    layers = linears(model)
    shapes = [linear.weight.shape for linear in layers.values()]
    first = {names[0] for names in GROUPS.values()}
    widths = [linear.in_features for name, linear in layers.items() if place_of(name)[1] in first]
    return Counts(
        values=sum(m * n for m, n in shapes),
        sides=sum(m * n * (m + n) for m, n in shapes),
        outputs_cubed=sum(m ** 3 for m, _ in shapes),
        inputs_cubed=sum(n ** 3 for n in widths),
        short_cubed=sum(min(m, n) ** 3 for m, n in shapes),
        inputs_squared=sum(n ** 2 for n in widths),
        outputs_squared=sum(m ** 2 for m, _ in shapes),
    )

def statistics_seconds(model: Llama, counts: Counts, tokens: int, gradients: int, found: Rates) -> float:
    head = model.lm_head.weight.numel()
    # a multiplication and an addition a weight: through the model, and through each block again
    each = 4 * counts.values + 2 * counts.inputs_squared
    # back by the activations alone, and the head there and back
    learned = 2 * counts.values + 2 * counts.outputs_squared + 4 * head
    return (tokens * each + gradients * learned) / found.single

def low_rank_seconds(counts: Counts, found: Rates) -> float:
    """Curves of all matrices, then the factors of those that become small."""
    roots = (counts.outputs_cubed + counts.inputs_cubed) / 3
    return 2 * (roots + 2 * counts.sides + EIGEN * counts.short_cubed) / found.double

def loop_seconds(counts: Counts, tokens: int, found: Rates) -> float:
    # dense, compressed, and what lies before each group again
    passes = tokens * (8 * counts.values + 4 * counts.inputs_squared)
    solves = 4 * counts.sides + counts.inputs_cubed
    return passes / found.single + solves / found.double

def walk_seconds(counts: Counts, found: Rates) -> float:
    # a column at a time runs far below the rate of a product
    return WALKS * 8 * counts.sides / found.single + 2 * counts.inputs_cubed / found.double

def splitting_seconds(counts: Counts, found: Rates) -> float:
    eigen = EIGEN * (counts.inputs_cubed + counts.outputs_cubed) / found.double
    # four products a turn, two on each side
    return eigen + TURNS * 4 * counts.sides / found.single

def seconds_of(config, model: Llama, found: Rates) -> dict[str, float]:
    """By the stage's name, of a compression with these flags. {} for methods that we have not timed."""
    counts = counts_of(model)
    if config.method not in ("fisher", "svdllm", "walk"):
        return {}
    seconds = {
        "statistics": statistics_seconds(
            model, counts, config.calibration_tokens, config.gradient_tokens, found),
    }
    if config.form == "lost":
        seconds["compression"] = low_rank_seconds(counts, found)
    else:
        seconds["compression"] = walk_seconds(counts, found)
        if config.method == "fisher":
            seconds["compression"] += splitting_seconds(counts, found)
    if config.closed_loop:
        seconds["closed loop"] = loop_seconds(counts, config.loop_tokens, found)
        # there the zeros of every matrix are chosen once more
        if config.form == "sparse":
            seconds["closed loop"] += splitting_seconds(counts, found)
    return seconds

def duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
