"""What the plugin must compute, in NumPy float64; its host library through ctypes; its own shape function."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BUDGETS",
    "LIBRARY",
    "ROOT",
    "SCORERS",
    "SELECTS",
    "UNWRITTEN",
    "HostLibrary",
    "kept_index",
    "kept_visual_index",
    "output_shapes",
    "plugin_build",
    "scores",
]

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libep_entropy_prune.so"
# What an index output of the host library holds before it is written: no sum of a position and a count.
UNWRITTEN = int(np.iinfo(np.int64).min)
SCORERS = ("paper", "released", "order2", "norm")
SELECTS = ("highest", "lowest")
BUDGETS = ("joint", "per_picture")


def scores(states: NDArray[np.float32], scorer: str) -> NDArray[np.float64]:
    """[N, H, D] -> [N]. NaN where the token is not finite."""
    finite = np.isfinite(states).all(axis=(1, 2))
    x = np.where(finite[:, None, None], states, 0).astype(np.float64)
    return np.where(finite, _finite_scores(x, scorer), np.nan)


def _finite_scores(x: NDArray[np.float64], scorer: str) -> NDArray[np.float64]:
    heads = x.shape[1]
    if scorer == "norm":
        return np.sqrt((x * x).sum(axis=(1, 2)))
    rows = x - x.mean(axis=1, keepdims=True)
    if scorer != "released":
        largest = np.abs(rows).max(axis=2, keepdims=True)
        rows = rows / np.where(
            largest > 0, largest, 1
        )  # squares of 1e-40 are zero even in float64's products
        length = np.linalg.norm(rows, axis=2, keepdims=True)
        rows = rows / np.where(length > 0, length, 1)
    gram = rows @ rows.transpose(0, 2, 1) / heads
    if scorer == "order2":
        purity = (gram * gram).sum(axis=(1, 2))
        return np.where(purity > 0, -np.log(np.where(purity > 0, purity, 1)), 0)
    eigenvalues = np.linalg.eigvalsh(gram)
    if scorer == "released":
        eigenvalues = np.maximum(eigenvalues, 1e-10)
        return -(eigenvalues * np.log(eigenvalues)).sum(axis=1) / (np.log(heads) if heads > 1 else 1)
    eigenvalues = np.where(eigenvalues > 0, eigenvalues, 1)  # 1 ln 1 = 0, the limit at 0
    return -(eigenvalues * np.log(eigenvalues)).sum(axis=1)


def kept_index(
    score: NDArray[np.float32],
    visual_index: NDArray[np.int64],
    sequence: int,
    k: int,
    select: str,
    budget: str,
) -> NDArray[np.int64]:
    """Positions of the sequence that stay, by plain sorting."""
    count = len(score)
    goodness = np.where(np.isfinite(score), score if select == "highest" else -score, -np.inf)
    order = sorted(range(count), key=lambda n: (-goodness[n], n))
    if budget == "per_picture":
        picture = np.cumsum(np.diff(visual_index, prepend=visual_index[0]) > 1)
        rank = np.empty(count, np.int64)
        seen: dict[int, int] = {}
        for n in order:
            rank[n] = seen.get(picture[n], 0)
            seen[picture[n]] = rank[n] + 1
        size = np.bincount(picture)[picture]
        share = (rank.astype(np.float32) + np.float32(0.5)) / size.astype(np.float32)
        order = sorted(range(count), key=lambda n: (share[n], n))
    dropped = {visual_index[n] for n in order[k:]}
    return np.array([p for p in range(sequence) if p not in dropped], np.int64)


def kept_visual_index(kept: NDArray[np.int64], visual_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in `kept`, the positions that stay, of those that are visual."""
    return np.flatnonzero(np.isin(kept, visual_index))


def plugin_build(preset: str = "ci") -> Path | None:
    """The build folder of a preset, or None where `make plugin` has not made it.

    `EP_PLUGIN_BUILD` and, for the preset `jetson`, `EP_PLUGIN_CROSS_BUILD` name another folder.
    """
    variable = "EP_PLUGIN_CROSS_BUILD" if preset == "jetson" else "EP_PLUGIN_BUILD"
    folder = Path(os.environ.get(variable, ROOT / "build" / "plugin" / preset))
    return folder if (folder / LIBRARY).is_file() else None


def output_shapes(build: Path, *inputs: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """What the built plugin's own getOutputShapes answers.

    Args:
        build: What `plugin_build` returns.
        inputs: Shapes of states, hidden, position_ids, visual_index and keep_slots.

    Returns:
        Shapes of kept_hidden, kept_position_ids, kept_index, kept_visual_index and scores.

    Raises:
        ValueError: With the plugin's sentence, where it refuses the inputs.
    """
    texts = [",".join(map(str, shape)) for shape in inputs]
    command = [build / "harness", build / LIBRARY, "--output-shapes", *texts]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise ValueError(run.stderr.strip())
    return tuple(tuple(map(int, line.split(","))) for line in run.stdout.split())


class _Guarded:
    """An int64 array that a library writes, between values it must leave alone."""

    GUARD, BESIDE = 64, -77

    def __init__(self, count: int) -> None:
        self._memory = np.full(count + 2 * self.GUARD, self.BESIDE, np.int64)
        self.values = self._memory[self.GUARD : -self.GUARD]
        self.values[:] = UNWRITTEN

    def check(self) -> NDArray[np.int64]:
        """The values, after a look at what lies beside them."""
        assert (self._memory[: self.GUARD] == self.BESIDE).all()
        assert (self._memory[-self.GUARD :] == self.BESIDE).all()
        return self.values


class HostLibrary:
    """The kernel's own text, compiled for this machine."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def scores(
        self, states: NDArray[np.float32], scorer: str, *, careful: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Scores [N], and which tokens took the careful path."""
        x = np.ascontiguousarray(states, np.float32)
        tokens, heads, dim = x.shape
        out = np.empty(tokens, np.float32)
        care = np.full(tokens, careful, np.uint8)
        error = self._library.ep_host_scores(
            x.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(tokens),
            heads,
            dim,
            SCORERS.index(scorer),
            out.ctypes.data_as(ctypes.c_void_p),
            care.ctypes.data_as(ctypes.c_void_p),
        )
        assert error == 0
        return out, care.astype(bool)

    def select(
        self,
        score: NDArray[np.float32],
        visual_index: NDArray[np.int64],
        sequence: int,
        k: int,
        select: str,
        budget: str,
        *,
        threads: int = 1024,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """kept_index [M] and kept_visual_index [k]; UNWRITTEN where nothing was written."""
        score = np.ascontiguousarray(score, np.float32)
        visual_index = np.ascontiguousarray(visual_index, np.int64)
        index, visual = _Guarded(sequence - len(score) + k), _Guarded(k)
        error = self._library.ep_host_select(
            score.ctypes.data_as(ctypes.c_void_p),
            visual_index.ctypes.data_as(ctypes.c_void_p),
            len(score),
            ctypes.c_int64(sequence),
            k,
            SELECTS.index(select),
            BUDGETS.index(budget),
            threads,
            index.values.ctypes.data_as(ctypes.c_void_p),
            visual.values.ctypes.data_as(ctypes.c_void_p),
        )
        assert error == 0
        return index.check(), visual.check()
