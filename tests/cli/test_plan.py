"""`ep-export plan`: what a person waits for comes first, and everything is said to scripts too."""

import json

import pytest
from command_line import ep_export
from tiny import make_tiny

from ep_export.checkpoint import open_config
from ep_export.fit import FORMULAS
from ep_export.planning import layer_flops

SEVEN = ("--model", "qwen2.5-vl-7b")
KEEP = ("--keep", "0.25")


def said(*options):
    result = ep_export("plan", *options, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def refused(*options):
    result = ep_export("plan", *options)
    assert result.code, result.out
    return result.err


def test_json_says_the_first_token_end_to_end():
    plan = said(*SEVEN, *KEEP)
    vision, prefill = plan["vision_flops"], plan["prefill_flops"]
    assert plan["first_token"] == {side: vision + prefill[side] for side in ("full", "pruned")}
    dims = open_config("qwen2.5-vl-7b").dims
    assert prefill["full"] == 28 * layer_flops(dims, 391 + 86)
    # 7.6 and 0.7 billion parameters of decoder and encoder in bfloat16.
    assert plan["weights_bytes"] == pytest.approx(2 * (7.6e9 + 0.7e9), rel=0.01)


def test_a_tied_table_is_stored_once():
    """2.2 billion parameters; with a table of its own lm_head would add a tenth."""
    assert said("--model", "qwen2-vl-2b", *KEEP, "--layer", "2")["weights_bytes"] == pytest.approx(
        2 * 2.21e9, rel=0.01
    )


def test_lighter_weights_are_fewer_bytes():
    none, int8, int4 = (
        said(*SEVEN, *KEEP, "--weights", kind)["weights_bytes"] for kind in ("none", "int8", "int4")
    )
    assert none > 1.5 * int8 > 2 * int4
    with_vision = said(*SEVEN, *KEEP, "--weights", "int4", "--vision-weights", "int8")["weights_bytes"]
    assert int4 - with_vision == pytest.approx(0.68e9, rel=0.02)  # a byte less of each of the encoder's


def test_the_vision_encoder_is_not_rounded_alone():
    message = refused(*SEVEN, *KEEP, "--vision-weights", "int8")
    assert "go with those of the decoder" in message
    assert "--weights int8" in message


def test_the_table_leads_with_the_first_token_and_explains_the_keep():
    result = ep_export("plan", *SEVEN, *KEEP)
    rows = [line.strip().split("  ")[0] for line in result.out.splitlines() if line.strip()]
    assert rows.index("to the first token") < rows.index("vision encoder") < rows.index("decoder prefill")
    assert "86 of 391 visual tokens: 22 % after layer 1 = 25 % on average over 28 layers" in result.err
    assert "KV cache of visual tokens, all layers, fp16" in result.out
    assert "iB" not in result.out


class TestPictures:
    def test_its_size_decides_tokens_and_encoder(self):
        small, large = (said(*SEVEN, *KEEP, "--picture", size) for size in ("320x240", "1280x960"))
        assert (small["visual_tokens"], large["visual_tokens"]) == (11 * 9, 46 * 34)
        assert large["vision_flops"] > 15 * small["vision_flops"]

    def test_scaling_down_is_another_size(self):
        scaled = said(*SEVEN, *KEEP, "--picture", "1280x960", "--max-pixels", str(320 * 240))
        assert scaled == said(*SEVEN, *KEEP, "--picture", "320x240")

    def test_a_video_is_its_parts(self):
        one, eight = (said(*SEVEN, *KEEP, "--frames", frames) for frames in ("2", "16"))
        assert eight["visual_tokens"] == 8 * one["visual_tokens"] == 8 * 391
        assert eight["vision_flops"] == 8 * one["vision_flops"]

    def test_visual_tokens_alone_come_near(self):
        exact = said(*SEVEN, *KEEP, "--picture", "1280x960")
        near = said(*SEVEN, *KEEP, "--visual-tokens", str(exact["visual_tokens"]))
        assert near["vision_flops"] == pytest.approx(exact["vision_flops"], rel=0.01)
        assert near["prefill_flops"] == exact["prefill_flops"]

    def test_a_checkpoints_own_processor_decides_what_it_shows(self, tmp_path):
        model = make_tiny(tmp_path / "model", max_pixels=56 * 784)
        plan = said("--model", str(model), "--keep", "0.5", "--layer", "1")
        assert plan["visual_tokens"] <= 56

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--picture", "0x5"), "no size"),
            (("--picture", "640"), "no size"),
            (("--picture", "9x9", "--visual-tokens", "4"), "exclude each other"),
            (("--picture", "9000x20"), "cannot be prepared"),
        ],
    )
    def test_what_is_no_picture_is_refused(self, options, message):
        assert message in refused(*SEVEN, *KEEP, *options)

    def test_a_family_without_videos_says_so(self):
        assert "takes no videos" in refused("--model", "llava-1.5-7b", *KEEP, "--frames", "8")


class TestOnATarget:
    def test_it_is_an_estimate_and_says_how_it_is_made(self):
        result = ep_export("plan", *SEVEN, *KEEP, "--target", "jetson-orin-nx-16gb")
        assert result.code == 0, result.err
        for part in ("estimate", "does not fit", "time to first token", "embedding table: on the host"):
            assert part in result.out
        for name in FORMULAS:
            assert f"  {name}: " in result.err

    def test_time_and_memory_by_part(self):
        plan = said(*SEVEN, *KEEP, "--target", "jetson-orin-agx-64gb")
        assert plan["fits"] is True
        assert plan["target"]["fits"] == {"full": True, "pruned": True}
        assert plan["target"]["formulas"] == dict(FORMULAS)
        assert plan["first_token_ms"]["pruned"] < plan["first_token_ms"]["full"]
        for side in plan["memory"].values():
            assert side["total"] == sum(side[part] for part in ("weights", "caches", "activations"))
            assert side["embedding"] == 2 * 152_064 * 3584  # on the host
        assert "suggestions" not in plan

    def test_what_does_not_fit_says_so_and_what_would(self):
        plan = said(*SEVEN, *KEEP, "--target", "jetson-orin-nx-16gb")
        assert plan["fits"] is False
        assert {each["model"] for each in plan["suggestions"]} == {"qwen2.5-vl-7b", "qwen2.5-vl-3b"}
        for each in plan["suggestions"]:
            options = ("--model", each["model"], "--keep", str(each["keep"]), "--weights", each["weights"])
            again = said(*options, "--layer", "1", "--target", "jetson-orin-nx-16gb")
            assert again["fits"] is True
            assert again["memory"]["pruned"]["total"] == each["total_bytes"]

    def test_less_kept_is_suggested_where_caches_are_what_does_not_fit(self):
        shown = (*SEVEN, "--frames", "64", "--weights", "int4", "--target", "jetson-orin-agx-64gb")
        plan = said(*shown, "--keep", "1")
        assert plan["fits"] is False
        least = [each for each in plan["suggestions"] if each["keep"] < 1]
        assert {each["weights"] for each in least} == {"int4"}
        assert said(*shown, "--keep", str(least[0]["keep"]))["fits"] is True

    def test_a_cpu_has_no_figures(self):
        plan = said(*SEVEN, *KEEP, "--target", "cpu")
        assert plan["fits"] is plan["first_token_ms"] is plan["memory"] is None

    def test_without_one_nothing_is_said_of_it(self):
        assert not {"target", "fits", "first_token_ms"} & set(said(*SEVEN, *KEEP))

    @pytest.mark.parametrize("target", ["jetson-orin-nx-16gb", "rtx-ampere", "cpu"])
    def test_weights_it_cannot_multiply_are_refused(self, target):
        message = refused(*SEVEN, *KEEP, "--weights", "fp8", "--target", target)
        assert "takes no fp8 weights" in message
        assert "int8" in message


class TestABudget:
    ORIN = ("--target", "jetson-orin-nx-16gb", "--weights", "int4")

    def test_every_pair_meets_it_and_one_more_per_cent_does_not(self):
        plan = said(*SEVEN, *self.ORIN, "--picture", "1280x960", "--first-token-ms", "500")
        assert len(plan["proposals"]) > 2
        for pair in plan["proposals"]:
            shown = (*SEVEN, *self.ORIN, "--picture", "{}x{}".format(*pair["picture"]))
            again = said(*shown, "--keep", str(pair["keep"]))
            assert again["first_token_ms"]["pruned"] == pytest.approx(pair["first_token_ms"])
            assert again["first_token_ms"]["pruned"] <= 500
            assert again["visual_tokens"] == pair["visual_tokens"]
            if pair["keep"] < 1:
                more = said(*shown, "--keep", str(pair["keep"] + 0.01))
                assert more["first_token_ms"]["pruned"] > 500

    def test_smaller_pictures_allow_larger_keeps(self):
        pairs = said(*SEVEN, "--picture", "1280x960", "--first-token-flops", "8e12")["proposals"]
        assert [pair["keep"] for pair in pairs] == sorted(pair["keep"] for pair in pairs)
        assert [pair["max_pixels"] for pair in pairs] == sorted(
            (pair["max_pixels"] for pair in pairs), reverse=True
        )

    def test_without_a_keep_the_plan_is_the_best_pair(self):
        plan = said(*SEVEN, "--picture", "1280x960", "--first-token-flops", "8e12")
        best = max(plan["proposals"], key=lambda pair: pair["average_visual_tokens"])
        assert (plan["keep"], plan["visual_tokens"]) == (best["keep"], best["visual_tokens"])
        assert plan["first_token"]["pruned"] <= 8e12

    def test_with_a_keep_the_plan_stays_as_asked(self):
        plan = said(*SEVEN, *KEEP, "--first-token-flops", "3e12")
        assert (plan["keep"], plan["visual_tokens"]) == (0.25, 391)

    def test_where_resolution_is_fixed_one_pair_is_left(self):
        """LLaVA-1.5 makes 576 tokens of every picture."""
        (pair,) = said("--model", "llava-1.5-7b", "--first-token-flops", "4e12")["proposals"]
        assert pair["visual_tokens"] == 576
        assert 0 < pair["keep"] < 1

    def test_the_table_is_for_people(self):
        result = ep_export("plan", *SEVEN, *self.ORIN, "--first-token-ms", "300")
        assert result.code == 0, result.err
        assert "--max-pixels" in result.out
        assert "(most)" in result.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--first-token-flops", "1e6"), "no picture size and keep reach"),
            (("--first-token-ms", "100"), "needs a --target"),
            (("--first-token-ms", "100", "--target", "cpu"), "needs a --target"),
            (("--first-token-ms", "100", "--first-token-flops", "1e12"), "exclude each other"),
            (("--first-token-flops", "1e12", "--frames", "8"), "one picture"),
        ],
    )
    def test_what_cannot_be_met_is_refused(self, options, message):
        assert message in refused(*SEVEN, *options)
