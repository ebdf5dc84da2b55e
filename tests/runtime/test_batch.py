"""Several requests in one decoder: each gets the tokens it gets alone, however the others come and go."""

import numpy as np
import pytest
from bundles import export_tiny, two_cuts
from tiny import make_tiny, tiny_picture

from ep_export.bundle import Dialect
from ep_export.errors import UserError
from ep_export.policy import Keep, MaxMin, TopK
from ep_export.runtime import Session
from ep_export.runtime.batch import BatchedDecoder, SerialDecoder

TOKENS = 7
DIALECTS = {
    Dialect.PORTABLE: SerialDecoder,
    Dialect.MODERN: BatchedDecoder,
    Dialect.ONNXRUNTIME: BatchedDecoder,
}
FIXED = [Dialect.MODERN, Dialect.ONNXRUNTIME]
REQUESTS = (
    ([tiny_picture(200, 130)], "What is in this picture?", Keep(ratio=0.6)),
    ([], "Who are you?", None),
    ([tiny_picture(120, 60, seed=1), tiny_picture(60, 150, seed=2)], "And these two?", Keep(ratio=1.0)),
    ([tiny_picture(90, 90, seed=3)], "A smaller one?", Keep(tokens=3)),
)


@pytest.fixture(scope="module", params=DIALECTS, ids=lambda dialect: dialect.value)
def session(request, tmp_path_factory):
    """Two cuts, so that a request has a length of its own in each of three spans."""
    root = tmp_path_factory.mktemp("batch")
    bundle = export_tiny(
        make_tiny(root / "checkpoint"),
        root / "bundle",
        schedule=two_cuts(1, 3, TopK(), MaxMin()),
        keep=0.5,
        dialect=request.param,
    )
    with Session.open(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def prefills(session):
    return [
        session.prefill(session.prompts.build(shown, question), keep) for shown, question, keep in REQUESTS
    ]


@pytest.fixture(scope="module")
def alone(prefills, session):
    """What follows each request in caches that are as long as itself, by its own run of every span."""
    return [list(continued(session, prefill)) for prefill in prefills]


def continued(session, prefill):
    answer, token = session.continuation(prefill), int(prefill.logits.argmax())
    for _ in range(TOKENS):
        yield token
        answer.feed(token)
        token = int(answer.logits.argmax())


def test_the_decoder_is_the_one_of_the_bundle(session):
    decoder = session.decoder(slots=1, capacity=8)
    assert type(decoder) is DIALECTS[session.bundle.manifest.dialect]


def test_requests_that_come_and_go_get_the_tokens_they_get_alone(session, prefills, alone):
    assert len({tokens[-1] for tokens in map(tuple, alone)}) > 1  # else a mix-up would not show
    decoder = session.decoder(slots=3, capacity=200)
    waiting = list(enumerate(prefills)) * 2
    running, got, free = {}, {}, [0, 1, 2]
    rng = np.random.default_rng(0)
    while waiting or running:
        if waiting and free and rng.random() < 0.5:
            number, prefill = waiting.pop(0)
            slot = free.pop(int(rng.integers(len(free))))
            decoder.admit(slot, prefill)
            running[slot] = (number, [int(prefill.logits.argmax())])
        named = [slot for slot in running if rng.random() < 0.8]
        for slot, logits in decoder.step({s: running[s][1][-1] for s in named}).items() if named else ():
            running[slot][1].append(int(logits.argmax()))
        for slot in [slot for slot, (_, tokens) in running.items() if len(tokens) == TOKENS]:
            number, tokens = running.pop(slot)
            got.setdefault(number, []).append(tokens)
            decoder.release(slot)
            free.append(slot)
    assert got == {number: [tokens, tokens] for number, tokens in enumerate(alone)}


def test_caches_that_are_full_grow_and_nothing_changes(session, prefills, alone):
    prefill = prefills[0]
    filled = [prefill.caches[f"past_key_values.{layer}.key"].shape[2] for layer in (0, 1, 3)]
    decoder = session.decoder(slots=2, capacity=[rows + 2 for rows in filled])
    decoder.admit(1, prefill)
    token, tokens = int(prefill.logits.argmax()), []
    for _ in range(TOKENS):
        tokens.append(token)
        if decoder.room(1) == 0:
            decoder.grow(3)
        token = int(decoder.step({1: token})[1].argmax())
    assert tokens == alone[0]


@pytest.mark.parametrize("session", FIXED, indirect=True)
def test_a_full_slot_is_refused(session, prefills):
    longest = prefills[2].caches["past_key_values.0.key"].shape[2]
    decoder = session.decoder(slots=1, capacity=longest - 1)
    with pytest.raises(UserError, match=f"has {longest} tokens for decoder_0, its caches hold {longest - 1}"):
        decoder.admit(0, prefills[2])
    decoder = session.decoder(slots=1, capacity=longest)
    decoder.admit(0, prefills[2])
    with pytest.raises(UserError, match="slot 0 is full"):
        decoder.step({0: 1})


@pytest.mark.parametrize("session", FIXED, indirect=True)
def test_a_step_writes_into_the_caches_and_nowhere_else(session, prefills):
    decoder = session.decoder(slots=2, capacity=200)
    decoder.admit(1, prefills[0])
    (first, *_) = decoder._spans
    name, length = "past_key_values.0.value", int(first.lengths[1])
    before = first.buffers[name].numpy()
    decoder.step({1: 5})
    after = first.buffers[name].numpy()
    assert np.array_equal(before[1, :, :length], prefills[0].caches[name].numpy()[0])
    assert not np.array_equal(after[1, :, length], before[1, :, length])
    after[1, :, length] = before[1, :, length]
    assert np.array_equal(before, after)
