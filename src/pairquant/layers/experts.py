"""The module that runs a block's packed experts inside a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu_int4 import CpuInt4
from ..backends.table import Explanation
from ..backends.triton_int4 import TritonInt4
from ..core.linear import rotated_weight, transform_of
from ..core.rotation import rotate_dense
from ..kernels.run.cpu import int4_product, int4_weights
from ..spec.experts import TRANSFORM, pool_of
from ..spec.linear import LinearLayout, PackedLinear

#: What multiplies experts where there is no int4 product.
DECODED = "decoded"


def has_int4(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether experts of this layout are multiplied from their codes, by PyTorch's int4 product for CPUs."""
    return CpuInt4().refusal(layout, device, dtype) is None


def explain_experts(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Return what multiplies experts of this layout; decoded ones are decoded at each use, which keeps them small."""
    if has_int4(layout, device, dtype):
        return Explanation(CpuInt4.name, {})
    refusals = {CpuInt4.name: CpuInt4().refusal(layout, device, dtype) or ""}
    return Explanation(DECODED, refusals | {TritonInt4.name: "has no kernel for experts yet"})


@dataclass(frozen=True)
class PartPlan:
    """How one part of every expert is stored. name: the source's, such as "w1"; layout: the same for all experts."""

    name: str
    layout: LinearLayout

    @property
    def pool(self) -> str:
        """ "gate_up" or "down": which of the two transforms the part shares."""
        return pool_of(f"home.0.{self.name}").removeprefix("home.")


class PackedPart(nn.Module):
    """The codes of one part of one expert, under their stored names."""

    def __init__(self, layout: LinearLayout, device: torch.device | str | None = None):
        super().__init__()
        for name, stored in layout.fields().items():
            if name not in TRANSFORM:
                self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtype, device=device))


class RotatedExperts(nn.Module):
    """Packed experts in the place of a module of Transformers that holds them in parameters [E, …].

    The buffers have the stored names: `3.gate_proj.qweight`, and for all experts together `gate_up_weight_theta`.
    forward: as of the module that it replaces, hidden states [T, H] and each token's experts and their weights [T, k] →
    [T, H]. The input is rotated once for all experts; each expert that has tokens is multiplied from its codes: by PyTorch's
    int4 product on CPUs at 4 bits in bfloat16, else its weight is decoded each time.

    source: the module that is replaced, which says how gate and up are joined and what lies between the products; plans:
    of "gate_proj" (if there is a gate), "up_proj" and "down_proj".
    """

    def __init__(
        self, source: Any, plans: Mapping[str, PartPlan], count: int, device: torch.device | str | None = None
    ):
        super().__init__()
        self.plans, self.count = dict(plans), count
        self.has_gate, self.is_concatenated = source.has_gate, source.is_concatenated
        source._parameters.clear()
        self._between = [source]  # in a list, so that it is no submodule: it has no tensors any more
        for number in range(count):
            parts = {plan.name: PackedPart(plan.layout, device) for plan in self.plans.values()}
            self.add_module(str(number), nn.ModuleDict(parts))
        for plan in (self.plans["up_proj"], self.plans["down_proj"]):
            for name in TRANSFORM:
                field = plan.layout.fields()[name]
                tensor = torch.empty(field.shape, dtype=field.dtype, device=device)
                self.register_buffer(f"{plan.pool}_weight_{name}", tensor)
        self._matrices: dict[str, Tensor] = {}
        self._int4: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def packed(self) -> Iterator[tuple[str, PackedLinear]]:
        """Yield every weight of every expert as it is stored, with its path below this module."""
        for number in range(self.count):
            for part, plan in self.plans.items():
                yield f"{number}.{plan.name}", self.packed_part(number, part)

    def packed_part(self, number: int, part: str) -> PackedLinear:
        """Return one weight of one expert; part: "gate_proj", "up_proj" or "down_proj"."""
        plan = self.plans[part]
        own = getattr(getattr(self, str(number)), plan.name)
        shared = {name: getattr(self, f"{plan.pool}_weight_{name}") for name in TRANSFORM}
        tensors = {name: shared[name] if name in shared else getattr(own, name) for name in plan.layout.fields()}
        return PackedLinear(plan.layout, tensors)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any) -> Tensor:
        shape = hidden_states.shape
        hidden, index = hidden_states.flatten(0, -2), top_k_index.flatten(0, -2)
        weights = top_k_weights.flatten(0, -2)
        output = torch.zeros_like(hidden)
        turned = self._turned("up_proj", hidden)
        for number in torch.unique(index).tolist():
            if number >= self.count:  # stands for no expert
                continue
            token, place = torch.where(index == number)
            inner = self._inner(number, turned[token])
            y = self._product(number, "down_proj", self._turned("down_proj", inner))
            output.index_add_(0, token, (y * weights[token, place, None]).to(output.dtype))
        return output.view(shape)

    def _inner(self, number: int, turned: Tensor) -> Tensor:
        """Return what the last product of an expert reads, in the basis of the model."""
        source = self._between[0]
        up = self._product(number, "up_proj", turned)
        if not self.has_gate:
            return source.act_fn(up)
        gate = self._product(number, "gate_proj", turned)
        joined = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return source._apply_gate(joined)

    def _turned(self, part: str, x: Tensor) -> Tensor:
        """Return x · diag(1/a) · R in x's dtype, computed in float32."""
        pool = self.plans[part].pool
        if pool not in self._matrices or self._matrices[pool].device != x.device:
            transform = transform_of(self.packed_part(0, part))
            groups, g, _ = transform.matrix.shape
            self._matrices[pool] = transform.inverse_scales.view(groups, g, 1) * transform.matrix
        return rotate_dense(x.float(), self._matrices[pool]).to(x.dtype)

    def _product(self, number: int, part: str, turned: Tensor) -> Tensor:
        layout = self.plans[part].layout
        packed = self.packed_part(number, part)
        if has_int4(layout, turned.device, turned.dtype):
            if (number, part) not in self._int4:
                self._int4[number, part] = int4_weights(packed)
            y = int4_product(turned, *self._int4[number, part], layout.group_size)
        else:
            y = turned @ rotated_weight(packed).T.to(turned.dtype)
        return y if packed.bias is None else y + packed.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Follow `fn` to another device, never to another dtype: a bfloat16 scale would lose stored bits."""
        self._matrices, self._int4 = {}, {}
        stored = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in stored.items():
            owner, _, own = name.rpartition(".")
            module = self.get_submodule(owner)
            if getattr(module, own).dtype != before.dtype:
                module._buffers[own] = before.to(getattr(module, own).device)
        return self

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{p.name} {p.layout.in_features} → {p.layout.out_features}" for p in self.plans.values())
        return f"{self.count} experts: {shapes}; {self.plans['down_proj'].layout.spec}"
