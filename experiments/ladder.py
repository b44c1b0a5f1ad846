"""Loss against compute over several widths: loss = a · FLOPs^-b, fitted to rows of experiments/controls.py.

    python experiments/ladder.py run   --rows "dense/LOST/LOST, Muon" --data_dir data/controls
    python experiments/ladder.py table --rows "dense/LOST/LOST, Muon" --data_dir data/controls

`run` trains the rows at each width, with a sweep of learning rates for each, in folders width-N/ROW/lr-seed;
the same command continues. `table` prints losses and fits and draws them in ladder.png."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import dataclasses
import math
import statistics
from dataclasses import dataclass

import numpy as np

# first of ours: it imports nanolost before torch
from experiments import controls
from experiments.runs import Rates, chosen, drive
from experiments.tables import markdown, pyplot, save_figure, show, spread
from model import MODELS
from nanolost.counts import count_parameters
from nanolost.errors import UserError
from nanolost.flags import flag

# Student's t for 95 %, both sides, by degrees of freedom: a ladder has few sizes
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}

@dataclass(frozen=True)
class Config(controls.Config):
    widths: Rates = flag((64, 96, 128, 192), "n_embd of each size")

@dataclass
class Point:
    """One row at one size. flops: of its whole training."""
    width: int
    lr: float
    parameters: int
    flops: float
    losses: list[float]

    def mean(self) -> float:
        return statistics.mean(self.losses)

    def noise(self) -> float:
        """Deviation over seeds; one seed has none that could be seen."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

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
    for width in config.widths:
        if width < 32 or width % 32:
            raise UserError(f"--widths {width:g}: must be a multiple of 32")
    return [at_width(config, width) for width in config.widths]

def train(config: Config):
    # one size after the other: the small ones show first whether rates and rows make sense
    for size in sizes(config):
        controls.train(size)

# --- the fit ---

Fit = tuple[float, float, float]

def fit_line(x: list[float], y: list[float]) -> Fit:
    """Slope and constant of the line of least squares, and half the 95 % interval of the slope."""
    # all sizes weigh the same: their noise is not well enough known to weigh by
    slope, fixed = np.polyfit(x, y, 1)
    free = len(x) - 2
    # through two points goes a line without any error
    if free < 1:
        return slope, fixed, math.inf
    error = np.array(y) - np.polyval([slope, fixed], x)
    noise = np.square(error).sum() / free
    # the standard error of a slope, by any book on regression
    deviation = math.sqrt(noise / (len(x) * np.var(x)))
    # with more degrees of freedom t is smaller: too wide an interval, not too narrow
    t = T_95[min(free, max(T_95))]
    return slope, fixed, t * deviation

def point(size: controls.Config, width: float, row: str) -> Point:
    """UserError where the row diverged or has not been trained."""
    found = controls.experiment(size)
    finished = found.finished(row)
    if not finished:
        raise UserError(f"{row} has no result at width {width:g}: run first, with the same flags")
    # a mean over some seeds here and over all there would bend the line
    if len(finished) < len(found.results(row)):
        raise UserError(f"{row} diverged at width {width:g}: give other --lrs, or --rows without it")
    model = controls.build(size, controls.matched(size, row))
    results = list(finished.values())
    # all seeds read as many
    tokens = results[0]["tokens"]
    return Point(
        width=int(width),
        lr=found.best_lr(row),
        parameters=count_parameters(model),
        flops=controls.flops(size, row) * tokens,
        losses=[result["val_loss"] for result in results],
    )

def fit_points(points: list[Point]) -> Fit:
    """`fit_line` of log loss over log FLOPs."""
    # a power law is a line there
    x = [math.log(one.flops) for one in points]
    y = [math.log(one.mean()) for one in points]
    return fit_line(x, y)

# --- what is shown ---

def tables(points: dict[str, list[Point]]) -> str:
    body = []
    fits = []
    for row, own in points.items():
        for one in own:
            body.append([
                row,
                one.width,
                f"{one.lr:g}",
                f"{one.parameters:,}",
                f"{one.flops / 1e12:.3g}",
                spread(one.losses, ".3f"),
            ])
        slope, fixed, half = fit_points(own)
        # b is positive where more compute helps
        exponent = f"{-slope:.4f} ± {half:.4f}"
        fits.append([row, exponent, f"{math.exp(fixed):.2f}"])
    head = ["", "width", "lr", "parameters", "10¹² FLOPs", "loss"]
    return "\n".join([
        markdown(head, body),
        "loss = a · FLOPs^-b through the means of the sizes, b with its 95 % interval\n",
        markdown(["", "b", "a"], fits),
    ])

def draw(points: dict[str, list[Point]], config: Config):
    # as wide as the text of a page
    figure, axes = pyplot().subplots(figsize=(6.5, 4.5))
    for row, own in points.items():
        x = np.array([one.flops for one in own])
        slope, fixed, _ = fit_points(own)
        fitted = np.exp(fixed) * x ** slope
        line, = axes.loglog(x / 1e12, fitted, label=row)
        # the points that it was fitted to, in its colour
        means = [one.mean() for one in own]
        noise = [one.noise() for one in own]
        color = line.get_color()
        axes.errorbar(x / 1e12, means, noise, fmt="o", capsize=3, color=color)
    axes.set_xlabel("training compute, 10¹² FLOPs")
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title(f"{len(config.widths)} sizes, {config.steps} steps each")
    # plain numbers: 3.9, not 3.9 · 10⁰
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save_figure(figure, config.out_dir, "ladder.png")

def table(config: Config):
    """Print the tables, or put them between the markers of a document, and draw the figure."""
    # checked before anything is read
    each = dict(zip(config.widths, sizes(config), strict=True))
    points = {}
    for row in chosen(config, controls.ROWS):
        points[row] = [point(each[width], width, row) for width in each]
    show(config.fill, "ladder", tables(points))
    return draw(points, config)

if __name__ == "__main__":
    drive({"run": train, "table": table}, Config, __doc__)
