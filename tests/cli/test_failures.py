"""How a verb fails: an object where a machine reads, a hint where a package is left out, a source with -v."""

import json
import re
import subprocess
import sys

import pytest
from command_line import ep_export
from tiny import tiny_picture

from ep_export.cli.main import cli
from ep_export.interrupts import Terminated

PLAN = ("plan", "--model", "no-such-model", "--keep", "0.25")


def test_a_failure_with_json_is_an_object_on_stdout():
    result = ep_export(*PLAN, "--json")
    error = json.loads(result.out)["error"]
    assert (error["exit_code"], result.code) == (1, 1)
    assert "'no-such-model' is no model directory" in error["message"]
    assert error["hint"].startswith("known: ")
    assert "error: 'no-such-model'" in result.err


def test_wrong_usage_with_json_is_an_object_too():
    result = ep_export("plan", "--keep", "0.25", "--json")
    assert (json.loads(result.out)["error"]["exit_code"], result.code) == (2, 2)


def test_nothing_is_on_stdout_without_json():
    assert ep_export(*PLAN).out == ""


def test_verbose_says_where_an_error_came_from():
    assert "Traceback" in ep_export("-v", *PLAN).err
    assert "Traceback" not in ep_export(*PLAN).err


def test_quiet_leaves_notes_out_and_errors_in():
    known = ("plan", "--model", "qwen2.5-vl-7b", "--keep", "0.25")
    assert "schedule:" in ep_export(*known).err
    assert ep_export("-q", *known).err == ""
    assert "error:" in ep_export("-q", *PLAN).err


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("torch", ("validate", "BUNDLE"), "ep-export[export]"),
        (
            "onnx_ir",
            ("export", "--model", "MODEL", "--keep", "0.5", "--layer", "1", "--out", "OUT"),
            "[export]",
        ),
        ("onnxruntime", ("run", "BUNDLE", "--prompt", "hello"), "[gpu]"),
    ],
)
def test_a_package_that_is_not_installed_is_a_hint(
    package, arguments, extra, tiny_bundle, tiny_checkpoint, tmp_path
):
    places = {"BUNDLE": tiny_bundle.path, "MODEL": tiny_checkpoint, "OUT": tmp_path / "out"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    program = f"import sys; sys.modules[{package!r}] = None; from ep_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "is not installed" in done.stderr
    assert extra in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_called_like_a_package_breaks_nothing(tiny_checkpoint, tmp_path):
    (tmp_path / "triton").mkdir()
    arguments = ["export", "--model", str(tiny_checkpoint), "--keep", "0.5", "--layer", "1", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "ep_export", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_interruption_that_a_native_module_took_for_its_own_fault_is_one(monkeypatch):
    def imports(**_):
        try:
            raise Terminated
        except Terminated as error:
            raise ImportError("initialization failed") from error  # as pybind11 has it

    monkeypatch.setattr(cli, "main", imports)
    result = ep_export("plan")
    assert result.code == 143
    assert result.err.startswith("error: interrupted")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fails(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", fails)
    with pytest.raises(ZeroDivisionError):
        ep_export("plan")


ASK = ("--image", "PICTURE", "--prompt", "What")
MADE_BY = {"build with": "build", "build it": "build", "export with": "export", "compile": "compile"}


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("run", (*ASK, "--keep", "0.01")),
        ("run", (*ASK, "--keep-tokens", "1")),
        ("run", (*ASK, "--keep", "1.5")),
        ("run", (*ASK, "--keep", "adaptive:0.5")),
        ("run", (*ASK, "--keep", "0.5", "--keep-tokens", "4")),
        ("run", (*ASK, "--policy", "divprune")),
        ("run", (*ASK, "--policy", "random", "--policy", "random")),
        ("run", (*ASK, "--video", "PICTURE")),
        ("run", (*ASK, "--fps", "2")),
        ("run", (*ASK, "--target", "h100")),
        ("run", (*ASK, "--runtime", "tensorrt")),
        ("run", (*ASK, "--runtime", "tensorrt", "--threads", "2")),
        ("run", (*ASK, "--provider", "cuda")),
        ("run", (*ASK, "--show", "kept.txt")),
        ("run", ("--prompt", "What", "--show", "kept.png")),
        ("bench", ("--keep", "0.01")),
        ("bench", ("--policy", "divprune")),
        ("bench", ("--prompts", "asked.json")),
        ("bench", ("--image", "PICTURE", "--images", ".")),
        ("bench", ("--video", "PICTURE")),
        ("bench", ("--runtime", "tensorrt")),
        ("serve", ("--runtime", "tensorrt")),
        ("serve", ("--provider", "cuda")),
        ("validate", ("--bisect",)),
        ("validate", ("--polygraphy", "--report", "report")),
        ("validate", ("--policy", "divprune")),
    ],
)
def test_a_hint_names_options_that_the_verb_has(verb, options, tiny_bundle, tmp_path):
    """Or says of which verb they are."""
    picture = tmp_path / "picture.png"
    tiny_picture(84, 56).save(picture)
    result = ep_export(verb, str(tiny_bundle.path), *(str(picture) if o == "PICTURE" else o for o in options))
    assert result.code in {1, 2}, result.err
    (hint,) = re.findall(r"^hint: (.*)$", result.err, re.MULTILINE)
    named = [other for words, other in MADE_BY.items() if words in hint]
    known = {name for each in (verb, *named) for option in cli.commands[each].params for name in option.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", hint)) <= known | {"--help"}, hint
