"""The vision encoder in every dialect on ONNX Runtime's CPU provider, and where its time goes.

The shipped model, and two blocks of published towers in full width with random weights: Qwen2.5-VL (a block
with windows, one without), Qwen2-VL (both without) and LLaVA-1.5's CLIP. Decoders are narrow, so that what is
projected into them does not count; pixels are random. All dialects run in turns: ratios to the portable one
are taken turn by turn and hold on a busy machine, milliseconds do not. Gemm is what no rewriting saves: the
last line of each table is the speed-up were everything else free.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bundles import export_tiny
from tiny import make_tiny
from tiny_llava import make_tiny_llava

from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint
from ep_export.families.base import Picture

READER = Path(__file__).resolve().parents[1] / "fixtures" / "digit-reader"
SHOWN = 8  # operators in a table
QWEN = {
    "vision_depth": 2,
    "vision_heads": 16,
    "vision_head_dim": 80,
    "vision_full_blocks": (1,),
    "window_size": 112,
}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,  # the features are those of the last but one
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Tower:
    """What is measured.

    Attributes:
        write: Makes the checkpoint in a directory, and says where it is.
        grid: Rows and columns of patches of the picture.
    """

    write: Callable[[Path], Path]
    grid: tuple[int, int]


TOWERS: Mapping[str, Tower] = {
    "shipped": Tower(lambda _: READER, (28, 22)),
    "shipped, largest picture": Tower(lambda _: READER, (32, 32)),
    "qwen2.5-vl": Tower(lambda path: make_tiny(path, vision_ffn_size=3420, **QWEN), (34, 46)),
    "qwen2-vl": Tower(lambda path: make_tiny(path, model_type="qwen2_vl", **QWEN), (34, 46)),
    "llava-1.5": Tower(lambda path: make_tiny_llava(path, vision=CLIP), (24, 24)),
}


@dataclass
class Encoder:
    """A dialect's encoder, and what was measured of it: milliseconds."""

    session: Any
    binding: Any
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self) -> NDArray[np.float32]:
        wall, cpu = time.perf_counter(), time.process_time()
        self.session.run_with_iobinding(self.binding)
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.cpu.append(1e3 * (time.process_time() - cpu))
        embeds: NDArray[np.float32] = self.binding.get_outputs()[0].numpy()
        return embeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", choices=TOWERS, action="append")
    parser.add_argument("--repeat", type=int, default=10, help="runs of each dialect")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(f"{options.threads} threads, medians of {options.repeat} runs, all dialects in turns")
    for name in options.tower or TOWERS:
        with tempfile.TemporaryDirectory(prefix="bench-vision-") as root:
            measure(name, Path(root), options)
    return 0


def measure(name: str, root: Path, options: argparse.Namespace) -> None:
    """Print one tower."""
    tower = TOWERS[name]
    checkpoint = tower.write(root / "checkpoint")
    feeds = feeds_of(checkpoint, tower.grid)
    files = {
        dialect: export_tiny(checkpoint, root / dialect.value, dialect=dialect).path / "vision_encoder.onnx"
        for dialect in Dialect
    }
    encoders = {dialect: opened(file, feeds, options.threads) for dialect, file in files.items()}
    embeds = {dialect: encoder.run() for dialect, encoder in encoders.items()}  # warms
    for _ in range(options.repeat):
        for encoder in encoders.values():
            encoder.run()
    rows, columns = tower.grid
    print(f"\n{name}: {rows * columns} patches")
    first = Dialect.PORTABLE
    for dialect, encoder in encoders.items():
        wall, cpu = (
            statistics.median(a / b for a, b in zip(old[1:], new[1:], strict=True))
            for old, new in ((encoders[first].wall, encoder.wall), (encoders[first].cpu, encoder.cpu))
        )
        apart = np.abs(embeds[dialect] - embeds[first]).max() / np.abs(embeds[first]).max()
        print(
            f"  {dialect.value:12} {statistics.median(encoder.wall[1:]):8.1f} ms, {wall:.2f} x as fast "
            f"({cpu:.2f} x in CPU time), embeddings {apart:.0e} apart"
        )
    for dialect in (first, Dialect.ONNXRUNTIME):
        kernels = kernel_times(files[dialect], feeds, root, options)
        total = kernels.total()
        shares = ", ".join(f"{kind} {ms:.1f}" for kind, ms in kernels.most_common(SHOWN))
        print(f"  {dialect.value}: {total:.1f} ms in kernels: {shares}")
        if dialect is first:
            print(f"  were all but Gemm free: {total / kernels['Gemm']:.2f} x")


def feeds_of(checkpoint: Path, grid: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Inputs of the encoder for a picture of random pixels."""
    opened = open_checkpoint(str(checkpoint))
    family, vision = opened.family, opened.config.vision_config
    rng = np.random.default_rng(0)
    rows, columns = grid
    if hasattr(vision, "spatial_merge_size"):
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = rng.standard_normal((rows * columns, values)).astype(np.float32)
    else:
        pixels = rng.standard_normal((1, 3, vision.image_size, vision.image_size)).astype(np.float32)
    size = columns * vision.patch_size, rows * vision.patch_size
    return family.vision_feeds(Picture(pixels, (1, *grid), (rows // 2, columns // 2), size), opened.config)


def opened(file: Path, feeds: Mapping[str, NDArray[Any]], threads: int) -> Encoder:
    session = onnxruntime.InferenceSession(str(file), session_options(threads))
    binding = session.io_binding()
    for name, feed in feeds.items():
        binding.bind_cpu_input(name, feed)
    binding.bind_output("visual_embeds")
    return Encoder(session, binding)


def session_options(threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return settings


def kernel_times(
    file: Path, feeds: Mapping[str, NDArray[Any]], root: Path, options: argparse.Namespace
) -> Counter[str]:
    """Operator -> milliseconds of its nodes in a run, by ONNX Runtime's profiler: minima over runs."""
    settings = session_options(options.threads)
    settings.enable_profiling, settings.profile_file_prefix = True, str(root / "profile")
    session = onnxruntime.InferenceSession(str(file), settings)
    for _ in range(options.repeat):
        session.run(None, dict(feeds))
    fastest: dict[tuple[str, str], float] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["args"]["op_name"], event["name"]
            fastest[node] = min(fastest.get(node, float("inf")), event["dur"] / 1e3)
    times: Counter[str] = Counter()
    for (kind, _), milliseconds in fastest.items():
        times[kind] += milliseconds  # type: ignore[assignment]
    return times


if __name__ == "__main__":
    sys.exit(main())
