"""Transformers' `generate` behind the engine protocol, on a quantized model."""

import threading

import pytest
import torch
from tiny_models import save_tiny

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import EngineOptions
from pairquant.engines.transformers import TransformersEngine, finite_logits
from pairquant.kernels.run.decoded_budget import VARIABLES, budget
from pairquant.support.errors import ConfigError

CONVERSATION = [{"role": "user", "content": "once upon a time"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("engine")
    config = pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(save_tiny(root / "source"), root / "q4", config, device="cpu")
    return TransformersEngine(ModelFiles.find(str(root / "q4")), EngineOptions("cpu", "float32"))


def test_the_streamed_answer_is_the_greedy_one(engine):
    prompt = engine.tokenizer("once upon a time", return_tensors="pt").input_ids
    expected = engine.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "".join(engine.stream(CONVERSATION, 12)) == engine.tokenizer.decode(expected, skip_special_tokens=True)


def test_closing_the_stream_ends_the_generation(engine):
    before = set(threading.enumerate())
    engine.model.generation_config.eos_token_id, eos = None, engine.model.generation_config.eos_token_id
    try:
        pieces = engine.stream(CONVERSATION, 100)
        while not next(pieces):
            continue
        pieces.close()
    finally:
        engine.model.generation_config.eos_token_id = eos
    assert set(threading.enumerate()) <= before


def test_an_error_while_generating_reaches_the_reader(engine, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(engine.stream(CONVERSATION, 4))


def test_generation_goes_on_past_the_end_of_text(engine):
    prompts = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(1))
    free = engine.generate(prompts, 6)
    assert free.tokens.shape == (3, 6)
    assert free.decoded == 3 * 5
    assert free.first_token_s > 0
    assert free.decode_s > 0
    config = engine.model.generation_config
    config.eos_token_id, eos = int(free.tokens[0, 0]), config.eos_token_id
    try:
        assert engine.generate(prompts, 6).tokens.shape == (3, 6)
    finally:
        config.eos_token_id = eos


def test_each_sequence_of_a_batch_continues_its_own_prompt(engine):
    prompts = torch.randint(3, 259, (2, 10), generator=torch.Generator().manual_seed(2))
    together = engine.generate(prompts, 5).tokens
    for row in range(2):
        assert torch.equal(engine.generate(prompts[row : row + 1], 5).tokens[0], together[row])


def test_what_was_loaded_is_told(engine):
    assert (engine.name, engine.dtype, engine.device.type) == ("transformers", "float32", "cpu")
    assert (engine.vocabulary, engine.context) == (288, 128)


def test_a_setting_of_the_environment_that_is_not_allowed_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setenv(VARIABLES["cpu"], "much")
    budget.cache_clear()
    with pytest.raises(ConfigError, match=f"{VARIABLES['cpu']} is 'much'"):
        TransformersEngine(None, EngineOptions("cpu", "float32"))


def test_an_overflow_is_an_error_that_names_the_remedy(tmp_path):
    files = ModelFiles.find(str(save_tiny(tmp_path / "model")))
    engine = TransformersEngine(files, EngineOptions("cpu", "float16"))
    engine.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(ConfigError, match="not finite in float16.*--dtype bfloat16 or --dtype float32"):
        list(engine.stream(CONVERSATION, 4))


def test_forbidden_tokens_are_no_overflow():
    (check,) = finite_logits(torch.float16)
    scores = torch.tensor([[1.0, float("-inf")], [float("-inf"), 2.0]])
    assert check(torch.zeros(2, 1, dtype=torch.int64), scores) is scores
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not finite in float16"):
            check(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1.0, 0.0], [bad, 0.0]]))
