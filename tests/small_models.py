"""Small models with weights far from the flat start, for the tests of several rooms."""
import pytest
import torch

from lost import apply_lost
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

