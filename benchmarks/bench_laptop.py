"""One answer at a time on a CPU: llama.cpp with a GGUF file beside PairQuant in Transformers and in vLLM.

    python benchmarks/bench_laptop.py FILE.gguf CHECKPOINT --llama PYTHON [--plain MODEL] [--threads 1 2]
        [--engines transformers vllm] [--rounds 3] [--output benchmarks/results/laptop-cpu.json]

FILE.gguf and CHECKPOINT hold the same model (`pairquant quantize --format gguf`, and without `--format`); PLAIN is the original.
PYTHON is the interpreter of an environment with llama-cpp-python (readers/llama_cpp_engine.py says how to make it). Batch 1,
a prompt of 512 tokens and 64 new ones. The contenders run one after the other, each in a process of its own, and that several
times over; the fastest round of each counts, as what else runs on the machine only adds time. Memory is the peak of the whole
process, its libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pairquant.support.devices import resolve_device
from pairquant.support.environment import device_name, versions

READER = Path(__file__).parent / "readers" / "llama_cpp_engine.py"
PROMPT, NEW = 512, 64
#: What a round tells, and whether more is better.
NUMBERS = {"prompt_tokens_per_s": max, "new_tokens_per_s": max, "peak_mb": min}


def llama(python: str, file: Path, threads: int) -> dict[str, Any]:
    """One round of llama.cpp."""
    sizes = ["--prompt", str(PROMPT), "--new", str(NEW), "--threads", str(threads), "--repeats", "2"]
    command = [python, str(READER), "speed", str(file), *sizes]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ours(engine: str, model: Path, threads: int) -> dict[str, Any]:
    """One round of `pairquant bench`."""
    variables = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        options = ["--engine", engine, "--device", "cpu", "--repeats", "2", "--json", str(found)]
        sizes = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]
        command = [sys.executable, "-m", "pairquant", "bench", str(model), *options, *sizes]
        subprocess.run(command, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL)
        results = json.loads(found.read_text())
    entry = results["model"]
    (row,) = entry["rows"]
    return {
        "prompt_tokens_per_s": round(row["prefill_tokens_per_s"], 1),
        "new_tokens_per_s": round(row["decode_tokens_per_s"], 1),
        "peak_mb": round(entry["peak_memory_bytes"] / 2**20),
        "version": results["versions"][engine],
        "dtype": entry["dtype"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    contenders: dict[str, Callable[[int], dict[str, Any]]] = {
        "llama.cpp, GGUF": partial(llama, options.llama, options.gguf)
    }
    for engine in options.engines:
        contenders[f"{engine}, PairQuant"] = partial(ours, engine, options.checkpoint)
        if options.plain:
            contenders[f"{engine}, unquantized"] = partial(ours, engine, options.plain)
    rows = []
    for threads in options.threads:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                found = run(threads)
                so_far = best.setdefault(name, found)
                so_far |= {key: better(so_far[key], found[key]) for key, better in NUMBERS.items()}
        for name, found in best.items():
            rows.append({"contender": name, "threads": threads, **found})
            print(json.dumps(rows[-1]), flush=True)
    sizes = {path.name: sum(f.stat().st_size for f in files(path)) for path in (options.gguf, options.checkpoint)}
    machine = {"device": device_name(resolve_device("cpu")), "versions": versions(), "rounds": options.rounds}
    if options.output:
        told = {"prompt": PROMPT, "new": NEW, **machine, "bytes": sizes, "rows": rows}
        options.output.write_text(json.dumps(told, indent=1) + "\n")


def files(path: Path) -> list[Path]:
    """Return the files with weights."""
    return [path] if path.is_file() else list(path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
