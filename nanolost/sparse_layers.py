"""A model with zeros in its matrices: which methods there are, and what each does with all the matrices under
one budget."""
import tempfile

import torch
import torch.nn as nn
from torch import Tensor

from nanolost import pruning, splitting
from nanolost.allocate import Option, allocate
from nanolost.compression import Task, damage_of, dense_layer, entry_of, require
from nanolost.covariance import linears
from nanolost.lowrank import shrunk
from nanolost.pruning import BY_CHANCE, NEAR, Pattern, Patterns, Roots, share_of
from nanolost.shelf import Shelf
from nanolost.splitting import Scaled
from nanolost.zeros import (
    Matrices,
    Weights,
    alone,
    fitted_one_by_one,
    own_shares,
    split_zeros,
    walked,
    walked_in_patterns,
)

def weights_of(task: Task) -> Weights:
    """Those of the dense model."""
    layers = linears(task.model)
    return {name: linear.weight for name, linear in layers.items()}

def matrices_of(task: Task) -> Matrices:
    """The same, and what is known of them. Zeros of a model that was sparse before stay zeros."""
    weights = weights_of(task)
    nested = share_of(weights.values()) > BY_CHANCE
    return Matrices(weights, task.statistics, task.folder, task.device, nested)

# --- matrices one by one ---

def one_by_one(task: Task) -> tuple[Weights, None]:
    """Each matrix by itself, all with the same share."""
    config = task.config
    pattern = pruning.pattern_of(config.pattern)
    matrices = matrices_of(task)
    if matrices.nested and not pattern:
        # some may have fewer left than that
        return fitted_one_by_one(matrices, config.method, int(task.values()), None), None
    roots = matrices.roots(config.method)
    found = {}
    for name, _ in task.layers(config.method):
        found[name] = alone(matrices, config.method, name, config.budget, pattern, roots)
    # their patterns are the same for all, and nothing chooses again by them
    return found, None

# --- zeros in patterns ---

def pattern_options(task: Task, name: str, W: Tensor, sizes: list[Pattern], R: Tensor) -> list[Option]:
    """Dense, or an N:M pattern of those offered, by what is lost when the other weights stand still."""
    rows = task.gradients(name).diagonal()
    # nats a token of each entry by itself, (out, in): the formula on top of pruning.py
    scaled = W / R.diagonal()
    saliency = scaled.square() * rows[:, None] / 2
    found = [Option(W.numel(), 0.0)]
    for n, m in sizes:
        mask = pruning.largest_of_groups(saliency, n, m)
        kept = int(mask.sum())
        lost = (saliency * ~mask).sum()
        found.append(Option(kept, lost.item(), f"{n}:{m}"))
    return found

def chosen_patterns(task: Task, roots: Roots) -> Patterns:
    """(n, m) of every matrix that does not stay dense. UserError for a budget below the smallest of them."""
    sizes = pruning.offered_patterns(task.config.pattern)
    # a look at each matrix as it is: a walk for each pattern would take as many times longer
    options = {}
    for name, linear in linears(task.model).items():
        R = roots.of(name, task.device)
        options[name] = pattern_options(task, name, linear.weight, sizes, R)
    require(task, options, "the patterns keep more, at the least")
    patterns = {}
    for name, option in allocate(options, task.values()).items():
        # None of "dense", which is no pattern
        pattern = pruning.pattern_of(option.kind)
        if pattern:
            patterns[name] = pattern
    return patterns

# --- zeros of the whole model ---

def globally(task: Task) -> tuple[Weights, Patterns | None]:
    """`walk` and `fisher`: one budget for all matrices. The weights with zeros, and their patterns."""
    config = task.config
    matrices = matrices_of(task)
    patterns = None
    if config.pattern == "unstructured":
        # where it only begins it need not be exact
        near = NEAR if config.method == "walk" else 10 * NEAR
        found = walked(matrices, config.budget, near, config.uniform)
    else:
        roots = matrices.roots(config.method)
        patterns = chosen_patterns(task, roots)
        found = walked_in_patterns(matrices, roots, patterns)
    # the walk is where splitting begins
    if config.method == "fisher":
        scaled = split_zeros(matrices, found, config.budget, patterns, config.uniform)
        found = {layer.name: splitting.result(layer) for layer in scaled}
    return found, patterns

# --- zeros, block by block ---

def again(
    task: Task,
    name: str,
    W: Tensor,
    C: Tensor,
    D: Tensor,
    patterns: Patterns | None,
) -> Tensor:
    """The zeros of one matrix chosen again, as many as D (out, in) has, for the weight W and the covariance C
    (in, in), shrunk, of what the compressed blocks before it give."""
    _, own = own_shares(task.statistics)
    G = shrunk(task.gradients(name), own)
    # eigenvectors of one layer, which the next one does not read
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        shelf = Shelf(folder)
        layer = Scaled(name, C, G, shelf)
        layer.begin(W, D, task.device)
        keep = int(D.count_nonzero())
        splitting.split([layer], keep, patterns, task.device)
        return splitting.result(layer)

def in_the_loop(task: Task, found: Weights, patterns: Patterns | None):
    """Choose zeros and values of every matrix again, with the inputs that the compressed blocks give."""
    def replace(name: str, W: Tensor, C: Tensor) -> nn.Module:
        linear = task.model.get_submodule(name)
        # what stays dense takes the values that make up for the blocks before it
        if name in found:
            D = found.pop(name)
            W = again(task, name, W, C, D, patterns)
        return dense_layer(linear, W)
    task.closed_loop(replace)

# --- the whole ---

# by --method. Each returns the weights with zeros and their patterns, and leaves the model as it is
SPARSE = {
    "fisher": globally,
    "walk": globally,
    "magnitude": one_by_one,
    "wanda": one_by_one,
    "sparsegpt": one_by_one,
}

@torch.no_grad()
def to_sparse(task: Task) -> dict[str, dict]:
    """Put zeros into the layers' weights; what each became, as in allocation.json."""
    found = {}
    patterns = None
    # what keeps everything has nothing to choose
    if task.config.budget < 1:
        found, patterns = SPARSE[task.config.method](task)
    entries = {}
    for name, linear in linears(task.model).items():
        option = Option(linear.weight.numel(), 0.0)
        if name in found:
            W = found[name]
            nonzeros = int(W.count_nonzero())
            # while the layer still has its dense weight
            damage = damage_of(task, name, W - linear.weight)
            option = Option(nonzeros, damage, "sparse")
        entries[name] = entry_of(option)
    # the loop replaces layers as it goes: entries tell what was chosen before it
    if task.config.closed_loop:
        in_the_loop(task, found, patterns)
    else:
        for name, W in found.items():
            dense_layer(task.model.get_submodule(name), W)
    return entries
