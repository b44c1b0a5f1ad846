"""methods.py: kinds of layers, those that come with it and those that somebody adds."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import continue_from, files_of, losses
from small_models import small_mixed, tokens

import sample
import train
from lost import LOSTLinear, SparseLowRankLinear
from nanolost import methods
from nanolost.checkpoint import load_model
from nanolost.errors import UserError
from nanolost.methods import build_model, count_by_path, owners, rebuild, register, settings_of
from nanolost.settings import resolve

@pytest.mark.parametrize("switches", [
    dict(linear="lost"), dict(linear="dense"), dict(linear="lowrank"), dict(linear="cola"),
    dict(optimizer="muon"), dict(rank={"q_proj": 4, "default": 8}, sparsity={"down_proj": 0.1, "default": 0}),
], ids=str)
def test_every_kind_of_layer_learns(small, switches):
    config = small(steps=30, lr=1e-2, eval_every=30, save_every=30, **switches)
    train.main(config)
    first, last = losses(config)[0][1], losses(config)[-1][1]
    assert abs(first - math.log(257)) < 0.1 and last < first - 1.5

@pytest.mark.parametrize("switches", [{}, dict(linear="cola"), dict(learn_gamma=True, activation="none"),
                                      dict(rank={"q_proj": 4, "default": 8})], ids=str)
def test_a_model_is_rebuilt_from_its_settings_without_a_decomposition(small, switches, monkeypatch):
    config = small(vocab_size=257, **switches)
    model = build_model(config, "cpu")
    settings = settings_of(model)
    assert len(settings) == 14
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    with torch.device("meta"):
        empty = build_model(small(linear="dense", vocab_size=257), "meta")
        rebuild(empty, settings)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert settings_of(empty) == settings
    idx = torch.arange(64).view(2, 32)
    assert torch.equal(empty(idx)[0], model(idx)[0])

@pytest.mark.parametrize("settings, message", [
    ({"model.layers.0.mlp.up_proj": {"kind": "other"}}, "unknown kind 'other'; this program has lost"),
    ({"model.layers.9.mlp.up_proj": {}}, "layer model.layers.9.mlp.up_proj"),
    ({"model.layers.0.mlp.up_proj": {"rank": 4}}, "layer model.layers.0.mlp.up_proj"),
    ({"model.layers.0.mlp.up_proj": {"kind": ["lost"]}}, "layer model.layers.0.mlp.up_proj"),
    ({"model.layers.0.mlp.up_proj": 7}, "layer model.layers.0.mlp.up_proj"),
])
def test_settings_that_describe_no_layer_are_refused_with_its_name(small, settings, message):
    model = build_model(small(linear="dense", vocab_size=257), "meta")
    with pytest.raises(UserError, match=message):
        rebuild(model, settings)

@pytest.mark.parametrize("name, value", [
    ("device", "cpu"), ("device", None), ("dtype", "float64"), ("dtype", None), ("empty", True), ("self", 1),
    ("args", []), ("kwargs", {}), ("", 1), ("A", [[1.0]])])
def test_a_file_decides_neither_where_a_layer_is_made_nor_what_its_settings_do_not_say(small, name, value):
    layer = "model.layers.0.mlp.up_proj"
    settings = settings_of(build_model(small(vocab_size=257), "meta"))
    made = build_model(small(linear="dense", vocab_size=257), "meta")
    with pytest.raises(UserError, match=f"^layer {layer}: unknown setting '{name}'; it has in_features, "):
        rebuild(made, {layer: {**settings[layer], name: value}})
    assert not isinstance(made.get_submodule(layer), LOSTLinear)

def test_a_subclass_that_passes_all_on_is_rebuilt_where_the_program_says(small, monkeypatch):
    class Passing(LOSTLinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
    monkeypatch.setitem(methods.KINDS, "passing", methods.Kind(Passing))
    layer = "model.layers.0.mlp.up_proj"
    settings = {**settings_of(build_model(small(vocab_size=257), "meta"))[layer], "kind": "passing"}
    made = build_model(small(linear="dense", vocab_size=257), "meta")
    for name in ("device", "dtype"):
        with pytest.raises(UserError, match=f"unknown setting '{name}'"):
            rebuild(made, {layer: {**settings, name: None}})
    with pytest.raises(UserError, match="nonsense"):
        rebuild(made, {layer: {**settings, "nonsense": 1}})
    rebuild(made, {layer: settings})
    assert type(made.get_submodule(layer)) is Passing and settings_of(made) == {layer: settings}

def test_parameters_are_counted_by_their_path(small):
    model = build_model(small(vocab_size=257), "cpu")
    layers = [module for module in model.modules() if isinstance(module, LOSTLinear)]
    low_rank = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    sparse = sum(layer.W_s.numel() for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    assert count_by_path(model) == (low_rank, sparse, total - low_rank - sparse) and sparse > 0
    dense = build_model(small(linear="dense", vocab_size=257), "meta")
    assert count_by_path(dense) == (0, 0, sum(p.numel() for p in dense.parameters()))

def test_parameters_of_all_kinds_are_counted_by_their_path():
    layers = small_mixed().model["layers"]
    low_rank = sparse = 0
    for name, p in layers.named_parameters():
        if name.endswith((".A", ".B")):
            low_rank += p.numel()
        elif name.endswith(".W_s") or isinstance(layers.get_submodule(name[:-7]), SparseLowRankLinear):
            sparse += p.numel()
    assert count_by_path(layers)[:2] == (low_rank, sparse) and min(low_rank, sparse) > 3000

def test_a_kind_that_no_fresh_model_has_is_no_method():
    assert "sparse" in methods.KINDS and "sparse" not in methods.METHODS
    with pytest.raises(UserError, match="--linear: invalid choice: 'sparse'"):
        train.parse(train.Config, ["--linear=sparse"])

def test_training_of_layers_that_are_all_unlike_is_one_graph():
    torch.compiler.reset()
    model, graphs, idx = small_mixed().train(), [], tokens(2, 12)
    def count(graph, example):
        graphs.append(graph)
        return graph
    compiled = torch.compile(model, backend=count, fullgraph=True)
    assert len({layer.rank for layer in methods.special_layers(model).values()}) == 11
    loss = compiled(idx, idx)[1]
    loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(idx, idx)[1], loss)
    assert len(graphs) == 1 and all(p.grad.any() for p in model.parameters())

def test_processes_that_fill_every_third_layer_make_the_model_of_one(small):
    config = small(vocab_size=257)
    whole = build_model(config, "cpu").state_dict()
    parts = [build_model(config, "cpu", (rank, 3)).state_dict() for rank in range(3)]
    owner = owners(build_model(config, "meta"), 3)
    assert set(owner.values()) == {0, 1, 2}
    for name, tensor in whole.items():
        assert torch.equal(parts[owner.get(name.rpartition(".")[0], 0)][name], tensor), name

# --- a new one: the layer, how a model gets it, and one line ---

class BlockDiagonalLinear(nn.Module):
    """y = x W^T with only the diagonal blocks of W, (blocks, out / blocks, in / blocks)."""

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.weight = nn.Parameter(torch.empty(blocks, out_features // blocks, in_features // blocks))

    def settings(self) -> dict:
        return {"in_features": self.in_features, "out_features": self.out_features, "blocks": self.blocks}

    def forward(self, x):
        x = x.unflatten(-1, (self.blocks, -1))
        return torch.einsum("...bi,boi->...bo", x, self.weight).flatten(-2)

def convert_to_blocks(model, config, part):
    for name, linear in list(model.model["layers"].named_modules()):
        if isinstance(linear, nn.Linear):
            layer = BlockDiagonalLinear(linear.in_features, linear.out_features, 4)
            layer.to(linear.weight.device)
            nn.init.normal_(layer.weight, std=config.init_std)
            model.model["layers"].set_submodule(name, layer)

class SparsePlusLowRank(nn.Module):
    """y = x (BA + S)^T as SLTrain (arXiv 2406.02214): S has values at a fixed random support, and B = 0 at
    the start."""

    def __init__(self, in_features: int, out_features: int, rank: int, entries: int):
        super().__init__()
        self.shape, self.rank = (out_features, in_features), rank
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.values = nn.Parameter(torch.empty(entries))
        self.register_buffer("support", torch.empty(entries, dtype=torch.int64))

    def settings(self) -> dict:
        out_features, in_features = self.shape
        return {"in_features": in_features, "out_features": out_features, "rank": self.rank,
                "entries": len(self.values)}

    def draw(self):
        nn.init.normal_(self.A, std=0.02)
        nn.init.zeros_(self.B)
        nn.init.normal_(self.values, std=0.02)
        size = math.prod(self.shape)
        self.support.copy_(torch.randperm(size)[:len(self.values)].sort().values)

    def forward(self, x):
        S = torch.zeros(math.prod(self.shape), dtype=x.dtype, device=x.device)
        S = S.index_add(0, self.support, self.values.to(x.dtype)).view(self.shape)
        return F.linear(F.linear(x, self.A), self.B) + F.linear(x, S)

def convert_to_sparse_plus_low_rank(model, config, part):
    for name, linear in list(model.model["layers"].named_modules()):
        if isinstance(linear, nn.Linear):
            with torch.device(linear.weight.device):
                layer = SparsePlusLowRank(linear.in_features, linear.out_features, config.rank, 100)
                if linear.weight.device.type != "meta":
                    layer.draw()
            model.model["layers"].set_submodule(name, layer)

ADDED = {
    "blocks": lambda: register("blocks", BlockDiagonalLinear, convert_to_blocks),
    "sltrain": lambda: register("sltrain", SparsePlusLowRank, convert_to_sparse_plus_low_rank, uses=("rank",),
                                low_rank=("A", "B"), sparse=("values",)),
}

@pytest.fixture
def registry(monkeypatch):
    for known in (methods.KINDS, methods.METHODS):
        for name in ADDED:
            # gone again after the test
            monkeypatch.setitem(known, name, None)
            monkeypatch.delitem(known, name)

@pytest.mark.parametrize("name", ADDED)
def test_a_kind_of_layer_is_added_by_one_line_and_trains_saves_resumes_loads_and_samples(
        small, tmp_path, registry, capsys, name):
    ADDED[name]()
    typed = train.parse(train.Config, [f"--linear={name}"])
    switches = {"rank": 8} if name == "sltrain" else {}
    made = {key: value for key, value in vars(small(steps=24, save_every=12, eval_every=24)).items()
            if key not in methods.METHODS["lost"].uses}
    straight = train.resolve({**made, **switches, **typed})
    train.main(straight)
    assert losses(straight)[-1][1] < losses(straight)[0][1] - 0.3
    # the first update of a model with B = 0 has zero gradients, which are gradients
    half = train.resolve({**made, **switches, **typed, "out_dir": str(tmp_path / "half")})
    continue_from(straight, half, 12)
    assert losses(half) == losses(straight) and files_of(half, 24) == files_of(straight, 24)

    model, _ = load_model(straight.out_dir)
    assert len(settings_of(model)) == 14 and {s["kind"] for s in settings_of(model).values()} == {name}
    assert (count_by_path(model)[0] > 0) == (name == "sltrain")
    capsys.readouterr()
    sample.main(sample.Config(ckpt=straight.out_dir, prompt="The ", max_new_tokens=8, device="cpu"))
    assert capsys.readouterr().out.startswith("The ")

def test_a_checkpoint_of_a_kind_that_is_not_there_names_it(small, registry):
    ADDED["blocks"]()
    made = {key: value for key, value in vars(small(steps=4)).items()
            if key not in methods.METHODS["lost"].uses}
    config = train.resolve({**made, "linear": "blocks"})
    train.main(config)
    del methods.KINDS["blocks"], methods.METHODS["blocks"]
    with pytest.raises(UserError, match="unknown kind 'blocks'"):
        load_model(config.out_dir)

def test_a_subclass_is_not_taken_for_the_kind_of_its_parent(small):
    class Mine(LOSTLinear):
        def forward(self, x):
            return super().forward(x) + 1
    assert methods.kind_of(Mine(8, 8, 2, 0)) is None
    assert methods.kind_of(LOSTLinear(8, 8, 2, 0)) == "lost"

# --- first weights ---

@pytest.mark.parametrize("switches", [{}, dict(init="random", select="random")], ids=["svd", "random"])
def test_layers_that_two_processes_draw_apart_are_those_of_one(switches):
    config = resolve(dict(model="tiny", n_layer=2, vocab_size=257, **switches))
    whole = build_model(config, "cpu").state_dict()
    parts = [build_model(config, "cpu", (rank, 2)) for rank in range(2)]
    owner = owners(parts[0], 2)
    states = [part.state_dict() for part in parts]
    for name, tensor in whole.items():
        mine = states[owner.get(name.rpartition(".")[0], 0)]
        assert torch.equal(tensor, mine[name]), name
    assert set(owner.values()) == {0, 1}
