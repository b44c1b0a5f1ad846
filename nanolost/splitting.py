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
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from model import Llama
from nanolost.covariance import GROUP_OF, Statistics, covariance_bytes, linears, place_of
from nanolost.lowrank import shrunk
from nanolost.pruning import EVERY, Patterns, largest_of_groups
from nanolost.shelf import Shelf

# ρ at first, and its growth a turn
PENALTY = 0.1
GROWTH = 1.1
# the share of the entries that change sides in the last turn
STILL = 5e-4
# at the most: ρ is 28 by then
TURNS = 60
# an exact threshold is found by half of the bits of a float32 at a time
HALF = 16
LOWER = (1 << HALF) - 1

def split_bytes(model: Llama) -> int:
    """What is on the shelf while the zeros of a whole model are split."""
    values = sum(layer.weight.numel() for layer in linears(model).values())
    # eigenvectors are of the size of the covariances; beside them two numbers and a mask for each weight
    return covariance_bytes(model) * model.config.n_layer + 9 * values

# --- a layer in units of its own ---

class Scaled:
    """A layer as y = e · w · d. On the shelf: the eigenvectors of its scaled C and G, and between the turns

        pull   (out, in)   G̃ W C̃ in the eigenvectors
        U      (out, in)
        mask   (out, in)   where D is U; elsewhere it is zero
        gone   (out, in)   where it stays zero, whatever U is: on the shelf where there is any such entry"""

    def __init__(self, name: str, C: Tensor, G: Tensor, shelf: Shelf):
        self.name = name
        self.shelf = shelf
        d = C.diagonal().sqrt()
        e = G.diagonal().sqrt()
        layer, inner = place_of(name)
        # layers that share their inputs share these
        self.inputs = f"C.{layer}.{GROUP_OF[inner]}"
        self.outputs = f"G.{name}"
        if f"{self.inputs}.vectors" not in shelf:
            self._decompose(self.inputs, C, d)
        self._decompose(self.outputs, G, e)
        self.d = d.float()
        self.e = e.float()

    def _decompose(self, key: str, C: Tensor, d: Tensor):
        # a diagonal of ones: an entry y costs y² / 2 by itself
        ones = C / (d[:, None] * d)
        values, vectors = torch.linalg.eigh(ones)
        # rounding may leave one below zero
        values = values.clamp(min=0)
        self.shelf[f"{key}.values"] = values.float()
        self.shelf[f"{key}.vectors"] = vectors.float()

    def kept(self, what: str) -> Tensor:
        """pull, U or mask, to be changed in place."""
        return self.shelf[f"{what}.{self.name}"]

    def keep(self, what: str, tensor: Tensor):
        self.shelf[f"{what}.{self.name}"] = tensor

    def gone(self) -> Tensor | None:
        if f"gone.{self.name}" in self.shelf:
            return self.kept("gone")
        return None

    def sizes(self, every: int = 1) -> Tensor:
        """|U|, 0 where an entry stays zero: one of `every` entries, flat, or all (out, in)."""
        def some(what: str) -> Tensor:
            whole = self.kept(what)
            return whole if every == 1 else whole.flatten()[::every]
        sizes = some("U").abs()
        if self.gone() is not None:
            sizes.masked_fill_(some("gone"), 0)
        return sizes

    def vectors(self, device) -> tuple[Tensor, Tensor]:
        """P (out, out) of G̃ and Q (in, in) of C̃: an eigenvector a column."""
        P = self.shelf[f"{self.outputs}.vectors"]
        Q = self.shelf[f"{self.inputs}.vectors"]
        return P.to(device), Q.to(device)

    def eigenvalues(self, device) -> Tensor:
        """Of G̃ ⊗ C̃, (out, in)."""
        outputs = self.shelf[f"{self.outputs}.values"].to(device)
        inputs = self.shelf[f"{self.inputs}.values"].to(device)
        return outputs[:, None] * inputs

    def scaled(self, W: Tensor) -> Tensor:
        return self.e[:, None] * W.float() * self.d

    def unscaled(self, Y: Tensor) -> Tensor:
        return Y / self.e[:, None] / self.d

    def begin(self, W: Tensor, D: Tensor, device, gone: Tensor | None = None):
        """From the weight W (out, in) and a first D (out, in), which is U as well: V is 0. gone: entries that
        stay zero, as they are in D."""
        # what is alike in all turns is computed once
        P, Q = self.vectors(device)
        turned = P.T @ self.scaled(W) @ Q
        self.keep("pull", self.eigenvalues(device) * turned)
        self.keep("U", self.scaled(D))
        self.keep("mask", D != 0)
        if gone is not None:
            self.keep("gone", gone)

    def turn(self, before: float, now: float, device):
        """X and U, for a ρ that was `before` and is `now`."""
        U = self.kept("U")
        mask = self.kept("mask").to(device)
        # inside the mask U is D, outside V / ρ
        old = U.to(device)
        D = old * mask
        # of the turn before, and so with its ρ
        V = before * (old - D)
        P, Q = self.vectors(device)
        push = P.T @ (now * D - V) @ Q
        right = self.kept("pull").to(device) + push
        # in the eigenvectors the inverse is a division
        divisor = self.eigenvalues(device) + now
        X = P @ (right / divisor) @ Q.T
        U.copy_(X + V / now)

Layers = list[Scaled]

# --- one threshold ---

def sampled_threshold(layers: Layers, keep: int, size: int) -> float:
    """About the value that `keep` of `size` entries of all |U| lie above."""
    # about is enough between the turns: `split` ends by the exact one
    sampled = []
    for layer in layers:
        some = layer.sizes(EVERY).flatten()
        sampled.append(some)
    sampled = torch.cat(sampled)
    count = len(sampled)
    place = round((1 - keep / size) * count)
    # kthvalue counts from 1
    place = min(max(1, place), count)
    return sampled.kthvalue(place).values.item()

def bits(values: Tensor) -> Tensor:
    """Non-negative float32 as whole numbers in the same order."""
    return values.contiguous().view(torch.int32)

def counts(layers: Layers, upper: int | None = None) -> Tensor:
    """How many |U| have each upper half of bits, (65536,); or of those with this upper half, each lower one.
    A matrix after the other, so that the memory is one's."""
    total = torch.zeros(LOWER + 1, dtype=torch.int64)
    for layer in layers:
        number = bits(layer.sizes().flatten())
        half = number >> HALF
        if upper is not None:
            half = number[half == upper] & LOWER
        total += torch.bincount(half, minlength=LOWER + 1)
    return total

def place(total: Tensor, wanted: int) -> tuple[int, int]:
    """The number whose count holds the `wanted`-th from above, and which of that count it is."""
    # of this number and all larger ones
    above = total.flip(0).cumsum(0).flip(0)
    number = int((above >= wanted).nonzero()[-1])
    larger = int(above[number] - total[number])
    return number, wanted - larger

def exact_threshold(layers: Layers, keep: int) -> tuple[float, int]:
    """The value of the `keep`-th largest |U| of all, and how many that equal it are needed: two looks at one
    matrix after the other, by the upper and the lower half of the bits."""
    if keep == 0:
        return math.inf, 0
    # a sort of all would need their memory together
    upper, wanted = place(counts(layers), keep)
    lower, wanted = place(counts(layers, upper), wanted)
    number = torch.tensor([upper << HALF | lower], dtype=torch.int32)
    value = number.view(torch.float32)
    return value.item(), wanted

# --- masks ---

def change(layer: Scaled, mask: Tensor) -> int:
    """Give a layer another mask; how many entries changed sides."""
    gone = layer.gone()
    if gone is not None:
        # of a pattern, or of a threshold that is 0
        mask = mask & ~gone
    before = layer.kept("mask")
    changed = before != mask
    before.copy_(mask)
    return int(changed.sum())

def threshold_masks(layers: Layers, threshold: float, ties: int | None = None) -> int:
    """Set every mask by |U| > threshold, and by the first `ties` entries that equal it (None: all). Returns
    how many entries changed sides."""
    changed = 0
    for layer in layers:
        size = layer.sizes()
        # at a sample's threshold nothing hangs on which of equal ones stay
        if ties is None:
            mask = size >= threshold
        else:
            mask = size > threshold
        if ties:
            equal = (size == threshold).flatten().nonzero()[:, 0]
            taken = equal[:ties]
            mask.view(-1)[taken] = True
            ties -= len(taken)
        changed += change(layer, mask)
    return changed

def pattern_masks(layers: Layers, patterns: Patterns) -> int:
    """Set every mask by its N:M pattern. Returns how many entries changed sides."""
    changed = 0
    for layer in layers:
        n, m = patterns[layer.name]
        mask = largest_of_groups(layer.sizes(), n, m)
        changed += change(layer, mask)
    return changed

# --- the whole ---

def shrunk_pair(
    name: str,
    statistics: Statistics,
    own: tuple[float, float],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """C̃ (in, in) and G̃ (out, out) of a layer, float64. own: shares of their diagonals that are added."""
    inputs, outputs = own
    C = statistics.inputs(name).to(device)
    G = statistics.gradients(name).to(device)
    return shrunk(C, inputs), shrunk(G, outputs)

def scaled_layers(
    names: Iterable[str],
    statistics: Statistics,
    own: tuple[float, float],
    shelf: Shelf,
    device: torch.device,
) -> Layers:
    """The layers of these names. own: shares of their diagonals that are added to C and G."""
    layers = []
    for name in tqdm(names, "eigenvectors", disable=None):
        C, G = shrunk_pair(name, statistics, own, device)
        layers.append(Scaled(name, C, G, shelf))
    return layers

def split(layers: Layers, keep: int, patterns: Patterns | None, device):
    """Turn until the zeros stand still. keep: entries of all layers together; patterns: (n, m) of each layer
    by its name, in place of a count."""
    size = sum(layer.kept("U").numel() for layer in layers)
    # V is 0 in the first turn, whatever ρ
    before = PENALTY
    now = PENALTY
    with tqdm(total=TURNS, desc="splitting", disable=None) as bar:
        for _ in range(TURNS):
            for layer in layers:
                layer.turn(before, now, device)
            if patterns:
                changed = pattern_masks(layers, patterns)
            else:
                threshold = sampled_threshold(layers, keep, size)
                changed = threshold_masks(layers, threshold)
            bar.update()
            bar.set_postfix(changed=f"{changed / size:.2%}")
            # the next V was made with this ρ
            before = now
            now *= GROWTH
            if changed < STILL * size:
                break
    # that of a sample is near the budget, not within it
    if not patterns:
        threshold, ties = exact_threshold(layers, keep)
        threshold_masks(layers, threshold, ties)

def result(layer: Scaled) -> Tensor:
    """D (out, in) in the weight's own units, with exact zeros."""
    D = layer.kept("U") * layer.kept("mask")
    return layer.unscaled(D)
