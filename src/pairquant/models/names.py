"""Names of tensors: the source's, under which everything is stored, and those that Transformers gives them on loading.

Transformers renames tensors of some families, and joins the experts of a block into one parameter. A checkpoint keeps the
names of its source, so that every reader of the original model finds what it expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: The number of an expert in a tensor's name.
NUMBER = re.compile(r"\.(\d+)\.[^.]+(?:\.weight|\.bias)?$")

#: What the parts of an expert are called by different families.
OTHER_NAMES = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3", "w1"), "down_proj": ("down_proj", "w2")}


@dataclass(frozen=True)
class Names:
    """sources: parameter of the model → the source's tensors that it is made of, in the order in which they are joined.

    renamed: from a parameter's name to what a source would call it; joins: whether Transformers joins the tensor of this
    name with others on loading, as it does with single experts.
    """

    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Callable[[str], str] = lambda name: name
    joins: Callable[[str], bool] = lambda name: False

    @classmethod
    def of(cls, model: Any, stored: Iterable[str]) -> Names:
        """Find out how Transformers names the tensors of the source; model: it may lack its weights."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

        known = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        places = {pattern: i for each in converters for i, pattern in enumerate(each.source_patterns)}
        found: dict[str, list[tuple[int, int, str]]] = {}
        for name in stored:
            target, pattern = name, None
            if name not in known:
                target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            number = NUMBER.search(name)
            order = (int(number[1]) if number and pattern else 0, places.get(pattern or "", 0), name)
            found.setdefault(target, []).append(order)
        back = [each.reverse_transform() for each in reversed(renamings) if not isinstance(each, PrefixChange)]

        def renamed(name: str) -> str:
            return rename_source_key(name, back, [], reverse=True)[0]

        def joins(name: str) -> bool:
            return rename_source_key(name, renamings, converters)[1] is not None

        sources = {target: tuple(name for *_, name in sorted(names)) for target, names in found.items()}
        return cls(sources, renamed, joins)

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
        names = self.sources.get(f"{path}.{joined}", ())
        own = [name for name in names if (found := NUMBER.search(name)) and int(found[1]) == number]
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
