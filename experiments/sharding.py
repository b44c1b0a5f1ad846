"""Memory of one GPU of a split run, simulated: torch's memory tracker on fake tensors, no GPU and no numbers.

    python experiments/sharding.py --model 7b --linear lost --shard 8          # one line of JSON

Forward and backward pass of 4 and of 8 blocks at their real width; the difference of the two is what a block
adds, from which follows the whole model. Beside it what `train.py --dry_run` estimates. What is simulated has
no waste of an allocator, no buffers of nccl and no second stream, which add some GB on a GPU."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import argparse
import json

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanolost import shard
from nanolost.methods import build_model
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

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="7b")
    parser.add_argument("--linear", default="lost")
    parser.add_argument("--shard", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=64)
    parser.add_argument("--recompute", default="true")
    parser.add_argument("--layers", default="4,8")
    given = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=given.shard, store=FakeStore())
    mesh = init_device_mesh("cpu", (given.shard,), mesh_dim_names=("shard",))
    found = {}
    few, many = map(int, given.layers.split(","))
    flags = dict(model=given.model, linear=given.linear, vocab_size=50257, micro_batch=given.micro_batch,
                 recompute=given.recompute == "true", shard=given.shard, dtype="bfloat16")
    for layers in (few, many):
        found[layers] = peak(resolve({**flags, "n_layer": layers}), mesh)
    full = resolve(flags)
    totals = {layers: kinds["Total"] for layers, kinds in found.items()}
    block = (totals[many] - totals[few]) / (many - few)
    pass_ = totals[many] + block * (full.n_layer - many)
    print(json.dumps({**vars(given), "peaks": found, "block": block, "forward_backward": pass_}))

if __name__ == "__main__":
    main()
