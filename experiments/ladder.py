"""Loss against compute over several widths: loss = a · FLOPs^-b, fitted to rows of experiments/controls.py.

    python experiments/ladder.py run   --rows "dense/LOST/LOST, Muon" --data_dir data/controls
    python experiments/ladder.py table --rows "dense/LOST/LOST, Muon" --data_dir data/controls

`run` trains the rows at each width, with a sweep of learning rates for each, in folders width-N/ROW/lr-seed;
the same command continues. `table` prints losses and fits and draws them in ladder.png."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import dataclasses
import math
import statistics
from dataclasses import dataclass

import numpy as np

# first of ours: it imports nanolost before torch
from experiments import controls
from experiments.runs import chosen, drive
from experiments.tables import fill, markdown, pyplot, save_figure, spread
from model import MODELS
from nanolost.counts import count_parameters
from nanolost.errors import UserError
from nanolost.flags import flag, say

# Student's t for 95 %, both sides, by degrees of freedom: a ladder has few sizes
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}

@dataclass(frozen=True)
class Config(controls.Config):
    widths: tuple[float, ...] = flag((64, 96, 128, 192), "n_embd of each size")

@dataclass
class Point:
    """One row at one size. flops: of its whole training."""
    width: int
    lr: float
    parameters: int
    flops: float
    losses: list[float]

def at_width(config: Config, width: float) -> controls.Config:
    """The flags of experiments/controls.py for one size."""
    names = [f.name for f in dataclasses.fields(controls.Config)]
    given = {name: getattr(config, name) for name in names}
    # the size itself has a recipe, and its runs are those of the controls
    if width != MODELS[config.model]["n_embd"]:
        given["width"] = int(width)
        given["out_dir"] = os.path.join(config.out_dir, f"width-{width:g}")
    return controls.Config(**given)

def sizes(config: Config) -> list[controls.Config]:
    if config.width is not None:
        raise UserError("--width means nothing to a ladder: give its --widths")
    if config.results:
        raise UserError("--results means nothing to a ladder: each size has a file of its own in out_dir")
    # 32 features a head
    wrong = [width for width in config.widths if width < 32 or width % 32]
    if wrong:
        raise UserError(f"--widths {wrong[0]:g}: must be a multiple of 32")
    return [at_width(config, width) for width in config.widths]

def train(config: Config):
    for size in sizes(config):
        controls.train(size)

# --- the fit ---

def fit_line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope and constant of the line of least squares, and half the 95 % interval of the slope."""
    slope, fixed = np.polyfit(x, y, 1)
    free = len(x) - 2
    # through two points goes a line without any error
    if free < 1:
        return slope, fixed, math.inf
    error = np.array(y) - fixed - slope * np.array(x)
    variance = np.square(error).sum() / free / (len(x) * np.var(x))
    # with more degrees of freedom t is smaller: too wide an interval, not too narrow
    return slope, fixed, T_95[min(free, max(T_95))] * math.sqrt(variance)

def point(size: controls.Config, width: float, row: str) -> Point:
    """UserError where the row diverged or has not been trained."""
    found = controls.experiment(size)
    finished = found.finished(row)
    if not finished:
        raise UserError(f"{row} has no result at width {width:g}: run first, with the same flags")
    if len(finished) < len(found.results(row)):
        raise UserError(f"{row} diverged at width {width:g}: give other --lrs, or --rows without it")
    model = controls.build(size, controls.matched(size, row))
    tokens = next(iter(finished.values()))["tokens"]
    losses = [result["val_loss"] for result in finished.values()]
    total = controls.flops(size, row) * tokens
    return Point(int(width), found.best_lr(row), count_parameters(model), total, losses)

def fit_points(points: list[Point]) -> tuple[float, float, float]:
    """`fit_line` of log loss over log FLOPs."""
    x = [math.log(one.flops) for one in points]
    y = [math.log(statistics.mean(one.losses)) for one in points]
    return fit_line(x, y)

# --- what is shown ---

def tables(points: dict[str, list[Point]]) -> str:
    body = []
    fits = []
    for row, own in points.items():
        for one in own:
            loss = spread(one.losses, ".3f")
            compute = f"{one.flops / 1e12:.3g}"
            body.append([row, one.width, f"{one.lr:g}", f"{one.parameters:,}", compute, loss])
        slope, fixed, half = fit_points(own)
        fits.append([row, f"{-slope:.4f} ± {half:.4f}", f"{math.exp(fixed):.2f}"])
    return "\n".join([
        markdown(["", "width", "lr", "parameters", "10¹² FLOPs", "loss"], body),
        "loss = a · FLOPs^-b through the means of the sizes, b with its 95 % interval\n",
        markdown(["", "b", "a"], fits),
    ])

def draw(points: dict[str, list[Point]], config: Config):
    figure, axes = pyplot().subplots(figsize=(6.5, 4.5))
    for row, own in points.items():
        x = np.array([one.flops for one in own])
        slope, fixed, _ = fit_points(own)
        line, = axes.loglog(x / 1e12, np.exp(fixed) * x ** slope, label=row)
        means = [statistics.mean(one.losses) for one in own]
        # one seed has no deviation
        noise = [statistics.stdev(one.losses) if len(one.losses) > 1 else 0 for one in own]
        axes.errorbar(x / 1e12, means, noise, fmt="o", capsize=3, color=line.get_color())
    axes.set(xlabel="training compute, 10¹² FLOPs", ylabel="validation loss (nats a token)",
             title=f"{len(config.widths)} sizes, {config.steps} steps each")
    # plain numbers: 3.9, not 3.9 · 10⁰
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save_figure(figure, config.out_dir, "ladder.png")

def table(config: Config):
    """Print the tables, or put them between the markers of a document, and draw the figure."""
    points = {}
    for row in chosen(config, controls.ROWS):
        pairs = zip(sizes(config), config.widths, strict=True)
        points[row] = [point(size, width, row) for size, width in pairs]
    if config.fill:
        fill(config.fill, "ladder", tables(points))
    else:
        say(tables(points))
    return draw(points, config)

if __name__ == "__main__":
    drive({"run": train, "table": table}, Config, __doc__)
