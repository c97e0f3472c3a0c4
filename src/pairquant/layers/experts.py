"""The module that runs a block's packed experts inside a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.experts import choose_experts, explain_experts
from ..backends.experts_base import ACTIVATIONS, Experts
from ..core.activations import rounded
from ..core.linear import Transform, rotated_weight
from ..core.rotation import rotate_dense
from ..spec.experts import TRANSFORM, pool_of
from ..spec.linear import LinearLayout, PackedLinear
from .expert_form import ExpertForm
from .merging import offloaded, plain_tensors


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
    [T, H] (`ExpertForm`). Experts are multiplied from their codes by the first in `backends.experts` that accepts them. What it
    needs takes the place of the stored codes, which come back bit for bit when the module is saved or moved. Where none accepts
    them, and where x needs a gradient, the weight of an expert that has tokens is decoded each time.

    source: the module that is replaced, which says how gate and up are joined and what lies between the products; plans:
    of "gate_proj" (if there is a gate), "up_proj" and "down_proj"; per_expert: each expert has transforms of its own, with names
    such as `3.gate_up_weight_theta`.
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
        shared = self._transform(number, part) | self._codes(number, part)
        tensors = {name: shared[name] if name in shared else getattr(own, name) for name in plan.layout.fields()}
        return PackedLinear(plan.layout, tensors)

    def _transform(self, number: int, part: str) -> dict[str, Tensor]:
        """Return what is stored of the transform of one weight, by the names in `TRANSFORM`."""
        home, pool = getattr(self, str(number)) if self.per_expert else self, self.plans[part].pool
        return {name: getattr(home, f"{pool}_weight_{name}") for name in TRANSFORM}

    def _codes(self, number: int, part: str) -> dict[str, Tensor]:
        """Return the stored tensors of one weight that others have taken the place of; else nothing."""
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
        """Let what runs the experts take the place of their stored codes; return whether there is something that does.

        dtype: that of the activations. The first forward pass does this if it was not done before. Warns on a GPU if
        experts are decoded at each use.
        """
        device, layouts = next(self.buffers()).device, {plan.layout for plan in self.plans.values()}
        chosen = choose_experts(layouts, device, dtype, self.per_expert)
        if chosen is None:
            if device.type == "cuda":
                self._warn_of_decoding(layouts, dtype)
            return False
        if self._prepared is None:
            if offloaded(self):
                return False
            outer = ("gate_proj", "up_proj") if self.has_gate else ("up_proj",)
            with plain_tensors():
                self._prepared = chosen.build(self._each(outer), self._each(("down_proj",)))
            for owner in self._owners():
                owner._buffers.update(dict.fromkeys(name for name in chosen.replaces if name in owner._buffers))
            self._known_activation()
        return True

    def _warn_of_decoding(self, layouts: Collection[LinearLayout], dtype: torch.dtype) -> None:
        device = next(self.buffers()).device
        refusals = explain_experts(layouts, device, dtype, self.per_expert).refusals
        reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
        warnings.warn(f"experts are decoded at each use, which is slow: {reasons}", stacklevel=3)

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
                expected = ACTIVATIONS[name](gate) * up
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
        theta, pairs, scales = (self._transform(number, part)[name] for name in TRANSFORM)
        transform = Transform.build(theta, pairs, scales, self.plans[part].layout.group_size)
        groups, g, _ = transform.matrix.shape
        return transform.inverse_scales.view(groups, g, 1) * transform.matrix

    def _product(self, number: int, part: str, turned: Tensor) -> Tensor:
        packed = self.packed_part(number, part)
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
        self._matrices = {}
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
