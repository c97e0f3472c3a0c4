"""Quantize a model for programs that know no rotations: into a checkpoint without transforms, then into their format."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.converted import require_held, require_plain_activations
from ..checkpoint.export import export, require_output
from ..checkpoint.gguf_file import require_writable
from ..checkpoint.read import Checkpoint, ModelFiles
from ..checkpoint.write import require_apart
from ..formats.base import Contents
from ..formats.gguf import Gguf
from ..formats.table import FORMATS, OWN
from ..spec.options import QuantConfig
from ..support.errors import ConfigError, PairQuantError, did_you_mean
from .opened import Opened
from .quantize import Progress, QuantizationSummary, quantize


def quantize_as(
    form: str,
    model: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    log_to: Callable[[Mapping[str, Any]], None] | None = None,
) -> QuantizationSummary:
    """Quantize a model and write it in a format: "paroquant", our own, "awq", "gptq", "compressed-tensors", "mlx" or "gguf".

    The options become what the format holds (see `Format.settled`): transforms are folded into the model first, and codes are
    symmetric for GPTQ. What it cannot hold is refused before the work. The rest is as for `quantize`. The checkpoint without
    transforms is written beside the output first, and removed in the end; if the last step fails it stays, and the error says
    how to go on.
    """
    output, config = Path(output), config or QuantConfig()
    how = {
        "device": device,
        "fresh": fresh,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
        "log_to": log_to,
    }
    if form == OWN:
        return quantize(model, output, config, overwrite=overwrite, **how)  # type: ignore[arg-type]  # by name
    if form not in FORMATS:
        known = (OWN, *FORMATS)
        raise ConfigError(f"format is {form!r}, allowed: {', '.join(known)}{did_you_mean(form, known)}")
    require_output(form, output, overwrite)
    require_plain_activations([config.activations], form)
    config = FORMATS[form].settled(config)
    _require_storable(form, model, output, config, trust_remote_code)
    between = output.with_name(f"{output.name}.{OWN}")
    leads = os.environ.get("RANK", "0") == "0"
    if between.exists() and not fresh:
        raise ConfigError(
            f"{str(between)!r} exists: an earlier run was stopped between quantizing and writing {form}. Finish it: "
            f"{_finishing(between, form, output, overwrite)}; or begin anew: --fresh."
        )
    summary = quantize(model, between, config, overwrite=True, **how)  # type: ignore[arg-type]  # by name
    if not leads:  # the leading process writes the format
        return summary
    checkpoint = Checkpoint.open(ModelFiles.find(str(between)))
    layouts = {path: checkpoint.layout(path) for path in checkpoint.stored.linears()}
    bits = FORMATS[form].bits_per_weight(Contents(layouts))
    try:
        export(between, output, form, overwrite=overwrite)
    except PairQuantError as error:
        raise type(error)(
            f"{error} The quantized model stands in {str(between)!r}. To go on: {_finishing(between, form, output, overwrite)}"
        ) from error
    shutil.rmtree(between)
    return replace(summary, output=output, size_after=_size(output), bits_per_weight=bits)


def _finishing(between: Path, form: str, output: Path, overwrite: bool) -> str:
    """Return the command that writes the format from the checkpoint between."""
    more = ["--overwrite"] if overwrite else []
    return shlex.join(["pairquant", "export", str(between), "--to", form, "--output", str(output), *more])


def _require_storable(form: str, model: str | Path, output: Path, config: QuantConfig, trust_remote_code: bool) -> None:
    """Refuse before the work what could not be written after it."""
    opened = Opened.of(model, replace(config, transform="none"), trust_remote_code)
    require_apart(output, opened.files)
    family = opened.files.config.model_type
    require_held(Contents(opened.plan.layouts), FORMATS[form], family, opened.sites, opened.names)
    if form == Gguf.name:
        require_writable(opened.files, opened.skeleton, opened.plan.layouts)


def _size(output: Path) -> int:
    files = [output] if output.is_file() else output.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
