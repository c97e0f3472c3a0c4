"""Second moments: sums over micro-batches, and what is refused or left out."""

import pytest
import torch

from pairquant.models.inputs import Inputs
from pairquant.optimize.moments import Moments, MomentSum, pooled, second_moment
from pairquant.support.errors import CalibrationError


def inputs(*tensors, readers=(("a", "b"), ("c",))):
    return Inputs(list(tensors), [list(names) for names in readers])


def test_sums_over_batches_with_and_without_the_originals(generator):
    x, y = (torch.randn(2, 10, 4, generator=generator) for _ in range(2))
    total, crossed = MomentSum(), MomentSum()
    for batch, original in zip(x, y, strict=True):
        total.add(inputs(batch, batch * 2))
        crossed.add(inputs(batch, batch * 2), inputs(original, original * 3))
    moments, uncalled = total.checked(["a", "b", "c", "d"])
    flat, other = x.flatten(0, 1), y.flatten(0, 1)
    assert uncalled == ["d"]
    assert [m.readers for m in moments] == [["a", "b"], ["c"]]
    torch.testing.assert_close(moments[0].hessian, flat.T @ flat)
    torch.testing.assert_close(moments[1].hessian, 4 * flat.T @ flat)
    assert moments[0].cross is None
    torch.testing.assert_close(crossed.moments[1].cross, 6 * other.T @ flat)


def test_a_linear_that_runs_twice_has_the_sum_over_its_inputs():
    total = MomentSum()
    total.add(inputs(torch.ones(2, 4), 2 * torch.ones(3, 4), readers=(("a", "b"), ("a",))))
    moments, uncalled = total.checked(["a", "b"])
    assert [m.readers for m in moments] == [["b"], ["a"]]
    assert not uncalled
    torch.testing.assert_close(moments[0].hessian, torch.full((4, 4), 2.0))
    torch.testing.assert_close(moments[1].hessian, torch.full((4, 4), 14.0))
    assert moments[1].tokens == 5


def test_values_that_are_not_finite_name_their_readers():
    total = MomentSum()
    total.add(inputs(torch.full((2, 4), torch.inf), torch.ones(2, 4)))
    with pytest.raises(CalibrationError, match="inputs of a, b are not finite"):
        total.checked(["a", "b", "c"])


def test_products_are_summed_in_float32(generator):
    x = torch.randn(300, 8, generator=generator).bfloat16()
    found = second_moment(x, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float().T @ x.float())


def test_experts_with_few_tokens_get_the_average_token_of_their_pool(generator):
    inputs, total = Inputs(), MomentSum()
    tokens = [torch.randn(count, 4, generator=generator) for count in (30, 1, 0)]
    for number, x in enumerate(tokens):
        inputs.add(x, [f"experts.{number}.up_proj"], routed=True)
    total.add(inputs, Inputs())
    moments, _ = total.checked([])
    assert all(each.cross is None for each in moments)
    pools = {f"experts.{number}.up_proj": "experts.gate_up" for number in range(3)}
    (pool,) = pooled(moments, pools).values()
    joined = torch.cat(tokens)
    average = joined.T @ joined / 31
    torch.testing.assert_close(pool.hessian, 31 * average)
    assert pool.tokens == [30, 1, 0]
    torch.testing.assert_close(moments[0].hessian, tokens[0].T @ tokens[0])
    torch.testing.assert_close(moments[1].hessian, tokens[1].T @ tokens[1] + 3 * average)
    torch.testing.assert_close(moments[2].hessian, 4 * average)


def test_experts_without_any_tokens_count_all_channels_alike():
    moments = [Moments(["experts.0.up_proj"], torch.zeros(4, 4))]
    pooled(moments, {"experts.0.up_proj": "experts.gate_up"})
    torch.testing.assert_close(moments[0].hessian, 4 * torch.eye(4))


def test_a_sample_of_the_inputs_is_kept_where_it_is_asked_for():
    x = torch.randn(40, 8)
    total = MomentSum(sampled=8)
    for part in x.split(20):
        total.add(Inputs([part], [["a"]]))
    (found,), _ = total.checked(["a"])
    assert torch.equal(found.sample, x[[0, 8, 16, 20, 28, 36]])
    assert MomentSum().sampled == 0
