"""Kinds of layers: the one place that knows them.

A *kind* is a class of module that stands where an nn.Linear stood. Its `settings()` are its constructor's
arguments; config.json keeps them by the layer's name, so that a checkpoint rebuilds any registered layer
without a decomposition. A *method* is what `--linear NAME` makes of a fresh model.

To add one, write the layer in a file of its own, import it here and add a line at the end:

    register("mine", MyLinear, convert_mine, uses=("rank",))

A kind that no fresh model has, because another command makes it of trained weights, has no `convert`."""
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn

import lost
from lost import HEAD, LOSTError, LOSTLinear, SparseLowRankLinear, apply_lost, by_module
from model import ConfigError, Llama, LlamaConfig, generator_of
from nanolost.errors import UserError, as_user_error

@dataclass(frozen=True)
class Kind:
    """layer: the class of its modules. low_rank, sparse: names of its parameters on either path."""

    layer: type[nn.Module]
    low_rank: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()

@dataclass(frozen=True)
class Method:
    """convert(model, config, part) replaces the linear layers of a fresh model in place; None: dense.
    switches: defaults that it brings for other flags. uses: the flags of a method that mean something here.
    part: (i, n) fills the i-th of every n layers only, the other processes fill theirs.

    one(name, linear, config): the layer that `convert` puts in the place of `linear`. With it a start holds
    one dense matrix at a time; without it the whole dense model."""

    convert: Callable | None = None
    switches: dict = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    one: Callable | None = None

KINDS: dict[str, Kind] = {}
METHODS: dict[str, Method] = {"dense": Method()}

def register(
    name: str,
    layer: type[nn.Module],
    convert: Callable | None = None,
    *,
    switches: dict | None = None,
    uses: tuple[str, ...] = (),
    low_rank: tuple[str, ...] = (),
    sparse: tuple[str, ...] = (),
    one: Callable | None = None,
):
    """Make a kind of layer, and with a `convert` the method `--linear name`, known to every command."""
    KINDS[name] = Kind(layer, low_rank, sparse)
    if convert is not None:
        METHODS[name] = Method(convert, switches or {}, uses, one)

# --- what is in a model ---

def kind_of(module: nn.Module) -> str | None:
    """The name of a registered kind, None for any other module."""
    for name, kind in KINDS.items():
        # a subclass may compute something else: it registers itself
        if type(module) is kind.layer:
            return name
    return None

def special_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a registered kind by its name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if kind_of(module)}

def settings_of(model: nn.Module) -> dict[str, dict]:
    """By layer name the kind and what rebuilds the layer, as JSON."""
    found = {}
    for name, layer in special_layers(model).items():
        found[name] = {"kind": kind_of(layer), **layer.settings()}
    return found

def count_by_path(model: nn.Module) -> tuple[int, int, int]:
    """Parameters on low-rank paths, on sparse paths (zeros that a tensor holds count too), and all others."""
    low_rank = 0
    sparse = 0
    for layer in special_layers(model).values():
        kind = KINDS[kind_of(layer)]
        for name, p in layer.named_parameters(recurse=False):
            if name in kind.low_rank:
                low_rank += p.numel()
            elif name in kind.sparse:
                sparse += p.numel()
    total = sum(p.numel() for p in model.parameters())
    return low_rank, sparse, total - low_rank - sparse

def look_inside(model: nn.Module, run: Callable, part: tuple[int, int] = (0, 1)) -> dict[str, dict]:
    """What each layer does with the inputs that run() gives it: numbers by the layer's name."""
    return lost.diagnose(model, run, part)

# --- making one ---

# where and in what a layer is made is never a file's to say: one on the meta device needs no memory
PLACE = ("device", "dtype")

def check_settings(layer: type[nn.Module], given: dict):
    """UserError for names in `given` that cannot come from `settings()` of such a layer."""
    known = []
    passes = False
    for p in inspect.signature(layer).parameters.values():
        # **others of a subclass are what its parent takes, which says itself what it does not know
        if p.kind is p.VAR_KEYWORD:
            passes = True
        elif p.kind is not p.VAR_POSITIONAL and p.name not in PLACE:
            known.append(p.name)
    for name in given:
        if name in PLACE or (name not in known and not passes):
            raise UserError(f"unknown setting {name!r:.80}; it has {', '.join(known)}")

def rebuild(model: nn.Module, settings: dict[str, dict]):
    """Put empty layers in place, as `settings_of` described them; their tensors come from a file."""
    for name, given in settings.items():
        with as_user_error(AttributeError, TypeError, ValueError, prefix=f"layer {name}: "):
            # folders from before there were other kinds do not say which
            given = {"kind": "lost", **given}
            kind = given.pop("kind")
            if kind not in KINDS:
                raise UserError(f"unknown kind {kind!r}; this program has {', '.join(KINDS)}")
            check_settings(KINDS[kind].layer, given)
            model.get_submodule(name)
            model.set_submodule(name, KINDS[kind].layer(**given))

def model_config(config) -> LlamaConfig:
    """The model's sizes. Trained from scratch, it is made for the training window."""
    names = {f.name for f in dataclasses.fields(LlamaConfig)}
    sizes = {name: value for name, value in vars(config).items() if name in names}
    with as_user_error(ConfigError):
        return LlamaConfig(**sizes, max_seq_len=config.seq_len)

def build_model(config, device, part: tuple[int, int] = (0, 1)) -> Llama:
    """The model of step 0, converted on `device`; on the meta device shapes only."""
    # kinds of layers that draw without a generator of their own use torch's
    torch.manual_seed(config.seed)
    first = "meta" if str(device) == "meta" else "cpu"
    with torch.device(first):
        model = Llama(model_config(config), config.seed)
    model.to(device)
    convert = METHODS[config.linear].convert
    # some are decomposed later (dense_start.py)
    if convert is not None and not config.dense_start:
        convert(model, config, part)
    return model

@torch.no_grad()
def keep_function(model: nn.Module, config):
    """Fold γ into layers that were decomposed from trained weights, so that they start as these weights'
    low-rank part and the rest of the chosen channels: without it 0.7 and 0.3 of the two. A SiLU changes the
    function anyway, and columns that are no rest would be counted twice."""
    if config.activation != "none" or config.init != "svd":
        return
    layers = special_layers(model).values()
    if config.sparse_init != "residual" and any(layer.k for layer in layers):
        return
    for layer in layers:
        layer.B /= config.gamma
        if layer.k:
            layer.W_s /= 1 - config.gamma

def owners(model: nn.Module, world: int) -> dict[str, int]:
    """The process that fills a layer, by the layer's name: the i-th of every `world` is process i's."""
    return {name: i % world for i, name in enumerate(special_layers(model))}

# --- plain layers of others ---

def merged(name: str, layer: nn.Module) -> nn.Linear:
    """The one linear layer with the same output. UserError where there is none."""
    # a kind of layer says by this method that it can
    if not hasattr(layer, "merge"):
        raise UserError(f"{name} is a {type(layer).__name__}, which no single matrix replaces: leave --merge "
                        "out")
    # SiLU stands between the factors
    with as_user_error(LOSTError, prefix=f"{name} cannot be merged: "):
        return layer.merge()

def merge_layers(model: Llama):
    """Replace every layer that transformers lacks by a plain one, in place, one at a time."""
    # names alone: what is replaced is let go
    for name in list(special_layers(model)):
        plain = merged(name, model.get_submodule(name))
        model.set_submodule(name, plain)

# --- LOST and its relatives: one layer with other switches ---

LOST_FLAGS = (
    "rank", "sparsity", "gamma", "learn_gamma",
    "init", "select", "sparse_init", "activation",
)

def allotted(model: nn.Module, layers: dict[str, dict]) -> dict:
    """What `apply_lost` is to be given for layers of unlike sizes (allocation.py), by whole names."""
    found = {"rank": {}, "sparsity": {}, "skip": list(HEAD)}
    for name, layer in layers.items():
        if layer["kind"] == "dense":
            found["skip"].append(name)
            continue
        found["rank"][name] = layer["rank"]
        # the share that is rounded to this number again
        found["sparsity"][name] = layer["channels"] / model.get_submodule(name).in_features
    return found

def lost_switches(config) -> dict:
    return {name: getattr(config, name) for name in LOST_FLAGS}

def convert_to_lost(model: nn.Module, config, part: tuple[int, int]):
    switches = lost_switches(config)
    if config.allocation is not None:
        switches |= allotted(model, config.allocation)
    # each layer has its own draws, whichever process makes it
    switches["generator"] = functools.partial(generator_of, config.seed)
    with as_user_error(LOSTError):
        apply_lost(model, part=part, **switches)

def lost_layer(name: str, linear: nn.Linear, config) -> LOSTLinear:
    switches = lost_switches(config)
    if config.allocation is not None:
        layer = config.allocation[name]
        switches["rank"] = layer["rank"]
        switches["sparsity"] = layer["channels"] / linear.in_features
    for number in ("rank", "sparsity"):
        switches[number] = by_module(switches[number], name)
    with as_user_error(LOSTError, prefix=f"{name}: "):
        return LOSTLinear.from_linear(linear, **switches, generator=generator_of(config.seed, name))

# no sparse path and a random start; CoLA (arXiv 2502.10940) differs from plain low rank by its SiLU alone
PLAIN = {"sparsity": 0.0, "gamma": 1.0, "init": "random"}

# the relatives have one rank and no channels, and a random start that trained weights have no part in
LOST_USES = ("allocation", *LOST_FLAGS, "dense_start")
register("lost", LOSTLinear, convert_to_lost, uses=LOST_USES, low_rank=("A", "B"), sparse=("W_s",),
         one=lost_layer)
# of trained weights alone: a fresh matrix has no elements that are better than others
register("sparse", SparseLowRankLinear, low_rank=("A", "B"), sparse=("weight",))
METHODS["lowrank"] = Method(convert_to_lost, {**PLAIN, "activation": "none"}, LOST_FLAGS, lost_layer)
METHODS["cola"] = Method(convert_to_lost, {**PLAIN, "activation": "silu"}, LOST_FLAGS, lost_layer)
