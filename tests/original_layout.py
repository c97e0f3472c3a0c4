"""A checkpoint as the original implementation lays it out, written without any of our code.

Plain NumPy, rotation by rotation and nibble by nibble, from the format's description alone; and the dense weights
that the checkpoint stands for, worked out backwards in the same way.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

GROUP, ROTATIONS = 128, 8
#: Column of its eight that each nibble of a word holds.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_original(directory: Path, config: PretrainedConfig, save_tokenizer) -> PreTrainedModel:
    """Write the checkpoint; returns the plain model, float32, with the weights that it stands for.

    Experts have codes of their own; all that read one input share its transform.
    """
    random = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    tensors = {}
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.3)
            stored, dense = pack_experts(path, parameter.detach().numpy(), random)
        elif ".layers." in name and path.endswith("_proj"):
            fields, dense = pack_linear(parameter.detach().numpy() * 4, random)
            stored = {f"{path}.{key}": value for key, value in fields.items()}
        else:
            stored = {name: parameter.detach().numpy().astype(np.float16)}
            dense = stored[name].astype(np.float32)
        tensors |= stored
        parameter.data.copy_(parameter.new_tensor(dense))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__], "dtype": "float16"}
    entries["quantization_config"] = {
        "quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": ROTATIONS, "zero_point": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(entries))
    save_tokenizer(directory)
    return model


def pack_experts(
    path: str, weights: np.ndarray, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """weights [E, N, C] of "….experts.gate_up_proj" or "….experts.down_proj" → stored tensors, and what they decode to."""
    count, rows, channels = weights.shape
    stacked, dense = pack_linear(weights.reshape(-1, channels), random)  # one transform for all rows
    home, own = path.rpartition(".")[0], "gate_up" if "gate_up" in path else "down"
    parts = ("gate_proj", "up_proj") if own == "gate_up" else ("down_proj",)
    each = rows // len(parts)
    stored = {f"{home}.{own}_weight_{key}": stacked[key] for key in ("theta", "pairs", "channel_scales")}
    for number in range(count * len(parts)):
        expert, part = divmod(number, len(parts))
        for key, unit in (("qweight", 8), ("qzeros", 8), ("scales", 1)):
            cut = stacked[key][:, number * each // unit : (number + 1) * each // unit]
            stored[f"{home}.{expert}.{parts[part]}.{key}"] = np.ascontiguousarray(cut)
    return stored, dense.reshape(weights.shape)


def pack_linear(weight: np.ndarray, random: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """weight [N, C] → stored tensors, and the dense weight that they decode to."""
    rows, channels = weight.shape
    groups = channels // GROUP
    inverse = random.uniform(0.5, 2, channels).astype(np.float16)
    pairs = np.stack([np.concatenate([random.permutation(GROUP) for _ in range(groups)]) for _ in range(ROTATIONS)])
    theta = random.normal(size=(ROTATIONS, channels // 2)).astype(np.float16)
    rotated = weight / inverse.astype(np.float32)
    for k in range(ROTATIONS):
        rotated = turn(rotated, pairs[k], theta[k].astype(np.float32))
    by_group = rotated.reshape(rows, groups, GROUP)
    low, high = np.minimum(by_group.min(-1), 0), np.maximum(by_group.max(-1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    scale = scales.astype(np.float32)
    zeros = np.clip(-np.rint(low / scale), 0, 15).astype(np.int64)
    codes = np.clip(np.rint(by_group / scale[..., None]) + zeros[..., None], 0, 15).astype(np.int64)
    dense = ((codes - zeros[..., None]) * scale[..., None]).reshape(rows, channels).astype(np.float32)
    for k in reversed(range(ROTATIONS)):
        dense = turn(dense, pairs[k], -theta[k].astype(np.float32))
    stored = {
        "qweight": words(codes.reshape(rows, channels).T),
        "qzeros": words(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
        "theta": theta,
        "pairs": pairs.astype(np.int16),
        "channel_scales": inverse[None],
    }
    return stored, dense * inverse.astype(np.float32)


def turn(x: np.ndarray, pairs: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """One independent rotation of the last dimension: entries 2 t and 2 t + 1 of a group are its pair t."""
    y = x.copy()
    for t in range(len(theta)):
        start = 2 * t // GROUP * GROUP
        i, j = start + pairs[2 * t], start + pairs[2 * t + 1]
        y[:, i] = np.cos(theta[t]) * x[:, i] + np.sin(theta[t]) * x[:, j]
        y[:, j] = np.cos(theta[t]) * x[:, j] - np.sin(theta[t]) * x[:, i]
    return y


def words(codes: np.ndarray) -> np.ndarray:
    """[R, N] of 0 … 15 → int32 [R, N / 8]."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(ORDER):
        packed |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return packed.view(np.int32)
