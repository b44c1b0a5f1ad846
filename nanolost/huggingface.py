"""Hugging Face's config.json: the one place that knows its names.

A folder of theirs comes in by `config_from_hf`, which computes exactly what transformers does or refuses by
name; a model goes out by `config_json` under the model type that it came in with. Layers that transformers
lacks travel as code beside the weights (`modeling_lost.py`), which nothing here ever runs."""
import os
from dataclasses import dataclass, field

import lost
from model import ConfigError, Llama, LlamaConfig, check_scaling, check_sizes, shown
from nanolost.files import read_bounded, read_present
from nanolost.methods import settings_of

HF_NAMES = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# without these a config.json says nothing
HF_NEEDED = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")

# --- model types ---

@dataclass(frozen=True)
class Type:
    """A model type of transformers. name: of its classes. defaults: what an absent field means there, where
    not as in LlamaConfig. only: fields that change what is computed, with the one value that is supported.
    switches: of LlamaConfig. biases: by field of config.json the switches that it sets."""

    name: str
    defaults: dict
    only: dict = field(default_factory=dict)
    switches: dict = field(default_factory=dict)
    biases: dict = field(default_factory=dict)

# a type that is not here may need other formulas under the same names of weights (Granite scales its logits,
# SmolLM3 leaves positions out of layers), so no guess is made
ATTENTION = ("qkv_bias", "o_bias")
LIKE_LLAMA = {"sliding_window": None, "use_sliding_window": False}
TYPES = {
    "llama": Type(
        "Llama",
        {"max_position_embeddings": 2048},
        only=LIKE_LLAMA,
        biases={"attention_bias": ATTENTION, "mlp_bias": ("mlp_bias",)},
    ),
    "mistral": Type(
        "Mistral",
        # 0.1 has a window without saying so in a file of few lines
        {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        only={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Type(
        "Qwen2",
        {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
        # its biases stand in no field; one that says otherwise belongs to another class
        only={"attention_bias": True, "mlp_bias": False},
        switches={"qkv_bias": True},
    ),
    "qwen3": Type(
        "Qwen3",
        {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        only={"mlp_bias": False},
        switches={"qk_norm": True},
        biases={"attention_bias": ATTENTION},
    ),
}
# of all types; is_causal is false in embedding models, whose mask hides nothing
ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0, "is_causal": True}
# what the model of a type is called once it has layers that transformers lacks
OURS = "lost_"

def refuse(name: str, value, supported):
    """Raises ConfigError for a field of config.json."""
    raise ConfigError(f"config.json: {name} = {shown(value)} is not supported, only {supported}")

def type_of(hf: dict) -> str:
    """The model type, without what marks our layers. Raises ConfigError for one that is not computed here."""
    name = hf.get("model_type")
    if name is None:
        # files from before the field name the class alone, or nothing
        classes = hf.get("architectures")
        if classes not in (None, [], ["LlamaForCausalLM"]):
            refuse("architectures", classes, "LlamaForCausalLM")
        name = "llama"
    known = name.removeprefix(OURS) if isinstance(name, str) else None
    if known not in TYPES:
        refuse("model_type", name, f"{', '.join(TYPES)}, each with {OURS} before it for layers of ours")
    return known

def check_fields(hf: dict, only: dict):
    """Raises ConfigError for fields that have another value than the one that is computed."""
    # absent and null mean the default, which is the one
    for name, value in only.items():
        found = hf.get(name)
        if found is not None and found != value:
            refuse(name, found, repr(value))

def check_code(hf: dict):
    """Raises ConfigError for a model whose folder brings classes of its own: under known names they compute
    what nobody here knows (embedding models without a causal mask, for example)."""
    brought = hf.get("auto_map")
    if brought is None:
        return
    if not isinstance(brought, dict):
        refuse("auto_map", brought, "an object")
    # a class of a config or a tokenizer changes no formula
    for kind, name in brought.items():
        # transformers writes "owner/model--file.Class" for code from a hub
        ours = isinstance(name, str) and name.split("--")[-1].startswith("modeling_lost.")
        if kind.startswith("AutoModel") and not ours:
            refuse(f"auto_map.{kind}", name, "the models' own classes: code of a folder is never run here")

# --- windows ---

def windowed(hf: dict, model_type: str) -> bool:
    """Whether any layer has a sliding window, by the rules of the types that know one."""
    # transformers 5 names the kind of each layer, and then nothing else counts
    kinds = hf.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != hf["num_hidden_layers"]:
            refuse("layer_types", kinds, "a list with one entry for each layer")
        for kind in kinds:
            # linear and chunked attention are other formulas
            if kind not in ("full_attention", "sliding_attention"):
                refuse("layer_types", kind, "full_attention, and sliding_attention with its window")
        slides = "sliding_attention" in kinds
        if slides and hf.get("sliding_window") is None:
            refuse("layer_types", "sliding_attention", "full_attention where sliding_window is null")
        return slides
    # Mistral's holds for all layers
    if model_type == "mistral":
        return True
    # Qwen's is off unless it is said to be on, and layers below this one are without
    first = hf.get("max_window_layers", 28)
    all_without = type(first) is int and first >= hf["num_hidden_layers"]
    return bool(hf.get("use_sliding_window")) and not all_without

def check_window(hf: dict, model_type: str, limit: int):
    """Raises ConfigError for a window of attention that is shorter than the texts the model is made for."""
    window = hf.get("sliding_window")
    if not windowed(hf, model_type) or window is None:
        return
    # up to the limit one that is as long hides nothing; beyond it nobody here goes
    if type(window) is not int or window < limit:
        refuse("sliding_window", window, f"null, or at least max_position_embeddings {shown(limit)}")

# --- rotary positions ---

# numbers of each kind of scaling, in the order of LlamaConfig.rope_scaling
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# a rotation of all dimensions is what it is without the field
NEUTRAL = {"rope_theta": None, "rope_type": None, "type": None, "partial_rotary_factor": 1.0}

def find_rope(hf: dict) -> tuple[str, dict]:
    """The object with the scaling, and its name. transformers 5 keeps base and scaling in one object, 4 has
    them apart; where a file has both, the older name counts."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            refuse(name, rope, "an object")
        return name, rope
    return "rope_scaling", {}

def kind_of_rope(rope: dict) -> str:
    # "type" is the older name
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        refuse("rope_scaling", kind, ", ".join(SCALINGS))
    return kind

def read_rope(hf: dict) -> dict:
    """Base and scaling of the rotary positions, by our names. Raises ConfigError for other scalings."""
    name, rope = find_rope(hf)
    numbers = SCALINGS[kind_of_rope(rope)]
    for field_, value in rope.items():
        # an unknown field may change the angles too, as partial_rotary_factor does
        known = field_ in numbers or field_ in NEUTRAL and NEUTRAL[field_] in (None, value)
        if not known and value is not None:
            refuse(f"{name}.{field_}", value, ", ".join(["rope_theta", "rope_type", *numbers]))
    # transformers guesses the missing ones, with a warning
    missing = [number for number in numbers if rope.get(number) is None]
    if missing:
        raise ConfigError(f"config.json: {name} lacks {', '.join(missing)}")
    found = {"rope_scaling": tuple(rope[number] for number in numbers)}
    check_scaling(found["rope_scaling"], [f"{name}.{number}" for number in numbers])
    theta = rope.get("rope_theta")
    theta = hf.get("rope_theta") if theta is None else theta
    if theta is not None:
        found["rope_theta"] = theta
    return found

def write_rope(config: LlamaConfig) -> dict:
    """Base and scaling under the names of transformers 5, and beside them those of 4."""
    count = len(config.rope_scaling)
    kind = next(kind for kind, names in SCALINGS.items() if len(names) == count)
    numbers = dict(zip(SCALINGS[kind], config.rope_scaling, strict=True))
    parameters = {"rope_theta": config.rope_theta, "rope_type": kind, **numbers}
    fields = {"rope_parameters": parameters}
    # 4 takes what it does not know for a scaling
    if numbers:
        fields["rope_scaling"] = {"rope_type": kind, **numbers}
    return fields

# --- in ---

def read_sizes(hf: dict) -> dict:
    """Our name of each size → its value, whatever that is."""
    missing = [name for name in HF_NEEDED if name not in hf]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}: is it a LLaMA?")
    sizes = {ours: hf[theirs] for ours, theirs in HF_NAMES.items() if theirs in hf}
    sizes |= read_rope(hf)
    # null: every head has its own K and V
    if sizes.get("n_kv_head") is None:
        sizes["n_kv_head"] = sizes["n_head"]
    # as absent: 10 000 in all types
    if sizes.get("rope_theta", 0) is None:
        del sizes["rope_theta"]
    return sizes

def read_switches(hf: dict, kind: Type) -> dict:
    """The switches of LlamaConfig."""
    switches = dict(kind.switches)
    for name, ours in kind.biases.items():
        value = hf.get(name)
        # null as well as absent
        value = False if value is None else value
        if not isinstance(value, bool):
            refuse(name, value, "true or false")
        switches |= dict.fromkeys(ours, value)
    return switches

def config_from_hf(hf: dict) -> LlamaConfig:
    """From the content of a config.json, of which nothing is trusted. Raises ConfigError for what this model
    does not compute and for values that cannot be."""
    if not isinstance(hf, dict):
        raise ConfigError(f"config.json must be an object, not {shown(hf)}")
    name = type_of(hf)
    kind = TYPES[name]
    check_fields(hf, {**ONLY, **kind.only})
    check_code(hf)
    # from here on an absent field is one with the type's default
    hf = {**kind.defaults, **hf}
    try:
        sizes = read_sizes(hf)
        # before the constructor does, under the names that the file has
        check_sizes(sizes, HF_NAMES)
    except ConfigError as e:
        line = str(e)
        raise ConfigError(line if line.startswith("config.json") else f"config.json: {line}") from None
    check_window(hf, name, sizes["max_seq_len"])
    return LlamaConfig(**sizes, **read_switches(hf, kind), model_type=name)

# --- out ---

def write_switches(config: LlamaConfig) -> dict:
    """Fields that say the switches. Raises ConfigError where the model type has no field for them."""
    kind = TYPES[config.model_type]
    fields = {}
    for name, ours in kind.biases.items():
        fields[name] = getattr(config, ours[0])
    # what the reader will make of them
    written = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm"), False)
    written |= read_switches(fields, kind)
    for name, value in written.items():
        if getattr(config, name) != value:
            raise ConfigError(f"a {config.model_type} of Hugging Face has no {name} = {not value}: choose "
                              f"another model_type of {', '.join(TYPES)}")
    return fields

def config_to_hf(config: LlamaConfig) -> dict:
    """The same model under the names of Hugging Face's config.json, without its model type."""
    if config.model_type not in TYPES:
        raise ConfigError(f"model_type = {shown(config.model_type)}: choose one of {', '.join(TYPES)}")
    sizes = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    fields = {**sizes, **write_rope(config), **write_switches(config), "hidden_act": "silu"}
    if "sliding_window" in TYPES[config.model_type].defaults:
        # absent would mean one
        fields["sliding_window"] = None
        fields["use_sliding_window"] = False
    return fields

# --- what travels ---

# what others read of a model and this program does not; beside it the tokenizer's files, which it does
TRAVELS = (
    "generation_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)
# bytes; the largest tokenizer.model known here has 4 MB
TRAVEL_LIMIT = 64 << 20

def travelling_files(folder: str) -> dict[str, bytes]:
    """Files of a folder by name that go on unchanged with its model."""
    return read_present(folder, TRAVELS, TRAVEL_LIMIT)

# kinds of layers that modeling_lost.py knows
TRAVELLING = ("lost", "sparse")
CODE_LIMIT = 1 << 20                           # bytes

def travels(layers: dict[str, dict]) -> bool:
    """Whether transformers can load a model with such layers. Those of an experiment stay at home."""
    return bool(layers) and all(layer["kind"] in TRAVELLING for layer in layers.values())

def travelling_code() -> dict[str, bytes]:
    """The files by name that a folder with layers of ours needs beside its weights."""
    # read anew, never from the folder that a model came in
    here = os.path.dirname(os.path.abspath(__file__))
    paths = os.path.join(here, "modeling_lost.py"), lost.__file__
    return {os.path.basename(path): read_bounded(path, CODE_LIMIT) for path in paths}

def config_json(model: Llama, eot: int, bos: int | None = None, dtype: str = "float32") -> dict:
    """Content of config.json; beside Hugging Face's fields the settings of layers that it lacks. eot, bos:
    ids that end and begin a text. Raises ConfigError for a model that no model type there describes."""
    name = model.config.model_type
    content = {"dtype": dtype, "model_type": name, **config_to_hf(model.config)}
    # end-of-text also begins a document in our vocabularies
    content["bos_token_id"] = eot if bos is None else bos
    content["eos_token_id"] = eot
    classes = TYPES[name].name
    layers = settings_of(model)
    if not layers:
        content["architectures"] = [f"{classes}ForCausalLM"]
        return content
    # a model type of our own: no other program shall take the folder for a dense model
    content["model_type"] = f"{OURS}{name}"
    content["lost"] = layers
    if travels(layers):
        content["architectures"] = [f"LOST{classes}ForCausalLM"]
        content["auto_map"] = {
            "AutoConfig": f"modeling_lost.LOST{classes}Config",
            "AutoModel": f"modeling_lost.LOST{classes}Model",
            "AutoModelForCausalLM": f"modeling_lost.LOST{classes}ForCausalLM",
        }
    return content
