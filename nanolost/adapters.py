"""An update beside a frozen weight, which merges into it: what fine-tuning trains instead of W.

    lora         y = x (W + s B A)ᵀ                       Hu et al. 2022 (arXiv 2106.09685)
    masked-lora  y = x (W + M ⊙ s B A)ᵀ,  M = (W ≠ 0)     MaskLoRA (Zimmer et al., arXiv 2312.15230), LoSA's
    lost         y = x Wᵀ + s σ(x Aᵀ) Bᵀ + x[I] W_sᵀ      LOST's two paths (arXiv 2508.02668)

σ is the identity, unless SiLU is asked for, with which nothing merges. A (r, in) is drawn, B (out, r) and
W_s (out, k) start at zero: at first the function is W's. s = alpha / r of the whole update, so that a rank
which changes leaves it alone. W and the update stay apart; `merge` adds them in float32, and what was zero
under a mask is zero after it."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lost import ACTIVATIONS, SparseLowRankLinear, as_autocast, check_sizes, decompose
from model import Llama, generator_of
from nanolost.covariance import linears
from nanolost.methods import rebuild, settings_of
from nanolost.pruning import share_of

# --- under a mask ---

def masked_sum(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + M ⊙ s B A (out, in), float32 inside autocast too."""
    with torch.autocast(W.device.type, enabled=False):
        whole = torch.addmm(W, B, A, alpha=scale)
        return torch.where(W == 0, W, whole)

class MaskedProduct(torch.autograd.Function):
    """y = x (W + M ⊙ s B A)ᵀ, M = (W ≠ 0). Of the sum only W and the factors are kept for the backward pass:
    autograd would hold a second copy of every matrix."""

    @staticmethod
    def forward(x, W, A, B, scale):
        return F.linear(x, masked_sum(W, A, B, scale).to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        # made again: a product of rank r costs little beside those with the tokens
        whole = masked_sum(W, A, B, ctx.scale).to(dy.dtype)
        dx = dy @ whole
        # a frozen update, as while statistics are collected
        if not ctx.needs_input_grad[2]:
            return dx, None, None, None, None
        # of the sum, (out, in)
        rows = dy.flatten(0, -2)
        dD = (rows.mT @ x.flatten(0, -2)).to(W.dtype)
        # only under the mask does the update count
        dD = torch.where(W == 0, 0, dD * ctx.scale)
        dA = B.mT @ dD
        dB = dD @ A.mT
        return dx, None, dA, dB, None

# --- the layer ---

def drawn(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows of A (rank, width) as LoRA's own code draws them: uniform, of variance 1 / (3 width)."""
    bound = 1 / math.sqrt(width)
    # on the CPU: the same on every device
    rows = torch.rand(rank, width, generator=generator)
    return (2 * rows - 1) * bound

class Update(nn.Module):
    """A linear layer whose weight (out, in) is frozen, and a trained update: A (rank, in), B (out, rank) and,
    with k channels, W_s (out, k) and index (k,) int32. masked: only where the weight is not zero."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        masked: bool = False,
        k: int = 0,
        activation: str = "none",
    ):
        super().__init__()
        self.scale = scale
        self.masked = masked
        self.activation = activation
        # of its tensors nothing is copied
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        out, width = self.weight.shape
        self.A = nn.Parameter(self.weight.new_empty(rank, width))
        self.B = nn.Parameter(self.weight.new_zeros(out, rank))
        if k:
            self.W_s = nn.Parameter(self.weight.new_zeros(out, k))
            self.register_buffer("index", torch.zeros(k, dtype=torch.int32, device=self.weight.device))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def k(self) -> int:
        return len(getattr(self, "index", ()))

    @torch.no_grad()
    def draw(self, generator: torch.Generator):
        """The first A, and the channels: those whose columns are largest in what the best rank-r matrix
        leaves of W, as LOST chooses them. LOSTError for a rank that leaves nothing."""
        self.A.copy_(drawn(self.rank, self.in_features, generator))
        if self.activation != "none":
            # it is saved as factors, which have no more
            check_sizes(self.weight.shape, self.rank, self.k)
        if self.k:
            parts = decompose(self.weight, self.rank, self.k)
            self.index.copy_(parts.index)

    # `input` as in nn.Linear, for callers that pass it by name
    def forward(self, input: Tensor) -> Tensor:
        if self.masked:
            x = as_autocast(input)
            y = MaskedProduct.apply(x, self.weight, self.A, self.B, self.scale)
            # in the dtype of autocast, as F.linear adds it
            return y if self.bias is None else y + self.bias.to(y.dtype)
        y = F.linear(input, self.weight, self.bias)
        z = F.linear(input, self.A)
        z = ACTIVATIONS[self.activation](z)
        y = y + self.scale * F.linear(z, self.B)
        if self.k:
            y = y + F.linear(input[..., self.index], self.W_s)
        return y

    @torch.no_grad()
    def effective(self) -> Tensor:
        """The weight (out, in) that W and the update are together, float32."""
        if self.masked:
            return masked_sum(self.weight, self.A, self.B, self.scale)
        return torch.addmm(self.with_channels(), self.B, self.A, alpha=self.scale)

    def with_channels(self) -> Tensor:
        """W (out, in) and the channels' update."""
        if not self.k:
            return self.weight
        return self.weight.index_add(1, self.index, self.W_s)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A layer without an update that computes the same: a plain one, or where an activation stands in
        between one that has the factors beside its weight. Its tensors are not trained."""
        sizes = self.in_features, self.out_features
        biased = self.bias is not None
        if self.activation == "none":
            layer = nn.Linear(*sizes, bias=biased, device="meta")
            tensors = {"weight": self.effective()}
        else:
            layer = SparseLowRankLinear(*sizes, self.rank, biased, self.activation, device="meta")
            tensors = {"weight": self.with_channels(), "A": self.A, "B": self.scale * self.B}
        if biased:
            tensors["bias"] = self.bias
        layer.load_state_dict(tensors, assign=True)
        return layer.requires_grad_(False)

    @torch.no_grad()
    def rebase(self, W: Tensor):
        """Let the whole be W (out, in) with an update that stays: the frozen weight takes the difference. Its
        zeros are the mask from now on."""
        rest = torch.addmm(W.float(), self.B, self.A, alpha=-self.scale)
        # an element that is exactly the update's would look like a zero of the mask
        rest[rest == 0] = torch.finfo(rest.dtype).tiny
        self.weight.copy_(torch.where(W == 0, 0, rest))

    @torch.no_grad()
    def to_rank(self, rank: int, generator: torch.Generator):
        """Another rank, and the same whole: what goes is added to the frozen weight, what comes starts with
        a column of zeros in B."""
        if rank < self.rank:
            # what no rank is left for
            whole = self.effective()
            self.A = nn.Parameter(self.A[:rank].clone())
            self.B = nn.Parameter(self.B[:, :rank].clone())
            self.rebase(whole)
        elif rank > self.rank:
            more = rank - self.rank
            rows = drawn(more, self.in_features, generator).to(self.A)
            self.A = nn.Parameter(torch.cat((self.A, rows)))
            self.B = nn.Parameter(F.pad(self.B, (0, more)))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, k={self.k}, masked={self.masked}"

def keep_zeros(model: nn.Module, names: list[str]):
    """Train the weights of the linear layers `names` where they are not zero: a zero gets no gradient, so
    that AdamW never moves it and its moments stay zero."""
    for name in names:
        weight = model.get_submodule(name).weight
        # looked at when it is called: which are zero may change from stage to stage
        weight.register_hook(lambda g, weight=weight: torch.where(weight == 0, 0, g))

# --- a model with updates ---

def updates(model: nn.Module) -> dict[str, Update]:
    """Every update of a model by the name of its layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Update)}

def put_updates(
    model: Llama,
    names: list[str],
    rank: int,
    scale: float,
    masked: bool,
    share: float = 0,
    activation: str = "none",
):
    """Give the linear layers `names` an empty update each, in place. share: of the input channels for W_s."""
    for name in names:
        linear = model.get_submodule(name)
        k = 0
        if share:
            k = max(1, int(share * linear.in_features))
        model.set_submodule(name, Update(linear, rank, scale, masked, k, activation))

def has_factors(layer: nn.Module) -> bool:
    """Whether it is a matrix with others beside it, which make it dense where they are merged."""
    return isinstance(layer, SparseLowRankLinear) and layer.rank > 0

def share_of_zeros(model: Llama) -> float:
    """In the weights of the blocks' linear layers, updates merged; 0 of a model without such."""
    def weights():
        for layer in linears(model).values():
            if isinstance(layer, Update):
                yield layer.effective()
            elif isinstance(layer, nn.Linear | SparseLowRankLinear) and not has_factors(layer):
                yield layer.weight
    return share_of(weights())

def share_beside_factors(model: Llama) -> float:
    """In the matrices of the blocks that have factors beside them."""
    return share_of(layer.weight for layer in linears(model).values() if has_factors(layer))

def draw_updates(model: Llama, seed: int):
    """Start every update, the same for any number of processes."""
    for name, layer in updates(model).items():
        layer.draw(generator_of(seed, name))

@torch.no_grad()
def merged(model: Llama) -> Llama:
    """The model with every update added to its weight, which is a new tensor; all others are shared."""
    layers = updates(model)
    with torch.device("meta"):
        whole = Llama(model.config)
        rebuild(whole, settings_of(model))
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer, _, _ = name.rpartition(".")
        if layer not in layers:
            tensors[name] = tensor
    for name, layer in layers.items():
        plain = layer.merge()
        whole.set_submodule(name, plain)
        for key, tensor in plain.state_dict().items():
            tensors[f"{name}.{key}"] = tensor
    whole.load_state_dict(tensors, assign=True)
    whole.tie_head()
    return whole

def parts(model: Llama) -> dict[str, Tensor]:
    """What `merged` adds up, by "layer name.tensor name": what a resume needs beside the merged weights."""
    found = {}
    for name, layer in updates(model).items():
        for key, tensor in layer.state_dict().items():
            if key != "bias":
                found[f"{name}.{key}"] = tensor.contiguous()
    return found

def restore(
    model: Llama,
    tensors: dict[str, Tensor],
    scale: float,
    masked: bool,
    activation: str = "none",
):
    """Take a merged model apart again, in place, by the `parts` of the one that it was. KeyError for a tensor
    that is missing, RuntimeError for one that does not fit."""
    for key in tensors:
        name, _, kind = key.rpartition(".")
        if kind != "A":
            continue
        rank = len(tensors[key])
        k = len(tensors.get(f"{name}.index", ()))
        layer = Update(model.get_submodule(name), rank, scale, masked, k, activation)
        with torch.no_grad():
            for part, own in layer.state_dict().items():
                if part != "bias":
                    own.copy_(tensors[f"{name}.{part}"])
        model.set_submodule(name, layer)
