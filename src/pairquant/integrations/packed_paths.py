"""Which layers of an engine's model are ours: by the paths at which the checkpoint holds packed weights.

A layer is quantized if the checkpoint holds its `qweight`, whatever else config.json says. Paths are known to us as the
checkpoint names them, to the engine as its model does; the model's own mapper translates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..spec.checkpoint import QUANT_METHOD, CheckpointConfig
from ..spec.linear import Spec
from ..spec.patterns import matches
from ..support.errors import CheckpointError

PACKED = ".qweight"


class PackedPaths:
    """The packed paths of a checkpoint, as part of an engine's own kind of quantization configuration.

    checkpoint: our view of the JSON object; quantized: path → spec of the packed weights, in the engine's names once the
    model has told its mapper; None where no file could be read: then all linears but `plain` are. stored_as: the same
    paths → those in the checkpoint; claimed: those for whose layers the engine has asked for a method.
    """

    #: What messages call the engine.
    engine: str
    #: The engine's own attribute: name of a merged layer → the names of the linears in it.
    packed_modules_mapping: dict[str, list[str]]

    @classmethod
    def get_name(cls) -> Any:  # vLLM's list of names knows no outsiders
        """Return the `quant_method` in config.json. This and the next three are what both engines ask of a configuration."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a model may compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of NVIDIA GPUs, times ten."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files to read beside config.json: none."""
        return []

    def begin(self, checkpoint: CheckpointConfig) -> None:
        """Set the fields; the engine's base class makes its own."""
        self.checkpoint = checkpoint
        self.quantized: dict[str, Spec] | None = None
        self.stored_as: dict[str, str] = {}
        self.claimed: set[str] = set()
        self.plain = checkpoint.modules_to_not_convert

    def take_names(self, tensors: Iterable[str]) -> list[str]:
        """Learn from the names of the checkpoint's tensors which paths are packed, and return these."""
        paths = [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]
        self.quantized = {path: self.checkpoint.spec_of(path) for path in paths}
        self.stored_as = {path: path for path in paths}
        return paths

    def rename(self, mapper: Any) -> None:
        """Translate the paths to those of the engine's model.

        mapper: its `WeightsMapper`.
        """
        self.plain = tuple(mapper.apply_list(list(self.plain)))
        if self.quantized is not None:
            renamed = {}
            for path in self.quantized:
                for name in mapper.apply_list([path + PACKED]):  # none, if the engine's model has no such layer
                    renamed[name.removesuffix(PACKED)] = path
            self.stored_as = {name: self.stored_as[path] for name, path in renamed.items()}
            self.quantized = {name: self.quantized[path] for name, path in renamed.items()}

    def claim(self, paths: Iterable[str], method: Any) -> Any:
        """Return the method, which runs these paths and from now on knows whose it is."""
        self.claimed.update(paths)
        method.pairquant = self
        return method

    def spec(self, prefix: str) -> Spec | None:
        """Return what the layer, or everything that the engine merges in it, is stored as; None if it is plain.

        Raises `CheckpointError`, before any weight is loaded, for linears that the engine merges but that are stored
        differently.
        """
        if self.quantized is not None and prefix in self.quantized:
            return self.quantized[prefix]  # fused on disk, whatever the engine calls its parts
        members = self.members(prefix)
        packed = [path for path in members if self.is_packed(path)]
        if packed and len(packed) < len(members):
            raise CheckpointError(
                f"{self.engine} runs {', '.join(members)} as one layer, but only {', '.join(packed)} is quantized. Quantize all "
                "of them or none (--ignore), or run the checkpoint with Transformers."
            )
        specs = {path: self.spec_of(path) for path in packed}
        if len(set(specs.values())) > 1:
            stored = "; ".join(f"{path} has {spec}" for path, spec in specs.items())
            raise CheckpointError(
                f"{self.engine} runs {', '.join(members)} as one layer, but they are stored differently: {stored}. Quantize "
                "again with one --override for all of them, or run the checkpoint with Transformers."
            )
        return next(iter(specs.values()), None)

    def spec_of(self, path: str) -> Spec:
        """Return the spec of one packed path."""
        return self.checkpoint.spec_of(path) if self.quantized is None else self.quantized[path]

    def members(self, prefix: str) -> list[str]:
        """Return the linears of the checkpoint that the engine merges into the layer at `prefix`, or the layer itself."""
        parent, dot, name = prefix.rpartition(".")
        return [parent + dot + member for member in self.packed_modules_mapping.get(name, [name])]

    def is_packed(self, path: str) -> bool:
        """Tell whether the checkpoint holds one path packed."""
        if self.quantized is None:
            return not matches(path, (*self.plain, "lm_head"))
        return path in self.quantized
