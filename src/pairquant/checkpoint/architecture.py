"""Which class of Transformers a model is, and whether that is one that can be quantized; what a model's tensors are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..spec.fields import Field
from ..support.errors import SourceError

#: How the names of decoder-only language models end.
DECODERS = ("ForCausalLM", "LMHeadModel")
SUPPORTED = "Decoder-only language models (…ForCausalLM) are supported."


def auto_class(config: Any) -> Any:
    """Return the one of Transformers' auto classes that builds the class which config.json names.

    That is `AutoModelForCausalLM`, unless only `AutoModelForImageTextToText` knows the class (a language model with a
    vision tower), or `AutoModelForMultimodalLM` (one that hears).
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    named = set(config.architectures or ())
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        built: Any = auto._model_mapping.get(type(config), None) or ()
        if named & {each.__name__ for each in (built if isinstance(built, tuple) else (built,))}:
            return auto
    return AutoModelForCausalLM


def require_decoder_only(config: Any, name: str) -> None:
    """Raise `SourceError` for an encoder-decoder model, before it is built."""
    if getattr(config, "is_encoder_decoder", False):
        kind = (config.architectures or [type(config).__name__])[0]
        raise SourceError(f"{name!r} is an encoder-decoder model ({kind}). {SUPPORTED}")


def require_named_class(config: Any, model: nn.Module, name: str) -> None:
    """Raise `SourceError` if `model` was built from `config` as something else than the class that config.json names.

    The parts that only the other class has would be lost or random. Two names of decoders count as one class: some files
    name it by an older spelling. Custom code says itself which class it is.
    """
    built = type(model).__name__
    named = config.architectures or [built]
    spelling = built.endswith(DECODERS) and any(each.endswith(DECODERS) for each in named)
    custom = type(model).__module__.startswith("transformers_modules")
    if built not in named and not spelling and not custom:
        raise SourceError(
            f"{name!r} is a {named[0]}, as its config.json says, and would be loaded as a {built}: another kind of model. "
            f"{SUPPORTED}"
        )


def require_one_tensor_a_name(model: nn.Module, name: str) -> None:
    """Raise `SourceError` for a GGUF file of a model with experts.

    Transformers holds all experts of a block in one parameter, and does not load them again under its name here.
    """
    fused = [
        f"{path}.{own}"
        for path, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    if fused:
        raise SourceError(
            f"{name!r} is a GGUF file of a model with experts ({fused[0]}, …), which cannot be written so that it loads again. "
            "Quantize the model's own directory, with safetensors files."
        )


def expected_fields(model: nn.Module) -> dict[str, Field]:
    """Return every tensor that the model's files must hold: tied ones once, and without what the model can do without."""
    tied = getattr(model, "all_tied_weights_keys", None)
    spared = set(tied) if isinstance(tied, Mapping) else set()
    dispensable = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return {
        name: Field(tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in spared and not any(re.search(pattern, name) for pattern in dispensable)
    }
