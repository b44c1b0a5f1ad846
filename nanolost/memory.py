"""What one GPU holds and sends in training, estimated from shapes: no GPU is needed, and no memory.

In bytes, for T tokens of a micro-batch, width C, V words and N processes of a copy (--shard N):

    weights, gradients   4 / N of each number       moments   8 / N with AdamW; 4 / N with Muon
    gathered             embedding and head in float32, the block that computes and the next one
    activations          what all blocks keep, and the larger of head and one block in its backward pass

`experiments/sharding.py` holds this against torch's memory tracker on fake tensors. Neither counts what an
allocator wastes, buffers of nccl and the context of CUDA: `SPARE`."""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from model import Llama
from nanolost.budget import count, count_bytes, size
from nanolost.loss import LEAST_ROWS, SLICES
from nanolost.methods import kind_of
from nanolost.settings import divisors, split_batch

# of a GPU's memory, beside 1 GB, that the estimate leaves free
SPARE = 0.1

@dataclass(frozen=True)
class Need:
    """Bytes of one GPU at the peak."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

def words_of(model: Llama) -> list[nn.Parameter]:
    """Embedding and head, once where they are tied."""
    found = []
    for name, p in model.named_parameters():
        if p.dim() >= 2 and not name.startswith("model.layers."):
            found.append(p)
    return found

def count_matrices(parameters) -> int:
    """Numbers in the matrices among some parameters. Vectors are whole everywhere, and too few to count:
    0.01 % of a 7b."""
    return sum(p.numel() for p in parameters if p.dim() >= 2)

def matrices(module: nn.Module) -> int:
    return count_matrices(module.parameters())

def largest_block(model: Llama) -> nn.Module:
    return max(model.model["layers"], key=matrices)

# --- activations ---

def narrow_widths(block: nn.Module, width: int) -> list[int]:
    """Widths of the products that `model.keep_narrow` keeps."""
    found = []
    for module in block.modules():
        if isinstance(module, nn.Linear) or kind_of(module):
            # between the factors, and behind them
            found += [getattr(module, "rank", 0), module.out_features]
    return [w for w in found if 0 < w < width]

def kept_again(block: nn.Module, model: Llama, tokens: int, item: int) -> int:
    """Bytes of a block that is computed twice: its input, narrow products, attention and its denominators."""
    config = model.config
    numbers = sum(narrow_widths(block, config.n_embd)) + config.n_head * config.head_dim
    return tokens * (4 * config.n_embd + item * numbers + 4 * config.n_head)

def kept_all(block: nn.Module, model: Llama, micro: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a block's forward pass, without its weights: of shapes, by running it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import rope_table
    config = model.config
    found = {}
    with FakeTensorMode(), torch.device("cpu"):
        weights = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in block.named_buffers()}
        for name, p in block.named_parameters():
            # in a split block matrices are gathered in the narrow dtype
            kind = dtype if p.dim() >= 2 else torch.float32
            weights[name] = torch.empty(p.shape, dtype=kind, requires_grad=True)
        own = {w.untyped_storage()._cdata for w in weights.values()}
        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                # with the tensor, so that its number is not given again
                found[storage._cdata] = tensor, storage.nbytes()
            return tensor
        x = torch.empty(micro, seq_len, config.n_embd, requires_grad=True)
        rope = rope_table(torch.arange(seq_len), config.head_dim, config.rope_theta, config.rope_scaling)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            torch.func.functional_call(block, weights, (x, rope))
    return sum(nbytes for _, nbytes in found.values())

def head_bytes(model: Llama, tokens: int, item: int) -> int:
    """Of `loss.HeadLoss`: a slice of logits in its dtype and in float32, three more of its size, the weight's
    gradient and that of a slice, the weight and x in the dtype of the product."""
    config = model.config
    rows = min(tokens, max(LEAST_ROWS, tokens // SLICES))
    narrow = item < 4
    logits = rows * config.vocab_size * (16 + item * narrow)
    weight = config.vocab_size * config.n_embd * (4 + item + item * narrow)
    return logits + weight + item * tokens * config.n_embd

def backward_bytes(model: Llama, block: nn.Module, tokens: int, item: int) -> int:
    """Of one block's backward pass, beside what it has kept: gradients of the stream and of the MLP, those of
    its weights before and after they are put together for the sum, and of the head's weight."""
    config = model.config
    stream = 8 * tokens * config.n_embd
    inner = 3 * item * tokens * config.n_ffn
    return stream + inner + (item + 4) * matrices(block) + 4 * config.vocab_size * config.n_embd

def activation_bytes(model: Llama, config, micro: int) -> int:
    dtype = getattr(torch, config.dtype)
    item = dtype.itemsize
    tokens = micro * config.seq_len
    block = largest_block(model)
    every = kept_all(block, model, micro, config.seq_len, dtype)
    kept = [every] * len(model.model["layers"])
    again = 0
    # of one block at a time the rest is there again, in the backward pass
    if config.recompute:
        kept = [kept_again(block, model, tokens, item) for block in model.model["layers"]]
        again = every - kept_again(block, model, tokens, item)
    backward = again + backward_bytes(model, block, tokens, item)
    return sum(kept) + max(head_bytes(model, tokens, item), backward)

# --- all of it ---

def gathered_bytes(model: Llama, config) -> int:
    item = getattr(torch, config.dtype).itemsize
    if config.shard == 1:
        # autocast keeps its copies of the weights for a whole pass
        return item * matrices(model.model["layers"]) if item < 4 else 0
    words = 4 * count_matrices(words_of(model))
    # the block that computes, and the next one
    blocks = 2 * item * matrices(largest_block(model))
    return words + blocks

def estimate(model: Llama, config, micro: int, activations: float | None = None) -> Need:
    """What a GPU of a run needs at its peak. model: on the meta device. activations: where they are known."""
    if activations is None:
        activations = activation_bytes(model, config, micro)
    weights, gradients, moments = count_bytes(model, config.optimizer)
    return Need(
        weights / config.shard,
        gradients / config.shard,
        moments / config.shard,
        gathered_bytes(model, config),
        activations,
    )

def traffic(model: Llama, config, world: int, accumulation: int) -> tuple[float, float]:
    """Bytes that one GPU sends in an update: inside the group that holds a copy, and between the copies."""
    shards = config.shard
    copies = world // shards
    item = getattr(torch, config.dtype).itemsize
    blocks = matrices(model.model["layers"])
    words = count_matrices(words_of(model))
    trained = count_matrices(trained_of(model))
    inside = 0
    if shards > 1:
        # gathered forward and backward, and a sum in float32, each micro-batch
        each = 2 * item * blocks + 2 * 4 * words + 4 * trained
        once = 0
        if config.optimizer == "muon":
            # the blocks' updates, in bfloat16
            once = 2 * count_matrices(trained_of(model.model["layers"]))
        inside = (accumulation * each + once) * (shards - 1) / shards
    # an all-reduce sends everything twice, once an update
    between = 2 * 4 * trained / shards * (copies - 1) / copies
    return inside, between

def trained_of(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]

def fits(need: Need, memory: float) -> bool:
    return need.total * (1 + SPARE) + 1e9 <= memory

def fitting(model: Llama, config, world: int, memory: float) -> dict[int, tuple[int, Need]]:
    """By the values of --shard with which the run fits into `memory` bytes, fewest processes first: the
    largest --micro_batch that does, up to the run's own, and what is needed then."""
    wanted, accumulation = split_batch(config, world)
    share = wanted * accumulation
    found = {}
    left = possible_shards(config, world)
    for micro in sorted((d for d in divisors(share) if d <= wanted), reverse=True):
        if not left:
            break
        # the same for any --shard
        activations = activation_bytes(model, config, micro)
        for shards in left:
            need = estimate(model, replace(config, shard=shards), micro, activations)
            if fits(need, memory):
                found[shards] = micro, need
        left = [shards for shards in left if shards not in found]
    return dict(sorted(found.items()))

def possible_shards(config, world: int) -> list[int]:
    # a dense start needs whole matrices
    return [1] if config.dense_start else divisors(world)

def describe_memory(model: Llama, config, world: int) -> list[str]:
    """The lines of a dry run about one GPU."""
    micro, accumulation = split_batch(config, world)
    need = estimate(model, config, micro)
    inside, between = traffic(model, config, world, accumulation)
    parts = ", ".join(f"{name} {size(value)}" for name, value in vars(need).items())
    members = count(config.shard, "process", "processes")
    copies = count(world // config.shard, "copy", "copies")
    lines = [
        f"a GPU       {size(need.total)} at the peak, estimated: {parts}",
        f"traffic     a GPU sends {size(inside)} inside the {members} of a copy and {size(between)} between "
        f"{copies}, an update",
    ]
    if config.gpu_memory is not None:
        lines.append(describe_fit(model, config, world))
    return lines

def describe_fit(model: Llama, config, world: int) -> str:
    found = fitting(model, config, world, config.gpu_memory * 1e9)
    where = f"{count(world, 'GPU', 'GPUs')} of {config.gpu_memory:g} GB"
    if not found:
        most = possible_shards(config, world)[-1]
        need = estimate(model, replace(config, shard=most), 1)
        less = "" if config.recompute else ", or --recompute true"
        return (f"fits        not on {where}: --shard {most} --micro_batch 1 needs {size(need.total)}, "
                f"and a tenth and 1 GB more; use more GPUs{less}")
    # gathers of a larger --shard hide behind computing, and smaller products are slow: the larger
    # micro-batch comes first, and beside it the fewest processes
    largest = max(micro for micro, _ in found.values())
    first = next(shards for shards, (micro, _) in found.items() if micro == largest)
    choices = []
    # once where they are one
    for shards in dict.fromkeys((first, min(found))):
        micro, need = found[shards]
        choices.append(f"--shard {shards} --micro_batch {micro}, {size(need.total)} at the peak")
    return f"fits        on {where}: {'; or '.join(choices)}"
