"""What calibrating on text that the model samples itself buys: on that text, and on others.

    python benchmarks/bench_own_text.py MODEL --output FILE [--preset quick] [--samples 16] [--seq-len 512] [--windows 4]
        [--own-windows 8] [--device auto]

The model is quantized on the project's calibration text (setting.py), on as many windows of its own, and on half of each. It is
measured on the usual texts and on other windows of its own. One JSON line a text.
"""

from __future__ import annotations

import torch
from experiment import Experiment, parser_of

from pairquant.checkpoint.read import ModelFiles
from pairquant.jobs.own_text import OwnText
from pairquant.support.windows import window_prefix


class Printed:
    def stage(self, text: str) -> None: ...

    def notice(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = parser_of(__doc__, samples=16, windows=4)
    parser.add_argument("--own-windows", type=int, default=8)
    experiment = Experiment.of(parser.parse_args())
    options, tokenizer = experiment.options, experiment.tokenizer
    files, parameters = ModelFiles.find(options.model), sum(p.numel() for p in experiment.original.parameters())

    def own(purpose: str, count: int) -> torch.Tensor:
        return OwnText(
            files, parameters, tokenizer, options.seq_len, 0, purpose, window_prefix(tokenizer), experiment.device,
            Printed(),
        ).windows(count)  # fmt: skip

    usual, mine = experiment.tokens, own("calibration", options.samples)
    experiment.texts["self"] = own("evaluation", options.own_windows)
    half = options.samples // 2
    for name, tokens in (("usual", usual), ("self", mine), ("both", torch.cat([usual[:half], mine[:half]]))):
        model, _, seconds = experiment.quantized(experiment.config, tokens)
        experiment.note({"calibration": name}, model, seconds)


if __name__ == "__main__":
    main()
