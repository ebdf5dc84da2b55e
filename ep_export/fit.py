"""Will it fit, and how fast could it be: a plan beside a device's memory, bandwidth and peak arithmetic.

A plan and a target enter, an `Estimate` leaves. Everything is a formula over the config's numbers and the
target's published figures; nothing is measured, and `FORMULAS` says how each figure is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep_export.bundle import Dialect, Precision
from ep_export.plan import Plan, layer_flops
from ep_export.targets import Graphs, Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ep_export.dims import DecoderDims

__all__ = ["FORMULAS", "Estimate", "Figures", "VisionSize", "estimate", "vision_size"]

FORMULAS: Mapping[str, str] = {
    "weights": "parameters of decoder layers, embedding table, lm_head and vision encoder x bytes of each",
    "KV cache": "2 (a step's caches go in and come out) x 2 x KV heads x head_dim x bytes, for every layer "
    "and token of prompt and answer",
    "activations": "tokens x (3 d + 2 (H + KV heads) head_dim + 3 m) x bytes, for encoder, head and tail, "
    "plus masks, score matrices and, in the portable dialect, attention weights; fused kernels need less",
    "prefill": "head, then tail: max(FLOPs / peak FLOPs, (weights + cache) / bandwidth); a lower bound",
    "decode": "(weights + cache half-way through the answer) / bandwidth; a lower bound",
}
"""How each figure is made, for people and for scripts."""

_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}
_FLOAT32 = 4
_CACHES_LIVE = 2
# Matrices of [H, H] a token that the entropy series of degree 512 keeps: 9 squares, the Gram, base and sum.
_SERIES_MATRICES = 12


@dataclass(frozen=True)
class VisionSize:
    """What the vision encoder adds; zeros where its config has other names than those known.

    Attributes:
        parameters: Of blocks, patch embedding and projector, rounded up (gated feed-forward).
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
        vision_counted: Whether the encoder's size was found in the config.
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
    merged = (_first(vision, "spatial_merge_size") or 1) ** 2
    patch = _first(vision, "patch_size") ** 2 * 3 * (_first(vision, "temporal_patch_size") or 1)
    out = config.get_text_config().hidden_size
    projector = (merged * hidden) ** 2 + merged * hidden * out + (out**2 if merged == 1 else 0)
    blocks = depth * (4 * hidden**2 + 3 * hidden * ffn)
    return VisionSize(blocks + hidden * patch + projector, hidden, heads, ffn, merged)


def estimate(
    plan: Plan,
    target: Target,
    vision: VisionSize,
    *,
    new_tokens: int,
    graphs: Graphs | None = None,
) -> Estimate | None:
    """Memory and roofline of a plan on a target.

    Args:
        plan: Budgets of one prompt.
        target: The device.
        vision: From `vision_size`.
        new_tokens: Length of the answer.
        graphs: Dialect and precision; the target's best when None.

    Returns:
        None for a target without published figures (cpu).
    """
    if target.memory_bytes is None or target.bandwidth_bytes_per_second is None:
        return None
    graphs = graphs or target.graphs[0]
    prompt, kept = plan.visual_tokens + plan.text_tokens, plan.kept_visual_tokens + plan.text_tokens
    parameters = plan.dims.layers * _layer_parameters(plan.dims) + 2 * _table(plan.dims) + vision.parameters
    case = _Case(plan, target, vision, graphs, new_tokens, weight_bytes=_BYTES[graphs.precision] * parameters)
    return Estimate(
        target=target.name,
        graphs=graphs,
        new_tokens=new_tokens,
        memory_bytes=target.memory_bytes,
        available_bytes=target.memory_bytes - target.reserved_bytes,
        weight_bytes=case.weight_bytes,
        full=_figures(case, (prompt, prompt)),
        pruned=_figures(case, (prompt, kept)),
        vision_counted=bool(vision.parameters),
    )


@dataclass(frozen=True)
class _Case:
    plan: Plan
    target: Target
    vision: VisionSize
    graphs: Graphs
    new_tokens: int
    weight_bytes: int

    @property
    def size(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.graphs.precision]


def _figures(case: _Case, lengths: tuple[int, int]) -> Figures:
    """For a prompt of so many tokens in head and tail."""
    dims = case.plan.dims
    kv = _CACHES_LIVE * _kv_bytes(case, lengths, case.new_tokens)
    activations = _activations(case, lengths)
    read = case.size * (dims.layers * _layer_parameters(dims) + _table(dims))
    read += _kv_bytes(case, lengths, case.new_tokens // 2)
    return Figures(
        kv_bytes=kv,
        activation_bytes=activations,
        total_bytes=case.weight_bytes + kv + activations,
        prefill_seconds=_prefill(case, lengths),
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


def _kv_bytes(case: _Case, lengths: tuple[int, int], new_tokens: int) -> int:
    """Caches of head and tail, once."""
    dims, before = case.plan.dims, case.plan.policy.layer
    head, tail = (length + new_tokens for length in lengths)
    positions = before * head + (dims.layers - before) * tail
    return 2 * dims.kv_heads * dims.head_dim * case.size * positions


def _activations(case: _Case, lengths: tuple[int, int]) -> int:
    """Working memory of encoder, head and tail, which are loaded together."""
    dims, vision, visual_tokens = case.plan.dims, case.vision, case.plan.visual_tokens
    width = 3 * dims.hidden_size + 2 * (dims.heads + dims.kv_heads) * dims.head_dim + 3 * dims.ffn_size
    decoder = sum(n * width * case.size + _attention(n, dims.heads, case.graphs) for n in lengths)
    series = visual_tokens * dims.heads**2 * _FLOAT32 * _SERIES_MATRICES
    patches = visual_tokens * vision.patches_per_token
    encoder = patches * (7 * vision.hidden_size + 3 * vision.ffn_size) * case.size
    return decoder + series + encoder + _attention(patches, vision.heads, case.graphs)


def _attention(tokens: int, heads: int, graphs: Graphs) -> int:
    """The mask, and scores before and after softmax where the graph spells them out."""
    spelled_out = 2 * heads if graphs.dialect is Dialect.PORTABLE else 0
    return (1 + spelled_out) * tokens**2 * _FLOAT32 if heads else 0


def _prefill(case: _Case, lengths: tuple[int, int]) -> float:
    """Roofline of head and tail, one after the other; lm_head reads the last position alone."""
    dims, before = case.plan.dims, case.plan.policy.layer
    peak = case.target.peak_flops[case.graphs.precision.value]
    seconds = 0.0
    parts = ((before, lengths[0], 0), (dims.layers - before, lengths[1], _table(dims)))
    for layers, tokens, lm_head in parts:
        flops = layers * layer_flops(dims, tokens) + 2 * lm_head
        cache = 2 * dims.kv_heads * dims.head_dim * tokens * layers
        moved = case.size * (layers * _layer_parameters(dims) + lm_head + cache)
        seconds += max(flops / peak, moved / _bandwidth(case.target))
    return seconds


def _bandwidth(target: Target) -> float:
    if target.bandwidth_bytes_per_second is None:
        raise AssertionError(f"{target.name} has no bandwidth")
    return target.bandwidth_bytes_per_second
