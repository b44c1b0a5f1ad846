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

A *pinned* layer, which the paper does not have, takes r input channels P as they are and the others R by A:

    z      = x[..., P] + x[..., R] Aᵀ   in the place of x Aᵀ in (7)     (8)

It has r² values fewer, and without the SiLU any layer can be written so (`pin`).

| code         | paper | shape     |                  | code         | paper | shape |
|--------------|-------|-----------|                  |--------------|-------|-------|
| A            | A     | (r, in)   |                  | rank         | r     | –     |
| B            | B     | (out, r)  |                  | sparsity     | ρ     | –     |
| W_s          | W_s   | (out, k)  |                  | gamma        | γ     | ()    |
| index        | I     | (k,)      |                  | importance   | CI    | (in,) |
| A, pinned    | –     | (r, in−r) |                  | pivot        | P     | (r,)  |

    model = apply_lost(model, rank=128, sparsity=0.01)

Not here: a Kaiming start of W (give a model that has one), channels chosen again during training."""
import contextlib
import inspect
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_pre_hook

ACTIVATIONS = {"silu": F.silu, "none": lambda z: z}

# What may be chosen beside rank, sparsity and γ; the first of each is the paper's
SWITCHES = {
    "init": ("svd", "random"),
    "select": ("residual", "residual_l1", "weight", "random"),
    "sparse_init": ("weight", "residual"),
    "activation": tuple(ACTIVATIONS),
}

GAMMA = 0.7                                    # the paper's
HEAD = ("lm_head",)                            # dense by default, as in the paper

class LOSTError(ValueError):
    """A rank, a sparsity, a name or a model that does not fit: the message says what to change."""

# --- what is refused ---

# Values come from flags and from files, so their types are checked too. Each check raises LOSTError

def whole(name: str, value) -> int:
    if not isinstance(value, Integral):
        raise LOSTError(f"{name} = {value!r}: must be a whole number")
    return int(value)

def fraction(name: str, value) -> float:
    # NaN fails both comparisons
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise LOSTError(f"{name} = {value!r}: must lie in [0, 1]")
    return float(value)

def check_switches(**switches):
    for name, value in switches.items():
        if value not in SWITCHES[name]:
            raise LOSTError(f"{name} = {value!r}: choose one of {', '.join(SWITCHES[name])}")

def check_sizes(shape: tuple[int, int], rank: int, k: int, select: str = ""):
    out_features, in_features = shape
    full = min(shape)
    size = f"{out_features}×{in_features}"
    if not 1 <= whole("rank", rank) <= full:
        raise LOSTError(f"rank {rank} of a {size} weight must lie in [1, {full}]: give another "
                        "rank, or this module one of its own by a dict of names, or skip it")
    if not 0 <= whole("k", k) <= in_features:
        raise LOSTError(f"k = {k} channels of {in_features} must lie in [0, {in_features}]")
    # at full rank W_comp is rounding, and so would be the choice of channels
    if k and rank == full and select.startswith("residual"):
        raise LOSTError(f"rank {rank} of a {size} weight leaves no residual to choose channels by: "
                        "lower the rank, set the sparsity to 0, or select by weight or random")

def check_matrix(weight: Tensor):
    if weight.dim() != 2:
        raise LOSTError(f"a weight is a matrix (out, in), not of shape {tuple(weight.shape)}")
    # integers are a quantised weight, which needs its scale
    if not weight.is_floating_point():
        raise LOSTError(f"a weight of {weight.dtype} cannot be decomposed: use a floating-point one")

def check_values(weight: Tensor, k: int, sparse_init: str):
    if weight.is_meta:
        raise LOSTError("a weight on the meta device has no values to decompose")
    if not weight.isfinite().all():
        raise LOSTError("the weight has NaN or infinite elements: decompose before anything diverges")
    # Only two things can overflow: squares of float64 elements, and W_comp, whose columns are no longer than
    # those of W. A and B are of the size of √W, and W_s of the weight is a copy
    squares_may = weight.dtype == torch.float64
    residual_may = k > 0 and sparse_init == "residual"
    if not squares_may and not residual_may:
        return
    longest = in_float64(weight).norm(dim=0).max()
    if longest > torch.finfo(weight.dtype).max:
        raise LOSTError(f"the decomposition overflows {weight.dtype}: use a wider dtype or a smaller weight")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# A layer that is more than a matrix and a bias would lose what it adds
def check_linear(linear: nn.Module):
    kind = type(linear).__name__
    if not isinstance(linear, nn.Linear):
        raise LOSTError(f"a {kind} is no nn.Linear")
    # parametrizations, weight_norm and spectral_norm compute the weight from other parameters
    weight = dict(linear.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise LOSTError("its weight is computed by a parametrization: remove that first, or keep it dense")
    if nn.parameter.is_lazy(weight):
        raise LOSTError("it has no weight yet: run the model once before it is converted")
    # of its class, or set on the instance, as some libraries do
    forward = getattr(linear.forward, "__func__", None)
    if forward is not nn.Linear.forward:
        raise LOSTError(f"a {kind} computes more than an nn.Linear (it has its own forward): keep it dense")
    if any(getattr(linear, name) for name in HOOKS):
        raise LOSTError("it has hooks, which a LOST layer would not run: remove them first, or keep it dense")
    check_matrix(weight)

# `Inner.backward` counts on distinct channels: a repeated one would lose its gradient silently. So of pivots
def check_index(index: Tensor, in_features: int, name: str):
    # values of the meta device cannot be looked at; they come later, by another load
    if index.is_meta:
        return
    counts = not index.is_floating_point() and index.dtype != torch.bool
    # in int64, where no difference of two int32 wraps around
    index = index.long()
    rising = (index.diff() > 0).all()
    # where they rise, the ends say all about the range
    within = index[0] >= 0 and index[-1] < in_features
    if not counts or not rising or not within:
        raise LOSTError(f"{name} must hold different channels of 0 … {in_features - 1} in ascending order: "
                        "the file is damaged, or of another layer")

# --- the decomposition ---

class Decomposition(NamedTuple):
    A: Tensor                            # (r, in)
    B: Tensor                            # (out, r)
    index: Tensor                        # (k,) int32, ascending
    W_s: Tensor                          # (out, k)

def in_float64(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.detach().double()

# A singular value below this share of the largest is rounding: √ε of the Gram matrix is 1.5e-8
NOTHING = 1e-7

def top_svd(W: Tensor, rank: int) -> tuple[Tensor, ...]:
    """The r largest singular triples of W (out, in): U_r (out, r), Σ_r (r,), V_rᵀ (r, in), eq. 1.

    From the eigenvectors of the smaller Gram matrix, 1–8 times faster than a full SVD; squaring the condition
    number is harmless in float64. A singular value of zero gets zero vectors on the other side."""
    wide = W.shape[0] <= W.shape[1]
    gram = W @ W.T if wide else W.T @ W
    # the smaller matrix has all that are asked for: r ≤ min(out, in). Eigenvalues come in ascending order
    value, vector = torch.linalg.eigh(gram)
    sigma = value[-rank:].flip(0).clamp(min=0).sqrt()
    vector = vector[:, -rank:].flip(1)
    something = sigma > NOTHING * sigma[0]
    inverse = torch.where(something, 1 / sigma, 0.0)
    if wide:
        Vt = inverse[:, None] * (vector.T @ W)
        return vector, sigma, Vt
    U = (W @ vector) * inverse
    return U, sigma, vector.T

def svd_factors(U: Tensor, sigma: Tensor, Vt: Tensor) -> tuple[Tensor, ...]:
    """A (r, in) and B (out, r) of eq. 2.

    Where a singular value is zero, a row of A and a column of B that are both zero would never get a
    gradient. `top_svd` has unit vectors on one side there and zeros on the other: those of a tenth of the
    largest row's size leave B A as it is and let the zeros learn, as LoRA's B = 0 does."""
    root = sigma.sqrt()
    # a weight of zeros has no size of its own: 1, so that z is of the size of x
    size = torch.where(sigma[0] > 0, root[0], 1.0)
    something = sigma > NOTHING * sigma[0]
    root = torch.where(something, root, 0.1 * size)
    A = root[:, None] * Vt
    B = U * root
    return A, B

def random_factors(shape: tuple[int, int], rank: int, generator=None) -> tuple[Tensor, ...]:
    """A and B of independent normal elements; those of B A have the standard deviation (in + out)^-½: the
    start of CoLA (Liu et al. 2025, arXiv 2502.10940, its published code)."""
    out_features, in_features = shape
    std = (in_features + out_features) ** -0.25 * rank ** -0.25
    kind = {"generator": generator, "dtype": torch.float64}
    A = torch.randn(rank, in_features, **kind) * std
    B = torch.randn(out_features, rank, **kind) * std
    return A, B

def importance(W, U, sigma, Vt, select: str, generator=None) -> Tensor:
    """CI_j of each input channel, (in,): eq. 4 and its alternatives."""
    if select == "weight":
        return W.norm(dim=0)
    if select == "random":
        # drawn on the CPU: the same channels on every device
        draw = torch.rand(W.shape[1], generator=generator, dtype=torch.float64)
        return draw.to(W.device)
    if select == "residual_l1":
        W_comp = W - (U * sigma) @ Vt
        return W_comp.abs().sum(0)
    # columns of W_r and W_comp are orthogonal: ‖W_comp[:, j]‖² = ‖W[:, j]‖² − ‖W_r[:, j]‖²
    square = W.square().sum(0)
    low_rank = (sigma[:, None] * Vt).square().sum(0)
    return (square - low_rank).clamp(min=0).sqrt()

@torch.no_grad()
def decompose(
    weight: Tensor,
    rank: int,
    k: int,
    init: str = "svd",
    select: str = "residual",
    sparse_init: str = "weight",
    generator: torch.Generator | None = None,
) -> Decomposition:
    """Split weight (out, in) into low-rank factors and k input channels, eqs. 1–6.

    init: factors from the SVD, or at "random" as CoLA's. select: channels by the residual's column norms (L2
    or L1), by the weight's, or at random. sparse_init: W_s from the columns of W or of W_comp. generator, of
    the CPU: for random draws (default: torch's global one). Computed in float64, returned in the weight's
    dtype on its device. Raises LOSTError for a non-finite weight and for a rank or k out of range."""
    check_matrix(weight)
    check_switches(init=init, select=select, sparse_init=sparse_init)
    check_sizes(weight.shape, rank, k, select)
    check_values(weight, k, sparse_init)
    W = in_float64(weight)
    U = sigma = Vt = None
    residual = select.startswith("residual") or sparse_init == "residual"
    # with random factors and columns of the weight there is no need of it, and a large model starts at once
    if init == "svd" or k and residual:
        U, sigma, Vt = top_svd(W, rank)
    # the order of the draws is part of what a seed means: the factors', then the channels'
    if init == "svd":
        A, B = svd_factors(U, sigma, Vt)
    else:
        A, B = random_factors(weight.shape, rank, generator)
    index = torch.empty(0, dtype=torch.int64)
    if k:
        CI = importance(W, U, sigma, Vt, select, generator)
        index = CI.topk(k).indices.sort().values
    W_s = W[:, index]
    if k and sparse_init == "residual":
        W_s = W_s - (U * sigma) @ Vt[:, index]
    A, B, W_s = (part.to(weight).contiguous() for part in (A, B, W_s))
    for part in (A, B, W_s):
        assert part.isfinite().all(), f"overflow of {weight.dtype}"
    index = index.to(weight.device, torch.int32)
    return Decomposition(A, B, index, W_s)

# --- pinned factors ---

class Pinned(NamedTuple):
    pivot: Tensor                        # (r,) int32, ascending
    A: Tensor                            # (r, in - r)
    B: Tensor                            # (out, r)

def pivot_order(swaps: Tensor, count: int) -> Tensor:
    """The order of `count` rows that LAPACK's swaps (r,), counted from 1, leave."""
    order = list(range(count))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=swaps.device)

@torch.no_grad()
def pin(A: Tensor, B: Tensor) -> Pinned:
    """The factors of eq. 8 with the same product: B' Z = B A, where Z holds the identity in the columns P and
    A' in the others.

    LU with row pivoting, Aᵀ = [L₁; L₂] U with its rows in the order P, R, chooses the channels, so that no
    element of L is above 1. Then A' = L₁⁻ᵀ L₂ᵀ and B' = B A[:, P]: U is never inverted, and rows of A that
    depend on each other do no harm. In float64; raises LOSTError for what is not finite."""
    check_matrix(A)
    check_matrix(B)
    rank, in_features = A.shape
    check_sizes((len(B), in_features), rank, 0)
    for factor in (A, B):
        check_values(factor, 0, "weight")
    wide = in_float64(A)
    # _ex: the other form refuses an A without full rank
    lu, swaps, _ = torch.linalg.lu_factor_ex(wide.T)
    order = pivot_order(swaps, in_features)
    above = lu[:rank].T
    below = lu[rank:].T
    T = torch.linalg.solve_triangular(above, below, upper=True, unitriangular=True)      # (r, in - r)
    # ascending, as a file has it and memory is read
    pivot, rows = order[:rank].sort()
    columns = order[rank:].argsort()
    T = T[rows][:, columns]
    A_new, B_new = (part.to(A).contiguous() for part in (T, in_float64(B) @ wide[:, pivot]))
    if not (A_new.isfinite().all() and B_new.isfinite().all()):
        raise LOSTError(f"the pinned form overflows {A.dtype}: use a wider dtype")
    return Pinned(pivot.to(A.device, torch.int32), A_new, B_new)

def other_channels(pivot: Tensor, in_features: int) -> Tensor:
    """The channels (in - r,) that `pivot` (r,) leaves, int32, both ascending."""
    rank = len(pivot)
    number = torch.arange(in_features - rank, device=pivot.device)
    # pivot_i has pivot_i - i others before it: the j-th other follows all pivots that have j or fewer
    before = pivot.long() - torch.arange(rank, device=pivot.device)
    passed = torch.searchsorted(before, number, right=True)
    return (number + passed).int()

def in_order(parts: Tensor, pivot: Tensor, rest: Tensor) -> Tensor:
    """Columns (..., in), first those of the pivots, then of the others, each put where its channel is."""
    places = torch.cat((pivot, rest)).long()
    return torch.empty_like(parts).index_copy(-1, places, parts)

# --- the layer ---

# Plain addition is enough, since the indices are distinct: `check_index`. Not as dx[..., index] +=, which
# torch.func batches wrongly where each member of an ensemble has its own index
def add_channels(dx: Tensor, index: Tensor, dx_I: Tensor) -> Tensor:
    own = dx.index_select(-1, index) + dx_I
    return dx.index_copy(-1, index.long(), own)

# One product over all rows, whatever dimensions they come in
def gradient_of_A(dz: Tensor, x: Tensor) -> Tensor:
    dz = dz.reshape(-1, dz.shape[-1])
    # not -1: at rank = in a pinned layer has none of x left
    x = x.reshape(len(dz), x.shape[-1])
    return dz.T @ x

class Inner(torch.autograd.Function):
    """x (..., in) → x Aᵀ (..., r) and x_I (..., k). The gradient of x_I is added to that of x where it
    belongs; autograd would fill a tensor of x's size with zeros for it and add two of that size."""

    # forward and backward are operations that torch.func can batch by itself
    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, index):
        return F.linear(x, A), x.index_select(-1, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dz, dx_I):
        x, A, index = ctx.saved_tensors
        dx = add_channels(dz @ A, index, dx_I)
        return dx, gradient_of_A(dz, x), None

# Of nearly all channels: on a CPU 4 times faster than index_select, which takes one after the other
def gathered(x: Tensor, index: Tensor) -> Tensor:
    places = index.long().expand(*x.shape[:-1], -1)
    return x.gather(-1, places)

class PinnedInner(torch.autograd.Function):
    """The same for eq. 8: x (..., in) → z (..., r) and x_I (..., k), where k may be 0. Every channel is a
    pivot or one of the rest, so that the gradient of x is written once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, pivot, rest, index):
        z = gathered(x, pivot) + F.linear(gathered(x, rest), A)
        return z, x.index_select(-1, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dz, dx_I):
        x, A, pivot, rest, index = ctx.saved_tensors
        dx = in_order(torch.cat((dz, dz @ A), -1), pivot, rest)
        if len(index):
            dx = add_channels(dx, index, dx_I)
        # gathered again: kept, it would be as large as x, which q, k and v share
        x_rest = gathered(x, rest)
        return dx, gradient_of_A(dz, x_rest), None, None, None

# torch asks for it at each call, and Python takes 30 µs to find it anew: half of a small layer's forward
Inner.forward.__signature__ = inspect.signature(Inner.forward)
PinnedInner.forward.__signature__ = inspect.signature(PinnedInner.forward)

# Autocast does not look into an autograd.Function: cast as it does for a product
def as_autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    # the meta device has no autocast, and asking it for one is an error
    if not torch.amp.is_autocast_available(kind):
        return tensor
    # autocast leaves float64 alone
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))

def inner_products(inner: type, x: Tensor, A: Tensor, *channels: Tensor) -> tuple[Tensor, ...]:
    x = as_autocast(x)
    A = as_autocast(A)
    # Forward-mode derivatives (jvp, jacfwd) go through plain operations: Inner has no jvp, because
    # torch.compile refuses a Function that has one
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return inner.forward(x, A, *channels)
    return inner.apply(x, A, *channels)

def listed(settings: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())

# With the bias and the mode of a layer that it stands for
def as_linear(layer: nn.Module, weight: Tensor, trained: bool) -> nn.Linear:
    # the usual constructor would draw a weight, and so move torch's generator
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    kind = {"device": weight.device, "dtype": weight.dtype}
    dense = nn.utils.skip_init(nn.Linear, *sizes, **kind)
    dense.weight.copy_(weight)
    dense.weight.requires_grad_(trained)
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)

def require_linear(layer: nn.Module):
    if layer.activation != "none":
        raise LOSTError(f"activation {layer.activation!r} makes the layer non-linear, no single weight "
                        "equals it: train with activation none to merge")

class LOSTLinear(nn.Module):
    """Drop-in for nn.Linear by eq. 7: x (..., in) → (..., out).

    Parameters A (rank, in), B (out, rank), W_s (out, k); buffer index (k,) int32; gamma a number, or a
    parameter where `learn_gamma`. With k = 0 there is no sparse path, no W_s and no index. Where `pinned` (by
    eq. 8) A is (rank, in - rank), and there is a buffer pivot (rank,) int32. The constructor leaves all
    empty, to be filled by `from_linear` or from a checkpoint. Raises LOSTError for what does not fit."""

    # a second form of eq. 7 for the decode step, which asks for it explicitly
    few_rows = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        k: int,
        gamma: float = GAMMA,
        activation: str = "silu",
        learn_gamma: bool = False,
        bias: bool = False,
        pinned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_switches(activation=activation)
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        check_sizes((self.out_features, self.in_features), rank, k)
        self.rank = int(rank)
        self.k = int(k)
        self.activation = activation
        self.pinned = bool(pinned)
        def empty(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        def channels(count):
            # int32 is half of torch's own kind of index, in memory and in the file
            return torch.empty(count, device=device, dtype=torch.int32)
        by_A = self.in_features
        if self.pinned:
            by_A -= self.rank
            self.register_buffer("pivot", channels(self.rank))
            # follows from the pivots: not in the file
            self.register_buffer("rest", channels(by_A), persistent=False)
        self.A = empty(self.rank, by_A)
        self.B = empty(self.out_features, self.rank)
        if k:
            self.W_s = empty(self.out_features, self.k)
            self.register_buffer("index", channels(self.k))
        self.bias = empty(self.out_features) if bias else None
        # a checkpoint from before γ was kept in [0, 1] may say 1.1 for a learned one
        if learn_gamma and isinstance(gamma, Real) and gamma == gamma:
            gamma = min(max(gamma, 0), 1)
        gamma = fraction("gamma", gamma)
        if not learn_gamma:
            self.gamma = gamma
        else:
            # of no dimension: the optimizer's group of vectors has it, without decay
            value = torch.tensor(gamma, device=device, dtype=dtype)
            self.gamma = nn.Parameter(value)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        sparsity: float,
        gamma: float = GAMMA,
        activation: str = "silu",
        learn_gamma: bool = False,
        init: str = "svd",
        select: str = "residual",
        sparse_init: str = "weight",
        generator: torch.Generator | None = None,
        *,
        empty: bool = False,
    ) -> "LOSTLinear":
        """Decompose a dense layer: k = max(1, int(sparsity · in)) channels, none where sparsity is 0. A bias
        is carried, a frozen layer stays frozen, training mode is kept.

        empty, and always on the meta device: everything is checked, and only the shapes are made. Raises
        LOSTError for what does not fit."""
        check_linear(linear)
        weight = linear.weight
        out_features, in_features = weight.shape
        # 0.29 of 100 is 28.999… in floating point, and 29 in eq. 5
        k = int(fraction("sparsity", sparsity) * in_features + 1e-9)
        if sparsity:
            k = max(1, k)
        # stricter than the constructor, which also reads old files
        fraction("gamma", gamma)
        check_switches(init=init, select=select, sparse_init=sparse_init)
        check_sizes(weight.shape, rank, k, select)
        has_bias = linear.bias is not None
        layer = cls(in_features, out_features, rank, k, gamma, activation, learn_gamma, has_bias,
                    device=weight.device, dtype=weight.dtype)
        layer.take_over(linear)
        if weight.is_meta:
            return layer
        if empty:
            check_values(weight, k, sparse_init)
            return layer
        parts = decompose(weight, rank, k, init, select, sparse_init, generator)
        layer.fill(parts, linear.bias)
        return layer

    def take_over(self, linear: nn.Linear):
        """Mode and frozen parameters of the dense layer."""
        self.train(linear.training)
        # γ too: a frozen layer goes on computing what it did
        for parameter in self.parameters():
            parameter.requires_grad_(linear.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(linear.bias.requires_grad)

    def fill(self, parts: Decomposition, bias: Tensor | None):
        """Copy the values of a decomposition, and of the bias where there is one."""
        # into what is there: a parameter that a caller holds stays the layer's
        self.A.copy_(parts.A)
        self.B.copy_(parts.B)
        if self.k:
            self.W_s.copy_(parts.W_s)
            self.index.copy_(parts.index)
        if bias is not None:
            self.bias.copy_(bias)

    # `input` as in nn.Linear, for callers that pass it by name
    def forward(self, input: Tensor) -> Tensor:
        z, x_I = self.inner(input)
        if not self.k:
            return F.linear(z, self.B, self.bias)                                          # (..., out)
        # with few rows copying B and W_s costs more than adding two outputs: a decode step of 130m in bf16
        # on two cores takes 5.9 ms so, against 6.5
        if self.few_rows:
            low_rank = F.linear(z, self.B, self.bias)
            return low_rank + F.linear(x_I, self.W_s)
        # the sum as one product: two wide outputs less to add up, a step of 130m in 2291 ms, not 2320
        z = torch.cat((z, x_I), -1)                                                   # (..., rank + k)
        B = torch.cat((self.B, self.W_s), -1)                                         # (out, rank + k)
        # rows of 16 bytes in bf16, which GPUs read faster
        pad = (0, -(self.rank + self.k) % 8)
        z = F.pad(z, pad)
        B = F.pad(B, pad)
        return F.linear(z, B, self.bias)

    def inner(self, x: Tensor):
        """γ · SiLU(z) (..., rank) and (1 − γ) · x_I (..., k): γ scales what is narrow."""
        # eq. 7 scales the outputs; the sum is the same and rank + k is less than out
        gamma = self.bounded_gamma()
        activation = ACTIVATIONS[self.activation]
        if self.pinned:
            index = self.index if self.k else self.pivot[:0]
            z, x_I = inner_products(PinnedInner, x, self.A, self.pivot, self.rest, index)
        elif self.k:
            z, x_I = inner_products(Inner, x, self.A, self.index)
        else:
            return gamma * activation(F.linear(x, self.A)), None
        return gamma * activation(z), (1 - gamma) * x_I

    def bounded_gamma(self) -> float | Tensor:
        """γ within [0, 1], whatever an optimizer made of a learned one.

        The gradient passes straight through (Bengio et al. 2013, arXiv 1308.3432): with that of a clamp,
        zero outside, a γ that has left would never return."""
        # no isinstance of nn.Parameter: torch.func puts plain tensors in the place of parameters
        if not isinstance(self.gamma, Tensor):
            return self.gamma
        through = self.gamma - self.gamma.detach()
        # the difference is exactly 0: inside [0, 1] this is γ to the last bit
        return self.gamma.detach().clamp(0, 1) + through

    def full_A(self) -> Tensor:
        """A (rank, in), with the identity that a pinned layer leaves out."""
        if not self.pinned:
            return self.A
        identity = torch.eye(self.rank, device=self.A.device, dtype=self.A.dtype)
        return in_order(torch.cat((identity, self.A), -1), self.pivot, self.rest)

    @torch.no_grad()
    def as_pinned(self) -> "LOSTLinear":
        """A pinned layer that computes the same with r² values fewer. Raises LOSTError for one with SiLU."""
        if self.activation != "none":
            raise LOSTError(f"activation {self.activation!r} stands between the factors, which no identity "
                            "can pass: only a layer with activation none can be pinned")
        if self.pinned:
            return self
        kind = {"device": self.B.device, "dtype": self.B.dtype}
        layer = type(self)(**{**self.settings(), "pinned": True}, **kind)
        if not self.B.is_meta:
            layer.load_state_dict({**self.state_dict(), **pin(self.A, self.B)._asdict()})
        for name, parameter in self.named_parameters():
            getattr(layer, name).requires_grad_(parameter.requires_grad)
        return layer.train(self.training)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The dense layer with the same output, weight γ B A + (1 − γ) W_s in the columns I: without SiLU.
        Raises LOSTError for a layer with SiLU."""
        require_linear(self)
        gamma = self.bounded_gamma()
        weight = gamma * (self.B @ self.full_A())
        if self.k:
            W_s = (1 - gamma) * self.W_s
            weight.index_add_(1, self.index, W_s)
        return as_linear(self, weight, self.A.requires_grad or self.B.requires_grad)

    def settings(self) -> dict:
        """The constructor's arguments, from which a checkpoint builds the layer without a decomposition."""
        learned = isinstance(self.gamma, Tensor)
        # a number on the meta device has no value; any will do there, since the learned one is loaded
        unknown = learned and self.gamma.is_meta
        gamma = GAMMA if unknown else self.bounded_gamma()
        if isinstance(gamma, Tensor):
            gamma = gamma.item()
        # all of it plain values, for JSON
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "k": self.k,
            "gamma": gamma,
            "activation": self.activation,
            "learn_gamma": learned,
            "bias": self.bias is not None,
            "pinned": self.pinned,
        }

    def extra_repr(self) -> str:
        return listed(self.settings())

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """What load_state_dict calls for each module: here also the channels are checked."""
        for buffer, own in self.named_buffers(recurse=False):
            name = f"{prefix}{buffer}"
            index = state_dict.get(name)
            # a shape that does not fit is torch's to report, with all others
            if index is not None and index.shape == own.shape:
                check_index(index, self.in_features, name)
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.derive()

    def derive(self):
        """Find the channels that `pivot` leaves: for who writes it by another way than load_state_dict."""
        if self.pinned:
            self.rest = other_channels(self.pivot, self.in_features)

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, float]:
        """What the paths do with the inputs x, and what became of the factors: see `diagnose` below."""
        z, x_I = self.inner(x)
        # sums of squares overflow float16 and round off in bfloat16
        low = F.linear(z, self.B).float()
        sparse = torch.zeros_like(low)
        if self.k:
            sparse = F.linear(x_I, self.W_s).float()
        energy = low.square().sum()
        other = sparse.square().sum()
        product = (low * sparse).sum()
        # bounds, so that a layer of zeros has numbers too, not NaN
        numbers = {
            "low_rank_share": energy / (energy + other).clamp(min=1e-30),
            "cosine": product / (energy * other).sqrt().clamp(min=1e-30),
            **spectrum(self.full_A(), self.B),
            "gamma": self.bounded_gamma(),
        }
        # five digits, for metrics.jsonl
        return {name: float(f"{float(number):.5g}") for name, number in numbers.items()}

# --- low rank and zeros anywhere ---

class SparseLowRankLinear(nn.Module):
    """Drop-in for nn.Linear: x (..., in) → x weightᵀ + σ(x Aᵀ) Bᵀ (..., out), where σ is the identity and
    most of `weight` is zero: low rank and single elements, as robust PCA, CAP and OATS (arXiv 2409.13652)
    take a matrix apart. With SiLU for σ, and all of `weight`, it is a dense layer with LOST's update.

    Parameters weight (out, in) with its zeros, A (rank, in), B (out, rank); neither of the two where rank is
    0. The zeros are stored and multiplied like any number, and training fills them unless it is kept from it.
    The constructor leaves all empty. Raises LOSTError for what does not fit."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_switches(activation=activation)
        self.activation = activation
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        # rank 0 is a sparse matrix alone, and no size of a matrix forbids it
        check_sizes((self.out_features, self.in_features), rank or 1, 0)
        self.rank = whole("rank", rank)
        def empty(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight = empty(self.out_features, self.in_features)
        if self.rank:
            self.A = empty(self.rank, self.in_features)
            self.B = empty(self.out_features, self.rank)
        self.bias = empty(self.out_features) if bias else None

    # `input` as in nn.Linear, for callers that pass it by name
    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        if not self.rank:
            return y
        activation = ACTIVATIONS[self.activation]
        return y + F.linear(activation(F.linear(input, self.A)), self.B)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The dense layer with the same output: with a low-rank part no element of it is zero any more.
        LOSTError where the activation forbids it."""
        require_linear(self)
        weight = self.weight + self.B @ self.A if self.rank else self.weight
        return as_linear(self, weight, any(p.requires_grad for p in self.parameters()))

    def settings(self) -> dict:
        """The constructor's arguments, as `LOSTLinear.settings`."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        return listed(self.settings())

# --- diagnosis ---

# Of B A and its factors, A (r, in) and B (out, r), without a wide matrix
def spectrum(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    # in float64, which autocast leaves alone
    A = in_float64(A)
    B = in_float64(B)
    gram_A = A @ A.T                                                                       # (r, r)
    value, vector = torch.linalg.eigh(B.T @ B)
    # root rootᵀ = BᵀB, so the squares of B A's singular values are the eigenvalues of rootᵀ A Aᵀ root
    root = vector * value.clamp(min=0).sqrt()
    square = torch.linalg.eigvalsh(root.T @ gram_A @ root)
    sigma = square.clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=1e-300)
    return {
        "effective_rank": torch.special.entr(p).sum().exp(),
        "norm_A": torch.linalg.eigvalsh(gram_A)[-1].clamp(min=0).sqrt(),
        "norm_B": value[-1].clamp(min=0).sqrt(),
    }

def diagnose(model: nn.Module, run, part: tuple[int, int] = (0, 1)) -> dict[str, dict[str, float]]:
    """Name of each LOSTLinear of `model` → what its `diagnose` says of the inputs that it gets while run()
    runs the model once, not compiled. part: as of `apply_lost`, (i, n) looks at the i-th of every n layers.

    low_rank_share  ‖y_L‖² / (‖y_L‖² + ‖y_S‖²) of the two terms y_L and y_S of eq. 7
    cosine          of y_L and y_S over all elements: below 0 the paths cancel one another
    effective_rank  of B A: e to the entropy of its normalised singular values (Roy and Vetterli 2007)
    norm_A, norm_B  spectral norms;  gamma  as it is now"""
    layers = [(m, name) for name, m in model.named_modules() if isinstance(m, LOSTLinear)]
    names = dict(layers[part[0]::part[1]])
    found = {}
    def look(module, args):
        if module in names:
            found[names[module]] = module.diagnose(args[0])
    # one hook for all modules: inputs are looked at as they come, none is kept, and it is gone when run()
    # returns or raises
    with register_module_forward_pre_hook(look):
        run()
    return found

# --- whole models ---

# Their fast paths read `.weight` of the linears inside, past the linears' own forward
WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

# Whole parts of a dotted name: "mlp.up" ends "blocks.0.mlp.up", "up" does not end "startup"
def ends_with(name: str, key: str) -> bool:
    return f".{name}".endswith(f".{key}")

# "blocks.0.attn.q_proj" lies inside "attn", and inside "0.attn"
def inside(name: str, key: str) -> bool:
    return f".{key}." in f".{name}."

def by_module(value, name: str):
    """The number for the module `name`: `value` itself, or where it is a dict the entry whose key is the
    longest end of the dotted name, else "default": with {"q_proj": 64, "default": 128} 64 for a q_proj.
    Raises LOSTError where there is neither."""
    if not isinstance(value, dict):
        return value
    ends = [key for key in value if ends_with(name, key)]
    # the longest says most: "0.q_proj" goes before "q_proj"
    longest = max(ends, key=len, default="default")
    if longest not in value:
        raise LOSTError(f"nothing is said for {name}, only for {', '.join(value)}: add a default")
    return value[longest]

def is_name(key: str, names: list[str]) -> bool:
    return any(ends_with(name, key) for name in names)

def check_skip(model: nn.Module, skip: tuple[str, ...]):
    # the letters of a string would be taken for names
    if isinstance(skip, str):
        raise LOSTError(f"skip = {skip!r} must be a tuple of names: skip=({skip!r},)")
    if not isinstance(skip, (tuple, list, set, frozenset)):
        raise LOSTError(f"skip = {skip!r} must be a tuple of names, () for none")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for key in skip:
        # "" would end every name
        if not isinstance(key, str) or not key:
            raise LOSTError(f"skip: {key!r} is not a name")
        # the default names a head, which not every model has
        if key not in HEAD and not is_name(key, names):
            raise LOSTError(f"skip: no module is called {key!r}")

# All names of each nn.Linear that is to be replaced: a module that a model uses twice has two
def linear_places(model: nn.Module, skip: tuple[str, ...]) -> list[list[str]]:
    if isinstance(model, nn.Linear):
        raise LOSTError("the model is itself an nn.Linear, which cannot be replaced inside itself: "
                        "use LOSTLinear.from_linear")
    places = {}
    dense = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(module, []).append(name)
            if any(inside(name, key) for key in skip):
                dense.add(module)
    kept = [names for module, names in places.items() if module not in dense]
    if not kept:
        raise LOSTError("the model has no nn.Linear to replace")
    return kept

def check_keys(spec, names: list[str]):
    if not isinstance(spec, dict):
        return
    for key in spec:
        if key != "default" and not is_name(key, names):
            raise LOSTError(f"no module is called {key!r}: the first ones are {', '.join(names[:7])}")

# A head or a second layer that uses the same weight would go on with a copy of its own
def check_ties(model: nn.Module, names: list[str]):
    holders = {}
    # each module once, so that one with two names is not tied to itself
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    for name in names:
        linear = model.get_submodule(name)
        for parameter in linear.parameters(recurse=False):
            others = [other for other in holders[parameter] if other != name]
            if others:
                other = others[0] or "the model itself"
                raise LOSTError(
                    f"{name}: it shares a parameter with {other}, and a LOST layer would untie them: "
                    f"add {name!r} to skip, or give each its own first"
                )

def check_readers(model: nn.Module, names: list[str]):
    for name in names:
        # "" is the model itself
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, WEIGHT_READERS):
            raise LOSTError(
                f"{name}: {type(parent).__name__} reads its .weight, which a LOST layer does not have: "
                f"add {name!r} to skip"
            )

@contextlib.contextmanager
def naming(name: str):
    try:
        yield
    except LOSTError as e:
        raise LOSTError(f"{name}: {e}") from None

def apply_lost(
    model: nn.Module,
    rank: int | dict,
    sparsity: float | dict,
    gamma: float = GAMMA,
    *,
    skip: tuple[str, ...] = HEAD,
    part: tuple[int, int] = (0, 1),
    generator=None,
    **switches,
) -> nn.Module:
    """Replace every nn.Linear of `model` by a LOSTLinear, in place and one at a time, and return the model.

    rank, sparsity: a number, or a dict by module name (`by_module`). skip: ends of the names of modules that
    stay dense, with all that they contain. part: (i, n) decomposes the i-th of every n layers and leaves the
    others empty, to be filled by n - 1 more processes. generator: of random draws, or a function from the
    name of a module to its own, so that each is drawn alike alone and in any order. switches: of
    `LOSTLinear.from_linear`.

    Raises LOSTError with the name of the module that does not fit, and then has replaced none."""
    check_skip(model, skip)
    places = linear_places(model, skip)
    names = [first for first, *_ in places]
    check_keys(rank, names)
    check_keys(sparsity, names)
    check_ties(model, names)
    check_readers(model, [name for all_names in places for name in all_names])
    def convert(name, empty):
        own = generator(name) if callable(generator) else generator
        with naming(name):
            return LOSTLinear.from_linear(
                model.get_submodule(name),
                by_module(rank, name),
                by_module(sparsity, name),
                gamma,
                **switches,
                generator=own,
                empty=empty,
            )
    # All is checked before the first is replaced: the dense weights are gone by then, because keeping them
    # until the last would need the memory of two models
    for name in names:
        convert(name, empty=True)
    for number, all_names in enumerate(places):
        mine = number % part[1] == part[0]
        layer = convert(all_names[0], empty=not mine)
        # with this the dense weight is free, before the next layer is decomposed
        for name in all_names:
            model.set_submodule(name, layer)
    return model
