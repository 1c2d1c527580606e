"""The site: `sphinx-build -W --keep-going -b html docs docs/_build`. Builds, and reads, without a network."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_ACCENTED = r"<munderover>\s*(<mi>.</mi>)\s*(<mi>.</mi>)\s*(<mo [^>]*>.</mo>)\s*</munderover>"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from fewshot_diti.cli import main  # noqa: E402

project = "fewshot-diti"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "logs"]
default_role = "literal"  # docstrings write code in single backticks

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

strip_signature_backslash = True  # in names such as classes_
napoleon_use_ivar = True  # fields of dataclasses are described once
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # by browsers themselves, where MathJax would be a download


class CommandHelp(SphinxDirective):
    """What a command prints for `--help`."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = StringIO()
        with patch.dict(os.environ, COLUMNS="90"), redirect_stdout(text), suppress(SystemExit):
            main([*self.arguments[0].split(), "--help"])
        block = nodes.literal_block(text.getvalue(), text.getvalue())
        block["language"] = "text"
        return [block]


def write_mathml(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Writes an equation as MathML, with docutils' own converter."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block).replace("\u02c9", "\u00af")  # a bar that fonts have
    # it sets the index of an accented letter below the letter
    translator.body.append(re.sub(_ACCENTED, r"<msub><mover accent='true'>\1\3</mover>\2</msub>", mathml))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
