"""Documentation, built by Sphinx: `make docs`. Warnings are errors there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ep_export import __version__

project = "ep-export"
author = "the ep-export developers"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
nitpicky = False  # types of other packages have no inventory here

html_theme = "furo"
html_title = "ep-export"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_ivar = True
