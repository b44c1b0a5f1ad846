"""export.py: a folder to hand on is whole or absent, computes what the checkpoint does, and holds no more."""
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from small_models import all_logits, largest_difference, mixed, small, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from export import Config, main
from lost import LOSTLinear, apply_lost
from nanolost import checkpoint, methods
from nanolost.checkpoint import load_folder, load_model, save_checkpoint
from nanolost.errors import UserError
from nanolost.flags import command, parse
from nanolost.tokenizer import Tokenizer

BYTE = Tokenizer.named("byte")
DENSE = dict(activation="none", gamma=0.3)

def saved(model, out_dir, **more):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    idx = tokens(2, 8)
    model(idx, idx)[1].backward()
    optimizer.step()
    return save_checkpoint(str(out_dir), 1, model, [optimizer], {"step": 1}, BYTE, 1, **more)

@pytest.fixture
def exported(tmp_path):
    """exported(model, …) → the folder that export.py makes of its checkpoint."""
    def make(model, travelling=None, **flags):
        saved(model, tmp_path / "run", travelling=travelling)
        main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "made"), **flags))
        return str(tmp_path / "made")
    return make

def theirs_of(folder, **how):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(report.values()), report
    return model.eval()

def read(folder, name="config.json"):
    with open(os.path.join(folder, name)) as f:
        return json.load(f)

def dtypes(folder):
    found = set()
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                found |= {str(f.get_tensor(key).dtype).removeprefix("torch.") for key in f.keys()}
    return found

def close(ours, theirs):
    idx = tokens(3, 20)
    expected = all_logits(ours, idx)
    with torch.no_grad():
        return largest_difference(expected, theirs(idx).logits) <= 3e-6 * expected.abs().max().item()

def nothing_made(tmp_path):
    return not [name for name in os.listdir(tmp_path) if name.startswith("made")]

# --- what is written ---

def test_a_folder_to_hand_on_has_the_model_and_nothing_of_the_run(exported, tmp_path):
    model = apply_lost(small(), 6, 0.1)
    folder = exported(model)
    assert {*os.listdir(folder)} == {"model.safetensors", "config.json", "tokenizer.json",
                                     "tokenizer_config.json", "modeling_lost.py", "lost.py"}
    assert {*os.listdir(tmp_path)} == {"run", "made"}
    again, state = load_model(folder)
    assert state == {} and torch.equal(all_logits(again, tokens(2, 9)), all_logits(model, tokens(2, 9)))

@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", [DENSE, dict(activation="none", learn_gamma=True),
                                 dict(activation="none", gamma=1.0, init="random")],
                         ids=["lost", "learned", "low rank"])
def test_layers_without_silu_become_plain_ones_that_need_no_code(exported, tied, how):
    model = apply_lost(small(n_kv_head=2, tie_embeddings=tied), 6, 0.0 if "init" in how else 0.1, **how)
    folder = exported(model, merge=True)
    assert read(folder)["model_type"] == "llama" and not {"lost", "auto_map"} & {*read(folder)}
    assert not [name for name in os.listdir(folder) if name.endswith(".py")]
    assert close(model, theirs_of(folder)) and not methods.settings_of(load_model(folder)[0])

def test_layers_of_all_kinds_become_plain_ones(exported):
    model = mixed(small(n_kv_head=2))
    folder = exported(model, merge=True)
    assert "lost" not in read(folder) and close(model, theirs_of(folder))

def test_merging_a_qwen_keeps_its_biases_and_its_type(exported):
    model = small(n_kv_head=2, model_type="qwen2", qkv_bias=True)
    with torch.no_grad():
        apply_lost(model, 6, 0.1, **DENSE)
    folder = exported(model, merge=True)
    assert read(folder)["architectures"] == ["Qwen2ForCausalLM"] and close(model, theirs_of(folder))

def test_merging_a_dense_model_changes_nothing(exported):
    model = small()
    folder = exported(model, merge=True)
    assert torch.equal(all_logits(load_model(folder)[0], tokens(2, 9)), all_logits(model, tokens(2, 9)))

@pytest.mark.parametrize("lost", [False, True], ids=["dense", "lost"])
def test_weights_have_the_dtype_that_is_asked_for(exported, lost):
    model = apply_lost(small(), 6, 0.1) if lost else small()
    folder = exported(model, save_dtype="bfloat16")
    # channels stay whole numbers
    assert dtypes(folder) == ({"bfloat16", "int32"} if lost else {"bfloat16"})
    assert read(folder)["dtype"] == "bfloat16"
    theirs = theirs_of(folder, trust_remote_code=True, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    rounded = load_model(folder)[0].bfloat16()
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in rounded.state_dict().items())

def test_weights_keep_the_dtype_of_a_folder_from_elsewhere(exported, tmp_path):
    folder = exported(small(tie_embeddings=True), save_dtype="float16")
    main(Config(ckpt=folder, out_dir=str(tmp_path / "again")))
    assert dtypes(tmp_path / "again") == dtypes(folder) == {"float16"}

def test_large_weights_come_in_several_files_with_their_index(exported):
    model = apply_lost(small(), 6, 0.1)
    folder = exported(model, max_shard_size="20KB")
    weight_map = read(folder, "model.safetensors.index.json")["weight_map"]
    files = {name for name in os.listdir(folder) if name.endswith(".safetensors")}
    assert {*weight_map.values()} == files and len(files) > 3 and "model.safetensors" not in files
    assert max(os.path.getsize(os.path.join(folder, name)) for name in files) < 40_000
    assert close(load_model(folder)[0], theirs_of(folder, trust_remote_code=True))
    assert torch.equal(all_logits(load_model(folder)[0], tokens(2, 9)), all_logits(model, tokens(2, 9)))

def test_what_the_source_had_beside_goes_along(exported):
    beside = {"generation_config.json": b'{"eos_token_id": [256, 65]}',
              "chat_template.jinja": b"{{ messages }}", "tokenizer.model": b"of another program"}
    folder = exported(small(), travelling=beside, merge=True)
    for name, content in beside.items():
        with open(os.path.join(folder, name), "rb") as f:
            assert f.read() == content
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    assert theirs_of(folder).generation_config.eos_token_id == [256, 65]

class Doubled(LOSTLinear):
    """A kind of layer that an experiment has, and that no matrix replaces."""

    merge = property()

def test_layers_of_an_experiment_are_named_where_no_code_travels(exported, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(methods.KINDS, "doubled", methods.Kind(Doubled))
    model = small()
    model.set_submodule("model.layers.0.mlp.up_proj", Doubled(32, 44, 6, 0))
    with torch.no_grad():
        for p in model.model["layers"][0].mlp.up_proj.parameters():
            p.fill_(0.1)
    exported(model)
    line = "no code travels with layers of kind doubled: only this program loads it"
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match="up_proj is a Doubled, which no single matrix replaces: leave"):
        main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "other"), merge=True))

# --- whole or absent ---

def test_silu_is_refused_by_name_before_any_weight_is_read(tmp_path, monkeypatch):
    saved(apply_lost(small(), 6, 0.1), tmp_path / "run")
    monkeypatch.setattr(export, "load_folder", lambda folder: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj cannot be merged: activation 'silu'"):
        main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "made"), merge=True))
    assert nothing_made(tmp_path)

@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("where", ["write_weights", "write_json"])
def test_whatever_ends_it_early_leaves_nothing(tmp_path, monkeypatch, error, where):
    saved(small(), tmp_path / "run")
    def fail(*given):
        raise error
    monkeypatch.setattr(checkpoint, where, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "made")))
    assert nothing_made(tmp_path)

def test_a_signal_leaves_nothing_and_one_that_is_ignored_ends_nothing(tmp_path, monkeypatch):
    saved(small(), tmp_path / "run")
    config = Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "made"))
    write_json = checkpoint.write_json
    def signalled(number, handler):
        def send(*given):
            os.kill(os.getpid(), number)
            write_json(*given)
        monkeypatch.setattr(checkpoint, "write_json", send)
        # before, this process would have ended here and now
        old = signal.signal(number, handler)
        try:
            main(config)
        finally:
            assert signal.signal(number, old) == handler
    for number in signal.SIGTERM, signal.SIGHUP:
        with pytest.raises(KeyboardInterrupt):
            signalled(number, lambda *given: pytest.fail("nobody catches the signal"))
        assert nothing_made(tmp_path)
    # as nohup starts a command
    signalled(signal.SIGHUP, signal.SIG_IGN)
    assert os.listdir(tmp_path / "made")

def test_a_pipe_in_the_place_of_weights_is_refused(tmp_path):
    saved(small(), tmp_path / "run")
    main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "from")))
    os.remove(tmp_path / "from" / "model.safetensors")
    os.mkfifo(tmp_path / "from" / "model.safetensors")
    # one who writes, that nobody waits for ever
    writer = os.open(tmp_path / "from" / "model.safetensors", os.O_RDWR)
    os.write(writer, bytes(100))
    try:
        with pytest.raises(UserError, match="model.safetensors: .*it is not a regular file"):
            main(Config(ckpt=str(tmp_path / "from"), out_dir=str(tmp_path / "made")))
    finally:
        os.close(writer)
    assert nothing_made(tmp_path)

@pytest.mark.parametrize("argv, message", [
    (["--save_dtype", "float8"], "invalid choice: 'float8'"),
    (["--max_shard_size", "5 GB"], "--max_shard_size 5 GB: give a number and KB, MB, GB or TB"),
    (["--max_shard_size", "0GB"], "--max_shard_size 0GB: give a number"),
    (["--ckpt", "nowhere"], "no checkpoint in nowhere"),
])
def test_wrong_flags_are_one_line(tmp_path, capsys, argv, message):
    saved(small(), tmp_path / "run")
    given = ["--ckpt", str(tmp_path / "run"), "--out_dir", str(tmp_path / "made"), *argv]
    with pytest.raises(SystemExit) as end:
        command(lambda: main(Config(**parse(Config, given))))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1 and message in err and nothing_made(tmp_path)

def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    folder = saved(small(), tmp_path / "run")
    for place in (folder, str(tmp_path / "run"), os.path.join(folder, "config.json")):
        before = sorted(os.listdir(folder))
        with pytest.raises(UserError, match="is (not empty|no folder): use another --out_dir"):
            main(Config(ckpt=folder, out_dir=place))
        assert sorted(os.listdir(folder)) == before
    (tmp_path / "made").mkdir()
    main(Config(ckpt=folder, out_dir=str(tmp_path / "made")))
    assert os.path.exists(tmp_path / "made" / "model.safetensors")

def test_elements_beyond_float16_are_refused(tmp_path):
    model = small()
    with torch.no_grad():
        model.model["norm"].weight[3] = 70_000
    saved(model, tmp_path / "run")
    with pytest.raises(UserError, match="model.norm.weight has elements beyond torch.float16: use --save_"):
        main(Config(ckpt=str(tmp_path / "run"), out_dir=str(tmp_path / "made"), save_dtype="float16"))
    assert load_folder(checkpoint.checkpoint_folder(str(tmp_path / "run")))
