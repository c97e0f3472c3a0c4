"""Reading models: sources to quantize (directories, hub names, `.gguf` files), and our own packed checkpoints."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..models.names import OWN, Names
from ..models.sharing import fold_shared, settle_scales
from ..models.sites import stored_sites
from ..spec.activations import FORMATS, UNROUNDED
from ..spec.checkpoint import QUANT_METHOD, CheckpointConfig
from ..spec.experts import bits_per_weight
from ..spec.fields import finite
from ..spec.linear import LinearLayout, PackedLinear
from ..support.errors import CheckpointError, SourceError, did_you_mean
from ..support.formatting import counted
from .architecture import (
    auto_class,
    expected_fields,
    require_decoder_only,
    require_named_class,
    require_one_tensor_a_name,
)
from .describe import describe_anew, describe_copy
from .downloads import download, nearby
from .files import read_json
from .gguf import with_bos
from .gguf_rope import with_rope
from .headers import REMEDY, StoredTensors, weight_files
from .record import END_TO_END, REPORT_FILE, read_record
from .side_files import side_files

#: What tells that a directory holds a LoRA adapter.
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
#: What Transformers raises for files that make no sense: it checks little, and so fails anywhere.
BUILD_ERRORS = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip
#: A tokenizer has one of these.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

T = TypeVar("T")


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
                raise SourceError(f"model file {name!r} does not exist{nearby(path, '*.gguf')}")
            return cls(name, path.parent, path.name, trust_remote_code)
        if path.is_dir():
            return cls._of_directory(name, path, trust_remote_code)
        if path.exists():
            raise SourceError(f"{name!r} is neither a model directory, a .gguf file, nor a hub name")
        return cls._of_directory(name, download(name), trust_remote_code)

    @classmethod
    def _of_directory(cls, name: str, directory: Path, trust_remote_code: bool) -> ModelFiles:
        if found := [adapter for adapter in ADAPTERS if (directory / adapter).is_file()]:
            raise SourceError(
                f"{name!r} holds a LoRA adapter ({found[0]}). Merge it into its base model first, with PEFT: "
                f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(NEW), and the base "
                "model's tokenizer beside it. Or take the adapter's files away to go on without it."
            )
        if not (directory / "config.json").is_file():
            raise SourceError(f"{name!r} is no model directory: it holds no config.json")
        return cls(name, directory, None, trust_remote_code)

    @cached_property
    def config(self):
        """The Transformers configuration; raises `SourceError` if it cannot be read, or cannot say what a GGUF file does."""
        from transformers import AutoConfig

        config = self._load(AutoConfig, "configuration")
        if self.gguf:
            with torch.device("cpu"):  # asked for while a model is built on the meta device, too
                return with_rope(config, self.directory / self.gguf)
        return config

    @property
    def quantization(self) -> Any:
        """`quantization_config` of config.json, which may hold anything; None for plain models and GGUF files."""
        return None if self.gguf else read_json(self.directory / "config.json").get("quantization_config")

    @property
    def is_packed(self) -> bool:
        """Whether config.json says that this is one of our checkpoints."""
        entries = self.quantization
        return isinstance(entries, dict) and entries.get("quant_method") == QUANT_METHOD

    @property
    def published_as(self) -> str | None:
        """The few bits that the model was trained or published in, and that stand for 16 (see `scaled`): "fp8" or "mxfp4"."""
        entries = self.quantization
        method = entries.get("quant_method") if isinstance(entries, dict) else None
        known = method == "mxfp4" or (method == "fp8" and "weight_block_size" in entries)
        return method if known else None

    @property
    def quantized_by_others(self) -> bool:
        """Whether config.json says that the model is quantized, but not by us, nor as published (`published_as`)."""
        return self.quantization is not None and not self.is_packed and not self.published_as

    def require_plain(self) -> None:
        """Refuse a source that is quantized already: its rounding errors would be fitted as if they were weights."""
        if self.is_packed or self.quantized_by_others:
            entries = self.quantization
            method = entries.get("quant_method", "an unknown method") if isinstance(entries, dict) else entries
            raise SourceError(f"{self.name!r} is quantized already ({method}). Quantize the original model instead.")

    def tokenizer(self):
        from transformers import AutoTokenizer

        # Transformers would make up an empty tokenizer for some families.
        if not self.gguf and not any(next(self.directory.glob(name), None) for name in VOCABULARIES):
            raise SourceError(f"{self.name!r} has no tokenizer (none of {', '.join(VOCABULARIES)}): copy it there.")
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        return with_bos(tokenizer, self.directory / self.gguf) if self.gguf else tokenizer

    def skeleton(self) -> Any:
        """Return the model in evaluation mode with its buffers, but without weights (meta device), in a moment.

        Raises `SourceError` for a model that is no decoder, or would be built as another class than config.json names.
        """
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = self._built()
        if self.gguf:
            require_one_tensor_a_name(model, self.name)
        return model.eval()

    def model(self, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
        """Return the model in evaluation mode. GGUF weights are dequantized; "auto" then means float16.

        Raises `SourceError` if a weight is missing, which Transformers would make up, and what `skeleton` raises.
        """
        if self.gguf and dtype == "auto":
            dtype = torch.float16
        model, missing = self._loaded(dtype=dtype)
        require_named_class(self.config, model, self.name)
        if self.quantization is None:  # a quantizer says itself what is missing: ours does
            self._require_nothing_missing(missing)
        if (self.gguf or self.published_as) and getattr(
            model, "hf_quantizer", None
        ) is not None:  # a plain model from here on, also when it is saved
            model.hf_quantizer.remove_quantization_config(model)
        return model.eval().to(device)

    def require_loadable(self) -> None:
        """Refuse in a moment, from the headers, what would load wrongly without a word.

        That is a model of a class that is not supported, and one with tensors missing from its files. Of a GGUF file and of
        a model in another quantized format only the class is looked at. Raises `SourceError`, and `CheckpointError` for
        files that cannot be read and tensors that a checkpoint of ours lacks.
        """
        with torch.device("meta"):
            model = self._built()
        if self.gguf or not (self.is_packed or self.published_as or self.quantization is None):
            return
        stored = self.stored()
        there = set(stored.fields)
        if self.is_packed:
            names, linears = Names.of(model, stored.fields), set(stored.linears())
            there |= {*names.sources, *(f"{path}.weight" for path in linears)}
            lacking: set[str] = set()
            for site in stored_sites(model, names).values():  # experts have one parameter for all of them
                held = {site.parameter, site.bias_parameter}
                (there if site.path in linears else lacking).update(held)
            there -= {name for name in lacking if name not in names.sources}
        missing = [name for name in expected_fields(model) if name not in there]
        if missing and not self.is_packed:  # or stored under names that Transformers converts on loading: it knows
            with quiet_transformers():
                missing = self._loaded(device_map="meta")[1]
        self._require_nothing_missing(missing)

    def names(self, model: Any) -> Names:
        """Return how the files name the tensors of a model, which may lack its weights; a GGUF file has Transformers' names."""
        return OWN if self.gguf else Names.of(model, self.stored().fields)

    def stored(self) -> StoredTensors:
        """Return what a directory's weights are, from the headers; raises `SourceError` (`CheckpointError` if packed) if unreadable."""
        return self._read(StoredTensors.of_directory)

    def weight_files(self) -> list[Path]:
        """Return the files that are read, whatever else lies beside them; raises as `stored` does if there are none."""
        return [self.directory / self.gguf] if self.gguf else self._read(weight_files)

    def _read(self, read: Callable[[Path], T]) -> T:
        """Return what a function reads from the directory; of a plain model, its `CheckpointError` as a `SourceError`."""
        try:
            return read(self.directory)
        except CheckpointError as error:
            if self.is_packed:
                raise
            raise SourceError(f"the weights of {self.name!r} cannot be loaded: {error}") from error

    def size_bytes(self) -> int:
        """Return size of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files())

    def side_bytes(self) -> int:
        """Return size of what travels beside the weights."""
        files = [] if self.gguf else side_files(self.directory)
        return sum((self.directory / file).stat().st_size for file in files)

    def describe(
        self,
        directory: Path,
        skeleton: Any,
        tokenizer: Any,
        dtype: torch.dtype,
        quantization: dict | None,
        untied: bool = False,
    ) -> None:
        """Write all of a checkpoint but its weights: the source's own files; of a GGUF file, what Transformers makes of it.

        quantization: what config.json says of it; None for a plain model.
        untied: the checkpoint has an output embedding of its own, whatever the source says.
        """
        if self.gguf:
            describe_anew(directory, skeleton, tokenizer, dtype, quantization, untied)
        else:
            describe_copy(self.directory, directory, skeleton, dtype, quantization, untied)

    def _built(self) -> Any:
        """Return the model as its class is now on the current device, with weights that say nothing."""
        require_decoder_only(self.config, self.name)
        auto = self._build(lambda: auto_class(self.config), "architecture")
        model = self._build(lambda: auto.from_config(self.config, **self._remote), "architecture")
        require_named_class(self.config, model, self.name)
        fold_shared(model)
        settle_scales(model)
        return model

    def _loaded(self, **kwargs: Any) -> tuple[Any, list[str]]:
        """Return the model, and the names of its tensors that no file holds. Never from a pickle."""
        require_decoder_only(self.config, self.name)
        if self.gguf:
            kwargs["config"] = self.config  # parsed already, which takes seconds
        else:
            self.weight_files()
            kwargs["use_safetensors"] = True
        if self.published_as:
            from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

            kind = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[self.published_as]
            kwargs["quantization_config"] = kind(dequantize=True)
        model, found = self._load(auto_class(self.config), "weights", output_loading_info=True, **kwargs)
        return model, sorted(found["missing_keys"])

    def _require_nothing_missing(self, missing: Iterable[str]) -> None:
        names = list(missing)
        if names:
            kind = CheckpointError if self.is_packed else SourceError
            raise kind(
                f"the files of {self.name!r} lack {len(names)} of the model's tensors: {', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}. Download the model again, if its config.json is its own."
            )

    @property
    def _remote(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code}

    def _load(self, auto, what: str, **kwargs):
        if self.gguf:
            kwargs["gguf_file"] = self.gguf
        return self._build(lambda: auto.from_pretrained(self.directory, **self._remote, **kwargs), what)

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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps a report of what is missing to those who asked for it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Checkpoint:
    """A packed checkpoint, opened for looking into: nothing but headers is read until asked for."""

    directory: Path
    config: CheckpointConfig
    stored: StoredTensors
    report: dict[str, Any]

    @property
    def trained_whole(self) -> tuple[float, float] | None:
        """The divergence on text held out before and after a training of the whole model; None without one."""
        curve = self.report.get(END_TO_END)
        return (curve[0], min(curve)) if curve else None

    @classmethod
    def open(cls, files: ModelFiles) -> Checkpoint:
        """Raise `CheckpointError` when the model is not one of ours, or damaged."""
        if not files.is_packed:
            raise CheckpointError(
                f"{files.name!r} is not quantized with pairwise rotations (no quant_method 'paroquant')"
            )
        config, stored = CheckpointConfig.from_dict(files.quantization), StoredTensors.of_directory(files.directory)
        stored.require_whole_linears()
        if not stored.linears():
            raise CheckpointError(f"{files.name!r} holds no quantized linear, but its config.json says so. {REMEDY}")
        return cls(files.directory, config, stored, read_record(files.directory / REPORT_FILE))

    def layout(self, path: str) -> LinearLayout:
        """Return the layout of one linear, from the shapes of its tensors."""
        fields = self.stored.fields_of(path)
        if "qweight" not in fields:
            raise CheckpointError(f"no quantized linear {path!r}{did_you_mean(path, self.stored.linears())}")
        shape = fields["qweight"].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"tensor {path}.qweight has shape {list(shape)}, must have 2 dimensions. {REMEDY}")
        bits = self.config.spec_of(path).bits
        layout = self.config.layout(path, shape[0], shape[1] * 32 // bits, "bias" in fields)
        if faults := layout.misfits():
            raise CheckpointError(f"{path}: {'; '.join(faults)}. {REMEDY}")
        return layout

    def packed(self, path: str) -> PackedLinear:
        """Return one linear, checked."""
        layout = self.layout(path)
        return PackedLinear.from_tensors(path, layout, self.stored.tensors_of(path))

    def check_plain(self) -> None:
        """Raise `CheckpointError` naming a tensor outside the quantized linears that has NaN or infinity in it."""
        packed = self.stored.packed_names()
        for name, field in self.stored.fields.items():
            if name not in packed and field.dtype.is_floating_point and not finite(self.stored.load(name)):
                raise CheckpointError(f"tensor {name} has values that are not finite. {REMEDY}")

    def specs(self) -> list[str]:
        """Return how the linears are stored, in words: the default's words alone, or each spec's with how many linears have it."""
        default = self.config.spec
        counts = Counter(self.layout(path).spec for path in self.stored.linears())
        if set(counts) <= {default}:
            return [str(default)]
        ordered = sorted(counts.items(), key=lambda item: (item[0] != default, -item[1]))
        return [f"{spec} ({counted(count, 'layer')})" for spec, count in ordered]

    def activations(self) -> str:
        """Return for tables what layers round their inputs to: "int8", "int8, fp8", or `UNROUNDED`."""
        found = {self.layout(path).activations for path in self.stored.linears()}
        return ", ".join(name for name in FORMATS if name in found) or UNROUNDED

    def bits_per_weight(self) -> float:
        """Stored bits of all quantized linears over the number of their weights."""
        return bits_per_weight({path: self.layout(path) for path in self.stored.linears()}, self.stored.pools())
