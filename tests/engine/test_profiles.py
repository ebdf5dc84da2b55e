"""Profiles hold every shape a session really feeds, and limits that cannot work are refused."""

import pytest
from bundles import export_tiny
from family_bundles import MAKERS
from tiny import make_tiny, tiny_picture

from ep_export.bundle import Dialect
from ep_export.engine.profiles import (
    TOP_K_LIMIT,
    LimitsRequest,
    check_top_k,
    make_profiles,
    resolve_limits,
)
from ep_export.engine_record import Limits
from ep_export.errors import UsageError
from ep_export.policy import Keep
from ep_export.runtime import OnnxRuntimeRunner, Session
from ep_export.targets import find_target

NEW_TOKENS = 3
SIZES = ((112, 84), (60, 300), (9, 9))


class Spy(OnnxRuntimeRunner):
    """ONNX Runtime that notes the shape of every input."""

    seen: list

    def __init__(self, file):
        super().__init__(file)
        self.component = file.stem

    def run(self, feeds):
        Spy.seen.append((self.component, {name: tuple(feed.shape) for name, feed in feeds.items()}))
        return super().run(feeds)


@pytest.mark.parametrize("family", MAKERS)
def test_every_shape_of_a_session_lies_in_a_profile(family, bundle_of):
    bundle = bundle_of(family, Dialect.PORTABLE)
    limits = resolve_limits(bundle, LimitsRequest(max_new_tokens=NEW_TOKENS))
    profiles = make_profiles(bundle, limits)
    Spy.seen = []
    with Session.open(bundle, runner=Spy) as session:
        pictures = [tiny_picture(*size) for size in SIZES]
        for shown in ([], *([picture] for picture in pictures)):
            session.generate(shown, "which digits?", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        session.generate(
            pictures[:1], "which?", max_new_tokens=NEW_TOKENS, keep=Keep(ratio=1.0), ignore_eos=True
        )
    used = set()
    for component, shapes in Spy.seen:
        holding = [profile.name for profile in profiles[component] if profile.holds(shapes)]
        assert holding, (component, shapes)
        used.add((component, holding[0]))
    assert {("decoder_head", "prefill"), ("decoder_head", "decode")} <= used
    assert {("decoder_tail", "prefill"), ("decoder_tail", "decode")} <= used


class TestQwen:
    """Limits of one bundle: pictures of up to 64 visual tokens, a context of 4096."""

    @pytest.fixture
    def bundle(self, bundle_of):
        return bundle_of("qwen2_5_vl", Dialect.PORTABLE)

    def test_bounds_are_the_limits_asked_for(self, bundle):
        limits = resolve_limits(bundle, LimitsRequest(300, 40, 50_176, 60))
        assert limits == Limits(300, 40, 50_176, 60)
        profiles = make_profiles(bundle, limits)
        prefill, decode = profiles["decoder_head"]
        assert prefill.inputs["inputs_embeds"].maximum == (1, 300, 128)
        assert prefill.inputs["keep_slots"].maximum == (60,)
        assert prefill.inputs["past_key_values.0.key"].maximum == (1, 4, 0, 16)
        # 40 new tokens: the last is never fed back, so the cache of the last step holds 300 + 39 at most.
        assert decode.inputs["past_key_values.0.key"].maximum == (1, 4, 339, 16)
        assert decode.inputs["inputs_embeds"].minimum == decode.inputs["inputs_embeds"].maximum == (1, 1, 128)
        # 50,176 pixels are 8 x 8 visual tokens of 28 x 28 pixels: 256 patches; a thin strip has more.
        assert 256 <= profiles["vision_encoder"][0].inputs["pixel_values"].maximum[0] < 512

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

    def test_more_than_topk_takes_is_refused_before_anything_is_built(self, bundle):
        target = find_target("rtx-ada")
        limits = resolve_limits(bundle, LimitsRequest(max_prompt=4000, max_new_tokens=1))
        with pytest.raises(UsageError, match="up to 4000 visual tokens, expected fewer than 3840") as refused:
            check_top_k(limits, target)
        assert f"--max-kept-tokens {TOP_K_LIMIT - 1}" in refused.value.hint
        narrowed = LimitsRequest(max_prompt=4000, max_new_tokens=1, max_kept_tokens=TOP_K_LIMIT - 1)
        check_top_k(resolve_limits(bundle, narrowed), target)


def test_a_short_context_shortens_answers_not_pictures(tmp_path):
    checkpoint = make_tiny(tmp_path / "short", max_positions=128)
    bundle = export_tiny(checkpoint, tmp_path / "bundle", layer=1)
    limits = resolve_limits(bundle, LimitsRequest())
    assert limits.max_prompt + limits.max_new_tokens - 1 <= 128
    assert limits.max_new_tokens == 32
