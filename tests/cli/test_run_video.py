"""`ep-export run` with videos, as a user and a script meet it."""

import json

import pytest
from command_line import ep_export
from PIL import Image
from tiny import tiny_picture, tiny_video

ASK = ("--prompt", "What is this", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    for i, frame in enumerate(tiny_video(84, 56, 6).frames):
        frame.save(path / f"{i}.png")
    return path


def test_a_video_is_answered_and_drawn(tiny_bundle, folder, tmp_path):
    shown = tmp_path / "sheet.png"
    result = ep_export("run", str(tiny_bundle.path), "--video", str(folder), *ASK, "--show", str(shown))
    assert result.code == 0, result.err
    assert "of 18 visual tokens" in result.err  # three parts of 2 x 3
    with Image.open(shown) as sheet:
        assert sheet.size[0] > 2 * 160  # three parts, two beside each other


def test_json_tells_the_parts_of_videos_from_pictures(tiny_bundle, folder, tmp_path):
    tiny_picture(56, 56).save(tmp_path / "picture.png")
    options = ("--video", str(folder), "--image", str(tmp_path / "picture.png"), "--video", str(folder))
    result = ep_export("run", str(tiny_bundle.path), *options, "--frames", "4", *ASK, "--json")
    said = json.loads(result.out)
    assert [picture["video"] for picture in said["pictures"]] == [None, 0, 0, 1, 1]
    assert said["visual_tokens"] == 4 + 2 * 2 * 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--frames", "4"), "--frames and --fps are about videos"),
        (("--fps", "2"), "--frames and --fps are about videos"),
        (("--show", "kept.png"), "there is none"),
    ],
)
def test_video_options_without_a_video_are_a_usage_error(tiny_bundle, options, said):
    result = ep_export("run", str(tiny_bundle.path), *options, *ASK)
    assert (result.code, said in result.err) == (2, True)
    assert "hint:" in result.err


def test_a_missing_video_is_one_line_and_a_hint(tiny_bundle, tmp_path):
    result = ep_export("run", str(tiny_bundle.path), "--video", str(tmp_path / "none.mp4"), *ASK)
    assert (result.code, result.out) == (1, "")
    assert "does not exist" in result.err
    assert "Traceback" not in result.err
