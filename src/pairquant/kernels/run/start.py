"""Start Triton kernels with little work on the processor.

Triton works out anew, at each launch, what a kernel was compiled for, and asks the driver about every pointer. On a server
whose cores are slow a linear then took longer to start than to run (docs/decisions.md). Here a kernel that Triton has once
launched is found by what decides which one it is, and is given its pointers as numbers, about which the driver is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.runtime import JITFunction

from ...support.devices import current

#: What decides which compiled kernel it is → that kernel, and the values of its compile-time parameters in order.
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
#: A kernel's id → places, among its numbers, of those that Triton compiles it for. Kernels are as old as their modules, and to hash
#: one takes as long as to hash its source.
_SPECIALIZED: dict[int, tuple[int, ...]] = {}
#: Triton compiles for pointers and numbers that are multiples of this, and for those that are not.
_ALIGNED = 16


def start(
    kernel: Any, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any
) -> None:
    """Launch a kernel whose parameters are tensors, all on one device, then numbers, then compile-time constants.

    constants: the latter by name, and Triton's launch options.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter runs it
        kernel[grid](*tensors, *numbers, **constants)
        return
    device = tensors[0].device
    with current(device):
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = _key(kernel, device.index, tensors, numbers, constants)
        aligned = not any(pointer % _ALIGNED for pointer in pointers)
        if aligned and (found := _COMPILED.get(key)) is not None:
            compiled, rest = found
            compiled[grid](*pointers, *numbers, *rest)
            return
        compiled = kernel[grid](*tensors, *numbers, **constants)
        if aligned:
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            _COMPILED[key] = compiled, tuple(constants[name] for name in names)


def _key(
    kernel: Any, device: int | None, tensors: Sequence[Tensor], numbers: Sequence[float], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """Return what decides which compiled kernel it is, were all pointers aligned."""
    if (places := _SPECIALIZED.get(id(kernel))) is None:
        parameters = kernel.params[len(tensors) : len(tensors) + len(numbers)]
        places = tuple(i for i, parameter in enumerate(parameters) if not parameter.do_not_specialize)
        _SPECIALIZED[id(kernel)] = places
    kinds = [(numbers[i] % _ALIGNED == 0, numbers[i] == 1) for i in places]
    return (id(kernel), device, *[tensor.dtype for tensor in tensors], *kinds, *constants, *constants.values())
