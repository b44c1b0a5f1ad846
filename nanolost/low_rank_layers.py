"""A model of low-rank layers: each matrix takes a rank under one budget, then the factors are computed, from
the dense model's statistics or in the closed loop."""
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from lost import LOSTLinear, decompose
from nanolost import closed_loop, lowrank
from nanolost.allocate import Option, allocate, uniform
from nanolost.compression import Task, dense_layer, entry_of, require
from nanolost.covariance import linears
from nanolost.lowrank import Metric, Parts, metric_of, root, shrunk

# ranks are multiples of this where a matrix has as many as two: rows of 16 bytes in bfloat16
STEP = 8
# LOST's share of input channels, for its own start
LOST_CHANNELS = 0.01

# --- the options of a matrix ---

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

# --- the layers ---

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

def open_loop(task: Task, chosen: dict[str, Option]):
    # what stays dense is left as it is
    small = [name for name, option in chosen.items() if option.kind == "lost"]
    for name in tqdm(small, "factors", disable=None):
        W = task.model.get_submodule(name).weight.detach()
        metric = metric_of(task.config.method, name, task.statistics, task.device)
        task.model.set_submodule(name, replacement(task, chosen, name, W, metric))

def in_closed_loop(task: Task, chosen: dict[str, Option]):
    two_sided = task.config.method == "fisher"
    def replace(name: str, W: Tensor, C: Tensor) -> nn.Module:
        K = None
        if two_sided:
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
