"""The head's loss against the ordinary one."""
import pytest
import torch
from small_models import kinds, loss_and_gradients, small, tokens

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

