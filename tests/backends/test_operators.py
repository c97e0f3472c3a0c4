"""Operators: torch.compile sees them whole, and gradients go through where they are defined and nowhere else."""

from __future__ import annotations

import pytest
import torch

from pairquant.backends.operators import fake, operator
from pairquant.support.errors import KernelError

SEEN: list[bool] = []


@operator("test_double")
def double(x: torch.Tensor, sizes: list[int], least: float | None) -> torch.Tensor:
    SEEN.append(torch.compiler.is_compiling())
    y = x * 2 + len(sizes)
    return y if least is None else y.clamp(min=least)


@fake("test_double")
def _(x, sizes, least):
    return torch.empty_like(x)


def _through(context, gradient):
    return gradient * 3


@operator("test_copy", backward=_through)
def copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_an_operator_computes_what_its_function_does():
    x = torch.tensor([-3.0, 1.0])
    assert torch.equal(double(x, [7], None), torch.tensor([-5.0, 3.0]))
    assert torch.equal(torch.ops.pairquant.test_double(x, [], 0.0), torch.tensor([0.0, 2.0]))
    torch.library.opcheck(double, (x, [7], 0.5))


def test_the_compiler_puts_the_operator_into_its_graph_and_does_not_look_inside():
    x = torch.ones(4)
    SEEN.clear()
    compiled = torch.compile(lambda x: double(x + 1, [], None) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.full((4,), 8.0))
    assert SEEN == [False]  # once, when the graph ran


def test_gradients_go_through_where_they_are_defined():
    x = torch.ones(4, requires_grad=True)
    copy(x).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 3.0))


def test_a_gradient_that_is_not_defined_is_refused_by_name():
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(KernelError, match="test_double passes no gradients"):
        double(x, [], None).sum().backward()
