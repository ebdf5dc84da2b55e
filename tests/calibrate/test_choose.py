from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ep_export.adaptive import fit_threshold
from ep_export.calibrate.choose import (
    ScheduleRequest,
    find_published,
    needs_calibration,
    resolve_keep,
    resolve_schedule,
)
from ep_export.calibrate.horizon import DropCurve, Horizon
from ep_export.calibrate.record import Candidate, Provenance, Record, write_calibration
from ep_export.dims import DecoderDims
from ep_export.errors import UsageError, UserError
from ep_export.measure.provenance import processor_fingerprint
from ep_export.policy import (
    Budget,
    Chooser,
    Cut,
    EvidenceKind,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    Source,
    TopK,
)


@dataclass(frozen=True)
class Config:
    """The fields of an opened checkpoint that a schedule depends on."""

    source: str
    dims: DecoderDims
    fingerprint: str = "f00d"
    processor_files: tuple[Path, ...] = ()


def config(source: str = "some/dir", layers: int = 6) -> Config:
    return Config(source, DecoderDims(layers, 64, 4, 2, 16, 128, 100, 512, 3))


def one(layer: int, chooser: Chooser) -> Schedule:
    return Schedule((Cut(layer, chooser),))


NORM_LOWEST = TopK(Scorer.NORM, Select.LOWEST)
PER_PICTURE = Budget.PER_PICTURE
BEST = one(3, NORM_LOWEST)


def measured(**change) -> Record:
    record = Record(
        model="dir",
        layers=6,
        query_entropy=(1.0,) * 6,
        key_entropy=(1.0,) * 6,
        images=20,
        ecl=None,
        confidence=0.4,
        candidates=(
            Candidate(3, "norm-lowest", 0.5, 0.02, 0.97),
            Candidate(3, "paper-highest", 0.5, 0.2, 0.7),
            Candidate(0, "divprune", 0.5, 0.03, 0.96),
            Candidate(3, "random", 0.5, 0.09, 0.9),
        ),
        recommended=BEST,
        provenance=Provenance(EvidenceKind.MEASURED, "pictures", "2026-11-21"),
        fingerprint="f00d",
        recommended_confidence=0.93,
        keep=Keep(ratio=0.5),
    )
    return replace(record, **change)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_published_record_stands_for_its_alias_and_hub_id(name: str) -> None:
    model = config(name, layers=28)
    schedule, evidence = resolve_schedule(model, ScheduleRequest())
    assert schedule == one(1, TopK())
    assert evidence.kind is EvidenceKind.PUBLISHED
    assert "not measured here" in evidence.summary
    assert "released script" in evidence.summary
    assert evidence.record == "qwen2.5-vl-7b.json"
    assert not needs_calibration(model, ScheduleRequest())


def test_model_without_record_or_layer_stops_and_says_what_to_give() -> None:
    assert needs_calibration(config(), ScheduleRequest())
    with pytest.raises(UserError, match="nothing says where") as caught:
        resolve_schedule(config(), ScheduleRequest())
    for option in ("--images", "--calibration", "--layer"):
        assert option in caught.value.hint


def test_chooser_without_a_layer_still_asks_where() -> None:
    request = ScheduleRequest(chooser=MaxMin())
    assert needs_calibration(config(), request)
    with pytest.raises(UserError, match="nothing says where"):
        resolve_schedule(config(), request)


def test_layer_alone_means_the_published_score_that_nothing_measured() -> None:
    request = ScheduleRequest(layer=2)
    assert not needs_calibration(config(), request)
    schedule, evidence = resolve_schedule(config(), request)
    assert schedule == one(2, TopK())
    assert evidence.kind is EvidenceKind.TOLD
    assert "nothing measured it" in evidence.summary
    budgeted, _ = resolve_schedule(config(), ScheduleRequest(layer=2, budget=PER_PICTURE))
    assert budgeted == one(2, TopK(budget=PER_PICTURE))


@pytest.mark.parametrize(
    "chooser", [TopK(Scorer.ORDER2, Select.LOWEST, Source.KEY, PER_PICTURE), MaxMin(), Random(7)]
)
def test_layer_and_chooser_can_be_told(chooser: Chooser) -> None:
    schedule, _ = resolve_schedule(config(), ScheduleRequest(layer=4, chooser=chooser))
    assert schedule == one(4, chooser)


def test_cuts_are_taken_as_they_are() -> None:
    cuts = (Cut(0, MaxMin(), 0.5), Cut(4, Random(), 0.1))
    request = ScheduleRequest(cuts=cuts)
    assert not needs_calibration(config(), request)
    schedule, evidence = resolve_schedule(config("qwen2.5-vl-7b", layers=28), request)
    assert schedule == Schedule(cuts)
    assert evidence.kind is EvidenceKind.TOLD
    single, _ = resolve_schedule(config(), ScheduleRequest(cuts=cuts[:1]))
    assert single == Schedule(cuts[:1])


def test_impossible_cuts_are_a_usage_error() -> None:
    for cuts, said in (
        ((Cut(4, MaxMin(), 0.5), Cut(2, MaxMin(), 0.1)), "expected a later layer"),
        ((Cut(0, TopK(), 0.5),), "expected 1 to 5"),
        ((), "has no cut"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve_schedule(config(), ScheduleRequest(cuts=cuts))


@pytest.mark.parametrize("from_file", [True, False])
def test_record_is_used_as_it_stands_with_its_figures(tmp_path: Path, from_file: bool) -> None:
    file = tmp_path / "mine.json"
    write_calibration(file, measured())
    request = ScheduleRequest(calibration=file if from_file else None)
    schedule, evidence = resolve_schedule(config(), request, fresh=None if from_file else measured())
    assert schedule == BEST
    assert evidence.kind is EvidenceKind.MEASURED
    for part in ("20 pictures", "keep 0.5", "KL 0.02", "97.0%", "random tokens KL 0.09", "93% of resamples"):
        assert part in evidence.summary
    assert evidence.record == ("mine.json" if from_file else None)


def test_recommended_divprune_before_the_decoder_is_taken() -> None:
    before = measured(recommended=one(0, MaxMin()))
    schedule, evidence = resolve_schedule(config(), ScheduleRequest(), fresh=before)
    assert schedule == one(0, MaxMin())
    assert "KL 0.03" in evidence.summary


def test_recommended_schedule_of_two_cuts_is_taken_on_the_record_s_word() -> None:
    two = Schedule((Cut(1, MaxMin(), 0.5), Cut(4, Random(), 0.1)))
    schedule, evidence = resolve_schedule(config(), ScheduleRequest(), fresh=measured(recommended=two))
    assert schedule == two
    assert evidence.kind is EvidenceKind.MEASURED
    assert "recommended by the record of 20 pictures" in evidence.summary


TWO = Schedule((Cut(1, MaxMin(), 0.4), Cut(4, Nothing())))


def test_recommended_schedule_of_two_cuts_has_the_figures_of_its_measurement() -> None:
    candidate = Candidate(1, "divprune", 0.5, 0.01, 0.98, images=20, share=0.4, second=Cut(4, Nothing()))
    record = measured(recommended=TWO, candidates=(candidate,), images_needed=300)
    schedule, evidence = resolve_schedule(config(), ScheduleRequest(), fresh=record)
    assert schedule == TWO
    assert "measured on 20 pictures at keep 0.5: KL 0.01" in evidence.summary
    assert "about 300 pictures needed to tell it from the next best" in evidence.summary


def test_told_second_cut_before_the_measured_horizon_is_warned_of_with_the_number(tmp_path: Path) -> None:
    layers = (1, 2, 3, 4, 5)
    everything = DropCurve(layers, (2.0, 1.0, 0.7, 0.3, 0.0), (2.5, 1.5, 0.9, 0.4, 0.0), (0.5,) * 5, 5)
    horizon = Horizon(20, everything, everything, "from layer 5 on")
    file = tmp_path / "mine.json"
    write_calibration(file, measured(horizon=horizon))
    request = ScheduleRequest(cuts=TWO.cuts, calibration=file)
    schedule, evidence = resolve_schedule(config(), request)
    assert schedule == TWO
    assert evidence.kind is EvidenceKind.TOLD
    assert "warning: the cut at layer 4 (" in evidence.summary
    assert "costs KL 0.3) lies before the information horizon, layer 5" in evidence.summary
    late = replace(request, cuts=(Cut(1, MaxMin(), 0.4), Cut(5, Nothing())))
    assert "warning" not in resolve_schedule(config(), late)[1].summary
    with pytest.raises(UserError, match="measured on other weights"):
        resolve_schedule(replace(config(), fingerprint="beef"), request)


def test_given_record_wins_over_the_published_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_calibration(file, measured(layers=28, query_entropy=(), key_entropy=()))
    request = ScheduleRequest(calibration=file)
    schedule, _ = resolve_schedule(config("qwen2.5-vl-7b", layers=28), request)
    assert schedule == BEST


def test_evidence_says_when_the_keep_was_another_one() -> None:
    _, same = resolve_schedule(config(), ScheduleRequest(), fresh=measured(), keep=Keep(ratio=0.5))
    _, other = resolve_schedule(config(), ScheduleRequest(), fresh=measured(), keep=Keep(ratio=0.25))
    assert "to be used at keep 0.25" in other.summary
    assert "to be used" not in same.summary


def test_told_parts_win_over_the_record_and_keep_its_measurement_when_there_is_one() -> None:
    schedule, evidence = resolve_schedule(
        config(), ScheduleRequest(layer=3, chooser=TopK()), fresh=measured()
    )
    assert schedule == one(3, TopK())
    assert evidence.kind is EvidenceKind.MEASURED
    assert "KL 0.2 " in evidence.summary
    assert "chosen on the command line" in evidence.summary
    _, unmeasured = resolve_schedule(config(), ScheduleRequest(layer=4, chooser=TopK()), fresh=measured())
    assert unmeasured.kind is EvidenceKind.TOLD


def test_layer_alone_keeps_the_recommended_chooser() -> None:
    schedule, _ = resolve_schedule(config(), ScheduleRequest(layer=2), fresh=measured())
    assert schedule == one(2, NORM_LOWEST)


def test_naming_the_recommended_chooser_keeps_its_layer() -> None:
    schedule, _ = resolve_schedule(config(), ScheduleRequest(chooser=NORM_LOWEST), fresh=measured())
    assert schedule == BEST
    per_picture = replace(NORM_LOWEST, budget=PER_PICTURE)
    schedule, _ = resolve_schedule(config(), ScheduleRequest(chooser=per_picture), fresh=measured())
    assert schedule == one(3, per_picture)


def test_named_policy_prunes_where_entropy_collapses_or_asks_for_a_layer() -> None:
    schedule, _ = resolve_schedule(config(), ScheduleRequest(chooser=TopK()), fresh=measured(ecl=2))
    assert schedule == one(2, TopK())
    with pytest.raises(UserError, match="no entropy collapse was found") as caught:
        resolve_schedule(config(), ScheduleRequest(chooser=TopK()), fresh=measured())
    assert "--layer" in caught.value.hint


def test_record_that_recommends_nothing_stops_unless_told() -> None:
    nothing = measured(recommended=None, recommendation="no policy beats random tokens for sure")
    with pytest.raises(UserError, match="no policy beats random") as caught:
        resolve_schedule(config(), ScheduleRequest(), fresh=nothing)
    assert "--layer K" in caught.value.hint
    schedule, _ = resolve_schedule(config(), ScheduleRequest(layer=2), fresh=nothing)
    assert schedule == one(2, TopK())


def test_published_policy_that_is_overridden_is_no_longer_published() -> None:
    schedule, evidence = resolve_schedule(config("qwen2.5-vl-7b", layers=28), ScheduleRequest(layer=4))
    assert schedule == one(4, TopK())
    assert evidence.kind is EvidenceKind.TOLD


def test_per_picture_budget_is_not_what_was_measured() -> None:
    request = ScheduleRequest(budget=PER_PICTURE)
    schedule, evidence = resolve_schedule(config(), request, fresh=measured())
    assert schedule == one(3, replace(NORM_LOWEST, budget=PER_PICTURE))
    assert evidence.kind is EvidenceKind.TOLD
    with pytest.raises(UsageError, match="no budget per picture"):
        resolve_schedule(config(), request, fresh=measured(recommended=one(0, MaxMin())))


def test_record_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_calibration(file, measured())
    request = ScheduleRequest(calibration=file)
    with pytest.raises(UserError, match=r"mine\.json is for a model of 6 layers, .* has 8"):
        resolve_schedule(config(layers=8), request)
    with pytest.raises(UserError, match="measured on other weights"):
        resolve_schedule(replace(config(), fingerprint="beef"), request)


def test_record_measured_with_other_processor_files_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"max_pixels": 100}')
    model = replace(config(), processor_files=(file,))
    fresh = measured(processor=processor_fingerprint([file]))
    assert resolve_schedule(model, ScheduleRequest(), fresh=fresh)[0] == BEST
    file.write_text('{"max_pixels": 200}')
    with pytest.raises(UserError, match="other tokenizer or processor files") as caught:
        resolve_schedule(model, ScheduleRequest(), fresh=fresh)
    assert "calibrate again" in caught.value.hint


@pytest.mark.parametrize("layer", [0, 6, -2])
def test_layer_out_of_range_is_a_usage_error(layer: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 5"):
        resolve_schedule(config(), ScheduleRequest(layer=layer))


def test_models_without_a_shipped_record_have_none() -> None:
    assert find_published("qwen2.5-vl-3b") is None
    assert find_published("/some/dir/qwen") is None


def test_choosing_needs_no_torch() -> None:
    code = "import sys; from ep_export.calibrate import find_published as f; f('qwen2.5-vl-7b'); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


OWN = fit_threshold(0.5, BEST, [np.linspace(0.0, 1.0, 50)] * 20, layers=6)
ASKED = Keep(ratio=0.5, adaptive=True)


def test_an_adaptive_keep_takes_the_records_threshold_and_its_cut():
    other = one(2, MaxMin())
    record = measured(adaptive=OWN, recommended=other)
    request = ScheduleRequest()
    keep = resolve_keep(config(), request, keep=ASKED, fresh=record)
    assert keep == OWN
    schedule, evidence = resolve_schedule(config(), request, fresh=record, keep=keep)
    assert schedule == BEST  # what the threshold is for, whatever is recommended at a fixed keep
    assert evidence.kind is EvidenceKind.MEASURED
    told, _ = resolve_schedule(config(), ScheduleRequest(layer=2), fresh=record, keep=keep)
    assert told.cuts[0].layer == 2  # and a check further on refuses it
    assert resolve_keep(config(), request, keep=Keep(ratio=0.5), fresh=record) == Keep(ratio=0.5)
    assert resolve_keep(config(), request, keep=None) is None


@pytest.mark.parametrize(
    ("record", "keep", "said", "hint"),
    [
        (None, ASKED, "needs a calibration record, and there is none of some/dir", "--images DIR"),
        (
            measured(),
            ASKED,
            "has no threshold for keep adaptive:0.5, it has none",
            "calibrate with --keep 0.5",
        ),
        (
            measured(adaptive=OWN),
            Keep(ratio=0.25, adaptive=True),
            "has no threshold for keep adaptive:0.25, it has one for adaptive:0.5",
            "calibrate with --keep 0.25",
        ),
        (measured(adaptive=OWN, fingerprint="beef"), ASKED, "measured on other weights", "this model"),
        (measured(adaptive=OWN, processor="beef"), ASKED, "other tokenizer or processor files", "calibrate"),
    ],
    ids=("no record", "none in it", "another average", "another model", "another processor"),
)
def test_an_adaptive_keep_without_its_record_is_refused(record, keep, said, hint):
    with pytest.raises(UserError, match=said) as caught:
        resolve_keep(config(), ScheduleRequest(), keep=keep, fresh=record)
    assert hint in caught.value.hint


def test_the_horizons_system_is_two_cuts_of_the_published_shape():
    schedule, evidence = resolve_schedule(config(layers=32), ScheduleRequest(system="horizon"))
    assert [(cut.layer, cut.chooser) for cut in schedule.cuts] == [(0, MaxMin()), (20, Random())]
    assert [round(576 * cut.share) for cut in schedule.cuts] == [284, 38]
    assert evidence.kind is EvidenceKind.TOLD
    assert not needs_calibration(config(), ScheduleRequest(system="horizon"))
