"""The `quantization_config` of a checkpoint, as vLLM wants to hold it: which layers are ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.run import decoded_budget
from ...spec.checkpoint import CheckpointConfig
from ...spec.experts import EXPERT
from ...spec.linear import Spec
from ...support.errors import CheckpointError, ConfigError
from ..packed_paths import PackedPaths
from .compat import (
    QuantizationConfig,
    follow_checkpoints,
    is_embedding,
    is_experts,
    is_head,
    tell_compiler,
    tensor_names,
)

if TYPE_CHECKING:
    from .linear import PairQuantLinearMethod

#: Last names of output embeddings.
HEADS = ("lm_head", "embed_out")
#: Last names of input embeddings.
EMBEDDINGS = (
    "embed_tokens",
    "embed_in",
    "embedding",
    "embeddings",
    "embed",
    "wte",
    "word_embeddings",
    "tok_embeddings",
)
Weights = Iterable[tuple[str, torch.Tensor]]


class PairQuantConfig(PackedPaths, QuantizationConfig):
    """Which layers of vLLM's model run packed weights, and by which method. heads: packed output embeddings, as stored."""

    engine = "vLLM"

    def __init__(self, checkpoint: CheckpointConfig):
        super().__init__()
        self.begin(checkpoint)
        self.heads: set[str] = set()
        follow_checkpoints(sort_out)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also in vLLM's workers, which are given this object pickled, what is loaded is sorted out."""
        self.__dict__.update(state)
        follow_checkpoints(sort_out)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PairQuantConfig:
        """Read the JSON object; raises `CheckpointError` naming the entry that is wrong."""
        return cls(CheckpointConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look which linears the checkpoint holds packed."""
        names = tensor_names(model_name, revision)
        if names:
            paths = self.take_names(names)
            self.heads = {path for path in paths if path.rpartition(".")[2] in HEADS}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Translate the paths to those of vLLM's model."""
        self.rename(hf_to_vllm_mapper)

    def unclaimed(self, model: torch.nn.Module) -> dict[str, Spec]:
        """Return the packed linears, by path, that the model has as plain weights."""
        weights = {name for name, _ in model.named_parameters()}
        homes = {member: whole for whole, members in self.packed_modules_mapping.items() for member in members}
        found = {}
        for path, spec in (self.quantized or {}).items():
            parent, dot, name = path.rpartition(".")
            plain = {f"{path}.weight", f"{parent}{dot}{homes.get(name, name)}.weight"}
            if path not in self.claimed and plain & weights:
                found[path] = spec
        return found

    def homeless_heads(self, plain: Iterable[str]) -> set[str]:
        """Return the packed output embeddings, as the checkpoint names them, for which vLLM's model has no layer.

        It uses the input embedding instead. plain: what is decoded for it, as the checkpoint names it.
        """
        return self.heads - {self.stored_as.get(path, path) for path in self.claimed} - set(plain)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> PairQuantLinearMethod | Any:
        """Ours for packed linears, vLLM's own for all else; raises `CheckpointError` for what we cannot run."""
        from .compat import LinearBase, UnquantizedLinearMethod

        # A decoded weight that is kept is one more tensor of the graph, or a larger one.
        tell_compiler("decoded", decoded_budget.settings())
        if is_head(layer):
            return self._head_method(prefix)
        if is_embedding(layer):
            return self._embedding_method(prefix)
        if not isinstance(layer, LinearBase):
            return self._experts_method(layer, prefix)
        spec = self.spec(prefix)
        if spec is None:
            return UnquantizedLinearMethod()
        from .linear import PairQuantLinearMethod

        return self.claim([prefix, *self.members(prefix)], PairQuantLinearMethod(spec, prefix))

    def _head_method(self, prefix: str) -> Any:
        """Return what runs a packed output embedding; None for a plain one."""
        if not self.is_packed(prefix):
            return None
        from .vocabulary import PairQuantHeadMethod

        return self.claim([prefix], PairQuantHeadMethod(self.spec_of(prefix), prefix))

    def _embedding_method(self, prefix: str) -> Any:
        """Return what looks up the rows of a packed input embedding; None for a plain one."""
        packed = {path for path in self.quantized or {} if path.rpartition(".")[2] in EMBEDDINGS}
        if not prefix and len(packed) == 1:  # most models of vLLM do not tell the layer where it is
            (prefix,) = packed
        if prefix not in packed:
            return None
        from .vocabulary import PairQuantEmbeddingMethod

        return self.claim([prefix], PairQuantEmbeddingMethod(self.spec_of(prefix), prefix))

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        """Return what runs packed experts; None for a layer without packed weights.

        Raises `CheckpointError` for packed weights in any other layer, which would be taken for something else.
        """
        home = self._home_of_experts(prefix.removesuffix(".routed_experts"))
        inside = {path: spec for path, spec in (self.quantized or {}).items() if path.startswith(f"{home}.")}
        if not inside:
            return None
        if not is_experts(layer):
            raise CheckpointError(
                f"{next(iter(inside))} is quantized, but vLLM runs it within a {type(layer).__name__}, for which there is "
                "no kernel. Run the checkpoint with Transformers, or export it: `pairquant export MODEL --to bf16`."
            )
        from .experts import experts_method

        return self.claim(
            inside, experts_method(inside, home, layer, self.stored_as, self.checkpoint.transform_per_expert)
        )

    def _home_of_experts(self, prefix: str) -> str:
        """Return where a layer's packed experts lie: at its prefix, unless vLLM's model calls the layer otherwise there
        than where it puts it (MiniMax-M2): then at the one other home of experts in the same block.
        """
        homes = {found["home"] for path in self.quantized or {} if (found := EXPERT.fullmatch(path))}
        block = prefix.rsplit(".", 2)[0]
        near = [home for home in homes if home.rsplit(".", 2)[0] == block]
        return near[0] if prefix not in homes and prefix.endswith(".experts") and len(near) == 1 else prefix


def sort_out(weights: Weights, model: torch.nn.Module, current: Any, dtype: torch.dtype) -> Weights:
    """Take what vLLM's model could not place out of a checkpoint that is ours: see `stream`. Before, let its layers compute what
    comes before them: see `fusion`.

    current: the quantization configuration that vLLM holds; a model that drafts for another has one of its own.
    """
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    config = next(
        (method.pairquant for method in methods if method is not None and hasattr(method, "pairquant")), current
    )
    if not isinstance(config, PairQuantConfig):
        return weights
    _require_rows_in_place(model, config)
    from .fusion import fuse
    from .stream import passed_on

    fuse(model)
    plain = {config.stored_as[path]: spec for path, spec in config.unclaimed(model).items()}
    return passed_on(weights, methods, plain, dtype, config.homeless_heads(plain))


def _require_rows_in_place(model: torch.nn.Module, config: PairQuantConfig) -> None:
    """Refuse packed q and k for models whose loader brings the rows of their plain weights into another order (Llama 4).

    It would leave packed rows where they are, and answer wrongly without an error.
    """
    packed = [path for path in config.stored_as.values() if path.rpartition(".")[2] in ("q_proj", "k_proj")]
    if packed and any(hasattr(module, "permute_qk_weight_for_rotary") for module in model.modules()):
        raise ConfigError(
            f"vLLM reorders the rows of {packed[0]} when it loads a {type(model).__name__}, which it cannot do with packed ones. "
            "Run the checkpoint with Transformers, export it (`pairquant export MODEL --to bf16`), or quantize the model again "
            "with --ignore q_proj --ignore k_proj --ignore v_proj."
        )
