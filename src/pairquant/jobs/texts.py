"""The text of a run: what blocks are fitted on, what chooses the best epoch, and what the whole model is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimize.calibration import Calibration, Draw, Sampler, calibrator
from ..optimize.ranks import ALONE, Ranks
from ..spec.options import QuantConfig
from ..support.errors import ConfigError
from ..support.formatting import counted
from ..support.windows import Notice
from .opened import Opened
from .own_text import OwnText
from .progress import Told

#: Of the windows that the whole model could be trained on, every so many-th is held out to choose the epoch, at least one.
HELD_OUT = 8


@dataclass(frozen=True)
class Texts:
    """Windows of tokens, int64 [windows, T], each None where the recipe needs none.

    calibration: what blocks are fitted on; validation: what chooses the best epoch of a block-wise training; whole: what the
    whole model is trained on at the end; held_out: what chooses the best epoch of that.
    """

    calibration: Calibration | None = None
    validation: Tensor | None = None
    whole: Tensor | None = None
    held_out: Tensor | None = None

    @classmethod
    def drawn(cls, opened: Opened, ranks: Ranks, device: torch.device, progress: Told) -> Texts:
        """Draw them as a run's options say.

        Raises `TextError` if there is too little text to fit on, and `ConfigError` for windows that cannot be shared out to
        the processes.
        """
        config = opened.config
        if not config.recipe.needs_text and config.target is None:
            return cls()
        progress.stage("calibration text")
        chosen_by = config.recipe.training.validation_samples if config.recipe.training else 0
        _require_shared_out(config, chosen_by, ranks)
        inside = 0 if config.validation else chosen_by
        own = config.samples + inside
        last = config.recipe.end_to_end
        wanted = last.fresh * config.samples if last is not None else 0
        draw = draw_for(opened, device, progress, ranks)
        every = draw(config.calibration, own, wanted)
        calibration, validation = every.first(config.samples), every.tokens[config.samples : own]
        if chosen_by and config.validation:
            validation = draw_for(opened, device, progress, ranks, "validation")(config.validation, chosen_by).tokens
        texts = cls(calibration, validation if len(validation) else None)
        return texts if last is None else texts._with_whole(every.tokens[own:], wanted, ranks, progress.notice)

    def _with_whole(self, fresh: Tensor, wanted: int, ranks: Ranks, notice: Notice) -> Texts:
        """Return these with windows for the last training. fresh: those that nothing else reads, perhaps fewer than wanted."""
        assert self.calibration is not None, "a recipe that trains needs text"
        pool = fresh[: len(fresh) // ranks.size * ranks.size]
        if len(pool) < max(wanted, 1):
            if wanted:
                notice(
                    f"of the text, {counted(len(pool), 'window')} of the {wanted} wanted for the last training are left: it "
                    "reads those that blocks were fitted on too. More text (--calibration) makes it more accurate"
                )
            pool = torch.cat([pool, self.calibration.tokens])
        held = max(len(pool) // HELD_OUT // ranks.size, 1) * ranks.size if len(pool) >= 2 * ranks.size else 0
        return Texts(self.calibration, self.validation, pool[held:], pool[:held] if held else None)

    def digests(self) -> dict[str, str | None]:
        """Return the SHA-256 of each by name: a stopped run goes on with the same ones only."""
        return {
            "calibration": None if self.calibration is None else self.calibration.digest,
            "validation": _digest(self.validation),
            "whole": _digest(self.whole),
            "held_out": _digest(self.held_out),
        }


def draw_for(
    opened: Opened, device: torch.device, progress: Told, ranks: Ranks = ALONE, purpose: str = "calibration"
) -> Draw:
    """Return what draws the windows of a run.

    device: on which the model samples text, if it is asked to; purpose: the text that it samples for another is another.
    """

    def sampling(prefix: Sequence[int]) -> Sampler:
        config = opened.config
        return OwnText(
            opened.files, sum(p.numel() for p in opened.skeleton.parameters()), opened.tokenizer, config.seq_len,
            config.seed, purpose, prefix, device, progress, ranks,
        ).windows  # fmt: skip

    return calibrator(opened.skeleton, opened.files.name, opened.tokenizer, opened.config, progress.notice, sampling)


def _digest(tokens: Tensor | None) -> str | None:
    return None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _require_shared_out(config: QuantConfig, chosen_by: int, ranks: Ranks) -> None:
    trains = config.recipe.trains or config.recipe.end_to_end is not None
    if trains and (config.samples % ranks.size or chosen_by % ranks.size):
        raise ConfigError(
            f"{config.samples} samples and {chosen_by} validation samples do not share out evenly to {ranks.size} "
            f"processes, as training needs: choose multiples of {ranks.size}"
        )
