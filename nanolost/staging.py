"""One stage of LoSA: zeros chosen again in the merged weights, block by block, each with the inputs x̂ that
the blocks before it give now, and how far that leaves each block's output from the dense model's,

    L_i = 1/d Σ_c Σ_tokens ((x_c − x̂_c) / ‖x_c‖)²        c: the d channels of block i's output

(Huang et al. 2025, arXiv 2502.14816). What is zero already stays zero. All matrices of a block have its share
of zeros: together, under one threshold, by `walk` and `fisher`, and each of them by the other methods.

In memory are the model, x̂ of the text, and the covariances and new weights of one block; the dense outputs
are on the disk."""
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from model import Llama
from nanolost import splitting
from nanolost.covariance import (
    GROUP_OF,
    Batch,
    Spool,
    Statistics,
    Sums,
    count_tokens,
    linears_of,
    looking,
    place_of,
    rope_of,
    watch_inputs,
)
from nanolost.losa import kept_counts
from nanolost.pruning import NEAR, Pattern
from nanolost.zeros import Matrices, Weights, fitted_one_by_one, split_zeros, walked, walked_in_patterns

# those of compress.py that look at a matrix alone, and at all of a block
ALONE = ("wanda", "sparsegpt")
TOGETHER = ("walk", "fisher")
METHODS = ALONE + TOGETHER
# of the sequences at a time, for their Gram matrix
POSITIONS = 32

@dataclass
class Masking:
    """What is the same in all stages."""

    model: Llama
    # of METHODS
    method: str
    # what the inputs are seen on, all of one length
    texts: list[Batch]
    # `dense_outputs` on these texts
    dense: Spool
    # of the dense model: the gradients that `walk` and `fisher` weigh rows by; None for the others
    statistics: Statistics | None
    # for what is too much for the memory, while a block is looked at
    folder: str
    device: torch.device
    # the autocast of every forward pass
    context: object
    # effective_of(layer) → its merged weight (out, in), float32
    effective_of: Callable[[nn.Module], Tensor]
    # put(layer, W) makes it W, whose zeros are exact
    put: Callable[[nn.Module, Tensor], None]

# --- the streams ---

class Stream:
    """The states (B, T, C) of each micro-batch on their way through the blocks."""

    def __init__(self, model: Llama, texts: list[Batch], context):
        embed = model.model["embed_tokens"]
        self.texts = texts
        # of the forward passes alone: what is computed from what they show is float32 or more
        self.context = context
        self.states = [embed(batch.ids) for batch in texts]
        # windows of the text are of one length
        ids = texts[0].ids
        self.rope = rope_of(model, ids.shape[1], ids.device)

    def look(self, block: nn.Module, sums: Sums):
        """Run a block for what its layers see; the states stay where they are."""
        with looking(watch_inputs(block, sums.see_input)), self.context:
            for batch, x in zip(self.texts, self.states, strict=True):
                sums.real = batch.real
                block(x, self.rope)

    def advance(self, block: nn.Module):
        """Run a block: its outputs are the states then."""
        with self.context:
            for number, x in enumerate(self.states):
                self.states[number] = block(x, self.rope)

    def rows(self, positions: slice) -> Tensor:
        """The states at some positions, a row a sequence, (N, positions · C), float64."""
        found = []
        for batch, x in zip(self.texts, self.states, strict=True):
            real = batch.real.view(batch.ids.shape)[:, positions]
            # padding is not part of a sequence
            part = x[:, positions] * real[..., None]
            found.append(part.flatten(1))
        return torch.cat(found).double()

def dense_bytes(model: Llama, texts: list[Batch]) -> int:
    """What `dense_outputs` writes."""
    tokens = sum(batch.ids.numel() for batch in texts)
    config = model.config
    # float32
    return 4 * tokens * config.n_embd * config.n_layer

@torch.no_grad()
def dense_outputs(model: Llama, texts: list[Batch], folder: str, context) -> Spool:
    """Keep the output of every block of the dense model, "y003" of the fourth: `dense_bytes`."""
    spool = Spool(folder)
    stream = Stream(model, texts, context)
    for layer, block in enumerate(tqdm(model.model["layers"], "dense outputs", disable=None)):
        stream.advance(block)
        for number, y in enumerate(stream.states):
            spool.put(f"y{layer:03d}", number, y)
    return spool

# --- how alike blocks are ---

def gram(stream: Stream) -> Tensor:
    """X Xᵀ (N, N) of the states as they are now, a sequence a row of X, float64 on the CPU."""
    total = 0
    length = stream.texts[0].ids.shape[1]
    # all positions at once would be the states twice more
    for start in range(0, length, POSITIONS):
        X = stream.rows(slice(start, start + POSITIONS))
        total = total + X @ X.T
    return total.cpu()

@torch.no_grad()
def similarities(model: Llama, texts: list[Batch], context) -> Tensor:
    """Gram matrices (blocks, N, N) of the inputs of all blocks on the N sequences of the texts: what
    `losa.cka` takes."""
    grams = []
    stream = Stream(model, texts, context)
    for block in tqdm(model.model["layers"], "similarities", disable=None):
        grams.append(gram(stream))
        stream.advance(block)
    return torch.stack(grams)

# --- zeros of a block ---

class Seen:
    """`Statistics` of one block as its inputs are now, with the gradients of the dense model."""

    def __init__(self, means: dict[str, Tensor], tokens: int, dense: Statistics | None):
        self.means = means
        self.dense = dense
        self.tokens = tokens, dense.tokens[1] if dense else 0

    def inputs(self, name: str) -> Tensor:
        """C (in, in) of the layer `name`, float32."""
        _, inner = place_of(name)
        return self.means[f"C.{GROUP_OF[inner]}"]

    def gradients(self, name: str) -> Tensor:
        """G (out, out) of the layer `name`, float32."""
        return self.dense.gradients(name)

def together(matrices: Matrices, method: str, kept: int, pattern: Pattern | None) -> Weights:
    """All matrices under one threshold, by `walk` or `fisher`."""
    patterns = None
    share = kept / sum(W.numel() for W in matrices.weights.values())
    if pattern:
        patterns = dict.fromkeys(matrices.weights, pattern)
        found = walked_in_patterns(matrices, matrices.roots(method), patterns)
    else:
        # where it only begins it need not be exact
        near = NEAR if method == "walk" else 10 * NEAR
        found = walked(matrices, share, near)
    if method == "fisher":
        scaled = split_zeros(matrices, found, share, patterns)
        found = {layer.name: splitting.result(layer) for layer in scaled}
    return found

def count_nonzeros(weights: Weights) -> int:
    return sum(int(W.count_nonzero()) for W in weights.values())

def chosen(matrices: Matrices, method: str, kept: int, pattern: Pattern | None) -> Weights:
    """The weights with their zeros. kept: how many entries may stay, where there is no pattern."""
    if not pattern and kept >= count_nonzeros(matrices.weights):
        # nothing else has to go
        return matrices.weights
    choose = together if method in TOGETHER else fitted_one_by_one
    return choose(matrices, method, kept, pattern)

def masked_block(
    task: Masking,
    layer: int,
    block: nn.Module,
    stream: Stream,
    kept: int,
    pattern: Pattern | None,
) -> int:
    """Give a block its zeros; how many entries stay."""
    sums = Sums()
    stream.look(block, sums)
    tokens, _ = count_tokens(task.texts)
    # no gradients were seen
    seen = Seen(sums.means((tokens, 0)), tokens, task.statistics)
    layers = linears_of(layer, block)
    weights = {name: task.effective_of(linear) for name, linear in layers.items()}
    # eigenvectors and roots of one block, which no other one reads
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        matrices = Matrices(weights, seen, folder, task.device, nested=True)
        found = chosen(matrices, task.method, kept, pattern)
    for name, W in found.items():
        # an update of a weight that is gone would not merge
        assert not W[weights[name] == 0].any(), name
        task.put(layers[name], W)
    return count_nonzeros(found)

# --- a stage ---

class Difference:
    """Of a block's outputs x̂ from the dense ones, by channel, (C,) float64."""

    def __init__(self):
        self.squares = 0
        self.sizes = 0

    def add(self, dense: Tensor, small: Tensor, real: Tensor):
        """dense, small: x and x̂ (B, T, C) of a micro-batch."""
        x = dense.flatten(0, 1)[real].double()
        gap = x - small.flatten(0, 1)[real].double()
        self.squares = self.squares + gap.square().sum(0)
        self.sizes = self.sizes + x.square().sum(0)

    def mean(self) -> float:
        """L of the block."""
        # a channel that is always zero in the dense model has no size to compare with
        known = self.sizes > 0
        shares = self.squares[known] / self.sizes[known]
        return (shares.sum() / len(known)).item()

def block_error(task: Masking, layer: int, stream: Stream) -> float:
    """L of the block whose output the stream is at."""
    difference = Difference()
    for number, batch in enumerate(task.texts):
        dense = task.dense.read(f"y{layer:03d}", number, task.device)
        difference.add(dense, stream.states[number], batch.real)
    return difference.mean()

def sizes_of(model: Llama) -> list[int]:
    """Entries of each block's matrices."""
    sizes = []
    for layer, block in enumerate(model.model["layers"]):
        layers = linears_of(layer, block)
        sizes.append(sum(linear.weight.numel() for linear in layers.values()))
    return sizes

@torch.no_grad()
def zeros_of(model: Llama, effective_of: Callable[[nn.Module], Tensor]) -> list[float]:
    """The share of zeros of each block, of the weights as they are merged: the floors of `losa.rates`."""
    found = []
    sizes = sizes_of(model)
    for layer, block in enumerate(model.model["layers"]):
        kept = 0
        # a matrix at a time: merged weights of a whole block are not needed together
        for linear in linears_of(layer, block).values():
            kept += int(effective_of(linear).count_nonzero())
        found.append(1 - kept / sizes[layer])
    return found

@torch.no_grad()
def choose_zeros(
    task: Masking,
    rates: list[float],
    patterns: list[Pattern] | None = None,
) -> tuple[float, list[float]]:
    """Choose the zeros of every block again: the share of zeros of the whole model, and the error L of each
    block. rates: the share of each block, as of `losa.rates`; patterns: N:M of each, in place of a share."""
    sizes = sizes_of(task.model)
    counts = kept_counts(rates, sizes)
    errors = []
    wanted = 0
    kept = 0
    stream = Stream(task.model, task.texts, task.context)
    for layer, block in enumerate(tqdm(task.model.model["layers"], task.method, disable=None)):
        pattern = patterns[layer] if patterns else None
        # a walk ends a little below its count: the next block keeps what it leaves
        wanted += counts[layer]
        kept += masked_block(task, layer, block, stream, wanted - kept, pattern)
        stream.advance(block)
        errors.append(block_error(task, layer, stream))
    return 1 - kept / sum(sizes), errors
