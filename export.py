"""A model as a folder to hand on, without what a resume needs:

    python export.py --ckpt out/ --out_dir MODEL                      # for transformers and this program
    python export.py --ckpt out/ --out_dir MODEL --merge              # for everything that loads a LLaMA
    python export.py --ckpt out/ --out_dir MODEL --save_dtype bfloat16 --max_shard_size 2GB

OUT is written under another name and renamed once: it is whole or absent."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import os
import re
import shutil
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
from safetensors import SafetensorError

from lost import LOSTError
from model import Llama
from nanolost.checkpoint import (
    checkpoint_folder,
    empty_model,
    load_folder,
    sync_files,
    unused,
    weights_dtype,
    write_model,
)
from nanolost.counts import count_parameters
from nanolost.errors import UserError, as_user_error
from nanolost.files import read_json, sync_folder
from nanolost.flags import command, flag, parse, say
from nanolost.huggingface import travelling_files, travels
from nanolost.methods import settings_of, special_layers
from nanolost.tokenizer import Tokenizer

DTYPES = ["auto", "float32", "bfloat16", "float16"]
# as Hugging Face writes it: of 1000 bytes
SIZE = re.compile(r"[1-9][0-9]{0,9}(KB|MB|GB|TB)")

@dataclass
class Config:
    ckpt: str = flag("out", "out_dir of train.py (its newest good checkpoint) or one checkpoint folder",
                     path=True)
    out_dir: str = flag("export", "folder to make; it must not exist, or be empty", path=True)
    merge: bool = flag(False, "make plain linear layers of LOST ones without SiLU: the folder needs no code")
    save_dtype: str = flag("auto", "of the weights; auto is what the folder has them in", DTYPES)
    max_shard_size: str = flag("5GB", "a file of weights is at most so large, or holds one matrix")

def check(config: Config):
    """UserError for flags out of range and for an --out_dir that is taken, before anything is read."""
    # huggingface_hub would refuse it too, though only once the model is in memory
    if not SIZE.fullmatch(config.max_shard_size):
        raise UserError(f"--max_shard_size {config.max_shard_size}: give a number and KB, MB, GB or TB, as "
                        "5GB")
    place = config.out_dir
    # a link to a folder is not what a rename replaces
    if os.path.islink(place) or os.path.exists(place) and not os.path.isdir(place):
        raise UserError(f"{place} is no folder: use another --out_dir")
    # nothing is ever overwritten
    if os.path.isdir(place) and os.listdir(place):
        raise UserError(f"{place} is not empty: use another --out_dir")

# --- plain layers ---

def merged(name: str, layer: nn.Module) -> nn.Linear:
    """The one linear layer with the same output. UserError where there is none."""
    # a kind of layer says by this method that it can
    if not hasattr(layer, "merge"):
        raise UserError(f"{name} is a {type(layer).__name__}, which no single matrix replaces: leave --merge "
                        "out")
    # SiLU stands between the factors
    with as_user_error(LOSTError, prefix=f"{name} cannot be merged: "):
        return layer.merge()

def merge_layers(model: Llama):
    """Replace every layer that transformers lacks by a plain one, in place, one at a time."""
    # names alone: what is replaced is let go
    for name in list(special_layers(model)):
        plain = merged(name, model.get_submodule(name))
        model.set_submodule(name, plain)

def check_range(model: Llama, dtype: torch.dtype):
    """UserError for weights that would become infinite: float16 ends at 65504."""
    largest = torch.finfo(dtype).max
    for name, p in model.named_parameters():
        if p.abs().max() > largest:
            raise UserError(f"{name} has elements beyond {dtype}: use --save_dtype bfloat16")

# --- the folder ---

def write_whole(out_dir: str, write):
    """write(folder) into a folder beside `out_dir`, which then gets its name. Whatever ends it early leaves
    nothing behind."""
    final = os.path.abspath(out_dir)
    home = os.path.dirname(final)
    # a kill leaves this name, which says what it is
    temporary = unused(f"{final}.tmp")
    try:
        os.makedirs(home, exist_ok=True)
        write(temporary)
        sync_files(temporary)
        # an empty folder may be in the place
        os.rename(temporary, final)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {out_dir} ({e}): use another --out_dir, or make room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # without this a power cut may undo the rename
    sync_folder(home)

def describe(out_dir: str, model: Llama) -> list[str]:
    """What was written, and how others load it."""
    names = [name for name in os.listdir(out_dir) if name.endswith(".safetensors")]
    size = sum(os.path.getsize(os.path.join(out_dir, name)) for name in names)
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    lines = [f"{out_dir}: {count_parameters(model):,} parameters, {size:,} bytes in {files}"]
    layers = settings_of(model)
    # others run code of a folder only where they are asked to
    call = f'AutoModelForCausalLM.from_pretrained("{out_dir}")'
    if travels(layers):
        call = call.replace(")", ", trust_remote_code=True)")
    if layers and not travels(layers):
        kinds = sorted({layer["kind"] for layer in layers.values()})
        lines.append(f"no code travels with layers of kind {', '.join(kinds)}: only this program loads it")
    else:
        lines.append(f"transformers loads it by {call}")
    return lines

def main(config: Config):
    check(config)
    # one look for the newest checkpoint: training may add another meanwhile
    folder = checkpoint_folder(config.ckpt)
    # of all files the smallest to read and the first to be missing
    tokenizer = Tokenizer.load(folder)
    if config.merge:
        # on shapes first: a refusal after minutes of reading would be late
        merge_layers(empty_model(read_json(os.path.join(folder, "config.json")), folder))
    # read as float32, whatever the folder has
    dtype = weights_dtype(folder)
    if config.save_dtype != "auto":
        dtype = getattr(torch, config.save_dtype)
    model, _ = load_folder(folder)
    if config.merge:
        merge_layers(model)
    check_range(model, dtype)
    travelling = travelling_files(folder)
    def write(place: str):
        write_model(place, model, tokenizer, travelling, dtype, config.max_shard_size)
    write_whole(config.out_dir, write)
    say("\n".join(describe(config.out_dir, model)))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
