"""What evaluation costs beyond the models' own forward passes, and what chunked logits save of a large vocabulary's memory.

    python benchmarks/bench_eval.py [--output benchmarks/results/eval-cpu.json]

- overhead: `evaluation.quality.measure` of a model against a reference, over the bare forward passes of both on the same
  windows, their logits made and thrown away; in turn, medians. The shapes are those of SmolLM2-135M, random weights: in
  larger models the vocabulary, over which evaluation works, is a smaller part.
- memory: the peak of the resident set above what the process held before, while KL of one window is computed, for
  Gemma's vocabulary of 262144 tokens on a small body: `score` as it is, in chunks, and from two full logits tensors.
  Each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from pairquant.evaluation import quality
from pairquant.evaluation.speed import PeakMemory
from pairquant.support.environment import device_name, versions

BODY = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
LARGE = Gemma3TextConfig(
    vocab_size=262144, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
MIB = 2**20


def models(config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return tuple(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2))  # type: ignore[return-value]


def windows(config: Any, count: int, tokens: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (count, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def overhead(tokens: int, count: int, repeats: int) -> dict[str, Any]:
    """Seconds of forward passes and of evaluation, and what the latter adds."""
    pair, text = models(BODY), windows(BODY, count, tokens)
    seconds: dict[str, list[float]] = {"forward": [], "evaluation": []}
    for repeat in range(repeats + 1):
        for name, run in (("forward", forward), ("evaluation", evaluation)):
            start = time.perf_counter()
            run(pair, text)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    medians = {f"{name}_s": median(runs) for name, runs in seconds.items()}
    ratio = medians["evaluation_s"] / medians["forward_s"]
    return {"windows": count, "tokens": tokens, "vocabulary": BODY.vocab_size, **medians, "added": ratio - 1}


def forward(pair: tuple[Any, Any], text: torch.Tensor) -> None:
    for window in text:
        for model in pair:
            model(input_ids=window[None], use_cache=False)


def evaluation(pair: tuple[Any, Any], text: torch.Tensor) -> None:
    quality.measure(pair[0], text, pair[1])


@torch.no_grad()
def kl_memory(way: str, tokens: int) -> dict[str, float]:
    """MiB and nats, in this process, which must be fresh."""
    model, reference = models(LARGE)
    (window,) = windows(LARGE, 1, tokens)
    model(input_ids=window[None, :8])  # what a first pass allocates for good
    memory = PeakMemory(torch.device("cpu"))
    if way == "chunked":
        kl = quality.score(model, window, reference).kl
        assert kl is not None, "there is a reference"
    else:
        log_p, log_q = (F.log_softmax(m(input_ids=window[None]).logits[0, :-1], -1) for m in (model, reference))
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    peak = memory.bytes()
    assert peak is not None, "the resident set is known on Linux only"
    return {"peak_mib": peak / MIB, "kl": kl.mean().item()}


def in_fresh_process(way: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--memory-tokens", str(tokens)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, default=1024)
    parser.add_argument("--way", choices=("chunked", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(kl_memory(arguments.way, arguments.memory_tokens)))
        return
    memory = {way: in_fresh_process(way, arguments.memory_tokens) for way in ("chunked", "full")}
    result = {
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "overhead": overhead(arguments.tokens, arguments.windows, arguments.repeats),
        "memory": {
            "vocabulary": LARGE.vocab_size, "tokens": arguments.memory_tokens, **memory,
            "ratio": memory["chunked"]["peak_mib"] / memory["full"]["peak_mib"],
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
