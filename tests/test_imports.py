"""What imports what: `import rolldiff` is light, imports run one way, and the paths are short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch

import rolldiff
from rolldiff import Decoder

LEVELS = [
    ["errors", "progress", "shell"],
    ["slurm"],
    ["signals"],
    ["files", "objective", "processes"],
    ["device", "hub", "jobs"],
    ["trust"],
    ["diffusion"],
    ["conditioning"],
    ["nn"],
    ["likelihood"],
    ["likelihood"],
    ["decoder"],
    ["editing", "tokenizer", "integrations", "pixels", "presets"],
    ["data"],
    ["evaluation"],
    ["serving", "training"],
    ["cli"],
]
HEAVY = {"lightning", "hydra", "omegaconf", "wandb", "torchmetrics", "matplotlib", "PIL", "sklearn"}
HEAVY |= {"datasets", "tqdm", "diffusers"}
PACKAGE = Path(rolldiff.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def imported(path):
    """Modules imported at the top level of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_import_is_light():
    code = "import sys, rolldiff; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # huggingface_hub imports tqdm.
    assert not (HEAVY - {"tqdm"}) & set(done.stdout.split())


def test_a_server_needs_nothing_of_the_training():
    code = (
        "import sys, rolldiff.cli, rolldiff.serving; print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"tqdm", "hydra", "omegaconf", "PIL"}
    assert not (HEAVY - allowed) & set(done.stdout.split())


def test_imports_run_one_way():
    level = {part: i for i, parts in enumerate(LEVELS) for part in parts}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        assert part in level, f"{part} has no level"
        for name in imported(path):
            names = name.split(".")
            if names[0] == "rolldiff" and len(names) > 1 and names[1] != part:
                assert level[names[1]] < level[part], f"{path} imports {names[1]}"
            if level[part] <= level["decoder"]:
                assert names[0] not in HEAVY, f"{path} imports {name}"


def files_called(function):
    """The files of the package whose functions run during a call."""
    files = set()

    def profile(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(path.relative_to(PACKAGE.parent).as_posix())

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def listed(title):
    """The files that the README lists under a title."""
    (entry,) = re.findall(rf"- \*\*{title}\*\*(.*?)(?=\n- |\n\n)", README, re.DOTALL)
    return {f"rolldiff/{name.removeprefix('rolldiff/')}" for name in re.findall("`(.*?)`", entry)}


def test_the_paths_that_the_readme_lists():
    """One decoding runs through at most eight files, one training step through at most six.

    The checks of plain numbers in `errors.py`, which everything calls, are not counted.
    """
    torch.manual_seed(0)
    decoder = Decoder.build(image_size=8, channels=1, width=32, depth=1, num_classes=3)
    image = torch.zeros(2, 1, 8, 8)
    decoded = files_called(lambda: decoder.decode([1], num_groups=1, steps=2, guidance=1.0, seed=0))
    trained = files_called(lambda: decoder.loss(image, [0, 1]).backward())
    checks = {"rolldiff/errors.py"}
    decoded, trained = decoded - checks, trained - checks
    assert decoded == listed("Decoding")
    assert trained == listed("A training step")
    assert len(decoded) <= 8
    assert len(trained) <= 6
