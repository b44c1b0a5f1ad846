"""sample.py as its users run it: the text alone on stdout; one line and exit code 2 for a wrong input."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lost import LOSTLinear, apply_lost
from model import Llama, LlamaConfig
from nanolost.checkpoint import load_model, save_checkpoint
from nanolost.decode import generate
from nanolost.flags import command, parse
from nanolost.tokenizer import Tokenizer
from sample import Config, main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENIZER = Tokenizer.named("byte")
SIZES = dict(vocab_size=TOKENIZER.vocab_size, max_seq_len=16, n_layer=1, n_head=2, n_embd=16, n_ffn=24)

def save_step(out_dir, step, skip=("lm_head",), **sizes):
    torch.manual_seed(step)
    model = Llama(LlamaConfig(**{**SIZES, **sizes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)                         # far from flat: greedy text varies
    apply_lost(model, 4, 0.2, skip=skip)
    return save_checkpoint(str(out_dir), step, model, [], {"step": step}, TOKENIZER, keep=2)

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An out_dir and its two checkpoint folders, oldest first."""
    out_dir = tmp_path_factory.mktemp("trained")
    return str(out_dir), save_step(out_dir, 1), save_step(out_dir, 2)

@pytest.fixture
def copied(trained, tmp_path):
    """The same in a place where they may be damaged."""
    out_dir = shutil.copytree(trained[0], tmp_path / "copied")
    return str(out_dir), *sorted(str(p) for p in (out_dir / "checkpoints").iterdir())

@pytest.fixture
def sample(capsys):
    def run(ckpt, **flags):
        main(Config(ckpt=ckpt, device="cpu", **{"max_new_tokens": 40, **flags}))
        return capsys.readouterr().out
    return run

@pytest.fixture
def refused(capsys):
    """The one line that ends a run with exit code 2."""
    def run(*argv):
        with pytest.raises(SystemExit) as end:
            command(lambda: main(Config(**parse(Config, argv))))
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.index("\n") == len(err) - 1
        return err
    return run

def process(*argv, environment=None):
    program = [sys.executable, os.path.join(ROOT, "sample.py"), *argv]
    return subprocess.run(program, capture_output=True, timeout=600, cwd=os.path.dirname(ROOT),
                          env=environment)

def flip_byte(path):
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)[0]
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last ^ 1]))

def model_alone(checkpoint, place):
    """The model of a checkpoint in a folder that is none of a run's."""
    folder = place / "alone"
    folder.mkdir()
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(os.path.join(checkpoint, file), folder)
    return str(folder)

def literal_text(folder, prompt, seed, count, **how):
    """One sample from first principles: the model's continuation up to its end of text."""
    model, _ = load_model(folder)
    ids = [TOKENIZER.eot, *prompt.encode()]
    generator = torch.Generator().manual_seed(seed)
    new = generate(model, torch.tensor([ids]), count, generator=generator, **how)[0, len(ids):].tolist()
    end = new.index(TOKENIZER.eot) if TOKENIZER.eot in new else count
    return prompt + bytes(new[:end]).decode(errors="replace") + "\n"

# --- as a process ---

def test_stdout_is_the_text_alone(trained, sample):
    out_dir = trained[0]
    done = process("--ckpt", out_dir, "--prompt=Once upon", "--seed", "3", "--max_new_tokens=40",
                   "--device=cpu")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == sample(out_dir, prompt="Once upon", seed=3)

def test_pickled_checkpoint_ends_with_one_line_and_code_two(tmp_path):
    path, trace = str(tmp_path / "model.pt"), tmp_path / "executed"
    class Harmful:
        def __reduce__(self):
            return open, (str(trace), "w")
    torch.save({"model": Harmful()}, path)
    done = process("--ckpt", path)
    assert done.returncode == 2 and done.stdout == b"" and not trace.exists()
    assert re.match(f"error: {path} is a file: .*pickled checkpoint.* refused", done.stderr.decode())
    assert done.stderr.count(b"\n") == 1 and done.stderr.endswith(b"\n")

# --- the text ---

@pytest.mark.parametrize("how", [
    dict(temperature=0.0), dict(temperature=2.0), dict(temperature=1.5, top_k=5),
    dict(temperature=1.5, top_p=0.5), dict(temperature=1.5, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("prompt", ["", "Ünïcode, longer than a window"])
def test_text_is_the_continuation_by_the_model(trained, sample, how, prompt):
    expected = literal_text(trained[2], prompt, seed=3, count=40, **how)
    assert sample(trained[2], prompt=prompt, seed=3, **how) == expected
    assert len(expected) > len(prompt) + 1

def test_seed_decides_the_text(trained, sample):
    first, again, other = (sample(trained[0], prompt="A", seed=seed) for seed in (1, 1, 2))
    assert first == again != other

def test_greedy_text_needs_no_seed(trained, sample):
    first, other = (sample(trained[0], prompt="A", temperature=0.0, seed=seed) for seed in (1, 2))
    assert first == other and len(set(first)) > 3

def test_out_dir_stands_for_its_newest_checkpoint(trained, sample):
    out_dir, old, new = trained
    assert sample(out_dir) == sample(new) != sample(old)

def test_prompt_may_be_a_file(trained, sample, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Ein Anfang,\nzwei Zeilen: äöü", encoding="utf-8")
    text = sample(trained[0], prompt=f"FILE:{path}")
    assert text == sample(trained[0], prompt="Ein Anfang,\nzwei Zeilen: äöü")
    assert text.startswith("Ein Anfang,\nzwei Zeilen: äöü")

def test_samples_are_independent_with_an_empty_line_between(trained, sample):
    text = sample(trained[0], prompt="<A>", num_samples=3, temperature=2.0, max_new_tokens=10)
    before, *samples = text.split("<A>")
    new = [samples[0][:-2], samples[1][:-2], samples[2][:-1]]
    assert before == "" and len(set(new)) == 3
    assert text == "\n\n".join("<A>" + s for s in new) + "\n"

def test_text_ends_where_the_model_ends_the_document(trained, sample):
    text = sample(trained[0], prompt="<A>", num_samples=8, temperature=20.0, max_new_tokens=300)
    lengths = [len(part) for part in text.split("<A>")[1:]]
    assert len(lengths) == 8 and min(lengths) < 200 and len(set(lengths)) > 4
    assert "endoftext" not in text

def test_byte_order_mark_of_a_prompt_file_is_no_part_of_the_text(trained, sample, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Ein Anfang", encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample(trained[0], prompt="FILE:~/prompt.txt") == sample(trained[0], prompt="Ein Anfang")

def test_model_with_a_lost_head_is_sampled(sample, tmp_path):
    folder = save_step(tmp_path, 1, skip=())
    assert isinstance(load_model(folder)[0].lm_head, LOSTLinear)
    text = sample(folder, prompt="A", temperature=0.0)
    assert text == literal_text(folder, "A", seed=0, count=40, temperature=0.0) and len(text) > 3

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_text_reaches_a_standard_output_of_another_encoding(trained, sample, encoding):
    text = sample(trained[0], prompt="ü → ☃", seed=3)
    done = process("--ckpt", trained[0], "--prompt=ü → ☃", "--seed=3", "--max_new_tokens=40", "--device=cpu",
                   environment={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout == text.encode(encoding, "backslashreplace")

@pytest.mark.parametrize("tied", [False, True])
def test_ids_beyond_the_tokenizer_are_never_drawn(sample, tmp_path, tied):
    folder = save_step(tmp_path, 1, vocab_size=2 * TOKENIZER.vocab_size, tie_embeddings=tied)
    assert len(sample(folder, prompt="A", temperature=100.0, max_new_tokens=100)) > 3

def test_compiled_step_gives_the_same_text(trained, sample):
    greedy = dict(prompt="A", temperature=0.0)
    assert sample(trained[0], compile=True, **greedy) == sample(trained[0], **greedy)

def test_bfloat16_gives_a_text(trained, sample):
    assert sample(trained[0], prompt="A", dtype="bfloat16", temperature=0.0).startswith("A")

def test_damaged_newest_checkpoint_gives_way_to_the_one_before(copied, sample, capsys):
    out_dir, old, new = copied
    expected = sample(old)
    flip_byte(os.path.join(new, "model.safetensors"))
    main(Config(ckpt=out_dir, device="cpu", max_new_tokens=40))
    out, err = capsys.readouterr()
    assert out == expected
    assert err.startswith(f"WARNING: {new} is damaged (model.safetensors has changed since it was written)")

# --- what is refused ---

def test_place_without_a_checkpoint_is_refused(refused, tmp_path):
    assert f"no checkpoint in {tmp_path}: give an out_dir" in refused("--ckpt", str(tmp_path))
    absent = str(tmp_path / "absent")
    assert f"no checkpoint in {absent}" in refused("--ckpt", absent)

def test_folder_of_pickled_weights_is_refused(refused, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    message = refused("--ckpt", str(tmp_path))
    assert str(tmp_path) in message and re.search("pickled .* refused.* convert .* safetensors", message)

@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "state.json"])
def test_changed_file_is_refused(refused, copied, file):
    flip_byte(os.path.join(copied[2], file))
    assert f"is damaged: {file} has changed since it was written" in refused("--ckpt", copied[2])

def test_missing_file_is_refused(refused, copied):
    os.remove(os.path.join(copied[2], "tokenizer.json"))
    assert "is damaged: tokenizer.json cannot be read" in refused("--ckpt", copied[2])

@pytest.mark.parametrize("file, message", [
    ("model.safetensors", "cannot read .*model.safetensors"), ("config.json", "cannot read .*config.json"),
    ("tokenizer.json", "tokenizer.json is no tokenizer: .*give a tokenizer.json"),
])
def test_cut_file_of_a_folder_without_a_manifest_is_refused(refused, copied, file, message, tmp_path):
    folder = model_alone(copied[2], tmp_path)
    path = os.path.join(folder, file)
    os.truncate(path, os.path.getsize(path) // 2)
    assert re.search(message, refused("--ckpt", folder))

def test_weights_that_do_not_fit_are_refused_on_one_line(refused, copied, tmp_path):
    folder = model_alone(copied[2], tmp_path)
    path = Path(folder, "config.json")
    path.write_text(path.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    message = refused("--ckpt", folder)
    assert "do not fit its config.json: " in message
    assert "model.layers.1.self_attn.q_proj.weight is missing" in message

def test_out_dir_of_damaged_checkpoints_ends_with_code_two(copied, capsys):
    for folder in copied[1:]:
        flip_byte(os.path.join(folder, "model.safetensors"))
    with pytest.raises(SystemExit) as end:
        command(lambda: main(Config(ckpt=copied[0])))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert end.value.code == 2 and out == "" and "Traceback" not in err
    assert lines[-1].startswith(f"error: all 2 checkpoints of {copied[0]} are damaged")
    assert all(line.startswith("WARNING: ") for line in lines[:-1])

@pytest.mark.parametrize("argv, message", [
    (["--promt", "A"], "unknown flag --promt: did you mean --prompt"),
    (["--num", "2"], "unknown flag --num"),
    (["A"], " A: see --help"),
    (["--top_k", "many"], "expected --top_k INT, not 'many'"),
    (["--max_new_tokens", "2.5"], "expected --max_new_tokens INT, not '2.5'"),
    (["--temperature"], "--temperature: expected one argument"),
    (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
    (["--max_new_tokens", "0"], "--max_new_tokens and --num_samples must be positive"),
    (["--num_samples=0"], "--max_new_tokens and --num_samples must be positive"),
    (["--temperature=-0.1"], "--temperature must be 0 or more"),
    (["--top_k=0"], "--top_k must be positive"),
    (["--top_p=0"], "--top_p must lie in (0, 1]"), (["--top_p=1.5"], "--top_p must lie in (0, 1]"),
    (["--top_p=nan"], "--top_p must lie in (0, 1]"), (["--temperature=nan"], "--temperature"),
    (["--prompt", "FILE:absent.txt"], "cannot read the prompt: "),
])
def test_wrong_flag_is_refused(refused, trained, argv, message):
    assert message in refused("--ckpt", trained[0], "--device=cpu", *argv)

def test_prompt_that_is_not_utf_8_is_refused(refused, trained, tmp_path):
    path = tmp_path / "latin"
    path.write_bytes("äöü".encode("latin-1"))
    message = refused("--ckpt", trained[0], "--prompt", f"FILE:{path}")
    assert "cannot read the prompt: 'utf-8' codec" in message

def test_tokenizer_of_another_model_is_refused(refused, tmp_path):
    folder = save_step(tmp_path, 1, vocab_size=100)
    message = refused("--ckpt", folder, "--device=cpu")
    assert f"the tokenizer has {TOKENIZER.vocab_size} tokens, the model only 100" in message

def test_prompt_of_undecodable_bytes_is_refused(refused, trained):
    assert "--prompt is no text" in refused("--ckpt", trained[0], "--prompt", "\udcff\udc80")

def test_absent_device_is_refused(refused, trained):
    absent = "mps" if torch.cuda.is_available() else "cuda"                   # no machine has both
    assert absent in refused("--ckpt", trained[0], "--device", absent)
