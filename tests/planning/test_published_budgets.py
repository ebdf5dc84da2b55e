"""Every published setting through `ep-export plan`, against the paper's numbers and sums by hand.

The published budgets are averages over all layers, layers before the collapse counted in full; only the
LLaVA-NeXT script names the tokens kept after it.
"""

from __future__ import annotations

import json

import pytest
from command_line import ep_export

MIB = 2**20


def plan(*arguments: str) -> dict:
    result = ep_export("plan", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.parametrize(
    ("average", "kept", "kv_mib", "pruned_tflop"),
    [
        # 32 layers, K 2, 576 tokens: (32 a - 2 * 576) / 30; KV in fp16: 2 * 4096 * 2 bytes a token and layer.
        (192, 166, 95.8, None),
        (128, 98, 63.9, 2.80),
    ],
)
def test_llava_1_5_7b(average, kept, kv_mib, pruned_tflop):
    said = plan("--model", "llava-1.5-7b", "--keep-tokens", str(average), "--text-tokens", "86")
    assert (said["layers"], said["ecl"], said["visual_tokens"]) == (32, 2, 576)
    assert said["kept_visual_tokens"] == kept
    assert said["visual_kv_bytes"]["full"] / MIB == 288.0
    assert said["visual_kv_bytes"]["pruned"] / MIB == pytest.approx(kv_mib, abs=0.05)
    assert said["prefill_flops"]["full"] / 1e12 == pytest.approx(8.80, rel=0.005)

    def layer(n: int) -> int:  # multi-head attention: d 4096, m 11008
        return 8 * n * 4096**2 + 4 * n**2 * 4096 + 6 * n * 4096 * 11008

    assert said["prefill_flops"]["pruned"] == 2 * layer(576 + 86) + 30 * layer(kept + 86)
    if pruned_tflop:
        assert said["prefill_flops"]["pruned"] / 1e12 == pytest.approx(pruned_tflop, rel=0.005)


def test_llava_1_5_7b_saves_the_published_share_of_flops():
    said = plan("--model", "llava-1.5-7b", "--keep-tokens", "128", "--text-tokens", "86")["prefill_flops"]
    assert 1 - said["pruned"] / said["full"] == pytest.approx(0.682, abs=0.0005)


@pytest.mark.parametrize("model", ["llava-next-7b", "llava-next-vicuna-7b"])
def test_llava_next_7b(model):
    """The script keeps 320 of 2880 after layer 2: an average of (2 * 2880 + 30 * 320) / 32 = 480."""
    said = plan("--model", model, "--keep-tokens", "480", "--visual-tokens", "2880")
    assert (said["layers"], said["ecl"], said["visual_tokens"]) == (32, 2, 2880)
    assert said["kept_visual_tokens"] == 320
    as_ratio = plan("--model", model, "--keep", str(480 / 2880), "--visual-tokens", "2880")
    assert as_ratio["kept_visual_tokens"] == 320


@pytest.mark.parametrize(
    ("keep", "share", "tokens", "kept"), [(0.25, 22.22, 1296, 288), (0.125, 9.26, 1296, 120)]
)
def test_qwen2_5_vl_7b(keep, share, tokens, kept):
    """28 layers, K 1: (28 r - 1) / 27 of N."""
    said = plan("--model", "qwen2.5-vl-7b", "--keep", str(keep), "--visual-tokens", str(tokens))
    assert (said["layers"], said["ecl"], said["kept_visual_tokens"]) == (28, 1, kept)
    assert 100 * kept / tokens == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(("tokens", "kept"), [(2048, 955), (2056, 959)])
def test_video_llava_7b_at_half(tokens, kept):
    """8 frames of 256 patches, or of 257 with their class tokens; (32 * N / 2 - 2 N) / 30 of them.

    The paper says 50 % and no layer for this model, so the layer is told: LLaVA-1.5's.
    """
    said = plan("--model", "video-llava-7b", "--keep", "0.5", "--layer", "2", "--visual-tokens", str(tokens))
    assert (said["layers"], said["ecl"], said["kept_visual_tokens"]) == (32, 2, kept)


def test_a_published_layer_is_never_presented_as_measured():
    for model in ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"):
        result = ep_export("plan", "--model", model, "--keep", "0.25")
        assert result.code == 0
        assert "not measured here" in result.err
        assert "arXiv 2602.17196" in result.err


def test_a_model_without_a_published_layer_says_what_to_give():
    result = ep_export("plan", "--model", "smolvlm2-500m", "--keep", "0.25")
    assert result.code == 1
    assert "--layer" in result.err
    assert result.out == ""
