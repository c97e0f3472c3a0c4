"""How long quantizing takes, and in how much memory: blocks of real shapes with random weights, one device.

    python benchmarks/bench_quantize.py [--shape llama-3-8b] [--blocks 3] [--presets fast] [--output …]
    torchrun --nproc-per-node 2 benchmarks/bench_quantize.py …      # the same over several GPUs

Writes a bfloat16 model of `--blocks` blocks to a temporary directory, quantizes it as a user would, and extrapolates the
time of a block (the median but the first, which compiles) to the whole model. Memory: PyTorch's peak on the GPU, and the
process's peak resident set above what it was before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from recipes import config_from
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

import pairquant
from pairquant.jobs.quantize import Silent

#: Name → hidden size, MLP size, key/value share of the heads, blocks of the whole model.
SHAPES = {
    "llama-3-8b": (4096, 14336, 4, 32),
    "qwen3-30b-a3b": (2048, 768, 8, 48),
    "hidden-1024": (1024, 3584, 4, 32),
    "hidden-2048": (2048, 7168, 4, 32),
    "hidden-4096": (4096, 14336, 4, 32),
    "hidden-8192": (8192, 28672, 8, 80),
}


#: Experts of each block, of which a token gets eight; the MLP size is then one expert's.
EXPERTS = {"qwen3-30b-a3b": 128}
#: Under torchrun the first process writes the model and reports.
LEADS = os.environ.get("RANK", "0") == "0"


class Timer(Silent):
    """Collects what each block took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.notices: list[str] = []

    def stage(self, text: str) -> None:
        self.ends.append(time.perf_counter())

    def block(self, result) -> None:
        self.ends.append(time.perf_counter())

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def plan(self, blocks, linears, finished, memory) -> None:
        self.predicted = memory.device


def write_model(directory: Path, shape: str, blocks: int, tokens: int) -> None:
    hidden, mlp, share, _ = SHAPES[shape]
    common = {
        "vocab_size": 32768, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": blocks,
        "max_position_embeddings": 8192, "dtype": torch.bfloat16,
    }  # fmt: skip
    if shape in EXPERTS:
        config = Qwen3MoeConfig(
            **common, num_attention_heads=32, num_key_value_heads=32 // share, head_dim=128, moe_intermediate_size=mlp,
            num_experts=EXPERTS[shape], num_experts_per_tok=8,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            **common, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128 // share
        )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        for parameter in model.parameters():  # experts are made without values
            if parameter.dim() == 3:
                parameter.data.normal_(std=0.02)
    model.save_pretrained(directory)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    drawn = torch.randint(config.vocab_size, (tokens,)).tolist()
    (directory / "words.txt").write_text(" ".join(f"w{i}" for i in drawn))


@contextmanager
def model_on_disk(shape: str, blocks: int, tokens: int) -> Iterator[Path]:
    """A directory with the model, written by the first process for all; gone afterwards."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    directory = Path(tempfile.gettempdir()) / f"bench-quantize-{launch}-{os.environ.get('MASTER_PORT', '')}-{shape}"
    complete = directory / "complete"
    if LEADS:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        write_model(directory, shape, blocks, tokens)
        torch.cuda.empty_cache()
        complete.touch()
    while not complete.exists():
        time.sleep(0.1)
    try:
        yield directory
    finally:
        if LEADS:
            shutil.rmtree(directory)


def measure(directory: Path, blocks: int, whole: int, preset: str, samples: int, seq_len: int) -> dict | None:
    """A row of results; None in all processes but the first."""
    text = (str(directory / "words.txt"),)
    config = config_from(preset, samples=samples, seq_len=seq_len, calibration=text)
    timer, before = Timer(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    pairquant.quantize(directory, directory / "q", config, progress=timer, overwrite=True)
    if not LEADS:
        return None
    seconds = time.perf_counter() - start
    ends = timer.ends[-blocks - 2 : -1]
    per_block = [b - a for a, b in itertools.pairwise(ends)]
    typical = statistics.median(per_block[1:] or per_block)
    return {
        "seconds": round(seconds, 1),
        "per_block": [round(s, 2) for s in per_block],
        "whole_model_minutes": round((seconds + (whole - blocks) * typical) / 60, 2),
        "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
        "predicted_gb": round(timer.predicted / 1e9, 2),
        "host_peak_gb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6, 2),
        "notices": timer.notices,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["llama-3-8b"], choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["fast"], help="preset[:option=value,…]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantize.json"))
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    results = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": [options.samples, options.seq_len],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "runs": {},
    }
    for shape in options.shape:
        tokens = 2 * options.samples * options.seq_len + 200_000
        with model_on_disk(shape, options.blocks, tokens) as directory:
            for preset in options.presets:
                run = measure(directory, options.blocks, SHAPES[shape][3], preset, options.samples, options.seq_len)
                if run is None:
                    continue
                results["runs"][f"{shape} {preset}"] = run
                print(shape, preset, run, flush=True)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
