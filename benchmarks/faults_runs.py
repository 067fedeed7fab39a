"""Configurations of run folders, and command lines, as a user's terminal meets them.

A command is right if it succeeds, or ends with status 1 or 2 and one line on standard error.
"""

import contextlib
import io
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from faults_cases import Case, Context, paths, removed, replaced, tiny
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from rolldiff import TokenGrid
from rolldiff.cli import config_dir, main
from rolldiff.errors import UsageError
from rolldiff.tokenizer import Encoder, Tokenizer
from rolldiff.trust import TARGETS, read_run_config

TINY = [
    "max_steps=2",
    "max_time=null",
    "batch_size=4",
    "progress=false",
    "nn.width=16",
    "nn.depth=1",
    "nn.heads=1",
    "training.num_groups=[1,2]",
    "report.samples=8",
    "report.steps=1",
    "callbacks.samples=null",
]
PAYLOADS: tuple[Any, ...] = (
    {"_target_": "os.system", "command": "touch MARK"},
    {"_target_": "builtins.open", "file": "MARK", "mode": "w"},
    {"_target_": "rolldiff.trust.Path.touch", "self": "MARK"},
    {"_target_": "subprocess.run", "args": ["touch", "MARK"]},
    {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
    "${oc.env:HOME}",
    "${seed}",
    "/elsewhere",
    "~/elsewhere",
    "../elsewhere",
)
ODD: tuple[Any, ...] = (
    math.nan, math.inf, None, True, -1, 0, 0.5, 10**20, "", "x", [], {}, [1, 2],
)  # fmt: skip
WORDS = (
    "nan", "inf", "1e2", "1e400", "-1", "0", "0.5", "true", "null", "''", "x", "[]", "[1,2]",
    "{a:1}",
    "100000000000000000000", "ü", "${oc.env:HOME}", "${seed}", "../x", "\"it's\"", "[[1]]", "'a b'",
)  # fmt: skip
MALFORMED = (
    "=", "==", "a", "a=", "=a", "++", "~", "seed", "seed=[", "seed={", "seed='", "+seed=1", "~seed",
    "seed=1=2", "\x00", "seed=\n", "nn=", "nn=nothing", "~nn", "nn.=1", ".seed=1",
    "seed,max_steps=1", "seed=1,2", "seed=range(1,3)", "seed=choice(1,2)", "key=${", "@",
    "nn@x=tiny", "seed=$(ls)", "--x",
    "-x", "--cfg", "--cfg=nothing", "--info=x", "-c", "--multirun=1", "-h=1",
)  # fmt: skip


def command(words: list[str], folder: Path) -> int:
    """Run a command in a folder, in this process.

    Raises:
        UsageError: if it ends with a status and one line, which is its text.
        RuntimeError: if it ends with a status and anything else.
    """
    before, error = Path.cwd(), io.StringIO()
    os.chdir(folder)
    show = warnings.showwarning
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as stop:
        if not stop.code:
            return 0
        lines = [line for line in error.getvalue().splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("rolldiff: ")]
        if stop.code in (1, 2) and ours and lines[-1] == ours[-1] and "Traceback" not in str(lines):
            raise UsageError(ours[-1]) from None
        if stop.code == 2 and lines[-1].startswith(f"rolldiff {words[0]}: error: "):
            raise UsageError(lines[-1]) from None  # argparse, after its usage
        raise RuntimeError(f"status {stop.code}: {lines[-3:]}") from None
    finally:
        warnings.showwarning = show
        os.chdir(before)
    return 0


def run_configs(context: Context) -> Iterator[Case]:
    """`config.yaml` of a stopped run: read, and for some of them the training resumed."""
    stopped = context.path() / "run"
    command(["train", *TINY, f"run_dir={stopped}", "time_limit=00:00:00:00"], stopped.parent)
    whole = yaml.safe_load((stopped / "config.yaml").read_text(encoding="utf-8"))
    mark = context.folder / "mark"

    def read(text: str) -> Any:
        path = context.path() / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return read_run_config(path)

    def resume(text: str) -> Any:
        folder = context.path() / "run"
        shutil.copytree(stopped, folder)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        try:
            command(["train", f"resume={folder}"], folder.parent)
        finally:
            shutil.rmtree(folder)
        return {}

    def check(config: Any) -> bool:
        """Nothing ran, and nothing is named that could."""
        values = [config[p[0]] for p in paths(config) if len(p) == 1]
        text = repr(values)
        named = [v for p, v in leaves(config) if p[-1] == "_target_"]
        return not mark.exists() and "${" not in text and all(n in TARGETS for n in named)

    def case(name: str, config: Any, right: str = "either") -> Iterator[Case]:
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        text = text.replace("MARK", str(mark))
        yield Case(f"read, {name}", lambda: read(text), right, check)
        if context.random.random() < 0.04:
            yield Case(
                f"resume, {name}", lambda: resume(text), "either", lambda _: not mark.exists()
            )

    yield from case("whole", whole, "accept")
    for path in paths(whole):
        if not path:
            continue
        yield from case(f"without {path}", removed(whole, path))
        for odd in context.random.sample(ODD, 3):
            unsafe = isinstance(odd, float) and not math.isfinite(odd)
            right = "refuse" if unsafe else "either"
            yield from case(f"{path}={odd!r}", replaced(whole, path, odd), right)
        odd = context.random.choice(PAYLOADS)
        right = "refuse" if isinstance(odd, dict) or "${" in odd else "either"
        yield from case(f"{path}={odd!r}", replaced(whole, path, odd), right)
    for text in ("", "[]", "3", "a: &a 1\nb: *a", "a: !!python/object:os.system {}", "[" * 5000,
                 "a: {" * 500, "\t", "a: b: c", "? [1]\n: 2", "# " + "x" * 2**21):  # fmt: skip
        yield from case(text[:20], text, "refuse")


def leaves(config: Any, here: tuple[Any, ...] = ("",)) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values that are no containers, with the keys that lead to them."""
    items: Any = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, (*here, key))
        else:
            yield (*here, key), value


def command_lines(context: Context) -> Iterator[Case]:
    """Settings of every command with values that do not suit them, and malformed words."""
    folder = context.path()
    tiny(num_classes=10).save_pretrained(folder / "run")
    encoder = Encoder(8, in_channels=1, factor=4, channels=1, width=4, depth=1, local=True)
    decoder = tiny(num_classes=0, condition=TokenGrid(2, 2, channels=1), window=2)
    Tokenizer(encoder, decoder, levels=[5]).save_pretrained(folder / "tokens")
    Image.new("L", (10, 7), 90).save(folder / "picture.png")
    base = {
        "train": TINY,
        "decode": [f"ckpt={folder / 'run'}", "steps=1", "num_images=2"],
        "bench": [
            f"ckpt={folder / 'run'}", "data=digits", "bench.num_groups=[1,2]", "bench.steps=[1]",
            "bench.joint_steps=[]", "bench.seeds=[0]", "bench.samples=8", "bench.features=[pixels]",
            "progress=false", "run_dir=bench",
        ],
        "likelihood": [
            f"ckpt={folder / 'run'}", "data=digits", "likelihood.levels=17", "images=4",
            "likelihood.samples=2", "num_groups=[1,2]",
        ],
        "reconstruct": [
            f"ckpt={folder / 'tokens'}", f"image={folder / 'picture.png'}", "num_groups=2",
            "steps=2", "frames=2",
        ],
    }  # fmt: skip

    def run(name: str, words: list[str]) -> Any:
        place = context.path()
        try:
            return command([name, *base[name], *words], place)
        finally:
            shutil.rmtree(place)

    for name in base:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = OmegaConf.to_container(compose(name, base[name]))
        for path, default in leaves(cfg):
            key = ".".join(map(str, path[1:]))
            unused = name == "bench" and key.startswith("features.")
            if isinstance(path[-1], int) or "_target_" in key or key == "compile" or unused:
                continue
            for word in context.random.sample(WORDS, 2 if name == "train" else 5):
                right = expected(key, default, word)
                yield Case(
                    f"{name} {key}={word}", lambda n=name, w=f"{key}={word}": run(n, [w]), right
                )
        for word in MALFORMED:
            yield Case(f"{name} {word!r}", lambda n=name, w=word: run(n, [w]), "either", seconds=60)


def expected(key: str, default: Any, word: str) -> str:
    """What is right for a setting whose default is a number: no text, no NaN, nothing nested."""
    free = ("trainer", "callbacks", "logger", "optimizer", "features", "hydra", "frames")
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if not number or key.startswith(free):
        return "either"
    return "refuse" if word in ("nan", "x", "''", "[[1]]", "{a:1}", "'a b'", "true") else "either"
