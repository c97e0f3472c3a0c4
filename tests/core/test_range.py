"""Weights whose scales fp16 cannot hold: a power of two goes into the channel scales, or the weight is refused."""

import pytest
import torch

from pairquant.core.linear import Transform, decode, encode
from pairquant.core.range import extent, power_of_two, require_fp16, require_representable
from pairquant.core.rounding import proxy_error
from pairquant.spec.codes import SUPPORTED_BITS
from pairquant.spec.linear import Spec
from pairquant.spec.mx import E2M1
from pairquant.spec.recipe import PRESETS
from pairquant.support.errors import ConfigError


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("rms", [3e-3, 0.02, 1.0, 30.0])
def test_ordinary_weights_are_left_alone(bits, rms):
    assert power_of_two(rms, 20 * rms, Spec(bits)) == 1.0


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 3e5, 1e7])
def test_a_weight_out_of_range_is_represented_as_well_as_any_other(bits, size, generator):
    plain = torch.randn(64, 128, generator=generator)
    factor = power_of_two(*extent(plain * size), Spec(bits))
    errors = []
    for weight, times in ((plain, 1.0), (plain * size, factor)):
        transform = Transform.identity(128, 64).times(times)
        packed = encode(weight, transform, None, Spec(bits, 64, 0).layout(128, 64), PRESETS["rtn"])
        packed.check_values("linear")
        errors.append(proxy_error(weight, decode(packed), torch.eye(128)))
    assert factor == 2.0 ** round(torch.tensor(factor).log2().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_single_huge_value_is_represented(generator):
    weight = torch.randn(64, 128, generator=generator)
    weight[3, 5] = 1e7
    transform = Transform.identity(128, 64).times(power_of_two(*extent(weight), Spec(4)))
    packed = encode(weight, transform, None, Spec(4, 64, 0).layout(128, 64), PRESETS["rtn"])
    packed.check_values("linear")
    assert decode(packed)[3, 5] == pytest.approx(1e7, rel=1e-3)


MX = Spec(4, 64, 0, weights="mxfp4")


@pytest.mark.parametrize(
    ("peak", "factor"), [(0.5, 1), (6144, 1), (6145, 2), (49152, 8), (60000, 16), (98304, 16), (2e7, 4096)]
)
def test_the_largest_scale_of_mxfp4_is_smaller_than_that_of_whole_numbers(peak, factor):
    assert power_of_two(peak / 20, peak, MX) == factor


def test_mxfp4_weights_beyond_its_largest_exponent_do_not_saturate():
    weight = (
        torch.tensor(E2M1 * 8)[None].repeat(8, 1) * 2.0**16
    )  # its peak is 6 · 2^16, 6 · 2^13 is the largest that is stored
    transform = Transform.identity(128, 64).times(power_of_two(*extent(weight), MX))
    packed = encode(weight, transform, None, MX.layout(128, 8), PRESETS["rtn"])
    packed.check_values("linear")
    assert torch.equal(decode(packed), weight)


def test_what_scales_of_mxfp4_cannot_represent_is_refused():
    with pytest.raises(ConfigError, match=r"as large as 3e\+07, which scales of MXFP4 cannot represent.*Rescale"):
        require_representable(torch.full((8, 32), 3e7), MX)


@pytest.mark.parametrize(("size", "said"), [(1e-11, "as small as .*e-1"), (1e12, "as large as")])
def test_what_no_power_of_two_mends_is_refused_with_the_remedy(size, said, generator):
    with pytest.raises(ConfigError, match=said + r".*Rescale the layer"):
        require_representable(torch.randn(8, 32, generator=generator) * size, Spec(4))


def test_weights_of_zeros_and_of_no_rows_are_fine():
    require_representable(torch.zeros(4, 32), Spec(4))
    require_representable(torch.empty(0, 32), Spec(4))


def test_a_bias_beyond_fp16_is_refused():
    require_fp16(torch.tensor([6e4, -6e4]))
    with pytest.raises(ConfigError, match="as large as 7e\\+04"):
        require_fp16(torch.tensor([7e4]))


def test_a_factor_that_fp16_channel_scales_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="do not fit fp16"):
        Transform.identity(64, 64).times(2.0**20)
