"""What several test files share: prepared text, a configuration small enough for a second of training, and
ways to look at what a run has left."""
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import pytest

import nanolost  # noqa: F401  before torch: OpenMP reads its settings once
import prepare_c4
import train
from nanolost import checkpoint, sparse
from nanolost.job import Job
from nanolost.loop import update
from nanolost.settings import resolve, settle_device, split_batch
from nanolost.threads import use_threads

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# seconds that a process may take for what takes a few on a quiet machine: the machine may have a load of ten
PATIENCE = 300
SMALL = dict(model="tiny", n_layer=2, n_embd=32, n_head=2, n_ffn=48, seq_len=32, batch_tokens=256, steps=8,
             lr=1e-2, optimizer="adamw", warmup=2, eval_every=4, eval_tokens=2000, save_every=4, log_every=1,
             device="cpu", threads=1)

LAUNCHED = []

# Where transformers, imported later, copies the code of folders to: one place for a process, as Python looks
# for the package of these copies only once. And no test asks the hub.
MODULES = tempfile.TemporaryDirectory(prefix="modules-")
os.environ.update(HF_MODULES_CACHE=MODULES.name, HF_HUB_OFFLINE="1")

@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    # after a failure; processes of a launcher end when it does
    while LAUNCHED:
        LAUNCHED.pop().kill()

@pytest.fixture
def kernel():
    """The dtypes of the kernel; skips where this machine cannot have one."""
    missing = sparse.NEEDED[sparse.torch.bfloat16] - sparse.cpu_flags()
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    assert sparse.load_kernel() == set(sparse.NEEDED)

def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="random kills of a run, of each kind")
    parser.addoption("--slow", action="store_true", help="run the long tests too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; skipped without --slow")

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long test: add --slow"))

def folder_of(variable: str, meaning: str) -> str:
    """The folder that an environment variable names; without it the test is skipped."""
    folder = os.environ.get(variable, "")
    if not folder:
        pytest.skip(f"{variable} is not set: {meaning}")
    assert os.path.isdir(folder), f"{variable}={folder} is not a folder"
    return os.path.abspath(folder)

@pytest.fixture(scope="session")
def real_data() -> str:
    return folder_of("NANOLOST_DATA", "a folder with corpus-*.json.gz in C4's format and gpt2.tiktoken")

@pytest.fixture(scope="session")
def real_model() -> str:
    return folder_of("NANOLOST_MODEL", "a Hugging Face LLaMA folder, for instance SmolLM2's")

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The built-in text as bytes."""
    folder = str(tmp_path_factory.mktemp("data"))
    prepare_c4.main(prepare_c4.Config(input=["builtin"], tokenizer="byte", out_dir=folder, workers=1))
    return folder

@pytest.fixture
def small(data_dir, tmp_path):
    """small(steps=3, …) → a resolved Config that writes to a folder of this test."""
    def make(**given):
        method = {} if given.get("linear") == "dense" else {"rank": 8}
        folders = {"data_dir": data_dir, "out_dir": str(tmp_path / "out")}
        return resolve({**SMALL, **method, **folders, **given})
    return make

# --- commands ---

def flags_of(config) -> list[str]:
    """The command line of a Config, without the flags that have the defaults of its size and kind."""
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    kind = {"model": config.model, "linear": config.linear}
    if config.init_from:
        kind = {"init_from": config.init_from, "steps": config.steps, "linear": config.linear}
    kind = {name: value for name, value in kind.items() if value is not None}
    default = {**vars(resolve(kind)), **dict.fromkeys(kind)}
    return [f"--{name}={text(value)}" for name, value in vars(config).items() if value != default[name]]

def default_interrupt():
    # a shell starts a background process with SIGINT ignored, which children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

def launch(
        config, processes=1, fault="", flags=(), under=(), env=(), meet=(), **kwargs) -> subprocess.Popen:
    """train.py as a command of its own, under torchrun for several processes; fault: see faulty.py; flags: of
    torchrun; under: a command that starts the command; env: more variables; meet: how torchrun finds those of
    other machines."""
    torchrun = ["-m", "torch.distributed.run", *(meet or ["--standalone"])]
    torchrun += [f"--nproc_per_node={processes}", *flags]
    script = os.path.join(ROOT, "tests/faulty.py" if fault else "train.py")
    several = processes > 1 or meet
    command = [*under, sys.executable, *(torchrun if several else []), script, *flags_of(config)]
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "preexec_fn": default_interrupt}
    kwargs = {**defaults, **kwargs}
    # torchrun ends a process that does not end itself after 30 s, from torch 2.12 on after these seconds; a
    # step on a busy machine may take longer
    grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, **grace, **dict(env)}
    LAUNCHED.append(subprocess.Popen(command, text=True, env=environment, **kwargs))
    return LAUNCHED[-1]

def ended(process, code: int | None = 0) -> str:
    """What a process printed, once it has ended with `code` (None: with any)."""
    output = process.communicate(timeout=PATIENCE)[0]
    assert code is None or process.returncode == code, output
    return output

def wait_for(process, start: str) -> str:
    """Read the output up to a line that starts so; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(start):
            return "".join(read)
    raise AssertionError(f"no line {start!r} in: {''.join(read)}")

def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()

# --- what a run leaves ---

def status(config) -> dict:
    with open(os.path.join(config.out_dir, "status.json"), encoding="utf-8") as f:
        return json.load(f)

# entries of metrics.jsonl that a clock or a memory gauge says: no two runs agree in them
MEASURED = {"time", "tokens_per_second", "step_ms", "mfu", "peak_memory_bytes"}

def metrics(config, kind: str | None = None) -> list[dict]:
    """The records of metrics.jsonl of one kind, or all."""
    with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    return [record for record in records if kind in (None, record["kind"])]

def lines(config, kind: str | None = None) -> list[dict]:
    """`metrics` without what is measured: two runs that compute the same have the same lines."""
    return [{name: value for name, value in record.items() if name not in MEASURED}
            for record in metrics(config, kind)]

def losses(config) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in metrics(config, "train")]

def val_losses(config) -> list[float]:
    return [record["val_loss"] for record in metrics(config, "eval")]

def step_folder(config, step: int) -> str:
    return os.path.join(config.out_dir, "checkpoints", f"step_{step:08d}")

def files_of(config, step: int) -> dict[str, bytes]:
    """The tensors of a checkpoint, as bytes."""
    found = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        with open(os.path.join(step_folder(config, step), name), "rb") as f:
            found[name] = f.read()
    return found

def continue_from(config, other, step: int):
    """Train `other`, which may be `config`, on from the checkpoint of `step` that `config` has left."""
    if other.out_dir != config.out_dir:
        shutil.copytree(config.out_dir, other.out_dir)
    for folder in checkpoint.checkpoints(other.out_dir):
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)
    train.main(other)

# --- a run without its folder ---

@contextlib.contextmanager
def started(config):
    """(config, state, texts, job) of a new run that nothing is written of."""
    config = settle_device(config)
    with Job.start(config) as job:
        config.micro_batch, _ = split_batch(config, job.world)
        texts = train.texts_of(config, train.vocabulary(config))
        train.settle_allocation(config, None)
        config.settle_schedule({})
        use_threads(config.threads)
        yield config, train.fresh(config, job), texts, job

def updates(config, state, texts, job, count: int) -> list:
    """The figures of `count` updates."""
    micro, accumulation = split_batch(config, job.world)
    shape = (accumulation, job.world, micro)
    return [update(state, texts.train, texts.samples(state, shape), config, job) for _ in range(count)]

# --- pages ---

def blocks(page, language: str) -> list[str]:
    """The blocks of code in a page, by its path or by its name in docs."""
    with open(os.path.join(ROOT, "docs", page), encoding="utf-8") as f:
        return re.findall(rf"^```{language}\n(.*?)^```", f.read(), re.S | re.M)

# --- several processes, without the seconds that torch takes to load ---

def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def in_forks(processes: int, *works, log=None) -> list[int]:
    """work() for each of `works` in so many children of this process, each time as a job of its own: how they
    ended. Their output goes to the file `log`."""
    ports = [str(free_port()) for _ in works]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                redirect(log)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank),
                                  LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
                for work, port in zip(works, ports, strict=True):
                    os.environ["MASTER_PORT"] = port
                    work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return codes_of(children)

def codes_of(children: list[int]) -> list[int]:
    """How they ended; where one fails the others have half a minute to notice."""
    codes = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(code)
                if code:
                    end = min(end, time.monotonic() + 30)
        time.sleep(0.02)
    return [codes[child] for child in children]

def redirect(log):
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)

def train_in_forks(processes: int, *configs, log=None):
    """train.main of each of `configs` by so many processes."""
    codes = in_forks(processes, *[functools.partial(train.main, c) for c in configs], log=log)
    assert codes == [0] * processes, open(log).read() if log else codes
