"""Covariances against the whole model at once, a window at a time, with autograd and the labels drawn."""
import contextlib
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import all_logits, small, tokens
from test_prepare import prepare, put, some_texts

from nanolost import covariance
from nanolost.covariance import GROUP_OF, GROUPS, batches, collect, count_tokens, is_text, linears
from nanolost.data import TokenDataset

KINDS = {"plain": {}, "grouped": {"n_kv_head": 2}, "tied": {"tie_embeddings": True},
         "biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
         "qk-norm": {"qk_norm": True, "n_kv_head": 1}}
FULL = contextlib.nullcontext()
LENGTH = 9

class Windows:
    """What a TokenDataset gives, of random tokens; lengths: of text in each row, padding behind it."""

    def __init__(self, count: int, lengths=None, prompt: int = 0):
        self.ids = tokens(count, LENGTH + 1, seed=5)
        self.targets = self.ids[:, 1:].clone()
        # the prompt's own words are no targets
        self.targets[:, :prompt] = -1
        for row, length in enumerate(lengths or []):
            # nothing follows a row's last token
            self.targets[row, max(0, length - 1):] = -1

    def batch(self, samples, device):
        return self.ids[samples, :-1].to(device), self.targets[samples].to(device)

def texts_of(data, micro=3, gradients=None):
    count = len(data.ids)
    gradients = count if gradients is None else gradients
    return batches(data, np.arange(count), micro, gradients, "cpu")

@pytest.fixture
def labels(monkeypatch):
    """The labels that were drawn, of one position after the other."""
    found = []
    draw = covariance.drawn_labels
    def watched(p, generator):
        found.append(draw(p, generator))
        return found[-1]
    monkeypatch.setattr(covariance, "drawn_labels", watched)
    return found

def collected(model, texts, folder, seed=3, context=FULL):
    folder.mkdir(exist_ok=True)
    return collect(model, texts, str(folder), seed, context)

def literally(model, data, drawn, gradients: int):
    """C, E|x| and G of every layer by its name."""
    inputs = {name: [] for name in linears(model)}
    slopes = {name: [] for name in inputs}
    outputs = {}
    hooks = []
    for name, linear in linears(model).items():
        def look(module, args, out, name=name):
            inputs[name].append(args[0].detach())
            outputs[name] = out
        hooks.append(linear.register_forward_hook(look))
    model.requires_grad_(True)
    texts = []
    for row in range(len(data.ids)):
        ids, targets = data.batch([row], "cpu")
        logits = all_logits(model, ids)[0]
        # up to the last target
        length = int((targets[0] >= 0).nonzero()[-1]) + 1 if (targets >= 0).any() else 0
        texts.append(length)
        if row < gradients:
            words = drawn[row * LENGTH:(row + 1) * LENGTH]
            wanted = targets[0] >= 0
            loss = F.cross_entropy(logits[wanted], words[wanted], reduction="sum")
            grads = torch.autograd.grad(loss, list(outputs.values()))
            for name, grad in zip(outputs, grads, strict=True):
                slopes[name].append(grad[0, :length].double())
    for hook in hooks:
        hook.remove()
    found = {}
    for name, seen in inputs.items():
        x = torch.cat([part[0, :length].double() for part, length in zip(seen, texts, strict=True)])
        g = torch.cat(slopes[name])
        found[name] = x.T @ x / len(x), x.abs().mean(0), g.T @ g / len(g)
    return found

def assert_equal(statistics, expected, tolerance=1e-5):
    for name, parts in expected.items():
        found = statistics.inputs(name), statistics.sizes(name), statistics.gradients(name)
        for value, wanted in zip(found, parts, strict=True):
            assert value.dtype == torch.float32 and value.shape == wanted.shape
            assert (value - wanted).abs().max() <= tolerance * wanted.abs().max(), name

# --- equal to the whole model ---

@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_layer_s_covariances_are_those_of_the_whole_model(kind, labels, tmp_path):
    model = small(**kind)
    data = Windows(5)
    statistics = collected(model, texts_of(data), tmp_path)
    drawn = torch.cat(labels)[:, 0]
    assert len(drawn) == 5 * LENGTH and drawn.unique().numel() > 10
    assert_equal(statistics, literally(model, data, drawn, 5))
    assert statistics.tokens == (5 * LENGTH, 5 * LENGTH)

def test_gradients_of_the_first_windows_only(labels, tmp_path):
    model = small(n_kv_head=2)
    data = Windows(6)
    texts = texts_of(data, micro=4, gradients=3)
    assert [(len(batch.ids), batch.learn) for batch in texts] == [(3, True), (3, False)]
    statistics = collected(model, texts, tmp_path)
    drawn = torch.cat(labels)[:, 0]
    assert len(drawn) == 3 * LENGTH
    assert_equal(statistics, literally(model, data, drawn, 3))
    assert statistics.tokens == (6 * LENGTH, 3 * LENGTH)

def test_padding_counts_nowhere_and_a_prompt_is_no_target(labels, tmp_path):
    model = small()
    lengths = [9, 4, 1, 6]
    data = Windows(4, lengths, prompt=2)
    statistics = collected(model, texts_of(data, micro=2, gradients=3), tmp_path / "a")
    assert_equal(statistics, literally(model, data, torch.cat(labels)[:, 0], 3))
    # a row of one token has no target
    assert statistics.tokens == (8 + 3 + 5, 8 + 3)
    other = Windows(4, lengths, prompt=2)
    for row, length in enumerate(lengths):
        other.ids[row, length:] = 7
    again = collected(model, texts_of(other, micro=2, gradients=3), tmp_path / "b")
    for name in linears(model):
        assert torch.equal(statistics.inputs(name), again.inputs(name))
        assert torch.equal(statistics.gradients(name), again.gradients(name))

@pytest.mark.parametrize("micro", [1, 2, 7])
def test_the_micro_batch_changes_nothing(micro, tmp_path):
    model = small(n_kv_head=2)
    data = Windows(7, [9, 5, 9, 2, 9, 9, 7])
    one = collected(model, texts_of(data, 3, 4), tmp_path / "one")
    other = collected(model, texts_of(data, micro, 4), tmp_path / "other")
    assert one.tokens == other.tokens
    expected = {name: (one.inputs(name), one.sizes(name), one.gradients(name)) for name in linears(model)}
    assert_equal(other, expected, 1e-5)

def test_rows_of_logits_are_taken_in_any_portion(tmp_path, monkeypatch):
    model = small()
    data = Windows(5)
    one = collected(model, texts_of(data), tmp_path / "one")
    monkeypatch.setattr(covariance, "ROWS", 4)
    other = collected(model, texts_of(data), tmp_path / "other")
    for name in linears(model):
        torch.testing.assert_close(one.gradients(name), other.gradients(name), rtol=1e-4, atol=1e-6)

def test_the_seed_draws_the_labels(tmp_path):
    model = small()
    one, again, other = (collected(model, texts_of(Windows(3)), tmp_path / str(i), seed)
                         for i, seed in enumerate([1, 1, 2]))
    for name in linears(model):
        assert torch.equal(one.gradients(name), again.gradients(name))
        assert torch.equal(one.inputs(name), other.inputs(name))
        assert not torch.allclose(one.gradients(name), other.gradients(name), rtol=0.01)

def test_sums_are_float32_under_autocast(tmp_path, monkeypatch):
    seen = {}
    class Watched(covariance.Sums):
        def see_input(self, group, x):
            seen.setdefault(f"C.{group}", []).append(x.flatten(0, 1))
            super().see_input(group, x)

        def see_gradient(self, name, g):
            seen.setdefault(f"G.{name}", []).append(g.flatten(0, 1))
            super().see_gradient(name, g)
    monkeypatch.setattr(covariance, "Sums", Watched)
    model = small(n_layer=1)
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    statistics = collected(model, texts_of(Windows(6)), tmp_path, context=bfloat16)
    assert seen["C.down"][0].dtype == torch.bfloat16
    for name in linears(model):
        inner = covariance.place_of(name)[1]
        x = torch.cat(seen[f"C.{GROUP_OF[inner]}"]).double()
        g = torch.cat(seen[f"G.{inner}"]).double()
        C, G = x.T @ x / len(x), g.T @ g / len(g)
        assert (statistics.inputs(name) - C).abs().max() < 1e-6 * C.abs().max()
        assert (statistics.gradients(name) - G).abs().max() < 1e-6 * G.abs().max()

# --- labels that the model draws ---

def head_gradients(model, x, seed=0):
    wanted = torch.ones(x.shape[0] * x.shape[1], dtype=torch.bool)
    return covariance.head_gradient(model, x, wanted, torch.Generator().manual_seed(seed))

def test_the_gradient_of_drawn_labels_is_zero_in_the_mean_and_the_fisher_matrix_in_the_square():
    model = small().requires_grad_(False)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    draws = 20_000
    g = head_gradients(model, x.expand(1, draws, 32))[0].double()                          # (draws, 32)
    # 5 standard errors: of 32 numbers one lies outside in 55 000 runs
    assert (g.mean(0).abs() < 5 * g.std(0) / draws ** 0.5).all()
    logits = torch.func.jacrev(lambda x: model.lm_head(model.model["norm"](x)))(x[0, 0]).double()
    p = model.lm_head(model.model["norm"](x[0, 0])).double().softmax(-1)
    fisher = logits.T @ (torch.diag(p) - torch.outer(p, p)) @ logits
    assert (g.T @ g / draws - fisher).norm() < 0.05 * fisher.norm()

def test_positions_that_are_not_wanted_have_no_loss_of_their_own():
    model = small().requires_grad_(False)
    x = torch.randn(2, 3, 32)
    wanted = torch.tensor([True, False, True, False, False, True])
    g = covariance.head_gradient(model, x, wanted, torch.Generator().manual_seed(0))
    assert torch.equal(g.flatten(0, 1).abs().sum(1) > 0, wanted)

def test_words_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    words = covariance.drawn_labels(p.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert words.shape == (40_000, 1)
    often = words.flatten().bincount(minlength=5) / 40_000
    # 5 standard errors of a share of a half
    assert (often - p).abs().max() < 5 * 0.5 / 200
    assert often[1] == often[4] == 0

# --- which positions hold text ---

def test_text_goes_up_to_the_last_target():
    targets = torch.tensor([[5, -1, 3, -1], [-1, -1, -1, -1], [-1, -1, 0, 0], [1, -1, -1, -1]])
    expected = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(is_text(targets), expected)

def test_of_prepared_rows_every_position_that_predicts_something_counts_and_no_other(tmp_path):
    given = put(tmp_path / "a.jsonl", some_texts(40))
    manifest = prepare(tmp_path / "data", rows=32, input=[given])
    data = TokenDataset(str(tmp_path / "data"), "train", 32)
    texts = batches(data, np.arange(len(data)), 4, 10**9, "cpu")
    targets = sum(shard["targets"]["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    assert count_tokens(texts) == (targets, targets)
    assert 0 < targets < 32 * len(data)

# --- what is left, and what it takes ---

def test_the_model_is_left_as_it_was_frozen_and_without_hooks(tmp_path):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collected(model, texts_of(Windows(4), gradients=2), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert_without_hooks(model)

def assert_without_hooks(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks

def test_hooks_go_when_a_pass_fails(tmp_path, monkeypatch):
    model = small()
    def fail(*given):
        raise MemoryError
    monkeypatch.setattr(covariance.Sums, "see_gradient", fail)
    with pytest.raises(MemoryError):
        collected(model, texts_of(Windows(2)), tmp_path)
    assert_without_hooks(model)

def test_only_the_covariances_stay_in_the_folder(tmp_path):
    collected(small(), texts_of(Windows(4), gradients=2), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["block_000.safetensors", "block_001.safetensors"]

def test_no_more_is_written_than_was_announced(tmp_path, monkeypatch):
    model = small(n_layer=3)
    most = []
    def watched(*given):
        most.append(sum(os.path.getsize(os.path.join(tmp_path, name)) for name in os.listdir(tmp_path)))
        return save(*given)
    save = covariance.save_file
    monkeypatch.setattr(covariance, "save_file", watched)
    whole = covariance.forward_pass
    def after(*given):
        whole(*given)
        watched({}, str(tmp_path / "empty"))
        os.remove(tmp_path / "empty")
    monkeypatch.setattr(covariance, "forward_pass", after)
    collected(model, texts_of(Windows(20), 1), tmp_path)
    assert len(most) == 4 and max(most) <= covariance.spool_bytes(model, 20 * LENGTH)

def test_never_more_than_one_block_s_covariances_are_in_memory(tmp_path, monkeypatch):
    model = small(n_layer=3)
    alive = weakref.WeakSet()
    most = []
    class Watched(covariance.Sums):
        def __init__(self):
            super().__init__()
            alive.add(self)

        def add(self, name, value):
            most.append(len(alive))
            super().add(name, value)
    monkeypatch.setattr(covariance, "Sums", Watched)
    numbers = []
    def save(tensors, path):
        numbers.append(4 * sum(tensor.numel() for tensor in tensors.values()))
        # divided where they lie, without a second copy
        sums = next(iter(alive)).sums
        assert all(tensor.data_ptr() == sums[name].data_ptr() for name, tensor in tensors.items())
    monkeypatch.setattr(covariance, "save_file", save)
    collected(model, texts_of(Windows(3), 1), tmp_path)
    assert set(most) == {1}
    assert numbers == [covariance.covariance_bytes(model)] * 3

def test_layers_that_share_an_input_are_in_one_group():
    model = small(n_layer=1)
    seen = {}
    hooks = [linear.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
             for name, linear in linears(model).items()]
    model(tokens(1, 4))
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(linears(model))
    # in the order in which they are computed
    assert list(GROUPS) == list(dict.fromkeys(GROUP_OF[covariance.place_of(name)[1]] for name in seen))
    for names in GROUPS.values():
        assert len({id(seen[f"model.layers.0.{name}"]) for name in names}) == 1
