"""The walk over the decoder blocks: each is fitted on what the quantized blocks before it hand over.

Per block: one pass of the calibration text collects the second moments of every distinct input; the transforms are
fitted, the weights rounded, packed, and replaced by their decoded values; a second pass carries the text on.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import QuantConfig
from ..core.linear import Transform, decode, encode
from ..core.rounding import proxy_error
from ..errors import ConfigError
from ..layout import PackedLinear
from .capture import Block, Call, Moments, MomentSum, find_blocks, first_inputs_and_calls, recorded_inputs
from .proxy import Problem, fit_transforms

#: Tokens per forward pass through one block.
MICRO_BATCH_TOKENS = 8192
#: Share of the mean diagonal of H added before solving for the drift correction.
DRIFT_DAMPING = 0.01
#: Most that a drift correction may change a layer's output, as a relative squared error.
MAX_DRIFT = 0.01


@dataclass(frozen=True)
class BlockResult:
    """One finished block. packed and errors by linear path; errors are relative output errors (`proxy_error`).

    shared: groups of linears with one transform.
    """

    index: int
    path: str
    packed: dict[str, PackedLinear]
    errors: dict[str, float]
    shared: list[tuple[str, ...]]
    seconds: float


@torch.no_grad()
def quantize_blocks(
    model: nn.Module, tokens: Tensor | None, config: QuantConfig, device: torch.device
) -> Iterator[BlockResult]:
    """Quantize block after block, in place: after each yield the block holds its decoded weights.

    model: a causal language model, on the CPU or on `device`; tokens: int64 [samples, T], not needed by recipes
    that round to nearest without a transform.
    """
    blocks = find_blocks(model, config.ignore)
    streams = None
    if needs_text(config):
        if tokens is None:
            raise ConfigError(f"preset {config.preset!r} needs calibration tokens, none were given")
        micro_batch = _micro_batch(*tokens.shape)
        streams = _Streams.start(model, blocks, tokens, micro_batch, config.recipe.drift > 0, device)
    for index, block in enumerate(blocks):
        stored_as = next(block.module.parameters()).device, next(block.module.parameters()).dtype
        block.module.to(device, torch.float32)
        yield _quantize_block(index, block, streams, config, device)
        if streams is not None and index + 1 < len(blocks):
            streams.advance(block, index)
        block.module.to(*stored_as)


def _quantize_block(index: int, block: Block, streams: _Streams | None, config: QuantConfig, device) -> BlockResult:
    start = time.perf_counter()
    result = BlockResult(index, block.path, {}, {}, [], 0.0)
    if streams is None:
        eye = {c: torch.eye(c, device=device) for c in {linear.in_features for linear in block.linears.values()}}
        moments = [Moments([path], eye[linear.in_features]) for path, linear in block.linears.items()]
    else:
        moments = streams.moments(block, index)
    _round_inputs(block, moments, config, result)
    return replace(result, seconds=time.perf_counter() - start)


def needs_text(config: QuantConfig) -> bool:
    """Whether the recipe looks at activations at all."""
    return config.recipe.transform or config.recipe.rounding != "nearest"


def _round_inputs(block: Block, moments: list[Moments], config: QuantConfig, result: BlockResult) -> None:
    """Fit, round and replace all linears that read these inputs; adds them to `result`."""
    weights = {path: _target(block.linears[path], m, config.recipe.drift) for m in moments for path in m.readers}
    hessians = {path: m.hessian for m in moments for path in m.readers}
    groups = [tuple(m.readers) for m in moments] if config.share_rotations else [(path,) for path in weights]
    problems = [
        Problem(torch.cat([weights[p] for p in group]), hessians[group[0]], _seed(config.seed, group[0]))
        for group in groups
    ]
    with torch.enable_grad():
        transforms = fit_transforms(problems, config)
    for group, transform in zip(groups, transforms, strict=True):
        if len(group) > 1:
            result.shared.append(group)
        for path in group:
            packed, error = _round_linear(block.linears[path], weights[path], transform, hessians[path], config)
            result.packed[path], result.errors[path] = packed, error


def _round_linear(
    linear: nn.Linear, target: Tensor, transform: Transform, hessian: Tensor, config: QuantConfig
) -> tuple[PackedLinear, float]:
    """Round one linear and put its decoded weight in place: the packed form, on the CPU, and its relative error."""
    layout = config.layout(linear.in_features, linear.out_features, linear.bias is not None)
    packed = encode(target, transform, hessian, layout, config.recipe, config.symmetric, linear.bias)
    decoded = decode(packed)
    error = proxy_error(linear.weight.float(), decoded, hessian)
    linear.weight.data = decoded.to(linear.weight.dtype)
    return PackedLinear(layout, **{name: tensor.cpu() for name, tensor in packed.tensors().items()}), error


def _target(linear: nn.Linear, moments: Moments, drift: float) -> Tensor:
    """The weight to approximate: W + drift · D, D = W (X₀ᵀX - XᵀX)(XᵀX + damping)⁻¹.

    W + D is the least-squares solution of X₀ Wᵀ = X (W + D)ᵀ: it answers the quantized model's input X with the output
    that the original gives on its own input X₀. Followed all the way the corrections feed on each other and diverge
    (docs/decisions.md); a quarter of the way they help, and never may they change the output by more than `MAX_DRIFT`.
    """
    weight = linear.weight.detach().float()
    if not drift or moments.cross is None:
        return weight
    hessian = moments.hessian.double()
    damped = hessian + torch.eye(len(hessian), device=hessian.device) * hessian.diagonal().mean() * DRIFT_DAMPING
    solved = torch.linalg.solve(damped, (moments.cross.double() - hessian).T).T
    change = drift * (weight.double() @ solved).float()
    size = proxy_error(weight, weight + change, moments.hessian)
    return weight + change * min(1.0, (MAX_DRIFT / max(size, 1e-30)) ** 0.5)


def _seed(seed: int, path: str) -> int:
    """A seed of its own for every transform, the same whatever was quantized before."""
    return (seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63


def _micro_batch(samples: int, seq_len: int) -> int:
    """The largest divisor of `samples` that keeps a pass within `MICRO_BATCH_TOKENS`."""
    limit = max(1, MICRO_BATCH_TOKENS // seq_len)
    return max(n for n in range(1, min(limit, samples) + 1) if samples % n == 0)


@dataclass
class _Streams:
    """Hidden states entering the current block: in the quantized model, and where drift asks for it the original."""

    calls: list[Call]
    quantized: list[Tensor]
    original: list[Tensor] | None

    @classmethod
    def start(cls, model, blocks, tokens, micro_batch, keep_original, device) -> _Streams:
        home = next(model.parameters()).device
        hidden, calls = first_inputs_and_calls(model, blocks, tokens.to(home), micro_batch)
        calls = [Call(_ready(c.args, device), _ready(c.kwargs, device)) for c in calls]
        hidden = [h.to(device, torch.float32) for h in hidden]
        return cls(calls, hidden, list(hidden) if keep_original else None)

    def moments(self, block: Block, index: int) -> list[Moments]:
        """Run the original block on the stream(s); the original stream moves on to the next block."""
        total = MomentSum()
        for i, hidden in enumerate(self.quantized):
            reference = None
            if self.original is not None:
                with recorded_inputs(block.linears) as reference:
                    self.original[i] = self.calls[index].run(block.module, self.original[i])
            with recorded_inputs(block.linears) as inputs:
                self.calls[index].run(block.module, hidden)
            total.add(inputs, reference)
        return total.checked(block.linears)

    def advance(self, block: Block, index: int) -> None:
        """Carry the quantized stream through the block, which now holds its decoded weights."""
        self.quantized = [self.calls[index].run(block.module, hidden) for hidden in self.quantized]


def _ready(value, device: torch.device):
    """Tensors anywhere inside `value`, on the device, floating ones in float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _ready(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_ready(item, device) for item in value)
    return value
