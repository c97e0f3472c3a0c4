"""The plan of a whole model: which weights will be quantized, as what, and what stays plain and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..spec.options import QuantConfig
from ..spec.patterns import matches
from ..spec.plan import Plan, plan_for
from ..support.errors import ConfigError, did_you_mean
from .blocks import Block, find_blocks
from .sites import is_linear

#: A matrix of a block that no site covers is refused from this share of the blocks' weights on, unless it is ignored.
LARGE_SHARE = 0.05


def plan_model(model: nn.Module, config: QuantConfig) -> tuple[Plan, list[Block]]:
    """Find the blocks of a model, which may lack its weights, and resolve the plan for them.

    Raises `SourceError` for a model without blocks; `ConfigError` for patterns that name nothing, weights that do not
    fit, and large weights that nothing here can quantize.
    """
    blocks = find_blocks(model, config.ignore)
    _require_known(model, config.ignore)
    sizes = {path: site.size for block in blocks for path, site in block.sites.items()}
    if not sizes:
        raise ConfigError(f"ignore {', '.join(config.ignore)} leaves no linear layer to quantize")
    _require_covered(blocks, config.ignore)
    return plan_for(config, sizes, _plain(model, sizes, config.ignore)), blocks


def _plain(model: nn.Module, quantized: Iterable[str], ignore: tuple[str, ...]) -> dict[str, str]:
    """Path → reason of every linear that is not quantized."""
    taken, found = set(quantized), {}
    for path, module in model.named_modules():
        if is_linear(module) and path not in taken:
            named = next((pattern for pattern in ignore if matches(path, (pattern,))), None)
            found[path] = f"--ignore {named}" if named else "not a plain linear layer of a decoder block"
    return found


def uncovered(block: Block) -> dict[str, int]:
    """Return full name → number of values of the block's matrices that belong to no site, whatever `ignore` says."""
    covered = {id(site.module) for site in block.sites.values()}
    return {
        ".".join(part for part in (block.path, path, name) if part): parameter.numel()
        for path, module in block.module.named_modules()
        if id(module) not in covered
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def _require_covered(blocks: list[Block], ignore: tuple[str, ...]) -> None:
    """Refuse to leave a large part of the blocks in 16 bits without a word: fused experts, say."""
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
        f"such as {largest}: fused experts, or layers that compute something of their own. To leave them as they are and "
        f"quantize the rest: --ignore 're:.*{end}$'. Otherwise choose a dense model."
    )


def _require_known(model: nn.Module, ignore: Iterable[str]) -> None:
    """Refuse a pattern that names nothing: it is a typing error, found now instead of after hours."""
    paths = [path for path, _ in model.named_modules() if path]
    names = [*paths, *(name for name, _ in model.named_parameters())]
    for pattern in ignore:
        if pattern not in QuantConfig.ignore and not any(matches(name, (pattern,)) for name in names):
            known = {part for path in paths for part in (path, path.rpartition(".")[2])}
            raise ConfigError(f"ignore pattern {pattern!r} names no module of this model{did_you_mean(pattern, known)}")
