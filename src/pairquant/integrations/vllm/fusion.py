"""Let layers of vLLM's models compute what comes before them: residual and RMSNorm, or SiLU · up (docs/kernels.md).

A norm whose result only one linear reads runs that linear, too: it returns the linear's output, which the linear then passes
on. SiLU · up passes on its input, and the linear computes it. Modules do not say who reads their results, so vLLM's classes
of which that is known are listed here, and everything is checked before it is changed. All else runs as it did.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...backends.table import choose
from ...support.errors import ConfigError
from ..packed_layers import Pending
from .compat import RMSNorm, SiluAndMul, may_change_layers, may_change_norms, tell_compiler
from .linear import PairQuantLinearMethod

#: Environment variable: 0 leaves all layers as they are.
VARIABLE = "PAIRQUANT_FUSE"
#: Decoder layers, by module and class, which give the result of `input_layernorm` to `self_attn` and that of
#: `post_attention_layernorm` to `mlp`, and use neither otherwise. Read in vLLM 0.26 and 0.32.
LAYERS = {
    "glm4.Glm4DecoderLayer",
    "llama.LlamaDecoderLayer",
    "mistral.MistralDecoderLayer",
    "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3DecoderLayer",
}
#: Attention that gives its input to `qkv_proj`, and uses it for nothing else.
ATTENTION = {
    "glm4.Glm4Attention",
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
}
#: MLPs that compute down_proj(act_fn(gate_up_proj(x))).
MLPS = {"llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP"}
LOGGER = logging.getLogger("vllm.pairquant")


def fuse(model: nn.Module) -> None:
    """Change the layers of a model whose weights are about to be loaded, where that is faster, and log how many.

    Raises `ConfigError` if `PAIRQUANT_FUSE` is neither 0 nor 1.
    """
    if not wanted(os.environ.get(VARIABLE, "1")) or not may_change_layers():
        return
    norms = [(norm, linear) for norm, linear in norm_pairs(model) if is_plain(norm) and fits("norm", linear)]
    silus = [(silu, linear) for silu, linear in silu_pairs(model) if type(silu) is SiluAndMul and fits("silu", linear)]
    if not may_change_norms():
        norms = []
    for norm, linear in norms:
        run_linear_in(norm, linear)
    for silu, linear in silus:
        run_in_linear(silu, linear)
    if norms or silus:
        tell_compiler("fused", f"{len(norms)} norms, {len(silus)} activations")
        LOGGER.info(
            "%d norms and %d activations are computed with the linears that follow them (%s=0: by themselves)",
            len(norms),
            len(silus),
            VARIABLE,
        )


def wanted(value: str) -> bool:
    """Return whether the variable asks for it; raises `ConfigError` for a value that is not allowed."""
    if value not in ("0", "1"):
        raise ConfigError(f"{VARIABLE} is {value!r}, allowed: 0, 1. Unset it for the default, 1.")
    return value == "1"


def norm_pairs(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield norms and the linears that alone read their results."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if _name(layer) not in LAYERS:
            continue
        if _name(layer.self_attn) in ATTENTION:
            yield layer.input_layernorm, layer.self_attn.qkv_proj
        if _name(layer.mlp) in MLPS and getattr(layer, "ada_rms_norm_t_cond", None) is None:  # of Mistral, in between
            yield layer.post_attention_layernorm, layer.mlp.gate_up_proj


def silu_pairs(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield activations and the linears that alone read their results."""
    for mlp in model.modules():
        if _name(mlp) in MLPS:
            yield mlp.act_fn, mlp.down_proj


def is_plain(norm: Any) -> bool:
    """Return whether a norm is vLLM's RMSNorm, over all channels and with a weight."""
    return type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None


def fits(before: str, linear: Any) -> bool:
    """Return whether a linear of vLLM is ours, gives out what it computes as it is, and is faster with what comes before it."""
    method = getattr(linear, "quant_method", None)
    if type(method) is not PairQuantLinearMethod or not isinstance(pending := linear.pairquant, Pending):
        return False  # not ours, or from a model that runs already and whose weights are loaded again
    as_it_is = not getattr(linear, "gather_output", False) and getattr(linear, "input_is_parallel", True)
    if linear.skip_bias_add or not as_it_is:
        return False
    layout = replace(pending.layouts[0], out_features=sum(one.out_features for one in pending.layouts))
    backend = choose(layout, linear.qweight.device, pending.dtype)
    return len(pending.layouts) <= backend.most and backend.fuses(before, layout, pending.dtype)


def run_linear_in(norm: Any, linear: Any) -> None:
    """Have the norm run the linear: it returns the linear's output, [..., N]."""
    alone, method = norm._forward_method, linear.quant_method

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:  # the first layer
            return linear.pairquant.run(linear, 0, alone(x), linear.bias)
        weight, eps = norm.weight, norm.variance_epsilon
        return linear.pairquant.run_after_norm(linear, x, residual, weight, eps, linear.bias)

    norm._forward_method, method.before = forward, "norm"


def run_in_linear(silu: Any, linear: Any) -> None:
    """Have the linear compute the activation: it reads gate and up, [..., 2 C]."""
    silu._forward_method, linear.quant_method.before = _same, "silu"


def _same(x: Tensor) -> Tensor:
    return x


def _name(module: Any) -> str:
    """Return the module of vLLM's models and the class of what they are built from; "" for what is from elsewhere."""
    home, _, file = type(module).__module__.rpartition(".")
    return f"{file}.{type(module).__name__}" if home == "vllm.model_executor.models" else ""
