"""flags.py: what a command line means, what is refused and with which words."""
import dataclasses
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import prepare_c4
import sample
import train
from nanolost import flags
from nanolost.flags import flag, parse

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
    with pytest.raises(ValueError, match=hint):
        parse(Example, argv)

@pytest.mark.parametrize("short, full", [
    ("--train_token", "--train_tokens"), ("--verif", "--verify"), ("--out-dir", "--out_dir")])
def test_a_command_suggests_its_own_flags(short, full):
    with pytest.raises(ValueError, match=f"unknown flag {short}: did you mean .*{full}"):
        parse(prepare_c4.Config, [short, "1"])

@pytest.mark.parametrize("name, text, expected", [
    ("steps", "ten", "INT"), ("steps", "1.5", "INT"), ("steps", "10X", "INT"), ("steps", "", "INT"),
    ("steps", "1e-3", "INT"), ("steps", "1e400", "INT"), ("steps", "inf", "INT"), ("limit", "none", "INT"),
    ("steps", "9223372036854775808", "INT"),
    ("lr", "fast", "NUMBER"), ("fast", "yes", r"true\|false"), ("fast", "1", r"true\|false"),
    ("color", "blue", "green"),
    ("betas", "0.9", "X,Y"), ("betas", "0.9,0.95,1", "X,Y"), ("betas", "a,b", "X,Y"),
    ("rank", "q_proj=x", "INT"), ("rank", "64,32", "INT"), ("rank", "q_proj=1=2", "INT"),
    ("sparsity", "q_proj=", "NUMBER")])
def test_a_value_of_the_wrong_type_is_refused_with_flag_and_type(name, text, expected):
    with pytest.raises(ValueError, match=rf"--{name}\b.*{expected}"):
        parse(Example, [f"--{name}={text}"])

@pytest.mark.parametrize("argv", [["--steps"], ["--files"], ["--name", "--fast"]])
def test_a_flag_without_its_value_is_refused(argv):
    with pytest.raises(ValueError, match=argv[0]):
        parse(Example, argv)

def spelled(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

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
        default = "" if f.default is None else f" (default {f.default})"
        default = default.lower() if isinstance(f.default, bool) else default
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

def raiser(error):
    def main():
        raise error
    return main

@pytest.mark.parametrize("rank, prefix", [(None, ""), ("0", ""), ("3", "[rank 3] ")])
def test_a_value_error_is_one_line_and_exit_code_2(capsys, monkeypatch, rank, prefix):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(ValueError("first line\n  second line")))
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"{prefix}error: first line second line\n")

def test_another_exception_keeps_its_traceback_and_ends_with_code_1(capsys):
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(RuntimeError("a defect")))
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("Traceback") and "RuntimeError: a defect" in error

@pytest.mark.parametrize("kind", [OSError, MemoryError, FloatingPointError])
def test_a_fault_of_the_disk_or_memory_and_a_diverged_run_end_with_one_line_and_code_1(capsys, kind):
    with pytest.raises(SystemExit) as end:
        flags.command(raiser(kind("first line\nsecond line")))
    assert end.value.code == 1 and capsys.readouterr() == ("", "error: first line second line\n")

def test_the_processes_of_a_job_end_with_the_same_codes():
    ends = {"pass": 0, "raise ValueError(1)": 2, "raise OSError(1)": 1, "raise KeyError": 1}
    for error, code in ends.items():
        script = f"import flags\ndef main():\n    print('written', end='')\n    {error}\nflags.command(main)"
        result = subprocess.run([sys.executable, "-c", script], env={**os.environ, "WORLD_SIZE": "2"},
                                cwd=os.path.dirname(flags.__file__), capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (code, "written")

def test_a_command_that_ends_well_does_not_exit():
    ran = types.SimpleNamespace(count=0)
    flags.command(lambda: setattr(ran, "count", ran.count + 1))
    assert ran.count == 1
