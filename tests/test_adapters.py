"""adapters.py: updates that merge, their gradients, ranks that change."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matrices import noise
from small_models import all_logits, kinds, largest_difference, small, tokens

from model import generator_of
from nanolost import adapters
from nanolost.adapters import MaskedProduct, Update
from nanolost.covariance import linears

SORTS = {"lora": (False, 0.0), "masked-lora": (True, 0.0), "lost": (False, 0.2)}
sorts = pytest.mark.parametrize("masked, share", SORTS.values(), ids=SORTS)

def with_updates(masked, share, trained=True, **changed):
    """A small model of half zeros with updates that are far from zero."""
    model = small(**changed)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight *= layer.weight.abs() > layer.weight.abs().median()
    adapters.put_updates(model, list(linears(model)), 4, 0.5, masked, share)
    adapters.draw_updates(model, 0)
    if trained:
        for number, layer in enumerate(adapters.updates(model).values()):
            with torch.no_grad():
                layer.B.copy_(noise(*layer.B.shape, seed=number) * 0.1)
                if share:
                    layer.W_s.copy_(noise(*layer.W_s.shape, seed=number + 99) * 0.1)
    return model

@sorts
def test_an_update_that_was_not_trained_changes_no_bit(masked, share):
    model = with_updates(masked, share, trained=False)
    assert torch.equal(all_logits(model, tokens(2, 9)), all_logits(adapters.merged(model), tokens(2, 9)))

@kinds
@sorts
def test_merged_and_apart_are_the_same_function(kind, masked, share):
    model = with_updates(masked, share, **kind)
    whole = adapters.merged(model)
    apart = all_logits(model, tokens(2, 9))
    difference = largest_difference(apart, all_logits(whole, tokens(2, 9)))
    # under a mask the forward pass computes the merged weight itself
    assert difference <= (0 if masked else 1e-5 * apart.abs().max())
    assert (whole.lm_head.weight is whole.model["embed_tokens"].weight) == kind.get("tie_embeddings", False)
    for name, layer in linears(whole).items():
        assert type(layer) is nn.Linear
        before = model.get_submodule(name)
        if masked:
            assert torch.equal(layer.weight == 0, before.weight == 0)
        else:
            assert (layer.weight != 0).float().mean() > 0.9

@sorts
def test_a_model_that_was_taken_apart_is_the_one_that_was_merged(masked, share):
    model = with_updates(masked, share)
    whole = adapters.merged(model)
    adapters.restore(whole, adapters.parts(model), 0.5, masked)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])
    assert torch.equal(all_logits(model, tokens(2, 9)), all_logits(whole, tokens(2, 9)))

@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 7)])
def test_gradients_under_a_mask_are_those_of_plain_operations(shape):
    W = noise(6, 7) * (noise(6, 7, seed=1) > 0)
    made = [noise(*shape, seed=2), noise(2, 7, seed=3), noise(6, 2, seed=4)]
    x, A, B = (tensor.requires_grad_() for tensor in made)
    y = MaskedProduct.apply(x, W, A, B, 0.5)
    plain = F.linear(x, W + (W != 0) * (0.5 * B @ A))
    assert torch.allclose(y, plain, rtol=1e-12)
    aim = noise(*y.shape, seed=5)
    found = torch.autograd.grad((y * aim).sum(), (x, A, B))
    wanted = torch.autograd.grad((plain * aim).sum(), (x, A, B))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10)

def test_under_autocast_the_sum_is_rounded_once():
    model = with_updates(True, 0.0)
    layer = next(iter(adapters.updates(model).values()))
    x = noise(2, 3, layer.in_features).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, F.linear(x.bfloat16(), layer.effective().bfloat16()))
    # a bias leaves the dtype alone
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y + 1)
        assert layer(x).dtype == torch.bfloat16
    y.sum().backward()
    assert layer.A.grad.dtype == torch.float32 and layer.B.grad.abs().sum() > 0

@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_another_rank_leaves_the_function_and_the_zeros(rank):
    model = with_updates(True, 0.0)
    before = all_logits(model, tokens(2, 9))
    for layer in adapters.updates(model).values():
        zeros = layer.weight == 0
        layer.to_rank(rank, generator_of(0, "x"))
        assert layer.A.shape[0] == layer.B.shape[1] == rank
        assert torch.equal(layer.weight == 0, zeros)
    assert largest_difference(before, all_logits(model, tokens(2, 9))) <= 1e-5 * before.abs().max()

def test_rebasing_sets_the_whole_and_the_mask_and_keeps_the_update():
    model = with_updates(True, 0.0)
    layer = next(iter(adapters.updates(model).values()))
    factors = layer.A.clone(), layer.B.clone()
    W = layer.effective()
    W = W * (W.abs() > W.abs().quantile(0.7))
    layer.rebase(W)
    whole = layer.effective()
    assert torch.equal(whole == 0, W == 0)
    assert (whole - W).abs().max() <= 1e-6 * W.abs().max()
    assert torch.equal(layer.A, factors[0]) and torch.equal(layer.B, factors[1])

def test_an_element_that_is_the_updates_alone_is_no_zero_of_the_mask():
    layer = Update(nn.Linear(4, 3, bias=False), 2, 0.5, masked=True)
    with torch.no_grad():
        layer.A.fill_(1.0)
        layer.B.fill_(1.0)
        # all of it is the update
        layer.rebase(torch.ones(3, 4))
    assert (layer.weight != 0).all() and torch.equal(layer.effective(), torch.ones(3, 4))
