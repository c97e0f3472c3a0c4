"""The grids: points, codes and steps belong together, and what is stored gives the same grid back."""

import pytest
import torch

from pairquant.core.grids import MxGrid, WholeGrid, better_of, grid_of
from pairquant.core.linear import Transform, assemble
from pairquant.spec.linear import Spec

ROWS, CHANNELS = 16, 128
GRIDS = pytest.mark.parametrize("kind", ["3 bits", "4 bits", "8 bits", "mxfp4"])


def made(kind, generator):
    """A grid of scales and zero points of all sorts, and the spec that it belongs to."""
    if kind == "mxfp4":
        exponents = torch.randint(-23, 14, (ROWS, CHANNELS // 32), generator=generator)
        return MxGrid(2.0**exponents), Spec(4, 64, 0, weights="mxfp4")
    bits = int(kind[0])
    scale = (torch.rand(ROWS * 2, CHANNELS // 64, generator=generator) + 0.1).half().float()
    return WholeGrid(scale, torch.randint(0, 2**bits, scale.shape, generator=generator).float(), bits), Spec(
        bits, 64, 0
    )


def every_code(grid, spec):
    return (torch.arange(len(grid.scale) * CHANNELS) % 2**spec.bits).to(torch.uint8).view(-1, CHANNELS)


@GRIDS
def test_a_point_is_its_step_times_the_scale_and_has_its_code(kind, generator):
    grid, spec = made(kind, generator)
    codes = every_code(grid, spec)
    steps, width = grid.steps(codes), CHANNELS // grid.scale.shape[1]
    values = steps * grid.scale.repeat_interleave(width, 1)
    assert torch.equal(grid.values(codes), values)
    same = torch.where(codes == 8, 0, codes) if kind == "mxfp4" else codes  # both are zero
    assert torch.equal(grid.codes(values), same)
    lowest = grid.lowest.repeat_interleave(width, 1)
    assert torch.equal(grid.codes_of(steps, lowest), same)
    every = torch.stack([grid.steps(torch.full_like(codes, code)) for code in range(2**spec.bits)])
    assert torch.equal(every.amin(0), lowest)
    assert torch.equal(every.amax(0), lowest + grid.span)


@GRIDS
def test_what_is_stored_gives_the_grid_back(kind, generator):
    grid, spec = made(kind, generator)
    layout = spec.layout(CHANNELS, len(grid.scale))
    packed = assemble(layout, Transform.identity(CHANNELS, 64), every_code(grid, spec), grid, None)
    packed.check_values("linear")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors.items()} == {
        name: (field.dtype, field.shape) for name, field in layout.fields().items()
    }
    found = grid_of(packed)
    assert type(found) is type(grid)
    assert all(torch.equal(value, vars(grid)[name]) for name, value in vars(found).items() if name != "bits")


@GRIDS
def test_scales_become_ones_that_can_be_stored(kind, generator):
    grid, _ = made(kind, generator)
    scales = grid.storable(torch.rand(50, generator=generator) * 8 - 1)
    assert (scales > 0).all()
    assert torch.equal(scales, scales.half().float())
    assert kind != "mxfp4" or torch.equal(scales, 2.0 ** scales.log2().round())
    assert torch.equal(grid.storable(grid.scale), grid.scale)


def test_the_better_grid_is_taken_row_by_row(generator):
    (one, _), (other, _) = made("3 bits", generator), made("3 bits", generator)
    take = torch.rand(one.scale.shape, generator=generator) > 0.5
    found = better_of(one, other, take)
    for name in ("scale", "zero"):
        assert torch.equal(getattr(found, name)[take], getattr(other, name)[take])
        assert torch.equal(getattr(found, name)[~take], getattr(one, name)[~take])
