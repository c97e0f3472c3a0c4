"""What the user asks for, checked once, before anything heavier than this module is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..support.errors import ConfigError
from .checks import are_strings, require_choice, require_whole
from .linear import MAX_ROTATIONS, SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, LinearLayout
from .patterns import require_regular_expression
from .recipe import PRESETS, Recipe

PAIR_SELECTIONS = ("random", "magnitude")
#: Whether windows begin with `<bos>`; see `support.windows.window_prefix`.
BOS_CHOICES = ("auto", "never", "always")


@dataclass(frozen=True)
class QuantConfig:
    """What to do to a model; refuses impossible values on construction with `ConfigError`.

    preset: a row of `PRESETS`; recipe: overrides that row, for experiments.
    bits: 2, 3, 4 or 8 per weight; symmetric: zero point fixed in the middle.
    group_size: 32, 64, 128, or "auto" for the largest that divides every layer.
    rotations: K, 0 (channel scales only) to 16; pair_selection: "random" or "magnitude".
    share_rotations: one transform for all linears that read the same input.
    samples × seq_len: calibration tokens, drawn evenly from `calibration` (files, data set names, or "default").
    validation: text of the windows that choose the best epoch; empty: windows of `calibration` that are not trained on.
    compute: dtype of the forward passes; "auto" is bfloat16 for bfloat16 models on GPUs, float32 elsewhere.
    bos: whether windows of text begin with `<bos>`: "auto" as the tokenizer has it, "never", "always".
    ignore: modules left as they are: a path, its last parts, or "re:" and a regular expression from the path's start.
    """

    preset: str = "fast"
    bits: int = 4
    group_size: int | Literal["auto"] = 128
    rotations: int = 8
    symmetric: bool = False
    pair_selection: str = "random"
    share_rotations: bool = False
    samples: int = 128
    seq_len: int = 2048
    calibration: tuple[str, ...] = ("default",)
    validation: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    seed: int = 0
    compute: str = "auto"
    bos: str = "auto"
    recipe: Recipe = None  # type: ignore[assignment]  # filled in from the preset

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        for name in ("symmetric", "share_rotations"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: True, False")
        require_choice("pair_selection", self.pair_selection, PAIR_SELECTIONS)
        require_choice("compute", self.compute, ("auto", "float32", "bfloat16"))
        require_choice("bos", self.bos, BOS_CHOICES)
        require_choice("bits", self.bits, SUPPORTED_BITS)
        require_choice("group_size", self.group_size, (*SUPPORTED_GROUP_SIZES, "auto"))
        require_whole("rotations", self.rotations, 0, MAX_ROTATIONS)
        require_whole("samples", self.samples, 1, 1_000_000)
        require_whole("seq_len", self.seq_len, 2, 1_000_000)
        require_whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("calibration", "validation", "ignore"):
            if not are_strings(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: a list or tuple of strings")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for pattern in self.ignore:
            require_regular_expression(pattern)
        if self.recipe is None:
            object.__setattr__(self, "recipe", PRESETS[self.preset])
        if not self.recipe.transform:
            object.__setattr__(self, "rotations", 0)

    def layout(self, in_features: int, out_features: int, bias: bool = False) -> LinearLayout:
        """The layout of a linear of this size; `group_size` must have been resolved to a number."""
        return LinearLayout(in_features, out_features, self.bits, int(self.group_size), self.rotations, bias)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `QuantConfig(**d)` with `recipe=Recipe(**d["recipe"])` gives it back."""
        return asdict(self)

    def with_group_size(self, group_size: int) -> QuantConfig:
        """A copy with "auto" resolved."""
        return replace(self, group_size=group_size)
