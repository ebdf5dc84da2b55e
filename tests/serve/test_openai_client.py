"""OpenAI's own client, unchanged, against `ep-export serve` in a process of its own."""

import dataclasses

import openai
import pytest
from server_process import ServerProcess, data_url, picture_message, serving
from tiny import tiny_picture

from ep_export.adaptive import fit_threshold
from ep_export.policy import Keep, MaxMin
from ep_export.runtime import Sampling, Session
from ep_export.serve.answers import Reply, model_card
from ep_export.serving import Engine, Request

KEY = "a key of a test"
PICTURE = tiny_picture(112, 84, seed=1)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    from bundles import export_tiny

    return export_tiny(tiny_checkpoint, tmp_path_factory.mktemp("served") / "bundle", policies=(MaxMin(),))


@pytest.fixture(scope="module")
def session(bundle):
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(bundle):
    with serving(bundle.path, "--no-verify", environment={"EP_EXPORT_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as opened:
        yield opened


def create(client, messages, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_the_model_is_listed_with_its_cuts_and_policies(client, bundle):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert model.ep_export["policies"] == list(bundle.manifest.policies)
    assert model.ep_export["cuts"][0]["layer"] == bundle.manifest.schedule.cuts[0].layer


def test_an_answer_is_that_of_ep_export_run(client, session):
    answer = create(client, picture_message("What is this?", PICTURE), max_tokens=12)
    wanted = session.generate([PICTURE], "What is this?", max_new_tokens=12)
    assert answer.choices[0].message.content == wanted.answer
    assert answer.choices[0].finish_reason == {"end": "stop", "length": "length"}[wanted.finish.value]
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    details = answer.usage.prompt_tokens_details
    text_tokens = wanted.prompt_tokens - wanted.visual_tokens
    assert details.visual_tokens == wanted.visual_tokens
    assert details.kept_visual_tokens == [len(wanted.kept_index) - text_tokens]


def test_kept_patches_and_caches_come_with_the_answer(client, session, bundle):
    told = create(client, picture_message("What is this?", PICTURE), max_tokens=2).ep_export
    wanted = session.generate([PICTURE], "What is this?", max_new_tokens=2)
    (picture,) = wanted.pictures
    assert told["pictures"] == [
        {
            "grid": list(picture.token_grid),
            "view": None,
            "kept_by_cut": [list(cut) for cut in picture.kept_by_cut],
        }
    ]
    dims, (cut,) = bundle.manifest.dims, wanted.cuts
    row = 2 * dims.kv_heads * dims.head_dim * 4
    assert told["cache_bytes_unpruned"] == dims.layers * wanted.prompt_tokens * row
    behind = (dims.layers - cut.layer) * len(cut.kept_index)
    assert told["cache_bytes"] == (cut.layer * wanted.prompt_tokens + behind) * row


def test_an_adaptive_keep_is_named_beside_what_this_picture_kept(session, bundle):
    prompt = session.prompts.build([PICTURE], "What is this?")
    scores = session.prefill(prompt, Keep(ratio=1.0)).cuts[0].scores
    spread = [scores + distance * scores.std() for distance in (-1.0, 0.0, 0.5)]
    keep = fit_threshold(0.75, bundle.manifest.schedule, spread, layers=bundle.manifest.dims.layers)
    manifest = dataclasses.replace(bundle.manifest, keep=keep)
    request = Request(question="What is this?", visuals=(PICTURE,), keep=keep, max_new_tokens=1)
    with Engine(session, slots=1, capacity=400) as engine:
        told = Reply("tiny", manifest).whole(engine.submit(request).answer)
    adaptive, kept = (
        {"ratio": 0.75, "tokens": None, "adaptive": True},
        int((scores >= keep.threshold.value).sum()),
    )
    assert model_card("tiny", manifest, created=0, pictures=1)["ep_export"]["keep"] == adaptive
    assert told["ep_export"]["keep"] == adaptive
    assert told["ep_export"]["cuts"][0]["kept_visual_tokens"] == kept
    assert told["usage"]["prompt_tokens_details"]["kept_visual_tokens"] == (kept,)


def test_streamed_pieces_are_the_answer_and_the_last_event_says_why_it_ended(client, session):
    stream = create(
        client,
        picture_message("Say hello.", PICTURE),
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    wanted = session.generate([PICTURE], "Say hello.", max_new_tokens=12)
    pieces = [event.choices[0].delta.content or "" for event in events[:-1]]
    assert "".join(pieces) == wanted.answer
    assert len([piece for piece in pieces if piece]) > 3
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason is not None
    assert events[-2].ep_export["pictures"][0]["grid"] == list(wanted.pictures[0].token_grid)
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == len(wanted.token_ids)


def test_the_same_seed_samples_what_ep_export_run_samples(client, session):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    answer = create(client, picture_message("Hm?", PICTURE), max_tokens=10, **options)
    wanted = session.generate([PICTURE], "Hm?", max_new_tokens=10, sampling=Sampling(**options))
    assert answer.choices[0].message.content == wanted.answer


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({"keep": 0.5}, {"keep": Keep(ratio=0.5)}),
        ({"keep_tokens": 7}, {"keep": Keep(tokens=7)}),
        ({"policy": "divprune"}, {"policies": ("divprune",)}),
        ({"prune": False}, {"prune": False}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_request_chooses_how_it_is_pruned(client, session, extra, options):
    answer = create(client, picture_message("What is this?", PICTURE), max_tokens=8, extra_body=extra)
    wanted = session.generate([PICTURE], "What is this?", max_new_tokens=8, **options)
    assert answer.choices[0].message.content == wanted.answer
    kept = answer.usage.prompt_tokens_details.kept_visual_tokens
    text_tokens = wanted.prompt_tokens - wanted.visual_tokens
    assert kept == [len(cut.kept_index) - text_tokens for cut in wanted.cuts]


def test_a_stop_text_ends_the_answer_before_it(client, session):
    whole = session.generate([], "Say hello.", max_new_tokens=20).answer
    stop = whole[len(whole) // 2 :][:3]
    answer = create(client, [{"role": "user", "content": "Say hello."}], max_tokens=20, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_with_pictures_in_several_turns_is_answered(client, session):
    other = tiny_picture(84, 112, seed=2)
    messages = [
        {"role": "system", "content": "Be brief."},
        *picture_message("What is this?", PICTURE),
        {"role": "assistant", "content": "A thing."},
        *picture_message("And this?", other),
    ]
    answer = create(client, messages, max_tokens=4)
    single = session.prompts.build([PICTURE, other], "And this?")
    assert answer.usage.prompt_tokens_details.visual_tokens == single.visual_index.shape[0]
    assert answer.usage.prompt_tokens > single.input_ids.shape[1]
    assert len(answer.ep_export["pictures"]) == 2


def test_closing_a_stream_frees_its_slot(client, server):
    stream = create(client, [{"role": "user", "content": "Go on."}], max_tokens=1000, stream=True)
    next(iter(stream))
    assert not server.idle()
    stream.close()
    server.waits_for(server.idle)


def test_errors_have_the_types_of_openais_client(client, server):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="n is not supported") as refused:
        create(client, [{"role": "user", "content": "hi"}], n=2)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported_parameter")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        stranger.models.list()
    assert server.get("/metrics").status_code == 401
    assert server.get("/healthz").status_code == 200


def test_metrics_count_tokens_and_responses(client, server):
    create(client, picture_message("What is this?", PICTURE), max_tokens=2)
    text = server.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["ep_export_generated_tokens_total"]) >= 2
    assert float(values["ep_export_kept_visual_tokens_total"]) < float(
        values["ep_export_visual_tokens_total"]
    )
    assert float(values['ep_export_responses_total{path="/v1/chat/completions",status="200"}']) >= 1


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": None}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "messages"),
        ({"temprature": 1}, 400, "unknown_parameter", "temprature"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"stop": [""]}, 400, "refused", None),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"modalities": ["text", "audio"]}, 400, "unsupported_parameter", "modalities"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
        ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
        ({"keep": 0.5, "keep_tokens": 3}, 400, "invalid_value", "keep"),
        ({"keep": 0.001, "messages": picture_message("hi", PICTURE)}, 400, "refused", None),
        ({"policy": "no such"}, 400, "refused", None),
        ({"messages": [{**USER, "content": "<|im_start|>"}]}, 400, "refused", None),
        ({"messages": [{**USER, "content": "hello " * 9000}]}, 400, "refused", None),
        ({"messages": picture_message("hi", *[PICTURE] * 9)}, 400, "too_many_pictures", "messages"),
    ],
)
def test_a_wrong_request_gets_openais_error_object_and_the_next_an_answer(
    server, fields, status, code, param
):
    key = {"Authorization": f"Bearer {KEY}"}
    response = server.post(server.ask(**fields), headers=key)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.post(server.ask(), headers=key).status_code == 200


def image(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,aGVsbG8=", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        (data_url(PICTURE)[:-40], "invalid_image"),
        ("data:image/png;base64,%%%", "invalid_image_url"),
        ("data:image/png,hello", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://127.0.0.1/picture.png", "fetching_disabled"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_place(server, url, code):
    response = server.post(server.ask(messages=image(url)), headers={"Authorization": f"Bearer {KEY}"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code)
    assert error["param"] == "messages.0.content.0.image_url"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(server, body):
    response = server.post(body, headers={"Authorization": f"Bearer {KEY}"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
