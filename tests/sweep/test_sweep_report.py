"""The report of a sweep: sentences that follow from the numbers, and a page that needs nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sweep_example import QUESTION, UNSURE, example, row

from ep_export.errors import UserError
from ep_export.sweep.findings import findings
from ep_export.sweep.kinds import by_kind
from ep_export.sweep.record import Difference, MethodInfo, SameBudget, SweepRecord
from ep_export.sweep.report import write_report
from ep_export.sweep.shortlist import first_token_shortlist, shortlist
from ep_export.sweep.statistics import MeanInterval


@pytest.fixture
def record(tmp_path: Path) -> SweepRecord:
    return example(tmp_path)


def test_a_row_stands_above_or_below_only_where_the_interval_leaves_out_zero(record):
    keys = (("paper-highest", 1), ("paper-highest", 2), ("recommended", 2))
    assert [record.row(*key, 0.5).over_random.standing for key in keys] == [1, -1, 0]


def test_without_answers_a_smaller_kl_stands_above():
    difference = Difference(None, MeanInterval(-2, -3, -1, "bootstrap"), UNSURE)
    assert difference.standing == 1
    assert [difference.standing_in(figure) for figure in ("accuracy", "agreement", "kl")] == [0, 0, 1]


def test_the_findings_follow_from_the_numbers(record):
    said = " ".join(findings(record))
    best = "best in hindsight is Paper, highest at layer 1, 80.0% [70.0%, 90.0%]"
    assert f"{best}, a tie with Recommended at layer 2" in said
    assert "(Query norm, lowest at layer 2), chosen beforehand, 70.0%" in said
    assert "Your schedule at keep 0.5 (DivPrune at layer 1, then Random at layer 3): 60.0%" in said
    assert "for 17% fewer FLOPs to the first token (decoder alone 50%)" in said
    assert "; there Paper, highest 20.0% and Random 50.0%" in said
    assert "better at 1 (layer 1 keep 0.5) and worse at 1 (layer 2 keep 0.5)" in said
    assert "Collapse: none found." in said
    assert "broken.png" in said


def test_a_smaller_picture_and_an_adaptive_keep_are_judged(record):
    small = replace(
        row("scaled", 0, 0.5, 0.9, below_best=-0.3),
        cuts=(),
        kept_tokens=(5.0,),
        budget=SameBudget.FIRST_TOKEN,
    )
    own = row("adaptive", 2, 0.5, 0.75, below_best=0.05)
    own = replace(own, cuts=record.row("recommended", 2, 0.5).cuts)
    titles = (("scaled", "Smaller picture"), ("adaptive", "Adaptive keep"))
    more = tuple(MethodInfo(key, title, "a paper", "an idea", True) for key, title in titles)
    said = " ".join(
        findings(replace(record, rows=(*record.rows, small, own), methods=(*record.methods, *more)))
    )
    assert "same FLOPs to the first token (5 visual tokens, 83% of the unpruned first token): 90.0%" in said
    assert "better than any pruning" in said
    own = "keeping its own number (Query norm, lowest at layer 2): 75.0% [65.0%, 85.0%]"
    assert f"{own}, with a fixed keep 70.0%" in said


def test_too_few_pictures_are_said_first_and_no_answer_is_called_right(record, tmp_path):
    few = replace(record, scarce=True, notes=("ONLY 2 PICTURES: chance",))
    assert findings(few)[0] == "ONLY 2 PICTURES: chance"
    shown = replace(record.gallery[0].answers[0], right=None, same=True)
    entry = replace(record.gallery[0], answer=None, full_right=None, answers=(shown,))
    data = replace(record.dataset, answers=False)
    rows = tuple(replace(one, accuracy=None, right=()) for one in record.rows)
    text = Page(
        write_report(tmp_path, replace(record, gallery=(entry,), dataset=data, rows=rows)).read_text()
    ).text
    assert "1 of 1 as unpruned" in text
    assert "✓" not in text.partition("What is kept")[2]


class Page(HTMLParser):
    """Ids, tags and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "xlink:href"} and not value.startswith(("data:", "#")):
                self.fetched.append(value)

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_takes_no_markup_from_data(record, tmp_path):
    file = write_report(tmp_path, record)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert QUESTION in page.text
    assert "<script>no" in page.text  # as text
    assert not re.search(r"@import|url\((?!#)", text)
    assert np.asarray(Image.open(tmp_path / "sweep.png")).std() > 10  # something is drawn


def test_every_number_of_the_tables_is_on_the_page(record, tmp_path):
    text = Page(write_report(tmp_path, record).read_text(encoding="utf-8")).text
    for each in record.rows:
        assert f"{each.accuracy.value:.1%}" in text
    assert "first-token FLOPs -17%, decoder FLOPs -50%, cache -50%" in text


def test_a_changed_gallery_picture_is_refused(record, tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "seen.png")
    with pytest.raises(UserError, match=r"seen\.png is missing or was changed"):
        write_report(tmp_path, record)
    assert not (tmp_path / "report.html").exists()


def test_the_first_table_has_every_method_once_and_says_what_it_leaves_out(record):
    titles = [MethodInfo(f"more{n}", f"More {n}", "a paper", "an idea", True) for n in range(8)]
    more = [row(f"more{n}", 1, 0.5, 0.6 - n / 100, below_best=0.05 if n < 6 else 0.5) for n in range(8)]
    many = replace(record, rows=(*record.rows, *more), methods=(*record.methods, *titles))
    short = shortlist(many, 0.5)
    methods = [one.method for one in short.rows]
    assert len(methods) == len(set(methods)) == 9
    assert {"recommended", "schedule", "random", "paper-highest"} <= set(methods)
    assert [one.measure.value for one in short.rows] == sorted(
        (o.measure.value for o in short.rows), reverse=True
    )
    assert (short.rows[0].method, short.rows[0].layer) == ("paper-highest", 1)
    assert len(short.rows) + short.ties + short.others == len(many.rows)
    assert short.ties == sum(one.tied and one not in short.rows for one in many.rows)


def test_a_smaller_picture_stands_beside_pruning_at_equal_first_token_flops_only_where_there_is_one(record):
    assert first_token_shortlist(record, 0.5) is None
    small = row("scaled-flops", 0, 0.5, 0.6)
    small = replace(small, cuts=(), kept_tokens=(5.0,), budget=SameBudget.FIRST_TOKEN)
    short = first_token_shortlist(replace(record, rows=(*record.rows, small)), 0.5)
    assert [one.method for one in short.rows] == ["paper-highest", "recommended", "scaled-flops", "random"]
    assert small not in shortlist(replace(record, rows=(*record.rows, small)), 0.5).rows


def test_kinds_are_counted_apart(record):
    asked = (replace(record.questions[0], kind="count"), record.questions[1])
    kinds = by_kind(replace(record, questions=asked), [record.rows[0]])  # right at the first question only
    assert [(one.name, one.questions, one.unpruned.value) for one in kinds] == [
        ("count", 1, 1.0),
        ("", 1, 1.0),
    ]
    assert [one.rows[0].value for one in kinds] == [1.0, 0.0]
    assert by_kind(record, record.rows) == ()


def test_the_page_leads_with_what_is_recommended_what_ties_and_what_the_first_token_costs(record, tmp_path):
    text = " ".join(Page(write_report(tmp_path, record).read_text(encoding="utf-8")).text.split())
    first = text[text.index("Which ways are best") : text.index("What is given up")]
    assert "Paper, highest best in hindsight at layer 1" in first
    assert "Query norm, lowest at layer 2 ★ recommended = tie with the best chosen beforehand" in first
    assert "DivPrune at layer 1, then Random at layer 3; 50.0 points below the best (40.0 to 60.0)" in first
    assert first.count("−17%") == 4  # 250 of 300 FLOPs
