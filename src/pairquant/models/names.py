"""Names of tensors: the source's, under which everything is stored, and those that Transformers gives them on loading.

Transformers renames tensors of some families, and joins the experts of a block into one parameter. A checkpoint keeps the
names of its source, so that every reader of the original model finds what it expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

#: The number of an expert in a tensor's name.
NUMBER = re.compile(r"\.(\d+)\.[^.]+(?:\.weight|\.bias)?$")
#: What the parts of an expert are called by different families.
OTHER_NAMES = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3", "w1"), "down_proj": ("down_proj", "w2")}


@dataclass(frozen=True)
class Names:
    """How a source names the tensors of a model.

    sources: parameter of the model → the source's tensors that it is made of, in the order in which they are joined;
    unknown: tensors of the source that the model's class does not use, such as heads that predict further tokens; changed:
    parameters whose values Transformers changes on loading, by more than joining tensors; renamed: from a parameter's name
    to what a source would call it; cut: tensors of the source that Transformers cuts into several parameters; joins: whether
    Transformers joins the tensor of this name with others on loading and changes nothing else, as it does with single experts.
    """

    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    changed: frozenset[str] = frozenset()
    cut: tuple[str, ...] = ()
    renamed: Callable[[str], str] = lambda name: name
    joins: Callable[[str], bool] = lambda name: False

    @classmethod
    def of(cls, model: Any, stored: Iterable[str]) -> Names:
        """Find out how Transformers names the tensors of the source; model: it may lack its weights."""
        rules = _Rules.of(model)
        known = model.state_dict()
        found: dict[str, list[tuple[int, int, str]]] = {}
        changed: set[str] = set()
        cut: list[str] = []
        for name in stored:
            target, pattern = (name, None) if name in known else rules.forward(name, model.base_model_prefix, known)
            number = NUMBER.search(name)
            order = (int(number[1]) if number and pattern else 0, rules.places.get(pattern or "", 0), name)
            found.setdefault(target, []).append(order)
            if pattern is not None and pattern not in rules.joining:
                changed.add(target)
            if pattern in rules.cutting:
                cut.append(name)
        return cls(
            {target: tuple(name for *_, name in sorted(names)) for target, names in found.items()},
            tuple(name for target, names in found.items() if target not in known for *_, name in names),
            frozenset(changed),
            tuple(cut),
            rules.backward,
            lambda name: rules.forward(name)[1] in rules.joining,
        )

    @cached_property
    def _by_number(self) -> dict[str, dict[int, list[str]]]:
        """Parameter → number of an expert → its tensors; a model may have 20,000 of them."""
        found: dict[str, dict[int, list[str]]] = {}
        for parameter, names in self.sources.items():
            if len(names) > 1:
                for name in names:
                    if number := NUMBER.search(name):
                        found.setdefault(parameter, {}).setdefault(int(number[1]), []).append(name)
        return found

    def stored(self, parameter: str) -> str:
        """Return the source's name of a parameter that is one tensor there; its own name if the source is not known."""
        names = self.sources.get(parameter, ())
        return names[0] if len(names) == 1 else parameter

    def module(self, path: str) -> str:
        """Return the source's name of a module that holds a weight, plain or packed."""
        for held in ("weight", "qweight"):
            if f"{path}.{held}" in self.sources:
                return self.stored(f"{path}.{held}").removesuffix(f".{held}")
        return path

    def expert(self, path: str, number: int, part: str, joined: str, place: int) -> str | None:
        """Return the source's name of one part of one expert; None where the source holds all experts in one tensor.

        path: of the experts' module; part: "gate_proj", "up_proj" or "down_proj"; joined: the parameter that holds the part
        of all experts; place: 0, or 1 for the second of two parts that are joined.
        """
        own = self._by_number.get(f"{path}.{joined}", {}).get(number, [])
        if place < len(own):
            return own[place].removesuffix(".weight")
        for other in OTHER_NAMES[part]:  # a packed checkpoint
            if f"{path}.{number}.{other}.qweight" in self.sources:
                return self.stored(f"{path}.{number}.{other}.qweight").removesuffix(".qweight")
        return None

    def experts(self, path: str) -> str:
        """Return what the experts in the module at `path` are named by where the source holds all of them in one tensor."""
        for parameter in ("gate_up_proj", "up_proj"):
            name = self.stored(f"{path}.{parameter}")
            if name.endswith(f".{parameter}"):
                return name.removesuffix(f".{parameter}")
        return path


#: Of a model that is not read from files, or whose files have its own names.
OWN = Names()


@dataclass(frozen=True)
class _Rules:
    """How Transformers converts names for one class. places: pattern of a joined tensor → its place among those it is
    joined with; joining: the patterns of tensors that are joined and not changed otherwise; cutting: of those of which several
    parameters are made."""

    renamings: list[Any]
    converters: list[Any]
    places: dict[str, int]
    joining: frozenset[str]
    cutting: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> _Rules:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

        rules: list[Any] = get_model_conversion_mapping(model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        joining = [
            rule for rule in converters if all(isinstance(o, (MergeModulelist, Concatenate)) for o in rule.operations)
        ]
        return cls(
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            converters,
            {pattern: i for rule in converters for i, pattern in enumerate(rule.source_patterns)},
            frozenset(pattern for rule in joining for pattern in rule.source_patterns),
            frozenset(
                pattern for rule in converters if len(rule.target_patterns) > 1 for pattern in rule.source_patterns
            ),
        )

    def forward(self, name: str, prefix: str | None = None, known: Any = None) -> tuple[str, str | None]:
        """Return the name on loading, and the pattern of a tensor that is converted."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self.renamings, self.converters, prefix, known)

    def backward(self, name: str) -> str:
        """Return what the source would call a parameter."""
        from transformers.core_model_loading import PrefixChange, rename_source_key

        back: list[Any] = [
            rule.reverse_transform() for rule in reversed(self.renamings) if not isinstance(rule, PrefixChange)
        ]
        return rename_source_key(name, back, [], reverse=True)[0]
