"""What an export writes: files, interfaces, operators, weights left where they are, refusals."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import export_tiny, two_cuts
from conftest import MAKERS
from export_helpers import BundleRun, random_prompt
from published_graphs import stored_rows

from ep_export.bundle import Bundle, Dialect, Precision, Role, WeightsMode, hash_file
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.export import export_bundle
from ep_export.policy import (
    Chooser,
    Cut,
    Evidence,
    EvidenceKind,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Source,
    TopK,
)

# Operators TensorRT 10.3 and ONNX Runtime both have for our types; Gelu is opset 20's.
PORTABLE = {
    "Add", "Cast", "Clip", "Concat", "Cos", "Div", "Equal", "Expand", "Gather", "Gelu", "Gemm",
    "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul", "Mul", "Neg", "Pow", "Range", "ReduceMean",
    "ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
MODERN = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
FUSED = {"FusedMatMul", "GroupQueryAttention", "MultiHeadAttention", "SkipSimplifiedLayerNormalization"}


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of("qwen2_5_vl")


def graphs(bundle: Bundle, *roles: Role) -> dict[str, ir.Model]:
    """Models of the components, those of pruning only where asked for."""
    wanted = roles or tuple(set(Role) - {Role.PRUNE})
    return {c.name: ir.load(bundle.file(c.file)) for c in bundle.manifest.components if c.role in wanted}


def test_bundle_opens_and_every_file_matches_its_checksum(bundle: Bundle) -> None:
    manifest = Bundle.open(bundle.path).manifest
    components = ["vision_encoder", "embed_tokens", "decoder_0", "decoder_1", "prune_0.paper-highest"]
    assert [component.name for component in manifest.components] == components
    listed = {entry.path for entry in manifest.files}
    assert {f"{name}.onnx" for name in components} < listed
    assert {"processor/tokenizer.json", "processor/config.json", "weights/model.safetensors"} < listed
    assert (manifest.opset, manifest.dialect) == (20, Dialect.PORTABLE)
    assert manifest.tools["torch"]


def test_stages_stand_in_the_order_of_the_cuts(bundle_of: Callable[..., Bundle]) -> None:
    schedule = two_cuts(0, 2, MaxMin(), TopK())
    manifest = bundle_of("qwen2_5_vl", schedule=schedule, policies=(Random(7),)).manifest
    assert [(stage.name, stage.role.value) for stage in manifest.stages(schedule)] == [
        ("prune_0.divprune", "prune"),
        ("decoder_0", "decoder"),
        ("prune_1.paper-highest", "prune"),
        ("decoder_1", "decoder"),
    ]
    assert [tuple(span.layer_range) for span in manifest.spans] == [(0, 1), (2,)]
    assert manifest.policies == ("random-7",)


def test_interfaces_are_what_runtimes_are_told(bundle: Bundle) -> None:
    def shapes(component: str, which: str) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        return {s.name: (s.dtype, s.shape) for s in getattr(bundle.manifest.component(component), which)}

    def cache(length: str) -> tuple[str, tuple[int | str, ...]]:
        return "float32", (1, 2, length, 16)

    heads = {"query_states": 6, "key_states": 2, "value_states": 2}
    assert shapes("decoder_0", "inputs") == {
        "inputs_embeds": ("float32", (1, "T", 96)),
        "position_ids": ("int64", (3, 1, "T")),
        "past_key_values.0.key": cache("P"),
        "past_key_values.0.value": cache("P"),
    }
    assert shapes("decoder_0", "outputs") == {
        "hidden_states": ("float32", (1, "T", 96)),
        **{name: ("float32", (1, "T", count, 16)) for name, count in heads.items()},
        "present.0.key": cache("P + T"),
        "present.0.value": cache("P + T"),
    }
    assert list(shapes("decoder_1", "inputs"))[:2] == ["inputs_embeds", "position_ids"]
    assert list(shapes("decoder_1", "outputs")) == [
        "logits",
        *(f"present.{i}.{part}" for i in (1, 2) for part in ("key", "value")),
    ]
    assert shapes("decoder_1", "outputs")["logits"] == ("float32", (1, 1, 304))
    assert shapes("vision_encoder", "outputs") == {"visual_embeds": ("float32", ("N", 96))}
    assert shapes("embed_tokens", "inputs") == {"input_ids": ("int64", (1, "S"))}


@pytest.mark.parametrize("dialect", list(Dialect), ids=lambda d: d.value)
@pytest.mark.parametrize("name", MAKERS)
def test_only_operators_that_every_runtime_has(
    name: str, dialect: Dialect, bundle_of: Callable[..., Bundle]
) -> None:
    nearly = MODERN - {"TensorScatter"}
    more = {Dialect.PORTABLE: set(), Dialect.MODERN: MODERN, Dialect.ONNXRUNTIME: nearly}
    own = FUSED if dialect is Dialect.ONNXRUNTIME else set()
    for model in graphs(bundle_of(name, dialect=dialect)).values():
        assert {node.op_type for node in model.graph if node.domain == ""} <= PORTABLE | more[dialect]
        assert {node.op_type for node in model.graph if node.domain == "com.microsoft"} <= own
        assert {node.domain for node in model.graph} <= {"", "com.microsoft"}
        assert all(value.uses() for value in model.graph.initializers.values())
        assert all(any(v.uses() or v.is_graph_output() for v in node.outputs) for node in model.graph)


def test_modern_dialect_uses_its_operators(bundle_of: Callable[..., Bundle]) -> None:
    last = graphs(bundle_of("qwen2_5_vl", dialect=Dialect.MODERN))["decoder_1"]
    used = Counter(node.op_type for node in last.graph)
    assert (used["Attention"], used["RotaryEmbedding"], used["RMSNormalization"]) == (2, 4, 5)
    assert used["TensorScatter"] == 4
    assert not {"Softmax", "MatMul"} & set(used)


def test_weights_are_links_and_graphs_are_small(bundle: Bundle, checkpoint_of: Callable[[str], Path]) -> None:
    source = checkpoint_of("qwen2_5_vl") / "model.safetensors"
    linked = bundle.path / "weights" / "model.safetensors"
    assert linked.stat().st_ino == source.stat().st_ino
    assert bundle.manifest.weights is WeightsMode.LINK
    assert all(bundle.file(c.file).stat().st_size < 200_000 for c in bundle.manifest.components)
    inline = [v for m in graphs(bundle).values() for v in m.graph.initializers.values()]
    small = [v for v in inline if not isinstance(v.const_value, ir.ExternalTensor)]
    assert max(v.const_value.nbytes for v in small) < 4096


def test_every_weight_lies_where_the_graphs_say(bundle: Bundle, checkpoint_of: Callable[[str], Path]) -> None:
    from safetensors.numpy import load_file

    expected = load_file(checkpoint_of("qwen2_5_vl") / "model.safetensors")
    seen: Counter[str] = Counter()
    for model in graphs(bundle).values():
        for value in model.graph.initializers.values():
            place = value.const_value
            if isinstance(place, ir.ExternalTensor):
                name, rows = stored_rows(place.name)
                file = bundle.path / str(place.location)  # read by hand: onnx-ir refuses hard links
                flat = np.fromfile(file, np.float32, count=place.length // 4, offset=place.offset)
                wanted = expected[name][rows]
                np.testing.assert_array_equal(flat.reshape(wanted.shape), wanted)
                seen[name] += flat.size
    assert seen == {name: tensor.size for name, tensor in expected.items()}


def test_copied_weights_have_their_own_bytes(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of("qwen2_5_vl")
    copied = export_tiny(source, tmp_path / "bundle", weights=WeightsMode.COPY)
    file = copied.path / "weights" / "model.safetensors"
    assert file.stat().st_ino != (source / "model.safetensors").stat().st_ino
    assert hash_file(file) == hash_file(source / "model.safetensors")
    assert (copied.manifest.weights, copied.manifest.warnings) == (WeightsMode.COPY, ())


def test_tied_tables_stored_twice_are_two(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers reads them: an lm_head in the file is used, whatever the config ties."""
    source = shutil.copytree(checkpoint_of("qwen2_5_vl"), tmp_path / "checkpoint")
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    models = graphs(export_tiny(source, tmp_path / "bundle"))
    assert "lm_head.weight" in models["decoder_1"].graph.initializers
    assert "model.language_model.embed_tokens.weight" in models["embed_tokens"].graph.initializers


@pytest.mark.parametrize("precision", list(Precision), ids=lambda p: p.value)
@pytest.mark.parametrize("name", MAKERS)
def test_graphs_are_well_typed(name: str, precision: Precision, bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(name, precision=precision)
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision.value]
    for component in bundle.manifest.components:
        proto = onnx.load(bundle.file(component.file), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        for spec in (*component.inputs, *component.outputs):
            if spec.dtype not in ("int64", dtype):
                assert spec.name in {"pixel_values", "pack_weight", "logits", "scores"}


def test_a_weight_of_another_type_is_cast_once(bundle_of: Callable[..., Bundle]) -> None:
    last = graphs(bundle_of("qwen2_5_vl", precision=Precision.FP16))["decoder_1"]
    casts = [
        node.inputs[0].name
        for node in last.graph
        if node.op_type == "Cast" and node.inputs[0].is_initializer()
    ]
    weights = [v for v in last.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert sorted(casts) == sorted(weight.name for weight in weights)


def test_float16_answers_like_float32(bundle_of: Callable[..., Bundle]) -> None:
    half, full = (
        BundleRun(bundle_of("qwen2_5_vl", precision=Precision.FP16)),
        BundleRun(bundle_of("qwen2_5_vl")),
    )
    prompt = random_prompt(96)
    expected, got = full.prefill(*prompt, [20]).logits, half.prefill(*prompt, [20]).logits
    assert got.dtype == np.float32
    # three layers of 2^-11 relative rounding, logits of 5
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_two_exports_in_two_threads_do_not_touch_each_other(
    checkpoint_of: Callable[[str], Path], bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    alone = {dialect: bundle_of("qwen2_5_vl", dialect=dialect) for dialect in Dialect}
    start = threading.Barrier(len(Dialect))
    made: dict[Dialect, Bundle] = {}

    def export(dialect: Dialect) -> None:
        start.wait()
        for turn in range(3):
            out = tmp_path / f"{dialect.value}-{turn}"
            made[dialect] = export_tiny(checkpoint_of("qwen2_5_vl"), out, dialect=dialect)
            for component in alone[dialect].manifest.components:
                ours, theirs = out / component.file, alone[dialect].file(component.file)
                assert ours.read_bytes() == theirs.read_bytes()

    threads = [threading.Thread(target=export, args=(dialect,)) for dialect in Dialect]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(made) == set(Dialect)


def test_the_checkpoints_config_is_left_as_it_was(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of("qwen2_5_vl")))
    before = checkpoint.config.to_json_string()
    export_bundle(
        checkpoint,
        tmp_path,
        schedule=Schedule((Cut(1),)),
        evidence=Evidence(EvidenceKind.TOLD, "a test"),
        keep=Keep(ratio=0.5),
    )
    assert checkpoint.config.to_json_string() == before


@pytest.mark.parametrize(
    ("layer", "chooser", "sentence"),
    [
        (0, TopK(), "layer is 0, expected 1 to 2 in a model of 3"),
        (3, TopK(), "layer is 3, expected 1 to 2 in a model of 3"),
        (-1, Nothing(), "layer is -1, expected 0 to 2 in a model of 3"),
    ],
)
def test_impossible_layers_are_refused_before_anything_is_written(
    layer: int, chooser: Chooser, sentence: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        export_tiny(checkpoint_of("qwen2_5_vl"), tmp_path / "bundle", layer=layer, chooser=chooser)
    assert not list((tmp_path / "bundle").iterdir())


def test_a_further_policy_that_cannot_stand_at_a_cut_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="policy paper-highest scores projections, and there are none"):
        export_tiny(
            checkpoint_of("qwen2_5_vl"), tmp_path / "bundle", layer=0, chooser=MaxMin(), policies=[TopK()]
        )
    assert not list((tmp_path / "bundle").iterdir())


def test_what_has_no_operator_here_is_one_sentence(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint_of("llava"), tmp_path / "checkpoint")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["hidden_act"] = "mish"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"computes what is not exported: operator mish has no ONNX form"
    ) as e:
        export_tiny(source, tmp_path / "bundle")
    assert e.value.hint


def test_states_with_two_heads_are_warned_of(bundle_of: Callable[..., Bundle]) -> None:
    assert bundle_of("qwen2_5_vl", chooser=TopK(source=Source.KEY)).manifest.warnings == (
        "every token scores the same: key states have only 2 heads",
    )
    assert bundle_of("qwen2_5_vl", chooser=TopK(Scorer.NORM, source=Source.KEY)).manifest.warnings == ()


def test_seven_billion_shape_builds_in_bounded_memory(tmp_path: Path) -> None:
    """4 decoder layers and 32 vision blocks of the published 7B, weights in a sparse file."""
    bench = Path(__file__).parents[1] / "bench"
    sys.path.insert(0, str(bench))
    try:
        from bench_export import LIMITS, measure
    finally:
        sys.path.remove(str(bench))
    from synthetic import config_of, write_synthetic

    checkpoint = write_synthetic(tmp_path / "model", config_of("qwen2.5-vl-7b", 4), sparse=True)
    got = measure(checkpoint, tmp_path / "bundle", precision="bf16", dialect="portable", weights="none")
    limits = LIMITS["none", 4]
    assert got.copied == 0
    assert got.written < limits.written
    assert got.peak_anonymous < limits.peak_anonymous
    assert got.peak_rss < limits.peak_rss
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["dims"]["layers"] == 4
