"""What updates the weights: groups of parameters, optimizers, the schedule of their rates, clipping.

To add an optimizer, write a function from the groups and the settings to a list of torch optimizers, and add
a line to `OPTIMIZERS`."""
import fnmatch
import math

import torch
import torch.nn as nn

from lost import LOSTLinear
from nanolost import shard
from nanolost.errors import UserError

Optimizers = list[torch.optim.Optimizer]

# --- who is updated by what ---

def freeze(model: nn.Module, patterns: list[str] | None):
    """Leave parameters whose name matches one of `patterns` as they are: no gradient, no optimizer state.
    UserError for a pattern that matches none, and where nothing is left to train."""
    # under both names of a tied head
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns or ():
        found = fnmatch.filter(named, pattern)
        if not found:
            # all of them would fill a screen
            some = ", ".join([*named][:12])
            raise UserError(f"--freeze {pattern}: no parameter has such a name; they are {some}, …")
        for name in found:
            named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise UserError("--freeze leaves no parameter to train: give fewer patterns")

def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by what they are: "blocks" (matrices of the blocks), "embeddings" (embedding and
    head), "vectors" (norms, biases, γ). And once more "factors": the pairs (A, B) among the blocks."""
    groups = {"blocks": [], "embeddings": [], "vectors": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            groups["vectors"].append(p)
        elif name.startswith("model.layers."):
            groups["blocks"].append(p)
        else:
            groups["embeddings"].append(p)
    groups["factors"] = factor_pairs(model)
    return groups

def factor_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A (r, in) and B (out, r) of each LOST layer that trains both. Not of a pinned one, whose A lacks the
    identity."""
    layers = [m for m in model.modules() if isinstance(m, LOSTLinear) and not m.pinned]
    return [(m.A, m.B) for m in layers if m.A.requires_grad and m.B.requires_grad]

def auxiliary(groups: dict, config) -> list[dict]:
    """Embedding, head and vectors, at a peak rate of their own."""
    peak = config.aux_lr
    if peak is None:
        peak = config.lr
    # vectors do not decay: a norm's gain and γ are scales, not weights that could grow
    return [
        {"params": groups["embeddings"], "lr": peak, "weight_decay": config.weight_decay},
        {"params": groups["vectors"], "lr": peak, "weight_decay": 0.0},
    ]

def adamw(groups: dict, config) -> Optimizers:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), for every parameter."""
    blocks = {"params": groups["blocks"], "lr": config.lr, "weight_decay": config.weight_decay}
    every = [blocks, *auxiliary(groups, config)]
    return [torch.optim.AdamW(every, betas=config.betas, fused=True)]

def muon(groups: dict, config) -> Optimizers:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW elsewhere."""
    rest = torch.optim.AdamW(auxiliary(groups, config), betas=config.betas, fused=True)
    # all of them may be frozen, which Muon's constructor refuses
    if not groups["blocks"]:
        return [rest]
    kind = torch.optim.Muon
    # all or none: `--shard` is the run's
    if any(map(shard.is_split, groups["blocks"])):
        kind = shard.Muon
    blocks = kind(
        groups["blocks"],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        # updates as large as AdamW's (arXiv 2502.16982), so that one rate serves both
        adjust_lr_fn="match_rms_adamw",
    )
    return [rest, blocks]

OPTIMIZERS = {"adamw": adamw, "muon": muon}

def build_optimizers(model: nn.Module, config) -> Optimizers:
    """The optimizers that config.optimizer names, over every trained parameter once."""
    optimizers = OPTIMIZERS[config.optimizer](parameter_groups(model), config)
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
            found += group["params"]
    trained = [p for p in model.parameters() if p.requires_grad]
    # torch refuses a parameter that is in two groups of one optimizer, but not one that is in none
    assert sorted(map(id, found)) == sorted(map(id, trained)), "a parameter is in no group, or in two"
    return optimizers

# --- the schedule ---

def lr_at(step: int, config, peak: float | None = None) -> float:
    """Learning rate of update `step`, from 1: linear warm-up, then a cosine to min_lr_ratio of the peak."""
    if peak is None:
        peak = config.lr
    if step <= config.warmup:
        return peak * step / config.warmup
    # 0 at the end of the warm-up, 1 at the last step and after it
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    low = config.min_lr_ratio
    return peak * (low + (1 - low) * cosine)

def set_rates(optimizers: Optimizers, step: int, config):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config, group["peak"])

# --- gradients ---

def flat_gradients(model: nn.Module) -> torch.Tensor:
    """One vector of which all gradients are views: one reduction, one norm, one scaling. Gradients of a split
    matrix are not in it."""
    # Its layout never changes, so sums over processes round alike before and after a restart.
    # DistributedDataParallel rearranges its buckets after the first step, which for three or more processes
    # changes the last bits.
    trained = [p for p in model.parameters() if p.requires_grad and not shard.is_split(p)]
    sizes = [p.numel() for p in trained]
    flat = torch.zeros(sum(sizes), device=next(model.parameters()).device)
    for p, piece in zip(trained, flat.split(sizes), strict=True):
        p.grad = piece.view_as(p)
    return flat

def clip(gradients: list[torch.Tensor], norm: float, limit: float):
    """Scale the whole gradient, whose norm is `norm`, down to the norm `limit`; 0 for no clipping. gradients:
    what this process holds of it."""
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / norm)
