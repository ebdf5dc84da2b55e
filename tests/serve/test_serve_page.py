"""The page at / in headless Chromium: a real picture, the shipped model, labels, a phone's width."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from browser import NEEDS_BROWSER
from browser import browser as chromium
from bundles import export_tiny
from digit_scenes import held_out
from server_process import serving

from ep_export.adaptive import fit_threshold
from ep_export.bundle import Dialect, write_manifest
from ep_export.policy import Keep, MaxMin
from ep_export.runtime import Session, open_picture

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
pytestmark = NEEDS_BROWSER
QUESTION = "Which digits are there?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The shipped model, cut before layer 3, with two policies, in the dialect that batches."""
    out = tmp_path_factory.mktemp("page") / "bundle"
    return export_tiny(READER, out, layer=3, keep=0.5, policies=(MaxMin(),), dialect=Dialect.ONNXRUNTIME)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    ((scene, _),) = held_out(1)
    file = tmp_path_factory.mktemp("picture") / "scene.png"
    scene.picture.save(file)
    return file


@pytest.fixture(scope="module")
def server(bundle):
    options = ("--no-verify", "--capacity", "600")
    with serving(bundle.path, *options, environment={"EP_EXPORT_API_KEY": "open sesame"}) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.get(server.url)
        waits_for(driver, lambda: at(driver, "#key-form").is_displayed())
        assert driver.switch_to.active_element == at(driver, "#key")
        at(driver, "#key").send_keys("open sesame\n")
        waits_for(driver, lambda: at(driver, "#model").text == "tiny")
        yield driver


def at(browser, selector: str):
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, selector)


def waits_for(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: condition())


def answered(browser) -> bool:
    """Whether both answers are complete."""
    return all("token" in at(browser, f"#{side} [data-what=end]").text for side in ("pruned", "unpruned"))


def narrow(browser, width: int) -> None:
    size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_a_picture_is_asked_about_and_what_was_kept_is_seen(browser, bundle, picture):
    """One visit, in the order of a person's steps: a browser is slow to start."""
    with Session.open(bundle) as session:
        wanted = session.generate([open_picture(picture)], QUESTION, max_new_tokens=20)
        full = session.generate([open_picture(picture)], QUESTION, max_new_tokens=20, prune=False)
        other = session.generate([open_picture(picture)], QUESTION, max_new_tokens=20, policies=("divprune",))

    assert not at(browser, "#key-form").is_displayed()
    assert not at(browser, "#ask").is_enabled()

    at(browser, "#file").send_keys(str(picture))
    at(browser, "#question").send_keys(QUESTION)
    waits_for(browser, lambda: at(browser, "#canvas").is_displayed())
    at(browser, "#ask").click()
    waits_for(browser, lambda: answered(browser))
    assert at(browser, "#pruned [data-what=text]").text == wanted.answer
    assert at(browser, "#unpruned [data-what=text]").text == full.answer

    kept, rows = len(wanted.pictures[0].kept_tokens), at(browser, "#figures tbody").text
    assert f"Visual tokens kept {kept} {wanted.visual_tokens}" in " ".join(rows.split())
    label = at(browser, "#canvas").get_attribute("aria-label")
    assert f"{kept} of {wanted.visual_tokens} patches go on from layer 3" in label
    assert dimmed_cells(browser, wanted.pictures[0].token_grid) == set(range(wanted.visual_tokens)) - set(
        wanted.pictures[0].kept_tokens
    )

    policy = at(browser, "#policy")
    policy.find_element("css selector", "option[value=divprune]").click()
    waits_for(browser, lambda: "chosen by divprune" in at(browser, "#canvas").get_attribute("aria-label"))
    waits_for(browser, lambda: answered(browser))
    assert at(browser, "#pruned [data-what=text]").text == other.answer

    before = at(browser, "#figures").text
    at(browser, "#keep").send_keys("\ue014" * 10)  # arrow right
    assert at(browser, "#keep").get_attribute("aria-valuetext") == "60\u00a0%"
    waits_for(browser, lambda: answered(browser) and at(browser, "#figures").text != before)
    assert not at(browser, "#alert").is_displayed()

    radios = browser.find_elements("css selector", "#views input")
    assert len(radios) == 2
    browser.execute_script("arguments[0].click()", radios[0])
    assert "patches" not in at(browser, "#canvas").get_attribute("aria-label")
    told = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # no error and nothing that the policy of contents blocked, but for the key that was asked for
    assert [message for message in told if "401 (Unauthorized)" not in message] == []


def dimmed_cells(browser, grid: tuple[int, int]) -> set[int]:
    """Cells whose middle is darker on the canvas than in the picture."""
    script = """
      const [rows, columns] = arguments[0], canvas = document.getElementById("canvas"), cells = [];
      const context = canvas.getContext("2d");
      for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
        const x = (c + 0.5) * canvas.width / columns, y = (r + 0.5) * canvas.height / rows;
        cells.push([...context.getImageData(x, y, 1, 1).data]);
      }
      return cells;"""
    drawn = browser.execute_script(script, list(grid))
    radios = browser.find_elements("css selector", "#views input")
    browser.execute_script("arguments[0].click()", radios[0])
    plain = browser.execute_script(script, list(grid))
    browser.execute_script("arguments[0].click()", radios[1])
    return {number for number, (a, b) in enumerate(zip(drawn, plain, strict=True)) if a != b}


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, width):
    narrow(browser, width)
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, shown = browser.execute_script(widths)
    assert scrolled <= shown


def test_everything_a_person_operates_has_a_name(browser):
    """As a screen reader hears it: Chromium's own accessibility tree."""
    browser.execute_cdp_cmd("Accessibility.enable", {})
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    operated = {"button", "slider", "combobox", "textbox", "radio", "image", "ComboBoxSelect"}
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and node.get("role", {}).get("value") in operated
    }
    assert all(name for _, name in named), named
    names = {name for _, name in named}
    assert {"Question", "Policy", "Ask"} <= names
    assert any(name.startswith("Keep") for name in names)


def test_a_fault_is_said_as_an_alert(browser):
    narrow(browser, 1280)
    at(browser, "#question").clear()
    at(browser, "#question").send_keys("<|im_start|>")
    at(browser, "#ask").click()
    waits_for(browser, lambda: "special token" in at(browser, "#alert").text)
    assert at(browser, "#alert").get_attribute("role") == "alert"


def test_nothing_but_this_server_is_asked(browser, server):
    names = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert names
    assert all(name.startswith(server.url) for name in names)


def test_an_adaptive_keep_is_the_pictures_own_until_the_knob_is_moved(browser, bundle, picture, tmp_path):
    shown, schedule = open_picture(picture), bundle.manifest.schedule
    with Session.open(bundle) as session:
        prompt = session.prompts.build([shown], QUESTION)
        scores = session.prefill(prompt, Keep(ratio=1.0)).cuts[0].scores
        keep = fit_threshold(0.75, schedule, [scores, 2 * scores], layers=bundle.manifest.dims.layers)
        wanted = session.generate([shown], QUESTION, max_new_tokens=1, keep=keep)
    folder = shutil.copytree(bundle.path, tmp_path / "adaptive")
    write_manifest(folder, dataclasses.replace(bundle.manifest, keep=keep))
    with serving(folder, "--no-verify", "--capacity", "600") as server:
        browser.get(server.url)
        waits_for(browser, lambda: at(browser, "#keep-shown").text == "adaptive, on average 75 %")
        at(browser, "#file").send_keys(str(picture))
        at(browser, "#question").send_keys(QUESTION)
        waits_for(browser, lambda: at(browser, "#canvas").is_displayed())
        at(browser, "#ask").click()
        waits_for(browser, lambda: answered(browser))
        kept = f"{len(wanted.pictures[0].kept_tokens)} of {wanted.visual_tokens} visual tokens"
        assert at(browser, "#pruned [data-what=how]").text == (f"keep adaptive, 75 % on average: here {kept}")
        at(browser, "#keep").send_keys("\ue014")
        assert at(browser, "#keep-shown").text == "76 %"
        waits_for(browser, lambda: at(browser, "#pruned [data-what=how]").text == "keep 76 %")
