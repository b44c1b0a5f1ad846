"""The loss of the head, a slice of rows at a time."""
import torch
import torch.nn.functional as F

class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x Wᵀ for x (N, C), W (V, C) and targets (N,) without the logits of more than a
    slice of rows, which would be the largest tensor of a training step. With `train` the gradients are
    computed together with the loss, from logits that a backward pass would have to make again."""

    @staticmethod
    def forward(ctx, x, weight, targets, train):
        w, loss = weight.to(x.dtype), x.new_zeros((), dtype=torch.float32)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight) if train else None
        known = targets >= 0
        share = (known / known.sum())[:, None]                                             # (N, 1)
        rows = max(512, len(x) // 4)           # few: each costs a pass over grad_w
        for one, t, s, out in zip(*(a.split(rows) for a in (x, targets, share, grad_x)), strict=True):
            logits, t = F.linear(one, w).float(), t.clamp(min=0)[:, None]                  # (rows, V)
            norm = logits.logsumexp(-1, keepdim=True)
            own = logits.gather(-1, t) - norm                                              # log p of t
            loss = loss - (own * s).sum()                                          # torch 2.11 drops a -=
            if train:
                p = ((logits - norm).exp() * s).to(x.dtype)                        # softmax - one-hot
                p.scatter_(-1, t, ((own.exp() - 1) * s).to(x.dtype))
                out.copy_(p @ w)
                grad_w += p.T @ one
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None
