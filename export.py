"""A model as a folder to hand on, without what a resume needs:

    python export.py --ckpt out/ --out_dir MODEL                      # for transformers and this program
    python export.py --ckpt out/ --out_dir MODEL --merge              # for everything that loads a LLaMA
    python export.py --ckpt out/ --out_dir MODEL --save_dtype bfloat16 --max_shard_size 2GB

OUT is written under another name and renamed once: it is whole or absent."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import os
import re
import sys
from dataclasses import dataclass

from model import Llama
from nanolost.checkpoint import (
    SAVE_DTYPES,
    check_free,
    check_range,
    checkpoint_folder,
    empty_model,
    load_folder,
    saved_dtype,
    write_model,
    write_whole,
)
from nanolost.counts import count_parameters
from nanolost.errors import UserError
from nanolost.files import read_json
from nanolost.flags import command, flag, parse, say
from nanolost.huggingface import travelling_files, travels
from nanolost.methods import merge_layers, settings_of
from nanolost.tokenizer import Tokenizer

# as Hugging Face writes it: of 1000 bytes
SIZE = re.compile(r"[1-9][0-9]{0,9}(KB|MB|GB|TB)")

@dataclass
class Config:
    ckpt: str = flag("out", "out_dir of train.py (its newest good checkpoint) or one checkpoint folder",
                     path=True)
    out_dir: str = flag("export", "folder to make; it must not exist, or be empty", path=True)
    merge: bool = flag(False, "make plain linear layers of LOST ones without SiLU: the folder needs no code")
    save_dtype: str = flag("auto", "of the weights; auto is what the folder has them in", SAVE_DTYPES)
    max_shard_size: str = flag("5GB", "a file of weights is at most so large, or holds one matrix")

def check(config: Config):
    """UserError for flags out of range and for an --out_dir that is taken, before anything is read."""
    # huggingface_hub would refuse it too, though only once the model is in memory
    if not SIZE.fullmatch(config.max_shard_size):
        raise UserError(f"--max_shard_size {config.max_shard_size}: give a number and KB, MB, GB or TB, as "
                        "5GB")
    check_free(config.out_dir)

# --- what is said ---

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
    dtype = saved_dtype(folder, config.save_dtype)
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
