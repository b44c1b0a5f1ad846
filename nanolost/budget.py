"""What a run costs, counted from the modules present: parameters, memory, compute, tokens."""
import resource
import sys

import torch

from model import Llama
from nanolost.counts import count_flops, count_multiplies, count_parameters
from nanolost.methods import count_by_path

# FLOPs a second, dense bf16, from the makers' data sheets
PEAK_FLOPS = {
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12,
    "4090": 165e12,
}

def count_bytes(model: Llama, optimizer: str) -> tuple[int, int, int]:
    """Bytes of weights (buffers included), of gradients, and of the optimizer's moments."""
    total = count_parameters(model)
    # a frozen parameter has neither
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = [p for p in model.model["layers"].parameters() if p.requires_grad]
    inner = sum(p.numel() for p in blocks if p.dim() >= 2)
    # AdamW keeps two moments, Muon one
    moments = 2 * trained - (inner if optimizer == "muon" else 0)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return 4 * total + buffers, 4 * trained, 4 * moments

def checkpoint_bytes(model: Llama, optimizer: str) -> int:
    """Size of one checkpoint; a model on the meta device will do."""
    weights, _, moments = count_bytes(model, optimizer)
    return weights + moments

def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second that one device has at the most, None where unknown."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)

def peak_memory(device: torch.device) -> int:
    """Bytes at the most so far: of the GPU's allocator, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

# --- in words ---

def size(count: int) -> str:
    """Bytes in the unit that a person reads: 0.74 GB, 3.1 MB."""
    unit, name = (1e9, "GB") if count >= 1e8 else (1e6, "MB")
    return f"{count / unit:.3g} {name}"

def count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"

def describe_sizes(model: Llama, config) -> list[str]:
    low_rank, sparse, dense = count_by_path(model)
    weights, gradients, moments = count_bytes(model, config.optimizer)
    total = low_rank + sparse + dense
    # of a model that several processes hold together each has its part
    shards = getattr(config, "shard", 1)
    mine = [number / shards for number in (weights, gradients, moments)]
    part = f", one of the {shards} that hold a copy," if shards > 1 else ""
    return [
        f"parameters  {total:,} = low-rank {low_rank:,} + sparse {sparse:,} + dense {dense:,}",
        f"compute     {count_multiplies(model):,} multiplications a token forward, "
        f"{count_flops(model):,} FLOPs a token of training",
        f"memory      {size(sum(mine))} a process{part} = weights {size(mine[0])} + gradients "
        f"{size(mine[1])} + moments {size(mine[2])}; activations come on top",
        f"checkpoint  {size(weights + moments)}, the newest {config.keep} are kept",
    ]

def describe_batch(config, world: int, accumulation: int) -> list[str]:
    total = config.steps * config.batch_tokens
    processes = count(world, "process", "processes")
    # a dry run has not chosen them yet
    threads = ""
    if config.threads:
        threads = count(config.threads, "thread", "threads") + ", "
    return [
        f"device      {config.device}, {threads}{config.dtype}, compile {config.compile}",
        f"tokens      {total:,} = {config.steps:,} updates × {processes} × {accumulation} "
        f"micro-batches × {config.micro_batch} samples × {config.seq_len}",
    ]

def describe_text(config, samples: int) -> str:
    """How often a run reads the training text, of so many samples."""
    wanted = config.steps * config.batch_tokens // config.seq_len
    # a small model on a small text learns it by heart after a few times
    return f"text        {samples * config.seq_len:,} tokens for training, read {wanted / samples:.2g} times"

def describe(model: Llama, config, world: int, accumulation: int) -> list[str]:
    """The lines that a run begins with."""
    return [*describe_sizes(model, config), *describe_batch(config, world, accumulation)]

def describe_dense(model: Llama, config) -> list[str]:
    """The dense model of the same shape beside it, so that the reader sees what the method saves."""
    # on the meta device: no memory, also for 13b
    with torch.device("meta"):
        dense = Llama(model.config)
    total = sum(count_bytes(dense, config.optimizer))
    share = count_parameters(model) / count_parameters(dense)
    compute = count_flops(model) / count_flops(dense)
    return [
        f"dense       {count_parameters(dense):,} parameters, {count_multiplies(dense):,} multiplications, "
        f"{size(total)}: this model has {share:.2f} of the parameters and {compute:.2f} of the FLOPs",
    ]
