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

#: What decides which compiled kernel it is → the kernel, compiled, and the values of its compile-time parameters in order.
_COMPILED: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
#: A kernel's id → it, and the places, among its numbers, of those that Triton compiles it for. The id, as hashing a kernel hashes
#: its source; both tables hold the kernel, so that no other one gets its id.
_PLACES: dict[int, tuple[Any, tuple[int, ...]]] = {}
#: Triton compiles for pointers and numbers that are multiples of this, and for those that are not.
_ALIGNED = 16
#: Whole numbers from here on, and below its negative, are compiled for as 64-bit numbers.
_LARGE = 2**31


def start(
    kernel: Any, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any
) -> None:
    """Launch a kernel whose parameters are tensors, all on one device, then numbers, then compile-time constants.

    constants: all of the latter by name, and Triton's launch options.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter runs it
        kernel[grid](*tensors, *numbers, **constants)
        return
    device = tensors[0].device
    with current(device):
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = _key(kernel, device.index, tensors, numbers, constants)
        usual = not any(pointer % _ALIGNED for pointer in pointers)
        usual = usual and min(numbers) >= -_LARGE and max(numbers) < _LARGE and not kernel.pre_run_hooks
        if usual and (found := _COMPILED.get(key)) is not None:
            _, compiled, rest = found
            compiled[grid](*pointers, *numbers, *rest)
            return
        compiled = kernel[grid](*tensors, *numbers, **constants)
        if usual and compiled is not None:
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            _COMPILED[key] = kernel, compiled, tuple(constants[name] for name in names)


def _key(
    kernel: Any, device: int | None, tensors: Sequence[Tensor], numbers: Sequence[float], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """Return what decides which compiled kernel it is, were all pointers aligned and all numbers of 32 bits."""
    known = _PLACES.get(id(kernel))
    if known is None:
        parameters = kernel.params[len(tensors) : len(tensors) + len(numbers)]
        places = tuple(i for i, parameter in enumerate(parameters) if not parameter.do_not_specialize)
        known = _PLACES[id(kernel)] = kernel, places
    kinds = [(numbers[i] % _ALIGNED == 0, numbers[i] == 1) for i in known[1]]
    dtypes = [tensor.dtype for tensor in tensors]
    return (id(kernel), device, *dtypes, *map(type, numbers), *kinds, *constants, *constants.values())
