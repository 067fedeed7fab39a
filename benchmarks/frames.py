"""Draw the frames of `rolldiff reconstruct out=FOLDER` in a row, before them the picture itself.

python benchmarks/frames.py PICTURE FOLDER OUT.jpg --bits 0.281

With `--bits` it prints what JPEG reaches with as many bits per pixel.
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

GAP, HEIGHT = 6, 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="what was reconstructed")
    parser.add_argument("folder", type=Path, help="of the frames")
    parser.add_argument("out", type=Path, help="the picture to write")
    parser.add_argument("--bits", type=float, help="per pixel, to compare with JPEG")
    args = parser.parse_args()
    parts = []
    for path in [args.picture, *sorted(args.folder.glob("*.png"))]:
        with Image.open(path) as image:
            width = round(image.width * HEIGHT / image.height)
            parts.append(image.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS))
    row = Image.new("RGB", (sum(p.width + GAP for p in parts) - GAP, HEIGHT), "white")
    left = 0
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width + GAP
    row.save(args.out, optimize=True, quality=88)
    if args.bits is not None:
        with Image.open(args.picture) as image:
            print(
                "JPEG: quality {}, {:.3f} bits per pixel, PSNR {:.2f} dB".format(
                    *best_jpeg(image.convert("RGB"), args.bits)
                )
            )


def best_jpeg(image: Image.Image, bits: float) -> tuple[int, float, float]:
    """The best JPEG of at most so many bits per pixel: its quality, its bits, its PSNR in dB."""
    pixels, found = np.asarray(image, dtype=np.float64), (0, 0.0, 0.0)
    for quality in range(1, 96):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        used = 8 * file.tell() / (image.width * image.height)
        if used > bits:
            break
        with Image.open(file) as again:
            error = ((np.asarray(again, dtype=np.float64) - pixels) ** 2).mean()
        found = quality, used, 10 * math.log10(255**2 / error)
    return found


if __name__ == "__main__":
    main()
