"""The model that is quantized when transforms are folded: folded into a directory beside the output, kept until that is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..checkpoint.record import FOLDED, REPORT_FILE, read_record
from ..checkpoint.source import SourceWeights
from ..checkpoint.write import require_apart, require_space
from ..optimize.ranks import Ranks, processes
from ..spec.options import QuantConfig
from ..support.devices import resolve_device
from ..support.errors import ConfigError
from .fold import Progress, fitting, fold, identity
from .opened import Opened
from .plan import Planner
from .progress import Told
from .refusals import needed_bytes
from .texts import Texts


@contextmanager
def folded(
    model: str | Path,
    output: Path,
    config: QuantConfig,
    device: str,
    fresh: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> Iterator[tuple[Path, int]]:
    """Give the model with its transforms folded into it, in a directory beside the output, and the source's size in bytes.

    The directory stays until the context is left without an error, so that a stopped run goes on with it.
    """
    if processes() > 1:
        raise ConfigError(
            f"transform is 'folded' in {processes()} processes, allowed: 1. Fold first (pairquant fold), then quantize what that "
            "wrote in all of them with --transform none."
        )
    opened = Opened.of(model, replace(config, transform="none"), trust_remote_code)
    files = opened.files
    require_apart(output, files)
    require_space(output, 2 * needed_bytes(opened))
    if config.target is not None:
        _require_reachable(opened, output)
    home = output.with_name(f".{output.name}.folded")
    if fresh or not is_there(home, model, config, device, trust_remote_code, progress):
        fold(model, home, config, device=device, overwrite=True, trust_remote_code=trust_remote_code, progress=progress)
    else:
        progress.notice("continuing with the model that an earlier run folded")
    yield home, files.size_bytes()
    shutil.rmtree(home)


def _require_reachable(opened: Opened, output: Path) -> None:
    """Refuse a size that no choice of forms has, before the model is folded; of a GGUF file, that takes a copy of its weights."""
    assert opened.config.target is not None, "asked for where a size is wanted"
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as spill:
        source = SourceWeights.open(opened.files, opened.skeleton, opened.names, Path(spill))
        try:
            Planner(opened, source).require_reachable(opened.config.target)
        finally:
            source.close()


def is_there(
    output: Path, model: str | Path, config: QuantConfig, device: str, trust_remote_code: bool, progress: Told
) -> bool:
    """Tell whether `output` holds what `fold` would write there for these arguments and the text that they name as it is now."""
    record = read_record(output / REPORT_FILE)
    facts, provenance = record.get(FOLDED), record.get("provenance")
    if not (isinstance(facts, Mapping) and isinstance(provenance, Mapping) and (output / "config.json").is_file()):
        return False
    opened, target = Opened.of(model, fitting(config), trust_remote_code), resolve_device(device)
    if any(_plain(facts.get(name)) != _plain(value) for name, value in identity(opened, target).items()):
        return False
    text = Texts.drawn(opened, Ranks(), target, progress).calibration
    return text is not None and text.digest == provenance.get("calibration_sha256")


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
