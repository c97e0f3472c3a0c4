"""Make the plan of a whole model: which weights will be quantized, in which form, and which stay plain and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from ..layers.model import unlike_siblings
from ..spec.fields import Size
from ..spec.linear import Spec
from ..spec.options import QuantConfig
from ..spec.patterns import matches
from ..spec.plan import Plan, plan_for
from ..support.errors import ConfigError, did_you_mean
from .blocks import Block, find_blocks, head_block
from .names import OWN, Names
from .sharing import lenders_of
from .sites import ExpertSite, Site, embedding_site, is_linear, sites_in

#: If matrices that no site covers hold at least this fraction of the blocks' weights, the model is refused, unless `ignore`
#: names them.
LARGE_SHARE = 0.05
#: Last names of linears that choose experts, weigh their results, or set the gates and steps of a state-space layer: small,
#: and read by kernels as parameters, or every error in them is one of choice.
ROUTERS = ("gate", "router", "shared_expert_gate", "wg", "in_proj_a", "in_proj_b", "in_proj_ba", "dt_proj")
#: Last names of linears whose input is never rounded, and why. vLLM's latent attention takes the weight of `kv_b_proj` apart, which it
#: reads by multiplying the layer with the identity.
AS_THEY_ARE = {"kv_b_proj": "its input is not rounded: engines take its weight apart"}


def plan_model(model: nn.Module, config: QuantConfig, names: Names = OWN) -> tuple[Plan, list[Block]]:
    """Find the blocks of a model, which may lack its weights, and resolve the plan for them, by the source's names.

    Routers and their like stay plain, and small weights that do not fit. Raises `SourceError` for a model without blocks;
    `ConfigError` for patterns that name nothing, weights that do not fit, experts of one block that differ, large weights
    that nothing here can quantize, embeddings that cannot be quantized, `activations` where blocks share layers, and
    `all_experts` or `transform_per_expert` where no experts are quantized. With `head_bits` the last of the blocks is the output embedding.
    """
    if config.plan is not None:
        config.plan.require_for(sizes_of(model, names))
    blocks = find_blocks(model, config.ignore, names)
    if config.activations is not None:
        _require_own_layers(blocks, config.activations)
    _require_known(model, config.ignore, names)
    _require_covered(blocks, config.ignore)
    blocks = [_with_sites(block, lambda path: path.rpartition(".")[2] not in ROUTERS) for block in blocks]
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    if not sites:
        raise ConfigError(f"ignore {', '.join(config.ignore)} leaves no linear layer to quantize")
    sizes = {path: site.size for path, site in sites.items()}
    head = [head_block(model, names)] if config.head_bits is not None else []
    plain = _plain(
        model, [*sites.values(), *(site for block in head for site in block.sites.values())], config.ignore, names
    )
    heads = {path: site.size for block in head for path, site in block.sites.items()}
    plan = _without_rounding(plan_for(config, sizes, plain, heads, _embedding(model, config, names)))
    blocks = [_with_sites(block, plan.layouts.__contains__) for block in blocks]
    if config.transform_per_expert:
        blocks = [_with_own_transforms(block) for block in blocks]
    every = [site for site in sites_in(model, names=names) if site.pool is not None]
    _require_alike_experts(plan, every)
    if config.plan is not None:
        _require_alike_siblings(plan, config.plan.origin)
    for option in ("all_experts", "transform_per_expert"):
        if getattr(config, option) and not any(site.pool for site in sites.values()):
            raise ConfigError(
                f"{option} is True, allowed for this model: False, because it has no experts that will be quantized. Leave "
                f"--{option.replace('_', '-')} out."
            )
    return plan, [*blocks, *head]


def _without_rounding(plan: Plan) -> Plan:
    """Return the plan with the linears of `AS_THEY_ARE` reading their inputs as they are."""
    layouts, reasons = dict(plan.layouts), dict(plan.reasons)
    for path, layout in plan.layouts.items():
        reason = AS_THEY_ARE.get(path.rpartition(".")[2])
        if reason is not None and layout.activations is not None:
            layouts[path] = replace(layout, spec=replace(layout.spec, activations=None))
            reasons[path] = reason
    return replace(plan, layouts=layouts, reasons=reasons)


def _embedding(model: nn.Module, config: QuantConfig, names: Names) -> dict[str, Size]:
    """Return path → size of the input embedding, if it is to be quantized."""
    if config.embedding_bits is None:
        return {}
    site = embedding_site(model, names)
    if site is None:
        raise ConfigError(
            f"{type(model).__name__} has no input embedding that only looks rows up, so that it cannot be quantized. Leave "
            "--embedding-bits out."
        )
    return {site.path: site.size}


def sizes_of(model: nn.Module, names: Names = OWN) -> dict[str, Size]:
    """Return the size of every weight of the blocks that could be quantized, by path, whatever options leave plain."""
    return {path: site.size for block in find_blocks(model, (), names) for path, site in block.sites.items()}


def _require_alike_siblings(plan: Plan, origin: str) -> None:
    """Refuse weights that engines run as one layer and that a plan gives forms of their own."""
    for paths in unlike_siblings({path: layout.spec for path, layout in plan.layouts.items()}):
        forms = "; ".join(f"{path.rpartition('.')[2]}: {plan.layouts[path].spec}" for path in paths)
        raise ConfigError(
            f"{', '.join(paths)} run as one layer and need one form; {origin} gives them {forms}. Give them the same."
        )


def _with_sites(block: Block, wanted: Callable[[str], bool]) -> Block:
    return replace(block, sites={path: site for path, site in block.sites.items() if wanted(path)})


def _with_own_transforms(block: Block) -> Block:
    """Return the block with experts whose transforms are their own."""
    every = block.sites.items()
    return replace(
        block, sites={p: replace(s, own_transform=True) if isinstance(s, ExpertSite) else s for p, s in every}
    )


def _require_alike_experts(plan: Plan, sites: Iterable[Site]) -> None:
    """Refuse experts of one block that differ: their transforms are stored once, and they run together."""
    homes: dict[str, dict[str, bool]] = {}
    pools: dict[str, dict[str, Spec]] = {}
    for site in sites:
        layout = plan.layouts.get(site.path)
        homes.setdefault(site.place, {})[site.path] = layout is not None
        if layout is not None:
            pools.setdefault(str(site.pool), {})[site.path] = layout.spec
    for packed in homes.values():
        if len(set(packed.values())) > 1:
            odd = next(path for path, is_packed in packed.items() if not is_packed)
            raise ConfigError(
                f"{odd} cannot be left plain alone, as the experts of a block run together: name all of them in --ignore, "
                "such as 're:.*experts.*'."
            )
    for pool, specs in pools.items():
        if len(set(specs.values())) > 1:
            odd = next(path for path, spec in specs.items() if spec != plan.default)
            raise ConfigError(
                f"{odd} would be stored otherwise than the other experts of {pool}, which share its transform. Name all of "
                "them in --override, such as 're:.*experts.*'."
            )


def _plain(model: nn.Module, quantized: Iterable[Site], ignore: tuple[str, ...], names: Names) -> dict[str, str]:
    """Path → reason of every linear that is not quantized."""
    taken, found = {site.place for site in quantized}, {}
    for place, module in model.named_modules():
        if is_linear(module) and place not in taken:
            path = names.module(place)
            named = next((pattern for pattern in ignore if matches(path, (pattern,))), None)
            found[path] = f"--ignore {named}" if named else reason_to_stay(path)
    return found


def reason_to_stay(path: str) -> str:
    """Return why the matrix at `path`, which no option names, is not quantized."""
    if path.rpartition(".")[2] in ROUTERS:
        return "a router, gate or step size"
    return "not a plain linear layer of a decoder block"


def uncovered(block: Block) -> dict[str, int]:
    """Return full name → number of values for the block's matrices outside the block's sites.

    These include the matrices that `ignore` names, because a block has no sites for them.
    """
    covered = {id(site.module) for site in block.sites.values()}
    return {
        ".".join(part for part in (block.path, path, name) if part): parameter.numel()
        for path, module in block.module.named_modules()
        if id(module) not in covered
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def _require_covered(blocks: list[Block], ignore: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a large part of the blocks' weights, such as fused experts, would stay in 16 bits.

    The user can still ask for that with `ignore`.
    """
    left = {
        name: count
        for block in blocks
        for name, count in uncovered(block).items()
        if not matches(name, ignore) and not matches(name.rpartition(".")[0], ignore)
    }
    total = sum(p.numel() for block in blocks for p in block.module.parameters() if p.ndim >= 2)
    if not left or sum(left.values()) < LARGE_SHARE * total:
        return
    largest = max(left, key=left.__getitem__)
    end = largest.rpartition(".")[2]
    raise ConfigError(
        f"{sum(left.values()) / total:.0%} of the blocks' weights are in {len(left)} matrices that cannot be quantized yet, "
        f"such as {largest}: fused experts, or layers with a computation of their own. To leave them as they are and "
        f"quantize the rest: --ignore 're:.*{end}$'. Otherwise choose a dense model."
    )


def _require_own_layers(blocks: list[Block], activations: str) -> None:
    """Refuse to round the activations of layers that several blocks use: these have one transform and inputs that differ."""
    places = [place for block in blocks for place in lenders_of(block.module)]
    if places:
        raise ConfigError(
            f"activations is {activations!r}, allowed for this model: None, because its blocks share layers: another block's layer "
            f"is used at {places[0]}{' and other places' if len(places) > 1 else ''}, where inputs are not rounded. Leave "
            "--activations out."
        )


def _require_known(model: nn.Module, ignore: Iterable[str], names: Names) -> None:
    """Refuse a pattern that names nothing: it is a typing error, found now instead of after hours."""
    paths = [names.module(path) for path, _ in model.named_modules() if path]
    experts = [site.path for site in sites_in(model, names=names) if isinstance(site, ExpertSite)]
    known = [*paths, *experts, *(names.stored(name) for name, _ in model.named_parameters())]
    for pattern in ignore:
        if pattern not in QuantConfig.ignore and not any(matches(name, (pattern,)) for name in known):
            close = {part for path in paths for part in (path, path.rpartition(".")[2])}
            raise ConfigError(f"ignore pattern {pattern!r} names no module of this model{did_you_mean(pattern, close)}")
