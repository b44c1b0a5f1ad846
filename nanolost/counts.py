"""Sizes and operations, counted from the modules present."""
import torch.nn as nn

from model import Llama

def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

def count_multiplies(model: nn.Module) -> int:
    """Of the matrix products: each element of a matrix is used once a token, whatever layer it is in. The
    embedding is a look-up, except where the head shares it."""
    matrices = {id(p): p.numel() for m in model.modules() if not isinstance(m, nn.Embedding)
                for p in m.parameters(recurse=False) if p.dim() == 2}
    return sum(matrices.values())

def count_flops(model: Llama) -> int:
    """Of training on one token, forward and backward: 6 a multiplication and 12 n_layer n_embd seq_len for
    attention without its causal half taken off (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    c = model.config
    return 6 * count_multiplies(model) + 12 * c.n_layer * c.n_embd * c.seq_len
