#!/usr/bin/env python3
"""Compute a ParoQuant checkpoint's logits with GPTQModel, on the CPU.

    python read_with_gptqmodel.py CHECKPOINT --tokens tokens.json --out logits.safetensors [--dtype float32|float16|bfloat16]

CHECKPOINT is a Hugging Face model directory in the ParoQuant format; tokens.json holds a list of lists of token ids. The model
comes from GPTQModel.load, and the run stops unless the checkpoint's quantized linears, all of them and nothing else, became
GPTQModel's ParoQuant module and hold the stored tensors. Tensor "logits" of the output is float32, [rows, tokens, vocabulary].

Environment (Python 3.11, no GPU; GPTQModel 7.7.0 asks for torch >= 2.14.1 but runs on 2.13.0):

    pip install torch==2.13.0
    pip install "transformers==5.19.*" accelerate safetensors numpy threadpoolctl packaging device-smi protobuf pillow requests \\
        pypcre tokenicer logbar jinja2 dill defuser
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0     # pure Python; kernels are compiled on use, none for this

What is worked around, and why:
- `"zero_point": true` in config.json makes GPTQModel refuse the model: it reads the key as "not symmetric", and its ParoQuant
  module declares only symmetric, though its arithmetic uses the zero points. So it is given a view of the directory: symlinks,
  plus a quantize_config.json, which it prefers to config.json, where `sym` is true. --as-is hands it the directory itself.
- GPTQModel turns every linear of the blocks into a quantized one, whatever the file holds, and runs those without stored codes
  as zeros. The view therefore names the plain ones in `dynamic`, the only list of exceptions that GPTQModel knows.
- It takes no float32. For float32 the model is loaded in float16, where the format's own tensors are exact, and the rest is
  then filled with the stored values in float32; activations and rotations are float32, weights are (q - z) s rounded to float16.
- For bfloat16 it rounds angles and scales to bfloat16, which costs about as much again as the arithmetic: a reading for
  speed, not one to judge a checkpoint by.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.paroquant import ParoLinear
from safetensors import safe_open
from safetensors.torch import save_file

PARTS = ("qweight", "qzeros", "scales", "theta", "pairs", "channel_scales", "bias")


class Stored:
    """The checkpoint's tensors by name, read when asked for."""

    def __init__(self, directory):
        self.files = [safe_open(path, framework="pt") for path in sorted(directory.glob("model*.safetensors"))]
        self.where = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118  (not a dict)
        self.quantized = {name.removesuffix(".qweight") for name in self.where if name.endswith(".qweight")}

    def __getitem__(self, name):
        return self.where[name].get_tensor(name)


def view(directory, stored, target):
    """Symlinks to the checkpoint's files in `target`, and the settings as GPTQModel wants them."""
    for path in directory.iterdir():
        if path.name not in ("quantize_config.json", "quant_config.json"):
            (target / path.name).symlink_to(path.resolve())
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    plain = sorted(
        name.removesuffix(".weight")
        for name, file in stored.where.items()
        if ".layers." in name and name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2
    )
    wanted = {key: settings[key] for key in ("quant_method", "bits", "group_size", "krot")} | {"sym": True}
    if plain:
        wanted["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in plain}
    (target / "quantize_config.json").write_text(json.dumps(wanted))


def check(model, stored):
    """Stop unless exactly the stored linears are ParoQuant modules, holding what the checkpoint holds."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, ParoLinear)}
    for complaint, names in (
        ("are quantized in the checkpoint but not in the model", stored.quantized - modules.keys()),
        ("are quantized in the model but not in the checkpoint", modules.keys() - stored.quantized),
    ):
        if names:
            raise SystemExit(f"{len(names)} linears {complaint}: {', '.join(sorted(names)[:4])} ...")
    for name, module in modules.items():
        for part in PARTS:
            held, wanted = getattr(module, part), stored.where.get(f"{name}.{part}")
            if (held is None) != (wanted is None):
                raise SystemExit(f"{name}.{part}: stored {wanted is not None}, loaded {held is not None}")
            if held is not None and not torch.equal(held, stored[f"{name}.{part}"].to(held.dtype)):
                raise SystemExit(f"{name}.{part}: the loaded tensor is not the stored one")
    return modules


def to_float32(model, stored):
    """Everything but the ParoQuant modules, whose tensors are buffers, to the stored values in float32."""
    for name, parameter in model.named_parameters():
        parameter.data = (stored[name] if name in stored.where else parameter.data).float()


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--as-is", action="store_true", help="give GPTQModel the directory unchanged")
    args = parser.parse_args()

    stored = Stored(args.checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.checkpoint
        if not args.as_is:
            directory = Path(scratch)
            view(args.checkpoint, stored, directory)
        dtype = torch.float16 if args.dtype == "float32" else getattr(torch, args.dtype)
        model = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.AUTO, dtype=dtype).model

    modules = check(model, stored)
    if args.dtype == "float32":
        to_float32(model, stored)
    rows = json.loads(args.tokens.read_text())
    logits = torch.cat([model(torch.tensor([row])).logits for row in rows]).float()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits.contiguous()}, args.out)
    print(
        f"{len(modules)} linears, all of them {ParoLinear.__module__}.{ParoLinear.__name__}; "
        f"logits {tuple(logits.shape)} computed in {args.dtype}"
    )


if __name__ == "__main__":
    main()
