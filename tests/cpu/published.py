"""What the config.json of published models says of their shape; names are those of configs/models/*.env.

Values are those of the folders on the Hugging Face hub that `HUB` names (the keys that decide a shape; not tokens, dropout and the like).
"""

from __future__ import annotations

from typing import Any

HUB = {
    "qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B", "qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B", "qwen2.5-3B": "Qwen/Qwen2.5-3B", "qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "qwen2.5-14B": "Qwen/Qwen2.5-14B", "qwen2.5-32B": "Qwen/Qwen2.5-32B",
    "qwen3-0.6B": "Qwen/Qwen3-0.6B", "qwen3-1.7B": "Qwen/Qwen3-1.7B", "qwen3-4B": "Qwen/Qwen3-4B", "qwen3-8B": "Qwen/Qwen3-8B",
    "qwen3-14B": "Qwen/Qwen3-14B", "qwen3-32B": "Qwen/Qwen3-32B", "qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B", "qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B",
    "llama3.1-8B": "meta-llama/Llama-3.1-8B", "llama3.2-1B": "meta-llama/Llama-3.2-1B", "llama3.2-3B": "meta-llama/Llama-3.2-3B",
    "glm4.5-355B-A32B": "zai-org/GLM-4.5", "glm4.5-106B-A12B": "zai-org/GLM-4.5-Air",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1", "moonlight-16B-A3B": "moonshotai/Moonlight-16B-A3B", "kimi-k2": "moonshotai/Kimi-K2-Instruct",
}

Values = dict[str, Any]


def _sizes(hidden: int, ffn: int, layers: int, heads: int, groups: int, tied: bool = False) -> Values:
    return dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
                tie_word_embeddings=tied, initializer_range=0.02)


def _qwen2(*sizes: Any, vocabulary: int = 151936, positions: int = 131072, eps: float = 1e-6) -> Values:
    return _sizes(*sizes) | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", max_position_embeddings=positions, rms_norm_eps=eps,
                                 rope_theta=1000000.0, sliding_window=positions, use_sliding_window=False, vocab_size=vocabulary)


def _qwen3(*sizes: Any) -> Values:
    return _sizes(*sizes) | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, head_dim=128,
                                 max_position_embeddings=40960, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
                                 use_sliding_window=False, vocab_size=151936)


def _qwen3_moe(*sizes: Any, expert: int) -> Values:
    return _qwen3(*sizes) | dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[],
                                 moe_intermediate_size=expert, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8)


def _llama3(*sizes: Any, factor: float) -> Values:
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3")
    return _sizes(*sizes) | dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, max_position_embeddings=131072,
                                 mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=scaling, rope_theta=500000.0, vocab_size=128256)


def _glm4_moe(*sizes: Any, experts: int, expert: int, dense: int, scale: float, norm: bool) -> Values:
    return _sizes(*sizes) | dict(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", attention_bias=True, head_dim=128,
                                 first_k_dense_replace=dense, max_position_embeddings=131072, moe_intermediate_size=expert, n_group=1,
                                 n_routed_experts=experts, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1,
                                 partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000, routed_scaling_factor=scale,
                                 topk_group=1, use_qk_norm=norm, vocab_size=151552)


def _deepseek(*sizes: Any, **own: Any) -> Values:
    return _sizes(*sizes) | dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", attention_bias=False, kv_lora_rank=512,
                                 moe_layer_freq=1, norm_topk_prob=True, qk_nope_head_dim=128, qk_rope_head_dim=64, scoring_func="sigmoid",
                                 topk_method="noaux_tc", v_head_dim=128) | own


def _yarn(factor: float, fast: float) -> Values:
    return dict(beta_fast=fast, beta_slow=1, factor=factor, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096, type="yarn")


PUBLISHED: dict[str, Values] = {
    "qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, True, positions=32768),
    "qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, True),
    "qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, True, positions=32768),
    "qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064),
    "qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8, vocabulary=152064, eps=1e-5),
    "qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, vocabulary=152064, eps=1e-5),
    "qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, True),
    "qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, True),
    "qwen3-8B": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14B": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32B": _qwen3(5120, 25600, 64, 64, 8),
    "qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 4, expert=768),
    "qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 4, expert=1536),
    "llama3.1-8B": _llama3(4096, 14336, 32, 32, 8, factor=8.0),
    "llama3.2-1B": _llama3(2048, 8192, 16, 32, 8, True, factor=32.0) | dict(head_dim=64),
    "llama3.2-3B": _llama3(3072, 8192, 28, 24, 8, True, factor=32.0) | dict(head_dim=128),
    "glm4.5-355B-A32B": _glm4_moe(5120, 12288, 92, 96, 8, experts=160, expert=1536, dense=3, scale=2.5, norm=True),
    "glm4.5-106B-A12B": _glm4_moe(4096, 10944, 46, 96, 8, experts=128, expert=1408, dense=1, scale=1.0, norm=False),
    "deepseek-r1": _deepseek(
        7168, 18432, 61, 128, 128, first_k_dense_replace=3, max_position_embeddings=163840, moe_intermediate_size=2048, n_group=8,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, num_nextn_predict_layers=1, q_lora_rank=1536, rms_norm_eps=1e-6,
        rope_scaling=_yarn(40, 32), rope_theta=10000, routed_scaling_factor=2.5, topk_group=4, vocab_size=129280,
        quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])),
    "moonlight-16B-A3B": _deepseek(
        2048, 11264, 27, 16, 16, first_k_dense_replace=1, max_position_embeddings=8192, moe_intermediate_size=1408, n_group=1,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, q_lora_rank=None, rms_norm_eps=1e-5, rope_theta=50000.0,
        routed_scaling_factor=2.446, topk_group=1, vocab_size=163840),
    "kimi-k2": _deepseek(
        7168, 18432, 61, 64, 64, model_type="kimi_k2", first_k_dense_replace=1, max_position_embeddings=131072, moe_intermediate_size=2048,
        n_group=1, n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8, q_lora_rank=1536, rms_norm_eps=1e-6,
        rope_scaling=_yarn(32.0, 1.0), rope_theta=50000.0, routed_scaling_factor=2.827, topk_group=1, vocab_size=163840),
}
