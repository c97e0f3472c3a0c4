"""README.md: our numbers beside the published ones, from the result files; `reproduce.py page` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ablations

from . import rows
from .experiments import EXPERIMENTS, RECIPES, Recipe

PAGE = Path(__file__).with_name("README.md")
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
PAPER_WINDOWS = 2048
METHODS = ("FP16", "AWQ", "EfficientQAT", "QTIP", "ParoQuant")

#: Claim → the recipe that is better, the one that is worse; in the paper's tables 5 and 6.
DIRECTIONS = {
    "scales alone help (stage 1)": ("scales, stage 1", "none, stage 1"),
    "rotations alone help (stage 1)": ("rotations, stage 1", "none, stage 1"),
    "scales alone beat rotations alone (stage 1)": ("scales, stage 1", "rotations, stage 1"),
    "both beat scales alone (stage 1)": ("both, stage 1", "scales, stage 1"),
    "both beat rotations alone (stage 1)": ("both, stage 1", "rotations, stage 1"),
    "stage 2 helps without a transform": ("none, stage 2", "none, stage 1"),
    "stage 2 helps with both": ("paper", "both, stage 1"),
    "both beat scales alone (stage 2)": ("paper", "K = 0"),
    "both beat rotations alone (stage 2)": ("paper", "rotations, stage 2"),
    "rotations alone beat scales alone (stage 2)": ("rotations, stage 2", "K = 0"),
    "2 rotations beat none": ("K = 2", "K = 0"),
    "4 rotations beat 2": ("K = 4", "K = 2"),
    "8 rotations beat 4": ("paper", "K = 4"),
    "512 windows beat 128": ("512 windows", "128 windows"),
}

INTRODUCTION = """\
# The paper's tables, and ours

Written by `python benchmarks/paper/reproduce.py page` from [published.json](published.json) and
[benchmarks/results](../results); edit those, not this.

`python benchmarks/paper/reproduce.py` lists the tables and models, `… TABLE --model NAME` quantizes, evaluates, keeps the row and
renders this page, `--dry-run` prints the commands. NAME is a published model (hub names in [experiments.py](experiments.py); the
LLaMAs and GPQA need their licences accepted), a directory, a `.gguf` file, or `all`. Models and raw results go to `paper-runs`;
what exists is not made again.

**An empty cell** under a published method is a number that we have not found; under `original`, `paper`, `fast` or `best`, our own, it is
a run that has not been made yet; the command above the table makes it. `original` is the unquantized model measured by us, `paper` the paper's recipe in our code, `fast` and `best` ours. All
published numbers are for groups of 128 and 4 bits.

**The embedded model** is SmolLM2-135M-Instruct: groups of 64 (its width has no multiple of 128), calibrated on 64 × 1024 tokens of
WikiText-2, GSM8K and Grimms' tales. A model sixty times smaller on another text: compare directions, not values.
"""

DIFFERS = {
    "perplexity": """\
- WikiText2 is the same text, without a beginning-of-text token in front. On C4 the paper takes 256 random windows from single long
  documents, we the first 256 windows of documents packed end to end: compare the distance to `original`, not the value.
- Calibration text has the same three sources, drawn evenly, and the Pile chooses the epoch, as in the paper. The original leaves out
  documents longer than a window; we pack and cut. RedPajama's sample comes as a script, which current versions of `datasets` refuse;
  it is then read from the hub's own export (tested on a stand-in only), or from a copy: `--calibration sample.jsonl`.
- `best` uses 128 windows where `paper` uses 2048.
- The 70B `original` in 16 bits does not fit one GPU of 80 GB.""",
    "reasoning": """\
- The paper generates with Lighteval 0.8.1 on vLLM 0.10.1, we with `pairquant eval` on today's vLLM: the same prompt for AIME, the same
  temperature (0.6), length (32,768 tokens) and seeds (42, 0, 1, averaged); top-p and top-k as the model recommends, which for Qwen3
  adds a top-k of 20. Answers are compared by Math-Verify. One problem of AIME's 30 is 3.3 points.
- Choices of GPQA are answered by a letter in the box; the paper asks for a last line "Answer: X".
- The embedded model cannot do these. It is asked GSM8K problems, which are bundled, at most 512 tokens each; it solves hardly any.""",
    "mmlu-pro": """\
- As above, with one seed. Of AWQ only the number that the paper's text gives was legible, of EfficientQAT none.""",
    "zero-shot": """\
- lm-eval 0.4.13 instead of 0.4.9.1, its defaults, metric `acc` (not `acc_norm`), no chat template.
- Not run on the embedded model yet; the command is the same, with `--model embedded`.""",
    "throughput": """\
- An RTX A6000 there, an H100 and an H200 here: twice the bandwidth and more makes what does not move weights a larger part.
- Our 8B model has LLaMA-3-8B's shape and random weights, and q, k, v share a transform, as gate and up do. "Without rotations" is
  plain int4 on our kernels, the nearest to AWQ; the paper's ParoQuant runs at 0.93 of AWQ's speed on LLaMA-3-8B.
- Of the linears alone, against AWQ's own best kernel (Marlin) and the original's code: the second table.""",
    "components": """\
- "Stage 1" is without stage 2, so that "none, stage 1" is rounding to nearest; "scales" is K = 0.
- The paper trains on 2048 × 2048 tokens, the embedded model on 64 × 1024: 4 steps an epoch, so stage 2 has less to learn from.
- Perplexity on C4 there, on WikiText2 here; KL is the mean divergence from the unquantized model per token.""",
    "samples-and-rotations": """\
- Windows are of 2048 tokens there, of 1024 here, and 64 of them unless a row says otherwise.
- `fast` is our recipe, `paper` the paper's. K = 0 has channel scales and no rotations.""",
    "w4a4": """\
- Activations are rounded and multiplied in 16 bits: this is simulated, as in the paper.
- Our weights have 4-bit codes with scales and zero points for groups of 128 in both formats; the paper's MXFP4 rows store weights in MXFP4,
  too. Our int4 activations have a scale for each group, MXFP4 one for each 32 channels.
- `paper` fits one linear after the other on what the quantized ones before it put out (appendix A.3), `best` is our recipe; both on 128 windows.""",
    "quantization-time": """\
- Ours is extrapolated from a few blocks of LLaMA-3-8B's shape with random weights.
- `paper` was timed on 512 windows, a quarter of the paper's; time grows with the windows.""",
    "weights": """\
- The command makes `pairquant report`'s page, which shows a weight before and after the transform and a pair of its channels.""",
    "loss-curves": """\
- The paper fits single layers of LLaMA-3-8B on 128 samples of the Pile for 200 steps at rate 0.01, and draws curves without numbers. Its
  finding, that 8 independent rotations with scales nearly reach a full rotation, is seen here, too: they beat one without scales.
- Here a full rotation is one orthogonal matrix for each group; there one for the layer.""",
    "rotation-kernel": """\
- One token, our kernel, the same fast Hadamard transform. 14336 and 32768 channels were measured on one side only.""",
}


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def published(name: str, **where: Any) -> Mapping[str, float]:
    """The values of the row that `where` describes; empty where there is none."""
    found = [row["values"] for row in PUBLISHED["tables"][name]["rows"] if where.items() <= row.items()]
    return found[0] if found else {}


def measured(name: str, model: str, recipe: str, metric: str, results: Path) -> float | None:
    row = rows.find(name, model, recipe, results)
    return row["numbers"].get(metric) if row else None


def beside(name: str, digits: int, results: Path) -> str:
    """Model by model and metric by metric: the published methods, then our recipes."""
    entries = PUBLISHED["tables"][name]["rows"]
    methods = [method for method in METHODS if any(method in entry["values"] for entry in entries)]
    recipes = EXPERIMENTS[name].recipes
    body = [
        [entry["model"], entry["metric"], *(shown(entry["values"].get(method), digits) for method in methods),
         *(shown(measured(name, entry["model"], recipe, entry["metric"], results), digits) for recipe in recipes)]
        for entry in entries
    ]  # fmt: skip
    return table(["model", "", *methods, *(f"ours: `{recipe}`" for recipe in recipes)], body)


def perplexity(results: Path) -> str:
    ours = embedded_table(["none, stage 1", "paper", "fast", "best"], {"none, stage 1": "round to nearest"}, results)
    return "\n\n".join([beside("perplexity", 2, results), "The embedded model:", ours])


def embedded_table(recipes: Iterable[str], titles: Mapping[str, str], results: Path) -> str:
    """What bench_quality.py measured of recipes of ours."""
    body = [[titles.get(name, f"`{name}`"), *_qualities(embedded_row(name, results))] for name in recipes]
    return table(["recipe", *QUALITIES], body)


QUALITIES = ("WikiText2 perplexity", "KL", "GSM8K KL")


def _qualities(row: dict[str, Any] | None) -> list[str]:
    wiki, gsm = (row["wikitext2-test"], row["gsm8k-test"]) if row else ({}, {})
    return [shown(wiki.get("perplexity"), 2), shown(wiki.get("kl"), 4), shown(gsm.get("kl"), 4)]


def ablation(name: str, results: Path) -> str:
    """A table of ablations.py, without its times: processes shared the GPU."""
    found = ablations.finished(results / "ablations.jsonl")
    recipes = {label: ablations.configured(recipe) for label, recipe in ablations.TABLES[name].items()}
    return table([name, *QUALITIES], [[label, *_qualities(found.get(config))] for label, config in recipes.items()])


def reasoning(results: Path) -> str:
    answered = [row for row in rows.read("reasoning", results) if "gsm8k" in row["numbers"]]
    body = [
        [f"`{row['recipe']}`", *(shown(row["numbers"].get(f"gsm8k{part}"), digits) for part, digits in
                                 ((", original", 1), ("", 1), (", no worse", 2)))]
        for row in answered
    ]  # fmt: skip
    ours = table(["recipe", "original", "quantized", "probability of being no worse"], body) if body else "Not run yet."
    return "\n\n".join([beside("reasoning", 1, results), "The embedded model on GSM8K test problems, %:", ours])


def throughput(results: Path) -> str:
    generated = []
    for found in _all("generate*.json", "models", results):
        speeds = {name: model["tokens_per_s"] for name, model in found["models"].items()}
        ours, plain = speeds["pairquant"], speeds["int4 without rotation"]
        compiled = "torch.compile" if found["compiled"] else "not compiled"
        generated.append(
            [f"{found['device']}, {compiled}", *(f"{value:.0f}" for value in (speeds["fp16"], plain, ours)),
             f"{ours / speeds['fp16']:.2f}", f"{ours / plain:.2f}"]
        )  # fmt: skip
    whole = table(
        ["LLaMA-3-8B's shape on", "fp16", "without rotations", "ours", "ours / fp16", "ours / without"], generated
    )
    blocks = []
    for found in _all("kernels*.json", "blocks", results):
        for model, block in found["blocks"].items():
            one = block["total"]["1"]
            names = ("fp16", "AWQ-Marlin", "original", "pairquant", "pairquant, unshared")
            blocks.append([found["device"], model, *(f"{one[name]:.1f}" for name in names),
                           f"{one['AWQ-Marlin'] / one['pairquant']:.2f}"])  # fmt: skip
    header = ["µs for a block's linears, one token", "", "fp16", "AWQ-Marlin", "original ParoQuant", "ours",
              "ours, a transform each", "AWQ / ours"]  # fmt: skip
    return "\n\n".join([beside("throughput", 0, results), "Ours:", whole, table(header, blocks)])


def bench_recipe(recipe: Recipe) -> str:
    """As bench_quality.py writes it, with that script's number of windows unless the recipe is about it."""
    about_text = recipe.preset == "paper" and recipe.samples != PAPER_WINDOWS
    samples = [f"samples={recipe.samples}"] if about_text else []
    return f"{recipe.preset}:" + ",".join([f"rotations={recipe.rotations}", *samples, *recipe.settings])


def embedded_row(name: str, results: Path) -> dict[str, Any] | None:
    """A recipe of the paper's, on the embedded model; None: not run."""
    recipe = RECIPES[name]
    if recipe is None or recipe.calibration:
        return None
    found = ablations.finished(results / "ablations.jsonl")
    return found.get(ablations.configured(bench_recipe(recipe)))


def components(results: Path) -> str:
    body = []
    for name in EXPERIMENTS["components"].recipes:
        body.append(
            [_component(name), shown(published("components", recipe=name)["C4"], 2),
             shown(measured("components", "llama-3-8b", name, "C4", results), 2),
             *_qualities(embedded_row(name, results))]
        )  # fmt: skip
    header = [
        "transform and stages",
        "published: C4",
        "ours, LLaMA-3-8B: C4",
        *(f"embedded: {each}" for each in QUALITIES),
    ]
    return "\n\n".join(
        [table(header, body), "Do the paper's findings hold on the embedded model?", directions(results)]
    )


def _component(name: str) -> str:
    return {"K = 0": "scales, stage 2", "paper": "both, stage 2"}.get(name, name)


def directions(results: Path) -> str:
    """Each of the paper's findings there and here."""
    body = []
    for claim, (better, worse) in DIRECTIONS.items():
        there = [_published_c4(name) for name in (better, worse)]
        here = [embedded_row(name, results) for name in (better, worse)]
        ours = [[row["wikitext2-test"][part] if row else None for row in here] for part in ("perplexity", "kl")]
        body.append([claim, verdict(*there, 2), verdict(*ours[0], 2), verdict(*ours[1], 4)])
    return table(["finding", "the paper, C4", "embedded, WikiText2", "embedded, KL"], body)


def _published_c4(recipe: str) -> float | None:
    return (published("components", recipe=recipe) or published("samples-and-rotations", recipe=recipe)).get("C4")


def verdict(better: float | None, worse: float | None, digits: int) -> str:
    """Whether the first is lower, as shown."""
    if better is None or worse is None:
        return ""
    first, second = f"{better:.{digits}f}", f"{worse:.{digits}f}"
    if first == second:
        return f"equal: {first}"
    return f"yes: {first} < {second}" if better < worse else f"**no**: {first} > {second}"


def samples_and_rotations(results: Path) -> str:
    body = [
        ["2048 windows, K = 8" if name == "paper" else name,
         *(shown(published("samples-and-rotations", recipe=name).get(metric), digits) for metric, digits in
           (("C4", 2), ("MMLU-Pro", 1))),
         shown(measured("samples-and-rotations", "llama-3-8b", name, "C4", results), 2)]
        for name in EXPERIMENTS["samples-and-rotations"].recipes
    ]  # fmt: skip
    ours = [ablation(name, results) for name in ("rotations", "samples", "text")]
    header = ["", "published: C4", "published: MMLU-Pro", "ours, LLaMA-3-8B: C4"]
    return "\n\n".join([table(header, body), "The embedded model:", *ours])


def w4a4(results: Path) -> str:
    entries = PUBLISHED["tables"]["w4a4"]["rows"]
    metrics = list(entries[0]["values"])
    digits = {"WikiText2": 2, "C4": 2}
    body = [
        [entry["format"], entry["method"], *(shown(entry["values"][m], digits.get(m, 1)) for m in metrics)]
        for entry in entries
    ]
    perplexities = ("WikiText2", "C4")
    ours = [
        [
            f"`{recipe}`",
            *(
                shown(measured("w4a4", model, recipe, m, results), 2)
                for model in ("qwen3-8b", "embedded")
                for m in perplexities
            ),
        ]
        for recipe in EXPERIMENTS["w4a4"].recipes
    ]
    header = ["ours", *(f"{model}: {m}" for model in ("Qwen3-8B", "the embedded model") for m in perplexities)]
    return "\n\n".join([table(["format", "method", *metrics], body), table(header, ours)])


def quantization_time(results: Path) -> str:
    body = []
    for entry in PUBLISHED["tables"]["quantization-time"]["rows"]:
        values = entry["values"]
        body.append(
            [f"{entry['method']}, published", f"{values['windows']} × {values['tokens each']}", f"{values['hours']} h"]
        )
    for found in _all("quantize*.json", "runs", results):
        windows = " × ".join(map(str, found["tokens"]))
        for name, run in found["runs"].items():
            shape, _, how = name.partition(" ")
            if shape == "llama-3-8b":
                text = "as named" if "512" in how else windows
                body.append([f"ours on {found['device']}: {how}", text, f"{run['whole_model_minutes']:.2f} min"])
    return table(["LLaMA-3-8B", "calibration tokens", "time"], body)


def loss_curves(results: Path) -> str:
    found = _json(results / "transforms-cpu.json")
    body = [[name, f"{losses[0]:.5f}", f"{min(losses):.5f}"] for name, losses in found["curves"].items()]
    title = f"relative error of `{found['linear']}`'s output, embedded model"
    return table([title, "first", f"best of {found['steps']} steps"], body)


def rotation_kernel(results: Path) -> str:
    speeds: dict[int, dict[str, float]] = {
        row["channels"]: {"published": row["values"]["speed-up"]}
        for row in PUBLISHED["tables"]["rotation-kernel"]["rows"]
    }
    devices = []
    for found in _all("kernels*.json", "rotate", results):
        devices.append(found["device"])
        for row in found["rotate"]:
            if row["tokens"] == 1:
                speeds.setdefault(row["channels"], {})[found["device"]] = row["hadamard"] / row["rotate"]
    names = ["published", *devices]
    body = [[str(channels), *(shown(speeds[channels].get(name), 2) for name in names)] for channels in sorted(speeds)]
    return table(["channels", "published, RTX A6000", *(f"ours, {device}" for device in devices)], body)


SECTIONS: dict[str, Callable[[Path], str]] = {
    "perplexity": perplexity,
    "reasoning": reasoning,
    "mmlu-pro": lambda results: beside("mmlu-pro", 1, results),
    "zero-shot": lambda results: beside("zero-shot", 1, results),
    "throughput": throughput,
    "components": components,
    "samples-and-rotations": samples_and_rotations,
    "w4a4": w4a4,
    "quantization-time": quantization_time,
    "weights": lambda results: "",
    "loss-curves": loss_curves,
    "rotation-kernel": rotation_kernel,
}


def commands(name: str) -> str:
    experiment = EXPERIMENTS[name]
    start = f"python benchmarks/paper/reproduce.py {name}"
    models = [model for model in experiment.models if model != "embedded"]
    lines = []
    if models:
        others = f"    # or {', '.join(models[1:])}" if models[1:] else ""
        lines.append(f"{start} --model {models[0]}{others}")
    if experiment.scripts or "embedded" in experiment.models:
        lines.append(f"{start}    # {experiment.on}")
    return "\n".join(["```bash", *lines, "```"]) if lines else ""


def section(name: str, results: Path) -> str:
    experiment = EXPERIMENTS[name]
    entry = PUBLISHED["tables"].get(name)
    source = (
        f"Published: {entry['of']} [{entry['source']}]." if entry else f"Published: {experiment.of}, without numbers."
    )
    parts = [f"## {experiment.title} ({experiment.of})", source, commands(name), SECTIONS[name](results), DIFFERS[name]]
    return "\n\n".join(part for part in parts if part)


def sources() -> str:
    lines = [
        f"- **[{key}]** {each['title']}; <{each['url']}>; {each['note']}." for key, each in PUBLISHED["sources"].items()
    ]
    return "\n".join(["## Where the published numbers are from", "", *lines])


def render(results: Path = rows.RESULTS) -> str:
    return "\n\n".join([INTRODUCTION.strip(), *(section(name, results) for name in EXPERIMENTS), sources()]) + "\n"


def _all(pattern: str, entry: str, results: Path) -> list[Any]:
    """The result files of a benchmark that have an entry of that name; of several from one device, those that the
    benchmarks write where nothing else is said (`kernels.json`) before the kept ones (`kernels-h100.json`).
    """
    files = sorted(results.glob(pattern), key=lambda file: ("-" not in file.stem, file.name))
    return list({found["device"]: found for found in map(_json, files) if entry in found}.values())


def _json(file: Path) -> Any:
    return json.loads(file.read_text())
