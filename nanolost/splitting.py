"""The zeros of a whole model chosen together: the best D with so many entries in

    min ½ Σ_l tr(G̃_l (W_l − D_l) C̃_l (W_l − D_l)ᵀ),    Σ_l ‖D_l‖₀ ≤ K

by the alternating direction method of multipliers, as ALPS (Meng et al. 2024, arXiv 2406.07831) takes it for
one layer with G = 1, here in the Kronecker metric of the Fisher information and under one budget. In units
that give C̃ and G̃ a diagonal of ones, where y² / 2 is what an entry y costs when it goes alone,

    X ← (G̃ ⊗ C̃ + ρ)⁻¹ (G̃ W C̃ − V + ρ D)     a division in the eigenvectors of the two
    U ← X + V / ρ
    D ← U where U² > τ, one τ for all matrices; of an N:M pattern the N largest of M neighbours
    V ← ρ (U − D)                            which is V + ρ (X − D)

so that U alone is kept between the turns: D and V are U inside and outside the mask."""
import math

import torch
from torch import Tensor
from tqdm import tqdm

from nanolost.covariance import GROUP_OF, Statistics, place_of
from nanolost.lowrank import shrunk
from nanolost.pruning import largest_of_groups
from nanolost.shelf import Shelf

# ρ at first, and its growth a turn
PENALTY = 0.1
GROWTH = 1.1
# the share of the entries that change sides in the last turn
STILL = 5e-4
TURNS = 60
# entries of which the threshold is taken between the turns: one of so many
EVERY = 61

class Scaled:
    """A layer in units of its own: y = e · w · d. The eigenvectors of its scaled C and G are on the shelf."""

    def __init__(self, name: str, C: Tensor, G: Tensor, shelf: Shelf):
        self.name = name
        self.shelf = shelf
        layer, inner = place_of(name)
        self.d = C.diagonal().sqrt()
        self.e = G.diagonal().sqrt()
        # layers that share their inputs share these
        self.inputs = f"C.{layer}.{GROUP_OF[inner]}"
        self.outputs = f"G.{name}"
        if f"{self.inputs}.vectors" not in shelf:
            self._decompose(self.inputs, C / (self.d[:, None] * self.d))
        self._decompose(self.outputs, G / (self.e[:, None] * self.e))
        self.d = self.d.float()
        self.e = self.e.float()

    def _decompose(self, key: str, matrix: Tensor):
        values, vectors = torch.linalg.eigh(matrix)
        # rounding may leave one below zero
        self.shelf[f"{key}.values"] = values.clamp(min=0).float()
        self.shelf[f"{key}.vectors"] = vectors.float()

    def part(self, side: str, what: str, device) -> Tensor:
        return self.shelf[f"{side}.{what}"].to(device)

    def scaled(self, W: Tensor) -> Tensor:
        return self.e[:, None] * W.float() * self.d

    def unscaled(self, Y: Tensor) -> Tensor:
        return Y / self.e[:, None] / self.d

    def eigenvalues(self, device) -> Tensor:
        """Of G̃ ⊗ C̃, (out, in)."""
        return self.part(self.outputs, "values", device)[:, None] * self.part(self.inputs, "values", device)

    def begin(self, W: Tensor, D: Tensor, device):
        """Keep G̃ W C̃ in the eigenvectors, and D as U, all in scaled units."""
        P = self.part(self.outputs, "vectors", device)
        Q = self.part(self.inputs, "vectors", device)
        pull = self.eigenvalues(device) * (P.T @ self.scaled(W) @ Q)
        self.shelf[f"pull.{self.name}"] = pull
        self.shelf[f"U.{self.name}"] = self.scaled(D)
        self.shelf[f"mask.{self.name}"] = D != 0

    def turn(self, before: float, now: float, device):
        """X and U, for a ρ that was `before` and is `now`."""
        U = self.shelf[f"U.{self.name}"]
        mask = self.shelf[f"mask.{self.name}"].to(device)
        old = U.to(device)
        D = old * mask
        V = before * (old - D)
        P = self.part(self.outputs, "vectors", device)
        Q = self.part(self.inputs, "vectors", device)
        push = P.T @ (now * D - V) @ Q
        right = self.shelf[f"pull.{self.name}"].to(device) + push
        X = P @ (right / (self.eigenvalues(device) + now)) @ Q.T
        U.copy_(X + V / now)

# --- one threshold ---

def sampled_threshold(layers: list[Scaled], keep: int, size: int) -> float:
    """About the value that `keep` of `size` entries of all |U| lie above."""
    sampled = [layer.shelf[f"U.{layer.name}"].flatten()[::EVERY].abs() for layer in layers]
    sampled = torch.cat(sampled)
    place = min(max(1, round((1 - keep / size) * len(sampled))), len(sampled))
    return sampled.kthvalue(place).values.item()

def bits(values: Tensor) -> Tensor:
    """Non-negative float32 as whole numbers in the same order."""
    return values.contiguous().view(torch.int32)

def exact_threshold(layers: list[Scaled], keep: int) -> tuple[float, int]:
    """The value of the `keep`-th largest |U| of all, and how many that equal it are needed: two looks at one
    matrix after the other, by the upper and the lower half of the bits."""
    if keep == 0:
        return math.inf, 0
    def counts(of, where=None) -> Tensor:
        total = torch.zeros(1 << 16, dtype=torch.int64)
        for layer in layers:
            number = bits(layer.shelf[f"U.{layer.name}"].abs().flatten())
            if where is not None:
                number = number[number >> 16 == where]
            total += torch.bincount(of(number), minlength=1 << 16)
        return total
    def place(total: Tensor, wanted: int) -> tuple[int, int]:
        above = total.flip(0).cumsum(0).flip(0)
        bin = int((above >= wanted).nonzero()[-1])
        return bin, wanted - int(above[bin] - total[bin])
    upper, wanted = place(counts(lambda number: number >> 16), keep)
    lower, wanted = place(counts(lambda number: number & 0xFFFF, upper), wanted)
    value = torch.tensor([upper << 16 | lower], dtype=torch.int32).view(torch.float32).item()
    return value, wanted

def threshold_masks(layers: list[Scaled], threshold: float, ties: int | None = None) -> int:
    """Set every mask by |U| > threshold, and by the first `ties` entries that equal it (None: all). Returns
    how many entries changed sides."""
    changed = 0
    for layer in layers:
        size = layer.shelf[f"U.{layer.name}"].abs()
        mask = size > threshold if ties is not None else size >= threshold
        if ties:
            equal = (size == threshold).flatten().nonzero()[:ties, 0]
            mask.view(-1)[equal] = True
            ties -= len(equal)
        changed += change(layer, mask)
    return changed

def change(layer: Scaled, mask: Tensor) -> int:
    before = layer.shelf[f"mask.{layer.name}"]
    changed = int((before != mask).sum())
    before.copy_(mask)
    return changed

def pattern_masks(layers: list[Scaled], patterns: dict[str, tuple[int, int]]) -> int:
    changed = 0
    for layer in layers:
        size = layer.shelf[f"U.{layer.name}"].abs()
        changed += change(layer, largest_of_groups(size, *patterns[layer.name]))
    return changed

# --- the whole ---

def scaled_layers(names, statistics: Statistics, own: tuple, shelf: Shelf, device) -> list[Scaled]:
    """own: shares of their diagonals that are added to C and G."""
    layers = []
    for name in tqdm(names, "eigenvectors", disable=None):
        C = shrunk(statistics.inputs(name).to(device), own[0])
        G = shrunk(statistics.gradients(name).to(device), own[1])
        layers.append(Scaled(name, C, G, shelf))
    return layers

def split(layers: list[Scaled], keep: int, patterns: dict[str, tuple[int, int]] | None, device):
    """Turn until the zeros stand still. keep: entries of all layers together; patterns: (n, m) of each layer
    by its name, in place of a count."""
    size = sum(layer.shelf[f"U.{layer.name}"].numel() for layer in layers)
    before = now = PENALTY
    with tqdm(total=TURNS, desc="splitting", disable=None) as bar:
        for _ in range(TURNS):
            for layer in layers:
                layer.turn(before, now, device)
            if patterns:
                changed = pattern_masks(layers, patterns)
            else:
                changed = threshold_masks(layers, sampled_threshold(layers, keep, size))
            bar.update()
            bar.set_postfix(changed=f"{changed / size:.2%}")
            before, now = now, now * GROWTH
            if changed < STILL * size:
                break
    if not patterns:
        threshold_masks(layers, *exact_threshold(layers, keep))

def result(layer: Scaled) -> Tensor:
    """D (out, in) in the weight's own units, with exact zeros."""
    U = layer.shelf[f"U.{layer.name}"]
    return layer.unscaled(U * layer.shelf[f"mask.{layer.name}"])
