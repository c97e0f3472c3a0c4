"""Second moments of the inputs of a block's linears, added up over the calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.inputs import Inputs
from ..support.errors import CalibrationError


@dataclass
class Moments:
    """Second moments of one distinct input. hessian: XᵀX [C, C] float32; cross: X₀ᵀX, X₀ of the original model.

    tokens: how many rows X has; sample: some of them, [T, C], where activations are to be rounded. Inputs that a router chose
    have no cross moments: it may choose others in the original.
    """

    readers: list[str]
    hessian: Tensor
    cross: Tensor | None = None
    tokens: int = 0
    sample: Tensor | None = None


class MomentSum:
    """Adds up `Moments` over micro-batches."""

    def __init__(self, sampled: int = 0) -> None:
        """sampled: of so many tokens one is kept in the sample; 0 keeps none."""
        self.moments: list[Moments] = []
        self.sampled = sampled

    def add(self, inputs: Inputs, originals: Inputs | None = None) -> None:
        """Add one micro-batch; `originals` are the same linears' inputs in the original model."""
        # All products first: running out of memory then leaves the sums as they were.
        products = self._products(inputs, originals)
        if not self.moments:
            self.moments = products
            return
        for total, product in zip(self.moments, products, strict=True):
            total.hessian += product.hessian
            total.tokens += product.tokens
            if total.cross is not None and product.cross is not None:
                total.cross += product.cross
            if total.sample is not None and product.sample is not None:
                total.sample = torch.cat([total.sample, product.sample])

    def _products(self, inputs: Inputs, originals: Inputs | None) -> list[Moments]:
        """Return the moments of one micro-batch; inputs that are functions are computed one after the other."""
        counterparts: dict[int, int] = {}
        if originals is not None:
            compared = [number for number, routed in enumerate(inputs.routed) if not routed]
            counterparts = dict(zip(compared, range(len(originals.tensors)), strict=True))
        products = []
        for number, readers in enumerate(inputs.readers):
            x = inputs.tensor(number)
            cross = None
            if originals is not None and number in counterparts:
                cross = second_moment(originals.tensor(counterparts[number]), x)
            sample = x[:: self.sampled].to(torch.float32, copy=True) if self.sampled else None
            products.append(Moments(readers, second_moment(x, x), cross, len(x), sample))
        return products

    def checked(self, paths: Iterable[str]) -> tuple[list[Moments], list[str]]:
        """Return the sums, and the paths among `paths` that the forward pass never called.

        A linear that runs several times in one forward pass has the sum over its inputs. Raises `CalibrationError` for inputs
        that are not finite.
        """
        runs = Counter(path for moments in self.moments for path in moments.readers)
        found = _apart(self.moments, [path for path, count in runs.items() if count > 1])
        for moments in found:
            if not moments.hessian.isfinite().all():
                raise CalibrationError(
                    f"the inputs of {', '.join(moments.readers)} are not finite on the calibration text. "
                    "Check the source model, or load it in a wider dtype."
                )
        return found, [path for path in paths if path not in runs]


def _apart(moments: list[Moments], repeated: list[str]) -> list[Moments]:
    """Return the moments, with those of linears that run several times added up for each of these linears alone."""
    if not repeated:
        return moments
    found = []
    for each in moments:
        if once := [path for path in each.readers if path not in repeated]:
            found.append(replace(each, readers=once))
    for path in repeated:
        mine = [each for each in moments for reader in each.readers if reader == path]
        crosses = [each.cross for each in mine if each.cross is not None]
        cross = torch.stack(crosses).sum(0) if len(crosses) == len(mine) else None
        found.append(Moments([path], _sum(mine), cross, sum(each.tokens for each in mine), _joined_sample(mine)))
    return found


def _joined_sample(moments: list[Moments]) -> Tensor | None:
    samples = [each.sample for each in moments if each.sample is not None]
    return torch.cat(samples) if samples else None


@dataclass(frozen=True)
class Pool:
    """What the experts of a block read together. hessian: the sum over them; tokens: of each expert, in order; sample: [T, C]."""

    hessian: Tensor
    tokens: list[int]
    sample: Tensor | None = None


def pooled(moments: Iterable[Moments], pools: Mapping[str, str]) -> dict[str, Pool]:
    """Sum the moments of each pool of experts, and complete those of experts with fewer tokens than channels.

    pools: path → pool, of experts' weights. What such an expert lacks is made up for by as many average tokens of its
    pool; where no expert of the pool has any, all moments become those of independent channels.
    """
    members: dict[str, list[Moments]] = {}
    for each in moments:
        if each.readers[0] in pools:
            members.setdefault(pools[each.readers[0]], []).append(each)
    found = {}
    for pool, mine in members.items():
        total = _sum(mine)
        tokens = [each.tokens for each in mine]
        if not sum(tokens):
            total = torch.eye(len(total), device=total.device)
        channels, average = len(total), total / max(1, sum(tokens))
        for each in mine:
            each.hessian += average * max(0, channels - each.tokens)
        found[pool] = Pool(total, tokens, _joined_sample(mine))
    return found


def _sum(moments: list[Moments]) -> Tensor:
    total = torch.zeros_like(moments[0].hessian)
    for each in moments:
        total += each.hessian
    return total


def second_moment(x: Tensor, y: Tensor) -> Tensor:
    """XᵀY of [tokens, C] activations, float32 [C, C], summed in float32.

    16-bit inputs go to CUDA's tensor cores as they are, where their products are exact; never through TF32.
    """
    if not len(x):
        return torch.zeros(x.shape[-1], y.shape[-1], dtype=torch.float32, device=x.device)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, y, out_dtype=torch.float32)
    return x.float().T @ y.float()
