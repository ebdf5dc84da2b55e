"""From a checkpoint to a bundle of ONNX files, without loading the checkpoint.

    meta model -> recorded layer by layer into components -> files, manifest

Weights stay in the checkpoint's shards, which are linked below the bundle.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ep_export
from ep_export.bundle import (
    Bundle,
    Component,
    Dialect,
    Manifest,
    Precision,
    Role,
    StoredTable,
    WeightsMode,
    list_files,
    write_manifest,
)
from ep_export.errors import UserError
from ep_export.export.checks import refuse_unsupported
from ep_export.export.components import save_component
from ep_export.export.packing import BLOCKS_OPSET, linear_weights, pack, published_packing
from ep_export.export.policies import OPSETS, check_choosers, chooser_notes, save_policies
from ep_export.export.shards import Shards
from ep_export.numerics import Numerics, WeightKind
from ep_export.policy import DEFAULT_DEGREE, Chooser, Evidence, Keep, Schedule, Source, scored_source
from ep_export.progress import Progress, silent
from ep_export.weights.store import FILE

if TYPE_CHECKING:
    import torch

    from ep_export.checkpoint import Checkpoint
    from ep_export.export.graph_builder import GraphBuilder
    from ep_export.safetensors_index import TensorRef
    from ep_export.weights.packing import Packing
    from ep_export.weights.store import StoredLinear

__all__ = ["export_bundle"]

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir")
_STAGE = "export"


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    schedule: Schedule,
    evidence: Evidence,
    keep: Keep,
    dialect: Dialect = Dialect.PORTABLE,
    precision: Precision = Precision.FP32,
    weights: WeightsMode = WeightsMode.LINK,
    packing: Packing | None = None,
    degree: int = DEFAULT_DEGREE,
    policies: Sequence[Chooser] = (),
    progress: Progress = silent,
) -> Bundle:
    """Write a bundle.

    Args:
        checkpoint: What to export.
        out: An existing empty directory (see `ep_export.staging.staged`).
        schedule: Where and how tokens are pruned.
        evidence: What the schedule stands on, for the manifest.
        keep: Default amount kept, for the manifest; the runtime may override it.
        dialect: Operators.
        precision: Arithmetic type; where it differs from the checkpoint's, weights pass through Cast nodes.
        weights: Link or copy the shards; a link falls back to a copy across file systems, with a warning.
        packing: How the decoder's linear layers are quantised; None: they stay as they are.
        degree: Degree of the entropy series in prune components.
        policies: Further choosers that every cut gets a component of.
        progress: Told about stages.

    Raises:
        UserError: The model, schedule or a policy asks for what the graphs cannot express, or weights that
            must be copied do not fit on the disk.
    """
    refuse_unsupported(checkpoint, schedule, degree)
    choosers = {i: tuple(dict.fromkeys((cut.chooser, *policies))) for i, cut in enumerate(schedule.cuts)}
    check_choosers(schedule, choosers, checkpoint.dims)
    steps = 4
    if checkpoint.published is not None and packing is not None:
        raise UserError(
            f"{checkpoint.source} is quantized already, by {checkpoint.published.layout}",
            hint="leave out --weights: its layers are taken as they are",
        )
    rounded: tuple[str, ...] = ()
    linears = linear_weights(checkpoint)
    if checkpoint.published is not None:
        packing = published_packing(checkpoint, linears)
    elif packing is not None:
        rounded = linears.rounded(packing.weights)
    if dialect is Dialect.ONNXRUNTIME and packing and packing.weights.kind is WeightKind.FP8:
        raise UserError(
            "ONNX Runtime has no kernel for fp8 weights",
            hint="add --dialect modern or --dialect portable, for TensorRT",
        )
    opset = max(OPSETS[dialect], BLOCKS_OPSET if packing else 0)
    shards = Shards([ref for name, ref in checkpoint.tensors.items() if name not in rounded], out, weights)
    try:
        packed = {}
        if packing:
            file = shards.own(FILE)
            packed = pack(checkpoint, linears, packing, file, compute=precision.value, progress=progress)
            shards.add(file)
        progress(_STAGE, 0, steps)
        attended = frozenset(
            schedule.cuts[cut].layer
            for cut, here in choosers.items()
            if Source.ATTENTION in map(scored_source, here)
        )
        components = tuple(
            _components(checkpoint, shards, packed, out, schedule, attended, dialect, precision, opset)
        )
        progress(_STAGE, 1, steps)
        components += save_policies(
            out,
            schedule,
            choosers,
            dims=checkpoint.dims,
            dialect=dialect,
            precision=precision,
            degree=degree,
        )
        progress(_STAGE, 2, steps)
        _copy_processor(checkpoint, out)
        files = list_files(out, known=shards.checksums())
        progress(_STAGE, 3, steps)
    finally:
        shards.close()
    manifest = Manifest(
        model=checkpoint.origin,
        revision=checkpoint.revision,
        model_sha256=checkpoint.fingerprint,
        family=checkpoint.family.name,
        dims=checkpoint.dims,
        schedule=schedule,
        evidence=evidence,
        keep=keep,
        degree=degree,
        dialect=dialect,
        precision=precision,
        numerics=Numerics(precision.value, packing.weights if packing else None),
        opset=opset,
        weights=shards.mode,
        components=components,
        files=files,
        tools=_tools(),
        warnings=(
            *shards.warnings,
            *_notes(dialect, precision),
            *chooser_notes([chooser for here in choosers.values() for chooser in here], checkpoint.dims),
        ),
    )
    write_manifest(out, manifest)
    progress(_STAGE, steps, steps)
    return Bundle(out, manifest)


def _components(
    checkpoint: Checkpoint,
    shards: Shards,
    packed: Mapping[str, StoredLinear],
    out: Path,
    schedule: Schedule,
    attended: frozenset[int],
    dialect: Dialect,
    precision: Precision,
    opset: int,
) -> Iterator[Component]:
    """Write encoders, embeddings and spans; those that end at a layer of `attended` give attention out."""
    from ep_export.checkpoint import meta_model
    from ep_export.export.decoder import build_embed_tokens, build_span, check_decoder
    from ep_export.export.dialects import FORMS, write_norms
    from ep_export.export.fused_decoder import build_fused_span
    from ep_export.export.graph_builder import TORCH_DTYPES, GraphBuilder, Weights
    from ep_export.export.vision import build_vision
    from ep_export.families.attention import use_vision_forms

    dims, forms = checkpoint.dims, FORMS[dialect]
    # A model of this export's own, config included: its modules are changed.
    model = meta_model(copy.deepcopy(checkpoint.config)).to(TORCH_DTYPES[precision])
    write_norms(model, forms)
    stored = Weights(_parameter_names(model, checkpoint), checkpoint.tensors, shards.place, packed)
    modules = checkpoint.family.decoder(model)
    check_decoder(modules)

    def component(name: str, role: Role, build: Callable[[GraphBuilder], None], **place: Any) -> Component:
        graph = GraphBuilder(name, precision=precision, opset=opset, weights=stored)
        with use_vision_forms(forms.vision), _refusing(checkpoint):
            build(graph)
        return save_component(graph.model(), out, name, role, **place)

    for name, vision in checkpoint.family.encoders(model).items():
        yield component(name, Role.VISION, lambda graph: build_vision(graph, vision, dims))  # noqa: B023
    batch: int | str = "B" if dialect.fixed_caches else 1
    span: Callable[..., None] = build_fused_span
    if dialect is not Dialect.ONNXRUNTIME:
        span = partial(build_span, fixed_caches=dialect.fixed_caches)
    yield component(
        "embed_tokens",
        Role.EMBED,
        lambda graph: build_embed_tokens(graph, modules, dims, batch=batch),
        table=_table(checkpoint.tensors[stored.names[id(modules.embed_tokens.weight)]], shards),
    )
    for number, layers in enumerate(schedule.spans(dims.layers)):
        yield component(
            f"decoder_{number}",
            Role.DECODER,
            lambda graph: span(graph, modules, dims, layers, forms, attention=layers.stop in attended),  # noqa: B023
            layers=(layers.start, layers.stop),
        )


def _table(ref: TensorRef, shards: Shards) -> StoredTable:
    rows, width = ref.shape
    return StoredTable(shards.place(ref)[0], ref.offset, ref.dtype, (rows, width))


@contextmanager
def _refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """What a config asks for (an activation, say) may have no form here."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(
            f"{checkpoint.source} computes what is not exported: {error}",
            hint="`ep-export models` lists what is; check config.json",
        ) from error


def _parameter_names(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[int, str]:
    """Id of every parameter -> its name in the checkpoint.

    Tied tables that the checkpoint stores twice become two: so transformers reads it.
    """
    import torch

    names: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in checkpoint.tensors and name not in checkpoint.packed:
            continue
        own = parameter
        if id(parameter) in names:
            owner, _, leaf = name.rpartition(".")
            own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, own)
        names[id(own)] = name
    return names


def _copy_processor(checkpoint: Checkpoint, out: Path) -> None:
    (out / "processor").mkdir()
    for file in checkpoint.processor_files:
        shutil.copyfile(file.resolve(), out / "processor" / file.name)


def _notes(dialect: Dialect, precision: Precision) -> tuple[str, ...]:
    notes = []
    if precision is Precision.BF16:
        notes.append("bf16 graphs need TensorRT or a GPU: ONNX Runtime's CPU provider has no bf16 products")
    if dialect is Dialect.MODERN and precision is Precision.FP32:
        notes.append("fp32 Attention has no TensorRT-RTX kernel: use bf16 or fp16, or the portable dialect")
    return tuple(notes)


def _tools() -> dict[str, str]:
    tools = {"ep-export": ep_export.__version__}
    for package in _PACKAGES:
        try:
            tools[package] = version(package)
        except PackageNotFoundError:  # a vendored build without metadata
            tools[package] = "unknown"
    return tools
