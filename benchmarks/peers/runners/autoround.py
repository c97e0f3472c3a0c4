"""AutoRound as its README recommends for W4A16: 200 steps or those of the options, batch 8, learning rate 1 / steps, symmetric."""

from __future__ import annotations

from plain import Job, Outcome, Stopwatch, affine_bits, linears_of, run
from torch.utils.data import DataLoader


def quantize(job: Job) -> Outcome:
    from auto_round import AutoRound

    windows = job.windows
    rounder = AutoRound(
        job.load(),
        tokenizer=job.tokenizer(),
        scheme=f"W{job.bits}A16",
        group_size=job.group_size,
        dataset=DataLoader(windows, batch_size=8),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=2 if job.quick else job.options.get("steps", 200),
        device_map=job.device,
    )
    with Stopwatch(job.device) as watch:
        model, layers = rounder.quantize()
    weights = {path: linear.weight.detach() for path, linear in linears_of(model).items()}
    zero_point = not all(layers[path]["sym"] for path in weights)
    bits = affine_bits(job.bits, job.group_size, zero_point)
    return Outcome(weights, watch.seconds, bits, job.group_size, others={})


if __name__ == "__main__":
    run(quantize, ["auto-round"])
