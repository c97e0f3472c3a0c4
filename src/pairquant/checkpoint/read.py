"""Reading models: sources to quantize (directories, hub names, `.gguf` files), and our own packed checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from ..config import QUANT_METHOD, CheckpointConfig
from ..errors import CheckpointError, SourceError, did_you_mean
from ..layout import LinearLayout, PackedLinear, bits_per_weight
from .headers import StoredTensors

#: Files worth downloading: weights as safetensors only, never pickles.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "tokenizer*")
#: A tokenizer has one of these.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
#: Written beside the weights: recipe, errors and sizes of every linear.
REPORT_FILE = "pairquant.json"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. gguf: the file's name within the directory, when the model is a single GGUF file."""

    name: str
    directory: Path
    gguf: str | None
    trust_remote_code: bool

    @classmethod
    def find(cls, name: str, trust_remote_code: bool = False) -> ModelFiles:
        """Resolve a directory, a `.gguf` file or a hub name; raises `SourceError` when there is no such model."""
        path = Path(name)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise SourceError(f"model file {name!r} does not exist{_nearby(path, '*.gguf')}")
            return cls(name, path.parent, path.name, trust_remote_code)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise SourceError(f"{name!r} is no model directory: it holds no config.json")
            return cls(name, path, None, trust_remote_code)
        if path.exists():
            raise SourceError(f"{name!r} is neither a model directory, a .gguf file, nor a hub name")
        return cls(name, _download(name), None, trust_remote_code)

    @cached_property
    def config(self):
        """The Transformers configuration."""
        from transformers import AutoConfig

        return self._load(AutoConfig, "configuration")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json; None for plain models and GGUF files."""
        entries = None if self.gguf else getattr(self.config, "quantization_config", None)
        return entries if entries is None or isinstance(entries, dict) else entries.to_dict()

    def require_plain(self) -> None:
        """Refuse a source that is quantized already: its rounding errors would be fitted as if they were weights."""
        if self.quantization is not None:
            method = self.quantization.get("quant_method", "an unknown method")
            raise SourceError(f"{self.name!r} is quantized already ({method}). Quantize the original model instead.")

    def tokenizer(self):
        from transformers import AutoTokenizer

        # Transformers would make up an empty tokenizer for some families.
        if not self.gguf and not any(next(self.directory.glob(name), None) for name in VOCABULARIES):
            raise SourceError(f"{self.name!r} has no tokenizer (none of {', '.join(VOCABULARIES)}): copy it there.")
        return self._load(AutoTokenizer, "tokenizer")

    def skeleton(self) -> Any:
        """The model in evaluation mode with its buffers, but without weights (meta device), in a moment."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        with init_empty_weights(include_buffers=False):
            model = self._build(lambda: AutoModelForCausalLM.from_config(self.config, **self._remote), "architecture")
        if not self.gguf and (self.directory / "generation_config.json").is_file():
            model.generation_config = self._load(GenerationConfig, "generation configuration")
        return model.eval()

    def model(self, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
        """The model in evaluation mode. GGUF weights are dequantized; "auto" then means float16."""
        from transformers import AutoModelForCausalLM

        if self.gguf and dtype == "auto":
            dtype = torch.float16
        model = self._load(AutoModelForCausalLM, "weights", dtype=dtype)
        if self.gguf:  # a plain model from here on, also when it is saved
            model.hf_quantizer.remove_quantization_config(model)
        return model.eval().to(device)

    def size_bytes(self) -> int:
        """Size of the weight files."""
        files = [self.directory / self.gguf] if self.gguf else self.directory.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def describe(self, directory: Path, skeleton: Any, tokenizer: Any, dtype: torch.dtype, quantization: dict) -> None:
        """Save all of a checkpoint but its weights: configuration, generation defaults, tokenizer, custom code."""
        config = copy.deepcopy(skeleton.config)
        config.architectures, config.dtype, config.quantization_config = [type(skeleton).__name__], dtype, quantization
        config.save_pretrained(directory)
        if skeleton.can_generate():
            skeleton.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if self.trust_remote_code:
            for code in self.directory.glob("*.py"):
                shutil.copy(code, directory)

    @property
    def _remote(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code}

    def _load(self, auto_class, what: str, **kwargs):
        if self.gguf:
            kwargs["gguf_file"] = self.gguf
        return self._build(lambda: auto_class.from_pretrained(self.directory, **self._remote, **kwargs), what)

    def _build(self, build, what: str):
        try:
            return build()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, struct.error, SafetensorError) as error:
            if isinstance(error, (CheckpointError, SourceError)):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise SourceError(f"the {what} of {self.name!r} cannot be loaded: {reason[0]}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A packed checkpoint, opened for looking into: nothing but headers is read until asked for."""

    directory: Path
    config: CheckpointConfig
    stored: StoredTensors
    report: dict[str, Any]

    @classmethod
    def open(cls, files: ModelFiles) -> Checkpoint:
        """Raises `CheckpointError` when the model is not one of ours, or damaged."""
        if files.quantization is None or files.quantization.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{files.name!r} is not quantized with pairwise rotations (no quant_method 'paroquant')"
            )
        report = files.directory / REPORT_FILE
        return cls(
            files.directory,
            CheckpointConfig.from_dict(files.quantization),
            StoredTensors.of_directory(files.directory),
            json.loads(report.read_text()) if report.is_file() else {},
        )

    def layout(self, path: str) -> LinearLayout:
        """Of one linear, from the shapes of its tensors."""
        fields = self.stored.fields_of(path)
        if "qweight" not in fields:
            raise CheckpointError(f"no quantized linear {path!r}{did_you_mean(path, self.stored.linears())}")
        shape = fields["qweight"].shape
        if len(shape) != 2:
            raise CheckpointError(f"tensor {path}.qweight has shape {list(shape)}, must have 2 dimensions.")
        return self.config.layout(shape[0], shape[1] * 32 // self.config.bits, "bias" in fields)

    def packed(self, path: str) -> PackedLinear:
        """One linear, checked."""
        layout = self.layout(path)
        tensors = {name: self.stored.load(f"{path}.{name}") for name in self.stored.fields_of(path)}
        return PackedLinear.from_tensors(path, layout, tensors)

    def bits_per_weight(self) -> float:
        """Stored bits of all quantized linears over the number of their weights."""
        return bits_per_weight(self.layout(path) for path in self.stored.linears())


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except HFValidationError as error:
        raise SourceError(f"model {name!r} does not exist{_nearby(Path(name), '*')}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"model {name!r} is no local directory, and cannot be fetched from the hub{_nearby(Path(name), '*')}\n  {reason[0]}"
        ) from error


def _nearby(path: Path, pattern: str) -> str:
    parent = path.parent
    return did_you_mean(str(path), [str(p) for p in parent.glob(pattern)]) if parent.is_dir() else ""
