"""A few pictures with what every method kept of them and said about them.

They are taken at equal distances from the list of questions, whatever the outcome: a gallery of chosen
successes, or failures, would persuade and not inform.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ep_export.measure.ask import full_pass
from ep_export.measure.bench import build_prompt
from ep_export.measure.choosing import Prompted, kept_by
from ep_export.measure.question import normalise
from ep_export.progress import Progress, silent
from ep_export.reference import PruneSpec, greedy, staying
from ep_export.runtime.kept import kept_pictures
from ep_export.sweep.record import GalleryAnswer, GalleryEntry

if TYPE_CHECKING:
    from ep_export.choosers import CutTokens
    from ep_export.measure.bench import Bench
    from ep_export.measure.pruned import KeptSets
    from ep_export.measure.question import Question, QuestionResult
    from ep_export.measure.ways import Way
    from ep_export.sweep.compared import Compared

__all__ = ["GALLERY_FOLDER", "gallery", "pruned_answer"]

GALLERY_FOLDER = "pictures"


def gallery(
    bench: Bench,
    answered: Sequence[tuple[Question, QuestionResult]],
    shown: Sequence[Compared],
    out: Path,
    *,
    progress: Progress = silent,
) -> tuple[GalleryEntry, ...]:
    """Answer some questions in every shown way and copy their pictures.

    Args:
        bench: The setting.
        answered: Questions, already thinned out, with their results.
        shown: What is shown; a method of chance shows its first draw.
        out: The sweep's directory; pictures go into a folder of it.
        progress: Called as ("gallery", done, total).
    """
    (out / GALLERY_FOLDER).mkdir(exist_ok=True)
    entries = []
    progress("gallery", 0, len(answered))
    for number, (question, result) in enumerate(answered):
        picture = f"{GALLERY_FOLDER}/{number:02d}{question.picture.path.suffix.lower()}"
        shutil.copyfile(question.picture.path, out / picture)
        entries.append(
            GalleryEntry(
                picture=picture,
                sha256=question.digest,
                question=question.text,
                answer=question.answers[0] if question.answers else None,
                full_answer=result.full_answer,
                full_right=result.full_right,
                answers=_answers(bench, question, result, shown),
            )
        )
        progress("gallery", number + 1, len(answered))
    return tuple(entries)


def pruned_answer(bench: Bench, prompted: Prompted, way: Way, kept: KeptSets) -> list[int]:
    """Ids of the greedy answer where these tokens are kept: Hugging Face's own generate, pruned.

    Args:
        bench: The setting.
        prompted: What is asked.
        way: Where and how much is pruned.
        kept: What stays at each of its cuts.
    """
    full = prompted.full
    visual = full.visual_index
    arriving = torch.arange(full.prompt_length, device=visual.device)
    places = []
    for _, positions in kept:
        stays = torch.tensor(positions, dtype=torch.int64, device=visual.device)
        places.append(torch.searchsorted(arriving, stays))
        arriving = staying(full.prompt_length, visual, stays)

    def select(cut: int, tokens: CutTokens, _k: int) -> torch.Tensor:
        return places[cut].to(tokens.visual_index.device)

    return greedy(
        bench.model,
        bench.checkpoint.family,
        bench.checkpoint.config,
        prompted.prompt,
        bench.setting.max_new_tokens,
        plan=PruneSpec(way.schedule, way.keep),
        select=select,
    )


def _answers(
    bench: Bench, question: Question, result: QuestionResult, shown: Sequence[Compared]
) -> tuple[GalleryAnswer, ...]:
    prompt = build_prompt(bench, question)
    prompted = Prompted(question, prompt, full_pass(bench, prompt, bench.speller.end[:1]))
    kept = kept_by(bench, prompted, list(dict.fromkeys(one.way for one in shown)))
    known = {normalise(answer) for answer in question.answers}
    answers = []
    for one in shown:
        sets = kept[one.way.key][0]
        text = bench.builder.decode(pruned_answer(bench, prompted, one.way, sets)).strip()
        parts = kept_pictures(prompt, [torch.tensor(positions).numpy() for _, positions in sets])
        answers.append(
            GalleryAnswer(
                method=one.method,
                layer=one.layer,
                keep=one.keep,
                answer=text,
                right=normalise(text) in known if known else None,
                kept=parts,
                same=normalise(text) == normalise(result.full_answer),
            )
        )
    return tuple(answers)
