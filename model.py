"""A plain LLaMA (Touvron et al. 2023, arXiv 2302.13971) with the module names of Hugging Face's
LlamaForCausalLM, so that a state dict of one loads into the other. RMSNorm, rotary positions (rotate-half),
SwiGLU, no bias.

In shapes: B sequences, T tokens, S tokens attended to, C = n_embd, H heads of D = C / H, V words."""
import functools
import hashlib
import reprlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanolost.loss import cross_entropy, head_loss

# --- sizes ---

class ConfigError(ValueError):
    """Sizes that cannot be, or a config.json of a model that this file does not compute."""

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
    "rope_theta": (float, 1.0, 1e30),
    "norm_eps": (float, 0.0, 1.0),
    "tie_embeddings": (bool, False, True),
    "init_std": (float, 0.0, 1e30),
}
EXPECTED = {int: "a whole number from {} to {}", float: "a number from {} to {}", bool: "true or false"}

HF_NAMES = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# without these a config.json says nothing; the others have the same defaults in transformers as here
HF_NEEDED = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")

# what this file computes, by `model_type`: a type that is not here may need other formulas under the same
# names of weights (Granite scales its logits, SmolLM3 leaves positions out of layers), so no guess is made.
# Of each type: the fields that change what is computed, with the one value that is supported
LLAMA = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
MODEL_TYPES = {"llama": LLAMA, "lost_llama": LLAMA}

def shown(value) -> str:
    """A value from outside, for one line: short and without an exception, however large or deep it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        # Python refuses to write more, in a list as well
        return "a number of more than 4300 digits"

def refuse_multiple(sizes: dict, large: str, small: str, multiple: str, names: dict):
    """Raises ConfigError for a size that is not such a multiple of another."""
    whole = f"{names.get(large, large)} {sizes[large]}"
    part = f"{names.get(small, small)} {sizes[small]}"
    raise ConfigError(f"{whole} must be {multiple} of {part}")

def check_sizes(sizes: dict, names: dict):
    """Raises ConfigError for values that cannot be. names: what the reader calls them, where not as here."""
    for name, value in sizes.items():
        kind, least, most = LIMITS[name]
        # NaN fails the second comparison. The type itself, as True is an int as well; JSON may write 1.0 as 1
        types = (int, float) if kind is float else (kind,)
        if type(value) not in types or not least <= value <= most:
            expected = EXPECTED[kind].format(least, most)
            raise ConfigError(f"{names.get(name, name)} = {shown(value)} must be {expected}")
    # rotary positions turn the dimensions of a head in pairs
    if sizes["n_embd"] % (2 * sizes["n_head"]):
        refuse_multiple(sizes, "n_embd", "n_head", "an even multiple", names)
    # each head of K and V serves a group of queries' heads
    if sizes["n_head"] % sizes["n_kv_head"]:
        refuse_multiple(sizes, "n_head", "n_kv_head", "a multiple", names)

def refuse(name: str, value, supported):
    """Raises ConfigError for a field of config.json."""
    raise ConfigError(f"config.json: {name} = {shown(value)} is not supported, only {supported}")

def check_model_type(hf: dict):
    """Raises ConfigError for a model that is no LLaMA, or one with what this file leaves out."""
    model_type = hf.get("model_type")
    if model_type is None:
        # files from before the field name the class alone, or nothing
        classes = hf.get("architectures")
        if classes not in (None, [], ["LlamaForCausalLM"]):
            refuse("architectures", classes, "LlamaForCausalLM")
        model_type = "llama"
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        refuse("model_type", model_type, " and ".join(MODEL_TYPES))
    for name, only in MODEL_TYPES[model_type].items():
        value = hf.get(name)
        if value is not None and value != only:
            refuse(name, value, repr(only))

def check_rope(name: str, rope):
    """Raises ConfigError for a scaling of the rotary positions."""
    if not isinstance(rope, dict):
        refuse(name, rope, "an object")
    # "type" is the older name
    kind = rope.get("type", "default")
    kind = rope.get("rope_type", kind)
    if kind != "default":
        refuse("rope_scaling", kind, "'default'")
    known = ("rope_theta", "rope_type", "type")
    for field, value in rope.items():
        # an unknown field may change the angles too, as partial_rotary_factor does
        if field not in known and value is not None:
            refuse(f"{name}.{field}", value, "rope_theta")

def read_rope_theta(hf: dict):
    """The base of the rotary positions, None where config.json has none. Raises ConfigError for a scaling."""
    found = hf.get("rope_theta")
    # transformers 5 keeps base and scaling in one object, 4 has them apart
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if rope is not None:
            check_rope(name, rope)
            found = rope.get("rope_theta", found)
    return found

def read_sizes(hf: dict) -> dict:
    """Our name of each size that config.json has → its value, whatever that is."""
    missing = [name for name in HF_NEEDED if name not in hf]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}: is it a LLaMA?")
    # a default of transformers that is not ours
    sizes = {"max_seq_len": 2048}
    for ours, theirs in HF_NAMES.items():
        if theirs in hf:
            sizes[ours] = hf[theirs]
    theta = read_rope_theta(hf)
    if theta is not None:
        sizes["rope_theta"] = theta
    # absent or null: every head has its own K and V
    if sizes.get("n_kv_head") is None:
        sizes["n_kv_head"] = sizes["n_head"]
    return sizes

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

    def __post_init__(self):
        # one head of K and V for each of Q is the original LLaMA
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        check_sizes(vars(self), names={})

    def to_hf(self) -> dict:
        """The same sizes under the names of Hugging Face's config.json."""
        sizes = {}
        for ours, theirs in HF_NAMES.items():
            sizes[theirs] = getattr(self, ours)
        # transformers 5 looks for the base here, 4 beside the sizes
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        # biases are off by default
        return {**sizes, "rope_parameters": rope, "hidden_act": "silu"}

    @classmethod
    def from_hf(cls, hf: dict) -> "LlamaConfig":
        """From the content of a config.json, of which nothing is trusted. Raises ConfigError for what this
        model does not compute and for values that cannot be."""
        if not isinstance(hf, dict):
            raise ConfigError(f"config.json must be an object, not {shown(hf)}")
        check_model_type(hf)
        sizes = read_sizes(hf)
        # before the constructor does, under the names that the file has
        try:
            check_sizes(sizes, HF_NAMES)
        except ConfigError as e:
            raise ConfigError(f"config.json: {e}") from None
        # a model may have heads that do not add up to its width: not this one
        width = sizes["n_embd"] // sizes["n_head"]
        if hf.get("head_dim") not in (None, width):
            refuse("head_dim", hf["head_dim"], width)
        return cls(**sizes)

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
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # 63 bits, as torch takes a signed number
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

def draw_normal(p: torch.Tensor, std: float, generator: torch.Generator):
    """Fill p with independent draws from N(0, std²), made on the CPU whatever its device."""
    drawn = torch.empty(p.shape, dtype=p.dtype, device="cpu")
    p.copy_(drawn.normal_(0.0, std, generator=generator))

# --- the model, from the inside out ---

# an operation of its own, into which the compiler does not look: otherwise it computes power, cosine and
# sine again for each head of each layer, 0.6 ms of the 11 of a decode step (LOST 350m, bfloat16, two cores)
@torch.library.custom_op("nanolost::rope_table", mutates_args=())
def rope_table(positions: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """cos and sin of the rotary angles, (2, T, D/2) float32: dimensions d and d + D/2 turn alike."""
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    # the first pair turns by a radian a token, the last by almost 1 / theta
    frequency = theta ** (steps / -dim)
    angle = positions[:, None] * frequency
    table = angle.cos(), angle.sin()
    return torch.stack(table)

@rope_table.register_fake
def _(positions, dim, theta):
    return torch.empty(2, *positions.shape, dim // 2, device=positions.device)

def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Su et al. 2021 (arXiv 2104.09864), eq. 34, in the rotate-half layout. x: (B, T, H, D)."""
    cos, sin = rope[:, :, None]                                                            # (T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    # in float32, as the table is, whatever x is
    left = a * cos - b * sin
    right = b * cos + a * sin
    halves = left.to(x.dtype), right.to(x.dtype)
    return torch.cat(halves, dim=-1)

def linear(inputs: int, outputs: int) -> nn.Linear:
    """LLaMA's layers have no bias."""
    return nn.Linear(inputs, outputs, bias=False)

class Attention(nn.Module):
    """Causal attention; with a cache over the tokens that it holds as well."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        width = config.n_embd
        # grouped queries (Ainslie et al. 2023, arXiv 2305.13245): fewer heads of K and V
        kv_width = width // self.n_head * self.n_kv_head
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, kv_width)
        self.v_proj = linear(width, kv_width)
        self.o_proj = linear(width, width)

    def forward(self, x, rope, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x)                                                                 # (B, T, C)
        k = self.k_proj(x)
        v = self.v_proj(x)
        q = q.view(B, T, self.n_head, -1)                                                  # (B, T, H, D)
        k = k.view(B, T, self.n_kv_head, -1)                                               # (B, T, n_kv, D)
        v = v.view(B, T, self.n_kv_head, -1)
        q = rotate(q, rope)
        k = rotate(k, rope)
        # attention wants the heads before the tokens
        q = q.transpose(1, 2)                                                              # (B, H, T, D)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
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
        return self.o_proj(y.reshape(B, T, C))

class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = linear(config.n_embd, config.n_ffn)
        self.up_proj = linear(config.n_embd, config.n_ffn)
        self.down_proj = linear(config.n_ffn, config.n_embd)

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

    def forward(self, x, rope, cache=None):
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
        self.lm_head = linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        # shapes alone have nothing to draw
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None):
        """N(0, init_std²) for the matrices of the blocks, N(0, 0.02²) for embedding and head, 1 for norms; a
        parameter that no rule names is an error."""
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("_proj.weight"):
                draw_normal(p, self.config.init_std, generator_of(seed, name))
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                draw_normal(p, 0.02, generator_of(seed, name))
            else:
                raise ValueError(f"no rule says how to initialise {name}: add one to Llama.init_weights")

    def forward(self, idx, targets=None, cache=None, loss_only: bool = False):
        x = self.hidden(idx, cache)                                                        # (B, T, C)
        if targets is None:
            # of a text that is read to be continued only the last position matters
            return self.lm_head(x[:, -1:]), None                                           # (B, 1, V)
        targets = targets.flatten()
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
        dim = self.config.n_embd // self.config.n_head
        # once for all layers
        rope = rope_table(positions, dim, self.config.rope_theta)
        x = self.model["embed_tokens"](idx)
        # where nothing is learned, no backward pass follows that could compute it again
        twice = self.recompute and torch.is_grad_enabled() and cache is None
        for block in self.model["layers"]:
            if twice:
                x = self.recomputed(block, x, rope)
            else:
                x = block(x, rope, cache)
        return self.model["norm"](x)

    def recomputed(self, block, x, rope):
        """block(x, rope), most of which the backward pass computes again."""
        keep = functools.partial(keep_narrow, self.config.n_embd)
        return checkpoint(
            block, x, rope,
            use_reentrant=False,
            # nothing is drawn in a block
            preserve_rng_state=False,
            context_fn=keep,
        )
