"""Thousands of checkpoints with one thing wrong, read by `pairquant.inspect` and by Transformers.

    python benchmarks/mutate_checkpoints.py [--count 10000] [--seed 0] [--output benchmarks/results/mutations-cpu.json]

What is done to them, and what must become of it: tests/mutations.py. Each must load right or be refused by an error of
ours, without opening a pickle or running code. They are read in a process of its own, whose address space is limited to
4 GiB above what its libraries take: a shape of 2^40 is then a failure in the table, not the end of the machine. A reader
that kills the process is a failure, too, and the next process goes on behind it. About nine minutes for 10,000 on one core.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

SPARE_BYTES = 4 << 30


def work(count: int, seed: int, journal: Path) -> None:
    """Examine `count` mutations; a line before each says what is coming, a line after it what came."""
    import torch
    from examination import Bench, quiet
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from mutations import MUTATIONS

    torch.set_num_threads(1)
    with quiet(), tempfile.TemporaryDirectory() as root, journal.open("a") as lines:
        bench = Bench(Path(root))
        limit = status("VmSize") + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = status("VmRSS")

        def note(**entry) -> None:
            lines.write(json.dumps(entry) + "\n")
            lines.flush()

        @seeded(seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(MUTATIONS)
        def examine(mutation) -> None:
            note(kind=mutation.kind, what=repr(mutation))
            try:
                outcome = bench.examine(mutation)
                note(**vars(outcome))
            except AssertionError as failure:
                note(failure=str(failure)[:500])

        examine()
        note(rss_before=before, rss_peak=status("VmHWM"))


def status(field: str) -> int:
    """Bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def read_journal(journal: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Outcomes, failures (with a kind and a description each), measured memory."""
    outcomes, failures, memory, coming = [], [], [], None
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        if "rss_peak" in entry:
            memory.append(entry)
        elif "kind" in entry:
            coming = entry
        else:
            (failures if "failure" in entry else outcomes).append(coming | entry)
            coming = None
    if coming is not None:
        failures.append(coming | {"failure": "the process died"})
    return outcomes, failures, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mutations-cpu.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.count, options.seed, options.worker)
        return 0
    start, outcomes, failures, memory, round_ = time.monotonic(), [], [], [], 0
    with tempfile.TemporaryDirectory() as root:
        while (left := options.count - len(outcomes) - len(failures)) > 0 and round_ < 20:
            journal = Path(root) / f"{round_}.jsonl"
            command = [sys.executable, __file__, "--worker", journal, "--count", left, "--seed", options.seed + round_]
            done = subprocess.run(list(map(str, command)), check=False)
            found = read_journal(journal)
            outcomes, failures, memory = outcomes + found[0], failures + found[1], memory + found[2]
            print(
                f"{len(outcomes)} as they must be, {len(failures)} not; worker ended with {done.returncode}", flush=True
            )
            round_ += 1
    save(options, outcomes, failures, memory, time.monotonic() - start)
    for failure in failures:
        print(f"{failure['what'][:200]}\n    {failure['failure'][:300]}")
    return 1 if failures else 0


def save(options, outcomes: list[dict], failures: list[dict], memory: list[dict], seconds: float) -> None:
    """Counts by kind of mutation and outcome (inspect / Transformers)."""
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for entry in outcomes:
        table[entry["kind"]][f"{entry['inspect']} / {entry['transformers']}"] += 1
    total = collections.Counter(f"{entry['inspect']} / {entry['transformers']}" for entry in outcomes)
    packages = ("pairquant", "torch", "transformers", "safetensors", "hypothesis")
    result = {
        "examined": len(outcomes) + len(failures),
        "failures": failures,
        "outcomes, inspect / Transformers": dict(total.most_common()),
        "by kind": {kind: dict(counts.most_common()) for kind, counts in sorted(table.items())},
        "errors of Transformers' own": dict(
            collections.Counter(
                e["error"].partition(":")[0] for e in outcomes if e["transformers"] == "foreign"
            ).most_common()
        ),
        "resident_mib_before": max(m["rss_before"] for m in memory) >> 20 if memory else None,
        "resident_mib_peak": max(m["rss_peak"] for m in memory) >> 20 if memory else None,
        "seconds": round(seconds),
        "seed": options.seed,
        "machine": f"{platform.machine()} CPU, 1 thread",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
