"""Tokenizer, processor and generation files from another hand: one sentence and a hint, or they work."""

import json
import shutil
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_config
from ep_export.errors import UserError
from ep_export.families.template_limits import _OutOfTime, _watch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("processor") / "tiny", layers=2)


@pytest.fixture
def directory(source, tmp_path):
    return shutil.copytree(source, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))


def ask(directory, prompt="What is in this picture?"):
    opened = open_config(str(directory))
    builder = opened.family.prompt_builder(directory, opened.config)
    return builder, builder.build([tiny_picture(60, 44)], prompt)


def refused(directory, said):
    with pytest.raises(UserError, match=said) as caught:
        ask(directory)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


BROKEN = ("", "null", "[]", "NaN", '"x"', "[" * 100_000, '{"a":' * 5_000, "{", "\xff")


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", "tokenizer files"),
        ("tokenizer_config.json", "tokenizer files"),
        ("preprocessor_config.json", r"preprocessor_config\.json"),
        ("generation_config.json", r"generation_config\.json"),
        ("chat_template.json", "."),
        ("processor_config.json", r"processor_config\.json"),
        ("video_preprocessor_config.json", "."),
    ],
)
def test_a_file_that_is_no_json_object(directory, name, said, text):
    if name == "chat_template.json":  # read where there is no other
        (directory / "chat_template.jinja").unlink()
    (directory / name).write_text(text)
    refused(directory, said)


def test_a_tokenizer_with_one_letter_changed(directory):
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("WordLevel", "WordLeve1"))
    refused(directory, "tokenizer files .* are missing or broken: .*line")


def test_a_tokenizer_that_fails_on_text_only(directory):
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"] = {}
    file.write_text(json.dumps(raw))
    refused(directory, "tokenizer")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"patch_size": 0}, "patch_size 0"),
        ({"patch_size": 16}, "cuts pictures into patches of 16 pixels"),
        ({"merge_size": 0}, "merge_size 0"),
        ({"merge_size": 4}, "4 x 4 a token"),
        ({"temporal_patch_size": 10**9}, "temporal_patch_size"),
        ({"min_pixels": 10**9}, "min_pixels"),
        ({"image_mean": [0.5]}, "image processor fails"),
        ({"image_mean": ["a", "b", "c"]}, "image processor fails"),
        ({"image_mean": None}, "image processor fails|makes values"),
        ({"image_std": [0, 0, 0]}, "not finite"),
        ({"image_std": 0}, "not finite"),
        ({"rescale_factor": 1e308, "image_std": [1e-30] * 3}, "not finite"),
        ({"resample": 99}, r"preprocessor_config\.json|image processor fails"),
    ],
)
def test_settings_of_the_image_processor_that_make_no_picture(directory, values, said):
    change(directory / "preprocessor_config.json", **values)
    refused(directory, said)


@pytest.mark.parametrize("value", [10**400, -1, 0, "x", True, [1.0], 101, 1e300])
def test_a_repetition_penalty_that_is_none(directory, value):
    change(directory / "generation_config.json", repetition_penalty=value)
    refused(directory, "repetition_penalty")


@pytest.mark.parametrize("value", [-1, True, [True], ["x"], [-1], 10**400, [], {}])
def test_an_end_of_answers_that_is_no_token_is_looked_for_elsewhere(directory, value):
    change(directory / "generation_config.json", eos_token_id=value)
    builder, _ = ask(directory)
    assert builder.eos_token_ids == (open_config(str(directory)).config.text_config.eos_token_id,)


def template(directory, text):
    (directory / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes over"),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ 'x' * 3000000000 }}", "GiB of memory"),
        ("{{ 'x'.center(3000000000) }}", "GiB of memory"),
        ("{{ '%03000000000d' % 1 }}", "GiB of memory"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "takes over|GiB of memory",
        ),
        ("{{ 9 ** 9 ** 9 }}", "computes powers"),
        ("{{ 'ab' * 2000000 }}", "4000000 characters"),
        ("x" * 200_000, "has 200000 characters"),
        ("{{ '('" + "(" * 3000, "chat template fails"),
        ("{% if x %}" * 3000, "chat template fails"),
        ("{{ raise_exception('a\nerror: b') }}", "chat template fails: a error: b"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'config.json' %}", "chat template fails"),
        ("no picture", "places 0 pictures"),
    ],
    ids=range(15),
)
def test_a_chat_template_that_does_not_end_well(directory, monkeypatch, text, said):
    monkeypatch.setattr("ep_export.families.template_limits._MOST_SECONDS", 0.5)
    template(directory, text)
    refused(directory, said)


def test_a_chat_template_that_is_no_text(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(directory, "can't decode byte 0xff")


def test_watching_a_template_leaves_no_trace(directory):
    import resource
    import sys

    before = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    _, prompt = ask(directory)
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before
    template(directory, "{{ 'x' * 3000000000 }}")
    refused(directory, "memory")
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert np.isfinite(prompt.pictures[0].pixel_values).all()


def test_a_template_is_watched_in_other_threads_too(directory, monkeypatch):
    """As a server calls it; a signal would reach the main thread alone."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("ep_export.families.template_limits._MOST_SECONDS", 0.5)
    template(directory, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(refused, directory, "takes over").result()


def test_the_watch_does_not_raise_where_python_would_swallow_it_and_end_the_watch():
    """In the callback of a weak reference, or in a finalizer, that may run on any line of a template."""
    watch = _watch(time.monotonic() - 1)

    class Finalized:
        def __del__(self) -> None:
            """Nothing."""

    for code in (weakref.WeakKeyDictionary()._remove.__code__, Finalized.__del__.__code__):
        assert watch(SimpleNamespace(f_code=code), "call", None) is watch
    with pytest.raises(_OutOfTime):
        watch(SimpleNamespace(f_code=make_tiny.__code__), "call", None)
