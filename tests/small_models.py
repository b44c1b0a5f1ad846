"""Small models with weights far from the flat start, for the tests of several rooms."""
import pytest
import torch
import torch.nn as nn

from lost import LOSTLinear, SparseLowRankLinear, apply_lost
from model import Llama, LlamaConfig

SIZES = dict(vocab_size=257, max_seq_len=12, n_layer=2, n_head=4, n_embd=32, n_ffn=44,
             rope_theta=300.0, norm_eps=1e-3)
KINDS = {"plain": {}, "grouped": {"n_kv_head": 2}, "tied": {"tie_embeddings": True},
         "grouped-tied": {"n_kv_head": 1, "tie_embeddings": True}}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

@torch.no_grad()
def spread(model, seed=0):
    """Weights far from the flat start, so that positions, norms and attention all matter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            p.uniform_(0.5, 1.5, generator=generator)
        else:
            p.normal_(0, 0.3, generator=generator)
    return model.eval()

def small(seed=0, **changed):
    return spread(Llama(LlamaConfig(**{**SIZES, **changed})), seed)

def small_lost(**switches):
    return apply_lost(small(n_kv_head=2), 6, 0.1, **switches)

def lost_of(dense, rank, sparsity=0.0):
    return LOSTLinear.from_linear(dense, rank, sparsity, 0.6, "none", select="weight")

@torch.no_grad()
def sparse_of(dense, rank):
    """Rank and the larger half of what is left, as elements."""
    layer = SparseLowRankLinear(dense.in_features, dense.out_features, rank, dense.bias is not None)
    rest = dense.weight
    if rank:
        parts = lost_of(dense, rank)
        rest = rest - parts.B @ parts.A
        layer.A.copy_(parts.A)
        layer.B.copy_(parts.B)
    layer.weight.copy_(rest * (rest.abs() > rest.abs().median()))
    if dense.bias is not None:
        layer.bias.copy_(dense.bias)
    return layer

# by turns over the layers of a model
MIXTURE = (
    lambda dense, rank: lost_of(dense, rank, 0.2),
    sparse_of,
    lambda dense, rank: lost_of(dense, rank).as_pinned(),
    lambda dense, rank: dense,
    lambda dense, rank: lost_of(dense, rank, 0.2).as_pinned(),
    lambda dense, rank: sparse_of(dense, 0),
)

def mixed(model, makers=MIXTURE):
    """The model with layers of every kind there is, no two of one rank."""
    linear = [name for name, m in model.model["layers"].named_modules() if isinstance(m, nn.Linear)]
    for i, name in enumerate(linear):
        dense = model.model["layers"].get_submodule(name)
        model.model["layers"].set_submodule(name, makers[i % len(makers)](dense, 3 + i))
    return model

def small_mixed(**changed):
    return mixed(small(n_kv_head=2, **changed))

def tokens(batch, length, seed=0):
    return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(seed))

def all_logits(model, idx, cache=None):
    return model(idx, idx, cache)[0]

def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()

def loss_and_gradients(model, idx, targets, **how):
    model.zero_grad()
    loss = model(idx, targets, **how)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

