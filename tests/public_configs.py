"""config.json as it stands in folders that people have: sizes and switches, without what no model reads."""

def llama(hidden, ffn, layers, heads, kv_heads=None, limit=4096, vocab=32_000, **more):
    sizes = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": limit,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if kv_heads:
        sizes["num_key_value_heads"] = kv_heads
    return {**sizes, **more}

def llama3_rope(factor):
    return {"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}

def qwen(model_type, *sizes, **more):
    window = {"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 28}
    usual = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "model_type": model_type}
    return llama(*sizes, **{**usual, **window, **more})

# by what people call them
CONFIGS = {
    "LLaMA 7B": llama(4096, 11_008, 32, 32, limit=2048, rms_norm_eps=1e-6),
    "LLaMA 2 70B": llama(8192, 28_672, 80, 64, 8, pretraining_tp=1, rope_scaling=None),
    "LLaMA 3 8B": llama(4096, 14_336, 32, 32, 8, 8192, 128_256, rope_theta=5e5, attention_bias=False),
    "LLaMA 3.1 8B": llama(4096, 14_336, 32, 32, 8, 131_072, 128_256, rope_theta=5e5, mlp_bias=False,
                          rope_scaling=llama3_rope(8.0)),
    "LLaMA 3.2 1B": llama(2048, 8192, 16, 32, 8, 131_072, 128_256, rope_theta=5e5, head_dim=64,
                          rope_scaling=llama3_rope(32.0), tie_word_embeddings=True),
    "LLaMA 3.3 70B": llama(8192, 28_672, 80, 64, 8, 131_072, 128_256, rope_theta=5e5, head_dim=128,
                           rope_scaling=llama3_rope(8.0)),
    "TinyLlama 1.1B": llama(2048, 5632, 22, 32, 4, 2048),
    "SmolLM2 135M": llama(576, 1536, 30, 9, 3, 8192, 49_152, rope_theta=100_000, rope_interleaved=False,
                          is_llama_config=True, tie_word_embeddings=True),
    "Yi 6B": llama(4096, 11_008, 32, 32, 4, 4096, 64_000, rope_theta=5e6),
    "DeepSeek-llm 7B": llama(4096, 11_008, 30, 32, 32, 4096, 102_400, rms_norm_eps=1e-6),
    "DeepSeek-coder 6.7B": llama(4096, 11_008, 32, 32, 32, 16_384, 32_256, rms_norm_eps=1e-6, rope_theta=1e5,
                                 rope_scaling={"factor": 4.0, "type": "linear"}),
    "Mistral 7B 0.1": llama(4096, 14_336, 32, 32, 8, 32_768, model_type="mistral", sliding_window=4096),
    "Mistral 7B 0.3": llama(4096, 14_336, 32, 32, 8, 32_768, 32_768, model_type="mistral",
                            sliding_window=None, rope_theta=1e6),
    "Mistral-Nemo 12B": llama(5120, 14_336, 40, 32, 8, 131_072, 131_072, model_type="mistral", head_dim=128,
                              sliding_window=None, rope_theta=1e6),
    "Qwen2 7B": qwen("qwen2", 3584, 18_944, 28, 28, 4, 131_072, 152_064),
    "Qwen2.5 0.5B": qwen("qwen2", 896, 4864, 24, 14, 2, 32_768, 151_936, tie_word_embeddings=True),
    "Qwen3 0.6B": qwen("qwen3", 1024, 3072, 28, 16, 8, 40_960, 151_936, head_dim=128, attention_bias=False,
                       rope_scaling=None, tie_word_embeddings=True),
    "Qwen3 8B": qwen("qwen3", 4096, 12_288, 36, 32, 8, 40_960, 151_936, head_dim=128, attention_bias=False),
    "Qwen3 30B-A3B": qwen("qwen3_moe", 2048, 6144, 48, 32, 4, 40_960, 151_936, head_dim=128, num_experts=128),
    "Mixtral 8x7B": llama(4096, 14_336, 32, 32, 8, 32_768, model_type="mixtral", num_local_experts=8),
    "Gemma 2B": llama(2048, 16_384, 18, 8, 1, 8192, 256_000, model_type="gemma", head_dim=256,
                      hidden_act="gelu", rms_norm_eps=1e-6),
    "Gemma 2 2B": llama(2304, 9216, 26, 8, 4, 8192, 256_000, model_type="gemma2", head_dim=256,
                        hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=50.0),
    "Phi-3 mini": llama(3072, 8192, 32, 32, 32, 4096, 32_064, model_type="phi3", sliding_window=2047),
    "OLMo-2 7B": llama(4096, 11_008, 32, 32, limit=4096, vocab=100_352, model_type="olmo2", rope_theta=5e5),
    "Granite 3 2B": llama(2048, 8192, 40, 32, 8, 4096, 49_155, model_type="granite", logits_scaling=8.0,
                          embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625),
    "SmolLM3 3B": llama(2048, 11_008, 36, 16, 4, 65_536, 128_256, model_type="smollm3",
                        no_rope_layer_interval=4),
    "Yarn-Llama-2 7B": llama(4096, 11_008, 32, 32, 32, 131_072, rope_scaling={
        "factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}),
    "Llama-3.1 in 4 bits": llama(4096, 14_336, 32, 32, 8, 131_072, 128_256, rope_theta=5e5,
                                 rope_scaling=llama3_rope(8.0),
                                 quantization_config={"quant_method": "gptq", "bits": 4}),
}
