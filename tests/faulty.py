"""train.py with a fault that a test asks for by the environment variable FAULT; everything else is real.

    die:N      SIGKILL at the N-th point (from 0) of the saves of this process, which prints their names
    nan:R:S    process R computes a loss of NaN in its S-th step
    raise:R:S  … raises an error
    memory:R:S … has too little memory on its GPU
    sleep:R:S  … sleeps for an hour, as a reader of a dead disk does
    late:R     process R sleeps for an hour before it looks for the others
    slow:S     each save takes S seconds longer"""
import os
import runpy
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
kind, *numbers = os.environ.get("FAULT", "none").split(":")
RANK = int(os.environ.get("RANK", 0))

import torch  # noqa: E402

import model  # noqa: E402
from nanolost import checkpoint  # noqa: E402

points = []

def point(name):
    """A place where a kill could come."""
    print("POINT", name, flush=True)
    if len(points) == int(numbers[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    points.append(name)

def announce(module, name):
    """Make each call of module.name a point."""
    real = getattr(module, name)
    def announced(*args, **kwargs):
        point(f"before {name}")
        return real(*args, **kwargs)
    setattr(module, name, announced)

def half_way(path_of):
    """Make the middle of a file a point: it is then cut in half."""
    def wrap(module, name):
        real = getattr(module, name)
        def halved(*args, **kwargs):
            result, path = real(*args, **kwargs), path_of(*args)
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                content = f.read()
            os.truncate(path, size // 2)
            point(f"half of {os.path.basename(path)}")
            with open(path, "wb") as f:
                f.write(content)
            return result
        setattr(module, name, halved)
    return wrap

def instrument_saves():
    half_way(lambda tensors, path, *rest: path)(checkpoint, "save_file")
    half_way(lambda folder, name, content: os.path.join(folder, name))(checkpoint, "write_json")
    save, real = checkpoint.save_checkpoint, {name: getattr(os, name) for name in
                                              ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")}
    def saving(*args, **kwargs):
        for name in real:
            announce(os, name)
        try:
            result = save(*args, **kwargs)
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        point("after the save")
        return result
    checkpoint.save_checkpoint = saving

def instrument_steps(rank, step):
    forward = model.Llama.forward
    count = iter(range(1, 10**9))
    def faulty(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if torch.is_grad_enabled() and RANK == rank and next(count) == step:
            if kind == "raise":
                raise RuntimeError("injected")
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB. Of the allocated …")
            if kind == "sleep":
                time.sleep(3600)
            loss = loss * float("nan")
        return logits, loss
    model.Llama.forward = faulty

def slow_down_saves(seconds):
    save = checkpoint.save_checkpoint
    checkpoint.save_checkpoint = lambda *args: (time.sleep(seconds), save(*args))

def come_late(rank):
    if RANK == rank:
        def late(*args, **kwargs):
            print("LATE", flush=True)
            time.sleep(3600)
        torch.distributed.init_process_group = late

if kind == "late":
    come_late(int(numbers[0]))
if kind == "slow":
    slow_down_saves(int(numbers[0]))
if kind == "die":
    instrument_saves()
if kind in ("nan", "raise", "memory", "sleep"):
    instrument_steps(*map(int, numbers))
sys.argv[0] = os.path.join(ROOT, "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
