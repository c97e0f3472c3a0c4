"""Prefill and decoding speed, and peak memory. Takes an engine, never a path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from ..support.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """Greedy continuations and when they came.

    tokens: int64 [B, new tokens]; first_token_s: from the call until every sequence has its first token; decoded: tokens
    that came after that moment, over all sequences; decode_s: from that moment to the last token.
    """

    tokens: Tensor
    first_token_s: float
    decoded: int
    decode_s: float


class Generates(Protocol):
    """What is measured. vocabulary: token ids are below it; context: longest sequence in tokens, None when unlimited."""

    vocabulary: int
    context: int | None

    def generate(self, prompts: Tensor, new_tokens: int) -> Generation:
        """Return exactly new_tokens for each prompt of int64 [B, T], end-of-text or not."""
        ...


@dataclass(frozen=True)
class Workload:
    """What every engine is given. batches: numbers of sequences at once, each measured `repeats` times after a warm-up."""

    batches: tuple[int, ...] = (1,)
    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError`."""
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batches are {list(self.batches)}, allowed: numbers of sequences from 1 on")
        least = {"prompt_tokens": 1, "new_tokens": 2, "repeats": 1}  # the first token belongs to prefill
        for name, lowest in least.items():
            if (value := getattr(self, name)) < lowest:
                raise ConfigError(f"{name} is {value}, allowed: {lowest} or more")

    @property
    def sequence_tokens(self) -> int:
        """Length of each sequence at its end."""
        return self.prompt_tokens + self.new_tokens

    def check_context(self, context: int | None) -> None:
        """Raise `ConfigError` when sequences are longer than a model's longest."""
        if context is not None and self.sequence_tokens > context:
            raise ConfigError(
                f"prompt_tokens + new_tokens is {self.sequence_tokens}, allowed: {context}, the model's context. "
                "Lower --prompt-tokens or --new-tokens."
            )

    def prompts(self, batch: int, vocabulary: int) -> Tensor:
        """Return random tokens, int64 [batch, prompt_tokens]; the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocabulary, (batch, self.prompt_tokens), generator=generator)


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats; tokens per second count all sequences of the batch."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float


def measure(engine: Generates, workload: Workload, batch: int) -> Speed:
    """Return speed at one batch size; raises `ConfigError` when the sequences are longer than the model's context."""
    workload.check_context(engine.context)
    prompts = workload.prompts(batch, engine.vocabulary)
    engine.generate(prompts, workload.new_tokens)  # compiles, captures, repacks
    return summarize([engine.generate(prompts, workload.new_tokens) for _ in range(workload.repeats)], prompts.numel())


def summarize(runs: Sequence[Generation], prompt_tokens: int) -> Speed:
    """Return medians of repeated runs over the same prompts, prompt_tokens in all."""
    return Speed(
        batch=len(runs[0].tokens),
        prefill_tokens_per_s=median(prompt_tokens / run.first_token_s for run in runs),
        decode_tokens_per_s=median(run.decoded / run.decode_s for run in runs),
        first_token_s=median(run.first_token_s for run in runs),
    )


class PeakMemory:
    """The most memory that this process took since it was made, in bytes, above what it held then.

    On a GPU: what PyTorch had allocated there. On a CPU: the resident set, mapped files included; known on Linux only.
    A process has one peak: measure one model in each.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """None where it cannot be known."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def _resident(field: str) -> int | None:
    """Return this process's memory in bytes as Linux tells it: "VmRSS" is now, "VmHWM" the peak."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kibibytes = (int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    return next((1024 * count for count in kibibytes), None)
