"""The record on disk: whole, checked, and the same after reading."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.measure.question import Skipped
from ep_export.measure.ways import WayCut
from ep_export.policy import Cut, MaxMin, Schedule
from ep_export.runtime.kept import KeptPicture
from ep_export.sweep import read_sweep, write_sweep
from ep_export.sweep.record import (
    SWEEP_FILE,
    AnsweredQuestion,
    Dataset,
    Difference,
    Entropies,
    GalleryAnswer,
    GalleryEntry,
    MethodInfo,
    Prefill,
    Recommended,
    Row,
    SweepRecord,
    Unpruned,
)
from ep_export.sweep.statistics import MeanInterval

MEAN = MeanInterval(0.5, 0.4, 0.6, "wilson")
ROW = Row(
    method="random",
    layer=1,
    keep=0.5,
    cuts=(WayCut(1, "random"),),
    published=None,
    seeds=2,
    accuracy=MEAN,
    agreement=MEAN,
    kl=MEAN,
    kept_tokens=(3.0,),
    flops=1e9,
    first_token_flops=2e9,
    kv_bytes=1e6,
    prefill=Prefill(2.0, 1.0, 2.0, 1.9, 2.1, 6),
    right=("10", "11"),
    over_random=Difference(None, MEAN, MEAN),
)
RECORD = SweepRecord(
    model="m",
    fingerprint="f",
    family="qwen2_5_vl",
    layers=2,
    dims=DecoderDims(2, 8, 2, 1, 4, 16, 32, 64, 3),
    tools={"torch": "2"},
    date="2026-11-21",
    machine="a machine",
    seed=0,
    dataset=Dataset("images", 2, 2, True, (Skipped("x.png", "broken"),), "0"),
    keeps=(0.5,),
    swept_layers=(1,),
    methods=(MethodInfo("random", "Random", "floor", "draws", False),),
    unpruned=Unpruned(MEAN, "11", 4.0, 2.0, 2e9, 3e9, 2e6, None),
    entropies=Entropies((1.0, 2.0), (1.0, 2.0), (0.1, 0.1), (0.1, 0.1), 2, None, 0.5, "none"),
    recommended=(Recommended(0.5, Schedule((Cut(1, MaxMin()),)), "why", 24, "other", held_out=True),),
    rows=(ROW,),
    questions=(AnsweredQuestion("a.png", "What?", "1", "1"), AnsweredQuestion("b.png", "What?", "2", "2")),
    gallery=(
        GalleryEntry(
            picture="pictures/00.png",
            sha256="0",
            question="What?",
            answer="1",
            full_answer="1",
            full_right=True,
            answers=(GalleryAnswer("random", 1, 0.5, "2", False, (KeptPicture((2, 2), (0, 3)),)),),
        ),
    ),
    seconds=1.0,
)


BEYOND = GalleryAnswer("random", 1, 0.5, "2", False, (KeptPicture((2, 2), (4,)),))


def test_it_reads_back_what_was_written(tmp_path) -> None:
    write_sweep(tmp_path, RECORD)
    assert read_sweep(tmp_path) == RECORD == read_sweep(tmp_path / SWEEP_FILE)
    assert RECORD.row("random", 1, 0.5) is ROW
    assert RECORD.row("random", 2, 0.5) is None
    assert RECORD.method("random").title == "Random"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"questions": RECORD.questions[:1]}, "1 questions, the data set says 2"),
        ({"rows": (replace(ROW, method="magic"),)}, "'magic' is not described"),
        ({"rows": (replace(ROW, layer=2),)}, "outside 0 to 1"),
        ({"rows": (replace(ROW, right=("1",)),)}, "do not fit the questions"),
        ({"rows": (replace(ROW, right=("12",)),)}, "do not fit the questions"),
        ({"layers": 3}, "entropies.query"),
        ({"gallery": (replace(RECORD.gallery[0], picture="../x.png"),)}, "outside the record's directory"),
        ({"gallery": (replace(RECORD.gallery[0], answers=(BEYOND,)),)}, "do not fit its grids"),
    ],
)
def test_contradictions_are_refused(tmp_path, changed, reason) -> None:
    write_sweep(tmp_path, replace(RECORD, **changed))
    with pytest.raises(UserError, match=reason):
        read_sweep(tmp_path)


def test_broken_missing_and_newer_files_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_sweep(tmp_path)
    write_sweep(tmp_path, RECORD)
    file = tmp_path / SWEEP_FILE
    raw = json.loads(file.read_text())
    for text, reason in (
        (file.read_text()[:-20], "not readable JSON"),
        (json.dumps({**raw, "format": 99}), "has format 99"),
        (json.dumps({**raw, "format": 1}), "has format 1"),
        (json.dumps({**raw, "rows": 3}), "not a valid sweep record"),
        (json.dumps([]), "not a valid sweep record"),
        (json.dumps(raw).replace("0.4", "NaN"), "NaN is no number"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_sweep(tmp_path)
