"""Other quantizers and ours, each run by its own code, on one model and one calibration text, measured in one way.

    python benchmarks/bench_peers.py [--model DIR] [--device auto] [--peer NAME …] [--bits 4 3] [--group-size 128]
        [--windows N LENGTH] [--quick]

Each peer of peers/table.py runs in its own virtual environment, `.venv-peers/NAME`, made when it is missing from its
pinned requirements; with `--site DIR`, in this interpreter with `DIR/NAME` (filled by `pip install --target`) before its
own packages. It is given the model and 64 × 1024 tokens (setting.py), in windows that begin with `<bos>` where the tokenizer
has it so, and returns a plain model of what its quantized linears multiply with, which is measured here, on such windows,
against the original: nobody's kernels come into it. A row lasts: what the results file has already is not run again, failures only with `--retry`. A peer that cannot run is a row that says why.
`--quick`: little text and few steps, to see what runs. Its rows say so, stay in the work folder and mean nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from embedded_model import gguf_file, unpack
from peers.runners import rounding
from peers.runners.plain import Job
from peers.table import PEERS, Peer
from safetensors.torch import save_file
from setting import CALIBRATION, EVALUATION, SETTING, evaluation_windows, numbers

from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import context_of
from pairquant.evaluation import chains
from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.generation import check_context
from pairquant.evaluation.quality import measure
from pairquant.evaluation.ranking import rank
from pairquant.jobs.evaluate import chain_prompts
from pairquant.optimize.calibration import calibrate
from pairquant.spec.activations import UNROUNDED
from pairquant.support.devices import resolve_device
from pairquant.support.environment import device_name
from pairquant.support.formatting import departure
from pairquant.support.windows import window_prefix

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
#: Windows for recipes that choose their best epoch on other text: as many as the paper's.
HELD_OUT = 64
NEW_ENVIRONMENT = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


@dataclass(frozen=True)
class Scale:
    """How much text: calibration windows (and held-out ones) and their length, evaluation windows and theirs, and the
    original's chains of thought.
    """

    samples: int
    length: int
    evaluation: int | None
    evaluation_length: int
    chains: ChainPlan

    @property
    def windows(self) -> list[int | None]:
        """As rows have it: only what was measured on the same text compares."""
        return [self.evaluation, self.evaluation_length]


FULL = Scale(SETTING["samples"], SETTING["seq_len"], None, 2048, ChainPlan(32, 1024, batch=32))
QUICK = Scale(4, 256, 2, 256, ChainPlan(2, 32))


class Unable(Exception):
    """Why a peer did not run, in a line."""


# What all are given


def model_directory(given: Path | None, work: Path) -> Path:
    """The directory given, or that of a GGUF file (the embedded model's, if none is given), unpacked when it is not yet."""
    if given is not None and given.suffix != ".gguf":
        return given
    gguf = given or gguf_file()
    folder = work / gguf.stem.partition(".")[0]
    if not (folder / "tokenizer_config.json").exists():
        unpack(gguf, folder)
    return folder


def write_calibration(tokenizer: Any, scale: Scale, file: Path) -> None:
    """`tokens`, the setting's windows, and `held_out`, as many of the same text as a recipe may want, none of them in it."""
    held_out = min(HELD_OUT, scale.samples)
    prefix = window_prefix(tokenizer)
    drawn = [
        calibrate(tokenizer, CALIBRATION, n, scale.length, seed=0, prefix=prefix).tokens
        for n in (scale.samples, scale.samples + held_out)
    ]
    tokens, more = drawn
    used = {tuple(window.tolist()) for window in tokens}
    others = torch.stack([window for window in more if tuple(window.tolist()) not in used])
    save_file({"tokens": tokens, "held_out": others[:held_out].contiguous()}, file)


# Environments


def interpreter(peer: Peer, site: Path | None) -> tuple[Path, dict[str, str]]:
    """What runs the peer, and its environment variables; raises `Unable` with pip's own words."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if peer.environment is None:
        return Path(sys.executable), variables
    if site is not None:
        folder = site.resolve() / peer.environment
        if not folder.is_dir():
            raise Unable(f"{folder} is not there: pip install --target {folder} of {peer.requirements.name}'s packages")
        return Path(sys.executable), {
            **variables,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        }
    return made_environment(peer), variables


def made_environment(peer: Peer) -> Path:
    """The interpreter of `.venv-peers/NAME`, made anew when the requirements are not the ones that it was made from."""
    folder = ROOT / ".venv-peers" / peer.environment
    python, made_from = folder / "bin" / "python", folder / "requirements.txt"
    wanted = peer.requirements.read_text()
    if made_from.exists() and made_from.read_text() == wanted:
        return python
    print(f"making {folder.relative_to(ROOT)} …", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", folder],
        [python, *NEW_ENVIRONMENT, "-r", peer.requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unable(f"not installed: {last_error(done.stdout + done.stderr)}")
    shutil.copy(peer.requirements, made_from)
    return python


def last_error(output: str) -> str:
    """The line that names the error, without folders: the last that looks like an exception's or pip's, else the last."""
    named = [line for line in _lines(output) if re.match(r"([\w.]*(Error|Exception|Exit|Interrupt)\b|ERROR:)", line)]
    return _without_folders(named[-1])[:300] if named else last_line(output)


def last_line(output: str) -> str:
    """Without folders, and without the blocks of a progress bar."""
    last = (_lines(output) or ["no output"])[-1]
    return _without_folders(re.sub(r"\s+", " ", re.sub(r"[\u2580-\u259f]+", "", last)))[:300]


def _without_folders(text: str) -> str:
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "…/", text)


def _lines(output: str) -> list[str]:
    return [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]


# Running and measuring


def run_peer(peer: Peer, job: Job, site: Path | None, limit: float | None) -> dict[str, Any]:
    """The runner's facts; the plain model is in `job.output`, the log beside it. Raises `Unable` with its last error.

    What it writes where it runs and into temporary folders goes with it, also when it is stopped.
    """
    folder = Path(job.output).parent
    shutil.rmtree(job.output, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    python, variables = interpreter(peer, site)
    job.write(folder / "job.json")
    text = folder / "log.txt"
    with text.open("w") as log, TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        try:
            done = subprocess.run(
                [python, peer.script, folder / "job.json"],
                cwd=scratch,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**variables, "TMPDIR": scratch},
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            progress = last_line(text.read_text(errors="replace"))
            raise Unable(f"not done after {limit / 60:g} minutes, the last words: {progress}") from None
    if done.returncode:
        error = last_error(text.read_text(errors="replace"))
        raise Unable(f"ended by signal {-done.returncode}: {error}" if done.returncode < 0 else error)
    facts = Path(job.output, "facts.json")
    if not facts.exists():
        raise Unable("the runner ended without its facts")
    return json.loads(facts.read_text())


class Referee:
    """Measures plain models against the original. Raises `ConfigError` for chains that its context has no room for."""

    def __init__(self, files: ModelFiles, device: torch.device, scale: Scale) -> None:
        tokenizer, plan = files.tokenizer(), scale.chains
        prompts = chain_prompts(tokenizer, plan)
        check_context(prompts, plan.tokens, context_of(files.config), "--chains")
        self.device = device
        self.prefix = window_prefix(tokenizer)
        self.texts = evaluation_windows(tokenizer, scale.evaluation_length, scale.evaluation)
        self.original = files.model(torch.float32, device)
        self.chains = chains.sample(self.original, prompts, plan)

    def measure(self, folder: str) -> dict[str, dict[str, Any]]:
        """{text: perplexity, kl, top1, kl_interval, kl_of_windows (rounded to 1e-6), "chains": `ChainQuality` and plan}."""
        model = ModelFiles.find(folder).model(torch.float32, self.device)
        rounding.put(model, Path(folder))
        start = max(1, len(self.prefix))
        found = {name: measure(model, windows, self.original, start=start) for name, windows in self.texts.items()}
        texts = {
            name: {
                **numbers(q),
                "kl_interval": q.kl_interval,
                "kl_of_windows": [round(kl, 6) for kl in q.kl_of_windows or []],
            }
            for name, q in found.items()
        }
        along = asdict(chains.measure(model, self.original, self.chains)) | {"plan": asdict(self.chains.plan)}
        return texts | {"chains": along}


def job_of(peer: Peer, bits: int, options: argparse.Namespace, model: Path, calibration: Path) -> Job:
    output = options.work / f"{peer.name}-{bits}" / "plain"
    return Job(
        model=str(model.resolve()),
        calibration=str(calibration.resolve()),
        output=str(output.resolve()),
        bits=bits,
        group_size=(options.group_size or peer.group_size) if peer.group_size else 0,
        device=str(resolve_device(options.device)),
        quick=options.quick,
        options=peer.options,
    )


def row_of(peer: Peer, job: Job, options: argparse.Namespace, referee: Referee) -> dict[str, Any]:
    """Facts and measurements, or the reason why there are none."""
    try:
        facts = run_peer(peer, job, options.site, options.minutes and 60 * options.minutes)
        return {**facts, **referee.measure(job.output)}
    except Unable as reason:
        return {"reason": str(reason)}
    except (OSError, RuntimeError, ValueError) as error:  # the plain model cannot be loaded or run
        return {"reason": f"its plain model: {last_error(f'{type(error).__name__}: {error}')}"}
    finally:
        if not options.keep:
            shutil.rmtree(job.output, ignore_errors=True)


def scale_of(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else FULL
    if options.windows:
        scale = replace(scale, evaluation=options.windows[0], evaluation_length=options.windows[1])
    if options.chains:
        scale = replace(scale, chains=replace(scale.chains, count=options.chains[0], tokens=options.chains[1]))
    return scale


def compare(wanted: Iterable[tuple[Peer, int]], options: argparse.Namespace, results: Path, model: Path) -> None:
    """Runs what the results lack and appends a row for each."""
    device, scale = resolve_device(options.device), scale_of(options)
    files = ModelFiles.find(str(model))
    done = finished(results, model.name, scale, options.retry)
    missing = [(peer, bits) for peer, bits in wanted if (peer.name, bits) not in done]
    if not missing:
        return
    calibration = options.work / f"calibration-{scale.samples}x{scale.length}.safetensors"
    write_calibration(files.tokenizer(), scale, calibration)
    referee = Referee(files, device, scale)
    for peer, bits in missing:
        print(f"{peer.name}, {bits} bits …", flush=True)
        head = {
            "peer": peer.name,
            "bits": bits,
            "model": model.name,
            "quick": options.quick,
            "windows": scale.windows,
            "device": device_name(device),
            **({"bos": True} if referee.prefix else {}),
        }
        row = head | row_of(peer, job_of(peer, bits, options, model, calibration), options, referee)
        with results.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"  {row.get('reason') or summary(row)}", flush=True)


def summary(row: dict[str, Any]) -> str:
    return f"{row['seconds']} s, KL {row['wikitext2-test']['kl']:.4f} and {row['gsm8k-test']['kl']:.4f}"


# Results


def rows_of(results: Path, model: str, scale: Scale = FULL) -> dict[tuple[str, int], dict[str, Any]]:
    """The last row of each peer and width, of those measured on as much text: one that followed these chains if there is
    any, else one without chains.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        key = row["peer"], row["bits"]
        if (row["model"], row["windows"]) != (model, scale.windows):
            continue
        if "chains" in row and row["chains"]["plan"] != asdict(scale.chains):
            del row["chains"]
        if "chains" in row or "chains" not in found.get(key, {}):
            found[key] = row
    return found


def finished(results: Path, model: str, scale: Scale, retry: bool) -> set[tuple[str, int]]:
    """What is not to be run again."""
    rows = rows_of(results, model, scale)
    return {key for key, row in rows.items() if "chains" in row or ("reason" in row and not retry)}


def table(rows: dict[tuple[str, int], dict[str, Any]], bits: int) -> str:
    """Of one width, the closest to the original first; then what could not be run."""
    peers = {peer.name: peer for peer in PEERS}
    here = [row for (name, width), row in rows.items() if width == bits and name in peers]
    measured = [row for row in here if "reason" not in row]
    lines = [
        f"| {bits} bits | method | group | bits a weight | activations | WikiText2 ppl | KL | behind the closest | GSM8K KL | top-1 |"
        " chains' KL | departs at | s |",
        "| --- " * 13 + "|",
    ]
    behind = behind_the_closest(measured)
    for row in sorted(measured, key=lambda row: row["wikitext2-test"]["kl"]):
        peer, wiki, gsm = peers[row["peer"]], row["wikitext2-test"], row["gsm8k-test"]
        lines.append(
            f"| {peer.label} | {peer.method} | {row['group_size'] or '–'} | {row['bits_per_weight']:.2f} | "
            f"{row.get('activations', UNROUNDED)} | "
            f"{wiki['perplexity']:.2f} | {wiki['kl']:.4f}{half(wiki['kl_interval'])} | {behind[peer.name]} | "
            f"{gsm['kl']:.4f}{half(gsm['kl_interval'])} | {wiki['top1']:.1%} | {along_chains(row)} | {row['seconds']:.3g} |"
        )
    for row in here:
        if "reason" in row:
            peer = peers[row["peer"]]
            reason = row["reason"].replace("|", "\\|") + (f" (needs {peer.needs})" if peer.needs else "")
            lines.append(f"| {peer.label} | {peer.method} | not run: {reason} {'| ' * 10}|")
    return "\n".join(lines)


def along_chains(row: dict[str, Any]) -> str:
    """Two cells: KL along the original's chains; the median of the tokens at which greedy decoding leaves them."""
    if "chains" not in row:
        return " | "
    found = row["chains"]
    return f"{found['kl']:.4f}{half(found['kl_interval'])} | {departure(found['departure_median'])}"


def as_comparison(rows: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """What was measured as `pairquant compare --json` writes it, for `pairquant report --eval`; nobody's speed is in it."""
    known = {peer.name for peer in PEERS}
    return {
        "rows": [
            {
                "name": name if bits == 4 else f"{name}, {bits} bits",
                "size_bytes": None,
                "quantized_in_s": row["seconds"],
                "speed": None,
                "evaluation": {
                    "model": name if bits == 4 else f"{name}, {bits} bits",
                    "reference": row["model"],
                    "texts": {text: row[text] for text in EVALUATION},
                    **({"chains": row["chains"]} if "chains" in row else {}),
                    "bits_per_weight": row["bits_per_weight"],
                    "activations": row.get("activations", UNROUNDED),
                    "device": row["device"],
                },
            }
            for (name, bits), row in rows.items()
            if name in known and "reason" not in row
        ]
    }


def half(interval: list[float] | None) -> str:
    """Half of a 95 % interval."""
    return f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else ""


def behind_the_closest(rows: list[dict[str, Any]]) -> dict[str, str]:
    """How much further from the original on WikiText-2, window for window: mean ± half its 95 % interval."""
    if not rows:
        return {}
    text = "wikitext2-test"
    found = rank({row["peer"]: row[text]["kl_of_windows"] for row in rows})
    differences = {name: f"{gap.kl:.4f}{half(gap.interval)}" for name, gap in found.ahead_of.items()}
    return {found.model: "closest", **differences}


def results_file(options: argparse.Namespace) -> Path:
    device = resolve_device(options.device)
    name = "cpu" if device.type == "cpu" else re.sub(r"NVIDIA |[ -].*", "", torch.cuda.get_device_name(device)).lower()
    return options.work / f"quick-{name}.jsonl" if options.quick else RESULTS / f"peers-{name}.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory or a GGUF file (default: the embedded model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", nargs="+", choices=[peer.name for peer in PEERS], help="these only")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3], choices=(4, 3), help="these widths only")
    parser.add_argument("--group-size", type=int, help="for a model whose rows are all of this size; default: 64")
    parser.add_argument("--site", type=Path, help="run in this interpreter, with DIR/NAME before its packages")
    parser.add_argument("--minutes", type=float, help="give up on a peer after so many")
    parser.add_argument("--windows", nargs=2, type=int, metavar=("N", "LENGTH"), help="measure on less of each text")
    parser.add_argument(
        "--chains", nargs=2, type=int, metavar=("N", "TOKENS"), help="follow fewer of the original's chains"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--retry", action="store_true", help="also what failed before")
    parser.add_argument("--json", type=Path, help="all measured rows, for `pairquant report --eval`")
    parser.add_argument("--keep", action="store_true", help="keep the plain models in the work folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="models, logs and quick results")
    parser.add_argument("--out", type=Path, help="default: results/peers-DEVICE.jsonl")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    model, results = model_directory(options.model, options.work), options.out or results_file(options)
    wanted = [
        (p, bits) for bits in options.bits for p in PEERS if bits in p.bits and p.name in (options.peer or [p.name])
    ]
    compare(wanted, options, results, model)
    if options.json:
        options.json.write_text(json.dumps(as_comparison(rows_of(results, model.name, scale_of(options)))))
    if options.quick:
        print("\nA quick run, to see what works: these numbers mean nothing.")
    print(
        "",
        *(table(rows_of(results, model.name, scale_of(options)), bits) for bits in options.bits),
        f"Rows: {results}",
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
