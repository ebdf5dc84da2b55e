"""`validate --polygraphy`: each component alone, through Polygraphy, and the first tensor that goes wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from tiny import make_tiny, tiny_picture
from tiny_llava import make_tiny_llava

from ep_export.bundle import Bundle, Dialect, Precision, read_manifest, write_manifest
from ep_export.checkpoint import open_checkpoint
from ep_export.choosers.component import build_prune
from ep_export.errors import UserError
from ep_export.policy import MaxMin, Random, TopK
from ep_export.runtime import OnnxRuntimeRunner
from ep_export.validate.polygraphy_run import compare_with_polygraphy, polygraphy_json, polygraphy_lines
from ep_export.validate.report import Verdict

BACKENDS = {"onnxruntime": OnnxRuntimeRunner}
PICTURES = [tiny_picture(140, 112, 1)]
PROMPTS = ["which digits?"]
LAYERS = "model.language_model.layers."
PRUNE = "prune_0.paper-highest"
OUTPUTS = [
    "decoder_0 caches",
    "decoder_0 hidden_states",
    "decoder_0 key_states",
    "decoder_0 query_states",
    "decoder_0 value_states",
    "decoder_1 caches",
    "decoder_1 logits",
    "embed_tokens inputs_embeds",
    f"{PRUNE} kept_hidden",
    f"{PRUNE} kept_index",
    f"{PRUNE} kept_position_ids",
    f"{PRUNE} kept_visual_index",
    f"{PRUNE} scores",
    "vision_encoder visual_embeds",
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def modern_bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("modern") / "bundle"
    return export_tiny(tiny_checkpoint, out, layer=2, dialect=Dialect.MODERN)


@pytest.fixture(scope="module")
def fused_bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "bundle"
    return export_tiny(tiny_checkpoint, out, layer=2, dialect=Dialect.ONNXRUNTIME)


@pytest.fixture(scope="module")
def true_result(tiny_bundle, checkpoint, tmp_path_factory):
    """What is found in the bundle as it is, and where it was written."""
    out = tmp_path_factory.mktemp("polygraphy") / "out"
    return compare(tiny_bundle, checkpoint, out, find_first=True), out


def compare(bundle, checkpoint, out, *, pictures=PICTURES, backends=BACKENDS, **options):
    return compare_with_polygraphy(
        bundle, checkpoint, backends, pictures=pictures, prompts=PROMPTS, out=out, **options
    )


def verdicts(result):
    return {stage.name.rpartition(",")[0]: stage.verdict for stage in result.report.stages}


def with_wrong_weight(bundle, checkpoint, tensor, tmp_path):
    """A copy of the bundle, one tensor in it 20% too large."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    ref = checkpoint.tensors[tensor]
    (shard,) = (path for path in copy.rglob(ref.file.name) if path.suffix == ".safetensors")
    content = bytearray(shard.read_bytes())
    values = np.frombuffer(content, dtype=np.float32, count=ref.length // 4, offset=ref.offset)
    values *= 1.2
    shard.write_bytes(content)
    return Bundle.open(copy, verify=False)


def with_wrong_node(bundle, file, prefix, op_type, tmp_path):
    """A copy of the bundle; what one node of one layer computes is 10% too small."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    model = ir.load(copy / file)
    (node,) = (n for n in model.graph if n.op_type == op_type and (n.name or "").startswith(prefix))
    factor = ir.Value(name="factor", const_value=ir.tensor(np.float32(0.9), name="factor"))
    model.graph.initializers["factor"] = factor
    wrong = ir.node("Mul", [node.outputs[0], factor])
    wrong.name = wrong.outputs[0].name = f"{prefix}wrong"
    for use in list(node.outputs[0].uses()):
        if use.node is not wrong:
            use.node.replace_input_with(use.idx, wrong.outputs[0])
    model.graph.insert_after(node, wrong)
    ir.save(model, copy / file)
    return Bundle(copy, read_manifest(copy))


def runners(out, component):
    """Names in a file of results, read by Polygraphy."""
    return list(RunResults.load(str(out / f"{component}.outputs.json")).keys())


def polygraphy(*arguments):
    """NVIDIA's own command."""
    command = Path(sys.executable).with_name("polygraphy")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # it averages empty caches
    return subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_a_true_bundle_passes_in_every_output(true_result):
    result, _ = true_result
    assert sorted(verdicts(result)) == sorted(OUTPUTS)
    assert set(verdicts(result).values()) == {Verdict.PASS}
    # a picture, a video of two parts, text alone: each prefill and decode, and the cut where there is one
    assert result.runs == {"vision_encoder": 3, "embed_tokens": 3, "decoder_0": 6, PRUNE: 2, "decoder_1": 6}
    assert result.bisections == ()
    assert polygraphy_lines(result)[-1] == "PASS: 5 components, 20 runs against PyTorch"


def test_tolerances_are_not_idle(true_result):
    """Float outputs use a fair part of what is allowed, and differ: PyTorch is not compared with itself."""
    result, _ = true_result
    for stage in result.report.stages:
        if stage.name.startswith("decoder"):
            assert 0.001 < stage.max_abs_error / stage.tolerance < 0.4, stage
            assert "float32 sums in another order" in stage.reason


def test_the_report_file_is_what_json_prints(true_result):
    result, out = true_result
    raw = json.loads((out / "polygraphy.json").read_text())
    assert raw == json.loads(json.dumps(polygraphy_json(result)))
    assert raw["verdict"] == "PASS"
    assert {"name", "verdict", "max_abs_error", "tolerance", "reason"} <= set(raw["stages"][0])


def test_polygraphy_reads_the_files(true_result):
    _, out = true_result
    shown = polygraphy("inspect", "data", out / "decoder_1.outputs.json")
    assert shown.returncode == 0, shown.stderr
    assert "Run Results (2 runners)" in shown.stdout
    assert "---- pytorch" in shown.stdout
    assert "---- onnxruntime" in shown.stdout
    assert "present.3.value [dtype=float32" in shown.stdout


def test_polygraphy_runs_the_graph_on_the_files(true_result, tiny_bundle, checkpoint, tmp_path):
    """Its own runner on our inputs agrees with our outputs, and disagrees with those of a broken bundle."""
    _, out = true_result
    exact = ("--atol", "1e-4", "--rtol", "0", "--check-error-stat", "max")

    def run(outputs):
        return polygraphy(
            "run",
            tiny_bundle.path / "decoder_1.onnx",
            "--onnxrt",
            *("--load-inputs", out / "decoder_1.inputs.json"),
            *("--load-outputs", outputs, *exact),
        )

    agreed = run(out / "decoder_1.outputs.json")
    assert agreed.returncode == 0, agreed.stdout[-2000:]
    broken = with_wrong_weight(tiny_bundle, checkpoint, "lm_head.weight", tmp_path)
    compare(broken, checkpoint, tmp_path / "out")
    differs = run(tmp_path / "out" / "decoder_1.outputs.json")
    assert differs.returncode == 1, differs.stdout[-2000:]


@pytest.mark.parametrize(
    ("tensor", "component", "meaning"),
    [
        ("model.visual.patch_embed.proj.weight", "vision_encoder", "output of stem"),
        ("model.visual.blocks.1.mlp.down_proj.weight", "vision_encoder", None),
        ("model.language_model.embed_tokens.weight", "embed_tokens", None),
        (f"{LAYERS}0.self_attn.v_proj.weight", "decoder_0", None),
        (f"{LAYERS}1.input_layernorm.weight", "decoder_0", None),
        (f"{LAYERS}2.mlp.up_proj.weight", "decoder_1", None),
        (f"{LAYERS}3.self_attn.k_proj.bias", "decoder_1", None),
        ("lm_head.weight", "decoder_1", None),
    ],
)
def test_a_wrong_weight_is_found(tiny_bundle, checkpoint, tmp_path, tensor, component, meaning):
    broken = with_wrong_weight(tiny_bundle, checkpoint, tensor, tmp_path)
    result = compare(broken, checkpoint, tmp_path / "out", find_first=True)
    # judged alone: no other component is blamed
    assert {name.split()[0] for name, found in verdicts(result).items() if found is Verdict.FAIL} == {
        component
    }
    (found,) = result.bisections
    module = tensor.rpartition(".")[0]
    assert (found.component, found.meaning) == (component, meaning or f"output of {module}")
    assert found.max_abs_error > found.tolerance
    assert tensor in found.weights
    assert {weight.rpartition(".")[0] for weight in found.weights} == {module}
    assert any(tensor in line for line in polygraphy_lines(result))


@pytest.mark.parametrize(
    ("bundle", "file", "prefix", "op_type", "entered"),
    [
        ("tiny_bundle", "decoder_1.onnx", "layers.3/", "Softmax", f"{LAYERS}3.self_attn.o_proj"),
        ("modern_bundle", "decoder_1.onnx", "layers.3/", "Attention", f"{LAYERS}3.self_attn.o_proj"),
        ("fused_bundle", "decoder_1.onnx", "layers.3/", "GroupQueryAttention", f"{LAYERS}3.self_attn.o_proj"),
        ("tiny_bundle", "decoder_0.onnx", "layers.1/", "Sigmoid", f"{LAYERS}1.mlp.down_proj"),
    ],
    ids=["attention", "attention, modern dialect", "attention, onnxruntime dialect", "gate"],
)
def test_a_wrong_node_is_found(request, checkpoint, tmp_path, bundle, file, prefix, op_type, entered):
    """No weight is at fault: the first wrong tensor is what enters the next product."""
    broken = with_wrong_node(request.getfixturevalue(bundle), file, prefix, op_type, tmp_path)
    result = compare(broken, checkpoint, tmp_path / "out", find_first=True)
    (found,) = result.bisections
    assert found.meaning == f"input of {entered}"
    assert found.tensor.startswith(prefix)
    assert found.weights == ()
    first_bad = [checked.verdict for checked in found.checked].index(Verdict.FAIL)
    assert first_bad >= 2
    assert found.checked[first_bad].tensor == found.tensor


def test_a_prune_component_that_keeps_others_is_found_at_its_outputs(tiny_bundle, checkpoint, tmp_path):
    lying = Bundle(tmp_path / "bundle", tiny_bundle.manifest)
    shutil.copytree(tiny_bundle.path, lying.path)
    file = lying.path / tiny_bundle.manifest.component(PRUNE).file
    model = ir.load(file)
    (body,) = model.functions.values()
    (top,) = (node for node in body if node.op_type == "TopK")
    top.attributes["largest"] = ir.AttrInt64("largest", 0)
    ir.save(model, file)
    result = compare(lying, checkpoint, tmp_path / "out", find_first=True)
    failed = {name for name, found in verdicts(result).items() if found is Verdict.FAIL}
    assert f"{PRUNE} kept_index" in failed
    assert {name.split()[0] for name in failed} == {PRUNE}
    assert f"{PRUNE} scores" not in failed
    (found,) = result.bisections
    assert found.tensor in {"kept_hidden", "kept_index", "kept_position_ids"}
    assert found.meaning == "result of the component"
    assert "EntropyPrune" in found.node


def test_components_of_every_cut_and_of_another_policy_are_compared(tiny_checkpoint, checkpoint, tmp_path):
    bundle = export_tiny(
        tiny_checkpoint,
        tmp_path / "bundle",
        schedule=two_cuts(0, 2, MaxMin(), TopK()),
        keep=0.45,
        policies=(Random(2),),
    )
    result = compare(bundle, checkpoint, tmp_path / "out", find_first=True)
    assert set(verdicts(result).values()) == {Verdict.PASS}
    assert {"prune_0.divprune scores", "prune_1.paper-highest scores"} <= verdicts(result).keys()
    assert {name for name in result.runs if name.startswith("prune")} == {
        "prune_0.divprune",
        "prune_1.paper-highest",
    }
    other = compare(bundle, checkpoint, tmp_path / "other", policies=["random-2"])
    assert set(verdicts(other).values()) == {Verdict.PASS}
    assert {name for name in other.runs if name.startswith("prune")} == {
        "prune_0.random-2",
        "prune_1.random-2",
    }


def test_half_precision_is_measured_against_the_models_own_rounding(half_bundle, checkpoint, tmp_path):
    result = compare(half_bundle, checkpoint, tmp_path / "out")
    assert result.report.verdict is not Verdict.FAIL
    stages = {stage.name.rpartition(",")[0]: stage for stage in result.report.stages}
    hidden = stages["decoder_0 hidden_states"]
    assert "own fp16 run" in hidden.reason
    assert 0.02 < hidden.max_abs_error / hidden.tolerance < 1
    # in the graph's own type, so that polygraphy can feed them
    saved = load_json(str(tmp_path / "out" / "decoder_1.inputs.json"), description=None)
    assert saved[0]["inputs_embeds"].dtype == np.float16


def test_near_ties_are_followed_and_named(tiny_bundle, checkpoint, tmp_path):
    """A series of degree 8 is coarse: it swaps tokens, no further apart than it errs on them."""
    copy, manifest = tmp_path / "bundle", tiny_bundle.manifest
    shutil.copytree(tiny_bundle.path, copy)
    prune = manifest.component(PRUNE)
    model = build_prune(
        prune.chooser,
        dims=manifest.dims,
        cut_layer=2,
        precision_dtype=ir.DataType.FLOAT,
        degree=8,
        opset=manifest.opset,
    )
    ir.save(model, copy / prune.file)
    coarse = Bundle(copy, dataclasses.replace(manifest, degree=8))
    result = compare(coarse, checkpoint, tmp_path / "out", pictures=[tiny_picture(280, 224, 3)])
    found = verdicts(result)
    assert found[f"{PRUNE} kept_index"] is Verdict.AMBIGUOUS
    assert Verdict.FAIL not in found.values()
    assert runners(tmp_path / "out", PRUNE) == ["pytorch, kept as onnxruntime", "onnxruntime"]


def test_another_family_is_compared_and_searched(tmp_path):
    source = make_tiny_llava(tmp_path / "checkpoint")
    bundle = export_tiny(source, tmp_path / "llava", layer=2)
    checkpoint = open_checkpoint(str(source))
    assert compare(bundle, checkpoint, tmp_path / "out").report.verdict is Verdict.PASS
    tensor = next(name for name in checkpoint.tensors if name.endswith("layers.1.mlp.fc2.weight"))
    broken = with_wrong_weight(bundle, checkpoint, tensor, tmp_path)
    result = compare(broken, checkpoint, tmp_path / "out", find_first=True)
    assert result.bisections[0].meaning == f"output of {tensor.removesuffix('.weight')}"


def test_backends_are_compared_side_by_side(tiny_bundle, checkpoint, tmp_path):
    """Two backends, one broken: it alone is blamed. (ONNX Runtime stands for both; no TensorRT here.)"""
    broken = with_wrong_weight(tiny_bundle, checkpoint, f"{LAYERS}2.mlp.up_proj.weight", tmp_path)
    backends = {
        "onnxruntime": OnnxRuntimeRunner,
        "other": lambda file: OnnxRuntimeRunner(broken.path / file.name),
    }
    result = compare(tiny_bundle, checkpoint, tmp_path / "out", backends=backends, find_first=True)
    failed = {stage.name for stage in result.report.stages if stage.verdict is Verdict.FAIL}
    assert failed == {"decoder_1 logits, other", "decoder_1 caches, other"}
    assert result.bisections == ()
    assert "another backend's" in "\n".join(polygraphy_lines(result))
    assert runners(tmp_path / "out", "decoder_1") == ["pytorch", "onnxruntime", "other"]


def test_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    other = open_checkpoint(str(make_tiny(tmp_path / "other", seed=5)))
    with pytest.raises(UserError, match="another checkpoint"):
        compare(tiny_bundle, other, tmp_path / "out")


def test_somebody_elses_directory_is_not_replaced(tiny_bundle, checkpoint, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="was not made by ep-export"):
        compare(tiny_bundle, checkpoint, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_verb_exits_with_3_and_names_the_tensor(tiny_bundle, checkpoint, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    fine = ep_export("validate", str(tiny_bundle.path), "--polygraphy", *out)
    assert (fine.code, fine.out.splitlines()[-1][:4]) == (0, "PASS")
    assert f"outputs and report: {tmp_path / 'out'}" in fine.err
    tensor = f"{LAYERS}2.mlp.up_proj.weight"
    broken = with_wrong_weight(tiny_bundle, checkpoint, tensor, tmp_path)
    (manifest := broken.path / "manifest.json").write_text(_rehashed(broken, manifest))
    bad = ep_export("validate", str(broken.path), "--polygraphy", "--bisect", "--json", *out)
    assert bad.code == 3
    raw = json.loads(bad.out)
    assert raw["verdict"] == "FAIL"
    assert raw["bisections"][0]["weights"] == [tensor]


def _rehashed(bundle, manifest):
    """The manifest with the checksums its files have now."""
    from ep_export.bundle import hash_file

    raw = json.loads(manifest.read_text())
    for entry in raw["files"]:
        entry["sha256"] = hash_file(bundle.path / entry["path"])
    return json.dumps(raw)


@pytest.mark.parametrize(
    "options", [["--bisect"], ["--out", "x"], ["--target", "x"], ["--polygraphy", "--report", "x"]]
)
def test_options_that_do_not_go_together_are_usage_errors(tiny_bundle, options):
    assert ep_export("validate", str(tiny_bundle.path), *options).code == 2


def test_a_bundle_nothing_here_can_run_says_what_to_do(tiny_bundle, tmp_path):
    """The manifest alone decides: nothing is opened."""
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    write_manifest(copy, dataclasses.replace(tiny_bundle.manifest, precision=Precision.BF16))
    result = ep_export("validate", str(copy), "--polygraphy", "--out", str(tmp_path / "out"))
    assert result.code == 1
    assert "no bfloat16 on a CPU" in result.err
    assert "hint: give --target T" in result.err
