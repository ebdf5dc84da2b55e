"""NumPy positions against Hugging Face's get_rope_index."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from ep_export.families.mrope import VisualRun, mrope_positions
from ep_export.families.qwen2_vl_prompt import seconds_to_positions

IMAGE, VIDEO = 5, 6
TOKENS_PER_SECOND = 3  # a product that is not exact in float32


@pytest.fixture(scope="module")
def models():
    shape = {
        "text_config": {"num_hidden_layers": 1, "vocab_size": 8},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }
    vision = {"depth": 1, "tokens_per_second": TOKENS_PER_SECOND}
    with torch.device("meta"):
        return {
            "qwen2_5_vl": Qwen2_5_VLModel(Qwen2_5_VLConfig(vision_config=vision, **shape)),
            "qwen2_vl": Qwen2VLModel(Qwen2VLConfig(vision_config={"depth": 1}, **shape)),
        }


def prompt_ids(*parts: int | tuple) -> np.ndarray:
    """Text of a length, pictures of a token grid (a pair), videos (times, height, width, seconds)."""
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
        else:
            ids += [IMAGE if len(part) == 2 else VIDEO] * int(np.prod(part[:3]))
    return np.array(ids, dtype=np.int64)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize(
    "parts",
    [
        (4, (3, 5), 6),
        (1, (9, 2), 1, (2, 7), 3),
        (3, (1, 1), 1, (1, 8), 2, (6, 1), 5),
        ((4, 4), 2),
        (2, (4, 6)),
        (7,),
        (2, (4, 2, 3, 0.5), 3),
        (2, (4, 2, 3, 1 / 3), 1, (3, 2, 2, 2 / 29.97), 4),
        (1, (3, 3), 1, (9, 1, 2, 0.7), 1, (2, 5), 2, (2, 4, 1, 40.0), 1),
        ((6, 2, 2, 5.0),),  # its time is ahead of all that follows
        ((2, 2), (3, 2, 2, 1.0), (1, 4), (2, 1, 1, 1.0)),
    ],
)
def test_positions_equal_huggingface(models, family, parts):
    model = models[family]
    ids = prompt_ids(*parts)
    pictures = [part for part in parts if not isinstance(part, int) and len(part) == 2]
    videos = [part for part in parts if not isinstance(part, int) and len(part) == 4]
    runs = [
        VisualRun(1, *part)
        if len(part) == 2
        else VisualRun(*part[:3], seconds_to_positions(part[3], model.config))
        for part in parts
        if not isinstance(part, int)
    ]
    positions, following = mrope_positions(ids, (IMAGE, VIDEO), runs)
    batch = torch.from_numpy(ids)[None]
    grids = {
        "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width] for height, width in pictures]),
        "video_grid_thw": torch.tensor([[times, 2 * h, 2 * w] for times, h, w, _ in videos]),
    }
    expected, delta = model.get_rope_index(
        batch,
        mm_token_type_ids=((batch == IMAGE) + 2 * (batch == VIDEO)).int(),
        second_per_grid_ts=torch.tensor([video[3] for video in videos]),
        **{name: grid for name, grid in grids.items() if len(grid)},
    )
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert following == ids.shape[0] + int(delta)


def test_text_alone_counts_on_every_axis():
    positions, following = mrope_positions(prompt_ids(7), (IMAGE, VIDEO), [])
    assert np.array_equal(positions, np.tile(np.arange(7), (3, 1)))
    assert following == 7


def test_time_is_cut_off_not_rounded():
    positions, _ = mrope_positions(prompt_ids((4, 1, 1, 0)), (IMAGE, VIDEO), [VisualRun(4, 1, 1, 0.9)])
    assert positions[0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("grids", [[], [(2, 2)], [(2, 3), (1, 1)]])
def test_grids_that_do_not_match_the_placeholders_are_refused(grids):
    with pytest.raises(ValueError, match="do not match"):
        mrope_positions(prompt_ids(3, (2, 4), 1), (IMAGE, VIDEO), [VisualRun(1, *grid) for grid in grids])
