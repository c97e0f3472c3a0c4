"""Which layers of an engine's model are packed, on a configuration of no engine in particular."""

import pytest
import torch

from pairquant.integrations.packed_paths import PackedPaths
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError

SPEC, WIDE = Spec(4, 32, 2), Spec(8, 64, 0)


class Config(PackedPaths):
    engine = "The engine"

    def __init__(self, *packed, names=True, **specs):
        self.begin(CheckpointConfig(SPEC, modules_to_not_convert=("a.o_proj",)))
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        if names:
            self.take_names([*(f"{path}.qweight" for path in packed), "a.norm.weight", "a.q_proj.scales"])
            self.quantized |= specs


class Mapper:
    """As the engines' own: part of a name → what it is replaced by; names in which that is None have no layer."""

    def __init__(self, table):
        self.table = table

    def apply_list(self, names):
        for old, new in self.table.items():
            names = [name.replace(old, new or "") for name in names if old not in name or new is not None]
        return names


def test_packed_are_the_paths_with_codes_whatever_config_json_leaves_plain():
    config = Config("a.o_proj", "a.up_proj")
    assert config.spec("a.o_proj") == config.spec("a.up_proj") == SPEC
    assert config.spec("a.down_proj") is None
    assert config.stored_as == {"a.o_proj": "a.o_proj", "a.up_proj": "a.up_proj"}


def test_without_files_everything_is_packed_that_config_json_does_not_leave_plain():
    config = Config(names=False)
    assert config.spec("a.up_proj") == config.spec("a.qkv_proj") == SPEC
    assert config.spec("a.o_proj") is None
    assert config.spec("lm_head") is None


def test_a_merged_layer_has_the_one_form_of_its_linears():
    config = Config("a.q_proj", "a.k_proj", "a.v_proj")
    assert config.members("a.qkv_proj") == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert config.members("qkv_proj") == ["q_proj", "k_proj", "v_proj"]
    assert config.spec("a.qkv_proj") == SPEC
    assert config.spec("b.qkv_proj") is None


def test_what_is_fused_on_disk_counts_as_one_layer():
    config = Config("a.qkv_proj", "a.q_proj")
    config.quantized["a.qkv_proj"] = WIDE
    assert config.spec("a.qkv_proj") == WIDE


def test_merged_linears_that_are_packed_in_part_are_refused():
    with pytest.raises(
        CheckpointError, match=r"The engine runs a.q_proj, .* only a.q_proj, a.v_proj is quantized.*--ignore"
    ):
        Config("a.q_proj", "a.v_proj").spec("a.qkv_proj")


def test_merged_linears_in_several_forms_are_refused():
    config = Config("a.q_proj", "a.k_proj", "a.v_proj", **{"a.k_proj": WIDE})
    with pytest.raises(CheckpointError, match=r"a.k_proj has 8 bits.*--override"):
        config.spec("a.qkv_proj")


def test_paths_are_renamed_and_remember_what_they_are_called_on_disk():
    config = Config("model.a.up_proj", "model.a.o_proj", "mtp.up_proj")
    config.quantized["model.a.o_proj"] = WIDE
    config.rename(Mapper({"model.": "language_model.", "a.o_proj": "a.out", "mtp.": None}))
    assert config.quantized["language_model.a.up_proj"] == SPEC
    assert "mtp.up_proj" not in config.quantized, "the engine's model has no such layer"
    assert config.stored_as == {
        "language_model.a.up_proj": "model.a.up_proj",
        "language_model.a.out": "model.a.o_proj",
    }
    assert config.spec("language_model.a.out") == WIDE
    assert config.plain == ("a.out",)


def test_names_that_are_renamed_twice_still_lead_to_the_disk():
    config = Config("model.a.up_proj")
    config.rename(Mapper({"model.": "inner."}))
    config.rename(Mapper({"inner.": "outer."}))
    assert config.stored_as == {"outer.a.up_proj": "model.a.up_proj"}
    assert config.spec("outer.a.up_proj") == SPEC


def test_before_files_are_read_renaming_changes_what_is_left_plain():
    config = Config(names=False)
    config.rename(Mapper({"a.": "b."}))
    assert config.spec("b.o_proj") is None
    assert config.spec("a.o_proj") == SPEC


def test_a_method_knows_whose_it_is_and_what_it_runs_is_claimed():
    class Method:
        pass

    config, method = Config("a.q_proj"), Method()
    assert config.claim(["a.q_proj"], method) is method
    assert method.pairquant is config
    assert config.claimed == {"a.q_proj"}


def test_what_engines_ask_first():
    assert Config.get_name() == "paroquant"
    assert torch.bfloat16 in Config.get_supported_act_dtypes()
    assert (Config.get_min_capability(), Config.get_config_filenames()) == (80, [])
