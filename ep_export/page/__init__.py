"""HTML pages: one file each, no network, no script, readable on a phone, in the dark and on paper.

Templates are files of the package, named by their path in it (`validate/report.html.j2`); they extend
`page/base.html.j2` and share the macros of `page/pieces.html.j2`. Everything put into them is escaped.
"""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

__all__ = ["render"]

_PACKAGE = Path(__file__).parents[1]


def render(template: str, **context: Any) -> str:
    """A page.

    Args:
        template: Its path below `ep_export`.
        context: What it names; a name it does not find is an error.
    """
    return _environment().get_template(template).render(**context)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["jpeg"] = _jpeg
    return environment


def _jpeg(picture: Image.Image, quality: int) -> str:
    """A picture as an address that holds its own bytes.

    Args:
        picture: RGB.
        quality: 1 to 95.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
