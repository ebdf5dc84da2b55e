"""A few pictures with what every method kept of them and said about them.

They are taken at equal distances from the list of questions, whatever the outcome: a gallery of chosen
successes, or failures, would persuade and not inform.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.calibrate.fidelity import FullPass, pruned_log_probs, run_full
from ep_export.errors import UserError
from ep_export.progress import Progress, silent
from ep_export.reference import greedy
from ep_export.sweep.dataset import normalise
from ep_export.sweep.measure import build_prompt, choose_kept
from ep_export.sweep.record import GalleryAnswer, GalleryEntry, GalleryPart
from ep_export.sweep.view import instruction_positions, token_view

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs
    from ep_export.sweep.dataset import Item
    from ep_export.sweep.measure import Bench
    from ep_export.sweep.ways import Way

__all__ = ["GALLERY_FOLDER", "Answerer", "gallery"]

GALLERY_FOLDER = "pictures"


class Answerer:
    """Greedy answers of the pruned model to one prompt, for any way of pruning.

    The unpruned layers are run once for every beginning of an answer, however many ways of pruning say it.

    Args:
        bench: The setting.
        prompt: What is asked.
    """

    def __init__(self, bench: Bench, prompt: PromptInputs) -> None:
        self._bench = bench
        self._prompt = prompt
        self._decoder = bench.checkpoint.family.decoder(bench.model)
        self._passes: dict[tuple[int, ...], FullPass] = {}

    def after(self, answer: Sequence[int] = ()) -> FullPass:
        """The unpruned pass over prompt and the beginning of an answer; its last row predicts the next id."""
        begun = tuple(answer)
        if begun not in self._passes:
            bench = self._bench
            self._passes[begun] = run_full(
                bench.model,
                bench.checkpoint.family,
                self._prompt,
                [*begun, 0],  # the last id is only predicted, so that any may stand here
                layers=bench.doors,
                heads=bench.checkpoint.dims.heads,
                entropies=False,
                projections=True,
            )
        return self._passes[begun]

    def answer(self, layer: int, kept: torch.Tensor) -> list[int]:
        """Ids of the greedy answer, its end token included when it came.

        Args:
            layer: K.
            kept: [k] kept visual positions.
        """
        said: list[int] = []
        while len(said) < self._bench.max_new_tokens:
            (log_probs,) = pruned_log_probs(self._decoder, self.after(said), layer, [kept])
            said.append(int(log_probs[-1].argmax()))
            if said[-1] in self._bench.speller.end or self._is_placeholder(said[-1]):
                break
        return said

    def _is_placeholder(self, token: int) -> bool:
        """Whether an id asks for another picture: it cannot be fed back."""
        from ep_export.reference import visual_positions

        return len(visual_positions(torch.tensor([token]), self._bench.checkpoint.config)) > 0


def gallery(
    bench: Bench, items: Sequence[Item], shown: Sequence[Way], out: Path, *, progress: Progress = silent
) -> tuple[GalleryEntry, ...]:
    """Answer some questions in every shown way and copy their pictures.

    Args:
        bench: The setting.
        items: Questions, already thinned out.
        shown: Ways; a method of chance shows its first draw.
        out: The sweep's directory; pictures go into a folder of it.
        progress: Called as ("gallery", done, total).
    """
    (out / GALLERY_FOLDER).mkdir(exist_ok=True)
    entries = []
    progress("gallery", 0, len(items))
    for number, item in enumerate(items):
        entries.append(_entry(bench, item, shown, out, number))
        progress("gallery", number + 1, len(items))
    return tuple(entries)


def _entry(bench: Bench, item: Item, shown: Sequence[Way], out: Path, number: int) -> GalleryEntry:
    prompt = build_prompt(bench, item)
    if not prompt.pictures:
        raise UserError("the prompt holds no picture")  # unreachable: it was measured
    answerer = Answerer(bench, prompt)
    checkpoint = bench.checkpoint
    own = greedy(bench.model, checkpoint.family, checkpoint.config, prompt, bench.max_new_tokens)
    full_answer = bench.builder.decode(own).strip()
    known = {normalise(answer) for answer in item.answers}
    expected = known or {normalise(full_answer)}
    relative = f"{GALLERY_FOLDER}/{number:02d}{item.picture.path.suffix.lower()}"
    shutil.copyfile(item.picture.path, out / relative)
    answers = []
    for way in shown:
        kept = _kept(bench, item, prompt, answerer, way)
        text = bench.builder.decode(answerer.answer(way.spot.layer, kept)).strip()
        answers.append(
            GalleryAnswer(
                method=way.method.key,
                layer=way.spot.layer,
                keep=way.spot.keep,
                answer=text,
                right=normalise(text) in expected,
                kept_cells=_cells(prompt, kept),
            )
        )
    return GalleryEntry(
        picture=relative,
        sha256=item.digest,
        size=prompt.pictures[0].size,
        question=item.question,
        answer=item.answers[0] if item.answers else None,
        full_answer=full_answer,
        full_right=normalise(full_answer) in known if known else None,
        parts=tuple(GalleryPart(picture.token_grid, picture.view) for picture in prompt.pictures),
        answers=tuple(answers),
    )


def _kept(bench: Bench, item: Item, prompt: PromptInputs, answerer: Answerer, way: Way) -> torch.Tensor:
    view = token_view(
        bench.checkpoint.family.decoder(bench.model),
        bench.checkpoint.dims,
        answerer.after(),
        way.spot.layer,
        prompt=prompt,
        instruction=instruction_positions(prompt, bench.speller.words(item.question)),
        rng=np.random.default_rng(0),
    )
    return choose_kept(bench, item, way, view)[0]


def _cells(prompt: PromptInputs, kept: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """For every part of the picture, the cells whose token is kept."""
    flags = np.isin(prompt.visual_index, kept.cpu().numpy())
    found = []
    start = 0
    for picture in prompt.pictures:
        end = start + picture.visual_tokens
        found.append(tuple(int(cell) for cell in np.flatnonzero(picture.kept_cells(flags[start:end]))))
        start = end
    return tuple(found)
