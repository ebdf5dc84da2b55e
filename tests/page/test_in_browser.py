"""Pages that people are sent, in a real browser: nothing runs over the edge, no network is asked."""

import pytest
from browser import NEEDS_BROWSER, browser
from tiny import tiny_picture

from ep_export.plan import Pair
from ep_export.runtime import KeptPicture
from ep_export.validate import write_html
from ep_export.validate.report import Case, Report, RoundingCost, Stage, Verdict

pytestmark = NEEDS_BROWSER
WIDTHS = {"phone": 360, "desktop": 1280}
LONG = "a_very_long_name_without_any_place_to_break_" * 4
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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_runs_over_the_edge(driver, validation, width, dark):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(validation)
    assert driver.execute_script(OVERFLOWING) == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 22, 31)") is dark
    assert driver.get_log("browser") == []


def test_every_picture_is_shown_and_described(driver, validation):
    driver.get(validation)
    pictures = driver.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 0])"
    )
    assert pictures
    assert all(shown and described for shown, described in pictures)
