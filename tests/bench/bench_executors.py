"""What an executor costs a unit: a broken picture is refused at once, so that nothing else takes time.

.venv/bin/python tests/bench/bench_executors.py [UNITS]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import question_about
from tiny import make_tiny

from ep_export.checkpoint import open_checkpoint
from ep_export.measure.bench import Setting
from ep_export.measure.executors import Executor, InProcess, Job, Processes, Unit
from ep_export.measure.on_ray import OnRay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("units", nargs="?", type=int, default=500)
    count = parser.parse_args().units
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(str(make_tiny(Path(folder) / "tiny", layers=2)))
        broken = Path(folder) / "broken.png"
        broken.write_bytes(b"no picture")
        job = Job(checkpoint, Setting((), draws=1, seed=0, max_new_tokens=1, device="cpu"))
        units = [Unit(question_about(broken, f"What is {n}?"), entropies=False) for n in range(count)]
        executors: dict[str, Executor] = {
            "in this process": InProcess(),
            "2 processes": Processes(2),
            "Ray, 2 workers": OnRay("local", 2),
        }
        for name, executor in executors.items():
            moments = [time.perf_counter() for _ in executor.run(job, units)]
            each = (moments[-1] - moments[9]) / (count - 10)  # workers have their models by then
            print(f"{name:>16}: {each * 1e3:.2f} ms a unit, {count} units")


if __name__ == "__main__":
    main()
