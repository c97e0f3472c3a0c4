"""Runs a model with Transformers' `generate`."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from ..backends.table import check_settings
from ..checkpoint.read import ModelFiles
from ..evaluation.speed import Generation
from ..support.devices import current, resolve_device
from .engine import EngineOptions, Turn, chat_tokens, context_of, overflow


class TransformersEngine:
    """Runs every model that Transformers loads, on any device."""

    name = "transformers"
    version = transformers.__version__

    def __init__(self, files: ModelFiles, options: EngineOptions):
        """Load the model; raises the errors of `ModelFiles`, `resolve_device` and `check_settings`."""
        self.device = self.place(options.device)
        check_settings(self.device)
        self.tokenizer = files.tokenizer()
        dtype = options.dtype_on(self.device)
        self.model = files.model(dtype if dtype == "auto" else getattr(torch, dtype), self.device)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.vocabulary = files.config.get_text_config().vocab_size
        self.context = context_of(files.config)
        self._generation = _generation_options(self.model, bool(options.compile))

    @staticmethod
    def place(device: str) -> torch.device:
        """Return the device of that name; "auto" is a GPU where there is one. Raises `ConfigError`."""
        return resolve_device(device)

    @property
    def compiled(self) -> bool:
        """Tell whether anything runs compiled.

        Transformers decides it by model, quantizer and device, on the first generation.
        """
        return hasattr(self.model, "_compiled_call")

    def stream(self, conversation: Sequence[Turn], max_new_tokens: int) -> Generator[str, None, None]:
        """Yield the greedy answer in pieces; a thread generates it, and ends when the iterator is closed.

        Raises what `chat_tokens` raises, and `ConfigError` where logits are not finite.
        """
        tokens = torch.tensor([chat_tokens(self.tokenizer, conversation)], device=self.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(
                self._generate,
                tokens,
                streamer,
                max_new_tokens=max_new_tokens,
                stopping_criteria=[_Until(closed)],
                logits_processor=finite_logits(self.model.dtype),
            )
            answer.add_done_callback(lambda _: streamer.end())  # also after an error, which would leave us waiting
            try:
                yield from filter(None, streamer)
            finally:
                closed.set()
            answer.result()

    def generate(self, prompts: Tensor, new_tokens: int) -> Generation:
        """Generate exactly new_tokens for each prompt of int64 [B, T], greedily."""
        clock = _Clock()
        start = time.perf_counter()
        tokens = self._generate(
            prompts.to(self.device), clock, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **self._generation
        )
        _, first, *later = clock.times  # the prompt is put first
        return Generation(
            tokens[:, prompts.shape[1] :].cpu(), first - start, len(later) * len(prompts), later[-1] - first
        )

    def _generate(self, tokens: Tensor, streamer: BaseStreamer, **options: Any) -> Tensor:
        with current(self.device):
            return self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, streamer=streamer, **options
            )


def _generation_options(model: Any, compiled: bool) -> dict[str, Any]:
    """Ask for a static cache where the architecture allows one, compiled or not, on every device."""
    options: dict[str, Any] = {"cache_implementation": "static"} if model._can_compile_fullgraph else {}
    if not compiled:
        return options | {"disable_compile": True}
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]  # by itself Transformers compiles on accelerators only
    return options | {"compile_config": config}


def finite_logits(dtype: torch.dtype) -> LogitsProcessorList:
    """Return what `generate` takes as `logits_processor` to raise `ConfigError` on logits that are NaN or infinite."""
    return LogitsProcessorList([_Finite(str(dtype).removeprefix("torch."))])


class _Finite:
    """Raises `ConfigError` where the largest logit of a row is not finite: its token would mean nothing.

    Other processors set logits of tokens that they forbid to minus infinity, which the largest one shows to be harmless.
    """

    def __init__(self, dtype: str):
        self.dtype = dtype

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """tokens: int64 [B, T]; scores: float [B, vocabulary], returned as they are."""
        if not scores.amax(-1).isfinite().all():
            raise overflow(self.dtype)
        return scores


class _Clock(BaseStreamer):
    """Notes when each step's tokens arrive on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Until:
    """Stops the generation as soon as the event is set; a stopping criterion of Transformers."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, tokens: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(tokens),), self.event.is_set(), device=tokens.device)
