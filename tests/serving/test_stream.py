"""Streams: read from threads and from asyncio, by nobody, twice, or by a loop that has gone."""

import asyncio
import threading

import pytest

from ep_export.errors import UserError
from ep_export.runtime import Finish
from ep_export.serving import Answer, Request, Stream

ANSWER = Answer("one two", (1, 2), Finish.END, None, {})


@pytest.fixture
def stream():
    return Stream(Request(question="which"), lambda _: None)


def feed(stream):
    stream.put("one")
    stream.put("")
    stream.put(" two")
    stream.finish(ANSWER)


def test_pieces_arrive_while_they_are_made(stream):
    pieces = iter(stream)
    stream.put("one")
    assert next(pieces) == "one"
    maker = threading.Thread(target=lambda: (stream.put(" two"), stream.finish(ANSWER)))
    maker.start()
    assert list(pieces) == [" two"]
    assert (stream.answer, list(stream)) == (ANSWER, ["one", " two"])
    maker.join()


def test_several_readers_read_the_same(stream):
    read = []
    readers = [threading.Thread(target=lambda: read.append(list(stream))) for _ in range(3)]
    for reader in readers:
        reader.start()
    feed(stream)
    for reader in readers:
        reader.join()
    assert read == [["one", " two"]] * 3


def test_asyncio_reads_what_another_thread_makes(stream):
    async def read():
        return [piece async for piece in stream]

    async def both():
        reading = asyncio.gather(read(), read())
        await asyncio.sleep(0)
        maker = threading.Thread(target=feed, args=(stream,))
        maker.start()
        pieces = await reading
        maker.join()
        return pieces

    assert asyncio.run(both()) == [["one", " two"]] * 2
    assert stream._listeners == []


def test_a_loop_that_has_gone_does_not_hurt_the_engine(stream):
    async def leave():
        pieces = stream.__aiter__()
        stream.put("one")
        assert await pieces.__anext__() == "one"
        return pieces  # its loop closes without having read the rest

    loop = asyncio.new_event_loop()
    pieces = loop.run_until_complete(leave())
    loop.close()
    stream.put(" two")
    stream.finish(ANSWER)
    assert list(stream) == ["one", " two"]
    del pieces


def test_errors_reach_whoever_reads(stream):
    stream.put("one")
    stream.fail(UserError("picture is a line"))
    pieces = iter(stream)
    assert next(pieces) == "one"
    with pytest.raises(UserError, match="picture is a line"):
        next(pieces)
    with pytest.raises(UserError, match="picture is a line"):
        _ = stream.answer

    async def read():
        return [piece async for piece in stream]

    with pytest.raises(UserError, match="picture is a line"):
        asyncio.run(read())


def test_only_the_first_cancel_before_the_end_counts():
    cancelled = []
    stream = Stream(Request(question="which"), cancelled.append)
    stream.cancel()
    stream.cancel()
    assert (cancelled, stream.cancelled) == ([stream], True)
    late = Stream(Request(question="which"), cancelled.append)
    feed(late)
    late.cancel()
    assert (cancelled, late.cancelled) == ([stream], False)
