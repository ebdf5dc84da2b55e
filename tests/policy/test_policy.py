"""Names of choosers, and schedules as JSON."""

from __future__ import annotations

import itertools

import pytest

from ep_export.documents import decode, encode
from ep_export.errors import UsageError
from ep_export.policy import (
    Budget,
    Coverage,
    Cut,
    Kind,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    Source,
    TopK,
    chooser_named,
)

PROJECTIONS = [source for source in Source if source is not Source.ATTENTION]
CHOOSERS = (
    *(TopK(*settings) for settings in itertools.product(Scorer, Select, PROJECTIONS, Budget)),
    *(Coverage(*settings) for settings in itertools.product(Scorer, Select, PROJECTIONS)),
    *(TopK(Scorer.NORM, *settings) for settings in itertools.product(Select, [Source.ATTENTION], Budget)),
    *(Coverage(Scorer.NORM, select, Source.ATTENTION) for select in Select),
    MaxMin(),
    Nothing(),
    Random(),
    Random(7),
    Random(65535),
)


def test_every_chooser_is_found_by_its_name_and_no_two_share_one():
    assert [chooser_named(chooser.name) for chooser in CHOOSERS] == list(CHOOSERS)
    assert len({chooser.name for chooser in CHOOSERS}) == len(CHOOSERS)


def test_names_that_people_type():
    assert chooser_named("paper-highest") == TopK()
    assert chooser_named("norm-lowest-key-per-picture") == TopK(
        Scorer.NORM, Select.LOWEST, Source.KEY, Budget.PER_PICTURE
    )
    assert chooser_named("random-7") == Random(7)


@pytest.mark.parametrize("name", ["paper-highest-attention", "coverage-order2-lowest-attention"])
def test_attention_is_one_number_that_only_the_norm_takes_as_it_is(name):
    with pytest.raises(UsageError, match="attention is one number a token") as caught:
        chooser_named(name)
    assert "--policy norm --source attention" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "",
        "paper",
        "paper-highest-query",  # the default is not spelled out: one name each
        "paper-highest-per-picture-key",
        "paper-highest-per-picture-",
        "random-0",
        "random-07",
        "random--1",
        "random-65536",
        "random-" + "9" * 5000,
        "divprune-1",
        "coverage",
        "coverage-norm-highest-per-picture",
        "Divprune",
        "nothing ",
    ],
)
def test_an_unknown_name_says_which_there_are(name):
    with pytest.raises(UsageError, match="is unknown") as caught:
        chooser_named(name)
    assert "divprune" in caught.value.hint


@pytest.mark.parametrize("chooser", CHOOSERS, ids=lambda chooser: chooser.name)
def test_a_schedule_reads_back_as_written(chooser):
    schedule = Schedule((Cut(2, chooser, 0.5), Cut(5, Nothing(), 0.0)))
    assert decode(Schedule, encode(schedule)) == schedule


@pytest.mark.parametrize(
    "raw", [{"kind": "top_k", "scorer": "loudest"}, {"kind": "random", "seed": -1}, {"kind": "other"}, 3]
)
def test_a_chooser_that_is_none_is_refused(raw):
    with pytest.raises((TypeError, ValueError)):
        decode(Cut, {"layer": 2, "chooser": raw})


def test_a_kind_cannot_be_borrowed():
    with pytest.raises(ValueError, match="expected max_min"):
        MaxMin(Kind.TOP_K)


def test_spans_are_the_layers_between_cuts():
    schedule = Schedule((Cut(0, MaxMin(), 0.5), Cut(3, MaxMin(), 0.2)))
    assert schedule.spans(8) == (range(3), range(3, 8))
    assert Schedule((Cut(2),)).spans(8) == (range(2), range(2, 8))
