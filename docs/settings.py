"""Writes `settings.md`: every group and key of `conf`, with its default and what it means.

    python docs/settings.py

The meaning is the comment beside a key; where there is none, that of the argument in the docstring
of what the file builds.
"""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

from hydra.utils import get_method

from rolldiff.cli import config_dir

KEY = re.compile(r"(?P<indent>(?:  )?)(?P<name>[\w.]+):(?P<value>.*?)(?:\s+#\s*(?P<comment>.*))?$")
LEFT_OUT = {"_target_", "_partial_", "defaults", "hydra"}
PAGE = Path(__file__).parent / "settings.md"
INTRO = """# Settings

Every command is configured by one file and by groups of files. A key is set as `key=value`, a key
of a group as `group.key=value`, and `group=name` chooses a file. Defaults are those of the first
file of a group that has the key. This page is written by `python docs/settings.py`.
"""


class Setting(NamedTuple):
    """A key of a file.

    Attributes:
        name: of the key.
        value: its default, as it stands there.
        meaning: what the comment or the docstring says; empty if neither does.
    """

    name: str
    value: str
    meaning: str


class File(NamedTuple):
    """A file of settings.

    Attributes:
        name: how it is chosen.
        about: what its first comment says.
        settings: its keys.
    """

    name: str
    about: str
    settings: list[Setting]


def read(path: Path) -> File:
    """The keys of a file and one level below, with the comments beside them and under those."""
    settings: list[Setting] = []
    parent = ""
    about: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not settings and not line.startswith("# @"):
            about.append(line[2:])
        elif match := KEY.match(line):
            name, value, comment = match["name"], match["value"].strip(), match["comment"] or ""
            if not match["indent"]:
                parent = name
            settings.append(
                Setting(f"{parent}.{name}" if match["indent"] else name, value, comment)
            )
        elif settings and re.match(r"\s{20,}# ", line):  # a comment that goes on
            last = settings.pop()
            settings.append(last._replace(meaning=f"{last.meaning} {line.split('# ', 1)[1]}"))
        elif settings and line.strip() and not settings[-1].value:
            settings[-1] = settings[-1]._replace(value="…")
    target = next((s.value for s in settings if s.name == "_target_"), None)
    known = documented(target) if target else {}
    settings = [
        s._replace(meaning=s.meaning or known.get(s.name, ""))
        for s in settings
        if not LEFT_OUT & set(s.name.split(".")) and not _has_children(s.name, settings)
    ]
    return File(path.stem, " ".join(about), settings)


def _has_children(name: str, settings: list[Setting]) -> bool:
    return any(other.name.startswith(f"{name}.") for other in settings)


def documented(target: str) -> dict[str, str]:
    """The arguments in the docstring of a class and of those it inherits from, or of a function."""
    found: dict[str, str] = {}
    built = get_method(target)
    for part in reversed(inspect.getmro(built)) if inspect.isclass(built) else [built]:
        text = inspect.cleandoc(part.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
        if section and part.__module__.startswith("rolldiff"):
            entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1], re.MULTILINE)
            found |= {name: " ".join(meaning.split()) for name, meaning in entries}
    return found


def table(settings: list[Setting]) -> list[str]:
    """The lines of a table of keys."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, value, meaning in settings:
        cells = f"`{name}`", f"`{value or 'null'}`", meaning
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells).strip() + " |")
    return rows


def page() -> str:
    """The whole page."""
    conf = config_dir()
    lines = [INTRO, "## Commands", ""]
    for path in sorted(conf.glob("*.yaml")):
        file = read(path)
        lines += [f"### rolldiff {file.name}", "", *table(file.settings), ""]
    lines += ["## Groups", ""]
    for folder in sorted(path for path in conf.iterdir() if path.is_dir()):
        files = [read(path) for path in sorted(folder.glob("*.yaml"))]
        lines += [f"### {folder.name}", ""]
        lines += [f"- `{folder.name}={f.name}`{': ' + f.about if f.about else ''}" for f in files]
        lines += [""]
        if folder.name in ("experiment", "recipe", "hparams_search"):  # settings of other groups
            continue
        merged: dict[str, Setting] = {}
        for file in files:
            for setting in file.settings:
                merged.setdefault(setting.name, setting)
        if merged:
            lines += [*table(list(merged.values())), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
