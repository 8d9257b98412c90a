"""How Sphinx builds the documentation: ``sphinx-build -W docs docs/_build``."""

import mbn

project = "mbn"
author = "The mbn developers"
release = mbn.__version__
extensions = ["myst_parser", "matplotlib.sphinxext.plot_directive", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
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
