"""What imports what: light at the door, and one way inside."""

import ast
import subprocess
import sys
from pathlib import Path

import rolldiff

ROOMS = [
    ["errors"],
    ["noise", "layout", "config", "streams"],
    ["grouping", "schedule", "conditions", "hub"],
    ["times", "prediction", "conditioning"],
    ["nn", "timetable", "training", "cost"],
    ["denoiser", "step"],
    ["sampler", "arrivals"],
    ["decoding"],
    ["begin"],
    ["editing"],
    ["decoder"],
    ["lit", "evaluation", "data", "integrations"],
    ["callbacks", "report", "tokenizer"],
    ["prior"],
    ["generate"],
    ["chain"],
    ["run"],
    ["bench"],
    ["commands"],
    ["cli"],
]
HEAVY = {"lightning", "hydra", "omegaconf", "wandb", "torchmetrics", "matplotlib", "PIL", "sklearn"}
HEAVY |= {"datasets", "rich"}
PACKAGE = Path(rolldiff.__file__).parent


def imported(path):
    """Modules imported at the top of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_import_is_light():
    code = "import sys, rolldiff; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_arrows_run_one_way():
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        assert room in level, f"{room} has no place among the rooms"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "rolldiff" and len(parts) > 1 and parts[1] != room:
                assert level[parts[1]] < level[room], f"{room} imports {parts[1]}"
            if level[room] <= level["decoder"]:
                assert parts[0] not in HEAVY, f"{room} imports {name}"
