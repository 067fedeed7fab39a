"""Corrupted pictures, tables of pictures, and results of benchmarks."""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults_cases import INF, NAN, Case, Context, changed_bytes, paths, removed, replaced, tiny
from hydra import compose, initialize_config_dir
from PIL import Image, ImageCms, ImageOps

from rolldiff import Euler
from rolldiff.cli import config_dir
from rolldiff.data import Folder, Hub
from rolldiff.evaluation.results import Results, Timings
from rolldiff.evaluation.sweep import bench
from rolldiff.pixels import Record, load_image

SIZE = 8
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
MODES += ("HSV", "I", "F", "I;16", "I;16B")
DAMAGED = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "ICO", "TGA", "PPM", "QOI")
DAMAGED += ("JPEG2000", "PCX", "SGI", "DDS")


def pictures(context: Context) -> Iterator[Case]:
    """Files of a folder: of every mode and format, damaged, huge, odd, and under other names."""
    Image.init()
    endings = {kind: ending for ending, kind in reversed(Image.registered_extensions().items())}
    endings |= {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "JPEG2000": ".jp2"}

    def case(
        name: str,
        files: dict[str, bytes | Callable[[Path], Any]],
        right: str,
        expected: Callable[[int], np.ndarray] | None = None,
        **more: Any,
    ) -> Iterator[Case]:
        """The files of a folder, as greys and as colours."""
        for channels in (1, 3):
            ask = {"image_size": SIZE, "channels": channels, "on_error": "raise"} | more

            def run(ask: Any = ask) -> Any:
                folder = context.path()
                try:
                    for file, data in files.items():
                        path = folder / file
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(data) if isinstance(data, bytes) else data(path)
                    source = Folder(path=folder, **ask)
                    return source.image, source.label, source.class_names
                finally:
                    shutil.rmtree(folder)

            def check(found: Any, channels: int = channels) -> bool:
                image, label, names = found
                pixels = (image + 1) * 127.5
                sound = image.shape[1:] == (channels, SIZE, SIZE) and len(image) == len(label) > 0
                sound &= bool(((pixels >= -1e-3) & (pixels <= 255.001)).all())
                sound &= bool((label >= 0).all()) and int(label.max()) < max(len(names or ()), 1)
                if expected is None or not sound:
                    return sound
                like = expected(channels)
                return like.shape == pixels.shape[1:] and bool(
                    (np.abs(pixels.numpy() - like) <= 1.51).all()
                )

            yield Case(f"{name}, {channels} channels"[:120], run, right, check)

    def encoded(name: str, data: bytes, ending: str, *, either: bool = False) -> Iterator[Case]:
        """One file; what is right is what Pillow makes of it."""
        try:
            by_pillow(data, 3)
            right = "accept"
        except Exception:
            right = "refuse"
        if "LAB" in name:  # which Pillow converts in some files and not in others
            yield from case(name, {f"a{ending}": data}, "either")
            return
        yield from case(
            name, {f"a{ending}": data}, "either" if either else right, lambda c: by_pillow(data, c)
        )

    for kind in sorted(Image.SAVE.keys() & endings.keys()):
        for mode in MODES:
            try:
                data = saved(sample(mode), kind)
            except Exception:
                continue  # the format has no such mode
            yield from encoded(f"{kind} of mode {mode}", data, endings[kind])
    for kind in DAMAGED:
        whole = saved(sample("RGB"), kind)
        for name, damaged in changed_bytes(whole, context.random, 6):
            yield from encoded(f"{kind}, {name}", damaged, endings[kind], either=True)
        for other in (".png", ".jpg", ".tif", ".gif"):
            yield from encoded(f"{kind} named {other}", whole, other)

    for size in ((0, 0), (1, 0), (2**31 - 1, 1), (1, 2**31 - 1), (65535, 65535), (2**31, 2**31)):
        width, height = size
        for name, data, ending in (
            ("PNG", png(width, height), ".png"),
            ("PPM", b"P6\n%d %d\n255\n" % size + bytes(30), ".ppm"),
            ("PGM", b"P5\n%d %d\n65535\n" % size + bytes(30), ".pgm"),
            (
                "BMP",
                b"BM" + struct.pack("<IIIIIIHHI", 99, 0, 54, 40, *wrapped(size), 1, 24, 0),
                ".bmp",
            ),
            (
                "GIF",
                b"GIF89a" + struct.pack("<HH", width % 2**16, height % 2**16) + bytes(9),
                ".gif",
            ),
            (
                "TGA",
                bytes([0, 0, 2]) + bytes(9) + struct.pack("<HH", *(s % 2**16 for s in size)),
                ".tga",
            ),
        ):
            yield from case(f"{name} that says {size}", {f"a{ending}": data}, "refuse")
    for text in ("P5 8 8 0\n", "P5 8 8 70000\n", "P5 8 8 x\n", "P7\n", "P6", "P5 8 8 -1\n"):
        yield from case(f"PPM {text!r}", {"a.pgm": text.encode() + bytes(200)}, "refuse")
    for white in (1, 2, 100, 254, 255, 256, 1000, 4095, 65534, 65535):
        values = np.linspace(0, white, 64).astype(">u2" if white > 255 else np.uint8)
        data = b"P5 8 8 %d\n" % white + values.tobytes()
        exact = np.rint(values.astype(float) * 255 / white).reshape(1, 8, 8)
        yield from case(
            f"PPM whose white is {white}",
            {"a.pgm": data},
            "accept",
            lambda c, exact=exact: np.repeat(exact, c, 0),
        )
    shades = np.linspace(0, 65535, 64).reshape(8, 8)
    for dtype in (np.uint16, ">u2", "<u2"):
        for kind in ("PNG", "TIFF"):
            data = saved(Image.fromarray(shades.astype(dtype)), kind)
            yield from encoded(f"{kind} of {dtype}", data, endings[kind])
    for value in (NAN, INF, -INF, -0.1, 1.5, 1e-45, 0.0, -0.0, 1.0, 1e38):
        floats = np.full((8, 8), 0.5, np.float32)
        floats[3, 3] = value
        data = saved(Image.fromarray(floats), "TIFF")
        fine = np.isfinite(value) and 0 <= value <= 1
        exact = np.rint(np.float64(floats) * 255)[None] if fine else None
        yield from case(
            f"TIFF of floats with {value}",
            {"a.tif": data},
            "accept" if fine else "refuse",
            lambda c, exact=exact: np.repeat(exact, c, 0),
        )

    turned = sample("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        for orientation in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535):
            exif = Image.Exif()
            exif[274] = orientation
            data = saved(turned, kind, exif=exif)
            yield from encoded(f"{kind} turned by {orientation}", data, endings[kind])
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        for name, bad in (
            ("sRGB", profile),
            ("LAB", lab),
            ("a cut one", profile[:100]),
            ("random bytes", context.random.randbytes(300)),
            ("one byte", b"x"),
            *((f"sRGB, {n}", d) for n, d in changed_bytes(profile, context.random, 3)),
        ):
            try:
                data = saved(turned, kind, icc_profile=bad)
            except Exception:
                continue
            right = "accept" if "sRGB," not in name else "either"
            like = None if "sRGB," in name else lambda c, data=data: by_pillow(data, c)
            yield from case(
                f"{kind} with {name} as profile", {f"a{endings[kind]}": data}, right, like
            )
    for kind in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[274], exif[271] = 6, "camera"
        for name, bad in changed_bytes(exif.tobytes(), context.random, 8):
            try:
                data = saved(turned, kind, exif=b"Exif\0\0" + bad.removeprefix(b"Exif\0\0"))
            except Exception:
                continue
            yield from case(f"{kind} with EXIF, {name}", {f"a{endings[kind]}": data}, "accept")
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        frames = [sample("RGB", seed=n) for n in range(3)]
        for count in (1, 3):
            data = saved(frames[0], kind, save_all=True, append_images=frames[1:count])
            yield from encoded(f"{kind} of {count} frames", data, endings[kind])
            yield from encoded(
                f"{kind} of {count} frames, cut", data[:-20], endings[kind], either=True
            )
    for shape in ((1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (3, 65500), (65500, 3), (9, 8)):
        flat = Image.new("RGB", shape, (200, 100, 50))
        for kind in ("PNG", "TIFF", "BMP"):
            grey = np.asarray(flat.crop((0, 0, 1, 1)).convert("L")).item()
            colour = np.array([200, 100, 50] if kind else [])

            def like(c: int, grey: int = grey, colour: np.ndarray = colour) -> np.ndarray:
                value = colour if c == 3 else np.array([grey])
                return np.broadcast_to(value[:, None, None], (c, SIZE, SIZE))

            file = {f"a{endings[kind]}": saved(flat, kind)}
            yield from case(f"{kind} of {shape}", file, "accept", like)

    good = saved(sample("RGB"), "PNG")
    pixels = lambda c: by_pillow(good, c)  # noqa: E731
    for name in ("ü.png", "a b.PNG", "a\nb.png", "${x}.png", "-.png", "*.png", "'.png", "a.b.png"):
        yield from case(f"named {name!r}", {name: good}, "accept", pixels)
        yield from case(f"in a class {name!r}", {f"{name}/a.png": good}, "accept", pixels)
        yield from case(f"empty and named {name!r}", {name: b""}, "refuse")
        yield from case(f"skipped and named {name!r}", {name: b"x"}, "refuse", on_error="skip")
        yield from case(
            f"beside {name!r}", {name: b"x", "z.png": good}, "accept", pixels, on_error="skip"
        )
    for name in (".a.png", "a", "a.txt", "png", ".png", "a.png.txt"):
        yield from case(f"none but {name}", {name: good}, "refuse")
    for name, make in (
        ("a link to nothing", lambda p: p.symlink_to("nothing")),
        ("a link to itself", lambda p: p.symlink_to(p)),
        ("a link to the folder", lambda p: p.symlink_to(p.parent)),
        ("a folder", lambda p: p.mkdir()),
        ("a pipe", os.mkfifo),
        ("a socket of another", lambda p: p.symlink_to("/dev/zero")),
    ):
        yield from case(f"{name}, alone", {"a.png": make}, "refuse")
        yield from case(
            f"{name}, skipped", {"a.png": make, "b.png": good}, "accept", pixels, on_error="skip"
        )
    yield from case("nothing", {}, "refuse")
    yield from case("only text", {"a.png": b"text\n" * 99}, "refuse")
    for data in (None, b"", "", "nowhere.png", str(context.folder), "file:///nowhere.png"):
        yield from records(f"data {data!r}", data)
    for data in ("nothing://x", "memory://x", "zip://a.png::nowhere.zip", "://", "\0", "a" * 5000):
        yield from records(f"data {data[:20]!r}", data)
    yield from records("no label", good, label=None)


def records(name: str, data: Any, *, label: int | None = 0) -> Iterator[Case]:
    record = Record("it", data, label)
    yield Case(name, lambda: load_image(record, image_size=SIZE, channels=1))


def sample(mode: str, *, seed: int = 0) -> Image.Image:
    """A picture with all shades and, where the mode has it, all opacities."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (SIZE, SIZE, 4), np.uint8)
    image = Image.fromarray(colours, "RGBA")
    match mode:
        case "RGBA":
            return image
        case "La" | "LA":
            return image.convert("LA").convert(mode)
        case "RGBa" | "PA":
            return image.convert(mode) if mode == "RGBa" else image.convert("P").convert("PA")
        case "I;16" | "I;16B":
            values = generator.integers(0, 2**16, (SIZE, SIZE))
            return Image.fromarray(values.astype("<u2" if mode == "I;16" else ">u2"))
        case "F":
            return Image.fromarray(generator.random((SIZE, SIZE), np.float32))
        case "LAB":
            rgb = image.convert("RGB")
            spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            return (
                ImageCms.applyTransform(rgb, ImageCms.buildTransform(*spaces, "RGB", "LAB")) or rgb
            )
        case _:
            return image.convert("RGB").convert(mode)


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def by_pillow(data: bytes, channels: int) -> np.ndarray:
    """The pixels as Pillow's own conversions have them, transparent ones over white."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image: Image.Image = opened
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # of damaged EXIF data
            image = opened
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        elif image.mode == "F":
            values = np.asarray(image)
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError("no known white")
            image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
        elif image.mode == "I":
            raise ValueError("no known white")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (SIZE, SIZE):
            image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)
        return np.array(image, float).reshape(SIZE, SIZE, channels).transpose(2, 0, 1)


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says to be so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def wrapped(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] % 2**32, size[1] % 2**32


# ---------------------------------------------------------------------------------------------
# Tables

ROWS = 8


def tables(context: Context) -> Iterator[Case]:
    """Parquet shards: their columns, their types, their bytes, and the settings that name them."""
    import datasets.config
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    datasets.config.HF_DATASETS_CACHE = context.path()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    datasets.disable_progress_bars()
    shades = [10 + 30 * i for i in range(ROWS)]
    stored = [saved(Image.new("L", (SIZE, SIZE), shade), "PNG") for shade in shades]
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([{"bytes": data, "path": None} for data in stored], image_type)
    label = pa.array([i % 3 for i in range(ROWS)])

    def case(
        name: str,
        columns: Any,
        right: str,
        labels: list[int] | None = None,
        /,
        *,
        kept: list[int] | None = None,
        others: dict[str, bytes] | None = None,
        **more: Any,
    ) -> Case:
        """A folder with a shard of these columns.

        Args:
            name: what is wrong.
            columns: of the shard, or the table, or the bytes of its file.
            right: as in `Case`.
            labels: of the rows that are read.
            kept: the rows that are read; all by default.
            others: further shards.
            **more: settings of the data.
        """
        rows = list(range(ROWS)) if kept is None else kept
        ask = {"image_size": SIZE, "channels": 1, "on_error": "raise"} | more

        def run() -> Any:
            folder = context.path()
            try:
                path = folder / "train-0.parquet"
                if isinstance(columns, bytes):
                    path.write_bytes(columns)
                elif columns is not None:
                    pq.write_table(pa.table(columns), path)
                for file, data in (others or {}).items():
                    (folder / file).write_bytes(data)
                source = Hub(**{"path": folder} | ask)
                found = source.image, source.label, source.num_classes
                if source.streaming:
                    next(iter(source.train_dataloader()))
                return found
            finally:
                shutil.rmtree(folder)

        def check(found: Any) -> bool:
            image, label, classes = found
            pixels = ((image + 1) * 127.5).round()
            seen = [int(one[0, 0, 0]) for one in pixels]
            flat = bool((pixels == pixels[:, :, :1, :1]).all())
            sound = flat and set(seen) <= set(shades) and bool((label >= 0).all())
            if right == "either" or not sound:
                return sound
            expected = [
                (shades[row], labels[n] if labels else row % 3) for n, row in enumerate(rows)
            ]
            pairs = list(zip(seen, label.tolist(), strict=True))
            if ask.get("streaming"):
                return set(pairs) <= set(expected)
            return pairs == expected and classes == (
                0 if ask.get("label_column", 0) is None else 1 + max(label.tolist())
            )

        return Case(name[:120], run, right, check)

    def both(
        name: str, columns: Any, right: str, labels: Any = None, **more: Any
    ) -> Iterator[Case]:
        """Read at once, and as a stream where the classes are known without reading it."""
        yield case(name, columns, right, labels, **more)
        if right == "refuse":
            stream = {"streaming": True, "reference_images": 4}
            yield case(f"a stream, {name}", columns, right, labels, **stream | more)

    plain = {"image": image, "label": label}
    yield case("as it is", plain, "accept")
    yield case("pictures as bytes", plain | {"image": pa.array(stored)}, "accept")
    yield case("large", plain | {"image": pa.array(stored, pa.large_binary())}, "accept")
    yield case("no labels", {"image": image}, "accept", [0] * ROWS, label_column=None)
    yield case("no label column", {"image": image}, "refuse")
    yield case("no image column", {"label": label}, "refuse")
    yield case("no columns", {}, "refuse")
    yield case("no rows", {name: column[:0] for name, column in plain.items()}, "refuse")
    yield case("no file", None, "refuse")

    # Labels of every type. The values come first, and what they are as labels.
    whole = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
    whole += (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    for kind in (*whole, pa.float16(), pa.float32(), pa.float64()):
        values = np.array([i % 3 for i in range(ROWS)], kind.to_pandas_dtype())
        yield case(f"labels of {kind}", plain | {"label": pa.array(values, kind)}, "accept")
    yield case("booleans", plain | {"label": pa.array([True, False] * 4)}, "accept", [1, 0] * 4)
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        values = pa.array(["b", "a", "ü", ""] * 2, kind)
        right = "either" if kind == pa.string_view() else "accept"
        yield case(f"labels of {kind}", plain | {"label": values}, right, [2, 1, 3, 0] * 2)
    wrong: dict[str, Any] = {
        "dates": pa.array([1] * ROWS, pa.date32()),
        "times": pa.array([1] * ROWS, pa.timestamp("s")),
        "durations": pa.array([1] * ROWS, pa.duration("s")),
        "bytes": pa.array([b"x"] * ROWS),
        "decimals": pa.array([1] * ROWS, pa.decimal128(5, 2)),
        "lists": pa.array([[1]] * ROWS),
        "structures": pa.array([{"a": 1}] * ROWS),
        "pictures": image,
        "maps": pa.array([[(1, 2)]] * ROWS, pa.map_(pa.int64(), pa.int64())),
        "nothing": pa.nulls(ROWS),
    }
    for name, values in wrong.items():
        yield from both(f"labels that are {name}", plain | {"label": values}, "refuse")
    for value in (-1, 1.5, NAN, INF, -INF, -0.5, 1e300, 2**63, 2**64 - 1, -(2**63)):
        kind = None if not isinstance(value, int) or value < 2**63 else pa.uint64()
        values = pa.array([type(value)(i % 3) for i in range(ROWS - 1)] + [value], kind)
        yield case(f"a label {value}", plain | {"label": values}, "refuse")
    huge = pa.array([2**40] * ROWS)
    yield case("labels of 2^40", plain | {"label": huge}, "either")
    for count in (1, ROWS):
        for kind in (pa.int64(), pa.float64(), pa.string(), pa.bool_()):
            values = pa.array([i % 2 for i in range(ROWS)], pa.int8()).cast(kind).to_pylist()
            gone = pa.array([None] * count + values[count:], kind)
            columns = plain | {"label": gone}
            yield case(f"{count} null of {kind}", columns, "refuse")
            yield case(
                f"{count} null of {kind}, skipped",
                columns,
                "accept" if count == 1 else "refuse",
                [i % 2 for i in range(1, ROWS)],
                kept=list(range(1, ROWS)),
                on_error="skip",
            )

    # Pictures of every type.
    no_pictures: dict[str, Any] = {
        "numbers": label,
        "floats": pa.array([0.5] * ROWS),
        "booleans": pa.array([True] * ROWS),
        "lists": pa.array([[1, 2]] * ROWS),
        "lists of lists": pa.array([[[1, 2]]] * ROWS, pa.list_(pa.list_(pa.uint8()))),
        "texts": pa.array(["x"] * ROWS),
        "dates": pa.array([1] * ROWS, pa.date32()),
        "nothing": pa.nulls(ROWS),
        "null": pa.array([None] * ROWS, image_type),
        "empty": pa.array([b""] * ROWS),
        "random": pa.array([context.random.randbytes(99) for _ in range(ROWS)]),
        "null bytes": pa.array([{"bytes": None, "path": None}] * ROWS, image_type),
        "missing files": pa.array([{"bytes": None, "path": "nowhere.png"}] * ROWS, image_type),
        "other structures": pa.array([{"bytes": b"x", "more": 1}] * ROWS),
        "structures of numbers": pa.array([{"bytes": 1, "path": 2}] * ROWS),
    }
    for name, values in no_pictures.items():
        yield from both(f"pictures that are {name}", plain | {"image": values}, "refuse")
        yield case(f"skipped: {name}", plain | {"image": values}, "refuse", on_error="skip")
    for kind in (pa.binary_view(), pa.binary(len(stored[0]))):
        sized = [data.ljust(len(stored[0]), b"\0")[: len(stored[0])] for data in stored]
        yield case(f"pictures of {kind}", plain | {"image": pa.array(sized, kind)}, "either")
    for row in range(ROWS):
        for name, bad in (("null", None), ("empty", b""), ("cut", stored[row][:40])):
            changed: list[Any] = image.to_pylist()
            changed[row] = bad if bad is None else {"bytes": bad, "path": None}
            columns = plain | {"image": pa.array(changed, image_type)}
            rest = [i for i in range(ROWS) if i != row]
            labels = [i % 3 for i in rest]
            yield case(f"{name} in row {row}", columns, "refuse")
            yield case(
                f"{name} in row {row}, skipped",
                columns,
                "either",
                labels,
                kept=rest,
                on_error="skip",
            )

    # Settings.
    nasty: tuple[Any, ...] = ("", "x", None, 3, NAN, True, [], ["image"], {"a": 1}, "../x", "ü")
    for key in ("image_column", "label_column", "split", "path", "name", "streaming"):
        for value in nasty:
            if key == "name" or (key, value) in (("label_column", None), ("streaming", True)):
                continue
            yield case(f"{key}={value!r}", plain, "refuse", **{key: value})
    for split in ("test", "validation", "all", "train[:200%]", "train[", "train[2:1]", "train[:0]"):
        yield case(f"split={split}", plain, "either" if split == "all" else "refuse", split=split)
    for split in ("train[::2]", "train[:x]", "train[0.5:]", "train,test", "[:1]", "train[:-9]"):
        yield case(f"split={split}", plain, "refuse", split=split)
    yield case("a part", plain, "accept", kept=[0, 1, 2, 3], split="train[:50%]")
    yield case("the end", plain, "accept", kept=[6, 7], split="train[-2:]")
    for path in ("", " ", "nowhere", "\0", "~nobody/x", "a" * 5000, "*", "http://x", 3, [], NAN):
        yield case(f"path={path!r}"[:60], plain, "refuse", path=path)
    yield case("neither", plain, "refuse", path=None, name=None)
    yield case("another column twice", plain, "refuse", label_column="image")
    yield case("labels as pictures", plain, "refuse", image_column="label")
    stream = {"streaming": True, "reference_images": 4}
    classes = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    known = pa.table(plain).replace_schema_metadata(classes.arrow_schema.metadata)
    yield case("a stream", known, "accept", **stream)
    yield case("a stream of unknown classes", plain, "refuse", **stream)
    for key, value in (("held_out", 0.5), ("flip", True), ("reference_images", None)):
        yield case(f"a stream with {key}={value}", known, "refuse", **stream | {key: value})

    # What the file says of its columns.
    said = json.loads(known.schema.metadata[b"huggingface"])
    texts = [json.dumps(removed(said, path)) for path in paths(said)]
    for path in paths(said):
        for value in (None, 3, "x", [], {}, -1, [1], ["a"], ["a", "a", "b"], {"_type": "Nothing"}):
            texts.append(json.dumps(replaced(said, path, value)))
    for text in [*texts, "", "null", "[]", "{", "[" * 10**4, '{"info": NaN}']:
        odd = known.replace_schema_metadata({"huggingface": text})
        yield case(f"features {text}", odd, "either")
        if context.random.random() < 0.2:
            yield case(f"a stream, features {text}", odd, "either", **stream)

    # Bytes.
    shard = context.path() / "train-1.parquet"
    pq.write_table(pa.table(plain), shard)
    sound = shard.read_bytes()
    for name, data in changed_bytes(sound, context.random, 24):
        for others in ({}, {"train-1.parquet": sound, "train-2.parquet": sound}):
            which = "among sound ones" if others else "alone"
            yield case(f"{name}, {which}", data, "either", others=others)
        if context.random.random() < 0.3:
            yield case(f"a stream, {name}", data, "either", label_column=None, **stream)
    for name, column in (
        ("renamed", {"image": image, "labels": label}),
        ("fewer", {"image": image}),
    ):
        other = io.BytesIO()
        pq.write_table(pa.table(column), other)
        others = {"train-1.parquet": other.getvalue()}
        yield case(f"another shard has columns {name}", plain, "refuse", others=others)
    yield case("a text file", plain, "either", others={"notes.txt": b"hello"})
    yield case("a damaged table of text", plain, "either", others={"train-1.csv": b'"\0,\n"'})


# ---------------------------------------------------------------------------------------------
# Results


def results(context: Context) -> Iterator[Case]:
    """`results.jsonl` and `timings.json`, edited by hand or damaged."""
    folder = context.path()
    run = folder / "run"
    tiny(num_classes=10).save_pretrained(run)
    words = ["bench.num_groups=[1,2]", "bench.steps=[1]", "bench.joint_steps=[]", "bench.seeds=[0]"]
    words += ["bench.features=[pixels]", "bench.samples=8", "data=digits", "progress=false"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        bench(compose("bench", [f"ckpt={run}", *words]), conf=config_dir())
    text = (run / "bench/results.jsonl").read_text(encoding="utf-8")
    whole = json.loads(text.splitlines()[0])
    layout, solvers = tiny(num_classes=10).layout, {"euler": Euler()}

    def read(data: bytes) -> Any:
        path = context.path() / "results.jsonl"
        path.write_bytes(data)
        return Results(path, layout=layout, solvers=solvers).records

    def case(name: str, data: Any, right: str = "refuse") -> Case:
        line = data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n"
        older = {
            "grouping": "equal",
            "likelihood": None,
            "training": None,
            "floors": {},
            "real": {},
        }
        check = (
            (lambda found: True)
            if isinstance(data, bytes)
            else (lambda found: found == [older | data if isinstance(data, dict) else data])
        )
        return Case(f"results, {name}", lambda: read(line), right, check)

    yield case("whole", whole, "accept")
    for path in paths(whole):
        if not path:
            continue
        value = whole
        for key in path:
            value = value[key]
        yield case(f"without {path}", removed(whole, path), "either")
        for odd in (NAN, INF, None, True, "x", "", [], {}, -1, 1e400, 10**6, [[1]]):
            fits = type(odd) is type(value) or odd is None or value is None
            fits |= isinstance(value, int | float) and odd in (-1, 10**6)
            finite = not isinstance(odd, float) or odd - odd == 0
            right = "either" if fits and finite else "refuse"
            yield case(f"{path}={odd!r}", replaced(whole, path, odd), right)
    for key in whole:
        yield case(f"no {key}", {k: v for k, v in whole.items() if k != key}, "either")
    for name, data in changed_bytes(text.encode(), context.random, 40):
        yield case(name, data, "either")
    for data in (
        b"[]\n",
        b"null\n",
        b"3\n",
        b"{}\n",
        b'"x"\n',
        b"\xff\xfe\n",
        b"{\n",
        b"[" * 10**5,
    ):
        yield case(str(data[:20]), data, "refuse" if data.endswith(b"\n") else "either")
    yield case("twice", text.encode() + text.splitlines()[0].encode() + b"\n")

    def timed(data: bytes) -> Any:
        path = context.path() / "timings.json"
        path.write_bytes(data)
        return Timings(path, measure=lambda config: (0.0, 1.0)).fits

    for data in (b"[]", b"null", b"{", b'{"a": 1}', b'{"a": [1]}', b'{"a": [NaN, 1]}', b"\xff"):
        yield Case(f"timings, {data!r}", lambda data=data: timed(data))
    for odd in ([True, 1], ["1", 2], [1, None], [1e400, 1], [-1, 1], {}, [[1], 2]):
        data = json.dumps({"a": odd}).encode()
        yield Case(f"timings, {odd}", lambda data=data: timed(data))
    yield Case("timings, none", lambda: timed(b"{}"), "accept")
