"""Many requests at once, each as different from the others as can be: everyone gets what it gets alone."""

import random
import threading
import time
from functools import partial

import pytest
from asking import alone, random_requests
from bundles import export_tiny
from digit_scenes import held_out
from tiny import make_tiny
from tiny_llava import make_tiny_llava_next
from tiny_llava_onevision import make_tiny_llava_onevision
from tiny_smolvlm import make_tiny_smolvlm
from tiny_video_llava import make_tiny_video_llava

from ep_export.bundle import Dialect
from ep_export.policy import Keep, MaxMin
from ep_export.runtime import Finish, Sampling, Session
from ep_export.serving import Engine, Request

QUESTIONS = ("What is in this picture?", "which digits are there", "hello")
TINY = {"questions": QUESTIONS, "sides": (56, 160)}
KINDS = {
    "twice": {
        "policies": [(), ("divprune",), ("paper-highest", "nothing"), ("divprune", "paper-highest")],
        "keeps": [None, 0.5, Keep(tokens=9)],
    },
    "llava": {"policies": [(), ("divprune",)], "keeps": [None, 0.6, 1.0]},
    "growing": {"policies": [(), ("divprune",)], "keeps": [None, 0.6, 1.0]},
}
FAMILIES = {  # those that no other bundle of these tests has
    "qwen2_vl": partial(make_tiny, model_type="qwen2_vl"),
    "llava_next": make_tiny_llava_next,
    "llava_onevision": make_tiny_llava_onevision,
    "smolvlm": make_tiny_smolvlm,
    "video_llava": make_tiny_video_llava,
}
WITH_VIDEOS = {"qwen2_vl", "video_llava"}


def reader_requests(count):
    """Held-out questions about digits, under several policies and keeps."""
    draw = random.Random(4)  # noqa: S311 - no secret
    policies = [(), (), ("divprune",), ("random-3",), ("norm-lowest",)]
    requests = [
        Request(
            question=question.text,
            visuals=(scene.picture,),
            keep=draw.choice([None, Keep(ratio=0.5), Keep(ratio=0.125), Keep(tokens=40)]),
            policies=draw.choice(policies),
            prune=draw.random() < 0.8,
            sampling=draw.choice([None, None, Sampling(temperature=1.2, seed=draw.randint(0, 9))]),
            max_new_tokens=draw.randint(1, 8),
        )
        for scene, question in held_out(count, seed=5)
    ]
    return [
        request if request.prune else Request(**{**vars(request), "keep": None, "policies": ()})
        for request in requests
    ]


def serve(engine, requests, *, seed, threads=4, cancelled=0.25):
    """Submit from several threads, in random order and at random moments; give some of them up."""
    draw = random.Random(seed)  # noqa: S311
    order = list(range(len(requests)))
    draw.shuffle(order)
    plans = [(number, draw.random() < cancelled, draw.randint(0, 3), draw.random() / 50) for number in order]
    streams = {}

    def client(mine):
        for number, gives_up, pieces, pause in mine:
            time.sleep(pause)
            stream = streams[number] = engine.submit(requests[number])
            if gives_up:
                for _, _ in zip(range(pieces), stream, strict=False):
                    pass
                stream.cancel()

    clients = [threading.Thread(target=client, args=(plans[i::threads],)) for i in range(threads)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return streams


def assert_exact(session, requests, *, repeated, slots):
    """`requests`, each `repeated` times, in an engine of so many slots."""
    expected = [alone(session, request) for request in requests] * repeated
    with Engine(session, slots=slots, capacity=1024, waiting=repeated * len(requests)) as engine:
        streams = serve(engine, requests * repeated, seed=1)
        for number, stream in streams.items():
            answer, other = stream.answer, expected[number]
            if answer.finish is Finish.CANCELLED:
                assert answer.token_ids == other.token_ids[: len(answer.token_ids)]
                continue
            assert answer.token_ids == other.token_ids
            assert answer.text == "".join(stream) == other.answer
            assert (answer.finish, answer.prompt.keep) == (other.finish, other.keep)
            assert (answer.prompt.cuts, answer.prompt.kept_index) == (other.cuts, other.kept_index)
            assert answer.prompt.pictures == other.pictures
        stats = engine.stats()
    assert sum(stats.finished.values()) == stats.submitted == len(streams) == repeated * len(requests)
    assert (stats.slots_in_use, stats.waiting, stats.cache_bytes_in_use, stats.failed) == (0, 0, 0, 0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The name of a family and a random model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = FAMILIES[request.param](folder / "checkpoint")
    bundle = export_tiny(
        checkpoint, folder / "bundle", layer=1, dialect=Dialect.ONNXRUNTIME, policies=(MaxMin(),)
    )
    with Session.open(bundle, threads=1) as session:
        yield request.param, session


def test_every_family_answers_many_as_it_answers_one(family):
    name, session = family
    drawn = random_requests(12, seed=6, **TINY, **KINDS["llava"], videos=name in WITH_VIDEOS)
    assert_exact(session, drawn, repeated=2, slots=5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_request_gets_what_it_gets_alone(kind, request):
    session = request.getfixturevalue(kind)
    assert_exact(session, random_requests(24, seed=3, **TINY, **KINDS[kind]), repeated=2, slots=5)


def test_the_shipped_model_answers_many_as_it_answers_one(reader):
    assert_exact(reader, reader_requests(30), repeated=2, slots=8)
