"""PEFT: LoRA on top of quantized layers.

`get_peft_model(model, LoraConfig(target_modules=["q_proj", …]))` then puts a `RotatedLoraLinear` around every `RotatedLinear`
it names, by the mapping of layer types that PEFT keeps in each `LoraConfig` for such layers. Only what
`target_modules="all-linear"` means is no such setting: there PEFT's own search is extended.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..layers.linear import RotatedLinear
from ..layers.model import rotated_linears
from ..support.errors import ConfigError, did_you_mean

#: Ways to begin an adapter that leave the layer's own weight alone.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


class RotatedLoraLinear(LoraLinear):
    """Low-rank adapters beside a frozen `RotatedLinear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any):
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self):
        """Only plain LoRA: the others look into the layer's dense weight, or change it."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Raise `ConfigError` for what plain LoRA cannot do."""
        begin = config.init_lora_weights
        if begin not in INITIALISATIONS:
            allowed = ", ".join(map(repr, INITIALISATIONS))
            hint = did_you_mean(str(begin), [name for name in INITIALISATIONS if isinstance(name, str)])
            raise ConfigError(
                f"init_lora_weights is {begin!r}, which changes the layer's weight; a quantized one allows: {allowed}{hint}"
            )
        if config.use_dora:
            raise ConfigError("use_dora is True, but quantized layers have no dense weight for DoRA; set it to False")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError(
            "an adapter cannot be merged into 4-bit codes in place. merge_and_unload() gives a model in which the "
            "layers with adapters are plain ones."
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the quantized layer, or a plain one with the adapters' weights added, in the dtype the layer computes in."""
        base: RotatedLinear = self.get_base_layer()  # type: ignore[assignment]  # what we are registered for
        names = check_adapters_to_merge(self, adapter_names) if merge else []
        if not names:
            return base
        base.leave_siblings()
        dense = base.to_linear(torch.float32)
        for name in names:
            if name in self.lora_A:
                self._add(dense, name)
        if safe_merge and not all(torch.isfinite(p).all() for p in dense.parameters()):
            raise ConfigError(f"adapters {', '.join(names)} have values that are not finite; they cannot be merged")
        return dense.to(base.dtype)

    @torch.no_grad()
    def _add(self, dense: nn.Linear, name: str) -> None:
        dense.weight.data += self.get_delta_weight(name).to(dense.weight)
        if self.lora_bias[name]:
            bias = self.lora_B[name].bias.to(dense.weight) * self.scaling[name]
            dense.bias = nn.Parameter(bias if dense.bias is None else dense.bias + bias, requires_grad=False)

    def _get_in_out_features(self, module: RotatedLinear) -> tuple[int, int]:  # type: ignore[override]
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: RotatedLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.theta.device, base_layer.dtype


def _know_rotated_linear(initialise):
    """Extend `LoraConfig.__post_init__`: add our layers to the mapping that it makes."""

    @functools.wraps(initialise)
    def with_our_layers(self) -> None:
        initialise(self)
        self._register_custom_module({RotatedLinear: RotatedLoraLinear})

    return with_our_layers


def _count_as_linear(include):
    """Extend PEFT's search for "all-linear", which finds plain linears only, by the layers that are ours."""

    @functools.wraps(include)
    def with_our_layers(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        config = include(config, model)
        if isinstance(asked, str) and asked.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            adapted = {module.base_layer for module in model.modules() if isinstance(module, RotatedLoraLinear)}
            config.target_modules |= {path for path, layer in rotated_linears(model) if layer not in adapted}
        return config

    return with_our_layers


LoraConfig.__post_init__ = _know_rotated_linear(LoraConfig.__post_init__)  # type: ignore[method-assign]
tuners_utils._maybe_include_all_linear_layers = _count_as_linear(tuners_utils._maybe_include_all_linear_layers)
