"""The report of a sweep: sentences that follow from the numbers, and a page that needs nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ep_export.bundle import hash_file
from ep_export.dims import DecoderDims
from ep_export.errors import UserError
from ep_export.measure.question import Skipped
from ep_export.measure.ways import WayCut
from ep_export.runtime.kept import KeptPicture
from ep_export.sweep.findings import findings
from ep_export.sweep.record import (
    AnsweredQuestion,
    Dataset,
    Difference,
    Entropies,
    GalleryAnswer,
    GalleryEntry,
    MethodInfo,
    Row,
    SameBudget,
    SweepRecord,
    Unpruned,
)
from ep_export.sweep.report import write_report
from ep_export.sweep.statistics import MeanInterval

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


@pytest.fixture
def record(tmp_path: Path) -> SweepRecord:
    Image.new("RGB", (64, 32), (200, 30, 30)).save(tmp_path / "seen.png")
    titles = (
        ("recommended", "Recommended"),
        ("schedule", "Your schedule"),
        ("paper-highest", "Paper, highest"),
        ("random", "Random"),
    )
    entry = GalleryEntry(
        picture="seen.png",
        sha256=hash_file(tmp_path / "seen.png"),
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
    assert "for 50% fewer FLOPs; there Paper, highest 20.0% and Random 50.0%" in said
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
    assert (
        "keeping its own number (Query norm, lowest at layer 2): 75.0% [65.0%, 85.0%], with a fixed keep 70.0%" in said
    )


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
    assert "FLOPs -50%, KV -50%" in text


def test_a_changed_gallery_picture_is_refused(record, tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "seen.png")
    with pytest.raises(UserError, match=r"seen\.png is missing or was changed"):
        write_report(tmp_path, record)
    assert not (tmp_path / "report.html").exists()
