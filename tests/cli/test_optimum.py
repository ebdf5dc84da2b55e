"""The same verbs as `optimum-cli ep-export ...`, found by the installed optimum itself."""

import importlib.util
import json
import subprocess
import sys

import pytest
from command_line import ep_export

from ep_export.bundle import Bundle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optimum.commands") is None
    or importlib.util.find_spec("optimum.commands.optimum_cli") is None,
    reason="optimum is not installed (pip install 'ep-export[optimum]')",
)


def optimum_cli(*arguments):
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_optimum_lists_the_command():
    result = optimum_cli("--help")
    assert result.returncode == 0, result.stderr
    assert "ep-export" in result.stdout
    assert "Export vision-language models" in result.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_ours_under_optimums_name(option):
    result = optimum_cli("ep-export", "build", option)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: optimum-cli ep-export build [OPTIONS]")
    assert "--keep R" in result.stdout


def test_build_is_the_same_build(tiny_checkpoint, tiny_bundle, tmp_path):
    arguments = ("build", "--model", str(tiny_checkpoint), "--layer", "2", "--keep", "0.75", "--no-validate")
    arguments += ("--dialect", "portable")  # as that bundle
    result = optimum_cli("ep-export", *arguments, "--out", str(tmp_path / "bundle"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "bundle")
    theirs, ours = Bundle.open(tmp_path / "bundle").manifest, tiny_bundle.manifest
    assert (theirs.files, theirs.components) == (ours.files, ours.components)
    assert (theirs.schedule, theirs.keep) == (ours.schedule, ours.keep)


def test_data_errors_and_exit_codes_are_ours():
    plan = ["plan", "--model", "llava-1.5-7b", "--keep", "0.25", "--json"]
    shown = optimum_cli("ep-export", *plan)
    assert json.loads(shown.stdout) == json.loads(ep_export(*plan).out)
    usage = optimum_cli("ep-export", "plan")
    assert (usage.returncode, "Missing option '--model'" in usage.stderr) == (2, True)
    failed = optimum_cli("ep-export", "inspect", "nowhere")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: nowhere is not a bundle")
