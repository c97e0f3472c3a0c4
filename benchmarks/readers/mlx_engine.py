#!/usr/bin/env python3
"""mlx-lm's logits of a model directory, in float32: python mlx_engine.py DIRECTORY --tokens tokens.json --out logits.safetensors

tokens.json holds a list of lists of token ids. Environment, on Linux: pip install "mlx[cpu]" mlx-lm safetensors
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from safetensors.numpy import save_file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directory")
parser.add_argument("--tokens", required=True)
parser.add_argument("--out", required=True)
options = parser.parse_args()
model, _ = load(options.directory)
model.set_dtype(mx.float32)
rows = json.loads(Path(options.tokens).read_text())
logits = [np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in rows]
save_file({"logits": np.stack(logits)}, options.out)
