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

from nanolost.checkpoint import (
    STATE,
    checkpoint_folder,
    checkpoints,
    is_own,
    newest_checkpoint,
    retire,
    step_of,
    sweep,
    verify,
)
from nanolost.errors import UserError
from nanolost.files import read_bounded, read_json, write_atomic

CONFIG = "config.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EARLIER_CONFIG = re.compile(r"config_before_step_[0-9]{8,}(_[0-9]+)?\.json")
# no other program's config.json has all of these: they tell ours from, say, that of a Hugging Face model
CONFIG_KEYS = {"out_dir", "steps", "lr", "save_every", "resume", "overwrite"}
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
        if name in (".lock", f"{CONFIG}.tmp", f"{STATUS}.tmp", f"{METRICS}.tmp"):
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

# --- where a run begins ---

def choose_checkpoint(out_dir: str, resume: str, overwrite: bool) -> str | None:
    """Folder to continue from, None for a new run. Raises UserError for all that does not fit together, and
    deletes nothing: `make_way` does, once nothing else can refuse."""
    home = os.path.join(out_dir, "checkpoints")
    if os.path.lexists(home) and not os.path.isdir(home):
        raise UserError(f"{home} is not a folder, and checkpoints must go there: move it elsewhere")
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
    # by real paths, since its checkpoints may be a link to another disk
    folder = os.path.realpath(folder)
    homes = [out_dir, os.path.join(out_dir, "checkpoints")]
    return any(folder.startswith(os.path.realpath(home) + os.sep) for home in homes)

def later_checkpoints(out_dir: str, folder: str) -> list[str]:
    """The good checkpoints of later steps than that of `folder`."""
    # a copy of a checkpoint may have any name, so the step is what its state says
    step = read_json(os.path.join(folder, STATE))["step"]
    later = [other for other in checkpoints(out_dir) if step_of(other) > step]
    # damaged ones are no loss: the next saves clear them away
    return [other for other in later if verify(other) is None]

def refuse_later(out_dir: str, folder: str, overwrite: bool):
    """UserError if the run in out_dir went on after `folder`: that part of it would be lost."""
    later = [os.path.basename(other) for other in later_checkpoints(out_dir, folder)]
    if later and not overwrite:
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
    for folder in checkpoints(out_dir):
        if not os.path.islink(folder) and not is_own(folder):
            raise UserError(f"{folder} was not written by this program: move it elsewhere")

# --- deleting what a run gives up ---

def make_way(out_dir: str, folder: str | None, resume: str, overwrite: bool):
    """Delete what --overwrite gives up for a run that begins at `folder`, which `choose_checkpoint` returned:
    the later checkpoints of the same run, or the whole run that is in out_dir."""
    # auto gives up nothing: it goes on from the newest
    if not overwrite or resume == "auto":
        return
    if folder is None or not is_inside(folder, out_dir):
        delete_run(out_dir)
        return
    for later in later_checkpoints(out_dir, folder):
        forget(later)

def forget(folder: str):
    """Delete a checkpoint for certain; of a link only the link."""
    if os.path.islink(folder):
        os.unlink(folder)
    else:
        retire(folder)

def delete_run(out_dir: str):
    """Delete a run by the exact names that it gives, through a link to another disk as well."""
    # first what could be resumed: a deleted run must never come back
    for folder in checkpoints(out_dir):
        forget(folder)
    sweep(out_dir)
    # fails, as it should, where it is a link or holds anything else
    with contextlib.suppress(OSError):
        os.rmdir(os.path.join(out_dir, "checkpoints"))
    # a metrics.jsonl without a run's other traces has been refused
    doomed = [METRICS]
    doomed += [name for name in os.listdir(out_dir) if EARLIER_CONFIG.fullmatch(name)]
    # config.json last: as long as it is there, a deletion that was killed can be made up
    doomed += [STATUS]
    if _has_our_config(out_dir):
        doomed += [CONFIG]
    for name in doomed:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, name))

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
        keep_config(out_dir, read_bounded(path, 1 << 20))
    write_atomic(path, data)

def keep_config(out_dir: str, data: bytes):
    """Keep an earlier config.json, once: two commands in turn must not fill the folder."""
    kept = [name for name in os.listdir(out_dir) if EARLIER_CONFIG.fullmatch(name)]
    if any(read_bounded(os.path.join(out_dir, name), 1 << 20) == data for name in kept):
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
