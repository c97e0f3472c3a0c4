"""The plain model's weights on disk, handed to the model block by block: host and GPU never hold all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.names import OWN, Names
from ..models.sharing import lenders_of
from ..models.sites import ExpertSite, Site, sites_in
from ..spec.fields import Field
from ..support.errors import SourceError
from .architecture import expected_fields
from .files import write_tensors
from .headers import StoredTensors
from .read import ModelFiles

#: Bytes read at each of `SAMPLES` places of a file to tell one model from another.
SAMPLE_BYTES, SAMPLES = 1 << 16, 16
#: Largest file of a copy that is written where the source cannot be streamed.
SPILL_BYTES = 2_000_000_000
#: Largest block that is read while the one before is worked on: it takes so much of the host's memory.
AHEAD_BYTES = 4_000_000_000


class SourceWeights:
    """Weights under the model's own parameter names.

    stored: where each lies; tied: name of the output embedding's weight → that of the input embedding, for when the files hold
    one for both; originals: the source's own tensors where their names are others, which Transformers converts
    on loading: they are what a checkpoint keeps; `enter` and `leave` make this the home of a walk's blocks (`optimize.homes.Home`).
    """

    def __init__(
        self,
        stored: StoredTensors,
        names: Names = OWN,
        experts: Mapping[str, Sequence[ExpertSite]] | None = None,
        originals: StoredTensors | None = None,
    ):
        self.stored, self.names, self.experts, self.originals = stored, names, dict(experts or {}), originals
        self.files = sorted(set(stored.files.values()))
        self._seen = {file: _state(file) for file in self.files}
        self.tied: dict[str, str] = {}
        self._reader = ThreadPoolExecutor(1, "source")
        self._ahead: dict[str, Future[Tensor]] = {}

    @classmethod
    def open(
        cls, files: ModelFiles, skeleton: nn.Module, names: Names, spill: Path, spilled: bool = False
    ) -> SourceWeights:
        """Return the source's own files where they hold the model's values; else (GGUF, values that Transformers changes) a
        copy of them in `spill`.

        spilled: that copy has been made already. Raises `SourceError` if the weights cannot be read, or some are missing.
        """
        found = None if files.gguf else files.stored()
        if found is not None:
            source = cls(found, names, _single_experts(found, skeleton, names))
            if source._holds(skeleton):
                source.tied = _tied(skeleton)
                return source
        if not spilled:
            _spill(files.model(), spill)
        source = cls(StoredTensors.of_files(sorted(spill.glob("*.safetensors"))), originals=found)
        source.tied = _tied(skeleton)
        return source

    def field(self, name: str) -> Field | None:
        """Return dtype and shape of a parameter of the model, or a buffer; None for one that is not stored."""
        if name in self.experts:
            sites = self.experts[name]
            first = self.stored.fields[f"{sites[0].path}.weight"]
            return Field(first.dtype, tuple(sites[0].module.get_parameter(name.rpartition(".")[2]).shape))
        return self.stored.fields.get(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        if name in self.stored.fields:
            return name
        found = self.names.stored(name)
        return self._stored_name(self.tied[name]) if found not in self.stored.fields and name in self.tied else found

    def _holds(self, skeleton: nn.Module) -> bool:
        """Return whether the files hold all of the model's tensors as they are in the model, whatever their names."""
        return all(
            (own := self.field(name)) is not None and own.shape == field.shape and name not in self.names.changed
            for name, field in expected_fields(skeleton).items()
        )

    def digest(self) -> str:
        """Tells this source from another or from a changed one, without reading all of it."""
        return digest_of(self.files)

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return one parameter of the model. Raises `SourceError` if its file has changed since this object was made."""
        if name not in self.experts:
            return self._tensor(self._stored_name(name), device)
        own = self.field(name)
        assert own is not None, "experts are stored, one by one"
        whole = torch.empty(own.shape, dtype=own.dtype, device=device)
        for site in self.experts[name]:
            site.taken(whole).copy_(self._tensor(f"{site.path}.weight", device))
        return whole

    def _tensor(self, name: str, device: torch.device | str) -> Tensor:
        file = self.stored.files[name]
        if _state(file) != self._seen[file]:
            raise SourceError(
                f"{file} changed while it was being quantized. Finished blocks are kept; "
                "put the file back to continue, or start over with --fresh."
            )
        return self.stored.load(name, device)

    def as_stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return the tensors, by the names of the files, that hold another value of a parameter of the model; views of it."""
        if name in self.experts:
            return {f"{site.path}.weight": site.taken(value) for site in self.experts[name]}
        return {self._stored_name(name): value}

    def plain_fields(self, quantized: Iterable[Site], names: Names) -> dict[str, Field]:
        """Return what a checkpoint keeps of the source, by the source's names: all but what these sites hold."""
        kept = self.originals or self.stored
        replaced: set[str] = set()
        for site in quantized:
            single = f"{site.path}.weight"  # of an expert that is a tensor of its own
            for parameter in (site.parameter, site.bias_parameter):
                sources = names.sources.get(parameter, (parameter,))
                replaced.update((single,) if single in sources else sources)
        return {name: field for name, field in kept.fields.items() if name not in replaced}

    def load_stored(self, name: str) -> Tensor:
        """Return one of the tensors that a checkpoint keeps."""
        return self._tensor(name, "cpu") if self.originals is None else self.originals.load(name)

    def fill(
        self, module: nn.Module, prefix: str, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> None:
        """Give every parameter and stored buffer below `module` its value; other buffers move to the device."""
        for path, owner in module.named_modules():
            for name, old in _tensors(owner):
                full = ".".join(part for part in (prefix, path, name) if part)
                if self.field(full) is not None:
                    value = self._read(full, device)
                    _put(owner, name, value.to(dtype) if dtype is not None and value.is_floating_point() else value)
                elif not old.is_meta:
                    _put(owner, name, old.to(device))

    def fill_all_but(self, model: Any, blocks: Iterable[Any], head: bool = False) -> None:
        """Load everything outside the blocks onto the CPU: it is needed to reach the first block.

        head: load the output embedding too, which may be the input embedding; it is needed for logits.
        """
        spared = {id(m) for block in blocks for m in block.module.modules()}
        output = model.get_output_embeddings()
        if not head:
            spared.add(id(output))
        for path, module in model.named_modules():
            if id(module) not in spared:
                for name, _ in _tensors(module):
                    full = f"{path}.{name}" if path else name
                    if self.field(full) is not None:
                        _put(module, name, self.load(full))

    def dtype(self, block: Any) -> torch.dtype:
        """Return the dtype of the block's parameters in the source's files."""
        fields = (self.field(f"{block.path}.{name}") for name, _ in block.module.named_parameters())
        return next(field.dtype for field in fields if field is not None)

    #: A block that leaves is empty, and later comes back as the original has it.
    stays = False

    def enter(self, block: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Load the block's weights onto the device."""
        for path, module in ((block.path, block.module), *lenders_of(block.module).items()):
            self.fill(module, path, device, dtype)

    def expect(self, block: Any, device: torch.device) -> None:
        """Begin to read the block that will enter next, in the background."""
        fields = {name: self.field(name) for name in (f"{block.path}.{own}" for own in block.module.state_dict())}
        names = [name for name, field in fields.items() if field is not None]
        if sum(field.nbytes for field in fields.values() if field is not None) <= AHEAD_BYTES:
            pin = device.type == "cuda"
            self._ahead = {name: self._reader.submit(self._copy, name, pin) for name in names}

    def close(self) -> None:
        """Read nothing more ahead, and forget what was."""
        self._reader.shutdown(cancel_futures=True)
        self._ahead = {}

    def _copy(self, name: str, pin: bool) -> Tensor:
        """Return the tensor in memory instead of a map of the file; pinned where the system allows it, which makes copying to a GPU fast."""
        value = self.load(name)
        try:
            return value.pin_memory() if pin else value.clone()
        except RuntimeError:  # so much may not be pinned here
            return value.clone()

    def _read(self, name: str, device: torch.device | str) -> Tensor:
        ahead = self._ahead.pop(name, None)
        return self.load(name, device) if ahead is None else ahead.result().to(device, non_blocking=True)

    def leave(self, block: Any) -> None:
        """Forget the block's weights."""
        for module in (*block.module.modules(), *lenders_of(block.module).values()):
            for name, old in module.named_parameters(recurse=False):
                _put(module, name, old.data.to("meta"))

    def not_finite(self, names: Iterable[str], device: torch.device) -> tuple[str, int] | None:
        """Return the first of these tensors with NaN or infinity in it, and how many; looked for on the device."""
        for name in names:
            value = self.load(name, device)
            if not value.isfinite().all():
                return name, int((~value.isfinite()).sum())
        return None


def digest_of(files: Iterable[Path]) -> str:
    """Return what tells files from others or from changed ones, from their names, sizes and samples of their content."""
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for place in range(SAMPLES):
                content.seek(max(0, size - SAMPLE_BYTES) * place // (SAMPLES - 1))
                total.update(content.read(SAMPLE_BYTES))
    return total.hexdigest()


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the module's own parameters and buffers."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, which may be of another device and dtype."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _single_experts(stored: StoredTensors, skeleton: nn.Module, names: Names) -> dict[str, list[ExpertSite]]:
    """Return the parameters that hold experts which are single tensors in the files: name → sites of all of them."""
    found: dict[str, list[ExpertSite]] = {}
    for site in sites_in(skeleton, names=names):
        if isinstance(site, ExpertSite):
            found.setdefault(site.parameter, []).append(site)

    def matches(site: ExpertSite) -> bool:
        name = f"{site.path}.weight"
        size = (site.size.out_features, site.size.in_features)
        return name in stored.fields and names.joins(name) and stored.fields[name].shape == size

    return {parameter: sites for parameter, sites in found.items() if all(map(matches, sites))}


def _tied(skeleton: Any) -> dict[str, str]:
    """Return the output embedding's weight and the input embedding's, by full names, if the model has both."""
    names = {id(module): path for path, module in skeleton.named_modules()}
    pair = [names.get(id(find())) for find in (skeleton.get_output_embeddings, skeleton.get_input_embeddings)]
    return {f"{pair[0]}.weight": f"{pair[1]}.weight"} if None not in pair else {}


def _spill(model: nn.Module, directory: Path) -> None:
    """Write the model's state to safetensors files, tied tensors once."""
    directory.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    seen: set[int] = set()
    count = 0
    for name, tensor in [*model.state_dict().items(), ("", None)]:
        if tensor is None or sum(t.nbytes for t in shard.values()) + tensor.nbytes > SPILL_BYTES:
            if shard:
                write_tensors(directory / f"model-{count:05}.safetensors", shard)
            shard, count = {}, count + 1
        if tensor is not None and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            shard[name] = tensor


def _state(file: Path) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except OSError as error:
        raise SourceError(f"{file} cannot be read any more: {error.strerror}.") from error
    return found.st_size, found.st_mtime_ns
