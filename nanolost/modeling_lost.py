"""LOST layers (arXiv 2508.02668) in the models of transformers. This file and lost.py stand beside the
weights of a checkpoint and need nothing else of the program that trained it:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

config.json names each such layer under "lost". Load by `from_pretrained`: `from_config` makes layers without
channels, since LOST has no random start."""
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from .lost import LOSTLinear, SparseLowRankLinear

# by the name of its kind in config.json
LAYERS = {"lost": LOSTLinear, "sparse": SparseLowRankLinear}

class WithLayers:
    """Before a class of transformers: the same model with the layers that its configuration names."""

    def __init__(self, config):
        # dense layers first: from_pretrained makes them as shapes alone
        super().__init__(config)
        # an inner model has the names of the whole one without their first part
        inner = not hasattr(self, "lm_head")
        for name, settings in config.lost.items():
            if inner:
                first, _, name = name.partition(".")
                # the head is not in there
                if first != self.base_model_prefix:
                    continue
            given = dict(settings)
            layer = LAYERS[given.pop("kind", "lost")]
            self.set_submodule(name, layer(**given))
        # again: what it found the first time is gone
        self.post_init()

    def tie_weights(self, *args, **kwargs):
        """The last that from_pretrained calls, in versions 4 and 5: here also what follows from the file."""
        super().tie_weights(*args, **kwargs)
        for module in self.modules():
            # which channels are no pivots stands in no file, and from_pretrained makes room for it alone
            if isinstance(module, LOSTLinear):
                module.derive()

    def _init_weights(self, module):
        # filled from the file, or not at all
        if not isinstance(module, tuple(LAYERS.values())):
            super()._init_weights(module)

# one class a model type: AutoModel finds them by their names

# LLaMA

class LOSTLlamaConfig(LlamaConfig):
    model_type = "lost_llama"

class LOSTLlamaModel(WithLayers, LlamaModel):
    config_class = LOSTLlamaConfig

class LOSTLlamaForCausalLM(WithLayers, LlamaForCausalLM):
    config_class = LOSTLlamaConfig

# Mistral, without a window

class LOSTMistralConfig(MistralConfig):
    model_type = "lost_mistral"

class LOSTMistralModel(WithLayers, MistralModel):
    config_class = LOSTMistralConfig

class LOSTMistralForCausalLM(WithLayers, MistralForCausalLM):
    config_class = LOSTMistralConfig

# Qwen2 and 2.5: biases of q, k and v

class LOSTQwen2Config(Qwen2Config):
    model_type = "lost_qwen2"

class LOSTQwen2Model(WithLayers, Qwen2Model):
    config_class = LOSTQwen2Config

class LOSTQwen2ForCausalLM(WithLayers, Qwen2ForCausalLM):
    config_class = LOSTQwen2Config

# Qwen3: a norm of each head of q and k

class LOSTQwen3Config(Qwen3Config):
    model_type = "lost_qwen3"

class LOSTQwen3Model(WithLayers, Qwen3Model):
    config_class = LOSTQwen3Config

class LOSTQwen3ForCausalLM(WithLayers, Qwen3ForCausalLM):
    config_class = LOSTQwen3Config
