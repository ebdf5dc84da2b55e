"""What a measured number depends on besides the weights: versions, and the processor's files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from ep_export import __version__

__all__ = ["processor_fingerprint", "tool_versions"]

_CONFIG = "config.json"  # part of `Checkpoint.fingerprint`, without what changes nothing


def processor_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of the processor files; other pixels give other numbers.

    Args:
        files: `Checkpoint.processor_files`.

    Raises:
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.name != _CONFIG:
            digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    """Package name -> version of everything that decides a measured number."""
    packages = ("torch", "transformers", "numpy", "pillow")
    return {"ep-export": __version__, **{name: importlib.metadata.version(name) for name in packages}}
