"""How much each weight, stored in each form, would change the model's output: measured before a plan is made.

Storing a weight W as Ŵ = W - E changes the logarithm of the probability of a text by ⟨G, E⟩ to first order, where G is
the gradient of that logarithm with respect to W. With labels that the model itself draws, the expected square of this
number is twice the divergence KL(original ‖ quantized) of the whole text (Fisher's information, second order). Rows are
taken as independent: that leaves out their covariances and, with few windows, most of the noise:

    KL per token ≈ 1/2 · mean over windows of Σ_rows ⟨G_row, E_row⟩² / tokens of a window.

The model runs once forwards and once backwards, block by block; no more than one block is on the device. How well this
predicts the divergence of single weights: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.linear import decode, encode
from ..core.range import extent, power_of_two
from ..kernels.fit.loops import solvers
from ..models.blocks import Block, outside_on, run_from
from ..spec.linear import Spec
from ..spec.options import QuantConfig
from ..spec.recipe import PRESETS, Recipe
from ..support.errors import CalibrationError, ConfigError
from .homes import Home
from .moments import Moments, pooled
from .search import Problem, fit_transforms
from .streams import Places, Streams
from .walk import compute_dtype, seed_of

#: The text to measure on: so many windows of so many tokens, cut from the calibration text.
WINDOWS, WINDOW_TOKENS = 16, 512
#: The steps of the search for the transforms with which the forms are compared, and the width they are fitted at. Too few
#: steps make rotations look worse than they are.
STEPS, FITTED_BITS = 75, 3
#: The width at which groups and rotations are compared, or the nearest to it among the forms.
COMPARED_BITS = 3
#: At most so many experts of a pool, evenly spaced, stand for all of it.
SAMPLED_EXPERTS = 8

#: The fields of a `Spec` that forms differ in, or are recorded with: all are whole numbers, none is in a format of its own.
RECORDED = ("bits", "group_size", "rotations", "symmetric", "activations")

#: Path → form → divergence in nats per token that this weight alone causes.
Divergences = dict[str, dict[Spec, float]]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured. divergences: by path and form; readers: for each distinct input, the paths that read it.

    Of the experts of a pool only some are measured; the others are not in `divergences`.
    """

    divergences: Divergences
    readers: list[tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `from_dict` reads."""
        forms = list(dict.fromkeys(spec for of in self.divergences.values() for spec in of))
        return {
            "forms": [{name: getattr(spec, name) for name in RECORDED} for spec in forms],
            "divergences": {
                path: [float(f"{of[spec]:.4g}") if spec in of else None for spec in forms]
                for path, of in self.divergences.items()
            },
            "readers": [list(paths) for paths in self.readers],
        }

    @classmethod
    def from_dict(cls, entries: Any, origin: str) -> Sensitivity:
        """Read the JSON object; origin: the file that it is from. Raises `ConfigError` if it cannot be read."""
        try:
            forms = [Spec(**form) for form in entries["forms"]]
            divergences = {
                path: {spec: float(value) for spec, value in zip(forms, values, strict=True) if value is not None}
                for path, values in entries["divergences"].items()
            }
            return cls(divergences, [tuple(paths) for paths in entries["readers"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{origin}: its measurements cannot be read. Leave it out, and it is measured again."
            ) from error


@dataclass
class Measurement:
    """What a measurement works with.

    forms: the specs to measure for each site, by path; home: where the blocks' weights come from; the rest of the model is
    on the CPU, its output embedding too. finished: called with the number of blocks that are finished.
    """

    model: nn.Module
    blocks: list[Block]
    forms: Mapping[str, Sequence[Spec]]
    config: QuantConfig
    device: torch.device
    home: Home
    notice: Callable[[str], None] = lambda text: None
    finished: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.blocks, self.config, self.device)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Sensitivity:
        """Measure on a text, int64 [windows, T]."""
        windows = cut(tokens)
        streams, entering = self._forwards(windows)
        slopes = self._slopes_at_the_end(windows, streams.quantized)
        found: Divergences = {}
        readers: list[tuple[str, ...]] = []
        for index, block in reversed(list(enumerate(self.blocks))):
            streams.quantized = entering.pop()
            with self._entered(block):
                moments, uncalled = streams.observe(block, index).checked(block.sites)
                readers = [*(tuple(m.readers) for m in moments), *readers]
                errors = self._errors(block, moments)
                squares, slopes = self._backwards(index, streams, slopes, errors)
            if uncalled:
                self.notice(
                    f"{', '.join(uncalled)}: no forward pass calls them; they will stay as they are, beyond the size"
                )
            for path, of in errors.items():
                if not squares[path].isfinite().all():
                    raise CalibrationError(
                        f"the gradients of {path} are not finite on the calibration text. Check the source model, or measure "
                        "in a wider dtype: QuantConfig(compute='float32')."
                    )
                totals = (squares[path] / (2 * windows.numel())).tolist()
                found[path] = completed(dict(zip(of, totals, strict=True)), self.forms[path])
            self.finished(len(self.blocks) - index)
        return Sensitivity(found, readers)

    @contextmanager
    def _entered(self, block: Block) -> Iterator[None]:
        self.home.enter(block, self.device, self.dtype)
        try:
            yield
        finally:
            self.home.leave(block)

    def _forwards(self, windows: Tensor) -> tuple[Streams, list[list[Tensor]]]:
        """Run the text through all blocks. Returns its stream, which has left the last one, and what enters each block."""
        places = Places(self.device, torch.device("cpu"), self.dtype)
        streams = Streams.start(self.model, self.blocks, windows, False, places, self.notice)
        streams.carries["quantized"].lasting = True
        entering = []
        for index, block in enumerate(self.blocks):
            entering.append(list(streams.quantized))
            with self._entered(block):
                streams.advance(block, index)
        return streams, entering

    def _slopes_at_the_end(self, windows: Tensor, leaving: list[Tensor]) -> list[Tensor]:
        """Draw a label for every token, and return the gradients of the labels' log-probabilities.

        They are those with respect to what leaves the last block: [1, T, H] of each window, on the CPU.
        """
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        slopes = []
        with outside_on(self.device, self.dtype, self.model, self.blocks):
            for window, states in zip(windows, torch.cat(leaving), strict=True):
                leaf = states[None].to(self.device).requires_grad_()
                with torch.enable_grad():
                    logits = run_from(self.model, self.blocks, window[None].to(self.device), leaf)[0]
                    log_p = logits.float().log_softmax(-1)
                    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                    (slope,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), leaf)
                slopes.append(slope.cpu())
        return slopes

    def _backwards(
        self, index: int, streams: Streams, slopes: list[Tensor], errors: Mapping[str, Mapping[Spec, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the sums over windows and rows of ⟨G, E⟩², float64 [forms] by path, and the slopes of what enters the block."""
        block, call = self.blocks[index], streams.call(index)
        sites = {path: block.sites[path] for path in errors}
        names = list(dict.fromkeys(site.parameter for site in sites.values()))
        parameters = [self.model.get_parameter(name) for name in names]
        squares = {path: torch.zeros(len(of), dtype=torch.float64, device=self.device) for path, of in errors.items()}
        before = []
        for number, (states, slope) in enumerate(zip(torch.cat(streams.quantized), slopes, strict=True)):
            leaf = states[None].to(self.device).requires_grad_()
            with _trainable(parameters), torch.enable_grad():
                output = call.run(
                    block.module, leaf.clone(), torch.tensor([number])
                )  # some blocks change what they are given
                gradients = torch.autograd.grad(output, [leaf, *parameters], slope.to(output), allow_unused=True)
            before.append(gradients[0].cpu())
            by_name = dict(zip(names, gradients[1:], strict=True))
            for path, site in sites.items():
                if (gradient := by_name[site.parameter]) is not None:
                    squares[path] += _squares(site.taken(gradient), errors[path].values())
        return squares, before

    def _errors(self, block: Block, moments: list[Moments]) -> dict[str, dict[Spec, Tensor]]:
        """Return E = W - Ŵ of each measured weight in each form, [N, C] in the dtype that the block computes in."""
        pools = {path: site.pool for path, site in block.sites.items() if site.pool is not None}
        pooled(moments, pools)
        hessians = {path: m.hessian for m in moments for path in m.readers}
        measured = {path: to_measure(self.forms[path]) for path in _sampled(block) if path in self.forms}
        wanted = [(path, spec) for path, forms in measured.items() if path in hessians for spec in forms]
        fitted = list(dict.fromkeys((path, replace(spec, bits=FITTED_BITS)) for path, spec in wanted))
        config = replace(self.config, recipe=comparing(self.config.recipe))
        weights, factors = {}, {}
        for path, spec in fitted:
            weight = block.sites[path].weight.float().contiguous()
            factors[path] = power_of_two(*extent(weight), spec)
            weights[path] = weight / factors[path]
        problems = [Problem(weights[p], hessians[p], seed_of(config.seed, p), spec) for p, spec in fitted]
        transforms = dict(zip(fitted, fit_transforms(problems, config), strict=True))
        found: dict[str, dict[Spec, Tensor]] = {}
        for path, spec in wanted:
            layout = spec.layout(block.sites[path].size.in_features, block.sites[path].size.out_features)
            transform = transforms[path, replace(spec, bits=FITTED_BITS)]
            packed = encode(
                weights[path], transform, hessians[path], layout, config.recipe, solvers=solvers(self.device)
            )
            error = (weights[path] - decode(packed)) * factors[path]
            found.setdefault(path, {})[spec] = error.to(self.dtype)
        return found


def to_measure(forms: Sequence[Spec]) -> list[Spec]:
    """Return the forms to measure: all widths of one kind of groups and rotations, and all kinds at one width.

    From these `completed` knows the others; forms for which it would lack one of them are measured too.
    """
    return [spec for spec in forms if _known_from(spec, forms) is None]


def completed(measured: Mapping[Spec, float], forms: Sequence[Spec]) -> dict[Spec, float]:
    """Return the divergence of every form. One that was not measured changes with the width as those of the usual kind do.

    How well that holds: docs/decisions.md.
    """
    found = {}
    for spec in forms:
        if spec in measured:
            found[spec] = measured[spec]
        elif (known := _known_from(spec, forms)) is not None:
            there, wider, usual = (measured[other] for other in known)
            found[spec] = there * wider / max(usual, 1e-30)
    return found


def _known_from(spec: Spec, forms: Sequence[Spec]) -> tuple[Spec, Spec, Spec] | None:
    """Return the forms that a form's divergence follows from: of its kind, of its width, and what both are compared with.

    The usual kind has the most rotations, and of those the largest groups. None for a form that must be measured itself.
    """
    kind = max(forms, key=lambda form: (form.rotations, form.group_size))
    width = min((form.bits for form in forms), key=lambda bits: abs(bits - COMPARED_BITS))
    known = replace(spec, bits=width), replace(kind, bits=spec.bits), replace(kind, bits=width)
    return known if spec not in known and all(other in forms for other in known) else None


def cut(tokens: Tensor) -> Tensor:
    """Return at most `WINDOWS` windows of at most `WINDOW_TOKENS` tokens, of as many windows of the text as possible."""
    length = min(WINDOW_TOKENS, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].view(len(tokens), -1, length)
    return pieces.transpose(0, 1).reshape(-1, length)[:WINDOWS].contiguous()


def comparing(recipe: Recipe) -> Recipe:
    """Return the recipe by which forms are compared: quick, and without refinement, which helps all forms alike.

    It fits a transform only if the given recipe does, and rounds to nearest only if that is all the given recipe does.
    """
    nearest = recipe.rounding == "nearest" and not recipe.trains
    return replace(
        PRESETS["quick"], steps=STEPS, fits_transform=recipe.fits_transform, channel_scales=recipe.channel_scales,
        scales_alone=recipe.scales_alone, sweeps=0, rounding="nearest" if nearest else "gptq",
    )  # fmt: skip


def _sampled(block: Block) -> list[str]:
    """Return the paths of the block's sites; of the experts of each pool, at most `SAMPLED_EXPERTS`, evenly spaced."""
    numbers: dict[str, list[str]] = {}
    for path, site in block.sites.items():
        if site.pool is not None:
            home = path.rpartition(".")[0]
            mine = numbers.setdefault(home.rpartition(".")[0], [])
            mine += [home] if home not in mine else []
    chosen = {home for mine in numbers.values() for home in mine[:: -(-len(mine) // SAMPLED_EXPERTS)]}
    return [p for p, site in block.sites.items() if site.pool is None or p.rpartition(".")[0] in chosen]


def _squares(gradient: Tensor, errors: Iterable[Tensor]) -> Tensor:
    """Return Σ_rows ⟨G_row, E_row⟩² for each E, float64 [forms]."""
    sums = [(gradient * error).sum(-1, dtype=torch.float32).double().square().sum() for error in errors]
    return torch.stack(sums)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
