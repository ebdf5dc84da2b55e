"""Real engines, compiled ahead of time on a machine without a GPU."""

import importlib.util
import json
import shutil
import struct

import pytest
from bundles import export_tiny
from command_line import ep_export
from family_bundles import MAKERS, PRECISIONS
from tiny import make_tiny

from ep_export.bundle import Bundle, Dialect, Precision, Role
from ep_export.checkpoint import open_checkpoint
from ep_export.engine.compile import CompileRequest, Output, compile_bundle
from ep_export.engine.compiler import compile_component, installed_version
from ep_export.engine.placement import PruneOn
from ep_export.engine.profiles import LimitsRequest, make_profiles, resolve_limits
from ep_export.engine.worker import Job
from ep_export.engine_record import RECORD, check_engine, check_engine_files, engine_of, read_record
from ep_export.errors import UserError
from ep_export.families import FAMILIES
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Budget, Coverage, Cut, MaxMin, Nothing, Random, Schedule, Scorer, Source, TopK
from ep_export.runtime import OnnxRuntimeRunner
from ep_export.targets import Flavour, find_target, load_targets
from ep_export.weights.packing import nearest

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'ep-export[rtx]'",
)

ADA = "rtx-ada"
# Primes, so that the engine's bytes hold them for one reason only.
LIMITS = LimitsRequest(max_prompt=449, max_new_tokens=31, max_pixels=50_176, max_kept_tokens=7)


def test_every_family_is_compiled_here():
    assert set(MAKERS) == {family.name for family in FAMILIES}


@needs_compiler
@pytest.mark.parametrize("dialect", PRECISIONS)
@pytest.mark.parametrize("family", MAKERS)
def test_every_component_compiles_and_holds_the_profile_asked_for(family, dialect, bundle_of, tmp_path):
    bundle = bundle_of(family, dialect)
    result = compile_bundle(bundle, CompileRequest(find_target(ADA), LIMITS, out=tmp_path / "engines"))
    assert result.output is Output.ENGINES
    record = read_record(tmp_path / "engines")
    assert set(record.components) == {c.name for c in bundle.manifest.components if c.role is not Role.EMBED}
    check_engine(record, bundle, flavour=Flavour.TENSORRT_RTX, version=record.version, sm="8.9")
    check_engine_files(tmp_path / "engines", record)
    profiles = make_profiles(bundle, result.limits)
    for name, engine in record.components.items():
        assert engine.profiles == profiles[name]
    # An engine opens only where a GPU is. Its profiles lie in it as plain 64-bit numbers, all the same.
    dims = bundle.manifest.dims
    for span in bundle.manifest.spans:
        raw = (tmp_path / "engines" / record.components[span.name].file).read_bytes()
        limits = result.limits.at(span, bundle.manifest.schedule)
        longest = limits.max_prompt
        assert longest == 449 if span.name == "decoder_0" else 7 <= longest < 449
        # 449 + 31 - 1 in a cache that grows; 449 + 31 is a multiple of 16
        rows, batch = (limits.capacity, 8) if dialect.fixed_caches else (longest + 30, 1)
        assert limits.capacity % 16 == 0
        assert longest + 31 <= limits.capacity < longest + 31 + 16
        for shape in (
            (1, longest, dims.hidden_size),
            (batch, 1, dims.hidden_size),
            (batch, dims.kv_heads, rows, dims.head_dim),
        ):
            assert struct.pack(f"<{len(shape)}q", *shape) in raw, shape
        assert struct.pack("<3q", 1, 1024, dims.hidden_size) not in raw


def quantised(kind, folder):
    checkpoint = make_tiny(folder / "model", layers=2, heads=8, kv_heads=4, vision_depth=2)
    group = 32 if kind is WeightKind.INT4 else None
    weights = Weights(kind, group, "nearest", WeightKind.INT8)
    packing = nearest(open_checkpoint(str(checkpoint)).tensors, weights, compute="fp16")
    return export_tiny(checkpoint, folder / "bundle", precision=Precision.FP16, packing=packing)


@needs_compiler
@pytest.mark.parametrize("kind", WeightKind)
def test_quantised_weights_compile(kind, tmp_path):
    bundle = quantised(kind, tmp_path)
    request = CompileRequest(find_target(ADA), LIMITS, out=tmp_path / "engines")
    record = compile_bundle(bundle, request).record
    assert {span.name for span in bundle.manifest.spans} <= set(record.components)


def test_float8_is_refused_where_a_gpu_cannot_multiply_it(tmp_path):
    bundle = quantised(WeightKind.FP8, tmp_path)
    with pytest.raises(UserError, match=r"stores weights in fp8.*SM 8\.6") as caught:
        compile_bundle(bundle, CompileRequest(find_target("rtx-ampere"), LIMITS, out=tmp_path / "engines"))
    assert "int4" in caught.value.hint


POLICIES = (
    *(TopK(scorer) for scorer in Scorer),
    TopK(Scorer.NORM, source=Source.KEY),  # entropies of 4 heads, which keys have here, take half a minute
    TopK(source=Source.HIDDEN),
    TopK(budget=Budget.PER_PICTURE),
    MaxMin(),
    Coverage(),
    Coverage(Scorer.NORM, source=Source.VALUE),
    Random(7),
    Nothing(),
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """One of two cuts, with every kind of policy at both, for every precision."""
    folder = tmp_path_factory.mktemp("policies")
    schedule = Schedule((Cut(1, POLICIES[0], 0.6), Cut(2, POLICIES[0], 0.3)))
    checkpoint = make_tiny(folder / "model", layers=3, heads=8, kv_heads=4, vision_depth=2)
    return {
        precision: export_tiny(
            checkpoint,
            folder / precision.value,
            schedule=schedule,
            keep=0.6,
            policies=POLICIES[1:],
            precision=precision,
        )
        for precision in (Precision.FP16, Precision.FP32)
    }


@needs_compiler
class TestPolicies:
    """What target files claim about the choosers their compiler takes."""

    def test_two_cuts_and_every_kind_of_policy_compile(self, bundles, tmp_path):
        bundle = bundles[Precision.FP32]
        names = tuple(chooser.name for chooser in POLICIES)
        request = CompileRequest(find_target(ADA), LIMITS, policies=names, out=tmp_path / "engines")
        record = compile_bundle(bundle, request).record
        assert set(record.components) == {
            c.name for c in bundle.manifest.components if c.role is not Role.EMBED
        }
        assert record.on_cpu == ()
        # two orders of magnitude below the spans of a real model
        prunes = [engine for engine in record.components.values() if engine.role is Role.PRUNE]
        assert max(engine.bytes for engine in prunes) < 10_000_000

    @pytest.mark.parametrize("chooser", POLICIES, ids=lambda chooser: chooser.name)
    def test_turing_takes_what_its_file_says_and_no_more(self, bundles, chooser, tmp_path):
        """The compiler itself is asked."""
        bundle, turing = bundles[Precision.FP16], find_target("rtx-turing")
        prune = bundle.manifest.prune(0, chooser.name)
        job = Job(
            onnx=str(bundle.file(prune.file)),
            engine=str(tmp_path / "engine"),
            flavour=turing.flavour,
            sm=turing.sm,
            profiles=make_profiles(bundle, resolve_limits(bundle, LIMITS))[prune.name],
        )
        if turing.takes_chooser(chooser):
            assert compile_component(job, component=prune.name, target=turing).bytes > 0
        else:
            with pytest.raises(UserError, match="that GPU multiplies no float32 matrices") as refused:
                compile_component(job, component=prune.name, target=turing)
            assert "--prune-on cpu" in refused.value.hint

    def test_on_turing_the_spans_compile_whatever_the_policy_when_the_cpu_prunes(self, bundles, tmp_path):
        bundle = bundles[Precision.FP16]
        request = CompileRequest(
            find_target("rtx-turing"), LIMITS, prune_on=PruneOn.CPU, out=tmp_path / "engines"
        )
        record = compile_bundle(bundle, request).record
        assert {engine.role for engine in record.components.values()} == {
            Role.VISION,
            Role.DECODER,
        }
        for name in record.on_cpu:
            component = bundle.manifest.component(name)
            assert engine_of(record, bundle, component) is None
            OnnxRuntimeRunner(bundle.file(component.file)).close()  # it opens


def test_prune_components_of_bfloat16_run_on_the_cpu(bundle_of):
    """ONNX Runtime has no bfloat16 arithmetic there, and needs none: scores are float32."""
    import numpy as np

    bundle = bundle_of("qwen2_5_vl", Dialect.MODERN)
    (prune,) = bundle.manifest.with_role(Role.PRUNE)
    assert prune.inputs[0].dtype == "bfloat16"
    random, dims = np.random.default_rng(0), bundle.manifest.dims
    feeds = {
        "states": random.normal(size=(1, 9, dims.heads, dims.head_dim)).astype(np.float32),
        "hidden": np.round(random.normal(size=(1, 9, dims.hidden_size)) * 8).astype(np.float32),
        "position_ids": np.tile(np.arange(9), (dims.position_axes, 1, 1)),
        "visual_index": np.arange(2, 7),
        "keep_slots": np.zeros(2, dtype=np.int64),
    }
    with OnnxRuntimeRunner(bundle.file(prune.file)) as runner:
        outputs = {name: value.numpy() for name, value in runner.run(feeds).items()}
    kept = outputs["kept_index"]
    assert len(kept) == 6
    assert set(np.setdiff1d(np.arange(9), np.arange(2, 7))) <= set(kept)
    assert np.array_equal(outputs["kept_hidden"], feeds["hidden"][:, kept])


def test_every_claim_of_a_compiled_target_is_one_that_is_compiled_above():
    """Turing has its own file of claims; all others with TensorRT-RTX claim every policy."""
    partial = {
        target.name
        for target in load_targets()
        if target.flavour is Flavour.TENSORRT_RTX and not all(map(target.takes_chooser, POLICIES))
    }
    assert partial == {"rtx-turing"}


@needs_compiler
class TestOneBundle:
    """What compiling does to a bundle, and what it refuses."""

    @pytest.fixture
    def bundle(self, bundle_of, tmp_path):
        """A copy that a test may change."""
        made = bundle_of("qwen2_5_vl", Dialect.MODERN)
        shutil.copytree(made.path, tmp_path / "bundle")
        return Bundle.open(tmp_path / "bundle")

    def test_engines_go_into_the_bundle_whose_manifest_stays_valid(self, bundle):
        options = ("--max-prompt", "400", "--max-pixels", "50176", "--json")
        result = ep_export("compile", str(bundle.path), "--target", ADA, *options)
        assert result.code == 0, result.err
        said = json.loads(result.out)
        assert said["directory"] == str(bundle.path / "engines" / ADA)
        assert said["limits"]["max_prompt"] == 400
        opened = Bundle.open(bundle.path)  # sizes and checksums of everything, engines included
        assert f"engines/{ADA}/{RECORD}" in {entry.path for entry in opened.manifest.files}
        assert "not run" in opened.manifest.verified[ADA]

        again = ep_export("compile", str(bundle.path), "--target", ADA, *options)
        assert again.code == 0, again.err
        assert set(json.loads(again.out)["reused"]) == set(said["record"]["components"])
        other = ep_export("compile", str(bundle.path), "--target", ADA, "--max-prompt", "500")
        assert other.code == 1
        assert "--overwrite" in other.err
        for_another = find_target("rtx-ampere")
        record = read_record(bundle.path / "engines" / ADA)
        with pytest.raises(UserError, match=r"are for SM 8.9, expected SM 8.6"):
            check_engine(
                record,
                opened,
                flavour=for_another.flavour,
                version=installed_version(for_another.flavour),
                sm=for_another.sm,
            )

    def test_a_wrong_pair_that_slips_through_is_still_one_line_of_ours(self, tmp_path):
        """float32 Attention, with a target file that claims it: the compiler's page becomes a sentence."""
        checkpoint = make_tiny(tmp_path / "model", layers=2, heads=8, kv_heads=4, vision_depth=2)
        bundle = export_tiny(checkpoint, tmp_path / "bundle", layer=1, dialect=Dialect.MODERN)
        with pytest.raises(UserError, match="has modern fp32 graphs, expected for rtx-ada one of"):
            compile_bundle(bundle, CompileRequest(find_target(ADA), LIMITS))
        lying = tmp_path / "lying.toml"
        lying.write_text('extends = "rtx-ada"\ngraphs = ["modern fp32"]\n')
        result = ep_export("compile", str(bundle.path), "--target", str(lying))
        assert result.code == 1
        errors = [line for line in result.err.splitlines() if not line.startswith("compile ")]
        assert [line.split(":")[0] for line in errors] == ["error", "hint"], result.err
        assert "no Attention kernel" in errors[0]
        assert "portable" in errors[1]
        assert not (bundle.path / "engines").exists()

    def test_turing_takes_bfloat16_weights_as_float16(self, tmp_path):
        import torch

        options = {"layers": 2, "heads": 8, "kv_heads": 4, "vision_depth": 2, "dtype": torch.bfloat16}
        checkpoint = make_tiny(tmp_path / "model", **options)
        bundle = export_tiny(
            checkpoint, tmp_path / "bundle", chooser=TopK(Scorer.NORM), precision=Precision.FP16
        )
        turing = find_target("rtx-turing")
        result = compile_bundle(bundle, CompileRequest(turing, LIMITS, out=tmp_path / "engines"))
        assert result.record.sm == "7.5"
        assert {file.suffix for file in (tmp_path / "engines").iterdir()} == {".engine", ".json"}


class TestWithoutCompiling:
    """Refusals that need no compiler."""

    @pytest.fixture
    def bundle(self, bundle_of):
        return bundle_of("qwen2_5_vl", Dialect.PORTABLE)

    def refused(self, bundle, *options, code=1):
        before = sorted(bundle.path.rglob("*"))
        result = ep_export("compile", str(bundle.path), *options)
        assert result.code == code, result.err
        error, hint = result.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert sorted(bundle.path.rglob("*")) == before
        return error, hint

    def test_a_dialect_or_precision_the_target_has_not(self, bundle):
        error, hint = self.refused(bundle, "--target", "rtx-turing")
        assert "has portable fp32 graphs, expected for rtx-turing one of: portable fp16" in error
        assert "--precision fp16" in hint

    def test_too_small_a_profile(self, bundle):
        error, _ = self.refused(bundle, "--target", ADA, "--max-prompt", "20", code=2)
        assert "too small for one picture" in error

    def test_more_kept_tokens_than_topk_takes(self, bundle):
        error, _ = self.refused(
            bundle, "--target", ADA, "--max-prompt", "4000", "--max-new-tokens", "8", code=2
        )
        assert "fewer than 3840" in error

    def test_a_policy_the_bundle_has_not(self, bundle):
        error, hint = self.refused(bundle, "--target", ADA, "--policy", "norm")
        assert "no policy 'norm-highest'" in error
        assert "policy add" in hint

    def test_a_policy_that_is_none(self, bundle):
        error, _ = self.refused(bundle, "--target", ADA, "--policy", "magic", code=2)
        assert "'magic'" in error

    def test_a_missing_compiler(self, bundle, monkeypatch):
        found = importlib.util.find_spec
        hide = lambda name, *more: None if name == "tensorrt_rtx" else found(name, *more)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hide)
        error, hint = self.refused(bundle, "--target", ADA)
        assert "needs tensorrt_rtx, which is not installed" in error
        assert "ep-export[rtx]" in hint

    def test_a_compiler_of_another_version(self, bundle, tmp_path):
        if installed_version(Flavour.TENSORRT_RTX) is None:
            pytest.skip("tensorrt_rtx is not installed: pip install 'ep-export[rtx]'")
        later = tmp_path / "later.toml"
        later.write_text('extends = "rtx-ada"\nversions = { minimum = "99", maximum = "99" }\n')
        error, _ = self.refused(bundle, "--target", str(later))
        assert "takes tensorrt-rtx 99, found" in error

    def test_a_plugin_where_plugins_crash_the_compiler(self, bundle, tmp_path):
        plugin = tmp_path / "plugin.so"
        plugin.write_bytes(b"")
        error, _ = self.refused(bundle, "--target", ADA, "--plugin", str(plugin), code=2)
        assert "takes no plugins" in error

    def test_an_unknown_target(self, bundle):
        error, hint = self.refused(bundle, "--target", "rtx-adaa", code=2)
        assert "rtx-adaa" in error
        assert "rtx-ada" in hint

    def test_a_model_too_large_for_the_device(self, bundle, tmp_path):
        small = tmp_path / "small.toml"
        small.write_text(
            'extends = "rtx-ada"\nmemory_bytes = 1_001_000_000\n[sources]\nmemory_bytes = "a test"\n'
        )
        error, hint = self.refused(bundle, "--target", str(small))
        assert "an estimate), expected at most 1.0 MB" in error
        assert "--force" in hint

    def test_a_cpu_has_nothing_to_compile(self, bundle):
        result = ep_export("compile", str(bundle.path), "--target", "cpu", "--json")
        assert result.code == 0
        assert json.loads(result.out)["made"] == "nothing"


class TestBuild:
    """`build --target`."""

    def test_the_targets_best_graphs_are_built_and_compiled(self, tmp_path):
        if installed_version(Flavour.TENSORRT_RTX) is None:
            pytest.skip("tensorrt_rtx is not installed: pip install 'ep-export[rtx]'")
        checkpoint = make_tiny(tmp_path / "model", layers=2, heads=8, kv_heads=4, vision_depth=2)
        out = tmp_path / "bundle"
        options = (
            "--keep",
            "0.75",
            "--layer",
            "1",
            "--target",
            ADA,
            "--max-pixels",
            "50176",
            "--out",
            str(out),
        )
        result = ep_export("build", "--model", str(checkpoint), *options, "--json")
        assert result.code == 0, result.err
        said = json.loads(result.out)
        assert said["compiled"]["made"] == "engines"
        manifest = Bundle.open(out).manifest
        assert (manifest.dialect, manifest.precision) == (Dialect.MODERN, Precision.BF16)
        assert (out / "engines" / ADA / RECORD).is_file()

    @needs_compiler
    def test_what_the_target_cannot_take_is_refused_before_the_build(self, tiny_checkpoint, tmp_path):
        options = ("--keep", "0.75", "--layer", "1", "--out", str(tmp_path / "bundle"))
        build = ("build", "--model", str(tiny_checkpoint), *options)
        policy = ep_export(*build, "--target", "rtx-turing", "--policy", "paper")
        assert policy.code == 1
        assert "cannot compile policy paper-highest for rtx-turing" in policy.err
        assert "--prune-on cpu" in policy.err
        pair = ep_export(*build, "--target", ADA, "--dialect", "modern", "--precision", "fp32")
        assert pair.code == 2
        assert "takes no modern fp32 graphs" in pair.err
        assert list(tmp_path.iterdir()) == []
