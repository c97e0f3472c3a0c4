"""What was measured, read back: the files of `pairquant eval --json`, `compare --json` and `bench --json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..checkpoint.read import ModelFiles
from ..hub.card import read_results
from ..support.errors import CheckpointError, ConfigError
from ..support.formatting import distinct_ends

Interval = tuple[float, float]
#: What is raised for JSON of another shape.
UNEXPECTED = (TypeError, ValueError, KeyError, AttributeError, IndexError)


#: Beside the texts.
CHAINS = "chains of thought"


@dataclass(frozen=True)
class Chains:
    """Along the original's chains of thought. kl: mean of a token, nats; departures: of each greedy chain the first token
    chosen otherwise, None if there is none; most_tokens: of a chain."""

    count: int
    tokens: int
    kl: float
    interval: Interval | None
    departures: list[int | None]
    departure_median: float | None
    most_tokens: int


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
class SpeedRow:
    """At one number of sequences at once."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float


@dataclass(frozen=True)
class Speed:
    """Of one model. setting: engine, dtype and device, in words; only speeds of one setting compare."""

    name: str
    setting: str
    peak_memory_bytes: int | None
    rows: list[SpeedRow]


@dataclass(frozen=True)
class Evaluation:
    """Of one model.

    name: a checkpoint's, or the evaluated model's own; reference: the original's name; texts: see `read_results`;
    kl_intervals: text → the ends of the 95 % interval of its KL; kl_by_position: text, or `CHAINS` →
    (position in tokens, KL there). All only as far as they were measured.
    """

    name: str
    reference: str | None
    bits_per_weight: float | None
    texts: dict[str, dict[str, Any]]
    kl_intervals: dict[str, Interval]
    kl_by_position: dict[str, list[tuple[float, float]]]
    chains: Chains | None = None
    accuracies: list[Accuracy] = field(default_factory=list)
    size_bytes: int | None = None
    quantized_in_s: float | None = None


@dataclass(frozen=True)
class Measured:
    evaluations: list[Evaluation] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    def of(self, name: str) -> Measured:
        """Of one model."""
        return Measured([e for e in self.evaluations if e.name == name], [s for s in self.speeds if s.name == name])

    def names(self) -> list[str]:
        """Of every model, each once."""
        return list(dict.fromkeys([e.name for e in self.evaluations] + [s.name for s in self.speeds]))


def read(files: Iterable[Path], checkpoints: Mapping[str, ModelFiles]) -> Measured:
    """Everything in these files; raises `ConfigError` for one that none of the three commands has written."""
    files, found = list(files), Measured()
    names = _names(files, checkpoints)
    for file in files:
        evaluations, speeds = _read(file, names)
        found.evaluations.extend(evaluations)
        found.speeds.extend(speeds)
    return found


def _read(file: Path, names: Mapping[str, str]) -> tuple[list[Evaluation], list[Speed]]:
    content = _content(file)
    try:
        if "rows" in content:
            return _comparison(content, names)
        if "workload" in content:
            entries = [content[who] for who in ("model", "reference") if content.get(who)]
            setting = f"{content['engine']}, {content['device']}"
            return [], [_speed(entry, setting, names) for entry in entries]
        return [_evaluation(read_results(file), names)], []
    except ConfigError:
        raise
    except UNEXPECTED as error:
        raise ConfigError(
            f"results {str(file)!r} have entries that `pairquant eval`, `compare` or `bench` do not write ({error!r}). "
            "Make them anew."
        ) from error


def _comparison(content: Mapping[str, Any], names: Mapping[str, str]) -> tuple[list[Evaluation], list[Speed]]:
    evaluations, speeds = [], []
    for row in content["rows"]:
        evaluations.append(_evaluation(row["evaluation"], names, row["size_bytes"], row["quantized_in_s"]))
        if row["speed"]:
            speeds.append(_speed(row["speed"], row["evaluation"]["device"], names))
    return evaluations, speeds


def _evaluation(
    content: Mapping[str, Any],
    names: Mapping[str, str],
    size_bytes: int | None = None,
    quantized_in_s: float | None = None,
) -> Evaluation:
    bits, reference, chains = content.get("bits_per_weight"), content.get("reference"), content.get("chains")
    texts = {Path(text).name: row for text, row in content["texts"].items()}
    along = texts | ({CHAINS: chains} if chains else {})
    return Evaluation(
        name=names[str(content["model"])],
        reference=names[str(reference)] if reference else None,
        bits_per_weight=float(bits) if isinstance(bits, (int, float)) else None,
        texts=texts,
        kl_intervals={text: _interval(ends) for text, ends in _present(texts, "kl_interval")},
        kl_by_position={text: _positions(parts) for text, parts in _present(along, "kl_by_position")},
        chains=_chains(chains) if chains else None,
        accuracies=[*_answers(content.get("answers") or {}), *_tasks(content.get("tasks"))],
        size_bytes=size_bytes,
        quantized_in_s=quantized_in_s,
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CheckpointError as error:
        raise ConfigError(f"results {str(file)!r} cannot be read. Make them with `pairquant eval --json`.") from error


def _names(files: Iterable[Path], checkpoints: Mapping[str, ModelFiles]) -> dict[str, str]:
    """What is shown for every model that the files name: the checkpoint's name, if it is one of this report, else as much
    of the path's end as tells it from the others and from the checkpoints.
    """
    models = list(dict.fromkeys(model for file in files for model in _models(_content(file))))
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


def _models(content: Mapping[str, Any]) -> Iterable[str]:
    """As they stand in a file, which may hold anything."""
    evaluations = [row.get("evaluation") for row in content.get("rows", ()) if isinstance(row, dict)] or [content]
    for each in evaluations:
        for who in ("model", "reference"):
            model = each.get(who) if isinstance(each, dict) else None
            model = model.get("name") if isinstance(model, dict) else model
            if isinstance(model, str):
                yield model
    for row in content.get("rows", ()):
        if isinstance(row, dict) and isinstance(row.get("speed"), dict):
            yield str(row["speed"].get("name"))


def _checkpoint_name(model: str, models: Sequence[str], checkpoints: Mapping[str, ModelFiles]) -> str | None:
    """Of the same directory; of one that is not here any more, if it and a checkpoint alone have that last part."""
    same = [name for name, known in checkpoints.items() if Path(model).resolve() == known.directory.resolve()]
    if not same and not Path(model).exists() and [Path(other).name for other in models].count(Path(model).name) == 1:
        same = [name for name, known in checkpoints.items() if Path(model).name == known.directory.name]
    return same[0] if len(same) == 1 else None


def _present(rows: Mapping[str, Mapping[str, Any]], key: str) -> list[tuple[str, Any]]:
    return [(name, row[key]) for name, row in rows.items() if row.get(key)]


def _interval(ends: Any) -> Interval:
    low, high = ends
    return float(low), float(high)


def _positions(parts: list[dict[str, float]]) -> list[tuple[float, float]]:
    """The middle of each part, and the KL there."""
    return [((part["start"] + part["end"]) / 2, float(part["kl"])) for part in parts]


def _chains(row: Mapping[str, Any]) -> Chains:
    return Chains(
        int(row["chains"]),
        int(row["tokens"]),
        float(row["kl"]),
        _interval(row["kl_interval"]) if row["kl_interval"] else None,
        list(row["departures"]),
        row["departure_median"],
        int(row["plan"]["tokens"]),
    )


def _answers(sets: Mapping[str, Any]) -> Iterable[Accuracy]:
    for name, each in sets.items():
        ours, theirs = each["model"], each["reference"]
        original = (theirs["accuracy"], _interval(theirs["interval"])) if theirs else (None, None)
        yield Accuracy(
            Path(name).name, ours["problems"], ours["accuracy"], _interval(ours["interval"]), *original, **_pair(each["paired"])
        )  # fmt: skip


def _tasks(tasks: Mapping[str, Any] | None) -> Iterable[Accuracy]:
    """Of metrics that are accuracies: those whose questions are right or wrong."""
    for task, metrics in (tasks or {"model": {}})["model"].items():
        for name, ours in metrics.items():
            if not ours["outcomes"]:
                continue
            theirs = tasks["reference"][task][name] if tasks and tasks["reference"] else None
            original = (theirs["value"], _around(theirs)) if theirs else (None, None)
            pair = ((tasks or {}).get("paired") or {}).get(task, {}).get(name)
            yield Accuracy(
                f"{task} {name}", len(ours["outcomes"]), ours["value"], _around(ours), *original, **_pair(pair)
            )


def _around(metric: Mapping[str, Any]) -> Interval | None:
    """95 % of a normal distribution with lm-eval's standard error."""
    if metric["stderr"] is None:
        return None
    reach = 1.96 * metric["stderr"]
    return max(0.0, metric["value"] - reach), min(1.0, metric["value"] + reach)


def _pair(paired: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: paired[name] for name in ("lost", "gained", "p_value", "no_worse")} if paired else {}


def _speed(entry: Mapping[str, Any], setting: str, names: Mapping[str, str]) -> Speed:
    rows = [SpeedRow(**{name: row[name] for name in SpeedRow.__dataclass_fields__}) for row in entry["rows"]]
    return Speed(names[entry["name"]], f"{entry['dtype']}, {setting}", entry["peak_memory_bytes"], rows)
