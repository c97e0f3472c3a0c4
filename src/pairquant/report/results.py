"""What was measured, read back: the files of `pairquant eval --json`, `compare --json` and `bench --json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.read import ModelFiles
from ..evaluation import results
from ..evaluation.quality import Quality
from ..evaluation.reasoning import Paired
from ..evaluation.results import AnswerResults, ChainResults, Comparison, SpeedResults, TaskResults, read_results
from ..evaluation.speed import Speed as SpeedRow
from ..evaluation.statistics import Interval
from ..evaluation.tasks import Metric
from ..support.formatting import distinct_ends

#: Beside the texts.
CHAINS = "chains of thought"


@dataclass(frozen=True)
class Accuracy:
    """Of one set of problems, or one metric of a task, the original's beside it if it was asked too.

    Shares of 1 with 95 % intervals; lost, gained: questions that only the original, only the model answers; p_value,
    no_worse: see `evaluation.reasoning.Paired`.
    """

    name: str
    questions: int | None
    value: float
    interval: Interval | None
    original: float | None = None
    original_interval: Interval | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    no_worse: float | None = None


@dataclass(frozen=True)
class Speed:
    """Of one model. setting: engine, dtype and device, in words; only speeds of one setting compare."""

    name: str
    setting: str
    peak_memory_bytes: int | None
    rows: list[SpeedRow]


@dataclass(frozen=True)
class Evaluation:
    """What is known of one model, from all files that tell of it.

    name: a checkpoint's, or the evaluated model's own; reference: the original's name; texts: name → quality.
    All only as far as they were measured.
    """

    name: str
    reference: str | None
    bits_per_weight: float | None
    texts: dict[str, Quality]
    activations: str | None = None
    chains: ChainResults | None = None
    accuracies: list[Accuracy] = field(default_factory=list)
    size_bytes: int | None = None
    quantized_in_s: float | None = None

    def with_more(self, later: Evaluation) -> Evaluation:
        """Join what a later file tells of the same model; it counts where both tell, unless it tells less."""
        known = {accuracy.name: accuracy for accuracy in (*self.accuracies, *later.accuracies)}
        texts = dict(self.texts)
        for text, quality in later.texts.items():
            if text not in texts or quality.kl is not None or texts[text].kl is None:
                texts[text] = quality
        return Evaluation(
            self.name,
            later.reference or self.reference,
            _last(self.bits_per_weight, later.bits_per_weight),
            texts,
            later.activations or self.activations,
            later.chains or self.chains,
            list(known.values()),
            _last(self.size_bytes, later.size_bytes),
            _last(self.quantized_in_s, later.quantized_in_s),
        )

    @property
    def kl_by_position(self) -> dict[str, list[tuple[float, float]]]:
        """Text, or `CHAINS` → (the middle of each part in tokens, the KL there)."""
        along = {text: quality.kl_by_position for text, quality in self.texts.items()}
        along |= {CHAINS: self.chains.kl_by_position} if self.chains else {}
        return {
            name: [((part["start"] + part["end"]) / 2, part["kl"]) for part in parts]
            for name, parts in along.items()
            if parts
        }


@dataclass(frozen=True)
class Measured:
    """What all files tell: one evaluation for each model; its speeds, one for each setting."""

    evaluations: list[Evaluation] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    def of(self, name: str) -> Measured:
        """Return what is known of one model."""
        return Measured([e for e in self.evaluations if e.name == name], [s for s in self.speeds if s.name == name])

    def names(self) -> list[str]:
        """Return every model's name, each once."""
        return list(dict.fromkeys([e.name for e in self.evaluations] + [s.name for s in self.speeds]))

    @property
    def references(self) -> set[str]:
        """The originals' names."""
        return {each.reference for each in self.evaluations if each.reference}


def read(files: Iterable[Path], checkpoints: Mapping[str, ModelFiles]) -> Measured:
    """Return everything in these files; raises `ConfigError` for one that none of the three commands has written.

    A model that several files tell of is one model: later files count where they tell the same thing.
    """
    contents = [read_results(file) for file in files]
    names = _names(contents, checkpoints)
    evaluations: dict[str, Evaluation] = {}
    speeds: dict[tuple[str, str], Speed] = {}
    for content in contents:
        for each in _evaluations(content, names):
            evaluations[each.name] = evaluations[each.name].with_more(each) if each.name in evaluations else each
        speeds |= {(each.name, each.setting): each for each in _speeds(content, names)}
    return Measured(list(evaluations.values()), list(speeds.values()))


def _last(earlier: Any, later: Any) -> Any:
    return earlier if later is None else later


def _evaluations(content: Any, names: Mapping[str, str]) -> Iterable[Evaluation]:
    if isinstance(content, Comparison):
        for row in content.rows:
            found = _evaluation(row.evaluation, names)
            yield replace(found, size_bytes=row.size_bytes, quantized_in_s=row.quantized_in_s)
    elif isinstance(content, results.Evaluation):
        yield _evaluation(content, names)


def _speeds(content: Any, names: Mapping[str, str]) -> Iterable[Speed]:
    if isinstance(content, Comparison):
        found = [(row.speed, row.evaluation.device) for row in content.rows]
    elif isinstance(content, SpeedResults):
        setting = f"{content.engine}, {content.device}"
        found = [(content.model, setting), (content.reference, setting)]
    else:
        found = []
    for speed, setting in found:
        if speed is not None:
            yield Speed(names[speed.name], f"{speed.dtype}, {setting}", speed.peak_memory_bytes, speed.rows)


def _evaluation(found: results.Evaluation, names: Mapping[str, str]) -> Evaluation:
    return Evaluation(
        name=names[found.model],
        reference=names[found.reference] if found.reference else None,
        bits_per_weight=found.bits_per_weight,
        texts={Path(text).name: quality for text, quality in found.texts.items()},
        activations=found.activations,
        chains=found.chains,
        accuracies=[*_answers(found.answers or {}), *_tasks(found.tasks)],
    )


def _names(contents: Iterable[Any], checkpoints: Mapping[str, ModelFiles]) -> dict[str, str]:
    """Return what is shown for every model that the files name: the checkpoint's name, if it is one of this report, else as much
    of the path's end as tells it from the others and from the checkpoints.
    """
    models = list(dict.fromkeys(model for content in contents for model in _models(content)))
    names = {model: _checkpoint_name(model, models, checkpoints) for model in models}
    others = {
        model: Path(model).resolve() if Path(model).exists() else Path(model) for model in names if not names[model]
    }
    paths = list(dict.fromkeys(others.values()))
    ends = distinct_ends(paths)
    if set(ends) & set(checkpoints):
        ends = distinct_ends([*paths, *(known.directory.resolve() for known in checkpoints.values())])
    known_as = dict(zip(paths, ends, strict=False))
    return {model: name or known_as[others[model]] for model, name in names.items()}


def _models(content: Any) -> Iterable[str]:
    """Yield the names of all models in a file, as they stand there."""
    if isinstance(content, SpeedResults):
        yield from (each.name for each in (content.model, content.reference) if each)
        return
    rows = content.rows if isinstance(content, Comparison) else []
    for evaluation in [row.evaluation for row in rows] or [content]:
        yield evaluation.model
        if evaluation.reference:
            yield evaluation.reference
    yield from (row.speed.name for row in rows if row.speed)


def _checkpoint_name(model: str, models: Sequence[str], checkpoints: Mapping[str, ModelFiles]) -> str | None:
    """Return the name of the checkpoint in this directory. A directory that is not here any more is known by its last part, if that is unique."""
    same = [name for name, known in checkpoints.items() if Path(model).resolve() == known.directory.resolve()]
    if not same and not Path(model).exists() and [Path(other).name for other in models].count(Path(model).name) == 1:
        same = [name for name, known in checkpoints.items() if Path(model).name == known.directory.name]
    return same[0] if len(same) == 1 else None


def _answers(sets: Mapping[str, AnswerResults]) -> Iterable[Accuracy]:
    for name, each in sets.items():
        original = (each.reference.accuracy, each.reference.interval) if each.reference else (None, None)
        yield Accuracy(
            Path(name).name, each.model.problems, each.model.accuracy, each.model.interval, *original, **_pair(each.paired)
        )  # fmt: skip


def _tasks(tasks: TaskResults | None) -> Iterable[Accuracy]:
    """Yield the metrics that are accuracies: those whose questions are right or wrong."""
    if tasks is None:
        return
    for task, metrics in tasks.model.items():
        for name, ours in metrics.items():
            if not ours.outcomes:
                continue
            theirs = tasks.reference[task][name] if tasks.reference else None
            original = (theirs.value, _around(theirs)) if theirs else (None, None)
            pair = (tasks.paired or {}).get(task, {}).get(name)
            yield Accuracy(f"{task} {name}", len(ours.outcomes), ours.value, _around(ours), *original, **_pair(pair))


def _around(metric: Metric) -> Interval | None:
    """Return the 95 % interval of a normal distribution with lm-eval's standard error."""
    if metric.stderr is None:
        return None
    reach = 1.96 * metric.stderr
    return max(0.0, metric.value - reach), min(1.0, metric.value + reach)


def _pair(paired: Paired | None) -> dict[str, Any]:
    return {name: getattr(paired, name) for name in ("lost", "gained", "p_value", "no_worse")} if paired else {}
