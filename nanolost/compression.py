"""The two forms of a compressed model: which methods there are, and what each does with all the matrices of a
model under one budget. compress.py asks, `lowrank`, `pruning`, `splitting`, `cap` and `allocate` compute."""
import tempfile
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from lost import LOSTLinear, SparseLowRankLinear, decompose
from model import Llama
from nanolost import cap, closed_loop, lowrank, pruning, splitting
from nanolost.allocate import Option, allocate, smallest, uniform
from nanolost.composite import Composite
from nanolost.covariance import Batch, Statistics, linears
from nanolost.errors import UserError
from nanolost.lowrank import Metric, Parts, metric_of, root, shrunk
from nanolost.shelf import Shelf

# ranks are multiples of this where a matrix has as many as two: rows of 16 bytes in bfloat16
STEP = 8
# LOST's share of input channels, for its own start
LOST_CHANNELS = 0.01
# the share of its values that OATS gives the product (its own default)
OATS_RANK = 0.25
# what is added to C and G of their own diagonals before they are split: more tokens need less
OWN_FEW = (0.05, 0.30)
OWN_MANY = (0.03, 0.10)
MANY = 32_768

@dataclass
class Task:
    """A model on its device, whose layers are to be replaced in place, and what is known of it. loop: windows
    for the closed loop, or for CAP's losses. folder: for what is too much for the memory."""

    model: Llama
    config: object
    statistics: Statistics | None
    loop: list[Batch]
    folder: str
    device: torch.device
    context: object
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.sizes = {name: linear.weight.numel() for name, linear in linears(self.model).items()}

    def values(self) -> float:
        """That the budget allows; a share of 0.8 that is 0.7999… in floating point is meant as 0.8."""
        return self.config.budget * sum(self.sizes.values()) + 1e-6

# --- low rank: the options of a matrix ---

def rank_steps(full: int) -> range:
    step = STEP if full >= 2 * STEP else 1
    return range(step, full, step)

def rank_cost(shape, rank: int, channels: int, pinned: bool) -> int:
    m, n = shape
    # pinned: r of the inputs enter as they are
    saved = rank * rank if pinned else 0
    return rank * (m + n) - saved + channels * m

def options_of(task: Task, name: str, W: Tensor) -> list[Option]:
    """What the layer `name` may become: each rank, with each offered share of channels, or dense."""
    config = task.config
    shape = W.shape
    found = [Option(W.numel(), 0.0)]
    if config.method == "lost":
        k = max(1, int(LOST_CHANNELS * shape[1]))
        offered = {k: torch.zeros(min(shape) + 1)}
    else:
        metric = metric_of(config.method, name, task.statistics, task.device)
        offered = {0: lowrank.curve(W, metric)}
        for share in config.channels or ():
            k = max(1, int(share * shape[1]))
            # chosen beside a product of about the rank that the budget leaves
            rank = max(1, int(config.budget * W.numel() / sum(shape)))
            offered[k] = lowrank.curve_beside(W, metric, min(rank, min(shape) - 1), k)
    for k, damages in offered.items():
        damages = damages.tolist()
        for rank in rank_steps(min(shape)):
            cost = rank_cost(shape, rank, k, config.pinned)
            if cost < W.numel() and rank < len(damages):
                found.append(Option(cost, damages[rank], "lost", rank, k))
    return found

def require(task: Task, options: dict[str, list[Option]], words: str):
    """UserError where even the smallest options are above the budget."""
    least = smallest(options)
    if least > task.values():
        share = least / sum(task.sizes.values())
        raise UserError(f"--budget {task.config.budget}: {words} {share:.4f} of the values: use "
                        f"{share + 5e-5:.4f} or more")

def chosen_options(task: Task) -> dict[str, Option]:
    """The form of every matrix. UserError for a budget that cannot be met."""
    config = task.config
    options = {}
    for name, linear in tqdm(linears(task.model).items(), "curves", disable=None):
        options[name] = options_of(task, name, linear.weight)
    require(task, options, "the smallest ranks keep")
    # methods that are no damage in nats have no common unit
    alike = config.method != "fisher" if config.uniform is None else config.uniform
    if alike:
        return uniform(options, task.sizes, config.budget)
    return allocate(options, task.values())

# --- low rank: the layers ---

def lost_layer(linear: nn.Linear, parts: Parts, pinned: bool) -> LOSTLinear:
    """A layer without activation that computes with these parts; the bias goes on."""
    k = len(parts.channels)
    # eq. 7 scales the two paths by γ and 1 − γ: folded into the factors
    gamma = 0.5 if k else 1.0
    A, B = lowrank.balanced(parts.A, parts.B)
    tensors = {"A": A, "B": B / gamma}
    if k:
        tensors["W_s"] = parts.W_s / (1 - gamma)
        tensors["index"] = parts.channels
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    sizes = linear.in_features, linear.out_features, len(A), k
    device = linear.weight.device
    layer = LOSTLinear(*sizes, gamma, "none", bias=linear.bias is not None, device=device)
    layer.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()})
    layer = layer.as_pinned() if pinned else layer
    return layer.requires_grad_(False)

def dense_layer(linear: nn.Linear, W: Tensor) -> nn.Linear:
    linear.weight.copy_(W)
    return linear

def lost_start(W: Tensor, option: Option) -> Parts:
    """LOST's own start, which looks at no data: the largest directions, and the rest of the channels that
    they leave most of."""
    found = decompose(W, option.rank, option.channels, sparse_init="residual")
    A, B, W_s = (part.double() for part in (found.A, found.B, found.W_s))
    return Parts(A, B, found.index.long(), W_s)

def replacement(task: Task, chosen: dict[str, Option], name: str, W: Tensor, metric: Metric) -> nn.Module:
    """The layer that takes the place of `name`, for the weight W in this metric."""
    option = chosen[name]
    linear = task.model.get_submodule(name)
    if option.kind == "dense":
        return dense_layer(linear, W)
    if task.config.method == "lost":
        parts = lost_start(W, option)
    else:
        parts = lowrank.split(W, metric, option.rank, option.channels)
    return lost_layer(linear, parts, task.config.pinned)

def looks_at_outputs(task: Task, name: str) -> bool:
    """Whether the layer `name` is cut in the metric of both sides."""
    kind = name.rpartition(".")[2]
    return task.config.method == "fisher" and kind not in (task.config.one_sided or "").split(",")

def open_loop(task: Task, chosen: dict[str, Option]):
    # what stays dense is left as it is
    small = [name for name, option in chosen.items() if option.kind == "lost"]
    for name in tqdm(small, "factors", disable=None):
        W = task.model.get_submodule(name).weight.detach()
        metric = metric_of(task.config.method, name, task.statistics, task.device)
        if not looks_at_outputs(task, name):
            metric = Metric(None, metric.L)
        task.model.set_submodule(name, replacement(task, chosen, name, W, metric))

def in_closed_loop(task: Task, chosen: dict[str, Option]):
    def replace(name: str, W: Tensor, C: Tensor) -> nn.Module:
        K = None
        if looks_at_outputs(task, name):
            K = root(shrunk(task.statistics.gradients(name).to(task.device)))
        return replacement(task, chosen, name, W, Metric(K, root(C)))
    closed_loop.run(task.model, task.statistics, task.loop, replace, task.context)

@torch.no_grad()
def to_low_rank(task: Task) -> dict[str, dict]:
    """Replace the layers by low-rank ones; what each became, as in allocation.json."""
    chosen = chosen_options(task)
    if task.config.closed_loop:
        in_closed_loop(task, chosen)
    else:
        open_loop(task, chosen)
    return {name: entry_of(option, task.config.pinned) for name, option in chosen.items()}

def entry_of(option: Option, pinned: bool) -> dict:
    lost = option.kind == "lost"
    return {
        "kind": option.kind,
        "rank": option.rank,
        "channels": option.channels,
        "pinned": pinned and lost,
        "nonzeros": option.cost if not lost else 0,
        "values": option.cost,
        "damage": option.damage,
    }

# --- zeros ---

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

# --- zeros beside a low-rank part ---

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

SPARSE = {
    "fisher": globally, "walk": globally,
    "magnitude": one_by_one, "wanda": one_by_one, "sparsegpt": one_by_one,
}

@torch.no_grad()
def to_sparse(task: Task) -> dict[str, dict]:
    """Put zeros into the layers' weights; what each became, as in allocation.json."""
    if task.config.factors and task.config.budget < 1:
        return to_factors(task)
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

def damage_of(task: Task, name: str, change: Tensor) -> float | None:
    """What a change of a layer's weight is predicted to cost, in nats a token; None without statistics."""
    if task.statistics is None:
        return None
    return metric_of("fisher", name, task.statistics, task.device).damage(change)
