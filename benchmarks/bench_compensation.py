"""Low-rank and learned compensation of what rounding loses, against smaller groups, more rotations and more bits, at equal size.

    python benchmarks/bench_compensation.py MODEL --output FILE [--cases OPTIONS[+KIND:RANK] …] [--preset best] [--samples 64]
        [--seq-len 1024] [--windows 80] [--blocks N] [--rate 0.03] [--device auto]

A case is options of `QuantConfig`, or settings of its recipe (see recipes.py), and what is added to each linear: kind and rank, as
corrections.py says: `bits=3`, `bits=3,group_size=32`, `bits=3+svd:16`, `bits=3+silu:16`. Later blocks are fitted on the corrected
ones. One JSON line a case; bits_per_weight counts everything stored, added_bits is the correction's part of it;
error_left is the share of a linear's squared error that the closed form leaves, block_losses are those of all blocks
together, before and after the training.
"""

from __future__ import annotations

from corrections import KINDS, Compensating, added_bits
from experiment import Experiment, parser_of
from recipes import config_from
from setting import SETTING

from pairquant.spec.options import QuantConfig


def correction_in(text: str) -> tuple[str, int]:
    """Kind and rank: "silu:16"."""
    kind, _, rank = text.partition(":")
    if kind not in KINDS or not rank.isdecimal() or not int(rank):
        raise SystemExit(f"correction {text!r} is none of {', '.join(KINDS)} with a rank after it, such as silu:16")
    return kind, int(rank)


def run(experiment: Experiment, case: str, config: QuantConfig, correction: tuple[str, int] | None) -> None:
    """Quantize, measure, and add the row to the file."""
    options = experiment.options
    strategy = Compensating(*correction, options.rate) if correction else None
    model, plan, seconds = experiment.quantized(config, experiment.tokens, strategy, options.blocks)
    sizes = [(layout.out_features, layout.in_features) for layout in plan.layouts.values()]
    added = added_bits(*correction, sizes) if correction else 0.0
    facts = {
        "case": case, "bits": config.bits, "group_size": config.group_size, "rotations": config.rotations,
        "bits_per_weight": round(plan.bits_per_weight + added, 4), "added_bits": round(added, 4), "blocks": options.blocks,
    }  # fmt: skip
    if strategy is not None:
        sums = [sum(losses) for losses in zip(*strategy.losses, strict=True)]
        facts |= {
            "kind": strategy.kind, "rank": strategy.rank, "rate": strategy.rate,
            "error_left": round(sum(strategy.error_left) / len(strategy.error_left), 4),
            "block_losses": [round(loss, 5) for loss in sums],
        }  # fmt: skip
    experiment.note(facts, model, seconds)


def main() -> None:
    parser = parser_of(__doc__, samples=64, windows=80)
    parser.set_defaults(preset="best", seq_len=1024)
    cases = ["bits=3", "bits=3,group_size=32", "bits=3,rotations=16"]
    cases += [f"bits=3+{kind}:16" for kind in KINDS]
    parser.add_argument("--cases", nargs="+", default=cases)
    parser.add_argument("--blocks", type=int, help="quantize only so many blocks, to try things out")
    parser.add_argument("--rate", type=float, default=0.03, help="of learning, for corrections")
    options = parser.parse_args()
    setting = {**SETTING, "samples": options.samples, "seq_len": options.seq_len}
    work = []
    for case in options.cases:
        changes, plus, correction = case.partition("+")
        config = config_from(f"{options.preset}:{changes}", **setting)
        work.append((case, config, correction_in(correction) if plus else None))
        if plus and config.recipe.refit is None and not correction.startswith("svd"):
            parser.error(f"{correction} is trained with the block, which preset {options.preset} does not do. Use best")
    experiment = Experiment.of(options)
    for each in work:
        run(experiment, *each)


if __name__ == "__main__":
    main()
