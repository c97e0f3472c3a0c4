"""What safetensors files hold, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..layout import TENSOR_NAMES, Field

#: safetensors' names of the dtypes that a checkpoint may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensors:
    """fields: tensor name → dtype and shape; files: tensor name → the file that holds it."""

    fields: dict[str, Field]
    files: dict[str, Path]

    @classmethod
    def of_files(cls, files: Iterable[str | Path]) -> StoredTensors:
        """Read the headers; raises `CheckpointError` naming a file that is missing, truncated or no safetensors."""
        fields: dict[str, Field] = {}
        homes: dict[str, Path] = {}
        for file in map(Path, files):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        header = tensors.get_slice(name)
                        dtype = DTYPES.get(header.get_dtype())
                        if dtype is None:
                            raise CheckpointError(f"tensor {name} in {file} has unknown dtype {header.get_dtype()}.")
                        fields[name], homes[name] = Field(dtype, tuple(header.get_shape())), file
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error}. It is missing, truncated or damaged: download or quantize it again."
                ) from error
        return cls(fields, homes)

    @classmethod
    def of_directory(cls, directory: Path) -> StoredTensors:
        """All `*.safetensors` files of a directory."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} holds no .safetensors file.")
        return cls.of_files(files)

    def linears(self) -> list[str]:
        """Paths of the quantized linears: those with a `.qweight`."""
        return [name.removesuffix(".qweight") for name in self.fields if name.endswith(".qweight")]

    def fields_of(self, path: str) -> dict[str, Field]:
        """Stored name (`qweight`, …) → dtype and shape, for one linear."""
        return {name: self.fields[f"{path}.{name}"] for name in TENSOR_NAMES if f"{path}.{name}" in self.fields}

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, onto the device."""
        with safe_open(self.files[name], framework="pt", device=str(device)) as tensors:
            return tensors.get_tensor(name)
