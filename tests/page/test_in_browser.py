"""Pages that people are sent, in a real browser: nothing runs over the edge, no network is asked."""

from dataclasses import replace

import pytest
from browser import NEEDS_BROWSER, browser
from sweep_example import example, mean, row
from tiny import tiny_picture

from ep_export.numerics import WeightKind, Weights
from ep_export.planning import Pair
from ep_export.runtime import KeptPicture
from ep_export.sweep.record import MethodInfo, Prefill, RoundedUnpruned, SameBudget
from ep_export.sweep.report import write_report
from ep_export.validate import write_html
from ep_export.validate.report import Case, Report, RoundingCost, Stage, Verdict

pytestmark = NEEDS_BROWSER
WIDTHS = {"phone": 360, "desktop": 1280}
LONG = "a_very_long_name_without_any_place_to_break_" * 4
UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"
OVERFLOWING = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.wide')) return false;
  const box = e.getBoundingClientRect();
  return box.width && (box.right > wide + 1 || box.left < -1);
}).map(e => e.tagName + '.' + e.className);
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """A report with every section, and with words that are hard to lay out."""
    picture = KeptPicture((4, 5), tuple(range(0, 20, 3)), picture=0)
    flops = (Pair(200, 120), Pair(100, 20))
    cases = tuple(
        Case(f"question {n}", LONG, answer, "two", "three", 44, 20, 7, (7,), 0.5, (picture,), *flops)
        for n, answer in enumerate(("two", LONG))
    )
    stages = tuple(Stage(name, Verdict.FAIL, 1.0, 2.0, 0.1, LONG, LONG, 3) for name in ("vision", LONG))
    costs = (RoundingCost("quantised", 0.01, 0.99, 100),)
    settings = {"keep": "25 %", "layers": LONG, "policies": LONG, "evidence": LONG, "dialect": LONG}
    report = Report(LONG, settings, stages, cases, ("divprune",), costs)
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_html(report, file, [tiny_picture(140, 112)])
    return file.as_uri()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep with every section, too few pictures, and words that are hard to lay out."""
    folder = tmp_path_factory.mktemp("sweep")
    plain = example(folder)
    timed = Prefill(50.0, 40.0, 1.25, 1.1, 1.4, 12)
    small = replace(row("scaled-flops", 0, 0.5, 0.6), cuts=(), budget=SameBudget.FIRST_TOKEN)
    rows = [replace(one, prefill=timed) for one in (*plain.rows, row("divprune", 1, 0.5, 0.6), small)]
    rounded = [
        replace(one, method=f"{one.method}@int4", weights="int4", over_full_weights=one.over_random)
        for one in rows
        if one.over_random is not None
    ]
    titles = (("divprune", LONG), ("scaled-flops", "Smaller picture, same first-token FLOPs"))
    methods = (*plain.methods, *(MethodInfo(key, title, LONG, LONG, True) for key, title in titles))
    entry = replace(plain.gallery[0], question=LONG, answer=LONG, full_answer=LONG)
    record = replace(
        plain,
        model=LONG,
        rows=(*rows, *rounded),
        swept_layers=(0, 1, 2),
        methods=(*methods, *(replace(one, key=f"{one.key}@int4") for one in plain.methods)),
        questions=(replace(plain.questions[0], kind=LONG), plain.questions[1]),
        gallery=(entry,),
        notes=(f"ONLY 2 PICTURES: {LONG}",),
        scarce=True,
        rounded=(
            RoundedUnpruned(
                "int4", Weights(WeightKind.INT4, 32, "nearest"), mean(0.5), mean(0.5), mean(0.5), "10"
            ),
        ),
    )
    return write_report(folder, record).as_uri()


@pytest.mark.parametrize("name", ["validation", "sweep"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_runs_over_the_edge(driver, request, name, width, dark):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(request.getfixturevalue(name))
    driver.execute_script(UNFOLD)
    assert driver.execute_script(OVERFLOWING) == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 22, 31)") is dark
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("name", ["validation", "sweep"])
def test_every_picture_is_shown_and_described(driver, request, name):
    driver.get(request.getfixturevalue(name))
    pictures = driver.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 0])"
    )
    assert pictures
    assert all(shown and described for shown, described in pictures)
