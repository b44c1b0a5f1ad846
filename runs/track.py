"""Show a run in a tracker, live or afterwards: python runs/track.py OUT [tensorboard|wandb|trackio]

Reads OUT/metrics.jsonl and changes nothing of the run; Ctrl-C ends it, and the same command goes on where it
was. What it has shown it keeps in OUT/track. Nothing is sent anywhere: WANDB_MODE=online sends to wandb, and
`wandb sync` does it later. Needs the tracker's package (the extra "track" brings tensorboard)."""
import importlib
import json
import os
import sys
import time

# this file is started by its path, so that Python looks for modules beside it only
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanolost.errors import UserError  # noqa: E402
from nanolost.files import expanded, read_json, write_atomic  # noqa: E402
from nanolost.flags import command, say  # noqa: E402

USAGE = "python runs/track.py OUT [tensorboard|wandb|trackio]"
PROJECT = "nanolost"
# seconds between looks: a line comes every ten updates
PAUSE = 1.0
# nothing leaves the machine unless the user says so: no run, and no report of wandb's or gradio's makers
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "GRADIO_ANALYTICS_ENABLED": "False"}

# --- the file ---

class Reader:
    """The records of a metrics.jsonl that have come since the last look. A resume replaces the file: then it
    is read again from its start."""

    def __init__(self, path: str):
        self.path = path
        self.file = None
        self.rest = b""

    def look(self) -> list[tuple[bool, dict]]:
        """(whether it is the first of the file, record) of each new one."""
        # another file has the name: this one will not grow any more
        if self.file is not None and self._replaced():
            self.file.close()
            self.file = None
        if self.file is None:
            try:
                self.file = open(self.path, "rb")
            except FileNotFoundError:
                # between the two names of a replacement
                return []
            self.rest = b""
            self.first = True
        # a line that is half written comes whole at a later look
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        found = []
        for line in lines:
            record = as_record(line)
            if record is not None:
                found.append((self.first, record))
                self.first = False
        return found

    def _replaced(self) -> bool:
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self.file.fileno())
        # a new file may have got the old one's number, but then it begins with fewer lines
        return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino) or now.st_size < self.file.tell()

def as_record(line: bytes) -> dict | None:
    """A record of a known moment; None for a damaged line, and for a note of the user's without a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    known = type(record.get("step")) is int and isinstance(record.get("time"), (int, float))
    return record if known else None

# of any kind and name: the finetuning's, and what a user adds to METRICS
def numbers_of(value: dict, path: str) -> dict[str, float]:
    """Every number by its path: train/loss, eval/layers/model.layers.0.mlp.up_proj/gamma."""
    found = {}
    for name, entry in value.items():
        place = f"{path}/{name}"
        if isinstance(entry, dict):
            found |= numbers_of(entry, place)
        # bool is an int as well: a spike that was skipped is 1
        elif isinstance(entry, (int, float)) and name not in ("step", "time"):
            found[place] = float(entry)
    return found

# --- trackers ---

def require(package: str):
    """UserError with the command that brings a tracker, where it is missing."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed: pip install {package}") from None

# TensorBoard and Hosted have the same four calls; a further tracker is a class like them and a line below

class TensorBoard:
    """Event files under OUT/track/tensorboard; later starts add files to the same folder, one run."""

    def __init__(self, folder: str, name: str, config: dict):
        # loads torch, which nothing else here needs
        module = importlib.import_module("torch.utils.tensorboard")
        self.folder = os.path.join(folder, "tensorboard")
        self.writer = module.SummaryWriter(os.path.join(self.folder, name))
        self.hint = f"tensorboard --logdir {self.folder}"

    def log(self, values: dict, step: int, moment: float):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=moment)

    def flush(self):
        self.writer.flush()

    def finish(self):
        self.writer.close()

class Hosted:
    """wandb and trackio, which took over wandb's calls."""

    def __init__(self, package: str, hint: str, **settings):
        self.run = importlib.import_module(package)
        self.hint = hint
        self.run.init(project=PROJECT, resume="allow", **settings)

    def log(self, values: dict, step: int, moment: float):
        self.run.log(values, step=step)

    def flush(self):
        """Both write by themselves."""

    def finish(self):
        self.run.finish()

def wandb(folder: str, name: str, config: dict) -> Hosted:
    hint = f"wandb sync --append {folder}/wandb/offline-run-* sends it to wandb"
    return Hosted("wandb", hint, id=name, name=name, dir=folder, config=config)

def trackio(folder: str, name: str, config: dict) -> Hosted:
    return Hosted("trackio", f"trackio show --project {PROJECT}", name=name, config=config)

TRACKERS = {"tensorboard": TensorBoard, "wandb": wandb, "trackio": trackio}

# --- what was shown already ---

class Shown:
    """One run in a tracker, and the last step of each kind that it has: they increase, also over a resume,
    which repeats some with the same values."""

    def __init__(self, folder: str, kind: str, first: dict, config: dict):
        # the run by its first line, which a resume keeps: a new run in the same folder has another name
        place = os.path.basename(os.path.dirname(folder))
        self.name = f"{place}-{int(first['time'])}"
        self.path = os.path.join(folder, f"{kind}-{self.name}.json")
        self.tracker = TRACKERS[kind](folder, self.name, config)
        self.steps = {}
        if os.path.exists(self.path):
            self.steps = read_json(self.path)

    def add(self, record: dict):
        kind = record["kind"]
        if record["step"] <= self.steps.get(kind, -1):
            # a resume repeats what came after its checkpoint
            return
        self.tracker.log(numbers_of(record, kind), record["step"], record["time"])
        self.steps[kind] = record["step"]

    def keep(self):
        """In this order: a kill between the two shows some points twice and loses none."""
        self.tracker.flush()
        write_atomic(self.path, json.dumps(self.steps).encode())

# --- the command ---

def is_running(out: str) -> bool:
    # being written by a run of an older version, or by none at all
    try:
        return read_json(os.path.join(out, "status.json")).get("state") == "running"
    except UserError:
        return False

def follow(out: str, kind: str):
    """Show what is there and what comes, until the run ends. UserError where there is no run."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    # before a folder is made for it
    require(kind)
    path = os.path.join(out, "metrics.jsonl")
    if not os.path.exists(path):
        raise UserError(f"no metrics.jsonl in {out}: give an out_dir of train.py, once its run has begun")
    folder = os.path.join(os.path.abspath(out), "track")
    reader = Reader(path)
    shown = None
    try:
        while True:
            # asked before the look, so that the last lines are not missed
            running = is_running(out)
            for first, record in reader.look():
                if shown is None or first:
                    shown = begin(shown, folder, kind, record, out)
                shown.add(record)
            if shown is not None:
                shown.keep()
            if not running:
                break
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        # the usual way to leave a run that goes on
        say("the same command goes on from here")
    finally:
        if shown is not None:
            shown.tracker.finish()

def begin(shown: Shown | None, folder: str, kind: str, first: dict, out: str) -> Shown:
    """The run that the record `first` begins: that which is shown already, after a resume."""
    os.makedirs(folder, exist_ok=True)
    config = read_json(os.path.join(out, "config.json"))
    if shown is not None:
        # the file was replaced, by the same run or by a new one
        if shown.name.endswith(f"-{int(first['time'])}"):
            return shown
        shown.tracker.finish()
    shown = Shown(folder, kind, first, config)
    say(f"{shown.name}: {shown.tracker.hint}")
    return shown

def main(argv: list[str]):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    # by hand: nanolost.flags knows flags only
    out, kind = (argv + ["tensorboard"])[:2] if len(argv) in (1, 2) else (None, None)
    if out is None or out.startswith("-"):
        raise UserError(f"give an out_dir of train.py: {USAGE}")
    if kind not in TRACKERS:
        raise UserError(f"unknown tracker {kind}: {USAGE}")
    follow(expanded(out), kind)

if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
