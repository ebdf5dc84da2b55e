"""kill -TERM: answers under way finish or say that they do not, and the process ends well."""

import json
import signal
import socket
import sys
import threading
import time

import httpx2
from command_line import ep_export
from server_process import serving


def test_every_stream_ends_properly_and_the_server_exits_with_0(tiny_bundle):
    ended: list[list[str]] = []

    def follow(server, first: threading.Barrier) -> None:
        url, body = f"{server.url}/v1/chat/completions", server.ask(stream=True, max_tokens=3000)
        lines = []
        with httpx2.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if not lines:
                    first.wait(30)
                if line:
                    lines.append(line)
        ended.append(lines)

    with serving(tiny_bundle.path, "--grace", "0.2", "--max-new-tokens", "3000") as server:
        started = threading.Barrier(9)
        threads = [threading.Thread(target=follow, args=(server, started)) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait(30)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(20) == 0
        assert time.monotonic() - told < 10
    assert len(ended) == 8
    for lines in ended:
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        whole = "choices" in last and last["choices"][0]["finish_reason"] is not None
        assert whole or last["error"]["code"] == "shutting_down"
    # 3000 tokens of 8 answers are not made in 0.2 seconds
    assert any("error" in json.loads(lines[-2].removeprefix("data: ")) for lines in ended)


def test_a_port_that_is_taken_is_one_sentence_before_anything_is_opened(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = ep_export("serve", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert result.code == 1
    assert "error: cannot listen on 127.0.0.1 port" in result.err
    assert "hint: give another --port" in result.err


def test_what_serving_needs_is_named_where_it_is_missing(tmp_path, monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith("ep_export.serve.") or name == "ep_export.serve"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = ep_export("serve", str(tmp_path))
    assert result.code == 1
    assert "needs uvicorn, which is not installed" in result.err
    assert "hint: pip install 'ep-export[serve]'" in result.err
