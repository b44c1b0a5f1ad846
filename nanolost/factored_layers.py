"""A model whose matrices are zeros beside a low-rank part, kept apart: W ≈ S + B A, y = x Sᵀ + (x Aᵀ) Bᵀ."""
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from lost import SparseLowRankLinear
from nanolost import cap, pruning
from nanolost.allocate import Option
from nanolost.composite import Composite
from nanolost.compression import Task, damage_of, entry_of, too_small
from nanolost.covariance import linears
from nanolost.lowrank import Metric, root
from nanolost.pruning import NEAR
from nanolost.sparse_layers import matrices_of, weights_of
from nanolost.splitting import shrunk_pair
from nanolost.zeros import own_shares, split_zeros, walked, walked_in_patterns

# the share of its values that OATS gives the product (its own default)
OATS_RANK = 0.25

# A (rank, in), B (out, rank) and S (out, in) by the layer's name
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]

def factored_layer(linear: nn.Linear, A: Tensor, B: Tensor, S: Tensor) -> SparseLowRankLinear:
    """A layer of these parts; the bias goes on."""
    tensors = {"weight": S}
    # no directions: no factors either
    if len(A):
        tensors |= {"A": A, "B": B}
    biased = linear.bias is not None
    if biased:
        tensors["bias"] = linear.bias
    sizes = linear.in_features, linear.out_features, len(A)
    device = linear.weight.device
    layer = SparseLowRankLinear(*sizes, bias=biased, device=device)
    layer.load_state_dict(tensors)
    return layer.requires_grad_(False)

# --- OATS ---

def oats_parts(task: Task) -> Parts:
    """Every matrix with the same share, a part of which goes to the product. UserError for a share that does
    not pay for one direction."""
    shapes = [linear.weight.shape for linear in linears(task.model).values()]
    if any(sum(shape) > task.values_of(shape.numel()) for shape in shapes):
        share = max(sum(shape) / shape.numel() for shape in shapes)
        raise too_small(task, share, "one direction of a matrix keeps up to")
    found = {}
    for name, linear in task.layers("oats"):
        W = linear.weight
        values = task.values_of(W.numel())
        # of a direction: a row of A and a column of B
        direction = sum(W.shape)
        rank = max(1, int(OATS_RANK * values / direction))
        scale = task.inputs(name).diagonal().sqrt()
        # what the product leaves is for the entries
        nonzeros = values - rank * direction
        found[name] = cap.oats(W, scale, rank, nonzeros)
    return found

# --- CAP ---

def mean_loss(task: Task) -> float:
    """Of the windows of the loop, in nats a target."""
    total = 0.0
    count = 0
    with task.context:
        for batch in task.loop:
            # padding has no target; the model's mean leaves it out
            known = int((batch.targets >= 0).sum())
            _, loss = task.model(batch.ids, batch.targets, loss_only=True)
            total += loss.item() * known
            count += known
    return total / max(count, 1)

def candidates(task: Task) -> list[cap.Candidates]:
    """What robust PCA leaves of each matrix, for CAP to choose among."""
    found = []
    for _, linear in task.layers("cap"):
        # of float32, as the drawn models are: the singular values of float64 bring nothing to a draw
        U, sigma, Vt, S = cap.robust_pca(linear.weight)
        found.append(cap.Candidates(U, sigma, Vt, S))
    return found

def put(layers: dict[str, nn.Linear], parts: list[cap.Candidates], mask: Tensor):
    """Give each layer the weight that a mask over all candidates leaves of it."""
    masks = cap.split(mask, parts)
    for linear, part, kept in zip(layers.values(), parts, masks, strict=True):
        A, B, S = part.build(*kept)
        linear.weight.copy_(B @ A + S)

def cap_parts(task: Task) -> Parts:
    """Every matrix by CAP as published: a loss of the model with each draw of the masks."""
    layers = linears(task.model)
    parts = candidates(task)
    # of all candidates of the model, one behind the other
    cost = torch.cat([part.cost() for part in parts])
    value = torch.cat([part.values() for part in parts])
    # draws are made in the model itself, which gets its weights back
    whole = {name: W.clone() for name, W in weights_of(task).items()}
    def loss_of(mask: Tensor) -> float:
        put(layers, parts, mask)
        return mean_loss(task)
    generator = torch.Generator(task.device).manual_seed(task.config.seed)
    s = cap.initial(value, cost, task.values())
    s = cap.policy(loss_of, s, cost, task.values(), generator=generator)
    mask = cap.choose(s, cost, task.values())
    for name, W in whole.items():
        layers[name].weight.copy_(W)
    found = {}
    for name, part, kept in zip(layers, parts, cap.split(mask, parts), strict=True):
        found[name] = part.build(*kept)
    return found

# --- directions and entries for one budget ---

def own_metric(task: Task, name: str) -> Metric:
    """The metric in which zeros are split."""
    own = own_shares(task.statistics)
    C, G = shrunk_pair(name, task.statistics, own, task.device)
    return Metric(root(G), root(C))

def composite_parts(task: Task) -> Parts:
    """The matrices that do not stay dense, in which directions and entries buy from one budget."""
    config = task.config
    matrices = matrices_of(task)
    patterns = None
    if config.pattern == "unstructured":
        # splitting goes on from there: it need not be exact
        start = walked(matrices, config.budget, 10 * NEAR, config.uniform)
    else:
        pattern = pruning.pattern_of(config.pattern)
        patterns = dict.fromkeys(task.sizes, pattern)
        roots = matrices.roots(config.method)
        start = walked_in_patterns(matrices, roots, patterns)
    scaled = split_zeros(matrices, start, config.budget, patterns, config.uniform)
    metric = partial(own_metric, task)
    composite = Composite(scaled, matrices.weights, metric, patterns, task.device)
    composite.compose(task.values())
    return composite.parts()

# --- the whole ---

# by --method: the parts, of a model that is left as it is
FACTORED = {
    "oats": oats_parts,
    "cap": cap_parts,
    "fisher": composite_parts,
}
# those that are nothing but a low-rank part and zeros; fisher may be
ALWAYS_FACTORED = ("oats", "cap")

@torch.no_grad()
def to_factors(task: Task) -> dict[str, dict]:
    """Replace every layer by a low-rank part and zeros, kept apart; what each became, as in
    allocation.json."""
    entries = {}
    found = FACTORED[task.config.method](task)
    for name, linear in linears(task.model).items():
        if name not in found:
            dense = Option(linear.weight.numel(), 0.0)
            entries[name] = entry_of(dense)
            continue
        A, B, S = found.pop(name)
        nonzeros = int(S.count_nonzero())
        values = nonzeros + len(A) * sum(S.shape)
        W = B @ A + S
        damage = damage_of(task, name, W - linear.weight)
        option = Option(values, damage, "sparse", len(A))
        entries[name] = entry_of(option)
        # a part of the values, which count the factors too
        entries[name]["nonzeros"] = nonzeros
        layer = factored_layer(linear, A, B, S)
        task.model.set_submodule(name, layer)
    return entries
