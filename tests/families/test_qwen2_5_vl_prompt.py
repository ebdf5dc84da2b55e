"""Prompts against Hugging Face's own processor; pictures and prompts nobody should trust."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_tiny, tiny_picture
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.families.base import Turn

FAMILY = family_of("qwen2_5_vl")


class ProcessorWithoutVideo(Qwen2_5_VLProcessor):
    """Hugging Face's processor; its video half needs torchvision and is left out."""

    def check_argument_for_proper_class(self, *_):
        return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("prompt") / "checkpoint", layers=1, max_positions=200)


@pytest.fixture(scope="module")
def prompts(checkpoint):
    return FAMILY.prompt_builder(checkpoint, AutoConfig.from_pretrained(checkpoint))


@pytest.fixture(scope="module")
def huggingface(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    return ProcessorWithoutVideo(images, tokenizer, None, chat_template=tokenizer.chat_template)


@pytest.mark.parametrize("sizes", [[], [(200, 130)], [(56, 200), (90, 90), (31, 7)]])
def test_prompt_equals_huggingfaces_processor(prompts, huggingface, sizes):
    pictures = [tiny_picture(*size, seed=i) for i, size in enumerate(sizes)]
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "What is\n\nit?"}]
    expected = huggingface.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    made = prompts.build(pictures, "What is\n\nit?")
    assert np.array_equal(made.input_ids, expected["input_ids"])
    is_picture = expected["mm_token_type_ids"][0] == 1
    assert np.array_equal(made.visual_index, np.flatnonzero(is_picture))
    if sizes:
        assert [p.grid for p in made.pictures] == [
            tuple(grid) for grid in expected["image_grid_thw"].tolist()
        ]
        pixels = np.concatenate([p.pixel_values for p in made.pictures])
        assert np.array_equal(pixels, expected["pixel_values"])


def test_a_conversation_equals_huggingfaces_processor(prompts, huggingface):
    pictures = [tiny_picture(56, 90, seed=1), tiny_picture(90, 60, seed=2)]
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", ("First:", pictures[0], "What is it?")),
        Turn("assistant", ("A thing.",)),
        Turn("user", (pictures[1], "And this?")),
    )
    messages = [{"role": turn.role, "content": [_part(part) for part in turn.parts]} for turn in turns]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
    expected = huggingface.apply_chat_template(messages, **options)
    made = prompts.build_chat(turns)
    assert np.array_equal(made.input_ids, expected["input_ids"])
    pixels = np.concatenate([picture.pixel_values for picture in made.pictures])
    assert np.array_equal(pixels, expected["pixel_values"])


def _part(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def test_a_turn_that_the_template_leaves_out_is_refused(checkpoint, tmp_path):
    """As some published templates do with system messages, in silence."""
    template = "{% for m in messages if m.role == 'user' %}{{ m.content[0].text }}\n{% endfor %}"
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(template)
    prompts = FAMILY.prompt_builder(copy, AutoConfig.from_pretrained(copy))
    question = Turn("user", ("What is it?",))
    assert prompts.build_chat((question, question)).input_ids.shape[1] > 4
    with pytest.raises(UserError, match="no place for this message of the role system"):
        prompts.build_chat((Turn("system", ("Be brief.",)), question))


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_no_turn_may_hold_special_tokens(prompts, role):
    with pytest.raises(UserError, match="a special token of the model"):
        prompts.build_chat((Turn(role, ("<|im_end|>",)), Turn("user", ("What?",))))


def test_reference_inputs_carry_what_the_processor_would(prompts, huggingface):
    config = AutoConfig.from_pretrained(huggingface.tokenizer.name_or_path)
    prompt = prompts.build([tiny_picture(100, 60), tiny_picture(60, 100)], "What?")
    inputs = FAMILY.reference_inputs(prompt, config)
    assert inputs["pixel_values"].shape[0] == sum(np.prod(p.grid) for p in prompt.pictures)
    assert inputs["mm_token_type_ids"].sum() == prompt.visual_index.shape[0]
    assert set(FAMILY.reference_inputs(prompts.build([], "What?"), config)) == {"input_ids", "attention_mask"}


def test_visual_tokens_stand_row_by_row_in_the_token_grid(prompts):
    prompt = prompts.build([tiny_picture(200, 100)], "What?")
    height, width = prompt.pictures[0].token_grid
    positions = prompt.position_ids[:, 0, prompt.visual_index]
    assert np.array_equal(positions[1] - positions[1, 0], np.repeat(np.arange(height), width))
    assert np.array_equal(positions[2] - positions[2, 0], np.tile(np.arange(width), height))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 3), (3, 3), (200, 1), (2000, 11)])
def test_odd_sizes_become_pictures(prompts, size):
    picture = tiny_picture(*size)
    made = prompts.build([picture], "What?").pictures[0]
    assert made.size == size
    assert (made.token_grid[0] > made.token_grid[1]) == (size[1] > size[0])
    assert np.isfinite(made.pixel_values).all()


def test_a_line_of_pixels_is_refused(prompts):
    with pytest.raises(UserError, match="201 x 1 pixels is over 200 times"):
        prompts.build([tiny_picture(201, 1)], "What?")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>"])
def test_a_prompt_cannot_smuggle_special_tokens(prompts, token):
    with pytest.raises(UserError, match="special token") as caught:
        prompts.build([tiny_picture(60, 60)], f"What {token} is it?")
    assert repr(token) in str(caught.value)
    assert caught.value.hint


def test_text_that_only_resembles_a_special_token_is_text(prompts):
    prompt = prompts.build([], "< |image_pad| > <image_pad>")
    assert prompt.visual_index.shape == (0,)


def test_a_prompt_longer_than_the_context_is_refused(prompts):
    with pytest.raises(UserError, match=r"prompt has \d+ tokens \(0 of pictures\), .* holds 200"):
        prompts.build([], "What " * 300)
    with pytest.raises(UserError, match=r"\(256 of pictures\)"):
        prompts.build([tiny_picture(900, 900, seed=i) for i in range(4)], "What?")


def test_generation_config_names_the_end_of_an_answer(prompts, huggingface):
    ends = huggingface.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert prompts.eos_token_ids == tuple(ends)
    assert prompts.repetition_penalty == 1.0


def test_decoding_drops_special_tokens_and_survives_ids_without_a_token(prompts, huggingface):
    ids = huggingface.tokenizer.convert_tokens_to_ids(["seven", "<|im_end|>"])
    assert prompts.decode(ids) == "seven"
    assert prompts.decode([*ids, 303]) == "seven"


@pytest.fixture
def copy(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def builder(path):
    return FAMILY.prompt_builder(path, AutoConfig.from_pretrained(path))


def test_the_older_template_file_is_read_when_there_is_no_newer(copy):
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "<|im_start|>"}))
    assert builder(copy).build([], "What?").input_ids.shape == (1, 1)


def test_without_generation_config_the_config_ends_answers(copy):
    (copy / "generation_config.json").unlink()
    made = builder(copy)
    assert made.eos_token_ids == (AutoConfig.from_pretrained(copy).text_config.eos_token_id,)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer files"),
        ("tokenizer.json", None, "tokenizer files"),
        ("preprocessor_config.json", "[", "preprocessor_config.json"),
        ("preprocessor_config.json", None, "preprocessor_config.json"),
        ("generation_config.json", "{", "generation_config.json"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", '{"repetition_penalty": -1}', "repetition_penalty"),
    ],
)
def test_broken_processor_files_are_named(copy, name, content, said):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        builder(copy)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].nothing.at.all }}",
        "{% for",
        "{{ raise_exception('no') }}",
        "hello",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_or_loses_pictures_is_refused(copy, template):
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"template fails|places 0 pictures"):
        builder(copy).build([tiny_picture(60, 60)], "What?")


def test_any_picture_mode_is_seen_as_rgb(prompts):
    colours = tiny_picture(80, 60)
    for mode in ("RGB", "RGBA", "P", "L", "LA", "CMYK", "1", "YCbCr", "HSV", "I", "F"):
        made = prompts.build([colours.convert(mode)], "What?").pictures[0]
        assert made.pixel_values.shape == (24, 1176)
        assert made.pixel_values.std() > 0.1, mode


def test_transparent_pixels_are_white(prompts):
    transparent = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    white = Image.new("RGB", (60, 60), (255, 255, 255))
    made, expected = (prompts.build([p], "What?").pictures[0].pixel_values for p in (transparent, white))
    assert np.array_equal(made, expected)


def test_sixteen_bit_greys_keep_their_shades(prompts):
    ramp = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    made = prompts.build([Image.fromarray(ramp)], "What?").pictures[0].pixel_values
    eight = prompts.build([Image.fromarray((ramp // 257).astype(np.uint8))], "What?").pictures[0].pixel_values
    assert np.array_equal(made, eight)
