"""The settings of other systems have their scheduling matrices, as their own rules make them."""

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rolldiff import Heun, Patches, presets
from rolldiff.cli import config_dir
from rolldiff.errors import UsageError
from rolldiff.presets import diffusion_forcing, magi, rolling_diffusion, skyreels, srm


def matrix(config, tokens, num_known=0):
    """The scheduling matrix by token of a strip of so many, known ones left out."""
    schedule = config.schedule(Patches((num_known + tokens, 1)), num_known=num_known)
    group = schedule.group[num_known:] - int(num_known > 0)
    return schedule.matrix[:, group].numpy()


def pyramid(tokens, steps, scale):
    """Diffusion Forcing: the steps that are left, a row less each, of steps that wait their turn.

    Its code truncates `t U` in floating point; with `U = 1 / n` exact fractions truncate alike.
    """
    late = [math.floor(t * Fraction(scale).limit_denominator(100)) for t in range(tokens)]
    rows = range(steps + late[-1] + 1)
    left = [[min(max(steps + late[t] - m, 0), steps) for t in range(tokens)] for m in rows]
    return np.array(left) / steps


@pytest.mark.parametrize(
    ("tokens", "steps", "scale"),
    [(4, 10, 1), (5, 8, 3), (3, 4, 4), (6, 7, 0), (1, 5, 1), (6, 4, 1 / 2), (9, 5, 1 / 3)],
)
def test_diffusion_forcing(tokens, steps, scale):
    config = diffusion_forcing(horizon=tokens, sampling_timesteps=steps, uncertainty_scale=scale)
    np.testing.assert_array_equal(matrix(config, tokens), pyramid(tokens, steps, scale))


def test_the_truncation_of_diffusion_forcing_in_floating_point():
    """`int(t * U)` of its code is what exact fractions give, up to `U = 1 / 48`."""
    uneven = [
        n
        for n in range(1, 50)
        if [int(t * (1 / n)) for t in range(512)] != [t // n for t in range(512)]
    ]
    assert uneven == [49]


def counters(frames, steps, ar_step, block=1, ready=0):
    """SkyReels-V2: a counter per block, row by row, from the counters of the row before.

    A block whose predecessor has taken its last step counts on; another one lags behind it.
    """
    blocks, end = frames // block, steps + 1
    now = [end if g < ready // block else 0 for g in range(blocks)]
    rows = []
    while min(now) < steps:
        after = []
        for g, count in enumerate(now):
            free = g == 0 or now[g - 1] >= steps
            after.append(count + 1 if free else after[-1] - ar_step)
        now = [min(max(count, 0), end) for count in after]
        rows.append(np.repeat(now, block))
    return np.array(rows)


@pytest.mark.parametrize(
    ("frames", "steps", "settings"),
    [
        (25, 50, {"ar_step": 5, "causal_block_size": 5}),
        (6, 8, {"ar_step": 3}),
        (4, 5, {"ar_step": 5}),
        (4, 5, {"ar_step": 9}),
        (7, 6, {"ar_step": 0}),
        (6, 4, {"ar_step": 1, "causal_block_size": 2}),
        (8, 6, {"ar_step": 2, "causal_block_size": 2, "num_pre_ready": 4}),
    ],
)
def test_skyreels(frames, steps, settings):
    config = skyreels(num_latent_frames=frames, num_inference_steps=steps, **settings)
    ready = settings.get("num_pre_ready", 0)
    theirs = counters(
        frames, steps, settings["ar_step"], settings.get("causal_block_size", 1), ready
    )
    ours = matrix(config, frames - ready, ready)
    # A counter of 1 is the first timestep, which is noise; one beyond the last is a finished frame.
    done = np.maximum(theirs[:, ready:] - 1, 0)
    np.testing.assert_array_equal(ours[:-1], (steps - done) / steps)
    assert not ours[-1].any()


def sequential(variables, total, overlap, parallel=1):
    """Spatial Reasoning Models: every group counts down once, pasted where it starts."""
    groups = variables // parallel
    lag = 1 - Fraction(overlap).limit_denominator(100)
    ideal = total / ((groups - 1) * lag + 1)
    length = math.ceil(ideal)
    times = np.ones((total + 1, groups))
    for g in range(groups):
        start = math.floor(g * lag * ideal)
        times[start:, g] = 0
        times[start : start + length, g] = np.arange(length, 0, -1)[: total + 1 - start] / length
    times[-1] = 0
    return np.repeat(times, parallel, axis=1)


@pytest.mark.parametrize(
    ("variables", "total", "overlap", "parallel"),
    [
        (4, 64, 0, 1),
        (9, 20, 0.5, 1),
        (11, 20, 0.9, 1),
        (16, 38, 0.75, 1),
        (8, 25, 0.5, 2),
        (3, 7, 0, 3),
    ],
)
def test_spatial_reasoning(variables, total, overlap, parallel):
    config = srm(num_variables=variables, max_steps=total, overlap=overlap, num_parallel=parallel)
    theirs = sequential(variables, total, overlap, parallel)
    np.testing.assert_array_equal(matrix(config, variables), theirs)
    assert config.overlap == pytest.approx(overlap)


def test_uneven_starts_of_spatial_reasoning_are_refused_and_all_others_taken():
    taken = 0
    for groups in range(1, 7):
        for total in range(1, 25):
            for overlap in (0, 0.25, 0.5, 0.8):
                theirs = sequential(groups, total, overlap)
                moved = (theirs < 1).argmax(0) - 1
                gaps = set(np.diff(moved))
                settings = {"num_variables": groups, "max_steps": total, "overlap": overlap}
                if len(gaps) < 2 and 0 not in gaps:
                    np.testing.assert_array_equal(matrix(srm(**settings), groups), theirs)
                    taken += 1
                    continue
                with pytest.raises(UsageError, match="max_steps must let|overlap must leave"):
                    srm(**settings)
    assert taken > 80


def rolling(frames, window, steps):
    """Rolling Diffusion: its window fills, then slides; equations of the local time, sampled."""
    per_shift = steps // window
    w, everything = np.arange(window), frames + window - 1
    rows = []
    for t in np.arange(steps, 0, -1) / steps:  # the beginning
        rows.append(np.r_[np.clip(w / window + t, 0, 1), np.ones(everything - window)])
    for first in range(1, frames):  # the window after so many shifts
        for t in np.arange(per_shift, 0, -1) / per_shift:
            ahead = np.ones(everything - window - first)
            rows.append(np.r_[np.zeros(first), (w + t) / window, ahead])
    return np.array(rows)


@pytest.mark.parametrize(
    ("frames", "window", "steps"), [(6, 4, 8), (3, 5, 10), (5, 1, 4), (4, 8, 8)]
)
def test_rolling_diffusion(frames, window, steps):
    config = rolling_diffusion(num_frames=frames, window=window, steps=steps)
    theirs = rolling(frames, window, steps)
    ours = matrix(config, frames)
    np.testing.assert_allclose(ours[:-1], theirs[:, :frames], atol=1e-12)
    assert not ours[-1].any()
    # The end differs: as the last frame ends, theirs still holds frames that are partly noise.
    assert ((theirs[-1, frames:] > 0) & (theirs[-1, frames:] <= 1)).all()
    assert theirs.shape[1] - frames == window - 1


def stages(chunks, steps, window):
    """MAGI-1: which chunks a stage holds, and at which of their steps, the newest first."""
    per_stage = steps // window
    rows = []
    for stage in range(chunks + window - 1):
        inside = range(max(0, stage - window + 1), min(chunks, stage + 1))
        oldest = min(window, stage + 1)
        newest = max(0, stage - chunks + 1)
        ages = range(oldest - 1, newest - 1, -1)
        for j in range(per_stage):
            done = np.array([steps if c < inside.start else 0 for c in range(chunks)])
            done[inside.start : inside.stop] = [age * per_stage + j for age in ages]
            rows.append((steps - done) / steps)
    return np.array(rows)


@pytest.mark.parametrize(
    ("chunks", "steps", "window"), [(8, 16, 8), (8, 64, 4), (3, 8, 4), (8, 5, 1)]
)
def test_magi(chunks, steps, window):
    ours = matrix(magi(chunk_num=chunks, num_steps=steps, window_size=window), chunks)
    np.testing.assert_array_equal(ours[:-1], stages(chunks, steps, window))
    assert not ours[-1].any()


FORCING = {"horizon": 6, "sampling_timesteps": 8}
SKY = {"num_latent_frames": 6, "num_inference_steps": 8}
SRM = {"num_variables": 6, "max_steps": 12, "overlap": 0.0}


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        (diffusion_forcing, FORCING | {"uncertainty_scale": 1.5}, "whole number or 1 / n"),
        (diffusion_forcing, FORCING | {"uncertainty_scale": 0.25}, "divides horizon=6, got 0.25"),
        (diffusion_forcing, FORCING | {"uncertainty_scale": 2 / 3}, "whole number or 1 / n"),
        (diffusion_forcing, FORCING | {"uncertainty_scale": 9}, r"uncertainty_scale must be .* 8"),
        (skyreels, SKY | {"causal_block_size": 4}, "causal_block_size must divide num_latent_fra"),
        (skyreels, SKY | {"ar_step": -1}, "ar_step must be"),
        (skyreels, SKY | {"num_pre_ready": 6}, "num_pre_ready must be"),
        (
            skyreels,
            SKY | {"causal_block_size": 2, "num_pre_ready": 3},
            "whole blocks of causal_block_size=2, got 3",
        ),
        (srm, SRM | {"num_parallel": 4}, "num_parallel must divide num_variables=6, got 4"),
        (srm, SRM | {"max_steps": 16}, "6 groups start at even steps with overlap=0.0, such as 18"),
        (srm, SRM | {"overlap": 1.0}, "overlap must leave a step or more"),
        (
            rolling_diffusion,
            {"num_frames": 4, "window": 3, "steps": 8},
            "window must divide steps=8",
        ),
        (magi, {"chunk_num": 4, "num_steps": 10}, "window_size must divide num_steps=10, got 4"),
        (magi, {"chunk_num": 0, "num_steps": 8}, "chunk_num must be"),
        (
            magi,
            {"chunk_num": 4, "num_steps": 8, "overlap": 0.5},
            "overlap must be left to the pres",
        ),
    ],
)
def test_what_no_settings_express_is_refused(preset, settings, words):
    with pytest.raises(UsageError, match=words) as refused:
        preset(**settings)
    assert "\n" not in str(refused.value)


def test_other_settings_pass_through():
    config = magi(chunk_num=4, num_steps=8, order="bottom_to_top", solver=Heun(), guidance=1.5)
    assert (config.order, config.solver) == ("bottom_to_top", Heun())
    assert (config.num_groups, config.overlap, config.steps) == (4, 0.75, 8)


def test_a_refused_number_of_steps_names_one_that_is_taken():
    for total in range(6, 60):
        for overlap in (0.1, 0.5, 0.9):
            settings = SRM | {"overlap": overlap}
            try:
                srm(**settings | {"max_steps": total})
            except UsageError as refused:
                if "such as" in str(refused):
                    near = int(str(refused).split("such as ")[1].split(",")[0])
                    srm(**settings | {"max_steps": near})


def test_the_table_of_the_page_holds():
    page = (Path(__file__).parents[1] / "docs/schedules.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\w+)\((.*?)\)` \| (\d+, [\d., ]+) \|", page)
    assert {name for name, _, _ in rows} == set(presets.__all__)
    for name, arguments, numbers in rows:
        call = ast.parse(f"f({arguments})", mode="eval").body
        settings = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        config = getattr(presets, name)(**settings)
        found = config.num_groups, config.overlap, config.steps
        assert found == tuple(float(number) for number in numbers.split(", "))


@pytest.mark.parametrize(
    ("name", "overlap"),
    [
        ("diffusion_forcing", 15 / 16),
        ("magi", 0.75),
        ("rolling_diffusion", 0.75),
        ("skyreels", 11 / 16),
        ("srm", 0.0),
    ],
)
def test_the_command_line_takes_them(name, overlap):
    settings = [f"decode={name}", "num_groups=4", "steps=16", "solver=heun", "guidance=1.0"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("decode", settings)
    config = instantiate(cfg.decode, _convert_="all")
    assert (config.num_groups, config.overlap, config.steps) == (4, overlap, 16)
    assert (config.solver, config.guidance.scale) == (Heun(), 1)
