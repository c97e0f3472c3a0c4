"""Find out, by running a model, whether what lies outside its blocks can be folded.

The input embedding writes the stream, and the last norm and the output embedding read it. Both are folded with random
transforms: where what enters the blocks, or the logits, change by more than rounding, the stream cannot be rotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.rotation import rotate_dense
from .blocks import Block, Call, enter, outside_on, run_from
from .foldable import LOOK_TOKENS, STATE, TOLERANCE, holds_vector, is_turned, norm_of, same
from .folding import Foldable, Matrix, Norm, Transforms, fold, restored
from .sites import embedding_of, embedding_site, site_of


@dataclass(frozen=True)
class Outside:
    """What of the stream lies outside the blocks. reason: why it cannot be rotated; None if it can."""

    embedding: Matrix | None = None
    norm: Norm | None = None
    reason: str | None = None

    def fold(self, transforms: Transforms, stored: Mapping[str, torch.dtype] | None = None) -> None:
        """Rewrite the embedding, the last norm and the head. transforms: with a rotation of the stream."""
        assert self.embedding is not None, "asked for where the stream can be rotated"
        assert self.norm is not None, "asked for where the stream can be rotated"
        self.embedding.transform_columns(transforms.stream, None)
        fold(Foldable((self.norm,)), transforms, stored)


@torch.no_grad()
def look_outside(model: nn.Module, blocks: list[Block], width: int, group: int, device: torch.device) -> Outside:
    """Find out whether what precedes and follows the blocks can be folded; its weights must be there.

    The output embedding must not be the input embedding's tensor (`models.blocks.head_block` sees to that).
    """
    embedding, head = embedding_site(model), embedding_of(model, "output")
    if embedding is None or head is None or site_of("head", head) is None:
        return Outside(reason="there is no input embedding that only looks rows up, or no plain output embedding")
    if width % group:
        return Outside(reason=f"{width} hidden channels are no multiple of the group size {group}")
    generator = torch.Generator().manual_seed(3)
    states = STATE * torch.randn(1, LOOK_TOKENS, width, generator=generator).to(device)
    tokens = torch.randint(embedding.size.out_features, (1, LOOK_TOKENS), generator=generator)
    rotation = torch.linalg.qr(torch.randn(width // group, group, group, generator=generator))[0]
    with outside_on(device, torch.float32, model, blocks):
        try:
            norm = _last_norm(model, blocks, tokens.to(device), states, head)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return Outside(reason=f"what follows the blocks takes other states ({str(error).splitlines()[0][:80]})")
        if norm is None or not norm.rotates:
            kind = "nothing" if norm is None else type(norm.module).__name__
            return Outside(reason=f"the output embedding reads {kind}, where an RMSNorm without bias would allow it")
        found = Outside(Matrix(embedding.place, embedding.module), norm)
        if others := _other_parameters(model, blocks, (embedding.module, norm.module, head)):
            return Outside(reason=f"{others[0]}, outside the blocks, may read or write the stream")
        scales = (0.3 * torch.randn(width, generator=generator)).exp()
        reason = _tried(model, blocks, found, tokens.to(device), states, rotation.to(device), scales.to(device))
    return replace(found, reason=reason)


def _tried(
    model: nn.Module,
    blocks: list[Block],
    found: Outside,
    tokens: Tensor,
    states: Tensor,
    stream: Tensor,
    scales: Tensor,
) -> str | None:
    """Return what goes wrong when what is outside the blocks is folded with random transforms; None if nothing does."""
    assert found.norm is not None, "found before"
    before, logits = enter(model, blocks, tokens, 1), run_from(model, blocks, tokens, states)
    with restored(model):
        found.fold(Transforms(stream, {found.norm.place: scales}))
        after, rotated = enter(model, blocks, tokens, 1), run_from(model, blocks, tokens, rotate_dense(states, stream))
    expected = rotate_dense(before.hidden[0], stream)
    if (after.hidden[0] - expected).norm() > TOLERANCE * expected.norm():
        return "what enters the first block is more than the rows of the input embedding"
    for one, other in zip(before.calls, after.calls, strict=True):
        if any(not torch.equal(a, b) for a, b in zip(_tensors_of(one), _tensors_of(other), strict=True)):
            return "the blocks are given more of the stream than the output of the block before"
    if (rotated - logits).norm() > TOLERANCE * logits.norm():
        return "the logits differ when the last block's output is rotated"
    return None


def _tensors_of(value: object) -> Iterator[Tensor]:
    """Yield all tensors among a call's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Call):
        yield from _tensors_of((value.args, value.kwargs))
    elif isinstance(value, dict):
        yield from _tensors_of(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_of(item)


def _last_norm(model: nn.Module, blocks: list[Block], tokens: Tensor, states: Tensor, head: nn.Module) -> Norm | None:
    """Return the norm whose output the head reads."""
    inside = {module for block in blocks for module in block.module.modules()}
    width = states.shape[-1]
    outputs: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []
    norms = {
        module: path for path, module in model.named_modules() if module not in inside and holds_vector(module, width)
    }
    handles = [module.register_forward_hook(lambda m, _, out: outputs.update({m: out})) for module in norms]
    handles.append(head.register_forward_pre_hook(lambda _, args: read.append(args[0])))
    try:
        run_from(model, blocks, tokens, states)
    finally:
        for handle in handles:
            handle.remove()
    place = next(path for path, module in model.named_modules() if module is head)
    matrix = Matrix(place, head, turned=is_turned(head))
    for module, out in outputs.items():
        if read and same(read[0], out):
            return norm_of(norms[module], module, (matrix,))
    return None


def _other_parameters(model: nn.Module, blocks: list[Block], known: Iterable[nn.Module]) -> list[str]:
    """Return the parameters outside the blocks that belong to none of the known modules."""
    spared = {module for block in blocks for module in block.module.modules()} | set(known)
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module not in spared
        for name, _ in module.named_parameters(recurse=False)
    ]
