"""The weights that a checkpoint was made from, as long as they are on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..models.names import OWN, Names
from ..models.sites import EmbeddingSite, Site, stored_sites
from ..support.errors import PairQuantError, SourceError
from .headers import StoredTensors
from .read import Checkpoint, ModelFiles


class Original:
    """The source that a checkpoint records. remark: in words, whether its weights can be had, and else why not."""

    def __init__(self, checkpoint: Checkpoint):
        source = (checkpoint.config.provenance or {}).get("source")
        self._checkpoint = checkpoint
        self._source = source if isinstance(source, str) and Path(source).exists() else None
        self.remark = f"compared with {source}"
        if self._source is None:
            self.remark = f"the source ({source or 'not recorded'}) is not on this machine"

    def weight(self, path: str) -> Tensor | None:
        """Return the original weight of one linear, float32 [N, C]; None once the source could not be read (see `remark`)."""
        if self._source is None:
            return None
        try:
            weight = self._load(path).float()
            layout = self._checkpoint.layout(path)
            if weight.shape != (layout.out_features, layout.in_features):
                raise AttributeError(f"{path} has shape {list(weight.shape)} there")
            return weight
        except (PairQuantError, AttributeError, KeyError) as error:
            self.remark = f"the source {self._source} cannot be read ({error})"
            self._source = None
            return None

    @cached_property
    def _load(self) -> Callable[[str], Tensor]:
        """From the source's files where they have its names; else (GGUF, other names) from the model, loaded once."""
        assert self._source is not None, "weight() asks only where there is a source"
        files = ModelFiles.find(self._source)
        stored = None if files.gguf else StoredTensors.of_directory(files.directory)
        if stored and all(f"{path}.weight" in stored.fields for path in self._checkpoint.stored.linears()):
            sites, _ = sites_of(files)

            def load(path: str) -> Tensor:
                weight = stored.load(f"{path}.weight")
                return weight if path not in sites or sites[path].pool else sites[path].as_held(weight)

            return load
        model = files.model()
        sites = stored_sites(model, files.names(model))
        return lambda path: sites[path].weight


def sites_of(files: ModelFiles) -> tuple[dict[str, Site], Names]:
    """Return where the weights of a model lie, by path, without loading them, and how its files name them.

    Empty for a model whose class cannot be built, such as custom code that is not trusted: its weights then count as those
    of `nn.Linear`.
    """
    try:
        model = files.skeleton()
        names = files.names(model)
        return stored_sites(model, names), names
    except SourceError:
        return {}, OWN


def looked_up(files: ModelFiles) -> set[str]:
    """Return the paths of a model's weights whose rows are looked up, not multiplied: its input embedding."""
    return {path for path, site in sites_of(files)[0].items() if isinstance(site, EmbeddingSite)}
