"""Decoding an 8B-shaped LLaMA through Transformers: tokens per second and peak memory, one NVIDIA GPU.

    python benchmarks/bench_generate.py [--output benchmarks/results/generate.json]

Random weights, config only. Static cache, batch 1, 256 tokens of prompt and 512 new ones, greedy; one decoding step is
captured as a CUDA graph and replayed, the same way for every model: fp16; ours; ours without rotations (K = 0), which is
plain int4 with the same kernels. Memory is PyTorch's peak from loading on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
import transformers
import triton
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import link_siblings, prepare, replace_module
from pairquant.spec.linear import LinearLayout, PackedLinear, Spec

CONFIG = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)  # fmt: skip
PROMPT, NEW, GROUP = 256, 512, 128
DEVICE = torch.device("cuda")


def dense_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Random float16 weights of a trained model's size, made on the GPU."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    return fill(model)


def fill(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give every parameter that is still on the meta device a random value."""
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=torch.half, device=DEVICE).normal_(std=0.02)
            owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            setattr(owner, name, nn.Parameter(value if value.dim() > 1 else value.fill_(1), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config, device=DEVICE)
    return model.eval()


def rotated_model(config: LlamaConfig, rotations: int) -> LlamaForCausalLM:
    """Random 4-bit weights; q, k, v share a transform, and gate and up."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    for path, linear in linears:
        layout = Spec(4, GROUP, rotations).layout(linear.in_features, linear.out_features)
        seed = {"k_proj": 0, "v_proj": 0, "q_proj": 0, "gate_proj": 1, "up_proj": 1}.get(path.rpartition(".")[2], 2)
        replace_module(model, path, RotatedLinear.from_packed(random_packed(layout, seed)))
        layer = model.get_submodule(path.rpartition(".")[0])
        if path.endswith(
            ("o_proj", "v_proj", "up_proj", "down_proj")
        ):  # the siblings are complete: free what they hold
            link_siblings(layer)
            prepare(layer)
    return fill(model)


def random_packed(layout: LinearLayout, seed: int) -> PackedLinear:
    """Random codes; scales and angles that keep activations finite. The same seed gives the same transform."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    fields = layout.fields()
    tensors = {}
    for name in ("qweight", "qzeros"):
        shape = fields[name].shape
        tensors[name] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=DEVICE)
    tensors["scales"] = torch.full(fields["scales"].shape, 0.004, dtype=torch.half, device=DEVICE)
    tensors["theta"] = torch.randn(fields["theta"].shape, generator=generator, device=DEVICE).half()
    noise = torch.rand(layout.rotations, layout.num_groups, GROUP, generator=generator, device=DEVICE)
    tensors["pairs"] = noise.argsort(-1).to(torch.int16).view(fields["pairs"].shape)
    tensors["channel_scales"] = torch.ones(fields["channel_scales"].shape, dtype=torch.half, device=DEVICE)
    return PackedLinear(layout, tensors)


@torch.inference_mode()
def generate(model: LlamaForCausalLM, compiled: bool) -> dict[str, float]:
    """Seconds of prefill, tokens per second of decoding."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=DEVICE)
    for attempt in range(2):  # the first call compiles
        if attempt:
            cache.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        torch.cuda.synchronize()
        prefill = time.perf_counter() - start
    token = logits[:, -1:].argmax(-1)

    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def step() -> None:
        logits = forward(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for layer in cache.layers:
        layer.cumulative_length.fill_(PROMPT)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(NEW - 1):
        graph.replay()
    torch.cuda.synchronize()
    return {"prefill_s": prefill, "tokens_per_s": (NEW - 1) / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step before it is captured")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generate.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    CONFIG.num_hidden_layers = options.layers
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    results = {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "layers": options.layers,
        "compiled": options.compile,
        "models": {},
    }
    makers = {
        "fp16": lambda: dense_model(CONFIG),
        "pairquant": lambda: rotated_model(CONFIG, 8),
        "int4 without rotation": lambda: rotated_model(CONFIG, 0),
    }
    for name, make in makers.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = make()
        result = generate(model, options.compile) | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        results["models"][name] = result
        print(name, {key: round(value, 3) for key, value in result.items()}, flush=True)
        del model
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
