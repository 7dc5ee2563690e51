"""How Sphinx builds the site; `build_site.py` runs it."""

project = "sparsify"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "sparsify"
html_show_copyright = html_show_sphinx = html_show_sourcelink = False
myst_heading_anchors = 3  # links to headings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
default_role = "code"  # what docstrings put between backticks


def setup(app):
    """Let bars in docstrings be bars: |w| is a norm."""
    app.connect("autodoc-process-docstring", _plain_bars)


def _plain_bars(app, what, name, obj, options, lines):
    lines[:] = [line.replace("|", "\\|") for line in lines]
