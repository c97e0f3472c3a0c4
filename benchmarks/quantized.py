"""What a recipe makes of a model, in memory: for benchmarks that measure one recipe after the other."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from setting import calibration_tokens

from pairquant.models.planning import plan_model
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import bits_per_weight
from pairquant.spec.options import QuantConfig


@dataclass(frozen=True)
class Quantized:
    """model: computes with the decoded weights, in the original's dtype; seconds: of quantization, the text's included."""

    model: torch.nn.Module
    bits_per_weight: float
    seconds: float


def quantized(original: torch.nn.Module, tokenizer: Any, config: QuantConfig) -> Quantized:
    """A copy of the original, on its device, quantized on the text that the options name. Ends with the blocks: a recipe's
    training of the whole model is bench_end_to_end.py's.
    """
    model, start = copy.deepcopy(original), time.perf_counter()
    tokens = held_out = None
    if config.recipe.needs_text:
        training = config.recipe.training
        count = config.samples + (training.validation_samples if training else 0)
        tokens = calibration_tokens(tokenizer, replace(config, samples=count))
        tokens, held_out = tokens[: config.samples], tokens[config.samples :]
    plan, blocks = plan_model(model, config)
    walk = Walk(model, blocks, plan, config, next(original.parameters()).device, tokens, held_out)
    layouts = [packed.layout for result in walk.run() for packed in result.packed.values()]
    return Quantized(model, bits_per_weight(layouts), time.perf_counter() - start)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Device and versions, for a row."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
