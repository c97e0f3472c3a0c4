"""Tiny configurations of the families that people run, for the matrix of `test_families.py` and docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pairquant.models.blocks import head_block

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
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
INDEXER = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 2}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
PER_LAYER = {"vocab_size_per_layer_input": 288, "hidden_size_per_layer_input": 32}
FOUR = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


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
    "Falcon-Mamba": Family("FalconMambaConfig", {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 32} | TOKENS, "state space", 0.85, "dt_proj and A_log are 13 % of so small a layer"),
    "RWKV": Family("RwkvConfig", {"vocab_size": 288, "hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 3, "context_length": 128, "rescale_every": 1} | TOKENS, "recurrent"),
    "xLSTM": Family("xLSTMConfig", {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16} | TOKENS, "recurrent"),
    "Zamba": Family(
        "ZambaConfig",
        WIDE | {
            "hidden_size": 128, "num_hidden_layers": 4, "mamba_d_state": 2, "mamba_dt_rank": 2, "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        "hybrid",
    ),
    "Zamba2": Family(
        "Zamba2Config",
        WIDE | {
            "num_hidden_layers": 5, "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "adapter_rank": 32,
            "use_shared_attention_adapter": True, "use_mem_rope": True, "num_mem_blocks": 2, "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid", "mamba"],
        },
        "hybrid", 0.80, "adapters for later depths, which are this large in so small a model only",
    ),
    "OLMo hybrid": Family("OlmoHybridConfig", DENSE | DELTA | {"linear_num_key_heads": 4}, "hybrid"),
    "Kimi Linear": Family(
        "KimiLinearConfig",
        WIDE | MLA | SPARSE | {
            "q_lora_rank": None, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 32, "linear_num_heads": 2,
        },
        "hybrid, experts",
    ),
    "MiniMax-01": Family(
        "MiniMaxConfig",
        HEADS | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
        "hybrid, experts",
    ),
    "Qwen4 (experimental)": Family(
        "Qwen4ExpTextConfig",
        HEADS | ROUTED | DELTA | {
            "shared_expert_intermediate_size": 32, "hc_count": 2, "hc_lowrank": 32, "ngram_vocab_size_base": 100,
            "split_ngram_parts": 2, "ple_embed_dim": 32, "heads_per_ngram": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
            "indexer_head_dim": 32, "indexer_budget": 32, "indexer_compress_ratio": 2, "output_gate_type": "sigmoid",
        },
        "hybrid, experts",
    ),
    "Zaya": _experts("ZayaConfig", HEADS | ROUTED, num_experts=16, num_experts_per_tok=1, router_hidden_size=32),
    "AFMoE": _experts("AfmoeConfig", HEADS | ROUTED | TWO),
    "Aria (text)": _experts("AriaTextConfig", DENSE, moe_num_experts=4, moe_num_shared_experts=2),
    "A.X K1": _experts("AXK1Config", WIDE | MLA | EXPERTS, n_group=1, topk_group=1),
    "A.X K2": _experts("AXK2Config", WIDE | MLA | EXPERTS | INDEXER | SPARSE, gated_norm_rank=32),
    "Cohere 2 MoE": _experts("Cohere2MoeConfig", HEADS | TWO, num_experts=4, num_experts_per_tok=2),
    "DeepSeek V3.2": _experts("DeepseekV32Config", WIDE | MLA | EXPERTS | INDEXER | SPARSE, n_group=1, topk_group=1),
    "DeepSeek V4": _experts(
        "DeepseekV4Config", HEADS | EXPERTS | INDEXER, n_routed_experts=16, num_key_value_heads=1, q_lora_rank=32, o_groups=2,
        o_lora_rank=32, sliding_window=16, hc_mult=2,
    ),
    "EXAONE MoE": _experts("ExaoneMoeConfig", HEADS | ROUTED | SPARSE | TWO),
    "GLM-4.7-Flash": _experts("Glm4MoeLiteConfig", WIDE | MLA | EXPERTS | SPARSE),
    "GLM-5": _experts("GlmMoeDsaConfig", WIDE | MLA | EXPERTS | INDEXER | SPARSE, indexer_types=["full", "shared"]),
    "Granite MoE, sliding window": _experts("GraniteMoeSWAConfig", DENSE | TWO, num_local_experts=4),
    "Hunyuan 3": _experts("HYV3Config", HEADS | ROUTED | SPARSE),
    "Hunyuan 4": _experts(
        "HYV4Config", WIDE | MLA | EXPERTS | INDEXER | SPARSE, hc_mult=2, indexer_types=["full", "shared"]
    ),
    "Inkling (text)": _experts(
        "InklingTextConfig", HEADS | EXPERTS | SPARSE, n_routed_experts=32, n_shared_experts=1, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=16, d_rel=16, rel_extent=32, conv_kernel_size=2,
    ),
    "Laguna": _experts("LagunaConfig", HEADS | ROUTED | TWO | SPARSE, shared_expert_intermediate_size=32),
    "Llama 4 (text)": _experts(
        "Llama4TextConfig", HEADS, intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=32
    ),
    "LongCat-Flash": Family(
        "LongcatFlashConfig",
        {k: v for k, v in WIDE.items() if k not in ("intermediate_size", "num_hidden_layers")} | MLA | {
            "num_layers": 2, "ffn_hidden_size": 64, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2,
            "expert_ffn_hidden_size": 32, "head_dim": 16,
        },
        "experts", 0.90, "Transformers holds weights, never used, for the experts that return their input",
    ),
    "Mellum": _experts("MellumConfig", HEADS | ROUTED | TWO),
    "MiMo-V2-Flash": _experts("MiMoV2FlashConfig", HEADS | EXPERTS | TWO | SPARSE, v_head_dim=16),
    "MiniMax-M3 (text)": _experts(
        "MiniMaxM3VLTextConfig", HEADS | SPARSE, num_local_experts=4, num_experts_per_tok=2, dense_intermediate_size=64,
        shared_intermediate_size=32, rotary_dim=8, index_n_heads=2, index_head_dim=32, index_block_size=16,
    ),
    "Solar Open": _experts("SolarOpenConfig", HEADS | EXPERTS),
    "Gemma 4 (text), experts": _experts(
        "Gemma4TextConfig", HEADS | TWO, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32,
    ),
    "Gemma 4 (text)": _dense("Gemma4TextConfig", HEADS | FOUR | PER_LAYER, num_kv_shared_layers=2),
    "Gemma 3n (text)": _dense(
        "Gemma3nTextConfig", HEADS | FOUR | PER_LAYER, num_kv_shared_layers=2, laurel_rank=32, altup_num_inputs=2
    ),
    "Doge": _dense("DogeConfig"),
    "Youtu": _dense("YoutuConfig", WIDE | MLA),
    "MiniCPM3": _dense("MiniCPM3Config", WIDE | MLA),
}  # fmt: skip

#: What is refused before any work, and by which words: experts in forms of their own, and layers that are parts of larger
#: tensors in the files.
REFUSED: dict[str, tuple[Family, str]] = {
    "DBRX": (
        Family(
            "DbrxConfig",
            {
                "vocab_size": 288, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
            } | TOKENS,
            "experts",
        ),
        r"80% of the blocks' weights are in 6 matrices that cannot be quantized yet.*--ignore 're:.*w1\$'",
    ),
    "JetMoE": (
        _experts(
            "JetMoeConfig", {k: v for k, v in DENSE.items() if k != "num_attention_heads"}, kv_channels=16, num_local_experts=4
        ),
        r"93% of the blocks' weights are in 8 matrices that cannot be quantized yet.*input_linear",
    ),
    "Doge with experts": (
        _experts("DogeConfig", DENSE, is_moe=True, num_experts=64, num_experts_per_tok=2),
        r"of the blocks' weights are in 4 matrices that cannot be quantized yet.*down_embed",
    ),
    "HRM-Text": (_dense("HrmTextConfig", HEADS), r"HrmTextForCausalLM, which Transformers cuts into other layers than"),
}  # fmt: skip


def random_model(name: str) -> Any:
    """Return a model of the family, float32, with weights of norms and biases that are neither 1 nor 0, and a head of its own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name].build()).eval().float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 3 and parameter.std() == 0:
                parameter.normal_(std=0.02)
            if path.endswith(("norm.weight", "bias", "norm1.weight")) and parameter.dim() < 3:
                parameter.add_(0.3 * torch.randn_like(parameter))
    head_block(model)
    return model
