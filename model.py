"""A plain LLaMA (Touvron et al. 2023, arXiv 2302.13971) with the module names of Hugging Face's
LlamaForCausalLM, so that a state dict of one loads into the other. RMSNorm, rotary positions (rotate-half),
SwiGLU; no bias. Switches make it the models that differ by a line: LLaMA 3.1, Mistral, Qwen2, Qwen3.

In shapes: B sequences, T tokens, S tokens attended to, C = n_embd, H heads of D = head_dim, V words."""
import functools
import hashlib
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanolost.loss import cross_entropy, head_loss

# --- sizes ---

class ConfigError(ValueError):
    """Sizes that cannot be, or a config.json of a model that this program does not compute."""

# of each size its kind, the least and the most that is believed: layers are built, if only as shapes, before
# the weights of a file can contradict, and no product of the others reaches 2⁶³ bytes
LIMITS = {
    "vocab_size": (int, 1, 2**31),
    "max_seq_len": (int, 1, 2**31),
    # LLaMA 3.1 of 405 billion has 126
    "n_layer": (int, 1, 10_000),
    "n_head": (int, 1, 2**20),
    "n_kv_head": (int, 1, 2**20),
    "n_embd": (int, 1, 2**24),
    "n_ffn": (int, 1, 2**24),
    "head_dim": (int, 1, 2**14),
    "rope_theta": (float, 1.0, 1e30),
    "norm_eps": (float, 0.0, 1.0),
    "tie_embeddings": (bool, False, True),
    "qkv_bias": (bool, False, True),
    "o_bias": (bool, False, True),
    "mlp_bias": (bool, False, True),
    "qk_norm": (bool, False, True),
    "init_std": (float, 0.0, 1e30),
}
EXPECTED = {int: "a whole number from {} to {}", float: "a number from {} to {}", bool: "true or false"}
# of each number of LlamaConfig.rope_scaling
SCALING_LIMITS = (float, 1e-6, 1e9)

def shown(value) -> str:
    """A value from outside, for one line: short and without an exception, however large or deep it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        # Python refuses to write more, in a list as well
        return "a number of more than 4300 digits"

def check_value(name: str, value, limits: tuple):
    """Raises ConfigError for a value of another kind, or outside (kind, least, most)."""
    kind, least, most = limits
    # NaN fails the second comparison. The type itself, as True is an int as well; JSON may write 1.0 as 1
    types = (int, float) if kind is float else (kind,)
    if type(value) not in types or not least <= value <= most:
        raise ConfigError(f"{name} = {shown(value)} must be {EXPECTED[kind].format(least, most)}")

def refuse_multiple(
    sizes: dict,
    large: str,
    small: str,
    multiple: str,
    names: dict,
):
    """Raises ConfigError for a size that is not such a multiple of another."""
    # "hidden_size 36" to who has written it so
    whole = f"{names.get(large, large)} {sizes[large]}"
    part = f"{names.get(small, small)} {sizes[small]}"
    raise ConfigError(f"{whole} must be {multiple} of {part}")

def check_sizes(sizes: dict, names: dict):
    """Raises ConfigError for values that cannot be. names: what the reader calls them, where not as here."""
    # left out, it follows from the others
    given = sizes.get("head_dim") is not None
    for name, limits in LIMITS.items():
        if name in sizes and (given or name != "head_dim"):
            check_value(names.get(name, name), sizes[name], limits)
    # rotary positions turn the dimensions of a head in pairs
    if not given and sizes["n_embd"] % (2 * sizes["n_head"]):
        refuse_multiple(sizes, "n_embd", "n_head", "an even multiple", names)
    if given and sizes["head_dim"] % 2:
        raise ConfigError(f"head_dim = {sizes['head_dim']} must be even")
    # each head of K and V serves a group of queries' heads
    if sizes["n_head"] % sizes["n_kv_head"]:
        refuse_multiple(sizes, "n_head", "n_kv_head", "a multiple", names)

def check_scaling(scaling: tuple, names: list[str] | None = None):
    """Raises ConfigError for a scaling that `slowed` does not compute. names: of its numbers."""
    if len(scaling) not in (0, 1, 4):
        raise ConfigError(f"rope_scaling = {shown(scaling)} must be empty, 1 or 4 numbers")
    names = names or ["rope_scaling"] * len(scaling)
    for name, value in zip(names, scaling, strict=True):
        check_value(name, value, SCALING_LIMITS)
    if len(scaling) < 4:
        return
    _, low, high, _ = scaling
    # the slope between them would have no width, or run backwards
    if low >= high:
        raise ConfigError(f"{names[1]} {low} must be below {names[2]} {high}")

@dataclass
class LlamaConfig:
    vocab_size: int = 50257
    max_seq_len: int = 256                     # tokens that the model was made for; longer ones run
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int | None = None               # heads of K and V, shared by groups of heads; None: n_head
    n_embd: int = 512
    n_ffn: int = 1376
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False               # lm_head shares its weight with embed_tokens
    init_std: float = 0.02                     # standard deviation of the blocks' first weights

    # what differs in a trained model from elsewhere
    head_dim: int | None = None                # dimensions of a head; None: n_embd / n_head
    rope_scaling: tuple[float, ...] = ()       # of the angles, see `slowed`
    qkv_bias: bool = False                     # of q_proj, k_proj, v_proj: Qwen2
    o_bias: bool = False                       # of o_proj
    mlp_bias: bool = False                     # of gate_proj, up_proj, down_proj
    qk_norm: bool = False                      # an RMSNorm of each head of Q and K: Qwen3
    model_type: str = "llama"                  # what others call it; nothing here depends on it

    def __post_init__(self):
        # one head of K and V for each of Q is the original LLaMA
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        check_sizes(vars(self), names={})
        # JSON has lists
        self.rope_scaling = tuple(self.rope_scaling)
        check_scaling(self.rope_scaling)
        # after the check, which says more of sizes than of their quotient
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head

# the sizes of GaLore (Zhao et al. 2024, arXiv 2403.03507), a tiny one for CPUs, and LLaMA's 13b
MODELS = {
    "tiny": dict(n_embd=128,  n_ffn=344,   n_layer=4,  n_head=4),
    "60m":  dict(n_embd=512,  n_ffn=1376,  n_layer=8,  n_head=8),
    "130m": dict(n_embd=768,  n_ffn=2048,  n_layer=12, n_head=12),
    "350m": dict(n_embd=1024, n_ffn=2736,  n_layer=24, n_head=16),
    "1b":   dict(n_embd=2048, n_ffn=5461,  n_layer=24, n_head=32),
    "7b":   dict(n_embd=4096, n_ffn=11008, n_layer=32, n_head=32),
    "13b":  dict(n_embd=5120, n_ffn=13824, n_layer=40, n_head=40),
}

# --- first weights ---

def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of the CPU for one weight. What it draws depends on the seed and the name alone, so that a
    weight can be drawn alone, in any order, and by any process of any number: the same on every device."""
    text = f"{seed}/{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # 63 bits, as torch takes a signed number
    number = int.from_bytes(digest, "little") >> 1
    return torch.Generator().manual_seed(number)

def draw_normal(p: torch.Tensor, std: float, generator: torch.Generator):
    """Fill p with independent draws from N(0, std²), made on the CPU whatever its device."""
    # there in place: of the largest matrix a second copy would be the most that a start holds
    if p.device.type == "cpu" and p.is_contiguous():
        p.normal_(0.0, std, generator=generator)
        return
    drawn = torch.empty(p.shape, dtype=p.dtype, device="cpu")
    drawn.normal_(0.0, std, generator=generator)
    p.copy_(drawn)

@torch.no_grad()
def first_values(name: str, p: torch.Tensor, std: float, seed: int):
    """Fill p, the parameter `name` of a Llama whose blocks have the init_std `std`."""
    if name.endswith("norm.weight"):
        p.fill_(1.0)
    # only models that were trained elsewhere have them, and bring their own
    elif name.endswith("_proj.bias"):
        p.zero_()
    elif name.endswith("_proj.weight"):
        draw_normal(p, std, generator_of(seed, name))
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        draw_normal(p, 0.02, generator_of(seed, name))
    else:
        raise ValueError(f"no rule says how to initialise {name}: add one to model.first_values")

# --- the model, from the inside out ---

def slowed(
    frequency: torch.Tensor,
    factor: float,
    low: float = 0.0,
    high: float = 0.0,
    window: float | None = None,
) -> torch.Tensor:
    """Frequencies (D/2,) of a model whose limit was stretched after its training on `window` tokens.

    factor alone: all of them divided (Chen et al. 2023, arXiv 2306.15595). With the others LLaMA 3.1's rule:
    a pair that turns fewer than `low` times in the window is divided, one above `high` turns is not, and
    between them is a slope."""
    if window is None:
        return frequency / factor
    turns = window * frequency / (2 * math.pi)
    # the share of its frequency that a pair keeps: fast ones tell neighbours apart, as before
    slope = (turns - low) / (high - low)
    kept = slope.clamp(0, 1)
    slow = frequency / factor
    return kept * frequency + (1 - kept) * slow

# an operation of its own, into which the compiler does not look: otherwise it computes power, cosine and
# sine again for each head of each layer, 0.6 ms of the 11 of a decode step (LOST 350m, bfloat16, two cores)
@torch.library.custom_op("nanolost::rope_table", mutates_args=())
def rope_table(
    positions: torch.Tensor,
    dim: int,
    theta: float,
    scaling: Sequence[float],
) -> torch.Tensor:
    """cos and sin of the rotary angles, (2, T, D/2) float32: dimensions d and d + D/2 turn alike. scaling:
    LlamaConfig's."""
    device = positions.device
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    # the first pair turns by a radian a token, the last by almost 1 / theta
    frequency = theta ** (steps / -dim)
    if scaling:
        frequency = slowed(frequency, *scaling)
    angle = positions[:, None] * frequency
    table = angle.cos(), angle.sin()
    return torch.stack(table)

@rope_table.register_fake
def _(positions, dim, theta, scaling):
    T = len(positions)
    return torch.empty(2, T, dim // 2, device=positions.device)

def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Su et al. 2021 (arXiv 2104.09864), eq. 34, in the rotate-half layout. x: (B, T, H, D)."""
    cos, sin = rope[:, :, None]                                                            # (T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    # in float32, as the table is, whatever x is
    left = a * cos - b * sin
    right = b * cos + a * sin
    halves = left.to(x.dtype), right.to(x.dtype)
    return torch.cat(halves, dim=-1)

class Attention(nn.Module):
    """Causal attention; with a cache over the tokens that it holds as well."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        C = config.n_embd
        D = config.head_dim
        # as a rule C, though not in Qwen3
        width = D * self.n_head
        # grouped queries (Ainslie et al. 2023, arXiv 2305.13245): fewer heads of K and V
        kv_width = D * self.n_kv_head
        bias = config.qkv_bias
        self.q_proj = nn.Linear(C, width, bias)
        self.k_proj = nn.Linear(C, kv_width, bias)
        self.v_proj = nn.Linear(C, kv_width, bias)
        self.o_proj = nn.Linear(width, C, config.o_bias)
        self.q_norm = None
        self.k_norm = None
        if config.qk_norm:
            # Henry et al. 2020, arXiv 2010.04245, as Qwen3 has it: of each head, before it is turned
            self.q_norm = nn.RMSNorm(D, config.norm_eps)
            self.k_norm = nn.RMSNorm(D, config.norm_eps)

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x)                                                                 # (B, T, H D)
        k = self.k_proj(x)
        v = self.v_proj(x)
        q = q.view(B, T, self.n_head, -1)                                                  # (B, T, H, D)
        k = k.view(B, T, self.n_kv_head, -1)                                               # (B, T, n_kv, D)
        v = v.view(B, T, self.n_kv_head, -1)
        # of each head by itself, over D
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, rope)
        k = rotate(k, rope)
        # attention wants the heads before the tokens
        q = q.transpose(1, 2)                                                              # (B, H, T, D)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        # without a cache each token sees those before it, which needs no mask in memory
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                          # (B, n_kv, S, D)
            mask = cache.mask                                                              # (T, S)
        y = F.scaled_dot_product_attention(
            q, k, v, mask,
            is_causal=cache is None,
            enable_gqa=self.n_kv_head != self.n_head,
        )                                                                                  # (B, H, T, D)
        # back to one row a token
        y = y.transpose(1, 2)
        return self.o_proj(y.reshape(B, T, -1))                                            # (B, T, C)

class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C = config.n_embd
        inner = config.n_ffn
        bias = config.mlp_bias
        self.gate_proj = nn.Linear(C, inner, bias)
        self.up_proj = nn.Linear(C, inner, bias)
        self.down_proj = nn.Linear(inner, C, bias)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.width = config.n_embd

    def forward(self, x, rope, cache=None, twice: bool = False):
        """twice: the backward pass computes most of the block again."""
        if not twice:
            return self.inner(x, rope, cache)
        # inside the block, where a block that is compiled or sharded by itself finds it
        return checkpoint(
            self.inner, x, rope,
            use_reentrant=False,
            # nothing is drawn in a block
            preserve_rng_state=False,
            context_fn=functools.partial(keep_narrow, self.width),
        )

    def inner(self, x, rope, cache=None):
        # both add to the same stream: a norm before each, none after
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, rope, cache)
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)

def keep_narrow(width: int):
    """What `recompute` keeps of a block, as CoLA-M does (Liu et al. 2025, arXiv 2502.10940): products that
    are narrower than `width`, those of low rank, and attention, which is slow to compute again."""
    def policy(ctx, op, *args, **kwargs):
        # each backend of attention is an operation of its own
        keep = "attention" in str(op)
        if op is torch.ops.aten.mm.default:
            keep = args[1].shape[1] < width
        if keep:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)

class Llama(nn.Module):
    """`Llama(config)(idx, targets)` → (logits, loss).

    idx, targets: (B, T) token ids; a negative target is left out. With targets: logits (B, T, V) and the mean
    cross-entropy in nats; with loss_only (None, loss), which saves the memory of the logits. Without targets:
    logits of the last position only, (B, 1, V), and None. cache: keys and values of the tokens before idx
    (`nanolost/decode.py`). seed: of the first weights; by default drawn from torch's global generator."""

    recompute = False                          # in training: save memory, compute parts of the forward twice

    def __init__(self, config: LlamaConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        # a dictionary gives the weights the names of Hugging Face's inner module
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(blocks),
            "norm": nn.RMSNorm(config.n_embd, eps=config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_head()
        # shapes alone have nothing to draw
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    def tie_head(self):
        """Let embedding and head be one parameter where the config says so; assigning tensors makes two."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None):
        """N(0, init_std²) for the matrices of the blocks, N(0, 0.02²) for embedding and head, 1 for norms, 0
        for biases; a parameter that no rule names is an error."""
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        for name, p in self.named_parameters():
            first_values(name, p, self.config.init_std, seed)

    def forward(self, idx, targets=None, cache=None, loss_only: bool = False):
        x = self.hidden(idx, cache)                                                        # (B, T, C)
        if targets is None:
            # of a text that is read to be continued only the last position matters
            return self.lm_head(x[:, -1:]), None                                           # (B, 1, V)
        targets = targets.flatten()
        # some rows at a time: the logits are the largest tensor of a step
        if loss_only:
            x = x.flatten(0, 1)
            return None, head_loss(self.lm_head, x, targets)
        logits = self.lm_head(x)                                                           # (B, T, V)
        return logits, cross_entropy(logits.flatten(0, 1), targets)

    def hidden(self, idx, cache=None):
        """What the head gets, (B, T, C)."""
        T = idx.shape[1]
        if cache is None:
            positions = torch.arange(T, device=idx.device)
        else:
            positions = cache.begin(T)
        config = self.config
        # once for all layers
        rope = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.model["embed_tokens"](idx)
        # where nothing is learned, no backward pass follows that could compute it again
        twice = self.recompute and torch.is_grad_enabled() and cache is None
        for block in self.model["layers"]:
            x = block(x, rope, cache, twice)
        return self.model["norm"](x)

    def losses(self, idx, targets):
        """The mean loss that forward gives, and the loss of each position, (B, T) float32, 0 where there is
        no target: for an evaluation."""
        nats = torch.zeros(targets.numel(), device=targets.device)
        x = self.hidden(idx).flatten(0, 1)
        loss = head_loss(self.lm_head, x, targets.flatten(), nats)
        return loss, nats.view(targets.shape)
