"""`pairquant tune`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from .app import Device, Model, app, console, quiet_libraries


@app.command(epilog="Example: pairquant tune MODEL-PARO")
def tune(model: Model, device: Device = "auto") -> None:
    """Measure the kernels' tiles for the shapes of a checkpoint on this GPU; they are used from then on."""
    quiet_libraries()
    from ..jobs import tune as job
    from ..kernels.availability import device_class
    from ..kernels.run import table
    from ..support.devices import resolve_device

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("linears", "in", *(f"≤ {tokens} tokens" for tokens in table.TOKENS)):
        rows.add_column(column, justify="right", no_wrap=True)
    with console.status("measuring"):
        for sizes, channels, choices in job.tune(model, device):
            tiles = (f"{type(choice).__name__.lower()} {choice.rows}" for choice in choices.values())
            rows.add_row("+".join(map(str, sizes)), str(channels), *tiles)
    console.print(rows)
    console.print(f"kept in {escape(str(table.user_path(device_class(resolve_device(device)))))}")
