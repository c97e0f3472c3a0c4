"""The model card: what was done to the model, what came out, how to run it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..checkpoint.describe import README, readme_digest
from ..checkpoint.read import Checkpoint
from ..evaluation.results import Evaluation, read_results
from ..spec.activations import UNROUNDED
from ..support.errors import ConfigError
from ..support.formatting import counted, source_names, token_count

TEMPLATE = Path(__file__).with_name("card.md")
#: Tells a card that may be rendered anew from one that somebody has edited.
MARKER = "Written by pairquant push. Delete this line to keep your changes."
#: Between our text and the card of the model that was quantized.
ORIGINAL = "<!-- The card of the original model -->"
#: Of the original's front matter: what is not true of the quantized model.
NOT_TAKEN = ("model-index", "new_version")


@dataclass(frozen=True)
class Origin:
    """What the hub should know of the model that was quantized. base_model: its hub name; license: as the hub names it.

    Without a license, that of the original's own card.
    """

    base_model: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class OriginalCard:
    """The card that came with the source. data: its front matter; text: what stands below."""

    data: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def parse(cls, content: str) -> OriginalCard:
        """Read a README.md; front matter that is no YAML is left out."""
        content = content.removeprefix("\ufeff")  # a byte order mark
        try:
            card = ModelCard(content, ignore_metadata_errors=True)
        except (ValueError, YAMLError):
            return cls({}, re.sub(r"\A---\n.*?\n---\n", "", content, count=1, flags=re.DOTALL).strip())
        data = card.data.to_dict()
        if isinstance(languages := data.get("language"), list):  # YAML 1.1 reads Norwegian's "no" as false
            data["language"] = ["no" if language is False else language for language in languages]
        elif data.get("language") is False:
            data["language"] = "no"
        return cls(data, card.text.strip())


def write_card(checkpoint: Checkpoint, name: str, origin: Origin, results: Path | None) -> bool:
    """Render README.md for the repository `name`; False if the checkpoint has one that somebody wrote, which stays.

    The source's own card, which came with the checkpoint, stays below our text. results: a file of `pairquant eval --json`.
    Raises `ConfigError` if it is something else.
    """
    original = _original_card(checkpoint)
    if original is None:
        return False
    measured = _results(results) if results else None
    card = _card(checkpoint, name, origin, original, measured)
    (checkpoint.directory / README).write_text(str(card), encoding="utf-8")
    return True


def _original_card(checkpoint: Checkpoint) -> OriginalCard | None:
    """Return the source's card, also from below the one that we have rendered; None if somebody has written another since."""
    readme = checkpoint.directory / README
    if not readme.is_file():
        return OriginalCard()
    content = readme.read_text(encoding="utf-8", errors="replace")
    if MARKER in content:
        _, rendered, below = content.partition(f"\n{ORIGINAL}\n")
        return OriginalCard(OriginalCard.parse(content).data, below.strip()) if rendered else OriginalCard()
    if readme_digest(checkpoint.directory) == checkpoint.report.get("readme_sha256"):
        return OriginalCard.parse(content)
    return None


def _front_matter(checkpoint: Checkpoint, origin: Origin, original: dict[str, Any]) -> ModelCardData:
    """Return the original's, but for what is other in the quantized model."""
    taken = {key: value for key, value in original.items() if key not in NOT_TAKEN}
    ours = ["paroquant", "pairquant", "quantized", *(f"{bits}-bit" for bits in widths(checkpoint))]
    tags = taken.get("tags")
    named = {"base_model": origin.base_model, "base_model_relation": "quantized"} if origin.base_model else {}
    return ModelCardData(**{
        **taken,
        "license": origin.license or taken.get("license") or "unknown",
        "library_name": "transformers",
        "pipeline_tag": taken.get("pipeline_tag") or "text-generation",
        "tags": list(dict.fromkeys([*(tags if isinstance(tags, list) else []), *ours])),
        **named,
    })  # fmt: skip


def widths(checkpoint: Checkpoint) -> list[int]:
    """Return bits of the codes, each once, the default's first."""
    default = checkpoint.config.spec.bits
    found = {checkpoint.layout(path).bits for path in checkpoint.stored.linears()}
    return sorted(found, key=lambda bits: (bits != default, bits))


def _card(
    checkpoint: Checkpoint, name: str, origin: Origin, original: OriginalCard, results: dict[str, Any] | None
) -> ModelCard:
    data = _front_matter(checkpoint, origin, original.data)
    config = checkpoint.report.get("config")
    recipe = config.get("recipe") if isinstance(config, dict) else None
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        below=f"{ORIGINAL}\n{original.text}" if original.text or original.data else None,
        name=name,
        base=origin.base_model,
        bits=" and ".join(map(str, widths(checkpoint))),
        facts=_facts(checkpoint),
        results=results,
        recipe=json.dumps(recipe, indent=1) if recipe else None,
    )


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    config, provenance = checkpoint.config, checkpoint.config.provenance or {}
    weights = sum(file.stat().st_size for file in checkpoint.directory.glob("*.safetensors"))
    facts = {
        "format": "; ".join(checkpoint.specs()),
        "bits per weight": f"{checkpoint.bits_per_weight():.2f} in {counted(len(checkpoint.stored.linears()), 'linear layer')}",
        "size": f"{weights / 1e9:.2f} GB" if weights >= 1e9 else f"{weights / 1e6:.1f} MB",
    }
    if (activations := checkpoint.activations()) != UNROUNDED:
        facts["activations"] = f"{activations}: what layers round their inputs to when they run"
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
    """Return text that stays within its cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _results(file: Path) -> dict[str, Any]:
    """Read the results of one model for the template; raises `ConfigError` for any other file."""
    found = read_results(file)
    if not isinstance(found, Evaluation):
        raise ConfigError(f"results {str(file)!r} are not those of `pairquant eval --json`: they hold several models")
    reference = found.reference
    return {
        "rows": [{"text": _cell(Path(text).name), **vars(quality)} for text, quality in found.texts.items()],
        "reference": _cell(Path(reference).name if Path(reference).is_absolute() else reference) if reference else None,
        "device": _cell(found.device),
        "versions": found.versions,
    }
