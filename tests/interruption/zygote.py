"""A process with every library loaded that runs `ep-export` in forks of itself: a run costs its work alone.

One line of JSON a run on stdin: arguments, working directory, and files for what it prints. Two lines back:
the process, then how it ended (its exit code, or minus the signal).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

# Nothing that starts threads on import (onnxruntime, and what imports it): a fork would wait for them.
_LOADED = (
    "ep_export.calibrate",
    "ep_export.measure.run",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "onnx",
    "rich.table",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)


def main() -> None:
    for name in _LOADED:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if not child:
            _become(run)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(run: dict[str, object]) -> None:
    """The fork: the command line's entry point, with a group of its own, as from a shell."""
    os.setsid()
    os.chdir(str(run["cwd"]))
    told = os.dup(1)
    for descriptor, file in ((0, os.devnull), (1, run["out"]), (2, run["err"])):
        os.dup2(os.open(str(file), os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    from ep_export.__main__ import main as entry

    sys.argv = ["ep-export", *run["argv"]]  # type: ignore[misc]
    code = 1
    try:
        os.write(told, f"{os.getpid()}\n".encode())  # from here on it may be ended
        entry()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - shown as the interpreter would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the clean-up of libraries that were loaded before the fork


if __name__ == "__main__":  # a spawned worker process imports this file under another name
    main()
