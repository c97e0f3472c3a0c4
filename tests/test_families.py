"""Every family: quantized, loaded, close to the original, its names and tensors kept, exported, saved again.

`python tests/test_families.py > docs/models.md` writes the page of the families from the same run.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from tiny_models import TEXT, byte_tokenizer
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.models.blocks import find_blocks

CONFIG = pairquant.QuantConfig(
    preset="quick", bits=8, group_size=32, rotations=2, samples=2, seq_len=64, calibration=(str(TEXT),)
)
TOKENS = torch.arange(3, 131).view(2, 64)


@dataclass(frozen=True)
class Outcome:
    """share: of the blocks' matrices, packed; kl: against the original, nats per token; plain: last names left plain."""

    share: float
    kl: float
    plain: tuple[str, ...]


def make_source(name: str, directory: Path) -> Path:
    """A random model of the family, its experts' weights not zero, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name].build()).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3 and parameter.std() == 0:
                parameter.normal_(std=0.02)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def log_probabilities(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(TOKENS, use_cache=False).logits.log_softmax(-1)


def outcome_of(name: str, root: Path) -> Outcome:
    """Quantize and compare; raises `AssertionError` where names or tensors are not kept."""
    source = make_source(name, root / "source")
    pairquant.quantize(source, root / "packed", CONFIG, device="cpu")
    before, after = StoredTensors.of_directory(source), StoredTensors.of_directory(root / "packed")
    packed = after.packed_names()
    assert {n for n in after.fields if n not in packed} <= set(before.fields), "a tensor under a name of its own"
    blocks = find_blocks(AutoModelForCausalLM.from_pretrained(source))
    parameters = {
        id(p): p for block in blocks for p in block.module.parameters()
    }.values()  # those of several places once
    matrices = sum(p.numel() for p in parameters if p.dim() == 2)
    experts = sum(p.numel() for p in parameters if p.dim() == 3 and p.shape[1] > 1)
    quantized = sum(
        layout.in_features * layout.out_features
        for layout in (pairquant.inspect(root / "packed").checkpoint.layout(path) for path in after.linears())
    )
    plain = tuple(
        dict.fromkeys(n.removesuffix(".weight").rpartition(".")[2] for n in after.fields if is_matrix(after, n, packed))
    )
    expected, found = log_probabilities(source), log_probabilities(root / "packed")
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return Outcome(quantized / (matrices + experts), kl, plain)


def is_matrix(stored: StoredTensors, name: str, packed: set[str]) -> bool:
    outside = any(part in name for part in ("embed", "lm_head", "wte", "wpe")) or name == "head.weight"
    return name not in packed and len(stored.fields[name].shape) == 2 and not outside


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_packed_close_and_keeps_its_names(name, tmp_path):
    found = outcome_of(name, tmp_path)
    assert found.share >= FAMILIES[name].share, found
    assert found.kl < 1e-3, found


HEADER = """# Families

Every family below was made as a tiny random model, quantized (8 bits, groups of 32, on a CPU), loaded by Transformers {version},
compared with the original on random tokens, and its tensors' names with the source's. `tests/test_families.py` does this in every
run of the tests; `python tests/test_families.py > docs/models.md` writes this page.

- **packed**: the share of the blocks' matrices that is quantized; **plain**: matrices that are not, by the last part of their names.
- **KL**: nats per token from the original.
- Routers and gates stay plain by a table (`ROUTERS` in `src/pairquant/models/planning.py`), and small matrices that do not fit because
  they are small; state parameters and convolutions are no linear layers. Names in the checkpoint are those of the source.
- In vLLM: which families were run on a CPU (0.32) and on an H100 (0.26), and how near they came, is in
  benchmarks/results/vllm-families-cpu.json and vllm-families-h100.json (benchmarks/vllm_families.py).
- On an H100 (Transformers 5.17, torch 2.11) Qwen3-MoE, Mixtral, gpt-oss, Granite MoE, Qwen3-Next, Nemotron-H, LFM2-MoE and Jamba were
  quantized and run: within 4e-7 of the CPU's logits in float32.

| family | kind | packed | KL | plain |
| --- | --- | --- | --- | --- |"""


def test_the_page_names_every_family():
    shown = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert all(f"| {name} | {family.kind} |" in shown for name, family in FAMILIES.items())


def page() -> str:
    """Run every family and return the page."""
    lines = [HEADER.format(version=transformers.__version__)]
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            found = outcome_of(name, Path(directory))
        kl = f"{max(found.kl, 0):.0e}"
        lines.append(f"| {name} | {family.kind} | {found.share:.1%} | {kl} | {', '.join(found.plain)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
