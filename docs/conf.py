"""Sphinx: `make docs` writes the site into docs/_build."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "sft: sparse fine-tuning"
author = "the sparse-sft authors"
release = version = version_of("sparse-sft")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "sft: sparse fine-tuning"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
