"""How much memory a walk will take, from shapes alone, before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import Block, outside
from ..models.sites import Site
from ..spec.mx import MX_BLOCK
from ..spec.options import QuantConfig
from ..support.devices import free_bytes
from .end_to_end import MEASURED_TOGETHER
from .head import CHUNK_NUMBERS
from .noise import CORRECTED
from .search import SHARED_ROWS
from .streams import MICRO_BATCH_TOKENS
from .walk import compute_dtype

#: What kernels' workspaces, fragmentation and the allocator's rounding add.
MARGIN = 1.15
#: Matrices of a linear's size that fitting holds at once beside its target (float32), and of its H (float64).
FITTING_COPIES, FACTOR_COPIES = 6, 3
#: Copies of a block's weights in float32 that block-wise training holds: masters, decoded, gradients, AdamW's moments, and
#: what the graph of a linear keeps (32.2 GB in all for an 8B block with 512 windows on an H100).
TRAINED_COPIES = 10
#: The same for a refit, which trains no weights (7 for 16 experts of 1024 channels, 5 without experts, on a CPU).
REFITTED_COPIES = 7
#: Copies of all group scales in float32 that a training of the whole model holds: at the start, trained, gradients, AdamW's
#: moments, the best; and of a window's logits (SmolLM2, 64 windows of 1024 tokens, an H100: 3.0 GB predicted, 2.8 taken).
SCALE_COPIES, LOGIT_COPIES = 6, 8

#: Second moments of a linear's own whose input is rounded by its own transform.
ROUNDED_MOMENTS = 2
#: Experts of a token, where the configuration does not say.
USUAL_EXPERTS = 8


@dataclass(frozen=True)
class Demand:
    """Bytes. device: at the peak of the largest block; streams: hidden states, part of `device` unless on the host.

    store: where the streams are kept between blocks; available: free memory of the device `on`; host: states that a last
    training keeps in the host's memory, which is the device's on a CPU.
    """

    device: int
    streams: int
    available: int
    store: torch.device
    on: torch.device
    host: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "store": str(self.store), "on": str(self.on)}


def demand(
    model: nn.Module,
    blocks: list[Block],
    config: QuantConfig,
    tokens: Tensor | None,
    validation: Tensor | None,
    device: torch.device,
    whole: int = 0,
) -> Demand:
    """Predict the peak; streams that the device has no room for are kept on the host.

    whole: tokens that a last training reads.
    """
    itemsize = compute_dtype(blocks, config, device).itemsize
    hidden = max((site.size.in_features for site in blocks[0].sites.values()), default=0)
    hidden = getattr(getattr(model, "config", None), "hidden_size", hidden)
    windows = sum(t.numel() for t in (tokens, validation) if t is not None)
    streams = windows * hidden * itemsize * (2 if config.recipe.compares else 1)
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or USUAL_EXPERTS
    work = max(_block_bytes(block, config, tokens, itemsize, device, chosen) for block in blocks)
    if blocks[-1].head and config.recipe.head.steps and tokens is not None:
        work = max(work, _head_training_bytes(model, blocks, config, tokens, itemsize))
    host = states_of(whole, hidden, itemsize)
    if config.recipe.end_to_end is not None and tokens is not None:
        last = _end_to_end_bytes(model, blocks, config, tokens, itemsize, hidden)
        work = max(work, last + (host if device.type == "cpu" else 0))
    available = free_bytes(device)
    fits = work * MARGIN + streams < available
    store = device if fits else torch.device("cpu")
    return Demand(int(work * MARGIN) + (streams if fits else 0), streams, available, store, device, host)


def states_of(tokens: int, hidden: int, itemsize: int) -> int:
    """Return the bytes of the states that enter the first block and leave the last one, which the host holds."""
    return 2 * tokens * hidden * itemsize


def _end_to_end_bytes(
    model: nn.Module, blocks: list[Block], config: QuantConfig, tokens: Tensor, itemsize: int, hidden: int
) -> int:
    """Predict what the training of the whole model takes: all codes and scales, one block in float32, hidden states, logits."""
    how = config.recipe.end_to_end
    assert how is not None, "asked for by the recipe"
    weights = [sum(site.size.in_features * site.size.out_features for site in b.sites.values()) for b in blocks]
    scales = sum(weights) // (config.spec.group_size if config.weights is None else MX_BLOCK)
    sites = {id(site.module) for block in blocks for site in block.sites.values()}
    plain = sum(p.numel() for m in model.modules() if id(m) not in sites for p in m.parameters(recurse=False))
    window = tokens.shape[1]
    together = how.batch * (len(blocks) + 2) + MEASURED_TOGETHER + MICRO_BATCH_TOKENS // window
    states = together * window * hidden * 4
    read = max(
        sum(sum((site.size.out_features, site.size.in_features)) for site in b.sites.values() if not b.head)
        for b in blocks
    )
    activations = min(how.batch * window, MICRO_BATCH_TOKENS) * read * 4 * 2
    logits = window * _vocabulary(model) * 4 * LOGIT_COPIES
    one_block = max(weights) * 4 * REFITTED_COPIES
    steps = sum(weights) * (1 if config.weights is None else 2)
    return steps + scales * 4 * SCALE_COPIES + plain * itemsize + states + max(one_block + activations, logits)


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return int(getattr(text, "vocab_size", 0))


def _block_bytes(
    block: Block, config: QuantConfig, tokens: Tensor | None, itemsize: int, device: torch.device, chosen: int
) -> int:
    """Predict what one block takes. chosen: experts that each token gets."""
    sizes = [(site.size.out_features, site.size.in_features) for site in block.sites.values()]
    if not sizes:
        return 0
    weights = sum(math.prod(size) for size in sizes)
    experts = [site for site in block.sites.values() if site.pool is not None]
    share = min(1.0, chosen / max(1, len({site.path.rpartition(".")[0] for site in experts})))
    moments = _moment_bytes(block, config, int(tokens.numel() * share) if tokens is not None else 0)
    fitting = _fitted_together(block) * 4 * FITTING_COPIES
    if config.transform_per_expert:  # gate and up of every expert lie beside each other until all transforms are found
        fitting += weights * 4
    factor = max(c for _, c in sizes) ** 2 * 8 * FACTOR_COPIES if config.recipe.rounding == "gptq" else 0
    text = tokens.numel() if tokens is not None else 0
    batch = min(MICRO_BATCH_TOKENS, text)
    read = sum(sum((s.size.out_features, s.size.in_features)) * (share if s.pool else 1) for s in block.sites.values())
    if block.head:  # its outputs are not computed
        read = sizes[0][1]
    activations = int(batch * read * itemsize * 2)
    if config.all_experts:
        activations += _one_expert_bytes(experts, batch, itemsize)
    copies = TRAINED_COPIES if config.recipe.training else REFITTED_COPIES if config.recipe.refit else 0
    trained = 0 if block.head else weights * 4 * copies
    ahead = weights * itemsize if device.type == "cpu" else 0  # the next block is read meanwhile
    return ahead + weights * (itemsize + 4) + moments + max(fitting, factor, activations, trained)


def _head_training_bytes(
    model: nn.Module, blocks: list[Block], config: QuantConfig, tokens: Tensor, itemsize: int
) -> int:
    """Predict what the training of the output embedding takes, the last block.

    Beside the copies of a refit these are the weight as stored, what it was in float32 (`HeadFit.weight`), second moments,
    logits, a stream, of which it makes one piece, and what lies outside the blocks, the input embedding included: what the
    model does to logits is found by running all of that.
    """
    (site,) = blocks[-1].sites.values()
    weights = site.size.out_features * site.size.in_features
    around = sum(tensor.numel() for tensor in outside(model, blocks)) * itemsize
    states = tokens.numel() * site.size.in_features * itemsize
    moments = _moment_bytes(blocks[-1], config, tokens.numel())
    copies = weights * (itemsize + 4 * (1 + REFITTED_COPIES))
    return copies + moments + CHUNK_NUMBERS * 4 * LOGIT_COPIES + states + around


def _fitted_together(block: Block) -> int:
    """Return the most weights that one transform is fitted on: those of a linear, or the sampled rows of a pool of experts."""
    rows: dict[str, int] = {}
    channels: dict[str, int] = {}
    for path, site in block.sites.items():
        home = site.transform_name or path
        rows[home], channels[home] = rows.get(home, 0) + site.size.out_features, site.size.in_features
    pools = {site.transform_name for site in block.sites.values()}
    return max((min(n, SHARED_ROWS) if home in pools else n) * channels[home] for home, n in rows.items())


def _moment_bytes(block: Block, config: QuantConfig, routed: int) -> int:
    """Predict the bytes of the second moments of a block. routed: the tokens of the text that each expert gets on average.

    An expert's are counted twice: as a sum, and as the product of one micro-batch, which is added to the sum when the
    products of all experts are known.
    """
    inputs: dict[tuple[str, str | int], int] = {}
    for path, site in block.sites.items():
        channels = site.size.in_features
        copies = 2 if config.recipe.drift or site.pool else 1
        corrected = site.pool is None or routed >= CORRECTED.get(config.activations or "", math.inf) * channels
        if config.activations is not None and corrected:  # each linear rounds its input by its own transform
            inputs[path, ""] = channels**2 * 4 * ROUNDED_MOMENTS
        of_all = config.all_experts and site.pool is not None and not site.pool.endswith(".down")
        home = "" if of_all else path.rpartition(".")[0]
        inputs[home, site.pool or channels] = channels**2 * 4 * copies
    return sum(inputs.values())


def _one_expert_bytes(experts: Sequence[Site], batch: int, itemsize: int) -> int:
    """Predict the bytes of an expert's activations on all tokens of a micro-batch: what every part of it returns or reads.

    They are held for one expert at a time, and once more in float32 for their product.
    """
    widths: dict[str, int] = {}
    for site in experts:
        expert = site.path.rpartition(".")[0]
        widths[expert] = widths.get(expert, 0) + (
            site.size.in_features if str(site.pool).endswith(".down") else site.size.out_features
        )
    return batch * max(widths.values(), default=0) * (itemsize + 4)
