"""What the forms of a compressed model share: the model whose layers are to be replaced, its budget, and what
allocation.json says of a layer. `low_rank_layers`, `sparse_layers` and `factored_layers` are the forms, each
one call; `lowrank`, `pruning`, `splitting`, `cap`, `composite` and `allocate` compute for them."""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from model import Llama
from nanolost import closed_loop
from nanolost.allocate import Option, Options, smallest
from nanolost.covariance import Batch, Statistics, linears
from nanolost.errors import UserError
from nanolost.lowrank import Metric, metric_of

# a share of 0.8 that is 0.7999… in floating point is meant as 0.8
ROUNDING = 1e-6

@dataclass
class Task:
    """A model on its device, whose layers are to be replaced in place, and what is known of it."""

    model: Llama
    # of compress.py, settled
    config: object
    # None for the methods that look at no text
    statistics: Statistics | None
    # windows for the closed loop, or for CAP's losses
    loop: list[Batch]
    # for what is too much for the memory
    folder: str
    device: torch.device
    # the autocast of every forward pass
    context: object
    # values of each matrix, by its layer's name
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        for name, linear in linears(self.model).items():
            self.sizes[name] = linear.weight.numel()

    def values(self) -> float:
        """That the budget allows all matrices together."""
        return self.config.budget * sum(self.sizes.values()) + ROUNDING

    def values_of(self, size: int) -> int:
        """Whole values that the budget allows so many."""
        return int(self.config.budget * size + ROUNDING)

    def layers(self, title: str) -> tqdm:
        """Every linear layer of the blocks with its name, under a progress bar."""
        # None: no bar where a file is written, not a terminal
        return tqdm(linears(self.model).items(), title, disable=None)

    def inputs(self, name: str) -> Tensor:
        """C (in, in) of a layer's inputs, on the device."""
        C = self.statistics.inputs(name)
        return C.to(self.device)

    def gradients(self, name: str) -> Tensor:
        """G (out, out) of a layer's output gradients, on the device."""
        G = self.statistics.gradients(name)
        return G.to(self.device)

    def metric(self, method: str, name: str) -> Metric:
        """The one in which `method` measures a layer."""
        return metric_of(method, name, self.statistics, self.device)

    def closed_loop(self, replace: closed_loop.Replace):
        """Replace every layer by what the inputs from the compressed blocks before it say."""
        closed_loop.run(self.model, self.statistics, self.loop, replace, self.context)

def require(task: Task, options: Options, words: str):
    """UserError where even the smallest options are above the budget. words: what they keep so much of."""
    least = smallest(options)
    if least > task.values():
        raise too_small(task, least / sum(task.sizes.values()), words)

def too_small(task: Task, share: float, words: str) -> UserError:
    # four digits, rounded up: the budget that is named must be enough
    enough = share + 5e-5
    return UserError(
        f"--budget {task.config.budget}: {words} {share:.4f} of the values: use {enough:.4f} or more"
    )

# --- what a layer became ---

def dense_layer(linear: nn.Linear, W: Tensor) -> nn.Linear:
    """The layer itself, with the weight W (out, in)."""
    linear.weight.copy_(W)
    return linear

def entry_of(option: Option, pinned: bool = False) -> dict:
    """What allocation.json says of a layer."""
    lost = option.kind == "lost"
    # a low-rank layer has factors alone; a dense one is all non-zeros
    nonzeros = 0 if lost else option.cost
    return {
        "kind": option.kind,
        "rank": option.rank,
        "channels": option.channels,
        "pinned": pinned and lost,
        "nonzeros": nonzeros,
        "values": option.cost,
        "damage": option.damage,
    }

def damage_of(task: Task, name: str, change: Tensor) -> float | None:
    """What a change (out, in) of a layer's weight is predicted to cost, in nats a token; None without
    statistics."""
    if task.statistics is None:
        return None
    # whatever chose it: the one metric whose unit is nats
    return task.metric("fisher", name).damage(change)
