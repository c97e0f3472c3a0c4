"""The values of layers that later blocks borrow from an earlier one (`models.sharing`), while blocks come and go.

The earlier block quantizes them. A later block runs with their first values where it stands for the original model, and with
those they have now where it stands for the quantized one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..models.blocks import Block
from ..models.sharing import lenders_of

Values = dict[str, Tensor]


class Loans:
    """Keeps, on the CPU, every borrowed layer's parameters: as they were, and as the quantized model has them."""

    def __init__(self, blocks: Iterable[Block]):
        self._lenders = {id(layer): place for block in blocks for place, layer in lenders_of(block.module).items()}
        self._before: dict[str, Values] = {}
        self._after: dict[str, Values] = {}

    def lends(self, block: Block) -> bool:
        """Tell whether a later block borrows a layer of this one."""
        return any(id(module) in self._lenders for module in block.module.modules())

    def remember(self, block: Block, settled: bool) -> None:
        """Keep the values that this block's layers have now. settled: it has been quantized."""
        for module in block.module.modules():
            if (place := self._lenders.get(id(module))) is not None:
                kept = self._after if settled else self._before
                kept[place] = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}

    def put(self, block: Block, settled: bool) -> None:
        """Give the layers that this block borrows their values as they were or, where `settled`, as they are now."""
        for place, layer in lenders_of(block.module).items():
            _fill(layer, (self._after if settled else self._before).get(place, {}))


def _fill(layer: nn.Module, values: Values) -> None:
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        parameter.data = value.to(parameter.device, parameter.dtype)
