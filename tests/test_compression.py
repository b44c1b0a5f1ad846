"""The forms of compressed layers: they compute with the parts that were found, and cost what was counted."""
import contextlib
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matrices import noise
from small_models import all_logits, small
from test_covariance import Windows, texts_of

from nanolost.factored_layers import factored_layer, mean_loss
from nanolost.low_rank_layers import lost_layer, options_of, rank_cost, rank_steps
from nanolost.lowrank import Parts, metric_of
from nanolost.sparse_layers import again

FULL = contextlib.nullcontext()
NAME = "model.layers.0.mlp.gate_proj"

def linear_of(m, n, bias):
    linear = nn.Linear(n, m, bias).requires_grad_(False)
    linear.weight.copy_(noise(m, n))
    return linear

def parts_of(m, n, rank, k):
    channels = torch.arange(2, 2 + k)
    A = noise(rank, n, seed=1)
    # the product has nothing where there are values of their own
    A[:, channels] = 0
    return Parts(A, noise(m, rank, seed=2), channels, noise(m, k, seed=3))

biases = pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])

@biases
@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_a_layer_computes_with_its_parts_and_has_the_values_that_were_counted(shape, k, pinned, bias):
    m, n = shape
    linear, parts = linear_of(m, n, bias), parts_of(m, n, 5, k)
    layer = lost_layer(linear, parts, pinned)
    x = noise(7, n, seed=4).float()
    expected = x.double() @ parts.product().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-4)
    values = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
    assert values == rank_cost(shape, 5, k, pinned)
    assert not any(p.requires_grad for p in layer.parameters())

@biases
@pytest.mark.parametrize("rank", [0, 3])
def test_a_layer_of_factors_and_zeros_computes_with_their_sum(rank, bias):
    linear = linear_of(12, 20, bias)
    A, B = noise(rank, 20, seed=1), noise(12, rank, seed=2)
    S = noise(12, 20, seed=3) * (noise(12, 20, seed=4) > 0.5)
    layer = factored_layer(linear, A, B, S)
    x = noise(7, 20, seed=5).float()
    expected = x.double() @ (B @ A + S).T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)

# --- options ---

def test_ranks_are_in_steps_of_8_where_there_are_two_of_them():
    assert list(rank_steps(40)) == [8, 16, 24, 32] and list(rank_steps(16)) == [8]
    assert list(rank_steps(15)) == list(range(1, 15))

def task_of(**config):
    known = types.SimpleNamespace(tokens=(100, 100), inputs=lambda name: torch.eye(20) * 2,
                                  gradients=lambda name: torch.eye(12) * 3)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(**config), statistics=known, device="cpu", gradients=known.gradients,
        metric=lambda method, name: metric_of(method, name, known, "cpu"))

@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
def test_a_matrix_may_become_each_rank_that_is_smaller_than_it_or_stay(pinned):
    W = noise(12, 20).float()
    task = task_of(method="fisher", channels=None, pinned=pinned, budget=0.5)
    found = options_of(task, NAME, W)
    assert found[0] == (240, 0.0, "dense", 0, 0)
    squares = torch.linalg.svdvals(W.double()).square()
    expected = []
    for rank in range(1, 12):
        cost = 32 * rank - (rank * rank if pinned else 0)
        # a layer's covariances grow by 3 % of their own
        lost = 6 * 1.03 ** 2 * squares[rank:].sum().item() / 2
        if cost < 240:
            expected.append((cost, pytest.approx(lost, rel=1e-4), "lost", rank, 0))
    assert len(expected) == (11 if pinned else 7)
    assert found[1:] == expected

# --- zeros in the loop ---

@pytest.mark.parametrize("count", [0, 1, 90])
def test_zeros_that_are_chosen_again_are_as_many_as_before(count, tmp_path):
    task = task_of()
    task.folder = str(tmp_path)
    W = noise(12, 20)
    C = torch.eye(20, dtype=torch.float64)
    D = torch.zeros(240)
    D[:count] = 1
    found = again(task, NAME, W, C, D.view(12, 20), None)
    assert int(found.count_nonzero()) == count
    assert list(tmp_path.iterdir()) == []

# --- the loss of the loop's windows ---

def test_the_mean_loss_is_that_of_all_targets_whatever_the_micro_batch():
    model = small()
    data = Windows(5, [9, 4, 1, 7, 9], prompt=2)
    targets = data.batch(range(5), "cpu")[1]
    logits = all_logits(model, data.ids[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).item()
    # one at a time, a window has no target at all
    for micro in (1, 2, 5):
        task = types.SimpleNamespace(model=model, loop=texts_of(data, micro), context=FULL)
        assert mean_loss(task) == pytest.approx(expected, rel=1e-5)
