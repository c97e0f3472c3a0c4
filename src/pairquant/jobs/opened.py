"""A model that is opened to be quantized: checked, with the plan that the options give, its weights not yet read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.read import ModelFiles
from ..models.blocks import Block
from ..models.names import Names
from ..models.planning import plan_model
from ..models.sites import Site, embedding_site
from ..spec.options import QuantConfig
from ..spec.plan import Plan
from ..support.errors import SourceError


@dataclass(frozen=True)
class Opened:
    """A model to quantize, its weights not yet read, and the plan that the options alone give."""

    files: ModelFiles
    tokenizer: Any
    skeleton: Any
    names: Names
    plan: Plan
    blocks: list[Block]
    config: QuantConfig

    @classmethod
    def of(cls, model: str | Path, config: QuantConfig, trust_remote_code: bool = False) -> Opened:
        """Open a model and check that it can be quantized with these options; raises a `PairQuantError` that says why not."""
        files = ModelFiles.find(str(model), trust_remote_code)
        files.require_plain()
        files.require_loadable()
        tokenizer, skeleton = files.tokenizer(), files.skeleton()
        names = files.names(skeleton)
        _require_whole(names, skeleton, str(model))
        plan, blocks = plan_model(skeleton, config, names)
        return cls(files, tokenizer, skeleton, names, plan, blocks, config.with_group_size(plan.default.group_size))

    @cached_property
    def embedding(self) -> Site | None:
        """The input embedding, if it is to be quantized."""
        return None if self.config.embedding_bits is None else embedding_site(self.skeleton, self.names)

    @property
    def sites(self) -> dict[str, Site]:
        """Where every weight to be quantized lies, by path."""
        found = {path: site for block in self.blocks for path, site in block.sites.items()}
        return found if self.embedding is None else {**found, self.embedding.path: self.embedding}

    @property
    def decoders(self) -> list[Block]:
        """The blocks without the output embedding, whose form a plan does not choose."""
        return [block for block in self.blocks if not block.head]


def _require_whole(names: Names, skeleton: Any, model: str) -> None:
    """Refuse a model whose layers are parts of larger tensors in its files: quantized, they have no names there."""
    if names.cut:
        raise SourceError(
            f"{model!r} is a {type(skeleton).__name__}, which Transformers cuts into other layers than its files hold (such as "
            f"{names.cut[0]}): quantized, they would have no names in the source's layout. Such models cannot be quantized yet; "
            "choose one whose layers are stored each on their own."
        )
