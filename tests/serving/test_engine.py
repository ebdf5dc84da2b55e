"""The engine as its users meet it: admission, order, cancelling, failures, closing."""

import dataclasses
import gc
import threading
import weakref

import pytest
from asking import alone
from gated import Gate, wait_until
from tiny import tiny_picture

from ep_export.errors import UsageError, UserError
from ep_export.families.base import Turn
from ep_export.policy import Keep
from ep_export.runtime import Finish
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ep_export.serving import Engine, EngineClosed, EngineFull, Request

ASK = Request(question="What is in this picture?", visuals=(tiny_picture(84, 112),), max_new_tokens=6)
SHORT = Request(question="hello", max_new_tokens=2)


@pytest.fixture
def gate(llava, monkeypatch):
    return Gate(llava, monkeypatch)


@pytest.fixture
def expected(llava):
    return alone(llava, ASK)


def at_rest(engine):
    stats = engine.stats()
    return (stats.waiting, stats.slots_in_use, stats.cache_rows_in_use, stats.cache_bytes_in_use) == (0,) * 4


def test_where_compiling_settled_nothing_there_are_eight_slots(llava, growing):
    for session in (llava, growing):
        with Engine(session, capacity=64) as engine:
            assert engine.slots == 8


def test_engines_whose_caches_grow_answer_one_by_one_in_any_number_of_slots(growing, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeRunner, "max_batch", 1)
    with Engine(growing, slots=4, capacity=256) as engine:
        assert engine.slots == 4


def test_an_answer_says_what_it_took(llava, expected):
    with Engine(llava, slots=2, capacity=256) as engine:
        answer = engine.submit(ASK).answer
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.answer)
    report = answer.prompt
    assert (report.prompt_tokens, report.visual_tokens) == (expected.prompt_tokens, expected.visual_tokens)
    text_tokens = report.prompt_tokens - report.visual_tokens
    assert report.kept_visual_tokens == (len(expected.kept_index) - text_tokens,)
    assert report.policies == expected.policies
    assert set(answer.timings_ms) == {"queued", "prepare", "prefill", "first_token", "decode", "total"}
    parts = sum(answer.timings_ms[name] for name in ("queued", "prepare", "prefill"))
    assert 0 < parts <= answer.timings_ms["first_token"] <= answer.timings_ms["total"]


def test_a_conversation_of_one_turn_is_the_question(llava, expected):
    turns = (Turn("user", (*ASK.visuals, ASK.question)),)
    with Engine(llava, slots=1, capacity=256) as engine:
        assert engine.submit(Request(turns=turns, max_new_tokens=6)).answer.token_ids == expected.token_ids


def test_between_two_prefills_running_answers_get_a_token(llava, gate):
    gate.open()
    with Engine(llava, slots=4, capacity=256) as engine:
        streams = [engine.submit(ASK) for _ in range(6)]
        for stream in streams:
            assert len(stream.answer.token_ids) == 6
    assert gate.events.count("prefill") == 6
    assert ("prefill", "prefill") not in list(zip(gate.events, gate.events[1:], strict=False))


def test_requests_are_admitted_in_the_order_they_came(llava, gate):
    with Engine(llava, slots=1, capacity=256) as engine:
        requests = [dataclasses.replace(SHORT, max_new_tokens=n) for n in (6, 2, 5, 2)]
        streams = [engine.submit(request) for request in requests]
        done = []
        for number, stream in enumerate(streams):
            gate.let(requests[number].max_new_tokens - 1)
            assert len(stream.answer.token_ids) == requests[number].max_new_tokens
            done.append([other.done for other in streams])
    assert done == [[True] * (n + 1) + [False] * (3 - n) for n in range(4)]


def test_when_the_queue_is_full_a_request_is_refused_and_may_come_again(llava, gate):
    with Engine(llava, slots=1, capacity=256, waiting=2) as engine:
        running = engine.submit(ASK)
        wait_until(lambda: engine.stats().slots_in_use == 1)
        queued = [engine.submit(SHORT) for _ in range(2)]
        with pytest.raises(EngineFull, match="2 requests wait already"):
            engine.submit(SHORT)
        assert engine.stats().refused == 1
        queued[0].cancel()
        assert queued[0].done
        queued.append(engine.submit(SHORT))
        gate.open()
        finishes = [stream.answer.finish for stream in (running, *queued)]
        assert finishes == [Finish.LENGTH, Finish.CANCELLED, Finish.LENGTH, Finish.LENGTH]
        assert at_rest(engine)


def test_a_waiting_request_is_cancelled_at_once(llava, gate):
    with Engine(llava, slots=1, capacity=256) as engine:
        engine.submit(ASK)
        wait_until(lambda: engine.stats().slots_in_use == 1)
        waiting = engine.submit(ASK)
        waiting.cancel()
        answer = waiting.answer
        assert (answer.finish, answer.text, answer.token_ids, answer.prompt) == (
            Finish.CANCELLED,
            "",
            (),
            None,
        )
        assert list(waiting) == []
        gate.open()


def test_a_running_request_is_cancelled_before_its_next_token(llava, gate, expected):
    with Engine(llava, slots=2, capacity=256) as engine:
        given_up, other = engine.submit(ASK), engine.submit(ASK)
        wait_until(lambda: engine.stats().slots_in_use == 1)
        gate.let(1)
        wait_until(lambda: engine.stats().slots_in_use == 2)
        given_up.cancel()
        given_up.cancel()
        gate.open()
        answer = given_up.answer
        assert answer.finish is Finish.CANCELLED
        assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        assert 1 <= len(answer.token_ids) < 6
        assert "".join(given_up) == answer.text
        assert other.answer.token_ids == expected.token_ids
        other.cancel()  # too late: nothing changes
        assert other.answer.finish is Finish.LENGTH
        assert not other.cancelled
        assert at_rest(engine)
        assert engine.stats().finished["cancelled"] == 1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(question="which", visuals=(tiny_picture(900, 2),)), "over 200 times as long"),
        (Request(question="hello " * 300), "needs 305 cache rows in decoder_0, a slot has 256"),
        (Request(question="<image> hello"), "special token"),
    ],
    ids=["a line", "too long", "a placeholder"],
)
def test_a_request_that_is_at_fault_fails_alone(llava, expected, request_, said):
    with Engine(llava, slots=2, capacity=256) as engine:
        before, bad, after = engine.submit(ASK), engine.submit(request_), engine.submit(ASK)
        with pytest.raises(UserError, match=said):
            list(bad)
        with pytest.raises(UserError, match=said):
            _ = bad.answer
        assert before.answer.token_ids == after.answer.token_ids == expected.token_ids
        assert (engine.stats().failed, at_rest(engine)) == (1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policies": ("norm-highest",)}, "no policy 'norm-highest'"),
        ({"keep": Keep(ratio=1.5)}, "keep is 1.5"),
        ({"keep": Keep()}, "needs a ratio"),
    ],
)
def test_what_no_bundle_could_answer_is_refused_at_once(llava, change, said):
    with Engine(llava, slots=1, capacity=256) as engine:
        with pytest.raises(UserError, match=said):
            engine.submit(dataclasses.replace(ASK, **change))
        assert engine.stats().submitted == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": "a", "max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"question": "a", "stop": ("b", "")}, "a stop text is empty"),
        ({"question": "a", "turns": (Turn("user", ("b",)),)}, "both a question and turns"),
    ],
)
def test_requests_that_mean_nothing_cannot_be_made(fields, said):
    with pytest.raises(UsageError, match=said):
        Request(**fields)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"slots": 0}, "0 slots"),
        ({"waiting": 0}, "0 places to wait"),
        ({"capacity": (256, 0)}, "0 cache rows"),
        ({"capacity": (256,)}, "1 numbers, the bundle has 2 spans"),
    ],
)
def test_an_engine_that_answers_nobody_is_not_opened(llava, shape, said):
    with pytest.raises(UsageError, match=said):
        Engine(llava, **shape)


def test_an_answer_ends_where_its_slot_does(llava, expected):
    rows = expected.prompt_tokens + 3
    with Engine(llava, slots=1, capacity=rows) as engine:
        answer = engine.submit(ASK).answer
    assert answer.token_ids == expected.token_ids[:4]  # the last one needs no row of its own
    assert answer.finish is Finish.CONTEXT


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(reader):
    with Engine(reader, slots=2, capacity=512) as engine:
        request = Request(
            question="Which digits are there?", visuals=(tiny_picture(160, 160),), max_new_tokens=8
        )
        whole = engine.submit(request).answer.text
        assert len(whole) > 2
        middle = whole[1:3]
        stream = engine.submit(dataclasses.replace(request, stop=("not this", middle)))
        assert stream.answer.text == "".join(stream) == whole[: whole.index(middle)]
        assert stream.answer.finish is Finish.STOP
        assert at_rest(engine)


def test_a_step_that_fails_fails_for_those_it_was_for(llava, gate, expected):
    with Engine(llava, slots=1, capacity=256) as engine:
        running, waiting = engine.submit(ASK), engine.submit(ASK)
        gate.fail = RuntimeError("out of something")
        gate.open()
        with pytest.raises(RuntimeError, match="out of something"):
            _ = running.answer
        assert waiting.answer.token_ids == expected.token_ids
        assert (engine.stats().failed, at_rest(engine)) == (1, True)


def test_when_the_engine_stops_everybody_hears_of_it(llava, gate):
    with Engine(llava, slots=1, capacity=256) as engine:
        running, waiting = engine.submit(ASK), engine.submit(ASK)
        gate.fail = SystemExit(3)
        gate.open()
        for stream in (running, waiting):
            with pytest.raises(EngineClosed, match="the engine stopped: 3"):
                _ = stream.answer
        assert engine.closed
        with pytest.raises(EngineClosed):
            engine.submit(SHORT)


def test_closing_finishes_what_was_promised(llava, expected):
    engine = Engine(llava, slots=2, capacity=256)
    streams = [engine.submit(ASK) for _ in range(5)]
    engine.close()
    assert [stream.answer.token_ids for stream in streams] == [expected.token_ids] * 5
    engine.close()
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.submit(SHORT)
    assert alone(llava, ASK).token_ids == expected.token_ids


def test_closing_without_draining_ends_every_stream(llava, gate):
    engine = Engine(llava, slots=1, capacity=256)
    streams = [engine.submit(ASK) for _ in range(3)]
    wait_until(lambda: engine.stats().slots_in_use == 1)
    draining = threading.Thread(target=engine.close)
    draining.start()
    wait_until(lambda: engine.closed)
    hurrying = threading.Thread(target=engine.close, kwargs={"drain": False})
    hurrying.start()
    wait_until(lambda: streams[0].cancelled)
    gate.open()
    draining.join()
    hurrying.join()
    assert [stream.answer.finish for stream in streams] == [Finish.CANCELLED] * 3
    assert at_rest(engine)


def test_a_reader_that_reads_nothing_holds_nobody_up(llava, expected):
    with Engine(llava, slots=1, capacity=256) as engine:
        unread, read = engine.submit(ASK), engine.submit(ASK)
        assert "".join(read) == expected.answer
        assert "".join(unread) == expected.answer


def test_what_has_ended_is_forgotten(llava):
    with Engine(llava, slots=2, capacity=256) as engine:
        picture = tiny_picture(84, 112)
        streams = [engine.submit(dataclasses.replace(ASK, visuals=(picture,))) for _ in range(3)]
        streams[2].cancel()
        for stream in streams:
            assert stream.answer.finish in {Finish.LENGTH, Finish.CANCELLED}
        forgotten = [weakref.ref(picture), *map(weakref.ref, streams)]
        del picture, stream, streams
        wait_until(lambda: gc.collect() >= 0 and not any(each() for each in forgotten))


def test_counters_add_up(llava, expected):
    with Engine(llava, slots=2, capacity=(256, 128), waiting=7) as engine:
        for stream in [engine.submit(ASK), engine.submit(ASK)]:
            assert stream.answer.finish is Finish.LENGTH
        stats = engine.stats()
    dims = llava.bundle.manifest.dims
    row = 2 * 4 * dims.kv_heads * dims.head_dim  # key and value, float32
    assert stats.cache_bytes == 2 * row * (2 * 256 + (dims.layers - 2) * 128)
    assert (stats.submitted, stats.finished["length"], stats.first_tokens) == (2, 2, 2)
    assert (stats.slots, stats.waiting_limit) == (2, 7)
    assert (stats.prompt_tokens, stats.generated_tokens) == (2 * expected.prompt_tokens, 12)
    assert stats.visual_tokens == 2 * expected.visual_tokens
    text_tokens = expected.prompt_tokens - expected.visual_tokens
    assert stats.kept_visual_tokens == 2 * (len(expected.kept_index) - text_tokens)
    assert 5 <= stats.decode_steps <= 10
    assert stats.first_token_seconds > 0
