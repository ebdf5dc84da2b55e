"""What an export writes: files, interfaces, operators, weights left where they are, refusals."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import Decoder, build, hugging_face, random_prompt

from ep_export.bundle import Bundle, Dialect, Precision, WeightsMode, hash_file
from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import select_tokens, series_scores
from ep_export.errors import UserError
from ep_export.policy import Policy, Scorer, Select, Source

SHAPE = (3, 6, 2, 16)

# Operators TensorRT 10.3 and ONNX Runtime both have for our types; Gelu is opset 20's.
PORTABLE = {
    "Add", "Cast", "Clip", "Concat", "Cos", "Div", "Expand", "Gather", "Gelu", "Gemm", "Less", "LessOrEqual",
    "MatMul", "Mul", "Neg", "Pow", "Range", "Reciprocal", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin",
    "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
MODERN = {"Attention", "RMSNormalization", "RotaryEmbedding"}
IN_THE_FUNCTION = {
    "Abs", "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "CumSum", "Div", "Equal", "Gather",
    "Identity", "Less", "Log", "MatMul", "Max", "Mul", "Neg", "Range", "Reciprocal", "ReduceMean",
    "ReduceSum", "Reshape", "ScatterElements", "Shape", "Slice", "Sqrt", "Squeeze", "Sub", "TopK",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
COMPONENTS = ("vision_encoder", "embed_tokens", "decoder_head", "decoder_tail")


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of(SHAPE, 1)


def graphs(bundle: Bundle) -> dict[str, ir.Model]:
    return {c.name: ir.load(bundle.file(c.file)) for c in bundle.manifest.components}


def test_bundle_opens_and_every_file_matches_its_checksum(bundle: Bundle) -> None:
    manifest = Bundle.open(bundle.path).manifest
    assert tuple(c.name for c in manifest.components) == COMPONENTS
    listed = {entry.path for entry in manifest.files}
    assert {f"{name}.onnx" for name in COMPONENTS} < listed
    assert {"processor/tokenizer.json", "processor/config.json", "weights/model.safetensors"} < listed
    assert (manifest.opset, manifest.dialect) == (20, Dialect.PORTABLE)
    assert manifest.tools["torch"]


def test_interfaces_are_what_runtimes_are_told(bundle: Bundle) -> None:
    def shapes(component: str, which: str) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        return {s.name: (s.dtype, s.shape) for s in getattr(bundle.manifest.component(component), which)}

    cache = ("float32", (1, 2, "P", 16))
    assert shapes("decoder_head", "inputs") == {
        "inputs_embeds": ("float32", (1, "S", 96)),
        "position_ids": ("int64", (3, 1, "S")),
        "visual_index": ("int64", ("N",)),
        "keep_slots": ("int64", ("k",)),
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    assert list(shapes("decoder_head", "outputs")) == [
        "hidden_states",
        "kept_position_ids",
        "kept_index",
        "present.0.key",
        "present.0.value",
    ]
    assert shapes("decoder_tail", "outputs")["logits"] == ("float32", (1, 1, 304))
    assert list(shapes("decoder_tail", "inputs"))[:3] == [
        "hidden_states",
        "position_ids",
        "past_key_values.1.key",
    ]
    assert shapes("vision_encoder", "outputs") == {"visual_embeds": ("float32", ("N", 96))}
    assert shapes("embed_tokens", "inputs") == {"input_ids": ("int64", (1, "S"))}


@pytest.mark.parametrize("dialect", list(Dialect), ids=lambda d: d.value)
def test_only_operators_that_every_runtime_has(dialect: Dialect, bundle_of: Callable[..., Bundle]) -> None:
    allowed = PORTABLE | (MODERN if dialect is Dialect.MODERN else set())
    for model in graphs(bundle_of(SHAPE, 1, dialect)).values():
        used = Counter((node.domain, node.op_type) for node in model.graph)
        ours = used.pop(("ep_export", "EntropyPrune"), 0)
        assert {domain for domain, _ in used} <= {""}
        assert {op for _, op in used} <= allowed
        assert ours == len(model.functions)
        for function in model.functions.values():
            assert {node.op_type for node in function} <= IN_THE_FUNCTION
        assert not any(
            value.is_initializer() and not value.uses() for value in model.graph.initializers.values()
        )


def test_modern_dialect_uses_its_operators(bundle_of: Callable[..., Bundle]) -> None:
    tail = graphs(bundle_of(SHAPE, 1, Dialect.MODERN))["decoder_tail"]
    used = Counter(node.op_type for node in tail.graph)
    assert (used["Attention"], used["RotaryEmbedding"], used["RMSNormalization"]) == (2, 4, 5)
    assert not {"Softmax", "MatMul"} & set(used)


def test_layers_are_stamped_with_their_own_weights(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of((9, 16, 4, 16), 4)
    models = graphs(bundle)
    for name, layers in (("decoder_head", range(4)), ("decoder_tail", range(4, 9))):
        gemms = [node.inputs[1].name for node in models[name].graph if node.op_type == "Gemm"]
        found = {weight.split(".")[3] for weight in gemms if ".layers." in weight}
        assert found == {str(i) for i in layers}
        assert len(gemms) == len(set(gemms)) == 7 * len(layers) + (name == "decoder_tail")


def test_weights_are_links_and_graphs_are_small(bundle: Bundle, checkpoint_of: Callable[..., Path]) -> None:
    source = checkpoint_of(SHAPE) / "model.safetensors"
    linked = bundle.path / "weights" / "model.safetensors"
    assert linked.stat().st_ino == source.stat().st_ino
    assert bundle.manifest.weights is WeightsMode.LINK
    assert all((bundle.path / f"{name}.onnx").stat().st_size < 200_000 for name in COMPONENTS)
    inline = [v for m in graphs(bundle).values() for v in m.graph.initializers.values()]
    small = [v for v in inline if not isinstance(v.const_value, ir.ExternalTensor)]
    assert max(v.const_value.nbytes for v in small) < 4096


def test_every_weight_lies_where_the_graphs_say(bundle: Bundle, checkpoint_of: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file

    expected = load_file(checkpoint_of(SHAPE) / "model.safetensors")
    seen = set()
    for model in graphs(bundle).values():
        for name, value in model.graph.initializers.items():
            place = value.const_value
            if isinstance(place, ir.ExternalTensor):
                file = bundle.path / str(place.location)  # read by hand: onnx-ir refuses hard links
                flat = np.fromfile(file, np.float32, count=place.length // 4, offset=place.offset)
                np.testing.assert_array_equal(flat.reshape(expected[name].shape), expected[name])
                seen.add(name)
    assert seen == set(expected)


@pytest.fixture(scope="module")
def copied(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Scores keys, and owns its weights."""
    out = tmp_path_factory.mktemp("copied") / "bundle"
    return build(
        checkpoint_of(SHAPE), out, Policy(1, scorer=Scorer.NORM, source=Source.KEY), weights=WeightsMode.COPY
    )


def test_copied_weights_have_their_own_bytes(copied: Bundle, checkpoint_of: Callable[..., Path]) -> None:
    source = checkpoint_of(SHAPE) / "model.safetensors"
    file = copied.path / "weights" / "model.safetensors"
    assert file.stat().st_ino != source.stat().st_ino
    assert hash_file(file) == hash_file(source)
    assert (copied.manifest.weights, copied.manifest.warnings) == (WeightsMode.COPY, ())


def test_across_file_systems_links_become_copies_and_the_manifest_says_so(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ep_export.export.shards import Shards

    def refuse(*_args: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    tensors = open_checkpoint(str(checkpoint_of(SHAPE))).tensors
    shards = Shards(tensors.values(), tmp_path, WeightsMode.LINK)
    assert shards.mode is WeightsMode.COPY
    assert "copied" in shards.warnings[0]
    assert shards.bytes_copied == (tmp_path / "weights" / "model.safetensors").stat().st_size
    shards.close()


def test_symbolic_links_of_the_hub_cache_are_resolved_to_blobs(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    from ep_export.export.shards import Shards

    source = checkpoint_of(SHAPE)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shards = Shards(open_checkpoint(str(snapshot)).tensors.values(), bundle, WeightsMode.LINK)
    linked = bundle / "weights" / "model.safetensors"
    assert not linked.is_symlink()
    assert linked.stat().st_ino == (source / "model.safetensors").stat().st_ino
    assert shards.checksums() == {"weights/model.safetensors": hash_file(linked)}
    shards.close()


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16], ids=lambda p: p.value)
def test_half_precision_graphs_are_well_typed(precision: Precision, bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(SHAPE, 1, Dialect.PORTABLE, precision)
    name = {"fp16": "float16", "bf16": "bfloat16"}[precision.value]
    for component in bundle.manifest.components:
        proto = onnx.load(bundle.file(component.file), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        for spec in (*component.inputs, *component.outputs):
            if spec.dtype not in ("int64", name):
                assert (component.name, spec.name) in {
                    ("vision_encoder", "pixel_values"),
                    ("decoder_tail", "logits"),
                }
    scales = [
        n
        for n in graphs(bundle)["decoder_tail"].graph
        if n.op_type == "Cast" and n.inputs[0].is_initializer()
    ]
    assert len(scales) == len(
        {n.inputs[0].name for n in scales}
    )  # one Cast a weight: the shard stays float32


def test_float16_answers_like_float32(bundle_of: Callable[..., Bundle]) -> None:
    half, full = Decoder(bundle_of(SHAPE, 1, Dialect.PORTABLE, Precision.FP16)), Decoder(bundle_of(SHAPE, 1))
    embeds, positions, visual = random_prompt(96)
    expected = full(embeds, positions, visual, 20)["logits"]
    half.caches = {name: value.astype(np.float16) for name, value in half.caches.items()}
    got = half(embeds.astype(np.float16), positions, visual, 20)["logits"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, expected, atol=0.05
    )  # three layers of 2^-11 relative rounding, logits of 5


def test_keys_and_hidden_states_can_be_scored(
    copied: Bundle, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Against Hugging Face: k_proj of layer 0, and the output of layer 0, scored in PyTorch."""
    path = checkpoint_of(SHAPE)
    model = hugging_face(path).model.language_model
    hidden = build(path, tmp_path / "hidden", Policy(1, source=Source.HIDDEN))
    embeds, positions, visual = random_prompt(96)
    keys: list[torch.Tensor] = []
    model.layers[0].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out[0]))
    output = model(
        inputs_embeds=torch.from_numpy(embeds),
        position_ids=torch.from_numpy(positions),
        output_hidden_states=True,
    )
    for bundle, states in (
        (copied, keys[0].unflatten(-1, (2, 16))),
        (hidden, output.hidden_states[1][0].unflatten(-1, (6, 16))),
    ):
        scorer = bundle.manifest.policy.scorer
        degree = bundle.manifest.degree
        scores = series_scores(states[torch.from_numpy(visual)], scorer, degree).numpy()
        chosen = select_tokens(scores, 7, select=Select.HIGHEST, visual_index=visual)
        got = Decoder(bundle)(embeds, positions, visual, 7)["kept_index"]
        np.testing.assert_array_equal(np.intersect1d(got, visual), chosen)


def test_layers_and_degrees_out_of_range_are_refused(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    for layer in (0, 3, -1):
        with pytest.raises(UserError, match="out of range for a model of 3 layers") as caught:
            build(checkpoint_of(SHAPE), tmp_path / f"k{layer}", Policy(layer))
        assert "between 1 and 2" in caught.value.hint
        assert not list((tmp_path / f"k{layer}").iterdir())


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
    got = measure(checkpoint, tmp_path / "bundle", precision="bf16", dialect="portable")
    limits = LIMITS[4]
    assert got.copied == 0
    assert got.written < limits.written
    assert got.peak_anonymous < limits.peak_anonymous
    assert got.peak_rss < limits.peak_rss
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["dims"]["layers"] == 4
