"""How far a model that runs in bfloat16 may be from float32: a stated multiple of how far the same weights are as dense
layers of bfloat16. So the measure is taken on the machine at hand, whatever its instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

#: Relative distance of two runs of the same weights: products sum in another order where memory lies otherwise, or a
#: compiler has rewritten them.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: Packed layers round their rotated input and their scales, too; engines fuse and sum in other orders.
FACTOR = 2.0
#: Tokens of each place that are compared: errors of those that nobody would choose matter to nobody.
LIKELY = 5


@dataclass(frozen=True)
class Agreement:
    """Judges answers of the checkpoint in `directory`."""

    directory: Path

    @cached_property
    def exact(self):
        return self._dense(torch.float32)

    @cached_property
    def rounded(self):
        return self._dense(torch.bfloat16)

    def _dense(self, dtype: torch.dtype):
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=dtype).dequantize()

    def noise(self, tokens: list[int], start: int) -> Tensor:
        """Of dense layers in bfloat16: the errors [T - start, LIKELY] of the likely tokens' log-probabilities."""
        exact, rounded = (log_probabilities(model, tokens)[start:] for model in (self.exact, self.rounded))
        likely = exact.topk(LIKELY).indices
        return (rounded - exact).gather(1, likely)

    def gaps(self, prompt: list[int], answer: list[int]) -> Tensor:
        """How far each token of a greedy answer lies below the likeliest one of its place in float32: [len(answer)]."""
        places = log_probabilities(self.exact, prompt + answer)[len(prompt) - 1 : -1]
        chosen = places.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return places.max(1).values - chosen

    def check_greedy(self, prompts: list[list[int]], answers: list[list[int]], same: float = 0.95) -> None:
        """Every token of every answer is the likeliest up to noise, and of this share of them, the likeliest."""
        gaps = torch.cat([self.gaps(p, a) for p, a in zip(prompts, answers, strict=True)])
        noise = torch.cat([self.noise((p + a)[:-1], len(p) - 1) for p, a in zip(prompts, answers, strict=True)])
        assert gaps.max() <= FACTOR * noise.abs().max(), "a token was chosen that is not the likeliest up to rounding"
        assert (gaps == 0).float().mean() >= same, "ties are rare: so many differences have another cause"


@torch.no_grad()
def log_probabilities(model, tokens: list[int]) -> Tensor:
    """Of the token that follows each place: float32 [T, V]."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, over all numbers: in bfloat16 a single one, near zero, may be wrong by as much as it is large."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
