"""A packed checkpoint for other programs: as a plain one, every weight decoded; or, if it has no transforms, in their formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.linear import decode
from ..formats.gguf import Gguf
from ..formats.table import FORMATS
from ..models.names import Names
from ..models.sites import ExpertSite, Site
from ..spec.fields import Field
from ..support.errors import ConfigError, did_you_mean
from .converted import (
    cast,
    contents_of,
    converted_entries,
    dtype_for,
    kept,
    named_as,
    require_plain_activations,
    stacks_of,
)  # fmt: skip
from .describe import README, readme_digest, state_dtype, state_experts, state_rope, write_config
from .files import read_json
from .gguf_file import require_file_free, write_gguf
from .original import sites_of
from .read import Checkpoint, ModelFiles
from .side_files import copy_side_files
from .write import Entry, require_apart, require_free, require_space, write_checkpoint

#: What a plain checkpoint can be stored in.
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    model: str | Path,
    output: str | Path,
    to: str = "bf16",
    *,
    overwrite: bool = False,
    on_tensors: Callable[[int], Callable[[], None]] | None = None,
) -> Path:
    """Write the packed checkpoint `model` to `output` as other programs load it.

    to: "bf16", "fp16" or "fp32" for a plain model: quantized linears are decoded; other floating tensors are cast, but for
    what a 16-bit model stores in float32 (a router's biases, say). "awq", "gptq", "compressed-tensors", "mlx" or "gguf" for a
    checkpoint without transforms, whose codes stay as they are; the latter is one file. All else is kept: tokenizer,
    generation defaults, custom code. At most one shard is in memory. `on_tensors(count)` is told what is coming and returns
    what to call after each tensor. Raises `ConfigError` for unknown formats, existing outputs and weights that the format
    cannot hold, `CheckpointError` for damaged checkpoints and values that do not fit.
    """
    output = Path(output)
    require_output(to, output, overwrite)
    files = ModelFiles.find(str(model))
    checkpoint = Checkpoint.open(files)
    require_apart(output, files)
    require_plain_activations((checkpoint.layout(path).activations for path in checkpoint.stored.linears()), to)
    form = FORMATS.get(to)
    contents = None if form is None else contents_of(checkpoint, files, form)
    if form is not None and contents is not None and to == Gguf.name:
        return write_gguf(checkpoint, files, contents, output, on_tensors)
    if form is not None and contents is not None:
        stacks = stacks_of(contents.layouts, sites_of(files)[0])
        dtype, added = dtype_for(files.config.model_type), form.entries(named_as(form, contents, stacks))
        entries = converted_entries(checkpoint, contents, form, dtype, stacks)
    else:
        dtype, added = PLAIN[to], {}
        entries = _entries(checkpoint, dtype, *sites_of(files))
    require_space(output, sum(entry.field.nbytes for entry in entries.values()))
    if on_tensors is not None:
        entries = _told(entries, on_tensors(len(entries)))
    report = {"exported": {"from": files.name, "to": to}, "provenance": checkpoint.config.provenance}
    write_checkpoint(
        output, entries, lambda directory: _describe(checkpoint, directory, dtype, added), report, overwrite
    )
    return output


def require_output(to: str, output: Path, overwrite: bool) -> None:
    """Raise `ConfigError` for a format that is not known, and for an output that it cannot have."""
    known = (*PLAIN, *FORMATS)
    if to not in known:
        raise ConfigError(f"format is {to!r}, allowed: {', '.join(known)}{did_you_mean(to, known)}")
    require = require_file_free if to == Gguf.name else require_free
    require(output, overwrite)


def _entries(checkpoint: Checkpoint, dtype: torch.dtype, sites: Mapping[str, Site], names: Names) -> dict[str, Entry]:
    """Return every tensor of the plain model, in the order of the packed ones."""
    stored = checkpoint.stored
    quantized, packed = set(stored.linears()), stored.packed_names()
    plain = {n: f for n, f in stored.fields.items() if n not in packed}
    precise = _wider_on_purpose(plain)
    joined = _joined_experts(checkpoint, dtype, sites, names)
    entries: dict[str, Entry] = {}
    for name, field in stored.fields.items():
        path, _, part = name.rpartition(".")
        if path in joined:
            entries |= {full: entry for full, entry in joined[path].items() if full not in entries}
        elif path in quantized and part == "qweight":
            layout, site = checkpoint.layout(path), sites.get(path)
            shape = (layout.out_features, layout.in_features)
            site = (
                None if site is not None and site.pool else site
            )  # of one expert, [N, C] whatever holds it in a model
            held = tuple(site.as_held(torch.empty(shape, device="meta")).shape) if site else shape
            entries[f"{path}.weight"] = Entry(Field(dtype, held), partial(_decoded, checkpoint, path, dtype, site))
        elif name not in packed or part == "bias":
            stays = dtype if field.dtype.is_floating_point and name not in precise else field.dtype
            entries[name] = Entry(Field(stays, field.shape), partial(kept, checkpoint, name, stays))
    return entries


def _joined_experts(
    checkpoint: Checkpoint, dtype: torch.dtype, sites: Mapping[str, Site], names: Names
) -> dict[str, dict[str, Entry]]:
    """Return what becomes of experts that the source held in one tensor: path → the tensors that hold all of them."""
    quantized = set(checkpoint.stored.linears())
    parameters: dict[str, list[ExpertSite]] = {}
    for path, site in sites.items():
        if isinstance(site, ExpertSite) and path in quantized and not names.joins(f"{path}.weight"):
            parameters.setdefault(site.parameter, []).append(site)
    found: dict[str, dict[str, Entry]] = {}
    for parameter, mine in parameters.items():
        entries = {names.renamed(parameter): _joined(checkpoint, mine, False, dtype)}
        if mine[0].size.bias:
            entries[names.renamed(mine[0].bias_parameter)] = _joined(checkpoint, mine, True, dtype)
        found |= {site.path: entries for site in mine}
    return found


def _joined(checkpoint: Checkpoint, sites: list[ExpertSite], bias: bool, dtype: torch.dtype) -> Entry:
    """Return one tensor that holds a part of all experts, as the module of the model holds it."""
    module = sites[0].module
    whole = module.get_parameter(sites[0].parameter.rpartition(".")[2] + ("_bias" if bias else ""))

    def load() -> Tensor:
        held = torch.empty(whole.shape, dtype=torch.float32)
        for site in sites:
            packed = checkpoint.packed(site.path)
            if bias:
                site.bias_taken(held).copy_(packed["bias"])
            else:
                site.taken(held).copy_(decode(packed))
        return cast(sites[0].parameter, held, dtype)

    return Entry(Field(dtype, tuple(whole.shape)), load)


def _wider_on_purpose(plain: dict[str, Field]) -> set[str]:
    """Return names of float32 tensors in a checkpoint that is stored in 16 bits: most of its numbers are."""
    floats = {name: field for name, field in plain.items() if field.dtype.is_floating_point}
    narrow = sum(field.nbytes // 2 for field in floats.values() if field.dtype.itemsize == 2)
    wide = {name: field for name, field in floats.items() if field.dtype == torch.float32}
    return set(wide) if narrow > sum(field.nbytes // 4 for field in wide.values()) else set()


def _decoded(checkpoint: Checkpoint, path: str, dtype: torch.dtype, site: Site | None) -> Tensor:
    weight = decode(checkpoint.packed(path))
    return cast(f"{path}.weight", site.as_held(weight) if site else weight, dtype)


def _told(entries: dict[str, Entry], tell: Callable[[], None]) -> dict[str, Entry]:
    def telling(entry: Entry) -> Entry:
        def load() -> Tensor:
            value = entry.load()
            tell()
            return value

        return Entry(entry.field, load)

    return {name: telling(entry) for name, entry in entries.items()}


def _describe(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype, added: Mapping[str, Any]) -> None:
    """Write config.json with these entries in place of our quantization, and copy every file that says nothing of packed weights.

    A model card does, unless it is the source's own.
    """
    config = read_json(checkpoint.directory / "config.json")
    del config["quantization_config"]
    state_dtype(config, dtype)
    state_rope(config)
    state_experts(config)
    write_config(directory, {**config, **added})
    digest = readme_digest(checkpoint.directory)
    own = digest is not None and digest == checkpoint.report.get("readme_sha256")
    copy_side_files(checkpoint.directory, directory, without=frozenset() if own else frozenset({README}))
