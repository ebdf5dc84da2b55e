"""A bundle finds its checkpoint again from any folder, and says how when it has moved."""

import os
import shutil
from dataclasses import replace

import pytest
from bundles import export_tiny
from command_line import ep_export
from tiny import make_tiny

from ep_export.bundle import Bundle
from ep_export.checkpoint import open_origin
from ep_export.errors import UserError


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A bundle whose checkpoint was named by a relative path and lies elsewhere now."""
    make_tiny(tmp_path / "here" / "model", layers=2)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bundle = export_tiny("model", tmp_path / "bundle", layer=1)
    monkeypatch.chdir(tmp_path / "there")
    return bundle


def test_it_is_found_from_another_folder(moved, tmp_path):
    assert open_origin(moved).path == (tmp_path / "here" / "model").resolve()
    assert moved.manifest.model_name == "model"


def test_one_that_has_moved_is_asked_for(moved, tmp_path):
    shutil.move(tmp_path / "here" / "model", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is no longer at") as refused:
        open_origin(moved)
    assert "--model DIR" in refused.value.hint
    assert open_origin(moved, os.fspath(tmp_path / "elsewhere")).path == (tmp_path / "elsewhere").resolve()


def test_another_checkpoint_is_refused(moved, tmp_path):
    other = Bundle(moved.path, replace(moved.manifest, model_sha256="0" * 64))
    with pytest.raises(UserError, match="was built from another checkpoint"):
        open_origin(other)


def test_a_checkpoint_without_its_preprocessor_is_not_exported(tmp_path):
    checkpoint = make_tiny(tmp_path / "model", layers=2)
    (checkpoint / "preprocessor_config.json").unlink()
    arguments = (
        "--model",
        str(checkpoint),
        "--keep",
        "0.75",
        "--layer",
        "1",
        "--out",
        str(tmp_path / "bundle"),
    )
    result = ep_export("export", *arguments)
    assert result.code == 1
    assert "preprocessor_config.json" in result.err
    assert not (tmp_path / "bundle").exists()
