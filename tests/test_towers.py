"""Models that see or hear: the text part quantized, towers and projectors plain, names kept; loaded, they answer text."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from families import DELTA, DENSE, HEADS, ROUTED
from test_families import CONFIG, TOKENS
from tiny_models import byte_tokenizer

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import ModelFiles

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
MARKS = {"image_token_id": 280, "video_token_id": 281, "vision_start_token_id": 282, "vision_end_token_id": 283}
PATCHES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MERGED = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
HEARD = {"num_mel_bins": 16, "max_source_positions": 32}


class Kind(NamedTuple):
    """text, tower: arguments of the two parts' configurations; more: the others; part: what the text's names begin with."""

    text: dict[str, Any]
    tower: dict[str, Any]
    more: dict[str, Any]
    part: str = ""


KINDS: dict[str, Kind] = {
    "LlavaForConditionalGeneration": Kind(
        HEADS | {"model_type": "llama"}, PATCHES | {"model_type": "clip_vision_model", "projection_dim": 64},
        {"image_token_index": 280}, "language_model.",
    ),
    "Qwen2VLForConditionalGeneration": Kind(
        DENSE | ROPE,
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}, MARKS, "model.",
    ),
    "Qwen2_5_VLForConditionalGeneration": Kind(DENSE | ROPE, MERGED | {"fullatt_block_indexes": [0]}, MARKS, "model."),
    "Qwen3VLForConditionalGeneration": Kind(
        HEADS | ROPE, MERGED | {"deepstack_visual_indexes": [0]}, MARKS, "model.language_model."
    ),
    "Qwen3VLMoeForConditionalGeneration": Kind(
        HEADS | ROUTED | ROPE, MERGED | {"deepstack_visual_indexes": [0]}, MARKS, "model.language_model."
    ),
    "Qwen3_5ForConditionalGeneration": Kind(HEADS | DELTA, MERGED, MARKS, "model.language_model."),
    "Qwen3_5MoeForConditionalGeneration": Kind(
        HEADS | ROUTED | DELTA | {"shared_expert_intermediate_size": 32}, MERGED, MARKS, "model.language_model."
    ),
    "Gemma3ForConditionalGeneration": Kind(
        HEADS, PATCHES, {"mm_tokens_per_image": 4, "image_token_index": 280}, "language_model."
    ),
    "Gemma4ForConditionalGeneration": Kind(
        HEADS | {
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 16,
            "vocab_size_per_layer_input": 288, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
        },
        PATCHES | {"num_key_value_heads": 4, "head_dim": 16}, {"audio_config": None, "image_token_id": 280},
        "model.language_model.",
    ),
    "Mistral3ForConditionalGeneration": Kind(
        HEADS | {"model_type": "mistral"}, PATCHES | {"model_type": "pixtral", "head_dim": 16}, {"image_token_index": 280},
        "language_model.",
    ),
    "Llama4ForConditionalGeneration": Kind(
        HEADS | {"intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 32},
        PATCHES | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        {"image_token_index": 280}, "language_model.",
    ),
    "InternVLForConditionalGeneration": Kind(
        HEADS | {"model_type": "qwen2"}, PATCHES | {"image_size": [28, 28], "patch_size": [14, 14]}, {"image_token_id": 280},
        "language_model.",
    ),
    "Glm4vForConditionalGeneration": Kind(
        HEADS | {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}, MERGED | {"image_size": 16},
        {"image_token_id": 280, "video_token_id": 281}, "model.language_model.",
    ),
    "Idefics3ForConditionalGeneration": Kind(
        HEADS | {"model_type": "llama"}, PATCHES, {"image_token_id": 280}, "model.text_model."
    ),
    "AyaVisionForConditionalGeneration": Kind(
        HEADS | {"model_type": "cohere2"}, PATCHES | {"model_type": "siglip_vision_model"}, {"image_token_index": 280},
        "language_model.",
    ),
    "Qwen2AudioForConditionalGeneration": Kind(
        DENSE | {"model_type": "qwen2"},
        HEARD | {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        {"audio_token_index": 280}, "language_model.",
    ),
    "VoxtralForConditionalGeneration": Kind(
        HEADS | {"model_type": "llama"},
        HEARD | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"audio_token_id": 280}, "language_model.",
    ),
}  # fmt: skip


def source_of(name: str, directory: Path) -> Path:
    kind, cls = KINDS[name], getattr(transformers, name)
    tower = "audio_config" if "Audio" in name or "Voxtral" in name else "vision_config"
    torch.manual_seed(0)
    model = cls(cls.config_class(text_config=kind.text, **{tower: kind.tower}, **kind.more)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.std() == 0:
                parameter.normal_(std=0.02)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_text_part_is_quantized_and_the_rest_stays(name, tmp_path):
    source, cls = source_of(name, tmp_path / "source"), getattr(transformers, name)
    pairquant.quantize(source, tmp_path / "packed", CONFIG, device="cpu")
    before, after = StoredTensors.of_directory(source), StoredTensors.of_directory(tmp_path / "packed")
    packed, linears = after.packed_names(), after.linears()
    assert linears
    assert all(path.startswith(KINDS[name].part) and "visual" not in path for path in linears)
    kept = {name for name in after.fields if name not in packed}
    assert kept <= set(before.fields), "a tensor under a name of its own"
    lost = {name for name in before.fields if name not in after.fields and name.removesuffix(".weight") not in linears}
    assert all(".experts." in name for name in lost), "fused experts became single ones; nothing else went"
    model = ModelFiles.find(str(tmp_path / "packed")).model(dtype=torch.float32)
    assert type(model) is cls
    expected = cls.from_pretrained(source, dtype=torch.float32).eval()(input_ids=TOKENS, use_cache=False).logits
    found = model(input_ids=TOKENS, use_cache=False).logits
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-3
    answer = model.generate(input_ids=TOKENS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == 12
