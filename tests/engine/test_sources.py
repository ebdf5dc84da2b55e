"""What a compiler reads: the bundle's own files, or changed copies that leave the bundle alone."""

import dataclasses
import shutil
import stat
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from bundles import export_tiny
from tiny import make_tiny

from ep_export.bundle import Bundle, Dialect, Precision, Role
from ep_export.engine.sources import compiler_source, write_stripped
from ep_export.engine_record import Limits
from ep_export.policy import Scorer, TopK
from ep_export.targets import find_target

JETPACK6, JETPACK7 = find_target("jetson-orin-agx-64gb"), find_target("jetson-orin-agx-64gb-jetpack7")
TURING = find_target("rtx-turing")
LIMITS = Limits(100, 20, 50_176, 100, 8)


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """A float16 bundle of bfloat16 weights."""
    folder = tmp_path_factory.mktemp("half")
    checkpoint = make_tiny(folder / "model", layers=2, dtype=torch.bfloat16)
    return export_tiny(checkpoint, folder / "bundle", chooser=TopK(Scorer.NORM), precision=Precision.FP16)


@pytest.fixture
def read_only(half_bundle, tmp_path):
    """A copy without the permission to write, which root has all the same."""
    copy = Path(shutil.copytree(half_bundle.path, tmp_path / "read-only"))
    for path in [copy, *copy.rglob("*")]:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    yield Bundle(copy, half_bundle.manifest)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(stat.S_IRWXU)


def listing(bundle: Bundle) -> dict[str, int]:
    """Every file and folder, and when something was last written there."""
    paths = [bundle.path, *sorted(bundle.path.rglob("*"))]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def prune_of(bundle: Bundle):
    return bundle.manifest.with_role(Role.PRUNE)[0]


def test_a_compiler_that_takes_everything_reads_the_bundles_own_files(half_bundle, tmp_path):
    for component in half_bundle.manifest.components:
        source = compiler_source(half_bundle, component, JETPACK7, LIMITS, tmp_path, plugin=True)
        assert source == half_bundle.path / component.file
    assert not list(tmp_path.iterdir())


def test_for_the_plugin_on_tensorrt_10_3_the_node_has_no_body(half_bundle, tmp_path):
    prune = prune_of(half_bundle)
    source = compiler_source(half_bundle, prune, JETPACK6, LIMITS, tmp_path, plugin=True)
    stripped, whole = ir.load(source), ir.load(half_bundle.file(prune.file))
    assert not stripped.functions
    assert whole.functions
    for model in (stripped, whole):
        assert [node.op_type for node in model.graph][-1] == "EntropyPrune"
    assert [value.name for value in stripped.graph.inputs] == [spec.name for spec in prune.inputs]
    without = compiler_source(half_bundle, prune, JETPACK6, LIMITS, tmp_path, plugin=False)
    assert without == half_bundle.path / prune.file


def test_nothing_is_written_into_a_bundle(read_only, tmp_path):
    before = listing(read_only)
    for number, (target, plugin) in enumerate(((JETPACK6, True), (TURING, False))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for component in read_only.manifest.components:
            with_plugin = plugin and component.role is Role.PRUNE
            source = compiler_source(read_only, component, target, LIMITS, folder, plugin=with_plugin)
            assert ir.load(source).graph
    assert listing(read_only) == before


def test_two_compiles_of_one_bundle_do_not_share_a_file(half_bundle, tmp_path):
    prune = prune_of(half_bundle)
    first, second = (
        compiler_source(half_bundle, prune, JETPACK6, LIMITS, folder, plugin=True)
        for folder in (tmp_path / "a", tmp_path / "b")
        if not folder.mkdir()
    )
    first.unlink()
    assert ir.load(second).graph


def test_a_target_without_bfloat16_still_gets_its_node_stripped(half_bundle, tmp_path):
    """Both reasons for a copy at once, which no shipped target has."""
    both = dataclasses.replace(JETPACK6, graphs=TURING.graphs)
    source = compiler_source(half_bundle, prune_of(half_bundle), both, LIMITS, tmp_path, plugin=True)
    assert not ir.load(source).functions


def test_turing_reads_float16_tables_that_compute_the_same(half_bundle, tmp_path):
    """bfloat16 weights that float16 holds exactly: the copy and the original give the same numbers."""
    span = half_bundle.manifest.spans[0]
    source = compiler_source(half_bundle, span, TURING, LIMITS, tmp_path, plugin=False)
    model = ir.load(source)
    assert source.parent == tmp_path
    assert not any(v.dtype == ir.DataType.BFLOAT16 for v in model.graph.initializers.values())
    dims, random = half_bundle.manifest.dims, np.random.default_rng(0)
    empty = np.zeros((1, dims.kv_heads, 0, dims.head_dim), np.float16)
    feeds = {
        "inputs_embeds": random.normal(size=(1, 5, dims.hidden_size)).astype(np.float16),
        "position_ids": np.tile(np.arange(5), (dims.position_axes, 1, 1)),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }
    got, wanted = (
        onnxruntime.InferenceSession(str(file)).run(["hidden_states"], feeds)[0]
        for file in (source, half_bundle.file(span.file))
    )
    assert np.abs(got.astype(np.float64) - wanted).max() <= 2**-8 * np.abs(wanted).max()


def test_what_has_weights_outside_its_file_is_not_copied_without_them(half_bundle, tmp_path):
    span = half_bundle.manifest.spans[0]
    with pytest.raises(ValueError, match="refers to weights"):
        write_stripped(half_bundle.file(span.file), tmp_path / "copy.onnx")


@pytest.mark.parametrize("target", [JETPACK7, TURING], ids=lambda target: target.name)
def test_the_capacity_of_caches_is_settled_and_nothing_else_changes(target, tmp_path):
    checkpoint = make_tiny(tmp_path / "model", layers=2, dtype=torch.bfloat16)
    settings = {"chooser": TopK(Scorer.NORM), "precision": Precision.FP16, "dialect": Dialect.MODERN}
    bundle = export_tiny(checkpoint, tmp_path / "bundle", **settings)
    before, dims, random = listing(bundle), bundle.manifest.dims, np.random.default_rng(0)
    (tmp_path / "copies").mkdir()
    for span in bundle.manifest.spans:
        source = compiler_source(bundle, span, target, LIMITS, tmp_path / "copies", plugin=False)
        if (linked := source.with_name("weights")).is_symlink():  # which ONNX Runtime does not follow
            linked.unlink()
            shutil.copytree(bundle.path / "weights", linked)
        (key, _) = (v for v in ir.load(source).graph.inputs if v.name.startswith("past_key_values."))
        assert list(key.shape)[1:] == [dims.kv_heads, 128, dims.head_dim]  # 100 + 20, a multiple of 16
        sizes = {"B": 2, "T": 3, "C": 128}
        feeds = {
            spec.name: random.normal(size=[sizes.get(n, n) for n in spec.shape]).astype(np.dtype(spec.dtype))
            for spec in span.inputs
        }
        feeds |= {"write_index": np.array([5, 0]), "position_ids": abs(feeds["position_ids"])}
        got, wanted = (
            onnxruntime.InferenceSession(str(file)).run(None, feeds)
            for file in (source, bundle.file(span.file))
        )
        for ours, theirs in zip(got, wanted, strict=True):
            assert np.abs(ours.astype(np.float64) - theirs).max() <= 2**-7 * np.abs(theirs).max()
    assert listing(bundle) == before
