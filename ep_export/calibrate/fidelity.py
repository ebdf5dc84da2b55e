"""One prompt, many ways of pruning: how far each moves the model from its own unpruned answer.

The unpruned model answers greedily once and is then run once over prompt and answer together; on the way
the hidden states at the door of every candidate layer are kept. A way of pruning is measured from there: its
positions are gathered and only layers K..L-1, the final norm and the answer's logits are computed, all ways
of a layer in one batch. That is what the pruned model computes when it is fed the same answer token by token,
because both are causal in the same order; the vision encoder and layers 0..K-1 are never run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ep_export.entropy import layer_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ep_export.families.base import DecoderModules, Family, PromptInputs

__all__ = [
    "FullPass",
    "Gap",
    "Projected",
    "before_placeholder",
    "gap",
    "gaps",
    "pruned_log_probs",
    "run_full",
]

_BATCH_TOKENS = 16384
"""Positions computed at once: bounds memory, 16384 of width 3584 and FFN 18944 are 1.5 GB in float32."""


@dataclass(frozen=True)
class Gap:
    """Distance of a pruned answer from the full one, summed over the answer's positions.

    Attributes:
        kl: Sum of KL(full || pruned) in nats.
        agreements: Positions where both have the same top token.
    """

    kl: float
    agreements: int


@dataclass(frozen=True)
class Projected:
    """Projections of one layer before rotary embedding, for every position fed.

    Attributes:
        query: [positions, heads * head_dim].
        key: [positions, kv_heads * head_dim].
        value: [positions, kv_heads * head_dim].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class FullPass:
    """The unpruned model over prompt and an answer, usually its own.

    Attributes:
        visual_index: [N] int64, on the model's device.
        positions: Prompt and answer positions fed (the last answer token predicts nothing and is left out).
        log_probs: [answer, vocab] float32 at the positions that predict the answer.
        hidden: K -> [1, positions, d], what enters layer K.
        queries: K -> [N, heads, head_dim], q_proj output of layer K-1 at the visual tokens; K = 0 has none.
        projected: K -> all projections of layer K-1; empty unless asked for.
        arguments: K.. -> keyword arguments layer K was called with.
        query_entropy: [L] nats.
        key_entropy: [L] nats.
    """

    visual_index: torch.Tensor
    positions: int
    log_probs: torch.Tensor
    hidden: dict[int, torch.Tensor]
    queries: dict[int, torch.Tensor]
    projected: dict[int, Projected]
    arguments: dict[int, dict[str, Any]]
    query_entropy: tuple[float, ...]
    key_entropy: tuple[float, ...]


def run_full(
    model: PreTrainedModel,
    family: Family,
    prompt: PromptInputs,
    answer: Sequence[int],
    *,
    layers: Sequence[int],
    heads: int,
    entropies: bool = True,
    projections: bool = False,
) -> FullPass:
    """Run prompt and answer through the unpruned model once.

    Args:
        model: From `load_model`, on any device.
        family: Its family.
        prompt: With at least one visual token.
        answer: What is fed after the prompt, at least one token; the last is only predicted.
        layers: Candidate layers K whose doors are kept, 0 among them or not.
        heads: Query heads.
        entropies: Also compute every layer's entropies.
        projections: Also keep every projection of the layers before the doors.
    """
    decoder = family.decoder(model)
    device = model.device
    ids = np.concatenate([prompt.input_ids, np.asarray([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = family.reference_inputs(replace(prompt, input_ids=ids), model.config)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    visual = torch.from_numpy(prompt.visual_index).to(device)
    seen = _Seen(visual, layers, len(decoder.layers), heads, entropies=entropies, projections=projections)
    with ExitStack() as undo, torch.inference_mode():
        seen.install(decoder, undo)
        model(**inputs, use_cache=False, logits_to_keep=1)
        logits = decoder.lm_head(decoder.norm(seen.last)[0, -len(answer) :])
    return FullPass(
        visual_index=visual,
        positions=ids.shape[1],
        log_probs=logits.float().log_softmax(dim=-1),
        hidden=seen.hidden,
        queries=seen.queries,
        projected={layer: Projected(**parts) for layer, parts in seen.projected.items()},
        arguments=seen.arguments,
        query_entropy=tuple(seen.query_entropy),
        key_entropy=tuple(seen.key_entropy),
    )


def gaps(decoder: DecoderModules, full: FullPass, layer: int, kept: Sequence[torch.Tensor]) -> list[Gap]:
    """Measure kept sets of one layer against the full pass.

    Args:
        decoder: The model's decoder.
        full: From `run_full`, with `layer` among its layers.
        layer: K.
        kept: Kept visual positions, each [k] with the same k.

    Returns:
        One gap for each kept set.
    """
    return [gap(full.log_probs, one) for one in pruned_log_probs(decoder, full, layer, kept)]


def pruned_log_probs(
    decoder: DecoderModules, full: FullPass, layer: int, kept: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """What the pruned model predicts for the answer, one kept set after the other.

    Args:
        decoder: The model's decoder.
        full: From `run_full`, with `layer` among its layers.
        layer: K.
        kept: Kept visual positions, each [k] with the same k.

    Yields:
        [answer, vocab] float32 log-probabilities for each kept set.
    """
    rows = [staying(full, chosen) for chosen in kept]
    for part in _batches(rows):
        with torch.inference_mode():
            entering = torch.cat([full.hidden[layer].index_select(1, one) for one in part])
            hidden = run_layers(decoder, full, entering, range(layer, len(decoder.layers)), part)
            logits = decoder.lm_head(decoder.norm(hidden[:, -len(full.log_probs) :]))
        for one in logits:
            yield one.float().log_softmax(dim=-1)


def before_placeholder(answer: list[int], config: PreTrainedConfig) -> list[int]:
    """Cut an answer after its first picture placeholder: fed back, it would ask for another picture."""
    from ep_export.reference import visual_positions

    places = visual_positions(torch.tensor(answer), config)
    return answer[: int(places[0]) + 1] if len(places) else answer


def gap(full: torch.Tensor, pruned: torch.Tensor) -> Gap:
    """Distance between predictions, both [answer, vocab] log-probabilities."""
    terms = full.exp() * (full - pruned)
    kl = terms.sum(dim=-1, dtype=torch.float64).clamp_min(0)  # rounding leaves about -1e-7 where it is 0
    return Gap(float(kl.sum()), int((full.argmax(-1) == pruned.argmax(-1)).sum()))


class _Seen:
    """Hooks of one full pass and what they keep."""

    def __init__(
        self,
        visual: torch.Tensor,
        doors: Sequence[int],
        layers: int,
        heads: int,
        *,
        entropies: bool,
        projections: bool,
    ) -> None:
        self._visual = visual
        self._doors = frozenset(doors)
        self._heads = heads
        self._entropies = entropies
        self._projections = projections
        self.hidden: dict[int, torch.Tensor] = {}
        self.queries: dict[int, torch.Tensor] = {}
        self.projected: dict[int, dict[str, torch.Tensor]] = {}
        self.arguments: dict[int, dict[str, Any]] = {}
        self.query_entropy = [0.0] * layers
        self.key_entropy = [0.0] * layers
        self.last = torch.empty(0)

    def install(self, decoder: DecoderModules, undo: ExitStack) -> None:
        """Register every hook; `undo` removes them."""
        for index, layer in enumerate(decoder.layers):
            attention: Any = layer.self_attn
            undo.callback(layer.register_forward_pre_hook(self._door(index), with_kwargs=True).remove)
            undo.callback(attention.q_proj.register_forward_hook(self._projection(index, "query")).remove)
            undo.callback(attention.k_proj.register_forward_hook(self._projection(index, "key")).remove)
            undo.callback(attention.v_proj.register_forward_hook(self._projection(index, "value")).remove)
        undo.callback(decoder.norm.register_forward_pre_hook(self._keep_last).remove)

    def _keep_last(self, _norm: Any, args: tuple[Any, ...]) -> None:
        self.last = args[0]

    def _door(self, index: int) -> Any:
        def hook(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self.arguments[index] = rest
            if index in self._doors:
                self.hidden[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _projection(self, index: int, kind: str) -> Any:
        def hook(_linear: Any, _args: Any, output: torch.Tensor) -> None:
            if self._projections and index + 1 in self._doors:
                self.projected.setdefault(index + 1, {})[kind] = output[0]
            if kind == "value":
                return
            states = output[0, self._visual]
            if kind == "query" and index + 1 in self._doors:
                self.queries[index + 1] = states.view(len(states), self._heads, -1)
            if self._entropies:
                curve = self.query_entropy if kind == "query" else self.key_entropy
                curve[index] = layer_entropy(states)

        return hook


def staying(full: FullPass, kept: torch.Tensor) -> torch.Tensor:
    """[M] positions that go on: all text, the answer, and the kept visual tokens, in order."""
    stays = torch.ones(full.positions, dtype=torch.bool, device=full.visual_index.device)
    stays[full.visual_index] = False
    stays[kept] = True
    return stays.nonzero()[:, 0]


def _batches(rows: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    size = max(1, _BATCH_TOKENS // max(1, len(rows[0]) if rows else 1))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def run_layers(
    decoder: DecoderModules,
    full: FullPass,
    hidden: torch.Tensor,
    layers: range,
    rows: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run consecutive decoder layers as the full pass called them, without a cache.

    Args:
        decoder: The model's decoder.
        full: Where positions, masks and rotary tables come from.
        hidden: [sets, M, d] what enters the first of them.
        layers: Their numbers.
        rows: Positions of the full pass that each set holds, each [M]; None for all, in one set.

    Returns:
        [sets, M, d].
    """
    given: dict[str, Any] = {}
    cut: dict[str, Any] = {}
    for index in layers:
        arguments = full.arguments[index]
        if not given or any(arguments[name] is not given.get(name) for name in arguments):
            given, cut = arguments, _arguments(arguments, rows)  # usually the same for all layers
        hidden = decoder.layers[index](hidden, **cut)
    return hidden


def _arguments(arguments: dict[str, Any], rows: Sequence[torch.Tensor] | None) -> dict[str, Any]:
    """A layer's keyword arguments for several row sets (the tables' batch axis is the third last)."""
    cut = {**arguments, "past_key_values": None, "use_cache": False}
    if rows is None:
        return cut
    cos, sin = arguments["position_embeddings"]
    cut["position_embeddings"] = tuple(
        torch.cat([table.index_select(-2, one) for one in rows], dim=-3) for table in (cos, sin)
    )
    if arguments.get("position_ids") is not None:
        cut["position_ids"] = torch.cat([arguments["position_ids"].index_select(-1, one) for one in rows])
    mask = arguments.get("attention_mask")
    if mask is not None:  # None is causal by order
        cut["attention_mask"] = torch.cat([mask.index_select(-1, one).index_select(-2, one) for one in rows])
    return cut
