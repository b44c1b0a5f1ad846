"""The promises of README.md, "It cannot be killed": real commands, signals, full disks and damaged files.

Runs are compared with one that nothing happened to: the same lines in metrics.jsonl (but for speeds), the
same bytes in the last checkpoint. `--kills 30` sends more random kills than the default."""
import ast
import contextlib
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, flags_of, launch, status

import train
from model import Llama
from nanolost import checkpoint, data
from nanolost.job import Report
from nanolost.tokenizer import Tokenizer

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks processes up in /proc")

def lines(config):
    """The lines of metrics.jsonl without what a clock or a memory gauge says."""
    measured = {"tokens_per_second", "step_ms", "mfu", "peak_memory_bytes"}
    with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in f]

def last_checkpoint(config):
    """Its files as bytes; state.json without the folder's name and the number of threads."""
    folder = checkpoint.checkpoints(config.out_dir)[-1]
    files = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    del files["manifest.json"]                 # has the hash of state.json
    state = json.loads(files["state.json"])
    state["config"] |= {"out_dir": "", "threads": 0}
    return {**files, "state.json": state}

def finish(config, processes=1, **kwargs):
    process = launch(config, processes, **kwargs)
    output = process.communicate()[0]
    assert process.returncode == 0 and status(config)["state"] == "finished", output
    return output

def run_straight(config, processes):
    """Without an interruption; one process needs no command of its own."""
    train.main(config) if processes == 1 else finish(config, processes)

def assert_same_run(one, other):
    assert lines(one) == lines(other)
    assert last_checkpoint(one) == last_checkpoint(other)

def wait_for(process, start):
    """Read the output up to a line that starts so; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(start):
            return "".join(read)
    raise AssertionError(f"no line {start!r} in: {''.join(read)}")

def children(pid):
    """Processes started by `pid`, in the order of their start."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as f:
            number, rest = f.read().split(" ", 1)
            if int(rest.rpartition(")")[2].split()[1]) == pid:
                found.append(int(number))
    return sorted(found)

def gone(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] == "Z"
    return True

def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()

# --- kills ---

@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills_change_nothing(small, tmp_path, processes, request):
    kills = request.config.getoption("kills")
    sizes = dict(steps=100 * kills, save_every=3, eval_every=50, keep=2)
    straight, killed = small(**sizes, out_dir=str(tmp_path / "straight")), small(**sizes)
    started = time.monotonic()
    process = launch(straight, processes)
    wait_for(process, "step      1/")
    start_up = time.monotonic() - started
    process.communicate()
    seed = random.randrange(10**6)
    dice, victims = random.Random(seed), []
    while len(victims) < kills:
        with open(tmp_path / "log", "w") as log:
            process = launch(killed, processes, stdout=log)
        time.sleep(dice.uniform(0, start_up) if dice.random() < 0.3 else start_up + dice.uniform(0, 1.5))
        ranks = children(process.pid)
        victim = dice.choice(["one process", "all processes", "launcher"] if ranks else ["launcher"])
        assert process.poll() is None, f"after {victims}: {(tmp_path / 'log').read_text()}"
        for pid in {"one process": ranks[-1:] if dice.random() < 0.5 else ranks[:1], "all processes": ranks,
                    "launcher": [process.pid]}[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        victims.append(victim)
        if checkpoint.checkpoints(killed.out_dir):
            assert checkpoint.newest_checkpoint(killed.out_dir), f"seed {seed}"
    finish(killed, processes)
    assert_same_run(killed, straight)

def die_and_continue(before, killed, straight, number):
    """Name of the point at which a run that goes on from `before` was killed, by its number. What it left
    must hold a good checkpoint, and end as the straight run."""
    shutil.rmtree(killed.out_dir, ignore_errors=True)
    shutil.copytree(before.out_dir, killed.out_dir)
    process = launch(killed, fault=f"die:{number}")
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert any(checkpoint.verify(folder) is None for folder in checkpoint.checkpoints(killed.out_dir)), output
    assert checkpoint.load_model(killed.out_dir)[1]["step"] in (4, killed.steps), output
    train.main(killed)
    assert_same_run(killed, straight)
    return output.split("POINT ")[-1].splitlines()[0]

def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(small, tmp_path, monkeypatch):
    straight, before, killed = (small(steps=4, keep=1, out_dir=str(tmp_path / name))
                                for name in ("straight", "before", "killed"))
    train.main(straight)
    with monkeypatch.context() as patch:       # a stop in the last evaluation: it is made up and saved again
        patch.setattr(train, "evaluate", lambda *args: None)
        train.main(before)
    died_at, first = [], 16                    # the points before are those of any save
    while "after the save" not in died_at:
        died_at.append(die_and_continue(before, killed, straight, first + len(died_at)))
    assert died_at.count("before rename") == 3                             # aside, into place, of the old one

def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(small, monkeypatch):
    config = small(steps=4, keep=1)
    train.main(config)
    final = checkpoint.checkpoints(config.out_dir)[0]
    shutil.copytree(final, f"{final}_before")  # as an interrupted replacement leaves it
    os.truncate(os.path.join(final, "model.safetensors"), 1000)
    model, state = checkpoint.load_model(config.out_dir)
    rename = os.rename
    def refuse_the_new_one(source, target):
        if ".tmp_step" in source:
            raise OSError("No space left on device")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="cannot save"):
        checkpoint.save_checkpoint(config.out_dir, 4, model, [], state, Tokenizer.named("byte"), 1)
    assert checkpoint.verify(checkpoint.newest_checkpoint(config.out_dir)) is None

def test_lines_that_will_come_again_are_dropped(tmp_path):
    entries = [{"kind": kind, "step": step} for step in (4, 5) for kind in ("train", "eval", "spike")]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "3\n{}\n{\"kind")
    with Report(str(tmp_path), 0, {"step": 4, "evaluated": 0}) as report:
        report.open_metrics()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [entries[0], entries[2]]

def test_a_kill_at_every_point_of_a_save_loses_nothing(small, tmp_path):
    straight = small(keep=1, out_dir=str(tmp_path / "straight"))
    before = small(out_dir=str(tmp_path / "before"))
    train.main(straight)
    train.main(before)
    shutil.rmtree(checkpoint.checkpoints(before.out_dir)[1])               # the next save is that of step 8
    killed, died_at = small(keep=1), []
    while "after the save" not in died_at:
        died_at.append(die_and_continue(before, killed, straight, len(died_at)))
        left = os.listdir(os.path.join(killed.out_dir, "checkpoints"))
        assert {"step_00000008"} <= set(left) <= {"step_00000004", "step_00000008"}, died_at
    expected = {f"half of {name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json",
                                               "config.json", "manifest.json")}
    expected |= {f"before {name}" for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")}
    assert expected <= set(died_at) and len(died_at) > 25

@linux
@pytest.mark.parametrize("freeze", [True, False], ids=["an instant", "while it changes"])
def test_at_any_moment_a_copy_of_the_folder_holds_a_good_checkpoint(small, tmp_path, freeze):
    config = small(steps=100_000, save_every=1, eval_every=50_000, keep=1 if freeze else 3)
    process = launch(config, stdout=subprocess.DEVNULL)
    assert within(60, lambda: checkpoint.checkpoints(config.out_dir))
    steps, copy = set(), str(tmp_path / "copy")
    for _ in range(60):
        time.sleep(random.uniform(0, 0.05))
        if freeze:                             # only one is kept, and could go while it is copied
            process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(shutil.Error):                            # files that go while it copies
            shutil.copytree(os.path.join(config.out_dir, "checkpoints"), os.path.join(copy, "checkpoints"))
        if freeze:
            process.send_signal(signal.SIGCONT)
            assert all(checkpoint.verify(folder) is None for folder in checkpoint.checkpoints(copy))
        steps.add(checkpoint.load_model(copy)[1]["step"])
        shutil.rmtree(copy)
    process.kill()
    process.communicate()
    assert len(steps) > 20

@linux
def test_processes_whose_launcher_was_killed_end_by_themselves(small):
    config = small(steps=100_000, eval_every=50_000)
    process = launch(config, 2)
    wait_for(process, "step     10/")
    ranks = children(process.pid)
    process.stdout.close()                     # as where the terminal went too
    process.kill()
    assert len(ranks) == 2 and within(15, lambda: all(map(gone, ranks)))
    assert status(config) | {"step": 0} == {"state": "failed", "step": 0, "reason": status(config)["reason"]}
    assert "launcher" in status(config)["reason"]

def test_processes_whose_launcher_was_killed_before_they_found_each_other_end_too(small):
    process = launch(small(timeout=10), 2, fault="late:1")
    wait_for(process, "LATE")                  # the other has yet to connect, or searches: 10 s at most
    ranks = children(process.pid)
    process.kill()
    assert len(ranks) == 2 and within(45, lambda: all(map(gone, ranks)))

# --- one writer ---

def test_a_second_run_on_a_folder_ends_with_code_2_and_names_the_first(small):
    config = small(steps=100_000)
    first = launch(config)
    wait_for(first, "step     10/")
    second = launch(config)
    output = second.communicate()[0]
    assert second.returncode == 2 and output.startswith(f"error: process {first.pid} on "), output
    assert status(config)["state"] == "running"
    first.kill()
    first.communicate()

# --- signals ---

MOMENTS = {                                    # the line after which the signal comes, and sizes for it
    "first step": ("tokens", dict(batch_tokens=32 * 400, micro_batch=1, steps=2)),
    "training": ("step     20/", dict(steps=200, save_every=200, eval_every=200)),
    "evaluation": ("step      4/", dict(seq_len=8, batch_tokens=16, micro_batch=1, eval_tokens=12_000)),
    "last evaluation": ("step      8/", dict(seq_len=8, batch_tokens=16, micro_batch=1, eval_tokens=12_000)),
}

@pytest.mark.parametrize("processes, name, moment", [
    *[(1, "SIGTERM", moment) for moment in MOMENTS], (1, "SIGINT", "training"), (1, "SIGUSR1", "training"),
    (2, "SIGTERM", "first step"), (2, "SIGUSR1", "training"), (2, "SIGTERM", "evaluation"),
])
def test_a_signal_stops_at_a_step_and_the_same_command_continues(small, tmp_path, moment, processes, name):
    line, sizes = MOMENTS[moment]
    stopped, straight = small(**sizes), small(**sizes, out_dir=str(tmp_path / "straight"))
    process = launch(stopped, processes, flags=["--signals-to-handle=SIGUSR1,SIGTERM,SIGINT"])
    wait_for(process, line)
    process.send_signal(getattr(signal, name))
    output = process.communicate()[0]
    assert process.returncode == (0 if processes == 1 else 1), output      # torchrun itself: 1
    found = status(stopped)
    assert (found["state"], found["reason"]) == ("stopped", name), output
    evaluated = checkpoint.load_model(stopped.out_dir)[1]["evaluated"]
    if moment == "training":
        assert 20 <= found["step"] < 200
    else:
        expected = {"first step": (1, 0), "evaluation": (4, 0), "last evaluation": (8, 4)}[moment]
        assert (found["step"], evaluated) == expected
    assert "continuing from" in finish(stopped, processes)
    run_straight(straight, processes)
    assert_same_run(stopped, straight)

@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_alone_stops_all(small, rank):
    config = small(steps=100_000, save_every=50_000, eval_every=50_000)
    process = launch(config, 2)
    wait_for(process, "step     20/")
    os.kill(children(process.pid)[rank], signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and status(config)["state"] == "stopped", output
    assert checkpoint.load_model(config.out_dir)[1]["step"] == status(config)["step"]

def test_an_evaluation_ends_at_once_when_asked_to(small):
    nothing = train.contextlib.nullcontext()   # to read from data that is None would be an error
    cpu = train.torch.device("cpu")
    assert train.evaluate(None, None, 1000, 8, None, nothing, cpu, asked=["SIGTERM"]) is None

def test_a_second_interrupt_ends_at_once(small):
    config = small(batch_tokens=32 * 8 * 3000, micro_batch=8, eval_every=1, eval_tokens=32)
    process = launch(config)
    wait_for(process, "tokens")                # the first step has begun, and takes many seconds
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, 2) and status(config)["state"] == "failed"

def test_a_closed_pipe_does_not_end_the_run(small):
    config = small(steps=60)
    process = launch(config)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and status(config)["state"] == "finished" and len(lines(config)) == 60 + 15

def test_a_closed_pipe_does_not_end_a_run_that_continues_with_another_flag(small):
    train.main(small(steps=4))
    process = launch(small(lr=2e-2))
    process.stdout.close()
    assert process.wait() == 0 and status(small())["state"] == "finished"

@linux
def test_the_slurm_script_queues_a_stopped_job_again_and_no_other(small, tmp_path):
    config = small(steps=40, save_every=40, eval_every=40)
    bin = tmp_path / "bin"                     # stands for SLURM
    bin.mkdir()
    (bin / "srun").write_text('#!/bin/sh\necho srun $$\nexec "$@"\n')
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queue\n')
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for program in bin.iterdir():
        program.chmod(0o755)
    def job():
        env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PROCESSES": "2",
               "OUT": config.out_dir, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(["bash", "runs/slurm.sh", *flags_of(config)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = job()
    pid = int(wait_for(process, "srun ").split()[1])
    wait_for(process, "step     10/")
    os.kill(pid, signal.SIGUSR1)
    process.communicate()
    assert status(config)["state"] == "stopped" and (tmp_path / "queue").read_text() == "requeue 7\n"
    torchrun = (bin / "torchrun").read_text()
    (bin / "torchrun").write_text("#!/bin/sh\nexit 1\n")       # one that fails before it says anything
    job().communicate()
    assert status(config)["state"] == "stopped" and (tmp_path / "queue").read_text() == "requeue 7\n"
    (bin / "torchrun").write_text(torchrun)
    output = job().communicate()[0]
    assert "continuing from" in output and status(config)["state"] == "finished", output
    assert (tmp_path / "queue").read_text() == "requeue 7\n"

# --- a process that stops, fails or hangs ---

@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_job_in_time_and_is_named(small, rank):
    config = small(steps=100_000, save_every=10, timeout=16)
    process = launch(config, 2)
    wait_for(process, "step     20/")
    started = time.monotonic()
    os.kill(children(process.pid)[rank], signal.SIGSTOP)
    output = process.communicate()[0]
    assert process.returncode == 1 and time.monotonic() - started < config.timeout
    assert f"no sign of life from process {rank}" in output
    if rank == 1:                              # otherwise the one that writes is the one that was stopped
        assert status(config)["state"] == "failed" and "from process 1" in status(config)["reason"]
    assert checkpoint.newest_checkpoint(config.out_dir)

@pytest.mark.parametrize("fault, seconds, reason", [
    ("raise:1:5", 8, "process 1: RuntimeError: injected"),
    ("raise:0:5", 8, "process 0: RuntimeError: injected"),
    ("memory:1:5", 8, "process 1: MemoryError: CUDA out of memory. Tried 1 GiB. With a smaller"),
    ("sleep:1:5", 16, "Timed out waiting"),
    ("nan:1:5", 8, "FloatingPointError: step 5: loss nan"),
])
def test_a_process_that_fails_or_hangs_ends_the_job_and_is_named(small, fault, seconds, reason):
    config = small(timeout=8)
    process = launch(config, 2, fault=fault)
    wait_for(process, "step      4/")
    started = time.monotonic()
    output = process.communicate()[0]
    assert process.returncode == 1 and time.monotonic() - started < seconds, output
    assert status(config)["state"] == "failed" and status(config)["step"] == 4, output
    assert reason in status(config)["reason"], output
    assert checkpoint.load_model(config.out_dir)[1]["step"] == 4

def test_a_save_may_take_longer_than_the_timeout(small):
    config = small(steps=4, timeout=4)
    finish(config, 2, fault="slow:8")

# --- disks ---

@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`; skips where the system does not let us."""
    os.makedirs(folder)
    if os.system(f"mount -t tmpfs -o size={size} none {folder} 2>/dev/null"):
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        os.system(f"umount -l {folder}")

def test_a_full_disk_loses_nothing_and_says_what_to_free(small, tmp_path):
    straight = small(steps=400, save_every=4, keep=1, eval_every=200, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    with small_disk(tmp_path / "disk", 2_000_000):
        full = small(**{**vars(straight), "out_dir": str(tmp_path / "disk" / "out")})
        process = launch(full)
        wait_for(process, "step     40/")
        filler = tmp_path / "disk" / "filler"
        with open(filler, "wb", buffering=0) as f:
            while process.poll() is None:      # a removed checkpoint would make room again
                with contextlib.suppress(OSError):
                    f.write(bytes(1000))
        output = process.communicate()[0]
        assert process.returncode == 1 and "No space left on device" in output, output
        assert output.splitlines()[-1].startswith("error: ") and "Traceback" not in output
        assert checkpoint.load_model(full.out_dir)[1]["step"] >= 36
        assert not glob.glob(os.path.join(full.out_dir, "checkpoints", ".tmp*"))
        again = launch(full)
        assert "bytes free for 1 more checkpoints" in again.communicate()[0] and again.returncode == 2
        filler.unlink()
        finish(full)
        assert_same_run(full, straight)

@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_that_fails_ends_all_processes_with_the_reason(small, processes, tmp_path):
    straight, config = small(out_dir=str(tmp_path / "straight")), small()
    run_straight(straight, processes)
    shutil.copytree(straight.out_dir, config.out_dir)
    shutil.rmtree(checkpoint.checkpoints(config.out_dir)[1])
    folder = checkpoint.checkpoints(config.out_dir)[0]
    limit = os.path.getsize(os.path.join(folder, "optimizer.safetensors")) // 2
    process = launch(config, processes, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])))
    output = process.communicate()[0]
    assert process.returncode == 1 and "step_00000008: " in output and "File too large" in output, output
    assert output.count("cannot save") >= processes and "make room" in output
    assert "cannot save" in status(config)["reason"] and checkpoint.load_model(config.out_dir)[1]["step"] == 4
    finish(config, processes)
    assert_same_run(config, straight)

def test_a_folder_that_may_not_be_written_loses_nothing(small, tmp_path):
    as_anyone = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if as_anyone and (not shutil.which("setpriv") or subprocess.run([*as_anyone, "true"]).returncode):
        pytest.skip("root may write everywhere, and setpriv is not there to give that up")
    straight, config = small(out_dir=str(tmp_path / "straight")), small()
    train.main(straight)
    shutil.copytree(straight.out_dir, config.out_dir)
    shutil.rmtree(checkpoint.checkpoints(config.out_dir)[1])
    folder = os.path.join(config.out_dir, "checkpoints")
    os.chmod(folder, 0o555)
    process = launch(config, under=as_anyone)
    output = process.communicate()[0]
    os.chmod(folder, 0o755)
    assert process.returncode == 1 and "error: cannot save" in output, output
    assert "Permission denied" in output
    assert checkpoint.load_model(config.out_dir)[1]["step"] == 4
    finish(config)
    assert_same_run(config, straight)

def test_room_for_the_checkpoints_is_checked_before_the_start(small, monkeypatch):
    config = small()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ValueError, match="1,000,000 bytes free for 4 more checkpoints of 300,728"):
        train.main(config)
    train.main(small(keep=2))                  # three of them fit

# --- another number of processes ---

def test_a_run_that_goes_from_two_processes_to_one_and_back_sees_the_same_samples(small, tmp_path):
    straight = small(steps=12, save_every=4, out_dir=str(tmp_path / "straight"))
    finish(straight, 2)
    elastic = small(steps=12, save_every=4)
    shutil.copytree(straight.out_dir, elastic.out_dir)
    for folder in checkpoint.checkpoints(elastic.out_dir)[1:]:
        shutil.rmtree(folder)                  # at step 4, of two processes
    assert "changed: processes 2 → 1" in finish(elastic, 1)
    shutil.rmtree(checkpoint.checkpoints(elastic.out_dir)[-1])             # at step 8, of one
    finish(elastic, 2)
    for one, other in zip(lines(elastic), lines(straight), strict=True):
        layers, others = one.pop("layers", {}), other.pop("layers", {})    # rounded to five digits
        assert one.pop("kind") == other.pop("kind") and one == pytest.approx(other, rel=1e-5)
        assert list(layers) == list(others)
        assert all(layers[name] == pytest.approx(others[name], rel=1e-3, abs=1e-3) for name in others)
    states = [checkpoint.load_model(config.out_dir)[1] for config in (elastic, straight)]
    assert states[0]["samples"] == states[1]["samples"] == 12 * 8

@pytest.mark.parametrize("world", [3, 5])
def test_a_number_of_processes_that_does_not_divide_is_refused(small, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=r"do not divide among . processes: start one of \[1, 2, 4, 8\]"):
        train.main(small())

# --- input, memory, code ---

def break_shard(folder):
    os.truncate(os.path.join(folder, "train_00000.bin"), 5000)

def break_magic(folder):
    with open(os.path.join(folder, "train_00000.bin"), "r+b") as f:
        f.write(b"BAD!")

def shorten_shard(folder):
    path = os.path.join(folder, "train_00000.bin")
    data.write_shard(path, np.array(data.read_shard(path))[:-100], 257)

def break_manifest(folder):
    with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as f:
        f.write('{"complete": true, "sha')

def break_tokenizer(folder):
    with open(os.path.join(folder, "tokenizer.json"), "wb") as f:
        f.write(b"\x80\x04\x95 a pickle")

def break_ids(folder):
    tokens = np.array(data.read_shard(os.path.join(folder, "train_00000.bin")))
    tokens[1000] = 257
    data.write_shard(os.path.join(folder, "train_00000.bin"), tokens)

@pytest.mark.parametrize("damage, message", [
    (break_shard, "train_00000.bin has 5000 bytes but promises"), (break_magic, "is not a token shard"),
    (shorten_shard, "its manifest says"), (break_manifest, "manifest.json is damaged"),
    (break_tokenizer, "is no tokenizer"), (break_ids, "holds token 257, the last is 256"),
    (lambda folder: os.remove(os.path.join(folder, "val_00000.bin")), "cannot read the shard"),
], ids=["cut shard", "wrong magic", "short shard", "bad manifest", "pickle as tokenizer", "unknown token",
        "missing shard"])
def test_damaged_data_is_refused_before_anything_is_written(small, tmp_path, damage, message):
    folder = str(tmp_path / "damaged")
    shutil.copytree(small().data_dir, folder)
    damage(folder)
    config = small(data_dir=folder)
    with pytest.raises(ValueError, match=message):
        train.main(config)
    assert not os.path.exists(config.out_dir) or os.listdir(config.out_dir) == [".lock"]

@linux
def test_memory_does_not_grow_over_an_epoch(small, tmp_path):
    config = small(seq_len=64, batch_tokens=512, steps=886, eval_every=100, log_every=1, save_every=443)
    finish(config)
    with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
        peaks = [entry["peak_memory_bytes"] for entry in map(json.loads, f) if entry["kind"] == "train"]
    samples = len(data.TokenDataset(config.data_dir, "train", 64))
    assert len(peaks) * 8 >= samples and peaks[-1] < peaks[200] * 1.02

@linux
def test_reading_a_large_shard_keeps_a_bounded_part_of_it_in_memory(tmp_path):
    data.write_shard(str(tmp_path / "train_0.bin"), np.zeros(200_000_000, np.uint16), 257)
    dataset = data.TokenDataset(str(tmp_path), "train", 1024)
    order = data.SampleOrder(len(dataset), 0)
    def mapped():
        with open("/proc/self/status") as f:
            return int(next(line for line in f if line.startswith("RssFile")).split()[1]) * 1024
    before, most = mapped(), 0
    for first in range(0, len(dataset), 64):
        dataset.batch(order[np.arange(first, first + 64)])
        most = max(most, mapped() - before)
    assert most < 100e6, most                  # of 400e6

def test_no_code_is_ever_read_from_a_file():
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                   for alias in node.names}
        assert not calls & {"eval", "exec", "compile", "torch.load", "np.load"}, path
        assert not modules & {"pickle", "dill", "joblib", "shelve", "marshal"}, path

# --- deterministic ---

def test_deterministic_runs_are_the_same_run_and_leave_the_setting_as_it_was(small, tmp_path, monkeypatch):
    one, two = small(deterministic=True), small(deterministic=True, out_dir=str(tmp_path / "two"))
    forward, seen = Llama.forward, set()
    def watched(self, *args, **kwargs):
        seen.add(train.torch.are_deterministic_algorithms_enabled())
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Llama, "forward", watched)
    train.main(one)
    train.main(two)
    assert_same_run(one, two)
    assert seen == {True}
    assert not train.torch.are_deterministic_algorithms_enabled()
