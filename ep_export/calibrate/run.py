"""Calibration: a checkpoint and a folder of pictures in, a record out.

Every picture leaves a handful of numbers in a journal on disk and nothing else, so memory is flat in the
number of pictures and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export import __version__
from ep_export.calibrate.candidates import Way, candidate_layers, choices, ways
from ep_export.calibrate.fidelity import before_placeholder, gaps, run_full
from ep_export.calibrate.journal import Journal, PictureResult
from ep_export.calibrate.pictures import PictureFile, find_pictures
from ep_export.calibrate.questions import GENERIC_QUESTIONS, Questions, questions_for
from ep_export.calibrate.recommend import Fidelity, Recommendation, recommend, table
from ep_export.calibrate.record import Provenance, Record, write_record
from ep_export.entropy import Collapse, find_collapse
from ep_export.errors import UserError
from ep_export.plan import check_keep, kept_tokens
from ep_export.policy import EvidenceKind, Keep, Policy
from ep_export.progress import Progress, silent
from ep_export.runtime.pictures import open_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import PromptBuilder

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "Workplace", "calibrate", "load_on", "tool_versions"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Long enough for a sentence; the first tokens of an answer carry most of what pruning changes."""

_JOURNAL_VERSION = 1
"""Raised when the meaning of a journal line changes."""


@dataclass(frozen=True)
class _Setting:
    """What stays the same from picture to picture."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    builder: PromptBuilder
    keep: Keep
    layers: tuple[int, ...]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class _Measured:
    """All pictures: results in order, and the files that could not be used."""

    results: tuple[PictureResult, ...]
    hashes: tuple[str, ...]
    skipped: tuple[str, ...]


def calibrate(
    checkpoint: Checkpoint,
    images: Path,
    *,
    keep: Keep,
    prompts: Questions = GENERIC_QUESTIONS,
    layers: Sequence[int] | None = None,
    max_images: int | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Record:
    """Measure a model on pictures: layer entropies, and how faithful each way of pruning is.

    Args:
        checkpoint: The model.
        images: Folder of pictures.
        keep: Average over layers that policies are compared at.
        prompts: Questions asked in turn, one a picture, or file name -> questions; see `read_questions`.
        layers: Candidate layers; all that `keep` allows when None.
        max_images: Measure a random sample of so many.
        max_new_tokens: Length of the answers that are compared.
        seed: Of every random choice.
        device: Where torch runs, e.g. "cpu" or "cuda". On a GPU the checkpoint's own number type is used.
        out: Record to write, with its plot beside it as .png. Nothing is written when None.
        work: Where the journal lies, kept afterwards; when None, beside `out` and removed in the end.
        progress: Called as ("calibrating", done, total).

    Raises:
        UserError: No usable picture, an impossible keep or layer, or an output that cannot be written.
    """
    check_keep(keep)
    _check_out(out)
    dims = checkpoint.dims
    doors = () if keep.ratio == 1 else candidate_layers(keep, dims.layers, layers)
    pictures = find_pictures(images, most=max_images, seed=seed)
    setting = _Setting(
        model=load_on(checkpoint, device),
        checkpoint=checkpoint,
        builder=checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config),
        keep=keep,
        layers=doors,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    with Workplace(out, work) as directory:
        journal = Journal(directory, _journal_settings(setting, device))
        measured = _measure_all(setting, pictures, prompts, journal, progress)
        record = _record(setting, measured, prompts, images.name or str(images))
        if out is not None:
            _write(out, record)
    return record


def _check_out(out: Path | None) -> None:
    """Find out before hours of work, not after."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"{out} is a directory, expected a file to write", hint="give --out a .json file")
    if out.suffix == ".png":
        raise UserError(f"{out} is the name of the plot, not of the record", hint="give --out a .json file")


class Workplace:
    """The journal's directory: given, beside the record, or temporary; ours is removed after success."""

    def __init__(self, out: Path | None, work: Path | None) -> None:
        self._given = work
        self._out = out
        self._ours: Path | None = None

    def __enter__(self) -> Path:
        if self._given is not None:
            return self._given
        if self._out is None:
            self._ours = Path(tempfile.mkdtemp(prefix="ep-export-calibrate-"))
        else:
            self._ours = self._out.with_name(f".{self._out.name}.work")
        return self._ours

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._ours is None:
            return
        if kind is None or self._out is None or not any(self._ours.glob("*")):
            shutil.rmtree(self._ours, ignore_errors=True)  # done, or nothing in it to go on from


def load_on(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """The model on a device: float32 on a CPU, the checkpoint's own number type elsewhere.

    Raises:
        UserError: There is no such device, or a weight is missing.
    """
    from ep_export.reference import load_model

    dtype = torch.float32 if device == "cpu" else getattr(torch, checkpoint.dtype)
    try:
        return load_model(checkpoint, dtype=dtype).to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it does not have
        if device == "cpu":
            raise
        message = f"device {device} cannot be used: {str(error).splitlines()[0]}"
        raise UserError(message, hint="leave --device out to run on the CPU") from error


def _journal_settings(setting: _Setting, device: str) -> dict[str, object]:
    return {
        "version": _JOURNAL_VERSION,
        "tools": tool_versions(),
        "model": setting.checkpoint.fingerprint,
        "keep": setting.keep,
        "layers": setting.layers,
        "max_new_tokens": setting.max_new_tokens,
        "seed": setting.seed,
        "device": device,
    }


def _measure_all(
    setting: _Setting,
    pictures: Sequence[PictureFile],
    prompts: Questions,
    journal: Journal,
    progress: Progress,
) -> _Measured:
    results: list[PictureResult] = []
    hashes: dict[str, str] = {}  # of usable pictures -> name
    skipped: list[str] = []
    progress("calibrating", 0, len(pictures))
    for turn, picture in enumerate(pictures):
        try:
            digest = picture.sha256()
            _refuse_duplicate(hashes.get(digest))
            asked = questions_for(prompts, picture.name, turn)
            results.append(_result(setting, picture, digest, asked, journal))
            hashes[digest] = picture.name
        except (OSError, UserError) as error:
            skipped.append(f"{picture.name}: {error}")
        progress("calibrating", turn + 1, len(pictures))
    if not results:
        message = f"none of the {len(pictures)} pictures can be used; the first: {skipped[0]}"
        raise UserError(message, hint="give a folder with readable pictures, and questions that match them")
    return _Measured(tuple(results), tuple(hashes), tuple(skipped))


def _refuse_duplicate(same: str | None) -> None:
    """A picture counted twice would narrow every interval without adding evidence."""
    if same is not None:
        raise UserError(f"the same picture as {same}")


def _result(
    setting: _Setting, picture: PictureFile, digest: str, asked: Sequence[str], journal: Journal
) -> PictureResult:
    """From the journal when it was measured before, else measured now and noted there."""
    key = hashlib.sha256("\0".join([digest, *asked]).encode()).hexdigest()
    result = journal.find(key)
    if result is None:
        result = _measure(setting, open_picture(picture.path), asked, key)
        journal.add(result)
    return result


def _measure(setting: _Setting, image: Image.Image, questions: Sequence[str], key: str) -> PictureResult:
    """One picture with all its questions; sums over answer positions become means."""
    parts = [
        _measure_question(setting, image, question, key, entropies=turn == 0)
        for turn, question in enumerate(questions)
    ]
    answer_tokens = sum(part.answer_tokens for part in parts)
    names = set.intersection(*(set(part.kl) for part in parts))
    return PictureResult(
        key=key,
        visual_tokens=parts[0].visual_tokens,
        answer_tokens=answer_tokens,
        # causal: the states of visual tokens before the question do not depend on it
        query_entropy=parts[0].query_entropy,
        key_entropy=parts[0].key_entropy,
        kl={name: sum(part.kl[name] for part in parts) / answer_tokens for name in sorted(names)},
        agreement={
            name: sum(part.agreement[name] for part in parts) / answer_tokens for name in sorted(names)
        },
    )


def _measure_question(
    setting: _Setting, image: Image.Image, question: str, key: str, *, entropies: bool
) -> PictureResult:
    """One prompt; `kl` and `agreement` are sums over its answer positions."""
    from ep_export.reference import greedy

    model, family, config = setting.model, setting.checkpoint.family, setting.checkpoint.config
    prompt = setting.builder.build([image], question)
    visual_tokens = len(prompt.visual_index)
    answer = before_placeholder(greedy(model, family, config, prompt, setting.max_new_tokens), config)
    dims = setting.checkpoint.dims
    full = run_full(
        model, family, prompt, answer, layers=setting.layers, heads=dims.heads, entropies=entropies
    )
    if not np.isfinite([*full.query_entropy, *full.key_entropy]).all():
        raise UserError("the model's states are not finite on this picture")
    decoder = family.decoder(model)
    kl: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for layer in setting.layers:
        try:
            k = kept_tokens(setting.keep, layers=dims.layers, layer=layer, visual_tokens=visual_tokens)
        except UserError:
            continue  # so few tokens cannot be kept of this picture when pruning this late
        at_layer = ways([layer])
        kept = [
            choices(way, full.queries[layer], k, full.visual_index, seed=setting.seed, picture=key)
            for way in at_layer
        ]
        # different scores often keep the same tokens: each set is run once
        sets = {tuple(chosen.tolist()): chosen for draws in kept for chosen in draws}
        found = dict(zip(sets, gaps(decoder, full, layer, list(sets.values())), strict=True))
        for way, draws in zip(at_layer, kept, strict=True):
            gap = [found[tuple(chosen.tolist())] for chosen in draws]
            kl[way.key] = sum(g.kl for g in gap) / len(draws)
            agreement[way.key] = sum(g.agreements for g in gap) / len(draws)
    return PictureResult(key, visual_tokens, len(answer), full.query_entropy, full.key_entropy, kl, agreement)


def _record(setting: _Setting, measured: _Measured, prompts: Questions, source: str) -> Record:
    results = measured.results
    queries = np.array([result.query_entropy for result in results])
    keys = np.array([result.key_entropy for result in results])
    collapse = find_collapse(queries, seed=setting.seed)
    fidelity = _fidelity(setting, results)
    ratio = _ratio(setting.keep, results)
    recommendation = _recommendation(setting, fidelity, collapse)
    checkpoint = setting.checkpoint
    return Record(
        model=checkpoint.source,
        layers=checkpoint.dims.layers,
        query_entropy=_floats(queries.mean(axis=0)),
        key_entropy=_floats(keys.mean(axis=0)),
        images=len(results),
        ecl=collapse.layer,
        confidence=collapse.confidence,
        candidates=table(fidelity, keep=ratio, seed=setting.seed) if fidelity.ways else (),
        recommended=recommendation.policy,
        provenance=Provenance(
            kind=EvidenceKind.MEASURED,
            source=f"pictures in {source}",
            date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
            tools=tool_versions(),
            images_sha256=hashlib.sha256("\n".join(measured.hashes).encode()).hexdigest(),
            questions=_asked(prompts),
            seed=setting.seed,
        ),
        fingerprint=checkpoint.fingerprint,
        query_spread=_floats(queries.std(axis=0)),
        key_spread=_floats(keys.std(axis=0)),
        collapse_finding=collapse.finding,
        recommendation=recommendation.reason,
        recommended_confidence=recommendation.confidence,
        keep=setting.keep,
        skipped=measured.skipped,
    )


def _fidelity(setting: _Setting, results: Sequence[PictureResult]) -> Fidelity:
    """Ways measured on every picture, as matrices."""
    every = set.intersection(*(set(result.kl) for result in results))
    measured: tuple[Way, ...] = tuple(way for way in ways(setting.layers) if way.key in every)
    if setting.layers and not measured:
        raise UserError(
            f"keep {setting.keep} is impossible on every layer for some picture",
            hint="keep more tokens, or leave out the largest pictures",
        )
    return Fidelity(
        ways=measured,
        kl=np.array([[result.kl[way.key] for way in measured] for result in results]),
        agreement=np.array([[result.agreement[way.key] for way in measured] for result in results]),
    )


def _recommendation(setting: _Setting, fidelity: Fidelity, collapse: Collapse) -> Recommendation:
    if fidelity.ways:
        return recommend(fidelity, seed=setting.seed)
    policy = Policy(layer=collapse.layer or 1)
    return Recommendation(policy, None, "nothing is dropped at keep 1, so that all policies are the same")


def _ratio(keep: Keep, results: Sequence[PictureResult]) -> float:
    """The keep ratio measured, on average over pictures."""
    if keep.ratio is not None:
        return keep.ratio
    tokens = keep.tokens or 0
    return float(np.mean([min(1.0, tokens / result.visual_tokens) for result in results]))


def _asked(prompts: Questions) -> tuple[str, ...]:
    """The different questions, at most 20 of them: enough to see what a record was measured with."""
    flat = [q for asked in prompts.values() for q in asked] if isinstance(prompts, dict) else list(prompts)
    return tuple(dict.fromkeys(flat))[:20]


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def tool_versions() -> dict[str, str]:
    """Package name -> version of everything that decides a measured number."""
    packages = ("torch", "transformers", "numpy", "pillow")
    return {"ep-export": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _write(out: Path, record: Record) -> None:
    from ep_export.calibrate.figure import plot

    write_record(out, record)
    plot(record, out.with_suffix(".png"))
