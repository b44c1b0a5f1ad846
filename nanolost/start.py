"""The weights of step 0, one matrix at a time: drawn, or read from a folder, decomposed, and sent to all.

Of n processes the i-th makes the i-th of every n modules, so that the decompositions are shared, and each
keeps of a module what it holds. Beside that a process has one whole module of its own and one of another: no
dense model is ever there. What a module becomes depends on its name and the seed, not on who makes it."""
import itertools

import torch
import torch.nn as nn

from model import Llama, first_values
from nanolost import shard
from nanolost.checkpoint import fitting_files
from nanolost.errors import UserError
from nanolost.methods import METHODS, build_model, keep_function, kind_of, model_config, owners
from nanolost.tensors import TensorFiles

class Drawn:
    """Dense weights of a fresh model by name: they are drawn when they are asked for."""

    def __init__(self, config):
        self.seed = config.seed
        self.std = config.init_std
        with torch.device("meta"):
            self.shapes = Llama(model_config(config))

    def read(self, name: str) -> torch.Tensor:
        p = torch.empty(self.shapes.get_parameter(name).shape)
        first_values(name, p, self.std, self.seed)
        return p

class Folder:
    """Dense weights of a folder by name, float32. UserError if they are not those of `shapes`."""

    def __init__(self, folder: str, shapes: Llama):
        self.files: TensorFiles = fitting_files(folder, shapes)
        self.shapes = shapes

    def read(self, name: str) -> torch.Tensor:
        return self.files.read(name).float()

def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module itself, by name; of a kind of layer also those of modules inside."""
    inside = kind_of(module) is not None
    named = module.named_parameters(recurse=inside), module.named_buffers(recurse=inside)
    return dict(itertools.chain(*named))

def units_of(model: Llama) -> list[str]:
    """Names of the modules that have tensors, a tied head left out."""
    found = []
    for name, module in model.named_modules():
        inside = found and name.startswith(f"{found[-1]}.") and kind_of(model.get_submodule(found[-1]))
        if own_tensors(module) and not inside:
            found.append(name)
    # it is the embedding's tensor under a second name
    if model.config.tie_embeddings:
        found.remove("lm_head")
    return found

@torch.no_grad()
def made(name: str, weights, config, device, faithful: bool) -> dict[str, torch.Tensor]:
    """The tensors of a layer that replaces the dense one `name`, on `device`. faithful: see
    `keep_function`."""
    shape = weights.shapes.get_submodule(name)
    # the usual constructor would draw a weight, and hold it beside the one that comes
    with torch.device("meta"):
        linear = nn.Linear(shape.in_features, shape.out_features, shape.bias is not None)
    for key, p in list(linear.named_parameters()):
        tensor = weights.read(f"{name}.{key}").to(device)
        setattr(linear, key, nn.Parameter(tensor, p.requires_grad))
    layer = METHODS[config.linear].one(name, linear, config)
    if faithful:
        keep_function(layer, config)
    return layer.state_dict()

def check_made(name: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    """UserError for a layer whose tensors are not those that it has in the model, which its kind makes by
    another function: the processes would wait for each other's bytes."""
    shapes = {key: (list(tensor.shape), tensor.dtype) for key, tensor in found.items()}
    for key, tensor in wanted.items():
        own = list(tensor.shape), tensor.dtype
        if shapes.get(key) != own:
            raise UserError(f"{name}.{key} is {shapes.get(key)} as the `one` of its kind makes it, and {own} "
                            "as its `convert` does: let both make the same")

class Filling:
    """Fills `model`, which has memory for what this process holds. weights: of the dense model, by name."""

    def __init__(self, model: Llama, weights, config, job, faithful: bool):
        self.model = model
        self.weights = weights
        self.config = config
        self.job = job
        self.faithful = faithful

    def make(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of the module `name`, whole."""
        module = self.model.get_submodule(name)
        if kind_of(module):
            found = made(name, self.weights, self.config, self.job.device, self.faithful)
            check_made(name, found, own_tensors(module))
            return found
        found = {}
        for key in own_tensors(module):
            tensor = self.weights.read(f"{name}.{key}")
            found[key] = tensor.to(self.job.device)
        return found

    def attempt(self, names: list[str]) -> dict[str, torch.Tensor]:
        """This process's one of the modules `names`; a UserError of any is raised on all."""
        tensors, error = {}, None
        # the others would wait for what this one does not send
        try:
            if self.job.rank < len(names):
                tensors = self.make(names[self.job.rank])
        except UserError as e:
            error = str(e)
        for fault in self.job.gather(error, patient=True):
            if fault is not None:
                raise UserError(fault)
        return tensors

    @torch.no_grad()
    def run(self):
        world = self.job.world
        units = units_of(self.model)
        # all make theirs at once, then send one after the other
        for first in range(0, len(units), world):
            names = units[first:first + world]
            mine = self.attempt(names)
            for owner, name in enumerate(names):
                for key, own in own_tensors(self.model.get_submodule(name)).items():
                    # let go when it is sent
                    tensor = mine.pop(key) if owner == self.job.rank else empty_like(own, self.job.device)
                    self.job.broadcast(tensor, owner)
                    put(own, tensor)

def put(own: torch.Tensor, tensor: torch.Tensor):
    """Keep of a whole tensor what this process holds."""
    shard.local(own).copy_(tensor[shard.rows(own)] if shard.is_split(own) else tensor)

def empty_like(own: torch.Tensor, device) -> torch.Tensor:
    """Room for all rows of a tensor."""
    return torch.empty(own.shape, dtype=own.dtype, device=device)

@torch.no_grad()
def copy_whole(model: Llama, built: Llama, job):
    """Fill `model` from `built`, of which this process has made its share of the layers."""
    owner = owners(built, job.world)
    def source_of(name: str) -> int:
        # a layer may have modules inside
        return next((rank for layer, rank in owner.items() if name.startswith(f"{layer}.")), 0)
    for (name, tensor), own in zip(built.state_dict().items(), model.state_dict().values(), strict=True):
        # also what all drew alike: two kinds of GPU may round a decomposition differently
        job.broadcast(tensor, source_of(name))
        put(own, tensor)

def fill(model: Llama, source, config, job):
    """The weights of step 0 for `model`, which has memory for what this process holds of them: drawn, or of
    the folder of `source`."""
    method = METHODS[config.linear]
    if method.convert is not None and method.one is None:
        # of a kind of layer that makes all of a model or nothing
        build = source.build if source else build_model
        return copy_whole(model, build(config, job.device, (job.rank, job.world)), job)
    weights = Folder(source.folder, source.shapes) if source else Drawn(config)
    Filling(model, weights, config, job, faithful=source is not None).run()
