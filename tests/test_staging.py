"""staging.py: zeros that only become more, counts that are exact from any start, inputs and errors of the
compressed stream against models run row by row, and layers that keep an update apart."""
import contextlib
import copy
import os
import types

import pytest
import torch
import torch.nn as nn
from matrices import covariance, noise
from small_models import all_logits, small
from test_covariance import LENGTH, Windows, collected, texts_of

from nanolost import splitting
from nanolost.covariance import linears, linears_of
from nanolost.losa import cka, importances, patterns_mixed, rates, stage_zeros
from nanolost.pruning import largest_of_rows
from nanolost.staging import (
    ALONE,
    METHODS,
    TOGETHER,
    Masking,
    choose_zeros,
    dense_bytes,
    dense_outputs,
    similarities,
    sizes_of,
    zeros_of,
)
from nanolost.zeros import Matrices, alone

FULL = contextlib.nullcontext()
LENGTHS = [9, 4, 7]
methods = pytest.mark.parametrize("method", METHODS)

def effective_of(linear):
    return linear.weight.float()

def put(linear, W):
    linear.weight.copy_(W)

@pytest.fixture
def stage(tmp_path, monkeypatch):
    """stage(model, method) → what is the same in all stages, after a look at the model as it is."""
    # as far as counts and zeros go, a few turns are like many
    monkeypatch.setattr(splitting, "TURNS", 8)
    def make(model, method):
        model.requires_grad_(False)
        texts = texts_of(Windows(len(LENGTHS), LENGTHS), 2)
        for name in ("dense", "scratch"):
            (tmp_path / name).mkdir(exist_ok=True)
        dense = dense_outputs(model, texts, str(tmp_path / "dense"), FULL)
        statistics = collected(model, texts, tmp_path / "seen") if method in TOGETHER else None
        folder = str(tmp_path / "scratch")
        return Masking(model, method, texts, dense, statistics, folder, torch.device("cpu"), FULL,
                       effective_of, put)
    return make

def dense_model():
    return small(n_kv_head=2)

def masks_of(model) -> dict:
    return {name: linear.weight != 0 for name, linear in linears(model).items()}

def assert_nested(before, after):
    for name, mask in after.items():
        assert not (mask & ~before[name]).any(), name

def states_of(model, data) -> list:
    """The inputs and outputs of every block, (tokens of text, C) a row, of the model run row by row."""
    blocks = model.model["layers"]
    seen = [[] for _ in range(len(blocks) + 1)]
    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: seen[0].append(args[0][0]))]
    for layer, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(
            lambda module, args, out, layer=layer: seen[layer + 1].append(out[0])))
    for row, length in enumerate(LENGTHS):
        # a row's last token has no target
        all_logits(model, data.ids[row:row + 1, :length - 1])
    for hook in hooks:
        hook.remove()
    return seen

# --- the streams ---

def test_dense_outputs_are_the_blocks_and_can_be_read_again(tmp_path):
    model = dense_model().requires_grad_(False)
    texts = texts_of(Windows(5), 2)
    spool = dense_outputs(model, texts, str(tmp_path), FULL)
    expected = []
    hooks = [block.register_forward_hook(lambda module, args, out: expected.append(out))
             for block in model.model["layers"]]
    for number, batch in enumerate(texts):
        expected.clear()
        all_logits(model, batch.ids)
        for layer, y in enumerate(expected):
            for _ in range(2):
                torch.testing.assert_close(spool.read(f"y{layer:03d}", number, "cpu"), y)
    for hook in hooks:
        hook.remove()
    assert dense_bytes(model, texts) == sum(file.stat().st_size for file in os.scandir(tmp_path))

@pytest.mark.parametrize("positions", [4, 32])
def test_gram_matrices_are_those_of_whole_sequences_of_text(positions, monkeypatch):
    monkeypatch.setattr("nanolost.staging.POSITIONS", positions)
    model = dense_model().requires_grad_(False)
    data = Windows(len(LENGTHS), LENGTHS)
    found = similarities(model, texts_of(data, 2), FULL)
    for layer, rows in enumerate(states_of(model, data)[:-1]):
        flat = torch.zeros(len(rows), LENGTH, 32, dtype=torch.float64)
        for row, x in enumerate(rows):
            flat[row, :len(x)] = x
        X = flat.flatten(1)
        torch.testing.assert_close(found[layer], X @ X.T, rtol=1e-5, atol=1e-5)
    assert cka(found).diagonal().tolist() == pytest.approx([1, 1])

# --- stages ---

@methods
def test_zeros_stay_over_five_stages_and_each_meets_its_target(method, stage):
    model = dense_model()
    task = stage(model, method)
    sizes = sizes_of(model)
    before = masks_of(model)
    for target in stage_zeros(0.7, 5):
        important = importances(cka(similarities(model, task.texts, FULL)))
        wanted = rates(important, target, zeros_of(model, effective_of), sizes)
        share, errors = choose_zeros(task, wanted)
        after = masks_of(model)
        assert_nested(before, after)
        kept = sum(int(mask.sum()) for mask in after.values())
        assert share == 1 - kept / sum(sizes)
        assert abs(share - target) < 1e-3
        # what a walk leaves open is less than a tenth of the box
        assert zeros_of(model, effective_of) == pytest.approx(wanted, abs=2e-3)
        assert len(errors) == 2 and all(0 < error < 2 for error in errors)
        before = after
    assert not any(os.scandir(task.folder))

@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "fisher"])
def test_counts_are_exact_where_a_threshold_does_not_decide(method, stage):
    model = dense_model()
    share, _ = choose_zeros(stage(model, method), [0.51, 0.49])
    sizes = sizes_of(model)
    assert share == 1 - int(0.5 * sum(sizes)) / sum(sizes)
    if method == "wanda":
        for mask in masks_of(model).values():
            counts = mask.sum(1)
            assert int(counts.max() - counts.min()) <= 1

@torch.no_grad()
def uneven(model, kept=0.45):
    """Zeros as a threshold for the whole model leaves them, with rows and columns that have nothing else."""
    weights = linears(model)
    for number, linear in enumerate(weights.values()):
        linear.weight *= 1 + number % 5
        linear.weight[3:7] = 0
        linear.weight[:, :9] *= 0.01
    sizes = torch.cat([linear.weight.abs().flatten() for linear in weights.values()])
    threshold = sizes.quantile(1 - kept)
    for linear in weights.values():
        linear.weight *= linear.weight.abs() > threshold
    return model

@methods
def test_the_target_is_met_from_uneven_zeros_too(method, stage):
    model = uneven(dense_model())
    task = stage(model, method)
    before = masks_of(model)
    assert any(int(mask.sum(1).max() - mask.sum(1).min()) > 20 for mask in before.values())
    floors = zeros_of(model, effective_of)
    wanted = rates([1, 2], 0.7, floors, sizes_of(model))
    share, _ = choose_zeros(task, wanted)
    assert abs(share - 0.7) < 1e-3
    assert_nested(before, masks_of(model))

@pytest.mark.parametrize("method", ["sparsegpt", "fisher"])
def test_a_block_that_has_its_zeros_already_is_left_alone(method, stage):
    model = uneven(dense_model())
    task = stage(model, method)
    floors = zeros_of(model, effective_of)
    before = copy.deepcopy(model)
    share, errors = choose_zeros(task, [floors[0], 0.7])
    for name, linear in linears(model).items():
        same = torch.equal(linear.weight, before.get_submodule(name).weight)
        # what has fewer than its part already stays too
        assert same or "layers.1" in name, name
    assert errors[0] == 0 < errors[1]
    # blocks are of one size
    assert share == pytest.approx((floors[0] + 0.7) / 2, abs=1e-3)

@methods
def test_patterns_of_each_block_only_lose_entries(method, stage):
    model = dense_model()
    task = stage(model, method)
    before, most = masks_of(model), None
    for target in (0.375, 0.6):
        most = patterns_mixed([1, 2], 4, target, most)
        share, _ = choose_zeros(task, [target] * 2, [(n, 4) for n in most])
        after = masks_of(model)
        assert_nested(before, after)
        before = after
        for name, mask in after.items():
            layer = int(name.split(".")[2])
            # 44 and 32 inputs: whole groups
            assert (mask.view(len(mask), -1, 4).sum(-1) == most[layer]).all()
        assert share == pytest.approx(1 - sum(most) / 8)

# --- what a block sees, and what it loses ---

def test_wanda_sees_what_the_blocks_before_give_now(stage):
    model = dense_model()
    data = Windows(len(LENGTHS), LENGTHS)
    dense = copy.deepcopy(model)
    choose_zeros(stage(model, "wanda"), [0.5, 0.5])
    # blocks up to this one as they were when it was looked at
    for layer in range(2):
        mixed = copy.deepcopy(model)
        for later in range(layer, 2):
            mixed.model["layers"][later] = copy.deepcopy(dense.model["layers"][later])
        for name, linear in linears_of(layer, mixed.model["layers"][layer]).items():
            rows = []
            hook = linear.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0][0]))
            states_of(mixed, data)
            hook.remove()
            score = linear.weight.abs() * torch.cat(rows).norm(dim=0)
            expected = linear.weight * largest_of_rows(score, 0.5)
            assert torch.equal(model.get_submodule(name).weight, expected), name

def test_errors_are_those_of_the_masked_model_by_channel(stage):
    model = dense_model()
    data = Windows(len(LENGTHS), LENGTHS)
    dense = states_of(copy.deepcopy(model).requires_grad_(False), data)
    _, errors = choose_zeros(stage(model, "wanda"), [0.3, 0.5])
    small_states = states_of(model, data)
    for layer, error in enumerate(errors):
        x, y = (torch.cat(states[layer + 1]).double() for states in (dense, small_states))
        expected = ((x - y) / x.norm(dim=0)).square().sum() / 32
        assert error == pytest.approx(expected.item(), rel=1e-4)
    assert len(errors) == 2 and errors[0] < errors[1]

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_sparsegpt_loses_less_than_wanda_where_zeros_are_there_already(share, seed, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    C = covariance(64, seed + 1)
    W = noise(24, 64, seed=seed).float()
    W *= noise(24, 64, seed=seed + 9).abs() > 0.5
    statistics = types.SimpleNamespace(inputs=lambda name: C)
    matrices = Matrices({name: W}, statistics, str(tmp_path), "cpu", nested=True)
    costs = {}
    for method in ALONE:
        found = alone(matrices, method, name, share, None, matrices.roots(method))
        assert int(found.count_nonzero()) == int(share * W.numel())
        E = (W - found).double()
        costs[method] = torch.einsum("oi,ij,oj->", E, C, E).item()
    assert costs["sparsegpt"] < 0.9 * costs["wanda"]

# --- layers with an update ---

class Updated(nn.Module):
    """A frozen weight and an update that carries its mask."""

    def __init__(self, linear, seed):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
        self.update = 0.1 * noise(*linear.weight.shape, seed=seed).float()

    def effective(self):
        return (self.weight + self.update) * (self.weight != 0)

    def rebase(self, W):
        self.weight.copy_((W - self.update) * (W != 0))

    def forward(self, x):
        return x @ self.effective().T

@pytest.mark.parametrize("method", ["wanda", "fisher"])
def test_zeros_are_those_of_the_merged_weights(method, stage):
    model = dense_model()
    merged = copy.deepcopy(model)
    task = stage(model, method)
    for number, (name, linear) in enumerate(linears(model).items()):
        layer = Updated(linear, number)
        model.set_submodule(name, layer)
        with torch.no_grad():
            merged.get_submodule(name).weight.copy_(layer.effective())
    task.effective_of, task.put = Updated.effective, Updated.rebase
    share, errors = choose_zeros(task, [0.5, 0.6])
    # the dense outputs stay those of the model before its updates
    task.model, task.effective_of, task.put = merged.requires_grad_(False), effective_of, put
    same_share, same_errors = choose_zeros(task, [0.5, 0.6])
    assert share == pytest.approx(same_share, abs=1e-3)
    # a rounding may turn a choice in the second block
    assert errors == pytest.approx(same_errors, rel=0.05)
    for name in linears_of(0, model.model["layers"][0]):
        layer, expected = model.get_submodule(name), merged.get_submodule(name).weight
        torch.testing.assert_close(layer.effective(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.effective() != 0, expected != 0)
        assert torch.equal(layer.weight != 0, expected != 0)
