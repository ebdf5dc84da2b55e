"""A sweep's record with a gallery, small enough to read."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ep_export.bundle import hash_file
from ep_export.dims import DecoderDims
from ep_export.measure.question import Skipped
from ep_export.measure.ways import WayCut
from ep_export.runtime.kept import KeptPicture
from ep_export.sweep.record import (
    AnsweredQuestion,
    Dataset,
    Difference,
    Entropies,
    GalleryAnswer,
    GalleryEntry,
    MethodInfo,
    Row,
    SweepRecord,
    Unpruned,
)
from ep_export.sweep.statistics import MeanInterval

__all__ = ["QUESTION", "UNSURE", "example", "mean", "row"]

QUESTION = 'Is <b>1</b> & "2" there?'
UNSURE = MeanInterval(0, -1, 1, "bootstrap")


def mean(value: float, spread: float = 0.1) -> MeanInterval:
    return MeanInterval(value, value - spread, value + spread, "wilson")


def row(
    method: str,
    layer: int,
    keep: float,
    accuracy: float,
    over_random: float | None = None,
    below_best: float | None = 0.5,
) -> Row:
    """`over_random`: paired difference to random, its interval 0.1 wide on both sides; `below_best` alike."""
    difference = Difference(mean(over_random), UNSURE, mean(0.2)) if over_random else None
    policy = {"recommended": "norm-lowest", "schedule": "divprune"}.get(method, method)
    second = (WayCut(3, "random", 0.1),) if method == "schedule" else ()
    return Row(
        method=method,
        layer=layer,
        keep=keep,
        cuts=(WayCut(layer, policy, 0.5 if second else None), *second),
        published=None,
        seeds=1,
        accuracy=mean(accuracy),
        agreement=mean(0.9),
        kl=mean(0.5),
        kept_tokens=(4,),
        flops=50.0,
        first_token_flops=250.0,
        kv_bytes=10.0,
        prefill=None,
        right=("10",),
        over_random=difference,
        below_best=None if below_best is None else mean(below_best),
    )


def example(folder: Path) -> SweepRecord:
    """Ways at layers 1 and 2, a schedule, a recommendation and the floor; its gallery lies in the folder."""
    Image.new("RGB", (64, 32), (200, 30, 30)).save(folder / "seen.png")
    titles = (
        ("recommended", "Recommended"),
        ("schedule", "Your schedule"),
        ("paper-highest", "Paper, highest"),
        ("random", "Random"),
    )
    entry = GalleryEntry(
        picture="seen.png",
        sha256=hash_file(folder / "seen.png"),
        question=QUESTION,
        answer="yes",
        full_answer="yes",
        full_right=True,
        answers=(GalleryAnswer("recommended", 2, 0.5, "<script>no", False, (KeptPicture((2, 4), (0, 5)),)),),
    )
    return SweepRecord(
        model="some/where/tiny",
        fingerprint="f" * 64,
        family="qwen2_5_vl",
        layers=4,
        dims=DecoderDims(4, 64, 4, 2, 16, 128, 100, 512, 3),
        tools={"torch": "2"},
        date="2026-01-01",
        machine="a machine",
        seed=0,
        dataset=Dataset("pictures", 2, 1, True, (Skipped("broken.png", "damaged"),), "0" * 64),
        keeps=(0.5,),
        swept_layers=(1, 2),
        methods=tuple(MethodInfo(key, title, "a paper", "an idea", True) for key, title in titles),
        unpruned=Unpruned(mean(0.95), "11", 8, 6, 100.0, 300.0, 20.0, None),
        entropies=Entropies((1, 2, 3, 4), (1, 1, 1, 1), (0.1,) * 4, (0.1,) * 4, 5, None, 0.5, "none found"),
        recommended=(),
        rows=(
            row("paper-highest", 1, 0.5, 0.8, over_random=0.3, below_best=None),
            row("paper-highest", 2, 0.5, 0.2, over_random=-0.3),
            row("recommended", 2, 0.5, 0.7, over_random=0.05, below_best=0.05),
            row("schedule", 1, 0.5, 0.6, over_random=0.3),
            row("random", 1, 0.5, 0.5),
            row("random", 2, 0.5, 0.5),
        ),
        questions=(AnsweredQuestion("seen.png", QUESTION, "yes", "yes"),) * 2,
        gallery=(entry,),
        seconds=60,
    )
