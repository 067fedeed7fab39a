"""Draw the README's picture: when each group moves, and images in the course of decoding.

python benchmarks/idea.py RUN benchmarks/pictures/idea.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from rolldiff import DecodeConfig, Decoder, Patches

STEPS, FRAMES, LABEL, SEED = 16, 7, 3, 3
SETTINGS = [
    ("num_groups 1\nordinary diffusion", 1, 1.0),
    ("num_groups 4, overlap 0.5\nrolling", 4, 0.5),
    ("num_groups 4, overlap 0\ngroup by group", 4, 0.0),
    ("num_groups 16, overlap 0\nblock autoregressive", 16, 0.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder of `rolldiff train`")
    parser.add_argument("out", help="the PNG to write")
    args = parser.parse_args()
    decoder = Decoder.from_pretrained(args.run)
    figure, axes = plt.subplots(
        len(SETTINGS),
        FRAMES + 1,
        figsize=(11, 5.6),
        gridspec_kw={"width_ratios": [2.6] + [1] * FRAMES, "wspace": 0.12, "hspace": 0.35},
    )
    for row, (title, num_groups, overlap) in zip(axes, SETTINGS, strict=True):
        config = DecodeConfig(num_groups=num_groups, overlap=overlap, steps=STEPS)
        matrix = config.schedule(Patches((num_groups, 1))).matrix
        row[0].imshow(matrix.T, aspect="auto", cmap="Blues_r", vmin=0, vmax=1, interpolation="none")
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=12)
        row[0].set_xticks([0, len(matrix) - 1])
        row[0].set_yticks([])
        frames = decoder.stream([LABEL], config, seed=SEED, frames=FRAMES)
        for axis, frame in zip(row[1:], frames, strict=True):
            axis.imshow(frame.image[0, 0], cmap="gray", vmin=-1, vmax=1, interpolation="none")
            done = frame.finished.sum(0)[0] - 0.5  # final rows
            if 0 < done < 7:
                axis.axhline(done, color="tab:orange", linewidth=1.5)
            axis.axis("off")
    axes[0, 0].set_title("local time of each group (white: noise, blue: data)", fontsize=10)
    axes[-1, 0].set_xlabel("network calls", labelpad=-2)
    middle = axes[0, 1 + FRAMES // 2]
    middle.set_title("one image being decoded: final above the line, preview below", fontsize=10)
    figure.savefig(args.out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
