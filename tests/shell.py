"""The command line as a user types it, in a process of its own."""

import subprocess
import sys


def pairquant(directory, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pairquant", *map(str, arguments)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=300, **options,
    )  # fmt: skip


def assert_refused(directory, arguments, message):
    """Check that a command ends with one message and without a traceback, and writes no output `out2`."""
    done = pairquant(directory, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "out2").exists()
