"""The main job: bad input is refused before work, with what to do; good input gives what the config asked for."""

import pytest
import torch
from tiny_models import TEXT, beginning_tokenizer, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.support.devices import resolve_device
from pairquant.support.errors import ConfigError, PairQuantError, ResourceError, SourceError, TextError

BASE = {
    "preset": "quick", "group_size": 32, "rotations": 2, "samples": 4, "seq_len": 32, "calibration": (str(TEXT),),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "source")


def quantize(source, output, device="auto", **options):
    return pairquant.quantize(source, output, pairquant.QuantConfig(**{**BASE, **options}), device=device)


def test_a_group_size_that_does_not_divide_names_every_layer_and_two_remedies(source, tmp_path):
    with pytest.raises(ConfigError) as caught:
        quantize(source, tmp_path / "out", group_size=128)
    message = str(caught.value)
    for layer in (0, 1):
        assert f"model.layers.{layer}.mlp.down_proj" in message
    assert "in_features 192 is not a multiple of group size 128" in message
    assert "--group-size 64" in message
    assert "--ignore" in message
    quantize(source, tmp_path / "out", group_size=128, ignore=("lm_head", "down_proj"))


def test_auto_takes_the_largest_group_size_that_divides_all(source, tmp_path):
    assert quantize(source, tmp_path / "out", group_size="auto").config.group_size == 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "fats"}, ConfigError, "did you mean 'fast'"),
        ({"bits": 7}, ConfigError, "bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
        ({"rotations": 17}, ConfigError, "rotations is 17, allowed: whole numbers from 0 to 16"),
        ({"device": "gpu"}, ConfigError, "device is 'gpu'"),
        ({"device": "cuda:77"}, ConfigError, "device is 'cuda:77'"),
        ({"calibration": ("no-such-file.txt",)}, TextError, "does not exist"),
        ({"samples": 1_000_000}, TextError, "too short"),
        ({"ignore": ("down_porj",)}, ConfigError, "did you mean 'down_proj'"),
        ({"ignore": ("re:(",)}, ConfigError, "not a regular expression"),
        ({"ignore": ("re:.*",)}, ConfigError, "leaves no linear layer"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(source, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        quantize(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_name_the_layer(tmp_path):
    source = save_tiny(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].self_attn.k_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(SourceError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight has 1 values that are NaN"):
        quantize(source, tmp_path / "out")


def test_an_already_quantized_source_is_refused(source, tmp_path):
    quantize(source, tmp_path / "once", preset="rtn")
    with pytest.raises(SourceError, match=r"quantized already \(paroquant\)"):
        quantize(tmp_path / "once", tmp_path / "twice")


def test_out_of_memory_says_what_to_lower(source, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pairquant.optimize.strategies.fit_transforms", exhausted)
    with pytest.raises(ResourceError, match=r"out of memory with 4 samples of 32 tokens\. Lower --samples"):
        quantize(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_error_is_one_that_the_command_line_prints_plainly(source, tmp_path):
    with pytest.raises(PairQuantError):
        quantize(source / "nothing-here.gguf", tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_stored_logits_equal_the_fitted_models(source, tmp_path, bits, symmetric):
    from pairquant.checkpoint.read import ModelFiles
    from pairquant.optimize.calibration import calibrate
    from pairquant.optimize.walk import quantize_blocks

    config = pairquant.QuantConfig(**{**BASE, "bits": bits, "symmetric": symmetric})
    files = ModelFiles.find(str(source))
    fitted = files.model()
    tokens = calibrate(files.tokenizer(), config.calibration, config.samples, config.seq_len, config.seed).tokens
    list(quantize_blocks(fitted, tokens, config, torch.device("cpu")))

    pairquant.quantize(source, tmp_path / "out", config, device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, fitted(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_same_arguments_give_the_same_file(source, tmp_path):
    for name in ("one", "two"):
        quantize(source, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_bfloat16_source_stays_bfloat16_where_it_is_not_quantized(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16


def test_the_source_is_never_overwritten(source):
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(ConfigError, match="is the source itself, or holds it"):
        pairquant.quantize(source, source / ".." / source.name, pairquant.QuantConfig(**BASE), overwrite=True)
    (source.parent / "config.json").write_text("{}")  # what overwriting asks of a directory
    try:
        with pytest.raises(ConfigError, match="is the source itself, or holds it"):
            pairquant.quantize(source, source.parent, pairquant.QuantConfig(**BASE), overwrite=True)
    finally:
        (source.parent / "config.json").unlink()
    assert sorted(path.name for path in source.iterdir()) == before


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_each_process_has_a_gpu_of_its_own(name, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device(name) == torch.device(device)
    monkeypatch.setenv("LOCAL_RANK", "2")
    if name != "cuda:0":
        with pytest.raises(ConfigError, match="process 2 has no GPU of its own: there are 2"):
            resolve_device(name)


def test_windows_with_bos_are_told_of_and_recorded(source, tmp_path):
    import json

    from pairquant.jobs.quantize import Silent

    def provenance(name):
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["provenance"]

    class Told(Silent):
        def __init__(self):
            self.notices = []

        def notice(self, text):
            self.notices.append(text)

    model, told = save_tiny(tmp_path / "model"), Told()
    beginning_tokenizer().save_pretrained(model)
    config = pairquant.QuantConfig(**{**BASE, "preset": "gptq"})
    pairquant.quantize(model, tmp_path / "begun", config, device="cpu", progress=told)
    assert "every window begins with <s>" in told.notices[0]
    assert provenance("begun")["bos"] is True
    quantize(model, tmp_path / "never", device="cpu", preset="gptq", bos="never")
    quantize(source, tmp_path / "plain", device="cpu", preset="gptq")
    assert provenance("never") == provenance("plain") | {"source": str(model)}  # the same windows, nothing recorded
    assert (tmp_path / "never" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
