"""The wire: OpenAI's image requests and answers, with the settings of a grouped decoding beside.

A request is a mapping of fields, those of JSON or of a form. What it asks for becomes an
`ImageRequest`, or a `RequestError` that says which field is wrong. Nothing here computes; the
worker does. A stream is server-sent events: `partial_image` for each frame and `completed`, each
with the whole picture as base64 and with `rolldiff`, which says what it is.
"""

import base64
import contextlib
import io
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rolldiff.decoder import DecodeConfig
from rolldiff.diffusion.layout import resized
from rolldiff.diffusion.schedule import GroupSchedule
from rolldiff.errors import UsageError, boolean, finite_number, known_names, shown, whole_number
from rolldiff.evaluation.images import film
from rolldiff.nn.denoiser import Guidance
from rolldiff.pixels import Record, load_image
from rolldiff.serving.model import Limits, Served

__all__ = [
    "ImageRequest",
    "Picture",
    "RequestError",
    "answer",
    "edited",
    "error_body",
    "error_event",
    "event",
    "parse",
    "parse_form",
    "parse_json",
    "parse_schedule",
]

Kind = Literal["image_generation", "image_edit"]

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF"}
SETTINGS = ("num_groups", "overlap", "steps", "order", "grouping")
NUMBERS = frozenset(
    {
        *("n", "partial_images", "output_compression", "seed"),
        *("num_groups", "overlap", "steps", "num_inference_steps", "guidance_scale"),
    }
)
# Fields of OpenAI's that change nothing here.
IGNORED = ("moderation", "quality", "style", "user", "input_fidelity")
FIELDS = (
    *("prompt", "model", "n", "size", "stream", "partial_images", "response_format"),
    *("output_format", "output_compression", "background", *IGNORED),
    *("seed", *SETTINGS, "num_inference_steps", "guidance_scale"),
)
MAX_SEED = 2**63 - 1
MAX_PROMPT = 4000


class RequestError(Exception):
    """A request that is not answered: status, reason, the field, and a code for programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """What a request asks for.

    Attributes:
        label: the class; None for none.
        n: number of images.
        size: height and width.
        config: the settings of the decoding.
        seed: of the noise, given or drawn.
        stream: whether frames are sent while it runs.
        partial_images: frames before the finished image.
        output_format: a key of `FORMATS`.
        output_compression: the quality of JPEG and WebP, 0 … 100.
        quality: as it was given; answers repeat it.
        image: `[1, C, H, W]` bytes, of an edit.
        mask: `[H, W]`, True where it is drawn anew.
    """

    label: int | None
    n: int
    size: tuple[int, int]
    config: DecodeConfig
    seed: int
    stream: bool
    partial_images: int
    output_format: str
    output_compression: int
    quality: str
    image: Tensor | None = None
    mask: Tensor | None = None


def parse_json(body: bytes) -> dict[str, Any]:
    """The fields of a JSON body.

    Raises:
        RequestError: if it is not an object, or holds numbers that are none.
    """

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number")

    try:
        found = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # texts of other encodings are ValueErrors too
        raise RequestError("the body must be a JSON object") from error
    if not isinstance(found, dict):
        raise RequestError(f"the body must be a JSON object, got {shown(found)}")
    return found


def parse_form(form: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a form, whose texts stand for numbers and truth values."""
    values: dict[str, Any] = {}
    for name, text in form.items():
        values[name] = text
        if name == "stream" and text.strip().lower() in ("true", "false"):
            values[name] = text.strip().lower() == "true"
        elif name in NUMBERS:
            with contextlib.suppress(ValueError, RecursionError):  # `parse` says what it must be
                values[name] = json.loads(text)
    return values


def parse(
    given: Mapping[str, Any],
    served: Served,
    limits: Limits,
    *,
    image: Tensor | None = None,
    mask: Tensor | None = None,
) -> ImageRequest:
    """What the fields of a request ask for.

    Args:
        given: the fields.
        served: the model.
        limits: what is accepted.
        image: of an edit, with `mask`.
        mask: likewise.

    Raises:
        RequestError: if a field is unknown, or its value is out of range.
    """
    try:
        return _parse(given, served, limits, image=image, mask=mask)
    except UsageError as error:
        # The rules name their argument first, by the name that the field has.
        name = str(error).split(maxsplit=1)[0]
        raise RequestError(str(error), param=name if name in FIELDS else None) from error


def parse_schedule(given: Mapping[str, Any], served: Served, limits: Limits) -> GroupSchedule:
    """When each group moves under the fields of a request that are settings of a decoding.

    Raises:
        RequestError: if a field is unknown, or its value is out of range.
    """
    try:
        known_names(given, ("size", *SETTINGS), "fields")
        size = _size(given.get("size", "auto"), served, limits=limits)
        return _schedule(_settings(given, served, limits), size, served, limits=limits)
    except UsageError as error:
        raise RequestError(str(error)) from error


def _parse(
    given: Mapping[str, Any],
    served: Served,
    limits: Limits,
    *,
    image: Tensor | None,
    mask: Tensor | None,
) -> ImageRequest:
    given = {name: value for name, value in given.items() if value is not None}
    known_names(given, FIELDS, "fields")
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UsageError(
            f"prompt must be a text of at most {MAX_PROMPT} characters, got {shown(prompt)}"
        )
    model = given.get("model", served.name)
    if model != served.name:
        raise RequestError(
            f"model must be {served.name}, got {shown(model)}",
            status=404,
            param="model",
            code="model_not_found",
        )
    n = whole_number(given.get("n", 1), "n", maximum=limits.images)
    stream = boolean(given.get("stream", False), "stream")
    if stream and n > 1:
        raise UsageError(f"n must be 1 with stream, whose events do not say which image, got {n}")
    if image is not None and n > 1:
        raise UsageError(f"n must be 1 for an edit, got {n}")
    output = _one_of(given, "output_format", tuple(FORMATS))
    if output == "gif" and (stream or n > 1):
        raise UsageError("output_format must be png, jpeg or webp with stream or n above 1")
    _one_of(given, "response_format", ("b64_json",))
    _one_of(given, "background", ("auto", "opaque"))
    quality = given.get("quality", "auto")
    if not isinstance(quality, str) or len(quality) > 20:
        raise UsageError(f"quality must be a short text, got {shown(quality)}")
    label = served.label(prompt)
    config = _settings(given, served, limits)
    assert isinstance(config.guidance, Guidance)  # DecodeConfig has turned numbers into one
    if config.guidance.scale and label is None:
        raise UsageError(
            "guidance_scale must be 1 without a class, which the prompt names, got "
            f"{config.guidance.scale + 1:g}"
        )
    size = served.image_size if image is None else (image.shape[2], image.shape[3])
    if image is None or "size" in given:
        size = _size(given.get("size", "auto"), served, limits=limits)
    if image is not None and size != tuple(image.shape[2:]):
        raise UsageError(f"size must be auto or that of the image, got {given['size']}")
    _schedule(config, size, served, limits=limits)
    maximum = limits.partial_images
    seed = whole_number(
        given.get("seed", int(torch.randint(2**31, (1,)))), "seed", minimum=0, maximum=MAX_SEED
    )
    return ImageRequest(
        label=label,
        n=n,
        size=size,
        config=config,
        seed=seed,
        stream=stream,
        partial_images=whole_number(
            given.get("partial_images", 0), "partial_images", minimum=0, maximum=maximum
        ),
        output_format=output,
        output_compression=whole_number(
            given.get("output_compression", 90), "output_compression", minimum=0, maximum=100
        ),
        quality=quality,
        image=image,
        mask=mask,
    )


def _one_of(given: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    value = given.get(name, choices[0])
    if value not in choices:
        raise UsageError(f"{name} must be {' or '.join(choices)}, got {shown(value)}")
    return value


def _settings(given: Mapping[str, Any], served: Served, limits: Limits) -> DecodeConfig:
    """The server's settings of a decoding, changed by those of the request."""
    changed = {name: given[name] for name in SETTINGS if name in given}
    if "num_inference_steps" in given:
        if changed.get("steps", given["num_inference_steps"]) != given["num_inference_steps"]:
            raise UsageError(
                f"steps must be num_inference_steps if both are given, got {shown(given['steps'])} "
                f"and {shown(given['num_inference_steps'])}"
            )
        changed["steps"] = whole_number(given["num_inference_steps"], "num_inference_steps")
    if "order" in changed and not isinstance(changed["order"], str):
        raise UsageError(f"order must be a text, got {shown(changed['order'])}")
    if "overlap" in changed:  # 0 is as good as 0.0
        changed["overlap"] = finite_number(changed["overlap"], "overlap", minimum=0, maximum=1)
    if "steps" in changed:
        changed["steps"] = whole_number(changed["steps"], "steps", maximum=limits.steps)
    if "guidance_scale" in given:
        scale = finite_number(given["guidance_scale"], "guidance_scale", minimum=-1e6, maximum=1e6)
        changed["guidance"] = scale - 1
    return replace(served.config, **changed)


def _schedule(
    config: DecodeConfig, size: tuple[int, int], served: Served, *, limits: Limits
) -> GroupSchedule:
    layout = served.decoder.layout
    schedule = config.schedule(resized(layout, size) if size != served.image_size else layout)
    if schedule.num_steps > limits.steps:
        raise UsageError(
            f"steps must be at most {limits.steps} in all over the groups, got {schedule.num_steps}"
        )
    return schedule


def _size(size: Any, served: Served, *, limits: Limits) -> tuple[int, int]:
    """Height and width of `WIDTHxHEIGHT`."""
    if size == "auto":
        return served.image_size
    width, cross, height = size.partition("x") if isinstance(size, str) else ("", "", "")
    digits = width.isascii() and width.isdigit() and height.isascii() and height.isdigit()
    if not (cross and digits and len(size) < 20 and int(width) and int(height)):
        raise UsageError(f"size must be auto or WIDTHxHEIGHT, such as 32x32, got {shown(size)}")
    return served.size((int(height), int(width)), pixels=limits.pixels)


# ---------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class Picture:
    """Images on their way to a client.

    Attributes:
        pixels: `[n, H, W, 3]` bytes.
        facts: what they are: `tau`, `nfe`, `step`, `finished_rows`, `finished`.
        last: whether they are finished.
        tokens: token evaluations of one image so far.
        warnings: what the checkpoint was not trained for.
    """

    pixels: np.ndarray
    facts: Mapping[str, float | int]
    last: bool
    tokens: int
    warnings: Sequence[str] = ()


def encoded(pixels: Sequence[np.ndarray], request: ImageRequest) -> str:
    """A picture in the format of the request, as base64; of several frames, a film."""
    frames = [Image.fromarray(frame) for frame in pixels]
    options: dict[str, Any] = {}
    if request.output_format in ("jpeg", "webp"):
        options["quality"] = request.output_compression
    if request.output_format == "gif":
        options = film(frames, seconds=3.0, hold=1.5)
    file = io.BytesIO()
    frames[0].save(file, format=FORMATS[request.output_format], **options)
    return base64.b64encode(file.getvalue()).decode()


def edited(
    picture: bytes, mask: bytes | None, served: Served, *, limits: Limits
) -> tuple[Tensor, Tensor]:
    """The image `[1, C, H, W]` in bytes and the mask `[H, W]`, True where it is drawn anew.

    Args:
        picture: the file of what is changed.
        mask: the file of one that is transparent where the image is drawn anew; None for the
            transparent part of the picture itself.
        served: the model.
        limits: what is accepted.

    Raises:
        RequestError: if a file is no picture, sizes do not fit, or nothing is transparent.
    """
    channels = served.decoder.layout.image_shape[0]
    size = _size_of(picture, "image")
    try:
        served.size((size[1], size[0]), pixels=limits.pixels)
        pixels = load_image(Record("image", picture, 0), image_size=None, channels=channels)
    except UsageError as error:
        raise RequestError(str(error), param="image") from error
    name = "image" if mask is None else "mask"
    source = picture if mask is None else mask
    if (other := _size_of(source, name)) != size:
        raise RequestError(
            f"mask must have the size of the image, {size[0]}x{size[1]}, got {other[0]}x{other[1]}",
            param="mask",
        )
    try:
        with Image.open(io.BytesIO(source)) as opened:
            alpha = np.asarray(opened.convert("RGBA"))[..., 3]
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise RequestError(f"{name} must be a picture, got a damaged one", param=name) from error
    if not (alpha < 128).any():
        raise RequestError(
            f"{name} must be transparent where the image is drawn anew, got no transparent pixel",
            param="mask",
        )
    return pixels[None], torch.from_numpy(alpha < 128)


def _size_of(data: bytes, name: str) -> tuple[int, int]:
    """Width and height, from the head of a file, before its pixels take memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as opened:
                return opened.size
    except Exception as error:
        raise RequestError(f"{name} must be a picture such as a PNG file", param=name) from error


# ---------------------------------------------------------------------------------------------
# Answers


def about(request: ImageRequest, picture: Picture) -> dict[str, Any]:
    """What is said of a picture beside it."""
    facts = {**picture.facts, "seed": request.seed}
    return {**facts, "warnings": list(picture.warnings)} if picture.warnings else facts


def common(request: ImageRequest) -> dict[str, Any]:
    """What every answer repeats."""
    height, width = request.size
    return {
        "size": f"{width}x{height}",
        "quality": request.quality,
        "background": "opaque",
        "output_format": request.output_format,
    }


def usage(request: ImageRequest, picture: Picture) -> dict[str, Any]:
    """Output tokens are the token evaluations of all images; a prompt has no tokens."""
    output = picture.tokens * request.n
    details = {"text_tokens": 0, "image_tokens": 0}
    return {
        "total_tokens": output,
        "input_tokens": 0,
        "output_tokens": output,
        "input_tokens_details": details,
    }


def answer(request: ImageRequest, pictures: Sequence[Picture]) -> dict[str, Any]:
    """The answer to a request without a stream, from its frames."""
    last = pictures[-1]
    if request.output_format == "gif":
        images = [encoded([picture.pixels[0] for picture in pictures], request)]
    else:
        images = [encoded([pixels], request) for pixels in last.pixels]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image} for image in images],
        **common(request),
        "usage": usage(request, last),
        "rolldiff": about(request, last),
    }


def event(request: ImageRequest, picture: Picture, *, kind: Kind, index: int) -> bytes:
    """A server-sent event: the frame `index`, or the finished image."""
    name = f"{kind}.{'completed' if picture.last else 'partial_image'}"
    data = {
        "type": name,
        "b64_json": encoded([picture.pixels[0]], request),
        "created_at": int(time.time()),
        **common(request),
    }
    data |= {"usage": usage(request, picture)} if picture.last else {"partial_image_index": index}
    data["rolldiff"] = about(request, picture)
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def error_event(refused: RequestError) -> bytes:
    """An error in the middle of a stream."""
    return f"event: error\ndata: {json.dumps(error_body(refused))}\n\n".encode()


def error_body(refused: RequestError) -> dict[str, Any]:
    """An error in OpenAI's words."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(refused),
            "type": kinds.get(refused.status, kind),
            "param": refused.param,
            "code": refused.code,
        }
    }
