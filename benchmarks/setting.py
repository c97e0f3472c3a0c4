"""The one setting of all accuracy benchmarks: which text calibrates, how much of it, and what is measured afterwards.

Group size 64; 64 windows of 1024 tokens from WikiText-2 (validation), GSM8K (training) and Grimms' Fairy Tales;
perplexity and KL on 80 × 2048 tokens of the WikiText-2 test text and 30 × 2048 tokens of GSM8K test problems. Windows begin
with `<bos>` where the tokenizer has it so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.quality import Quality
from pairquant.optimize.calibration import calibrate
from pairquant.spec.options import QuantConfig
from pairquant.support.text import documents
from pairquant.support.windows import token_windows, window_prefix

DATA = Path(__file__).parent / "data"
CALIBRATION = (str(DATA / "wikitext2-valid.txt"), "default")
EVALUATION = {"wikitext2-test": (str(DATA / "wikitext2-test.txt"), 80), "gsm8k-test": ("default/gsm8k-test.jsonl", 30)}
SETTING = {"group_size": 64, "samples": 64, "seq_len": 1024, "calibration": CALIBRATION}


def evaluation_windows(tokenizer: Any, length: int = 2048, most: int | None = None) -> dict[str, Tensor]:
    """Of each text, int64 [windows, length]; `most`: at most so many windows."""
    prefix = window_prefix(tokenizer)
    return {
        name: token_windows(tokenizer, documents(source), length, prefix, min(count, most or count))
        for name, (source, count) in EVALUATION.items()
    }


def opened(name: str, device: torch.device, length: int = 2048) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model in float32, its tokenizer, and the windows to evaluate on."""
    files = ModelFiles.find(name)
    tokenizer = files.tokenizer()
    return files.model(torch.float32, device), tokenizer, evaluation_windows(tokenizer, length)


def calibration_tokens(tokenizer: Any, config: QuantConfig, more: int = 0) -> Tensor:
    """The windows that these options calibrate on, int64 [samples, seq_len], and so many more after them."""
    prefix = window_prefix(tokenizer, config.bos)
    return calibrate(
        tokenizer, config.calibration, config.samples, config.seq_len, config.seed, more=more, prefix=prefix
    ).tokens


def numbers(quality: Quality) -> dict[str, float]:
    """Without the lists by window and position."""
    return {name: value for name, value in vars(quality).items() if isinstance(value, (int, float))}
