"""LOST and dense at equal training FLOPs: tuned on both sides, paired seeds, three lengths.

    python experiments/isoflop.py plan      # what is still to be trained, in core-minutes
    python experiments/isoflop.py run       # trains it
    python experiments/isoflop.py table     # [--fill docs/experiments.md]
    python experiments/isoflop.py figure    # the gap to dense against updates
    python experiments/isoflop.py fit       # loss against FLOPs of both kinds [--fill docs/experiments.md]

`run` goes on from what --results and the runs' folders hold, and any number of processes may share it: each
run is locked while it trains, and on a common disk they take what the others leave. Machines without one take
different --only, and their lines are put together. experiments/arms.py has the arms, experiments/stages.py
the order of the runs, experiments/gaps.py the rule by which a difference counts."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import importlib.metadata
import json
import math
import statistics
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

# first of ours: it imports nanolost before torch
from experiments import arms, gaps
from experiments.arms import ROWS, Config, Trial, against, name_of
from experiments.runs import Processes, chosen, drive, read_lines, revision
from experiments.stages import Stages, bracketed
from experiments.tables import fill, markdown, pyplot, save_figure, spread
from nanolost.errors import UserError
from nanolost.files import claim, read_json, write_atomic
from nanolost.flags import say

# FLOPs a second of one core, before a run has told
SPEED = 0.14e12

# --- results ---

def trial_of(line: dict) -> Trial:
    try:
        return Trial(*(line[name] for name in Trial._fields))
    except (KeyError, TypeError):
        raise UserError(f"{str(line):.80} is no result of isoflop.py: remove it from --results") from None

def results(config: Config) -> gaps.Results:
    """Trial → its line."""
    if not os.path.exists(config.results):
        return {}
    return {trial_of(line): line for line in read_lines(config.results)}

def losses(found: gaps.Results) -> dict[Trial, float]:
    return {trial: line.get("val_loss", math.inf) for trial, line in found.items()}

def epochs(config: Config, tokens: int) -> float | None:
    """How often a run has read its text; None for shards without a manifest."""
    path = os.path.join(config.data_dir, "manifest.json")
    if not os.path.exists(path):
        return None
    shards = read_json(path)["shards"]
    return tokens / sum(shard["tokens"] for shard in shards if shard["split"] == "train")

def line_of(config: Config, trial: Trial, commit: str | None) -> dict:
    """What a finished run leaves for good."""
    run = arms.run_of(config, trial)
    torch = importlib.metadata.version("torch")
    line = {**trial._asdict(), "commit": commit, "torch": torch, **run.summary()}
    # means over layers, which no table here has
    line.pop("layers", None)
    line["updates"] = arms.updates(config, trial)
    line["flops"] = arms.total_flops(config, trial)
    if "diverged" not in line:
        line["seconds"] = line["tokens"] / line["tokens_per_second"]
        line["epochs"] = epochs(config, line["tokens"])
        line["curve"] = [[entry["step"], entry["val_loss"]] for entry in run.records("eval")]
    return line

def keep(config: Config, line: dict):
    """Add a line to --results, which several processes may want to do at once."""
    folder = os.path.dirname(os.path.abspath(config.results))
    os.makedirs(folder, exist_ok=True)
    while True:
        try:
            lock = claim(os.path.join(config.out_dir, "locks", "results"), "writes results")
            break
        except UserError:
            time.sleep(0.05)
    with lock:
        found = results(config) | {trial_of(line): line}
        lines = [json.dumps(line, ensure_ascii=False) for line in found.values()]
        write_atomic(config.results, ("\n".join(lines) + "\n").encode())

# --- the queue ---

class Queue(Processes):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # whose runs this process trains
        self.own = chosen(config, ROWS)
        if config.only:
            self.own = [row.strip() for row in config.only.split("/")]
            unknown = [row for row in self.own if row not in ROWS]
            if unknown:
                raise UserError(f"--only {'/'.join(unknown)}: choose from {'/'.join(ROWS)}")

    def pending(self) -> list[Trial]:
        stages = Stages(self.config, losses(results(self.config))).pending()
        return [trial for trials in stages.values() for trial in trials if trial.row in self.own]

    def train(self):
        # a folder that cannot be written is a mistake, and not another queue's lock
        claim(os.path.join(self.config.out_dir, "locks", f"queue-{os.getpid()}"), "queues runs").close()
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                workers = [pool.submit(self.work) for _ in range(self.config.jobs)]
                done, _ = wait(workers, return_when=FIRST_EXCEPTION)
                for worker in done:
                    # raises what was raised there
                    worker.result()
            finally:
                self.stop()

    def work(self):
        """Take the first run that nobody has, until there is none."""
        while not self.stopping:
            todo = self.pending()
            if not todo:
                return
            if not any(self.take(trial) for trial in todo):
                # what comes next depends on runs of others
                time.sleep(self.config.wait)

    def take(self, trial: Trial) -> bool:
        """Train one run, unless somebody else does."""
        place = os.path.join(self.config.out_dir, "locks", trial.row, name_of(trial))
        try:
            lock = claim(place, "trains")
        except UserError:
            return False
        with lock:
            # it may have ended since the queue was looked at
            if trial not in results(self.config):
                self.train_one(trial)
        return True

    def train_one(self, trial: Trial):
        run = arms.run_of(self.config, trial)
        # before it, because files may change while it trains
        commit = revision()
        if not run.finished():
            self.start(run)
        if not self.stopping:
            line = line_of(self.config, trial, commit)
            keep(self.config, line)
            say(f"{trial.row}, {name_of(trial)}: {line.get('val_loss', math.inf):.4f}")

def check(config: Config):
    """UserError for flags with which nothing would run."""
    arms.check(config)
    # as for all rows; a mistake in --rows is named there too
    stages = list(Stages(config, {}).every())
    if config.until and config.until not in stages:
        raise UserError(f"--until {config.until}: choose one of {', '.join(stages)}")

def run(config: Config):
    """Train what is missing. An error or a signal starts no more and stops those that train."""
    check(config)
    Queue(config).train()

# --- what it costs ---

def speed(found: gaps.Results) -> float:
    """FLOPs a second of a core, the median of the runs that there are."""
    known = [line["flops"] / line["seconds"] for line in found.values() if "seconds" in line]
    return statistics.median(known) if known else SPEED

def minutes(config: Config, trial: Trial, rate: float) -> float:
    """Of a core, with the evaluations."""
    flags = arms.flags_of(config, trial)
    evaluations = math.ceil(flags["steps"] / flags["eval_every"])
    # forward is a third of an update
    evaluated = evaluations * flags["eval_tokens"] / 3 * arms.flops(config, trial.row)
    return (arms.total_flops(config, trial) + evaluated) / rate / 60

def foreseen(config: Config, found: gaps.Results) -> dict[str, list[Trial]]:
    """Stage → all of its trials that are not done, as if no loss yet to come told one rate from another:
    their number is the same for any."""
    known = losses(found)
    stages = {}
    while True:
        pending = Stages(config, known).pending()
        new = [trial for trials in pending.values() for trial in trials]
        if not new:
            return stages
        for stage, trials in pending.items():
            stages.setdefault(stage, []).extend(trials)
        known |= dict.fromkeys(new, 10.0)

def plan(config: Config):
    """Print the runs that are to come and their core-minutes, in the order in which they would be made."""
    check(config)
    found = results(config)
    rate = speed(found)
    body = []
    total = 0.0
    for stage, trials in foreseen(config, found).items():
        own = sum(minutes(config, trial, rate) for trial in trials)
        total += own
        by_length = {}
        for trial in trials:
            by_length[trial.length] = by_length.get(trial.length, 0) + 1
        runs = ", ".join(f"{count} of {length}" for length, count in sorted(by_length.items()))
        body.append([stage, len(trials), runs, f"{own:,.0f}", f"{total:,.0f}"])
    say(markdown(["stage", "runs", "updates of dense", "core-minutes", "up to here"], body))
    say(f"at {rate / 1e12:.3f} TFLOP a second of a core; {len(found)} runs are done")

# --- the tables ---

class Answer:
    """What tables and figures are made of."""

    def __init__(self, config: Config):
        check(config)
        self.config = config
        self.results = results(config)
        self.stages = Stages(config, losses(self.results))
        self.lengths = arms.lengths(config)
        if not self.results:
            raise UserError(f"{config.results} has no result: run first, with the same flags")
        self.rows = chosen(config, ROWS)

    def best(self, row: str, length: int) -> Trial | None:
        """The trial whose seeds a row is compared by."""
        if length in self.lengths and against(row) == "dense":
            return self.stages.best(row, self.lengths.index(length))
        return self.with_seeds(row, length, self.config.batch_tokens)

    def with_seeds(self, row: str, length: int, batch: int) -> Trial | None:
        """Rows without a walk have seeds of one trial at most."""
        for trial in self.results:
            if trial.seed and (trial.row, trial.length, trial.batch) == (row, length, batch):
                return trial._replace(seed=0)
        return None

    def of_row(self, row: str) -> list[int]:
        """The lengths at which a row has seeds."""
        found = {trial.length for trial in self.results if trial.row == row and trial.seed}
        best = {length: self.best(row, length) for length in sorted(found)}
        return [length for length, trial in best.items() if trial and gaps.seeds_of(self.results, trial)]

    def slope(self, dense: str, length: int) -> float:
        """Of dense's loss over the logarithm of updates, from its own seeds at each length."""
        known = {}
        for other in self.of_row(dense):
            lines = gaps.seeds_of(self.results, self.best(dense, other)).values()
            known[other] = statistics.mean(line["val_loss"] for line in lines)
        if length not in known:
            return 0.0
        return gaps.slopes(list(known), list(known.values()))[list(known).index(length)]

    def gap(self, row: str, length: int) -> gaps.Gap | None:
        dense = against(row)
        own, theirs = self.best(row, length), self.best(dense, length)
        if row == dense or own is None or theirs is None:
            return None
        return gaps.gap(self.results, own, theirs, self.slope(dense, length))

    def tried(self, row: str, i: int) -> tuple[list[Trial], bool]:
        """The finished trials by which rates were chosen, and whether the best pair is bracketed."""
        trials = [trial for trial in self.stages.choosing(row, i) if trial in self.results]
        walked = self.stages.has_walk(i) and self.stages.walked(row, i)
        return trials, bool(walked and walked[1] and bracketed(walked[1]))

def rates(trial: Trial) -> str:
    shown = f"{trial.lr:g}/{trial.aux_lr:g}"
    if trial.weight_decay != 0.01:
        shown += f", wd {trial.weight_decay:g}"
    if trial.momentum != 0.95:
        shown += f", β {trial.momentum:g}"
    return shown

def grid_table(answer: Answer) -> str:
    """Every trial of seed 0: lr/aux_lr and loss, the best in bold."""
    body = []
    for i, length in enumerate(answer.lengths):
        for row in answer.rows:
            trials, both_sides = answer.tried(row, i) if against(row) in ("dense", row) else ([], False)
            if not trials:
                continue
            known = losses(answer.results)
            best = answer.stages.best_of(trials)
            cells = []
            for trial in trials:
                cell = f"{rates(trial)} → {known[trial]:.3f}"
                cells.append(f"**{cell}**" if trial == best else cell)
            body.append([length, row, len(trials), "yes" if both_sides else "no", "; ".join(cells)])
    return markdown(["updates of dense", "", "trials", "bracketed", "lr/aux_lr → loss of seed 0"], body)

def size_table(answer: Answer) -> str:
    body = []
    trained = {trial.row for trial in answer.results}
    for row in [row for row in answer.rows if row in trained]:
        dense = against(row)
        own = arms.flops(answer.config, row)
        share = arms.parameters(answer.config, row) / arms.parameters(answer.config, dense)
        body.append([row, f"{arms.parameters(answer.config, row):,}", f"{share:.3f}", f"{own / 1e6:.2f} M",
                     f"{arms.flops(answer.config, dense) / own:.3f}"])
    return markdown(["", "parameters", "of dense's", "FLOPs a token", "tokens, of dense's"], body)

def main_row(answer: Answer, row: str, length: int) -> list:
    best = answer.best(row, length)
    lines = list(gaps.seeds_of(answer.results, best).values())
    found = answer.gap(row, length)
    difference = counts = ""
    if found:
        difference = found.shown()
        counts = "yes" if found.counts() else "no"
    times = lines[0]["epochs"]
    text = f"{lines[0]['tokens'] / 1e6:.1f} M"
    # a text that is read again is worth less
    if times and times > 1:
        text += f", {times:.1f} epochs"
    chosen_by = len([trial for trial in answer.results if trial._replace(lr=best.lr) == best])
    shown = rates(best) if chosen_by > 1 else f"{rates(best)}, not tuned here"
    return [row, shown, text, len(lines), spread([line["val_loss"] for line in lines], ".3f"), difference,
            counts]

def main_table(answer: Answer) -> str:
    head = ["", "lr/aux_lr", "tokens", "seeds", "loss", "loss − dense's, in pairs", "counts"]
    parts = []
    for length in sorted({length for row in answer.rows for length in answer.of_row(row)}):
        rows = [row for row in answer.rows if length in answer.of_row(row)]
        parts.append(f"{length} updates of dense\n")
        parts.append(markdown(head, [main_row(answer, row, length) for row in rows]))
    return "\n".join(parts)

def batch_table(answer: Answer) -> str:
    """The gap of the arm that has other batches, at the middle length."""
    length = answer.lengths[answer.stages.middle]
    body = []
    for batch in sorted({trial.batch for trial in answer.results if trial.seed}):
        for row in [row for row in answer.rows if against(row) == "dense" and row != "dense"]:
            own, dense = (answer.with_seeds(one, length, batch) for one in (row, "dense"))
            found = own and dense and gaps.gap(answer.results, own, dense, answer.slope("dense", length))
            if found and batch != answer.config.batch_tokens:
                updates = arms.updates(answer.config, dense)
                body.append([row, batch, updates, found.shown(), "yes" if found.counts() else "no"])
    if not body:
        return ""
    head = ["", "tokens an update", "updates of dense", "loss − dense's, in pairs", "counts"]
    return f"{length * answer.config.batch_tokens:,} tokens in other batches\n\n" + markdown(head, body)

def transfer_table(answer: Answer) -> str:
    """The best rates of rows that differ in their rank."""
    body = []
    for row in [row for row in answer.rows if row in arms.TRANSFER or row == "LOST 128 r 32"]:
        best = answer.stages.best(row, 0)
        if best:
            body.append([row, rates(best), f"{answer.results[best]['val_loss']:.3f}"])
    if len(body) < 2:
        return ""
    head = ["", "best lr/aux_lr", "loss of seed 0"]
    return f"{answer.lengths[0]} updates: rates over ranks\n\n" + markdown(head, body)

def tables(answer: Answer) -> str:
    parts = [size_table(answer), main_table(answer), crossings(answer), batch_table(answer),
             transfer_table(answer), "The trials that chose the rates\n", grid_table(answer)]
    return "\n".join(part for part in parts if part)

def curve(answer: Answer, row: str) -> tuple[list[int], list[gaps.Gap]]:
    """(lengths, gaps) of a row, where it has pairs."""
    found = {length: answer.gap(row, length) for length in answer.of_row(row) if length in answer.lengths}
    found = {length: one for length, one in found.items() if one}
    return list(found), list(found.values())

def crossings(answer: Answer) -> str:
    body = []
    for row in answer.rows:
        at, own = curve(answer, row)
        if len(at) > 1 and against(row) == "dense":
            shown = [f"{value:,.0f}" if value else "none" for value in gaps.crossing_with_interval(at, own)]
            body.append([row, *shown])
    if not body:
        return ""
    head = ["", "updates at which the gap is zero", "with gaps higher by 2 s/√n", "lower"]
    return markdown(head, body)

def show(config: Config, name: str, text: str):
    if config.fill:
        fill(config.fill, name, text)
    else:
        say(text)

def table(config: Config):
    show(config, "isoflop", tables(Answer(config)))

# --- the figure and the fit ---

def figure(config: Config):
    """The gap to dense against updates, with 2 s / √n on both sides."""
    answer = Answer(config)
    drawn, axes = pyplot().subplots(figsize=(6.5, 4))
    for row in answer.rows:
        at, own = curve(answer, row)
        if at and against(row) == "dense":
            # without an error where pairs are too few for one
            errors = [one.error() if one.error() < math.inf else 0.0 for one in own]
            axes.errorbar(at, [one.mean() for one in own], errors, marker="o", capsize=3, label=row)
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
    """Loss against FLOPs along the frontier of each kind."""
    answer = Answer(config)
    body = []
    for kind in ("dense", "LOST"):
        rows = [row for row in answer.rows if gaps.kind(row) == kind and "AdamW" not in row]
        best = [answer.best(row, length) for row in rows for length in answer.of_row(row)]
        found = gaps.frontier(gaps.points(answer.results, best))
        if len(found) < 2:
            continue
        b, half, a = gaps.exponent(found)
        names = "; ".join(f"{point.row}, {point.length}: {point.loss:.3f}" for point in found)
        body.append([kind, len(found), f"{b:.4f} ± {half:.4f}", f"{a:.2f}", names])
    if not body:
        raise UserError(f"{config.results} has fewer than two lengths of any kind: run first")
    head = ["", "points", "b, 95 % interval", "a", "row, updates of its dense row: loss"]
    show(config, "isoflop-fit", markdown(head, body))

if __name__ == "__main__":
    drive({"plan": plan, "run": run, "table": table, "figure": figure, "fit": fit}, Config, __doc__)
