"""runs/, .ci/run and the package: what a user types ends when it should, and with one line on a mistake."""
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanolost.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob("runs/*.sh")), *sorted(ROOT.glob("experiments/*.sh")), ROOT / ".ci" / "run"]
PYTHON = """#!/usr/bin/env bash
# in place of python, torchrun and ruff: writes down how it was called, and does what the test says
echo "$(basename "$0") $*" >> calls
if [[ "$*" == *train.py* ]]; then mkdir -p out/demo out/60m; eval "$TRAIN"; fi
"""

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True)

# --- scripts, with stand-ins for the programs that they call ---

@pytest.fixture
def project(tmp_path):
    """A copy of the scripts with an environment that is said to be installed."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "runs", folder / "runs")
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name in ("python", "torchrun", "ruff"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)
    versions = (folder / "pyproject.toml").read_bytes() + (folder / "constraints.txt").read_bytes()
    cksum = subprocess.run(["cksum"], input=versions, capture_output=True, check=True)
    stamp = cksum.stdout.split()[0].decode()
    for extras in ("none", "test", "test,plot", "hf"):
        (folder / ".venv" / f"installed-{stamp}-{extras}").touch()
    return folder

def start(project, script: str, *argv, train: str = "true", **environment) -> subprocess.Popen:
    # a shell that itself ignores Ctrl-C, as one in the background does, would hand that down
    return subprocess.Popen(
        ["bash", script, *argv], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "TRAIN": train, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def calls(project) -> list[str]:
    try:
        return (project / "calls").read_text().splitlines()
    except FileNotFoundError:
        return []

def state(name: str, folder: str = "out/demo") -> str:
    return f"""echo '{json.dumps({"state": name, "step": 3})}' > {folder}/status.json"""

def test_the_demo_prepares_trains_and_samples(project):
    process = start(project, "runs/demo.sh", train=state("finished"))
    assert process.wait() == 0, process.stdout.read()
    assert [re.search(r"\w+\.py", call).group() for call in calls(project)] == [
        "prepare_c4.py", "train.py", "sample.py"]

def test_the_papers_protocol_is_rows_of_t5_s_tokens_and_their_evaluator(project):
    (project / "t5").mkdir()
    (project / "t5" / "tokenizer.json").touch()
    # a pattern reaches prepare_c4.py as it was typed, though the shell could expand it
    process = start(project, "runs/paper.sh", "60m", "--steps", "50", T5="t5", INPUT="*.toml", OUT="out/60m",
                    train=state("finished", "out/60m"))
    assert process.wait() == 0, process.stdout.read()
    prepare, training = (next(call for call in calls(project) if name in call)
                         for name in ("prepare_c4.py", "train.py"))
    assert "--tokenizer t5 --rows 256" in prepare and prepare.endswith("--input *.toml")
    assert training.startswith("torchrun") and "--vocab_size 32000 --seq_len 256" in training
    assert training.endswith("--paper_batch 256 --steps 50")

def test_the_papers_protocol_prepares_nothing_for_a_dry_run(project):
    assert start(project, "runs/paper.sh", "60m", "--dry_run").wait() == 0
    assert [call.split()[1] for call in calls(project)] == ["train.py"]

@pytest.mark.parametrize("script, folder", [("runs/demo.sh", "out/demo"), ("runs/60m.sh", "out/60m")])
@pytest.mark.parametrize("ending", ["stopped", "failed", "none"])
def test_no_sample_of_a_run_that_stopped_before_its_last_step(project, script, folder, ending):
    train = "true" if ending == "none" else state(ending, folder)
    process = start(project, script, train=train)
    output = process.communicate()[0]
    assert process.returncode == 1 and f"the run in {folder} has not reached its last step" in output
    assert "train.py" in calls(project)[-1]

def test_ctrl_c_ends_the_script_though_the_program_ends_with_0(project):
    # the worst case: the signal comes with the last step
    train = "trap 'cp finished out/demo/status.json; exit 0' INT; touch ready; while :; do sleep 0.05; done"
    (project / "finished").write_text('{"state": "finished"}')
    process = start(project, "runs/demo.sh", train=train)
    deadline = time.monotonic() + 120
    while not (project / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "the same command continues" in output
    assert "train.py" in calls(project)[-1]

def test_the_tests_run_side_by_side_and_take_flags(project):
    process = start(project, "runs/test.sh", "--slow", "-k", "a name")
    assert process.wait() == 0, process.stdout.read()
    lint, tests = calls(project)
    assert lint == "ruff check ." and re.search("-m pytest .*-n 2 .*--slow -k a name", tests)

@pytest.mark.parametrize("beside, given, expected", [
    (True, None, "shared/data"), (False, None, "unset"), (True, "elsewhere", "elsewhere")])
def test_the_real_data_beside_the_project_are_named_by_ci_alone(project, beside, given, expected):
    if beside:
        (project.parent / "shared" / "data").mkdir(parents=True)
    (project / "runs" / "test.sh").write_text('echo "${NANOLOST_DATA:-unset} $*"\n')
    environment = {name: value for name, value in os.environ.items() if name != "NANOLOST_DATA"}
    environment |= {"NANOLOST_DATA": given} if given else {}
    done = subprocess.run(["bash", project / ".ci" / "run", "--slow"], env=environment, capture_output=True,
                          text=True, check=True)
    folder = str(project.parent / expected) if expected == "shared/data" else expected
    assert done.stdout == f"{folder} --slow\n"

def test_pip_shows_its_progress():
    lines = (ROOT / "runs" / "setup.sh").read_text().splitlines()
    install = [line for line in lines if "pip install" in line]
    assert install and not any(re.search(r"\s(-q|--quiet)\b", line) for line in install)

HELPED = [*(f"runs/{name}.sh" for name in ("demo", "60m", "paper", "bench", "test")),
          "experiments/tiny.sh", "experiments/controls.sh"]

@pytest.mark.parametrize("script", HELPED)
def test_a_script_says_what_it_is_for_and_begins_nothing(project, script):
    process = start(project, script, "--help")
    said = process.communicate()[0]
    comment = (ROOT / script).read_text().splitlines()[1]
    assert process.returncode == 0 and said.splitlines()[0] == comment.removeprefix("# ")
    assert "source" not in said and calls(project) == []

@pytest.mark.parametrize("script, argv", [
    ("runs/60m.sh", ["60k"]), ("runs/60m.sh", ["--train_tokens", "1M"]), ("runs/paper.sh", ["50m"]),
    ("runs/bench.sh", ["gpu"]), ("experiments/tiny.sh", []), ("experiments/controls.sh", ["a"])])
def test_a_mistake_before_a_script_is_one_line_and_code_2(project, script, argv):
    process = start(project, script, *argv)
    said = process.communicate()[0]
    assert process.returncode == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert calls(project) == []

# --- the package ---

def test_a_newer_torch_is_not_replaced():
    torch = re.search(r'"torch([^"]*)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert torch.startswith(">=") and "<" not in torch and "=" not in torch[2:]

def test_every_package_that_is_installed_has_a_tested_version():
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|test|plot) = \[(.*?)\]", project, re.M | re.S)
    names = {re.match(r"[\w-]+", entry).group() for text in lists for entry in re.findall('"([^"]+)"', text)}
    tested = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert len(names) > 8 and names <= tested

@pytest.mark.slow
def test_the_installed_package_is_the_layer_and_no_other_name(tmp_path):
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).exists(), names.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source]
    subprocess.run(pip, check=True, cwd=tmp_path)
    installed = [name for name in os.listdir(site) if not name.endswith(".dist-info")]
    assert set(installed) - {"__pycache__"} == {"lost.py"}
    code = "import lost, sys; print(lost.__file__, 'nanolost' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.stdout.split() == [str(site / "lost.py"), "False"]

# --- plot.py ---

@pytest.fixture
def plot(tmp_path, monkeypatch):
    """runs/plot.py, in a folder of this test."""
    monkeypatch.syspath_prepend(ROOT / "runs")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("plot")

def out_dir(folder, **given) -> Path:
    """An out_dir of two evaluations."""
    folder.mkdir()
    config = {"linear": "lost", "optimizer": "muon", "lr": 0.01, "seed": 0, "batch_tokens": 256, **given}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"kind": "mine", "x": None}]
    for step in (1, 2):
        train = {"kind": "train", "step": step, "loss": 5.5, "tokens": 256 * step}
        records.append({**train, "tokens_per_second": 9.0})
        records.append({"kind": "eval", "step": step, "val_loss": 5.0, "val_ppl": 148.4, "val_bpb": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder

def test_plot_prints_the_last_evaluations_and_draws_the_runs(tmp_path, plot, capsys):
    pytest.importorskip("matplotlib")
    out_dir(tmp_path / "a"), out_dir(tmp_path / "b", linear="dense", optimizer="adamw")
    with open("a/metrics.jsonl", "a") as f:
        f.write('{"kind": "eval", "st')        # a run that is still writing
    plot.main(["a", "b", "--out", "x.png"])
    said = capsys.readouterr()
    header, *rows, drawn = said.out.splitlines()
    assert [row.split()[0] for row in rows] == ["dense", "lost,"] and drawn == "drawn in x.png"
    assert "148.40" in rows[1] and os.path.getsize("x.png") > 1000
    assert said.err.count("\n") == 1 and "its last line is cut" in said.err

RECORD = b'{"kind": "train", "tokens": 1, "loss": 2}\n'
METRICS = {                                    # folder → metrics.jsonl
    "bad line": RECORD + b'{"kind": \n' + RECORD,
    "a list": RECORD + b"[]\n",
    "latin": RECORD + b'{"kind": "\xe9"}\n',
    "no number": RECORD + b'{"kind": "eval", "step": 1}\n',
    "no evaluation": RECORD,
}

@pytest.mark.parametrize("argv, cause", [
    ([], "no folder is given: python runs/plot.py OUT_DIR"), (["--out"], "no folder"),
    (["a", "--out"], "--out"), (["a", "--out="], "--out"), (["--bad", "a"], "unknown flag --bad"),
    (["nowhere"], "nowhere/config.json"), (["a", "no metrics"], "no metrics/metrics.jsonl"),
    (["bad line"], "bad line/metrics.jsonl:2 is no JSON"), (["a list"], "a list/metrics.jsonl:2 is no JSON"),
    (["latin"], "latin/metrics.jsonl:2 is no JSON"), (["no number"], "has no number val_loss"),
    (["no evaluation"], "no evaluation yet"), (["odd config"], "odd config/config.json has no sound lr"),
    (["a", "--out", "x.none"], "x.none")])
def test_a_mistake_before_plot_is_named_in_one_line(tmp_path, plot, argv, cause):
    if "x.none" in argv:
        pytest.importorskip("matplotlib")
    for name in ("a", "no metrics", *METRICS):
        out_dir(tmp_path / name)
    for name, metrics in METRICS.items():
        (tmp_path / name / "metrics.jsonl").write_bytes(metrics)
    (tmp_path / "no metrics" / "metrics.jsonl").unlink()
    out_dir(tmp_path / "odd config", lr="fast")
    with pytest.raises(UserError, match=re.escape(cause)) as error:
        plot.main(argv)
    assert "\n" not in str(error.value)

def drawn(plot, monkeypatch, *folders):
    """The axes that plot.py draws."""
    pytest.importorskip("matplotlib")
    plt = plot.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot.main([*folders, "--out", "x.png"])
    return plt.gcf().axes[0]

def test_the_axis_ends_above_what_a_run_reaches_and_not_at_its_start(tmp_path, plot, monkeypatch):
    folder = out_dir(tmp_path / "a")
    records = [{"kind": "eval", "step": step, "val_loss": loss, "val_ppl": 1.0}
               for step, loss in ((1, 2.0), (0, 9.0), (50, 8.0), (100, 7.5))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    axes = drawn(plot, monkeypatch, "a")
    assert 8.0 < axes.get_ylim()[1] < 9.0
    # in the order of the steps, whatever that of the file
    assert list(axes.lines[-1].get_ydata()) == [9.0, 2.0, 8.0, 7.5]

def test_runs_of_different_tokenizers_are_drawn_in_bits_per_byte(tmp_path, plot, monkeypatch):
    out_dir(tmp_path / "a", vocab_size=257), out_dir(tmp_path / "b", vocab_size=1024, linear="dense")
    axes = drawn(plot, monkeypatch, "a", "b")
    assert axes.get_ylabel() == "bits per byte"
    assert {number for line in axes.lines for number in line.get_ydata()} == {2.0}

def test_a_run_whose_rate_a_resume_changed_says_both(tmp_path, plot, monkeypatch):
    folder = out_dir(tmp_path / "a")
    (folder / "config_before_step_00000001.json").write_text('{"lr": 0.02}')
    axes = drawn(plot, monkeypatch, "a")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lost, Muon, lr 0.02, then 0.01"]

def test_plot_by_its_path_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "runs" / "plot.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
