"""Corrupted inputs, and what the library does with each of them.

    python benchmarks/faults.py                             # all cases, one table
    python benchmarks/faults.py --kinds config --share 0.1  # some

Every case knows what is right: that it is refused, that it is accepted, or, where either may be,
how to see whether what was accepted is what the input says. A refusal is right if it is a
`UsageError` of one line. Cases are drawn from a seed.

To add a kind of input, write a function from a `Context` to cases, and a line in `KINDS`: here for
values in Python, in faults_files.py for files, in faults_runs.py for what a command is given.
"""

import argparse
import copy
import json
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_cases import (
    FAULTS,
    INF,
    NAN,
    OUTCOMES,
    Case,
    Context,
    changed_bytes,
    doubled,
    outcome,
    paths,
    removed,
    replaced,
    tiny,
    within,
)
from faults_files import pictures, results, tables
from faults_runs import command_lines, run_configs
from safetensors.torch import save_file

from rolldiff import (
    DCT,
    DDIM,
    ClassLabels,
    Cosine,
    DecodeConfig,
    Decoder,
    Euler,
    GroupSchedule,
    Guidance,
    Haar,
    Heun,
    LikelihoodConfig,
    Patches,
    Rectified,
    TokenGrid,
    TokenSequence,
    Training,
    Transformer,
    timesteps,
)
from rolldiff.device import named_device, named_dtype
from rolldiff.diffusion.process import PerSampleNoise
from rolldiff.editing import group_mask, invert, row_mask
from rolldiff.hub import read_checkpoint
from rolldiff.tokenizer import Encoder, Prior

# ---------------------------------------------------------------------------------------------
# Arguments of constructors and methods

# Values, each with the number that it stands for; None for what is no number.
VALUES: list[tuple[Any, Any]] = [
    *((n, n) for n in (0, 1, 2, 3, 7, -1, -(2**31), 2**31, 2**32, 10**10, 10**30, 10**400)),
    *((n, n) for n in (0.0, 0.5, 1.0, 1.5, 3.0, -0.5, 1e-30, 1e30, 1e300, -1e300)),
    *((kind(3), 3) for kind in (np.int64, np.uint8, np.int16, np.array, torch.tensor)),
    *((kind(0.5), 0.5) for kind in (np.float32, np.float64, np.float16, np.array, torch.tensor)),
    (np.int64(-1), -1),
    (torch.tensor(-1), -1),
    (torch.tensor(2.0), 2.0),
    (np.float64(2.0), 2.0),
    *((v, None) for v in (True, False, np.True_, torch.tensor(True), np.array(False))),
    *((v, None) for v in (NAN, INF, -INF, np.float32(NAN), torch.tensor(INF), np.float64(-INF))),
    *((v, None) for v in ("3", "0.5", "", "x", b"3", "euler", "nan", "None", "1e3")),
    *((v, None) for v in ([], [3], (3,), {3}, {}, {"a": 3}, [0.5], ["a"], [[1]], range(3))),
    *((v, None) for v in (np.array([3]), np.ones((2, 2)), torch.ones(2), np.array("3"))),
    *((v, None) for v in (1j, np.complex64(1), torch.tensor(1j), object(), int, len, ...)),
    (np.array([0.5]), None),
    (np.datetime64("2020-01-01"), None),
    (iter([3]), None),
    (slice(3), None),
    (torch.zeros(1, device="meta"), None),
    (None, None),
]


def is_whole(number: Any, low: int, high: float) -> bool:
    return isinstance(number, int) and low <= number <= high


def is_real(number: Any, low: float, high: float) -> bool:
    return number is not None and abs(number) < 1e308 and low <= number <= high


def arguments(context: Context) -> Iterator[Case]:
    """Every constructor and method, with values of every type."""
    decoder, layout, image = tiny(), Patches(8, channels=1, patch=2), torch.zeros(2, 1, 8, 8)
    prior = Prior(16, 12, num_classes=3, width=8, depth=1, heads=1)
    backbone = Transformer(layout, width=16, depth=1, heads=1)
    mask = torch.ones(8, 8, dtype=torch.bool)
    ask, cheap = {"steps": 1, "seed": 0}, {"method": "bound", "samples": 1}
    large = 2**16
    whole: dict[str, tuple[Callable[[Any], Any], int, float]] = {
        "DecodeConfig(num_groups)": (lambda v: DecodeConfig(num_groups=v), 1, INF),
        "DecodeConfig(steps)": (lambda v: DecodeConfig(steps=v), 1, 10_000),
        "GroupSchedule(num_tokens)": (lambda v: GroupSchedule(num_tokens=v), 1, INF),
        "GroupSchedule(num_groups)": (lambda v: GroupSchedule(num_tokens=9, num_groups=v), 1, 9),
        "GroupSchedule(steps)": (lambda v: GroupSchedule(num_tokens=9, steps=v), 1, 10_000),
        "GroupSchedule(num_known)": (lambda v: GroupSchedule(num_tokens=9, num_known=v), 0, 8),
        "Patches(image_size)": (lambda v: Patches((v, 8), channels=1), 1, 2**17),
        "Patches(channels)": (lambda v: Patches(4, channels=v), 1, 2**27 - 1),
        "Haar(channels)": (lambda v: Haar(4, channels=v), 1, INF),
        "Haar(levels)": (lambda v: Haar(8, levels=v), 1, 3),
        "Haar(patch)": (lambda v: Haar(84, levels=1, patch=v), 1, 7),
        "DCT(block)": (lambda v: DCT(84, block=v), 1, 7),
        "DCT(patch)": (lambda v: DCT(84, block=2, patch=v), 1, 7),
        "ClassLabels": (ClassLabels, 0, 2**24),
        "TokenGrid(height)": (lambda v: TokenGrid(v, 1, channels=2), 1, 2**20),
        "TokenGrid(width)": (lambda v: TokenGrid(1, v, channels=2), 1, 2**20),
        "TokenGrid(codebook_size)": (lambda v: TokenGrid(2, 2, codebook_size=v), 1, 2**24),
        "TokenGrid(channels)": (lambda v: TokenGrid(2, 2, channels=v), 1, 2**24),
        "TokenSequence(length)": (lambda v: TokenSequence(v, channels=2), 1, 2**20),
        "TokenSequence(ahead)": (lambda v: TokenSequence(2, channels=2, ahead=v), 0, 2**20),
        "TokenSequence(everywhere)": (
            lambda v: TokenSequence(3, channels=2, ahead=0, everywhere=v),
            0,
            3,
        ),
        "Transformer(depth)": (lambda v: Transformer(layout, width=16, heads=1, depth=v), 1, 1000),
        "Transformer(width)": (lambda v: Transformer(layout, width=v, heads=1), 4, 0),
        "Transformer(window)": (
            lambda v: Transformer(layout, width=16, heads=1, depth=1, window=v),
            1,
            2**20,
        ),
        "Encoder(width)": (lambda v: Encoder(8, width=v, depth=0), 1, large),
        "Encoder(depth)": (lambda v: Encoder(8, width=2, depth=v), 0, 500),
        "Encoder(in_channels)": (lambda v: Encoder(8, width=2, in_channels=v), 1, large),
        "Prior(num_tokens)": (lambda v: Prior(v, 4, width=3), 1, 2**20),
        "Prior(codebook_size)": (lambda v: Prior(4, v, width=3), 1, 2**24),
        "Prior(num_classes)": (lambda v: Prior(4, 4, width=3, num_classes=v), 0, 2**24),
        "PerSampleNoise(seed)": (lambda v: PerSampleNoise(v, 1), 0, 2**128 - 1),
        "PerSampleNoise(batch)": (lambda v: PerSampleNoise(0, v), 1, 2**20),
        "PerSampleNoise(start_index)": (
            lambda v: PerSampleNoise(0, 1, start_index=v),
            0,
            2**64 - 1,
        ),
        "Training(num_groups)": (lambda v: Training(num_groups=(1, v)), 1, INF),
        "decode(num_groups)": (lambda v: decoder.decode([0], num_groups=v, **ask), 1, 16),
        "decode(steps)": (lambda v: decoder.decode([0], steps=v, seed=0), 1, 7),
        "decode(num_images)": (lambda v: decoder.decode(num_images=v, **ask), 1, 2**20),
        "decode(start_index)": (
            lambda v: decoder.decode([0], start_index=v, **ask),
            0,
            2**64 - 1,
        ),
        "stream(frames)": (lambda v: decoder.stream([0], frames=v, steps=7), 1, 7),
        "generate(start_index)": (lambda v: prior.generate([0], start_index=v), 0, 2**64 - 1),
        "invert(iterations)": (lambda v: invert(decoder, image, iterations=v, steps=1), 1, 7),
        "likelihood(num_groups)": (
            lambda v: decoder.log_likelihood(image - 1, num_groups=v, **cheap),
            1,
            16,
        ),
        "likelihood(levels)": (
            lambda v: decoder.log_likelihood(image - 1, levels=v, **cheap),
            2,
            2**16,
        ),
        "LikelihoodConfig(samples)": (lambda v: LikelihoodConfig(samples=v), 1, 10_000),
        "LikelihoodConfig(probes)": (lambda v: LikelihoodConfig(probes=v), 1, 10_000),
        "group_mask(groups)": (lambda v: group_mask(decoder, [v], num_groups=4), 0, 3),
        "row_mask(start)": (lambda v: row_mask(image, v, 8), 0, 7),
        "row_mask(stop)": (lambda v: row_mask(image, 0, v), 1, 8),
    }
    # None stands for a default here.
    optional = {"PerSampleNoise(seed)", "decode(num_images)", "stream(frames)"}
    optional |= {"TokenSequence(ahead)"}
    optional |= {"Transformer(window)", "LikelihoodConfig(tolerance)", "LikelihoodConfig(t_min)"}
    for name, (call, low, high) in whole.items():
        for value, number in VALUES:
            accept = is_whole(number, low, high) or (value is None and name in optional)
            yield judged(f"{name}: {value!r}", call, value, accept)

    real: dict[str, tuple[Callable[[Any], Any], float, float]] = {
        "DecodeConfig(overlap)": (lambda v: DecodeConfig(overlap=v), 0, 1),
        "DecodeConfig(guidance)": (lambda v: DecodeConfig(guidance=v), -INF, INF),
        "Guidance(scale)": (Guidance, -INF, INF),
        "Guidance(ramp_from)": (lambda v: Guidance(1.0, ramp_from=v), -INF, INF),
        "Guidance(interval)": (lambda v: Guidance(1.0, interval=(0, v)), 0, 1),
        "DDIM(eta)": (DDIM, 0, 1),
        "Rectified(shift)": (Rectified, 1e-3, 1e3),
        "Cosine(shift)": (Cosine, 1e-3, 1e3),
        "Transformer(mlp_ratio)": (
            lambda v: Transformer(layout, width=16, heads=1, depth=1, mlp_ratio=v),
            1 / 16,
            64,
        ),
        "LogitNormal(mean)": (timesteps.LogitNormal, -INF, INF),
        "LogitNormal(std)": (lambda v: timesteps.LogitNormal(0.0, v), 1e-300, INF),
        "Training(overlap)": (lambda v: Training(overlap=(v,)), 0, 1),
        "Training(clean_context)": (lambda v: Training(clean_context=v), 0, 1),
        "Training(independent)": (lambda v: Training(independent=v), 0, 1),
        "Training(context_noise)": (lambda v: Training(context_noise=v), 0, 0.999),
        "decode(context_time)": (lambda v: decoder.decode([0], context_time=v, **ask), 0, 0.999),
        "Training(drop_cond)": (lambda v: Training(drop_cond=v), 0, 1),
        "Prior(drop_cond)": (lambda v: Prior(4, 4, width=3, drop_cond=v), 0, 1),
        "Prior(dropout)": (lambda v: Prior(4, 4, width=3, dropout=v), 0, 0.999),
        "generate(temperature)": (lambda v: prior.generate([0], temperature=v), 1e-300, INF),
        "generate(guidance)": (lambda v: prior.generate([0], guidance=v), -INF, INF),
        "decode(overlap)": (lambda v: decoder.decode([0], overlap=v, **ask), 0, 1),
        "likelihood(overlap)": (
            lambda v: decoder.log_likelihood(image - 1, overlap=v, num_groups=2, **cheap),
            0,
            1,
        ),
        "LikelihoodConfig(tolerance)": (lambda v: LikelihoodConfig(tolerance=v), 1e-9, INF),
        "LikelihoodConfig(t_min)": (lambda v: LikelihoodConfig(t_min=v), 1e-6, 0.5),
    }
    for name, (call, low, high) in real.items():
        for value, number in VALUES:
            accept = is_real(number, low, high) or (value is None and name in optional)
            yield judged(f"{name}: {value!r}", call, value, accept)

    # Nothing in the list is right for these, but for what is named.
    never: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
        "decode(cache)": (lambda v: decoder.decode([0], cache=v, **ask), is_boolean),
        "stream(preview)": (lambda v: decoder.stream([0], preview=v, **ask), is_boolean),
        "Transformer(causal)": (
            lambda v: Transformer(layout, width=16, heads=1, depth=1, causal=v),
            is_boolean,
        ),
        "decode(config)": (lambda v: decoder.decode([0], v, steps=1), is_none),
        "decode(dtype)": (lambda v: decoder.decode([0], dtype=v, **ask), is_none),
        "decode(order)": (lambda v: decoder.decode([0], order=v, **ask), is_nothing),
        "decode(grouping)": (lambda v: decoder.decode([0], grouping=v, **ask), is_text("equal")),
        "decode(solver)": (lambda v: decoder.decode([0], solver=v, **ask), is_nothing),
        "decode(noise)": (lambda v: decoder.decode(noise=v, **ask), is_none),
        "decode(image)": (lambda v: decoder.decode(image=v, mask=mask, **ask), is_nothing),
        "decode(mask)": (lambda v: decoder.decode(image=image, mask=v, **ask), is_nothing),
        "likelihood(image)": (decoder.log_likelihood, is_nothing),
        "LikelihoodConfig(method)": (lambda v: LikelihoodConfig(method=v), is_nothing),
        "LikelihoodConfig(dequantization)": (
            lambda v: LikelihoodConfig(dequantization=v),
            is_none,
        ),
        "encode(image)": (decoder.encode, is_nothing),
        "loss(image)": (decoder.loss, is_nothing),
        "loss(generator)": (lambda v: decoder.loss(image, generator=v), is_none),
        "prior.loss(codes)": (prior.loss, is_nothing),
        "Decoder(layout)": (lambda v: Decoder(v, backbone), is_nothing),
        "Decoder(backbone)": (lambda v: Decoder(layout, v), is_nothing),
        "Decoder(noise)": (lambda v: Decoder(layout, backbone, noise=v), is_nothing),
        "Decoder(prediction)": (lambda v: Decoder(layout, backbone, prediction=v), is_text("x")),
        "Decoder(loss_space)": (lambda v: Decoder(layout, backbone, loss_space=v), is_text("x")),
        "Decoder(training)": (lambda v: Decoder(layout, backbone, training=v), is_nothing),
        "Transformer(layout)": (Transformer, is_nothing),
        "Transformer(condition)": (
            lambda v: Transformer(layout, width=16, heads=1, depth=1, condition=v),
            lambda v: v is None or v == {} if isinstance(v, dict | None) else False,
        ),
        "Training(num_groups)": (lambda v: Training(num_groups=v), is_numbers),
        "Training(orders)": (lambda v: Training(orders=v), is_nothing),
        "Training(grouping)": (lambda v: Training(grouping=v), is_text("equal")),
        "Training(density)": (lambda v: Training(density=v), is_nothing),
        "from_pretrained": (Decoder.from_pretrained, is_nothing),
        "read_checkpoint": (lambda v: read_checkpoint(v, Decoder), is_nothing),
        "from_config": (Decoder.from_config, is_nothing),
        "save_pretrained": (decoder.save_pretrained, is_nothing),
        "named_device": (named_device, is_none),
        "named_dtype": (named_dtype, is_none),
    }
    for name, (call, accept) in never.items():
        for value, _ in VALUES:
            if "pretrained" in name and isinstance(value, str) and value:
                continue  # a name, of a folder or on the Hub
            yield judged(f"{name}: {value!r}", call, value, accept(value))
    for name in ("num_group", "step", "seeds", "images", "x", "num_images ", "Solver"):
        yield Case(f"decode({name}=1)", lambda n=name: decoder.decode([0], **{n: 1}))
        yield Case(f"stream({name}=1)", lambda n=name: decoder.stream([0], **{n: 1}))


def judged(name: str, call: Callable[[Any], Any], value: Any, accept: bool) -> Case:
    return Case(name[:100], lambda: call(value), "accept" if accept else "refuse")


def is_nothing(value: Any) -> bool:
    return False


def is_none(value: Any) -> bool:
    return value is None


def is_boolean(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(value, bool) or str(dtype) in ("bool", "torch.bool")


def is_text(*texts: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in texts


def is_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind == "i"
    return isinstance(value, list | tuple) and value in ([3], (3,))


# ---------------------------------------------------------------------------------------------
# config.json

JSON: list[Any] = [None, True, False, 0, 1, 2, 3, -1, 0.5, 1.5, 2.0, 1e30, 10**9, 10**30]
JSON += ["", "x", "3", "os.system", "${oc.env:HOME}", [], [1], [1, 2], [[]], ["x"], {}, {"x": 1}]
JSON += [
    {"_target_": "os.system", "command": "true"},
    {"_target_": "builtins.open", "file": "ran", "mode": "w"},
    {"_target_": "rolldiff.hub.Path", "x": 1},
    {"_target_": "rolldiff.evaluation.networks.Inception"},
    {"_target_": "rolldiff.Patches", "image_size": 8, "channels": 1, "patch": 2},
    {"_target_": "rolldiff.Rectified"},
    {"_target_": "rolldiff.Cosine", "shift": 2},
    {"_target_": "rolldiff.timesteps.Uniform"},
    {"_target_": "rolldiff.timesteps.LogitNormal", "std": 2},
    {"_target_": "rolldiff.ClassLabels", "num_classes": 3},
    {"_target_": "rolldiff.Euler"},
    {"_target_": "rolldiff.Decoder"},
    {"_target_": "rolldiff.tokenizer.Prior", "num_tokens": 2**19, "codebook_size": 2**20},
]


def config(context: Context) -> Iterator[Case]:
    """Values and names in config.json, and its text."""
    models: list[tuple[Any, Any]] = [
        (tiny(), Decoder),
        (tiny(num_classes=0, condition={"a": TokenGrid(2, 2, channels=2)}), Decoder),
        (Prior(4, 5, num_classes=2, width=6, depth=1, heads=2), Prior),
    ]
    for model, cls in models:
        saved = context.path()
        model.save_pretrained(saved)
        text = (saved / "config.json").read_text()
        described = json.loads(text)

        def case(
            name: str, text: str, *, saved: Path = saved, cls: Any = cls, model: Any = model
        ) -> Case:
            def run() -> Any:
                folder = context.path()
                try:
                    shutil.copy(saved / "model.safetensors", folder)
                    (folder / "config.json").write_text(text, encoding="utf-8")
                    return cls.from_pretrained(folder)
                finally:
                    shutil.rmtree(folder)

            return Case(f"{cls.__name__}: {name}"[:160], run, "either", check=says(text, model))

        for path in paths(described):
            for value in JSON:
                changed = replaced(described, path, value)
                yield case(f"{'.'.join(map(str, path))} = {value!r}", json.dumps(changed))
            for change in (removed, doubled):
                yield case(
                    f"{change.__name__} {'.'.join(map(str, path))}",
                    json.dumps(change(described, path)),
                )
        for constant in ("NaN", "Infinity", "-Infinity", "1e999", "01", "'x'", "9" * 5000):
            for path in paths(described):
                marked = json.dumps(replaced(described, path, "MARK"))
                wrong = marked.replace('"MARK"', constant, 1)
                if not path or constant != "9" * 5000 or len(path) == 1:
                    yield case(f"{'.'.join(map(str, path))} = {constant[:9]}", wrong)
        for _ in range(60):
            place = context.random.randrange(len(text))
            yield case(f"cut at {place}", text[:place])
            other = chr(context.random.randrange(32, 127))
            yield case(f"{other} at {place}", text[:place] + other + text[place + 1 :])
            yield case(f"without {place}", text[:place] + text[place + 1 :])
        for wrong in ("", "null", "[]", "1", "\ufeff" + text, text * 2, "[" * 10**5, "{" * 10**5):
            yield case(f"text {wrong[:8]!r}", wrong)


def says(text: str, model: Any) -> Callable[[Any], bool]:
    """Whether what was loaded is what the text says, with the weights that were saved."""

    def check(loaded: Any) -> bool:
        def finite(constant: str) -> Any:
            raise ValueError(constant)

        pairs: list[list[Any]] = []

        def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in items]
            if len(set(names)) != len(names):
                pairs.append(names)
            return dict(items)

        expected = json.loads(text, parse_constant=finite, object_pairs_hook=once)
        weights, before = loaded.state_dict(), model.state_dict()
        same = weights.keys() == before.keys() and all(
            torch.equal(weights[name], before[name]) for name in weights
        )
        found = json.loads(json.dumps(loaded.to_config()))
        return same and not pairs and within(expected, found)

    return check


# ---------------------------------------------------------------------------------------------
# Weights

KINDS_OF_NUMBERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)


def changed_weights(
    state: dict[str, torch.Tensor], random: random.Random
) -> Iterator[tuple[str, dict[str, torch.Tensor], str]]:
    """Weights that must be refused or accepted: a name, the weights, and which."""
    names = sorted(state)
    for name in names:
        value = state[name]
        for dtype in KINDS_OF_NUMBERS:
            yield f"{name} of {dtype}", state | {name: value.to(dtype)}, "refuse"
        yield f"{name} of another float", state | {name: value.half()}, "refuse"
        for number in (NAN, INF, -INF):
            wrong = value.clone()
            wrong.view(-1)[random.randrange(wrong.numel())] = number
            yield f"{number} in {name}", state | {name: wrong}, "refuse"
        yield f"without {name}", {n: v for n, v in state.items() if n != name}, "refuse"
        renamed = {f"{n}x" if n == name else n: v for n, v in state.items()}
        yield f"{name} renamed", renamed, "refuse"
        longer = torch.cat([value.flatten(), torch.zeros(1)])
        for shape in (value[None], value.flatten()[:-1], longer, value.new_zeros(0)):
            yield f"{name} of {tuple(shape.shape)}", state | {name: shape}, "refuse"
        if value.ndim == 2 and value.shape[0] != value.shape[1]:
            yield f"{name} transposed", state | {name: value.t().contiguous()}, "refuse"
    for dtype in KINDS_OF_NUMBERS:
        yield f"all of {dtype}", {n: v.to(dtype) for n, v in state.items()}, "refuse"
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield f"all of {dtype}", {n: v.to(dtype) for n, v in state.items()}, "accept"
    yield "large", {n: v.double() * 1e300 for n, v in state.items()}, "refuse"
    yield "one more", state | {"more": torch.ones(2)}, "refuse"
    yield "none", {}, "refuse"


def equal_to(state: dict[str, torch.Tensor]) -> Callable[[Any], bool]:
    def check(loaded: Any) -> bool:
        found = loaded.state_dict()
        return found.keys() == state.keys() and all(
            torch.equal(found[name], state[name].float()) for name in state
        )

    return check


def safetensors(context: Context) -> Iterator[Case]:
    """model.safetensors: what it holds, and its bytes."""
    model = tiny()
    saved = context.path()
    model.save_pretrained(saved)
    whole = (saved / "model.safetensors").read_bytes()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}

    def case(name: str, write: Callable[[Path], Any], right: str, check: Any) -> Case:
        def run() -> Any:
            folder = context.path()
            try:
                shutil.copy(saved / "config.json", folder)
                write(folder / "model.safetensors")
                return Decoder.from_pretrained(folder)
            finally:
                shutil.rmtree(folder)

        return Case(f"safetensors: {name}", run, right, check)

    for name, wrong, right in changed_weights(state, context.random):
        yield case(name, lambda p, w=wrong: save_file(w, p), right, equal_to(wrong))
    for name, damaged in changed_bytes(whole, context.random, 120):
        yield case(name, lambda p, d=damaged: p.write_bytes(d), "either", equal_to(state))
    yield case("a folder", lambda p: p.mkdir(), "refuse", None)
    yield case("nothing", lambda p: None, "refuse", None)
    yield case("a link to nothing", lambda p: p.symlink_to(p.parent / "x"), "refuse", None)
    yield case("a link to itself", lambda p: p.symlink_to(p), "refuse", None)


class Call:
    """An object that calls something when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def checkpoint(context: Context) -> Iterator[Case]:
    """Lightning checkpoints: what they hold, and their bytes."""
    model = tiny()
    described = model.to_config()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}

    def content(weights: Any = state, config: Any = described) -> dict[str, Any]:
        return {
            "state_dict": {f"model.{name}": value for name, value in weights.items()},
            "hyper_parameters": {"model": config},
            "epoch": 1,
        }

    def case(name: str, write: Callable[[Path], Any], right: str, check: Any) -> Case:
        def run() -> Any:
            folder = context.path()
            try:
                write(folder / "a.ckpt")
                return read_checkpoint(folder / "a.ckpt", Decoder)
            finally:
                shutil.rmtree(folder)

        return Case(f"checkpoint: {name}"[:160], run, right, check)

    def saved(name: str, value: Any, right: str = "refuse", check: Any = None) -> Case:
        return case(name, lambda p: torch.save(value, p), right, check)

    for name, wrong, right in changed_weights(state, context.random):
        yield saved(name, content(wrong), right, equal_to(wrong))
    whole = context.path() / "a.ckpt"
    torch.save(content(), whole)
    for name, damaged in changed_bytes(whole.read_bytes(), context.random, 120):
        yield case(name, lambda p, d=damaged: p.write_bytes(d), "either", equal_to(state))
    for path in paths(content()):
        if path[0] != "epoch":
            place = ".".join(map(str, path))
            for value in (None, 3, "x", [], {}, torch.ones(2), NAN, {"a": torch.ones(2)}):
                wrong = replaced(content(), path, value)
                yield saved(f"{place} = {value!r}", wrong, "either", contains(wrong, state))
            wrong = removed(content(), path)
            yield saved(f"without {place}", wrong, "either", contains(wrong, state))
    for value in (None, [], {}, 3, "x", torch.ones(3), state, described, [content()]):
        yield saved(f"only {type(value).__name__}", value)
    cyclic = copy.deepcopy(described)
    cyclic["training"]["orders"] = [cyclic, cyclic]
    yield saved("a configuration that holds itself", content(config=cyclic))
    sparse = {name: value.to_sparse() for name, value in state.items()}
    yield saved("sparse weights", content(sparse))
    for call in (Call(eval, "1"), Call(open, "ran", "w"), Call(shutil.rmtree, "nowhere")):
        for path in (("epoch",), ("state_dict",), ("hyper_parameters", "model")):
            yield saved(f"{call.call.__name__} as {path[-1]}", replaced(content(), path, call))
        yield case("a pickle", lambda p, c=call: p.write_bytes(pickle.dumps(c)), "refuse", None)


def contains(saved: Any, state: dict[str, torch.Tensor]) -> Callable[[Any], bool]:
    """Whether the module of a checkpoint is what it describes, with all its weights."""

    def check(loaded: Any) -> bool:
        described = saved["hyper_parameters"]["model"]
        return equal_to(state)(loaded) and within(described, loaded.to_config())

    return check


# ---------------------------------------------------------------------------------------------
# Conditions and images

Later = type(lambda: None)  # makes a condition when it is needed, because an iterator ends


def conditions(context: Context) -> Iterator[Case]:
    """What is passed as a condition, at once or piece by piece, in other shapes and types."""
    specs: dict[str, Any] = {
        "labels": (ClassLabels(3), torch.tensor([0, 2])),
        "codes": (TokenGrid(2, 2, codebook_size=5), torch.tensor([[[0, 4], [1, 2]]] * 2)),
        "latents": (TokenGrid(2, 2, channels=3), torch.ones(2, 2, 2, 3)),
        "text": (TokenSequence(4, channels=3), torch.ones(2, 4, 3)),
        "words": (TokenSequence(4, codebook_size=5, ahead=0), torch.tensor([[0, 4, 1, 2]] * 2)),
    }
    for kind, (spec, value) in specs.items():
        decoder = tiny(num_classes=0, condition=spec)
        several = tiny(num_classes=0, condition={"a": spec, "b": ClassLabels(2)})
        discrete = not value.is_floating_point()
        short_is_fine = isinstance(spec, TokenSequence)

        def case(
            name: str,
            cond: Any,
            right: str = "refuse",
            *,
            kind: str = kind,
            decoder: Decoder = decoder,
            **more: Any,
        ) -> Case:
            ask = {"num_images": 2, "steps": 1, "seed": 0} | more
            return Case(
                f"{kind}: {name}",
                lambda: decoder.decode(cond() if isinstance(cond, Later) else cond, **ask),
                right,
                lambda output: bool(output.image.isfinite().all()) and len(output.image) == 2,
            )

        def both(
            name: str,
            cond: Any,
            right: str = "refuse",
            *,
            case: Callable[..., Case] = case,
            kind: str = kind,
            decoder: Decoder = decoder,
            several: Decoder = several,
        ) -> Iterator[Case]:
            """A decoding, one of two conditions, and a training step."""
            yield case(name, cond, right)
            yield case(f"{name}, one of two", {"a": cond}, right, decoder=several)
            yield Case(
                f"{kind}: loss, {name}",
                lambda: decoder.loss(torch.zeros(2, 1, 8, 8), cond),
                right,
                lambda loss: bool(loss.isfinite()),
            )

        for form, same in (
            ("as it is", value),
            ("an array", value.numpy()),
            ("lists", value.tolist()),
            ("a tuple", tuple(value)),
            ("not contiguous", value.movedim(0, -1).contiguous().movedim(-1, 0)),
        ):
            accept = "accept" if form != "a tuple" or value.ndim == 1 else "either"
            yield from both(form, same, accept)
        dtypes = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
        for dtype in (*dtypes, torch.uint64):
            yield from both(str(dtype), value.to(dtype), "accept" if discrete else "refuse")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            yield from both(str(dtype), value.to(dtype), "refuse" if discrete else "accept")
        for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn):
            yield from both(str(dtype), value.to(dtype))
        for axis in range(value.ndim):
            size = value.shape[axis]
            for start, stop in ((0, 0), (0, size - 1), (1, size)):
                fewer = value.narrow(axis, start, stop - start)
                fine = short_is_fine and axis == 1 and stop - start > 0
                yield from both(
                    f"axis {axis} cut to {stop - start}", fewer, "accept" if fine else "refuse"
                )
            yield from both(f"axis {axis} longer", torch.cat([value, value], axis))
            yield from both(
                f"axis {axis} inserted",
                value.unsqueeze(axis).expand(*value.shape[:axis], 2, *value.shape[axis:]),
            )
            picked = value.select(axis, 0)
            lone = kind == "labels"  # one label for all
            yield from both(f"axis {axis} dropped", picked, "accept" if lone else "refuse")
        for place in range(6):
            index = context.random.randrange(value.numel())
            wrongs = (-1, 5 if kind != "labels" else 3, 2**40, -(2**40))
            for number in wrongs if discrete else (NAN, INF, -INF):
                wrong = value.clone()
                wrong.view(-1)[index] = number
                yield from both(f"{number} at {index} ({place})", wrong)
        yield from both("sparse", value.to_sparse())
        yield from both("meta", value.to("meta"))
        for wrong in (
            "cat",
            "",
            b"x",
            {1, 2},
            object(),
            int,
            ["a", "b"],
            [None, None],
            [[1], [1, 2]],
        ):
            yield from both(repr(wrong)[:30], wrong)
        yield from both("booleans", [True, False] if kind == "labels" else [[True] * 4] * 2)
        yield case("another name", {"colour": value})
        yield case("its name", {"cond": value}, "accept")
        yield case("nothing", None, "accept")
        yield case("no number of images", lambda v=value: iter([v]), num_images=None)
        for count in (0, 1, 3, -1, 2.0, True, "2", 10**10):
            right = "accept" if kind == "nothing" else "refuse"
            yield case(f"num_images={count!r}", value, right, num_images=count)
        if kind == "labels":
            yield case("an iterator", lambda v=value: iter([v]))
            for one in (1, np.int64(1), torch.tensor(1), np.array(1)):
                yield case(f"{one!r} for all", one, "accept")
            for one in (1.5, True, "1", NAN, 3, -1, 10**30, 1j):
                yield case(f"{one!r} for all", one)
            continue
        flat = value.flatten(1, -1 if discrete else -2)
        pieces: dict[str, tuple[Callable[[], Any], str]] = {
            "one by one": (lambda f=flat: iter(f.split(1, 1)), "accept"),
            "three and one": (lambda f=flat: iter(f.split(3, 1)), "accept"),
            "arrays": (lambda f=flat: iter([f.numpy()]), "accept"),
            "no pieces": (lambda: iter([]), "refuse"),
            "None": (lambda: iter([None]), "refuse"),
            "text": (lambda: iter("abcd"), "refuse"),
            "numbers": (lambda: iter([1, 2, 3, 4]), "refuse"),
            "an empty piece": (lambda f=flat: iter([f[:, :0]]), "refuse"),
            "too many": (lambda f=flat: iter([torch.cat([f, f], 1)]), "refuse"),
            "another batch": (lambda f=flat: iter(f[:1].split(1, 1)), "refuse"),
            "without axis": (lambda f=flat: iter(f.unbind(1)), "refuse"),
            "booleans": (lambda f=flat: iter([f.bool()]), "refuse"),
            "sparse": (lambda f=flat: iter([f.to_sparse()]), "refuse"),
        }
        if kind != "text":
            pieces["ends early"] = (lambda f=flat: iter([f[:, :1]]), "refuse")
        bad = flat.clone()
        bad.view(-1)[-1] = 9 if discrete else NAN
        pieces["a bad number at the end"] = (lambda b=bad: iter(b.split(1, 1)), "refuse")
        for name, (make, right) in pieces.items():
            yield case(f"in pieces, {name}", make, right)


def images(context: Context) -> Iterator[Case]:
    """Images, masks and noise as tensors."""
    decoder = tiny()
    good = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    ask = {"steps": 1, "seed": 0, "num_groups": 2}
    density = {"method": "bound", "samples": 1, "dequantization": None}
    uses: dict[str, Callable[[Any], Any]] = {
        "loss": decoder.loss,
        "decode(image)": lambda x: decoder.decode(image=x, mask=mask, **ask).image,
        "decode(noise)": lambda x: decoder.decode(noise=x, **ask).image,
        "invert": lambda x: invert(decoder, x, iterations=1, steps=1),
        "likelihood": lambda x: decoder.log_likelihood(x, **density),
        "encode": lambda x: decoder.encode(x, steps=1),
        "Patches.tokens": decoder.layout.tokens,
        "row_mask": lambda x: row_mask(x, 2, 4),
    }
    variants: list[tuple[str, Any, set[str]]] = [("as it is", good, set(uses))]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        variants.append((str(dtype), good.to(dtype), set(uses)))
    for dtype in (*KINDS_OF_NUMBERS, torch.uint16):
        variants.append((str(dtype), good.to(dtype), set()))
    anything = {"Patches.tokens", "row_mask"}
    for number in (NAN, INF, -INF):
        for _ in range(4):
            wrong = good.clone()
            index = context.random.randrange(wrong.numel())
            wrong.view(-1)[index] = number
            variants.append((f"{number} at {index}", wrong, anything))
    variants.append(("1e300", good.double() + 1e300, anything))
    unbounded = set(uses) - {"loss", "likelihood"}
    for factor in (2, 255, 1e6):
        variants.append((f"times {factor}", good * factor, unbounded))
    for shape in (
        *((2, 8, 8), (1, 8, 8), (8, 8), (64,), (), (2, 1, 8), (2, 1, 8, 8, 1), (0, 1, 8, 8)),
        *((2, 3, 8, 8), (2, 8, 8, 1), (2, 1, 8, 7), (2, 1, 16, 8), (2, 1, 0, 8), (2, 0, 8, 8)),
    ):
        fine = set()
        if len(shape) == 4 and shape[2] >= 4:
            fine = {"row_mask"}
        if shape == (0, 1, 8, 8):
            fine = anything
        variants.append((f"of shape {shape}", torch.zeros(shape), fine))
    for name, other in (
        ("an array", good.numpy()),
        ("lists", good.tolist()),
        ("sparse", good.to_sparse()),
        ("meta", good.to("meta")),
        ("nested", torch.nested.nested_tensor([good[0], good[1]], layout=torch.jagged)),
        ("text", "image.png"),
        ("None", ...),
        ("a number", 3),
    ):
        variants.append((name, other, set()))
    for name, value, fine in variants:
        for use, call in uses.items():
            yield judged(f"{use}: {name}", call, value, use in fine)
    for name, other in (
        ("floats", mask.float()),
        ("numbers", mask.int()),
        ("of one row less", mask[1:]),
        ("of one image", mask[None]),
        ("of no pixel", mask & False),
        ("an array", mask.numpy()),
        ("lists", mask.tolist()),
        ("sparse", mask.to_sparse()),
        ("meta", mask.to("meta")),
        ("None", None),
        ("text", "mask"),
    ):
        yield Case(
            f"mask: {name}", lambda m=other: decoder.decode(image=good, mask=m, **ask), "refuse"
        )
    yield Case("a mask alone", lambda: decoder.decode(mask=mask, **ask))
    for count in (1, 3, 2.0, "2"):
        for given in ({"noise": good}, {"image": good, "mask": mask}):
            yield Case(
                f"{', '.join(given)} with num_images={count!r}",
                lambda c=count, g=given: decoder.decode(num_images=c, **g, **ask),
            )
    for solver in (Euler(), Heun(), DDIM()):
        yield Case(
            f"noise and {solver}",
            lambda s=solver: decoder.decode(noise=good, solver=s, **ask).image,
            "accept",
            lambda image: bool(image.isfinite().all()),
        )


KINDS: dict[str, Callable[[Context], Iterator[Case]]] = {
    "arguments": arguments,
    "config": config,
    "safetensors": safetensors,
    "checkpoint": checkpoint,
    "conditions": conditions,
    "images": images,
    "pictures": pictures,
    "tables": tables,
    "results": results,
    "run_configs": run_configs,
    "command_lines": command_lines,
}


def run(
    kinds: list[str], *, share: float = 1.0, seed: int = 0
) -> tuple[dict[str, Counter[str]], list[str]]:
    """What happened: counts by kind and outcome, and a line for every fault.

    Args:
        kinds: names in `KINDS`.
        share: of the cases, drawn from the seed.
        seed: of all choices.
    """
    counts: dict[str, Counter[str]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            chosen = random.Random(f"{seed} {kind}")
            context = Context(random.Random(f"{kind} {seed}"), Path(folder) / kind)
            context.folder.mkdir()
            counts[kind] = Counter()
            for case in KINDS[kind](context):
                if chosen.random() >= share:
                    continue
                found, words = outcome(case)
                counts[kind][found] += 1
                if found in FAULTS:
                    faults.append(f"{found}: {kind}: {case.name}: {' '.join(words.split())[:200]}")
    return counts, faults


def table(counts: dict[str, Counter[str]]) -> str:
    """Counts in Markdown."""
    lines = [f"| inputs | tried | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * (1 + len(OUTCOMES))}"]
    for kind, found in counts.items():
        numbers = " | ".join(str(found[name]) for name in OUTCOMES)
        lines.append(f"| {kind} | {found.total()} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts, faults = run(arguments.kinds, share=arguments.share, seed=arguments.seed)
    print(table(counts))
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
