"""The tables of a page or of what a script prints."""

import re


def heads(text):
    """The first line of each table."""
    return re.findall(r"^(\|.*)\n\|---", text, re.MULTILINE)


def tables(text):
    """The rows of each table, without its head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in b.splitlines()[2:]] for b in blocks]
