"""A model whose matrices are zeros beside a low-rank part, kept apart: y = S x + B (A x)."""
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from lost import SparseLowRankLinear
from nanolost import cap, pruning
from nanolost.allocate import Option
from nanolost.composite import Composite
from nanolost.compression import Task, damage_of, entry_of
from nanolost.covariance import linears
from nanolost.lowrank import Metric, root, shrunk
from nanolost.sparse_layers import own_shares, roots_of, split_zeros, walked, walked_in_patterns

# the share of its values that OATS gives the product (its own default)
OATS_RANK = 0.25

def factored_layer(linear: nn.Linear, A: Tensor, B: Tensor, S: Tensor) -> SparseLowRankLinear:
    sizes = linear.in_features, linear.out_features, len(A)
    layer = SparseLowRankLinear(*sizes, bias=linear.bias is not None, device=linear.weight.device)
    tensors = {"weight": S}
    if len(A):
        tensors |= {"A": A, "B": B}
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    layer.load_state_dict(tensors)
    return layer.requires_grad_(False)

def oats_parts(task: Task) -> dict[str, tuple]:
    """(A, B, S) of every matrix, each with the same share, a part of which goes to the product."""
    found = {}
    for name, linear in tqdm(linears(task.model).items(), "oats", disable=None):
        W = linear.weight
        values = int(task.config.budget * W.numel() + 1e-6)
        rank = max(1, int(OATS_RANK * values / sum(W.shape)))
        scale = task.statistics.inputs(name).diagonal().to(W.device).sqrt()
        found[name] = cap.oats(W, scale, rank, values - rank * sum(W.shape))
    return found

def cap_parts(task: Task) -> dict[str, tuple]:
    """(A, B, S) of every matrix by CAP as published: a loss of the model with each draw of the masks."""
    layers = linears(task.model)
    # of float32, as the drawn models are: the singular values of float64 bring nothing to a draw
    parts = [cap.Candidates(*cap.robust_pca(linear.weight)) for linear in tqdm(layers.values(), "cap")]
    cost = torch.cat([part.cost() for part in parts])
    value = torch.cat([part.values() for part in parts])
    whole = {name: linear.weight.clone() for name, linear in layers.items()}
    def loss_of(mask: Tensor) -> float:
        for part, masks, linear in zip(parts, cap.split(mask, parts), layers.values(), strict=True):
            A, B, S = part.build(*masks)
            linear.weight.copy_(B @ A + S)
        return mean_loss(task)
    generator = torch.Generator(task.device).manual_seed(task.config.seed)
    first = cap.initial(value, cost, task.values())
    s = cap.policy(loss_of, first, cost, task.values(), generator=generator)
    kept = cap.split(cap.choose(s, cost, task.values()), parts)
    for name, linear in layers.items():
        linear.weight.copy_(whole[name])
    return {name: part.build(*masks) for name, part, masks in zip(layers, parts, kept, strict=True)}

def mean_loss(task: Task) -> float:
    """Of the windows of the loop, in nats a target."""
    total, count = 0.0, 0
    with task.context:
        for batch in task.loop:
            known = int((batch.targets >= 0).sum())
            total += task.model(batch.ids, batch.targets, loss_only=True)[1].item() * known
            count += known
    return total / max(count, 1)

def own_metric(task: Task, name: str) -> Metric:
    """The metric in which zeros are split."""
    inputs, outputs = own_shares(task.statistics)
    C = shrunk(task.statistics.inputs(name).to(task.device), inputs)
    G = shrunk(task.statistics.gradients(name).to(task.device), outputs)
    return Metric(root(G), root(C))

def composite_parts(task: Task) -> dict[str, tuple]:
    """(A, B, S) of the matrices that do not stay dense: directions and entries for one budget."""
    patterns = None
    if task.config.pattern != "unstructured":
        roots = roots_of(task)
        pattern = pruning.pattern_of(task.config.pattern)
        patterns = dict.fromkeys(task.sizes, pattern)
        start = walked_in_patterns(task, roots, patterns)
    else:
        start = walked(task, task.config.budget, 10 * pruning.NEAR)
    scaled = split_zeros(task, start, patterns)
    weights = {name: linear.weight for name, linear in linears(task.model).items()}
    composite = Composite(scaled, weights, partial(own_metric, task), patterns, task.device)
    composite.compose(task.values())
    return composite.parts()

# those that are nothing but a low-rank part and zeros, and one that may be
FACTORED = {"oats": oats_parts, "cap": cap_parts, "fisher": composite_parts}
ALWAYS_FACTORED = ("oats", "cap")

@torch.no_grad()
def to_factors(task: Task) -> dict[str, dict]:
    """Replace every layer by a low-rank part and zeros, kept apart."""
    entries = {}
    found = FACTORED[task.config.method](task)
    for name, linear in linears(task.model).items():
        if name not in found:
            entries[name] = entry_of(Option(linear.weight.numel(), 0.0), False)
            continue
        A, B, S = found.pop(name)
        nonzeros = int(S.count_nonzero())
        values = nonzeros + len(A) * sum(S.shape)
        damage = damage_of(task, name, B @ A + S - linear.weight)
        option = Option(values, damage, "sparse", len(A))
        entries[name] = {**entry_of(option, False), "nonzeros": nonzeros}
        task.model.set_submodule(name, factored_layer(linear, A, B, S))
    return entries
