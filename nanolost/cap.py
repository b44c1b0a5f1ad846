"""CAP: robust PCA, then Bernoulli masks under one budget for a whole model. Beside it OATS, its closest peer.
Needs torch and the SVD of lost.py, knows no model, no file and no command.

Stage 1 splits each weight W (m, n). With λ = max(m, n)^-½, μ = m n / (4 Σ|W|) and S = Y = 0 at first:

    min ‖L‖_* + λ ‖S‖₁   subject to   W = L + S                         (1)
    L = U max(Σ − 1/μ, 0) Vᵀ,   U Σ Vᵀ = W − S + Y/μ                    (2)
    S = soft(W − L + Y/μ, λ/μ),   soft(z, t) = sign(z) max(|z| − t, 0)  (3)
    Y ← Y + μ (W − L − S)                                               (4)

Stage 2 chooses among the candidates k of all weights: a singular value of an L costs c = m + n values, a
non-zero of an S one. It needs forward passes alone, on masks m_k ~ Bernoulli(s_k):

    min over s of E[Loss(m)]   subject to   c·s ≤ K,   0 ≤ s ≤ 1        (5)
    ∂ log p(m) / ∂s = (m − s) / (s (1 − s) + ε)                         (6)
    s ← project(s − η (Loss − δ) ∂ log p / ∂s)                          (7)   REINFORCE
    δ ← β δ + (1 − β) Loss                                              (8)   its baseline
    project(s) = clip(s − τ c, 0, 1),   least τ ≥ 0 with c·s ≤ K        (9)   the nearest point
    W ≈ B A + S∘m,   A = Σ^½ Vᵀ,   B = U Σ^½,   of the σ kept           (10)

| code         | paper | shape |                  | code         | paper | shape        |
|--------------|-------|-------|                  |--------------|-------|--------------|
| U            | U     | (m, q)|                  | s            | s     | (candidates,)|
| sigma        | Σ     | (q,)  |                  | cost         | c     | (candidates,)|
| Vt           | Vᵀ    | (q, n)|                  | mask         | m     | (candidates,)|
| S            | S     | (m, n)|                  | budget       | K     | –            |
| baseline     | δ     | –     |                  | lr           | η     | –            |

    parts = [Candidates(*robust_pca(W)) for W in weights]
    cost = torch.cat([part.cost() for part in parts])
    value = torch.cat([part.values() for part in parts])
    s = policy(loss_of, initial(value, cost, budget), cost, budget)
    for part, masks in zip(parts, split(choose(s, cost, budget), parts)):
        A, B, S = part.build(*masks)

Not here: a price for the positions of non-zeros, quantised factors, fine-tuning afterwards."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lost import check_matrix, check_sizes, check_values, in_float64, svd_factors, top_svd
from nanolost.errors import UserError

# The paper's. Of its iterations 3, 10 and 100 leave a perplexity of 5.18, 5.13 and 5.16 on WikiText-2. Of the
# window it gives the size alone: β = 1 − 1/window is ours
ITERATIONS = 10
STEPS = 3
LR = 0.05
WINDOW = 5

# The first author's toolkit's: ‖W − L − S‖ / ‖W‖, and the bounds of the first s
TOLERANCE = 1e-6
BOUNDS = (0.05, 0.95)

# OATS's alternations
ALTERNATIONS = 80

# ε, for which there is no published value: nothing beside s (1 − s) = 0.05 at the bounds
EPSILON = 1e-8

# --- stage 1 ---

def soft(z: Tensor, threshold: float) -> Tensor:
    size = z.abs() - threshold
    return z.sign() * size.clamp_(min=0)

def soft_svd(Z: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """U (m, q), σ − threshold (q,) and Vᵀ (q, n) of the q singular values above the threshold, eq. 2."""
    exact = in_float64(Z)
    U, sigma, Vt = top_svd(exact, min(Z.shape))
    sigma = sigma - threshold
    q = int((sigma > 0).sum())
    parts = U[:, :q], sigma[:q], Vt[:q]
    return tuple(part.to(Z) for part in parts)

@torch.no_grad()
def robust_pca(
    W: Tensor,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, ...]:
    """U (m, q), sigma (q,), Vt (q, n) of L and S (m, n), from W (m, n) in float32 or float64: eqs. 1–4.

    Ends after so many iterations, or where ‖W − L − S‖ ≤ tolerance · ‖W‖. In the dtype of W but for the SVD,
    which is in float64. Raises LOSTError for a W that is no matrix of finite numbers."""
    assert iterations >= 1, iterations
    check_matrix(W)
    check_values(W, 0, "weight")
    lam = max(W.shape) ** -0.5
    # 1/μ, and below Y/μ, to which eq. 4 adds W − L − S: a matrix of zeros divides by nothing
    step = 4 * W.abs().mean().item()
    S = torch.zeros_like(W)
    Y = torch.zeros_like(W)
    for _ in range(iterations):
        # eq. 2
        U, sigma, Vt = soft_svd(W - S + Y, step)
        rest = W - (U * sigma) @ Vt
        # eq. 3
        S = soft(rest + Y, lam * step)
        error = rest - S
        if error.norm() <= tolerance * W.norm():
            break
        # eq. 4
        Y += error
    return U, sigma, Vt, S

# --- OATS ---

def largest(Z: Tensor, scale: Tensor, count: int) -> Tensor:
    """Z (m, n) at the `count` elements that are largest once its columns are scaled, else 0."""
    size = (Z * scale).abs()
    # positions, not a threshold, which equal elements would pass together
    index = size.flatten().topk(count).indices
    kept = torch.zeros_like(Z)
    kept.view(-1)[index] = Z.flatten()[index]
    return kept

@torch.no_grad()
def oats(
    W: Tensor,
    scale: Tensor,
    rank: int,
    nonzeros: int,
    iterations: int = ALTERNATIONS,
) -> tuple[Tensor, ...]:
    """A (rank, n), B (m, rank), S (m, n): W ≈ B A + S by OATS (Zhang and Papyan 2024, arXiv 2409.13652).

    scale (n,): √E[x²] of each input channel, the diagonal of D. In turn the best rank-r part L of (W − S) D
    and the `nonzeros` largest elements of (W − L) D. In float64, returned in the dtype of W. Raises LOSTError
    for a rank out of range and for a W that is no matrix of finite numbers."""
    assert iterations >= 1, iterations
    check_matrix(W)
    check_values(W, 0, "weight")
    check_sizes(W.shape, rank, 0)
    exact = in_float64(W)
    scale = in_float64(scale)
    S = torch.zeros_like(exact)
    for _ in range(iterations):
        rest = exact - S
        U, _, _ = top_svd(rest * scale, rank)
        # U Uᵀ (rest D) D⁻¹: nothing is divided by the 0 of a channel that no input uses
        L = U @ (U.T @ rest)
        S = largest(exact - L, scale, nonzeros)
    triples = top_svd(L, rank)
    parts = *svd_factors(*triples), S
    return tuple(part.to(W) for part in parts)

# --- the candidates of a matrix ---

@dataclass
class Candidates:
    """What stage 1 leaves of one matrix: its σ one by one, then the non-zeros of S row by row. Zeros are no
    candidates, and so take no share of the budget."""

    U: Tensor                            # (m, q)
    sigma: Tensor                        # (q,)
    Vt: Tensor                           # (q, n)
    S: Tensor                            # (m, n)

    def counts(self) -> tuple[int, int]:
        nonzeros = self.S.count_nonzero()
        return len(self.sigma), int(nonzeros)

    def cost(self) -> Tensor:
        """Values that each keeps, (q + non-zeros,) float32: m + n for a direction, 1 for an element."""
        cost = torch.ones(sum(self.counts()), device=self.S.device)
        cost[:len(self.sigma)] = sum(self.S.shape)
        return cost

    def values(self) -> Tensor:
        """σ and |S|, (q + non-zeros,) float32, whatever they were computed in."""
        nonzero = self.S.masked_select(self.S != 0)
        both = torch.cat((self.sigma, nonzero.abs()))
        return both.float()

    def build(self, mask_sigma: Tensor, mask_S: Tensor) -> tuple[Tensor, ...]:
        """A (r, n), B (m, r), S (m, n) of what the masks (q,) and (non-zeros,) keep: eq. 10."""
        root = self.sigma[mask_sigma].sqrt()
        A = root[:, None] * self.Vt[mask_sigma]
        B = self.U[:, mask_sigma] * root
        # a byte an element, where their positions would take 16
        nonzero = self.S != 0
        kept = nonzero.masked_scatter(nonzero, mask_S)
        return A, B, self.S * kept

def split(mask: Tensor, parts: list[Candidates]) -> list[tuple[Tensor, ...]]:
    """mask_sigma and mask_S of each matrix, as views of the mask over all candidates."""
    counts = []
    for part in parts:
        counts += part.counts()
    # of each matrix two parts, one behind the other
    views = mask.split(counts)
    return list(zip(views[::2], views[1::2], strict=True))

# --- stage 2: the budget ---

# What is computed on the way has this many elements, 1 MB in float32, where s may have 100 million
BLOCK = 2**18

def blocks(*flat: Tensor):
    pieces = [tensor.split(BLOCK) for tensor in flat]
    return zip(*pieces, strict=True)

def spent(kept: Tensor, cost: Tensor) -> float:
    """c·s or c·m, in float64: float32 counts up to 1.7e7 only."""
    sums = []
    for some, c in blocks(kept, cost):
        sums.append((some * c).sum(dtype=torch.float64))
    return float(sum(sums))

# Enough in float64 from τ = 1e8 on, which eq. 7 reaches where s is next to 0: a step is as long as η/ε there
HALVINGS = 100

@torch.no_grad()
def project(s: Tensor, cost: Tensor, budget: float) -> Tensor:
    """The nearest point to s (candidates,) with 0 ≤ s ≤ 1 and c·s ≤ budget, eq. 9; c > 0, budget ≥ 0.

    The paper leaves the projection open; this is the Euclidean one, τ by bisection."""
    assert budget >= 0, budget
    result = s.clamp(0, 1)
    if spent(result, cost) <= budget:
        return result
    enough = torch.finfo(s.dtype).eps * budget
    low = 0.0
    # twice the τ at which all are 0, so that they are also where it is rounded
    zero = [(some / c).max() for some, c in blocks(s, cost)]
    high = 2 * float(max(zero))
    for _ in range(HALVINGS):
        tau = (low + high) / 2
        left = budget - spent(pull(s, cost, tau, result), cost)
        low, high = (tau, high) if left < 0 else (low, tau)
        if 0 <= left <= enough:
            break
    # a τ that was seen to fit: rounding never passes the budget
    return pull(s, cost, high, result)

def pull(s: Tensor, cost: Tensor, tau: float, out: Tensor) -> Tensor:
    torch.sub(s, cost, alpha=tau, out=out)
    return out.clamp_(0, 1)

def initial(value: Tensor, cost: Tensor, budget: float) -> Tensor:
    """The first s, from the values of all candidates: the toolkit's rule, since the paper has none."""
    # a model of zeros has no candidates
    if not len(value):
        return value
    share = value / value.max()
    share.clamp_(*BOUNDS)
    return project(share, cost, budget)

# --- stage 2: the policy ---

Loss = Callable[[Tensor], float]

def score(masks: Tensor, s: Tensor) -> Tensor:
    """∂ log p(masks) / ∂s, eq. 6, of the shape of both."""
    variance = s * (1 - s)
    return (masks.to(s) - s) / (variance + EPSILON)

def draw(loss_of: Loss, s: Tensor, generator=None) -> tuple[Tensor, float]:
    mask = torch.empty_like(s, dtype=torch.bool)
    mask.bernoulli_(s, generator=generator)
    loss = float(loss_of(mask))
    # one step with it would leave no number in s
    if not math.isfinite(loss):
        raise UserError(f"the loss of a drawn model is {loss}: keep more of it, or compute in float32")
    return mask, loss

def estimate(loss_of: Loss, s: Tensor, baseline: float, samples: int, generator=None):
    """An unbiased estimate of ∂ E[Loss] / ∂s (candidates,), and the mean loss of its draws."""
    gradient = torch.zeros_like(s)
    losses = []
    for _ in range(samples):
        mask, loss = draw(loss_of, s, generator)
        weight = (loss - baseline) / samples
        for some, m, p in blocks(gradient, mask, s):
            some.add_(score(m, p), alpha=weight)
        losses.append(loss)
    return gradient, sum(losses) / samples

@torch.no_grad()
def policy(
    loss_of: Loss,
    s: Tensor,
    cost: Tensor,
    budget: float,
    steps: int = STEPS,
    lr: float = LR,
    window: int = WINDOW,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """s (candidates,) after so many steps of eqs. 6–9, from that of `initial`.

    loss_of: of a mask (candidates,), bool, the loss of the model that is left; asked 1 + steps · samples
    times. samples: draws of a step, one in the paper and 8 in the toolkit. generator: on the device of s.
    Needs three tensors of the size of s beside s and cost. Raises UserError for a loss that is not finite."""
    beta = 1 - 1 / window
    # From a draw of its own, so that eq. 7 stays unbiased. From δ = 0, which the paper may mean, a kept
    # candidate would lose η · Loss / s: at a loss of 5 and s = 0.5 all of it, whatever it is worth
    _, baseline = draw(loss_of, s, generator)
    for _ in range(steps):
        gradient, loss = estimate(loss_of, s, baseline, samples, generator)
        # in place: at 100 million candidates each tensor is 400 MB
        moved = gradient.mul_(-lr).add_(s)
        # eq. 7
        s = project(moved, cost, budget)
        # eq. 8
        baseline = beta * baseline + (1 - beta) * loss
    return s

# --- stage 2: the choice ---

# Floats from 0 on have the order of their bits, read as whole numbers: a threshold takes 31 halvings, no sort
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

@torch.no_grad()
def choose(s: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Mask (candidates,), bool: from the largest s down each that still fits into the budget, of equal ones
    the earlier first. s ≥ 0 in float32 or float64.

    Of 50 million in float32 it takes 8 bytes each beside s and cost; a sort takes 20, and half the time."""
    assert (s >= 0).all()
    # the bits of -0.0 are no whole number from 0 on
    key = s.abs().view(BITS[s.dtype])
    mask = torch.zeros_like(s, dtype=torch.bool)
    while True:
        # What does not fit now never will. A run ends at one such, so there are no more runs than costs
        key.masked_fill_(mask | (cost > budget), -1)
        if (key < 0).all():
            return mask
        run = longest_run(key, cost, budget)
        budget -= spent(run, cost)
        mask |= run

def longest_run(key: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Mask of those from the largest key down, to 0 at the lowest, before the first that does not fit."""
    low = -1
    high = int(key.max())
    # those above `high` fit; with the next lower key they do not, at the end
    while high - low > 1:
        middle = (low + high) // 2
        fits = spent(key > middle, cost) <= budget
        low, high = (low, middle) if fits else (middle, high)
    run = key > high
    before = spent(run, cost)
    for some, k, c in blocks(run, key, cost):
        equal = k == high
        sums = (equal * c).cumsum(0, dtype=torch.float64) + before
        some |= equal & (sums <= budget)
        before = sums[-1]
    return run
