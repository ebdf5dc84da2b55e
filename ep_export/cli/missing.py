"""A package that is not installed: which extra brings it."""

from __future__ import annotations

__all__ = ["missing_package"]

_EXTRAS = {
    "av": "video",
    "cuda": "tensorrt",
    "matplotlib": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "optimum": "optimum",
    "polygraphy": "export",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "ray": "ray",
    "starlette": "serve",
    "tensorrt_rtx": "rtx",
    "torch": "export",
    "uvicorn": "serve",
}


def missing_package(error: ModuleNotFoundError) -> tuple[str, str] | None:
    """A sentence and a hint for a package that is left out on purpose where it is not needed.

    Args:
        error: What an import raised.

    Returns:
        None where no extra brings it: a fault of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package == "onnxruntime":
        return (
            "ONNX Runtime is not installed",
            "pip install 'ep-export[cpu]', or 'ep-export[gpu]' for CUDA; on a Jetson NVIDIA's own wheel",
        )
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    first = "pip install torch (on a CPU from PyTorch's index of CPU wheels, or CUDA comes along), then "
    return (
        f"this verb needs {package}, which is not installed",
        f"{first if package == 'torch' else ''}pip install 'ep-export[{extra}]'",
    )
