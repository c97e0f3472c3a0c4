"""Send the numbers of the log to TensorBoard or Weights & Biases, if the user asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, did_you_mean

Log = Callable[[Mapping[str, Any]], None]
NAMES = ("tensorboard", "wandb")


@contextmanager
def logger(name: str | None, output: Path) -> Iterator[Log | None]:
    """Give a function that sends an event of the log to the service `name`; None if `name` is None.

    Raises `ConfigError` if the name is unknown, or if the package of the service is not installed.
    """
    if name is None:
        yield None
        return
    if name not in NAMES:
        raise ConfigError(f"log-to is {name!r}, allowed: {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    try:
        log, close = _tensorboard(output) if name == "tensorboard" else _wandb(output)
    except ImportError as error:
        raise ConfigError(f"--log-to {name} needs the package {name}: pip install {name}") from error
    try:
        yield log
    finally:
        close()


def _tensorboard(output: Path) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output.with_name(f"{output.name}-tensorboard")))

    def log(event: Mapping[str, Any]) -> None:
        for key, value in numbers(event).items():
            writer.add_scalar(key, value, event.get("index", 0))

    return log, writer.close


def _wandb(output: Path) -> tuple[Log, Callable[[], None]]:
    import wandb

    run = wandb.init(project="pairquant", name=output.name)
    return (lambda event: run.log(numbers(event), step=event.get("index"))), run.finish


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a finished block's event: seconds, memory, and the error of each kind of linear.

    Any other event gives an empty dict.
    """
    if event.get("event") != "block":
        return {}
    found = {key: float(value) for key, value in event.items() if type(value) in (int, float) and key != "index"}
    errors = {f"error/{path.rpartition('.')[2]}": float(value) for path, value in event["errors"].items()}
    return found | errors
