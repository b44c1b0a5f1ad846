"""What several test files share: prepared text and a configuration small enough for a second of training."""
import json
import os
import subprocess
import sys

import pytest

import prepare_c4
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = dict(model="tiny", n_layer=2, n_embd=32, n_head=2, n_ffn=48, seq_len=32, batch_tokens=256, steps=8,
             lr=1e-2, optimizer="adamw", warmup=2, eval_every=4, eval_tokens=2000, save_every=4, log_every=1,
             device="cpu")

LAUNCHED = []

@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while LAUNCHED:                            # after a failure; processes of a launcher end when it does
        LAUNCHED.pop().kill()

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
        return train.resolve({**SMALL, **method, **folders, **given})
    return make

def flags_of(config) -> list[str]:
    """The command line of a Config, without the flags that have the defaults of its size and kind."""
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    kind = {"model": config.model, "linear": config.linear}
    default = {**vars(train.resolve(kind)), "model": None, "linear": None}
    return [f"--{name}={text(value)}" for name, value in vars(config).items() if value != default[name]]

def status(config) -> dict:
    with open(os.path.join(config.out_dir, "status.json"), encoding="utf-8") as f:
        return json.load(f)

def launch(config, processes: int = 1, fault: str = "", flags=(), under=(), **kwargs) -> subprocess.Popen:
    """train.py as a command of its own, under torchrun for several processes; fault: see faulty.py; flags: of
    torchrun; under: a command that starts the command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *flags]
    script = os.path.join(ROOT, "tests/faulty.py" if fault else "train.py")
    command = [*under, sys.executable, *(torchrun if processes > 1 else []), script, *flags_of(config)]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **kwargs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    LAUNCHED.append(subprocess.Popen(command, text=True, env=environment, **kwargs))
    return LAUNCHED[-1]
