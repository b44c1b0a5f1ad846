"""The promises of docs/reliability.md: real commands, signals, full disks and damaged files.

Runs are compared with one that nothing happened to: the same lines in metrics.jsonl (but for what a clock
says), the same bytes in the last checkpoint. `--kills 30` sends more random kills than the default."""
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

import faulty
import numpy as np
import pytest
from conftest import (
    PATIENCE,
    ROOT,
    continue_from,
    ended,
    flags_of,
    launch,
    lines,
    losses,
    metrics,
    status,
    step_folder,
    wait_for,
    within,
)

import train
from nanolost import checkpoint, data, run
from nanolost.errors import UserError

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks processes up in /proc")

def last_checkpoint(config):
    """Its files as bytes; state.json without the folder's name."""
    folder = checkpoint.checkpoints(config.out_dir)[-1]
    files = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    # has the hash of state.json
    del files["manifest.json"]
    state = json.loads(files["state.json"])
    state["config"] |= {"out_dir": ""}
    return {**files, "state.json": state}

def finish(config, processes=1, **kwargs):
    output = ended(launch(config, processes, **kwargs))
    assert status(config)["state"] == "finished", output
    return output

def run_straight(config, processes):
    """Without an interruption; one process needs no command of its own."""
    train.main(config) if processes == 1 else finish(config, processes)

def assert_same_run(one, other):
    assert lines(one) == lines(other)
    assert last_checkpoint(one) == last_checkpoint(other)

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

# --- kills ---

def kill_one_of(process, dice) -> str:
    """SIGKILL to a rank, to all, or to their launcher; says which."""
    ranks = children(process.pid)
    victim = dice.choice(["one process", "all processes", "launcher"]) if ranks else "launcher"
    victims = {"one process": [dice.choice(ranks)] if ranks else [], "all processes": ranks,
               "launcher": [process.pid]}
    for pid in victims[victim]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return victim

def wait_for_a_random_moment(process, log, dice, start_up):
    """In three of ten cases while it starts, else a random number of lines into its training."""
    if dice.random() < 0.3:
        time.sleep(dice.uniform(0, start_up))
        return
    count = dice.randrange(50)
    within(PATIENCE, lambda: process.poll() is not None or log.read_text().count("\nstep ") > count)
    # any moment of a step or a save, not only that after a line
    time.sleep(dice.uniform(0, 0.05))

@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills_change_nothing(small, tmp_path, processes, request):
    kills = request.config.getoption("kills")
    sizes = dict(steps=60 * kills, save_every=3, eval_every=30 * kills, keep=2)
    straight, killed = small(**sizes, out_dir=str(tmp_path / "straight")), small(**sizes)
    started = time.monotonic()
    process = launch(straight, processes)
    wait_for(process, "step      1/")
    start_up = time.monotonic() - started
    ended(process)
    seed = random.randrange(10**6)
    dice, victims, log = random.Random(seed), [], tmp_path / "log"
    while len(victims) < kills:
        with open(log, "w") as file:
            process = launch(killed, processes, stdout=file)
        wait_for_a_random_moment(process, log, dice, start_up)
        if process.poll() is None:
            victims.append(kill_one_of(process, dice))
            process.wait(PATIENCE)
        elif "trains in" in log.read_text():
            # ranks whose launcher was killed end within a second, and hold the lock until then
            continue
        else:
            # it came to its end before all kills were done: once more from the start
            assert process.returncode == 0, f"seed {seed}, after {victims}: {log.read_text()}"
            assert_same_run(killed, straight)
            shutil.rmtree(killed.out_dir)
            continue
        if checkpoint.checkpoints(killed.out_dir):
            assert checkpoint.newest_checkpoint(killed.out_dir), f"seed {seed}"
    within(PATIENCE, lambda: launch(killed, processes, stdout=subprocess.DEVNULL).wait(PATIENCE) == 0)
    assert status(killed)["state"] == "finished", f"seed {seed}, after {victims}"
    assert_same_run(killed, straight)

def in_a_fork(fault: str, config, log) -> int:
    """train.main with a fault (faulty.py) in a child of this process, which need not load torch again; how
    it ended. Its output goes to the file `log`."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.stdout = open(output, "w", encoding="utf-8")
            faulty.install(fault)
            train.main(config)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def die_and_continue(before, killed, straight, number, log):
    """Name of the point at which a run that goes on from `before` was killed, by its number. What it left
    must hold a good checkpoint, and end as the straight run."""
    shutil.rmtree(killed.out_dir, ignore_errors=True)
    shutil.copytree(before.out_dir, killed.out_dir)
    code = in_a_fork(f"die:{number}", killed, log)
    output = log.read_text()
    assert code == -signal.SIGKILL, output
    assert any(checkpoint.verify(folder) is None for folder in checkpoint.checkpoints(killed.out_dir)), output
    assert checkpoint.load_model(killed.out_dir)[1]["step"] in (4, killed.steps), output
    train.main(killed)
    assert_same_run(killed, straight)
    return output.split("POINT ")[-1].splitlines()[0]

def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(small, tmp_path, monkeypatch):
    straight, before, killed = (small(steps=4, keep=1, out_dir=str(tmp_path / name))
                                for name in ("straight", "before", "killed"))
    train.main(straight)
    # a stop in the last evaluation: it is made up and saved again
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", lambda *args: None)
        train.main(before)
    died_at = []
    # the points before are those of any save
    first = 16
    while "after the save" not in died_at:
        died_at.append(die_and_continue(before, killed, straight, first + len(died_at), tmp_path / "log"))
    # aside, into place, of the old one
    assert died_at.count("before rename") == 3

def test_a_kill_at_every_point_of_a_save_loses_nothing(small, tmp_path):
    straight = small(keep=1, out_dir=str(tmp_path / "straight"))
    before = small(out_dir=str(tmp_path / "before"))
    train.main(straight)
    train.main(before)
    # the next save is that of step 8
    shutil.rmtree(checkpoint.checkpoints(before.out_dir)[1])
    killed, died_at = small(keep=1), []
    while "after the save" not in died_at:
        died_at.append(die_and_continue(before, killed, straight, len(died_at), tmp_path / "log"))
        left = os.listdir(os.path.join(killed.out_dir, "checkpoints"))
        assert {"step_00000008"} <= set(left) <= {"step_00000004", "step_00000008"}, died_at
    expected = {f"half of {name}" for name in os.listdir(step_folder(straight, 8))}
    expected |= {f"before {name}" for name in ("mkdir", "fsync", "rename", "unlink", "rmdir")}
    assert expected <= set(died_at) and len(died_at) > 25

@linux
@pytest.mark.parametrize("freeze", [True, False], ids=["an instant", "while it changes"])
def test_at_any_moment_a_copy_of_the_folder_holds_a_good_checkpoint(small, tmp_path, freeze):
    config = small(steps=100_000, save_every=1, eval_every=50_000, keep=1 if freeze else 3)
    process = launch(config, stdout=subprocess.DEVNULL)
    assert within(PATIENCE, lambda: process.poll() is not None or checkpoint.checkpoints(config.out_dir))
    assert process.poll() is None
    steps, copy = set(), str(tmp_path / "copy")
    end = time.monotonic() + PATIENCE
    while len(steps) < 25 and time.monotonic() < end:
        time.sleep(random.uniform(0, 0.05))
        # only one is kept, and could go while it is copied
        if freeze:
            process.send_signal(signal.SIGSTOP)
        # files that go while it copies
        with contextlib.suppress(shutil.Error):
            shutil.copytree(os.path.join(config.out_dir, "checkpoints"), os.path.join(copy, "checkpoints"))
        if freeze:
            process.send_signal(signal.SIGCONT)
            assert all(checkpoint.verify(folder) is None for folder in checkpoint.checkpoints(copy))
        steps.add(checkpoint.load_model(copy)[1]["step"])
        shutil.rmtree(copy)
    process.kill()
    process.communicate()
    assert len(steps) == 25

@linux
def test_processes_whose_launcher_was_killed_end_and_the_same_command_continues(small):
    config = small(steps=100_000, eval_every=50_000, save_every=10)
    process = launch(config, 2)
    wait_for(process, "step     20/")
    ranks = children(process.pid)
    # as where the terminal went too
    process.stdout.close()
    process.kill()
    assert len(ranks) == 2 and within(PATIENCE, lambda: all(map(gone, ranks)))
    # the lock is free, and a good checkpoint there
    step = checkpoint.load_model(config.out_dir)[1]["step"]
    train.main(small(steps=step + 5, eval_every=50_000))
    assert status(config) == {"state": "finished", "step": step + 5, "reason": ""}

# --- one writer ---

def test_a_second_run_on_a_folder_ends_with_code_2_and_names_the_first(small):
    config = small(steps=100_000)
    first = launch(config)
    wait_for(first, "step     10/")
    output = ended(launch(config), 2)
    assert output.startswith(f"error: process {first.pid} on ") and output.count("\n") == 1, output
    assert status(config)["state"] == "running"
    first.kill()
    first.communicate()

# --- signals ---

# the line after which the signal comes, and sizes for it
MOMENTS = {
    "first step": ("tokens", dict(batch_tokens=32 * 400, micro_batch=1, steps=2)),
    "training": ("step     20/", dict(steps=200, save_every=200, eval_every=200)),
    "evaluation": ("step      4/", dict(seq_len=8, batch_tokens=16, micro_batch=1, eval_tokens=12_000)),
    "last evaluation": ("step      8/", dict(seq_len=8, batch_tokens=16, micro_batch=1, eval_tokens=12_000)),
}

@pytest.mark.parametrize("processes, name, moment", [
    *[(1, "SIGTERM", moment) for moment in MOMENTS], (1, "SIGINT", "training"), (1, "SIGUSR1", "training"),
    (2, "SIGTERM", "first step"), (2, "SIGUSR1", "training"), (2, "SIGTERM", "evaluation"),
])
def test_a_signal_stops_at_a_step_and_the_same_command_continues(
        small, tmp_path, capsys, moment, processes, name):
    line, sizes = MOMENTS[moment]
    stopped, straight = small(**sizes), small(**sizes, out_dir=str(tmp_path / "straight"))
    process = launch(stopped, processes, flags=["--signals-to-handle=SIGUSR1,SIGTERM,SIGINT"])
    wait_for(process, line)
    process.send_signal(getattr(signal, name))
    # torchrun itself ends with 1
    output = ended(process, 0 if processes == 1 else 1)
    found = status(stopped)
    assert (found["state"], found["reason"]) == ("stopped", name), output
    evaluated = checkpoint.load_model(stopped.out_dir)[1]["evaluated"]
    if moment == "training":
        assert 20 <= found["step"] < 200
    else:
        expected = {"first step": (1, 0), "evaluation": (4, 0), "last evaluation": (8, 4)}[moment]
        assert (found["step"], evaluated) == expected
    # bit for bit holds for an equal number of processes; once with two, as each start takes seconds
    if processes == 2 and moment == "training":
        assert "continuing from" in finish(stopped, 2)
        finish(straight, 2)
        assert_same_run(stopped, straight)
        return
    train.main(stopped)
    assert "continuing from" in capsys.readouterr().out
    train.main(straight)
    if processes == 1:
        assert_same_run(stopped, straight)
    else:
        assert [step for step, _ in losses(stopped)] == [step for step, _ in losses(straight)]
        expected = [loss for _, loss in losses(straight)]
        assert [loss for _, loss in losses(stopped)] == pytest.approx(expected, rel=1e-5)

@linux
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_alone_stops_all(small, rank):
    config = small(steps=100_000, save_every=50_000, eval_every=50_000)
    process = launch(config, 2)
    wait_for(process, "step     20/")
    os.kill(children(process.pid)[rank], signal.SIGUSR1)
    output = ended(process)
    assert status(config)["state"] == "stopped", output
    assert checkpoint.load_model(config.out_dir)[1]["step"] == status(config)["step"]

def test_a_second_interrupt_ends_at_once(small):
    # the first step takes many seconds
    config = small(batch_tokens=32 * 8 * 3000, micro_batch=8, eval_every=1, eval_tokens=32)
    process = launch(config)
    wait_for(process, "tokens")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    # the first one waits for the step to end
    assert process.poll() is None
    # two that come close together are one to the process
    def ends():
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        return process.poll() is not None
    assert within(PATIENCE, ends)
    process.communicate()
    assert process.returncode not in (0, 2) and status(config)["state"] == "failed"
    assert status(config)["step"] == 0 and "KeyboardInterrupt" in status(config)["reason"]

def test_a_closed_pipe_does_not_end_the_run(small):
    config = small(steps=60)
    process = launch(config)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 0 and status(config)["state"] == "finished"
    assert len(lines(config)) == 60 + 15

def test_a_closed_pipe_does_not_end_a_run_that_continues_with_another_flag(small):
    train.main(small(steps=4))
    process = launch(small(lr=2e-2))
    process.stdout.close()
    assert process.wait(PATIENCE) == 0 and status(small())["state"] == "finished"

@linux
def test_the_slurm_script_queues_a_stopped_job_again_and_no_other(small, tmp_path):
    config = small(steps=40, save_every=40, eval_every=40)
    # stands for SLURM
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "srun").write_text('#!/bin/sh\necho srun $$\nexec "$@"\n')
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queue\n')
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for program in bin.iterdir():
        program.chmod(0o755)
    def job():
        env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PROCESSES": "2",
               "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(["bash", "runs/slurm.sh", *flags_of(config)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = job()
    pid = int(wait_for(process, "srun ").split()[1])
    wait_for(process, "step     10/")
    os.kill(pid, signal.SIGUSR1)
    process.communicate()
    assert status(config)["state"] == "stopped" and (tmp_path / "queue").read_text() == "requeue 7\n"
    torchrun = (bin / "torchrun").read_text()
    # one that fails before it says anything
    (bin / "torchrun").write_text("#!/bin/sh\nexit 1\n")
    job().communicate()
    assert status(config)["state"] == "stopped" and (tmp_path / "queue").read_text() == "requeue 7\n"
    (bin / "torchrun").write_text(torchrun)
    output = job().communicate()[0]
    assert "continuing from" in output and status(config)["state"] == "finished", output
    assert (tmp_path / "queue").read_text() == "requeue 7\n"

# --- a process that stops, fails or hangs ---

# torchrun waits so long for a process that will never end itself
IMPATIENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}

@linux
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_process_ends_the_job_within_the_time_out(small, rank):
    config = small(steps=100_000, save_every=10, timeout=10)
    process = launch(config, 2, env=IMPATIENT)
    wait_for(process, "step     20/")
    os.kill(children(process.pid)[rank], signal.SIGSTOP)
    output = ended(process, 1)
    assert "lost another process" in output
    # otherwise the one that writes is the one that was stopped
    if rank == 1:
        found = status(config)
        assert found["state"] == "failed" and "process 0: lost another process" in found["reason"]
    assert checkpoint.newest_checkpoint(config.out_dir)

@pytest.mark.parametrize("fault, timeout, reason", [
    ("raise:1:5", 60, "process 1: RuntimeError: injected"),
    pytest.param("raise:0:5", 60, "process 0: RuntimeError: injected", marks=pytest.mark.slow),
    ("memory:1:5", 60, "process 1: MemoryError: CUDA out of memory. Tried 1 GiB. With a smaller"),
    ("sleep:1:5", 10, "process 0: lost another process"),
    ("nan:1:5", 60, "FloatingPointError: step 5: loss nan"),
])
def test_a_process_that_fails_or_hangs_ends_the_job_and_is_named(small, fault, timeout, reason):
    config = small(timeout=timeout)
    output = ended(launch(config, 2, fault=fault, env=IMPATIENT if "sleep" in fault else {}), 1)
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
            # a removed checkpoint would make room again
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    f.write(bytes(1000))
        output = ended(process, 1)
        assert "No space left on device" in output, output
        assert output.splitlines()[-1].startswith("error: ") and "Traceback" not in output
        assert checkpoint.load_model(full.out_dir)[1]["step"] >= 36
        assert not glob.glob(os.path.join(full.out_dir, "checkpoints", ".tmp*"))
        assert "bytes free for 1 more checkpoints" in ended(launch(full), 2)
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
    output = ended(process, 1)
    assert "step_00000008: " in output and "File too large" in output, output
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
    output = ended(process, 1)
    os.chmod(folder, 0o755)
    assert "error: cannot save" in output, output
    assert "Permission denied" in output
    assert checkpoint.load_model(config.out_dir)[1]["step"] == 4
    finish(config)
    assert_same_run(config, straight)

# --- another number of processes ---

def test_a_run_that_goes_from_two_processes_to_one_and_back_sees_the_same_samples(small, tmp_path, capsys):
    straight = small(steps=12, save_every=4, out_dir=str(tmp_path / "straight"))
    finish(straight, 2)
    elastic = small(steps=12, save_every=4)
    # at step 4, of two processes
    continue_from(straight, elastic, 4)
    assert "changed: processes 2 → 1" in capsys.readouterr().out
    # at step 8, of one
    shutil.rmtree(step_folder(elastic, 12))
    finish(elastic, 2)
    for one, other in zip(lines(elastic), lines(straight), strict=True):
        # rounded to five digits
        layers, others = one.pop("layers", {}), other.pop("layers", {})
        assert one.pop("kind") == other.pop("kind") and one == pytest.approx(other, rel=1e-5)
        assert list(layers) == list(others)
        assert all(layers[name] == pytest.approx(others[name], rel=1e-3, abs=1e-3) for name in others)
    states = [checkpoint.load_model(config.out_dir)[1] for config in (elastic, straight)]
    assert states[0]["samples"] == states[1]["samples"] == 12 * 8

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
    (lambda folder: os.remove(os.path.join(folder, "val_00000.bin")), "val"),
], ids=["cut shard", "wrong magic", "short shard", "bad manifest", "pickle as tokenizer", "unknown token",
        "missing shard"])
def test_damaged_data_is_refused_before_anything_is_written(small, tmp_path, damage, message):
    folder = str(tmp_path / "damaged")
    shutil.copytree(small().data_dir, folder)
    damage(folder)
    config = small(data_dir=folder)
    with pytest.raises(UserError, match=message):
        train.main(config)
    assert not os.path.exists(config.out_dir) or os.listdir(config.out_dir) == [".lock"]

@linux
def test_memory_does_not_grow_over_an_epoch(small, tmp_path):
    config = small(seq_len=64, batch_tokens=512, steps=886, eval_every=100, log_every=1, save_every=443)
    finish(config)
    peaks = [record["peak_memory_bytes"] for record in metrics(config, "train")]
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
    # of 400e6
    assert most < 100e6, most

def test_no_code_is_ever_read_from_a_file():
    paths = [path for folder in ("", "nanolost", "experiments", "runs")
             for path in glob.glob(os.path.join(ROOT, folder, "*.py"))]
    assert len(paths) > 20
    for path in paths:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                   for alias in node.names}
        assert not calls & {"eval", "exec", "compile", "torch.load", "np.load"}, path
        assert not modules & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
