"""Models in and out of Hugging Face: what config.json may say, transformers as the oracle of its meaning."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from public_configs import CONFIGS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import SIZES, all_logits, kinds, largest_difference, mixed, small, spread, tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig as TheirConfig

from lost import LOSTLinear, apply_lost
from model import ConfigError, Llama, LlamaConfig, rope_table
from nanolost import huggingface, methods
from nanolost.checkpoint import load_folder, load_model, save_checkpoint, verify
from nanolost.counts import count_flops
from nanolost.decode import generate
from nanolost.errors import UserError
from nanolost.huggingface import HF_NAMES, TYPES, config_from_hf, config_json, config_to_hf
from nanolost.optim import parameter_groups
from nanolost.tokenizer import Tokenizer

BYTE = Tokenizer.named("byte")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
SCALINGS = {"plain": (), "linear": (4.0,), "llama3": (8.0, 1.0, 4.0, 8)}
types = pytest.mark.parametrize("model_type", TYPES)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])

def of_type(model_type, seed=0, **changed):
    """A small model of a type, with every switch of it on, biases far from zero."""
    switches = dict(TYPES[model_type].switches)
    for ours in TYPES[model_type].biases.values():
        switches |= dict.fromkeys(ours, True)
    if model_type != "llama":
        switches["head_dim"] = 12                                             # not 32 / 4
    return small(seed, n_kv_head=2, model_type=model_type, **{**switches, **changed})

def saved(model, out_dir, step=1, tokenizer=BYTE, **more):
    return save_checkpoint(str(out_dir), step, model, [], {"step": step}, tokenizer, 9, **more)

def theirs_of(folder, **how):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=True, **how)
    assert not any(report.values()), report
    return model.eval()

def difference(ours, theirs, length=20):
    idx = tokens(3, length)
    with torch.no_grad():
        return largest_difference(all_logits(ours, idx), theirs(idx).logits)

# --- in: what is computed ---

@types
@ties
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_model_of_their_own_making_has_the_same_logits_here(model_type, tied, scaling, tmp_path):
    wanted = of_type(model_type, tie_embeddings=tied, rope_scaling=scaling)
    fields = config_to_hf(wanted.config)
    theirs = spread(AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **fields), attn_implementation="eager"))
    # the switches are theirs, not only our writing of them
    assert {*theirs.state_dict()} == {*wanted.state_dict()}
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(str(tmp_path))
    assert ours.config == wanted.config
    assert difference(ours, theirs) <= 1e-4

@types
def test_text_of_every_type_equals_theirs_with_a_cache(model_type):
    model = of_type(model_type, max_seq_len=24)
    fields = transformers.AutoConfig.for_model(model_type, **config_to_hf(model.config))
    theirs = AutoModelForCausalLM.from_config(fields).eval()
    theirs.load_state_dict(model.state_dict())
    expected = theirs.generate(tokens(2, 5), max_new_tokens=19, **GREEDY)
    assert torch.equal(generate(model, tokens(2, 5), 19, temperature=0), expected)

@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_angles_far_from_the_start_are_theirs(scaling):
    sizes = dict(rope_scaling=scaling, rope_theta=10_000, head_dim=64, n_embd=64, n_head=1, n_kv_head=1)
    model = small(**sizes, max_seq_len=131_072)
    theirs = transformers.LlamaModel(TheirConfig(**config_to_hf(model.config))).rotary_emb
    positions = torch.tensor([0, 1, 7, 4095, 100_000])
    cos, sin = theirs(torch.zeros(1), positions[None])
    table = rope_table(positions, 64, 10_000, scaling)
    # float32 has seven digits, and the angle is up to 100 000
    assert (table[0] - cos[0, :, :32]).abs().max() < 0.02 and (table[1] - sin[0, :, :32]).abs().max() < 0.02
    assert (table[:, :3] - torch.stack([cos[0, :3, :32], sin[0, :3, :32]])).abs().max() < 1e-5

def test_biases_are_vectors_to_the_optimizer_and_heads_of_any_width_count():
    model = of_type("llama")
    groups = parameter_groups(model)
    assert {p.dim() for p in groups["blocks"]} == {2} and {p.dim() for p in groups["vectors"]} == {1}
    wide, narrow = of_type("qwen3"), of_type("qwen3", head_dim=8)
    # 4 dimensions more a head: of q, k, v, o
    matrices = 2 * 32 * 4 * (4 + 2 + 2 + 4)
    assert count_flops(wide) - count_flops(narrow) == 6 * matrices + 12 * 2 * 4 * 4 * 12

def test_first_weights_of_biases_are_zero():
    model = Llama(LlamaConfig(**SIZES, qkv_bias=True, mlp_bias=True, o_bias=True, qk_norm=True))
    for name, p in model.named_parameters():
        assert not name.endswith("bias") or not p.any()
        assert not name.endswith("norm.weight") or (p == 1).all()

# --- out: the model type and its class ---

@types
@ties
@pytest.mark.parametrize("lost", ["", "lost", "mixed"], ids=["dense", "lost", "mixed"])
def test_a_saved_folder_loads_in_transformers_as_what_it_came_in_as(model_type, tied, lost, tmp_path):
    model = of_type(model_type, tie_embeddings=tied, rope_scaling=SCALINGS["llama3"])
    name = TYPES[model_type].name
    if lost == "lost":
        # one head dense, one layer left out: names, not patterns, say which
        apply_lost(model, 6, {"default": 0.1, "up_proj": 0}, skip=("lm_head", "layers.1.mlp.gate_proj"))
    if lost == "mixed":
        mixed(model)
    if lost:
        name = f"LOST{name}"
    folder = saved(model, tmp_path)
    theirs = theirs_of(folder)
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    # nobody shall take a folder with layers of ours for a dense model
    assert read(folder)["model_type"] == ("lost_" if lost else "") + model_type
    # the logits are of the size of 10: 3e-6 of them
    largest = all_logits(model, tokens(3, 20)).abs().max().item()
    assert difference(model, theirs) <= 3e-6 * max(1, largest)
    ours, _ = load_folder(folder)
    assert ours.config == model.config and methods.settings_of(ours) == methods.settings_of(model)
    # zeros and pivots too
    for name, t in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], t) and torch.equal(theirs.state_dict()[name], t), name

@pytest.fixture(scope="module", params=["lost", "dense", "learned", "mixed"])
def pair(request, tmp_path_factory):
    """(our model, its folder): LOST, dense, LOST with a learned γ, or of all kinds of layers."""
    model = small(n_kv_head=2, max_seq_len=40)
    if request.param == "mixed":
        mixed(model)
    elif request.param != "dense":
        apply_lost(model, 6, 0.1, learn_gamma=request.param == "learned")
    return model, saved(model, tmp_path_factory.mktemp("pair"))

def test_generate_of_transformers_continues_as_ours(pair):
    model, folder = pair
    theirs = theirs_of(folder).generate(tokens(2, 5), max_new_tokens=30, **GREEDY)
    assert torch.equal(generate(model, tokens(2, 5), 30, temperature=0), theirs)

def test_the_inner_model_loads_alone(pair):
    model, folder = pair
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    idx = tokens(2, 9)
    with torch.no_grad():
        assert largest_difference(model.hidden(idx), inner(idx).last_hidden_state) < 1e-4

def test_a_head_of_ours_is_in_the_whole_model_and_not_in_the_inner_one(tmp_path):
    model = apply_lost(small(), 6, 0.1, skip=())
    folder = saved(model, tmp_path)
    assert difference(model, theirs_of(folder)) < 1e-4
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert not hasattr(inner, "lm_head") and isinstance(model.lm_head, LOSTLinear)
    with torch.no_grad():
        idx = tokens(2, 9)
        assert largest_difference(model.hidden(idx), inner(idx).last_hidden_state) < 1e-4

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_pretrained_goes_round(pair, dtype, tmp_path):
    model, folder = pair
    theirs = theirs_of(folder, dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "theirs")
    again = theirs_of(str(tmp_path / "theirs"), dtype=dtype)
    ours, _ = load_model(str(tmp_path / "theirs"))
    idx = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(idx).logits, theirs(idx).logits)
    for name, t in model.state_dict().items():
        rounded = t.to(dtype).float() if t.is_floating_point() else t
        assert torch.equal(ours.state_dict()[name], rounded)
    assert methods.settings_of(ours).keys() == methods.settings_of(model).keys()
    assert BYTE.matches(Tokenizer.load(str(tmp_path / "theirs")).identity())

def test_three_steps_of_their_trainer_lower_the_loss(pair, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it: pip install accelerate")
    _, folder = pair
    model = theirs_of(folder)
    layer = model.model.layers[0].mlp.up_proj
    before = [p.clone() for p in layer.parameters()]
    row = tokens(1, 32)[0]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, gradient_checkpointing=True, save_strategy="no", use_cpu=True,
        report_to=[], logging_steps=1, disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert not any(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))
    trainer.save_model(str(tmp_path / "tuned"))
    assert difference(load_model(str(tmp_path / "tuned"))[0], model.eval()) < 1e-4

def test_code_travels_with_layers_of_ours_alone_and_the_manifest_names_it(tmp_path):
    lost, dense = saved(apply_lost(small(), 6, 0.1), tmp_path, 1), saved(small(), tmp_path, 2)
    code = {"modeling_lost.py", "lost.py"}
    assert code <= {*os.listdir(lost)} and not code & {*os.listdir(dense)}
    assert "auto_map" in read(lost) and "auto_map" not in read(dense)
    assert verify(lost) is None
    with open(os.path.join(lost, "modeling_lost.py"), "a") as f:
        f.write("\n")
    assert verify(lost) == "modeling_lost.py has changed since it was written"

def read(folder):
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f)

class Doubled(LOSTLinear):
    """A kind of layer that an experiment has."""

def test_a_kind_of_layer_that_an_experiment_added_is_saved_without_code(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.KINDS, "doubled", methods.Kind(Doubled))
    model = small()
    model.set_submodule("model.layers.0.mlp.up_proj", Doubled(32, 44, 6, 0))
    with torch.no_grad():
        spread(model)
    folder = saved(model, tmp_path)
    assert "auto_map" not in read(folder) and not os.path.exists(os.path.join(folder, "modeling_lost.py"))
    with pytest.raises(ValueError, match="lost_llama"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(all_logits(load_folder(folder)[0], tokens(1, 5)), all_logits(model, tokens(1, 5)))

def test_kinds_that_travel_are_those_that_the_code_knows():
    names = {**{"__name__": "modeling"}}
    source = huggingface.travelling_code()["modeling_lost.py"].decode().replace("from .lost", "from lost")
    exec(source, names)
    assert {*names["LAYERS"]} == {*huggingface.TRAVELLING}
    for kind in TYPES.values():
        assert names[f"LOST{kind.name}Config"].model_type.startswith("lost_")

def test_code_that_travels_runs_without_this_program(tmp_path):
    model = apply_lost(small(), 6, 0.1)
    folder = saved(model, tmp_path)
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)("ab", return_tensors="pt")
print(ids["input_ids"].tolist(), model(**ids).logits.sum().item())
assert not {{"model", "lost", "nanolost"}} & {{*sys.modules}}
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=600)
    ids, total = done.stdout.strip().rsplit(" ", 1) if done.returncode == 0 else pytest.fail(done.stderr)
    assert ids == "[[256, 97, 98]]"
    expected = all_logits(model, torch.tensor([[256, 97, 98]])).sum().item()
    assert float(total) == pytest.approx(expected, rel=1e-4)

def test_nothing_here_runs_the_code_of_a_folder(tmp_path, monkeypatch):
    folder = saved(apply_lost(small(), 6, 0.1), tmp_path / "a")
    trace = tmp_path / "ran"
    for name in ("modeling_lost.py", "lost.py", "__init__.py", "sitecustomize.py", "tokenization.py"):
        with open(os.path.join(folder, name), "w") as f:
            f.write(f"open({str(trace)!r}, 'w')\n")
    os.remove(os.path.join(folder, "state.json"))
    os.remove(os.path.join(folder, "optimizer.safetensors"))
    monkeypatch.chdir(folder)
    ours, _ = load_model(folder)
    # and what is written again is ours, not the stranger's
    again = saved(ours, tmp_path / "b")
    with open(os.path.join(again, "lost.py")) as written, open(os.path.join(ROOT, "lost.py")) as own:
        assert written.read() == own.read()
    assert not trace.exists()

def test_files_that_the_source_had_travel_unless_they_are_ours_to_write(tmp_path):
    travelling = {"generation_config.json": b'{"eos_token_id": [1, 2]}', "config.json": b"{}",
                  "lost.py": b"x"}
    folder = saved(apply_lost(small(), 6, 0.1), tmp_path, travelling=travelling)
    with open(os.path.join(folder, "generation_config.json"), "rb") as f:
        assert f.read() == travelling["generation_config.json"]
    assert read(folder)["model_type"] == "lost_llama" and verify(folder) is None
    assert os.path.getsize(os.path.join(folder, "lost.py")) > 1000

def test_a_checkpoint_of_a_run_is_float32_and_a_switch_that_a_type_lacks_is_refused(tmp_path):
    folder = saved(small().bfloat16(), tmp_path)
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as f:
        assert {f.get_tensor(name).dtype for name in f.keys()} == {torch.float32}
    with pytest.raises(ConfigError, match="a llama of Hugging Face has no qk_norm = True: choose another"):
        config_to_hf(LlamaConfig(**SIZES, qk_norm=True))
    with pytest.raises(ConfigError, match="a qwen2 of Hugging Face has no qkv_bias = False"):
        config_to_hf(LlamaConfig(**SIZES, model_type="qwen2"))
    with pytest.raises(ConfigError, match="model_type = 'mine': choose one of llama, "):
        config_json(small(model_type="mine"), 0)

# --- config.json ---

@kinds
def test_configuration_round_trips_through_hugging_face(kind):
    config = LlamaConfig(**{**SIZES, **kind})
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(TheirConfig(**config_to_hf(config)).to_dict()) == config

def test_flat_rope_theta_of_older_files_is_read():
    old = {**config_to_hf(LlamaConfig(**SIZES)), "rope_theta": 77.0, "rope_scaling": None}
    del old["rope_parameters"]
    assert config_from_hf(old).rope_theta == 77.0

@pytest.mark.parametrize("changed, name", [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling = 'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_scaling = 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.5}},
     "rope_scaling.attention_factor = 1.5"),
    ({"attention_bias": "yes"}, "attention_bias = 'yes'"), ({"mlp_bias": 1}, "mlp_bias = 1"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"is_causal": False}, "is_causal = False"),
    ({"sliding_window": 4096}, "sliding_window = 4096"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_other.Model"}}, "auto_map.AutoModelForCausalLM = "),
    ({"auto_map": {"AutoModel": "somebody/model--modeling_other.Model"}}, "auto_map.AutoModel = "),
    ({"auto_map": []}, "auto_map = "),
])
def test_what_the_model_does_not_compute_is_refused(changed, name):
    theirs = config_to_hf(LlamaConfig(**SIZES))
    with pytest.raises(ConfigError, match=f"config.json: {name}.*is not supported"):
        config_from_hf({**theirs, **changed})

@pytest.mark.parametrize("rope, message", [
    ({"rope_type": "llama3", "factor": 8.0}, "lacks low_freq_factor, high_freq_factor, original_max_p"),
    ({"type": "linear"}, "rope_scaling lacks factor"),
    ({"type": "linear", "factor": 0}, "rope_scaling.factor = 0 must be a number"),
    ({"type": "linear", "factor": "4"}, "rope_scaling.factor = '4' must be a number"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
      "original_max_position_embeddings": 8192}, "low_freq_factor 4.0 must be below .*high_freq_factor 1.0"),
])
def test_a_scaling_without_its_numbers_is_refused_by_their_names(rope, message):
    with pytest.raises(ConfigError, match=f"^config.json: .*{message}"):
        config_from_hf({**config_to_hf(LlamaConfig(**SIZES)), "rope_scaling": rope})

@pytest.mark.parametrize("theirs", [
    transformers.GraniteConfig(logits_scaling=8.0), transformers.SmolLM3Config(), transformers.GemmaConfig(),
    transformers.Phi3Config(), transformers.OlmoConfig(), transformers.CohereConfig(),
    transformers.MixtralConfig(), transformers.Qwen2MoeConfig(), transformers.Qwen3MoeConfig(),
    transformers.MinistralConfig(), transformers.StableLmConfig(), transformers.Starcoder2Config(),
], ids=lambda theirs: theirs.model_type)
def test_other_model_type_is_refused_by_name(theirs):
    kind = theirs.model_type
    with pytest.raises(ConfigError, match=f"model_type = '{kind}' is not supported, only llama, mistral, "):
        config_from_hf(theirs.to_dict())

# --- the table of docs/huggingface.md ---

def shrunk(config):
    """The same model with few and narrow layers: heads keep their groups, D what it is beside the width."""
    heads = config["num_attention_heads"]
    group = heads // config.get("num_key_value_heads", heads)
    width = config["hidden_size"] // heads
    small_ones = {
        "vocab_size": 257,
        "hidden_size": 2 * group * 16,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 * group,
        "max_position_embeddings": min(config["max_position_embeddings"], 16_384),
    }
    if "num_key_value_heads" in config:
        small_ones["num_key_value_heads"] = 2
    if "head_dim" in config:
        small_ones["head_dim"] = 16 if config["head_dim"] == width else 24
    return {**config, **small_ones}

def verdict(config):
    """What the table says of a model."""
    try:
        config_from_hf(config)
    except ConfigError as e:
        return f"refused: `{re.match('config.json: ([a-z_.]+)', str(e))[1]}`"
    return "loads"

def row(name):
    config = CONFIGS[name]
    return f"| {name} | `{config['model_type']}` | {verdict(config)} |"

def test_the_page_says_of_each_public_model_what_is_true():
    with open(os.path.join(ROOT, "docs/huggingface.md"), encoding="utf-8") as f:
        rows = [line.strip() for line in f if re.match(r"\|.*\| (loads|refused: .*) \|$", line)]
    assert rows == [row(name) for name in CONFIGS]

@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if verdict(config) == "loads"])
def test_a_public_model_that_loads_has_the_logits_of_transformers(name, tmp_path):
    config = transformers.AutoConfig.for_model(**shrunk(CONFIGS[name]))
    theirs = spread(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    with torch.no_grad():
        for p in theirs.model.layers.parameters():
            # of wide layers the sums would be so large that softmax amplifies the last bit
            p.mul_((8 / config.hidden_size) ** 0.5 if p.dim() == 2 else 1)
    theirs.save_pretrained(tmp_path)
    # as the file stands in the folder that people have, without what transformers adds on saving
    (tmp_path / "config.json").write_text(json.dumps(shrunk(CONFIGS[name])))
    ours, _ = load_model(str(tmp_path))
    assert difference(ours, theirs, 300) <= 1e-4
    # and goes out as what it came in as
    again = config_json(ours, 0)
    assert again["model_type"] == CONFIGS[name]["model_type"] and config_from_hf(again) == ours.config

def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    (code,) = blocks("huggingface.md", "python")
    model = apply_lost(small(), 6, 0.1)
    saved(model, tmp_path / "out", step=1000)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    ids = space["tokenizer"]("a text", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert largest_difference(space["model"](ids).logits, all_logits(model, ids)) < 1e-4

# --- windows ---

WINDOWS = [
    ("mistral", dict(sliding_window=None), True), ("mistral", dict(sliding_window=12), True),
    ("mistral", dict(sliding_window=11), False), ("mistral", dict(sliding_window=4096), True),
    ("mistral", dict(sliding_window="12"), False),
    ("qwen2", dict(sliding_window=4, use_sliding_window=False), True),
    ("qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=2), True),
    ("qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=1), False),
    ("qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers="2"), False),
    ("qwen2", dict(sliding_window=12, use_sliding_window=True, max_window_layers=0), True),
    ("qwen3", dict(sliding_window=4, layer_types=["full_attention"] * 2), True),
    ("qwen3", dict(sliding_window=4, layer_types=["full_attention", "sliding_attention"]), False),
    ("qwen3", dict(sliding_window=4, layer_types="full_attention"), False),
    ("qwen2", dict(layer_types=["full_attention"]), False),
    ("qwen2", dict(layer_types=["full_attention", "linear_attention"]), False),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), False),
]

@pytest.mark.parametrize("model_type, fields, known", WINDOWS)
def test_a_window_shorter_than_the_limit_is_refused_and_one_switched_off_loads(model_type, fields, known):
    model = of_type(model_type)
    hf = {**config_to_hf(model.config), "model_type": model_type, **fields}
    if not known:
        with pytest.raises(ConfigError, match="json: (sliding_window|layer_types) = .* is not supported"):
            config_from_hf(hf)
        return
    assert config_from_hf(hf) == model.config
    theirs = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf)).eval()
    theirs.load_state_dict(model.state_dict())
    assert difference(model, theirs, model.config.max_seq_len) <= 1e-4

@types
def test_an_absent_field_means_what_it_means_in_transformers(model_type):
    few = {"vocab_size": 257, "hidden_size": 1024, "intermediate_size": 44, "num_hidden_layers": 2,
           "num_attention_heads": 32, "model_type": model_type}
    theirs = transformers.AutoConfig.for_model(**few)
    if model_type == "mistral":
        with pytest.raises(ConfigError, match="sliding_window = 4096 is not supported, only null, or at"):
            config_from_hf(few)
        few["sliding_window"] = None
    ours = config_from_hf(few)
    assert (ours.max_seq_len, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (ours.n_kv_head, ours.tie_embeddings) == (theirs.num_key_value_heads, theirs.tie_word_embeddings)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]

@pytest.mark.parametrize("fields, known", [
    ({"model_type": "llama"}, True), ({"model_type": "lost_llama"}, True), ({}, True),
    ({"model_type": None}, True), ({"architectures": None}, True),
    ({"architectures": ["LlamaForCausalLM"]}, True), ({"architectures": ["MistralForCausalLM"]}, False),
    ({"architectures": "LlamaForCausalLM"}, False), ({"model_type": "LLaMA"}, False),
    ({"model_type": ""}, False), ({"model_type": ["llama"]}, False), ({"model_type": {}}, False),
    ({"model_type": "granite", "architectures": ["LlamaForCausalLM"]}, False),
])
def test_model_type_is_llama_or_without_one_the_class_is(fields, known):
    config = LlamaConfig(**SIZES)
    if known:
        assert config_from_hf({**config_to_hf(config), **fields}) == config
    else:
        with pytest.raises(ConfigError, match="is not supported, only "):
            config_from_hf({**config_to_hf(config), **fields})

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40),
              st.sampled_from([10**400, 2**63, 0, "1e-5", "default", float("nan")])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3),
        st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta"]), inner)))
FIELDS = [*HF_NAMES.values(), "rope_parameters", "rope_scaling", "hidden_act", "attention_bias", "mlp_bias",
          "head_dim", "model_type", "architectures", "quantization_config"]

@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_odd_values_of_a_config_file_are_one_line_or_mean_something(changed):
    try:
        config = config_from_hf({**config_to_hf(LlamaConfig(**SIZES)), **changed})
    except ConfigError as e:
        assert str(e).startswith("config.json") and "\n" not in str(e) and len(str(e)) < 2000
    else:
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config

def deep(depth=100_000):
    value = []
    for _ in range(depth):
        value = [value]
    return value

@pytest.mark.parametrize("content", [[], None, "llama", 3, deep()], ids=["list", "null", "text", "3", "deep"])
def test_config_file_that_is_no_object_is_refused(content):
    with pytest.raises(ConfigError, match="config.json must be an object, not "):
        config_from_hf(content)

@pytest.mark.parametrize("key", ["num_attention_heads", "rope_scaling", "rms_norm_eps", "model_type",
                                 "hidden_act", "head_dim", "architectures", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [deep(), -10**5000, [10**5000]], ids=["deep", "long", "long inside"])
def test_value_that_cannot_be_written_is_refused_all_the_same(key, value):
    with pytest.raises(ConfigError, match=f"config.json: {key}"):
        config_from_hf({**config_to_hf(LlamaConfig(**SIZES)), key: value})

@pytest.mark.parametrize("changed, message", [
    ({"num_attention_heads": 0}, "num_attention_heads = 0 must be a whole number from 1 to "),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0 must be a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be a whole number from 1 to 10000"),
    ({"vocab_size": True}, "vocab_size = True must be a whole number"),
    ({"hidden_size": 32.0}, "hidden_size = 32.0 must be a whole number"),
    ({"hidden_size": 36, "head_dim": None},
     "hidden_size 36 must be an even multiple of num_attention_heads 4"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' must be a number"),
    ({"rms_norm_eps": None}, "rms_norm_eps = None must be a number"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta = nan must be a number"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1 must be a number"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention"),
    ({"rope_parameters": []}, "rope_parameters = \\[\\] is not supported"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' must be true or false"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
])
def test_value_of_a_config_file_is_refused_under_the_name_it_has_there(changed, message):
    with pytest.raises(ConfigError, match=f"^config.json: .*{message}"):
        config_from_hf({**config_to_hf(LlamaConfig(**SIZES)), **changed})

def test_whole_number_stands_for_a_real_one_and_absent_fields_for_defaults_of_transformers():
    theirs = config_to_hf(LlamaConfig(**SIZES))
    for name in ("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "hidden_act",
                 "num_key_value_heads", "tie_word_embeddings"):
        del theirs[name]
    config = config_from_hf(theirs)
    assert config == config_from_hf(TheirConfig(**theirs).to_dict()) and config.max_seq_len == 2048
    assert config_from_hf({**theirs, "rope_theta": 500_000}).rope_theta == 5e5

@pytest.mark.parametrize("key", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_size_is_refused(key):
    theirs = config_to_hf(LlamaConfig(**SIZES))
    del theirs[key]
    with pytest.raises(ConfigError, match=f"config.json lacks {key}: is it a LLaMA"):
        config_from_hf(theirs)


# --- lm-eval ---

def with_its_own_beginning(place):
    """A vocabulary of bytes whose texts begin with another token than they end with, as LLaMA's."""
    def text(name):
        return {"Sequence": {"id": name, "type_id": 0}}
    content = json.loads(BYTE.to_json())
    begin = {"id": 257, "content": "<|begin|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    content["added_tokens"].append(begin)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, text("A")],
        "pair": [text("A"), text("B")],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [257], "tokens": ["<|begin|>"]}},
    }
    place.mkdir()
    (place / "tokenizer.json").write_text(json.dumps(content))
    roles = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (place / "tokenizer_config.json").write_text(json.dumps(roles))
    return Tokenizer.load(str(place))

QUESTIONS = [("Question: which?\nAnswer:", " this one"), ("", "a text alone"), ("one", " two"), ("x", "yy")]

def log_likelihood(model, tokenizer, context, continuation):
    """(sum over the continuation, whether greedy text would be it), by our own model."""
    ids = torch.from_numpy(tokenizer.document(context + continuation).astype("int64"))
    count = len(tokenizer.encode(continuation))
    logits = all_logits(model, ids[None, :-1])[0, -count:]
    chosen = logits.log_softmax(-1).gather(1, ids[-count:, None])
    return chosen.sum().item(), torch.equal(logits.argmax(-1), ids[-count:])

@pytest.mark.parametrize("lost", [False, True], ids=["dense", "lost"])
@pytest.mark.parametrize("own", [False, True], ids=["one token ends and begins", "two tokens"])
def test_log_likelihoods_of_lm_eval_are_those_of_our_model(own, lost, tmp_path):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval: pip install .[eval]")
    from lm_eval.api.instance import Instance
    tokenizer = with_its_own_beginning(tmp_path / "vocabulary") if own else BYTE
    model = small(vocab_size=258, max_seq_len=64)
    if lost:
        apply_lost(model, 6, 0.1)
    folder = saved(model, tmp_path, tokenizer=tokenizer)
    assert (read(folder)["bos_token_id"], read(folder)["eos_token_id"]) == (257 if own else 256, 256)
    how = dict(trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
    judge = harness.HFLM(pretrained=folder, **how)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(QUESTIONS)]
    answers = judge.loglikelihood(requests, disable_tqdm=True)
    for pair, (found, greedy) in zip(QUESTIONS, answers, strict=True):
        total, same = log_likelihood(model, tokenizer, *pair)
        assert found == pytest.approx(total, abs=1e-4) and greedy == same

# --- a real model ---

def test_a_real_model_goes_out_with_the_same_logits_ids_and_text(real_model, tmp_path):
    ours, _ = load_model(real_model)
    tokenizer = Tokenizer.load(real_model)
    folder = saved(ours.eval(), tmp_path, tokenizer=tokenizer)
    theirs = theirs_of(folder)
    text = "In 2023 the capital of France was"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.row(text).tolist()
    with torch.no_grad():
        assert largest_difference(all_logits(ours, ids), theirs(ids).logits) < 1e-3
    expected = theirs.generate(ids, max_new_tokens=12, **GREEDY)
    assert torch.equal(generate(ours, ids, 12, temperature=0), expected)

def test_a_head_of_its_own_under_a_tied_config_is_refused_and_a_copy_loads(tmp_path):
    model = Llama(LlamaConfig(**{**SIZES, "tie_embeddings": True}))
    folder = save_checkpoint(str(tmp_path), 1, model, [], {"step": 1}, BYTE, 1)
    # a model alone, as others write it
    for name in ("state.json", "manifest.json", "optimizer.safetensors"):
        os.remove(os.path.join(folder, name))
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path)
    assert torch.equal(load_model(folder)[0].lm_head.weight, head)
    save_file({**tensors, "lm_head.weight": head + 1}, path)
    with pytest.raises(UserError, match="hold a head of their own.*set it to false"):
        load_model(folder)
