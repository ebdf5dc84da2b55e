"""Pages: complete, self-contained, everything put into them escaped; their templates travel in the wheel."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

import ep_export.page
from ep_export.page import render

PACKAGE = Path(ep_export.page.__file__).parents[1]
TEMPLATES = sorted(PACKAGE.rglob("*.j2"))


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Writes a template beside the package's own."""
    from jinja2 import ChoiceLoader, FileSystemLoader

    environment = ep_export.page._environment()
    loaders = ChoiceLoader([environment.loader, FileSystemLoader(tmp_path)])
    monkeypatch.setattr(environment, "loader", loaders)

    def write(body):
        (tmp_path / "a.html.j2").write_text(body)
        return "a.html.j2"

    return write


def test_a_page_is_whole_and_needs_nothing_else(template):
    page = render(
        template('{% extends "page/base.html.j2" %}{% block title %}{{ x }}{% endblock %}'), x="a <b>"
    )
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "<title>a &lt;b&gt;</title>" in page
    assert ":root{--page" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_pictures_travel_in_the_page_and_facts_are_escaped(template):
    name = template(
        '{% from "page/pieces.html.j2" import facts, image %}{{ image(picture, alt) }}{{ facts(rows) }}'
    )
    page = render(name, picture=Image.new("RGB", (30, 20), "red"), alt='a "b"', rows={"k": "<v>"})
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (30, 20)
    assert 'alt="a &#34;b&#34;"' in page
    assert "<dt>k</dt><dd>&lt;v&gt;</dd>" in page


def test_a_name_that_is_missing_is_an_error(template):
    with pytest.raises(UndefinedError):
        render(template("{{ missing }}"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_and_what_they_extend_can_be_read(template):
    assert ep_export.page._environment().get_template(template.relative_to(PACKAGE).as_posix())


def test_git_ignores_no_template():
    """hatchling leaves out of the wheel what git ignores."""
    ignored = (PACKAGE.parent / ".gitignore").read_text(encoding="utf-8").split()
    assert not {"*.j2", "*.html.j2", "*.css"} & set(ignored)
