"""What every job tells while it works."""

from __future__ import annotations

from typing import Protocol


class Told(Protocol):
    """stage: what it does now; notice: what the user should know."""

    def stage(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...
