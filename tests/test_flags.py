"""flags.py: what a command line means, what is refused and with which words."""
import dataclasses
import io
import os
import re
import subprocess
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

import eval as evaluating
import export
import prepare_c4
import sample
import train
from experiments import tiny
from nanolost import flags
from nanolost.errors import UserError
from nanolost.flags import flag, parse, spelled

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"train": train.Config, "prepare_c4": prepare_c4.Config, "sample": sample.Config}
every_command = pytest.mark.parametrize("command", CONFIGS)

@dataclass
class Example:
    steps: int = flag(10, "an integer")
    limit: int | None = flag(None, "an integer that may be absent")
    lr: float = flag(0.1, "a number")
    name: str = flag("a", "a text")
    color: str = flag("red", "one of two", ["red", "green"])
    fast: bool = flag(False, "a boolean")
    strict: bool = flag(True, "100% of the checks")
    betas: tuple[float, float] = flag((0.9, 0.95), "a pair")
    files: list[str] | None = flag(None, "some texts")
    rank: int | dict | None = flag(None, "an integer, also by module")
    sparsity: float | dict = flag(0.01, "a number, also by module")

VALUES = [
    ("steps", "7", 7), ("steps", "10_000", 10_000), ("steps", "1e4", 10_000), ("steps", "1E4", 10_000),
    ("steps", "2K", 2000), ("steps", "10M", 10**7), ("steps", "1.5M", 1_500_000), ("steps", "2B", 2 * 10**9),
    ("steps", "-1", -1), ("steps", "9007199254740993", 2**53 + 1), ("limit", "5", 5),
    ("lr", "3e-4", 3e-4), ("lr", "-2", -2.0), ("lr", ".5", 0.5),
    ("name", "with = and spaces", "with = and spaces"), ("name", "", ""),
    ("color", "green", "green"), ("color", "Green", "green"),
    ("fast", "true", True), ("fast", "false", False), ("fast", "True", True), ("strict", "false", False),
    ("betas", "0.8,0.99", (0.8, 0.99)), ("files", "a/*.txt", ["a/*.txt"]),
    ("rank", "64", 64),
    ("rank", "q_proj=64,o_proj=1_28, default=1K", dict(q_proj=64, o_proj=128, default=1000)),
    ("sparsity", "0.05", 0.05), ("sparsity", "q_proj=0.5,default=0", dict(q_proj=0.5, default=0.0)),
]

@pytest.mark.parametrize("joined", [False, True], ids=["--name value", "--name=value"])
@pytest.mark.parametrize("name, text, value", VALUES)
def test_a_value_is_read_by_the_type_of_its_field(name, text, value, joined):
    given = parse(Example, [f"--{name}={text}"] if joined else [f"--{name}", text])
    assert given == {name: value}
    assert type(given[name]) is type(value)

@pytest.mark.parametrize("argv, given", [
    ([], {}), (["--fast"], {"fast": True}), (["--fast", "--steps", "3"], {"fast": True, "steps": 3}),
    (["--files", "a", "b", "--name", "c"], {"files": ["a", "b"], "name": "c"})])
def test_bare_booleans_lists_and_absent_flags(argv, given):
    assert parse(Example, argv) == given

@pytest.mark.parametrize("argv, hint", [
    (["--stesp", "5"], "--steps"), (["--steps_", "5"], "--steps"), (["--step=5"], "--steps"),
    (["--str"], "--strict"), (["--Fast"], "--fast"), (["--spars", "1"], "--sparsity"),
    (["--lr", "1", "--colour", "red"], "--color"),
    (["--zzzzzzzz"], "--help"), (["steps=5"], "--steps"), (["--steps", "5", "6"], "6")])
def test_an_unknown_or_abbreviated_flag_is_refused_with_a_suggestion(argv, hint):
    with pytest.raises(UserError, match=hint):
        parse(Example, argv)

@dataclass
class Trainer:
    lr: float = flag(0.1, "a rate")
    steps: int = flag(10, "updates")
    batch_tokens: int = flag(1, "tokens", section="sizes")
    micro_batch: int = flag(1, "samples")
    seq_len: int = flag(1, "tokens")
    n_layer: int = flag(1, "blocks")
    betas: tuple[float, float] = flag((0.9, 0.95), "AdamW's", section="optimizer")

@pytest.mark.parametrize("typed, ours", [
    ("--learning_rate", "--lr"), ("--max_iters", "--steps"), ("--num_epochs", "--steps"),
    ("--batch_size", "--batch_tokens or --micro_batch"), ("--block-size=64", "--seq_len"),
    ("--n_layers", "--n_layer"), ("--num_hidden_layers", "--n_layer"), ("--beta2", "--betas"),
    ("--Learning-Rate", "--lr")])
def test_the_names_of_other_trainers_are_known(typed, ours):
    with pytest.raises(UserError, match=rf"did you mean {ours}\?"):
        parse(Trainer, [typed, "1"])

def test_a_name_of_another_trainer_suggests_only_flags_that_are_there():
    with pytest.raises(UserError, match="unknown flag --hidden_size: see --help"):
        parse(Trainer, ["--hidden_size", "1"])

def test_other_names_are_none_of_our_own_and_belong_to_a_flag_of_a_command():
    ours = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    assert set(flags.OTHER_NAMES) <= ours

def test_help_has_a_heading_for_each_section(capsys):
    with pytest.raises(SystemExit):
        parse(Trainer, ["--help"])
    text = capsys.readouterr().out
    first, sizes = text.split("\nsizes:\n")
    sizes, optimizer = sizes.split("\noptimizer:\n")
    assert "--steps" in first and "--batch_tokens" not in first
    assert "--batch_tokens" in sizes and "--n_layer" in sizes and "--betas" in optimizer

@pytest.mark.parametrize("short, full", [
    ("--train_token", "--train_tokens"), ("--verif", "--verify"), ("--out-dir", "--out_dir")])
def test_a_command_suggests_its_own_flags(short, full):
    with pytest.raises(UserError, match=f"unknown flag {short}: did you mean .*{full}"):
        parse(prepare_c4.Config, [short, "1"])

@pytest.mark.parametrize("name, text, expected", [
    ("steps", "ten", "INT"), ("steps", "1.5", "INT"), ("steps", "10X", "INT"), ("steps", "", "INT"),
    ("steps", "1e-3", "INT"), ("steps", "1e400", "INT"), ("steps", "inf", "INT"), ("limit", "none", "INT"),
    ("steps", "9223372036854775808", "INT"),
    ("lr", "fast", "NUMBER"), ("fast", "yes", r"true\|false"), ("fast", "1", r"true\|false"),
    ("color", "blue", "green"),
    ("betas", "0.9", "X,Y"), ("betas", "0.9,0.95,1", "X,Y"), ("betas", "a,b", "X,Y"),
    ("rank", "q_proj=x", "INT"), ("rank", "64,32", "INT"), ("rank", "q_proj=1=2", "INT"),
    ("rank", "q_proj=1,q_proj=2", "INT"), ("rank", "q_proj=1, q_proj=1", "INT"), ("rank", "=1", "INT"),
    ("sparsity", " =0.5", "NUMBER"), ("rank", "q_proj=1,", "INT"),
    ("sparsity", "q_proj=", "NUMBER")])
def test_a_value_of_the_wrong_type_is_refused_with_flag_and_type(name, text, expected):
    with pytest.raises(UserError, match=rf"--{name}\b.*{expected}"):
        parse(Example, [f"--{name}={text}"])

@pytest.mark.parametrize("argv", [["--steps"], ["--files"], ["--name", "--fast"]])
def test_a_flag_without_its_value_is_refused(argv):
    with pytest.raises(UserError, match=argv[0]):
        parse(Example, argv)


@every_command
def test_every_default_can_be_given_as_a_value(command):
    defaults = {f.name: f.default for f in dataclasses.fields(CONFIGS[command]) if f.default is not None}
    argv = [f"--{name}={spelled(value)}" for name, value in defaults.items()]
    assert parse(CONFIGS[command], argv) == defaults

@every_command
def test_help_shows_every_flag_with_meaning_and_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        parse(CONFIGS[command], ["--help"], "what it does, 100%")
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does, 100%" in text
    for f in dataclasses.fields(CONFIGS[command]):
        default = "" if f.default in (None, "") else f" (default {spelled(f.default)})"
        entry = text[text.index(f" --{f.name} "):][:400]
        assert " ".join((f.metadata["help"] + default).split()) in entry
        assert all(choice in entry for choice in f.metadata["choices"] or [])

@every_command
def test_a_command_refuses_an_unknown_flag_before_any_work(command, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{command}.py", "--no_such_flag", "1"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown flag --no_such_flag") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []

# --- the end of a command ---

def raiser(error):
    def main():
        raise error
    return main

def run(script, *argv, under=(), **kwargs):
    """A program of its own that imports all of flags.py and errors.py."""
    head = "from dataclasses import dataclass\nfrom nanolost.flags import *\nfrom nanolost.errors import *\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    return subprocess.run([sys.executable, "-c", head + script, *argv], env=environment, capture_output=True,
                          timeout=120, **kwargs)

@pytest.mark.parametrize("rank, prefix", [(None, ""), ("0", ""), ("3", "[rank 3] ")])
def test_a_users_error_is_one_line_and_exit_code_2(capsys, monkeypatch, rank, prefix):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(UserError("first line\n  second line")))
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"{prefix}error: first line second line\n")

@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect"), KeyError("a defect"),
                                   UnicodeDecodeError("utf-8", b"a", 0, 1, "a defect")])
def test_another_exception_keeps_its_traceback_and_ends_with_code_1(capsys, error):
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(error))
    text = capsys.readouterr().err
    assert end.value.code == 1
    assert text.startswith("Traceback") and type(error).__name__ in text and "a defect" in text

@pytest.mark.parametrize("kind", [OSError, MemoryError, FloatingPointError, ConnectionError, BrokenPipeError])
def test_a_fault_of_the_disk_or_memory_and_a_diverged_run_end_with_one_line_and_code_1(capsys, kind):
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(kind("first line\nsecond line")))
    assert end.value.code == 1 and capsys.readouterr() == ("", "error: first line second line\n")

def test_an_error_without_words_is_named(capsys):
    with pytest.raises(SystemExit):
        flags.command(raiser(MemoryError()))
    assert capsys.readouterr().err == "error: MemoryError\n"

def test_ctrl_c_is_one_line_and_code_1(capsys):
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(KeyboardInterrupt()))
    assert end.value.code == 1 and capsys.readouterr().err == "error: interrupted\n"

@pytest.mark.parametrize("world", ["2", "many"])
def test_the_processes_of_a_job_end_with_the_same_codes(world):
    ends = {"pass": 0, "raise UserError(1)": 2, "raise ValueError(1)": 1, "raise OSError(1)": 1}
    for error, code in ends.items():
        script = f"def main():\n    print('written', end='')\n    {error}\ncommand(main)"
        result = run(script, env={"WORLD_SIZE": world})
        assert (result.returncode, result.stdout) == (code, b"written"), result.stderr

def test_a_command_that_ends_well_does_not_exit():
    ran = types.SimpleNamespace(count=0)
    flags.command(lambda: setattr(ran, "count", ran.count + 1))
    assert ran.count == 1

# --- output ---

EXAMPLE = """
@dataclass
class Config:
    rho: float = flag(0.01, "ρ, the share → of channels")
command(lambda: print(parse(Config, sys.argv[1:], "ρ and γ")))
"""

@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_no_encoding_of_the_output_ends_a_command_and_no_text_is_lost(encoding):
    shown = run(EXAMPLE, "--help", env={"PYTHONIOENCODING": encoding})
    assert (shown.returncode, shown.stderr) == (0, b"")
    text = shown.stdout.decode(encoding)
    meaning = "ρ, the share → of channels"
    assert meaning.encode(encoding, "backslashreplace").decode(encoding) in " ".join(text.split())
    wrong = run(EXAMPLE, "--rho", "→", env={"PYTHONIOENCODING": encoding})
    assert wrong.returncode == 2
    assert wrong.stderr.decode(encoding).startswith("error: ") and wrong.stderr.count(b"\n") == 1

def test_a_line_that_the_encoding_lacks_is_said_in_a_program_of_another_kind(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    flags.say("ρ = 1")
    assert written.getvalue().rstrip() == rb"'\u03c1 = 1'"

def with_broken_output(script, kind):
    """(exit code, stderr) of a program whose reader is gone, whose disk is full or whose output is closed."""
    head = "import os, sys\nfrom nanolost.flags import *\n"
    command = [sys.executable, "-c", head + script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kind == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") if kind == "full" else os.fdopen(writer, "wb") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.PIPE, timeout=120)
    return done.returncode, done.stderr.decode()

@pytest.mark.parametrize("kind", ["gone", "full", "closed"])
def test_training_goes_on_without_its_output(kind, tmp_path):
    script = (f"def main():\n    for i in range(20000): say(str(i))\n"
              f"    open({str(tmp_path / 'done')!r}, 'w')\n")
    assert with_broken_output(script + "command(main)", kind) == (0, "")
    assert (tmp_path / "done").exists()

@pytest.mark.parametrize("lines", [3, 20000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(lines, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code, error = with_broken_output(f"command(lambda: print('a line\\n' * {lines}))", "gone")
    assert code in (0, 1) and error == ""

@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_lost_to_a_full_disk_is_an_error(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code, error = with_broken_output("command(lambda: print('a line'))", "full")
    assert code == 1 and error == "error: [Errno 28] No space left on device\n"

# --- under torchrun ---

COMMANDS = [train.Config, prepare_c4.Config, sample.Config, evaluating.Config, export.Config, tiny.Config]
# the text that --prompt=FILE:~/x names is opened by sample.py, --extra holds flags of another command
OTHERS = {"prompt", "extra", "split_pattern", "save_dtype", "max_shard_size"}

@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__module__)
def test_a_tilde_is_replaced_in_every_path_of_a_command_however_it_is_typed(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    hints = typing.get_type_hints(config)
    found = 0
    for field in dataclasses.fields(config):
        words = re.search(r"\b(folder|file|files|PATH|GLOBs|shards go)\b", field.metadata["help"])
        of_text = hints[field.name] in (str, str | None, list[str], list[str] | None)
        if not words or not of_text or field.name in OTHERS:
            continue
        found += 1
        for argv in ([f"--{field.name}=~/a b"], [f"--{field.name}", "~/a b"]):
            value = parse(config, argv)[field.name]
            assert value in ("/home/me/a b", ["/home/me/a b"]), field.name
    assert found

def test_a_tilde_in_any_other_text_stays():
    assert parse(sample.Config, ["--prompt=~/x"]) == {"prompt": "~/x"}

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from nanolost.flags import *
import os
@dataclass
class Config:
    lr: float = flag(0.1, "a rate")
def main():
    time.sleep({wait} * (os.environ["RANK"] == "0"))
    parse(Config, sys.argv[1:])
command(main)
"""

@pytest.mark.parametrize("wait", [0, 1], ids=["together", "rank 0 comes last"])
def test_a_bad_flag_is_said_by_rank_0_alone_and_is_the_cause_that_torchrun_names(tmp_path, wait):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), wait=wait))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, tmp_path / "script.py", "--learning_rate", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    message = "unknown flag --learning_rate: did you mean --lr?"
    assert done.returncode == 1
    assert done.stderr.count(f"error: {message}") == 1 and "[rank 1] error" not in done.stderr
    assert f"traceback : {message}" in done.stderr and "To enable traceback" not in done.stderr
