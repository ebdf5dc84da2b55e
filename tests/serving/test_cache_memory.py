"""Cache memory: what is computed from the manifest is what prefills fill, and what really fits."""

import pytest
from gated import Gate, wait_until
from tiny import tiny_picture

from ep_export.errors import UserError
from ep_export.policy import Keep
from ep_export.runtime.onnxruntime_buffer import OrtBuffer
from ep_export.serving import Engine, Request, cache_need, requests_that_fit

QUESTION = "What is in this picture?"
NEW_TOKENS = 9


def filled(session, prefill):
    """Bytes of the caches that a prefill gave, float32."""
    return sum(4 * value.numpy().size for value in prefill.caches.values())


@pytest.mark.parametrize("keep", [None, Keep(ratio=0.5), Keep(tokens=12)])
@pytest.mark.parametrize("kind", ["twice", "llava"])
def test_the_need_of_a_prompt_is_what_its_prefill_fills(kind, keep, request):
    session = request.getfixturevalue(kind)
    manifest = session.bundle.manifest
    prompt = session.prompts.build([tiny_picture(200, 130)], QUESTION)
    prefill = session.prefill(prompt, keep)
    length, visual = prompt.input_ids.shape[1], prompt.visual_index.shape[0]
    need = cache_need(
        manifest,
        manifest.schedule,
        prompt_tokens=length,
        visual_tokens=visual,
        kept=[len(cut.kept_index) - (length - visual) for cut in prefill.cuts],
        max_new_tokens=1,
    )
    assert need.bytes == filled(session, prefill)
    rows = [
        prefill.caches[f"past_key_values.{span.layer_range.start}.key"].shape[2] for span in manifest.spans
    ]
    assert list(need.rows) == rows


def test_a_generated_token_takes_a_row_everywhere_but_the_last(twice):
    manifest = twice.bundle.manifest
    shape = {"prompt_tokens": 40, "visual_tokens": 30, "kept": (20, 10)}
    one, nine = (
        cache_need(manifest, manifest.schedule, **shape, max_new_tokens=count) for count in (1, NEW_TOKENS)
    )
    assert one.rows == (40, 30, 20)
    assert nine.rows == (48, 38, 28)


@pytest.mark.parametrize("prune", [False, True])
def test_as_many_requests_as_are_computed_are_answered_at_once(llava, monkeypatch, prune):
    """The caches that an engine reserves for them stay within the memory, and one more would not."""
    manifest = llava.bundle.manifest
    prompt = llava.prompts.build([tiny_picture(56, 56)], QUESTION)
    length, visual = prompt.input_ids.shape[1], prompt.visual_index.shape[0]
    memory = 6 * filled(llava, llava.prefill(prompt, prune=False))
    shape = {"prompt_tokens": length, "visual_tokens": visual, "max_new_tokens": NEW_TOKENS}
    keep = Keep(ratio=0.6) if prune else None
    count = requests_that_fit(manifest, memory, **shape, keep=keep, prune=prune)
    prefill = llava.prefill(prompt, keep, prune=prune)
    kept = [len(cut.kept_index) - (length - visual) for cut in prefill.cuts]
    need = cache_need(manifest, manifest.schedule if prune else None, **shape, kept=kept)

    gate = Gate(llava, monkeypatch)
    reserved, zeros = [], OrtBuffer.zeros

    def reserve(*shape):
        reserved.append(zeros(*shape))
        return reserved[-1]

    monkeypatch.setattr(OrtBuffer, "zeros", reserve)
    with Engine(llava, slots=count, capacity=need.rows) as engine:
        assert engine.stats().cache_bytes <= memory < engine.stats().cache_bytes + need.bytes
        assert engine.stats().cache_bytes == sum(buffer.value.tensor_size_in_bytes() for buffer in reserved)
        request = Request(
            question=QUESTION,
            visuals=(tiny_picture(56, 56),),
            keep=keep,
            prune=prune,
            max_new_tokens=NEW_TOKENS,
        )
        streams = [engine.submit(request) for _ in range(count + 1)]
        gate.let(count - 1)
        wait_until(lambda: engine.stats().slots_in_use == count)
        assert (engine.stats().waiting, engine.stats().cache_bytes_in_use) == (1, count * need.bytes)
        gate.open()
        assert {len(stream.answer.token_ids) for stream in streams} == {NEW_TOKENS}


def test_the_pruned_model_answers_more_at_once(llava):
    shape = {"prompt_tokens": 600, "visual_tokens": 576, "max_new_tokens": 64}
    manifest = llava.bundle.manifest
    full = requests_that_fit(manifest, 1 << 30, **shape, prune=False)
    pruned = requests_that_fit(manifest, 1 << 30, **shape, keep=Keep(ratio=0.6))
    row = 2 * 4 * manifest.dims.kv_heads * manifest.dims.head_dim
    rows = (600 + 63) * manifest.dims.layers
    assert full == (1 << 30) // (row * rows)
    kept = int((manifest.dims.layers * 0.6 - 2) * 576 / (manifest.dims.layers - 2))
    dropped = (576 - kept) * (manifest.dims.layers - 2)
    assert pruned == (1 << 30) // (row * (rows - dropped))
    assert pruned > full


def test_more_visual_tokens_than_tokens_are_refused(llava):
    with pytest.raises(UserError, match="5 visual tokens of 4"):
        requests_that_fit(llava.bundle.manifest, 1 << 20, prompt_tokens=4, visual_tokens=5, max_new_tokens=1)
