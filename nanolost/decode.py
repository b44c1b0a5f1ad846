"""Text from a model: key-value cache, sampling, the compiled decode step."""
import contextlib
import copy

import torch

from model import Llama
from nanolost.sparse import share_calls

BLOCK = 256                                    # tokens that a cache has room for at first
PREFILL = 2048                                 # tokens read at once: the mask is this times the text

# --- keys and values ---

class KVCache:
    """Keys and values of the tokens seen so far, in buffers with room for `size` tokens, whatever dtype the
    model gives them (autocast decides late). A decode step keeps all shapes, and the length is a tensor, so
    that the step compiles once for each size."""

    def __init__(self, size: int, device=None):
        self.size = size
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.kv = []                           # of each layer [k, v], (B, n_kv_head, size, D)

    def begin(self, T: int) -> torch.Tensor:
        """Count T more tokens, for which there must be room; returns their positions, (T,)."""
        device = self.length.device
        new = torch.arange(T, device=device)
        self.positions = self.length + new
        # each token sees itself and what stands before it
        places = torch.arange(self.size, device=device)
        self.mask = self.positions[:, None] >= places                                      # (T, size)
        self.length += T
        return self.positions

    def append(self, layer: int, *kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, n_kv_head, T, D) of one layer; returns its whole buffers: the mask hides the places
        that are not written yet."""
        if layer == len(self.kv):
            # now the dtype is known
            empty = [new[:, :, :0] for new in kv]
            self.kv.append([widened(one, self.size) for one in empty])
        k, v = self.kv[layer]
        k.index_copy_(2, self.positions, kv[0])
        v.index_copy_(2, self.positions, kv[1])
        return k, v

    def reserve(self, tokens: int, limit: int):
        """Make room for `tokens` in all. The size doubles, up to `limit`: a text costs what it is long, not
        what the model was made for, and a compiled step is compiled few times."""
        # some 9 sizes to 131 072 tokens, and at most half of a buffer empty
        while self.size < tokens:
            self.size = min(2 * self.size, limit)
        # a layer at a time: never both sizes of all of them
        for pair in self.kv:
            for i, old in enumerate(pair):
                if old.shape[2] < self.size:
                    pair[i] = widened(old, self.size)

    def clear(self):
        """Forget the tokens. The buffers stay: what they hold lies behind the mask."""
        self.length.zero_()

    def tensors(self) -> list[torch.Tensor]:
        """All that a decode step reads and writes."""
        found = [self.length]
        for pair in self.kv:
            found += pair
        return found

    def stay(self) -> "KVCache":
        """Tell the compiler that the tensors never move: else no CUDA graph is made that writes to them."""
        for tensor in self.tensors():
            torch._dynamo.mark_static_address(tensor, guard=False)
        return self

def widened(old: torch.Tensor, size: int) -> torch.Tensor:
    """A buffer (B, n_kv_head, size, D) that begins with `old`."""
    batch, heads, length, width = old.shape
    # zeros: what is masked still meets the softmax, and 0 times NaN is NaN
    new = old.new_zeros(batch, heads, size, width)
    new[:, :, :length] = old
    return new

# --- a text, token by token ---

def pick_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """One token a row from logits (B, V): the likeliest at temperature 0, else drawn from the top_k
    likeliest, or from the fewest whose probabilities sum to top_p (Holtzman et al. 2020, arXiv 1904.09751),
    or from all. Returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # the largest becomes 0, which no temperature makes infinite; below 1e-38 float32 would divide by 0
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(temperature, 1e-30)
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        best = logits.topk(k).values
        drop = logits < best[:, -1:]
        logits = logits.masked_fill(drop, float("-inf"))
    if top_p is not None:
        probs = logits.softmax(-1)
        probs, order = probs.sort(descending=True)
        # the sum before each one, so that the first always stays
        before = probs.cumsum(-1) - probs
        drop = before >= top_p
        # back to the order of the vocabulary
        drop = drop.scatter(1, order, drop)
        logits = logits.masked_fill(drop, float("-inf"))
    probs = logits.softmax(-1)
    return torch.multinomial(probs, 1, generator=generator)

@contextlib.contextmanager
def few_rows(model):
    """Layers that have a form for a few rows (`few_rows`) use it inside, and afterwards what they used."""
    # asked by the attribute: this file knows no kind of layer
    layers = [module for module in model.modules() if hasattr(module, "few_rows")]
    before = [layer.few_rows for layer in layers]
    try:
        for layer in layers:
            layer.few_rows = True
        yield
    finally:
        # also after Ctrl-C: training goes on with the form that it began with
        for layer, value in zip(layers, before, strict=True):
            layer.few_rows = value

def prefill(model, idx, cache, limit):
    """Read the tokens idx (B, T) into an empty cache, by pieces; logits of the last one, (B, 1, V)."""
    # all at once: the pieces would find the buffers too small one after the other
    cache.reserve(idx.shape[1], limit)
    for piece in idx.split(PREFILL, dim=1):
        logits, _ = model(piece, cache=cache)
    return logits

@torch.inference_mode()
def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    generator=None,
    eot=None,
    step=None,
    vocab_size=None,
    known=None,
):
    """Continue idx (B, T ≥ 1) by up to max_new_tokens; returns (B, T + new). temperature 0 takes the
    likeliest token. step: what runs the model on one token and the cache, for example the compiled model.
    vocab_size: ids from there on are never drawn (rows of a padded vocabulary), known (vocab_size,) bool: nor
    are those that it leaves out (a vocabulary with holes). eot: the id that ends a text, or several.

    The context is never longer than the max_seq_len that the model was made for: when it is full, its older
    half is dropped and the rest read again from position 0, so that a token costs the same however long the
    text. With eot a row that produced it is filled up with it (the first of several), until all rows have."""
    limit = model.config.max_seq_len
    size = min(BLOCK, limit)
    cache = KVCache(size, idx.device)
    # the context is what follows here
    start = max(0, idx.shape[1] - limit)
    done = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    ends = None if eot is None else torch.tensor(eot, device=idx.device).reshape(-1)
    token = None
    with few_rows(model):
        for _ in range(max_new_tokens):
            length = idx.shape[1] - start
            if length > limit:
                # one reading of half a context for every half of new tokens
                half = max(1, limit // 2)
                start = idx.shape[1] - half
                token = None
            if token is None:
                cache.clear()
                logits = prefill(model, idx[:, start:], cache, limit)
            else:
                cache.reserve(length, limit)
                run = step or model
                logits, _ = run(token, cache=cache)
            logits = logits[:, -1, :vocab_size]
            if known is not None:
                logits = logits.masked_fill(~known, -torch.inf)
            # in float32: probabilities of a large vocabulary are small
            token = pick_token(logits.float(), temperature, top_k, top_p, generator)       # (B, 1)
            # a finished row goes on with its end
            if ends is not None:
                token = torch.where(done, ends[0], token)
                done |= torch.isin(token, ends)
            idx = torch.cat((idx, token), dim=1)
            # without eot a GPU never waits for the answer
            if ends is not None and done.all():
                break
    return idx

# --- the compiled decode step ---

def one_row(x, W):
    """x (1, K) times W (K, N) as a sum that inductor vectorises: at one row its time is that of reading W,
    which the library's product exceeds for a narrow one by far (LOST 130m in bfloat16: 1.5 times in all)."""
    if x.shape[0] > 1:
        # the library's product
        return NotImplemented
    if W.shape[0] < 32:
        # of a constant this is done once, not for each token
        W = W.contiguous()
    # a buffer of its own: what computes x, such as picking channels, would run again for each column of W
    x = x.as_strided(x.shape, x.stride())
    return (x.mT * W).sum(0, keepdim=True)

def decompositions() -> dict:
    """What inductor takes apart, and two operations more."""
    from torch._decomp import get_decompositions
    from torch._inductor.decomposition import select_decomp_table

    # 3 times slower than its parts for one row
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    table = dict(select_decomp_table())
    table.update(get_decompositions([attention]))
    table[torch.ops.aten.mm.default] = one_row
    return table

@torch.no_grad()
def compile_frozen(run, tensors):
    """run(*tensors), which returns a list, compiled for these shapes. Traced as it runs: torch.compile would
    look at each weight again before each token, 1 ms of 10 for LOST 350m in bfloat16."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    # clones, as the trace writes to them
    clones = [tensor.clone() for tensor in tensors]
    graph = make_fx(run)(*clones)
    share_calls(graph)
    # the weights become constants, so that what is made of them is made once
    with torch._inductor.config.patch(freezing=True):
        return compile_fx(graph, tensors, decompositions=decompositions())

def compile_for_cpu(model, cache, tensors):
    """tensors (token, *cache.tensors()) → [logits]."""
    def run(token, length, *kv):
        # the graph's own tensors in place of the cache's
        seen = copy.copy(cache)
        seen.length = length
        seen.kv = [kv[i:i + 2] for i in range(0, len(kv), 2)]
        logits, _ = model(token, cache=seen)
        return [logits]

    return compile_frozen(run, tensors)

def compile_for_gpu(model: Llama):
    """`compile_step` by CUDA graphs."""
    # a graph for each size of the cache, of which a long text has more than dynamo's 8
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    # coordinate descent: a product with one row becomes a sum that is tuned, as gpt-fast has it
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    graphs = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    def step(token, cache):
        return graphs(token, cache=cache.stay())

    return step

def compile_step(model: Llama):
    """The decode step compiled, for `generate(step=…)`; the model must not change any more. On a CPU its
    weights become constants; of several texts at once they are laid out anew, in as much memory again."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return compile_for_gpu(model)
    # by what the cache's growth, its dtype and the number of texts change
    made = {}

    def step(token, cache):
        tensors = [token, *cache.tensors()]
        last = tensors[-1]
        key = token.shape, last.shape, last.dtype
        if key not in made:
            made[key] = compile_for_cpu(model, cache, tensors)
        logits, = made[key](*tensors)
        return logits, None

    return step
