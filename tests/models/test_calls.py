"""What blocks are called with: the same for every window, by window, or what earlier blocks have left."""

from collections import UserDict

import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

from pairquant.models.blocks import find_blocks, run_from
from pairquant.models.calls import HANDED, Call, Carry, PerWindow, Recording, linked
from pairquant.models.sharing import fold_shared, settle_scales
from pairquant.optimize import streams as streams_module
from pairquant.optimize.streams import Places, Streams
from pairquant.support.errors import SourceError

CPU = torch.device("cpu")
X = torch.zeros(2, 3, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [
        "Qwen3",
        "Gemma 3n (text)",
        "Gemma 4 (text)",
        "GLM-5",
        "Hunyuan 4",
        "RWKV",
        "Zamba",
        "Zamba2",
        "Qwen4 (experimental)",
    ],
)
def test_block_after_block_over_a_whole_text_gives_the_models_logits(family, monkeypatch):
    """Three micro-batches, of which the last is smaller: no window is given what belongs to another."""
    monkeypatch.setattr(streams_module, "MICRO_BATCH_TOKENS", 64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
    fold_shared(model)
    settle_scales(model)
    blocks = find_blocks(model)
    tokens = torch.randint(3, 259, (5, 32), generator=torch.Generator().manual_seed(0))
    streams = Streams.start(model, blocks, tokens, True, Places(CPU, CPU, torch.float32), print)
    assert [len(hidden) for hidden in streams.quantized] == [2, 2, 1]
    for index, block in enumerate(blocks):
        streams.observe(block, index)
        streams.advance(block, index)
    expected = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    for stream in (streams.quantized, streams.original):
        found = run_from(model, blocks, tokens, torch.cat(stream)).log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_arguments_that_differ_are_kept_by_window():
    mask, position = torch.ones(1, 3), torch.arange(3)
    recording = Recording((mask,), {"position": position, "embedded": X}, 2)
    recording.add((mask.clone(),), {"position": position, "embedded": X + 1}, 2)
    recording.add((mask.clone(),), {"position": position, "embedded": X[:1] + 2}, 1)
    call = recording.call("block", 3)
    assert call.args[0] is mask
    assert isinstance(call.kwargs["embedded"], PerWindow)

    def block(hidden, mask, position, embedded):
        return hidden + embedded

    found = call.run(block, torch.zeros(2, 3, 4), torch.tensor([4, 1]))
    assert found[:, 0, 0].tolist() == [2, 0]
    assert call.to(CPU, torch.bfloat16).kwargs["embedded"].rows.dtype == torch.bfloat16


def test_a_tensor_that_depends_on_the_text_without_rows_is_refused():
    recording = Recording((torch.zeros(6),), {}, 2)
    recording.add((torch.ones(6),), {}, 2)
    with pytest.raises(SourceError, match=r"layers\.0 is given a tensor of shape \[6\].*--preset rtn"):
        recording.call("layers.0", 0)


def test_what_is_handed_on_and_noted_belongs_to_its_windows():
    first = Recording((), {"notes": UserDict()}, 2).call("a", 0)
    second = Recording((), {"before": HANDED, "notes": UserDict()}, 2).call("b", 1)
    assert second.carries
    calls, carry = linked([first, second]), Carry(CPU)

    def writes(hidden, notes):
        notes["key"] = (hidden + 1,)
        return hidden, hidden * 10

    def reads(hidden, before, notes):
        assert isinstance(notes, UserDict)
        return hidden + before + notes["key"][0]

    text = torch.arange(4.0).view(4, 1, 1)
    for part in torch.arange(4).split(2):
        calls[0].on(carry, writes=True).run(writes, text[part], part)
    mixed = torch.tensor([3, 0])
    found = calls[1].on(carry, writes=False).run(reads, text[mixed], mixed)
    assert found.flatten().tolist() == [3 + 30 + 4, 0 + 0 + 1]
    assert torch.equal(Call((), {}, 2).run(lambda hidden: hidden, X), X)
