"""What the forms of a compressed model share: the model whose layers are to be replaced, its budget, and what
allocation.json says of a layer. `low_rank_layers`, `sparse_layers` and `factored_layers` are the forms, each
one call; `lowrank`, `pruning`, `splitting`, `cap`, `composite` and `allocate` compute for them."""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from model import Llama
from nanolost.allocate import Option, smallest
from nanolost.covariance import Batch, Statistics, linears
from nanolost.errors import UserError
from nanolost.lowrank import metric_of

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

def require(task: Task, options: dict[str, list[Option]], words: str):
    """UserError where even the smallest options are above the budget."""
    least = smallest(options)
    if least > task.values():
        share = least / sum(task.sizes.values())
        raise UserError(f"--budget {task.config.budget}: {words} {share:.4f} of the values: use "
                        f"{share + 5e-5:.4f} or more")

# --- what a layer became ---

def dense_layer(linear: nn.Linear, W: Tensor) -> nn.Linear:
    linear.weight.copy_(W)
    return linear

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

def damage_of(task: Task, name: str, change: Tensor) -> float | None:
    """What a change of a layer's weight is predicted to cost, in nats a token; None without statistics."""
    if task.statistics is None:
        return None
    return metric_of("fisher", name, task.statistics, task.device).damage(change)
