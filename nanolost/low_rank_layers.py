"""A model of low-rank layers: each matrix takes a rank under one budget, then the factors are computed, from
the dense model's statistics or in the closed loop."""
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from lost import LOSTLinear, decompose
from nanolost import lowrank
from nanolost.allocate import Chosen, Option, allocate, uniform
from nanolost.compression import Task, dense_layer, entry_of, require
from nanolost.lowrank import Metric, Parts, root, shrunk

# ranks are multiples of this where a matrix has as many as two: rows of 16 bytes in bfloat16
STEP = 8
# the share of input channels that LOST's own start gives values of their own
LOST_CHANNELS = 0.01

# --- the options of a matrix ---

def rank_steps(full: int) -> range:
    """The ranks that a matrix of rank `full` is offered."""
    step = STEP if full >= 2 * STEP else 1
    return range(step, full, step)

def rank_cost(shape: tuple[int, int], rank: int, channels: int, pinned: bool) -> int:
    """Values of a layer of this shape (out, in)."""
    m, n = shape
    # r of the inputs enter a pinned layer as they are: an identity that nobody stores
    saved = rank * rank if pinned else 0
    return rank * (m + n) - saved + channels * m

def channel_count(share: float, inputs: int) -> int:
    return max(1, int(share * inputs))

def rank_in_budget(W: Tensor, budget: float) -> int:
    """About the rank that a share `budget` of the values pays for, below the full one."""
    values = budget * W.numel()
    rank = int(values / sum(W.shape))
    return min(max(1, rank), min(W.shape) - 1)

def curves_of(task: Task, name: str, W: Tensor) -> dict[int, Tensor]:
    """What each rank loses of the layer `name`, (ranks,), by the number of channels beside the product."""
    config = task.config
    if config.method == "lost":
        # its start looks at no loss: every rank is as good as another
        k = channel_count(LOST_CHANNELS, W.shape[1])
        return {k: torch.zeros(min(W.shape) + 1)}
    metric = task.metric(config.method, name)
    curves = {0: lowrank.curve(W, metric)}
    for share in config.channels or ():
        k = channel_count(share, W.shape[1])
        # channels are chosen beside one product, which is of about the rank that they will have
        rank = rank_in_budget(W, config.budget)
        curves[k] = lowrank.curve_beside(W, metric, rank, k)
    return curves

def options_of(task: Task, name: str, W: Tensor) -> list[Option]:
    """What the layer `name` may become: each rank, with each offered share of channels, or dense."""
    pinned = task.config.pinned
    dense = Option(W.numel(), 0.0)
    found = [dense]
    for k, curve in curves_of(task, name, W).items():
        # with k channels the other columns may be fewer than the rank
        damages = curve.tolist()
        for rank in rank_steps(min(W.shape)):
            if rank >= len(damages):
                break
            cost = rank_cost(W.shape, rank, k, pinned)
            # from there on the dense matrix is cheaper and loses nothing
            if cost < dense.cost:
                option = Option(cost, damages[rank], "lost", rank, k)
                found.append(option)
    return found

def chosen_options(task: Task) -> Chosen:
    """The form of every matrix. UserError for a budget that cannot be met."""
    config = task.config
    options = {}
    for name, linear in task.layers("curves"):
        options[name] = options_of(task, name, linear.weight)
    require(task, options, "the smallest ranks keep")
    alike = config.uniform
    if alike is None:
        # the damages of the other methods are in no unit that matrices share
        alike = config.method != "fisher"
    # the same share of each, or one budget for which all compete
    if alike:
        return uniform(options, task.sizes, config.budget)
    return allocate(options, task.values())

# --- the layers ---

def lost_layer(linear: nn.Linear, parts: Parts, pinned: bool) -> LOSTLinear:
    """A layer without activation that computes with these parts; the bias goes on."""
    k = len(parts.channels)
    # eq. 7 of lost.py scales the two paths by γ and 1 − γ: folded into the factors
    gamma = 0.5 if k else 1.0
    A, B = lowrank.balanced(parts.A, parts.B)
    tensors = {"A": A, "B": B / gamma}
    if k:
        tensors["W_s"] = parts.W_s / (1 - gamma)
        tensors["index"] = parts.channels
    biased = linear.bias is not None
    if biased:
        tensors["bias"] = linear.bias
    device = linear.weight.device
    sizes = linear.in_features, linear.out_features, len(A), k
    layer = LOSTLinear(*sizes, gamma, "none", bias=biased, device=device)
    # float64 until here, rounded once
    layer.load_state_dict(tensors)
    if pinned:
        layer = layer.as_pinned()
    return layer.requires_grad_(False)

def lost_start(W: Tensor, option: Option) -> Parts:
    """LOST's own start, which looks at no data: the largest directions, and the rest of the channels that
    they leave most of."""
    # the paper's W_s is the weight's own columns, which would count what B A has of them twice
    found = decompose(W, option.rank, option.channels, sparse_init="residual")
    return Parts(
        found.A.double(),
        found.B.double(),
        found.index.long(),
        found.W_s.double(),
    )

def replacement(task: Task, name: str, option: Option, W: Tensor, metric: Metric) -> nn.Module:
    """The layer that takes the place of `name`, for the weight W (out, in) in this metric."""
    linear = task.model.get_submodule(name)
    # in the closed loop its weight is another one than the dense model's
    if option.kind == "dense":
        return dense_layer(linear, W)
    if task.config.method == "lost":
        parts = lost_start(W, option)
    else:
        parts = lowrank.split(W, metric, option.rank, option.channels)
    return lost_layer(linear, parts, task.config.pinned)

def method_of(task: Task, name: str) -> str:
    """The method by whose metric the layer `name` is cut."""
    _, _, kind = name.rpartition(".")
    one_sided = (task.config.one_sided or "").split(",")
    # of the inputs alone
    return "svdllm" if kind in one_sided else task.config.method

def open_loop(task: Task, chosen: Chosen):
    """Replace each layer by what the dense model's statistics say of it."""
    # names alone: a dense layer's memory is free once another has its place
    for name in tqdm(list(chosen), "factors", disable=None):
        option = chosen[name]
        # what stays dense is left as it is
        if option.kind == "dense":
            continue
        linear = task.model.get_submodule(name)
        W = linear.weight.detach()
        metric = task.metric(method_of(task, name), name)
        layer = replacement(task, name, option, W, metric)
        task.model.set_submodule(name, layer)

def in_closed_loop(task: Task, chosen: Chosen):
    """Replace each layer by what the inputs that the compressed blocks give it say."""
    def replace(name: str, W: Tensor, C: Tensor) -> nn.Module:
        K = None
        if method_of(task, name) == "fisher":
            # gradients stay those of the dense model: the blocks behind are not compressed yet
            G = task.gradients(name)
            K = root(shrunk(G))
        metric = Metric(K, root(C))
        return replacement(task, name, chosen[name], W, metric)
    task.closed_loop(replace)

@torch.no_grad()
def to_low_rank(task: Task) -> dict[str, dict]:
    """Replace the layers by low-rank ones; what each became, as in allocation.json."""
    chosen = chosen_options(task)
    if task.config.closed_loop:
        in_closed_loop(task, chosen)
    else:
        open_loop(task, chosen)
    entries = {}
    for name, option in chosen.items():
        entries[name] = entry_of(option, task.config.pinned)
    return entries
