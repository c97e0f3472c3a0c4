"""Reading models: sources to quantize (directories, hub names, `.gguf` files), and our own packed checkpoints."""

from __future__ import annotations

import copy
import reprlib
import shutil
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from ..spec.checkpoint import QUANT_METHOD, CheckpointConfig
from ..spec.fields import finite
from ..spec.linear import TENSOR_NAMES, LinearLayout, PackedLinear, bits_per_weight
from ..support.errors import CheckpointError, SourceError, did_you_mean
from .files import read_json
from .headers import REMEDY, StoredTensors

#: Files worth downloading: weights as safetensors only, never pickles.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "tokenizer*")
#: What Transformers raises for files that make no sense: it checks little, and so fails anywhere.
BUILD_ERRORS = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip
#: A tokenizer has one of these.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
#: Written beside the weights: recipe, errors and sizes of every linear.
REPORT_FILE = "pairquant.json"
WITHOUT_REPORT = "The model runs without this file: delete it to go on without the recorded errors."


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
    def quantization(self) -> Any:
        """`quantization_config` of config.json, which may hold anything; None for plain models and GGUF files."""
        return None if self.gguf else read_json(self.directory / "config.json").get("quantization_config")

    def require_plain(self) -> None:
        """Refuse a source that is quantized already: its rounding errors would be fitted as if they were weights."""
        if (entries := self.quantization) is not None:
            method = entries.get("quant_method", "an unknown method") if isinstance(entries, dict) else entries
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
        except BUILD_ERRORS as error:
            if isinstance(error, (CheckpointError, SourceError)):
                raise
            if "trust_remote_code=True" in str(error) and not self.trust_remote_code:
                raise SourceError(
                    f"the {what} of {self.name!r} needs Python code that comes with the model. Read that code in "
                    f"{self.directory}, then allow it: --trust-remote-code (trust_remote_code=True in Python)."
                ) from error
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
        entries = files.quantization
        if not isinstance(entries, dict) or entries.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{files.name!r} is not quantized with pairwise rotations (no quant_method 'paroquant')"
            )
        config, stored = CheckpointConfig.from_dict(entries), StoredTensors.of_directory(files.directory)
        stored.require_whole_linears()
        if not stored.linears():
            raise CheckpointError(f"{files.name!r} holds no quantized linear, but its config.json says so. {REMEDY}")
        return cls(files.directory, config, stored, _report(files.directory / REPORT_FILE))

    def layout(self, path: str) -> LinearLayout:
        """Of one linear, from the shapes of its tensors."""
        fields = self.stored.fields_of(path)
        if "qweight" not in fields:
            raise CheckpointError(f"no quantized linear {path!r}{did_you_mean(path, self.stored.linears())}")
        shape = fields["qweight"].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"tensor {path}.qweight has shape {list(shape)}, must have 2 dimensions. {REMEDY}")
        layout = self.config.layout(shape[0], shape[1] * 32 // self.config.bits, "bias" in fields)
        if faults := layout.misfits():
            raise CheckpointError(f"{path}: {'; '.join(faults)}. {REMEDY}")
        return layout

    def packed(self, path: str) -> PackedLinear:
        """One linear, checked."""
        layout = self.layout(path)
        tensors = {name: self.stored.load(f"{path}.{name}") for name in self.stored.fields_of(path)}
        return PackedLinear.from_tensors(path, layout, tensors)

    def check_plain(self) -> None:
        """Raises `CheckpointError` naming a tensor outside the quantized linears that has NaN or infinity in it."""
        packed = {f"{path}.{name}" for path in self.stored.linears() for name in TENSOR_NAMES}
        for name, field in self.stored.fields.items():
            if name not in packed and field.dtype.is_floating_point and not finite(self.stored.load(name)):
                raise CheckpointError(f"tensor {name} has values that are not finite. {REMEDY}")

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


def _report(file: Path) -> dict[str, Any]:
    """pairquant.json, if there is one; `linears`, where it has them, are objects with an `error` that is a number."""
    if not file.is_file():
        return {}
    report = read_json(file)
    linears = report.get("linears", {})
    if not isinstance(linears, dict) or not all(_recorded(entry) for entry in linears.values()):
        raise CheckpointError(f"{file}: linears has an entry that is no record of a linear. {WITHOUT_REPORT}")
    if not isinstance(report.get("seconds", 0), (int, float)):
        raise CheckpointError(f"{file}: seconds is {reprlib.repr(report['seconds'])}, no number. {WITHOUT_REPORT}")
    return report


def _recorded(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("error"), (int, float, type(None)))


def _nearby(path: Path, pattern: str) -> str:
    parent = path.parent
    return did_you_mean(str(path), [str(p) for p in parent.glob(pattern)]) if parent.is_dir() else ""
