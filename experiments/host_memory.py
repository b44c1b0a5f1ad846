"""Host memory of a split start and of a save: what a process on a CPU holds at its peak above its part.

    torchrun --standalone --nproc_per_node=2 experiments/host_memory.py --model 7b --n_layer 1 --linear dense

Prints a line of JSON for each process. At one block and the real width the largest tensor, which is the unit,
is that of the whole model. --out_dir gets one checkpoint, 12 bytes a parameter, removed at the end."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import json
import shutil
from dataclasses import dataclass

import torch

import train
from model import MODELS
from nanolost import checkpoint, shard
from nanolost.flags import command, flag, parse
from nanolost.job import Job, place
from nanolost.methods import METHODS
from nanolost.settings import resolve, settle_device
from nanolost.tokenizer import Tokenizer

@dataclass
class Config:
    model: str = flag("7b", "size", list(MODELS))
    n_layer: int = flag(1, "blocks")
    linear: str = flag("dense", "kind of linear layer", METHODS)
    init: str = flag("svd", "start of a LOST layer", ["svd", "random"])
    out_dir: str = flag("out/host_memory", "where the checkpoint goes, and is removed")

def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024

class Peak:
    """The most that this process holds within the context, above what it held at its start."""

    def __enter__(self):
        # the kernel begins to look for the peak again
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
            f.write("5")
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        self.above = resident("VmHWM") - self.before
        self.kept = resident("VmRSS") - self.before

def with_moments(state: train.State):
    """Give the optimizers a state to save."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in state.optimizers:
        optimizer.step()

def measured(config: Config) -> dict:
    names = ("model", "n_layer", "linear", "out_dir", *(["init"] if config.linear == "lost" else []))
    flags = {name: getattr(config, name) for name in names}
    _, world = place()
    flags |= {"vocab_size": 50257, "shard": world, "device": "cpu", "compile": "false"}
    run = settle_device(resolve(flags))
    with Job.start(run) as job:
        with Peak() as start:
            state = train.fresh(run, job)
        with_moments(state)
        byte = Tokenizer.named("byte")
        with Peak() as save:
            checkpoint.save_checkpoint(
                run.out_dir, 1, state.model, state.optimizers, {}, byte, 1, None, job)
        job.first(lambda: shutil.rmtree(os.path.join(run.out_dir, "checkpoints")))
        sizes = [p.numel() * p.element_size() for p in state.model.parameters()]
        held = sum(shard.local(p).nbytes for p in state.model.parameters())
        return {
            **vars(config),
            "rank": job.rank,
            "part": held,
            "largest": max(sizes),
            "start_above_part": start.above - held,
            "save_above": save.above,
        }

def main(config: Config):
    print(json.dumps(measured(config)))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
