"""Calibration text that the original model samples itself: chats by its own template, thinking included, or plain text.

What a model says is what it will be asked to say again. Nobody asks it anything: it writes the user's question first, as it
goes on from the beginning of a chat, and then answers it, as in Magpie (arXiv 2406.08464). Both are drawn from its own
distribution, at temperature 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import write_tensors
from ..checkpoint.headers import StoredTensors
from ..checkpoint.read import ModelFiles
from ..evaluation.generation import SAMPLED, Continuation, generate
from ..models.limits import stated_context
from ..optimize.ranks import ALONE, Ranks
from ..support.devices import free_bytes
from ..support.errors import CheckpointError, ResourceError, TextError
from ..support.formatting import counted, size
from ..support.version import code_digest
from ..support.windows import own_prefix
from .progress import Told

#: Chats that are sampled at once; the most tokens of a question, and the most as a share of a window.
TOGETHER, QUESTION, QUESTION_SHARE = 16, 256, 0.25
#: Stands for the user's words, to find where they begin in a chat template.
MARK = "the-user-s-words-go-here"
#: Rounds of chats without a single question before it is given up.
PATIENCE = 4
#: What a model in 16 bits takes while it samples, for each of its parameters.
PARAMETER_BYTES = 2.6


@dataclass(frozen=True)
class OwnText:
    """Samples windows of text from a model, once: they are kept for the next run with the same options.

    parameters: how many the model has; prefix: what each window begins with; seed, purpose: decide all draws: with the same
    ones the same device gives the same text, and with another purpose quite other text.
    """

    files: ModelFiles
    parameters: int
    tokenizer: Any
    seq_len: int
    seed: int
    purpose: str
    prefix: Sequence[int]
    device: torch.device
    progress: Told
    ranks: Ranks = ALONE

    def windows(self, count: int) -> Tensor:
        """Return so many windows, int64 [count, seq_len].

        Raises `ResourceError` if the model does not fit the device as a whole, and `TextError` if it writes no questions.
        """
        if count == 0:
            return torch.empty(0, self.seq_len, dtype=torch.int64)
        file = self._file(count)
        if self.ranks.leads and _kept(file) is None:
            self._sample(count, file)
        self.ranks.wait()
        found = _kept(file)
        assert found is not None, "the first process wrote it"
        return found

    def _file(self, count: int) -> Path:
        """Return where windows like these are kept."""
        state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files.weight_files()]
        identity = [
            state, count, self.seq_len, self.seed, self.purpose, list(self.prefix), self.device.type, self.tokenizer.chat_template, code_digest(),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return Path.home() / ".cache" / "pairquant" / "text" / f"{digest[:32]}.safetensors"

    def _sample(self, count: int, file: Path) -> None:
        taken, free = PARAMETER_BYTES * self.parameters, free_bytes(self.device)
        if taken > free:
            raise ResourceError(
                f"calibration text 'self' is sampled by the whole model, which takes about {size(taken)}; "
                f"{size(free)} are free on {self.device}. Choose another --device, or name other text by --calibration."
            )
        wanted = count * (self.seq_len - len(self.prefix))
        if self.device.type == "cpu":
            self.progress.notice(
                f"self: the model samples {wanted:,} tokens, which takes long on a CPU; fewer by --samples or --seq-len"
            )
        self.progress.stage("loading the model, to sample text")
        dtype = torch.bfloat16 if self.device.type == "cpu" else "auto"
        model = self.files.model(dtype, self.device)
        tokens: list[int] = []
        chats = ended = 0
        for prompt, answer in self._documents(model):
            tokens += [*prompt, *answer.tokens]
            chats, ended = chats + 1, ended + answer.finished
            self.progress.stage(f"sampling text, {min(1.0, len(tokens) / wanted):.0%}")
            if len(tokens) >= wanted:
                break
        del model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or the blocks that come would not count it as free
        flat = torch.tensor(tokens[:wanted]).view(count, -1)
        begun = torch.tensor([list(self.prefix)], dtype=torch.int64).expand(count, -1)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"tokens": torch.cat([begun, flat], dim=1)})
        kind = "chat" if self.tokenizer.chat_template else "text"
        self.progress.notice(
            f"self: the model sampled {counted(chats, kind)} of {len(tokens) // chats:,} tokens on average, {ended} of them to "
            f"their end; kept in {file}"
        )

    def _documents(self, model: Any) -> Iterator[tuple[list[int], Continuation]]:
        """Yield prompts with what the model says to them, without end."""
        longest = min(self.seq_len, stated_context(model) or self.seq_len)
        beginning = _beginning(self.tokenizer)
        room = min(QUESTION, int(QUESTION_SHARE * longest))
        failures = number = 0
        while True:
            prompts = [beginning] * TOGETHER
            if self.tokenizer.chat_template:
                asked = generate(model, prompts, room, SAMPLED, batch=TOGETHER, seed=self._seed("ask", number))
                prompts = self._questions(asked, longest)
                failures = 0 if prompts else failures + 1
                if failures == PATIENCE:
                    raise TextError(
                        "calibration text 'self': the model writes no questions in its chat template. Name other text by "
                        "--calibration."
                    )
            if prompts:
                left = longest - max(map(len, prompts))
                answers = generate(model, prompts, left, SAMPLED, batch=TOGETHER, seed=self._seed("answer", number))
                yield from zip(map(self._bare, prompts), answers, strict=True)
            number += 1

    def _seed(self, part: str, number: int) -> int:
        """Return the seed of a part of a round, which no other seed, purpose, part or round has."""
        digest = hashlib.sha256(f"{self.seed} {self.purpose} {part} {number}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _questions(self, asked: Sequence[Continuation], longest: int) -> list[list[int]]:
        """Return the beginnings of chats with these questions, up to where the answer begins."""
        found = []
        for question in asked:
            text = self.tokenizer.decode(question.tokens, skip_special_tokens=True).strip()
            if text:
                turns = [{"role": "user", "content": text}]
                written = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                prompt = self.tokenizer(written, add_special_tokens=False)["input_ids"]
                found += [prompt] if len(prompt) < longest else []
        return found

    def _bare(self, prompt: list[int]) -> list[int]:
        """Return a prompt without the tokens that every window begins with."""
        prefix = list(own_prefix(self.tokenizer))
        return prompt[len(prefix) :] if prefix and prompt[: len(prefix)] == prefix else prompt


def _beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that a question follows, or without a chat template those that a text follows.

    Raises `TextError` for a template that does not take a user's words as they are, and a tokenizer that begins with nothing.
    """
    if tokenizer.chat_template:
        written = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        before, found, _ = written.partition(MARK)
        if not found:
            raise TextError(
                "calibration text 'self': the chat template changes the user's words. Name other text by --calibration."
            )
        return tokenizer(before, add_special_tokens=False)["input_ids"]
    tokens = (
        list(own_prefix(tokenizer))
        or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    )
    if not tokens:
        raise TextError(
            "calibration text 'self': the tokenizer has no token that a text begins with. Name other text by --calibration."
        )
    return tokens


def _kept(file: Path) -> Tensor | None:
    """Return what was kept; None if nothing was, or it cannot be read."""
    try:
        return StoredTensors.of_files([file]).load("tokens").clone() if file.is_file() else None
    except CheckpointError:
        return None
