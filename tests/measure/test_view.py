"""What rival methods see of the vision tower, against Hugging Face's own eager attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, tiny_picture
from tiny_llava import make_tiny_llava, make_tiny_llava_next
from transformers import AutoModelForImageTextToText

from ep_export.checkpoint import open_checkpoint
from ep_export.measure.view import tower_attention


def eager(checkpoint: Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def attended(model: Any, inputs: dict[str, torch.Tensor], attention: Any, monkeypatch: Any) -> torch.Tensor:
    """[heads, P, P]: what Hugging Face's eager attention computes in one module of the tower."""
    modelling = sys.modules[type(attention).__module__]
    plain, seen = modelling.eager_attention_forward, []

    def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(module, *args, **kwargs)
        if module is attention:
            seen.append(output[1])
        return output

    monkeypatch.setattr(modelling, "eager_attention_forward", watched)
    with torch.inference_mode():
        model(**inputs)
    (weights,) = seen
    return weights[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: make_tiny(path, vision_depth=3),
        lambda path: make_tiny(path, model_type="qwen2_vl", vision_depth=3),
    ],
    ids=["qwen2_5_vl", "qwen2_vl"],
)
def test_without_a_class_token_it_is_what_all_patches_pay(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(make(tmp_path / "checkpoint")))
    model = eager(checkpoint.path)
    prompt = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config).build(
        [tiny_picture(168, 112)], "what is it?"
    )
    inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
    visual = model.model.visual
    full = getattr(visual, "fullatt_block_indexes", [len(visual.blocks) - 1])
    windows = []

    def permuted(patches: torch.Tensor, order: torch.Tensor, **kwargs: int) -> torch.Tensor:
        windows.append(order)
        return type(visual).permute_input_for_window_attn(visual, patches, order, **kwargs)

    monkeypatch.setattr(visual, "permute_input_for_window_attn", permuted, raising=False)
    weights = attended(model, inputs, visual.blocks[max(full)].attn, monkeypatch)
    received = weights.double().mean(dim=(0, 1)).reshape(-1, 4).mean(dim=1)
    if windows:  # Hugging Face's patches are in the order of its windows there
        received = received[torch.argsort(windows[0])]
    assert len(received) == len(prompt.visual_index)
    assert received.max() > 1.2 * received.min()
    ours = tower_attention(checkpoint.family, model, prompt)
    torch.testing.assert_close(ours.double(), received, atol=1e-7, rtol=1e-4)


def test_of_clip_it_is_what_the_class_token_pays_in_the_layer_before_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(make_tiny_llava(tmp_path / "checkpoint")))
    model = eager(checkpoint.path)
    pictures = [tiny_picture(60, 60), tiny_picture(80, 50, seed=1)]
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    received = []
    for picture in pictures:
        inputs = checkpoint.family.reference_inputs(
            builder.build([picture], "what is it?"), checkpoint.config
        )
        attention = model.model.vision_tower.encoder.layers[-2].self_attn
        weights = attended(model, inputs, attention, monkeypatch)
        received.append(weights.double().mean(dim=0)[0, 1:])
    both = builder.build(pictures, "what is it?")
    ours = tower_attention(checkpoint.family, model, both)
    assert len(ours) == len(both.visual_index)
    torch.testing.assert_close(ours.double(), torch.cat(received), atol=1e-7, rtol=1e-4)


def test_tokens_that_are_no_runs_of_patches_have_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_tiny_llava_next(tmp_path / "checkpoint")))
    assert checkpoint.family.patches_per_token(checkpoint.config) is None
    model = eager(checkpoint.path)
    prompt = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config).build([], "what is it?")
    with pytest.raises(ValueError, match="visual tokens of llava_next are no runs of patches"):
        tower_attention(checkpoint.family, model, prompt)
