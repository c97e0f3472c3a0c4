"""Find out what of a model can be folded, by running it: names of classes play no part.

A block runs on random states, its weights brought to such sizes that every part of it counts. Which weights read a norm's
output shows from the tensors that are passed on; which layers write to the stream shows from a disturbance of their output
that arrives at the block's, unchanged but for a factor a token; and everything is then tried with random transforms: what
changes the block's output by more than rounding is not folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.rotation import rotate_dense
from ..layers.expert_form import ExpertForm
from ..spec.codes import SUPPORTED_GROUP_SIZES
from .blocks import Block, Call
from .folding import Foldable, Matrix, Norm, Pair, Transforms, fold, restored
from .sharing import lenders_of
from .sites import ExpertSite, site_of

#: Relative difference between outputs in float32 that is rounding: see docs/decisions.md. Where one half of a transform alone
#: changes the output by less than `FELT`, nothing can be told, and it is not folded.
TOLERANCE, FELT = 1e-4, 1e-2
#: Tokens of the window on which a model is looked at: what `look` is given must be the arguments for so many.
LOOK_TOKENS = 12
#: Size of the random states: small, so that what a block adds to them is not lost in their rounding.
STATE = 0.1


@dataclass(frozen=True)
class Heads:
    """How the attention of a model is laid out: query heads, heads of keys and values, channels of a head."""

    queries: int
    values: int
    channels: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Read them from a Transformers configuration; one head where it names none."""
        inner = getattr(config, "get_text_config", lambda: config)()
        entries = inner.to_dict()  # of some models attributes that differ between layers cannot be asked for

        def stated(name: str, otherwise: int) -> int:
            value = entries.get(name)
            return value if isinstance(value, int) and value else otherwise

        queries = stated("num_attention_heads", 1)
        channels = stated("head_dim", stated("hidden_size", queries) // queries)
        return cls(queries, stated("num_key_value_heads", queries), channels)


@dataclass
class _Trace:
    """What each module with weights was given first and returned, in one pass through a block; only if it ran once."""

    given: dict[nn.Module, Tensor] = field(default_factory=dict)
    returned: dict[nn.Module, Tensor] = field(default_factory=dict)
    places: dict[nn.Module, str] = field(default_factory=dict)


def look(block: Block, call: Call, width: int, heads: Heads, group: int, lent: Collection[nn.Module] = ()) -> Foldable:
    """Find out what a block allows. Its weights must be there, in float32.

    call: its arguments for a batch of one window; width: H; group: channels of a group of the stream's rotation; lent: the layers
    of all blocks that other blocks use too. Nothing is folded into a block that shares layers with others or hands them more
    than its states: what a change does to these cannot be seen here.
    """
    if lenders_of(block.module) or any(module in lent for module in block.module.modules()):
        return Foldable(reason=f"{block.path} shares layers with other blocks")
    if call.carries or call.hands or call.axis:
        return Foldable(reason=f"{block.path} hands other blocks more than its states")
    try:
        return _Look(block, call, width, heads, group).found()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Foldable(reason=f"{block.path} does not run on states of its own ({str(error).splitlines()[0][:80]})")


class _Look:
    """Trials on one block."""

    def __init__(self, block: Block, call: Call, width: int, heads: Heads, group: int):
        self.block, self.call, self.width, self.heads, self.group = block, call, width, heads, group
        first = next(block.module.parameters())
        self.device = first.device
        self.generator = torch.Generator().manual_seed(0)
        self.hidden = STATE * self._random(1, LOOK_TOKENS, width)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def _scales(self, size: int) -> Tensor:
        return (0.3 * self._random(size)).exp()

    def _rotation(self, size: int, group: int) -> Tensor:
        """A random orthogonal matrix for each group, [size / group, group, group]."""
        return torch.linalg.qr(self._random(size // group, group, group).cpu())[0].to(self.device)

    @torch.no_grad()
    def found(self) -> Foldable:
        with restored(self.block.module):
            self._vary()
            return self._found()

    def _vary(self) -> None:
        """Give matrices such sizes that what they return has the size 1, and vary biases and the weights of norms."""
        for place, module in self.block.module.named_modules():
            matrices = [
                name for name, value in module._parameters.items() if value is not None and value.dim() in (2, 3)
            ]
            if not (site_of(place or "block", module) or ExpertSite.holds(module)):
                matrices = []
            for name in matrices:
                if not name.endswith("bias"):
                    weight = module.get_parameter(name)
                    spread = weight.std() * math.sqrt(Matrix(place, module, name, is_turned(module)).weight.shape[-1])
                    weight.data = weight / spread.clamp(min=1e-12)
            for name, value in module._parameters.items():
                varied = (name.endswith("bias") and matrices) or (name == "weight" and holds_vector(module, self.width))
                if value is not None and varied:
                    value.data = value + 0.2 * self._random(*value.shape)

    def _found(self) -> Foldable:
        trace = _traced(self.block, self.call, self.hidden)
        self.base = self.call.run(self.block.module, self.hidden)
        norms = [norm for norm in self._norms(trace) if self._scalable(norm)]
        readers = {matrix.module for norm in norms for matrix in norm.readers}
        writers = self._writers(trace, norms)
        pairs = tuple(self._pairs(trace, readers))
        scaled = Foldable(tuple(norms), tuple(writers), pairs)
        reason = self._reason(trace, norms, writers, readers)
        if reason is None and self._error(scaled, self._everything(scaled, stream=True)) > TOLERANCE:
            reason = f"the outputs of {self.block.path} differ when its inputs are rotated: not only the layers found read them"
        return replace(scaled, reason=reason)

    def _reason(self, trace: _Trace, norms: list[Norm], writers: list[Matrix], readers: set[nn.Module]) -> str | None:
        """Return why the stream cannot be rotated, as far as that shows from the layers found."""
        if self.width % self.group:
            return f"{self.width} hidden channels are no multiple of the group size {self.group}"
        kinds = {type(norm.module).__name__ for norm in norms if not norm.rotates}
        if kinds:
            return f"{', '.join(sorted(kinds))} subtracts the mean, has a bias, or works on channels apart"
        held = {norm.module for norm in norms}
        frozen = self._frozen(trace, norms)
        for module in trace.returned:
            if holds_vector(module, self.width) and module not in held and self._writes(trace, module, frozen):
                return f"{trace.places[module]} normalises what the block adds to the stream"
        if not norms:
            return f"no norm of {self.block.path} has readers that could take its weight"
        if not writers:
            return f"no layer of {self.block.path} adds its output to the stream as it is"
        return None

    def _error(self, found: Foldable, transforms: Transforms) -> float:
        """Return the relative difference that folding makes to what the block adds to the stream."""
        stream = transforms.stream
        return self._difference(
            lambda: fold(found, transforms), lambda x: x if stream is None else rotate_dense(x, stream)
        )

    def _difference(self, change: Callable[[], None], turn: Callable[[Tensor], Tensor] = lambda x: x) -> float:
        """Return the relative difference that a change of the weights makes; turn: applied to inputs and expected outputs."""
        with restored(self.block.module):
            change()
            out = self.call.run(self.block.module, turn(self.hidden))
        scale = (self.base - self.hidden).norm().clamp(min=1e-3 * float(self.hidden.norm()))
        error = float((out - turn(self.base)).norm() / scale)
        return error if math.isfinite(error) else math.inf

    def _everything(self, found: Foldable, stream: bool) -> Transforms:
        """Random transforms of all that was found."""
        return Transforms(
            self._rotation(self.width, self.group) if stream else None,
            {norm.place: self._scales(self.width) for norm in found.norms},
            {pair.name: self._of_pair(pair) for pair in found.pairs},
        )

    def _of_pair(self, pair: Pair) -> tuple[Tensor | None, Tensor]:
        turned = self._rotation(pair.size, pair.head) if pair.rotates and pair.head else None
        return turned, self._scales(pair.size)

    def _norms(self, trace: _Trace) -> Iterator[Norm]:
        """Yield the norms of the stream's width that weights read, each with its readers."""
        for module, out in trace.returned.items():
            if not holds_vector(module, self.width) or out.shape[-1] != self.width:
                continue
            readers = tuple(
                matrix
                for reader, given in trace.given.items()
                if reader is not module and same(given, out)
                for matrix in _reading(trace.places[reader], reader, self.width)
            )
            kind = norm_of(trace.places[module], module, readers)
            if readers and kind is not None:
                yield kind

    def _scalable(self, norm: Norm) -> bool:
        found = Foldable((norm,))
        half = self._difference(lambda: norm.put(norm.weight / self._scales(self.width)))
        return half >= FELT and self._error(found, self._everything(found, stream=False)) <= TOLERANCE

    def _frozen(self, trace: _Trace, norms: Iterable[Norm]) -> Mapping[nn.Module, Tensor]:
        """Outputs of norms that are held while something else is disturbed, so that the rest of the block is linear."""
        return {norm.module: trace.returned[norm.module] for norm in norms}

    def _writes(self, trace: _Trace, module: nn.Module, frozen: Mapping[nn.Module, Tensor]) -> bool:
        """Tell whether a disturbance of the module's output arrives at the block's as it is, but for a factor a token."""
        added = STATE * self._random(*trace.returned[module].shape)
        held = {m: (lambda _, value=value: value) for m, value in frozen.items()}
        with replaced(held), replaced({module: lambda out: out + added}):
            change = (self.call.run(self.block.module, self.hidden) - self.base).reshape(-1, self.width)
        given = added.reshape(-1, self.width)
        if len(given) != len(change):
            return False
        factor = (change * given).sum(-1) / (given * given).sum(-1)
        size = float(change.norm())
        return size > 1e-3 * float(given.norm()) and float((change - factor[:, None] * given).norm()) < 1e-2 * size

    def _writers(self, trace: _Trace, norms: list[Norm]) -> list[Matrix]:
        frozen = self._frozen(trace, norms)
        return [
            matrix
            for module, out in trace.returned.items()
            if out.shape[-1] == self.width
            for matrix in _writing(trace.places[module], module)
            if self._writes(trace, module, frozen)
        ]

    def _pairs(self, trace: _Trace, readers: set[nn.Module]) -> Iterator[Pair]:
        """Yield the pairs of two layers, each layer in one at most as the first; a reader of a norm is no second."""
        taken: set[nn.Module] = set()
        linears = [m for m in trace.returned if site_of(trace.places[m], m)]
        every = [matrix for m in linears for matrix in _writing(trace.places[m], m)]
        for columns in (matrix for matrix in every if matrix.module not in readers):
            for pair in self._candidates(every, columns):
                if pair.rows.module not in taken and self._allowed(pair):
                    turned = replace(pair, rotates=True)
                    fits = pair.head is not None and math.gcd(self.group, pair.head) in SUPPORTED_GROUP_SIZES
                    yield turned if fits and self._allowed(turned) else pair
                    taken.add(pair.rows.module)
                    break

    def _candidates(self, linears: list[Matrix], columns: Matrix) -> Iterator[Pair]:
        inputs, heads = columns.weight.shape[-1], self.heads
        for rows in (matrix for matrix in linears if matrix is not columns):
            outputs = len(rows.weight)
            if inputs == heads.queries * heads.channels:
                size = heads.values * heads.channels
                if outputs >= size and heads.queries % heads.values == 0:
                    repeats = heads.queries // heads.values
                    yield Pair(rows, columns, size, outputs - size, repeats, heads.channels)
            if outputs >= inputs:
                yield Pair(rows, columns, inputs, outputs - inputs)

    def _allowed(self, pair: Pair) -> bool:
        values = self._of_pair(pair)
        half = self._difference(lambda: pair.rows.transform_rows(*values, pair.first))
        return half >= FELT and self._error(Foldable(pairs=(pair,)), Transforms(pairs={pair.name: values})) <= TOLERANCE


def norm_of(place: str, module: nn.Module, readers: tuple[Matrix, ...]) -> Norm | None:
    """Return a module as a norm, if its weight only multiplies what it normalises; None otherwise."""
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(1)).to(weight.device)
    axis = torch.nn.functional.normalize(torch.randn(weight.numel(), generator=torch.Generator().manual_seed(2)), dim=0)
    axis = axis.to(weight.device)
    value = torch.linspace(0.5, 2.0, weight.numel(), device=weight.device)

    def reflected(y: Tensor) -> Tensor:
        return y - 2 * (y @ axis)[..., None] * axis

    with restored(module):
        if bias is not None:
            bias.data = torch.zeros_like(bias)
        for added in (0.0, 1.0):
            weight.data = torch.full_like(weight, 1 - added)
            plain, turned = module(x), module(reflected(x))
            weight.data = value.to(weight.dtype)
            if torch.allclose(module(x), plain * (value + added), rtol=1e-4, atol=1e-5):
                rotates = bias is None and torch.allclose(turned, reflected(plain), rtol=1e-4, atol=1e-4)
                return Norm(place, module, added, rotates, readers)
    return None


@contextmanager
def replaced(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change what modules return while the context is open."""
    handles = [
        module.register_forward_hook(
            lambda _, __, out, change=change: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
        for module, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _traced(block: Block, call: Call, hidden: Tensor) -> _Trace:
    """Run a block and note what its modules with weights are given and return."""
    trace, runs = _Trace(), dict[nn.Module, int]()

    def note(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        runs[module] = runs.get(module, 0) + 1
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        result = out[0] if isinstance(out, tuple) and out else out
        if given and isinstance(result, Tensor):
            trace.given[module], trace.returned[module] = given[0], result

    handles = []
    for path, module in block.module.named_modules():
        if module._parameters and path:
            trace.places[module] = f"{block.path}.{path}"
            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        call.run(block.module, hidden)
    finally:
        for handle in handles:
            handle.remove()
    for module in [module for module, count in runs.items() if count > 1]:
        trace.given.pop(module, None)
        trace.returned.pop(module, None)
    return trace


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether one tensor is the other but for a factor, perhaps in another shape."""
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1] or not a.is_floating_point():
        return False
    a, b = a.flatten().float(), b.flatten().float()
    factor = (a @ b) / (b @ b).clamp(min=1e-30)
    return bool(factor != 0) and float((a - factor * b).norm()) <= 1e-6 * float(a.norm())


def holds_vector(module: nn.Module, width: int) -> bool:
    """Tell whether a module has a weight [H], and at most a bias beside it."""
    weight = module._parameters.get("weight")
    own = {name for name, value in module._parameters.items() if value is not None}
    return weight is not None and weight.shape == (width,) and own <= {"weight", "bias"}


def _reading(place: str, module: nn.Module, width: int) -> Iterator[Matrix]:
    """Yield the weight of a module whose columns are what it is given."""
    if ExpertSite.holds(module):
        yield Matrix(place, module, "gate_up_proj" if _form_of(module).has_gate else "up_proj", is_turned(module))
    elif site_of(place, module):
        yield Matrix(place, module, turned=is_turned(module))
    elif (weight := module._parameters.get("weight")) is not None and weight.dim() == 2 and weight.shape[-1] == width:
        yield Matrix(place, module)


def _writing(place: str, module: nn.Module) -> Iterator[Matrix]:
    """Yield the weight of a module whose rows make what it returns."""
    if ExpertSite.holds(module):
        yield Matrix(place, module, "down_proj", is_turned(module))
    elif site_of(place, module):
        yield Matrix(place, module, turned=is_turned(module))


def is_turned(module: nn.Module) -> bool:
    """Tell whether a module's parameter is [..., C, N], as that of Transformers' `Conv1D` and of gpt-oss' experts."""
    return _form_of(module).is_transposed if ExpertSite.holds(module) else not isinstance(module, nn.Linear)


def _form_of(module: nn.Module) -> ExpertForm:
    form = ExpertForm.of(module)
    assert form is not None, "asked for modules that hold experts"
    return form
