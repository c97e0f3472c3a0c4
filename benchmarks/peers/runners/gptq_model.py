"""GPTQ and ParoQuant of GPTQModel with the defaults of its `GPTQConfig` and `ParoConfig`.

Those are, of GPTQ, a symmetric grid with group-aware activation order; of ParoQuant the paper's recipe, fitted one
linear at a time (its `opt_scope`). The checkpoint that it saves is loaded again by its own loader, and read off.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plain import Job, Outcome, Stopwatch, affine_bits, effective_weight, linears_of, rotation_bits, run

#: Fewer than its loader's two, as its default is on two cores, are refused by its thread pool.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
#: With one epoch for each of ParoQuant's two stages: to see that it works.
QUICK = {"opt_rotation_epochs": 1, "opt_finetune_epochs": 1}


def config_of(job: Job) -> Any:
    from gptqmodel.quantization.config import GPTQConfig, ParoConfig

    kinds = {"gptq": GPTQConfig, "paroquant": ParoConfig}
    quick = QUICK if job.quick and job.options["method"] == "paroquant" else {}
    return kinds[job.options["method"]](bits=job.bits, group_size=job.group_size, **quick)


def quantize(job: Job) -> Outcome:
    from gptqmodel import BACKEND, GPTQModel

    config = config_of(job)
    model = GPTQModel.load(job.model, config, device=job.device)
    texts = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in job.windows]
    with Stopwatch(job.device) as watch:
        model.quantize(texts, batch_size=1)
    with TemporaryDirectory() as saved:
        model.save(saved)
        backend = BACKEND.GPTQ_TORCH if job.options["method"] == "gptq" else BACKEND.AUTO
        packed = GPTQModel.load(saved, device=job.device, backend=backend).model
    weights = {}
    for path, linear in linears_of(job.load()).items():
        layer = packed.get_submodule(path)
        weights[path] = effective_weight(layer, linear.in_features, job.device, torch.float16)
    bits = affine_bits(job.bits, job.group_size, zero_point=not config.sym)
    if job.options["method"] == "paroquant":
        bits += rotation_bits(weights.values(), config.krot)
    return Outcome(weights, watch.seconds, bits, job.group_size, others={})


if __name__ == "__main__":
    run(quantize, ["gptqmodel"])
