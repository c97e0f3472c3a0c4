"""QTIP's trellis codes through exllamav3's converter, with its defaults and the job's text; the head stays as it is.

It compiles its CUDA kernels when it is imported, which is not counted. Dimensions are padded to multiples of 128.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plain import Job, Outcome, Stopwatch, linears_of, run
from safetensors.torch import load_file, save_file


def convert(job: Job, folder: Path) -> tuple[Path, float]:
    """Where the converted model is, and how long it took."""
    from exllamav3.conversion import convert_model

    windows = job.windows
    save_file({"input_ids": windows}, folder / "text.safetensors")
    options = {
        "--in_dir": job.model,
        "--work_dir": folder / "work",
        "--out_dir": folder / "model",
        "--bits": job.bits,
        "--head_bits": 16,
        "--cal_data": folder / "text.safetensors",
        "--cal_rows": len(windows),
        "--cal_cols": windows.shape[1],
    }
    given = convert_model.parser.parse_args([str(part) for option in options.items() for part in option])
    arguments, state, accepted, error = convert_model.prepare(given)
    if not accepted:
        raise ValueError(error)
    with Stopwatch(job.device) as watch:
        convert_model.main(arguments, state)
    return folder / "model", watch.seconds


def stored_bits(folder: Path, paths: set[str]) -> int:
    """Of the linears at these paths: their trellis, and the signs and scales of rows and columns."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return sum(8 * t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[0] in paths)


def plain_weight(linear: Any) -> torch.Tensor:
    """[N, C] without the padding, from exllamav3's own decoder."""
    return linear.inner.get_weight_tensor()[: linear.in_features_unpadded, : linear.out_features_unpadded].T


def quantize(job: Job) -> Outcome:
    from exllamav3 import Config, Model

    linears = linears_of(job.load())
    with TemporaryDirectory() as name:
        folder, seconds = convert(job, Path(name))
        model = Model.from_config(Config.from_directory(str(folder)))
        model.load(job.device)
        weights = {path: plain_weight(model.find_module(path)) for path in linears}
        stored = stored_bits(folder, set(linears))
    count = sum(linear.weight.numel() for linear in linears.values())
    return Outcome(weights, seconds, stored / count, group_size=0, others={})


if __name__ == "__main__":
    run(quantize, ["exllamav3"])
