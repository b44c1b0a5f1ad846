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
# of the mean eigenvalue of a Gram matrix: what one that is smaller counts for, so that none is blown up
FLOOR = 1e-3

def inverse_root(gram: Tensor) -> Tensor:
    """S^-½ (r, r) of a positive semidefinite one."""
    value, vector = torch.linalg.eigh(gram.double())
    value = value.clamp(min=0) + FLOOR * value.mean().clamp(min=1e-30)
    return ((vector / value.sqrt()) @ vector.T).to(gram)

def msign(M: Tensor) -> Tensor:
    # in bfloat16 and only about right, as Muon's own
    return newton_schulz(M, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS).to(M)

class ProductMuon(torch.optim.Optimizer):
    """pairs: (A (r, in), B (out, r)) of each layer."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], defaults: dict):
        super().__init__([p for pair in pairs for p in pair], defaults)
        self.pairs = pairs

    def ahead(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum of one factor, as torch's Muon has it."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        # also of a lone parameter, by which a checkpoint learns what state there is
        momenta = {p: self.ahead(p, group["momentum"]) for p in group["params"]}
        # the product decays by 1 − lr λ, as a dense weight does
        decay = math.sqrt(1 - group["lr"] * group["weight_decay"])
        for A, B in self.pairs:
            if A not in momenta:
                continue
            # as Muon's match_rms_adamw has it for a matrix of the product's shape
            size = max(len(B), A.shape[1])
            eta = 0.2 * group["lr"] * math.sqrt(size)
            by_A = inverse_root(A @ A.T)                                                       # (r, r)
            by_B = inverse_root(B.T @ B)
            # both before either moves
            change_A = by_B @ msign(by_B @ momenta[A])
            change_B = msign(momenta[B] @ by_A) @ by_A
            A.mul_(decay).sub_(change_A, alpha=eta / 2)
            B.mul_(decay).sub_(change_B, alpha=eta / 2)

def product(groups: dict, config) -> Optimizers:
    """ProductMuon for the factors of low-rank layers, Muon for other matrices, AdamW elsewhere."""
    pairs = groups["factors"]
    taken = {id(p) for pair in pairs for p in pair}
    others = {**groups, "blocks": [p for p in groups["blocks"] if id(p) not in taken]}
    rest = muon(others, config)
    if not pairs:
        return rest
    usual = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    return [*rest, ProductMuon(pairs, usual)]

OPTIMIZERS[NAME] = product
