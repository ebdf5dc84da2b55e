"""Accuracy of the shipped model on held-out questions, unpruned and pruned, as ONNX Runtime answers them.

For each keep a calibration on pictures of the calibration split recommends a schedule, which is compared on
the test split with the paper's policy, DivPrune and random tokens at its first cut: policies of one bundle.
Every figure is printed as it is, with its 95% interval.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from digit_scenes import READING, Question, Scene, held_out, make_scene, questions

from ep_export.bundle import Dialect, Precision, WeightsMode
from ep_export.calibrate import calibrate
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.export import export_bundle
from ep_export.policy import Chooser, Cut, Evidence, EvidenceKind, Keep, MaxMin, Random, Schedule, TopK
from ep_export.runtime import Session

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
KEEPS = (0.5, 0.25, 0.125)
RIVALS = (TopK(), MaxMin(), Random())
MAX_NEW_TOKENS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=48, help="calibration pictures")
    options = parser.parse_args()
    checkpoint = open_checkpoint(str(READER))
    asked = list(held_out(options.questions, seed=2))
    print(f"{options.questions} held-out questions, {options.pictures} calibration pictures, exact answers")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        prompts = write_pictures(work / "pictures", options.pictures)
        first = Schedule((Cut(1, TopK()),))
        with bundle_session(checkpoint, first, work, keep=Keep(ratio=1.0)) as session:
            report("unpruned", "", 1.0, accuracy(session, asked, None))
        for ratio in KEEPS:
            keep = Keep(ratio=ratio)
            record = calibrate(checkpoint, work / "pictures", keep=keep, prompts=prompts)
            schedule = record.recommended or Schedule((Cut(record.ecl or 1, TopK()),))
            with bundle_session(checkpoint, schedule, work, keep=keep) as session:
                if record.recommended is not None:
                    report("recommended", str(schedule), ratio, accuracy(session, asked, keep))
                for rival in rivals(schedule):
                    if schedule.cuts[0].chooser != rival:
                        later = (cut.chooser.name for cut in schedule.cuts[1:])
                        score = accuracy(session, asked, keep, policies=(rival.name, *later))
                        report(rival.name, "at the first cut", ratio, score)
            print(f"  {'':14s} {record.collapse_finding}\n  {'':14s} {record.recommendation}")
    return 0


def write_pictures(directory: Path, count: int) -> dict[str, list[str]]:
    """Calibration pictures on disk; returns one question for each, the kinds taking turns."""
    directory.mkdir()
    prompts = {}
    for index in range(count):
        scene = make_scene("calibration", index=index)
        scene.picture.save(directory / f"{index:04d}.png")
        fitting = [question for question in questions(scene) if question.kind in READING]
        prompts[f"{index:04d}.png"] = [fitting[index % len(fitting)].text]
    return prompts


def rivals(schedule: Schedule) -> tuple[Chooser, ...]:
    """Those that can choose at its cuts: before layer 0 there are no projections to score."""
    scores = schedule.cuts[0].layer > 0
    return tuple(rival for rival in RIVALS if scores or not isinstance(rival, TopK))


@contextlib.contextmanager
def bundle_session(
    checkpoint: Checkpoint, schedule: Schedule, work: Path, *, keep: Keep
) -> Iterator[Session]:
    """A bundle of that schedule and the rivals, open."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        bundle = export_bundle(
            checkpoint,
            Path(directory),
            schedule=schedule,
            evidence=Evidence(EvidenceKind.TOLD, "a bench"),
            keep=keep,
            dialect=Dialect.PORTABLE,
            precision=Precision.FP32,
            weights=WeightsMode.COPY,
            policies=rivals(schedule),
        )
        with Session.open(bundle) as session:
            yield session


def accuracy(
    session: Session, asked: list[tuple[Scene, Question]], keep: Keep | None, policies: tuple[str, ...] = ()
) -> tuple[int, int]:
    """(exactly right, asked); without a keep unpruned."""
    right = 0
    for scene, question in asked:
        answer = session.generate(
            [scene.picture],
            question.text,
            max_new_tokens=MAX_NEW_TOKENS,
            keep=keep,
            policies=policies,
            prune=keep is not None,
        )
        right += answer.answer.strip() == question.answer
    return right, len(asked)


def report(name: str, policy: str, ratio: float, score: tuple[int, int]) -> None:
    """One line; the interval is Wilson's."""
    right, asked = score
    share, z = right / asked, 1.96
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    interval = f"[{middle - half:.1%}, {middle + half:.1%}]"
    print(f"  {name:14s} keep {ratio:<6g} {share:6.1%} {interval}  {policy}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
