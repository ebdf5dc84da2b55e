"""Spans and prune components in ONNX Runtime against Hugging Face's own modules, for every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from bundles import two_cuts
from conftest import MAKERS
from export_helpers import LENGTH, VISUAL, BundleRun, TorchDecoder, hugging_face, random_prompt

from ep_export.bundle import Bundle, Dialect, Role
from ep_export.checkpoint import meta_model, open_checkpoint
from ep_export.errors import UserError
from ep_export.export.decoder import check_decoder
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Coverage, Cut, MaxMin, Nothing, Schedule, Scorer, Source, TopK, scored_source
from ep_export.weights.packing import nearest

SCHEDULES = {
    "one cut": Schedule((Cut(1, TopK(Scorer.NORM, source=Source.ATTENTION)),)),
    "two cuts": two_cuts(1, 2, TopK(source=Source.KEY), Coverage(Scorer.NORM, source=Source.ATTENTION)),
    "cut at layer 0, nothing left": two_cuts(0, 2, MaxMin(), Nothing(), shares=(0.5, 0.0)),
}
KEEP = {"one cut": (7,), "two cuts": (9, 4), "cut at layer 0, nothing left": (8, 0)}
# Both sides compute in float32 with another order of operations; 3e-6 was seen.
TOLERANCE = 1e-4


@pytest.mark.parametrize("cuts", SCHEDULES)
@pytest.mark.parametrize("dialect", list(Dialect), ids=lambda d: d.value)
@pytest.mark.parametrize("name", MAKERS)
def test_pruned_prefill_and_decode_equal_hugging_face(
    name: str,
    dialect: Dialect,
    cuts: str,
    bundle_of: Callable[..., Bundle],
    reference_of: Callable[[str, str], TorchDecoder],
) -> None:
    bundle = bundle_of(name, schedule=SCHEDULES[cuts], dialect=dialect)
    dims = bundle.manifest.dims
    run, reference = BundleRun(bundle), reference_of(name, bundle.manifest.family)
    embeds, positions = random_prompt(dims.hidden_size, dims.position_axes)
    got = run.prefill(embeds, positions, KEEP[cuts])
    layers = [cut.layer for cut in bundle.manifest.schedule.cuts]
    rows = dict(zip(layers, [prune["kept_index"] for prune in got.prunes], strict=True))
    assert [len(kept) for kept in rows.values()] == [LENGTH - len(VISUAL) + keep for keep in KEEP[cuts]]
    expected = reference(torch.from_numpy(embeds), torch.from_numpy(positions), rows)

    np.testing.assert_allclose(got.logits, expected.logits, atol=TOLERANCE)
    for span, component in zip(got.spans, bundle.manifest.spans, strict=True):
        after = component.layer_range.stop
        if after == dims.layers:
            break
        np.testing.assert_allclose(span["hidden_states"], expected.entering[after], atol=TOLERANCE)
        names = ("query_states", "key_states", "value_states")
        for states, projected in zip(names, expected.projections[after - 1], strict=True):
            np.testing.assert_allclose(
                span[states], projected.unflatten(-1, (-1, dims.head_dim)), atol=TOLERANCE
            )
        chooser = next(cut.chooser for cut in bundle.manifest.schedule.cuts if cut.layer == after)
        assert ("attention_states" in span) == (scored_source(chooser) is Source.ATTENTION)
        if "attention_states" in span:
            length = span["hidden_states"].shape[1]
            query = expected.projections[after - 1][0][0, -1].unflatten(-1, (-1, dims.head_dim))
            tables = reference.modules.rotary(query, torch.full((dims.position_axes, 1, 1), LENGTH - 1)[0])
            keys = expected.cache.layers[after - 1].keys[0]
            np.testing.assert_allclose(
                span["attention_states"], attention_by_hand(query, tables, keys, length), rtol=1e-3
            )
    for i, layer in enumerate(expected.cache.layers):
        np.testing.assert_allclose(run.caches[f"{i}.key"], layer.keys, atol=TOLERANCE)
        np.testing.assert_allclose(run.caches[f"{i}.value"], layer.values, atol=TOLERANCE)

    step = np.random.default_rng(1).standard_normal((1, 1, dims.hidden_size)).astype(np.float32)
    after_step = reference(
        torch.from_numpy(step), torch.full((dims.position_axes, 1, 1), 40), {}, expected.cache
    )
    np.testing.assert_allclose(run.step(step, 40), after_step.logits, atol=TOLERANCE)


def attention_by_hand(
    query: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, length: int
) -> np.ndarray:
    """FastV as published: what the last token attends to, mean over heads; times the number of positions.

    Args:
        query: [H, D], the last position's before rotary embedding.
        tables: cos and sin of its position.
        keys: [KVH, T, D] after rotary embedding, as Hugging Face's cache holds them.
        length: T.
    """
    cos, sin = (table.double().numpy().reshape(-1) for table in tables)
    q, k = query.double().numpy(), keys.double().numpy()
    half = q.shape[1] // 2
    turned = q * cos + np.concatenate([-q[:, half:], q[:, :half]], axis=1) * sin
    received = np.zeros(length)
    for head, row in enumerate(turned):
        scores = np.exp(k[head * len(k) // len(q)] @ row / np.sqrt(q.shape[1]))
        received += scores / scores.sum() / len(q)
    return (length * received)[None, :, None, None]


@pytest.fixture(scope="module")
def reference_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str, str], TorchDecoder]:
    models: dict[str, TorchDecoder] = {}

    def get(name: str, family: str) -> TorchDecoder:
        if name not in models:
            models[name] = TorchDecoder(hugging_face(checkpoint_of(name)), family)
        return models[name]

    return get


def test_spans_alone_are_the_unpruned_model(
    bundle_of: Callable[..., Bundle], checkpoint_of: Callable[[str], Path]
) -> None:
    """A prompt without pictures, and the same through another schedule's spans."""
    model = hugging_face(checkpoint_of("qwen2_5_vl"))
    embeds, positions = random_prompt(96)
    hidden = model.model.language_model(
        inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)
    ).last_hidden_state
    expected = model.lm_head(hidden[:, -1:])
    for cuts in SCHEDULES.values():
        run = BundleRun(bundle_of("qwen2_5_vl", schedule=cuts))
        run.stages = run.manifest.spans
        got = run.prefill(embeds, positions, ())
        np.testing.assert_allclose(got.logits, expected, atol=TOLERANCE)


def test_spans_hold_nothing_of_pruning(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("qwen2_5_vl", schedule=SCHEDULES["two cuts"])
    for span in bundle.manifest.with_role(Role.DECODER):
        model = ir.load(bundle.file(span.file))
        assert not model.functions
        assert {node.domain for node in model.graph} == {""}
        assert {"visual_index", "keep_slots"}.isdisjoint(spec.name for spec in span.inputs)


def test_the_same_layers_are_the_same_graph_in_every_schedule(bundle_of: Callable[..., Bundle]) -> None:
    """Layer 2 stands in the last span of each; what it does and reads is the same."""

    def layer(bundle: Bundle) -> list[tuple[str, tuple[str | None, ...]]]:
        model = ir.load(bundle.file(bundle.manifest.spans[-1].file))
        return [
            (node.op_type, tuple(v.name for v in node.inputs if v is not None and v.is_initializer()))
            for node in model.graph
            if node.name and node.name.startswith("layers.2/")
        ]

    first, *others = [layer(bundle_of("qwen2_5_vl", schedule=cuts)) for cuts in SCHEDULES.values()]
    named = [(op, tuple(n for n in names if n and "layers" in n)) for op, names in first]
    assert len(first) > 20
    for other in others:
        assert [(op, tuple(n for n in names if n and "layers" in n)) for op, names in other] == named


def test_onnx_runtime_fuses_every_norm(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    """A fusion that is missed is silent, and costs a decode step five kernels a norm."""
    bundle = bundle_of("qwen2_5_vl")
    used = optimised(bundle.file("decoder_1.onnx"), tmp_path / "optimized.onnx")
    assert used["SimplifiedLayerNormalization"] == 2 * 2 + 1
    assert "ReduceMean" not in used


def test_onnx_runtime_computes_its_own_dialect_in_few_kernels(
    bundle_of: Callable[..., Bundle], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Attention with its caches, a sum with its norm, and a quantised product are one kernel each."""
    tensors = open_checkpoint(str(checkpoint_of("llava"))).tensors
    int4 = nearest(tensors, Weights(WeightKind.INT4, 32, "nearest"), compute="fp32")
    for packing in (None, int4):
        bundle = bundle_of("llava", dialect=Dialect.ONNXRUNTIME, packing=packing)
        used = Counter[str]()
        for span in bundle.manifest.spans:
            used += optimised(bundle.file(span.file), tmp_path / span.file)
        layers, spans = bundle.manifest.dims.layers, len(bundle.manifest.spans)
        assert used["GroupQueryAttention"] == layers
        assert used["SkipSimplifiedLayerNormalization"] == 2 * layers - spans + 1  # and the final norm
        assert used["RotaryEmbedding"] == 2 * layers
        assert used["MatMulNBits" if packing else "FusedMatMul"] == 7 * layers + 1
        assert not {"DequantizeLinear", "Gemm", "Transpose", "Softmax", "ReduceMean"} & set(used)
        # what splits the states of the last layer into heads, and the tables of positions
        assert used["Reshape"] <= (3 + 1) * spans


def optimised(graph: Path, out: Path) -> Counter[str]:
    """Operators of a graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(graph), options)
    return Counter(node.op_type for node in onnx.load(out, load_external_data=False).graph.node)


def test_layers_read_their_own_weights(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("qwen2_5_vl, deep", schedule=Schedule((Cut(4),)))
    for span in bundle.manifest.spans:
        graph = ir.load(bundle.file(span.file)).graph
        gemms = [node.inputs[1].name for node in graph if node.op_type == "Gemm"]
        layers = {weight.split(".")[3] for weight in gemms if ".layers." in weight}
        assert layers == {str(i) for i in span.layer_range}
        last = span.layer_range.stop == 9
        assert len(gemms) == len(set(gemms)) == 7 * len(span.layer_range) + last


def test_layers_of_another_kind_are_refused(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of("llava")))
    modules = checkpoint.family.decoder(meta_model(checkpoint.config))
    modules.layers[1].self_attn.q_norm = torch.nn.LayerNorm(4)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer differs from Llama's in q_norm"):
        check_decoder(modules)
    scaled = replace(modules, embed_tokens=torch.nn.Sequential())
    with pytest.raises(UserError, match="embedding module Sequential is not exported"):
        check_decoder(scaled)
