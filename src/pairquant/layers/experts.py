"""The module that runs a block's packed experts inside a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.cpu_int4 import CpuInt4
from ..backends.experts import (
    ACTIVATIONS,
    experts_refusal,
    prepare_experts,
    stored_codes,
)
from ..backends.table import Explanation
from ..backends.triton_int4 import TritonInt4
from ..core.linear import rotated_weight, transform_of
from ..core.rotation import rotate_dense
from ..kernels.run.cpu import int4_product, int4_weights
from ..spec.experts import TRANSFORM, pool_of
from ..spec.linear import LinearLayout, PackedLinear
from .merging import offloaded, plain_tensors

#: What our kernels for GPUs hold in another form.
CODES = TritonInt4.replaces
#: `ACTIVATIONS` by PyTorch.
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
#: What multiplies experts where there is no int4 product.
DECODED = "decoded"


def has_int4(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether experts of this layout are multiplied from their codes, by PyTorch's int4 product for CPUs."""
    return CpuInt4().refusal(layout, device, dtype) is None


def explain_experts(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Return what multiplies experts of this layout; decoded ones are decoded at each use, which keeps them small."""
    refusals: dict[str, str] = {}
    for name, refusal in ((TritonInt4.name, experts_refusal), (CpuInt4.name, CpuInt4().refusal)):
        reason = refusal(layout, device, dtype)
        if reason is None:
            return Explanation(name, refusals)
        refusals[name] = reason
    return Explanation(DECODED, refusals)


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
    [T, H]. The input is rotated once for all experts, which are multiplied from their codes at 4 bits: by our kernels on NVIDIA
    GPUs in 16 bits, by PyTorch's int4 product on CPUs in bfloat16. Else the weight of an expert that has tokens is decoded
    each time. What our kernels need takes the place of the stored codes, which come back bit for bit when the module is saved
    or moved.

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
        self._prepared: _Prepared | None = None
        self._activation: str | None = None

    def packed(self) -> Iterator[tuple[str, PackedLinear]]:
        """Yield every weight of every expert as it is stored, with its path below this module."""
        for number in range(self.count):
            for part, plan in self.plans.items():
                yield f"{number}.{plan.name}", self.packed_part(number, part)

    def packed_part(self, number: int, part: str) -> PackedLinear:
        """Return one weight of one expert; part: "gate_proj", "up_proj" or "down_proj"."""
        plan = self.plans[part]
        own = getattr(getattr(self, str(number)), plan.name)
        given_up = self._prepared.codes(number, part) if self._prepared else {}
        shared = {name: getattr(self, f"{plan.pool}_weight_{name}") for name in TRANSFORM} | given_up
        tensors = {name: shared[name] if name in shared else getattr(own, name) for name in plan.layout.fields()}
        return PackedLinear(plan.layout, tensors)

    def check_values(self, path: str) -> None:
        """Check all tensors, which are stored below `path`; raises `CheckpointError` for the first fault."""
        seen: set[str] = set()
        for number in range(self.count):
            for part, plan in self.plans.items():
                name = f"{path}.{number}.{plan.name}"
                self.packed_part(number, part).check_values(name, transform=plan.pool not in seen)
                seen.add(plan.pool)

    def prepare(self, dtype: torch.dtype) -> bool:
        """Let the tensors of our kernels for GPUs take the place of the stored codes; return whether they do.

        dtype: that of the activations. The first forward pass does this if it was not done before.
        """
        device = self.get_buffer("down_weight_theta").device
        if self._prepared is None and not offloaded(self):
            layouts = [plan.layout for plan in self.plans.values()]
            if any(experts_refusal(layout, device, dtype) for layout in layouts):
                return False
            with plain_tensors():
                self._prepared = _Prepared.of(self, dtype)
            for number in range(self.count):
                for plan in self.plans.values():
                    own = getattr(getattr(self, str(number)), plan.name)
                    own._buffers.update(dict.fromkeys(CODES))
        return self._prepared is not None and self._prepared.dtype == dtype

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any) -> Tensor:
        shape = hidden_states.shape
        hidden, index = hidden_states.flatten(0, -2), top_k_index.flatten(0, -2)
        weights = top_k_weights.flatten(0, -2)
        if hidden.numel() and self.prepare(hidden.dtype):
            return self._by_kernels(hidden, index, weights).view(shape)
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

    def _by_kernels(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ready, kernel = self._prepared, torch.ops.pairquant
        assert ready is not None, "prepare was called"
        given = kernel.assign_experts(index, self.count)
        joined = kernel.experts_linear(hidden, index, given, *ready.up, "")
        activation = self._known_activation()
        if not activation:
            joined = self._between_products(joined)
        y = kernel.experts_linear(joined, index, given, *ready.down, activation)
        return kernel.combine_experts(y, index, weights, self.count)

    def _known_activation(self) -> str:
        """Return which of `ACTIVATIONS` the module that this one replaces computes from gate and up; "" if another."""
        if self._activation is None:
            self._activation = ""
            # Numbers so large that a module that cuts them off is told from one that does not.
            gate, up = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 3, 64)
            for name in ACTIVATIONS if self.has_gate else ():
                expected = EXACT[name](gate) * up
                found = self._between_products(torch.cat((gate, up), -1))
                if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                    self._activation = name
        return self._activation

    def _between_products(self, joined: Tensor) -> Tensor:
        """Return what down reads, of gate and up beside each other."""
        source = self._between[0]
        if not self.has_gate:
            return source.act_fn(joined)
        if not self.is_concatenated:
            joined = torch.stack(joined.chunk(2, -1), -1).flatten(-2)
        return source._apply_gate(joined)

    def _inner(self, number: int, turned: Tensor) -> Tensor:
        """Return what the last product of an expert reads, in the basis of the model."""
        up = self._product(number, "up_proj", turned)
        if self.has_gate:
            up = torch.cat((self._product(number, "gate_proj", turned), up), -1)
        return self._between_products(up)

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
        self._restore()
        stored = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in stored.items():
            owner, _, own = name.rpartition(".")
            module = self.get_submodule(owner)
            if getattr(module, own).dtype != before.dtype:
                module._buffers[own] = before.to(getattr(module, own).device)
        return self

    def _restore(self) -> None:
        """Take the stored codes back, and forget what was made of them."""
        self._matrices, self._int4 = {}, {}
        if self._prepared is None:
            return
        for (number, part), codes in self._given_up():
            getattr(getattr(self, str(number)), self.plans[part].name)._buffers.update(codes)
        self._prepared = None

    def _given_up(self) -> Iterator[tuple[tuple[int, str], dict[str, Tensor]]]:
        """Yield number and part, and the codes that our kernels' tensors have taken the place of."""
        if self._prepared is not None:
            for number in range(self.count):
                for part in self.plans:
                    yield (number, part), self._prepared.codes(number, part)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for (number, part), codes in self._given_up():
            for name, tensor in codes.items():
                destination[f"{prefix}{number}.{self.plans[part].name}.{name}"] = tensor

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{p.name} {p.layout.in_features} → {p.layout.out_features}" for p in self.plans.values())
        return f"{self.count} experts: {shapes}; {self.plans['down_proj'].layout.spec}"


@dataclass(frozen=True)
class _Prepared:
    """What our kernels need to run the experts in a dtype: the arguments of `experts_linear` that are always the same.

    up: of the parts that read the block's input, in the order of `parts`; down: of "down_proj".
    """

    dtype: torch.dtype
    parts: tuple[str, ...]
    up: tuple[list[Tensor], list[int], int]
    down: tuple[list[Tensor], list[int], int]
    layouts: Mapping[str, LinearLayout]

    @classmethod
    def of(cls, module: RotatedExperts, dtype: torch.dtype) -> _Prepared:
        parts = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
        layouts = {part: plan.layout for part, plan in module.plans.items()}

        def made(parts: tuple[str, ...]) -> tuple[list[Tensor], list[int], int]:
            experts = [[module.packed_part(number, part) for part in parts] for number in range(module.count)]
            sizes = [layouts[part].out_features for part in parts]
            return prepare_experts(experts, dtype), sizes, layouts[parts[0]].group_size

        return cls(dtype, parts, made(parts), made(("down_proj",)), layouts)

    def codes(self, number: int, part: str) -> dict[str, Tensor]:
        """Return the stored codes, scales and zero points of one weight."""
        tensors, sizes, _ = self.down if part == "down_proj" else self.up
        index = 0 if part == "down_proj" else self.parts.index(part)
        return stored_codes(tensors, sizes, number, index, self.layouts[part])
