"""How numbers and names are written, the same on the terminal and in reports."""

from __future__ import annotations

from typing import Any


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3f}"


def plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def short_name(path: str) -> str:
    """ "model.layers.3.mlp.up_proj" → "up"."""
    return path.rpartition(".")[2].removesuffix("_proj")


def block_and_rest(path: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj" → "3", "mlp.up_proj"; a path outside the blocks → "", path."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))
