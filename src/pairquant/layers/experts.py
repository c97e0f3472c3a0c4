"""The module that runs a block's packed experts inside a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.cpu_int4 import CpuInt4
from ..backends.experts import ACTIVATIONS, Experts, experts_refusal
from ..backends.table import Explanation
from ..backends.triton_kernels import TritonKernels
from ..core.activations import rounded
from ..core.linear import rotated_weight, transform_of
from ..core.rotation import rotate_dense
from ..kernels.run.cpu import int4_product, int4_weights
from ..spec.experts import TRANSFORM, pool_of
from ..spec.linear import LinearLayout, PackedLinear
from .expert_form import ExpertForm
from .merging import offloaded, plain_tensors

#: What our kernels for GPUs hold in another form.
CODES = TritonKernels.replaces
#: `ACTIVATIONS` by PyTorch.
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
#: What multiplies experts where there is no int4 product.
DECODED = "decoded"
#: Why our kernels for GPUs do not run experts with transforms of their own: they rotate the input once for all.
OWN_TRANSFORMS = "rotates once for all experts, and each of these has a transform of its own"


def has_int4(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether experts of this layout are multiplied from their codes, by PyTorch's int4 product for CPUs."""
    return CpuInt4().refusal(layout, device, dtype) is None


def explain_experts(
    layout: LinearLayout, device: torch.device, dtype: torch.dtype, per_expert: bool = False
) -> Explanation:
    """Return what multiplies experts of this layout; decoded ones are decoded at each use, which keeps them small.

    per_expert: whether each expert has a transform of its own.
    """
    refusals: dict[str, str] = {}
    for name, refusal in ((TritonKernels.name, experts_refusal), (CpuInt4.name, CpuInt4().refusal)):
        reason = refusal(layout, device, dtype)
        if per_expert and name == TritonKernels.name:
            reason = reason or OWN_TRANSFORMS
        if reason is None:
            return Explanation(name, refusals, layout.activations)
        refusals[name] = reason
    return Explanation(DECODED, refusals, layout.activations)


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
    forward: as of the module that it replaces, mostly hidden states [T, H] and each token's experts and their weights [T, k] →
    [T, H] (`ExpertForm`). The input is rotated once for all experts, which are multiplied from their codes: by our kernels on NVIDIA GPUs in
    16 bits, by PyTorch's int4 product on CPUs in bfloat16 at 4 bits. Else the weight of an expert that has tokens is decoded
    each time. What our kernels need takes the place of the stored codes, which come back bit for bit when the module is saved
    or moved.

    source: the module that is replaced, which says how gate and up are joined and what lies between the products; plans:
    of "gate_proj" (if there is a gate), "up_proj" and "down_proj"; per_expert: each expert has transforms of its own, with names
    such as `3.gate_up_weight_theta`. No kernel of ours for GPUs runs those.
    """

    def __init__(
        self,
        source: Any,
        plans: Mapping[str, PartPlan],
        count: int,
        device: torch.device | str | None = None,
        per_expert: bool = False,
    ):
        super().__init__()
        self.plans, self.count, self.per_expert = dict(plans), count, per_expert
        form = ExpertForm.of(source)
        assert form is not None, "the plans are of experts in a known form"
        self.form, self.has_gate = form, form.has_gate
        source._parameters.clear()
        self._between = [source]  # in a list, so that it is no submodule: it has no tensors any more
        for number in range(count):
            parts = {plan.name: PackedPart(plan.layout, device) for plan in self.plans.values()}
            self.add_module(str(number), nn.ModuleDict(parts))
        for home in [getattr(self, str(number)) for number in range(count)] if per_expert else [self]:
            for plan in (self.plans["up_proj"], self.plans["down_proj"]):
                for name in TRANSFORM:
                    field = plan.layout.fields()[name]
                    tensor = torch.empty(field.shape, dtype=field.dtype, device=device)
                    home.register_buffer(f"{plan.pool}_weight_{name}", tensor)
        self._matrices: dict[str, Tensor] = {}
        self._int4: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._prepared: Experts | None = None
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
        given_up = self._codes(number, part)
        home = getattr(self, str(number)) if self.per_expert else self
        shared = {name: getattr(home, f"{plan.pool}_weight_{name}") for name in TRANSFORM} | given_up
        tensors = {name: shared[name] if name in shared else getattr(own, name) for name in plan.layout.fields()}
        return PackedLinear(plan.layout, tensors)

    def _codes(self, number: int, part: str) -> dict[str, Tensor]:
        """Return the stored codes, scales and zero points that our kernels' tensors have taken the place of; else nothing."""
        if self._prepared is None:
            return {}
        weights = self._prepared.down if part == "down_proj" else self._prepared.up
        index = 1 if part == "up_proj" and self.has_gate else 0
        return weights.stored(number, index, self.plans[part].layout)

    def check_values(self, path: str) -> None:
        """Check all tensors, which are stored below `path`; raises `CheckpointError` for the first fault."""
        seen: set[str] = set()
        for number in range(self.count):
            for part, plan in self.plans.items():
                name = f"{path}.{number}.{plan.name}"
                transform = pool_of(name, self.per_expert)
                self.packed_part(number, part).check_values(name, transform=transform not in seen)
                seen.add(transform)

    def prepare(self, dtype: torch.dtype) -> bool:
        """Let the tensors of our kernels for GPUs take the place of the stored codes; return whether they can run.

        dtype: that of the activations. The first forward pass does this if it was not done before. Warns on a GPU if
        experts are decoded at each use.
        """
        device = next(self.buffers()).device
        reasons = (experts_refusal(plan.layout, device, dtype) for plan in self.plans.values())
        if self.per_expert:
            reasons = (reason for reason in (OWN_TRANSFORMS,))
        if reason := next(filter(None, reasons), None):
            if device.type == "cuda":
                warnings.warn(
                    f"experts are decoded at each use, which is slow: {TritonKernels.name} {reason}", stacklevel=2
                )
            return False
        if self._prepared is None:
            if offloaded(self):
                return False
            outer = ("gate_proj", "up_proj") if self.has_gate else ("up_proj",)
            with plain_tensors():
                self._prepared = Experts.build(self._each(outer), self._each(("down_proj",)))
            for owner in self._owners():
                owner._buffers.update(dict.fromkeys(name for name in CODES if name in owner._buffers))
            self._known_activation()
        return True

    def _each(self, parts: Sequence[str]) -> list[list[PackedLinear]]:
        """Return these parts of every expert."""
        return [[self.packed_part(number, part) for part in parts] for number in range(self.count)]

    def _owners(self) -> Iterator[nn.Module]:
        """Yield the module of every part of every expert."""
        for number in range(self.count):
            for plan in self.plans.values():
                yield getattr(getattr(self, str(number)), plan.name)

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        flat = hidden_states.flatten(0, -2)
        hidden, index, weights, rows = self.form.routed(self.count, hidden_states, *routing, **named)
        output = self._routed(hidden, index, weights)
        if self.form.returns_input:
            output = output + hidden * (weights * (index >= self.count)).sum(-1, keepdim=True).to(hidden.dtype)
        if rows is not None:
            output = torch.zeros_like(flat).index_copy(0, rows, output)
        return output.view(hidden_states.shape)

    def _routed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts: states [T, H], experts and their weights [T, k] → [T, H]."""
        trains = torch.is_grad_enabled() and hidden.requires_grad  # our kernels for experts pass no gradients
        if hidden.numel() and not trains and self.prepare(hidden.dtype):
            assert self._prepared is not None, "prepare was called"
            activation = self._known_activation()
            between = None if activation else self._between_products
            return self._prepared.run(hidden, index, weights, activation, between)
        output = torch.zeros_like(hidden)
        turned = None if self.per_expert else self._turned(0, "up_proj", hidden)
        for number in torch.unique(index).tolist():
            if number >= self.count:  # stands for no expert
                continue
            token, place = torch.where(index == number)
            mine = self._turned(number, "up_proj", hidden[token]) if turned is None else turned[token]
            inner = self._inner(number, mine)
            y = self._product(number, "down_proj", self._turned(number, "down_proj", inner))
            output.index_add_(0, token, (y * weights[token, place, None]).to(output.dtype))
        return output

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
        if self.has_gate and not self.form.is_concatenated:
            joined = torch.stack(joined.chunk(2, -1), -1).flatten(-2)
        return self.form.between(source, joined)

    def _inner(self, number: int, turned: Tensor) -> Tensor:
        """Return what the last product of an expert reads, in the basis of the model."""
        up = self._product(number, "up_proj", turned)
        if self.has_gate:
            up = torch.cat((self._product(number, "gate_proj", turned), up), -1)
        return self._between_products(up)

    def _turned(self, number: int, part: str, x: Tensor) -> Tensor:
        """Return x · diag(1/a) · R in x's dtype, computed in float32, with the transform of one expert's part.

        Where the layer has a format for its activations, they are rounded to it.
        """
        layout, pool = self.plans[part].layout, self.plans[part].pool
        if self.per_expert:  # those of all experts would take gigabytes
            matrix = self._matrix(number, part)
        else:
            if pool not in self._matrices or self._matrices[pool].device != x.device:
                self._matrices[pool] = self._matrix(number, part)
            matrix = self._matrices[pool]
        x_rot = rotate_dense(x.float(), matrix)
        if layout.activations is not None:
            x_rot = rounded(x_rot, layout.activations, layout.group_size)
        return x_rot.to(x.dtype)

    def _matrix(self, number: int, part: str) -> Tensor:
        """Return diag(1/a) · R of one expert's part, float32 [G, g, g]."""
        transform = transform_of(self.packed_part(number, part))
        groups, g, _ = transform.matrix.shape
        return transform.inverse_scales.view(groups, g, 1) * transform.matrix

    def _product(self, number: int, part: str, turned: Tensor) -> Tensor:
        layout = self.plans[part].layout
        packed = self.packed_part(number, part)
        if has_int4(layout, turned.device, turned.dtype) and not turned.requires_grad:
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
        for number in range(self.count):
            for part, plan in self.plans.items():
                getattr(getattr(self, str(number)), plan.name)._buffers.update(self._codes(number, part))
        self._prepared = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for number in range(self.count):
            for part, plan in self.plans.items():
                codes = self._codes(number, part)
                destination.update({f"{prefix}{number}.{plan.name}.{name}": codes[name] for name in codes})

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{p.name} {p.layout.in_features} → {p.layout.out_features}" for p in self.plans.values())
        return f"{self.count} experts: {shapes}; {self.plans['down_proj'].layout.spec}"
