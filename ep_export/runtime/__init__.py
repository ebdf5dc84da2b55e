"""Run a bundle: spans and cuts in ONNX Runtime or TensorRT, generation, pictures from files. No torch."""

from __future__ import annotations

from ep_export.runtime.base import Feed, Runner, RunnerFactory, Value
from ep_export.runtime.components import Components
from ep_export.runtime.generate import AnswerCut, Continuation, Finish, Generation
from ep_export.runtime.kept import KeptPicture, kept_pictures
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.pictures import open_picture, read_picture
from ep_export.runtime.prefill import KeptCut, Prefill
from ep_export.runtime.sampling import Sampling
from ep_export.runtime.session import Session
from ep_export.runtime.videos import open_video

__all__ = [
    "AnswerCut",
    "Components",
    "Continuation",
    "Feed",
    "Finish",
    "Generation",
    "KeptCut",
    "KeptPicture",
    "OnnxRuntimeOptions",
    "OnnxRuntimeRunner",
    "Prefill",
    "Runner",
    "RunnerFactory",
    "Sampling",
    "Session",
    "Value",
    "kept_pictures",
    "open_picture",
    "open_video",
    "read_picture",
]
