"""Quantized models of many families in SGLang, against Transformers in float32.

    python benchmarks/vllm_families.py make DIRECTORY FAMILY …         # small random models, quantized, and their logits
    python benchmarks/sglang_families.py DIRECTORY [--output FILE] [--ranks 2]   # where SGLang runs

Prints for each model the error of SGLang's log-probabilities, relative to their spread, and what Transformers' own bfloat16
gives.

Without a GPU, SGLang's own engine runs in PyTorch. Its package of CUDA kernels cannot be imported there, so a module stands in
for it whose functions raise an error when they are called. Environment for a CPU, beside PairQuant itself:

    pip install --no-deps sglang==0.5.23
    pip install torch==2.13.0 transformers==5.19.0 compressed-tensors torchvision xgrammar==0.2.7 apache-tvm-ffi==0.1.11
    (and what `python -c "import sglang.srt.models.llama"` then misses, except sgl_kernel)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from vllm_families import PROMPT, error

STAND_IN = '''"""Stands in for SGLang's kernels where there is no GPU."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise RuntimeError(f"sgl_kernel.{name} needs a GPU")

    return missing
'''


def surroundings(place: Path) -> dict[str, str]:
    """Return the environment in which SGLang starts here; what must stand in for its kernels is written to a place."""
    here = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    if torch.cuda.is_available():
        return here
    if find_spec("sgl_kernel") is None:
        (place / "sgl_kernel").mkdir()
        (place / "sgl_kernel" / "__init__.py").write_text(STAND_IN)
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return here | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


def settings(ranks: int) -> dict[str, Any]:
    """Return the arguments of SGLang's engine."""
    common = {
        "dtype": "bfloat16", "context_length": 96, "disable_radix_cache": True, "skip_server_warmup": True,
        "log_level": "error", "tp_size": ranks, "max_running_requests": 2,
    }  # fmt: skip
    if torch.cuda.is_available():
        return common | {"mem_fraction_static": 0.2}
    on_cpu = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
    return common | on_cpu | {"mem_fraction_static": 0.3, "max_total_tokens": 512}


def one(home: Path, ranks: int, output: Path) -> None:
    """Run one family in SGLang and write its row."""
    import sglang

    expected = torch.load(home / "expected.pt")
    exact = expected["torch.float32"]
    row: dict[str, Any] = {"Transformers bfloat16": error(expected["torch.bfloat16"], exact)}
    try:
        engine = sglang.Engine(model_path=str(home / "packed"), **settings(ranks))
        answer = engine.generate(
            input_ids=[PROMPT], sampling_params={"temperature": 0, "max_new_tokens": 1}, return_logprob=True,
            logprob_start_len=0, top_logprobs_num=exact.shape[-1],
        )[0]  # fmt: skip
        places = answer["meta_info"]["input_top_logprobs"][1:]
        found = torch.zeros_like(exact)
        for place, entries in enumerate(places):
            for value, token, _ in entries:
                found[place, token] = value
        row["SGLang bfloat16"] = error(found, exact)
        engine.shutdown()
    except Exception as failure:
        traceback.print_exc()
        row["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
    output.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, default=1, help="of tensor parallelism")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help="the directory is that of one family")
    options = parser.parse_args()
    if options.one:
        one(options.directory, options.ranks, options.output)
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        environment = surroundings(Path(place))
        for home in sorted(path.parent for path in options.directory.glob("*/expected.pt")):
            result = home / "result-sglang.json"
            result.unlink(missing_ok=True)
            command = [
                sys.executable,
                __file__,
                str(home),
                "--one",
                "--ranks",
                str(options.ranks),
                "--output",
                str(result),
            ]
            subprocess.run(command, check=False, env=environment)
            rows[home.name] = json.loads(result.read_text()) if result.exists() else {"failed": "the process ended"}
            print(home.name, rows[home.name], flush=True)
    versions = {name: version(name) for name in ("sglang", "torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if options.output:
        found = {"device": device, "ranks": options.ranks, "versions": versions, "families": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
