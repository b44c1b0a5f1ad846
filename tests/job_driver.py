"""A job that trains nothing: it adds numbers over its processes, step by step, until it is told to stop.

    python tests/job_driver.py FOLDER [--steps N] [--timeout S] [--fault KIND:RANK:STEP]

FAULT at that step of that process: raise, user (a UserError), sleep, slow_first (rank 0 works alone, long).
FOLDER gets `status`, by rank 0, and `pid_RANK`."""
import argparse
import os
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

from nanolost.errors import UserError  # noqa: E402
from nanolost.flags import command  # noqa: E402
from nanolost.job import Job  # noqa: E402

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

def fail(kind, timeout):
    if kind == "raise":
        raise RuntimeError("injected")
    if kind == "user":
        raise UserError("a bad value: use a good one")
    if kind == "sleep":
        time.sleep(3600)

def steps(flags, job):
    kind, rank, at = flags.fault.split(":")
    for step in range(1, flags.steps + 1):
        if job.rank == int(rank) and step == int(at):
            fail(kind, flags.timeout)
        if kind == "slow_first" and step == int(at):
            job.first(lambda: time.sleep(2 * flags.timeout))
        total = job.sum(torch.tensor([float(step)]))
        assert total.item() == step * job.world
        if job.rank == 0 and step in (1, 10):
            print(f"step {step}", flush=True)
        reason = job.stop_reason()
        if reason:
            return f"stopped: {reason}"
        time.sleep(0.002)
    return "finished"

def main():
    flags = read_flags()
    write(flags, f"pid_{os.environ.get('RANK', 0)}", str(os.getpid()))
    with Job.start(types.SimpleNamespace(device="cpu", timeout=flags.timeout, deterministic=False)) as job:
        try:
            job.first(lambda: job.claim(flags.folder))
            word = steps(flags, job)
        except BaseException as e:
            word = f"failed: {job.first_fault(f'{type(e).__name__}: {e}')}"
            raise
        finally:
            if job.rank == 0:
                write(flags, "status", word)

if __name__ == "__main__":
    command(main)
