"""How many threads compute: as many as cores are free, because each one more waits for a core at every step.
That their waiting is short is set in `nanolost/__init__.py`, before torch can be imported."""
import os
import time

import torch

from nanolost.cores import usable_cores
from nanolost.errors import UserError

# seconds: 20 ticks of the kernel's clock, so that a share is known to a twentieth of a core
SAMPLE = 0.2
# OpenMP ends the process, without a word, where it cannot start as many
MOST = 1024
# torchrun, Open MPI, MPICH: how many processes of the job this machine has
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

def use_threads(count: int | None = None) -> int:
    """Compute with `count` threads; by default with OMP_NUM_THREADS, which torchrun sets to 1, else with what
    is free. Returns the number: sums over several threads are the same bit for bit only for an equal one."""
    if count is None and os.environ.get("OMP_NUM_THREADS"):
        # torch has read it; also "4,2", which is one number for each level
        count = torch.get_num_threads()
    if count is None:
        count = free_cores()
    if count > MOST:
        raise UserError(f"--threads {count}: at most {MOST}")
    torch.set_num_threads(count)
    return count

def free_cores(sample: float = SAMPLE) -> int:
    """Cores, at least 1, that this process may use and that nobody used for the last `sample` seconds; of
    several processes of a job on this machine a fair share of all, as the others are only starting."""
    usable = usable_cores()
    processes = _local_size()
    if processes > 1:
        return max(1, usable // processes)
    before = _busy_and_idle()
    if not before:
        return usable
    time.sleep(sample)
    idle = sum(_share_idle(old, new) for old, new in zip(before, _busy_and_idle(), strict=True))
    # half a core that is busy has room for a thread
    return max(1, min(usable, round(idle)))

def _local_size() -> int:
    for name in LOCAL_SIZES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1

def _share_idle(old: tuple[int, int], new: tuple[int, int]) -> float:
    busy, idle = new[0] - old[0], new[1] - old[1]
    # a clock that stood still tells nothing
    return idle / (busy + idle) if busy + idle > 0 else 1.0

def _busy_and_idle(path: str = "/proc/stat") -> list[tuple[int, int]]:
    """Ticks (busy, idle) since the start of the machine of each core that this process may use; empty where
    there is no such file."""
    try:
        with open(path, encoding="ascii") as file:
            lines = file.read().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        # macOS and Windows
        return []
    cores = []
    for line in lines:
        name, *ticks = line.split()
        if name in mine:
            # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); guests are in user as well
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])
            cores.append((user + nice + system + irq + softirq + steal, idle + iowait))
    return cores
