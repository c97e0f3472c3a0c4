"""Measures speed and memory of a model, and of the original beside it, each in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.read import ModelFiles
from ..engines import choice
from ..engines.engine import EngineOptions, context_of
from ..evaluation.results import ModelSpeed, SpeedResults
from ..evaluation.speed import PeakMemory, Workload, measure
from ..support.environment import device_name, versions
from ..support.processes import in_own_process


def bench(
    model: str | Path,
    reference: str | Path | None = None,
    workload: Workload | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    compile: bool | None = None,
    trust_remote_code: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure prefill and decoding speed, time to first token, peak memory and size; ready for JSON.

    Returns the entries of `evaluation.results.SpeedResults`. `on_stage` is told what is being done. Models run in spawned
    processes: call it from a script below `if __name__ == "__main__":`. Raises `ConfigError` and `SourceError` before
    anything is loaded, `ResourceError` when a process dies.
    """
    names = [str(name) for name in (model, reference) if name is not None]
    found = measure_speed(
        names, workload, engine=engine, device=device, dtype=dtype, compile=compile,
        trust_remote_code=trust_remote_code, on_stage=on_stage,
    )  # fmt: skip
    return found.to_dict()


def measure_speed(
    names: Sequence[str],
    workload: Workload | None,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    compile: bool | None = None,
    trust_remote_code: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> SpeedResults:
    """Do what `bench` does, for a model and, if it is named too, the original."""
    workload = workload or Workload()
    tell = on_stage or (lambda stage: None)
    found = [ModelFiles.find(name, trust_remote_code) for name in names]
    chosen = choice.choose(engine, found[0], prefer_vllm=choice.gpu_wanted(device) and not any(f.gguf for f in found))
    options = EngineOptions(device, dtype, compile, max(workload.batches), workload.sequence_tokens)
    for files in found:
        choice.choose(chosen, files, prefer_vllm=False)
        choice.check_model(files)
        workload.check_context(context_of(files.config))
    measured = [
        in_own_process(
            measure_model, Job(name, trust_remote_code, chosen, options, workload), tell, "--batch or --prompt-tokens"
        )
        for name in names
    ]
    environments = [entry.pop("environment") for entry in measured]
    models = [ModelSpeed.from_dict(entry) for entry in measured]
    return SpeedResults(
        model=models[0],
        reference=models[1] if len(models) > 1 else None,
        ratios=ratios(*measured) if len(models) > 1 else None,
        workload=workload,
        engine=chosen,
        **environments[0],
    )


def ratios(model: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return model / reference for every number of two entries of `bench`; None where one is unknown."""

    def over(a: dict[str, Any], b: dict[str, Any], keys: tuple[str, ...]) -> dict[str, float | None]:
        return {key: a[key] / b[key] if a[key] is not None and b[key] else None for key in keys}

    return {
        **over(model, reference, ("size_bytes", "load_s", "peak_memory_bytes")),
        "rows": [
            {"batch": a["batch"], **over(a, b, ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s"))}
            for a, b in zip(model["rows"], reference["rows"], strict=True)
        ],
    }


@dataclass(frozen=True)
class Job:
    """Holds what one process measures, and how."""

    model: str
    trust_remote_code: bool
    engine: str
    options: EngineOptions
    workload: Workload


def measure_model(job: Job) -> Iterator[str | dict[str, Any]]:
    """Yield the stages as they begin, and at the end the model's entry, with the machine under "environment"."""
    files = ModelFiles.find(job.model, job.trust_remote_code)
    make = choice.engine_class(job.engine)
    yield f"loading {job.model}"
    start = time.perf_counter()
    memory = PeakMemory(make.place(job.options.device))
    engine = make(files, job.options)
    loaded = time.perf_counter() - start
    rows = []
    for batch in job.workload.batches:
        yield f"measuring {job.model}, batch {batch}"
        rows.append(vars(measure(engine, job.workload, batch)))
    yield {
        "name": job.model,
        "size_bytes": files.size_bytes(),
        "load_s": loaded,
        "peak_memory_bytes": memory.bytes(),
        "dtype": engine.dtype,
        "compiled": engine.compiled,
        "rows": rows,
        "environment": {
            "device": device_name(engine.device),
            "versions": versions() | {engine.name: engine.version},
        },
    }
