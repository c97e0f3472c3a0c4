"""How good a model is, alone and beside the original it was quantized from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.read import Checkpoint, ModelFiles
from .devices import resolve_device
from .engines.engine import chat_tokens, context_of
from .environment import device_name, versions
from .errors import ConfigError, TextError
from .evaluation import chains as along_chains
from .evaluation import grading, problems, quality, reasoning
from .evaluation.chains import ChainPlan
from .evaluation.generation import check_context
from .evaluation.reasoning import AnswerPlan
from .evaluation.tasks import TaskPlan, Tasks, paired
from .text import BUNDLED_TEST, documents, token_windows

#: Told what is coming and how many steps it takes; returns what to call after each.
OnPart = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Models:
    """The model, the original if there is one, and the tokenizer of both."""

    network: Any
    reference: Any | None
    tokenizer: Any

    def named(self) -> dict[str, Any]:
        return {"model": self.network} | ({"reference": self.reference} if self.reference is not None else {})


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
    chains: ChainPlan | None = None,
    gsm8k: int | None = None,
    boxed: Iterable[str | Path] = (),
    answers: AnswerPlan | None = None,
    tasks: TaskPlan | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_windows: OnPart | None = None,
) -> dict[str, Any]:
    """Perplexity of each text, and with a reference mean token KL(reference ‖ model) in nats and top-1 agreement.

    texts: as for calibration (see `text`); by default the bundled GSM8K test problems. Each is cut into windows of
    seq_len tokens, the first max_tokens of them used. chains: divergence along the reference's own chains of thought.
    gsm8k: so many of the GSM8K test problems, boxed: files of problems (see `problems.from_file`), answered as `answers`
    says. tasks: of lm-eval. seed: the bootstrap's. `on_windows(name, count)` is told what is coming and returns what to
    call after each step.

    Returns {"model", "reference", "texts": {name: `Quality`}, "bits_per_weight", "device", "versions"}, and as asked
    "chains": `ChainQuality` and its "plan"; "answers": {name: {"model": `Answers`, "reference", "paired": `Paired`}} and
    their plan as "answer_plan"; "tasks": {"model": `Metrics`, "reference", "paired"}; ready for JSON. Everything that can
    be wrong with what is asked is told before a model is loaded.
    """
    target, tell = resolve_device(device), on_windows or (lambda name, count: lambda: None)
    if seq_len < 2 or (max_tokens is not None and max_tokens < seq_len):
        raise ConfigError(f"max_tokens is {max_tokens}, seq_len {seq_len}: allowed is 2 ≤ seq_len ≤ max_tokens")
    if chains and reference is None:
        raise ConfigError("chains are sampled from the original model, and none is given. Add --reference.")
    files = ModelFiles.find(str(model), trust_remote_code)
    original = ModelFiles.find(str(reference), trust_remote_code) if reference is not None else None
    tokenizer, answers = files.tokenizer(), answers or AnswerPlan()
    windows = {name: _windows(tokenizer, name, seq_len, max_tokens) for name in tuple(texts) or (BUNDLED_TEST,)}
    chain_prompts = _prompts(tokenizer, problems.gsm8k(chains.count)) if chains else []
    sets = _problem_sets(tokenizer, gsm8k, boxed)
    _check_contexts([f for f in (files, original) if f], chains, chain_prompts, answers, sets)
    found_tasks = Tasks(tasks) if tasks else None

    models = _load(files, original, tokenizer, target)
    results: dict[str, Any] = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "texts": {
            name: asdict(quality.measure(models.network, batch, models.reference, tell(name, len(batch)), seed))
            for name, batch in windows.items()
        },
    }
    if chains:
        step = tell("chains", 4 * chains.count)
        measured = along_chains.measure(models.network, models.reference, chain_prompts, chains, step)
        results["chains"] = asdict(measured) | {"plan": asdict(chains)}
    if sets:
        results["answers"] = {name: _answers(models, name, each, answers, tell) for name, each in sets.items()}
        results["answer_plan"] = asdict(answers)
    if found_tasks:
        results["tasks"] = _tasks(models, found_tasks, tell)
    return results | {
        "bits_per_weight": bits_per_weight(files, models.network),
        "device": device_name(target),
        "versions": versions() | ({"lm-eval": found_tasks.version} if found_tasks else {}),
    }


def load(files: ModelFiles, device: torch.device) -> Any:
    """The model, ready to run: float32 on a CPU (the fastest there), its stored dtype on a GPU."""
    return files.model(torch.float32 if device.type == "cpu" else "auto", device)


def bits_per_weight(files: ModelFiles, network: nn.Module) -> float:
    """Of a packed checkpoint: over its quantized linears. Of a plain model: its files' size over its parameters."""
    if files.quantization is not None:
        return Checkpoint.open(files).bits_per_weight()
    return files.size_bytes() * 8 / sum(p.numel() for p in network.parameters())


def _load(files: ModelFiles, original: ModelFiles | None, tokenizer: Any, device: torch.device) -> Models:
    network = load(files, device)
    reference = load(original, device) if original else None
    if reference is not None and reference.config.vocab_size != network.config.vocab_size:
        raise ConfigError(
            f"the vocabularies differ: {network.config.vocab_size} and {reference.config.vocab_size} tokens. "
            "The reference must be the model that was quantized."
        )
    return Models(network, reference, tokenizer)


def _windows(tokenizer: Any, name: str, seq_len: int, max_tokens: int | None) -> Tensor:
    windows = token_windows(tokenizer, documents(name), seq_len)
    if not len(windows):
        raise TextError(f"text {name!r} is shorter than one window of {seq_len} tokens. Lower --seq-len.")
    return windows if max_tokens is None else windows[: max_tokens // seq_len]


def _prompts(tokenizer: Any, asked: Sequence[problems.Problem]) -> list[list[int]]:
    return [chat_tokens(tokenizer, [{"role": "user", "content": problem.request}]) for problem in asked]


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
    files: Sequence[ModelFiles],
    chains: ChainPlan | None,
    chain_prompts: list[list[int]],
    answers: AnswerPlan,
    sets: Mapping[str, ProblemSet],
) -> None:
    """Raises `ConfigError` when prompts and what is generated are longer than a model's longest sequence."""
    for context in (context_of(each.config) for each in files):
        if chains:
            check_context(chain_prompts, chains.tokens, context, "--chain-tokens")
        for each in sets.values():
            check_context(each.prompts, answers.tokens, context, "--answer-tokens")


def _answers(models: Models, name: str, asked: ProblemSet, plan: AnswerPlan, tell: OnPart) -> dict[str, Any]:
    found = {}
    for who, network in models.named().items():
        step = tell(name if who == "model" else f"{name}, the original", len(asked.prompts))
        found[who] = reasoning.answer(network, models.tokenizer, asked.prompts, asked.is_right, plan, step)
    pairs = None
    if "reference" in found:
        pairs = reasoning.compare(found["model"].outcomes, found["reference"].outcomes, plan.seed)
    return {
        "model": asdict(found["model"]),
        "reference": asdict(found["reference"]) if pairs else None,
        "paired": asdict(pairs) if pairs else None,
    }


def _tasks(models: Models, tasks: Tasks, tell: OnPart) -> dict[str, Any]:
    step = tell("tasks", len(models.named()))
    found = {}
    for who, network in models.named().items():
        found[who] = tasks.run(network, models.tokenizer)
        step()
    pairs = paired(found["model"], found["reference"], tasks.plan.seed) if "reference" in found else None
    return {"model": _plain(found["model"]), "reference": _plain(found.get("reference")), "paired": _plain(pairs)}


def _plain(rows: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
    """Task → metric → a data class, as plain dictionaries."""
    if rows is None:
        return None
    return {task: {name: asdict(value) for name, value in row.items()} for task, row in rows.items()}
