"""Tiny configurations of the families that people run, for the matrix of `test_families.py` and docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

#: hidden and intermediate sizes fit groups of 32; everything else is as small as it may be.
DENSE = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = DENSE | {"head_dim": 16}
WIDE = DENSE | {"num_key_value_heads": 4}
TWO = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = WIDE | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family. config: of Transformers, by name, and its arguments; kind: dense, experts, hybrid or state space.

    share: the least part of the blocks' matrices that must come out packed; plain: why it is less than 0.95.
    """

    config: str
    arguments: dict[str, Any]
    kind: str = "dense"
    share: float = 0.95
    plain: str = ""

    def build(self) -> Any:
        """Return the configuration."""
        return getattr(transformers, self.config)(**self.arguments)


def _dense(config: str, arguments: dict[str, Any] | None = None, **more: Any) -> Family:
    return Family(config, (DENSE if arguments is None else arguments) | more)


def _experts(config: str, arguments: dict[str, Any], **more: Any) -> Family:
    return Family(config, arguments | more, "experts")


FAMILIES: dict[str, Family] = {
    "LLaMA 2, 3": _dense("LlamaConfig", HEADS),
    "Mistral": _dense("MistralConfig", HEADS),
    "Ministral 3": _dense("Ministral3Config", HEADS),
    "Qwen2": _dense("Qwen2Config"),
    "Qwen3": _dense("Qwen3Config", HEADS),
    "Phi": _dense("PhiConfig"),
    "Phi-3": _dense("Phi3Config"),
    "Gemma 2": _dense("Gemma2Config", HEADS),
    "Gemma 3 (text)": _dense("Gemma3TextConfig", HEADS),
    "GLM": _dense("GlmConfig", HEADS),
    "GLM-4": _dense("Glm4Config", HEADS),
    "OLMo 2": _dense("Olmo2Config"),
    "OLMo 3": _dense("Olmo3Config"),
    "SmolLM3": _dense("SmolLM3Config"),
    "Granite": _dense("GraniteConfig"),
    "EXAONE 4": _dense("Exaone4Config", HEADS | TWO),
    "Seed-OSS": _dense("SeedOssConfig", HEADS),
    "ERNIE 4.5": _dense("Ernie4_5Config", HEADS),
    "Hunyuan dense": _dense("HunYuanDenseV1Config", HEADS),
    "StableLM": _dense("StableLmConfig"),
    "Starcoder2": _dense("Starcoder2Config"),
    "GPT-NeoX": _dense("GPTNeoXConfig", WIDE),
    "Cohere 2": _dense("Cohere2Config", HEADS),
    "Nemotron": _dense("NemotronConfig", HEADS),
    "Apertus": _dense("ApertusConfig", HEADS),
    "Arcee": _dense("ArceeConfig", HEADS),
    "Falcon": _dense("FalconConfig", {k: v for k, v in DENSE.items() if k != "intermediate_size"} | {"ffn_hidden_size": 64}),
    "Qwen2-MoE": _experts("Qwen2MoeConfig", DENSE | ROUTED, shared_expert_intermediate_size=64),
    "Qwen3-MoE": _experts("Qwen3MoeConfig", HEADS | ROUTED),
    "Mixtral": _experts("MixtralConfig", HEADS, num_local_experts=4),
    "OLMoE": _experts("OlmoeConfig", DENSE, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": _experts("GptOssConfig", HEADS | TWO, num_local_experts=4),
    "Phi-3.5-MoE": _experts("PhimoeConfig", DENSE, num_local_experts=4),
    "Granite MoE": _experts("GraniteMoeConfig", DENSE, num_local_experts=4),
    "Granite MoE shared": _experts("GraniteMoeSharedConfig", DENSE, num_local_experts=4, shared_intermediate_size=64),
    "DeepSeek V2": _experts("DeepseekV2Config", DEEPSEEK),
    "DeepSeek V3, Kimi K2": _experts("DeepseekV3Config", DEEPSEEK),
    "GLM-4.5, 4.6": _experts(
        "Glm4MoeConfig", HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    ),
    "ERNIE 4.5 MoE": _experts(
        "Ernie4_5_MoeConfig", DENSE, moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1
    ),
    "dots.llm1": _experts(
        "Dots1Config", HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1,
    ),
    "MiniMax-M2": _experts("MiniMaxM2Config", HEADS, num_local_experts=4, num_experts_per_tok=2),
    "FlexOlmo": _experts("FlexOlmoConfig", DENSE, num_experts=4, num_experts_per_tok=2),
    "Hunyuan MoE": _experts("HunYuanMoEV1Config", HEADS, num_experts=4, moe_topk=2),
    "Qwen3-Next": Family(
        "Qwen3NextConfig", HEADS | ROUTED | DELTA | {"shared_expert_intermediate_size": 32}, "hybrid, experts"
    ),
    "Qwen3.5 (text)": Family("Qwen3_5TextConfig", HEADS | DELTA, "hybrid"),
    "Qwen3.5-MoE (text)": Family(
        "Qwen3_5MoeTextConfig", HEADS | ROUTED | DELTA | {"shared_expert_intermediate_size": 32}, "hybrid, experts"
    ),
    "LFM2": Family("Lfm2Config", DENSE | {"layer_types": ["conv", "full_attention"]}, "hybrid"),
    "LFM2-MoE": Family(
        "Lfm2MoeConfig", DENSE | ROUTED | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "hybrid, experts",
    ),
    "Nemotron-H": Family(
        "NemotronHConfig",
        HEADS | {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["mamba", "moe", "attention"],
            "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "n_group": 1, "topk_group": 1,
        },
        "hybrid, experts",
    ),
    "Jamba": Family(
        "JambaConfig",
        DENSE | {
            "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 32,
            "use_mamba_kernels": False,
        },
        "hybrid, experts",
    ),
    "Bamba": Family(
        "BambaConfig",
        DENSE | {
            "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
        },
        "hybrid",
    ),
    "Falcon-H1": Family(
        "FalconH1Config",
        HEADS | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16},
        "hybrid",
    ),
    "Granite 4": Family(
        "GraniteMoeHybridConfig",
        DENSE | {
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
        "hybrid, experts",
    ),
    "Mamba": Family("MambaConfig", {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "state space", 0.85, "dt_proj and A_log are 13 % of so small a layer"),
    "Mamba-2": Family("Mamba2Config", {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "state space"),
    "RecurrentGemma": Family("RecurrentGemmaConfig", HEADS | {"intermediate_size": 192, "lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]}, "hybrid"),
}  # fmt: skip
