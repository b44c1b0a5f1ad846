"""Differences between rows of experiments/isoflop.py, and the rule by which one counts.

A pair is two runs of one seed: the same order of the data, and the same dense start where the shapes agree.
Of n pairs with mean m and deviation s a difference counts when |m| > 2 s / √n, with three pairs at least."""
import math
import os
import statistics
from typing import NamedTuple

import numpy as np

# first of ours: it imports nanolost before torch
from experiments.arms import Config, Trial
from experiments.ladder import fit_line
from experiments.runs import read_lines
from experiments.tables import spread
from nanolost.errors import UserError

LEAST_PAIRS = 3

# --- results ---

# trial → its line in the file of results
Results = dict[Trial, dict]

def trial_of(line: dict) -> Trial:
    try:
        return Trial(*(line[name] for name in Trial._fields))
    except (KeyError, TypeError):
        raise UserError(f"{str(line):.80} is no result of isoflop.py: remove it from --results") from None

def results(config: Config) -> Results:
    if not os.path.exists(config.results):
        return {}
    lines = read_lines(config.results)
    return {trial_of(line): line for line in lines}

def losses(found: Results) -> dict[Trial, float]:
    """Trial → validation loss at the end, infinite where it diverged."""
    return {trial: line.get("val_loss", math.inf) for trial, line in found.items()}

def seeds_of(found: Results, trial: Trial) -> dict[int, dict]:
    """Seed → result of a trial whose rates are chosen, without the seed that chose them."""
    own = {}
    for other, line in found.items():
        same = other._replace(seed=trial.seed) == trial
        # seed 0 is better at its own choice than it would be at another's
        if same and other.seed > 0 and "val_loss" in line:
            own[other.seed] = line
    return dict(sorted(own.items()))

def mean_loss(lines: dict[int, dict]) -> float:
    return statistics.mean(line["val_loss"] for line in lines.values())

# --- the rule ---

class Gap(NamedTuple):
    """A row's loss above its dense row's in nats, a number for each pair."""

    pairs: list[float]

    def mean(self) -> float:
        return statistics.mean(self.pairs)

    def error(self) -> float:
        """Twice the standard error, infinite where the pairs are too few to say."""
        count = len(self.pairs)
        if count < LEAST_PAIRS:
            return math.inf
        deviation = statistics.stdev(self.pairs)
        return 2 * deviation / math.sqrt(count)

    def counts(self) -> bool:
        return abs(self.mean()) > self.error()

    def shown(self) -> str:
        return spread(self.pairs, "+.3f")

def slopes(lengths: list[int], losses: list[float]) -> list[float]:
    """Of loss over the logarithm of updates, in nats for a factor of e, at each length."""
    x = np.log(lengths)
    # of one point nothing can be said
    if len(x) < 2:
        return [0.0] * len(x)
    # the parabola through three lengths, the line through two
    curve = np.polyfit(x, losses, min(2, len(x) - 1))
    steepness = np.polyval(np.polyder(curve), x)
    return [float(slope) for slope in steepness]

def gap(found: Results, own: Trial, dense: Trial, slope: float) -> Gap | None:
    """Over seeds that both have, None without any. slope: of dense's loss, by which the FLOPs that a row
    lacks to its budget are turned into nats."""
    mine = seeds_of(found, own)
    theirs = seeds_of(found, dense)
    pairs = []
    for seed in sorted(mine.keys() & theirs.keys()):
        line = mine[seed]
        other = theirs[seed]
        # the slope is negative: who had fewer would have come further down
        lacking = math.log(other["flops"] / line["flops"])
        at_equal = line["val_loss"] + slope * lacking
        pairs.append(at_equal - other["val_loss"])
    return Gap(pairs) if pairs else None

# --- where a gap ends ---

def crossing(lengths: list[int], gaps: list[float]) -> float | None:
    """The updates at which a gap first goes through zero, on lines over the logarithm of updates."""
    x = np.log(lengths)
    for i in range(len(gaps) - 1):
        before = gaps[i]
        after = gaps[i + 1]
        if before == 0 or before * after < 0:
            share = before / (before - after)
            return math.exp(x[i] + share * (x[i + 1] - x[i]))
    return None

def crossing_with_interval(lengths: list[int], gaps: list[Gap]) -> tuple[float | None, ...]:
    """(at the means, where all gaps are larger by their error, smaller by it); None: nowhere."""
    means = [one.mean() for one in gaps]
    errors = [one.error() for one in gaps]
    at = crossing(lengths, means)
    # too few pairs for an interval
    if math.inf in errors:
        return at, None, None
    larger = np.add(means, errors)
    smaller = np.subtract(means, errors)
    return at, crossing(lengths, larger), crossing(lengths, smaller)

# --- frontiers ---

class Point(NamedTuple):
    """The mean over seeds of a row at a length. flops: of the whole training."""

    row: str
    length: int
    flops: float
    loss: float

def points(found: Results, trials: list[Trial]) -> list[Point]:
    """Of those of the trials that have any seed."""
    every = []
    for trial in trials:
        lines = seeds_of(found, trial)
        if lines:
            # alike for all seeds
            flops = next(iter(lines.values()))["flops"]
            every.append(Point(trial.row, trial.length, flops, mean_loss(lines)))
    return every

def frontier(every: list[Point]) -> list[Point]:
    """Without those that another reaches with no more FLOPs."""
    kept = []
    for point in sorted(every, key=lambda point: (point.flops, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept

def exponent(kept: list[Point]) -> tuple[float, float, float]:
    """b of loss = a · FLOPs^-b, half its 95 % interval, and a."""
    # a power law is a line there
    x = [math.log(point.flops) for point in kept]
    y = [math.log(point.loss) for point in kept]
    slope, fixed, half = fit_line(x, y)
    return -slope, half, math.exp(fixed)

def kind(row: str) -> str:
    # which begins dense and ends as LOST
    if row == "dense start":
        return "LOST"
    return "dense" if row.startswith("dense") else "LOST"
