"""The options that `quantize`, `plan` and `fold` share, and the `QuantConfig` that their values make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from .app import option

if TYPE_CHECKING:
    from ..spec.options import QuantConfig

OUTPUT, METHOD, CALIBRATION, RUN = "Output", "Method", "Calibration", "Run"
#: What options say that two commands have in different groups of their help.
TARGET_BPW = "Choose each layer's bits for this mean."
TARGET_SIZE = "The same for a size such as 4.2GB."
CANDIDATES = "Forms to choose from, such as bits:3|4,group_size:64|128, or all."

Overwrite = Annotated[bool, option(OUTPUT, "Replace an existing output.", "--overwrite")]
GroupSize = Annotated[str, option(METHOD, "Weights per scale, or auto.")]
Rotations = Annotated[str, option(METHOD, "Rotations K, 0 to 16, or auto: none where they buy least.", rare=True)]
PairSelection = Annotated[str, option(METHOD, "random, or magnitude: the most different first.", rare=True)]
Calibration = Annotated[
    list[str] | None, option(CALIBRATION, "Text: a file, a data set, self; repeat.", metavar="TEXT")
]
Samples = Annotated[int, option(CALIBRATION, "Windows of text.")]
SeqLen = Annotated[int, option(CALIBRATION, "Tokens per window.")]
Device = Annotated[str, option(RUN, "auto, cpu, cuda, cuda:1.")]
Trust = Annotated[bool, option(RUN, "Run the model's own Python code.", "--trust-remote-code")]
Compute = Annotated[str, option(RUN, "Forward passes in auto, float32 or bfloat16.", rare=True)]
Seed = Annotated[int, option(RUN, "Seed of pairs and windows.", rare=True)]


def number_or_word(text: str | int) -> Any:
    """Return the number that an option's text is, or the text for `QuantConfig` to judge."""
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def ignored(patterns: list[str] | None) -> tuple[str, ...]:
    """Return what is left as it is: what always is, and these."""
    from ..spec.options import QuantConfig

    return (*QuantConfig.ignore, *(patterns or ()))


#: Option → the field of `QuantConfig` that it gives, if that is called otherwise, and what makes the field's value of it.
READ: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "group_size": ("group_size", number_or_word),
    "rotations": ("rotations", number_or_word),
    "calibration": ("calibration", lambda texts: tuple(texts or ("default",))),
    "validation": ("validation", lambda texts: tuple(texts or ())),
    "ignore": ("ignore", ignored),
    "override": ("overrides", lambda texts: tuple(texts or ())),
}
#: Parameters that are no options of `QuantConfig`, and do not become a field by `READ`: what is done with the result, where
#: it runs, and what commands make fields of themselves.
OTHERS = frozenset(
    (
        *("model", "output", "form", "overwrite", "push_to_hub", "private", "log_to"),
        *("device", "trust_remote_code", "fresh", "help_all", "untie", "measured"),
        *("target_bpw", "target_size"),  # become `target`
        *("setting", "end_to_end", "steps"),  # become `recipe`
    )
)


def config_of(given: Mapping[str, Any], **more: Any) -> QuantConfig:
    """Return the options that a command was given as `QuantConfig`, which checks them and raises `ConfigError`.

    given: its parameters by name; `OTHERS` are passed over. more: fields that are not taken from parameters. Raises
    `TypeError` for a parameter that is neither a field nor in `READ` or `OTHERS`: it would be ignored without a word.
    """
    from ..spec.options import QuantConfig

    read = {name: READ.get(name, (name, lambda value: value)) for name in given if name not in OTHERS}
    if unknown := {field for field, _ in read.values()} - {field.name for field in fields(QuantConfig)}:
        raise TypeError(f"{', '.join(sorted(unknown))}: no fields of QuantConfig. Add them to READ or OTHERS.")
    return QuantConfig(**{field: make(given[name]) for name, (field, make) in read.items()}, **more)


def wanted(bits_per_weight: float | None, text: str | None) -> Any:
    """Return the target of --target-bpw and --target-size; None if neither is given."""
    from ..spec.mixed import Target
    from ..support.errors import ConfigError

    if bits_per_weight is not None and text is not None:
        raise ConfigError("--target-bpw and --target-size are both given. Leave one of them out.")
    if text is not None:
        return Target.of_size(text)
    return None if bits_per_weight is None else Target(bits_per_weight=bits_per_weight)
