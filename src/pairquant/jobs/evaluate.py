"""How good a model is, alone and beside the original it was quantized from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.read import ModelFiles
from ..engines import choice
from ..engines.engine import chat_tokens, context_of
from ..engines.examination import Answered, Examinee, OnTransformers, OnVllm, Questions
from ..evaluation import chains as along_chains
from ..evaluation import grading, problems, quality, reasoning
from ..evaluation.chains import ChainPlan, Chains
from ..evaluation.generation import check_context
from ..evaluation.quality import Quality
from ..evaluation.reasoning import AnswerPlan
from ..evaluation.results import AnswerResults, ChainResults, Evaluation, TaskResults
from ..evaluation.tasks import TaskPlan, Tasks, paired
from ..models.limits import check_length, check_tokens
from ..spec.checks import require_choice
from ..spec.options import BOS_CHOICES
from ..support.devices import resolve_device
from ..support.environment import device_name, versions
from ..support.errors import ConfigError, TextError
from ..support.text import BUNDLED_TEST, documents
from ..support.windows import Notice, describe, token_windows, window_prefix
from .storage import activations, bits_per_weight

#: Told what is coming and how many steps it takes; returns what to call after each.
OnPart = Callable[[str, int], Callable[[], None]]


SAMPLING = "chains, the original"


@dataclass(frozen=True)
class ProblemSet:
    """prompts: token ids; is_right: of a problem's number and an answer."""

    prompts: list[list[int]]
    is_right: Callable[[int, str], bool]


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    texts: Iterable[str] = (),
    *,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    bos: str = "auto",
    chains: ChainPlan | None = None,
    gsm8k: int | None = None,
    boxed: Iterable[str | Path] = (),
    answers: AnswerPlan | None = None,
    tasks: TaskPlan | None = None,
    engine: str = "auto",
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_windows: OnPart | None = None,
) -> dict[str, Any]:
    """Return perplexity of each text, and with a reference mean token KL(reference ‖ model) in nats and top-1 agreement.

    texts: as for calibration (see `text`); by default the bundled GSM8K test problems. Each is cut into windows of
    seq_len tokens, the first max_tokens of them used. bos: whether windows begin with `<bos>`: "auto" as the tokenizer of the
    original (without one, the model) has it, "never", "always". chains: divergence along the reference's own chains of thought.
    gsm8k: so many of the GSM8K test problems, boxed: files of problems (see `problems.from_file`), answered as `answers`
    says. tasks: of lm-eval. engine: "vllm" answers problems and runs tasks by vLLM, in spawned processes (call it from a
    script below `if __name__ == "__main__":`); "auto" is Transformers, which texts and chains always need. seed: the
    bootstrap's. `on_windows(name, count)` is told what is coming and returns what to call after each step.

    Returns the entries of `evaluation.results.Evaluation`, ready for JSON; its `from_dict` makes typed values of them.
    Everything that can be wrong with what is asked is told before a model is loaded.
    """
    measures = Measures(
        tuple(texts),
        seq_len,
        max_tokens,
        chains,
        gsm8k,
        tuple(boxed),
        answers or AnswerPlan(),
        tasks,
        engine,
        seed,
        bos,
    )
    found, _ = assess(prepare(model, reference, measures, device, trust_remote_code), on_windows)
    return found.to_dict()


@dataclass(frozen=True)
class Measures:
    """What is to be measured of a model: the arguments of `evaluate`. Raises `ConfigError`."""

    texts: tuple[str, ...]
    seq_len: int
    max_tokens: int | None
    chains: ChainPlan | None
    gsm8k: int | None
    boxed: tuple[str | Path, ...]
    answers: AnswerPlan
    tasks: TaskPlan | None
    engine: str
    seed: int
    bos: str = "auto"

    def __post_init__(self) -> None:
        require_choice("bos", self.bos, BOS_CHOICES)
        if self.seq_len < 2 or (self.max_tokens is not None and self.max_tokens < self.seq_len):
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, seq_len {self.seq_len}: allowed is 2 ≤ seq_len ≤ max_tokens"
            )


@dataclass(frozen=True)
class Assessment:
    """What is asked about a model, found and checked: nothing can be wrong with it any more.

    name, reference: as they were given; windows: of each text, int64 [W, T]; prefix: token ids that each window begins
    with; notices: what a user should know of them; chains: to be sampled, or sampled already;
    prompts: theirs; sets: of problems; engine: what answers them and runs tasks.
    """

    name: str
    reference: str | None
    files: ModelFiles
    original: ModelFiles | None
    tokenizer: Any
    device: torch.device
    windows: Mapping[str, Tensor]
    prefix: tuple[int, ...]
    notices: tuple[str, ...]
    chains: ChainPlan | Chains | None
    prompts: list[list[int]]
    sets: Mapping[str, ProblemSet]
    answers: AnswerPlan
    tasks: Tasks | None
    engine: str
    seed: int

    @property
    def both(self) -> dict[str, ModelFiles]:
        return {"model": self.files} | ({"reference": self.original} if self.original else {})


def prepare(
    model: str | Path, reference: str | Path | None, measures: Measures, device: str, trust_remote_code: bool
) -> Assessment:
    """Raise what `evaluate` does; no weight is read."""
    target, chains, answers = resolve_device(device), measures.chains, measures.answers
    if chains and reference is None:
        raise ConfigError("chains are sampled from the original model, and none is given. Add --reference.")
    files = ModelFiles.find(str(model), trust_remote_code)
    original = ModelFiles.find(str(reference), trust_remote_code) if reference is not None else None
    both = [files, *([original] if original else [])]
    for each in both:
        each.require_loadable()
    _check_vocabularies(both)
    skeletons = [each.skeleton() for each in both]
    notices = _check_lengths(skeletons, measures.seq_len)
    tokenizer = files.tokenizer()
    wanted = original.tokenizer() if original else tokenizer
    prefix = window_prefix(wanted, measures.bos)
    if prefix:
        notices.append(describe(wanted, prefix))
    windows = {
        name: _windows(tokenizer, name, measures, prefix, notices.append) for name in measures.texts or (BUNDLED_TEST,)
    }
    prompts = chain_prompts(wanted, chains) if chains and original else []
    sets = _problem_sets(tokenizer, measures.gsm8k, measures.boxed)
    for each, skeleton in zip(both, skeletons, strict=True):
        check_tokens(skeleton, each.name, *windows.values(), *prompts, *(p for s in sets.values() for p in s.prompts))
    _check_contexts(both, chains, prompts, answers, sets)
    engine = _engine(measures.engine, both, asked=bool(sets or measures.tasks))
    tasks = Tasks(measures.tasks) if measures.tasks else None
    return Assessment(
        str(model), None if reference is None else str(reference), files, original, tokenizer, target, windows, prefix,
        tuple(notices), chains, prompts, sets, answers, tasks, engine, measures.seed,
    )  # fmt: skip


def assess(asked: Assessment, on_part: OnPart | None = None) -> tuple[Evaluation, Chains | None]:
    """Measure what was asked; return it, and the chains that were followed."""
    tell = on_part or (lambda name, count: lambda: None)
    questions = Questions({name: each.prompts for name, each in asked.sets.items()}, asked.answers, asked.tasks)
    answered = {}
    if asked.engine == "vllm":  # first: it may yet refuse, and wants the memory
        answered = _examined(_on_vllm(asked.both, asked.device), questions, tell)
    networks = {who: load(each, asked.device) for who, each in asked.both.items()}
    texts = _texts(networks, asked, tell)
    followed = _followed(asked, networks.get("reference"), tell)
    chains = _along(networks, followed, tell) if followed else None
    if asked.engine != "vllm" and (asked.sets or asked.tasks):
        on_transformers = {who: OnTransformers(each, asked.tokenizer) for who, each in networks.items()}
        answered = _examined(on_transformers, questions, tell)
    found = Evaluation(
        model=asked.name,
        reference=asked.reference,
        texts=texts,
        bos=bool(asked.prefix),
        notices=list(asked.notices),
        bits_per_weight=bits_per_weight(asked.files, networks["model"]),
        activations=activations(asked.files),
        engine=asked.engine,
        device=device_name(asked.device),
        versions=_versions(asked),
        chains=chains,
        answers=_answers(answered, asked.tokenizer, asked.sets, asked.answers.seed) if asked.sets else None,
        answer_plan=asked.answers if asked.sets else None,
        tasks=_tasks(answered, asked.tasks.plan.seed) if asked.tasks else None,
    )
    return found, followed


def _versions(asked: Assessment) -> dict[str, str]:
    """Return the versions of everything that took part in the measurement."""
    found = versions()
    if asked.tasks:
        found["lm-eval"] = asked.tasks.version
    if asked.engine == "vllm":
        found["vllm"] = choice.vllm_version()
    return found


def _along(networks: Mapping[str, Any], followed: Chains, tell: OnPart) -> ChainResults:
    step = tell("chains", 2 * followed.plan.count)
    measured = along_chains.measure(networks["model"], networks["reference"], followed, step)
    return ChainResults(**vars(measured), plan=followed.plan)


def _followed(asked: Assessment, reference: Any, tell: OnPart) -> Chains | None:
    """Return the chains that are given, or sampled now."""
    if not isinstance(asked.chains, ChainPlan):
        return asked.chains
    step = tell(SAMPLING, 2 * asked.chains.count)
    return along_chains.sample(reference, asked.prompts, asked.chains, step)


def _texts(networks: Mapping[str, Any], asked: Assessment, tell: OnPart) -> dict[str, Quality]:
    network, other, start = networks["model"], networks.get("reference"), max(1, len(asked.prefix))
    return {
        name: quality.measure(network, batch, other, tell(name, len(batch)), asked.seed, start)
        for name, batch in asked.windows.items()
    }


def load(files: ModelFiles, device: torch.device) -> Any:
    """Return the model, ready to run, in the dtype of `_dtype`."""
    dtype = _dtype(device)
    return files.model(dtype if dtype == "auto" else getattr(torch, dtype), device)


def _dtype(device: torch.device) -> str:
    """Return the dtype to compute in, the same for every engine: float32 on a CPU, for exactness, the stored one on a GPU."""
    return "float32" if device.type == "cpu" else "auto"


def _check_vocabularies(both: Iterable[ModelFiles]) -> None:
    sizes = [files.config.get_text_config().vocab_size for files in both]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"the vocabularies differ: {sizes[0]} and {sizes[1]} tokens. The reference must be the model that was quantized."
        )


def _engine(name: str, both: Collection[ModelFiles], asked: bool) -> str:
    """Return what answers and runs tasks. Raises what `choice` does, and `ConfigError` for vLLM with nothing to do.

    Checks what vLLM would only tell after a minute.
    """
    chosen = {choice.choose(name, files, prefer_vllm=False) for files in both}.pop()
    if chosen == "vllm":
        if not asked:
            raise ConfigError(
                "engine is 'vllm', which answers problems and runs tasks, and none are asked for. Add --gsm8k, --boxed or "
                "--tasks; texts and chains need Transformers, the engine without --engine."
            )
        for files in both:
            choice.check_model(files)
    return chosen


def _on_vllm(both: Mapping[str, ModelFiles], device: torch.device) -> dict[str, Examinee]:
    return {
        who: OnVllm(files.name, files.trust_remote_code, str(device), _dtype(device)) for who, files in both.items()
    }


def _examined(examinees: Mapping[str, Examinee], questions: Questions, tell: OnPart) -> dict[str, Answered]:
    return {who: each.examine(questions, _steps(questions, who, tell)) for who, each in examinees.items()}


def _windows(tokenizer: Any, name: str, measures: Measures, prefix: Sequence[int], notice: Notice) -> Tensor:
    """Return a text's windows, int64 [W, T]: no more of it is read than they need."""

    def tell(text: str) -> None:
        notice(f"{name}: {text}")

    most = None if measures.max_tokens is None else measures.max_tokens // measures.seq_len
    windows = token_windows(tokenizer, documents(name), measures.seq_len, prefix, most, tell)
    if not len(windows):
        raise TextError(f"text {name!r} is shorter than one window of {measures.seq_len} tokens. Lower --seq-len.")
    return windows


def _check_lengths(models: Iterable[Any], seq_len: int) -> list[str]:
    """Return notices about windows that are longer than the models were made for; raises what `check_length` does."""
    found = [check_length(model, seq_len) for model in models]
    return list(dict.fromkeys(text for text in found if text))


def _prompts(tokenizer: Any, asked: Sequence[problems.Problem]) -> list[list[int]]:
    return [chat_tokens(tokenizer, [{"role": "user", "content": problem.request}]) for problem in asked]


def chain_prompts(tokenizer: Any, plan: ChainPlan) -> list[list[int]]:
    """Return each prompt's token ids: GSM8K test problems as a user would ask them."""
    return _prompts(tokenizer, problems.gsm8k(plan.count))


def _problem_sets(tokenizer: Any, gsm8k: int | None, boxed: Iterable[str | Path]) -> dict[str, ProblemSet]:
    sets = {}
    if gsm8k is not None:
        sets["gsm8k"] = _problem_set(tokenizer, problems.gsm8k(gsm8k), grading.same_number)
    for file in boxed:
        grading.require_math_verify()
        sets[str(file)] = _problem_set(tokenizer, problems.from_file(Path(file)), grading.same_boxed)
    return sets


def _problem_set(tokenizer: Any, asked: Sequence[problems.Problem], grade: Callable[[str, str], bool]) -> ProblemSet:
    return ProblemSet(_prompts(tokenizer, asked), lambda number, answer: grade(answer, asked[number].answer))


def _check_contexts(
    files: Iterable[ModelFiles],
    chains: ChainPlan | None,
    chain_prompts: list[list[int]],
    answers: AnswerPlan,
    sets: Mapping[str, ProblemSet],
) -> None:
    """Raise `ConfigError` when prompts and what is generated are longer than a model's longest sequence."""
    for context in (context_of(each.config) for each in files):
        if chains:
            check_context(chain_prompts, chains.tokens, context, "--chain-tokens")
        for each in sets.values():
            check_context(each.prompts, answers.tokens, context, "--answer-tokens")


def _steps(questions: Questions, who: str, tell: OnPart) -> Callable[[str], None]:
    """Return what `Examinee.examine` calls after each step; the user is told of a part when its first step is done."""
    begun: dict[str, Callable[[], None]] = {}

    def step(name: str) -> None:
        if name not in begun:
            label = name if who == "model" else f"{name}, the original"
            begun[name] = tell(label, len(questions.sets.get(name, [""])))
        begun[name]()

    return step


def _answers(
    answered: Mapping[str, Answered], tokenizer: Any, sets: Mapping[str, ProblemSet], seed: int
) -> dict[str, AnswerResults]:
    found = {}
    for name, each in sets.items():
        graded = {who: reasoning.grade(given.sets[name], tokenizer, each.is_right) for who, given in answered.items()}
        ours, theirs = graded["model"], graded.get("reference")
        pair = reasoning.compare(ours.outcomes, theirs.outcomes, seed) if theirs else None
        found[name] = AnswerResults(ours, theirs, pair)
    return found


def _tasks(answered: Mapping[str, Answered], seed: int) -> TaskResults:
    found = {who: each.tasks for who, each in answered.items() if each.tasks is not None}
    pairs = paired(found["model"], found["reference"], seed) if "reference" in found else None
    return TaskResults(found["model"], found.get("reference"), pairs)
