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
    for column in ("layers of one input", "in", "tokens, up to", "kernel", "rows of a tile"):
        rows.add_column(column, justify="right", no_wrap=True)
    with console.status("measuring"):
        for sizes, channels, choices in job.tune(model, device):
            shape = "+".join(map(str, sizes)), str(channels)
            for tokens, choice in choices.items():
                rows.add_row(*shape, str(tokens), type(choice).__name__.lower(), str(choice.rows))
                shape = "", ""
    console.print(rows)
    console.print(f"kept in {escape(str(table.user_path(device_class(resolve_device(device)))))}")
