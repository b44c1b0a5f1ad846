"""A model with zeros in its matrices: which methods there are, and what each does with all the matrices under
one budget."""
import tempfile
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from nanolost import pruning, splitting
from nanolost.allocate import Option, allocate
from nanolost.compression import Task, damage_of, dense_layer, entry_of, require
from nanolost.covariance import Statistics, linears
from nanolost.lowrank import shrunk
from nanolost.pruning import NEAR, Pattern, Patterns, Roots
from nanolost.shelf import Shelf
from nanolost.splitting import Scaled

# what is added to C and G of their own diagonals before they are split: more tokens need less. At half of the
# values it is a matter of 0.02 nats, whichever
OWN_FEW = (0.05, 0.30)
OWN_MANY = (0.03, 0.10)
MANY = 32_768

# weights (out, in) with zeros, by the layer's name
Weights = dict[str, Tensor]

def own_shares(statistics: Statistics) -> tuple[float, float]:
    """What is added to C and to G of their own diagonals, after as many tokens as there were."""
    # the fewer of the two: those with inputs, and those with gradients
    fewest = min(statistics.tokens)
    return OWN_MANY if fewest >= MANY else OWN_FEW

def roots_of(task: Task) -> Roots:
    """R of every layer, damped as the method was published."""
    shrink = shrunk
    if task.config.method == "sparsegpt":
        shrink = pruning.damped
    shelf = Shelf(task.folder)
    return Roots(task.statistics, shelf, shrink)

def weights_of(task: Task) -> Weights:
    """Those of the dense model."""
    layers = linears(task.model)
    return {name: linear.weight for name, linear in layers.items()}

def competing(names: Iterable, uniform: bool | None) -> list[list]:
    """Those whose entries are under one threshold: all of the model, or each for itself."""
    if uniform:
        return [[name] for name in names]
    return [list(names)]

# --- matrices one by one ---

def pruned(task: Task, name: str, W: Tensor, pattern: Pattern | None, roots: Roots) -> Tensor:
    """W (out, in) with zeros by a method that looks at it alone."""
    share = task.config.budget
    method = task.config.method
    if method == "sparsegpt":
        R = roots.of(name, W.device)
        return pruning.sparsegpt(W, R, share, pattern)
    score = W.abs()
    # the formulas on top of pruning.py
    if method == "wanda":
        score = score * task.inputs(name).diagonal().sqrt()
    if pattern:
        mask = pruning.largest_of_groups(score, *pattern)
    elif method == "wanda":
        # Wanda compares within a row; magnitudes are compared within a matrix
        mask = pruning.largest_of_rows(score, share)
    else:
        mask = pruning.largest(score, task.values_of(W.numel()))
    return W * mask

def one_by_one(task: Task) -> tuple[Weights, None]:
    """Each matrix by itself, all with the same share."""
    pattern = pruning.pattern_of(task.config.pattern)
    roots = roots_of(task)
    found = {}
    for name, linear in task.layers(task.config.method):
        found[name] = pruned(task, name, linear.weight, pattern, roots)
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

def walked_in_patterns(task: Task, roots: Roots, patterns: Patterns) -> Weights:
    """The walk over every matrix that has a pattern."""
    found = {}
    layers = linears(task.model)
    for name, (n, m) in tqdm(patterns.items(), "walk", disable=None):
        W = layers[name].weight
        R = roots.of(name, W.device)
        found[name] = pruning.walk_in_groups(W, R, n, m)
    return found

# --- zeros of the whole model ---

def walked(task: Task, share: float, near: float) -> Weights:
    """The walk under one threshold for the whole model, or for each matrix. near: how far below the share of
    the values it may end."""
    weights = weights_of(task)
    roots = roots_of(task)
    found = {}
    for names in competing(weights, task.config.uniform):
        part = {name: weights[name] for name in names}
        walker = pruning.Walker(part, task.statistics, roots, task.device)
        # of several walks the last is the one that stays
        walker.to_share(share, found.__setitem__, near)
    return found

def begun(task: Task, start: Weights) -> list[Scaled]:
    """The layers of `start` in scaled units, each with its zeros as they stand there. Empties `start`: what a
    layer was is on the shelf then."""
    layers = linears(task.model)
    own = own_shares(task.statistics)
    # 9 bytes a weight and the eigenvectors: too much for the memory beside a large model
    shelf = Shelf(task.folder)
    scaled = splitting.scaled_layers(start, task.statistics, own, shelf, task.device)
    for layer in scaled:
        W = layers[layer.name].weight
        D = start.pop(layer.name)
        layer.begin(W, D, task.device)
    return scaled

def split_zeros(task: Task, start: Weights, patterns: Patterns | None) -> list[Scaled]:
    """The layers of `start` with the zeros that splitting finds from there."""
    scaled = begun(task, start)
    for part in competing(scaled, task.config.uniform):
        # under patterns the count is theirs, and `keep` plays no part
        size = sum(task.sizes[layer.name] for layer in part)
        keep = task.values_of(size)
        splitting.split(part, keep, patterns, task.device)
    return scaled

def globally(task: Task) -> tuple[Weights, Patterns | None]:
    """`walk` and `fisher`: one budget for all matrices. The weights with zeros, and their patterns."""
    config = task.config
    patterns = None
    if config.pattern == "unstructured":
        # where it only begins it need not be exact
        near = NEAR if config.method == "walk" else 10 * NEAR
        found = walked(task, config.budget, near)
    else:
        roots = roots_of(task)
        patterns = chosen_patterns(task, roots)
        found = walked_in_patterns(task, roots, patterns)
    # the walk is where splitting begins
    if config.method == "fisher":
        scaled = split_zeros(task, found, patterns)
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
