"""The tensors of a folded model, one by one: which change, into what, and how they are stored."""

import pytest
import torch
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.source import SourceWeights
from pairquant.jobs.fold import Job, Silent, fitting
from pairquant.jobs.opened import Opened
from pairquant.jobs.rewritten import Rewritten
from pairquant.models.folding import Transforms
from pairquant.support.errors import ConfigError

CPU = torch.device("cpu")
CONFIG = pairquant.QuantConfig(
    preset="quick", group_size=32, rotations=4, samples=4, seq_len=32, calibration=(str(TEXT),)
)


@pytest.fixture
def folded(tmp_path):
    """Make `Rewritten` of a new tiny model: (dtype, transforms for what was found) → it, and the tensors on disk."""
    sources = []

    def make(dtype, transforms):
        directory = save_tiny(tmp_path / "source", dtype=dtype)
        opened = Opened.of(directory, fitting(CONFIG))
        job = Job(opened, tmp_path / "out", CPU, Silent())
        job.source = SourceWeights.open(opened.files, opened.skeleton, opened.names, tmp_path / "spill")
        sources.append(job.source)
        job._look()
        rewritten = Rewritten(opened, job.source, job.found, job.outside, transforms(job), CPU)
        return rewritten, StoredTensors.of_directory(directory)

    yield make
    for source in sources:
        source.close()


def rotation(width):
    """R of the stream, [G, 32, 32]."""
    return torch.linalg.qr(torch.randn(width // 32, 32, 32, generator=torch.Generator().manual_seed(0)))[0]


def rotated(x, matrices):
    """Each group of 32 channels of x [..., C], rotated."""
    return torch.einsum("...gi,gij->...gj", x.unflatten(-1, (-1, 32)), matrices).flatten(-2)


def test_without_transforms_the_tensors_of_blocks_stay_what_they_are(folded):
    rewritten, stored = folded(torch.float32, lambda job: Transforms())
    entries = rewritten.entries()
    assert set(entries) == {name for name in stored.fields if ".layers." in name}
    for name, entry in entries.items():
        assert entry.field == stored.fields[name]
        torch.testing.assert_close(entry.load(), stored.load(name), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_stream_rotates_what_reads_and_writes_it(folded, dtype):
    matrices = rotation(128)
    rewritten, stored = folded(dtype, lambda job: Transforms(stream=matrices))
    entries = rewritten.entries()
    assert set(entries) == set(stored.fields)
    loaded = {name: entry.load() for name, entry in entries.items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == {
        name: (field.dtype, tuple(field.shape)) for name, field in stored.fields.items()
    }
    layer = "model.layers.1."
    norm = stored.load(f"{layer}input_layernorm.weight").float()
    reads = rotated(stored.load(f"{layer}self_attn.q_proj.weight").float() * norm, matrices)
    writes = rotated(stored.load(f"{layer}mlp.down_proj.weight").float().T, matrices).T
    looked_up = rotated(stored.load("model.embed_tokens.weight").float(), matrices)
    close = {"rtol": 0, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(loaded[f"{layer}self_attn.q_proj.weight"].float(), reads, **close)
    torch.testing.assert_close(loaded[f"{layer}mlp.down_proj.weight"].float(), writes, **close)
    torch.testing.assert_close(loaded["model.embed_tokens.weight"].float(), looked_up, **close)
    assert torch.all(loaded["model.norm.weight"] == 1)


def test_tensors_may_be_asked_for_in_any_order(folded):
    rewritten, _ = folded(torch.float32, lambda job: Transforms(stream=rotation(128)))
    entries = rewritten.entries()
    first = {name: entries[name].load().clone() for name in entries}
    for name in sorted(entries, key=lambda name: name[::-1]):  # from block to block and back
        assert torch.equal(entries[name].load(), first[name])


def test_values_that_float16_does_not_hold_are_refused_by_name(folded):
    def large(job):
        return Transforms(norms={job.found[0].norms[0].place: torch.full((128,), 3e6)})

    rewritten, _ = folded(torch.float16, large)
    entries = rewritten.entries()
    with pytest.raises(ConfigError, match=r"tensor model.layers.0.* reaches .* after folding, more than torch.float16"):
        entries["model.layers.0.self_attn.q_proj.weight"].load()
    assert entries["model.layers.1.self_attn.q_proj.weight"].load().isfinite().all()
