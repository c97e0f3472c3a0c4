"""The plan: in which form every weight of a model will be stored. It is made once, before any work begins.

`plan_for` starts from the default `Spec` of the options and applies a mixed plan (`spec.mixed`) and the overrides; if several match, the last counts. All
later steps take bits, group sizes and rotations from the plan, never from the options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..support.errors import ConfigError, did_you_mean
from .codes import SUPPORTED_GROUP_SIZES
from .fields import Size
from .linear import LinearLayout, Spec, bits_per_weight
from .options import Override, QuantConfig
from .patterns import matches

#: Weights that do not fit are left plain, instead of refused, where those of one name are less than this share of all.
SMALL_SHARE = 0.01
#: The reason of a spec that a mixed plan gives.
PLANNED = "the plan"


@dataclass(frozen=True)
class Plan:
    """The form in which each weight of a model will be stored.

    default: the spec of all weights that no override names; layouts: path → layout of every weight to be quantized;
    reasons: path → why the weight differs from the default (the override's text), or why it stays plain.
    """

    default: Spec
    layouts: Mapping[str, LinearLayout]
    reasons: Mapping[str, str]

    @property
    def exceptions(self) -> dict[str, Spec]:
        """Path → spec of the weights that differ from the default."""
        return {path: layout.spec for path, layout in self.layouts.items() if layout.spec != self.default}

    @property
    def plain(self) -> dict[str, str]:
        """Path → reason of the weights that stay as they are."""
        return {path: reason for path, reason in self.reasons.items() if path not in self.layouts}

    @property
    def bits_per_weight(self) -> float:
        """The stored bits of all quantized weights, divided by their number."""
        return bits_per_weight(self.layouts.values())


def plan_for(
    config: QuantConfig,
    sizes: Mapping[str, Size],
    plain: Mapping[str, str],
    head: Mapping[str, Size] | None = None,
    embedding: Mapping[str, Size] | None = None,
) -> Plan:
    """Return the plan for weights of these sizes, by path.

    sizes: path → size of each of them; plain: path → reason of the weights that stay as they are; head,
    embedding: path → size of the output and of the input embedding, which get `head_bits` and `embedding_bits`. Raises
    `ConfigError` if an override names no weight, and if weights do not fit their spec; the message lists all of them and the
    remedies.
    """
    _require_used(config.overrides, sizes)
    default = replace(config.spec, group_size=_group_size(config, sizes))
    specs, reasons = {}, dict(plain)
    for path in sizes:
        usual = default if config.plan is None else replace(config.plan.spec_of(path), activations=default.activations)
        specs[path] = usual
        if usual != default:
            reasons[path] = PLANNED
        for override in config.overrides:
            if matches(path, (override.pattern,)):
                specs[path], reasons[path] = override.applied(usual), f"--override {override}"
    if not config.recipe.fits_transform:  # such presets round the weight without transforming it
        specs = {path: replace(spec, rotations=0) for path, spec in specs.items()}
    layouts = {path: specs[path].layout(s.in_features, s.out_features, s.bias) for path, s in sizes.items()}
    for path, reason in _too_small(layouts).items():
        del layouts[path]
        reasons[path] = reason
    _require_fit(layouts, default)
    for kind, found, bits in (("head", head, config.head_bits), ("embedding", embedding, config.embedding_bits)):
        for path, s in (found or {}).items():
            spec = replace(default, bits=bits or default.bits, activations=None, weights=None)
            layouts[path], reasons[path] = (
                spec.layout(s.in_features, s.out_features, s.bias),
                f"--{kind}-bits {spec.bits}",
            )
            if faults := layouts[path].misfits():
                name = "output" if kind == "head" else "input"
                raise ConfigError(
                    f"the {name} embedding {path} cannot be stored: {'; '.join(faults)}. Leave --{kind}-bits out."
                )
    return Plan(default, layouts, reasons)


def _too_small(layouts: Mapping[str, LinearLayout]) -> dict[str, str]:
    """Return path → reason of the weights that do not fit and are, with all of their last name, a small share of the whole."""
    weights: Counter[str] = Counter()
    for path, layout in layouts.items():
        weights[path.rpartition(".")[2]] += layout.in_features * layout.out_features
    total = sum(weights.values())
    small = {name for name, count in weights.items() if count < SMALL_SHARE * total}
    faults = {path: layout.misfits() for path, layout in layouts.items() if path.rpartition(".")[2] in small}
    return {path: f"small, and {'; '.join(reasons)}" for path, reasons in faults.items() if reasons}


def _group_size(config: QuantConfig, sizes: Mapping[str, Size]) -> int:
    """Return the default group size; "auto" gives the largest one that divides every weight that it applies to."""
    if config.group_size != "auto":
        return int(config.group_size)
    own = [override.pattern for override in config.overrides if override.group_size is not None]
    dividing = _dividing(size.in_features for path, size in sizes.items() if not matches(path, own))
    return dividing[-1] if dividing else SUPPORTED_GROUP_SIZES[0]


def _dividing(channels: Iterable[int]) -> list[int]:
    """Return, in ascending order, the group sizes that divide all of these numbers of channels."""
    distinct = set(channels)
    return [g for g in SUPPORTED_GROUP_SIZES if all(c % g == 0 for c in distinct)]


def _require_used(overrides: Iterable[Override], sizes: Mapping[str, Size]) -> None:
    """Raise `ConfigError` for an override that names no weight: it is probably a typing error."""
    for override in overrides:
        if not any(matches(path, (override.pattern,)) for path in sizes):
            names = {part for path in sizes for part in (path, path.rpartition(".")[2])}
            hint = did_you_mean(override.pattern, names)
            raise ConfigError(f"override {str(override)!r} names no weight that will be quantized{hint}")


def _require_fit(layouts: Mapping[str, LinearLayout], default: Spec) -> None:
    faults = {path: layout.misfits() for path, layout in layouts.items()}
    faults = {path: reasons for path, reasons in faults.items() if reasons}
    if not faults:
        return
    dividing = _dividing(layout.in_features for layout in layouts.values())
    smaller = f"--group-size {dividing[-1]}" if dividing else "a smaller --group-size (none divides all layers)"
    remedies = [f"leave these layers as they are with {' '.join(f'--ignore {name}' for name in _last_names(faults))}"]
    if any(layout.in_features % default.group_size for path, layout in layouts.items() if path in faults):
        remedies.insert(0, smaller)
    raise ConfigError(
        f"{len(faults)} of {len(layouts)} linear layers do not fit:\n{_grouped_by_reason(faults)}\n"
        f"Remedies: {', or '.join(remedies)}."
    )


def _last_names(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _grouped_by_reason(faults: Mapping[str, list[str]]) -> str:
    """Write, for each reason, how many layers have it, the reason itself, and the paths of the layers."""
    lines = []
    for reason, count in Counter("; ".join(reasons) for reasons in faults.values()).items():
        paths = [path for path, reasons in faults.items() if "; ".join(reasons) == reason]
        lines.append(f"  {count} × {reason}:\n    " + "\n    ".join(paths))
    return "\n".join(lines)
