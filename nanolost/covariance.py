"""What a compression knows of a model beside its weights, from a text: for each linear layer of the blocks

    C = E[x xᵀ]   (in, in)      the covariance of its inputs x; q, k, v share one, and gate, up
    G = E[g gᵀ]   (out, out)    that of its output gradients g, per token, of the summed loss
    E|x|          (in,)

With labels drawn from the model itself G ⊗ C is the Kronecker form of the Fisher information (Martens and
Grosse 2015, arXiv 1503.05671), and ½ tr(G ΔW C ΔWᵀ) the loss in nats a token that a change ΔW costs.

Blocks are taken one after the other, from the last to the first, so that the memory is the model's and one
block's whatever the depth; what lies between them is kept in files."""
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model import Llama, rope_table
from nanolost.data import TokenDataset
from nanolost.errors import UserError

# the linear layers of a block by the input that they share, in the order in which they are computed
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
# rows of logits at a time: 512 of 50 000 words are 100 MB
ROWS = 512

def block_name(layer: int) -> str:
    return f"model.layers.{layer}"

def linears_of(layer: int, block: nn.Module) -> dict[str, nn.Linear]:
    """Those of one block, by the names that they have in the model."""
    return {f"{block_name(layer)}.{name}": block.get_submodule(name) for name in GROUP_OF}

def linears(model: Llama) -> dict[str, nn.Linear]:
    """Every linear layer of the blocks by its name, in the order of the model."""
    found = {}
    for layer, block in enumerate(model.model["layers"]):
        found |= linears_of(layer, block)
    return found

def place_of(name: str) -> tuple[int, str]:
    """The number of the block that a layer is in, and its name there."""
    layer, _, inner = name.removeprefix("model.layers.").partition(".")
    return int(layer), inner

# --- what was found ---

class Statistics:
    """Covariances in a folder, a file a block, from which one matrix at a time is read. tokens: how many C
    was made of, and G."""

    def __init__(self, folder: str, tokens: tuple[int, int]):
        self.folder = folder
        self.tokens = tokens

    def _read(self, layer: int, name: str) -> Tensor:
        path = block_file(self.folder, layer)
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def inputs(self, name: str) -> Tensor:
        """C (in, in) of the layer `name`, float32."""
        layer, inner = place_of(name)
        return self._read(layer, f"C.{GROUP_OF[inner]}")

    def sizes(self, name: str) -> Tensor:
        """E|x| (in,)."""
        layer, inner = place_of(name)
        return self._read(layer, f"abs.{GROUP_OF[inner]}")

    def gradients(self, name: str) -> Tensor:
        """G (out, out) of the layer `name`, float32."""
        layer, inner = place_of(name)
        return self._read(layer, f"G.{inner}")

def block_file(folder: str, layer: int) -> str:
    return os.path.join(folder, f"block_{layer:03d}.safetensors")

def covariance_bytes(model: Llama) -> int:
    """Of the covariances of one block."""
    block = model.model["layers"][0]
    values = 0
    for names in GROUPS.values():
        # C and E|x| once for the group, G for each of its layers
        width = block.get_submodule(names[0]).in_features
        values += width * width + width
        for name in names:
            outputs = block.get_submodule(name).out_features
            values += outputs * outputs
    # float32
    return 4 * values

def spool_bytes(model: Llama, tokens: int) -> int:
    """What `collect` writes at the most: covariances of all blocks, or the inputs of all blocks, which give
    way to them."""
    config = model.config
    # the input of every block, and gradients by the output of one and by its input, float32
    spooled = config.n_layer + 2
    states = 4 * tokens * config.n_embd * spooled
    return covariance_bytes(model) * config.n_layer + states

def product_of(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y, in the dtype of the two, inside autocast too, which would multiply and round in its own."""
    with torch.autocast(x.device.type, enabled=False):
        return x.T @ y

# --- looking at layers ---

# see(group, x) or see(name, g), with what passes a layer, (B, T, width)
See = Callable[[str, Tensor], None]

@contextlib.contextmanager
def looking(hooks: list):
    """With these hooks, which go in the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

def watch_inputs(block: nn.Module, see: See) -> list:
    """see(group, x) with the input (B, T, in) of each group of layers, when the block runs."""
    hooks = []
    for group, names in GROUPS.items():
        # a function a group: a loop's variable would be the last one's when it is called
        def look(module, args, group=group):
            x = args[0]
            see(group, x.detach())
        # they share it: the first one's is all of theirs
        first = block.get_submodule(names[0])
        hooks.append(first.register_forward_pre_hook(look))
    return hooks

def watch_gradients(block: nn.Module, see: See) -> list:
    """see(name, g) with the gradient (B, T, out) of each layer's output, in a backward pass."""
    hooks = []
    for name in GROUP_OF:
        def look(module, args, out, name=name):
            # of windows without gradients there is no backward pass
            if out.requires_grad:
                out.register_hook(lambda g: see(name, g.detach()))
        layer = block.get_submodule(name)
        hooks.append(layer.register_forward_hook(look))
    return hooks

class Sums:
    """Sums over the tokens of one block: of x xᵀ, |x| and g gᵀ, float32 on the block's device."""

    def __init__(self):
        self.sums = {}
        # (tokens,): which positions hold text
        self.real = None

    def add(self, name: str, value: Tensor):
        # the first micro-batch's product is the sum itself
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, width) → (tokens of text, width), float32."""
        # padding would count as an input
        tokens = x.flatten(0, 1)
        return tokens[self.real].float()

    def see_input(self, group: str, x: Tensor):
        x = self.rows(x)
        size = x.abs().sum(0)
        self.add(f"C.{group}", product_of(x, x))
        self.add(f"abs.{group}", size)

    def see_gradient(self, name: str, g: Tensor):
        g = self.rows(g)
        self.add(f"G.{name}", product_of(g, g))

    def means(self, tokens: tuple[int, int]) -> dict[str, Tensor]:
        """tokens: of the inputs, of the gradients. The sums become them: there is room for one."""
        inputs, gradients = tokens
        counts = {"C": inputs, "abs": inputs, "G": gradients}
        means = {}
        for name, total in self.sums.items():
            sort, _, _ = name.partition(".")
            # in place
            total /= counts[sort]
            means[name] = total.cpu()
        return means

# --- the text ---

@dataclass
class Batch:
    """Windows of the text, a micro-batch."""

    ids: Tensor                          # (B, T)
    targets: Tensor                      # (B, T), negative where there is none
    real: Tensor                         # (B·T,), whether a position holds text
    learn: bool                          # whether a gradient is wanted

def is_text(targets: Tensor) -> Tensor:
    """Which positions of rows (B, T) hold text: those up to the last target. Padding comes behind it."""
    known = (targets >= 0).int()
    # from the end: 1 as soon as there was a target
    backwards = known.flip(1).cummax(1).values
    return backwards.flip(1) > 0

def batches(data: TokenDataset, samples: np.ndarray, micro: int, gradients: int, device) -> list[Batch]:
    """The windows `samples`, `micro` at a time; gradients are wanted of the first so many."""
    found = []
    # no batch holds windows of both sorts
    sorts = (True, samples[:gradients]), (False, samples[gradients:])
    for learn, part in sorts:
        for start in range(0, len(part), micro):
            windows = part[start:start + micro]
            ids, targets = data.batch(windows, device)
            real = is_text(targets).flatten()
            found.append(Batch(ids, targets, real, learn))
    return found

def count_tokens(found: list[Batch]) -> tuple[int, int]:
    """Positions that hold text: of all batches, and of those with gradients."""
    every = 0
    learned = 0
    for batch in found:
        count = int(batch.real.sum())
        every += count
        if batch.learn:
            learned += count
    return every, learned

# --- the model, a block at a time ---

def rope_of(model: Llama, length: int, device) -> Tensor:
    """Angles of the positions of a window."""
    config = model.config
    # every window begins at position 0
    positions = torch.arange(length, device=device)
    return rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)

class Spool:
    """Tensors of micro-batches in files, between two passes over them."""

    def __init__(self, folder: str):
        self.folder = folder
        # plain bytes have none
        self.shapes = {}

    def path(self, name: str, number: int) -> str:
        return os.path.join(self.folder, f"{name}_{number:06d}.bin")

    def put(self, name: str, number: int, tensor: Tensor):
        """Keep a tensor of the micro-batch `number`, in float32."""
        self.shapes[name, number] = tensor.shape
        values = tensor.float().cpu().numpy()
        values.tofile(self.path(name, number))

    def read(self, name: str, number: int, device) -> Tensor:
        """What was put there, which stays."""
        shape = self.shapes[name, number]
        # read, not mapped: a file that is deleted meanwhile would keep its room
        values = np.fromfile(self.path(name, number), np.float32)
        tensor = torch.from_numpy(values).view(shape)
        return tensor.to(device)

    def take(self, name: str, number: int, device) -> Tensor:
        """What was put there, once."""
        tensor = self.read(name, number, device)
        os.remove(self.path(name, number))
        del self.shapes[name, number]
        return tensor

def drawn_labels(p: Tensor, generator: torch.Generator) -> Tensor:
    """One word (N, 1) of each row of the distributions p (N, V)."""
    # drawn on the CPU: the same on every device, up to rounding
    draw = torch.rand(len(p), 1, generator=generator)
    below = p.cumsum(-1)
    words = torch.searchsorted(below, draw.to(p.device))
    # rounding may leave a sum below 1
    return words.clamp(max=p.shape[1] - 1)

def head_gradient(model: Llama, x: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient (B, T, C) by x, the last block's output, of the loss summed over the positions `wanted`
    (B·T,), with labels that the model draws: the text's own would give the empirical Fisher matrix, which is
    another one (Kunstner et al. 2019, arXiv 1905.12558)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        hidden = model.model["norm"](x)
    rows = hidden.detach().flatten(0, 1)                        # (B·T, C)
    grad = torch.zeros_like(rows)
    # first by the head's input
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        logits = model.lm_head(rows[part])                      # (ROWS, V)
        p = logits.float().softmax(-1)
        labels = drawn_labels(p, generator)
        # by the logits: softmax − one-hot
        ones = p.new_full(labels.shape, -1.0)
        p.scatter_add_(1, labels, ones)
        p *= wanted[part, None]
        weight = model.lm_head.weight.to(grad.dtype)
        grad[part] = p.to(grad.dtype) @ weight
    # and through the last norm
    found, = torch.autograd.grad(hidden, x, grad.view_as(hidden))
    return found

# called after each block of each micro-batch, for a progress bar
Tick = Callable[[], object]

def forward_pass(
    model: Llama,
    texts: list[Batch],
    spool: Spool,
    generator: torch.Generator,
    tick: Tick,
):
    """Keep the input of every block, "x003" of the fourth, and the gradient by the last one's output, "g"."""
    for number, batch in enumerate(texts):
        rope = rope_of(model, batch.ids.shape[1], batch.ids.device)
        x = model.model["embed_tokens"](batch.ids)
        # inputs alone are kept: a block runs again when it is looked at
        for layer, block in enumerate(model.model["layers"]):
            spool.put(f"x{layer:03d}", number, x)
            x = block(x, rope)
            tick()
        if batch.learn:
            wanted = (batch.targets >= 0).flatten()
            grad = head_gradient(model, x, wanted, generator)
            spool.put("g", number, grad)

def look_at_block(model: Llama, layer: int, texts: list[Batch], spool: Spool, tick: Tick) -> Sums:
    """Run one block again, and back; the gradient by its input takes the place of that by its output."""
    block = model.model["layers"][layer]
    sums = Sums()
    inputs = watch_inputs(block, sums.see_input)
    gradients = watch_gradients(block, sums.see_gradient)
    with looking(inputs + gradients):
        for number, batch in enumerate(texts):
            sums.real = batch.real
            device = batch.ids.device
            rope = rope_of(model, batch.ids.shape[1], device)
            # read once: its room on the disk goes to this block's covariances
            x = spool.take(f"x{layer:03d}", number, device)
            if batch.learn:
                x.requires_grad_()
                with torch.enable_grad():
                    y = block(x, rope)
                # the hooks see the gradients of the layers' outputs on the way
                grad = spool.take("g", number, device)
                back, = torch.autograd.grad(y, x, grad.to(y.dtype))
                spool.put("g", number, back)
            else:
                block(x, rope)
            tick()
    return sums

def write_block(
    model: Llama,
    layer: int,
    texts: list[Batch],
    spool: Spool,
    folder: str,
    tokens: tuple[int, int],
    tick: Tick,
):
    """A function of its own, which forgets a block's sums before the next one's are made."""
    sums = look_at_block(model, layer, texts, spool, tick)
    means = sums.means(tokens)
    for name, mean in means.items():
        if not mean.isfinite().all():
            raise UserError(f"{block_name(layer)}: {name} is beyond float32 on this text, as its activations "
                            "or gradients are huge: use an earlier checkpoint")
    save_file(means, block_file(folder, layer))

@torch.no_grad()
def collect(
    model: Llama, texts: list[Batch], folder: str, seed: int, context, meanwhile: str | None = None
) -> Statistics:
    """Covariances of every linear layer of the blocks, written to `folder`, `spool_bytes` at the most.
    context: the autocast of the passes; sums are float32 whatever it is. meanwhile: the folder of what goes
    again (`folder`). The model is left as it was, its parameters frozen."""
    model.requires_grad_(False)
    # of the labels, on the CPU
    generator = torch.Generator().manual_seed(seed)
    spool = Spool(meanwhile or folder)
    tokens = count_tokens(texts)
    layers = model.config.n_layer
    # a backward pass costs about as much again as what is summed up: three in all
    units = 3 * layers * len(texts)
    with tqdm(total=units, desc="statistics", unit="block", disable=None) as bar, context:
        forward_pass(model, texts, spool, generator, bar.update)
        # the gradient by a block's output is known once all behind it were looked at
        for layer in reversed(range(layers)):
            write_block(model, layer, texts, spool, folder, tokens, lambda: bar.update(2))
    # gradients by the first block's input: nobody asks for them
    for number, batch in enumerate(texts):
        if batch.learn:
            os.remove(spool.path("g", number))
    return Statistics(folder, tokens)
