"""LOST: low-rank plus channel-sparse linear layers (arXiv 2508.02668). Needs torch alone, knows no model.

For a weight W (out, in) and an input x (..., in), with one decomposition at the start, then plain training
of A, B, W_s (and γ where asked for):

    W      = U Σ Vᵀ                                                     (1)
    A      = Σ_r^½ V_rᵀ,   B = U_r Σ_r^½,   so that B A = W_r           (2)   the best rank-r part
    W_comp = W − W_r                                                    (3)   the residual
    CI_j   = ‖W_comp[:, j]‖₂                                            (4)   importance of input channel j
    I      = the k channels of largest CI, sorted;  k = max(1, ⌊ρ·in⌋)  (5)   fixed for the run
    W_s    = W[:, I]                                                    (6)
    y      = γ · SiLU(x Aᵀ) Bᵀ + (1 − γ) · x[..., I] W_sᵀ               (7)

| code         | paper | shape     |                  | code         | paper | shape |
|--------------|-------|-----------|------------------|--------------|-------|-------|
| A            | A     | (r, in)   |                  | rank         | r     | –     |
| B            | B     | (out, r)  |                  | sparsity     | ρ     | –     |
| W_s          | W_s   | (out, k)  |                  | gamma        | γ     | ()    |
| index        | I     | (k,)      |                  | importance   | CI    | (in,) |

    model = apply_lost(model, rank=128, sparsity=0.01)

Not here: a Kaiming start of W (give a model that has one), channels chosen again during training."""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

ACTIVATIONS = {"silu": F.silu, "none": lambda z: z}
SWITCHES = {"init": ("svd", "random"), "select": ("residual", "residual_l1", "weight", "random"),
            "sparse_init": ("weight", "residual"), "activation": tuple(ACTIVATIONS)}

class Decomposition(NamedTuple):
    A: torch.Tensor                            # (r, in)
    B: torch.Tensor                            # (out, r)
    index: torch.Tensor                        # (k,) int32, ascending
    W_s: torch.Tensor                          # (out, k)

def top_svd(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The r largest singular triples of W (out, in): U_r (out, r), Σ_r (r,), V_rᵀ (r, in), eq. 1.

    From the eigenvectors of the smaller Gram matrix, 1–8 times faster than a full SVD; squaring the condition
    number is harmless in float64. A singular value of zero gets zero vectors on the other side."""
    wide = W.shape[0] <= W.shape[1]
    gram = W @ W.T if wide else W.T @ W
    value, vector = torch.linalg.eigh(gram)                                # ascending
    sigma, vector = value[-rank:].flip(0).clamp(min=0).sqrt(), vector[:, -rank:].flip(1)
    inverse = torch.where(sigma > 1e-7 * sigma[0], 1 / sigma, 0.0)         # what is below is rounding
    if wide:
        return vector, sigma, inverse[:, None] * (vector.T @ W)
    return (W @ vector) * inverse, sigma, vector.T

def importance(W, U, sigma, Vt, select: str, generator=None) -> torch.Tensor:
    """CI_j of each input channel, (in,): eq. 4 and its alternatives."""
    if select == "weight":
        return W.norm(dim=0)
    if select == "random":
        return torch.rand(W.shape[1], generator=generator, dtype=torch.float64).to(W.device)
    if select == "residual_l1":
        return (W - (U * sigma) @ Vt).abs().sum(0)
    # columns of W_r and W_comp are orthogonal: ‖W_comp[:, j]‖² = ‖W[:, j]‖² − ‖W_r[:, j]‖²
    return (W.square().sum(0) - (sigma[:, None] * Vt).square().sum(0)).clamp(min=0).sqrt()

def random_factors(out_features: int, in_features: int, rank: int, generator=None):
    """A and B of independent normal elements; those of B A have the standard deviation (in + out)^-½: the
    start of CoLA (Liu et al. 2025, arXiv 2502.10940, its published code)."""
    std = (in_features + out_features) ** -0.25 * rank ** -0.25
    A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64) * std
    return A, torch.randn(out_features, rank, generator=generator, dtype=torch.float64) * std

def check(out_features: int, in_features: int, rank: int, k: int, **switches):
    """Raises ValueError for a decomposition that cannot be."""
    for name, value in switches.items():
        if value not in SWITCHES[name]:
            raise ValueError(f"{name} = {value!r}: choose one of {', '.join(SWITCHES[name])}")
    full = min(out_features, in_features)
    if not 1 <= rank <= full:
        raise ValueError(f"rank {rank} of a {out_features}×{in_features} weight must lie in [1, {full}]")
    if not 0 <= k <= in_features:
        raise ValueError(f"k = {k} channels of {in_features} must lie in [0, {in_features}]")
    if k and rank == full and switches.get("select", "").startswith("residual"):
        raise ValueError(f"rank {rank} of a {out_features}×{in_features} weight leaves no residual to choose "
                         "channels by: lower the rank, set the sparsity to 0, or select by weight or random")

@torch.no_grad()
def decompose(weight: torch.Tensor, rank: int, k: int, init: str = "svd", select: str = "residual",
              sparse_init: str = "weight", generator: torch.Generator | None = None) -> Decomposition:
    """Split weight (out, in) into low-rank factors and k input channels, eqs. 1–6.

    init: factors from the SVD, or at "random" as CoLA's. select: channels by the residual's column norms (L2
    or L1), by the weight's, or at random. sparse_init: W_s from the columns of W or of W_comp. generator, of
    the CPU: for random draws (default: torch's global one). Computed in float64, returned in the weight's
    dtype on its device. Raises ValueError for a non-finite weight and for a rank or k out of range."""
    if weight.dim() != 2:
        raise ValueError(f"a weight is a matrix (out, in), not of shape {tuple(weight.shape)}")
    check(*weight.shape, rank, k, init=init, select=select, sparse_init=sparse_init)
    if not weight.isfinite().all():
        raise ValueError("the weight has NaN or infinite elements: decompose before anything diverges")
    W = (weight.cpu() if weight.device.type == "mps" else weight.detach()).double()      # MPS has no float64
    U = sigma = Vt = None
    if init == "svd" or k and (select.startswith("residual") or sparse_init == "residual"):
        U, sigma, Vt = top_svd(W, rank)
    if init == "svd":
        A, B = sigma.sqrt()[:, None] * Vt, U * sigma.sqrt()
    else:
        A, B = random_factors(*weight.shape, rank, generator)
    index, W_s = torch.empty(0, dtype=torch.int64), W[:, :0]
    if k:
        index = importance(W, U, sigma, Vt, select, generator).topk(k).indices.sort().values
        W_s = W[:, index] if sparse_init == "weight" else W[:, index] - (U * sigma) @ Vt[:, index]
    A, B, W_s = (part.to(weight).contiguous() for part in (A, B, W_s))
    if not all(part.isfinite().all() for part in (A, B, W_s)):
        raise ValueError(f"the decomposition overflows {weight.dtype}: use a wider dtype or a smaller weight")
    return Decomposition(A, B, index.to(weight.device, torch.int32), W_s)

class Inner(torch.autograd.Function):
    """x (..., in) → x Aᵀ (..., r) and x_I (..., k). The gradient of x_I is added to that of x where it
    belongs; autograd would fill a tensor of x's size with zeros for it and add two of that size."""

    @staticmethod
    def forward(ctx, x, A, index):
        ctx.save_for_backward(x, A, index)
        return F.linear(x, A), x.index_select(-1, index)

    @staticmethod
    def backward(ctx, dz, dx_I):
        x, A, index = ctx.saved_tensors
        dx = dz @ A
        dx[..., index] += dx_I                                             # indices are distinct
        return dx, dz.reshape(-1, len(A)).T @ x.reshape(-1, x.shape[-1]), None

def as_autocast(*tensors):
    """Cast as autocast does for a product: it does not look into an autograd.Function."""
    kind = tensors[0].device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return [t.to(dtype) for t in tensors] if on else tensors

class LOSTLinear(nn.Module):
    """Drop-in for nn.Linear by eq. 7: x (..., in) → (..., out).

    Parameters A (rank, in), B (out, rank), W_s (out, k); buffer index (k,) int32; gamma a number, or a
    parameter where `learn_gamma`. With k = 0 there is no sparse path, no W_s and no index. The constructor
    leaves all empty, to be filled by `from_linear` or from a checkpoint."""

    few_rows = False                           # a second form of eq. 7 for decoding, asked for explicitly

    def __init__(self, in_features: int, out_features: int, rank: int, k: int, gamma: float = 0.7,
                 activation: str = "silu", learn_gamma: bool = False, bias: bool = False, **kwargs):
        super().__init__()
        check(out_features, in_features, rank, k, activation=activation)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma = {gamma}: must lie in [0, 1]")
        self.in_features, self.out_features, self.rank, self.k = in_features, out_features, rank, k
        self.activation = activation
        self.A = nn.Parameter(torch.empty(rank, in_features, **kwargs))
        self.B = nn.Parameter(torch.empty(out_features, rank, **kwargs))
        if k:
            self.W_s = nn.Parameter(torch.empty(out_features, k, **kwargs))
            self.register_buffer("index", torch.empty(k, **{**kwargs, "dtype": torch.int32}))
        self.bias = nn.Parameter(torch.empty(out_features, **kwargs)) if bias else None
        self.gamma = nn.Parameter(torch.tensor(gamma, **kwargs)) if learn_gamma else gamma

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int, sparsity: float, gamma: float = 0.7,
                    activation: str = "silu", learn_gamma: bool = False, init: str = "svd",
                    select: str = "residual", sparse_init: str = "weight",
                    generator: torch.Generator | None = None) -> "LOSTLinear":
        """Decompose a dense layer: k = max(1, int(sparsity · in)) channels, none where sparsity is 0. A bias
        is carried. On the meta device only the shapes are made and checked."""
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity = {sparsity}: must lie in [0, 1]")
        k = max(1, int(sparsity * linear.in_features)) if sparsity else 0
        layer = cls(linear.in_features, linear.out_features, rank, k, gamma, activation, learn_gamma,
                    linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)
        check(*linear.weight.shape, rank, k, init=init, select=select, sparse_init=sparse_init)
        if not linear.weight.is_meta:
            parts = decompose(linear.weight, rank, k, init, select, sparse_init, generator)._asdict()
            for name, value in {**parts, "bias": linear.bias}.items():
                if getattr(layer, name, None) is not None:                 # without k or a bias it has none
                    getattr(layer, name).copy_(value)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, x_I = self.inner(x)
        if not self.k:
            return F.linear(z, self.B, self.bias)                                          # (..., out)
        if self.few_rows:                      # no copy of B and W_s: decoding asks for it
            return F.linear(z, self.B, self.bias) + F.linear(x_I, self.W_s)
        # the sum as one product: two wide outputs less to add up. In rows of 16 bytes in bf16, for GPUs
        pad = 0, -(self.rank + self.k) % 8
        z, B = F.pad(torch.cat((z, x_I), -1), pad), F.pad(torch.cat((self.B, self.W_s), -1), pad)
        return F.linear(z, B, self.bias)

    def inner(self, x):
        """γ · SiLU(x Aᵀ) (..., rank) and (1 − γ) · x_I (..., k): γ scales what is narrow."""
        z, x_I = Inner.apply(*as_autocast(x, self.A), self.index) if self.k else (F.linear(x, self.A), None)
        return self.gamma * ACTIVATIONS[self.activation](z), (1 - self.gamma) * x_I if self.k else None

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The dense layer with the same output, weight γ B A + (1 − γ) W_s in the columns I: without SiLU."""
        if self.activation != "none":
            raise ValueError(f"activation {self.activation!r} makes the layer non-linear, no single weight "
                             "equals it: train with activation none to merge")
        dense = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None,
                                   device=self.A.device, dtype=self.A.dtype)
        dense.weight.copy_(self.gamma * (self.B @ self.A))
        if self.k:
            dense.weight.index_add_(1, self.index, (1 - self.gamma) * self.W_s)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def settings(self) -> dict:
        """The constructor's arguments, from which a checkpoint builds the layer without a decomposition."""
        learned = isinstance(self.gamma, nn.Parameter)
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "k": self.k, "gamma": float(self.gamma.detach()) if learned else self.gamma,
                "activation": self.activation, "learn_gamma": learned, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())

    @torch.no_grad()
    def diagnose(self, x: torch.Tensor) -> dict[str, float]:
        """What the paths do with the inputs x, and what became of the factors: see `diagnose` below."""
        z, x_I = self.inner(x)
        low = F.linear(z, self.B).float()
        sparse = F.linear(x_I, self.W_s).float() if self.k else torch.zeros_like(low)
        energy, other = low.square().sum(), sparse.square().sum()
        # in float64, which autocast leaves alone and MPS has not
        A, B = ((p.cpu() if p.device.type == "mps" else p).double() for p in (self.A, self.B))
        gram_A = A @ A.T                                                   # (rank, rank)
        value, vector = torch.linalg.eigh(B.T @ B)
        root = vector * value.clamp(min=0).sqrt()                          # root rootᵀ = BᵀB
        sigma = torch.linalg.eigvalsh(root.T @ gram_A @ root).clamp(min=0).sqrt()        # of B A
        p = sigma / sigma.sum()
        numbers = {"low_rank_share": energy / (energy + other),
                   "cosine": (low * sparse).sum() / (energy * other).sqrt().clamp(min=1e-30),
                   "effective_rank": torch.special.entr(p).sum().exp(),
                   "norm_A": torch.linalg.eigvalsh(gram_A)[-1].sqrt(), "norm_B": value[-1].sqrt(),
                   "gamma": self.gamma}
        return {name: float(f"{float(number):.5g}") for name, number in numbers.items()}

def diagnose(model: nn.Module, run, part: tuple[int, int] = (0, 1)) -> dict[str, dict[str, float]]:
    """Name of each LOSTLinear of `model` → what its `diagnose` says of the inputs that it gets while run()
    runs the model once, not compiled. part: as of `apply_lost`, (i, n) looks at the i-th of every n layers.

    low_rank_share  ‖y_L‖² / (‖y_L‖² + ‖y_S‖²) of the two terms y_L and y_S of eq. 7
    cosine          of y_L and y_S over all elements: below 0 the paths cancel one another
    effective_rank  of B A: e to the entropy of its normalised singular values (Roy and Vetterli 2007)
    norm_A, norm_B  spectral norms;  gamma  as it is now"""
    layers = [(m, name) for name, m in model.named_modules() if isinstance(m, LOSTLinear)]
    names, found = dict(layers[part[0]::part[1]]), {}
    def look(module, args):
        if module in names:
            found[names[module]] = module.diagnose(args[0])
    with register_module_forward_pre_hook(look):                           # until run() returns or raises
        run()
    return found

def _ends(name: str, key: str) -> bool:
    return f".{name}".endswith(f".{key}")

def by_module(value, name: str):
    """The number for the module `name`: `value` itself, or where it is a dict the entry whose key is the
    longest end of the dotted name, else "default": with {"q_proj": 64, "default": 128} 64 for a q_proj."""
    if not isinstance(value, dict):
        return value
    longest = max((key for key in value if _ends(name, key)), key=len, default="default")
    if longest not in value:
        raise ValueError(f"nothing is said for {name}, only for {', '.join(value)}: add a default")
    return value[longest]

def apply_lost(model: nn.Module, rank: int | dict, sparsity: float | dict, gamma: float = 0.7, *,
               skip: tuple[str, ...] = ("lm_head",), part: tuple[int, int] = (0, 1), **switches) -> nn.Module:
    """Replace every nn.Linear of `model` by a LOSTLinear, in place and one at a time, and return the model.

    rank, sparsity: a number, or a dict by module name (`by_module`). skip: ends of the names of modules that
    stay dense. part: (i, n) decomposes the i-th of every n layers and leaves the others empty, to be filled
    by n - 1 more processes. switches: of `LOSTLinear.from_linear`. ValueError names the module that does
    not fit."""
    names = [name for name, m in model.named_modules()
             if isinstance(m, nn.Linear) and not any(_ends(name, s) for s in skip)]
    if not names:
        raise ValueError("the model has no nn.Linear to replace")
    for key in {key for spec in (rank, sparsity) if isinstance(spec, dict) for key in spec} - {"default"}:
        if not any(_ends(name, key) for name in names):
            raise ValueError(f"no module is called {key!r}: the first ones are {', '.join(names[:7])}")
    for number, name in enumerate(names):
        try:
            linear, mine = model.get_submodule(name), number % part[1] == part[0]
            device = linear.weight.device
            layer = LOSTLinear.from_linear(linear if mine else linear.to("meta"), by_module(rank, name),
                                           by_module(sparsity, name), gamma, **switches)
            if not mine:
                layer.to_empty(device=device)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is linear:               # also where the model uses it a second time
                model.set_submodule(alias, layer)
    return model
