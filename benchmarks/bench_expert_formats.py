"""Experts in one tensor: what llama.cpp and mlx-lm compute from our files, against the checkpoint decoded by us.

    python benchmarks/bench_expert_formats.py --output FILE [--llama PYTHON] [--mlx PYTHON]

A tiny random model of each family that gguf and mlx hold with experts is quantized (groups of 32), written in both formats, and
run by the programs of the given interpreters (readers/). "logits" is the relative distance of all logits of 48 tokens from those
of the decoded checkpoint in float32. llama.cpp rounds activations to 8 bits, and its files hold the embeddings in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pairquant

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "checkpoint")]
from families import DENSE, FAMILIES, _experts  # noqa: E402
from test_families import make_source  # noqa: E402
from test_gguf_file import merging_tokenizer  # noqa: E402

READERS = Path(__file__).parent / "readers"
#: llama.cpp has as many heads of keys as of queries for OLMoE, as its models do.
OLMOE = _experts("OlmoeConfig", DENSE | {"num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2)
NAMES = ("Mixtral", "OLMoE", "Qwen2-MoE", "Qwen3-MoE")


@torch.no_grad()
def logits(directory: Path, tokens: list[list[int]]) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(torch.tensor(tokens)).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--llama")
    parser.add_argument("--mlx")
    options = parser.parse_args()
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5)).tolist()
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as place:
            rows += measured(name, Path(place), tokens, options)
            print(*rows[-2:], sep="\n", flush=True)
    packages = ("torch", "transformers", "gguf")
    facts = {"device": platform.machine(), "versions": {package: version(package) for package in packages}}
    options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def measured(name: str, root: Path, tokens: list[list[int]], options: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one family."""
    source = make_source(name, root / "source", FAMILIES | {"OLMoE": OLMOE})
    merging_tokenizer().save_pretrained(source)
    if name == "Qwen3-MoE":  # as its models have it
        config = json.loads((source / "config.json").read_text()) | {"norm_topk_prob": True}
        (source / "config.json").write_text(json.dumps(config))
    pairquant.quantize(source, root / "packed", pairquant.QuantConfig("rtn", group_size=32), device="cpu")
    expected = logits(pairquant.export(root / "packed", root / "plain", "fp32"), tokens)
    (root / "tokens.json").write_text(json.dumps(tokens))
    pairquant.export(root / "packed", root / "model.gguf", "gguf")
    pairquant.export(root / "packed", root / "mlx", "mlx")
    calls = {
        "gguf": (options.llama, "llama_cpp_engine.py", ["logits", str(root / "model.gguf")]),
        "mlx": (options.mlx, "mlx_engine.py", [str(root / "mlx")]),
    }
    rows = []
    for form, (python, script, arguments) in calls.items():
        if python is None:
            continue
        found = root / f"{form}.safetensors"
        more = ["--tokens", str(root / "tokens.json"), "--out", str(found)]
        subprocess.run([python, str(READERS / script), *arguments, *more], check=True)
        distance = (load_file(found)["logits"][..., : expected.shape[-1]] - expected).norm() / expected.norm()
        rows.append({"family": name, "format": form, "logits": float(f"{distance.item():.2g}")})
    return rows


if __name__ == "__main__":
    main()
