"""Layers that are controls only, registered as kinds: they train, save, resume and load as LOST does.

    python experiments/layers.py --linear sltrain --rank 20 …     # train.py, with these kinds too

To load what it has saved, import this file before `checkpoint.load_model` is called."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import itertools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments import product_muon
from lost import LOSTError, LOSTLinear, as_autocast, by_module
from nanolost.errors import as_user_error
from nanolost.methods import LOST_FLAGS, METHODS, Method, convert_to_lost, register

# what --linear offers here beside train.py's own
NAMES = ("sltrain", "scaled", "fullrank")

def script_of(flags: dict) -> str:
    """The script that trains with these flags: train.py where it knows them."""
    ours = flags.get("linear") in NAMES or flags.get("optimizer") == product_muon.NAME
    return "experiments/layers.py" if ours else "train.py"

def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What a method replaces: every linear layer but the head."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found[name] = module
    return found

# --- SLTrain ---

# α / r of their 60M model: 16 / 64 … 32 / 128
SCALE = 0.25

class SLTrainLinear(nn.Module):
    """x (scale · B A + S)ᵀ with S on a random support of `count` of the out × in places (Han et al. 2024,
    arXiv 2406.02214). The constructor leaves all empty, to be filled by `from_linear` or from a checkpoint.

    A (rank, in), B (out, rank), values (count,); support (count,), places of a flattened (out, in)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        count: int,
        scale: float = SCALE,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.count = count
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        # a vector: the optimizer's group of vectors has it, without decay
        self.values = nn.Parameter(torch.empty(count))
        support = torch.empty(count, dtype=torch.int64)
        self.register_buffer("support", support)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, density: float) -> "SLTrainLinear":
        """A layer of the same shape with the published start, which is not the dense layer's weight."""
        out_features, in_features = linear.weight.shape
        count = int(density * out_features * in_features)
        with torch.device(linear.weight.device):
            layer = cls(in_features, out_features, rank, count)
        # there are no values to draw on the meta device
        if not linear.weight.is_meta:
            layer.fill()
        return layer

    @torch.no_grad()
    def fill(self):
        """A and S uniform in ±in^-½, B zero, as published."""
        bound = self.in_features ** -0.5
        self.A.uniform_(-bound, bound)
        self.B.zero_()
        self.values.uniform_(-bound, bound)
        size = self.in_features * self.out_features
        places = torch.randperm(size, device=self.support.device)
        # in the order of memory, which is the quicker one to add in
        places = places[:self.count].sort().values
        self.support.copy_(places)

    def settings(self) -> dict:
        """The constructor's arguments, from which a checkpoint rebuilds the layer."""
        names = ("in_features", "out_features", "rank", "count", "scale")
        return {name: getattr(self, name) for name in names}

    def forward(self, x):
        # (out, in); bfloat16 under autocast
        W = self.scale * (self.B @ self.A)
        values = self.values.to(W.dtype)
        # the whole W is made: that is what it costs in time, not in parameters
        flat = W.flatten().index_add(0, self.support, values)
        return F.linear(x, flat.view_as(W))

def convert_to_sltrain(model: nn.Module, config, part: tuple[int, int]):
    # every process fills all layers: it has to make all draws of the one generator anyway
    for name, linear in linears(model).items():
        with as_user_error(LOSTError):
            rank = by_module(config.rank, name)
            density = by_module(config.sparsity, name)
        model.set_submodule(name, SLTrainLinear.from_linear(linear, rank, density))

register(
    "sltrain",
    SLTrainLinear,
    convert_to_sltrain,
    # their δ
    switches={"sparsity": 0.03},
    uses=("rank", "sparsity"),
    low_rank=("A", "B"),
    sparse=("values",),
)

# --- LOST with random factors that have the size of the SVD's ---

@torch.no_grad()
def convert_to_scaled(model: nn.Module, config, part: tuple[int, int]):
    """LOST from random factors, shrunk so that ‖B A‖_F is that of the best rank-r part of W: what the scale
    of the start is worth without its directions."""
    norms = {}
    # before the weights are gone
    for name, linear in linears(model).items():
        if not linear.weight.is_meta:
            rank = by_module(config.rank, name)
            sigma = torch.linalg.svdvals(linear.weight)
            norms[name] = sigma[:rank].norm()
    convert_to_lost(model, config, part)
    for name, norm in norms.items():
        layer = model.get_submodule(name)
        product = layer.B @ layer.A
        # half of it for each factor
        shrink = (norm / product.norm()).sqrt()
        layer.A *= shrink
        layer.B *= shrink

# a method without a kind of its own: its modules are LOST's
START = {"init": "random"}
METHODS["scaled"] = Method(convert_to_scaled, START, LOST_FLAGS)

# --- LOST with a term of full rank in the place of its channels ---

def equal_blocks(shape: tuple[int, int], blocks: int) -> list[tuple[int, int, int]]:
    """(blocks, out, in) of diagonal blocks of one size in a row, where both sides are cut into `blocks` as
    numpy's array_split does: three sizes at most, and none without outputs."""
    rows, columns = (np.array_split(range(size), blocks) for size in shape)
    sides = [(len(own), len(inputs)) for own, inputs in zip(rows, columns, strict=True)]
    found = []
    for (outputs, inputs), equal in itertools.groupby(sides):
        # with fewer outputs than blocks the last channels have none
        if outputs:
            found.append((len(list(equal)), outputs, inputs))
    return found

class FullRankLinear(nn.Module):
    """y = γ SiLU(x Aᵀ) Bᵀ + (1 − γ) x Dᵀ with the diagonal blocks of an (out, in) matrix for D: the sum has
    full rank, where LOST's channels leave it at r + k. About in / k blocks have as many values as k channels.

    low: the first term. D0 … D2 (blocks · out, in of one): blocks of one size below one another, which to an
    optimizer are a matrix like W_s. The constructor leaves all empty."""

    def __init__(self, in_features, out_features, rank: int, blocks: int, gamma: float, activation: str):
        super().__init__()
        self.own = {
            "in_features": in_features,
            "out_features": out_features,
            "blocks": blocks,
        }
        self.low = LOSTLinear(in_features, out_features, rank, 0, gamma, activation)
        self.sizes = equal_blocks((out_features, in_features), blocks)
        for i, (count, outputs, inputs) in enumerate(self.sizes):
            self.register_parameter(f"D{i}", nn.Parameter(torch.empty(count * outputs, inputs)))

    def settings(self) -> dict:
        # as its constructor has them
        names = ("rank", "gamma", "activation")
        return self.own | {name: getattr(self.low, name) for name in names}

    def pieces(self):
        """Blocks of one size (blocks, out, in of one), and the rows and columns of D that they span."""
        row = column = 0
        for i, (count, outputs, inputs) in enumerate(self.sizes):
            D = getattr(self, f"D{i}").view(count, outputs, inputs)
            yield D, slice(row, row + count * outputs), slice(column, column + count * inputs)
            row += count * outputs
            column += count * inputs

    def forward(self, x):
        wide = as_autocast(x)
        parts = []
        for D, _, columns in self.pieces():
            own = wide[..., columns].unflatten(-1, (len(D), 1, -1))                     # (..., blocks, 1, in)
            # sums of about k products each: too short for a matrix product
            products = own * as_autocast(D)
            parts.append(products.sum(-1).flatten(-2))                                   # (..., blocks · out)
        return self.low(x) + (1 - self.low.gamma) * torch.cat(parts, -1)

    @torch.no_grad()
    def fill(self, residual: torch.Tensor):
        """D from the blocks of W − B A (out, in)."""
        for D, rows, columns in self.pieces():
            count, outputs, inputs = D.shape
            square = residual[rows, columns].view(count, outputs, count, inputs)
            D.copy_(square.diagonal(dim1=0, dim2=2).permute(2, 0, 1))

def convert_to_full_rank(model: nn.Module, config, part: tuple[int, int]):
    # every process fills all layers
    for name, linear in linears(model).items():
        with as_user_error(LOSTError):
            rank = by_module(config.rank, name)
            sparsity = by_module(config.sparsity, name)
            switches = {"gamma": config.gamma, "activation": config.activation}
            k = LOSTLinear.from_linear(linear, rank, sparsity, empty=True).k
            low = LOSTLinear.from_linear(linear, rank, 0.0, **switches)
        # without channels there is no budget for blocks: one value for each output is the least
        blocks = round(linear.in_features / max(1, k))
        with torch.device(linear.weight.device):
            layer = FullRankLinear(linear.in_features, linear.out_features, rank, blocks, **switches)
        layer.low = low
        if not linear.weight.is_meta:
            layer.fill(linear.weight - low.B @ low.A)
        model.set_submodule(name, layer)

register(
    "fullrank",
    FullRankLinear,
    convert_to_full_rank,
    uses=("rank", "sparsity", "gamma", "activation"),
    sparse=("D0", "D1", "D2"),
)

if __name__ == "__main__":
    # here, because --linear offers what is registered when the settings are read
    import train
    from nanolost.flags import command, parse
    from nanolost.settings import Config, resolve

    def main():
        given = parse(Config, sys.argv[1:], train.__doc__)
        train.main(resolve(given))

    command(main)
