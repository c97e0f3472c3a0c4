"""GGUF files of ours and of llama.cpp's own quantizer: divergence from the same original, and size.

    python benchmarks/bench_gguf.py MODEL.gguf --llama PYTHON --output FILE [--presets fast …] [--samples 64]

PYTHON is the interpreter of the environment in readers/llama_cpp_engine.py. The original is MODEL with its channels in another
order: the residual stream's, the MLPs' and, within each head, the values'. It is the same function, but weights that were
rounded in blocks before lie in other blocks now; of MODEL itself, which may come from a quantized file, llama.cpp would find
the old blocks again and lose nothing. All files are read by Transformers, which decodes them, so that only weights differ.
One JSON line a file.

With --keep DIRECTORY llama.cpp's files stay there, and are not judged; on another machine, which lacks llama.cpp, --judge FILE …
judges them: the order of the channels is the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from recipes import config_from
from setting import SETTING, calibration_tokens, numbers, opened

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.quality import measure
from pairquant.jobs.other_formats import quantize_as
from pairquant.support.devices import resolve_device

ENGINE = Path(__file__).parent / "readers" / "llama_cpp_engine.py"
#: Weights whose columns, and whose rows, are channels of the residual stream.
READ = ("token_embd", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "output")
WRITE = ("attn_output", "ffn_down")
NORMS = ("attn_norm", "ffn_norm", "output_norm")


def shuffled(source: Path, target: Path) -> None:
    """Write a LLaMA in float32 with its channels in another order."""
    reader, chance = gguf.GGUFReader(source), np.random.default_rng(0)
    said = {name: field.contents() for name, field in reader.fields.items()}
    if said["general.architecture"] != "llama":
        raise SystemExit(
            f"{source} is of the architecture {said['general.architecture']}; this benchmark shuffles llama's"
        )
    width, inner = said["llama.embedding_length"], said["llama.feed_forward_length"]
    kv, share = said["llama.attention.head_count_kv"], said["llama.attention.head_count"]
    head = width // share
    stream = chance.permutation(width)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)
    writer.add_file_type(0)
    orders: dict[str, np.ndarray] = {}

    def order(block: str, what: str, size: int) -> np.ndarray:
        return orders.setdefault(f"{block}.{what}", chance.permutation(size))

    for tensor in reader.tensors:
        block, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in NORMS:
            value = value[stream]
        if part in READ:
            value = value[:, stream]
        if part in WRITE:
            value = value[stream]
        if part in ("ffn_gate", "ffn_up"):
            value = value[order(block, "inner", inner)]
        if part == "ffn_down":
            value = value[:, order(block, "inner", inner)]
        heads = [order(block, f"values{i}", head) for i in range(kv)]
        if part == "attn_v":
            value = np.concatenate([value[i * head : (i + 1) * head][heads[i]] for i in range(kv)])
        if part == "attn_output":
            own = [value[:, i * head : (i + 1) * head][:, heads[i * kv // share]] for i in range(share)]
            value = np.concatenate(own, 1)
        writer.add_tensor(tensor.name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def importance(model: torch.nn.Module, tokens: torch.Tensor, layers: int) -> dict[str, np.ndarray]:
    """The mean square of each input channel, by llama.cpp's name of the weight that reads it."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if isinstance(module, torch.nn.Linear) and name is not None:

            def gather(_, inputs, name=name):
                square = inputs[0].float().square().flatten(0, -2)
                sums[name] = sums.get(name, 0) + square.sum(0) / tokens.numel()

            hooks.append(module.register_forward_pre_hook(gather))
    device = next(model.parameters()).device
    for window in tokens:
        model(input_ids=window[None].to(device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: value.cpu().numpy() for name, value in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--llama", help="Python with llama-cpp-python; without it only ours")
    parser.add_argument("--presets", nargs="*", default=["fast"], help="of ours, see recipes.py; format Q4_1")
    parser.add_argument(
        "--types", nargs="*", default=["Q4_0", "Q4_1", "Q4_K_M"], help="of llama.cpp, without and with importance"
    )
    parser.add_argument("--samples", type=int, default=SETTING["samples"])
    parser.add_argument("--seq-len", type=int, default=SETTING["seq_len"])
    parser.add_argument("--keep", type=Path, help="write llama.cpp's files there, and judge none of them")
    parser.add_argument(
        "--judge", type=Path, nargs="*", default=[], help="files that --keep left, named by their quantizer"
    )
    parser.add_argument("--windows", type=int, help="evaluate on so many windows of each text only")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as place:
        original = Path(place) / "original.gguf"
        shuffled(options.model, original)
        model, tokenizer, texts = opened(str(original), device)
        texts = {name: windows[: options.windows] for name, windows in texts.items()}
        setting = {**SETTING, "samples": options.samples, "seq_len": options.seq_len, "group_size": 32}

        def note(kind: str, file: Path, seconds: float) -> None:
            other = ModelFiles.find(str(file)).model(torch.float32, device)
            row = {
                "what": kind, "model": options.model.name, "bytes": file.stat().st_size, "seconds": round(seconds, 1),
                "samples": options.samples, "seq_len": options.seq_len,
                **{text: numbers(measure(other, windows, model)) for text, windows in texts.items()},
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }  # fmt: skip
            print(kind, row["bytes"], {text: round(row[text]["kl"], 4) for text in texts}, row["seconds"], flush=True)
            with options.output.open("a") as out:
                out.write(json.dumps(row) + "\n")

        for preset in options.presets:
            file, start = Path(place) / "ours.gguf", time.perf_counter()
            quantize_as("gguf", original, file, config_from(preset, **setting), device=str(device))
            note(f"pairquant {preset}", file, time.perf_counter() - start)
            file.unlink()
        for file in options.judge:
            note(f"llama.cpp {file.stem}", file, 0.0)
        if not options.llama:
            return
        weights = Path(place) / "importance.npz"
        tokens = calibration_tokens(tokenizer, config_from("fast", **setting))
        np.savez(weights, **importance(model, tokens, model.config.num_hidden_layers))
        for kind in options.types:
            for named, more in (("", []), (" with importance", ["--importance", str(weights)])):
                file, start = Path(place) / "theirs.gguf", time.perf_counter()
                command = [
                    options.llama,
                    str(ENGINE),
                    "quantize",
                    str(original),
                    "--to",
                    kind,
                    "--out",
                    str(file),
                    *more,
                ]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if options.keep:
                    shutil.move(file, options.keep / f"{kind}{named}.gguf")
                    continue
                note(f"llama.cpp {kind}{named}", file, time.perf_counter() - start)
                file.unlink()


if __name__ == "__main__":
    main()
