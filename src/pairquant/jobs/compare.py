"""Several models beside the original that they were made from, measured in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.read import Checkpoint, ModelFiles
from ..engines.engine import context_of
from ..evaluation.chains import ChainPlan, Chains
from ..evaluation.ranking import Ranking, rank
from ..evaluation.reasoning import AnswerPlan
from ..evaluation.results import Compared, Comparison, Evaluation
from ..evaluation.speed import Workload
from ..evaluation.tasks import TaskPlan
from ..support.errors import ConfigError
from .bench import measure_speed
from .evaluate import Measures, OnPart, assess, prepare


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
    on_row: Callable[[Compared], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the original, then each model against it; with `speed` also bench them, each in a process of its own.

    The options are those of `evaluate.evaluate` and `bench.bench`; all models follow the same chains. `on_row` is given each
    row once it is there. Returns the entries of `evaluation.results.Comparison`, the original first, ready for JSON. Raises
    what those two do, and `ConfigError` for no models or one given twice, before any of them is loaded.
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
    rows: list[Compared] = []
    followed: Chains | None = None
    for name, each in asked.items():
        if followed and each.original:
            each = replace(each, chains=followed)
        on_windows = lambda part, count, name=name: tell(f"{Path(name).name}: {part}", count)  # noqa: E731
        evaluation, sampled = assess(each, on_windows)
        followed = followed or sampled
        fast = measure_speed([name], speed, device=device, trust_remote_code=trust_remote_code).model if speed else None
        rows.append(Compared(name, each.files.size_bytes(), _quantized_in(each.files), evaluation, fast))
        if on_row is not None:
            on_row(rows[-1])
    evaluations = {row.name: row.evaluation for row in rows[1:]}
    along_chains = ranked_along_chains(evaluations, seed) if chains else None
    return Comparison(rows, ranked(evaluations, seed), along_chains).to_dict()


def ranked(evaluations: Mapping[str, Evaluation], seed: int) -> dict[str, Ranking]:
    """Rank models, by name, on each text by their KL from the original, window for window."""
    texts = next(iter(evaluations.values())).texts
    return {
        text: rank({name: each.texts[text].kl_of_windows or [] for name, each in evaluations.items()}, seed=seed)
        for text in texts
    }


def ranked_along_chains(evaluations: Mapping[str, Evaluation], seed: int) -> Ranking:
    """Rank models, by name, chain for chain, weighted by their tokens; all must have followed the same chains."""
    chains = {name: each.chains for name, each in evaluations.items() if each.chains}
    (tokens,) = {tuple(each.tokens_of_chains) for each in chains.values()}
    return rank({name: each.kl_of_chains for name, each in chains.items()}, tokens, seed)


def _quantized_in(files: ModelFiles) -> float | None:
    """Return seconds, of a checkpoint of ours that says."""
    if files.quantization is None or files.gguf:
        return None
    seconds = Checkpoint.open(files).report.get("seconds")
    return float(seconds) if isinstance(seconds, (int, float)) else None
