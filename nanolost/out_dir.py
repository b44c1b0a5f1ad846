"""What the folder of a run holds, and whose it is.

    out/   config.json  config_before_step_00000500.json …  status.json  metrics.jsonl  .lock
           checkpoints/step_00001000/ …

A folder is used unasked if it is empty or one of these. All that is ever deleted in it has a name that a run
gives: notes, copies of checkpoints and whatever else lies there stay."""
import contextlib
import json
import os
import re
import shutil
import time

from nanolost.checkpoint import (
    STATE,
    checkpoint_folder,
    checkpoints,
    delete,
    is_own,
    newest_checkpoint,
    retire,
    step_of,
    unused,
    verify,
)
from nanolost.errors import UserError
from nanolost.files import read_bounded, read_json, sync_folder, write_atomic
from nanolost.flags import say

CONFIG = "config.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EARLIER_CONFIG = re.compile(r"config_before_step_[0-9]{8,}(_[0-9]+)?\.json")
# bytes: ours have 2000
CONFIG_LIMIT = 1 << 20
# no other program's config.json has all of these: they tell ours from, say, that of a Hugging Face model
CONFIG_KEYS = {"out_dir", "steps", "lr", "save_every", "resume", "overwrite"}
# a run that gave way to another, as long as that one has saved nothing: beside the checkpoints, whose folder
# may be a link to another disk, and beside the other files
ASIDE = ".overwritten"
# the checkpoints that did not give way; written when all that did are aside
STAYED = "stayed.json"
STATES = ("running", "finished", "stopped", "failed")

# --- whose folder it is ---

def _content(path: str) -> dict:
    """The object in a JSON file, {} where there is none."""
    try:
        return read_json(path)
    except UserError:
        return {}

def _has_our_config(out_dir: str) -> bool:
    return _content(os.path.join(out_dir, CONFIG)).keys() >= CONFIG_KEYS

def is_run(out_dir: str) -> bool:
    """Whether a run has been here, by any of the traces that only a run leaves."""
    if _has_our_config(out_dir):
        return True
    status = _content(os.path.join(out_dir, STATUS))
    if status.get("state") in STATES and "step" in status:
        return True
    # somebody may have copied the checkpoints alone
    return any(is_own(folder) for folder in checkpoints(out_dir))

def is_empty(out_dir: str) -> bool:
    """Whether there is nothing to lose."""
    for name in os.listdir(out_dir):
        path = os.path.join(out_dir, name)
        # the lock, and what is left of a run that was killed as it began
        if name in (".lock", f"{CONFIG}.tmp", f"{STATUS}.tmp", f"{METRICS}.tmp") or name.startswith(PROBE):
            continue
        if name == METRICS and os.path.isfile(path) and os.path.getsize(path) == 0:
            continue
        # also a link to another disk, made for the run to come
        if name == "checkpoints" and os.path.isdir(path) and not os.listdir(path):
            continue
        return False
    return True

def refuse_foreign(out_dir: str):
    """UserError for a folder that holds something else than a run."""
    if not is_empty(out_dir) and not is_run(out_dir):
        raise UserError(f"{out_dir} is not empty and not a run of this program: use another --out_dir")

# how a file begins by which processes see that they have one folder
PROBE = ".seen_"
# seconds in which a network file system shows a new file to other machines
SEEN = 10

def check_shared(out_dir: str, job):
    """UserError on all processes where one of them does not see rank 0's folder: each machine would read and
    write one of its own."""
    if job.world == 1:
        return
    # each looks where it would read: a relative name may mean another folder in another process
    probe = os.path.join(out_dir, job.first(lambda: write_probe(out_dir)))
    end = time.monotonic() + SEEN
    while not os.path.exists(probe) and time.monotonic() < end:
        time.sleep(0.1)
    seen = job.gather(os.path.exists(probe), patient=True)
    job.first(lambda: os.remove(probe))
    blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(f"process {', '.join(blind)} does not see {os.path.abspath(out_dir)} of process 0: "
                        "start all of them in one folder, and on several machines put --out_dir on a file "
                        "system that they share (NFS, Lustre), not on a local disk")

def write_probe(out_dir: str) -> str:
    """The name of a new file in out_dir."""
    for name in os.listdir(out_dir):
        # of a job that was killed meanwhile
        if name.startswith(PROBE):
            os.remove(os.path.join(out_dir, name))
    # a name that no machine can remember as missing
    name = f"{PROBE}{os.getpid()}_{time.time_ns()}"
    write_atomic(os.path.join(out_dir, name), b"")
    return name

# --- where a run begins ---

def refuse_obstacles(out_dir: str):
    """UserError for what has a name that a run writes and cannot be replaced by it."""
    home = os.path.join(out_dir, "checkpoints")
    if os.path.lexists(home) and not os.path.isdir(home):
        raise UserError(f"{home} is not a folder, and checkpoints must go there: move it elsewhere")
    configs = [CONFIG, *earlier_configs(out_dir)]
    for name in (*configs, STATUS, METRICS, f"{CONFIG}.tmp", f"{STATUS}.tmp", f"{METRICS}.tmp"):
        path = os.path.join(out_dir, name)
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a file, and a run writes one of this name: move it elsewhere")
        # a config that goes is kept, and compared with those before
        if name in configs and os.path.isfile(path):
            read_bounded(path, CONFIG_LIMIT)

def earlier_configs(out_dir: str) -> list[str]:
    return [name for name in os.listdir(out_dir) if EARLIER_CONFIG.fullmatch(name)]

def choose_checkpoint(out_dir: str, resume: str, overwrite: bool) -> str | None:
    """Folder to continue from, None for a new run. Raises UserError for all that does not fit together, and
    changes nothing: `make_way` does, once nothing else can refuse."""
    refuse_obstacles(out_dir)
    if resume == "auto":
        folder = newest_checkpoint(out_dir)
        if folder is None:
            refuse_foreign(out_dir)
        else:
            require_state(folder)
        return folder
    if resume == "never":
        refuse_old_run(out_dir, overwrite)
        return None
    folder = checkpoint_folder(resume)
    require_state(folder)
    if is_inside(folder, out_dir):
        refuse_later(out_dir, folder, overwrite)
    elif checkpoints(out_dir):
        refuse_old_run(out_dir, overwrite)
    else:
        # the same command, whose run did not come to its first save
        refuse_foreign(out_dir)
    return folder

def require_state(folder: str):
    """UserError for a folder without all that a run needs to go on."""
    state = _content(os.path.join(folder, STATE))
    if not isinstance(state.get("config"), dict) or type(state.get("step")) is not int:
        raise UserError(f"{folder} has no training state to continue from: it is a model alone")

def is_inside(folder: str, out_dir: str) -> bool:
    """Whether a checkpoint belongs to the run in out_dir."""
    # by real paths, since its checkpoints may be a link to another disk; a run in a folder inside is another
    home = os.path.realpath(os.path.join(out_dir, "checkpoints"))
    return os.path.dirname(os.path.realpath(folder)) == home

def later_checkpoints(out_dir: str, folder: str) -> list[str]:
    """The checkpoints of later steps than that of `folder`."""
    # a copy of a checkpoint may have any name, so the step is what its state says
    step = read_json(os.path.join(folder, STATE))["step"]
    return [other for other in checkpoints(out_dir) if step_of(other) > step]

def refuse_later(out_dir: str, folder: str, overwrite: bool):
    """UserError if the run in out_dir went on after `folder`: that part of it would be lost."""
    later = later_checkpoints(out_dir, folder)
    if overwrite:
        refuse_strangers(later)
        return
    # damaged ones are no loss: the next saves clear them away
    later = [os.path.basename(other) for other in later if verify(other) is None]
    if later:
        raise UserError(f"{folder} is not the newest checkpoint of {out_dir}: add --overwrite to delete "
                        f"{', '.join(later)} and continue from it, or use another --out_dir")

def refuse_old_run(out_dir: str, overwrite: bool):
    """UserError if a run would have to go and may not, or something that is no run's."""
    # --overwrite would not help with a folder of somebody else: that is said first
    if not overwrite:
        refuse_foreign(out_dir)
        if not is_empty(out_dir):
            raise UserError(f"{out_dir} is not empty: continue with --resume auto, delete its run with "
                            "--overwrite, or use another --out_dir")
    # --overwrite is said of a run. Files of another program that have its names are not meant
    written = (CONFIG, STATUS, METRICS)
    if not is_run(out_dir) and any(os.path.lexists(os.path.join(out_dir, name)) for name in written):
        refuse_foreign(out_dir)
    refuse_strangers(checkpoints(out_dir))

def refuse_strangers(folders: list[str]):
    """UserError for folders that have a checkpoint's name and are none."""
    for folder in folders:
        if not os.path.islink(folder) and not is_own(folder):
            raise UserError(f"{folder} was not written by this program: move it elsewhere")

# --- a run that gives way to another ---

def make_way(out_dir: str, folder: str | None, resume: str, overwrite: bool):
    """Put aside what --overwrite gives up for a run that begins at `folder`, which `choose_checkpoint`
    returned: later checkpoints of the same run, or the whole run in out_dir. `end_overwrite` deletes it."""
    # auto gives up nothing: it goes on from the newest
    if not overwrite or resume == "auto":
        return
    goes_on = folder is not None and is_inside(folder, out_dir)
    going = later_checkpoints(out_dir, folder) if goes_on else checkpoints(out_dir)
    # a metrics.jsonl without a run's other traces has been refused
    names = [METRICS, STATUS, *earlier_configs(out_dir)]
    if _has_our_config(out_dir):
        names.append(CONFIG)
    names = [name for name in names if os.path.lexists(os.path.join(out_dir, name))]
    if going or names:
        put_aside(out_dir, going, names, goes_on)

def asides(out_dir: str) -> tuple[str, str]:
    """Where files and where checkpoints are put aside."""
    return os.path.join(out_dir, ASIDE), os.path.join(out_dir, "checkpoints", ASIDE)

def put_aside(out_dir: str, going: list[str], names: list[str], copy: bool):
    """Move checkpoints aside, and files, or copies of them for a run that writes on."""
    files, folders = asides(out_dir)
    os.makedirs(files, exist_ok=True)
    if going:
        os.makedirs(folders, exist_ok=True)
    for folder in going:
        os.rename(folder, os.path.join(folders, os.path.basename(folder)))
    # in this order also after a power cut: from now on any other checkpoint is the new run's
    if going:
        sync_folder(os.path.dirname(folders))
    stayed = [os.path.basename(folder) for folder in checkpoints(out_dir)]
    write_atomic(os.path.join(files, STAYED), json.dumps({"checkpoints": stayed}).encode())
    for name in names:
        path = os.path.join(out_dir, name)
        if copy:
            with open(path, "rb") as file:
                write_atomic(os.path.join(files, name), file.read())
        else:
            os.rename(path, os.path.join(files, name))

def end_overwrite(out_dir: str):
    """Delete what is aside where the new run has a good checkpoint, else put it back. What a kill has left
    undone of either, or of `make_way`, is made up."""
    files, folders = asides(out_dir)
    if not os.path.isdir(files) and not os.path.isdir(folders):
        return
    stayed = _content(os.path.join(files, STAYED)).get("checkpoints")
    # not all was aside yet, so that the new run had not begun
    if stayed is None:
        put_back(out_dir)
        return
    new = [folder for folder in checkpoints(out_dir) if os.path.basename(folder) not in stayed]
    if any(verify(folder) is None for folder in new):
        delete_aside(out_dir)
        return
    for folder in new:
        retire(folder)
    put_back(out_dir)
    say(f"{out_dir}: the new run ended before its first checkpoint, and what it was to overwrite is back")

def put_back(out_dir: str):
    files, folders = asides(out_dir)
    for name in names_in(files):
        path = os.path.join(out_dir, name)
        if os.path.islink(path):
            # the copy of a file that a run wrote through its link, maybe on another disk
            with open(os.path.join(files, name), "rb") as file:
                write_atomic(os.path.realpath(path), file.read())
        else:
            os.replace(os.path.join(files, name), path)
    # the files come first: without STAYED only checkpoints are aside
    shutil.rmtree(files, ignore_errors=True)
    for name in names_in(folders):
        os.rename(os.path.join(folders, name), os.path.join(os.path.dirname(folders), name))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folders)

def delete_aside(out_dir: str):
    """Delete a run that gave way. What cannot be deleted is a warning."""
    files, folders = asides(out_dir)
    # first what could be resumed: by a name that `sweep` knows it can't come back
    if os.path.isdir(folders):
        doomed = unused(os.path.join(os.path.dirname(folders), ".tmp_old_step_00000000"))
        os.rename(folders, doomed)
        delete(doomed)
    # STAYED last: as long as it is there, a deletion that was killed can be made up
    for name in names_in(files):
        os.remove(os.path.join(files, name))
    delete(files)

def names_in(aside: str) -> list[str]:
    """What is aside, without notes of our own."""
    if not os.path.isdir(aside):
        return []
    return [name for name in os.listdir(aside) if name != STAYED and not name.endswith(".tmp")]

@contextlib.contextmanager
def overwriting(out_dir: str):
    """A context in which `make_way` is called: a run that fails in it before its first save leaves the one
    before as it was."""
    try:
        yield
    finally:
        # the next start makes up for it
        with contextlib.suppress(OSError):
            end_overwrite(out_dir)

# --- what a run writes beside its checkpoints ---

def check_space(out_dir: str, keep: int, size: int):
    """UserError for a disk without room for `keep` checkpoints of `size` bytes, and for one more while it is
    written."""
    home = os.path.join(out_dir, "checkpoints")
    # it may be a link to another disk
    free = shutil.disk_usage(home if os.path.isdir(home) else out_dir).free
    # the old ones stay until the new one verifies
    more = max(1, keep + 1 - len(checkpoints(out_dir)))
    if free < more * size:
        raise UserError(f"{out_dir} has {free:,} bytes free for {more} more checkpoints of {size:,}: make "
                        "room, lower --keep or use another --out_dir")

def write_config(out_dir: str, values: dict):
    """Write config.json: every value of this start. What an earlier start had is kept as
    config_before_step_N.json, where N is the checkpoint that this one continues from."""
    path = os.path.join(out_dir, CONFIG)
    data = json.dumps(values, indent=1).encode()
    if os.path.lexists(path):
        # through JSON, which turns tuples into lists
        if _content(path) == json.loads(data):
            return
        keep_config(out_dir, read_bounded(path, CONFIG_LIMIT))
    write_atomic(path, data)

def keep_config(out_dir: str, data: bytes):
    """Keep an earlier config.json, once: two commands in turn must not fill the folder."""
    kept = earlier_configs(out_dir)
    if any(read_bounded(os.path.join(out_dir, name), CONFIG_LIMIT) == data for name in kept):
        return
    # a run without a checkpoint begins again at step 0
    found = checkpoints(out_dir)
    step = step_of(found[-1]) if found else 0
    name = f"config_before_step_{step:08d}"
    # two changes between two saves
    number = 1
    while f"{name}.json" in kept:
        number += 1
        name = f"config_before_step_{step:08d}_{number}"
    write_atomic(os.path.join(out_dir, f"{name}.json"), data)
