"""Which runs of experiments/isoflop.py come next: a pure function of the losses so far.

Every row that is compared walks over pairs (lr, aux_lr) in steps of 2, as many of them as any other row: the
start, then the untried pairs nearest to the best so far. Four more trials change weight decay and momentum at
the best pair. The best of all is the row's at that length, and its walk for the next length starts there."""
import itertools
import math

# first of ours: it imports nanolost before torch
from experiments.arms import (
    ADAMW,
    DENSE_START,
    FULL_RANK,
    LARGE,
    MAIN,
    PRODUCT,
    ROWS,
    SMALL,
    TRANSFER,
    VARIANTS,
    Config,
    Trial,
    against,
    check_numbers,
    lengths,
    parameters,
)
from experiments.runs import chosen
from nanolost.errors import UserError

# trial → validation loss, infinite where it diverged
Losses = dict[Trial, float]

# --- the walk ---

# exponents of 2 of lr and aux_lr
Point = tuple[int, int]

def best_point(tried: dict[Point, float]) -> Point:
    # of equals the first in order, so that the walk is the same whoever takes it
    return min(tried, key=lambda point: (tried[point], point))

def nearest(tried: dict[Point, float]) -> list[Point]:
    """The untried points that are nearest to the best one, all at one distance."""
    i, j = best_point(tried)
    # farther than all of them is always one that is untried
    reach = range(-len(tried), len(tried) + 1)
    rings = {}
    for a, b in itertools.product(reach, reach):
        point = (i + a, j + b)
        if point not in tried:
            rings.setdefault(a * a + b * b, []).append(point)
    return rings[min(rings)]

def walk(loss_of, trials: int) -> tuple[dict[Point, float], list[Point]]:
    """(the points that were tried with their losses, those to be tried next) after (0, 0), `trials` of them
    in all. loss_of: a point → its loss, None for one that has yet to come."""
    tried = {}
    batch = [(0, 0)]
    while len(tried) < trials:
        # a whole ring before the best is looked at again: what is tried must not depend on who is quicker
        batch = batch[:trials - len(tried)]
        losses = {point: loss_of(point) for point in batch}
        missing = [point for point in batch if losses[point] is None]
        if missing:
            return tried, missing
        tried |= losses
        batch = nearest(tried)
    return tried, []

def bracketed(tried: dict[Point, float]) -> bool:
    """Whether the best point has a worse one on both sides, in both directions."""
    i, j = best_point(tried)
    sides = {(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)}
    return sides <= tried.keys()

# --- rates ---

# where the walks start: alike for all rows of an optimizer
START = {"lr": 1.2e-2, "aux_lr": 4.8e-2, "weight_decay": 0.01, "momentum": 0.95}
START_ADAMW = {**START, "lr": 6e-3, "aux_lr": 6e-3}
# tried at the best pair
OTHERS = (
    {"weight_decay": 0.0},
    {"weight_decay": 0.05},
    {"momentum": 0.9},
    {"momentum": 0.98},
)
# where a length is not worth a walk
AROUND = (1, 0.5, 2)

def at(trial: Trial, point: Point) -> Trial:
    """The trial moved by factors of 2, which a float takes exactly."""
    i, j = point
    return trial._replace(lr=trial.lr * 2.0**i, aux_lr=trial.aux_lr * 2.0**j)

def around(trial: Trial) -> list[Trial]:
    return [trial._replace(lr=trial.lr * factor) for factor in AROUND]

def check(config: Config):
    """UserError for flags with which nothing would run."""
    check_numbers(config)
    # a mistake in --rows is named there too
    stages = list(Stages(config, {}).every())
    if config.until and config.until not in stages:
        raise UserError(f"--until {config.until}: choose one of {', '.join(stages)}")

class Stages:
    """What is known and what comes next, by the losses `found`. Each list of trials holds those that are done
    as well."""

    def __init__(self, config: Config, found: Losses):
        self.config = config
        self.found = found
        self.rows = chosen(config, ROWS)
        self.lengths = lengths(config)
        # the last with a walk: long enough for other questions, and a night has time for dozens
        self.middle = max(0, len(self.lengths) - 2)
        # (row, number of a length) → its best trial
        self.known = {}

    def among(self, rows: dict) -> list[str]:
        """Those that --rows leaves."""
        return [row for row in rows if row in self.rows]

    def best_of(self, trials: list[Trial]) -> Trial | None:
        """None while one of them has yet to come, or where all diverged."""
        if not trials or any(trial not in self.found for trial in trials):
            return None
        best = min(trials, key=self.found.get)
        return best if self.found[best] < math.inf else None

    # --- one row at one length, the i-th ---

    def start(self, row: str, i: int) -> Trial | None:
        """Where its walk starts; None while that is not known."""
        if i == 0:
            start = START_ADAMW if row in ADAMW else START
            return Trial(row, self.lengths[0], **start, batch=self.config.batch_tokens, seed=0)
        before = self.best(row, i - 1)
        if before is None:
            return None
        # what was tried beside the walk is tried again
        usual = {name: START[name] for name in ("weight_decay", "momentum")}
        return before._replace(length=self.lengths[i], **usual)

    def walked(self, row: str, i: int) -> tuple[Trial, dict, list[Point]] | None:
        """(where the walk starts, its points with their losses, its next points)."""
        start = self.start(row, i)
        if start is None:
            return None
        def loss_of(point):
            return self.found.get(at(start, point))
        return start, *walk(loss_of, self.config.trials)

    def grid(self, row: str, i: int) -> list[Trial]:
        """All trials of a walk that are known by now, and then the ones beside its best."""
        walked = self.walked(row, i)
        if walked is None:
            return []
        start, tried, missing = walked
        trials = [at(start, point) for point in [*tried, *missing]]
        best = self.best_of(trials)
        if best is None:
            return trials
        for other in OTHERS:
            # AdamW has no such momentum
            if row not in ADAMW or "momentum" not in other:
                trials.append(best._replace(**other))
        return trials

    def has_walk(self, i: int) -> bool:
        return i == 0 or i < len(self.lengths) - 1

    def choosing(self, row: str, i: int) -> list[Trial]:
        """The trials by which the rates of a row are chosen."""
        if self.has_walk(i):
            return self.grid(row, i)
        best = self.best(row, i - 1)
        thorough = self.thorough()
        if best is None or thorough is None:
            return []
        best = best._replace(length=self.lengths[i])
        return around(best) if row in thorough else [best]

    def best(self, row: str, i: int) -> Trial | None:
        """None while it is not known."""
        if (row, i) not in self.known:
            trials = self.choosing(row, i)
            self.known[row, i] = self.best_of(trials)
        return self.known[row, i]

    def arms(self) -> list[str] | None:
        """LOST's main rows, the best first, by the last length with a walk; None while one is to come."""
        losses = {}
        for row in self.among(MAIN):
            if row.startswith("dense"):
                continue
            best = self.best(row, self.middle)
            if best is None:
                return None
            losses[row] = self.found[best]
        return sorted(losses, key=losses.get)

    def thorough(self) -> list[str] | None:
        """Rows with three rates at the last length: dense, the two best arms, whatever changes an arm."""
        arms = self.arms()
        if arms is None:
            return None
        return ["dense", *arms[:2], *VARIANTS]

    # --- parts of the queue ---

    def rates(self, rows: dict) -> list[Trial]:
        """Length by length."""
        trials = []
        for i in range(len(self.lengths)):
            for row in self.among(rows):
                trials += self.choosing(row, i)
        return trials

    def seeds(self, trials: list[Trial | None]) -> list[Trial]:
        """The seeds of the comparison: one of all trials before the next, so that what is cut compares."""
        found = []
        for seed in range(1, self.config.seeds + 1):
            # some are not chosen yet
            found += [trial._replace(seed=seed) for trial in trials if trial]
        return found

    def seeds_of_rows(self, rows: dict) -> list[Trial]:
        best = []
        for i in range(len(self.lengths)):
            best += [self.best(row, i) for row in self.among(rows)]
        return self.seeds(best)

    def compared(self, rows: dict) -> list[Trial]:
        return self.rates(rows) + self.seeds_of_rows(rows)

    def resized(self, row: str, factor: float) -> list[Trial]:
        """Three rates of a row with another batch, on as many tokens as the middle length has."""
        best = self.best(row, self.middle)
        if best is None:
            return []
        batch = int(self.config.batch_tokens * factor)
        return around(best._replace(batch=batch))

    def batches(self) -> list[Trial]:
        """Dense and the best arm with half and twice the batch: what updates do and what tokens."""
        arms = self.arms() or []
        trials = []
        best = []
        for row in ["dense", *arms[:1]]:
            for factor in (0.5, 2):
                own = self.resized(row, factor)
                trials += own
                best.append(self.best_of(own))
        return trials + self.seeds(best)

    def sized(self, row: str, per_parameter: int) -> Trial | None:
        """A row of another size, at so many tokens for each parameter of its dense row."""
        dense = against(row)
        like = "dense" if row == dense else "LOST 144 r 60"
        best = self.best(like, self.middle)
        if best is None:
            return None
        tokens = per_parameter * parameters(self.config, dense)
        length = max(1, tokens // self.config.batch_tokens)
        return best._replace(row=row, length=length)

    def size(self, rows: dict) -> list[Trial]:
        """10 and 20 tokens a parameter, the rates chosen at 10."""
        trials = []
        best = []
        for row in self.among(rows):
            short = self.sized(row, 10)
            # the middle length has not told yet
            if short is None:
                continue
            own = around(short)
            trials += own
            chosen = self.best_of(own)
            if chosen:
                longer = self.sized(row, 20).length
                best += [chosen, chosen._replace(length=longer)]
        return trials + self.seeds(best)

    def ranks(self) -> list[Trial]:
        trials = []
        for row in self.among(TRANSFER):
            trials += self.grid(row, 0)
        return trials

    def adamw(self) -> list[Trial]:
        """Up to the middle length, near to where the first page has these rows."""
        rows = self.among(ADAMW)
        trials = []
        for i in range(self.middle + 1):
            for row in rows:
                trials += self.grid(row, i)
        best = [self.best(row, self.middle) for row in rows]
        return trials + self.seeds(best)

    # --- the queue ---

    def every(self) -> dict[str, list[Trial]]:
        """Stage → its trials that are known by now, in the order of the queue: what is last is cut first."""
        return {
            "rates": self.rates(MAIN),
            "seeds": self.seeds_of_rows(MAIN),
            "batch": self.batches(),
            "full rank": self.compared(FULL_RANK),
            "dense start": self.compared(DENSE_START),
            "half the size": self.size(SMALL),
            "product Muon": self.compared(PRODUCT),
            "rates over ranks": self.ranks(),
            "three times the size": self.size(LARGE),
            "AdamW": self.adamw(),
        }

    def pending(self) -> dict[str, list[Trial]]:
        """Stage → what could be trained now, up to the last stage that is wanted."""
        # a later stage may ask for what an earlier one has
        seen = {*self.found}
        todo = {}
        for stage, trials in self.every().items():
            todo[stage] = []
            for trial in trials:
                if trial not in seen and trial.row in self.rows:
                    todo[stage].append(trial)
                    seen.add(trial)
            if stage == self.config.until:
                break
        return todo
