"""Engines say what they are for, and what is not for here is refused before it is loaded."""

import dataclasses
import json

import pytest

from ep_export.bundle import Bundle, Dialect, Precision, Role, hash_file
from ep_export.engine_record import (
    RECORD,
    EngineFile,
    EngineRecord,
    Limits,
    PluginFile,
    Profile,
    ShapeRange,
    check_engine,
    check_engine_files,
    compiled_targets,
    engine_directory,
    engine_of,
    read_record,
    source_sha256,
    write_record,
)
from ep_export.errors import UserError
from ep_export.targets import Flavour

PROFILE = Profile("all", {"input_ids": ShapeRange((1, 1), (1, 8), (1, 16))})


@pytest.fixture
def record(tiny_bundle, tmp_path):
    """Of engines that are a few bytes each, in `tmp_path`."""
    engines = {}
    for component in tiny_bundle.manifest.components:
        file = tmp_path / f"{component.name}.engine"
        file.write_bytes(component.name.encode())
        engines[component.name] = EngineFile(
            component.role,
            file.name,
            hash_file(file),
            file.stat().st_size,
            0.5,
            (PROFILE,),
            source_sha256(tiny_bundle.manifest, component),
            plugin=component.role is Role.PRUNE,
        )
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"a plugin")
    record = EngineRecord(
        target="rtx-ada",
        sm="8.9",
        flavour=Flavour.TENSORRT_RTX,
        version="1.7.1.116",
        cuda="12",
        model="tiny",
        dialect=Dialect.PORTABLE,
        precision=Precision.FP32,
        limits=Limits(256, 64, 200_704, 128),
        components=engines,
        on_cpu=(),
        plugin=PluginFile(plugin.name, hash_file(plugin), plugin.stat().st_size),
        made_by={"ep-export": "0"},
    )
    write_record(tmp_path, record)
    return record


def check(record, bundle: Bundle, **changes):
    here = {"flavour": Flavour.TENSORRT_RTX, "version": "1.7.1.116", "sm": "8.9", **changes}
    check_engine(record, bundle, **here)


def test_a_record_reads_back_as_written(record, tmp_path):
    assert read_record(tmp_path) == record


def test_engines_for_here_are_accepted(record, tiny_bundle, tmp_path):
    check(record, tiny_bundle)
    check(record, tiny_bundle, sm=None)  # the GPU is not known yet
    check(record, tiny_bundle, version="1.7.1.200")  # another build of the same release
    check_engine_files(tmp_path, record)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sm": "8.6"}, ("rtx-ada", "SM 8.9", "SM 8.6")),
        ({"version": "1.8.0"}, ("1.7.1.116", "1.8.0")),
        ({"flavour": Flavour.TENSORRT}, ("tensorrt-rtx", "expected tensorrt,")),
    ],
)
def test_engines_for_elsewhere_say_what_they_are_and_what_was_expected(record, tiny_bundle, changes, words):
    with pytest.raises(UserError) as refused:
        check(record, tiny_bundle, **changes)
    said = str(refused.value) + ", "
    assert all(word in said for word in words)
    assert "ep-export compile" in refused.value.hint


def with_file(bundle: Bundle, path: str, sha256: str) -> Bundle:
    """The bundle with another checksum of the files whose path begins so."""
    files = tuple(
        dataclasses.replace(entry, sha256=sha256) if entry.path.startswith(path) else entry
        for entry in bundle.manifest.files
    )
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=files))


@pytest.mark.parametrize("path", ["weights/", "decoder_1.onnx", "prune_0"])
def test_engines_of_another_bundle_are_refused(record, tiny_bundle, path):
    with pytest.raises(UserError, match="another bundle"):
        check(record, with_file(tiny_bundle, path, "0" * 64))


def test_reports_engines_and_other_policies_make_no_other_bundle(record, tiny_bundle):
    manifest = tiny_bundle.manifest
    report = dataclasses.replace(manifest.files[0], path="report/report.json")
    policy = dataclasses.replace(
        manifest.with_role(Role.PRUNE)[0], name="prune_0.new", file="prune_0.new.onnx"
    )
    more = dataclasses.replace(
        manifest,
        files=(*manifest.files, report, dataclasses.replace(report, path=policy.file)),
        components=(*manifest.components, policy),
        verified={"x": "y"},
    )
    check(record, Bundle(tiny_bundle.path, more))


def test_the_source_of_an_engine_is_its_graph_and_its_weights(tiny_bundle):
    span, prune = (tiny_bundle.manifest.with_role(role)[0] for role in (Role.DECODER, Role.PRUNE))
    changed = with_file(tiny_bundle, "weights/", "0" * 64).manifest
    assert source_sha256(changed, span) != source_sha256(tiny_bundle.manifest, span)
    assert source_sha256(changed, prune) == source_sha256(tiny_bundle.manifest, prune)
    assert source_sha256(tiny_bundle.manifest, span) != source_sha256(tiny_bundle.manifest, prune)


def test_a_missing_span_is_named(record, tiny_bundle):
    less = {name: engine for name, engine in record.components.items() if name != "decoder_1"}
    with pytest.raises(UserError, match="lack decoder_1"):
        check(dataclasses.replace(record, components=less), tiny_bundle)


def test_an_embedding_table_needs_an_engine_only_where_nobody_says_where_it_lies(record, tiny_bundle):
    less = {name: engine for name, engine in record.components.items() if name != "embed_tokens"}
    less = dataclasses.replace(record, components=less)
    check(less, tiny_bundle)
    manifest = tiny_bundle.manifest
    older = tuple(dataclasses.replace(component, table=None) for component in manifest.components)
    older = dataclasses.replace(tiny_bundle, manifest=dataclasses.replace(manifest, components=older))
    with pytest.raises(UserError, match="lack embed_tokens"):
        check(less, older)


class TestWhereAComponentRuns:
    """`engine_of`."""

    def test_in_its_engine(self, record, tiny_bundle):
        for component in tiny_bundle.manifest.components:
            assert engine_of(record, tiny_bundle, component).file == f"{component.name}.engine"

    def test_on_the_cpu_where_the_record_says_so(self, record, tiny_bundle):
        (prune,) = tiny_bundle.manifest.with_role(Role.PRUNE)
        others = {name: engine for name, engine in record.components.items() if name != prune.name}
        on_cpu = dataclasses.replace(record, components=others, on_cpu=(prune.name,))
        check(on_cpu, tiny_bundle)
        assert engine_of(on_cpu, tiny_bundle, prune) is None

    def test_nowhere_when_it_was_added_later_and_the_hint_compiles_it(self, record, tiny_bundle):
        (prune,) = tiny_bundle.manifest.with_role(Role.PRUNE)
        others = {name: engine for name, engine in record.components.items() if name != prune.name}
        less = dataclasses.replace(record, components=others)
        check(less, tiny_bundle)
        with pytest.raises(UserError, match=f"lack {prune.name}") as refused:
            engine_of(less, tiny_bundle, prune)
        assert "--target rtx-ada --policy paper-highest" in refused.value.hint


@pytest.mark.parametrize("name", ["decoder_0.engine", "plugin.so"])
class TestFiles:
    """Engines, and the plugin: code that the process will run."""

    def test_a_tampered_one_is_refused(self, record, tmp_path, name):
        file = tmp_path / name
        file.write_bytes(b"x" * file.stat().st_size)
        check_engine_files(tmp_path, record, verify=False)
        with pytest.raises(UserError, match="was changed"):
            check_engine_files(tmp_path, record)

    def test_a_shortened_or_missing_one_is_refused(self, record, tmp_path, name):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="has 0 bytes"):
            check_engine_files(tmp_path, record, verify=False)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match="is missing"):
            check_engine_files(tmp_path, record, verify=False)


@pytest.mark.parametrize("name", ["../x.engine", "/x.engine", "sub/x.engine"])
def test_a_record_may_not_name_files_elsewhere(record, tmp_path, name):
    span = dataclasses.replace(record.components["decoder_0"], file=name)
    plugin = dataclasses.replace(record.plugin, file=name)
    for escaping in (
        dataclasses.replace(record, components={**record.components, "decoder_0": span}),
        dataclasses.replace(record, plugin=plugin),
    ):
        with pytest.raises(UserError, match="outside itself"):
            check_engine_files(tmp_path, escaping)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw.update(format=99), "reads up to"),
        (lambda raw: raw.update(format=1), "reads 2 and up"),
        (lambda raw: raw.pop("sm"), "sm is missing"),
        (lambda raw: raw.update(flavour="magic"), "magic"),
        (lambda raw: raw["limits"].update(max_prompt="long"), "max_prompt"),
    ],
)
def test_a_broken_record_is_refused_by_name(record, tmp_path, change, complaint):
    raw = json.loads((tmp_path / RECORD).read_text())
    change(raw)
    (tmp_path / RECORD).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=complaint) as refused:
        read_record(tmp_path)
    assert RECORD in str(refused.value)


def test_no_record_is_no_engines(tmp_path):
    with pytest.raises(UserError, match="has no engines"):
        read_record(tmp_path)


def test_compiled_targets_are_found_by_their_records(tmp_path):
    for name in ("rtx-ada", "a100"):
        engine_directory(tmp_path, name).mkdir(parents=True)
        (engine_directory(tmp_path, name) / RECORD).write_text("{}")
    (tmp_path / "engines" / "unfinished").mkdir()
    assert compiled_targets(tmp_path) == ("a100", "rtx-ada")


@pytest.mark.parametrize(
    ("shape", "held"), [((1, 1), True), ((1, 16), True), ((1, 17), False), ((2, 4), False), ((4,), False)]
)
def test_a_profile_holds_shapes_between_its_bounds(shape, held):
    assert PROFILE.holds({"input_ids": shape}) == held
