"""A server whose limits are small enough to be reached in a test: python bounded_server.py BUNDLE."""

import signal
import sys
from pathlib import Path

from ep_export.bundle import Bundle
from ep_export.runtime import Session
from ep_export.serve import Limits, bind, run_server, warm_up
from ep_export.serving import Engine

LIMITS = Limits(
    body_bytes=1 << 20,
    body_seconds=1.5,
    header_seconds=1.5,
    pictures=2,
    pixels=1_000_000,
    new_tokens=400,
    seconds=30,
    requests=8,
    held_bytes=4 << 20,
    waiting_connections=32,
    stop_seconds=1,
)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    bundle = Bundle.open(Path(sys.argv[1]))
    with (
        bind("127.0.0.1", 0) as listening,
        Session.open(bundle) as session,
        Engine(session, slots=2, waiting=2, capacity=600) as engine,
    ):
        warm_up(engine, bundle.manifest)
        run_server(
            engine,
            bundle.manifest,
            listening,
            name="tiny",
            limits=LIMITS,
            on_start=lambda address: print(address, flush=True),
        )
