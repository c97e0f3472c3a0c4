"""Make a plan with a form for each weight: measure what each form would change, then choose within the size wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.source import SourceWeights
from ..layers.model import siblings
from ..models.planning import sizes_of
from ..optimize.allocation import (
    Choice,
    Unit,
    allocate,
    forms_of,
    mixed_plan,
    require_reachable,
    rotated_at_most,
    uniform,
    units_of,
)
from ..optimize.sensitivity import Measurement, Sensitivity
from ..spec.linear import Spec
from ..spec.mixed import MixedPlan, Target, fingerprint
from ..spec.options import QuantConfig
from ..support.devices import current, resolve_device
from ..support.errors import ConfigError
from .opened import Opened
from .progress import Told
from .texts import draw_for

#: What to do about an earlier plan that does not serve.
AGAIN = "Leave out --measured, and it is measured again."


class PlanProgress(Told, Protocol):
    """What planning tells while it works."""

    def measuring(self, blocks: int, finished: int) -> None: ...
    def planned(self, result: Planned) -> None: ...


class Silent:
    """A progress that says nothing."""

    def stage(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...
    def measuring(self, blocks: int, finished: int) -> None: ...
    def planned(self, result: Planned) -> None: ...


@dataclass(frozen=True)
class Planned:
    """A plan and what it was chosen from. bits_per_weight: of the quantized layers; size_bytes: of the whole checkpoint.

    choice, uniform: the forms chosen, and the best that one form for all gives within the same size, None if none fits.
    """

    plan: MixedPlan
    choice: Choice
    uniform: Choice | None
    target: Target
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.choice.bits / sum(unit.weights for unit in self.choice.units)


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model. source: its weights."""

    opened: Opened
    source: SourceWeights

    @cached_property
    def forms(self) -> dict[str, list[Spec]]:
        """The forms that each weight may have, by path."""
        every = forms_of(self.opened.plan, self.opened.config)
        return {path: every[path] for block in self.opened.decoders for path in block.sites}

    @cached_property
    def rest(self) -> int:
        """Bytes of a checkpoint beside what the plan chooses: plain tensors, biases, and quantized embeddings."""
        sites = self.opened.sites.values()
        biases = sum(2 * site.size.out_features for site in sites if site.size.bias)
        apart = [path for path in self.opened.sites if path not in self.forms]
        biases += sum(self.opened.plan.layouts[path].stored_bits() // 8 for path in apart)
        return biases + sum(field.nbytes for field in self.source.plain_fields(sites, self.opened.names).values())

    def require_reachable(self, target: Target) -> None:
        """Raise `ConfigError` for a size that no choice of forms has, and for overrides that leave a group no form."""
        units = self._units(Sensitivity({}, siblings(self.forms)))
        require_reachable(units, self._budget(target, units), target, self.rest)

    def measure(self, tokens: Tensor, device: torch.device, progress: PlanProgress) -> Sensitivity:
        """Measure all weights in all their forms on a text, int64 [windows, T]."""
        opened = self.opened
        progress.stage("measuring")
        progress.measuring(len(opened.decoders), 0)
        self.source.fill_all_but(opened.skeleton, opened.decoders, head=True)
        measurement = Measurement(
            opened.skeleton, opened.decoders, self.forms, opened.config, device, self.source, progress.notice,
            lambda finished: progress.measuring(len(opened.decoders), finished),
        )  # fmt: skip
        return measurement.run(tokens)

    def choose(self, measured: Sensitivity, target: Target) -> Planned:
        """Choose the forms for a size. Raises `ConfigError` for a size that no choice of forms has."""
        units = self._units(measured)
        budget = self._budget(target, units)
        require_reachable(units, budget, target, self.rest)
        choice = allocate(units, budget, rotated_at_most(units, target))
        sizes = sizes_of(self.opened.skeleton, self.opened.names)
        model = {"name": self.opened.files.name, **fingerprint(sizes), "target": str(target)}
        config = self.opened.config
        plan = replace(
            mixed_plan(choice, config.spec.rotations), model=model, measured=measured.to_dict(),
            scales_alone=config.recipe.scales_alone,
        )  # fmt: skip
        return Planned(plan, choice, uniform(units, budget), target, choice.bits // 8 + self.rest)

    def _units(self, measured: Sensitivity) -> list[Unit]:
        layouts = self.opened.plan.layouts
        return units_of(self.forms, layouts, self.opened.sites, measured.readers, measured.divergences)

    def _budget(self, target: Target, units: list[Unit]) -> int:
        """Return the bits that the codes, scales and transforms may take."""
        if not target.sized:
            return sum(max(form.bits for form in unit.forms) for unit in units)
        if target.bits_per_weight is not None:
            return int(target.bits_per_weight * sum(unit.weights for unit in units))
        return 8 * ((target.size_bytes or 0) - self.rest)


def plan(
    model: str | Path,
    config: QuantConfig,
    *,
    device: str = "auto",
    measured: MixedPlan | None = None,
    trust_remote_code: bool = False,
    progress: PlanProgress | None = None,
) -> Planned:
    """Make a plan for a model, within `config.target`.

    model: a Transformers directory, a hub name, or a `.gguf` file; device: "auto", "cpu", "cuda", …; measured: an earlier
    plan for this model, whose measurements are used instead of new ones.
    Raises a `PairQuantError` that says what to mend.
    """
    if config.target is None:
        raise ConfigError(
            "a plan needs a size or fewer transforms: give --target-bpw, --target-size or --rotations auto"
        )
    progress = progress or Silent()
    target = resolve_device(device)
    opened = Opened.of(model, config, trust_remote_code)
    with current(target), TemporaryDirectory() as spill:
        source = SourceWeights.open(opened.files, opened.skeleton, opened.names, Path(spill))
        try:
            planner = Planner(opened, source)
            planner.require_reachable(config.target)
            if measured is not None:
                found = _reused(measured, planner)
            else:
                progress.stage("calibration text")
                draw = draw_for(opened, target, progress)
                found = planner.measure(draw(config.calibration, config.samples).tokens, target, progress)
        finally:
            source.close()
    result = planner.choose(found, config.target)
    progress.planned(result)
    return result


def _reused(earlier: MixedPlan, planner: Planner) -> Sensitivity:
    """Return the measurements of an earlier plan. Raises `ConfigError` if it lacks some, or is for another model."""
    earlier.require_for(sizes_of(planner.opened.skeleton, planner.opened.names))
    found = Sensitivity.from_dict(earlier.measured, earlier.origin)
    bare = any(spec.rotations == 0 for forms in planner.forms.values() for spec in forms)
    if bare and earlier.scales_alone != planner.opened.config.recipe.scales_alone:
        there, here = ("without", "with") if earlier.scales_alone else ("with", "without")
        raise ConfigError(
            f"{earlier.origin} was measured {there} --rotations auto, and this plan is made {here} it. {AGAIN}"
        )
    for path, of in found.divergences.items():
        if missing := [spec for spec in planner.forms.get(path, ()) if spec not in of]:
            raise ConfigError(f"{earlier.origin} has no measurement of {path} at {missing[0]}. {AGAIN}")
    if not found.divergences:
        raise ConfigError(f"{earlier.origin} holds no measurements. {AGAIN}")
    return found
