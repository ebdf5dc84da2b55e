"""A bench around a model that the test has loaded itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_export.checkpoint import Checkpoint
from ep_export.measure.bench import Bench, Setting
from ep_export.measure.pictures import PictureFile
from ep_export.measure.question import Question
from ep_export.measure.spelling import Speller
from ep_export.measure.ways import Way, WayCut
from ep_export.methods import method_named
from ep_export.policy import Keep

__all__ = ["bench_of", "question_about", "two_cuts"]


def bench_of(checkpoint: Checkpoint, model: Any, ways: Sequence[Way], *, max_new_tokens: int = 8) -> Bench:
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    setting = Setting(tuple(ways), draws=2, seed=0, max_new_tokens=max_new_tokens, device="cpu")
    return Bench(
        checkpoint=checkpoint,
        setting=setting,
        model=model,
        decoder=checkpoint.family.decoder(model),
        builder=builder,
        speller=Speller(checkpoint.path, builder.eos_token_ids),
        methods={cut.method: method_named(cut.method) for way in ways for cut in way.cuts},
    )


def question_about(file: Path, text: str, answers: tuple[str, ...] = ()) -> Question:
    picture = PictureFile(file.name, file)
    return Question(picture, picture.sha256(), text, answers)


def two_cuts(first: tuple[int, float, str], second: tuple[int, float, str], keep: float) -> Way:
    cuts = tuple(WayCut(layer, method, share) for layer, share, method in (first, second))
    return Way(cuts, Keep(ratio=keep))
