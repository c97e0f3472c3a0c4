"""The model card: what was done to the model, what came out, how to run it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoint.files import read_json
from ..checkpoint.read import Checkpoint
from ..support.errors import CheckpointError, ConfigError
from ..support.formatting import source_names, token_count

TEMPLATE = Path(__file__).with_name("card.md")
#: Tells a card that may be rendered anew from one that somebody has edited.
MARKER = "Written by pairquant push. Delete this line to keep your changes."
#: What `pairquant eval --json` says of each text.
MEASURES = ("tokens", "perplexity", "kl", "top1")


@dataclass(frozen=True)
class Origin:
    """What the hub should know of the model that was quantized. base_model: its hub name; license: as the hub names it."""

    base_model: str | None = None
    license: str = "unknown"


def write_card(checkpoint: Checkpoint, name: str, origin: Origin, results: Path | None) -> bool:
    """Render README.md for the repository `name`; False if the checkpoint has one that somebody wrote, which stays.

    results: a file of `pairquant eval --json`. Raises `ConfigError` if it is something else.
    """
    readme = checkpoint.directory / "README.md"
    if readme.is_file() and MARKER not in readme.read_text(errors="replace"):
        return False
    measured = _results(results) if results else None
    readme.write_text(str(_card(checkpoint, name, origin, measured)))
    return True


def _card(checkpoint: Checkpoint, name: str, origin: Origin, results: dict[str, Any] | None) -> ModelCard:
    data = ModelCardData(
        license=origin.license,
        base_model=origin.base_model,
        base_model_relation="quantized" if origin.base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["paroquant", "pairquant", "quantized", f"{checkpoint.config.bits}-bit"],
    )
    config = checkpoint.report.get("config")
    recipe = config.get("recipe") if isinstance(config, dict) else None
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        base=origin.base_model,
        format=checkpoint.config,
        facts=_facts(checkpoint),
        results=results,
        recipe=json.dumps(recipe, indent=1) if recipe else None,
    )


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    config, provenance = checkpoint.config, checkpoint.config.provenance or {}
    weights = sum(file.stat().st_size for file in checkpoint.directory.glob("*.safetensors"))
    facts = {
        "format": f"{config.bits} bits, groups of {config.group_size}, {config.rotations} rotations",
        "bits per weight": f"{checkpoint.bits_per_weight():.2f} in {len(checkpoint.stored.linears())} linear layers",
        "size": f"{weights / 1e9:.2f} GB" if weights >= 1e9 else f"{weights / 1e6:.1f} MB",
    }
    if config.shared_rotations:
        facts["shared transforms"] = str(len(config.shared_rotations))
    for key in ("tool", "preset", "seed"):
        if key in provenance:
            facts[key] = _cell(provenance[key])
    if texts := provenance.get("calibration"):
        facts["calibration"] = _calibration(texts, provenance.get("calibration_tokens"))
    return facts


def _calibration(texts: Any, tokens: Any) -> str:
    return _cell(", ".join(filter(None, (source_names(texts), token_count(tokens)))))


def _cell(value: Any) -> str:
    """Text that stays within its cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def read_results(file: Path) -> dict[str, Any]:
    """What `pairquant eval --json` has written: `texts`, name → `MEASURES`. Raises `ConfigError` if it is something else."""
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise ConfigError(f"results {str(file)!r} cannot be read. Make them with `pairquant eval --json`.") from error
    texts = content.get("texts")
    if not isinstance(texts, dict) or not all(_measured(row) for row in texts.values()):
        raise ConfigError(
            f"results {str(file)!r} are not those of `pairquant eval --json`: they hold no measured texts"
        )
    return content


def _results(file: Path) -> dict[str, Any]:
    content = read_results(file)
    rows = [{"text": _cell(Path(text).name), **row} for text, row in content["texts"].items()]
    reference = content.get("reference")
    return {
        "rows": rows,
        "reference": _cell(Path(reference).name if Path(reference).is_absolute() else reference) if reference else None,
        "device": _cell(content.get("device", "an unknown device")),
        "versions": content.get("versions") or {},
    }


def _measured(row: Any) -> bool:
    numbers = (int, float)
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), numbers) for name in MEASURES[:2])
        and all(isinstance(row.get(name), (*numbers, type(None))) for name in MEASURES)
    )
