"""Differences between rows of experiments/isoflop.py, and the rule by which one counts.

A pair is two runs of one seed: the same order of the data, and the same dense start where the shapes agree.
Of n pairs with mean m and deviation s a difference counts when |m| > 2 s / √n, with three pairs at least."""
import math
import statistics
from typing import NamedTuple

import numpy as np

from experiments.arms import Trial
from experiments.ladder import fit_line
from experiments.tables import spread

# trial → its line of results
Results = dict[Trial, dict]

LEAST_PAIRS = 3

class Gap(NamedTuple):
    """A row's loss above its dense row's in nats, over pairs of seeds."""

    pairs: list[float]

    def mean(self) -> float:
        return statistics.mean(self.pairs)

    def error(self) -> float:
        """Twice the standard error, infinite where the pairs are too few to say."""
        if len(self.pairs) < LEAST_PAIRS:
            return math.inf
        return 2 * statistics.stdev(self.pairs) / math.sqrt(len(self.pairs))

    def counts(self) -> bool:
        return abs(self.mean()) > self.error()

    def shown(self) -> str:
        return spread(self.pairs, "+.3f")

def seeds_of(results: Results, trial: Trial) -> dict[int, dict]:
    """Seed → result of a trial whose rates are chosen, without the seed that chose them."""
    found = {}
    for other, line in results.items():
        if other._replace(seed=0) == trial._replace(seed=0) and other.seed and "val_loss" in line:
            found[other.seed] = line
    return dict(sorted(found.items()))

# --- what a FLOP is worth ---

def slopes(lengths: list[int], losses: list[float]) -> list[float]:
    """Of loss against the logarithm of updates, in nats for each factor of e, at each length: of the parabola
    through all points that are there."""
    x = np.log(lengths)
    if len(x) < 2:
        return [0.0] * len(x)
    curve = np.polyfit(x, losses, min(2, len(x) - 1))
    return [float(slope) for slope in np.polyval(np.polyder(curve), x)]

def gap(results: Results, own: Trial, dense: Trial, slope: float) -> Gap | None:
    """Of seeds that both have. slope: of dense's loss, by which FLOPs that a row lacks count for it; None
    without a pair."""
    mine = seeds_of(results, own)
    theirs = seeds_of(results, dense)
    pairs = []
    for seed in mine.keys() & theirs.keys():
        lacking = math.log(theirs[seed]["flops"] / mine[seed]["flops"])
        pairs.append(mine[seed]["val_loss"] + slope * lacking - theirs[seed]["val_loss"])
    return Gap(pairs) if pairs else None

# --- where a gap ends ---

def crossing(lengths: list[int], gaps: list[float]) -> float | None:
    """The updates at which a gap first goes through zero, on lines between the logarithms of the lengths."""
    for i in range(len(gaps) - 1):
        before, after = gaps[i], gaps[i + 1]
        if before == 0 or before * after < 0:
            share = before / (before - after)
            low, high = math.log(lengths[i]), math.log(lengths[i + 1])
            return math.exp(low + share * (high - low))
    return None

def crossing_with_interval(lengths: list[int], gaps: list[Gap]) -> tuple[float | None, ...]:
    """(at the means, where all gaps are larger by their error, smaller by it); None: none of the lengths."""
    if any(one.error() == math.inf for one in gaps):
        return crossing(lengths, [one.mean() for one in gaps]), None, None
    ends = [crossing(lengths, [one.mean() + sign * one.error() for one in gaps]) for sign in (0, 1, -1)]
    return ends[0], *ends[1:]

# --- frontiers ---

class Point(NamedTuple):
    row: str
    length: int
    flops: float
    loss: float

def points(results: Results, best: list[Trial]) -> list[Point]:
    """The mean over seeds of each of the trials that has any."""
    found = []
    for trial in best:
        lines = list(seeds_of(results, trial).values())
        if lines:
            loss = statistics.mean(line["val_loss"] for line in lines)
            found.append(Point(trial.row, trial.length, lines[0]["flops"], loss))
    return sorted(found, key=lambda point: point.flops)

def frontier(found: list[Point]) -> list[Point]:
    """Without those that another reaches with no more FLOPs."""
    kept = []
    for point in sorted(found, key=lambda point: (point.flops, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept

def exponent(found: list[Point]) -> tuple[float, float, float]:
    """b of loss = a · FLOPs^-b, half its 95 % interval, and a."""
    x = [math.log(point.flops) for point in found]
    slope, fixed, half = fit_line(x, [math.log(point.loss) for point in found])
    return -slope, half, math.exp(fixed)

def kind(row: str) -> str:
    return "dense" if row.startswith("dense") and row != "dense start" else "LOST"
