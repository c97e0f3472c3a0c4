"""Launch a kernel through `start` and through Triton itself, on a GPU that only notes what it is given, and print both as JSON.

Run by test_start.py in a process of its own, as Triton is there without its interpreter.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pairquant.kernels.run.start import start

NOTED: list[list[Any]] = []
HANDLES = itertools.count()


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), next(HANDLES), 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, metadata, launch, enter, leave, *arguments):
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        NOTED.append([[x, y, z], function, values, any(isinstance(a, torch.Tensor) for a in arguments)])


class Gpu:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@triton.jit(do_not_specialize=["tokens"])
def scale_kernel(x_ptr, out_ptr, eps, tokens, stride, WIDTH: tl.constexpr, ADD: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < tokens)
    tl.store(out_ptr + row * stride + columns, x * eps + ADD, mask=columns < tokens)


def main() -> None:
    driver.set_active(Gpu())
    x, half = torch.zeros(4096), torch.zeros(4096, dtype=torch.float16)
    usual: dict[str, Any] = {"x": x, "eps": 1e-5, "tokens": 5, "stride": 64, "add": 1, "warps": 1}
    cases = {
        "as it was": {},
        "other tensors": {"x": torch.ones(4096)},
        "other number": {"tokens": 16},
        "a stride that is no multiple of 16": {"stride": 65},
        "a stride of one": {"stride": 1},
        "another dtype": {"x": half},
        "another constant": {"add": 2},
        "a tensor that is not aligned": {"x": x[1:]},
        "an empty tensor": {"x": x[:0]},
        "a whole number in place of a fraction": {"eps": 0},
        "a stride of 64 bits": {"stride": 2**31},
        "a number of 64 bits": {"tokens": 2**31},
        "another launch option": {"warps": 2},
    }
    found = {}
    for name, changed in cases.items():
        case = {**usual, **changed}
        tensors, numbers = (case["x"], torch.empty_like(case["x"])), (case["eps"], case["tokens"], case["stride"])
        constants = {"WIDTH": 32, "ADD": case["add"], "num_warps": case["warps"]}
        NOTED.clear()
        for _ in range(2):
            start(scale_kernel, (3, 2, 1), tensors, numbers, **constants)
        scale_kernel[(3, 2, 1)](*tensors, *numbers, **constants)
        found[name] = list(NOTED)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
