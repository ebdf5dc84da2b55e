"""Profiles hold every shape a session really feeds, and limits that cannot work are refused."""

import dataclasses
import shutil

import pytest
from bundles import export_tiny, two_cuts
from family_bundles import MAKERS
from tiny import make_tiny, tiny_picture

from ep_export.bundle import Bundle, Dialect, Role
from ep_export.engine.profiles import LimitsRequest, make_profiles, resolve_limits
from ep_export.engine_record import Limits
from ep_export.errors import UsageError
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Schedule, Scorer, Source, TopK
from ep_export.runtime import OnnxRuntimeRunner, Session

NEW_TOKENS = 3
SIZES = ((112, 84), (60, 300), (9, 9))


class Spy(OnnxRuntimeRunner):
    """ONNX Runtime that notes the shape of every input."""

    seen: list

    def __init__(self, file):
        super().__init__(file)
        self.component = file.stem

    def run(self, feeds, *, on_device=()):
        Spy.seen.append((self.component, {name: tuple(feed.shape) for name, feed in feeds.items()}))
        return super().run(feeds, on_device=on_device)

    def bind(self, inputs, outputs):
        bound = super().bind(inputs, outputs)

        def run(feeds, wanted):
            given = {**inputs, **feeds}
            Spy.seen.append((self.component, {name: tuple(feed.shape) for name, feed in given.items()}))
            return bound(feeds, wanted)

        return run


def shapes_of_a_session(bundle: Bundle, limits: Limits) -> list:
    """(component, shapes of its inputs) of every run of a few questions."""
    Spy.seen, Spy.capacity = [], limits.capacity
    with Session.open(bundle, runner=Spy) as session:
        pictures = [tiny_picture(*size) for size in SIZES]
        for shown in ([], *([picture] for picture in pictures), pictures[:2]):
            session.generate(shown, "which digits?", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        if not isinstance(bundle.manifest.schedule.cuts[-1].chooser, Nothing):
            session.generate(
                pictures[:1], "which?", max_new_tokens=NEW_TOKENS, keep=Keep(ratio=1.0), ignore_eos=True
            )
        if bundle.manifest.dialect.fixed_caches:
            decoder = session.decoder(slots=limits.max_batch, capacity=limits.capacity)
            for slot in range(limits.max_batch):
                decoder.admit(slot, session.prefill(session.prompts.build(pictures[:1], "which digits?")))
            decoder.step(dict.fromkeys(range(limits.max_batch), 1))
    return Spy.seen


def check_that_profiles_hold(bundle: Bundle) -> None:
    limits = resolve_limits(bundle, LimitsRequest(max_new_tokens=NEW_TOKENS))
    profiles = make_profiles(bundle, limits)
    used = set()
    for component, shapes in shapes_of_a_session(bundle, limits):
        holding = [profile.name for profile in profiles[component] if profile.holds(shapes)]
        assert holding, (component, shapes)
        used.add((component, holding[0]))
    for component in bundle.manifest.components:
        names = {name for component_used, name in used if component_used == component.name}
        if component.role is Role.DECODER:
            assert names == {"prefill", "decode"}
        elif component.role is Role.PRUNE:
            assert names == {"prefill"}


@pytest.mark.parametrize("family", MAKERS)
def test_every_shape_of_a_session_lies_in_a_profile(family, bundle_of):
    check_that_profiles_hold(bundle_of(family, Dialect.PORTABLE))


def test_caches_of_fixed_capacity_have_it_in_both_profiles(tiny_checkpoint, tmp_path):
    settings = {"schedule": two_cuts(1, 3), "keep": 0.6, "dialect": Dialect.MODERN}
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", **settings)
    check_that_profiles_hold(bundle)
    limits = resolve_limits(bundle, LimitsRequest(300, 40, 50_176, max_batch=4))
    prefill, decode = make_profiles(bundle, limits)["decoder_1"]
    dims, name = bundle.manifest.dims, "past_key_values.1.key"
    assert (
        prefill.inputs[name].minimum == prefill.inputs[name].maximum == (1, dims.kv_heads, 352, dims.head_dim)
    )
    assert decode.inputs[name].maximum == (4, dims.kv_heads, 352, dims.head_dim)
    assert decode.inputs["write_index"].minimum == (1,)
    assert decode.inputs["write_index"].optimum == decode.inputs["write_index"].maximum == (4,)
    assert resolve_limits(bundle, LimitsRequest()).max_batch == 8


def test_where_few_tokens_are_kept_less_arrives_behind_a_cut(tiny_checkpoint, tmp_path):
    """64 visual tokens of a prompt of 300: so 236 of text beside the 20 kept."""
    settings = {"schedule": two_cuts(1, 3), "keep": 0.6, "dialect": Dialect.MODERN}
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", **settings)
    limits = resolve_limits(bundle, LimitsRequest(300, 40, 50_176, 20))
    assert limits.max_behind == 236 + 20
    profiles, kv_heads = make_profiles(bundle, limits), bundle.manifest.dims.kv_heads
    for number, (longest, rows) in enumerate([(300, 352), (256, 304), (256, 304)]):
        for profile in profiles[f"decoder_{number}"]:
            assert profile.inputs[f"past_key_values.{(0, 1, 3)[number]}.key"].maximum[1:3] == (kv_heads, rows)
        assert profiles[f"decoder_{number}"][0].inputs["inputs_embeds"].maximum[1] == longest
    assert profiles["prune_1.paper-highest"][0].inputs["hidden"].maximum[1] == 256


@pytest.mark.parametrize(
    "schedule",
    [
        two_cuts(1, 3),
        two_cuts(0, 2, MaxMin(), TopK(Scorer.NORM, source=Source.ATTENTION)),
        Schedule((Cut(1, TopK(), 0.5), Cut(3, Nothing(), 0.0))),
        Schedule((Cut(0, MaxMin()),)),
    ],
    ids=("two", "from the embeddings on", "then nothing", "embeddings alone"),
)
def test_every_shape_of_several_cuts_lies_in_a_profile(schedule, tiny_checkpoint, tmp_path):
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", schedule=schedule, keep=0.4)
    check_that_profiles_hold(bundle)


def test_a_span_behind_a_cut_is_tuned_for_what_is_kept_and_takes_what_may_be(tiny_checkpoint, tmp_path):
    """A typical picture is 640 x 480: 63 visual tokens here, and 86 of text; 0.5 and 0.25 of 63 go on."""
    schedule = two_cuts(1, 2, shares=(0.5, 0.25))
    bundle = export_tiny(
        tiny_checkpoint, tmp_path / "bundle", schedule=schedule, keep=(1 + 0.5 + 2 * 0.25) / 4
    )
    limits = resolve_limits(bundle, LimitsRequest(400, 40, 50_176, 50))
    profiles = make_profiles(bundle, limits)
    spans = [profiles[f"decoder_{i}"] for i in range(3)]
    assert [span[0].inputs["inputs_embeds"].optimum[1] for span in spans] == [63 + 86, 31 + 86, 15 + 86]
    # of 400 tokens 64 are the largest picture's: 336 of text and the 50 kept
    assert [span[0].inputs["inputs_embeds"].maximum[1] for span in spans] == [400, 386, 386]
    first, second = (profiles[f"prune_{i}.paper-highest"][0].inputs for i in range(2))
    assert (first["hidden"].optimum[1], second["hidden"].optimum[1]) == (63 + 86, 31 + 86)
    assert (first["visual_index"].optimum, second["visual_index"].optimum) == ((63,), (31,))
    assert (first["keep_slots"].optimum, second["keep_slots"].optimum) == ((31,), (15,))
    # several pictures may fill a prompt; behind the first cut no more than 50 are left
    assert (first["visual_index"].maximum, second["visual_index"].maximum) == ((400,), (50,))
    assert first["keep_slots"].maximum == second["keep_slots"].maximum == (50,)


class TestQwen:
    """Limits of one bundle: pictures of up to 64 visual tokens, a context of 4096."""

    @pytest.fixture
    def bundle(self, bundle_of):
        return bundle_of("qwen2_5_vl", Dialect.PORTABLE)

    def test_bounds_are_the_limits_asked_for(self, bundle):
        limits = resolve_limits(bundle, LimitsRequest(300, 40, 50_176, 60))
        assert limits == Limits(300, 40, 50_176, 60, max_behind=300 - 64 + 60)
        profiles = make_profiles(bundle, limits)
        prefill, decode = profiles["decoder_0"]
        assert prefill.inputs["inputs_embeds"].maximum == (1, 300, 128)
        assert prefill.inputs["past_key_values.0.key"].maximum == (1, 4, 0, 16)
        # 40 new tokens: the last is never fed back, so the cache of the last step holds 300 + 39 at most.
        assert decode.inputs["past_key_values.0.key"].maximum == (1, 4, 339, 16)
        assert decode.inputs["inputs_embeds"].minimum == decode.inputs["inputs_embeds"].maximum == (1, 1, 128)
        (prune,) = profiles["prune_0.paper-highest"]
        assert prune.inputs["keep_slots"].maximum == (60,)
        assert prune.inputs["states"].maximum == (1, 300, 8, 16)
        # 50,176 pixels are 8 x 8 visual tokens of 28 x 28 pixels: 256 patches; a thin strip has more.
        assert 256 <= profiles["vision_encoder"][0].inputs["pixel_values"].maximum[0] < 512

    def test_growing_caches_decode_one_answer_at_a_time(self, bundle):
        assert resolve_limits(bundle, LimitsRequest(max_batch=1)).max_batch == 1
        with pytest.raises(UsageError, match="--max-batch 2 needs caches of fixed capacity") as caught:
            resolve_limits(bundle, LimitsRequest(max_batch=2))
        assert "--dialect modern" in caught.value.hint

    def test_a_keep_that_so_small_a_picture_cannot_meet_is_no_error(self, bundle):
        """8 of 63 on average, where the first of two layers sees all 63: the runtime will refuse it."""
        manifest = dataclasses.replace(bundle.manifest, keep=Keep(tokens=8))
        limits = resolve_limits(bundle, LimitsRequest(300, 40, 50_176))
        profiles = make_profiles(Bundle(bundle.path, manifest), limits)
        assert profiles["prune_0.paper-highest"][0].inputs["keep_slots"].optimum == (1,)

    def test_without_limits_a_large_picture_and_a_question_fit(self, bundle):
        limits = resolve_limits(bundle, LimitsRequest())
        assert limits.max_prompt >= 64 + 512
        assert limits.max_kept_tokens == limits.max_prompt

    def test_a_prompt_that_no_picture_fits_is_refused(self, bundle):
        with pytest.raises(UsageError, match="too small for one picture of 50176 pixels: 64 visual tokens"):
            resolve_limits(bundle, LimitsRequest(max_prompt=70, max_pixels=50_176))
        assert resolve_limits(bundle, LimitsRequest(max_prompt=70, max_pixels=25_088)).max_prompt == 70

    def test_more_than_the_context_is_refused(self, bundle):
        with pytest.raises(UsageError, match="exceed the context of 4096") as refused:
            resolve_limits(bundle, LimitsRequest(max_prompt=4096, max_new_tokens=2))
        assert "4095" in refused.value.hint
        assert resolve_limits(bundle, LimitsRequest(max_prompt=4095, max_new_tokens=2)).max_past == 4096


def test_a_bundle_that_was_overwritten_has_the_profiles_of_the_new_one(tmp_path):
    """In one process: the same path, another processor."""
    small = make_tiny(tmp_path / "small", max_pixels=16 * 784)
    large = make_tiny(tmp_path / "large", max_pixels=64 * 784)
    tokens = []
    for checkpoint in (small, large):
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        bundle = export_tiny(checkpoint, tmp_path / "bundle")
        limits = resolve_limits(bundle, LimitsRequest(max_prompt=300, max_new_tokens=8))
        (prune,) = make_profiles(bundle, limits)["prune_0.paper-highest"]
        tokens.append(prune.inputs["visual_index"].optimum[0])
    assert tokens[0] <= 16 < tokens[1] <= 64


def test_a_short_context_shortens_answers_not_pictures(tmp_path):
    checkpoint = make_tiny(tmp_path / "short", max_positions=128)
    bundle = export_tiny(checkpoint, tmp_path / "bundle", layer=1)
    limits = resolve_limits(bundle, LimitsRequest())
    assert limits.max_prompt + limits.max_new_tokens - 1 <= 128
    assert limits.max_new_tokens == 32
