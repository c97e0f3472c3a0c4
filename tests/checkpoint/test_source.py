"""The source's blocks come from disk one by one, the next one read ahead."""

import pytest
import torch
from killing import save_source

from pairquant.checkpoint import source as module
from pairquant.checkpoint.read import ModelFiles
from pairquant.checkpoint.source import SourceWeights
from pairquant.models.blocks import find_blocks
from pairquant.support.errors import SourceError

CPU = torch.device("cpu")


@pytest.fixture
def opened(tmp_path):
    """The source, its blocks without weights, and what they should hold."""
    files = ModelFiles.find(str(save_source(tmp_path / "source", blocks=2)))
    skeleton = files.skeleton()
    return (
        SourceWeights.open(files, skeleton, files.names(skeleton), tmp_path / "spill"),
        find_blocks(skeleton),
        files.model().state_dict(),
    )


@pytest.mark.parametrize("largest", [0, module.AHEAD_BYTES])
def test_a_block_is_the_same_whether_it_was_read_ahead_or_not(opened, largest, monkeypatch):
    monkeypatch.setattr(module, "AHEAD_BYTES", largest)
    source, blocks, expected = opened
    source.expect(blocks[1], CPU)
    source.enter(blocks[1], CPU, torch.float32)
    for name, value in blocks[1].module.state_dict().items():
        assert torch.equal(value, expected[f"{blocks[1].path}.{name}"]), name
    source.leave(blocks[1])
    assert all(p.is_meta for p in blocks[1].module.parameters())


def test_a_block_read_ahead_is_not_a_map_of_the_file(opened):
    source, blocks, _ = opened
    source.expect(blocks[0], CPU)
    file = source.files[0]
    source.enter(blocks[0], CPU, torch.float32)
    before = {name: value.clone() for name, value in blocks[0].module.state_dict().items()}
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        content.write(bytes(file.stat().st_size // 2))
    assert all(torch.equal(value, before[name]) for name, value in blocks[0].module.state_dict().items())


def test_a_source_that_changed_is_noticed_in_a_block_read_ahead(opened):
    source, blocks, _ = opened
    source.files[0].touch()
    source.expect(blocks[0], CPU)
    with pytest.raises(SourceError, match="changed while it was being quantized"):
        source.enter(blocks[0], CPU, torch.float32)
