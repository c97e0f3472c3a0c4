"""What vLLM's experts compute between their products, on what our products give: gates, then ups, side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.experts_base import ACTIVATIONS
from .compat import activate_experts

#: gpt-oss's constants, which vLLM's kernel for it has built in: where values are cut off, and the factor of the sigmoid.
OAI_LIMIT, OAI_ALPHA = 7.0, 1.702
#: Activations without a gate, by PyTorch.
ALONE: dict[str, Callable[[Tensor], Tensor]] = {f"{name}_no_mul": function for name, function in ACTIVATIONS.items()}
ALONE["relu2_no_mul"] = lambda x: F.relu(x).square()


def known_activation(layer: Any) -> str:
    """Return which of `ACTIVATIONS` the layer has between gate and up; "" if another."""
    name = layer.activation.value
    return name if name in ACTIVATIONS and layer.swiglu_limit is None else ""


def between(layer: Any, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return what computes a layer's activation where it is none of `ACTIVATIONS`: [A, 2 I], or [A, I] without a gate → [A, I].

    On GPUs vLLM's own kernels do. On CPUs vLLM lacks some of these, so PyTorch computes them here; None for one that is not known here.
    """
    if device.type == "cpu":
        return _by_pytorch(layer)
    if layer.activation.value == "swigluoai":
        return lambda joined: activate_experts(layer, _interleaved(joined))
    return partial(activate_experts, layer)


def _by_pytorch(layer: Any) -> Callable[[Tensor], Tensor] | None:
    name, limit = layer.activation.value, layer.swiglu_limit
    if name in ALONE:
        return ALONE[name]
    if name == "swigluoai":
        return partial(_cut_off_swiglu, limit=OAI_LIMIT, alpha=OAI_ALPHA, beta=1.0)
    if name == "swigluoai_uninterleave" and limit is not None:
        alpha = 1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha
        beta = 0.0 if layer.swiglu_beta is None else layer.swiglu_beta
        return partial(_cut_off_swiglu, limit=limit, alpha=alpha, beta=beta)
    if name == "silu" and limit is not None:
        return partial(_cut_off_swiglu, limit=limit, alpha=1.0, beta=0.0)
    return None


def _cut_off_swiglu(joined: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    """Return gate · sigmoid(alpha · gate) · (up + beta), where gate is at most `limit` and up at most that far from 0."""
    gate, up = joined.float().chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + beta)).to(joined.dtype)


def _interleaved(joined: Tensor) -> Tensor:
    """Turn [A, gates then ups] into gate, up, gate, up …, as vLLM's kernel for gpt-oss wants them."""
    return torch.stack(joined.chunk(2, -1), -1).flatten(-2)
