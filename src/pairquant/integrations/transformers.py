"""Transformers: the `paroquant` quantization config and quantizer (Transformers 5.17 and later).

`AutoModelForCausalLM.from_pretrained(checkpoint)` then puts a `RotatedLinear` wherever the checkpoint holds a
`<path>.qweight`, whatever else config.json says, and checks every stored tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.headers import REMEDY, StoredTensors
from ..spec.checkpoint import QUANT_METHOD, CheckpointConfig
from ..spec.fields import Field, finite
from ..spec.linear import check_fields
from ..spec.patterns import matches
from ..support.errors import CheckpointError, ConfigError

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@register_quantization_config(QUANT_METHOD)
class ParoQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, as Transformers wants to hold it; `checkpoint` is ours."""

    def __init__(self, /, **entries: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # Transformers' enum knows no outsiders
        self.checkpoint = CheckpointConfig.from_dict({**entries, "quant_method": QUANT_METHOD})

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.checkpoint.to_dict()


@register_quantizer(QUANT_METHOD)
class ParoQuantizer(HfQuantizer):
    """Swaps modules before the weights arrive, and checks the weights after."""

    requires_calibration = True
    quantization_config: ParoQuantConfig

    def update_dtype(self, dtype):
        if dtype is not None and dtype not in SUPPORTED_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
            raise ConfigError(f"dtype is {dtype}, allowed: {names}")
        return dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config.checkpoint
        stored = _stored(model, checkpoint_files) if checkpoint_files else None
        _sharing().fold_shared(model)
        _sharing().settle_scales(model)
        quantized = stored.linears() if stored else _by_config(model, config)
        names = _sites().Names.of(model, stored.fields) if stored else _sites().OWN
        sites = _sites().stored_sites(model, names)
        self._renamed = {target for target, sources in names.sources.items() if sources != (target,)}
        experts: dict[str, dict[str, Any]] = {}
        output = model.get_output_embeddings()
        for path in quantized:
            if path not in sites and not _is_what_was_saved(model) and "." not in path:
                continue  # another class on top of the saved blocks: it has no output embedding
            if path not in sites:
                raise CheckpointError(
                    f"the checkpoint holds {path}.qweight, but {type(model).__name__} has no linear layer {path}."
                )
            size = sites[path].size
            layout = config.layout(path, size.in_features, size.out_features, size.bias)
            if stored:
                if faults := layout.misfits():
                    raise CheckpointError(f"{path}: {'; '.join(faults)}. The checkpoint does not belong to this model.")
                check_fields(path, layout, stored.fields_of(path))
            site = sites[path]
            if site.pool is not None:
                experts.setdefault(site.place, {})[path] = (site, layout)
                continue
            is_head = {"head": True} if site.module is output else {}
            module = site.packed_module(layout, **is_head)
            _layers().replace_module(model, site.place, module)
            if parent := site.place.rpartition(".")[0]:
                # Some classes initialise their layers' `.weight` when anything is missing; what is missing is refused later.
                model.get_submodule(parent)._is_hf_initialized = True
        for place, found in experts.items():
            own = stored.has_own_transforms if stored else config.transform_per_expert
            _layers().replace_module(model, place, _sites().packed_experts(list(found.values()), own))
        if stored and _is_what_was_saved(model):
            stored.require_fit({name: Field(t.dtype, tuple(t.shape)) for name, t in _tensors(model)})
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for path, layer in (*_layers().rotated_linears(model), *_layers().rotated_embeddings(model)):
            if not layer.qweight.is_meta:  # offloaded layers stay on disk
                layer.packed.check_values(path)
        self._cast_renamed(model)
        for path, experts in _layers().rotated_experts(model):
            experts.check_values(path)
        if _is_what_was_saved(model):
            _require_complete(model)
        _layers().link_siblings(model)
        return _layers().prepare(model)

    def _cast_renamed(self, model) -> None:
        """Give plain parameters that Transformers has renamed the model's dtype: it takes them for parts of packed layers."""
        keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        keep += tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        dtype = model.config.dtype
        for name, parameter in model.named_parameters():
            if name in self._renamed and parameter.is_floating_point() and not any(part in name for part in keep):
                parameter.data = parameter.data.to(dtype) if isinstance(dtype, torch.dtype) else parameter.data

    def _dequantize(self, model, dtype=None):
        """Decode all layers to the model's dtype; if another dtype is asked for, cast the whole model to it."""
        if offloaded := [path for path, linear in _layers().rotated_linears(model) if linear.qweight.is_meta]:
            raise ConfigError(
                f"{len(offloaded)} layers are offloaded ({offloaded[0]}, …), so their weights cannot be decoded. "
                "Load the model without offload_buffers, or use `pairquant export`."
            )
        if other := [path for path, linear in _layers().rotated_linears(model) if not linear.stands_for_linear]:
            raise ConfigError(
                f"{other[0]} stands for a layer that is not nn.Linear, which cannot be made here. Use `pairquant export`, and "
                "load what it writes."
            )
        if experts := next((path for path, _ in _layers().rotated_experts(model)), None):
            raise ConfigError(f"{experts} holds quantized experts, which are not decoded here. Use `pairquant export`.")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (None, model.config.dtype):
            model = model.to(dtype)
        for path, rotated in list(_layers().rotated_linears(model)):
            _layers().replace_module(model, path, rotated.to_linear(model.dtype))
        for path, embedding in list(_layers().rotated_embeddings(model)):
            if embedding.scale is not None:
                raise ConfigError(f"{path} multiplies its rows, which is not decoded here. Use `pairquant export`.")
            _layers().replace_module(model, path, embedding.to_embedding(model.dtype))
        return model

    def get_state_dict_and_metadata(self, model):
        """Asked for before the configuration is saved: it names the layers that became plain since loading.

        PEFT's `merge_and_unload` makes such.
        """
        layers = _layers()
        if not any(
            any(found(model)) for found in (layers.rotated_linears, layers.rotated_experts, layers.rotated_embeddings)
        ):
            self.remove_quantization_config(model)
            return None, {}
        plain = {path for path, module in model.named_modules() if _sites().is_linear(module)}
        checkpoint = self.quantization_config.checkpoint
        self.quantization_config.checkpoint = replace(
            checkpoint,
            modules_to_not_convert=(*checkpoint.modules_to_not_convert, *sorted(_unlisted(model, plain, checkpoint))),
            shared_rotations=tuple(group for group in checkpoint.shared_rotations if plain.isdisjoint(group)),
        )
        return None, {}

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the quantized layers are; what is quantized stays as it is."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _layers() -> ModuleType:
    """Our layers. Their module takes 0.2 s to register operators, which who only imports Transformers is spared."""
    from ..layers import model as layers

    return layers


def _sites() -> ModuleType:
    """Return where weights live in models, loaded as late as `_layers`."""
    from ..models import sites

    return sites


def _sharing() -> ModuleType:
    """Return what layers of several places become, loaded as late as `_layers`."""
    from ..models import sharing

    return sharing


def _stored(model: Any, checkpoint_files: Sequence[str]) -> StoredTensors:
    """Return what the files hold; a local model's must lie in its directory, whatever its index says."""
    home = model.config.name_or_path
    stored = StoredTensors.of_files(checkpoint_files, home if os.path.isdir(home) else None)
    stored.require_whole_linears()
    return stored


def _is_what_was_saved(model: Any) -> bool:
    """False for another class on top of the saved blocks: its head is new, and meant to be."""
    saved = model.config.architectures
    return isinstance(saved, (list, tuple)) and type(model).__name__ in saved


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return everything that a checkpoint of the model holds."""
    return ((name, t) for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor))


def _require_complete(model: Any) -> None:
    """Raise `CheckpointError` for missing tensors, which Transformers makes up with a warning, and plain ones not finite.

    It marks what it has loaded; offloaded tensors are elsewhere; the values of packed ones have been checked.
    """
    moved = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # accelerate drops the marks of buffers
    layers = (*_layers().rotated_linears(model), *_layers().rotated_embeddings(model))
    packed = {f"{path}.{name}" for path, layer in layers for name in layer.layout.fields()}
    for path, experts in _layers().rotated_experts(model):
        packed |= {f"{path}.{name}" for name, _ in experts.named_buffers()}
    present = {name: t for name, t in _tensors(model) if not t.is_meta}
    loaded = {name for name, t in present.items() if getattr(t, "_is_hf_initialized", False)}
    dispensable = model._keys_to_ignore_on_load_missing or ()
    for name, tensor in present.items():
        if moved and name in packed:
            continue
        if loaded and name not in loaded and not any(re.search(pattern, name) for pattern in dispensable):
            raise CheckpointError(f"tensor {name} is missing. {REMEDY}")
        if name not in packed and not finite(tensor):
            raise CheckpointError(f"tensor {name} has values that are not finite. {REMEDY}")


def _unlisted(model: Any, plain: set[str], config: CheckpointConfig) -> set[str]:
    """Plain linears that no entry names, but for the output embedding, which need not be named."""
    output = model.get_output_embeddings()
    spared = {path for path in plain if model.get_submodule(path) is output}
    return {path for path in plain - spared if not matches(path, config.modules_to_not_convert)}


def _by_config(model: Any, config: CheckpointConfig) -> list[str]:
    """Return every linear but those that the configuration names and the output embedding: without files, a state dict was passed."""
    output = model.get_output_embeddings()
    return [
        site.path
        for site in _sites().sites_in(model)
        if site.module is not output and not matches(site.path, config.modules_to_not_convert)
    ]
