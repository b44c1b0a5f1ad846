"""Muon on the product of two factors, known to experiments alone: --optimizer product.

Muon gives each factor an update of one spectral norm, so that what B A moves by depends on the norms of B and
A, and the best rate on rank and width. Here each factor's momentum is whitened by the other's Gram matrix
(LoRA-Muon, arXiv 2606.12921): with msign(M) = U Vᵀ of M's SVD,

    ΔA = −½ η S_B^-½ msign(S_B^-½ m_A),   S_B = Bᵀ B
    ΔB = −½ η msign(m_B S_A^-½) S_A^-½,   S_A = A Aᵀ        ⇒ ‖B ΔA + ΔB A‖₂ ≤ η

where η is the size of Muon's update of a dense W, 0.2 lr √max(out, in). The bound is one of first order, and
of factors without a SiLU between them; with one, the activations would stand in the place of A."""
import math

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

from nanolost.optim import OPTIMIZERS, Optimizers, muon

NAME = "product"
# of the mean eigenvalue of a Gram matrix: added to each, so that no direction is blown up
FLOOR = 1e-3

def inverse_root(gram: Tensor) -> Tensor:
    """S^-½ (r, r) of a positive semidefinite S."""
    # r is small: float64 costs little, and float32 loses the small eigenvalues
    value, vector = torch.linalg.eigh(gram.double())
    value = value.clamp(min=0)
    # factors of zeros have a root as well
    floor = FLOOR * value.mean().clamp(min=1e-30)
    scaled = vector / (value + floor).sqrt()
    return (scaled @ vector.T).to(gram)

def msign(M: Tensor) -> Tensor:
    # in bfloat16 and only about right, as Muon's own
    coefficients = DEFAULT_A, DEFAULT_B, DEFAULT_C
    return newton_schulz(M, coefficients, DEFAULT_NS_STEPS, EPS).to(M)

class ProductMuon(torch.optim.Optimizer):
    """pairs: (A (r, in), B (out, r)) of each layer."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], defaults: dict):
        factors = [p for pair in pairs for p in pair]
        super().__init__(factors, defaults)
        self.pairs = pairs

    def ahead(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum of one factor, as torch's Muon has it."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)

    @torch.no_grad()
    def step(self, closure=None):
        # all factors have the rates of one group
        group, = self.param_groups
        # also of a lone parameter, by which a checkpoint learns what state there is
        momenta = {}
        for p in group["params"]:
            momenta[p] = self.ahead(p, group["momentum"])
        for A, B in self.pairs:
            if A in momenta:
                self.move(A, B, momenta, group["lr"], group["weight_decay"])

    def move(self, A: Tensor, B: Tensor, momenta: dict, lr: float, weight_decay: float):
        # as Muon's match_rms_adamw has it for a matrix of the product's shape
        size = max(len(B), A.shape[1])
        eta = 0.2 * lr * math.sqrt(size)
        # the product decays by 1 − lr λ, as a dense weight does
        decay = math.sqrt(1 - lr * weight_decay)
        by_A = inverse_root(A @ A.T)                                                           # (r, r)
        by_B = inverse_root(B.T @ B)
        # both before either moves
        change_A = by_B @ msign(by_B @ momenta[A])
        change_B = msign(momenta[B] @ by_A) @ by_A
        A.mul_(decay).sub_(change_A, alpha=eta / 2)
        B.mul_(decay).sub_(change_B, alpha=eta / 2)

def product(groups: dict, config) -> Optimizers:
    """ProductMuon for the factors of low-rank layers, Muon for other matrices, AdamW elsewhere."""
    pairs = groups["factors"]
    # by identity: tensors compare by their values
    taken = {id(p) for pair in pairs for p in pair}
    others = [p for p in groups["blocks"] if id(p) not in taken]
    rest = muon({**groups, "blocks": others}, config)
    # a dense model
    if not pairs:
        return rest
    defaults = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
    }
    return [*rest, ProductMuon(pairs, defaults)]

OPTIMIZERS[NAME] = product
