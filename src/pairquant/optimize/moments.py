"""Second moments of the inputs of a block's linears, added up over the calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.inputs import Inputs
from ..support.errors import CalibrationError, ConfigError


@dataclass
class Moments:
    """Second moments of one distinct input. hessian: XᵀX [C, C] float32; cross: X₀ᵀX, X₀ of the original model."""

    readers: list[str]
    hessian: Tensor
    cross: Tensor | None = None


class MomentSum:
    """Adds up `Moments` over micro-batches."""

    def __init__(self) -> None:
        self.moments: list[Moments] = []

    def add(self, inputs: Inputs, originals: Inputs | None = None) -> None:
        """Add one micro-batch; `originals` are the same linears' inputs in the original model."""
        if not self.moments:
            self.moments = [
                Moments(readers, _zeros(x), _zeros(x) if originals else None)
                for readers, x in zip(inputs.readers, inputs.tensors, strict=True)
            ]
        # All products first: running out of memory then leaves the sums as they were.
        products = [second_moment(x, x) for x in inputs.tensors]
        crossed = (
            [second_moment(x, y) for x, y in zip(originals.tensors, inputs.tensors, strict=True)] if originals else []
        )
        for moments, product in zip(self.moments, products, strict=True):
            moments.hessian += product
        for moments, product in zip(self.moments, crossed):  # noqa: B905  (empty without originals)
            if moments.cross is not None:
                moments.cross += product

    def checked(self, paths: Iterable[str]) -> tuple[list[Moments], list[str]]:
        """Return the sums, and the paths among `paths` that the forward pass never called.

        Raises `ConfigError` for a linear that runs several times, `CalibrationError` for inputs that are not finite.
        """
        runs = Counter(path for moments in self.moments for path in moments.readers)
        for path, count in runs.items():
            if count > 1:
                raise ConfigError(
                    f"{path} runs {count} times in one forward pass of its block, on inputs that may differ. "
                    f"Leave it as it is: --ignore {path}"
                )
        for moments in self.moments:
            if not moments.hessian.isfinite().all():
                raise CalibrationError(
                    f"the inputs of {', '.join(moments.readers)} are not finite on the calibration text. "
                    "Check the source model, or load it in a wider dtype."
                )
        return self.moments, [path for path in paths if path not in runs]


def second_moment(x: Tensor, y: Tensor) -> Tensor:
    """XᵀY of [tokens, C] activations, float32 [C, C], summed in float32.

    16-bit inputs go to CUDA's tensor cores as they are, where their products are exact; never through TF32.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, y, out_dtype=torch.float32)
    return x.float().T @ y.float()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
