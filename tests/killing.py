"""Quantizing in a process that can be killed; forked from a server that has imported everything, so that it starts fast.

python tests/killing.py [KILLS]     kills runs at random moments, resumes each, and compares the bytes
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_models import SIZES, TEXT, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import pairquant
from pairquant.spec.recipe import recipe_with

#: Recipes short enough to be killed many times: the default's path, block-wise training with norms, and of the whole model.
RECIPES = {
    "fast": recipe_with("fast", ["steps=4"]),
    "best": recipe_with("best", ["steps=4", "refit.epochs=2"]),
    "paper": recipe_with(
        "paper", ["training.epochs=1", "training.weight_epochs=1", "training.batch=4", "training.validation_samples=4"]
    ),
    "fast+end": recipe_with(
        "fast", ["steps=4", "end_to_end.scale_rate=1e-4", "end_to_end.norm_rate=1e-4"], end_to_end=2
    ),
}


def config(preset: str) -> pairquant.QuantConfig:
    return pairquant.QuantConfig(
        preset=preset.partition("+")[0],
        recipe=RECIPES[preset],
        group_size=64,
        samples=8,
        seq_len=32,
        calibration=(str(TEXT),),
    )


def save_source(directory: Path, blocks: int = 5) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": blocks})).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def work(source: Path, output: Path, preset: str) -> None:
    torch.set_num_threads(1)
    pairquant.quantize(source, output, config(preset), device="cpu")


def start(source: Path, output: Path, preset: str) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing", "pairquant.jobs.quantize", "pairquant.integrations.transformers"])
    process = context.Process(target=work, args=(source, output, preset))
    process.start()
    return process


def run_killing(source: Path, output: Path, preset: str, kills: int, rng: random.Random, longest: float) -> int:
    """Kill `kills` runs after up to `longest` seconds, then let one finish: how many were really killed."""
    killed = 0
    for _ in range(kills):
        process = start(source, output, preset)
        process.join(rng.uniform(0, longest))
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        if output.exists():
            return killed
    process = start(source, output, preset)
    process.join()
    assert process.exitcode == 0, "the last run, which nobody killed, failed"
    return killed


def content(directory: Path) -> dict[str, bytes]:
    """What must be the same: everything but the log and the report, which tell times."""
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name not in ("pairquant.json", "pairquant.jsonl")}


def main(kills: int) -> None:
    rng, done = random.Random(0), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = save_source(root / "source")
        whole = {}
        for preset in RECIPES:
            begin = time.perf_counter()
            run_killing(source, root / preset, preset, 0, rng, 0)
            whole[preset] = time.perf_counter() - begin
        print("uninterrupted:", {preset: f"{seconds:.1f} s" for preset, seconds in whole.items()})
        while done < kills:
            preset = list(RECIPES)[done % len(RECIPES)]
            killed = run_killing(source, root / "out" / "q", preset, 5, rng, whole[preset])
            assert content(root / "out" / "q") == content(root / preset), f"{preset}: other bytes after {killed} kills"
            left = [path.name for path in (root / "out").iterdir() if path.name != "q"]
            assert not left, f"left behind: {left}"
            done += killed
            print(f"{preset}: killed {killed} times, same bytes, nothing left behind; {done} kills", flush=True)
            shutil.rmtree(root / "out")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
