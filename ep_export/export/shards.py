"""Bringing the checkpoint's shards into the bundle: hard links, or copies where links cannot be.

ONNX Runtime refuses symbolic links, `..` and absolute paths for external data, so shards must lie below the
bundle. A hard link makes them lie there without copying a byte; the hub cache's symbolic links are resolved
to the blobs first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from ep_export.bundle import WeightsMode
from ep_export.checkpoint import TensorRef
from ep_export.errors import UserError
from ep_export.links import copy, link

__all__ = ["FOLDER", "Shards"]

FOLDER = "weights"
_HASH_BLOCK = 1 << 22
_HASH_THREADS = 2  # a disk of 3 GB/s feeds about two; more would only compete with the rest of the export


class Shards:
    """The shards of one bundle.

    Shards are hashed in background threads meanwhile; hashlib releases the interpreter lock.

    Args:
        tensors: All tensors the bundle refers to.
        bundle: The bundle's directory.
        mode: What was asked for; see `mode` for what happened.

    Raises:
        UserError: Two shards have the same name, or there is no space for copies.
    """

    def __init__(self, tensors: Iterable[TensorRef], bundle: Path, mode: WeightsMode) -> None:
        self.mode = mode
        self.warnings: list[str] = []
        self.bytes_copied = 0
        self._bundle = bundle
        self._location: dict[Path, str] = {}
        (bundle / FOLDER).mkdir()
        for file in sorted({ref.file for ref in tensors}):
            location = f"{FOLDER}/{file.name}"
            if location in self._location.values():
                raise UserError(f"two shards of the checkpoint are named {file.name}")
            self._place(file, bundle / location)
            self._location[file] = location
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max_workers=_HASH_THREADS, thread_name_prefix="hash")
        self._hashes: dict[str, Future[str]] = {
            location: self._pool.submit(self._hash, bundle / location) for location in self._location.values()
        }

    def own(self, location: str) -> Path:
        """Where a shard of the bundle's own is to be written; announce it with `add` when it is whole."""
        return self._bundle / location

    def add(self, file: Path) -> None:
        """A shard of the bundle's own, written."""
        location = f"{FOLDER}/{file.name}"
        self._location[file] = location
        self._hashes[location] = self._pool.submit(self._hash, file)

    def place(self, ref: TensorRef) -> tuple[str, Path]:
        """(location relative to the ONNX files, the bundle's directory) of a tensor's shard."""
        return self._location[ref.file], self._bundle

    def checksums(self) -> Mapping[str, str]:
        """SHA-256 of every shard by path in the bundle; waits for the background threads."""
        return {location: future.result() for location, future in self._hashes.items()}

    def close(self) -> None:
        """Stop hashing at once, e.g. after Ctrl-C: the interpreter waits for its threads."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _hash(self, file: Path) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(_HASH_BLOCK))
        with file.open("rb", buffering=0) as stream:
            while (count := stream.readinto(block)) and not self._stop.is_set():
                digest.update(block[:count])
        return digest.hexdigest()

    def _place(self, source: Path, target: Path) -> None:
        if self.mode is WeightsMode.LINK:
            blob = source.resolve()
            refused = link(blob, target)
            if not refused:
                return
            self.mode = WeightsMode.COPY
            self.warnings.append(f"weights were copied: {blob.parent} allows no hard links here ({refused})")
        hint = "put the bundle on the checkpoint's file system, where weights are linked instead"
        self.bytes_copied += copy(source, target, hint=hint)
