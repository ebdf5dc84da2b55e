"""Bundles with quantised weights: fused by ONNX Runtime, equal to Hugging Face with dequantised weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import export_tiny
from tiny import tiny_picture
from tiny_families import TINY_FAMILIES

from ep_export.bundle import Bundle, Component, Dialect, Role, WeightsMode
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.export.packing import linear_weights
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Cut, Keep, MaxMin, Schedule
from ep_export.reference import PruneSpec, greedy_answer, load_model
from ep_export.runtime import Session
from ep_export.validate import validate
from ep_export.validate.rounding import rounding_costs
from ep_export.weights.packed import PackedLinear
from ep_export.weights.packing import Packing, nearest, read_weight
from ep_export.weights.store import bundle_layers

INT4 = Weights(WeightKind.INT4, 32, "nearest")


def uneven(checkpoint) -> Packing:
    """Layers with zeros and reordered inputs, as asymmetric GPTQ checkpoints have them."""

    def layers(names):
        for number, name in enumerate(names):
            rng = np.random.default_rng(number)
            weight = read_weight(checkpoint.tensors[name])
            order = rng.permutation(len(weight))
            blocks = weight[order].reshape(-1, 32, weight.shape[1])
            low, high = blocks.min(axis=1), blocks.max(axis=1)
            scales = np.maximum((high - low) / 15, 1e-6).astype(np.float16).astype(np.float32)
            zeros = np.clip(np.rint(-8 - low / scales), -8, 7)
            codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], -8, 7).reshape(weight.shape)
            yield (
                name,
                PackedLinear(WeightKind.INT4, codes.astype(np.int8), scales, zeros.astype(np.int8), order),
            )

    return Packing(replace(INT4, rounding="test"), layers)


def packing_of(kind: str, checkpoint) -> Packing:
    if kind == "uneven":
        return uneven(checkpoint)
    weights = INT4 if kind == "int4" else Weights(WeightKind(kind), None, "nearest")
    return nearest(checkpoint.tensors, weights, compute="fp32")


def fused_operators(bundle: Bundle, component: Component, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / component.file)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(bundle.file(component.file)), options)
    graph = onnx.load(folder / component.file, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module", params=["int4", "int8", "uneven"])
def bundle(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "bundle"
    packing = packing_of(request.param, checkpoint)
    return export_tiny(checkpoint.path, out, layer=2, chooser=MaxMin(), packing=packing)


def test_every_product_of_the_decoder_is_fused(bundle, tmp_path):
    """A missed fusion is silent: ten times slower, and the weights unpacked in memory."""
    counts: Counter[str] = Counter()
    for span in bundle.manifest.spans:
        counts.update(fused_operators(bundle, span, tmp_path))
    assert counts["MatMulNBits"] == 7 * bundle.manifest.dims.layers + 1  # and lm_head
    assert counts["DequantizeLinear"] == counts["Gemm"] == 0


def test_unpruned_answers_are_those_of_the_dequantised_model(bundle, checkpoint):
    model = load_model(checkpoint, quantised=bundle_layers(bundle))
    visuals = [tiny_picture(112, 84, seed=1)]
    with Session.open(bundle, exact=True) as session:
        prompt = session.prompts.build(visuals, "what is this")
        logits = session.prefill(prompt, Keep(ratio=1.0)).logits
        rounded = session.generate(visuals, "what is this", max_new_tokens=8, keep=Keep(ratio=1.0))
    inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
    with torch.inference_mode():
        theirs = model(**inputs).logits[0, -1].numpy()
        plain = load_model(checkpoint)(**inputs).logits[0, -1].numpy()
    assert np.abs(logits - theirs).max() < 1e-4 * np.abs(theirs).max() + 1e-4
    # and not those of the weights before rounding
    assert np.abs(logits - plain).max() > 10 * np.abs(logits - theirs).max()
    answer = greedy_answer(
        model,
        prompt,
        8,
        plan=PruneSpec(bundle.manifest.schedule, Keep(ratio=1.0)),
        eos_token_ids=session.prompts.eos_token_ids,
        repetition_penalty=session.prompts.repetition_penalty,
    )
    assert rounded.token_ids == answer.token_ids


def test_a_quantised_bundle_passes_every_stage(bundle, checkpoint):
    pictures = [tiny_picture(112, 84, seed=1)]
    report = validate(bundle, checkpoint, pictures=pictures, prompts=["what is this"], max_new_tokens=6)
    assert report.verdict.value in {"PASS", "AMBIGUOUS"}, report.sentence
    costs = {cost.variant: cost for cost in report.rounding}
    assert list(costs) == ["quantised", "pruned", "quantised and pruned"]
    assert all(cost.kl > 0 and 0 <= cost.agreement <= 1 for cost in costs.values())


@pytest.mark.parametrize(
    ("family", "dialect"),
    [
        *((family, Dialect.PORTABLE) for family in sorted(set(TINY_FAMILIES) - {"idefics3"})),  # as smolvlm
        ("qwen2_5_vl", Dialect.ONNXRUNTIME),
    ],
)
def test_the_vision_encoders_linear_layers_are_rounded_too(family, dialect, tmp_path):
    """Fused as the decoder's, and what Hugging Face computes with them dequantised."""
    checkpoint = open_checkpoint(str(TINY_FAMILIES[family](tmp_path / "model")))
    weights = Weights(WeightKind.INT8, None, "nearest", vision=WeightKind.INT8)
    packing = nearest(checkpoint.tensors, weights, compute="fp32")
    bundle = export_tiny(
        checkpoint.path, tmp_path / "bundle", layer=1, chooser=MaxMin(), packing=packing, dialect=dialect
    )
    names = linear_weights(checkpoint).vision
    assert names
    assert set(names) < set(bundle_layers(bundle))
    for encoder in (c for c in bundle.manifest.components if c.role is Role.VISION):
        counts = fused_operators(bundle, encoder, tmp_path)
        assert counts["MatMulNBits"] > 0
        assert counts["DequantizeLinear"] == 0
    pictures = [tiny_picture(112, 84, seed=1)]
    report = validate(bundle, checkpoint, pictures=pictures, prompts=["what is this"], max_new_tokens=4)
    assert report.verdict.value in {"PASS", "AMBIGUOUS"}, report.sentence


def test_what_rounding_costs_is_measured_against_the_model_as_it_was(checkpoint):
    """By Hugging Face's own forward: nothing is lost where nothing is rounded or pruned."""
    model = load_model(checkpoint)
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompts = [builder.build([tiny_picture(112, 84)], "what is this"), builder.build([], "what is this")]
    everything = PruneSpec(Schedule((Cut(2, MaxMin()),)), Keep(ratio=1.0))
    costs = rounding_costs(model, model, checkpoint, prompts, everything, 4)
    assert [cost.agreement for cost in costs] == [1.0] * 3
    assert all(cost.kl < 1e-6 and 0 < cost.positions <= 4 for cost in costs)
    assert rounding_costs(model, model, checkpoint, prompts[1:], everything, 4) == ()


def test_only_what_is_not_quantised_is_linked_or_read(bundle, checkpoint):
    reopened = Bundle.open(bundle.path)
    assert reopened.manifest.numerics is not None
    assert reopened.manifest.numerics.weights is not None
    layers = bundle_layers(reopened)
    assert len(layers) == 7 * bundle.manifest.dims.layers + 1
    for span in bundle.manifest.spans:
        model = onnx.load(bundle.file(span.file), load_external_data=False)
        names = {tensor.name for tensor in model.graph.initializer}
        assert not names & set(layers)


def test_float8_is_refused_for_onnx_runtime(checkpoint, tmp_path):
    packing = nearest(checkpoint.tensors, Weights(WeightKind.FP8, None, "nearest"), compute="fp32")
    with pytest.raises(UserError, match="ONNX Runtime has no kernel for fp8 weights"):
        export_tiny(checkpoint.path, tmp_path / "bundle", dialect=Dialect.ONNXRUNTIME, packing=packing)


@pytest.mark.parametrize("dialect", [Dialect.PORTABLE, Dialect.MODERN])
def test_float8_is_written_for_compilers(checkpoint, tmp_path, dialect):
    """ONNX Runtime's CPU provider is not asked to run it."""
    packing = nearest(checkpoint.tensors, Weights(WeightKind.FP8, None, "nearest"), compute="fp32")
    bundle = export_tiny(
        checkpoint.path,
        tmp_path / "bundle",
        layer=2,
        dialect=dialect,
        packing=packing,
        weights=WeightsMode.COPY,  # onnx follows no hard links
    )
    for span in bundle.manifest.spans:
        model = onnx.load(bundle.file(span.file), load_external_data=True)
        onnx.checker.check_model(model)
        kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
        assert kinds[onnx.TensorProto.FLOAT8E4M3FN] == 7 * len(span.layer_range)
