"""train.py --allocation: layers with a rank of their own, what is refused, how such a run goes on."""
import copy
import json
import os
import shutil

import pytest
import torch
import torch.nn as nn
from conftest import continue_from, ended, files_of, launch, losses, started, step_folder, updates
from small_models import largest_difference, tokens

import compress
import eval as evaluation
import export
import sample
import train
from lost import LOSTLinear, decompose
from nanolost import checkpoint
from nanolost.checkpoint import load_model
from nanolost.covariance import linears
from nanolost.decode import generate
from nanolost.errors import UserError
from nanolost.low_rank_layers import rank_cost
from nanolost.methods import allotted as allotted_to
from nanolost.methods import build_model, keep_function, owners, settings_of
from nanolost.settings import resolve

UP = "model.layers.0.mlp.up_proj"
DENSE = "model.layers.0.mlp.gate_proj"

@pytest.fixture
def layers(small):
    """Entries as compress.py writes them: 13 ranks, all unlike, some without channels, one dense layer."""
    found = {}
    model = build_model(small(linear="dense", vocab_size=257), "meta")
    for i, (name, linear) in enumerate(linears(model).items()):
        entry = {"kind": "lost", "rank": i + 3, "channels": i % 3, "pinned": False, "nonzeros": 0}
        entry["values"] = rank_cost(linear.weight.shape, i + 3, i % 3, False)
        if name == DENSE:
            whole = linear.weight.numel()
            entry |= {"kind": "dense", "rank": 0, "channels": 0, "nonzeros": whole, "values": whole}
        found[name] = {**entry, "damage": 0.5}
    return found

@pytest.fixture
def allotted(small, layers, tmp_path):
    """allotted(…) → a Config with these layers, or with `content` in their file."""
    def make(content=None, gamma=0.7, **given):
        path = str(tmp_path / "allocation.json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump(content or {"budget": 0.5, "kept": 0.5, "layers": layers}, f)
        made = vars(small(**{"steps": 3, "save_every": 2, "eval_every": 3, **given}))
        typed = {name: value for name, value in made.items() if name not in ("rank", "sparsity", "warmup")}
        return resolve({**typed, "warmup": 1, "gamma": gamma, "allocation": path})
    return make

def values(layers) -> int:
    return sum(entry["values"] for entry in layers.values())

# --- a run ---

def test_each_layer_has_its_own_rank_and_channels_and_a_dense_one_stays(allotted, layers):
    config = allotted()
    train.main(config)
    assert losses(config)[-1][1] < losses(config)[0][1] - 0.1
    model, state = load_model(config.out_dir)
    for name, entry in layers.items():
        layer = model.get_submodule(name)
        if name == DENSE:
            assert type(layer) is nn.Linear
        else:
            assert (layer.rank, layer.k, layer.gamma) == (entry["rank"], entry["channels"], 0.7)
            assert hasattr(layer, "W_s") == (layer.k > 0)
    # embedding, head and five norms
    rest = 2 * 257 * 32 + 5 * 32
    assert sum(p.numel() for p in model.parameters()) == values(layers) + rest
    assert set(settings_of(model)) == set(layers) - {DENSE}
    assert (state["config"]["rank"], state["config"]["sparsity"]) == (None, None)

def test_it_resumes_bit_for_bit_without_the_file(allotted, tmp_path):
    straight = allotted()
    train.main(straight)
    os.remove(straight.allocation)
    resumed = copy.copy(straight)
    resumed.out_dir = str(tmp_path / "resumed")
    continue_from(straight, resumed, 2)
    assert files_of(resumed, 3) == files_of(straight, 3) and losses(resumed) == losses(straight)
    # a file that is there and says the same is as good
    again = allotted(out_dir=str(tmp_path / "again"))
    continue_from(straight, again, 2)
    assert files_of(again, 3) == files_of(straight, 3)
    branch = copy.copy(straight)
    branch.out_dir, branch.resume = str(tmp_path / "branch"), step_folder(straight, 2)
    os.remove(straight.allocation)
    train.main(branch)
    assert files_of(branch, 3) == files_of(straight, 3)

def test_other_layers_for_the_same_run_or_none_are_refused_in_one_line(allotted, layers, small, tmp_path):
    config = allotted()
    train.main(config)
    with pytest.raises(UserError, match=r"^allocation was \{.*\.\.\.\} when .* and is None now") as none:
        train.main(small())
    assert len(str(none.value)) < 400
    layers[UP]["rank"] = 4
    with pytest.raises(UserError, match=f"^allocation of {UP} was .*'rank': 8.* and is .*'rank': 4.* now"):
        train.main(allotted())
    other = small(steps=2, out_dir=str(tmp_path / "other"))
    train.main(other)
    with pytest.raises(UserError, match="^allocation was None when this run began and is {"):
        train.main(allotted(out_dir=other.out_dir))
    # a run that is to be gone answers for nothing
    os.remove(config.allocation)
    config.resume, config.overwrite = "never", True
    with pytest.raises(UserError, match="cannot read .*allocation.json: No such file"):
        train.main(config)

def test_layers_in_a_checkpoint_that_no_run_has_written_are_refused(allotted):
    config = allotted(steps=2)
    train.main(config)
    os.remove(config.allocation)
    path = os.path.join(step_folder(config, 2), checkpoint.STATE)
    with open(path, encoding="utf-8") as f:
        state = json.load(f)
    state["config"]["allocation"][UP]["rank"] = "x"
    with open(path, "w", encoding="utf-8") as f:
        json.dump(state, f)
    with pytest.raises(UserError, match=f"state.json.*{UP}: rank 'x' must be a whole number"):
        train.main(config)

def test_a_dry_run_counts_the_layers_of_the_file(allotted, layers, capsys):
    config = allotted(dry_run=True)
    train.main(config)
    found = capsys.readouterr().out
    total = values(layers) + 2 * 257 * 32 + 5 * 32
    sparse = sum(entry["channels"] * (32 if "gate" not in name and "up" not in name else 48)
                 for name, entry in layers.items())
    assert f"parameters  {total:,} = low-rank" in found and f"+ sparse {sparse:,} +" in found
    # the embedding multiplies nothing, and of vectors no matrix
    multiplications = values(layers) + 257 * 32
    flops = 6 * multiplications + 12 * 2 * 32 * 32
    assert f"{multiplications:,} multiplications" in found and f"{flops:,} FLOPs" in found
    assert not os.path.exists(config.out_dir)

def test_gamma_scales_a_layer_without_channels_too(allotted, layers):
    layers[UP]["channels"] = 0
    with started(allotted(activation="none")) as (_, state, _, _):
        layer = state.model.get_submodule(UP)
        x = torch.randn(5, 32)
        expected = 0.7 * x @ layer.A.T @ layer.B.T
        assert layer.k == 0 and torch.allclose(layer(x), expected, atol=1e-6)

def test_gamma_is_folded_where_the_layers_then_have_the_function_of_the_weights(allotted, layers):
    """With columns of the weight, which count twice beside the product, only without channels."""
    for channels, scale in [(2, 1), (0, 0.7)]:
        for entry in layers.values():
            entry["channels"] = channels
        with started(allotted(activation="none")) as (config, state, _, _):
            layer = state.model.get_submodule(UP)
            before = layer.B.detach().clone()
            keep_function(state.model, config)
            assert torch.allclose(layer.B * scale, before)

def test_a_number_of_channels_stays_that_number_as_a_share():
    model = nn.Sequential(nn.Linear(5461, 2, device="meta"))
    for k in [*range(1, 200), *range(200, 5461, 13), 5461]:
        found = allotted_to(model, {"0": {"kind": "lost", "rank": 1, "channels": k}})
        assert LOSTLinear.from_linear(model[0], 1, found["sparsity"]["0"]).k == k

def test_processes_that_fill_every_third_layer_make_the_model_of_one(allotted, tmp_path):
    with started(allotted()) as (config, state, _, _):
        whole = state.model.state_dict()
        parts = [build_model(config, "cpu", (rank, 3)).state_dict() for rank in range(3)]
        owner = owners(state.model, 3)
    assert set(owner.values()) == {0, 1, 2} and DENSE not in owner
    for name, tensor in whole.items():
        assert torch.equal(parts[owner.get(name.rpartition(".")[0], 0)][name], tensor), name

@pytest.fixture
def graphs():
    """What dynamo has made since the test began, by the backend `graphs.made`."""
    torch.compiler.reset()
    class Graphs(list):
        def made(self, graph, example):
            self.append(graph)
            return graph
    return Graphs()

@pytest.mark.parametrize("recompute", [False, True])
def test_updates_of_13_ranks_are_one_graph(allotted, recompute, graphs):
    with started(allotted(recompute=recompute)) as (config, state, texts, job):
        assert len({layer["rank"] for layer in settings_of(state.model).values()}) == 13
        state.model.compile(backend=graphs.made)
        with torch._dynamo.config.patch(error_on_recompile=True):
            updates(config, state, texts, job, 2)
    assert len(graphs) == 1

@torch.inference_mode()
def test_decode_steps_of_13_ranks_are_one_graph(allotted, graphs):
    with started(allotted()) as (_, state, _, _):
        model = state.model.eval()
        # as on a GPU, but for what makes code of the graph
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=graphs.made)
        def run(token, cache):
            return step(token, cache=cache.stay())
        with torch._dynamo.config.patch(error_on_recompile=True):
            generate(model, tokens(1, 5), 15, temperature=0, step=run)
    assert len(graphs) == 1

# --- what reads its checkpoints ---

def test_its_checkpoints_sample_evaluate_export_and_load_in_transformers(allotted, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = allotted()
    train.main(config)
    ours, _ = load_model(config.out_dir)
    capsys.readouterr()
    sample.main(sample.Config(ckpt=config.out_dir, prompt="The ", max_new_tokens=4, device="cpu"))
    assert capsys.readouterr().out.startswith("The ")
    found = evaluation.main(evaluation.Config(ckpt=config.out_dir, data_dir=config.data_dir, tokens=500,
                                              seq_len=32, device="cpu"))
    assert 0 < found["loss"] < 6
    folder = str(tmp_path / "handed on")
    export.main(export.Config(ckpt=config.out_dir, out_dir=folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert largest_difference(theirs(idx).logits, ours(idx, idx)[0]) < 0.05

def test_trained_weights_are_decomposed_by_what_compress_chose_for_them(small, data_dir, tmp_path):
    first = small(linear="dense", steps=20, save_every=20, eval_every=20, out_dir=str(tmp_path / "dense"))
    train.main(first)
    flags = dict(ckpt=first.out_dir, data_dir=data_dir, out_dir=str(tmp_path / "smaller"), budget=0.6,
                 seq_len=32, calibration_tokens=2048, eval_tokens=512, device="cpu", threads=1,
                 closed_loop=False, channels=(0.1,))
    report = compress.main(compress.Config(**flags))
    path = os.path.join(report["out_dir"], "allocation.json")
    with open(path, encoding="utf-8") as f:
        layers = json.load(f)["layers"]
    run = dict(data_dir=data_dir, out_dir=str(tmp_path / "out"), steps=2, save_every=1, lr=1e-30,
               batch_tokens=256, eval_tokens=500, seq_len=32, device="cpu", threads=1)
    config = resolve({**run, "init_from": first.out_dir, "linear": "lost", "allocation": path})
    train.main(config)
    now, _ = load_model(config.out_dir)
    dense, _ = load_model(first.out_dir)
    assert len({(entry["kind"], entry["rank"], entry["channels"]) for entry in layers.values()}) > 1
    for name, entry in layers.items():
        layer, weight = now.get_submodule(name), dense.get_submodule(name).weight.detach()
        assert isinstance(layer, LOSTLinear) == (entry["kind"] == "lost")
        if entry["kind"] == "lost":
            parts = decompose(weight, entry["rank"], entry["channels"], sparse_init="residual")
            weight = parts.B @ parts.A
            weight[:, parts.index] += parts.W_s
            layer = layer.merge()
        assert largest_difference(layer.weight, weight) < 1e-5
    # without the folder, the file or the flags
    straight = files_of(config, 2)
    shutil.rmtree(first.out_dir)
    shutil.rmtree(report["out_dir"])
    shutil.rmtree(step_folder(config, 2))
    bare = {name: value for name, value in run.items() if name not in ("steps", "seq_len")}
    train.main(resolve(train.remembered(bare)))
    assert files_of(config, 2) == straight

# --- what is refused ---

def entry_with(**changed):
    def change(layers):
        layers[UP] |= changed
    return change

def without(*fields):
    def change(layers):
        for name in fields:
            del layers[UP][name]
    return change

def put(name, value):
    def change(layers):
        layers[name] = value
    return change

def all_dense(layers):
    for name in layers:
        layers[name] = {"kind": "dense"}

@pytest.mark.parametrize("change, message", [
    (entry_with(pinned=True), f"{UP}: it is pinned.*compress with --pinned false$"),
    (entry_with(kind="sparse", nonzeros=7), f"{UP}: it is sparse, with nonzeros 7 .*with --form lost$"),
    (entry_with(kind="sparse", rank=4), f"{UP}: it is sparse, with nonzeros 0 .*with --form lost$"),
    (entry_with(nonzeros=7), f"{UP}: it is sparse, with nonzeros 7 .*--form lost$"),
    (entry_with(kind="dense", nonzeros=7), f"{UP}: it is sparse, with nonzeros 7 .*--form lost$"),
    (entry_with(kind="other"), f"{UP}: kind 'other' must be dense or lost$"),
    (entry_with(kind=["lost"]), f"{UP}: kind .*'lost'.* must be dense or lost$"),
    (without("kind"), f"{UP}: kind None must be dense or lost$"),
    (without("rank"), f"{UP}: rank None must be a whole number"),
    (without("channels"), f"{UP}: channels None must be a whole number"),
    (entry_with(rank=8.0), f"{UP}: rank 8.0 must be a whole number"),
    (entry_with(rank=True), f"{UP}: rank True must be a whole number"),
    (entry_with(rank=0), rf"{UP}: rank 0 of a 48×32 weight must lie in \[1, 32\]"),
    (entry_with(rank=33), rf"{UP}: rank 33 of a 48×32 weight must lie in \[1, 32\]"),
    (entry_with(rank=10**30), f"{UP}: rank "),
    (entry_with(channels=33), f"{UP}: k = 33 channels of 32 must lie"),
    (entry_with(channels=-1), f"{UP}: k = -1 channels of 32 must lie"),
    (entry_with(rank=32, channels=1), f"{UP}: rank 32 of a 48×32 weight leaves no residual"),
    (put(UP, 8), f"{UP}: 8 is no object with kind, rank and channels"),
    (put("lm_head", {"kind": "dense"}), "the model has no layer 'lm_head': use the file of a model of these"),
    (put("model.layers.2.mlp.up_proj", {"kind": "dense"}), "the model has no layer 'model.layers.2.mlp.up"),
    (put("x\n" * 1000, {}), r"the model has no layer 'x\\n"),
    (lambda layers: layers.pop(UP), f"it lacks the layer {UP}: use the file of a model of these sizes"),
    (lambda layers: layers.clear(), "it lacks the layer model.layers.0.self_attn.q_proj: use"),
    (all_dense, "keeps every layer dense: leave --allocation out, with --linear dense"),
])
def test_a_layer_that_no_run_begins_with_is_refused_by_its_name(allotted, layers, change, message):
    change(layers)
    with pytest.raises(UserError, match=message) as error:
        config = allotted(content={"layers": layers})
        train.main(config)
    assert str(error.value).startswith(f"{config.allocation}") and "\n" not in str(error.value)
    assert not os.path.exists(config.out_dir)

@pytest.mark.parametrize("content, message", [
    (b"{", "it is not JSON"), (b"[]", "it is not a JSON object"), (b"\xff", "is not UTF-8"),
    (b"", "not JSON"), (b"{}", 'it has no object "layers"'), (b'{"layers": []}', 'it has no object "layers"'),
    (b'{"layers": 1e400}', 'it has no object "layers"'), (b"[" * 100_000, "nested too deep"),
    (b" " * (17 << 20), "more than 16,777,216 bytes"), (None, "No such file"), ("folder", "it is a folder"),
], ids=["part", "list", "bytes", "empty", "no layers", "a list of layers", "a number of layers", "deep",
        "large", "gone", "folder"])
def test_a_file_that_is_none_is_refused(allotted, content, message):
    config = allotted()
    os.remove(config.allocation)
    if content == "folder":
        os.mkdir(config.allocation)
    elif content is not None:
        with open(config.allocation, "wb") as f:
            f.write(content)
    with pytest.raises(UserError, match=f"{config.allocation}.*{message}"):
        train.main(config)
    assert not os.path.exists(config.out_dir)

@pytest.mark.parametrize("typed, message", [
    (dict(rank=8), "--rank stands in the file of --allocation: drop one of them"),
    (dict(sparsity=0.1), "--sparsity stands in the file of --allocation: drop one of them"),
    (dict(linear="dense"), "--allocation means nothing with --linear dense"),
    (dict(linear="lowrank"), "--allocation means nothing with --linear lowrank"),
    (dict(linear="cola"), "--allocation means nothing with --linear cola"),
    (dict(init_from="x", steps=1), "--allocation means nothing without --linear"),
    (dict(init_from="x", steps=1, linear="lost", rank=4), "--rank stands in the file of --allocation"),
    (dict(init_from="x", steps=1, linear="dense"), "--allocation means nothing with --linear dense"),
])
def test_what_does_not_go_with_a_file_is_refused_before_it_is_read(typed, message):
    with pytest.raises(UserError, match=message):
        resolve({"allocation": "nowhere", **typed})

def test_a_gamma_that_leaves_a_path_out_is_refused_where_a_layer_has_channels(allotted, layers):
    for gamma in (0.0, 1.0):
        with pytest.raises(UserError, match=f"--gamma {gamma}: one of the two paths would never learn"):
            train.main(allotted(gamma=gamma))
    for entry in layers.values():
        entry["channels"] = 0
    train.main(allotted(gamma=1.0, steps=2))

def test_the_command_ends_with_one_line_and_code_2(allotted, layers):
    layers[UP]["pinned"] = True
    config = allotted()
    lines = ended(launch(config), 2).splitlines()
    assert lines == [f"error: {config.allocation}: {UP}: it is pinned, and a run begins with whole factors: "
                     "compress with --pinned false"]
    assert not os.path.exists(config.out_dir)
