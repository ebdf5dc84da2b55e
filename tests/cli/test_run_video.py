"""`ep-export run` with videos, several cuts and policies, as a user and a script meet it."""

import json
import re

import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export
from PIL import Image, ImageStat
from tiny import tiny_picture, tiny_video

from ep_export.policy import MaxMin, Nothing

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


@pytest.fixture(scope="module")
def twice(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("twice") / "bundle"
    policies = (MaxMin(), Nothing())
    return export_tiny(tiny_checkpoint, out, schedule=two_cuts(1, 3), keep=0.6, policies=policies)


def said_kept(result):
    """Of the sentence about kept tokens: all; count, layer and percentage of every cut; the average."""
    (line,) = [line for line in result.err.splitlines() if line.startswith("kept ")]
    counts, visual, shares, average = re.match(
        r"kept (.+) of (\d+) visual tokens: (.+) = (\d+) % on average over 4 layers; \S+ % fewer FLOPs to "
        r"the first token, \S+ % fewer in decoder prefill alone, \S+ % less visual KV cache$",
        line,
    ).groups()
    cuts = re.findall(r"(\d+) % after layer (\d+)", shares)
    kept = counts.split(", then ")
    told = [(int(n), int(layer), int(share)) for n, (share, layer) in zip(kept, cuts, strict=True)]
    return int(visual), told, int(average)


def test_one_cut_is_told_with_what_it_means_on_average(tiny_bundle, folder):
    picture = folder / "0.png"
    result = ep_export("run", str(tiny_bundle.path), "--image", str(picture), *ASK, "--keep", "0.75")
    # half of the layers see all 6 tokens, the others 3 of them
    assert said_kept(result) == (6, [(3, 2, 50)], 75)


def test_every_cut_is_told(twice, folder):
    result = ep_export("run", str(twice.path), "--image", str(folder / "0.png"), *ASK)
    # shares 0.6 and 0.3 scaled by 14/15, so that the average of 1, s, s, s/2 is 0.6; of 6 tokens
    assert said_kept(result) == (6, [(3, 1, 50), (1, 3, 17)], 54)


def test_json_tells_cuts_and_policies(twice, folder):
    ask = ("run", str(twice.path), "--image", str(folder / "0.png"), *ASK, "--json")
    said = json.loads(ep_export(*ask, "--policy", "divprune", "--policy", "nothing").out)
    assert said["policies"] == ["divprune", "nothing"]
    assert [(cut["layer"], cut["policy"]) for cut in said["cuts"]] == [(1, "divprune"), (3, "nothing")]
    assert said["cuts"][-1]["kept_index"] == said["kept_index"]
    assert len(said["kept_index"]) == said["prompt_tokens"] - said["visual_tokens"]
    assert [len(cells) for cells in said["pictures"][0]["kept_by_cut"]][1] == 0
    once = json.loads(ep_export(*ask, "--policy", "divprune").out)
    assert once["policies"] == ["divprune", "divprune"]


def test_an_unknown_policy_is_refused_with_those_there_are(twice):
    result = ep_export("run", str(twice.path), *ASK, "--policy", "norm-lowest")
    assert (result.code, result.out) == (1, "")
    assert "no policy 'norm-lowest' at cut 0 (layer 1), it has paper-highest, divprune, nothing" in result.err
    result = ep_export("run", str(twice.path), *ASK, *["--policy", "divprune"] * 3)
    assert result.code == 2
    assert "3 policies for 2 cuts" in result.err


def test_every_picture_and_video_is_drawn_at_every_cut(twice, folder, tmp_path):
    """A row each, a column a cut; what goes on is bright, and ever less of it."""
    shown = tmp_path / "sheet.png"
    pictures = ("--image", str(folder / "0.png"), "--image", str(folder / "1.png"))
    ask = ("run", str(twice.path), *pictures, "--video", str(folder), *ASK)
    assert ep_export(*ask, "--show", str(shown)).code == 0
    alone = tmp_path / "alone.png"
    assert ep_export("run", str(twice.path), *pictures[:2], *ASK, "--show", str(alone)).code == 0
    with Image.open(shown) as sheet, Image.open(alone) as row:
        assert sheet.width >= row.width  # a video's sheet may be wider than a picture
        assert sheet.height > 2 * row.height + 2
        first, second = (
            row.crop((0, 0, row.width // 2, row.height)),
            row.crop((row.width // 2, 0, row.width, row.height)),
        )
        assert ImageStat.Stat(second.convert("L")).mean[0] < ImageStat.Stat(first.convert("L")).mean[0]


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
