"""Will it fit, and how fast could it be: a plan beside a device's memory, bandwidth and peak arithmetic.

A plan and a target enter, an `Estimate` leaves. Everything is a formula over the config's numbers and the
target's published figures; nothing is measured, and `FORMULAS` says how each figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ep_export.bundle import Dialect, Precision
from ep_export.numerics import Weights
from ep_export.planning import Plan, layer_flops, span_tokens
from ep_export.policy import Coverage, MaxMin, Scorer, TopK
from ep_export.targets import Graphs, Target
from ep_export.weight_sizes import WeightSizes, table_parameters, weight_sizes

if TYPE_CHECKING:
    from ep_export.dims import DecoderDims
    from ep_export.policy import Chooser

__all__ = ["FORMULAS", "Estimate", "Figures", "estimate"]

FORMULAS: Mapping[str, str] = {
    "weights": "parameters of decoder layers, lm_head and vision encoder x bytes of each; quantised layers "
    "take their bits and a scale a group, lm_head 8 bits beside integers",
    "embedding table": "vocabulary x d x bytes; rows are read on the host from the mapped file, whose pages "
    "can be dropped: not counted",
    "KV cache": "2 x 2 x KV heads x head_dim x bytes, for every layer and token of prompt and answer; twice, "
    "because in the portable dialect a step's caches go in and come out, and in the modern one prefill fills "
    "its own before they move into those of the answer. There engines reserve what they are compiled for: "
    "behind a cut less than the whole prompt where `compile` is told --max-kept-tokens",
    "activations": "tokens x (3 d + 2 (H + KV heads) head_dim + 3 m) x bytes, for the encoder and every span "
    "of layers, plus masks, what policies compute and, in the portable dialect, attention weights; fused "
    "kernels need less",
    "vision encoder": "picture by picture, a video part by part: max(FLOPs / peak FLOPs, weights / "
    "bandwidth); a lower bound",
    "prefill": "span by span: max(FLOPs / peak FLOPs, (weights + cache) / bandwidth); a lower bound",
    "first token": "vision encoder + prefill",
    "decode": "(weights + cache half-way through the answer) / bandwidth; a lower bound",
}
"""How each figure is made, for people and for scripts."""

_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}
_FLOAT32 = 4
_CACHES_LIVE = 2  # why: `FORMULAS`
# Matrices of [H, H] a token for the entropy series of degree 512 if nothing were freed: 8 squares and what
# stands around them. A bound: runtimes free most of them on the way.
_SERIES_MATRICES = 12


@dataclass(frozen=True)
class Figures:
    """Of the full or of the pruned model.

    Attributes:
        kv_bytes: Caches held at most, of one answer at a time.
        activation_bytes: Working memory of the engines in prefill.
        total_bytes: Both and the weights.
        vision_seconds: Of the vision encoder; pruning leaves it as it is.
        prefill_seconds: Of the decoder.
        first_token_seconds: Both.
        decode_seconds: Of the decoder, a token.
    """

    kv_bytes: int
    activation_bytes: int
    total_bytes: int
    vision_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one prompt on a target; an estimate by `FORMULAS`, nothing measured.

    Attributes:
        target: Name of the target.
        graphs: Dialect and precision assumed.
        new_tokens: Length of the answer assumed.
        memory_bytes: Of the device.
        available_bytes: Of it, what is left for engines.
        weight_bytes: Of all components but the embedding table.
        embedding_bytes: Of that table, whose rows are read on the host; no total has it.
        full: Without pruning.
        pruned: With it.
        vision_counted: Whether the plan says what the encoder does.
    """

    target: str
    graphs: Graphs
    new_tokens: int
    memory_bytes: int
    available_bytes: int
    weight_bytes: int
    embedding_bytes: int
    full: Figures
    pruned: Figures
    vision_counted: bool

    def fits(self, figures: Figures) -> bool:
        """Whether `full` or `pruned` fits into what is left for engines."""
        return figures.total_bytes <= self.available_bytes


def estimate(
    plan: Plan,
    target: Target,
    *,
    new_tokens: int,
    graphs: Graphs | None = None,
    weights: Weights | None = None,
    kv_bytes_per_element: int | None = None,
) -> Estimate | None:
    """Memory and roofline of a plan on a target.

    Args:
        plan: Budgets of one prompt, and what its pictures ask of the vision encoder.
        target: The device.
        new_tokens: Length of the answer.
        graphs: Dialect and precision; the target's best when None.
        weights: What the decoder's linear layers are stored in; None: in the graphs' precision.
        kv_bytes_per_element: Of the caches; the graphs' precision when None.

    Returns:
        None for a target without published figures (cpu).
    """
    if target.memory_bytes is None or target.bandwidth_bytes_per_second is None:
        return None
    graphs = graphs or target.graphs[0]
    dims, schedule, visual = plan.dims, plan.schedule, plan.visual_tokens
    size = _BYTES[graphs.precision]
    tower = plan.vision.tower if plan.vision else None
    # Components share nothing, whatever is tied in the model.
    sizes = weight_sizes(dims, tower, number_bytes=size, weights=weights, tied=False)
    case = _Case(plan, target, graphs, new_tokens, sizes, size, kv_bytes_per_element or size)
    nothing_dropped = (visual,) * len(schedule.cuts)
    full, pruned = (
        tuple(span_tokens(schedule, dims.layers, visual, kept))
        for kept in (nothing_dropped, plan.kept_visual_tokens)
    )
    return Estimate(
        target=target.name,
        graphs=graphs,
        new_tokens=new_tokens,
        memory_bytes=target.memory_bytes,
        available_bytes=target.memory_bytes - target.reserved_bytes,
        weight_bytes=sizes.computing,
        embedding_bytes=sizes.embedding,
        full=_figures(case, full),
        pruned=_figures(case, pruned),
        vision_counted=plan.vision is not None,
    )


_Spans: TypeAlias = tuple[tuple[range, int], ...]
"""The decoder's spans in order: layers, and the visual tokens they see."""


@dataclass(frozen=True)
class _Case:
    """A plan on a target; `size` and `kv_size` are bytes of one number in graphs and in caches."""

    plan: Plan
    target: Target
    graphs: Graphs
    new_tokens: int
    weights: WeightSizes
    size: int
    kv_size: int

    @property
    def peak(self) -> float:
        """FLOPs a second."""
        return self.target.peak_flops[self.graphs.precision.value]

    def lengths(self, spans: _Spans) -> Iterator[tuple[int, int]]:
        """Of every span: how many layers, and the prompt's tokens there."""
        for layers, visual in spans:
            yield len(layers), visual + self.plan.text_tokens


def _figures(case: _Case, spans: _Spans) -> Figures:
    kv = _CACHES_LIVE * _kv_bytes(case, spans, case.new_tokens)
    activations = _activations(case, spans)
    read = case.weights.layers * case.weights.layer + case.weights.lm_head
    read += _kv_bytes(case, spans, case.new_tokens // 2)
    vision, prefill = _vision(case), _prefill(case, spans)
    return Figures(
        kv_bytes=kv,
        activation_bytes=activations,
        total_bytes=case.weights.computing + kv + activations,
        vision_seconds=vision,
        prefill_seconds=prefill,
        first_token_seconds=vision + prefill,
        decode_seconds=read / _bandwidth(case.target),
    )


def _kv_bytes(case: _Case, spans: _Spans, new_tokens: int) -> int:
    """Caches of all layers, once."""
    dims = case.plan.dims
    positions = sum(layers * (length + new_tokens) for layers, length in case.lengths(spans))
    return 2 * dims.kv_heads * dims.head_dim * case.kv_size * positions


def _activations(case: _Case, spans: _Spans) -> int:
    """Working memory of encoder, spans and prune components, which are loaded together."""
    dims, plan = case.plan.dims, case.plan
    width = 3 * dims.hidden_size + 2 * (dims.heads + dims.kv_heads) * dims.head_dim + 3 * dims.ffn_size
    decoder = sum(
        length * width * case.size + _attention(length, dims.heads, case.graphs)
        for _, length in case.lengths(spans)
    )
    seen_before = {layers.stop: visual for layers, visual in spans}
    choosing = sum(
        _chooser_bytes(cut.chooser, seen_before.get(cut.layer, plan.visual_tokens), dims)
        for cut in plan.schedule.cuts
    )
    return decoder + choosing + _encoder_activations(case)


def _encoder_activations(case: _Case) -> int:
    """Of the largest picture: they are encoded one after the other, the tiles of one together."""
    vision = case.plan.vision
    if vision is None:
        return 0
    tower, call = vision.tower, vision.largest
    tile = tower.rows(call)
    states = call.tiles * tile * (7 * tower.hidden_size + 3 * tower.ffn_size) * case.size
    return states + call.tiles * _attention(tile, tower.heads, case.graphs)


def _chooser_bytes(chooser: Chooser, visual_tokens: int, dims: DecoderDims) -> int:
    """What a policy computes on the tokens that arrive, in float32."""
    numbers = 0
    if isinstance(chooser, TopK | Coverage) and chooser.scorer is not Scorer.NORM:
        numbers += dims.heads**2 * _SERIES_MATRICES
    if isinstance(chooser, MaxMin | Coverage):  # the states, and the same normalised
        numbers += 2 * dims.hidden_size
    return visual_tokens * numbers * _FLOAT32


def _attention(tokens: int, heads: int, graphs: Graphs) -> int:
    """The mask, and scores before and after softmax where the graph spells them out."""
    spelled_out = 2 * heads if graphs.dialect is Dialect.PORTABLE else 0
    return (1 + spelled_out) * tokens**2 * _FLOAT32


def _vision(case: _Case) -> float:
    """Roofline of the vision encoder: its weights are read once a call."""
    vision = case.plan.vision
    if vision is None:
        return 0.0
    weights = case.weights.vision // vision.tower.towers / _bandwidth(case.target)
    return sum(max(vision.tower.flops(call) / case.peak, weights) for call in vision.calls)


def _prefill(case: _Case, spans: _Spans) -> float:
    """Roofline of the spans, one after the other; lm_head reads the last position alone."""
    dims = case.plan.dims
    seconds = 0.0
    for number, (layers, tokens) in enumerate(case.lengths(spans)):
        last = number == len(spans) - 1
        flops = layers * layer_flops(dims, tokens) + (2 * table_parameters(dims) if last else 0)
        cache = 2 * dims.kv_heads * dims.head_dim * tokens * layers * case.kv_size
        moved = layers * case.weights.layer + (case.weights.lm_head if last else 0) + cache
        seconds += max(flops / case.peak, moved / _bandwidth(case.target))
    return seconds


def _bandwidth(target: Target) -> float:
    if target.bandwidth_bytes_per_second is None:
        raise AssertionError(f"{target.name} has no bandwidth")
    return target.bandwidth_bytes_per_second
