"""vision_encoder.onnx against Hugging Face's own vision encoder, at several picture sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import hugging_face, session

from ep_export.bundle import Bundle, Dialect
from ep_export.families import family_named
from ep_export.families.base import Picture


@pytest.mark.parametrize("dialect", list(Dialect), ids=lambda d: d.value)
def test_visual_embeddings_equal_hugging_face_at_any_picture_size(
    dialect: Dialect, bundle_of: Callable[..., Bundle], checkpoint_of: Callable[[str], Path]
) -> None:
    model = hugging_face(checkpoint_of("qwen2_5_vl"))
    bundle = bundle_of("qwen2_5_vl", dialect=dialect)
    family = family_named(bundle.manifest.family)
    encoder = session(bundle, "vision_encoder")
    for height, width in ((8, 8), (6, 14), (2, 4), (22, 10)):
        rng = np.random.default_rng(height)
        pixels = rng.standard_normal((height * width, 3 * 2 * 14 * 14)).astype(np.float32)
        picture = Picture(pixels, (1, height, width), (height // 2, width // 2), (width * 14, height * 14))
        got = encoder.run(None, family.vision_feeds(picture, model.config))[0]
        grid = torch.tensor([[1, height, width]])
        expected = model.model.visual(torch.from_numpy(pixels), grid_thw=grid).pooler_output
        # float32 on both sides, another order of operations
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_onnx_runtimes_encoder_never_holds_all_scores(bundle_of: Callable[..., Bundle]) -> None:
    """Window blocks have those of windows; and queries are products of their own, not cut out of one."""
    bundle = bundle_of("qwen2_5_vl", dialect=Dialect.ONNXRUNTIME)
    used = Counter(node.op_type for node in ir.load(bundle.path / "vision_encoder.onnx").graph)
    assert (used["MultiHeadAttention"], used["Attention"], used["RotaryEmbedding"]) == (1, 2, 6)
    assert not {"Softmax", "MatMul", "Split"} & set(used)


def test_embeddings_are_rows_of_the_checkpoint(
    bundle_of: Callable[..., Bundle], checkpoint_of: Callable[[str], Path]
) -> None:
    table = hugging_face(checkpoint_of("qwen2_5_vl")).model.language_model.embed_tokens.weight.numpy()
    ids = np.array([[3, 0, 7, 7, 303]])
    got = session(bundle_of("qwen2_5_vl"), "embed_tokens").run(None, {"input_ids": ids})[0]
    np.testing.assert_array_equal(got, table[ids])
