"""A plain LLaMA (Touvron et al. 2023, arXiv 2302.13971) with the module names of Hugging Face's
LlamaForCausalLM, so that a state dict of one loads into the other. RMSNorm, rotary positions (rotate-half),
SwiGLU, no bias.

In shapes: B sequences, T tokens, S tokens attended to, C = n_embd, H heads of D = C / H, V words."""
import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

@dataclass
class LlamaConfig:
    vocab_size: int = 50257
    seq_len: int = 256                         # tokens of a training window; longer inputs run, untrained
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int | None = None               # heads of K and V, shared by groups of heads; None: n_head
    n_embd: int = 512
    n_ffn: int = 1376
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False               # lm_head shares its weight with embed_tokens
    init_std: float = 0.02                     # standard deviation of the blocks' first weights

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    def to_hf(self) -> dict:
        """The same sizes under the names of Hugging Face's config.json."""
        ours = {hf: getattr(self, name) for name, hf in HF_NAMES.items()}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}    # for transformers 5; 4 has it flat
        return {**ours, "rope_parameters": rope, "hidden_act": "silu"}       # biases are off by default

    @classmethod
    def from_hf(cls, hf: dict) -> "LlamaConfig":
        """From the content of a config.json. Raises ValueError for what this model does not compute."""
        rope = hf.get("rope_parameters") or {}             # of transformers 5
        hf = {**hf, "rope_theta": rope["rope_theta"]} if "rope_theta" in rope else hf
        missing = [HF_NAMES[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_ffn")
                   if HF_NAMES[name] not in hf]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: is it a LLaMA?")
        scaling = hf.get("rope_scaling") or rope
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        for name, value, only in [
            ("rope_scaling", scaling.get("rope_type", scaling.get("type", "default")), "default"),
            ("hidden_act", hf.get("hidden_act", "silu"), "silu"),
            ("attention_bias", bool(hf.get("attention_bias")), False),
            ("mlp_bias", bool(hf.get("mlp_bias")), False),
            ("head_dim", hf.get("head_dim") or head_dim, head_dim),
        ]:
            if value != only:
                raise ValueError(f"config.json: {name} = {value!r} is not supported, only {only!r}")
        return cls(**{name: hf[key] for name, key in HF_NAMES.items() if key in hf})

HF_NAMES = {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_ffn": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# The sizes of GaLore (Zhao et al. 2024, arXiv 2403.03507), a tiny one for CPUs, and LLaMA's 13b
MODELS = {
    "tiny": dict(n_embd=128,  n_ffn=344,   n_layer=4,  n_head=4),
    "60m":  dict(n_embd=512,  n_ffn=1376,  n_layer=8,  n_head=8),
    "130m": dict(n_embd=768,  n_ffn=2048,  n_layer=12, n_head=12),
    "350m": dict(n_embd=1024, n_ffn=2736,  n_layer=24, n_head=16),
    "1b":   dict(n_embd=2048, n_ffn=5461,  n_layer=24, n_head=32),
    "7b":   dict(n_embd=4096, n_ffn=11008, n_layer=32, n_head=32),
    "13b":  dict(n_embd=5120, n_ffn=13824, n_layer=40, n_head=40),
}

@torch.library.custom_op("nanolost::rope_table", mutates_args=())
def rope_table(positions: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """cos and sin of the rotary angles, (2, T, D/2) float32: dimensions d and d + D/2 turn by the same angle.
    An operation of its own, into which the compiler does not look: otherwise it computes power, cosine and
    sine again for each head of each layer, 0.6 ms of the 11 of a token of LOST 350m in bf16, two cores."""
    frequency = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / -dim)
    angle = positions[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))

@rope_table.register_fake
def _(positions, dim, theta):
    return torch.empty(2, *positions.shape, dim // 2, device=positions.device)

def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Su et al. 2021 (arXiv 2104.09864), eq. 34, in the rotate-half layout. x: (B, T, H, D)."""
    (cos, sin), (a, b) = rope[:, :, None], x.chunk(2, dim=-1)                              # (T, 1, D/2)
    turned = a * cos - b * sin, b * cos + a * sin                                          # in float32
    return torch.cat([half.to(x.dtype) for half in turned], dim=-1)

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

class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        kv_dim = config.n_embd // config.n_head * config.n_kv_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        B, T, C = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.n_head, -1), rope).transpose(1, 2)       # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, self.n_kv_head, -1), rope).transpose(1, 2)  # (B, n_kv, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                       # (B, n_kv_head, S, D)
        y = F.scaled_dot_product_attention(q, k, v, cache.mask if cache else None, is_causal=cache is None,
                                           enable_gqa=self.n_kv_head != self.n_head)       # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

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

def keep_narrow(width: int):
    """What `recompute` keeps of a block, as CoLA-M does (Liu et al. 2025, arXiv 2502.10940): products that
    are narrower than `width`, those of low rank, and attention, which is slow to compute again."""
    def policy(ctx, op, *args, **kwargs):
        narrow = op is torch.ops.aten.mm.default and args[1].shape[1] < width
        keep = narrow or "attention" in str(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(policy)

class Llama(nn.Module):
    """`Llama(config)(idx, targets)` → (logits, loss).

    idx, targets: (B, T) token ids; a target of -1 is left out. With targets: logits (B, T, V) and the mean
    cross-entropy in nats; with loss_only (None, loss), which saves the memory of the logits. Without targets:
    logits of the last position only, (B, 1, V), and None. Parameters are drawn on the CPU from torch's global
    generator, so that a seed means the same model on every device."""

    recompute = False                          # in training: save memory, compute parts of the forward twice

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "norm": nn.RMSNorm(config.n_embd, eps=config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, init_std²) for the matrices of the blocks, N(0, 0.02²) for embedding and head, 1 for norms; a
        parameter that no rule names is an error."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("_proj.weight"):
                p.normal_(0.0, self.config.init_std)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                p.normal_(0.0, 0.02)
            else:
                raise ValueError(f"no rule says how to initialise {name}: add one to Llama.init_weights")

    def forward(self, idx, targets=None, cache: KVCache | None = None, loss_only: bool = False):
        positions = cache.begin(idx.shape[1]) if cache else torch.arange(idx.shape[1], device=idx.device)
        rope = rope_table(positions, self.config.n_embd // self.config.n_head, self.config.rope_theta)
        x = self.model["embed_tokens"](idx)                                                # (B, T, C)
        for block in self.model["layers"]:
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False,
                               context_fn=functools.partial(keep_narrow, self.config.n_embd))
            else:
                x = block(x, rope, cache)
        x = self.model["norm"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                                           # (B, 1, V)
        if loss_only:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            return None, HeadLoss.apply(x.flatten(0, 1).to(dtype), self.lm_head.weight, targets.flatten(),
                                        torch.is_grad_enabled())
        logits = self.lm_head(x)                                                           # (B, T, V)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, eot=None,
                 step=None):
        """Continue idx (B, T ≥ 1) by up to max_new_tokens; returns (B, T + new). temperature 0 takes the
        likeliest token. step: what runs the model on one token and the cache, for example the compiled model.

        The context is never longer than the seq_len the model was trained on: when it is full, its older half
        is dropped and the rest read again from position 0, so a token costs the same however long the text.
        With eot a row that produced it is filled up with it, until all rows have."""
        for layer in self.modules():
            if hasattr(layer, "few_rows"):     # the layer's form for a token at a time
                layer.few_rows = True
        window, start = self.config.seq_len, max(0, idx.shape[1] - self.config.seq_len)
        cache, token, fresh = None, None, True
        done = torch.zeros(idx.shape[0], 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if idx.shape[1] - start > window:
                start, fresh = idx.shape[1] - max(1, window // 2), True
            if fresh:                          # the same tensors again: what they held lies behind the mask
                cache = cache or KVCache(self.config, len(idx), window, idx.device, self.lm_head.weight.dtype)
                cache.length.zero_()
                logits, fresh = self(idx[:, start:], cache=cache)[0], False
            else:
                logits, _ = (self if step is None else step)(token, cache=cache)
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

def pick_device(name: str) -> str:
    """"auto" is the best of cuda, mps and cpu that is here. Raises ValueError for one that is not."""
    here = [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]
    if name not in ("auto", *here):
        raise ValueError(f"--device {name}: this machine or this torch has none; use {' or '.join(here)}")
    return here[0] if name == "auto" else name

# --- counts, from the modules present ---

def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

def count_multiplies(model: nn.Module) -> int:
    """Of the matrix products: each element of a matrix is used once a token, whatever layer it is in. The
    embedding is a look-up, except where the head shares it."""
    matrices = {id(p): p.numel() for m in model.modules() if not isinstance(m, nn.Embedding)
                for p in m.parameters(recurse=False) if p.dim() == 2}
    return sum(matrices.values())

def count_flops(model: Llama) -> int:
    """Of training on one token, forward and backward: 6 a multiplication and 12 n_layer n_embd seq_len for
    attention without its causal half taken off (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    c = model.config
    return 6 * count_multiplies(model) + 12 * c.n_layer * c.n_embd * c.seq_len
