"""A job that trains nothing: it adds numbers over its processes, step by step, until it is told to stop.

    python tests/job_driver.py FOLDER [--steps N] [--timeout S] [--fault KIND:RANK:STEP]

FAULT at that step of that process: raise, once (not after a restart), user (a UserError), sleep (an hour);
first (rank 0 works twice the time-out for all), stop (a signal comes in the middle of such work), late (the
process never looks for the others). FOLDER gets `status`, by rank 0, `pid_RANK`, `step_RANK` at step 20."""
import argparse
import os
import signal
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import nanolost  # noqa: E402, F401, I001  before torch, as the commands do
import torch  # noqa: E402

from nanolost.errors import UserError  # noqa: E402
from nanolost.flags import command  # noqa: E402
from nanolost.job import Job, Stopped  # noqa: E402

def read_flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--fault", default="none:0:0")
    return parser.parse_args()

def write(flags, name, text):
    path = os.path.join(flags.folder, name)
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.part", path)

def come_late(flags):
    def never(*args, **kwargs):
        write(flags, "late", "")
        time.sleep(3600)
    torch.distributed.rendezvous = never

def fail(kind):
    if kind == "raise" or kind == "once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("injected")
    if kind == "user":
        raise UserError("a bad value: use a good one")
    if kind == "sleep":
        time.sleep(3600)

def work_and_stop():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)

def take_steps(flags, job):
    kind, rank, at = flags.fault.split(":")
    for step in range(1, flags.steps + 1):
        if step == int(at):
            if job.rank == int(rank):
                fail(kind)
            if kind == "first":
                job.first(lambda: time.sleep(2 * flags.timeout))
            if kind == "stop":
                try:
                    job.first(work_and_stop, at_once=True)
                except Stopped as reason:
                    return f"stopped: {reason}"
        total = job.sum(torch.tensor([float(step)]))
        assert total.item() == step * job.world
        reason = job.stop_reason()
        if reason:
            return f"stopped: {reason}"
        if step == 20:
            write(flags, f"step_{job.rank}", "20")
        time.sleep(0.002)
    return "finished"

def main():
    flags = read_flags()
    kind, rank, _ = flags.fault.split(":")
    write(flags, f"pid_{os.environ.get('RANK', 0)}", str(os.getpid()))
    if kind == "late" and rank == os.environ["RANK"]:
        come_late(flags)
    with Job.start(types.SimpleNamespace(device="cpu", timeout=flags.timeout, deterministic=False)) as job:
        try:
            job.claim(flags.folder)
            word = take_steps(flags, job)
        except BaseException as e:
            if job.rank == 0:
                word = f"failed: {job.first_fault(f'{type(e).__name__}: {e}')}"
            raise
        finally:
            if job.rank == 0:
                write(flags, "status", word)

if __name__ == "__main__":
    command(main)
