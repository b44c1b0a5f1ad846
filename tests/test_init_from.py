"""train.py --init_from: what a folder brings, what is typed beside it, how such a run goes on; --freeze."""
import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
from conftest import (
    continue_from,
    ended,
    files_of,
    launch,
    lines,
    losses,
    metrics,
    started,
    step_folder,
    updates,
    val_losses,
)
from safetensors.torch import load_file, save_file
from small_models import MIXTURE, largest_difference, mixed, sparse_of

import eval as evaluation
import prepare_c4
import train
from lost import decompose
from nanolost.checkpoint import load_folder, load_model, load_with_tokenizer, write_model
from nanolost.errors import UserError
from nanolost.methods import settings_of
from nanolost.settings import resolve, settle_device
from nanolost.source import Source, remembered

RUN = dict(steps=8, batch_tokens=256, eval_every=4, eval_tokens=2000, save_every=4, log_every=1, device="cpu",
           threads=1, seq_len=32)
FOREIGN = ("optimizer.safetensors", "state.json", "manifest.json")

@pytest.fixture
def from_folder(data_dir, tmp_path):
    """from_folder(folder, …) → a resolved Config of a run that starts there."""
    def make(folder, **given):
        places = {"data_dir": data_dir, "out_dir": str(tmp_path / "out"), "init_from": folder}
        return resolve({**RUN, **places, **given})
    return make

@pytest.fixture(params=["dense", "tied", "lost"])
def trained(request, small, tmp_path):
    """The folder of a trained model with a limit of 48 tokens, as Hugging Face's come: a model alone."""
    return folder_of_kind(request.param, small, tmp_path)

@pytest.fixture
def dense(small, tmp_path):
    return folder_of_kind("dense", small, tmp_path)

def folder_of_kind(kind, small, tmp_path) -> str:
    switches = {"dense": dict(linear="dense"), "lost": {}}
    switches["tied"] = dict(linear="dense", tie_embeddings=True, n_kv_head=1)
    config = small(**switches[kind], steps=30, save_every=30, eval_every=30, seq_len=48, batch_tokens=384,
                   out_dir=str(tmp_path / "source"))
    train.main(config)
    folder = str(tmp_path / "folder")
    shutil.copytree(step_folder(config, 30), folder)
    for name in FOREIGN:
        os.remove(os.path.join(folder, name))
    with open(os.path.join(folder, "generation_config.json"), "w", encoding="utf-8") as f:
        f.write('{"eos_token_id":   [256]}')
    return folder

def logits(model, count=40):
    idx = torch.arange(count)[None] * 7 % 257
    with torch.no_grad():
        return model(idx, idx)[0]

def other(tensors: dict, fault: str) -> str:
    """Change a folder's tensors in place; what is said of it then."""
    norm = "model.norm.weight"
    query = "model.layers.0.self_attn.q_proj"
    if fault == "shape":
        tensors[norm] = torch.ones(1)
        return r"model.norm.weight is \[1\], not \[32\]"
    if fault == "missing":
        del tensors[f"{query}.weight"]
        return "q_proj.weight is missing"
    if fault == "dtype":
        tensors[f"{query}.weight"] = tensors[f"{query}.weight"].to(torch.int32)
        return "q_proj.weight is torch.int32, not torch.float32"
    if fault == "more":
        tensors[f"{query}.bias"] = torch.zeros(32)
        return "q_proj.bias is not in the model"
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    return "its weights hold a head of their own"

@pytest.mark.parametrize("linear", [None, "lost", "lowrank"])
@pytest.mark.parametrize("fault", ["shape", "missing", "dtype", "more", "head"])
def test_weights_that_do_not_fit_are_refused_also_where_layers_are_replaced(
        small, tmp_path, from_folder, fault, linear):
    # tied, so that a head of its own is one too many
    folder = folder_of_kind("tied", small, tmp_path)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    said = other(tensors, fault)
    save_file(tensors, path, {"format": "pt"})
    given = {} if linear is None else {"linear": linear, "rank": 8}
    with pytest.raises(UserError, match=said):
        train.main(from_folder(folder, **given))
    assert not os.path.exists(tmp_path / "out" / "metrics.jsonl")

# --- what a folder brings ---

def test_a_run_starts_with_the_function_sizes_and_layers_of_the_folder(trained, from_folder):
    config = settle_device(from_folder(trained, steps=1, lr=1e-30, save_every=1))
    train.main(config)
    first, _ = load_folder(trained)
    now, state = load_model(config.out_dir)
    # an update of 1e-30 moves nothing
    assert torch.equal(logits(now), logits(first))
    assert now.state_dict().keys() == first.state_dict().keys()
    assert (state["step"], state["samples"]) == (1, 8)
    # the window of training is not the model's limit
    assert now.config == first.config and now.config.max_seq_len == 48
    saved = state["config"]
    assert (saved["n_embd"], saved["vocab_size"], saved["seq_len"]) == (32, 257, 32)
    assert saved["tie_embeddings"] == first.config.tie_embeddings
    assert now.config.tie_embeddings == (now.lm_head.weight is now.model["embed_tokens"].weight)

def test_it_goes_on_from_the_loss_that_eval_says_and_lowers_it(trained, from_folder):
    config = from_folder(trained, lr=5e-3, steps=40, warmup=4)
    text = dict(data_dir=config.data_dir, tokens=2000, seq_len=32)
    before = evaluation.main(evaluation.Config(ckpt=trained, device="cpu", **text))
    train.main(config)
    found = [record["val_loss"] for record in metrics(config, "eval")]
    assert abs(found[0] - before["loss"]) < 0.3 and found[-1] < before["loss"] - 0.03

def test_the_recipe_is_its_own_and_any_value_of_it_can_be_typed():
    config = resolve({"init_from": "x", "steps": 200})
    assert (config.optimizer, config.lr, config.batch_tokens) == ("adamw", 1e-4, 16_384)
    assert (config.weight_decay, config.grad_clip, config.min_lr_ratio) == (0.0, 1.0, 0.1)
    config.settle_schedule({})
    assert config.warmup == 10
    typed = resolve({"init_from": "x", "steps": 200, "lr": 1e-3, "optimizer": "muon", "weight_decay": 0.1})
    assert (typed.lr, typed.optimizer, typed.weight_decay) == (1e-3, "muon", 0.1)

@pytest.mark.parametrize("limit, window", [(48, 48), (1024, 1024), (8192, 1024)])
def test_the_window_is_the_smaller_of_1024_and_the_limit(dense, from_folder, limit, window):
    path = os.path.join(dense, "config.json")
    with open(path, encoding="utf-8") as f:
        content = json.load(f)
    with open(path, "w", encoding="utf-8") as f:
        json.dump({**content, "max_position_embeddings": limit}, f)
    config = from_folder(dense, seq_len=None)
    Source.of(config)
    assert config.seq_len == window
    with pytest.raises(UserError, match=f"--seq_len {limit + 1} is above the {limit} tokens"):
        Source.of(from_folder(dense, seq_len=limit + 1))

def test_what_the_source_had_travels_on_unchanged_through_a_resume(dense, from_folder):
    with open(os.path.join(dense, "vocab.json"), "wb") as f:
        f.write(b'{ "anything": 1}')
    config = from_folder(dense, steps=4)
    train.main(config)
    shutil.rmtree(dense)
    train.main(from_folder(dense))
    for step in (4, 8):
        for name, content in [("generation_config.json", b'{"eos_token_id":   [256]}'),
                              ("vocab.json", b'{ "anything": 1}')]:
            with open(os.path.join(step_folder(config, step), name), "rb") as f:
                assert f.read() == content
            with open(os.path.join(step_folder(config, step), "manifest.json"), encoding="utf-8") as f:
                assert name in json.load(f)

# --- trained weights, decomposed ---

def test_linear_decomposes_the_trained_weights_and_keeps_their_function(dense, from_folder):
    config = from_folder(dense, linear="lost", rank=30, sparsity=0.1, steps=1, lr=1e-30)
    train.main(config)
    now, _ = load_model(config.out_dir)
    first, _ = load_folder(dense)
    layer = now.model["layers"][1].mlp.up_proj
    weight = first.model["layers"][1].mlp.up_proj.weight
    assert (layer.rank, layer.k, layer.gamma, layer.activation) == (30, 3, 0.7, "none")
    # the low-rank part and the rest of the chosen channels, whatever γ
    expected = decompose(weight.detach(), 30, 3, sparse_init="residual")
    assert torch.equal(layer.index, expected.index)
    W = expected.B @ expected.A
    W[:, expected.index] += expected.W_s
    assert largest_difference(layer.merge().weight, W) < 1e-5
    # of rank 30 of 32 little is lost
    assert largest_difference(logits(now), logits(first)) < 0.3
    # embedding and head stay what they are
    assert torch.equal(now.lm_head.weight, first.lm_head.weight)
    assert torch.equal(now.model["embed_tokens"].weight, first.model["embed_tokens"].weight)

def test_a_decomposition_has_a_quarter_of_the_width_and_no_silu_unless_typed(small, tmp_path, from_folder):
    folder = folder_of_kind("tied", small, tmp_path)
    config = from_folder(folder, linear="lost", steps=2)
    train.main(config)
    now, state = load_model(config.out_dir)
    attention = now.model["layers"][0].self_attn
    assert (attention.q_proj.rank, now.model["layers"][0].mlp.down_proj.rank) == (8, 8)
    assert (attention.q_proj.activation, attention.q_proj.gamma) == ("none", 0.7)
    # 16 rows leave room for it, 8 would not
    assert attention.k_proj.rank == 8
    assert now.lm_head.weight is now.model["embed_tokens"].weight
    assert isinstance(now.lm_head, torch.nn.Linear) and state["config"]["linear"] == "lost"
    other = str(tmp_path / "silu")
    silu = settle_device(from_folder(folder, linear="lost", activation="silu", out_dir=other))
    source = Source.of(silu)
    assert source.build(silu, "cpu").model["layers"][0].mlp.down_proj.activation == "silu"

def test_a_matrix_of_too_few_rows_for_the_rank_gets_half_of_them(small, tmp_path, from_folder):
    config = small(linear="dense", n_head=4, n_kv_head=1, steps=2, out_dir=str(tmp_path / "source"))
    train.main(config)
    run = settle_device(from_folder(config.out_dir, linear="lost"))
    model = Source.of(run).build(run, "cpu")
    attention = model.model["layers"][0].self_attn
    assert (attention.k_proj.rank, attention.v_proj.rank, attention.q_proj.rank) == (4, 4, 8)

@pytest.mark.parametrize("given, message", [
    (dict(model="60m"), "--model stands in the folder"), (dict(n_layer=3), "--n_layer stands in the folder"),
    (dict(tokenizer="gpt2"), "--tokenizer stands in the folder"), (dict(steps=None), "needs --steps"),
    (dict(rank=4), "--rank means nothing without"), (dict(linear="dense", rank=4), "with --linear dense"),
    (dict(lr=-1.0), "--lr -1.0"), (dict(warmup=9), "--warmup 9"),
])
def test_what_does_not_go_with_a_folder_is_refused_before_it_is_read(given, message):
    flags = {**RUN, "init_from": "nowhere", **given}
    flags = {name: value for name, value in flags.items() if value is not None}
    with pytest.raises(UserError, match=message):
        resolve(flags)

def test_a_folder_that_does_not_fit_is_refused_and_nothing_is_written(dense, from_folder, tmp_path):
    lost = str(tmp_path / "lost")
    config = from_folder(dense, linear="lost", steps=1, out_dir=lost)
    train.main(config)
    other = str(tmp_path / "other")
    prepare_c4.main(prepare_c4.Config(input=["builtin"], tokenizer="train:300", out_dir=other, workers=1))
    for wrong, message in [
        (from_folder(lost, linear="lost"), "has lost layers already; leave --linear out"),
        (from_folder("nowhere"), "no checkpoint in .*nowhere"),
        (from_folder(dense, data_dir=other), "is not the tokenizer that"),
        (from_folder(dense, freeze=["*.bias"]), "--freeze .*no parameter has such a name"),
        (from_folder(dense, freeze=["*"]), "--freeze leaves no parameter"),
    ]:
        with pytest.raises(UserError, match=message):
            train.main(wrong)
        left = os.listdir(wrong.out_dir) if os.path.exists(wrong.out_dir) else []
        assert left in ([], [".lock"])

# --- how such a run goes on ---

@pytest.mark.parametrize("switches", [{}, dict(linear="lost", rank=6), dict(freeze=["*norm*"])],
                         ids=["plain", "converted", "frozen"])
def test_it_resumes_bit_for_bit_without_the_folder_or_the_flag(dense, from_folder, switches, tmp_path):
    straight = from_folder(dense, **switches)
    train.main(straight)
    shutil.move(dense, str(tmp_path / "elsewhere"))
    resumed = from_folder(dense, **switches, out_dir=str(tmp_path / "resumed"))
    continue_from(straight, resumed, 4)
    assert files_of(resumed, 8) == files_of(straight, 8) and lines(resumed) == lines(straight)
    # what somebody types who has forgotten how it began
    bare = {name: value for name, value in RUN.items() if name not in ("steps", "seq_len")}
    bare = {**bare, "data_dir": straight.data_dir, "out_dir": str(tmp_path / "bare")}
    shutil.copytree(straight.out_dir, bare["out_dir"])
    shutil.rmtree(os.path.join(bare["out_dir"], "checkpoints", "step_00000008"))
    config = resolve(remembered(bare))
    train.main(config)
    assert files_of(config, 8) == files_of(straight, 8)

@pytest.mark.parametrize("makers", [MIXTURE, (sparse_of,)], ids=["all kinds", "sparse alone"])
def test_layers_that_another_command_made_are_trained_and_the_run_resumes_bit_for_bit(
        dense, from_folder, tmp_path, makers):
    model, tokenizer, _ = load_with_tokenizer(dense)
    folder = str(tmp_path / "compressed")
    write_model(folder, mixed(model, makers), tokenizer, {})
    straight = from_folder(folder, lr=5e-3)
    train.main(straight)
    found, _ = load_model(straight.out_dir)
    first, last = val_losses(straight)
    assert settings_of(found) == settings_of(model) and last < first
    resumed = from_folder(folder, lr=5e-3, out_dir=str(tmp_path / "resumed"))
    continue_from(straight, resumed, 4)
    assert files_of(resumed, 8) == files_of(straight, 8) and lines(resumed) == lines(straight)
    # the pivots are no weights
    pivots = {name: t for name, t in model.state_dict().items() if name.endswith("pivot")}
    assert len(pivots) == (4 if makers is MIXTURE else 0)
    assert all(torch.equal(found.state_dict()[name], t) for name, t in pivots.items())

def test_another_folder_for_the_same_run_or_none_at_all_is_refused(dense, from_folder, small, tmp_path):
    train.main(from_folder(dense, steps=4))
    copy = str(tmp_path / "copy")
    shutil.copytree(dense, copy)
    with pytest.raises(UserError, match="init_from was .*folder when this run began"):
        train.main(from_folder(copy))
    # a run of its own is not continued as one that began elsewhere
    train.main(small(linear="dense", steps=4, out_dir=str(tmp_path / "own")))
    with pytest.raises(UserError, match="when this run began"):
        train.main(from_folder(dense, out_dir=str(tmp_path / "own")))

def test_flags_are_remembered_only_for_a_run_that_began_in_a_folder(dense, from_folder, small, tmp_path):
    assert remembered({"out_dir": str(tmp_path / "none")}) == {"out_dir": str(tmp_path / "none")}
    train.main(small(steps=2, out_dir=str(tmp_path / "own")))
    assert remembered({"out_dir": str(tmp_path / "own")}) == {"out_dir": str(tmp_path / "own")}
    config = from_folder(dense, steps=1)
    train.main(config)
    found = remembered({"out_dir": config.out_dir})
    known = {"init_from": dense, "steps": 1, "seq_len": 32, "optimizer": "adamw", "seed": 0}
    assert found == {**known, "out_dir": config.out_dir}
    assert remembered({"out_dir": config.out_dir, "resume": "never"}).keys() == {"out_dir", "resume"}
    assert remembered({"out_dir": config.out_dir, "model": "60m"}).keys() == {"out_dir", "model"}
    path = step_folder(config, 1)
    assert remembered({"out_dir": "new", "resume": path, "steps": 7})["steps"] == 7

def test_two_processes_start_from_the_folder_that_one_does(dense, from_folder, tmp_path):
    one = from_folder(dense, linear="lost", rank=6, steps=2)
    train.main(one)
    two = dataclasses.replace(one, out_dir=str(tmp_path / "two"))
    ended(launch(two, processes=2))
    assert [x for _, x in losses(two)] == pytest.approx([x for _, x in losses(one)], rel=1e-5)

# --- frozen parameters ---

@pytest.mark.parametrize("optimizer, patterns", [
    ("adamw", ["model.embed_tokens.weight"]), ("adamw", ["model.layers.0.*", "*norm*"]),
    ("muon", ["model.layers.*"]), ("muon", ["lm_head.*", "model.embed*", "*norm*"]),
], ids=["embedding", "a block and norms", "all blocks", "all but blocks"])
def test_frozen_parameters_stay_bit_for_bit_without_gradient_or_state(small, optimizer, patterns):
    config = small(optimizer=optimizer, freeze=patterns, linear="dense", weight_decay=0.1)
    with started(config) as (config, state, texts, job):
        before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        updates(config, state, texts, job, 3)
        frozen = {name for name, p in state.model.named_parameters() if not p.requires_grad}
        assert frozen and len(frozen) < len(before)
        kept = {p for optimizer in state.optimizers for p in optimizer.state}
        for name, p in state.model.named_parameters():
            assert torch.equal(p, before[name]) == (name in frozen), name
            assert (p.grad is None) == (name in frozen) == (p not in kept), name

def test_a_frozen_tied_head_is_frozen_by_either_name(small):
    for pattern in ("lm_head.weight", "model.embed_tokens.weight"):
        with started(small(tie_embeddings=True, freeze=[pattern])) as (_, state, _, _):
            assert not state.model.lm_head.weight.requires_grad

def test_a_run_does_not_change_what_it_freezes(small):
    train.main(small(freeze=["*norm*"], steps=4))
    with pytest.raises(UserError, match="freeze was .*norm.* when this run began and is None now"):
        train.main(small())

def test_memory_is_counted_without_what_is_frozen(small, capsys):
    train.main(small(dry_run=True, linear="dense", freeze=["model.embed_tokens.*", "lm_head.*"]))
    with_frozen = capsys.readouterr().out
    train.main(small(dry_run=True, linear="dense"))
    without = capsys.readouterr().out
    saved = 2 * 257 * 32 * 4
    def parts(text):
        return [float(x) for x in re.findall(r"(?:weights|gradients|moments) ([\d.]+)", text)]
    weights, gradients, moments = (a - b for a, b in zip(parts(without), parts(with_frozen), strict=True))
    assert weights == 0
    assert gradients == pytest.approx(saved / 1e6, rel=0.03)
    assert moments == pytest.approx(2 * saved / 1e6, rel=0.03)
