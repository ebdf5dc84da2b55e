"""Pictures from other machines: never from private networks, never more or longer than told."""

import asyncio
import http.server
import ipaddress
import threading
import time

import pytest

from ep_export.serve.api_error import ApiError
from ep_export.serve.fetching import fetch, is_public, resolve
from ep_export.serve.limits import Limits

LIMITS = Limits(fetch=True, fetch_bytes=1000, fetch_seconds=1.0)
ANSWERS = {
    "/picture": (200, {"Content-Type": "image/png"}, b"picture"),
    "/large": (200, {"Content-Type": "image/png"}, b"x" * 5000),
    "/page": (200, {"Content-Type": "text/html"}, b"<p>"),
    "/missing": (404, {"Content-Type": "image/png"}, b""),
    "/moved": (302, {"Location": "/picture"}, b""),
    "/round": (302, {"Location": "/round"}, b""),
    "/inside": (302, {"Location": "http://inside.example/picture"}, b""),
    "/file": (302, {"Location": "file:///etc/passwd"}, b""),
}


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(3)
            return
        status, headers, body = ANSWERS[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Host", self.headers["Host"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


PUBLIC, INSIDE = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("10.0.0.7")


async def names(host: str, _port: int):
    """`outside.example` stands for a public machine, which is this one."""
    return [PUBLIC] if host == "outside.example" else [INSIDE]


def outside(port: int, path: str) -> bytes:
    url = f"http://outside.example:{port}{path}"
    return asyncio.run(
        fetch(url, LIMITS, param="x", resolving=names, permitted=lambda address: address == PUBLIC)
    )


@pytest.mark.parametrize("path", ["/picture", "/moved"])
def test_a_picture_is_fetched_from_the_address_that_was_checked(port, path):
    assert outside(port, path) == b"picture"


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/large", "more than 1000 bytes"),
        ("/page", "holds text/html, expected image"),
        ("/missing", "answers with 404"),
        ("/round", "redirects more than 3 times"),
        ("/inside", "leads into a private network"),
        ("/file", "is http or https"),
        ("/slow", "did not come within 1 seconds"),
    ],
)
def test_what_is_no_picture_or_not_for_everybody_is_refused(port, path, complaint):
    with pytest.raises(ApiError, match=complaint) as refused:
        outside(port, path)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "fetch_failed", "x")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/picture",
        "http://localhost:{port}/picture",
        "http://[::ffff:127.0.0.1]:{port}/p",
    ],
)
def test_this_machine_is_a_private_network(port, url):
    with pytest.raises(ApiError, match=r"private network|could not be fetched"):
        asyncio.run(fetch(url.format(port=port), LIMITS, param="x"))


@pytest.mark.parametrize("url", ["http://", "https://user:pass@example.com/x", "http://a b/", "http://[::1/"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ApiError):
        asyncio.run(fetch(url, LIMITS, param="x", resolving=names))


def test_what_cannot_be_reached_is_said_without_details():
    with pytest.raises(ApiError, match=r"could not be fetched: ConnectError$"):
        url = "http://outside.example:9/x"
        asyncio.run(fetch(url, LIMITS, param="x", resolving=names, permitted=lambda _: True))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - not bound
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses_are_those_of_the_internet(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_names_become_addresses():
    assert ipaddress.ip_address("127.0.0.1") in asyncio.run(resolve("localhost", 80))
