"""The pruned forward in parts: rows that go on, layers run over them, and what a decoder shows at a cut.

Hugging Face's own layers do the work. `prune`, the measuring engine and the component-by-component oracle of
`validate` are written with these functions, so that pruning means one thing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from ep_export.choosers.base import CutTokens, LayerStates, state_heads
from ep_export.errors import UserError
from ep_export.policy import Source, scored_source

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.families.base import DecoderModules
    from ep_export.policy import Cut

__all__ = [
    "PROJECTIONS",
    "SpanRecorder",
    "cut_tokens",
    "layer_arguments",
    "layer_states",
    "run_layers",
    "staying",
]

PROJECTIONS = {Source.QUERY: "q_proj", Source.KEY: "k_proj", Source.VALUE: "v_proj"}
"""Where an attention module has what a chooser may score."""


def staying(length: int, visual: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows of a sequence that go on after a cut: every one but the visual tokens that are not kept.

    Args:
        length: S.
        visual: [N] int64 positions of the visual tokens.
        kept: [k] int64, those of them that stay, in any order.

    Returns:
        [M] int64 ascending, on the device of `visual`; M = S - N + k.
    """
    stays = torch.ones(length, dtype=torch.bool, device=visual.device)
    stays[visual] = False
    stays[kept] = True
    return stays.nonzero()[:, 0]


def layer_arguments(
    arguments: Mapping[str, Any],
    rows: Sequence[torch.Tensor] | None,
    columns: Sequence[torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a decoder layer for some rows of the sequence they were made for.

    Args:
        arguments: As the model passes them. A mask of None stays None: causal by order for a prefill,
            everything for a decode step.
        rows: One batch row each, each [M] positions of the new tokens; None for all, in one row.
        columns: One batch row each, each [P + M] columns of the mask (positions of the full-length cache and
            the new tokens); None for `rows` themselves, which is right where there is no cache.

    Returns:
        A new dict; tables and masks have a batch axis of len(rows).
    """
    cut = dict(arguments)
    if rows is not None:
        # tables are [.., B, S, D]: mRoPE may put its axes before the batch
        cut["position_embeddings"] = tuple(
            torch.cat([table.index_select(-2, one) for one in rows], dim=-3)
            for table in arguments["position_embeddings"]
        )
        if arguments.get("position_ids") is not None:
            cut["position_ids"] = torch.cat([arguments["position_ids"].index_select(-1, one) for one in rows])
    mask = arguments.get("attention_mask")
    columns = rows if columns is None else columns
    if mask is not None and columns is not None:
        masks = [mask.index_select(-1, one) for one in columns]
        if rows is not None:
            masks = [part.index_select(-2, one) for part, one in zip(masks, rows, strict=True)]
        cut["attention_mask"] = torch.cat(masks)
    return cut


def run_layers(
    decoder: DecoderModules,
    hidden: torch.Tensor,
    layers: range,
    arguments: Mapping[int, Mapping[str, Any]],
    rows: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run consecutive decoder layers.

    Args:
        decoder: The model's decoder.
        hidden: [sets, M, d] what enters the first of them.
        layers: Their numbers.
        arguments: Layer -> keyword arguments for the whole sequence, e.g. `SpanRecorder.arguments`.
        rows: Positions of that sequence each set holds, each [M]; None for all, in one set.

    Returns:
        [sets, M, d] what leaves the last of them.
    """
    given: Mapping[str, Any] = {}
    cut: dict[str, Any] = {}
    for index in layers:
        if not cut or not _same(arguments[index], given):
            given = arguments[index]
            cut = layer_arguments(given, rows)  # usually the same for all layers
        output = decoder.layers[index](hidden, **cut)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def cut_tokens(
    cut: Cut,
    dims: DecoderDims,
    *,
    hidden: torch.Tensor,
    projections: Mapping[Source, torch.Tensor],
    visual_index: torch.Tensor,
) -> CutTokens:
    """What a cut's chooser looks at.

    Args:
        cut: The cut.
        dims: The decoder's dimensions.
        hidden: [S, d] what enters the cut's layer, before anything is dropped there.
        projections: Of the layer before, each [S, heads * head_dim], its attention [S, 1] (see
            `layer_states`); only what the chooser scores is read.
        visual_index: [N] int64 ascending positions in this sequence.

    Returns:
        On the device of `hidden`.
    """
    arrived = hidden.index_select(0, visual_index)
    states = None
    source = scored_source(cut.chooser)
    if source is not None:
        chosen = arrived if source is Source.HIDDEN else projections[source].index_select(0, visual_index)
        states = chosen.reshape(len(visual_index), state_heads(source, dims), -1)
    return CutTokens(hidden=arrived, states=states, visual_index=visual_index)


def layer_states(
    attention: Any,
    dims: DecoderDims,
    projections: Mapping[Source, torch.Tensor],
    tables: Sequence[torch.Tensor],
) -> LayerStates:
    """What a layer's attention attends with.

    Args:
        attention: Its module.
        dims: The decoder's dimensions.
        projections: Of that module, each [S, heads * head_dim].
        tables: Of its rotary embedding, cos and sin of the same S positions, as the model passes them.
    """
    queries, keys = projections[Source.QUERY], projections[Source.KEY]
    cos, sin = tables
    return LayerStates(
        queries=queries.reshape(len(queries), dims.heads, -1),
        keys=keys.reshape(len(keys), dims.kv_heads, -1),
        rotate=_rotation(attention, cos, sin),
        scale=float(attention.scaling),
    )


def _rotation(
    attention: Any, cos: torch.Tensor, sin: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The rotary embedding that the attention itself applies: the function of its modelling file."""
    file = type(attention).__module__
    apply = getattr(sys.modules[file], "apply_rotary_pos_emb", None)

    def rotate(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if apply is None:
            raise UserError(
                f"{file} has no rotary embedding that is known here, so attention cannot be computed",
                hint="leave out what looks at attention or rotated keys, such as fastv and dart",
            )
        turned = apply(queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos, sin)
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

    return rotate


class SpanRecorder:
    """What a decoder computes at some layers while it runs. `install` hooks it in; nothing is copied.

    Attributes:
        hidden: K -> [B, S, d], what enters layer K; for K = L what enters the final norm.
        projections: K -> by source what the projections of layer K-1 gave, each [B, S, heads * head_dim],
            before rotary embedding. K = 0 has none.
        tables: K -> cos and sin of layer K-1's rotary embedding, for as many positions; with projections.
        arguments: Layer -> keyword arguments it was called with, its cache left out; empty unless asked for.
    """

    def __init__(
        self,
        decoder: DecoderModules,
        layers: Iterable[int],
        *,
        projections: bool = True,
        arguments: bool = False,
    ) -> None:
        """Prepare.

        Args:
            decoder: The model's decoder.
            layers: Layers K to look at, 0 to L.
            projections: Also keep what the layers before them project.
            arguments: Also keep every layer's arguments, for `run_layers`.
        """
        self._decoder = decoder
        self._layers = sorted(set(layers))
        self._keep_projections, self._keep_arguments = projections, arguments
        self.hidden: dict[int, torch.Tensor] = {}
        self.projections: dict[int, dict[Source, torch.Tensor]] = {}
        self.tables: dict[int, tuple[torch.Tensor, ...]] = {}
        self.arguments: dict[int, dict[str, Any]] = {}

    def install(self, undo: ExitStack) -> None:
        """Register every hook; `undo` removes them."""
        modules = [*self._decoder.layers, self._decoder.norm]
        for layer in self._layers:
            hook = modules[layer].register_forward_pre_hook(self._enter(layer), with_kwargs=True)
            undo.callback(hook.remove)
            if layer == 0 or not self._keep_projections:
                continue
            attention: Any = modules[layer - 1].self_attn
            hook = attention.register_forward_pre_hook(self._rotate(layer), with_kwargs=True)
            undo.callback(hook.remove)
            for source, name in PROJECTIONS.items():
                hook = getattr(attention, name).register_forward_hook(self._project(layer, source))
                undo.callback(hook.remove)
        if self._keep_arguments:
            for index, module in enumerate(self._decoder.layers):
                hook = module.register_forward_pre_hook(self._call(index), with_kwargs=True)
                undo.callback(hook.remove)

    def clear(self) -> None:
        """Let go of everything that was recorded."""
        self.hidden.clear()
        self.projections.clear()
        self.tables.clear()
        self.arguments.clear()

    def projected(self, layer: int, row: int = 0) -> dict[Source, torch.Tensor]:
        """One sequence's projections at a layer, each [S, heads * head_dim], as `cut_tokens` takes them."""
        return {source: output[row] for source, output in self.projections.get(layer, {}).items()}

    def attention(self, layer: int, dims: DecoderDims) -> torch.Tensor:
        """What the last position attended to in the layer before, [S, 1]; see `LayerStates.attention`."""
        module: Any = self._decoder.layers[layer - 1].self_attn
        return layer_states(module, dims, self.projected(layer), self.tables[layer]).attention

    def _enter(self, layer: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _project(self, layer: int, source: Source) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            self.projections.setdefault(layer, {})[source] = output

        return hook

    def _rotate(self, layer: int) -> Any:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self.tables[layer] = kwargs["position_embeddings"]

        return hook

    def _call(self, index: int) -> Any:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self.arguments[index] = {**rest, "past_key_values": None, "use_cache": False}

        return hook


def _same(arguments: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether these are the very same objects under the same names."""
    return arguments.keys() == others.keys() and all(
        value is others[name] for name, value in arguments.items()
    )
