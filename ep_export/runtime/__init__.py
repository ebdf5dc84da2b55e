"""Run a bundle: ONNX Runtime, a generate loop with two KV lengths, pictures from files. No torch."""

from __future__ import annotations

from ep_export.runtime.base import Feed, Runner, RunnerFactory, Value
from ep_export.runtime.generate import Finish, Generation, KeptPicture
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.pictures import open_picture
from ep_export.runtime.prefill import Prefill
from ep_export.runtime.sampling import Sampling
from ep_export.runtime.session import Session
from ep_export.runtime.videos import open_video

__all__ = [
    "Feed",
    "Finish",
    "Generation",
    "KeptPicture",
    "OnnxRuntimeOptions",
    "OnnxRuntimeRunner",
    "Prefill",
    "Runner",
    "RunnerFactory",
    "Sampling",
    "Session",
    "Value",
    "open_picture",
    "open_video",
]
