"""README and docs: commands that exist, links that lead somewhere, markers in pairs, code that runs."""
import importlib
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import blocks, losses, metrics

import train
from experiments import tiny
from experiments.runs import Experiment
from experiments.tables import fill
from nanolost import loop, methods, optim
from nanolost.checkpoint import load_model
from nanolost.errors import UserError
from nanolost.flags import parse
from nanolost.methods import settings_of
from nanolost.settings import Config, resolve
from nanolost.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the dataclass of a command's flags, where it is not `Config` of its own file
FLAGS_OF = {"train.py": "nanolost.settings", "layers.py": "nanolost.settings",
            "finetune.py": "nanolost.tuning"}
# programs whose flags are not ours
OTHERS = {"pip", "git", "tail", "sbatch", "srun", "cd", "source", "cat", "export"}
# flags of torchrun, pytest and sbatch that the pages name
FOREIGN = {"--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port",
           "--nodes", "--signals-to-handle", "--signal", "--slow", "--kills", "--ntasks-per-node"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)

# --- commands ---

def commands_in(text: str) -> list[list[str]]:
    """Words of each command of a shell block, without comments and with variables as they stand."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.rstrip("&"), comments=True)
        # variables that stand before a command
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found

def check_script(path: str, argv: list[str]):
    """AssertionError where the script is not there, UserError where it has no such flag."""
    assert (ROOT / path).is_file(), f"there is no {path}"
    if not path.endswith(".py") or path in ("runs/plot.py", "runs/track.py"):
        return
    name = os.path.basename(path)
    if path.startswith("experiments/") and argv and not argv[0].startswith("-"):
        # run, table or plot
        argv = argv[1:]
    module = path.removesuffix(".py").replace("/", ".")
    if path.startswith("assets/"):
        assert not argv, f"{path} takes no flag"
        return
    module = importlib.import_module(FLAGS_OF.get(name, module))
    cls = vars(module)["Config"]
    # the shell would have made these of the dots that stand for any number of them
    parse(cls, [word for word in argv if word not in ("…", "...")])

def check_command(words: list[str]):
    program, *rest = words
    if program in OTHERS:
        return
    assert program in ("python", "bash", "torchrun"), f"{program} is no program that a page names"
    if program == "python" and rest[0] == "-m":
        return
    while rest and rest[0].startswith("-"):
        name = rest.pop(0).partition("=")[0]
        assert name in FOREIGN, f"{program} {name}"
    if program == "bash":
        assert rest[0].endswith(".sh"), rest
    check_script(rest[0], rest[1:])

@every_page
def test_every_command_of_a_block_exists_with_its_flags(page):
    shown = blocks(page, "sh")
    for text in blocks(page, "console"):
        # what a command prints stands below it
        shown += re.findall(r"^\$ (.*)", text, re.M)
    for text in shown:
        for words in commands_in(text):
            check_command(words)

@every_page
def test_every_command_inside_a_sentence_exists_with_its_flags(page):
    for code in re.findall(r"`((?:python|bash|torchrun) [^`]+)`", prose(page)):
        for words in commands_in(code):
            check_command(words)

def known_flags() -> set[str]:
    known = set(FOREIGN)
    for name in ("nanolost.settings", "nanolost.tuning", "prepare_c4", "sample", "eval", "export",
                 "compress", "bench", "experiments.compression", "experiments.speed", "experiments.controls",
                 "experiments.tiny", "experiments.ladder", "experiments.finetuning"):
        fields = vars(importlib.import_module(name))["Config"].__dataclass_fields__
        known |= {f"--{field}" for field in fields}
    return known

@every_page
def test_every_flag_that_a_sentence_names_is_one(page):
    named = set()
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        named |= set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", code))
    assert named <= known_flags(), named - known_flags()

@pytest.mark.parametrize("command", [
    "python train.py --learning_rat 1", "python trian.py", "bash runs/nothing.sh", "curl example.org",
    "torchrun --nproc 2 train.py", "python experiments/tiny.py run --no_such 1",
])
def test_a_command_that_is_not_there_is_found(command):
    with pytest.raises((AssertionError, UserError)):
        check_command(shlex.split(command))

# --- links and markers ---

def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}

@every_page
def test_every_link_into_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"

@every_page
def test_every_file_that_a_sentence_names_is_there(page):
    # those that a run or a command makes are in folders that nobody keeps
    for path in re.findall(r"`((?:nanolost|experiments|runs|tests|docs|assets)/[\w./-]+)`", prose(page)):
        if path not in ("nanolost/blocks.py", "nanolost/nadam.py", "nanolost/head_norm.py"):
            assert (ROOT / path).exists(), f"{path} is not there"

def test_the_first_page_names_every_command_and_script():
    page = (ROOT / "README.md").read_text()
    names = [path.name for path in (*ROOT.glob("*.py"), *ROOT.glob("runs/*.sh"), *ROOT.glob("runs/*.py"))]
    # the first is sourced by the others
    missing = [name for name in names if name != "setup.sh" and name not in page]
    assert not missing

@every_page
def test_tables_fit_a_page(page):
    rows = re.findall(r"^\|.*\|$", page.read_text(), re.M)
    assert max(row.count(" | ") for row in rows or [""]) < 8

@every_page
def test_markers_of_generated_tables_come_in_pairs(page):
    found = re.findall(r"^<!-- (begin|end) (.+) -->$", page.read_text(), re.M)
    begins = [name for kind, name in found if kind == "begin"]
    assert [kind for kind, _ in found] == ["begin", "end"] * len(begins)
    assert begins == [name for kind, name in found if kind == "end"] and len(set(begins)) == len(begins)

@pytest.mark.parametrize("page, name", [
    ("README.md", "tiny-short"), ("docs/experiments.md", "tiny"), ("docs/experiments.md", "controls"),
    ("docs/experiments.md", "ladder"),
])
def test_a_driver_finds_the_place_of_its_table(page, name, tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text())
    fill(str(copy), name, "| a new table |")
    old, new = (ROOT / page).read_text().splitlines(), copy.read_text().splitlines()
    assert "| a new table |" in new and len(new) < len(old)
    # and in no other table's
    assert len([line for line in new if line.startswith("<!--")]) == len(
        [line for line in old if line.startswith("<!--")])

def test_the_first_page_has_the_short_table_of_its_driver(tmp_path, monkeypatch):
    Tokenizer.named("byte").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "page.md").write_text((ROOT / "README.md").read_text())
    results = {seed: {"val_loss": 4.0 + seed, "tokens_per_second": 100.0} for seed in range(3)}
    monkeypatch.setattr(Experiment, "finished", lambda self, row: results)
    tiny.short(tiny.Config(data_dir=str(tmp_path), fill=str(tmp_path / "page.md")))
    table = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| LOST, ")]
    assert len(table) == 2 and all("5.000\u00a0±\u00a01.000 | 100 |" in line for line in table)
    # the rows are those that stand there
    for row in tiny.ROWS:
        assert f"| {row} |" in (ROOT / "README.md").read_text()

@pytest.fixture
def draw():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "assets" / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_a_page_without_a_sweep_is_no_picture(draw, tmp_path):
    with pytest.raises(UserError, match="has no sweep"):
        draw.draw({}, tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()

def test_the_picture_of_the_first_page_is_drawn_from_the_table(draw):
    found = draw.sweeps((ROOT / "docs" / "experiments.md").read_text())
    assert set(found) == {"dense, AdamW", "LOST, AdamW", "dense, Muon", "LOST, Muon"}
    # the best of each is the bold one
    bold = set(map(float, re.findall(r"\*\*(\d\.\d+)\*\*", (ROOT / "docs" / "experiments.md").read_text())))
    assert {min(loss for _, loss in sweep) for sweep in found.values()} <= bold

# --- code ---

def run(code: str) -> dict:
    space = {}
    exec(compile(code, "a block of a page", "exec"), space)
    return space

def test_the_code_of_the_readme_runs(capsys):
    for code in blocks(ROOT / "README.md", "python"):
        run(code)

def test_the_pages_but_one_have_no_other_code():
    # what is shown there is run below, each block with what it is for, or in test_huggingface.py,
    # test_shard.py and test_sparse.py
    known = {"README.md", "extending.md", "finetuning.md", "huggingface.md", "sharding.md"}
    assert {page.name for page in PAGES if blocks(page, "python")} <= known

@pytest.fixture
def extending(monkeypatch):
    """extending(word) runs the one block that has this word; what it registers is gone after the test."""
    for known in (methods.KINDS, methods.METHODS):
        monkeypatch.setitem(known, "blocks", None)
        monkeypatch.delitem(known, "blocks")
    monkeypatch.setitem(optim.OPTIMIZERS, "nadam", None)
    monkeypatch.delitem(optim.OPTIMIZERS, "nadam")
    monkeypatch.setattr(loop, "METRICS", list(loop.METRICS))
    def find(word: str) -> dict:
        code, = [code for code in blocks(ROOT / "docs" / "extending.md", "python") if word in code]
        return run(code)
    return find

def plain(config, **given) -> Config:
    """A small run for a kind that has no use for the flags of LOST."""
    flags = {name: value for name, value in vars(config).items() if name not in methods.METHODS["lost"].uses}
    return resolve({**flags, **given})

def test_the_kind_of_layer_of_the_page_trains_and_loads(small, extending):
    extending("BlockDiagonalLinear")
    config = plain(small(steps=8, save_every=4), **parse(Config, ["--linear=blocks"]))
    train.main(config)
    assert losses(config)[-1][1] < losses(config)[0][1]
    model, state = load_model(config.out_dir)
    assert {layer["kind"] for layer in settings_of(model).values()} == {"blocks"} and state["step"] == 8
    # and it goes on
    train.main(plain(config, steps=10))
    assert losses(config)[-1][0] == 10

def test_the_optimizer_of_the_page_trains_and_goes_on(small, extending):
    extending("nadam")
    config = small(steps=8, save_every=4, **parse(Config, ["--optimizer=nadam"]))
    train.main(config)
    assert losses(config)[-1][1] < losses(config)[0][1]
    train.main(resolve({**vars(config), "steps": 10}))
    assert losses(config)[-1][0] == 10

def test_the_metric_of_the_page_stands_in_each_evaluation(small, extending):
    extending("head_norm")
    config = small(steps=2, eval_every=1, save_every=2)
    train.main(config)
    assert [line["head_norm"] > 0 for line in metrics(config, "eval")] == [True, True]

def test_the_source_of_text_of_the_page_trains(small, extending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extending("write_split")
    config = small(data_dir="data/mine", tokenizer="byte", steps=4)
    train.main(config)
    assert losses(config)[-1][1] < losses(config)[0][1]
