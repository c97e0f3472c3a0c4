"""A small experiment on one model: other ways to quantize a block, other text, or a last training, tried one after the other."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from setting import SETTING, calibration_tokens, numbers, opened
from torch import Tensor

from pairquant.core.linear import decode
from pairquant.evaluation.quality import measure
from pairquant.jobs.texts import HELD_OUT
from pairquant.models.planning import plan_model
from pairquant.models.rounded_inputs import round_inputs, roundings_of
from pairquant.optimize import walk as walking
from pairquant.optimize.end_to_end import EndToEndTraining, Trained
from pairquant.optimize.finished import BlockResult
from pairquant.optimize.homes import InPlace
from pairquant.optimize.strategies import Rounding
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.plan import Plan
from pairquant.support.devices import resolve_device


def parser_of(doc: str | None, samples: int, windows: int) -> argparse.ArgumentParser:
    """The options that all experiments have; samples, windows: to calibrate and to evaluate on by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--device", default="auto")
    return parser


@dataclass
class Experiment:
    """An opened model, the windows to evaluate on, by text, and what is quantized by default on which windows."""

    options: argparse.Namespace
    device: torch.device
    original: torch.nn.Module
    tokenizer: Any
    texts: dict[str, Tensor]
    config: QuantConfig
    tokens: Tensor

    @classmethod
    def of(cls, options: argparse.Namespace) -> Experiment:
        device = resolve_device(options.device)
        original, tokenizer, texts = opened(options.model, device)
        texts = {name: windows[: options.windows] for name, windows in texts.items()}
        setting = SETTING | {"samples": options.samples, "seq_len": options.seq_len}
        config = QuantConfig(preset=options.preset, **setting)
        return cls(options, device, original, tokenizer, texts, config, calibration_tokens(tokenizer, config))

    def quantized(
        self, config: QuantConfig, tokens: Tensor, strategy: Rounding | None = None, first: int | None = None
    ) -> tuple[torch.nn.Module, Plan, float]:
        """The model quantized on these windows, its plan, and the seconds it took.

        strategy: in place of the recipe's; first: quantize only so many blocks.
        """
        model, start = copy.deepcopy(self.original), time.perf_counter()
        plan, blocks = plan_model(model, config)
        usual = walking.strategy_for
        walking.strategy_for = usual if strategy is None else lambda _: strategy
        try:
            for _ in Walk(model, blocks[:first], plan, config, self.device, tokens).run():
                pass
        finally:
            walking.strategy_for = usual
        return model, plan, time.perf_counter() - start

    def note(self, facts: Mapping[str, Any], model: torch.nn.Module, seconds: float) -> None:
        """Measure a model, print what was found, and add a JSON line."""
        row = {
            **facts, "preset": self.options.preset, "samples": self.options.samples, "seq_len": self.options.seq_len,
            "seconds": round(seconds, 1),
            **{text: numbers(measure(model, windows, self.original)) for text, windows in self.texts.items()},
            "model": Path(self.options.model).name, "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }  # fmt: skip
        print(*facts.values(), {text: round(row[text]["kl"], 4) for text in self.texts}, row["seconds"], flush=True)
        with self.options.output.open("a") as out:
            out.write(json.dumps(row) + "\n")


def trained(
    original: torch.nn.Module,
    config: QuantConfig,
    results: Sequence[BlockResult],
    windows: Tensor,
    report: Callable[[int, float], None],
) -> list[Trained]:
    """Train a quantized model as a whole, as the recipe says.

    windows: int64 [n, T], of which an eighth is held out to choose the epoch; report: see `EndToEndTraining`.
    """
    model = copy.deepcopy(original)
    device = next(model.parameters()).device
    _, blocks = plan_model(model, config)
    held = len(windows) // HELD_OUT
    training = EndToEndTraining(model, blocks, list(results), config, device, InPlace(), report=report)
    return training.run(windows[held:], windows[:held] if held else None)


def settled(
    original: torch.nn.Module, config: QuantConfig, results: Sequence[BlockResult] | Sequence[Trained]
) -> torch.nn.Module:
    """Return a copy of the model that computes with these quantized blocks, and rounds what they read."""
    model = copy.deepcopy(original)
    device = next(model.parameters()).device
    _, blocks = plan_model(model, config)
    for block, result in zip(blocks, results, strict=True):
        for path, packed in result.packed.items():
            block.sites[path].put(decode(packed.to(device)))
        round_inputs(block.sites, roundings_of(block.sites, result.packed, device))
        for path, value in result.parameters.items():
            parameter = model.get_parameter(path)
            parameter.data = value.to(parameter.device, parameter.dtype)
    return model
