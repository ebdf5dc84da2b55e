"""Over HTTP, in one run: `ep-export serve` beside transformers' own server, and beside hostile clients.

Both servers are processes of their own that answer held-out questions of the shipped model, as many clients
as are told at a time, each sending a request when its last one is answered. The client is OpenAI's; the first
token comes with the first text of the answer, and CPU time is the server's alone.

`transformers serve` runs the shipped model where fastapi, opentelemetry-api and a torchvision are there that
loads: its processor prepares videos with torchvision, and its chat template opens pictures with
`torchvision.io`. PyPI's torchvision is built for CUDA's torch and does not load beside a torch for the CPU;
what ends the server is then printed in place of its line.

Then four of those clients ask alone, and again while others are hostile, one way after the other. Exits 1
where that makes their median answer take more than twice as long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx2
from bench_serve import READER, Figures, questions, reader_bundle
from openai import APIError, OpenAI
from server_process import ServerProcess, bomb, picture_message, serving

from ep_export.serving import Request

OTHERS, TWICE = 4, 2.0
CONNECTIONS = 200  # of slow clients
START_SECONDS = 180
SERVE = "import fastapi, torchvision; from transformers.cli.transformers import main; main()"


@dataclass(frozen=True)
class Side:
    """A server that runs.

    Attributes:
        name: As it is printed.
        client: Of its API.
        model: As it is asked for.
        pid: Its process.
        fields: Of every request, beside OpenAI's.
    """

    name: str
    client: OpenAI
    model: str
    pid: int
    fields: Mapping[str, Any]

    @property
    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reply:
    """Tokens of one answer, and seconds to its first text and to its end."""

    tokens: int
    first: float
    total: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--requests", type=int, default=32, help="of every side")
    parser.add_argument(
        "--tokens", type=int, default=64, help="of every answer; 0: as many as the model says"
    )
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--aside", type=Path, help="folder that transformers' packages are installed in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serve-http-") as root:
        bundle = reader_bundle(Path(root), keep=options.keep, endless=options.tokens > 0)
        requests = questions(options, prune=True)
        print(
            f"{bundle.manifest.model_name} over HTTP, float32, {options.threads} threads, {options.requests} "
            f"requests a side, answers of {options.tokens or 'their own number of'} tokens"
        )
        base: Figures | None = None
        try:
            with transformers_server(Path(root) / READER.name, options) as theirs:
                base = compare(theirs, requests, options.clients, base)
        except ServerEndedError as error:
            print(f"  transformers serve is left out, it ended with: {error}")
        with serving(bundle.path, "--threads", str(options.threads)) as server:
            for name, prune in (("full", False), (f"keep {options.keep:g}", True)):
                usage = {"stream_options": {"include_usage": True}, "extra_body": {"prune": prune}}
                side = Side(f"ep-export, {name}", api(server.url), server.model, server.process.pid, usage)
                base = compare(side, requests, options.clients, base)
            return 0 if beside_hostile_clients(server, side, requests) else 1


def compare(side: Side, requests: Sequence[Request], clients: Sequence[int], base: Figures | None) -> Figures:
    """Print one side beside the first that was printed, which is returned."""
    ask(side, requests[0])  # warm
    for count in clients:
        cpu, start = side.cpu_seconds, time.perf_counter()
        replies = ask_all(side, requests, count)
        wall = time.perf_counter() - start
        tokens, first = sum(reply.tokens for reply in replies), [1e3 * reply.first for reply in replies]
        figures = Figures(f"{side.name}, {count}", tokens, wall, side.cpu_seconds - cpu, first)
        base = base or figures
        print(figures.line(base), flush=True)
    assert base is not None
    return base


def ask_all(side: Side, requests: Sequence[Request], clients: int) -> list[Reply]:
    """So many clients, each with one request at a time."""
    replies: list[Reply] = []

    def client(number: int) -> None:
        replies.extend(ask(side, request) for request in requests[number::clients])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == len(requests), "a client failed"
    return replies


def api(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=START_SECONDS)


def ask(side: Side, request: Request) -> Reply:
    """One request; its last event has the usage."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    stream = side.client.chat.completions.create(
        model=side.model,
        messages=picture_message(request.question, *request.visuals),
        max_tokens=request.max_new_tokens,
        temperature=0,
        stream=True,
        **side.fields,
    )
    for event in stream:
        text = (event.choices and event.choices[0].delta.content) or ""
        if not first and text.strip() and "<|" not in text:  # transformers' server streams the prompt, too
            first = time.perf_counter() - start
        if event.usage:
            tokens = event.usage.completion_tokens
    return Reply(tokens, first, time.perf_counter() - start)


class ServerEndedError(Exception):
    """transformers' server ended, with what it said last."""


@contextlib.contextmanager
def transformers_server(checkpoint: Path, options: argparse.Namespace) -> Iterator[Side]:
    """`transformers serve` with one model.

    Raises:
        ServerEndedError: It does not start, or answers nothing.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(options.aside or ""), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    program = [sys.executable, "-c", SERVE, "serve"]
    log = checkpoint.with_name("transformers.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, str(checkpoint), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield Side("transformers serve", api(url), str(checkpoint), process.pid, {})
    except APIError as error:
        raise ServerEndedError(last_line(log)) from error
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers."""
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise ServerEndedError(last_line(log))
        with contextlib.suppress(httpx2.TransportError):
            httpx2.get(f"{url}/health").raise_for_status()
            return
        time.sleep(1)
    raise ServerEndedError(f"no answer within {START_SECONDS} s")


def last_line(log: Path) -> str:
    """The error that a log ends with: its last line that is not indented and names one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [number for number, line in enumerate(lines) if "Error:" in line and not line.startswith(" ")]
    return " ".join(lines[errors[-1] : errors[-1] + 2]).strip() if errors else "nothing said"


def beside_hostile_clients(server: ServerProcess, side: Side, requests: Sequence[Request]) -> bool:
    """Print others' latency with and without hostile clients; whether it stays within twice."""
    ways: dict[str, Callable[[ServerProcess, threading.Event], None]] = {
        "nobody hostile": lambda _server, over: over.wait() and None,
        f"{CONNECTIONS} slow headers": slow_headers,
        f"{CONNECTIONS} half bodies": half_bodies,
        "picture bombs": picture_bombs,
        "unread streams": unread_streams,
    }
    print(f"\n{OTHERS} clients of {side.name}, beside")
    base, within = 0.0, True
    for name, way in ways.items():
        over = threading.Event()
        hostile = threading.Thread(target=way, args=(server, over))
        hostile.start()
        try:
            totals = [reply.total for reply in ask_all(side, requests, OTHERS)]
        finally:
            over.set()
            hostile.join()
        server.waits_for(server.idle, seconds=60)
        middle, late = statistics.median(totals), statistics.quantiles(totals, n=20)[-1]
        base = base or middle
        within &= middle <= TWICE * base
        print(
            f"  {name:22} answer p50 {1e3 * middle:7.1f} ms x{middle / base:5.2f}, p95 {1e3 * late:7.1f} ms, "
            f"{server.open_files} files open after it",
            flush=True,
        )
    return within


def slow_headers(server: ServerProcess, over: threading.Event) -> None:
    hold_open(server, b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo", over)


def half_bodies(server: ServerProcess, over: threading.Event) -> None:
    hold_open(server, server.raw(server.ask(), **{"Content-Length": "10000"}), over)


def hold_open(server: ServerProcess, beginning: bytes, over: threading.Event) -> None:
    """Connections that begin a request and say no more; what the server closes is opened again."""
    held: list[socket.socket] = []
    while not over.is_set():
        with contextlib.suppress(OSError):
            held.append(server.connect())
            held[-1].sendall(beginning)
        if len(held) >= CONNECTIONS:
            over.wait(0.05)
            held.pop(0).close()
    for connection in held:
        connection.close()


def picture_bombs(server: ServerProcess, over: threading.Event) -> None:
    body = server.ask(messages=picture_message("hi", bomb()))
    while not over.is_set():
        assert server.post(body).status_code == 400


def unread_streams(server: ServerProcess, over: threading.Event) -> None:
    """One after the other, each given up when the others are done."""
    while not over.is_set():
        with server.connect() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            unread.sendall(server.raw(server.ask(stream=True, max_tokens=256)))
            over.wait(5)


if __name__ == "__main__":
    sys.exit(main())
