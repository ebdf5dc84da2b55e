"""A real server in a process of its own, on a free port of this machine, as it is seen from outside."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

__all__ = ["ServerProcess", "bomb", "data_url", "picture_message", "serving"]

_START_SECONDS = 120  # a loaded machine imports transformers for a while
_BOUNDED = Path(__file__).parent / "serve" / "bounded_server.py"


@dataclass
class ServerProcess:
    """A server that runs.

    Attributes:
        url: Its address.
        model: Name it serves.
        process: Of it.
    """

    url: str
    model: str
    process: subprocess.Popen[str]

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def post(self, body: Any, **options: Any) -> httpx2.Response:
        """A chat completion; `body` is JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        url = f"{self.url}/v1/chat/completions"
        return httpx2.post(url, content=content, headers=headers, timeout=60, **options)

    def ask(self, text: str = "hello", **fields: Any) -> dict[str, Any]:
        """A request as JSON."""
        fields.setdefault("messages", [{"role": "user", "content": text}])
        return {"model": self.model, "max_tokens": 4, **fields}

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def raw(self, body: dict[str, Any], **headers: str) -> bytes:
        """A chat completion as bytes on the wire."""
        content = json.dumps(body).encode()
        lines = {"Host": self.url.removeprefix("http://"), "Content-Type": "application/json"}
        lines |= {"Content-Length": str(len(content))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content

    def waits_for(self, condition: Any, *, seconds: float = 20.0) -> None:
        """Poll until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.05)

    def idle(self) -> bool:
        """Whether no request is being answered or waits."""
        health = self.get("/healthz").json()
        return (health["waiting"], health["slots_in_use"]) == (0, 0)

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def memory_mib(self) -> float:
        """Resident."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20


@contextlib.contextmanager
def serving(
    bundle: Path, *arguments: str, bounded: bool = False, environment: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Serve a bundle; at the end the server must have ended well, by SIGTERM.

    Args:
        bundle: Its directory.
        arguments: Of `ep-export serve`.
        bounded: With the small limits of serve/bounded_server.py instead of the command line.
        environment: Beside this process's own.
    """
    program = [str(_BOUNDED)] if bounded else ["-m", "ep_export", "serve", "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(
        [sys.executable, *program, str(bundle), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("http://"), f"the server did not start: {process.wait(_START_SECONDS)}"
        yield ServerProcess(line, "tiny", process)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def data_url(picture: Any, kind: str = "PNG") -> str:
    """A picture as OpenAI's clients send it."""
    stream = io.BytesIO()
    picture.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def bomb() -> Image.Image:
    """81 million pixels in some ten kilobytes."""
    return Image.new("1", (9000, 9000))


def picture_message(text: str, *pictures: Any) -> list[dict[str, Any]]:
    """Pictures and a question as one user message."""
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
