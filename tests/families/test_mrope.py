"""NumPy positions against Hugging Face's get_rope_index."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from ep_export.families.mrope import mrope_positions

IMAGE = 5


@pytest.fixture(scope="module")
def huggingface():
    config = Qwen2_5_VLConfig(
        text_config={"num_hidden_layers": 1, "vocab_size": 8},
        vision_config={"depth": 1},
        image_token_id=IMAGE,
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


def prompt_ids(*parts: int | tuple[int, int]) -> np.ndarray:
    """Text of a length (an int) and pictures of a token grid (a pair)."""
    ids = [[1] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1]) for part in parts]
    return np.array([i for part in ids for i in part], dtype=np.int64)


@pytest.mark.parametrize(
    "parts",
    [
        (4, (3, 5), 6),
        (1, (9, 2), 1, (2, 7), 3),
        (3, (1, 1), 1, (1, 8), 2, (6, 1), 5),
        ((4, 4), 2),
        (2, (4, 6)),
    ],
)
def test_positions_equal_huggingface(huggingface, parts):
    ids = prompt_ids(*parts)
    grids = [part for part in parts if not isinstance(part, int)]
    positions, following = mrope_positions(ids, IMAGE, grids)
    batch = torch.from_numpy(ids)[None]
    expected, delta = huggingface.get_rope_index(
        batch,
        mm_token_type_ids=(batch == IMAGE).int(),
        image_grid_thw=torch.tensor([[1, 2 * height, 2 * width] for height, width in grids]),
    )
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert following == ids.shape[0] + int(delta)


def test_text_alone_counts_on_every_axis():
    positions, following = mrope_positions(prompt_ids(7), IMAGE, [])
    assert np.array_equal(positions, np.tile(np.arange(7), (3, 1)))
    assert following == 7


@pytest.mark.parametrize("grids", [[], [(2, 2)], [(2, 3), (1, 1)]])
def test_grids_that_do_not_match_the_placeholders_are_refused(grids):
    with pytest.raises(ValueError, match="do not match"):
        mrope_positions(prompt_ids(3, (2, 4), 1), IMAGE, grids)
