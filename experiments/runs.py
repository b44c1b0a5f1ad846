"""A queue of ordinary runs of train.py or finetune.py, which any number of hours can continue, and what came
out of them.

An experiment has rows, each with flags of the command. First seed 0 of a row trains at each learning rate of
a sweep, then all seeds at the best one. Rows that differ little from another may go by that one's sweep. Runs
that have finished are never repeated; each leaves one line in results.jsonl, from which a table can be
printed when the runs are gone."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from model import Llama
from nanolost.cores import usable_cores
from nanolost.errors import UserError
from nanolost.files import claim, read_json, write_atomic
from nanolost.flags import command, flag, parse, say
from nanolost.methods import build_model
from nanolost.settings import Config as TrainConfig
from nanolost.settings import resolve
from nanolost.tokenizer import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
# characters of a file of JSON lines; a run of 10,000 updates leaves 3 MB
LINES_LIMIT = 1 << 28
# flags that change no result
HARMLESS = {"out_dir", "keep", "save_every", "eval_every", "threads"}

# --- flags ---

Rates = tuple[float, ...]

@dataclass(frozen=True)
class Settings:
    """Flags that all experiments share. Frozen, so that what is computed from them can be kept."""

    # of files and numbers a driver has its own defaults
    data_dir: str = flag("data/controls", "folder of token shards", path=True)
    out_dir: str = flag("out/controls", "folder of the runs: ROW/lr-seed", path=True)
    steps: int = flag(200, "updates of each run, a tenth of them warm-up")
    lrs: Rates | None = flag(None, "learning rates of every sweep")
    widen: int = flag(4, "learning rates that a sweep may add where its best one is at an end")
    seeds: int = flag(3, "seeds of each row at the best learning rate")
    rows: str | None = flag(None, "rows to run or print, separated by / (all)")
    jobs: int = flag(usable_cores(), "runs at a time, a core each")
    extra: str = flag("", "more flags of the command, separated by spaces, for what no row sets")
    results: str | None = flag(None, "print the table of this file of results, not of the runs in out_dir",
                               path=True)
    fill: str | None = flag(None, "put the table into this file, between its two markers", path=True)

def check(config: Settings):
    """UserError for numbers with which nothing would run."""
    for name in ("steps", "seeds", "jobs"):
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"--{name} {value}: must be positive")
    if config.widen < 0:
        raise UserError(f"--widen {config.widen}: must not be negative")
    for lr in config.lrs or ():
        if not 0 < lr < math.inf:
            raise UserError(f"--lrs {lr}: must be positive and finite")

@functools.cache
def extra(config: Settings, cls=TrainConfig) -> dict:
    """The flags in --extra, of the command with the settings `cls`. UserError for one that the driver sets
    itself."""
    # paths have flags of the driver's own: no other value has a space in it
    given = parse(cls, config.extra.split())
    ours = {f.name for f in dataclasses.fields(config)}
    # of these a driver has many values
    ours |= {"lr", "seed"}
    clash = sorted(given.keys() & ours)
    if clash:
        raise UserError(f"--extra must not set {', '.join(clash)}: the driver does")
    return given

def chosen(config: Settings, rows: dict) -> list[str]:
    """The rows that --rows names, all of `rows` without it."""
    return some(config.rows, rows, "--rows")

def some(typed: str | None, rows: dict, flag: str) -> list[str]:
    """The rows whose names were typed behind `flag`, all of them for nothing."""
    if not typed:
        return list(rows)
    # each once, in the order that was typed
    names = list(dict.fromkeys(name.strip() for name in typed.split("/")))
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise UserError(f"{flag} {'/'.join(unknown)}: choose from {'/'.join(rows)}")
    return names

def drive(verbs: dict[str, Callable], cls, doc: str):
    """The program `DRIVER.py VERB [--FLAG VALUE …]`: verbs[VERB] gets the flags as a `cls`."""
    def main():
        # who types nothing wants to know what there is
        verb, *rest = sys.argv[1:] or ["--help"]
        if verb in ("--help", "-h"):
            parse(cls, ["--help"], doc)
        if verb not in verbs:
            raise UserError(f"unknown {verb}: use {', '.join(verbs)} or --help")
        # ends as Ctrl-C does, through `finally`: the runs are stopped, and continue another time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        config = cls(**parse(cls, rest, doc))
        # an experiment without runs of train.py has flags of its own
        if isinstance(config, Settings):
            check(config)
        verbs[verb](config)

    command(main)

# --- one command ---

def words_of(flags: dict) -> list[str]:
    """Flags as one types them."""
    words = []
    for name, value in flags.items():
        if isinstance(value, list):
            # a flag with several words
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={text(value)}")
    return words

def output_of(program: str, **flags) -> str:
    """Run one of our commands; what it prints. UserError with its last line where it fails."""
    argv = [sys.executable, os.path.join(ROOT, program), *words_of(flags)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        typed = " ".join(argv[1:])
        raise UserError(f"{typed} ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout

def last_line(text: str) -> str:
    _, _, last = text.strip().rpartition("\n")
    return last

def loss_of(folder: str, data_dir: str, seq_len: int, tokens: int) -> float:
    """That eval.py measures on so many tokens of the validation split."""
    said = output_of("eval.py", ckpt=folder, data_dir=data_dir, seq_len=seq_len, tokens=tokens)
    figures = json.loads(last_line(said))
    return figures["loss"]

# --- files of JSON lines ---

def read_lines(path: str) -> list[dict]:
    """The objects of a file of JSON lines. A last line without its end, as a kill leaves it, is left out.
    UserError for another line that is not JSON, or a file that cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read(LINES_LIMIT)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    # nothing of a file that has no line end yet
    whole = content[:content.rfind("\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} has a line that is not JSON ({e}): remove it") from None

def add_line(path: str, line: dict):
    """Append an object: what was measured stays, whatever ends the next one."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

# --- one run ---

class Key(NamedTuple):
    """Which run of an experiment."""

    row: str
    lr: float
    seed: int

def key_of(line: dict) -> Key:
    """Of a line of results.jsonl. UserError for a line of another file."""
    try:
        return Key(line["row"], line["lr"], line["seed"])
    except (KeyError, TypeError):
        raise UserError(f"{str(line):.80} is no result of an experiment: give its results.jsonl") from None

def folder_of(config: Settings, key: Key) -> str:
    # one level for rows: a shell's star then names the runs of one
    name = f"{key.lr:g}-{key.seed}"
    # whole, because train.py starts in the project's folder
    return os.path.abspath(os.path.join(config.out_dir, key.row, name))

def shapes(config: Settings, flags: dict) -> Llama:
    """The model of a run with these flags, on the meta device."""
    # --extra may change sizes that a row leaves alone
    full = resolve({**extra(config), **flags})
    tokenizer = os.path.join(config.data_dir, "tokenizer.json")
    full.vocab_size = Tokenizer.load(tokenizer).vocab_size
    return build_model(full, "meta")

def text(value) -> str:
    """A value as the command line of train.py has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    # a number by module
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)

# nothing of a run is kept in memory: what its folder says is read each time, so that it may change meanwhile
@dataclass(frozen=True)
class Run:
    """One run: its folder, its flags, and the script that trains it (train.py, finetune.py, or one that
    registers more kinds of layers before)."""

    folder: str
    flags: dict
    script: str = "train.py"

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def command(self) -> list[str]:
        script = os.path.join(ROOT, self.script)
        return [sys.executable, script, *words_of({**self.flags, "out_dir": self.folder})]

    def status(self) -> dict:
        # written whole or not at all: it can be read while the run goes on
        path = self.path("status.json")
        # a run that has not begun, or was killed before its first update
        if not os.path.exists(path):
            return {"state": "missing", "reason": ""}
        return read_json(path)

    def diverged(self) -> bool:
        """Whether a loss or gradient was not finite. That is a result: it would be so again."""
        status = self.status()
        return status["state"] == "failed" and "FloatingPointError" in status["reason"]

    def finished(self) -> bool:
        """Whether it has a result that stands. UserError if the run that is there had other flags."""
        done = self.status()["state"] == "finished" or self.diverged()
        if done:
            self.check()
        return done

    def check(self):
        was = read_json(self.path("config.json"))
        # through JSON, as the other side has been: lists for tuples
        flags = json.loads(json.dumps(self.flags))
        for name, value in flags.items():
            # what "auto" means was settled by the machine
            same = value in (was.get(name), "auto")
            if not same and name not in HARMLESS:
                raise UserError(f"{self.folder} was trained with --{name} {was.get(name)}, not {value}: name "
                                "another --out_dir")

    def records(self, kind: str) -> list[dict]:
        """The lines of metrics.jsonl of one kind, "train" or "eval"."""
        return [line for line in read_lines(self.path("metrics.jsonl")) if line.get("kind") == kind]

    def summary(self) -> dict:
        """What a table needs of a finished run, {"diverged": True} for one whose loss did not stay finite."""
        if self.diverged():
            return {"diverged": True}
        last = self.records("eval")[-1]
        # an evaluation after the last update may be the first to see it
        if not math.isfinite(last["val_loss"]):
            return {"diverged": True}
        # every log_every updates and at the end
        updates = self.records("train")
        speeds = [line["tokens_per_second"] for line in updates]
        result = {name: last[name] for name in ("val_loss", "val_ppl", "val_bpb")}
        result["tokens"] = updates[-1]["tokens"]
        # the median: the first updates warm up, and neighbours come and go
        result["tokens_per_second"] = statistics.median(speeds)
        if "layers" in last:
            result["layers"] = mean_of_layers(list(last["layers"].values()))
        return result

def mean_of_layers(layers: list[dict]) -> dict:
    """Of each number that `lost.diagnose` has for a layer, the mean over layers."""
    means = {}
    for name in layers[0]:
        means[name] = statistics.mean(layer[name] for layer in layers)
    return means

# --- many runs ---

def revision() -> str | None:
    """The commit of this program, "-dirty" behind it where files differ from it; None outside git."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True)
        return done.stdout.decode().strip()
    # there may be no git, or no repository: a table is worth having without
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        # results that a queue adds to are no program
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit

class Processes:
    """Runs that train, each in a process of its own, started by several threads."""

    def __init__(self):
        # of processes that train, by the threads that wait for them
        self.lock = threading.Lock()
        self.started = []
        self.stopping = False

    def start(self, run: Run):
        """One process, to its end. OSError or UserError with its last words where it left no result."""
        # one thread: as many runs as cores are quicker than one on all of them, and sums are alike everywhere
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.lock:
            # a thread may be on its way here when the others are told to stop
            if self.stopping:
                return
            process = subprocess.Popen(
                run.command(),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.started.append(process)
        words = process.communicate()[1].strip().splitlines()
        if run.finished() or self.stopping:
            return
        reason = words[-1] if words else "it was stopped: the same command continues"
        # train.py's exit codes: 2 is what a user can mend
        kind = UserError if process.returncode == 2 else ChildProcessError
        raise kind(f"{run.folder}: {reason}")

    def stop(self):
        with self.lock:
            self.stopping = True
        for process in self.started:
            # of no effect on those that have ended
            process.terminate()

class Experiment(Processes):
    """Rows of runs.

    run_of: Key → Run. swept: row → the row by whose sweep its learning rate is chosen. rates_of: row →
    learning rates that its sweep begins with. figure: of a run's summary the one that chooses among them, the
    smaller the better."""

    figure = "val_loss"

    def __init__(self, config: Settings, run_of: Callable, swept: dict, rates_of: Callable):
        super().__init__()
        self.config = config
        self.run_of = run_of
        self.swept = swept
        self.rates_of = rates_of
        self.file = os.path.join(config.out_dir, "results.jsonl")
        # results that came from elsewhere, in the place of the runs
        self.given = None
        if config.results:
            lines = read_lines(config.results)
            self.given = {key_of(line): line for line in lines}

    # --- results ---

    def result(self, key: Key) -> dict | None:
        """`Run.summary` of one run, None while it has yet to come."""
        # a rate halved or doubled is the same float in a file
        if self.given is not None:
            return self.given.get(key)
        run = self.run_of(key)
        return run.summary() if run.finished() else None

    def loss(self, key: Key) -> float | None:
        """`figure` at the end, infinite if the run diverged, None while it has yet to come."""
        result = self.result(key)
        if result is None:
            return None
        return result.get(self.figure, math.inf)

    def sweep(self, row: str) -> dict[float, float | None]:
        """Learning rate → loss of seed 0. While the best is at an end, the sweep goes on there by factors of
        2: the same rule for every row."""
        rates = sorted(self.rates_of(row))
        most = len(rates) + self.config.widen
        while True:
            losses = [self.loss(Key(row, lr, 0)) for lr in rates]
            # a best one at an end may hide a better one beyond it
            if None in losses or len(rates) == most:
                break
            best = losses.index(min(losses))
            if best == 0:
                rates.insert(0, rates[0] / 2)
            elif best == len(rates) - 1:
                rates.append(rates[-1] * 2)
            else:
                break
        return dict(zip(rates, losses, strict=True))

    def sweeps(self, rows: list[str]) -> dict[str, dict]:
        """The sweeps by which `rows` go, each once."""
        return {self.swept[row]: self.sweep(self.swept[row]) for row in rows}

    def best_lr(self, row: str) -> float | None:
        """Of the sweep that the row goes by; None while that is not through."""
        losses = self.sweep(self.swept[row])
        # what is best so far may not be best in the end
        if None in losses.values():
            return None
        return min(losses, key=losses.get)

    def results(self, row: str) -> dict[int, dict]:
        """Seed → result at the row's learning rate, of the runs that have one."""
        lr = self.best_lr(row)
        if lr is None:
            return {}
        found = {}
        for seed in range(self.config.seeds):
            result = self.result(Key(row, lr, seed))
            if result is not None:
                found[seed] = result
        return found

    def finished(self, row: str) -> dict[int, dict]:
        """`results` without those that diverged."""
        found = self.results(row)
        return {seed: found[seed] for seed in found if self.figure in found[seed]}

    def begun(self, rows: list[str]) -> list[str]:
        """Those of `rows` that a table has numbers of. UserError where there are none, or where --fill would
        put fewer of them into a document than were asked for: its old numbers may be all that is left."""
        begun = [row for row in rows if self.finished(row)]
        where = self.config.results or self.config.out_dir
        if not begun:
            raise UserError(f"no run is finished in {where}: run first, with the same flags")
        # one that diverged with every seed has no numbers, and never will
        missing = [row for row in rows if not self.finished(row) and not self.results(row)]
        if self.config.fill and missing:
            raise UserError(f"{where} has no result of {'/'.join(missing)}, and --fill would lose what "
                            f"{self.config.fill} says: run first, or name the --rows that it has")
        return begun

    # --- training ---

    def train(self, rows: list[str]):
        """Train what is missing, `jobs` runs at a time. An error or a signal starts no more and stops those
        that train; called again it goes on with them."""
        # two queues would begin the same runs
        with claim(self.config.out_dir, "queues runs"):
            with ThreadPoolExecutor(self.config.jobs) as pool:
                try:
                    self.train_sweeps(rows, pool)
                    self.train_seeds(rows, pool)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.stop()

    def train_sweeps(self, rows: list[str], pool: ThreadPoolExecutor):
        while True:
            missing = []
            for row, losses in self.sweeps(rows).items():
                missing += [Key(row, lr, 0) for lr in losses if losses[lr] is None]
            if not missing:
                return
            # then look again: a sweep may go on
            self.train_all(missing, pool)

    def train_seeds(self, rows: list[str], pool: ThreadPoolExecutor):
        # a seed of all rows before the next: what is interrupted compares rows
        rates = {row: self.best_lr(row) for row in rows}
        keys = []
        for seed in range(self.config.seeds):
            keys += [Key(row, rates[row], seed) for row in rows]
        self.train_all(keys, pool)

    def train_all(self, keys: list[Key], pool: ThreadPoolExecutor):
        # in this order, each as soon as a place is free
        futures = [pool.submit(self.train_one, key) for key in keys]
        for future in futures:
            # raises what was raised there
            future.result()

    def train_one(self, key: Key):
        run = self.run_of(key)
        if run.finished():
            return
        # before it, because files may change while it trains
        commit = revision()
        self.start(run)
        if not self.stopping:
            self.note(key, commit)
            say(f"{key.row}, lr {key.lr:g}, seed {key.seed}: {self.loss(key):.4f}")

    def note(self, key: Key, commit: str | None):
        """Keep the result in results.jsonl, in the place of an earlier one of the same run."""
        new = {**key._asdict(), "steps": self.config.steps, "commit": commit, **self.result(key)}
        # from several threads
        with self.lock:
            kept = read_lines(self.file) if os.path.exists(self.file) else []
            kept = [line for line in kept if key_of(line) != key]
            lines = [json.dumps(line, ensure_ascii=False) for line in [*kept, new]]
            write_atomic(self.file, ("\n".join(lines) + "\n").encode())
