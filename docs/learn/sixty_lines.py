"""Grouped diffusion in sixty lines: no network, but the exact denoiser of Gaussian images.

python docs/learn/sixty_lines.py
"""

from itertools import pairwise
from pathlib import Path

import matplotlib
import torch

from rolldiff import GroupSchedule

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def natural_covariance(side):
    """Covariance of `side x side` pixels whose spectrum falls like that of photographs."""
    frequency = torch.fft.fftfreq(side, dtype=torch.float64) * side
    kernel = torch.fft.ifft2((1 + torch.hypot(frequency[:, None], frequency)) ** -2).real
    lag = (torch.arange(side)[:, None] - torch.arange(side)) % side
    covariance = (kernel / kernel[0, 0])[lag[:, None, :, None], lag[None, :, None, :]]
    return covariance.reshape(side**2, side**2)


def denoise(x_t, t, covariance):
    """E[x | x_t] and E[eps | x_t], if x_t = (1 - t) x + t eps with a time t for each pixel."""
    mixed = (1 - t)[:, None] * covariance * (1 - t) + torch.diag(t**2)
    solved = torch.linalg.solve(mixed, x_t.T).T
    return ((1 - t) * solved) @ covariance, t * solved


def decode(x_t, covariance, schedule):
    """The noisy pixels and their estimate in each row of the scheduling matrix, by Heun's steps."""
    times = schedule.matrix[:, schedule.group]  # one row per step, one column per pixel
    for t, s in pairwise(times):
        x, eps = denoise(x_t, t, covariance)
        yield x_t, x
        x_euler = x_t + (s - t) * (eps - x)  # pixels with s = t stay as they are
        x_next, eps_next = denoise(x_euler, s, covariance)
        x_t = x_t + (s - t) * (eps - x + eps_next - x_next) / 2
    yield x_t, x_t


def main(out=Path(__file__).parent / "pictures", side=16, steps=16, columns=6):
    """Decode by every schedule, measure the covariance of the images, and draw them."""
    size, covariance = side**2, natural_covariance(side)
    one = torch.randn(1, size, generator=torch.Generator().manual_seed(2)).double()
    settings = [(1, 1.0), *((g, o) for g in (4, size) for o in (0.0, 0.5, 1.0))]
    figure, axes = plt.subplots(len(settings), columns + 1, figsize=(10, 10), squeeze=False)
    print("| num_groups | overlap | solver steps | error of the covariance |\n|---|---|---|---|")
    for row, (groups, overlap) in zip(axes, settings, strict=True):
        schedule = GroupSchedule(num_tokens=size, num_groups=groups, overlap=overlap, steps=steps)
        # Every step is linear, so the images of unit vectors give the covariance of all images.
        shown, start = [], torch.cat([one, torch.eye(size).double()])
        for _, x in decode(start, covariance, schedule):
            shown.append(x[0].clone())  # one image; all states of all images take 10 GB
        images = x[1:]
        error = (images.T @ images - covariance).norm() / covariance.norm()
        print(f"| {groups} | {overlap} | {schedule.num_steps} | {error:.2%} |", flush=True)
        row[0].imshow(
            schedule.matrix.T.numpy(), aspect="auto", cmap="Blues_r", interpolation="none"
        )
        row[0].set_ylabel(f"groups {groups}\noverlap {overlap}")
        for i, axis in enumerate(row[1:]):
            x = shown[i * (len(shown) - 1) // (columns - 1)]
            axis.imshow(x.view(side, side).numpy(), cmap="gray", vmin=-2.5, vmax=2.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(Path(out) / "sixty_lines.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
