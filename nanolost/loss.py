"""The loss of the head, a slice of rows at a time."""
import torch
import torch.nn as nn
import torch.nn.functional as F

def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of logits (N, V), in float32. A negative target is left out; the mean of
    nothing is 0, so that a batch of padding alone has no gradient."""
    targets = targets.clamp(min=-1)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=-1)
    # torch's mean of nothing is 0 / 0
    return torch.where((targets >= 0).any(), loss, 0.0)

def room_for_gradients(x, weight, bias):
    """Tensors for the gradients of the three; None for a bias that is none."""
    grad_b = None if bias is None else torch.zeros_like(bias)
    # each row of the first is written once, to the others all slices are added
    return [torch.empty_like(x), torch.zeros_like(weight), grad_b]

def softmax_minus_target(logits, norm, log_p, target, share, dtype):
    """The derivative of the loss by the logits, (rows, V) in `dtype`: (softmax − one-hot) · share."""
    p = ((logits - norm).exp() * share).to(dtype)
    # written, not subtracted: in bfloat16 the difference would lose the last bits of a p close to 1
    p.scatter_(-1, target, ((log_p.exp() - 1) * share).to(dtype))
    return p

def add_gradients(grads, part, error, x, w):
    """What the rows `part` add to the gradients of x, of W and of b."""
    grad_x, grad_w, grad_b = grads
    grad_x[part].copy_(error @ w)
    grad_w += error.T @ x[part]
    if grad_b is not None:
        grad_b += error.sum(0)

class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x Wᵀ + b for x (N, C), W (V, C), b (V,) or None and targets (N,), without the
    logits of more than a slice of rows, which would be the largest tensor of a training step.

    With `train` the gradients are computed together with the loss, from logits that a backward pass would
    have to make again. They have no derivative of their own: a second derivative raises RuntimeError."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, train):
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        grads = room_for_gradients(x, weight, bias) if train else [None] * 3
        known = targets >= 0
        # a row's share of the mean; of nothing it is 0
        share = (known / known.sum().clamp(min=1))[:, None]                                # (N, 1)
        # few slices, as each costs a pass over the gradient of W
        rows = max(512, len(x) // 4)
        loss = x.new_zeros((), dtype=torch.float32)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            # any row will do for a target that is left out: its share is 0
            target = targets[part].clamp(min=0)[:, None]
            logits = F.linear(x[part], w, b).float()                                       # (rows, V)
            norm = logits.logsumexp(-1, keepdim=True)
            log_p = logits.gather(-1, target) - norm                                       # (rows, 1)
            # not in place: torch 2.11 drops it when it compiles
            loss = loss - (log_p * share[part]).sum()
            if train:
                error = softmax_minus_target(logits, norm, log_p, target, share[part], x.dtype)
                add_gradients(grads, part, error, x, w)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        # dynamo traces this with gradients on, and refuses a second derivative by itself
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the loss without logits has no second derivative: ask the model for its "
                               "logits as well, with loss_only=False")
        grads = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *grads, None, None

def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head computes x Wᵀ + b. A subclass that keeps the formula counts (sharding makes one)."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward

def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x, which autocast does not see inside an autograd.Function."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

def head_loss(head: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of head(x) for x (N, C) and targets (N,), of which negative ones are left
    out. A head that is no plain linear makes its logits. ValueError for float16 where gradients are made."""
    if not is_plain_linear(head):
        return cross_entropy(head(x), targets)
    x, train = x.to(autocast_dtype(x)), torch.is_grad_enabled()
    if train and x.dtype == torch.float16:
        # they are made before a scaler's factor is known: p / N is below the smallest number of float16
        raise ValueError("the loss without logits has no gradients in float16, where most of them would be "
                         "zero: use bfloat16 or float32, or ask for the logits with loss_only=False")
    return HeadLoss.apply(x, head.weight, head.bias, targets, train)
