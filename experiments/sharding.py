"""Memory of one GPU of a split run, simulated: torch's memory tracker on fake tensors, no GPU and no numbers.

    python experiments/sharding.py --model 7b --linear lost --shard 8          # one line of JSON

Forward and backward pass of 4 and of 8 blocks at their real width; the difference of the two is what a block
adds, from which follows the whole model. Beside it what `train.py --dry_run` estimates. What is simulated has
no waste of an allocator, no buffers of nccl and no second stream, which add some GB on a GPU."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import json
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import MODELS
from nanolost import memory, shard
from nanolost.errors import UserError
from nanolost.flags import command, flag, parse
from nanolost.methods import METHODS, build_model
from nanolost.settings import resolve

def peak(config, mesh) -> dict[str, int]:
    """Bytes by kind at the peak of a forward and backward pass."""
    with torch.device("meta"):
        shapes = build_model(config, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in shapes.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape)))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
        model = shard.split_model(shapes, mesh, torch.bfloat16)
        model.recompute = config.recompute
        tracker = FSDPMemTracker(model)
        tracker.track_inputs(())
        idx = torch.zeros(config.micro_batch, config.seq_len, dtype=torch.int64)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(idx, idx, loss_only=True)[1]
            loss.backward()
        found = tracker.get_tracker_snapshot("peak")
    kinds = next(iter(found.values()))
    return {getattr(kind, "value", str(kind)): size for kind, size in kinds.items()}

@dataclass
class Config:
    model: str = flag("7b", "size", list(MODELS))
    linear: str = flag("lost", "kind of linear layer", METHODS)
    shard: int = flag(8, "processes that hold one copy")
    micro_batch: int = flag(64, "windows of 256 tokens in a forward pass")
    recompute: bool = flag(True, "compute wide activations again in backward")
    few: int = flag(4, "blocks of the smaller simulation")
    many: int = flag(8, "blocks of the larger one")

def simulated(config: Config) -> dict:
    """Bytes of the whole model's pass, and of the estimate beside it."""
    names = ("model", "linear", "shard", "micro_batch", "recompute")
    flags = {name: getattr(config, name) for name in names}
    flags |= {"vocab_size": 50257, "dtype": "bfloat16"}
    mesh = init_device_mesh("cpu", (config.shard,), mesh_dim_names=("shard",))
    depths = config.few, config.many
    peaks = {layers: peak(resolve({**flags, "n_layer": layers}), mesh) for layers in depths}
    few, many = (peaks[layers]["Total"] for layers in depths)
    block = (many - few) / (config.many - config.few)
    full = resolve(flags)
    need = memory.estimate(build_model(full, "meta"), full, full.micro_batch)
    passes = many + block * (full.n_layer - config.many)
    return {
        **vars(config),
        "peaks": peaks,
        "block": block,
        "forward_backward": passes,
        # gradients and moments are there too
        "total": passes + need.gradients + need.moments,
        "estimate": need.total,
    }

def main(config: Config):
    if config.shard < 1 or not 0 < config.few < config.many:
        raise UserError("--shard must be 1 or more, and --few less than --many: give other values")
    dist.init_process_group("fake", rank=0, world_size=config.shard, store=FakeStore())
    print(json.dumps(simulated(config)))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
