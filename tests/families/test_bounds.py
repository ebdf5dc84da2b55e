"""Numbers that no model and no processor has are refused; those of every published one are not."""

import dataclasses
import json

import pytest

from ep_export.aliases import ALIASES
from ep_export.checkpoint import open_config
from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.families.bounds import check_dims, check_settings, check_sizes

DIMS = DecoderDims(
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


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_published_configs_pass(alias):
    check_sizes(json.loads(alias.config_file.read_text()), "config.json")
    check_dims(open_config(alias.name).dims, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field.name, value) for field in dataclasses.fields(DIMS) for value in (0, -1, 1 << 31)),
        ("position_axes", 2),
        ("position_axes", 10**9),
        ("kv_heads", 3),
        ("layers", True),
    ],
)
def test_dims_that_no_decoder_has_are_named(field, value):
    with pytest.raises(UserError, match=field.replace("kv_heads", "kv.heads")) as caught:
        check_dims(dataclasses.replace(DIMS, **{field: value}), "manifest.json")
    assert str(caught.value).startswith("manifest.json has ")
    assert caught.value.hint


PUBLISHED = (
    ({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, False),
    ({"size": 336, "crop_size": 336}, False),
    ({"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, False),
    ({"size": {"height": 384, "width": 384}, "video_sampling": {"video_size": {"longest_edge": 512}}}, False),
    ({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}, True),
    ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "temporal_patch_size": 2}, True),
    ({"size": None, "crop_size": None}, False),
    ({}, False),
)


@pytest.mark.parametrize(("settings", "areas"), PUBLISHED)
def test_published_settings_pass(settings, areas):
    check_settings(settings, "preprocessor_config.json", areas=areas)


@pytest.mark.parametrize(
    ("settings", "areas", "named"),
    [
        ({"size": {"shortest_edge": 0}}, False, r"size\.shortest_edge 0"),
        ({"size": {"shortest_edge": 3136}}, False, r"size\.shortest_edge 3136"),
        ({"size": {"longest_edge": 10**9}}, False, r"size\.longest_edge"),
        ({"size": {"longest_edge": 10**9}}, True, r"size\.longest_edge"),
        ({"size": [336, 336]}, False, "size"),
        ({"size": "large"}, False, "size 'large'"),
        ({"crop_size": {"height": 1.5}}, False, r"crop_size\.height 1\.5"),
        ({"crop_size": {"height": "x"}}, False, r"crop_size\.height 'x'"),
        ({"patch_size": 0}, True, "patch_size 0"),
        ({"merge_size": 10**9}, True, "merge_size"),
        ({"min_pixels": 10**9}, True, "min_pixels"),
        ({"max_pixels": -1}, True, "max_pixels -1"),
        ({"video_sampling": [1]}, False, "video_sampling"),
        ({"video_sampling": {"video_size": {"longest_edge": -1}}}, False, r"video_size\.longest_edge -1"),
    ],
)
def test_settings_that_no_processor_has_are_named(settings, areas, named):
    with pytest.raises(UserError, match=named):
        check_settings(settings, "preprocessor_config.json", areas=areas)
