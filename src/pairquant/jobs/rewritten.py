"""The tensors of a model into which transforms are folded, as `fold` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import SourceWeights
from ..checkpoint.write import Entry
from ..models.foldable_outside import Outside
from ..models.folding import Foldable, Transforms, restored
from ..models.folding import fold as fold_block
from ..spec.fields import Field
from ..support.errors import ConfigError
from .opened import Opened


class Rewritten:
    """The tensors that folding changes, computed when they are asked for, block by block; one block is held at a time."""

    def __init__(
        self, opened: Opened, source: SourceWeights, found: list[Foldable], outside: Outside, transforms: Transforms,
        device: torch.device,
    ):  # fmt: skip
        self.opened, self.source, self.found, self.outside = opened, source, found, outside
        self.transforms, self.device = transforms, device
        self.held: tuple[int, dict[str, Tensor]] = (-1, {})

    def entries(self) -> dict[str, Entry]:
        """Return every tensor that changes, first those outside the blocks, by the names of the files."""
        entries = dict(self._outside())
        for index, block in enumerate(self.opened.blocks):
            for own, parameter in block.module.named_parameters():
                name = f"{block.path}.{own}"
                for stored in self.source.as_stored(name, parameter.to("meta")):
                    if (kept := self.source.stored.fields.get(stored)) is not None:
                        entries[stored] = Entry(kept, lambda i=index, stored=stored: self._of_block(i)[stored])  # type: ignore[misc]
        return entries

    def _of_block(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one block after folding."""
        if self.held[0] != index:
            self.held = (-1, {})
            block = self.opened.blocks[index]
            self.source.enter(block, self.device, torch.float32)
            try:
                fold_block(self.found[index], self.transforms.to(self.device), self._dtypes())
                tensors: dict[str, Tensor] = {}
                for own, parameter in block.module.named_parameters():
                    for stored, value in self.source.as_stored(f"{block.path}.{own}", parameter.detach()).items():
                        if (kept := self.source.stored.fields.get(stored)) is not None:
                            tensors[stored] = _cast(stored, value, kept.dtype)
            finally:
                self.source.leave(block)
            self.held = (index, tensors)
        return self.held[1]

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes in which the weights of norms are stored."""
        norms = [norm for found in self.found for norm in found.norms]
        fields = {f"{norm.place}.weight": self.source.field(f"{norm.place}.weight") for norm in norms}
        return {name: field.dtype for name, field in fields.items() if field is not None}

    def _outside(self) -> Iterator[tuple[str, Entry]]:
        """Yield the embedding, the last norm and the output embedding, if the stream is rotated."""
        outside = self.outside
        if self.transforms.stream is None or outside.embedding is None or outside.norm is None:
            return
        for module, place in (
            (outside.embedding.module, outside.embedding.place),
            (outside.norm.module, outside.norm.place),
            *((matrix.module, matrix.place) for matrix in outside.norm.readers),
        ):
            parameter = module.get_parameter("weight")
            source = self.source.field(f"{place}.weight")
            name = f"{self.opened.names.module(place)}.weight"
            kept = Field(parameter.dtype if source is None else source.dtype, tuple(parameter.shape))
            yield name, Entry(kept, partial(self._folded_outside, module, name, kept))

    def _folded_outside(self, module: Any, name: str, kept: Field) -> Tensor:
        embedding, norm = self.outside.embedding, self.outside.norm
        assert embedding is not None, "the stream is rotated"
        assert norm is not None, "the stream is rotated"
        with restored(module):
            weight = module.get_parameter("weight")
            weight.data = weight.data.float()
            if module is embedding.module:
                embedding.transform_columns(self._on_cpu(), None)
            elif module is norm.module:
                norm.put(torch.ones_like(norm.weight))
            else:
                (reader,) = norm.readers
                reader.put(reader.weight * norm.weight)
                reader.transform_columns(self._on_cpu(), None)
            return _cast(name, weight.data, kept.dtype)

    def _on_cpu(self) -> Tensor | None:
        return None if self.transforms.stream is None else self.transforms.stream.cpu()


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it is stored. Raises `ConfigError` for values that the dtype cannot hold."""
    cast = value.to("cpu", dtype).contiguous()
    if dtype.is_floating_point and not cast.isfinite().all():
        raise ConfigError(
            f"tensor {name} reaches {value.abs().max():.3g} after folding, more than {dtype} holds. Store the source in bfloat16, or "
            "quantize it with --transform rotated."
        )
    return cast
