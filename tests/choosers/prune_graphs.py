"""Prune components run with ONNX Runtime, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from ep_export.choosers import CutTokens
from ep_export.choosers.component import build_prune
from ep_export.dims import DecoderDims
from ep_export.policy import Chooser, Source, scored_source

DIMS = DecoderDims(
    layers=4,
    hidden_size=48,
    heads=6,
    kv_heads=3,
    head_dim=16,
    ffn_size=32,
    vocab_size=64,
    max_positions=512,
    position_axes=3,
)
HEADS = {Source.QUERY: DIMS.heads, Source.KEY: DIMS.kv_heads, Source.VALUE: DIMS.kv_heads}
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Prompt:
    """What arrives at a cut: hidden [S, d], states [S, heads, head_dim] or None, positions, visual index."""

    hidden: np.ndarray
    states: np.ndarray | None
    positions: np.ndarray
    visual_index: np.ndarray

    @property
    def tokens(self) -> CutTokens:
        visual = self.visual_index
        return CutTokens(
            torch.from_numpy(self.hidden[visual]),
            None if self.states is None else torch.from_numpy(self.states[visual]),
            torch.from_numpy(visual),
        )


def spread_states(count: int, heads: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """[count, heads, head_dim] float32, heads of different size and direction, so that entropies spread."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 3, (count, heads, 1))
    common = rng.standard_normal((count, 1, head_dim)) * rng.uniform(0, 4, (count, 1, 1))
    return (rng.standard_normal((count, heads, head_dim)) * scale + common).astype(np.float32)


def prompt(chooser: Chooser, visual_index: np.ndarray, length: int, *, seed: int = 0) -> Prompt:
    """A random prompt with the states that the chooser reads."""
    rng = np.random.default_rng(seed)
    hidden = spread_states(length, 1, DIMS.hidden_size, seed)[:, 0]
    states = None
    source = scored_source(chooser)
    if source is Source.HIDDEN:
        states = hidden.reshape(length, DIMS.heads, -1)
    elif source is Source.ATTENTION:
        states = rng.dirichlet(np.full(length, 0.5)).astype(np.float32)[:, None, None] * length
    elif source is not None:
        states = spread_states(length, HEADS[source], DIMS.head_dim, seed + 1)
    positions = np.sort(rng.integers(0, 999, (DIMS.position_axes, 1, length)), axis=2)
    return Prompt(hidden, states, positions, visual_index.astype(np.int64))


def session(
    chooser: Chooser,
    *,
    dtype: ir.DataType = FLOAT,
    opset: int = 20,
    degree: int = 512,
    dims: DecoderDims = DIMS,
) -> onnxruntime.InferenceSession:
    """The chooser's prune component, checked and opened."""
    model = build_prune(chooser, dims=dims, cut_layer=2, precision_dtype=dtype, degree=degree, opset=opset)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString())


def run(opened: onnxruntime.InferenceSession, at: Prompt, k: int) -> dict[str, np.ndarray]:
    """Outputs by name; states and hidden in the graph's type."""
    kinds = {entry.name: entry.type for entry in opened.get_inputs()}
    cast = {name: np.float16 if kind == "tensor(float16)" else np.float32 for name, kind in kinds.items()}
    feeds = {
        "hidden": at.hidden[None].astype(cast["hidden"]),
        "position_ids": at.positions,
        "visual_index": at.visual_index,
        "keep_slots": np.zeros(k, dtype=np.int64),
    }
    if "states" in kinds:
        feeds["states"] = at.states[None].astype(cast["states"])
    names = [entry.name for entry in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {name: feeds[name] for name in kinds}), strict=True))


def kept_positions(outputs: dict[str, np.ndarray]) -> torch.Tensor:
    """Positions of the visual tokens that stayed, in the sequence that arrived."""
    return torch.from_numpy(outputs["kept_index"][outputs["kept_visual_index"]])
