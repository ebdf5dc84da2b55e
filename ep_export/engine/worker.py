"""One engine, compiled in a process of its own through Polygraphy's loaders.

A `Job` enters on stdin as JSON, an `Outcome` leaves as the last line of stdout. A process each, because the
compiler keeps several times an engine's size in memory until it ends, may abort instead of raising, and
Polygraphy chooses TensorRT or TensorRT-RTX once, when it is imported.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_export.documents import decode, encode
from ep_export.engine_record import Profile
from ep_export.targets import Flavour

__all__ = ["Job", "Outcome", "main"]


@dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
        onnx: The component.
        engine: File to write.
        flavour: TensorRT or TensorRT-RTX.
        sm: Compute capability; TensorRT-RTX compiles for it, TensorRT for the GPU that is there.
        profiles: In the order of the engine's profile indices.
        plugin: Library of the EntropyPrune plugin (TensorRT only), None to compile the node's body.
    """

    onnx: str
    engine: str
    flavour: Flavour
    sm: str
    profiles: tuple[Profile, ...]
    plugin: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it: the engine's bytes, wall seconds of parsing and compiling, the compiler's version."""

    bytes: int
    seconds: float
    version: str


def main() -> int:
    """Read a job from stdin, compile, print the outcome."""
    job = decode(Job, json.load(sys.stdin))
    outcome = _compile(job)
    sys.stdout.write("\n" + json.dumps(encode(outcome)) + "\n")
    return 0


def _compile(job: Job) -> Outcome:
    from polygraphy.backend.trt import EngineBytesFromNetwork, LoadPlugins, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    start = time.perf_counter()
    onnx = LoadPlugins([job.plugin], obj=job.onnx) if job.plugin else job.onnx
    network = NetworkFromOnnxPath(onnx, strongly_typed=True)
    engine = EngineBytesFromNetwork(network, config=_config(job))()
    with Path(job.engine).open("wb") as file:
        size = file.write(engine)
    return Outcome(size, time.perf_counter() - start, _library(job.flavour).__version__)


def _config(job: Job) -> Any:
    from polygraphy.backend.trt import PostprocessConfig

    trt = _library(job.flavour)
    options = {
        "profiles": [_profile(profile) for profile in job.profiles],
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
    }
    if job.flavour is Flavour.TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        major, minor = map(int, job.sm.split("."))
        config = CreateConfigRTX(compute_capabilities=[(major, minor)], **options)
    else:
        from polygraphy.backend.trt import CreateConfig

        config = CreateConfig(**options)

    # On by default, and its mantissa of 10 bits is too coarse: scores of EntropyPrune would swap tokens.
    def without_tf32(builder: Any, network: Any, config: Any) -> None:  # noqa: ARG001 - Polygraphy's interface
        config.clear_flag(trt.BuilderFlag.TF32)

    return PostprocessConfig(config, without_tf32)


def _profile(profile: Profile) -> Any:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    shapes_of = PolygraphyProfile()
    for name, shapes in profile.inputs.items():
        shapes_of.add(name, min=shapes.minimum, opt=shapes.optimum, max=shapes.maximum)
    return shapes_of


def _library(flavour: Flavour) -> Any:
    if flavour is Flavour.TENSORRT_RTX:
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


if __name__ == "__main__":
    sys.exit(main())
