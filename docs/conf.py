"""How Sphinx builds the documentation: ``sphinx-build -W docs docs/_build``."""

import sys
from pathlib import Path

import mbn

sys.path.insert(0, str(Path(__file__).parent))  # the extensions of these docs

project = "mbn"
author = "The mbn developers"
project_copyright = f"2026, {author}"
release = mbn.__version__
extensions = [
    "myst_parser",
    "matplotlib.sphinxext.plot_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "measured",
    "measured_gpu",
    "measured_history",
]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"mbn {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which types cannot
autodoc_member_order = "bysource"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
napoleon_use_rtype = False
highlight_options = {"python": {"stripnl": True}}  # a doctest ends with an empty line
myst_enable_extensions = ["colon_fence", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"release": release}
plot_include_source = True
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_rcparams = {"figure.figsize": (5.6, 4.2), "font.size": 12}  # a phone shows such a picture at almost its size
plot_apply_rcparams = True
