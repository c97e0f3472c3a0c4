"""What can be chosen, checked once: `QuantConfig` is what the user asks for, `Recipe` a row of the preset table,
`CheckpointConfig` the `quantization_config` of config.json.

Nothing in here imports torch's heavier friends, so that bad options are refused before anything is loaded.
"""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from .errors import CheckpointError, ConfigError, did_you_mean
from .layout import MAX_ROTATIONS, SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, LinearLayout

QUANT_METHOD = "paroquant"


def _choice(name: str, value: Any, allowed) -> None:
    if type(value) not in (str, int) or value not in allowed:
        names = [str(item) for item in allowed]
        raise ConfigError(f"{name} is {value!r}, allowed: {', '.join(names)}{did_you_mean(str(value), names)}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: whole numbers from {low} to {high}")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: {low} to {high}")


@dataclass(frozen=True)
class Training:
    """Block-wise training in two stages, the paper's recipe (section 4; method, "Fitting, paper recipe").

    Minimises `loss` between the quantized block on the quantized model's activations and the original block on the
    original's. Stage 1 trains angles and channel scales at `transform_rate` for `epochs`; stage 2 trains weights at
    `weight_rate`, quantizer scales and zero points at `quantizer_rate`, for `weight_epochs`.
    AdamW with `beta1`, `beta2`, `eps`, `weight_decay`; `batch` samples a step; cosine decay to `final_rate` times the
    rate within each stage. The best epoch on `validation_samples` held-out windows is kept (0: on those trained on).
    """

    epochs: int = 10
    transform_rate: float = 0.05
    weight_epochs: int = 10
    weight_rate: float = 1e-5
    quantizer_rate: float = 1e-6
    batch: int = 16
    loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    final_rate: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.01
    validation_samples: int = 64

    def __post_init__(self) -> None:
        _choice("loss", self.loss, ("smooth_l1", "mse"))
        for name in ("epochs", "weight_epochs", "validation_samples"):
            _whole(name, getattr(self, name), 0, 1_000_000)
        _whole("batch", self.batch, 1, 1_000_000)
        for name in ("transform_rate", "weight_rate", "quantizer_rate", "final_rate", "weight_decay", "eps"):
            _between(name, getattr(self, name), 0, 1000)
        for name in ("beta1", "beta2"):
            _between(name, getattr(self, name), 0, 0.9999999)


@dataclass(frozen=True)
class Refit:
    """A short block-wise training after rounding, the codes being fixed: group scales, channel scales, angles, norms.

    epochs, batch, rates (relative steps of the logarithm for scales, radians for angles, absolute for norm weights),
    cosine decay to `final_rate` times the rate. The best epoch on the training windows is kept.
    """

    epochs: int = 6
    batch: int = 8
    scale_rate: float = 1e-3
    transform_rate: float = 1e-3
    norm_rate: float = 1e-3
    final_rate: float = 0.05

    def __post_init__(self) -> None:
        _whole("epochs", self.epochs, 0, 1_000_000)
        _whole("batch", self.batch, 1, 1_000_000)
        for name in ("scale_rate", "transform_rate", "norm_rate", "final_rate"):
            _between(name, getattr(self, name), 0, 1000)


@dataclass(frozen=True)
class Recipe:
    """How transforms are found and weights are rounded; every field was measured (docs/decisions.md).

    transform: fit channel scales and rotations at all; without, the checkpoint has K = 0.
    channel_scales: fit channel scales beside the rotations.
    training: find transforms and weights by block-wise training instead of the quadratic proxy.
    refit: train the scales of the rounded block a little more.
    steps, learning_rate, final_rate: AdamW on the quadratic proxy, cosine decay to `final_rate` times the rate.
    rounding: "nearest" or "gptq".
    damping: share of the Hessian's mean diagonal added before GPTQ.
    by_activation: GPTQ takes the columns with the largest activations first.
    shrinks: ranges tried per group before rounding, as factors of min and max.
    sweeps: coordinate-descent passes after GPTQ; refit_scales: refit group scales in each.
    drift: share of the earlier layers' error that a layer's weight is asked to correct, 0 to 1.
    """

    transform: bool = True
    channel_scales: bool = True
    training: Training | None = None
    refit: Refit | None = None
    steps: int = 150
    learning_rate: float = 0.05
    final_rate: float = 0.05
    rounding: Literal["nearest", "gptq"] = "gptq"
    damping: float = 0.01
    by_activation: bool = True
    shrinks: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8)
    sweeps: int = 2
    refit_scales: bool = True
    drift: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "shrinks", tuple(self.shrinks))
        _choice("rounding", self.rounding, ("nearest", "gptq"))
        _whole("steps", self.steps, 0, 1_000_000)
        _whole("sweeps", self.sweeps, 0, 1000)
        if not self.shrinks or not all(0 < shrink <= 1 for shrink in self.shrinks):
            raise ConfigError(f"shrinks is {self.shrinks!r}, allowed: at least one factor above 0, up to 1")
        for name, low, high in (("drift", 0, 1), ("damping", 0, 1), ("final_rate", 0, 1), ("learning_rate", 0, 1000)):
            _between(name, getattr(self, name), low, high)


#: The presets, by name. "best" is "fast" and a refit of what is continuous; "paper" the original's recipe; "quick" is
#: "fast" with a sixth of the steps and one stream of text, for trying things out; "gptq" and "rtn" (round to nearest)
#: transform nothing: the baselines.
PRESETS: dict[str, Recipe] = {
    "fast": Recipe(),
    "best": Recipe(refit=Refit()),
    "paper": Recipe(training=Training(), rounding="nearest", shrinks=(1.0,), sweeps=0, drift=0.0),
    "quick": Recipe(steps=25, sweeps=1, shrinks=(1.0, 0.9, 0.8), drift=0.0),
    "gptq": Recipe(transform=False, by_activation=False, shrinks=(1.0,), sweeps=0, drift=0.0),
    "rtn": Recipe(transform=False, rounding="nearest", shrinks=(1.0,), sweeps=0, drift=0.0),
}


def preset_named(name: str) -> Recipe:
    """The preset; raises `ConfigError` naming those there are."""
    _choice("preset", name, PRESETS)
    return PRESETS[name]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its name, nested ones dotted: {"steps": 150, "training.epochs": 10, …}."""
    found: dict[str, Any] = {}
    for name, value in vars(recipe).items():
        if isinstance(value, (Training, Refit)):
            found |= {f"{name}.{inner}": setting for inner, setting in vars(value).items()}
        elif value is not None:
            found[name] = value
    return found


def recipe_with(preset: str, settings: Sequence[str]) -> Recipe:
    """The preset with some settings changed, each "name=value" with a Python literal or a word as value.

    Raises `ConfigError` for names that the preset does not have, and values that are not allowed.
    """
    recipe = preset_named(preset)
    for setting in settings:
        name, equals, text = setting.partition("=")
        known = flat(recipe)
        if not equals or name not in known:
            raise ConfigError(
                f"setting {setting!r} of preset {preset!r} is none of: {', '.join(known)}{did_you_mean(name, known)}"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        wanted = type(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ConfigError(f"setting {name} is {text!r}, allowed: a value such as {known[name]!r}")
        outer, _, inner = name.rpartition(".")
        recipe = replace(
            recipe, **({outer: replace(getattr(recipe, outer), **{inner: value})} if outer else {name: value})
        )
    return recipe


PAIR_SELECTIONS = ("random", "magnitude")


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
    recipe: Recipe = None  # type: ignore[assignment]  # filled in from the preset

    def __post_init__(self) -> None:
        _choice("preset", self.preset, PRESETS)
        for name in ("symmetric", "share_rotations"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: True, False")
        _choice("pair_selection", self.pair_selection, PAIR_SELECTIONS)
        _choice("compute", self.compute, ("auto", "float32", "bfloat16"))
        _choice("bits", self.bits, SUPPORTED_BITS)
        _choice("group_size", self.group_size, (*SUPPORTED_GROUP_SIZES, "auto"))
        _whole("rotations", self.rotations, 0, MAX_ROTATIONS)
        _whole("samples", self.samples, 1, 1_000_000)
        _whole("seq_len", self.seq_len, 2, 1_000_000)
        _whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("calibration", "validation", "ignore"):
            if not _strings(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: a list or tuple of strings")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for pattern in self.ignore:
            _regular_expression(pattern)
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
        if not _strings(self.modules_to_not_convert):
            raise _bad_entry("modules_to_not_convert", self.modules_to_not_convert, "a list of module paths")
        shared = self.shared_rotations
        if not (isinstance(shared, (list, tuple)) and all(map(_strings, shared))):
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


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module path is named by one of the `ignore` patterns (see `QuantConfig`)."""
    return any(_matches_one(path, pattern) for pattern in patterns)


def _matches_one(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return f".{path}.".endswith(f".{pattern}.") or f"{path}.".startswith(f"{pattern}.")


def _regular_expression(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"ignore pattern {pattern!r} is not a regular expression: {error}") from error


def _bad_entry(name: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.{name} is {reprlib.repr(value)}, must be {allowed}.")


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
