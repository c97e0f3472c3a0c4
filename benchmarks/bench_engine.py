"""The whole of vLLM on GPUs: tokens per second of our checkpoints, of AWQ and of the unquantized model, in one run.

    python benchmarks/bench_engine.py SHAPE [--contenders ours awq bf16] [--requests 1 8 32 64] [--gpus 1] [--output …] [--profile]

SHAPE: one of SHAPES; all weights are random. The contenders: awq, bf16, and ours in several ways, see OURS. Every contender
runs in a process of its own: prompts of 128 tokens, 128 decoded, the median of `--repeats`; then the time to the first token
of prompts of 128 and of 1900 tokens. Ours is written to a temporary directory and loaded as users load it; the others have
vLLM's dummy weights. With --profile also the GPU's microseconds by kernel, of 16 decoded tokens, and what the first token after 1900
takes on the GPU and on the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128,
    "max_position_embeddings": 8192, "rope_theta": 1000000.0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "qwen3-1.7b": QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "qwen3-4b": QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "qwen3-next-small": QWEN3 | {  # Qwen3-Next's hybrid blocks in a size for one GPU: 12 of its 48 blocks
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10,
        "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25, "tie_word_embeddings": False,
    },
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
#: Ways to quantize with us, by contender: the options of `QuantConfig`.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-unfused": {},  # the same checkpoint, as is that of ours-kept
    "ours-kept": {},
    "ours-head4": {"head_bits": 4},
    "ours-head6": {"head_bits": 6},
    "ours-head8": {"head_bits": 8},
    "ours-3bits": {"bits": 3},
    "ours-fp8": {"activations": "fp8"},
    "ours-int8": {"activations": "int8"},
}
#: Contender → what its process finds in its environment beside ENVIRONMENT.
SWITCHES = {"ours-unfused": {"PAIRQUANT_FUSE": "0"}, "ours-kept": {"PAIRQUANT_GPU_DECODED_GIB": "64"}}
#: Experts are chosen at random, so that every contender has the same work: by random weights each would choose its own.
ENVIRONMENT = {
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def write_config(directory: Path, shape: str, quantization: dict[str, Any] | None) -> None:
    directory.mkdir(parents=True)
    config = SHAPES[shape] | {"dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6}
    if quantization:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))


def write_ours(directory: Path, shape: str, contender: str) -> None:
    """A checkpoint of random packed tensors, as `pairquant quantize` would write it, one file for each block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import pairquant
    from pairquant.models.planning import plan_model
    from pairquant.spec.checkpoint import CheckpointConfig

    write_config(directory, shape, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    plan, blocks = plan_model(model, pairquant.QuantConfig(preset="fast", group_size=128, **OURS[contender]))
    tied = model.config.tie_word_embeddings and not blocks[-1].head
    covered = {site.parameter for block in blocks for site in block.sites.values()}
    index = {}
    for i, block in enumerate(blocks):
        tensors = dict(random_sites(block.sites, plan.layouts))
        index |= dict.fromkeys(tensors, file := f"model-{i:05}.safetensors")
        save_file(tensors, directory / file, {"format": "pt"})
    plain = {
        name: torch.ones(p.shape, dtype=torch.bfloat16) if p.ndim == 1 else torch.randn(p.shape).mul_(0.02).bfloat16()
        for name, p in model.named_parameters()
        if name not in covered and not (name == "lm_head.weight" and tied)
    }
    index |= dict.fromkeys(plain, file := "model-plain.safetensors")
    save_file(plain, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((directory / "config.json").read_text())
    config |= {"tie_word_embeddings": tied, "quantization_config": CheckpointConfig.of_plan(plan).to_dict()}
    (directory / "config.json").write_text(json.dumps(config))


def random_sites(sites: Any, layouts: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of a block's packed weights; linears of one input share their transform, as by default."""
    from pairquant.layers.model import SIBLINGS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared: dict[str, dict[str, torch.Tensor]] = {}
    done = set()
    for path, site in sites.items():
        layout = layouts[path].without_bias()
        fields = layout.fields()
        parent, _, last = path.rpartition(".")
        group = next((names[0] for names in SIBLINGS if last in names), last)
        key = site.pool or f"{parent}.{group}"
        if key not in shared:
            k, c = fields["pairs"].shape
            order = torch.rand(k, c // layout.group_size, layout.group_size, device=device).argsort(-1)
            shared[key] = {
                "theta": torch.randn(fields["theta"].shape, device=device).mul_(0.3).half().cpu(),
                "pairs": order.to(torch.int16).view(k, c).cpu(),
                "channel_scales": torch.rand(fields["channel_scales"].shape).add_(0.5).half(),
            }
        for name, field in fields.items():
            full = site.stored_name(name)
            if full in done:
                continue
            done.add(full)
            if name in shared[key]:
                yield full, shared[key][name].clone()
            elif name == "scales":
                yield full, torch.rand(field.shape, device=device).mul_(0.004).add_(0.001).half().cpu()
            else:
                word = torch.randint(-(2**31), 2**31 - 1, field.shape, dtype=torch.int32, device=device)
                yield full, (word if name == "qweight" else torch.full_like(word, -0x77777778)).cpu()


def measure(directory: str, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run vLLM in this process."""
    if contender in OURS:
        from pairquant.integrations.vllm import register

        register()
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        load_format="auto" if contender in OURS else "dummy",
        dtype="float16" if contender == "awq" else "bfloat16",
        max_model_len=2048 + 64,
        max_num_seqs=max(options.requests),
        tensor_parallel_size=options.gpus,
        enable_expert_parallel=options.expert_parallel,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.92,
        **(
            {"gdn_prefill_backend": "triton"} if "linear_num_key_heads" in SHAPES[options.shape] else {}
        ),  # no FlashInfer
    )
    found: dict[str, Any] = {"start-up s": round(time.perf_counter() - start, 1)}
    vocabulary = SHAPES[options.shape]["vocab_size"]

    def seconds(requests: int, prompt: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": torch.randint(10, vocabulary - 10, (prompt,)).tolist()} for _ in range(requests)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    for n in options.requests:
        seconds(n, 128, 32)  # compiles what this many tokens need
    found["tokens/s"] = {
        n: round(n * 128 / statistics.median(seconds(n, 128, 128) for _ in range(options.repeats)), 1)
        for n in options.requests
    }
    for prompt in (128, 1900):
        seconds(1, prompt, 1)
        found[f"first token of {prompt}, ms"] = round(
            statistics.median(seconds(1, prompt, 1) for _ in range(2 * options.repeats + 1)) * 1000, 1
        )
    if options.profile:
        found["kernels"] = {n: profiled(lambda n=n: seconds(n, 128, 17), "device") for n in options.requests}
        for where in ("device", "cpu"):
            found[f"first token of 1900, by {where}"] = profiled(lambda: seconds(1, 1900, 1), where)
    return found


def profiled(call: Any, where: str) -> dict[str, list[float]]:
    """What takes most microseconds on the GPU ("device") or the processor ("cpu") → those, and how often; 25 entries."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA] if where == "device" else [ProfilerActivity.CPU]) as trace:
        call()
    time_of = f"self_{where}_time_total"
    rows = sorted(trace.key_averages(), key=lambda row: -getattr(row, time_of))[:25]
    return {f"{i} {row.key[:60]}": [round(getattr(row, time_of), 1), row.count] for i, row in enumerate(rows)}


def entry_points(root: Path) -> str:
    """A directory for PYTHONPATH with our entry points, which vLLM's processes need where pairquant is not installed."""
    try:
        version("pairquant")
        return ""
    except PackageNotFoundError:
        info = root / "site" / "pairquant-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pairquant\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\npairquant = pairquant.integrations.vllm:register\n"
        )
        return str(info.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, "awq", "bf16"), default=["ours", "awq", "bf16"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--directory", type=Path, help="keep and use our checkpoints there")
    parser.add_argument("--child", nargs=3, metavar=("DIRECTORY", "CONTENDER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        directory, contender, output = options.child
        Path(output).write_text(json.dumps(measure(directory, contender, options)))
        return
    root = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    results: dict[str, Any] = {
        "shape": options.shape,
        "device": f"{options.gpus} x {torch.cuda.get_device_name()}",
        "versions": {"vllm": version("vllm"), "torch": torch.__version__},
    }
    environment = os.environ | ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [entry_points(root), os.environ.get("PYTHONPATH", "")]))
    try:
        for contender in options.contenders:
            directory = root / contender
            if contender in OURS:
                same = next(name for name, wanted in OURS.items() if wanted == OURS[contender])
                directory = (options.directory or root) / same
                if not directory.exists():
                    write_ours(directory, options.shape, contender)
            else:
                routers = [f"model.layers.{i}.mlp.gate" for i in range(SHAPES[options.shape]["num_hidden_layers"])]
                quantization = AWQ | {"modules_to_not_convert": routers} if contender == "awq" else None
                if "num_experts" not in SHAPES[options.shape]:
                    quantization = AWQ if contender == "awq" else None
                write_config(directory, options.shape, quantization)
            output = root / f"{contender}.json"
            child = [sys.executable, __file__, *sys.argv[1:], "--child", str(directory), contender, str(output)]
            subprocess.run(child, env=environment | SWITCHES.get(contender, {}), check=False)
            results[contender] = json.loads(output.read_text()) if output.exists() else "failed"
            print(contender, results[contender], flush=True)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
