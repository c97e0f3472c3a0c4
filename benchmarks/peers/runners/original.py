"""The ParoQuant authors' own program, `paroquant.cli.optimize`, with the settings of their experiments/optimize/4bit.sh.

Only where it would fetch its text, it is handed the job's: windows to train on, held-out ones to choose the best epoch.
It compiles a CUDA kernel when it is imported, which is not counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from plain import Job, Outcome, Stopwatch, affine_bits, linears_of, rotation_bits, run

ROTATIONS = 8
STAGES = ("channel_scales:0.05,angles:0.05", "weight:1e-5,quantizer:1e-6")


def command_line(job: Job, output: str) -> list[str]:
    windows, held_out = job.windows, job.held_out
    epochs = "1" if job.quick else "10"
    options = {
        "--model": [job.model],
        "--params": STAGES,
        "--epochs": [epochs] * len(STAGES),
        "--group-size": [job.group_size],
        "--n-bit": [job.bits],
        "--num-rotations": [ROTATIONS],
        "--datasets": ["given"],
        "--val-dataset": "given",
        "--train-size": [len(windows)],
        "--validation-size": [len(held_out)],
        "--batch-size": [16],
        "--val-batch-size": [4],
        "--seqlen": [windows.shape[1]],
        "--output-dir": [output],
        "--seed": [0],
    }
    return [
        str(part)
        for name, values in options.items()
        for part in (name, *([values] if isinstance(values, str) else values))
    ]


def quantize(job: Job) -> Outcome:
    from paroquant.cli import optimize
    from paroquant.optim.qlinear import PseudoQuantizedLinear

    optimize.get_mixed_calib_dataset = lambda *_, **__: list(job.windows)
    optimize.get_calib_dataset = lambda *_, **__: list(job.held_out)
    weights = {}
    with TemporaryDirectory() as results:
        sys.argv = ["optimize", *command_line(job, results)]
        with Stopwatch(job.device) as watch:
            optimize.main()
        for path in linears_of(job.load()):
            index, _, name = path.split("layers.", 1)[1].partition(".")
            state = torch.load(Path(results, Path(job.model).name, f"{index}.{name}.pt"), map_location=job.device)
            weights[path] = PseudoQuantizedLinear.from_state_dict(state).to(job.device).float().pseudo_weight()
    bits = affine_bits(job.bits, job.group_size, zero_point=True) + rotation_bits(weights.values(), ROTATIONS)
    return Outcome(weights, watch.seconds, bits, job.group_size, others={})


if __name__ == "__main__":
    run(quantize, ["paroquant"])
