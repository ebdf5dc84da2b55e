"""`ep-export serve`: a bundle behind OpenAI's interface, and a page to try it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ep_export.bundle import Bundle
from ep_export.cli.console import note
from ep_export.cli.options import bundle_argument
from ep_export.cli.runtime import backend_sentence, open_backend, runtime_options

__all__ = ["serve"]

_KEY = "EP_EXPORT_API_KEY"
_MIB = 1 << 20


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option("--name", metavar="M", help="What requests call the model [the bundle's model].")
@click.option(
    "--slots",
    type=click.IntRange(1),
    metavar="N",
    help="Answers at once [8, or as many as engines were compiled for].",
)
@click.option(
    "--capacity",
    type=click.IntRange(1),
    metavar="T",
    help="Longest prompt plus answer of a request, in tokens [the model's context, at most 4096].",
)
@click.option(
    "--waiting", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer."
)
@click.option("--max-pictures", type=click.IntRange(0), default=8, show_default=True, help="In a request.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=50_000_000,
    show_default=True,
    help="Of all pictures of a request.",
)
@click.option(
    "--max-body", type=click.IntRange(1), default=32, show_default=True, metavar="MIB", help="Of a request."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="S",
    help="Seconds from a request to the end of its answer.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    metavar="S",
    help="Seconds that answers under way get to finish after SIGTERM.",
)
@click.option(
    "--fetch-images",
    is_flag=True,
    help="Fetch pictures from http and https addresses, never from private networks.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name clients call this server by; may repeat [its own names; any with another --host].",
)
@runtime_options
def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    slots: int | None,
    capacity: int | None,
    waiting: int,
    max_new_tokens: int,
    max_pictures: int,
    max_pixels: int,
    max_body: int,
    timeout: float,
    grace: float,
    fetch_images: bool,
    hosts: Sequence[str],
    **backend_options: Any,
) -> None:
    """Serve a bundle: OpenAI's chat completions, metrics, and a page to try it at /.

    With EP_EXPORT_API_KEY in the environment, requests must show that key.
    """
    from ep_export.runtime import Session
    from ep_export.serve import Limits, bind, run_server, warm_up
    from ep_export.serving import Engine

    with _ending_well(), bind(host, port) as listening:
        opened = Bundle.open(bundle, verify=backend_options["verify"])
        backend = open_backend(opened, **backend_options)
        served = name or Path(opened.manifest.model).name
        key = os.environ.get(_KEY) or None
        with (
            Session.open(opened, runner=backend) as session,
            Engine(session, slots=slots, capacity=capacity, waiting=waiting) as engine,
        ):
            if sentence := backend_sentence(backend):
                note(sentence)
            warm_up(engine, opened.manifest)
            limits = Limits(
                body_bytes=max_body * _MIB,
                pictures=max_pictures,
                pixels=max_pixels,
                new_tokens=max_new_tokens,
                seconds=timeout,
                requests=engine.slots + waiting,
                fetch=fetch_images,
                stop_seconds=grace,
            )
            run_server(
                engine,
                opened.manifest,
                listening,
                name=served,
                limits=limits,
                key=key,
                hosts=hosts,
                on_start=lambda address: _say(address, served, key),
            )


@contextmanager
def _ending_well() -> Iterator[None]:
    """SIGTERM and Ctrl-C end a server as it should end: with 0.

    While it serves, uvicorn handles them, and sends itself the same signal once more when it is done.
    """
    before = {
        number: signal.signal(number, lambda *_: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(address: str, model: str, key: str | None) -> None:
    click.echo(address)
    shown = f"clients show the key in {_KEY}" if key else f"no key is asked for (set {_KEY} to ask for one)"
    note(f"model {model}; a page to try it at {address}/, OpenAI's interface at {address}/v1; {shown}")
