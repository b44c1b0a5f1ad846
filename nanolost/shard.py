"""One copy of weights, gradients and moments for N processes together (`--shard N`), by torch's FSDP2.

Matrices are split by rows: of every N processes each holds a part, and a block is gathered while it computes.
What has fewer than two dimensions (norms, biases, γ) stays whole on every process and in the flat vector of
gradients: it is 0.01 % of a 7b, a γ keeps its shape, and a norm its float32 in a block of bfloat16.

The only file that knows DTensor. torch's packages for it are imported where they are used: a run that does
not split never loads them."""
import math

import torch
import torch.nn as nn

from model import Llama
from nanolost.errors import UserError

# --- a tensor that may be split ---

def is_split(tensor: torch.Tensor) -> bool:
    # a DTensor has it, and asking so needs no import
    return hasattr(tensor, "to_local")

def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this process holds, which may be none; of a tensor that is not split all of it."""
    return tensor.to_local() if is_split(tensor) else tensor

def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows. Of a split tensor every process must ask, in the same order."""
    return tensor.full_tensor() if is_split(tensor) else tensor

def rows(tensor: torch.Tensor) -> slice:
    """Which rows of the whole this process holds."""
    if not is_split(tensor):
        return slice(None)
    mesh = tensor.device_mesh["shard"]
    return part_of(tensor.shape[0], mesh.size(), mesh.get_local_rank())

def part_of(height: int, parts: int, number: int) -> slice:
    # as torch.chunk: the last ones may have fewer rows, or none
    size = math.ceil(height / parts)
    return slice(min(number * size, height), min((number + 1) * size, height))

def collected(tensor: torch.Tensor, writer: int) -> torch.Tensor | None:
    """All rows on process `writer`, None on the others, which hold no more than before. Every process must
    ask, in the same order."""
    if not is_split(tensor):
        return tensor
    import torch.distributed as dist
    group = tensor.device_mesh["shard"].get_group()
    ranks = dist.get_process_group_ranks(group)
    if writer not in ranks:
        # it has a copy of its own
        return None
    mine = local(tensor).contiguous()
    if dist.get_rank() != writer:
        if len(mine):
            dist.send(mine, writer, group)
            # waited for: nccl counts a time-out from where it is asked
            mine.flatten()[:1].cpu()
        return None
    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=mine.device)
    for number, rank in enumerate(ranks):
        part = full[part_of(len(full), len(ranks), number)]
        if rank == writer:
            part.copy_(mine)
        elif len(part):
            dist.recv(part, rank, group)
    return full

def split_like(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The split tensor whose rows of this process are `part`, laid out as `tensor` is."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements,
        run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )

# --- a model ---

def check_shards(shards: int, world: int):
    """UserError for a --shard that does not divide the processes."""
    if world == 1 and shards > 1:
        raise UserError(f"--shard {shards} needs {shards} processes, or a multiple, and there is 1: start "
                        "them by torchrun, or with --dry_run give their number by --world_size")
    if world % shards:
        valid = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise UserError(f"--shard {shards} does not divide {world} processes: use one of {valid}")

def mesh_of(job, shards: int):
    """The processes as (world / shards, shards): those of a row hold one copy, those of a column the same
    rows of it. Neighbours hold one copy, which with a launcher that fills a machine after the other stays
    inside a machine."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    kind = job.device.type
    if shards == job.world:
        return DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=("shard",))
    mesh = torch.arange(job.world).view(-1, shards)
    # torch's own meshes would wait for half an hour, whatever --timeout is
    copies, _ = dist.new_subgroups_by_enumeration(mesh.T.tolist(), timeout=job.timeout)
    parts, _ = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout=job.timeout)
    return DeviceMesh.from_group([copies, parts], kind, mesh, mesh_dim_names=("replicate", "shard"))

def split_model(model: Llama, mesh, dtype: torch.dtype) -> Llama:
    """Split the matrices of `model`, which may be on the meta device, over a row of `mesh`, in place. dtype:
    what the blocks compute in, and are gathered in; gradients are summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    vectors = {p for p in model.parameters() if p.dim() < 2}
    how = {"mesh": mesh, "ignored_params": vectors, "reshard_after_forward": True}
    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    # embedding and head, in the root's group, stay float32 as they do without --shard
    for block in model.model["layers"]:
        fully_shard(block, mp_policy=policy, **how)
    fully_shard(model, **how)
    for part in (*model.model["layers"], model):
        # the loss is divided already; and as a sum, since a factor is an operation that gloo has not
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    # an evaluation asks by this name, which gathers as a forward pass does
    register_fsdp_forward_method(model, "losses")
    return model

def is_split_model(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_all_reduce")

def make_room(model: Llama, device: torch.device):
    """Give a model of shapes alone memory on `device`, with whatever it holds. UserError for a buffer that
    nobody would fill."""
    kept = model.state_dict().keys()
    for name, _ in model.named_buffers():
        layer = model.get_submodule(name.rpartition(".")[0])
        # one that loads in its own way may derive it from what it loads, as a pinned layer does
        plain = type(layer)._load_from_state_dict is nn.Module._load_from_state_dict
        if name not in kept and plain:
            raise UserError(f"{name} is a buffer that no checkpoint keeps: register it with persistent=True")
    model.to_empty(device=device)
    # of one parameter that made two
    model.tie_head()

def sum_copies(model: nn.Module, last: bool):
    """Whether the next backward pass adds up gradients over the copies: once an update is enough."""
    if is_split_model(model):
        model.set_requires_all_reduce(last)

def compile_model(model: Llama):
    """Compile in place: parameters keep their names. Of a split model each block by itself: the hooks that
    gather and free it stand around it, outside."""
    if not is_split_model(model):
        model.compile()
        return
    limits = torch._dynamo.config
    # blocks of unlike ranks are a graph each, and the code of them all is one to the compiler, which after 8
    # would go on uncompiled and say so in a warning at most; training and evaluation have one each
    most = 4 * len(model.model["layers"]) + limits.recompile_limit
    limits.recompile_limit = most
    limits.accumulated_recompile_limit = max(most, limits.accumulated_recompile_limit)
    limits.fail_on_recompile_limit_hit = True
    for block in model.model["layers"]:
        block.forward = torch.compile(block.forward)

def forward_uncompiled(model: Llama, idx: torch.Tensor):
    """model(idx) by modules that a hook can look into."""
    if not is_split_model(model):
        return model.forward(idx)
    # the hooks that gather stand around the call, and the blocks may be compiled
    with torch.compiler.set_stance("force_eager"):
        return model(idx)

# --- gradients ---

def split_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters of which this process holds rows."""
    return [p for p in model.parameters() if p.requires_grad and is_split(p)]

def square_of(pieces: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all numbers, () float64."""
    # on the parts: of 672 DTensors torch's own norm took 710 ms of a CPU, so 3
    norms = torch._foreach_norm(pieces) if pieces else [torch.zeros((), device=device)]
    return torch.stack(norms).double().square().sum()

# --- Muon ---

class Muon(torch.optim.Muon):
    """torch's Muon where matrices are split: for equal gradients the same bits as on whole ones. torch's own
    would orthogonalise with partial sums in bfloat16, and be off by 7e-3 after three steps.

    Each update is gathered and orthogonalised by all. owner: by one of the processes, the i-th matrix by the
    i-th of them in turn, which then sends it: less to compute, more to send, the same bits."""

    owner = False

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.update(p, group, number)

    def update(self, p: nn.Parameter, group: dict, number: int):
        # private names; a test holds them against torch's own step
        from torch.optim._muon import _adjust_lr
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        gradient = local(p.grad)
        moment = local(state["momentum_buffer"])
        # the order of torch's own operations, by elements: equal on any part
        moment.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(moment, group["momentum"]) if group["nesterov"] else moment
        update = self.orthogonal(update, p, group, number)
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
        weight = local(p)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-rate)

    def orthogonal(self, update: torch.Tensor, p: nn.Parameter, group: dict, number: int) -> torch.Tensor:
        """This process's rows of the orthogonalised update, of which it brings its rows."""
        from torch.optim._muon import _zeropower_via_newtonschulz
        how = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if not is_split(p):
            return _zeropower_via_newtonschulz(update, *how)
        # the iteration begins in bfloat16 anyway: half of the bytes
        full = whole(split_like(update.bfloat16(), p))
        mesh = p.device_mesh["shard"]
        owner = number % mesh.size()
        if not self.owner or owner == mesh.get_local_rank():
            full = _zeropower_via_newtonschulz(full, *how)
        if self.owner:
            full = full.contiguous()
            torch.distributed.broadcast(full, group=mesh.get_group(), group_src=owner)
        return full[rows(p)]
