"""The loss of the head, a slice of rows at a time."""
import torch
import torch.nn as nn
import torch.nn.functional as F

# few slices, as each costs a pass over the gradient of the weight; a slice of 512 rows and 50 000 words is
# 100 MB of logits
SLICES = 4
LEAST_ROWS = 512

def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of logits (N, V), in float32. A negative target is left out; the mean of
    nothing is 0, so that a batch of padding alone has no gradient."""
    targets = targets.clamp(min=-1)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=-1)
    # torch's mean of nothing is 0 / 0
    some = (targets >= 0).any()
    return torch.where(some, loss, 0.0)

def shares_of_the_mean(targets):
    """(N, 1) float32: 1 / n for each of the n targets that count, 0 for the others."""
    known = targets >= 0
    # at least 1: without a target all shares are 0, not 0 / 0
    n = known.sum().clamp(min=1)
    share = known / n
    return share[:, None]

class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x Wᵀ + b for x (N, C), W (V, C), b (V,) or None and targets (N,), without the
    logits of more than a slice of rows, which would be the largest tensor of a training step.

    nats (N,), where it is given, takes the loss of each row, 0 where there is no target.

    With `train` the gradients are computed together with the loss, from logits that a backward pass would
    have to make again. They have no derivative of their own: a second derivative raises RuntimeError."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, train, nats):
        w = weight.to(x.dtype)
        b = None
        grad_x = None
        grad_w = None
        grad_b = None
        if bias is not None:
            b = bias.to(x.dtype)
        # each row of the one is written once, to the other all slices are added
        if train:
            grad_x = torch.empty_like(x)
            grad_w = torch.zeros_like(weight)
        if train and bias is not None:
            grad_b = torch.zeros_like(bias)
        loss = x.new_zeros((), dtype=torch.float32)
        shares = shares_of_the_mean(targets)
        # any word will do for a target that is left out: its share is 0
        words = targets.clamp(min=0)[:, None]
        rows = max(LEAST_ROWS, len(x) // SLICES)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            word = words[part]
            share = shares[part]
            logits = F.linear(x[part], w, b)
            logits = logits.float()                                                        # (rows, V)
            # log of the softmax's denominator
            norm = logits.logsumexp(-1, keepdim=True)
            log_p = logits.gather(-1, word) - norm                                         # (rows, 1)
            # not in place: torch 2.11 drops it when it compiles
            loss = loss - (log_p * share).sum()
            if nats is not None:
                nats[part] = torch.where(share > 0, -log_p, 0)[:, 0]
            # an evaluation needs no more
            if not train:
                continue
            # the derivative by the logits: (softmax − one-hot) · share
            error = (logits - norm).exp() * share
            error = error.to(x.dtype)
            # written, not subtracted: in bfloat16 the difference loses the last bits of a p close to 1
            at_word = (log_p.exp() - 1) * share
            error.scatter_(-1, word, at_word.to(x.dtype))
            grad_x[part].copy_(error @ w)
            grad_w += error.T @ x[part]
            if grad_b is not None:
                grad_b += error.sum(0)
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        return loss

    @staticmethod
    def backward(ctx, grad):
        # the compiler traces this with gradients on, and refuses a second derivative by itself
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice:
            raise RuntimeError(
                "the loss without logits has no second derivative: ask the model for its logits as well, "
                "with loss_only=False"
            )
        # made for a factor of 1: gradient accumulation and a mean over processes bring theirs
        grad_x, grad_w, grad_b = ctx.saved_tensors
        if grad_b is not None:
            grad_b = grad_b * grad
        return grad_x * grad, grad_w * grad, grad_b, None, None, None

def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head computes x Wᵀ + b. A subclass that keeps the formula counts (sharding makes one)."""
    if not isinstance(head, nn.Linear):
        return False
    return type(head).forward is nn.Linear.forward

def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x, which autocast does not see inside an autograd.Function."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype

def head_loss(
    head: nn.Module,
    x: torch.Tensor,
    targets: torch.Tensor,
    nats: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats of head(x) for x (N, C) and targets (N,), of which negative ones are left
    out. A head that is no plain linear makes its logits. nats (N,) float32, for an evaluation: takes the loss
    of each row. ValueError for float16 where gradients are made."""
    if not is_plain_linear(head):
        logits = head(x)
        if nats is not None:
            known = targets.clamp(min=-1)
            nats.copy_(F.cross_entropy(logits.float(), known, ignore_index=-1, reduction="none"))
        return cross_entropy(logits, targets)
    x = x.to(autocast_dtype(x))
    train = torch.is_grad_enabled()
    # gradients are made before a scaler's factor is known, and p / N is less than the least float16
    if train and x.dtype == torch.float16:
        raise ValueError(
            "the loss without logits has no gradients in float16, where most of them would be zero: use "
            "bfloat16 or float32, or ask for the logits with loss_only=False"
        )
    return HeadLoss.apply(x, head.weight, head.bias, targets, train, nats)
