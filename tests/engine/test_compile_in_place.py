"""Bundles compiled: engines where the GPU is, a kit elsewhere; what is taken over and what is made anew.

There is no GPU here. The GPU, TensorRT and its compiler are stand-ins; tested is what they are asked for.
"""

import hashlib
import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from bundles import export_tiny
from command_line import ep_export

import ep_export.bundle as bundles
from ep_export.bundle import Bundle, Role
from ep_export.engine import compile as compiling
from ep_export.engine import engines as writing
from ep_export.engine.compile import CompileRequest, Output, compile_bundle
from ep_export.engine.device import Gpu
from ep_export.engine.placement import PruneOn
from ep_export.engine.profiles import LimitsRequest
from ep_export.engine.worker import Outcome
from ep_export.engine_record import RECORD, check_engine_files, read_record
from ep_export.errors import UserError
from ep_export.ownership import first_foreign
from ep_export.policy import MaxMin, Nothing, Scorer, TopK
from ep_export.targets import Flavour, find_target

ORIN = Gpu("Orin", "8.7", 64 << 30)
LIMITS = LimitsRequest(max_prompt=256, max_new_tokens=32, max_pixels=50_176)
JETPACK6, JETPACK7 = "jetson-orin-agx-64gb", "jetson-orin-agx-64gb-jetpack7"
PRUNE = "prune_0.paper-highest"
NORM = "prune_0.norm-highest"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_checkpoint):
    """The paper's policy, and two more."""
    folder = tmp_path_factory.mktemp("exported")
    return export_tiny(tiny_checkpoint, folder / "bundle", layer=2, policies=[TopK(Scorer.NORM), MaxMin()])


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(exported.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


class Compiler:
    """Notes its jobs and writes files where engines would be."""

    def __init__(self):
        self.jobs, self.functions = {}, {}

    def __call__(self, job, *, component, target):  # noqa: ARG002 - the compiler's interface
        self.jobs[component] = job
        self.functions[component] = [name for _, name, _ in ir.load(job.onnx).functions]
        Path(job.engine).write_bytes(component.encode())
        return Outcome(len(component), 1.0, "10.3.0")

    def compiled(self) -> list[str]:
        """What it was asked for since the last time."""
        names, self.jobs = list(self.jobs), {}
        return names


@pytest.fixture
def device(monkeypatch):
    """A Jetson as far as this code can tell."""
    compiler = Compiler()

    def pretend(gpu=ORIN, version="10.3.0"):
        monkeypatch.setattr(compiling, "find_gpu", lambda: gpu)
        monkeypatch.setattr(compiling, "installed_version", lambda _flavour: version)
        monkeypatch.setattr(compiling, "require_compiler", lambda _target: version)
        monkeypatch.setattr(writing, "compile_component", compiler)
        return compiler

    return pretend


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "plugin.so"
    file.write_bytes(b"a plugin")
    return file


def request(target=JETPACK6, **changes) -> CompileRequest:
    return CompileRequest(find_target(target), **{"limits": LIMITS, **changes})


def engine_names(bundle: Bundle, *prunes: str) -> set[str]:
    """Encoders and spans, and some prune components; the embedding table is read on the host."""
    names = {c.name for c in bundle.manifest.components if c.role in {Role.VISION, Role.DECODER}}
    return names | set(prunes)


def test_a_matching_gpu_compiles_in_place(bundle, device):
    compiler = device()
    result = compile_bundle(bundle, request())
    assert result.output is Output.ENGINES
    record = read_record(result.directory)
    assert (record.flavour, record.sm, record.version) == (Flavour.TENSORRT, "8.7", "10.3.0")
    assert record.plugin is None
    assert set(record.components) == engine_names(bundle, PRUNE)
    assert {name: engine.role for name, engine in record.components.items()} == {
        component.name: component.role
        for component in bundle.manifest.components
        if component.name in record.components
    }
    assert compiler.functions[PRUNE] == ["EntropyPrune"]  # no plugin: the body is compiled
    assert all(job.plugin is None for job in compiler.jobs.values())
    Bundle.open(bundle.path)  # its manifest lists the engines


class TestPlugin:
    """In place of the node that scores."""

    def test_tensorrt_10_3_gets_no_body_and_no_trace_of_it_stays(self, bundle, device, plugin):
        compiler = device()
        files = {path for path in bundle.path.rglob("*") if path.is_file()}
        result = compile_bundle(bundle, request(plugin=plugin))
        assert compiler.functions[PRUNE] == []
        assert compiler.jobs[PRUNE].plugin == str(plugin)
        assert compiler.jobs["decoder_0"].plugin is None
        added = {path.parent for path in bundle.path.rglob("*") if path.is_file()} - {f.parent for f in files}
        assert added == {result.directory}
        assert not [path for path in result.directory.iterdir() if path.suffix == ".onnx"]

    def test_its_library_lies_beside_the_engines_with_its_checksum(self, bundle, device, plugin):
        device()
        record = compile_bundle(bundle, request(plugin=plugin)).record
        directory = bundle.path / "engines" / JETPACK6
        assert record.plugin.sha256 == hashlib.sha256(b"a plugin").hexdigest()
        assert (directory / record.plugin.file).read_bytes() == b"a plugin"
        assert [name for name, engine in record.components.items() if engine.plugin] == [PRUNE]
        check_engine_files(directory, record)
        listed = {entry.path for entry in Bundle.open(bundle.path).manifest.files}
        assert f"engines/{JETPACK6}/{record.plugin.file}" in listed

    def test_tensorrt_11_keeps_the_body_beside_it(self, bundle, device, plugin):
        compiler = device(version="11.4.1")
        compile_bundle(bundle, request(JETPACK7, plugin=plugin))
        assert compiler.functions[PRUNE] == ["EntropyPrune"]
        assert compiler.jobs[PRUNE].plugin == str(plugin)

    def test_policies_that_do_not_score_take_none(self, tiny_checkpoint, tmp_path, device, plugin):
        device()
        bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", chooser=MaxMin())
        record = compile_bundle(bundle, request(plugin=plugin)).record
        assert record.plugin is None
        assert [path.name for path in (bundle.path / "engines" / JETPACK6).glob("*.so")] == []


def test_a_bundle_elsewhere_is_not_written_to(bundle, device, plugin, tmp_path):
    device()
    before = {str(p): p.stat().st_mtime_ns for p in [bundle.path, *bundle.path.rglob("*")]}
    compile_bundle(bundle, request(plugin=plugin, out=tmp_path / "out"))
    compile_bundle(bundle, request(plugin=plugin, out=tmp_path / "again"))
    assert {str(p): p.stat().st_mtime_ns for p in [bundle.path, *bundle.path.rglob("*")]} == before


class TestPolicies:
    """Further policies, at once or later."""

    def test_several_at_once(self, bundle, device):
        device()
        record = compile_bundle(bundle, request(policies=("norm-highest",))).record
        assert set(record.components) == engine_names(bundle, PRUNE, NORM)

    def test_one_more_costs_its_own_engine_alone(self, bundle, device):
        compiler = device()
        first = compile_bundle(bundle, request())
        compiler.compiled()
        more = CompileRequest(find_target(JETPACK6), policies=("norm-highest",))
        second = compile_bundle(Bundle.open(bundle.path), more)
        assert compiler.compiled() == [NORM]
        assert set(second.reused) == set(first.record.components)
        record = read_record(second.directory)
        assert set(record.components) == engine_names(bundle, PRUNE, NORM)
        assert record.limits == first.record.limits
        for name, engine in first.record.components.items():
            assert record.components[name] == engine
        check_engine_files(second.directory, record)
        Bundle.open(bundle.path)

    def test_one_that_the_bundle_got_later(self, bundle, device):
        from ep_export.export.policies import add_policies

        compiler = device()
        compile_bundle(bundle, request())
        compiler.compiled()
        opened = add_policies(Bundle.open(bundle.path), [Nothing()])
        compile_bundle(opened, CompileRequest(find_target(JETPACK6), policies=("nothing",)))
        assert compiler.compiled() == ["prune_0.nothing"]

    def test_the_same_again_compiles_nothing(self, bundle, device):
        compiler = device()
        compile_bundle(bundle, request(policies=("norm-highest",)))
        compiler.compiled()
        again = compile_bundle(Bundle.open(bundle.path), request())
        assert compiler.compiled() == []
        assert set(again.record.components) == engine_names(bundle, PRUNE, NORM)

    def test_overwriting_leaves_what_is_asked_for_now_and_keeps_what_is_good(self, bundle, device):
        compiler = device()
        compile_bundle(bundle, request(policies=("norm-highest",)))
        compiler.compiled()
        result = compile_bundle(Bundle.open(bundle.path), request(overwrite=True))
        assert compiler.compiled() == []
        assert set(result.record.components) == engine_names(bundle, PRUNE)
        assert not (result.directory / f"{NORM}.engine").exists()


class TestStaleEngines:
    """Engines that would be others now are replaced only when that was asked for."""

    @pytest.fixture
    def compiled(self, bundle, device):
        self.compiler = device()
        compile_bundle(bundle, request())
        self.compiler.compiled()
        return Bundle.open(bundle.path)

    def replaced(self, bundle, **changes) -> list[str]:
        with pytest.raises(UserError, match="exists already, with an engine of") as refused:
            compile_bundle(bundle, request(**changes))
        assert "--overwrite" in refused.value.hint
        assert self.compiler.compiled() == []
        compile_bundle(bundle, request(**changes, overwrite=True))
        return self.compiler.compiled()

    def test_other_limits(self, compiled):
        longer = LimitsRequest(max_prompt=300, max_new_tokens=32, max_pixels=50_176)
        assert set(self.replaced(compiled, limits=longer)) == engine_names(compiled, PRUNE) - {
            "vision_encoder"
        }

    def test_another_compiler(self, compiled, device):
        device(version="10.3.1")
        assert set(self.replaced(compiled)) == engine_names(compiled, PRUNE)

    def test_the_plugin_in_place_of_the_body(self, compiled, plugin):
        assert self.replaced(compiled, plugin=plugin) == [PRUNE]

    def test_another_plugin(self, compiled, plugin):
        compile_bundle(compiled, request(plugin=plugin, overwrite=True))
        self.compiler.compiled()
        plugin.write_bytes(b"a later plugin")
        assert self.replaced(Bundle.open(compiled.path), plugin=plugin) == [PRUNE]

    def test_a_damaged_engine(self, compiled):
        engine = compiled.path / "engines" / JETPACK6 / "decoder_1.engine"
        engine.write_bytes(b"x" * engine.stat().st_size)
        assert self.replaced(compiled) == ["decoder_1"]

    def test_a_graph_that_changed(self, compiled, tiny_checkpoint, tmp_path):
        """Another cut layer: other spans of the same weights."""
        other = export_tiny(tiny_checkpoint, tmp_path / "other", layer=1)
        shutil.copytree(compiled.path / "engines", other.path / "engines")
        assert set(self.replaced(Bundle.open(other.path))) >= {"decoder_0", "decoder_1"}


class TestPruneOnTheCpu:
    """`--prune-on cpu`: spans become engines, prune components stay files."""

    def test_prune_components_stay_files_and_the_record_says_so(self, bundle, device):
        compiler = device()
        result = compile_bundle(bundle, request(prune_on=PruneOn.CPU, policies=("divprune",)))
        assert set(compiler.compiled()) == engine_names(bundle)
        record = read_record(result.directory)
        assert set(record.on_cpu) == {PRUNE, "prune_0.divprune"}
        assert "prunes on the CPU" in Bundle.open(bundle.path).manifest.verified[JETPACK6]

    def test_what_was_chosen_once_stays_so(self, bundle, device):
        compiler = device()
        compile_bundle(bundle, request(prune_on=PruneOn.CPU))
        compiler.compiled()
        more = CompileRequest(find_target(JETPACK6), policies=("norm-highest",))
        record = compile_bundle(Bundle.open(bundle.path), more).record
        assert compiler.compiled() == []
        assert set(record.on_cpu) == {PRUNE, NORM}
        moved = compile_bundle(Bundle.open(bundle.path), request(prune_on=PruneOn.TARGET)).record
        assert set(compiler.compiled()) == {PRUNE, NORM}
        assert moved.on_cpu == ()

    def test_it_is_shown(self, bundle, device):
        device()
        limits = ("--max-prompt", "256", "--max-pixels", "50176", "--max-new-tokens", "32")
        said = ep_export("compile", str(bundle.path), "--target", JETPACK6, *limits, "--prune-on", "cpu")
        assert said.code == 0, said.err
        row = next(line for line in said.err.splitlines() if PRUNE in line)
        assert "ONNX Runtime, on the CPU" in row


@pytest.mark.parametrize(
    ("gpu", "version", "why"),
    [
        (None, "10.3.0", "this machine has no GPU"),
        (Gpu("A100", "8.0", 1), "10.3.0", "a GPU of SM 8.0"),
        (ORIN, None, "TensorRT is not installed"),
        (ORIN, "10.8.0", "TensorRT here is 10.8.0"),
    ],
)
def test_elsewhere_there_is_a_kit_and_the_reason_is_said(bundle, device, gpu, version, why):
    device(gpu, version)
    result = compile_bundle(bundle, request(golden=False))
    assert result.output is Output.KIT
    assert why in result.reason
    assert (result.directory / "build.sh").is_file()
    assert not (result.directory / RECORD).exists()
    assert JETPACK6 not in Bundle.open(bundle.path).manifest.verified


def test_a_kit_in_its_bundle_is_not_listed_there_and_no_weights_are_read_again(bundle, device, monkeypatch):
    device(None)
    read, hash_file = [], bundles.hash_file
    monkeypatch.setattr(
        "ep_export.engine.kit_files.hash_file", lambda file: read.append(file.name) or hash_file(file)
    )
    monkeypatch.setattr("ep_export.bundle.hash_file", lambda file: read.append(file.name) or hash_file(file))
    before = (bundle.path / "manifest.json").read_bytes()
    kit = compile_bundle(bundle, request(golden=False)).directory
    assert (kit / "weights").is_dir()
    assert not [name for name in read if name.endswith(".safetensors")]
    assert (bundle.path / "manifest.json").read_bytes() == before
    Bundle.open(kit)  # it has a manifest of its own
    assert first_foreign(bundle.path, "manifest.json") is None  # and the bundle may still be replaced
    (kit / "mine.txt").write_text("a note")
    assert first_foreign(bundle.path, "manifest.json") == f"engines/{JETPACK6}/mine.txt"


def test_a_kit_after_engines_for_another_target(bundle, device, tmp_path):
    device(Gpu("A100", "8.0", 1), "10.15.0")
    engines = compile_bundle(bundle, request("a100"))
    kit = compile_bundle(Bundle.open(bundle.path), request(golden=False, out=tmp_path / "kit"))
    assert engines.output is Output.ENGINES
    assert kit.output is Output.KIT
    assert json.loads((tmp_path / "kit" / "kit.json").read_text())["target"] == JETPACK6


def test_a_model_that_cannot_fit_is_refused_and_forced(bundle, device, tmp_path):
    device()
    small = tmp_path / "small.toml"
    small.write_text('extends = "jetson-orin-nano-8gb"\ntitle = "small"\nmemory_bytes = 2_000_500_000\n')
    with pytest.raises(UserError, match="an estimate\\), expected at most") as refused:
        compile_bundle(bundle, request(str(small)))
    assert "--force" in refused.value.hint
    assert not (bundle.path / "engines").exists()
    assert compile_bundle(bundle, request(str(small), force=True)).output is Output.ENGINES


def test_a_compiler_that_fails_leaves_nothing(bundle, device, monkeypatch):
    device()

    def fail(job, *, component, target):
        raise UserError("it failed", hint="no hint")

    monkeypatch.setattr(writing, "compile_component", fail)
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="it failed"):
        compile_bundle(bundle, request())
    assert not (bundle.path / "engines").exists()
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_compiler_that_fails_at_one_more_policy_leaves_the_engines_that_were_there(
    bundle, device, monkeypatch
):
    device()
    directory = compile_bundle(bundle, request()).directory

    def fail(job, *, component, target):
        raise UserError("it failed", hint="no hint")

    monkeypatch.setattr(writing, "compile_component", fail)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(UserError, match="it failed"):
        compile_bundle(Bundle.open(bundle.path), request(policies=("norm-highest",)))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
