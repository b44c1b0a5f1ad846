"""Text from a model: key-value cache, sampling, the compiled decode step."""
import copy

import torch

from model import Llama, LlamaConfig

class KVCache:
    """Keys and values of the tokens seen so far, in tensors allocated once for `size` tokens. All shapes stay
    and the length is a tensor, so that the step of one token compiles once."""

    def __init__(self, config: LlamaConfig, batch: int, size: int, device=None, dtype=None):
        kv = torch.zeros(config.n_layer, 2, batch, config.n_kv_head, size, config.n_embd // config.n_head,
                         device=device, dtype=dtype)
        self.kv = [list(layer) for layer in kv]
        self.length = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, T: int) -> torch.Tensor:
        """Make room for T more tokens; returns their positions, (T,)."""
        size, device = self.kv[0][0].shape[2], self.length.device
        self.positions = self.length + torch.arange(T, device=device)
        self.mask = self.positions[:, None] >= torch.arange(size, device=device)         # (T, size)
        self.length += T
        return self.positions

    def append(self, layer: int, *kv: torch.Tensor) -> list[torch.Tensor]:
        """Store k, v (B, n_kv_head, T, D) of one layer; returns its whole
        buffers: the mask hides the places that are not written yet."""
        return [old.index_copy_(2, self.positions, new) for old, new in zip(self.kv[layer], kv, strict=True)]

    def tensors(self) -> list[torch.Tensor]:
        return [self.length, *(one for layer in self.kv for one in layer)]

    def stay(self) -> "KVCache":
        """Tell the compiler that the tensors never move: else no CUDA graph is made that writes to them."""
        for tensor in self.tensors():
            torch._dynamo.mark_static_address(tensor, guard=False)
        return self

def pick_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """One token a row from logits (B, V): the likeliest at temperature 0, else drawn from the top_k
    likeliest, or from the fewest whose probabilities sum to top_p (Holtzman et al. 2020, arXiv 1904.09751),
    or from all. Returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature       # else a small temperature overflows
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        drop = probs.cumsum(-1) - probs >= top_p                                  # the first one always stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, eot=None,
             step=None):
    """Continue idx (B, T ≥ 1) by up to max_new_tokens; returns (B, T + new). temperature 0 takes the
    likeliest token. step: what runs the model on one token and the cache, for example the compiled model.

    The context is never longer than the seq_len the model was trained on: when it is full, its older half
    is dropped and the rest read again from position 0, so a token costs the same however long the text.
    With eot a row that produced it is filled up with it, until all rows have."""
    for layer in model.modules():
        if hasattr(layer, "few_rows"):     # the layer's form for a token at a time
            layer.few_rows = True
    window, start = model.config.seq_len, max(0, idx.shape[1] - model.config.seq_len)
    cache, token, fresh = None, None, True
    done = torch.zeros(idx.shape[0], 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if idx.shape[1] - start > window:
            start, fresh = idx.shape[1] - max(1, window // 2), True
        if fresh:                          # the same tensors again: what they held lies behind the mask
            cache = cache or KVCache(model.config, len(idx), window, idx.device, model.lm_head.weight.dtype)
            cache.length.zero_()
            logits, fresh = model(idx[:, start:], cache=cache)[0], False
        else:
            logits, _ = (model if step is None else step)(token, cache=cache)
        token = pick_token(logits[:, -1].float(), temperature, top_k, top_p, generator)   # (B, 1)
        if eot is not None:
            token = torch.where(done, eot, token)
            done |= token == eot
        idx = torch.cat((idx, token), dim=1)
        if eot is not None and done.all():             # only then does a GPU wait for the answer
            break
    return idx

def one_row(x, W):
    """x (1, K) times W (K, N) as a sum that inductor vectorises: at one row its time is that of reading W,
    which the library's product exceeds for a narrow one by far (LOST 130m in bfloat16: 1.5 times in all)."""
    if x.shape[0] > 1:
        return NotImplemented                  # the library's product
    W = W.contiguous() if W.shape[0] < 32 else W                       # a constant: once, not a token
    return (x.mT * W).sum(0, keepdim=True)

@torch.no_grad()
def compile_for_cpu(model, cache, tensors):
    """tensors (token, *cache.tensors()) → [logits], for these shapes. Traced as it runs: torch.compile would
    look at each weight again before each token, 1 ms of 10 for LOST 350m in bfloat16."""
    from torch._decomp import get_decompositions
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    def run(token, length, *kv):
        seen = copy.copy(cache)
        seen.length, seen.kv = length, list(zip(kv[::2], kv[1::2], strict=True))
        return model(token, cache=seen)[:1]
    graph = make_fx(run)(*(tensor.clone() for tensor in tensors))                  # it changes the clones
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu         # 3 times slower for a row
    table = {**select_decomp_table(), **get_decompositions([attention]), torch.ops.aten.mm.default: one_row}
    with torch._inductor.config.patch(freezing=True):
        return compile_fx(graph, tensors, decompositions=table)

def compile_step(model: Llama):
    """The step of one token compiled, for `generate(step=…)`; the model must not change any more. On a CPU
    its weights become constants; of several texts at once they are laid out anew, in as much memory again."""
    if next(model.parameters()).device.type != "cpu":
        # coordinate descent: a product with one row becomes a sum that is tuned, as gpt-fast has it
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
        graphs = torch.compile(model, fullgraph=True, dynamic=False, options=options)
        return lambda token, cache: graphs(token, cache=cache.stay())
    made = {}                                  # by the number of texts and the window
    def step(token, cache):
        tensors = [token, *cache.tensors()]
        shapes = token.shape, tensors[-1].shape
        if shapes not in made:
            made[shapes] = compile_for_cpu(model, cache, tensors)
        return made[shapes](*tensors)[0], None
    return step
