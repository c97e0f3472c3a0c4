"""What the user is told before the work of layers whose activations are rounded."""

import pytest
import torch
from test_families import make_source
from tiny_models import save_tiny

from pairquant.backends.table import explain
from pairquant.jobs.opened import Opened
from pairquant.jobs.remarks import of_activations
from pairquant.spec.options import QuantConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("remarks") / "source")


def said(model, tokens=10**6, **options):
    return of_activations(Opened.of(model, QuantConfig(group_size=32, **options)), CPU, tokens)


def test_nothing_is_said_where_nothing_is_rounded(source):
    assert said(source) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_told_apart_from_linears_and_vllm_refuses_those_it_decodes(bits, tmp_path):
    model = make_source("Mixtral", tmp_path / "source")
    lines = said(model, activations="int8", overrides=(f"re:.*experts.*=bits:{bits}",))
    blocks = Opened.of(model, QuantConfig(group_size=32)).blocks
    experts = sum(site.pool is not None for block in blocks for site in block.sites.values())
    others = sum(len(block.sites) for block in blocks) - experts
    assert [line.partition(" read is")[0] for line in lines[:2]] == [
        f"what {others} layers",
        f"what {experts} layers of experts",
    ]
    assert "of experts read is rounded to int8, simulated on this machine" in lines[1]
    refused = [line for line in lines[2:] if line.startswith("vLLM will refuse this checkpoint on a machine like this")]
    assert len(lines) == 2 + len(refused)
    assert len(refused) == (bits == 8)  # 4 bits are multiplied from their codes
    assert all(f"nothing in it rounds what {experts} layers of experts read" in line for line in refused)


def test_layers_that_run_otherwise_have_a_line_of_their_own(source):
    opened = Opened.of(source, QuantConfig(group_size=32, activations="int8", overrides=("down_proj=bits:8",)))
    labels = {}
    for layout in opened.plan.layouts.values():
        label = explain(layout, CPU, torch.bfloat16).label
        labels[label] = labels.get(label, 0) + 1
    lines = of_activations(opened, CPU, 10**6)
    assert sorted(int(line.split()[1]) for line in lines) == sorted(labels.values())
    for label, count in labels.items():
        name, simulated = label.partition(" ")[0], "simulated" in label
        (line,) = [line for line in lines if f"{name} rounds them" in line or line.endswith(f"as such by {name}")]
        assert line.startswith(f"what {count} layers read")
        assert ("simulated on this machine" in line) == simulated


@pytest.mark.parametrize(
    ("activations", "tokens", "told"), [("int4", 4000, 14), ("int4", 4096, 2), ("int4", 10**6, 0), ("int8", 10, 0)]
)
def test_a_text_too_short_to_fit_weights_to_rounded_inputs_is_named(source, activations, tokens, told):
    lines = [line for line in said(source, tokens, activations=activations) if "before rounding" in line]
    assert len(lines) == bool(told)
    if told:
        assert lines[0].startswith(f"the weights of {told} layers are fitted to inputs before rounding")
        assert f"the text has {tokens:,}" in lines[0]


def test_recipes_without_text_say_nothing_of_its_length(source):
    assert len(said(source, 0, activations="int4", preset="rtn")) == 1
