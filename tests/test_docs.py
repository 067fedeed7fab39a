"""The reference has every public name, and the site every page."""

import re
import runpy
from html import unescape
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import rolldiff

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Modules whose `__all__` users import from, beside the package itself.
MODULES = (
    "editing",
    "presets",
    "tokenizer",
    "data",
    "integrations.dit",
    "integrations.autoencoder",
    "integrations.diffusers",
)
NO_ENTRY = {"Training", "timesteps", "Kind", "WANTED"}  # another name, a module, texts


def entries():
    return re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_reference_has_every_public_name():
    names = {f"rolldiff.{name}" for name in rolldiff.__all__ if name not in NO_ENTRY}
    for module in MODULES:
        public = import_module(f"rolldiff.{module}").__all__
        names |= {f"rolldiff.{module}.{name}" for name in public if name not in NO_ENTRY}
    assert names <= set(entries())


def test_an_entry_is_a_documented_name_and_stands_once():
    found = entries()
    assert len(found) == len(set(found))
    for entry in found:
        assert resolve_name(entry).__doc__, entry


def test_the_settings_are_those_of_conf():
    """`python docs/settings.py` writes the page."""
    names = runpy.run_path(str(DOCS / "settings.py"))
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == names["page"]()


def test_the_site_leads_to_every_page():
    text = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")
    site = yaml.safe_load(text)

    def paths(part):
        if isinstance(part, str):
            return {part}
        parts = part.values() if isinstance(part, dict) else part
        return set().union(*map(paths, parts))

    pages = {f"docs/{path.relative_to(DOCS).as_posix()}" for path in DOCS.rglob("*.md")}
    pages |= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*/README.md")
    }
    pages |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")}
    assert pages <= paths(site["nav"])


@pytest.mark.slow  # the gate installs the extra `docs` after the other tests
def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml")
    write = runpy.run_path(str(DOCS / "mathematics.py"))["on_page_content"]
    inline = r'<p><span class="arithmatex">\(s &lt; t\)</span> and <code>$HOME</code></p>'
    made = write(inline)
    assert made.startswith("<p><math")
    assert made.endswith("</math> and <code>$HOME</code></p>")
    assert "<mo><</mo>" in unescape(made)
    block = '<div class="arithmatex">\\[\nx_t = \\alpha(t)\\,x\n\\]</div>'
    assert 'display="block"' in write(block)
