"""Engines say what they are for, and what is not for here is refused before it is loaded."""

import dataclasses
import json

import pytest

from ep_export.bundle import Bundle, Dialect, Precision, hash_file
from ep_export.engine_record import (
    RECORD,
    EngineFile,
    EngineRecord,
    Limits,
    Profile,
    ShapeRange,
    bundle_fingerprint,
    check_engine,
    check_engine_files,
    compiled_targets,
    engine_directory,
    read_record,
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
        engines[component.name] = EngineFile(file.name, hash_file(file), file.stat().st_size, 0.5, (PROFILE,))
    made = EngineRecord(
        target="rtx-ada",
        sm="8.9",
        flavour=Flavour.TENSORRT_RTX,
        version="1.7.1.116",
        cuda="12",
        bundle=bundle_fingerprint(tiny_bundle.manifest),
        model="tiny",
        dialect=Dialect.PORTABLE,
        precision=Precision.FP32,
        limits=Limits(256, 64, 200_704, 128),
        components=engines,
        plugin=False,
        made_by={"ep-export": "0"},
    )
    write_record(tmp_path, made)
    return made


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


def test_engines_of_another_bundle_are_refused(record, tiny_bundle):
    changed = dataclasses.replace(
        tiny_bundle.manifest,
        files=tuple(
            dataclasses.replace(entry, sha256="0" * 64) if entry.path.startswith("weights/") else entry
            for entry in tiny_bundle.manifest.files
        ),
    )
    with pytest.raises(UserError, match="another bundle"):
        check(record, Bundle(tiny_bundle.path, changed))


def test_the_fingerprint_ignores_reports_and_engines(tiny_bundle):
    manifest = tiny_bundle.manifest
    extra = dataclasses.replace(manifest.files[0], path="report/report.json")
    more = dataclasses.replace(manifest, files=(*manifest.files, extra), verified={"x": "y"})
    assert bundle_fingerprint(more) == bundle_fingerprint(manifest)


def test_a_missing_component_is_named(record, tiny_bundle):
    less = {name: engine for name, engine in record.components.items() if name != "decoder_tail"}
    with pytest.raises(UserError, match="lack decoder_tail"):
        check(dataclasses.replace(record, components=less), tiny_bundle)


def test_a_tampered_engine_is_refused(record, tmp_path):
    file = tmp_path / "decoder_head.engine"
    file.write_bytes(b"x" * file.stat().st_size)
    check_engine_files(tmp_path, record, verify=False)
    with pytest.raises(UserError, match="was changed"):
        check_engine_files(tmp_path, record)


def test_a_shortened_or_missing_engine_is_refused(record, tmp_path):
    (tmp_path / "decoder_head.engine").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes"):
        check_engine_files(tmp_path, record, verify=False)
    (tmp_path / "decoder_head.engine").unlink()
    with pytest.raises(UserError, match="is missing"):
        check_engine_files(tmp_path, record, verify=False)


@pytest.mark.parametrize("name", ["../x.engine", "/x.engine", "sub/x.engine"])
def test_a_record_may_not_name_files_elsewhere(record, tmp_path, name):
    head = dataclasses.replace(record.components["decoder_head"], file=name)
    escaping = dataclasses.replace(record, components={**record.components, "decoder_head": head})
    with pytest.raises(UserError, match="outside itself"):
        check_engine_files(tmp_path, escaping)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw.update(format=99), "reads up to"),
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
