"""Read and write `quantization_config` in config.json: what a program must know to read a checkpoint."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..support.errors import CheckpointError, ConfigError
from .activations import FORMATS
from .checks import are_strings
from .codes import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES
from .linear import LinearLayout, Spec
from .mx import WEIGHT_FORMATS
from .plan import Plan
from .rotation import MAX_ROTATIONS

QUANT_METHOD = "paroquant"


def _is_one_of(allowed: tuple[int, ...]) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value in allowed


#: Entry of config.json → the field of `Spec`, a function that tells whether a value is allowed, and the allowed values in
#: words.
SPEC_ENTRIES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "bits": ("bits", _is_one_of(SUPPORTED_BITS), f"one of {', '.join(map(str, SUPPORTED_BITS))}"),
    "group_size": (
        "group_size", _is_one_of(SUPPORTED_GROUP_SIZES), f"one of {', '.join(map(str, SUPPORTED_GROUP_SIZES))}",
    ),
    "krot": ("rotations", _is_one_of(tuple(range(MAX_ROTATIONS + 1))), f"a whole number from 0 to {MAX_ROTATIONS}"),
    "activations": (
        "activations", lambda value: value is None or (isinstance(value, str) and value in FORMATS),
        f"one of {', '.join(FORMATS)}, or null",
    ),
    "weights": (
        "weights", lambda value: value is None or (isinstance(value, str) and value in WEIGHT_FORMATS),
        f"{' or '.join(WEIGHT_FORMATS)}, or null",
    ),
}  # fmt: skip
#: The entries that every checkpoint has; the others are left out where they say nothing.
REQUIRED = ("bits", "group_size", "krot")


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json. A checkpoint from another program needs only the entries of `spec`.

    spec: the spec of every quantized linear that no override names.
    overrides: pairs of a regular expression, matched from the start of a linear's path, and the spec of the linears that
    it matches. If several match a path, the first counts.
    modules_to_not_convert: paths of linears that kept their plain weight.
    shared_rotations: groups of paths of linears whose stored transforms are equal.
    transform_per_expert: whether each expert of a block has a transform of its own, stored as `spec.experts` says.
    provenance: tool version, preset, seed, calibration text and its hash; None for checkpoints from other programs.

    Raises `CheckpointError` for an entry of the wrong type.
    """

    spec: Spec
    overrides: tuple[tuple[str, Spec], ...] = ()
    modules_to_not_convert: tuple[str, ...] = ()
    shared_rotations: tuple[tuple[str, ...], ...] = ()
    transform_per_expert: bool = False
    provenance: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not are_strings(self.modules_to_not_convert):
            raise _bad_entry("modules_to_not_convert", self.modules_to_not_convert, "a list of module paths")
        shared = self.shared_rotations
        if not (isinstance(shared, (list, tuple)) and all(map(are_strings, shared))):
            raise _bad_entry("shared_rotations", shared, "a list of lists of module paths")
        if not (self.provenance is None or isinstance(self.provenance, dict)):
            raise _bad_entry("provenance", self.provenance, "an object")
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))
        object.__setattr__(self, "shared_rotations", tuple(map(tuple, shared)))

    @classmethod
    def of_plan(cls, plan: Plan, **entries: Any) -> CheckpointConfig:
        """Make the config of a checkpoint from its plan; every exception becomes an override for its exact path.

        entries: values of the other fields.
        """
        exceptions = plan.exceptions.items()
        return cls(plan.default, tuple((f"^{re.escape(path)}$", spec) for path, spec in exceptions), **entries)

    def spec_of(self, path: str) -> Spec:
        """Return the spec of the quantized linear at `path`."""
        return next((spec for pattern, spec in self.overrides if re.match(pattern, path)), self.spec)

    def layout(self, path: str, in_features: int, out_features: int, bias: bool = False) -> LinearLayout:
        """Return the layout of the linear at `path`, which has this size."""
        return self.spec_of(path).layout(in_features, out_features, bias)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: the four entries that the original ParoQuant writes, and the others unless empty.

        `zero_point` is written only if it is false: readers take it as true if it is absent, and GPTQModel 7.7 refuses a
        file in which it is true. `dynamic` follows GPTQModel's convention: it holds the overrides, and repeats
        `modules_to_not_convert`, because GPTQModel would otherwise run those layers with weights of zero.
        """
        entries: dict[str, Any] = {"quant_method": QUANT_METHOD, **_as_entries(self.spec)}
        if self.spec.symmetric:
            entries["zero_point"] = False
        if self.modules_to_not_convert:
            entries["modules_to_not_convert"] = list(self.modules_to_not_convert)
        dynamic = {f"+:{pattern}": _differing(spec, self.spec) for pattern, spec in self.overrides}
        dynamic |= {f"-:^{re.escape(path)}$": {} for path in self.modules_to_not_convert}
        if dynamic:
            entries["dynamic"] = dynamic
        if self.shared_rotations:
            entries["shared_rotations"] = [list(group) for group in self.shared_rotations]
        if self.transform_per_expert:
            entries["transform_per_expert"] = True
        if self.provenance is not None:
            entries["provenance"] = self.provenance
        return entries

    @classmethod
    def from_dict(cls, entries: Any) -> CheckpointConfig:
        """Read the JSON object. Unknown entries are ignored.

        Raises `CheckpointError`, which names the entry, if one is missing or has a value that is not allowed.
        """
        if not isinstance(entries, dict) or entries.get("quant_method") != QUANT_METHOD:
            method = entries.get("quant_method") if isinstance(entries, dict) else entries
            raise CheckpointError(f"config.json: quant_method is {reprlib.repr(method)}, must be {QUANT_METHOD!r}.")
        for key in REQUIRED:
            if key not in entries:
                raise CheckpointError(f"config.json: quantization_config has no {key!r}. The checkpoint is damaged.")
        zero_point = entries.get("zero_point")
        if zero_point is not None and not isinstance(zero_point, bool):
            raise _bad_entry("zero_point", zero_point, "true or false")
        spec = _with(Spec(symmetric=zero_point is False), _spec_fields(entries, ""), "quantization_config")
        own = entries.get("transform_per_expert")
        if own is not None and not isinstance(own, bool):
            raise _bad_entry("transform_per_expert", own, "true or false")
        names = ("modules_to_not_convert", "shared_rotations", "transform_per_expert", "provenance")
        given = {name: entries[name] for name in names if entries.get(name) is not None}
        return cls(spec, _overrides(entries.get("dynamic"), spec), **given)


def _as_entries(spec: Spec) -> dict[str, Any]:
    entries = {key: getattr(spec, name) for key, (name, _, _) in SPEC_ENTRIES.items()}
    return {key: value for key, value in entries.items() if key in REQUIRED or value is not None}


def _differing(spec: Spec, default: Spec) -> dict[str, Any]:
    names = {key: name for key, (name, _, _) in SPEC_ENTRIES.items()}
    return {key: getattr(spec, name) for key, name in names.items() if getattr(spec, name) != getattr(default, name)}


def _spec_fields(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Check entries of config.json and return them as fields of `Spec`; prefix: their place in the file, for messages."""
    found = {}
    for key, (name, allowed, words) in SPEC_ENTRIES.items():
        if key in entries:
            if not allowed(entries[key]):
                raise _bad_entry(f"{prefix}{key}", entries[key], words)
            found[name] = entries[key]
    return found


def _with(spec: Spec, changes: Mapping[str, Any], place: str) -> Spec:
    """Return a spec with changes, each of which is allowed; raises `CheckpointError` if they exclude each other."""
    try:
        return replace(spec, **changes)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {place}: {error}. The checkpoint is damaged.") from error


def _overrides(dynamic: Any, default: Spec) -> tuple[tuple[str, Spec], ...]:
    """Return the patterns of `dynamic` and their specs.

    Entries that begin with "-:" name plain linears for other programs. They are skipped: the stored tensors already show
    which linears are plain.
    """
    if dynamic is None:
        return ()
    if not isinstance(dynamic, dict):
        raise _bad_entry("dynamic", dynamic, "an object of patterns and their entries")
    found = []
    for key, entries in dynamic.items():
        if key.startswith("-:"):
            continue
        pattern, place = key.removeprefix("+:"), f"dynamic[{key!r}]"
        try:
            re.compile(pattern)
        except re.error as error:
            raise _bad_entry(f"{place}'s pattern", pattern, f"a regular expression ({error})") from error
        if not isinstance(entries, dict):
            raise _bad_entry(place, entries, "an object")
        found.append((pattern, _with(default, _spec_fields(entries, f"{place}."), place)))
    return tuple(found)


def _bad_entry(name: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.{name} is {reprlib.repr(value)}, must be {allowed}.")
