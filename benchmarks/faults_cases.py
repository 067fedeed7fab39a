"""What kinds of corrupted inputs share: a case and its outcome, changes of values and of bytes."""

import copy
import math
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rolldiff import Decoder, Training
from rolldiff.errors import UsageError

SECONDS = 10  # after which a case counts as a hang
NAN, INF = math.nan, math.inf
OUTCOMES = (
    "plain error",
    "rightly accepted",
    "wrongly refused",
    "wrongly accepted",
    "bare type error",
    "traceback",
    "hang",
)
FAULTS = OUTCOMES[2:]


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        name: what is wrong with it.
        run: gives it to the library.
        right: "refuse", "accept" or "either".
        check: whether what came out is what the input says; asked where it is accepted.
        seconds: after which it counts as a hang.
    """

    name: str
    run: Callable[[], Any]
    right: str = "refuse"
    check: Callable[[Any], bool] = lambda result: True
    seconds: int = SECONDS


@dataclass
class Context:
    """What the cases of a run share.

    Args:
        random: the source of all choices.
        folder: for files; every case may write to a folder of its own in it.
    """

    random: random.Random
    folder: Path
    made: int = field(default=0, init=False)

    def path(self) -> Path:
        """A new folder."""
        self.made += 1
        path = self.folder / str(self.made)
        path.mkdir()
        return path


class Hang(BaseException):
    """Raised by the clock; not an `Exception`, so that nothing handles it."""


def outcome(case: Case) -> tuple[str, str]:
    """What the library does with a case, and the error's text."""

    def stop(*_: Any) -> None:
        raise Hang

    clock = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM")
    if clock:
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(case.seconds)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case.run()
            right = case.right != "refuse" and case.check(result)
        found, words = ("rightly accepted" if right else "wrongly accepted"), repr(result)[:80]
    except UsageError as error:
        words = str(error)
        one_line = len(words.splitlines()) == 1
        found = "plain error" if case.right != "accept" else "wrongly refused"
        found = found if one_line else "traceback"
    except Hang:
        found, words = "hang", ""
    except (TypeError, AttributeError) as error:
        found, words = "bare type error", repr(error)
    except Exception as error:
        found, words = "traceback", repr(error)
    finally:
        if clock:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    if time.perf_counter() - start > case.seconds:
        found = "hang"
    return found, words


# ---------------------------------------------------------------------------------------------
# Changes


def paths(config: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a configuration."""
    items: Any = ()
    if isinstance(config, dict):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for name, value in items:
        yield (*here, name)
        yield from paths(value, (*here, name))


def replaced(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    config = copy.deepcopy(config)
    part = config
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return config


def removed(config: Any, path: tuple[Any, ...]) -> Any:
    config = copy.deepcopy(config)
    part = config
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return config


def doubled(config: Any, path: tuple[Any, ...]) -> Any:
    """With a second value under a name that is one letter longer, or one item more."""
    config = copy.deepcopy(config)
    part = config
    for name in path[:-1]:
        part = part[name]
    value = copy.deepcopy(part[path[-1]])
    if isinstance(part, dict):
        part[f"{path[-1]}s"] = value
    else:
        part.append(value)
    return config


def changed_bytes(whole: bytes, random: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Files that are damaged."""
    for number in range(count):
        place = random.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.randrange(8)
        yield f"bit flipped at {place}", bytes(flipped)
        if number % 3 == 0:
            yield f"cut at {place}", whole[:place]
            stop = min(len(whole), place + random.randrange(1, 200))
            yield f"zeros at {place}", whole[:place] + bytes(stop - place) + whole[stop:]
            yield f"without {place} … {stop}", whole[:place] + whole[stop:]
            yield f"more at {place}", whole[:place] + random.randbytes(5) + whole[place:]
            yield f"first {place} exchanged", random.randbytes(place % 64) + whole[place % 64 :]
    yield "empty", b""
    yield "more at the end", whole + b"x"
    yield "twice", whole * 2
    yield "header of 2^63 bytes", b"\xff" * 7 + b"\x7f" + whole[8:]
    yield "random", random.randbytes(1000)
    yield "pickle", pickle.dumps({"a": 1})


def within(expected: Any, found: Any) -> bool:
    """Whether all that a file says is so; a whole number may stand for a real one, no other."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.get("names") == ["cond"] and "names" not in expected:  # a single condition
            found = found["parts"][0]
        return all(name in found and within(v, found[name]) for name, v in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        return len(expected) == len(found) and all(within(a, b) for a, b in pairs)
    if isinstance(expected, int) and isinstance(found, list):  # one number for a square image
        return type(expected) is int and found == [expected, expected]
    if expected is None and found == []:  # no names
        return True
    if type(expected) is int and type(found) is float:
        return float(expected) == found
    return type(expected) is type(found) and expected == found


def tiny(**more: Any) -> Decoder:
    """A decoder of 8 x 8 pixels with random weights."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 1, "num_classes": 3}
    training = Training((1, 2, 4), orders=("top_to_bottom", "random:0"))
    decoder = Decoder.build(**sizes | {"training": training} | more)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()
