"""One solve for every prediction.

What a network predicts is a fixed combination of data and noise, `y = a x + b eps`. Together with
`x_t = alpha x + sigma eps` that is a 2 x 2 linear system with determinant `det = alpha b - sigma
a`:

    x = (b x_t - sigma y) / det,        eps = (alpha y - a x_t) / det.

    x: (1, 0)     eps: (0, 1)     v: (-sigma, alpha)     velocity: (alpha', sigma')

An error `dy` of the prediction keeps `alpha dx + sigma deps = 0`, so in the space of any other
prediction `z` it is `(det_z / det_y) dy`: the space of the loss is a weight and nothing more.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.noise import NoiseSchedule

__all__ = [
    "Estimate",
    "Inverse",
    "Prediction",
    "coefficients",
    "inverse",
    "solve",
    "squared_error",
    "weight",
]

# Closer than this to 0 and 1 the weight of the loss stays as it is: the ratio of two determinants
# may have a pole at an end (Li and He 2025 clip at the same value).
EDGE = 0.05

Prediction = Literal["x", "eps", "v", "velocity"]


class Estimate(NamedTuple):
    """The posterior means `E[x | x_t]` and `E[eps | x_t]` of the tokens."""

    x: Tensor
    eps: Tensor


class Inverse(NamedTuple):
    """`(x, eps) = from_x_t x_t + from_y y`: both stacked, in front of the dimensions of `t`."""

    from_x_t: Float[Tensor, "2 *T"]
    from_y: Float[Tensor, "2 *T"]


def coefficients(
    prediction: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"]
) -> tuple[Float[Tensor, "*T"], Float[Tensor, "*T"]]:
    """`(a, b)` of the prediction `y = a x + b eps` at the times `t`."""
    match prediction:
        case "x":
            return t.new_ones(t.shape), t.new_zeros(t.shape)
        case "eps":
            return t.new_zeros(t.shape), t.new_ones(t.shape)
        case "v":
            return -noise.sigma(t), noise.alpha(t)
        case "velocity":
            return noise.rates(t)
    raise ValueError(
        f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}"
    )


def _determinant(prediction: Prediction, noise: NoiseSchedule, t: Tensor) -> Tensor:
    a, b = coefficients(prediction, noise, t)
    return noise.alpha(t) * b - noise.sigma(t) * a


def inverse(prediction: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"]) -> Inverse:
    """The inverse of the system above at the times `t`.

    At t = 0 the system says nothing about the noise: what comes out is not finite and the caller
    masks it. At t = 1 a prediction of the noise says nothing about the data: the estimate is 0, the
    middle of its range.
    """
    a, b = coefficients(prediction, noise, t)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    det = alpha * b - sigma * a
    from_x_t, from_y = torch.stack([b, -a]) / det, torch.stack([-sigma, alpha]) / det
    if prediction == "x":  # the data as they come, also where the determinant is 0
        from_x_t[0], from_y[0] = 0, 1
    if prediction == "eps":
        from_x_t[0], from_y[0] = (c[0].where(alpha > 0, 0.0) for c in (from_x_t, from_y))
        from_x_t[1], from_y[1] = 0, 1
    return Inverse(from_x_t, from_y)


def solve(y: Float[Tensor, "B N D"], x_t: Float[Tensor, "B N D"], by: Inverse) -> Estimate:
    """The estimate of data and noise behind a network's output.

    `by` broadcasts with it; without a batch of its own its times are `[1, N, 1]`, for what is
    stacked comes first.
    """
    return Estimate(*torch.addcmul(by.from_x_t * x_t, by.from_y, y).unbind(0))


def weight(
    prediction: Prediction, loss: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"]
) -> Float[Tensor, "*T"]:
    """`(det_loss / det_prediction)^2`, the weight of a squared error of the prediction."""
    return (_determinant(loss, noise, t) / _determinant(prediction, noise, t)) ** 2


def squared_error(
    y: Float[Tensor, "B N D"],
    x: Float[Tensor, "B N D"],
    eps: Float[Tensor, "B N D"],
    t: Float[Tensor, "B N"],
    *,
    prediction: Prediction,
    loss: Prediction,
    noise: NoiseSchedule,
) -> Float[Tensor, ""]:
    """The mean squared error of a prediction in the space of the loss, over the tokens that move.

    Clean tokens (t = 0) and waiting ones (t = 1) are context and count for nothing.
    """
    a, b = (c[..., None] for c in coefficients(prediction, noise, t))
    error = (y - (a * x + b * eps)).square().mean(-1)
    scale = weight(prediction, loss, noise, t.clamp(EDGE, 1 - EDGE))
    moves = (t > 0) & (t < 1)
    return (scale * error).where(moves, 0.0).sum() / moves.sum().clamp(min=1)
