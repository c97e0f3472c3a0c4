"""How a module of Transformers holds the experts of a block, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertForm:
    """The parameters are `down_proj` and `gate_up_proj` or `up_proj`, [E, …] each.

    has_gate: there is `gate_up_proj`, of two parts; is_concatenated: gate before up, instead of their rows in turn;
    is_transposed: each expert's weight is [C, N]; one_after_another: the module is called with the tokens of one expert after
    another, [E · T, H], zeros where a token is not for the expert, instead of with each token's experts and their weights;
    returns_input: numbers beyond the last expert stand for experts that return what they are given.
    """

    has_gate: bool = True
    is_concatenated: bool = True
    is_transposed: bool = False
    one_after_another: bool = False
    returns_input: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ExpertForm | None:
        """Return the form of a module that holds experts, or None: by Transformers' interface for experts, or by `OWN_FORMS`."""
        own = module._parameters
        if own.get("down_proj") is None or ("gate_up_proj" not in own and "up_proj" not in own):
            return None
        if hasattr(module, "_apply_gate"):
            stated = ("has_gate", "is_concatenated", "is_transposed")
            return cls(**{name: bool(getattr(module, name)) for name in stated})
        return OWN_FORMS.get(type(module).__name__)

    def between(self, module: nn.Module, joined: Tensor) -> Tensor:
        """Return what the last product of an expert reads, [T, I], from the output of the first, [T, N], as that holds it."""
        if not self.has_gate:
            return module.act_fn(joined)  # type: ignore[operator]
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(joined)  # type: ignore[operator]
        gate, up = joined.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[operator]

    def routed(
        self,
        count: int,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *_: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what experts are given: states [T, H], each one's experts and their weights [T, k], and where they come from.

        count: how many experts there are; the others are what the module is called with. The last of what is returned are the
        rows of `hidden_states`, int64 [T], where rows of zeros are left out because their answer is zero, else None.
        """
        flat = hidden_states.flatten(0, -2)
        if not self.one_after_another:
            assert top_k_index is not None, "such a module is called with each token's experts"
            assert top_k_weights is not None, "and with their weights"
            return flat, top_k_index.flatten(0, -2), top_k_weights.flatten(0, -2), None
        rows = flat.any(-1).nonzero().flatten()
        expert = torch.div(rows, len(flat) // count, rounding_mode="floor")[:, None]
        return flat[rows], expert, torch.ones_like(expert, dtype=flat.dtype), rows


#: Classes outside Transformers' interface for experts, by name: what they compute cannot be seen in their parameters.
OWN_FORMS = {
    "LongcatFlashExperts": ExpertForm(returns_input=True),
    "Llama4TextExperts": ExpertForm(is_transposed=True, one_after_another=True),
}
