"""`pairquant eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .app import Device, Model, Trust, app, console, quiet_libraries
from .display import followed, progress_bars, require_place
from .evaluation_options import (
    AnsweringEngine,
    AnswerTokens,
    Batch,
    Bos,
    ChainCount,
    ChainTokens,
    Gsm8k,
    JsonFile,
    MaxTokens,
    Seed,
    SeqLen,
    TaskNames,
    Texts,
    names_in,
)


@app.command(name="eval")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The original model: KL, agreement, paired tests.")] = None,
    text: Texts = None,
    seq_len: SeqLen = 2048,
    max_tokens: MaxTokens = None,
    bos: Bos = "auto",
    chains: ChainCount = 0,
    chain_tokens: ChainTokens = 1024,
    gsm8k: Gsm8k = 0,
    boxed: Annotated[
        list[Path] | None, typer.Option(help=r"Problems (.jsonl) to answer in \boxed{}; repeat for more.")
    ] = None,
    answer_tokens: AnswerTokens = 1024,
    temperature: Annotated[float, typer.Option(help="Of answers; 0 is greedy.")] = 0.0,
    tasks: TaskNames = None,
    task_dir: Annotated[Path | None, typer.Option(help="Where lm-eval finds more tasks (YAML).")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Questions of each task. Default: all.")] = None,
    batch: Batch = 8,
    engine: AnsweringEngine = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Accuracy of MODEL, alone and beside the original."""
    quiet_libraries()
    from ..evaluation.chains import ChainPlan
    from ..evaluation.reasoning import AnswerPlan
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
    show(results)
    for notice in results["notices"]:
        console.print(f"[yellow]{escape(notice)}[/]")
    by = f", answers by vLLM {results['versions']['vllm']}" if results["engine"] == "vllm" else ""
    console.print(f"{results['bits_per_weight']:.2f} bits per weight, on {results['device']}{by}")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
