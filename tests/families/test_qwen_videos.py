"""Videos as Qwen's prompts against Hugging Face's own processor and video processor."""

import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_tiny, tiny_picture, tiny_video
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.video_utils import VideoMetadata

from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.families.base import Video

FAMILIES = {
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2_5_VLModel),
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLModel),
}
VIDEO_SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": 20 * 28 * 28}
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
MODULE = "transformers.models.qwen2_vl.video_processing_qwen2_vl"


@pytest.fixture(scope="module")
def their_class():
    """Hugging Face's video processor. It imports torchvision, which is stood in for while it loads."""
    stand_ins = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [*stand_ins, "torchvision.transforms.v2.functional"]:
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            patch.setitem(sys.modules, name, module)
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE).Qwen2VLVideoProcessor
        sys.modules.pop(MODULE, None)


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


class TheirVideos:
    """The arithmetic of Hugging Face's class on tensors; scaled by Pillow, normalized in NumPy."""

    temporal_patch_size = 2
    merge_size = 2

    def __init__(self, kind, **settings):
        class Processor(kind):
            def resize_frames(self, image, size, **_):
                made = [
                    resized(frame.permute(1, 2, 0).numpy(), size.height, size.width)
                    for frame in image.flatten(0, 1)
                ]
                tensor = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
                return tensor.reshape(*image.shape[:2], *tensor.shape[1:])

            def rescale_and_normalize(self, images, *_):
                mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (MEAN, STD))
                return (images.float() / 255 - mean) / std

        self.own = object.__new__(Processor)  # its constructor asks for torchvision
        self.own.max_video_tokens = settings.pop("max_video_tokens", 128000)
        self.base, self.settings = kind.__mro__[1], settings

    def __call__(self, videos, fps, **_):
        from transformers.image_utils import SizeDict

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.base, "resize", type(self.own).resize_frames)
            tensors = [
                torch.from_numpy(np.stack([np.asarray(f) for f in v])).permute(0, 3, 1, 2) for v in videos
            ]
            made = self.own._preprocess(
                tensors,
                do_resize=True,
                size=SizeDict(**self.settings.get("size", VIDEO_SIZE)),
                resample=3,
                do_rescale=True,
                rescale_factor=1 / 255,
                do_normalize=True,
                image_mean=MEAN,
                image_std=STD,
                patch_size=14,
                temporal_patch_size=2,
                merge_size=2,
                cap_pixels_per_frame=self.settings.get("cap_pixels_per_frame", False),
                return_tensors="pt",
            )
        metadata = [
            VideoMetadata(len(v), fps=rate, frames_indices=list(range(len(v))))
            for v, rate in zip(videos, fps, strict=True)
        ]
        return {**made, "video_metadata": metadata}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    path = make_tiny(
        tmp_path_factory.mktemp("video") / "checkpoint",
        model_type=request.param,
        layers=1,
        max_positions=1000,
    )
    (path / "video_preprocessor_config.json").write_text(json.dumps({"size": VIDEO_SIZE}))
    return path


def prompts_of(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    return family_of(config.model_type).prompt_builder(checkpoint, config)


SHOWN = {
    "one": [tiny_video(300, 90, 6, fps=2.0)],
    "odd number of frames, camera rate": [tiny_video(200, 130, 5, fps=29.97)],
    "one frame": [tiny_video(31, 7, 1, fps=0.3)],
    "mixed": [
        tiny_video(90, 200, 4, fps=1 / 3),
        tiny_picture(200, 130),
        tiny_picture(30, 60),
        tiny_video(640, 480, 3, fps=24.0, seed=1),
    ],
}


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_prompt_equals_huggingfaces_processor(checkpoint, their_class, shown):
    config = AutoConfig.from_pretrained(checkpoint)
    kind, model = FAMILIES[config.model_type]
    theirs = type("_", (kind,), {"check_argument_for_proper_class": lambda *_: None})(
        Qwen2VLImageProcessorPil.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
        TheirVideos(their_class),
        chat_template=AutoTokenizer.from_pretrained(checkpoint).chat_template,
    )
    content = [{"type": "video" if isinstance(v, Video) else "image"} for v in shown]
    content.append({"type": "text", "text": "What is it?"})
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    videos = [visual for visual in shown if isinstance(visual, Video)]
    pictures = [visual for visual in shown if not isinstance(visual, Video)]
    expected = theirs(
        text=[text],
        images=pictures or None,
        videos=[list(video.frames) for video in videos],
        fps=[video.fps for video in videos],
        return_tensors="pt",
    )
    made = prompts_of(checkpoint).build(shown, "What is it?")
    inputs = family_of(config.model_type).reference_inputs(made, config)
    assert set(inputs) <= set(expected)
    for name, tensor in inputs.items():
        if name == "pixel_values_videos":  # float32 sums in another order
            assert torch.allclose(tensor, expected[name], atol=1e-6)
        else:
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    with torch.device("meta"):
        empty = model(config)
    given = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, delta = empty.get_rope_index(**{name: expected[name] for name in given if name in expected})
    assert np.array_equal(made.position_ids, positions.numpy())
    assert made.next_position == made.input_ids.shape[1] + int(delta)
    assert np.array_equal(made.visual_index, np.flatnonzero(expected["mm_token_type_ids"][0]))
    numbers = iter(range(len(videos)))
    whose = [(next(numbers), len(v.frames)) if isinstance(v, Video) else (None, 2) for v in shown]
    assert [p.video for p in made.pictures] == [n for n, frames in whose for _ in range(-(-frames // 2))]


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({"size": {"shortest_edge": 40 * 784, "longest_edge": 80 * 784}}, 2),
        ({"size": VIDEO_SIZE, "cap_pixels_per_frame": True, "max_video_tokens": 50}, 6),
        ({"size": VIDEO_SIZE, "cap_pixels_per_frame": True, "max_video_tokens": 5}, 7),
        ({"size": VIDEO_SIZE, "cap_pixels_per_frame": True}, 3),
    ],
)
def test_a_frame_has_the_size_of_huggingfaces(checkpoint, their_class, tmp_path, settings, frames):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "processor_config.json").write_text(json.dumps({"video_processor": settings}))
    video = tiny_video(300, 90, frames)
    expected = TheirVideos(their_class, **settings)([video.frames], [2.0])
    made = prompts_of(copy).build([video], "What?").pictures
    assert [[len(made), *made[0].grid[1:]]] == expected["video_grid_thw"].tolist()
    pixels = np.concatenate([part.pixel_values for part in made])
    assert np.allclose(pixels, expected["pixel_values_videos"], atol=1e-6)


def test_without_settings_of_its_own_a_video_has_those_of_pictures(checkpoint, tmp_path):
    """As Hugging Face reads the published checkpoints, which have preprocessor_config.json alone."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "video_preprocessor_config.json":
            (copy / file.name).write_bytes(file.read_bytes())
    video = tiny_video(640, 480, 2)
    prompt = prompts_of(copy).build([video, video.frames[0]], "What?")
    assert prompt.pictures[0].grid == prompt.pictures[1].grid
    file = copy / "preprocessor_config.json"
    left = {k: v for k, v in json.loads(file.read_text()).items() if not k.endswith("_pixels")}
    file.write_text(json.dumps(left))
    assert prompts_of(copy).build([video], "What?").pictures[0].token_grid == (17, 23)
    file.write_text(json.dumps({**left, "min_pixels": "few"}))
    with pytest.raises(UserError, match="min_pixels"):
        prompts_of(copy)


def test_a_still_video_is_a_picture(checkpoint):
    """A temporal patch of two equal frames, within the same bounds of pixels, is what a picture becomes."""
    frame = tiny_picture(84, 112)
    made = prompts_of(checkpoint).build([Video((frame, frame), 2.0), frame], "What?").pictures
    assert np.array_equal(made[0].pixel_values, made[1].pixel_values)


def test_pillow_scales_frames_as_tensors_are_scaled_up_to_a_rounding():
    """torchvision, absent here, scales bytes by torch's own bicubic: at most one of 255 levels apart."""
    for size, target in (((640, 480), (392, 308)), ((90, 200), (140, 308)), ((1200, 900), (112, 84))):
        frame = np.array(tiny_picture(*size))
        tensor = torch.from_numpy(frame).permute(2, 0, 1)[None]
        scaled = torch.nn.functional.interpolate(
            tensor, size=target[::-1], mode="bicubic", antialias=True, align_corners=False
        )
        theirs = scaled[0].permute(1, 2, 0).numpy().astype(np.int64)
        difference = np.abs(theirs - resized(frame, target[1], target[0]))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (Video((), 2.0), "frames of none, expected one size"),
        (Video((tiny_picture(60, 60), tiny_picture(60, 90)), 2.0), "60 x 60 and 60 x 90, expected one size"),
        (Video((tiny_picture(60, 60),), 0.0), "shows 0 frames a second"),
        (Video((tiny_picture(201, 1),), 2.0), "video frame of 201 x 1 pixels"),
        (Video((tiny_picture(90, 60),) * 400, 2.0), r"prompt has \d+ tokens .* context holds 1000"),
    ],
    ids=["no frames", "two sizes", "no speed", "a line", "too long"],
)
def test_what_is_no_video_is_refused(checkpoint, video, said):
    with pytest.raises(UserError, match=said) as caught:
        prompts_of(checkpoint).build([video], "What?")
    assert caught.value.hint
