"""One run, whatever its processes do: one writer, one first process, one end.

A job is the processes that train one model. The first alone touches the files (`on_first`), under a lock that
no second run passes, and says how it goes (`Report`). `Watch` ends all of them when one has failed, hangs or
is left over."""
import contextlib
import datetime
import fcntl
import itertools
import json
import os
import platform
import signal
import sys
import threading

import torch
import torch.distributed as dist

from nanolost.files import write_atomic

HOST = platform.node()
GONE = "the store of this job is gone, and so its launcher or its first process"

def on_first(rank: int, group, work):
    """Run work() on the first process alone, of several by their `group`. All return its result, or raise the
    ValueError or OSError that it raised; after any other error `Watch` ends the others."""
    answer = [None, None]
    if rank == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    if group:
        dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]

class Report:
    """What a run says, by its first process alone: lines on stdout and, once that has a `claim` on out_dir,
    status.json and metrics.jsonl there, all with the step of `state`. As a context it notes the error that
    ends a run."""

    def __init__(self, out_dir: str, rank: int, state: dict):
        self.out_dir, self.rank, self.state = out_dir, rank, state
        self.running = False                   # a refused command leaves status.json as it was
        self.lock = self.metrics = self.watch = None
        self.writing = threading.Lock()        # the thread of Watch writes too

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        reason = f"{kind.__name__}: {error}" if error and self.running else ""
        if self.watch:
            reason = reason and self.watch.first_fault(reason)
            self.watch.over.set()              # its thread starts no further write
        if reason:
            self.failed(reason)
        for file in (self.metrics, self.lock):
            if file:
                file.close()

    def claim(self):
        """Make out_dir and lock it until the context is left or this process ends, in whatever way. Raises
        ValueError where another run has it or it cannot be written."""
        out_dir, instead = self.out_dir, "use another --out_dir"
        try:
            os.makedirs(out_dir, exist_ok=True)
            file = open(os.path.join(out_dir, ".lock"), "a+")
        except OSError as e:
            raise ValueError(f"cannot write to {out_dir} ({e.strerror}): {instead}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(f"process {file.read()} trains in {out_dir}: stop it or {instead}") from None
        file.truncate(0)
        print(f"{os.getpid()} on {HOST}", end="", file=file, flush=True)
        self.lock = file

    def say(self, text: str):
        try:
            if self.rank == 0:
                print(text, flush=True)
        except OSError:                        # a closed pipe or terminal must not end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def status(self, word: str, reason: str = ""):
        self.running |= word == "running"
        if self.lock:
            content = {"state": word, "step": self.state["step"], "reason": reason}
            with self.writing:
                write_atomic(os.path.join(self.out_dir, "status.json"), json.dumps(content).encode())

    def failed(self, reason: str):
        with contextlib.suppress(OSError):     # that may be what went wrong
            self.status("failed", reason)

    def give_up(self, reason: str):
        self.failed(reason)
        print(f"[rank {self.rank}] error: {reason}; the same command continues", file=sys.stderr, flush=True)

    def open_metrics(self):
        """Append to metrics.jsonl from here on, without lines that `state` does not know: they come again."""
        known = {kind: self.state["step"] for kind in ("train", "spike")} | {"eval": self.state["evaluated"]}
        path, kept = os.path.join(self.out_dir, "metrics.jsonl"), []
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError, TypeError):         # one that a kill cut short
                    entry = json.loads(line)
                    kept += [line] if entry["step"] <= known[entry["kind"]] else []
        write_atomic(path, "".join(kept).encode())
        self.metrics = open(path, "a", encoding="utf-8")

    def record(self, kind: str, **fields):
        if self.metrics:
            line = {"kind": kind, "step": self.state["step"], **fields}
            print(json.dumps(line), file=self.metrics, flush=True)

class Watch:
    """What the processes of a job know of one another, through a key-value store that all can reach.

    A thread shows a sign of life a second. It calls give_up(reason) and ends this process when another has
    failed or was silent for half of `timeout` seconds (stopped, or its machine gone), or when the launcher
    has died, whose orphans would train on unseen. A silent process of this machine is killed: the launcher
    would wait long for one that is stopped."""

    def __init__(self, rank: int, world: int, timeout: int, give_up):
        self.rank, self.patience, self.give_up, self.over = rank, timeout / 2, give_up, threading.Event()
        # the launcher has it before its processes start; if it has died since, nobody answers
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                   timeout=datetime.timedelta(seconds=min(timeout, 60)))
        self.store.set_timeout(datetime.timedelta(seconds=timeout))
        attempt = f"nanolost/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
        self.keys, self.fault = [f"{attempt}/{other}" for other in range(world)], f"{attempt}/fault"
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        threading.Thread(target=self.work, daemon=True).start()

    def first_fault(self, reason: str) -> str:
        """What went wrong first: `reason` here, unless another process has told the store before."""
        try:
            return self.store.compare_set(self.fault, "", f"process {self.rank}: {reason}").decode()
        except RuntimeError:                   # a lost connection here is then only what followed
            return f"{GONE} ({reason})"

    def work(self):
        signs, silent, gone, reason = [b""] * len(self.keys), [0] * len(self.keys), [], ""
        for count in itertools.count():
            try:
                self.store.set(self.keys[self.rank], f"{os.getpid()} {count} {HOST}")
                news = self.store.multi_get(self.keys)                     # the first time waits for all
                silent = [(s + 1) * (new == old) for s, new, old in zip(silent, news, signs, strict=True)]
                signs = news
                if self.launcher not in (None, os.getppid()):
                    reason = "the launcher of this job has died"
                elif gone := [i for i, s in enumerate(silent) if s >= self.patience + (self.rank > 0)]:
                    reason = self.first_fault(f"no sign of life from process {', '.join(map(str, gone))} "
                                              f"for {max(silent)} s: stopped, or its machine is gone")
                elif self.store.check([self.fault]):
                    reason = self.first_fault("")
            except RuntimeError:               # it was in the launcher, or in the first process
                reason = GONE if count else "a process of this job has not come, or its launcher has died"
            if reason and not self.over.is_set():
                try:
                    self.give_up(reason)
                    for pid, _, host in (signs[i].decode().split(" ", 2) for i in gone):
                        if host == HOST:
                            os.kill(int(pid), signal.SIGKILL)
                finally:                       # also where stderr went down with the launcher
                    os._exit(1)
            if self.over.wait(1):
                return

def pick_device(name: str) -> str:
    """"auto" is the best of cuda, mps and cpu that is here. Raises ValueError for one that is not."""
    here = [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]
    if name not in ("auto", *here):
        raise ValueError(f"--device {name}: this machine or this torch has none; use {' or '.join(here)}")
    return here[0] if name == "auto" else name
