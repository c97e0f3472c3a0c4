"""What `pairquant eval`, `compare` and `bench` found, as typed values, and the JSON files that keep it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from ..checkpoint.files import read_json
from ..support.errors import CheckpointError, ConfigError
from .chains import ChainPlan, ChainQuality
from .quality import Quality
from .ranking import Ranking
from .reasoning import AnswerPlan, Answers, Paired
from .speed import Speed, Workload
from .tasks import Metrics

#: What files of results are made by, for messages.
COMMANDS = "`pairquant eval --json`, `compare --json` or `bench --json`"


class _Stored:
    """A data class that is kept as JSON. Fields of `LEFT_OUT` are not written while they hold nothing."""

    LEFT_OUT: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        entries = asdict(self)  # type: ignore[call-overload]
        return {name: value for name, value in entries.items() if value is not None or name not in self.LEFT_OUT}

    @classmethod
    def from_dict(cls, entries: Any) -> Self:
        """Read `to_dict`'s entries, or JSON's; entries that are not known are left aside.

        Raises `ConfigError` naming the first entry that is missing or of a wrong type.
        """
        try:
            return _adapter(cls).validate_python(entries)  # type: ignore[arg-type]  # classes are hashable
        except ValidationError as error:
            raise ConfigError(_fault(error)) from error


@dataclass(frozen=True)
class ChainResults(ChainQuality):
    """Quality along the original's chains of thought, with the plan by which they were sampled."""

    plan: ChainPlan


@dataclass(frozen=True)
class AnswerResults:
    """One set of problems. reference, paired: None without an original."""

    model: Answers
    reference: Answers | None
    paired: Paired | None


@dataclass(frozen=True)
class TaskResults:
    """Tasks of lm-eval: task → metric → value. reference, paired: None without an original; paired holds those metrics whose
    questions are right or wrong."""

    model: Metrics
    reference: Metrics | None = None
    paired: dict[str, dict[str, Paired]] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Stored):
    """What `pairquant eval` found of one model.

    model, reference: as they were named; texts: name → quality; bos: whether windows began with `<bos>`; notices: what a
    user should know of the texts; bits_per_weight: stored bits over weights, of the quantized layers if there are any;
    activations: the formats that layers round their inputs to, "not rounded" for none. Both are None for a model that others
    quantized, since we do not read how, and activations in files of earlier versions;
    versions: library → version; the rest: None unless it was asked for.
    """

    LEFT_OUT = ("chains", "answers", "answer_plan", "tasks")

    model: str
    reference: str | None = None
    texts: dict[str, Quality]
    bos: bool = False
    notices: list[str] = field(default_factory=list)
    bits_per_weight: float | None = None
    activations: str | None = None
    engine: str = "transformers"
    device: str = "an unknown device"
    versions: dict[str, str] = field(default_factory=dict)
    chains: ChainResults | None = None
    answers: dict[str, AnswerResults] | None = None
    answer_plan: AnswerPlan | None = None
    tasks: TaskResults | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpeed(_Stored):
    """What `pairquant bench` found of one model. load_s: seconds; peak_memory_bytes: None where it cannot be known."""

    name: str
    size_bytes: int | None = None
    load_s: float | None = None
    peak_memory_bytes: int | None = None
    dtype: str
    compiled: bool = False
    rows: list[Speed]


@dataclass(frozen=True, kw_only=True)
class SpeedResults(_Stored):
    """What `pairquant bench` found. ratios: model / reference of every number, None without a reference."""

    model: ModelSpeed
    reference: ModelSpeed | None = None
    ratios: dict[str, Any] | None = None
    workload: Workload
    engine: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """One model of a comparison. quantized_in_s: seconds, None where the checkpoint does not say."""

    name: str
    size_bytes: int | None
    quantized_in_s: float | None
    evaluation: Evaluation
    speed: ModelSpeed | None = None


@dataclass(frozen=True)
class Comparison(_Stored):
    """What `pairquant compare` found. rows: the original first; closest: text → ranking of the others."""

    LEFT_OUT = ("closest_along_chains",)

    rows: list[Compared]
    closest: dict[str, Ranking] = field(default_factory=dict)
    closest_along_chains: Ranking | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        rows = [{**asdict(row), "evaluation": row.evaluation.to_dict()} for row in self.rows]
        return {**super().to_dict(), "rows": rows}


def read_results(file: Path) -> Evaluation | Comparison | SpeedResults:
    """Read a file that one of the three commands has written; raises `ConfigError` naming the file and the entry at fault."""
    try:
        entries = read_json(file)
    except CheckpointError as error:
        raise ConfigError(f"results {str(file)!r} cannot be read. Make them with {COMMANDS}.") from error
    kinds: dict[str, Any] = {"rows": Comparison, "workload": SpeedResults, "texts": Evaluation}
    kind = next((kind for key, kind in kinds.items() if key in entries), None)
    if kind is None:
        raise ConfigError(f"results {str(file)!r} have no entry {', '.join(kinds)}. Make them with {COMMANDS}.")
    try:
        return kind.from_dict(entries)
    except ConfigError as error:
        raise ConfigError(f"results {str(file)!r}: {error}. Make them with {COMMANDS}.") from error


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _fault(error: ValidationError) -> str:
    """Return the first fault: "texts.wikitext2-test.kl is 'x': …"."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {first['input']!r:.60}: {first['msg'][:1].lower()}{first['msg'][1:]}"
