"""The options that a user can set. They are checked when they are created, before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..support.errors import ConfigError, did_you_mean
from .activations import FORMATS
from .checks import are_strings, require_choice, require_whole
from .codes import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES
from .linear import Spec
from .mixed import ANY_WIDTH, Candidates, MixedPlan, Target
from .mx import WEIGHT_FORMATS
from .patterns import require_regular_expression
from .recipe import PRESETS, Recipe
from .rotation import MAX_ROTATIONS

#: K by default, and the share of the inputs that keep their transform with rotations "auto" (docs/decisions.md).
ROTATIONS, ROTATED = 8, 2 / 3
PAIR_SELECTIONS = ("random", "magnitude")
#: What is done with the transforms of layers: stored beside each layer, folded into the model before it is quantized, or left out.
TRANSFORMS = ("rotated", "folded", "none")
#: Options that records of earlier versions lack.
ADDED_LATER = (
    "overrides", "bos", "all_experts", "transform_per_expert", "head_bits", "embedding_bits", "target", "candidates", "plan",
    "transform", "activations", "weights",
)  # fmt: skip
#: Whether windows begin with `<bos>`; see `support.windows.window_prefix`.
BOS_CHOICES = ("auto", "never", "always")


@dataclass(frozen=True)
class Override:
    """Changes to the spec of the weights that a pattern names.

    pattern: a path, parts of one that follow each other, or "re:" and a regular expression that is matched from the path's start;
    bits, group_size, rotations: as in `Spec`, None keeps the default; bits are those of whole numbers, so that a layer for which
    they are given has these also where the default is MXFP4. Raises `ConfigError` for values that are not allowed.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    rotations: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(f"an override's pattern is {self.pattern!r}, allowed: a path, parts of one, or re:…")
        require_regular_expression("override", self.pattern)
        if not self.changes:
            raise ConfigError(f"override {self.pattern!r} changes nothing. Give {_settings_allowed()}.")
        try:
            self.applied(Spec())
        except ConfigError as error:
            raise ConfigError(f"override {str(self)!r}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read an override from text such as "down_proj=bits:8,rotations:0".

        Raises `ConfigError`, which names the part that is wrong.
        """
        pattern, equals, settings = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"override {text!r} has no '='. Write PATTERN={_settings_allowed()}.")
        values: dict[str, int] = {}
        for setting in settings.split(","):
            name, _, value = setting.strip().partition(":")
            if name not in OVERRIDABLE or not value.strip().isdecimal() or name in values:
                hint = did_you_mean(name, OVERRIDABLE) if name not in OVERRIDABLE else ""
                raise ConfigError(f"override {text!r}: {setting!r} is none of {_settings_allowed()}{hint}")
            values[name] = int(value)
        return cls(pattern, **values)

    @property
    def changes(self) -> dict[str, int]:
        """The settings that are not None, by name."""
        return {name: value for name in OVERRIDABLE if (value := getattr(self, name)) is not None}

    def applied(self, default: Spec) -> Spec:
        """Return the default spec with this override's changes."""
        weights = default.weights if self.bits is None else None
        return replace(default, **self.changes, weights=weights)  # type: ignore[arg-type]  # only whole numbers can be overridden

    def __str__(self) -> str:
        return f"{self.pattern}={','.join(f'{name}:{value}' for name, value in self.changes.items())}"


#: The names of the settings that an override can change.
OVERRIDABLE = tuple(field.name for field in fields(Override) if field.name != "pattern")


def _settings_allowed() -> str:
    bits, sizes = ("|".join(map(str, values)) for values in (SUPPORTED_BITS, SUPPORTED_GROUP_SIZES))
    return f"bits:{bits}, group_size:{sizes}, rotations:0 to {MAX_ROTATIONS} (separated by commas)"


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a model. Raises `ConfigError` for a value that is not allowed.

    preset: a name in `PRESETS`; recipe: used instead of that preset's recipe, for experiments.
    bits: 2, 3, 4, 5, 6 or 8 per weight; symmetric: all zero points are in the middle of the codes, at 2^(b-1).
    weights: "mxfp4" rounds weights to 4-bit floats in blocks of 32 with scales that are powers of two; None: to whole numbers.
    group_size: 32, 64, 128, or "auto" for the largest that divides every layer.
    rotations: K, 0 (channel scales only) to 16, or "auto": 8, and no transform at all for the third of the layers' inputs
    where it buys least; pair_selection: "random" or "magnitude".
    share_rotations: fit one transform for all linears that read the same input.
    all_experts: fit every expert on all tokens of the text instead of those that its router gives it.
    transform_per_expert: fit a transform for each expert instead of one for all of a block, as the original does; no kernel runs
    such experts, which are decoded at each use.
    samples, seq_len: calibrate on `samples` windows of `seq_len` tokens, drawn evenly from the sources in `calibration`.
    calibration: files, names of data sets, or "default".
    validation: sources of the windows that choose the best epoch; empty: windows of `calibration` that are not trained on.
    compute: dtype of the forward passes; "auto" is bfloat16 for bfloat16 models on GPUs, else float32.
    bos: whether windows of text begin with `<bos>`: "auto" as the tokenizer does, "never", or "always".
    ignore: patterns of modules to leave as they are (see `Override.pattern`).
    overrides: other bits, group sizes or rotations for the layers that a pattern names; if several match, the last counts.
    target: choose the form of each layer so that the whole has this size, and the output changes least; candidates: the
    forms to choose from. plan: a plan made earlier, or its file; its default replaces bits, group_size, rotations, symmetric.
    transform: "rotated" stores angles and channel scales beside each layer; "folded" folds them into the weights around it before it
    is quantized, so that nothing runs before its product, and `rotations` counts those; "none" rounds the weights as they are.
    head_bits, embedding_bits: quantize the output embedding, the input embedding, to whole numbers of so many bits; None leaves
    it as it is.
    activations: round what the layers of the blocks read, in the rotated basis, to this format of `spec.activations`; None
    leaves it in 16 bits. Embeddings read theirs as it is.
    seed: decides every random choice.
    """

    preset: str = "fast"
    bits: int = 4
    group_size: int | Literal["auto"] = 128
    rotations: int | Literal["auto"] = ROTATIONS
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
    overrides: tuple[Override, ...] = ()
    all_experts: bool = False
    transform_per_expert: bool = False
    head_bits: int | None = None
    embedding_bits: int | None = None
    target: Target | None = None
    candidates: Candidates = ANY_WIDTH
    plan: MixedPlan | None = None
    transform: str = "rotated"
    activations: str | None = None
    weights: str | None = None
    recipe: Recipe = None  # type: ignore[assignment]  # filled in from the preset

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        for name in ("symmetric", "share_rotations", "all_experts", "transform_per_expert"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: True, False")
        require_choice("pair_selection", self.pair_selection, PAIR_SELECTIONS)
        require_choice("compute", self.compute, ("auto", "float32", "bfloat16"))
        require_choice("bos", self.bos, BOS_CHOICES)
        require_choice("transform", self.transform, TRANSFORMS)
        require_choice("bits", self.bits, SUPPORTED_BITS)
        for name in ("head_bits", "embedding_bits"):
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), SUPPORTED_BITS)
        self._require_formats()
        require_choice("group_size", self.group_size, (*SUPPORTED_GROUP_SIZES, "auto"))
        if isinstance(self.rotations, str) and self.rotations != "auto":
            raise ConfigError(
                f"rotations is {self.rotations!r}, allowed: whole numbers from 0 to {MAX_ROTATIONS}, or auto"
            )
        if self.rotations != "auto":
            require_whole("rotations", self.rotations, 0, MAX_ROTATIONS)
        require_whole("samples", self.samples, 1, 1_000_000)
        require_whole("seq_len", self.seq_len, 2, 1_000_000)
        require_whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("calibration", "validation", "ignore"):
            if not are_strings(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed: a list or tuple of strings")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for pattern in self.ignore:
            require_regular_expression("ignore", pattern)
        object.__setattr__(self, "overrides", tuple(_as_override(item) for item in self.overrides))
        self._settle_plan()
        if self.recipe is None:
            object.__setattr__(self, "recipe", PRESETS[self.preset])
        if self.plan is not None:
            object.__setattr__(
                self, "recipe", replace(self.recipe, scales_alone=self.recipe.scales_alone and self.plan.scales_alone)
            )
        if self.transform != "rotated":
            self._settle_transform()
        if not self.recipe.fits_transform:
            object.__setattr__(self, "rotations", 0)
        if self.rotations == "auto":
            self._settle_rotations()
        if not self.recipe.fits_transform and any(self.candidates.rotations):
            raise ConfigError(
                f"candidate rotations are {self.candidates.rotations}, allowed with preset {self.preset!r}: none, because it "
                "fits no transform. Leave them out of --candidates."
            )
        if self.transform_per_expert and not self.recipe.fits_transform:
            raise ConfigError(
                f"transform_per_expert is True, allowed with preset {self.preset!r}: False, because it fits no transform. Leave "
                "--transform-per-expert out."
            )
        self._require_what_is_trained()

    def _require_what_is_trained(self) -> None:
        """Refuse an output embedding that is trained but not quantized, and what needs text where none is read."""
        steps = self.recipe.head.steps
        if steps and self.head_bits is None:
            raise ConfigError(
                f"head.steps is {steps}, but the output embedding is not quantized, so that nothing of it can be trained. Add "
                "--head-bits, or leave head.steps out."
            )
        if self.recipe.needs_text:
            return
        if self.all_experts:
            raise ConfigError(
                f"all_experts is True, allowed with preset {self.preset!r}: False, because it rounds without any text. Leave "
                "--all-experts out."
            )
        if steps:
            raise ConfigError(
                f"head.steps is {steps}, allowed with preset {self.preset!r}: 0, because it rounds without any text to train on. "
                "Choose another preset, or leave head.steps out."
            )

    def _require_formats(self) -> None:
        """Check the formats of activations and weights, and refuse what does not go together with the latter."""
        if self.activations is not None:
            require_choice("activations", self.activations, FORMATS)
        if self.weights is None:
            return
        require_choice("weights", self.weights, WEIGHT_FORMATS)
        choosing = {
            "a plan is given": self.plan is not None,
            "a target size is given": self.target is not None,
            "rotations is 'auto'": self.rotations == "auto",
        }
        if found := next((what for what, asked in choosing.items() if asked), None):
            raise ConfigError(
                f"{found}, but weights is {self.weights!r}: forms are chosen among whole numbers only. Leave one of them out."
            )
        if self.bits != 4 or self.symmetric:
            given = f"bits is {self.bits}" if self.bits != 4 else "symmetric is True"
            raise ConfigError(
                f"{given}, but weights is {self.weights!r}, whose codes have 4 bits and no zero points. Leave one of them out; "
                "--override gives layers whole numbers of other bits."
            )

    def _settle_plan(self) -> None:
        """Read `target`, `candidates` and `plan`, which may be given as text, a file or JSON, and take the plan's default."""
        for name, kind in (("target", Target), ("candidates", Candidates)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, kind(**value))
        if isinstance(self.candidates, str):
            object.__setattr__(self, "candidates", Candidates.parse(self.candidates))
        if isinstance(self.plan, (str, Path)):
            object.__setattr__(self, "plan", MixedPlan.read(self.plan))
        elif isinstance(self.plan, Mapping):
            object.__setattr__(self, "plan", MixedPlan.from_dict(self.plan))
        if self.plan is None:
            return
        if self.target is not None:
            raise ConfigError("both a plan and a target are given; a plan has its size already. Leave one of them out.")
        for name, value in vars(self.plan.default).items():
            # A plan says nothing of formats, and the rotations of a folded transform are not of the layers.
            if name not in ("activations", "weights") and (self.transform, name) != ("folded", "rotations"):
                object.__setattr__(self, name, value)

    def _settle_transform(self) -> None:
        """Refuse what asks for rotations beside layers that get none; layers without rotations have no scales either then."""
        planned = () if self.plan is None else (self.plan.default, *self.plan.layers.values())
        asking = {
            "rotations is 'auto'": self.rotations == "auto",
            "candidates name rotations": any(self.candidates.rotations),
            "an override names rotations": any(override.rotations for override in self.overrides),
            "share_rotations is True": self.share_rotations,
            "transform_per_expert is True": self.transform_per_expert,
            "the plan has layers with rotations": any(spec.rotations for spec in planned),
        }
        if found := next((what for what, asked in asking.items() if asked), None):
            raise ConfigError(
                f"{found}, but transform is {self.transform!r}, which stores none beside any layer. Leave one of them out."
            )
        if self.transform == "none":
            object.__setattr__(self, "rotations", 0)
        elif not self.recipe.fits_transform:
            raise ConfigError(
                f"transform is 'folded', allowed with preset {self.preset!r}: none, because it fits no transform. Choose another "
                "preset, or leave --transform out."
            )
        object.__setattr__(self, "recipe", replace(self.recipe, scales_alone=False))

    def _settle_rotations(self) -> None:
        """Replace "auto" by what it stands for, so that records say it."""
        target, candidates = self.target, self.candidates
        if target is None:  # without a size, the largest forms would always be the best
            if candidates.bits not in ((), ANY_WIDTH.bits) or candidates.group_size:
                raise ConfigError(
                    "candidates name bits or groups, and no size is wanted that would decide between them. Give one "
                    "(--target-bpw, --target-size), or leave them out of --candidates."
                )
            candidates = replace(candidates, bits=())
        sizes = (None, None) if target is None else (target.bits_per_weight, target.size_bytes)
        object.__setattr__(self, "target", Target(*sizes, rotated=ROTATED))
        object.__setattr__(self, "candidates", replace(candidates, rotations=candidates.rotations or (0, ROTATIONS)))
        object.__setattr__(self, "rotations", ROTATIONS)
        object.__setattr__(self, "recipe", replace(self.recipe, scales_alone=False))

    @property
    def spec(self) -> Spec:
        """The default spec. If the group size is "auto", the spec has the largest group size, as a placeholder."""
        size = SUPPORTED_GROUP_SIZES[-1] if self.group_size == "auto" else int(self.group_size)
        return Spec(self.bits, size, int(self.rotations), self.symmetric, self.activations, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold; `from_dict` reads it.

        Options that were added later are left out at their defaults, so that earlier records stay equal.
        """
        entries = asdict(replace(self, plan=None))
        entries["plan"] = None if self.plan is None else self.plan.form()
        if self.recipe.head == Recipe.head:
            del entries["recipe"]["head"]  # added later as well
        usual = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in entries.items() if k not in ADDED_LATER or getattr(self, k) != usual[k]}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> QuantConfig:
        """Read what `to_dict` wrote, including the recipe. Raises `ConfigError` for unknown options and bad values."""
        unknown = [name for name in entries if name not in {field.name for field in fields(cls)}]
        if unknown:
            raise ConfigError(
                f"option {unknown[0]!r} is not known{did_you_mean(unknown[0], (f.name for f in fields(cls)))}"
            )
        recipe = entries.get("recipe")
        return cls(**{**entries, "recipe": Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else recipe})

    def with_group_size(self, group_size: int) -> QuantConfig:
        """Return a copy with this group size, which replaces "auto"."""
        return replace(self, group_size=group_size)


def _as_override(item: Any) -> Override:
    """Return the override that is given as an `Override`, as text (see `Override.parse`), or as a mapping from JSON."""
    if isinstance(item, Override):
        return item
    if isinstance(item, str):
        return Override.parse(item)
    if isinstance(item, Mapping) and set(item) <= {"pattern", *OVERRIDABLE}:
        return Override(**item)
    raise ConfigError(f"override is {item!r}, allowed: PATTERN={_settings_allowed()}")
