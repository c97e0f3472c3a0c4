"""What a block is called with besides the hidden states: recorded once, and given again for every window of the text.

Most arguments are the same for all windows (masks, positions). Some depend on the text (`PerWindow`). Some depend on what
earlier blocks computed (`Handed`, `Noted`): a `Carry` keeps these, window by window, for one stream of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import SourceError


@dataclass(frozen=True)
class PerWindow:
    """An argument that differs between the windows of a text, such as embeddings of the tokens that every block reads again.

    rows: [windows, …], of the whole text.
    """

    rows: Tensor


@dataclass(frozen=True)
class Handed:
    """Stands for what the block before returned beside its states, such as the positions that its indexer chose."""


@dataclass(frozen=True)
class Noted:
    """Stands for a mapping that blocks write into for later ones, such as shared keys and values.

    name: the argument's; kind: the class of the mapping.
    """

    name: str
    kind: type


MARKERS = (PerWindow, Handed, Noted)
HANDED = Handed()


@dataclass
class Carry:
    """What blocks hand each other beside the states, for one stream of hidden states: by window, its tensors on `store`.

    handed: number of the block → window → what it returned beside the states; notes: name of the argument → entry → window →
    its value; lasting: keep what every block handed on, for blocks that run in another order later.
    """

    store: torch.device
    lasting: bool = False
    handed: dict[int, dict[int, Any]] = field(default_factory=dict)
    notes: dict[str, dict[Any, dict[int, Any]]] = field(default_factory=dict)

    def given(self, marker: Handed | Noted, number: int, windows: list[int], device: torch.device) -> Any:
        """Return what the block with this number is given for these windows."""
        if isinstance(marker, Handed):
            before = self.handed.get(number - 1, {})
            return _together([before[w] for w in windows], device) if before else None
        noted = self.notes.get(marker.name, {})
        known = {key: of for key, of in noted.items() if all(window in of for window in windows)}
        return marker.kind({key: _together([of[w] for w in windows], device) for key, of in known.items()})

    def keep_handed(self, number: int, windows: list[int], value: Any) -> None:
        """Keep what a block returned beside the states. Unless `lasting`, that of the blocks before the last one goes."""
        if not self.lasting:
            self.handed.pop(number - 2, None)
        self.handed.setdefault(number, {}).update(self._apart(value, windows))

    def keep_notes(self, name: str, windows: list[int], notes: MutableMapping) -> None:
        """Keep the entries that are in a mapping after a block has run."""
        for key, value in notes.items():
            self.notes.setdefault(name, {}).setdefault(key, {}).update(self._apart(value, windows))

    def _apart(self, value: Any, windows: list[int]) -> dict[int, Any]:
        def row(i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: x[i : i + 1].to(self.store) if x.dim() and len(x) == len(windows) else x.to(self.store)

        return {window: map_leaves(value, row(i)) for i, window in enumerate(windows)}


def _together(values: list[Any], device: torch.device) -> Any:
    """Return one structure of what several windows have each; tensors [1, …] become [B, …] on the device."""
    leaves = [leaves_of(value) for value in values]
    places = iter(range(len(leaves[0])))

    def joined(_: Tensor) -> Tensor:
        own = next(places)
        return torch.cat([some[own] for some in leaves]).to(device)

    return map_leaves(values[0], joined)


@dataclass
class Call:
    """The arguments of a block besides the hidden states, such as masks and position embeddings.

    They were recorded for a micro-batch of `batch` windows. They serve every other micro-batch too, because all windows
    have the same length; those that depend on the text, or on earlier blocks, are markers (see above). number: the block's;
    axis: the dimension of the states that counts windows where the block sees them, which is 1 for Gemma 3n; it is always the
    first one outside; hands: whether the next block is given what this one returns beside the states; carry: what
    earlier blocks have left; writes: whether this block adds to it.
    """

    args: tuple
    kwargs: dict
    batch: int
    number: int = 0
    axis: int = 0
    hands: bool = False
    carry: Carry | None = None
    writes: bool = False

    @property
    def is_handed(self) -> bool:
        """Whether the block is given what the one before returned beside the states."""
        return any(isinstance(leaf, Handed) for leaf in leaves_of((self.args, self.kwargs)))

    @property
    def carries(self) -> bool:
        """Whether the block is given something that earlier blocks computed, beside the states."""
        return self.is_handed or any(isinstance(leaf, Noted) for leaf in leaves_of((self.args, self.kwargs)))

    def on(self, carry: Carry, writes: bool) -> Call:
        """Return the call for a stream of hidden states, whose carry the block reads and, where `writes`, adds to."""
        return replace(self, carry=carry, writes=writes)

    def run(self, block: nn.Module, hidden: Tensor, windows: Tensor | None = None) -> Tensor:
        """Run the block on hidden states [B, T, H], where B is at most `batch`, and return [B, T, H].

        windows: the numbers of these windows in the text, int64 [B] on the CPU; None: its first ones.
        """
        chosen = torch.arange(len(hidden)) if windows is None else windows
        notes: dict[str, Any] = {}

        def pick(x: Any) -> Any:
            if isinstance(x, PerWindow):
                return x.rows[chosen.to(x.rows.device)].to(hidden.device)
            if isinstance(x, Tensor):
                return x[: len(hidden)] if x.dim() and len(x) == self.batch else x
            given = (self.carry or Carry(hidden.device)).given(x, self.number, chosen.tolist(), hidden.device)
            if isinstance(x, Noted):
                notes[x.name] = given
            return given

        output = block(hidden.transpose(0, self.axis), *map_leaves(self.args, pick), **map_leaves(self.kwargs, pick))
        states, *others = output if isinstance(output, tuple) else (output,)
        if self.carry is not None and self.writes:
            if self.hands:
                self.carry.keep_handed(self.number, chosen.tolist(), others[0] if others else None)
            for name, given in notes.items():
                self.carry.keep_notes(name, chosen.tolist(), given)
        return states.transpose(0, self.axis)

    def to(self, device: torch.device, dtype: torch.dtype, store: torch.device | None = None) -> Call:
        """Return a copy with all tensors on `device` and the floating ones in `dtype`; `PerWindow` ones on `store`."""

        def cast(x: Tensor, where: torch.device) -> Tensor:
            return x.to(where, dtype) if x.is_floating_point() else x.to(where)

        def move(x: Any) -> Any:
            if isinstance(x, PerWindow):
                return PerWindow(cast(x.rows, store or device))
            return cast(x, device) if isinstance(x, Tensor) else x

        return replace(self, args=map_leaves(self.args, move), kwargs=map_leaves(self.kwargs, move))


def linked(calls: list[Call]) -> list[Call]:
    """Return the calls of consecutive blocks, each of which knows whether the next one is handed what it returns."""
    return [
        replace(call, hands=after is not None and after.is_handed)
        for call, after in zip(calls, [*calls[1:], None], strict=True)
    ]


class HeadCall(Call):
    """Lets the output embedding read its input without computing logits: those of a whole text would take gigabytes."""

    def run(self, block: nn.Module, hidden: Tensor, windows: Tensor | None = None) -> Tensor:
        """Call the hooks of the output embedding on what it reads, [B, T, H], and return that."""
        block.forward = lambda x: x  # type: ignore[method-assign]
        try:
            block(hidden)
        finally:
            del block.forward
        return hidden

    @property
    def carries(self) -> bool:
        """False: it is given nothing else."""
        return False

    def to(self, device: torch.device, dtype: torch.dtype, store: torch.device | None = None) -> Call:
        """Return itself: it has no tensors."""
        return self


class Recording:
    """What one block is called with besides its states, over all micro-batches of a text."""

    def __init__(self, args: tuple, kwargs: dict, batch: int, axis: int = 0):
        self.args, self.kwargs, self.batch, self.axis = args, _with_notes(kwargs), batch, axis
        self.first = _tensors((self.args, self.kwargs))
        self.changing: dict[int, list[Tensor]] = {}
        self.micro_batches = 1

    def add(self, args: tuple, kwargs: dict, count: int) -> None:
        """Compare the arguments for another micro-batch, of `count` windows, with the first one's."""
        now = _tensors((args, _with_notes(kwargs)))
        for number, (before, value) in enumerate(zip(self.first, now, strict=True)):
            if number in self.changing:
                self.changing[number].append(value)
            elif not _alike(before, value, count):
                self.changing[number] = [before] * self.micro_batches + [value]
        self.micro_batches += 1

    def call(self, path: str, number: int) -> Call:
        """Return the call; raises `SourceError` where an argument depends on the text without a row for every window."""
        for tensors in self.changing.values():
            if not tensors[0].dim() or len(tensors[0]) != self.batch:
                raise SourceError(
                    f"{path} is given a tensor of shape {list(tensors[0].shape)} that depends on the text and has no row for "
                    "each of its windows: such models cannot be quantized on text. Use --preset rtn, which reads none."
                )
        places = iter(range(len(self.first)))

        def settled(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            place = next(places)
            return PerWindow(torch.cat(self.changing[place])) if place in self.changing else x

        return Call(map_leaves(self.args, settled), map_leaves(self.kwargs, settled), self.batch, number, self.axis)


def window_axis(states: Tensor, tokens: Tensor) -> int:
    """Return which dimension of hidden states counts the windows of `tokens`, int64 [B, T]: the one before that of tokens.

    Raises `ValueError` for states that are not those of these tokens.
    """
    for axis in (0, 1):
        if states.dim() > axis + 2 and states.shape[axis : axis + 2] == tokens.shape:
            return axis
    raise ValueError(f"a block is given states of shape {list(states.shape)} for tokens of shape {list(tokens.shape)}")


def _with_notes(kwargs: dict) -> dict:
    """Return the arguments with a `Noted` for each empty mapping."""
    return {
        name: Noted(name, type(value)) if isinstance(value, MutableMapping) and not value else value
        for name, value in kwargs.items()
    }


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same structure of dicts, tuples and lists, with `change` applied to every tensor and marker in it."""
    if isinstance(value, (Tensor, *MARKERS)):
        return change(value)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(item, change) for item in value)
    return value


def leaves_of(value: Any) -> list[Any]:
    """Return the tensors and markers of a structure, in the order of `map_leaves`."""
    found: list[Any] = []
    map_leaves(value, found.append)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def _alike(before: Tensor, now: Tensor, count: int) -> bool:
    """Tell whether an argument of a micro-batch of `count` windows is that of the first one, which may have more windows."""
    if before is now:
        return True
    if before.dim() and now.dim() and len(now) == count < len(before):
        before = before[:count]
    return before.shape == now.shape and torch.equal(before, now)
