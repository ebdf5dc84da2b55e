"""The four verbs from Python: the examples of their docstrings run as printed, and what they refuse."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from digit_scenes import held_out

import ep_export
from ep_export import api
from ep_export.policy import Cut, MaxMin

READER = Path(__file__).parent / "fixtures" / "digit-reader"
VERBS = ("plan", "build", "open", "prune")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What the examples speak of: a model and a photo."""
    path = tmp_path_factory.mktemp("desk")
    shutil.copytree(READER, path / "digit-reader")
    ((scene, _),) = held_out(1)
    scene.picture.save(path / "photo.png")
    return path


def test_examples_in_docstrings_print_what_they_say(desk, monkeypatch):
    monkeypatch.chdir(desk)
    examples = {test.name: test for test in doctest.DocTestFinder().find(api) if test.examples}
    order = ["plan", "build", "open_bundle", "OpenBundle.answer", "OpenBundle.stream", "prune"]
    assert sorted(examples) == sorted(f"ep_export.api.{name}" for name in order)
    runner = doctest.DocTestRunner()
    said: list[str] = []
    for name in order:  # the bundle is built before it is opened
        runner.run(examples[f"ep_export.api.{name}"], out=said.append)
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_where_one_types_them(verb):
    assert verb in dir(ep_export)
    assert callable(getattr(ep_export, verb))
    assert ">>>" in getattr(ep_export, verb).__doc__


def test_importing_a_module_of_the_package_hides_no_verb():
    code = (
        "import ep_export, pkgutil\n"
        "names = {module.name for module in pkgutil.iter_modules(ep_export.__path__)}\n"
        f"print(sorted(names & set({VERBS!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("keep", [0.25, np.float32(0.25), np.float64(0.25), "25%", "0.25"])
def test_a_keep_is_a_number_whoever_made_it(keep):
    assert ep_export.plan("qwen2.5-vl-7b", keep=keep).kept_visual_tokens == (86,)
    assert ep_export.plan("qwen2.5-vl-7b", keep=keep, layer=np.int64(1)).kept_visual_tokens == (86,)


def test_cuts_are_text_or_values():
    texts = ep_export.plan("qwen2.5-vl-7b", cuts=["1:50%:divprune", "12:0:nothing"])
    values = ep_export.plan("qwen2.5-vl-7b", cuts=[Cut(1, MaxMin(), 0.5), "12:0:nothing"])
    assert texts.kept_visual_tokens == values.kept_visual_tokens == (195, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": "many"}, "keep 'many' is no share"),
        ({"keep": 0.25, "keep_tokens": 3}, "keep and keep_tokens exclude each other"),
        ({"cuts": ["1:50%"], "layer": 1}, "layer and cuts exclude each other"),
        ({"keep": 1.5}, "expected 0 < keep <= 1"),
        ({"keep": 0.25, "layer": 1, "policy": "loudest"}, "loudest"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said):
    with pytest.raises(ep_export.UserError, match=said):
        ep_export.plan("qwen2.5-vl-7b", **arguments)


def test_a_name_that_is_none_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'make_plan'"):
        _ = ep_export.make_plan
