"""What real outputs hold is known to be ours, and nothing beside it."""

import dataclasses
import json
import shutil

import pytest

from ep_export.bundle import MANIFEST, Manifest
from ep_export.engine.kit import KIT, Kit
from ep_export.engine_record import RECORD, EngineFile, EngineRecord, PluginFile
from ep_export.ownership import _KINDS, first_foreign, is_ours
from ep_export.package.triton import REPOSITORY, write_repository
from ep_export.sweep.record import SWEEP_FILE, GalleryEntry, SweepRecord
from ep_export.validate.polygraphy_run import REPORT


@pytest.mark.parametrize(
    ("marker", "kind"), [(MANIFEST, Manifest), (RECORD, EngineRecord), (KIT, Kit), (SWEEP_FILE, SweepRecord)]
)
def test_an_index_holds_what_it_is_known_by(marker, kind):
    assert _KINDS[marker].keys <= {field.name for field in dataclasses.fields(kind)}


def test_the_names_of_files_stand_where_they_are_looked_for():
    for kind, name in ((EngineFile, "file"), (PluginFile, "file"), (GalleryEntry, "picture")):
        assert name in {field.name for field in dataclasses.fields(kind)}


def test_every_kind_of_output_is_known():
    assert set(_KINDS) == {MANIFEST, RECORD, KIT, SWEEP_FILE, REPOSITORY, REPORT}


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle.path, tmp_path / "bundle")


def test_a_bundle_is_ours_to_its_last_file(bundle):
    assert is_ours(bundle, MANIFEST)
    assert first_foreign(bundle, MANIFEST) is None


@pytest.mark.parametrize("name", ["cat.png", "processor/notes.txt", "weights/more.safetensors", ".hidden"])
def test_a_file_laid_into_a_bundle_is_not(bundle, name):
    (bundle / name).touch()
    assert first_foreign(bundle, MANIFEST) == name


def test_a_bundle_of_the_first_format_is_ours_too(tmp_path):
    old = {
        "format": 1,
        "model": "tiny",
        "policy": {"layer": 2},
        "components": [{"name": "decoder_head", "file": "decoder_head.onnx"}],
        "files": [{"path": "weights/model.safetensors", "bytes": 0, "sha256": ""}],
    }
    (tmp_path / "weights").mkdir()
    (tmp_path / MANIFEST).write_text(json.dumps(old))
    (tmp_path / "decoder_head.onnx").touch()
    (tmp_path / "weights" / "model.safetensors").touch()
    assert is_ours(tmp_path, MANIFEST)
    assert first_foreign(tmp_path, MANIFEST) is None
    (tmp_path / "weights" / "photo.png").touch()
    assert first_foreign(tmp_path, MANIFEST) == "weights/photo.png"


def test_a_kit_in_a_bundle_is_ours_and_what_was_built_with_it_is_not(bundle):
    kit = bundle / "engines" / "jetson"
    kit.mkdir(parents=True)
    (kit / KIT).write_text(json.dumps({"target": "t", "limits": {}, "profiles": {}}))
    (kit / "SHA256SUMS").write_text(f"{'0' * 64}  build.sh\n{'0' * 64}  {KIT}\n")
    (kit / "build.sh").touch()
    assert first_foreign(bundle, MANIFEST) is None
    (kit / "decoder.engine").touch()  # on the device, in hours
    assert first_foreign(bundle, MANIFEST) == "engines/jetson/decoder.engine"


@pytest.mark.parametrize("name", [KIT, RECORD])
@pytest.mark.parametrize("content", ["{}", '{"target": "t"}', "[]", "x"])
def test_another_index_in_a_bundle_makes_nothing_ours(bundle, name, content):
    (bundle / "engines" / "mine").mkdir(parents=True)
    (bundle / "engines" / "mine" / name).write_text(content)
    assert first_foreign(bundle, MANIFEST) == f"engines/mine/{name}"


def test_a_manifest_that_names_other_things_than_paths_claims_nothing(tmp_path):
    named = [{"path": 7}, {"path": ["a.png"]}, "a.png", None, {"file": "a.png"}, {"path": "../a.png"}]
    index = {"format": 1, "model": "x", "components": {"path": "a.png"}, "files": named}
    (tmp_path / MANIFEST).write_text(json.dumps(index))
    (tmp_path / "a.png").touch()
    assert first_foreign(tmp_path, MANIFEST) == "a.png"


def test_an_index_that_is_a_link_to_one_is_not_ours(bundle, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / MANIFEST).symlink_to(bundle / MANIFEST)
    assert not is_ours(other, MANIFEST)


def test_a_model_repository_is_ours_to_its_last_file(tiny_bundle, tmp_path):
    out = tmp_path / "triton"
    write_repository(tiny_bundle, out)
    assert is_ours(out, REPOSITORY)
    assert first_foreign(out, REPOSITORY) is None
    (out / "models" / "mine.txt").touch()
    assert first_foreign(out, REPOSITORY) == "models/mine.txt"


def test_a_sweep_is_ours_with_its_pictures_and_its_page(tmp_path):
    index = {"format": 1, "rows": [], "gallery": [{"picture": "gallery/0.png", "question": "What?"}]}
    (tmp_path / "gallery").mkdir()
    for name in ("gallery/0.png", "report.html", "sweep.png"):
        (tmp_path / name).touch()
    (tmp_path / SWEEP_FILE).write_text(json.dumps(index))
    assert first_foreign(tmp_path, SWEEP_FILE) is None
    (tmp_path / "gallery" / "1.png").touch()
    assert first_foreign(tmp_path, SWEEP_FILE) == "gallery/1.png"


def test_a_kit_is_ours_as_far_as_its_checksums_go(tmp_path):
    (tmp_path / KIT).write_text(json.dumps({"target": "t", "limits": {}, "profiles": {}}))
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  build.sh\n{'0' * 64}  {KIT}\n")
    (tmp_path / "build.sh").touch()
    assert first_foreign(tmp_path, KIT) is None
    (tmp_path / "decoder.engine").touch()  # built on the device: hours of work
    assert first_foreign(tmp_path, KIT) == "decoder.engine"
