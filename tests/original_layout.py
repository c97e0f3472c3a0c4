"""A checkpoint as the original implementation lays it out, written without any of our code.

Plain NumPy, rotation by rotation and nibble by nibble, from the format's description alone; and the dense weights
that the checkpoint stands for, worked out backwards in the same way.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP, ROTATIONS = 128, 8
#: Column of its eight that each nibble of a word holds.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_original(directory: Path, config: LlamaConfig, save_tokenizer) -> LlamaForCausalLM:
    """Write the checkpoint; returns the plain model, float32, with the weights that it stands for."""
    random = np.random.default_rng(0)
    model = LlamaForCausalLM(config).eval()
    tensors = {}
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if ".layers." in name and path.endswith("_proj"):
            stored, dense = pack_linear(parameter.detach().numpy() * 4, random)
            tensors |= {f"{path}.{key}": value for key, value in stored.items()}
            parameter.data.copy_(parameter.new_tensor(dense))
        else:
            tensors[name] = parameter.detach().numpy().astype(np.float16)
            parameter.data.copy_(parameter.new_tensor(tensors[name].astype(np.float32)))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    entries["quantization_config"] = {
        "quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": ROTATIONS, "zero_point": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(entries))
    save_tokenizer(directory)
    return model


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
