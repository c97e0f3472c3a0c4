"""Make operators of the namespace `pairquant`, into which torch.compile does not look and which CUDA graphs can hold.

`torch.library.custom_op` makes such operators too. In torch 2.11 each call of one took 0.08 ms more on a server's core, by its
profile in asking whether the operator returns views: twice as long as a linear of an 8B model takes for 128 tokens on a GPU
(docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..support.errors import KernelError

_LIBRARY = torch.library.Library("pairquant", "FRAGMENT")


def operator(
    name: str, backward: Callable[..., Any] | None = None, setup: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes the operator `pairquant::NAME` of a function, whose annotations are its schema.

    The function changes none of its arguments and returns none of them. backward, setup: as `torch.library.register_autograd`
    takes them; without, a gradient through the operator raises `KernelError`.
    """

    def make(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # As custom_op does. `torch.compiler.disable` would import the compiler, and Triton with it, at once.
        _LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
        passed = backward if backward is not None else _refusal(name)
        torch.library.register_autograd(f"pairquant::{name}", passed, setup_context=setup, lib=_LIBRARY)
        return getattr(torch.ops.pairquant, name)

    return make


def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for the function that tells torch.compile the shapes and dtypes of what `pairquant::NAME` returns."""
    return torch.library.register_fake(f"pairquant::{name}", lib=_LIBRARY)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(context: Any, *gradients: Any) -> NoReturn:
        raise KernelError(f"pairquant::{name} passes no gradients. Run the model under torch.no_grad().")

    return refuse
