"""The head's loss against the ordinary one."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import kinds, loss_and_gradients, small, tokens

from lost import apply_lost
from nanolost.loss import head_loss

# --- the loss without the logits, and recomputing ---

@kinds
@pytest.mark.parametrize("batch", [1, 110], ids=["one slice", "three slices"])
def test_loss_without_logits_is_the_cross_entropy_with_its_gradients(kind, batch):
    model, idx = small(**kind), tokens(batch, 12)
    targets = idx.roll(-1, 1).clone()
    targets[0, 3:7] = -1                       # left out
    loss, gradients = loss_and_gradients(model, idx, targets)
    sliced_loss, sliced_gradients = loss_and_gradients(model, idx, targets, loss_only=True)
    assert sliced_loss == pytest.approx(loss, rel=1e-6)
    assert (sliced_gradients - gradients).norm() <= 1e-5 * gradients.norm()

def test_loss_without_logits_keeps_nothing_of_their_size():
    model, idx, sizes = small(), tokens(200, 12), []
    def pack(t):
        sizes.append(t.numel())
        return t
    for loss_only in (False, True):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert (model(idx, idx, loss_only=loss_only)[0] is None) == loss_only
        assert (max(sizes) >= 200 * 12 * 257) != loss_only

def test_an_evaluated_loss_makes_no_gradients():
    model, idx, made = small(), tokens(2, 12), []
    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            made.append(getattr(result, "shape", ()))
            return result
    for enabled in (True, False):
        made.clear()
        with torch.set_grad_enabled(enabled), Shapes():
            model(idx, idx, loss_only=True)
        assert (made.count((257, 32)) > 0) == enabled                      # the gradient of the head's weight

def test_scaled_loss_without_logits_scales_its_gradients():
    model, idx = small(), tokens(2, 12)
    whole = loss_and_gradients(model, idx, idx, loss_only=True)[1]
    model.zero_grad()
    (model(idx, idx, loss_only=True)[1] * 0.25).backward()
    assert torch.allclose(torch.cat([p.grad.flatten() for p in model.parameters()]), whole / 4, atol=1e-7)


class Doubled(nn.Linear):
    """A linear layer with another formula."""

    def forward(self, x):
        return 2 * super().forward(x)

def head_and_input(make=nn.Linear, rows=700, **kwargs):
    generator = torch.Generator().manual_seed(0)
    head = make(16, 29, **kwargs)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(generator=generator)
    x = torch.randn(rows, 16, generator=generator, requires_grad=True)
    return head, x, torch.randint(-1, 29, (rows,), generator=generator)

@pytest.mark.parametrize("make", [nn.Linear, Doubled])
@pytest.mark.parametrize("bias", [False, True])
def test_head_of_any_formula_and_with_a_bias_has_the_ordinary_loss(make, bias):
    head, x, targets = head_and_input(make, bias=bias)
    wrt = [x, *head.parameters()]
    loss = head_loss(head, x, targets)
    expected = F.cross_entropy(head(x), targets, ignore_index=-1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, right in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()

def test_lost_head_has_the_loss_and_gradients_of_its_logits():
    model, idx = apply_lost(small(), 6, 0.1, skip=()), tokens(3, 12)
    loss, gradients = loss_and_gradients(model, idx, idx)
    same_loss, same_gradients = loss_and_gradients(model, idx, idx, loss_only=True)
    assert same_loss == loss and torch.equal(same_gradients, gradients)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-3, 28), max_size=9))
def test_loss_is_the_mean_over_the_targets_that_count_and_zero_without_any(targets):
    head, x, _ = head_and_input(bias=True, rows=len(targets))
    log_p = head(x).log_softmax(-1)
    literal = [-log_p[i, target].item() for i, target in enumerate(targets) if target >= 0]
    expected = sum(literal) / max(1, len(literal))
    loss = head_loss(head, x, torch.tensor(targets, dtype=torch.int64))
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)

@pytest.mark.parametrize("loss_only", [False, True])
def test_batch_of_padding_alone_has_no_loss_and_no_gradient(loss_only):
    model, idx = small(), tokens(2, 9)
    loss, gradients = loss_and_gradients(model, idx, torch.full_like(idx, -1), loss_only=loss_only)
    assert loss == 0 and not gradients.any()

def test_second_derivative_is_refused_and_never_silently_wrong():
    head, x, targets = head_and_input()
    with pytest.raises(RuntimeError, match="no second derivative: .* loss_only=False"):
        torch.autograd.grad(head_loss(head, x.sin(), targets), x, create_graph=True)
    # the first one still is what it was
    assert torch.autograd.grad(head_loss(head, x.sin(), targets), x)[0].any()

def test_float16_is_refused_where_its_gradients_would_vanish():
    head, x, targets = head_and_input()
    head, x = head.half(), x.detach().half()
    with pytest.raises(ValueError, match="float16.*use bfloat16 or float32"):
        head_loss(head, x, targets)
    with torch.no_grad():
        evaluated = head_loss(head, x, targets)
    expected = F.cross_entropy(head(x).float(), targets, ignore_index=-1)
    assert evaluated.item() == pytest.approx(expected.item(), rel=1e-3)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_loss_has_the_same_bits(dtype):
    models, idx = [small(), small()], tokens(3, 12)
    models[1].compile(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (loss, gradients), again = (loss_and_gradients(m, idx, idx, loss_only=True) for m in models)
    assert again[0] == loss and torch.equal(again[1], gradients)
