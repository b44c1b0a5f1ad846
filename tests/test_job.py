"""job.py: real processes that find each other by any launcher, agree, stop, fail, hang and are left over."""
import ast
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from nanolost.errors import UserError
from nanolost.files import claim
from nanolost.job import Job, _device, _local_rank, pick_device, place

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests/job_driver.py"
CONFIG = types.SimpleNamespace(device="cpu", timeout=10, deterministic=False)
# seconds, for machines with a load of ten; a process that hangs would do so for an hour
PATIENCE = 150
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
            "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "TORCHELASTIC_RUN_ID")

def default_interrupt():
    # a shell starts a background process with SIGINT ignored, which children inherit
    signal.signal(signal.SIGINT, signal.SIG_DFL)

class Started:
    """Processes of driver.py, by torchrun or one by one; what they print is in `folder`."""

    def __init__(self, folder, launcher, world, *flags, of_torchrun=()):
        self.folder, self.world = folder, world
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        clean["OMP_NUM_THREADS"] = "1"
        driver = [DRIVER, folder, *flags]
        if launcher == "torchrun":
            count = f"--nproc_per_node={world}"
            torchrun = ["-m", "torch.distributed.run", "--standalone", count, *of_torchrun]
            self.processes = [self.start("log", [*torchrun, *driver], clean)]
        else:
            port = free_port()
            address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes = [self.start(f"log_{rank}", driver, {**clean, **address, "RANK": str(rank)})
                              for rank in range(world)]

    def start(self, log, command, environment):
        with open(self.folder / log, "w") as file:
            return subprocess.Popen([sys.executable, *command], env=environment, stdout=file, stderr=file,
                                    preexec_fn=default_interrupt)

    def codes(self, seconds=PATIENCE):
        end = time.monotonic() + seconds
        return [process.wait(max(0, end - time.monotonic())) for process in self.processes]

    def pid(self, rank):
        return int((self.folder / f"pid_{rank}").read_text())

    def under_way(self):
        """Wait until all processes have taken 20 steps."""
        assert within(PATIENCE, lambda: all((self.folder / f"step_{r}").exists() for r in range(self.world)))

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("log*")))

    def status(self):
        return (self.folder / "status").read_text()

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for path in self.folder.glob("pid_?"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)

@pytest.fixture
def start(tmp_path):
    started = []
    def run(launcher, world, *flags, **kwargs):
        started.append(Started(tmp_path, launcher, world, *flags, **kwargs))
        return started[-1]
    yield run
    for job in started:
        job.end()

def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()

def gone(pid):
    """Whether a process has ended; one whose launcher is dead may stay a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"

every_launcher = pytest.mark.parametrize("launcher", ["torchrun", "variables"])
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks processes up in /proc")

# --- any launcher ---

@every_launcher
def test_processes_find_each_other_by_any_launcher_and_end_with_0(start, launcher):
    job = start(launcher, 3, "--steps=30")
    assert set(job.codes()) == {0}, job.log()
    assert job.status() == "finished"
    assert "Traceback" not in job.log()

@pytest.mark.slow
@every_launcher
def test_ten_jobs_of_four_processes_end_with_ten_zeros(start, launcher):
    for _ in range(10):
        job = start(launcher, 4, "--steps=5")
        assert set(job.codes()) == {0}, job.log()

@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 1)), ({"WORLD_SIZE": "1"}, (0, 1)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
    ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, (2, 3))])
def test_a_process_knows_its_place(variables, expected, monkeypatch):
    set_launcher(monkeypatch, variables)
    assert place() == expected

@pytest.mark.parametrize("changed, message", [
    ({"RANK": None}, "RANK is missing"), ({"WORLD_SIZE": None}, "WORLD_SIZE is missing"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"), ({"MASTER_PORT": ""}, "MASTER_PORT is missing"),
    ({"RANK": "two"}, "RANK is 'two', not a number from 0 to 2"), ({"RANK": "3"}, "RANK is '3'"),
    ({"RANK": "-1"}, "RANK is '-1'"), ({"RANK": "²"}, "RANK is '²'"), ({"RANK": "1.0"}, "RANK is"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"), ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"), ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'")])
def test_half_a_launcher_is_the_users_error(changed, message, monkeypatch):
    whole = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    set_launcher(monkeypatch, {**whole, **changed})
    with pytest.raises(UserError, match=message):
        Job.start(CONFIG)

def set_launcher(monkeypatch, variables):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)

@pytest.mark.parametrize("variables, local", [
    ({}, 5), ({"LOCAL_RANK": "1"}, 1), ({"SLURM_LOCALID": "2"}, 2), ({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 3),
    ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1)])
def test_the_local_rank_is_what_the_launcher_says_or_else_the_rank(variables, local, monkeypatch):
    set_launcher(monkeypatch, variables)
    assert _local_rank(5) == local

@pytest.mark.parametrize("gpus, local, device", [(4, 3, "cuda:3"), (4, 5, "cuda:1"), (1, 3, "cuda:0")])
def test_each_process_takes_its_own_gpu_also_where_it_sees_no_other(gpus, local, device, monkeypatch):
    set_launcher(monkeypatch, {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert _device("cuda", local) == torch.device(device)
    assert _device("cpu", local) == torch.device("cpu")

def test_more_processes_than_gpus_on_a_machine_are_the_users_error(monkeypatch):
    set_launcher(monkeypatch, {"LOCAL_WORLD_SIZE": "4"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        _device("cuda", 0)

def test_a_device_that_is_not_here_is_the_users_error():
    with pytest.raises(UserError, match="--device tpu: .*cpu"):
        pick_device("tpu")

# --- signals ---

@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_ask_for_a_stop_and_are_as_before_when_the_job_ends(name, monkeypatch):
    set_launcher(monkeypatch, {})
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Job.start(CONFIG) as job:
        assert job.stop_reason() == ""
        signal.raise_signal(getattr(signal, name))
        assert job.asked == [name] and job.stop_reason() == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before

def test_a_job_that_cannot_start_leaves_the_signals_as_they_were(monkeypatch):
    set_launcher(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    def nobody(*args, **kwargs):
        raise torch.distributed.DistNetworkError("nobody answers")
    monkeypatch.setattr(torch.distributed, "rendezvous", nobody)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConnectionError, match="did not find each other: nobody answers"):
        Job.start(CONFIG)
    assert signal.getsignal(signal.SIGTERM) == before

def test_a_job_starts_in_a_thread_of_a_notebook(monkeypatch):
    set_launcher(monkeypatch, {})
    seen = []
    def work():
        with Job.start(CONFIG) as job:
            seen.append(job.stop_reason())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [""]

@pytest.mark.parametrize("launcher, name", [("torchrun", "SIGTERM"), ("variables", "SIGUSR1")])
def test_a_signal_stops_all_processes_at_the_same_step(start, launcher, name):
    job = start(launcher, 2)
    job.under_way()
    job.processes[0].send_signal(getattr(signal, name))
    # torchrun itself ends with 1 after any signal
    assert job.codes() == ([1] if launcher == "torchrun" else [0, 0]), job.log()
    assert job.status() == f"stopped: {name}"

def test_a_signal_to_one_process_alone_stops_all(start):
    job = start("variables", 2)
    job.under_way()
    os.kill(job.pid(1), signal.SIGTERM)
    assert job.codes() == [0, 0], job.log()
    assert job.status() == "stopped: a signal to another process"

def test_a_second_interrupt_ends_at_once(start):
    job = start("variables", 1, "--fault=sleep:0:21")
    job.under_way()
    time.sleep(0.5)
    os.kill(job.pid(0), signal.SIGINT)
    time.sleep(0.5)
    assert job.processes[0].poll() is None
    os.kill(job.pid(0), signal.SIGINT)
    assert job.codes() == [1] and job.log() == "error: interrupted\n"

# --- a process that fails, hangs or is left over ---

@pytest.mark.parametrize("launcher, rank", [("torchrun", 1), ("variables", 0), ("variables", 1)])
def test_a_process_that_fails_ends_the_job_and_is_named(start, launcher, rank):
    job = start(launcher, 3, f"--fault=raise:{rank}:21")
    assert set(job.codes()) == {1}, job.log()
    # also where torchrun's SIGTERM had asked for a stop before the lost exchange was felt
    assert job.status() == f"failed: process {rank}: RuntimeError: injected"
    # a traceback by the one that failed, a line by the others, and the cause in torchrun's summary
    assert job.log().count("in fail\n") == 1
    lines = job.log().splitlines()
    # torchrun may end one of the others before it feels the loss
    assert lines.count(f"error: process {rank}: RuntimeError: injected") <= 1
    if launcher == "variables":
        assert sum(line.endswith(f"error: process {rank}: RuntimeError: injected") for line in lines) == 2
    if launcher == "torchrun":
        assert any(line.startswith("  traceback :") and line.endswith("injected") for line in lines)

def test_an_attempt_after_a_restart_knows_nothing_of_the_fault_before(start):
    job = start("torchrun", 2, "--steps=30", "--fault=once:1:21", of_torchrun=["--max_restarts=1"])
    assert job.codes() == [0], job.log()
    assert job.status() == "finished" and "RuntimeError: injected" in job.log()

def test_a_users_error_on_one_process_alone_is_said(start):
    job = start("variables", 2, "--fault=user:1:21")
    assert job.codes() == [1, 2], job.log()
    assert (job.folder / "log_1").read_text() == "[rank 1] error: a bad value: use a good one\n"
    assert (job.folder / "log_0").read_text() == "error: process 1: UserError: a bad value: use a good one\n"

@linux
@pytest.mark.parametrize("launcher, rank", [("torchrun", 1), ("variables", 0)])
def test_a_process_that_is_killed_ends_the_job(start, launcher, rank):
    job = start(launcher, 2)
    job.under_way()
    os.kill(job.pid(rank), signal.SIGKILL)
    codes = job.codes()
    assert 0 not in codes and 2 not in codes, job.log()
    assert within(PATIENCE, lambda: gone(job.pid(1 - rank)))
    if rank == 1:
        assert job.status().startswith("failed: process 0: lost another process")

def test_a_process_that_hangs_ends_the_job_within_the_time_out(start):
    job = start("torchrun", 3, "--timeout=5", "--fault=sleep:1:21")
    job.under_way()
    # 5 s, and 30 in which torchrun waits for the one that sleeps
    assert job.codes() == [1], job.log()
    assert job.status().startswith("failed: process") and "lost another process" in job.status()

@linux
@pytest.mark.parametrize("launcher, rank", [("torchrun", 1), ("variables", 0)])
def test_a_process_that_is_stopped_ends_the_others_within_the_time_out(start, launcher, rank):
    job = start(launcher, 2, "--timeout=5")
    job.under_way()
    os.kill(job.pid(rank), signal.SIGSTOP)
    # without torchrun rank 0 holds the store, which then is silent too; torchrun kills the stopped one 30 s
    # after the other has failed
    assert within(60, lambda: gone(job.pid(1 - rank))), job.log()
    assert "lost another process (Timed out" in job.log()

@linux
def test_processes_end_when_their_launcher_is_killed(start):
    job = start("torchrun", 2)
    job.under_way()
    job.processes[0].kill()
    assert within(60, lambda: gone(job.pid(0)) and gone(job.pid(1)))

@linux
def test_processes_end_when_their_launcher_is_killed_before_they_met(start):
    job = start("torchrun", 2, "--timeout=1000", "--fault=late:1:0")
    assert within(PATIENCE, lambda: all((job.folder / name).exists() for name in ("late", "pid_0")))
    job.processes[0].kill()
    assert within(60, lambda: gone(job.pid(0)) and gone(job.pid(1)))

def test_a_process_ends_whose_launcher_was_killed_while_torch_was_loaded():
    script = ("import time, nanolost\nnanolost.PARENT = -1\nfrom nanolost import job\n"
              "job._end_with_launcher()\ntime.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 1

def test_no_process_is_killed_by_a_number(tmp_path):
    """Process ids that came over a network, or that are old, may be anybody's."""
    for path in (ROOT / "nanolost").glob("*.py"):
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Attribute)}
        assert not names & {"os.kill", "os.killpg"}, path

# --- rank 0 alone ---

def test_what_rank_0_does_for_all_may_take_longer_than_the_time_out(start):
    job = start("variables", 2, "--steps=30", "--timeout=3", "--fault=first:0:21")
    assert job.codes() == [0, 0], job.log()

def test_a_signal_ends_what_rank_0_does_for_all_where_it_may(start, tmp_path):
    job = start("variables", 2, "--steps=30", "--timeout=60", "--fault=stop:0:21")
    assert job.codes() == [0, 0], job.log()
    assert (tmp_path / "status").read_text() == "stopped: SIGTERM"

def test_a_folder_of_another_run_is_refused_on_all_processes_and_said_once(start, tmp_path):
    with claim(str(tmp_path), "trains"):
        job = start("torchrun", 2)
        assert job.codes() == [1], job.log()
    lines = [line for line in job.log().splitlines() if "error: " in line]
    assert lines[0].startswith(f"error: process {os.getpid()} on ") and " trains in " in lines[0], job.log()
    assert not any(line.startswith("[rank 1]") for line in lines)

@pytest.mark.parametrize("error", [UserError("no"), OSError("full"), KeyError("a defect")])
def test_one_process_alone_needs_no_others(error, monkeypatch, tmp_path):
    set_launcher(monkeypatch, {})
    def fail():
        raise error
    with Job.start(CONFIG) as job:
        assert job.first(lambda: 3) == 3
        with pytest.raises(type(error)):
            job.first(fail)
        tensor = torch.arange(3.0)
        assert job.sum(tensor) is tensor and job.gather("a") == ["a"] and job.broadcast(tensor, 0) is None
        assert tensor.tolist() == [0, 1, 2]
        assert job.first_fault("why") == "process 0: why"
        job.claim(str(tmp_path / "out"))
        with pytest.raises(UserError, match="trains in"):
            claim(str(tmp_path / "out"), "trains")
    claim(str(tmp_path / "out"), "trains").close()

def test_deterministic_is_as_before_when_the_job_ends(monkeypatch):
    set_launcher(monkeypatch, {})
    with Job.start(types.SimpleNamespace(device="cpu", timeout=10, deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
