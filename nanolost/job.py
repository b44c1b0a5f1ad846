"""Where this process is among those that train one model, and how they start, agree, stop and end together.

Any launcher will do that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: torchrun, srun, mpirun, a
PyTorchJob, a shell. Without them one process trains alone.

A process that is killed or fails closes its connections, which ends the others in their next exchange. One
that hangs or is stopped lets their exchange time out. Nothing here watches or kills another process."""
import contextlib
import datetime
import os
import re
import signal
import threading
import time

import torch
import torch.distributed as dist

from nanolost import PARENT
from nanolost.errors import UserError
from nanolost.files import claim
from nanolost.flags import say

# seconds; machines and containers of one job come up minutes apart, whatever --timeout is
START = 60
# seconds for a word to the store, which a stopped process may hold: see Job.first_fault
LAST_WORD = 5
# seconds that rank 0 holds the store after a failure
LINGER = 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun, SLURM, Open MPI, MPICH and Intel MPI: the number of a process on its machine
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# what an exchange that failed says somewhere, and no other error of torch
BACKEND = re.compile(r"gloo|nccl|NCCL|c10d|ProcessGroup")

# --- where this process is ---

def place() -> tuple[int, int]:
    """(rank, world size) as the launcher has set them, (0, 1) without one. UserError for half a setting,
    which would make two runs that wait for, or write over, each other."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    world = _variable("WORLD_SIZE", 1, 10**6)
    rank = _variable("RANK", 0, world - 1)
    if world > 1:
        _variable("MASTER_PORT", 1, 65_535)
        if not os.environ.get("MASTER_ADDR"):
            raise _half_set("MASTER_ADDR is missing")
    return rank, world

def _variable(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        raise _half_set(f"{name} is missing")
    # int() would take " 1", "1_0" and other alphabets' digits
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise _half_set(f"{name} is {text!r}, not a number from {low} to {high}")
    return int(text)

def _half_set(what: str) -> UserError:
    return UserError(f"environment: {what}: start several processes with torchrun, or set RANK, WORLD_SIZE, "
                     "MASTER_ADDR and MASTER_PORT for each; for one process unset them")

def pick_device(name: str) -> str:
    """"auto" is the best of cuda, mps and cpu that is here. Raises UserError for one that is not."""
    # from the fastest to the slowest
    here = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
    here.append("cpu")
    if name == "auto":
        return here[0]
    if name not in here:
        raise UserError(f"--device {name}: not available here; use {' or '.join(here)}")
    return name

def _local_rank(rank: int) -> int:
    for name in LOCAL_RANKS:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    # a launcher that says nothing fills one machine after the other
    return rank

def _device(kind: str, local_rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each process its own GPU alone, as number 0
    if count > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > count:
        raise UserError(f"this machine has {count} GPUs: start torchrun with --nproc_per_node={count}")
    return torch.device(kind, local_rank % count)

def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ

# --- the job ---

class Alone:
    """One process that asks nobody, for who saves a checkpoint outside a job."""

    rank = 0
    world = 1

    def first(self, work):
        return work()

    def gather(self, value, patient: bool = False) -> list:
        return [value]

    def wait(self):
        pass

class Stopped(Exception):
    """A signal, by its name, asked for a stop in the middle of work that leaves nothing behind."""

class Job:
    """This process among the `world` that train one model: `rank`, `local_rank`, `device`, and `asked`, the
    names of the signals that asked for a stop. A context, made by `Job.start`.

    Every process must call `first`, `sum`, `gather`, `broadcast` and `stop_reason` in the same order. Where
    another is gone or does not answer in time they raise ConnectionError, with what failed first."""

    def __init__(self, kind: str):
        self.rank, self.world = place()
        self.local_rank = _local_rank(self.rank)
        self.device = _device(kind, self.local_rank)
        self.timeout = None
        # filled by signal handlers, read at the end of a step
        self.asked = []
        # whether a signal is answered in the middle of what is done now
        self.at_once = False
        # the store stays None, and every exchange a no-op, in a job of one process
        self.store = self.patient = None
        self.stack = contextlib.ExitStack()

    @classmethod
    def start(cls, config) -> "Job":
        """The job as `config` (device, timeout in seconds, deterministic) wants it: signal handlers are
        set, the other processes found. UserError where the launcher or the device is not as it must be."""
        job = cls(pick_device(config.device))
        # undone where the start fails, else when the context is left
        with contextlib.ExitStack() as stack:
            _catch_signals(stack, job)
            _set_up_device(stack, job.device, config.deterministic)
            if job.world > 1:
                job._meet(config.timeout)
            job.stack = stack.pop_all()
        return job

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind, error, trace):
        with self.stack:
            if self.world == 1:
                return
            if error is None:
                self._part()
            else:
                # told before this process closes its connections: what the others then feel comes second
                self.first_fault(f"{kind.__name__}: {error}")
                if self.rank == 0 and not _under_torchrun():
                    self._linger()

    def _meet(self, timeout: int):
        """Find the others: through a store that torchrun holds, or else rank 0."""
        _end_with_launcher()
        wait = datetime.timedelta(seconds=max(timeout, START))
        # torchrun has its store before its processes start: one that is not there will never be
        connect = datetime.timedelta(seconds=START) if _under_torchrun() else wait
        try:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.world, timeout=connect))
            # what a process that was left over, or an attempt before a restart, says is not meant for us
            run = os.environ.get("TORCHELASTIC_RUN_ID", "")
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = dist.PrefixStore(f"nanolost/{run}/{attempt}", store)
            self._wait_for_all(wait)
        except RuntimeError as e:
            raise ConnectionError(f"the processes of this job did not find each other: {e}") from e
        self.timeout = seconds = datetime.timedelta(seconds=timeout)
        # by the device of the tensor: NCCL takes none of the CPU's
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        with self._together():
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world,
                                    timeout=seconds)
            # waits while rank 0 saves
            self.patient = dist.new_group(backend="gloo", timeout=10 * seconds)

    def _wait_for_all(self, wait: datetime.timedelta):
        """ConnectionError names those who have not come."""
        # they come minutes apart, and the exchange that follows allows no more than --timeout
        keys = [f"here/{rank}" for rank in range(self.world)]
        # the value says nothing; that the key is there does
        self.store.set(keys[self.rank], "")
        try:
            self.store.wait(keys, wait)
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise ConnectionError(f"process {', '.join(map(str, missing))} of this job has not come within "
                                  f"{wait.seconds} s") from None

    def _part(self):
        """End together: one that left at once would look lost to those that are an exchange behind."""
        self.wait()
        dist.destroy_process_group()

    def _linger(self):
        """Hold the store, which ends with this process, while the others ask it for the cause."""
        if self.device.type != "cuda":
            # they feel it now; NCCL's would first wait for its kernels, which may never end
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        time.sleep(LINGER)

    # --- what the processes say to each other ---

    @contextlib.contextmanager
    def exchanges(self):
        """Around code in which torch itself exchanges tensors, as a split model does in a forward pass: that
        another process is lost is a ConnectionError there too."""
        try:
            yield
        except RuntimeError as e:
            # the store has errors of its own, as where groups are made
            of_exchange = isinstance(e, dist.DistError) or BACKEND.search(str(e))
            if self.world == 1 or not of_exchange:
                raise
            raise ConnectionError(self.first_fault(f"lost another process ({_cause(e)})")) from e

    @contextlib.contextmanager
    def _together(self):
        try:
            yield
        except RuntimeError as e:
            raise ConnectionError(self.first_fault(f"lost another process ({_cause(e)})")) from e

    def first(self, work, at_once: bool = False):
        """Run work() on rank 0 alone, for up to ten times --timeout. All return its result, or raise the
        UserError or OSError that it raised. at_once: a signal ends it, and all raise Stopped."""
        answer = [None, None]
        if self.rank == 0:
            # any other error ends rank 0, and with its connections the others
            try:
                if at_once and self.asked:
                    raise Stopped(self.asked[0])
                self.at_once = at_once
                answer[0] = work()
                self.at_once = False
            except (UserError, OSError, Stopped) as error:
                self.at_once = False
                answer[1] = error
        if self.world > 1:
            with self._together():
                dist.broadcast_object_list(answer, src=0, group=self.patient)
        result, error = answer
        if error is not None:
            raise error
        return result

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value, patient: bool = False) -> list:
        """The values of all processes, by rank. patient: for up to ten times --timeout."""
        values = [value] * self.world
        if self.world > 1:
            with self._together():
                dist.all_gather_object(values, value, group=self.patient if patient else None)
        return values

    def wait(self):
        """For all processes, up to ten times --timeout."""
        if self.world > 1:
            with self._together():
                dist.barrier(group=self.patient)

    def broadcast(self, tensor: torch.Tensor, src: int):
        """Fill `tensor` with that of process `src`, in place."""
        if self.world > 1:
            with self._together():
                dist.broadcast(tensor, src)

    def stop_reason(self) -> str:
        """The signal that asks for a stop, "" without one; the same answer, or silence, on all processes."""
        # torchrun sends SIGTERM when a process has failed: this sum then fails too, and no stop is noted
        stops = self.sum(torch.tensor(len(self.asked)))
        if not stops:
            return ""
        return self.asked[0] if self.asked else "a signal to another process"

    def first_fault(self, reason: str) -> str:
        """What failed first in this job: `reason` here, unless another process has told its own before."""
        answer = [f"process {self.rank}: {reason}"]
        def ask():
            with contextlib.suppress(RuntimeError):
                answer[0] = self.store.compare_set("fault", "", answer[0]).decode()
        if self.store is not None:
            # a thread, because the store knows no time-out here: rank 0 may hold it and be stopped
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(LAST_WORD)
        return answer[0]

    def claim(self, out_dir: str):
        """Lock out_dir until the job ends, by rank 0. UserError on all where another run has it."""
        def lock():
            self.stack.enter_context(claim(out_dir, "trains"))
        self.first(lock)

    def say(self, text: str):
        """Print a line, by rank 0 alone."""
        if self.rank == 0:
            say(text)

def _cause(error: Exception) -> str:
    # gloo begins with a place in its source and ends with advice, NCCL goes on for pages
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+\] ", "", line).partition(". ")[0] or type(error).__name__

def _catch_signals(stack: contextlib.ExitStack, job: Job):
    """A signal asks for a stop, on which all agree at the end of a step; a second Ctrl-C ends at once."""
    # Python allows handlers in the main thread alone; a notebook's own thread is stopped by the notebook
    if threading.current_thread() is not threading.main_thread():
        return
    def ask(number, frame):
        name = signal.Signals(number).name
        job.asked.append(name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if job.at_once:
            # one is enough: what cleans up is not to be stopped
            job.at_once = False
            raise Stopped(name)
    for number in SIGNALS:
        before = signal.signal(number, ask)
        # None: one that was not set by Python, and cannot be put back
        stack.callback(signal.signal, number, before or signal.SIG_DFL)

def _set_up_device(stack: contextlib.ExitStack, device: torch.device, deterministic: bool):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace (its manual, "Results reproducibility")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)

def _end_with_launcher():
    """Where `kill -9` of torchrun leaves its processes behind, end this one: it would train on unseen, and
    hold the lock that the same command needs."""
    if not _under_torchrun():
        # srun and mpirun end theirs themselves; a shell may leave on purpose
        return
    def watch():
        # an orphan gets another parent
        while os.getppid() == PARENT:
            time.sleep(1)
        # the main thread may wait for another orphan for as long as --timeout; a checkpoint is whole anyway
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
