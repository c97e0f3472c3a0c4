"""A server of ours in a process of its own, for the tests to ask."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest


@dataclass
class Served:
    """A running server: its process, address and log."""

    process: subprocess.Popen
    url: str
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@contextmanager
def served(directory: Path, arguments: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """`pairquant serve` with these arguments in `directory`, on a free port, once it is healthy; killed in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before, _, after = arguments.partition(" -- ")
    command = [sys.executable, "-m", "pairquant", "serve", *before.split(), "--port", str(port), "--", *after.split()]
    log = directory / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **(environment or {})}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
            yield Served(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
            process.wait()


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"no server: exit code {process.poll()}\n{log.read_text()[-3000:]}")
