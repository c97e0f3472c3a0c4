"""`quantization_config` of config.json: what a reader must know of a checkpoint."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field, fields
from typing import Any

from ..support.errors import CheckpointError
from .checks import are_strings
from .linear import MAX_ROTATIONS, SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, LinearLayout

QUANT_METHOD = "paroquant"


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json. The first four fields are all that a foreign checkpoint must have.

    modules_to_not_convert: linears that kept their plain weight, by path.
    shared_rotations: groups of linears, by path, whose stored transforms are equal.
    provenance: tool version, preset, seed, calibration and its hash; None for checkpoints from elsewhere.
    """

    bits: int
    group_size: int
    rotations: int
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    shared_rotations: tuple[tuple[str, ...], ...] = ()
    provenance: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, allowed in (("bits", SUPPORTED_BITS), ("group_size", SUPPORTED_GROUP_SIZES)):
            if type(getattr(self, name)) is not int or getattr(self, name) not in allowed:
                raise _bad_entry(name, getattr(self, name), f"one of {', '.join(map(str, allowed))}")
        if type(self.rotations) is not int or not 0 <= self.rotations <= MAX_ROTATIONS:
            raise _bad_entry("krot", self.rotations, f"a whole number from 0 to {MAX_ROTATIONS}")
        if not isinstance(self.zero_point, bool):
            raise _bad_entry("zero_point", self.zero_point, "true or false")
        if not are_strings(self.modules_to_not_convert):
            raise _bad_entry("modules_to_not_convert", self.modules_to_not_convert, "a list of module paths")
        shared = self.shared_rotations
        if not (isinstance(shared, (list, tuple)) and all(map(are_strings, shared))):
            raise _bad_entry("shared_rotations", shared, "a list of lists of module paths")
        if not (self.provenance is None or isinstance(self.provenance, dict)):
            raise _bad_entry("provenance", self.provenance, "an object")
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))
        object.__setattr__(self, "shared_rotations", tuple(map(tuple, shared)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: the four entries that the original writes, and the others where they say something.

        `zero_point` is written only when false: it is true for every reader that is not told, and GPTQModel 7.7
        refuses a file that says so. `dynamic` repeats `modules_to_not_convert` for GPTQModel, which would otherwise
        run such layers with weights of zero.
        """
        entries: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "krot": self.rotations,
        }
        if not self.zero_point:
            entries["zero_point"] = False
        if self.modules_to_not_convert:
            entries["modules_to_not_convert"] = list(self.modules_to_not_convert)
            entries["dynamic"] = {f"-:^{re.escape(path)}$": {} for path in self.modules_to_not_convert}
        if self.shared_rotations:
            entries["shared_rotations"] = [list(group) for group in self.shared_rotations]
        if self.provenance is not None:
            entries["provenance"] = self.provenance
        return entries

    @classmethod
    def from_dict(cls, entries: Any) -> CheckpointConfig:
        """Read the JSON object; raises `CheckpointError` naming the entry. Unknown entries are ignored."""
        if not isinstance(entries, dict) or entries.get("quant_method") != QUANT_METHOD:
            method = entries.get("quant_method") if isinstance(entries, dict) else entries
            raise CheckpointError(f"config.json: quant_method is {reprlib.repr(method)}, must be {QUANT_METHOD!r}.")
        for key in ("bits", "group_size", "krot"):
            if key not in entries:
                raise CheckpointError(f"config.json: quantization_config has no {key!r}. The checkpoint is damaged.")
        stored_as = {f.name: "krot" if f.name == "rotations" else f.name for f in fields(cls)}
        given = {name: entries[key] for name, key in stored_as.items() if entries.get(key) is not None or key == "krot"}
        given |= {name: entries[name] for name in ("bits", "group_size")}
        return cls(**given)

    def layout(self, in_features: int, out_features: int, bias: bool = False) -> LinearLayout:
        """The layout of a linear of this size."""
        return LinearLayout(in_features, out_features, self.bits, self.group_size, self.rotations, bias)


def _bad_entry(name: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.{name} is {reprlib.repr(value)}, must be {allowed}.")
