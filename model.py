"""A plain LLaMA (Touvron et al. 2023, arXiv 2302.13971) with the module names of Hugging Face's
LlamaForCausalLM, so that a state dict of one loads into the other. RMSNorm, rotary positions (rotate-half),
SwiGLU, no bias.

In shapes: B sequences, T tokens, S tokens attended to, C = n_embd, H heads of D = C / H, V words."""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanolost.loss import HeadLoss

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

    def forward(self, idx, targets=None, cache=None, loss_only: bool = False):
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
