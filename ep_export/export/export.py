"""From a checkpoint to a bundle of ONNX files, without loading the checkpoint.

    meta model -> pieces (traced once each) -> components (stamped) -> files, manifest

Weights stay in the checkpoint's shards, which are linked below the bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import ep_export
from ep_export.bundle import (
    Bundle,
    Component,
    Dialect,
    Manifest,
    Precision,
    WeightsMode,
    list_files,
    write_manifest,
)
from ep_export.checkpoint import Checkpoint, meta_model
from ep_export.export.checks import refuse_unsupported
from ep_export.export.decoder import (
    DecoderPieces,
    Names,
    build_embed_tokens,
    build_head,
    build_tail,
    decoder_parts,
    name_weights,
)
from ep_export.export.dialects import OPSETS, tracing
from ep_export.export.shards import Shards
from ep_export.export.stamp import TORCH_DTYPES, GraphBuilder
from ep_export.export.trace import trace
from ep_export.export.vision import VisionPieces, build_vision, name_vision_weights, vision_parts
from ep_export.garbage import collector_paused
from ep_export.policy import DEFAULT_DEGREE, Evidence, Keep, Policy, Scorer, Source
from ep_export.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ep_export.families.base import VisionTrace

__all__ = ["export_bundle"]

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_STAGE = "export"


@dataclass(frozen=True)
class _Traced:
    """The traced decoder, and by component name the encoders: how they are cut, and their pieces."""

    decoder: DecoderPieces
    encoders: Mapping[str, tuple[VisionTrace, VisionPieces]]


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    policy: Policy,
    evidence: Evidence,
    keep: Keep,
    dialect: Dialect = Dialect.PORTABLE,
    precision: Precision = Precision.FP32,
    weights: WeightsMode = WeightsMode.LINK,
    degree: int = DEFAULT_DEGREE,
    progress: Progress = silent,
) -> Bundle:
    """Write a bundle.

    Args:
        checkpoint: What to export.
        out: An existing empty directory (see `ep_export.staging.staged`).
        policy: Where and how tokens are pruned.
        evidence: What the policy stands on, for the manifest.
        keep: Default amount kept, for the manifest; the runtime may override it.
        dialect: Operators.
        precision: Arithmetic type; where it differs from the checkpoint's, weights pass through Cast nodes.
        weights: Link or copy the shards; a link falls back to a copy across file systems, with a warning.
        degree: Degree of the entropy series in the EntropyPrune body.
        progress: Told about stages.

    Raises:
        UserError: The model or policy asks for what the graphs cannot express, or weights that must be copied
            do not fit on the disk.
    """
    refuse_unsupported(checkpoint, policy, degree)
    steps = 5
    progress(_STAGE, 0, steps)
    shards = Shards(checkpoint.tensors.values(), out, weights)
    try:
        opset = OPSETS[dialect]
        with collector_paused():
            traced = _trace(checkpoint, dialect, precision)
        progress(_STAGE, 2, steps)
        components = _build(checkpoint, traced, shards, out, policy, precision, opset, degree)
        progress(_STAGE, 3, steps)
        _copy_processor(checkpoint, out)
        files = list_files(out, known=shards.checksums())
        progress(_STAGE, 4, steps)
    finally:
        shards.close()
    manifest = Manifest(
        model=checkpoint.source,
        revision=checkpoint.revision,
        model_sha256=checkpoint.fingerprint,
        family=checkpoint.family.name,
        dims=checkpoint.dims,
        policy=policy,
        evidence=evidence,
        keep=keep,
        degree=degree,
        dialect=dialect,
        precision=precision,
        opset=opset,
        weights=shards.mode,
        components=components,
        files=files,
        tools=_tools(),
        warnings=(*shards.warnings, *_notes(checkpoint, policy, dialect, precision)),
    )
    write_manifest(out, manifest)
    progress(_STAGE, steps, steps)
    return Bundle(out, manifest)


def _trace(checkpoint: Checkpoint, dialect: Dialect, precision: Precision) -> _Traced:
    dtype, opset = TORCH_DTYPES[precision], OPSETS[dialect]
    model = meta_model(checkpoint.config).to(dtype)
    names = _parameter_names(model, checkpoint)
    modules, encoders = checkpoint.family.decoder(model), _encoders(model, checkpoint)
    decoder = decoder_parts(modules, checkpoint.dims, dtype=dtype, opset=opset)
    cut = {name: vision_parts(encoder) for name, encoder in encoders.items()}
    with tracing(dialect, model):
        pieces = iter(trace([*decoder, *(part for parts in cut.values() for part in parts)], opset=opset))
    return _Traced(
        name_weights(modules, list(islice(pieces, len(decoder))), names),
        {
            name: (encoder, name_vision_weights(encoder, list(islice(pieces, len(cut[name]))), names))
            for name, encoder in encoders.items()
        },
    )


def _encoders(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, VisionTrace]:
    """By component name: what encodes pictures, and what encodes videos where that is another tower."""
    video = checkpoint.family.video(model)
    encoders = {"vision_encoder": checkpoint.family.vision(model)}
    return encoders if video is None else {**encoders, "video_encoder": video}


def _parameter_names(model: torch.nn.Module, checkpoint: Checkpoint) -> Names:
    """The names the checkpoint has for every parameter, more than one when it is tied and stored twice."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in checkpoint.tensors:
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def _build(
    checkpoint: Checkpoint,
    traced: _Traced,
    shards: Shards,
    out: Path,
    policy: Policy,
    precision: Precision,
    opset: int,
    degree: int,
) -> tuple[Component, ...]:
    dims = checkpoint.dims

    def builder(name: str) -> GraphBuilder:
        return GraphBuilder(
            name, precision=precision, opset=opset, tensors=checkpoint.tensors, place=shards.place
        )

    encoders = {name: builder(name) for name in traced.encoders}
    for name, (encoder, pieces) in traced.encoders.items():
        build_vision(encoders[name], pieces, encoder, dims)
    embed, head, tail = map(builder, ("embed_tokens", "decoder_head", "decoder_tail"))
    build_embed_tokens(embed, traced.decoder, dims)
    build_head(head, traced.decoder, dims, policy, degree)
    build_tail(tail, traced.decoder, dims, policy)
    return tuple(component.save(out) for component in (*encoders.values(), embed, head, tail))


def _copy_processor(checkpoint: Checkpoint, out: Path) -> None:
    (out / "processor").mkdir()
    for file in checkpoint.processor_files:
        shutil.copyfile(file.resolve(), out / "processor" / file.name)


def _notes(checkpoint: Checkpoint, policy: Policy, dialect: Dialect, precision: Precision) -> tuple[str, ...]:
    notes = []
    if precision is Precision.BF16:
        notes.append("bf16 graphs need TensorRT or a GPU: ONNX Runtime's CPU provider has no bf16 products")
    if dialect is Dialect.MODERN and precision is Precision.FP32:
        notes.append("fp32 Attention has no TensorRT-RTX kernel: use bf16 or fp16, or the portable dialect")
    heads = checkpoint.dims.kv_heads if policy.source in (Source.KEY, Source.VALUE) else checkpoint.dims.heads
    if heads <= 2 and policy.scorer in (Scorer.PAPER, Scorer.ORDER2):
        # Two centred rows are opposite: normalised, they are the same rank-one matrix for every token.
        notes.append(f"every token scores the same: {policy.source.value} states have only {heads} heads")
    return tuple(notes)


def _tools() -> dict[str, str]:
    tools = {"ep-export": ep_export.__version__}
    for package in _PACKAGES:
        try:
            tools[package] = version(package)
        except PackageNotFoundError:  # a vendored build without metadata
            tools[package] = "unknown"
    return tools
