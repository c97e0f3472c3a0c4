"""What is taken from SGLang, against stand-ins that hold what its own modules hold."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pairquant.integrations.sglang import compat


@pytest.fixture
def modules(monkeypatch):
    """Enter modules of SGLang: name below `sglang.srt` → what they hold."""

    def enter(**contents):
        for path in ("sglang", "sglang.srt"):
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for name, content in contents.items():
            path = "sglang.srt"
            for part in name.split("__"):
                parent, path = sys.modules[path], f"{path}.{part}"
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                setattr(parent, part, sys.modules[path])
            vars(sys.modules[path]).update(content)

    return enter


def test_names_come_from_where_sglang_has_them(modules):
    modules(layers__linear={"LinearBase": int})
    assert compat.LinearBase is int
    with pytest.raises(AttributeError, match="no attribute 'Linear'"):
        _ = compat.Linear


def test_a_method_is_entered_once_into_every_table(modules):
    choices = ["awq"]
    tables = {"QUANTIZATION_METHODS": {"awq": str}, "CPU_QUANTIZATION_METHODS": {}}
    modules(
        arg_groups__choices={"QUANTIZATION_CHOICES": choices, "add_quantization_method_choices": choices.extend},
        layers__quantization=tables,
    )
    for _ in range(2):
        compat.add_method("ours", int)
    assert choices == ["awq", "ours"]
    assert tables == {"QUANTIZATION_METHODS": {"awq": str, "ours": int}, "CPU_QUANTIZATION_METHODS": {"ours": int}}


def test_the_group_of_a_layer_is_asked_for_its_rank(modules):
    modules(distributed__utils={"get_group_rank_size": lambda group: group or (0, 1)})
    layer = SimpleNamespace(tp_group=(1, 4), kv_tp_group=None)
    assert compat.rank_and_size(layer) == (1, 4)
    assert compat.rank_and_size(layer, "kv_tp_group") == (0, 1)
    assert compat.rank_and_size(SimpleNamespace()) == (0, 1)


@pytest.mark.parametrize(("model", "revision"), [("org/model", "tag"), ("org/draft", "other")])
def test_a_model_and_the_one_that_drafts_for_it_have_revisions_of_their_own(modules, model, revision):
    asked = SimpleNamespace(model_path="org/model", revision="tag", download_dir="here")
    drafts = SimpleNamespace(speculative_draft_model_revision="other")
    parallel = SimpleNamespace(pp_size=2)
    modules(runtime_context={"get_model": lambda: asked, "get_spec": lambda: drafts, "get_parallel": lambda: parallel})
    assert compat.place_of_downloads(model) == (revision, "here")
    assert compat.pipeline_stages() == 2
