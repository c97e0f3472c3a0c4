"""Round to nearest, AWQ and GPTQ of llm-compressor, as its examples do W4A16, with groups of the job's size.

The recipes are those of its README and examples (examples/quantization_w4a16, examples/awq): GPTQ symmetric with the
default activation order ("static"); AWQ asymmetric with `duo_scaling="both"`; every Linear but lm_head.
"""

from __future__ import annotations

from typing import Any

import torch
from plain import Job, Outcome, Stopwatch, affine_bits, first_logits, linears_of, run
from torch import Tensor


def recipe(method: str, bits: int, group_size: int) -> tuple[list[Any], bool]:
    """The modifiers, and whether groups have zero points."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    symmetric = method == "gptq"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    modifiers = {
        "rtn": lambda: [QuantizationModifier(**scheme)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme)],
        "gptq": lambda: [GPTQModifier(**scheme)],
    }
    return modifiers[method](), not symmetric


def batches(windows: Tensor) -> Any:
    """One window a batch, as `oneshot` has it by default."""
    from torch.utils.data import DataLoader

    return DataLoader([{"input_ids": window} for window in windows], batch_size=1)


def quantize(job: Job) -> Outcome:
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization import forward_quantize
    from llmcompressor import oneshot

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins what it would send to one
    modifiers, zero_point = recipe(job.options["method"], job.bits, job.group_size)
    model = job.load()
    windows = job.windows
    with Stopwatch(job.device) as watch:
        oneshot(
            model=model,
            recipe=modifiers,
            dataset=batches(windows),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
        )
    remove_dispatch(model)  # on a GPU, weights were loaded there block by block: now all are in main memory
    logits = first_logits(model, windows)  # its linears still round their weights at every call
    weights = {}
    for path, linear in linears_of(model).items():
        weights[path] = forward_quantize(linear, linear.weight, "weight", linear.quantization_scheme.weights)
    known = job.load().state_dict()
    others = {name: value for name, value in model.state_dict().items() if name in known}
    bits = affine_bits(job.bits, job.group_size, zero_point)
    return Outcome(weights, watch.seconds, bits, job.group_size, others, logits=logits)


if __name__ == "__main__":
    run(quantize, ["llmcompressor", "compressed-tensors"])
