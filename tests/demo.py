"""`make demo`: the main job on the shipped model and real pictures, as a user would type it.

Makes pictures (handwritten digits on photographs, see tests/fixtures/digit_scenes.py), builds a pruned bundle
from them, asks it about a picture it has never seen, and measures the time to the first token, unpruned and
pruned. Every line after `$` can be copied.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

FIXTURES = Path(os.path.relpath(Path(__file__).parent / "fixtures"))
CALIBRATION_PICTURES = 24
TEST_PICTURES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(FIXTURES / "digit-reader"))
    parser.add_argument("--keep", default="0.25")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args()

    pictures, unseen, bundle = options.out / "pictures", options.out / "unseen", options.out / "bundle"
    scenes = [sys.executable, str(FIXTURES / "digit_scenes.py")]
    run([*scenes, str(pictures), "--count", str(CALIBRATION_PICTURES), "--split", "calibration"])
    run([*scenes, str(unseen), "--count", str(TEST_PICTURES), "--split", "test"])

    export = str(Path(sys.executable).with_name("ep-export"))
    build = ["build", "--model", options.model, "--keep", options.keep]
    own = ["--images", str(pictures), "--prompts", str(pictures / "prompts.json")]
    run([export, *build, *own, "--out", str(bundle), "--overwrite"])

    picture = json.loads((unseen / "questions.json").read_text(encoding="utf-8"))["pictures"][0]
    asked = picture["questions"][0]
    kept = options.out / "kept.png"
    image = unseen / picture["file"]
    print(f"\nquestion: {asked['question']}   (right answer: {asked['answer']})", flush=True)
    run(
        [
            export,
            "run",
            str(bundle),
            "--image",
            str(image),
            "--prompt",
            asked["question"],
            "--show",
            str(kept),
        ]
    )
    run([export, "bench", str(bundle), "--image", str(image), "--rounds", "5", "--max-new-tokens", "8"])
    print(f"\nreport:   {bundle / 'report' / 'report.html'}\npicture:  {kept}")
    return 0


def run(command: list[str]) -> None:
    """Show a command and run it; its failure ends the demo with its exit code."""
    shown = [Path(command[0]).name, *command[1:]]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
