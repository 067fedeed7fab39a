"""What a benchmark has measured: `results.jsonl` and `timings.json`, checked when they are read.

`results.jsonl` has one line per configuration: its settings, its cost, its metrics, and what makes
it comparable with the others. Lines are added and never changed. A file that was damaged or edited
is refused, because a report could not tell its figures from measured ones.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rolldiff.decoder import DecodeConfig
from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.sampler import Solver
from rolldiff.diffusion.schedule import check_grouping, decode_order
from rolldiff.errors import UsageError, finite_number, reason, whole_number
from rolldiff.evaluation.measure import mean_std
from rolldiff.files import write_text
from rolldiff.likelihood import LikelihoodConfig

__all__ = ["METHOD", "SETTINGS", "Results", "Timings", "config_of", "settings_of"]

Record = dict[str, Any]

# To be changed when equal settings give other figures. 1: a part of the images was the first ones.
METHOD = 2

SETTINGS = ("num_groups", "overlap", "steps", "order", "grouping", "solver", "guidance")


def settings_of(config: DecodeConfig, solvers: Mapping[str, Solver]) -> Record:
    """A configuration as flat, plain values; the solver by its name."""
    record = {name: getattr(config, name) for name in SETTINGS}
    guidance = config.guidance
    return record | {
        "order": config.order if isinstance(config.order, str) else list(config.order),
        "solver": next(name for name, solver in solvers.items() if solver == config.solver),
        "guidance": guidance if isinstance(guidance, int | float) else guidance.scale,
    }


def config_of(record: Mapping[str, Any], solvers: Mapping[str, Solver]) -> DecodeConfig:
    """The configuration of a record."""
    settings = {name: record[name] for name in SETTINGS}
    return DecodeConfig(**settings | {"solver": solvers[record["solver"]]})


class Results:
    """`results.jsonl`, in a folder that this process holds.

    Args:
        path: the file, which may exist.
        layout: of the decoder.
        solvers: by the names that lines use.

    Attributes:
        records: the lines.

    Raises:
        UsageError: if the file cannot be read, or a line is not a record.
    """

    def __init__(self, path: Path, *, layout: Layout, solvers: Mapping[str, Solver]) -> None:
        self.path, self.solvers = path, solvers
        self.same: Record = {}
        self.records: list[Record] = []
        data = _read(path)
        # A line without an end was being written when its job was killed, so it is not finished.
        *lines, rest = data.split(b"\n")
        self._size = len(data) - len(rest)
        first: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = _items(_parse(line), "a line")
                comparable = _plain(record.get("method")) == _plain(METHOD)
                if comparable:
                    record = _checked(record, layout=layout, solvers=solvers)
                    settings = json.dumps([record[name] for name in SETTINGS])
                    if settings in first:
                        raise UsageError(
                            "a configuration must have one line, got another of the same in line "
                            f"{first[settings]}"
                        )
            except (ValueError, RecursionError) as error:
                raise self._refusal(number, error) from error
            if not comparable:
                raise UsageError(
                    "run_dir must be empty or hold results of this version of rolldiff (method "
                    f"{METHOD}), got method {record.get('method')!r:.100} in line {number} of "
                    f"{path}, which is not comparable; say run_dir=FOLDER"
                )
            first[settings] = number
            self.records.append(record)

    def require(self, same: Record, *, metrics: Sequence[str]) -> None:
        """Refuse results that are not comparable with what is to be measured now.

        Args:
            same: what every line must agree on (checkpoint, reference, samples, seeds, extractors).
            metrics: what every line must hold.

        Raises:
            UsageError: if a line was written for something else, or lacks a metric.
        """
        self.same = same
        for number, record in enumerate(self.records, start=1):
            for key, value in same.items():
                if _plain(record[key]) != _plain(value):
                    raise UsageError(
                        f"run_dir must be empty or hold results of the same {key}, got "
                        f"{record[key]!r} in {self.path}, now {value!r}; say run_dir=FOLDER"
                    )
            if lacking := [name for name in metrics if name not in record["metrics"]]:
                error = UsageError(f"metrics must hold {lacking[0]}, got none")
                raise self._refusal(number, error)

    def missing(self, configs: Sequence[DecodeConfig]) -> list[DecodeConfig]:
        """The configurations that are still to be measured."""
        done = [{key: record[key] for key in SETTINGS} for record in self.records]
        return [config for config in configs if settings_of(config, self.solvers) not in done]

    def append(self, config: DecodeConfig, record: Record) -> None:
        """Write a configuration's line, through to the disk."""
        record = settings_of(config, self.solvers) | record | self.same
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with self.path.open("ab") as file:
            file.truncate(self._size)  # removes what a killed job left of a line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self.records.append(record)

    def _refusal(self, number: int, error: Exception) -> UsageError:
        return UsageError(
            f"line {number} of {self.path} is damaged: {reason(error)}; remove the line, and its "
            "configuration is measured again"
        )


class Timings:
    """`timings.json`: how the seconds of a configuration grow with its steps, measured once.

    Args:
        path: the file, which may exist.
        measure: measures the offset and the slope of a configuration, in seconds.

    Raises:
        UsageError: if the file cannot be read, or holds something else.
    """

    def __init__(
        self, path: Path, *, measure: Callable[[DecodeConfig], tuple[float, float]]
    ) -> None:
        self.path, self.measure = path, measure
        self.fits: dict[str, tuple[float, float]] = {}
        data = _read(path)
        try:
            for key, value in _items(_parse(data) if data else {}, "the file").items():
                offset, slope = _fit(value, key)
                self.fits[key] = (offset, slope)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} is damaged: {reason(error)}; remove the file, and the times are measured "
                "again"
            ) from error

    def __call__(self, config: DecodeConfig) -> float:
        """The seconds of a configuration."""
        key = repr(replace(config, steps=1))
        if key not in self.fits:
            self.fits[key] = self.measure(config)
            write_text(self.path, json.dumps(self.fits, indent=1) + "\n")
        offset, slope = self.fits[key]
        return offset + slope * config.steps


def _read(path: Path) -> bytes:
    """The bytes of a file; none if it does not exist."""
    if not os.path.lexists(path):
        return b""
    if not path.is_file():
        raise UsageError(f"{path.name} must be a file, got {path}, which is none")
    return path.read_bytes()


def _parse(data: bytes) -> Any:
    """JSON without what JSON does not have: NaN, infinities, and two values for one key."""

    def unique(pairs: list[tuple[str, Any]]) -> Record:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            key = next(key for key in keys if keys.count(key) > 1)
            raise UsageError(f"a key must have one value, got {key!r} several times")
        return found

    def refuse(constant: str) -> None:
        raise UsageError(f"numbers must be finite, got {constant}")

    text = data.decode("utf-8")
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _plain(value: Any) -> str:
    """One text per value: Python takes True, 1 and 1.0 for the same."""
    return json.dumps(value, sort_keys=True)


# What a record is: for each key a check, which raises a UsageError with the key's name.

Check = Callable[[Any, str], Any]


def _count(value: Any, name: str, *, minimum: int = 1) -> int:
    return whole_number(value, name, minimum=minimum, maximum=2**63 - 1)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise UsageError(f"{name} must be text on one line, got {value!r:.100}")
    return value


def _items(value: Any, name: str) -> Record:
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be an object with keys, got {value!r:.100}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{name} must be a list of one item or more, got {value!r:.100}")
    return value


def _table_of(value: Any, name: str, *, check: Check) -> None:
    for key, item in _items(value, name).items():
        check(item, f"{name}.{key}")


def _optional(value: Any, name: str) -> None:
    if value is not None:
        _text(value, name)


def _order(value: Any, name: str) -> None:
    if not isinstance(value, str):
        for item in _list(value, name):
            _count(item, name, minimum=0)


def _seeds(value: Any, name: str) -> None:
    for seed in _list(value, name):
        _count(seed, name, minimum=0)


def _fit(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UsageError(f"{name} must have an offset and a slope, got {value!r:.100}")
    offset, slope = value
    return (
        finite_number(offset, f"offset of {name}", minimum=0, maximum=1e9),
        finite_number(slope, f"slope of {name}", minimum=1e-9, maximum=1e9),
    )


def _likelihood(value: Any, name: str) -> None:
    """None, or how bits per dimension were computed and of which images."""
    if value is None:
        return
    settings = dict(_items(value, name))
    _count(settings.pop("images", None), f"{name}.images")
    _text(settings.pop("held_out", None), f"{name}.held_out")
    try:
        LikelihoodConfig(**settings)
    except (TypeError, UsageError) as error:
        raise UsageError(f"{name} must be settings of a likelihood: {error}") from error


FIELDS: dict[str, Check] = {
    "num_groups": _count,
    "overlap": partial(finite_number, minimum=0, maximum=1),
    "steps": _count,
    "order": _order,
    "grouping": check_grouping,
    "solver": _text,
    "guidance": finite_number,
    "nfe": _count,
    "tokens": _count,
    "flops": partial(_count, minimum=0),
    "seconds": partial(finite_number, minimum=0),
    "seconds_to_first_group": partial(finite_number, minimum=0),
    "metrics": _items,
    "checkpoint": _text,
    "reference": _text,
    "extractors": partial(_table_of, check=_text),
    "samples": _count,
    "seeds": _seeds,
    "batch_size": _count,
    "pairs": _count,
    "device": _text,
    "dtype": _text,
    "ckpt": _text,
    "data": _text,
    "reference_images": _count,
    "training": _optional,
    "floors": partial(_table_of, check=finite_number),
    "real": partial(_table_of, check=finite_number),
    "match": _optional,
    "likelihood": _likelihood,
    "processes": _count,
    "threads": _count,
    "versions": partial(_table_of, check=_text),
    "commit": _optional,
}


def _checked(record: Record, *, layout: Layout, solvers: Mapping[str, Solver]) -> Record:
    """A record whose values are of the types and in the ranges that `bench` writes."""
    older: Record = {
        "grouping": "equal",
        "likelihood": None,
        "training": None,
        "floors": {},
        "real": {},
    }
    record = older | record
    for name, check in FIELDS.items():
        if name not in record:
            raise UsageError(f"{name} must be given, got a line without it")
        check(record[name], name)
    if record["solver"] not in solvers:
        raise UsageError(f"solver must be among {', '.join(solvers)}, got {record['solver']!r}")
    if "torch" not in record["versions"]:
        raise UsageError("versions must hold torch, got none")
    for name, metric in record["metrics"].items():
        _check_metric(metric, f"metrics.{name}", len(record["seeds"]), several=name == "by_band")
    config = config_of(record, solvers)
    config.schedule(layout, order=decode_order(config.order, layout.coords))
    # As written: overlap 1 and 1.0 are the same setting.
    return record | {name: float(record[name]) for name in ("overlap", "guidance")}


def _check_metric(metric: Any, name: str, seeds: int, *, several: bool) -> None:
    """A value, or several, for each seed, and the mean and the standard deviation of these."""
    values = _list(_items(metric, name).get("values"), f"{name}.values")
    if len(values) != seeds:
        raise UsageError(f"{name}.values must be {seeds}, one for each seed, got {len(values)}")
    rows = [_numbers(value, f"{name}.values", several=several) for value in values]
    if len({len(row) for row in rows}) > 1:
        raise UsageError(f"{name}.values must have one length, got several")
    for key, expected in mean_std(values).items():
        if key == "values":
            continue
        if key not in metric:
            raise UsageError(f"{name}.{key} must be given, got none")
        if expected is None or metric[key] is None:
            agree = metric[key] is expected
        else:
            ours = _numbers(expected, name, several=several)
            theirs = _numbers(metric[key], f"{name}.{key}", several=several)
            agree = len(ours) == len(theirs) and all(map(_close, ours, theirs))
        if not agree:
            raise UsageError(
                f"{name}.{key} must be that of its values, {expected}, got {metric[key]!r:.100}"
            )


def _numbers(value: Any, name: str, *, several: bool) -> list[float]:
    return [finite_number(item, name) for item in (_list(value, name) if several else [value])]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)  # float64 sums in any order
