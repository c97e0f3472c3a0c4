"""Several models beside the original that they were made from, measured in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from ..checkpoint.read import Checkpoint, ModelFiles
from ..engines.engine import context_of
from ..evaluation.chains import ChainPlan, Chains
from ..evaluation.reasoning import AnswerPlan
from ..evaluation.speed import Workload
from ..evaluation.statistics import bootstrap_mean
from ..evaluation.tasks import TaskPlan
from ..support.errors import ConfigError
from .bench import bench
from .evaluate import Assessment, Measures, OnPart, assess, prepare


def compare(
    original: str | Path,
    models: Sequence[str | Path],
    texts: Sequence[str] = (),
    *,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    bos: str = "auto",
    chains: ChainPlan | None = None,
    gsm8k: int | None = None,
    answers: AnswerPlan | None = None,
    tasks: TaskPlan | None = None,
    speed: Workload | None = None,
    engine: str = "auto",
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_part: OnPart | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the original, then each model against it; with `speed` also bench them, each in a process of its own.

    The options are those of `assessment.evaluate` and `benchmark.bench`; all models follow the same chains. `on_row` is
    given each row once it is there. Returns {"rows": [{"name", "size_bytes", "quantized_in_s", "evaluation": what
    `evaluate` returns, "speed": a model of `bench` or None}], the original first, "closest": {text: see `ranked`}, and with
    chains "closest_along_chains"}, ready for JSON. Raises what those two do, and `ConfigError` for no models or one given
    twice, before any of them is loaded.
    """
    names = [str(original), *map(str, models)]
    if not models:
        raise ConfigError("no models to compare with the original. Give their directories after it.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]!r} is given twice. Name the original and each model once.")
    measures = Measures(
        tuple(texts), seq_len, max_tokens, chains, gsm8k, (), answers or AnswerPlan(), tasks, engine, seed, bos
    )
    alone = replace(measures, chains=None)
    asked = {names[0]: prepare(original, None, alone, device, trust_remote_code)} | {
        name: prepare(name, original, measures, device, trust_remote_code) for name in names[1:]
    }
    for each in asked.values():
        if speed:
            speed.check_context(context_of(each.files.config))
    tell = on_part or (lambda name, count: lambda: None)
    rows: list[dict[str, Any]] = []
    followed: Chains | None = None
    for name, each in asked.items():
        if followed and each.original:
            each = replace(each, chains=followed)
        on_windows = lambda part, count, name=name: tell(f"{Path(name).name}: {part}", count)  # noqa: E731
        evaluation, sampled = assess(each, on_windows)
        followed = followed or sampled
        fast = bench(name, None, speed, device=device, trust_remote_code=trust_remote_code) if speed else None
        rows.append(_row(each, evaluation, fast))
        if on_row is not None:
            on_row(rows[-1])
    along_chains = {"closest_along_chains": ranked_along_chains(rows[1:], seed)} if chains else {}
    return {"rows": rows, "closest": ranked(rows[1:], seed), **along_chains}


def _row(asked: Assessment, evaluation: dict[str, Any], speed: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": asked.name,
        "size_bytes": asked.files.size_bytes(),
        "quantized_in_s": _quantized_in(asked.files),
        "evaluation": evaluation,
        "speed": speed["model"] if speed else None,
    }


def ranked(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """Of each text: which model is closest to the original, and by how much, window for window.

    {"model": its name, "ahead_of": {other's name: {"kl": mean difference in nats, "interval": its 95 % bootstrap
    interval, None for a single window}}}.
    """
    return {
        text: _ranking({row["name"]: row["evaluation"]["texts"][text]["kl_of_windows"] for row in rows}, None, seed)
        for text in rows[0]["evaluation"]["texts"]
    }


def ranked_along_chains(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """As a text of `ranked`, chain for chain, weighted by their tokens; all models must have followed the same ones."""
    chains = {row["name"]: row["evaluation"]["chains"] for row in rows}
    (tokens,) = {tuple(each["tokens_of_chains"]) for each in chains.values()}
    return _ranking({name: each["kl_of_chains"] for name, each in chains.items()}, tokens, seed)


def _ranking(kl: Mapping[str, Sequence[float]], weights: Sequence[float] | None, seed: int) -> dict[str, Any]:
    """Of models' KL, window for window (or chain for chain)."""
    shares = weights or [1.0] * len(next(iter(kl.values())))

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)

    closest = min(kl, key=lambda name: (isnan(mean(kl[name])), mean(kl[name])))
    ahead = {}
    for name, values in kl.items():
        if name != closest:
            differences = [other - own for other, own in zip(values, kl[closest], strict=True)]
            ahead[name] = {"kl": mean(differences), "interval": bootstrap_mean(differences, weights, seed)}
    return {"model": closest, "ahead_of": ahead}


def _quantized_in(files: ModelFiles) -> float | None:
    """Seconds, of a checkpoint of ours that says."""
    if files.quantization is None or files.gguf:
        return None
    seconds = Checkpoint.open(files).report.get("seconds")
    return float(seconds) if isinstance(seconds, (int, float)) else None
