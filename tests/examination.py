"""Mutated checkpoints in the hands of both readers, `pairquant.inspect` and `AutoModelForCausalLM.from_pretrained`.

Each reader must give what the undamaged checkpoint gives ("same"), or finite logits where the values themselves were changed
("finite"), or refuse with an error of ours ("refused"); where Transformers is at fault before it asks us, an ordinary exception
will do ("foreign"). In bounded time and memory, without opening a pickle or running code that lies beside the weights.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from mutations import PACKED_PATHS, PICKLES, UNDAMAGED, WEIGHTS, Mutation, undamaged
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import pairquant
from pairquant.support.errors import PairQuantError

TOKENS = torch.tensor([[5, 9, 44, 17, 3]])
#: Where the code of the two packages lies.
OURS, THEIRS = (Path(package.__file__).parent for package in (pairquant, transformers))
#: Seconds after which a reader is taken to hang.
PATIENCE = 30
#: `Mutation.inspect` or `.transformers` → outcomes that are as they must be.
ALLOWED = {
    "same": {"same"},
    "refused": {"refused"},
    "loads": {"same", "finite"},
    "either": {"refused", "same", "finite"},
}


@dataclass(frozen=True)
class Outcome:
    """ "same", "finite", "refused" or "foreign", of each reader; error: what was said, by the last that said something."""

    inspect: str
    transformers: str
    error: str = ""


class ForeignError(Exception):
    """Transformers failed in its own way."""


@dataclass
class Bench:
    """Where mutated checkpoints are written, one after the other, and read."""

    root: Path
    opened: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        os.environ["CANARY"] = str(self.root / "canary")
        sys.addaudithook(self._watch)
        (self.root / "outside.safetensors").write_bytes(undamaged(False).files[WEIGHTS])
        for sharded in (False, True):
            nothing = Mutation("nothing", "", lambda draft: None, "same", "same", sharded=sharded)
            assert self.examine(nothing) == Outcome("same", "same"), "the undamaged checkpoint must load"

    def examine(self, mutation: Mutation) -> Outcome:
        """Raises `AssertionError` unless both readers do as they must."""
        self.opened.clear()
        (self.root / "canary").unlink(missing_ok=True)
        inspected, first = self._outcome(mutation, self._inspect, mutation.inspect, False)
        loaded, second = self._outcome(mutation, self._load, mutation.transformers, mutation.foreign)
        assert self.opened == [], f"pickles were opened: {self.opened}"
        assert not (self.root / "canary").exists(), "foreign code was run"
        return Outcome(inspected, loaded, second or first)

    @cached_property
    def logits(self) -> Tensor:
        """Of the undamaged checkpoint."""
        directory = undamaged(False).write(self.root / "undamaged")
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits.detach()

    def _outcome(self, mutation: Mutation, read: Any, wanted: str, foreign: bool) -> tuple[str, str]:
        directory = self.root / "checkpoint"
        draft = undamaged(mutation.sharded)
        mutation.change(draft)
        try:
            with within(PATIENCE):
                outcome, said = _attempt(read, draft.write(directory))
        finally:
            shutil.rmtree(directory)
        allowed = ALLOWED[wanted] | ({"foreign"} if foreign else set())
        assert outcome in allowed, f"{read.__name__.strip('_')}: {outcome}, must be {wanted}. {said}"
        return outcome, said

    def _inspect(self, directory: Path) -> str:
        found = pairquant.inspect(directory)
        found.checkpoint.bits_per_weight()
        tensors = {path: found.checkpoint.packed(path).tensors for path in found.linears}
        same = tensors.keys() == set(PACKED_PATHS) and all(
            _equal(tensor, UNDAMAGED.get(f"{path}.{name}")) for path, t in tensors.items() for name, tensor in t.items()
        )
        return "same" if same else "finite"

    def _load(self, directory: Path) -> str:
        try:
            model = AutoModelForCausalLM.from_pretrained(directory)
            if getattr(model, "hf_quantizer", None) is None:
                raise ForeignError("loaded as a plain model, without asking us")
            with torch.inference_mode():
                logits = model(TOKENS).logits.float()
        except PairQuantError:
            raise
        except Exception as error:
            raise ForeignError(f"{type(error).__name__}: {error}") from error
        if logits.shape == self.logits.shape and torch.allclose(logits, self.logits, rtol=1e-3, atol=1e-4):
            return "same"
        if not logits.isfinite().all():
            raise ForeignError("logits are not finite")
        return "finite"

    def _watch(self, event: str, arguments: tuple) -> None:
        """An audit hook: notes every pickle that Python opens for reading."""
        if event == "open" and isinstance(arguments[0], str) and str(arguments[1]).startswith("r"):
            path = Path(arguments[0])
            if path.parent == self.root / "checkpoint" and path.suffix in {Path(name).suffix for name in PICKLES}:
                self.opened.append(path.name)


def _attempt(read: Any, directory: Path) -> tuple[str, str]:
    """What came of it, and what was said."""
    try:
        return read(directory), ""
    except PairQuantError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except ForeignError as error:
        # An ordinary error of others, but for those that mean the machine had to stop it.
        bomb = "MemoryError" in str(error) or "allocate memory" in str(error)
        return "out of memory" if bomb else "raised by us" if _is_ours(error.__cause__) else "foreign", str(error)[:300]
    except Exception as error:
        return "none of our errors", f"{type(error).__name__}: {error}"


def _is_ours(error: BaseException | None) -> bool:
    """Whether our code raised it, or called what raised it."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    homes = [home for frame in frames for home in (OURS, THEIRS) if home in Path(frame.filename).parents]
    return homes[-1:] == [OURS]


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


class _HangError(BaseException):
    """Not to be mistaken for an error of a reader."""


@contextmanager
def within(seconds: int):
    """Raises `AssertionError` if the body takes longer."""

    def stop(*_: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _HangError as error:
        raise AssertionError(f"no answer within {seconds} s") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet():
    """No warnings of Transformers: there are thousands of refusals to come."""
    hub, level, bars = (
        logging.getLogger("huggingface_hub"),
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    hub_level, _ = hub.level, hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
