"""The quantizers that are compared, as data: a row is run by its runner, in the environment of its requirements."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """name: as in results and on the command line; label, method: as in the table.

    runner: a script of runners/, given options; environment: a file of requirements/, None for this project's own.
    bits: those it is asked for; group_size: as close to the setting's 64 as it allows, 0 where there are no groups.
    needs: what it cannot do without, for the reader: the run itself finds out.
    """

    name: str
    label: str
    method: str
    runner: str
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = (4,)
    group_size: int = 64
    needs: str = ""

    @property
    def script(self) -> Path:
        return FOLDER / "runners" / f"{self.runner}.py"

    @property
    def requirements(self) -> Path | None:
        return FOLDER / "requirements" / f"{self.environment}.txt" if self.environment else None


LLM_COMPRESSOR = {"runner": "llm_compressor", "environment": "llmcompressor", "bits": (4, 3)}
GPTQMODEL = {"runner": "gptq_model", "environment": "gptqmodel"}
OURS = {"runner": "ours", "bits": (4, 3)}

PEERS = (
    Peer("rtn", "PairQuant `rtn`", "round to nearest", options={"preset": "rtn"}, **OURS),
    Peer("quick", "PairQuant `quick`", "`fast`, a sixth of the steps", options={"preset": "quick"}, **OURS),
    Peer("fast", "PairQuant `fast`", "rotations, proxy, GPTQ", options={"preset": "fast"}, **OURS),
    # As many bits as the others' grids, for a comparison at equal size.
    Peer(
        "fast-scales", "PairQuant `fast`, K = 0", "channel scales, GPTQ",
        options={"preset": "fast", "rotations": 0}, **OURS,
    ),
    Peer("best", "PairQuant `best`", "`fast`, refitted", options={"preset": "best"}, **OURS),
    Peer(
        "fast-int8", "PairQuant `fast`, int8", "`fast`, activations rounded too",
        options={"preset": "fast", "activations": "int8"}, runner="ours",
    ),
    Peer(
        "best-int4", "PairQuant `best`, int4", "`best`, activations rounded too",
        options={"preset": "best", "activations": "int4"}, runner="ours",
    ),
    Peer("paper", "PairQuant `paper`", "ParoQuant's recipe", options={"preset": "paper"}, **OURS),
    Peer(
        "efficientqat",
        "PairQuant `paper`, no transform",
        "EfficientQAT's block-wise training",
        # Both stages then train what EfficientQAT's Block-AP does: weights, scales and zero points.
        options={"preset": "paper", "changes": ["transform=False"]},
        **OURS,
    ),
    Peer("llmcompressor-rtn", "llm-compressor", "round to nearest", options={"method": "rtn"}, **LLM_COMPRESSOR),
    # In the checkpoint's float16 its search for scales met NaN on an H100.
    Peer("llmcompressor-awq", "llm-compressor", "AWQ", options={"method": "awq", "dtype": "float32"}, **LLM_COMPRESSOR),
    Peer("llmcompressor-gptq", "llm-compressor", "GPTQ", options={"method": "gptq"}, **LLM_COMPRESSOR),
    Peer("autoround", "AutoRound", "learned rounding", "autoround", "auto-round", bits=(4, 3)),
    # Its README's `auto-round-best` on the text that all are given: five times the steps.
    Peer(
        "autoround-1000", "AutoRound, 1000 steps", "learned rounding", "autoround", "auto-round", {"steps": 1000},
        bits=(4, 3),
    ),
    Peer("gptqmodel-gptq", "GPTQModel", "GPTQ", options={"method": "gptq"}, bits=(4, 3), **GPTQMODEL),
    # Its ParoQuant layers have 4 bits only (nn_modules/qlinear/paroquant.py).
    Peer("gptqmodel-paroquant", "GPTQModel", "ParoQuant", options={"method": "paroquant"}, **GPTQMODEL),
    Peer("original", "ParoQuant, its authors'", "ParoQuant", "original", "paroquant", needs="a GPU, nvcc"),
    Peer(
        "exllamav3", "exllamav3", "QTIP's trellis", "trellis", "exllamav3", bits=(4, 3), group_size=0,
        needs="a GPU, nvcc",
    ),
    Peer("nf4", "bitsandbytes", "NF4, nested", "nf4", "bitsandbytes"),
)  # fmt: skip
