"""A model with zeros in its matrices: which methods there are, and what each does with all the matrices under
one budget."""
import tempfile

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from nanolost import closed_loop, pruning, splitting
from nanolost.allocate import Option, allocate
from nanolost.compression import Task, damage_of, dense_layer, entry_of, require
from nanolost.covariance import Statistics, linears
from nanolost.lowrank import shrunk
from nanolost.shelf import Shelf

# what is added to C and G of their own diagonals before they are split: more tokens need less
OWN_FEW = (0.05, 0.30)
OWN_MANY = (0.03, 0.10)
MANY = 32_768

# --- zeros of one matrix ---

def own_shares(statistics: Statistics) -> tuple[float, float]:
    """What is added to C and G of their own diagonals: at half of the values 0.02 nats, whichever."""
    return OWN_MANY if min(statistics.tokens) >= MANY else OWN_FEW

def roots_of(task: Task) -> pruning.Roots:
    shrink = pruning.damped if task.config.method == "sparsegpt" else shrunk
    return pruning.Roots(task.statistics, Shelf(task.folder), shrink)

def pruned(task: Task, name: str, W: Tensor, pattern, roots: pruning.Roots) -> Tensor:
    """A matrix with zeros by a method that looks at it alone."""
    share = task.config.budget
    method = task.config.method
    if method == "sparsegpt":
        return pruning.sparsegpt(W, roots.of(name, W.device), share, pattern)
    score = W.abs()
    if method == "wanda":
        score = score * task.statistics.inputs(name).diagonal().to(W.device).sqrt()
    if pattern:
        return W * pruning.largest_of_groups(score, *pattern)
    if method == "wanda":
        return W * pruning.largest_of_rows(score, share)
    return W * pruning.largest(score, int(share * W.numel() + 1e-6))

def one_by_one(task: Task) -> tuple[dict[str, Tensor], None]:
    """Each matrix by itself, all with the same share."""
    pattern = pruning.pattern_of(task.config.pattern)
    roots = roots_of(task)
    found = {}
    for name, linear in tqdm(linears(task.model).items(), task.config.method, disable=None):
        found[name] = pruned(task, name, linear.weight, pattern, roots)
    return found, None

def walked(task: Task, share: float, near: float) -> dict[str, Tensor]:
    """The walk under one threshold for the whole model, or for each matrix."""
    weights = {name: linear.weight for name, linear in linears(task.model).items()}
    roots = roots_of(task)
    found = {}
    parts = [[name] for name in weights] if task.config.uniform else [list(weights)]
    for names in parts:
        part = {name: weights[name] for name in names}
        walker = pruning.Walker(part, task.statistics, roots, task.device)
        walker.to_share(share, found.__setitem__, near)
    return found

# --- zeros in patterns ---

def pattern_options(task: Task, name: str, W: Tensor, sizes: list, R: Tensor) -> list[Option]:
    """Dense, or an N:M pattern of those offered, by what is lost when the other weights stand still."""
    rows = task.statistics.gradients(name).diagonal().to(W.device)
    saliency = (W / R.diagonal()).square() * rows[:, None] / 2
    found = [Option(W.numel(), 0.0)]
    for n, m in sizes:
        mask = pruning.largest_of_groups(saliency, n, m)
        lost = (saliency * ~mask).sum().item()
        found.append(Option(int(mask.sum()), lost, f"{n}:{m}"))
    return found

def chosen_patterns(task: Task, roots: pruning.Roots) -> dict[str, tuple[int, int]]:
    """(n, m) of every matrix that does not stay dense."""
    sizes = pruning.offered_patterns(task.config.pattern)
    options = {}
    for name, linear in linears(task.model).items():
        R = roots.of(name, task.device)
        options[name] = pattern_options(task, name, linear.weight, sizes, R)
    require(task, options, "the patterns keep more, at the least")
    chosen = allocate(options, task.values())
    patterns = {name: pruning.pattern_of(option.kind) for name, option in chosen.items()}
    return {name: pattern for name, pattern in patterns.items() if pattern}

def walked_in_patterns(task: Task, roots: pruning.Roots, patterns: dict) -> dict[str, Tensor]:
    found = {}
    layers = linears(task.model)
    for name, (n, m) in tqdm(patterns.items(), "walk", disable=None):
        W = layers[name].weight
        found[name] = pruning.walk_in_groups(W, roots.of(name, W.device), n, m)
    return found

# --- zeros of the whole model ---

def globally(task: Task) -> tuple[dict[str, Tensor], dict | None]:
    """`walk` and `fisher`: one budget for all matrices. The weights with zeros, and their patterns."""
    config = task.config
    patterns = None
    if config.pattern != "unstructured":
        roots = roots_of(task)
        patterns = chosen_patterns(task, roots)
        found = walked_in_patterns(task, roots, patterns)
    else:
        # where it only begins it need not be exact
        near = pruning.NEAR if config.method == "walk" else 10 * pruning.NEAR
        found = walked(task, config.budget, near)
    if config.method == "fisher":
        scaled = split_zeros(task, found, patterns)
        found = {layer.name: splitting.result(layer) for layer in scaled}
    return found, patterns

def begun(task: Task, start: dict[str, Tensor]) -> list[splitting.Scaled]:
    """The layers of `start` in scaled units, each with its zeros as they stand there."""
    layers = linears(task.model)
    shelf = Shelf(task.folder)
    own = own_shares(task.statistics)
    scaled = splitting.scaled_layers(start, task.statistics, own, shelf, task.device)
    for layer in scaled:
        layer.begin(layers[layer.name].weight, start.pop(layer.name), task.device)
    return scaled

def split_zeros(task: Task, start: dict[str, Tensor], patterns: dict | None) -> list[splitting.Scaled]:
    scaled = begun(task, start)
    parts = [[layer] for layer in scaled] if task.config.uniform else [scaled]
    for part in parts:
        keep = int(task.config.budget * sum(task.sizes[layer.name] for layer in part) + 1e-6)
        splitting.split(part, keep, patterns, task.device)
    return scaled

# --- zeros, block by block ---

def again(task: Task, name: str, W: Tensor, C: Tensor, D: Tensor, pattern) -> Tensor:
    """The zeros of one matrix chosen again, as many as D has, for the weight W and the covariance C (shrunk)
    of what the compressed blocks before it give."""
    G = shrunk(task.statistics.gradients(name).to(task.device), own_shares(task.statistics)[1])
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        layer = splitting.Scaled(name, C, G, Shelf(folder))
        layer.begin(W, D, task.device)
        splitting.split([layer], int(D.count_nonzero()), pattern, task.device)
        return splitting.result(layer)

def in_the_loop(task: Task, found: dict[str, Tensor], patterns: dict | None):
    """Choose zeros and values of every matrix again, with the inputs that the compressed blocks give."""
    def replace(name: str, W: Tensor, C: Tensor) -> nn.Module:
        linear = task.model.get_submodule(name)
        if name not in found:
            return dense_layer(linear, W)
        pattern = {name: patterns[name]} if patterns else None
        return dense_layer(linear, again(task, name, W, C, found.pop(name), pattern))
    closed_loop.run(task.model, task.statistics, task.loop, replace, task.context)

# --- the whole ---

SPARSE = {
    "fisher": globally, "walk": globally,
    "magnitude": one_by_one, "wanda": one_by_one, "sparsegpt": one_by_one,
}

@torch.no_grad()
def to_sparse(task: Task) -> dict[str, dict]:
    """Put zeros into the layers' weights; what each became, as in allocation.json."""
    found, patterns = {}, None
    # what keeps everything has nothing to choose
    if task.config.budget < 1:
        found, patterns = SPARSE[task.config.method](task)
    entries = {}
    for name, linear in linears(task.model).items():
        option = Option(linear.weight.numel(), 0.0)
        if name in found:
            damage = damage_of(task, name, found[name] - linear.weight)
            option = Option(int(found[name].count_nonzero()), damage, "sparse")
        entries[name] = entry_of(option, False)
    if task.config.closed_loop:
        in_the_loop(task, found, patterns)
    else:
        for name, W in found.items():
            dense_layer(task.model.get_submodule(name), W)
    return entries
