"""The settings of the algorithm, which finds transforms and rounds weights: `Recipe`, and the table of presets."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..support.errors import ConfigError, did_you_mean
from .checks import require_between, require_choice, require_whole


@dataclass(frozen=True)
class Training:
    """Block-wise training in two stages, the paper's recipe (arXiv 2511.10645, section 4).

    The training minimises `loss` between two outputs: that of the quantized block, which reads the quantized model's
    activations, and that of the original block, which reads the original model's activations. Stage 1 trains angles and
    channel scales at the learning rate `transform_rate` for `epochs`. Stage 2 trains weights at `weight_rate`, and scales
    and zero points of the quantizer at `quantizer_rate`, for `weight_epochs`.

    The optimizer is AdamW with `beta1`, `beta2`, `eps` and `weight_decay`; each step uses `batch` windows. Within a stage,
    the rates decay along a cosine to `final_rate` times their first value. The epoch with the least loss on
    `validation_samples` windows that are not trained on is kept (0: on the windows that are trained on).

    Raises `ConfigError` for values that are not allowed.
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
        require_choice("loss", self.loss, ("smooth_l1", "mse"))
        for name in ("epochs", "weight_epochs", "validation_samples"):
            require_whole(name, getattr(self, name), 0, 1_000_000)
        require_whole("batch", self.batch, 1, 1_000_000)
        for name in ("transform_rate", "weight_rate", "quantizer_rate", "final_rate", "weight_decay", "eps"):
            require_between(name, getattr(self, name), 0, 1000)
        for name in ("beta1", "beta2"):
            require_between(name, getattr(self, name), 0, 0.9999999)


@dataclass(frozen=True)
class Refit:
    """A short block-wise training after rounding. The codes stay fixed; scales, angles and norm weights are trained.

    Each step uses `batch` windows. `scale_rate` is the learning rate of the logarithms of group scales and channel scales,
    `transform_rate` that of the angles in radians, `norm_rate` that of the weights of norm layers. The rates decay along a
    cosine to `final_rate` times their first value. The epoch with the least loss on the training windows is kept.

    Raises `ConfigError` for values that are not allowed.
    """

    epochs: int = 6
    batch: int = 8
    scale_rate: float = 1e-3
    transform_rate: float = 1e-3
    norm_rate: float = 1e-3
    final_rate: float = 0.05

    def __post_init__(self) -> None:
        require_whole("epochs", self.epochs, 0, 1_000_000)
        require_whole("batch", self.batch, 1, 1_000_000)
        for name in ("scale_rate", "transform_rate", "norm_rate", "final_rate"):
            require_between(name, getattr(self, name), 0, 1000)

    @property
    def training(self) -> Training:
        """How the optimizer goes: the same epochs, windows a step and decay, and no weight decay."""
        return Training(epochs=self.epochs, batch=self.batch, final_rate=self.final_rate, weight_decay=0.0)


@dataclass(frozen=True)
class EndToEnd(Refit):
    """A training of the whole quantized model on the original's output, after all blocks. The codes stay fixed.

    The loss is KL(original ‖ quantized) of the next token. What is trained and the settings are
    those of `Refit`. fresh: so many times `samples` windows are read that no block was fitted on, if there is as much text;
    0 reads those that blocks were fitted on. An eighth of the windows is held out; the epoch with the least loss on them is
    kept.
    """

    epochs: int = 3
    batch: int = 4
    scale_rate: float = 3e-4
    transform_rate: float = 3e-4
    norm_rate: float = 3e-4
    fresh: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("fresh", self.fresh, 0, 1000)


@dataclass(frozen=True)
class HeadTraining:
    """A training of the quantized output embedding on the original's output, KL(original ‖ quantized) of the next token.

    Its inputs no longer change, so that nothing but this one weight is run: `steps` times on `batch` tokens before it is
    rounded, and as often afterwards; 0 leaves it untrained. `correction_rate` is the learning rate of the matrix that
    corrects what the blocks lost: a step changes the input of the output embedding by about that fraction at most;
    `scale_rate` that of the logarithms of group scales and channel scales, `transform_rate` that of the angles in radians.
    The rates decay along a cosine to `final_rate` times their first value.
    AdamW would go as far for tokens that hardly occur, whose gradients are noise, as for frequent ones: `floor` is added to
    its estimate of a gradient's size, as a multiple of the root mean square of the first step's gradients, so that smaller
    ones go less far.

    Raises `ConfigError` for values that are not allowed.
    """

    steps: int = 200
    batch: int = 1024
    correction_rate: float = 0.05
    scale_rate: float = 3e-3
    transform_rate: float = 1e-3
    floor: float = 1.0
    final_rate: float = 0.05

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 0, 1_000_000)
        require_whole("batch", self.batch, 1, 1_000_000)
        for name in ("correction_rate", "scale_rate", "transform_rate", "floor"):
            require_between(name, getattr(self, name), 0, 1000)
        require_between("final_rate", self.final_rate, 0, 1)

    @property
    def training(self) -> Training:
        """How the optimizer goes: the same decay, this floor, and no weight decay."""
        return Training(final_rate=self.final_rate, eps=self.floor, weight_decay=0.0)

    @property
    def refit(self) -> Refit:
        """The rates of what is trained after rounding."""
        return Refit(scale_rate=self.scale_rate, transform_rate=self.transform_rate)


#: Settings as records and commands of earlier versions call them → their names now.
EARLIER_NAMES = {"transform": "fits_transform"}


@dataclass(frozen=True)
class Recipe:
    """How transforms are found and weights are rounded; every field was measured (docs/decisions.md).

    fits_transform: whether to fit channel scales and rotations; if not, the checkpoint has K = 0.
    channel_scales: whether to fit channel scales as well as rotations; scales_alone: whether also for weights without any
    rotations. If not, these have no transform at all, and nothing runs before their product.
    training: find transforms and weights by block-wise training instead of the quadratic proxy.
    refit: train the scales, angles and norm weights of the rounded block a little more.
    end_to_end: when all blocks are rounded, train the same in all of them at once, on the original model's output.
    head: train the quantized output embedding on the original model's output; no preset does by itself (0 steps).
    steps, learning_rate, final_rate: AdamW on the quadratic proxy; the rate decays along a cosine to `final_rate` times its
    first value.
    rounding: "nearest" or "gptq".
    damping: before GPTQ, this fraction of the mean of the Hessian's diagonal is added to the diagonal.
    by_activation: GPTQ rounds the columns with the largest activations first.
    shrinks: ranges that are tried for each group before rounding, as factors of its min and max.
    sweeps: the number of coordinate-descent passes after GPTQ; refit_scales: refit the group scales in each pass.
    drift: fraction of the earlier layers' error that a layer's weight should correct, 0 to 1.

    Raises `ConfigError` for values that are not allowed.
    """

    fits_transform: bool = True
    channel_scales: bool = True
    scales_alone: bool = True
    training: Training | None = None
    refit: Refit | None = None
    end_to_end: EndToEnd | None = None
    head: HeadTraining = HeadTraining(steps=0)
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
        require_choice("rounding", self.rounding, ("nearest", "gptq"))
        require_whole("steps", self.steps, 0, 1_000_000)
        require_whole("sweeps", self.sweeps, 0, 1000)
        if not self.shrinks or not all(0 < shrink <= 1 for shrink in self.shrinks):
            raise ConfigError(f"shrinks is {self.shrinks!r}, allowed: at least one factor above 0, up to 1")
        for name, low, high in (("drift", 0, 1), ("damping", 0, 1), ("final_rate", 0, 1), ("learning_rate", 0, 1000)):
            require_between(name, getattr(self, name), low, high)

    def scales(self, rotations: int) -> bool:
        """Tell whether a weight with so many rotations gets channel scales."""
        return self.fits_transform and self.channel_scales and (rotations > 0 or self.scales_alone)

    def transforms(self, rotations: int) -> bool:
        """Tell whether a weight with so many rotations gets a transform."""
        return self.scales(rotations) or (self.fits_transform and rotations > 0)

    @property
    def needs_text(self) -> bool:
        """Whether the recipe needs activations, and therefore calibration text."""
        return self.fits_transform or self.rounding != "nearest" or self.trains or self.end_to_end is not None

    @property
    def compares(self) -> bool:
        """Whether the recipe also needs the original model's activations."""
        return self.drift > 0 or self.trains

    @property
    def trains(self) -> bool:
        """Whether blocks are trained, before or after rounding."""
        return self.training is not None or self.refit is not None

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Recipe:
        """Return the recipe for which `dataclasses.asdict` gives these entries.

        Raises `ConfigError` for settings that a recipe does not have, and for values that are not allowed.
        """
        kinds = {"training": Training, "refit": Refit, "end_to_end": EndToEnd, "head": HeadTraining}
        given = {k: kinds[k](**v) if k in kinds and isinstance(v, Mapping) else v for k, v in entries.items()}
        given = {EARLIER_NAMES.get(name, name): value for name, value in given.items()}
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"the recipe cannot be read: {error}") from error


#: The presets, by name. "best" is "fast" followed by a refit. "paper" is the recipe of the paper. "quick", for trying
#: things out, is "fast" with a sixth of the steps, less refinement and without the original model's activations. "gptq" and
#: "rtn" (round to nearest) use no transform; they are baselines to compare with.
PRESETS: dict[str, Recipe] = {
    "fast": Recipe(),
    "best": Recipe(refit=Refit()),
    "paper": Recipe(training=Training(), rounding="nearest", shrinks=(1.0,), sweeps=0, drift=0.0),
    "quick": Recipe(steps=25, sweeps=1, shrinks=(1.0, 0.9, 0.8), drift=0.0),
    "gptq": Recipe(fits_transform=False, by_activation=False, shrinks=(1.0,), sweeps=0, drift=0.0),
    "rtn": Recipe(fits_transform=False, rounding="nearest", shrinks=(1.0,), sweeps=0, drift=0.0),
}


def preset_named(name: str) -> Recipe:
    """Return the recipe of a preset; raises `ConfigError`, which lists the presets, if there is none of this name."""
    require_choice("preset", name, PRESETS)
    return PRESETS[name]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return every setting by its name; the names of nested settings have a dot: {"steps": 150, "training.epochs": 10, …}.

    Settings that are None are left out.
    """
    found: dict[str, Any] = {}
    for name, value in vars(recipe).items():
        if isinstance(value, (Training, Refit, HeadTraining)):
            found |= {f"{name}.{inner}": setting for inner, setting in vars(value).items()}
        elif value is not None:
            found[name] = value
    return found


def recipe_with(preset: str, settings: Sequence[str], end_to_end: int = 0) -> Recipe:
    """Return the recipe of a preset with some settings changed.

    settings: texts "name=value"; the value is a Python literal, or a word. end_to_end: the number of epochs of a training of
    the whole model at the end; 0 for none. Raises `ConfigError` for names that the preset does not have, and for values that
    are not allowed.
    """
    recipe = preset_named(preset)
    if end_to_end:
        recipe = replace(recipe, end_to_end=EndToEnd(epochs=end_to_end))
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = EARLIER_NAMES.get(name, name)
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
