"""closed_loop.py: the corrected weights against their formula with the inputs of the whole dense and of the
whole compressed model, and which layers see which changes."""
import contextlib
import copy
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from matrices import noise
from small_models import all_logits, small
from test_covariance import LENGTH, Windows, assert_without_hooks, collected, texts_of

from nanolost import closed_loop
from nanolost.closed_loop import corrected, input_of
from nanolost.covariance import GROUP_OF, GROUPS, linears, place_of, rope_of

FULL = contextlib.nullcontext()
LENGTHS = [9, 4, 7, 6, 2]
NAMES = list(linears(small()))

def prior(name: str) -> torch.Tensor:
    """A covariance that no text gave, one for the layers that share their inputs."""
    layer, inner = place_of(name)
    width = 44 if GROUP_OF[inner] == "down" else 32
    x = noise(80, width, seed=layer * 4 + list(GROUPS).index(GROUP_OF[inner]))
    return (x.T @ x / 80).float()

PRIOR = types.SimpleNamespace(inputs=prior)

def run(model, replace, data=None, micro=2, statistics=PRIOR, context=FULL) -> dict[str, tuple]:
    """W̃ and C̃ of every layer, in the order in which it was asked for. replace(name, linear, W̃) → weight."""
    data = data or Windows(5, LENGTHS)
    model.requires_grad_(False)
    seen = {}
    def asked(name, W, C):
        assert name not in seen
        seen[name] = W.clone(), C.clone()
        linear = model.get_submodule(name)
        other = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        other.load_state_dict(linear.state_dict())
        other.weight.copy_(replace(name, linear, W))
        return other.requires_grad_(False)
    closed_loop.run(model, statistics, texts_of(data, micro), asked, context)
    return seen

def inputs_of(model, data) -> dict[str, np.ndarray]:
    """The inputs (tokens of text, in) of every layer, float64, of the model run row by row."""
    found = {name: [] for name in NAMES}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: found[name].append(args[0][0].double().numpy())) for name in NAMES]
    for row, length in enumerate(LENGTHS):
        # a row's last token has no target
        all_logits(model, data.ids[row:row + 1, :length - 1])
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}

def rough(name, linear, W):
    """Far from what was asked for: small weights go, the rest grows."""
    return 1.2 * W * (W.abs() > 0.15)

# --- the formula ---

@pytest.mark.parametrize("kind", [{}, {"n_kv_head": 2, "qkv_bias": True, "o_bias": True, "mlp_bias": True}],
                         ids=["plain", "grouped-biased"])
def test_the_corrected_weights_are_the_formula_with_the_inputs_of_both_models(kind):
    model = small(**kind).requires_grad_(False)
    dense = copy.deepcopy(model)
    data = Windows(5, LENGTHS)
    seen = run(model, rough, data)
    # later layers do not change the inputs of earlier ones: the finished model has those of the loop
    before, after = inputs_of(dense, data), inputs_of(model, data)
    for name in NAMES:
        W = dense.get_submodule(name).weight.double().numpy()
        x, y = before[name], after[name]
        assert len(x) == len(y) == sum(LENGTHS) - len(LENGTHS)
        C_small = y.T @ y / len(y)
        X = x.T @ y / len(y)
        both = (C_small + prior(name).double().numpy()) / 2
        both += np.diag(0.03 * both.diagonal() + 1e-6 * both.diagonal().mean())
        expected = W + (W @ X - W @ C_small) @ np.linalg.inv(both) / 2
        found_W, found_C = (part.numpy() for part in seen[name])
        assert found_W.dtype == found_C.dtype == np.float64
        assert np.abs(found_C - both).max() < 1e-5 * np.abs(both).max(), name
        assert np.abs(found_W - expected).max() < 1e-4 * np.abs(expected).max(), name
    # the first inputs are those of the dense model, all others are not
    moved = {name: (seen[name][0] - dense.get_submodule(name).weight).abs().max().item() for name in NAMES}
    first = {f"model.layers.0.{name}" for name in GROUPS["qkv"]}
    assert all((moved[name] > 1e-2) == (name not in first) for name in NAMES)

def test_half_of_the_way_to_the_regression_of_the_dense_output_on_the_compressed_input():
    x, y = noise(60, 7, seed=1), noise(60, 7, seed=2)
    y = x + 0.3 * y
    W = noise(4, 7, seed=3)
    regression = torch.linalg.lstsq(y, x @ W.T).solution.T
    C_small = y.T @ y / 60
    found = corrected(W.float(), C_small, C_small, x.T @ y / 60)
    torch.testing.assert_close(found, (W.float().double() + regression) / 2, rtol=1e-6, atol=1e-6)

def test_without_a_change_the_weights_are_asked_for_as_they_are(tmp_path):
    model = small(n_kv_head=2)
    data = Windows(5, LENGTHS)
    statistics = collected(model, texts_of(data), tmp_path)
    dense = copy.deepcopy(model)
    seen = run(model, lambda name, linear, W: linear.weight, data, statistics=statistics)
    for name in NAMES:
        W, C = seen[name]
        assert (W - dense.get_submodule(name).weight).abs().max() < 1e-5
        # both streams and the prior agree
        expected = statistics.inputs(name).double()
        expected += torch.diag(0.03 * expected.diagonal() + 1e-6 * expected.diagonal().mean())
        assert (C - expected).abs().max() < 1e-5 * expected.abs().max()

# --- who sees what ---

@pytest.mark.parametrize("changed", NAMES[:7], ids=lambda name: name.removeprefix("model.layers."))
def test_all_groups_after_a_changed_layer_see_it_and_none_before_or_beside_it(changed):
    model = small()
    dense = copy.deepcopy(model)
    def replace(name, linear, W):
        return linear.weight * 0.5 if name == changed else linear.weight
    seen = run(model, replace)
    assert list(seen) == NAMES
    group = [name for name in NAMES if place_of(name)[0] == 0 and
             GROUP_OF[place_of(name)[1]] == GROUP_OF[place_of(changed)[1]]]
    last = NAMES.index(group[-1])
    for number, name in enumerate(NAMES):
        moved = (seen[name][0] - dense.get_submodule(name).weight).abs().max().item()
        assert (moved > 1e-3) == (number > last), (name, moved)

def test_layers_are_asked_for_block_by_block_in_the_order_in_which_they_are_computed():
    model = small(n_layer=3)
    computed = []
    hooks = [linear.register_forward_pre_hook(lambda module, args, name=name: computed.append(name))
             for name, linear in linears(model).items()]
    all_logits(model, Windows(1).ids)
    for hook in hooks:
        hook.remove()
    seen = list(run(model, lambda name, linear, W: linear.weight))
    assert len(seen) == len(set(seen)) == 21
    assert [place_of(name)[0] for name in seen] == [place_of(name)[0] for name in computed]
    # the first of a layer's group is computed before the first of the next
    def groups(names):
        return list(dict.fromkeys((layer, GROUP_OF[inner]) for layer, inner in map(place_of, names)))
    assert groups(seen) == groups(computed)

def test_the_layer_that_is_given_takes_the_place_and_no_hook_is_left():
    model = small()
    given = {}
    def replace(name, W, C):
        given[name] = nn.Linear(W.shape[1], W.shape[0], bias=False).requires_grad_(False)
        return given[name]
    closed_loop.run(model.requires_grad_(False), PRIOR, texts_of(Windows(2)), replace, FULL)
    assert all(model.get_submodule(name) is given[name] for name in NAMES)
    assert_without_hooks(model)

# --- the text ---

def test_what_is_computed_of_the_inputs_is_not_under_their_autocast():
    seen = set()
    def replace(name, linear, W):
        seen.add(torch.is_autocast_enabled("cpu"))
        return W
    run(small(), replace, context=torch.autocast("cpu", torch.bfloat16))
    assert seen == {False}

def assert_alike(one, other, tolerance):
    for name in NAMES:
        for value, wanted in zip(one[name], other[name], strict=True):
            assert (value - wanted).abs().max() <= tolerance * wanted.abs().max(), name

def test_padding_does_not_count():
    data, other = Windows(5, LENGTHS), Windows(5, LENGTHS)
    for row, length in enumerate(LENGTHS):
        # behind the last position that has a target
        other.ids[row, length - 1:] = 7
    assert not torch.equal(data.ids, other.ids)
    assert_alike(run(small(), rough, data), run(small(), rough, other), 0)

@pytest.mark.parametrize("micro", [1, 5])
def test_the_micro_batch_changes_nothing(micro):
    def half(name, linear, W):
        return W / 2
    assert_alike(run(small(), half, micro=micro), run(small(), half, micro=2), 1e-4)

# --- no more than it takes ---

@pytest.mark.parametrize("group", GROUPS)
def test_the_input_of_a_group_is_found_without_the_layers_behind_it(group):
    model = small().requires_grad_(False)
    block = model.model["layers"][0]
    x = noise(2, LENGTH, 32).float()
    rope = rope_of(model, LENGTH, "cpu")
    computed = []
    hooks = [block.get_submodule(name).register_forward_hook(
        lambda module, args, out, name=name: computed.append((name, args[0]))) for name in GROUP_OF]
    found = input_of(block, group, x, rope)
    assert {name for name, _ in computed} < set(GROUP_OF)
    assert not {name for name, _ in computed} & set(GROUPS[group])
    computed.clear()
    block(x, rope)
    assert torch.equal(dict(computed)[GROUPS[group][0]], found)
    for hook in hooks:
        hook.remove()
    assert_without_hooks(model)
