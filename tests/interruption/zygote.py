"""A process with every library loaded that runs `ep-export` in forks of itself: a run costs its work alone.

One line of JSON a run on stdin: arguments, working directory, and files for what it prints. Two lines back: the
process, then how it ended (its exit code, or minus the signal).
"""

from __future__ import annotations

import importlib
import json
import os
import sys

_LOADED = (
    "ep_export.build",
    "ep_export.engine.compile",
    "ep_export.engine.kit",
    "ep_export.export.export",
    "ep_export.measure.executors",
    "ep_export.package",
    "ep_export.sweep.report",
    "ep_export.validate.run",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "onnx",
    "onnxruntime",
    "rich.table",
    "scipy.optimize",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
)


def main() -> None:
    for name in _LOADED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not loaded: {error}", file=sys.stderr)
    print("ready", flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if not child:
            _become(run)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(run: dict[str, object]) -> None:
    """The fork: the command line's entry point, with a group of its own, as from a shell."""
    os.setsid()
    os.chdir(str(run["cwd"]))
    for descriptor, file in ((0, os.devnull), (1, run["out"]), (2, run["err"])):
        os.dup2(os.open(str(file), os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["ep-export", *run["argv"]]  # type: ignore[misc]
    from ep_export.cli import main as entry

    entry()


if __name__ == "__main__":  # a spawned worker process imports this file under another name
    main()
