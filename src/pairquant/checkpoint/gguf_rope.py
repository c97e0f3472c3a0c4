"""The rotary embedding in GGUF files, to and from Transformers' parameters.

Transformers 5.19 to 5.24 read its base and nothing else for most families: a LLaMA 3.1 would answer wrongly beyond the
positions that it was first trained on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.errors import SourceError

#: Tensors that say by how much the waves are stretched: of LLaMA 3.1 and later, and of Phi's kind.
FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_long.weight"
#: How far stored factors may be from those of the parameters that are found for them: they are float32.
ROUNDING = 1e-5
#: The bounds of the waves that LLaMA 3.1 and its successors stretch in part; only their ratios to the context matter.
USUAL = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
#: Kinds of stretching that a file names → Transformers' parameters and the keys that have their values.
STRETCHINGS = {
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_max_position_embeddings": "original_context_length"},
}
#: The same for parameters that a file need not give: without them Transformers and llama.cpp take the same values, 32 and 1.
#: `attn_factor` is none of them: llama.cpp multiplies what yarn computes from the factor by it, Transformers'
#: `attention_factor` takes the place of what yarn computes.
OPTIONAL = {"yarn": {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}}


def rope_of(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; of a model with two kinds of attention, those of its full attention."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def rope_factors_in(source: Path) -> Tensor | None:
    """Return what a GGUF file has the frequencies divided by, float32 [head width / 2]; None where it says nothing."""
    from gguf import GGUFReader

    return _tensor(GGUFReader(source), FACTORS)


def rope_factors(config: Any) -> Tensor | None:
    """Return what the frequencies are divided by, float32 [head width / 2]; None unless they are stretched as LLaMA 3.1's.

    Waves longer than the context that the model was trained on, divided by `low_freq_factor`, are stretched by `factor`,
    those shorter than it divided by `high_freq_factor` are not, and those between by something in between.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return llama3_factors(rope, width)


def llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """Return the factors of the kind "llama3" for heads of a width, float32 [width / 2]."""
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def with_rope(config: Any, source: Path) -> Any:
    """Return the configuration that Transformers made of a GGUF file, with the heads' width and the rotary embedding it says.

    Raises `SourceError` for a rotary embedding that is not translated into Transformers' parameters.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    family = _value(reader, "general.architecture")
    width = _value(reader, f"{family}.attention.key_length")
    if getattr(config, "head_dim", None) and width and width == _value(reader, f"{family}.attention.value_length"):
        config.head_dim = width
    if not getattr(config, "rope_parameters", None) or rope_of(config).get("rope_type", "default") != "default":
        return config
    if _tensor(reader, LONG_FACTORS) is not None:
        raise _untranslated(source, LONG_FACTORS)
    said = {name: _value(reader, f"{family}.rope.scaling.{name}") for name in _names(reader, f"{family}.rope.scaling.")}
    if (kind := said.pop("type", None)) not in (None, "none"):
        _stretch(config, _of_kind(kind, said, source))
    elif (factors := _tensor(reader, FACTORS)) is not None and not torch.all(factors == 1):
        found = _of_factors(factors.double(), config)
        if found is None:
            raise _untranslated(source, FACTORS)
        _stretch(config, found)
    return config


def _stretch(config: Any, parameters: dict[str, Any]) -> None:
    """Give the rotary embedding, of a model with two kinds of attention that of its full attention, other parameters."""
    rope = {**rope_of(config), **parameters}
    nested = "full_attention" in config.rope_parameters
    config.rope_parameters = {**config.rope_parameters, "full_attention": rope} if nested else rope


def _of_kind(kind: str, said: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return Transformers' parameters of a stretching that a file names; said: its other keys."""
    needed, optional = STRETCHINGS.get(kind, {}), OPTIONAL.get(kind, {})
    known = {*needed.values(), *optional.values(), "finetuned", "original_context_length"}
    if not needed or not set(needed.values()) <= set(said) <= known:
        raise _untranslated(source, f"rope.scaling.type {kind!r} with {', '.join(sorted(said)) or 'nothing else'}")
    return {"rope_type": kind, **{name: said[key] for name, key in (needed | optional).items() if key in said}}


def _of_factors(factors: Tensor, config: Any) -> dict[str, Any] | None:
    """Return the parameters of the kind "llama3" whose factors these are; None if there are none.

    The largest factor is that of the longest waves. A wave between the bounds is kept by a share that grows linearly with
    1 / its length, which gives the context that the model was trained on: from one wave with the usual bounds, or from two.
    """
    width, theta = 2 * len(factors), rope_of(config)["rope_theta"]
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width) / (2 * math.pi)
    factor = float(factors.max())
    shares = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (shares > ROUNDING) & (shares < 1 - ROUNDING)
    if factor <= 1 or not between.any():
        return None
    low, high = USUAL.values()
    context = float(((shares[between] * (high - low) + low) / rates[between]).median())
    guesses = [{**USUAL, "original_max_position_embeddings": round(context)}]
    if between.sum() > 1:
        x, y = rates[between], shares[between]
        steepness = float((y[-1] - y[0]) / (x[-1] - x[0]))
        start = steepness * float(x[0]) - float(y[0])  # low / (high - low)
        if start > 0:
            high = 1 + 1 / start
            guess = {"low_freq_factor": 1.0, "high_freq_factor": round(high, 3)}
            guesses.append({**guess, "original_max_position_embeddings": round(steepness * (high - 1))})
    for guess in guesses:
        found = {"rope_type": "llama3", "factor": round(factor, 4), **guess}
        again = llama3_factors({"rope_theta": theta, **found}, width)
        if torch.allclose(again.double(), factors, rtol=ROUNDING, atol=0):
            return found
    return None


def _untranslated(source: Path, what: str) -> SourceError:
    return SourceError(
        f"{source.name} stretches the rotary embedding in a way that PairQuant does not translate ({what}): answers would "
        "be wrong at later positions. Quantize the original model's Transformers directory."
    )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _names(reader: Any, start: str) -> list[str]:
    """Return the ends of the keys that begin so."""
    return [key.removeprefix(start) for key in reader.fields if key.startswith(start)]


def _tensor(reader: Any, name: str) -> Tensor | None:
    found = [tensor for tensor in reader.tensors if tensor.name == name]
    return torch.from_numpy(found[0].data.copy()) if found else None
