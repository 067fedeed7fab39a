"""What a repository says of itself in several places is the same in all of them."""

import re
import tomllib
from pathlib import Path

import yaml

import rolldiff

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.11", "3.12", "3.13"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_one():
    (released, date), *_ = re.findall(
        r"^## \[(\d[\d.]*)\] - ([\d-]{10})$", read("CHANGELOG.md"), re.M
    )
    cited = yaml.safe_load(read("CITATION.cff"))
    assert released == rolldiff.__version__ == cited["version"]
    assert date == str(cited["date-released"])
    assert f"Version {'.'.join(released.split('.')[:2])}." in read("README.md")


def test_the_pythons_are_the_same_everywhere():
    lowest, highest = PYTHONS[0], PYTHONS[-1]
    minor = int(highest.split(".")[1])
    assert PROJECT["project"]["requires-python"] == f">={lowest},<3.{minor + 1}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert f"Python {lowest} to {highest}" in read("README.md")
    gate = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["gate"]
    assert gate["strategy"]["matrix"]["python"] == PYTHONS
    assert {"run": ".ci/run"} in gate["steps"]


def test_the_forms_of_an_issue_are_complete():
    """What a forge refuses: a form without a name, or a field without an id or a label."""
    forms = list((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert {path.name for path in forms} == {"bug.yml", "config.yml", "feature.yml"}
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(form)
        for field in form["body"]:
            if field["type"] == "markdown":
                assert field["attributes"]["value"]
            else:
                assert field["id"]
                assert field["attributes"]["label"]


def test_links_to_the_repository_lead_to_its_files():
    """Absolute links, which the build of the site does not follow."""
    names = (
        "README.md",
        "CHANGELOG.md",
        *(f".github/ISSUE_TEMPLATE/{n}.yml" for n in ("config", "feature")),
    )
    for name in names:
        for path in re.findall(r"github\.com/rolldiff/rolldiff/blob/main/([\w./-]+)", read(name)):
            assert (ROOT / path).is_file(), (name, path)
