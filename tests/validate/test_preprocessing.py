"""Preprocessing against transformers' own processor, found to differ where it does."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_picture
from tiny_families import TINY_FAMILIES

from ep_export.checkpoint import open_checkpoint
from ep_export.validate.comparison import fold
from ep_export.validate.preprocessing import compare_preprocessing, own_processor
from ep_export.validate.report import Verdict

QUESTION = "What is it?"
PICTURES = [tiny_picture(200, 130, seed=1), tiny_picture(56, 56, seed=2)]
# What published checkpoints of these families say in processor_config.json and the tiny ones leave out.
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
SAYS = {"qwen2_5_vl": {}, "qwen2_vl": {}, "llava": LLAVA}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    def make(family):
        path = TINY_FAMILIES[family](tmp_path_factory.mktemp(family) / "checkpoint")
        if SAYS.get(family):
            patch = json.loads((path / "config.json").read_text())["vision_config"]["patch_size"]
            (path / "processor_config.json").write_text(json.dumps({**SAYS[family], "patch_size": patch}))
        return open_checkpoint(str(path))

    return {family: make(family) for family in (*SAYS, "llava_next")}


def compared(checkpoint, prompt):
    processor, why = own_processor(checkpoint)
    assert processor is not None, why
    own = processor(PICTURES, QUESTION)
    return fold([compare_preprocessing("question 1", prompt, own, checkpoint)])


@pytest.mark.parametrize("family", SAYS)
def test_it_is_as_transformers_does_it(checkpoints, family):
    checkpoint = checkpoints[family]
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    stage = compared(checkpoint, builder.build(PICTURES, QUESTION))
    assert (stage.verdict, stage.max_abs_error) == (Verdict.PASS, 0.0)
    assert stage.comparisons >= 3


def test_other_pixels_and_other_text_are_found(checkpoints):
    checkpoint = checkpoints["qwen2_5_vl"]
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompt = builder.build(PICTURES, QUESTION)
    first, *rest = prompt.pictures
    brighter = replace(first, pixel_values=first.pixel_values + np.float32(0.05))
    stage = compared(checkpoint, replace(prompt, pictures=(brighter, *rest)))
    assert (stage.verdict, "pixel_values" in stage.note) == (Verdict.FAIL, True)
    stage = compared(checkpoint, builder.build(PICTURES, "What was it?"))
    assert (stage.verdict, "input_ids" in stage.note) == (Verdict.FAIL, True)


def test_a_processor_that_cannot_be_constructed_gives_its_reason(checkpoints):
    processor, why = own_processor(checkpoints["llava_next"])
    assert processor is None
    assert "processor_config.json does not say patch_size" in why
