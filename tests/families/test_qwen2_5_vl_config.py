"""What a config says, and configs whose mathematics is not exported."""

import dataclasses

import pytest
from transformers import Qwen2_5_VLConfig

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families import family_of

FAMILY = family_of("qwen2_5_vl")


def config(**text):
    shape = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    return Qwen2_5_VLConfig(text_config={**shape, **text})


def test_dims_of_the_7b_shape():
    assert FAMILY.dims(config()) == DecoderDims(
        layers=28,
        hidden_size=3584,
        heads=28,
        kv_heads=4,
        head_dim=128,
        ffn_size=18944,
        vocab_size=152064,
        max_positions=128000,
        position_axes=3,
    )


def test_a_typical_picture_is_a_640_by_480_photograph():
    assert FAMILY.default_visual_tokens(config()) == 23 * 17


def test_dims_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAMILY.dims(config()).layers = 1


def rope(kind="default", sections=(16, 24, 24), **more):
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e6, "mrope_section": list(sections), **more}
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, "sliding-window"),
        (rope("linear", factor=2.0), "rope_type 'linear'"),
        (rope(sections=(16, 24, 25)), "mrope_section"),
        ({"num_key_value_heads": 3}, "3 kv heads"),
    ],
)
def test_other_mathematics_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        FAMILY.dims(config(**text))
