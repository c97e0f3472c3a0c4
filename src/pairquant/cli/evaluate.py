"""`pairquant eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from ..spec.activations import UNROUNDED
from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import followed, progress_bars, require_place
from .evaluation_options import (
    ANSWERS,
    TEXTS,
    AnsweringEngine,
    AnswerTokens,
    Batch,
    Bos,
    ChainCount,
    ChainTokens,
    Device,
    Gsm8k,
    JsonFile,
    MaxTokens,
    Seed,
    SeqLen,
    TaskNames,
    Texts,
    Trust,
    names_in,
)


@app.command("eval", epilog="Example: pairquant eval MODEL-PARO --reference MODEL --gsm8k 200 --json eval.json")
def evaluate(
    model: Model,
    reference: Annotated[str | None, option(TEXTS, "The original, to measure the distance from.")] = None,
    text: Texts = None,
    seq_len: SeqLen = 2048,
    max_tokens: MaxTokens = None,
    bos: Bos = "auto",
    chains: ChainCount = 0,
    chain_tokens: ChainTokens = 1024,
    gsm8k: Gsm8k = 0,
    boxed: Annotated[
        list[Path] | None, option(ANSWERS, r"Problems (.jsonl) to answer in \boxed{}; repeat for more.", rare=True)
    ] = None,
    answer_tokens: AnswerTokens = 1024,
    temperature: Annotated[float, option(ANSWERS, "Temperature of answers; 0 is greedy.", rare=True)] = 0.0,
    tasks: TaskNames = None,
    task_dir: Annotated[Path | None, option(ANSWERS, "Where lm-eval finds more tasks (YAML).", rare=True)] = None,
    task_limit: Annotated[int | None, option(ANSWERS, "Questions of each task. Default: all.", rare=True)] = None,
    batch: Batch = 8,
    engine: AnsweringEngine = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    help_all: HelpAll = False,
) -> None:
    """Measure the accuracy of MODEL, alone and beside the original."""
    quiet_libraries()
    from ..evaluation.chains import ChainPlan
    from ..evaluation.reasoning import AnswerPlan
    from ..evaluation.results import Evaluation
    from ..evaluation.tasks import TaskPlan
    from ..jobs.evaluate import evaluate as run
    from .evaluation_tables import show

    require_place(json_file)
    names = names_in(tasks)
    with progress_bars() as bars:
        results = run(
            model,
            reference,
            text or (),
            seq_len=seq_len,
            max_tokens=max_tokens,
            bos=bos,
            chains=ChainPlan(chains, chain_tokens, batch, seed) if chains else None,
            gsm8k=gsm8k or None,
            boxed=boxed or (),
            answers=AnswerPlan(answer_tokens, batch, temperature, seed),
            tasks=TaskPlan(names, task_dir, task_limit, batch, seed) if names else None,
            engine=engine,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            on_windows=followed(bars),
        )
    found = Evaluation.from_dict(results)
    show(found)
    for notice in found.notices:
        console.print(f"[yellow]{escape(notice)}[/]")
    by = f", answers by vLLM {found.versions['vllm']}" if found.engine == "vllm" else ""
    rounds = "" if found.activations in (None, UNROUNDED) else f", {found.activations} activations"
    bits = "unknown" if found.bits_per_weight is None else f"{found.bits_per_weight:.2f}"
    console.print(f"{bits} bits per weight{rounds}, on {found.device}{by}")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
