"""Polygraphy's own command with the EntropyPrune plugin registered first: `polygraphy_run.py run ENGINE ...`.

`polygraphy run --plugins` opens a library with dlopen, which suits plugins that register themselves. Ours is
registered by TensorRT, through the library's `getCreators`, so that one binary serves TensorRT 10.3 to 11.

Polygraphy imports PyTorch wherever it is installed, which takes seconds; it is hidden unless KIT_TORCH is 1.
"""

import os
import sys
from pathlib import Path


def main() -> int:
    """Register the plugin where there is one to run, then do what `polygraphy` does."""
    if os.environ.get("KIT_TORCH") != "1":
        sys.modules["torch"] = None  # as if it were not there
    plugin = Path(os.environ.get("KIT_PLUGIN", ""))
    if "--trt" in sys.argv and plugin.is_file():
        import tensorrt  # noqa: PLC0415 - not there where only ONNX Runtime is

        tensorrt.get_plugin_registry().load_library(str(plugin.resolve()))
    if "--onnxrt" in sys.argv:
        _compute_exactly()

    from polygraphy.tools import main as polygraphy  # noqa: PLC0415 - after the plugin

    return polygraphy() or 0


def _compute_exactly() -> None:
    """ONNX Runtime rounds what enters quantised products to 8 bits unless told otherwise, engines do not.

    Polygraphy's command has no option for it.
    """
    import onnxruntime  # noqa: PLC0415 - not there where only TensorRT is

    class Exact(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")

    onnxruntime.SessionOptions = Exact


if __name__ == "__main__":
    raise SystemExit(main())
