"""Text that a trained model is looked at with, and what was found: windows, statistics, and the folders that
they are kept in for the time of a command, or longer."""
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile

import numpy as np
from safetensors import SafetensorError, safe_open

from model import Llama
from nanolost.budget import size
from nanolost.checkpoint import write_json
from nanolost.covariance import Batch, Statistics, batches, block_file, collect, count_tokens
from nanolost.data import SampleOrder, TokenDataset
from nanolost.errors import UserError
from nanolost.files import claim, read_json
from nanolost.settings import DEVICES

# tokens of a window that is looked at, of a model that takes so many
WINDOW = 512

# --- the text ---

def micro_batch(text: TokenDataset, device) -> int:
    """Windows of a pass, as many as evaluation has on this device."""
    return max(1, DEVICES[device.type]["micro_tokens"] // text.seq_len)

def calibration_windows(
    text: TokenDataset, seed: int, tokens: int, gradients: int, device, first: int = 0
) -> list[Batch]:
    """So many tokens of the text in windows that the seed draws, from the one numbered `first` on; of the
    first `gradients`, gradients too. At least one window of what is asked for at all; of a short text each
    window once, as the same one twice teaches nothing."""
    count = min(max(1, tokens // text.seq_len), len(text))
    samples = SampleOrder(len(text), seed)[np.arange(count) + first]
    learn = gradients and max(1, gradients // text.seq_len)
    return batches(text, samples, micro_batch(text, device), learn, device)

# --- what is known of it ---

# of a folder that is in use, as long as somebody holds its lock
PREFIX = "nanolost_"
LOCK = ".in_use"

def sweep(home: str):
    """Delete the folders in `home` whose commands were killed."""
    pattern = os.path.join(glob.escape(home), f"{PREFIX}*", LOCK)
    for path in glob.glob(pattern):
        # in use, of another user, or on a disk that has no locks
        with contextlib.suppress(OSError), open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)

@contextlib.contextmanager
def temporary_folder(need: int):
    """A folder that goes in the end, with room for `need` bytes. A killed command leaves it to the next."""
    home = tempfile.gettempdir()
    sweep(home)
    # refused before the work, not in the middle of it
    free = shutil.disk_usage(home).free
    if need > free:
        raise UserError(f"{home} has {size(free)} free, and {size(need)} are needed meanwhile: name a larger "
                        "place by the variable TMPDIR")
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=home) as folder,
        open(os.path.join(folder, f"{LOCK}_soon"), "w") as file,
    ):
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # held before a sweep can find it
        os.replace(file.name, os.path.join(folder, LOCK))
        yield folder

def key_of(config, folder: str, text: TokenDataset) -> dict:
    """What statistics depend on. config: calibration_tokens, gradient_tokens, seed and dtype; folder: that of
    the model."""
    # sizes and times stand for the weights: a hash would read the whole model
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    stamps = [(name, os.stat(os.path.join(folder, name))) for name in names]
    return {
        "ckpt": os.path.abspath(folder),
        "weights": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stamps],
        "text": text.fingerprint,
        "calibration_tokens": config.calibration_tokens,
        "gradient_tokens": config.gradient_tokens,
        "seq_len": text.seq_len,
        "seed": config.seed,
        "dtype": config.dtype,
    }

def statistics_of(
    model: Llama,
    found: list[Batch],
    kept: str | None,
    key: dict,
    spool: str,
    context,
) -> Statistics:
    """Statistics of the windows `found`: those in the folder `kept` where they have this key, else new ones,
    kept there, or without one in the folder `spool`. context: the autocast of the passes."""
    place = kept or os.path.join(spool, "statistics")
    if os.path.exists(os.path.join(place, "statistics.json")):
        check_statistics(place, model, key)
        return Statistics(place, count_tokens(found))
    try:
        # two that write the same files would mix them
        with claim(place, "collects statistics", "--statistics"):
            made = collect(model, found, place, key["seed"], context, spool)
            # last: statistics without their key are made again
            write_json(place, "statistics.json", key)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write statistics ({e}): make room, or name another place by --statistics "
                        "and the variable TMPDIR") from None
    return made

def check_statistics(place: str, model: Llama, key: dict):
    """UserError for statistics that are not of this model and text, or not whole."""
    if read_json(os.path.join(place, "statistics.json")) != key:
        raise UserError(f"{place} has statistics of another model, text, seed or number of tokens: use "
                        "another --statistics")
    for layer in range(model.config.n_layer):
        path = block_file(place, layer)
        try:
            # the sizes that it names are those that it has
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read {path} ({e}): remove {place}, or use another "
                            "--statistics") from None
