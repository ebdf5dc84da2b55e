"""Hundreds of questions in one session: memory, open files and threads stay where they were."""

from __future__ import annotations

import gc
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import export_tiny
from tiny import tiny_picture

from ep_export.bundle import Bundle
from ep_export.runtime import Session

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
QUESTIONS = 500
SETTLED = 100
"""Questions after which every size was seen: ONNX Runtime keeps memory for each."""

_MORE_BYTES = 8 << 20
"""Noise of the allocators; a leak of one decoder cache a question (30 KB) would be 12 MB."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    bytes: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))  # noqa: PTH208
        return cls(pages * resource.getpagesize(), files, threads)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_tiny(READER, tmp_path_factory.mktemp("soak") / "bundle", layer=2)


@pytest.mark.parametrize(
    "model",
    [
        "tiny",
        pytest.param(
            "shipped",
            marks=pytest.mark.skipif("INTERRUPTIONS" not in os.environ, reason="takes minutes: make attack"),
        ),
    ],
)
def test_a_session_holds_no_more_after_hundreds_of_questions(
    model: str, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue({"tiny": "tiny_bundle"}.get(model, model))
    sizes = ((56, 56), (112, 84), (84, 140), (168, 56))
    pictures = [tiny_picture(*size, seed=number) for number, size in enumerate(sizes)]
    held = []
    with Session.open(bundle) as session:
        for number in range(QUESTIONS):
            shown = [pictures[(number + more) % len(pictures)] for more in range(number % 3)]
            answer = session.generate(shown, "What is this?", max_new_tokens=2)
            assert len(answer.token_ids) <= 2
            if number in {SETTLED - 1, QUESTIONS - 1}:
                held.append(Held.now())
    settled, last = held
    assert last.bytes - settled.bytes < _MORE_BYTES
    assert (last.files, last.threads) == (settled.files, settled.threads)
