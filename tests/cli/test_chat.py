"""`pairquant chat` as a user types it."""

import pytest
import torch
from tiny_models import save_tiny, tiny_model
from typer.testing import CliRunner

from pairquant.cli.app import app
from pairquant.support.errors import ConfigError, SourceError

ENGINE = ("--engine", "transformers", "--device", "cpu", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    save_tiny(root / "model")
    return root


def chat(directory, model, *arguments, **options):
    return CliRunner().invoke(app, ["chat", str(directory / model), *ENGINE, *arguments], **options)


def test_one_prompt_is_answered(directory):
    done = chat(directory, "model", "--prompt", "hello")
    assert done.exit_code == 0, done.output
    assert "> " not in done.stdout


def test_it_goes_on_until_the_input_ends(directory):
    done = chat(directory, "model", input="one\ntwo\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("> ") == 3


def test_an_empty_line_ends_it(directory):
    done = chat(directory, "model", input="one\n\ntwo\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("> ") == 2


def test_an_overflow_is_an_error_and_no_empty_answer(directory):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(save_tiny(directory / "big"))
    done = chat(directory, "big", "--prompt", "hello", "--dtype", "float16")
    assert done.exit_code != 0
    assert isinstance(done.exception, ConfigError)
    assert "not finite in float16" in str(done.exception)
    assert "--dtype bfloat16" in str(done.exception)
    assert chat(directory, "big", "--prompt", "hello", "--dtype", "float32").exit_code == 0


def test_a_broken_template_is_told_before_the_model_is_loaded(directory):
    broken = save_tiny(directory / "broken")
    (broken / "chat_template.jinja").write_text("a\n{% for message in messages %}")
    done = chat(directory, "broken", "--prompt", "hello")
    assert isinstance(done.exception, SourceError)
    assert "chat template is broken in line 2" in str(done.exception)


def test_a_model_with_code_of_its_own_names_the_option(directory):
    custom = directory / "custom"
    custom.mkdir()
    (custom / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}')
    (custom / "odd.py").write_text("raise SystemExit('code was run')")
    done = chat(directory, "custom", "--prompt", "hello")
    assert isinstance(done.exception, SourceError)
    assert "--trust-remote-code" in str(done.exception)


def test_help_has_groups_and_an_example():
    shown = CliRunner().invoke(app, ["chat", "--help"]).output
    assert all(part in shown for part in ("Engine", "Answers", "Example: pairquant chat"))
