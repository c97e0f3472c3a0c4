"""What `quantize` refuses before any work: weights that cannot be stored, and what does not go together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.source import SourceWeights
from ..core.range import require_fp16, require_representable
from ..models.sites import Site
from ..spec.options import QuantConfig
from ..support.errors import ConfigError, ResourceError, SourceError
from .opened import Opened


def needed_bytes(opened: Opened) -> int:
    """Return the disk that the checkpoint, the journal and, where the source cannot be streamed, a copy of it take."""
    files, layouts, target = opened.files, opened.plan.layouts.values(), opened.config.target
    weights = sum(layout.in_features * layout.out_features for layout in layouts)
    packed = sum(layout.stored_bits() for layout in layouts) // 8
    if target is not None and target.sized:
        packed = target.size_bytes or int((target.bits_per_weight or 0) * weights / 8)
    size = files.size_bytes()
    plain = max(size - 2 * weights, size // 10)
    copies = 3 if opened.config.recipe.end_to_end else 2  # the journal's blocks, perhaps revised, and the checkpoint's
    return copies * packed + plain + 2 * files.side_bytes() + (4 * size if files.gguf else 0)


def shares_head(opened: Opened, source: SourceWeights) -> bool:
    """Return whether the source has one tensor for the input and the output embedding."""
    stored = source.plain_fields([], opened.names)
    return any(name not in stored and opened.names.stored(name) not in stored for name in source.tied)


def require_separate_embeddings(opened: Opened, source: SourceWeights) -> None:
    """Raise `ConfigError` for an input embedding to quantize that a plain output embedding shares."""
    site = opened.embedding
    if site is not None and opened.config.head_bits is None and shares_head(opened, source):
        raise ConfigError(
            f"{site.path} is the output embedding too. Add --head-bits, which stores that apart, or leave "
            "--embedding-bits out."
        )


def require_storable(opened: Opened, source: SourceWeights, device: torch.device) -> None:
    """Raise `SourceError` for weights that are not finite, `ConfigError` for those that fp16 scales cannot represent."""
    by_parameter: dict[str, list[tuple[Site, str]]] = {}
    for site in opened.sites.values():
        by_parameter.setdefault(site.parameter, []).append((site, "weight"))
        if site.size.bias:
            by_parameter.setdefault(site.bias_parameter, []).append((site, "bias"))
    for parameter, held in by_parameter.items():  # once each: experts have one for all of them
        whole = source.load(parameter, device)
        for site, name in held:
            value = site.taken(whole) if name == "weight" else site.bias_taken(whole)
            _require_values(opened, site.path, name, value)


def _require_values(opened: Opened, path: str, name: str, value: Tensor) -> None:
    if wrong := int((~value.isfinite()).sum()):
        raise SourceError(f"{path}.{name} has {wrong} values that are NaN or infinite: the source is damaged.")
    try:
        if name == "weight":
            require_representable(value, opened.plan.layouts[path].spec)
        else:
            require_fp16(value)
    except ConfigError as error:
        asked = opened.plan.reasons.get(path, "").partition(" ")[0]
        remedy = f"leave out {asked}" if asked in ("--head-bits", "--embedding-bits") else f"--ignore {path}"
        raise ConfigError(f"{path}.{name} {error}: {remedy}") from error


class out_of_memory_explained:
    """Turns the allocator's error into what to lower."""

    def __init__(self, config: QuantConfig):
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise ResourceError(
                f"out of memory with {self.config.samples} samples of {self.config.seq_len} tokens. Lower --samples "
                "(128 to 64 costs little accuracy) or --seq-len, or choose --device cpu."
            ) from error
