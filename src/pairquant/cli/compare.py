"""`pairquant compare`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from .app import HelpAll, app, console, option, quiet_libraries
from .display import followed, progress_bars, require_place
from .evaluation_options import (
    RUN,
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


@app.command(epilog="Example: pairquant compare MODEL MODEL-PARO MODEL-AWQ --chains 8 --speed --json compare.json")
def compare(
    original: Annotated[str, typer.Argument(help="What the others were made from.")],
    models: Annotated[list[str], typer.Argument(help="Ours, or any that Transformers loads.")],
    text: Texts = None,
    seq_len: SeqLen = 2048,
    max_tokens: MaxTokens = None,
    bos: Bos = "auto",
    chains: ChainCount = 0,
    chain_tokens: ChainTokens = 1024,
    gsm8k: Gsm8k = 0,
    answer_tokens: AnswerTokens = 1024,
    tasks: TaskNames = None,
    batch: Batch = 8,
    engine: AnsweringEngine = "auto",
    speed: Annotated[bool, option(RUN, "Also measure prefill and decoding speed.", "--speed")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    help_all: HelpAll = False,
) -> None:
    """Compare MODELS with their original: divergence, perplexity, chains of thought, answers, size, speed."""
    quiet_libraries()
    from ..evaluation.chains import ChainPlan
    from ..evaluation.reasoning import AnswerPlan
    from ..evaluation.results import Comparison
    from ..evaluation.speed import Workload
    from ..evaluation.tasks import TaskPlan
    from ..jobs.compare import compare as run
    from .comparison_tables import show

    require_place(json_file)
    names = names_in(tasks)
    with progress_bars() as bars:
        results = run(
            original,
            models,
            text or (),
            seq_len=seq_len,
            max_tokens=max_tokens,
            bos=bos,
            chains=ChainPlan(chains, chain_tokens, batch, seed) if chains else None,
            gsm8k=gsm8k or None,
            answers=AnswerPlan(answer_tokens, batch, seed=seed),
            tasks=TaskPlan(names, batch=batch, seed=seed) if names else None,
            speed=Workload(seed=seed) if speed else None,
            engine=engine,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            on_part=followed(bars),
        )
    found = Comparison.from_dict(results)
    show(found)
    for notice in dict.fromkeys(told for row in found.rows for told in row.evaluation.notices):
        console.print(f"[yellow]{escape(notice)}[/]")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
