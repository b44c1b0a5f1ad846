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

def linears(model: Llama) -> dict[str, nn.Linear]:
    """Every linear layer of the blocks by its name, in the order of the model."""
    found = {}
    for layer, block in enumerate(model.model["layers"]):
        for name in GROUP_OF:
            found[f"{block_name(layer)}.{name}"] = block.get_submodule(name)
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
        with safe_open(block_file(self.folder, layer), "pt") as file:
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
    total = 0
    for names in GROUPS.values():
        width = block.get_submodule(names[0]).in_features
        total += width * width + width
        total += sum(block.get_submodule(name).out_features ** 2 for name in names)
    return 4 * total

def spool_bytes(model: Llama, tokens: int) -> int:
    """What `collect` writes at the most: covariances of all blocks, or the inputs of all blocks, which give
    way to them."""
    config = model.config
    states = 4 * tokens * config.n_embd * (config.n_layer + 2)
    return covariance_bytes(model) * config.n_layer + states

def product_of(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y, in the dtype of the two, inside autocast too, which would multiply and round in its own."""
    with torch.autocast(x.device.type, enabled=False):
        return x.T @ y

# --- looking at layers ---

@contextlib.contextmanager
def looking(hooks: list):
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

def watch_inputs(block: nn.Module, see) -> list:
    """see(group, x) with the input (B, T, in) of each group of layers, when the block runs."""
    hooks = []
    for group, names in GROUPS.items():
        def look(module, args, group=group):
            see(group, args[0].detach())
        hooks.append(block.get_submodule(names[0]).register_forward_pre_hook(look))
    return hooks

def watch_gradients(block: nn.Module, see) -> list:
    """see(name, g) with the gradient (B, T, out) of each layer's output, in a backward pass."""
    hooks = []
    for name in GROUP_OF:
        def look(module, args, out, name=name):
            # of windows without gradients there is no backward pass
            if out.requires_grad:
                out.register_hook(lambda g: see(name, g.detach()))
        hooks.append(block.get_submodule(name).register_forward_hook(look))
    return hooks

class Sums:
    """Sums over the tokens of one block: of x xᵀ, |x| and g gᵀ, float32 on the block's device."""

    def __init__(self):
        self.sums = {}
        # (tokens,): which positions hold text
        self.real = None

    def add(self, name: str, value: Tensor):
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, width) → (tokens of text, width), float32."""
        return x.flatten(0, 1)[self.real].float()

    def see_input(self, group: str, x: Tensor):
        x = self.rows(x)
        self.add(f"C.{group}", product_of(x, x))
        self.add(f"abs.{group}", x.abs().sum(0))

    def see_gradient(self, name: str, g: Tensor):
        g = self.rows(g)
        self.add(f"G.{name}", product_of(g, g))

    def means(self, tokens: tuple[int, int]) -> dict[str, Tensor]:
        """tokens: of the inputs, of the gradients. The sums become them: there is room for one."""
        counts = {"C": tokens[0], "abs": tokens[0], "G": tokens[1]}
        for name, total in self.sums.items():
            total /= counts[name.partition(".")[0]]
        return {name: total.cpu() for name, total in self.sums.items()}

# --- the text ---

@dataclass
class Batch:
    """Windows of the text: ids and targets (B, T), real (B·T,) whether a position holds text, and whether a
    gradient is wanted."""

    ids: Tensor
    targets: Tensor
    real: Tensor
    learn: bool

def is_text(targets: Tensor) -> Tensor:
    """Which positions of rows (B, T) hold text: those up to the last target. Padding comes behind it."""
    known = (targets >= 0).int()
    return known.flip(1).cummax(1).values.flip(1) > 0

def batches(data: TokenDataset, samples: np.ndarray, micro: int, gradients: int, device) -> list[Batch]:
    """The windows `samples`, `micro` at a time; gradients are wanted of the first so many."""
    found = []
    # no batch holds windows of both sorts
    for learn, part in ((True, samples[:gradients]), (False, samples[gradients:])):
        for start in range(0, len(part), micro):
            ids, targets = data.batch(part[start:start + micro], device)
            found.append(Batch(ids, targets, is_text(targets).flatten(), learn))
    return found

def count_tokens(found: list[Batch]) -> tuple[int, int]:
    """Positions that hold text: of all batches, and of those with gradients."""
    every = sum(int(batch.real.sum()) for batch in found)
    learned = sum(int(batch.real.sum()) for batch in found if batch.learn)
    return every, learned

# --- the model, a block at a time ---

def rope_of(model: Llama, length: int, device) -> Tensor:
    config = model.config
    positions = torch.arange(length, device=device)
    return rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)

class Spool:
    """Tensors of micro-batches in files, between two passes over them."""

    def __init__(self, folder: str):
        self.folder = folder
        self.shapes = {}

    def path(self, name: str, number: int) -> str:
        return os.path.join(self.folder, f"{name}_{number:06d}.bin")

    def put(self, name: str, number: int, tensor: Tensor):
        self.shapes[name, number] = tensor.shape
        tensor.float().cpu().numpy().tofile(self.path(name, number))

    def take(self, name: str, number: int, device) -> Tensor:
        """What was put there, once."""
        path = self.path(name, number)
        # read, not mapped: a file that is deleted meanwhile would keep its room
        values = np.fromfile(path, np.float32).reshape(self.shapes.pop((name, number)))
        os.remove(path)
        return torch.from_numpy(values).to(device)

def drawn_labels(p: Tensor, generator: torch.Generator) -> Tensor:
    """One word (N, 1) of each row of the distributions p (N, V)."""
    # drawn on the CPU: the same on every device, up to rounding
    draw = torch.rand(len(p), 1, generator=generator).to(p.device)
    words = torch.searchsorted(p.cumsum(-1), draw)
    # rounding may leave a sum below 1
    return words.clamp(max=p.shape[1] - 1)

def head_gradient(model: Llama, x: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient (B, T, C) by x, the last block's output, of the loss summed over the positions `wanted`
    (B·T,), with labels that the model draws: the text's own would give the empirical Fisher matrix, which is
    another one (Kunstner et al. 2019, arXiv 1905.12558)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        hidden = model.model["norm"](x)
    rows = hidden.detach().flatten(0, 1)
    grad = torch.zeros_like(rows)
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        p = model.lm_head(rows[part]).float().softmax(-1)                                  # (ROWS, V)
        labels = drawn_labels(p, generator)
        # by the logits: softmax − one-hot
        p.scatter_add_(1, labels, p.new_full(labels.shape, -1.0))
        p *= wanted[part, None]
        grad[part] = p.to(grad.dtype) @ model.lm_head.weight.to(grad.dtype)
    return torch.autograd.grad(hidden, x, grad.view_as(hidden))[0]

def forward_pass(model: Llama, texts: list[Batch], spool: Spool, generator: torch.Generator, tick):
    """Keep the input of every block, "x003" of the fourth, and the gradient by the last one's output, "g"."""
    for number, batch in enumerate(texts):
        rope = rope_of(model, batch.ids.shape[1], batch.ids.device)
        x = model.model["embed_tokens"](batch.ids)
        for layer, block in enumerate(model.model["layers"]):
            spool.put(f"x{layer:03d}", number, x)
            x = block(x, rope)
            tick()
        if batch.learn:
            wanted = (batch.targets >= 0).flatten()
            spool.put("g", number, head_gradient(model, x, wanted, generator))

def look_at_block(model: Llama, layer: int, texts: list[Batch], spool: Spool, tick) -> Sums:
    """Run one block again, and back; the gradient by its input takes the place of that by its output."""
    block = model.model["layers"][layer]
    sums = Sums()
    hooks = watch_inputs(block, sums.see_input) + watch_gradients(block, sums.see_gradient)
    with looking(hooks):
        for number, batch in enumerate(texts):
            sums.real = batch.real
            device = batch.ids.device
            rope = rope_of(model, batch.ids.shape[1], device)
            x = spool.take(f"x{layer:03d}", number, device)
            if not batch.learn:
                block(x, rope)
            else:
                x.requires_grad_()
                with torch.enable_grad():
                    y = block(x, rope)
                grad = spool.take("g", number, device)
                spool.put("g", number, torch.autograd.grad(y, x, grad.to(y.dtype))[0])
            tick()
    return sums

def write_block(
    model: Llama, layer: int, texts: list[Batch], spool: Spool, folder: str, tokens: tuple, tick
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
    generator = torch.Generator().manual_seed(seed)
    spool = Spool(meanwhile or folder)
    tokens = count_tokens(texts)
    layers = model.config.n_layer
    # a backward pass costs about as much again as what is summed up: three in all
    with tqdm(total=3 * layers * len(texts), desc="statistics", unit="block", disable=None) as bar, context:
        forward_pass(model, texts, spool, generator, bar.update)
        for layer in reversed(range(layers)):
            write_block(model, layer, texts, spool, folder, tokens, lambda: bar.update(2))
    for number, batch in enumerate(texts):
        if batch.learn:
            os.remove(spool.path("g", number))
    return Statistics(folder, tokens)
