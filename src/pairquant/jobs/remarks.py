"""What `quantize` tells the user before and after the work: what differs from the default, what stays plain, what is poor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..backends.experts import explain_experts
from ..backends.table import DENSE, Explanation, explain
from ..core.rounding import POOR_ERROR
from ..layers.model import unlike_siblings
from ..models.planning import reason_to_stay
from ..optimize.memory import Demand
from ..optimize.noise import tokens_to_correct
from ..spec.experts import block_layouts
from ..spec.linear import LinearLayout
from ..spec.options import QuantConfig
from ..spec.plan import Plan
from ..support.formatting import counted, percent, size
from .opened import Opened


def exceptions(plan: Plan) -> list[str]:
    """Return what differs from the default, for the user: how many layers, which spec, by which option."""
    kinds: dict[tuple[str, str], int] = {}
    for path, spec in plan.exceptions.items():
        kind = (plan.reasons[path], str(spec))
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = [f"{counted(count, 'layer')} at {spec}: {reason}" for (reason, spec), count in kinds.items()]
    if mixed := unlike_siblings({path: layout.spec for path, layout in plan.layouts.items()}):
        lines.append(
            f"{', '.join(mixed[0])} differ in bits, group size or rotations. vLLM runs them as one layer and will refuse "
            f"this checkpoint ({counted(len(mixed), 'such group')}); Transformers runs it."
        )
    return lines


def of_activations(opened: Opened, device: torch.device, tokens: int) -> list[str]:
    """Return for the user what rounds activations, layer by layer, and whether that is simulated here.

    Also what vLLM will refuse, and which layers have too short a text. Nothing where no activations are rounded. tokens: of the
    calibration text, 0 for recipes without.
    """
    layers = {key: count for key, count in _alike(opened).items() if key[0].activations is not None}
    if not layers:
        return []
    kinds: Counter[str] = Counter()
    refused = 0
    for (layout, experts), count in layers.items():
        running = _running(opened, layout, experts, device)
        kinds[
            f"{'of experts ' if experts else ''}read is rounded to {layout.activations}, {_how_multiplied(running)}"
        ] += count
        unlike = len({one.spec for one in experts}) > 1
        refused += count if experts and (unlike or running.backend == DENSE.name) else 0
    lines = [f"what {counted(count, 'layer')} {text}" for text, count in kinds.items()]
    if refused:
        lines.append(
            f"vLLM will refuse this checkpoint on a machine like this one: nothing in it rounds what {counted(refused, 'layer')} "
            "of experts read. Transformers runs it"
        )
    lines += _fitted_to_plain_inputs(
        {layout: count for (layout, experts), count in layers.items() if not experts}, tokens
    )
    return lines


def of_weights(opened: Opened, device: torch.device) -> list[str]:
    """Return for the user how many weights in a format of their own have no kernel here, so that they run decoded."""
    decoded: Counter[str] = Counter()
    for (layout, experts), count in _alike(opened).items():
        if layout.weights is not None and _running(opened, layout, experts, device).backend == DENSE.name:
            decoded[layout.weights] += count
    return [
        f"{counted(count, 'layer')} of {weights} weights run decoded on this machine: they save disk, not memory or time"
        for weights, count in decoded.items()
    ]


def _alike(opened: Opened) -> Counter[tuple[LinearLayout, frozenset[LinearLayout]]]:
    """Count the planned layers that one backend runs for one reason: by layout and, of experts, all layouts of their block."""
    layouts, sites = opened.plan.layouts, opened.sites
    blocks = block_layouts(layouts, [path for path in layouts if sites[path].pool is not None])
    return Counter((layout, blocks.get(path, frozenset())) for path, layout in layouts.items())


def _running(
    opened: Opened, layout: LinearLayout, experts: frozenset[LinearLayout], device: torch.device
) -> Explanation:
    """Return what runs a layer in bfloat16. experts: the layouts of its block's experts, empty if it is no expert."""
    if experts:
        return explain_experts(experts, device, torch.bfloat16, opened.config.transform_per_expert)
    return explain(layout, device, torch.bfloat16)


def of_fitting_in_turn(config: QuantConfig) -> list[str]:
    """Return for the user that a preset that trains blocks fits one linear after the other here, and why."""
    if config.recipe.training is None or (config.activations is None and config.weights is None):
        return []
    why = "rounded activations" if config.weights is None else f"{config.weights} weights"
    return [
        f"with {why} this preset fits one linear after the other instead of training blocks; settings of training have no "
        "effect, steps and learning_rate do"
    ]


def _fitted_to_plain_inputs(layers: Mapping[LinearLayout, int], tokens: int) -> list[str]:
    """Return for the user which weights the text is too short for, of those that are fitted to rounded inputs on longer ones.

    layers: how many there are of each layout.
    """
    needed = {layout: least for layout in layers if (least := tokens_to_correct(layout)) is not None and tokens < least}
    if not needed or not tokens:
        return []
    return [
        f"the weights of {counted(sum(layers[layout] for layout in needed), 'layer')} are fitted to inputs before rounding: to fit "
        f"them to rounded ones takes up to {max(needed.values()):,} tokens, and the text has {tokens:,} (--samples, --seq-len)"
    ]


def _how_multiplied(running: Explanation) -> str:
    """Return in words how rounded activations are multiplied."""
    if running.simulated:
        return f"simulated on this machine: {running.backend} rounds them, and multiplies in 16 or 32 bits, no faster than without"
    return f"multiplied as such by {running.backend}"


def of_own_transforms(opened: Opened) -> list[str]:
    """Return for the user what experts with transforms of their own cost, before the work; nothing without them."""
    if not opened.config.transform_per_expert:
        return []
    shared, own = set(), set()
    for site in opened.sites.values():
        if site.transform_name is not None:
            shared.add(site.pool)
            own.add(site.transform_name)
    return [
        f"{len(own)} transforms for experts instead of {len(shared)}: no kernel for GPUs runs these. Transformers decodes an "
        "expert at each use, which is slow, and vLLM decodes all on loading, which takes the memory of the unquantized model; "
        "the original program does not read them"
    ]


def left_plain(opened: Opened) -> list[str]:
    """Return for the user what stays in 16 bits inside the blocks and beside them, and its share, before the work."""
    total = 0
    kinds: dict[tuple[str, str], list[int]] = {}
    sites = [site for block in opened.decoders for site in block.sites.values()]
    quantized = {name for site in sites for name in (site.parameter, site.bias_parameter)}
    for block in opened.decoders:
        for own, parameter in block.module.named_parameters():
            name = f"{block.path}.{own}"
            total += parameter.numel() if parameter.dim() >= 2 else 0
            if parameter.dim() >= 2 and name not in quantized:
                path = opened.names.module(name.removesuffix(".weight"))
                reason = opened.plan.plain.get(path) or reason_to_stay(path)
                kinds.setdefault((path.rpartition(".")[2], reason), []).append(parameter.numel())
    lines = [
        f"{name} stays plain in {counted(len(sizes), 'place')}, {sum(sizes) / total:.1%} of the blocks' weights: {reason}"
        for (name, reason), sizes in kinds.items()
    ]
    if unknown := opened.names.unknown:
        more = ", …" if len(unknown) > 2 else ""
        lines.append(
            f"{counted(len(unknown), 'tensor')} that {type(opened.skeleton).__name__} does not use are kept as they are: "
            f"{', '.join(unknown[:2])}{more}"
        )
    return lines


def of_head(opened: Opened, shared: bool) -> list[str]:
    """Return for the user what the output embedding takes before and after, and that a shared one is stored twice."""
    lines = []
    kept = ", which stays as it is" if opened.embedding is None else ""
    for path in (path for block in opened.blocks if block.head for path in block.sites):
        layout = opened.plan.layouts[path]
        stored = layout.stored_bits() // 8
        if shared:
            lines.append(
                f"the output embedding was the input embedding{kept}. Stored apart it adds "
                f"{size(stored)} to the files; each token then reads these instead of "
                f"{size(layout.in_features * layout.out_features * 2)}"
            )
        else:
            lines.append(
                f"the output embedding takes {size(stored)} instead of "
                f"{size(layout.in_features * layout.out_features * 2)} in 16 bits"
            )
    return lines


def of_embedding(layout: LinearLayout, error: float) -> str:
    """Return for the user what the input embedding takes before and after, and the relative error of its rows."""
    return (
        f"the input embedding takes {size(layout.stored_bits() // 8)} instead of "
        f"{size(layout.in_features * layout.out_features * 2)} in 16 bits; relative error of its rows {percent(error)} %"
    )


def of_last_training(epochs: int, tokens: int, memory: Demand) -> str:
    """Return for the user what a training of the whole model will do."""
    if memory.on.type == "cpu":
        cost = ", which takes longer than all blocks together on a CPU"
    else:
        cost = f"; their states take {size(memory.host)} of this machine's own memory"
    return f"at the end the whole model is trained in {counted(epochs, 'epoch')} of {tokens:,} tokens{cost}"


def experts_with_few_tokens(opened: Opened, entries: Iterable[Mapping[str, Any]]) -> str | None:
    """Say how many experts were fitted on fewer tokens than they have input channels."""
    channels = {site.pool: site.size.in_features for block in opened.blocks for site in block.sites.values()}
    tokens = {home: counts for entry in entries for home, counts in entry.get("tokens", {}).items()}
    few = [count for home, counts in tokens.items() for count in counts if count < channels[f"{home}.gate_up"]]
    if not few:
        return None
    remedy = "--samples" if opened.config.all_experts else "--samples), or all tokens for every expert (--all-experts"
    return (
        f"{len(few)} of {sum(map(len, tokens.values()))} experts got fewer tokens than they have input channels, the "
        f"fewest {min(few)}: what they lack was made up for by the average token of their block. More text helps "
        f"({remedy}); pairquant.jsonl has every count"
    )


def poor_layers(poor: Mapping[str, float]) -> str:
    """Name the layers that were represented badly, worst first."""
    shown = [f"{path} {error:.0%}" for path, error in list(poor.items())[:5]]
    more = f" and {len(poor) - 5} more (`pairquant inspect` lists them)" if len(poor) > 5 else ""
    return (
        f"the output's relative error is above {POOR_ERROR:.0%}: {', '.join(shown)}{more}. Give these layers more bits "
        "(--override) or leave them as they are (--ignore)."
    )
