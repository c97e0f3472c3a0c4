"""Choose a form for each weight so that all together have a given size, and the model's output changes least.

Weights that engines run as one layer, and the experts of a block, get one form: they are a `Unit`. The divergences of
single weights (`sensitivity`) are added up, and one form is chosen for each unit: minimise the sum of divergences, subject to
the sum of stored bits. That is a multiple-choice knapsack, which SciPy's `milp` solves exactly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..models.sites import Site
from ..spec.experts import bits_per_weight
from ..spec.linear import LinearLayout, Spec
from ..spec.mixed import MixedPlan, Target
from ..spec.options import QuantConfig
from ..spec.patterns import matches
from ..spec.plan import Plan
from ..support.errors import ConfigError
from ..support.formatting import counted, size

#: How near to the best sum of divergences the solver must come, as a fraction of it, and how long it may take in seconds.
GAP, SECONDS = 1e-5, 60


@dataclass(frozen=True)
class Form:
    """One form of a unit: the bits that it takes, and the divergence that it causes, in nats per token."""

    spec: Spec
    bits: int
    divergence: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Weights that must have one form. pool: of experts; weights: how many; forms: to choose from."""

    paths: tuple[str, ...]
    pool: str | None
    weights: int
    forms: tuple[Form, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What a plan's file calls these weights: their paths, or one pattern for the experts of a pool."""
        if self.pool is None:
            return self.paths
        home = self.pool.rpartition(".")[0]
        parts = sorted({path.rpartition(".")[2] for path in self.paths})
        return (f"re:{re.escape(home)}\\.\\d+\\.({'|'.join(map(re.escape, parts))})$",)


@dataclass(frozen=True)
class Choice:
    """A form for each unit. divergence: the sum of all, in nats per token."""

    units: tuple[Unit, ...]
    forms: tuple[Form, ...]

    @property
    def bits(self) -> int:
        return sum(form.bits for form in self.forms)

    @property
    def divergence(self) -> float:
        return sum(form.divergence for form in self.forms)

    @property
    def rotated(self) -> int:
        """How many units have a transform: of weights that run as one layer, one launch at run time."""
        return sum(form.spec.rotations > 0 for form in self.forms)


def forms_of(plan: Plan, config: QuantConfig) -> dict[str, list[Spec]]:
    """Return for each weight of a plan the forms that it may have: path → specs. Overrides fix what they name.

    Forms that a weight's size does not allow are left out; the plan's own form is always one it allows.
    """
    found = {}
    for path, layout in plan.layouts.items():
        every = config.candidates.specs(plan.default)
        mine = every
        for override in config.overrides:
            if matches(path, (override.pattern,)):
                mine = [override.applied(spec) for spec in every]
        if not config.recipe.fits_transform:  # whatever an override says
            mine = [replace(spec, rotations=0) for spec in mine]
        fitting = [s for s in dict.fromkeys(mine) if not s.layout(layout.in_features, layout.out_features).misfits()]
        found[path] = fitting or [layout.spec]
    return found


def units_of(
    forms: Mapping[str, Sequence[Spec]],
    layouts: Mapping[str, LinearLayout],
    sites: Mapping[str, Site],
    readers: Iterable[tuple[str, ...]],
    divergences: Mapping[str, Mapping[Spec, float]],
) -> list[Unit]:
    """Join weights into units: experts of one pool, and weights of one module that read the same input.

    divergences: without entries for all (experts that were not measured), the mean of the unit's others stands for them.
    Raises `ConfigError` for weights that must share a form and have none in common, because of overrides.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    read = {path: paths for paths in readers for path in paths}
    for path in forms:
        pool = sites[path].pool
        together = ("pool", pool) if pool else (path.rpartition(".")[0], *read.get(path, (path,)))
        groups.setdefault(together, []).append(path)
    return [_unit(paths, forms, layouts, sites[paths[0]].pool, divergences) for paths in groups.values()]


def _unit(
    paths: list[str],
    forms: Mapping[str, Sequence[Spec]],
    layouts: Mapping[str, LinearLayout],
    pool: str | None,
    divergences: Mapping[str, Mapping[Spec, float]],
) -> Unit:
    common = [spec for spec in forms[paths[0]] if all(spec in forms[path] for path in paths)]
    if not common:
        raise ConfigError(
            f"{', '.join(paths[:4])} run as one layer and need one form, but the overrides leave them none in common. Name "
            "all of them in one --override."
        )
    measured = [divergences[path] for path in paths if path in divergences]
    share = len(paths) / max(1, len(measured))
    weights = sum(layouts[path].in_features * layouts[path].out_features for path in paths)
    found = []
    for spec in common:
        mine = {path: spec.layout(layouts[path].in_features, layouts[path].out_features) for path in paths}
        bits = round(bits_per_weight(mine, dict.fromkeys(paths, pool) if pool else {}) * weights)
        found.append(Form(spec, bits, share * sum(of.get(spec, 0.0) for of in measured)))
    return Unit(tuple(paths), pool, weights, tuple(found))


def require_reachable(units: Sequence[Unit], budget: int, target: Target, rest: int) -> None:
    """Refuse a target that no choice of forms reaches; the message names the smallest and largest sizes possible.

    budget: bits for all units; rest: bytes of everything else in the checkpoint.
    """
    least, most = (sum(pick(form.bits for form in unit.forms) for unit in units) for pick in (min, max))
    bare = sum(any(form.spec.rotations == 0 for form in unit.forms) for unit in units)
    if target.rotated is not None and bare < len(units) - rotated_at_most(units, target):
        raise ConfigError(
            f"the target is {target}, but {counted(len(units) - bare, 'input')} of {len(units)} cannot do without one: no "
            "form of theirs has 0 rotations. Add rotations:0 to --candidates, or change --override."
        )
    if not target.sized or least <= budget <= 1.001 * most:
        return
    weights = sum(unit.weights for unit in units)
    if target.bits_per_weight is not None:
        low, high = f"{least / weights:.3f}", f"{most / weights:.3f} bits per weight"
    else:
        low, high = (size(bits / 8 + rest) for bits in (least, most))
    raise ConfigError(
        f"the target is {target}; with these forms the smallest possible is {low} and the largest {high}. Change the "
        "target, or the forms by --candidates."
    )


def rotated_at_most(units: Sequence[Unit], target: Target) -> int:
    """Return how many units may have a transform."""
    return len(units) if target.rotated is None else int(target.rotated * len(units))


def allocate(units: Sequence[Unit], budget: int, rotated: int | None = None) -> Choice:
    """Return the choice with the least divergence among those of at most `budget` bits.

    rotated: at most so many units have a transform; None: any number. Raises `ConfigError` if there is no such choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    forms = [form for unit in units for form in unit.forms]
    owners = [i for i, unit in enumerate(units) for _ in unit.forms]
    one_each = csr_array((np.ones(len(forms)), (owners, range(len(forms)))), shape=(len(units), len(forms)))
    bits = np.array([form.bits for form in forms], dtype=float)[None]
    turned = np.array([form.spec.rotations > 0 for form in forms], dtype=float)[None]
    costs = np.array([form.divergence for form in forms])
    result = milp(
        costs / max(costs.max(), 1e-30),
        integrality=np.ones(len(forms)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bits / budget, -np.inf, 1),
            LinearConstraint(turned, -np.inf, len(units) if rotated is None else rotated),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        few = "" if rotated is None else f" with {rotated} of {len(units)} inputs transformed"
        raise ConfigError(f"no choice of forms takes at most {budget / 8e9:.3f} GB{few} ({result.message})")
    chosen = [form for form, share in zip(forms, result.x, strict=True) if share > 0.5]
    return Choice(tuple(units), tuple(chosen))


def mixed_plan(choice: Choice, rotations: int | None = None) -> MixedPlan:
    """Return the plan of a choice. Its default is the form that most weights have, with so many rotations if they are given.

    The default is that of embeddings, whose form is not chosen.
    """
    weights: Counter[Spec] = Counter()
    for unit, form in zip(choice.units, choice.forms, strict=True):
        weights[form.spec] += unit.weights
    layers = {name: form.spec for unit, form in zip(choice.units, choice.forms, strict=True) for name in unit.names}
    common = weights.most_common(1)[0][0]
    return MixedPlan(common if rotations is None else replace(common, rotations=rotations), layers)


def uniform(units: Sequence[Unit], budget: int) -> Choice | None:
    """Return the choice with one form for all units that has the least divergence within the budget; None if none fits.

    Units that cannot have that form, because an override fixes theirs, keep the first of theirs with as many rotations.
    """
    specs = dict.fromkeys(form.spec for unit in units for form in unit.forms)
    choices = []
    for spec in specs:
        choices.append(Choice(tuple(units), tuple(_nearest(unit, spec) for unit in units)))
    fitting = [choice for choice in choices if choice.bits <= budget]
    return min(fitting, key=lambda choice: choice.divergence, default=None)


def _nearest(unit: Unit, spec: Spec) -> Form:
    """Return the unit's form of this spec, or else its first with as many rotations, or else its first."""
    alike = [form for form in unit.forms if form.spec.rotations == spec.rotations]
    return next((form for form in unit.forms if form.spec == spec), (alike or unit.forms)[0])
