"""The `quantization_config` of a checkpoint, as SGLang wants to hold it: which layers are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...checkpoint.downloads import in_cache
from ...checkpoint.headers import StoredTensors
from ...spec.checkpoint import QUANT_METHOD, CheckpointConfig
from ...support.errors import CheckpointError, ConfigError, SourceError
from ..packed_paths import PackedPaths
from .compat import (
    FusedMoE,
    LinearBase,
    QuantizationConfig,
    VocabParallelEmbedding,
    pipeline_stages,
    place_of_downloads,
)
from .linear import PairQuantLinearMethod, PlainLinearMethod

#: What most of SGLang's models merge; few of them say so in their own `packed_modules_mapping`.
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
#: What SGLang adds to the object from config.json before it hands it over.
ADDED = ("packed_modules_mapping", "hf_config")


class PairQuantConfig(PackedPaths, QuantizationConfig):
    """Which layers of SGLang's model run packed weights."""

    engine = "SGLang"

    def __init__(self, checkpoint: CheckpointConfig, merged: dict[str, list[str]] | None = None):
        """merged: name of a merged layer → names of the linears in it, beside `MERGED`."""
        super().__init__()
        self.begin(checkpoint)
        self.packed_modules_mapping = {**MERGED, **(merged or {})}

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PairQuantConfig:
        """Read the JSON object, and from the model's files which linears are packed.

        Raises `CheckpointError` naming the entry that is wrong, `ConfigError` for a model whose files are not here, and for
        more than one pipeline stage: whether all that is packed has found its layer is seen only where all layers are.
        """
        if (stages := pipeline_stages()) > 1:
            raise ConfigError(
                f"--pipeline-parallel-size is {stages}, allowed with {QUANT_METHOD} checkpoints in SGLang: 1. Use "
                "--tensor-parallel-size, or vLLM."
            )
        stored = {name: value for name, value in config.items() if name not in ADDED}
        found = cls(CheckpointConfig.from_dict(stored), config.get("packed_modules_mapping"))
        found.take_names(_stored_tensors(config.get("hf_config")).fields)
        return found

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Translate the paths to those of SGLang's model."""
        self.rename(hf_to_sglang_mapper)

    def is_linear_unquantized(self, prefix: str) -> bool:
        """Tell whether the linear at `prefix` is plain, without making a method for it."""
        return self.spec(prefix) is None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Ours for linears, None for all else; raises `CheckpointError` for packed weights elsewhere."""
        if isinstance(layer, LinearBase):
            spec = self.spec(prefix)
            if spec is None:
                return self.claim([], PlainLinearMethod())
            return self.claim([prefix, *self.members(prefix)], PairQuantLinearMethod(spec, prefix))
        inside = [path for path in self.quantized or {} if path == prefix or path.startswith(f"{prefix}.")]
        if inside and isinstance(layer, (FusedMoE, VocabParallelEmbedding)):
            raise CheckpointError(
                f"{min(inside)} is quantized, but SGLang runs it within a {type(layer).__name__}, which the plugin does not know. "
                "Serve the checkpoint with vLLM, or quantize the model without quantized experts and embeddings."
            )
        return None

    def require_all_claimed(self) -> None:
        """Raise `CheckpointError` for packed weights that no layer of SGLang's model asks for, once all layers are made.

        SGLang would only warn, and run the layers that they belong to with whatever lies in memory.
        """
        if lost := set(self.quantized or {}) - self.claimed:
            raise CheckpointError(
                f"{len(lost)} quantized layers, such as {min(lost)}, have no linear layer of their name in SGLang's model. Serve "
                "the checkpoint with vLLM, or in AWQ's format (`pairquant quantize MODEL --format awq`)."
            )


def _stored_tensors(hf_config: Any) -> StoredTensors:
    """Return what the model's files hold. hf_config: Transformers' configuration of the model, which says where it lies.

    A hub name's files are looked for in the hub's cache: SGLang makes its layers before it downloads weights. Raises
    `ConfigError` if they are not there: config.json alone does not say which layers are plain.
    """
    model = getattr(hf_config, "name_or_path", "")
    if model and Path(model).is_dir():
        return StoredTensors.of_directory(Path(model))
    try:
        return StoredTensors.of_directory(in_cache(model, *place_of_downloads(model)))
    except (SourceError, CheckpointError) as error:
        raise ConfigError(
            f"model {model!r} is neither a directory nor a hub name whose files are all in the hub's cache. Download it "
            "(`hf download NAME --local-dir DIRECTORY`) and pass the directory as --model-path: SGLang makes its layers "
            "before it downloads weights, and only these say which layers are quantized."
        ) from error
