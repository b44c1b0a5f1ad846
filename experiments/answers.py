"""Tables, figure and fit of experiments/isoflop.py, from its file of results alone."""
import math

# first of ours: it imports nanolost before torch
from experiments import arms, gaps
from experiments.arms import ROWS, Config, Trial, against
from experiments.gaps import losses, results, seeds_of
from experiments.runs import chosen
from experiments.stages import START, Stages, bracketed, check
from experiments.tables import markdown, pyplot, save_figure, show, spread
from nanolost.errors import UserError

class Answer:
    """What the tables are made of."""

    def __init__(self, config: Config):
        check(config)
        self.config = config
        self.results = results(config)
        if not self.results:
            raise UserError(f"{config.results} has no result: run first, with the same flags")
        self.stages = Stages(config, losses(self.results))
        self.lengths = arms.lengths(config)
        self.rows = chosen(config, ROWS)

    def best(self, row: str, length: int) -> Trial | None:
        """The trial whose seeds a row is compared by."""
        if length in self.lengths and against(row) == "dense":
            return self.stages.best(row, self.lengths.index(length))
        return self.with_seeds(row, length, self.config.batch_tokens)

    def with_seeds(self, row: str, length: int, batch: int) -> Trial | None:
        """The same of rows without a walk there, which have seeds of one trial at most."""
        for trial in self.results:
            same = (trial.row, trial.length, trial.batch) == (row, length, batch)
            if same and trial.seed > 0:
                return trial._replace(seed=0)
        return None

    def of_row(self, row: str) -> dict[int, Trial]:
        """Length → the trial of a row there, where it has seeds."""
        lengths = {trial.length for trial in self.results if trial.row == row}
        found = {}
        for length in sorted(lengths):
            best = self.best(row, length)
            if best and seeds_of(self.results, best):
                found[length] = best
        return found

    def slope(self, dense: str, length: int) -> float:
        """Of dense's loss over the logarithm of updates, 0 where it has no other length."""
        known = {}
        for other, trial in self.of_row(dense).items():
            known[other] = gaps.mean_loss(seeds_of(self.results, trial))
        slopes = gaps.slopes(list(known), list(known.values()))
        return dict(zip(known, slopes, strict=True)).get(length, 0.0)

    def gap(self, row: str, length: int) -> gaps.Gap | None:
        """None where there is no pair, and of dense to itself."""
        dense = against(row)
        own = self.best(row, length)
        other = self.best(dense, length)
        if row == dense or not own or not other:
            return None
        return gaps.gap(self.results, own, other, self.slope(dense, length))

    def curve(self, row: str) -> dict[int, gaps.Gap]:
        """Length → gap of a row to `dense`, at the lengths that all rows have."""
        found = {}
        if against(row) != "dense":
            return found
        for length in self.lengths:
            own = self.gap(row, length)
            if own:
                found[length] = own
        return found

# --- the comparison ---

def rates(trial: Trial) -> str:
    """lr/aux_lr, and what differs from where walks start."""
    shown = f"{trial.lr:g}/{trial.aux_lr:g}"
    if trial.weight_decay != START["weight_decay"]:
        shown += f", decay {trial.weight_decay:g}"
    if trial.momentum != START["momentum"]:
        shown += f", momentum {trial.momentum:g}"
    return shown

def verdict(found: gaps.Gap | None) -> list[str]:
    if found is None:
        return ["", ""]
    return [found.shown(), "yes" if found.counts() else "no"]

def is_tuned(answer: Answer, best: Trial) -> bool:
    """Whether more than one rate was tried at this length."""
    # by whatever stage: they differ in the rate alone
    tried = {trial.lr for trial in answer.results if trial._replace(lr=best.lr) == best}
    return len(tried) > 1

def size_table(answer: Answer) -> str:
    # also those that have no seeds yet
    trained = {trial.row for trial in answer.results}
    body = []
    for row in answer.rows:
        if row not in trained:
            continue
        dense = against(row)
        parameters = arms.parameters(answer.config, row)
        own = arms.flops(answer.config, row)
        body.append([
            row,
            f"{parameters:,}",
            f"{parameters / arms.parameters(answer.config, dense):.3f}",
            f"{own / 1e6:.2f} M",
            f"{arms.flops(answer.config, dense) / own:.3f}",
        ])
    head = ["", "parameters", "of dense's", "FLOPs a token", "tokens for dense's FLOPs"]
    return markdown(head, body)

def main_row(answer: Answer, row: str, best: Trial) -> list:
    lines = list(seeds_of(answer.results, best).values())
    # a reader must not take one run for a sweep
    shown = rates(best)
    if not is_tuned(answer, best):
        shown += ", not tuned here"
    text = f"{lines[0]['tokens'] / 1e6:.1f} M"
    # a text that is read again is worth less
    times = lines[0]["epochs"]
    if times and times > 1:
        text += f", {times:.1f} epochs"
    loss = spread([line["val_loss"] for line in lines], ".3f")
    return [row, shown, text, len(lines), loss, *verdict(answer.gap(row, best.length))]

def main_tables(answer: Answer) -> list[str]:
    """One of each length."""
    by_length = {}
    for row in answer.rows:
        # other sizes have lengths of their own
        for length, best in answer.of_row(row).items():
            cells = main_row(answer, row, best)
            by_length.setdefault(length, []).append(cells)
    head = ["", "lr/aux_lr", "tokens", "seeds", "loss", "loss − dense's, in pairs", "counts"]
    parts = []
    for length, body in sorted(by_length.items()):
        parts += [f"{length} updates of dense\n", markdown(head, body)]
    return parts

def crossing_table(answer: Answer) -> list[str]:
    body = []
    for row in answer.rows:
        own = answer.curve(row)
        # a line needs two ends
        if len(own) < 2:
            continue
        ends = gaps.crossing_with_interval(list(own), list(own.values()))
        cells = [f"{end:,.0f}" if end else "none" for end in ends]
        body.append([row, *cells])
    head = ["", "updates at which the gap is zero", "with gaps larger by 2 s/√n", "smaller by it"]
    return [markdown(head, body)] if body else []

# --- other questions ---

def batch_table(answer: Answer) -> list[str]:
    """The gap of the arm that has other batches, at the middle length."""
    length = answer.lengths[answer.stages.middle]
    slope = answer.slope("dense", length)
    batches = {trial.batch for trial in answer.results} - {answer.config.batch_tokens}
    body = []
    for batch in sorted(batches):
        dense = answer.with_seeds("dense", length, batch)
        for row in arms.MAIN:
            own = answer.with_seeds(row, length, batch)
            # one arm has them, and no other
            if row == "dense" or not own or not dense:
                continue
            found = gaps.gap(answer.results, own, dense, slope)
            updates = arms.updates(answer.config, dense)
            body.append([row, batch, updates, *verdict(found)])
    tokens = length * answer.config.batch_tokens
    head = ["", "tokens an update", "updates of dense", "loss − dense's, in pairs", "counts"]
    return [f"{tokens:,} tokens in other batches\n", markdown(head, body)] if body else []

def transfer_table(answer: Answer) -> list[str]:
    """The best rates of rows that differ in their rank."""
    body = []
    for row in ("LOST 128 r 32", *arms.TRANSFER):
        best = answer.stages.best(row, 0)
        if best:
            loss = answer.results[best]["val_loss"]
            body.append([row, rates(best), f"{loss:.3f}"])
    head = ["", "best lr/aux_lr", "loss of seed 0"]
    # one alone transfers nothing
    return [f"{answer.lengths[0]} updates: rates over ranks\n", markdown(head, body)] if len(body) > 1 else []

def grid_row(answer: Answer, row: str, i: int) -> list | None:
    """The trials of seed 0 at a length, the best in bold; None without any."""
    trials = [trial for trial in answer.stages.choosing(row, i) if trial in answer.results]
    if not trials:
        return None
    known = losses(answer.results)
    best = min(trials, key=known.get)
    cells = []
    for trial in trials:
        cell = f"{rates(trial)} → {known[trial]:.3f}"
        cells.append(f"**{cell}**" if trial == best else cell)
    both = "no"
    # the last length has three rates at most, on one line
    walked = answer.stages.walked(row, i) if answer.stages.has_walk(i) else None
    if walked and walked[1] and bracketed(walked[1]):
        both = "yes"
    return [answer.lengths[i], row, len(trials), both, "; ".join(cells)]

def grid_table(answer: Answer) -> list[str]:
    body = []
    for i in range(len(answer.lengths)):
        for row in answer.rows:
            # other sizes have three rates around another row's
            has_walk = row not in {**arms.SMALL, **arms.LARGE}
            cells = grid_row(answer, row, i) if has_walk else None
            if cells:
                body.append(cells)
    head = ["updates of dense", "", "trials", "bracketed", "lr/aux_lr → loss of seed 0"]
    return ["The trials that chose the rates\n", markdown(head, body)]

def tables(answer: Answer) -> str:
    return "\n".join([
        size_table(answer),
        *main_tables(answer),
        *crossing_table(answer),
        *batch_table(answer),
        *transfer_table(answer),
        *grid_table(answer),
    ])

# --- verbs ---

def table(config: Config):
    show(config.fill, "isoflop", tables(Answer(config)))

def figure(config: Config):
    """The gap to dense against updates, with 2 s / √n on both sides."""
    answer = Answer(config)
    drawn, axes = pyplot().subplots(figsize=(6.5, 4))
    for row in answer.rows:
        own = answer.curve(row)
        # dense itself, and rows of another size
        if not own:
            continue
        means = [one.mean() for one in own.values()]
        errors = [one.error() for one in own.values()]
        # no bar where the pairs are too few for one
        errors = [0.0 if error == math.inf else error for error in errors]
        axes.errorbar(list(own), means, errors, marker="o", capsize=3, label=row)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(answer.lengths, map(str, answer.lengths))
    axes.minorticks_off()
    axes.set_xlabel("updates of dense; every row has its training FLOPs")
    axes.set_ylabel("loss − dense's (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(drawn, config.out_dir, "isoflop.png")

def fit(config: Config):
    """Loss against FLOPs along the frontier of each kind, under Muon."""
    answer = Answer(config)
    body = []
    for kind in ("dense", "LOST"):
        trials = []
        for row in answer.rows:
            if gaps.kind(row) == kind and row not in arms.ADAMW:
                trials += answer.of_row(row).values()
        kept = gaps.frontier(gaps.points(answer.results, trials))
        # through one point goes any line
        if len(kept) < 2:
            continue
        b, half, a = gaps.exponent(kept)
        names = [f"{point.row}, {point.length}: {point.loss:.3f}" for point in kept]
        body.append([kind, len(kept), f"{b:.4f} ± {half:.4f}", f"{a:.2f}", "; ".join(names)])
    if not body:
        raise UserError(f"{config.results} has fewer than two lengths of any kind: run first")
    head = ["", "points", "b, 95 % interval", "a", "row, updates of its dense row: loss"]
    show(config.fill, "isoflop-fit", markdown(head, body))
