"""Shards in the bundle: links, copies where links cannot be, checksums."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ep_export.bundle import WeightsMode, hash_file
from ep_export.checkpoint import open_checkpoint
from ep_export.export.shards import Shards


def test_across_file_systems_links_become_copies_and_the_manifest_says_so(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    tensors = open_checkpoint(str(checkpoint_of("qwen2_5_vl"))).tensors
    shards = Shards(tensors.values(), tmp_path, WeightsMode.LINK)
    assert shards.mode is WeightsMode.COPY
    assert "copied" in shards.warnings[0]
    assert shards.bytes_copied == (tmp_path / "weights" / "model.safetensors").stat().st_size
    shards.close()


def test_symbolic_links_of_the_hub_cache_are_resolved_to_blobs(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint_of("qwen2_5_vl")
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
