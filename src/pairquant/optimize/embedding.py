"""Quantize the input embedding: rows are looked up, not multiplied, so that only the weights themselves count.

The transform is fitted on evenly spaced rows with the identity as second moments; then all rows are rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.linear import Transform, assemble, decode
from ..core.range import extent, power_of_two
from ..core.rounding import nearest, search_range
from ..spec.linear import LinearLayout, PackedLinear
from ..spec.options import QuantConfig
from .search import Problem, fit_transforms
from .walk import seed_of

#: Rows that are rounded at a time, to bound what that takes; rows that the transform is fitted on, evenly spaced.
ROWS, FITTED_ROWS = 16384, 8192


@torch.no_grad()
def quantize_embedding(
    path: str, weight: Tensor, layout: LinearLayout, config: QuantConfig, device: torch.device
) -> tuple[PackedLinear, float]:
    """Return the packed rows on the CPU, and their relative error ‖W - Ŵ‖² / ‖W‖². weight: floating [V, C], on the CPU."""
    factor = power_of_two(*extent(weight), layout.spec)
    some = weight[:: -(-len(weight) // FITTED_ROWS)].to(device, torch.float32) / factor
    eye = torch.eye(layout.in_features, device=device)
    problem = Problem(some.contiguous(), eye, seed_of(config.seed, path), layout.spec)
    (transform,) = fit_transforms([problem], config)
    transform = transform.times(factor)
    parts = [_rounded(rows.to(device, torch.float32), transform, layout, config) for rows in weight.split(ROWS)]
    by_row = ("qweight", "qzeros", "scales")
    whole = {
        name: torch.cat([p[name] for p, _, _ in parts], dim=1) if name in by_row else parts[0][0][name]
        for name in layout.fields()
    }
    lost, of = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return PackedLinear(layout, whole), lost / max(of, 1e-30)


def _rounded(
    rows: Tensor, transform: Transform, layout: LinearLayout, config: QuantConfig
) -> tuple[PackedLinear, float, float]:
    """Return some rows packed, on the CPU, and the squares of their errors and of themselves."""
    part = layout.spec.layout(layout.in_features, len(rows))
    rotated = transform.weight_in(rows)
    grid = search_range(rotated, None, part.bits, part.group_size, part.spec.symmetric, config.recipe.shrinks)
    packed = assemble(part, transform, nearest(rotated, grid), grid, None)
    lost = (rows - decode(packed)).square().sum().item()
    return packed.to("cpu"), lost, rows.square().sum().item()
