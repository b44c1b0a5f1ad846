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
HALVES = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))

def half(block: nn.Module, number: int, x: Tensor, rope: Tensor) -> Tensor:
    """The stream (B, T, C) after attention (0) or MLP (1) of a block."""
    norm, inner = (block.get_submodule(name) for name in HALVES[number])
    normed = norm(x)
    return x + (inner(normed, rope) if number == 0 else inner(normed))

def trained(model: Llama, part: int) -> list[nn.Parameter]:
    """What the half `part` of the model, counted from 0, has to train: its matrices and its norm."""
    block = model.model["layers"][part // 2]
    modules = (block.get_submodule(name) for name in HALVES[part % 2])
    return [p for module in modules for p in module.parameters()]

def parts_of(model: Llama) -> int:
    return 2 * len(model.model["layers"])

class Refit:
    """The streams of a run's training windows before one half of the model. dense: the model whose stream is
    aimed at. windows: those of this process for each update of a half, (steps, micro-batches, samples)."""

    def __init__(self, model: Llama, dense: Llama, data, windows, context, device):
        self.model = model
        self.dense = dense
        self.context = context
        # all halves read the same windows, in the same order
        self.steps = len(windows)
        found = [data.batch(samples, device) for step in windows for samples in step]
        self.micro = len(found) // self.steps
        # padding is not to be repaired
        self.real = [is_text(targets) for _, targets in found]
        self.rope = rope_of(model, data.seq_len, device)
        # of each micro-batch of each step
        self.small = [model.model["embed_tokens"](x) for x, _ in found]
        self.aims = [dense.model["embed_tokens"](x) for x, _ in found]
        self.part = -1

    @torch.no_grad()
    def advance(self):
        """Go on to the next half: through the one before it, as it is now, and the dense one to aim at."""
        with self.context:
            if self.part >= 0:
                block = self.model.model["layers"][self.part // 2]
                self.small = [half(block, self.part % 2, x, self.rope) for x in self.small]
            self.part += 1
            block = self.dense.model["layers"][self.part // 2]
            self.aims = [half(block, self.part % 2, x, self.rope) for x in self.aims]
        self.model.requires_grad_(False)
        for p in trained(self.model, self.part):
            p.requires_grad_(True)

    def update(self, state: State, data, samples, config, job) -> Figures:
        """One optimizer step of the half, as loop.update: the loss is the mean square of what the stream is
        off by, over that of the dense stream, token by token."""
        started = time.perf_counter()
        state.gradients.zero_()
        block = self.model.model["layers"][self.part // 2]
        first = (state.step - state.began) % self.steps * self.micro
        loss = torch.zeros((), device=job.device)
        for number in range(first, first + self.micro):
            aim = self.aims[number].float()
            with self.context:
                y = half(block, self.part % 2, self.small[number], self.rope)
            off = (y.float() - aim).square().sum(-1) / aim.square().sum(-1)     # (B, T)
            share = off[self.real[number]].mean() / (self.micro * job.world)
            share.backward()
            loss += share.detach()
        return take_step(state, loss, samples.size, started, config, job)
