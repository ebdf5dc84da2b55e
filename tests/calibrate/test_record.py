from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ep_export.calibrate.horizon import DropCurve, Horizon
from ep_export.calibrate.record import (
    Candidate,
    LayerCurve,
    Provenance,
    Record,
    read_calibration,
    write_calibration,
)
from ep_export.data import data_dir
from ep_export.errors import UserError
from ep_export.policy import (
    Cut,
    EvidenceKind,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    TopK,
)

_CURVE = {"layers": [1], "kl": [0.1], "kl_high": [0.2], "top1_agreement": [1.0], "horizon": None}
_HORIZON = {"images": 9, "half": _CURVE, "everything": _CURVE, "finding": ""}


@pytest.fixture
def record() -> Record:
    return Record(
        model="tiny",
        layers=4,
        query_entropy=(2.0, 2.1, 1.5, 1.4),
        key_entropy=(1.0, 1.1, 0.5, 0.4),
        images=12,
        ecl=2,
        confidence=0.99,
        candidates=(
            Candidate(2, "norm-lowest", 0.5, 0.02, 0.97, 0.01, 0.03),
            Candidate(0, "divprune", 0.5, 0.03, 0.96, 0.02, 0.04),
            Candidate(2, "random", 0.5, 0.09, 0.9, 0.08, 0.1),
        ),
        recommended=Schedule((Cut(2, TopK(Scorer.NORM, Select.LOWEST)),)),
        provenance=Provenance(
            EvidenceKind.MEASURED, "pictures in x", "2026-11-21", {"torch": "2"}, "ab", ("q",), 0
        ),
        fingerprint="f00d",
        processor="cafe",
        query_spread=(0.1,) * 4,
        key_spread=(0.1,) * 4,
        recommended_confidence=0.9,
        keep=Keep(ratio=0.5),
        skipped=("bad.jpg: not a picture",),
    )


def test_record_survives_the_round_trip(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "record.json"
    write_calibration(file, record)
    assert read_calibration(file) == record
    assert [path.name for path in file.parent.iterdir()] == ["record.json"]


def test_json_has_the_names_that_scripts_rely_on(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_calibration(file, record)
    raw = json.loads(file.read_text())
    names = {"model", "layers", "query_entropy", "key_entropy", "images", "ecl", "confidence", "candidates"}
    assert names | {"recommended", "provenance"} <= set(raw)
    assert {"layer", "policy", "keep", "kl", "top1_agreement"} <= set(raw["candidates"][0])
    (cut,) = raw["recommended"]["cuts"]
    assert (cut["layer"], cut["chooser"]["scorer"], cut["share"]) == (2, "norm", None)


def test_a_schedule_of_two_cuts_is_recorded_whole(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    two = Schedule((Cut(1, MaxMin(), 0.5), Cut(3, Random(), 0.1)))
    write_calibration(file, replace(record, recommended=two))
    assert read_calibration(file).recommended == two
    assert read_calibration(file).candidate_for(two) is None


def test_a_schedule_of_two_cuts_finds_its_measurement(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    two = Candidate(1, "divprune", 0.5, 0.01, 0.99, images=12, share=0.5, second=Cut(3, Nothing()))
    write_calibration(file, replace(record, candidates=(*record.candidates, two)))
    again = read_calibration(file)
    assert again.candidates[-1].name == "divprune at 1, nothing at 3"
    assert again.candidate_for(Schedule((Cut(1, MaxMin(), 0.5), Cut(3, Nothing())))) == two
    assert again.candidate_for(Schedule((Cut(1, MaxMin(), 0.4), Cut(3, Nothing())))) is None
    assert again.candidate_for(Schedule((Cut(1, MaxMin()),))) is None
    assert again.random_floor(2) == record.candidates[2]


def test_horizon_and_metrics_survive_the_round_trip(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    curve = DropCurve((1, 2, 3), (0.5, 0.01, 0.0), (0.6, 0.02, 0.001), (0.9, 1.0, 1.0), 3)
    horizon = Horizon(12, curve, replace(curve, horizon=None), "from layer 3 on")
    whole = replace(
        record,
        horizon=horizon,
        horizons=(replace(horizon, kind="counting"),),
        metrics=(LayerCurve("vendi", (4.0, 3.0, 2.0, 2.0), (0.1,) * 4, 2, "it drops"),),
        detectors="two see a collapse",
        images_needed=90,
    )
    write_calibration(file, whole)
    assert read_calibration(file) == whole
    assert read_calibration(file).horizon.layer == 3


def test_a_record_of_format_2_is_read_and_an_older_one_says_how_to_redo_it(
    record: Record, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    write_calibration(file, record)
    raw = json.loads(file.read_text())
    for name in ("metrics", "detectors", "horizon", "horizons", "images_needed", "visual_tokens"):
        del raw[name]
    for candidate in raw["candidates"]:
        for name in ("images", "share", "second"):
            del candidate[name]
    file.write_text(json.dumps({**raw, "format": 2}))
    assert replace(read_calibration(file), format=record.format) == record
    file.write_text(json.dumps({**raw, "format": 1}))
    with pytest.raises(UserError, match="has format 1") as caught:
        read_calibration(file)
    assert "ep-export calibrate" in caught.value.hint


def test_a_candidate_is_found_by_layer_and_policy(record: Record) -> None:
    assert record.candidate_for(Schedule((Cut(0, MaxMin()),))) == record.candidates[1]
    assert record.candidate_for(Schedule((Cut(2, MaxMin()),))) is None
    assert record.random_floor(2) == record.candidates[2]
    assert record.random_floor(0) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": "4"}, "expected int"),
        ({"query_entropy": [1.0, 2.0]}, "query_entropy has 2 values for 4 layers"),
        ({"query_entropy": [1.0, 2.0, "x", 1.0]}, "expected float"),
        ({"ecl": 4}, "expected 1 to 3"),
        ({"ecl": 0}, "expected 1 to 3"),
        ({"recommended": {"cuts": [{"layer": 9}]}}, "expected 1 to 3"),
        ({"recommended": {"cuts": [{"layer": 0}]}}, "expected 1 to 3"),
        ({"recommended": {"cuts": []}}, "has no cut"),
        ({"recommended": {"cuts": [{"layer": 1}, {"layer": 2}]}}, "has no share"),
        ({"recommended": {"cuts": [{"layer": 1, "chooser": {"kind": "magic"}}]}}, "recommended"),
        ({"candidates": [{"layer": 1}]}, "missing"),
        (
            {"metrics": [{"metric": "x", "values": [1.0], "spread": [1.0], "collapse": None, "finding": ""}]},
            "x",
        ),
        ({"horizon": {**_HORIZON, "half": {**_CURVE, "layers": [1, 2]}}}, "other layers than it names"),
        ({"horizon": {**_HORIZON, "half": {**_CURVE, "horizon": 4}}}, "not 1 to 3"),
        ({"candidates": [{"layer": 1, "policy": "magic", "keep": 1, "kl": 0, "top1_agreement": 1}]}, "magic"),
        (
            {"candidates": [{"layer": 4, "policy": "random", "keep": 1, "kl": 0, "top1_agreement": 1}]},
            "expected 0 to 3",
        ),
        ({"provenance": {"kind": "rumour", "source": "", "date": ""}}, "rumour"),
        ({"format": 99}, "format 99"),
        ({"format": 1}, "has format 1, this ep-export reads 2 and up"),
    ],
)
def test_nonsense_is_refused_with_the_reason(
    record: Record, tmp_path: Path, change: dict, reason: str
) -> None:
    file = tmp_path / "record.json"
    write_calibration(file, record)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=reason):
        read_calibration(file)


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", '{"model": "x"}', "\x00"])
def test_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_calibration(file)
    assert "ep-export calibrate" in caught.value.hint


def test_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        read_calibration(tmp_path / "nowhere.json")


def test_a_record_that_json_cannot_hold_leaves_the_old_file(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_calibration(file, record)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_calibration(file, replace(record, confidence=float("nan")))
    assert file.read_bytes() == before


def test_shipped_records_are_valid_and_say_they_are_published() -> None:
    files = sorted((data_dir("calibration") / "records").glob("*.json"))
    assert files
    for file in files:
        shipped = read_calibration(file)
        assert file.stem == shipped.model
        if shipped.provenance.kind is EvidenceKind.PUBLISHED:
            # never dressed up as a measurement
            assert shipped.images == 0
            assert not shipped.candidates
            assert not shipped.query_entropy


def test_data_that_does_not_ship_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="lacks its nonsense data"):
        data_dir("nonsense")
