"""train.py with a fault that a test asks for by the environment variable FAULT; everything else is real.

    die:N      SIGKILL at the N-th point (from 0) of the saves of this process, which prints their names
    nan:R:S    process R computes a loss of NaN in its S-th step
    raise:R:S  … raises an error
    memory:R:S … has too little memory on its GPU
    sleep:R:S  … sleeps for an hour, as a reader of a dead disk does
    slow:S     each save takes S seconds longer"""
import os
import runpy
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import nanolost  # noqa: E402, F401, I001  before torch: OpenMP reads its settings once
import torch  # noqa: E402

import model  # noqa: E402
from nanolost import checkpoint  # noqa: E402

# --- die ---

class Points:
    """Places where a kill could come; the one of the number `deadly` is where it comes."""

    def __init__(self, deadly: int):
        self.deadly = deadly
        self.passed = 0

    def __call__(self, name: str):
        print("POINT", name, flush=True)
        if self.passed == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

def announce(point, module, name):
    """Make each call of module.name a point."""
    real = getattr(module, name)
    def announced(*args, **kwargs):
        point(f"before {name}")
        return real(*args, **kwargs)
    setattr(module, name, announced)

def cut(point, path: str):
    """Make the middle of a file a point: it is then cut in half."""
    with open(path, "rb") as f:
        content = f.read()
    os.truncate(path, len(content) // 2)
    point(f"half of {os.path.basename(path)}")
    with open(path, "wb") as f:
        f.write(content)

def half_way(point, path_of, module, name):
    """Cut the file that module.name has just written."""
    real = getattr(module, name)
    def halved(*args, **kwargs):
        result = real(*args, **kwargs)
        cut(point, path_of(*args))
        return result
    setattr(module, name, halved)

def half_way_so_far(point, module, name):
    """Cut each file that is there when module.name begins to write into the folder."""
    real = getattr(module, name)
    def later(folder, *args, **kwargs):
        for file in sorted(os.listdir(folder)):
            cut(point, os.path.join(folder, file))
        return real(folder, *args, **kwargs)
    setattr(module, name, later)

def instrument_saves(deadly: int):
    point = Points(deadly)
    # the tokenizer's files, and the code that travels with the weights
    half_way_so_far(point, checkpoint, "write_turns")
    half_way(point, lambda writer: writer.path, checkpoint.Writer, "close")
    half_way(point, lambda folder, name, content: os.path.join(folder, name), checkpoint, "write_json")
    names = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
    save, real = checkpoint.save_checkpoint, {name: getattr(os, name) for name in names}
    def saving(*args, **kwargs):
        for name in real:
            announce(point, os, name)
        try:
            result = save(*args, **kwargs)
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        point("after the save")
        return result
    checkpoint.save_checkpoint = saving

# --- a step that fails, a save that is slow ---

def instrument_steps(kind: str, rank: int, step: int):
    forward = model.Llama.forward
    count = iter(range(1, 10**9))
    def faulty(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if torch.is_grad_enabled() and int(os.environ.get("RANK", 0)) == rank and next(count) == step:
            if kind == "raise":
                raise RuntimeError("injected")
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB. Of the allocated …")
            if kind == "sleep":
                time.sleep(3600)
            loss = loss * float("nan")
        return logits, loss
    model.Llama.forward = faulty

def slow_down_saves(seconds: int):
    save = checkpoint.save_checkpoint
    checkpoint.save_checkpoint = lambda *args: (time.sleep(seconds), save(*args))

def install(fault: str):
    kind, *numbers = fault.split(":")
    numbers = map(int, numbers)
    if kind == "die":
        instrument_saves(*numbers)
    elif kind == "slow":
        slow_down_saves(*numbers)
    else:
        assert kind in ("nan", "raise", "memory", "sleep"), fault
        instrument_steps(kind, *numbers)

if __name__ == "__main__":
    install(os.environ["FAULT"])
    sys.argv[0] = os.path.join(ROOT, "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
