"""NF4 of bitsandbytes, as its guide recommends: blocks of 64, the blocks' maxima themselves quantized (nested)."""

from __future__ import annotations

import torch
from plain import Job, Outcome, Stopwatch, linears_of, run

BLOCK = 64  # weights that share a maximum, its default
NESTED_BLOCK = 256  # maxima that share a scale


def quantize(job: Job) -> Outcome:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = job.load().to(job.device)
    linears = linears_of(model)
    with torch.no_grad(), Stopwatch(job.device) as watch:
        coded = {
            path: quantize_4bit(linear.weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            for path, linear in linears.items()
        }
    weights = {path: dequantize_4bit(codes, state) for path, (codes, state) in coded.items()}
    bits = 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)
    return Outcome(weights, watch.seconds, bits, BLOCK, others={})


if __name__ == "__main__":
    run(quantize, ["bitsandbytes"])
