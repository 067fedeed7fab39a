"""What the README prints, and a clean copy of the repository with an environment of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BASH for line in block.splitlines()]


def check_out(folder):
    """Copy what git tracks to `folder/checkout`, and make an empty environment `folder/venv`."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, files.stdout.split("\0")):
        target = folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    return folder


def shell(command, folder, cwd):
    """Run a command line in the environment of a checked-out folder."""
    environment = os.environ | {"PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True
    )
