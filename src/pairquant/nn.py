"""The module that runs a packed linear inside a model, and the swap that puts it there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import cpu, ops
from .kernels.weights import MAX_SEGMENTS, KernelWeights
from .layout import TENSOR_NAMES, LinearLayout, PackedLinear

#: Names of layers that read the same input and are called with it one after the other: run in one launch.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Stored tensors that the kernels' layout replaces; all others are small.
REPACKED = ("qweight", "qzeros", "scales")


class RotatedLinear(nn.Module):
    """A linear layer whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    forward: x [..., C] floating → [..., N] in x's dtype, by

    - the Triton kernels, on NVIDIA GPUs at 4 bits: the stored tensors are then repacked in place of the originals, and
      come back bit for bit for saving and moving;
    - PyTorch's int4 product with a folded rotation, on CPUs in bfloat16 at 4 bits;
    - a dense weight, decoded once and kept, everywhere else.

    What is kept is made on the first forward. Compiled before that, a model is compiled twice: with the making, then
    without.

    The buffers keep their dtypes through `.to(dtype)`, `.half()` and the like, so that saving gives back the bits that
    were loaded; `dtype`, what the layer computes in, follows.
    """

    qweight: Tensor
    scales: Tensor
    theta: Tensor
    bias: Tensor | None

    def __init__(
        self, layout: LinearLayout, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self.in_features, self.out_features = layout.in_features, layout.out_features
        for name, stored in layout.fields().items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtype, device=device))
        if not layout.bias:
            self.bias = None
        self._dense: Tensor | None = None
        self._int4: list[Tensor] | None = None
        self._merged = Merged([self])

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> RotatedLinear:
        """A module that holds these tensors."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors().items():
            setattr(module, name, tensor)
        return module

    @property
    def packed(self) -> PackedLinear:
        """The stored form; shares memory with the buffers, except where the kernels' layout has replaced them."""
        return PackedLinear(self.layout, **self._stored())

    def forward(self, x: Tensor) -> Tensor:
        if self._merged.weights is not None or (x.is_cuda and self.prepare()):
            return self._merged.forward(self, x)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if x.device.type == "cpu" and cpu.available(self.layout, x.dtype):
            return torch.ops.pairquant.rotated_linear(
                x, self._int4_weights(), bias, [self.out_features], self.layout.group_size
            )
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def prepare(self) -> bool:
        """Repack for the Triton kernels, with the siblings, if this is a 4-bit layer on a GPU that has them.

        Done on the first forward otherwise; call it before that is captured in a graph or compiled.
        """
        if self._merged.weights is None:
            if self.theta.is_cuda and len(self._merged.members) > 1 and not self._merged.gathered("cuda"):
                self.leave_siblings()  # they are elsewhere
            if self.layout.bits != 4 or not self._merged.gathered("cuda"):
                return False
            if reason := ops.triton_missing():
                warnings.warn(f"4-bit layers run as dense layers: {reason}.", stacklevel=2)
                return False
            self._merged.build()
        return True

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight in the original basis, [N, C], kept for the next call."""
        dense = self._dense
        if dense is None or dense.dtype != dtype or dense.device != self.theta.device:
            with _plain_tensors():
                dense = self._decoded().to(dtype)
            self._dense = None if _offloaded(self) else dense
        return dense

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain, frozen layer with the decoded weight."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self._decoded().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def leave_siblings(self) -> None:
        """Merge with no other layer any more; those it was merged with stay together."""
        merged = self._merged
        merged.dissolve()
        self._merged = Merged([self])
        rest = Merged([member for member in merged.members if member is not self])
        for member in rest.members:
            member._merged = rest

    def _int4_weights(self) -> list[Tensor]:
        """`CpuWeights.tensors()`, kept for the next call."""
        int4 = self._int4
        if int4 is None:
            with _plain_tensors():
                int4 = torch.ops.pairquant.cpu_weights(self._operands(), self.layout.group_size)
            self._int4 = None if _offloaded(self) else int4
        return int4

    def _decoded(self) -> Tensor:
        """Float32 [N, C]."""
        return torch.ops.pairquant.decode(self._operands(), self.layout.bits, self.layout.group_size)

    def _operands(self) -> list[Tensor]:
        """The stored tensors but the bias, in the order that the operators take them."""
        stored = self._stored()
        return [stored[name] for name in TENSOR_NAMES if name != "bias"]

    def extra_repr(self) -> str:
        s = self.layout
        return f"{s.in_features} → {s.out_features}, {s.bits} bits, group {s.group_size}, {s.rotations} rotations"

    def _stored(self) -> dict[str, Tensor]:
        """Stored name → tensor."""
        repacked = self._merged.stored(self) if self._merged.weights is not None else {}
        return {name: repacked.get(name, getattr(self, name)) for name in self.layout.fields()}

    def _restore(self) -> None:
        """Back to the stored tensors, in this layer and those it is merged with."""
        self._merged.dissolve()
        self._dense = self._int4 = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Follow `fn` to another device, never to another dtype: a bfloat16 scale would lose stored bits."""
        self._restore()
        stored = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.theta.device)).dtype
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged.weights is not None:
            destination.update({prefix + name: tensor for name, tensor in self._merged.stored(self).items()})

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)


class Merged:
    """Layers that read the same input: the first one called computes for all, the others take their share.

    What was computed is handed out only for the very same tensor, unchanged since, in the same gradient mode, and is
    dropped as soon as every layer has had its part; any other input is computed anew. In inference mode and inside a
    compiled graph changes cannot be seen: there nobody may change x in place between two of the layers.
    """

    def __init__(self, members: Sequence[RotatedLinear]):
        self.members = list(members)
        self.weights: KernelWeights | None = None
        self.tensors: list[Tensor] = []
        self.bias: Tensor | None = None
        self.latest: _Computed | None = None

    def forward(self, member: RotatedLinear, x: Tensor) -> Tensor:
        if len(self.members) == 1:
            return self._linear(x)
        index = next(i for i, other in enumerate(self.members) if other is member)
        latest = self.latest  # read once: another thread may put its own there at any moment
        y = latest.share(index, x) if latest is not None else None
        if latest is None or y is None:
            latest = self.latest = _Computed(x, _state(x), list(self._linear(x).split(self.sizes, dim=-1)))
            y = latest.share(index, x)
        assert y is not None, "a share of what was just computed is there"
        if all(other is None for other in latest.waiting):
            self.latest = None
        return y

    def gathered(self, device_type: str) -> bool:
        """Whether all stored tensors are on one device of this type, to stay."""
        devices = {tensor.device for member in self.members for tensor in member.buffers()}
        return len(devices) == 1 and devices.pop().type == device_type and not any(map(_offloaded, self.members))

    def build(self) -> None:
        """Repack all members; they give up the stored tensors that this replaces."""
        from .kernels.launch import with_matrix

        with _plain_tensors():
            self.weights = with_matrix(KernelWeights.build([member.packed for member in self.members]))
            self.tensors = self.weights.tensors()
            self.sizes = list(self.weights.out_features)
            if any(member.bias is not None for member in self.members):
                parts = [m.bias if m.bias is not None else m.scales.new_zeros(m.out_features) for m in self.members]
                self.bias = torch.cat(parts)
        for member in self.members:
            for name in REPACKED:  # empty, but on the right device, by which PEFT places its adapters
                member._buffers[name] = getattr(member, name).new_empty(0)

    def stored(self, member: RotatedLinear) -> dict[str, Tensor]:
        """The tensors that `member` gave up."""
        assert self.weights is not None, "stored tensors are asked of weights that were not repacked"
        return self.weights.stored(self.members.index(member), member.layout)

    def dissolve(self) -> None:
        """Give every member its stored tensors back."""
        self.latest = None
        if self.weights is None:
            return
        for member in self.members:
            member._buffers.update(self.stored(member))
        self.weights, self.tensors, self.bias = None, [], None

    def _linear(self, x: Tensor) -> Tensor:
        return torch.ops.pairquant.rotated_linear(
            x, self.tensors, self.bias, self.sizes, self.members[0].layout.group_size
        )


@dataclass
class _Computed:
    """What merged layers gave for x in a state: the shares that were not fetched yet."""

    x: Tensor
    state: tuple[int, bool, bool]
    waiting: list[Tensor | None]

    def share(self, index: int, x: Tensor) -> Tensor | None:
        """A layer's share, once; None if this is another input, or the share is gone."""
        if self.x is not x or self.state != _state(x):
            return None
        y, self.waiting[index] = self.waiting[index], None
        return y


def _state(x: Tensor) -> tuple[int, bool, bool]:
    """What must not have changed since: the values, counted by changes in place, and whether gradients are recorded.

    Changes of inference mode and inside a compiled graph cannot be counted.
    """
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled()


def _plain_tensors() -> AbstractContextManager:
    """No gradients, and tensors that may be saved for gradients later, also when made in inference mode."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _offloaded(layer: nn.Module) -> bool:
    """Whether accelerate brings the stored tensors for each forward and takes them away after it."""
    hook = getattr(layer, "_hf_hook", None)
    return getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)


def link_siblings(model: nn.Module) -> None:
    """Merge the layers named in `SIBLINGS`, where they agree in all sizes but out_features."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), RotatedLinear)]
            like = {(s.in_features, s.bits, s.group_size, s.rotations) for s in (layer.layout for layer in layers)}
            if len(layers) == len(names) <= MAX_SEGMENTS and len(like) == 1:
                merged = Merged(layers)
                for layer in layers:
                    layer._restore()
                    layer._merged = merged


def prepare(model: nn.Module) -> nn.Module:
    """Repack every layer that runs on a GPU now, instead of on its first forward."""
    for _, layer in rotated_linears(model):
        layer.prepare()
    return model


def rotated_linears(model: nn.Module) -> Iterator[tuple[str, RotatedLinear]]:
    """Path and module of every quantized linear."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, RotatedLinear))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
