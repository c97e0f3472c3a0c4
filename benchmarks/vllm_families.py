"""Quantized models of many families in vLLM on a GPU, against Transformers in float32.

    python benchmarks/vllm_families.py make DIRECTORY [FAMILY …]     # anywhere: small random models, quantized, and their logits
    python benchmarks/vllm_families.py check DIRECTORY [--output …]  # where vLLM runs

The models are those of tests/families.py with heads and experts of sizes that GPU kernels take. `check` prints for each the
error of vLLM's log-probabilities, relative to their spread, and what Transformers' own bfloat16 gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
#: What the tiny models' sizes become.
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "q_lora_rank": 128,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128, "mamba_d_head": 64, "mamba_head_dim": 64, "mamba_d_state": 64, "ssm_state_size": 64,
    "moe_shared_expert_intermediate_size": 128, "mamba_d_ssm": 512, "lru_width": 256, "sliding_window": 64,
}  # fmt: skip
OWN = {"Falcon-H1": {"head_dim": 64, "mamba_d_head": 64}, "Jamba": {"mamba_d_state": 16}, "Mamba-2": {"head_dim": 64}}
#: What vLLM reads in the config.json of released models and Transformers' classes do not set.
OWN |= {"DeepSeek V3, Kimi K2": {"topk_method": "noaux_tc"}, "LFM2": {"conv_dim": 256, "block_dim": 256}}
OWN |= {
    "MiniMax-M2": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True, "attn_type_list": [1] * 8}
}
PROMPT = [5, 80, 41, 200, 7, 19, 101, 150, 33, 64, 90, 12, 240, 8, 77, 120, 55, 31, 222, 14]


def make(directory: Path, names: list[str]) -> None:
    sys.path.insert(0, str(TESTS))
    import transformers
    from families import FAMILIES
    from tiny_models import TEXT, byte_tokenizer
    from transformers import AutoModelForCausalLM

    import pairquant

    for name in names or FAMILIES:
        family = FAMILIES[name]
        wider = {key: SIZES[key] for key in family.arguments if key in SIZES} | OWN.get(name, {})
        home = directory / name.replace("/", "-")
        try:
            torch.manual_seed(0)
            config = getattr(transformers, family.config)(**(family.arguments | wider))
            model = AutoModelForCausalLM.from_config(config).eval().float()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        parameter.normal_(std=0.06)
            model.bfloat16().save_pretrained(home / "source")
            byte_tokenizer().save_pretrained(home / "source")
            options = pairquant.QuantConfig(
                preset="quick", group_size=32, rotations=2, samples=2, seq_len=64, calibration=(str(TEXT),)
            )
            pairquant.quantize(home / "source", home / "packed", options, device="cpu", overwrite=True)
            found = {}
            for dtype in (torch.float32, torch.bfloat16):
                packed = AutoModelForCausalLM.from_pretrained(home / "packed", dtype=dtype).eval()
                with torch.no_grad():
                    logits = packed(torch.tensor([PROMPT]), use_cache=False).logits[0]
                found[str(dtype)] = logits.float().log_softmax(-1)[:-1]
            torch.save(found, home / "expected.pt")
            print(name, error(found["torch.bfloat16"], found["torch.float32"]), flush=True)
        except Exception as failure:
            print(name, "failed:", type(failure).__name__, str(failure)[:200], flush=True)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what differs between tokens."""
    spread = expected - expected.mean(-1, keepdim=True)
    return round(float((found - expected).norm() / spread.norm()), 4)


def check(directory: Path, dtype: str, output: Path | None) -> None:
    """Check each family in a process of its own: what one engine leaves behind would change the next."""
    rows: dict[str, Any] = {}
    for home in sorted(path.parent for path in directory.glob("*/expected.pt")):
        result = home / "result.json"
        result.unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, __file__, "one", str(home), "--dtype", dtype, "--output", str(result)], check=False
        )
        rows[home.name] = json.loads(result.read_text()) if result.exists() else {"failed": "the process ended"}
        print(home.name, rows[home.name], flush=True)
        if output:
            output.write_text(json.dumps(rows, indent=1) + "\n")


def one(home: Path, dtype: str, output: Path) -> None:
    """Run one family in vLLM and write its row."""
    from vllm import LLM, SamplingParams

    from pairquant.integrations.vllm import register

    register()
    expected = torch.load(home / "expected.pt")
    exact = expected["torch.float32"]
    row: dict[str, Any] = {"Transformers bfloat16": error(expected["torch.bfloat16"], exact)}
    try:
        llm = LLM(
            str(home / "packed"), dtype=dtype, max_model_len=96, max_num_seqs=4, max_logprobs=-1, enforce_eager=True,
            gpu_memory_utilization=0.2, enable_prefix_caching=False, gdn_prefill_backend="triton",
        )  # fmt: skip
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
        (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
        places = answer.prompt_logprobs[1:]
        found = torch.tensor([[place[token].logprob for token in range(len(place))] for place in places])
        row[f"vLLM {dtype}"] = error(found, exact)
        row["by token"] = [error(f, e) for f, e in zip(found, exact, strict=True)]
        row[f"vLLM {dtype}, median token"] = statistics.median(row["by token"])
    except Exception as failure:
        traceback.print_exc()
        row["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
    output.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "check", "one"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "make":
        make(options.directory, options.families)
        return
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if options.what == "one":
        one(options.directory, options.dtype, options.output)
    else:
        check(options.directory, options.dtype, options.output)


if __name__ == "__main__":
    main()
