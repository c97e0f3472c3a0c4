"""Every family: quantized, loaded, close to the original, its names and tensors kept, exported, saved again.

`python tests/test_families.py > docs/models.md` writes the page of the families from the same run.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, REFUSED, Family
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


def make_source(name: str, directory: Path, families: Mapping[str, Family] = FAMILIES) -> Path:
    """A random model of the family, its experts' weights not zero, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families[name].build()).eval().float()
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


@pytest.mark.parametrize(
    "name", ["Zamba2", "RWKV", "Llama 4 (text)", "LongCat-Flash", "Gemma 3n (text)", "DeepSeek V4"]
)
def test_a_family_of_its_own_kind_is_saved_again_and_exported(name, tmp_path):
    pairquant.quantize(make_source(name, tmp_path / "source"), tmp_path / "packed", CONFIG, device="cpu")
    expected = log_probabilities(tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert torch.equal(log_probabilities(tmp_path / "again"), expected)
    pairquant.export(tmp_path / "packed", tmp_path / "plain", "fp32")
    torch.testing.assert_close(log_probabilities(tmp_path / "plain"), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_before_the_work(name, tmp_path):
    family, words = REFUSED[name]
    source = make_source(name, tmp_path / "source", {name: family})
    with pytest.raises(pairquant.PairQuantError, match=words):
        pairquant.quantize(source, tmp_path / "packed", CONFIG, device="cpu")
    assert not (tmp_path / "packed").exists()


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
- Models that see or hear (`tests/test_towers.py`): LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL with and without experts, Qwen3.5 with and
  without experts, Gemma 3, Gemma 4, Mistral 3, Llama 4, InternVL, GLM-4.1V, Idefics 3, Aya Vision, Qwen2-Audio, Voxtral: the text
  part is quantized, towers and projectors stay plain.
- Zamba and Zamba2: the attention block that several depths use is quantized once, on what it reads at the first of them. Adapters
  for later depths stay plain (under 1 % of the published models).
- RWKV: weights are no longer divided for float16's range at the first forward pass, which codes do not allow; run it in bfloat16 or
  float32.
- In vLLM 0.32 on a CPU: Llama 4 needs `--ignore q_proj --ignore k_proj --ignore v_proj` (then within 5e-7 of Transformers; without, it
  is refused, since vLLM reorders their rows); Zamba2 does not load there, as its model names adapters otherwise.
- Refused before any work, with the reason: DBRX, JetMoE and Doge with experts, whose experts lie in forms of their own (`--ignore`
  quantizes the rest), HRM-Text, whose layers are parts of larger tensors in its files, encoder-only models and encoder-decoders.

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
