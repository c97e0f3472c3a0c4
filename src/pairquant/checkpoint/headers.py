"""What safetensors files hold, from their headers alone."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..spec.experts import EXPERT, pool_of, shared_name
from ..spec.fields import Field
from ..spec.linear import TENSOR_NAMES
from ..support.errors import CheckpointError
from .files import read_json
from .scaled import FP8, Scaled, take_out
from .side_files import is_weights

#: safetensors' names of the dtypes that a checkpoint may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: How safetensors' names of floats of 8 bits and less begin.
SMALL_FLOATS = ("F8", "F6", "F4")
#: The names under which Transformers looks for weights.
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
#: Tensors that belong to a packed linear and to nothing else.
PACKED_NAMES = frozenset(TENSOR_NAMES) - {"bias"}
REMEDY = "The checkpoint is damaged: download or quantize it again."


@dataclass(frozen=True)
class StoredTensors:
    """fields: tensor name → dtype and shape; files: tensor name → the file that holds it.

    scaled: tensors that are stored as codes and scales (see `scaled`): they are loaded as the bfloat16 tensors that these stand
    for, and their codes and scales are no tensors of their own.
    """

    fields: dict[str, Field]
    files: dict[str, Path]
    scaled: dict[str, Scaled] = dataclass_field(default_factory=dict)

    @classmethod
    def of_files(cls, files: Iterable[str | Path], home: str | Path | None = None) -> StoredTensors:
        """Read the headers; raises `CheckpointError` naming a file that is missing, truncated or no safetensors.

        home: the directory that they must be in, if it is known; they may be links.
        """
        fields: dict[str, Field] = {}
        homes: dict[str, Path] = {}
        for file in map(Path, files):
            if home is not None and (Path(home) not in file.parents or ".." in file.relative_to(home).parts):
                raise CheckpointError(f"weights {str(file)!r} are not in the model's directory {str(home)!r}. {REMEDY}")
            for name, field in _header(file).items():
                if name in fields:
                    raise CheckpointError(f"tensor {name} is both in {homes[name]} and in {file}. Remove one of them.")
                fields[name], homes[name] = field, file
        return cls(fields, homes, take_out(fields, homes))

    @classmethod
    def of_directory(cls, directory: Path) -> StoredTensors:
        """Read the headers of `weight_files`; raises what it raises, and `CheckpointError` for a wrong index."""
        stored = cls.of_files(weight_files(directory))
        index = directory / INDEX_FILE
        homes = {} if (directory / SINGLE_FILE).exists() else _weight_map(index)
        for tensor, home in homes.items():
            if stored.files.get(tensor) != directory / home:
                raise CheckpointError(f"{index} places tensor {tensor} in {home}, which does not hold it. {REMEDY}")
        return stored

    def linears(self) -> list[str]:
        """Return paths of the quantized linears: those with a `.qweight`."""
        return [name.removesuffix(".qweight") for name in self.fields if name.endswith(".qweight")]

    def require_whole_linears(self) -> None:
        """Raise `CheckpointError` for a packed tensor without the others, and for a linear both packed and plain."""
        for name in self.fields:
            path, _, stored = name.rpartition(".")
            packed = f"{path}.qweight" in self.fields
            if stored in PACKED_NAMES and not packed:
                raise CheckpointError(f"tensor {path}.qweight is missing, but there is {name}. {REMEDY}")
            if stored == "weight" and packed:
                raise CheckpointError(f"{path} is stored twice, plain ({name}) and packed. {REMEDY}")

    def require_fit(self, expected: Mapping[str, Field]) -> None:
        """Raise `CheckpointError` for a tensor that does not fit the model's of the same name.

        Its sizes may come in another order: Transformers turns some. Without this, it would allocate what a damaged
        config.json asks for before it compares.
        """
        for name in self.fields.keys() & expected.keys():
            have, want = self.fields[name], expected[name]
            if sorted(have.shape) != sorted(want.shape):
                raise CheckpointError(
                    f"tensor {name} has shape {list(have.shape)}, the model's has {list(want.shape)}. "
                    "config.json and weights do not belong together."
                )
            if have.dtype.is_floating_point != want.dtype.is_floating_point:
                raise CheckpointError(f"tensor {name} is {have.dtype}, the model's is {want.dtype}. {REMEDY}")

    def names_of(self, path: str) -> dict[str, str]:
        """Return where the tensors of one linear lie: `qweight`, … → full name. Experts share a transform's (`spec.experts`)."""
        found = {}
        for name in TENSOR_NAMES:
            places = (f"{path}.{name}", shared_name(path, name), shared_name(path, name, per_expert=True))
            if place := next((place for place in places if place in self.fields), None):
                found[name] = place
        return found

    def fields_of(self, path: str) -> dict[str, Field]:
        """Stored name (`qweight`, …) → dtype and shape, for one linear."""
        return {name: self.fields[full] for name, full in self.names_of(path).items()}

    def tensors_of(self, path: str) -> dict[str, Tensor]:
        """Load the tensors of one linear: `qweight`, … → tensor."""
        return {name: self.load(full) for name, full in self.names_of(path).items()}

    def packed_names(self) -> set[str]:
        """Return the full names of all tensors that belong to quantized linears."""
        return {full for path in self.linears() for full in self.names_of(path).values()}

    def pools(self) -> dict[str, str]:
        """Return path → what its transform is named by, of the linears whose transform is stored once for several (`pool_of`)."""
        found = {path: self.names_of(path).get("theta", "") for path in self.linears()}
        end = "_weight_theta"
        return {path: theta.removesuffix(end) for path, theta in found.items() if theta.endswith(end)}

    @property
    def has_own_transforms(self) -> bool:
        """Whether each expert has a transform of its own."""
        own = {path: pool_of(path, per_expert=True) for path in self.linears() if EXPERT.fullmatch(path)}
        return any(f"{pool}_weight_theta" in self.fields for pool in own.values())

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return one tensor, onto the device."""
        if (scaled := self.scaled.get(name)) is not None:
            return scaled.decode(self._stored(scaled.codes, device), self._stored(scaled.scales, device))
        return self._stored(name, device)

    def _stored(self, name: str, device: torch.device | str) -> Tensor:
        file = self.files[name]
        found = file.stat()
        return _opened(file, str(device), found.st_mtime_ns, found.st_size).get_tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """Return the files that Transformers would load: `model.safetensors`, else the shards that the index names.

    Whatever lies beside them is left alone. Raises `CheckpointError` if there is neither, naming other weights.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return [single]
    if index.exists():
        return [directory / name for name in sorted(set(_weight_map(index).values()))]
    found = sorted(file.name for file in directory.iterdir() if is_weights(file.name))
    beside = f", only {', '.join(found[:3])}{', …' if len(found) > 3 else ''}" if found else ""
    raise CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{beside}. Weights of other formats, such as pickles, "
        "are not read, and files of other names are not guessed at: save the model with Transformers' save_pretrained, or "
        "download it with its safetensors files."
    )


@lru_cache(maxsize=1)
def _opened(file: Path, device: str, modified: int, size: int) -> Any:
    """Return the file, its header parsed once for all tensors in a row: 1.6 ms in a file of 1,000, 35 ms in one of 16,000."""
    return safe_open(file, framework="pt", device=device)


def _header(file: Path) -> dict[str, Field]:
    """Tensor name → dtype and shape. Files of another name are refused unopened: they may be pickles."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is no .safetensors file. Weights of other formats, such as pickles, are not read."
        )
    if not file.is_file():
        raise CheckpointError(f"{file} cannot be read: there is no such file. {REMEDY}")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return {name: _field(file, name, tensors.get_slice(name)) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} cannot be read: {error}. It is truncated or damaged. {REMEDY}") from error


def _field(file: Path, name: str, header: Any) -> Field:
    stored_as = header.get_dtype()
    if stored_as in DTYPES:
        return Field(DTYPES[stored_as], tuple(header.get_shape()))
    if stored_as.startswith(SMALL_FLOATS):
        raise CheckpointError(
            f"tensor {name} in {file} is {stored_as}: the weights are quantized to {stored_as[1]}-bit floats already, which is "
            "not supported yet. Use the original model in 16 bits."
        )
    raise CheckpointError(f"tensor {name} in {file} is {stored_as}, allowed: {', '.join(DTYPES)}.")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, of an index of shards; a shard lies beside its index, never elsewhere."""
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{index} has no weight_map of tensors to files. {REMEDY}")
    for tensor, home in homes.items():
        if not isinstance(home, str) or home in ("", ".", "..") or set(home) & set("/\\\0"):
            raise CheckpointError(
                f"{index} places tensor {tensor} in {reprlib.repr(home)}, must be a file beside the index. {REMEDY}"
            )
    return homes
