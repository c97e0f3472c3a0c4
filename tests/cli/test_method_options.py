"""What the options of `quantize`, `plan` and `fold` become in `QuantConfig`."""

from dataclasses import fields

import pytest
import typer

from pairquant import QuantConfig
from pairquant.cli import app
from pairquant.cli.method_options import OTHERS, READ, config_of, wanted
from pairquant.spec.mixed import Target
from pairquant.spec.options import Override
from pairquant.support.errors import ConfigError

COMMANDS = typer.main.get_command(app).commands
FIELDS = {field.name for field in fields(QuantConfig)}


def parameters(*commands):
    return {parameter.name: parameter.default for name in commands for parameter in COMMANDS[name].params}


@pytest.mark.parametrize("name", ["quantize", "plan", "fold"])
def test_every_parameter_is_a_field_or_read_as_one_or_named_as_something_else(name):
    assert set(parameters(name)) <= FIELDS | set(READ) | OTHERS


def test_the_tables_name_what_there_is():
    names = set(parameters("quantize", "plan", "fold"))
    assert names >= OTHERS | set(READ)
    assert not OTHERS & (FIELDS | set(READ))
    assert {field for field, _ in READ.values()} <= FIELDS


@pytest.mark.parametrize("name", ["quantize", "plan"])
def test_defaults_on_the_command_line_are_those_of_python(name):
    context = COMMANDS[name].make_context(name, ["MODEL", "--output", "OUT"])
    assert config_of(context.params) == QuantConfig()


def test_values_become_those_of_the_fields():
    found = config_of(
        {
            "group_size": "64", "rotations": "4", "calibration": ["a.txt", "b.txt"], "ignore": ["o_proj"],
            "override": ["down_proj=bits:8"], "device": "cuda",
        },
        target=Target(bits_per_weight=3.5),
    )  # fmt: skip
    assert (found.group_size, found.rotations, found.calibration) == (64, 4, ("a.txt", "b.txt"))
    assert found.ignore == ("lm_head", "o_proj")
    assert found.overrides == (Override("down_proj", bits=8),)
    assert found.target == Target(bits_per_weight=3.5)


def test_a_parameter_that_would_be_ignored_is_an_error():
    with pytest.raises(TypeError, match="groupsize: no fields of QuantConfig"):
        config_of({"bits": 4, "groupsize": 64})


def test_a_wrong_value_is_refused_by_the_options_themselves():
    with pytest.raises(ConfigError, match="group_size"):
        config_of({"group_size": "many"})


def test_a_target_is_bits_or_a_size_but_not_both():
    assert wanted(None, None) is None
    assert wanted(3.5, None) == Target(bits_per_weight=3.5)
    assert wanted(None, "4.2GB") == Target.of_size("4.2GB")
    with pytest.raises(ConfigError, match="--target-bpw and --target-size are both given"):
        wanted(3.5, "4GB")
