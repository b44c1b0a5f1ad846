"""Sizes and operations, counted from the modules present."""
import torch.nn as nn

from model import Llama

def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

def count_multiplies(model: nn.Module) -> int:
    """Of the matrix products: each element of a matrix, or of a stack of them, is used once a token, whatever
    layer it is in. The embedding is a look-up, except where the head shares it."""
    # by identity: a shared matrix is kept once, yet works for its linear layer
    matrices = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for p in module.parameters(recurse=False):
            # a stack, (blocks, out, in), multiplies as its matrices do
            if p.dim() >= 2:
                matrices[id(p)] = p.numel()
    return sum(matrices.values())

def count_flops(model: Llama, seq_len: int | None = None) -> int:
    """Of training on one token in a window of seq_len tokens (default: the longest that the model was made
    for), forward and backward."""
    config = model.config
    if seq_len is None:
        seq_len = config.max_seq_len
    # Chowdhery et al. 2022, arXiv 2204.02311, appendix B: 6 a multiplication, and attention without its
    # causal half taken off
    width = config.n_head * config.head_dim
    attention = 12 * config.n_layer * width * seq_len
    return 6 * count_multiplies(model) + attention
