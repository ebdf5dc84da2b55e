"""Slow, vanishing and hostile clients: the others are answered, and nothing is left behind.

The server is a process of its own with small limits (bounded_server.py): 2 slots, 2 may wait, 1.5 seconds for
headers and for bodies, 32 connections whose request has not come whole, 1 MiB a body, 4 MiB for all, and
1 million pixels.
"""

import contextlib
import json
import socket
import struct
import threading
import time

import httpx2
import pytest
from PIL import Image
from server_process import bomb, data_url, picture_message, serving


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle.path, bounded=True) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    server.waits_for(server.idle)
    before = server.open_files
    yield
    server.waits_for(server.idle)
    server.waits_for(lambda: server.open_files <= before)


def streaming(server, tokens: int = 400) -> bytes:
    return server.raw(server.ask(stream=True, max_tokens=tokens))


def until_closed(connection: socket.socket) -> bytes:
    """Everything that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(1 << 16):
            received += block
    return received


def answered(server) -> bool:
    return server.post(server.ask()).status_code == 200


def test_many_slow_headers_keep_nobody_out_and_are_closed(server):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(200)]
        for connection in slow:
            with contextlib.suppress(OSError):  # the first ones are closed already
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo")
        assert answered(server)
        assert server.open_files < 100
        assert all(until_closed(connection) == b"" for connection in slow)


def test_headers_without_end_are_refused(server):
    with server.connect() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 18))
        assert until_closed(connection).startswith(b"HTTP/1.1 400")


def test_half_a_body_is_waited_for_no_longer_than_told(server):
    with server.connect() as connection:
        connection.sendall(server.raw(server.ask(), **{"Content-Length": "10000"}))
        assert answered(server)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in received


def test_a_body_that_trickles_on_after_its_answer_does_not_hold_the_connection(server):
    with server.connect() as connection:
        connection.sendall(
            server.raw(server.ask(), **{"Content-Type": "text/plain", "Content-Length": "9999"})
        )
        connection.settimeout(0.2)
        received, end = b"", time.monotonic() + 15
        while time.monotonic() < end:
            try:
                connection.sendall(b" ")
                block = connection.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                break
            received += block
            if not block:
                break
        else:
            pytest.fail("the connection stayed open")
    assert received.startswith(b"HTTP/1.1 415")


def test_half_a_body_and_gone_leaves_nothing(server):
    with server.connect() as connection:
        connection.sendall(server.raw(server.ask(), **{"Content-Length": "10000"}))
    assert answered(server)


def test_many_half_bodies_keep_nobody_out(server):
    """More of them than requests may be open, and than connections are waited for."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(60)]
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.sendall(server.raw(server.ask(), **{"Content-Length": "10000"}))
        assert answered(server)
        assert server.open_files < 100


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in chunks"])
def test_a_body_that_is_too_large_is_refused(server, declared):
    body = json.dumps(server.ask("x" * (2 << 20))).encode()
    content = body if declared else iter([body[: 1 << 20], body[1 << 20 :]])
    url, headers = f"{server.url}/v1/chat/completions", {"Content-Type": "application/json"}
    with contextlib.suppress(httpx2.TransportError):  # closed before all of it was sent
        response = httpx2.post(url, content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert answered(server)


def test_many_large_bodies_do_not_fill_the_memory(server):
    """4 MiB for all requests: the fifth body of nearly a MiB has no room."""
    part = server.raw(server.ask("x" * 1_000_000))
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(5)]
        for connection in held:
            connection.sendall(part[:-100])
        assert answered(server)
        answers = [until_closed(connection) for connection in held]
    assert sum(b"memory for requests is full" in answer for answer in answers) >= 1
    assert sum(answer.startswith(b"HTTP/1.1 408") for answer in answers) <= 4


def test_a_picture_bomb_is_refused_before_it_is_decoded(server):
    before = server.memory_mib
    assert len(data_url(bomb())) < 50_000
    body = server.ask(messages=picture_message("hi", bomb()))
    for _ in range(8):
        response = server.post(body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image")
        assert "81000000 pixels" in response.json()["error"]["message"]
    assert server.memory_mib < before + 50  # decoded it would be 243 MB


def test_several_pictures_share_one_budget_of_pixels(server):
    picture = Image.new("RGB", (800, 800))
    body = server.ask(messages=picture_message("hi", picture, picture))
    error = server.post(body).json()["error"]
    assert "has 640000 pixels, expected at most 360000" in error["message"]


def test_a_stream_nobody_reads_ends_and_keeps_nobody_out(server):
    with server.connect() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        unread.sendall(streaming(server))
        assert answered(server)
        server.waits_for(server.idle)


def test_clients_that_vanish_free_their_slots(server):
    with contextlib.ExitStack() as stack:
        gone = [stack.enter_context(server.connect()) for _ in range(4)]
        for connection in gone:
            connection.sendall(streaming(server))
            # closing then resets the connection, as a machine does that was switched off and on
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone[0].recv(1)
    assert answered(server)
    stats = server.get("/metrics").text
    cancelled = next(line for line in stats.splitlines() if 'finish="cancelled"' in line)
    assert float(cancelled.split()[-1]) >= 1


def test_more_than_may_wait_are_told_to_come_again(server):
    statuses: list[tuple[int, dict]] = []

    def ask() -> None:
        response = server.post(server.ask(max_tokens=200))
        statuses.append((response.status_code, dict(response.headers)))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [headers for status, headers in statuses if status == 429]
    assert {status for status, _ in statuses} == {200, 429}
    assert all(headers["retry-after"] == "1" for headers in refused)
    assert answered(server)


def test_a_page_of_another_site_may_not_ask(server):
    """Its requests come with its own name, or as a form: neither is taken."""
    named = server.post(server.ask(), headers={"Host": "elsewhere.example"})
    assert named.status_code == 400
    form = server.post(server.ask(), headers={"Content-Type": "text/plain"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "not_json")


def test_unknown_paths_and_methods_get_the_error_object(server):
    for path, status in (("/v1/completions", 404), ("/v1/chat/completions", 405), ("/../etc/passwd", 404)):
        response = server.get(path)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert server.get("/").headers["content-security-policy"].startswith("default-src 'none'")


def test_garbage_instead_of_http_is_refused(server):
    with server.connect() as connection:
        connection.sendall(bytes(range(256)) + b"\r\n\r\n")
        assert until_closed(connection).startswith(b"HTTP/1.1 400")
    assert answered(server)
