"""Zeros are repaired block by block: attention, then MLP, are trained by themselves so that the stream after
them comes near that of the dense model, with the weights that are left alone (arXiv 2510.14444).

    h   the stream of the dense model,      h ← h + f(h)
    ĥ   that of the model with zeros,       min Σ_t ‖ĥ_t + f̂(ĥ)_t − (h + f(h))_t‖² / ‖(h + f(h))_t‖²

over the weights of f̂. Each token t counts by the share it is off by, as the next norm sees it: the first
token of a window is a hundred times as long as the others.

A half sees what the halves before it give after their own repair. An update costs a part of a forward and
backward pass, 1 / (2 n_layer) of one of the model: S updates of each half read as many tokens as S updates
of the model."""
import time

import torch
import torch.nn as nn
from torch import Tensor

from model import Llama
from nanolost.covariance import is_text, rope_of
from nanolost.loop import Figures, State, take_step

# a block's parts in their order: the norm before it, and itself
HALVES = (
    ("input_layernorm", "self_attn"),
    ("post_attention_layernorm", "mlp"),
)

class Half:
    """Attention or MLP of a block, with the norm before it: the half `part` of a model, counted from 0."""

    def __init__(self, model: Llama, part: int):
        layer, number = divmod(part, len(HALVES))
        block = model.model["layers"][layer]
        norm, inner = HALVES[number]
        self.norm = block.get_submodule(norm)
        self.inner = block.get_submodule(inner)
        # the MLP looks at no other position
        self.rotates = number == 0

    def __call__(self, x: Tensor, rope: Tensor) -> Tensor:
        """The stream (B, T, C) after it."""
        normed = self.norm(x)
        # as in model.Block
        if self.rotates:
            return x + self.inner(normed, rope)
        return x + self.inner(normed)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.norm.parameters(), *self.inner.parameters()]

def parts_of(model: Llama) -> int:
    """How many halves it has."""
    return len(HALVES) * len(model.model["layers"])

class Refit:
    """The streams of a run's training windows before one half of the model. dense: the model whose stream is
    aimed at. windows: those of this process for each update of a half, (steps, micro-batches, samples)."""

    def __init__(self, model: Llama, dense: Llama, data, windows, context, device):
        self.model = model
        self.dense = dense
        self.context = context
        # all halves read the same windows, in the same order
        self.steps, self.micro = windows.shape[:2]
        self.rope = rope_of(model, data.seq_len, device)
        # of each micro-batch of each step
        self.real = []
        self.small = []
        self.aims = []
        for samples in windows.reshape(-1, windows.shape[-1]):
            self._read(*data.batch(samples, device))
        self.part = -1
        self.half = None

    def _read(self, ids: Tensor, targets: Tensor):
        # padding is not to be repaired
        self.real.append(is_text(targets))
        with torch.no_grad():
            self.small.append(self.model.model["embed_tokens"](ids))
            self.aims.append(self.dense.model["embed_tokens"](ids))

    @torch.no_grad()
    def advance(self):
        """Go on to the next half: through the one before it, as it is now, and the dense one to aim at."""
        with self.context:
            if self.half is not None:
                self.small = [self.half(x, self.rope) for x in self.small]
            self.part += 1
            self.half = Half(self.model, self.part)
            dense = Half(self.dense, self.part)
            self.aims = [dense(x, self.rope) for x in self.aims]
        # nothing else is trained meanwhile
        self.model.requires_grad_(False)
        for p in self.half.parameters():
            p.requires_grad_(True)

    def loss(self, number: int) -> Tensor:
        """How far the stream of one micro-batch is off, summed over its tokens, () float32."""
        aim = self.aims[number].float()
        with self.context:
            y = self.half(self.small[number], self.rope)
        # of each token, (B, T)
        off = (y.float() - aim).square().sum(-1)
        size = aim.square().sum(-1)
        return (off / size)[self.real[number]].sum()

    def tokens(self, numbers: range, job) -> Tensor:
        """Of these micro-batches on all processes, ()."""
        count = sum(self.real[number].sum() for number in numbers)
        return job.sum(count)

    def update(self, state: State, data, samples, config, job) -> Figures:
        """One optimizer step of the half, on its own windows: the counterpart of loop.update."""
        started = time.perf_counter()
        state.gradients.zero_()
        step = state.step - state.began
        total = torch.zeros((), device=job.device)
        numbers = range(step * self.micro, (step + 1) * self.micro)
        # of rows some have more padding than others
        tokens = self.tokens(numbers, job)
        for number in numbers:
            part = self.loss(number) / tokens
            part.backward()
            total += part.detach()
        return take_step(state, total, samples.size, started, config, job)
