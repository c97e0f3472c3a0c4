"""The formats that can be chosen, by name."""

from __future__ import annotations

from .awq import Awq
from .base import Format
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq
from .mlx import Mlx

#: The format of this package, which holds transforms.
OWN = "paroquant"
FORMATS: dict[str, Format] = {form.name: form for form in (Awq(), Gptq(), CompressedTensors(), Gguf(), Mlx())}
