"""Mixed plans: a form for each weight, to keep a whole model within a size. What is asked for, and the file that results.

`Target` is the size wanted, `Candidates` the forms to choose from; `MixedPlan` is what `pairquant plan` writes, a user may
edit, and `pairquant quantize --plan` takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError, did_you_mean
from ..support.formatting import size
from .checks import require_between
from .codes import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES
from .fields import Size
from .linear import Spec
from .patterns import matches, require_regular_expression
from .rotation import MAX_ROTATIONS

#: The version of the file's layout.
VERSION = 1
#: The settings of a form, by the names that the file has, and the values that each may have.
SETTINGS = {
    "bits": SUPPORTED_BITS,
    "group_size": SUPPORTED_GROUP_SIZES,
    "rotations": tuple(range(MAX_ROTATIONS + 1)),
}
#: The units of `--target-size`, in bytes.
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """What a plan is to reach: a size, and how few transforms.

    bits_per_weight: of the quantized layers; size_bytes: of all the checkpoint's weights; rotated: of the inputs that layers
    read, at most this share is transformed. Raises `ConfigError` unless one is given, for both sizes at once, and for values
    that are not allowed.
    """

    bits_per_weight: float | None = None
    size_bytes: int | None = None
    rotated: float | None = None

    def __post_init__(self) -> None:
        if self.sized and self.bits_per_weight is not None and self.size_bytes is not None:
            raise ConfigError("a target is either bits per weight (--target-bpw) or a size (--target-size), not both")
        if not self.sized and self.rotated is None:
            raise ConfigError(
                "a target needs bits per weight (--target-bpw), a size (--target-size) or --rotations auto"
            )
        if self.rotated is not None:
            require_between("the target's rotated", self.rotated, 0, 1)
        for name in ("bits_per_weight", "size_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
                raise ConfigError(f"the target's {name} is {value!r}, allowed: numbers above 0")

    @property
    def sized(self) -> bool:
        """Whether a size is wanted."""
        return self.bits_per_weight is not None or self.size_bytes is not None

    @classmethod
    def of_size(cls, text: str) -> Target:
        """Read a size such as "4.2GB" or "900 MiB"; raises `ConfigError` for anything else."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if found is None or found[2].upper() not in UNITS:
            raise ConfigError(f"target size is {text!r}, allowed: a number and a unit such as 4.2GB, 900MB or 4GiB")
        return cls(size_bytes=round(float(found[1]) * UNITS[found[2].upper()]))

    def __str__(self) -> str:
        parts = [f"{self.bits_per_weight:g} bits per weight"] if self.bits_per_weight is not None else []
        parts += [size(self.size_bytes)] if self.size_bytes is not None else []
        parts += [f"transforms for {self.rotated:.0%} of the inputs"] if self.rotated is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Candidates:
    """The values that a plan may give to each weight; those of an empty tuple stay as the options have them.

    Raises `ConfigError` for values that are not allowed.
    """

    bits: tuple[int, ...] = SUPPORTED_BITS
    group_size: tuple[int, ...] = ()
    rotations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in SETTINGS.items():
            values = tuple(getattr(self, name))
            if wrong := [value for value in values if type(value) is not int or value not in allowed]:
                raise ConfigError(f"candidate {name} is {wrong[0]!r}, allowed: {', '.join(map(str, allowed))}")
            object.__setattr__(self, name, tuple(sorted(set(values))))

    @classmethod
    def parse(cls, text: str) -> Candidates:
        """Read text such as "bits:2|3|4,group_size:64|128", or "all" for every width and group size and 0, 2, 4, 8 rotations.

        Raises `ConfigError`, which names the part that is wrong.
        """
        if text.strip() == "all":
            return cls(SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, (0, 2, 4, 8))
        values: dict[str, tuple[int, ...]] = {}
        for setting in text.split(","):
            name, _, listed = setting.strip().partition(":")
            numbers = [number.strip() for number in listed.split("|")]
            if name not in SETTINGS or name in values or not all(number.isdecimal() for number in numbers):
                hint = did_you_mean(name, SETTINGS) if name not in SETTINGS else ""
                raise ConfigError(
                    f"candidates {text!r}: {setting.strip()!r} is none of "
                    f"{', '.join(f'{known}:A|B|…' for known in SETTINGS)}, or all{hint}"
                )
            values[name] = tuple(map(int, numbers))
        return cls(**values)

    def specs(self, default: Spec) -> list[Spec]:
        """Return every form, in ascending order of bits."""
        axes = {name: getattr(self, name) or (getattr(default, name),) for name in SETTINGS}
        return [replace(default, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


#: Every width; groups and rotations as the options have them.
ANY_WIDTH = Candidates()


@dataclass(frozen=True)
class MixedPlan:
    """A form for each weight of a model.

    default: the form of weights that `layers` does not name; layers: pattern → form (patterns as in `Override`); the last
    that matches counts. model: what it was made for: a `fingerprint` with the model's name and the target; None if it was
    written by hand. measured: what it was made from, as JSON, so that plans of other sizes can be made; see
    `optimize.sensitivity`. scales_alone: as in `Recipe`, which follows the plan.
    """

    default: Spec
    layers: Mapping[str, Spec]
    model: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] | None = field(default=None, compare=False)
    origin: str = field(default="the plan", compare=False)
    scales_alone: bool = True

    def spec_of(self, path: str) -> Spec:
        """Return the form of the weight at `path`."""
        parts = path.split(".")
        ends = {".".join(part) for i in range(len(parts)) for part in (parts[i:], parts[: i + 1])}
        named = [name for name in ends if name in self.layers]
        named += [name for name, expression in self._expressions.items() if expression.match(path)]
        return self.layers[max(named, key=self._order.__getitem__)] if named else self.default

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.layers)}

    @cached_property
    def _expressions(self) -> dict[str, re.Pattern[str]]:
        return {name: re.compile(name[3:]) for name in self.layers if name.startswith("re:")}

    def require_for(self, sizes: Mapping[str, Size]) -> None:
        """Refuse a model that the plan was not made for. sizes: of every weight that could be quantized, by path.

        Raises `ConfigError`, which names what differs.
        """
        made_for = dict(self.model or {})
        here = fingerprint(sizes)
        if made_for.get("digest", here["digest"]) != here["digest"]:
            raise ConfigError(
                f"{self.origin} was made for {made_for.get('name', 'another model')}, which has "
                f"{made_for.get('layers', '?')} layers with {made_for.get('weights', '?')} weights; this model has "
                f"{here['layers']} with {here['weights']}, or other paths. Make one for it: pairquant plan"
            )
        for name in self.layers:
            if name not in sizes and not any(matches(path, (name,)) for path in sizes):
                raise ConfigError(
                    f"{self.origin} names {name!r}, which is no layer of this model{did_you_mean(name, sizes)}"
                )

    def form(self) -> dict[str, Any]:
        """Return the part of the JSON object that decides the result: without what the plan was made for and from."""
        return {
            "pairquant_plan": VERSION,
            **({} if self.scales_alone else {"scales_alone": False}),
            "default": {**settings(self.default), "symmetric": self.default.symmetric},
            "layers": {name: settings(spec) for name, spec in self.layers.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `from_dict` reads."""
        entries = self.form()
        if self.model is not None:
            entries["model"] = dict(self.model)
        if self.measured is not None:
            entries["measured"] = self.measured
        return entries

    @classmethod
    def from_dict(cls, entries: Any, origin: str = "the plan") -> MixedPlan:
        """Read the JSON object; origin: what errors call it. Raises `ConfigError`, which names the entry that is wrong."""
        if not isinstance(entries, dict) or entries.get("pairquant_plan") != VERSION:
            found = entries.get("pairquant_plan") if isinstance(entries, dict) else type(entries).__name__
            raise ConfigError(f"{origin}: pairquant_plan is {found!r}, must be {VERSION}. Make it with pairquant plan.")
        layers = entries.get("layers")
        if not isinstance(layers, dict):
            raise ConfigError(
                f"{origin}: layers is {type(layers).__name__}, must be an object of layers and their forms"
            )
        default = _spec(entries.get("default"), Spec(), f"{origin}: default", (*SETTINGS, "symmetric"))
        for name in layers:
            require_regular_expression(f"{origin}: layer", name)
        specs = {name: _spec(of, default, f"{origin}: {name}", SETTINGS) for name, of in layers.items()}
        alone = entries.get("scales_alone", True)
        if not isinstance(alone, bool):
            raise ConfigError(f"{origin}: scales_alone is {alone!r}, must be true or false")
        return cls(default, specs, entries.get("model"), entries.get("measured"), origin, alone)

    @classmethod
    def read(cls, file: str | Path) -> MixedPlan:
        """Read a plan's file; raises `ConfigError` if it cannot be read or is no plan."""
        try:
            entries = json.loads(Path(file).read_text())
        except OSError as error:
            raise ConfigError(f"the plan {str(file)!r} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"the plan {str(file)!r} is not JSON: {error}") from error
        return cls.from_dict(entries, str(file))


def settings(spec: Spec) -> dict[str, int]:
    """Return a form's settings, as the file has them."""
    return {name: getattr(spec, name) for name in SETTINGS}


def fingerprint(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """Return what tells one model's shape from another's: how many layers and weights, and a digest of paths and sizes."""
    lines = sorted(f"{path} {size.out_features} {size.in_features}" for path, size in sizes.items())
    return {
        "layers": len(sizes),
        "weights": sum(size.in_features * size.out_features for size in sizes.values()),
        "digest": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def _spec(entries: Any, default: Spec, place: str, allowed: Iterable[str]) -> Spec:
    allowed = tuple(allowed)
    if not isinstance(entries, dict):
        raise ConfigError(f"{place} is {entries!r}, must be an object with {', '.join(allowed)}")
    for name in entries:
        if name not in allowed:
            raise ConfigError(f"{place} has {name!r}, allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")
    try:
        return replace(default, **entries)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
