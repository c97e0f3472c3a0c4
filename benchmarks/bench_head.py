"""What a quantized output embedding costs: KL with it in 16 bits, and quantized in several ways after the same blocks.

    python benchmarks/bench_head.py MODEL --output FILE [--heads head_bits=4,head.steps=0 head_bits=4,head.steps=200 …] [--preset fast]
        [--group-size 64] [--samples 64] [--seq-len 1024] [--windows 80] [--device auto]

The blocks are quantized once; each entry of --heads is options of `QuantConfig`, or settings of its recipe, for the output
embedding alone. `head.steps=200` trains it, 0 does not. One JSON line a row; bits_per_weight counts all quantized layers.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

from experiment import Experiment, parser_of
from recipes import config_from
from setting import SETTING
from torch import Tensor

from pairquant.models.planning import plan_model
from pairquant.optimize.finished import BlockResult
from pairquant.optimize.streams import Streams
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import PackedLinear, bits_per_weight
from pairquant.spec.options import QuantConfig


@dataclass
class Blocks:
    """Finished decoder blocks, and the states at their end: what a walk goes on from."""

    results: list[BlockResult]
    states: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.results)

    def result(self, index: int) -> BlockResult:
        return self.results[index]

    def snapshot(self) -> tuple[int, dict[str, Tensor]]:
        return self.count, self.states


class Heads:
    """A model whose decoder blocks are quantized once, by the first of the options, and its output embedding anew by each."""

    def __init__(self, experiment: Experiment, first: QuantConfig):
        self.experiment, self.model = experiment, copy.deepcopy(experiment.original)
        self.done = Blocks([])
        start = time.perf_counter()
        results = self._walked(first)
        self.seconds = time.perf_counter() - start - results[-1].seconds
        self.done.results = results[:-1]
        self.leave_plain()

    def quantize(self, config: QuantConfig) -> tuple[list[PackedLinear], float]:
        """Quantize the output embedding by these options; return all packed linears, and the seconds that it took."""
        self.leave_plain()
        results = [*self.done.results, *self._walked(config)]
        return [packed for result in results for packed in result.packed.values()], results[-1].seconds

    def leave_plain(self) -> None:
        """Give the output embedding its own weight back."""
        weight = self.experiment.original.get_output_embeddings().weight
        self.model.get_output_embeddings().weight.data.copy_(weight.data)

    def _walked(self, config: QuantConfig) -> list[BlockResult]:
        plan, blocks = plan_model(self.model, config)

        def keep(index: int, streams: Streams) -> None:
            if index == len(blocks) - 2:
                self.done.states = streams.tensors()

        walk = Walk(
            self.model, blocks, plan, config, self.experiment.device, self.experiment.tokens, finished=self.done,
            notice=print, kept=keep,
        )  # fmt: skip
        return list(walk.run())


def main() -> None:
    parser = parser_of(__doc__, samples=64, windows=80)
    parser.set_defaults(preset="fast", seq_len=1024)
    usual = [f"head_bits={bits},head.steps={steps}" for bits in (4, 6, 8) for steps in (0, 200)]
    parser.add_argument("--heads", nargs="+", default=usual)
    parser.add_argument("--group-size", type=int, default=SETTING["group_size"])
    options = parser.parse_args()
    experiment = Experiment.of(options)
    setting = {**SETTING, "samples": options.samples, "seq_len": options.seq_len, "group_size": options.group_size}
    configs = {text: config_from(f"{options.preset}:{text}", **setting) for text in options.heads}
    heads = Heads(experiment, next(iter(configs.values())))
    layouts = [packed.layout for result in heads.done.results for packed in result.packed.values()]
    experiment.note(
        {"head": "16 bits", "bits_per_weight": round(bits_per_weight(layouts), 3)}, heads.model, heads.seconds
    )
    for text, config in configs.items():
        packed, seconds = heads.quantize(config)
        size = bits_per_weight([each.layout for each in packed])
        experiment.note({"head": text, "bits_per_weight": round(size, 3)}, heads.model, seconds)


if __name__ == "__main__":
    main()
