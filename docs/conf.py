"""How Sphinx builds the documentation: ``sphinx-build -W docs docs/_build``."""

import sys
from pathlib import Path

import mbn

sys.path.insert(0, str(Path(__file__).parent))  # the extensions of these docs

project = "mbn"
author = "The mbn developers"
release = mbn.__version__
extensions = [
    "myst_parser",
    "matplotlib.sphinxext.plot_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "measured",
    "measured_gpu",
]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "mbn"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which types cannot
autodoc_member_order = "bysource"
napoleon_use_rtype = False
myst_heading_anchors = 3
plot_include_source = True
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
