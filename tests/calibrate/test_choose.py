from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ep_export.calibrate.choose import PolicyRequest, find_published, needs_calibration, resolve_policy
from ep_export.calibrate.record import Candidate, Provenance, Record, write_record
from ep_export.dims import DecoderDims
from ep_export.errors import UsageError, UserError
from ep_export.policy import Budget, EvidenceKind, Keep, Policy, Scorer, Select, Source


@dataclass(frozen=True)
class Config:
    """The two fields of a model config that a policy depends on, and a checkpoint's fingerprint."""

    source: str
    dims: DecoderDims
    fingerprint: str = "f00d"


def config(source: str = "some/dir", layers: int = 6) -> Config:
    return Config(source, DecoderDims(layers, 64, 4, 2, 16, 128, 100, 512, 3))


BEST = Policy(3, Scorer.NORM, Select.LOWEST)


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
            Candidate(3, "norm", Select.LOWEST, 0.5, 0.02, 0.97),
            Candidate(3, "paper", Select.HIGHEST, 0.5, 0.2, 0.7),
            Candidate(3, "random", None, 0.5, 0.09, 0.9),
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
    policy, evidence = resolve_policy(model, PolicyRequest())
    assert policy == Policy(1, Scorer.PAPER, Select.HIGHEST, Source.QUERY)
    assert evidence.kind is EvidenceKind.PUBLISHED
    assert "not measured here" in evidence.summary
    assert "released script" in evidence.summary
    assert evidence.record == "qwen2.5-vl-7b.json"
    assert not needs_calibration(model, PolicyRequest())


def test_model_without_record_or_layer_stops_and_says_what_to_give() -> None:
    assert needs_calibration(config(), PolicyRequest())
    with pytest.raises(UserError, match="nothing says where") as caught:
        resolve_policy(config(), PolicyRequest())
    for option in ("--images", "--calibration", "--layer"):
        assert option in caught.value.hint


def test_layer_alone_means_the_published_score_that_nothing_measured() -> None:
    request = PolicyRequest(layer=2)
    assert not needs_calibration(config(), request)
    policy, evidence = resolve_policy(config(), request)
    assert policy == Policy(2, Scorer.PAPER, Select.HIGHEST)
    assert evidence.kind is EvidenceKind.TOLD
    assert "nothing measured it" in evidence.summary


def test_every_part_can_be_told() -> None:
    request = PolicyRequest("order2", 4, Select.LOWEST, Source.KEY, Budget.PER_PICTURE)
    policy, _ = resolve_policy(config(), request)
    assert policy == Policy(4, Scorer.ORDER2, Select.LOWEST, Source.KEY, Budget.PER_PICTURE)


@pytest.mark.parametrize("from_file", [True, False])
def test_record_is_used_as_it_stands_with_its_figures(tmp_path: Path, from_file: bool) -> None:
    file = tmp_path / "mine.json"
    write_record(file, measured())
    request = PolicyRequest(record=file if from_file else None)
    policy, evidence = resolve_policy(config(), request, fresh=None if from_file else measured())
    assert policy == BEST
    assert evidence.kind is EvidenceKind.MEASURED
    for part in ("20 pictures", "keep 0.5", "KL 0.02", "97.0%", "random tokens KL 0.09", "93% of resamples"):
        assert part in evidence.summary
    assert evidence.record == ("mine.json" if from_file else None)


def test_given_record_wins_over_the_published_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_record(file, measured(layers=28, query_entropy=(), key_entropy=()))
    policy, _ = resolve_policy(config("qwen2.5-vl-7b", layers=28), PolicyRequest(record=file))
    assert policy == BEST


def test_evidence_says_when_the_keep_was_another_one() -> None:
    _, same = resolve_policy(config(), PolicyRequest(), fresh=measured(), keep=Keep(ratio=0.5))
    _, other = resolve_policy(config(), PolicyRequest(), fresh=measured(), keep=Keep(ratio=0.25))
    assert "to be used at keep 0.25" in other.summary
    assert "to be used" not in same.summary


def test_told_parts_win_over_the_record_and_keep_its_measurement_when_there_is_one() -> None:
    policy, evidence = resolve_policy(config(), PolicyRequest("paper", layer=3), fresh=measured())
    assert policy == Policy(3, Scorer.PAPER, Select.HIGHEST)
    assert evidence.kind is EvidenceKind.MEASURED
    assert "KL 0.2 " in evidence.summary
    assert "chosen on the command line" in evidence.summary
    _, unmeasured = resolve_policy(config(), PolicyRequest("paper", layer=4), fresh=measured())
    assert unmeasured.kind is EvidenceKind.TOLD


def test_naming_the_recommended_scorer_keeps_its_layer_and_direction() -> None:
    policy, _ = resolve_policy(config(), PolicyRequest("norm"), fresh=measured())
    assert policy == BEST


def test_named_policy_prunes_where_entropy_collapses_or_asks_for_a_layer() -> None:
    policy, _ = resolve_policy(config(), PolicyRequest("paper"), fresh=measured(ecl=2))
    assert policy == Policy(2, Scorer.PAPER, Select.HIGHEST)
    with pytest.raises(UserError, match="no entropy collapse was found") as caught:
        resolve_policy(config(), PolicyRequest("paper"), fresh=measured())
    assert "--layer" in caught.value.hint


def test_record_that_recommends_nothing_stops_unless_told() -> None:
    nothing = measured(recommended=None, recommendation="no policy beats random tokens for sure")
    with pytest.raises(UserError, match="no policy beats random") as caught:
        resolve_policy(config(), PolicyRequest(), fresh=nothing)
    assert "--layer K" in caught.value.hint
    policy, _ = resolve_policy(config(), PolicyRequest(layer=2), fresh=nothing)
    assert policy == Policy(2, Scorer.PAPER, Select.HIGHEST)


def test_published_policy_that_is_overridden_is_no_longer_published() -> None:
    policy, evidence = resolve_policy(config("qwen2.5-vl-7b", layers=28), PolicyRequest(layer=4))
    assert policy.layer == 4
    assert evidence.kind is EvidenceKind.TOLD


def test_per_picture_budget_is_not_what_was_measured() -> None:
    policy, evidence = resolve_policy(config(), PolicyRequest(budget=Budget.PER_PICTURE), fresh=measured())
    assert policy == replace(BEST, budget=Budget.PER_PICTURE)
    assert evidence.kind is EvidenceKind.TOLD


def test_record_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_record(file, measured())
    with pytest.raises(UserError, match=r"mine\.json is for a model of 6 layers, .* has 8"):
        resolve_policy(config(layers=8), PolicyRequest(record=file))
    with pytest.raises(UserError, match="measured on other weights"):
        resolve_policy(replace(config(), fingerprint="beef"), PolicyRequest(record=file))


@pytest.mark.parametrize("layer", [0, 6, -2])
def test_layer_out_of_range_is_a_usage_error(layer: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 5"):
        resolve_policy(config(), PolicyRequest(layer=layer))


def test_unknown_policy_gets_the_near_ones() -> None:
    with pytest.raises(UsageError, match="papper") as caught:
        resolve_policy(config(), PolicyRequest("papper", layer=1))
    assert "paper" in caught.value.hint


def test_models_without_a_shipped_record_have_none() -> None:
    assert find_published("qwen2.5-vl-3b") is None
    assert find_published("/some/dir/qwen") is None


def test_choosing_needs_no_torch() -> None:
    code = "import sys; from ep_export.calibrate import find_published as f; f('qwen2.5-vl-7b'); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
