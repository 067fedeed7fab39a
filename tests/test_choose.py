"""The page of recommendations holds numbers of the pages that it links to."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "choose.md").read_text(encoding="utf-8")
NUMBER = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)"
ROWS = [
    row
    for row in PAGE.splitlines()
    if row.startswith("| ") and re.search(r"\d\.\d\d", re.sub(r"\]\(.*?\)", "", row))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_a_number_stands_in_its_source(row):
    links = re.findall(r"\]\((.*?)(?:#.*?)?\)", row)
    sources = " ".join((DOCS / link).read_text(encoding="utf-8") for link in links)
    known = [float(number.replace(",", "")) for number in re.findall(NUMBER, sources)]
    text = re.sub(r"\]\(.*?\)", "]", row).replace("x", " ")
    for number in re.findall(r"\d+\.\d\d+", text):
        decimals = len(number.partition(".")[2])
        assert any(round(value, decimals) == float(number) for value in known), number


def test_the_rows_have_numbers():
    assert len(ROWS) >= 9
