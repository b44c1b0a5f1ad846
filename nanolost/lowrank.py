"""A weight W (out, in) as a product B A of rank r that costs little in the model's loss.

Every method is an SVD of W in some metric, here K for the outputs and L for the inputs:

    M = Kᵀ W L = U Σ Vᵀ,    A = Σ_r^½ V_rᵀ L⁻¹  (r, in),    B = K⁻ᵀ U_r Σ_r^½  (out, r)

    plain      K = 1,          L = 1
    asvd       K = 1,          L = diag(E|x|^½)        Yuan et al. 2023, arXiv 2312.05821, eq. 6
    svdllm     K = 1,          L Lᵀ = C                Wang et al. 2024, arXiv 2403.07378, alg. 1
    fisher     K Kᵀ = G,       L Lᵀ = C                both sides of the Kronecker-factored Fisher matrix

with C and G of `covariance.py`. The best product of rank r loses ½ Σ_{i>r} σ_i² (Eckart and Young): with
`fisher` a prediction of the loss in nats a token, in one unit for every matrix of a model. A is cut to its
first r rows and B to its first r columns, so that one SVD serves every rank."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lost import in_float64, top_svd
from nanolost.covariance import Statistics

# of --form lost; `lost` is the start of lost.py, which has no metric
METHODS = ("fisher", "svdllm", "asvd", "plain", "lost")

# what is added to a covariance before it is factorised: a share of its own diagonal (1 % and 10 % are within
# 0.13 nats of it at half of the values),
OWN = 0.03
# and a little of the mean for channels that are always zero
MEAN = 1e-6
# the least size of a channel for ASVD, a share of the largest: it divides by what may be always zero
LEAST = 1e-6
# the largest of a layer whose inputs are all zero
NOTHING = 1e-30
# in which the channels beside a product are chosen, at the most; two or three are the rule
ROUNDS = 10

# --- metrics ---

def identity(like: Tensor) -> Tensor:
    """1 (n, n), float64, on the device of `like` (…, n)."""
    n = like.shape[-1]
    return torch.eye(n, dtype=torch.float64, device=like.device)

def shrunk(C: Tensor, own: float = OWN, mean: float = MEAN) -> Tensor:
    """C + own·diag(C) + mean·E[diag(C)]·1, float64: positive definite however few tokens C was made of. A
    covariance of zeros becomes the identity: no direction is better than another."""
    C = in_float64(C)
    diagonal = C.diagonal()
    size = diagonal.mean()
    if size == 0:
        return identity(C)
    added = own * diagonal + mean * size
    return C + torch.diag(added)

def root(C: Tensor) -> Tensor:
    """The lower triangular factor of a positive definite C (n, n)."""
    return torch.linalg.cholesky(C)

class Metric(NamedTuple):
    """K (out, out) and L (in, in), lower triangular, float64; None: the identity."""

    K: Tensor | None
    L: Tensor | None

    def applied(self, W: Tensor) -> Tensor:
        """Kᵀ W L (out, in)."""
        return self.right(self.left(W))

    def left(self, W: Tensor) -> Tensor:
        """Kᵀ W."""
        return W if self.K is None else self.K.T @ W

    def right(self, W: Tensor) -> Tensor:
        """W L."""
        return W if self.L is None else W @ self.L

    def damage(self, E: Tensor) -> float:
        """½ ‖Kᵀ E L‖², of a change E (out, in) of the weight; with `fisher` in nats a token."""
        M = self.applied(in_float64(E))
        return M.square().sum().item() / 2

def channel_sizes(mean: Tensor) -> Tensor:
    """ASVD's E|x|^½ (in,), float64, from E|x| (in,); none is zero."""
    size = in_float64(mean).sqrt()
    largest = size.max().clamp(min=NOTHING)
    return size.clamp(min=LEAST * largest)

def metric_of(method: str, name: str, statistics: Statistics | None, device) -> Metric:
    """The metric in which `method` cuts the layer `name`: the table on top. `plain` needs no statistics."""
    K = None
    L = None
    if method == "asvd":
        mean = statistics.sizes(name).to(device)
        L = torch.diag(channel_sizes(mean))
    if method in ("svdllm", "fisher"):
        C = statistics.inputs(name).to(device)
        L = root(shrunk(C))
    if method == "fisher":
        G = statistics.gradients(name).to(device)
        K = root(shrunk(G))
    return Metric(K, L)

# --- every rank at once ---

def curve(W: Tensor, metric: Metric) -> Tensor:
    """What each rank loses: (full + 1,) for ranks 0 to the full one, which loses nothing."""
    M = metric.applied(in_float64(W))
    # σ² are the eigenvalues of the smaller of two: no vectors are needed for what a rank loses
    wide = M.shape[0] <= M.shape[1]
    gram = M @ M.T if wide else M.T @ M
    # rounding may leave one below zero
    square = torch.linalg.eigvalsh(gram).clamp(min=0)
    # ascending: the sum of the smallest is what the largest rank but so many leaves
    lost = square.cumsum(0) / 2
    nothing = lost.new_zeros(1)
    return torch.cat((lost.flip(0), nothing))

def factors(W: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the best product, float64: the equations on top."""
    K, L = metric
    M = metric.applied(in_float64(W))
    U, sigma, Vt = top_svd(M, rank)
    half = sigma.sqrt()
    A = half[:, None] * Vt
    B = U * half
    # V_rᵀ L⁻¹ and K⁻ᵀ U_r, by substitution: no inverse is formed
    if L is not None:
        A = torch.linalg.solve_triangular(L, A, upper=False, left=False)
    if K is not None:
        B = torch.linalg.solve_triangular(K.T, B, upper=True)
    return A, B

def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of A (r, in) and B (out, r) with A Aᵀ = Bᵀ B, both diagonal: as they come |B| / |A|
    runs from 0.06 to 293 over a model's layers, and the steps of Adam are per element."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: the SVD of a small matrix (r, r)
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.T)
    half = sigma.sqrt()
    A = half[:, None] * (Vt @ Q_A.T)
    B = (Q_B @ U) * half
    return A, B

# --- channels beside the product ---

@dataclass
class Parts:
    """What a layer is made of, float64: A (r, in), B (out, r), channels (k,) ascending, W_s (out, k)."""

    A: Tensor
    B: Tensor
    channels: Tensor
    W_s: Tensor

    def product(self) -> Tensor:
        """The weight (out, in) that they stand for."""
        W = self.B @ self.A
        return W.index_add(1, self.channels, self.W_s)

def without(n: int, channels: Tensor) -> Tensor:
    """The others of n channels, ascending."""
    every = torch.arange(n, device=channels.device)
    taken = torch.isin(every, channels)
    return every[~taken]

def beside_channels(W: Tensor, metric: Metric, channels: Tensor) -> tuple[Tensor, Metric, Tensor]:
    """What is left for the product once some channels have values of their own, which answer for all that
    they know of the others: the other columns of W, their metric, and the regression T (k, rest) of the
    others on the channels. C given the channels is the Schur complement, as positive definite as C is."""
    W = in_float64(W)
    rest = without(W.shape[1], channels)
    L = metric.L
    if L is None:
        L = identity(W)
    C = L @ L.T
    # rows of C, of the channels and of the others
    ours = C[channels]
    others = C[rest]
    T = torch.linalg.solve(ours[:, channels], ours[:, rest])
    given = others[:, rest] - others[:, channels] @ T
    inner = Metric(metric.K, root(given))
    return W[:, rest], inner, T

def worst_channels(E: Tensor, metric: Metric, k: int) -> Tensor:
    """The k input channels, ascending, that a residual E loses most in: each by what its column costs even
    though the columns of all others make up for it, ½ ‖Kᵀ E_j‖² / [C⁻¹]_jj."""
    loss = metric.left(E).square().sum(0)
    # the ½ is alike in all
    if metric.L is not None:
        inverse = torch.cholesky_inverse(metric.L)
        loss = loss / inverse.diagonal()
    worst = loss.topk(k).indices
    return worst.sort().values

def best_channels(W: Tensor, metric: Metric, rank: int, k: int) -> Tensor:
    """The k input channels, (k,) ascending, that a product of the rank can carry least. Chosen again beside
    the product of the others, as long as that loses less: the first product serves the channels as well."""
    W = in_float64(W)
    # at first beside the product of all columns
    A, B = factors(W, metric, rank)
    E = W - B @ A
    channels = worst_channels(E, metric, k)
    best = channels
    least = torch.inf
    for _ in range(ROUNDS):
        W_rest, inner, _ = beside_channels(W, metric, channels)
        A, B = factors(W_rest, inner, rank)
        E = W_rest - B @ A
        lost = inner.damage(E)
        # it need not fall: the round before is kept
        if lost >= least:
            break
        best = channels
        least = lost
        channels = worst_for(W, B, metric, k)
    return best

def worst_for(W: Tensor, B: Tensor, metric: Metric, k: int) -> Tensor:
    """The k channels, ascending, that the directions B (out, r) come least near to. Every column has the best
    combination of them, those that are channels now too: so each is judged alike."""
    M = metric.left(W)
    Q = torch.linalg.qr(metric.left(B)).Q
    E = M - Q @ (Q.T @ M)
    # K is in E already
    return worst_channels(E, Metric(None, metric.L), k)

def split(W: Tensor, metric: Metric, rank: int, k: int = 0) -> Parts:
    """The best product of a rank for W (out, in), and beside it k channels with values of their own."""
    W = in_float64(W)
    n = W.shape[1]
    if not k:
        A, B = factors(W, metric, rank)
        # numbers of no channels, and so no columns
        none = torch.empty(0, dtype=torch.int64, device=W.device)
        return Parts(A, B, none, W[:, none])
    channels = best_channels(W, metric, rank, k)
    rest = without(n, channels)
    W_rest, inner, T = beside_channels(W, metric, channels)
    A_rest, B = factors(W_rest, inner, rank)
    # the product does not read the channels
    A = W.new_zeros(rank, n)
    A[:, rest] = A_rest
    # what the product leaves of the other columns, as far as these channels can say it
    left = W_rest - B @ A_rest
    W_s = W[:, channels] + left @ T.T
    return Parts(A, B, channels, W_s)

def curve_beside(W: Tensor, metric: Metric, rank: int, k: int) -> Tensor:
    """`curve` with k channels, which were chosen beside a product of `rank`: shorter where they leave fewer
    columns than rows."""
    channels = best_channels(W, metric, rank, k)
    W_rest, inner, _ = beside_channels(W, metric, channels)
    return curve(W_rest, inner)
