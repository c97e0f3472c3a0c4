"""A checkpoint without transforms as one GGUF file: tensors under llama.cpp's names, and the metadata that it needs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..formats.base import Contents
from ..formats.gguf import BLOCK, Gguf
from ..models.sites import ExpertSite, stored_sites
from ..spec.linear import LinearLayout
from ..support.errors import CheckpointError, ConfigError
from .converted import Stack, stacked, stacks_of
from .files import durable
from .gguf_metadata import (
    Family,
    copy_metadata,
    family_of,
    require_describable,
    require_package,
    write_metadata,
)
from .gguf_rope import rope_factors, rope_factors_in
from .original import sites_of
from .read import Checkpoint, ModelFiles
from .write import require_space

if TYPE_CHECKING:
    from gguf import GGUFWriter

FORM = Gguf()


def require_file_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that is no name of a GGUF file, and an existing one unless it may be replaced."""
    if output.suffix != ".gguf":
        raise ConfigError(f"output {str(output)!r} is no .gguf file, which gguf writes. Let --output end in .gguf.")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ConfigError(f"output {str(output)!r} exists. Choose another --output, or add --overwrite.")


def require_writable(files: ModelFiles, model: Any, quantized: Container[str]) -> None:
    """Refuse a model, which may lack its weights, of which no GGUF file can be written; raises as `write_gguf` does.

    quantized: the paths of the weights that will be. Experts must be: they are written as tensors of all of a block.
    """
    require_package()
    if not files.gguf:  # a GGUF file's own metadata is copied
        require_describable(files)
    names = _names(family_of(files.config), files.config)
    for site in stored_sites(model, files.names(model)).values():
        if isinstance(site, ExpertSite) and site.path not in quantized:
            raise ConfigError(
                f"the expert {site.path} is to stay as it is, and gguf holds quantized experts only. Take it out of --ignore, or choose "
                "another format."
            )
    for path, module in model.named_modules():
        if not ExpertSite.holds(module):  # those have the names of their parts
            for name, _ in module.named_parameters(recurse=False):
                _named(names, f"{path}.{name}")


def _names(family: Family, config: Any) -> Any:
    """Return the table of llama.cpp's names for an architecture."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file. shape: in elements, or in bytes for uint8 blocks of the type `kind`; dtype: of numpy."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    kind: str
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def write_gguf(
    checkpoint: Checkpoint,
    files: ModelFiles,
    contents: Contents,
    output: Path,
    on_tensors: Callable[[int], Callable[[], None]] | None = None,
) -> Path:
    """Write the file, whole or not at all.

    Codes stay as they are; embeddings in 16 bits become Q8_0, other matrices F16, all else F32. Metadata and tokenizer are those of
    the GGUF file that the checkpoint was made from, while it is there, else those that config.json and the tokenizer's files
    tell. Raises `ConfigError` for a family that is not known here, `SourceError` for a tokenizer that is not.
    """
    require_package()
    import gguf

    config, family = files.config, family_of(files.config)
    source = _source(checkpoint)
    if source is not None and source.resolve() == output.resolve():
        raise ConfigError(f"output {str(output)!r} is the file that the model was made from. Choose another --output.")
    if source is None:
        require_describable(files)
    planned = list(_tensors(checkpoint, files, contents, family))
    require_space(output, sum(tensor.nbytes for tensor in planned))
    tell = on_tensors(len(planned)) if on_tensors is not None else lambda: None

    def write(staged: Path) -> None:
        writer = gguf.GGUFWriter(staged, family.architecture)
        try:
            if source is not None:
                copy_metadata(writer, source)
            else:
                write_metadata(writer, files, config, family, _title(checkpoint, files))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_usual(contents)}"])
            _write_tensors(writer, planned, tell)
        finally:
            writer.close()

    output.parent.mkdir(parents=True, exist_ok=True)
    durable(output, write)
    return output


def _source(checkpoint: Checkpoint) -> Path | None:
    """Return the GGUF file that the checkpoint was made from, if it is still there."""
    name = (checkpoint.config.provenance or {}).get("source")
    found = isinstance(name, str) and name.endswith(".gguf") and Path(name).is_file()
    return Path(name) if found else None  # type: ignore[arg-type]  # found only if it is text


def _title(checkpoint: Checkpoint, files: ModelFiles) -> str:
    """Return what the file calls the model: the name of its source."""
    source = (checkpoint.config.provenance or {}).get("source")
    return Path(source).name if isinstance(source, str) and source else files.directory.name


def _usual(contents: Contents) -> str:
    """Return the block type that holds most weights."""
    sizes: dict[str, int] = {}
    for layout in contents.layouts.values():
        kind = FORM.type_of(layout)
        sizes[kind] = sizes.get(kind, 0) + layout.in_features * layout.out_features
    return max(sizes, key=lambda kind: sizes[kind])


def _write_tensors(writer: GGUFWriter, planned: list[_Planned], tell: Callable[[], None]) -> None:
    """Write headers, then one tensor after the other."""
    import gguf

    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(tensor.load().contiguous().numpy())
        tell()


def _tensors(checkpoint: Checkpoint, files: ModelFiles, contents: Contents, family: Family) -> Iterator[_Planned]:
    """Yield the tensors in the order of the checkpoint, the factors of a stretched rope last."""
    config, source = files.config, _source(checkpoint)
    names, stacks = _names(family, config), stacks_of(contents.layouts, sites_of(files)[0])
    inside = {path for stack in stacks.values() for path in stack.paths}
    stored, packed = checkpoint.stored, checkpoint.stored.packed_names()
    for name, field in stored.fields.items():
        path, _, part = name.rpartition(".")
        quantized = path in contents.layouts
        if path in inside:
            if path in stacks and part == "qweight":
                yield _of_experts(checkpoint, stacks[path], names, contents.layouts[path])
        elif quantized and part == "qweight":
            yield _of_codes(checkpoint, path, _named(names, f"{path}.weight"), contents.layouts[path], family, config)
        elif name not in packed or (quantized and part == "bias"):
            yield _of_plain(checkpoint, name, _named(names, name), field.shape, family, config)
    factors = rope_factors(config) if source is None else rope_factors_in(source)
    if factors is not None:
        yield _Planned("rope_freqs.weight", tuple(factors.shape), np.float32, "F32", lambda: factors)


def _named(names: Any, name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"tensor {name} has no name in GGUF files of this architecture: the file would lack it.")
    return found


def _of_codes(
    checkpoint: Checkpoint, path: str, name: str, layout: LinearLayout, family: Family, config: Any
) -> _Planned:
    def load() -> Tensor:
        return family.rows(path, FORM.tensors(checkpoint.packed(path))["weight"], config)

    return _Planned(name, FORM.fields(layout)["weight"].shape, np.uint8, FORM.type_of(layout), load)


def _of_experts(checkpoint: Checkpoint, stack: Stack, names: Any, layout: LinearLayout) -> _Planned:
    """Return one part of all experts of a block."""
    name = _named(names, f"{FORM.stack_name(stack.home, stack.part, stack.stored)}.weight")
    shape = (len(stack.paths), *FORM.fields(layout)["weight"].shape)
    return _Planned(name, shape, np.uint8, FORM.type_of(layout), lambda: stacked(checkpoint, FORM, stack)["weight"])


def _of_plain(
    checkpoint: Checkpoint, stored: str, name: str, shape: tuple[int, ...], family: Family, config: Any
) -> _Planned:
    """Return a tensor that was not quantized; embeddings and a plain head are rounded to 8 bits, if their rows are whole blocks."""
    path, _, _part = stored.rpartition(".")

    def load() -> Tensor:
        value = checkpoint.stored.load(stored).float()
        if name.endswith("_norm.weight") and family.norm_offset:
            return value + family.norm_offset
        return family.rows(path, value, config)

    if len(shape) == 2 and shape[0] == 1:  # the gate of a shared expert, a vector there
        return _Planned(name, shape[1:], np.float32, "F32", lambda: load()[0])
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):  # which expert is chosen hangs on small differences
        return _Planned(name, shape, np.float32, "F32", load)
    if name in ("token_embd.weight", "output.weight") and shape[-1] % BLOCK == 0:
        return _Planned(name, (shape[0], shape[1] // BLOCK * (BLOCK + 2)), np.uint8, "Q8_0", lambda: eight_bits(load()))
    return _Planned(name, shape, np.float16, "F16", lambda: _half(stored, load()))


def _half(name: str, value: Tensor) -> Tensor:
    half = value.half()
    if not torch.isfinite(half).all():
        raise CheckpointError(f"tensor {name} has values up to {value.abs().max():.3g}, more than float16 holds.")
    return half


def eight_bits(value: Tensor) -> Tensor:
    """Round [N, C] to the nearest of Q8_0: uint8 [N, C / 32 · 34]."""
    import gguf

    return torch.from_numpy(gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0))
