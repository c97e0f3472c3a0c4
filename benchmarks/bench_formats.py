"""Every format in the programs that read it: how far their predictions are from the checkpoint decoded by us.

    python benchmarks/bench_formats.py MODEL --output FILE [--llama PYTHON] [--mlx PYTHON] [--vllm PYTHON]

MODEL is quantized without transforms (preset `quick`, groups of 64), written in every format, and read by Transformers here and by
the programs of the given interpreters (readers/). The divergence is that of the next token, over 96 tokens of WikiText-2, from
the decoded checkpoint in float32; "plain" is the decoded checkpoint itself in the same program and dtype, its own noise; of
llama.cpp, which has no plain file here, it is the original GGUF file against Transformers, if MODEL is one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from setting import SETTING
from torch import Tensor

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.formats.table import FORMATS
from pairquant.support.text import documents

READERS = Path(__file__).parent / "readers"
TOKENS = 96


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats; what a program says nothing of is left out."""
    expected = expected[:, : found.shape[1]].double().log_softmax(-1)
    return (expected.exp() * (expected - found.double().log_softmax(-1))).sum(-1).mean().item()


@torch.no_grad()
def logits(path: Path, tokens: Tensor) -> Tensor:
    return ModelFiles.find(str(path)).model(torch.float32)(tokens).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--llama")
    parser.add_argument("--mlx")
    parser.add_argument("--vllm")
    options = parser.parse_args()

    files = ModelFiles.find(options.model)
    text = "\n".join(documents(str(Path(__file__).parent / "data" / "wikitext2-test.txt")))[2000:4000]
    tokens = torch.tensor([files.tokenizer()(text)["input_ids"][:TOKENS]])
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "tokens.json").write_text(json.dumps(tokens.tolist()))
        setting = {**SETTING, "samples": 8, "seq_len": 512}
        made = {}
        for symmetric in (False, True):
            config = replace(pairquant.QuantConfig(preset="quick", **setting), symmetric=symmetric, transform="none")
            made[symmetric] = root / f"ours-{symmetric}"
            pairquant.quantize(options.model, made[symmetric], FORMATS["awq"].settled(config), device="cpu")
        plain = {
            symmetric: pairquant.export(made[symmetric], root / f"plain-{symmetric}", "fp32") for symmetric in made
        }
        expected = {symmetric: logits(path, tokens) for symmetric, path in plain.items()}

        def note(program: str, form: str, found: Tensor, against: Tensor, **more: str) -> None:
            row = {"program": program, "format": form, "kl": float(f"{divergence(against, found):.2g}"), **more}
            rows.append(row)
            print(row, flush=True)

        def ask(interpreter: str, script: str, path: Path, *arguments: str) -> Tensor:
            command = [
                interpreter,
                READERS / script,
                *arguments,
                path,
                "--tokens",
                root / "tokens.json",
                "--out",
                root / "out",
            ]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            return load_file(root / "out")["logits"]

        paths = {}
        for form in FORMATS:
            name = root / (f"{form}.gguf" if form == "gguf" else form)
            paths[form] = pairquant.export(made[form == "gptq"], name, form)
        note("transformers", "compressed-tensors", logits(paths["compressed-tensors"], tokens), expected[False])
        if options.llama:
            found = ask(options.llama, "llama_cpp_engine.py", paths["gguf"], "logits")
            note("llama.cpp", "gguf", found, expected[False])
            if files.gguf:
                found = ask(options.llama, "llama_cpp_engine.py", Path(options.model), "logits")
                note("llama.cpp", "plain", found, logits(Path(options.model), tokens))
        if options.mlx:
            note("mlx-lm", "mlx", ask(options.mlx, "mlx_engine.py", paths["mlx"]), expected[False])
            note("mlx-lm", "plain", ask(options.mlx, "mlx_engine.py", plain[False]), expected[False])
        for form in ("awq", "gptq", "compressed-tensors", "plain") if options.vllm else ():
            symmetric = form == "gptq"
            found = ask(options.vllm, "vllm_engine.py", paths.get(form, plain[False]))
            note("vllm", form, found, expected[symmetric], dtype="float16")
    versions = {name: version(name) for name in ("torch", "transformers", "compressed-tensors", "gguf")}
    options.output.write_text(
        json.dumps({"model": Path(files.name).name, "tokens": TOKENS, "rows": rows, "versions": versions}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
