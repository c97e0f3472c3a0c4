"""Loading a packed checkpoint through Transformers, against reading the bytes of its files; and host memory.

    python benchmarks/bench_load.py [--shape 1b] [--device auto] [--directory DIR] [--output benchmarks/results/load.json]

Writes a checkpoint of random codes in shards of at most 2 GB (8b: 6.1 GB, 3b: 2.4 GB, 1b: 1.0 GB) into DIR, which is emptied in the end. Then,
each several times and in a fresh process whose imports are done before the clock starts:

- read: all bytes of all files, 16 MiB at a time, one thread;
- load: `AutoModelForCausalLM.from_pretrained`, to the GPU if there is one, until the model could be called. On a CPU the
  tensors are maps of the files, so `load and touch` also reads every byte of every tensor once.

Cold: the kernel was asked to forget the files (`posix_fadvise`), which a virtual machine's host need not; warm: they were
read before. Memory is the kernel's peak of the resident set above the process's before loading (VmHWM), in which pages
mapped from files count; and of its anonymous part alone, sampled every 5 ms: what the process itself asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES = {  # those of Llama 3.2 1B and 3B, Llama 3.1 8B
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
GROUP, ROTATIONS, CHUNK = 128, 8, 16 << 20


def write(directory: Path, shape: str) -> None:
    """A checkpoint of this shape; tensors of one name and shape hold the same random values."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pairquant.checkpoint.write import Entry, write_checkpoint
    from pairquant.spec.checkpoint import CheckpointConfig
    from pairquant.spec.fields import Field
    from pairquant.spec.linear import Spec

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    packed = CheckpointConfig(Spec(4, GROUP, ROTATIONS), modules_to_not_convert=("lm_head",))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made: dict[Any, Any] = {}

    def entry(name: str, field: Field) -> Entry:
        def load() -> torch.Tensor:
            key = (name.rpartition(".")[2], field)
            if key not in made:
                made[key] = random_tensor(*key)
            return made[key].clone()  # safetensors refuses tensors that share memory

        return Entry(field, load)

    entries = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            fields = packed.layout(path, module.in_features, module.out_features).fields()
        elif path == "lm_head" and config.tie_word_embeddings:
            continue
        else:
            fields = {n: Field(torch.bfloat16, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)}
        entries |= {f"{path}.{name}": entry(name, field) for name, field in fields.items()}
    config.quantization_config = packed.to_dict()
    write_checkpoint(directory, entries, config.save_pretrained, {})


def random_tensor(name: str, field: Any) -> Any:
    """Of values that the stored tensor of this name may have."""
    import torch

    if field.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, field.shape, dtype=torch.int64).to(torch.int32)
    if name == "pairs":
        order = torch.rand(field.shape[0] * field.shape[1] // GROUP, GROUP).argsort(-1)
        return order.to(torch.int16).view(field.shape)
    return {"scales": 0.004, "theta": 0.3, "channel_scales": 1.0}.get(name, 0.02) * torch.ones(
        field.shape, dtype=field.dtype
    )


def read(files: list[Path]) -> float:
    """Seconds to read all bytes."""
    buffer = memoryview(bytearray(CHUNK))
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as content:
            while content.readinto(buffer):
                pass
    return time.perf_counter() - start


def forget(files: list[Path]) -> None:
    """Ask the kernel to drop its copies."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load(directory: Path, device: str, profile: bool) -> dict[str, float]:
    """In this process, which must be fresh: seconds and MiB."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  imports are not what is measured
    from transformers.utils import logging

    import pairquant  # noqa: F401

    logging.disable_progress_bar()
    if device == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    before, peak = status("VmRSS"), Peak("RssAnon")
    profiler = start_profile() if profile else None
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, **({"device_map": device} if device != "cpu" else {}))
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if profiler:
        profiler.disable()
        profiler.print_stats("cumulative")
    anonymous = peak.stop()
    resident = status("VmHWM") - before
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.numel():
            tensor.view(torch.uint8 if tensor.dtype != torch.bool else tensor.dtype).amax()
    return {
        "load_s": seconds,
        "load_and_touch_s": time.perf_counter() - start,
        "peak_resident_mib": resident >> 20,
        "peak_anonymous_mib": anonymous >> 20,
        "model_mib": sum(tensor.nbytes for tensor in tensors) >> 20,
        "device_peak_mib": torch.cuda.max_memory_allocated() >> 20 if device == "cuda" else 0,
    }


def start_profile() -> Any:
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    return profiler


def status(field: str) -> int:
    """Bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


class Peak:
    """The largest value of a field since it was made, above its first."""

    def __init__(self, field: str):
        self.field, self.first = field, status(field)
        self.largest, self.done = self.first, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.largest = max(self.largest, status(self.field))

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.largest, status(self.field)) - self.first


def measure(directory: Path, device: str, repeats: int) -> dict[str, Any]:
    """Medians, cold and warm: everything in turn, so that a slower minute hits all."""
    files = sorted(directory.glob("*.safetensors"))
    rows: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    if device == "cuda":
        load_in_fresh_process(directory, device)  # Triton compiles, and keeps what it compiled
    for _ in range(repeats):
        for state, row in rows.items():
            (forget if state == "cold" else read)(files)
            seconds = read(files)
            if state == "cold":
                forget(files)
            row.append({"read_s": seconds} | load_in_fresh_process(directory, device))
            print(state, {name: round(value, 3) for name, value in row[-1].items()}, flush=True)
    result = {}
    for state, row in rows.items():
        median = {name: statistics.median(r[name] for r in row) for name in row[0]}
        for name in ("load", "load_and_touch"):
            median[f"{name}_over_read"] = median[f"{name}_s"] / median["read_s"]
        result[state] = {name: round(value, 3) for name, value in median.items()}
    return result


def load_in_fresh_process(directory: Path, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", str(directory), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"loading failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--directory", type=Path, help="where to write the checkpoint; default: a temporary directory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/load.json"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, and take one that is there")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="with --load DIR: where the time goes")
    options = parser.parse_args()
    import torch

    import pairquant

    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if options.load:
        print(json.dumps(load(options.load, device, options.profile)))
        return
    root = Path(tempfile.mkdtemp(dir=options.directory)) if not options.keep else options.directory
    target = root / options.shape
    try:
        if not target.exists():
            write(target, options.shape)
        sizes = [file.stat().st_size for file in target.glob("*.safetensors")]
        print(f"{len(sizes)} shards, {sum(sizes) / 1e9:.2f} GB", flush=True)
        packages = ("torch", "transformers", "safetensors")
        result = {
            "shape": options.shape, "bytes": sum(sizes), "largest_shard_bytes": max(sizes), "shards": len(sizes),
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(), "repeats": options.repeats,
            "versions": {"python": platform.python_version(), "pairquant": pairquant.__version__, **{name: version(name) for name in packages}},
            **measure(target, device, options.repeats),
        }  # fmt: skip
    finally:
        if not options.keep:
            shutil.rmtree(root)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({state: result[state] for state in ("cold", "warm")}, indent=1))


if __name__ == "__main__":
    main()
