"""How a plain model rounds what its linears read: a file beside its weights, which our own runner writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pairquant.models.rounded_inputs import InputRounding

#: The two matrices of every linear, by path, and in the metadata the rest.
FILE = "roundings.safetensors"


def write(folder: Path, roundings: Mapping[str, InputRounding]) -> None:
    """Keep how linears round their inputs, by path, in the folder of a plain model."""
    tensors, facts = {}, {}
    for path, each in roundings.items():
        tensors |= {f"{path}:into": each.into.cpu().contiguous(), f"{path}:out_of": each.out_of.cpu().contiguous()}
        facts[path] = json.dumps([each.activations, each.group_size])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, facts)


def put(model: nn.Module, folder: Path) -> None:
    """Let a plain model round what its linears read from now on, if its folder says so."""
    if not (folder / FILE).exists():
        return
    with safe_open(folder / FILE, "pt") as file:
        for path, facts in file.metadata().items():
            matrices = file.get_tensor(f"{path}:into"), file.get_tensor(f"{path}:out_of")
            rounding = InputRounding(*matrices, *json.loads(facts))
            model.get_submodule(path).register_forward_pre_hook(partial(_rounded, rounding))


def _rounded(rounding: InputRounding, module: nn.Module, args: tuple) -> tuple:
    return (rounding(args[0]), *args[1:])
