"""Folding comparisons into stages, and what the report looks like as JSON, text and HTML."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from tiny import tiny_picture

from ep_export.planning import Pair
from ep_export.runtime import KeptPicture
from ep_export.validate import Case, Report, Stage, Verdict, text_lines, to_json, write_html
from ep_export.validate.comparison import Comparison, Finding, compare, fold
from ep_export.validate.tolerance import EXACT, Tolerance

LOOSE = Tolerance(relative=0.1, absolute=0.0, reason="a test")


def stage(verdict, error=0.0):
    return Stage("hidden", verdict, error, 1.0, error, "because", "somewhere", 3)


def test_errors_count_against_the_references_scale():
    want = np.array([10.0, -1.0])
    inside = compare("x", want + np.array([0.9, -0.9]), want, LOOSE)
    assert (inside.verdict, inside.tolerance) == (Verdict.PASS, 1.0)
    assert inside.error == pytest.approx(0.9)
    assert compare("x", want + np.array([0.0, 1.1]), want, LOOSE).verdict is Verdict.FAIL


def test_an_exact_comparison_allows_nothing():
    want = np.array([1.0, 2.0])
    assert compare("x", want, want, EXACT).verdict is Verdict.PASS
    assert compare("x", np.nextafter(want, 3), want, EXACT).verdict is Verdict.FAIL


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(bad):
    found = compare("x", np.array([1.0, bad]), np.array([1.0, 2.0]), Tolerance(1e9, 1e9, ""))
    assert found.verdict is Verdict.FAIL
    assert "not finite" in found.note


def test_another_shape_fails_even_where_it_would_broadcast():
    found = compare("x", np.ones((1, 3)), np.ones((2, 3)), Tolerance(1e9, 1e9, ""))
    assert found.verdict is Verdict.FAIL
    assert "[1, 3], expected [2, 3]" in found.note


def test_a_stage_is_as_good_as_its_worst_comparison():
    near = Comparison(Verdict.PASS, 0.9, 1.0, 1.0, "near the edge")
    big = Comparison(Verdict.PASS, 5.0, 100.0, 1.0, "larger, allowed more")
    unsure = Comparison(Verdict.AMBIGUOUS, 0.1, 1.0, 1.0, "a tie", "two tokens differ")
    assert fold([Finding("s", (big, near), "why")]).note == "worst: near the edge"
    folded = fold(
        [Finding("s", (near,), "why"), Finding("s", (), ""), Finding("s", (unsure, big), "because")]
    )
    assert folded.verdict is Verdict.AMBIGUOUS
    assert (folded.note, folded.reason) == ("a tie: two tokens differ", "because")
    assert folded.comparisons == 3


def test_the_report_is_as_good_as_its_worst_stage():
    assert Report("m", {}, (stage(Verdict.PASS), stage(Verdict.AMBIGUOUS))).verdict is Verdict.AMBIGUOUS
    assert Report("m", {}, (stage(Verdict.FAIL), stage(Verdict.AMBIGUOUS))).verdict is Verdict.FAIL
    assert Report("m", {}, ()).verdict is Verdict.FAIL  # nothing compared proves nothing


def test_json_has_no_infinity():
    raw = to_json(Report("m", {}, (stage(Verdict.FAIL, math.inf),)))
    assert json.loads(json.dumps(raw, allow_nan=False))["stages"][0]["max_abs_error"] is None


def test_text_names_every_stage_and_ends_in_a_sentence():
    lines = text_lines(Report("m", {}, (stage(Verdict.PASS), stage(Verdict.FAIL, math.inf))))
    assert "FAIL" in lines[2]
    assert lines[-1].startswith("FAIL at hidden")


def test_the_sentence_names_what_pruned_the_model():
    report = Report("m", {}, (stage(Verdict.PASS),), policies=("paper-highest", "divprune"))
    assert "Hugging Face pruned by paper-highest, divprune," in report.sentence


FLOPS = (Pair(200, 120), Pair(100, 20))  # to the first token; of them the decoder's
SETTINGS = {
    "keep": "0.5 on average over 4 layers",
    "layers": "0 to 1, 2 to 3",
    "policies": "layer 2, paper, highest, query states",
    "evidence": "told & tested",
    "dialect": "portable",
}


def written(report, tmp_path):
    write_html(report, tmp_path / "report.html", [tiny_picture(140, 112)])
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path):
    picture = KeptPicture((4, 5), tuple(range(0, 20, 3)), picture=0)
    case = Case(
        "question 1", "how <many>?", "three & four", "two", "three", 44, 20, 7, (7,), 0.5, (picture,), *FLOPS
    )
    report = Report("model <x>", SETTINGS, (stage(Verdict.FAIL, math.inf),), (case,))
    return written(report, tmp_path)


def test_html_needs_no_network_and_no_script(page):
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert page.count("data:image/jpeg;base64,") == 1


def test_html_escapes_what_others_wrote(page):
    assert "model &lt;x&gt;" in page
    assert "how &lt;many&gt;?" in page
    assert "three &amp; four" in page
    assert "told &amp; tested" in page
    assert "<many>" not in page


def test_html_says_what_failed_and_how_answers_differ(page):
    assert page.count("✗ FAIL") == 2
    assert "the answers differ" in page
    assert "7 of 20 patches kept" in page


def test_the_header_says_how_the_model_was_pruned_and_compares_with_that(page):
    header = page[page.index("<header") : page.index("</header>")]
    for name in ("keep", "layers", "policies", "evidence"):
        assert f"<dt>{name}</dt>" in header
    assert "dialect" not in header
    assert "the pruned Hugging Face model" in header
    assert "<dt>of the FLOPs to the first token saved</dt><dd>40.0%</dd>" in header
    assert "<dt>of the decoder&#39;s prefill alone saved</dt><dd>80.0%</dd>" in header


def test_answers_of_all_three_stand_side_by_side(page):
    row = page[page.index("<tbody>") : page.index("</tbody>")]
    cells = [cell.strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
    assert cells == ["three", "≠ two", "≠ three &amp; four"]


def test_every_cut_is_drawn_and_a_video_once_a_cut(tmp_path):
    picture = KeptPicture((4, 5), (1, 2), kept_by_cut=((1, 2, 3), (1, 2)), picture=0)
    parts = tuple(KeptPicture((2, 2), (0,), video=0, kept_by_cut=((0, 1), (0,))) for _ in range(2))
    cases = (
        Case("question 1", "?", "a", "a", "a", 44, 20, 2, (3, 2), 1.0, (picture,), *FLOPS),
        Case("a video", "?", "a", "a", "a", 20, 8, 2, (4, 2), 1.0, parts, *FLOPS),
        Case("no picture", "?", "", "", "", 9, 0, 0, (), 1.0, (), Pair(5, 5), Pair(5, 5)),
    )
    stages = tuple(Stage(name, Verdict.PASS, 0.0, 0.0, 0.0, "", "", 1) for name in ("kept_1", "kv_2"))
    page = written(Report("m", {}, stages, cases), tmp_path)
    assert page.count("data:image/jpeg;base64,") == 4
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [
        "cut 0: 3 of 20 patches kept",
        "cut 1: 2 of 20 patches kept",
        "cut 0: 4 of 8 patches kept",
        "cut 1: 2 of 8 patches kept",
    ]
    assert "3, then 2 of 20 visual tokens kept" in page
    assert "Kept tokens, cut 1" in page
    assert "KV cache, span 2" in page
    assert "(empty)" in page
