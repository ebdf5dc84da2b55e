"""Will it fit, and how fast could it be: a plan beside a device's memory, bandwidth and peak arithmetic.

A plan and a target enter, an `Estimate` leaves. Everything is a formula over the config's numbers and the
target's published figures; nothing is measured, and `FORMULAS` says how each figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.bundle import Dialect, Precision
from ep_export.numerics import WeightKind, Weights
from ep_export.plan import Plan, layer_flops, span_tokens
from ep_export.policy import MaxMin, Scorer, TopK
from ep_export.targets import Graphs, Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.dims import DecoderDims
    from ep_export.policy import Chooser

__all__ = ["FORMULAS", "Estimate", "Figures", "VisionSize", "estimate", "vision_size"]

FORMULAS: Mapping[str, str] = {
    "weights": "parameters of decoder layers, vision encoder, embedding table and lm_head x bytes of each; "
    "quantised layers take their bits and a scale a group, lm_head 8 bits then; "
    "the last two lie in an engine each, so a tied table is there twice",
    "KV cache": "2 (a step's caches go in and come out) x 2 x KV heads x head_dim x bytes, for every layer "
    "and token of prompt and answer",
    "activations": "tokens x (3 d + 2 (H + KV heads) head_dim + 3 m) x bytes, for the encoder and every span "
    "of layers, plus masks, what policies compute and, in the portable dialect, attention weights; fused "
    "kernels need less",
    "prefill": "span by span: max(FLOPs / peak FLOPs, (weights + cache) / bandwidth); a lower bound",
    "decode": "(weights + cache half-way through the answer) / bandwidth; a lower bound",
}
"""How each figure is made, for people and for scripts."""

_BITS = {WeightKind.INT4: 4, WeightKind.INT8: 8, WeightKind.FP8: 8}
_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}
_FLOAT32 = 4
_CACHES_LIVE = 2
# Matrices of [H, H] a token for the entropy series of degree 512 if nothing were freed: 8 squares and what
# stands around them. A bound: runtimes free most of them on the way.
_SERIES_MATRICES = 12


@dataclass(frozen=True)
class VisionSize:
    """What the vision encoder adds; zeros where its config has other names than those known.

    Attributes:
        parameters: Of blocks, patch embedding and projector; norms and biases are left out.
        hidden_size: Width.
        heads: Attention heads.
        ffn_size: Feed-forward width.
        patches_per_token: Patches that become one visual token.
    """

    parameters: int
    hidden_size: int
    heads: int
    ffn_size: int
    patches_per_token: int


@dataclass(frozen=True)
class Figures:
    """Of the full or of the pruned model.

    Attributes:
        kv_bytes: Caches at the end of the answer.
        activation_bytes: Working memory of the engines in prefill.
        total_bytes: Both and the weights.
        prefill_seconds: Of the decoder.
        decode_seconds: Of the decoder, a token.
    """

    kv_bytes: int
    activation_bytes: int
    total_bytes: int
    prefill_seconds: float
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
        weight_bytes: Of all engines.
        full: Without pruning.
        pruned: With it.
        vision_counted: Whether the encoder's size is in the config.
    """

    target: str
    graphs: Graphs
    new_tokens: int
    memory_bytes: int
    available_bytes: int
    weight_bytes: int
    full: Figures
    pruned: Figures
    vision_counted: bool

    def fits(self, figures: Figures) -> bool:
        """Whether `full` or `pruned` fits into what is left for engines."""
        return figures.total_bytes <= self.available_bytes


def vision_size(config: PreTrainedConfig) -> VisionSize:
    """The encoder's numbers from the `vision_config` of a checkpoint."""
    vision: Any = getattr(config, "vision_config", None)
    # Qwen2-VL calls its width embed_dim and means the decoder's by hidden_size.
    hidden = _first(vision, "embed_dim", "hidden_size")
    depth = _first(vision, "depth", "num_hidden_layers")
    heads = _first(vision, "num_heads", "num_attention_heads")
    ffn = _first(vision, "intermediate_size") or int(hidden * float(getattr(vision, "mlp_ratio", 0) or 0))
    if not (hidden and depth and heads and ffn):
        return VisionSize(0, 0, 0, 0, 1)
    # Qwen merges squares of patches in a network of its own, SmolVLM in one matrix.
    side = _first(vision, "spatial_merge_size") or _first(config, "scale_factor") or 1
    merged, shuffled = side**2, hasattr(config, "scale_factor")
    patch = _first(vision, "patch_size") ** 2 * 3 * (_first(vision, "temporal_patch_size") or 1)
    out = config.get_text_config().hidden_size
    projector = merged * hidden * out
    if not shuffled:
        projector += (merged * hidden) ** 2 if merged > 1 else out**2
    # Of the towers here, those with SiLU have a gate, and no other has.
    feed_forward = (3 if getattr(vision, "hidden_act", "") == "silu" else 2) * hidden * ffn
    blocks = depth * (4 * hidden**2 + feed_forward)
    return VisionSize(blocks + hidden * patch + projector, hidden, heads, ffn, merged)


def estimate(
    plan: Plan,
    target: Target,
    vision: VisionSize,
    *,
    new_tokens: int,
    graphs: Graphs | None = None,
    weights: Weights | None = None,
) -> Estimate | None:
    """Memory and roofline of a plan on a target.

    Args:
        plan: Budgets of one prompt.
        target: The device.
        vision: From `vision_size`.
        new_tokens: Length of the answer.
        graphs: Dialect and precision; the target's best when None.
        weights: What the decoder's linear layers are stored in; None: in the graphs' precision.

    Returns:
        None for a target without published figures (cpu).
    """
    if target.memory_bytes is None or target.bandwidth_bytes_per_second is None:
        return None
    graphs = graphs or target.graphs[0]
    dims, schedule, visual = plan.dims, plan.schedule, plan.visual_tokens
    case = _Case(plan, target, vision, graphs, new_tokens, weights)
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
        weight_bytes=case.weight_bytes,
        full=_figures(case, full),
        pruned=_figures(case, pruned),
        vision_counted=bool(vision.parameters),
    )


_Spans: TypeAlias = tuple[tuple[range, int], ...]
"""The decoder's spans in order: layers, and the visual tokens they see."""


@dataclass(frozen=True)
class _Case:
    plan: Plan
    target: Target
    vision: VisionSize
    graphs: Graphs
    new_tokens: int
    weights: Weights | None

    @property
    def size(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.graphs.precision]

    @property
    def layer_bytes(self) -> int:
        """Weights of one decoder layer, scales included."""
        parameters = _layer_parameters(self.plan.dims)
        if self.weights is None:
            return self.size * parameters
        scales = parameters * self.size // self.weights.group if self.weights.group else 0
        return parameters * _BITS[self.weights.kind] // 8 + scales

    @property
    def lm_head_bytes(self) -> int:
        """In 8 bits beside integer weights."""
        eight = self.weights is not None and self.weights.kind is not WeightKind.FP8
        return _table(self.plan.dims) * (1 if eight else self.size)

    @property
    def weight_bytes(self) -> int:
        """Of all components; embedding table and vision encoder are in the graphs' precision."""
        dims = self.plan.dims
        rest = self.size * (_table(dims) + self.vision.parameters)
        return dims.layers * self.layer_bytes + self.lm_head_bytes + rest

    def lengths(self, spans: _Spans) -> Iterator[tuple[int, int]]:
        """Of every span: how many layers, and the prompt's tokens there."""
        for layers, visual in spans:
            yield len(layers), visual + self.plan.text_tokens


def _figures(case: _Case, spans: _Spans) -> Figures:
    dims = case.plan.dims
    kv = _CACHES_LIVE * _kv_bytes(case, spans, case.new_tokens)
    activations = _activations(case, spans)
    read = dims.layers * case.layer_bytes + case.lm_head_bytes
    read += _kv_bytes(case, spans, case.new_tokens // 2)
    return Figures(
        kv_bytes=kv,
        activation_bytes=activations,
        total_bytes=case.weight_bytes + kv + activations,
        prefill_seconds=_prefill(case, spans),
        decode_seconds=read / _bandwidth(case.target),
    )


def _first(config: Any, *names: str) -> int:
    """The first of these fields that is there, else 0."""
    values = (getattr(config, name, None) for name in names)
    return int(next((value for value in values if isinstance(value, int)), 0))


def _layer_parameters(dims: DecoderDims) -> int:
    """Matrices of one decoder layer; norms and biases are thousandths of them."""
    attention = 2 * dims.hidden_size * dims.head_dim * (dims.heads + dims.kv_heads)
    return attention + 3 * dims.hidden_size * dims.ffn_size


def _table(dims: DecoderDims) -> int:
    """Parameters of the embedding table, and of lm_head."""
    return dims.vocab_size * dims.hidden_size


def _kv_bytes(case: _Case, spans: _Spans, new_tokens: int) -> int:
    """Caches of all layers, once."""
    dims = case.plan.dims
    positions = sum(layers * (length + new_tokens) for layers, length in case.lengths(spans))
    return 2 * dims.kv_heads * dims.head_dim * case.size * positions


def _activations(case: _Case, spans: _Spans) -> int:
    """Working memory of encoder, spans and prune components, which are loaded together."""
    dims, vision, plan = case.plan.dims, case.vision, case.plan
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
    patches = plan.visual_tokens * vision.patches_per_token
    encoder = patches * (7 * vision.hidden_size + 3 * vision.ffn_size) * case.size
    return decoder + choosing + encoder + _attention(patches, vision.heads, case.graphs)


def _chooser_bytes(chooser: Chooser, visual_tokens: int, dims: DecoderDims) -> int:
    """What a policy computes on the tokens that arrive, in float32."""
    if isinstance(chooser, TopK) and chooser.scorer is not Scorer.NORM:
        return visual_tokens * dims.heads**2 * _SERIES_MATRICES * _FLOAT32
    if isinstance(chooser, MaxMin):  # the states, and the same normalised
        return 2 * visual_tokens * dims.hidden_size * _FLOAT32
    return 0


def _attention(tokens: int, heads: int, graphs: Graphs) -> int:
    """The mask, and scores before and after softmax where the graph spells them out."""
    spelled_out = 2 * heads if graphs.dialect is Dialect.PORTABLE else 0
    return (1 + spelled_out) * tokens**2 * _FLOAT32 if heads else 0


def _prefill(case: _Case, spans: _Spans) -> float:
    """Roofline of the spans, one after the other; lm_head reads the last position alone."""
    dims = case.plan.dims
    peak = case.target.peak_flops[case.graphs.precision.value]
    seconds = 0.0
    for number, (layers, tokens) in enumerate(case.lengths(spans)):
        last = number == len(spans) - 1
        flops = layers * layer_flops(dims, tokens) + (2 * _table(dims) if last else 0)
        cache = 2 * dims.kv_heads * dims.head_dim * tokens * layers * case.size
        moved = layers * case.layer_bytes + (case.lm_head_bytes if last else 0) + cache
        seconds += max(flops / peak, moved / _bandwidth(case.target))
    return seconds


def _bandwidth(target: Target) -> float:
    if target.bandwidth_bytes_per_second is None:
        raise AssertionError(f"{target.name} has no bandwidth")
    return target.bandwidth_bytes_per_second
