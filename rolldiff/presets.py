"""The schedules of other systems, by the names of their own arguments, as a `DecodeConfig`.

Each function returns the settings whose scheduling matrix, see `rolldiff.diffusion.schedule`, has
the noise levels of the other system: the same groups move at the same steps by the same amounts of
local time. Where the systems write rows differently, each function says how. A shift or another
warp of the time comes after the matrix, there as here, and belongs to the noise schedule, as in
`Rectified(shift=...)`. Only schedules are translated: the systems also differ in networks,
attention and solvers.

A setting that no stagger of whole steps expresses is refused.
"""

from fractions import Fraction
from typing import Any

from rolldiff.decoder import DecodeConfig
from rolldiff.errors import UsageError, finite_number, whole_number

__all__ = ["diffusion_forcing", "magi", "rolling_diffusion", "skyreels", "srm"]


def diffusion_forcing(
    *, horizon: int, sampling_timesteps: int, uncertainty_scale: float | int = 1, **settings: Any
) -> DecodeConfig:
    """The pyramid of Diffusion Forcing: `k = uncertainty_scale`.

    Its noise levels, in 0 … K, are `clip(K + int(t U) - m, 0, K)` in row `m` for token `t`, which
    are `K` times the local times here: `S = K` and a group per token. A scale `U = 1 / n` moves `n`
    tokens at once and is a group of `n` tokens with `k = 1` (in exact fractions; its code truncates
    in floating point, where 49 times 1 / 49 is below 1). Its other matrices are `U = 0`
    (`full_sequence`) and `U = K` (`autoregressive`). The rows are the same, `R + 1` of them.

    Args:
        horizon: `H`, tokens, of which each is a frame or a stack of frames.
        sampling_timesteps: `K`, steps of a token.
        uncertainty_scale: `U`: 0, a whole number of steps up to `K`, or `1 / n` with an `n` that
            divides `H`.
        **settings: others of `DecodeConfig`.

    Raises:
        UsageError: if an argument is out of range.

    Source: Chen et al. 2024 (2407.01392), section 3.3;
    `_generate_pyramid_scheduling_matrix` of the authors' code.
    """
    horizon = whole_number(horizon, "horizon")
    steps = whole_number(sampling_timesteps, "sampling_timesteps")
    scale = _fraction(uncertainty_scale, "uncertainty_scale", maximum=steps)
    tokens = scale.denominator
    if 1 not in (scale.numerator, tokens) or horizon % tokens:
        raise UsageError(
            "uncertainty_scale must be a whole number or 1 / n with an n that divides horizon="
            f"{horizon}, got {uncertainty_scale}"
        )
    return _config(horizon // tokens, steps, scale.numerator, settings)


def skyreels(
    *,
    num_latent_frames: int,
    num_inference_steps: int,
    ar_step: int = 0,
    causal_block_size: int = 1,
    num_pre_ready: int = 0,
    **settings: Any,
) -> DecodeConfig:
    """The timestep matrix of SkyReels-V2: `k = ar_step`, a group per causal block.

    Its counters `c` are one ahead: block `g` has `c = clip(i + 1 - g k, 0, S + 1)` in row `i` and
    is evaluated there at timestep `c` of `S`, so that it has taken `max(c - 1, 0)` steps, as in row
    `i` here. The last row here, in which all are finished, is not written there. A block starts at
    the latest when the one before it is finished, so more than `S` is `S`. The number of frames
    that its network sees at once (`base_num_frames`) does not change the matrix.

    Args:
        num_latent_frames: frames of the latents, `(num_frames - 1) / 4 + 1` of the video.
        num_inference_steps: `S`, steps of a block.
        ar_step: steps between the starts of blocks; 0 moves all together.
        causal_block_size: frames of a block, of which there is a whole number.
        num_pre_ready: frames of a prefix, whole blocks too. They have no group; pass them as the
            known part of an image, to `decode(image=..., mask=...)`.
        **settings: others of `DecodeConfig`.

    Raises:
        UsageError: if an argument is out of range.

    Source: Chen et al. 2025 (2504.13074); `generate_timestep_matrix` of its pipeline
    in diffusers. AR-Diffusion, Sun et al. 2025 (2503.07418), has the same `ar_step`.
    """
    frames = whole_number(num_latent_frames, "num_latent_frames")
    steps = whole_number(num_inference_steps, "num_inference_steps")
    stagger = whole_number(ar_step, "ar_step", minimum=0)
    size = _divisor(causal_block_size, "causal_block_size", of=frames, name="num_latent_frames")
    ready = whole_number(num_pre_ready, "num_pre_ready", minimum=0, maximum=frames - size)
    if ready % size:
        raise UsageError(
            f"num_pre_ready must be whole blocks of causal_block_size={size}, got {ready}"
        )
    return _config((frames - ready) // size, steps, min(stagger, steps), settings)


def srm(
    *,
    num_variables: int,
    max_steps: int,
    overlap: float | int,
    num_parallel: int = 1,
    **settings: Any,
) -> DecodeConfig:
    """The sequential schedules of Spatial Reasoning Models: the same overlap `o`, of all steps `R`.

    They give the whole decoding `R` steps, of which a group takes `L = R / ((G - 1) (1 - o) + 1)`.
    Group `g` starts at `floor(g (1 - o) L)` and takes `S = ceil(L)` steps, so that the last one
    ends with row `R`. These starts are evenly spaced if `(1 - o) L` is a whole number, and then
    the matrix is the one here. Otherwise some groups start a step later than others, which is
    refused. (It computes in float32, where a product just below a whole number makes a start one
    step early.) Which variables form a group is chosen in the course of its decoding, by their
    uncertainty; here it is `order`.

    Args:
        num_variables: tokens, or patches.
        max_steps: `R`, steps of the whole decoding.
        overlap: `o` in [0, 1).
        num_parallel: tokens of a group, which divide all.
        **settings: others of `DecodeConfig`.

    Raises:
        UsageError: if an argument is out of range, or groups start at uneven steps.

    Source: Wewer et al. 2025 (2502.21075); `CertaintySequential` of spatialreasoners.
    """
    variables = whole_number(num_variables, "num_variables")
    total = whole_number(max_steps, "max_steps")
    size = _divisor(num_parallel, "num_parallel", of=variables, name="num_variables")
    lag = 1 - _fraction(overlap, "overlap", maximum=1)
    groups = variables // size
    length = total / ((groups - 1) * lag + 1)
    starts = [int(g * lag * length) for g in range(groups)]
    stagger = starts[1] if groups > 1 else 0
    if groups > 1 and stagger == 0:
        raise UsageError(
            "overlap must leave a step or more between the starts of groups, got "
            f"{overlap} with max_steps={total}"
        )
    if starts != [g * stagger for g in range(groups)]:
        steps = max(1, round(length / lag.denominator)) * lag.denominator
        near = steps + (groups - 1) * lag * steps
        raise UsageError(
            f"max_steps must let {groups} groups start at even steps with overlap={overlap}, such "
            f"as {near}, got {total}"
        )
    return _config(groups, total - (groups - 1) * stagger, stagger, settings)


def rolling_diffusion(*, num_frames: int, window: int, steps: int, **settings: Any) -> DecodeConfig:
    """The window of Rolling Diffusion: `k = S / W`, a group per frame.

    While its window rolls, frame `w` of it has the local time `(w + t) / W`, and `t` falls from 1
    to 0 in `k` steps, after which the first frame is finished and one of noise is appended. Before,
    frame `w` has `clip(w / W + t, 0, 1)`, and `t` falls from 1 to 0 once; in `S` steps, this is the
    beginning of the matrix here. The end differs: its window stays full, so that after `N` frames
    it holds `W - 1` more, which are partly noise and are dropped. Here the window shrinks, and the
    matrix is that of the first `N` frames.

    Args:
        num_frames: `N`, frames that are kept.
        window: `W`, frames of the window that are not clean.
        steps: `S`, steps of a frame, a multiple of `W`.
        **settings: others of `DecodeConfig`.

    Raises:
        UsageError: if an argument is out of range.

    Source: Ruhe et al. 2024 (2402.09470), sections 3.2 and 3.3.
    """
    frames = whole_number(num_frames, "num_frames")
    steps = whole_number(steps, "steps")
    window = _divisor(window, "window", of=steps, name="steps")
    return _config(frames, steps, steps // window, settings)


def magi(*, chunk_num: int, num_steps: int, window_size: int = 4, **settings: Any) -> DecodeConfig:
    """The chunks of MAGI-1: `k = S / window_size`, a group per chunk.

    It counts stages of `k` steps. Chunk `c` enters at stage `c` and has, in step `j` of stage `s`,
    taken `(s - c) k + j` of its `S` steps; there are `chunk_num + window_size - 1` stages. These
    are the rows here but for the last, in which all are finished. Chunks of a prefix are finished
    from the start and not counted. Its times are warped afterwards, and those of its distilled
    network with 12 steps are uneven.

    Args:
        chunk_num: chunks to generate.
        num_steps: `S`, steps of a chunk, a multiple of `window_size`. It rounds others down, and
            the chunks then end with noise left.
        window_size: chunks that move at once.
        **settings: others of `DecodeConfig`.

    Raises:
        UsageError: if an argument is out of range.

    Source: Sand AI 2025 (2505.13211); `video_generate.py` of its code.
    """
    chunks = whole_number(chunk_num, "chunk_num")
    steps = whole_number(num_steps, "num_steps")
    window = _divisor(window_size, "window_size", of=steps, name="num_steps")
    return _config(chunks, steps, steps // window, settings)


def _config(groups: int, steps: int, stagger: int, settings: dict[str, Any]) -> DecodeConfig:
    twice = {"num_groups", "overlap", "steps"} & settings.keys()
    if twice:
        raise UsageError(f"{min(twice)} must be left to the preset, got {settings[min(twice)]}")
    overlap = 1 - stagger / steps if groups > 1 else 0.0
    return DecodeConfig(num_groups=groups, overlap=overlap, steps=steps, **settings)


def _fraction(value: float | int, name: str, *, maximum: int) -> Fraction:
    """A number as the fraction that was meant, such as 1/3 by 0.3333."""
    number = finite_number(value, name, minimum=0, maximum=maximum)
    return Fraction(number).limit_denominator(1000)


def _divisor(value: int, argument: str, *, of: int, name: str) -> int:
    number = whole_number(value, argument)
    if of % number:
        raise UsageError(f"{argument} must divide {name}={of}, got {number}")
    return number
