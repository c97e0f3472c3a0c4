"""Where the blocks of a model are when they are not worked on: in the model itself, or wherever a `Home` keeps them."""

from __future__ import annotations

from typing import Protocol

import torch

from ..models.blocks import Block
from ..models.sharing import lenders_of


class Home(Protocol):
    """Where blocks are when they are not worked on. stays: whether a block that leaves goes on computing as the quantized one."""

    stays: bool

    def dtype(self, block: Block) -> torch.dtype: ...
    def enter(self, block: Block, device: torch.device, dtype: torch.dtype) -> None: ...
    def expect(self, block: Block, device: torch.device) -> None: ...
    def leave(self, block: Block) -> None: ...


class InPlace:
    """The model holds all its weights; a block goes to the device and comes back."""

    stays = True

    def __init__(self) -> None:
        self.stored_as: tuple[torch.device, torch.dtype] | None = None

    def dtype(self, block: Block) -> torch.dtype:
        return self.stored_as[1] if self.stored_as else next(block.module.parameters()).dtype

    def enter(self, block: Block, device: torch.device, dtype: torch.dtype) -> None:
        first = next(block.module.parameters())
        self.stored_as = first.device, first.dtype
        for module in (block.module, *lenders_of(block.module).values()):
            module.to(device, dtype)

    def expect(self, block: Block, device: torch.device) -> None:
        """It is here already."""

    def leave(self, block: Block) -> None:
        assert self.stored_as is not None, "a block leaves that never entered"
        for module in (block.module, *lenders_of(block.module).values()):
            module.to(*self.stored_as)
        self.stored_as = None
