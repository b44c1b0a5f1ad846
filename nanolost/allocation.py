"""What `--allocation FILE` gives a run: the kind of each layer, and its own rank and number of channels, as
compress.py chose them for a trained model of the same sizes.

The file is needed once: its layers go into the run's settings, where a resume finds and compares them."""
import os

import torch

from lost import check_sizes
from model import Llama, shown
from nanolost.covariance import linears
from nanolost.errors import UserError, as_user_error
from nanolost.files import read_json
from nanolost.methods import model_config
from nanolost.settings import Config, check_gamma
from nanolost.source import Source, own_checkpoint

def layers_in(content: dict) -> dict:
    """Entries by the layer's name, whatever they are."""
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise UserError('it has no object "layers": give the allocation.json that compress.py writes')
    return layers

def find(config: Config) -> tuple[dict, str]:
    """The entries by name that a run is to have, and where they stand."""
    given = config.allocation
    # a run that goes on without the flag: source.py has found them
    if isinstance(given, dict):
        return given, "the checkpoint's state.json"
    # a run that goes on needs it no more
    if not os.path.exists(given):
        folder, saved = own_checkpoint(config.out_dir, config.resume, "allocation", dict)
        if folder:
            return saved["allocation"], f"the state.json of {folder}"
    content = read_json(given)
    with as_user_error(UserError, prefix=f"{given}: "):
        return layers_in(content), given

def check_names(layers: dict, known: dict):
    repair = "use the file of a model of these sizes"
    for name in layers:
        if name not in known:
            raise UserError(f"the model has no layer {name!r:.80}: {repair}")
    for name in known:
        if name not in layers:
            raise UserError(f"it lacks the layer {name}: {repair}")

def check_entry(entry, weight: torch.Tensor, select: str) -> dict:
    """What a run takes of an entry. UserError, or lost.py's, for a layer that no run begins with."""
    if not isinstance(entry, dict):
        raise UserError(f"{shown(entry)} is no object with kind, rank and channels")
    kind = entry.get("kind")
    if kind not in ("dense", "lost", "sparse"):
        raise UserError(f"kind {shown(kind)} must be dense or lost")
    # a decomposition brings no pivots, and beside SiLU there are none
    if entry.get("pinned"):
        raise UserError("it is pinned, and a run begins with whole factors: compress with --pinned false")
    # those of a dense layer are all that it has
    full = weight.numel() if kind == "dense" else 0
    nonzeros = entry.get("nonzeros", full)
    if kind == "sparse" or nonzeros != full:
        raise UserError(f"it is sparse, with nonzeros {shown(nonzeros)} of trained weights: compress with "
                        "--form lost")
    if kind == "dense":
        return {"kind": kind}
    sizes = {name: entry.get(name) for name in ("rank", "channels")}
    for name, value in sizes.items():
        # True is an int as well
        if type(value) is not int:
            raise UserError(f"{name} {shown(value)} must be a whole number")
    # which channels: at full rank there is no residual to choose by
    check_sizes(weight.shape, sizes["rank"], sizes["channels"], select)
    return {"kind": kind, **sizes}

def settle_allocation(config: Config, source: Source | None):
    """Put the layers of --allocation in the place of its file's name, for the model of `config` or of
    `source`, and leave rank and sparsity to them. UserError for a file that does not fit."""
    if config.allocation is None:
        return
    entries, where = find(config)
    sizes = source.shapes.config if source else model_config(config)
    # a new one: that of a run which goes on has LOST layers already
    with torch.device("meta"):
        known = linears(Llama(sizes))
    with as_user_error(UserError, prefix=f"{where}: "):
        check_names(entries, known)
    layers = {}
    for name, linear in known.items():
        # LOSTError is a ValueError too
        with as_user_error(ValueError, prefix=f"{where}: {name}: "):
            layers[name] = check_entry(entries[name], linear.weight, config.select)
    # nothing of LOST would be left but its name
    if all(layer["kind"] == "dense" for layer in layers.values()):
        raise UserError(f"{where} keeps every layer dense: leave --allocation out, with --linear dense")
    config.allocation = layers
    # a second answer, which nobody has typed
    config.rank = None
    config.sparsity = None
    channels = any(layer.get("channels") for layer in layers.values())
    check_gamma(config.gamma, channels)
