"""A checkpoint without transforms in a format of another program: every code stays as it is, only its place changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..formats.base import REMEDY, Contents, Format
from ..models.names import Names
from ..models.sites import EmbeddingSite, ExpertSite, Site
from ..spec.fields import Field
from ..support.errors import CheckpointError, ConfigError
from ..support.formatting import counted
from .original import sites_of
from .read import Checkpoint, ModelFiles
from .write import Entry

#: Families whose activations float16 does not hold; vLLM refuses to run them in it.
IN_BFLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")


@dataclass(frozen=True)
class Stack:
    """One part of all experts of a block, which some formats hold as one tensor. All of them have one layout (`models.planning`).

    home: what the source calls the experts' module; part: "gate_proj", "up_proj" or "down_proj"; stored: what the source
    calls that; paths: of the experts, in their order.
    """

    home: str
    part: str
    stored: str
    paths: tuple[str, ...]


def stacks_of(paths: Iterable[str], sites: Mapping[str, Site]) -> dict[str, Stack]:
    """Return the stacks of the experts among these paths, by the path of the first expert of each."""
    found: dict[tuple[str, str], list[ExpertSite]] = {}
    for path in paths:
        site = sites.get(path)
        if isinstance(site, ExpertSite):
            found.setdefault((site.place, site.part), []).append(site)
    stacks = {}
    for (_, part), members in found.items():
        ordered = tuple(site.path for site in sorted(members, key=lambda site: site.number))
        home, _, stored = ordered[0].rsplit(".", 2)
        stacks[ordered[0]] = Stack(home, part, stored, ordered)
    return stacks


def require_plain_activations(activations: Iterable[str | None], to: str) -> None:
    """Raise `ConfigError` for a checkpoint whose layers round what they read, which no other format says.

    activations: the layers' formats of `spec.activations`, None for none; to: the format that is wanted.
    """
    if named := sorted({each for each in activations if each is not None}):
        raise ConfigError(
            f"layers round what they read to {' and '.join(named)}, which {to} cannot say: the model would answer otherwise. "
            "Quantize without --activations for it."
        )


def dtype_for(model_type: str) -> torch.dtype:
    """Return what a model is to be computed in, and its plain tensors stored in. Scales are float16 in every format."""
    return torch.bfloat16 if model_type in IN_BFLOAT16 else torch.float16


def contents_of(checkpoint: Checkpoint, files: ModelFiles, form: Format) -> Contents:
    """Return what a checkpoint holds, if the format holds it too.

    Raises `ConfigError`, before anything is written, for weights with a transform, of another width, and of kinds that the
    format has no place for; it says what to do instead.
    """
    contents = Contents(
        {path: checkpoint.layout(path) for path in checkpoint.stored.linears()},
        checkpoint.config.modules_to_not_convert,
    )
    rotated = sum(layout.rotations > 0 for layout in contents.layouts.values())
    scaled = sum(not _unit(checkpoint, path) for path in contents.layouts)
    if rotated or scaled:
        raise ConfigError(
            f"{counted(max(rotated, scaled), 'layer')} of {len(contents.layouts)} have a transform (rotations or channel "
            f"scales), which {form.name} cannot hold: without it a weight is on no grid. {REMEDY}"
        )
    require_held(contents, form, files.config.model_type, *sites_of(files))
    return contents


def _unit(checkpoint: Checkpoint, path: str) -> bool:
    """Tell whether the channel scales of a linear are all 1."""
    name = checkpoint.stored.names_of(path)["channel_scales"]
    return bool((checkpoint.stored.load(name) == 1).all())


def require_held(contents: Contents, form: Format, family: str, sites: Mapping[str, Site], names: Names) -> None:
    """Raise `ConfigError` for weights that a format does not hold: by their layout, or because they are embeddings or experts.

    family: `model_type` of the model's config.json.
    """
    for path in contents.layouts:
        site = sites.get(path)
        embedding = isinstance(site, EmbeddingSite) or path.rpartition(".")[2] == "lm_head"
        if embedding and not form.embeddings:
            raise ConfigError(
                f"{path} is a quantized embedding, which {form.name} does not hold. Quantize without --head-bits and "
                "--embedding-bits, or choose mlx or gguf."
            )
        if isinstance(site, ExpertSite) and not _holds_expert(form, family, path, names):
            those = "" if form.stacks is None else f", but of {', '.join(form.stacks)}"
            raise ConfigError(
                f"{path} is an expert, which {form.name} does not hold as a model of the family {family!r} stores it{those}. Choose "
                "compressed-tensors, awq or gptq for a model that stores its experts one by one; others run with pairquant's own "
                "format."
            )
    form.require(contents)


def _holds_expert(form: Format, family: str, path: str, names: Names) -> bool:
    return names.joins(f"{path}.weight") if form.stacks is None else family in form.stacks


def named_as(form: Format, contents: Contents, stacks: Mapping[str, Stack]) -> Contents:
    """Return the contents under the names of the format, in which a stack of experts is one weight."""
    if form.stacks is None:
        return contents
    inside = {path for stack in stacks.values() for path in stack.paths}
    layouts = {}
    for path, layout in contents.layouts.items():
        if path in stacks:
            layouts[form.stack_name(stacks[path].home, stacks[path].part, stacks[path].stored)] = layout
        elif path not in inside:
            layouts[path] = layout
    return Contents(layouts, contents.plain)


def stacked(checkpoint: Checkpoint, form: Format, stack: Stack) -> dict[str, Tensor]:
    """Return what a format stores of one part of all experts of a block, [E, …] each, by the last part of its name."""
    each = [form.tensors(checkpoint.packed(path)) for path in stack.paths]
    return {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}


def converted_entries(
    checkpoint: Checkpoint, contents: Contents, form: Format, kept_in: torch.dtype, stacks: Mapping[str, Stack]
) -> dict[str, Entry]:
    """Return every tensor of the checkpoint as the format stores it, in the order of ours; plain floating ones in `kept_in`.

    stacks: of the experts, which count only where the format has one tensor for all of a block.
    """
    stored, packed = checkpoint.stored, checkpoint.stored.packed_names()
    stacks = {} if form.stacks is None else stacks
    inside = {path for stack in stacks.values() for path in stack.paths}

    @lru_cache(maxsize=1)
    def converted(path: str) -> dict[str, Tensor]:
        return stacked(checkpoint, form, stacks[path]) if path in stacks else form.tensors(checkpoint.packed(path))

    entries: dict[str, Entry] = {}
    for name, field in stored.fields.items():
        path, _, part = name.rpartition(".")
        if path in contents.layouts and part == "qweight":
            if path in inside and path not in stacks:
                continue
            stack = stacks.get(path)
            place = path if stack is None else form.stack_name(stack.home, stack.part, stack.stored)
            count = () if stack is None else (len(stack.paths),)
            for own, its in form.fields(contents.layouts[path]).items():
                held = Field(its.dtype, (*count, *its.shape))
                entries[f"{place}.{own}"] = Entry(held, lambda path=path, own=own: converted(path)[own])  # type: ignore[misc]
        elif name not in packed or part == "bias":
            dtype = kept_in if field.dtype.is_floating_point and part != "bias" else field.dtype
            entries[name] = Entry(Field(dtype, field.shape), partial(kept, checkpoint, name, dtype))
    return entries


def kept(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """Return a plain tensor of the checkpoint in this dtype."""
    return cast(name, checkpoint.stored.load(name), dtype)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor of this name in this dtype; raises `CheckpointError` if it holds larger numbers than that."""
    result = value.to(dtype)
    if dtype.is_floating_point and not torch.isfinite(result).all():
        raise CheckpointError(
            f"tensor {name} has values up to {value.abs().max():.3g}, more than {dtype} holds. Export the checkpoint to bf16 or fp32 instead."
        )
    return result
