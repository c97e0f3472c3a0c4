"""Divergence along long chains of thought, by place, and graded answers, of recipes and plain models, in one run.

    python benchmarks/bench_reasoning.py MODEL [RECIPE …] --output FILE [--plain NAME=DIR …] [--chains 128 4096]
        [--problems 1319 512] [--group-size 64] [--device auto]

RECIPE: as in bench_quality.py, in the setting of the project's results table (setting.py). --plain: a plain model that
another quantizer made (`bench_peers.py --keep`). --chains COUNT TOKENS: the original samples a chain for each of so many
GSM8K test problems, at temperature 1; a JSON line for each model and part of the chains says how far the model is from
the original there. --problems COUNT TOKENS: the original and every model answer so many problems greedily; a JSON line for
each, with the outcomes paired with the original's.

Chains differ in length, and those that go on for long are not like the others. So each part is measured twice: over all
chains that reach it, and over those alone that reach the last part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from quantized import quantized, surroundings
from recipes import config_from
from setting import SETTING
from torch import Tensor, nn

from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import context_of
from pairquant.evaluation import problems
from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.generation import GREEDY, SAMPLED, Continuation, check_context, generate
from pairquant.evaluation.grading import boxed, same_number
from pairquant.evaluation.quality import score
from pairquant.evaluation.reasoning import Answers, compare, grade
from pairquant.evaluation.statistics import bootstrap_mean, wilson
from pairquant.jobs.evaluate import chain_prompts
from pairquant.support.devices import resolve_device

#: Where the parts of a chain begin and end, in tokens.
EDGES = (0, 128, 256, 512, 1024, 2048, 3072, 4096)
#: Answers at once: a step of a small model takes as long for one as for hundreds.
BATCH = 660


def parts(kl: Sequence[Tensor], tokens: int) -> Iterator[dict[str, Any]]:
    """Of chains' divergences, float32 [n] each: every part's mean per token with its 95 % interval by bootstrap over
    chains, weighted by their tokens in it; `of` says which chains.
    """
    spans = list(pairwise([*(edge for edge in EDGES if edge < tokens), tokens]))
    longest = [row for row in kl if len(row) > spans[-1][0]]
    for of, rows in (("all", kl), ("longest", longest)):
        for start, end in spans:
            if inside := [row[start:end].double() for row in rows if len(row) > start]:
                lengths, means = [len(row) for row in inside], [row.mean().item() for row in inside]
                yield {
                    "of": of, "start": start, "end": end, "chains": len(inside), "tokens": sum(lengths),
                    "kl": torch.cat(inside).mean().item(), "kl_interval": bootstrap_mean(means, lengths),
                }  # fmt: skip


def final(answer: str) -> str:
    """The part of an answer that a grader takes the number from."""
    box = boxed(answer)
    return answer.rpartition("####")[2] if box is None else box


def models(
    options: argparse.Namespace, original: nn.Module, tokenizer: Any
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """What is measured, one after the other, with what rows say of it."""
    setting = {**SETTING, "group_size": options.group_size}
    for recipe, config in [(recipe, config_from(recipe, **setting)) for recipe in options.recipes]:
        made = quantized(original, tokenizer, config)
        yield {"recipe": recipe, "bits_per_weight": round(made.bits_per_weight, 3)}, made.model
    for name, folder in (each.split("=", 1) for each in options.plain):
        facts = json.loads(Path(folder, "facts.json").read_text())
        model = ModelFiles.find(folder).model(torch.float32, original.device)
        yield {"recipe": name, "bits_per_weight": facts["bits_per_weight"]}, model


class Answering:
    """GSM8K test problems, answered greedily and graded; the original's answers are kept to compare with."""

    def __init__(self, original: nn.Module, tokenizer: Any, count: int, tokens: int) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        self.problems = problems.gsm8k(count)
        self.prompts = chain_prompts(tokenizer, ChainPlan(count))
        check_context(self.prompts, tokens, context_of(original.config), "--problems")
        self.expected, self.texts, self.seconds = self._answers(original)

    def row(self, model: nn.Module) -> dict[str, Any]:
        """same_answer: the share of problems for which the final number is the original's, right or wrong."""
        found, texts, seconds = self._answers(model)
        same = sum(same_number(mine, final(its)) for mine, its in zip(texts, self.texts, strict=True))
        return {
            **facts(found), "paired": asdict(compare(found.outcomes, self.expected.outcomes)),
            "same_answer": same / len(texts), "same_answer_interval": wilson(same, len(texts)),
            "seconds": round(seconds, 1),
        }  # fmt: skip

    def _answers(self, model: nn.Module) -> tuple[Answers, list[str], float]:
        start = time.perf_counter()
        found: list[Continuation] = generate(model, self.prompts, self.tokens, GREEDY, batch=BATCH)
        texts = self.tokenizer.batch_decode([each.tokens for each in found], skip_special_tokens=True)
        graded = grade(found, self.tokenizer, lambda number, text: same_number(text, self.problems[number].answer))
        return graded, texts, time.perf_counter() - start


def facts(answers: Answers) -> dict[str, Any]:
    """All but the outcomes, problem by problem."""
    return {name: value for name, value in asdict(answers).items() if name != "outcomes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--plain", nargs="*", default=[], metavar="NAME=DIR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--chains", nargs=2, type=int, metavar=("COUNT", "TOKENS"))
    parser.add_argument("--problems", nargs=2, type=int, metavar=("COUNT", "TOKENS"))
    parser.add_argument("--group-size", type=int, default=SETTING["group_size"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    device = resolve_device(options.device)
    files = ModelFiles.find(options.model)
    tokenizer, original = files.tokenizer(), files.model(torch.float32, device)

    def note(row: dict[str, Any]) -> None:
        line = json.dumps({"model": Path(options.model).name, **row, **surroundings(device)})
        print(line, flush=True)
        with options.output.open("a") as out:
            out.write(line + "\n")

    answering = sampled = None
    if options.chains:
        count, tokens = options.chains
        prompts = chain_prompts(tokenizer, ChainPlan(count))
        check_context(prompts, tokens, context_of(files.config), "--chains")
        start = time.perf_counter()
        sampled = generate(original, prompts, tokens, SAMPLED, batch=count)
        ended = sum(chain.finished for chain in sampled)
        print(f"{count} chains in {time.perf_counter() - start:.0f} s, {ended} ended by themselves", flush=True)
    if options.problems:
        answering = Answering(original, tokenizer, *options.problems)
        note({"what": "answers", "recipe": "original", **facts(answering.expected)})
    for what, model in models(options, original, tokenizer):
        if sampled is not None:
            windows = [torch.tensor([*p, *c.tokens], device=device) for p, c in zip(prompts, sampled, strict=True)]
            scores = [score(model, w, original, start=len(p)).kl for w, p in zip(windows, prompts, strict=True)]
            for part in parts([kl for kl in scores if kl is not None], tokens):
                note({"what": "chains", **what, **part})
        if answering is not None:
            note({"what": "answers", **what, **answering.row(model)})


if __name__ == "__main__":
    main()
