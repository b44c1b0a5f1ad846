"""threads.py: how many threads compute, and that they wait shortly unless the user has said otherwise."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nanolost
from nanolost import threads

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("OMP_NUM_THREADS", *nanolost.OWN, *threads.LOCAL_SIZES)

@pytest.fixture(autouse=True)
def as_a_user_without_settings(monkeypatch):
    before = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)

def ask(script, **variables):
    """What a program of its own prints as JSON, with these variables alone."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", "import json, os, sys\n" + script]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT), **variables}, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

# --- the waiting ---

def test_the_package_sets_a_short_wait_and_does_not_load_torch():
    script = f"import nanolost\nprint(json.dumps([dict(os.environ), 'torch' in sys.modules]))  # {VARIABLES}"
    environment, loaded = ask(script)
    assert nanolost.WAITING.items() <= environment.items() and not loaded

@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"},
                                 {"KMP_BLOCKTIME": "0"}, {"KMP_LIBRARY": "turnaround"}])
def test_a_users_own_wait_is_left_alone(own):
    names = sorted(nanolost.OWN)
    script = f"import nanolost\nprint(json.dumps({{n: os.environ[n] for n in {names} if n in os.environ}}))"
    assert ask(script, **own) == own

COMMANDS = ["train", "sample", "bench"]
DRIVERS = [f"experiments.{name}" for name in ("compression", "controls", "finetuning", "isoflop")]

@pytest.mark.parametrize("command", COMMANDS + DRIVERS)
def test_a_command_sets_it_before_torch_reads_it(command):
    script = ("before = {}\n"
              "class Watch:\n"
              "    def find_spec(self, name, path=None, target=None):\n"
              "        if name == 'torch':\n"
              "            before.setdefault('spins', os.environ.get('GOMP_SPINCOUNT'))\n"
              "sys.meta_path.insert(0, Watch())\n"
              f"import {command}\nprint(json.dumps(before))")
    assert ask(script) == {"spins": nanolost.WAITING["GOMP_SPINCOUNT"]}

# --- how many ---

def stub_cores(monkeypatch, usable, *idle):
    """A machine of `usable` cores whose cores are idle for these shares of the sample."""
    moments = iter([[(0, 0)] * len(idle), [(round(20 * (1 - share)), round(20 * share)) for share in idle]])
    monkeypatch.setattr(threads, "usable_cores", lambda: usable)
    monkeypatch.setattr(threads, "_busy_and_idle", lambda: next(moments))

@pytest.mark.parametrize("usable, idle, free", [
    (2, (1.0, 1.0), 2), (2, (0.0, 1.0), 1), (2, (0.9, 0.85), 2), (2, (0.6, 0.6), 1), (2, (0.0, 0.0), 1),
    (4, (1.0, 1.0, 0.0, 0.95), 3),
    # a quota below the cores that are seen
    (1, (1.0, 1.0, 1.0, 1.0), 1)])
def test_as_many_threads_as_cores_are_free(usable, idle, free, monkeypatch):
    stub_cores(monkeypatch, usable, *idle)
    assert threads.free_cores(0) == free

def test_a_clock_that_stood_still_hides_no_core(monkeypatch):
    moments = iter([[(5, 5)] * 2] * 2)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "_busy_and_idle", lambda: next(moments))
    assert threads.free_cores(0) == 2

def test_a_system_that_shows_nothing_gives_what_may_be_used(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 6)
    monkeypatch.setattr(threads, "_busy_and_idle", lambda: [])
    assert threads.free_cores() == 6

@pytest.mark.parametrize("name, count, free", [
    ("LOCAL_WORLD_SIZE", "2", 4), ("LOCAL_WORLD_SIZE", "16", 1), ("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 2),
    ("LOCAL_WORLD_SIZE", "many", 8)])
def test_processes_of_one_machine_share_its_cores(name, count, free, monkeypatch):
    stub_cores(monkeypatch, 8, *[1.0] * 8)
    monkeypatch.setenv(name, count)
    assert threads.free_cores(0) == free

STAT = """cpu  100 0 50 800 7 1 2 3 0 0
cpu0 60 1 25 400 4 1 1 2 0 0
cpu1 40 0 25 400 3 0 1 1 9 0
cpu7 1 1 1 1 1 1 1 1 0 0
intr 1 2 3
"""

def test_cores_that_this_process_may_not_use_do_not_count(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text(STAT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert threads._busy_and_idle(str(tmp_path / "stat")) == [(90, 404), (67, 403)]
    assert threads._busy_and_idle(str(tmp_path / "none")) == []

@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux shows what its cores do")
def test_a_busy_core_is_seen():
    core = {min(os.sched_getaffinity(0))}
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(spin.pid, core)
        before = threads._busy_and_idle()
        time.sleep(1)
        after = threads._busy_and_idle()
    finally:
        spin.kill()
        spin.wait()
    assert threads._share_idle(before[0], after[0]) < 0.3

# --- who decides ---

def test_the_number_that_is_given_is_used(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.use_threads(3) == torch.get_num_threads() == 3

def test_the_users_variable_comes_before_what_is_free():
    # to call None would be an error
    script = "from nanolost import threads\nthreads.free_cores = None\nprint(threads.use_threads())"
    assert ask(script, OMP_NUM_THREADS="1") == 1

def test_without_a_word_of_the_user_it_is_what_is_free(monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda: 2)
    assert threads.use_threads() == torch.get_num_threads() == 2
