"""How the linears of one block become packed ones: one strategy object for each kind of recipe.

`Rounding` fits transforms on the quadratic proxy and rounds; `Refitting` trains what is continuous after that;
`BlockTraining` is the paper's block-wise training, and `InTurn` what it does where activations are rounded. Each leaves
every linear with its decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.linear import Transform, decode, encode
from ..core.range import power_of_two
from ..core.rounding import proxy_terms, ratio
from ..kernels.fit.loops import solvers
from ..models.blocks import Block
from ..models.calls import Call
from ..models.rounded_inputs import InputRounding, Undo, round_inputs, roundings_of
from ..spec.codes import columns_per_block
from ..spec.linear import LinearLayout, PackedLinear
from ..spec.options import QuantConfig
from .blockwise import BlockData, BlockTask, refit_block, train_block
from .drift import drift_targets
from .moments import Moments, Pool
from .noise import InputNoise, RoundedMoments, is_corrected
from .ranks import Ranks
from .search import Problem, fit_transforms, sampled_rows
from .stages import Groups


@dataclass
class BlockWork:
    """One block to quantize, and what comes of it.

    layouts: of its linears; moments: of their inputs; pools: what the experts of a pool read together, by the pool's name;
    groups: the linears of each transform; seeds: for each group, by
    its first path; data: makes what block-wise training compares, None for recipes without; kept_as: the dtype that the
    block's other parameters are stored in; rounded: runs the text through the block with these inputs rounded, and returns the
    moments of that for the paths given with them; again: the moments of the inputs, and of pools, as they are now that some linears are
    quantized and round what they read as is given by path. packed, errors: by path, filled in by `settle`; history: reports of training.
    """

    block: Block
    call: Call | None
    layouts: Mapping[str, LinearLayout]
    moments: list[Moments]
    pools: Mapping[str, Pool]
    groups: Groups
    seeds: Mapping[str, int]
    config: QuantConfig
    ranks: Ranks
    device: torch.device
    data: Callable[[], BlockData] | None
    kept_as: torch.dtype
    validation_call: Call | None = None
    rounded: Callable[[Mapping[str, InputRounding], Collection[str]], dict[str, RoundedMoments]] = lambda *_: {}
    again: Callable[[Mapping[str, InputRounding]], tuple[list[Moments], dict[str, Pool]]] = lambda _: ([], {})
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def training(self) -> BlockTask:
        """Return the block as block-wise training wants it."""
        assert self.data is not None, "recipes that train a block have text"
        assert self.call is not None, "recipes that train a block have text"
        return BlockTask(
            self.block, self.call, self.data(), self.layouts, self.groups, self.seeds, self.config, self.history.append,
            self.ranks, self.validation_call,
        )  # fmt: skip

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group]

    @property
    def hessians(self) -> dict[str, Tensor]:
        return {path: m.hessian for m in self.moments for path in m.readers}

    def group_hessian(self, group: tuple[str, ...], hessians: Mapping[str, Tensor]) -> Tensor:
        """Return the second moments of what the linears of one transform read; hessians: by path."""
        shared = self.block.sites[group[0]].transform_name
        return self.pools[shared].hessian if shared is not None and shared in self.pools else hessians[group[0]]

    def sample(self, group: tuple[str, ...]) -> tuple[Tensor | None, int]:
        """Return some tokens of what the linears of one transform read, [T, C], and how many tokens the whole text has."""
        shared = self.block.sites[group[0]].transform_name
        if shared is not None and shared in self.pools:
            return self.pools[shared].sample, sum(self.pools[shared].tokens)
        moments = next(m for m in self.moments if group[0] in m.readers)
        return moments.sample, moments.tokens

    def unit(self, path: str) -> int:
        """Return rows of a linear are shared out in multiples of this."""
        return columns_per_block(self.layouts[path].bits)

    def rows(self, path: str) -> Tensor:
        """This rank's rows of a linear's weight, one after the other in memory."""
        weight = self.block.sites[path].weight
        return weight[self.ranks.rows(len(weight), self.unit(path))].contiguous()

    def owners(self) -> dict[str, int]:
        """Return the rank that rounds, and measures, each linear."""
        sizes = {path: self.layouts[path] for path in self.paths}
        return self.ranks.dealt({p: s.in_features * (s.in_features + s.out_features) for p, s in sizes.items()})

    def settle(self, packed: Mapping[str, PackedLinear], trained: bool) -> None:
        """Decode each linear, once: measure its error and give the block the weight.

        trained: measure the weight in the dtype that the block computes in, as training does.
        """
        owners, hessians = self.owners(), self.hessians
        terms = torch.zeros(len(packed), 2, device=self.device)
        for i, (path, linear) in enumerate(packed.items()):
            site = self.block.sites[path]
            weight = decode(linear.to(self.device))
            if trained:
                weight = weight.to(site.dtype).float()
            if owners[path] == self.ranks.rank:
                terms[i] = proxy_terms(site.weight.float(), weight, hessians[path])
            site.put(weight)
        self.ranks.add(terms)
        self.packed = dict(packed)
        self.errors = {path: ratio(pair) for path, pair in zip(packed, terms, strict=True)}


class Strategy(Protocol):
    """What is done to each block."""

    def quantize(self, work: BlockWork) -> None:
        """Fill in `work.packed` and `work.errors`, and leave the block with its decoded weights."""


class Rounding:
    """Fit transforms on the quadratic proxy, then round each linear on its inputs' second moments."""

    def quantize(self, work: BlockWork) -> None:
        if work.groups:
            work.settle(self.rounded(work), trained=False)

    def rounded(self, work: BlockWork) -> dict[str, PackedLinear]:
        """Return the packed linears, on every rank; the block keeps its weights. This rank fits on its rows of each linear."""
        targets = self.targets(work)
        for m in work.moments:
            m.cross = None
        transforms = self._transforms(work, targets)
        hessians = {**work.hessians, **self._fit_to_rounding(work, targets, transforms)}
        return self._round(work, targets, transforms, hessians)

    def targets(self, work: BlockWork) -> dict[str, Tensor]:
        """Return the weights to approximate: by path, this rank's rows."""
        targets: dict[str, Tensor] = {}
        for m in work.moments:
            weights = {path: work.rows(path).float() for path in m.readers}
            targets.update(drift_targets(weights, m, work.config.recipe.drift, work.ranks))
        return targets

    def _fit_to_rounding(
        self, work: BlockWork, targets: dict[str, Tensor], transforms: Mapping[str, Transform]
    ) -> dict[str, Tensor]:
        """Let each target answer its rounded inputs as it answered its inputs; return the moments of the rounded inputs.

        By path, for linears whose errors are large and that read enough tokens (`noise.is_corrected`); experts are counted the
        tokens that the router gives them, and stay as they are where they are fitted on others too.
        """
        wanted = {
            path
            for m in work.moments
            for path in m.readers
            if is_corrected(work.layouts[path], m.tokens)
            and not (work.config.all_experts and work.block.sites[path].pool is not None)
        }
        if not wanted:
            return {}
        roundings: dict[str, InputRounding] = {}
        for group in work.groups:
            if (rounding := InputRounding.of(transforms[group[0]], work.layouts[group[0]])) is not None:
                roundings.update(dict.fromkeys(group, rounding))
        moments = work.rounded(roundings, wanted)
        for path, each in moments.items():
            targets[path] = each.target(targets[path])
        return {path: each.hessian for path, each in moments.items()}

    def _transforms(self, work: BlockWork, targets: Mapping[str, Tensor]) -> dict[str, Transform]:
        """Fit the transform of each linear. Weights out of fp16's range are divided by a power of two first (see `core.range`)."""
        hessians, problems, factors = work.hessians, [], starts(work)
        for group, factor in zip(work.groups, factors, strict=True):
            rows = [targets[path] for path in group]
            stacked = sampled_rows(rows)
            weight = stacked if factor == 1 else stacked / factor
            hessian = work.group_hessian(group, hessians)
            spec = work.layouts[group[0]].spec
            problems.append(Problem(weight, hessian, work.seeds[group[0]], spec, self._noise(work, group, weight)))
        found = fit_transforms(problems, work.config, work.ranks)
        return {
            path: transform.times(factor)
            for group, transform, factor in zip(work.groups, found, factors, strict=True)
            for path in group
        }

    def _noise(self, work: BlockWork, group: tuple[str, ...], weight: Tensor) -> InputNoise | None:
        """Return what rounding the activations adds to the loss of a transform; None where they are not rounded."""
        spec = work.layouts[group[0]].spec
        if spec.activations is None:
            return None
        sample, tokens = work.sample(group)
        return None if sample is None else InputNoise.of(weight, sample, tokens, spec, work.ranks)

    def _round(
        self,
        work: BlockWork,
        targets: dict[str, Tensor],
        transforms: Mapping[str, Transform],
        hessians: Mapping[str, Tensor],
    ) -> dict[str, PackedLinear]:
        """Round all linears; this rank rounds some, and gets the others. targets: its rows of each; hessians: by path."""
        ranks, owners = work.ranks, work.owners()
        whole = {
            path: ranks.collected(targets.pop(path), work.layouts[path].out_features, work.unit(path), owners[path])
            for path in transforms
        }
        packed: dict[str, PackedLinear] = {}
        for path, transform in transforms.items():
            if (target := whole.pop(path)) is not None:
                bias = work.block.sites[path].bias
                packed[path] = encode(
                    target,
                    transform,
                    hessians[path],
                    work.layouts[path],
                    work.config.recipe,
                    bias,
                    solvers(work.device),
                )
        return {p: ranks.shared(packed.pop(p, None), work.layouts[p], owners[p], work.device) for p in transforms}


class Refitting(Rounding):
    """`Rounding`, then a short training of scales, angles and norms, the codes being fixed."""

    def quantize(self, work: BlockWork) -> None:
        if work.groups:
            work.settle(refit_block(work.training(), self.rounded(work), work.kept_as), trained=True)


class BlockTraining:
    """Block-wise training in two stages, the paper's recipe (section 4)."""

    def quantize(self, work: BlockWork) -> None:
        if work.groups:
            work.settle(train_block(work.training(), starts(work)), trained=True)


class InTurn:
    """Fit the linears of a block one input after the other, each on what the quantized ones before it put out.

    That is the paper's way with rounded activations (appendix A.3), where its block-wise training does not converge; weights
    are rounded by GPTQ at the end. Linears of one input are fitted together. Weights in MXFP4 are fitted so too, because their
    scales, powers of two, cannot be trained.
    """

    def quantize(self, work: BlockWork) -> None:
        config = replace(work.config, recipe=replace(work.config.recipe, rounding="gptq"))
        sites, moments, pools, rounds = work.block.sites, work.moments, work.pools, Undo()
        roundings: dict[str, InputRounding] = {}
        try:
            for groups in self._stages(work):
                if work.packed:
                    moments, pools = work.again(roundings)
                paths = {path for group in groups for path in group}
                # Later stages know nothing of the original's inputs, so that drift is corrected in none.
                mine = [replace(m, cross=None) for m in moments if paths.intersection(m.readers)]
                part = replace(work, moments=mine, pools=pools, groups=groups, config=config, packed={}, errors={})
                Rounding().quantize(part)
                work.packed |= part.packed
                work.errors |= part.errors
                rounds()
                roundings = roundings_of(sites, work.packed, work.device)
                rounds = round_inputs(sites, roundings)
        finally:
            rounds()

    def _stages(self, work: BlockWork) -> list[Groups]:
        """Return the transforms to fit together, in the order in which the block calls their linears."""
        order = {path: place for place, m in enumerate(work.moments) for path in m.readers}
        stages: dict[int, Groups] = {}
        for group in work.groups:
            stages.setdefault(min(order[path] for path in group), []).append(group)
        return [stages[place] for place in sorted(stages)]


def starts(work: BlockWork) -> list[float]:
    """Return for each group the power of two to divide its weights by, so that fp16 holds their scales.

    The channel scales are multiplied by it in turn. It is 1 for ordinary weights.
    """
    factors = []
    for group in work.groups:
        rows = [work.rows(path) for path in group]
        sums = torch.tensor(
            [sum(r.float().square().sum().item() for r in rows), sum(r.numel() for r in rows)], dtype=torch.float64
        ).to(work.device)
        peak = torch.tensor([max((r.abs().max().item() for r in rows if r.numel()), default=0.0)]).to(work.device)
        work.ranks.add(sums)
        work.ranks.largest(peak)
        rms = (sums[0] / sums[1].clamp(min=1)).sqrt().item()
        factors.append(power_of_two(rms, peak.item(), work.layouts[group[0]].spec))
    return factors


def strategy_for(config: QuantConfig) -> Strategy:
    """Return the strategy of a recipe."""
    if config.recipe.training is not None:
        return BlockTraining() if config.activations is None and config.weights is None else InTurn()
    return Refitting() if config.recipe.refit is not None else Rounding()
