"""Writes formulas as MathML while the site is built: browsers draw it, and no script is loaded."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What the extension arithmatex makes of `$…$` and `$$…$$`: `\(…\)` and `\[…\]` in an element.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """The page of mkdocs with its formulas as MathML.

    Args:
        text: HTML.
    """
    return FORMULA.sub(_formula, text)


def _formula(match: re.Match[str]) -> str:
    display = "inline" if match[2] == "(" else "block"
    return convert(html.unescape(match[3]), display=display)
